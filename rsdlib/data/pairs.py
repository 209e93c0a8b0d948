"""Image-prompt pairs on disk in five layouts, read as one table and held against their parts."""

import concurrent.futures
import gzip
import itertools
import json
import os
import re
from collections import defaultdict, deque
from pathlib import Path

import pandas as pd
import pyarrow
import pyarrow.parquet

from rsdlib import files, runtime
from rsdlib.data.clean import tidy
from rsdlib.data.parts import BROKEN, open_part
from rsdlib.errors import BadArchiveError, BadImageError, BadTableError, ConfigError, refusing

# --- all layouts ----------------------------------------------------------------------------------

_TABLES = ("metadata.parquet", "metadata-large.parquet", "metadata.csv", "metadata.jsonl")
_PROMPT = ("prompt", "text", "caption")
_AT_ONCE = 8  # parts that are opened: they may lie on a slow disk


def load_pairs(source, *, limit=None):
    """Read the pairs of a folder, in any of five layouts.

    DiffusionDB: ``metadata.parquet`` and parts ``images/part-000001.zip`` (or folders
    ``images/part-000001/``; parts may also lie directly in `source`), each with a JSON. DiffusionDB
    Large: ``metadata-large.parquet``, its parts below ``diffusiondb-large-part-1/`` and ``-2/``, or
    as above. The table or the JSONs may be absent; where both are there, they must agree. Rows of
    parts that are not on disk are left out, and counted in the log, and so are the columns
    ``user_name`` and ``timestamp``. A part that lies there both as a zip and as a folder is read
    from the zip.

    Plain folder: ``metadata.csv`` or ``metadata.jsonl`` with a column ``file_name`` (or ``image``,
    ``image_name``, ``id``) and a column ``prompt`` (or ``text``, ``caption``). A file name may lack
    its suffix.

    WebDataset: tars in `source` or the folders in it; an image's prompt is in the ``.txt`` of the
    same name, or in the ``.json``, whose further values become columns.

    Parquet files in `source` or the folders in it: a column ``prompt`` (or ``text``, ``caption``),
    and one or more with the images' bytes; a row is as many pairs. Other tables have no name that
    ends in ``.parquet``.

    Parameters
    ----------
    source : path-like
        Several folders are separated as in ``PATH`` (by ``:``, on Windows by ``;``).
    limit : int, optional
        Keep so many pairs of each folder: of the first part the smallest ids, then of the second,
        and so on; the others are not opened.

    Returns
    -------
    pandas.DataFrame
        Sorted by id, whatever the order of the table. ``id`` : str, the image's name as the table
        has it; in archives without a table, ``<archive>/<member>``. ``prompt`` : str as found,
        missing ones are missing (`pandas.isna`). ``image`` : str, a locator for `open_image`, the
        path of a file or ``<path of an archive>::<member>``; absolute, so that it names one file
        from any directory: store the id, not the locator. Then every other column of the table, as
        found.

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
        raise BadTableError(f"there is no folder {files.relative(source)}", "Fetch the data first.")
    table = next((source / name for name in _TABLES if (source / name).is_file()), None)
    if table and table.suffix != ".parquet":
        frame = _read_plain(source, table)
    elif parts := _find_parts(source, large=table is None or table.name == _TABLES[1]):
        frame = _read_diffusiondb(source, table, parts, limit)
    else:
        frame = _read_archives(source, limit)
    frame = frame.sort_values("id", ignore_index=True).iloc[:limit]
    first = ["id", "prompt", "image"]
    return frame[first + [name for name in frame if name not in (*first, "file")]]


def _each_part(read, parts, limit=None):
    """Yield the rows that `read` finds in each part, in order, until there are `limit`."""
    count = 0
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        for rows in runtime.track(pool.map(read, parts), "reading parts", len(parts)):
            yield rows
            count += len(rows)
            if limit and count >= limit:
                pool.shutdown(cancel_futures=True)
                break


# --- a plain folder -------------------------------------------------------------------------------

_NAMES = ("file_name", "image", "image_name")
_PLAIN = {"id": ("id", *_NAMES), "file": (*_NAMES, "id"), "prompt": _PROMPT}
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
_UNREAD = ("user_name", "timestamp")


def _read_diffusiondb(source, table, parts, limit):
    unlisted = []
    if table is None:
        where = f"the JSON files of {files.relative(source)}"
        rows = _each_part(lambda part: _hold(*part, where, unlisted), parts.items(), limit)
        frame = pd.DataFrame(itertools.chain.from_iterable(rows)).rename(columns=_JSON_NAMES)
    else:
        where, frame = files.relative(table), _read_rows(table, parts)
    by = ["part_id"] if limit is None else ["part_id", "id"]
    frame = _checked(frame, where, _DIFFUSIONDB).sort_values(by, kind="stable", ignore_index=True)
    chosen = frame.iloc[:limit]

    def hold(part):
        first, last = frame["part_id"].searchsorted([part, part + 1])
        told = (frame[column].iloc[first:last].tolist() for column in ("id", "prompt"))
        return _hold(part, parts[part], where, unlisted, dict(zip(*told, strict=True)))

    if table is not None:
        deque(_each_part(hold, chosen["part_id"].unique().tolist()), maxlen=0)
    if any(unlisted):
        runtime.log(f"{sum(unlisted):,} files in the parts are not listed in {where}: left out")
    prefixes = {number: f"{path}{'::' if path.suffix else '/'}" for number, path in parts.items()}
    return chosen.assign(image=chosen["part_id"].map(prefixes) + chosen["file"])


def _find_parts(source, large):
    """Return the parts in and below `source` by number, a zip before a folder."""
    parts = {}
    for folder in (*(["diffusiondb-large-part-*/"] if large else []), "images/", ""):
        for path in sorted(source.glob(f"{folder}part-*"), key=lambda path: path.suffix != ".zip"):
            number = re.fullmatch(r"part-(\d+)(\.zip)?", path.name)
            if number and (path.suffix == ".zip" or path.is_dir()):
                parts.setdefault(int(number[1]), path)
    return dict(sorted(parts.items()))


def _read_rows(table, parts):
    """Return the rows of a table that are about certain parts; the others never become Python's."""
    where = files.relative(table)
    with _reading(where), pyarrow.parquet.ParquetFile(table) as file:
        empty, rows = file.schema_arrow.empty_table().to_pandas(), file.metadata.num_rows
    _column(empty, where, "part_id", _DIFFUSIONDB["part_id"])
    columns = [name for name in empty if name not in _UNREAD]
    frame = _read_table(table, columns, [("part_id", "in", list(parts))])
    if len(frame) < rows:
        runtime.log(f"{rows - len(frame):,} of {rows:,} rows are left out: no part on disk")
    return frame


