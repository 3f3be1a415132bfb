"""The time to build the site of 150 notebooks: from nothing, with nothing changed, and with one notebook changed.

Works in a temporary copy of the project, whose own notebooks are copied until there are enough: those of methods, the heaviest ones, in turn.
Usage: python bench/site.py [--notebooks 150]
"""

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUDGET = {"from nothing": 90, "one notebook changed": 15}


def copy_project(target: Path) -> None:
    "The project without what git ignores."
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def notebooks(project: Path) -> list[Path]:
    return sorted(path for path in (project / "nbs").rglob("*.ipynb") if not path.name.startswith((".", "_")))


def clone(path: Path, n: int) -> Path:
    "A copy of a notebook beside it, under another name and title."
    made = path.with_name(f"{path.stem}_{n}.ipynb")
    made.write_text(re.sub(r'(title: )(\\"|")?', rf"\g<1>\g<2>Copy {n} of ", path.read_text(encoding="utf-8"), count=1), encoding="utf-8")
    return made


def fill(project: Path, count: int) -> list[Path]:
    "Copies notebooks of the families, those with figures, until there are `count`."
    sources = [path for path in notebooks(project) if path.parent.name not in ("nbs", "toys", "lab", "llm") and path.stat().st_size > 50_000]
    missing = count - len(notebooks(project))
    return [clone(path, n) for n, path in zip(range(missing), itertools.cycle(sources))]


def seconds(project: Path) -> float:
    "One build."
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "docs/build.py"], cwd=project, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(project)})
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notebooks", type=int, default=150)
    count = parser.parse_args().notebooks
    with tempfile.TemporaryDirectory(prefix="offpolicy-site-") as folder:
        project = Path(folder)
        copy_project(project)
        copies = fill(project, count)
        megabytes = sum(path.stat().st_size for path in notebooks(project)) / 1e6
        print(f"{len(notebooks(project))} notebooks, {megabytes:.0f} MB; {len(os.sched_getaffinity(0))} cores")
        took = {"from nothing": seconds(project), "nothing changed": seconds(project)}
        text = copies[0].read_text(encoding="utf-8")
        copies[0].write_text(text.replace("## The problem, seen", "## The problem, seen again", 1), encoding="utf-8")
        took["one notebook changed"] = seconds(project)
        clone(copies[1], count)
        took["one notebook more"] = seconds(project)
    for what, s in took.items():
        print(f"{what:22s}{s:7.1f} s" + (f"   budget {BUDGET[what]} s: {'kept' if s <= BUDGET[what] else 'MISSED'}" if what in BUDGET else ""))
    sys.exit(any(took[what] > budget for what, budget in BUDGET.items()))


if __name__ == "__main__":
    main()
