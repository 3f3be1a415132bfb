"""The pages that are no notebook: their prose stands in docs/pages/*.md; what they list is read from the catalogue, the package's
source, the notebooks' saved outputs and the recorded runs when the site is built. `{{ name }}` in a text calls the function of that name in `PARTS`."""

import ast
import json
import re
from configparser import ConfigParser
from pathlib import Path

import yaml
from convert import EXPLORER, explorer_html, figure_html

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
TEXTS = DOCS / "pages"
LANDING = TEXTS / "index.md"
ORDER = ("index", "which", "papers", "api", "add", "cite")
TITLES = {
    "toys": "Toys",
    "lab": "Lab",
    "llm": "Language models",
    "interop": "Other trainers",
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
    "tutorials": "Tutorials",
}
# A folder with many pages has them in the order in which they are best read, under headings; a page that is not named here comes last.
READING = {
    "llm": {
        "Train and compare": ("train", "cli", "config", "compare", "report", "curves", "scale"),
        "What is learnt": ("tasks", "gym", "word_math", "formula", "equality", "tool", "verify"),
        "Who samples": ("engine", "sampling", "rollouts", "vllm", "fidelity", "worker"),
        "How old the samples are": ("schedule", "collect", "buffer", "old", "simulate"),
        "An update": ("model", "learner", "master", "pieces", "logp", "pack", "critic", "adapter", "parallel", "shard", "data_parallel"),
        "What stays": ("record", "metrics", "trackers", "checkpoint"),
    },
}
KINDS = {
    "ratio": "Ratios",
    "advantage": "Advantages",
    "loss": "Losses",
    "penalty": "Penalties",
    "return": "Returns",
    "reward": "Rewards",
    "sampler": "Samplers",
    "estimate": "Estimates",
}
SHOWN_FIRST = ("topr_loss", "ppo_loss")  # whose explorer the landing page takes, if it is there


def plain(text: str) -> str:
    "A text in which Markdown finds nothing to do."
    return re.sub(r"([\\|*_$`<\[\]~#{}])", r"\\\1", text)


def cited(paper: str) -> str:
    "A paper with its arXiv number or DOI as a link."
    text = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", plain(paper))
    return re.sub(r"doi:(10\.\S+)", lambda doi: f"[doi:{doi[1]}](https://doi.org/{doi[1].replace(chr(92), '')})", text)


def linked(name: str, page: str, metas: dict) -> str:
    "A name of the package as a link to its definition on its notebook's page, or as it is where it has no page."
    meta = metas.get(Path(f"{page}.ipynb"))
    if meta is None:
        return f"`{name}`"
    anchor = f"#{name.lower()}" if name.lower() in meta.get("anchors", ()) else ""
    return f"[`{name}`]({page}.ipynb{anchor})"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]], style: str) -> str:
    "A table of MyST, of a class whose column widths `_static/orl.css` knows."
    lines = ["| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows)]
    return f":::{{table}}\n:class: {style}\n\n" + "\n".join(lines) + "\n:::\n"


def papers(metas: dict) -> str:
    "All published systems by family, each with the functions that implement it or as not yet there; then what is no system of its own."
    from offpolicy_rl import catalogue
    from offpolicy_rl.recipes import systems

    rows, every = catalogue(), systems()
    text = [f"{sum(s.done for s in every)} of {len(every)} have a notebook so far.\n"]
    for family in [name for name in TITLES if any(s.family == name for s in every)]:
        listed = []
        for system in (s for s in every if s.family == family):
            own = [row for row in rows if row.system == system.number]
            numbers = sorted({number for row in own for number in re.findall(r"arXiv:\d{4}\.\d{4,5}", row.paper)})
            title = plain(system.title) + "".join(f" {cited(number)}" for number in numbers)
            status = "<br>".join(linked(row.name, row.notebook, metas) for row in own) or "not yet there"
            listed.append((str(system.number), plain(system.method), title, status))
        text += [f"## {TITLES[family]}\n", table(("no.", "method", "paper", "here"), listed, "orl-papers")]
    own = [(linked(row.name, row.notebook, metas), cited(row.paper), plain(row.summary)) for row in rows if row.system is None]
    text += ["## Baselines\n", "Textbook methods and common rivals, not counted above.\n", table(("here", "paper", "what it is"), own, "orl-papers")]
    return "\n".join(text)


def call_of(node: ast.FunctionDef | ast.ClassDef) -> str:
    "A definition's signature without annotations: `exact(fn, toy, *, group_size=None)`; for a class that of its fields or of `__init__`."
    if isinstance(node, ast.ClassDef):
        init = next((item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"), None)
        if init is None:
            fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            given = [item.target.id + (f"={ast.unparse(item.value)}" if isinstance(item.value, ast.Constant) else "") for item in fields]
            return f"{node.name}({', '.join(given)})" if given else node.name
        args = init.args
        args.args = args.args[1:]
    else:
        args = node.args
    for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))):
        arg.annotation = None
    return f"{node.name}({ast.unparse(args)})"


