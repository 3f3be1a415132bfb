"The site builds, refuses broken links, and works in a browser that reaches nothing outside, from a server and from the disk."

import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync", OFFLINE)
WAIT = 60_000

# What a page needs to be finished: every formula set, every figure and explorer drawn.
READY = """() => [...document.querySelectorAll('.math')].every(e => e.querySelector('mjx-container'))
  && [...document.querySelectorAll('.orl-figure, .orl-explorer')].every(e => e.querySelector('.main-svg'))"""


def build(script: Path, out: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(script), "--out", str(out)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site") / "html"
    done = build(ROOT / "docs" / "build.py", out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


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
@pytest.mark.parametrize("scheme", ["http", "file"])
def test_pages_work_offline(visit, addresses, pages, scheme):
    page, drawn, formulas = visit(addresses[scheme]), 0, 0
    for name in pages:
        page.goto(f"{addresses[scheme]}/{name}")
        page.wait_for_function(READY, timeout=WAIT)
        drawn += page.locator(".orl-figure .main-svg").count()
        formulas += page.locator("mjx-container").count()
        assert (name, page.complaints, page.outside) == (name, [], [])
    assert drawn > 0 and formulas > 0


@pytest.mark.browser
def test_pages_fit_a_phone(visit, addresses, pages):
    page = visit(addresses["http"], viewport={"width": 390, "height": 844})
    wide = {}
    for name in pages:
        page.goto(f"{addresses['http']}/{name}")
        page.wait_for_function(READY, timeout=WAIT)
        if excess := page.evaluate("document.documentElement.scrollWidth - window.innerWidth"):
            wide[name] = excess
    assert not wide, f"pages that scroll sideways, in pixels: {wide}"


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


def notebook(*cells: tuple[str, str]) -> str:
    made = [{"cell_type": kind, "id": f"c{i}", "metadata": {}, "source": text} for i, (kind, text) in enumerate(cells)]
    for cell in made:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    return json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


@pytest.fixture
def small_project(tmp_path):
    "The site's builder in a project of two notebooks, `index` with a link to be filled in."
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
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


def test_good_link_leads_to_the_definition(small_project, tmp_path):
    done = small_project("toys/other.ipynb#double")
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'href="toys/other.html#double"' in (tmp_path / "html" / "index.html").read_text(encoding="utf-8")
    page = (tmp_path / "html" / "toys" / "other.html").read_text(encoding="utf-8")
    assert page.index('id="double"') < page.index('id="half"'), "each definition stands under its own heading, in the notebook's order"


@pytest.mark.parametrize("link", ["toys/other.ipynb#nosuch", "toys/nosuch.ipynb"])
def test_broken_link_fails_the_build(small_project, link):
    done = small_project(link)
    assert done.returncode != 0 and "nosuch" in done.stderr


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


def test_slug_is_the_anchor_that_nbdev_links_to():
    from convert import slug

    assert slug("Recipe.with_knobs") == "recipe.with_knobs"
    assert slug("4. Is it right?") == "4-is-it-right"
