"""The mini world's "web scale" corpus: renders by the hundred thousand, drawn once, stored in shards, read as batches.

The foundation models learn from it and from nothing else; none of its pictures is in the data set.
"""

import functools
import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from renderer import draw, sample_scene
from scenes import MEDIA, RELATIONS, SETTINGS
from sprites import NOUNS, load_sprites

from rsdlib import runtime

SHARD = 4096
BUILD = Path(__file__).parent
NAMES = {"noun": list(NOUNS), "setting": list(SETTINGS), "medium": list(MEDIA), "relation": [*RELATIONS, "none"]}
SOURCES = ("backdrops.py", "media.py", "nouns.csv", "renderer.py", "scenes.py", "sprites.py")


def _shard_path(seed, number):
    """Path of a shard; its name changes with the seed and with every source that decides what is drawn."""
    key = runtime.digest([[(BUILD / name).read_text(encoding="utf-8") for name in SOURCES], SHARD], 12)
    return runtime.cache_dir() / "renders" / f"{key}-seed{seed}-{number:04d}.safetensors"


def _make_shard(seed, number):
    path = _shard_path(seed, number)
    if not path.exists():
        runtime.save_arrays(path, _draw(seed, number))
    return path


def _draw(seed, number):
    """Draw one shard: images (SHARD, 3, 64, 64), labels of the pictures, and the prompts as JSON."""
    rng = runtime.rng("corpus", seed, number)
    images = np.empty((SHARD, 3, 64, 64), np.uint8)
    labels = {"noun": np.zeros((SHARD, len(NOUNS)), np.uint8), "count": np.zeros(SHARD, np.int64)}
    labels |= {name: np.zeros(SHARD, np.int64) for name in ("setting", "medium", "relation")}
    prompts = []
    for i in range(SHARD):
        scene = sample_scene(rng)
        images[i] = draw(scene, rng).transpose(2, 0, 1)
        labels["noun"][i, [NAMES["noun"].index(name) for name in scene.objects]] = 1
        labels["count"][i] = scene.count
        for name in ("setting", "medium", "relation"):
            labels[name][i] = NAMES[name].index(getattr(scene, name))
        prompts.append(scene.prompt)
    return {"images": images, **labels, "prompts": np.frombuffer(json.dumps(prompts).encode(), np.uint8)}


class Corpus:
    """Renders with the truth about each picture; shards that are not there yet are drawn first, on all cores.

    Parameters
    ----------
    size : int
        Number of renders, rounded up to whole shards of 4,096.
    seed : int
        Corpora of different seeds share no picture: judges learn from another one than the models they judge.

    Attributes
    ----------
    labels : dict of str to ndarray
        ``noun`` (n, 60) with a 1 for each noun in the picture; ``count``, ``setting``, ``medium``, ``relation`` (n,), the last
        three as places in `NAMES`.
    prompts : list of str
    key : str
        Changes with any picture.
    """

    def __init__(self, size, seed=0):
        numbers = range(-(-size // SHARD))
        missing = [number for number in numbers if not _shard_path(seed, number).exists()]
        if missing:
            load_sprites()  # fetched once, before the workers start
            with ProcessPoolExecutor(os.cpu_count()) as pool:
                list(
                    runtime.track(pool.map(functools.partial(_make_shard, seed), missing), "drawing renders, shards", len(missing))
                )
        self.key = runtime.digest([_shard_path(seed, number).name for number in numbers])
        shards = [runtime.load_arrays(_shard_path(seed, number), verify=False)[0] for number in numbers]
        self._images = [np.asarray(shard["images"]) for shard in shards]
        names = ("noun", "count", "setting", "medium", "relation")
        self.labels = {name: np.concatenate([shard[name] for shard in shards]) for name in names}
        self.prompts = [prompt for shard in shards for prompt in json.loads(shard["prompts"].tobytes())]

    def __len__(self):
        return len(self.prompts)

    def images(self, indices):
        """Return images (b, 3, 64, 64), uint8."""
        indices = np.asarray(indices)
        batch = np.empty((len(indices), 3, 64, 64), np.uint8)
        for image, index in zip(batch, indices.tolist(), strict=True):
            image[...] = self._images[index // SHARD][index % SHARD]
        return batch

    def split(self, val=2048):
        """Return the rows to train on and the last `val` rows to validate on."""
        rows = np.arange(len(self))
        return rows[:-val], rows[-val:]
