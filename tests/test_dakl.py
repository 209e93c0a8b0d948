"""DAKL: the kernel is its formula, the solvers are one solution or refuse, every step of the
affine form's derivation holds, and every fault of the original has a test."""

import inspect

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.kernel_ridge import KernelRidge
from sklearn.utils.estimator_checks import check_estimator

from rsdlib import ensemble
from rsdlib.ensemble import DAKL, affine, dakl, kernel
from rsdlib.errors import BadValueError, ConfigError

GAMMAS = [1e-4, 1e-3, 1e-2, 0.1, 1.0, 5.0]


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def made_up(n, seed, d=24, topics=12, noise=0.8):
    """Return predictions and their targets (n, d): topics around one direction, as prompts have."""
    world, generator = np.random.default_rng(7), np.random.default_rng(seed)
    centres = unit(world.normal(size=d)) + unit(world.normal(size=(topics, d)))
    Y = unit(
        centres[generator.integers(topics, size=n)] + 0.7 * unit(generator.normal(size=(n, d)))
    )
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


# --- the kernel -----------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", GAMMAS)
def test_kernel_is_its_formula(gamma):
    Z, _ = made_up(60, 3)
    K = kernel(Z, Z, gamma)
    loop = [
        [np.exp(-gamma * (1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b))) / 2) for b in Z]
        for a in Z
    ]
    assert K.dtype == np.float64
    np.testing.assert_allclose(K, loop, rtol=0, atol=1e-12)
    np.testing.assert_allclose(K, K.T, rtol=0, atol=1e-14)
    np.testing.assert_allclose(np.diag(K), 1, rtol=0, atol=1e-12)
    assert np.linalg.eigvalsh(K).min() > -1e-10
    assert K[~np.eye(len(K), dtype=bool)].std() > 0


@pytest.mark.parametrize("solver", ["affine", "primal"])
def test_rows_are_told_apart_k1(solver):
    """K1: the original's kernel is one everywhere, and its regression gives one answer for all."""
    (S, Y), (T, truth) = made_up(40, 0), made_up(20, 1)
    K = kernel(np.vstack([S, T]), np.vstack([S, T]), 0.01)
    assert np.linalg.matrix_rank(K, tol=1e-6) > 20
    assert np.linalg.eigvalsh(K)[-2] > 1e-6
    answers = DAKL(40, 0.01, alpha=0.01, solver=solver).fit_predict(S, Y, T)
    assert len(np.unique(answers.round(6), axis=0)) == 20
    similarity = unit(answers - answers.mean(axis=0)) @ unit(truth - truth.mean(axis=0)).T
    own, others = np.diag(similarity), similarity[~np.eye(20, dtype=bool)]
    assert own.mean() > others.mean() + 0.3  # and they differ as the truth does


def test_length_of_rows_does_not_matter_k2(data):
    """K2: the original normalises with a diagonal that it overwrites: wrong for other lengths."""
    X, Y, T = data
    lengths = np.random.default_rng(0).uniform(0.2, 5, size=(len(X), 1))
    np.testing.assert_allclose(freedom(lengths * X, T, 0.5, [1.0]), freedom(X, T, 0.5, [1.0]))
    plain = DAKL(len(X)).fit_predict(X, Y, T)
    scaled = DAKL(len(X)).fit_predict(lengths * X, 3 * lengths * Y, 7 * T)
    np.testing.assert_allclose(scaled, plain, atol=1e-6)


# --- degrees of freedom ---------------------------------------------------------------------------

freedom = ensemble.degrees_of_freedom


@pytest.mark.parametrize("gamma", GAMMAS)
def test_degrees_of_freedom_are_the_trace_of_the_fit(data, gamma):
    S, T = data[0][:30], data[2]
    phi = kernel(S, np.vstack([S, T]), gamma)
    for alpha in (1e-2, 10.0):
        hat = phi @ phi.T @ np.linalg.inv(phi @ phi.T + alpha * np.eye(len(S)))
        assert freedom(S, T, gamma, [alpha]) == pytest.approx(np.trace(hat), rel=1e-6)


