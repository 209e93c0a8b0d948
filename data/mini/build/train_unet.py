"""Train the mini Stable Diffusion's U-Net: ``python data/mini/build/train_unet.py``.

Rombach et al. (2022), section 3: denoising in the autoencoder's latent space, told the prompt by
cross-attention. Velocity prediction as in Stable Diffusion 2 (Salimans and Ho, 2022), low noise
weighted down as by Hang et al. (2023), a tenth of the prompts left out for classifier-free guidance
(Ho and Salimans, 2022), a running average of the weights.
"""

import common
import numpy as np
import torch
import torch.nn.functional as F
from corpus import Corpus
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from train_autoencoder import encoded

from rsdlib import files, runtime, training

CONFIG = {
    "sample_size": 8,
    "in_channels": 16,
    "out_channels": 16,
    "block_out_channels": (64, 128),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    "attention_head_dim": (2, 4),  # diffusers' name for the number of heads
    "cross_attention_dim": 128,
    "norm_num_groups": 16,
}
NOISE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
}
UNTOLD = 0.1  # share of pictures whose prompt is left out
SNR = 5.0  # ratio of signal to noise above which a step weighs less
FOLDER = common.MINI / "stable-diffusion"


class Denoiser(nn.Module):
    """The U-Net that learns, the average of its weights that is kept, and the noise in between.

    Parameters
    ----------
    nothing : Tensor (40, 128)
        What the text encoder makes of the empty prompt.
    """

    def __init__(self, nothing):
        super().__init__()
        from diffusers import DDPMScheduler, UNet2DConditionModel

        self.unet = UNet2DConditionModel(**CONFIG)
        self.average = AveragedModel(
            self.unet, multi_avg_fn=get_ema_multi_avg_fn(0.9995)
        ).requires_grad_(False)
        self.noise = DDPMScheduler(**NOISE)
        self.register_buffer("nothing", nothing)

    def forward(self, latents, text):
        """Add noise to latents (b, 16, 8, 8) and return the velocity, as predicted and as it is.

        And the weight of each row.

        In training noise comes from torch's global generator; otherwise it is the same at every
        call, and the averaged weights answer.
        """
        generator = None if self.training else torch.Generator(latents.device).manual_seed(0)
        b = len(latents)
        t = torch.randint(1000, (b,), generator=generator, device=latents.device)
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        if self.training:
            untold = torch.rand(b, device=latents.device) < UNTOLD
            text = torch.where(untold[:, None, None], self.nothing.to(text), text)
        network = self.unet if self.training else self.average
        predicted = network(self.noise.add_noise(latents, noise, t), t, text).sample.float()
        kept = self.noise.alphas_cumprod.to(latents.device)[t]
        snr = kept / (1 - kept)
        # Differs from Hang et al.: high noise keeps its full weight, as it is where the prompt
        # decides most.
        return (
            predicted,
            self.noise.get_velocity(latents, noise, t),
            ((SNR + 1) / (snr + 1)).clamp(max=1),
        )


def objective(model, batch):
    """Weighted squared error of the velocity; for each row the cosine of predicted and true."""
    predicted, velocity, weight = model(batch["latents"].float(), batch["text"].float())
    loss = (weight * (predicted - velocity).square().mean((1, 2, 3))).mean()
    return loss, F.cosine_similarity(predicted.flatten(1), velocity.flatten(1))


class Average(training.Callback):
    """Move the averaged weights towards the current ones before each step."""

    def before_step(self, state):
        """Update; the first call copies."""
        state.model.average.update_parameters(state.model.unet)


def read(prompts, device="cpu"):
    """Return the text encoder's states of prompts, (n, 40, 128), in half precision."""
    from transformers import CLIPTextModel, CLIPTokenizer

    encoder = CLIPTextModel.from_pretrained(FOLDER / "text_encoder").to(device).eval()
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
    states = np.empty(
        (len(prompts), tokenizer.model_max_length, CONFIG["cross_attention_dim"]), np.float16
    )
    with torch.inference_mode():
        for rows in runtime.track(
            np.array_split(np.arange(len(prompts)), -(-len(prompts) // 256)), "reading prompts"
        ):
            some = [prompts[i] for i in rows]
            tokens = tokenizer(
                some, padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids
            states[rows] = encoder(tokens.to(device)).last_hidden_state.cpu()
    return states


def export(unet):
    """Write the whole pipeline in diffusers' format; parts that are there are kept as they are."""
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

    unet = unet.cpu().eval().half()
    unet.save_pretrained(FOLDER / "unet")
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(FOLDER / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(FOLDER / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(FOLDER / "tokenizer"),
        unet=unet,
        scheduler=DPMSolverMultistepScheduler(
            **NOISE, algorithm_type="dpmsolver++", steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.scheduler.save_pretrained(FOLDER / "scheduler")
    pipeline.save_config(FOLDER)
    runtime.log(f"written: {files.relative(FOLDER)}")


def main():
    """Encode renders and prompts once, train, export."""
    from diffusers import AutoencoderKL

    chosen = common.options(__doc__, epochs=14, batch=64, lr=1e-3)
    corpus = Corpus(chosen.renders)
    device = runtime.device(chosen.device)
    vae = AutoencoderKL.from_pretrained(FOLDER / "vae")
    latents = (encoded(vae, corpus, device).astype(np.float32) * vae.config.scaling_factor).astype(
        np.float16
    )
    states, nothing = read(corpus.prompts, device), torch.from_numpy(read([""], device)[0]).float()
    data = common.Pictures(
        corpus, {"latents": latents, "text": states}, *corpus.split(), with_images=False
    )
    common.seeded("unet", chosen.seed)
    model = Denoiser(nothing)
    settings = common.config(
        chosen, batch_size=chosen.batch, lr=chosen.lr, weight_decay=0.01, warmup=0.02
    )
    inputs = files.checksum({"latents": latents, "text": states})[:16]
    common.train(
        "unet",
        model,
        data,
        settings,
        objective,
        {"config": CONFIG, "noise": NOISE, "inputs": inputs},
        [Average()],
    )
    export(model.average.module)


if __name__ == "__main__":
    main()
