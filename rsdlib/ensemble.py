"""Several models as one: the mean of their predictions, and every choice made on validation predictions alone."""

import itertools

import numpy as np

from rsdlib import metrics
from rsdlib.dakl import DAKL, cluster, least_alpha
from rsdlib.errors import BadValueError, ConfigError

# --- the mean ---------------------------------------------------------------------------------------------------------------


def mean(predictions, weights=None):
    """Return sum_m w_m f_m / |sum_m w_m f_m| over the models' unit predictions f_m (supplementary, Table 5: equal weights).

    Parameters
    ----------
    predictions : dict of str to array-like (n, d), or list of array-like (n, d)
        One array per model, for the same items in the same order; rows are scaled to unit length.
    weights : dict of str to float, or array-like (m,), optional
        One weight per model, not negative: by name for a dict. Equal by default.

    Returns
    -------
    ndarray (n, d), float32, unit rows

    Raises
    ------
    BadValueError
        Shapes disagree, a row is zero or not finite, weights do not belong to these models, or predictions cancel.
    """
    names, stack = _stack(predictions)
    weights = np.ones(len(names)) if weights is None else _in_order(weights, names)
    return metrics._rows(np.tensordot(weights, stack, axes=1), "the mean").astype(np.float32)


def _stack(predictions):
    """Return the models' names, or numbers for a list, and their unit rows (m, n, d)."""
    named = predictions if isinstance(predictions, dict) else dict(enumerate(predictions))
    if not named:
        raise BadValueError("there are no predictions", "Hand in at least one model's.")
    rows = {name: metrics._rows(values, f"the predictions of {name}") for name, values in named.items()}
    shapes = {name: values.shape for name, values in rows.items()}
    if len(set(shapes.values())) > 1:
        raise BadValueError(f"the models' predictions have the shapes {shapes}", "Predict the same items with each.")
    return list(named), np.stack(list(rows.values()))


def _in_order(weights, names):
    """Return the weights (m,) in the models' order, or say which do not belong."""
    if isinstance(weights, dict):
        if set(weights) != set(names):
            raise BadValueError(f"weights are for {sorted(weights)}, predictions of {sorted(names)}", "Name the same models.")
        weights = [weights[name] for name in names]
    elif names != list(range(len(names))):
        raise BadValueError(f"weights without names for the models {names}", "Hand in a dict: name to weight.")
    weights = np.asarray(weights, np.float64)
    if weights.shape != (len(names),):
        raise BadValueError(f"{weights.size} weights for {len(names)} models", "Hand in one weight per model.")
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise BadValueError(f"weights {weights.tolist()} are not usable", "They must be finite, not negative, and not all zero.")
    return weights


def subsets(names):
    """Return every non-empty subset of the models as a tuple, smallest first, in the order of the supplementary's Table 5.

    Parameters
    ----------
    names : iterable of str
        ``"CUSV"`` gives C, U, S, V, CU, CS, CV, US, UV, SV, CUS, CUV, CSV, USV, CUSV.
    """
    names = list(names)
    return [subset for size in range(1, len(names) + 1) for subset in itertools.combinations(names, size)]


# --- choices on validation --------------------------------------------------------------------------------------------------


def check_held_out(keys, trained_on):
    """Refuse validation items that a model has trained on: it is better on them than it will be on new images.

    Parameters
    ----------
    keys : iterable
        The validation items' prompts or their keys (`rsdlib.prompts.key`); images of one prompt share their target.
    trained_on : iterable
        The same of every item that any of the models has trained on.

    Raises
    ------
    BadValueError
    """
    seen = set(trained_on).intersection(keys)
    if seen:
        raise BadValueError(
            f"{len(seen)} of the items were trained on, {min(seen)!r} among them", "Choose on predictions of models that did not."
        )


