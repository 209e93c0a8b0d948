"""Kill training runs with SIGKILL and take them up again until they end.

``python kills.py FOLDER random|writes COUNT`` imports torch once and forks a child for each try, so
that a try costs a second and not ten. It prints one JSON line.
"""

import contextlib
import gc
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import toy

from rsdlib import files

torch.set_num_threads(1)  # a forked child must not inherit a pool of threads


def attempt(folder, **how):
    """Train in a child that may be killed; return whether it finished.

    Parameters
    ----------
    folder : Path
    **how
        Nothing, or `seconds` after which it is killed, or what `dying_replace` takes.
    """
    seconds = how.pop("seconds", None)
    child = os.fork()
    if child == 0:
        if how:
            os.replace = dying_replace(os.replace, **how)
        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
            toy.fit(folder)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), f"a run failed with exit code {code}"
    return code == 0


def dying_replace(replace, write, late):
    """Return an `os.replace` that kills its process before, or if `late` after, its n-th call."""
    writes = 0

    def dying(source, target):
        nonlocal writes
        writes += 1
        if writes == write and not late:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if writes == write:
            os.kill(os.getpid(), signal.SIGKILL)

    return dying


def checkpoint_step(folder):
    """Return the stored step; an unreadable checkpoint raises."""
    path = Path(folder) / "checkpoint.safetensors"
    return files.load_arrays(path)[1]["step"] if path.exists() else 0


def end(folder, expected):
    """Let a killed run end, and compare it with the run that was never killed."""
    before = checkpoint_step(folder)
    assert attempt(folder)
    assert checkpoint_step(folder) >= before
    assert toy.fingerprint(folder) == expected, f"{folder.name} ended differently"
    assert not list(folder.glob(".*.tmp")), f"{folder.name} left a temporary file"


def at_writes(folder, expected):
    """Kill a run before and after each of its writes, one run a kill; return kills and runs."""
    kills = 0
    while True:
        write, late = kills // 2 + 1, kills % 2 == 1
        target = folder / f"run-{kills}"
        if attempt(target, write=write, late=late):
            return kills, kills  # a run has fewer writes than that
        kills += 1
        end(target, expected)


def at_random(folder, expected, count, seconds):
    """Kill runs at random moments, each until it ends or `count` is reached; return kills, runs."""
    rng = random.Random(0)
    kills = runs = 0
    while kills < count:
        runs += 1
        target = folder / f"run-{runs}"
        while kills < count and not attempt(target, seconds=rng.uniform(0.2, 1.1) * seconds):
            kills += 1
        end(target, expected)
    return kills, runs


def main(folder, mode, count):
    folder = Path(folder)
    toy.fit(folder / "warm-up")  # imports everything before the first fork
    gc.freeze()  # what is imported need not be collected after each training
    started = time.monotonic()
    assert attempt(folder / "whole")
    seconds = time.monotonic() - started
    expected = toy.fingerprint(folder / "whole")
    if mode == "writes":
        kills, runs = at_writes(folder, expected)
    else:
        kills, runs = at_random(folder, expected, count, seconds)
    spent = round(time.monotonic() - started, 1)
    print(json.dumps({"kills": kills, "runs": runs, "seconds": spent}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
