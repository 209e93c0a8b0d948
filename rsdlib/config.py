"""Settings as frozen dataclasses, and the project's three sizes as data: nothing outside this file asks for a profile's name."""

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field

from rsdlib.errors import ConfigError


def from_dict(cls, values):
    """Build the dataclass `cls` from a dict, strictly: an unknown name is a `ConfigError` that offers the nearest one."""
    known = {f.name for f in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"{cls.__name__} has no setting {name!r}", f"Did you mean {near[0]!r}?" if near else f"Known: {sorted(known)}."
            )
    return cls(**values)


def replace(settings, **changes):
    """Return `settings` with `changes`, checked as strictly as `from_dict`."""
    return from_dict(type(settings), {**_shallow(settings), **changes})


def _shallow(settings):
    return {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}


def as_dict(settings):
    """Return settings as plain nested dicts, ready for JSON and for `runtime.digest`."""
    return dataclasses.asdict(settings)


def matches(value, annotation):
    """Tell whether `value` fits a type annotation made of plain types, generics, unions and None; an int fits a float."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return any(matches(value, option) for option in typing.get_args(annotation))
    annotation = type(None) if annotation is None else typing.get_origin(annotation) or annotation
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return True
    return isinstance(value, annotation) and not (isinstance(value, bool) and annotation is int)


class _Checked:
    """Checks every field's type, then the ranges that the class states in `_ranges`: name -> (lowest, highest or None)."""

    _ranges: typing.ClassVar[dict] = {}

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for name, value in _shallow(self).items():
            if not matches(value, hints[name]):
                wanted = getattr(hints[name], "__name__", str(hints[name]))
                raise ConfigError(f"{name} = {value!r} is of type {type(value).__name__}, not {wanted}")
            if type(value) is int and hints[name] in (float, float | None):
                object.__setattr__(self, name, float(value))  # 1 and 1.0 are one setting, with one key
        for name, (low, high) in self._ranges.items():
            value = getattr(self, name)
            if value is not None and not (value >= low and (high is None or value <= high)):
                raise ConfigError(
                    f"{name} = {value!r} is out of range",
                    f"It must be at least {low}" + (f" and at most {high}." if high is not None else "."),
                )


@dataclass(frozen=True)
class CleanConfig(_Checked):
    """The rules of `rsdlib.prompts.clean`, in the order they are applied."""

    max_nsfw: float = 1.0  # highest allowed image_nsfw and prompt_nsfw score
    min_characters: int = 3  # shorter prompts say nothing
    max_characters: int = 1000  # longer ones are pasted text; Stable Diffusion reads about 77 tokens
    english_only: bool = True
    images_per_prompt: int = 1  # further images of the same normalised prompt are dropped
    near_duplicate: float | None = 0.8  # token-set Jaccard from which two prompts count as one; None keeps all
    _ranges: typing.ClassVar[dict] = {
        "max_nsfw": (0, 2),  # DiffusionDB marks images blurred by the filter with 2
        "min_characters": (1, None),
        "max_characters": (1, None),
        "images_per_prompt": (1, None),
        "near_duplicate": (0.5, 1),
    }


@dataclass(frozen=True)
class DataConfig(_Checked):
    """From a folder of pairs to clean, split, labelled training data."""

    source: str  # folder in DiffusionDB's layout, or with metadata.csv / metadata.jsonl
    clean: CleanConfig = field(default_factory=CleanConfig)
    val_fraction: float = 0.1
    test_fraction: float = 0.04
    vocabulary_size: int = 1000  # m, the paper's section 7
    limit: int | None = None  # read only this many pairs
    _ranges: typing.ClassVar[dict] = {
        "val_fraction": (0, 0.5),
        "test_fraction": (0, 0.5),
        "vocabulary_size": (1, None),
        "limit": (1, None),
    }


@dataclass(frozen=True)
class BackboneConfig(_Checked):
    """An encoder: which library builds it, from which weights, and how it is fed and run."""

    library: str  # a builder in `rsdlib.backbones`: "timm", "open_clip" or "diffusers"; or "blip", the captioner
    model: str  # the library's name, a name in `rsdlib.registry`, or a folder that holds the model
    pretrained: bool = True
    options: dict = field(default_factory=dict)  # handed to the library's constructor
    image_size: int | None = None  # pixels a side; None takes the size the weights were trained with
    gradient_checkpointing: bool = False
    frozen: list = field(default_factory=list)  # names of the encoder's parts that keep their weights, such as "unet.conv_in"
    _ranges: typing.ClassVar[dict] = {"image_size": (8, 2048)}


