"""Encoders: their own preprocessing, CLIP's tower, the U-Net's half, and the frozen fronts."""

import shutil

import numpy as np
import pytest
import tiny
import torch
from conftest import REPOSITORY

from rsdlib import config, weights
from rsdlib.data import features, stores, weights_key
from rsdlib.errors import BadValueError, CheckpointError, ConfigError, ModelNotFoundError
from rsdlib.models import (
    Encoder,
    JointObjective,
    PromptRegressor,
    clip_pair,
    create,
    into_unet,
    text_states,
    unet,
)

torch.manual_seed(0)
IMAGES = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
MLP = {"mlp": [32, 48], "dropout": 0.1}


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    return tiny.stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny.clip(tmp_path_factory.mktemp("clip"))


def opened(library, folder, load=True, seed=None, **settings):
    if seed is not None:
        torch.manual_seed(seed)
    return create(config.BackboneConfig(library, str(folder), **settings), load=load)


class Images:
    """As much of an image store as a `features` asks for."""

    def __init__(self, images, bad=(), key="a"):
        self.images, self.key = images, key
        self.ok = ~np.isin(np.arange(len(images)), bad)
        self.read = 0

    def batch(self, rows):
        assert self.ok[rows].all()
        self.read += len(rows)
        return self.images[rows]


# Any encoder


def test_encoder_normalises_as_its_weights_expect():
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.2, 0.1)
    encoder = Encoder(torch.nn.Identity(), 3, 4, mean, std)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    torch.testing.assert_close(encoder(IMAGES), (IMAGES / 255 - mean) / std)


