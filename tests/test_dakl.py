"""DAKL: the kernel is its formula, the solvers are one solution or refuse, and every fault of the original has a test."""

import inspect

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.kernel_ridge import KernelRidge
from sklearn.utils.estimator_checks import check_estimator

from rsdlib import dakl
from rsdlib.dakl import DAKL, kernel
from rsdlib.errors import BadValueError, ConfigError

GAMMAS = [1e-4, 1e-3, 1e-2, 0.1, 1.0, 5.0]


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def made_up(n, seed, d=24, topics=12, noise=0.8):
    """Return predictions (n, d) and their targets (n, d): topics around a common direction, as prompts have."""
    world, generator = np.random.default_rng(7), np.random.default_rng(seed)
    centres = unit(world.normal(size=d)) + unit(world.normal(size=(topics, d)))
    Y = unit(centres[generator.integers(topics, size=n)] + 0.7 * unit(generator.normal(size=(n, d))))
    return unit(Y + noise * unit(generator.normal(size=(n, d)))), Y


@pytest.fixture(scope="module")
def data():
    """Return source predictions, their targets, and target predictions."""
    return *made_up(80, 0), made_up(200, 1)[0]


def by_definition(S, Y, T, gamma, alpha):
    """Return scikit-learn's ridge over the rows of K', unit rows."""
    K = np.exp(-gamma * (1 - np.vstack([S, T]) @ np.vstack([S, T]).T) / 2)
    return unit(KernelRidge(kernel="linear", alpha=alpha).fit(K[: len(S)], Y).predict(K[len(S) :]))


def distance(a, b):
    """Return the root mean square distance of two sets of unit rows."""
    return float(np.sqrt(np.square(a - b).sum(axis=1).mean()))


# --- the kernel -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", GAMMAS)
def test_kernel_is_its_formula(gamma):
    Z, _ = made_up(60, 3)
    K = kernel(Z, gamma)
    loop = [[np.exp(-gamma * (1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b))) / 2) for b in Z] for a in Z]
    assert K.dtype == np.float64
    np.testing.assert_allclose(K, loop, rtol=0, atol=1e-12)
    np.testing.assert_allclose(K, K.T, rtol=0, atol=1e-14)
    np.testing.assert_allclose(np.diag(K), 1, rtol=0, atol=1e-12)
    assert np.linalg.eigvalsh(K).min() > -1e-10
    assert K[~np.eye(len(K), dtype=bool)].std() > 0


def repeated_exponential(Z, gamma):
    """Return the original's kernel: the exponential of the whole matrix, once per row."""
    K = unit(Z) @ unit(Z).T
    for _ in Z:
        K = np.exp(-gamma * (1 - K) / 2)
    return K


def test_kernel_is_not_constant_k1():
    """K1: the original's kernel is one everywhere, and a regression on it predicts one point for every row."""
    (S, Y), (T, _) = made_up(40, 0), made_up(20, 1)
    wrong = repeated_exponential(np.vstack([S, T]), 0.01)
    assert np.ptp(wrong) == 0
    constant = KernelRidge(kernel="linear", alpha=10).fit(wrong[:40], Y).predict(wrong[40:])
    np.testing.assert_allclose(constant, np.repeat(constant[:1], 20, axis=0), atol=1e-12)
    K = kernel(np.vstack([S, T]), 0.01)
    assert np.linalg.matrix_rank(wrong) == 1
    assert np.linalg.matrix_rank(K, tol=1e-6) > 20
    assert dakl.effective_rank(wrong) == pytest.approx(1)
    assert dakl.effective_rank(K) > 1 + 1e-3
    for solver in ("affine", "primal", "direct"):
        found = DAKL(40, 0.01, solver=solver).fit_predict(S, Y, T)
        assert len(np.unique(found.round(6), axis=0)) == 20


