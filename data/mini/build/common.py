"""What the mini world's training scripts share: options, data, run folders, export."""

import argparse
from dataclasses import dataclass

import numpy as np
import torch
from corpus import Corpus

from rsdlib import files, runtime, training
from rsdlib.config import TrainConfig

MINI = files.root() / "data" / "mini"
JUDGES_SEED = 1  # of the renders that only the judge learns from
FRESH = 2  # of the renders that nobody learns from


@dataclass(frozen=True)
class Pictures:
    """A corpus with the fields a script needs, as `rsdlib.training.fit` reads it.

    Attributes
    ----------
    corpus : Corpus
    fields : dict of str to ndarray
        Further columns of a batch, by row of the corpus.
    train, val : ndarray of int
        Rows.
    with_images : bool
        Whether a batch holds the pictures, as ``input``.
    """

    corpus: Corpus
    fields: dict
    train: np.ndarray
    val: np.ndarray
    with_images: bool = True

    def __len__(self):
        return len(self.corpus)

    def batch(self, indices):
        """Return a batch as tensors."""
        batch = {name: torch.from_numpy(values[indices]) for name, values in self.fields.items()}
        return batch | (
            {"input": torch.from_numpy(self.corpus.images(indices))} if self.with_images else {}
        )


def options(doc, **defaults):
    """Read a script's options.

    They are ``--renders``, ``--epochs``, ``--seed``, ``--device`` and whatever else has a default.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    for name, value in {
        "renders": 131_072,
        "epochs": 2,
        "seed": 0,
        "device": "auto",
        **defaults,
    }.items():
        if value is None:  # not an option of this script
            continue
        if isinstance(value, bool):
            parser.add_argument(f"--{name}", action="store_true")
        elif isinstance(value, list):
            parser.add_argument(name, choices=value)
        else:
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    return parser.parse_args()


def config(chosen, **settings):
    """Return a script's training settings: the project's own, with what the mini world changes."""
    settings = {
        "warmup": 0.05,
        "weight_decay": 0.05,
        "save_every": 1000,
        "log_every": 50,
        **settings,
    }
    return TrainConfig(epochs=chosen.epochs, seed=chosen.seed, device=chosen.device, **settings)


def seeded(name, seed):
    """Seed the global generator that initial weights are drawn from."""
    torch.manual_seed(runtime.torch_seed("weights", name, seed))


def train(name, model, data, settings, objective, recipe, callbacks=()):
    """Train in ``runs/mini-world/<name>-<key>``, resuming by itself, and return the folder."""
    recipe = {"model": name, "renders": len(data), **recipe}
    folder = (
        files.root()
        / "runs"
        / "mini-world"
        / f"{name}-{files.digest([recipe, settings.fixed()], 8)}"
    )
    training.fit(
        model, data, settings, folder, objective=objective, callbacks=callbacks, recipe=recipe
    )
    return folder


def mapped(function, data, rows, size=256):
    """Apply `function` to batches of rows without gradients and join what it returns, in row order.

    It returns a dict of tensors.
    """
    parts = np.array_split(np.asarray(rows), max(1, -(-len(rows) // size)))
    with torch.inference_mode():
        results = [function(data.batch(part)) for part in runtime.track(parts, "measuring")]
    return {
        name: torch.cat([result[name] for result in results]).cpu().float().numpy()
        for name in results[0]
    }


def half(module):
    """Return the module's weights in half precision, as arrays."""
    return {
        name: value.detach().cpu().half().numpy()
        if value.is_floating_point()
        else value.cpu().numpy()
        for name, value in module.state_dict().items()
    }


def save_half(model, folder):
    """Write a transformers model in its own format: half precision, to be opened in float32."""
    model.half().save_pretrained(folder)
    config = files.read_json(folder / "config.json")
    files.write_json(folder / "config.json", {**config, "dtype": "float32"})
    model.float()
