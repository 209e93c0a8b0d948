"""The ensemble: identities of the mean, choices that read validation alone, exact neighbours."""

import sys

import numpy as np
import pytest

from rsdlib import ensemble
from rsdlib.data import cosine
from rsdlib.ensemble import DAKL
from rsdlib.errors import BadValueError, ConfigError

rng = np.random.default_rng(0)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def noisy(target, noise):
    return unit(target + noise * unit(rng.normal(size=target.shape)))


@pytest.fixture(scope="module")
def target():
    return unit(rng.normal(size=(300, 16)))


@pytest.fixture(scope="module")
def models(target):
    noises = {"C": 0.7, "U": 1.2, "S": 0.8, "V": 1.0}
    return {name: noisy(target, noise) for name, noise in noises.items()}


def score(pred, target):
    return cosine(pred, target).mean()


# --- the mean -------------------------------------------------------------------------------------


def test_ensemble_of_one_is_itself(models):
    np.testing.assert_allclose(ensemble.mean({"C": models["C"]}), models["C"], atol=1e-7)
    np.testing.assert_allclose(ensemble.mean([models["C"]] * 3), models["C"], atol=1e-7)


def test_mean_by_hand_and_in_any_order(models):
    by_hand = unit(sum(models.values()))
    mean = ensemble.mean(models)
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, by_hand, atol=1e-6)
    np.testing.assert_allclose(ensemble.mean(dict(reversed(models.items()))), mean, atol=1e-6)
    longer = [5 * rows for rows in models.values()]
    np.testing.assert_allclose(ensemble.mean(longer), mean, atol=1e-6)
    weights = {"V": 4, "S": 3, "U": 2, "C": 1}
    by_hand = unit(sum(weights[name] * rows for name, rows in models.items()))
    np.testing.assert_allclose(ensemble.mean(models, weights), by_hand, atol=1e-6)


def test_mean_of_models_with_independent_errors_beats_each(models, target):
    single = [score(rows, target) for rows in models.values()]
    assert score(ensemble.mean(models), target) > max(single)


def test_weights_that_belong_to_other_models_are_refused_k7(models):
    """K7: the original averages 7 predictions with 8 weights, and which weight is whose is lost."""
    rows = list(models.values())
    for number in (3, 5):
        with pytest.raises(
            BadValueError, match=rf"weights are for \[0, .*, {number - 1}\], .* 3\]"
        ):
            ensemble.mean(rows, np.ones(number))
    with pytest.raises(
        BadValueError, match=r"for \[0, 1, 2, 3\], .* \['C', 'U', 'S', 'V'\]. .* name"
    ):
        ensemble.mean(models, np.ones(4))
    with pytest.raises(BadValueError, match=r"'vit'\], the predictions of \['C', 'U', 'S', 'V'\]"):
        ensemble.mean(models, {"C": 1, "U": 1, "S": 1, "vit": 1})
    assert list(ensemble.fit_weights(models, models["C"])) == list(models)


@pytest.mark.parametrize("weights", [[0, 0], [1, -1], [2, -1], [1, np.nan], [1, np.inf]])
def test_weights_must_be_usable(models, weights):
    with pytest.raises(BadValueError, match="not usable"):
        ensemble.mean([models["C"], models["S"]], weights)


def test_broken_predictions_are_named(models):
    with pytest.raises(BadValueError, match="one or more models"):
        ensemble.mean({})
    with pytest.raises(BadValueError, match="same shape"):
        ensemble.mean([models["C"], models["S"][:-1]])
    for value, reason in ((np.nan, "not finite"), (0, "zero")):
        broken = models["S"].copy()
        broken[7] = value
        with pytest.raises(BadValueError, match=f"row 7 of the predictions of S is .*{reason}"):
            ensemble.mean({"C": models["C"], "S": broken})
    with pytest.raises(BadValueError, match="row 0 of the mean is zero"):
        ensemble.mean([models["C"], -models["C"]])


