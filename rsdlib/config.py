"""Settings as frozen dataclasses, and the sizes of the project as data.

Nothing outside this file asks for a profile's name.
"""

import difflib
import functools
from collections.abc import Mapping
from dataclasses import field, replace
from types import MappingProxyType
from typing import Annotated, Literal

import pydantic
from pydantic import AfterValidator, Field, NonNegativeFloat
from pydantic_core import to_json, to_jsonable_python

from rsdlib import runtime
from rsdlib.errors import ConfigError

# --- checked dataclasses --------------------------------------------------------------------------


def settings(cls):
    """Make `cls` a frozen dataclass whose fields hold to their annotations."""
    how = pydantic.ConfigDict(extra="forbid", strict=True, validate_default=True)
    made = pydantic.dataclasses.dataclass(cls, frozen=True, config=how)
    accept = made.__init__

    @functools.wraps(accept)
    def init(self, *values, **named):
        try:
            accept(self, *values, **named)
        except pydantic.ValidationError as error:
            fault = error.errors()[0]
            name = str(fault["loc"][0]) if fault["loc"] else cls.__name__
            if fault["type"] == "unexpected_keyword_argument":
                fix = did_you_mean(name, cls.__annotations__)
                raise ConfigError(f"{cls.__name__} has no setting {name!r}", fix) from None
            problem = fault["msg"][0].lower() + fault["msg"][1:]
            raise ConfigError(f"{name} = {fault['input']!r} is refused: {problem}") from None

    made.__init__ = init
    return made


def did_you_mean(name, known):
    """Return a hint for somebody who asked for `name`: the nearest of `known`, or all of them."""
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted(known))}."


def as_dict(values):
    """Return settings as plain nested dicts and lists, ready for JSON and for `files.digest`."""
    return to_jsonable_python(values, fallback=dict)


def from_dict(kind, values):
    """Return settings of some kind from what `as_dict` made of them."""
    return pydantic.TypeAdapter(kind).validate_json(to_json(values))


def _frozen(value):
    """Return mappings and lists as what cannot be changed in place, at any depth."""
    if isinstance(value, Mapping):
        return MappingProxyType({name: _frozen(inner) for name, inner in value.items()})
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


Share = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(ge=0, le=0.5)]
Positive = Annotated[int, Field(ge=1)]
Names = Annotated[tuple | list, AfterValidator(_frozen)]
Table = Annotated[Mapping, AfterValidator(_frozen)]

# --- settings -------------------------------------------------------------------------------------


@settings
class CleanConfig:
    """The rules of `rsdlib.data.clean`, in the order they are applied."""

    max_nsfw: Annotated[float, Field(ge=0, le=2)] = 1.0  # highest score; 2 marks blurred images
    min_characters: Positive = 3  # shorter prompts say nothing
    max_characters: Positive = 1000  # longer ones are pasted; Stable Diffusion reads 77 tokens
    english_only: bool = True
    images_per_prompt: Positive = 1  # further images of the same normalised prompt are dropped
    near_duplicate: Annotated[float, Field(ge=0.5, le=1)] | None = 0.8  # Jaccard; None keeps all
    plain: bool = False  # take tags, weights and brackets out of the prompts: `rsdlib.data.plain`


@settings
class DataConfig:
    """From a folder of pairs to clean, split, labelled training data."""

    # Folder in DiffusionDB's layout, or with metadata.csv / metadata.jsonl; several as in PATH.
    source: str
    clean: CleanConfig = CleanConfig()
    val_fraction: Fraction = 0.1
    test_fraction: Fraction = 0.04
    turn: Share = 0.0  # another split of the same size: by test_fraction, and nothing is shared
    vocabulary_size: Positive = 1000  # m, the paper's section 7
    limit: Positive | None = None  # read only this many pairs
    on_bad: Literal["error", "skip"] = "error"  # what is damaged or missing: stop, or leave it out


@settings
class BackboneConfig:
    """An encoder: which library builds it, from which weights, and how it is fed and run."""

    library: str  # "timm", "open_clip" or "diffusers"; "blip", the captioner; "own", handed in
    model: str  # the library's name, a name in `rsdlib.weights`, or a folder that holds the model
    pretrained: bool = True
    options: Table = field(default_factory=dict)  # handed to the library's constructor
    image_size: Annotated[int, Field(ge=8, le=2048)] | None = None  # None: as the weights expect
    gradient_checkpointing: bool = False
    frozen: Names = ()  # parts of the encoder that keep their weights, such as "unet.conv_in"
    # "gpu": on a CPU it is not trained, its features are computed once and stored.
    fine_tune: Literal["always", "gpu", "never"] = "always"


@settings
class HeadConfig:
    """The paper's Fig. 3 and the joint objective L = L_cos + weight * L_cls."""

    head: Literal["sequential", "separate", "concat"] = "sequential"
    weight: NonNegativeFloat = 0.1  # the paper's lambda; 0 trains without the vocabulary head
    huber: NonNegativeFloat = 0.0  # weight of the authors' optional Huber term on the embeddings
    probe: bool = False  # start the embedding head at the ridge regression on the features
    # What that head reads, where the encoder has named classes; see `rsdlib.models.Speech`.
    reads: Literal["features", "spoken", "both"] = "features"
    chosen: bool = False  # the probe's strengths, temperature and voice: the best on validation
    named_below: Annotated[int, Field(ge=0)] = 0  # with fewer prompts, classes are the vocabulary


