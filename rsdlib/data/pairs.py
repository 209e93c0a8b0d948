"""Image-prompt pairs on disk in many layouts, read as one table and held against their parts."""

import collections
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
from rsdlib.data.parts import BROKEN, is_clutter, open_part
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
    frames = [_read_folder(files.resolve_path(folder), limit, faults) for folder in folders]
    frame = frames[0]
    if len(frames) > 1:
        where = ", ".join(map(files.relative, map(files.resolve_path, folders)))
        frame = _once(pd.concat(frames).sort_values("id", ignore_index=True), where, faults)
    bad = faults.table(len(frame) + len(faults), "rows and parts")
    if frame.empty:
        raise BadTableError(f"no pair of {source} is left: {bad['reason'].iloc[0]}")
    frame.attrs["bad"] = bad.to_dict("records")
    return frame


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
    frame = frame.drop(columns=_UNREAD, errors="ignore").rename(columns={"locator": "image"})
    frame = frame.sort_values("id", ignore_index=True).iloc[:limit]
    first = ["id", "prompt", "image"]
    return frame[first + [name for name in frame if name not in (*first, "file")]]


def _read_others(source, limit, faults):
    """Read a folder that has neither a table of its own nor parts of DiffusionDB."""
    names = list_files(source)
    tables = [name for name in names if name.endswith(tuple(f"/{table}" for table in _TABLES))]
    tables = {os.path.dirname(name): source / name for name in reversed(tables)}
    if tables:
        return pd.concat([_read_plain(source, path, faults) for path in tables.values()])
    archives = [source / name for name in names if name.endswith((".tar", ".parquet"))]
    archives = [path for path in archives if path.name not in _TABLES]
    frame = _read_archives(source, archives, limit, faults)
    if not frame.empty or faults:
        return frame
    pictures = list_pictures(names)
    stems = {os.path.splitext(name)[0] for name in pictures}
    others = [n for n in names if n not in set(pictures) and not _is_sidecar(n, stems)]
    where, there = files.relative(source), f"There are also {_inventory(others)}."
    if not pictures:
        message = f"{where} holds neither a table nor a part with images"
        raise BadTableError(message, f"{there} See rsdlib.data.load_pairs for the layouts.")
    if others:
        runtime.log(f"{where}: left out as no pictures are {_inventory(others)}")
    frame = find_prompts(source, pictures[:limit])
    if frame["prompt"].isna().all():
        reasons = collections.Counter(frame["reason"]).most_common(3)
        told = "; ".join(f"{count:,} times {reason}" for reason, count in reasons)
        fix = f"{there} Write a .txt beside each, or a metadata.csv with file_name and prompt."
        raise BadTableError(f"no picture of {len(frame):,} in {where} has a prompt: {told}", fix)
    return frame


def _is_sidecar(name, stems):
    return name.endswith(".txt") and name.removesuffix(".txt") in stems


def _inventory(names):
    """Say which files there are: how many of each kind, and the first."""
    kinds = defaultdict(list)
    for name in names:
        kinds[Path(name).suffix.lower() or "without suffix"].append(name)
    told = [f"{len(some):,} {kind} ({some[0]})" for kind, some in kinds.items()]
    return ", ".join(told[:9]) or "no other files"


def _each_part(read, paths, faults, limit=None):
    """Return the rows that `read` finds in each part, in order, until there are `limit`."""

    def attempt(path):
        found, rows = Faults(faults.on_bad), pd.DataFrame()
        with found.leaving_out(path):
            rows = read(path, found)
        return rows, found

    frames, count = [pd.DataFrame()], 0
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        for rows, found in runtime.track(pool.map(attempt, paths), "reading parts", len(paths)):
            frames.append(rows)
            faults += found
            count += len(rows)
            if limit and count >= limit:
                pool.shutdown(cancel_futures=True)
                break
    return pd.concat(frames, ignore_index=True).iloc[:limit]


# --- a plain folder -------------------------------------------------------------------------------

_NAMES = ("file_name", "image", "image_name", "imgId")
_PLAIN = {"id": ("id", *_NAMES), "file": (*_NAMES, "id"), "prompt": _PROMPT}