@dataclass(frozen=True)
class HeadConfig(_Checked):
    """The paper's Fig. 3 and the joint objective L = L_cos + weight * L_cls."""

    head: str = "sequential"  # "separate", "concat" or "sequential"
    weight: float = 0.1  # the paper's lambda; 0 trains without the vocabulary head
    huber: float = 0.0  # weight of the authors' optional Huber term on the embeddings
    probe: bool = False  # start the embedding head at the ridge regression on the backbone's features as they came
    _ranges: typing.ClassVar[dict] = {"weight": (0, None), "huber": (0, None)}


@dataclass(frozen=True)
class CurriculumConfig(_Checked):
    """In which order, how sharp or how fast a model learns; see `rsdlib.curriculum`."""

    name: str = "none"  # "none", "ours" (the paper's), "cbs" or "lerac"
    stages: int = 3  # ours: easy, medium, hard
    equal: str = "epochs"  # ours: as many "epochs" as without curriculum, or as many "steps"
    sigma: float = 1.0  # CBS: first standard deviation of the blur
    decay: float = 0.5  # CBS: sigma's factor at each fall
    falls: int = 8  # CBS: number of falls
    lowest: float = 1e-3  # LeRaC: first rate of the last layer, as a share
    until: float = 0.3  # LeRaC: share of the steps after which all layers are equally fast
    _ranges: typing.ClassVar[dict] = {
        "stages": (1, 100),
        "sigma": (0, 10),
        "decay": (0, 1),
        "falls": (1, None),
        "lowest": (1e-12, 1),
        "until": (0, 1),
    }

    def __post_init__(self):
        super().__post_init__()
        if self.name not in ("none", "ours", "cbs", "lerac"):
            raise ConfigError(f"curriculum {self.name!r} is unknown", "Use 'none', 'ours', 'cbs' or 'lerac'.")


@dataclass(frozen=True)
class TrainConfig(_Checked):
    """The training loop."""

    epochs: int = 3
    batch_size: int = 64  # over all processes and micro-batches: the number of pairs behind one step
    micro_batches: int = 1  # split each batch to save memory; the sum of the gradients is the same
    lr: float = 1e-4
    lr_min: float = 1e-6
    warmup: float = 0.0  # share of all steps with a linearly rising rate
    weight_decay: float = 0.0  # 0 makes AdamW the paper's Adam
    clip: float | None = 1.0  # largest norm of the gradient. Differs from the paper: it does not clip
    precision: str = "auto"  # "auto", "fp32" or "bf16"
    seed: int = 0
    save_every: int = 200  # steps between checkpoints; one is also written after each epoch
    log_every: int = 20  # steps between lines in metrics.jsonl
    device: str = "auto"
    free: typing.ClassVar[frozenset] = frozenset({"micro_batches", "save_every", "log_every", "device"})  # may change on resume
    _ranges: typing.ClassVar[dict] = {
        "epochs": (1, None),
        "batch_size": (1, None),
        "micro_batches": (1, None),
        "lr": (0, 1),
        "lr_min": (0, 1),
        "warmup": (0, 0.9),
        "weight_decay": (0, None),
        "seed": (0, 2**32 - 1),
        "save_every": (1, None),
        "log_every": (1, None),
    }

    def fixed(self):
        """Return the settings that make a run what it is: all that may not change on resume."""
        return {name: value for name, value in as_dict(self).items() if name not in self.free}


@dataclass(frozen=True)
class Profile(_Checked):
    """One size of the whole project."""

    name: str
    data: DataConfig
    backbones: dict  # name -> BackboneConfig
    train: TrainConfig
    train_overrides: dict = field(default_factory=dict)  # backbone -> what it trains with instead
    head: HeadConfig = field(default_factory=HeadConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    clusters: tuple = (1000, 5000, 10_000)  # numbers r of k-means centroids that DAKL is tried with
    generator: str = ""  # the diffusion model that made the data: a folder or a name in `rsdlib.registry`; empty: unknown
    figures: str = ""  # where `rsd reproduce` puts the figures; empty: below runs

    def backbone(self, name):
        """Return the settings of backbone `name`; ``timm:<name>`` opens any other timm model at its own size."""
        if name in self.backbones:
            return self.backbones[name]
        if name.startswith("timm:"):
            return BackboneConfig(library="timm", model=name.removeprefix("timm:"))
        raise ConfigError(f"backbone {name!r} is unknown", f"Known: {sorted(self.backbones)}, or 'timm:<name>'.")

    def training(self, backbone, **changes):
        """Return the training settings of one backbone, with `changes` on top."""
        return replace(self.train, **{**self.train_overrides.get(backbone, {}), **changes})


_SMOKE_VIT = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
_SMOKE_SWIN = {"img_size": 64, "patch_size": 4, "window_size": 8, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4)}
_MINI_DATA = DataConfig(
    source="data/mini/diffusiondb",
    clean=CleanConfig(images_per_prompt=4),
    val_fraction=0.1,
    test_fraction=0.15,
    vocabulary_size=150,
)
_MINI_GENERATOR = "data/mini/stable-diffusion"
_MINI_MODELS = {
    "clip": BackboneConfig("open_clip", "data/mini/clip"),
    "unet": BackboneConfig("diffusers", _MINI_GENERATOR),
    "blip": BackboneConfig("blip", "data/mini/blip"),
}

