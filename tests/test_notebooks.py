"""Notebooks run headless at the smoke size, from anywhere; every failure is one line and a code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY

from rsdlib import cli, data, experiment, files, predict
from rsdlib.errors import ConfigError, NotebookError

pytestmark = pytest.mark.xdist_group("notebooks")  # they share one prepared project

RSD = [sys.executable, "-m", "rsdlib.cli"]


def rsd(*arguments, cwd):
    return subprocess.run(
        [*RSD, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, env={**os.environ}
    )


@pytest.fixture(scope="module")
def trained(project, tmp_path_factory):
    """Run 01 with plain papermill from an unrelated folder, before 00 has ever run."""
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
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (elsewhere / "out.ipynb").is_file()
    return project


def test_01_makes_what_it_needs_and_writes_its_results(trained):
    results = sorted((trained / "runs/smoke").glob("vit-*/results.json"))
    assert [path.parent.name.rsplit("-", 1)[0] for path in results] == [
        "vit-mlc",
        "vit-mlc-ours",
        "vit-vanilla",
    ]
    for path in results:
        result = json.loads(path.read_text())
        assert (
            -1
            <= result["cosine"]["low"]
            <= result["cosine"]["mean"]
            <= result["cosine"]["high"]
            <= 1
        )
        assert result["cosine"]["n"] == result["sizes"][2]["pairs"]
        assert [size["shared"] for size in result["sizes"]] == [0, 0, 0]
        assert set(result["baselines"]) == set(experiment.BASELINES)
        assert result["environment"]["precision"] in ("fp32", "bf16")
        assert {"seed", "environment", "epochs", "best_epoch", "source"} <= result.keys()
    assert all("gain over vit" in json.loads(path.read_text()) for path in results[:2])
    figures = {path.name for path in (trained / "runs/smoke").glob("figures-*/*.png")}
    assert figures >= {
        f"01_vit_{name}.png" for name in ("curves", "scores", "recall", "neighbours")
    }


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
    "06_ensemble_dakl": ("shifted", 4),
    "07_unet_swap": ("count", 2, "steps", 4, "places", "[1, 0.5]"),
    "08_captioning": (),
    "09_paper_figures": (),
}


@pytest.mark.timeout(600)
def test_the_others_run_after_them_and_store_what_the_tables_are_made_of(trained):
    for name, parameters in OTHERS.items():
        pairs = zip(parameters[::2], parameters[1::2], strict=True)
        done = rsd(
            "run",
            name,
            "-p",
            "profile",
            "smoke",
            *(word for pair in pairs for word in ("-p", *pair)),
            cwd=trained,
        )
        assert done.returncode == 0, f"{name}: {done.stderr}"
    (folder,) = (trained / "runs/smoke").glob("figures-*")
    assert {path.name[:2] for path in folder.glob("*.png")} == {
        f"{number:02}" for number in range(10)
    }
    assert {path.name[:2] for path in folder.glob("*.json")} == {
        f"{number:02}" for number in range(1, 9)
    }
    done = rsd("tables", "--profile", "smoke", cwd=trained)
    assert done.stdout.count("| method |") == 5


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


# --- failures -------------------------------------------------------------------------------------


def toy_notebook(folder, *cells):
    """Write a notebook with one parameter and the given code cells."""
    parameters = nbformat.v4.new_code_cell(
        'profile: str = "smoke"  # size\nepochs: int = 1  # passes\nlr: float = 0.1  # rate'
    )
    parameters.metadata["tags"] = ["parameters"]
    notebook = nbformat.v4.new_notebook(cells=[parameters, *map(nbformat.v4.new_code_cell, cells)])
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    path = folder / "toy.ipynb"
    nbformat.write(notebook, path)
    return path


@pytest.mark.parametrize(
    ("cell", "code", "words"),
    [
        ("raise ValueError('broken on purpose')", 1, "ValueError: broken on purpose"),
        ("import sys; sys.exit(0)", 1, "left before its end"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 138, "the kernel died"),
    ],
)
def test_failures_exit_with_one_clear_line(tmp_path, cell, code, words):
    path = toy_notebook(tmp_path, cell, "after = 1")
    done = rsd("run", path, "--output", tmp_path / "out.ipynb", cwd=tmp_path)
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("rsd:")]
    assert len(lines) == 1
    assert words in lines[0]


STAMP = """
import os, time
from pathlib import Path
begin, root, beside = time.time(), Path(os.environ["RSD_ROOT"]), "BESIDE"
(root / "NAME.begun").touch()
while beside and not (root / f"{beside}.begun").exists():  # for ever, if one waits for the other
    time.sleep(0.05)
(root / "NAME.log").write_text(f"{begin} {time.time()}")
"""
NUMBERS = [f"{number:02}" for number in range(10)]


@pytest.fixture
def house(tmp_path):
    """Return a checkout with the project's Makefile, this environment and ten toy notebooks."""
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name in ("rsd", "python"):
        (tmp_path / ".venv/bin" / name).symlink_to(Path(sys.executable).parent / name)
    (tmp_path / ".venv/.ready").touch()
    (tmp_path / "notebooks").mkdir()
    return tmp_path


def put(house, number, cell):
    toy_notebook(house, cell).rename(house / "notebooks" / f"{number}_toy.ipynb")


