"""What the U-Net swap costs: time and memory of sampling with and without it.

    python benchmarks/swap.py           # about a minute
    python benchmarks/swap.py --quick   # seconds

Wall time on all cores; the pipelines alternate in one run, and each round's ratio is taken, so that
a slow moment hits both. More than 2 % of median overhead, or more memory than the encoder's own,
ends the run with an error.
"""

import argparse
import statistics
import sys
import time

import torch

from rsdlib import config, models


def parameters(pipe):
    """Return the bytes of every tensor of a pipeline, by address: what two share counts once."""
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    tensors = [p for part in parts for p in (*part.parameters(), *part.buffers())]
    return {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}


def main(images, steps, rounds):
    """Print time per image of both pipelines, their ratio, and the memory that the swap adds."""
    profile = config.profile("mini")
    pipe = models.open_pipeline(profile.generator, "cpu")
    encoder = models.create(profile.backbone("unet"))
    with torch.no_grad():
        for p in encoder.parameters():
            p *= 1.01
    swapped = models.swap_encoder(pipe, encoder, 1)
    prompts, seeds = ["a watercolor of a fox in the snow"] * images, range(images)
    times = {"plain": [], "swapped after 1": []}
    for number in range(rounds + 1):  # the first warms up
        both = list(zip(times.values(), (pipe, swapped), strict=True))
        for seconds, which in both[:: 1 if number % 2 else -1]:
            clock = time.perf_counter()
            models.sample(which, prompts, seeds, steps)
            seconds.append(time.perf_counter() - clock)
    ratios = [new / old for old, new in list(zip(*times.values(), strict=True))[1:]]
    for name, seconds in times.items():
        print(f"{name:<16} {1000 * statistics.median(seconds[1:]) / images:8.2f} ms an image")
    overhead = statistics.median(ratios) - 1
    print(f"overhead {overhead:+.2%} (rounds {min(ratios) - 1:+.2%} to {max(ratios) - 1:+.2%})")
    before, after = parameters(pipe), parameters(swapped)
    added = sum(size for address, size in after.items() if address not in before)
    own = sum(p.numel() * p.element_size() for p in encoder.unet.parameters())
    whole = sum(before.values())
    added_mb, own_mb, whole_mb = (size / 1e6 for size in (added, own, whole))
    print(f"memory added {added_mb:.2f} MB, the encoder's own {own_mb:.2f} MB, ", end="")
    print(f"the pipeline's {whole_mb:.2f} MB")
    return overhead, added <= own


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    few = "fewer images and rounds, which decide nothing about time"
    parser.add_argument("--quick", action="store_true", help=few)
    arguments = parser.parse_args()
    overhead, small = main(4, 4, 1) if arguments.quick else main(32, 20, 9)
    if not small or (overhead > 0.02 and not arguments.quick):
        sys.exit("the swap costs more than 2 % of time, or more memory than the encoder's own")
