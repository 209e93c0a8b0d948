"""What a training step costs: the mini ViT beside the matrix-product floor, and its answers.

    python benchmarks/training.py    # about a minute

In float32 and bf16; and a batch without its images. Wall time on all cores; precisions alternate in
one run, medians of the rounds.
"""

import statistics
import time
from types import SimpleNamespace

import numpy as np
import torch

from rsdlib import config, data, models, runtime


def matrix_rate(dtype, n=2048):
    """Return the machine's matrix-product rate in operations per second."""
    a, b = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
    times = []
    for _ in range(5):
        clock = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - clock)
    return 2 * n**3 / min(times)


def step_flops(network, batch):
    """Return the matrix operations of one forward and backward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        models.JointObjective()(network, batch)[0].backward()
    return counter.get_total_flops()


def main(rounds=5):
    """Print both tables."""
    profile = config.profile("mini")
    batch_size, words = profile.train.batch_size, profile.data.vocabulary_size
    network = models.PromptRegressor(models.create(profile.backbone("vit")), vocabulary_size=words)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    batch = {
        "input": torch.randint(0, 256, (batch_size, 3, 64, 64), dtype=torch.uint8),
        "target": torch.nn.functional.normalize(torch.randn(batch_size, 384), dim=1),
        "labels": torch.rand(batch_size, words) < 0.05,
    }
    flops = step_flops(network, batch)
    times = {"fp32": [], "bf16": []}
    for _ in range(rounds + 1):
        for precision, seconds in times.items():
            clock = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss, _ = models.JointObjective()(network, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - clock)
    floor = flops / matrix_rate(torch.float32)
    chosen = runtime.precision("auto", torch.device("cpu"))
    print(f"mini ViT, batch of {batch_size}, {flops / 1e9:.0f} GFLOP a step, ", end="")
    print(f"{torch.get_num_threads()} threads; auto is {chosen}")
    for precision, seconds in times.items():
        median = statistics.median(seconds[1:])
        rate = f"{median * 1e3:6.0f} ms  {batch_size / median:5.0f} images/s"
        print(f"  {precision}  {rate}  {median / floor:.2f} x float32 floor")
    answers()


def answers(n=100_000, m=1000, size=64):
    """Print what a batch costs without its images."""
    rng = np.random.default_rng(0)
    labels = data.pack(rng.random((n, m), dtype=np.float32) < 0.006)
    targets = rng.normal(size=(n, 384)).astype(np.float32)
    store = SimpleNamespace(ok=np.ones(n, bool), key="no images")
    pairs = data.PairStore(store, targets, labels, m, np.arange(n), np.arange(0))
    order, times = rng.permutation(n), []
    for start in range(0, 1000 * size, size):
        clock = time.perf_counter()
        pairs.answers(order[start : start + size])
        times.append(time.perf_counter() - clock)
    print(f"targets and labels of a batch of {size} ({n:,} pairs, {m:,} words): ", end="")
    print(f"{statistics.median(times) * 1e6:.0f} us")


if __name__ == "__main__":
    main()
