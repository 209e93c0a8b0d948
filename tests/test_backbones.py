"""Encoders of the other libraries: CLIP's image tower, frozen or not, and the U-Net's encoder half."""

import numpy as np
import pytest
import tiny
import torch
from conftest import REPOSITORY

from rsdlib import backbones, config, unet
from rsdlib.errors import BadValueError, CheckpointError, ConfigError, ModelNotFoundError
from rsdlib.model import PromptRegressor

torch.manual_seed(0)
IMAGES = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    return tiny.stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny.clip(tmp_path_factory.mktemp("clip"))


def create(library, folder, **settings):
    return backbones.create(config.BackboneConfig(library, str(folder), **settings))


class Images:
    """As much of an image store as a `FeatureStore` asks for."""

    def __init__(self, images, bad=(), key="a"):
        self.images, self.key, self.bad = images, key, []
        self.ok = ~np.isin(np.arange(len(images)), bad)
        self.read = 0

    def batch(self, indices):
        assert self.ok[indices].all()
        self.read += len(indices)
        return self.images[indices]


# CLIP


def test_clip_tower_gives_open_clips_own_features(clip):
    import open_clip

    encoder = create("open_clip", clip).eval()
    whole = open_clip.create_model(f"local-dir:{clip}").eval()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]))
    with torch.no_grad():
        torch.testing.assert_close(encoder(IMAGES), whole.encode_image((IMAGES / 255 - mean) / std))
    assert (encoder.features, encoder.image_size, encoder.front) == (24, 32, None)


def test_clip_without_its_weights_is_another_one(clip):
    first, second = (create("open_clip", clip, pretrained=False) for _ in range(2))
    assert (first.body.proj != second.body.proj).any()


def test_frozen_clip_is_read_once_and_only_the_perceptron_learns(clip):
    encoder = create("open_clip", clip, options={"mlp": [32, 48], "dropout": 0.1})
    assert (encoder.features, encoder.image_size) == (48, 32)
    assert not any("encoder" in name for name in encoder.state_dict())
    images = Images(IMAGES.numpy())
    store = backbones.FeatureStore.build(images, encoder.front, device="cpu")
    again = backbones.FeatureStore.build(images, encoder.front, device="cpu")
    assert images.read == 3
    with torch.no_grad():
        whole = create("open_clip", clip).eval()(IMAGES).numpy()
    for found in (store, again):
        np.testing.assert_allclose(found.batch([2, 0]), whole[[2, 0]], atol=2e-3)
    model = PromptRegressor(encoder, vocabulary_size=5, embedding_size=7)
    model(torch.from_numpy(store.batch([0, 1, 2])))[0].sum().backward()
    assert all(p.grad is not None for p in model.backbone.parameters())
    assert all(p.grad is None for p in encoder.front.parameters())


def test_unknown_clip_is_named():
    with pytest.raises(ModelNotFoundError, match="open_clip cannot build 'no-such-clip'"):
        create("open_clip", "no-such-clip", pretrained=False)


def test_parts_can_be_frozen(diffusion):
    encoder = create("diffusers", diffusion, frozen=["unet.conv_in", "unet.down_blocks.0"])
    still = {name.split(".")[1] for name, p in encoder.named_parameters() if not p.requires_grad}
    assert still == {"conv_in", "down_blocks"}
    assert all(
        p.requires_grad == (not name.startswith(("unet.conv_in.", "unet.down_blocks.0."))) for name, p in encoder.named_parameters()
    )
    with pytest.raises(ConfigError, match=r"no part .unet\.conv. to freeze"):
        create("diffusers", diffusion, frozen=["unet.conv"])


# Stored features


def test_stored_features_belong_to_their_images_and_weights(clip):
    front = create("open_clip", clip, options={"mlp": [4]}).front
    store = backbones.FeatureStore.build(Images(IMAGES.numpy()), front, device="cpu")
    assert backbones.FeatureStore.build(Images(IMAGES.numpy(), key="b"), front, device="cpu").key != store.key
    with torch.no_grad():
        front.body.proj *= 2
    changed = backbones.FeatureStore.build(Images(IMAGES.numpy()), front, device="cpu")
    assert changed.key != store.key
    assert (changed.batch([0]) != store.batch([0])).any()


def test_rows_without_an_image_have_no_features(clip):
    front = create("open_clip", clip, options={"mlp": [4]}).front
    whole = backbones.FeatureStore.build(Images(IMAGES.numpy()), front, device="cpu")
    store = backbones.FeatureStore.build(Images(IMAGES.numpy(), bad=[1], key="b"), front, device="cpu")
    np.testing.assert_array_equal(store.ok, [True, False, True])
    np.testing.assert_allclose(store.batch([0, 2]), whole.batch([0, 2]), atol=1e-3)
    with pytest.raises(BadValueError, match="row 1 has no image"):
        store.batch([0, 1])


