"""Figures show the numbers that they are given."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from rsdlib import analysis


def estimate(mean, below=0.1, above=0.2):
    return {"mean": mean, "low": mean - below, "high": mean + above, "n": 9, "trainings": 1}


ROWS = [{"method": name, "cosine": estimate(mean)} for name, mean in (("vit", 0.6), ("clip", 0.7))]


def test_cleaning_report_says_what_each_rule_took():
    report = pd.DataFrame({"rule": ["empty", "length"], "rows_in": [10, 8], "rows_out": [8, 8]})
    ax = analysis.plot_report(report)
    assert sorted(bar.get_width() for bar in ax.patches) == [0, 2, 8, 8]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["empty", "length"]
    assert [text.get_text().strip() for text in ax.texts] == ["2", "0"]
    assert [text.xy[0] for text in ax.texts] == [10, 8]  # behind the bars


def test_best_epoch_of_validation_is_marked():
    validation = [np.nan, 0.2, 0.5, 0.4]  # the first line is one within an epoch
    columns = {"epoch": [0, 0, 1, 2], "train_similarity": [0.1, 0.2, 0.3, 0.4]}
    ax = analysis.plot_curves({"vit": pd.DataFrame({**columns, "val_similarity": validation})})
    train, val, best = ax.lines
    assert train.get_xydata().tolist() == [[1, 0.2], [2, 0.3], [3, 0.4]]
    assert val.get_ydata().tolist() == [0.2, 0.5, 0.4]
    assert best.get_xydata().tolist() == [[2, 0.5]]


def test_curves_of_several_trainings_share_a_colour_and_a_name():
    run = pd.DataFrame({"epoch": [0, 1], "train_similarity": [0.1, 0.2], "val_similarity": [0, 1]})
    ax = analysis.plot_curves({"vit": [run, run], "clip": [run]})
    assert [len(lines) for lines in (ax.lines, {line.get_color() for line in ax.lines})] == [9, 2]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["vit", "clip"]


def test_scores_say_over_how_many_trainings():
    thrice = {"method": "b", "cosine": {**estimate(0.5), "trainings": 3}}
    assert "over prompts and 3 trainings" in analysis.plot_scores([*ROWS, thrice]).get_xlabel()
    assert "trainings" not in analysis.plot_scores(ROWS).get_xlabel()


def test_scores_their_intervals_and_the_papers():
    ax = analysis.plot_scores(ROWS, reference={"vit": 0.5, "swin": 0.9})
    for (mean, _, (interval,)), expected in zip(ax.containers, (0.6, 0.7), strict=True):
        assert mean.get_xdata() == [expected]
        ends = interval.get_segments()[0][:, 0]
        np.testing.assert_allclose(ends, [expected - 0.1, expected + 0.2])
    assert [line.get_xdata() for line in ax.lines if line.get_marker() == "D"] == [[0.5]]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["vit", "clip"]
    assert ax.yaxis_inverted()  # the first on top
    assert "the paper's number" in ax.get_xlabel()
    other = analysis.plot_scores([{"method": "a", "gain": estimate(1)}], of="gain", label="gain")
    assert other.get_xlabel() == "gain"


def test_recall_counts_ranks_up_to_k():
    ranks = {"a": np.array([1, 2, 4.5]), "b": np.array([1, 1, 1])}
    lines = analysis.plot_recall(ranks, 5).lines
    assert lines[0].get_xdata()[1:].tolist() == [1, 2, 4.5]  # after each of them it is higher
    assert lines[0].get_ydata().tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert lines[-1].get_ydata().tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])  # chance


def test_best_of_all_maps_is_framed():
    places = [(x, y, r) for x in (0.1, 1, 3) for y in (1, 10) for r in (30, 300)]
    table = pd.DataFrame(places, columns=["gamma", "alpha", "r"])
    table["cosine"] = np.where((table == [3, 1, 300]).all(axis=1), 0.9, 0.1)
    figure = analysis.plot_maps(table, "cosine", x="gamma", y="alpha", by="r")
    frames = [ax.patches for ax in figure.axes]
    assert [len(patches) for patches in frames] == [0, 1]
    assert frames[1][0].get_xy() == (2, 0)  # gamma = 3, alpha = 1
    assert figure.axes[1].texts[2].get_text() == "0.900"


def test_lines_show_estimates_with_their_bounds():
    lines = {name: [estimate(mean) for mean in (0.1, 0.3)] for name in ("a", "b")}
    ax = analysis.plot_lines(lines, ["now", "then"], xlabel="swap", ylabel="CLIPScore")
    for bars in ax.containers:
        line, _, (intervals,) = bars
        assert line.get_ydata().tolist() == [0.1, 0.3]
        ends = [segment[:, 1].tolist() for segment in intervals.get_segments()]
        np.testing.assert_allclose(ends, [[0, 0.3], [0.2, 0.5]], atol=1e-12)


def test_points_have_names_and_bounds():
    points = {"vit": (0.5, estimate(0.2)), "unet": (estimate(0.4), estimate(0.1))}
    ax = analysis.plot_points(points, xlabel="reads", ylabel="paints")
    line, _, (across, up) = ax.containers[0]
    assert line.get_xydata().tolist() == [[0.5, 0.2]]
    np.testing.assert_allclose(across.get_segments()[0][:, 0], [0.5, 0.5])
    np.testing.assert_allclose(up.get_segments()[0][:, 1], [0.1, 0.4])
    width = np.diff(ax.containers[1][2][0].get_segments()[0][:, 0])
    np.testing.assert_allclose(width, 0.3)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["vit", "unet"]


def test_images_with_any_text_below():
    pixels = np.random.default_rng(0).integers(256, size=(5, 3, 8, 8), dtype=np.uint8)
    captions = ["<script>", "long " * 40, "x\n\ny", "", "5"]
    pictures = [*pixels[:3], pixels[3].transpose(1, 2, 0), Image.fromarray(pixels[4].T)]
    figure = analysis.plot_images(pictures, captions, columns=2)
    assert len(figure.axes) == 5
    texts = [ax.get_xlabel() for ax in figure.axes]
    assert [texts[0], *texts[2:]] == ["<script>", "x\n\ny", "", "5"]
    assert texts[1].replace("\n", " ") == ("long " * 40).strip()
    assert max(len(line) for line in texts[1].split("\n")) <= 34
    shown = figure.axes[3].images[0].get_array()
    np.testing.assert_array_equal(shown, pixels[3].transpose(1, 2, 0))


def test_a_figure_is_stored_whole_and_the_same_every_time(tmp_path, capsys):
    paths = [tmp_path / name for name in ("a.png", "b.png")]
    for path in paths:
        assert analysis.save_figure(analysis.plot_scores(ROWS), path) == path
    assert Image.open(paths[0]).format == "PNG"
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == paths
    assert "figure: a.png" in capsys.readouterr().out


def test_figures_leave_no_global_state():
    analysis.plot_scores(ROWS)
    assert "matplotlib.pyplot" not in dir(matplotlib) or not matplotlib.pyplot.get_fignums()
