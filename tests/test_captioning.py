"""Captions: BLIP with and without vocabulary head."""

import re

import numpy as np
import pytest
import tiny
import torch

from rsdlib import training
from rsdlib.config import TrainConfig
from rsdlib.data import PairStore, pack, weights_key
from rsdlib.errors import ModelNotFoundError
from rsdlib.models import CaptionObjective, blip, caption_all, open_captioner

CONFIG = TrainConfig(epochs=80, batch_size=4, lr=1e-2, precision="fp32", device="cpu")
CAPTIONS = ["a fox in the snow", "two cats at night", "pixel art of a tent", "a tent at night"] * 3
torch.manual_seed(0)
COLOURS = np.random.default_rng(0).integers(0, 256, (4, 3, 1, 1))
IMAGES = np.tile(COLOURS, (3, 1, 32, 32)).astype(np.uint8)


class Images:
    ok, key = np.ones(12, bool), "colours"

    def batch(self, rows):
        return IMAGES[rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.blip(tmp_path_factory.mktemp("blip"))


def opened(folder, words=0):
    torch.manual_seed(0)
    return open_captioner(str(folder), words)


def captions(model, labels=None):
    words = 0 if labels is None else 5
    rows = np.arange(12)
    return PairStore(Images(), model.encode(CAPTIONS), labels, words, rows[:8], rows[8:])


# Training


def test_logits_are_blips_own(folder):
    model = opened(folder).eval()
    tokens = torch.from_numpy(model.encode(CAPTIONS[:4]))
    images = torch.from_numpy(IMAGES[:4])
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]))
    how = {"input_ids": tokens, "attention_mask": (tokens != 0).long()}
    with torch.no_grad():
        expected = model.blip(pixel_values=(images / 255 - mean) / std, **how).logits
        torch.testing.assert_close(model(images, tokens)[0], expected, atol=1e-5, rtol=1e-4)


def test_loss_by_hand_and_similarity_is_a_mean_probability(folder):
    model = opened(folder, words=5).eval()
    batch = {
        "input": torch.from_numpy(IMAGES[:2]),
        "target": torch.from_numpy(model.encode(CAPTIONS[:2])),
        "labels": torch.zeros(2, 5),
    }
    with torch.no_grad():
        loss, similarity = CaptionObjective(0.3, model.pad)(model, batch)
        logits, words = model(batch["input"], batch["target"])
    total, count, means = 0, 0, []
    for row, tokens in zip(logits.log_softmax(-1), batch["target"], strict=True):
        scores = [row[i, token] for i, token in enumerate(tokens[1:]) if token != 0]
        total, count = total - sum(scores), count + len(scores)
        means.append(torch.exp(sum(scores) / len(scores)))
    bce = -torch.log(1 - words.sigmoid()).mean()
    torch.testing.assert_close(loss, total / count + 0.3 * bce)
    torch.testing.assert_close(similarity, torch.stack(means))


PAD = 7  # not zero, and not a number that counts by chance


class Table(torch.nn.Module):
    """Answers from a table, whatever it is asked: as much of a model as an objective may use."""

    def __init__(self, rows=12, length=9, words=13, vocabulary=5):
        super().__init__()
        torch.manual_seed(1)
        self.logits = torch.nn.Parameter(torch.randn(rows, length, words))
        self.vocabulary = torch.nn.Parameter(torch.randn(rows, vocabulary))

    def forward(self, rows, tokens):
        return self.logits[rows], self.vocabulary[rows]


def uneven(rows=12, length=9, words=13):
    """Return a batch whose captions have from one to eight tokens to predict."""
    rng = np.random.default_rng(0)
    tokens = torch.from_numpy(rng.integers(8, words, (rows, length)))
    lengths = torch.from_numpy(np.sort(rng.integers(1, length, rows))[:, None])
    tokens[torch.arange(length) > lengths] = PAD
    labels = torch.from_numpy(rng.random((rows, 5)) < 0.5)
    return {"input": torch.arange(rows), "target": tokens, "labels": labels}


