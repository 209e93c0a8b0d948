"""The loop: same seed, same curve; resumed = uninterrupted, killed anywhere; two processes = one; the schedule; refusals."""

import json
import math
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import toy

from rsdlib import runtime, training
from rsdlib.config import TrainConfig, replace
from rsdlib.errors import BadValueError, CacheError, CheckpointError, DeviceError, RsdError, RunBusyError
from rsdlib.losses import JointObjective

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a finished, never interrupted run."""
    return toy.fit(tmp_path_factory.mktemp("whole") / "run")


class Stop(Exception):
    """Raised in the middle of a run."""


class StopAt(training.Callback):
    def __init__(self, step):
        self.step = step

    def before_step(self, state):
        if state.step == self.step:
            raise Stop


# --- the run folder ---------------------------------------------------------------------------------------------------------


def test_run_folder_is_complete_and_opens(whole):
    names = {path.name for path in whole.iterdir()}
    wanted = {"config.json", "run.json", "metrics.jsonl", "checkpoint.safetensors", "model.safetensors", "difficulty.parquet"}
    assert wanted <= names
    run = training.load_run(whole)
    assert run.config == toy.CONFIG
    assert run.metrics["step"].iloc[-1] == 3 * math.ceil(50 / 8)
    assert json.loads((whole / "run.json").read_text())["threads"] == torch.get_num_threads()


def test_same_seed_same_bytes_and_another_seed_not(whole, tmp_path):
    assert toy.fingerprint(toy.fit(tmp_path / "again")) == toy.fingerprint(whole)
    assert toy.fingerprint(toy.fit(tmp_path / "other", replace(toy.CONFIG, seed=1))) != toy.fingerprint(whole)


def test_training_learns(whole):
    epochs = training.load_run(whole).metrics.dropna(subset="val_similarity")
    assert epochs["train_similarity"].iloc[-1] > epochs["train_similarity"].iloc[0]


def test_best_epoch_is_kept_and_loaded(tmp_path):
    seen = {}

    class Keep(training.Callback):
        def after_epoch(self, state, record):
            seen[record["val_similarity"]] = {k: v.clone() for k, v in state.model.state_dict().items()}

    model = toy.model()
    training.fit(model, toy.data(), toy.CONFIG, tmp_path, objective=JointObjective(), callbacks=[Keep()])
    best = seen[max(seen)]
    assert all(torch.equal(best[name], value) for name, value in model.state_dict().items())


def test_finished_run_is_returned_without_training(whole):
    before = (whole / "checkpoint.safetensors").stat().st_mtime_ns
    toy.fit(whole, callbacks=[StopAt(0)])
    assert (whole / "checkpoint.safetensors").stat().st_mtime_ns == before


def test_model_comes_back_as_it_went(tmp_path):
    model = toy.model()
    forward = model.forward
    training.fit(model, toy.data(), replace(toy.CONFIG, precision="bf16"), tmp_path, objective=JointObjective())
    assert model.forward == forward
    assert all(p.dtype == torch.float32 for p in model.parameters())


# --- difficulty -------------------------------------------------------------------------------------------------------------


def test_difficulty_holds_every_training_sample_of_every_epoch(whole):
    table = training.load_run(whole).difficulty
    assert table["row"].tolist() == list(range(50))
    assert list(table.columns) == ["row", "epoch_1", "epoch_2", "epoch_3"]
    assert table.notna().all(axis=None)


def test_difficulty_is_the_similarity_of_the_training_pass_itself(tmp_path):
    """With one batch an epoch and no dropout, the first epoch's similarities are those of the starting weights."""
    data, model = toy.data(), toy.model(dropout=0.0)
    with torch.no_grad():
        embedding, _ = model(data.batch(data.train)["input"])
    expected = torch.nn.functional.cosine_similarity(embedding, torch.from_numpy(data.targets[data.train]))
    config = replace(toy.CONFIG, batch_size=50, epochs=1)
    folder = training.fit(model, data, config, tmp_path, objective=JointObjective())
    np.testing.assert_allclose(training.load_run(folder).difficulty["epoch_1"], expected, atol=1e-6)


