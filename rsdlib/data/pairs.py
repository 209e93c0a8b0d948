"""Image-prompt pairs on disk in many layouts, read as one table and held against their parts."""

import concurrent.futures
import csv
import functools
import gzip
import io
import json
import os
import re
from collections import defaultdict
from pathlib import Path

import pandas as pd
import pyarrow
import pyarrow.parquet

from rsdlib import files, runtime
from rsdlib.data.clean import tidy
from rsdlib.data.faults import Faults
from rsdlib.data.images import SUFFIXES
from rsdlib.data.parts import BROKEN, open_part
from rsdlib.data.pictures import find_prompts, list_files, list_pictures
from rsdlib.errors import BadArchiveError, BadImageError, BadTableError, ConfigError, refusing

# --- all layouts ----------------------------------------------------------------------------------

_TABLES = ("metadata.parquet", "metadata-large.parquet")  # of DiffusionDB 2M and Large
_TABLES += ("metadata.csv", "metadata.jsonl", "prompts.csv")
_PROMPT = ("prompt", "text", "caption")
_AT_ONCE = 8  # parts that are opened: they may lie on a slow disk


def load_pairs(source, *, limit=None, on_bad="error"):
    """Read the pairs of a folder, in any of these layouts.

    DiffusionDB: ``metadata.parquet`` and parts ``images/part-000001.zip`` (or folders
    ``images/part-000001/``; parts may also lie directly in `source`), each with a JSON. DiffusionDB
    Large: ``metadata-large.parquet``, its parts below ``diffusiondb-large-part-1/`` and ``-2/``, or
    as above. The table or the JSONs may be absent; where both are there, they must agree. Rows of
    parts that are not on disk are left out, and counted in the log, and so are the columns
    ``user_name`` and ``timestamp``. A part that lies there both as a zip and as a folder is read
    from the zip. Where 2M and Large lie side by side, 2M is read.

    Plain folder: ``metadata.csv``, ``.jsonl`` or ``.parquet`` with a column ``file_name`` (or
    ``image``, ``image_name``, ``imgId``, ``id``) and a column ``prompt`` (or ``text``,
    ``caption``). A file name may lack its suffix, and lie in ``images/``. So ``prompts.csv`` is
    read, Kaggle's, and tables of folders in `source`, Hugging Face's ``train/metadata.csv``.

    WebDataset: tars in and below `source`; an image's prompt is in the ``.txt`` of the same name,
    or in the ``.json``, whose further values become columns.

    Parquet files in and below `source`: a column ``prompt`` (or ``text``, ``caption``), and one or
    more with the images' bytes; a row is as many pairs.

    Pictures alone, in and below `source`: see `rsdlib.data.find_prompts`.

    Parameters
    ----------
    source : path-like
        Several folders are separated as in ``PATH`` (by ``:``, on Windows by ``;``).
    limit : int, optional
        Keep so many pairs of each folder: of the first part the smallest ids, then of the second,
        and so on; the others are not opened, but for a few that are read ahead.
    on_bad : {"error", "skip"}
        What to do with what is damaged, missing or contradicting: stop, or leave it out and list
        it. A part that is left out counts once; above five faults and 1 % of the rows, the data
        itself is refused.

    Returns
    -------
    pandas.DataFrame
        Sorted by id, whatever the order of the table. ``id`` : str, the image's name as the table
        has it; in archives without a table, ``<archive>/<member>``. ``prompt`` : str as found,
        missing ones are missing (`pandas.isna`). ``image`` : str, a locator for `open_image`, the
        path of a file or ``<path of an archive>::<member>``; absolute, so that it names one file
        from any directory: store the id, not the locator. Then every other column of the table, as
        found. ``attrs["bad"]`` lists what was left out: dicts of ``id``, ``part``, ``reason``.

    Raises
    ------
    BadTableError
        There is no table, it is damaged, lacks a column, repeats an id, or contradicts a part's
        JSON; or too much is bad.
    BadArchiveError
        A part is damaged or hostile, or a listed image is not in it.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit = {limit} is out of range", "It must be at least 1.")
    faults, folders = Faults(on_bad), [source]
    if not Path(source).is_dir():
        folders = str(source).split(os.pathsep)
    folders = [files.resolve_path(folder) for folder in folders]
    frame = pd.concat([_read_folder(folder, limit, faults) for folder in folders])
    frame = frame.sort_values("id", ignore_index=True)
    frame = _once(frame, ", ".join(map(files.relative, folders)), faults)
    bad = faults.table(len(frame) + len(faults), "rows and parts")
    if frame.empty:
        raise BadTableError(f"no pair of {source} is left: {', '.join(bad['reason'])}")
    frame.attrs["bad"] = bad.to_dict("records")
    first = ["id", "prompt", "image"]
    return frame[first + [name for name in frame if name not in (*first, "file", *_UNREAD)]]


def _read_folder(source, limit, faults):
    if not source.is_dir():
        raise BadTableError(f"there is no folder {files.relative(source)}", "Fetch the data first.")
    table = next((source / name for name in _TABLES if (source / name).is_file()), None)
    if table and _is_plain(table):
        frame = _read_plain(source, table, faults)
    else:
        table, parts = _find_diffusiondb(source)
        if parts:
            frame = _read_diffusiondb(source, table, parts, limit, faults)
        else:
            frame = _read_others(source, limit, faults)
    return frame.sort_values("id", ignore_index=True).iloc[:limit]


def _read_others(source, limit, faults):
    """Read a folder that has neither a table of its own nor parts of DiffusionDB."""
    names, where, before = list_files(source), files.relative(source), len(faults)
    tables = [name for name in names if os.path.basename(name) in _TABLES]
    tables = {os.path.dirname(name): source / name for name in reversed(tables)}
    if plain := [table for table in tables.values() if _is_plain(table)]:
        return pd.concat([_read_plain(source, table, faults) for table in plain])
    archives = [source / name for name in names if name.endswith((".tar", ".parquet"))]
    frame = _each_part(functools.partial(_read_archive, source), archives, faults, limit)
    if len(frame) or len(faults) > before:
        return frame
    pictures = list_pictures(names)
    known = {*pictures, *(f"{os.path.splitext(name)[0]}.txt" for name in pictures)}
    others = {Path(name).suffix: name for name in reversed(names) if name not in known}
    there = f"{len(set(names) - known):,} other files ({', '.join(others.values()) or 'none'})"
    if not pictures:
        message = f"{where} holds neither a table nor a part with images, but {there}"
        raise BadTableError(message, "See rsdlib.data.load_pairs for the layouts.")
    runtime.log(f"{where}: {len(pictures):,} pictures, beside them {there}")
    frame = find_prompts(source, pictures[:limit])
    if frame["prompt"].isna().all():
        reasons = frame["reason"].value_counts().head(3).items()
        told = ", ".join(f"{count:,} times {reason}" for reason, count in reasons)
        message = f"no picture of {len(frame):,} in {where} has a prompt: {told}; beside {there}"
        raise BadTableError(message, "Write .txt files beside them, or a metadata.csv.")
    return frame


def _each_part(read, paths, faults, limit=None):
    """Return the rows that `read` finds in each part, in order, until there are `limit`."""

    def attempt(path):
        found, rows = Faults(faults.on_bad), ()
        with found.leaving_out(path.name, files.relative(path)):
            rows = read(path, found)
        return rows, found

    frames, count = [], 0
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        for rows, found in runtime.track(pool.map(attempt, paths), "reading parts", len(paths)):
            frames += [rows] if len(rows) else []
            faults += found
            count += len(rows)
            if limit and count >= limit:
                pool.shutdown(cancel_futures=True)
                break
    frames = frames or [pd.DataFrame(columns=["id", "prompt", "image"])]
    return pd.concat(frames, ignore_index=True).iloc[:limit]


# --- a plain folder -------------------------------------------------------------------------------

_NAMES = ("file_name", "image", "image_name", "imgId")
_PLAIN = {"id": ("id", *_NAMES), "file": (*_NAMES, "id"), "prompt": _PROMPT}


def _is_plain(table):
    """Tell whether a table names files, not images in DiffusionDB's parts."""
    with _reading(files.relative(table)):
        return table.suffix != ".parquet" or "file_name" in pyarrow.parquet.read_schema(table).names


