"""From parts to stores: a part is decoded once, and every front that is asked for reads it then.

A front maps uint8 images (b, 3, s, s) to what an encoder reads: the pixels themselves, or a frozen
network's latents, captions or features. What it makes of one part is a shard, named by the part's
content and the front's weights and not by which rows are wanted: another cleaning finds it done.
"""

import collections
import contextlib
import functools
import itertools
import multiprocessing
import os
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from rsdlib import errors, files, runtime
from rsdlib.data.faults import Faults
from rsdlib.data.forward import Forward, weights_key
from rsdlib.data.images import SUFFIXES, decode_image, resize, split_locator
from rsdlib.data.pairs import load_pairs
from rsdlib.data.parts import open_part
from rsdlib.data.stores import Store, half

_SHARD = 1000  # images a shard, about
_BATCH = 64  # images that are decoded and in memory at once, beside those decoded meanwhile
_RULE = "3: RGB on white, upright, centre square, bicubic"  # part of every front's key

# --- fronts ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Front:
    """What is made of every image of a part; see `pixels` and `network`.

    Attributes
    ----------
    size : int
        Pixels a side of the images that it reads.
    key : str
        Changes with whatever changes its answers.
    open : callable, optional
        Returns the frozen network, in each process that runs it once; without, the pixels are kept.
    """

    size: int
    key: str
    open: object = field(default=None, compare=False)


def pixels(size):
    """Return the front that keeps the images themselves, `size` pixels a side."""
    return Front(size, files.digest([size, _RULE]))


def network(module, size, open=None):
    """Return the front that runs a frozen module; other processes call `open` to have it too."""
    key = files.digest([size, _RULE, weights_key(module)])
    return Front(size, key, open or (lambda: module))


@functools.lru_cache(8)
def _opened(front, on):
    import torch

    module = front.open().eval().requires_grad_(False)
    if network(module, front.size) != front:
        raise errors.CheckpointError("a frozen network has other weights than in the first process")
    layout = torch.channels_last if on.type == "cuda" else torch.preserve_format
    return Forward(module.to(on, memory_format=layout), on)


# --- one part -------------------------------------------------------------------------------------


# Some images of a part: their names, why some are bad, and a file for each front.
Shard = collections.namedtuple("Shard", ["names", "bad", "paths"])


def make_shards(path, wanted, fronts, folder, device="auto", about=""):
    """Make sure that what each front makes of a part lies whole in `folder`.

    Idempotent: what is there is not computed again. Files are written whole or not at all, and
    their bytes do not depend on who makes them.

    Parameters
    ----------
    path : Path
        Of the part.
    wanted : sequence of str
        Names that must be among the shards', though the part may lack them.
    fronts : sequence of Front
    folder : Path
    device : str
    about : str
        What the progress bar says; without, there is none.

    Returns
    -------
    list of Shard
    """
    shards = []
    with open_part(path) as part:
        images = {name for name in part.names() if Path(name).suffix.lower() in ("", *SUFFIXES)}
        for names in _buckets(sorted(images | set(wanted))):
            content = files.digest([names, [part.crc(name) for name in names], _RULE])
            notes = folder / f"{path.stem[:40]}-{content}.json"
            paths = {f: folder / f"{path.stem[:40]}-{content}-{f.key}.npy" for f in fronts}
            bad = _read_notes(notes)
            missing = [f for f in fronts if bad is None or not _is_whole(paths[f])]
            if missing:
                bad, arrays = _run(part, names, missing, device, about)
                if _read_notes(notes) != bad:
                    files.write_json(notes, {"bad": bad, "digest": files.digest(bad)})
                for front, array in arrays.items():
                    files.save_rows(paths[front], array)
            shards.append(Shard(names, bad, [str(paths[f]) for f in fronts]))
    return shards


