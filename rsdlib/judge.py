"""An independent eye on generated pictures: what is in them, how many, where and in which style. The mini world ships one."""

import json

import numpy as np
import torch
import torch.nn.functional as F

from rsdlib import runtime
from rsdlib.errors import ModelNotFoundError


class Judge:
    """A classifier whose outputs are groups of labels: noun, setting, medium, count. Use `Judge.open`.

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
        self.network, self.groups, self.size = network.to(self.device).eval(), groups, size

    @classmethod
    def open(cls, folder, device="auto"):
        """Open a judge in timm's format whose ``config.json`` states its ``label_groups``.

        Raises
        ------
        ModelNotFoundError
            The folder holds no judge.
        """
        timm = runtime.require("timm")
        folder = runtime.resolve_path(folder)
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            names, sizes = iter(config["pretrained_cfg"]["label_names"]), config["label_groups"]
            network = timm.create_model(f"local-dir:{folder}", pretrained=True)
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise ModelNotFoundError(
                f"{runtime.relative(folder)} holds no judge: {type(error).__name__} {error}",
                "It needs timm's config.json with label_groups and label_names, and model.safetensors.",
            ) from error
        groups = {group: [next(names) for _ in range(size)] for group, size in sizes.items()}
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
        found = []
        with torch.inference_mode():
            for start in range(0, len(images), batch_size):
                pixels = torch.from_numpy(images[start : start + batch_size]).to(self.device).permute(0, 3, 1, 2)
                pixels = F.interpolate((pixels.float() - 127.5) / 127.5, (self.size, self.size), mode="bilinear")
                found.append(self.network(pixels).float().cpu().numpy())
        ends = np.cumsum([len(labels) for labels in self.groups.values()])
        return dict(zip(self.groups, np.split(np.concatenate(found), ends[:-1], axis=1), strict=True))

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
            ``judged_nouns``, likeliest first, ``judged_count``, ``judged_setting``, ``judged_medium``.
        """
        seen = self.see(images)
        order = (-seen["noun"]).argsort(1, kind="stable")
        best = {group: np.array(self.groups[group])[seen[group].argmax(1)] for group in ("count", "setting", "medium")}
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
        """Tell whether one thing stands to the left of another: each half is shown alone, the other covered.

        Parameters
        ----------
        images : ndarray of uint8, shape (n, h, w, 3)
        left, right : sequence of str (n)
            Nouns.

        Returns
        -------
        ndarray of bool (n,)
        """
        rows, middle, lead = np.arange(len(images)), images.shape[2] // 2, 0
        left, right = ([self.groups["noun"].index(name) for name in names] for names in (left, right))
        for half, sign in ((slice(None, middle), 1), (slice(middle, None), -1)):
            shown = np.full_like(images, 127)
            shown[:, :, half] = images[:, :, half]
            seen = self.see(shown)["noun"]
            lead = lead + sign * (seen[rows, left] - seen[rows, right])
        return lead > 0

    def agrees(self, images, asked):
        """Compare what is in pictures with what was asked for.

        Parameters
        ----------
        images : ndarray of uint8, shape (n, h, w, 3)
        asked : sequence of dict (n)
            ``nouns``, ``count``, ``setting``, ``medium`` and ``relation`` each; "left of" names its nouns from left to right.

        Returns
        -------
        dict of str to ndarray (n,)
            Share of the nouns that are there ("noun"), and whether "setting", "medium", "count" and "order" are as asked; NaN for
            the order where none was asked for.
        """
        seen = self.verdicts(images, [max(len(each["nouns"]), 1) for each in asked])
        pairs = list(zip(seen, asked, strict=True))
        found = {"noun": [len(set(v["judged_nouns"]) & set(a["nouns"])) / max(len(a["nouns"]), 1) for v, a in pairs]}
        found |= {name: [v[f"judged_{name}"] == a[name] for v, a in pairs] for name in ("setting", "medium", "count")}
        found = {name: np.array(values, float) for name, values in found.items()}
        ordered = [i for i, a in enumerate(asked) if a["relation"] == "left of" and len(a["nouns"]) == 2]
        found["order"] = np.full(len(asked), np.nan)
        if ordered:
            left, right = ([asked[i]["nouns"][k] for i in ordered] for k in (0, 1))
            found["order"][ordered] = self.left_first(images[ordered], left, right)
        return found