def test_length_of_rows_does_not_matter_k2(data):
    """K2: the original overwrites the diagonal while it normalises with it, which is wrong for rows of another length than one."""
    X, Y, T = data
    lengths = np.random.default_rng(0).uniform(0.2, 5, size=(len(X), 1))
    np.testing.assert_allclose(kernel(lengths * X, 0.5), kernel(X, 0.5), rtol=0, atol=1e-12)
    overwritten = (lengths * X) @ (lengths * X).T
    for i in range(len(X)):
        for j in range(len(X)):
            overwritten[i, j] /= np.sqrt(overwritten[i, i] * overwritten[j, j])
    assert np.abs(overwritten - X @ X.T).max() > 0.1
    plain, scaled = (DAKL(len(X)).fit_predict(*rows, T) for rows in ((X, Y), (lengths * X, 3 * lengths * Y)))
    np.testing.assert_allclose(scaled, plain, atol=1e-6)


def test_effective_rank_and_report(data):
    assert dakl.effective_rank(np.eye(7)) == pytest.approx(7)
    assert dakl.effective_rank(np.ones((7, 7))) == pytest.approx(1)
    wide, narrow = (dakl.report(data[0], gamma, alpha=10, rows=50) for gamma in (1e-3, 5.0))
    assert wide.rows == narrow.rows == 50
    assert 1 < wide.effective_rank < 1.01 < narrow.effective_rank < 50
    assert wide.centred_rank > 5
    assert wide.condition == pytest.approx(1 + 50**2 / 10, rel=0.01)  # one eigenvalue of 50, the others nearly 0
    assert dakl.report(data[0], 5.0, alpha=10, rows=50) == narrow


# --- the solvers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.1, 10.0])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_solvers_are_the_ridge_over_rows_of_the_kernel(data, gamma, alpha):
    X, Y, T = data
    reference = by_definition(X, Y, T, gamma, alpha)
    for solver in ("direct", "primal"):
        assert distance(DAKL(80, gamma, alpha, solver=solver).fit_predict(X, Y, T), reference) < 1e-6
    auto = DAKL(80, gamma, alpha).fit(X, Y, T)
    found = distance(auto.predict(T), reference)
    assert found <= 1e-4
    affine = DAKL(80, gamma, alpha, solver="affine")
    if auto.solver_ == "affine":
        np.testing.assert_array_equal(affine.fit_predict(X, Y, T), auto.predict(T))
        assert found < auto.error_ + 1e-7  # the certificate holds, up to float32 output
    else:
        assert auto.error_ > auto.tol
        with pytest.raises(ConfigError, match="certified error"):
            affine.fit(X, Y, T)


def test_small_gammas_are_affine_and_large_ones_are_not(data):
    used = [DAKL(80, gamma).fit(*data).solver_ for gamma in GAMMAS]
    assert used[:3] == ["affine"] * 3
    assert used[-2:] == ["primal"] * 2


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("uniform", [True, False])
def test_certificate_holds_and_is_not_idle(seed, uniform):
    (S, Y), (T, _) = (made_up(n, seed, noise=20 if uniform else 0.8) for n in (60, 150))
    for gamma, alpha in ((0.01, 10), (0.01, 0.1), (0.1, 10)):
        bounded = DAKL(60, gamma, alpha, solver="affine", tol=1, random_state=seed).fit(S, Y, T)
        probed = DAKL(60, gamma, alpha, tol=1e-9, random_state=seed).fit(S, Y, T)
        found = distance(bounded.predict(T), by_definition(S, Y, T, gamma, alpha))
        assert found - 1e-7 < probed.error_ < 10 * found + 1e-6
        assert probed.error_ < bounded.error_ < 1


def test_the_centroid_of_two_takes_the_first_ones_target():
    """Both are as near: rounding, and with it the number of threads, must not choose."""
    pairs = unit(np.random.default_rng(0).normal(size=(20, 1, 24)) + 0.2 * np.random.default_rng(1).normal(size=(20, 2, 24)))
    X = pairs.transpose(1, 0, 2).reshape(40, 24)  # the first of each pair, then the second
    for rows in (X, X[:, ::-1]):
        centroids, targets = dakl.cluster(rows, rows, 20, random_state=0)
        members = unit(rows[:20] + rows[20:])
        assert (np.abs(centroids @ members.T).max(axis=1) > 1 - 1e-6).all()
        np.testing.assert_allclose(targets, rows[:20][(centroids @ members.T).argmax(axis=1)], atol=1e-6)


