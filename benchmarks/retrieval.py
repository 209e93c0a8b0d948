"""Exact nearest neighbours against faiss's IndexFlatIP.

    python benchmarks/retrieval.py           # under a minute
    python benchmarks/retrieval.py --quick   # seconds, small

Times are CPU seconds of this process, pinned to one core where the system allows it. Scores that
differ from the peer's end the run with an error. The last part streams two million rows from disk;
more than 15 seconds or 4 GB for 100 queries end it so too.
"""

import argparse
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from _one_core import cpu_seconds, watched  # isort: skip

import numpy as np
import torch

from rsdlib.ensemble import nearest

DIMENSIONS = 384


def unit(n, rng):
    """Return random unit rows (n, 384), float32."""
    rows = rng.standard_normal((n, DIMENSIONS), np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def peer(queries, base, k):
    """Return similarity and index by faiss, which reads the base anew, as ours does."""
    import faiss

    index = faiss.IndexFlatIP(DIMENSIONS)
    index.add(base)
    return index.search(queries, k)


def bench_peer(queries, sizes, k=16, rounds=3):
    """Print seconds, growth, ratios to the peer and the product, and how far scores differ."""
    print(f"\n{queries} queries, {DIMENSIONS} dimensions, k = {k}; medians of {rounds} rounds")
    heads = f"{'product s':>10} {'faiss s':>8} {'ours s':>7} {'x faiss':>8} {'growth':>7}"
    print(f"{'base':>8} {heads} {'max |diff|':>11}")
    rng, good, before = np.random.default_rng(0), True, None
    asked = unit(queries, rng)
    for n in sizes:
        base = unit(n, rng)
        left, right = torch.from_numpy(asked), torch.from_numpy(base)
        taken = []
        for _ in range(rounds):
            product, _ = cpu_seconds(partial(torch.matmul, left, right.T))
            theirs, (expected, _) = cpu_seconds(partial(peer, asked, base, k))
            ours, (scores, index) = cpu_seconds(partial(nearest, asked, base, k))
            taken.append((product, theirs, ours))
        product, theirs, ours = np.median(taken, axis=0)
        ratio = statistics.median(row[1] / row[2] for row in taken)
        growth = f"n^{np.log(ours / before[1]) / np.log(n / before[0]):.2f}" if before else ""
        before = n, ours
        truth = np.einsum("qd,qkd->qk", asked, base[index])  # the scores belong to the rows
        difference = max(np.abs(scores - expected).max(), np.abs(scores - truth).max())
        good &= bool(difference < 1e-5)
        facts = f"{product:10.3f} {theirs:8.3f} {ours:7.3f} {ratio:8.2f} {growth:>7}"
        print(f"{n:8,} {facts} {difference:11.1e}")
    return good


def anonymous_memory():
    """Return this process's memory in GB without mapped files, or NaN if the system is silent."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1e6
    return float("nan")


def write_base(path, n, asked, rows, rng):
    """Write a float16 base (n, 384) that holds the queries at some rows, and map it."""
    block = unit(10_000, rng)
    base = np.memmap(path, np.float16, "w+", shape=(n, DIMENSIONS))
    for start in range(0, n, len(block)):
        turned = np.roll(block, start // len(block), axis=1)
        base[start : start + len(block)] = turned[: n - start]
    base[rows] = asked
    base.flush()
    return np.memmap(path, np.float16, "r", shape=(n, DIMENSIONS))


def bench_streaming(n, queries=100, k=1):
    """Search a base on disk for planted rows, as the 1-NN captions do; print seconds and memory."""
    rng = np.random.default_rng(1)
    asked, rows = unit(queries, rng), np.sort(rng.choice(n, queries, replace=False))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "base.f16"
        base = write_base(path, n, asked, rows, rng)
        before, clock = anonymous_memory(), time.perf_counter()
        with watched(anonymous_memory) as peak:
            similarity, index = nearest(asked, base, k)
        seconds, memory = time.perf_counter() - clock, max(peak[0] - before, 0)
        size = path.stat().st_size / 1e9
    print(f"\n{queries} queries in {n:,} rows on disk ({size:.2f} GB of float16): ", end="")
    print(f"{seconds:.2f} s by the clock, {memory:.2f} GB of memory beside the file's pages")
    planted = (index[:, 0] == rows).all() and (similarity[:, 0] > 0.999).all()
    return bool(planted and seconds < 15 and not memory > 4)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, in seconds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.quick:
        same, planted = bench_peer(64, (2000, 8000)), bench_streaming(40_000)
    else:
        same, planted = bench_peer(512, (10_000, 30_000, 100_000)), bench_streaming(2_000_000)
    if not (same and planted):
        sys.exit("scores differ from the peer's, or a planted row was not found in time")
