"The metadata agree, the built wheel is whole, the import is light, and the repository speaks of no machine but the reader's."

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

import offpolicy_rl

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "offpolicy_rl"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = {"lab", "llm", "vllm", "vllm-cpu", "trl", "track", "tasks", "docs", "dev"}
HEAVY = ["transformers", "vllm", "plotly", "IPython", "ipywidgets", "jupyter", "jupyter_core", "pandas", "datasets", "trl"]
IMPORT_SECONDS = 0.15


@pytest.fixture(scope="module")
def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def run_python(code: str, cwd: Path, python: str = sys.executable, **env) -> str:
    "What a fresh interpreter prints."
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | env
    done = subprocess.run([python, "-c", code], cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_settings_agree_with_nbdev(settings):
    for key, value in PROJECT["tool"]["nbdev"].items():
        assert settings[key] == str(value), f"settings.ini {key} = {settings[key]}, pyproject.toml [tool.nbdev] {key} = {value}"
    assert settings["lib_name"] == PROJECT["project"]["name"]
    assert settings["git_url"] == PROJECT["project"]["urls"]["Repository"]
    assert settings["author"] == PROJECT["project"]["authors"][0]["name"]
    assert settings["author_email"] == PROJECT["project"]["authors"][0]["email"]
    scripts = dict(item.split("=") for item in settings["console_scripts"].split())
    assert scripts == PROJECT["project"]["scripts"]


def test_version_is_one(settings):
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert settings["version"] == offpolicy_rl.__version__
    assert f"\nversion: {settings['version']}\n" in citation


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built from the sdist in a copy of the tree: a build leaves files behind, and takes in what an earlier one left."
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(PACKAGE, tree / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_wheel_holds_the_package(wheel):
    built = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    kept = {path for pattern in ("*.py", "data/*.tsv", "py.typed") for path in PACKAGE.rglob(pattern)}
    expected = {path.relative_to(ROOT).as_posix() for path in kept}
    assert "offpolicy_rl/data/systems.tsv" in expected and "offpolicy_rl/py.typed" in expected
    assert built == expected


def test_wheel_metadata(wheel, settings):
    archive = zipfile.ZipFile(wheel)
    read = {name.split("/")[-1]: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    metadata = read["METADATA"]
    field = lambda name: re.findall(rf"^{name}: (.*)$", metadata, re.M)
    assert field("Version") == [settings["version"]]
    assert field("Summary") == [settings["description"]]
    assert field("Requires-Python") == [f">={settings['min_python']}"]
    assert field("License-Expression") == ["Apache-2.0"]
    assert set(field("Provides-Extra")) == EXTRAS
    base = [line for line in field("Requires-Dist") if "extra ==" not in line]
    assert sorted(base) == sorted(settings["requirements"].split())
    assert all(f"Programming Language :: Python :: {v}" in field("Classifier") for v in settings["tested_python"].split())
    entry_points = ConfigParser(delimiters=["="])
    entry_points.read_string(read["entry_points.txt"])
    assert dict(entry_points["nbdev"]) == {"offpolicy_rl": "offpolicy_rl._modidx:d"}
    assert dict(entry_points["console_scripts"]) == PROJECT["project"]["scripts"]


def test_wheel_imports_elsewhere(wheel, tmp_path):
    "Installed away from the repository, the package lists its whole catalogue."
    home = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(home), str(wheel)]
    subprocess.run(install, check=True)
    code = """
import json, offpolicy_rl
rows = offpolicy_rl.catalogue()
print(json.dumps([offpolicy_rl.__file__, [row.name for row in rows], len(offpolicy_rl.systems())]))"""
    file, names, systems = json.loads(run_python(code, tmp_path, PYTHONPATH=str(home)))
    assert Path(file).is_relative_to(home)
    assert names == [row.name for row in offpolicy_rl.catalogue() if row.module.startswith("offpolicy_rl.")]
    assert len(names) > 0 and systems == len(offpolicy_rl.systems())


def test_import_is_light(tmp_path):
    code = f"""
import sys, offpolicy_rl
offpolicy_rl.catalogue()
print([name for name in {HEAVY} if name in sys.modules])"""
    assert run_python(code, tmp_path) == "[]\n", "importing the estimators must not import these"


def test_import_is_fast(tmp_path):
    "Processor time, which a busy machine does not stretch, of the import beyond torch's; the median of several processes that have only torch."
    code = """
import os, time, torch
for _ in range(5):
    if os.fork(): os.wait(); continue
    start = time.process_time()
    import offpolicy_rl
    print(time.process_time() - start, flush=True)
    os._exit(0)"""
    times = [float(line) for line in run_python(code, tmp_path).split()]
    assert len(times) == 5 and statistics.median(times) <= IMPORT_SECONDS, f"import offpolicy_rl takes {statistics.median(times):.3f} s on top of torch"


def repository_files() -> list[Path]:
    "What is, or would be, under version control."
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_no_machine_paths():
    homes = "|".join(["work", "root", "home", "Users", "opt", "tmp", "mnt"])
    pattern = re.compile(rf"(?<![\w.}}\])-])/(?:{homes})/[\w.]|\.\./" + "shared" + r"\b")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path in repository_files()
        if (text := path.read_bytes()).find(b"\0") < 0
        for number, line in enumerate(text.decode("utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


def test_ruff():
    check = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "."]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
