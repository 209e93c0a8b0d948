"""The mini world's "web scale" corpus: renders by the hundred thousand.

They are drawn once, stored in shards, and read as batches.

The foundation models learn from it and from nothing else; none of its pictures is in the data set.
"""

import functools
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from renderer import draw, sample_scene
from scenes import MEDIA, RELATIONS, SETTINGS
from sprites import NOUNS, load_sprites

from rsdlib import files, runtime

SHARD = 4096
BUILD = Path(__file__).parent
NAMES = {
    "noun": list(NOUNS),
    "setting": list(SETTINGS),
    "medium": list(MEDIA),
    "relation": [*RELATIONS, "none"],
}
SOURCES = ("backdrops.py", "media.py", "nouns.csv", "renderer.py", "scenes.py", "sprites.py")


def _shard_path(seed, number):
    """Path of a shard's labels and prompts; its images lie beside it.

    The name changes with the seed and with every source that decides what is drawn.
    """
    sources = [(BUILD / name).read_text(encoding="utf-8") for name in SOURCES]
    key = files.digest([sources, SHARD], 12)
    return files.cache_dir() / "renders" / f"{key}-seed{seed}-{number:04d}.safetensors"


def _make_shard(seed, number):
    path = _shard_path(seed, number)
    if not path.exists():  # written last
        drawn = _draw(seed, number)
        files.save_rows(path.with_suffix(".npy"), drawn.pop("images"))
        files.save_arrays(path, drawn)
    return path


def _draw(seed, number):
    """Draw one shard: images (SHARD, 3, 64, 64), the pictures' labels, the prompts as JSON."""
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
    return {
        "images": images,
        **labels,
        "prompts": np.frombuffer(json.dumps(prompts).encode(), np.uint8),
    }


class Corpus:
    """Renders with the truth about each picture.

    Shards that are not there yet are drawn first, on all cores.

    Parameters
    ----------
    size : int
        Number of renders, rounded up to whole shards of 4,096.
    seed : int
        Corpora of different seeds share no picture: judges learn from another one than the models
        they judge.

    Attributes
    ----------
    labels : dict of str to ndarray
        ``noun`` (n, 60) with a 1 for each noun in the picture; ``count``, ``setting``, ``medium``,
        ``relation`` (n,), the last three as places in `NAMES`.
    prompts : list of str
    key : str
        Changes with any picture.
    """

    def __init__(self, size, seed=0):
        numbers = range(-(-size // SHARD))
        missing = [number for number in numbers if not _shard_path(seed, number).exists()]
        if missing:
            load_sprites()  # fetched once, before the workers start
            with ProcessPoolExecutor() as pool:
                made = pool.map(functools.partial(_make_shard, seed), missing)
                list(runtime.track(made, "drawing renders, shards", len(missing)))
        paths = [_shard_path(seed, number) for number in numbers]
        self.key = files.digest([path.name for path in paths])
        self._images = [files.open_rows(path.with_suffix(".npy"), verify=False) for path in paths]
        shards = [files.load_arrays(path)[0] for path in paths]
        names = ("noun", "count", "setting", "medium", "relation")
        self.labels = {name: np.concatenate([shard[name] for shard in shards]) for name in names}
        self.prompts = [
            prompt for shard in shards for prompt in json.loads(shard["prompts"].tobytes())
        ]

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