def sentence(docstring: str) -> str:
    "The first sentence of a docstring: its first paragraph, in one line."
    return " ".join(docstring.split("\n\n")[0].split())


def definitions(module: Path) -> list[ast.FunctionDef | ast.ClassDef]:
    "The public functions and classes of a module, from its text: nothing is imported."
    body = ast.parse(module.read_text(encoding="utf-8")).body
    return [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")]


def entry(name: str, signature: str, page: str, summary: str, metas: dict) -> str:
    "One line of the API index: name, arguments, and below it what it is."
    arguments = signature.removeprefix(name)
    return linked(name, page, metas) + (f"`{arguments}`" if arguments else "") + f"\n: {plain(summary)}\n"


def module_entries(module: Path, metas: dict) -> str:
    "The definitions of one module, under its page's title."
    page = module.relative_to(ROOT / "offpolicy_rl").with_suffix("").as_posix()
    found = definitions(module)
    title = metas[Path(f"{page}.ipynb")].get("title") or page
    lines = [entry(node.name, call_of(node), page, sentence(ast.get_docstring(node) or ""), metas) for node in found]
    return f"### `{page.replace('/', '.')}`\n\n[{plain(title)}]({page}.ipynb)\n\n" + "\n".join(lines) if lines else ""


def api(metas: dict) -> str:
    "Everything that the package exports: the catalogue by kind, the recipes, then the rooms of the package."
    from offpolicy_rl import catalogue

    text = []
    for kind, title in KINDS.items():
        rows = catalogue(kind=kind)
        nodes = {row.module: {node.name: node for node in definitions(ROOT / (row.module.replace(".", "/") + ".py"))} for row in rows}
        lines = [entry(row.name, call_of(nodes[row.module][row.name]), row.notebook, row.summary, metas) for row in rows]
        text += [f"## {title}\n", "\n".join(lines) or "None yet.\n"]
    text += ["## Recipes\n", recipe_entries(metas)]
    rooms = {"Core": [ROOT / "offpolicy_rl" / name for name in ("core.py", "recipes.py")]}
    rooms |= {TITLES[name]: sorted((ROOT / "offpolicy_rl" / name).glob("*.py")) for name in ("toys", "lab", "llm", "interop")}
    for title, modules in rooms.items():
        pages = [path for path in modules if path.relative_to(ROOT / "offpolicy_rl").with_suffix(".ipynb") in metas]
        if pages:
            text += [f"## {title}\n", *(module_entries(path, metas) for path in pages)]
    return "\n\n".join(text)


def recipe_entries(metas: dict) -> str:
    "The recipes, each with its parts and its paper, linked to the notebook that defines it."
    from offpolicy_rl.core import family_modules, method_of
    from offpolicy_rl.recipes import Recipe, recipes

    home = {x.name: module for module in family_modules() for name, x in vars(module).items() if isinstance(x, Recipe) and name in module.__all__}
    lines = []
    for name, recipe in sorted(recipes().items()):
        page = home[name].__name__.removeprefix("offpolicy_rl.").replace(".", "/")
        parts = ", ".join(f"{part} `{method_of(fn).name}`" for part, fn in recipe.parts.items())
        lines.append(f"[`{name}`]({page}.ipynb)\n: {parts}. {cited(recipe.paper)}. {plain(recipe.note)}\n")
    return "\n".join(lines)


def explorer(metas: dict) -> str:
    "The explorer that a notebook saved, cut down to one slider a row: a knob and the age of the data."
    found = {}
    for page in metas:
        path = ROOT / "nbs" / page
        if not path.exists() or EXPLORER not in (text := path.read_text(encoding="utf-8")):
            continue
        outputs = (out for cell in json.loads(text)["cells"] for out in cell.get("outputs", []))
        found |= {payload["name"]: payload for out in outputs if (payload := out.get("data", {}).get(EXPLORER))}
    name = next((name for name in (*SHOWN_FIRST, *sorted(found)) if name in found), None)
    if name is None:
        raise ValueError("no notebook holds a saved explorer: run scripts/notebooks")
    payload = found[name]
    toys = payload["toys"]
    toy = toys.index("token tree") if "token tree" in toys else payload["start"]["toy"]
    return explorer_html({**payload, "brief": True, "start": {**payload["start"], "toy": toy}})


def collapse(metas: dict) -> str:
    "The recorded runs that say most: two recipes on fresh and on old data."
    from offpolicy_rl.llm.curves import learning_figure, recorded

    figure = learning_figure(recorded("sort", ["reinforce", "topr"], (1, 32)), title="On old data REINFORCE collapses, TOPR goes on learning")
    for axis, title, domain in zip((figure.layout.xaxis, figure.layout.xaxis2), figure.layout.annotations, ([0, 0.46], [0.54, 1])):
        axis.domain, title.x = domain, sum(domain) / 2
    return figure_html(json.loads(figure.update_layout(height=320).to_json()))


def recorded_table(metas: dict) -> str:
    "Right answers at the end of the recorded runs, by recipe and by how old the data is: mean, and lowest to highest seed."
    from offpolicy_rl.llm.curves import provenance, recorded
    from offpolicy_rl.llm.record import read_records
    from offpolicy_rl.llm.report import cells

    names = sorted({run["config"]["recipe"] for run in read_records(ROOT / "records" / "sort")})
    runs = recorded("sort", names)
    ends = {key: [run["evaluations"][-1]["sampled"] for run in some] for key, some in cells(runs).items()}
    ages = list(dict.fromkeys(age for _, age in ends))
    start = [run["evaluations"][0]["sampled"] for run in runs]
    seeds = max(len(x) for x in ends.values())
    spread = lambda x: f"{min(x):.2f}–{max(x):.2f}" + (f", {len(x)} seed{'s' * (len(x) > 1)} only" if len(x) < seeds else "")
    shown = {key: f"{sum(x) / len(x):.2f} <small>{spread(x)}</small>" for key, x in ends.items()}
    rows = [(f"`{name}`", *(shown.get((name, age), "not run") for age in ages)) for name in names]
    made = f"Means of {seeds} seeds, with the lowest and the highest. Before training: {min(start):.2f}–{max(start):.2f}.\n\n"
    made += f":::{{dropdown}} How these runs were made\n```text\n{provenance(runs)}\n```\n:::\n"
    return table(("recipe", *ages), rows, "orl-recorded") + "\n" + made


def bibtex(metas: dict) -> str:
    "The package as a BibTeX entry, from CITATION.cff."
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    fields = {
        "title": f"{{{cff['title']}}}",
        "author": " and ".join(f"{{{author['name']}}}" for author in cff["authors"]),
        "year": re.search(r"\d{4}", settings["DEFAULT"]["copyright"])[0],
        "version": cff["version"],
        "license": cff["license"],
        "url": cff["repository-code"],
    }
    lines = ",\n".join(f"  {name:7} = {{{value}}}" for name, value in fields.items())
    return f"```bibtex\n@software{{{settings['DEFAULT']['lib_name']},\n{lines}\n}}\n```"


def sources(metas: dict) -> str:
    "The paper behind each function of the catalogue."
    from offpolicy_rl import catalogue

    by_paper: dict[str, list[str]] = {}
    for row in catalogue():
        by_paper.setdefault(row.paper or "none", []).append(linked(row.name, row.notebook, metas))
    return table(("paper", "functions"), [(cited(paper), ", ".join(names)) for paper, names in by_paper.items()], "orl-sources")


def counts(metas: dict) -> str:
    "How much there is, in words."
    from offpolicy_rl import catalogue
    from offpolicy_rl.recipes import recipes, systems

    every = systems()
    return f"{len(catalogue())} functions, {len(recipes())} recipes, {sum(s.done for s in every)} of {len(every)} published systems"


PARTS = {fn.__name__: fn for fn in (papers, api, explorer, collapse, recorded_table, bibtex, sources, counts)}


def site_pages(metas: dict) -> dict[str, str]:
    "Every page that is no notebook, by file name, in the order of the sidebar; none in a project without docs/pages."
    if not LANDING.exists():
        return {}
    names = [*ORDER, *sorted(path.stem for path in TEXTS.glob("*.md") if path.stem not in ORDER)]
    made = {}
    for name in names:
        text = (TEXTS / f"{name}.md").read_text(encoding="utf-8")
        made[f"{name}.md"] = re.sub(r"\{\{ (\w+) \}\}", lambda match: PARTS[match[1]](metas), text)
    return made
