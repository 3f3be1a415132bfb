"What the tests share."

import gc
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))


def pytest_sessionfinish():
    gc.freeze()  # IPython collects garbage at exit once for every notebook that ran in this process: a quarter of a second each
