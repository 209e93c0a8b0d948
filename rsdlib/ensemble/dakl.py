"""Domain-adaptive kernel learning: a regression that knows the target images' predictions.

The paper's description is its supplementary's Table 3. `rsdlib.ensemble.affine` derives the fast
solver.
"""

from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from typing import ClassVar

import numpy as np
from scipy.linalg import blas, cho_factor, cho_solve
from sklearn.base import BaseEstimator
from sklearn.utils import gen_batches
from sklearn.utils._param_validation import Interval, InvalidParameterError, StrOptions
from sklearn.utils.validation import check_is_fitted

from rsdlib import runtime
from rsdlib.data import unit_rows
from rsdlib.ensemble.affine import fit_affine, k_prime
from rsdlib.ensemble.neighbours import nearest
from rsdlib.errors import BadValueError, ConfigError, refusing

# --- the kernel -----------------------------------------------------------------------------------


def kernel(rows, Z, gamma):
    """K'_ij = exp(-gamma (1 - K_ij) / 2) with the cosine K_ij = x_i z_j of unit rows.

    Parameters
    ----------
    rows, Z : ndarray (b, d), (n, d)
        Of unit length.
    gamma : float

    Returns
    -------
    ndarray (b, n)
        Of Z with itself, symmetric with a unit diagonal; `DAKL` never forms that whole.
    """
    cosines = rows @ Z.T
    return k_prime(cosines, gamma, out=cosines)


def degrees_of_freedom(S, T, gamma, alphas, r=None, t=None):
    """Return tr A A^T (A A^T + alpha I)^-1 of the centroids' fit, A = K'(S, [S; T]) (r, r + t).

    How many directions of the centroids' targets survive the ridge. Near one, DAKL gives the same
    answer to every image: the direction of the targets' mean, which is what the kernel's largest
    eigenvalue carries where all its entries are alike.

    Parameters
    ----------
    S, T : array-like (n, d), (m, d)
        Centroids and target predictions.
    gamma : float
    alphas : sequence of float
        Ridges, positive.
    r, t : int, optional
        Numbers of centroids and targets to answer for, each given row standing for r / n or t / m
        of them. Exact where rows are repeated so often; where the others would be new, near as long
        as the answer is far below n (a test holds it to 5 %).

    Returns
    -------
    ndarray (len(alphas),)

    Raises
    ------
    BadValueError
        A row is zero or not finite.
    """
    S, T = unit_rows(S, "S"), unit_rows(T, "T")
    copies = np.repeat([(r or len(S)) / len(S), (t or len(T)) / len(T)], [len(S), len(T)])
    A = kernel(S, np.concatenate([S, T]), gamma) * np.sqrt(copies * copies[0])
    eigenvalues = np.linalg.svd(A, compute_uv=False) ** 2
    return (eigenvalues / (eigenvalues + np.reshape(alphas, (-1, 1)))).sum(axis=1)


# --- centroids ------------------------------------------------------------------------------------

_SMALL = 2**22  # samples x clusters that scikit-learn's careful start handles in about a second


