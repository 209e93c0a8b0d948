"""The book: what goes into it, what is left out, and whose folders it leaves alone."""

import importlib.util

import nbformat
import pytest
from conftest import REPOSITORY
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from rsdlib import cli


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("book_build", REPOSITORY / "book/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def notebook(*outputs, count=1):
    cells = [new_markdown_cell("# Title\n\nWhat Fig. 5 shows. And more.")]
    cells.append(new_code_cell("1", outputs=list(outputs), execution_count=count))
    return new_notebook(cells=cells)


def test_what_did_not_run_to_its_end_is_told():
    error = new_output("error", ename="ValueError", evalue="", traceback=[])
    assert cli.ran_whole(notebook())
    assert not cli.ran_whole(notebook(error))
    assert not cli.ran_whole(notebook(count=None))


def test_nothing_is_built_of_what_failed(build, tmp_path, capsys):
    nbformat.write(notebook(count=None), tmp_path / "01_a.ipynb")
    with pytest.raises(SystemExit, match="no executed notebook"):
        build.build(tmp_path, tmp_path / "out")
    assert "left out, it did not run to its end: 01_a.ipynb" in capsys.readouterr().err


def test_folders_of_others_are_left_alone(build, tmp_path):
    nbformat.write(notebook(), tmp_path / "01_a.ipynb")
    thesis = tmp_path / "out" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("mine")
    with pytest.raises(SystemExit, match="something else than a book"):
        build.build(tmp_path, thesis.parent)
    assert thesis.read_text() == "mine"


def test_figures_are_told_by_the_sentence_before_them(build):
    prepared = build.prepared(notebook(), {})
    assert prepared.cells[1].metadata["mystnb"]["image"]["alt"] == "What Fig. 5 shows."
    assert "hide-input" in prepared.cells[1].metadata["tags"]


def test_links_lead_to_pages_or_become_text(build):
    text = "[a](x.ipynb) [b](y.py) [c](https://d) [e](#f) ![g](h.png)"
    linked = build._linked(text, {"x.ipynb"})
    assert linked == "[a](x.ipynb) b [c](https://d) [e](#f) ![g](h.png)"
