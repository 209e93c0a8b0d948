"""What things run on: devices, precision, seeds; and how they speak to whoever waits."""

import contextlib
import functools
import hashlib
import importlib
import json
import logging
import os
import platform
import subprocess
import sys
import time
import tomllib
from importlib import metadata
from pathlib import Path

import numpy as np

from rsdlib.errors import ConfigError, DeviceError, MissingPackageError, refusing

# --- device, precision, seeds ---------------------------------------------------------------------


def device(name="auto"):
    """Return the `torch.device` for ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``.

    Auto is a GPU, an Apple one if it can do all that is asked of it, else the CPU.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else _apple_or_cpu()
    with refusing(RuntimeError, DeviceError, f"{name!r} is not a device", "Use 'auto' or 'cpu'."):
        chosen = torch.device(name)
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": torch.backends.mps.is_available()}
    if (chosen.index or 0) >= count.get(chosen.type, 0):
        raise DeviceError(f"device {name!r} was asked for, but there is none here", "Use 'auto'.")
    return chosen


@functools.cache
def _apple_or_cpu(apple="mps"):
    """Return the Apple GPU if it can do what we ask and torch had last, else the CPU; say why."""
    import torch

    if not torch.backends.mps.is_available():
        return "cpu"
    try:
        image = torch.ones(1, 3, 8, 8, device=apple)
        torch.nn.functional.interpolate(image, size=(4, 4), mode="bicubic", antialias=True)
    except (RuntimeError, TypeError) as error:
        log(f"using the CPU: the Apple GPU cannot do it all ({str(error).splitlines()[0]})")
        return "cpu"
    return apple


def exact(on):
    """Return the type that sums over many rows have on a device: Apple GPUs lack float64."""
    import torch

    return torch.float32 if on.type == "mps" else torch.float64


def threads():
    """Return how many threads this process may keep busy: its share of the cores."""
    import torch

    return torch.get_num_threads()


def share(processes, numbers):
    """Leave this process, one of so many, its share of the cores and of the GPUs.

    Each takes one of the numbers out of a queue.
    """
    import torch

    torch.set_num_threads(max((os.cpu_count() or 1) // processes, 1))
    if gpus := torch.cuda.device_count():
        torch.cuda.set_device(numbers.get() % gpus)


def precision(name, on):
    """Return ``"fp32"`` or ``"bf16"`` for ``"auto"`` and a device.

    bf16 pays on recent GPUs, and on CPUs with bf16 matrix instructions: there ViT trains 2.0 times
    as fast, CLIP 1.8, Swin 1.3 and the U-Net's encoder 1.2 times (mini sizes, two cores).
    """
    import torch

    if name not in ("auto", "fp32", "bf16"):
        raise ConfigError(f"precision {name!r} is unknown", "Use 'auto', 'fp32' or 'bf16'.")
    if name != "auto":
        return name
    if on.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = on.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast else "fp32"


def read_table(name):
    """Return what a TOML file of the package says, by its path inside."""
    return tomllib.loads((Path(__file__).parent / name).read_text(encoding="utf-8"))


def digest(value, length=16):
    """Return the first `length` hexadecimal digits of the SHA-256 of `value`'s canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def rng(*keys):
    """Return a NumPy generator that is a function of `keys` alone (integers and texts)."""
    return np.random.default_rng(int(digest(keys), 16))


def torch_seed(*keys):
    """Return a 60-bit seed for `torch.manual_seed` that is a function of `keys` alone."""
    return int(digest(keys, 15), 16)


# --- talking to the user --------------------------------------------------------------------------


def is_main_process():
    """Tell whether this process is the one that prints and writes (rank 0 under torchrun)."""
    return int(os.environ.get("RANK", "0")) == 0


def log(message):
    """Print one line, from the main process alone."""
    if is_main_process():
        print(shown(message, getattr(sys.stdout, "encoding", None) or "utf-8"), flush=True)


def shown(text, encoding="utf-8"):
    """Return a text with all that an encoding lacks escaped, such as names that are no UTF-8."""
    return str(text).encode(encoding, "backslashreplace").decode(encoding)


def track(iterable, description, total=None, every=5.0):
    """Yield from `iterable` and show progress: a bar, or a line every `every` seconds.

    The bar is text that leaves nothing behind; ``RSD_HEADLESS=1`` (set by ``rsd run``), an output
    that is no terminal, and papermill get lines.
    """
    total = len(iterable) if total is None and hasattr(iterable, "__len__") else total
    interactive = sys.stderr.isatty() or "ipykernel" in sys.modules
    if interactive and not os.environ.get("RSD_HEADLESS") and is_main_process():
        from tqdm import tqdm

        how = {"leave": False, "mininterval": 0.5, "file": sys.stdout, "ncols": 80}
        yield from tqdm(iterable, desc=description, total=total, **how)
        return
    start = last = time.monotonic()
    for count, item in enumerate(iterable, 1):
        yield item
        now = time.monotonic()
        if now - last >= every:
            last = now
            seconds_left = (now - start) / count * ((total or count) - count)
            left = f"/{total}, about {seconds_left:.0f} s left" if total else ""
            log(f"{description}: {count}{left}")


def _is_error(record):
    return record.levelno >= logging.ERROR


@contextlib.contextmanager
def quiet():
    """Keep transformers and diffusers from leaving dead bars behind, open_clip from warning."""
    names = ("transformers.utils.logging", "diffusers.utils.logging")
    shown = [sys.modules[name] for name in names if name in sys.modules]
    shown = [module for module in shown if module.is_progress_bar_enabled()]
    logging.root.addFilter(_is_error)  # open_clip warns by the root's own logger
    for module in shown:
        module.disable_progress_bar()
    try:
        yield
    finally:
        logging.root.removeFilter(_is_error)
        for module in shown:
            module.enable_progress_bar()


def require(module, package=None):
    """Import an optional module, or say in one line how to install it."""
    package = package or module.split(".")[0].replace("_", "-")
    texts = f"the package {package} is not installed", f"Install it with: pip install {package}"
    with refusing(ImportError, MissingPackageError, *texts):
        return importlib.import_module(module)


_PACKAGES = "torch torchvision timm accelerate transformers numpy pandas scikit-learn pillow"


def environment():
    """Return what a reader needs to judge or repeat a run: versions, code, threads, machine."""
    import torch

    folder = str(Path(__file__).parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12"]
    found = ""
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        found = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=10).stdout
    return {
        "git": found.strip() or "unknown",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in _PACKAGES.split()},
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
