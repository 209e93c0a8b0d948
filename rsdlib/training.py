"""The one training loop. It knows no model: an objective maps (model, batch) to a loss and one similarity per sample.

Everything random is a function of (seed, step), so a checkpoint needs no generator states and a resumed run takes the very steps
that the uninterrupted one would have taken.
"""

import contextlib
import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from rsdlib import runtime
from rsdlib.config import TrainConfig, as_dict
from rsdlib.errors import BadValueError, CacheError, CheckpointError, DeviceError, RsdError, RunBusyError

# --- data -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairData:
    """Inputs, targets and labels by row, all precomputed: a batch is three gathers.

    Attributes
    ----------
    inputs : object with ``batch(indices) -> uint8 or float array (b, ...)``
        For example `rsdlib.data.ImageStore`.
    targets : ndarray (n, d), float32, or tokens (n, l), int64
        May be memory-mapped.
    labels : ndarray (n, ceil(m / 8)), uint8, or None
        Vocabulary labels, packed by `pack`.
    vocabulary_size : int
        m.
    train, val : ndarray of int
        Rows.
    """

    inputs: object
    targets: np.ndarray
    labels: np.ndarray | None
    vocabulary_size: int
    train: np.ndarray
    val: np.ndarray

    def __post_init__(self):
        targets, labels = self.targets, self.labels
        if targets.ndim != 2 or targets.dtype not in (np.float32, np.int64):
            found = f"targets are {targets.dtype} of shape {targets.shape}"
            raise BadValueError(found, "They must be float32 of shape (n, d), or tokens: int64 of shape (n, l).")
        usable = np.isfinite(targets).all(axis=1) & targets.any(axis=1)
        if not usable.all():
            raise BadValueError(f"target {int(np.argmin(usable))} is zero or not finite", "Embed its prompt again.")
        if labels is not None and labels.shape != (len(targets), -(-self.vocabulary_size // 8)):
            raise BadValueError(f"labels of shape {labels.shape} are not {self.vocabulary_size} bits for {len(targets)} targets")
        rows = np.concatenate([self.train, self.val])
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(targets)):
            raise BadValueError(f"rows reach from {rows.min()} to {rows.max()}, but there are {len(targets)} targets")

    def __len__(self):
        return len(self.targets)

    def batch(self, indices):
        """Return tensors: input (b, ...), target (b, d), labels (b, m) uint8."""
        return {"input": torch.from_numpy(self.inputs.batch(indices)), **self.answers(indices)}

    def answers(self, indices):
        """Return everything of a batch but its inputs."""
        answers = {"target": torch.from_numpy(self.targets[indices])}
        if self.labels is not None:
            answers["labels"] = torch.from_numpy(np.unpackbits(self.labels[indices], axis=1, count=self.vocabulary_size))
        return answers


def pack(labels):
    """Pack boolean labels (n, m) into bits (n, ceil(m / 8))."""
    return np.packbits(labels, axis=1)


# --- plan -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """Some epochs over some of the training rows; a curriculum is a list of stages."""

    rows: np.ndarray
    epochs: int


class Plan:
    """Which rows every step reads and at which rate: pure functions of the step.

    Parameters
    ----------
    stages : list of Stage
    config : TrainConfig
    """

    def __init__(self, stages, config):
        if not stages or any(len(stage.rows) == 0 for stage in stages):
            raise BadValueError("there is nothing to train on: a stage without rows", "Check the split and the filters.")
        self.config = config
        self.epochs = [stage.rows for stage in stages for _ in range(stage.epochs)]
        # A last batch of one row joins the one before: BatchNorm cannot train on a single sample.
        steps = [max(math.ceil((len(rows) - 1) / config.batch_size), 1) for rows in self.epochs]
        self.starts = np.concatenate([[0], np.cumsum(steps)])  # first step of each epoch, then the total
        self.total = int(self.starts[-1])
        self._order = (-1, None)

    def epoch(self, step):
        """Return the epoch that holds `step`."""
        return int(np.searchsorted(self.starts, step, side="right")) - 1

    def rows(self, step):
        """Return the rows of the global batch of `step`."""
        epoch = self.epoch(step)
        if self._order[0] != epoch:
            self._order = (epoch, runtime.rng("order", self.config.seed, epoch).permutation(self.epochs[epoch]))
        first = (step - self.starts[epoch]) * self.config.batch_size
        last = step + 1 == self.starts[epoch + 1]
        return self._order[1][first : None if last else first + self.config.batch_size]

    def lr_factor(self, step):
        """Return the rate of `step` as a share of its peak: linear warm-up, then one half cosine to ``lr_min`` over all stages."""
        config = self.config
        warmup = int(config.warmup * self.total)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        low = min(config.lr_min / config.lr, 1.0) if config.lr else 1.0
        progress = (step - warmup) / max(self.total - warmup, 1)
        return low + (1 - low) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


# --- the loop ---------------------------------------------------------------------------------------------------------------


class Callback:
    """Watches or changes a run; every hook may be left out.

    Methods
    -------
    begin(state), before_step(state), after_epoch(state, record), end(state)
        `state` has ``step``, ``plan``, ``model`` (unwrapped) and ``optimizer``; `record` is the epoch's line of metrics.jsonl.
    """

    def begin(self, state):
        """Run once, before a checkpoint is taken up."""

    def before_step(self, state):
        """Run before each step."""

    def after_epoch(self, state, record):
        """Run after each epoch's validation."""

    def end(self, state):
        """Run once, after the last step or what stopped the run before."""


@dataclass
class State:
    """Where a run stands; everything but the model and the optimizer goes into the checkpoint as it is."""

    plan: Plan
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    best_epoch: int = -1
    best_score: float = -math.inf


def fit(model, data, config, folder, *, objective, stages=None, callbacks=(), recipe=None):
    """Train `model`, resuming by itself, and return the run folder.

    The folder holds ``config.json`` (before the first step), ``run.json``, ``metrics.jsonl``, ``checkpoint.safetensors``,
    ``model.safetensors`` (the epoch with the best validation similarity) and ``difficulty.parquet`` (each training sample's
    similarity in each epoch, recorded from the training pass itself). A finished run is returned as it is.

    Parameters
    ----------
    model : nn.Module
        Ends with the weights of the best epoch.
    data : PairData or alike
        Has ``batch(indices)``, ``train``, ``val`` and a length.
    config : TrainConfig
    folder : path-like
    objective : callable
        ``objective(model, batch) -> (loss, similarity (b,))``; the loss is a mean over the batch.
    stages : list of Stage, optional
        Default: one stage of ``config.epochs`` epochs over ``data.train``.
    callbacks : sequence of Callback
    recipe : dict, optional
        What else made this run; stored in ``config.json`` and compared on resume.

    Returns
    -------
    Path

    Raises
    ------
    CheckpointError
        The folder holds a run made from other settings.
    RunBusyError
        Another process trains in the same folder.

    Notes
    -----
    Under ``torchrun --nproc-per-node k`` each process takes its share of every global batch. Losses are those of one process, as
    they are for any number of micro-batches, for models whose samples do not meet (no BatchNorm) and without dropout, whose masks
    depend on the shares.
    """
    folder = Path(folder)
    plan = Plan(stages or [Stage(np.asarray(data.train), config.epochs)], config)
    made_from = {"train": as_dict(config), "stages": runtime.digest([s.tolist() for s in plan.epochs]), "recipe": recipe or {}}
    last = folder / "difficulty.parquet"  # the last file of a run: one that has it is only read
    with contextlib.nullcontext() if last.exists() else _locked(folder):
        _claim(folder, made_from)
        if not last.exists():
            _Loop(model, data, plan, folder, objective, callbacks).run()
    load_weights(model, folder / "model.safetensors")
    return folder


class _Loop:
    """One call of `fit`: accelerate's pieces, and what is gathered between two checkpoints."""

    def __init__(self, model, data, plan, folder, objective, callbacks):
        self.data, self.folder, self.objective, self.callbacks, self.config = data, folder, objective, callbacks, plan.config
        self.accelerator = _accelerator(self.config)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        optimizer = torch.optim.AdamW(_groups(model, self.config.weight_decay), lr=self.config.lr, fused=True)
        self.state = State(plan, model, optimizer)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.records = []
        self.history = np.full((len(plan.epochs), len(data)), np.nan, np.float32)  # similarity by epoch and row
        for callback in callbacks:
            callback.begin(self.state)
        self.model = self.accelerator.prepare_model(model.to(self.accelerator.device))
        self._resume()
        # This epoch's similarities (and a mask) and the loss since the last line, on the device: no step waits for the host.
        self.seen = torch.zeros(2, len(data), device=self.accelerator.device)
        self.loss = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        partial = self.history[plan.epoch(self.state.step)] if self.state.step < plan.total else np.empty(0)
        known = np.flatnonzero(np.isfinite(partial))
        if self.rank == 0 and len(known):
            self.seen[:, known] = torch.tensor(np.stack([partial[known], np.ones(len(known), np.float32)])).to(self.seen)

    def run(self):
        state = self.state
        self.started, self.first_step, self.since = time.monotonic(), state.step, state.step
        self.model.train()
        try:
            self._steps()
        finally:
            for callback in self.callbacks:
                callback.end(state)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self._write_difficulty()
        self.accelerator.wait_for_everyone()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)  # give the model back as it came
        self.accelerator.free_memory()

    def _steps(self):
        state, plan = self.state, self.state.plan
        with ThreadPoolExecutor(1) as reader:  # reads the next batch while this one is computed
            upcoming = reader.submit(self._batches, state.step) if state.step < plan.total else None
            while state.step < plan.total:
                batches = upcoming.result()
                if state.step + 1 < plan.total:
                    upcoming = reader.submit(self._batches, state.step + 1)
                self._step(batches)
                state.step += 1
                epoch = plan.epoch(state.step - 1)
                if state.step == plan.starts[epoch + 1]:
                    self._end_epoch(epoch)
                elif state.step % self.config.save_every == 0:
                    self._save(epoch)
                elif state.step % self.config.log_every == 0:
                    self._log(epoch)

    def _batches(self, step):
        """Read this process's share of a global batch, in micro-batches; each comes with its rows and its share of the loss."""
        rows = self.state.plan.rows(step)
        mine = np.array_split(rows, self.world)[self.rank]
        batches = []
        for part in np.array_split(mine, min(self.config.micro_batches, max(len(mine), 1))):
            share = len(part) / len(rows)
            part = part if len(part) else rows[:1]  # fewer rows than processes: join in with no weight
            batches.append((self.data.batch(part), part, share))
        return batches

    def _step(self, batches):
        state, config = self.state, self.config
        for callback in self.callbacks:
            callback.before_step(state)
        factor = state.plan.lr_factor(state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = config.lr * factor * group.get("lr_scale", 1.0)
        torch.manual_seed(runtime.torch_seed("step", config.seed, state.step, self.rank))
        for number, (batch, rows, share) in enumerate(batches, 1):
            batch = {name: value.to(self.accelerator.device, non_blocking=True) for name, value in batch.items()}
            alone = contextlib.nullcontext() if number == len(batches) else self.accelerator.no_sync(self.model)
            with alone:
                try:
                    with self.accelerator.autocast(), _attention(self.accelerator.device):
                        loss, similarity = self.objective(self.model, batch)
                    # Processes average their gradients: times their number, the shares add up to the mean over the global batch.
                    self.accelerator.backward(loss * (share * self.world))
                except torch.OutOfMemoryError as error:
                    fix = f"Run it again with micro_batches={2 * config.micro_batches}: it goes on from the last checkpoint."
                    raise DeviceError(
                        f"{self.accelerator.device} has too little memory for {len(rows)} pairs at once", fix
                    ) from error
            self.loss += loss.detach().double() * share
            if share:
                where = torch.as_tensor(rows, device=self.seen.device)
                self.seen[:, where] = torch.stack([similarity.detach().float(), torch.ones_like(similarity, dtype=torch.float32)])
        if config.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, config.clip)
        state.optimizer.step()
        state.optimizer.zero_grad()

    def _similarities(self):
        """Return this epoch's similarities so far over all processes, NaN where a row was not seen."""
        value, mask = self.accelerator.reduce(self.seen, "sum").cpu().numpy()
        return np.where(mask > 0, value, np.nan).astype(np.float32)

    def _log(self, epoch, **more):
        """Add a line to the metrics: the mean loss since the last one."""
        step = self.state.step
        loss = float(self.accelerator.reduce(self.loss, "sum")) / max(step - self.since, 1)
        if not math.isfinite(loss):
            raise RsdError(
                f"the loss is not finite between steps {self.since} and {step}",
                "Lower lr, or use precision='fp32'; the last checkpoint is intact.",
            )
        self.loss.zero_()
        rate = (step - self.first_step) / (time.monotonic() - self.started)
        lr = self.config.lr * self.state.plan.lr_factor(step - 1)
        self.records.append({"step": step, "epoch": epoch, "loss": loss, "lr": lr, "steps_per_second": round(rate, 3), **more})
        self.since = step
        if self.accelerator.is_main_process:
            runtime.write_text(self.folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in self.records))

    def _end_epoch(self, epoch):
        self.history[epoch] = self._similarities()
        self.seen.zero_()
        train = float(np.nanmean(self.history[epoch]))
        val, val_loss = self._validate()
        self._log(epoch, train_similarity=train, val_similarity=val, val_loss=val_loss)
        state = self.state
        if val > state.best_score:
            state.best_epoch, state.best_score = epoch, val
            if self.accelerator.is_main_process:
                save_weights(state.model, self.folder / "model.safetensors", {"epoch": epoch, "val_similarity": val})
        left = (state.plan.total - state.step) / self.records[-1]["steps_per_second"] if self.records[-1]["steps_per_second"] else 0
        runtime.log(
            f"epoch {epoch + 1}/{len(state.plan.epochs)}: cosine train {train:.4f}, "
            f"val {val:.4f}{' (best)' if state.best_epoch == epoch else ''}, about {left:.0f} s left"
        )
        for callback in self.callbacks:
            callback.after_epoch(state, self.records[-1])
        self._save(epoch, logged=True)

    def _validate(self):
        """Return the mean similarity and loss over the validation rows, each row once, whatever the number of processes."""
        rows = np.asarray(self.data.val)
        if not len(rows):
            raise BadValueError("there are no validation rows, so no best epoch", "Raise val_fraction or add data.")
        sums = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        with evaluating(self.state.model), self.accelerator.autocast():
            size = max(self.config.batch_size // self.config.micro_batches, 1)
            for part in _chunks(np.array_split(rows, self.world)[self.rank], size):
                batch = {name: value.to(self.accelerator.device) for name, value in self.data.batch(part).items()}
                loss, similarity = self.objective(self.state.model, batch)
                sums += torch.stack([similarity.double().sum(), loss.double() * len(part)])
        similarity, loss = (self.accelerator.reduce(sums, "sum") / len(rows)).tolist()
        return similarity, loss

    def _save(self, epoch, logged=False):
        """Write the checkpoint: one file, so that it is whole or not there."""
        if not logged:
            self._log(epoch)
            self.history[epoch] = self._similarities()
        if not self.accelerator.is_main_process:
            return
        state = self.state
        arrays = {f"model.{name}": value for name, value in _to_numpy(state.model.state_dict()).items()}
        for number, values in state.optimizer.state_dict()["state"].items():
            arrays |= {f"optimizer.{number}.{name}": value for name, value in _to_numpy(values).items()}
        arrays["history"] = self.history[: epoch + 1]
        meta = {name: getattr(state, name) for name in ("step", "best_epoch", "best_score")}
        runtime.save_arrays(self.folder / "checkpoint.safetensors", arrays, {**meta, "records": self.records})

    def _resume(self):
        """Take up the checkpoint if there is one."""
        path = self.folder / "checkpoint.safetensors"
        precision = self.accelerator.mixed_precision.replace("no", "fp32")
        environment = {**runtime.environment(), "device": str(self.accelerator.device), "precision": precision}
        if not path.exists():
            if self.accelerator.is_main_process:
                runtime.write_json(self.folder / "run.json", environment)
            return
        arrays, meta = runtime.load_arrays(path)
        state = self.state
        _load_into(state.model, {k.removeprefix("model."): v for k, v in arrays.items() if k.startswith("model.")}, path)
        values = {}
        for name, value in arrays.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".")
                values.setdefault(int(number), {})[key] = torch.from_numpy(np.array(value))
        state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": values})
        self.history[: len(arrays["history"])] = arrays["history"]
        self.records = meta.pop("records")
        for name, value in meta.items():
            setattr(state, name, value)
        before = runtime.read_json(self.folder / "run.json")
        changed = [
            name
            for name in ("threads", "versions", "cpu_capability", "gpu", "device", "precision")
            if before.get(name) != environment[name]
        ]
        note = f"; {', '.join(changed)} changed since it began, so its last digits may differ" if changed else ""
        runtime.log(f"{runtime.relative(self.folder)}: resuming at step {state.step} of {state.plan.total}{note}")

    def _write_difficulty(self):
        """Write each training sample's similarity in each epoch, in row order."""
        rows = np.unique(np.concatenate(self.state.plan.epochs))
        table = pd.DataFrame({"row": rows, **{f"epoch_{e + 1}": values[rows] for e, values in enumerate(self.history)}})
        runtime.write_parquet(self.folder / "difficulty.parquet", table)


