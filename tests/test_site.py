"The site builds, refuses broken links, and works in a browser that reaches nothing outside, from a server and from the disk."

import functools
import html
import http.server
import json
import re
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from offpolicy_rl import catalogue
from offpolicy_rl.recipes import recipes, systems
from pages import KINDS

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync", OFFLINE)
WAIT = 60_000
ONE_OF_EACH_KIND = ("index", "start", "which", "papers", "api", "add", "cite", "lab/index", "lab/atlas", "reinforce/topr")

# What a page needs to be finished: every formula set, every figure and explorer drawn.
READY = """() => [...document.querySelectorAll('.math')].every(e => e.querySelector('mjx-container'))
  && [...document.querySelectorAll('.orl-figure, .orl-explorer')].every(e => e.querySelector('.main-svg'))"""


@pytest.fixture(scope="module")
def site(built):
    return built.html


@pytest.fixture(scope="module")
def pages(site):
    found = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    return [name for name in found if not name.startswith("_") and name not in ("search.html", "genindex.html")]


@pytest.fixture(scope="module")
def addresses(site):
    "The site's address on a server and on the disk."

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"http": f"http://127.0.0.1:{server.server_address[1]}", "file": site.as_uri()}
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium: scripts/system.sh could not install it")
        pytest.skip("no Chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, request):
    "Opens pages in one context and keeps what they asked for outside and complained about."
    contexts = []

    def start(address: str, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.outside, page.complaints = [], []
        local = (address, "data:", "blob:")
        context.on("request", lambda req: None if req.url.startswith(local) else page.outside.append(req.url))
        page.on("console", lambda message: page.complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        return page

    yield start
    for context in contexts:
        context.close()


@pytest.mark.browser
def test_every_page_works_on_a_phone(visit, addresses, pages):
    "Formulas set, figures drawn, no error, nothing asked for outside, and no page scrolls sideways."
    page, wrong = visit(addresses["http"], viewport={"width": 390, "height": 844}), {}
    for name in pages:
        page.goto(f"{addresses['http']}/{name}")
        page.wait_for_function(READY, timeout=WAIT)
        excess = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        if excess or page.complaints or page.outside:
            wrong[name] = (excess, *page.complaints, *page.outside)
            page.complaints.clear(), page.outside.clear()
    assert not wrong, "pages with what is too wide, in pixels, what they complained about and what they asked for"


@pytest.mark.browser
def test_figures_follow_the_theme(visit, addresses, site, pages):
    name = next(name for name in pages if 'class="orl-figure"' in (site / name).read_text(encoding="utf-8"))
    page = visit(addresses["http"], color_scheme="light")
    page.goto(f"{addresses['http']}/{name}")
    page.wait_for_function(READY, timeout=WAIT)
    ink = "getComputedStyle(document.querySelector('.orl-figure .xtick text')).fill"
    light = page.evaluate(ink)
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    page.wait_for_function(f"light => {ink} !== light", arg=light, timeout=WAIT)
    red, green, blue = (int(part) for part in page.evaluate(ink).removeprefix("rgb(").removesuffix(")").split(","))
    assert min(red, green, blue) > 150, "dark mode writes in light ink"


@pytest.mark.browser
def test_explorer_answers(visit, addresses, site, pages):
    "A slider of the behaviour changes the exact numbers that the explorer tells."
    name = next(name for name in pages if 'class="orl-explorer"' in (site / name).read_text(encoding="utf-8"))
    page = visit(addresses["file"])
    page.goto(f"{addresses['file']}/{name}")
    page.wait_for_function(READY, timeout=WAIT)
    told = "[...document.querySelectorAll('.orl-explorer [aria-live]')].map(e => e.textContent).join()"
    before = page.evaluate(told)
    assert "direction error" in before
    level = page.locator(".orl-explorer fieldset").nth(1).locator("input[type=range]")
    level.focus()
    page.keyboard.press("End")
    page.wait_for_function(f"before => {told} !== before", arg=before, timeout=WAIT)
    assert not page.complaints


@pytest.mark.browser
def test_first_screen_says_what_this_is(visit, addresses):
    "What it is, the recorded runs, three doors and a slider that moves, all before anyone scrolls."
    page = visit(addresses["file"], viewport={"width": 1400, "height": 900})
    page.goto(f"{addresses['file']}/index.html")
    page.wait_for_function(READY, timeout=WAIT)
    explorer = (".orl-explorer input[type=range]", ".orl-explorer .main-svg")
    for what in ("article h1", ".orl-said p", ".orl-said dt:nth-of-type(3) a", ".orl-figure .main-svg", *explorer):
        box = page.locator(what).first.bounding_box()
        assert box["y"] + min(box["height"], 60) <= 900, f"{what} is below the first screen"
    numbers = page.locator(".orl-explorer [aria-live]")
    for slider in page.locator(".orl-explorer input[type=range]").all():
        before = numbers.text_content()
        slider.focus()
        page.keyboard.press("End")
        page.wait_for_function("before => document.querySelector('.orl-explorer [aria-live]').textContent !== before", arg=before, timeout=WAIT)
    assert not page.complaints


@pytest.mark.browser
def test_paper_index_is_filtered(visit, addresses):
    page = visit(addresses["file"])
    page.goto(f"{addresses['file']}/papers.html")
    shown = lambda: page.locator("table.orl-papers tbody tr:visible").count()
    everything = shown()
    assert everything >= len(systems())
    page.get_by_label("Find").fill("tapered off-policy")
    assert shown() == 1 and page.locator("h2:visible").count() == 1
    page.get_by_label("Find").fill("")
    page.get_by_label("only what has a notebook").check()
    assert 0 < shown() < everything and all(row.locator("td").last.locator("a").count() for row in page.locator("table.orl-papers tbody tr:visible").all())


@pytest.mark.browser
@pytest.mark.parametrize("words, found", [
    ("topr_loss", "reinforce/topr.html"),
    ("TokenTree", "toys/tree.html"),
    ("Soft Adaptive Policy Optimization", "papers.html"),
    ("Demystifying Some Myths", "papers.html"),
])
def test_search_finds(visit, addresses, words, found):
    page = visit(addresses["http"])
    page.goto(f"{addresses['http']}/search.html?q={words}")
    page.wait_for_function("document.querySelector('#search-results .search-summary, #search-results p')?.textContent.match(/found|matching/i)", timeout=WAIT)
    results = [link.get_attribute("href").split("#")[0].split("?")[0] for link in page.locator("#search-results li a").all()]
    assert any(link.endswith(found) for link in results[:5]), results


CONTRAST = """() => {
  const channels = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = e => {
    for (; e; e = e.parentElement) {
      const c = channels(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0.99) return c;
    }
    return [255, 255, 255];
  };
  const own = e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  const text = e => own(e) && e.checkVisibility() && !e.closest('svg, script, pre, mjx-container, a.headerlink');
  const faint = [...document.querySelectorAll('article *')].filter(text).map(e => {
    const [a, b] = [light(channels(getComputedStyle(e).color)), light(ground(e))];
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), `${e.tagName}.${e.className} ${e.textContent.slice(0, 40)}`];
  }).filter(([ratio]) => ratio < 4.5);
  return faint.slice(0, 5);
}"""


@pytest.mark.browser
@pytest.mark.parametrize("scheme, theme", [("http", "dark"), ("file", "light")])
def test_every_kind_of_page_works_offline_and_its_text_stands_out(visit, addresses, scheme, theme):
    "A contrast of at least 4.5 to 1 (WCAG AA) for every text outside of code and figures."
    page, drawn, formulas = visit(addresses[scheme], color_scheme=theme), 0, 0
    for name in ONE_OF_EACH_KIND:
        page.goto(f"{addresses[scheme]}/{name}.html")
        page.wait_for_function(READY, timeout=WAIT)
        drawn += page.locator(".orl-figure .main-svg").count()
        formulas += page.locator("mjx-container").count()
        assert (name, page.complaints, page.outside, page.evaluate(CONTRAST)) == (name, [], [], [])
    assert drawn > 0 and formulas > 0


def text_of(page: str) -> str:
    "What a page says, without its tags."
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def test_paper_index_has_every_system(site):
    page = (site / "papers.html").read_text(encoding="utf-8")
    rows = {int(text_of(row).split()[0]): row for row in re.findall(r"<tr.*?</tr>", page, re.S) if re.match(r"\d+ ", text_of(row))}
    for system in systems():
        said = text_of(rows.pop(system.number))
        squeezed = lambda text: re.sub(r"\W", "", text)
        assert squeezed(system.title) in squeezed(said) and squeezed(system.method) in squeezed(said)
        assert all(name in said for name in system.functions) and ("not yet there" in said) == (not system.done)
    assert not rows


def test_api_index_has_every_method(site):
    page = (site / "api.html").read_text(encoding="utf-8")
    for row in catalogue():
        if row.module.startswith("offpolicy_rl."):
            assert f'href="{row.notebook}.html#{row.name.lower().replace("_", "-")}"' in page, row.name
    said = text_of(page)
    for name in (*recipes(), "TokenTree", "exact", "TrainConfig", *KINDS.values()):
        assert re.search(rf"\b{re.escape(name)}\b", said), name


def test_every_advice_leads_to_a_measurement(site):
    article = (site / "which.html").read_text(encoding="utf-8").partition("<article")[2].partition("</article>")[0]
    advice = re.findall(r"<li>.*?</li>", article, re.S)
    assert len(advice) > 10
    for item in advice:
        assert re.search(r'href="[^"]+\.html(#[^"]+)?"', item), f"no measurement behind: {text_of(item)}"


def build(script: Path, out: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(script), "--out", str(out)], capture_output=True, text=True)


def notebook(*cells: tuple[str, str]) -> str:
    made = [{"cell_type": kind, "id": f"c{i}", "metadata": {}, "source": text} for i, (kind, text) in enumerate(cells)]
    for cell in made:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    return json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


@pytest.fixture
def small_project(tmp_path):
    "The site's builder in a project of two notebooks and no other pages, `index` with a link to be filled in."
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__", "pages", "_tree", "_src"))
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "nbs" / "toys").mkdir(parents=True)
    code = "#| export\nx = 1\n\ndef double(x):\n    return 2 * x\n\ndef half(x): return x / 2"
    other = notebook(("raw", "---\ntitle: Other\n---"), ("code", code))
    (tmp_path / "nbs" / "toys" / "other.ipynb").write_text(other, encoding="utf-8")

    def make(link: str) -> subprocess.CompletedProcess:
        index = notebook(("raw", "---\ntitle: Index\n---"), ("markdown", f"See [it]({link})."))
        (tmp_path / "nbs" / "index.ipynb").write_text(index, encoding="utf-8")
        return build(tmp_path / "docs" / "build.py", tmp_path / "html")

    return make


@pytest.mark.parametrize("link", ["toys/other.ipynb#nosuch", "toys/nosuch.ipynb"])
def test_broken_link_fails_the_build(small_project, link):
    done = small_project(link)
    assert done.returncode != 0 and "nosuch" in done.stderr


def test_next_build_knows_what_has_changed(small_project, tmp_path):
    "What was good and is not rendered again still fails when what it leads to is gone, and so does the build after that; a new page is in every sidebar."
    again = lambda: build(tmp_path / "docs" / "build.py", tmp_path / "html")
    toys, rendered = tmp_path / "nbs" / "toys", tmp_path / "docs" / "_tree" / "html"
    page = tmp_path / "html" / "toys" / "other.html"
    done = small_project("toys/other.ipynb#double")
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'href="toys/other.html#double"' in (tmp_path / "html" / "index.html").read_text(encoding="utf-8"), "a good link leads to the definition"
    first = page.read_text(encoding="utf-8")
    assert first.index('id="double"') < first.index('id="half"'), "each definition stands under its own heading, in the notebook's order"
    whole = (toys / "other.ipynb").read_text(encoding="utf-8")
    (toys / "other.ipynb").write_text(whole.replace("def double", "def twice"), encoding="utf-8")
    for _ in range(2):
        done = again()
        assert done.returncode != 0 and "double" in done.stderr
        assert 'id="double"' in page.read_text(encoding="utf-8"), "a site that is wrong must not replace one that is right"
    (toys / "other.ipynb").write_text(whole, encoding="utf-8")
    (toys / "new.ipynb").write_text(notebook(("raw", "---\ntitle: Brand new\n---")), encoding="utf-8")
    assert again().returncode == 0
    assert "Brand new" in page.read_text(encoding="utf-8")
    before = {name: (rendered / name).stat().st_mtime_ns for name in ("index.html", "toys/other.html")}
    (toys / "other.ipynb").write_text(whole.replace("return 2 * x", "return x + x"), encoding="utf-8")
    assert again().returncode == 0
    changed = [name for name, time in before.items() if (rendered / name).stat().st_mtime_ns != time]
    assert changed == ["toys/other.html"] and "x + x" in re.sub("<[^>]+>", "", page.read_text(encoding="utf-8"))


def test_outputs_become_static():
    from convert import page_output

    explorer, figure, widget = (f"application/vnd.{name}+json" for name in ("offpolicy.explorer", "plotly.v1", "jupyter.widget-view"))
    both = page_output({"data": {widget: {"model_id": "1"}, explorer: {"note": "</script>"}}})
    assert both["data"].keys() == {"text/html"}
    html = both["data"]["text/html"]
    assert html.startswith('<div class="orl-explorer"><script type="application/json">') and html.count("</script>") == 1
    assert page_output({"data": {widget: {"model_id": "1"}}}) is None
    drawn = page_output({"data": {figure: {"data": [], "layout": {"height": 300}}}})
    assert 'class="orl-figure" style="min-height:300px"' in drawn["data"]["text/html"]
    assert page_output({"output_type": "stream", "text": "x"}) == {"output_type": "stream", "text": "x"}


def test_page_has_one_title():
    from convert import one_title

    text = "# Reports\n\nText.\n\n# References\n\n```sh\n# a comment\n```"
    assert one_title(text, "Reports") == "\nText.\n\n## References\n\n```sh\n# a comment\n```"


def test_slug_is_the_anchor_that_nbdev_links_to():
    from convert import slug

    assert slug("Recipe.with_knobs") == "recipe.with_knobs"
    assert slug("4. Is it right?") == "4-is-it-right"
