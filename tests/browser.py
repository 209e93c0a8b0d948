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
def lab(root, home, theme="JupyterLab Light"):
    """Start JupyterLab on a folder, with settings of its own; yield its address."""
    home = Path(home)
    news = {"@jupyterlab/apputils-extension:announcements": True}
    files = {
        "labconfig/page_config.json": {"disabledExtensions": news},
        "s/@jupyterlab/apputils-extension/themes.jupyterlab-settings": {"theme": theme},
    }
    for name, value in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(json.dumps(value), encoding="utf-8")
    port = _free_port()
    folders = {"CONFIG_DIR": home, "DATA_DIR": home / "d", "RUNTIME_DIR": home / "r"}
    environment = os.environ | {f"JUPYTER_{name}": str(path) for name, path in folders.items()}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    command += [f"--ServerApp.root_dir={root}", "--IdentityProvider.token="]
    command += ["--LabApp.expose_app_in_browser=True", f"--LabApp.workspaces_dir={home}/w"]
    command += [f"--LabApp.user_settings_dir={home}/s"]
    with (home / "lab.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stderr=log, stdout=log)
        try:
            _wait_for(f"http://127.0.0.1:{port}/api", server)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(20)


def _wait_for(url, server, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url)
            return
        time.sleep(0.2)
    raise TimeoutError("JupyterLab does not answer")


IDLE = "jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"


def open_notebook(page, url, path):
    """Open a notebook in JupyterLab and wait for its kernel."""
    page.goto(f"{url}/lab/workspaces/test/tree/{path}?reset")
    page.wait_for_function(f"window.{IDLE}", timeout=90_000)


def run_all(page):
    """Run all cells; return whether none failed."""
    page.set_default_timeout(240_000)
    return page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