def _read_plain(source, table, faults):
    where, below = files.relative(table), table.parent.relative_to(source).as_posix()
    frame = _checked(_read_table(table, faults), where, _PLAIN, faults)
    prefix = "" if below == "." else f"{below}/"
    images = [*_find_images(table.parent, frame["file"])]
    frame = frame.assign(id=prefix + frame["id"], image=images)
    absent = frame["image"].isna()
    for file in frame["file"][absent]:
        faults.add(file, where, "the image is listed but not in the folder, or stands there twice")
    return frame[~absent]


def _find_images(folder, listed):
    """Yield the path of the one file that each name means, None without; case does not matter."""
    names = [
        os.path.normpath(file.replace("\\", "/")).removeprefix(f"{folder}/") for file in listed
    ]
    exact, meant = [os.path.isfile(folder / name) for name in names], defaultdict(set)
    for name in () if all(exact) else list_pictures(list_files(folder)):
        for key in (name, os.path.splitext(name)[0]):
            meant[key.lower().removeprefix("images/")].add(name)
    for name, is_file in zip(names, exact, strict=True):
        found = [name] if is_file else [*meant[name.lower()]]
        climbs = name.startswith(("/", "../"))
        yield None if climbs or len(found) != 1 else f"{folder}/{found[0]}"