@pytest.mark.parametrize("alpha", [1e-3, 0.1, 10.0])
def test_each_norm_is_bounded_ever_more_closely(alpha):
    """The four spectral norms that the certificate is made of, against their dense matrices."""
    generator = np.random.default_rng(0)
    U_s, U_t, Y = generator.normal(size=(40, 9)), generator.normal(size=(70, 9)), unit(generator.normal(size=(40, 5)))
    A = U_s.T @ U_s + alpha * np.eye(9)
    half = np.linalg.inv(np.linalg.cholesky(A))
    beta = half @ U_s.T @ Y
    theta = half.T @ beta
    E = Y - U_s @ theta
    true = [np.linalg.norm(m, 2) for m in (U_t @ np.linalg.inv(A), U_t @ np.linalg.inv(A) @ U_s.T, E, theta)]
    levels = np.array([list(level) for level in dakl._norms(half, half @ U_t.T @ U_t @ half.T, Y, beta, theta, alpha)])
    assert levels.shape == (3, 4)
    assert (levels >= np.array(true) * (1 - 1e-9)).all()
    assert (np.diff(levels, axis=0) <= 1e-9).all()
    np.testing.assert_allclose(levels[-1][[0, 2, 3]], np.array(true)[[0, 2, 3]], rtol=1e-6)
    assert levels[-1][1] <= true[1] * (1 + alpha)


def test_blocks_change_nothing(data, monkeypatch):
    X, Y, T = data
    whole = DAKL(80, 1.0).fit_predict(X, Y, T)
    monkeypatch.setattr(dakl, "_blocks", lambda n, width: (slice(start, start + 7) for start in range(0, n, 7)))
    np.testing.assert_allclose(DAKL(80, 1.0).fit_predict(X, Y, T), whole, atol=1e-6)


def test_fewer_samples_than_dimensions():
    (S, Y), (T, _) = made_up(3, 0), made_up(2, 1)
    for gamma in (0.01, 2.0):
        assert distance(DAKL(3, gamma).fit_predict(S, Y, T), by_definition(S, Y, T, gamma, 10)) < 1e-4
    assert DAKL(1).fit_predict(S[:1], Y[:1], T[:1]).shape == (1, 24)


@pytest.mark.parametrize("gamma", [0.01, 2.0])
def test_other_rows_are_described_by_the_same_landmarks(data, gamma):
    X, Y, T = data
    new, _ = made_up(30, 9)
    model = DAKL(80, gamma).fit(X, Y, T)
    K = np.exp(-gamma * (1 - np.vstack([X, new]) @ np.vstack([X, T]).T) / 2)
    reference = unit(KernelRidge(kernel="linear", alpha=10).fit(K[:80], Y).predict(K[80:]))
    assert distance(model.predict(new), reference) < 1e-4
    np.testing.assert_allclose(model.predict(T[50:60]), model.predict(T)[50:60], atol=1e-6)
    np.testing.assert_array_equal(model.landmarks_, np.vstack([X, T]) / np.linalg.norm(np.vstack([X, T]), axis=1, keepdims=True))


def test_affine_refuses_rows_it_errs_on(data):
    X, Y, T = data
    just_enough = 1.01 * DAKL(80, 0.1).fit(X, Y, T).error_
    model = DAKL(80, 0.1, solver="affine", tol=just_enough).fit(X, Y, T)
    model.predict(T)
    with pytest.raises(BadValueError, match="unlike those of the fit"):
        model.predict(-T)


def test_prediction_depends_on_the_target_domain(data):
    X, Y, T = data
    other = np.vstack([T, made_up(200, 5)[0] - 0.5])
    assert distance(DAKL(80, 2.0).fit_predict(X, Y, T), DAKL(80, 2.0).fit(X, Y, other).predict(T)) > 1e-3


# --- centroids --------------------------------------------------------------------------------------------------------------