def descend(objective, parts, whole):
    """Return the loss and the gradients that parts of a global batch add up to."""
    model, total, rows = Table(), 0.0, sum(len(part["input"]) for part in parts)
    for part in parts:
        loss, _ = objective(model, part | whole)
        share = loss * len(part["input"]) / rows
        share.backward()
        total += share.item()
    return total, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("sizes", [[12], [6, 6], [1, 11], [4, 4, 4], [5, 3, 1, 3], [1] * 12])
def test_parts_of_uneven_captions_add_up_to_the_whole(sizes):
    """A mean over a part's tokens, weighted by its rows, was another objective for each split."""
    objective, batch = CaptionObjective(0.3, PAD), uneven()
    answers = {name: batch[name] for name in ("target", "labels")}
    loss, gradients = descend(objective, [batch], {})
    split = {name: value.split(sizes) for name, value in batch.items()}
    parts = [dict(zip(split, values, strict=True)) for values in zip(*split.values(), strict=True)]
    total, added = descend(objective, parts, objective.whole(answers))
    assert total == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(added, gradients, atol=1e-7, rtol=1e-5)


def test_one_part_is_the_plain_mean_over_tokens_to_the_last_bit():
    objective, batch, model = CaptionObjective(0.0, PAD), uneven(), Table()
    following, logits = batch["target"][:, 1:], model.logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), following.flatten(), reduction="none"
    )
    counts = following != PAD
    mean = (losses.view_as(following) * counts).sum() / counts.sum()
    whole = objective.whole(batch)
    assert whole == {"tokens": int(counts.sum()), "rows": 12}
    assert objective(model, batch | whole)[0].item() == mean.item()
    assert objective(model, batch)[0].item() == mean.item()


def test_every_weight_is_trained(folder):
    """Several processes wait for the gradient of each."""
    model = opened(folder, words=5)
    pairs = captions(model, pack(np.ones((12, 5), bool)))
    loss, _ = CaptionObjective(0.1, model.pad)(model, pairs.batch(np.arange(4)))
    loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_it_learns_to_caption_and_resumes(folder, tmp_path):
    model = opened(folder, words=5)
    labels = pack(np.random.default_rng(0).random((12, 5)) < 0.5)
    pairs, rows = captions(model, labels), np.arange(8, 12)
    objective = CaptionObjective(pad=model.pad)
    training.fit(model, pairs, CONFIG, tmp_path / "run", objective=objective)
    assert caption_all(model, Images(), rows, device="cpu") == CAPTIONS[8:]
    assert caption_all(model, Images(), rows, beams=1, device="cpu") == CAPTIONS[8:]
    again = opened(folder, words=5)
    training.fit(again, pairs, CONFIG, tmp_path / "run", objective=objective)
    assert weights_key(again) == weights_key(model)


# Captions


def test_a_batch_captions_as_single_images_do(folder):
    model = opened(folder).eval()
    images = torch.from_numpy(IMAGES[:4])
    for beams in (1, 2):
        together = model.caption(images, beams)
        assert together == [model.caption(image[None], beams)[0] for image in images]


def test_captions_never_run_away(folder, monkeypatch):
    monkeypatch.setattr(blip, "LENGTH", 7)
    model = opened(folder).eval()
    with torch.no_grad():
        model.blip.text_decoder.cls.predictions.bias[model.tokenizer.sep_token_id] = -1e9
    for text in model.caption(torch.from_numpy(IMAGES[:2])):
        assert len(model.tokenizer(text).input_ids) <= 7 + 2
        assert "[" not in text


@pytest.mark.parametrize("beams", [1, 3])
def test_nothing_is_said_three_times(folder, beams):
    """ "by rembrandt, by rembrandt, ...": one that would say one word for ever may not."""
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


def test_folder_without_a_captioner_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    with pytest.raises(ModelNotFoundError, match="no BLIP captioner"):
        open_captioner(str(tmp_path))
