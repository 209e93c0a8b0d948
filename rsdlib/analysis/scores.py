"""Predictions of several methods, compared on the same items."""

from dataclasses import asdict, dataclass, field

import numpy as np
import pandas as pd

from rsdlib.analysis import metrics


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
        rows = []
        for method in self.predictions:
            row = {"method": method, **self.score(method)}
            if method not in baselines:
                row |= {f"gain over {name}": self.gain(method, name) for name in baselines}
            rows.append(row)
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