def test_as_many_clusters_as_samples_are_the_samples(data):
    X, Y, _ = data
    centroids, targets = dakl.cluster(X, Y, len(X))
    np.testing.assert_allclose(centroids, X, atol=1e-15)
    np.testing.assert_allclose(targets, Y, atol=1e-15)


def test_targets_of_centroids(data):
    X, Y, _ = data
    centroids, nearest = dakl.cluster(X, Y, 12)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1)
    np.testing.assert_allclose(nearest, Y[(centroids @ X.T).argmax(axis=1)])
    same, means = dakl.cluster(X, Y, 12, "mean")
    np.testing.assert_array_equal(same, centroids)
    members = (X @ centroids.T).argmax(axis=1)
    np.testing.assert_allclose(means, unit(np.stack([Y[members == c].sum(axis=0) for c in range(12)])), atol=1e-12)


def test_members_that_cancel_keep_the_nearest_target():
    X = np.repeat(np.eye(4)[:2], 2, axis=0) + 0.01 * np.eye(4)
    Y = np.array([[1.0, 0], [-1, 0], [0, 1], [0, 1]])
    targets = dakl.cluster(X, Y, 2, "mean")[1]
    assert sorted(np.abs(targets).round(6).tolist()) == [[0, 1], [1, 0]]


def test_same_seed_same_prediction_k4(data):
    """K4: the original's clustering has no seed, so no number of it can be repeated."""
    X, Y, T = data
    found = []
    for global_seed in (1, 2):
        np.random.seed(global_seed)  # noqa: NPY002
        found.append(DAKL(20, 1.0).fit_predict(X, Y, T))
    np.testing.assert_array_equal(*found)
    np.testing.assert_array_equal(*(DAKL(20, 1.0, random_state=4).fit_predict(X, Y, T) for _ in range(2)))
    assert np.abs(DAKL(20, 1.0, random_state=4).fit_predict(X, Y, T) - found[0]).max() > 1e-4
    with pytest.raises(ConfigError, match="random_state"):
        DAKL(20, random_state=np.random.RandomState(0)).fit(X, Y, T)


def inertia(X, centroids):
    return float((2 - 2 * (X @ unit(centroids).T).max(axis=1)).sum())


def test_many_clusters_with_faiss(data, monkeypatch):
    X = data[2].astype(np.float32)
    small = dakl._kmeans(X, 12, 25, 0)
    monkeypatch.setattr(dakl, "_SMALL", 0)
    large = dakl._kmeans(X, 12, 25, 0)
    np.testing.assert_array_equal(large, dakl._kmeans(X, 12, 25, 0))
    assert inertia(X, large) < 1.1 * inertia(X, small)


def test_predictions_that_saw_their_target_mislead_k5():
    """K5: fitted on in-sample predictions, the regression trusts its input; out-of-fold predictions teach it to shrink."""
    (in_sample, Y), (T, truth) = made_up(300, 0, noise=0.05), made_up(300, 1, noise=1.5)
    held_out, same = made_up(300, 0, noise=1.5)
    np.testing.assert_array_equal(same, Y)
    leaked, honest = (DAKL(300, 2.0, 1.0).fit_predict(X, Y, T) for X in (in_sample, held_out))
    assert (honest * truth).sum(axis=1).mean() > (leaked * truth).sum(axis=1).mean() + 0.02


# --- a scikit-learn estimator -----------------------------------------------------------------------------------------------


class OneDomain(DAKL):
    """`DAKL` as scikit-learn's checks fit it: the target domain is the source, and a number is an angle."""

    def fit(self, X, y):
        values = np.unique(np.asarray(y).astype(str), return_inverse=True)[1] if np.asarray(y).dtype.kind in "OUc" else y
        angle = np.asarray(values, float).reshape(len(y), -1)[:, 0]
        model = DAKL(len(y), self.gamma, self.alpha).fit(X, np.stack([np.cos(angle), np.sin(angle)], axis=1), X)
        vars(self).update({name: value for name, value in vars(model).items() if name.endswith("_")})
        return self