def _hold(number, path, where, unlisted, prompts=None):
    """Hold a part against its JSON and what the table tells; return the rows of a JSON alone.

    `unlisted` gets the number of files that are in neither.
    """
    own, rows = f"{path.stem}.json", []
    with open_part(path) as part:
        names = part.names()
        if prompts is None and own not in names:
            raise BadTableError(f"{part.where} has no {own}", "Add it, or a table.")
        listed = _read_json(part, own) if own in names else {}
    if not all(isinstance(row, dict) for row in listed.values()):
        raise BadTableError(f"{own} of {part.where} cannot be read: a row is no object")
    if prompts is None:
        prompts = {name: row.get("p") for name, row in listed.items()}
        rows = [row | {"image_name": name, "part_id": number} for name, row in listed.items()]
    for name in sorted((prompts.keys() | listed) - names):
        raise BadArchiveError(f"image {name!r} is listed for {part.where} but is not in it")
    for name in prompts.keys() & listed:
        prompt = None if pd.isna(prompts[name]) else prompts[name]
        if listed[name].get("p") != prompt:
            message = f"image {name!r}: {where} has the prompt {prompt!r}, {part.where} another"
            raise BadTableError(message, "One of the two belongs to other data: fetch both.")
    unlisted.append(len(names - prompts.keys() - {own}))
    return rows


def _read_json(part, name):
    """Return the JSON object in a member."""
    with _reading(f"{name} of {part.where}"):
        value = json.loads(part.read(name), object_pairs_hook=_json_object)
        if not isinstance(value, dict):
            raise ValueError("it is no object")
    return value


def _json_object(pairs):
    """Refuse repeated keys, which `json` would drop; replace lone surrogates."""
    value = {}
    for key, item in pairs:
        if key in value:
            raise ValueError(f"{key!r} stands twice")
        plain = not isinstance(item, str) or item.isascii()
        value[key] = item if plain else item.encode("utf-8", "replace").decode()
    return value


