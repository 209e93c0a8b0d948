"""Every backbone at the paper's size: its real architecture with random weights, one step forward and back at batch 1."""

import numpy as np
import pytest
import torch

from rsdlib import backbones, config, unet
from rsdlib.losses import JointObjective
from rsdlib.model import PromptRegressor

PAPER = config.profile("paper")
SD2 = {  # the U-Net of Stable Diffusion 2 base
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}


def step(encoder, inputs):
    model = PromptRegressor(encoder, vocabulary_size=1000)
    batch = {"input": inputs, "target": torch.ones(len(inputs), 384), "labels": torch.zeros(len(inputs), 1000)}
    loss, similarity = JointObjective()(model, batch)
    loss.backward()
    assert np.isfinite(loss.item())
    assert similarity.shape == (len(inputs),)
    return sum(p.numel() for p in encoder.parameters()) / 1e6


def create(name, **changes):
    return backbones.create(config.replace(PAPER.backbone(name), pretrained=False, **changes))


@pytest.mark.slow
def test_swin():
    encoder = create("swin")
    assert (encoder.image_size, encoder.features) == (256, 1536)
    assert step(encoder, torch.zeros(1, 3, 256, 256, dtype=torch.uint8)) == pytest.approx(195, rel=0.01)


@pytest.mark.slow
def test_clip():
    encoder = create("clip")
    assert (encoder.image_size, encoder.features) == (224, 1024)
    assert step(encoder, torch.zeros(1, 3, 224, 224, dtype=torch.uint8)) == pytest.approx(632, rel=0.01)


@pytest.mark.slow
def test_perceptron_on_frozen_clip():
    """The authors' code: 1024-8192-8192-384 on features that are computed once."""
    tower = backbones.Encoder(torch.nn.Identity(), 1024, 224, [0.5] * 3, [0.5] * 3)
    encoder = backbones.Perceptron(tower, PAPER.backbone("clip-mlp").options["mlp"])
    assert [layer.out_features for layer in encoder.body if isinstance(layer, torch.nn.Linear)] == [8192, 8192]
    step(encoder, torch.zeros(2, 1024))


@pytest.mark.slow
def test_unet_encoder():
    from diffusers import UNet2DConditionModel

    encoder = unet.UNetEncoder(UNet2DConditionModel(**SD2), torch.zeros(77, 1024), image_size=512)
    encoder.unet.enable_gradient_checkpointing()
    assert encoder.features == 1280
    assert step(encoder, torch.zeros(1, 4, 64, 64)) == pytest.approx(344, rel=0.05)
