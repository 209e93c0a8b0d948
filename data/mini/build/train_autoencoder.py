"""Train the mini Stable Diffusion's autoencoder: ``python data/mini/build/train_autoencoder.py``.

diffusers' ``AutoencoderKL`` as in Rombach et al. (2022), 8 times smaller: 64 x 64 pixels become 8 x
8 places with 16 numbers each. Then the decoder goes on alone, on latents without noise. Differs
from the source: an absolute error in place of the perceptual and the adversarial loss.
"""

import common
import numpy as np
import torch
from corpus import NAMES, Corpus
from torch import nn

from rsdlib import files, runtime
from rsdlib.config import replace
from rsdlib.data import evaluating, weights_key

CONFIG = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 64, 128),
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 8,
    "sample_size": 64,
}
KL = 1e-6  # weight of the divergence, a sum over the 1,024 latents


class Autoencoder(nn.Module):
    """Images in, reconstruction and latent distribution out."""

    def __init__(self):
        super().__init__()
        from diffusers import AutoencoderKL

        self.vae = AutoencoderKL(**CONFIG)
        for module in (
            self.vae.modules()
        ):  # every residual branch begins as zero, so the whole begins as a shallow network
            if type(module).__name__ == "ResnetBlock2D":
                nn.init.zeros_(module.conv2.weight)
        with torch.no_grad():
            self.vae.quant_conv.bias[CONFIG["latent_channels"] :] -= 6  # little noise at first

    def forward(self, images):
        """Map uint8 images (b, 3, 64, 64) to ``pixels`` and ``decoded`` in [-1, 1], ``kl`` (b,)."""
        pixels = (images.float() - 127.5) / 127.5
        posterior = self.vae.encode(pixels).latent_dist
        latents = posterior.sample() if self.training else posterior.mode()
        return {
            "pixels": pixels,
            "decoded": self.vae.decode(latents).sample.float(),
            "kl": posterior.kl().float(),
        }


def objective(model, batch):
    """Mean absolute error in [-1, 1] plus the weighted divergence.

    For each picture minus its error in [0, 1].
    """
    out = model(batch["input"])
    error = (out["decoded"] - out["pixels"]).abs().mean((1, 2, 3))
    return error.mean() + KL * out["kl"].mean(), -error / 2


def centre(vae, latents):
    """Move the mean of every channel to zero, and set the scale.

    That is done inside the 1 x 1 convolutions next to the latents.
    """
    mean, scale = latents.mean((0, 2, 3)), float(1 / latents.std((0, 2, 3)).square().mean().sqrt())
    with torch.no_grad():
        vae.quant_conv.bias[: len(mean)] -= mean
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.register_to_config(scaling_factor=scale)


class Decoder(nn.Module):
    """The autoencoder's decoder alone, on stored latents without noise; the encoder stays."""

    def __init__(self, vae):
        super().__init__()
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv

    def forward(self, latents):
        """Map latents (b, 16, 8, 8) to pixels (b, 3, 64, 64) in [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents)).float()


def decoding(model, batch):
    """Mean absolute error in [-1, 1]; for each picture minus its error in [0, 1]."""
    error = (
        (model(batch["latents"].float()) - (batch["input"].float() - 127.5) / 127.5)
        .abs()
        .mean((1, 2, 3))
    )
    return error.mean(), -error / 2


def encode(vae, corpus, rows, device="cpu", precision="fp32"):
    """Return the mean latents (n, 16, 8, 8) of some renders, unscaled, in half precision."""
    vae, found, device = vae.to(device).eval(), [], torch.device(device)
    low = runtime.precision(precision, device) == "bf16"
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=low):
        for part in runtime.track(np.array_split(rows, -(-len(rows) // 256)), "encoding renders"):
            pixels = (torch.from_numpy(corpus.images(part)).to(device).float() - 127.5) / 127.5
            found.append(vae.encode(pixels).latent_dist.mode().half().cpu().numpy())
    return np.concatenate(found)


def encoded(vae, corpus, device):
    """Return the mean latents of all renders, computed once, at the processor's fast precision."""
    key = files.digest([weights_key(vae.encoder), weights_key(vae.quant_conv), corpus.key])
    path = files.cache_dir() / "latents" / f"{key}.npy"
    everything = np.arange(len(corpus))
    return files.cached_rows(path, lambda: encode(vae, corpus, everything, device, "auto"))


def main():
    """Train, centre the latents, train the decoder on, report the error of each medium, export."""
    chosen = common.options(__doc__, epochs=2, refine=1, lr=1e-3, batch=16)
    corpus = Corpus(chosen.renders)
    data = common.Pictures(corpus, {}, *corpus.split())
    common.seeded("autoencoder", chosen.seed)
    model = Autoencoder()
    settings = common.config(chosen, batch_size=chosen.batch, lr=chosen.lr, weight_decay=1e-4)
    common.train("autoencoder", model, data, settings, objective, {"config": CONFIG, "kl": KL})
    vae = model.vae
    device = runtime.device(chosen.device)
    centre(vae, torch.from_numpy(encode(vae, corpus, data.val, device)).to(device).float())
    if chosen.refine:
        latents = encoded(vae, corpus, device)
        settings = replace(settings, epochs=chosen.refine, lr=chosen.lr / 2)
        decoder, pairs = (
            Decoder(vae),
            common.Pictures(corpus, {"latents": latents}, data.train, data.val),
        )
        common.train("decoder", decoder, pairs, settings, decoding, {"start": weights_key(vae)})
    vae.cpu().eval()
    with evaluating(model):
        errors = common.mapped(lambda b: {"error": -objective(model, b)[1]}, data, data.val)[
            "error"
        ]
    medium = corpus.labels["medium"][data.val]
    print({"error": round(float(errors.mean()), 4), "scale": vae.config.scaling_factor})
    print(
        {
            name: round(float(errors[medium == i].mean()), 4)
            for i, name in enumerate(NAMES["medium"])
        }
    )
    vae.half().save_pretrained(common.MINI / "stable-diffusion" / "vae")
    runtime.log(f"written: {files.relative(common.MINI / 'stable-diffusion' / 'vae')}")


if __name__ == "__main__":
    main()
