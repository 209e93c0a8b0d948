"""Real size: a synthetic DiffusionDB, and what its tables take: seconds of a core, memory, growth.

    python benchmarks/scale.py                        # up to 200,000 rows, some minutes
    python benchmarks/scale.py --full                 # DiffusionDB's 2M rows, and Large's 14M
    python benchmarks/scale.py load --sizes 10000 20000 50000 100000
    python benchmarks/scale.py --prompts FILE.gz      # recombine a list of prompts, one a line

Each figure comes from a process of its own. Growth is the exponent of a power of the rows, fitted
over all sizes. Parts are stand-ins, a thousand empty images each.
"""

import argparse
import concurrent.futures
import gzip
import json
import multiprocessing
import os
import resource
import tempfile
import time
import zipfile
from pathlib import Path

from _one_core import cpu_seconds  # isort: skip

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from rsdlib import data

IMAGES = 1000  # in a part
SMALL = (25_000, 50_000, 100_000, 200_000)
FULL = (250_000, 500_000, 1_000_000, 2_000_000)
LARGE = 14_000_000, 1_800_000  # rows of DiffusionDB Large, and its distinct prompts
GOALS = {
    "clean + split + vocabulary": "2M rows: 120 s, 4 GB, growth 1.05",
    "of Large": "14M rows: 12 GB",
    "load_pairs, all parts": "2M rows: 40 s, 3 GB",
    "load_pairs, five parts": "2M rows: 5 s",
}

# --- a synthetic DiffusionDB ----------------------------------------------------------------------


def read_wordings(path=None):
    """Return prompts to recombine: those in a file, one a line, or made-up ones."""
    if path is None:
        from prompts import make_prompts

        return make_prompts(20_000, np.random.default_rng(0))
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8") as stream:
        return stream.read().splitlines()


def recombine(wordings, n, rng, near=0.13):
    """Return `n` distinct prompts: the subject of one, details of others; `near` of them nearly so.

    A near one repeats an earlier prompt but for a word.
    """
    parts = [[phrase.strip() for phrase in prompt.split(",")] for prompt in wordings]
    details = [phrase for _, *phrases in parts for phrase in phrases if phrase]
    words = " ".join(subject for subject, *_ in parts).split()
    made = {}
    while len(made) < n:
        lengths = rng.geometric(1 / 6, size=n)
        subjects = rng.integers(len(parts), size=n).tolist()
        chosen = iter(rng.integers(len(details), size=lengths.sum()).tolist())
        for subject, length in zip(subjects, lengths.tolist(), strict=True):
            made[
                ", ".join([parts[subject][0], *(details[next(chosen)] for _ in range(length))])
            ] = 0
    made = list(made)[:n]
    for i in np.flatnonzero(rng.random(n) < near)[1:].tolist():
        old = made[int(rng.integers(i))].split(" ")
        old[int(rng.integers(len(old)))] = words[int(rng.integers(len(words)))]
        made[i] = " ".join([*old, f"{i:x}"]) if i % 8 == 0 else " ".join(old)
    return made


