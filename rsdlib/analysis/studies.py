"""What the notebooks on ensembles, the swap and captions ask of many predictions at once."""

from dataclasses import asdict, replace

import numpy as np

from rsdlib import ensemble
from rsdlib.analysis import metrics
from rsdlib.errors import BadValueError, refusing


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
    known = replace(val, predictions=predictions["val"])
    on_val = {model: known.cosine(model).mean() for model in known.predictions}
    of_training = {split: _by_training(models) for split, models in predictions.items()}
    test.predictions |= predictions["test"]
    equal, fitted = [], []
    initials = len({model[0] for model in on_val}) == len(on_val)
    for subset in ensemble.subsets(on_val):
        label = "".join(m[0].upper() for m in subset) if initials else " + ".join(subset)
        mine = {s: [{m: one[m] for m in subset} for one in all] for s, all in of_training.items()}
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


def _by_training(predictions):
    """Return for each training the models' predictions."""
    several = {model: metrics.each_training(pred) for model, pred in predictions.items()}
    unequal = "the models' trainings are not equally many: {}"
    with refusing(ValueError, BadValueError, unequal):
        return [dict(zip(several, one, strict=True)) for one in zip(*several.values(), strict=True)]


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
            row = {"encoder": place[0], "swap after": place[1], "of": kind}
            row["n"] = int(applies.sum())
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
    others = prompts[~asked]
    return np.array([len(np.unique(others[row])) for row in near]), float(usual)