# --- DiffusionDB's layout -------------------------------------------------------------------------

_DIFFUSIONDB = dict.fromkeys(("id", "file"), ("image_name",))
_DIFFUSIONDB |= {"prompt": ("prompt",), "part_id": ("part_id",)}
_JSON_NAMES = {"p": "prompt", "se": "seed", "c": "cfg", "st": "step", "sa": "sampler"}
_UNREAD = ("user_name", "timestamp")


def _read_diffusiondb(source, table, parts, limit, faults):
    where, frame, unlisted = f"the JSON files of {files.relative(source)}", None, []
    if table is not None:
        where = files.relative(table)
        frame = _checked(_read_rows(table, parts), where, _DIFFUSIONDB, faults)
        by = ["part_id"] if limit is None else ["part_id", "id"]
        frame = frame.sort_values(by, kind="stable", ignore_index=True)
        parts = {number: parts[number] for number in frame["part_id"].unique()}

    def hold(path, faults):
        number, told = int(path.stem[5:]), None
        if frame is not None:
            first, last = frame["part_id"].searchsorted([number, number + 1])
            told = frame.iloc[first:last]
        return _hold(path, told, where, unlisted, faults)

    held = _each_part(hold, [*parts.values()], faults, limit)
    if any(unlisted):
        runtime.log(f"{sum(unlisted):,} files in the parts are not listed in {where}: left out")
    return held


def _find_diffusiondb(source):
    """Return a table and its parts; of both datasets 2M's, unless there is Large's table alone."""
    small, large = (source / name if (source / name).is_file() else None for name in _TABLES[:2])
    table, parts = small or large, _find_parts(source, "images/", "")
    larges = _find_parts(source, "diffusiondb-large-*/")
    if larges and (not parts or (large and not small)):
        table, parts, larges = large, larges, parts
    if larges:
        where = files.relative(source)
        runtime.log(f"{len(larges):,} parts of the other DiffusionDB in {where} are left out")
    if (small or large) and not (table and parts):
        message = f"{files.relative(small or large)} lists none of the parts beside it"
        fix = f"2M has {_TABLES[0]} and images/part-000001.zip ..., Large has {_TABLES[1]}."
        raise BadTableError(message, fix)
    return table, parts


def _find_parts(source, *folders):
    """Return the parts in some folders of `source` by number, a zip before a folder."""
    parts = {}
    for folder in folders:
        for path in sorted(source.glob(f"{folder}part-*"), key=lambda path: path.suffix != ".zip"):
            number = re.fullmatch(r"part-(\d+)(\.zip)?", path.name)
            if number and (path.suffix == ".zip" or path.is_dir()):
                within = path / path.name  # as some programs unpack
                parts.setdefault(int(number[1]), within if within.is_dir() else path)
    return dict(sorted(parts.items()))


def _read_rows(table, parts):
    """Return the rows of a table that are about certain parts; the others never become Python's."""
    where = files.relative(table)
    with _reading(where), pyarrow.parquet.ParquetFile(table) as file:
        kinds = {field.name: field.type for field in file.schema_arrow}
        rows = file.metadata.num_rows
    if not pyarrow.types.is_integer(kinds.get("part_id", pyarrow.null())):
        message = f"{where} has no column 'part_id' that holds whole numbers throughout"
        raise BadTableError(message, f"Its columns are {[*kinds]}.")
    columns = [name for name in kinds if name not in _UNREAD]
    frame = _read_table(table, Faults(), columns, [("part_id", "in", list(parts))])
    if len(frame) < rows:
        runtime.log(f"{rows - len(frame):,} of {rows:,} rows are left out: no part on disk")
    return frame


