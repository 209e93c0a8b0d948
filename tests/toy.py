"""A toy training problem that takes milliseconds: also what the kill and torchrun tests run in processes of their own."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rsdlib import runtime, training
from rsdlib.config import TrainConfig
from rsdlib.losses import JointObjective
from rsdlib.model import PromptRegressor

CONFIG = TrainConfig(
    epochs=3, batch_size=8, lr=3e-3, warmup=0.1, weight_decay=0.01, precision="fp32", save_every=4, log_every=3, device="cpu"
)


class Memory:
    """Inputs held in memory."""

    def __init__(self, values):
        self.values = values

    def batch(self, indices):
        return self.values[indices]


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
    labels = training.pack(target @ rng.normal(size=(dim, words)) > 0.5)
    return training.PairData(Memory(images), target, labels, words, np.arange(n - 10), np.arange(n - 10, n))


def model(dropout=0.2, words=20, dim=12, seed=0):
    """Return a model whose weights depend on the seed alone."""
    torch.manual_seed(seed)
    return PromptRegressor(Backbone(dropout), "sequential", words, dim)


def fit(folder, config=CONFIG, dropout=0.2, **options):
    """Train the toy and return its folder."""
    return training.fit(model(dropout), data(), config, folder, objective=JointObjective(), **options)


def fingerprint(folder):
    """Hash what must be the same: weights, checkpoint and difficulty, and the metrics without their clock."""
    folder = Path(folder)
    arrays, meta = runtime.load_arrays(folder / "checkpoint.safetensors")
    for record in meta["records"]:
        record.pop("steps_per_second")
    total = hashlib.sha256(repr(meta).encode())
    for name in sorted(arrays):
        total.update(name.encode() + arrays[name].tobytes())
    for name in ("model.safetensors", "difficulty.parquet", "config.json"):
        total.update((folder / name).read_bytes())
    return total.hexdigest()


if __name__ == "__main__":  # torchrun tests/toy.py FOLDER
    fit(sys.argv[1], dropout=0.0)
