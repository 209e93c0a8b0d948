"""Kill training runs with SIGKILL and take them up again until they end: python kills.py FOLDER random|writes COUNT.

One process imports torch and forks a child for each try, so that a try costs a second and not ten. Prints one JSON line.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import toy

from rsdlib import runtime

torch.set_num_threads(1)  # a forked child must not inherit a pool of threads
real_replace = os.replace


def attempt(folder, kill_after=None, kill_at_write=None, late=False):
    """Train in a child; kill it after some seconds, or before (or right after) its n-th file takes its place.

    Returns whether it finished.
    """
    child = os.fork()
    if child == 0:
        writes = 0

        def replace(source, target):
            nonlocal writes
            writes += 1
            if writes == kill_at_write and not late:
                os.kill(os.getpid(), signal.SIGKILL)
            real_replace(source, target)
            if writes == kill_at_write:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace
        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
            toy.fit(folder)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def checkpoint_step(folder):
    """Return the stored step; an unreadable checkpoint raises."""
    path = Path(folder) / "checkpoint.safetensors"
    return runtime.load_arrays(path)[1]["step"] if path.exists() else 0


def main(folder, mode, count):
    folder = Path(folder)
    toy.fit(folder / "warm-up")  # imports everything before the first fork
    started = time.monotonic()
    assert attempt(folder / "whole")
    seconds = time.monotonic() - started
    expected = toy.fingerprint(folder / "whole")
    rng = random.Random(0)
    kills = identical = runs = number = 0
    while kills < count if mode == "random" else True:
        runs += 1
        target = folder / f"run-{runs}"
        if mode == "writes":
            number, late = number + 1, runs % 2 == 0
            number -= late
            if attempt(target, kill_at_write=number, late=late):
                break  # the run has fewer writes than that
            kills += 1
        else:
            while kills < count and not attempt(target, kill_after=rng.uniform(0.2, 1.1) * seconds):
                kills += 1
        before = checkpoint_step(target)
        assert attempt(target)
        assert checkpoint_step(target) >= before
        assert toy.fingerprint(target) == expected, f"run {runs} ended differently"
        assert not list(target.glob(".*.tmp")), f"run {runs} left a temporary file"
        identical += 1
    print(json.dumps({"kills": kills, "runs": identical, "seconds": round(time.monotonic() - started, 1)}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