def _is_plain(table):
    """Tell whether a table names files, not images in DiffusionDB's parts."""
    if table.suffix != ".parquet":
        return True
    with _reading(files.relative(table)):
        columns = pyarrow.parquet.read_schema(table).names
    return "file_name" in columns and "part_id" not in columns


def _read_plain(source, table, faults):
    where, folder = files.relative(table), table.parent
    frame = _checked(_read_table(table, faults), where, _PLAIN, faults)
    same_name = functools.cache(_same_name)
    frame["locator"] = [_find_image(folder, file, same_name) for file in frame["file"]]
    absent = frame["locator"].isna()
    for id, file in frame.loc[absent, ["id", "file"]].itertuples(index=False):
        message = f"image {file!r} is listed in {where} but not in its folder"
        faults.add(id, where, BadTableError(message, "Add the file, or drop the row."))
    below = table.parent.relative_to(source).as_posix()
    prefix = "" if below == "." else f"{below}/"
    return frame[~absent].assign(id=prefix + frame["id"])


def _find_image(folder, file, same_name):
    """Return the path of the one file that a table means, None without."""
    name = os.path.normpath(file.replace("\\", "/")).removeprefix(f"{folder}/")
    if name.startswith(("/", "../")):
        return None
    for path in (f"{folder}/{name}", f"{folder}/images/{name}"):
        if os.path.isfile(path):
            return path
        place, name_there = os.path.split(path)
        found = same_name(place).get(name_there.lower(), ())
        if len(found) == 1:
            return found[0]
    return None


def _same_name(place):
    """Return a folder's images by their names in lower case, with and without suffix."""
    found = defaultdict(list)
    for name in os.listdir(place) if os.path.isdir(place) else ():
        stem, suffix = os.path.splitext(name.lower())
        if suffix in SUFFIXES and not is_clutter(name):
            for key in (stem, stem + suffix):
                found[key].append(f"{place}/{name}")
    return found


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
    if table is None and not (held.empty and faults):
        held = _checked(held.rename(columns=_JSON_NAMES), where, _DIFFUSIONDB, faults)
    return held if len(held) else pd.DataFrame(columns=["id", "prompt", "image"])


def _find_diffusiondb(source):
    """Return a table and its parts; where both datasets lie here, those of one, mostly 2M."""
    small, large = (source / name if (source / name).is_file() else None for name in _TABLES[:2])
    own, larges = _find_parts(source, "images/", ""), _find_parts(source, "diffusiondb-large-*/")
    table, parts, left = small or large, own, larges
    if larges and (not own or (large and not small)):
        table, parts, left = large, larges, own
    elif small and large and own and _is_large(next(iter(own.values()))):
        table = large
    if left:
        where = files.relative(next(iter(left.values())).parent)
        runtime.log(f"{len(left):,} parts in {where} are of the other DiffusionDB: left out")
    if small and not table:
        message = f"{files.relative(small)} is of DiffusionDB 2M, the parts beside it are Large's"
        raise BadTableError(message, f"Put {_TABLES[1]} there, or take the table away.")
    if table and not parts:
        message = f"no part that {files.relative(table)} lists is there: images/part-000001.zip ..."
        raise BadTableError(message, "Fetch the parts: rsd data fetch.")
    return table, parts


