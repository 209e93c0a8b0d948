"""Folders of pictures without a table: prompts from the files beside them, or out of them."""

import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

from rsdlib import files, runtime
from rsdlib.data.clean import tidy
from rsdlib.data.images import SUFFIXES
from rsdlib.data.parts import is_clutter, open_part
from rsdlib.data.prompts_in_images import plain, read_prompt
from rsdlib.errors import BadImageError, ConfigError

SIDECAR = "file beside it"  # the writer of prompts that lie in a .txt
_COLUMNS = ["id", "prompt", "image", "raw_prompt", "negative_prompt", "writer", "reason"]
_AT_ONCE = 16  # pictures: most of the time goes to waiting for a disk


def list_files(folder):
    """Return the files in and below a folder, relative to it and in order, without clutter."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    names = sorted(path.relative_to(folder).as_posix() for path in paths)
    return [name for name in names if not is_clutter(name)]


def list_pictures(names):
    """Return the names among some that are images' by their suffix."""
    return [name for name in names if Path(name).suffix.lower() in SUFFIXES]


def find_images(path):
    """Return the image files that a path means: itself, or what lies in and below a folder.

    Files of other kinds are named in one line; hidden ones are left out.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    list of Path

    Raises
    ------
    ConfigError
        There is no such file, or no image in the folder.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    names = list_files(path)
    pictures = list_pictures(names)
    others = Counter(Path(name).suffix.lower() for name in set(names).difference(pictures))
    kinds = ", ".join(f"{n} {suffix or 'without suffix'}" for suffix, n in sorted(others.items()))
    if not pictures:
        raise ConfigError(f"there is no file {path}, nor an image below it{kinds and f': {kinds}'}")
    if kinds:
        runtime.log(f"{path}: left out what is no image that can be read here: {kinds}")
    return [path / name for name in pictures]


def find_prompts(folder, names=None):
    """Read the prompts of pictures: each one's ``.txt`` of the same name, else what is in it.

    Parameters
    ----------
    folder : path-like
    names : sequence of str, optional
        The pictures, relative to the folder; default: all in and below it.

    Returns
    -------
    pandas.DataFrame
        ``id``, the relative path; ``prompt``, see `plain`; ``image``, the path; ``raw_prompt`` as
        it was written; ``negative_prompt``; ``writer``, the program or the file beside the picture;
        ``reason``, why there is no prompt, which is then missing, "" if there is one.

    Raises
    ------
    ConfigError
        There is no such folder, or no image in it.
    """
    folder = files.resolve_path(folder)
    if names is None:
        names = [path.relative_to(folder).as_posix() for path in find_images(folder)]

    def read(name):
        raw, negative, writer, reason = _told(folder / name)
        prompt = None if raw is None else plain(raw)
        return name, prompt, f"{folder}/{name}", raw, negative, writer, reason

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        rows = [*runtime.track(pool.map(read, names), "reading prompts of pictures", len(names))]
    return pd.DataFrame(rows, columns=_COLUMNS)


def _told(path):
    """Return a picture's prompt or None, negative prompt, writer, and why there is no prompt."""
    beside = path.with_suffix(".txt")
    if not beside.is_file():
        found = read_prompt(path)
        return found.prompt, found.negative, found.writer, found.reason
    try:
        with open_part(beside.parent) as part:
            data = part.read(beside.name)
        wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except (BadImageError, UnicodeDecodeError) as error:
        return None, "", SIDECAR, f"its .txt cannot be read ({error.reason})"
    text = tidy(re.split(r"\n(?:Negative prompt:|Steps: \d)", text)[0])  # AUTOMATIC1111's
    return text or None, "", SIDECAR, "" if text else "its .txt is empty"


def write_sidecars(prompts):
    """Write prompts that came out of pictures into ``.txt`` files beside them; none is replaced.

    Parameters
    ----------
    prompts : pandas.DataFrame
        From `find_prompts`. Pictures that would share a file get none.
    """
    paths = prompts["image"].map(lambda path: Path(path).with_suffix(".txt"))
    ours = prompts["raw_prompt"].notna() & (prompts["writer"] != SIDECAR)
    free = ours & ~paths.duplicated(keep=False) & ~paths.map(Path.exists)
    for path, prompt in zip(paths[free], prompts["raw_prompt"][free], strict=True):
        files.write_text(path, f"{prompt}\n")
    runtime.log(
        f"{sum(free):,} .txt written; {sum(ours & ~free):,} not: they are there, or two share one"
    )
