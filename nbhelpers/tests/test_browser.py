"""The explorer in real JupyterLab in headless Chromium: controls and divider as a reader's hand moves them."""

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest

from nbhelpers import checkpoints, runtime

playwright_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
)

NOTEBOOK = runtime.ROOT / "notebooks" / "00_explorer.ipynb"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Console errors that are not ours, each with its reason; anything else fails the test.
HARMLESS = [
    r"favicon",  # some JupyterLab pages ask for an icon that the server does not have
    r"/lsp/status",  # jupyter-lsp, where installed, probes for language servers and finds none
    r"/api/contents/.*checkpoints",  # a fresh copy of a notebook has no saved checkpoint yet
]
START_SECONDS = 120
CANVAS = "canvas.wipe-canvas"

pytestmark = [
    pytest.mark.skipif(not NOTEBOOK.is_file(), reason="notebooks/00_explorer.ipynb is not in this copy"),
    pytest.mark.skipif(not checkpoints.available(), reason="no trained network in data/checkpoints"),
]


def find_browser() -> str:
    """Path of an installed Chromium or Chrome; skips the test where there is none."""
    names = [os.environ.get("NB_CHROMIUM", ""), *BROWSERS]
    found = next((path for path in map(shutil.which, filter(None, names)) if path), None)
    if found is None:
        pytest.skip("no Chromium found (set NB_CHROMIUM, or install it: apt install chromium)")
    return found


def short_notebook(folder: Path) -> Path:
    """The explorer's set-up, settings and panel cells without outputs; nbval runs all its cells elsewhere."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [i for i, cell in enumerate(code) if cell.source.strip() == "panel"]
    assert len(shown) == 1, "00_explorer should show its panel in one cell that reads `panel`"
    made = next(i for i, cell in enumerate(code) if "explorer_panel(" in cell.source)
    notebook.cells = code[:2] + code[made : shown[0] + 1]
    for cell in notebook.cells:
        cell.outputs, cell.execution_count = [], None
    path = folder / "explorer.ipynb"
    nbformat.write(notebook, path)
    return path


@contextlib.contextmanager
def jupyter_lab(folder: Path):
    """JupyterLab on a free port with its own settings, so that nothing of the user's is read or changed; (address,
    token)."""
    quiet = folder / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))  # no look at the network, no pop-up
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    environment = os.environ | {
        "NB_QUICK": "1",
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "PYTHONPATH": os.pathsep.join([str(runtime.ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", f"--port={port}", "--ServerApp.port_retries=0"]
    command += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}", "--ServerApp.ip=127.0.0.1"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for_server(f"http://127.0.0.1:{port}/api?token={token}", process, folder / "server.log")
        yield f"http://127.0.0.1:{port}", token
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server with the explorer's notebook."""
    folder = tmp_path_factory.mktemp("lab")
    short_notebook(folder)
    with jupyter_lab(folder) as address_and_token:
        yield address_and_token


