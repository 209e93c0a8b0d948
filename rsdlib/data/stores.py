"""Stores: whatever has ``batch(rows)``, ``ok`` (which rows it has) and ``key`` (what it holds).

Images are decoded once, a frozen network's features are computed once; both lie in shards that are
mapped when they are read.
"""

import contextlib
import functools
import json
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from rsdlib import files, runtime
from rsdlib.data.images import decode_image, resize, split_locator
from rsdlib.data.pairs import open_part
from rsdlib.errors import BadImageError, BadTableError, BadValueError, ConfigError, DeviceError

_SHARD = 1000  # rows a shard, about
_RULE = "1: RGB on white, upright, centre square, bicubic"  # part of every image shard's key


@functools.lru_cache(64)  # each map holds its file open, and a process may open a few hundred
def _mapped(path):
    return np.asarray(files.open_rows(path, verify=False))  # `build` has verified it


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


class _Sharded:
    """Rows in files on disk: row i of the store is row ``row[i]`` of file ``shard[i]``."""

    def __init__(self, paths, shard, row, ok, like, key):
        self._paths, self._like = paths, like  # like (0, ...): shape and type of a batch
        self._shard, self._row = shard, row
        self.ok, self.key = ok, key

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
        batch = np.empty((len(rows), *self._like.shape[1:]), self._like.dtype)
        shard, row = self._shard[rows], self._row[rows]
        for position in np.argsort(shard, kind="stable").tolist():  # each file is mapped once
            batch[position] = _mapped(self._paths[shard[position]])[row[position]]
        return batch

    def __len__(self):
        return len(self.ok)


class ImageStore(_Sharded):
    """Images decoded once to uint8 and memory-mapped, one file per part of the data.

    A shard's name is a hash of its images' names and CRC-32s, the size and the rule of decoding: a
    changed image makes a new shard, a changed date does not. Loose files are read once per build to
    know their CRC-32, zips state it. Stores are made by `build`.

    Attributes
    ----------
    ok : ndarray of shape (n,), bool
        Which rows have an image.
    bad : pandas.DataFrame
        The other rows: ``id``, ``part``, ``reason``.
    key : str
        Changes with any byte of any image, with which are bad and with their order.
    """

    @classmethod
    def build(cls, pairs, size, folder=None, on_bad="error", executor=None, max_bad=0.01):
        """Decode what is not yet stored; check every stored shard, make damaged ones again.

        A build that is stopped goes on at the first shard it lacks.

        Parameters
        ----------
        pairs : pandas.DataFrame
            From `load_pairs`; the columns ``id`` and ``image`` are used.
        size : int
            Pixels a side.
        folder : path-like, optional
            Where shards lie; ``data/cache/images`` by default. Can be deleted at any time.
        on_bad : {"error", "skip"}
            What to do with an image that cannot be decoded: stop, or list it in `bad`. Nothing ever
            takes its place.
        executor : concurrent.futures.Executor, optional
            Runs one shard a task, in any process that sees the same files; the bytes do not depend
            on it.
        max_bad : float
            With ``on_bad="skip"``, the share of bad images above which the data itself is refused;
            five bad images always pass.

        Returns
        -------
        ImageStore

        Raises
        ------
        BadImageError
            With ``on_bad="error"``: an image cannot be decoded.
        BadTableError
            Too many images are bad.
        """
        if on_bad not in ("error", "skip"):
            raise ConfigError(f"on_bad = {on_bad!r} is unknown", "Use 'error' or 'skip'.")
        groups, ids = _group(pairs["image"]), pairs["id"].tolist()
        folder = Path(folder or files.cache_dir() / "images")
        make = functools.partial(_make_shard, size=size, folder=folder)
        made = (make(group) for group in groups) if executor is None else executor.map(make, groups)
        paths, bad = [], []
        shard, row = np.zeros(len(ids), np.int32), np.full(len(ids), -1, np.int32)
        with contextlib.closing(made):  # on an error, tasks that wait are cancelled
            progress = runtime.track(made, "decoding images, shards", len(groups))
            for group, (path, reasons) in zip(groups, progress, strict=True):
                for place, (i, reason) in enumerate(zip(group.index, reasons, strict=True)):
                    shard[i], row[i] = len(paths), -1 if reason else place
                    if reason:
                        bad.append((ids[i], files.relative(group["part"].iloc[0]), reason))
                if bad and on_bad == "error":
                    raise BadImageError(*bad[0])
                paths.append(path)
        _mapped.cache_clear()  # a damaged shard may have been mapped before
        if bad:
            _report_bad(bad, len(ids), max_bad)
        names = [Path(path).name for path in paths]
        key = files.digest([names, files.checksum({"shard": shard, "row": row})])
        store = cls(paths, shard, row, row >= 0, np.empty((0, 3, size, size), np.uint8), key)
        store.bad = pd.DataFrame(bad, columns=["id", "part", "reason"])
        return store


