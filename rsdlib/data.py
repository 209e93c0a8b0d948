"""Image-prompt pairs on disk, and their images decoded once: DiffusionDB's layout or a plain folder in, uint8 batches out.

Whatever lies on disk may be broken or hostile. Zips are judged by their directory and read in memory, member by expected name,
never extracted; images are decoded under limits; everything refused is refused by name and with a reason.
"""

import contextlib
import functools
import io
import json
import math
import os
import re
import stat
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow
from PIL import Image, ImageOps, UnidentifiedImageError

from rsdlib import runtime
from rsdlib.errors import BadArchiveError, BadImageError, BadTableError, BadValueError, ConfigError

MAX_BYTES = 64 * 2**20  # of one file or zip member
MAX_MEMBERS = 100_000  # of one zip; DiffusionDB's hold 1,001
MAX_RATIO = 200  # unpacked to packed, of a member above 1 MiB
MAX_PIXELS = 16_000_000  # of one image
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")

# --- parts: zips and folders of images --------------------------------------------------------------------------------------

# Not a plain relative path by the rules of either POSIX or Windows: empty, absolute, drive, backslash, NUL, or climbing.
_UNSAFE = re.compile(r"^$|^/|^[A-Za-z]:|\\|\0|//|(^|/)\.{1,2}(/|$)")
_BROKEN_ZIP = (EOFError, ValueError, NotImplementedError, struct.error, zlib.error, zipfile.BadZipFile)


class _ZipPart:
    """One zip, open for reading; every member's entry is judged before any is read."""

    def __init__(self, path):
        self.where = runtime.relative(path)
        try:
            self._zip = zipfile.ZipFile(path)
        except (*_BROKEN_ZIP, OSError) as error:
            raise BadArchiveError(f"{self.where} cannot be opened as a zip: {error}", "Download it again.") from error
        try:
            self.names = self._judge(self._zip.infolist())
        except BadArchiveError:
            self._zip.close()
            raise

    def _judge(self, members):
        if len(members) > MAX_MEMBERS:
            raise BadArchiveError(f"{self.where} has {len(members):,} members, more than {MAX_MEMBERS:,}", "Do not use it.")
        names = {}
        for member in members:
            name = member.orig_filename  # `filename` is already cut at a NUL and has its separators replaced
            kind = stat.S_IFMT(member.external_attr >> 16)
            if _UNSAFE.search(name):
                reason = "its name is not a plain relative path"
            elif name in names:
                reason = "its name stands twice"
            elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                reason = "it is a link or a special file"
            elif member.header_offset < 0:
                reason = "its entry points outside the file"
            elif member.flag_bits & 0x1:
                reason = "it is encrypted"
            elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                reason = f"its compression method {member.compress_type} is neither stored nor deflated"
            elif member.file_size > MAX_BYTES:
                reason = f"it unpacks to {member.file_size:,} bytes, more than {MAX_BYTES:,}"
            elif member.file_size > max(2**20, MAX_RATIO * member.compress_size):
                reason = f"it unpacks to more than {MAX_RATIO} times its packed size"
            else:
                names[name] = member
                continue
            raise BadArchiveError(f"{self.where}, member {name!r}: {reason}", "Do not use this file; download it from its source.")
        return {name: member for name, member in names.items() if not member.is_dir()}

    def crc(self, name):
        """Return the member's CRC-32 as the zip's directory states it, None if there is no such member."""
        return self.names[name].CRC if name in self.names else None

    def read(self, name):
        """Return the member's bytes; the CRC-32 and the stated size must hold."""
        if name not in self.names:
            raise BadImageError(name, self.where, "the zip has no such member")
        member = self.names[name]
        try:
            with self._zip.open(member) as stream:
                data = stream.read(member.file_size + 1)  # zipfile never inflates more than it is asked for
        except _BROKEN_ZIP as error:
            raise BadImageError(name, self.where, f"the zip member is damaged ({error})") from error
        if len(data) != member.file_size:
            raise BadImageError(name, self.where, "the zip member is cut short")
        return data

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._zip.close()


