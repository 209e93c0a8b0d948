"""Notebooks run headless at the smoke size, from anywhere, and what they have trained is used."""

import io
import json
import os
import re
import subprocess
import sys
import urllib.parse
from html.parser import HTMLParser

import nbformat
import numpy as np
import pandas as pd
import pytest
from browser import EVIL, command, lab, open_notebook, run_last, shut, watched
from conftest import REPOSITORY, rsd
from nbformat.sign import NotebookNotary
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from rsdlib import analysis, data, experiment, files, predict


@pytest.fixture(scope="module")
def trained(project, tmp_path_factory):
    """Run 01 with plain papermill from an unrelated folder, before 00 has ever run, all cold."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    command = [
        sys.executable,
        "-m",
        "papermill",
        project / "notebooks/01_train_vit.ipynb",
        "out.ipynb",
        "-p",
        "profile",
        "smoke",
    ]
    cold = {name: value for name, value in os.environ.items() if name != "JUPYTER_PATH"}
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, env=cold)
    assert done.returncode == 0, done.stderr[-3000:]
    executed = project / "runs/smoke/notebooks/01_train_vit.ipynb"
    executed.parent.mkdir(parents=True)
    (elsewhere / "out.ipynb").rename(executed)
    return project


def test_01_makes_what_it_needs_and_writes_its_results(trained):
    (folder,) = (trained / "runs/smoke").glob("figures-*")
    result = files.read_json(folder / "01_vit.json")
    rows = {row["method"]: row for row in result["table"]}
    assert list(rows) == [*experiment.BASELINES, "vit", "vit + MLC", "vit + MLC + CL"]
    for row in rows.values():
        assert -1 <= row["cosine"]["low"] <= row["cosine"]["mean"] <= row["cosine"]["high"] <= 1
        assert row["cosine"]["n"] == result["sizes"][2]["pairs"]
    assert [size["shared"] for size in result["sizes"]] == [0, 0, 0]
    assert "gain over vit" in rows["vit + MLC + CL"]
    assert {"seed", "environment", "source"} <= result.keys()
    runs = sorted((trained / "runs/smoke").glob("vit-*/run.json"))
    names = {path.parent.name.rsplit("-", 1)[0] for path in runs}
    assert names == {"vit-mlc", "vit-mlc-ours", "vit-vanilla"}
    assert all(files.read_json(path)["precision"] in ("fp32", "bf16") for path in runs)
    figures = {path.name for path in folder.glob("*.png")}
    kinds = ("curves", "scores", "recall", "neighbours")
    assert figures >= {f"01_vit_{kind}.png" for kind in kinds}


def test_00_runs_after_it_from_the_same_caches(trained):
    before = {path: path.stat().st_mtime_ns for path in (trained / "data/cache").rglob("*.npy")}
    done = rsd("run", "00_prepare_data", "-p", "profile", "smoke", cwd=trained)
    assert done.returncode == 0, done.stderr
    after = {path: path.stat().st_mtime_ns for path in (trained / "data/cache").rglob("*.npy")}
    assert after == before
    assert list((trained / "runs/smoke").glob("figures-*/00_cleaning.png"))
    notebook = nbformat.read(trained / "runs/smoke/notebooks/00_prepare_data.ipynb", as_version=4)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


OTHERS = {
    "02_train_swin": (),
    "03_train_clip": (),
    "04_train_unet": (),
    "05_curriculum": (),
    "06_ensemble_dakl": ("shifted", 4, "alphas", "[0.1, 10.0]", "gammas", "[0.01, 1.0]"),
    "07_unet_swap": ("count", 2, "steps", 4, "places", "[1, 0.5]", "blends", "[0.5]"),
    "08_captioning": (),
    "09_paper_figures": (),
    "10_your_pictures": ("turns", 2, "seeds", 1),
}


@pytest.fixture(scope="module")
def complete(trained):
    """Run the others after them; what each said stands in its place."""
    said = {}
    for name, parameters in OTHERS.items():
        pairs = zip(parameters[::2], parameters[1::2], strict=True)
        values = [word for pair in pairs for word in ("-p", *pair)]
        said[name] = rsd("run", name, "-p", "profile", "smoke", *values, cwd=trained)
        assert said[name].returncode == 0, f"{name}: {said[name].stderr}"
    return said


@pytest.mark.timeout(600)
def test_the_others_store_what_the_tables_are_made_of(trained, complete):
    (folder,) = (trained / "runs/smoke").glob("figures-*")
    assert {path.name[:2] for path in folder.glob("*.png")} == {
        f"{number:02}" for number in range(11)
    }
    assert {path.name[:2] for path in folder.glob("*.json")} == {
        f"{number:02}" for number in (*range(1, 9), 10)
    }
    done = rsd("tables", "--profile", "smoke", cwd=trained)
    assert done.stdout.count("| method |") == 5


def test_executed_notebooks_are_trusted_and_hold_no_residue(trained, complete):
    for name, done in complete.items():
        assert "IPKernelApp" not in done.stdout + done.stderr
        notebook = nbformat.read(trained / f"runs/smoke/notebooks/{name}.ipynb", as_version=4)
        assert NotebookNotary().check_signature(notebook), name
        outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
        streams = "".join(out.text for out in outputs if out.output_type == "stream")
        assert "%|" not in streams, name  # a bar
        assert not re.search(r"\d/\d+, about \d+ s left$", streams, re.M), name
        assert "WARNING" not in streams, name


def test_predict_reads_an_image(trained, tmp_path):
    pairs = data.load_pairs(trained / "data/mini/diffusiondb", limit=2)
    files = []
    for locator in pairs["image"]:
        files.append(tmp_path / f"{len(files)}.png")
        data.open_image(locator).save(files[-1])
    done = rsd("predict", tmp_path, "--profile", "smoke", "--format", "json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["image"] for row in found] == [str(path) for path in files]
    assert np.linalg.norm(found[0]["embedding"]) == pytest.approx(1, abs=1e-5)
    assert len(found[0]["prompts"]) == 5

    run = predict.best_run("smoke")
    with_words = next((trained / "runs/smoke").glob("vit-mlc-*"))
    prediction = predict.Predictor.load(with_words).predict(pairs["image"].tolist())
    probabilities = [p for _, p in prediction.words[0]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert run.parent == with_words.parent
    text = rsd("predict", files[0], "--run", with_words, cwd=tmp_path)
    assert prediction.words[0][0][0] in text.stdout


def test_predictions_of_the_run_folder_are_those_of_the_predictor(trained):
    """The whole chain twice: store, batch and stored model against open, resize and predictor."""
    folder = next((trained / "runs/smoke").glob("vit-mlc-*"))
    (path,) = folder.glob("predictions-test-*.npy")
    stored, items = files.open_rows(path), pd.read_parquet(path.with_suffix(".parquet"))
    pairs = data.load_pairs(trained / "data/mini/diffusiondb").set_index("id")
    locators = pairs.loc[items["id"].iloc[:5], "image"].tolist()
    np.testing.assert_allclose(
        predict.Predictor.load(folder).predict(locators).embeddings, stored[:5], atol=1e-5
    )


# --- in JupyterLab and as a book, in a browser ----------------------------------------------------


@pytest.fixture(scope="module")
def jupyter(chromium, trained, complete, tmp_path_factory):
    """Yield a browser and the address of a JupyterLab on the project."""
    with lab(trained, tmp_path_factory.mktemp("lab")) as url:
        yield chromium, url


def explorer(page, name):
    """Return an explorer's frame, in sight."""
    page.locator(f"iframe[title={name}]").scroll_into_view_if_needed()
    return page.frame_locator(f"iframe[title={name}]")