def _report_bad(bad, count, max_bad):
    message = f"{len(bad):,} of {count:,} images are bad, the first: {', '.join(bad[0])}"
    if len(bad) > max(5, max_bad * count):
        raise BadTableError(message, f"Get the data again, or raise max_bad = {max_bad}.")
    runtime.log(f"{message}. They are left out.")


def _group(locators):
    """Return a table of part and name for each shard, its index the rows of `locators`.

    A shard holds what lies in one part, split by a hash of the name where that is much: a new image
    among many changes one shard, not all that follow.
    """
    places = pd.DataFrame([split_locator(place) for place in locators], columns=["part", "name"])
    places = places.sort_values(["part", "name"], kind="stable")
    hashes = places["name"].map(lambda name: zlib.crc32(name.encode()))
    counts = places.groupby("part")["name"].transform("size")
    # A power of two: adding rarely splits.
    buckets = 2 ** np.ceil(np.log2(np.ceil(counts / _SHARD)))
    return [group for _, group in places.groupby(["part", hashes % buckets])]


def _make_shard(group, size, folder):
    """Make sure that one shard lies whole in `folder`; return its path and why images are bad."""
    source, names = files.resolve_path(group["part"].iloc[0]), group["name"].tolist()
    with open_part(source) as part:
        key = files.digest([names, [part.crc(name) for name in names], size, _RULE])
        path = folder / f"{source.stem}-{size}-{key}.npy"
        notes = path.with_suffix(".json")
        if len(_read_reasons(notes)) != len(names):
            path.unlink(missing_ok=True)
        files.cached_rows(path, lambda: _decode_all(part, names, size, notes))
    return str(path), _read_reasons(notes)


def _decode_all(part, names, size, notes):
    """Return the images of one shard (k, 3, size, size); write to `notes` why each is bad."""
    images = np.zeros((len(names), 3, size, size), np.uint8)
    reasons = [None] * len(names)
    for i, name in enumerate(names):
        try:
            images[i] = resize(decode_image(part.read(name), name, part.where), size)
        except BadImageError as error:
            reasons[i] = error.reason
    files.write_json(notes, reasons)
    return images


def _read_reasons(path):
    with contextlib.suppress(FileNotFoundError, ValueError):
        return json.loads(path.read_text("utf-8"))
    return []


class Pictures:
    """Images in memory, to be read like a store's: not checked, not kept.

    Parameters
    ----------
    images : sequence of PIL images, or of arrays (h, w, 3), uint8
    size : int
        Pixels a side.
    """

    def __init__(self, images, size):
        images = [i if isinstance(i, Image.Image) else Image.fromarray(i) for i in images]
        # (n, 3, size, size)
        self._pixels = np.stack([resize(image.convert("RGB"), size) for image in images])
        self.ok = np.ones(len(images), bool)
        self.key = files.checksum({"pixels": self._pixels})[:16]

    def batch(self, rows):
        """Gather images (b, 3, size, size), uint8."""
        return self._pixels[_checked_rows(self, rows)]


