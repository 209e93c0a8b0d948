"""The mean of the models' predictions, and every choice made on validation predictions alone."""

from itertools import product

import numpy as np
import pandas as pd
from scipy.optimize import minimize

from rsdlib.data import cosine, unit_rows
from rsdlib.ensemble.dakl import DAKL, cluster, least_alpha
from rsdlib.errors import BadValueError, ConfigError, refusing

# --- the mean -------------------------------------------------------------------------------------


def mean(predictions, weights=None):
    """Return sum_m w_m f_m / |sum_m w_m f_m| over the models' unit predictions f_m.

    The paper's ensembles have equal weights (supplementary, Table 5).

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
        Shapes disagree, a row is zero or not finite, weights do not belong to these models, or
        predictions cancel.
    """
    names, stack = _stack(predictions)
    weights = pd.Series(dict.fromkeys(names, 1) if weights is None else weights, dtype=float)
    if set(weights.index) != set(names):
        message = f"the weights are for {list(weights.index)}, the predictions of {names}"
        raise BadValueError(message, "Hand in one per model, by name where models have names.")
    weights = weights.loc[names].to_numpy()
    if not (weights.min() >= 0 and 0 < weights.sum() < np.inf):
        raise BadValueError(f"weights {weights} are not usable", "Use finite ones from 0 on.")
    return unit_rows(np.tensordot(weights, stack, axes=1), "the mean").astype(np.float32)


def _stack(predictions):
    """Return the models' names, or numbers for a list, and their unit rows (m, n, d)."""
    named = _named(predictions).items()
    rows = {name: unit_rows(values, f"the predictions of {name}") for name, values in named}
    fix = "Predict the same items with each of one or more models."
    with refusing(ValueError, BadValueError, "the models' predictions do not fit: {}", fix):
        stack = np.stack(list(rows.values()))
    return list(rows), stack


def _named(values):
    return values if isinstance(values, dict) else dict(enumerate(values))


def align(predictions, known):
    """Return predictions, all moved by one vector so that their mean is that of `known`.

    What a new domain adds to every prediction alike goes. No target is read, but the domain's
    prompts must be those of the known one on average.

    Parameters
    ----------
    predictions : array-like (n, d)
        Of the domain's images.
    known : array-like (m, d)
        Of images such as the models have trained on.

    Returns
    -------
    ndarray (n, d), float32, unit rows

    Raises
    ------
    BadValueError
        A row is zero or not finite, before or after.
    """
    rows, known = unit_rows(predictions, "predictions"), unit_rows(known, "known")
    moved = rows + known.mean(axis=0) - rows.mean(axis=0)
    return unit_rows(moved, "the moved predictions").astype(np.float32)


# --- choices on validation ------------------------------------------------------------------------


def check_held_out(keys, trained_on):
    """Refuse validation items that a model has trained on.

    It is better on them than it will be on new images.

    Parameters
    ----------
    keys : iterable
        The validation items' prompts or their keys (`rsdlib.data.prompt_key`); images of one
        prompt share their target.
    trained_on : iterable
        The same of every item that any of the models has trained on.

    Raises
    ------
    BadValueError
    """
    shared = set(trained_on).intersection(keys)
    if shared:
        message = f"{len(shared)} of the items were trained on, {min(shared)!r} among them"
        raise BadValueError(message, "Choose on predictions of models that did not.")


def fit_weights(predictions, target):
    """Return the convex weights of the mean whose mean cosine similarity to `target` is highest.

    Differs from the paper, whose weights are equal.

    Parameters
    ----------
    predictions : dict or list of array-like (n, d)
        Validation predictions, see `mean`, by models that did not train on these items, see
        `check_held_out`.
    target : array-like (n, d)
        The validation items' prompt embeddings.

    Returns
    -------
    dict of str to float, or ndarray (m,) for a list
        Not negative, with the sum one. Never worse on these items than equal weights or any single
        model.

    Raises
    ------
    BadValueError
        See `mean`; or the target has another shape.
    """
    (*names, _), (*stack, target) = _stack({**_named(predictions), "the target": target})
    loss = _minus_cosine(np.array(stack), target)
    starts = [np.full(len(names), 1 / len(names)), *np.eye(len(names))]
    candidates = [*starts, *(_descend(loss, start) for start in starts)]
    best = min(candidates, key=lambda weights: loss(weights)[0])
    return dict(zip(names, best.tolist(), strict=True)) if isinstance(predictions, dict) else best


def _minus_cosine(stack, target):
    """Return the function of the weights (m,) that gives minus the mean cosine and its gradient."""
    similarity = np.einsum("mnd,nd->nm", stack, target)
    between = np.einsum("mnd,knd->nmk", stack, stack)

    def loss(weights):
        spread = between @ weights  # (n, m)
        norm = np.sqrt(np.maximum(spread @ weights, 1e-12))  # (n,)
        cosines = similarity @ weights / norm
        gradient = similarity / norm[:, None] - (cosines / norm**2)[:, None] * spread
        return -cosines.mean(), -gradient.mean(axis=0)

    return loss


def _descend(loss, start):
    """Return the convex weights at the local minimum that `start` leads to."""
    sums_to_one = {"type": "eq", "fun": lambda weights: weights.sum() - 1, "jac": np.ones_like}
    limits = {"bounds": [(0, 1)] * len(start), "constraints": sums_to_one}
    result = minimize(loss, start, jac=True, method="SLSQP", options={"ftol": 1e-12}, **limits)
    weights = np.clip(result.x, 0, 1)
    return weights / weights.sum()


def search_dakl(X, Y, X_val, Y_val, n_clusters, gammas, alphas, n_targets=0, **options):
    """Score DAKL on validation over a grid, with validation as its target domain.

    Each k-means runs once. An alpha that is too small for a number of clusters (`least_alpha`) is
    left out there.

    Parameters
    ----------
    X, Y : array-like (n, d), (n, q)
        Source predictions and prompt embeddings, see `DAKL.fit`.
    X_val, Y_val : array-like (t, d), (t, q)
        Validation predictions and prompt embeddings.
    n_clusters : sequence of int
    gammas, alphas : sequence of float
    n_targets : int
        Rows of the largest target that the choice is to be fitted with, if larger than the
        validation's.
    **options
        Further parameters of `DAKL`.

    Returns
    -------
    pandas.DataFrame
        One row per combination, best first: n_clusters, gamma, alpha, cosine (mean on validation),
        solver, error. The first three of the first row are what to fit on the test images'
        predictions.

    Raises
    ------
    ConfigError
        Every alpha is too small.
    """
    template = DAKL(**options)
    table = []
    for count in n_clusters:
        centroids, targets = cluster(X, Y, count, template.max_iter, template.random_state)
        least = least_alpha(count, max(n_targets, len(X_val)), template.tol)
        for gamma, alpha in product(gammas, [alpha for alpha in alphas if alpha >= least]):
            choice = {"n_clusters": count, "gamma": gamma, "alpha": alpha}
            model = DAKL(**choice, **options)
            score = cosine(model.fit_predict(centroids, targets, X_val), Y_val).mean()
            table.append(choice | {"cosine": score, "solver": model.solver_, "error": model.error_})
    if not table:
        raise ConfigError("every alpha is lost in float64's rounding", f"Use {least:.1g} or more.")
    order = {"ascending": False, "kind": "stable", "ignore_index": True}
    return pd.DataFrame(table).sort_values("cosine", **order)
