"""A tiny captioner on captions of uneven length: ``torchrun toy_blip.py BLIP FOLDER`` trains it."""

import sys
from pathlib import Path

import numpy as np
import torch
import toy

from rsdlib import training
from rsdlib.config import TrainConfig
from rsdlib.data import PairStore, pack
from rsdlib.models import CaptionObjective, open_captioner

PARTS = (1, 2, 3)  # micro-batches
WORDS = np.array(["a", "fox", "in", "snow", "two", "cats", "at", "night", "watercolor", "tent"])
LENGTHS = (1, 6, 12)  # words in a caption
OBJECTIVE = CaptionObjective(weight=0.1, pad=0)


def data(model, count=20, words=5):
    """Return pairs whose captions differ in length."""
    rng = np.random.default_rng(0)
    captions = [" ".join(rng.choice(WORDS, LENGTHS[row % 3])) for row in range(count)]
    images = rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    labels = pack(rng.random((count, words)) < 0.5)
    train, val = np.arange(count - 5), np.arange(count - 5, count)
    return PairStore(toy.Memory(images), model.encode(captions), labels, words, train, val)


def fit(blip, folder, micro_batches=1, objective=OBJECTIVE):
    """Train the captioner in folder `blip` in batches of seven; return the run's folder."""
    config = TrainConfig(
        epochs=2,
        batch_size=7,
        micro_batches=micro_batches,
        lr=1e-3,
        precision="fp32",
        log_every=1,
        device="cpu",
    )
    torch.manual_seed(0)
    model = open_captioner(str(blip), 5)
    assert model.pad == OBJECTIVE.pad
    return training.fit(model, data(model), config, folder, objective=objective)


if __name__ == "__main__":
    for number in PARTS:
        fit(sys.argv[1], Path(sys.argv[2]) / f"two in {number}", number)