def test_without_a_ridge_they_are_the_rank(data):
    S, T = data[0][:30], data[2]
    assert freedom(S, T, 1.0, [1e-9]) == pytest.approx(30, abs=1e-3)
    repeated = S[np.arange(30) % 10]
    assert freedom(repeated, T, 1.0, [1e-9]) == pytest.approx(10, abs=1e-3)


def test_rows_that_are_all_alike_leave_one_eigenvalue():
    S, T = np.ones((20, 5)), np.ones((30, 5))
    (alone,) = freedom(S, T, 1.0, [10.0])
    assert alone == pytest.approx(1000 / 1010)  # of A A^T, all ones times n: r (r + t)


def test_they_fall_with_the_ridge_and_rise_with_the_kernels_width(data):
    S, T = data[0], data[2]
    table = np.array([freedom(S, T, gamma, [1e-2, 1.0, 10.0]) for gamma in (1e-3, 1e-2, 0.1, 1.0)])
    assert (np.diff(table, axis=1) < 0).all()
    assert (np.diff(table, axis=0) > 0).all()


def test_with_one_of_them_the_answer_is_constant_and_with_many_it_is_not(data):
    X, Y, T = data
    for alpha, constant in ((10.0, True), (1e-4, False)):
        pred = DAKL(len(X), 1e-3, alpha, solver="primal").fit_predict(X, Y, T)
        assert (freedom(X, T, 1e-3, [alpha])[0] < 1.01) == constant
        assert ((pred @ unit(Y.sum(axis=0))).min() > 0.999) == constant


@pytest.mark.parametrize("gamma", GAMMAS)
def test_rows_stand_for_their_copies(data, gamma):
    S, T = data[0][:20], data[2][:50]
    copies = np.tile(S, (4, 1)), np.tile(T, (3, 1))
    whole = freedom(*copies, gamma, [1e-2, 10.0])
    np.testing.assert_allclose(freedom(S, T, gamma, [1e-2, 10.0], r=80, t=150), whole, rtol=1e-6)


def test_a_part_stands_for_new_rows_too():
    S, T = made_up(450, 5)[0], made_up(1200, 6)[0]
    for gamma in (1e-3, 1e-2, 0.1):
        whole = freedom(S, T, gamma, [1.0, 10.0])
        part = freedom(S[:150], T[:400], gamma, [1.0, 10.0], r=450, t=1200)
        np.testing.assert_allclose(part, whole, rtol=0.05)


# --- the solvers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.1, 10.0])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_solvers_are_the_ridge_over_rows_of_the_kernel(data, gamma, alpha):
    X, Y, T = data
    reference = by_definition(X, Y, T, gamma, alpha)
    primal = DAKL(80, gamma, alpha, solver="primal").fit_predict(X, Y, T)
    assert distance(primal, reference) < 1e-6
    auto = DAKL(80, gamma, alpha).fit(X, Y, T)
    error = distance(auto.predict(T), reference)
    assert error <= 1e-4
    forced = DAKL(80, gamma, alpha, solver="affine")
    if auto.solver_ == "affine":
        np.testing.assert_array_equal(forced.fit_predict(X, Y, T), auto.predict(T))
        assert error < auto.error_ + 1e-7  # the certificate holds, up to float32 output
    else:
        assert auto.error_ > auto.tol
        with pytest.raises(ConfigError, match="certified error"):
            forced.fit(X, Y, T)


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
        error = distance(bounded.predict(T), by_definition(S, Y, T, gamma, alpha))
        assert error - 1e-7 < probed.error_ < 10 * error + 1e-6
        assert probed.error_ < bounded.error_ < 1


