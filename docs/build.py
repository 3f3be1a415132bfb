"""Builds the site from nbs/ and tutorials/ without Quarto and without a network: nbdev's processors, then Sphinx with MyST-NB.

    python docs/build.py [--out _docs] [--work docs/_tree]

Outputs are those that the notebooks were saved with. A link that leads nowhere fails the build. What is built is kept in the folder
of `--work`, by content: the next build converts and renders what has changed. Pages that are no notebook stand in docs/pages."""

import argparse
import fcntl
import gc
import hashlib
import json
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))  # the package of this project, whichever is installed
sys.modules["rfc3987_syntax"] = None  # jsonschema does without it, and importing it takes a third of a small build: it compiles 38 grammars

from convert import convert
from fastcore.nbio import mk_cell, nb2str, read_nb
from links import broken_links
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from pages import LANDING, READING, TITLES, site_pages
from sphinx.cmd.build import main as sphinx_build

PACKAGE = ("toys", "lab", "llm", "interop")
ALONE = 4  # so few notebooks are converted in this process: a second one takes longer to start


def notebooks() -> dict[Path, Path]:
    """Every notebook and the path of its page: nbs/reinforce/topr.ipynb -> reinforce/topr.ipynb.

    Where docs/pages has a landing page, nbs/index.ipynb becomes start.ipynb."""
    found = {}
    for folder, prefix in ((ROOT / "nbs", Path()), (ROOT / "tutorials", Path("tutorials"))):
        if folder.exists():
            found |= {path: prefix / path.relative_to(folder) for path in sorted(nbglob(folder, as_path=True))}
    index = ROOT / "nbs" / "index.ipynb"
    if LANDING.exists() and index in found:
        found[index] = Path("start.ipynb")
    return found


def digest(*parts: bytes) -> str:
    "One name for the contents of all parts."
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def contents_of(folder: Path, *patterns: str) -> bytes:
    "Names and bytes of the files below a folder, as one digest."
    files = sorted(path for pattern in patterns for path in folder.rglob(pattern) if path.is_file() and "__pycache__" not in path.parts)
    return digest(*(part for path in files for part in (str(path.relative_to(folder)).encode(), path.read_bytes()))).encode()


def builder() -> str:
    "What every page depends on: this builder, its style and the tools that it stands on."
    tools = " ".join(f"{name} {version(name)}" for name in ("nbdev", "sphinx", "myst-nb", "sphinx-book-theme", "plotly"))
    code = [path.read_bytes() for path in (*sorted(DOCS.glob("*.py")), ROOT / "settings.ini", ROOT / "pyproject.toml")]
    return digest(tools.encode(), contents_of(DOCS / "_static", "*"), str(DOCS).encode(), *code)


def key(notebook: Path, shared: bytes) -> str:
    "What the page of a notebook depends on: its text, what its links can lead to, and the package where `show_doc` reads it."
    text = notebook.read_bytes()
    package = contents_of(ROOT / get_config(ROOT).lib_path, "*.py") if b"show_doc(" in text else b""
    return digest(text, shared, package)


def write_text(path: Path, text: str) -> None:
    "Writes a source of Sphinx, unless it is there already: Sphinx reads anew what is newer."
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def toctree(entries: list[str], caption: str = "") -> str:
    "A table of contents that only the sidebar shows."
    return "```{toctree}\n" + (f":caption: {caption}\n" if caption else "") + ":hidden:\n\n" + "\n".join(entries) + "\n```\n"


def section_page(folder: str, metas: dict[Path, dict]) -> str:
    "The page of a folder: its notebooks, each with its one line, in the order of READING."
    left = {path.stem: path for path in metas if path.parts[0] == folder and len(path.parts) > 1}
    headings = READING.get(folder, {})
    parts = [(f"## {heading}\n\n", [left.pop(name) for name in names if name in left]) for heading, names in headings.items()]
    parts.append(("## More\n\n" if headings else "", list(left.values())))
    line = lambda path: f"[{metas[path].get('title', path.stem)}]({path.relative_to(folder).as_posix()})\n: {metas[path].get('description') or path.stem}\n"
    lines = "\n".join(heading + "\n".join(map(line, paths)) for heading, paths in parts if paths)
    entries = [path.relative_to(folder).with_suffix("").as_posix() for _, paths in parts for path in paths]
    return f"# {TITLES.get(folder, folder.capitalize())}\n\n{lines}\n{toctree(entries)}"


def contents(metas: dict[Path, dict], own: list[str]) -> str:
    "The sidebar: where to begin, the package's own rooms, the families, the tutorials."
    folders = sorted({path.parts[0] for path in metas if len(path.parts) > 1})
    known = list(TITLES)
    folders.sort(key=lambda name: known.index(name) if name in known else len(known))
    top = [path.stem for path in metas if len(path.parts) == 1 and path.stem not in ("index", "start", "chapter")]
    begin = ["Install, first steps <start>" for path in metas if path == Path("start.ipynb")] + own
    if Path("lab/atlas.ipynb") in metas:
        begin.insert(2, "The atlas <lab/atlas>")
    if Path("chapter.ipynb") in metas:
        begin.insert(1, "Reading the first chapter <chapter>")
    groups = {
        "Begin": begin,
        "Families": [f"{name}/index" for name in folders if name not in PACKAGE and name != "tutorials"],
        "For a goal": [f"{name}/index" for name in folders if name == "tutorials"],
        "Package": top + [f"{name}/index" for name in folders if name in PACKAGE],
    }
    return "\n".join(toctree(entries, caption) for caption, entries in groups.items() if entries)


