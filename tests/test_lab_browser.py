"The explorer in a browser, live in JupyterLab and on a page without a kernel: keys move a slider, the figure follows, nothing is fetched from outside."

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
WAIT = 60_000
CODE = """\
from offpolicy_rl.lab.explore import explore
from offpolicy_rl.core import Range, method, seq_mean_token_sum
from typing import Annotated

@method(family="ratios", paper="a test")
def capped_loss(logp, logp_mu, adv, mask, *, cap: Annotated[float, Range(0.1, 10, log=True)] = 2.0):
    "REINFORCE with the whole response's ratio, capped."
    weight = ((logp - logp_mu).sum(-1).exp()).detach().clamp(max=cap)
    return -seq_mean_token_sum(weight[:, None] * adv[:, None] * logp, mask), {}

explore(capped_loss, toy="token tree", mu_age=8)"""
RUN_CODE = """\
import tempfile
from offpolicy_rl.lab.run_explorer import explore_run
from offpolicy_rl.llm.config import TrainConfig, record_path
from offpolicy_rl.llm.train import train

config = TrainConfig(recipe="topr", staleness=8, steps=8, prompts_per_step=2, group_size=4, eval_prompts=4, threads=1, keep_rollouts=4, out=tempfile.mkdtemp())
train(config)
explore_run(record_path(config), response=3)  # the last of its group: the next one answers another prompt"""
# The highest point of the method's own curve in the panel for good responses, as drawn: its cap.
HIGHEST = """() => Math.max(...document.querySelector('.jp-OutputArea .js-plotly-plot').data.find(trace => trace.meta === 'capped_loss/1').y)"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab of its own, with two notebooks of one cell; yields its address and token."
    tmp_path = tmp_path_factory.mktemp("lab")
    work = tmp_path / "work"
    work.mkdir()
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    for name, code in (("play", CODE), ("run", RUN_CODE)):
        cell = dict(cell_type="code", id="explore", metadata={}, source=code, outputs=[], execution_count=None)
        (work / f"{name}.ipynb").write_text(json.dumps(dict(cells=[cell], metadata=kernel, nbformat=4, nbformat_minor=5)), encoding="utf-8")
    folders = {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    folders |= {f"JUPYTERLAB_{name}_DIR": str(tmp_path / f"lab-{name}") for name in ("SETTINGS", "WORKSPACES")}
    env = {**os.environ, **folders, "IPYTHONDIR": str(tmp_path / "ipython"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    port, token = free_port(), secrets.token_hex(8)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", f"--IdentityProvider.token={token}",
               f"--ServerApp.root_dir={work}", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.extension_manager=readonly"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", server, tmp_path / "log")
        yield f"http://127.0.0.1:{port}", token
    finally:
        server.terminate()
        server.wait(20)


def wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(150):
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(address, timeout=1)
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium: scripts/system.sh could not install it")
        pytest.skip("no Chromium")
    with playwright.sync_playwright() as p:
        opened = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def watched(browser):
    "Opens a page and, when the test ends, holds it to have asked for nothing outside and reported no error."
    outside, errors = [], []

    def open_page(*own: str, **size):
        page = browser.new_page(viewport=size)
        page.on("request", lambda r: None if r.url.startswith((*own, "data:", "blob:")) else outside.append(r.url))
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: errors.append(str(e)))
        return page

    yield open_page
    assert not outside
    assert not errors


def run_all(lab, watched, name: str):
    "Open a notebook in JupyterLab and run it until its figure fills the cell."
    address, token = lab
    page = watched(address, address.replace("http", "ws"), width=1400, height=1100)
    page.goto(f"{address}/lab/tree/{name}.ipynb?token={token}&reset")
    page.wait_for_function("document.querySelector('#jp-main-statusbar')?.innerText.includes('Idle')", timeout=WAIT)
    page.click("text=Run >> nth=0")
    page.click('.lm-Menu-itemLabel:text-is("Run All Cells")')
    page.wait_for_selector(".jp-OutputArea .js-plotly-plot .main-svg", timeout=WAIT)
    page.wait_for_selector(".widget-slider", timeout=WAIT)
    page.wait_for_function("document.querySelector('.js-plotly-plot')._fullLayout.width > 900", timeout=WAIT)
    return page


def test_response_and_rival_move_the_tokens_in_jupyterlab(lab, watched):
    page = run_all(lab, watched, "run")
    plot = "document.querySelector('.jp-OutputArea .js-plotly-plot')"
    assert page.locator(".widget-html span[title*=coefficient]").count() > 0
    tokens = "document.querySelector('.widget-html-content:has(span[title])').innerHTML"
    before = page.evaluate(tokens)
    page.locator(".widget-slider .noUi-handle").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"{plot}.layout.annotations[3].text.startsWith('response 4:')", timeout=WAIT)
    page.wait_for_function(f"before => {tokens} !== before", arg=before, timeout=WAIT)  # the kernel sends the tokens after the figure
    page.locator(".widget-dropdown select").nth(2).select_option(label="reinforce")
    page.wait_for_function(f"{plot}.data.some(t => t.meta === 'tokens/rival' && t.name === 'reinforce')", timeout=WAIT)
    page.close()


def test_slider_moves_the_figure_in_jupyterlab(lab, watched):
    page = run_all(lab, watched, "play")
    assert page.evaluate(HIGHEST) == pytest.approx(2.0, rel=1e-4)
    own = page.locator(".js-plotly-plot .scatterlayer path.js-line").nth(3)  # three rivals are drawn below it
    before = own.get_attribute("d")
    page.locator(".widget-slider .noUi-handle").first.focus()
    for _ in range(20):
        page.keyboard.press("ArrowLeft")
    page.wait_for_function(f"Math.abs(({HIGHEST})() - 0.8) < 0.08", timeout=WAIT)  # twenty hundredths of two decades down from 2
    page.wait_for_function("before => document.querySelectorAll('.js-plotly-plot .scatterlayer path.js-line')[3].getAttribute('d') !== before", arg=before)
    page.close()


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    "A page with the explorer of PPO's loss, as the site has it, and the explorer."
    import plotly
    from convert import explorer_html

    from offpolicy_rl.core import catalogue
    from offpolicy_rl.lab.explore import explore

    folder = tmp_path_factory.mktemp("twin")
    for file in (*(ROOT / "docs" / "_static").glob("*.*s*"), Path(plotly.__file__).parent / "package_data" / "plotly.min.js"):
        shutil.copy(file, folder)
    explorer = explore(catalogue()["ppo_loss"].fn, toy="token tree", mu_age=8)
    scripts = '<link rel="stylesheet" href="orl.css"><script src="orl.js"></script><script src="explorer.js"></script>'
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">{scripts}'
    html = f'<!doctype html><html data-theme="light"><head>{head}</head><body>{explorer_html(explorer.grid())}</body></html>'
    (folder / "page.html").write_text(html, encoding="utf-8")
    return folder, explorer


def shown(page) -> tuple[list, list]:
    "What the page draws: the method's coefficient for a good response, and the direction errors."
    plots = "[...document.querySelectorAll('.orl-explorer .js-plotly-plot')]"
    return page.evaluate(f"{plots}[0].data.at(-1).y"), page.evaluate(f"{plots}[2].data[0].x")


@pytest.mark.parametrize("width", [390, 1200])
def test_page_without_a_kernel_shows_the_same_numbers(twin, watched, width):
    folder, explorer = twin
    page = watched(folder.as_uri(), width=width, height=900)
    page.goto((folder / "page.html").as_uri())
    page.wait_for_function("document.querySelectorAll('.orl-explorer .main-svg').length >= 4", timeout=WAIT)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    slider = page.get_by_label("eps_high")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    page.get_by_label("toy").select_option(label="with end token")
    page.get_by_label("updates behind").focus()
    page.keyboard.press("End")
    eps = next(k for k in explorer.grid()["knobs"] if k["name"] == "eps_high")["values"][int(slider.input_value())]
    assert eps != 0.2
    made = explorer.compute(parts=("coefficient", "moments"), eps_high=eps, toy="with end token", mu_age=16)
    drawn = "document.querySelectorAll('.orl-explorer .js-plotly-plot')[2].data[0].x[0]"
    page.wait_for_function(f"error => Math.abs({drawn} - error) < 1e-4", arg=float(made["direction_error"][0]), timeout=WAIT)
    coefficients, errors = shown(page)
    assert coefficients == pytest.approx(made["coefficient"][:, 0].clip(-10, 10).tolist(), abs=20 / 65534)
    assert errors == pytest.approx(made["direction_error"].tolist(), abs=1e-4)
    colour = "getComputedStyle(document.querySelector('.orl-explorer .xtick text')).fill"
    light = page.evaluate(colour)
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    page.wait_for_function(f"{colour} !== '{light}'", timeout=WAIT)
    page.close()
