"""DAKL's affine form: the ridge regression with a line in place of k', and a bound of its error.

Z = [S; T] are n = r + t unit rows in d dimensions: r centroids S, t target predictions T. K' holds
k'(c) = exp(-gamma (1 - c) / 2) of their cosines c. An index s or t picks the rows that belong to S
or T, so Phi = K'_s. With the centroids' targets Y (r, q), DAKL predicts for the target rows

    K'_t W,   W = Phi^T (Phi Phi^T + alpha I)^-1 Y = (Phi^T Phi + alpha I)^-1 Phi^T Y.           (1)

Step 1, line. The least-squares line a_0 + a_1 c of k' splits K' = L + R. With F = [1, Z], of shape
(n, 1 + d), and D = diag(a_0, a_1, ..., a_1), the line's part is L = F D F^T.

Step 2, axes. From the Cholesky factor B of F^T F = B B^T come O = F B^-T, with orthonormal columns,
and Q = D B, so that L = F D B O^T = U O^T with U = F Q: n rows, but only 1 + d columns.

Step 3, solution. With L_s = U_s O^T for Phi, and A = U_s^T U_s + alpha I, (1) becomes

    U_t theta,   W = O theta,   theta = A^-1 U_s^T Y,   and [1, x] Q theta at any x.

From the Cholesky factor of A comes M with A^-1 = M^T M. With V = Q M^T and beta = M U_s^T Y, this
is beta = V^T F_s^T Y, theta = M^T beta and Q theta = V beta. The residual is E = Y - U_s theta.

Step 4, first-order error. R adds to (1), by the derivative of W at Phi = L_s,

    R_t W + L_t dW,   dW = (L_s^T L_s + alpha I)^-1 (R_s^T E - L_s^T R_s W),

and as L_s = U_s O^T and L_t = U_t O^T, this is

    U_t A^-1 (O^T R_s^T E - U_s^T R_s O theta) + R_t O theta.                                    (2)

What is of second order is small, because |R| > sqrt(alpha) / 10 is refused (Frobenius norm).

Step 5, size of R. |R| is bounded from the cosines of sampled pairs of rows, by Chernoff's bound.

Step 6, first certificate. With spectral norms of all but R, the Frobenius norm of (2) is at most

    |R| (|U_t A^-1| |E| + (|U_t A^-1 U_s^T| + 1) |theta|).

With N = M U_t^T U_t M^T, the Gram matrix of U_t A^-1 is M^T N M; |U_t A^-1 U_s^T| is at most the
root of |N|; and E^T E = Y^T Y - beta^T beta - alpha theta^T theta.

Step 7, second certificate, where the first is above the tolerance. A parabola takes up nearly all
of R: R = P + rest, where P holds p(c) = b_0 + b_1 c + b_2 c^2, the least-squares parabola of k'
minus its line. P v, as a function of x, is at the cost of O(n d^2)

    [1, x] diag(b_0, b_1, ..., b_1) F^T v + b_2 x^T (Z^T diag(v) Z) x.                           (3)

So (2) is computed with P for R, times random g ~ N(0, I_q): the mean square over three of them
estimates its Frobenius norm, which is trebled. An error of rank one, the worst case, escapes in 5
fits of 100, any other rarely. The rest of R is bounded as in step 6.
"""

from collections import namedtuple
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import Polynomial
from scipy.linalg import solve_triangular

from rsdlib import runtime


def k_prime(cosines, gamma, out=None):
    """Return k'(c) = exp(-gamma (1 - c) / 2)."""
    exponents = np.subtract(cosines, 1, out=out)
    exponents *= gamma / 2
    return np.exp(exponents, out=exponents)


