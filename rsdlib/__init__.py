"""Reverse Stable Diffusion: from a generated image back to its prompt.

Five rooms, each with a door (its ``__init__``): `data`, `models`, `training`, `ensemble` and
`analysis`. `experiment` walks through them: prepare, train, predict, compare. Rooms open when they
are first used, so that ``import rsdlib`` costs nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

_ROOMS = ("data", "models", "training", "ensemble", "analysis")
_BETWEEN = ("cli", "config", "errors", "experiment", "files", "predict", "runtime", "weights")
__all__ = ["Predictor", *_BETWEEN, *_ROOMS]


def __getattr__(name):
    if name == "Predictor":
        return import_module("rsdlib.predict").Predictor
    if name in __all__:
        return import_module(f"rsdlib.{name}")
    raise AttributeError(f"module 'rsdlib' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
