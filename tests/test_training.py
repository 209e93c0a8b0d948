"""The loop: same seed, same curve; resumed is whole, killed anywhere; split anyhow; refusals."""

import contextlib
import gc
import itertools
import json
import math
import multiprocessing
import random
import shutil
import subprocess
import sys
import weakref
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
import toy
import toy_blip
from torch.utils._python_dispatch import TorchDispatchMode

from rsdlib import files, runtime, training
from rsdlib.config import TrainConfig, replace
from rsdlib.data import PairStore, evaluating, pack
from rsdlib.errors import (
    BadValueError,
    CacheError,
    CheckpointError,
    DeviceError,
    RsdError,
    RunBusyError,
)
from rsdlib.models import JointObjective
from rsdlib.training import loop, runs

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a finished, never interrupted run."""
    return toy.fit(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Return a finished run without dropout, whose numbers no split of a batch may change."""
    return training.load_run(toy.fit(tmp_path_factory.mktemp("one") / "run", dropout=0.0))


@pytest.fixture(scope="module")
def two(tmp_path_factory, one):
    """Return the folder of what two processes trained: see the end of `toy`."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.raises(toy.Stop):
        toy.fit(folder / "taken over", dropout=0.0, callbacks=[toy.StopAt(9)])
    by_processes(2, "toy.py", folder)
    return folder


def by_processes(count, script, *arguments):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    python(*launcher, script, *arguments)


def python(*arguments):
    """Run Python in the tests' folder; return what it printed."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def losses(folder):
    return training.load_run(folder).metrics["loss"].to_numpy()


def assert_same_run(folder, expected, atol=1e-5):
    """Compare every number of a run with another's, but the clock's."""
    run = training.load_run(folder)
    for column in expected.metrics.columns.drop("steps_per_second"):
        found = run.metrics[column]
        np.testing.assert_allclose(found, expected.metrics[column], atol=atol, err_msg=column)
    np.testing.assert_allclose(run.difficulty, expected.difficulty, atol=atol)


# --- the run folder -------------------------------------------------------------------------------


def test_run_folder_is_complete_and_opens(whole):
    names = {path.name for path in whole.iterdir()}
    wanted = {"config.json", "run.json", "metrics.jsonl", "difficulty.parquet"}
    assert wanted | {"checkpoint.safetensors", "model.safetensors"} <= names
    run = training.load_run(whole)
    assert run.config == toy.CONFIG
    assert run.metrics["step"].iloc[-1] == 3 * math.ceil(50 / 8)
    assert json.loads((whole / "run.json").read_text())["threads"] == torch.get_num_threads()


def test_same_seed_same_bytes_and_another_seed_not(whole, tmp_path):
    expected = toy.fingerprint(whole)
    assert toy.fingerprint(toy.fit(tmp_path / "again")) == expected
    other = toy.fit(tmp_path / "other", replace(toy.CONFIG, seed=1))
    assert toy.fingerprint(other) != expected


def test_training_learns(whole):
    epochs = training.load_run(whole).metrics.dropna(subset="val_similarity")
    assert epochs["train_similarity"].iloc[-1] > epochs["train_similarity"].iloc[0]


def test_best_epoch_is_kept_and_loaded(tmp_path):
    kept = {}

    class Keep(training.Callback):
        def after_epoch(self, state, record):
            weights = {name: value.clone() for name, value in state.model.state_dict().items()}
            kept[record["val_similarity"]] = weights

    model = toy.model()
    toy.train(model, tmp_path, callbacks=[Keep()])
    best = kept[max(kept)]
    assert all(torch.equal(best[name], value) for name, value in model.state_dict().items())


