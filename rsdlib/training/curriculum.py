"""Curricula: the paper's, from the model's own similarities, and the two it is compared with.

Supplementary, sections 4 to 6. A curriculum is a list of `Stage` (what is read when) or a
`Callback` (how sharply, how fast); `regime` makes either from settings.
"""

import functools
import itertools
import math

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from rsdlib import runtime
from rsdlib.errors import BadValueError, ConfigError, refusing
from rsdlib.training.loop import Callback, Stage

# --- difficulty -----------------------------------------------------------------------------------


def difficulty(history):
    """Return how hard every pair is: one minus its weighted mean similarity over the epochs.

    d_i = 1 - sum_t t s_it / sum_t t, of a training without curriculum: later epochs weigh more. An
    epoch that did not see a pair is left out of that pair's mean.

    Parameters
    ----------
    history : ndarray (n, T)
        Cosine similarity of prediction and target, by pair and epoch; NaN where there is none.

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
    visited = np.isfinite(history)
    if not visited.any(axis=1).all():
        message = f"pair {visited.any(axis=1).argmin()} has no similarity in any epoch"
        raise BadValueError(message, "Train a whole epoch first.")
    weights = visited * np.arange(1, history.shape[1] + 1)
    return 1 - np.nansum(history * weights, axis=1) / weights.sum(axis=1)


def stages(hardness, k=3):
    """Return k lists of positions, easiest first: the i-th has the easiest i/k of the pairs.

    Parameters
    ----------
    hardness : ndarray (n,)
    k : int

    Returns
    -------
    list of ndarray of int
        Each holds the one before; the last is a permutation of all n positions. Ties keep their
        order.
    """
    hardness = np.asarray(hardness)
    if not 1 <= k <= len(hardness):
        raise BadValueError(f"{k} stages do not fit {len(hardness)} pairs", "Use 1 to one a pair.")
    order = np.argsort(hardness, kind="stable")
    return [order[: math.ceil(len(order) * i / k)] for i in range(1, k + 1)]


def levels(hardness, names=("easy", "medium", "hard")):
    """Return each pair's level, in equal parts by difficulty.

    Parameters
    ----------
    hardness : ndarray (n,)
    names : sequence of str

    Returns
    -------
    ndarray of str (n,)
    """
    rank = np.argsort(np.argsort(hardness, kind="stable"))
    return np.array(names)[rank * len(names) // len(rank)]


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
        ``"epochs"``, the paper's: the epochs are shared out among the stages, the last takes the
        rest, so fewer pairs are visited than without curriculum. ``"steps"``: the last stage goes
        on until as many pairs were visited; its last epoch may be a random part of the pairs.

    Returns
    -------
    list of Stage
    """
    if equal not in ("epochs", "steps"):
        raise ConfigError(f"equal = {equal!r} is unknown", "Use 'epochs' or 'steps'.")
    rows = np.asarray(rows)
    *first, last = [rows[positions] for positions in stages(hardness, k)]
    each = max(epochs // k, 1)
    plan = [Stage(stage, each) for stage in first]
    if equal == "epochs":
        return [*plan, Stage(last, max(epochs - each * len(first), 1))]
    visited = sum(len(stage.rows) * stage.epochs for stage in plan)
    return [*plan, *_visits(last, epochs * len(rows) - visited, len(rows), epochs, k)]


def _visits(rows, count, *key):
    """Return stages of so many visits: whole epochs, then a random part that makes a step."""
    whole, part = divmod(max(count, 0), len(rows))
    drawn = runtime.rng("last part", *key).permutation(np.sort(rows))[:part]
    return [Stage(rows, whole)] * (whole > 0) + [Stage(np.sort(drawn), 1)] * (part > 1)


def without_hardest(rows, hardness, epochs, share=0.1):
    """Plan selection without order: the hardest pairs are left out, the others come more often.

    Parameters
    ----------
    rows : ndarray of int (n,)
    hardness : ndarray (n,)
    epochs : int
        Of the training it is compared with: as many pairs are visited.
    share : float
        Of the pairs, left out.

    Returns
    -------
    list of Stage

    Raises
    ------
    BadValueError
        `share` leaves no pairs, or is negative.
    """
    if not 0 <= share < 1:
        raise BadValueError(f"a share of {share} cannot be left out", "Use one from 0 to below 1.")
    easiest = np.argsort(hardness, kind="stable")[: math.ceil(len(rows) * (1 - share))]
    kept = np.asarray(rows)[np.sort(easiest)]
    return _visits(kept, epochs * len(rows), len(rows), epochs, share)


def shuffled(plan, seed=0):
    """Return another plan's selection without its order: as many epochs, each a random draw.

    Parameters
    ----------
    plan : list of Stage
        No row more than once in a stage.
    seed : int

    Returns
    -------
    list of Stage
        Of one epoch each; every row is in as many of them as it was in epochs of `plan`.
    """
    epochs = [stage.rows for stage in plan for _ in range(stage.epochs)]
    rows, visits = np.unique(np.concatenate(epochs), return_counts=True)
    chance = runtime.rng("shuffled", seed).random((len(rows), len(epochs)))
    rank = chance.argsort(axis=1).argsort(axis=1)  # of each epoch, for each row
    return [Stage(rows[column < visits], 1) for column in rank.T]


# --- the two it is compared with ------------------------------------------------------------------

TOKENS, CHANNELS_FIRST, CHANNELS_LAST = "tokens", "channels first", "channels last"
BLOCKS = dict.fromkeys(("Block", "ResidualAttentionBlock"), TOKENS)  # by the names of classes
BLOCKS["SwinTransformerV2Block"] = CHANNELS_LAST


class CBS(Callback):
    """Curriculum by Smoothing (Sinha, Garg and Larochelle, 2020): maps are blurred, less and less.

    Each map is convolved, channel by channel, with a Gaussian of standard deviation sigma, which
    falls by `decay` at `falls` equal intervals of the training. Outside training nothing happens.

    Where: after every 3 x 3 or wider convolution, as in the source. Differs from the source:
    transformers have no such convolutions; there every block's output is blurred over its grid of
    tokens (class token left out), and so are Swin's stages.

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
            raise ConfigError("this model has no feature maps to smooth", "Use another curriculum.")
        for module, layout in places.items():
            hook = functools.partial(self._blur, layout)
            self._hooks.append(module.register_forward_hook(hook))

    def before_step(self, state):
        """Set sigma for this step."""
        self.sigma = self.first * self.decay ** int(self.falls * state.step / state.plan.total)

    def end(self, state):
        """Take the blur off again."""
        for hook in self._hooks:
            hook.remove()

    def _blur(self, layout, module, _, output):
        blurred = module.training and self.sigma > 0.05
        return smoothed(output, self.sigma, layout) if blurred else output


def feature_maps(model):
    """Return what CBS blurs, module to layout: wide convolutions, or else transformer blocks."""
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    wide = [module for module in convolutions if 3 <= module.kernel_size[0] != module.stride[0]]
    blocks = {module: BLOCKS.get(type(module).__name__) for module in model.modules()}
    layouts = dict.fromkeys(wide, CHANNELS_FIRST) or blocks
    return {module: layout for module, layout in layouts.items() if layout}


def smoothed(maps, sigma, layout=CHANNELS_FIRST):
    """Blur maps with a 3 x 3 Gaussian, edges repeated; constant maps stay as they are.

    `maps` are (b, c, h, w), (b, h, w, c), or tokens (b, h * h, c), perhaps behind class tokens.
    """
    if layout == TOKENS:
        side = math.isqrt(maps.shape[1])
        lead = maps.shape[1] - side * side  # class tokens
        grid = smoothed(maps[:, lead:].unflatten(1, (side, side)), sigma, CHANNELS_LAST)
        return torch.cat([maps[:, :lead], grid.flatten(1, 2)], dim=1)
    if layout == CHANNELS_LAST:
        return smoothed(maps.permute(0, 3, 1, 2), sigma).permute(0, 2, 3, 1)
    side = torch.exp(torch.tensor(-0.5 / sigma**2)).item()
    line = torch.tensor([side, 1.0, side], device=maps.device, dtype=maps.dtype) / (1 + 2 * side)
    kernel = torch.outer(line, line).expand(maps.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(maps, (1, 1, 1, 1), mode="replicate"), kernel, groups=maps.shape[1])


class LeRaC(Callback):
    """Learning Rate Curriculum (Croitoru et al., 2022): layers far from the input learn slowly.

    The rate of layer j of n is the plan's times a factor that begins at ``lowest ** (j / (n - 1))``
    and rises exponentially to 1, where all layers meet, after a share `until` of the steps.

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
            in_order = sorted(group["params"], key=depth.get)
            for layer, parameters in itertools.groupby(in_order, key=depth.get):
                split.append({**group, "params": list(parameters), "depth": layer / last})
        state.optimizer.param_groups[:] = split

    def before_step(self, state):
        """Set each group's factor."""
        left = 1 - min(state.step / max(self.until * state.plan.total, 1), 1)
        for group in state.optimizer.param_groups:
            group["lr_scale"] = self.lowest ** (group["depth"] * left)


def layers(model):
    """Return the depth of every parameter: one more for each module that has some of its own."""
    current, depth = -1, {}
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p not in depth]
        current += bool(own)
        depth |= dict.fromkeys(own, current)
    return depth


# --- one call for all -----------------------------------------------------------------------------


def regime(config, rows, epochs, history=None):
    """Return the stages and the callbacks that `fit` is to be given.

    Parameters
    ----------
    config : rsdlib.config.CurriculumConfig
    rows : ndarray of int
        Rows to train on.
    epochs : int
    history : DataFrame, optional
        ``difficulty.parquet`` of the same training without curriculum; the paper's needs it.

    Returns
    -------
    stages : list of Stage
    callbacks : list of Callback
    """
    if config.name == "ours":
        return growing(rows, hardness_of(rows, history), epochs, config.stages, config.equal), []
    cbs = CBS(config.sigma, config.decay, config.falls)
    lerac = LeRaC(config.lowest, config.until)
    callbacks = {"none": [], "cbs": [cbs], "lerac": [lerac]}
    return [Stage(np.asarray(rows), epochs)], callbacks[config.name]


def hardness_of(rows, history):
    """Return the difficulty (n,) that a run's ``difficulty.parquet`` knows of `rows`."""
    hardness = pd.Series(difficulty(history.filter(like="epoch_")), history["row"])
    with refusing(KeyError, BadValueError, "rows without difficulty: {}", "Train without first."):
        return hardness.loc[rows].to_numpy()