@pytest.mark.parametrize("profile", ["smoke", "mini"])
def test_mini_vit_learns_from_its_own_size(profile):
    encoder = create(config.profile(profile).backbone("vit"))
    features = encoder(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    assert encoder.image_size == 64
    assert features.shape == (2, encoder.features)
    features.sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_paper_vit_has_the_papers_shape():
    """Architecture and preprocessing of the registered weights, without fetching them."""
    encoder = create(config.profile("paper").backbone("vit"), load=False)
    assert encoder.image_size == 224
    assert encoder.features == 768
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(86e6, rel=0.01)
    assert encoder.mean.flatten().tolist() == pytest.approx([127.5] * 3)
    batch = {
        "input": torch.zeros(1, 3, 224, 224, dtype=torch.uint8),
        "target": torch.ones(1, 384),
        "labels": torch.zeros(1, 1000),
    }
    loss, _ = JointObjective()(PromptRegressor(encoder), batch)
    loss.backward()
    assert np.isfinite(loss.item())


def test_any_timm_model_opens_at_its_own_size():
    encoder = create(config.profile("mini").backbone("timm:resnet18"), load=False)
    assert encoder.image_size == 224
    assert encoder.features == 512


@pytest.mark.parametrize(
    "name", ["mobilenetv3_small_050", "vgg11", "vit_tiny_patch16_224", "resnet18"]
)
def test_features_are_as_many_as_stated(name):
    encoder = opened("timm", name, pretrained=False).eval()
    side = encoder.image_size
    with torch.inference_mode():
        features = encoder(torch.zeros(1, 3, side, side, dtype=torch.uint8))
    assert features.shape == (1, encoder.features)


def test_gradient_checkpointing_changes_no_gradient():
    settings = config.profile("smoke").backbone("vit")
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = create(config.replace(settings, gradient_checkpointing=checkpointing))
        encoder(torch.full((2, 3, 64, 64), 100, dtype=torch.uint8)).sum().backward()
        grads.append([p.grad for p in encoder.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("library", ["timm", "open_clip"])
def test_unknown_model_is_named(library):
    with pytest.raises(ModelNotFoundError, match=f"{library} cannot build 'no_such_model'"):
        opened(library, "no_such_model", pretrained=False)


def test_unknown_library_is_named():
    with pytest.raises(ConfigError, match="no image encoder comes from 'keras'"):
        opened("keras", "vgg")


def test_parts_can_be_frozen(diffusion):
    parts = ("unet.conv_in.", "unet.down_blocks.0.")
    encoder = opened("diffusers", diffusion, frozen=[part[:-1] for part in parts])
    trained = {name: p.requires_grad for name, p in encoder.named_parameters()}
    assert trained == {name: not name.startswith(parts) for name in trained}
    assert set(trained.values()) == {True, False}
    with pytest.raises(ConfigError, match=r"no part .unet\.conv. to freeze"):
        opened("diffusers", diffusion, frozen=["unet.conv"])


# CLIP


def test_clip_tower_gives_open_clips_own_features(clip):
    import open_clip

    encoder = opened("open_clip", clip).eval()
    whole = open_clip.create_model(f"local-dir:{clip}").eval()
    colours = ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in colours)
    with torch.no_grad():
        torch.testing.assert_close(encoder(IMAGES), whole.encode_image((IMAGES / 255 - mean) / std))
    assert (encoder.features, encoder.image_size, encoder.front) == (24, 32, None)


def test_clip_without_its_weights_is_another_one(clip):
    first, second = (opened("open_clip", clip, pretrained=False) for _ in range(2))
    assert (first.body.proj != second.body.proj).any()


def test_both_towers_are_open_clips_own(clip):
    import open_clip

    encoder, read = clip_pair(config.BackboneConfig("open_clip", str(clip)), device="cpu")
    texts = ["a fox", "two cats at night", ""]
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip}")
    whole = open_clip.create_model(f"local-dir:{clip}").eval()
    with torch.no_grad():
        expected = whole.encode_text(tokenizer(texts), normalize=True).numpy()
        torch.testing.assert_close(
            encoder.body(torch.ones(1, 3, 32, 32)), whole.visual(torch.ones(1, 3, 32, 32))
        )
    np.testing.assert_array_equal(read(texts), expected)
    np.testing.assert_allclose(read(texts, batch_size=2), expected, atol=1e-6)


# Fronts: what is frozen below what is trained


def test_frozen_clip_is_read_once_and_only_the_perceptron_learns(clip):
    encoder = opened("open_clip", clip, options=MLP)
    assert (encoder.features, encoder.image_size) == (48, 32)
    images = Images(IMAGES.numpy())
    built = [features(images, encoder.front, device="cpu") for _ in range(2)]
    assert images.read == 3
    with torch.no_grad():
        whole = opened("open_clip", clip).eval()(IMAGES).numpy()
    for store in built:
        np.testing.assert_allclose(store.batch([2, 0]), whole[[2, 0]], atol=2e-3)
    model = PromptRegressor(encoder, vocabulary_size=5, embedding_size=7)
    model(torch.from_numpy(built[0].batch([0, 1, 2])))[0].sum().backward()
    assert all(p.grad is not None for p in model.backbone.parameters())
    assert all(p.grad is None for p in encoder.front.parameters())


@pytest.mark.parametrize(("library", "options"), [("open_clip", MLP), ("diffusers", {})])
def test_front_is_no_part_of_the_model(clip, diffusion, library, options):
    folder = clip if library == "open_clip" else diffusion
    encoder = opened(library, folder, options=options)
    model, front = PromptRegressor(encoder, vocabulary_size=0), encoder.front
    own = {p.data_ptr() for p in model.parameters()}
    assert own.isdisjoint(p.data_ptr() for p in front.parameters())
    assert not any(part in name for name in model.state_dict() for part in ("front", "vae"))
    assert not any(front is module for module in model.modules())
    model.to("meta").train()
    assert model.backbone.front is front
    assert {p.device.type for p in front.parameters()} == {"cpu"}
    assert not front.training
    assert not any(p.requires_grad for p in front.parameters())


def test_a_reloaded_perceptron_answers_through_the_clip_it_was_trained_on(clip):
    """It once was given a random one: the front was rebuilt as if its weights were to follow."""
    trained = opened("open_clip", clip, options=MLP, seed=1).eval()
    again = opened("open_clip", clip, options=MLP, load=False, seed=2).eval()
    assert weights_key(again.front) == weights_key(trained.front)
    assert weights_key(again) != weights_key(trained)
    again.load_state_dict(trained.state_dict())
    with torch.no_grad():
        answer = trained(trained.front(IMAGES))
        torch.testing.assert_close(again(again.front(IMAGES)), answer, rtol=0, atol=0)


def test_a_random_front_is_drawn_alike_with_and_without_loading(clip):
    how = {"options": MLP, "pretrained": False, "seed": 3}
    first, second = (opened("open_clip", clip, load=load, **how) for load in (True, False))
    assert weights_key(first.front) == weights_key(second.front)
    assert weights_key(first) == weights_key(second)


def test_a_reloaded_unet_encoder_keeps_its_autoencoder_and_needs_no_unet_file(diffusion, tmp_path):
    trained = opened("diffusers", diffusion, options={"norm_num_groups": 2})
    folder = shutil.copytree(diffusion, tmp_path / "sd")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    again = opened("diffusers", folder, load=False, options={"norm_num_groups": 2})
    assert weights_key(again.front) == weights_key(trained.front)
    assert (again.unet.conv_in.weight != trained.unet.conv_in.weight).any()
    assert again.unet.config.norm_num_groups == trained.unet.config.norm_num_groups == 4
    again.load_state_dict(trained.state_dict())


@pytest.mark.parametrize("named", ["by its path", "by a name of one's own"])
def test_a_reloaded_timm_model_needs_no_weights(tmp_path, monkeypatch, named):
    monkeypatch.setenv("RSD_MODELS", str(tmp_path))
    shutil.copytree(REPOSITORY / "data" / "mini" / "vit", tmp_path / "own-vit")
    (tmp_path / "own-vit" / "model.safetensors").unlink()
    name = tmp_path / "own-vit" if named == "by its path" else "own-vit"
    encoder = opened("timm", name, load=False)
    shipped = opened("timm", REPOSITORY / "data" / "mini" / "vit")
    encoder.load_state_dict(shipped.state_dict())
    with pytest.raises(ModelNotFoundError):
        opened("timm", name)


# Stored features


def test_stored_features_belong_to_their_images_and_weights(clip):
    front = opened("open_clip", clip, options=MLP).front
    store = features(Images(IMAGES.numpy()), front, device="cpu")
    other = features(Images(IMAGES.numpy(), key="b"), front, device="cpu")
    assert other.key != store.key
    with torch.no_grad():
        front.body.proj *= 2
    changed = features(Images(IMAGES.numpy()), front, device="cpu")
    assert changed.key != store.key
    assert (changed.batch([0]) != store.batch([0])).any()


def test_rows_without_an_image_have_no_features(clip):
    front = opened("open_clip", clip, options=MLP).front
    whole = features(Images(IMAGES.numpy()), front, device="cpu")
    store = features(Images(IMAGES.numpy(), bad=[1], key="b"), front, device="cpu")
    np.testing.assert_array_equal(store.ok, [True, False, True])
    np.testing.assert_allclose(store.batch([0, 2]), whole.batch([0, 2]), atol=1e-3)
    with pytest.raises(BadValueError, match="row 1 has no image"):
        store.batch([0, 1])


def test_stopped_computation_goes_on_at_the_first_shard_it_lacks(clip, monkeypatch, tmp_path):
    monkeypatch.setattr(stores, "_SHARD", 2)
    front = opened("open_clip", clip, options=MLP).front
    images = Images(torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8).numpy())
    whole = features(images, front, tmp_path / "whole", device="cpu")
    calls, own = [], front.forward

    def breaks(batch):
        calls.append(len(batch))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return own(batch)

    monkeypatch.setattr(front, "forward", breaks)
    with pytest.raises(KeyboardInterrupt):
        features(images, front, tmp_path / "part", device="cpu")
    monkeypatch.setattr(front, "forward", own)
    images.read = 0
    store = features(images, front, tmp_path / "part", device="cpu")
    assert images.read == 3  # two of four shards were there
    np.testing.assert_array_equal(store.batch(np.arange(7)), whole.batch(np.arange(7)))


