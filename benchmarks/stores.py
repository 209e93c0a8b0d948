"""What extraction costs beside decoding alone, and how stores at real size open and are read.

    python benchmarks/stores.py            # some minutes
    python benchmarks/stores.py --quick    # half a minute

Wall time on all cores; memory is the largest of a process of its own. Parts are made of 512 px PNG
like DiffusionDB's. Below 90 % of decoding's rate, above 1.05 times the outputs' bytes, or a loop
that waits for more than 3 % of its time, the run ends with an error.
"""

import argparse
import io
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from rsdlib import data, files, runtime, training
from rsdlib.config import TrainConfig
from rsdlib.data import Store
from rsdlib.data.pairs import open_part

SIDE = 512
FRONTS = (224, 256)  # pixels a side: the paper's ViT and CLIP, and its Swin
STEP = 0.020  # seconds that a GPU would take for a step


def picture(seed):
    """Return the bytes of a PNG with the detail of a generated picture, about 440 KB."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.BICUBIC), np.int16)
    noise = rng.normal(0, 6, smooth.shape).astype(np.int16)
    stream = io.BytesIO()
    Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_parts(folder, parts, images, make=picture):
    """Write parts in DiffusionDB's layout, each with the same few pictures under its own names."""
    (folder / "images").mkdir(parents=True)
    contents = [make(seed) for seed in range(min(images, 16))]
    for part in range(1, parts + 1):
        names = [f"{part:06d}-{number:04d}.png" for number in range(images)]
        about = {name: {"p": f"prompt {name}", "se": 0} for name in names}
        with zipfile.ZipFile(folder / "images" / f"part-{part:06d}.zip", "w") as archive:
            archive.writestr(f"part-{part:06d}.json", json.dumps(about))
            for number, name in enumerate(names):
                archive.writestr(name, contents[number % len(contents)])
    return folder


def seconds(function, *arguments):
    """Return the seconds that a call takes, and its result."""
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def decode_all(parts):
    """Decode every image of some parts as extraction does, and keep nothing."""
    for path in parts:
        with open_part(path) as part, ThreadPoolExecutor(runtime.threads()) as pool:
            names = sorted(name for name in part.names() if name.endswith(".png"))
            for start in range(0, len(names), 64):
                batch = names[start : start + 64]
                list(pool.map(lambda name, part=part: data.decode_image(part.read(name)), batch))


def extract_all(parts, folder):
    """Make the shards of all fronts of some parts."""
    fronts = [data.pixels(size) for size in FRONTS]
    return list(data.run(parts, [()] * len(parts), fronts, folder, "cpu"))


def in_a_process(function, *arguments):
    """Run a function in a fresh process; return its largest memory in MB."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_memory, (function, arguments))


def _memory(function, arguments):
    function(*arguments)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def extraction(folder, images, rounds):
    """Return the rate of extraction over that of decoding, and bytes stored over bytes made."""
    parts = data.find_parts(write_parts(folder / "real", 2, images))
    ratios = []
    for number in range(rounds):
        alone, _ = seconds(decode_all, parts)
        whole, _ = seconds(extract_all, parts, folder / f"shards-{number}")
        ratios.append(alone / whole)
        print(f"decoding {2 * images / alone:6.1f} images/s, extraction {2 * images / whole:6.1f}")
    stored = sum(path.stat().st_size for path in (folder / "shards-0").iterdir())
    made = 2 * images * sum(3 * size**2 for size in FRONTS)
    return statistics.median(ratios), stored / made


def memory(folder, images):
    """Return the memory of extracting two parts, and of eight, in MB."""
    parts = data.find_parts(write_parts(folder / "flat", 8, images))
    few = in_a_process(extract_all, parts[:2], folder / "few")
    return few, in_a_process(extract_all, parts, folder / "many")


def dot(seed):
    """Return the bytes of a tiny PNG."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (seed, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def opening(folder, parts):
    """Return seconds to open a store of many shards again, and to gather 64 random rows."""
    pairs = data.load_pairs(write_parts(folder / "many-parts", parts, 4, dot))
    data.extract(pairs, [data.pixels(8)], folder / "shards")
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    again, (store,) = seconds(data.extract, pairs, [data.pixels(8)], folder / "shards")
    rng = np.random.default_rng(0)
    gathers = [seconds(store.batch, rng.integers(0, len(pairs), 64))[0] for _ in range(50)]
    return again, statistics.median(gathers)


class Device:
    """A stand-in for a GPU: it takes a step's time for what is queued, the host goes on meanwhile.

    At most two steps wait in its queue, so the host is never far ahead.
    """

    def __init__(self):
        self.begun, self.free = [], 0.0

    def __call__(self, model, batch):
        """Queue a step; return a loss and similarities of no meaning."""
        now = time.perf_counter()
        self.begun.append(max(now, self.free))
        self.free = self.begun[-1] + STEP
        time.sleep(max(self.begun[-1] - now - 2 * STEP, 0))
        loss = model(batch["target"]).mean()
        return loss, torch.zeros(len(batch["input"]))


def loader(folder, count, steps, workers):
    """Return the share of the loop's time that the stand-in for a GPU is busy."""
    path, size = folder / "pixels.npy", 224
    shape, each = (1000, 3, size, size), -(-count // 1000)
    files.save_row_batches(path, shape, np.uint8, [np.full(shape, 7, np.uint8)])
    rows = np.arange(count)
    store = Store([path] * each, rows // 1000, rows % 1000, "pixels")
    targets = np.ones((count, 384), np.float32)
    pairs = data.PairStore(store, targets, None, 0, rows[: 64 * steps], rows[-64:])
    device, model = Device(), torch.nn.Linear(384, 1)
    how = {"epochs": 1, "batch_size": 64, "log_every": 10_000, "save_every": 10_000}
    config = TrainConfig(**how, workers=workers, device="cpu", precision="fp32")
    training.fit(model, pairs, config, folder / "run", objective=device)
    begun = device.begun[5:steps]  # without those while the loader's processes start
    return STEP * (len(begun) - 1) / (begun[-1] - begun[0])


def main(images, rounds, parts, count, steps, workers):
    """Print each figure beside its goal; return whether all were reached."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["RSD_ROOT"] = name
        rate, size = extraction(folder, images, rounds)
        few, many = memory(folder, images)
        again, gather = opening(folder, parts)
        busy = loader(folder, count, steps, workers)
    table = [
        ("extraction, share of decoding's rate", f"{rate:.2f}", ">= 0.90", rate >= 0.9),
        ("bytes stored, times the outputs'", f"{size:.3f}", "<= 1.05", size <= 1.05),
        ("memory of 2 and of 8 parts, MB", f"{few:.0f}, {many:.0f}", "flat", many < 1.1 * few),
        (f"opening {parts:,} shards, 256 open files, s", f"{again:.2f}", "seconds", again < 10),
        ("64 random rows of them, ms", f"{1000 * gather:.1f}", "", True),
        ("loop busy, 20 ms a step of 64 x 224 px", f"{busy:.3f}", ">= 0.97", busy >= 0.97),
    ]
    frame = pd.DataFrame(table, columns=["what", "measured", "goal", "reached"])
    print(frame.to_string(index=False))
    return frame["reached"].all()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes: a try, not a figure")
    quick = parser.parse_args().quick
    sizes = dict(images=40, rounds=1, parts=200, count=20_000, steps=40, workers=1)
    if not quick:
        sizes = dict(images=300, rounds=3, parts=14_000, count=200_000, steps=300, workers=1)
    sys.exit(0 if main(**sizes) or quick else 1)
