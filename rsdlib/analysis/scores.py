"""Predictions of several methods, compared on the same items."""

from dataclasses import asdict, dataclass, field

import pandas as pd

from rsdlib.analysis import metrics


def score(pred, target, groups):
    """Return the figures that every result states.

    Parameters
    ----------
    pred, target : ndarray (n, d)
    groups : array-like (n,)
        The prompts' keys: images of one prompt are resampled together and share one candidate in
        the retrieval.

    Returns
    -------
    dict
        cosine (mean, low, high, n), median_rank, recall@1/5/10 and the number of candidates.
    """
    ranks = metrics.retrieval(pred, target, groups)
    cosine = metrics.bootstrap_ci(metrics.cosine(pred, target), groups=groups)
    recalls = {f"recall@{k}": ranks.recall(k) for k in (1, 5, 10)}
    facts = {"median_rank": ranks.median_rank, **recalls, "candidates": ranks.candidates}
    return {"cosine": asdict(cosine), **facts}


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
    predictions : dict of str to ndarray (n, d)
        By method; to be filled.
    """

    rows: object
    target: object
    groups: object
    predictions: dict = field(default_factory=dict)

    def cosine(self, method):
        """Return each item's cosine similarity under `method`: (n,)."""
        return metrics.cosine(self.predictions[method], self.target)

    def estimate(self, method):
        """Return a method's mean cosine similarity with its interval, as a dict."""
        return asdict(metrics.bootstrap_ci(self.cosine(method), groups=self.groups))

    def gain(self, method, over):
        """Return a method's gain in cosine similarity over another with its test, as a dict."""
        values = self.cosine(method), self.cosine(over)
        return asdict(metrics.paired_test(*values, groups=self.groups))

    def table(self, baselines):
        """Return one row per method: its scores, and its gain over each baseline."""
        rows = []
        for method, pred in self.predictions.items():
            row = {"method": method, **score(pred, self.target, self.groups)}
            if method not in baselines:
                row |= {f"gain over {name}": self.gain(method, name) for name in baselines}
            rows.append(row)
        return rows


def as_table(rows):
    """Return score rows as a data frame to read: intervals in brackets, gains with p-values.

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
        return f"{_text(value['difference'])}, p = {value['p']:.2g}"
    if isinstance(value, dict):
        return f"{value['mean']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"
    return f"{value:.3g}" if isinstance(value, float) else value
