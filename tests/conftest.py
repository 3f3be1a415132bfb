"What the tests share."

import gc
import os
import sys
from pathlib import Path

# Two test processes share two cores: a second thread in each makes small tensors ten times slower, not faster.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))


def pytest_sessionfinish():
    gc.freeze()  # IPython collects garbage at exit once for every notebook that ran in this process: a quarter of a second each