def cluster(X, Y, n_clusters, max_iter=25, random_state=None):
    """Return the k-means centroids of the source predictions and a target for each.

    That of the sample nearest to the centroid, as in the authors' code.

    Parameters
    ----------
    X : array-like (n, d)
        Predictions of the source (training) images.
    Y : array-like (n, q)
        Embeddings of their prompts.
    n_clusters : int
        As many as there are samples: the centroids are the samples.
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
    X, Y = unit_rows(X, "X"), unit_rows(Y, "Y")
    if len(X) != len(Y):
        raise BadValueError(f"X has {len(X)} rows, Y has {len(Y)}", "Hand in one target for each.")
    if n_clusters > len(X):
        raise BadValueError(f"n_clusters = {n_clusters}, but there are {len(X)} rows", "Use fewer.")
    if n_clusters == len(X):
        return X, Y
    centres = _kmeans(X.astype(np.float32), n_clusters, max_iter, random_state)
    centroids = unit_rows(centres, "the centroids")
    similarity, index = nearest(centroids, X, min(8, len(X)))
    # The centroid of two samples is as near to the one as to the other: the first has to be chosen,
    # because rounding, and with it the number of threads, must not choose.
    tied = similarity > similarity[:, :1] - 1e-6
    first_tied = np.where(tied, index, len(X)).min(axis=1)
    return centroids, Y[first_tied]


def _kmeans(X, n_clusters, max_iter, random_state):
    """Return k-means centroids (r, d) of float32 rows, not of unit length, fixed by the seed."""
    seed = int(runtime.rng("k-means", random_state).integers(2**31 - 1))
    if n_clusters * len(X) > _SMALL:
        faiss = runtime.require("faiss", "faiss-cpu")
        options = {"niter": max_iter, "seed": seed, "min_points_per_centroid": 1}
        clustering = faiss.Kmeans(X.shape[1], n_clusters, **options)
        clustering.train(X)
        return clustering.centroids
    from sklearn.cluster import KMeans

    clustering = KMeans(n_clusters, n_init=1, max_iter=max_iter, random_state=seed)
    return clustering.fit(X).cluster_centers_


def least_alpha(n_clusters, n_targets, tol=1e-4):
    """Return the least alpha that float64's rounding of K' K'^T leaves standing.

    Parameters
    ----------
    n_clusters, n_targets : int
    tol : float
        See `DAKL`, whose fit refuses a smaller alpha.

    Returns
    -------
    float
    """
    return np.finfo(float).eps * n_clusters * (n_clusters + n_targets) / tol


# --- the estimator --------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class DAKL(BaseEstimator):
    """Domain-adaptive kernel learning, with the target images' predictions, without their prompts.

    k-means turns the source predictions into r centroids. Every sample x is described by its
    similarities k'(x, z) = exp(-gamma (1 - cos(x, z)) / 2) to all n = r + t rows of
    Z = [centroids; target predictions], and a ridge regression with a linear kernel over these
    descriptions is fitted on the centroids (supplementary, Table 3). With Phi = K'(S, Z), of shape
    (r, n), the prediction is ``K'(x, Z) Phi^T (Phi Phi^T + alpha I)^-1 Y``, scaled to unit length.
    The features are rows of K', so it is the squared kernel that acts.

    `X` must come from models that did not train on these samples: predictions of training samples
    are better than those of the target images, and weights fitted on them trust the models too
    much.

    Parameters
    ----------
    n_clusters : int
        r.
    gamma, alpha : float
        Width of the kernel and strength of the ridge, both positive. The defaults are the paper's
        gamma and the authors' alpha; choose them on validation, see `search_dakl`.
    solver : {"auto", "affine", "primal"}
        ``"affine"`` replaces k' by its fitted line in the cosine, which closes in d + 1 dimensions;
        ``"primal"`` is exact and streams K', r x r in memory. ``"auto"`` is affine where the error
        it certifies is at most `tol`, else primal. Both compute in float64.
    tol : float
        Largest certified error of the affine form: root mean square over the target rows, relative
        to the predictions' norm.
    max_iter : int
        Iterations of k-means.
    random_state : int or None
        Seed of k-means and of the certificate. None is a seed like any other: no run differs from
        the next. A generator is refused, as its state cannot be repeated.

    Attributes
    ----------
    landmarks_ : ndarray (n, d), float64, unit rows
        Z: the centroids, then the target predictions of the fit.
    centroid_targets_ : ndarray (r, q), float64
    solver_ : {"affine", "primal"}
        What was used.
    error_ : float
        Certified error of the affine form: infinite where it was not worth computing, NaN where it
        was not asked for.
    n_features_in_ : int
        d.

    Notes
    -----
    There is no ``score``: nothing here reads a target image's prompt. What the certificate is and
    how it is computed is derived in `rsdlib.ensemble.affine`.
    """

    _parameter_constraints: ClassVar = {
        **dict.fromkeys(("n_clusters", "max_iter"), (Interval(Integral, 1, None, closed="left"),)),
        **dict.fromkeys(("gamma", "alpha", "tol"), (Interval(Real, 0, None, closed="neither"),)),
        "solver": [StrOptions({"auto", "affine", "primal"})],
        "random_state": [Interval(Integral, None, None, closed="neither"), None],
    }

    n_clusters: int = 10_000
    gamma: float = 1e-3
    alpha: float = 10.0
    solver: str = "auto"
    tol: float = 1e-4
    max_iter: int = 25
    random_state: int | None = None

    def fit(self, X, Y, X_target):
        """Fit the regression on the source samples, described by source and target predictions.

        Parameters
        ----------
        X : array-like (n_samples, d)
            Predictions of the source images by models that did not train on them; rows are scaled
            to unit length.
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
            Shapes disagree, an array is empty, a row is zero or not finite, or there are fewer
            samples than clusters.
        ConfigError
            A parameter is outside its range, or ``solver="affine"`` was asked for where its
            certified error exceeds `tol`.
        """
        with refusing(InvalidParameterError, ConfigError, "{}"):
            self._validate_params()
        S, self.centroid_targets_ = cluster(X, Y, self.n_clusters, self.max_iter, self.random_state)
        self.n_features_in_ = S.shape[1]
        self.landmarks_ = np.concatenate([S, self._rows_like_source(X_target)])
        least = least_alpha(len(S), len(self.landmarks_) - len(S), self.tol)
        if self.alpha < least:
            raise ConfigError("alpha is lost in float64's rounding", f"Use {least:.1g} or more.")
        problem = self.landmarks_, self.centroid_targets_, self.gamma, self.alpha
        self.error_ = np.nan
        if self.solver != "primal":
            self.predictor_, self.error_ = fit_affine(*problem, self.tol, self.random_state)
        self.solver_ = "affine" if self.error_ <= self.tol else "primal"
        if self.solver == "affine" and self.solver_ == "primal":
            message = f"the affine form's certified error {self.error_:.1g} is above {self.tol:g}"
            raise ConfigError(message, "Use solver='auto' or 'primal'.")
        if self.solver_ == "primal":
            W = _solve_primal(*problem)
            self.predictor_ = partial(_stream, Z=self.landmarks_, gamma=self.gamma, W=W)
        return self

    def predict(self, X_target):
        """Predict the prompt embeddings of the target rows of the fit, or of others like them.

        Parameters
        ----------
        X_target : array-like (m, d)
            Rows that were not in the fit are described by their similarity to the same centroids
            and fitted target predictions.

        Returns
        -------
        ndarray (m, q), float32, unit rows
            Each row depends on its own input and the fit alone.

        Raises
        ------
        BadValueError
            Shapes disagree, a row is zero or not finite, or the affine form is not exact enough on
            these rows.
        """
        check_is_fitted(self)
        rows = self._rows_like_source(X_target)
        if self.solver_ == "affine":
            # The certificate has a slack of three, and follows the kernel's distance from its line.
            usual = self.predictor_.residual(self.landmarks_[len(self.centroid_targets_) :])
            if self.error_ * self.predictor_.residual(rows) > 3 * self.tol * usual:
                raise BadValueError("these rows are unlike the fit's", "Use solver='primal'.")
        return unit_rows(self.predictor_(rows), "the prediction").astype(np.float32)

    def fit_predict(self, X, Y, X_target):
        """Return ``fit(X, Y, X_target).predict(X_target)``."""
        return self.fit(X, Y, X_target).predict(X_target)

    def _rows_like_source(self, values):
        rows = unit_rows(values, "X_target")
        if rows.shape[1] != self.n_features_in_:
            message = f"X_target has {rows.shape[1]} features, X has {self.n_features_in_} features"
            raise BadValueError(message, "Hand in the same models' predictions.")
        return rows


# --- the exact solver -----------------------------------------------------------------------------

_BLOCK = 2**24  # values of K' in memory at a time: 128 MiB of float64


def _stream(rows, Z, gamma, W):
    """Return K'(rows, Z) W, in blocks of rows."""
    blocks = gen_batches(len(rows), max(1, _BLOCK // len(Z)))
    return np.concatenate([kernel(rows[block], Z, gamma) @ W for block in blocks])


def _solve_primal(Z, Y, gamma, alpha):
    """Return W = Phi^T (Phi Phi^T + alpha I)^-1 Y, Phi = K'(S, Z), in blocks of Z.

    It takes r x r in memory, and no target x target block is computed.
    """
    S = Z[: len(Y)]
    gram = np.zeros((len(S), len(S)), order="F")
    for block in gen_batches(len(Z), max(1, _BLOCK // len(S))):
        phi = kernel(Z[block], S, gamma).T
        gram = blas.dsyrk(1.0, phi, beta=1.0, c=gram, lower=True, overwrite_c=True)
    gram[np.diag_indices(len(S))] += alpha
    return _stream(Z, S, gamma, cho_solve(cho_factor(gram, lower=True, overwrite_a=True), Y))