def expect_rows(page, frame):
    """What is selected came back to Python as rows of a table."""
    shown = frame.get_by_text(" selected").first.inner_text()
    count = re.search(r"(\d+) selected", shown)[1]
    assert count != "0"
    assert run_last(page).strip() == f"{count} rows"


def move_pairs(page):
    frame = explorer(page, "pairs")
    frame.get_by_role("application").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    frame.get_by_text(", 1 selected").wait_for()
    expect_rows(page, frame)
    frame.get_by_role("button", name="select all shown").click()
    expect_rows(page, frame)
    shown = frame.get_by_text(" selected").first.inner_text()
    command(page, "docmanager:save")
    page.reload()  # the page comes back, the kernel has never been away
    page.locator("iframe[title=pairs]").wait_for(timeout=60_000)
    explorer(page, "pairs").get_by_text(shown).wait_for()


def move_map_and_dakl(page):
    frame = explorer(page, "map")
    frame.get_by_label("search in prompts").fill("a")
    frame.get_by_role("button", name="select found").click()
    expect_rows(page, frame)
    frame = explorer(page, "dakl")
    frame.get_by_role("slider", name="blend").focus()
    page.keyboard.press("Home")
    frame.get_by_text("+0.0000").first.wait_for()


def move_swap(page):
    frame = explorer(page, "swap")
    frame.get_by_label("first step swapped").first.focus()
    page.keyboard.press("ArrowRight")
    frame.get_by_text("from step 50%").wait_for()
    colour = frame.locator(".rsd").evaluate("box => getComputedStyle(box).backgroundColor")
    assert max(map(int, re.findall(r"\d+", colour)[:3])) < 80  # JupyterLab's dark theme