def test_the_centroid_of_two_takes_the_first_ones_target():
    """Both are as near: rounding, and with it the number of threads, must not choose."""
    pairs = unit(
        np.random.default_rng(0).normal(size=(20, 1, 24))
        + 0.2 * np.random.default_rng(1).normal(size=(20, 2, 24))
    )
    X = pairs.transpose(1, 0, 2).reshape(40, 24)  # the first of each pair, then the second
    for rows in (X, X[:, ::-1]):
        centroids, targets = ensemble.cluster(rows, rows, 20, random_state=0)
        members = unit(rows[:20] + rows[20:])
        assert (np.abs(centroids @ members.T).max(axis=1) > 1 - 1e-6).all()
        np.testing.assert_allclose(
            targets, rows[:20][(centroids @ members.T).argmax(axis=1)], atol=1e-6
        )


# --- the affine form's derivation -----------------------------------------------------------------


class Dense:
    """What the derivation in `rsdlib.ensemble.affine` speaks of, as whole matrices."""

    def __init__(self, gamma, alpha=0.1):
        (S, self.Y), (T, _) = made_up(40, 0), made_up(70, 1)
        self.gamma, self.alpha, self.r = gamma, alpha, len(S)
        Z = np.vstack([S, T])
        self.F = np.hstack([np.ones((len(Z), 1)), Z])
        self.C = Z @ Z.T
        self.K = kernel(Z, Z, gamma)
        self.cosines = affine._sample_cosines(Z, seed=0)
        self.line = affine._fit_polynomial(self.cosines, gamma, degree=1)
        self.curve = affine._fit_polynomial(self.cosines, gamma, degree=2)
        F_s, F_t = self.F[: self.r], self.F[self.r :]
        self.ridge = affine._solve(F_s, F_t, self.Y, self.line, alpha)
        self.U = self.F @ self.ridge.Q
        self.O = self.F @ np.linalg.inv(self.ridge.B).T
        self.E = self.Y - self.U[: self.r] @ self.ridge.theta

    def predict(self, K):
        """Return equation (1) with `K` for K'."""
        phi = K[: self.r]
        return (
            K[self.r :] @ phi.T @ np.linalg.solve(phi @ phi.T + self.alpha * np.eye(self.r), self.Y)
        )

    def first_order(self, R):
        """Return equation (2)."""
        U_s, U_t, R_s, R_t = *np.split(self.U, [self.r]), *np.split(R, [self.r])
        O_theta = self.O @ self.ridge.theta
        inner = self.O.T @ R_s.T @ self.E - U_s.T @ R_s @ O_theta
        A = U_s.T @ U_s + self.alpha * np.eye(U_s.shape[1])
        return U_t @ np.linalg.solve(A, inner) + R_t @ O_theta


@pytest.fixture(params=[0.01, 1.0])
def dense(request):
    return Dense(request.param)


def test_axes_and_solution_are_those_of_the_line(dense):
    """Steps 1 to 3."""
    ridge, L, p = dense.ridge, dense.line(dense.C), dense.F.shape[1]
    np.testing.assert_allclose(dense.O.T @ dense.O, np.eye(p), atol=1e-9)
    np.testing.assert_allclose(dense.U @ dense.O.T, L, atol=1e-9)
    U_s, U_t = np.split(dense.U, [dense.r])
    A = U_s.T @ U_s + dense.alpha * np.eye(p)
    np.testing.assert_allclose(ridge.M.T @ ridge.M @ A, np.eye(p), atol=1e-6)
    np.testing.assert_allclose(ridge.N, ridge.M @ U_t.T @ U_t @ ridge.M.T, atol=1e-9)
    np.testing.assert_allclose(U_t @ ridge.theta, dense.predict(L), atol=1e-9)
    np.testing.assert_allclose(ridge.V @ ridge.beta, ridge.Q @ ridge.theta, atol=1e-9)


def test_first_order_error_is_the_derivative(dense):
    """Step 4, by central differences along R."""
    L = dense.line(dense.C)
    R = dense.K - L
    step = 1e-3 / np.linalg.norm(R)
    slope = (dense.predict(L + step * R) - dense.predict(L - step * R)) / (2 * step)
    expected = dense.first_order(R)
    assert np.abs(expected).max() > 1e-6
    np.testing.assert_allclose(slope, expected, atol=1e-4 * np.abs(expected).max())


