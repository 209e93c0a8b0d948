"""Every backbone at the paper's size: its architecture, random weights, one step at batch 1."""

import copy

import numpy as np
import pytest
import torch

from rsdlib import config, models
from rsdlib.models import JointObjective, PromptRegressor
from rsdlib.models.unet import UNetEncoder

PAPER = config.profile("paper")
UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
SD1 = {**UNET, "attention_head_dim": 8, "cross_attention_dim": 768}  # Stable Diffusion 1.4
SD2 = {  # 2 base
    **UNET,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
TEXT1 = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
TEXT2 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}


def step(encoder, inputs):
    model = PromptRegressor(encoder, vocabulary_size=1000)
    target, labels = torch.ones(len(inputs), 384), torch.zeros(len(inputs), 1000)
    batch = {"input": inputs, "target": target, "labels": labels}
    loss, similarity = JointObjective()(model, batch)
    loss.backward()
    assert np.isfinite(loss.item())
    assert similarity.shape == (len(inputs),)
    return sum(p.numel() for p in encoder.parameters()) / 1e6


def create(name):
    return models.create(PAPER.backbone(name), load=False)


@pytest.mark.slow
def test_swin():
    encoder = create("swin")
    assert (encoder.image_size, encoder.features) == (256, 1536)
    assert step(encoder, torch.zeros(1, 3, 256, 256, dtype=torch.uint8)) == pytest.approx(
        195, rel=0.01
    )


@pytest.mark.slow
def test_clip():
    encoder = create("clip")
    assert (encoder.image_size, encoder.features) == (224, 1024)
    assert step(encoder, torch.zeros(1, 3, 224, 224, dtype=torch.uint8)) == pytest.approx(
        632, rel=0.01
    )


@pytest.mark.slow
def test_perceptron_on_frozen_clip():
    """The authors' code: 1024-8192-8192-384 on features that are computed once."""
    tower = models.Encoder(torch.nn.Identity(), 1024, 224, [0.5] * 3, [0.5] * 3)
    encoder = models.Perceptron(tower, PAPER.backbone("clip-mlp").options["mlp"])
    assert [layer.out_features for layer in encoder.body if isinstance(layer, torch.nn.Linear)] == [
        8192,
        8192,
    ]
    step(encoder, torch.zeros(2, 1024))


@pytest.mark.slow
def test_unet_encoder():
    from diffusers import UNet2DConditionModel

    encoder = UNetEncoder(UNet2DConditionModel(**SD2), torch.zeros(77, 1024), image_size=512)
    encoder.unet.enable_gradient_checkpointing()
    assert encoder.features == 1280
    assert step(encoder, torch.zeros(1, 4, 64, 64)) == pytest.approx(344, rel=0.05)


def pipeline(unet_config, text_config):
    """Build a Stable Diffusion pipeline of the real architecture with random weights.

    Only the tokenizer knows few words.
    """
    import tiny
    from diffusers import (
        AutoencoderKL,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel
    from wordpieces import clip_tokenizer

    torch.manual_seed(0)
    tokenizer = clip_tokenizer(tiny.PROMPTS, size=560)
    tokenizer.model_max_length = 77
    special = [f"{name}_token_id" for name in ("bos", "eos", "pad")]
    special = {name: getattr(tokenizer, name) for name in special}
    special |= {"vocab_size": 49_408, "max_position_embeddings": 77}
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    made = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**text_config, **special)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**unet_config),
        scheduler=PNDMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            skip_prk_steps=True,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def sizes(pipe):
    """Return the number of weights of each tensor that a pipeline holds, by its address."""
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    return {p.data_ptr(): p.numel() for part in parts for p in part.parameters()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("unet_config", "text_config"), [(SD1, TEXT1), (SD2, TEXT2)], ids=["SD 1.4", "SD 2 base"]
)
def test_swap(unet_config, text_config):
    """No bit changes without a swap, an early one changes the image.

    Only the encoder's own size is added to the memory.
    """
    import diffusers
    import tiny

    pipe = pipeline(unet_config, text_config)
    context = torch.zeros(77, unet_config["cross_attention_dim"])
    encoder = UNetEncoder(copy.deepcopy(pipe.unet), context)
    with torch.no_grad():
        for p in encoder.parameters():
            p *= 1.05
    prompts, options = tiny.PROMPTS[:2], {"steps": 4, "guidance": 3.0, "height": 64, "width": 64}
    for scheduler in ("PNDMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"):
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
        pipes = [pipe, *(models.swap_encoder(pipe, encoder, start) for start in (1.0, 1, 3))]
        images = [models.sample(which, prompts, [1, 2], **options) for which in pipes]
        plain, never, early, late = images
        np.testing.assert_array_equal(never, plain)
        apart = [np.abs(image.astype(int) - plain).mean() for image in (early, late)]
        assert apart[0] > apart[1] > 0, scheduler
    swapped = models.swap_encoder(pipe, encoder, 1)
    added = sizes(swapped).items() - sizes(pipe).items()
    assert sum(size for _, size in added) == sum(p.numel() for p in encoder.parameters())