def test_align_takes_away_what_all_have_in_common(models, target):
    known, _ = np.split(models["C"], 2)
    np.testing.assert_allclose(ensemble.align(known, known), known, atol=1e-6)
    shifted = unit(models["C"] + 0.8 * unit(np.ones(16)))
    aligned = ensemble.align(shifted, models["C"])
    assert score(aligned, target) > score(shifted, target) + 0.05
    np.testing.assert_allclose(aligned.mean(axis=0), models["C"].mean(axis=0), atol=0.02)
    with pytest.raises(BadValueError, match="row 3"):
        ensemble.align(np.where(np.arange(9)[:, None] == 3, 0, known[:9]), known)


# --- choices --------------------------------------------------------------------------------------


def test_weights_lie_on_the_simplex_and_are_never_worse(models, target):
    weights = ensemble.fit_weights(models, target)
    values = np.array(list(weights.values()))
    assert values.min() >= 0
    assert values.sum() == pytest.approx(1)
    fitted = score(ensemble.mean(models, weights), target)
    assert fitted >= score(ensemble.mean(models), target) - 1e-7
    assert fitted >= max(score(rows, target) for rows in models.values()) - 1e-7
    for values in rng.dirichlet(np.ones(4), size=200):
        other = ensemble.mean(models, dict(zip(models, values, strict=True)))
        assert fitted >= score(other, target) - 1e-6
    assert ensemble.fit_weights(models, target) == weights


def test_weights_are_not_worse_where_the_optimiser_fails(models, target, monkeypatch):
    lost = np.array([0, 1, 0, 0])
    monkeypatch.setattr(sys.modules["rsdlib.ensemble.mean"], "_descend", lambda loss, start: lost)
    fitted = score(ensemble.mean(models, ensemble.fit_weights(models, target)), target)
    assert fitted >= score(ensemble.mean(models), target) - 1e-7
    assert fitted >= max(score(rows, target) for rows in models.values()) - 1e-7


def test_weights_recover_the_better_model(models, target):
    noise = unit(rng.normal(size=target.shape))
    useless = {"noise": noise, "more noise": np.roll(noise, 1, axis=0)}
    weights = ensemble.fit_weights({"C": models["C"], **useless}, target)
    assert weights["C"] > 0.9
    weights = ensemble.fit_weights(models, target)
    assert sorted(weights, key=weights.get) == ["U", "V", "S", "C"]  # the order of their noise
    np.testing.assert_allclose(
        ensemble.fit_weights([models["C"], target], target), [0, 1], atol=1e-4
    )


def test_target_must_fit(models, target):
    with pytest.raises(BadValueError, match="shape"):
        ensemble.fit_weights(models, target[:-1])


def test_blend_ends(models, target):
    a, b = models["U"], models["C"]
    assert ensemble.fit_weights([a, target], target)[1] == pytest.approx(1, abs=1e-4)
    assert ensemble.fit_weights([target, b], target)[1] == pytest.approx(0, abs=1e-4)
    np.testing.assert_allclose(ensemble.mean([a, b], [1, 0]), a, atol=1e-7)
    np.testing.assert_allclose(ensemble.mean([a, b], [0, 1]), b, atol=1e-7)
    weight = ensemble.fit_weights([a, b], target)[1]
    assert 0.5 < weight < 1
    grid = [score(ensemble.mean([a, b], [1 - w, w]), target) for w in np.linspace(0, 1, 101)]
    assert abs(weight - np.argmax(grid) / 100) <= 0.011


def test_models_that_saw_the_items_mislead_k5(target):
    """K5: the original fits on in-sample predictions: the model that memorises gets the weight."""
    train, val = unit(rng.normal(size=(2, 300, 16)))
    memoriser, learner = [noisy(train, 0.05), noisy(val, 2.0)], [noisy(train, 0.8), noisy(val, 0.8)]
    leaked = ensemble.fit_weights({"memoriser": memoriser[0], "learner": learner[0]}, train)
    honest = ensemble.fit_weights({"memoriser": memoriser[1], "learner": learner[1]}, val)
    assert leaked["memoriser"] > 0.9
    assert honest["learner"] > 0.7
    on_new = {"memoriser": noisy(target, 2.0), "learner": noisy(target, 0.8)}
    honestly, fooled = (score(ensemble.mean(on_new, w), target) for w in (honest, leaked))
    assert honestly > fooled + 0.1


