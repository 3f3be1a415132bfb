"Writes README.md from nbs/index.ipynb: its text, its code and what the code printed."

import os
import re
from pathlib import Path

import yaml
from fastcore.nbio import read_nb

ROOT = Path(__file__).resolve().parents[1]
INDEX = ROOT / "nbs" / "index.ipynb"


def relink(text: str) -> str:
    "Links of a text in nbs/ as links from the repository's root."
    def one(match: re.Match) -> str:
        path = match[1]
        return f"]({path if '://' in path else os.path.normpath(Path('nbs', path))}"
    return re.sub(r"\]\(([^)#\s]+)", one, text)


def printed(outputs: list) -> str:
    "The plain text of a cell's outputs, as an indented block."
    text = "".join("".join(out.get("text") or out.get("data", {}).get("text/plain") or "") for out in outputs)
    return "\n".join("    " + line for line in text.splitlines())


def readme(index: Path = INDEX) -> str:
    "The text of README.md."
    blocks = ["<!-- written by docs/readme.py from nbs/index.ipynb: edit the notebook -->"]
    for cell in read_nb(index).cells:
        if re.search(r"^#\|\s*hide\s*$", cell.source, re.M):
            continue
        if cell.cell_type == "raw":
            meta = yaml.safe_load(cell.source.strip().strip("-"))
            blocks.append(f"# {meta['title']}\n\n> {meta['description']}")
        elif cell.cell_type == "markdown":
            blocks.append(relink(cell.source))
        else:
            blocks += [f"```python\n{cell.source}\n```", printed(cell.outputs)]
    return "\n\n".join(block for block in blocks if block.strip()) + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
