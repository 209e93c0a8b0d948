"""Pretrain the mini world's image encoders: ``python data/mini/build/train_encoder.py vit``.

The counterpart of ImageNet pretraining: nouns, setting and medium of each picture are predicted
together. Resumes by itself; writes timm's own folder format to ``data/mini/<name>``, weights in
half precision.
"""

import common
import torch
import torch.nn.functional as F
from corpus import NAMES, Corpus
from torch import nn

from rsdlib import files, runtime
from rsdlib.data import evaluating

ENCODERS = {
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": 64, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4},
    ),
    "swin": (
        "swinv2_tiny_window8_256",
        {
            "img_size": 64,
            "patch_size": 4,
            "window_size": 8,
            "embed_dim": 48,
            "depths": (2, 2, 2),
            "num_heads": (3, 6, 12),
        },
    ),
}
SIZES = {name: len(NAMES[name]) for name in ("noun", "setting", "medium")}


class Classifier(nn.Module):
    """A timm encoder whose outputs are split into one group of logits for each label.

    Parameters
    ----------
    body : nn.Module
        Has as many outputs as there are classes in all groups.
    sizes : dict of str to int
        Classes of each label, ``noun`` among them.
    scale : int
        Pictures are enlarged so many times first.
    soft : bool
        Half of the pictures in training are blurred, all get a little noise.
    """

    def __init__(self, body, sizes, scale=1, soft=False):
        super().__init__()
        self.body, self.sizes, self.scale, self.soft = body, sizes, scale, soft

    def forward(self, images):
        """Map uint8 images (b, 3, 64, 64) to logits by label.

        For example noun (b, 60), setting (b, 8), medium (b, 7).
        """
        pixels = (images.float() - 127.5) / 127.5
        if self.soft and self.training:
            side = int(torch.randint(28, 64, ()))
            small = F.interpolate(pixels[::2], (side, side), mode="area")
            pixels[::2] = F.interpolate(small, pixels.shape[2:], mode="bilinear")
            pixels = pixels + 0.1 * torch.rand(
                len(pixels), 1, 1, 1, device=pixels.device
            ) * torch.randn_like(pixels)
        if self.scale > 1:
            pixels = F.interpolate(pixels, scale_factor=self.scale, mode="bilinear")
        logits = self.body(pixels)
        return dict(zip(self.sizes, logits.split(list(self.sizes.values()), dim=1), strict=True))


def objective(model, batch):
    """Sum of the losses, and for each picture the mean over labels of what is right."""
    logits = model(batch["input"])
    nouns = batch["noun"].float()
    # Per picture one or two of all nouns are there: the mean over nouns is scaled so that they
    # weigh as much as the other labels.
    loss = 30 * F.binary_cross_entropy_with_logits(logits["noun"].float(), nouns)
    right = named(logits["noun"], nouns)
    others = [name for name in model.sizes if name != "noun"]
    for name in others:
        loss = loss + F.cross_entropy(logits[name].float(), batch[name])
        right = right + (logits[name].argmax(1) == batch[name])
    return loss, right / len(model.sizes)


def named(logits, nouns):
    """Return the share of each picture's nouns (b,) among as many of its highest logits."""
    order = logits.argsort(dim=1, descending=True).argsort(dim=1)  # rank of each noun
    counts = nouns.sum(1, keepdim=True)
    return ((order < counts) & (nouns > 0)).sum(1) / counts[:, 0]


def labelled(corpus, names):
    """Return the corpus with the labels `names`, for `rsdlib.training.fit`."""
    return common.Pictures(corpus, {name: corpus.labels[name] for name in names}, *corpus.split())


def report(model, data):
    """Return the validation accuracy of each label, and the noun's on pictures of one object."""
    device = next(model.parameters()).device

    def judge(batch):
        logits = model(batch["input"].to(device))
        right = {
            name: (logits[name].argmax(1).cpu() == batch[name]).float()
            for name in model.sizes
            if name != "noun"
        }
        return {**right, "noun": named(logits["noun"].cpu(), batch["noun"].float())}

    with evaluating(model):
        right = common.mapped(judge, data, data.val)
    single = data.corpus.labels["count"][data.val] == 1
    means = {name: values.mean() for name, values in right.items()} | {
        "noun of one": right["noun"][single].mean()
    }
    return {name: round(float(value), 4) for name, value in means.items()}


def export(model, folder, architecture, options):
    """Write the network in timm's format.

    ``timm.create_model("local-dir:<folder>", pretrained=True)`` opens it.
    """
    classes, side = sum(model.sizes.values()), 64 * model.scale
    cfg = {
        "input_size": [3, side, side],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "crop_pct": 1.0,
        "num_classes": classes,
    }
    cfg |= {key: model.body.pretrained_cfg[key] for key in ("classifier", "first_conv")}
    cfg["label_names"] = [
        str(name) for label, size in model.sizes.items() for name in NAMES.get(label, range(size))
    ]
    config = {
        "architecture": architecture,
        "num_classes": classes,
        "pretrained_cfg": cfg,
        "model_args": options,
    }
    files.save_arrays(folder / "model.safetensors", common.half(model.body))
    files.write_json(folder / "config.json", {**config, "label_groups": model.sizes})
    runtime.log(f"written: {files.relative(folder)}")


def main():
    """Train one encoder, report, export."""
    import timm

    chosen = common.options(__doc__, name=list(ENCODERS), epochs=2, lr=1e-3, batch=64)
    architecture, options = ENCODERS[chosen.name]
    corpus = Corpus(chosen.renders)
    data = labelled(corpus, SIZES)
    common.seeded(chosen.name, chosen.seed)
    model = Classifier(
        timm.create_model(architecture, num_classes=sum(SIZES.values()), **options), SIZES
    )
    settings = common.config(chosen, batch_size=chosen.batch, lr=chosen.lr)
    common.train(chosen.name, model, data, settings, objective, {"encoder": ENCODERS[chosen.name]})
    print(report(model, data))
    export(model.cpu().eval(), common.MINI / chosen.name, architecture, options)


if __name__ == "__main__":
    main()
