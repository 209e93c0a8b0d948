"""Figures as functions: data in, matplotlib axes (or a whole figure of pictures) out; no pyplot state, colour-blind-safe."""

import textwrap

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rsdlib import runtime

# Okabe and Ito's palette, distinguishable under every common colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#7F7F7F"


def _axes(ax, width=6.4, height=3.6):
    ax = ax if ax is not None else Figure((width, height), layout="constrained").add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    ax.set_axisbelow(True)
    return ax


def save(figure, path):
    """Write a figure (or the figure of some axes) as PNG, whole or not at all, and return the path."""
    figure = getattr(figure, "figure", figure)
    with runtime.atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    runtime.log(f"figure: {runtime.relative(path)}")
    return path


def plot_report(report, *, ax=None):
    """Draw how many rows each cleaning rule left; the bars' labels say how many it took.

    Parameters
    ----------
    report : DataFrame
        See `rsdlib.prompts.clean`.
    """
    ax = _axes(ax, height=0.36 * len(report) + 1)
    y = np.arange(len(report))[::-1]
    ax.barh(y, report["rows_out"], color=COLOURS[0], height=0.7)
    ax.barh(y, report["rows_in"] - report["rows_out"], left=report["rows_out"], color=COLOURS[1], height=0.7)
    for at, before, after in zip(y, report["rows_in"], report["rows_out"], strict=True):
        ax.text(before, at, f" −{before - after:,}" if before > after else " 0", va="center", fontsize=8, color=GREY)
    ax.set_yticks(y, report["rule"])
    ax.set_xlim(0, max(report["rows_in"].max(), 1) * 1.12)
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("pairs left (blue) and dropped (orange) by each rule")
    return ax


def plot_words(words, counts, *, ax=None, most=30):
    """Draw how many training prompts hold each of the most common vocabulary words."""
    ax = _axes(ax, width=9)
    words, counts = words[:most], np.asarray(counts)[:most]
    ax.bar(np.arange(len(words)), counts, color=COLOURS[0])
    ax.set_xticks(np.arange(len(words)), words, rotation=60, ha="right", fontsize=8)
    ax.set_ylabel("training prompts")
    return ax


def plot_curves(runs, *, ax=None):
    """Draw cosine similarity against the epoch: training pass (dashed) and validation, the best epoch marked.

    Parameters
    ----------
    runs : dict of str to DataFrame
        Name to the metrics of `rsdlib.training.load_run`.
    """
    ax = _axes(ax)
    for (name, metrics), colour in zip(runs.items(), COLOURS, strict=False):
        epochs = metrics.dropna(subset="val_similarity")
        number = epochs["epoch"] + 1
        ax.plot(number, epochs["train_similarity"], "--", color=colour, linewidth=1.2)
        ax.plot(number, epochs["val_similarity"], "-", color=colour, label=name)
        best = epochs["val_similarity"].idxmax()
        ax.plot(number[best], epochs["val_similarity"][best], "o", color=colour)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("epoch")
    ax.set_ylabel("mean cosine similarity")
    ax.legend(title="validation; training dashed, best epoch dotted", fontsize=8, title_fontsize=8, frameon=False)
    return ax


def plot_scores(rows, *, reference=None, of="cosine", label="mean cosine similarity on the test set, 95 % interval", ax=None):
    """Draw each method's mean, by default of the cosine similarity, with its 95 % interval; the paper's as open diamonds.

    Parameters
    ----------
    rows : list of dict
        ``method`` and ``cosine`` (mean, low, high), as `rsdlib.recipes.Scores.table` returns.
    of, label : str
        Key of what is drawn in place of ``cosine``, and the axis' label.
    reference : dict of str to float, optional
        The paper's number for some of the methods.
    """
    ax = _axes(ax, height=0.4 * len(rows) + 1.1)
    for at, row in enumerate(reversed(rows)):
        cosine = row[of]
        ax.plot([cosine["low"], cosine["high"]], [at, at], color=COLOURS[0], linewidth=2)
        ax.plot(cosine["mean"], at, "o", color=COLOURS[0])
        ax.annotate(f"{cosine['mean']:.3f}", (cosine["mean"], at), (0, 6), textcoords="offset points", ha="center", fontsize=8)
        if reference and row["method"] in reference:
            ax.plot(reference[row["method"]], at, "D", markerfacecolor="none", color=COLOURS[1])
    ax.set_yticks(range(len(rows)), [row["method"] for row in reversed(rows)])
    ax.set_ylim(-0.6, len(rows) - 0.3)
    ax.grid(visible=False, axis="y")
    note = "\n◇ the paper's number, on DiffusionDB" if reference else ""
    ax.set_xlabel(f"{label}{note}")
    return ax