# --- resume -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 4, 6, 7, 8, 20])  # after a step, a save, a log line, an epoch; before the end
def test_stopped_at_any_step_and_resumed_is_the_whole_run(whole, tmp_path, step):
    with pytest.raises(Stop):
        toy.fit(tmp_path, callbacks=[StopAt(step)])
    toy.fit(tmp_path)
    assert toy.fingerprint(tmp_path) == toy.fingerprint(whole)


@pytest.mark.parametrize(("mode", "count"), [("writes", 0), ("random", 6)])
def test_killed_and_resumed_is_the_whole_run(tmp_path, mode, count):
    """SIGKILL before and after each file takes its place, and at random moments."""
    done = subprocess.run([sys.executable, "kills.py", tmp_path, mode, str(count)], cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kills"] >= (count or 40)


@pytest.mark.slow
def test_killed_at_many_random_moments(tmp_path):
    done = subprocess.run([sys.executable, "kills.py", tmp_path, "random", "200"], cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_damaged_checkpoint_is_refused_by_name(tmp_path):
    with pytest.raises(Stop):
        toy.fit(tmp_path, callbacks=[StopAt(9)])
    path = tmp_path / "checkpoint.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheError, match=r"checkpoint\.safetensors"):
        toy.fit(tmp_path)


def test_other_settings_in_the_same_folder_are_refused_by_name(whole):
    with pytest.raises(CheckpointError, match=r"train\.lr"):
        toy.fit(whole, replace(toy.CONFIG, lr=1e-3))


def test_what_does_not_make_another_run_may_change_on_resume(whole, tmp_path):
    with pytest.raises(Stop):
        toy.fit(tmp_path, callbacks=[StopAt(9)], dropout=0.0)
    toy.fit(tmp_path, replace(toy.CONFIG, micro_batches=2, save_every=5, log_every=7), dropout=0.0)
    expected = training.load_run(toy.fit(tmp_path / "whole", dropout=0.0))
    np.testing.assert_allclose(training.load_run(tmp_path).difficulty, expected.difficulty, atol=1e-4)


@pytest.mark.parametrize("words", [["cat", "fox"], ["fox", "dog"], ["fox"]])
def test_another_vocabulary_is_refused(tmp_path, words):
    """Size, order or one word: the logits would mean something else."""
    with pytest.raises(Stop):
        toy.fit(tmp_path, callbacks=[StopAt(9)], recipe={"words": ["fox", "cat"]})
    with pytest.raises(CheckpointError, match=r"recipe\.words"):
        toy.fit(tmp_path, recipe={"words": words})


def test_too_little_memory_is_named_and_can_be_resumed(tmp_path):
    def greedy(model, batch):
        if len(batch["input"]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return JointObjective()(model, batch)

    def fit(**changes):
        config = replace(toy.CONFIG, **changes)
        return training.fit(toy.model(), toy.data(), config, tmp_path, objective=greedy)

    with pytest.raises(DeviceError, match="micro_batches=2"):
        fit()
    assert training.load_run(fit(micro_batches=2, batch_size=8)).difficulty.notna().all(axis=None)


def test_second_writer_is_refused(tmp_path):
    class Intruder(training.Callback):
        def before_step(self, state):
            with pytest.raises(RunBusyError, match="is training in"):
                toy.fit(tmp_path)
            raise Stop

    with pytest.raises(Stop):
        toy.fit(tmp_path, callbacks=[Intruder()])


def test_finished_run_is_read_without_its_lock(tmp_path):
    """Notebooks that run side by side read each other's runs."""
    folder = toy.fit(tmp_path)
    with training._locked(folder):
        assert toy.fit(tmp_path) == folder


# --- batches and processes --------------------------------------------------------------------------------------------------


def losses(folder):
    return training.load_run(folder).metrics["loss"].to_numpy()


def test_micro_batches_give_the_same_run(tmp_path):
    one = losses(toy.fit(tmp_path / "1", dropout=0.0))
    for parts in (2, 3, 8):
        several = losses(toy.fit(tmp_path / str(parts), replace(toy.CONFIG, micro_batches=parts), dropout=0.0))
        np.testing.assert_allclose(several, one, atol=1e-5)


def test_two_processes_give_the_losses_of_one(tmp_path):
    one = training.load_run(toy.fit(tmp_path / "1", dropout=0.0))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "toy.py", str(tmp_path / "2")]
    done = subprocess.run([sys.executable, *command], cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    two = training.load_run(tmp_path / "2")
    for column in ("loss", "train_similarity", "val_similarity", "val_loss"):
        np.testing.assert_allclose(two.metrics[column], one.metrics[column], atol=1e-5)
    np.testing.assert_allclose(two.difficulty, one.difficulty, atol=1e-5)


def test_answers_of_a_batch_cost_under_a_tenth_of_a_millisecond():
    data = toy.data(n=20_000, words=1000, dim=384)
    rows = np.random.default_rng(0).permutation(len(data))
    times = []
    for start in range(0, 64 * 200, 64):
        clock = time.perf_counter()
        data.answers(rows[start : start + 64])
        times.append(time.perf_counter() - clock)
    assert np.median(times) < 1e-4


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("targets", np.zeros((60, 12), np.float16), "float16"),
        ("targets", np.zeros((60, 12), np.float32), "target 0 is zero"),
        ("targets", np.full((60, 12), np.nan, np.float32), "not finite"),
        ("targets", np.ones((59, 12), np.float32), "labels of shape|rows reach"),
        ("labels", np.zeros((60, 2), np.uint8), "not 20 bits for 60 targets"),
        ("val", np.array([60]), "rows reach from 0 to 60"),
    ],
)
def test_arrays_that_do_not_fit_each_other_are_refused(field, value, message):
    values = {name: getattr(toy.data(), name) for name in ("inputs", "targets", "labels", "vocabulary_size", "train", "val")}
    with pytest.raises(BadValueError, match=message):
        training.PairData(**{**values, field: value})


def test_labels_survive_packing():
    labels = np.random.default_rng(0).random((7, 13)) < 0.5
    data = training.PairData(None, np.ones((7, 3), np.float32), training.pack(labels), 13, np.arange(7), np.arange(0))
    assert np.array_equal(data.answers(np.arange(7))["labels"].numpy(), labels)


# --- plan and schedule ------------------------------------------------------------------------------------------------------


def test_every_row_is_read_once_an_epoch_in_another_order_each_time():
    plan = training.Plan([training.Stage(np.arange(50), 3)], toy.CONFIG)
    epochs = [np.concatenate([plan.rows(step) for step in range(plan.starts[e], plan.starts[e + 1])]) for e in range(3)]
    assert all(np.array_equal(np.sort(rows), np.arange(50)) for rows in epochs)
    assert not np.array_equal(epochs[0], epochs[1])


def test_schedule_is_as_long_as_growing_stages_and_never_rises_after_the_warm_up():
    """Fault D7 of the original: the cosine's length was taken from the first, smallest stage, and the rate climbed back."""
    stages = [training.Stage(np.arange(n), 2) for n in (16, 32, 50)]
    plan = training.Plan(stages, TrainConfig(batch_size=8, lr=1e-3, lr_min=1e-5, warmup=0.1))
    assert plan.total == 2 * (2 + 4 + 7)
    factors = [plan.lr_factor(step) for step in range(plan.total)]
    top = int(np.argmax(factors))
    assert top <= math.ceil(0.1 * plan.total)
    assert all(a >= b for a, b in pairwise(factors[top:]))
    assert factors[-1] < 0.05
    assert plan.lr_factor(plan.total) == pytest.approx(1e-5 / 1e-3)

    original = [(1 + math.cos(math.pi * step / (2 * 2))) / 2 for step in range(plan.total)]  # T_max from stage 1
    assert any(b > a for a, b in pairwise(original))


def test_the_optimizer_gets_the_planned_rate_decay_and_clipped_gradients(tmp_path):
    config = replace(toy.CONFIG, clip=1e-3)
    rates, norms = [], []

    class Watch(training.Callback):
        def before_step(self, state):
            decays = {group["weight_decay"]: {p.ndim for p in group["params"]} for group in state.optimizer.param_groups}
            assert decays == {0.01: {2}, 0.0: {1}}
            state.optimizer.register_step_pre_hook(self.at_step) if not state.step else None

        def at_step(self, optimizer, *_):
            rates.append({group["lr"] for group in optimizer.param_groups})
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
            norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))

    toy.fit(tmp_path, config, callbacks=[Watch()])
    plan = training.Plan([training.Stage(np.arange(50), 3)], config)
    assert rates == [{config.lr * plan.lr_factor(step)} for step in range(plan.total)]
    assert len(norms) == plan.total
    assert max(norms) <= 1.01e-3


