"""Run folders: who may write to one, what it was made from, its weights, its checkpoint."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from rsdlib import files, runtime
from rsdlib.config import FREE, TrainConfig
from rsdlib.errors import CacheError, CheckpointError

LAYOUT = 2  # of a run folder; another one is refused by name
CONFIG, ENVIRONMENT = "config.json", "run.json"
METRICS, WEIGHTS = "metrics.jsonl", "model.safetensors"
CHECKPOINT = "checkpoint.safetensors"
DIFFICULTY = "difficulty.parquet"  # the last file of a run: one that has it is finished

# --- opening --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A finished run folder, opened.

    Attributes
    ----------
    folder : Path
    config : rsdlib.config.TrainConfig
    recipe : dict
        What else made the run.
    metrics : DataFrame
        One row a line of ``metrics.jsonl``.
    difficulty : DataFrame
        row, epoch_1, epoch_2, ...: the similarity of each training pair in each epoch.
    """

    folder: Path
    config: TrainConfig
    recipe: dict
    metrics: pd.DataFrame
    difficulty: pd.DataFrame


def is_finished(folder):
    """Tell whether `folder` holds a finished run."""
    return (Path(folder) / DIFFICULTY).is_file()


def made_from(folder):
    """Return what ``config.json`` of a run folder says, of today's layout."""
    stored = files.read_json(Path(folder) / CONFIG)
    if stored.get("layout") != LAYOUT:
        where = files.relative(folder)
        message = f"{where} has layout {stored.get('layout', 1)} of a run folder, not {LAYOUT}"
        raise CheckpointError(message, "It is from another version: train again, or delete it.")
    return stored


def load_run(folder):
    """Open a finished run folder.

    Parameters
    ----------
    folder : path-like

    Returns
    -------
    Run

    Raises
    ------
    CacheError
        The folder is no finished run, or a file of it is damaged.
    CheckpointError
        The folder has the layout of another version.
    """
    folder = Path(folder)
    if not is_finished(folder):
        raise CacheError(f"{files.relative(folder)} holds no finished run", "Train it first.")
    stored = made_from(folder)
    metrics = pd.read_json(folder / METRICS, lines=True)
    difficulty = pd.read_parquet(folder / DIFFICULTY)
    return Run(folder, TrainConfig(**stored["train"]), stored["recipe"], metrics, difficulty)


# --- writing --------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder):
    """Hold a run folder for this process and those that train with it."""
    busy = f"another process is training in {files.relative(folder)}"
    with files.locked(folder / ".lock", busy):
        files.remove_leftovers(folder)
        yield


def claim(folder, settings):
    """Write ``config.json``, or compare it: other settings would make it another run."""
    path = folder / CONFIG
    settings = json.loads(json.dumps({"layout": LAYOUT, **settings}))
    if not path.exists():
        if runtime.is_main_process():
            files.write_json(path, settings)
        return
    tables = map(pd.json_normalize, (made_from(folder), settings))  # nested names are dotted ones
    before, now = (table.to_dict("records")[0] for table in tables)
    fixed = (before | now).keys() - {f"train.{name}" for name in FREE}
    differing = sorted(name for name in fixed if before.get(name) != now.get(name))
    if differing:
        message = f"{files.relative(folder)} holds another run; different: {', '.join(differing)}"
        raise CheckpointError(message, "Use another folder, or delete this one.")


# --- weights --------------------------------------------------------------------------------------


def save_weights(model, path, meta=None):
    """Write a model's weights and a checksum, whole or not at all.

    Parameters
    ----------
    model : nn.Module
    path : path-like
    meta : dict, optional
        Comes back from `load_weights`.
    """
    files.save_arrays(path, to_numpy(model.state_dict()), meta)


def load_weights(model, path):
    """Load what `save_weights` wrote; every tensor must be there and fit.

    Parameters
    ----------
    model : nn.Module
    path : path-like

    Returns
    -------
    dict
        The `meta` it was saved with.

    Raises
    ------
    CheckpointError
        Tensors are missing, unexpected or of another shape: they are named.
    CacheError
        The file is absent or damaged.
    """
    arrays, meta = files.load_arrays(path)
    load_arrays_into(model, arrays, path)
    return meta


def load_arrays_into(model, arrays, path):
    """Load named arrays into a model, or say which do not fit it."""
    try:
        model.load_state_dict(to_torch(arrays))
    except RuntimeError as error:  # torch names every tensor, a line each
        reason = " ".join(line.strip() for line in str(error).splitlines()[1:4])
        message = f"{files.relative(path)} does not fit this model: {reason[:300]}"
        raise CheckpointError(message, "Load it into the model it was made from.") from error


def to_numpy(tensors, below=""):
    """Return named tensors as arrays, perhaps with a word before each name."""
    return {below + name: value.detach().cpu().numpy() for name, value in tensors.items()}


def to_torch(arrays):
    """Return named arrays as tensors of their own memory."""
    return {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}


def below(arrays, name):
    """Return those of some arrays whose names begin with `name`, without it."""
    return {n.removeprefix(name): array for n, array in arrays.items() if n.startswith(name)}


# --- checkpoints ----------------------------------------------------------------------------------


def save_checkpoint(path, model, optimizer, history, meta):
    """Write everything a run needs to go on, as one file: it is whole or not there."""
    arrays = {"history": history, **to_numpy(model.state_dict(), "model.")}
    for number, moments in optimizer.state_dict()["state"].items():
        arrays |= to_numpy(moments, f"optimizer.{number}.")
    files.save_arrays(path, arrays, meta)


def load_checkpoint(path, model, optimizer):
    """Load a checkpoint into a model and its optimizer; return its history and its meta."""
    arrays, meta = files.load_arrays(path)
    load_arrays_into(model, below(arrays, "model."), path)
    state = optimizer.state_dict()
    for n in [number for group in state["param_groups"] for number in group["params"]]:
        state["state"][n] = to_torch(below(arrays, f"optimizer.{n}."))
    optimizer.load_state_dict(state)
    return arrays["history"], meta