def _hold(path, told, where, unlisted, faults):
    """Hold a part against its JSON and what the table tells; return the rows that are right.

    `unlisted` gets the number of files that are in neither.
    """
    own = f"{path.stem}.json"
    with open_part(path) as part:
        names = part.names()
        inside = {name.rpartition("/")[2]: name for name in names}  # packed anew: a folder more
        inside = inside if len(inside) == len(names) else dict(zip(names, names, strict=True))
        listed = _read_json(part, inside[own]) if own in inside else {}
    for name in [name for name, row in listed.items() if not isinstance(row, dict)]:
        faults.add(name, part.where, f"its row in {own} is no object")
        del listed[name]
    if told is None:
        if not listed:
            raise BadTableError(f"{part.where} has no {own} with rows", "Add it, or a table.")
        rows = [{**listed[name], "image_name": name} for name in sorted(listed)]
        told = pd.DataFrame(rows).rename(columns=_JSON_NAMES).assign(part_id=int(path.stem[5:]))
        told = _checked(told, part.where, _DIFFUSIONDB, faults)
    prompts = dict(zip(told["file"].tolist(), told["prompt"].tolist(), strict=True))
    if prompts and prompts.keys().isdisjoint(inside):
        fix = f"2M's parts (PNG) belong to {_TABLES[0]}, Large's (WebP) to {_TABLES[1]}."
        message = f"{part.where} has none of its images in {where}, such as {next(iter(prompts))!r}"
        raise BadArchiveError(message, fix)
    for name in sorted((prompts.keys() | listed.keys()) - inside.keys()):
        faults.add(name, part.where, "the image is listed but not in it", BadArchiveError)
    for name in sorted(prompts.keys() & listed.keys()):
        own_prompt, prompt = listed[name].get("p"), prompts[name]
        if own_prompt != prompt and not (own_prompt is None and pd.isna(prompt)):
            faults.add(name, part.where, f"its prompt is another than in {where}: {prompt!r}")
    unlisted.append(len(inside.keys() - prompts.keys() - {own}))
    if faults:
        told = told[~told["file"].isin([name for name, *_ in faults])]
    start = f"{path}{'::' if path.suffix else '/'}"
    return told.assign(image=[f"{start}{inside[name]}" for name in told["file"]])


def _read_json(part, name):
    """Return the JSON object in a member."""
    with _reading(f"{name} of {part.where}"):
        return _parse_json(part.read(name))


def _parse_json(text):
    value = json.loads(text, object_pairs_hook=_json_object)
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
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


def _read_archive(source, path, faults):
    """Return a row for each image in a tar or a Parquet file."""
    with open_part(path) as part:
        if path.suffix == ".tar":
            frame = _read_samples(part, faults)
        else:
            frame = _read_table(path, faults, part.others)
            rows = frame.index.map("{:06}/".format).astype(str)
            frames = [frame.assign(member=rows + column) for column in part.columns]
            frame = pd.concat([*frames, frame.iloc[:0].assign(member="")]).sort_values("member")
    if frame.empty:
        return frame
    frame["id"] = f"{path.relative_to(source).with_suffix('')}/" + frame["member"]
    frame = _checked(frame, part.where, {"id": ("id",), "prompt": _PROMPT}, faults)
    return frame.assign(image=f"{path}::" + frame.pop("member"))


def _read_samples(part, faults):
    """Return a row for each image in a tar: what the files of the same name tell."""
    samples, rows = defaultdict(dict), []
    for member in sorted(part.names()):
        name, suffix = re.fullmatch(r"((?:.*/)?[^./]*)(.*)", member, re.DOTALL).groups()
        samples[name][suffix.lower()] = member
    for name, members in samples.items():
        image = next((members[suffix] for suffix in members if suffix in SUFFIXES), None)
        with faults.leaving_out(image or name, part.where):
            row = _read_json(part, members[".json"]) if ".json" in members else {}
            row = {key: value for key, value in row.items() if not isinstance(value, dict | list)}
            prompts = [row.pop(key) for key in _PROMPT if key in row]
            if ".txt" in members:
                prompts = [part.read(members[".txt"]).decode("utf-8", "replace")]
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
        frame = _read_table(table, Faults(), columns)
        prompts = _checked(frame, where, {"prompt": _PROMPT}, Faults())["prompt"].dropna()
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
    causes = (BadImageError, csv.Error, *BROKEN)
    return refusing(causes, BadTableError, f"{where} cannot be read: {{}}")