def _is_large(path):
    with open_part(path) as part:
        return any(name.endswith(".webp") for name in part.names())


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
        empty, rows = file.schema_arrow.empty_table().to_pandas(), file.metadata.num_rows
    if not pd.api.types.is_integer_dtype(empty[_column(empty, where, ["part_id"])]):
        raise BadTableError(f"column 'part_id' of {where} does not hold whole numbers throughout")
    columns = [name for name in empty if name not in _UNREAD]
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
        inside = _by_last_name(part.names())
        if told is None and own not in inside:
            raise BadTableError(f"{part.where} has no {own}", "Add it, or a table.")
        listed = _read_json(part, inside[own]) if own in inside else {}
    bad = [name for name, row in listed.items() if not isinstance(row, dict)]
    for name in bad:
        message = f"{own} of {part.where} cannot be read: row {name!r} is no object"
        faults.add(name, part.where, BadTableError(message))
        del listed[name]
    column = "image_name" if told is None else "file"
    if told is None:
        rows = [listed[name] | {"image_name": name} for name in sorted(listed)]
        told = pd.DataFrame(rows, columns=None if rows else [column])
        told = told.assign(part_id=int(path.stem[5:]))
        prompts = {name: row.get("p") for name, row in listed.items()}
    else:
        prompts = dict(zip(told["file"].tolist(), told["prompt"].tolist(), strict=True))
    if prompts and prompts.keys().isdisjoint(inside):
        message = f"{part.where} has no image that is listed for it, such as {next(iter(prompts))}"
        fix = f"2M's parts (PNG) belong to {_TABLES[0]}, Large's (WebP) to {_TABLES[1]}."
        raise BadArchiveError(message, fix)
    for name in sorted((prompts.keys() | listed.keys()) - inside.keys()):
        message = f"image {name!r} is listed for {part.where} but is not in it"
        faults.add(name, part.where, BadArchiveError(message))
    for name in sorted(prompts.keys() & listed.keys()):
        prompt = None if pd.isna(prompts[name]) else prompts[name]
        if listed[name].get("p") != prompt:
            message = f"image {name!r}: {where} has the prompt {prompt!r}, {part.where} another"
            fix = "One of the two belongs to other data: fetch both."
            faults.add(name, part.where, BadTableError(message, fix))
    unlisted.append(len(inside.keys() - prompts.keys() - {own}))
    start = f"{path}{'::' if path.suffix else '/'}"
    told = told[~told[column].isin([name for name, *_ in faults])]
    return told.assign(locator=start + told[column].map(inside).astype(str))


def _by_last_name(names):
    """Return the true names by the last: parts that were packed anew have one folder more."""
    inside = {name.rpartition("/")[2]: name for name in names}
    return inside if len(inside) == len(names) else dict(zip(names, names, strict=True))


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


def _read_archives(source, paths, limit, faults):
    frame = _each_part(
        lambda path, faults: _read_archive(path, source, faults), paths, faults, limit
    )
    if frame.empty:
        return pd.DataFrame(columns=["id", "prompt", "image"])
    where = files.relative(source)
    return _checked(frame, where, {"id": ("id",), "prompt": _PROMPT}, faults)


def _read_archive(path, source, faults):
    """Return a row for each image in a tar or a Parquet file."""
    with open_part(path) as part:
        if path.suffix == ".tar":
            frame = _read_samples(part, faults)
        else:
            frame = _read_table(path, faults, part.others).reset_index(drop=True)
            rows = frame.index.map("{:06}/".format).astype(str)
            frames = [frame.assign(member=rows + column) for column in part.columns]
            frame = pd.concat([*frames, frame.iloc[:0].assign(member="")]).sort_values("member")
    frame["id"] = f"{path.relative_to(source).with_suffix('')}/" + frame["member"]
    return frame.assign(locator=f"{path}::" + frame.pop("member"))


def _read_samples(part, faults):
    """Return a row for each image in a tar: what the files of the same name tell."""
    samples, rows = defaultdict(dict), []
    for member in sorted(part.names()):
        name, suffix = re.fullmatch(r"((?:.*/)?[^./]*)(.*)", member, re.DOTALL).groups()
        samples[name][suffix.lower()] = member
    for name, members in samples.items():
        image = next((members[suffix] for suffix in members if suffix in SUFFIXES), None)
        try:
            rows.append(_read_sample(part, members) | {"member": image})
        except (BadTableError, BadImageError) as error:
            faults.add(image or name, part.where, error)
    return pd.DataFrame(rows, columns=None if rows else ["member"]).dropna(subset="member")


