"""How good is a prediction, how sure are we, and is one better than another."""

from dataclasses import dataclass

import numpy as np

from rsdlib.data import cosine, unit_rows
from rsdlib.errors import BadValueError
from rsdlib.runtime import rng

# --- scores ---------------------------------------------------------------------------------------


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
    """RefCLIPScore = harmonic mean of CLIPScore and max(max_r cos(caption, r), 0).

    Source: Hessel et al., 2021, section 3.

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
    cosines = [cosine(caption, references[:, r]) for r in range(references.shape[1])]
    nearest = np.maximum(np.max(cosines, axis=0), 0)
    total = score + nearest
    return np.divide(2 * score * nearest, total, out=np.zeros_like(total), where=total > 0)


def frechet(a, b):
    """Fréchet distance of two sets of features (Heusel et al., 2017).

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) with means m and covariances C.

    Parameters
    ----------
    a, b : array-like (n, d) and (m, d)
        More rows than features, or the covariances say little.

    Returns
    -------
    float
        0 for sets with the same mean and covariance.

    Raises
    ------
    BadValueError
        Dimensions differ, or a set has fewer than two rows.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    shapes = f"features of shapes {a.shape} and {b.shape} cannot be compared"
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise BadValueError(shapes, "Give at least two rows each.")
    C_a = np.atleast_2d(np.cov(a, rowvar=False, ddof=1))
    C_b = np.atleast_2d(np.cov(b, rowvar=False, ddof=1))
    values, vectors = np.linalg.eigh(C_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T  # C_a^(1/2)
    mixed = np.linalg.eigvalsh(root @ C_b @ root)  # the eigenvalues of C_a C_b
    traces = np.trace(C_a) + np.trace(C_b)
    shift = np.square(a.mean(axis=0) - b.mean(axis=0)).sum()
    return float(max(shift + traces - 2 * np.sqrt(np.maximum(mixed, 0)).sum(), 0))


# --- how sure -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean with its bootstrap confidence interval: of `n` items, over `trainings` trainings."""

    mean: float
    low: float
    high: float
    n: int
    trainings: int = 1

    def __str__(self):
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


def bootstrap_ci(values, *, groups=None, level=0.95, resamples=2000, seed=0):
    """Return the mean of `values` with its percentile bootstrap interval (Efron, 1979).

    Each resample draws groups of items, and of s trainings s - 1, independently, with replacement:
    the interval holds the variance over both. Drawing s would state (s - 1) / s of the variance
    over trainings (McCarthy and Snowden, 1985). Few trainings know little of their own spread: of
    three that differ more than items do, the interval is their range, and covers the mean of all
    trainings in 3 of 4 cases. A single training has no spread: its interval says nothing about
    another training of the same method.

    Parameters
    ----------
    values : array-like (n,) or (s, n)
        Of one training, or of s trainings of one method on the same n items.
    groups : array-like (n,), optional
        Items of one group are drawn together. Images of one prompt share their target: pass the
        prompts, or the interval is too narrow.
    level : float
        Coverage.
    resamples, seed : int

    Returns
    -------
    Estimate

    Raises
    ------
    BadValueError
        There are no values, one is not finite, or there is not one group per item.
    """
    sums, sizes = _group_sums(values, groups)
    trainings, count = sums.shape
    generator, of_trainings = rng("bootstrap", seed), rng("bootstrap trainings", seed)
    drawn_trainings = max(trainings - 1, 1)
    even = np.full(trainings, 1 / trainings)
    means = np.empty(resamples)
    for start in range(0, resamples, 256):  # blocks bound the memory
        block = means[start : start + 256]
        drawn = generator.integers(count, size=(len(block), count))
        share = of_trainings.multinomial(drawn_trainings, even, size=len(block)) / drawn_trainings
        totals = np.take_along_axis(share @ sums, drawn, axis=1).sum(axis=1)
        block[:] = totals / sizes[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    mean = sums.mean(axis=0).sum() / sizes.sum()
    return Estimate(float(mean), float(low), float(high), np.shape(values)[-1], trainings)


def _group_sums(values, groups):
    """Return each group's sum by training (s, g) and size (g,); a value alone is its own group."""
    values = np.asarray(values, np.float64)
    if values.ndim not in (1, 2) or not values.size:
        fix = "Hand in one number per item, at least one, or one row of them per training."
        raise BadValueError(f"values of shape {values.shape} cannot be averaged", fix)
    values = np.atleast_2d(values)
    finite = np.isfinite(values).all(axis=0)
    if not finite.all():
        raise BadValueError(f"value {int(np.argmin(finite))} is not finite")
    if groups is None:
        return values, np.ones(values.shape[1])
    if len(groups) != values.shape[1]:
        message = f"{len(groups)} groups for {values.shape[1]} values"
        raise BadValueError(message, "Hand in one group per value.")
    inverse = np.unique(np.asarray(groups), return_inverse=True)[1]
    sums = np.stack([np.bincount(inverse, row) for row in values])
    return sums, np.bincount(inverse).astype(float)


@dataclass(frozen=True)
class Comparison:
    """The mean of paired differences a - b, its interval, and the p-value against no difference."""

    difference: Estimate
    p: float

    def __str__(self):
        mean, low, high = self.difference.mean, self.difference.low, self.difference.high
        return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}], p = {self.p:.2g}"


