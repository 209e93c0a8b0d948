"""Predictions of several methods, compared on the same items; and what some studies ask of them."""

from dataclasses import asdict, dataclass, field, replace
from itertools import combinations

import numpy as np
import pandas as pd

from rsdlib import ensemble
from rsdlib.analysis import metrics
from rsdlib.errors import BadValueError, refusing


@dataclass
class Scores:
    """Predictions of several methods for the items of one split.

    Attributes
    ----------
    rows : ndarray of int (n,)
        Of the pairs.
    target : ndarray (n, d)
        True embeddings.
    groups : ndarray (n,)
        Prompt of each item.
    predictions : dict of str to ndarray (n, d), or to a list of them
        By method, a list of one array for each training; to be filled.
    """

    rows: object
    target: object
    groups: object
    predictions: dict = field(default_factory=dict)

    def cosine(self, method):
        """Return each item's cosine similarity under `method`: (n,), of s trainings (s, n)."""
        several = metrics.each_training(self.predictions[method])
        cosines = np.stack([metrics.cosine(pred, self.target) for pred in several])
        return cosines if len(several) > 1 else cosines[0]

    def ranks(self, method):
        """Return the `Retrieval` of all images, of all trainings."""
        several = metrics.each_training(self.predictions[method])
        found = [metrics.retrieval(pred, self.target, self.groups) for pred in several]
        return metrics.Retrieval(np.concatenate([r.ranks for r in found]), found[0].candidates)

    def score(self, method):
        """Return the figures that every result states; those of retrieval are over `ranks`."""
        ranks, cosine = self.ranks(method), self.estimate(method)
        recalls = {f"recall@{k}": ranks.recall(k) for k in (1, 5, 10)}
        facts = {"median_rank": ranks.median_rank, **recalls, "candidates": ranks.candidates}
        return {"trainings": cosine["trainings"], "cosine": cosine, **facts}

    def estimate(self, method):
        """Return a method's mean cosine similarity with its interval, as a dict."""
        return asdict(metrics.bootstrap_ci(self.cosine(method), groups=self.groups))

    def gain(self, method, over):
        """Return a method's gain in cosine similarity over another with its test, as a dict."""
        test = metrics.paired_test(self.cosine(method), self.cosine(over), groups=self.groups)
        return asdict(test) | {"over": over}

    def table(self, baselines):
        """Return one row per method: its scores, and its gain over each baseline."""
        rows = [{"method": method, **self.score(method)} for method in self.predictions]
        for row in rows:
            if row["method"] not in baselines:
                row |= {f"gain over {name}": self.gain(row["method"], name) for name in baselines}
        return rows


def as_table(rows):
    """Return score rows as a data frame to read: intervals in brackets, gains with a verdict.

    Gains of one training have none and show their p-value.

    Parameters
    ----------
    rows : list of dict
        With ``method``; estimates and comparisons are dicts.

    Returns
    -------
    DataFrame
        One column a method.
    """
    texts = [{name: _text(value) for name, value in row.items()} for row in rows]
    return pd.DataFrame(texts).fillna("").set_index("method").T


def _text(value):
    if isinstance(value, dict) and "p" in value:
        gain = metrics.Comparison.read(value | {"over": ""})  # the row's name says it
        return f"{gain.signed}, {gain.verdict}" if gain.difference.trainings > 1 else str(gain)
    if isinstance(value, dict):
        return str(metrics.Estimate(**value))
    return f"{value:.3g}" if isinstance(value, float) else value


# --- ensembles, the swap, captions ----------------------------------------------------------------


