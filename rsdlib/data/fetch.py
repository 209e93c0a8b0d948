"""DiffusionDB from the model hub into our layout: sizes first, part by part, every byte checked.

A file arrives in a hidden folder beside its place and gets its name when its SHA-256 is the one
that the hub tells. ``checksums.json`` remembers what was checked.
"""

import contextlib
import re
import shutil
import time
from pathlib import Path

from rsdlib import files, runtime, weights
from rsdlib.data.parts import open_part
from rsdlib.errors import BadArchiveError, ConfigError, FetchError

_HUB = {"repo_id": "poloclub/diffusiondb", "repo_type": "dataset"}
_HUB["revision"] = "fb620fbe49fa4420e0734bd9c0df11f51176b61f"
_TABLES = {False: "metadata.parquet", True: "metadata-large.parquet"}  # of 2M and of Large
_PARTS = {False: 2_000, True: 14_000}
_RECORD, _WORK = "checksums.json", ".fetch"
_BUSY = (429, 500, 502, 503, 504)
_AT_ONCE = 500  # paths that the hub is asked about in one request


def part_range(text, *, large=False):
    """Return the numbers of the parts that a text such as ``"5"`` or ``"10-14"`` names.

    Parameters
    ----------
    text : str
        How many parts, from the first on; or the first and the last.
    large : bool
        Of DiffusionDB Large.

    Returns
    -------
    range

    Raises
    ------
    ConfigError
        There are no such parts.
    """
    named = re.fullmatch(r"(?:(\d{1,6})-)?(\d{1,6})", text)
    first, last = (int(named[1] or 1), int(named[2])) if named else (0, 0)
    if not 1 <= first <= last <= _PARTS[large]:
        fix = f"Give a number such as 5, or a range such as 10-14; there are {_PARTS[large]:,}."
        raise ConfigError(f"parts = {text!r} names no parts of DiffusionDB", fix)
    return range(first, last + 1)


def fetch_diffusiondb(folder, parts, *, large=False):
    """Bring the table of DiffusionDB and some of its parts of 1,000 images.

    What is there and was checked is neither fetched nor read again, so that an interrupted call
    goes on where it was; a call with nothing left to do does not ask the hub.

    Parameters
    ----------
    folder : path-like
        Gets the table, ``images/part-000001.zip`` and so on, and ``checksums.json``.
    parts : sequence of int
        Numbers from 1 on; none fetches the table alone.
    large : bool
        DiffusionDB Large, whose parts are others than those of 2M.

    Raises
    ------
    FetchError
        The hub, the network or the disk refuses, or other bytes came than the hub tells.
    RunBusyError
        Another process fetches into the folder.
    ConfigError
        The folder holds the other DiffusionDB.
    """
    folder, wanted = files.resolve_path(folder), _wanted(parts, large)
    if any((folder / name).exists() for name in _TABLES.values() if name not in wanted):
        raise ConfigError(f"{files.relative(folder)} holds the other DiffusionDB", "Use another.")
    with weights.naming_faults(FetchError, f"DiffusionDB is not fetched to {folder}"):
        record = _read_record(folder)
        missing = [name for name in wanted if not _is_here(folder / name, record.get(name))]
        with _alone(folder) if missing else contextlib.nullcontext():
            told = record | _ask_hub({name: wanted[name] for name in missing})
            _say_sizes(folder, told, wanted, missing)
            for name in runtime.track(missing, "fetching"):
                _bring(folder / name, wanted[name], told[name])
                record[name] = told[name]
                files.write_json(folder / _RECORD, record)
            for place in (folder, folder / "images"):
                shutil.rmtree(place / _WORK, ignore_errors=True)


def check_diffusiondb(folder):
    """Hash every file that was fetched into a folder, and open every zip in it.

    A file with other bytes than were fetched is renamed to ``….damaged``; the next
    `fetch_diffusiondb` brings it again.

    Parameters
    ----------
    folder : path-like

    Returns
    -------
    checked, unknown : int
        Files whose bytes are right, and zips of which no checksum is known.

    Raises
    ------
    FetchError
        Files are damaged, missing or hostile, or there is none.
    """
    folder = files.resolve_path(folder)
    record = _read_record(folder)
    zips = {path.relative_to(folder).as_posix() for path in folder.glob("images/part-*.zip")}
    if not zips | record.keys():
        raise FetchError(f"nothing of DiffusionDB is in {files.relative(folder)}", "Fetch it.")
    names = runtime.track(sorted(zips | record.keys()), "checking")
    with weights.naming_faults(FetchError, f"{files.relative(folder)} cannot be checked"):
        faults = {name: _fault(folder / name, record.get(name)) for name in names}
    bad = [f"{name} {fault}" for name, fault in faults.items() if fault]
    if bad:
        raise FetchError(f"in {files.relative(folder)}, {', '.join(bad)}", "Fetch them again.")
    return len(record), len(zips - record.keys())