def _buckets(names):
    """Split names by a hash where they are many: a new image changes one shard, not all after."""
    count = 1 << ((len(names) - 1) // _SHARD).bit_length()  # a power of two: adding rarely splits
    buckets = [[] for _ in range(count)]
    for name in names:
        buckets[zlib.crc32(name.encode()) % count].append(name)
    return [bucket for bucket in buckets if bucket]


def _read_notes(path):
    """Return why images of a shard are bad, None if that is not known."""
    with contextlib.suppress(errors.CacheError, KeyError, TypeError):
        stored = files.read_json(path)
        if stored["digest"] == files.digest(stored["bad"]):
            return stored["bad"]
    return None


def _is_whole(path):
    """Tell whether a shard is there, by its size and header; `check_shards` reads it all."""
    with contextlib.suppress(FileNotFoundError):
        try:
            files.open_rows(path, verify=False)
            return True
        except errors.CacheError as error:
            runtime.log(f"{error} Making it again.")
    return False


def _run(part, names, fronts, device, about):
    """Return why images are bad, by name, and what each front makes of the others."""
    bad, made, count = {}, {front: np.empty(0) for front in fronts}, 0
    sizes = {front.size for front in fronts}

    def decode(name):
        try:
            image = decode_image(part.read(name), name, part.where)
        except errors.BadImageError as error:
            return error.reason
        return {size: resize(image, size) for size in sizes}

    for batch, decoded in _ahead(decode, names, about):
        bad |= {n: why for n, why in zip(batch, decoded, strict=True) if isinstance(why, str)}
        good = [images for images in decoded if not isinstance(images, str)]
        for front in fronts if good else ():
            answers = np.stack([images[front.size] for images in good])  # (b, 3, s, s), uint8
            if front.open is not None:
                answers = half(_opened(front, runtime.device(device))(answers))
            if not count:
                made[front] = np.empty((len(names), *answers.shape[1:]), answers.dtype)
            made[front][count : count + len(good)] = answers
        count += len(good)
    return bad, {front: rows[:count] for front, rows in made.items()}


def _ahead(function, items, about):
    """Yield batches of items and the function's values; threads work on the next one meanwhile."""
    batches = [items[start : start + _BATCH] for start in range(0, len(items), _BATCH)]
    two = list(itertools.zip_longest(batches, batches[1:]))
    with ThreadPoolExecutor(runtime.threads()) as pool:
        coming = pool.map(function, batches[0])
        for batch, following in runtime.track(two, about) if about else two:
            values, coming = coming, following and pool.map(function, following)
            yield batch, list(values)


# --- all parts ------------------------------------------------------------------------------------


@contextlib.contextmanager
def executor(processes=0, dask=""):
    """Open what runs parts side by side: processes of this machine, or Dask's workers.

    Parameters
    ----------
    processes : int
        With one, or none, parts are read one after the other, in threads.
    dask : str
        Address of a scheduler whose workers see the same files, or ``local:4`` for four workers
        here. A part whose worker is lost is given to another. Of several GPUs a worker takes the
        first that it sees: start it with ``CUDA_VISIBLE_DEVICES``, as dask-cuda does.

    Yields
    ------
    concurrent.futures.Executor or None
    """
    if dask:
        distributed = runtime.require("distributed")
        kind, _, count = dask.partition(":")
        how = {"n_workers": int(count), "threads_per_worker": 1} if kind == "local" else {}
        patient = {"distributed.scheduler.allowed-failures": 100}  # workers that a part may lose
        with runtime.require("dask.config", "dask").set(patient):
            client = distributed.Client(**how) if how else distributed.Client(dask)
        with client:
            yield client.get_executor(pure=False, retries=10)
    elif processes > 1:
        context = multiprocessing.get_context("spawn")
        # Windows cannot wait for more.
        processes = min(processes, 61) if sys.platform == "win32" else processes
        numbers = context.SimpleQueue()
        for number in range(processes):
            numbers.put(number)
        with ProcessPoolExecutor(processes, context, runtime.share, (processes, numbers)) as pool:
            yield pool
    else:
        yield None


def find_parts(source, on_bad="error"):
    """Return the parts that hold the images of a source for `rsdlib.data.load_pairs`, in order."""
    places = {split_locator(place)[0] for place in load_pairs(source, on_bad=on_bad)["image"]}
    return sorted(map(files.resolve_path, places))


def run(parts, wanted, fronts, folder, device="auto", pool=None):
    """Yield the shards of each part, made where they are not there yet.

    Parameters
    ----------
    parts : sequence of Path
    wanted : sequence of sequences of str
        For each part, see `make_shards`.
    fronts : sequence of Front
    folder : Path
    device : str
    pool : concurrent.futures.Executor, optional
        See `executor`; each part is one task.

    Yields
    ------
    list of Shard

    Raises
    ------
    DeviceError
        A process of the pool died.
    """
    files.remove_leftovers(folder, older=24 * 3600)  # others may be writing
    make = functools.partial(make_shards, fronts=fronts, folder=folder, device=device)
    if pool is None:
        for number, (part, names) in enumerate(zip(parts, wanted, strict=True), 1):
            about = f"reading images, part {number} of {len(parts)}, {_BATCH} at once"
            yield make(part, names, about=about)
        return
    died = "a process that read images died"
    fix = "Often memory: use fewer processes. Run it again, it goes on where it stopped."
    named = errors.refusing(BrokenProcessPool, errors.DeviceError, died, fix)
    with named, contextlib.closing(pool.map(make, parts, wanted)) as made:  # an error cancels all
        yield from runtime.track(made, "reading images, parts", len(parts))


# --- stores ---------------------------------------------------------------------------------------


def extract(pairs, fronts, folder=None, on_bad="error", pool=None, *, device="auto", max_bad=0.01):
    """Return a store of what each front makes of the images of some pairs.

    What is not there yet is made; a build that is stopped goes on where it stopped. Where parts are
    zips that kept size and date, a store that was built before opens without reading them.

    Parameters
    ----------
    pairs : pandas.DataFrame
        From `load_pairs`; the columns ``id`` and ``image`` are used.
    fronts : sequence of Front
    folder, pool, device
        See `run`.
    on_bad : {"error", "skip"}
        What to do with an image that cannot be decoded: stop, or list it in the stores' `bad`.
        Nothing ever takes its place.
    max_bad : float
        With ``on_bad="skip"``, the share of bad images above which the data itself is refused;
        five bad images always pass.

    Returns
    -------
    list of Store

    Raises
    ------
    BadImageError
        With ``on_bad="error"``: an image cannot be decoded.
    BadTableError
        Too many images are bad.
    """
    faults, folder = Faults(on_bad), Path(folder or files.cache_dir() / "parts")
    places = pd.DataFrame(map(split_locator, pairs["image"]), columns=["part", "name"])
    groups = places.groupby("part")["name"]
    parts = [files.resolve_path(part) for part in groups.groups]
    images = pd.util.hash_pandas_object(places, index=False).to_numpy()
    key = files.digest([files.checksum({"images": images}), [front.key for front in fronts]])
    index, stamps = folder / f"index-{key}.safetensors", None
    if all(part.is_file() for part in parts):
        stamps = [[s.st_size, s.st_mtime_ns] for s in map(os.stat, parts)]
    where, found = _read_index(index, stamps)
    if not found:
        where = {"shard": np.zeros(len(places), np.int32)}
        where["row"] = np.full(len(places), -1, np.int32)
        found = {"stamps": stamps, "paths": [[] for _ in fronts], "bad": []}
        made = run(parts, [names.tolist() for _, names in groups], fronts, folder, device, pool)
        for (_, names), shards in zip(groups, made, strict=True):
            _look_up(names, shards, where, found)
            if found["bad"] and on_bad == "error":
                break
        else:
            if stamps is not None:
                files.save_arrays(index, where, found)
    ids, part = pairs["id"].to_numpy(), places["part"].to_numpy()
    faults += [(ids[i], files.relative(part[i]), reason) for i, reason in sorted(found["bad"])]
    if faults and on_bad == "error":
        raise errors.BadImageError(*faults[0])
    bad, lies = faults.table(len(places), "images", max_bad), files.checksum(where)
    stores = []
    for paths in found["paths"]:
        key = files.digest([[Path(path).name for path in paths], lies])
        stores.append(Store(paths, where["shard"], where["row"], key, bad))
    return stores


def _read_index(path, stamps):
    """Return the row and the shard of each image, the shards' paths and the bad images.

    That is stored, and good as long as all parts are zips that kept size and date.
    """
    with contextlib.suppress(errors.CacheError):
        where, found = files.load_arrays(path)
        shards = itertools.chain(*found["paths"])
        if found["stamps"] == stamps and all(_is_whole(Path(shard)) for shard in shards):
            return where, found
    return None, None


def _look_up(names, shards, where, found):
    """Note where the images of one part lie: a Series of names, its index the images."""
    for made in shards:
        place = pd.Index([n for n in made.names if n not in made.bad]).get_indexer(names)
        images = names.index[place >= 0].to_numpy()
        where["shard"][images], where["row"][images] = len(found["paths"][0]), place[place >= 0]
        found["bad"] += [(int(i), made.bad[n]) for i, n in names.items() if n in made.bad]
        for paths, path in zip(found["paths"], made.paths, strict=True):
            paths.append(path)


def check_shards(folder=None):
    """Hold every stored array against its checksum; a damaged one is deleted, to be made again.

    Parameters
    ----------
    folder : path-like, optional
        Default: the cache.

    Returns
    -------
    right : int
        How many files are as they were written.
    damaged : list of str
        The files that are gone now.
    """
    paths, damaged = sorted(Path(folder or files.cache_dir()).rglob("*.npy")), []
    for path in runtime.track(paths, "checking stored arrays"):
        try:
            files.open_rows(path)
        except errors.CacheError:
            path.unlink()
            damaged.append(files.relative(path))
    return len(paths) - len(damaged), damaged