def test_features_that_float16_cannot_hold_are_refused(tmp_path):
    front = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 2)).eval()
    with torch.no_grad():
        front[1].bias.fill_(1e6)

    class Front(torch.nn.Module):
        def forward(self, images):
            return front(images.float())

    with pytest.raises(BadValueError, match="not finite in float16"):
        features(Images(IMAGES.numpy()), Front(), tmp_path, device="cpu")


# The U-Net's encoder half


def whole_unet(folder):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet")


def test_features_are_those_inside_the_whole_unet(diffusion):
    encoder, whole = opened("diffusers", diffusion).eval(), whole_unet(diffusion).eval()
    inside = []
    whole.mid_block.register_forward_hook(lambda _, __, output: inside.append(output))
    latents, context = torch.randn(3, 4, 16, 16), torch.randn(3, 40, 16)
    close = {"atol": 1e-5, "rtol": 1e-5}
    with torch.no_grad():
        whole(latents, 0, context)
        torch.testing.assert_close(encoder.all_maps(latents, context)[-1], inside[0], **close)
        torch.testing.assert_close(encoder(latents, context), inside[0].mean((2, 3)), **close)
    assert encoder.features == 16


def test_context_is_the_empty_prompts_and_no_prompt_of_the_data(diffusion):
    encoder = opened("diffusers", diffusion).eval()
    empty, fox = text_states(diffusion, ["", "a fox in the snow"])
    torch.testing.assert_close(encoder.context, empty)
    latents = torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        told_nothing, told = (encoder(latents, text.expand(2, -1, -1)) for text in (empty, fox))
        torch.testing.assert_close(encoder(latents), told_nothing)
        assert (encoder(latents) - told).abs().max() > 1e-6


def test_latents_are_the_pipelines_own(diffusion):
    from diffusers import AutoencoderKL

    encoder = opened("diffusers", diffusion)
    vae = AutoencoderKL.from_pretrained(diffusion, subfolder="vae")
    with torch.no_grad():
        expected = vae.encode(IMAGES / 127.5 - 1).latent_dist.mode() * vae.config.scaling_factor
        torch.testing.assert_close(encoder.front(IMAGES), expected, atol=1e-5, rtol=1e-5)
    assert encoder.image_size == 32