def _read_sample(part, members):
    row = _read_json(part, members[".json"]) if ".json" in members else {}
    row = {name: value for name, value in row.items() if not isinstance(value, dict | list)}
    prompts = [row.pop(name) for name in _PROMPT if name in row]
    if ".txt" in members:
        prompts = [part.read(members[".txt"]).decode("utf-8", "replace")]
    return row | {"prompt": prompts[0] if prompts else None}


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
        prompts = frame[_column(frame, where, _PROMPT)].dropna()
        if _unfit(prompts, "prompt").any():
            raise BadTableError(f"column {prompts.name!r} of {where} does not hold text throughout")
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
    where = files.relative(path)
    with _reading(where), path.open("rb") as stream:
        if path.suffix == ".parquet":
            return pd.read_parquet(stream, columns=columns, filters=filters)
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        if path.suffix == ".csv":
            return _read_csv(text, where, faults)
        rows = []
        for number, line in enumerate(text.read().split("\n"), 1):
            try:
                row = json.loads(line, object_pairs_hook=_json_object) if line.strip() else None
                if not isinstance(row, dict | None):
                    raise ValueError("it is no JSON object")
                rows += [row] if row is not None else []
            except (ValueError, RecursionError) as error:
                _refuse_line(where, number, error, faults)
        return pd.DataFrame(rows)


def _read_csv(text, where, faults):
    """Read a table whose lines have as many fields as the first; None, null and NA stay words."""
    reader = csv.reader(text, strict=True)
    header = [name.strip() for name in next(reader, [])]
    if not header:
        raise ValueError("it is empty")
    if len(header) < 2 and re.search("[;\t|]", "".join(header)):
        raise ValueError("its fields are not separated by commas, write it with commas")
    rows, fields = [], header
    while fields is not None:
        first, reason = reader.line_num + 1, ""
        try:
            fields = next(reader, None)
        except csv.Error as error:
            fields, reason = [], error
        if fields and len(fields) != len(header) and any(fields):
            reason = f"it has {len(fields)} fields, the first line has {len(header)}"
        elif any(fields or ()):
            rows.append(fields)
        for number in range(first, reader.line_num + 1 if reason else first):
            _refuse_line(where, number, reason, faults)
    return pd.DataFrame(rows, columns=header, dtype=str)


def _refuse_line(where, number, reason, faults):
    fix = "Put a field that holds commas or quotes into quotes, or drop the line."
    error = BadTableError(f"line {number:,} of {where} cannot be read: {reason}", fix)
    faults.add(f"line {number}", where, error)


def _checked(frame, where, wanted, faults):
    """Bring a table to our column names; check its types and that no id repeats."""
    if not frame.columns.is_unique:
        raise BadTableError(f"a column of {where} has the name of another")
    told = {column: _column(frame, where, names) for column, names in wanted.items()}
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
            faults.add(f"row {row + 1}", where, BadTableError(f"{message}: not in row {row + 1}"))
        frame = frame[~unfit] if unfit.any() else frame
        if kind == "numbers":
            frame = frame.assign(**{column: pd.to_numeric(frame[column])})
    return _once(frame, where, faults)


def _unfit(values, column):
    """Tell which values are not of the type that a column must have."""
    if column in _NUMBERS:
        numbers = pd.to_numeric(values, errors="coerce")
        return numbers.isna() & values.notna() & (values != "")
    missing = values.isna()
    texts = ~missing
    if not isinstance(values.dtype, pd.StringDtype):
        texts = values.map(lambda value: isinstance(value, str)).astype(bool)
    return ~(texts | missing) if column == "prompt" else ~texts


def _once(frame, where, faults):
    """Return the rows whose id stands there once; the image of several prompts has none."""
    repeated = frame["id"].duplicated(keep=False)
    for id, rows in frame[repeated].groupby("id", sort=False):
        columns = rows.columns.intersection(["prompt", "part_id"])
        differing = [name for name in columns if rows[name].nunique(dropna=False) > 1]
        how = f"different {' and '.join(differing)}" if differing else "the same prompt"
        message = f"id {id!r} stands {len(rows)} times in {where}, with {how}"
        fix = "An image has one prompt: keep one row."
        faults.add(id, where, BadTableError(message, fix))
    return frame[~repeated] if repeated.any() else frame


def _column(frame, where, names):
    """Return the first of the columns `names` that is there."""
    name = next((name for name in names if name in frame), None)
    if name is None:
        message = f"{where} has no column {' or '.join(map(repr, names))}"
        raise BadTableError(message, f"Its columns are {[*map(str, frame)]}.")
    return name
