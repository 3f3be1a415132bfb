"The page \"Add an estimator in thirty minutes\", followed to the letter in a copy of the project: what it promises is there."

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "pages" / "add.md").read_text(encoding="utf-8")
FILE, TEXT = re.search(r"```\{code-block\} python\n:caption: (\S+)\n\n(.*?)```", PAGE, re.S).groups()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
MODULE = re.search(r"#\| default_exp (\S+)", TEXT)[1].replace(".", "/")
FUNCTION = re.search(r"^def (\w+)", TEXT, re.M)[1]
RECIPE = re.search(r'Recipe\("(\w+)"', TEXT)[1]
SYSTEM = int(re.search(r"system=(\d+)", TEXT)[1])


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "The project's files without what git ignores, and its environment; the package is the copy's own."
    copy = tmp_path_factory.mktemp("copy")
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    (copy / ".venv").symlink_to(sys.prefix)
    return copy


@pytest.fixture(scope="module")
def followed(project, built):
    "The page's file and commands, one after the other; what each command printed. The site builds on the one that is there."
    (project / FILE).write_text(TEXT, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(project)}
    said = {}
    for command in COMMANDS:
        words = shlex.split(command)
        if "docs/build.py" in words:
            words += ["--out", str(project / "_docs"), "--work", str(built.work)]
        done = subprocess.run(words, cwd=project, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        said[command] = done.stdout
    return said


def ask(project: Path, code: str) -> str:
    "What the copy's package says."
    env = {**os.environ, "PYTHONPATH": str(project)}
    return subprocess.run([sys.executable, "-c", code], cwd=project, env=env, capture_output=True, text=True, check=True).stdout


def test_package_has_it(followed, project):
    found = json.loads(ask(project, f"""
import json, offpolicy_rl
from offpolicy_rl.lab.atlas import atlas
from offpolicy_rl.recipes import recipe, systems
row = offpolicy_rl.catalogue()[{FUNCTION!r}]
print(json.dumps([offpolicy_rl.__file__, row.notebook, row.system, [c.name for c in atlas().charts], recipe({RECIPE!r}).name,
                  [s.functions for s in systems() if s.number == {SYSTEM}][0]]))"""))
    file, notebook, system, charts, recipe, functions = found
    assert Path(file).is_relative_to(project) and notebook == MODULE and system == SYSTEM
    assert FUNCTION in charts and FUNCTION in functions and recipe == RECIPE


def test_command_line_has_it(followed):
    listed, told = (said for command, said in followed.items() if "/offpolicy " in command)
    assert FUNCTION in listed
    assert f"knobs of {RECIPE}" in told and "--shift" in told


def test_site_has_it(followed, project):
    site = project / "_docs"
    rows = re.findall(r"<tr.*?</tr>", (site / "papers.html").read_text(encoding="utf-8"), re.S)
    own = next(row for row in rows if re.search(rf"<td><p>{SYSTEM}</p>", row))
    link = f'href="{MODULE}.html#{FUNCTION.replace("_", "-")}"'
    assert link in own and "not yet there" not in own
    assert link in (site / "api.html").read_text(encoding="utf-8")
    page = (site / f"{MODULE}.html").read_text(encoding="utf-8")
    assert f'id="{FUNCTION}"' in page and 'class="orl-explorer"' in page and "predicted" in page
    assert Path(MODULE).name + ".html" in (site / "reinforce" / "topr.html").read_text(encoding="utf-8"), "the sidebar of a page that was there has it"


def test_notebook_is_as_it_should_be(followed, project):
    path = project / "nbs" / f"{MODULE}.ipynb"
    code = f"from fastcore.nbio import *; from nbdev.clean import clean_nb; nb = read_nb({str(path)!r}); t = nb2str(nb); clean_nb(nb); print(t == nb2str(nb))"
    assert ask(project, code).strip() == "True"
    assert path.stat().st_size < 300_000 and "Traceback" not in path.read_text(encoding="utf-8")


def test_page_agrees_with_contributing():
    rules = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert "scripts/notebooks nbs/" in rules and any(command.startswith("scripts/notebooks nbs/") for command in COMMANDS)
    assert "add.html" in rules or "docs/pages/add.md" in rules, "CONTRIBUTING.md leads to the page"