def _accelerator(config):
    """Return accelerate's view of this machine, fresh: a process may train several times with different settings."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    device = runtime.device(config.device)
    if device.index is not None:
        torch.cuda.set_device(device)  # accelerate takes the current one
    chosen = runtime.precision(config.precision, device)
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    return Accelerator(cpu=device.type == "cpu", mixed_precision="no" if chosen == "fp32" else chosen)


def _attention(device):
    """Choose the attention to train with: on a CPU the plain one, where the fused one's backward pass is several times slower."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


def _groups(model, weight_decay):
    """Put matrices under weight decay and leave biases, norms and other vectors out of it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


@contextlib.contextmanager
def _locked(folder):
    """Hold the run folder for this process; a killed holder's lock is gone with it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not runtime.is_main_process():
        yield
        return
    import fcntl

    with open(folder / ".lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            raise RunBusyError(
                f"process {lock.read().strip()} is training in {runtime.relative(folder)}", "Wait for it, or use another folder."
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        runtime.remove_leftovers(folder)
        yield


def _claim(folder, made_from):
    """Write ``config.json``, or compare it: a run is never continued with settings that would make it another run."""
    path = folder / "config.json"
    if path.exists():
        stored = runtime.read_json(path)
        free = {f"train.{name}" for name in TrainConfig.free}
        differs = [name for name in _differences(stored, json.loads(json.dumps(made_from))) if name not in free]
        if differs:
            raise CheckpointError(
                f"{runtime.relative(folder)} holds another run; different: {', '.join(differs)}",
                "Use another folder, or delete this one.",
            )
    elif runtime.is_main_process():
        runtime.write_json(path, made_from)


def _differences(a, b, prefix=""):
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for key in sorted(a.keys() | b.keys()) for d in _differences(a.get(key), b.get(key), f"{prefix}{key}.")]
    return [] if a == b else [prefix.rstrip(".")]