class FeatureStore(_Sharded):
    """What a frozen network makes of a store: computed once, in shards, memory-mapped.

    Made by `build`.

    Attributes
    ----------
    ok : ndarray of shape (n,), bool
        Which rows have features: those that the store has.
    key : str
        Changes with any image, their order, and any weight of the network.
    """

    @classmethod
    def build(cls, store, front, folder=None, device="auto"):
        """Compute what is not yet stored; a stopped build goes on at the first shard it lacks.

        Parameters
        ----------
        store : ImageStore, or any other store
        front : nn.Module
            Maps what the store holds, such as uint8 images (b, 3, s, s), to a tensor (b, ...).
        folder : path-like, optional
            Where shards lie; ``data/cache/features`` by default. Can be deleted at any time.
        device : str

        Returns
        -------
        FeatureStore

        Raises
        ------
        BadValueError
            The features are not finite in float16.
        """
        folder = Path(folder or files.cache_dir() / "features")
        key, rows = files.digest([weights_key(front), store.key]), np.flatnonzero(store.ok)
        starts = range(0, len(rows), _SHARD)
        paths, like = [], np.empty(0, np.float32)
        for number, start in enumerate(starts):
            note = f"computing features, shard {number + 1} of {len(starts)}"
            part = rows[start : start + _SHARD]
            make = functools.partial(_features, front, store, part, device, note)
            paths.append(str(folder / f"{key}-{number:05d}.npy"))
            like = files.cached_rows(paths[-1], make)[:0].astype(np.float32)
        _mapped.cache_clear()
        place = np.cumsum(store.ok) - 1  # (n,): which of the rows that the store has
        return cls(paths, place // _SHARD, place % _SHARD, store.ok, like, key)


def _features(front, store, rows, device, note):
    with np.errstate(over="ignore"):
        features = apply(front, store, rows, device=device, description=note).astype(np.float16)
    if not np.isfinite(features).all():
        message = "the network's features are not finite in float16"
        raise BadValueError(message, "It may have diverged: train with a lower lr.")
    return features


class PairStore:
    """A store's inputs beside targets and labels, all precomputed: a batch is three gathers.

    Parameters
    ----------
    store : ImageStore, FeatureStore or any other store
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
        import torch

        return {"input": torch.from_numpy(self.store.batch(rows)), **self.answers(rows)}

    def answers(self, rows):
        """Return everything of a batch but its inputs."""
        import torch

        arrays = {"target": self.targets[rows]}
        if self.labels is not None:
            arrays["labels"] = np.unpackbits(self.labels[rows], axis=1, count=self.vocabulary_size)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def pack(labels):
    """Pack boolean labels (n, m) into bits (n, ceil(m / 8))."""
    return np.packbits(labels, axis=1)


# --- models over stores ---------------------------------------------------------------------------


def weights_key(model):
    """Return a key that changes with any weight of the model."""
    arrays = {name: value.detach().cpu().numpy() for name, value in model.state_dict().items()}
    return files.checksum(arrays)[:16]


@contextlib.contextmanager
def evaluating(model):
    """Put `model` into evaluation mode without gradients, and back."""
    import torch

    with torch.inference_mode(), contextlib.ExitStack() as stack:
        stack.callback(model.train, model.training)  # back to the mode it is in
        yield model.eval()


def apply(
    model, store, rows, *, pick=None, device="auto", batch_size=256, description="predicting"
):
    """Map `model` over the inputs of `rows` in batches, without gradients.

    In float32, but on GPUs that compute in bfloat16 under autocast. Where a GPU's memory does not
    hold a batch, batches are halved.

    Parameters
    ----------
    model : nn.Module
        Moved to the device.
    store : any store
    rows : array of int (n,)
    pick : callable, optional
        Takes the model's output to the tensor (b, p) that is wanted.
    device : str
    batch_size : int
    description : str
        What the progress bar says.

    Returns
    -------
    ndarray (n, p), float32

    Raises
    ------
    DeviceError
        The memory does not hold a single row.
    """
    import torch

    on = runtime.device(device)
    half = on.type == "cuda" and runtime.precision("auto", on) == "bf16"
    size, outputs = batch_size, []
    with evaluating(model.to(on)), torch.autocast(on.type, torch.bfloat16, enabled=half):
        parts = np.split(np.asarray(rows), range(batch_size, len(rows), batch_size))
        for part in runtime.track(parts, description):
            while len(part):
                try:
                    output = model(torch.from_numpy(store.batch(part[:size])).to(on))
                    output = output if pick is None else pick(output)
                    outputs.append(output.float().cpu().numpy())
                    part = part[size:]
                except torch.OutOfMemoryError as error:
                    if size == 1:
                        raise DeviceError(f"{on} has too little memory for one row") from error
                    if size == batch_size:
                        runtime.log(f"{on} has too little memory for {size} rows: fewer at a time")
                    size //= 2
    return np.concatenate(outputs)
