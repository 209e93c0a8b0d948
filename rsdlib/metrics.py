"""How good is a prediction, how sure are we, and is one better than another."""

from dataclasses import dataclass

import numpy as np

from rsdlib.errors import BadValueError
from rsdlib.runtime import rng


def cosine(pred, target):
    """Return the cosine similarity of each row pair, the paper's score.

    Parameters
    ----------
    pred, target : array-like (n, d)

    Returns
    -------
    ndarray (n,), float64

    Raises
    ------
    BadValueError
        Shapes differ, a value is not finite, or a row is zero: it has no direction, and one NaN would eat the whole mean.
    """
    pred, target = _rows(pred, "pred"), _rows(target, "target")
    if pred.shape != target.shape:
        raise BadValueError(f"pred has shape {pred.shape}, target {target.shape}", "They must be equal.")
    return np.einsum("nd,nd->n", pred, target)


def _rows(values, name):
    """Return finite unit rows in float64, or name the first row that cannot be one."""
    values = np.asarray(values, np.float64)
    if values.ndim != 2:
        raise BadValueError(f"{name} has {values.ndim} dimensions, not 2 (rows, features)")
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        raise BadValueError(f"row {int(np.argmin(finite))} of {name} is not finite")
    norms = np.linalg.norm(values, axis=1, keepdims=True)  # (n, 1)
    if not norms.all():
        raise BadValueError(f"row {int(np.argmin(norms[:, 0]))} of {name} is zero: it has no direction")
    return values / norms


def clipscore(image, caption, w=2.5):
    """CLIPScore = w * max(cos(image, caption), 0) (Hessel et al., 2021, section 3).

    Parameters
    ----------
    image, caption : array-like (n, d)
        CLIP embeddings; captions are embedded with the prefix "A photo depicts".
    w : float
        The source's 2.5 stretches ViT-B/32's usual range.

    Returns
    -------
    ndarray (n,)
        In [0, w].
    """
    return w * np.maximum(cosine(image, caption), 0)


def ref_clipscore(image, caption, references, w=2.5):
    """RefCLIPScore = harmonic mean of CLIPScore and max(max_r cos(caption, r), 0) (Hessel et al., 2021, section 3).

    Parameters
    ----------
    image, caption : array-like (n, d)
    references : array-like (n, d) or (n, r, d)
        One or more reference captions for each image.
    w : float

    Returns
    -------
    ndarray (n,)
        0 where either part is 0.
    """
    score, references = clipscore(image, caption, w), np.asarray(references, np.float64)
    references = references[:, None] if references.ndim == 2 else references  # (n, r, d)
    nearest = np.max([cosine(caption, references[:, r]) for r in range(references.shape[1])], axis=0)
    nearest = np.maximum(nearest, 0)
    total = score + nearest
    return np.divide(2 * score * nearest, total, out=np.zeros_like(total), where=total > 0)


def frechet(a, b):
    """Fréchet distance of two sets of features (Heusel et al., 2017): |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    Parameters
    ----------
    a, b : array-like (n, d) and (m, d)
        More rows than features, or the covariances say little.

    Returns
    -------
    float
        0 for sets with the same mean and covariance.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise BadValueError(f"features of shapes {a.shape} and {b.shape} cannot be compared", "Give at least two rows each.")
    covariance_a, covariance_b = np.cov(a, rowvar=False, ddof=1), np.cov(b, rowvar=False, ddof=1)
    values, vectors = np.linalg.eigh(np.atleast_2d(covariance_a))
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T  # C_a^(1/2): C_a C_b has the eigenvalues of root C_b root
    mixed = np.linalg.eigvalsh(root @ np.atleast_2d(covariance_b) @ root)
    traces = np.trace(np.atleast_2d(covariance_a)) + np.trace(np.atleast_2d(covariance_b))
    mean = np.square(a.mean(axis=0) - b.mean(axis=0)).sum()
    return float(max(mean + traces - 2 * np.sqrt(np.maximum(mixed, 0)).sum(), 0))


@dataclass(frozen=True)
class Estimate:
    """A mean with its bootstrap confidence interval."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self):
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


