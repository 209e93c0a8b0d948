"""Scores of several methods on the same items, and what notebooks 06 to 08 ask of them."""

import numpy as np
import pytest

from rsdlib import analysis, ensemble

RNG = np.random.default_rng(0)


def noisy(target, scale):
    return target + scale * RNG.normal(size=target.shape)


def scores(n=60, d=8):
    """Return scores of n items, two of each prompt."""
    target = np.repeat(RNG.normal(size=(n // 2, d)), 2, axis=0)
    return analysis.Scores(np.arange(n), target, np.repeat(np.arange(n // 2), 2))


def test_estimates_and_gains_are_those_of_the_metrics():
    test = scores()
    test.predictions = {"a": noisy(test.target, 0.3), "b": noisy(test.target, 1.0)}
    cosines = {m: analysis.cosine(p, test.target) for m, p in test.predictions.items()}
    interval = analysis.bootstrap_ci(cosines["a"], groups=test.groups)
    assert test.estimate("a")["low"] == interval.low
    gain = test.gain("a", "b")["difference"]["mean"]
    assert gain == pytest.approx(cosines["a"].mean() - cosines["b"].mean())
    rows = test.table(["b"])
    assert "gain over b" in rows[0]
    assert "gain over b" not in rows[1]


def test_every_subset_has_its_mean_its_weights_and_its_gain_over_its_best_member():
    val, test = scores(), scores()
    models = {"clip": 0.5, "swin": 1.0, "vit": 2.0}
    predictions = {
        name: {model: noisy(split.target, scale) for model, scale in models.items()}
        for name, split in (("val", val), ("test", test))
    }
    equal, fitted = analysis.ensemble_tables(predictions, val, test)
    assert [row["method"] for row in equal] == ["C", "S", "V", "CS", "CV", "SV", "CSV"]
    assert [row["method"] for row in fitted] == [f"{row['method']}, fitted" for row in equal]
    assert [row.get("best member") for row in equal] == [None] * 3 + [
        "clip",
        "clip",
        "swin",
        "clip",
    ]
    np.testing.assert_array_equal(test.predictions["CSV"], ensemble.mean(predictions["test"]))
    single = analysis.cosine(predictions["test"]["clip"], test.target).mean()
    gain = equal[-1]["gain over it"]["difference"]["mean"]
    assert gain == pytest.approx(equal[-1]["cosine"]["mean"] - single)
    on_val = ensemble.fit_weights(predictions["val"], val.target)
    assert fitted[-1]["weights"] == on_val


def test_weights_and_best_members_are_chosen_without_the_test_answers():
    val, test = scores(), scores()
    models = {"a": 0.5, "b": 1.0}
    predictions = {
        "val": {model: noisy(val.target, scale) for model, scale in models.items()},
        "test": {model: noisy(test.target, scale) for model, scale in models.items()},
    }
    chosen = []
    for target in (test.target, -test.target):
        other = analysis.Scores(test.rows, target, test.groups)
        equal, fitted = analysis.ensemble_tables(predictions, val, other)
        chosen.append((equal[-1]["best member"], fitted[-1]["weights"]))
    assert chosen[0] == chosen[1]


def test_swapped_pictures_are_compared_with_the_originals_of_the_same_noise():
    n = 12
    before = RNG.random(n)
    order = np.where(np.arange(n) % 3 == 0, 1.0, np.nan)  # only some prompts ask for an order
    measured = {
        ("original", "never"): {"CLIPScore": before, "order": order},
        ("unet", "1"): {"CLIPScore": before - 0.25, "order": np.full(n, np.nan)},
        ("unet", "never"): {"CLIPScore": before, "order": order},
    }
    groups = np.repeat(np.arange(n // 2), 2)
    table = {
        (row["encoder"], row["swap after"], row["of"]): row
        for row in analysis.swap_table(measured, groups)
    }
    swapped = table["unet", "1", "CLIPScore"]
    assert swapped["gain"]["difference"]["mean"] == pytest.approx(-0.25)
    assert swapped["mean"] == pytest.approx(before.mean() - 0.25)
    assert "gain" not in table["original", "never", "CLIPScore"]
    assert "gain" not in table["unet", "never", "CLIPScore"]
    assert table["original", "never", "order"]["n"] == 4
    assert table["unet", "1", "order"] == {
        **{"encoder": "unet", "swap after": "1", "of": "order", "n": 0}
    }


def test_rivals_are_other_prompts_whose_images_look_alike():
    looks = np.array([[1, 0.0], [1, 0.01], [1, 0.02], [0, 1.0], [1, 0.03], [0.0, 1]])
    prompts = ["a", "a", "b", "c", "d", "d"]
    asked = np.array([True, False, False, False, False, False])
    counts, usual = analysis.rivals(looks, prompts, asked)
    twins = [1 / np.hypot(1, 0.01), 0.03 / np.hypot(1, 0.03)]  # of "a", of "d"
    assert usual == pytest.approx(np.median(twins))
    near = {"a", "b", "d"}  # at least that alike; "c" is at a right angle
    assert counts.tolist() == [len(near)]


def test_rivals_without_twins_take_the_most_alike_pairs():
    looks = RNG.normal(size=(50, 5))
    counts, usual = analysis.rivals(looks, np.arange(50), np.arange(50) < 10)
    unit = looks / np.linalg.norm(looks, axis=1, keepdims=True)
    assert usual == pytest.approx(np.quantile(unit @ unit.T, 0.99))
    assert len(counts) == 10