class _FolderPart:
    """One folder of loose files."""

    def __init__(self, path):
        self.path, self.where = path, runtime.relative(path)

    @functools.cached_property
    def names(self):
        with os.scandir(self.path) as entries:
            return {entry.name for entry in entries if entry.is_file()}

    def crc(self, name):
        """Return the CRC-32 of the file's bytes, None if it cannot be read."""
        try:
            return zlib.crc32(self.read(name))
        except BadImageError:
            return None

    def read(self, name):
        """Return the file's bytes."""
        path = self.path / name
        if not path.is_file():  # a named pipe would block
            raise BadImageError(name, self.where, "there is no such file")
        try:
            with path.open("rb") as stream:
                data = stream.read(MAX_BYTES + 1)
        except PermissionError as error:  # other faults of the machine pass through: they say nothing about the image
            raise BadImageError(name, self.where, "no permission to read it") from error
        if len(data) > MAX_BYTES:
            raise BadImageError(name, self.where, f"it has more than {MAX_BYTES:,} bytes")
        return data


def _open_part(path):
    return _ZipPart(path) if path.suffix == ".zip" else contextlib.nullcontext(_FolderPart(path))


# --- tables -----------------------------------------------------------------------------------------------------------------

_TABLES = ("metadata.parquet", "metadata-large.parquet", "metadata.csv", "metadata.jsonl")
_DIFFUSIONDB = {"id": ("image_name",), "file": ("image_name",), "prompt": ("prompt",), "part_id": ("part_id",)}
_PLAIN = {
    "id": ("id", "file_name", "image", "image_name"),
    "file": ("file_name", "image", "image_name", "id"),
    "prompt": ("prompt", "text", "caption"),
}
_NUMBERS = ("part_id", "seed", "step", "cfg", "width", "height", "image_nsfw", "prompt_nsfw")
_JSON_NAMES = {"p": "prompt", "se": "seed", "c": "cfg", "st": "step", "sa": "sampler"}


