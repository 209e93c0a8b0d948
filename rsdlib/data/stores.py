"""Stores: whatever has ``batch(rows)``, ``ok`` (which rows it has) and ``key`` (what it holds).

What takes long is computed once and lies in shards, which are mapped when they are read.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from rsdlib import files, runtime
from rsdlib.data.faults import NONE_BAD
from rsdlib.data.forward import apply, weights_key
from rsdlib.data.images import open_image, resize
from rsdlib.errors import BadValueError

_SHARD = 1000  # rows a shard


@functools.lru_cache(64)  # each map holds its file open, and a process may open a few hundred
def _mapped(path):
    return np.asarray(files.open_rows(path, verify=False))


def _checked_rows(store, rows):
    """Return `rows` as int64 (b,), checked to be rows that `store` has."""
    rows = np.asarray(rows)
    if rows.ndim != 1 or (rows.dtype.kind not in "iu" and rows.size):
        raise BadValueError(f"{rows.dtype} of shape {rows.shape} is no list of row numbers")
    rows = rows.astype(np.int64)
    absent = rows[~store.ok[rows]]
    if len(absent):
        raise BadValueError(f"row {absent[0]} has no image", "Choose rows by the store's `ok`.")
    return rows


class Store:
    """Rows in files on disk: row i of the store is row ``row[i]`` of file ``shard[i]``.

    See `rsdlib.data.extract` and `features`, which make them.

    Parameters
    ----------
    paths : sequence of path-like
        As `files.save_rows` writes them; mapped when they are read, few at a time.
    shard, row : ndarray of int (n,)
        A negative row: there is none.
    key : str
        Changes with any byte of any input, with which rows are missing and with their order.
    bad : pandas.DataFrame
        The images that cannot be read: ``id``, ``part``, ``reason``.

    Attributes
    ----------
    ok : ndarray of shape (n,), bool
        Which rows there are.
    """

    def __init__(self, paths, shard, row, key, bad=NONE_BAD):
        _mapped.cache_clear()  # a file that was damaged may have been mapped before it was replaced
        self._paths, self._shard, self._row = [str(path) for path in paths], shard, row
        self.ok, self.key, self.bad = row >= 0, key, bad

    def batch(self, rows):
        """Gather rows.

        Parameters
        ----------
        rows : array-like of shape (b,), int
            Rows of the pairs the store was built from.

        Returns
        -------
        ndarray of shape (b, ...)
            A fresh copy: images (b, 3, size, size) uint8, or features (b, ...) float32.

        Raises
        ------
        BadValueError
            The store lacks a row, or something is no row number.
        """
        rows = _checked_rows(self, rows)
        shard, row = self._shard[rows], self._row[rows]
        dtype = np.float32 if self._like.dtype == np.float16 else self._like.dtype
        batch = np.empty((len(rows), *self._like.shape[1:]), dtype)
        for number in np.unique(shard):  # each file is mapped once
            here = shard == number
            batch[here] = _mapped(self._paths[number])[row[here]]
        return batch

    @functools.cached_property
    def _like(self):
        """An array (0, ...) of the rows' shape and type."""
        if not self.ok.any():
            return np.empty(0, np.float32)
        return _mapped(self._paths[self._shard[self.ok.argmax()]])[:0]

    def __len__(self):
        return len(self.ok)

    def copied(self, folder):
        """Return the store as one file in `folder`, perhaps on a faster disk; made once.

        A batch is one gather from it.
        """
        path, rows = Path(folder) / f"{self.key}.npy", np.flatnonzero(self.ok)
        if not path.exists():
            batches = np.split(rows, range(_SHARD, len(rows), _SHARD))
            arrays = map(self.batch, runtime.track(batches, f"copying to {folder}"))
            shape = len(rows), *self._like.shape[1:]
            files.save_row_batches(path, shape, self._like.dtype, arrays)
        row = np.where(self.ok, np.cumsum(self.ok) - 1, -1)
        return Store([path], np.zeros(len(row), np.int32), row, self.key, self.bad)


class Unstored:
    """Images that are decoded when they are looked at: for sizes that would fill a disk.

    Parameters
    ----------
    pairs : pandas.DataFrame
        From `load_pairs`.
    size : int
        Pixels a side.
    """

    def __init__(self, pairs, size):
        self._places, self._size = pairs["image"].to_numpy(), size
        self.ok, self.key = np.ones(len(pairs), bool), f"{size} px, not stored"

    def batch(self, rows):
        """Decode images (b, 3, size, size), uint8; a bad one is a `BadImageError`."""
        places = self._places[_checked_rows(self, rows)]
        with ThreadPoolExecutor(runtime.threads()) as pool:
            images = list(pool.map(lambda place: resize(open_image(place), self._size), places))
        return np.stack(images) if images else np.empty((0, 3, self._size, self._size), np.uint8)


