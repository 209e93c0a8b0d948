"""Figures as functions: data in, matplotlib axes (or a whole figure of pictures) out.

No pyplot state; colours are safe for the colour-blind. Text is data: from here on neither figures
nor tables in notebooks read any mathematics in it, and each character has a font or a box.
"""

import re
import textwrap
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rcParams, style
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogFormatter, LogFormatterMathtext, MaxNLocator, PercentFormatter

from rsdlib import files, runtime
from rsdlib.analysis.metrics import each_training

GREY = "#7F7F7F"
MOST = 12  # lines of a paragraph below a picture

style.use(Path(__file__).parent / "house.mplstyle")
_FONTS = fontManager.get_font_names()
rcParams["font.family"] = [name for name in rcParams["font.family"] if name in _FONTS]
LogFormatterMathtext.__call__ = LogFormatter.__call__  # powers of ten would be mathematics
pd.options.display.html.use_mathjax = False


def plain(text, most=80):
    """Return text fit to be drawn: what no font shows becomes a space or an escape.

    Such as tabs, marks that turn the direction of writing, and halves of a character; line breaks
    stay.

    Parameters
    ----------
    text : object
    most : int
        Characters; longer text is cut and ends with an ellipsis.

    Returns
    -------
    str
    """
    text = re.sub(r"[^\S\n]", " ", str(text))
    text = text if len(text) <= most else f"{text[: most - 1]}…"
    return "".join(c if c.isprintable() or c in "\n\u200c\u200d" else ascii(c)[1:-1] for c in text)


def _axes(ax, height=3.6):
    return ax if ax is not None else Figure((6.4, height), layout="constrained").add_subplot()


def _legend(ax, drawn, **how):
    """Name what was drawn, by name, also where that begins with an underscore."""
    ax.legend(drawn.values(), map(plain, drawn), **how)


def _bounds(estimates):
    """Return the means (n,) and the distances to their lower and upper bounds (2, n)."""
    mean, low, high = pd.DataFrame(estimates)[["mean", "low", "high"]].to_numpy().T
    return mean, np.stack([mean - low, high - mean])


def save_figure(figure, path):
    """Write a figure, or the figure of some axes, as PNG, whole or not at all.

    Parameters
    ----------
    figure : Figure or Axes
    path : path-like

    Returns
    -------
    path-like
        The path.
    """
    with files.atomic_path(path) as temporary:
        figure.figure.savefig(temporary, format="png", metadata={"Software": None})
    runtime.log(f"figure: {files.relative(path)}")
    return path


# --- data -----------------------------------------------------------------------------------------


def plot_report(report, *, ax=None):
    """Draw how many rows each cleaning rule left; the bars' labels say how many it took.

    Parameters
    ----------
    report : DataFrame
        See `rsdlib.data.clean`.

    Returns
    -------
    Axes
    """
    ax = _axes(ax, height=0.36 * len(report) + 1)
    rules, left, taken = report["rule"], report["rows_out"], report["rows_in"] - report["rows_out"]
    ax.barh(rules, left, color="C0")
    dropped = ax.barh(rules, taken, left=left, color="C1")
    ax.bar_label(dropped, [f" {count:,}" for count in taken], fontsize=8, color=GREY)
    ax.invert_yaxis()
    ax.grid(visible=False)
    ax.set(xmargin=0.12, xlabel="pairs left (blue) and dropped (orange) by each rule")
    return ax


# --- scores ---------------------------------------------------------------------------------------