# --- weights and predictions ------------------------------------------------------------------------------------------------


def weights_key(model):
    """Return a key that changes with any weight of the model."""
    return runtime.checksum(_to_numpy(model.state_dict()))[:16]


def _to_numpy(tensors):
    return {name: value.detach().cpu().numpy() for name, value in tensors.items()}


def save_weights(model, path, meta=None):
    """Write a model's weights and a checksum, whole or not at all."""
    runtime.save_arrays(path, _to_numpy(model.state_dict()), meta)


def load_weights(model, path):
    """Load what `save_weights` wrote; every tensor must be there and fit.

    Raises
    ------
    CheckpointError
        Tensors are missing, unexpected or of another shape: they are named.
    CacheError
        The file is absent or damaged.
    """
    arrays, meta = runtime.load_arrays(path)
    _load_into(model, arrays, path)
    return meta


def _load_into(model, arrays, path):
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    problems = {
        "missing": sorted(wanted.keys() - arrays.keys()),
        "unexpected": sorted(arrays.keys() - wanted.keys()),
        "of another shape": sorted(n for n in wanted.keys() & arrays.keys() if wanted[n] != arrays[n].shape),
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            for kind, names in problems.items()
            if names
        )
        raise CheckpointError(
            f"{runtime.relative(path)} does not fit this model: {listed}", "Load it into the model it was made from."
        )
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in arrays.items()})