def test_best_epoch_is_judged_on_the_validation_rows(tmp_path):
    data, model = toy.data(), toy.model()
    folder = training.fit(model, data, toy.CONFIG, tmp_path, objective=JointObjective())
    with training.evaluating(model):
        embedding, _ = model(data.batch(data.val)["input"])
    by_hand = torch.nn.functional.cosine_similarity(embedding, torch.from_numpy(data.targets[data.val])).mean()
    assert training.load_run(folder).metrics["val_similarity"].max() == pytest.approx(float(by_hand), abs=1e-6)


def test_stages_feed_their_own_rows(tmp_path):
    stages = [training.Stage(np.arange(20), 1), training.Stage(np.arange(50), 2)]
    table = training.load_run(toy.fit(tmp_path, stages=stages)).difficulty
    assert table["epoch_1"].notna().sum() == 20
    assert table["epoch_3"].notna().all()


@pytest.mark.parametrize("batch_size", [7, 49])
def test_a_last_batch_of_one_sample_joins_the_one_before(tmp_path, batch_size):
    """BatchNorm, as in the original's perceptron, cannot train on a single sample."""
    model = toy.model()
    model.backbone.body.insert(2, torch.nn.BatchNorm1d(16))
    config = replace(toy.CONFIG, batch_size=batch_size, epochs=1)
    folder = training.fit(model, toy.data(), config, tmp_path, objective=JointObjective())
    assert training.load_run(folder).difficulty["epoch_1"].notna().all()
    plan = training.Plan([training.Stage(np.arange(50), 1)], config)
    assert min(len(plan.rows(step)) for step in range(plan.total)) > 1