def write_table(path, rows, distinct, wordings=None, seed=0):
    """Write a table like ``metadata.parquet``: DiffusionDB's 13 columns, its rows part by part."""
    rng = np.random.default_rng(seed)
    prompts = pa.array(recombine(read_wordings(wordings), distinct, rng))
    # Every prompt has an image; further images stand beside the first.
    which = np.sort(np.append(np.arange(distinct), rng.integers(distinct, size=rows - distinct)))
    writer = None
    for start in range(0, rows, 250_000):
        number = np.arange(start, min(start + 250_000, rows))
        m, names = len(number), rng.bytes(16 * len(number)).hex()
        columns = {
            "image_name": [
                f"{names[32 * i : 32 * i + 32]}-{n:08d}.png" for i, n in enumerate(number)
            ],
            "prompt": prompts.take(pa.array(which[number])),
            "part_id": (number // IMAGES + 1).astype(np.uint16),
            "seed": rng.integers(2**32, size=m, dtype=np.uint32),
            "step": np.full(m, 50, np.uint16),
            "cfg": np.full(m, 7, np.float32),
            "sampler": np.full(m, 8, np.uint8),
            "width": np.full(m, 512, np.uint16),
            "height": np.full(m, 512, np.uint16),
            "user_name": [f"{user:064x}" for user in rng.integers(10_000, size=m).tolist()],
            "timestamp": pd.date_range("2022-08-06", periods=m, freq="s", tz="UTC"),
            "image_nsfw": (1.1 * rng.random(m) ** 3).astype(np.float32),
            "prompt_nsfw": (1.02 * rng.random(m) ** 6).astype(np.float32),
        }
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()


def write_part(folder, number, rows, pictures=(b"",)):
    """Write one part: images taken from `pictures` in turn, and the JSON of its rows."""
    about = {
        name: {"p": prompt, "se": 1, "c": 7.0, "st": 50, "sa": "k_euler"} for name, prompt in rows
    }
    path = folder / f"part-{number:06}.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i, name in enumerate(about):
            archive.writestr(name, pictures[i % len(pictures)])
        archive.writestr(f"part-{number:06}.json", json.dumps(about), zipfile.ZIP_DEFLATED)


def write_source(folder, rows, wordings=None, pictures=(b"",), seed=0):
    """Write a source of so many rows, three quarters of their prompts distinct, with all parts."""
    (folder / "images").mkdir(parents=True)
    write_table(folder / "metadata.parquet", rows, rows * 3 // 4, wordings, seed)
    columns = ["image_name", "prompt", "part_id"]
    table = pd.read_parquet(folder / "metadata.parquet", columns=columns)
    for number, part in table.groupby("part_id"):
        told = zip(part["image_name"].tolist(), part["prompt"].tolist(), strict=True)
        write_part(folder / "images", number, told, pictures)


# --- measures -------------------------------------------------------------------------------------


def fresh(function, *arguments):
    """Run a function in a process of its own; return its answer and its peak memory in GB."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
        return pool.submit(_run, function, arguments).result()


def _run(function, arguments):
    answer = function(*arguments)
    return answer, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def clean_table(path):
    """Return the seconds that cleaning, the split and the vocabulary of a table take."""
    data.is_english("x")  # loads the detector and the lexicon
    data.Vocabulary.fit(["a cat"])
    pairs = pd.read_parquet(path, columns=["image_name", "prompt", "image_nsfw", "prompt_nsfw"])
    pairs = pairs.rename(columns={"image_name": "id"})
    cleaned, (kept, _) = cpu_seconds(lambda: data.clean(pairs))
    divided, side = cpu_seconds(lambda: data.split(kept["key"], 0.1, 0.04))
    train = kept["prompt"][side == "train"]
    fitted, _ = cpu_seconds(lambda: data.Vocabulary.fit(train))
    return cleaned, divided, fitted


def load_source(folder):
    """Return the CPU seconds of `load_pairs`, and the rows that it finds."""
    before = time.perf_counter()
    seconds, pairs = cpu_seconds(lambda: data.load_pairs(folder))
    return seconds, time.perf_counter() - before, len(pairs)


def growth(sizes, seconds):
    """Return the exponent of a power of the size, fitted to seconds."""
    return np.polyfit(np.log(sizes), np.log(seconds), 1)[0] if len(sizes) > 1 else np.nan


def bench_clean(folder, sizes, wordings, large):
    """Print what cleaning, the split and the vocabulary take."""
    head = f"{'rows':>11} {'distinct':>10} {'clean s':>8} {'split s':>8} {'vocab. s':>8} "
    print(f"\nclean + split + vocabulary\n{head}{'all s':>8} {'us a row':>8} {'GB':>6}")
    totals = []
    for rows, distinct in [(n, n * 3 // 4) for n in sizes] + ([LARGE] if large else []):
        path = folder / "table.parquet"
        fresh(write_table, path, rows, distinct, wordings)
        seconds, peak = fresh(clean_table, path)
        totals.append(sum(seconds))
        print(f"{rows:11,} {distinct:10,} ", *(f"{s:8.2f}" for s in (*seconds, totals[-1])), end="")
        print(f" {totals[-1] / rows * 1e6:8.1f} {peak:6.2f}", flush=True)
    print(f"growth N^{growth(sizes, totals[: len(sizes)]):.2f}")


def bench_load(folder, sizes, wordings):
    """Print what `load_pairs` takes, of all parts and of five."""
    print("\nload_pairs")
    print(f"{'rows':>11} {'parts':>6} {'CPU s':>7} {'wall s':>7} {'us a row':>8} {'GB':>6}")
    everything = []
    for rows in sizes:
        source, few = folder / f"source-{rows}", folder / f"few-{rows}"
        fresh(write_source, source, rows, wordings)
        (few / "images").mkdir(parents=True)
        os.link(source / "metadata.parquet", few / "metadata.parquet")
        for part in sorted((source / "images").iterdir())[:5]:
            os.link(part, few / "images" / part.name)
        for place in (source, few):
            (seconds, wall, found), peak = fresh(load_source, place)
            print(f"{rows:11,} {found // IMAGES:6,} {seconds:7.2f} {wall:7.2f} ", end="")
            print(f"{seconds / rows * 1e6:8.1f} {peak:6.2f}", flush=True)
            everything += [seconds] if place == source else []
    print(f"growth N^{growth(sizes, everything):.2f}")


if __name__ == "__main__":
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("measure", nargs="?", choices=("all", "clean", "load"), default="all")
    parser.add_argument("--sizes", type=int, nargs="+", help="rows, in thousands' multiples")
    parser.add_argument("--full", action="store_true", help="DiffusionDB's sizes, and Large's")
    parser.add_argument("--prompts", metavar="FILE", help="recombine these, not made-up ones")
    parser.add_argument("--folder", type=Path, help="write below this, not below the system's")
    chosen = parser.parse_args()
    sizes = chosen.sizes or (FULL if chosen.full else SMALL)
    with tempfile.TemporaryDirectory(dir=chosen.folder) as made:
        if chosen.measure in ("all", "clean"):
            bench_clean(Path(made), sizes, chosen.prompts, chosen.full)
        if chosen.measure in ("all", "load"):
            bench_load(Path(made), sizes, chosen.prompts)
    print("\nGoals:", *(f"{name}: {goal}" for name, goal in GOALS.items()), sep="\n  ")
