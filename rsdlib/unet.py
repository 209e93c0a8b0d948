"""The encoder half of a diffusion model's own U-Net: the paper's white-box backbone (supplementary, section 8)."""

import torch
from torch import nn

from rsdlib import runtime
from rsdlib.errors import CheckpointError, ConfigError, ModelNotFoundError

DROPPED = ("up_blocks", "conv_norm_out", "conv_act", "conv_out")  # the decoder half


def parts(unet):
    """Return the names of the modules that make up a U-Net's encoder half."""
    return [name for name, module in unet.named_children() if name not in DROPPED and any(True for _ in module.parameters())]


class UNetEncoder(nn.Module):
    """Reads clean latents with the down and mid blocks of a `UNet2DConditionModel`, at timestep 0 and without noise.

    Weights keep the names and shapes that they have in the whole U-Net, below ``unet.``, so that they can go back into one.

    Parameters
    ----------
    unet : diffusers.UNet2DConditionModel
        Its decoder half is taken off: the module is used up.
    context : Tensor (t, c)
        What stands in for the prompt in cross-attention wherever a batch does not bring its own: the text encoder's states of the
        empty prompt. Never the true prompt.
    front : nn.Module, optional
        Maps uint8 images to what `forward` reads; kept beside the module, not in it.
    image_size : int
        Pixels a side that `front` reads.

    Attributes
    ----------
    features : int
        Channels of the mid block.
    """

    def __init__(self, unet, context, front=None, image_size=None):
        super().__init__()
        extra = [name for name in ("class_embedding", "add_embedding", "encoder_hid_proj") if getattr(unet, name, None) is not None]
        if extra:
            raise ConfigError(f"this U-Net is also conditioned by {', '.join(extra)}", "Use one that reads a prompt alone.")
        if context.shape[-1] != unet.config.cross_attention_dim:
            raise ConfigError(
                f"the text context has {context.shape[-1]} numbers a token, the U-Net reads {unet.config.cross_attention_dim}",
                "Take text encoder and U-Net from the same pipeline.",
            )
        for name in DROPPED:
            delattr(unet, name)
        self.unet, self.features, self.image_size = unet, unet.config.block_out_channels[-1], image_size
        self.register_buffer("context", context)
        object.__setattr__(self, "front", front)  # no part of the module: neither trained nor saved with it

    def maps(self, latents, context=None):
        """Return the mid block's output (b, p, h', w') for latents (b, c, h, w) and a text context (b, t, k)."""
        if context is None:
            context = self.context.expand(len(latents), -1, -1)
        unet, context = self.unet, context.to(latents.dtype)
        steps = torch.zeros(len(latents), dtype=torch.long, device=latents.device)
        time = unet.time_embedding(unet.time_proj(steps).to(latents.dtype))
        sample = unet.conv_in(latents)
        for block in unet.down_blocks:
            text = {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}
            sample, _ = block(hidden_states=sample, temb=time, **text)
        text = {"encoder_hidden_states": context} if getattr(unet.mid_block, "has_cross_attention", False) else {}
        return unet.mid_block(sample, time, **text)

    def forward(self, latents, context=None):
        """Map latents (b, c, h, w) to features (b, p): the mid block's output, averaged over places."""
        return self.maps(latents.float(), context).mean(dim=(2, 3))


class Latents(nn.Module):
    """Frozen front of the U-Net encoder: an autoencoder's latents of images, computed once and stored.

    Parameters
    ----------
    vae : diffusers.AutoencoderKL
    """

    def __init__(self, vae):
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        self.register_buffer("scale", torch.tensor(float(vae.config.scaling_factor)))
        self.eval()

    def forward(self, images):
        """Map uint8 images (b, 3, s, s) to scaled latents (b, c, s / f, s / f): the mean of their distribution."""
        return self.vae.encode((images.float() - 127.5) / 127.5).latent_dist.mode() * self.scale


def open_encoder(folder, pretrained=True, options=None, image_size=None):
    """Build the U-Net encoder of a diffusers Stable Diffusion folder.

    Parameters
    ----------
    folder : Path
        With ``unet``, ``vae``, ``text_encoder`` and ``tokenizer``.
    pretrained : bool
        False draws random weights; what is frozen (autoencoder, text encoder) is opened all the same.
    options : dict, optional
        Settings of the U-Net that differ from the folder's; with random weights only.
    image_size : int, optional
        Pixels a side; the default is what the model was trained with.

    Returns
    -------
    UNetEncoder
    """
    diffusers = runtime.require("diffusers")
    try:
        vae = diffusers.AutoencoderKL.from_pretrained(folder, subfolder="vae")
        if pretrained:
            unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        else:
            config = diffusers.UNet2DConditionModel.load_config(folder, subfolder="unet")
            unet = diffusers.UNet2DConditionModel.from_config({**config, **(options or {})})
        context = text_states(folder, [""])[0]
    except OSError as error:
        raise ModelNotFoundError(
            f"{runtime.relative(folder)} is no Stable Diffusion folder: {str(error).splitlines()[0]}",
            "It needs unet, vae, text_encoder and tokenizer in diffusers' format.",
        ) from error
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return UNetEncoder(unet, context, Latents(vae), image_size or unet.config.sample_size * factor)


def text_states(folder, prompts):
    """Return the text encoder's states of prompts, (n, t, c), as Stable Diffusion's cross-attention reads them."""
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").float().eval()
    tokens = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return encoder(tokens).last_hidden_state


def into_unet(encoder, unet, blend=1.0):
    """Put an encoder's weights into a whole U-Net, in place; its decoder half stays as it is.

    Parameters
    ----------
    encoder : UNetEncoder
    unet : diffusers.UNet2DConditionModel
    blend : float
        1 takes the encoder's weights, 0 keeps the U-Net's own, in between mixes them linearly.

    Raises
    ------
    CheckpointError
        The encoder is of another architecture: the tensors that do not fit are named.
    """
    own, new = unet.state_dict(), encoder.unet.state_dict()
    wrong = [name for name, value in new.items() if name not in own or own[name].shape != value.shape]
    missing = [name for name in own if name not in new and not name.startswith(DROPPED)]
    if wrong or missing:
        raise CheckpointError(
            f"the encoder does not fit this U-Net: {len(wrong + missing)} tensors differ ({', '.join((wrong + missing)[:3])}, …)",
            "Use the U-Net it came from.",
        )
    unet.load_state_dict({**own, **{name: torch.lerp(own[name].to(value), value, blend) for name, value in new.items()}})
