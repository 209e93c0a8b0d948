"""The pretrained models that ship: they open through the libraries' own loaders and know what they are said to know."""

import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REPOSITORY

from rsdlib import data

sys.path.insert(0, str(REPOSITORY / "data" / "mini" / "build"))

from corpus import NAMES
from train_encoder import SIZES, named

MINI = REPOSITORY / "data" / "mini"


@pytest.fixture(scope="module")
def pictures():
    """Return 256 pictures of the data set and the truth about them; no encoder has seen these."""
    scenes = pd.read_parquet(MINI / "diffusiondb" / "scenes.parquet").merge(
        data.load_pairs(MINI / "diffusiondb")[["id", "image"]], left_on="image_name", right_on="id"
    )
    scenes = scenes.iloc[:: len(scenes) // 256][:256]
    images = np.stack([data.resize(data.open_image(locator), 64) for locator in scenes["image"]])
    return torch.from_numpy(images), scenes


@pytest.mark.parametrize("name", sorted(path.parent.name for path in MINI.glob("*/config.json")))
def test_encoder_names_what_pictures_show(name, pictures):
    import timm

    images, scenes = pictures
    model = timm.create_model(f"local-dir:{MINI / name}", pretrained=True).eval()
    with torch.inference_mode():
        logits = dict(zip(SIZES, model((images.float() - 127.5) / 127.5).split(list(SIZES.values()), dim=1), strict=True))
    for label in ("setting", "medium"):
        found = np.array(NAMES[label])[logits[label].argmax(1)]
        assert (found == scenes[label].to_numpy()).mean() > 0.97
    truth = torch.zeros(len(scenes), len(NAMES["noun"]))
    for row, nouns in zip(truth, scenes["nouns"], strict=True):
        row[[NAMES["noun"].index(noun) for noun in nouns]] = 1
    single = scenes["count"].to_numpy() == 1
    assert named(logits["noun"], truth)[single].mean() > 0.55  # chance is 0.01


def test_share_of_nouns_by_hand():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    nouns = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    assert named(logits, nouns).tolist() == [0.5, 1.0]
