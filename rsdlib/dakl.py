"""Domain-adaptive kernel learning: a ridge regression that knows the target images' predictions (supplementary, Table 3)."""

import numbers
from dataclasses import dataclass

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_array, check_is_fitted

from rsdlib import runtime
from rsdlib.errors import BadValueError, ConfigError
from rsdlib.metrics import _rows

# --- the kernel -------------------------------------------------------------------------------------------------------------


def kernel(Z, gamma):
    """K'_ij = exp(-gamma (1 - K_ij) / 2) with the cosine K_ij = z_i z_j / (|z_i| |z_j|).

    Parameters
    ----------
    Z : array-like (n, d)
    gamma : float

    Returns
    -------
    ndarray (n, n), float64
        Symmetric, with a unit diagonal. `DAKL` never forms it whole.

    Raises
    ------
    BadValueError
        A row is zero or not finite.
    """
    Z = _matrix(Z, "Z")
    return _similarity(Z, Z, gamma)


def _similarity(rows, Z, gamma):
    """Return K' between unit rows (b, d) and (n, d): (b, n)."""
    block = rows @ Z.T
    block -= 1
    block *= gamma / 2
    return np.exp(block, out=block)


def effective_rank(K):
    """Return exp(entropy of the eigenvalues of `K` (n, n), scaled to sum one): 1 to n (Roy and Vetterli, 2007)."""
    share = np.maximum(np.linalg.eigvalsh(K), 0)
    share = share[share > 0] / share.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


@dataclass(frozen=True)
class KernelReport:
    """What a sample of the kernel holds, to be stated next to a score."""

    rows: int
    effective_rank: float  # of K': close to 1 where gamma is small, because all entries are close to one
    centred_rank: float  # of K' without its row and column means: what tells rows apart
    condition: float  # of K' K'^T + alpha I, the system that is solved: the features are rows of K', so K' counts twice


def report(Z, gamma, alpha=10.0, rows=1000, seed=0):
    """Describe the kernel of at most `rows` rows of `Z`, drawn without replacement.

    Parameters
    ----------
    Z : array-like (n, d)
        For example ``DAKL.landmarks_``.
    gamma, alpha : float
    rows, seed : int

    Returns
    -------
    KernelReport
    """
    Z = np.asarray(Z)
    K = kernel(Z[np.sort(runtime.rng("kernel report", seed).permutation(len(Z))[:rows])], gamma)
    centred = K - K.mean(axis=0) - K.mean(axis=1, keepdims=True) + K.mean()
    squares = np.linalg.eigvalsh(K) ** 2
    condition = float((squares.max() + alpha) / (squares.min() + alpha))
    return KernelReport(len(K), effective_rank(K), effective_rank(centred), condition)


# --- centroids --------------------------------------------------------------------------------------------------------------

_SMALL = 2**22  # samples x clusters that scikit-learn handles with its careful k-means++ start in about a second


def cluster(X, Y, n_clusters, centroid_target="nearest", max_iter=25, random_state=None):
    """Return the k-means centroids of the source predictions and a target for each.

    Parameters
    ----------
    X : array-like (n, d)
        Predictions of the source (training) images.
    Y : array-like (n, q)
        Embeddings of their prompts.
    n_clusters : int
        As many as there are samples: the centroids are the samples.
    centroid_target : {"nearest", "mean"}
        The target of the sample nearest to the centroid (the authors' code), or the mean direction of its members' targets.
    max_iter, random_state : int
        See `DAKL`.

    Returns
    -------
    centroids : ndarray (r, d), float64, unit rows
    targets : ndarray (r, q), float64, unit rows

    Raises
    ------
    BadValueError
        Lengths differ, there are fewer samples than clusters, or a row is zero or not finite.
    """
    X, Y = _matrix(X, "X"), _matrix(Y, "Y")
    if len(X) != len(Y):
        raise BadValueError(f"X has {len(X)} rows, Y has {len(Y)}", "Hand in one target per sample.")
    if n_clusters > len(X):
        raise BadValueError(f"n_clusters = {n_clusters}, but there are {len(X)} samples", f"Use n_clusters={len(X)} or fewer.")
    if n_clusters == len(X):
        return X, Y
    from rsdlib.retrieval import nearest

    centroids = _rows(_kmeans(X.astype(np.float32), n_clusters, max_iter, random_state), "the centroids")
    similarity, index = nearest(centroids, X, min(8, len(X)))
    # The centroid of two samples is as near to the one as to the other: rounding must not choose, the first does.
    tied = similarity > similarity[:, :1] - 1e-6
    targets = Y[np.where(tied, index, len(X)).min(axis=1)]
    if centroid_target == "mean":
        sums = np.zeros_like(targets)
        np.add.at(sums, nearest(X, centroids, 1)[1][:, 0], Y)
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        # Differs from the paper: the mean of the members. One without members, or whose members cancel, keeps the nearest.
        targets = np.divide(sums, norms, out=targets, where=norms > 1e-9)
    return centroids, targets


