"""Image encoders, each with the preprocessing it was trained with: uint8 images in, features out.

Some are frozen in part: their ``front`` maps images to what is computed once and stored (`rsdlib.data.FeatureStore`), and the
encoder reads that in place of images.
"""

import torch
from torch import nn

from rsdlib import registry, runtime
from rsdlib.errors import ModelNotFoundError


class Encoder(nn.Module):
    """A library's model that maps raw images to feature vectors.

    Parameters
    ----------
    body : nn.Module
        Maps normalised images (b, 3, s, s) to features (b, p).
    features : int
        p.
    image_size : int
        s, pixels a side.
    mean, std : sequence of 3 floats
        Of the pixels in [0, 1], as the weights expect them.
    """

    front = None

    def __init__(self, body, features, image_size, mean, std):
        super().__init__()
        self.body, self.features, self.image_size = body, features, image_size
        # More than the patches' projection: such networks are not faster in bf16 on a CPU.
        self.convolutional = sum(isinstance(module, nn.Conv2d) for module in body.modules()) > 1
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1) * 255, persistent=False)

    def forward(self, images):
        """Map uint8 images (b, 3, s, s) to features (b, p)."""
        return self.body((images.float() - self.mean) / self.std)


class Frozen:
    """Frozen front: a whole encoder whose features are computed once and stored.

    Parameters
    ----------
    encoder : Encoder
    """

    def __init__(self, encoder):
        self.encoder = encoder.eval().requires_grad_(False)

    @property
    def key(self):
        """Changes with any weight of the encoder."""
        return "frozen-" + runtime.checksum({name: value.cpu().numpy() for name, value in self.encoder.state_dict().items()})[:16]

    def to(self, device):
        """Move to a device."""
        self.encoder.to(device)
        return self

    def __call__(self, images):
        """Map uint8 images (b, 3, s, s) to features (b, p)."""
        return self.encoder(images)


class Perceptron(nn.Module):
    """A multi-layer perceptron on frozen features, as in the authors' code: linear, batch norm, GELU, dropout, per layer.

    Parameters
    ----------
    encoder : Encoder
        Frozen, kept beside the module as its ``front``.
    widths : sequence of int
        Of the layers; the authors' are 8192, 8192.
    dropout : float
    """

    convolutional = False

    def __init__(self, encoder, widths, dropout=0.5):
        super().__init__()
        layers, last = [], encoder.features
        for width in widths:
            layers += [nn.Linear(last, width), nn.BatchNorm1d(width), nn.GELU(), nn.Dropout(dropout)]
            last = width
        self.body, self.features, self.image_size = nn.Sequential(*layers), last, encoder.image_size
        object.__setattr__(self, "front", Frozen(encoder))

    def forward(self, features):
        """Map stored features (b, p) to features (b, last width)."""
        return self.body(features.float())


def create(config):
    """Build the encoder that a `config.BackboneConfig` describes.

    Returns
    -------
    Encoder
    """
    return _BUILDERS[config.library](config)


def _timm(config):
    timm = runtime.require("timm")
    name = config.model
    folder = runtime.resolve_path(name)
    if (folder / "config.json").is_file():
        name = f"local-dir:{folder}"
    elif config.pretrained and name in registry.MODELS:
        name = f"local-dir:{registry.locate(name)}"
    elif config.pretrained and registry.override(name):
        name = f"local-dir:{registry.override(name)}"
    try:
        body = timm.create_model(name, pretrained=config.pretrained, num_classes=0, **config.options)
    except (RuntimeError, ValueError, OSError) as error:
        raise ModelNotFoundError(
            f"timm cannot build {config.model!r} (pretrained={config.pretrained}): {str(error).splitlines()[0]}",
            "Check the name with timm.list_models(), or put the weights into $RSD_MODELS.",
        ) from error
    if config.gradient_checkpointing:
        body.set_grad_checkpointing()
    expects = timm.data.resolve_model_data_config(body)
    size = config.image_size or expects["input_size"][-1]
    return Encoder(body, body.head_hidden_size, size, expects["mean"], expects["std"])


def clip_pair(config):
    """Return both towers of a CLIP: an `Encoder` of images, and a function from texts to unit embeddings (n, p).

    Parameters
    ----------
    config : rsdlib.config.BackboneConfig
        Of the library ``"open_clip"``.
    """
    open_clip = runtime.require("open_clip", "open_clip_torch")
    clip = _clip(config)
    tokenizer = open_clip.get_tokenizer(_open_clip_name(config))

    def read(texts, batch_size=256):
        with torch.inference_mode():
            starts = runtime.track(range(0, len(texts), batch_size), "reading prompts", -(-len(texts) // batch_size))
            parts = [clip.encode_text(tokenizer(texts[start : start + batch_size]), normalize=True) for start in starts]
        return torch.cat(parts).float().numpy()

    return _image_tower(clip.eval(), config), read


def _open_clip(config):
    """CLIP's image tower; with the option ``mlp`` frozen, below a perceptron of those widths."""
    encoder = _image_tower(_clip(config), config)
    widths = config.options.get("mlp")
    return Perceptron(encoder, widths, config.options.get("dropout", 0.5)) if widths else encoder


def _clip(config):
    open_clip = runtime.require("open_clip", "open_clip_torch")
    options = {name: value for name, value in config.options.items() if name not in ("mlp", "dropout")}
    try:
        return open_clip.create_model(_open_clip_name(config), load_weights=config.pretrained, **options)
    except (RuntimeError, ValueError, OSError) as error:
        raise ModelNotFoundError(
            f"open_clip cannot build {config.model!r} (pretrained={config.pretrained}): {str(error).splitlines()[0]}",
            "Check the name with open_clip.list_models(), or put the weights into $RSD_MODELS.",
        ) from error


def _image_tower(clip, config):
    import open_clip

    colours, side = open_clip.get_model_preprocess_cfg(clip), clip.visual.image_size
    if config.gradient_checkpointing:
        clip.visual.set_grad_checkpointing()
    size = config.image_size or (side[0] if isinstance(side, tuple) else side)
    return Encoder(clip.visual, clip.visual.output_dim, size, colours["mean"], colours["std"])


def _open_clip_name(config):
    folder = runtime.resolve_path(config.model)
    if (folder / "open_clip_config.json").is_file():
        return f"local-dir:{folder}"
    if config.pretrained and (config.model in registry.MODELS or registry.override(config.model)):
        return f"local-dir:{registry.override(config.model) or registry.locate(config.model)}"
    return config.model


def _diffusers(config):
    """Build the encoder half of a Stable Diffusion's U-Net."""
    from rsdlib import diffusion, unet

    encoder = unet.open_encoder(diffusion.locate(config.model), config.pretrained, config.options, config.image_size)
    if config.gradient_checkpointing:
        encoder.unet.enable_gradient_checkpointing()
    return encoder


_BUILDERS = {"timm": _timm, "open_clip": _open_clip, "diffusers": _diffusers}
