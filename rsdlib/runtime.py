"""Where things lie, what they run on, and how they are written: whole or not at all."""

import contextlib
import hashlib
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np

from rsdlib.errors import CacheError, ConfigError, DeviceError, MissingPackageError

# --- places -----------------------------------------------------------------------------------------------------------------


def root():
    """Return the project's folder: ``$RSD_ROOT``, else the checkout this package was installed from."""
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
    """Return `path` as given if it exists from the working directory, else below the project's folder."""
    path = Path(path).expanduser()
    return Path(os.path.abspath(path)) if path.is_absolute() or path.exists() else root() / path


def relative(path):
    """Return `path` as text, relative to the project's folder where it lies inside."""
    path = Path(os.path.abspath(path))  # links are kept: data may be linked in from another disk
    return str(path.relative_to(root())) if path.is_relative_to(root()) else str(path)


# --- device, precision, seeds -----------------------------------------------------------------------------------------------


def device(name="auto"):
    """Return the `torch.device` for ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"mps"``."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"{name!r} is not a device", "Use 'auto', 'cpu' or 'cuda'.") from error
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(chosen.type, False) or (chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count()):
        raise DeviceError(f"device {name!r} was asked for, but there is none here", "Use device='auto' or 'cpu'.")
    return chosen


def precision(name, on):
    """Return ``"fp32"`` or ``"bf16"`` for ``"auto"`` and a device.

    bf16 pays on recent GPUs, and on CPUs with bf16 matrix instructions: there ViT trains 2.0 times as fast, CLIP 1.8, Swin 1.3 and
    the U-Net's encoder 1.2 times (mini sizes, two cores).
    """
    import torch

    if name not in ("auto", "fp32", "bf16"):
        raise ConfigError(f"precision {name!r} is unknown", "Use 'auto', 'fp32' or 'bf16'.")
    if name != "auto":
        return name
    if on.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    fast = on.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast else "fp32"


def rng(*keys):
    """Return a NumPy generator that is a function of `keys` alone (integers and texts)."""
    return np.random.default_rng(int(digest(keys), 16))


def torch_seed(*keys):
    """Return a 63-bit seed for `torch.manual_seed` that is a function of `keys` alone."""
    return int(digest(keys)[:15], 16)


# --- keys and files ---------------------------------------------------------------------------------------------------------


def digest(value, length=16):
    """Return the first `length` hexadecimal digits of the SHA-256 of `value`'s canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; on a clean exit it is flushed to disk and takes the place of `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:80]}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp makes files private; these are shared like any other
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # some file systems cannot flush a folder
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder):
    """Delete the temporary files that killed writers left in `folder`; the caller must be its only writer."""
    for path in Path(folder).glob(".*.tmp"):
        path.unlink(missing_ok=True)


def write_text(path, text):
    """Write `text` to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    """Write `value` to `path` as readable JSON; NaN is refused, a reader may not know it."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path):
    """Read a JSON file; a damaged one is a `CacheError` that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CacheError(f"{relative(path)} cannot be read: {error}", "Delete it and run again.") from error


def write_parquet(path, frame):
    """Write a data frame to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        frame.to_parquet(temporary, index=False)