def paired_test(a, b, *, groups=None, resamples=10_000, seed=0):
    """Compare two scores of the same items: sign-flip permutation test of the mean, two-sided.

    The interval of the difference is that of `bootstrap_ci`, over trainings and groups. The p-value
    flips the signs of groups of items, of the mean over trainings: it asks whether *these*
    trainings differ on other items, and does not know the spread over trainings. Where the two
    disagree, the interval is about the method.

    Parameters
    ----------
    a, b : array-like (n,) or (s, n)
        Scores by one training or by s trainings, for example of equal seeds, of the same n items.
    groups : array-like (n,), optional
        Items of one group flip together; see `bootstrap_ci`.
    resamples, seed : int

    Returns
    -------
    Comparison
        `p` is at least 1 / (resamples + 1).

    Raises
    ------
    BadValueError
        The shapes differ, or see `bootstrap_ci`.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        fix = "A paired test needs the same items in the same order."
        raise BadValueError(f"a has {a.shape}, b {b.shape} values", fix)
    sums = _group_sums(a - b, groups)[0].mean(axis=0)
    observed = abs(sums.sum())
    generator = rng("sign flip", seed)
    extreme = 0
    for start in range(0, resamples, 256):
        size = min(256, resamples - start), len(sums)
        signs = generator.integers(2, size=size) * 2.0 - 1.0
        extreme += int((np.abs(signs @ sums) >= observed * (1 - 1e-12)).sum())
    difference = bootstrap_ci(a - b, groups=groups, seed=seed)
    return Comparison(difference, (extreme + 1) / (resamples + 1))


# --- ranks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Retrieval:
    """Rank of the true prompt among all distinct prompts of the set: 1 is best.

    Chance is (candidates + 1) / 2.
    """

    ranks: np.ndarray  # (n,)
    candidates: int

    @property
    def median_rank(self):
        """Median of the ranks."""
        return float(np.median(self.ranks))

    def recall(self, k):
        """Return the share of images whose true prompt is among the k nearest.

        Chance is k / candidates.
        """
        return float((self.ranks <= k).mean())


def retrieval(pred, target, groups=None, block=1024):
    """Rank each row's own target among the distinct targets by cosine similarity.

    Shared wording inflates cosines; ranks among the same wordings do not flatter.

    Parameters
    ----------
    pred, target : array-like (n, d)
    groups : array-like (n,), optional
        Rows with one group share a target (one prompt, several images); without it every row is its
        own candidate.
    block : int
        Rows compared at a time.

    Returns
    -------
    Retrieval
        Ties count half: a prediction that cannot tell prompts apart gets chance.
    """
    pred, target = unit_rows(pred, "pred"), unit_rows(target, "target")
    groups = np.arange(len(target)) if groups is None else np.asarray(groups)
    _, first, own = np.unique(groups, return_index=True, return_inverse=True)
    candidates = target[first]  # (c, d)
    ranks = np.empty(len(pred))
    for start in range(0, len(pred), block):
        rows = slice(start, start + block)
        scores = pred[rows] @ candidates.T  # (block, c)
        mine = np.take_along_axis(scores, own[rows, None], axis=1)
        ties = np.isclose(scores, mine, rtol=0, atol=1e-12).sum(axis=1) - 1
        better = (scores > mine + 1e-12).sum(axis=1)
        ranks[rows] = 1 + better + ties / 2
    return Retrieval(ranks, len(candidates))
