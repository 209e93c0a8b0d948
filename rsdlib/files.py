"""Where things lie and how they are written: whole or not at all, under keys of what made them."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import time
import tokenize
import uuid
from pathlib import Path

import numpy as np

from rsdlib import runtime
from rsdlib.errors import CacheError, ConfigError, RunBusyError, refusing

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
    """Return `path` as text with ``/``, relative to the project's folder where it lies inside."""
    path = Path(os.path.abspath(path))  # links are kept: data may be linked in from another disk
    return (path.relative_to(root()) if path.is_relative_to(root()) else path).as_posix()


# --- keys -----------------------------------------------------------------------------------------


digest = runtime.digest


def checksum(arrays):
    """Return the SHA-256 of named arrays: names, types, shapes and bytes."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        total.update(f"{name} {array.dtype} {array.shape}".encode())
        total.update(array.reshape(-1).view(np.uint8))
    return total.hexdigest()


# --- what file systems lack -----------------------------------------------------------------------

# What they answer to a call that they do not know; all else is trouble.
_NAMES = "ENOSYS ENOTSUP EOPNOTSUPP ENOLCK EINVAL EPERM ENODEV ENOTTY"
_LACKING = {getattr(errno, name) for name in _NAMES.split()}
_warn = functools.cache(runtime.log)  # once a process


@contextlib.contextmanager
def sparing(folder, without):
    """Go on where the file system of a folder lacks a call, and say once what that means."""
    try:
        yield
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in _LACKING:
            raise
        _warn(f"the file system of {folder} lacks a call ({error}): {without}")


@contextlib.contextmanager
def locked(path, busy):
    """Hold the lock `path` for this process, or refuse by `busy`; a killed holder's is gone."""
    import filelock

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path, timeout=0, fallback_to_soft=False)
    alone = refusing(filelock.Timeout, RunBusyError, busy, "Wait for it, or use another folder.")
    with contextlib.ExitStack() as held:
        with alone, sparing(path.parent, "nothing keeps a second process out"):
            held.enter_context(lock)
        yield


# --- whole files ----------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; on a clean exit it takes the place of `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name[:40]}.{uuid.uuid4().hex}.tmp"  # within 255 bytes
    temporary.touch()
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # some systems cannot open or flush a folder
            _flush(path.parent, os.O_RDONLY)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path):
    """Bring a file's bytes to the disk."""
    with sparing(path.parent, "what was written may be lost if the power fails"):
        _flush(path, os.O_RDWR)  # Windows flushes no file that is open for reading alone


def _flush(path, flags):
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder, older=0):
    """Delete temporary files of killed writers: by the folder's only writer, or `older` seconds."""
    for path in Path(folder).glob(".*.tmp"):
        with contextlib.suppress(OSError):  # gone, or on Windows still open elsewhere
            if time.time() - path.stat().st_mtime >= older:
                path.unlink()


def write_text(path, text):
    """Write `text` to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")  # the same bytes anywhere


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
    dtype = np.dtype(dtype)
    about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    total = hashlib.sha256(f"rows {dtype} {shape}".encode())  # as `checksum` begins
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, about)
        for batch in batches:
            content = np.asarray(batch, dtype, order="C").tobytes()
            total.update(content)
            stream.write(content)
        stream.write(total.digest())


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
        rows, start = _mapped(path)
        if path.stat().st_size != start + rows.nbytes + _TRAILER:
            raise ValueError("its size is not that of its array")
        if verify:
            with path.open("rb") as stream:
                stream.seek(-_TRAILER, os.SEEK_END)
                if stream.read().hex() != checksum({"rows": rows}):
                    raise ValueError("its bytes do not match its checksum")
        return rows


def _mapped(path):
    """Return the array of a file, mapped or else read, and the byte where it begins."""
    with sparing(path.parent, "arrays are read into memory"):
        rows = np.lib.format.open_memmap(path, mode="r")
        return rows, getattr(rows, "offset", 0)
    with path.open("rb") as stream:
        rows = np.lib.format.read_array(stream)
        rows.flags.writeable = False
        return rows, stream.tell() - rows.nbytes


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
