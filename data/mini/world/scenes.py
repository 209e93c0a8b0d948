"""What is known of the mini world's pairs: what was asked for, what is shown, what it is called."""

import re

import numpy as np
import pandas as pd

from mini_world.judge import Judge
from rsdlib import files


def scenes(prepared):
    """Return what each pair's prompt asks for and what the judge sees in its image.

    Parameters
    ----------
    prepared : rsdlib.experiment.Prepared

    Returns
    -------
    DataFrame or None
        One row a pair, columns as in ``scenes.parquet`` (see data/README.md). None for data that
        are not of this world.
    """
    path = files.resolve_path(prepared.config.source) / "scenes.parquet"
    if not path.is_file():
        return None
    table = pd.read_parquet(path)
    keys = {"left_on": "id", "right_on": "image_name"}
    return prepared.pairs[["id"]].merge(table, **keys, how="left", validate="1:1")


def known_causes(prepared):
    """Return what is known about why a pair may be hard.

    Parameters
    ----------
    prepared : rsdlib.experiment.Prepared

    Returns
    -------
    DataFrame of bool or None
        One row a pair: "nothing to see" (the prompt names nothing visible), "several things" (more
        than one), "a count" (two or three of a kind), "left of" (an order), "not as asked" (the
        judge sees another thing, setting, medium or number). None for data that are not of this
        world.
    """
    told = scenes(prepared)
    if told is None:
        return None
    visible, relation = told["has_referent"].to_numpy(bool), told["relation"].to_numpy()
    nouns = zip(told["nouns"], told["judged_nouns"], strict=True)
    same = np.array([set(asked) == set(judged) for asked, judged in nouns])
    for name in ("count", "setting", "medium"):
        same &= told[name].to_numpy() == told[f"judged_{name}"].to_numpy()
    return pd.DataFrame(
        {
            "nothing to see": ~visible,
            "several things": visible & (told["count"].to_numpy() > 1),
            "a count": relation == "count",
            "left of": relation == "left of",
            "not as asked": visible & ~same,
        }
    )


def names(prepared):
    """Return by which words prompts call each setting and medium.

    Parameters
    ----------
    prepared : rsdlib.experiment.Prepared

    Returns
    -------
    dict of str to dict of str to list of str
        ``names["setting"]["night"]``, itself first; empty for data that are not of this world.
    """
    path = files.resolve_path(prepared.config.source) / "names.json"
    return files.read_json(path) if path.is_file() else {}


def shows(caption, *names):
    """Tell whether a caption names a thing, in the singular or the plural.

    Parameters
    ----------
    caption : str
    *names : str
        What the thing may be called: one or more words each, in the singular.

    Returns
    -------
    bool
    """
    from textblob.en.inflect import singularize

    words = _words(caption)
    said = {*words, *map(singularize, words)}
    return any(said.issuperset(_words(name)) for name in names)


def _words(text):
    return re.findall(r"[a-z]+", text.lower())


def named(captions, prepared, rows):
    """Return how much of what prompts ask for is named by captions of their images.

    Parameters
    ----------
    captions : sequence of str (n)
    prepared : rsdlib.experiment.Prepared
    rows : ndarray of int (n,)

    Returns
    -------
    dict of str to ndarray (n,)
        Shares of "noun", "setting" and "medium"; NaN where the prompt asks for none. Empty for data
        that are not of this world.
    """
    told = scenes(prepared)
    if told is None:
        return {}
    called, told = names(prepared), told.iloc[rows]
    asked = {"noun": [list(nouns) for nouns in told["nouns"]]}
    for kind in ("setting", "medium"):
        asked[kind] = [[thing] if isinstance(thing, str) else [] for thing in told[kind]]
    return {kind: _shares(captions, things, called.get(kind, {})) for kind, things in asked.items()}


def _shares(captions, asked, called):
    shares = np.full(len(captions), np.nan)
    for i, (caption, things) in enumerate(zip(captions, asked, strict=True)):
        if things:
            shares[i] = np.mean([shows(caption, name, *called.get(name, [])) for name in things])
    return shares


def open_judge(prepared, device="auto"):
    """Open the world's judge, see `mini_world.Judge`.

    Parameters
    ----------
    prepared : rsdlib.experiment.Prepared
    device : str

    Returns
    -------
    Judge
    """
    return Judge.open(_world(prepared) / "judge", device)


def _world(prepared):
    return files.resolve_path(prepared.config.source).parent
