"""Captions: BLIP with and without vocabulary head, and the nearest known prompt."""

import re

import numpy as np
import pytest
import tiny
import torch

from rsdlib import captioning, training
from rsdlib.config import TrainConfig
from rsdlib.errors import BadValueError, ModelNotFoundError

CONFIG = TrainConfig(epochs=80, batch_size=4, lr=1e-2, precision="fp32", device="cpu")
CAPTIONS = ["a fox in the snow", "two cats at night", "pixel art of a tent", "a tent at night"] * 3
torch.manual_seed(0)
IMAGES = np.repeat(np.random.default_rng(0).integers(0, 256, (4, 3, 1, 1)), 32 * 32, axis=2).reshape(4, 3, 32, 32)
IMAGES = np.tile(IMAGES, (3, 1, 1, 1)).astype(np.uint8)


class Images:
    def batch(self, indices):
        return IMAGES[indices]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.blip(tmp_path_factory.mktemp("blip"))


def opened(folder, words=0):
    torch.manual_seed(0)
    return captioning.open_captioner(str(folder), words)


def captions(model, labels=None):
    words = 0 if labels is None else 5
    return training.PairData(Images(), model.encode(CAPTIONS), labels, words, np.arange(8), np.arange(8, 12))


def test_logits_are_blips_own(folder):
    model = opened(folder).eval()
    tokens = torch.from_numpy(model.encode(CAPTIONS[:4]))
    images = torch.from_numpy(IMAGES[:4])
    pixels = (images / 255 - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    with torch.no_grad():
        expected = model.blip(pixel_values=pixels, input_ids=tokens, attention_mask=(tokens != 0).long()).logits
        torch.testing.assert_close(model(images, tokens)[0], expected, atol=1e-5, rtol=1e-4)


def test_loss_by_hand_and_similarity_is_a_mean_probability(folder):
    model = opened(folder, words=5).eval()
    labels = torch.zeros(2, 5)
    batch = {"input": torch.from_numpy(IMAGES[:2]), "target": torch.from_numpy(model.encode(CAPTIONS[:2])), "labels": labels}
    with torch.no_grad():
        loss, similarity = captioning.CaptionObjective(0.3)(model, batch)
        logits, words = model(batch["input"], batch["target"])
    total, count, means = 0, 0, []
    for row, tokens in zip(logits.log_softmax(-1), batch["target"], strict=True):
        found = [row[i, token] for i, token in enumerate(tokens[1:]) if token != 0]
        total, count = total - sum(found), count + len(found)
        means.append(torch.exp(sum(found) / len(found)))
    bce = -torch.log(1 - words.sigmoid()).mean()
    torch.testing.assert_close(loss, total / count + 0.3 * bce)
    torch.testing.assert_close(similarity, torch.stack(means))


def test_it_learns_to_caption_and_resumes(folder, tmp_path):
    model = opened(folder, words=5)
    labels = training.pack(np.random.default_rng(0).random((12, 5)) < 0.5)
    data, rows = captions(model, labels), np.arange(8, 12)
    training.fit(model, data, CONFIG, tmp_path / "run", objective=captioning.CaptionObjective())
    assert captioning.caption_all(model, Images(), rows, device="cpu") == CAPTIONS[8:]
    assert captioning.caption_all(model, Images(), rows, beams=3, device="cpu") == CAPTIONS[8:]
    again = opened(folder, words=5)
    training.fit(again, data, CONFIG, tmp_path / "run", objective=captioning.CaptionObjective())
    assert training.weights_key(again) == training.weights_key(model)


def test_a_batch_captions_as_single_images_do(folder):
    model = opened(folder).eval()
    images = torch.from_numpy(IMAGES[:4])
    for beams in (1, 2):
        together = model.caption(images, beams)
        assert together == [model.caption(image[None], beams)[0] for image in images]


def test_captions_never_run_away(folder, monkeypatch):
    monkeypatch.setattr(captioning, "LENGTH", 7)
    model = opened(folder).eval()
    with torch.no_grad():
        model.blip.text_decoder.cls.predictions.bias[model.tokenizer.sep_token_id] = -1e9
    for text in model.caption(torch.from_numpy(IMAGES[:2])):
        assert len(model.tokenizer(text).input_ids) <= 7 + 2
        assert "[" not in text


@pytest.mark.parametrize("beams", [1, 3])
def test_nothing_is_said_three_times(folder, beams):
    """ "by rembrandt, by rembrandt, ...": a captioner that would say one word for ever may not."""
    model = opened(folder).eval()
    bias = model.blip.text_decoder.cls.predictions.bias
    with torch.no_grad():
        bias[model.tokenizer.all_special_ids] = -1e9
        bias[model.tokenizer("fox").input_ids[1]] = 1e9
    for text in model.caption(torch.from_numpy(IMAGES[:2]), beams):
        assert text.startswith("fox fox fox")
        assert len(re.findall("(?=fox fox fox)", text)) == 1
        assert text.count("fox") > 5  # it goes on trying


def test_empty_caption_is_an_empty_string(folder):
    model = opened(folder).eval()
    with torch.no_grad():
        model.blip.text_decoder.cls.predictions.bias[model.tokenizer.sep_token_id] = 1e9
    assert model.caption(torch.from_numpy(IMAGES[:2])) == ["", ""]


def test_long_captions_are_cut(folder):
    tokens = opened(folder).encode(["fox " * 500])
    assert tokens.shape == (1, 32)


@pytest.mark.parametrize(
    ("caption", "thing", "there"),
    [
        ("Two foxes, in the snow", "fox", True),
        ("a pair of scissors", "scissors", True),
        ("a hot air balloon at night", "hot air balloon", True),
        ("a balloon", "hot air balloon", False),
        ("a firefox", "fox", False),
        ("", "fox", False),
    ],
)
def test_caption_names_a_thing(caption, thing, there):
    assert captioning.shows(caption, thing) == there
    assert captioning.shows(caption, "zebra", thing) == there


def test_nearest_prompts():
    bank = np.eye(3)
    assert captioning.nearest_prompts(bank[[2, 0]] + 0.1, bank, ["a", "b", "c"]) == ["c", "a"]
    with pytest.raises(BadValueError, match="3 embeddings do not belong to 2 prompts"):
        captioning.nearest_prompts(bank, bank, ["a", "b"])


def test_folder_without_a_captioner_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    with pytest.raises(ModelNotFoundError, match="no BLIP captioner"):
        captioning.open_captioner(str(tmp_path))