def load_pairs(source, *, limit=None):
    """Read the pairs of a folder in DiffusionDB's layout, or of a plain folder with a table.

    DiffusionDB's layout: ``metadata.parquet`` and parts ``images/part-000001.zip`` (or folders ``images/part-000001/``; parts
    may also lie directly in `source`), each with a JSON. The table or the JSONs may be absent; where both are there, they must
    agree. Rows of parts that are not on disk are left out, and counted in the log. A part that lies there both as a zip and as
    a folder is read from the zip.

    Plain folder: ``metadata.csv`` or ``metadata.jsonl`` with a column ``file_name`` (or ``image``, ``image_name``, ``id``) and
    a column ``prompt`` (or ``text``, ``caption``). A file name may lack its suffix.

    Parameters
    ----------
    source : path-like
    limit : int, optional
        Keep the first so many ids in sorted order. With ``metadata.parquet``, only the parts that hold them are opened.

    Returns
    -------
    pandas.DataFrame
        Sorted by id, whatever the order of the table. ``id`` : str, the image's name as the table has it. ``prompt`` : str as
        found, missing ones are missing (`pandas.isna`). ``image`` : str, a locator for `open_image`, the path of a file or
        ``<path of a zip>::<member>``; absolute, so that it names one file from any directory: store the id, not the locator. Then
        every other column of the table, as found.

    Raises
    ------
    BadTableError
        There is no table, it is damaged, lacks a column, repeats an id, or contradicts a part's JSON.
    BadArchiveError
        A part is damaged or hostile, or a listed image is not in it.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit = {limit} is out of range", "It must be at least 1.")
    source = runtime.resolve_path(source)
    if not source.is_dir():
        raise BadTableError(f"there is no folder {runtime.relative(source)}", "Check the path, or fetch the data first.")
    table = next((source / name for name in _TABLES if (source / name).is_file()), None)
    if table is None or table.suffix == ".parquet":
        frame = _read_diffusiondb(source, table, limit)
    else:
        frame = _read_plain(source, table).sort_values("id", ignore_index=True).iloc[:limit]
    return frame[["id", "prompt", "image", *(name for name in frame if name not in ("id", "prompt", "image", "file"))]]


def _read_plain(source, table):
    frame = _checked(_read_table(table), runtime.relative(table), _PLAIN)
    walked = os.walk(source, followlinks=True)
    files = {Path(folder, name).relative_to(source).as_posix() for folder, _, names in walked for name in names}
    suffixes = ("", ".png", ".jpg", ".jpeg", ".webp")
    wanted = [os.path.normpath(name).removeprefix(f"{source}/") for name in frame["file"]]
    found = [next((name + suffix for suffix in suffixes if name + suffix in files), None) for name in wanted]
    if None in found:  # a name that climbs out of the folder is never among its files
        message = f"image {frame['file'].iloc[found.index(None)]!r} is listed in {runtime.relative(table)} but is not in its folder"
        raise BadTableError(message, "Add the file, or drop the row.")
    return frame.assign(image=[f"{source}/{name}" for name in found])


def _read_diffusiondb(source, table, limit):
    parts = {}
    for pattern in ("images/part-*.zip", "images/part-*", "part-*.zip", "part-*"):
        for path in sorted(source.glob(pattern)):
            number = re.fullmatch(r"part-(\d+)(\.zip)?", path.name)
            if number and (path.suffix == ".zip" or path.is_dir()):
                parts.setdefault(int(number[1]), path)
    if not parts:
        message = f"{runtime.relative(source)} holds neither metadata.csv, metadata.jsonl nor a part of DiffusionDB"
        raise BadTableError(message, "See rsdlib.data.load_pairs for the layouts.")
    if table is not None:
        frame, where = _read_table(table), runtime.relative(table)
    else:
        where = f"the JSON files of {runtime.relative(source)}"
        frame = pd.DataFrame([row for number, path in parts.items() for row in _json_rows(number, path)])
    frame = _checked(frame, where, _DIFFUSIONDB)
    here = frame["part_id"].isin(list(parts))
    if not here.all():
        runtime.log(f"{(~here).sum():,} of {len(frame):,} rows are left out: their parts are not on disk")
    frame = frame[here].sort_values("id", ignore_index=True)
    chosen = frame.iloc[:limit]
    opened = frame[frame["part_id"].isin(chosen["part_id"].unique())].groupby("part_id")
    unlisted = sum(_check_part(parts[number], rows, where) for number, rows in runtime.track(opened, "checking parts"))
    if unlisted:
        runtime.log(f"{unlisted:,} files in the parts are not listed in {where}: left out")
    prefix = {number: str(path) + ("::" if path.suffix == ".zip" else "/") for number, path in parts.items()}
    return chosen.assign(image=[prefix[number] + name for number, name in zip(chosen["part_id"], chosen["file"], strict=True)])


def _check_part(path, rows, where):
    """Hold a part against its rows in the table and against its JSON; return the number of its files that are in neither."""
    with _open_part(path) as part:
        listed = _read_part_json(part, path.stem) or {}
        for name in (*rows["id"], *listed):
            if name not in part.names:
                raise BadArchiveError(f"image {name!r} is listed for {part.where} but is not in it", "Download this part again.")
        for name, prompt in zip(rows["id"], rows["prompt"], strict=True):
            prompt = None if pd.isna(prompt) else prompt
            if name in listed and listed[name].get("p") != prompt:
                message = f"image {name!r} has the prompt {prompt!r} in {where}, another in the JSON of {part.where}"
                raise BadTableError(message, "One of the two belongs to other data; download both again.")
        return len(set(part.names) - set(rows["id"]) - {f"{path.stem}.json"})


def _json_rows(number, path):
    with _open_part(path) as part:
        listed = _read_part_json(part, path.stem)
    if listed is None:
        message = f"{part.where} has no {path.stem}.json, and there is no metadata.parquet"
        raise BadTableError(message, "One of them must hold the prompts.")
    return [
        {_JSON_NAMES.get(key, key): value for key, value in row.items()} | {"image_name": name, "part_id": number}
        for name, row in listed.items()
    ]


def _read_part_json(part, stem):
    if f"{stem}.json" not in part.names:
        return None
    try:
        listed = json.loads(part.read(f"{stem}.json"), object_pairs_hook=_json_object)
        if not isinstance(listed, dict) or not all(isinstance(row, dict) for row in listed.values()):
            raise ValueError("it is not an object of objects")
    except (BadImageError, ValueError, RecursionError) as error:
        raise BadTableError(f"{stem}.json of {part.where} cannot be read: {error}", "Download this part again.") from error
    return listed


def _json_object(pairs):
    """Refuse repeated keys, which `json` would drop, and replace lone surrogates, which no file format can hold."""
    value = {key: item.encode("utf-8", "replace").decode() if isinstance(item, str) else item for key, item in pairs}
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return value


def _read_table(path):
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        if path.suffix == ".csv":
            return pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")  # None, null and NA stay words
        lines = path.read_text("utf-8-sig").split("\n")
        rows = [json.loads(line, object_pairs_hook=_json_object) for line in lines if line.strip()]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("each line must be a JSON object")
        return pd.DataFrame(rows)
    except (OSError, ValueError, RecursionError, pyarrow.ArrowException) as error:
        reason = str(error).replace(str(path), path.name)
        raise BadTableError(f"{runtime.relative(path)} cannot be read: {reason}", "Write or download it again.") from error


def _checked(frame, where, wanted):
    """Bring a table to our column names; check its types and that no id repeats."""
    columns = {}
    for column, names in wanted.items():
        name = next((name for name in names if name in frame), None)
        if name is None:
            raise BadTableError(f"{where} has no column {' or '.join(map(repr, names))}", f"Its columns are {[*map(str, frame)]}.")
        columns[column] = frame[name]
        kind = "whole numbers" if column == "part_id" else "text"
        values = frame[name].dropna() if column == "prompt" else frame[name]
        if not (pd.api.types.is_integer_dtype(values) if column == "part_id" else all(isinstance(value, str) for value in values)):
            raise BadTableError(f"column {name!r} of {where} does not hold {kind} throughout", "Write the table again.")
    used = {series.name for series in columns.values()} | {"id", "prompt", "image"}
    frame = pd.concat([pd.DataFrame(columns), frame.drop(columns=used, errors="ignore")], axis=1)
    for column in frame.columns.intersection(_NUMBERS):
        try:
            frame[column] = pd.to_numeric(frame[column])
        except (ValueError, TypeError) as error:
            raise BadTableError(f"column {column!r} of {where} does not hold numbers: {error}", "Write the table again.") from error
    repeated = frame["id"].duplicated(keep=False)
    if repeated.any():
        rows = frame[frame["id"] == frame["id"][repeated].iloc[0]]
        differing = [name for name in ("prompt", "part_id") if name in rows and rows[name].nunique(dropna=False) > 1]
        how = f"with different {' and '.join(differing)}" if differing else "with the same prompt"
        message = f"id {rows['id'].iloc[0]!r} stands {len(rows)} times in {where}, {how}"
        raise BadTableError(message, "An image has one prompt: keep one row.")
    return frame


# --- images -----------------------------------------------------------------------------------------------------------------

_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I;16B", "I;16L", "I;16N"}
# What Pillow is known to raise on broken files: the list of its own fuzz tests, and what our tests met.
_BROKEN_IMAGE = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    IndexError,
    TypeError,
    NotImplementedError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def open_image(locator):
    """Open one image, safely.

    Parameters
    ----------
    locator : str or path-like
        From the column ``image`` of `load_pairs`, or the path of any image file.

    Returns
    -------
    PIL.Image.Image
        RGB, 8 bits, turned upright by its EXIF orientation. Transparent images are laid on white; 16-bit grey values are divided
        by 257, not clipped; colour profiles are ignored.

    Raises
    ------
    BadImageError
        The image is absent, damaged, larger than `MAX_PIXELS`, animated (no frame is *the* image), of a format outside
        `FORMATS`, or holds 32-bit values, whose range is not known.
    BadArchiveError
        The zip that holds it is damaged or hostile.
    """
    place, name = _split(locator)
    path = runtime.resolve_path(place) if place.endswith(".zip") else runtime.resolve_path(locator).parent
    with _open_part(path) as part:
        return decode_image(part.read(name), name, part.where)


def _split(locator):
    """Return a locator's zip or folder, and the name inside."""
    archive, mark, name = str(locator).partition(".zip::")
    return (archive + ".zip", name) if mark else os.path.split(locator)


