"""Turns one notebook into one page for MyST-NB, on top of nbdev's own processors.

Nothing is executed, except in a notebook with an explicit `show_doc(...)` cell, where nbdev runs imports and exported cells."""

import ast
import json
import os
import re
from pathlib import Path

import yaml
from fastcore.nbio import NbCell, mk_cell, nb2str, read_nb
from nbdev.processors import FilterDefaults, exec_show_docs, mv_exports

FIGURE = "application/vnd.plotly.v1+json"
EXPLORER = "application/vnd.offpolicy.explorer+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
FOLDED = {"true": "hide-input", "show": "hide-input"}


class PageDefaults(FilterDefaults):
    "nbdev's processors, less those that would run cells or reorder them."

    def __init__(self, execute: bool):
        self.execute = execute

    def base_procs(self):
        dropped = {mv_exports} if self.execute else {mv_exports, exec_show_docs}
        return [proc for proc in super().base_procs() if proc not in dropped]


def slug(title: str) -> str:
    "The anchor of a heading, as nbdev writes it: `Recipe.with_knobs` -> `recipe.with_knobs`, `Is it right?` -> `is-it-right`."
    text = re.sub(r"[^\w\s.-]", "", title.strip().lower())
    return re.sub(r"\s+", "-", re.sub(r"\.(?!\w)", "", text))


def embed(kind: str, payload: dict, style: str = "") -> str:
    "A `div` that carries `payload` as JSON for the page's script."
    text = json.dumps(payload, separators=(",", ":")).replace("</", "<\\/")
    return f'<div class="orl-{kind}"{style}><script type="application/json">{text}</script></div>'


def figure_html(figure: dict) -> str:
    "A plotly figure, drawn by `_static/orl.js` in the colours of the page."
    layout = figure.get("layout", {})
    template = layout.get("template", {}).get("layout", {})
    height = layout.get("height") or template.get("height") or 450
    kept = {key: figure[key] for key in ("data", "layout", "frames") if key in figure}
    return embed("figure", kept, f' style="min-height:{height:.0f}px"')


def explorer_html(payload: dict) -> str:
    "A precomputed explorer, brought to life by `_static/explorer.js`."
    return embed("explorer", payload)


def page_output(output: dict) -> dict | None:
    "`output` as the page shows it; None where a page without a kernel has nothing to show."
    data = output.get("data")
    if data is None:
        return output
    if EXPLORER in data:
        output["data"] = {"text/html": explorer_html(data[EXPLORER])}
    elif FIGURE in data:
        output["data"] = {"text/html": figure_html(data[FIGURE])}
    elif WIDGET in data or not data:
        return None
    return output


def relink(text: str, page: Path, source: Path, pages: dict[Path, Path], root: Path, git_url: str) -> str:
    "Rewrites links: nbdev's absolute ones and those between notebooks lead to pages, those to other files into the repository."
    by_html = {"/" + p.with_suffix(".html").as_posix(): p for p in pages.values()}

    def one(match: re.Match) -> str:
        path, anchor = match[1], match[2] or ""
        if path in by_html:
            target = by_html[path]
        elif path.startswith("/") or "://" in path:
            return match[0]
        else:
            file = (source.parent / path).resolve()
            if file not in pages:
                inside = file.is_relative_to(root) and file.exists()
                return f"]({git_url}/blob/main/{file.relative_to(root).as_posix()}{anchor})" if inside else match[0]
            target = pages[file]
        return f"]({Path(os.path.relpath(target, page.parent)).as_posix()}{anchor})"

    return re.sub(r"\]\(([^)#\s]+)(#[^)\s]*)?\)", one, text)


def front_matter(cell) -> dict:
    "The YAML of a notebook's first cell."
    return yaml.safe_load(cell.source.strip().strip("-")) or {}


def title_cell(meta: dict) -> NbCell:
    "The page's heading and, below it, its one line."
    lead = f"\n\n{{.orl-lead}}\n{meta['description']}" if meta.get("description") else ""
    return mk_cell(f"# {meta['title']}{lead}", "markdown")


def show_definitions(nb) -> None:
    "Lets the exported definitions be seen: nbdev hides what is marked `export` and shows what is marked `exports`."
    for cell in nb.cells:
        if cell.cell_type == "code" and re.search(r"^#\|\s*export\s*$", cell.source, re.M):
            body = ast.parse(re.sub(r"^\s*[%!].*$", "", cell.source, flags=re.M)).body
            if any(not isinstance(node, ast.Import | ast.ImportFrom) for node in body):
                cell.source = re.sub(r"^#\|\s*export\s*$", "#| exports", cell.source, flags=re.M)