@settings
class CurriculumConfig:
    """In which order, how sharply or how fast a model learns; see `rsdlib.training`."""

    name: Literal["none", "ours", "cbs", "lerac"] = "none"  # "ours" is the paper's
    stages: Annotated[int, Field(ge=1, le=100)] = 3  # ours: easy, medium, hard
    equal: Literal["epochs", "steps"] = "epochs"  # ours: as many as without curriculum
    sigma: Annotated[float, Field(ge=0, le=10)] = 1.0  # CBS: first deviation of the blur
    decay: Share = 0.5  # CBS: sigma's factor at each fall
    falls: Positive = 8  # CBS: number of falls
    lowest: Annotated[float, Field(ge=1e-12, le=1)] = 1e-3  # LeRaC: last layer's first rate
    until: Share = 0.3  # LeRaC: share of the steps after which all layers are equally fast


@settings
class TrainConfig:
    """The training loop."""

    epochs: Positive = 3
    batch_size: Annotated[int, Field(ge=2)] = 64  # pairs behind one step, over all processes
    micro_batches: Positive = 1  # split each batch to save memory; the gradients add up
    lr: Share = 1e-4
    lr_min: Share = 1e-6
    warmup: Annotated[float, Field(ge=0, le=0.9)] = 0.0  # share of steps with a rising rate
    weight_decay: NonNegativeFloat = 0.0  # 0 makes AdamW the paper's Adam
    clip: float | None = 1.0  # largest norm of the gradient. Differs from the paper: none there
    precision: str = "auto"  # "auto", "fp32" or "bf16"
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    save_every: Positive = 200  # steps between checkpoints; one is written after each epoch too
    log_every: Positive = 20  # steps between lines in metrics.jsonl
    workers: Annotated[int, Field(ge=0)] | None = None  # processes that read; None: 2 for a GPU
    device: str = "auto"
    processes: Annotated[int, Field(ge=0)] = 1  # that train side by side; 0: one a GPU
    compile: bool = False  # let torch compile the model: minutes at first, then faster on GPUs
    tf32: bool = True  # on GPUs, float32 products with 10 bits of mantissa

    def fixed(self):
        """Return what makes a run what it is: all that may not change on resume."""
        return {name: value for name, value in as_dict(self).items() if name not in FREE}


FREE = frozenset({"micro_batches", "save_every", "log_every", "workers", "device"})
FREE |= {"processes", "compile", "tf32"}


@settings
class Profile:
    """One size of the whole project."""

    name: str
    data: DataConfig
    backbones: Annotated[Mapping[str, BackboneConfig], AfterValidator(_frozen)]
    train: TrainConfig
    train_overrides: Table = field(default_factory=dict)  # backbone -> what it trains with instead
    head: HeadConfig = HeadConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    clusters: Names = (1000, 5000, 10_000)  # numbers r of centroids that DAKL is tried with
    generator: str = ""  # the diffusion model that made the data; empty: unknown
    reader: str = "vit"  # the backbone of notebooks that train one
    readers: Names = ("clip", "unet", "swin", "vit")  # the ensemble's
    published: str = ""  # folder of the results that ship with the project

    def backbone(self, name):
        """Return the settings of backbone `name`; ``timm:<name>`` opens any other timm model."""
        if name in self.backbones:
            return self.backbones[name]
        if name.startswith("timm:"):
            return BackboneConfig("timm", name.removeprefix("timm:"))
        known = ", ".join(sorted(self.backbones))
        raise ConfigError(f"backbone {name!r} is unknown", f"Known: {known}, or 'timm:<name>'.")

    def with_backbone(self, name, **changes):
        """Return the profile with other settings for one backbone."""
        changed = replace(self.backbone(name), **changes)
        return replace(self, backbones={**self.backbones, name: changed})

    def with_context(self, name, context):
        """Return the profile whose U-Net reads an image's "caption" beside it, or "empty" text."""
        if context not in ("caption", "empty"):
            raise ConfigError(f"context = {context!r} is unknown", "Use 'caption' or 'empty'.")
        options = dict(self.backbone(name).options)
        if context == "empty":
            options.pop("captioner", None)
        return self.with_backbone(name, options=options)

    def training(self, backbone, **changes):
        """Return the training settings of one backbone, with `changes` on top."""
        return replace(self.train, **{**self.train_overrides.get(backbone, {}), **changes})


# --- profiles -------------------------------------------------------------------------------------


_TABLES = runtime.read_table("profiles.toml").items()
_READ = {name: from_dict(Profile, {"name": name, **table}) for name, table in _TABLES}
PROFILES = MappingProxyType(_READ)


def profile(name, source=None, **changes):
    """Return the profile ``"smoke"``, ``"mini"``, ``"desk"`` or ``"paper"``, perhaps on other data.

    Parameters
    ----------
    name : str
    source : str, optional
        Folder of pairs to use in place of the profile's own.
    **changes
        Settings of `DataConfig` or `CleanConfig` that differ; None leaves one as it is.

    Raises
    ------
    ConfigError
        The profile or a setting is unknown, or a value is refused.
    """
    if name not in PROFILES:
        raise ConfigError(f"profile {name!r} is unknown", did_you_mean(name, PROFILES))
    chosen = PROFILES[name]
    changes = {setting: value for setting, value in changes.items() if value is not None}
    rules = CleanConfig.__annotations__.keys() & changes.keys()
    clean = replace(chosen.data.clean, **{rule: changes.pop(rule) for rule in rules})
    data = replace(chosen.data, clean=clean, **changes)
    if source:  # who made other data is not known
        return replace(chosen, data=replace(data, source=source), generator="", published="")
    return replace(chosen, data=data)