def make(house, *arguments):
    command = ["make", "notebooks", "-j2", "JOBS=2", "PROFILE=smoke", *arguments]
    environment = {**os.environ, "RSD_ROOT": str(house)}
    return subprocess.run(command, cwd=house, capture_output=True, text=True, env=environment)


def test_make_runs_side_by_side_what_does_not_wait(house):
    """01 and 03 each wait for the other to begin; 05 reads 01's runs, 09 those of all."""
    for number in NUMBERS:
        beside = {"01": "03", "03": "01"}.get(number, "")
        put(house, number, STAMP.replace("NAME", number).replace("BESIDE", beside))
    done = make(house)
    assert done.returncode == 0, done.stdout + done.stderr
    times = {n: [float(t) for t in (house / f"{n}.log").read_text().split()] for n in NUMBERS}
    for number, before in READS.items():
        assert times[number][0] >= max(times[earlier][1] for earlier in before)
    assert "05 | done in" in done.stdout


READS = {"01": ["00"], "05": ["01"], "06": ["01", "02", "03", "04"], "07": ["04"], "08": ["03"]}
READS["09"] = NUMBERS[:-1]


def test_make_stops_after_a_failure_with_its_code(house):
    for number in NUMBERS:
        put(house, number, "raise ValueError('broken on purpose')" if number == "00" else "pass")
    done = make(house)
    assert done.returncode == 2
    assert "00 | rsd: 00_toy failed in cell" in done.stdout + done.stderr
    assert "09 |" not in done.stdout


def test_reproduce_runs_in_order_and_stops_after_a_failure(tmp_path):
    (tmp_path / "notebooks").mkdir()
    cells = {"00_a": "pass", "01_b": "raise ValueError('broken on purpose')", "09_e": "pass"}
    for name, cell in cells.items():
        toy_notebook(tmp_path, cell).rename(tmp_path / "notebooks" / f"{name}.ipynb")
    done = rsd("reproduce", "--profile", "smoke", cwd=tmp_path)
    assert done.returncode == 1
    assert "[2/3] 01_b" in done.stdout
    assert "09_e" not in done.stdout
    assert "01_b failed in cell" in done.stderr.splitlines()[-1]
    assert rsd("reproduce", "--profile", "smoke", "--from", "09", cwd=tmp_path).returncode == 0


def test_a_path_means_that_very_file(project, tmp_path):
    """Also where an edited copy is called like one of the project's notebooks."""
    mine = toy_notebook(tmp_path, "pass").rename(tmp_path / "01_train_vit.ipynb")
    assert cli.find_notebook(str(mine)) == mine
    assert cli.find_notebook("01").parent.name == "notebooks"
    (tmp_path / "notes.ipynb").write_text("not JSON")
    with pytest.raises(ConfigError, match="is not a notebook"):
        cli.run_notebook(tmp_path / "notes.ipynb", {})


def test_slow_cell_is_stopped(tmp_path):
    path = toy_notebook(tmp_path, "import time; time.sleep(60)")
    with pytest.raises(NotebookError, match="longer than 1 s"):
        cli.run_notebook(path, {}, tmp_path / "out.ipynb", timeout=1)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"epohcs": "3"}, "no parameter 'epohcs'. Did you mean 'epochs'"),
        ({"epochs": "three"}, "'three' is not of type int"),
        ({"epochs": "2.5"}, "not of type int"),
        ({"lr": "fast"}, "not of type float"),
    ],
)
def test_wrong_parameters_stop_before_the_kernel_starts(tmp_path, parameters, message):
    path = toy_notebook(tmp_path, "pass")
    with pytest.raises(ConfigError, match=message):
        cli.run_notebook(path, parameters, tmp_path / "out.ipynb")
    assert not (tmp_path / "out.ipynb").exists()


def test_right_parameters_get_their_types(tmp_path):
    path = toy_notebook(tmp_path, "pass")
    assert cli.check_parameters(path, {"epochs": "3", "lr": "1", "profile": "3"}) == {
        "epochs": 3,
        "lr": 1.0,
        "profile": "3",
    }


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("run", "01_train_vti"), 2, "Did you mean '01_train_vit'"),
        (("run", "01", "-p", "epohcs", "3"), 2, "Did you mean 'epochs'"),
        (("run", "01", "-p", "profile", "miny"), 2, "Did you mean 'mini'"),
        (
            ("run", "01", "-p", "profile", "smoke", "-p", "seed", "1099511627776"),
            2,
            "seed = 1099511627776 is out of range",
        ),
        (
            ("run", "00", "-p", "profile", "smoke", "-p", "source", "no/such/folder"),
            3,
            "there is no folder",
        ),
        (
            ("run", "01", "-p", "profile", "smoke", "-p", "weight", "-1"),
            2,
            "weight = -1.0 is out of range",
        ),
        (("predict",), 2, "no image"),
        (("predict", "missing.png"), 2, "no file missing.png"),
        (("reproduce", "--from", "77"), 2, "no notebook '77'"),
    ],
)
def test_usage_errors_are_one_line(project, tmp_path, arguments, code, words):
    done = rsd(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("rsd:")]
    assert len(lines) == 1
    assert words in lines[0]


def test_predict_without_a_run_says_what_to_do(tmp_path):
    image = tmp_path / "x.png"
    from PIL import Image

    Image.new("RGB", (8, 8)).save(image)
    done = rsd("predict", image, cwd=tmp_path)
    assert done.returncode == 3
    assert "Run: rsd run 01_train_vit" in done.stderr
