"""Notebooks run headless at the smoke size, from anywhere; every failure is one line and a code."""

import json
import os
import subprocess
import sys

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY

from rsdlib import cli, data, experiment, files, predict
from rsdlib.errors import ConfigError, NotebookError

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


STAND_IN = """#!/bin/bash
# Stands for `rsd run NUMBER ...`: notes when it began and ended; 01 and 03 wait for each other.
number=$2
touch "$number.begun"
beside=$( [ "$number" = 01 ] && echo 03; [ "$number" = 03 ] && echo 01 )
while [ -n "$beside" ] && [ ! -e "$beside.begun" ]; do sleep 0.02; done
[ "$number" != "$FAILS" ] || { echo "rsd: $number failed"; exit 1; }
echo "$OMP_NUM_THREADS $*" > "$number.done"
"""
NUMBERS = [f"{number:02}" for number in range(10)]


@pytest.fixture
def house(tmp_path):
    """Return a checkout with the project's Makefile and a stand-in for ``rsd``."""
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/rsd").write_text(STAND_IN)
    (tmp_path / ".venv/bin/rsd").chmod(0o755)
    (tmp_path / ".venv/.ready").touch()
    return tmp_path


def make(house, *arguments, **environment):
    command = ["make", "notebooks", "-j2", "JOBS=2", "CORES=4", "PROFILE=smoke", *arguments]
    environment = {
        name: v for name, v in os.environ.items() if name != "OMP_NUM_THREADS"
    } | environment
    return subprocess.run(command, cwd=house, capture_output=True, text=True, env=environment)


def test_make_runs_side_by_side_what_does_not_wait(house):
    """05 reads 01's runs, 09 those of all; two at a time, each in its share of the cores."""
    done = make(house, "ARGUMENTS_05=-p seeds 3")
    assert done.returncode == 0, done.stdout + done.stderr
    times = {
        n: [(house / f"{n}.{end}").stat().st_mtime_ns for end in ("begun", "done")] for n in NUMBERS
    }
    for number, before in READS.items():
        assert times[number][0] >= max(times[earlier][1] for earlier in before)
    assert (house / "05.done").read_text() == "2 run 05 -p profile smoke -p seeds 3\n"


READS = {"01": ["00"], "05": ["01"], "06": ["01", "02", "03", "04"], "07": ["04"], "08": ["03"]}
READS["09"] = NUMBERS[:-1]


def test_make_stops_after_a_failure(house):
    done = make(house, FAILS="00")
    assert done.returncode == 2
    assert "00 | rsd: 00 failed" in done.stdout
    assert not list(house.glob("*.done"))


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
            ("run", "00", "-p", "profile", "smoke", "-p", "source", "no/such/folder"),
            3,
            "there is no folder",
        ),
        (
            ("run", "01", "-p", "profile", "smoke", "-p", "weight", "-1"),
            2,
            "weight = -1.0 is refused",
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
