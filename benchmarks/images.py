"""Images: warm batches of the store against opening and resizing each image anew.

The latter is what a plain PyTorch data set does. Run ``python benchmarks/images.py``. The images
are made on the fly: 512 x 512 PNGs with the detail of Stable Diffusion's, about 440 KB each. Both
sides run on one thread and take turns; times are CPU time, medians over the rounds.
"""

import json
import statistics
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision import transforms

from rsdlib import data

PICTURES, COPIES = 64, 12  # copies make the store larger than a processor's cache
SIZE, BATCH, ROUNDS = 224, 64, 5


def picture(rng, side=512):
    """Return an image of 1/f noise and a few shapes."""
    fy, fx = np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side), indexing="ij")
    slope = 1 / np.maximum(np.hypot(fy, fx), 1 / side) ** 1.4
    phases = [np.exp(2j * np.pi * rng.random(slope.shape)) for _ in range(3)]
    planes = np.stack([np.fft.irfft2(slope * phase, s=(side, side)) for phase in phases], axis=-1)
    planes = 128 + 45 * planes / planes.std(axis=(0, 1)) + rng.normal(0, 1.5, planes.shape)
    image = Image.fromarray(planes.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y, radius = rng.integers((0, 0, 10), (side, side, 60)).tolist()
        colour = tuple(rng.integers(0, 255, 3).tolist())
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return image


def write_source(folder):
    """Write one part in DiffusionDB's layout, and each picture loose; return the loose files."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    files = [folder / f"{i}.png" for i in range(PICTURES)]
    names = {f"{i:06d}.png": {"p": f"picture {i % PICTURES}"} for i in range(PICTURES * COPIES)}
    for file in files:
        picture(rng).save(file)
    with zipfile.ZipFile(folder / "images" / "part-000001.zip", "w") as archive:
        archive.writestr("part-000001.json", json.dumps(names))
        for i, name in enumerate(names):
            archive.write(files[i % PICTURES], name)
    return files


def rate(images, work, *arguments):
    """Return how many images a second one call makes, by CPU time."""
    start = time.process_time()
    work(*arguments)
    return images / (time.process_time() - start)


def main():
    """Print the rates, their ratios to torchvision's, and whether the bytes agree."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(1)
    plain = transforms.Compose(
        [
            transforms.Resize((SIZE, SIZE), transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_source(folder)
        size = statistics.mean(file.stat().st_size for file in files)
        pairs = data.load_pairs(folder)
        stored = [data.extract, pairs, [data.pixels(SIZE)], folder / "store"]
        build, again = rate(len(pairs), *stored), rate(len(pairs), *stored)
        (store,) = data.extract(pairs, [data.pixels(SIZE)], folder / "store")

        def open_each(rows):
            images = [plain(Image.open(files[i]).convert("RGB")) for i in rows]
            return torch.stack(images)  # (b, 3, h, w)

        def gather(batches):
            for rows in batches:
                store.batch(rows)

        def gather_and_normalise(batches):
            for rows in batches:
                torch.from_numpy(store.batch(rows)).float().mul_(2 / 255).sub_(1)

        fresh = np.stack([data.resize(data.open_image(file), SIZE) for file in files])
        stored = store.batch(np.arange(len(pairs)))  # (n, 3, SIZE, SIZE)
        equal = bool((stored == np.tile(fresh, (COPIES, 1, 1, 1))).all())
        ours = torch.from_numpy(fresh[:8]).float().mul_(2 / 255).sub_(1)
        difference = float((open_each(range(8)) - ours).abs().max())

        rounds = []
        for _ in range(ROUNDS):
            batches = [rng.integers(0, len(pairs), BATCH) for _ in range(50)]
            all_of_them = BATCH * len(batches)
            peer = rate(BATCH, open_each, batches[0] % PICTURES)
            warm = rate(all_of_them, gather, batches)
            rounds.append((peer, warm, rate(all_of_them, gather_and_normalise, batches)))
        peer, warm, normalised = (statistics.median(rates) for rates in zip(*rounds, strict=True))

    print(f"{len(pairs)} PNGs of 512 x 512, {size / 1000:.0f} KB each, to {SIZE} px; ", end="")
    print(f"one thread, CPU time, median of {ROUNDS} rounds")
    for label, figure in (
        ("torchvision: open, resize and normalise each", peer),
        ("store: batches of 64 random images, warm, uint8", warm),
        ("store: the same, normalised on the CPU", normalised),
        ("store: first build", build),
        ("store: built again, checksums only", again),
    ):
        print(f"{label:<48}{figure:>10,.0f} images/s   x {figure / peer:,.2f}")
    print(f"bytes equal to a fresh decode: {equal}; ", end="")
    print(f"largest difference to torchvision's values in [-1, 1]: {difference:.1e}")
    if not equal:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
