"""The paper's tables, ours beside them: read from the JSON files that notebooks write.

A stored row has ``method``, a score (``cosine``, or ``RefCLIPScore`` in table 1), which is an
`Estimate`, its paired comparisons, and in table 2 ``steps``, of training.
"""

import html
import re
from dataclasses import replace

from rsdlib import files, runtime
from rsdlib.analysis.metrics import Comparison, Estimate
from rsdlib.analysis.plots import plain
from rsdlib.errors import CacheError

_PAPER = runtime.read_table("analysis/paper.toml")
PAPER = {table: content["rows"] for table, content in _PAPER.items()}
TITLES = {table: content["title"] for table, content in _PAPER.items()}
VANILLA = ("clip", "swin", "vit", "unet")
CAPTIONS = ("caption alone", "caption alone, translated")  # what a white box reads beside images
# Table 5's single models are table 4's with the whole framework.
SINGLE = {f"{name} + MLC + CL": PAPER["table 5"][name[0].upper()] for name in VANILLA}


def gains(row):
    """Return the paired comparisons that a stored row holds.

    Parameters
    ----------
    row : dict
        A comparison is a dict with ``difference``, ``p`` and ``over``; without ``over`` it is over
        the row's ``best member``, or over what its own name says: ``gain over vit``.

    Returns
    -------
    list of Comparison
    """
    records = []
    for name, test in row.items():
        if isinstance(test, dict) and "p" in test:
            over = test.get("over") or row.get("best member") or name.removeprefix("gain over ")
            records.append(Comparison.read({**test, "over": over}))
    return records


def collect(folder):
    """Read the paper's five tables from stored results.

    Parameters
    ----------
    folder : path-like
        Of the figures: with ``01_vit.json`` to ``08_captioning.json``.

    Returns
    -------
    dict of str to list of dict
        For each key of `PAPER` the rows: ``method``, ``score`` (the stored estimate), ``steps`` (or
        None), ``gain`` (a `Comparison`, or None: over the vanilla training where the row has that,
        else over the mean embedding, else its first), and ``paper``, the paper's number or None.

    Raises
    ------
    CacheError
        A notebook has not stored its results yet.
    """
    folder = files.resolve_path(folder)

    def read(name):
        if not (folder / f"{name}.json").is_file():
            message = f"{files.relative(folder)} has no {name}.json"
            raise CacheError(message, f"Run: rsd run {name[:2]}")
        return files.read_json(folder / f"{name}.json")

    captions, ensembles = read("08_captioning")["table 1"], read("06_ensemble_dakl")
    notebooks = "01_vit", "02_swin", "03_clip", "04_unet"
    single = {row["method"]: row for name in notebooks for row in read(name)["table"]}
    blip = next(row for row in captions if row["method"] == "BLIP")
    single["BLIP"] = {"method": "BLIP", "cosine": blip["MiniLM"]}
    longer = [f"{name}{more}" for name in VANILLA for more in (" + MLC", " + MLC + CL")]
    names = [*PAPER["table 4"], *longer, *CAPTIONS]
    four = [single[name] for name in names if name in single]
    five = ensembles["table 5"] + ensembles.get("fitted weights", [])[-1:]
    stored = captions, read("05_curriculum")["table 2"], ensembles["table 3"], four, five
    return {name: list(_rows(name, rows)) for name, rows in zip(PAPER, stored, strict=True)}


def _rows(table, stored):
    """Yield a table's rows as `collect` returns them."""
    paper = beside(table, [row["method"] for row in stored])
    for row in stored:
        facts = {"method": row["method"], "paper": paper.get(row["method"])}
        facts |= {"score": row.get("RefCLIPScore") or row["cosine"], "steps": row.get("steps")}
        yield {**facts, "gain": _shown(gains(row))}


def _shown(gains):
    """Return the gain over the vanilla training, else over the mean embedding, else the first."""
    first = [*VANILLA, "mean embedding"]
    return min(gains, key=lambda gain: [*first, gain.over].index(gain.over), default=None)


def beside(table, methods):
    """Return the paper's number for each of our methods that it has one for.

    Table 3 goes by position: our numbers of centroids fit our data, the paper's its own.

    Parameters
    ----------
    table : str
        Key of `PAPER`.
    methods : sequence of str

    Returns
    -------
    dict of str to float
    """
    if table == "table 3":
        all_there = len(methods) >= len(PAPER[table])
        return dict(zip(methods, PAPER[table].values(), strict=False)) if all_there else {}
    known = {**PAPER[table], **(SINGLE if table == "table 4" else {})}
    return {method: known[method] for method in methods if method in known}


