"""Curricula: the paper's, from the model's own similarities, and the two it is compared with (supplementary, sections 4 to 6)."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from rsdlib import runtime
from rsdlib.errors import BadValueError, ConfigError
from rsdlib.training import Callback, Stage

# --- difficulty -------------------------------------------------------------------------------------------------------------


def difficulty(history):
    """Return how hard every pair is: one minus its weighted mean similarity over the epochs of a training without curriculum.

    Later epochs weigh more: epoch t of T has the weight t / (1 + ... + T). An epoch that did not see a pair is left out of that
    pair's mean.

    Parameters
    ----------
    history : ndarray (n, T)
        Cosine similarity of prediction and target, by pair and epoch; NaN where a pair was not seen.

    Returns
    -------
    ndarray (n,), float64
        In [0, 2]; higher is harder.

    Raises
    ------
    BadValueError
        A pair was never seen.
    """
    history = np.asarray(history, float)
    seen = np.isfinite(history)
    if not seen.any(axis=1).all():
        raise BadValueError(f"pair {int(np.argmin(seen.any(axis=1)))} has no similarity in any epoch", "Train a whole epoch first.")
    weights = seen * np.arange(1, history.shape[1] + 1)
    return 1 - (np.where(seen, history, 0) * weights).sum(axis=1) / weights.sum(axis=1)


def run_difficulty(table):
    """Return rows and difficulty of the pairs in a run's ``difficulty.parquet``."""
    epochs = sorted((name for name in table if name.startswith("epoch_")), key=lambda name: int(name[6:]))
    return table["row"].to_numpy(), difficulty(table[epochs].to_numpy())


def stages(hardness, k=3):
    """Return k lists of positions, easiest first, each holding the one before: the i-th has the easiest i/k of the pairs.

    Parameters
    ----------
    hardness : ndarray (n,)
    k : int

    Returns
    -------
    list of ndarray of int
        The last is a permutation of all n positions. Ties keep their order.
    """
    hardness = np.asarray(hardness)
    if not 1 <= k <= len(hardness):
        raise BadValueError(f"{k} stages do not fit {len(hardness)} pairs", "Use at least one stage and at most one per pair.")
    order = np.argsort(hardness, kind="stable")
    return [order[: math.ceil(len(order) * i / k)] for i in range(1, k + 1)]


def levels(hardness, names=("easy", "medium", "hard")):
    """Return each pair's level, in equal parts by difficulty: (n,) of str."""
    found = np.empty(len(hardness), object)
    for stage, name in reversed(list(zip(stages(hardness, len(names)), names, strict=True))):
        found[stage] = name
    return found


def growing(rows, hardness, epochs, k=3, equal="epochs"):
    """Plan the paper's curriculum: easy pairs, then easy and medium, then all.

    Parameters
    ----------
    rows : ndarray of int (n,)
    hardness : ndarray (n,)
    epochs : int
        Of the training it is compared with.
    k : int
        Number of stages.
    equal : {"epochs", "steps"}
        ``"epochs"``, the paper's: the epochs are shared out among the stages, the last takes the rest, so fewer pairs are visited
        than without curriculum. ``"steps"``: the last stage goes on until as many pairs were visited; its last epoch may be a
        random part of the pairs.

    Returns
    -------
    list of rsdlib.training.Stage
    """
    if equal not in ("epochs", "steps"):
        raise ConfigError(f"equal = {equal!r} is unknown", "Use 'epochs' or 'steps'.")
    rows = np.asarray(rows)
    nested = [rows[positions] for positions in stages(hardness, k)]
    each = max(epochs // k, 1)
    plan = [Stage(stage, each) for stage in nested[:-1]]
    if equal == "epochs":
        return [*plan, Stage(nested[-1], max(epochs - each * (k - 1), 1))]
    left = epochs * len(rows) - sum(len(stage.rows) * stage.epochs for stage in plan)
    whole, part = divmod(left, len(rows))
    if whole:
        plan.append(Stage(nested[-1], whole))
    if part > 1:
        plan.append(Stage(np.sort(runtime.rng("last part", len(rows), epochs, k).permutation(rows)[:part]), 1))
    return plan


# --- the two it is compared with --------------------------------------------------------------------------------------------


class CBS(Callback):
    """Curriculum by Smoothing (Sinha, Garg and Larochelle, 2020): feature maps are blurred, less and less.

    Each map is convolved, channel by channel, with a Gaussian of standard deviation sigma, which falls by `decay` at `falls` equal
    intervals of the training. Outside training nothing is blurred.

    Where: after every 3 x 3 or wider convolution, as in the source. Differs from the source: transformers have no such
    convolutions; there every block's output is blurred over its grid of tokens (class token left out), and so are Swin's stages.

    Parameters
    ----------
    sigma : float
        At first, in cells of the map; the source uses 1.
    decay : float
        The source uses 0.9, every 5 epochs.
    falls : int
        How often sigma falls.
    """

    def __init__(self, sigma=1.0, decay=0.5, falls=8):
        self.first, self.decay, self.falls = sigma, decay, falls
        self.sigma, self._hooks = 0.0, []

    def begin(self, state):
        """Attach the blur to the model's feature maps."""
        places = feature_maps(getattr(state.model, "backbone", state.model))
        if not places:
            raise ConfigError("this model has no feature maps that CBS could smooth", "Use another curriculum.")
        self._hooks = [module.register_forward_hook(self._blur) for module in places]

    def before_step(self, state):
        """Set sigma for this step."""
        self.sigma = self.first * self.decay ** int(self.falls * state.step / state.plan.total)

    def end(self, state):
        """Take the blur off again."""
        for hook in self._hooks:
            hook.remove()

    def _blur(self, module, _, output):
        if module.training and self.sigma > 0.05:
            return smoothed(output, self.sigma)
        return output


def feature_maps(model):
    """Return the modules whose outputs CBS blurs: wide convolutions, or else transformer blocks."""
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] >= 3 and m.kernel_size != m.stride]
    blocks = [m for m in model.modules() if type(m).__name__ in ("Block", "ResidualAttentionBlock", "SwinTransformerV2Block")]
    return convolutions or blocks


