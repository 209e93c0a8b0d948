"""Pretrain the mini world's image encoders on what the renders show: ``python data/mini/build/train_encoder.py vit``.

The counterpart of ImageNet pretraining: nouns, setting and medium of each picture are predicted together. Resumes by itself;
writes timm's own folder format to ``data/mini/<name>``, weights in half precision. ``--judge`` trains on renders of another
seed: an eye that had no part in making what it judges.
"""

import argparse
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from corpus import NAMES, Corpus
from torch import nn

from rsdlib import runtime, training
from rsdlib.config import TrainConfig

ENCODERS = {
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": 64, "patch_size": 8, "embed_dim": 160, "depth": 6, "num_heads": 5},
    ),
    "swin": (
        "swinv2_tiny_window8_256",
        {"img_size": 64, "patch_size": 4, "window_size": 8, "embed_dim": 48, "depths": (2, 2, 4), "num_heads": (3, 6, 12)},
    ),
}
SIZES = {name: len(NAMES[name]) for name in ("noun", "setting", "medium")}


class Classifier(nn.Module):
    """An encoder with one linear layer for nouns, setting and medium."""

    def __init__(self, name):
        super().__init__()
        import timm

        architecture, options = ENCODERS[name]
        self.body = timm.create_model(architecture, num_classes=sum(SIZES.values()), **options)

    def forward(self, images):
        """Map uint8 images (b, 3, 64, 64) to logits: noun (b, 100), setting (b, 8), medium (b, 7)."""
        logits = self.body((images.float() - 127.5) / 127.5)
        return dict(zip(SIZES, logits.split(list(SIZES.values()), dim=1), strict=True))


@dataclass(frozen=True)
class Labelled:
    """A corpus as `rsdlib.training.fit` reads it."""

    corpus: Corpus
    train: np.ndarray
    val: np.ndarray

    def __len__(self):
        return len(self.corpus)

    def batch(self, indices):
        """Return images and labels as tensors."""
        labels = {name: torch.from_numpy(self.corpus.labels[name][indices]) for name in SIZES}
        return {"input": torch.from_numpy(self.corpus.images(indices)), **labels}


def objective(model, batch):
    """Sum of the three losses, and for each picture the share of nouns, setting and medium that is right."""
    logits = model(batch["input"])
    nouns = batch["noun"].float()
    loss = 30 * F.binary_cross_entropy_with_logits(
        logits["noun"].float(), nouns
    )  # a mean over 100 nouns, of which 1 to 3 are there
    right = named(logits["noun"], nouns)
    for name in ("setting", "medium"):
        loss = loss + F.cross_entropy(logits[name].float(), batch[name])
        right = right + (logits[name].argmax(1) == batch[name])
    return loss, right / 3


def named(logits, nouns):
    """Return the share of each picture's nouns among its highest logits, as many as it has nouns: (b,)."""
    order = logits.argsort(dim=1, descending=True).argsort(dim=1)  # rank of each noun
    counts = nouns.sum(1, keepdim=True)
    return ((order < counts) & (nouns > 0)).sum(1) / counts[:, 0]


def export(model, folder, name):
    """Write the encoder in timm's format: ``timm.create_model("local-dir:<folder>", pretrained=True)`` opens it."""
    architecture, options = ENCODERS[name]
    weights = {key: value.half().numpy() for key, value in model.body.state_dict().items()}
    classes, classifier = sum(SIZES.values()), model.body.pretrained_cfg["classifier"]
    cfg = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0, "classifier": classifier}
    config = {"architecture": architecture, "num_classes": classes, "pretrained_cfg": {**cfg, "num_classes": classes}}
    runtime.save_arrays(folder / "model.safetensors", weights)
    runtime.write_json(folder / "config.json", {**config, "model_args": options})


def main():
    """Train one encoder and export it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=ENCODERS)
    parser.add_argument("--renders", type=int, default=98_304)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--judge", action="store_true")
    options = parser.parse_args()
    corpus = Corpus(options.renders, seed=1 if options.judge else 0)
    data = Labelled(corpus, *corpus.split())
    config = TrainConfig(
        epochs=options.epochs, batch_size=64, lr=1e-3, warmup=0.05, weight_decay=0.05, seed=options.seed, device=options.device
    )
    torch.manual_seed(runtime.torch_seed("weights", options.name, options.seed))
    model = Classifier(options.name)
    name = f"judge-{options.name}" if options.judge else options.name
    key = runtime.digest([len(corpus), options.epochs, options.seed], 8)
    folder = runtime.root() / "runs" / "mini-world" / f"{name}-{key}"
    training.fit(
        model, data, config, folder, objective=objective, recipe={"encoder": ENCODERS[options.name], "renders": len(corpus)}
    )
    print({name: round(value, 4) for name, value in report(model, data).items()})
    export(
        model.cpu().eval(),
        runtime.cache_dir() / "judge" if options.judge else runtime.root() / "data" / "mini" / name,
        options.name,
    )


def report(model, data):
    """Return the validation accuracy of each label, and the noun's on pictures of one object."""
    device = next(model.parameters()).device
    right = {name: [] for name in (*SIZES, "single")}
    with training.evaluating(model):
        for rows in np.array_split(data.val, 16):
            batch = {name: value.to(device) for name, value in data.batch(rows).items()}
            logits = model(batch["input"])
            found = named(logits["noun"], batch["noun"].float())
            right["noun"].append(found)
            right["single"].append(found[torch.from_numpy(data.corpus.labels["count"][rows] == 1).to(device)])
            for name in ("setting", "medium"):
                right[name].append((logits[name].argmax(1) == batch[name]).float())
    return {name: float(torch.cat(values).mean()) for name, values in right.items()}


if __name__ == "__main__":
    main()
