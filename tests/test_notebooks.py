"Every notebook runs, is clean and small, and the package and README.md are what the notebooks make."

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fastcore.nbio import nb2str, read_nb
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.test import test_nb as run_notebook

ROOT = Path(__file__).resolve().parents[1]
HIDDEN = (".", "_")
NOTEBOOKS = sorted(
    path
    for folder in ("nbs", "tutorials")
    for path in (ROOT / folder).rglob("*.ipynb")
    if not any(part.startswith(HIDDEN) for part in path.relative_to(ROOT).parts)
)
MAX_BYTES = 300_000
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.relative_to(ROOT).as_posix())


@each_notebook
def test_runs(path, models, monkeypatch):
    monkeypatch.setenv("PLOTLY_RENDERER", "plotly_mimetype")
    passed, _ = run_notebook(path, skip_flags=get_config(ROOT).tst_flags.split(), basepath=ROOT)
    assert passed, "a cell failed: its traceback stands under 'Captured stderr'"


@each_notebook
def test_clean(path):
    nb = read_nb(path)
    before = nb2str(nb)
    clean_nb(nb)
    assert nb2str(nb) == before, f"run: scripts/notebooks clean ({path.name} has execution counts or metadata)"


@each_notebook
def test_small(path):
    assert path.stat().st_size <= MAX_BYTES, f"{path.stat().st_size} bytes: show less, or keep it in a record"
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            html = "".join(output.get("data", {}).get("text/html", ""))
            assert "plotly.js v" not in html and "cdn.plot.ly" not in html, "an output holds plotly.js: save it with scripts/notebooks"


def modules(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in folder.rglob("*.py")}


def test_package_in_step(tmp_path):
    for name in ("nbs", "offpolicy_rl"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for path in (tmp_path / "offpolicy_rl").rglob("*.py"):
        if path.name != "__init__.py":
            path.unlink()
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"], cwd=tmp_path, env=env, check=True)
    ours, exported = modules(ROOT / "offpolicy_rl"), modules(tmp_path / "offpolicy_rl")
    differing = sorted(name for name in ours.keys() | exported.keys() if ours.get(name) != exported.get(name))
    assert not differing, f"edited by hand, or not exported: {', '.join(differing)}: run nbdev-export"


def test_readme_in_step():
    from readme import readme

    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme(), "run: python docs/readme.py"