def test_bound_of_the_norm_holds_and_is_not_idle(dense):
    """Step 5."""
    for polynomial in (dense.line, dense.curve):
        bound = affine._bound_norm(dense.cosines, dense.gamma, polynomial, len(dense.K))
        true = np.linalg.norm(dense.K - polynomial(dense.C))
        assert true < bound < 10 * true


@pytest.mark.parametrize("alpha", [1e-4, 0.1, 100])
def test_first_certificate_holds_for_any_error(alpha):
    """Step 6: for what moves the prediction most through E, through theta, and directly."""
    dense = Dense(gamma=1.0, alpha=alpha)
    r, O_theta = dense.r, dense.O @ dense.ridge.theta
    generator = np.random.default_rng(0)
    through_E, through_theta, direct = (np.zeros_like(dense.K) for _ in range(3))
    through_E[:r] = top(dense.E)[0] @ dense.O[:, :1].T
    through_theta[:r] = generator.normal(size=(r, 1)) @ top(O_theta)[0].T
    direct[r:] = generator.normal(size=(len(dense.K) - r, 1)) @ top(O_theta)[0].T
    errors = [through_E, through_theta, direct, generator.normal(size=dense.K.shape)]
    true = [np.linalg.norm(dense.first_order(R)) / np.linalg.norm(R) for R in errors]
    gains = [affine._gain(*norms) for norms in affine._norms(dense.ridge, dense.Y, alpha)]
    assert (np.diff(gains) <= 1e-9 * gains[0]).all()
    assert max(true) <= gains[-1] < 100 * max(true)
    np.testing.assert_allclose(true[2], np.linalg.norm(dense.ridge.theta, 2))


def top(matrix):
    """Return the first left and right singular vectors as columns."""
    left, _, right = np.linalg.svd(matrix)
    return left[:, :1], right[:1].T


def test_probe_is_the_first_order_error_of_the_parabola(dense, monkeypatch):
    """Step 7: three random columns, computed without any n x n matrix, and as many as one likes."""
    p = dense.curve - dense.line
    P, v = p(dense.C), np.random.default_rng(0).normal(size=len(dense.C))
    product = P @ v
    computed = affine._times(p, dense.F, v)(dense.F)
    np.testing.assert_allclose(computed, product, atol=1e-5 * np.abs(product).max())
    draws = np.random.default_rng(1).normal(size=(3, dense.Y.shape[1]))
    monkeypatch.setattr(affine.runtime, "rng", lambda *_: Drawn(draws))
    by_hand = np.linalg.norm(dense.first_order(P) @ draws.T) / np.sqrt(3)
    probed = affine._probe(dense.ridge, p, dense.F, dense.E, seed=0)
    assert probed == pytest.approx(by_hand, rel=1e-3)


class Drawn:
    """A generator that has drawn already."""

    def __init__(self, values):
        self.values = values

    def normal(self, size):
        assert size == self.values.shape
        return self.values


@pytest.mark.parametrize("alpha", [1e-3, 0.1, 10.0])
def test_each_norm_is_bounded_ever_more_closely(alpha):
    """Step 6: the four spectral norms of the certificate, against their dense matrices."""
    generator = np.random.default_rng(0)
    U_s, U_t, Y = (
        generator.normal(size=(40, 9)),
        generator.normal(size=(70, 9)),
        unit(generator.normal(size=(40, 5))),
    )
    A = U_s.T @ U_s + alpha * np.eye(9)
    half = np.linalg.inv(np.linalg.cholesky(A))
    beta = half @ U_s.T @ Y
    theta = half.T @ beta
    E = Y - U_s @ theta
    true = [
        np.linalg.norm(m, 2)
        for m in (U_t @ np.linalg.inv(A), U_t @ np.linalg.inv(A) @ U_s.T, E, theta)
    ]
    N = half @ U_t.T @ U_t @ half.T
    ridge = affine._Ridge(B=None, Q=None, M=half, V=None, N=N, beta=beta, theta=theta)
    levels = np.array([list(level) for level in affine._norms(ridge, Y, alpha)])
    assert levels.shape == (3, 4)
    assert (levels >= np.array(true) * (1 - 1e-9)).all()
    assert (np.diff(levels, axis=0) <= 1e-9).all()
    np.testing.assert_allclose(levels[-1][[0, 2, 3]], np.array(true)[[0, 2, 3]], rtol=1e-6)
    assert levels[-1][1] <= true[1] * (1 + alpha)


