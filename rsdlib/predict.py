"""Use what was trained: an image in; the prompt's embedding, its likely words and the nearest known prompts out."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from rsdlib import data, recipes, retrieval, runtime
from rsdlib.errors import CacheError


@dataclass(frozen=True)
class Prediction:
    """What a model reads in some images.

    Attributes
    ----------
    embeddings : ndarray (n, d), float32, unit rows
    words : list of n lists of (word, probability)
        Most probable first; empty lists where the run has no vocabulary head.
    prompts : list of n lists of (prompt, similarity)
        Nearest training prompts first; empty lists where the run's data are not at hand.
    """

    embeddings: np.ndarray
    words: list
    prompts: list


class Predictor:
    """A trained run, ready for images. Use `Predictor.load`.

    Parameters
    ----------
    model : rsdlib.model.PromptRegressor
    words : sequence of str
        The vocabulary, in the order of the model's logits.
    bank : DataFrame or None
        Known prompts, in the order of `bank_embeddings`.
    bank_embeddings : ndarray (n, d) or None
    device : str
    """

    def __init__(self, model, words=(), bank=None, bank_embeddings=None, device="auto"):
        self.device = runtime.device(device)
        self.model = model.to(self.device).eval()
        self.words, self.bank, self.bank_embeddings = tuple(words), bank, bank_embeddings

    @classmethod
    def load(cls, folder, device="auto"):
        """Open a finished run folder.

        Raises
        ------
        CacheError
            The folder holds no finished run, or a file in it is damaged.
        """
        folder = runtime.resolve_path(folder)
        if not (folder / "difficulty.parquet").is_file():  # the last file of a run
            raise CacheError(f"{runtime.relative(folder)} holds no finished run", "Train one: rsd run 01_train_vit.")
        model, recipe = recipes.load_model(folder)
        prepared = runtime.cache_dir() / "prepared" / recipe.prepared
        try:
            pairs = pd.read_parquet(prepared / "pairs.parquet", columns=["prompt", "split"])
            embeddings = runtime.load_arrays(prepared / "answers.safetensors")[0]["targets"]
        except (OSError, CacheError):
            runtime.log(
                f"the training prompts of {folder.name} are not here: no nearest prompts (rsd run 00_prepare_data brings them)"
            )
            return cls(model, recipe.words, device=device)
        train = np.flatnonzero((pairs["split"] == "train").to_numpy())
        distinct = train[~pairs["prompt"].iloc[train].duplicated().to_numpy()]
        return cls(model, recipe.words, pairs["prompt"].iloc[distinct].tolist(), embeddings[distinct], device)

    def predict(self, images, n_words=8, n_prompts=5, batch_size=64):
        """Predict from images.

        Parameters
        ----------
        images : path, locator or PIL image, or a sequence of them
        n_words, n_prompts : int
            How many words and prompts to name for each image.
        batch_size : int

        Returns
        -------
        Prediction
        """
        import torch

        images = [images] if isinstance(images, (str, os.PathLike, Image.Image)) else list(images)
        size = self.model.backbone.image_size
        embeddings, probabilities = [np.empty((0, self.model.embedding_head.out_features), np.float32)], []
        for start in runtime.track(range(0, len(images), batch_size), "reading images"):
            chunk = images[start : start + batch_size]
            opened = [image.convert("RGB") if isinstance(image, Image.Image) else data.open_image(image) for image in chunk]
            batch = torch.from_numpy(np.stack([data.resize(image, size) for image in opened])).to(self.device)  # (b, 3, s, s)
            with torch.inference_mode():
                front = self.model.backbone.front
                embedding, logits = self.model(batch if front is None else front.to(self.device)(batch))
            embeddings.append(embedding.cpu().numpy())
            if logits is not None:
                probabilities.append(logits.float().sigmoid().cpu().numpy())
        embeddings = np.concatenate(embeddings)
        words = prompts = [[] for _ in images]
        if probabilities:
            words = [_top(row, self.words, n_words) for row in np.concatenate(probabilities)]
        if self.bank and n_prompts and images:
            similarity, index = retrieval.nearest(embeddings, self.bank_embeddings, min(n_prompts, len(self.bank)))
            prompts = [[(self.bank[i], float(s)) for i, s in zip(*row, strict=True)] for row in zip(index, similarity, strict=True)]
        return Prediction(embeddings, words, prompts)


def _top(probabilities, words, n):
    order = np.argsort(-probabilities, kind="stable")[:n]
    return [(words[i], float(probabilities[i])) for i in order]


def latest_run(profile="mini"):
    """Return the run folder that was finished last in a profile.

    Raises
    ------
    CacheError
        There is none yet.
    """
    finished = (runtime.root() / "runs" / profile).glob("*/difficulty.parquet")
    newest = max(finished, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise CacheError(f"nothing is trained yet below runs/{profile}", "Run: rsd run 01_train_vit")
    return Path(newest.parent)
