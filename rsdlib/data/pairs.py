"""Image-prompt pairs on disk: DiffusionDB's layout or a plain folder, in zips or loose files.

Whatever lies on disk may be broken or hostile. Zips are judged by their directory and read in
memory, member by expected name, never extracted; what is refused is refused by name and with a
reason.
"""

import contextlib
import gzip
import json
import os
import re
import stat
import struct
import zipfile
import zlib
from pathlib import Path

import pandas as pd
import pyarrow

from rsdlib import files, runtime
from rsdlib.data.clean import tidy
from rsdlib.errors import BadArchiveError, BadImageError, BadTableError, ConfigError, refusing

MAX_BYTES = 64 * 2**20  # of one file or zip member
MAX_MEMBERS = 100_000  # of one zip; DiffusionDB's hold 1,001
MAX_RATIO = 200  # unpacked to packed, of a member above 1 MiB

# --- parts: zips and folders of images ------------------------------------------------------------

# Not a plain relative path by the rules of either POSIX or Windows: empty, absolute, drive,
# backslash, NUL, or climbing.
_UNSAFE = re.compile(r"^$|^/|^[A-Za-z]:|\\|\0|//|(^|/)\.{1,2}(/|$)")
BROKEN_DATA = (EOFError, ValueError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile)


@contextlib.contextmanager
def open_part(path):
    """Open a zip or a folder of images."""
    where = files.relative(path)
    if path.suffix == ".zip":
        message = f"{where} cannot be opened as a zip: {{}}"
        with refusing((*BROKEN_DATA, OSError), BadArchiveError, message, "Download it again."):
            archive = zipfile.ZipFile(path)
        with archive:
            yield _Zip(archive, where)
    else:
        yield _Folder(path, where)


class _Zip:
    """One zip, open for reading; every member's entry is judged before any is read."""

    def __init__(self, archive, where):
        self.where, self._archive = where, archive
        self._members = {}
        if len(archive.infolist()) > MAX_MEMBERS:
            raise BadArchiveError(f"{where} has over {MAX_MEMBERS:,} members", "Do not use it.")
        for member in archive.infolist():
            name = member.orig_filename  # `filename` is cut at a NUL, its separators are replaced
            reason = "its name stands twice" if name in self._members else _why_refused(member)
            if reason:
                raise BadArchiveError(f"{where}, member {name!r}: {reason}", "Do not use it.")
            self._members[name] = member

    def names(self):
        """Return the names of the members."""
        return {name for name, member in self._members.items() if not member.is_dir()}

    def crc(self, name):
        """Return the member's CRC-32 as the zip's directory states it, None without a member."""
        return self._members[name].CRC if name in self._members else None

    def read(self, name):
        """Return the member's bytes; the CRC-32 and the stated size must hold."""
        if name not in self._members:
            raise BadImageError(name, self.where, "the zip has no such member")
        member = self._members[name]
        damaged = refusing(BROKEN_DATA, BadImageError, name, self.where, "it is damaged ({})")
        with damaged, self._archive.open(member) as stream:
            content = stream.read(member.file_size + 1)  # inflates no more than it is asked for
        if len(content) != member.file_size:
            raise BadImageError(name, self.where, "the zip member is cut short")
        return content


def _why_refused(member):
    """Return why an entry of a zip's directory is refused, None if it is not."""
    kind = stat.S_IFMT(member.external_attr >> 16)
    method, known = member.compress_type, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    largest = max(2**20, MAX_RATIO * member.compress_size)
    refusals = {
        "its name is not a plain relative path": _UNSAFE.search(member.orig_filename),
        "it is a link or a special file": kind not in (0, stat.S_IFREG, stat.S_IFDIR),
        "its entry points outside the file": member.header_offset < 0,
        "it is encrypted": member.flag_bits & 0x1,
        f"its compression method {method} is neither stored nor deflated": method not in known,
        f"it unpacks to more than {MAX_BYTES:,} bytes": member.file_size > MAX_BYTES,
        f"it unpacks to more than {MAX_RATIO} times its size": member.file_size > largest,
    }
    return next((reason for reason, applies in refusals.items() if applies), None)


