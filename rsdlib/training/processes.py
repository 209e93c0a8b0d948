"""Several processes that train one run: started here, or by hand with torchrun on many machines."""

import contextlib
import os
import subprocess
import sys
import threading
import time

import psutil
import torch
import torch.nn.functional as F
from torch import nn

from rsdlib import files, runtime
from rsdlib.errors import DeviceError, RsdError

PARENT = "RSD_PARENT"  # the process that started this one and must not die before it


def launch(folder, processes):
    """Train a planned run in several processes of this machine, and show what they say.

    They end with the caller. By hand, and on several machines, the same is
    ``torchrun --nproc-per-node 8 ... -m rsdlib.cli train FOLDER``.

    Parameters
    ----------
    folder : path-like
        A run folder that holds its plan.
    processes : int

    Raises
    ------
    DeviceError
        This is Windows.
    RsdError
        They did not train it to its end.
    """
    if sys.platform == "win32":
        raise DeviceError("Windows does not train in several processes", "Use processes=1, or WSL.")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", "rsdlib.cli", "train", str(folder)]
    threads = max((os.cpu_count() or 1) // processes, 1)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "RSD_HEADLESS": "1"}
    environment |= {PARENT: str(os.getpid()), "PYTHONIOENCODING": "utf-8"}
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    reason = "their last words stand above"
    with subprocess.Popen(command, env=environment, errors="replace", **how) as child:
        try:
            for line in map(str.rstrip, child.stdout):
                runtime.log(line)
                if line.startswith("rsd: "):
                    reason = line.removeprefix("rsd: ")
        except BaseException:
            child.terminate()  # it ends those that it started
            raise
    if child.returncode:
        message = f"{processes} processes could not train {files.relative(folder)}: {reason}"
        raise RsdError(message, "Run it again, it goes on from the last checkpoint.")


def end_with_parent(every=2.0):
    """End this process when torchrun, or the one that started the whole, is gone without a word."""
    parents = [int(os.environ[PARENT])] if PARENT in os.environ else []
    if torch.distributed.is_torchelastic_launched():
        parents.append(os.getppid())

    def watch():
        while all(map(psutil.pid_exists, parents)):
            time.sleep(every)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# --- batches that meet ----------------------------------------------------------------------------


class _Sum(torch.autograd.Function):
    """The sum over all processes: what each adds has the sum of all their gradients."""

    @staticmethod
    def forward(ctx, value):
        value = value.clone()
        torch.distributed.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx, gradient):
        return _Sum.forward(ctx, gradient.contiguous())


class SharedNorms(torch.overrides.TorchFunctionMode):
    """Where this is entered, batch normalisation sees the rows of all processes.

    As `torch.nn.SyncBatchNorm`, which runs on GPUs alone and takes the place of the layers. A
    process without rows of its own joins in with rows that do not count: `counts` is 0 there.
    """

    counts = 1.0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Run any other function as it is."""
        kwargs = kwargs or {}
        shared = function is F.batch_norm and kwargs["training"]
        return self.normalise(*args, **kwargs) if shared else function(*args, **kwargs)

    def normalise(self, input, running_mean, running_var, weight, bias, training, momentum, eps):
        """Normalise (b, c, ...) by the mean and variance of all processes' rows."""
        places = [0, *range(2, input.dim())]
        shape = [1, -1, *[1] * (input.dim() - 2)]
        count = _Sum.apply(input.new_tensor(self.counts * input.numel() / input.shape[1]))
        mean = _Sum.apply(self.counts * input.sum(places)) / count
        centred = input - mean.view(shape)
        variance = _Sum.apply(self.counts * centred.square().sum(places)) / count
        if running_mean is not None:
            running_mean.lerp_(mean.detach(), momentum)
            running_var.lerp_(variance.detach() * count / (count - 1), momentum)
        normal = centred * (variance + eps).rsqrt().view(shape)
        return normal if weight is None else normal * weight.view(shape) + bias.view(shape)


def shared_norms(model):
    """Return what to train a model's batch normalisations within; nothing where it has none."""
    kind = nn.modules.batchnorm._BatchNorm
    has_some = any(isinstance(module, kind) for module in model.modules())
    return SharedNorms() if has_some else contextlib.nullcontext()


def is_one_of_many():
    """Tell whether this process already is one of those that train together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 or torch.distributed.is_initialized()
