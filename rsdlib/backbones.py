"""Image encoders, each with the preprocessing it was trained with: uint8 images in, features out.

Some are frozen in part: their ``front`` maps images to what is computed once and stored (`FeatureStore`), and the encoder reads
that in place of images.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from rsdlib import data, registry, runtime, training
from rsdlib.errors import BadValueError, ConfigError, ModelNotFoundError


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
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1) * 255, persistent=False)

    def forward(self, images):
        """Map uint8 images (b, 3, s, s) to features (b, p)."""
        return self.body((images.float() - self.mean) / self.std)


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

    def __init__(self, encoder, widths, dropout=0.5):
        super().__init__()
        layers, last = [], encoder.features
        for width in widths:
            layers += [nn.Linear(last, width), nn.BatchNorm1d(width), nn.GELU(), nn.Dropout(dropout)]
            last = width
        self.body, self.features, self.image_size = nn.Sequential(*layers), last, encoder.image_size
        object.__setattr__(self, "front", encoder.eval().requires_grad_(False))  # no part of this module

    def forward(self, features):
        """Map stored features (b, p) to features (b, last width)."""
        return self.body(features.float())


class FeatureStore:
    """What a frozen network makes of stored images: computed once, in shards, memory-mapped. Made by `build`.

    Attributes
    ----------
    ok : ndarray of shape (n,), bool
        Which rows have features: those with an image.
    bad : pandas.DataFrame
        The other rows, as the images' store lists them.
    key : str
        Changes with any image and any weight of the network.
    """

    def __init__(self, store, shards, key):
        self.ok, self.bad, self.key = store.ok, store.bad, key
        self._shards = shards  # each (k, ...), float16
        self._place = np.cumsum(self.ok) - 1  # (n,): which of the rows with an image

    @classmethod
    def build(cls, store, front, folder=None, device="auto"):
        """Compute what is not yet stored; a build that is stopped goes on at the first shard it lacks.

        Parameters
        ----------
        store : rsdlib.data.ImageStore or FeatureStore
        front : nn.Module
            Maps what the store holds, such as uint8 images (b, 3, s, s), to a tensor (b, ...).
        folder : path-like, optional
            Where shards lie; ``data/cache/features`` by default. Can be deleted at any time.
        device : str

        Returns
        -------
        FeatureStore
        """
        folder = Path(folder or runtime.cache_dir() / "features")
        key, rows = runtime.digest([training.weights_key(front), store.key]), np.flatnonzero(store.ok)
        shards = []
        for number, start in enumerate(starts := range(0, len(rows), _SHARD)):
            part, note = rows[start : start + _SHARD], f"computing features, shard {number + 1} of {len(starts)}"

            def compute(part=part, note=note):
                with np.errstate(over="ignore"):
                    found = training.apply(front, store, part, device=device, description=note).astype(np.float16)
                if not np.isfinite(found).all():
                    raise BadValueError(
                        "the network's features are not finite in float16", "It may have diverged: train with a lower lr."
                    )
                return {"features": found}

            shards.append(runtime.cached_arrays(folder / f"{key}-{number:05d}.safetensors", compute)["features"])
        return cls(store, shards, key)

    def batch(self, indices):
        """Gather features (b, ...), float32."""
        places = self._place[data.rows_with_image(self, indices)]
        return np.stack([self._shards[place // _SHARD][place % _SHARD] for place in places.tolist()]).astype(np.float32)

    def __len__(self):
        return len(self.ok)


_SHARD = 1000  # rows


def create(config):
    """Build the encoder that a `config.BackboneConfig` describes.

    Returns
    -------
    Encoder

    Raises
    ------
    ModelNotFoundError
        There is no such model, or its weights are nowhere.
    ConfigError
        A part that is to be frozen does not exist.
    """
    if config.library not in _BUILDERS:
        raise ConfigError(f"no image encoder comes from {config.library!r}", f"Known: {', '.join(_BUILDERS)}.")
    encoder = _BUILDERS[config.library](config)
    for part in config.frozen:
        weights = [weight for name, weight in encoder.named_parameters() if f"{name}.".startswith(f"{part}.")]
        if not weights:
            raise ConfigError(
                f"{config.model} has no part {part!r} to freeze",
                f"Parts are {', '.join(name for name, _ in encoder.named_children())}.",
            )
        for weight in weights:
            weight.requires_grad_(False)
    return encoder


def _timm(config):
    timm = runtime.require("timm")
    try:
        body = timm.create_model(_named(config, "config.json"), pretrained=config.pretrained, num_classes=0, **config.options)
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
    tokenizer = open_clip.get_tokenizer(_named(config, "open_clip_config.json"))

    def read(texts, batch_size=256):
        with torch.inference_mode():
            starts = runtime.track(range(0, len(texts), batch_size), "reading prompts")
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
        return open_clip.create_model(_named(config, "open_clip_config.json"), load_weights=config.pretrained, **options)
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


def _named(config, marker):
    """Return a model's name as timm and open_clip take it: their own, or that of a folder."""
    folder = registry.find(config.model, marker, fetch=config.pretrained)
    return config.model if folder is None else f"local-dir:{folder}"


def _diffusers(config):
    """Build the encoder half of a Stable Diffusion's U-Net."""
    from rsdlib import diffusion, unet

    encoder = unet.open_encoder(diffusion.locate(config.model), config.pretrained, config.options, config.image_size)
    if config.gradient_checkpointing:
        encoder.unet.enable_gradient_checkpointing()
    return encoder


_BUILDERS = {"timm": _timm, "open_clip": _open_clip, "diffusers": _diffusers}