class _Folder:
    """One folder of loose files."""

    def __init__(self, path, where):
        self.where, self._path = where, path

    def names(self):
        """Return the names of the files."""
        with os.scandir(self._path) as entries:
            return {entry.name for entry in entries if entry.is_file()}

    def crc(self, name):
        """Return the CRC-32 of the file's bytes, None if it cannot be read."""
        with contextlib.suppress(BadImageError):
            return zlib.crc32(self.read(name))
        return None

    def read(self, name):
        """Return the file's bytes."""
        path = self._path / name
        if not path.is_file():  # a named pipe would block
            raise BadImageError(name, self.where, "there is no such file")
        closed = refusing(PermissionError, BadImageError, name, self.where, "no permission to read")
        with closed, path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise BadImageError(name, self.where, f"it has more than {MAX_BYTES:,} bytes")
        return content


# --- both layouts ---------------------------------------------------------------------------------

_TABLES = ("metadata.parquet", "metadata-large.parquet", "metadata.csv", "metadata.jsonl")


def load_pairs(source, *, limit=None):
    """Read the pairs of a folder in DiffusionDB's layout, or of a plain folder with a table.

    DiffusionDB's layout: ``metadata.parquet`` and parts ``images/part-000001.zip`` (or folders
    ``images/part-000001/``; parts may also lie directly in `source`), each with a JSON. The table
    or the JSONs may be absent; where both are there, they must agree. Rows of parts that are not on
    disk are left out, and counted in the log. A part that lies there both as a zip and as a folder
    is read from the zip.

    Plain folder: ``metadata.csv`` or ``metadata.jsonl`` with a column ``file_name`` (or ``image``,
    ``image_name``, ``id``) and a column ``prompt`` (or ``text``, ``caption``). A file name may lack
    its suffix.

    Parameters
    ----------
    source : path-like
        Several folders are separated as in ``PATH`` (by ``:``, on Windows by ``;``).
    limit : int, optional
        Keep the first so many ids of each folder in sorted order. With ``metadata.parquet``, only
        the parts that hold them are opened.

    Returns
    -------
    pandas.DataFrame
        Sorted by id, whatever the order of the table. ``id`` : str, the image's name as the table
        has it. ``prompt`` : str as found, missing ones are missing (`pandas.isna`). ``image`` :
        str, a locator for `open_image`, the path of a file or ``<path of a zip>::<member>``;
        absolute, so that it names one file from any directory: store the id, not the locator. Then
        every other column of the table, as found.

    Raises
    ------
    BadTableError
        There is no table, it is damaged, lacks a column, repeats an id, or contradicts a part's
        JSON.
    BadArchiveError
        A part is damaged or hostile, or a listed image is not in it.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit = {limit} is out of range", "It must be at least 1.")
    folders = [source] if Path(source).is_dir() else str(source).split(os.pathsep)
    frames = [_read_folder(files.resolve_path(folder), limit) for folder in folders]
    if len(frames) == 1:
        return frames[0]
    frame = pd.concat(frames).sort_values("id", ignore_index=True)
    repeated = frame["id"][frame["id"].duplicated()]
    if len(repeated):
        message = f"id {repeated.iloc[0]!r} stands in more than one folder of {source}"
        raise BadTableError(message, "Rename the image in one of them.")
    return frame


def _read_folder(source, limit):
    if not source.is_dir():
        message = f"there is no folder {files.relative(source)}"
        raise BadTableError(message, "Check the path, or fetch the data first.")
    table = next((source / name for name in _TABLES if (source / name).is_file()), None)
    if table is None or table.suffix == ".parquet":
        frame = _read_diffusiondb(source, table, limit)
    else:
        frame = _read_plain(source, table).sort_values("id", ignore_index=True).iloc[:limit]
    first = ["id", "prompt", "image"]
    return frame[first + [name for name in frame if name not in (*first, "file")]]


# --- a plain folder -------------------------------------------------------------------------------

_NAMES = ("file_name", "image", "image_name")
_PLAIN = {"id": ("id", *_NAMES), "file": (*_NAMES, "id"), "prompt": ("prompt", "text", "caption")}
_SUFFIXES = ("", ".png", ".jpg", ".jpeg", ".webp")


def _read_plain(source, table):
    frame = _checked(_read_table(table), files.relative(table), _PLAIN)
    images = []
    for file in frame["file"]:
        name = os.path.normpath(file).removeprefix(f"{source}/")
        candidates = (f"{source}/{name}{suffix}" for suffix in _SUFFIXES)
        image = next(filter(os.path.isfile, candidates), None)
        if image is None or name.startswith(("/", "../")):
            message = f"image {file!r} is listed in {files.relative(table)} but not in its folder"
            raise BadTableError(message, "Add the file, or drop the row.")
        images.append(image)
    return frame.assign(image=images)


# --- DiffusionDB's layout -------------------------------------------------------------------------

_DIFFUSIONDB = dict.fromkeys(("id", "file"), ("image_name",))
_DIFFUSIONDB |= {"prompt": ("prompt",), "part_id": ("part_id",)}
_JSON_NAMES = {"p": "prompt", "se": "seed", "c": "cfg", "st": "step", "sa": "sampler"}


def _read_diffusiondb(source, table, limit):
    parts = _find_parts(source)
    if table is None:
        where = f"the JSON files of {files.relative(source)}"
        rows = [row for number, path in parts.items() for row in _json_rows(number, path)]
        frame = pd.DataFrame(rows).rename(columns=_JSON_NAMES)
    else:
        where, frame = files.relative(table), _read_table(table)
    frame = _checked(frame, where, _DIFFUSIONDB)
    here = frame["part_id"].isin(list(parts))
    if not here.all():
        runtime.log(f"{(~here).sum():,} of {len(frame):,} rows are left out: no part on disk")
    frame = frame[here].sort_values("id", ignore_index=True)
    chosen = frame.iloc[:limit]
    opened = frame[frame["part_id"].isin(chosen["part_id"].unique())].groupby("part_id")
    groups = runtime.track(opened, "checking parts")
    unlisted = sum(_check_part(parts[number], rows, where) for number, rows in groups)
    if unlisted:
        runtime.log(f"{unlisted:,} files in the parts are not listed in {where}: left out")
    places = zip(chosen["part_id"].map(parts), chosen["file"], strict=True)
    images = [f"{path}{'::' if path.suffix else '/'}{name}" for path, name in places]
    return chosen.assign(image=images)


def _find_parts(source):
    """Return the parts in and below `source` by number, a zip before a folder."""
    parts = {}
    for pattern in ("images/part-*.zip", "images/part-*", "part-*.zip", "part-*"):
        for path in sorted(source.glob(pattern)):
            number = re.fullmatch(r"part-(\d+)(\.zip)?", path.name)
            if number and (path.suffix == ".zip" or path.is_dir()):
                parts.setdefault(int(number[1]), path)
    if not parts:
        message = f"{files.relative(source)} holds neither a table nor a part of DiffusionDB"
        raise BadTableError(message, "See rsdlib.data.load_pairs for the layouts.")
    return parts


def _check_part(path, rows, where):
    """Hold a part against the table's rows and its JSON; count the files that are in neither."""
    with open_part(path) as part:
        names, listed = part.names(), _read_part_json(part, path.stem) or {}
        for name in (*rows["id"], *listed):
            if name not in names:
                message = f"image {name!r} is listed for {part.where} but is not in it"
                raise BadArchiveError(message, "Download this part again.")
        for name, prompt in zip(rows["id"], rows["prompt"], strict=True):
            prompt = None if pd.isna(prompt) else prompt
            if name in listed and listed[name].get("p") != prompt:
                message = f"image {name!r}: {where} has the prompt {prompt!r}, {part.where} another"
                raise BadTableError(message, "One of the two belongs to other data: fetch both.")
        return len(names - set(rows["id"]) - {f"{path.stem}.json"})