def checksum(arrays):
    """Return the SHA-256 of named arrays: names, types, shapes and bytes."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        total.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        total.update(memoryview(np.asarray(arrays[name], order="C")).cast("B") if arrays[name].size else b"")
    return total.hexdigest()


def save_arrays(path, arrays, meta=None):
    """Write named arrays into one safetensors file with a checksum, whole or not at all.

    Parameters
    ----------
    path : path-like
    arrays : dict of str to ndarray
    meta : dict, optional
        Anything JSON can hold; comes back from `load_arrays`.
    """
    from safetensors.numpy import save_file

    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    # One key: safetensors writes several in a random order, and equal contents shall be equal bytes.
    header = json.dumps({"sha256": checksum(arrays), "meta": meta or {}}, sort_keys=True)
    with atomic_path(path) as temporary:
        save_file(arrays, temporary, metadata={"rsdlib": header})


_DTYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U8": "u1", "BOOL": "?"}


def load_arrays(path, *, verify=True):
    """Read what `save_arrays` wrote.

    Parameters
    ----------
    path : path-like
    verify : bool
        Compare the checksum: reads every byte once, at about 1.5 GB/s.

    Returns
    -------
    arrays : dict of str to ndarray
        Memory-mapped, read-only.
    meta : dict

    Raises
    ------
    CacheError
        The file is absent, cut short, damaged, or was not written by `save_arrays`.
    """
    path = Path(path)

    def damaged(reason):
        return CacheError(f"{relative(path)} is damaged: {reason}", "Delete it; it is made again on the next run.")

    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= min(size - 8, 100_000_000):
                raise damaged("its header does not fit its size")
            header = json.loads(stream.read(length))
        info = json.loads(header.pop("__metadata__")["rsdlib"])
        arrays = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            dtype = np.dtype(_DTYPES[entry["dtype"]])
            count = int(np.prod(entry["shape"], dtype=object))
            if begin < 0 or end - begin != count * dtype.itemsize or 8 + length + end > size:
                raise damaged(f"array {name!r} does not lie inside the file")
            empty = np.empty(entry["shape"], dtype)
            arrays[name] = np.memmap(path, dtype, "r", 8 + length + begin, tuple(entry["shape"])) if count else empty
        meta = info["meta"]
    except OSError as error:
        raise CacheError(f"{relative(path)} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(f"its header cannot be read ({error})") from error
    if verify and checksum(arrays) != info.get("sha256"):
        raise damaged("its bytes do not match its checksum")
    return arrays, meta


def cached_arrays(path, make, meta=None):
    """Return the arrays stored at `path`; make and store them first where they are absent, stale or damaged.

    Parameters
    ----------
    path : path-like
    make : callable
        Called without arguments, returns a dict of arrays.
    meta : dict, optional
        What the arrays were made from; stored arrays with another `meta` are stale.
    """
    path = Path(path)
    if path.exists():
        try:
            arrays, stored = load_arrays(path)
            if stored == (meta or {}):
                return arrays
            log(f"{relative(path)} was made from something else: making it again")
        except CacheError:
            log(f"{relative(path)} is damaged: making it again")
    save_arrays(path, make(), meta)
    return load_arrays(path, verify=False)[0]


# --- talking to the user ----------------------------------------------------------------------------------------------------


def is_main_process():
    """Tell whether this process is the one that prints and writes (rank 0 under torchrun)."""
    return int(os.environ.get("RANK", "0")) == 0


def log(message):
    """Print one line, from the main process alone."""
    if is_main_process():
        print(message, flush=True)


def track(iterable, description, total=None, every=5.0):
    """Yield from `iterable` and show progress: a bar on a terminal or in JupyterLab, else a line every `every` seconds.

    ``RSD_HEADLESS=1`` (set by ``rsd run``) asks for lines.
    """
    total = len(iterable) if total is None and hasattr(iterable, "__len__") else total
    interactive = sys.stderr.isatty() or "ipykernel" in sys.modules
    if interactive and not os.environ.get("RSD_HEADLESS") and is_main_process():
        from tqdm.auto import tqdm

        yield from tqdm(iterable, desc=description, total=total, leave=False, mininterval=0.5)
        return
    start = last = time.monotonic()
    for count, item in enumerate(iterable, 1):
        yield item
        now = time.monotonic()
        if now - last >= every:
            last = now
            left = f"/{total}, about {(now - start) / count * (total - count):.0f} s left" if total else ""
            log(f"{description}: {count}{left}")


def require(module, package=None, extra=None):
    """Import an optional module, or say in one line how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module.split(".")[0].replace("_", "-")
        hint = f"pip install 'rsdlib[{extra}]'" if extra else f"pip install {package}"
        raise MissingPackageError(f"the package {package} is not installed", f"Install it with: {hint}") from error


def environment():
    """Return what a reader needs to judge or repeat a run: versions, code, threads, machine."""
    import torch

    names = ("torch", "torchvision", "timm", "accelerate", "transformers", "numpy", "pandas", "scikit-learn", "pillow")
    versions = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    git = ["git", "-C", str(root()), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        sha = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        sha = "unknown"
    return {
        "git": sha,
        "python": platform.python_version(),
        "versions": versions,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