NOT_OURS = {
    "check_fit_score_takes_y": "fit_predict takes the target domain too",
    "check_n_features_in_after_fitting": "the error says X_target, not X",
    "check_estimators_nan_inf": "the error says which row",
    "check_estimators_dtypes": "the data has a zero row, which has no direction",
    "check_dtype_object": "what is no number is a BadValueError, not a TypeError",
}


def test_check_estimator():
    found = check_estimator(OneDomain(), expected_failed_checks=NOT_OURS, on_skip=None)
    assert sum(result["status"] == "passed" for result in found) >= 35


def test_parameters_follow_the_conventions(data):
    model = DAKL(20, gamma=0.5, random_state=1)
    assert list(model.get_params()) == sorted(inspect.signature(DAKL).parameters)
    copy = clone(model.set_params(alpha=3.0))
    assert copy.get_params() == model.get_params()
    assert not [name for name in vars(copy) if name.endswith("_")]
    assert model.fit(*data) is model
    assert model.n_features_in_ == 24
    assert model.landmarks_.shape == (220, 24)
    assert model.centroid_targets_.shape == (20, 24)
    before = model.predict(data[2])
    np.testing.assert_array_equal(model.fit(*data).predict(data[2]), before)
    np.testing.assert_array_equal(copy.fit_predict(*data), before)
    assert before.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(before, axis=1), 1, atol=1e-6)
    with pytest.raises(NotFittedError):
        DAKL().predict(data[2])


def test_inputs_are_left_as_they_are(data):
    copies = [rows.copy() for rows in data]
    for rows in copies:
        rows.flags.writeable = False
    DAKL(20, 1.0).fit_predict(*copies)
    for rows, copy in zip(data, copies, strict=True):
        np.testing.assert_array_equal(rows, copy)


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"gamma": 0}, "gamma = 0 "),
        ({"gamma": np.nan}, "gamma"),
        ({"alpha": -1.0}, "alpha"),
        ({"alpha": "10"}, "alpha"),
        ({"alpha": 1e-12}, "rounding"),
        ({"tol": 0}, "tol"),
        ({"n_clusters": 0}, "n_clusters"),
        ({"n_clusters": 2.5}, "n_clusters"),
        ({"max_iter": 0}, "max_iter"),
        ({"solver": "svd"}, "solver = 'svd'"),
        ({"centroid_target": "median"}, "centroid_target"),
        ({"random_state": "a"}, "random_state"),
    ],
)
def test_parameters_outside_their_range_are_named(data, parameters, reason):
    with pytest.raises(ConfigError, match=reason):
        DAKL(**{"n_clusters": 20, **parameters}).fit(*data)


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize(("value", "reason"), [(np.nan, "not finite"), (np.inf, "not finite"), (0, "zero")])
def test_rows_without_direction_are_named(data, position, value, reason):
    broken = [rows.copy() for rows in data]
    broken[position][5] = value
    with pytest.raises(BadValueError, match=f"row 5 of {('X', 'Y', 'X_target')[position]} is {reason}"):
        DAKL(20).fit(*broken)


def test_arrays_that_do_not_fit_are_named(data):
    X, Y, T = data
    model = DAKL(20).fit(X, Y, T)
    for arrays, reason in (
        ((X, Y[:-1], T), "X has 80 rows, Y has 79"),
        ((X, Y, T[:, :-1]), "X_target has 23 features"),
        ((X, Y, T[:0]), "X_target is not a matrix"),
        ((X[:0], Y[:0], T), "X is not a matrix"),
        ((X[0], Y, T), "X is not a matrix"),
        ((X, Y[:, 0], T), "Y is not a matrix"),
        ((X[:19], Y[:19], T), "n_clusters = 20, but there are 19"),
    ):
        with pytest.raises(BadValueError, match=reason):
            DAKL(20).fit(*arrays)
    with pytest.raises(BadValueError, match="24 features"):
        model.predict(T[:, :5])
    with pytest.raises(BadValueError, match="row 0 of X_target"):
        model.predict(np.full((1, 24), np.nan))
