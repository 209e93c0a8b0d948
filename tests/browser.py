"""A real browser and a real JupyterLab for tests, both on this machine alone."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
FLAGS = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--no-first-run"]
EVIL = (
    "<script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">",
    "$$\\frac{1}{2}$$ costs $5 and `code` & \"quotes' </iframe></script>",
    "🦊 a fox, 狐狸",
    "שלום עולם, a picture",
    "word " * 599 + "end",
    "a line\nand another\u2028and a third",
)
HARMLESS = "Got invalid theme mode"  # the book's theme, on a first visit


@contextlib.contextmanager
def browser():
    """Start Chromium, or skip the test by name where there is none."""
    if not CHROMIUM:
        pytest.skip("chromium is not installed: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@contextlib.contextmanager
def watched(chromium, width=1200, height=900, **options):
    """Open a page that asks nobody outside and reports no error, else the test fails."""
    page = chromium.new_page(viewport={"width": width, "height": height}, **options)
    outside, errors = [], []

    def look(request):
        local = request.url.startswith(("file:", "data:", "blob:")) or "127.0.0.1" in request.url
        if not local:
            outside.append(request.url)

    def hear(message):
        if message.type == "error" and HARMLESS not in message.text:
            errors.append(message.text)

    page.on("request", look)
    page.on("console", hear)
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    assert not outside, outside
    assert not errors, errors
    page.close()


def _free_port():
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return some.getsockname()[1]


@contextlib.contextmanager
def lab(root, home):
    """Start JupyterLab on a folder, with settings of its own; yield its address."""
    home = Path(home)
    news = {"@jupyterlab/apputils-extension:announcements": True}
    (home / "labconfig").mkdir(parents=True)
    settings = json.dumps({"disabledExtensions": news})
    (home / "labconfig/page_config.json").write_text(settings, encoding="utf-8")
    port = _free_port()
    environment = {name: value for name, value in os.environ.items() if name != "RSD_HEADLESS"}
    environment |= {"JUPYTER_CONFIG_DIR": str(home), "JUPYTER_RUNTIME_DIR": str(home / "r")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    command += [f"--ServerApp.root_dir={root}", "--IdentityProvider.token="]
    command += ["--LabApp.expose_app_in_browser=True", f"--LabApp.workspaces_dir={home}/w"]
    command += [f"--LabApp.user_settings_dir={home}/s"]
    command += ["--KernelManager.transport_encryption=auto"]  # as make lab does
    with (home / "lab.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stderr=log, stdout=log)
        try:
            _wait_for(f"http://127.0.0.1:{port}/api", server)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(20)
    assert "without encryption" not in (home / "lab.log").read_text(encoding="utf-8")


def _wait_for(url, server, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url)
            return
        time.sleep(0.2)
    raise TimeoutError("JupyterLab does not answer")


NOTEBOOK = "jupyterapp.shell.currentWidget.content"
IDLE = "jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"


def open_notebook(page, url, path):
    """Open a notebook in JupyterLab and wait for its kernel."""
    page.goto(f"{url}/lab/workspaces/test/tree/{path}?reset")
    page.wait_for_function(f"window.{IDLE}", timeout=90_000)


def shut(page):
    """End the kernel of the notebook that is open."""
    page.evaluate("jupyterapp.shell.currentWidget.sessionContext.shutdown()")


def command(page, name, **arguments):
    """Do what a command of JupyterLab does, and wait for its end."""
    return page.evaluate("([n, a]) => jupyterapp.commands.execute(n, a)", [name, arguments])


def run_last(page):
    """Run the last cell; return what it printed."""
    page.evaluate("(n => { n.activeCellIndex = n.widgets.length - 1 })" + f"({NOTEBOOK})")
    command(page, "notebook:run-cell")
    return page.evaluate(f"{NOTEBOOK}.widgets.at(-1).outputArea.node.innerText")
