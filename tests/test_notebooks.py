"""Notebooks run headless at the smoke size, from anywhere, and what they have trained is used."""

import json
import os
import subprocess
import sys

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import rsd

from rsdlib import data, experiment, files, predict


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
    "07_unet_swap": ("count", 2, "steps", 4, "places", "[1, 0.5]", "blends", "[0.5]"),
    "08_captioning": (),
    "09_paper_figures": (),
    "10_your_pictures": ("turns", 2, "seeds", 1),
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
        f"{number:02}" for number in range(11)
    }
    assert {path.name[:2] for path in folder.glob("*.json")} == {
        f"{number:02}" for number in (*range(1, 9), 10)
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