def markdown(tables):
    """Return `collect`'s tables as Markdown, below each what share its trainings hold.

    Parameters
    ----------
    tables : dict of str to list of dict

    Returns
    -------
    str
    """
    lines = []
    for number, (table, rows) in enumerate(tables.items(), 1):
        steps = any(row["steps"] for row in rows)
        names = ["method", *["steps"] * steps, "trainings", "ours, 95 % interval"]
        names += ["gain, paired test", "verdict", "the paper"]
        shown = []
        for row in rows:
            score, paper = Estimate(**row["score"]), row["paper"]
            cells = [_literal(row["method"]), *[row["steps"] or ""] * steps, score.trainings, score]
            shown.append([*cells, *_told(row["gain"]), f"{paper:.4f}" if paper else ""])
        title = f"**Table {number}. {TITLES[table]}**"
        lines += [title, "", *_table(names, shown), *_shares(rows), ""]
    return "\n".join(lines)


def _told(gain):
    """Return a comparison and its verdict as two cells, empty where there is none."""
    return (replace(gain, over=_literal(gain.over)), gain.verdict) if gain else ("", "")


def _literal(text):
    """Return text that Markdown shows as it stands, in one line."""
    text = html.escape(" ".join(plain(text).split()), quote=False)
    return re.sub(r"[\\`*_|$~\[\]]", r"\\\g<0>", text)


def _table(names, rows):
    """Return the lines of a table in Markdown."""
    head, *lines = [f"| {' | '.join(map(str, cells))} |" for cells in (names, *rows)]
    return [head, "|" + len(names) * "---|", *lines]


def _shares(rows):
    """Return lines that say how much of the variance is the trainings', where there are several."""
    held = {"means": [Estimate(**row["score"]) for row in rows]}
    held["gains"] = [row["gain"].difference for row in rows if row["gain"]]
    said = []
    for what, estimates in held.items():
        shares = [estimate.of_trainings for estimate in estimates if estimate.trainings > 1]
        if shares:
            said.append(f"{min(shares):.0%} to {max(shares):.0%} of the {what}' variance")
    return ["", f"The trainings hold {', '.join(said)}."] if said else []


def real_pictures(folder):
    """Return what notebook 10 stored of folders of real pictures, as Markdown.

    Parameters
    ----------
    folder : path-like
        Of the figures: with ``10_<name of a folder>.json``; without any, the answer is empty.

    Returns
    -------
    str
    """
    names = ["reader", "trainings", "cosine", "gain, paired test", "verdict"]
    names += ["true prompt: median rank", "first"]
    lines = []
    for path in sorted(files.resolve_path(folder).glob("10_*.json")):
        stored, rows = files.read_json(path), []
        for row in stored["table"]:
            cosine = Estimate(**row["cosine"])
            rank = f"{row['median_rank']:g} of {row['candidates']}", f"{row['recall@1']:.0%}"
            told = _told(_shown(gains(row)))
            rows.append([_literal(row["method"]), cosine.trainings, cosine, *told, *rank])
        for name, row in stored["splits"].items():
            rank = f"{row['median rank']:g} of {row['of']}", f"{row['first']:.0%}"
            reader = f"{stored['turns']} splits, {_literal(name)}"
            told = [f"{row['cosine']:.4f}", row["gain over constant"], ""]
            rows += [[reader, "", *told, *rank]] * (not name.startswith("split"))
        name, fence = plain(path.stem[3:]), "`" * (1 + path.stem.count("`"))
        lines += [f"**{fence}{name}{fence}**, a split by prompt", "", *_table(names, rows), ""]
    return "\n".join(lines)


BEGIN, END = "<!-- {}: written by rsd tables -->", "<!-- end of {} -->"


def insert(text, place, content):
    """Return a Markdown text with other content between two of its marks.

    Parameters
    ----------
    text : str
    place : str
        What stands there: ``"tables"`` or ``"real pictures"``.
    content : str
        Markdown.

    Returns
    -------
    str

    Raises
    ------
    CacheError
        The marks are not there.
    """
    begin, end = BEGIN.format(place), END.format(place)
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise CacheError(f"the file has no place for {place}", f"Add {begin!r} and {end!r} to it.")
    return f"{before}{begin}\n\n{content}\n{end}{after}"