def _kmeans(X, n_clusters, max_iter, random_state):
    """Return k-means centroids (r, d), not yet of unit length, of float32 rows: a function of the rows and the seed."""
    seed = int(runtime.rng("k-means", random_state).integers(2**31 - 1))
    if n_clusters * len(X) > _SMALL:
        faiss = runtime.require("faiss", "faiss-cpu")
        found = faiss.Kmeans(X.shape[1], n_clusters, niter=max_iter, seed=seed, min_points_per_centroid=1)
        found.train(X)
        return found.centroids
    from sklearn.cluster import KMeans

    return KMeans(n_clusters, n_init=1, max_iter=max_iter, random_state=seed).fit(X).cluster_centers_


def least_alpha(n_clusters, n_targets, tol=1e-4):
    """Return the least alpha that float64's rounding of K' K'^T leaves standing: `DAKL.fit` refuses a smaller one."""
    return np.finfo(float).eps * n_clusters * (n_clusters + n_targets) / tol


# --- the estimator ----------------------------------------------------------------------------------------------------------


class DAKL(BaseEstimator):
    """Domain-adaptive kernel learning, with the target images' predictions and without their prompts.

    k-means turns the source predictions into r centroids. Every sample x is described by its similarities
    k'(x, z) = exp(-gamma (1 - cos(x, z)) / 2) to all n = r + t rows of Z = [centroids; target predictions], and a ridge
    regression with a linear kernel over these descriptions is fitted on the centroids (supplementary, Table 3). With
    Phi_s = K'(S, Z), of shape (r, n), the prediction is ``K'(x, Z) Phi_s^T (Phi_s Phi_s^T + alpha I)^-1 Y``, scaled to unit
    length. The features are rows of K', so it is the squared kernel that acts.

    `X` must come from models that did not train on these samples: predictions of training samples are better than those of
    the target images, and weights fitted on them trust the models too much.

    Parameters
    ----------
    n_clusters : int
        r.
    gamma, alpha : float
        Width of the kernel and strength of the ridge, both positive. The defaults are the paper's gamma and the authors' alpha;
        choose them on validation, see `rsdlib.ensemble.search_dakl`.
    centroid_target : {"nearest", "mean"}
        See `cluster`.
    solver : {"auto", "affine", "primal", "direct"}
        ``"affine"`` replaces k' by its fitted line in the cosine, which closes in d + 1 dimensions; ``"primal"`` is exact and
        streams K', r x r in memory; ``"direct"`` is the reference, r x n in memory. ``"auto"`` is affine where the error it
        certifies is at most `tol`, else primal. All compute in float64.
    tol : float
        Largest certified error of the affine form: root mean square over the target rows, relative to the predictions' norm.
    max_iter : int
        Iterations of k-means.
    random_state : int or None
        Seed of k-means and of the certificate. None is a seed like any other: no run differs from the next.

    Attributes
    ----------
    landmarks_ : ndarray (n, d), float64, unit rows
        Z: the centroids, then the target predictions of the fit.
    centroid_targets_ : ndarray (r, q), float64
    solver_ : {"affine", "primal", "direct"}
        What was used.
    error_ : float
        Certified error of the affine form: infinite where it was not worth computing, NaN where it was not asked for.
    n_features_in_ : int
        d.

    Notes
    -----
    There is no ``score``: nothing here reads a target image's prompt.

    The certificate writes K' = L + R with the fitted line L. To first order in R, the error is linear in R. It is bounded by the
    Frobenius norm of R, from sampled pairs and the maximum over all cosines; where that is not enough, R is split into a parabola
    in the cosine and a remainder. The parabola acts on a vector at O(n d^2), so that the error of three random combinations of the
    targets' columns is computed and trebled: an error of rank one, the worst case, escapes in 5 fits of 100, any other rarely.
    The remainder is bounded as before. Second order is kept small by refusing where the norm of R exceeds a tenth of sqrt(alpha).
    """

    def __init__(
        self,
        n_clusters=10_000,
        gamma=1e-3,
        alpha=10.0,
        centroid_target="nearest",
        solver="auto",
        tol=1e-4,
        max_iter=25,
        random_state=None,
    ):
        self.n_clusters = n_clusters
        self.gamma = gamma
        self.alpha = alpha
        self.centroid_target = centroid_target
        self.solver = solver
        self.tol = tol
        self.max_iter = max_iter
        self.random_state = random_state

    def fit(self, X, Y, X_target):
        """Fit the regression on the source samples, described by source and target predictions.

        Parameters
        ----------
        X : array-like (n_samples, d)
            Predictions of the source images by models that did not train on them; rows are scaled to unit length.
        Y : array-like (n_samples, q)
            Embeddings of the source images' prompts; rows are scaled to unit length.
        X_target : array-like (t, d)
            Predictions of the target images.

        Returns
        -------
        DAKL
            The estimator itself.

        Raises
        ------
        BadValueError
            Shapes disagree, an array is empty, a row is zero or not finite, or there are fewer samples than clusters.
        ConfigError
            A parameter is outside its range, or ``solver="affine"`` was asked for where its certified error exceeds `tol`.
        """
        self._check_parameters()
        S, targets = cluster(X, Y, self.n_clusters, self.centroid_target, self.max_iter, self.random_state)
        self.n_features_in_ = S.shape[1]
        self.landmarks_ = np.concatenate([S, self._rows_like_source(X_target)])
        self.centroid_targets_ = targets
        precise = least_alpha(len(S), len(self.landmarks_) - len(S), self.tol)
        if self.alpha < precise:
            raise ConfigError(f"alpha = {self.alpha:g} is lost in float64's rounding", f"Use alpha={precise:.1g} or more.")
        self.error_, self.solver_ = np.nan, self.solver
        if self.solver in ("auto", "affine"):
            self.predictor_, self.error_ = _fit_affine(
                self.landmarks_, targets, self.gamma, self.alpha, self.tol, self.random_state
            )
            self.solver_ = "affine" if self.error_ <= self.tol else "primal"
            if self.solver == "affine" and self.solver_ != "affine":
                raise ConfigError(
                    f"the affine form's certified error at gamma = {self.gamma:g} is {self.error_:.1g}, above tol = {self.tol:g}",
                    "Use solver='auto' or 'primal'.",
                )
        if self.solver_ != "affine":
            solve = _solve_primal if self.solver_ == "primal" else _solve_direct
            self.predictor_ = _Exact(self.landmarks_, solve(self.landmarks_, targets, self.gamma, self.alpha), self.gamma)
        return self

    def predict(self, X_target):
        """Predict the prompt embeddings of the target rows of the fit, or of others like them.

        Parameters
        ----------
        X_target : array-like (m, d)
            Rows that were not in the fit are described by their similarity to the same centroids and fitted target predictions.

        Returns
        -------
        ndarray (m, q), float32, unit rows
            Each row depends on its own input and the fit alone.

        Raises
        ------
        BadValueError
            Shapes disagree, a row is zero or not finite, or the affine form is not exact enough on these rows.
        """
        check_is_fitted(self)
        rows = self._rows_like_source(X_target)
        if self.solver_ == "affine":  # the certificate has a slack of three, and follows the kernel's distance from its line
            usual = self.predictor_.residual(self.landmarks_[len(self.centroid_targets_) :])
            if self.error_ * self.predictor_.residual(rows) > 3 * self.tol * usual:
                raise BadValueError("these rows are unlike those of the fit: the affine form may err", "Fit with solver='primal'.")
        return self._answer(rows)

    def fit_predict(self, X, Y, X_target):
        """Return ``fit(X, Y, X_target).predict(X_target)``."""
        self.fit(X, Y, X_target)
        return self._answer(self.landmarks_[len(self.centroid_targets_) :])

    def _answer(self, rows):
        return _rows(self.predictor_.predict(rows), "the prediction").astype(np.float32)

    def _rows_like_source(self, values):
        rows = _matrix(values, "X_target")
        if rows.shape[1] != self.n_features_in_:
            expected = f"DAKL is expecting {self.n_features_in_} features as input"
            raise BadValueError(f"X_target has {rows.shape[1]} features, but {expected}", "Hand in the same models' predictions.")
        return rows

    def _check_parameters(self):
        for name, choices in (("centroid_target", ("nearest", "mean")), ("solver", ("auto", "affine", "primal", "direct"))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} = {getattr(self, name)!r} is unknown", f"Use one of {', '.join(choices)}.")
        for name in ("gamma", "alpha", "tol"):
            value = getattr(self, name)
            if not (isinstance(value, numbers.Real) and 0 < value < np.inf):
                raise ConfigError(f"{name} = {value!r} is not a positive number")
        for name in ("n_clusters", "max_iter"):
            value = getattr(self, name)
            if not (isinstance(value, numbers.Integral) and value > 0):
                raise ConfigError(f"{name} = {value!r} is not a positive integer")
        if not (self.random_state is None or isinstance(self.random_state, numbers.Integral)):
            raise ConfigError(f"random_state = {self.random_state!r} is not an integer", "A generator's state cannot be repeated.")