def decode_image(data, id="image", part="memory"):
    """Decode the bytes of one image as `open_image` does; `id` and `part` name it in errors."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:  # reads the header only
            reason = _why_not(image)
            if reason:
                raise BadImageError(id, part, reason)
            image.verify()  # checksums, where the format has them; the image must then be opened anew
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except UnidentifiedImageError as error:
        reason = f"it is none of {', '.join(FORMATS)}, or its header is damaged" if data else "it is empty, 0 bytes"
        raise BadImageError(id, part, reason) from error
    except _BROKEN_IMAGE as error:
        raise BadImageError(id, part, f"it is cut short, damaged or not safe to decode ({error})") from error


def _why_not(image):
    """Return why an image whose header has been read is refused, None if it is not."""
    if image.width * image.height > MAX_PIXELS:
        return f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,} in all"
    if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a camera's JPEG with previews behind the image
        return "it is animated or has several pages, and none of them is the image"
    if image.mode not in _MODES:
        return f"its mode {image.mode} has no agreed range of values; store it with 8 or 16 bits"
    return None


def _to_rgb(image):
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int32)  # (h, w)
        grey = ((values + 128) // 257).astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def resize(image, size):
    """Make an image square: its centre square, resampled by Pillow's antialiased bicubic filter where the size differs.

    Parameters
    ----------
    image : PIL.Image.Image
        RGB.
    size : int
        Pixels a side.

    Returns
    -------
    ndarray of shape (3, size, size), uint8
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


