"""Shared by all tests: no network, one small project folder for everything that writes."""

import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "RSD_HEADLESS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, one core each

import pytest
import warm
from browser import browser

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure(config):
    """Let ``rsd`` and the kernels of notebooks begin warm, from one server for all workers."""
    if "JUPYTER_DATA_DIR" not in os.environ:  # signatures of executed notebooks: none in the home
        data = tempfile.TemporaryDirectory(prefix="rsd-")
        config.add_cleanup(data.cleanup)
        os.environ["JUPYTER_DATA_DIR"] = data.name
    if sys.platform == "linux" and warm.SERVER not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="rsd-")
        config.add_cleanup(folder.cleanup)
        server = warm.start(folder.name)
        config.add_cleanup(lambda: warm.stop(server))
        argv = [*warm.COMMAND, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        kernel = {"argv": argv, "display_name": "Python 3, warm", "language": "python"}
        kernel["metadata"] = {"supported_encryption": ["curve"]}
        path = Path(folder.name) / "kernels/python3/kernel.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(kernel))
        os.environ["JUPYTER_PATH"] = folder.name


def rsd(*arguments, cwd):
    """Run the command ``rsd`` in a process of its own, which begins warm."""
    command = [*warm.COMMAND, "-m", "rsdlib.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """Return a project folder with the repository's notebooks and data, its own caches and runs."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "data").mkdir()
    for name in ("pyproject.toml", "notebooks", "data/mini"):
        (folder / name).symlink_to(REPOSITORY / name)
    before = os.environ.get("RSD_ROOT")
    os.environ["RSD_ROOT"] = str(folder)
    yield folder
    os.environ.pop("RSD_ROOT") if before is None else os.environ.update(RSD_ROOT=before)


@pytest.fixture(autouse=True)
def own_root(request, tmp_path, monkeypatch):
    """Keep every other test's caches and runs in its own temporary folder."""
    if "project" not in request.fixturenames:
        monkeypatch.setenv("RSD_ROOT", str(tmp_path))


@pytest.fixture(autouse=True, scope="module")
def imported():
    """Spare the garbage collector what lives already: it is called after every training."""
    gc.collect()
    gc.freeze()


LONGEST = ("test_notebooks", "test_training")  # files that are tested side by side begin with these


def pytest_collection_modifyitems(items):
    """Let the longest files begin first."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture
def decodes(monkeypatch):
    """Return a list that grows with every image that extraction decodes."""
    # By its path: the room's door has a function of the module's name.
    extraction = importlib.import_module("rsdlib.data.extract")
    names, decode = [], extraction.decode_image

    def count(content, name, part):
        names.append(name)
        return decode(content, name, part)

    monkeypatch.setattr(extraction, "decode_image", count)
    return names


@pytest.fixture(scope="module")
def chromium():
    """Yield a browser, or skip the test by name where there is none."""
    with browser() as started:
        yield started