# --- archives without a table: WebDataset's tars, Parquet files with images -----------------------


def _read_archives(source, limit):
    paths = sorted(path for place in ("*", "*/*") for path in source.glob(f"{place}.*"))
    paths = [p for p in paths if p.suffix in (".tar", ".parquet") and p.name not in _TABLES]
    frames = list(_each_part(lambda path: _read_archive(path, source), paths, limit))
    if not any(map(len, frames)):
        message = f"{files.relative(source)} holds neither a table nor a part with images"
        raise BadTableError(message, "See rsdlib.data.load_pairs for the layouts.")
    frame = pd.concat(frames, ignore_index=True).iloc[:limit]
    frame = _checked(frame, files.relative(source), {"id": ("id",), "prompt": _PROMPT})
    return frame.rename(columns={"locator": "image"})


def _read_archive(path, source):
    """Return a row for each image in a tar or a Parquet file."""
    with open_part(path) as part:
        if path.suffix == ".tar":
            frame = _read_samples(part)
        else:
            frame = _read_table(path, part.others).reset_index(drop=True)
            rows = frame.index.map("{:06}/".format).astype(str)
            frames = [frame.assign(member=rows + column) for column in part.columns]
            frame = pd.concat([*frames, frame.iloc[:0].assign(member="")]).sort_values("member")
    frame["id"] = f"{path.relative_to(source).with_suffix('')}/" + frame["member"]
    return frame.assign(locator=f"{path}::" + frame.pop("member"))


def _read_samples(part):
    """Return a row for each image in a tar: what the files of the same name tell."""
    samples, rows = defaultdict(dict), []
    for member in sorted(part.names()):
        name, suffix = re.fullmatch(r"((?:.*/)?[^./]*)(.*)", member, re.DOTALL).groups()
        samples[name][suffix.lower()] = member
    for members in samples.values():
        row = _read_json(part, members[".json"]) if ".json" in members else {}
        row = {name: value for name, value in row.items() if not isinstance(value, dict | list)}
        prompts = [row.pop(name) for name in _PROMPT if name in row]
        if ".txt" in members:
            prompts = [part.read(members[".txt"]).decode("utf-8", "replace")]
        image = next((members[suffix] for suffix in _SUFFIXES if suffix in members), None)
        rows.append(row | {"prompt": prompts[0] if prompts else None, "member": image})
    return pd.DataFrame(rows, columns=None if rows else ["member"]).dropna(subset="member")


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
        prompts = _column(_read_table(table, columns), where, "prompt", _PROMPT).dropna()
    else:
        opener = gzip.open if table.suffix == ".gz" else open
        with _reading(where), opener(table, "rt", encoding="utf-8-sig") as stream:
            prompts = stream.readlines()
    prompts = list(filter(None, dict.fromkeys(map(tidy, prompts))))
    if not prompts:
        raise BadTableError(f"{where} holds no prompt", "Give a file with one prompt a line.")
    return prompts


# --- tables ---------------------------------------------------------------------------------------

_NUMBERS = ("part_id", "seed", "step", "cfg", "width", "height", "image_nsfw", "prompt_nsfw")


def _reading(where):
    """Refuse a table that cannot be read."""
    return refusing((BadImageError, *BROKEN), BadTableError, f"{where} cannot be read: {{}}")


def _read_table(path, columns=None, filters=None):
    with _reading(files.relative(path)), path.open("rb") as stream:
        if path.suffix == ".parquet":
            return pd.read_parquet(stream, columns=columns, filters=filters)
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
        raise BadTableError(f"a column of {where} has the name of another")
    columns = {column: _column(frame, where, column, names) for column, names in wanted.items()}
    used = {values.name for values in columns.values()} | {"id", "prompt", "image"}
    frame = pd.concat([pd.DataFrame(columns), frame.drop(columns=used, errors="ignore")], axis=1)
    for column in frame.columns.intersection(_NUMBERS):
        with refusing(BROKEN, BadTableError, f"column {column!r} of {where} is no numbers: {{}}"):
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
        text = isinstance(values.dtype, pd.StringDtype) and not values.hasnans
        kind, fits = "text", text or all(isinstance(value, str) for value in values)
    if not fits:
        raise BadTableError(f"column {name!r} of {where} does not hold {kind} throughout")
    return frame[name]