def _read_table(path, faults, columns=None, filters=None):
    """Read a table; in CSV every word stays one, also None, null and NA."""
    where, header = files.relative(path), None
    with _reading(where), path.open("rb") as stream:
        if path.suffix == ".parquet":
            frame = pd.read_parquet(stream, columns=columns, filters=filters)
            return frame.reset_index(drop=frame.index.names == [None])
        lines = io.StringIO(stream.read().decode("utf-8-sig"), newline="")
        parse = _parse_line
        if path.suffix == ".csv":
            lines = csv.reader(lines, strict=True)
            header = [name.strip() for name in next(lines, [])]
            parse = functools.partial(_counted, len(header))
            if len(header) < 2 and not {*header} & {*_PROMPT}:
                raise ValueError("its fields are not separated by commas")
        rows = _parsed(lines, parse, where, faults)
        return pd.DataFrame(rows, columns=header, dtype=str if header else None)


def _parsed(lines, parse, where, faults):
    """Yield what lines hold that are not blank; those that cannot be read are faults."""
    parsed, last = map(parse, lines), getattr(lines, "line_num", 0)
    while True:
        try:
            for row in parsed:
                last = getattr(lines, "line_num", last + 1)
                if row is not None:
                    yield row
            return
        except (ValueError, RecursionError, csv.Error) as error:
            first, last = last + 1, getattr(lines, "line_num", last + 1)
            for number in range(first, last + 1):
                faults.add(f"line {number}", where, f"it cannot be read ({error})")


def _parse_line(line):
    return _parse_json(line) if line.strip() else None


def _counted(count, fields):
    """Return the fields of a line, which are as many as the first line's; None of a blank one."""
    if any(fields) and len(fields) != count:
        raise ValueError(f"it has {len(fields)} fields, the first line has {count}")
    return fields if any(fields) else None


def _checked(frame, where, wanted, faults):
    """Bring a table to our column names; check its types and that no id repeats."""
    if not frame.columns.is_unique:
        raise BadTableError(f"a column of {where} has the name of another")
    told = {column: next(filter(frame.__contains__, wanted[column]), None) for column in wanted}
    for column in [column for column, name in told.items() if name is None]:
        message = f"{where} has no column {' or '.join(map(repr, wanted[column]))}"
        raise BadTableError(message, f"Its columns are {[*map(str, frame)]}.")
    used = {*told.values(), "id", "prompt", "image", "file"}
    columns = pd.DataFrame({column: frame[name] for column, name in told.items()})
    frame = pd.concat([columns, frame.drop(columns=used, errors="ignore")], axis=1)
    for column in frame.columns.intersection(["id", "file", "prompt", *_NUMBERS]):
        kind = "numbers" if column in _NUMBERS else "text"
        name = told.get(column, column)
        message = f"column {name!r} of {where} does not hold {kind} throughout"
        with refusing(BROKEN, BadTableError, f"{message} ({{}})"):
            unfit = _unfit(frame[column], column)
        for row in frame.index[unfit]:
            faults.add(f"row {row + 1}", where, f"column {name!r} does not hold {kind} throughout")
        frame = frame[~unfit] if unfit.any() else frame
        if kind == "numbers":
            frame = frame.assign(**{column: pd.to_numeric(frame[column])})
    return _once(frame, where, faults) if "id" in frame else frame


def _unfit(values, column):
    """Tell which values are not of the type that a column must have."""
    if column in _NUMBERS:
        return pd.to_numeric(values, errors="coerce").isna() & values.notna() & (values != "")
    if isinstance(values.dtype, pd.StringDtype):
        return values.isna() & (column != "prompt")
    texts = values.map(lambda value: isinstance(value, str)).astype(bool)
    return ~texts & (values.notna() | (column != "prompt"))


def _once(frame, where, faults):
    """Return the rows whose id stands there once; the image of several prompts has none."""
    repeated = frame["id"].duplicated(keep=False)
    for id, rows in frame[repeated].groupby("id", sort=False):
        columns = rows.columns.intersection(["prompt", "part_id"])
        differing = [name for name in columns if rows[name].nunique(dropna=False) > 1]
        how = f"different {' and '.join(differing)}" if differing else "the same prompt"
        faults.add(id, where, f"it stands there {len(rows)} times, with {how}")
    return frame[~repeated] if repeated.any() else frame