@dataclass(frozen=True)
class AffineForm:
    """The prediction [1, x] Q theta of step 3, and how far k' is from its line."""

    coef: np.ndarray  # Q theta (1 + d, q)
    line: Polynomial
    gamma: float
    centroids: np.ndarray  # some of them (c, d)

    def __call__(self, rows):
        """Return the predictions (m, q), not yet of unit length, at unit rows (m, d)."""
        return rows @ self.coef[1:] + self.coef[0]

    def residual(self, rows):
        """Return the median of |k' - line| over the cosines of some rows to some centroids."""
        cosines = (rows[:: -(-len(rows) // 1024)] @ self.centroids.T).ravel()
        return float(np.median(np.abs(k_prime(cosines, self.gamma) - self.line(cosines))))


def fit_affine(Z, Y, gamma, alpha, tol, seed):
    """Return the affine form and its certified error, relative to the predictions' norm.

    `Z` (n, d) are unit rows, centroids first; `Y` is (r, q). Where R is too large for a first-order
    certificate (step 4), the form is None and the error infinite.
    """
    F = np.column_stack([np.ones(len(Z)), Z])
    F_s, F_t = F[: len(Y)], F[len(Y) :]
    cosines = _sample_cosines(Z, seed)
    line = _fit_polynomial(cosines, gamma, degree=1)
    size = _bound_norm(cosines, gamma, line, len(Z))
    if not size <= 0.1 * np.sqrt(alpha):
        return None, np.inf
    ridge = _solve(F_s, F_t, Y, line, alpha)
    form = AffineForm(ridge.V @ ridge.beta, line, gamma, Z[: len(Y) : -(-len(Y) // 16)])
    norm = np.sqrt(np.einsum("pq,pq->", ridge.beta, ridge.N @ ridge.beta))  # |U_t theta|
    for norms in _norms(ridge, Y, alpha):
        gain = _gain(*norms)
        if size * gain / norm <= tol:
            return form, float(size * gain / norm)
    curve = _fit_polynomial(cosines, gamma, degree=2)
    probed = _probe(ridge, curve - line, F, Y - F_s @ form.coef, seed)
    rest = _bound_norm(cosines, gamma, curve, len(Z)) * gain
    return form, float((3 * probed + rest) / norm)


# --- step 1: the line; step 5: the size of what it leaves -----------------------------------------


def _sample_cosines(Z, seed):
    """Return the cosines of 4,096 pairs of two different rows."""
    first, step = runtime.rng("DAKL pairs", seed).integers([[0], [1]], len(Z), size=(2, 2**12))
    return np.einsum("pd,pd->p", Z[first], Z[(first + step) % len(Z)])


def _fit_polynomial(cosines, gamma, degree):
    """Return the least-squares fit of k' on the cosines."""
    powers = np.vander(cosines, degree + 1, increasing=True)
    return Polynomial(np.linalg.lstsq(powers, k_prime(cosines, gamma))[0])


def _bound_norm(cosines, gamma, polynomial, n):
    """Return a bound on the Frobenius norm of K' (n, n) minus its polynomial.

    With probability 0.999, by Chernoff's bound: the mean of values in [0, c] is at most
    2 (sample mean + c log(1000) / size). The diagonal, where the cosine is one, is exact.
    """
    everywhere = np.linspace(-1, 1, 1001)
    sampled = np.square(k_prime(cosines, gamma) - polynomial(cosines))
    squares = np.square(k_prime(everywhere, gamma) - polynomial(everywhere))
    off_diagonal = 2 * (sampled.mean() + squares.max() * np.log(1000) / len(sampled))
    return n * np.sqrt(off_diagonal + squares[-1] / n)


# --- steps 2 and 3: axes and solution -------------------------------------------------------------


# All are (1 + d, 1 + d), but beta and theta (1 + d, q).
_Ridge = namedtuple("_Ridge", "B Q M V N beta theta")


def _solve(F_s, F_t, Y, line, alpha):
    """Return the ridge regression with the line in place of k'."""
    gram_s, gram_t = F_s.T @ F_s, F_t.T @ F_t
    identity = np.eye(len(gram_s))
    rounding = 10 * np.finfo(float).eps * (len(F_s) + len(F_t))  # keeps F^T F positive definite
    B = np.linalg.cholesky(gram_s + gram_t + rounding * identity)
    Q = np.repeat(line.coef, [1, len(B) - 1])[:, None] * B
    A = Q.T @ gram_s @ Q + alpha * identity
    M = solve_triangular(np.linalg.cholesky(A), identity, lower=True)
    V = Q @ M.T
    beta = V.T @ (F_s.T @ Y)
    return _Ridge(B, Q, M, V, V.T @ gram_t @ V, beta, M.T @ beta)


# --- step 6: the first certificate ----------------------------------------------------------------


def _gain(of_reach, of_through, of_E, of_theta):
    """Return the bound of (2) relative to |R|, from bounds of the four norms in their order."""
    return of_reach * of_E + (of_through + 1) * of_theta


def _norms(ridge, Y, alpha):
    """Yield bounds of |U_t A^-1|, |U_t A^-1 U_s^T|, |E| and |theta|, ever closer and dearer."""
    beta, theta = ridge.beta, ridge.theta
    reach = ridge.M.T @ ridge.N @ ridge.M
    of_U = np.sqrt(np.linalg.norm(reach)), np.sqrt(np.linalg.norm(ridge.N))
    E_squared = np.square(Y).sum() - np.square(beta).sum() - alpha * np.square(theta).sum()
    yield *of_U, np.sqrt(max(E_squared, 0)), np.linalg.norm(theta)
    theta_gram = theta.T @ theta
    grams = reach, ridge.N, Y.T @ Y - beta.T @ beta - alpha * theta_gram, theta_gram
    yield [np.sqrt(np.linalg.norm(gram)) for gram in grams]
    yield [np.sqrt(max(np.linalg.eigvalsh(gram)[-1], 0)) for gram in grams]


# --- step 7: the second certificate ---------------------------------------------------------------


def _probe(ridge, p, F, E, seed):
    """Estimate the Frobenius norm of (2) with P for R, from at most 4,096 target rows."""
    F_s, F_t = F[: len(E)], F[len(E) :]
    asked = F_t[:: -(-len(F_t) // 4096)]
    to_axes = np.linalg.inv(ridge.B)  # O^T = B^-1 F^T
    errors = []
    for g in runtime.rng("DAKL probes", seed).normal(size=(3, E.shape[1])):
        O_theta = F @ (to_axes.T @ (ridge.theta @ g))
        P_O_theta = _times(p, F, O_theta)
        inner = to_axes @ (F.T @ _times(p, F_s, E @ g)(F))  # O^T P_s^T E g
        inner -= ridge.Q.T @ (F_s.T @ P_O_theta(F_s))  # U_s^T P_s O theta g
        errors.append(asked @ (ridge.V @ (ridge.M @ inner)) + P_O_theta(asked))
    return np.sqrt(len(F_t) * np.square(errors).mean())


def _times(p, F, v):
    """Return (3) as a function of x, given as rows [1, x]."""
    linear = np.repeat(p.coef[:2], [1, F.shape[1] - 1]) * (F.T @ v)
    Z = F[:, 1:].astype(np.float32)
    square = p.coef[2] * ((Z * v[:, None].astype(np.float32)).T @ Z)

    def evaluate(rows):
        x = rows[:, 1:].astype(np.float32)
        return rows @ linear + np.einsum("nd,nd->n", x @ square.astype(np.float32), x)

    return evaluate