def plot_recall(ranks, candidates, *, ax=None):
    """Draw the share of images whose true prompt is among the k nearest test prompts, against k, beside chance.

    Parameters
    ----------
    ranks : dict of str to ndarray (n,)
        Method to ranks, see `rsdlib.metrics.retrieval`.
    candidates : int
        Distinct prompts to choose from.
    """
    ax = _axes(ax)
    k = np.arange(1, candidates + 1)
    for (name, values), colour in zip(ranks.items(), COLOURS, strict=False):
        ax.plot(k, np.searchsorted(np.sort(values), k, side="right") / len(values), color=colour, label=name)
    ax.plot(k, k / candidates, ":", color=GREY, label="chance")
    ax.set_xscale("log")
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.set_xlabel(f"k (of {candidates:,} prompts)")
    ax.set_ylabel("true prompt among the k nearest")
    ax.legend(fontsize=8, frameon=False)
    return ax


def plot_counts(counts, *, xlabel, ylabel, ax=None):
    """Draw how often each size of a count (n,) occurs, in bins that double (0, 1, 2 to 3, 4 to 7 and so on)."""
    ax = _axes(ax)
    counts = np.asarray(counts)
    bins = np.where(counts > 0, np.floor(np.log2(np.maximum(counts, 1))).astype(int) + 1, 0)
    sizes = np.bincount(bins)
    ax.bar(np.arange(len(sizes)), sizes, color=COLOURS[0])
    names = ["0", "1", *(f"{2**k}–{2 ** (k + 1) - 1}" for k in range(1, len(sizes)))][: len(sizes)]
    ax.set_xticks(np.arange(len(sizes)), names)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    return ax


def plot_agreement(a, b, x, y, *, ax=None):
    """Draw how two measurements of the same items (n,) agree, as a map of how many items lie where.

    Parameters
    ----------
    a, b : ndarray (n,)
    x, y : str
        What they are.
    """
    ax = _axes(ax, width=4.6, height=4.2)
    cells = ax.hexbin(a, b, gridsize=30, mincnt=1, cmap="Blues", bins="log")
    ax.figure.colorbar(cells, ax=ax, label="pairs")
    low, high = min(np.min(a), np.min(b)), max(np.max(a), np.max(b))
    ax.plot([low, high], [low, high], ":", color=GREY)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    return ax


