"JupyterLab in a browser: a notebook calls explore(...), a slider is moved by keyboard, the figure follows, and nothing is asked of the network."

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
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
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
# The highest point of the method's own curve in the panel for good responses, as drawn: its cap.
HIGHEST = """() => Math.max(...document.querySelector('.jp-OutputArea .js-plotly-plot').data.find(trace => trace.meta === 'capped_loss/1').y)"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def lab(tmp_path):
    "A JupyterLab of its own, with a notebook of one cell; yields its address and token."
    work = tmp_path / "work"
    work.mkdir()
    cell = dict(cell_type="code", id="explore", metadata={}, source=CODE, outputs=[], execution_count=None)
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    (work / "play.ipynb").write_text(json.dumps(dict(cells=[cell], metadata=kernel, nbformat=4, nbformat_minor=5)), encoding="utf-8")
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


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_slider_moves_the_figure(lab):
    address, token = lab
    outside, errors = [], []
    ours = (address, address.replace("http", "ws"), "data:", "blob:")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport=dict(width=1400, height=1100))
        page.on("request", lambda r: None if r.url.startswith(ours) else outside.append(r.url))
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.goto(f"{address}/lab/tree/play.ipynb?token={token}&reset")
        page.wait_for_function("document.querySelector('#jp-main-statusbar')?.innerText.includes('Idle')", timeout=60_000)
        page.click("text=Run >> nth=0")
        page.click('.lm-Menu-itemLabel:text-is("Run All Cells")')
        page.wait_for_selector(".jp-OutputArea .js-plotly-plot .main-svg", timeout=60_000)
        page.wait_for_selector(".widget-slider", timeout=20_000)
        path = page.locator('.js-plotly-plot .scatterlayer path.js-line').nth(3)
        assert page.evaluate(HIGHEST) == pytest.approx(2.0, rel=1e-4)
        drawn = path.get_attribute("d")
        page.locator(".widget-slider .noUi-handle").first.focus()
        for _ in range(20):
            page.keyboard.press("ArrowLeft")
        page.wait_for_function(f"({HIGHEST})() < 1.4", timeout=20_000)
        page.wait_for_timeout(300)
        assert page.evaluate(HIGHEST) == pytest.approx(0.8, rel=0.1)
        assert path.get_attribute("d") != drawn
        if os.environ.get("SHOTS"): page.screenshot(path=os.environ["SHOTS"])
        browser.close()
    assert not outside
    assert not errors
