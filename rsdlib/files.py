"""Where things lie and how they are written: whole or not at all, under keys of what made them."""

import contextlib
import hashlib
import json
import os
import time
import tokenize
import uuid
from pathlib import Path

import numpy as np

from rsdlib import runtime
from rsdlib.errors import CacheError, ConfigError, refusing

# --- places ---------------------------------------------------------------------------------------


def root():
    """Return the project's folder: ``$RSD_ROOT``, else the checkout of this package."""
    if os.environ.get("RSD_ROOT"):
        return Path(os.path.abspath(os.environ["RSD_ROOT"]))
    for folder in (Path(__file__).resolve().parents[1], Path.cwd(), *Path.cwd().parents):
        if (folder / "pyproject.toml").is_file() and (folder / "notebooks").is_dir():
            return folder
    raise ConfigError("the project's folder was not found", "Set RSD_ROOT to the checkout.")


def cache_dir():
    """Return ``data/cache``, where everything lies that can be made again."""
    return root() / "data" / "cache"


def resolve_path(path):
    """Return `path` as given if it exists from the working directory, else below the project."""
    path = Path(path).expanduser()
    here = path.is_absolute() or path.exists()
    return Path(os.path.abspath(path)) if here else root() / path


def relative(path):
    """Return `path` as text, relative to the project's folder where it lies inside."""
    path = Path(os.path.abspath(path))  # links are kept: data may be linked in from another disk
    return str(path.relative_to(root())) if path.is_relative_to(root()) else str(path)


# --- keys -----------------------------------------------------------------------------------------


def digest(value, length=16):
    """Return the first `length` hexadecimal digits of the SHA-256 of `value`'s canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def checksum(arrays):
    """Return the SHA-256 of named arrays: names, types, shapes and bytes."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        total.update(f"{name} {array.dtype} {array.shape}".encode())
        if array.size:
            total.update(memoryview(array).cast("B"))
    return total.hexdigest()


# --- whole files ----------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; on a clean exit it takes the place of `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name[:80]}.{uuid.uuid4().hex}.tmp"
    temporary.touch()
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # some file systems cannot flush a folder
            _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder, older=0):
    """Delete temporary files of killed writers: by the folder's only writer, or `older` seconds."""
    for path in Path(folder).glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime >= older:
                path.unlink()


def write_text(path, text):
    """Write `text` to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    """Write `value` to `path` as readable JSON; NaN is refused, a reader may not know it."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path):
    """Read a JSON file; a damaged one is a `CacheError` that names it."""
    with refusing((ValueError, OSError), CacheError, f"{relative(path)} cannot be read: {{}}"):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def write_parquet(path, frame):
    """Write a data frame to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        frame.to_parquet(temporary, index=False)


# --- arrays ---------------------------------------------------------------------------------------


def _refusing_damage(path, *causes):
    return refusing((ValueError, *causes), CacheError, f"{relative(path)} is damaged: {{}}")


def save_arrays(path, arrays, meta=None):
    """Write named arrays, and what JSON can hold, into one safetensors file with a checksum."""
    from safetensors.numpy import save_file

    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    # One key: safetensors writes several in a random order, and equal contents are equal bytes.
    header = json.dumps({"sha256": checksum(arrays), "meta": meta or {}}, sort_keys=True)
    with atomic_path(path) as temporary:
        save_file(arrays, temporary, metadata={"rsdlib": header})


def load_arrays(path):
    """Read what `save_arrays` wrote, into memory, and hold it against its checksum.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    arrays : dict of str to ndarray
    meta : dict

    Raises
    ------
    CacheError
        The file is absent, cut short, damaged, or was not written by `save_arrays`.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).exists():
        raise CacheError(f"there is no file {relative(path)}", "Run again what makes it.")
    with _refusing_damage(path, SafetensorError, FileNotFoundError, KeyError, TypeError):
        with safe_open(path, "numpy") as file:
            header = json.loads(file.metadata()["rsdlib"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if checksum(arrays) != header["sha256"]:
            raise ValueError("its bytes do not match its checksum")
        return arrays, header["meta"]


_TRAILER = hashlib.sha256().digest_size  # bytes of the checksum behind the array in a rows file


def save_rows(path, rows):
    """Write one large array as ``.npy``, its SHA-256 behind it, whole or not at all."""
    rows = np.asarray(rows, order="C")
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, rows, allow_pickle=False)
        stream.write(bytes.fromhex(checksum({"rows": rows})))


def save_row_batches(path, shape, dtype, batches):
    """Write what `save_rows` would write of the batches' rows, with one batch in memory at once."""
    with atomic_path(path) as temporary:
        rows, start = np.lib.format.open_memmap(temporary, "w+", dtype, shape), 0
        for batch in batches:
            rows[start : start + len(batch)] = batch
            start += len(batch)
        rows.flush()
        with temporary.open("ab") as stream:
            stream.write(bytes.fromhex(checksum({"rows": rows})))


def open_rows(path, *, verify=True):
    """Map what `save_rows` wrote into memory, read-only.

    Parameters
    ----------
    path : path-like
    verify : bool
        Compare the checksum: reads every byte once. The size is compared always.

    Returns
    -------
    ndarray

    Raises
    ------
    CacheError
        The file is damaged or was not written by `save_rows`.
    OSError
        The machine refuses, for example because too many files are open: no damage.
    """
    path = Path(path)
    with _refusing_damage(path, SyntaxError, tokenize.TokenError):
        rows = np.lib.format.open_memmap(path, mode="r")
        if path.stat().st_size != getattr(rows, "offset", 0) + rows.nbytes + _TRAILER:
            raise ValueError("its size is not that of its array")
        if verify:
            with path.open("rb") as stream:
                stream.seek(-_TRAILER, os.SEEK_END)
                if stream.read().hex() != checksum({"rows": rows}):
                    raise ValueError("its bytes do not match its checksum")
        return rows


def cached_rows(path, make):
    """Return the array stored at `path`; call `make` and store it where it is absent or damaged."""
    path = Path(path)
    if path.exists():
        try:
            return open_rows(path)
        except CacheError:
            runtime.log(f"{relative(path)} is damaged: making it again")
    save_rows(path, make())
    return open_rows(path, verify=False)