# --- refusals ---------------------------------------------------------------------------------------------------------------


def test_empty_split_is_refused(tmp_path):
    data = toy.data()
    for hole in ("train", "val"):
        values = {name: getattr(data, name) for name in ("inputs", "targets", "labels", "vocabulary_size", "train", "val")}
        empty = training.PairData(**{**values, hole: np.arange(0)})
        with pytest.raises(BadValueError):
            training.fit(toy.model(), empty, toy.CONFIG, tmp_path / hole, objective=JointObjective())


def test_loss_that_is_not_finite_stops_the_run_and_leaves_the_checkpoint(tmp_path):
    class Poison(training.Callback):
        def before_step(self, state):
            if state.step == 9:
                state.model.embedding_head.weight.data.fill_(math.nan)

    with pytest.raises(RsdError, match="not finite between steps"):
        toy.fit(tmp_path, callbacks=[Poison()])
    arrays, meta = runtime.load_arrays(tmp_path / "checkpoint.safetensors")
    assert meta["step"] == 8
    assert all(np.isfinite(value).all() for name, value in arrays.items() if name.startswith("model."))


def test_weights_of_another_model_are_refused_with_the_tensors_named(whole):
    with pytest.raises(CheckpointError, match=r"of another shape .*vocabulary_head"):
        training.load_weights(toy.model(words=21), whole / "model.safetensors")
    bare = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"missing .*bias.*unexpected .*embedding_head"):
        training.load_weights(bare, whole / "model.safetensors")


def test_unfinished_folder_is_no_run(tmp_path):
    with pytest.raises(CacheError, match="no finished run"):
        training.load_run(tmp_path)


def test_metrics_are_whole_lines(whole):
    lines = (whole / "metrics.jsonl").read_text().splitlines()
    assert pd.DataFrame([json.loads(line) for line in lines])["step"].is_monotonic_increasing
