"""Image encoders with the preprocessing they were trained with: uint8 images in, features out."""

import torch
from torch import nn

from rsdlib import files, runtime, weights
from rsdlib.config import BackboneConfig, as_dict
from rsdlib.errors import CheckpointError, ConfigError, ModelNotFoundError, refusing

_TIMM, _CLIP = "config.json", "open_clip_config.json"  # files that tell their folders


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


class FrontedEncoder(nn.Module):
    """An encoder that reads what its frozen `front` makes of images, computed once and stored.

    The front lies beside the module: it is neither trained, saved nor moved with it.

    Parameters
    ----------
    front : nn.Module or None
        Maps uint8 images to what `forward` reads.
    """

    def __init__(self, front):
        super().__init__()
        self.__dict__["front"] = front  # torch takes up no module that is set like this


class Frozen(FrontedEncoder):
    """An encoder that is not trained: its features are computed once and stored.

    A multi-layer perceptron may learn above them, as in the authors' code; each of its layers is
    linear, batch norm, GELU, dropout.

    Parameters
    ----------
    encoder : nn.Module
        Frozen here, behind its own front if it has one; the ``front``.
    widths : sequence of int
        Of the layers; the authors' are 8192, 8192.
    dropout : float
    """

    def __init__(self, encoder, widths=(), dropout=0.5):
        front = encoder if encoder.front is None else nn.Sequential(encoder.front, encoder)
        super().__init__(front.eval().requires_grad_(False))
        sizes, layers = [encoder.features, *widths], []
        for p, q in zip(sizes[:-1], widths, strict=True):
            layers += [nn.Linear(p, q), nn.BatchNorm1d(q), nn.GELU(), nn.Dropout(dropout)]
        self.body = nn.Sequential(*layers)
        self.features, self.image_size = sizes[-1], encoder.image_size

    def forward(self, features):
        """Map stored features (b, p) to features (b, last width)."""
        return self.body(features.float())


def create(config, *, load=True):
    """Build the encoder that a `config.BackboneConfig` describes.

    Parameters
    ----------
    config : rsdlib.config.BackboneConfig
        ``BackboneConfig("timm", name)`` opens any timm model at its own size.
    load : bool
        False leaves out the pretrained weights of what is trained, because a run's own are to
        follow: they need not be here. A frozen front is part of no run and is opened all the same.

    Returns
    -------
    nn.Module
        With ``features`` p, ``image_size`` s and ``front``: without a front it maps uint8 images
        (b, 3, s, s) to features (b, p), else what the front makes of them.

    Raises
    ------
    ModelNotFoundError
        There is no such model, or its weights are nowhere.
    ConfigError
        The library is unknown, or a part that is to be frozen does not exist.
    """
    if config.library not in _BUILDERS:
        raise ConfigError(f"no image encoder comes from {config.library!r}", f"Use {[*_BUILDERS]}.")
    load = load or config.fine_tune == "never"
    encoder = _BUILDERS[config.library](config, config.pretrained and load)
    for part in config.frozen:
        message = f"{config.model} has no part {part!r} to freeze: {{}}"
        with refusing(AttributeError, ConfigError, message):
            encoder.get_submodule(part).requires_grad_(False)
    return Frozen(encoder) if config.fine_tune == "never" else encoder


def open_front(settings):
    """Return the frozen front of the encoder that the dict of a `BackboneConfig` describes."""
    return create(BackboneConfig(**settings), load=False).front


def _timm(config, pretrained):
    import timm

    body = open_timm(config, pretrained)
    if config.gradient_checkpointing:
        body.set_grad_checkpointing()
    expects = timm.data.resolve_model_data_config(body)
    size = config.image_size or expects["input_size"][-1]
    return Encoder(body, body.head_hidden_size, size, expects["mean"], expects["std"])


def open_timm(config, pretrained, *, classes=False):
    """Return a timm model, with its classifier where the `classes` are wanted."""
    timm = runtime.require("timm")
    options = as_dict(config.options) | ({} if classes else {"num_classes": 0})
    spec = weights.MODELS.get(config.model)
    with _naming(config):
        if spec is None or not spec.checkpoint:
            name = _name(config, _TIMM, pretrained)
            return timm.create_model(name, pretrained=pretrained, **options)
        body = timm.create_model(config.model)
    if pretrained:
        load_in_order(body, weights.locate(config.model) / spec.checkpoint)
    if not classes:
        body.reset_classifier(0)
    return body.to(memory_format=torch.channels_last)  # twice as fast on a CPU


