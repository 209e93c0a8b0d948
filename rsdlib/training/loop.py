"""The one training loop. It knows no model: an objective maps (model, batch) to a loss.

Everything random is a function of (seed, step), so a checkpoint needs no generator states, and a
resumed run takes the very steps that the uninterrupted one would have taken.
"""

import contextlib
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from rsdlib import files, runtime
from rsdlib.config import as_dict
from rsdlib.data import evaluating
from rsdlib.errors import BadValueError, DeviceError, RsdError
from rsdlib.training import processes, runs

# --- plan -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """Some epochs over some of the training rows; a curriculum is a list of stages.

    Attributes
    ----------
    rows : ndarray of int
    epochs : int
    """

    rows: np.ndarray
    epochs: int


class Plan:
    """Which rows every step reads and at which rate: functions of the step alone.

    Parameters
    ----------
    stages : list of Stage
    config : rsdlib.config.TrainConfig

    Raises
    ------
    BadValueError
        A stage has less than two rows: BatchNorm cannot train on a single sample.
    """

    def __init__(self, stages, config):
        if not stages or min(len(stage.rows) for stage in stages) < 2:
            raise BadValueError("nothing to train on: a stage with less than two rows", "Add data.")
        self.config = config
        self.epochs = [stage.rows for stage in stages for _ in range(stage.epochs)]
        # A last batch of one row joins the one before: BatchNorm cannot train on it alone.
        steps = [math.ceil((len(rows) - 1) / config.batch_size) for rows in self.epochs]
        self.starts = np.concatenate([[0], np.cumsum(steps)])  # of each epoch, then the total
        self.total = int(self.starts[-1])

    def settings(self, recipe=None):
        """Return what ``config.json`` says of a run that takes this plan."""
        order = files.digest([rows.tolist() for rows in self.epochs])
        return {"train": as_dict(self.config), "stages": order, "recipe": recipe or {}}

    def epoch(self, step):
        """Return the epoch that holds `step`."""
        return int(np.searchsorted(self.starts, step, side="right")) - 1

    def batches(self, step=0):
        """Yield the rows of the global batch of `step` and of each step after it."""
        for epoch in range(self.epoch(step), len(self.epochs)):
            order = runtime.rng("order", self.config.seed, epoch).permutation(self.epochs[epoch])
            start, end = self.starts[epoch : epoch + 2].tolist()
            batches = np.split(order, self.config.batch_size * np.arange(1, end - start))
            yield from batches[max(step - start, 0) :]

    def lr_factor(self, step):
        """Return the rate of `step` as a share of its peak.

        Linear warm-up, then one half cosine to ``lr_min`` over all stages.
        """
        config = self.config
        warmup = int(config.warmup * self.total)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        low = min(config.lr_min / config.lr, 1.0) if config.lr else 1.0
        progress = (step - warmup) / max(self.total - warmup, 1)
        return low + (1 - low) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def _split(rows, count):
    """Split rows evenly into at most `count` parts, none of a single row: BatchNorm again."""
    return np.array_split(rows, max(min(count, len(rows) // 2), 1))


class _Batches(torch.utils.data.Dataset):
    """What a process reads for a global batch: its parts, and what they must know of the whole."""

    def __init__(self, data, objective, config, rank, world):
        self.data, self.objective, self.config = data, objective, config
        self.rank, self.world = rank, world

    def __getitem__(self, rows):
        shares = _split(rows, self.world)
        if self.rank < len(shares):
            parts = _split(shares[self.rank], self.config.micro_batches)
            weights = [len(part) / len(rows) for part in parts]
        else:  # fewer rows than processes: this one joins in with no weight
            parts, weights = [rows[:2]], [0.0]
        batches = [self.data.batch(part) for part in parts]
        return list(zip(batches, parts, weights, strict=True)), self.whole(rows)

    def whole(self, rows):
        """Return what the objective wants every part of a global batch to know of all its rows."""
        about = getattr(self.objective, "whole", None)
        return about(self.data.answers(rows)) if about else {}


# --- the loop -------------------------------------------------------------------------------------


class Callback:
    """Watches or changes a run; every hook may be left out.

    `state` is the running loop: it has ``step``, ``plan``, ``model`` (unwrapped) and ``optimizer``;
    `record` is the epoch's line of ``metrics.jsonl``.
    """

    def begin(self, state):
        """Run once, before a checkpoint is taken up."""

    def before_step(self, state):
        """Run before each step."""

    def after_epoch(self, state, record):
        """Run after each epoch's validation."""

    def end(self, state):
        """Run once, after the last step or what stopped the run before."""


