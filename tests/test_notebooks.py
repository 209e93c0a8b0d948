"""Notebooks run headless at the smoke size, on their own, from anywhere; every way to fail ends in one line and a code."""

import json
import os
import subprocess
import sys
import time

import nbformat
import numpy as np
import pandas as pd
import pytest

from rsdlib import cli, recipes, runtime
from rsdlib.errors import ConfigError, NotebookError

RSD = [sys.executable, "-m", "rsdlib.cli"]


def alive_still(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def rsd(*arguments, cwd):
    return subprocess.run([*RSD, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, env={**os.environ})


@pytest.fixture(scope="module")
def trained(project, tmp_path_factory):
    """Run 01 with plain papermill from an unrelated folder, before 00 has ever run, and return the project's folder."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, "-m", "papermill", project / "notebooks/01_train_vit.ipynb", "out.ipynb", "-p", "profile", "smoke"]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (elsewhere / "out.ipynb").is_file()
    return project


def test_01_makes_what_it_needs_and_writes_its_results(trained):
    results = sorted((trained / "runs/smoke").glob("vit-*/results.json"))
    assert [path.parent.name.rsplit("-", 1)[0] for path in results] == ["vit-mlc", "vit-mlc-ours", "vit-vanilla"]
    for path in results:
        result = json.loads(path.read_text())
        assert -1 <= result["cosine"]["low"] <= result["cosine"]["mean"] <= result["cosine"]["high"] <= 1
        assert result["cosine"]["n"] == result["sizes"][2]["pairs"]
        assert [size["shared"] for size in result["sizes"]] == [0, 0, 0]
        assert set(result["baselines"]) == set(recipes.BASELINES)
        assert result["environment"]["precision"] in ("fp32", "bf16")
        assert {"seed", "environment", "epochs", "best_epoch", "source"} <= result.keys()
    assert all("gain over vit" in json.loads(path.read_text()) for path in results[:2])
    figures = {path.name for path in (trained / "runs/smoke").glob("figures-*/*.png")}
    assert figures >= {f"01_vit_{name}.png" for name in ("curves", "scores", "recall", "neighbours")}


def test_00_runs_after_it_from_the_same_caches(trained):
    before = {path: path.stat().st_mtime_ns for path in (trained / "data/cache").rglob("*.safetensors")}
    done = rsd("run", "00_prepare_data", "-p", "profile", "smoke", cwd=trained)
    assert done.returncode == 0, done.stderr
    after = {path: path.stat().st_mtime_ns for path in (trained / "data/cache").rglob("*.safetensors")}
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
        done = rsd("run", name, "-p", "profile", "smoke", *(word for pair in pairs for word in ("-p", *pair)), cwd=trained)
        assert done.returncode == 0, f"{name}: {done.stderr}"
    (folder,) = (trained / "runs/smoke").glob("figures-*")
    assert {path.name[:2] for path in folder.glob("*.png")} == {f"{number:02}" for number in range(10)}
    assert {path.name[:2] for path in folder.glob("*.json")} == {f"{number:02}" for number in range(1, 9)}
    done = rsd("tables", "--profile", "smoke", cwd=trained)
    assert done.stdout.count("| method |") == 5


def test_predict_reads_an_image(trained, tmp_path):
    from rsdlib import data, predict

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
    from rsdlib import predict

    folder = next((trained / "runs/smoke").glob("vit-mlc-*"))
    stored = runtime.load_arrays(folder / "predictions-test.safetensors")[0]["embedding"]
    items = pd.read_parquet(folder / "predictions-test.parquet")
    from rsdlib import data

    pairs = data.load_pairs(trained / "data/mini/diffusiondb").set_index("id")
    locators = pairs.loc[items["id"].iloc[:5], "image"].tolist()
    np.testing.assert_allclose(predict.Predictor.load(folder).predict(locators).embeddings, stored[:5], atol=1e-5)


# --- failures ---------------------------------------------------------------------------------------------------------------


def toy_notebook(folder, *cells):
    """Write a notebook with one parameter and the given code cells."""
    parameters = nbformat.v4.new_code_cell('profile: str = "smoke"  # size\nepochs: int = 1  # passes\nlr: float = 0.1  # rate')
    parameters.metadata["tags"] = ["parameters"]
    notebook = nbformat.v4.new_notebook(cells=[parameters, *map(nbformat.v4.new_code_cell, cells)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
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
begin, root, beside = time.time(), Path(os.environ["RSD_ROOT"]), {"01_b": "02_c", "02_c": "01_b"}.get("NAME")
(root / "NAME.begun").touch()
while beside and not (root / f"{beside}.begun").exists():  # for ever, if one waits for the other's end
    time.sleep(0.05)
(root / "NAME.log").write_text(f"{begin} {time.time()} {os.environ['OMP_NUM_THREADS']}")
"""


def test_reproduce_runs_side_by_side_what_does_not_wait(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "notebooks").mkdir()
    names = ["00_a", "01_b", "02_c", "05_d", "09_e"]
    for name in names:
        toy_notebook(tmp_path, STAMP.replace("NAME", name)).rename(tmp_path / "notebooks" / f"{name}.ipynb")
    done = rsd("reproduce", "--profile", "smoke", "--jobs", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {name: (tmp_path / f"{name}.log").read_text().split() for name in names}
    begin, end = ({name: float(values[i]) for name, values in found.items()} for i in (0, 1))
    assert end["00_a"] <= min(begin["01_b"], begin["02_c"])
    assert end["01_b"] <= begin["05_d"]
    assert max(end[name] for name in names[:-1]) <= begin["09_e"]
    cores = len(os.sched_getaffinity(0))
    assert {name: int(values[2]) for name, values in found.items()} == {
        name: cores if name[:2] in ("00", "09") else max(cores // 2, 1) for name in names
    }
    assert "[5/5] 09_e" in done.stdout
    assert "05 | done in" in done.stdout


@pytest.mark.parametrize(
    ("names", "name", "expected"),
    [
        ("00 01 05 09", "01", "00"),
        ("00 01 05 09", "05", "00 01"),
        ("00 01 05 09", "09", "00 01 05"),
        ("01 02", "02", ""),
        ("06 07 08", "07", "06"),  # both would train what 04 has not
        ("06 07 08", "08", "06"),  # 03 likewise
        ("05 08", "08", ""),
        ("01 01-Copy1 09 09-Copy1", "01-Copy1", "01"),
        ("01 01-Copy1 09 09-Copy1", "09-Copy1", "01 01-Copy1 09"),
    ],
)
def test_notebooks_wait_for_whose_runs_they_read(names, name, expected):
    assert cli._waits_for(name, names.split()) == set(expected.split())


def test_reproduce_ends_with_its_children(tmp_path):
    """SIGTERM ends the notebooks too; so does a kernel's death, even if what it leaves behind holds the pipe."""
    (tmp_path / "notebooks").mkdir()
    alive = "import os, pathlib\npathlib.Path(os.environ['RSD_ROOT'], 'pid').write_text(str(os.getpid()))\n"
    path = toy_notebook(tmp_path, alive + "import time; time.sleep(600)").rename(tmp_path / "notebooks" / "01_b.ipynb")
    with subprocess.Popen([*RSD, "reproduce", "--profile", "smoke"], cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        while not (tmp_path / "pid").exists():
            time.sleep(0.05)
        time.sleep(0.2)
        process.terminate()
        assert process.wait(30) == 143
    kernel = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not alive_still(kernel):
            break
        time.sleep(0.1)
    assert not alive_still(kernel)
    orphan = "import os, signal, subprocess; subprocess.Popen(['sleep', '60']); os.kill(os.getpid(), signal.SIGKILL)"
    toy_notebook(tmp_path, orphan).rename(path)
    clock = time.monotonic()
    assert rsd("reproduce", "--profile", "smoke", cwd=tmp_path).returncode == 138
    assert time.monotonic() - clock < 50


def test_reproduce_stops_after_a_failure(tmp_path):
    (tmp_path / "notebooks").mkdir()
    for name, cell in {"00_a": "pass", "01_b": "raise ValueError('broken on purpose')", "09_e": "pass"}.items():
        toy_notebook(tmp_path, cell).rename(tmp_path / "notebooks" / f"{name}.ipynb")
    done = rsd("reproduce", "--profile", "smoke", "--jobs", "2", cwd=tmp_path)
    assert done.returncode == 1
    assert "01 | rsd: 01_b failed in cell" in done.stdout
    assert "09_e" not in done.stdout
    assert done.stderr.splitlines()[-1] == "rsd: 01_b failed. See its lines above."


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
    assert cli.check_parameters(path, {"epochs": "3", "lr": "1", "profile": "3"}) == {"epochs": 3, "lr": 1.0, "profile": "3"}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("run", "01_train_vti"), 2, "Did you mean '01_train_vit'"),
        (("run", "01", "-p", "epohcs", "3"), 2, "Did you mean 'epochs'"),
        (("run", "01", "-p", "profile", "miny"), 2, "Did you mean 'mini'"),
        (("run", "01", "-p", "profile", "smoke", "-p", "seed", "1099511627776"), 2, "seed = 1099511627776 is out of range"),
        (("run", "00", "-p", "profile", "smoke", "-p", "source", "no/such/folder"), 3, "there is no folder"),
        (("run", "01", "-p", "profile", "smoke", "-p", "weight", "-1"), 2, "weight = -1.0 is out of range"),
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
