"""Runs that several processes train, started from a notebook or by hand."""

import shutil
import subprocess
import sys
import time

import filelock
import nbformat
import numpy as np
import psutil
import pytest
import torch
from conftest import rsd

from rsdlib import config, experiment, training
from rsdlib.errors import CheckpointError, ConfigError, RsdError

SMOKE = config.profile("smoke")
HOW = {"precision": "fp32", "device": "cpu", "epochs": 1}
NORMS = SMOKE.with_backbone("clip-mlp", options={"mlp": [64, 64], "dropout": 0.0})


@pytest.fixture(scope="module")
def prepared(project):
    return experiment.prepare(SMOKE.data)


def trial(prepared, backbone="vit", profile=SMOKE, **options):
    return experiment.plan(profile, backbone, prepared, **{"weight": 0.1, **HOW, **options})


def by_one_and_by_two(prepared, *about, **options):
    """Return a run trained by one process, and the same by two."""
    folder = trial(prepared, *about, **options).run()
    one = training.load_run(folder)
    shutil.rmtree(folder)
    return one, training.load_run(trial(prepared, *about, processes=2, **options).run())


def assert_same(one, two, columns=("loss", "train_similarity", "val_similarity", "val_loss")):
    for column in columns:
        np.testing.assert_allclose(two.metrics[column], one.metrics[column], atol=1e-5)
    np.testing.assert_allclose(two.difficulty, one.difficulty, atol=1e-5)


def test_two_processes_started_here_train_the_run_of_one(prepared, capfd):
    """A curriculum with callbacks, so that those come along."""
    one, two = by_one_and_by_two(prepared, curriculum="cbs")
    assert_same(one, two)
    assert "epoch 1/1" in capfd.readouterr().out
    assert two.folder == one.folder


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["unet", "clip-mlp", "blip"])
def test_two_processes_train_any_backbone_like_one(prepared, backbone):
    profile = NORMS if backbone == "clip-mlp" else SMOKE
    one, two = by_one_and_by_two(prepared, backbone, profile)
    if backbone == "clip-mlp":  # biases below a BatchNorm follow rounding, and so do its averages
        assert_same(one, two, ("loss", "train_similarity"))
    else:
        assert_same(one, two)


def test_what_only_this_process_knows_is_refused(prepared):
    def own(model, batch):
        return torch.zeros(()), torch.zeros(len(batch["input"]))

    with pytest.raises(ConfigError, match="processes=1"):
        trial(prepared, objective=own, processes=2).run()


def test_other_images_than_planned_are_refused(prepared, monkeypatch):
    planned = trial(prepared, seed=7)
    planned.hand_over()
    again = experiment.planned(planned.folder)
    assert (again.folder, again.config, again.recipe) == (
        planned.folder,
        planned.config,
        planned.recipe,
    )
    for name, weight in planned.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], weight)
    changed = config.replace(planned.recipe, images="others")
    monkeypatch.setattr(experiment.Recipe, "load", lambda folder: changed)
    with pytest.raises(CheckpointError, match="images"):
        experiment.planned(planned.folder)


def test_a_failure_says_what_the_processes_said(tmp_path):
    with pytest.raises(RsdError, match=r"2 processes could not train .* cannot be read"):
        training.launch(tmp_path, 2)


@pytest.mark.slow
def test_killed_processes_are_taken_up_by_two_and_by_one(prepared):
    expected, _ = by_one_and_by_two(prepared, epochs=4, save_every=1)
    folder = expected.folder
    for processes in (2, 1):
        shutil.rmtree(folder)
        planned = trial(prepared, epochs=4, processes=2, save_every=1)
        planned.hand_over()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node=2", "-m", "rsdlib.cli", "train", str(folder)]
        child = subprocess.Popen(command)
        while not (folder / "checkpoint.safetensors").exists():
            time.sleep(0.02)
        for process in (child, *psutil.Process(child.pid).children(recursive=True)):
            process.kill()
        child.wait()
        with filelock.FileLock(folder / ".lock", timeout=60):
            assert not training.is_finished(folder)
        assert_same(
            expected,
            training.load_run(trial(prepared, epochs=4, processes=processes, save_every=1).run()),
        )


@pytest.mark.slow
def test_a_notebook_trains_by_two_processes(project):
    arguments = ["-p", "profile", "smoke", "-p", "epochs", "1"]
    done = rsd("run", "02", *arguments, "-p", "processes", "2", cwd=project)
    assert done.returncode == 0, done.stderr[-2000:]
    (output,) = (project / "runs" / "smoke" / "notebooks").glob("02*.ipynb")
    text = str(nbformat.read(output, 4))
    assert "epoch 1/1" in text


@pytest.mark.slow
def test_children_end_with_the_process_that_started_them(prepared, tmp_path):
    planned = trial(prepared, epochs=200, seed=9)
    planned.hand_over()
    start = f"from rsdlib import training; training.launch({str(planned.folder)!r}, 2)"
    with subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.DEVNULL) as parent:
        while not (planned.folder / "checkpoint.safetensors").exists():
            time.sleep(0.1)
        parent.kill()
    deadline = time.monotonic() + 60
    while str(planned.folder) in running():
        assert time.monotonic() < deadline
        time.sleep(1)


def running():
    return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