def test_items_that_were_trained_on_are_refused_k5():
    ensemble.check_held_out(["a fox", "a cat"], trained_on=["a dog"])
    with pytest.raises(BadValueError, match="1 of the items were trained on, 'a fox'"):
        ensemble.check_held_out(["a cat", "a fox"], trained_on={"a fox", "a dog"})


def test_choices_on_validation_do_not_flatter_k6(target):
    """K6: the original scores its weights on the items that it fits them on, which reads high.

    With eight models of equal worth on few items the fit's own score is above that of equal
    weights, though nothing is to be gained; on items that it has not read, it is not.
    """
    few, new = target[:20], target[20:]
    on_few, on_new = [], []
    for _ in range(10):
        val, test = [[noisy(part, 3) for _ in range(8)] for part in (few, new)]
        weights = ensemble.fit_weights(val, few)
        on_few.append(score(ensemble.mean(val, weights), few) - score(ensemble.mean(val), few))
        on_new.append(score(ensemble.mean(test, weights), new) - score(ensemble.mean(test), new))
    assert np.mean(on_few) > 0.005
    assert np.mean(on_new) < -0.005


def test_search_leaves_out_what_a_fit_would_refuse(target):
    source = unit(rng.normal(size=(120, 16)))
    X, X_val, least = noisy(source, 0.6), noisy(target, 0.6), ensemble.least_alpha(120, 10**9)
    grid = [20, 120], [0.01], [1.0, 0.9 * least]
    table = ensemble.search_dakl(X, source, X_val, target, *grid, n_targets=10**9)
    scored = set(zip(table["n_clusters"], table["alpha"], strict=True))
    assert scored == {(20, 0.9 * least), (20, 1), (120, 1)}
    assert len(table) == 3
    with pytest.raises(ConfigError, match="lost in float64's rounding"):
        ensemble.search_dakl(X, source, X_val, target, [20], [0.01], [1e-12])


def test_search_scores_each_combination_as_a_fit_would(target):
    source = unit(rng.normal(size=(120, 16)))
    X, X_val = noisy(source, 0.6), noisy(target, 0.6)
    grid = [20, 120], [0.01, 1.0], [1.0]
    table = ensemble.search_dakl(X, source, X_val, target, *grid, random_state=3)
    assert len(table) == 4
    assert table["cosine"].is_monotonic_decreasing
    for row in table.itertuples():
        model = DAKL(row.n_clusters, row.gamma, row.alpha, random_state=3)
        pred = model.fit_predict(X, source, X_val)
        assert row.cosine == pytest.approx(score(pred, target), abs=1e-6)
        assert (row.solver, row.error) == (model.solver_, pytest.approx(model.error_))


# --- neighbours -----------------------------------------------------------------------------------


def test_nearest_equals_brute_force_for_any_block():
    queries, base = unit(rng.normal(size=(9, 8))), unit(rng.normal(size=(300, 8)))
    scores = queries @ base.T
    for block in (7, 64, 1000):
        similarity, index = ensemble.nearest(5 * queries, 3 * base, 5, block)
        np.testing.assert_array_equal(index, np.argsort(-scores, axis=1)[:, :5])
        np.testing.assert_allclose(similarity, np.sort(scores, axis=1)[:, ::-1][:, :5], atol=1e-6)


def test_nearest_refuses_what_cannot_be():
    base = rng.normal(size=(300, 8))
    for k in (0, 301):
        with pytest.raises(BadValueError, match="neighbours"):
            ensemble.nearest(base[:2], base, k)
    with pytest.raises(BadValueError, match="dimensions"):
        ensemble.nearest(base[:2, :7], base, 1)


def test_knn_of_one_neighbour_returns_its_target():
    base, targets = unit(rng.normal(size=(40, 8))), unit(rng.normal(size=(40, 5)))
    np.testing.assert_allclose(ensemble.knn_regress(base, base, targets, k=1), targets, atol=1e-6)


def test_nearest_prompts():
    bank = np.eye(3, dtype=np.float32)
    assert ensemble.nearest_prompts(bank[[2, 0]] + 0.1, bank, ["a", "b", "c"]) == ["c", "a"]
    with pytest.raises(BadValueError, match="3 embeddings do not belong to 2 prompts"):
        ensemble.nearest_prompts(bank, bank, ["a", "b"])