def test_stopped_computation_goes_on_at_the_first_shard_it_lacks(clip, monkeypatch, tmp_path):
    monkeypatch.setattr(backbones, "_SHARD", 2)
    front = create("open_clip", clip, options={"mlp": [4]}).front
    images = Images(torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8).numpy())
    whole = backbones.FeatureStore.build(images, front, tmp_path / "whole", device="cpu")
    calls, own = [], front.forward

    def breaks(batch):
        calls.append(len(batch))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return own(batch)

    monkeypatch.setattr(front, "forward", breaks)
    with pytest.raises(KeyboardInterrupt):
        backbones.FeatureStore.build(images, front, tmp_path / "part", device="cpu")
    monkeypatch.setattr(front, "forward", own)
    images.read = 0
    store = backbones.FeatureStore.build(images, front, tmp_path / "part", device="cpu")
    assert images.read == 3  # two of four shards were there
    np.testing.assert_array_equal(store.batch(np.arange(7)), whole.batch(np.arange(7)))


# The U-Net's encoder half


def test_features_are_those_inside_the_whole_unet(diffusion):
    from diffusers import UNet2DConditionModel

    encoder = create("diffusers", diffusion).eval()
    whole = UNet2DConditionModel.from_pretrained(diffusion, subfolder="unet").eval()
    inside = []
    whole.mid_block.register_forward_hook(lambda _, __, output: inside.append(output))
    latents, context = torch.randn(3, 4, 16, 16), torch.randn(3, 40, 16)
    with torch.no_grad():
        whole(latents, 0, context)
        torch.testing.assert_close(encoder.maps(latents, context), inside[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(encoder(latents, context), inside[0].mean((2, 3)), atol=1e-5, rtol=1e-5)
    assert encoder.features == 16


def test_context_is_the_empty_prompts_and_no_prompt_of_the_data(diffusion):
    encoder = create("diffusers", diffusion).eval()
    empty, fox = unet.text_states(diffusion, ["", "a fox in the snow"])
    torch.testing.assert_close(encoder.context, empty)
    latents = torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(encoder(latents), encoder(latents, empty.expand(2, -1, -1)))
        assert (encoder(latents) - encoder(latents, fox.expand(2, -1, -1))).abs().max() > 1e-6


def test_latents_are_the_pipelines_own(diffusion):
    from diffusers import AutoencoderKL

    encoder = create("diffusers", diffusion)
    vae = AutoencoderKL.from_pretrained(diffusion, subfolder="vae")
    with torch.no_grad():
        expected = vae.encode(IMAGES / 127.5 - 1).latent_dist.mode() * vae.config.scaling_factor
        torch.testing.assert_close(encoder.front(IMAGES), expected, atol=1e-5, rtol=1e-5)
    assert encoder.image_size == 32
    assert not any("vae" in name for name in encoder.state_dict())


def test_encoder_goes_back_into_a_unet_unchanged_in_shape_and_name(diffusion):
    from diffusers import UNet2DConditionModel

    encoder = create("diffusers", diffusion)
    whole = UNet2DConditionModel.from_pretrained(diffusion, subfolder="unet")
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    unet.into_unet(encoder, whole)
    assert all((value == before[name]).all() for name, value in whole.state_dict().items())
    with torch.no_grad():
        for p in encoder.parameters():
            p += 1
    for blend in (0.0, 0.25, 1.0):
        whole.load_state_dict(before)
        unet.into_unet(encoder, whole, blend)
        for name, value in whole.state_dict().items():
            shift = 0 if name.startswith(unet.DROPPED) else blend
            torch.testing.assert_close(value, before[name] + shift)


def test_encoder_of_another_architecture_is_refused_by_its_tensors(diffusion):
    from diffusers import UNet2DConditionModel

    small = UNet2DConditionModel.from_config({**UNet2DConditionModel.load_config(diffusion, subfolder="unet"), "in_channels": 5})
    with pytest.raises(CheckpointError, match=r"1 tensors differ \(conv_in.weight"):
        unet.into_unet(create("diffusers", diffusion), small)


def test_text_of_another_width_is_refused(diffusion):
    from diffusers import UNet2DConditionModel

    whole = UNet2DConditionModel.from_pretrained(diffusion, subfolder="unet")
    with pytest.raises(ConfigError, match="24 numbers a token, the U-Net reads 16"):
        unet.UNetEncoder(whole, torch.zeros(40, 24))


def test_folder_without_a_pipeline_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RSD_MODELS", str(tmp_path))
    (tmp_path / "half").mkdir()
    with pytest.raises(ModelNotFoundError, match="no Stable Diffusion folder"):
        create("diffusers", "half")
    with pytest.raises(ModelNotFoundError, match="is not registered"):
        create("diffusers", "nowhere")


def test_unet_with_random_weights_needs_no_unet_file(diffusion, tmp_path):
    import shutil

    folder = shutil.copytree(diffusion, tmp_path / "sd")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    first, second = (create("diffusers", folder, pretrained=False) for _ in range(2))
    assert (first.unet.conv_in.weight != second.unet.conv_in.weight).any()


def test_shipped_unet_reads_shipped_images():
    folder = REPOSITORY / "data" / "mini" / "stable-diffusion"
    encoder = create("diffusers", folder).eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert encoder(encoder.front(images)).shape == (2, encoder.features)


def test_features_that_float16_cannot_hold_are_refused(tmp_path):
    front = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 2)).eval()
    with torch.no_grad():
        front[1].bias.fill_(1e6)

    class Front(torch.nn.Module):
        def forward(self, images):
            return front(images.float())

    with pytest.raises(BadValueError, match="not finite in float16"):
        backbones.FeatureStore.build(Images(IMAGES.numpy()), Front(), tmp_path, device="cpu")
