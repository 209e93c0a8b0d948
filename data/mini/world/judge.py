"""An independent eye on generated pictures: what is in them, how many, where, in which style."""

import json

import numpy as np
import torch
import torch.nn.functional as F

from rsdlib import files, runtime
from rsdlib.errors import ModelNotFoundError


class Judge:
    """A classifier whose outputs are groups of labels: noun, setting, medium, count.

    Use `Judge.open`.

    Parameters
    ----------
    network : nn.Module
        Maps normalised images (b, 3, size, size) to logits (b, sum of all groups).
    groups : dict of str to list of str
        Labels of each group, in the order of the logits.
    size : int
        Pixels a side that the network reads.
    device : str
    """

    def __init__(self, network, groups, size, device="auto"):
        self.device = runtime.device(device)
        self.network = network.to(self.device).eval()
        self.groups, self.size = groups, size

    @classmethod
    def open(cls, folder, device="auto"):
        """Open a judge in timm's format whose ``config.json`` states its ``label_groups``.

        Parameters
        ----------
        folder : path-like
        device : str

        Returns
        -------
        Judge

        Raises
        ------
        ModelNotFoundError
            The folder holds no judge.
        """
        timm = runtime.require("timm")
        folder = files.resolve_path(folder)
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            names, sizes = config["pretrained_cfg"]["label_names"], config["label_groups"]
            network = timm.create_model(f"local-dir:{folder}", pretrained=True)
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            reason = f"{type(error).__name__} {error}"
            fix = "It needs timm's config.json with label_groups and label_names, and its weights."
            message = f"{files.relative(folder)} holds no judge: {reason}"
            raise ModelNotFoundError(message, fix) from error
        ends = np.cumsum(list(sizes.values()))
        groups = {
            group: names[end - size : end]
            for (group, size), end in zip(sizes.items(), ends, strict=True)
        }
        return cls(network, groups, config["pretrained_cfg"]["input_size"][-1], device)

    def see(self, images, batch_size=128):
        """Return the logits of each group for pictures.

        Parameters
        ----------
        images : ndarray of uint8, shape (n, h, w, 3)
        batch_size : int

        Returns
        -------
        dict of str to ndarray (n, labels)
        """
        size = (self.size, self.size)
        logits = []
        with torch.inference_mode():
            for start in range(0, len(images), batch_size):
                pixels = torch.from_numpy(images[start : start + batch_size]).to(self.device)
                pixels = (pixels.permute(0, 3, 1, 2).float() - 127.5) / 127.5
                pixels = F.interpolate(pixels, size, mode="bilinear")
                logits.append(self.network(pixels).float().cpu().numpy())
        ends = np.cumsum([len(labels) for labels in self.groups.values()])
        parts = np.split(np.concatenate(logits), ends[:-1], axis=1)
        return dict(zip(self.groups, parts, strict=True))

    def verdicts(self, images, numbers):
        """Name what is in pictures.

        Parameters
        ----------
        images : ndarray of uint8, shape (n, h, w, 3)
        numbers : sequence of int (n)
            How many nouns to name for each picture.

        Returns
        -------
        list of dict
            ``judged_nouns``, likeliest first, ``judged_count``, ``judged_setting``,
            ``judged_medium``.
        """
        logits = self.see(images)
        order = (-logits["noun"]).argsort(1, kind="stable")
        best = {
            group: np.array(self.groups[group])[logits[group].argmax(1)]
            for group in ("count", "setting", "medium")
        }
        return [
            {
                "judged_nouns": [self.groups["noun"][j] for j in order[i, : numbers[i]]],
                "judged_count": int(best["count"][i]),
                "judged_setting": str(best["setting"][i]),
                "judged_medium": str(best["medium"][i]),
            }
            for i in range(len(images))
        ]

    def left_first(self, images, left, right):
        """Tell whether one thing stands to the left of another.

        Each half of a picture is shown alone, the other covered.

        Parameters
        ----------
        images : ndarray of uint8, shape (n, h, w, 3)
        left, right : sequence of str (n)
            Nouns.

        Returns
        -------
        ndarray of bool (n,)
        """
        rows, middle = np.arange(len(images)), images.shape[2] // 2
        left, right = (
            [self.groups["noun"].index(name) for name in nouns] for nouns in (left, right)
        )
        lead = 0
        for half, sign in ((slice(None, middle), 1), (slice(middle, None), -1)):
            shown = np.full_like(images, 127)
            shown[:, :, half] = images[:, :, half]
            logits = self.see(shown)["noun"]
            lead = lead + sign * (logits[rows, left] - logits[rows, right])
        return lead > 0

    def agrees(self, images, asked):
        """Compare what is in pictures with what was asked for.

        Parameters
        ----------
        images : ndarray of uint8, shape (n, h, w, 3)
        asked : sequence of dict (n)
            ``nouns``, ``count``, ``setting``, ``medium`` and ``relation`` each; "left of" names its
            nouns from left to right.

        Returns
        -------
        dict of str to ndarray (n,)
            Share of the nouns that are there ("noun"), and whether "setting", "medium", "count" and
            "order" are as asked; NaN for the order where none was asked for.
        """
        numbers = [max(len(scene["nouns"]), 1) for scene in asked]
        pairs = list(zip(self.verdicts(images, numbers), asked, strict=True))
        agreement = {"noun": [_share(v["judged_nouns"], scene["nouns"]) for v, scene in pairs]}
        for name in ("setting", "medium", "count"):
            agreement[name] = [v[f"judged_{name}"] == scene[name] for v, scene in pairs]
        agreement = {name: np.array(values, float) for name, values in agreement.items()}
        agreement["order"] = self._order(images, asked)
        return agreement

    def _order(self, images, asked):
        right = np.full(len(asked), np.nan)
        ordered = [
            i
            for i, scene in enumerate(asked)
            if scene["relation"] == "left of" and len(scene["nouns"]) == 2
        ]
        if ordered:
            nouns = zip(*(asked[i]["nouns"] for i in ordered), strict=True)
            right[ordered] = self.left_first(images[ordered], *nouns)
        return right


def _share(judged, asked):
    """Return the share of the nouns asked for that were judged to be there."""
    return len(set(judged) & set(asked)) / max(len(asked), 1)