def fit(model, data, config, folder, *, objective, stages=None, callbacks=(), recipe=None):
    """Train `model`, resuming by itself, and return the run folder.

    The folder holds ``config.json`` (before the first step), ``run.json``, ``metrics.jsonl``,
    ``checkpoint.safetensors``, ``model.safetensors`` (the epoch with the best validation
    similarity) and ``difficulty.parquet`` (each training sample's similarity in each epoch,
    recorded in the training pass itself). A finished run is returned as it is.

    Parameters
    ----------
    model : nn.Module
        Ends with the weights of the best epoch.
    data : rsdlib.data.PairStore or alike
        Has ``batch(rows)``, ``answers(rows)``, ``train``, ``val`` and a length.
    config : rsdlib.config.TrainConfig
    folder : path-like
    objective : callable
        ``objective(model, batch) -> (loss, similarity (b,))``; the loss is a mean over the batch's
        rows. With a method ``whole(answers) -> dict``, what that says of a *global* batch joins
        each of its parts, so that other means than those over rows add up, too.
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
        The folder holds a run made from other settings, or of another version's layout.
    RunBusyError
        Another process trains in the same folder.

    Notes
    -----
    Under ``torchrun --nproc-per-node k`` each process takes its share of every global batch. Losses
    are those of one process but for dropout, whose masks depend on the shares. So they are for any
    number of micro-batches, but for BatchNorm, which then sees the rows of one in one process. The
    caller's random state is left as it was.
    """
    folder = Path(folder)
    plan = Plan(stages or [Stage(np.asarray(data.train), config.epochs)], config)
    writes = runtime.is_main_process() and not runs.is_finished(folder)
    with runs.locked(folder) if writes else contextlib.nullcontext():
        runs.claim(folder, plan.settings(recipe))
        if not runs.is_finished(folder):
            device = runtime.device(config.device)
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                _Loop(model, data, plan, folder, objective, callbacks).run()
    runs.load_weights(model, folder / runs.WEIGHTS)
    return folder