def ensemble_tables(predictions, val, test):
    """Score every subset of models, with equal weights and with weights fitted on validation.

    Supplementary, Table 5. *Gain*: over that member of the subset which is best on validation,
    tested on the same test images. Training k of an ensemble is of each member's training k.

    Parameters
    ----------
    predictions : dict of str to dict of str to ndarray (n, d), or to a list of s of them
        ``"val"`` and ``"test"`` to model to predictions, of one training or of s of each model.
    val, test : Scores
        `test` is given the predictions of every subset, by its letters: a list, one a training.

    Returns
    -------
    equal, fitted : list of dict
        One row a subset; the fitted ones state their ``weights``, of s trainings the mean.
    """
    val = replace(val, predictions=predictions["val"])
    on_val = {model: val.cosine(model).mean() for model in val.predictions}
    test.predictions |= predictions["test"]
    equal, fitted = [], []
    initials = len({model[0] for model in on_val}) == len(on_val)
    for subset in subsets(on_val):
        label = "".join(m[0].upper() for m in subset) if initials else " + ".join(subset)
        mine = {split: _by_training(models, subset) for split, models in predictions.items()}
        weights = [ensemble.fit_weights(one, val.target) for one in mine["val"]]
        best = max(subset, key=on_val.get)
        for table, method in ((equal, label), (fitted, f"{label}, fitted")):
            chosen = weights if table is fitted else [None] * len(weights)
            test.predictions[method] = list(map(ensemble.mean, mine["test"], chosen))
            row = {"method": method, "cosine": test.estimate(method)}
            if len(subset) > 1:
                row |= {"best member": best, "gain over it": test.gain(method, best)}
            if table is fitted:
                row["weights"] = {m: float(np.mean([w[m] for w in weights])) for m in subset}
            table.append(row)
    return equal, fitted


def subsets(names):
    """Return every non-empty subset in the order of the supplementary's Table 5: C, U, ..., CU."""
    return [group for size in range(len(names)) for group in combinations(names, size + 1)]


def _by_training(predictions, models):
    """Return for each training some models' predictions."""
    several = [metrics.each_training(predictions[model]) for model in models]
    with refusing(ValueError, BadValueError, "the models' trainings are not equally many: {}"):
        return [dict(zip(models, one, strict=True)) for one in zip(*several, strict=True)]


def swap_table(measured, groups, original=("original", "never")):
    """Compare what was measured on swapped pictures with the original's, paired.

    Parameters
    ----------
    measured : dict of (str, str) to dict of str to ndarray (n,) or (s, n)
        Encoder and place of the swap to kind of measurement to its values, of one training or of s;
        NaN where it does not apply.
    groups : ndarray (n,)
        The pictures' prompts.
    original : (str, str)
        Whose values the others are compared with.

    Returns
    -------
    list of dict
        ``encoder``, ``swap after``, ``of``, ``n``; mean, low and high; ``gain`` over the original.
    """
    table = []
    for place, kinds in measured.items():
        for kind, values in kinds.items():
            applies = ~np.isnan(np.atleast_2d(values)).any(axis=0)
            row = {"encoder": place[0], "swap after": place[1], "of": kind, "n": int(applies.sum())}
            if applies.any():
                now, those = values[..., applies], groups[applies]
                row |= asdict(metrics.bootstrap_ci(now, groups=those))
                if place[0] != original[0] and place[1] != original[1]:
                    before = measured[original][kind][..., applies]
                    row["gain"] = asdict(metrics.paired_test(now, before, groups=those))
            table.append(row)
    return table


def rivals(looks, prompts, asked):
    """Count, for some images, the other prompts whose images are as alike as drawings of one.

    Two drawings of the *same* prompt say how alike images of one prompt usually are (their median);
    a prompt with an image at least that alike could have been the image's, as far as it tells.

    Parameters
    ----------
    looks : ndarray (n, d)
        Features of images.
    prompts : array-like (n,)
        Which prompt each was made from.
    asked : ndarray of bool (n,)
        The images to count for; the others are their possible rivals.

    Returns
    -------
    counts : ndarray of int
        One for each image that was asked for.
    usual : float
        Median cosine of two drawings of one prompt; without any, the 0.99 quantile of all pairs.
    """
    looks = looks / np.linalg.norm(looks, axis=1, keepdims=True)
    prompts = np.unique(np.asarray(prompts), return_inverse=True)[1]
    alike = looks @ looks.T
    twins = (prompts[:, None] == prompts[None]) & ~np.eye(len(prompts), dtype=bool)
    usual = np.median(alike[twins]) if twins.any() else np.quantile(alike, 0.99)
    near = alike[asked][:, ~asked] >= usual
    return np.array([len(np.unique(prompts[~asked][row])) for row in near]), float(usual)