def fit_weights(predictions, target):
    """Return the convex weights of the mean whose mean cosine similarity to `target` is highest.

    Differs from the paper, whose weights are equal.

    Parameters
    ----------
    predictions : dict or list of array-like (n, d)
        Validation predictions, see `mean`, by models that did not train on these items, see `check_held_out`.
    target : array-like (n, d)
        The validation items' prompt embeddings.

    Returns
    -------
    dict of str to float, or ndarray (m,) for a list
        Not negative, with the sum one. Never worse on these items than equal weights or any single model.
    """
    from scipy.optimize import minimize

    names, stack = _stack(predictions)
    target = metrics._rows(target, "target")
    if target.shape != stack.shape[1:]:
        raise BadValueError(f"predictions have the shape {stack.shape[1:]}, the target {target.shape}", "They must be equal.")
    similarity = np.einsum("mnd,nd->nm", stack, target)  # (n, m)
    between = np.einsum("mnd,knd->nmk", stack, stack)  # (n, m, m)

    def loss(weights):
        """Return minus the mean cosine, and its gradient."""
        spread = between @ weights  # (n, m)
        norm = np.sqrt(np.maximum(spread @ weights, 1e-12))  # (n,)
        cosine = similarity @ weights / norm
        gradient = similarity / norm[:, None] - (cosine / norm**2)[:, None] * spread
        return -cosine.mean(), -gradient.mean(axis=0)

    count = len(names)
    starts = [np.full(count, 1 / count), *np.eye(count)]
    sums_to_one = {"type": "eq", "fun": lambda weights: weights.sum() - 1, "jac": np.ones_like}
    found = [
        minimize(loss, start, jac=True, bounds=[(0, 1)] * count, constraints=sums_to_one, method="SLSQP", options={"ftol": 1e-12}).x
        for start in starts
    ]
    found = [weights / weights.sum() for weights in np.clip(found, 0, 1)]
    best = min([*starts, *found], key=lambda weights: loss(weights)[0])
    return dict(zip(names, best.tolist(), strict=True)) if isinstance(predictions, dict) else best


def fit_blend(a, b, target):
    """Return the weight w in [0, 1] of `b` in ``mean([a, b], [1 - w, w])`` with the highest mean cosine similarity to `target`.

    Parameters
    ----------
    a, b : array-like (n, d)
        Validation predictions, for example of the ensemble and of DAKL.
    target : array-like (n, d)
        The validation items' prompt embeddings.

    Returns
    -------
    float
    """
    return float(fit_weights([a, b], target)[1])


def search_dakl(X, Y, X_val, Y_val, n_clusters, gammas, alphas, n_targets=0, **options):
    """Score DAKL on validation over a grid, with validation as its target domain; each k-means runs once.

    An alpha that is too small for a number of clusters (`rsdlib.dakl.least_alpha`) is left out there.

    Parameters
    ----------
    X, Y : array-like (n, d), (n, q)
        Source predictions and prompt embeddings, see `rsdlib.dakl.DAKL.fit`.
    X_val, Y_val : array-like (t, d), (t, q)
        Validation predictions and prompt embeddings.
    n_clusters : sequence of int
    gammas, alphas : sequence of float
    n_targets : int
        Rows of the largest target that the choice is to be fitted with, if larger than the validation's.
    **options
        Further parameters of `DAKL`.

    Returns
    -------
    pandas.DataFrame
        One row per combination, best first: n_clusters, gamma, alpha, cosine (mean on validation), solver, error. The first three
        of the first row are what to fit on the test images' predictions.
    """
    import pandas as pd

    template = DAKL(**options).get_params()
    table = []
    for count in n_clusters:
        keys = ("centroid_target", "max_iter", "random_state")
        centroids, targets = cluster(X, Y, count, **{key: template[key] for key in keys})
        least = least_alpha(count, max(n_targets, len(X_val)), template["tol"])
        for gamma, alpha in itertools.product(gammas, [alpha for alpha in alphas if alpha >= least]):
            model = DAKL(**{**template, "n_clusters": count, "gamma": gamma, "alpha": alpha})
            cosine = metrics.cosine(model.fit_predict(centroids, targets, X_val), Y_val).mean()
            facts = {"cosine": cosine, "solver": model.solver_, "error": model.error_}
            table.append({"n_clusters": count, "gamma": gamma, "alpha": alpha, **facts})
    if not table:
        raise ConfigError(f"every alpha of {list(alphas)} is lost in float64's rounding", f"Use {least:.1g} or more.")
    return pd.DataFrame(table).sort_values("cosine", ascending=False, kind="stable", ignore_index=True)