def smoothed(maps, sigma):
    """Blur maps with a 3 x 3 Gaussian, edges repeated.

    Parameters
    ----------
    maps : Tensor
        (b, c, h, w) of a convolution, (b, h, w, c) of a Swin block, or tokens (b, h * h, c) or (b, 1 + h * h, c).
    sigma : float

    Returns
    -------
    Tensor
        Of the same shape; constant maps stay as they are.
    """
    if maps.ndim == 3:
        side = math.isqrt(maps.shape[1])
        lead = maps.shape[1] - side * side  # class tokens
        grid = smoothed(maps[:, lead:].unflatten(1, (side, side)), sigma).flatten(1, 2)
        return torch.cat([maps[:, :lead], grid], dim=1)
    if maps.shape[1] == maps.shape[2] != maps.shape[3]:  # channels last
        return smoothed(maps.permute(0, 3, 1, 2), sigma).permute(0, 2, 3, 1)
    side = torch.exp(torch.tensor(-0.5 / sigma**2)).item()
    line = torch.tensor([side, 1.0, side], device=maps.device, dtype=maps.dtype) / (1 + 2 * side)
    channels = maps.shape[1]
    padded = F.pad(maps, (1, 1, 1, 1), mode="replicate")
    kernel = torch.outer(line, line).expand(channels, 1, 3, 3)
    return F.conv2d(padded, kernel, groups=channels)


class LeRaC(Callback):
    """Learning Rate Curriculum (Croitoru et al., 2022): layers far from the input learn slowly at first.

    The rate of layer j of n is the plan's times a factor that begins at ``lowest ** (j / (n - 1))`` and rises exponentially to 1,
    where all layers meet, after a share `until` of the steps.

    Parameters
    ----------
    lowest : float
        First factor of the last layer.
    until : float
        Share of the steps after which all layers have the same rate.
    """

    def __init__(self, lowest=1e-3, until=0.3):
        self.lowest, self.until = lowest, until

    def begin(self, state):
        """Split the optimizer's groups by layer."""
        depth = layers(state.model)
        last = max(max(depth.values()), 1)
        split = []
        for group in state.optimizer.param_groups:
            by_layer = {}
            for parameter in group["params"]:
                by_layer.setdefault(depth[parameter], []).append(parameter)
            split += [{**group, "params": params, "depth": layer / last} for layer, params in sorted(by_layer.items())]
        state.optimizer.param_groups[:] = split

    def before_step(self, state):
        """Set each group's factor."""
        left = 1 - min(state.step / max(self.until * state.plan.total, 1), 1)
        for group in state.optimizer.param_groups:
            group["lr_scale"] = self.lowest ** (group["depth"] * left)


def layers(model):
    """Return the depth of every parameter: 0 at the input, one more for each module that holds parameters of its own."""
    depth, found = -1, {}
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p not in found]
        depth += bool(own)
        found |= dict.fromkeys(own, depth)
    return found


# --- one call for all -------------------------------------------------------------------------------------------------------


def regime(config, rows, epochs, history=None):
    """Return what `rsdlib.training.fit` is to be told: ``stages`` and ``callbacks``.

    Parameters
    ----------
    config : rsdlib.config.CurriculumConfig
    rows : ndarray of int
        Rows to train on.
    epochs : int
    history : DataFrame, optional
        ``difficulty.parquet`` of the same training without curriculum; the paper's curriculum needs it.

    Returns
    -------
    dict
    """
    if config.name == "cbs":
        return {"callbacks": [CBS(config.sigma, config.decay, config.falls)]}
    if config.name == "lerac":
        return {"callbacks": [LeRaC(config.lowest, config.until)]}
    if config.name == "none":
        return {}
    known, hardness = run_difficulty(history)
    missing = np.setdiff1d(rows, known)
    if len(missing):
        raise BadValueError(
            f"{len(missing)} training rows have no difficulty, the first is row {missing[0]}", "Train without first."
        )
    of_row = dict(zip(known.tolist(), hardness.tolist(), strict=True))
    hardness = np.array([of_row[row] for row in np.asarray(rows).tolist()])
    return {"stages": growing(rows, hardness, epochs, config.stages, config.equal)}