class Pictures:
    """Images in memory, to be read like a store's: not checked, not kept.

    Parameters
    ----------
    images : sequence
        What `open_image` opens, or arrays (h, w, 3), uint8. One at a time is in memory.
    size : int
        Pixels a side.
    """

    def __init__(self, images, size):
        opened = (Image.fromarray(i) if isinstance(i, np.ndarray) else i for i in images)
        # (n, 3, size, size)
        self._pixels = np.stack([resize(open_image(image), size) for image in opened])
        self.ok = np.ones(len(images), bool)
        self.key = files.checksum({"pixels": self._pixels})[:16]

    def batch(self, rows):
        """Gather images (b, 3, size, size), uint8."""
        return self._pixels[_checked_rows(self, rows)]


def features(store, network, folder=None, device="auto"):
    """Return a store of what a network makes of another store: computed once, in shards.

    What is there is not computed again: a stopped build goes on at the first shard it lacks.

    Parameters
    ----------
    store : any store
    network : nn.Module
        Maps what the store holds, such as uint8 images (b, 3, s, s), to a tensor (b, ...).
    folder : path-like, optional
        Where shards lie; ``data/cache/features`` by default. Can be deleted at any time.
    device : str

    Returns
    -------
    Store
        Its key changes with any image, their order, and any weight of the network.

    Raises
    ------
    BadValueError
        The features are not finite in float16.
    """
    folder = Path(folder or files.cache_dir() / "features")
    key, rows = files.digest([weights_key(network), store.key]), np.flatnonzero(store.ok)
    starts, paths = range(0, len(rows), _SHARD), []
    for number, start in enumerate(starts):
        how = {"device": device, "description": f"features, shard {number + 1} of {len(starts)}"}
        make = functools.partial(apply, network, store, rows[start : start + _SHARD], **how)
        paths.append(folder / f"{key}-{number:05d}.npy")
        files.cached_rows(paths[-1], lambda make=make: half(make()))
    place = np.cumsum(store.ok) - 1  # (n,): which of the rows that the store has
    return Store(paths, place // _SHARD, np.where(store.ok, place % _SHARD, -1), key)


def half(values):
    """Return features as float16, which must hold them."""
    with np.errstate(over="ignore"):
        values = values.astype(np.float16)
    if not np.isfinite(values).all():
        raise BadValueError("the network's features are not finite in float16", "Lower its lr.")
    return values


class PairStore:
    """A store's inputs beside targets and labels, all precomputed: a batch is three gathers.

    Parameters
    ----------
    store : any store
        The inputs; `ok` and `key` are its own.
    targets : ndarray (n, d), float32, or tokens (n, l), int64
        May be memory-mapped.
    labels : ndarray (n, ceil(m / 8)), uint8, or None
        Vocabulary labels, packed by `pack`.
    vocabulary_size : int
        m.
    train, val : ndarray of int
        Rows.
    """

    def __init__(self, store, targets, labels, vocabulary_size, train, val):
        self.store, self.targets = store, targets
        self.labels, self.vocabulary_size = labels, vocabulary_size
        self.train, self.val = train, val
        self.ok, self.key = store.ok, store.key
        if targets.ndim != 2 or targets.dtype not in (np.float32, np.int64):
            message = f"targets are {targets.dtype} of shape {targets.shape}"
            raise BadValueError(message, "They must be float32 (n, d), or tokens: int64 (n, l).")
        usable = np.isfinite(targets).all(axis=1) & targets.any(axis=1)
        if not usable.all():
            message = f"target {np.argmin(usable)} is zero or not finite"
            raise BadValueError(message, "Embed its prompt again.")
        if labels is not None and labels.shape != (len(targets), -(-vocabulary_size // 8)):
            bits = f"{vocabulary_size} bits for {len(targets)} targets"
            raise BadValueError(f"labels of shape {labels.shape} are not {bits}")
        rows = np.concatenate([train, val])
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(targets)):
            raise BadValueError(f"rows reach from {rows.min()} to {rows.max()}, past the targets")

    def __len__(self):
        return len(self.targets)

    def batch(self, rows):
        """Return tensors: input (b, ...), target (b, d), and if there are any, labels (b, m)."""
        return self.answers(rows, input=self.store.batch(rows))

    def answers(self, rows, **arrays):
        """Return everything of a batch but its inputs; and `arrays`, as tensors."""
        import torch

        arrays["target"] = self.targets[rows]
        if self.labels is not None:
            arrays["labels"] = np.unpackbits(self.labels[rows], axis=1, count=self.vocabulary_size)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def pack(labels):
    """Pack boolean labels (n, m) into bits (n, ceil(m / 8))."""
    return np.packbits(labels, axis=1)
