"""The mini world's models: they open by the libraries' own loaders and know what they should."""

import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REPOSITORY

from mini_world import Judge
from rsdlib import data, models

sys.path.insert(0, str(REPOSITORY / "data" / "mini" / "build"))

import train_autoencoder
import train_blip
import train_clip
import wordpieces
from corpus import NAMES
from train_encoder import ENCODERS, SIZES, named

MINI = REPOSITORY / "data" / "mini"


@pytest.fixture(scope="module")
def pictures():
    """Return 300 pictures of the data set, uint8 (n, 3, 64, 64), and their rows.

    A row tells what was asked for and what was judged.
    """
    told = pd.read_parquet(MINI / "diffusiondb" / "scenes.parquet")
    pairs = data.load_pairs(MINI / "diffusiondb")
    pairs = pairs.merge(told, left_on="id", right_on="image_name")
    pairs = pairs[pairs["has_referent"]].iloc[:: len(pairs) // 330][:300]
    images = np.stack([data.resize(data.open_image(locator), 64) for locator in pairs["image"]])
    return torch.from_numpy(images), pairs


@pytest.fixture(scope="module")
def pipe():
    return models.open_pipeline(MINI / "stable-diffusion", device="cpu")


def multi_hot(nouns):
    truth = torch.zeros(len(nouns), len(NAMES["noun"]))
    for row, names in zip(truth, nouns, strict=True):
        row[[NAMES["noun"].index(name) for name in names]] = 1
    return truth


# What ships


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_sees_what_the_judge_sees(name, pictures):
    import timm

    images, rows = pictures
    model = timm.create_model(f"local-dir:{MINI / name}", pretrained=True).eval()
    with torch.inference_mode():
        groups = model((images.float() - 127.5) / 127.5).split(list(SIZES.values()), dim=1)
    logits = dict(zip(SIZES, groups, strict=True))
    for label in ("setting", "medium"):
        best = np.array(NAMES[label])[logits[label].argmax(1)]
        assert (best == rows[f"judged_{label}"].to_numpy()).mean() > 0.7  # chance is 0.14
    single = rows["relation"].to_numpy() == "single"
    assert (
        named(logits["noun"], multi_hot(rows["judged_nouns"]))[single].mean() > 0.5
    )  # chance is 0.02


def test_pipeline_opens_as_any_stable_diffusion_does(pipe):
    from diffusers import StableDiffusionPipeline

    opened = StableDiffusionPipeline.from_pretrained(MINI / "stable-diffusion")
    assert opened.safety_checker is None
    for part in (opened.unet, opened.vae, opened.text_encoder):
        assert {p.dtype for p in part.parameters()} == {torch.float32}
    assert opened.vae_scale_factor == 8
    assert sum(p.numel() for p in opened.unet.parameters()) < 6e6


def test_pictures_are_sampled_again_from_their_rows(pipe, pictures):
    images, rows = pictures
    rows, shipped = rows.iloc[:4], images[:4].permute(0, 2, 3, 1).numpy()
    made = models.sample_rows(pipe, rows)
    differ = np.abs(made.astype(int) - shipped).mean((1, 2, 3))
    assert (differ < 8).all()  # what WebP's chroma subsampling may cost
    other = models.sample_rows(pipe, rows.assign(seed=rows["seed"] + 1))
    assert (np.abs(other.astype(int) - shipped).mean((1, 2, 3)) > 2 * differ).all()


def test_a_picture_does_not_depend_on_its_batch(pipe):
    prompts = ["a cartoon of a fox in the snow", "neon sign of a tent", "a watercolor of two cats"]
    together = models.sample(pipe, prompts, [1, 2, 3], steps=4)
    alone = models.sample(pipe, prompts[1:2], [2], steps=4)
    assert np.abs(together[1].astype(int) - alone[0]).max() <= 2


def test_autoencoder_keeps_the_pictures(pipe, pictures):
    images, _ = pictures
    pixels = images[:100].float() / 255
    with torch.inference_mode():
        decoded = pipe.vae.decode(pipe.vae.encode(2 * pixels - 1).latent_dist.mode()).sample
    assert ((decoded + 1) / 2 - pixels).abs().mean() < 0.03


def test_clip_finds_the_prompt_of_a_picture(pictures):
    import open_clip

    images, rows = pictures
    name = f"local-dir:{MINI / 'clip'}"
    clip, tokenizer = open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)
    with torch.inference_mode():
        seen = clip.encode_image((images.float() - 127.5) / 127.5, normalize=True).numpy()
        read = clip.encode_text(tokenizer(rows["prompt"].tolist()), normalize=True).numpy()
    assert train_clip.recall(seen, read) > 0.4  # chance is 0.01


