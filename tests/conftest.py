"What the tests share."

import gc
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

# Two test processes share two cores: a second thread in each makes small tensors ten times slower, not faster.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))


@pytest.fixture(scope="module")
def models(pytestconfig):
    "Warm-started models are made once for all tests, and not in the user's own cache."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFFPOLICY_RL_CACHE", str(pytestconfig.cache.mkdir("models")))
        yield


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    "The site, built once: `html` its folder, `work` what its builder keeps for the next build."
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, str(ROOT / "docs" / "build.py"), "--out", str(folder / "html"), "--work", str(folder / "work")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return SimpleNamespace(html=folder / "html", work=folder / "work")


def pytest_sessionfinish():
    gc.freeze()  # IPython collects garbage at exit once for every notebook that ran in this process: a quarter of a second each