def test_finished_run_is_returned_without_training(whole):
    before = (whole / "checkpoint.safetensors").stat().st_mtime_ns
    toy.fit(whole, callbacks=[toy.StopAt(0)])
    assert (whole / "checkpoint.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("stop", [None, 9])
def test_model_comes_back_as_it_went(tmp_path, stop):
    """Whatever ends the run: else a model that is trained on would answer in bfloat16 for ever."""
    model, stopping, callbacks = toy.model(), contextlib.nullcontext(), []
    if stop is not None:
        stopping, callbacks = pytest.raises(toy.Stop), [toy.StopAt(stop)]
    forward = model.forward
    with stopping:
        toy.train(model, tmp_path, replace(toy.CONFIG, precision="bf16"), callbacks=callbacks)
    assert model.forward == forward
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("finished", [True, False])
def test_folder_of_another_layout_is_refused_by_name(whole, tmp_path, finished):
    """The first layout had no number: its ``config.json`` says nothing of a layout."""
    folder = shutil.copytree(whole, tmp_path / "old run")
    stored = files.read_json(folder / "config.json")
    assert stored.pop("layout") == 2
    files.write_json(folder / "config.json", stored)
    if not finished:
        (folder / "difficulty.parquet").unlink()
    refusal = pytest.raises(CheckpointError, match="old run has layout 1 of a run folder, not 2")
    with refusal:
        toy.fit(folder)
    if finished:
        with refusal:
            training.load_run(folder)


# --- the caller's random state --------------------------------------------------------------------


def random_states():
    numpys = np.random.get_state()[1]  # noqa: NPY002 the state that nobody should touch
    keys = {"torch": torch.get_rng_state().tolist(), "numpy": numpys.tolist()}
    return {name: files.digest(key) for name, key in {**keys, "python": random.getstate()}.items()}


@pytest.mark.parametrize("stop", [None, 0, 9])
@pytest.mark.parametrize("workers", [None, 1])
def test_the_callers_random_state_is_left_as_it_was(tmp_path, stop, workers):
    """Fault 7: every step seeded the generator that the caller draws from."""
    model, stopping, callbacks = toy.model(), contextlib.nullcontext(), []
    if stop is not None:
        stopping, callbacks = pytest.raises(toy.Stop), [toy.StopAt(stop)]
    torch.manual_seed(123)
    before = random_states()
    with stopping:
        toy.train(model, tmp_path, replace(toy.CONFIG, workers=workers), callbacks=callbacks)
    assert random_states() == before


def test_the_callers_random_state_changes_nothing(whole, tmp_path):
    """Dropout, order and readers are functions of the seed and the step."""
    model = toy.model()
    torch.manual_seed(123)
    random.seed(123)
    assert toy.fingerprint(toy.train(model, tmp_path)) == toy.fingerprint(whole)


# --- difficulty -----------------------------------------------------------------------------------


def test_difficulty_holds_every_training_sample_of_every_epoch(whole):
    table = training.load_run(whole).difficulty
    assert table["row"].tolist() == list(range(50))
    assert list(table.columns) == ["row", "epoch_1", "epoch_2", "epoch_3"]
    assert table.notna().all(axis=None)


def test_difficulty_is_the_similarity_of_the_training_pass_itself(tmp_path):
    """With one batch an epoch and no dropout, the first epoch's are those of the first weights."""
    data, model = toy.data(), toy.model(dropout=0.0)
    with torch.no_grad():
        embedding, _ = model(data.batch(data.train)["input"])
    target = torch.from_numpy(data.targets[data.train])
    expected = torch.nn.functional.cosine_similarity(embedding, target)
    folder = toy.train(model, tmp_path, replace(toy.CONFIG, batch_size=50, epochs=1))
    np.testing.assert_allclose(training.load_run(folder).difficulty["epoch_1"], expected, atol=1e-6)


class WithoutFloat64(TorchDispatchMode):
    """As an Apple GPU, refuses whatever makes float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float64:
            raise TypeError(f"{function}: the MPS framework doesn't support float64")
        return made


def test_training_needs_no_float64_on_an_apple_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "exact", lambda on: torch.float32)
    with WithoutFloat64():
        toy.fit(tmp_path)
    assert runs.is_finished(tmp_path)


# --- resume ---------------------------------------------------------------------------------------


# After a step, a save, a log line, an epoch; before the end.
@pytest.mark.parametrize("step", [1, 4, 6, 7, 8, 20])
def test_stopped_at_any_step_and_resumed_is_the_whole_run(whole, tmp_path, step):
    with pytest.raises(toy.Stop):
        toy.fit(tmp_path, callbacks=[toy.StopAt(step)])
    toy.fit(tmp_path)
    assert toy.fingerprint(tmp_path) == toy.fingerprint(whole)


@pytest.mark.parametrize(("mode", "count"), [("writes", 0), ("random", 6)])
def test_killed_and_resumed_is_the_whole_run(tmp_path, mode, count):
    """SIGKILL before and after each file takes its place, and at random moments."""
    report = json.loads(python("kills.py", tmp_path, mode, count).splitlines()[-1])
    assert report["kills"] >= (count or 40)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_many_random_moments(tmp_path):
    python("kills.py", tmp_path, "random", 200)


def test_damaged_checkpoint_is_refused_by_name(tmp_path):
    with pytest.raises(toy.Stop):
        toy.fit(tmp_path, callbacks=[toy.StopAt(9)])
    path = tmp_path / "checkpoint.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CacheError, match=r"checkpoint\.safetensors"):
        toy.fit(tmp_path)


def test_other_settings_in_the_same_folder_are_refused_by_name(whole):
    with pytest.raises(CheckpointError, match=r"train\.lr"):
        toy.fit(whole, replace(toy.CONFIG, lr=1e-3))


@pytest.mark.parametrize("before", [1, 3])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_micro_batches_may_change_on_resume(one, tmp_path, before, after):
    config = replace(toy.CONFIG, micro_batches=before)
    with pytest.raises(toy.Stop):
        toy.fit(tmp_path, config, dropout=0.0, callbacks=[toy.StopAt(9)])
    toy.fit(tmp_path, replace(toy.CONFIG, micro_batches=after), dropout=0.0)
    assert_same_run(tmp_path, one)


def test_what_does_not_make_another_run_may_change_on_resume(one, tmp_path):
    with pytest.raises(toy.Stop):
        toy.fit(tmp_path, callbacks=[toy.StopAt(9)], dropout=0.0)
    free = {"micro_batches": 2, "save_every": 5, "log_every": 7, "workers": 1}
    toy.fit(tmp_path, replace(toy.CONFIG, **free), dropout=0.0)
    run = training.load_run(tmp_path)
    np.testing.assert_allclose(run.difficulty, one.difficulty, atol=1e-5)


@pytest.mark.parametrize("words", [["cat", "fox"], ["fox", "dog"], ["fox"]])
def test_another_vocabulary_is_refused(tmp_path, words):
    """Size, order or one word: the logits would mean something else."""
    with pytest.raises(toy.Stop):
        toy.fit(tmp_path, callbacks=[toy.StopAt(9)], recipe={"words": ["fox", "cat"]})
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
    table = training.load_run(fit(micro_batches=2)).difficulty
    assert table.notna().all(axis=None)


def test_second_writer_in_this_process_is_refused(tmp_path):
    class Intruder(training.Callback):
        def before_step(self, state):
            with pytest.raises(RunBusyError, match="is training in"):
                toy.fit(tmp_path)
            raise toy.Stop

    with pytest.raises(toy.Stop):
        toy.fit(tmp_path, callbacks=[Intruder()])


def test_second_writer_in_another_process_is_refused_while_the_first_lives(tmp_path):
    context = multiprocessing.get_context("fork")
    holding, enough = context.Event(), context.Event()

    def hold():
        with runs.locked(tmp_path):
            holding.set()
            enough.wait(60)

    holder = context.Process(target=hold)
    holder.start()
    assert holding.wait(60)
    with pytest.raises(RunBusyError, match="is training in"):
        toy.fit(tmp_path)
    holder.kill()  # without letting it go
    holder.join()
    assert runs.is_finished(toy.fit(tmp_path))


def test_finished_run_is_read_without_its_lock(whole):
    """Notebooks that run side by side read each other's runs."""
    with runs.locked(whole):
        assert toy.fit(whole) == whole


# --- batches and processes ------------------------------------------------------------------------


class Rows:
    """Data whose batches are their own row numbers."""

    def batch(self, rows):
        return rows


def parts_of(rows, world, micro_batches):
    """Return what all processes read for one global batch: (rows, weight) of each part."""
    config = TrainConfig(micro_batches=micro_batches)
    readers = [loop._Batches(Rows(), None, config, rank, world) for rank in range(world)]
    return [[(part, weight) for _, part, weight in reader[rows][0]] for reader in readers]


@pytest.mark.parametrize("world", range(1, 6))
def test_no_part_of_one_row_reaches_the_model(world):
    """Fault 4: BatchNorm cannot train on the single rows that plain splits leave to a part."""
    for micro_batches, count in itertools.product(range(1, 6), range(2, 41)):
        rows = np.random.default_rng(count).permutation(100)[:count]
        processes = parts_of(rows, world, micro_batches)
        parts = [part for process in processes for part in process]
        assert min(len(part) for part, _ in parts) >= 2
        assert sum(weight for _, weight in parts) == pytest.approx(1)
        read = np.concatenate([part for part, weight in parts if weight])
        np.testing.assert_array_equal(np.sort(read), np.sort(rows))
        assert all(weight in (0, len(part) / count) for part, weight in parts)
        assert all(1 <= len(process) <= micro_batches for process in processes)
        working = [sum(len(part) for part, weight in process if weight) for process in processes]
        assert max(working) - min(working) <= 1 or min(working) == 0


def test_parts_come_with_what_the_objective_asks_of_the_whole_batch():
    class Counting:
        def whole(self, answers):
            return {"total": answers["target"].sum()}

    data, rows = toy.data(), np.arange(3, 20)
    expected = data.answers(rows)["target"].sum()
    for rank in range(3):
        reader = loop._Batches(data, Counting(), toy.CONFIG, rank, 3)
        torch.testing.assert_close(reader[rows][1], {"total": expected})


def test_batch_norm_trains_in_uneven_micro_batches(tmp_path):
    """Fault 4: three micro-batches of a last batch of three rows were single rows."""
    folder = toy.train(toy.normed(), tmp_path, toy.UNEVEN, stages=toy.UNEVEN_STAGES)
    assert training.load_run(folder).difficulty["epoch_1"].notna().all()


def test_batch_norm_trains_in_uneven_shares_of_two_processes(two):
    """Fault 4: shares of three rows in three micro-batches are single rows."""
    assert training.load_run(two / "normed").difficulty["epoch_1"].notna().all()


def test_batch_norm_sees_the_rows_of_both_processes(two, tmp_path):
    stages = [training.Stage(np.arange(43), 3)]
    alone = toy.train(toy.normed(0.0), tmp_path, stages=stages)
    assert_same_run(two / "norms", training.load_run(alone))
    (one, _), (both, _) = (
        files.load_arrays(f / "model.safetensors") for f in (alone, two / "norms")
    )
    for name, value in one.items():
        np.testing.assert_allclose(both[name], value, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("batch_size", [2, 7, 49])
def test_a_last_batch_of_one_sample_joins_the_one_before(tmp_path, batch_size):
    """BatchNorm, as in the original's perceptron, cannot train on a single sample."""
    config = replace(toy.CONFIG, batch_size=batch_size, epochs=1)
    folder = toy.train(toy.normed(), tmp_path, config)
    assert training.load_run(folder).difficulty["epoch_1"].notna().all()


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_micro_batches_give_the_same_run(one, tmp_path, parts):
    config = replace(toy.CONFIG, micro_batches=parts)
    assert_same_run(toy.fit(tmp_path, config, dropout=0.0), one)


def test_reading_processes_give_the_same_run(whole, tmp_path):
    folder = toy.fit(tmp_path, replace(toy.CONFIG, workers=2))
    assert_same_run(folder, training.load_run(whole), atol=0)


def test_two_processes_give_the_losses_of_one(one, two):
    assert_same_run(two / "whole", one)


def test_two_processes_go_on_where_one_was_stopped(one, two):
    assert_same_run(two / "taken over", one)


def test_one_process_goes_on_where_two_were_stopped(one, two, tmp_path):
    folder = shutil.copytree(two / "handed over", tmp_path / "run")
    assert not runs.is_finished(folder)
    toy.fit(folder, dropout=0.0)
    assert_same_run(folder, one)


def test_a_captioner_trains_in_any_parts_with_the_losses_of_one(tmp_path):
    """Faults 2 and 3: BLIP's loss is a mean over tokens, and captions are not equally long.

    The mean of the parts' means is another loss; and the objective must not ask the model for its
    tokenizer, which the wrapper around a model in several processes does not have.
    """
    blip = tiny.blip(tmp_path / "blip")
    one = training.load_run(toy_blip.fit(blip, tmp_path / "one"))
    for parts in toy_blip.PARTS[1:]:
        assert_same_run(toy_blip.fit(blip, tmp_path / f"one in {parts}", parts), one)
    by_processes(2, "toy_blip.py", blip, tmp_path)
    for parts in toy_blip.PARTS:
        assert_same_run(tmp_path / f"two in {parts}", one)

    def without_the_whole(model, batch):
        return toy_blip.OBJECTIVE(model, {**batch})

    naive = toy_blip.fit(blip, tmp_path / "naive", 3, objective=without_the_whole)
    assert abs(losses(naive) - one.metrics["loss"]).max() > 1e-3


# --- plan and schedule ----------------------------------------------------------------------------


def test_every_row_is_read_once_an_epoch_in_another_order_each_time():
    plan = training.Plan([training.Stage(np.arange(50), 3)], toy.CONFIG)
    batches = list(plan.batches())
    assert len(batches) == plan.total
    epochs = [np.concatenate(batches[start:end]) for start, end in pairwise(plan.starts)]
    assert all(np.array_equal(np.sort(rows), np.arange(50)) for rows in epochs)
    assert not np.array_equal(epochs[0], epochs[1])


@pytest.mark.parametrize("count", [2, 3, 49, 50, 51])
@pytest.mark.parametrize("batch_size", [2, 7, 49, 50, 64])
def test_batches_are_full_but_the_last_and_none_is_a_single_row(count, batch_size):
    config = replace(toy.CONFIG, batch_size=batch_size)
    plan = training.Plan([training.Stage(np.arange(count), 2)], config)
    sizes = [len(rows) for rows in plan.batches()]
    for start, end in pairwise(plan.starts):
        *full, last = sizes[start:end]
        assert set(full) <= {batch_size}
        assert 2 <= last <= batch_size + 1
        assert sum(full) + last == count


def test_batches_are_functions_of_the_step_alone():
    """Fault 7: the order of the last epoch asked for was kept, and two threads shared it."""
    stages = [training.Stage(np.arange(n), 2) for n in (16, 32, 50)]
    plan = training.Plan(stages, toy.CONFIG)
    batches = list(plan.batches())
    for step in range(plan.total):
        np.testing.assert_array_equal(next(plan.batches(step)), batches[step])
    early, late = plan.batches(), plan.batches(plan.total // 2)
    for step, (first, second) in enumerate(zip(early, late, strict=False)):
        np.testing.assert_array_equal(first, batches[step])
        np.testing.assert_array_equal(second, batches[plan.total // 2 + step])
    assert not list(plan.batches(plan.total))


def test_epochs_hold_their_own_steps():
    plan = training.Plan([training.Stage(np.arange(n), 1) for n in (16, 33, 50)], toy.CONFIG)
    for epoch, (start, end) in enumerate(pairwise(plan.starts)):
        assert {plan.epoch(step) for step in range(start, end)} == {epoch}


@pytest.mark.parametrize("sizes", [[], [0], [1], [50, 1]])
def test_stage_of_less_than_two_rows_is_refused(sizes):
    stages = [training.Stage(np.arange(size), 1) for size in sizes]
    with pytest.raises(BadValueError, match="less than two rows"):
        training.Plan(stages, toy.CONFIG)


def test_schedule_is_as_long_as_growing_stages_and_never_rises_after_the_warm_up():
    """Fault D7 of the original: the cosine's length was taken from the first, smallest stage."""
    stages = [training.Stage(np.arange(n), 2) for n in (16, 32, 50)]
    plan = training.Plan(stages, TrainConfig(batch_size=8, lr=1e-3, lr_min=1e-5, warmup=0.1))
    assert plan.total == 2 * (2 + 4 + 7)
    factors = [plan.lr_factor(step) for step in range(plan.total)]
    top = int(np.argmax(factors))
    assert top <= math.ceil(0.1 * plan.total)
    assert all(before < after for before, after in pairwise(factors[: top + 1]))
    assert all(before > after for before, after in pairwise(factors[top:]))
    assert max(factors) == 1
    assert plan.lr_factor(plan.total) == pytest.approx(1e-5 / 1e-3)


@pytest.mark.parametrize("warmup", [0.0, 0.2])
def test_schedule_is_torchs_cosine_after_a_linear_warm_up(warmup):
    """Two implementations: the loop's function of the step, and torch's stateful schedulers."""
    config = TrainConfig(batch_size=8, lr=1e-3, lr_min=1e-5, warmup=warmup)
    plan = training.Plan([training.Stage(np.arange(50), 5)], config)
    rising = int(warmup * plan.total)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
    schedulers = torch.optim.lr_scheduler
    cosine = schedulers.CosineAnnealingLR(optimizer, plan.total - rising, eta_min=config.lr_min)
    schedule = cosine
    if rising:
        linear = schedulers.LinearLR(optimizer, 1 / (rising + 1), total_iters=rising)
        schedule = schedulers.SequentialLR(optimizer, [linear, cosine], [rising])
    rates = []
    for _ in range(plan.total):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    expected = [config.lr * plan.lr_factor(step) for step in range(plan.total)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_the_optimizer_gets_the_planned_rate_decay_and_clipped_gradients(tmp_path):
    config = replace(toy.CONFIG, clip=1e-3)
    rates, norms = [], []

    class Watch(training.Callback):
        def begin(self, state):
            groups = state.optimizer.param_groups
            shapes = {group["weight_decay"]: {p.ndim for p in group["params"]} for group in groups}
            assert shapes == {0.01: {2}, 0.0: {1}}
            state.optimizer.register_step_pre_hook(self.at_step)

        def at_step(self, optimizer, *_):
            rates.append({group["lr"] for group in optimizer.param_groups})
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            norms.append(float(torch.stack([p.grad.norm() for p in trained]).norm()))

    toy.fit(tmp_path, config, callbacks=[Watch()])
    plan = training.Plan([training.Stage(np.arange(50), 3)], config)
    assert rates == [{config.lr * plan.lr_factor(step)} for step in range(plan.total)]
    assert len(norms) == plan.total
    assert max(norms) <= 1.01e-3


def test_best_epoch_is_judged_on_the_validation_rows(tmp_path):
    data, model = toy.data(), toy.model()
    folder = toy.train(model, tmp_path)
    with evaluating(model):
        embedding, _ = model(data.batch(data.val)["input"])
    target = torch.from_numpy(data.targets[data.val])
    by_hand = float(torch.nn.functional.cosine_similarity(embedding, target).mean())
    best = training.load_run(folder).metrics["val_similarity"].max()
    assert best == pytest.approx(by_hand, abs=1e-6)


def test_stages_feed_their_own_rows(tmp_path):
    stages = [training.Stage(np.arange(20), 1), training.Stage(np.arange(50), 2)]
    table = training.load_run(toy.fit(tmp_path, stages=stages)).difficulty
    assert table["epoch_1"].notna().sum() == 20
    assert table["epoch_3"].notna().all()


# --- refusals -------------------------------------------------------------------------------------


def holding(data, **changes):
    """Return a `PairStore` like `data` with changes."""
    names = ("store", "targets", "labels", "vocabulary_size", "train", "val")
    return PairStore(**{**{name: getattr(data, name) for name in names}, **changes})


@pytest.mark.parametrize("hole", ["train", "val"])
def test_empty_split_is_refused(tmp_path, hole):
    empty = holding(toy.data(), **{hole: np.arange(0)})
    with pytest.raises(BadValueError, match=r"nothing to train on|no validation rows"):
        training.fit(toy.model(), empty, toy.CONFIG, tmp_path, objective=JointObjective())


def test_loss_that_is_not_finite_stops_the_run_and_leaves_the_checkpoint(tmp_path):
    class Poison(training.Callback):
        def before_step(self, state):
            if state.step == 9:
                state.model.embedding_head.weight.data.fill_(math.nan)

    with pytest.raises(RsdError, match="not finite between steps"):
        toy.fit(tmp_path, callbacks=[Poison()])
    arrays, meta = files.load_arrays(tmp_path / "checkpoint.safetensors")
    assert meta["step"] == 8
    weights = [value for name, value in arrays.items() if name.startswith("model.")]
    assert all(np.isfinite(value).all() for value in weights)


def test_weights_of_another_model_are_refused_with_the_tensors_named(whole):
    weights, bare = whole / "model.safetensors", torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"size mismatch .*vocabulary_head\.weight"):
        training.load_weights(toy.model(words=21), weights)
    with pytest.raises(CheckpointError, match=r"Missing .*bias.*Unexpected .*embedding_head"):
        training.load_weights(bare, weights)


def test_weights_come_back_with_what_was_said_of_them(tmp_path):
    model, path = toy.model(seed=1), tmp_path / "weights"
    training.save_weights(model, path, {"made": "here"})
    other = toy.model(seed=2)
    assert training.load_weights(other, path) == {"made": "here"}
    stored = other.state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())


def test_unfinished_folder_is_no_run(tmp_path):
    with pytest.raises(CacheError, match="no finished run"):
        training.load_run(tmp_path)


def test_metrics_are_whole_lines(whole):
    lines = (whole / "metrics.jsonl").read_text().splitlines()
    assert pd.DataFrame([json.loads(line) for line in lines])["step"].is_monotonic_increasing


# --- pairs ----------------------------------------------------------------------------------------


class Counted(np.ndarray):
    """An array that keeps count of what was gathered from it."""

    def __new__(cls, values):
        array = np.asarray(values).view(cls)
        array.gathers = []
        return array

    def __array_finalize__(self, source):
        self.gathers = getattr(source, "gathers", [])

    def __getitem__(self, rows):
        self.gathers.append(rows)
        return np.asarray(self)[rows]


def test_answers_of_a_batch_are_one_gather_of_targets_and_one_of_labels():
    plain = toy.data()
    counted = holding(plain, targets=Counted(plain.targets), labels=Counted(plain.labels))
    counted.targets.gathers.clear()
    counted.labels.gathers.clear()
    rows = np.random.default_rng(0).permutation(len(plain))[:16]
    answers = counted.answers(rows)
    for array in (counted.targets, counted.labels):
        assert len(array.gathers) == 1
        np.testing.assert_array_equal(array.gathers[0], rows)
    for place, row in enumerate(rows):
        single = plain.answers([row])
        for name, values in answers.items():
            torch.testing.assert_close(values[place], single[name][0])


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
    with pytest.raises(BadValueError, match=message):
        holding(toy.data(), **{field: value})


def test_labels_survive_packing():
    labels = np.random.default_rng(0).random((7, 13)) < 0.5
    inputs, rows = toy.Memory(np.zeros((7, 2), np.float32)), np.arange(7)
    targets = np.ones((7, 3), np.float32)
    data = PairStore(inputs, targets, pack(labels), 13, rows, np.arange(0))
    assert np.array_equal(data.answers(rows)["labels"].numpy(), labels)


def test_nothing_keeps_a_trained_model_alive(tmp_path):
    """Of several large models trained one after the other, memory holds one."""
    model = toy.model()
    toy.train(model, tmp_path / "run", replace(toy.CONFIG, precision="bf16"))
    kept = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert kept() is None
    finally:
        gc.enable()
