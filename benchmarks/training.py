"""What a training step costs: the mini ViT in float32 and bf16 beside the matrix-product floor, and a batch without its images.

    python benchmarks/training.py    # about a minute

Wall time on all cores; precisions alternate in one run, medians of the rounds.
"""

import statistics
import time

import numpy as np
import torch

from rsdlib import backbones, config, losses, model, runtime, training


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
        losses.JointObjective()(network, batch)[0].backward()
    return counter.get_total_flops()


def main(rounds=5):
    """Print both tables."""
    profile = config.profile("mini")
    batch_size, words = profile.train.batch_size, profile.data.vocabulary_size
    network = model.PromptRegressor(backbones.create(profile.backbone("vit")), vocabulary_size=words)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    batch = {
        "input": torch.randint(0, 256, (batch_size, 3, 64, 64), dtype=torch.uint8),
        "target": torch.nn.functional.normalize(torch.randn(batch_size, 384), dim=1),
        "labels": torch.rand(batch_size, words) < 0.05,
    }
    flops = step_flops(network, batch)
    times = {"fp32": [], "bf16": []}
    for _ in range(rounds + 1):
        for precision, found in times.items():
            clock = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss, _ = losses.JointObjective()(network, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(time.perf_counter() - clock)
    floor = flops / matrix_rate(torch.float32)
    chosen = runtime.precision("auto", torch.device("cpu"))
    print(f"mini ViT, batch of {batch_size}, {flops / 1e9:.0f} GFLOP a step, {torch.get_num_threads()} threads; auto is {chosen}")
    for precision, found in times.items():
        seconds = statistics.median(found[1:])
        print(
            f"  {precision}  {seconds * 1e3:6.0f} ms  {batch_size / seconds:5.0f} images/s  {seconds / floor:.2f} x float32 floor"
        )

    n, m = 100_000, 1000
    rng = np.random.default_rng(0)
    labels = training.pack(rng.random((n, m), dtype=np.float32) < 0.006)
    data = training.PairData(None, rng.normal(size=(n, 384)).astype(np.float32), labels, m, np.arange(n), np.arange(0))
    order = rng.permutation(n)
    found = []
    for start in range(0, 1000 * 64, 64):
        clock = time.perf_counter()
        data.answers(order[start : start + 64])
        found.append(time.perf_counter() - clock)
    print(f"targets and labels of a batch of 64 ({n:,} pairs, {m:,} words): {statistics.median(found) * 1e6:.0f} us")


if __name__ == "__main__":
    main()