class Recorder(torch.nn.Module):
    """An autoencoder that notes how many images it is given, and returns each one's mean."""

    class config:
        scaling_factor = 1.0

    def __init__(self):
        super().__init__()
        self.given = []

    def encode(self, pixels):
        self.given.append(len(pixels))
        self.latent_dist = self
        self.mode = lambda: pixels.mean((2, 3), keepdim=True)
        return self


@pytest.mark.parametrize(("side", "given"), [(512, [16, 16, 8]), (256, [40]), (1024, [4] * 10)])
def test_large_images_are_encoded_a_few_at_a_time(side, given):
    """256 of 512 pixels at once took 34 GB a tensor."""
    front = unet.Latents(Recorder())
    images = torch.zeros(40, 1, 1, 1, dtype=torch.uint8).expand(40, 3, side, side)
    images = images + torch.arange(40, dtype=torch.uint8).view(-1, 1, 1, 1)
    latents = front(images)
    assert front.vae.given == given
    torch.testing.assert_close(latents[:, 0, 0, 0], (torch.arange(40) - 127.5) / 127.5)


def test_slices_change_no_latent(diffusion, monkeypatch):
    front = opened("diffusers", diffusion).front
    with torch.no_grad():
        whole = front(IMAGES)
        monkeypatch.setattr(unet, "SLICE", 32 * 32)
        torch.testing.assert_close(front(IMAGES), whole, atol=1e-6, rtol=1e-5)


def test_encoder_goes_back_into_a_unet_unchanged_in_shape_and_name(diffusion):
    encoder, whole = opened("diffusers", diffusion), whole_unet(diffusion)
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    into_unet(encoder, whole)
    assert all((value == before[name]).all() for name, value in whole.state_dict().items())
    with torch.no_grad():
        for p in encoder.parameters():
            p += 1
    for blend in (0.0, 0.25, 1.0):
        whole.load_state_dict(before)
        into_unet(encoder, whole, blend)
        for name, value in whole.state_dict().items():
            shift = 0 if name.startswith(unet.DROPPED) else blend
            torch.testing.assert_close(value, before[name] + shift)


def test_encoder_of_another_architecture_is_refused_by_its_tensors(diffusion):
    from diffusers import UNet2DConditionModel

    settings = UNet2DConditionModel.load_config(diffusion, subfolder="unet")
    small = UNet2DConditionModel.from_config({**settings, "in_channels": 5})
    with pytest.raises(CheckpointError, match=r"1 tensors differ \(conv_in.weight"):
        into_unet(opened("diffusers", diffusion), small)


def test_text_of_another_width_is_refused(diffusion):
    with pytest.raises(ConfigError, match="24 numbers a token, the U-Net reads 16"):
        unet.UNetEncoder(whole_unet(diffusion), torch.zeros(40, 24))


def test_folder_without_a_pipeline_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RSD_MODELS", str(tmp_path))
    (tmp_path / "half").mkdir()
    with pytest.raises(ModelNotFoundError, match="no Stable Diffusion folder"):
        opened("diffusers", "half")
    with pytest.raises(ModelNotFoundError, match="is not registered"):
        opened("diffusers", "nowhere")


def test_unet_with_random_weights_takes_options_and_needs_no_unet_file(diffusion, tmp_path):
    folder = shutil.copytree(diffusion, tmp_path / "sd")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    how = {"pretrained": False, "options": {"block_out_channels": (8, 24)}}
    first, second = (opened("diffusers", folder, **how) for _ in range(2))
    assert first.features == 24
    assert (first.unet.conv_in.weight != second.unet.conv_in.weight).any()


def test_shipped_unet_reads_shipped_images():
    encoder = opened("diffusers", REPOSITORY / "data" / "mini" / "stable-diffusion").eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert encoder(encoder.front(images)).shape == (2, encoder.features)


# Where weights come from


def test_weights_that_are_nowhere_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match=r"vit_base.*RSD_MODELS"):
        weights.locate("vit_base_patch16_224.augreg_in21k_ft_in1k")
    with pytest.raises(ModelNotFoundError, match="not registered"):
        weights.locate("vit")


def test_override_folder_comes_first_and_its_bytes_are_checked(tmp_path, monkeypatch):
    folder = tmp_path / "all-MiniLM-L6-v2"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"not the model")
    monkeypatch.setenv("RSD_MODELS", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"other bytes .*: model\.safetensors"):
        weights.locate("all-MiniLM-L6-v2")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=r"lacks model\.safetensors"):
        weights.locate("all-MiniLM-L6-v2")