def plot_curves(runs, *, ax=None):
    """Draw cosine similarity against the epoch: training (dashed), validation, its best marked.

    Parameters
    ----------
    runs : dict of str to DataFrame, or to a list of them
        Name to the metrics of `rsdlib.training.load_run`, of one training or of several.

    Returns
    -------
    Axes
    """
    ax = _axes(ax)
    drawn = {}
    for number, (name, several) in enumerate(runs.items()):
        for metrics in each_training(several):
            epochs = metrics.dropna(subset="val_similarity")
            epochs = epochs.set_index(epochs["epoch"] + 1)
            validation, colour = epochs["val_similarity"], f"C{number}"
            ax.plot(epochs["train_similarity"], "--", color=colour, linewidth=1.2)
            (drawn[name],) = ax.plot(validation, color=colour)
            ax.plot(validation.nlargest(1), "o", color=colour)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="epoch", ylabel="mean cosine similarity")
    _legend(ax, drawn, title="validation; training dashed, best epoch dotted")
    return ax


ON_TEST = "mean cosine similarity on the test set, 95 % interval"


def plot_scores(rows, *, reference=None, of="cosine", label=ON_TEST, ax=None):
    """Draw each method's mean with its 95 % interval; the paper's as open diamonds.

    Parameters
    ----------
    rows : list of dict
        ``method`` and ``cosine`` (mean, low, high), as `Scores.table` returns.
    reference : dict of str to float, optional
        The paper's number for some of the methods.
    of, label : str
        Key of what is drawn in place of ``cosine``, and the axis' label.

    Returns
    -------
    Axes
    """
    ax = _axes(ax, height=0.4 * len(rows) + 1.1)
    above = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center", "fontsize": 8}
    for place, row in enumerate(rows):
        mean, reach = _bounds([row[of]])
        ax.errorbar(mean, place, xerr=reach, fmt="o", color="C0", linewidth=2)
        ax.annotate(f"{mean[0]:.3f}", (mean[0], place), **above)
        if row["method"] in (reference or {}):
            ax.plot(reference[row["method"]], place, "D", markerfacecolor="none", color="C1")
    ax.set_yticks(range(len(rows)), [plain(row["method"]) for row in rows])
    ax.grid(visible=False, axis="y")
    most = max(row[of].get("trainings", 1) for row in rows)
    note = f"\nover prompts and {most} trainings" if most > 1 else ""
    note += "\n◇ the paper's number, on DiffusionDB" if reference else ""
    ax.set(ylim=(len(rows) - 0.4, -0.7), xlabel=f"{label}{note}")  # the first on top
    return ax


def plot_recall(ranks, candidates, *, ax=None):
    """Draw the share of images whose true prompt is among the k nearest, against k, and chance.

    Parameters
    ----------
    ranks : dict of str to ndarray (n,)
        Method to ranks, see `retrieval`.
    candidates : int
        Distinct prompts to choose from.

    Returns
    -------
    Axes
    """
    ax = _axes(ax)
    k = np.arange(1, candidates + 1)
    drawn = {name: ax.ecdf(values) for name, values in ranks.items()}
    (chance,) = ax.plot(k, k / candidates, ":", color=GREY)
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.set(xscale="log", xlim=(1, candidates), xlabel=f"k (of {candidates:,} prompts)")
    ax.set(ylim=(0, 1), ylabel="true prompt among the k nearest")
    _legend(ax, drawn | {"chance": chance})
    return ax


def plot_maps(table, value, *, x, y, by):
    """Draw a map of a figure over two settings for each value of a third; the best is framed.

    Parameters
    ----------
    table : DataFrame
        One row a combination, with the columns `value` (drawn), `x`, `y` and `by`.
    value, x, y, by : str

    Returns
    -------
    Figure
    """
    import seaborn

    groups = list(table.groupby(by))
    best = table.loc[table[value].idxmax()]
    look = {"annot": True, "fmt": ".3f", "annot_kws": {"fontsize": 7}, "cmap": "viridis"}
    limits = {"vmin": table[value].quantile(0.1), "vmax": table[value].max()}
    figure = Figure((0.8 + 3.6 * len(groups), 3.6), layout="constrained")
    axes = figure.subplots(1, len(groups), squeeze=False)[0]
    for ax, (name, rows) in zip(axes, groups, strict=True):
        grid = rows.pivot(index=y, columns=x, values=value)
        seaborn.heatmap(grid, ax=ax, cbar=False, **look, **limits)
        if best[by] == name:
            corner = grid.columns.get_loc(best[x]), grid.index.get_loc(best[y])
            ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="C1", linewidth=2.5))
        ax.set_title(f"{by} = {name}")
    return figure


