"""Builds the site from nbs/ and tutorials/ without Quarto and without a network: nbdev's processors, then Sphinx with MyST-NB.

    python docs/build.py [--out _docs]

Outputs are those that the notebooks were saved with. A link that leads nowhere fails the build."""

import argparse
import gc
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from convert import convert
from fastcore.nbio import mk_cell, read_nb, write_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from sphinx.cmd.build import main as sphinx_build

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PACKAGE = {"toys": "Toys", "lab": "Lab", "llm": "Language models", "interop": "Other trainers"}
FAMILIES = {
    "reinforce": "REINFORCE",
    "ratios": "Importance ratios",
    "advantages": "Advantages",
    "entropy": "Entropy and exploration",
    "data": "Data and replay",
    "guidance": "Guidance",
    "distillation": "Distillation",
    "preferences": "Preferences",
    "agents": "Agents",
    "systems": "Systems",
    "diffusion": "Diffusion",
    "evaluation": "Off-policy evaluation",
    "control": "Control",
    "robots": "Robots",
}
TITLES = PACKAGE | FAMILIES | {"tutorials": "Tutorials"}


def notebooks() -> dict[Path, Path]:
    "Every notebook and the path of its page: nbs/reinforce/topr.ipynb -> reinforce/topr.ipynb."
    found = {}
    for folder, prefix in ((ROOT / "nbs", Path()), (ROOT / "tutorials", Path("tutorials"))):
        if folder.exists():
            found |= {path: prefix / path.relative_to(folder) for path in sorted(nbglob(folder, as_path=True))}
    return found


def toctree(entries: list[str], caption: str = "") -> str:
    "A table of contents that only the sidebar shows."
    return "```{toctree}\n" + (f":caption: {caption}\n" if caption else "") + ":hidden:\n\n" + "\n".join(entries) + "\n```\n"


def section_page(folder: str, metas: dict[Path, dict]) -> str:
    "The page of a folder: its notebooks, each with its one line."
    inside = {path: meta for path, meta in metas.items() if path.parts[0] == folder and len(path.parts) > 1}
    rows = [
        f"[{meta.get('title', path.stem)}]({path.relative_to(folder).as_posix()})\n: {meta.get('description') or path.stem}\n"
        for path, meta in inside.items()
    ]
    entries = [path.relative_to(folder).with_suffix("").as_posix() for path in inside]
    return f"# {TITLES.get(folder, folder.capitalize())}\n\n" + "\n".join(rows) + "\n" + toctree(entries)


def contents(metas: dict[Path, dict]) -> str:
    "The sidebar: the package's own rooms, the families, the tutorials."
    folders = sorted({path.parts[0] for path in metas if len(path.parts) > 1})
    known = list(TITLES)
    folders.sort(key=lambda name: known.index(name) if name in known else len(known))
    top = [path.stem for path in metas if len(path.parts) == 1 and path.stem != "index"]
    groups = {
        "Package": top + [f"{name}/index" for name in folders if name in PACKAGE],
        "Families": [f"{name}/index" for name in folders if name not in PACKAGE and name != "tutorials"],
        "For a goal": [f"{name}/index" for name in folders if name == "tutorials"],
    }
    return "\n".join(toctree(entries, caption) for caption, entries in groups.items() if entries)


def write_sources(source: Path) -> int:
    "Writes Sphinx's input into `source`; returns the number of notebooks."
    pages, git_url = notebooks(), get_config(ROOT).git_url
    metas = {page: convert(path, page, source, pages, ROOT, git_url) for path, page in pages.items()}
    for folder in {page.parts[0] for page in metas if len(page.parts) > 1}:
        (source / folder / "index.md").write_text(section_page(folder, metas), encoding="utf-8")
    index = read_nb(source / "index.ipynb")
    index.cells.append(mk_cell(contents(metas), "markdown"))
    write_nb(index, source / "index.ipynb")
    return len(pages)


def build(out: Path) -> int:
    "Builds the site into `out`, which is replaced; returns Sphinx's exit status."
    start = time.perf_counter()
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory(prefix="offpolicy-site-") as work:
        source, new = Path(work, "source"), Path(work, "html")
        count = write_sources(source)
        options = ["-q", "-W", "--keep-going", "-j", "auto", "-b", "html"]
        status = sphinx_build([*options, "-c", str(DOCS), "-d", str(Path(work, "tree")), str(source), str(new)])
        if status == 0:
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(new, out, ignore=shutil.ignore_patterns(".buildinfo"))
    took = time.perf_counter() - start
    done = f"{count} notebooks, {took:.0f} s: open {out / 'index.html'}"
    print(done if status == 0 else "the site was not built: see the warnings above")
    return status


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the site.")
    parser.add_argument("--out", type=Path, default=ROOT / "_docs", help="the folder to write (default: _docs)")
    status = build(parser.parse_args().out.resolve())
    gc.freeze()  # spares the exit a garbage collection for each shell that nbdev opened
    sys.exit(status)
