"""The paper's tables, ours beside them: read from the JSON files that the notebooks write next to their figures."""

from rsdlib import runtime
from rsdlib.errors import CacheError

# Cosine similarity on DiffusionDB's test prompts; table 1: RefCLIPScore, which the paper states in percent.
PAPER = {
    "table 1": {"1-NN": 0.2553, "BLIP": 0.3093, "BLIP + MLC": 0.3177, "BLIP + MLC + CL": 0.3188},
    "table 2": {"none": 0.6526, "LeRaC": 0.6521, "CBS": 0.6254, "ours": 0.6544},
    "table 3": {
        "off": 0.6900,
        "r = 1000, γ = 0.001": 0.6899,
        "r = 5000, γ = 0.001": 0.6905,
        "r = 10000, γ = 0.001": 0.6917,
        "r = 10000, γ = 0.0001": 0.6898,
        "r = 10000, γ = 0.01": 0.6909,
        "r = 10000, γ = 0.1": 0.6878,
    },
    "table 4": {"CLIP + k-NN": 0.6189, "BLIP": 0.5129, "clip": 0.6725, "swin": 0.6624, "vit": 0.6526, "unet": 0.6130},
    "table 5": {
        **{"C": 0.6750, "U": 0.6497, "S": 0.6671, "V": 0.6550},
        **{"CU": 0.6785, "CS": 0.6887, "CV": 0.6854, "US": 0.6787, "UV": 0.6732, "SV": 0.6792},
        **{"CUS": 0.6900, "CUV": 0.6901, "CSV": 0.6901, "USV": 0.6820, "CUSV": 0.6917},
    },
}
SINGLE = {f"{name} + MLC + CL": PAPER["table 5"][name[0].upper()] for name in ("clip", "swin", "vit", "unet")}  # from table 5
TITLES = {
    "table 1": "Captioning (RefCLIPScore)",
    "table 2": "Curricula, ViT",
    "table 3": "DAKL: number of centroids and width of the kernel",
    "table 4": "Vanilla training, what needs none, and what vocabulary head and curriculum add",
    "table 5": "Ensembles of C(LIP), U(-Net), S(win) and V(iT), with vocabulary head and curriculum",
}
VANILLA = ("clip", "swin", "vit", "unet")
GAINS = {  # which of a row's comparisons is shown, the first that it has
    "table 1": ["gain in RefCLIPScore"],
    "table 2": ["gain over none"],
    "table 3": ["gain over off"],
    "table 4": [*(f"gain over {name}" for name in VANILLA), "gain over mean embedding"],
    "table 5": ["gain over it"],
}


def collect(folder):
    """Read the paper's five tables from stored results.

    Parameters
    ----------
    folder : path-like
        Of the figures: with ``01_vit.json`` to ``08_captioning.json``.

    Returns
    -------
    dict of str to list of dict
        For each key of `PAPER` the rows: ``method``, ``score`` (mean, low, high), ``gain`` (``over`` which method, ``difference``,
        ``p`` of the paired test) or None, and ``paper``, its number or None.

    Raises
    ------
    CacheError
        A notebook has not stored its results yet.
    """
    folder = runtime.resolve_path(folder)

    def read(name):
        if not (folder / f"{name}.json").is_file():
            raise CacheError(f"{runtime.relative(folder)} has no {name}.json", f"Run: rsd reproduce --only {name[:2]}")
        return runtime.read_json(folder / f"{name}.json")

    captions, ensembles = read("08_captioning")["table 1"], read("06_ensemble_dakl")
    single = {row["method"]: row for name in ("01_vit", "02_swin", "03_clip", "04_unet") for row in read(name)["table"]}
    blip = next(row for row in captions if row["method"] == "BLIP")
    single["BLIP"] = {"method": "BLIP", "cosine": blip["MiniLM"]}
    longer = [f"{name}{more}" for name in VANILLA for more in (" + MLC", " + MLC + CL")]
    found = {
        "table 1": captions,
        "table 2": read("05_curriculum")["table 2"],
        "table 3": ensembles["table 3"],
        "table 4": [single[name] for name in [*PAPER["table 4"], *longer] if name in single],
        "table 5": ensembles["table 5"] + ensembles.get("fitted weights", [])[-1:],
    }
    rows = {}
    for table, those in found.items():
        paper = beside(table, [row["method"] for row in those])
        rows[table] = [
            {
                "method": row["method"],
                "score": row["RefCLIPScore" if table == "table 1" else "cosine"],
                "gain": _gain(row, GAINS[table]),
                "paper": paper.get(row["method"]),
            }
            for row in those
        ]
    return rows


def _gain(row, names):
    """Return the first of a row's paired comparisons that is among `names`: ``over``, ``difference`` and ``p``; None without."""
    for name in names:
        if name in row:
            over = row[name].get("over") or row.get("best member") or name.removeprefix("gain over ")
            return {"over": over, "difference": row[name]["difference"], "p": row[name]["p"]}
    return None


def beside(table, methods):
    """Return the paper's number for each of our methods that it has one for.

    Table 3 goes by position: our numbers of centroids fit our data, the paper's its own.
    """
    if table == "table 3":
        return dict(zip(methods, PAPER[table].values(), strict=False)) if len(methods) >= len(PAPER[table]) else {}
    known = {**PAPER[table], **(SINGLE if table == "table 4" else {})}
    return {method: known[method] for method in methods if method in known}


def markdown(tables):
    """Return `collect`'s tables as Markdown."""
    lines = []
    for number, (table, rows) in enumerate(tables.items(), 1):
        lines += [f"**Table {number}. {TITLES[table]}**", "", "| method | ours, 95 % interval | gain, paired test | the paper |"]
        lines.append("|---|---|---|---|")
        for row in rows:
            score, gain, paper = row["score"], "", "" if row["paper"] is None else f"{row['paper']:.4f}"
            if row["gain"]:
                difference, p = row["gain"]["difference"], row["gain"]["p"]
                interval = f"{difference['mean']:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}]"
                gain = f"{interval} over {row['gain']['over']}, p = {p:.2g}"
            lines.append(f"| {row['method']} | {score['mean']:.4f} [{score['low']:.4f}, {score['high']:.4f}] | {gain} | {paper} |")
        lines.append("")
    return "\n".join(lines)


BEGIN, END = "<!-- tables: written by rsd tables -->", "<!-- end of tables -->"


def insert(text, tables):
    """Return a Markdown text with the tables between its two marks.

    Raises
    ------
    CacheError
        The marks are not there.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise CacheError("the file has no place for tables", f"Put the lines {BEGIN!r} and {END!r} into it.")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{markdown(tables)}\n{END}{rest.split(END)[1]}"
