"""Pretrained weights by name: source, revision, licence, and what their bytes hash to.

A name is looked up in this order: ``$RSD_MODELS/<name>``, a Python package that carries the files,
the local hub cache, the hub.
"""

import hashlib
import os
import tomllib
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from rsdlib import files
from rsdlib.errors import CheckpointError, ModelNotFoundError


@dataclass(frozen=True)
class ModelSpec:
    """One set of pretrained weights.

    Attributes
    ----------
    hub : str
        Repository id on the model hub.
    licence : str
    revision : str or None
        Commit to fetch; None follows the main branch.
    sha256 : dict of str to str
        File name to checksum, compared whenever the files are located.
    package : str or None
        Importable package that carries the files in its folder ``model``.
    """

    hub: str
    licence: str
    revision: str | None = None
    sha256: dict = field(default_factory=dict)
    package: str | None = None


_TABLES = tomllib.loads((Path(__file__).parent / "weights.toml").read_text(encoding="utf-8"))
MODELS = {name: ModelSpec(**table) for name, table in _TABLES.items()}


def locate(name):
    """Return the folder that holds the files of model `name`, fetched if they are not here yet.

    Parameters
    ----------
    name : str
        One of `MODELS`.

    Returns
    -------
    Path

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
    folder = override(name) or _packaged(spec) or _fetched(name, spec)
    for file, expected in spec.sha256.items():
        _check(folder / file, expected)
    return folder


def override(name):
    """Return ``$RSD_MODELS/<name>`` if there is such a folder, else None."""
    folder = Path(os.environ.get("RSD_MODELS") or os.devnull) / name
    return folder if folder.is_dir() else None


def find(name, marker, *, fetch=True):
    """Return the folder of a model named by a path, or by a registered or overridden name.

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
        None for any other name.
    """
    folder = files.resolve_path(name)
    if (folder / marker).is_file():
        return folder
    if not fetch:
        return None
    return locate(name) if name in MODELS else override(name)


def _packaged(spec):
    package = find_spec(spec.package) if spec.package else None
    return Path(package.submodule_search_locations[0]) / "model" if package else None


def _fetched(name, spec):
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(spec.hub, revision=spec.revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = f"neither here nor to be fetched: {type(error).__name__}"
        fix = f"Put the repository's files into $RSD_MODELS/{name}, or go online once."
        raise ModelNotFoundError(f"the weights of {name} ({spec.hub}) are {reason}", fix) from error


_checked = set()


def require_files(folder, names):
    """Refuse a model's folder that lacks one of its files."""
    for name in names:
        if not (folder / name).is_file():
            message = f"{name} is missing in {files.relative(folder)}"
            raise ModelNotFoundError(message, "Fetch the model's files again.")


def _check(path, expected):
    """Compare a file's SHA-256, once per process and state of the file."""
    require_files(path.parent, [path.name])
    stat = path.stat()
    state = (str(path), stat.st_size, stat.st_mtime_ns)
    if state in _checked:
        return
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    if sha256 != expected:
        message = f"{files.relative(path)} has SHA-256 {sha256[:12]}…, not {expected[:12]}…"
        raise CheckpointError(message, "It is damaged or another model: fetch it again.")
    _checked.add(state)