def move_readers(page):
    frame = explorer(page, "readers")
    frame.get_by_text("1 of ").first.wait_for()
    frame.get_by_role("button", name="next").click()
    frame.get_by_text("2 of ").first.wait_for()


def ask_for_a_picture(page):
    move_readers(page)
    frame = explorer(page, "readers")
    told = PngInfo()
    told.add_text("parameters", "a red fox on a hill\nSteps: 20, Sampler: Euler a, Seed: 1")
    content = io.BytesIO()
    Image.new("RGB", (64, 64), "gray").save(content, "PNG", pnginfo=told)
    file = {"name": "own.png", "mimeType": "image/png", "buffer": content.getvalue()}
    frame.get_by_label("picture of your own").set_input_files(file)
    frame.get_by_text("asked for: a red fox on a hill").wait_for()
    frame.get_by_label("path of a picture").fill("nowhere.png")
    frame.get_by_role("button", name="read", exact=True).click()
    frame.get_by_text("nowhere.png").first.wait_for()


MOVES = {
    "05_curriculum": move_pairs,
    "06_ensemble_dakl": move_map_and_dakl,
    "07_unet_swap": move_swap,
    "08_captioning": move_readers,
    "10_your_pictures": ask_for_a_picture,
}
THEMES = {"07_unet_swap": "JupyterLab Dark"}
WIDTHS = {"08_captioning": 500}
ROWS = """if "explorer" in globals():
    print(len(explorer.rows), "rows")"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", MOVES)
def test_explorers_answer_in_jupyterlab(trained, jupyter, tmp_path, name):
    names, values = OTHERS[name][::2], OTHERS[name][1::2]
    parameters = {n: json.loads(str(value)) for n, value in zip(names, values, strict=True)}
    notebook = load_notebook_node(str(trained / f"notebooks/{name}.ipynb"))
    notebook = parameterize_notebook(notebook, {"profile": "smoke", **parameters})
    notebook.cells.append(nbformat.v4.new_code_cell(ROWS))
    path = trained / f"runs/live/{name}.ipynb"
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)
    chromium, url = jupyter
    with watched(chromium, width=WIDTHS.get(name, 1200)) as page:
        open_notebook(page, url, f"runs/live/{name}.ipynb")
        command(page, "apputils:change-theme", theme=THEMES.get(name, "JupyterLab Light"))
        assert command(page, "notebook:run-all-cells")
        MOVES[name](page)
        page.screenshot(path=tmp_path / f"{name}.png")
        shut(page)


def test_an_executed_notebook_opens_alive(jupyter):
    chromium, url = jupyter
    with watched(chromium) as page:
        open_notebook(page, url, "runs/smoke/notebooks/05_curriculum.ipynb")
        frame = explorer(page, "pairs")
        frame.get_by_role("button", name="select all shown").click()
        frame.get_by_text(" selected").first.wait_for()
        shut(page)


def test_hostile_prompts_are_literal_in_jupyterlab(jupyter, hostile):
    chromium, url = jupyter
    with watched(chromium) as page:
        open_notebook(page, url, "runs/smoke/notebooks/99_hostile.ipynb")
        expect_literal(page, ".jp-Notebook")
        shut(page)


def test_the_start_page_shows_what_is_computed_and_leads_there(trained, jupyter, tmp_path):
    done = subprocess.run([sys.executable, REPOSITORY / "book/start.py"], capture_output=True)
    assert done.returncode == 0, done.stderr
    chromium, url = jupyter
    with watched(chromium) as page:
        open_notebook(page, url, "runs/start.ipynb")
        page.locator(".jp-OutputArea img").first.wait_for()
        page.screenshot(path=tmp_path / "start.png")
        assert page.get_by_role("link", name="smoke").count() >= 11
        page.get_by_role("link", name="05_curriculum").click()
        page.get_by_role("tab", name="05_curriculum.ipynb").wait_for()
        page.get_by_role("tab", name="start.ipynb").click()
        explorer(page, "map").get_by_text(" prompts").first.wait_for()


@pytest.fixture(scope="module")
def hostile(trained, complete):
    """Put a notebook beside the executed ones that shows hostile prompts in every way; trusted."""
    frame = pd.DataFrame({"prompt": EVIL, "difficulty": np.arange(len(EVIL)) / 10})
    pictures = np.zeros((len(EVIL), 3, 8, 8), np.uint8)
    with pd.option_context("display.max_colwidth", None):
        shown = frame.to_html()
    new = nbformat.v4
    outputs = [
        new.new_output("display_data", {"text/html": shown, "text/plain": ""}),
        new.new_output("stream", text="\n".join(EVIL)),
        new.new_output("execute_result", {"text/plain": str(EVIL)}),
    ]
    shown = analysis.explore_pairs(pictures, frame)._repr_mimebundle_()
    outputs.append(new.new_output("display_data", shown))
    cells = [
        new.new_markdown_cell("# Hostile"),
        new.new_code_cell("1", outputs=outputs, execution_count=1),
    ]
    path = trained / "runs/smoke/notebooks/99_hostile.ipynb"
    told = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    told["language_info"] = {"name": "python"}
    nbformat.write(new.new_notebook(cells=cells, metadata=told), path)
    NotebookNotary().sign(nbformat.read(path, as_version=4))
    return path


def expect_literal(page, place):
    """Every hostile prompt stands there as it is, once in a table, and has done nothing."""
    explorer(page, "pairs").get_by_text(EVIL[0]).first.wait_for()
    text = re.sub(r"\s+", " ", page.locator(place).first.inner_text())
    for prompt in EVIL:
        times = 1 if "\n" in prompt else 2  # a table shows where a line ends
        assert text.count(re.sub(r"\s+", " ", prompt).strip()) >= times, prompt
    assert "taken" not in page.title()
    assert page.locator("mjx-container, .MathJax").count() == 0


@pytest.fixture(scope="module")
def book(trained, complete, hostile):
    """Build the book of what was executed; return its folder."""
    command = [sys.executable, REPOSITORY / "book/build.py", "--profile", "smoke"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return trained / "runs/book"


class Page(HTMLParser):
    """What a page of the book leads to, and its images without a text."""

    def __init__(self, path):
        super().__init__()
        self.leads, self.mute = [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        where = attributes.get({"a": "href", "link": "href"}.get(tag, "src"))
        if where and tag in ("a", "link", "img", "script"):
            self.leads.append(where)
        if tag == "img" and len(attributes.get("alt") or "") < 10:
            self.mute.append(attributes)


def test_the_book_is_whole(book):
    paths = [path for path in book.rglob("*.html") if "_static" not in path.parts]
    pages = {path: Page(path) for path in paths}
    assert {*(f"{number:02}" for number in range(11)), "99"} == {
        path.name[:2] for path in pages if path.parent.name == "notebooks"
    }
    for path, page in pages.items():
        assert not page.mute, path
        for where in page.leads:
            part = urllib.parse.urlsplit(where)
            if part.scheme not in ("http", "https", "mailto", "data"):
                there = path.parent / urllib.parse.unquote(part.path) if part.path else path
                assert there.resolve().exists(), f"{path.name} leads to {where}"
    size = sum(path.stat().st_size for path in book.rglob("*") if path.is_file())
    assert size <= 40e6


def test_the_book_opens_from_a_file_and_can_be_searched(chromium, book, tmp_path):
    with watched(chromium) as page:
        page.goto((book / "index.html").as_uri())
        page.screenshot(path=tmp_path / "front.png")
        page.get_by_role("link", name=re.compile("Four readers|ensemble", re.I)).first.click()
        frame = explorer(page, "map")
        page.evaluate("document.documentElement.dataset.theme = 'dark'")
        colour = "getComputedStyle(document.querySelector('.rsd')).backgroundColor.match(/\\d+/)[0]"
        frame.locator(".rsd").first.wait_for()
        page.wait_for_timeout(500)
        assert int(frame.locator(".rsd").evaluate(f"() => {colour}")) < 80
        frame.get_by_label("search in prompts").fill("a")
        frame.get_by_role("button", name="select found").click()
        frame.get_by_text(" selected").first.wait_for()
        assert page.get_by_role("math").count() or page.locator("math").count()
        page.goto(f"{(book / 'search.html').as_uri()}?q=curriculum")
        page.locator("#search-results li").first.wait_for()
        page.goto((book / "notebooks/99_hostile.html").as_uri())
        expect_literal(page, "main")
        page.goto((book / "package/ensemble.html").as_uri())
        page.locator("dt", has_text="fit_predict").first.wait_for()