# --- the store --------------------------------------------------------------------------------------------------------------

_SHARD = 1000  # images a shard, about
_RULE = "1: RGB on white, upright, centre square, bicubic"  # part of every shard's key; change it with `decode_image` or `resize`


class ImageStore:
    """Images decoded once to uint8 and memory-mapped, one file per part of the data.

    A shard's name is a hash of its images' names and CRC-32s, the size and the rule of decoding: a changed image makes a new
    shard, a changed date does not. Loose files are read once per build to know their CRC-32, zips state it. Stores are made by
    `build`.

    Attributes
    ----------
    size : int
        Pixels a side.
    ok : ndarray of shape (n,), bool
        Which rows have an image.
    bad : pandas.DataFrame
        The other rows: ``id``, ``part``, ``reason``.
    key : str
        Changes with any byte of any image and with which are bad.
    """

    def __init__(self, size, shards, shard, row, bad, key=""):
        self.size, self.bad, self.key = size, bad, key
        self._shards = shards  # each (k, 3, size, size)
        self._shard, self._row = shard, row  # (n,), (n,): where image i lies
        self.ok = row >= 0  # (n,)

    @classmethod
    def build(cls, pairs, size, folder=None, on_bad="error", executor=None, max_bad=0.01):
        """Decode what is not yet stored; checks every stored shard by its checksum and makes damaged ones again.

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
            What to do with an image that cannot be decoded: stop, or list it in `bad`. Nothing ever takes its place.
        executor : concurrent.futures.Executor, optional
            Runs one shard a task, in any process that sees the same files; the bytes do not depend on it.
        max_bad : float
            With ``on_bad="skip"``, the share of bad images above which the data itself is refused; five bad images always pass.

        Returns
        -------
        ImageStore
        """
        if on_bad not in ("error", "skip"):
            raise ConfigError(f"on_bad = {on_bad!r} is unknown", "Use 'error' or 'skip'.")
        ids = pairs["id"].tolist()
        places = [_split(locator) for locator in pairs["image"]]
        groups = _group(places)
        tasks = [(runtime.resolve_path(places[rows[0]][0]), [places[i][1] for i in rows]) for rows in groups]
        work = functools.partial(_make_shard, size=size, folder=Path(folder or runtime.cache_dir() / "images"))
        paths = (work(task) for task in tasks) if executor is None else executor.map(work, tasks)

        shards, bad, names = [], [], []
        shard, row = np.zeros(len(ids), np.int32), np.full(len(ids), -1, np.int32)
        with contextlib.closing(paths):  # on an error, tasks that wait are cancelled
            for path, rows, task in zip(runtime.track(paths, "decoding images, shards", len(tasks)), groups, tasks, strict=True):
                arrays, _ = runtime.load_arrays(path, verify=False)  # just verified, or made
                for position, (i, reason) in enumerate(zip(rows, json.loads(arrays["reasons"].tobytes()), strict=True)):
                    if reason is None:
                        shard[i], row[i] = len(shards), position
                    else:
                        bad.append((ids[i], runtime.relative(task[0]), reason))
                if bad and on_bad == "error":
                    raise BadImageError(*bad[0])
                shards.append(np.asarray(arrays["images"]))
                names.append(path.name)
        store = cls(size, shards, shard, row, pd.DataFrame(bad, columns=["id", "part", "reason"]), runtime.digest(names))
        assert int(store.ok.sum()) + len(bad) == len(ids)
        if bad:
            runtime.log(f"{len(bad):,} of {len(ids):,} images are bad and left out, the first: {', '.join(bad[0])}")
        if len(bad) > max(5, max_bad * len(ids)):
            message = f"{len(bad):,} of {len(ids):,} images are bad, more than max_bad = {max_bad}; the first: {', '.join(bad[0])}"
            raise BadTableError(message, "Get the data again, or raise max_bad.")
        return store

    def batch(self, indices):
        """Gather images.

        Parameters
        ----------
        indices : array-like of shape (b,), int
            Rows of the pairs the store was built from.

        Returns
        -------
        ndarray of shape (b, 3, size, size), uint8
            A fresh copy.
        """
        indices = rows_with_image(self, indices)
        images = np.empty((len(indices), 3, self.size, self.size), np.uint8)  # (b, 3, h, w)
        for image, shard, row in zip(images, self._shard[indices].tolist(), self._row[indices].tolist(), strict=True):
            image[...] = self._shards[shard][row]
        return images

    def __len__(self):
        return len(self.ok)

    def __getitem__(self, i):
        return self.batch([i])[0]


