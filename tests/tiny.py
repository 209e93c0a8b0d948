"""Random pretrained folders in the libraries' own formats, small enough for tests."""

import sys

import torch
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "data" / "mini" / "build"))

PROMPTS = ["a fox in the snow", "two cats at night, watercolor", "pixel art of a tent"]


def stable_diffusion(folder, cross=16, seed=0):
    """Write a Stable Diffusion pipeline with random weights: 32 pixels, latents 4 x 16 x 16."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel
    from wordpieces import clip_tokenizer

    torch.manual_seed(seed)
    tokenizer = clip_tokenizer(PROMPTS, size=560)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=cross,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=cross,
        norm_num_groups=4,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def clip(folder, seed=0):
    """Write an open_clip model with random weights: 32 pixels, 24 numbers an embedding."""
    import open_clip
    from safetensors.torch import save_file

    from rsdlib import files

    torch.manual_seed(seed)
    vision = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 49_408, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.model.CLIP(24, vision, text)
    colours = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    settings = {
        "model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": colours,
    }
    files.write_json(folder / "open_clip_config.json", settings)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def blip(folder, seed=0):
    """Write a BLIP captioner with random weights: 32 pixels, the words of `PROMPTS`."""
    from transformers import (
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )
    from wordpieces import bert_tokenizer

    torch.manual_seed(seed)
    tokenizer = bert_tokenizer(PROMPTS, size=200)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {
        **vision,
        "vocab_size": len(tokenizer),
        "encoder_hidden_size": 16,
        "max_position_embeddings": 32,
    }
    text |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text |= {"eos_token_id": tokenizer.sep_token_id, "sep_token_id": tokenizer.sep_token_id}
    vision |= {"image_size": 32, "patch_size": 8, "initializer_range": 0.02}
    BlipForConditionalGeneration(
        BlipConfig(text_config=text, vision_config=vision)
    ).save_pretrained(folder)
    colours = {
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.4],
        "size": {"height": 32, "width": 32},
    }
    BlipProcessor(BlipImageProcessor(**colours), tokenizer).save_pretrained(folder)
    return folder
