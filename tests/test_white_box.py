"""The U-Net that reads captions: what it reads, how it is fine-tuned, what of it goes back."""

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import squares
import tiny
import torch
from transformers import BlipForConditionalGeneration

from rsdlib import Predictor, config, data, experiment, files, models
from rsdlib.errors import BadValueError, ConfigError
from rsdlib.models import unet

ROOT = Path(__file__).parents[1]
IMAGES = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
IMAGES[0], IMAGES[1], IMAGES[2, 0] = 0, 255, 255


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a tiny Stable Diffusion and a tiny captioner."""
    place = tmp_path_factory.mktemp("models")
    captioner = tiny.blip(place / "blip")
    blip = BlipForConditionalGeneration.from_pretrained(captioner)
    with torch.no_grad():  # at its random weights it says the same of every picture
        for name, weight in blip.named_parameters():
            if "crossattention" in name and "LayerNorm" not in name:
                weight *= 20
    blip.save_pretrained(captioner)
    return tiny.stable_diffusion(place / "sd"), captioner


def opened(folders, **options):
    painter, captioner = map(str, folders)
    options = {"captioner": captioner, **options}
    return models.create(config.BackboneConfig("diffusers", painter, options=options))


@pytest.fixture(scope="module")
def encoder(folders):
    return opened(folders).eval()


@pytest.fixture(scope="module")
def inputs(encoder):
    with torch.no_grad():
        return encoder.front(IMAGES)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return squares.write(tmp_path_factory.mktemp("squares"))


def settings(source, folders=None):
    found = config.profile(
        "smoke", str(source), val_fraction=0.2, test_fraction=0.2, near_duplicate=0.99
    )
    if folders is None:
        return found
    painter, captioner = map(str, folders)
    return found.with_backbone("unet", model=painter, options={"captioner": captioner})


# What it reads


def test_it_reads_latents_and_the_text_of_the_captioners_own_caption(folders, encoder, inputs):
    captions = models.open_captioner(str(folders[1])).eval().caption(IMAGES, beams=1)
    assert len(set(captions)) > 1
    for spelled, caption in zip(encoder.captions(inputs), captions, strict=True):
        assert "".join(caption.split()).startswith("".join(spelled.split()))  # cut at 40 tokens
    latents, context = encoder.unpack(inputs)
    plain = models.create(config.BackboneConfig("diffusers", str(folders[0]))).eval()
    with torch.no_grad():
        torch.testing.assert_close(latents, plain.front(IMAGES))
        told = models.text_states(folders[0], captions)
        torch.testing.assert_close(context, told)
        torch.testing.assert_close(encoder(inputs), plain(latents, told))
        empty = encoder(inputs, encoder.context.expand_as(context))
        torch.testing.assert_close(empty, plain(latents))
        assert (encoder(inputs) - empty).abs().max() > 1e-6


def test_one_that_is_not_trained_stores_the_same_features(folders, encoder, inputs):
    painter, captioner = map(str, folders)
    how = {"options": {"captioner": captioner}, "fine_tune": "never"}
    frozen = models.create(config.BackboneConfig("diffusers", painter, **how))
    with torch.no_grad():
        torch.testing.assert_close(frozen.front(IMAGES), encoder(inputs))


def test_any_token_survives_half_precision():
    tokens = torch.tensor([[0, 1, 2047, 2048, 49_407], [49_405, 30_000, 4097, 12, 5]])
    latents = torch.randn(2, 4 * 9)
    rows = torch.cat([latents, tokens % unet.PAGE, tokens // unet.PAGE], dim=1).half()
    back, same = unet.split_rows(rows, channels=4, length=5)
    assert back.shape == (2, 4, 3, 3)
    assert torch.equal(same, tokens)


def test_pictures_are_shown_to_the_captioner_at_its_own_size(folders, encoder):
    large = IMAGES.repeat_interleave(2, 2).repeat_interleave(2, 3)
    seen = []
    captioner = encoder.front.captioner
    hook = captioner.blip.vision_model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["pixel_values"].shape[-1]), with_kwargs=True
    )
    with torch.no_grad():
        encoder.front(large)
    hook.remove()
    assert set(seen) == {32}


def test_a_changed_prompt_changes_no_input(source, folders, tmp_path):
    """The caption is made from the image alone."""
    other = shutil.copytree(source, tmp_path / "other")
    table = pd.read_csv(other / "metadata.csv")
    table["prompt"] = "an entirely different " + table["prompt"].str[::-1]
    table.to_csv(other / "metadata.csv", index=False)
    read = {}
    for folder in (source, other):
        found = settings(folder, folders)
        prepared = experiment.prepare(found.data)
        store = prepared.store(models.create(found.backbone("unet")), device="cpu")
        read[folder] = dict(zip(prepared.pairs["id"], store.batch(np.arange(8)), strict=False))
    ids = read[source].keys() & read[other].keys()
    assert len(ids) == 8
    for name in ids:
        np.testing.assert_array_equal(read[source][name], read[other][name])


def test_captioner_has_never_seen_a_prompt_of_the_data():
    """In every profile it is one as it came; the mini world's was there before its data."""
    for profile in config.PROFILES.values():
        name = profile.backbone("unet").options["captioner"]
        assert name in models.MODELS or name == "data/mini/blip"
    steps = re.search(r"mini-world: .*?\n(.*?)\n\n", (ROOT / "Makefile").read_text(), re.S).group(1)
    assert steps.index("train_blip.py") < steps.index("sample_dataset.py")
    learns = (ROOT / "data/mini/build/train_blip.py").read_text()
    assert "diffusiondb" not in learns
    assert "load_pairs" not in learns


