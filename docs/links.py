"The links of the finished pages, all of them: what a page that was not rendered again would not tell."

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

SCRIPT = re.compile(r"<script.*?</script>", re.S)
LINK = re.compile(r'\s(?:href|src)="([^"]*)"')
ANCHOR = re.compile(r'\s(?:id|name)="([^"]+)"')
GENERATED = ("search.html", "genindex.html")


def broken_links(html: Path) -> list[str]:
    "A line for each link between pages, or from a page to a file, that leads nowhere."
    texts = {path: SCRIPT.sub(lambda tag: tag[0].partition(">")[0], path.read_text(encoding="utf-8")) for path in html.rglob("*.html")}
    anchors = {path: set(ANCHOR.findall(text)) for path, text in texts.items()}
    found = []
    for page, text in texts.items():
        if page.name in GENERATED or "_static" in page.parts:
            continue
        for link in sorted(set(LINK.findall(text))):
            parts = urlsplit(link)
            if parts.scheme or link.startswith("//"):
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            anchor = unquote(parts.fragment)
            if not target.exists() or (anchor and target in anchors and anchor not in anchors[target]):
                found.append(f"{page.relative_to(html)}: the link to {link} leads nowhere")
    return found
