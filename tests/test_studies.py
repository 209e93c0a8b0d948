"""Scores of several methods on the same items, and what notebooks 06 to 08 ask of them."""

import numpy as np
import pytest

from rsdlib import analysis, ensemble
from rsdlib.analysis.scores import subsets
from rsdlib.errors import BadValueError

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


def test_scores_of_several_trainings():
    test = scores()
    test.predictions = {"a": [noisy(test.target, 0.3) for _ in range(3)]}
    test.predictions |= {"b": [noisy(test.target, 1.0) for _ in range(3)], "none": -test.target}
    each = np.stack([analysis.cosine(pred, test.target) for pred in test.predictions["a"]])
    np.testing.assert_array_equal(test.cosine("a"), each)
    assert test.estimate("a")["mean"] == pytest.approx(each.mean())
    assert [test.estimate(m)["trainings"] for m in test.predictions] == [3, 3, 1]
    of_two = analysis.paired_test(each, test.cosine("b"), groups=test.groups)
    assert test.gain("a", "b")["p"] == of_two.p
    over_one = test.gain("a", "none")["difference"]
    assert (over_one["mean"], over_one["trainings"]) == (pytest.approx(each.mean() + 1), 3)
    ranks = [analysis.retrieval(p, test.target, test.groups) for p in test.predictions["b"]]
    rows = {row["method"]: row for row in test.table(["none"])}
    assert rows["b"]["recall@1"] == pytest.approx(np.mean([r.recall(1) for r in ranks]))
    assert rows["b"]["candidates"] == 30
    shown = analysis.as_table(rows.values())
    assert shown["a"]["gain over none"].endswith("better")
    assert shown["a"]["trainings"] == 3


def test_a_list_of_one_training_is_one_training():
    test = scores()
    pred = noisy(test.target, 0.5)
    test.predictions = {"a": pred, "b": [pred], "none": [-test.target]}
    assert test.score("a") == test.score("b")
    assert test.gain("a", "none") == test.gain("b", "none")


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
    (whole,) = test.predictions["CSV"]
    np.testing.assert_array_equal(whole, ensemble.mean(predictions["test"]))
    single = analysis.cosine(predictions["test"]["clip"], test.target).mean()
    gain = equal[-1]["gain over it"]["difference"]["mean"]
    assert gain == pytest.approx(equal[-1]["cosine"]["mean"] - single)
    on_val = ensemble.fit_weights(predictions["val"], val.target)
    assert fitted[-1]["weights"] == on_val


def test_subsets_in_the_order_of_table_5():
    names = "C U S V CU CS CV US UV SV CUS CUV CSV USV CUSV"
    assert ["".join(subset) for subset in subsets("CUSV")] == names.split()


def test_each_training_of_an_ensemble_is_of_its_members_training():
    val, test = scores(), scores()
    predictions = {
        name: {m: [noisy(split.target, x) for _ in range(2)] for m, x in (("a", 0.5), ("b", 0.6))}
        for name, split in (("val", val), ("test", test))
    }
    equal, fitted = analysis.ensemble_tables(predictions, val, test)
    by_training = [
        {m: of["val"] for m, of in zip(predictions["val"], each, strict=True)}
        for each in zip(
            *([{"val": p} for p in some] for some in predictions["val"].values()), strict=True
        )
    ]
    weights = [ensemble.fit_weights(models, val.target) for models in by_training]
    for k, (one, own) in enumerate(zip(test.predictions["AB"], weights, strict=True)):
        members = {model: some[k] for model, some in predictions["test"].items()}
        np.testing.assert_array_equal(one, ensemble.mean(members))
        fit = test.predictions["AB, fitted"][k]
        np.testing.assert_array_equal(fit, ensemble.mean(members, own))
    mean = np.mean([own["a"] for own in weights])
    assert fitted[-1]["weights"]["a"] == pytest.approx(mean)
    assert [row["cosine"]["trainings"] for row in equal] == [2, 2, 2]
    assert equal[-1]["gain over it"] == test.gain("AB", equal[-1]["best member"])
    predictions["test"]["b"] = predictions["test"]["b"][:1]
    with pytest.raises(BadValueError, match="not equally many"):
        analysis.ensemble_tables(predictions, val, test)


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


def test_pictures_of_several_trainings_are_compared_with_the_one_original():
    before = RNG.random(12)
    order = np.where(np.arange(12) % 3 == 0, before, np.nan)
    lost = np.array([[0.1], [0.2], [0.3]])
    measured = {
        ("original", "never"): {"CLIPScore": before, "order": order},
        ("unet", "1"): {"CLIPScore": before - lost, "order": order - lost},
    }
    table = analysis.swap_table(measured, np.repeat(np.arange(6), 2))
    swapped = [row for row in table if row["encoder"] == "unet"]
    assert [row["n"] for row in swapped] == [12, 4]
    for row in swapped:
        loss = row["gain"]["difference"]
        assert (loss["mean"], loss["trainings"]) == (pytest.approx(-0.2), 3)
        assert loss["of_trainings"] == pytest.approx(1)


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