def test_training_a_captioner_changes_no_caption_that_is_read(source, folders):
    found = settings(source, folders).with_backbone("blip", model=str(folders[1]))
    prepared = experiment.prepare(found.data)
    before = experiment.plan(found, "unet", prepared, weight=0.0).recipe
    experiment.train(found, "blip", prepared, weight=0.0, epochs=1)
    after = experiment.plan(found, "unet", prepared, weight=0.0).recipe
    assert before.front
    assert (after.front, after.images) == (before.front, before.images)


def test_context_is_chosen_by_name(source, folders):
    found = settings(source, folders)
    assert not found.with_context("unet", "empty").backbone("unet").options
    assert found.with_context("unet", "caption") == found
    with pytest.raises(ConfigError, match="context = 'prompt' is unknown"):
        found.with_context("unet", "prompt")


def test_what_captions_know_alone_is_scored(source, folders):
    found = settings(source, folders)
    prepared = experiment.prepare(found.data)
    encoder = models.create(found.backbone("unet"))
    store = prepared.store(encoder, device="cpu")
    scores = prepared.scores(store)
    experiment.predict_captions(scores, prepared, encoder, store)
    said = encoder.captions(torch.from_numpy(store.batch(scores.rows)))
    expected = data.embed([text or "." for text in said])
    np.testing.assert_allclose(scores.predictions[experiment.CAPTION], expected, atol=1e-5)
    means = [scores.cosine(name).mean() for name in (experiment.CAPTION, experiment.TRANSLATED)]
    assert means[0] < means[1]


# How it is fine-tuned


def test_maps_are_what_the_decoder_half_is_handed(folders, encoder, inputs):
    from diffusers import UNet2DConditionModel

    whole = UNet2DConditionModel.from_pretrained(folders[0], subfolder="unet").eval()
    handed = {}

    def listen(number):
        def notice(module, positional, named):
            handed[number] = named

        return notice

    for number, block in enumerate(whole.up_blocks):
        block.register_forward_pre_hook(listen(number), with_kwargs=True)
    steps = torch.tensor([0, 5, 500, 999])
    with torch.no_grad():
        latents, context = encoder.unpack(inputs)
        whole(latents, steps, context)
        *skips, mid = encoder.all_maps(latents, context, steps)
    torch.testing.assert_close(handed[0]["hidden_states"], mid)
    given = [
        map
        for number in sorted(handed, reverse=True)
        for map in handed[number]["res_hidden_states_tuple"]
    ]
    assert len(given) == len(skips)
    for map, skip in zip(given, skips, strict=True):
        torch.testing.assert_close(map, skip)


def test_noise_is_the_samplers(folders, encoder, inputs):
    from diffusers import DDIMScheduler

    latents, _ = encoder.unpack(inputs)
    torch.manual_seed(3)
    noised, steps = encoder.with_noise(latents)
    torch.manual_seed(3)
    torch.randint(1000, (4,))
    noise = torch.randn_like(latents)
    sampler = DDIMScheduler.from_pretrained(folders[0], subfolder="scheduler")
    torch.testing.assert_close(noised, sampler.add_noise(latents, noise, steps))
    assert len(steps.unique()) > 1