def test_text_encoder_of_the_pipeline_is_clips_text_tower(pipe):
    import open_clip

    clip = open_clip.create_model(f"local-dir:{MINI / 'clip'}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{MINI / 'clip'}")
    prompts = ["a fox in the snow", "TWO CATS, pixel art", ""]
    tokens = pipe.tokenizer(
        prompts, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    assert (tokens == tokenizer(prompts)).all()
    with torch.inference_mode():
        pooled = pipe.text_encoder(tokens).pooler_output @ clip.text_projection
        torch.testing.assert_close(pooled, clip.encode_text(tokens), atol=1e-4, rtol=1e-4)


def test_blip_names_what_it_sees(pictures):
    from transformers import BlipForConditionalGeneration, BlipProcessor

    images, rows = pictures
    single = np.flatnonzero(rows["relation"] == "single")
    blip = BlipForConditionalGeneration.from_pretrained(MINI / "blip").eval()
    tokenizer = BlipProcessor.from_pretrained(MINI / "blip").tokenizer
    said = train_blip.generate(blip, tokenizer, images[single])
    assert train_blip.noun_recall(said, multi_hot(rows["judged_nouns"].iloc[single]).numpy()) > 0.5
    assert not any("[" in text for text in said)


def test_pictures_show_what_was_asked_for(pictures):
    """Judged here and now, and as the data set says that they were."""
    images, rows = pictures
    judge, images = Judge.open(MINI / "judge", "cpu"), images.permute(0, 2, 3, 1).numpy()
    asked = rows.to_dict("records")
    agreement = pd.DataFrame(judge.agrees(images, asked))[(rows["relation"] == "single").to_numpy()]
    assert len(agreement) > 100
    assert agreement["noun"].mean() >= 0.7  # chance is 0.02
    assert agreement[["setting", "medium"]].mean().min() >= 0.9  # chance is 0.14
    verdicts = pd.DataFrame(judge.verdicts(images, [len(scene["nouns"]) for scene in asked]))
    rows = rows.reset_index()[list(verdicts)]
    for table in (verdicts, rows):
        table["judged_nouns"] = table["judged_nouns"].map(set)
    # The stored verdicts are of the pictures before they were compressed.
    assert ((verdicts == rows).mean() > 0.9).all()


# How they are made


def test_share_of_nouns_by_hand():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    nouns = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    assert named(logits, nouns).tolist() == [0.5, 1.0]


def test_nouns_in_captions_by_hand():
    nouns = multi_hot([["fox"], ["cat", "tent"], ["dog"]]).numpy()
    said = ["a cartoon of two foxes in the snow", "a cat and a category", "a hotdog"]
    assert train_blip.noun_recall(said, nouns) == 0.5


def test_recall_by_hand():
    images, texts = np.eye(4), np.eye(4)[[0, 1, 3, 2]]
    assert train_clip.recall(images, texts, group=2) == 0.5
    assert train_clip.recall(images, texts, group=4) == 0.5
    assert train_clip.recall(images, images, group=4) == 1


def test_centred_latents_have_no_mean_and_decode_alike():
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(**train_autoencoder.CONFIG).eval()
    pixels = torch.rand(4, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = vae.encode(pixels).latent_dist.mode()
        decoded = vae.decode(before).sample
        train_autoencoder.centre(vae, before)
        after = vae.encode(pixels).latent_dist.mode()
        torch.testing.assert_close(vae.decode(after).sample, decoded, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(after.mean((0, 2, 3)), torch.zeros(16), atol=1e-5, rtol=0)
    assert (after * vae.config.scaling_factor).std((0, 2, 3)).square().mean() == pytest.approx(
        1, rel=1e-3
    )


def test_clip_tokenizer_spells_what_it_has_not_seen():
    prompts = ["a fox in the snow", "two foxes at night", "a fox at night, watercolor"] * 3
    first, second = (wordpieces.clip_tokenizer(prompts, size=600) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert first.eos_token_id == len(first) - 1  # open_clip takes the largest number for the end
    assert first.tokenize("a fox") == ["a</w>", "fox</w>"]
    for text in ("zebra", "naïve café", "漢字!", "A FOX"):
        spelt = first.decode(first(text).input_ids, skip_special_tokens=True)
        assert spelt.replace(" ", "") == text.lower().replace(" ", "")
