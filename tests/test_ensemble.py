"""The ensemble: identities of the mean, and choices that read validation alone."""

import inspect

import numpy as np
import pytest

from rsdlib import dakl, ensemble, metrics
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
    return {"C": noisy(target, 0.7), "U": noisy(target, 1.2), "S": noisy(target, 0.8), "V": noisy(target, 1.0)}


def score(pred, target):
    return metrics.cosine(pred, target).mean()


# --- the mean ---------------------------------------------------------------------------------------------------------------


def test_ensemble_of_one_is_itself(models):
    np.testing.assert_allclose(ensemble.mean({"C": models["C"]}), models["C"], atol=1e-7)
    np.testing.assert_allclose(ensemble.mean([models["C"]] * 3), models["C"], atol=1e-7)


def test_mean_by_hand_and_in_any_order(models):
    by_hand = unit(sum(models.values()))
    found = ensemble.mean(models)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, by_hand, atol=1e-6)
    np.testing.assert_allclose(ensemble.mean(dict(reversed(models.items()))), found, atol=1e-6)
    np.testing.assert_allclose(ensemble.mean([5 * rows for rows in models.values()]), found, atol=1e-6)
    weights = {"V": 4, "S": 3, "U": 2, "C": 1}
    by_hand = unit(sum(weights[name] * rows for name, rows in models.items()))
    np.testing.assert_allclose(ensemble.mean(models, weights), by_hand, atol=1e-6)


def test_mean_of_models_with_independent_errors_beats_each(models, target):
    assert score(ensemble.mean(models), target) > max(score(rows, target) for rows in models.values())


def test_weights_that_belong_to_other_models_are_refused_k7(models):
    """K7: the original averages 7 predictions with 8 weights, and which weight is whose is lost."""
    with pytest.raises(BadValueError, match="5 weights for 4 models"):
        ensemble.mean(list(models.values()), np.ones(5))
    with pytest.raises(BadValueError, match="without names"):
        ensemble.mean(models, np.ones(4))
    with pytest.raises(BadValueError, match="Name the same models"):
        ensemble.mean(models, {"C": 1, "U": 1, "S": 1, "vit": 1})
    assert list(ensemble.fit_weights(models, models["C"])) == list(models)


@pytest.mark.parametrize("weights", [[0, 0], [1, -1], [1, np.nan]])
def test_weights_must_be_usable(models, weights):
    with pytest.raises(BadValueError, match="not usable"):
        ensemble.mean([models["C"], models["S"]], weights)


def test_broken_predictions_are_named(models):
    with pytest.raises(BadValueError, match="no predictions"):
        ensemble.mean({})
    with pytest.raises(BadValueError, match="shapes"):
        ensemble.mean([models["C"], models["S"][:-1]])
    for value, reason in ((np.nan, "not finite"), (0, "zero")):
        broken = models["S"].copy()
        broken[7] = value
        with pytest.raises(BadValueError, match=f"row 7 of the predictions of S is {reason}"):
            ensemble.mean({"C": models["C"], "S": broken})
    with pytest.raises(BadValueError, match="row 0 of the mean is zero"):
        ensemble.mean([models["C"], -models["C"]])


def test_subsets_in_the_order_of_table_5():
    names = ["C", "U", "S", "V", "CU", "CS", "CV", "US", "UV", "SV", "CUS", "CUV", "CSV", "USV", "CUSV"]
    assert ["".join(subset) for subset in ensemble.subsets("CUSV")] == names


# --- choices ----------------------------------------------------------------------------------------------------------------


def test_weights_lie_on_the_simplex_and_are_never_worse(models, target):
    weights = ensemble.fit_weights(models, target)
    values = np.array(list(weights.values()))
    assert values.min() >= 0
    assert values.sum() == pytest.approx(1)
    fitted = score(ensemble.mean(models, weights), target)
    assert fitted >= score(ensemble.mean(models), target) - 1e-7
    assert fitted >= max(score(rows, target) for rows in models.values()) - 1e-7
    for other in rng.dirichlet(np.ones(4), size=200):
        assert fitted >= score(ensemble.mean(models, dict(zip(models, other, strict=True))), target) - 1e-6
    assert ensemble.fit_weights(models, target) == weights


def test_weights_recover_the_better_model(models, target):
    noise = unit(rng.normal(size=target.shape))
    weights = ensemble.fit_weights({"noise": noise, "C": models["C"], "more noise": np.roll(noise, 1, axis=0)}, target)
    assert weights["C"] > 0.9
    weights = ensemble.fit_weights(models, target)
    assert weights["C"] > weights["S"] > weights["V"] > weights["U"]  # the order of their noise
    np.testing.assert_allclose(ensemble.fit_weights([models["C"], target], target), [0, 1], atol=1e-4)


