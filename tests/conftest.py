"What the tests share, and how they are shared out."

import gc
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

# The test processes share the cores: a second thread in each makes small tensors ten times slower, not faster.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))


# How the processes of `make test` share the tests: a file goes to one of them, the files that use the built site to the same, each notebook by itself.
# What takes longest begins first and the notebooks come last: they are short, so no process is left alone with a long file.
LONGEST = ("site", "test_vllm", "test_explore", "test_llm", "test_tasks", "test_keeping", "test_parallel", "test_lab_browser", "test_cli",
           "test_data_parallel", "test_scale")


def share(nodeid: str) -> str:
    file = nodeid.partition(".py")[0].rpartition("/")[2]
    if "::test_runs[" in nodeid: return nodeid
    return "site" if file in ("test_site", "test_add_estimator") else file


def pytest_collection_modifyitems(items):
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(share(item.nodeid), len(rank) + ("::" in share(item.nodeid))))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Shares(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str: return share(nodeid)

    config.option.loadscopereorder = False      # in the order of the items
    return Shares(config, log)


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