def _group_sums(values, groups):
    """Return each group's sum and size; without groups every value is its own."""
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise BadValueError(f"values of shape {values.shape} cannot be averaged", "Hand in one number per item, at least one.")
    if not np.isfinite(values).all():
        raise BadValueError(f"value {int(np.argmin(np.isfinite(values)))} is not finite")
    if groups is None:
        return values, np.ones(len(values))
    groups = np.asarray(groups)
    if len(groups) != len(values):
        raise BadValueError(f"{len(groups)} groups for {len(values)} values", "Hand in one group per value.")
    _, inverse = np.unique(groups, return_inverse=True)
    return np.bincount(inverse, values), np.bincount(inverse).astype(float)


def bootstrap_ci(values, *, groups=None, level=0.95, resamples=2000, seed=0):
    """Return the mean of `values` with its percentile bootstrap interval (Efron 1979).

    Parameters
    ----------
    values : array-like (n,)
    groups : array-like (n,), optional
        Items of one group are drawn together. Images of one prompt share their target: pass the prompts, or the interval is too
        narrow.
    level : float
        Coverage.
    resamples, seed : int

    Returns
    -------
    Estimate
    """
    sums, sizes = _group_sums(values, groups)
    generator = rng("bootstrap", seed)
    means = np.empty(resamples)
    for start in range(0, resamples, 256):  # blocks bound the memory
        drawn = generator.integers(len(sums), size=(min(256, resamples - start), len(sums)))
        means[start : start + len(drawn)] = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(sums.sum() / sizes.sum()), float(low), float(high), len(np.asarray(values)))


@dataclass(frozen=True)
class Comparison:
    """The mean of paired differences a - b, its interval, and the p-value against no difference."""

    difference: Estimate
    p: float

    def __str__(self):
        return f"{self.difference.mean:+.4f} [{self.difference.low:+.4f}, {self.difference.high:+.4f}], p = {self.p:.2g}"


def paired_test(a, b, *, groups=None, resamples=10_000, seed=0):
    """Compare two scores of the same items: sign-flip permutation test of the mean difference, two-sided.

    Parameters
    ----------
    a, b : array-like (n,)
    groups : array-like (n,), optional
        Items of one group flip together; see `bootstrap_ci`.
    resamples, seed : int

    Returns
    -------
    Comparison
        `p` is at least 1 / (resamples + 1).
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise BadValueError(f"a has {a.shape}, b {b.shape} values", "A paired test needs the same items in the same order.")
    sums, _ = _group_sums(a - b, groups)
    generator = rng("sign flip", seed)
    observed = abs(sums.sum())
    extreme = 0
    for start in range(0, resamples, 256):
        signs = generator.integers(2, size=(min(256, resamples - start), len(sums))) * 2.0 - 1.0
        extreme += int((np.abs(signs @ sums) >= observed * (1 - 1e-12)).sum())
    return Comparison(bootstrap_ci(a - b, groups=groups, seed=seed), (extreme + 1) / (resamples + 1))


@dataclass(frozen=True)
class Retrieval:
    """Rank of the true prompt among all distinct prompts of the set: 1 is best, (candidates + 1) / 2 is chance."""

    ranks: np.ndarray  # (n,)
    candidates: int

    @property
    def median_rank(self):
        """Median of the ranks."""
        return float(np.median(self.ranks))

    def recall(self, k):
        """Return the share of images whose true prompt is among the k nearest; chance is k / candidates."""
        return float((self.ranks <= k).mean())


def retrieval(pred, target, groups=None, block=1024):
    """Rank each row's own target among the distinct targets by cosine similarity.

    Shared wording inflates cosines; ranks among the same wordings do not flatter.

    Parameters
    ----------
    pred, target : array-like (n, d)
    groups : array-like (n,), optional
        Rows with one group share a target (one prompt, several images); without it every row is its own candidate.
    block : int
        Rows compared at a time.

    Returns
    -------
    Retrieval
        Ties count half: a prediction that cannot tell prompts apart gets chance.
    """
    pred, target = _rows(pred, "pred"), _rows(target, "target")
    first, own = np.arange(len(target)), np.arange(len(target))
    if groups is not None:
        _, first, own = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
    candidates = target[first]  # (c, d)
    ranks = np.empty(len(pred))
    for start in range(0, len(pred), block):
        rows = slice(start, start + block)
        scores = pred[rows] @ candidates.T  # (block, c)
        mine = scores[np.arange(len(scores)), own[rows]][:, None]
        ties = np.isclose(scores, mine, rtol=0, atol=1e-12).sum(axis=1) - 1
        better = (scores > mine + 1e-12).sum(axis=1)
        ranks[rows] = 1 + better + ties / 2
    return Retrieval(ranks, len(candidates))