def convert_changed(source: Path, manifest: Path) -> dict[Path, dict]:
    "Converts the notebooks whose content or builder has changed since the last build; returns every page's front matter."
    pages, git_url = notebooks(), get_config(ROOT).git_url
    index = ROOT / get_config(ROOT).lib_path / "_modidx.py"
    shared = digest(repr(sorted(map(str, pages.values()))).encode(), index.read_bytes() if index.exists() else b"").encode()
    old = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
    new = {str(page): {"key": key(path, shared), "meta": old.get(str(page), {}).get("meta")} for path, page in pages.items()}
    changed = [(path, page) for path, page in pages.items() if old.get(str(page), {}).get("key") != new[str(page)]["key"]]
    jobs = [(path, page, source, pages, ROOT, git_url) for path, page in changed]
    if len(jobs) > ALONE:
        with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
            made = list(pool.map(convert, *zip(*jobs), chunksize=4))
    else:
        made = [convert(*job) for job in jobs]
    for (_, page), meta in zip(changed, made):
        new[str(page)]["meta"] = meta
    manifest.write_text(json.dumps(new, default=str), encoding="utf-8")
    return {page: new[str(page)]["meta"] for page in pages.values()}


def write_sources(source: Path, manifest: Path) -> tuple[int, str]:
    "Writes Sphinx's input into `source`, changed files only; returns the number of notebooks and a digest of what the sidebar shows."
    metas = convert_changed(source, manifest)
    texts = site_pages(metas)
    texts |= {f"{folder}/index.md": section_page(folder, metas) for folder in sorted({page.parts[0] for page in metas if len(page.parts) > 1})}
    sidebar = contents(metas, [Path(name).stem for name in texts if "/" not in name and name != "index.md"])
    if "index.md" in texts:
        texts["index.md"] += "\n" + sidebar
    else:
        index = read_nb(source / "index.ipynb")
        index.cells = [cell for cell in index.cells if "{toctree}" not in cell.source] + [mk_cell(sidebar, "markdown", id="sidebar")]
        texts["index.ipynb"] = nb2str(index)
    for name, text in texts.items():
        write_text(source / name, text)
    kept = {source / page for page in metas} | {source / name for name in texts}
    for path in source.rglob("*"):
        if path.is_file() and path not in kept:
            path.unlink()
    heads = {str(page): meta.get("title") for page, meta in metas.items()}
    heads |= {name: text.partition("\n")[0] for name, text in texts.items() if name.endswith(".md")}
    return len(metas), digest(json.dumps([sidebar, heads], sort_keys=True).encode())


def render(source: Path, work: Path, everything: bool) -> int:
    "Runs Sphinx over the sources, into work/html; returns its exit status."
    options = ["-q", "-W", "--keep-going", "-j", "auto", "-b", "html", *(["-a"] if everything else [])]
    status = sphinx_build([*options, "-c", str(DOCS), "-d", str(work / "tree"), str(source), str(work / "html")])
    pages = {path.relative_to(source).with_suffix(".html") for path in source.rglob("*.*")}
    made = {path.relative_to(work / "html") for path in (work / "html").rglob("*.html")}
    for gone in made - pages - {Path("search.html"), Path("genindex.html")}:
        if gone.parts[0] != "_static":
            (work / "html" / gone).unlink()
    return status


def prepare(work: Path) -> dict:
    """Makes the folder of kept things ready; returns what the last build noted, nothing where it has to begin anew.

    It does so when the builder has changed, and when the last build did not come to its good end: what Sphinx has read without a
    complaint now, it would not complain about again."""
    note = work / "whole.json"
    before = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
    note.unlink(missing_ok=True)
    if before.get("builder") != builder():
        before = {}
        for name in ("source", "tree", "html"):
            shutil.rmtree(work / name, ignore_errors=True)
        (work / "manifest.json").unlink(missing_ok=True)
    (work / "source").mkdir(exist_ok=True)
    return before


def build(out: Path, work: Path) -> int:
    "Builds the site into `out`, which is replaced, unless something is wrong; returns the exit status."
    start = time.perf_counter()
    os.chdir(ROOT)
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second build waits for the first
        before = prepare(work)
        count, sidebar = write_sources(work / "source", work / "manifest.json")
        status = render(work / "source", work, everything=before.get("sidebar") != sidebar)  # each page shows the whole sidebar
        wrong = broken_links(work / "html") if status == 0 else []
        if status == 0 and not wrong:
            (work / "whole.json").write_text(json.dumps({"builder": builder(), "sidebar": sidebar}), encoding="utf-8")
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(work / "html", out, ignore=shutil.ignore_patterns(".buildinfo", "_sources"))
    for line in wrong:
        print(line, file=sys.stderr)
    status = status or int(bool(wrong))
    took = time.perf_counter() - start
    print(f"{count} notebooks, {took:.0f} s: open {out / 'index.html'}" if status == 0 else "the site was not built: see the warnings above")
    return status


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the site.")
    parser.add_argument("--out", type=Path, default=ROOT / "_docs", help="the folder to write (default: _docs)")
    parser.add_argument("--work", type=Path, default=DOCS / "_tree", help="what is kept between builds (default: docs/_tree)")
    arguments = parser.parse_args()
    status = build(arguments.out.resolve(), arguments.work.resolve())
    gc.freeze()  # spares the exit a garbage collection for each shell that nbdev opened
    sys.exit(status)