def test_blocks_change_nothing(data, monkeypatch):
    X, Y, T = data
    whole = DAKL(80, 1.0).fit_predict(X, Y, T)
    monkeypatch.setattr(dakl, "_BLOCK", 7 * 280)  # 7 rows of K' at a time, not a divisor of 200
    np.testing.assert_allclose(DAKL(80, 1.0).fit_predict(X, Y, T), whole, atol=1e-6)


def test_fewer_samples_than_dimensions():
    (S, Y), (T, _) = made_up(3, 0), made_up(2, 1)
    for gamma in (0.01, 2.0):
        assert (
            distance(DAKL(3, gamma).fit_predict(S, Y, T), by_definition(S, Y, T, gamma, 10)) < 1e-4
        )
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
    np.testing.assert_array_equal(
        model.landmarks_,
        np.vstack([X, T]) / np.linalg.norm(np.vstack([X, T]), axis=1, keepdims=True),
    )


def test_affine_refuses_rows_it_errs_on(data):
    X, Y, T = data
    just_enough = 1.01 * DAKL(80, 0.1).fit(X, Y, T).error_
    model = DAKL(80, 0.1, solver="affine", tol=just_enough).fit(X, Y, T)
    model.predict(T)
    with pytest.raises(BadValueError, match="unlike the fit's"):
        model.predict(-T)


def test_prediction_depends_on_the_target_domain(data):
    X, Y, T = data
    other = np.vstack([T, made_up(200, 5)[0] - 0.5])
    alone = DAKL(80, 2.0).fit_predict(X, Y, T)
    assert distance(alone, DAKL(80, 2.0).fit(X, Y, other).predict(T)) > 1e-3


@pytest.mark.parametrize("gamma", [0.01, 2.0])
def test_the_order_of_rows_says_nothing_k6(data, gamma):
    """K6: the original scores on the rows it fits. Target rows say no more than where they lie."""
    X, Y, T = data
    plain = DAKL(80, gamma, alpha=0.1).fit_predict(X, Y, T)
    order = np.random.default_rng(0).permutation(len(T))
    np.testing.assert_allclose(
        DAKL(80, gamma, alpha=0.1).fit_predict(X, Y, T[order]), plain[order], atol=1e-5
    )
    order = np.random.default_rng(1).permutation(len(X))
    np.testing.assert_allclose(
        DAKL(80, gamma, alpha=0.1).fit_predict(X[order], Y[order], T), plain, atol=1e-5
    )
    stale = DAKL(80, gamma, alpha=0.1).fit_predict(
        X[order], Y, T
    )  # pairs torn apart: it does read Y by row
    assert distance(stale, plain) > 0.01


# --- centroids ------------------------------------------------------------------------------------


def test_as_many_clusters_as_samples_are_the_samples(data):
    X, Y, _ = data
    centroids, targets = ensemble.cluster(X, Y, len(X))
    np.testing.assert_allclose(centroids, X, atol=1e-15)
    np.testing.assert_allclose(targets, Y, atol=1e-15)


def test_targets_of_centroids(data):
    X, Y, _ = data
    centroids, nearest = ensemble.cluster(X, Y, 12)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1)
    np.testing.assert_allclose(nearest, Y[(centroids @ X.T).argmax(axis=1)])


