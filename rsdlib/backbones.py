"""Image encoders, each with the preprocessing it was trained with: uint8 images in, features out."""

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


_BUILDERS = {"timm": _timm}