def wait_for_server(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start within {START_SECONDS} s:\n{log.read_text()[-2000:]}")


def wait_for_kernel(address: str, token: str) -> None:
    """Until the page is connected to an idle kernel: "Run All" before that asks for a kernel or loses cells."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        # While a kernel starts, the server may answer with an error of its own.
        with contextlib.suppress(urllib.error.URLError, TimeoutError):
            answer = urllib.request.urlopen(f"{address}/api/kernels?token={token}", timeout=10).read()
            if any(k["connections"] and k["execution_state"] == "idle" for k in json.loads(answer)):
                return
        time.sleep(0.3)
    pytest.fail(f"no kernel was ready within {START_SECONDS} s")


@contextlib.contextmanager
def opened(server: tuple[str, str], name: str):
    """A notebook opened and run to the panel, the viewer painted; ``page.problems`` collects console errors."""
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(START_SECONDS * 1000)
        page.problems = []
        page.on("console", lambda m: m.type == "error" and page.problems.append(f"{m.text} ({m.location.get('url')})"))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        address, token = server
        page.goto(f"{address}/lab/tree/{name}.ipynb?token={token}")
        page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=START_SECONDS * 1000)
        wait_for_kernel(address, token)
        idle = "() => document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'"
        page.wait_for_function(idle, timeout=START_SECONDS * 1000)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        try:
            page.wait_for_selector(f"{CANVAS}[data-updates]", timeout=START_SECONDS * 1000)
        except playwright_api.Error:
            page.screenshot(path=screenshot_path(f"{name}_failed.png"))
            pytest.fail(f"the viewer did not appear, see runs/screenshots/{name}_failed.png; {page.problems}")
        page.locator(CANVAS).scroll_into_view_if_needed()
        yield page
        browser.close()


@pytest.fixture(scope="module")
def page(server):
    """The explorer."""
    with opened(server, "explorer") as page:
        yield page


def screenshot_path(name: str) -> Path:
    folder = runtime.RUNS / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def pixels(page) -> list[int]:
    """A coarse sample of what the canvas really shows."""
    return page.locator(CANVAS).evaluate(
        """c => { const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data, out = [];
                  for (let i = 0; i < d.length; i += 4 * 997) out.push(d[i]);
                  return out; }"""
    )


def waits_for_change(page, before: list[int], what: str, seconds: float = 30) -> list[int]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        now = pixels(page)
        if now != before:
            return now
        page.wait_for_timeout(50)
    pytest.fail(f"the picture did not change within {seconds} s after: {what}; status: {status(page)}")


def our_problems(page) -> list[str]:
    """Console errors that are not known to be harmless."""
    return [text for text in page.problems if not any(re.search(pattern, text) for pattern in HARMLESS)]


def status(page) -> str:
    return page.locator("[role=status]").first.inner_text()


def control(page, name: str, kind: str):
    """The ``kind`` of element in the one dropdown or slider that is labelled ``name``."""
    box = page.locator(".widget-dropdown, .widget-slider").filter(has=page.get_by_text(name, exact=True))
    return box.locator(kind)


def test_picture_is_there_and_not_flat(page):
    assert len(set(pixels(page))) > 20
    assert page.locator(CANVAS).get_attribute("role") == "slider"


def test_jpeg_slider_changes_the_picture(page):
    before = pixels(page)
    handle = control(page, "JPEG quality", ".noUi-handle")
    handle.focus()
    for _ in range(3):
        handle.press("PageDown")
    waits_for_change(page, before, "JPEG quality lowered")


def test_network_chooser_changes_the_picture(page):
    chooser = control(page, "Right side", "select")
    names = chooser.locator("option").all_inner_texts()
    if len(names) < 2:
        pytest.skip(f"only one trained network here: {names}")
    current = chooser.evaluate("s => s.options[s.selectedIndex].text")
    before = pixels(page)
    chooser.select_option(label=next(name for name in names if name != current))
    waits_for_change(page, before, "network chosen")


def test_dragging_the_divider_moves_it_and_tells_the_screen_reader(page):
    canvas = page.locator(CANVAS)
    canvas.scroll_into_view_if_needed()
    before, box = pixels(page), canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    assert canvas.get_attribute("aria-valuenow") == "50"
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 120, y, steps=6)
    page.mouse.up()
    waits_for_change(page, before, "divider dragged")
    assert int(canvas.get_attribute("aria-valuenow")) < 40
    page.keyboard.press("End")
    page.wait_for_function(f"() => document.querySelector('{CANVAS}').getAttribute('aria-valuenow') === '100'")


def test_wheel_zooms_and_zero_fits_again(page):
    canvas = page.locator(CANVAS)
    box = canvas.bounding_box()
    fit = float(canvas.get_attribute("data-zoom"))
    page.mouse.move(box["x"] + box["width"] / 2 + 40, box["y"] + box["height"] / 2 - 60)
    for _ in range(5):
        page.mouse.wheel(0, -120)
    page.wait_for_function(f"() => Number(document.querySelector('{CANVAS}').dataset.zoom) >= {max(4, 2 * fit)}")
    canvas.press("0")
    canvas.press("0")  # "0 0" is JupyterLab's "restart the kernel?" unless the viewer keeps its keys to itself
    page.wait_for_function(f"() => Number(document.querySelector('{CANVAS}').dataset.zoom) === {fit}")
    assert page.locator(".jp-Dialog").count() == 0


def test_screenshot_and_no_console_errors(page):
    handle = control(page, "JPEG quality", ".noUi-handle")
    handle.press("End")
    photo = control(page, "Photo", "select")
    name = photo.locator("option").all_inner_texts()[1]
    photo.select_option(label=name)
    playwright_api.expect(page.locator("[role=status]").first).to_contain_text(f"of {name}", timeout=10_000)
    canvas = page.locator(CANVAS)
    page.wait_for_timeout(1000)  # the words come before the picture is decoded
    before = pixels(page)
    canvas.press("Home")
    waits_for_change(page, before, "divider to the left end")
    for _ in range(5):
        canvas.press("PageUp")
    page.wait_for_function(f"() => document.querySelector('{CANVAS}').getAttribute('aria-valuenow') === '50'")
    page.screenshot(path=screenshot_path("explorer.png"))
    assert our_problems(page) == []