def _json_rows(number, path):
    """Return the rows of one part's JSON."""
    with open_part(path) as part:
        listed = _read_part_json(part, path.stem)
    if listed is None:
        raise BadTableError(f"{part.where} has no {path.stem}.json", "Add it, or a table.")
    return [row | {"image_name": name, "part_id": number} for name, row in listed.items()]


def _read_part_json(part, stem):
    if f"{stem}.json" not in part.names():
        return None
    message = f"{stem}.json of {part.where} cannot be read: {{}}"
    with refusing((BadImageError, *_BROKEN), BadTableError, message, _FIX):
        listed = json.loads(part.read(f"{stem}.json"), object_pairs_hook=_json_object)
        if not (isinstance(listed, dict) and all(isinstance(row, dict) for row in listed.values())):
            raise ValueError("it is not an object of objects")
    return listed


def _json_object(pairs):
    """Refuse repeated keys, which `json` would drop; replace lone surrogates."""
    value = {}
    for key, item in pairs:
        if key in value:
            raise ValueError(f"{key!r} stands twice")
        value[key] = item.encode("utf-8", "replace").decode() if isinstance(item, str) else item
    return value


# --- prompts alone --------------------------------------------------------------------------------


def load_prompts(path):
    """Read prompts, without images, to look for the nearest among them.

    Parameters
    ----------
    path : path-like
        A text file with one prompt a line, perhaps gzipped; a table with a column of prompts; or a
        folder with such a table, as DiffusionDB's.

    Returns
    -------
    list of str
        Tidied, each once, in the order of the file.

    Raises
    ------
    BadTableError
        There is no such file, it cannot be read, or holds no prompt.
    """
    path = files.resolve_path(path)
    table = next((path / name for name in _TABLES if (path / name).is_file()), path)
    where = files.relative(table)
    if table.suffix in (".parquet", ".csv", ".jsonl"):
        columns = ["prompt"] if table.name in _TABLES[:2] else None  # of DiffusionDB's thirteen
        prompts = _column(_read_table(table, columns), where, "prompt", _PLAIN["prompt"]).dropna()
    else:
        opener = gzip.open if table.suffix == ".gz" else open
        broken = refusing(_BROKEN, BadTableError, f"{where} cannot be read: {{}}", _FIX)
        with broken, opener(table, "rt", encoding="utf-8-sig") as stream:
            prompts = stream.readlines()
    prompts = list(filter(None, dict.fromkeys(map(tidy, prompts))))
    if not prompts:
        raise BadTableError(f"{where} holds no prompt", "Give a file with one prompt a line.")
    return prompts