class Pictures:
    """Images in memory, to be read like a store's: not checked, not kept.

    Parameters
    ----------
    images : sequence of PIL images, or of arrays (h, w, 3), uint8
    size : int
        Pixels a side.
    """

    def __init__(self, images, size):
        images = [image if isinstance(image, Image.Image) else Image.fromarray(image) for image in images]
        self._pixels = np.stack([resize(image.convert("RGB"), size) for image in images])  # (n, 3, size, size)
        self.ok = np.ones(len(images), bool)

    def batch(self, indices):
        """Gather images (b, 3, size, size), uint8."""
        return self._pixels[rows_with_image(self, indices)]

    def __len__(self):
        return len(self.ok)


def rows_with_image(store, indices):
    """Return `indices` as int64 (b,), checked to be rows of `store` that have an image."""
    indices = np.asarray(indices)
    if indices.ndim != 1 or (indices.dtype.kind not in "iu" and indices.size):
        raise BadValueError(f"indices are {indices.dtype} of shape {indices.shape}, not a row of whole numbers")
    indices = indices.astype(np.int64)
    if not store.ok[indices].all():
        row = indices[~store.ok[indices]][0]
        raise BadValueError(f"row {row} has no image: it is listed in the store's `bad`", "Choose rows by the store's `ok`.")
    return indices


def _group(places):
    """Return lists of rows, one list per shard: those of one part, split by a hash of the name where it holds many.

    With the hash, a new image among many changes one shard, not all that follow.
    """
    parts = {}
    for i, (part, _) in enumerate(places):
        parts.setdefault(part, []).append(i)
    groups = []
    for part in sorted(parts):
        rows = sorted(parts[part], key=lambda i: places[i][1])
        buckets = [[] for _ in range(1 << (math.ceil(len(rows) / _SHARD) - 1).bit_length())]  # a power of two: adding rarely splits
        for i in rows:
            buckets[zlib.crc32(places[i][1].encode()) % len(buckets)].append(i)
        groups += [bucket for bucket in buckets if bucket]
    return groups


def _make_shard(task, size, folder):
    """Make sure that the shard of one task, a part and names in it, lies whole in `folder`; return its path."""
    path, names = task
    with _open_part(path) as part:
        key = runtime.digest([names, [part.crc(name) for name in names], size, _RULE])
        shard = folder / f"{path.stem}-{size}-{key}.safetensors"
        runtime.cached_arrays(shard, lambda: _decode_all(part, names, size), {"key": key})
    return shard


def _decode_all(part, names, size):
    """Return the images of one shard (k, 3, size, size) and, as JSON, why each is bad or null."""
    images, reasons = np.zeros((len(names), 3, size, size), np.uint8), [None] * len(names)
    for i, name in enumerate(names):
        try:
            images[i] = resize(decode_image(part.read(name), name, part.where), size)
        except BadImageError as error:
            reasons[i] = error.reason
    return {"images": images, "reasons": np.frombuffer(json.dumps(reasons).encode(), np.uint8)}