def _matrix(values, name):
    """Return `values` as finite unit rows in float64, at least one; `name` is what errors call them."""
    try:
        values = check_array(values, dtype=np.float64, ensure_all_finite=False, input_name=name)
    except (TypeError, ValueError) as error:
        raise BadValueError(f"{name} is not a matrix of numbers: {error}") from error
    return _rows(values, name)


# --- exact solvers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Exact:
    """The prediction K'(x, Z) W, streamed."""

    landmarks: np.ndarray  # Z (n, d)
    weights: np.ndarray  # W (n, q)
    gamma: float

    def predict(self, rows):
        blocks = _blocks(len(rows), len(self.landmarks))
        return np.concatenate([_similarity(rows[block], self.landmarks, self.gamma) @ self.weights for block in blocks])


def _blocks(n, width):
    """Yield slices of range(n) of at most 128 MiB of float64, `width` to a row."""
    step = max(1, 2**24 // width)
    for start in range(0, n, step):
        yield slice(start, start + step)


def _solve_primal(Z, Y, gamma, alpha):
    """Return W = Phi^T (Phi Phi^T + alpha I)^-1 Y, Phi = K'(S, Z), in blocks of Z: r x r in memory, no target x target block."""
    from scipy.linalg import cho_factor, cho_solve
    from scipy.linalg.blas import dsyrk

    S = Z[: len(Y)]
    gram = np.zeros((len(S), len(S)), order="F")
    for block in _blocks(len(Z), len(S)):
        gram = dsyrk(1.0, _similarity(Z[block], S, gamma).T, beta=1.0, c=gram, lower=True, overwrite_c=True)
    gram[np.diag_indices(len(S))] += alpha
    dual = cho_solve(cho_factor(gram, lower=True, overwrite_a=True, check_finite=False), Y, check_finite=False)
    return np.concatenate([_similarity(Z[block], S, gamma) @ dual for block in _blocks(len(Z), len(S))])


def _solve_direct(Z, Y, gamma, alpha):
    """Return the same W from Phi whole."""
    phi = _similarity(Z[: len(Y)], Z, gamma)  # (r, n)
    return phi.T @ np.linalg.solve(phi @ phi.T + alpha * np.eye(len(phi)), Y)


# --- affine solver ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Affine:
    """The prediction [1, x] coef, and how far k' is from its line."""

    coef: np.ndarray  # (1 + d, q)
    line: np.ndarray  # intercept and slope (2,)
    gamma: float
    centroids: np.ndarray  # some of them (c, d)

    def predict(self, rows):
        found = rows @ self.coef[1:]
        found += self.coef[0]
        return found

    def residual(self, rows):
        """Return the median of |k' - line| over the cosines of at most 1,024 rows to some centroids."""
        rows = rows[:: -(-len(rows) // 1024)]
        return float(np.median(np.abs(_residual((rows @ self.centroids.T).ravel(), self.gamma, self.line))))


def _fit_affine(Z, Y, gamma, alpha, tol, seed):
    """Solve with K' replaced by its line in the cosine, and certify the error.

    L = F D F^T with F = [1, Z] (n, 1 + d) and D = diag(intercept, slope, ..., slope). Orthogonal axes O of F D, F D = O Q^T,
    turn L_s into the features U_s = F_s Q, whose ridge is ``theta = A^-1 U_s^T Y`` with A = U_s^T U_s + alpha I. To first order the
    error is ``U_t A^-1 (O^T R_s^T E - U_s^T R_s O theta) + R_t O theta`` with the fit's residual E = Y - U_s theta.

    Parameters
    ----------
    Z : ndarray (n, d)
        Unit rows, centroids first.
    Y : ndarray (r, q)
    gamma, alpha, tol : float
    seed : int or None

    Returns
    -------
    predictor : _Affine or None
    error : float
        Infinite, without a predictor, where R is too large for a first-order certificate.
    """
    from scipy.linalg import solve_triangular

    S, T = Z[: len(Y)], Z[len(Y) :]
    first, step = runtime.rng("DAKL pairs", seed).integers([[0], [1]], len(Z), size=(2, 2**12))  # no row with itself
    cosines = np.einsum("pd,pd->p", Z[first], Z[(first + step) % len(Z)])
    line, curve = (_fit_polynomial(cosines, gamma, degree) for degree in (1, 2))
    size = _residual_norm(cosines, gamma, line, len(Z))
    if not size <= 0.1 * np.sqrt(alpha):
        return None, np.inf

    scale = np.append(line[0], np.full(Z.shape[1], line[1]))  # the diagonal of D
    gram_s, gram_t = _gram(S), _gram(T)
    # F^T F = root root^T, so Q = D root; what is added to the diagonal is below rounding.
    root = np.linalg.cholesky(gram_s + gram_t + 10 * np.finfo(float).eps * len(Z) * np.eye(len(scale)))
    q = scale[:, None] * root
    system = np.linalg.cholesky(q.T @ gram_s @ q + alpha * np.eye(len(scale)))  # of A
    half = solve_triangular(system, np.eye(len(scale)), lower=True)  # A^-1 = half^T half
    axes = q @ half.T
    beta = axes.T @ _moments(S, Y)
    theta, coef = half.T @ beta, axes @ beta
    predictor = _Affine(coef, line, gamma, S[:: -(-len(S) // 16)])

    passed = axes.T @ gram_t @ axes  # of U_t A^-1/2
    norm = np.sqrt(np.einsum("pq,pq->", beta, passed @ beta))  # of the target predictions
    for spread, through, unexplained, explained in _norms(half, passed, Y, beta, theta, alpha):
        gain = spread * unexplained + (through + 1) * explained
        if size * gain / norm <= tol:
            return predictor, float(size * gain / norm)

    parabola, asked = curve - np.append(line, 0), T[:: -(-len(T) // 4096)]
    residual, onto = Y - coef[0] - S @ coef[1:], np.linalg.inv(root)  # E (r, q); O^T v = onto F^T v
    errors = []
    for column in runtime.rng("DAKL probes", seed).normal(size=(3, Y.shape[1])):
        left = residual @ column  # E (r,)
        back = onto.T @ (theta @ column)
        linear, quadratic = _parabola(parabola, Z, back[0] + Z @ back[1:])  # R O theta as a function of x
        turned = onto @ _moments(Z, _evaluate(_parabola(parabola, S, left), Z))
        turned -= q.T @ _moments(S, _evaluate((linear, quadratic), S))
        errors.append(_evaluate((linear + axes @ (half @ turned), quadratic), asked))
    first_order = np.sqrt(len(T) * np.square(errors).mean())
    remainder = _residual_norm(cosines, gamma, curve, len(Z)) * gain
    return predictor, float((3 * first_order + remainder) / norm)


def _norms(half, passed, Y, beta, theta, alpha):
    """Bound the spectral norms of U_t A^-1, of U_t A^-1 U_s^T (with A for U_s^T U_s), of E and of theta, ever closer."""
    reach, left = half.T @ passed @ half, np.square(Y).sum() - np.square(beta).sum() - alpha * np.square(theta).sum()
    yield np.sqrt(np.linalg.norm(reach)), np.sqrt(np.linalg.norm(passed)), np.sqrt(max(left, 0)), np.linalg.norm(theta)
    known = theta.T @ theta
    grams = reach, passed, Y.T @ Y - beta.T @ beta - alpha * known, known
    yield [np.sqrt(np.linalg.norm(gram)) for gram in grams]
    yield [np.sqrt(max(np.linalg.eigvalsh(gram)[-1], 0)) for gram in grams]


def _fit_polynomial(cosines, gamma, degree):
    """Return the coefficients, lowest first, of the least-squares fit of k' on sampled cosines."""
    return np.linalg.lstsq(np.vander(cosines, degree + 1, increasing=True), np.exp(-gamma * (1 - cosines) / 2))[0]


def _residual(cosines, gamma, coefficients):
    """Return k' minus its polynomial."""
    return np.exp(-gamma * (1 - cosines) / 2) - np.polynomial.polynomial.polyval(cosines, coefficients)


def _residual_norm(cosines, gamma, coefficients, n):
    """Return a bound on the Frobenius norm of K' (n, n) minus its polynomial, from the cosines of sampled pairs of two rows.

    With probability 0.999, by Chernoff's bound: the mean of values in [0, c] is at most 2 (sample mean + c log(1000) / size).
    """
    found, worst = (np.square(_residual(c, gamma, coefficients)) for c in (cosines, np.linspace(-1, 1, 1001)))
    off_diagonal = 2 * (found.mean() + worst.max() * np.log(1000) / len(found))
    return n * np.sqrt(off_diagonal + worst[-1] / n)


def _gram(rows):
    """Return [1, rows]^T [1, rows]: (1 + d, 1 + d)."""
    return np.block([[np.full((1, 1), len(rows)), rows.sum(axis=0)[None]], [rows.sum(axis=0)[:, None], rows.T @ rows]])


def _moments(rows, values):
    """Return [1, rows]^T values: (1 + d, ...)."""
    return np.concatenate([values.sum(axis=0, keepdims=True), rows.T @ values])


def _parabola(coefficients, rows, weights):
    """Return x -> sum_i weights_i (c_0 + c_1 cos(x, z_i) + c_2 cos(x, z_i)^2) as its linear (1 + d,) and quadratic (d, d) part."""
    linear = _moments(rows, weights)
    linear *= np.append(coefficients[0], np.full(rows.shape[1], coefficients[1]))
    rows = rows.astype(np.float32)
    return linear, coefficients[2] * ((rows * weights[:, None].astype(np.float32)).T @ rows)


def _evaluate(parabola, rows):
    """Return the values (n,) of a parabola at unit rows (n, d)."""
    linear, quadratic = parabola
    single = rows.astype(np.float32)
    return linear[0] + rows @ linear[1:] + np.einsum("nd,nd->n", single @ quadratic.astype(np.float32), single)