def plot_lines(lines, x, *, xlabel, ylabel, ax=None):
    """Draw lines of estimates with their 95 % intervals over named places.

    Parameters
    ----------
    lines : dict of str to list of dict
        ``mean``, ``low`` and ``high`` for each place.
    x : sequence of str
        The places' names.
    xlabel, ylabel : str

    Returns
    -------
    Axes
    """
    ax = _axes(ax)
    drawn, places = {}, np.arange(len(x))
    for number, (name, estimates) in enumerate(lines.items()):
        shift = 0.06 * (number - (len(lines) - 1) / 2)  # so that intervals do not hide each other
        drawn[name] = ax.errorbar(places + shift, *_bounds(estimates), fmt="o-", ms=4, capsize=2)
    ax.set_xticks(places, map(plain, x))
    ax.set(xlabel=xlabel, ylabel=ylabel)
    _legend(ax, drawn)
    return ax


def plot_points(points, *, xlabel, ylabel, ax=None):
    """Draw named points, each with its 95 % intervals.

    Parameters
    ----------
    points : dict of str to (float or dict, dict)
        Place and height; dicts have ``mean``, ``low``, ``high``.
    xlabel, ylabel : str

    Returns
    -------
    Axes
    """
    ax, drawn = _axes(ax), {}
    for number, (name, (x, estimate)) in enumerate(points.items()):
        marker = "os^"[number // 7 % 3]  # another one after each round of the colours
        x = x if isinstance(x, dict) else dict.fromkeys(("mean", "low", "high"), x)
        (place, width), (mean, height) = _bounds([x]), _bounds([estimate])
        drawn[name] = ax.errorbar(place, mean, height, width, fmt=marker, capsize=3)
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    _legend(ax, drawn, loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


# --- diagrams and pictures ------------------------------------------------------------------------


def plot_images(images, captions, *, columns=4, width=11.0, wrap=34, size=8):
    """Draw images with text below each.

    Parameters
    ----------
    images : sequence of arrays (h, w, 3) or (3, h, w), uint8, or PIL images
    captions : sequence of str
        Line breaks are kept, long lines wrapped, very long ones cut.
    columns, wrap, size : int
        Pictures a row, characters a line, font size.
    width : float
        Inches.

    Returns
    -------
    Figure
    """
    texts = [_wrapped(caption, wrap) for caption in captions]
    rows = [texts[start : start + columns] for start in range(0, len(texts), columns)]
    lines = sum(max(text.count("\n") + 2 for text in row) for row in rows)
    height = len(rows) * width / columns + lines * size * 1.25 / 72
    figure = Figure((width, height), layout="constrained")
    for number, (image, text) in enumerate(zip(images, texts, strict=True), 1):
        ax = figure.add_subplot(len(rows), columns, number, xticks=[], yticks=[], frame_on=False)
        pixels = np.asarray(image)
        ax.imshow(pixels.transpose(1, 2, 0) if pixels.shape[0] == 3 else pixels)
        ax.set_xlabel(text, loc="left", multialignment="left", fontsize=size)
    return figure


def _wrapped(text, wrap):
    """Return text in lines of so many characters, half as many of wide ones, the longest cut."""
    lines = []
    for line in plain(text, len(text)).split("\n"):
        wide = sum(unicodedata.east_asian_width(c) in "WF" for c in line)
        width = max(wrap * len(line) // (len(line) + wide), 2) if wide else wrap
        lines += textwrap.wrap(line, width, max_lines=MOST, placeholder=" …") or [""]
    return "\n".join(lines if len(lines) <= 3 * MOST else [*lines[: 3 * MOST], "…"])