def _wanted(parts, large):
    """Return the files' names in our layout, and on the hub."""
    wanted = {_TABLES[large]: _TABLES[large]}
    for number in parts:
        where = f"diffusiondb-large-part-{1 if number <= 10_000 else 2}" if large else "images"
        wanted[f"images/part-{number:06}.zip"] = f"{where}/part-{number:06}.zip"
    return wanted


@contextlib.contextmanager
def _alone(folder):
    """Hold a folder for this process, and clear away what killed ones left in it."""
    with files.locked(folder / f"{_WORK}.lock", f"another process fetches into {folder}"):
        for place in (folder, folder / "images"):
            for leftover in (place / _WORK).rglob("*.incomplete"):
                leftover.unlink()
        yield


def _read_record(folder):
    """Return what was checked of the pinned revision: names to sizes and checksums."""
    record = files.read_json(folder / _RECORD) if (folder / _RECORD).exists() else {}
    return {name: e for name, e in record.items() if e["revision"] == _HUB["revision"]}


def _is_here(path, entry, *, hashed=False):
    """Tell whether a file is there with the size, and if asked the bytes, that an entry states."""
    if entry is None or not path.is_file() or path.stat().st_size != entry["size"]:
        return False
    return not hashed or weights.sha256(path) == entry["sha256"]


def _ask_hub(wanted):
    """Return size, checksum and revision of files, as the hub tells them."""
    told, names = {}, {path: name for name, path in wanted.items()}
    paths = list(names)
    for start in range(0, len(paths), _AT_ONCE):
        for info in _describe(paths[start : start + _AT_ONCE]):
            entry = {"size": info.size, "revision": _HUB["revision"]}
            if getattr(info, "lfs", None):
                told[names[info.path]] = entry | {"sha256": info.lfs.sha256}
    for path in sorted(names.keys() - {wanted[name] for name in told}):
        where = f"{_HUB['repo_id']} at {_HUB['revision'][:12]}"
        raise FetchError(f"{where} has no {path}, or no checksum of it", "A mirror may lack it.")
    return told


def _describe(paths):
    """Ask the hub about files; where it is busy, again and up to four times."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    for pause in (2, 8, 32, None):
        try:
            return HfApi().get_paths_info(paths=paths, **_HUB)
        except HfHubHTTPError as error:
            if pause is None or error.response.status_code not in _BUSY:
                raise
            pause = weights.seconds_to_wait(error.response) or pause
            runtime.log(f"the hub is busy: asking again in {pause} s")
            time.sleep(pause)


def _say_sizes(folder, told, wanted, missing):
    """Log what is here and what is to come; refuse what the disk cannot hold."""
    total = sum(told[name]["size"] for name in wanted) / 1e9
    coming = sum(told[name]["size"] for name in missing) / 1e9
    place = folder / "images" if (folder / "images").exists() else folder  # may be a link
    free = shutil.disk_usage(place).free / 1e9
    sizes = f"{total:.1f} GB ({total - coming:.1f} GB here already); {free:.1f} GB free"
    runtime.log(f"{len(wanted)} files, {sizes}")
    if coming > free:
        message = f"{coming:.1f} GB are to come, {free:.1f} GB are free in {place}"
        raise FetchError(message, "Free some space, fetch fewer parts, or use another folder.")


def _bring(path, source, entry):
    """Fetch one file, check it, and give it its name."""
    from huggingface_hub import hf_hub_download

    if _is_here(path, entry, hashed=True):
        return
    if path.exists():
        runtime.log(f"{path.name} has other bytes than the hub's: now {path.name}.damaged")
        path.replace(f"{path}.damaged")
    came = Path(hf_hub_download(filename=source, local_dir=path.parent / _WORK, **_HUB))
    if not _is_here(came, entry, hashed=True):
        came.unlink()
        message = f"{source} came with other bytes than the hub tells, and was thrown away"
        raise FetchError(message, "Run it again; if that does not help, HF_ENDPOINT's mirror errs.")
    files.flush(came)
    came.replace(path)


def _fault(path, entry):
    """Return what is wrong with a file, None if nothing is; set damaged ones aside."""
    if not path.is_file():
        return "is missing"
    if entry is not None and not _is_here(path, entry, hashed=True):
        path.replace(f"{path}.damaged")
        return "had other bytes than were fetched"
    try:
        with open_part(path) if path.suffix == ".zip" else contextlib.nullcontext():
            return None
    except BadArchiveError as error:
        return f"is refused ({error})"