class _Loop:
    """One call of `fit`: where it stands, and what is gathered between two checkpoints."""

    def __init__(self, model, data, plan, folder, objective, callbacks):
        self.data, self.folder = data, folder
        self.objective, self.callbacks = objective, callbacks
        self.plan, self.config, self.model = plan, plan.config, model
        self.accelerator = _accelerator(self.config)
        self.device = self.accelerator.device
        # Ours: accelerate's own would stay behind in the model's `forward`.
        self.precision = runtime.precision(self.config.precision, self.device)
        bf16 = self.precision == "bf16"
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.reader = _Batches(data, objective, self.config, self.rank, self.world)
        how = {"lr": self.config.lr, "weight_decay": self.config.weight_decay, "fused": True}
        self.optimizer = torch.optim.AdamW(_groups(model), **how)
        self.step, self.best_score, self.records = 0, -math.inf, []
        self.history = np.full((len(plan.epochs), len(data)), np.nan, np.float32)
        for callback in callbacks:
            callback.begin(self)
        together = self.world > 1 and self.config.micro_batches == 1
        self.norms = processes.shared_norms(model) if together else contextlib.nullcontext()
        if self.config.compile:
            model.compile()
        self.wrapped = self.accelerator.prepare_model(model.to(self.device))
        # This epoch's similarities, NaN where there is none, and the loss since the last line: on
        # the device, so that no step waits for the host.
        self.similarity = torch.full((len(data),), np.nan, device=self.device)
        self.loss = torch.zeros((), dtype=runtime.exact(self.device), device=self.device)
        self._resume()

    def run(self):
        self.started = time.monotonic()
        self.first_step = self.logged_step = self.step
        self.wrapped.train()
        try:
            self._steps()
        finally:
            for callback in self.callbacks:
                callback.end(self)
            self.model._compiled_call_impl = None  # the model is left as it came
        if self.accelerator.is_main_process:
            rows = np.unique(np.concatenate(self.plan.epochs))
            columns = {f"epoch_{e}": values[rows] for e, values in enumerate(self.history, 1)}
            table = pd.DataFrame({"row": rows, **columns})
            files.write_parquet(self.folder / runs.DIFFICULTY, table)
        self.accelerator.wait_for_everyone()
        self.accelerator.free_memory()

    def _steps(self):
        for parts, whole in self._loader():
            self._step(parts, whole)
            self.step += 1
            epoch = self.plan.epoch(self.step - 1)
            if self.step == self.plan.starts[epoch + 1]:
                self._end_epoch(epoch)
            elif self.step % self.config.save_every == 0:
                self._log(epoch)
                self.history[epoch] = self._similarities()
                self._save(epoch)
            elif self.step % self.config.log_every == 0:
                self._log(epoch)

    def _loader(self):
        on_gpu, workers = self.device.type == "cuda", self.config.workers
        usual = 2 * (on_gpu and sys.platform != "win32")  # there they lack what a notebook defines
        how = {"num_workers": usual if workers is None else workers, "pin_memory": on_gpu}
        how["generator"] = torch.Generator()  # the loader draws from it, not from the caller's
        batches = self.plan.batches(self.step)
        return torch.utils.data.DataLoader(self.reader, sampler=batches, batch_size=None, **how)

    def _step(self, parts, whole):
        config = self.config
        for callback in self.callbacks:
            callback.before_step(self)
        factor = self.plan.lr_factor(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * factor * group.get("lr_scale", 1.0)
        torch.manual_seed(runtime.torch_seed("step", config.seed, self.step, self.rank))
        for number, (batch, rows, share) in enumerate(parts, 1):
            self.norms.counts = float(share > 0)
            is_last = number == len(parts)
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.wrapped):
                loss, similarity = self._backward(batch, whole, share)
            if share:
                where = torch.as_tensor(rows, device=self.device)
                self.loss += loss.detach().to(self.loss) * share
                self.similarity[where] = similarity.detach().float()
        if config.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _backward(self, batch, whole, share):
        """Add the gradients of one part of a global batch; return its loss and similarities."""
        size = len(next(iter(batch.values())))
        batch = self._to_device(batch) | whole
        try:
            # Checkpointed layers run again on the way back.
            with _attention(self.device), self.norms:
                with self.autocast:
                    loss, similarity = self.objective(self.wrapped, batch)
                # Processes average their gradients: times their number, shares add up to the mean.
                self.accelerator.backward(loss * (share * self.world))
        except torch.OutOfMemoryError as error:
            message = f"{self.device} has too little memory for {size} pairs at once"
            again = f"Run it again with micro_batches={2 * self.config.micro_batches}"
            raise DeviceError(message, f"{again}: it goes on from the last checkpoint.") from error
        return loss, similarity

    def _to_device(self, batch):
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def _similarities(self):
        """Return this epoch's similarities so far over all processes, NaN where there is none."""
        visited = self.similarity.isfinite()
        sums = [self.similarity.where(visited, 0), visited.float()]
        similarity, visited = self.accelerator.reduce(sums, "sum")
        return similarity.where(visited > 0, np.nan).cpu().numpy()

    def _log(self, epoch, **more):
        """Add a line to the metrics: the mean loss since the last one."""
        step = self.step
        loss = float(self.accelerator.reduce(self.loss, "sum")) / max(step - self.logged_step, 1)
        if not math.isfinite(loss):
            message = f"the loss is not finite between steps {self.logged_step} and {step}"
            raise RsdError(message, "Lower lr, or use precision='fp32': the checkpoint is intact.")
        self.loss.zero_()
        rate = (step - self.first_step) / (time.monotonic() - self.started)
        lr = self.config.lr * self.plan.lr_factor(step - 1)
        record = {"step": step, "epoch": epoch, "loss": loss, "lr": lr}
        self.records.append({**record, "steps_per_second": round(rate, 3), **more})
        self.logged_step = step
        if self.accelerator.is_main_process:
            lines = "".join(json.dumps(record) + "\n" for record in self.records)
            files.write_text(self.folder / runs.METRICS, lines)

    def _end_epoch(self, epoch):
        self.history[epoch] = self._similarities()
        self.similarity.fill_(np.nan)
        train = float(np.nanmean(self.history[epoch]))
        val, val_loss = self._validate()
        self._log(epoch, train_similarity=train, val_similarity=val, val_loss=val_loss)
        is_best = val > self.best_score
        self.best_score = max(self.best_score, val)
        if is_best and self.accelerator.is_main_process:
            meta = {"epoch": epoch, "val_similarity": val}
            runs.save_weights(self.model, self.folder / runs.WEIGHTS, meta)
        seconds = (time.monotonic() - self.started) / (self.step - self.first_step)
        left = f"about {(self.plan.total - self.step) * seconds:.0f} s left"
        cosines = f"cosine train {train:.4f}, val {val:.4f}{' (best)' if is_best else ''}"
        runtime.log(f"epoch {epoch + 1}/{len(self.plan.epochs)}: {cosines}, {left}")
        for callback in self.callbacks:
            callback.after_epoch(self, self.records[-1])
        self._save(epoch)

    def _validate(self):
        """Return mean similarity and loss over the validation rows, each row once."""
        rows = np.asarray(self.data.val)
        if not len(rows):
            raise BadValueError("there are no validation rows", "Raise val_fraction or add data.")
        mine = np.array_split(rows, self.world)[self.rank]
        whole = self.reader.whole(rows)
        size = max(self.config.batch_size // self.config.micro_batches, 1)
        sums = torch.zeros(2).to(self.loss)
        with evaluating(self.model), self.autocast:
            for start in range(0, len(mine), size):
                part = mine[start : start + size]
                batch = self._to_device(self.data.batch(part)) | whole
                loss, similarity = self.objective(self.model, batch)
                sums += torch.stack([similarity.to(sums).sum(), loss.to(sums) * len(part)])
        return (self.accelerator.reduce(sums, "sum") / len(rows)).tolist()

    def _save(self, epoch):
        if self.accelerator.is_main_process:
            meta = {"step": self.step, "best_score": self.best_score, "records": self.records}
            path, history = self.folder / runs.CHECKPOINT, self.history[: epoch + 1]
            runs.save_checkpoint(path, self.model, self.optimizer, history, meta)

    def _resume(self):
        """Take up the checkpoint if there is one, and its half-finished epoch; say what changed."""
        path = self.folder / runs.CHECKPOINT
        now = {**runtime.environment(), "device": str(self.device), "precision": self.precision}
        if not path.exists():
            if self.accelerator.is_main_process:
                files.write_json(self.folder / runs.ENVIRONMENT, now)
            return
        history, meta = runs.load_checkpoint(path, self.model, self.optimizer)
        self.history[: len(history)] = history
        vars(self).update(meta)
        before = files.read_json(self.folder / runs.ENVIRONMENT)
        watched = ("threads", "versions", "cpu_capability", "gpu", "device", "precision")
        changed = ", ".join(name for name in watched if before.get(name) != now[name])
        note = f"; {changed} changed since it began, so its last digits may differ"
        where = f"resuming at step {self.step} of {self.plan.total}{note if changed else ''}"
        runtime.log(f"{files.relative(self.folder)}: {where}")
        if not self.rank and self.step < self.plan.total:
            self.similarity.copy_(torch.from_numpy(self.history[self.plan.epoch(self.step)]))


def _accelerator(config):
    """Return accelerate's view of this machine, fresh: a process may train several times."""
    import accelerate

    device = runtime.device(config.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # accelerate takes the current one
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    many = torch.distributed.is_initialized()
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=not many)
    return accelerate.Accelerator(cpu=device.type == "cpu", mixed_precision="no")


def _attention(device):
    """Choose the attention to train with: on a CPU the fused one's backward pass is slow."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


def _groups(model):
    """Return the optimizer's groups: weight decay leaves out biases, norms and other vectors."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2]
    vectors = [p for p in trained if p.ndim < 2]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
