"""A small frozen network; ``python toy_front.py FOLDER SOURCE`` kills extractions at random."""

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from rsdlib import data

SIZE = 24


class Grid(torch.nn.Module):
    """Means over 8 x 8 squares, times a weight."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))

    def forward(self, images):
        return torch.nn.functional.avg_pool2d(images.float() / 255, 8).flatten(1) * self.weight


def open_grid(weight=1.0):
    return Grid(weight)


class Deadly(Grid):
    """Kills its process, once in each folder."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def forward(self, images):
        with contextlib.suppress(FileExistsError):
            Path(self.folder, "died").touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)


def fronts(open=open_grid):
    return [data.pixels(SIZE), data.network(Grid(), SIZE, open)]


def extract(source, folder, pool=None, open=open_grid):
    """Make all shards of a source; return how many images they hold."""
    parts = data.find_parts(source)
    made = data.run(parts, [()] * len(parts), fronts(open), Path(folder), "cpu", pool)
    return sum(len(shard.names) for shards in made for shard in shards)


def contents(folder):
    """Return the bytes of every shard and note by name."""
    paths = [path for path in Path(folder).glob("[!.]*") if "index" not in path.name]
    return {path.name: path.read_bytes() for path in paths}


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).glob("[!.]*")}


def attempt(source, folder, seconds=None):
    """Extract in a child, killed after so many seconds; return whether it ended by itself."""
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
            extract(source, folder)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def main(folder, source, kills):
    torch.set_num_threads(1)  # a forked child must not inherit a pool of threads
    folder, rng = Path(folder), random.Random(0)
    started = time.monotonic()
    assert attempt(source, folder / "whole")
    seconds = time.monotonic() - started
    expected, killed, runs = contents(folder / "whole"), 0, 0
    while killed < kills:
        runs += 1
        target, done, before = folder / f"run-{runs}", False, {}
        while not done:
            last = killed >= kills
            done = attempt(source, target, None if last else rng.uniform(0.1, 0.6) * seconds)
            killed += not done
            after = stamps(target)
            assert all(after[path] == when for path, when in before.items()), "made twice"
            before = after
        assert contents(target) == expected
    print(json.dumps({"kills": killed, "runs": runs, "seconds": round(seconds, 2)}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