def documented(cell) -> str | None:
    "The name that a `show_doc(name)` cell is about."
    found = re.search(r"^show_doc\(([\w.]+)", cell.source, re.M) if cell.cell_type == "code" else None
    return found[1] if found else None


def doc_cell(cell) -> NbCell:
    "What an explicit `show_doc` printed, as a heading with the signature below."
    text = "".join("".join(out["data"].get("text/markdown", "")) for out in cell.get("outputs", []) if "data" in out)
    text = re.sub(r"^---\n\n", "", text)
    text = re.sub(r"^\[source\]\([^)]*\)\{[^}]*\}\n", "", text, flags=re.M)
    return mk_cell(re.sub(r"^#+ ", "### ", text, count=1, flags=re.M), "markdown")


def code_cell(cell) -> NbCell:
    "A code cell with its directives turned into MyST-NB's tags and its outputs into what a page can show."
    directives = dict(re.findall(r"^#\|\s*([\w-]+):\s*(.*?)\s*$", cell.source, re.M))
    exported = "exports" in cell.directives_
    cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    tags = []
    if directives.get("echo") == "false":
        tags.append("remove-input")
    elif not exported and directives.get("code-fold") in FOLDED:
        tags.append(FOLDED[directives["code-fold"]])
    if directives.get("output") == "false":
        tags.append("remove-output")
    cell.metadata = {"tags": tags} if tags else {}
    cell.outputs = [out for out in map(page_output, cell.get("outputs", [])) if out is not None]
    return cell


def sections(cell, names: list[str]) -> list:
    "An exported cell cut before each of the definitions `names`, each under its heading; what stands before the first one keeps none."
    lines = cell.source.splitlines()
    cuts = {
        min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1: node.name
        for node in ast.parse(cell.source).body
        if getattr(node, "name", None) in names
    }
    edges = sorted({0, *cuts, len(lines)})
    parts = []
    for start, end in zip(edges, edges[1:], strict=False):
        if start in cuts:
            parts.append(mk_cell(f"### `{cuts[start]}`", "markdown"))
        if text := "\n".join(lines[start:end]).strip():
            parts.append(mk_cell(text))
    parts[-1].outputs = cell.outputs
    return parts


def page_cells(nb) -> tuple[dict, list]:
    "The front matter and the cells of a page, from a notebook after nbdev's processors; a definition's heading stands above its code."
    meta, cells, waiting = {}, [], []
    for cell in reversed(nb.cells):
        name = documented(cell)
        if cell.cell_type == "raw" and cell.source.startswith("---"):
            meta = front_matter(cell)
            cells.append(title_cell(meta))
        elif "WARNING: THIS FILE WAS AUTOGENERATED" in cell.source:
            continue
        elif name and getattr(cell, "has_sd", False):
            waiting.append(name)
        elif name:
            cells.append(doc_cell(cell))
        elif cell.cell_type == "code":
            shown = code_cell(cell)
            cells += reversed(sections(shown, waiting)) if waiting else [shown]
            waiting = []
        else:
            cells.append(cell)
    return meta, cells[::-1]


def one_title(text: str, title: str) -> str:
    "A text below the page's title: a heading that says the title again goes, another one as high comes down a step."
    lines, fenced = [], False
    for line in text.splitlines():
        fenced ^= line.lstrip().startswith("```")
        if fenced or not line.startswith("# "):
            lines.append(line)
        elif line[2:].strip() != title:
            lines.append("#" + line)
    return "\n".join(lines)


def convert(source: Path, page: Path, out: Path, pages: dict[Path, Path], root: Path, git_url: str) -> dict:
    "Writes the page of the notebook `source` to `out/page`; returns its front matter and, as `anchors`, the definitions that have a heading of their own."
    nb = read_nb(source)
    show_definitions(nb)
    PageDefaults(execute=any(documented(cell) for cell in nb.cells))(nb)
    meta, nb.cells = page_cells(nb)
    if not meta:
        meta = {"title": source.stem}
        nb.cells.insert(0, title_cell(meta))
    for cell in nb.cells[1:]:
        if cell.cell_type == "markdown":
            cell.source = one_title(cell.source, meta["title"])
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = relink(cell.source, page, source, pages, root, git_url)
    nb.metadata = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    for i, cell in enumerate(nb.cells):
        cell["id"] = f"c{i}"  # the same page for the same notebook
    target = out / page
    target.parent.mkdir(parents=True, exist_ok=True)
    text = nb2str(nb)
    if not target.exists() or target.read_text(encoding="utf-8") != text:  # Sphinx reads anew what is newer
        target.write_text(text, encoding="utf-8")
    headings = [found[1] for cell in nb.cells if cell.cell_type == "markdown" and (found := re.match(r"### `([\w.]+)`$", cell.source))]
    return {**meta, "anchors": [slug(name) for name in headings]}