def test_same_seed_same_prediction_k4(data):
    """K4: the original's clustering has no seed, so no number of it can be repeated."""
    X, Y, T = data
    answers = []
    for global_seed in (1, 2):
        np.random.seed(global_seed)  # noqa: NPY002
        answers.append(DAKL(20, 1.0).fit_predict(X, Y, T))
    np.testing.assert_array_equal(*answers)
    seeded = [DAKL(20, 1.0, random_state=4).fit_predict(X, Y, T) for _ in range(2)]
    np.testing.assert_array_equal(*seeded)
    assert np.abs(seeded[0] - answers[0]).max() > 1e-4
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
    """K5: in-sample predictions teach the regression to trust its input, others to shrink it."""
    (in_sample, Y), (T, truth) = made_up(300, 0, noise=0.05), made_up(300, 1, noise=1.5)
    held_out, same = made_up(300, 0, noise=1.5)
    np.testing.assert_array_equal(same, Y)
    leaked, honest = (DAKL(300, 2.0, 1.0).fit_predict(X, Y, T) for X in (in_sample, held_out))
    assert (honest * truth).sum(axis=1).mean() > (leaked * truth).sum(axis=1).mean() + 0.02


# --- a scikit-learn estimator ---------------------------------------------------------------------


class OneDomain(DAKL):
    """`DAKL` as scikit-learn's checks fit it: on its own domain, and a number is an angle."""

    def fit(self, X, y):
        values = (
            np.unique(np.asarray(y).astype(str), return_inverse=True)[1]
            if np.asarray(y).dtype.kind in "OUc"
            else y
        )
        angle = np.asarray(values, float).reshape(len(y), -1)[:, 0]
        model = DAKL(len(y), self.gamma, self.alpha).fit(
            X, np.stack([np.cos(angle), np.sin(angle)], axis=1), X
        )
        vars(self).update(
            {name: value for name, value in vars(model).items() if name.endswith("_")}
        )
        return self


NOT_OURS = {
    "check_fit_score_takes_y": "fit_predict takes the target domain too",
    "check_n_features_in_after_fitting": "the error says X_target, not X",
    "check_estimators_nan_inf": "the error says which row",
    "check_estimators_dtypes": "the data has a zero row, which has no direction",
    "check_dtype_object": "what is no number is a BadValueError, not a TypeError",
    "check_fit2d_predict1d": "the error says in its own words that it is no matrix",
}


def test_check_estimator():
    results = check_estimator(OneDomain(), expected_failed_checks=NOT_OURS, on_skip=None)
    assert sum(result["status"] == "passed" for result in results) >= 34


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
        ({"gamma": 0}, "'gamma' .* Got 0 "),
        ({"gamma": np.nan}, "'gamma' .* Got nan "),
        ({"gamma": np.inf}, "'gamma' .* Got inf "),
        ({"alpha": -1.0}, "'alpha' .* Got -1.0 "),
        ({"alpha": "10"}, "'alpha' .* Got '10' "),
        ({"alpha": 1e-12}, "rounding"),
        ({"tol": 0}, "'tol' .* Got 0 "),
        ({"n_clusters": 0}, "'n_clusters' .* Got 0 "),
        ({"n_clusters": 2.5}, "'n_clusters' .* Got 2.5 "),
        ({"max_iter": 0}, "'max_iter' .* Got 0 "),
        ({"solver": "svd"}, "'solver' .* Got 'svd' "),
        ({"random_state": "a"}, "'random_state' .* Got 'a' "),
    ],
)
def test_parameters_outside_their_range_are_named(data, parameters, reason):
    with pytest.raises(ConfigError, match=reason):
        DAKL(**{"n_clusters": 20, **parameters}).fit(*data)


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf, 0])
def test_rows_without_direction_are_named(data, position, value):
    broken = [rows.copy() for rows in data]
    broken[position][5] = value
    name = ("X", "Y", "X_target")[position]
    with pytest.raises(
        BadValueError, match=f"row 5 of {name} is .*{'zero' if value == 0 else 'finite'}"
    ):
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