def plot_maps(table, value, *, x, y, by):
    """Draw a map of a figure over two settings, one for each value of a third; the best of all is framed.

    Parameters
    ----------
    table : DataFrame
        One row a combination, with the columns `value` (drawn), `x`, `y` and `by`.

    Returns
    -------
    Figure
    """
    import seaborn

    groups = list(table.groupby(by))
    best = table.loc[table[value].idxmax()]
    figure = Figure((0.8 + 3.6 * len(groups), 3.6), layout="constrained")
    for ax, (name, some) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        grid = some.pivot(index=y, columns=x, values=value)
        limits = {"vmin": table[value].quantile(0.1), "vmax": table[value].max()}
        seaborn.heatmap(grid, ax=ax, annot=True, fmt=".3f", cmap="viridis", cbar=False, annot_kws={"fontsize": 7}, **limits)
        if best[by] == name:
            at = grid.columns.get_loc(best[x]), grid.index.get_loc(best[y])
            ax.add_patch(Rectangle(at, 1, 1, fill=False, edgecolor=COLOURS[1], linewidth=2.5))
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
    """
    ax = _axes(ax)
    places = np.arange(len(x))
    for number, (name, estimates) in enumerate(lines.items()):
        colour, shift = (
            COLOURS[number % len(COLOURS)],
            0.06 * (number - (len(lines) - 1) / 2),
        )  # so that intervals do not hide each other
        mean, low, high = (np.array([estimate[key] for estimate in estimates]) for key in ("mean", "low", "high"))
        ax.errorbar(places + shift, mean, (mean - low, high - mean), fmt="o-", color=colour, markersize=4, capsize=2, label=name)
    ax.set_xticks(places, x)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.legend(fontsize=8, frameon=False)
    return ax


def plot_panels(panels, x, *, xlabel, columns=3):
    """Draw one `plot_lines` for each quantity.

    Parameters
    ----------
    panels : dict of str to dict
        Quantity to what `plot_lines` draws.
    x, xlabel
        See `plot_lines`.

    Returns
    -------
    Figure
    """
    rows = -(-len(panels) // columns)
    figure = Figure((4.2 * min(columns, len(panels)), 3.0 * rows), layout="constrained")
    axes = figure.subplots(rows, min(columns, len(panels)), squeeze=False).ravel()
    for ax, (name, lines) in zip(axes, panels.items(), strict=False):
        plot_lines(lines, x, xlabel=xlabel, ylabel=name, ax=ax)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    return figure


def plot_points(points, *, xlabel, ylabel, ax=None):
    """Draw named points, each with the 95 % interval of its height.

    Parameters
    ----------
    points : dict of str to (float, dict)
        Place, and ``mean``, ``low``, ``high``.
    xlabel, ylabel : str
    """
    ax = _axes(ax)
    for number, (name, (x, found)) in enumerate(points.items()):
        below, above = found["mean"] - found["low"], found["high"] - found["mean"]
        ax.errorbar([x], [found["mean"]], [[below], [above]], fmt="o", color=COLOURS[number % len(COLOURS)], capsize=3)
        ax.annotate(name, (x, found["mean"]), (7, 5), textcoords="offset points", fontsize=9)
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.margins(x=0.15)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    return ax


def plot_diagram(boxes, arrows, *, width=11.0, height=3.2):
    """Draw boxes and arrows between them.

    Parameters
    ----------
    boxes : dict of str to (float, float, str, int)
        Name to place (0 to 1 from the left and from below), text, and number of a colour in `COLOURS`.
    arrows : list of (str, str) or (str, str, str)
        From box to box, and a text beside it.
    width, height : float
        Inches.

    Returns
    -------
    Figure
    """
    figure = Figure((width, height))
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, 1), ylim=(0, 1))
    ax.set_axis_off()
    drawn = {}
    for name, (x, y, text, colour) in boxes.items():
        style = {"boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": COLOURS[colour], "linewidth": 1.8}
        drawn[name] = ax.text(x, y, text, ha="center", va="center", fontsize=9, linespacing=1.4, bbox=style, zorder=2)
    for start, end, *text in arrows:
        (x0, y0, *_), (x1, y1, *_) = boxes[start], boxes[end]
        how = {"arrowstyle": "-|>", "color": GREY, "patchA": drawn[start].get_bbox_patch(), "patchB": drawn[end].get_bbox_patch()}
        ax.annotate("", (x1, y1), (x0, y0), arrowprops={**how, "shrinkA": 2, "shrinkB": 2}, zorder=3)  # after the boxes are placed
        if text:
            ax.text((x0 + x1) / 2, (y0 + y1) / 2 + 0.04, text[0], ha="center", fontsize=8, color=GREY)
    return figure


def plot_images(images, captions, *, columns=4, width=11.0, wrap=34, size=8):
    """Draw images with text below each.

    Parameters
    ----------
    images : sequence of arrays (h, w, 3) or (3, h, w), uint8, or PIL images
    captions : sequence of str
        Line breaks are kept, long lines wrapped.
    columns, wrap, size : int
        Pictures a row, characters a line, font size.
    width : float
        Inches.

    Returns
    -------
    Figure
    """
    texts = ["\n".join(line for part in text.split("\n") for line in textwrap.wrap(part, wrap) or [""]) for text in captions]
    rows = -(-len(texts) // columns)
    lines = [max(text.count("\n") + 1 for text in texts[r * columns : (r + 1) * columns]) for r in range(rows)]
    heights = [width / columns * 0.97 + (n + 1) * size * 1.55 / 72 for n in lines]  # inches: a square and its text
    figure = Figure((width, sum(heights)))
    grid = figure.add_gridspec(
        rows, columns, height_ratios=heights, left=0.01, right=0.99, top=0.995, bottom=0.0, hspace=0.0, wspace=0.06
    )
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        row, column = divmod(number, columns)
        ax = figure.add_subplot(grid[row, column], anchor="N")
        pixels = np.asarray(image)
        ax.imshow(pixels.transpose(1, 2, 0) if pixels.shape[0] == 3 else pixels, interpolation="nearest")
        ax.set_axis_off()
        ax.text(0, -0.03, text, transform=ax.transAxes, va="top", fontsize=size, linespacing=1.25)
    return figure
