"""Reverse Stable Diffusion: from a generated image back to its prompt.

The package is thin: the notebooks tell the story, `rsdlib` holds what is worth testing. Its modules load when they are first
used, so that ``import rsdlib`` costs nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

_MODULES = (
    "backbones",
    "captioning",
    "cli",
    "config",
    "curriculum",
    "dakl",
    "data",
    "diffusion",
    "ensemble",
    "errors",
    "judge",
    "losses",
    "metrics",
    "model",
    "plots",
    "predict",
    "prompts",
    "recipes",
    "registry",
    "retrieval",
    "runtime",
    "swap",
    "tables",
    "training",
    "unet",
)
__all__ = ["Predictor", *_MODULES]


def __getattr__(name):
    if name == "Predictor":
        return import_module("rsdlib.predict").Predictor
    if name in _MODULES:
        return import_module(f"rsdlib.{name}")
    raise AttributeError(f"module 'rsdlib' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