def test_noise_is_drawn_in_training_alone(folders, encoder, inputs):
    noised = opened(folders, noised=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(noised(inputs), encoder(inputs))
        noised.train()
        assert (noised(inputs) - noised(inputs)).abs().max() > 1e-4


def objective(folders, keep):
    return models.KeepingObjective(weight=0.0, keep=keep, original=opened(folders), share=1.0)


def regressor(folders):
    torch.manual_seed(1)
    return models.PromptRegressor(opened(folders), vocabulary_size=0, embedding_size=8)


def test_an_encoder_that_has_not_moved_keeps_everything(folders, inputs):
    model = regressor(folders)
    batch = {"input": inputs, "target": torch.eye(8)[:4]}
    plain, cosine = models.JointObjective(weight=0.0)(model, batch)
    loss, same = objective(folders, 100.0)(model, batch)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(same, cosine)
    with torch.no_grad():
        model.backbone.unet.mid_block.resnets[0].conv1.weight *= 1.1
    plain, _ = models.JointObjective(weight=0.0)(model, batch)
    losses = []
    for keep in (10.0, 100.0):
        torch.manual_seed(0)  # the same noise
        losses.append(objective(folders, keep)(model, batch)[0])
    near, far = losses
    assert near > plain
    torch.testing.assert_close(far - plain, 10 * (near - plain))


def test_keeping_holds_the_maps_where_the_original_has_them(folders, inputs):
    """And nothing of the original changes."""
    batch, moved = {"input": inputs, "target": torch.eye(8)[:4]}, {}
    for keep in (0.0, 100.0):
        model, loss = regressor(folders), objective(folders, keep)
        before = files.checksum({n: v.numpy() for n, v in loss.original.state_dict().items()})
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for step in range(20):
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss(model, batch)[0].backward()
            optimizer.step()
        assert before == files.checksum(
            {n: v.numpy() for n, v in loss.original.state_dict().items()}
        )
        latents, context = model.backbone.unpack(inputs)
        with torch.no_grad():
            pair = [m.all_maps(latents, context, 500) for m in (model.backbone, loss.original)]
        moved[keep] = float(unet.distances(*pair).mean())
    assert moved[100.0] < 0.2 * moved[0.0]


def test_options_of_the_fine_tuning_make_other_runs(source, folders):
    found = settings(source, folders)
    prepared = experiment.prepare(found.data)
    tried = [{}, {"noised": True}, {"keep": 1.0}, {"keep": 2.0}, {"context": "empty"}]
    tried += [{"frozen": ["unet.conv_in"]}, {"lr": 1e-5}, {"seed": 1}]
    trials = [experiment.white_box(found, prepared, **options) for options in tried]
    assert len({trial.folder for trial in trials}) == len(tried)
    assert trials[0].folder == experiment.plan(found, "unet", prepared, weight=0.0).folder
    assert trials[2].objective.keep == 1.0
    assert not trials[5].model.backbone.unet.conv_in.weight.requires_grad
    again = experiment.white_box(found, prepared, keep=1.0)
    assert again.folder == trials[2].folder
    with pytest.raises(ConfigError, match="context"):
        experiment.white_box(found, prepared, context="prompt")


def test_a_run_that_keeps_trains_and_is_opened_again(source, folders):
    found = settings(source, folders)
    prepared = experiment.prepare(found.data)
    trial = experiment.white_box(found, prepared, keep=1.0, noised=True, epochs=1)
    folder = trial.run()
    pred = experiment.predict(folder, prepared, trial.pairs.store, "test")
    np.testing.assert_allclose(np.linalg.norm(pred, axis=1), 1, atol=1e-5)
    assert experiment.load_model(folder)[0].backbone.noised
    pictures = prepared.pairs["image"].iloc[prepared.rows("test")].tolist()
    told = Predictor.load(folder, "cpu").predict(pictures, n_prompts=0).embeddings
    np.testing.assert_allclose(told, pred, atol=5e-3)  # latents are stored in half precision


# What of it goes back


def test_parts_and_blends_of_an_encoder_go_back(folders, encoder):
    from diffusers import UNet2DConditionModel

    moved = opened(folders)
    with torch.no_grad():
        for p in moved.parameters():
            p += 1
    whole = UNet2DConditionModel.from_pretrained(folders[0], subfolder="unet")
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    for blend, parts in ((-0.5, ("",)), (1.0, ("mid_block",)), (0.5, ("conv_in", "down_blocks.1"))):
        whole.load_state_dict(before)
        models.into_unet(moved, whole, blend, parts)
        for name, value in whole.state_dict().items():
            taken = name.startswith(parts) and not name.startswith(unet.DROPPED)
            torch.testing.assert_close(value, before[name] + (blend if taken else 0.0))
    with pytest.raises(BadValueError, match="no part 'midblock'"):
        models.into_unet(moved, whole, 1.0, ("midblock",))
