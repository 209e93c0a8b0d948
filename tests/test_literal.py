"""Text from data is drawn and written as it stands, whatever it looks like."""

import warnings

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from rsdlib import analysis, files
from rsdlib.analysis import tables

PROMPTS = [
    "rapper with $$$ and $$$",
    "a coin of $100, cut from $20, $x^2$",
    r"\frac{1}{2} $\frac{$ \\ \$5 {a_b^c} %d %",
    "_a_b^c_",
    "<script>alert('&amp;')</script>",
    "猫と犬、水彩画 고양이 แมว",
    "😀 👩‍👩‍👧 ❤️ 🇫🇷",
    "שלום עולם مرحبا بالعالم",
    "e\u0301 \U0001d4d0",
]
HIDDEN = {"a\tb\x00c": r"a b\x00c", "\u202eabc": r"\u202eabc", "a\u2028b\vc": "a b c"}
HIDDEN |= {"a\ud800b": r"a\ud800b", "\ue000": r"\ue000", "": ""}


def drawn(figure):
    """Draw a figure, without any warning; return its visible texts."""
    figure = getattr(figure, "figure", figure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.canvas.draw()
    texts = figure.findobj(Text)
    for ax in figure.axes:
        texts += [*ax.get_xticklabels(), *ax.get_yticklabels()]
    assert not any(text.get_parse_math() for text in texts)
    return [text.get_text() for text in texts if text.get_visible()]


def estimate(mean):
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 9}


def test_every_name_in_every_figure_is_literal():
    rows = [{"method": name, "cosine": estimate(0.5)} for name in PROMPTS]
    lines = {name: [estimate(0.1)] * 2 for name in PROMPTS}
    run = pd.DataFrame({"epoch": [0, 1], "train_similarity": [0.1, 0.2], "val_similarity": [0, 1]})
    report = pd.DataFrame({"rule": PROMPTS, "rows_in": 5, "rows_out": 4})
    label = {"xlabel": PROMPTS[0], "ylabel": PROMPTS[1]}
    figures = {
        "report": analysis.plot_report(report),
        "scores": analysis.plot_scores(rows, label=PROMPTS[0]),
        "curves": analysis.plot_curves(dict.fromkeys(PROMPTS, run)),
        "recall": analysis.plot_recall(dict.fromkeys(PROMPTS, np.arange(1, 5)), 5),
        "lines": analysis.plot_lines(lines, PROMPTS[:2], **label),
        "points": analysis.plot_points({name: (0.1, estimate(0.2)) for name in PROMPTS}, **label),
    }
    for kind, figure in figures.items():
        assert set(PROMPTS) <= set(drawn(figure)), kind


def test_captions_are_literal(tmp_path):
    pixels = np.zeros((len(PROMPTS), 8, 8, 3), np.uint8)
    figure = analysis.plot_images(pixels, PROMPTS, columns=3, wrap=80)
    assert set(PROMPTS) <= set(drawn(figure))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        analysis.save_figure(figure, tmp_path / "a.png")


def test_what_no_font_shows_is_visible():
    pixels = np.zeros((len(HIDDEN), 8, 8, 3), np.uint8)
    assert set(HIDDEN.values()) <= set(drawn(analysis.plot_images(pixels, [*HIDDEN])))
    rows = [{"method": name, "cosine": estimate(0.5)} for name in HIDDEN]
    assert set(HIDDEN.values()) <= set(drawn(analysis.plot_scores(rows)))
    assert analysis.plain("\x00" * 5, 3) == r"\x00\x00…"


def test_long_names_are_cut():
    rows = [{"method": f"{'word' * 750}", "cosine": estimate(0.5)}]
    assert f"{'word' * 19}wor…" in drawn(analysis.plot_scores(rows))


@pytest.mark.parametrize("text", ["word " * 600, "x" * 3000, "猫" * 3000, "\n" * 3000, "$" * 3000])
def test_long_text_is_wrapped_and_cut(text):
    figure = analysis.plot_images([np.zeros((8, 8, 3), np.uint8)] * 2, [text, "short"], columns=2)
    texts = drawn(figure)
    assert "short" in texts
    (shown,) = (text for text in texts if text.endswith("…"))
    lines = shown.split("\n")
    assert len(lines) < 40
    assert max(map(len, lines)) <= (17 if "猫" in text else 34)
    assert figure.get_figheight() < 20


def test_figures_of_ones_own_are_literal_too(tmp_path):
    """Also by way of seaborn; logarithmic axes are numbered without mathematics."""
    import seaborn

    figure = Figure()
    one, two, three = figure.subplots(1, 3)
    seaborn.barplot(x=PROMPTS, y=range(len(PROMPTS)), ax=one)
    two.loglog([1e-3, 10], [1, 1000], label=PROMPTS[0])
    two.set_title(PROMPTS[1])
    two.legend()
    three.plot([-1000, 1000])
    three.set_yscale("symlog")
    analysis.save_figure(figure, tmp_path / "own.png")
    texts = drawn(figure)
    assert set(PROMPTS) <= set(texts)
    assert {"1", "10", "100"} <= set(texts)
    assert not any("mathdefault" in text for text in texts)


def test_ranks_are_numbered_without_mathematics():
    texts = drawn(analysis.plot_recall({"a": np.arange(1, 500)}, 500))
    assert {"1", "10", "100"} <= set(texts)
    assert not any("mathdefault" in text for text in texts)


def test_tables_in_notebooks_are_literal():
    frame = pd.DataFrame({"prompt": PROMPTS})
    html = frame.to_html()
    assert "<script>" not in html
    assert "mathjax_ignore" in html


NAMES = ["a|b", "`x` *y* _z_ [k](u) <b> $1$ ~~d~~ #1 \\", "two\nlines", "<!-- end of tables -->"]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_literal_in_markdown(name):
    estimates = {"score": estimate(0.5), "paper": None, "steps": None, "gain": None}
    text = tables.markdown({"table 1": [{"method": name, **estimates}]})
    (line,) = (line for line in text.splitlines() if "0.5000" in line)
    cells = line.replace("\\\\", "").replace("\\|", "").split("|")
    assert len(cells) == len(["", "method", "trainings", "ours", "gain", "verdict", "paper", ""])
    for mark in "`*_[<$~":
        assert mark not in line.replace(f"\\{mark}", "").replace(" [0.4000", "")
    assert "-->" not in line


def test_folders_are_literal_in_markdown(tmp_path):
    rows = [{"method": "a|b", "cosine": estimate(0.4)}]
    rows[0] |= {"median_rank": 2.0, "candidates": 40, "recall@1": 0.4}
    part = {"cosine": 0.5, "gain over constant": "+0.1", "median rank": 3, "of": 50, "first": 0.3}
    stored = {"table": rows, "splits": {"c|d": part}, "turns": 5}
    files.write_json(tmp_path / "10_a`b*.json", stored)
    text = tables.real_pictures(tmp_path)
    assert "**``a`b*``**" in text
    assert "| a\\|b |" in text
    assert "5 splits, c\\|d |" in text