@contextlib.contextmanager
def evaluating(model):
    """Put `model` into evaluation mode without gradients, and back."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield model
    finally:
        model.train(was_training)


def _chunks(rows, size):
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def apply(model, inputs, rows, *, pick=lambda output: output, device="auto", batch_size=256, description="predicting"):
    """Map `model` over the inputs of `rows` in batches, without gradients, in float32.

    Parameters
    ----------
    model : nn.Module
        Moved to the device.
    inputs : object with ``batch(indices)``
    rows : array of int (n,)
    pick : callable
        Takes the model's output to the tensor (b, p) that is wanted.

    Returns
    -------
    ndarray (n, p), float32
    """
    on = runtime.device(device)
    model.to(on)
    results = []
    with evaluating(model):
        for part in runtime.track(_chunks(np.asarray(rows), batch_size), description):
            results.append(pick(model(torch.from_numpy(inputs.batch(part)).to(on))).float().cpu().numpy())
    return np.concatenate(results)


@dataclass(frozen=True)
class Run:
    """A finished run folder, opened."""

    folder: Path
    config: TrainConfig
    recipe: dict
    metrics: pd.DataFrame  # one row a line of metrics.jsonl
    difficulty: pd.DataFrame  # row, epoch_1, epoch_2, ...


def load_run(folder):
    """Open a finished run folder.

    Raises
    ------
    CacheError
        The folder is no finished run, or a file of it is damaged.
    """
    folder = Path(folder)
    if not (folder / "difficulty.parquet").exists():
        raise CacheError(f"{runtime.relative(folder)} holds no finished run", "Train first: rsd run 01_train_vit.")
    made_from = runtime.read_json(folder / "config.json")
    return Run(
        folder,
        TrainConfig(**made_from["train"]),
        made_from["recipe"],
        pd.read_json(folder / "metrics.jsonl", lines=True),
        pd.read_parquet(folder / "difficulty.parquet"),
    )
