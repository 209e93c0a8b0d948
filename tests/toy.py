"""A toy training problem of milliseconds; the kill and torchrun tests run it in own processes."""

import contextlib
import hashlib
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rsdlib import files, training
from rsdlib.config import TrainConfig, replace
from rsdlib.data import PairStore, pack
from rsdlib.models import JointObjective, PromptRegressor

CONFIG = TrainConfig(
    epochs=3,
    batch_size=8,
    lr=3e-3,
    warmup=0.1,
    weight_decay=0.01,
    precision="fp32",
    save_every=4,
    log_every=3,
    device="cpu",
)
# Three parts of batches of 7 rows, and of 3 at the end: split as they come, some have one row.
UNEVEN = replace(CONFIG, batch_size=7, micro_batches=3)
UNEVEN_STAGES = [training.Stage(np.arange(45), 1)]


class Memory:
    """A store in memory."""

    def __init__(self, values):
        self.values, self.ok = values, np.ones(len(values), bool)
        self.key = files.checksum({"values": values})[:16]

    def batch(self, rows):
        return self.values[rows]


class Backbone(nn.Module):
    """A perceptron with dropout on 4 x 4 images."""

    features = 16

    def __init__(self, dropout=0.2):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.GELU(), nn.Dropout(dropout))

    def forward(self, images):
        return self.body(images.float() / 255)


def data(n=60, words=20, dim=12, seed=0):
    """Return learnable pairs: the target is a linear map of the image."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 3, 4, 4), dtype=np.uint8)
    target = (images.reshape(n, -1) / 255 - 0.5) @ rng.normal(size=(48, dim))
    target = (target / np.linalg.norm(target, axis=1, keepdims=True)).astype(np.float32)
    labels = pack(target @ rng.normal(size=(dim, words)) > 0.5)
    train, val = np.arange(n - 10), np.arange(n - 10, n)
    return PairStore(Memory(images), target, labels, words, train, val)


def model(dropout=0.2, words=20, dim=12, seed=0):
    """Return a model whose weights depend on the seed alone."""
    torch.manual_seed(seed)
    return PromptRegressor(Backbone(dropout), "sequential", words, dim)


class NormAct(nn.BatchNorm1d):
    """A BatchNorm and its activation in one layer, as timm's convolutional encoders have them."""

    def forward(self, rows):
        return nn.functional.gelu(super().forward(rows))


def normed(dropout=0.2):
    """Return the model with a BatchNorm, which cannot train on a single sample."""
    changed = model(dropout)
    # Its gradient is zero but for rounding, of which Adam would make whole steps.
    changed.backbone.body[1].bias.requires_grad_(False)
    changed.backbone.body.insert(2, NormAct(16))
    return changed


class Stop(Exception):
    """Raised in the middle of a run."""


class StopAt(training.Callback):
    """Stops a run before a step."""

    def __init__(self, step):
        self.step = step

    def before_step(self, state):
        if state.step == self.step:
            raise Stop


def train(model, folder, config=CONFIG, **options):
    """Train a model on the toy's pairs and return its folder."""
    return training.fit(model, data(), config, folder, objective=JointObjective(), **options)


def fit(folder, config=CONFIG, dropout=0.2, **options):
    """Train the toy and return its folder."""
    return train(model(dropout), folder, config, **options)


def fingerprint(folder):
    """Hash what must be the same: weights, checkpoint, difficulty, metrics without the clock."""
    folder = Path(folder)
    arrays, meta = files.load_arrays(folder / "checkpoint.safetensors")
    for record in meta["records"]:
        record.pop("steps_per_second")
    total = hashlib.sha256(repr(meta).encode())
    for name in sorted(arrays):
        total.update(name.encode() + arrays[name].tobytes())
    for name in ("model.safetensors", "difficulty.parquet", "config.json"):
        total.update((folder / name).read_bytes())
    return total.hexdigest()


if __name__ == "__main__":  # torchrun tests/toy.py FOLDER
    runs = Path(sys.argv[1])
    fit(runs / "whole", dropout=0.0)
    fit(runs / "taken over", dropout=0.0)  # one process began it
    with contextlib.suppress(Stop):  # one process ends it
        fit(runs / "handed over", dropout=0.0, callbacks=[StopAt(9)])
    train(normed(), runs / "normed", UNEVEN, stages=UNEVEN_STAGES)
    # Batches of eight, and of three at the end: those are too few for two processes.
    train(normed(0.0), runs / "norms", stages=[training.Stage(np.arange(43), 3)])