PROFILES = {
    # Seconds a notebook: for tests.
    "smoke": Profile(
        name="smoke",
        data=replace(_MINI_DATA, limit=384, vocabulary_size=32, val_fraction=0.17, test_fraction=0.17),
        backbones={
            "vit": BackboneConfig("timm", "vit_tiny_patch16_224", False, _SMOKE_VIT, 64),
            "swin": BackboneConfig("timm", "swinv2_tiny_window8_256", False, _SMOKE_SWIN, 64),
            "clip-mlp": BackboneConfig("open_clip", "data/mini/clip", options={"mlp": [64, 64]}),
            **_MINI_MODELS,
        },
        generator=_MINI_GENERATOR,
        clusters=(4, 8, 16),
        train=TrainConfig(epochs=2, batch_size=32, lr=1e-3, warmup=0.1),
    ),
    # Minutes on two cores, offline: the default.
    "mini": Profile(
        name="mini",
        data=_MINI_DATA,
        backbones={
            "vit": BackboneConfig("timm", "data/mini/vit", image_size=64),
            "swin": BackboneConfig("timm", "data/mini/swin", image_size=64),
            "clip-mlp": BackboneConfig("open_clip", "data/mini/clip", options={"mlp": [512, 512]}),
            **_MINI_MODELS,
        },
        generator=_MINI_GENERATOR,
        clusters=(30, 100, 300),
        figures="figures",
        train=TrainConfig(epochs=3, batch_size=32, lr=1e-3, warmup=0.1, weight_decay=0.05, save_every=50),
        train_overrides={"unet": {"epochs": 5, "lr": 2e-3}, "blip": {"epochs": 5}},
        head=HeadConfig(probe=True),
    ),
    # DiffusionDB and the real weights, on GPUs: the paper's settings (supplementary, section 7).
    "paper": Profile(
        name="paper",
        data=DataConfig(source="data/diffusiondb"),
        backbones={
            "vit": BackboneConfig("timm", "vit_base_patch16_224.augreg_in21k_ft_in1k", image_size=224),
            "swin": BackboneConfig(
                "timm", "swinv2_large_window12to16_192to256.ms_in22k_ft_in1k", image_size=256, gradient_checkpointing=True
            ),
            "clip": BackboneConfig("open_clip", "ViT-H-14", image_size=224, gradient_checkpointing=True),
            "clip-mlp": BackboneConfig("open_clip", "ViT-H-14", options={"mlp": [8192, 8192]}, image_size=224),
            "unet": BackboneConfig("diffusers", "stable-diffusion-2-base", image_size=512, gradient_checkpointing=True),
            "blip": BackboneConfig("blip", "blip-image-captioning-large"),
        },
        generator="stable-diffusion-v1-4",
        train=TrainConfig(save_every=2000, log_every=100),
        train_overrides={"clip": {"lr": 5e-6}, "blip": {"lr": 1e-5}},
    ),
}


def profile(name, source=None, **changes):
    """Return the profile ``"smoke"``, ``"mini"`` or ``"paper"``, perhaps on other data.

    Parameters
    ----------
    name : str
    source : str, optional
        Folder of pairs to use in place of the profile's own.
    **changes
        Settings of `DataConfig` or `CleanConfig` that differ; None leaves one as it is.
    """
    if name not in PROFILES:
        near = difflib.get_close_matches(str(name), PROFILES, n=1)
        raise ConfigError(f"profile {name!r} is unknown", f"Did you mean {near[0]!r}?" if near else f"Known: {sorted(PROFILES)}.")
    chosen = PROFILES[name]
    changes = {setting: value for setting, value in changes.items() if value is not None}
    cleaning = {f.name for f in dataclasses.fields(CleanConfig)} & changes.keys()
    clean = replace(chosen.data.clean, **{setting: changes.pop(setting) for setting in cleaning})
    data = replace(chosen.data, clean=clean, **changes)
    if source:  # who made other data is not known
        return replace(chosen, data=replace(data, source=source), generator="")
    return replace(chosen, data=data)