# --- tables ---------------------------------------------------------------------------------------

_NUMBERS = ("part_id", "seed", "step", "cfg", "width", "height", "image_nsfw", "prompt_nsfw")
_BROKEN = (OSError, EOFError, ValueError, TypeError, RecursionError, zlib.error)
_BROKEN = (*_BROKEN, pyarrow.ArrowException)
_FIX = "Write or download it again."


def _read_table(path, columns=None):
    where = files.relative(path)
    broken = refusing(_BROKEN, BadTableError, f"{where} cannot be read: {{}}", _FIX)
    with broken, path.open("rb") as stream:
        if path.suffix == ".parquet":
            return pd.read_parquet(stream, columns=columns)
        if path.suffix == ".csv":  # None, null and NA stay words
            return pd.read_csv(stream, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        lines = stream.read().decode("utf-8-sig").split("\n")
        rows = [json.loads(line, object_pairs_hook=_json_object) for line in lines if line.strip()]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("each line must be a JSON object")
        return pd.DataFrame(rows)


def _checked(frame, where, wanted):
    """Bring a table to our column names; check its types and that no id repeats."""
    if not frame.columns.is_unique:
        raise BadTableError(f"a column of {where} has the name of another", _FIX)
    columns = {column: _column(frame, where, column, names) for column, names in wanted.items()}
    used = {values.name for values in columns.values()} | {"id", "prompt", "image"}
    frame = pd.concat([pd.DataFrame(columns), frame.drop(columns=used, errors="ignore")], axis=1)
    for column in frame.columns.intersection(_NUMBERS):
        message = f"column {column!r} of {where} does not hold numbers: {{}}"
        with refusing(_BROKEN, BadTableError, message, _FIX):
            frame[column] = pd.to_numeric(frame[column])
    repeated = frame["id"][frame["id"].duplicated()]
    if len(repeated):
        rows = frame[frame["id"] == repeated.iloc[0]]
        columns = rows.columns.intersection(["prompt", "part_id"])
        differing = [name for name in columns if rows[name].nunique(dropna=False) > 1]
        how = f"different {' and '.join(differing)}" if differing else "the same prompt"
        message = f"id {repeated.iloc[0]!r} stands {len(rows)} times in {where}, with {how}"
        raise BadTableError(message, "An image has one prompt: keep one row.")
    return frame


def _column(frame, where, column, names):
    """Return the first of the columns `names` that is there, checked to hold what `column` must."""
    name = next((name for name in names if name in frame), None)
    if name is None:
        message = f"{where} has no column {' or '.join(map(repr, names))}"
        raise BadTableError(message, f"Its columns are {[*map(str, frame)]}.")
    values = frame[name].dropna() if column == "prompt" else frame[name]
    if column == "part_id":
        kind, fits = "whole numbers", pd.api.types.is_integer_dtype(values)
    else:
        kind, fits = "text", all(isinstance(value, str) for value in values)
    if not fits:
        raise BadTableError(f"column {name!r} of {where} does not hold {kind} throughout", _FIX)
    return frame[name]