def test_target_must_fit(models, target):
    with pytest.raises(BadValueError, match="shape"):
        ensemble.fit_weights(models, target[:-1])


def test_blend_ends(models, target):
    a, b = models["U"], models["C"]
    assert ensemble.fit_blend(a, target, target) == pytest.approx(1, abs=1e-4)
    assert ensemble.fit_blend(target, b, target) == pytest.approx(0, abs=1e-4)
    np.testing.assert_allclose(ensemble.mean([a, b], [1, 0]), a, atol=1e-7)
    np.testing.assert_allclose(ensemble.mean([a, b], [0, 1]), b, atol=1e-7)
    weight = ensemble.fit_blend(a, b, target)
    assert 0.5 < weight < 1
    grid = [score(ensemble.mean([a, b], [1 - w, w]), target) for w in np.linspace(0, 1, 101)]
    assert abs(weight - np.argmax(grid) / 100) <= 0.011


def test_models_that_saw_the_items_mislead_k5(target):
    """K5: the original fits on in-sample predictions, so the model that memorises gets the weight."""
    train, val = unit(rng.normal(size=(2, 300, 16)))
    memoriser, learner = [noisy(train, 0.05), noisy(val, 2.0)], [noisy(train, 0.8), noisy(val, 0.8)]
    leaked = ensemble.fit_weights({"memoriser": memoriser[0], "learner": learner[0]}, train)
    honest = ensemble.fit_weights({"memoriser": memoriser[1], "learner": learner[1]}, val)
    assert leaked["memoriser"] > 0.9
    assert honest["learner"] > 0.7
    on_new = {"memoriser": noisy(target, 2.0), "learner": noisy(target, 0.8)}
    assert score(ensemble.mean(on_new, honest), target) > score(ensemble.mean(on_new, leaked), target) + 0.1


def test_items_that_were_trained_on_are_refused_k5():
    ensemble.check_held_out(["a fox", "a cat"], trained_on=["a dog"])
    with pytest.raises(BadValueError, match="1 of the items were trained on, 'a fox'"):
        ensemble.check_held_out(["a cat", "a fox"], trained_on={"a fox", "a dog"})


def test_no_function_takes_a_test_label_k6():
    """K6: the original scores its weights on the test set. Here targets of the images in question cannot be handed in."""
    functions = [
        member for member in vars(ensemble).values() if inspect.isfunction(member) and member.__module__ == ensemble.__name__
    ]
    methods = [member for _, member in inspect.getmembers(dakl.DAKL, inspect.isfunction)]
    names = {name for function in (*functions, *methods, dakl.cluster) for name in inspect.signature(function).parameters}
    assert {"target", "Y_val", "X_target"} <= names
    assert not [name for name in names if "test" in name or name in {"Y_target", "y_target"}]
    assert not hasattr(dakl.DAKL, "score")
    assert list(inspect.signature(ensemble.mean).parameters) == ["predictions", "weights"]
    assert list(inspect.signature(dakl.DAKL.predict).parameters) == ["self", "X_target"]


def test_search_leaves_out_what_a_fit_would_refuse(target):
    source = unit(rng.normal(size=(120, 16)))
    X, X_val, least = noisy(source, 0.6), noisy(target, 0.6), dakl.least_alpha(120, 10**9)
    grid = [20, 120], [0.01], [1.0, 0.9 * least]
    table = ensemble.search_dakl(X, source, X_val, target, *grid, n_targets=10**9)
    assert table[["n_clusters", "alpha"]].sort_values(["n_clusters", "alpha"]).to_numpy().tolist() == [
        [20, 0.9 * least],
        [20, 1],
        [120, 1],
    ]
    with pytest.raises(ConfigError, match="lost in float64's rounding"):
        ensemble.search_dakl(X, source, X_val, target, [20], [0.01], [1e-12])


def test_search_scores_each_combination_as_a_fit_would(target):
    source = unit(rng.normal(size=(120, 16)))
    X, X_val = noisy(source, 0.6), noisy(target, 0.6)
    table = ensemble.search_dakl(X, source, X_val, target, [20, 120], [0.01, 1.0], [1.0], random_state=3)
    assert len(table) == 4
    assert table["cosine"].is_monotonic_decreasing
    for row in table.itertuples():
        model = dakl.DAKL(row.n_clusters, row.gamma, row.alpha, random_state=3)
        assert row.cosine == pytest.approx(score(model.fit_predict(X, source, X_val), target), abs=1e-6)