def load_in_order(model, path):
    """Load a checkpoint whose tensors are the model's, in its order, under other names.

    Parameters
    ----------
    model : nn.Module
    path : Path
        What ``torch.save`` wrote; read without running code in it.

    Raises
    ------
    CheckpointError
        The file is no checkpoint, or one of another model.
    """
    where, fix = files.relative(path), "It is damaged or another model: fetch it again."
    with refusing(Exception, CheckpointError, f"{where} is not the model's: {{}}", fix):
        stored = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(dict(zip(model.state_dict(), stored.values(), strict=True)))


def _open_clip(config, pretrained):
    """CLIP's image tower; with the option ``mlp`` frozen, below a perceptron of those widths."""
    widths = config.options.get("mlp")
    tower = _image_tower(_clip(config, config.pretrained if widths else pretrained), config)
    return Frozen(tower, widths, config.options.get("dropout", 0.5)) if widths else tower


def _diffusers(config, pretrained):
    from rsdlib.models import unet

    return unet.open_encoder(config, pretrained)


_BUILDERS = {"timm": _timm, "open_clip": _open_clip, "diffusers": _diffusers}


def clip_pair(config, device="auto"):
    """Open both towers of a CLIP.

    Parameters
    ----------
    config : rsdlib.config.BackboneConfig
        Of the library ``"open_clip"``.
    device : str
        Where both towers run.

    Returns
    -------
    encoder : Encoder
        Of images.
    read : callable
        ``read(texts, batch_size=256)`` gives unit embeddings (n, p), float32.
    """
    open_clip = runtime.require("open_clip", "open_clip_torch")
    on = runtime.device(device)
    clip = _clip(config, config.pretrained).eval().to(on)
    tokenizer = open_clip.get_tokenizer(_name(config, _CLIP, config.pretrained))

    def read(texts, batch_size=256):
        embeddings = []
        with torch.inference_mode():
            for start in runtime.track(range(0, len(texts), batch_size), "reading prompts"):
                tokens = tokenizer(list(texts[start : start + batch_size])).to(on)
                embeddings.append(clip.encode_text(tokens, normalize=True).float().cpu())
        return torch.cat(embeddings).numpy()

    return _image_tower(clip, config).to(on), read


def _clip(config, pretrained):
    open_clip = runtime.require("open_clip", "open_clip_torch")
    options = {n: v for n, v in as_dict(config.options).items() if n not in ("mlp", "dropout")}
    options |= {"load_weights": pretrained, "require_pretrained": pretrained}
    with _naming(config):
        return open_clip.create_model(_name(config, _CLIP, pretrained), **options)


def _image_tower(clip, config):
    import open_clip

    colours, side = open_clip.get_model_preprocess_cfg(clip), clip.visual.image_size
    if config.gradient_checkpointing:
        clip.visual.set_grad_checkpointing()
    size = config.image_size or (side[0] if isinstance(side, tuple) else side)
    return Encoder(clip.visual, clip.visual.output_dim, size, colours["mean"], colours["std"])


def _name(config, marker, pretrained):
    """Return a model's name as timm and open_clip take it: their own, or that of a folder."""
    folder = weights.find(config.model, marker, fetch=pretrained)
    return f"local-dir:{folder}" if folder else config.model


def pipeline_folder(name):
    """Return the folder of a pipeline in diffusers' format: a path, or a name in `weights`."""
    return weights.find(name, "model_index.json") or weights.locate(name)


def _naming(config):
    what = f"{config.library} cannot build {config.model!r} (pretrained={config.pretrained}): {{}}"
    fix = f"Check the name: {config.library}.list_models(), or put the weights into $RSD_MODELS."
    return no_model(what, fix)


def no_model(message, fix):
    """Turn what a library says of a model that it cannot open into our own error."""
    return refusing((RuntimeError, ValueError, OSError), ModelNotFoundError, message, fix)
