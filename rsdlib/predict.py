"""Use what was trained: an image in; the prompt's embedding, its likely words and the nearest known prompts out."""

import os
from dataclasses import dataclass

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
    captions : list of n str, or None
        Where the predictor has a captioner.
    """

    embeddings: np.ndarray
    words: list
    prompts: list
    captions: list | None = None

    def table(self, images):
        """Return a DataFrame to save: image, caption, words and prompts with what the model thinks of them, no embeddings.

        Parameters
        ----------
        images : sequence of str (n)
            Names of the images.
        """
        rows = {"image": [str(image) for image in images]}
        if self.captions is not None:
            rows["caption"] = self.captions
        rows["words"] = ["; ".join(f"{word} {probability:.3f}" for word, probability in words) for words in self.words]
        rows["nearest_prompt"] = [prompts[0][0] if prompts else "" for prompts in self.prompts]
        rows["similarity"] = [prompts[0][1] if prompts else np.nan for prompts in self.prompts]
        return pd.DataFrame(rows)


class Predictor:
    """A trained run, ready for images. Use `Predictor.load`.

    Parameters
    ----------
    model : rsdlib.model.PromptRegressor
    words : sequence of str
        The vocabulary, in the order of the model's logits.
    bank : list of str or None
        Known prompts, in the order of `bank_embeddings`.
    bank_embeddings : ndarray (n, d) or None
    device : str
    captioner : rsdlib.captioning.Captioner or None
    """

    def __init__(self, model, words=(), bank=None, bank_embeddings=None, device="auto", captioner=None):
        self.device = runtime.device(device)
        self.captioner = captioner.to(self.device).eval() if captioner is not None else None
        self.model = model.to(self.device).eval()
        self.words, self.bank, self.bank_embeddings = tuple(words), bank, bank_embeddings

    @classmethod
    def load(cls, folder, device="auto", captioner=None):
        """Open a finished run folder, and perhaps a captioner's beside it.

        Raises
        ------
        CacheError
            A folder holds no finished run of its kind, or a file in it is damaged.
        """
        folder = runtime.resolve_path(folder)
        model, recipe = _open(folder, captions=False)
        if captioner is not None:
            captioner, _ = _open(runtime.resolve_path(captioner), captions=True)
        prepared = runtime.cache_dir() / "prepared" / recipe.prepared
        try:
            pairs = pd.read_parquet(prepared / "pairs.parquet", columns=["prompt", "split"])
            embeddings = runtime.load_arrays(prepared / "answers.safetensors")[0]["targets"]
        except (OSError, CacheError):
            runtime.log(
                f"the training prompts of {folder.name} are not here: no nearest prompts (rsd run 00_prepare_data brings them)"
            )
            return cls(model, recipe.words, device=device, captioner=captioner)
        train = np.flatnonzero((pairs["split"] == "train").to_numpy())
        distinct = train[~pairs["prompt"].iloc[train].duplicated().to_numpy()]
        return cls(model, recipe.words, pairs["prompt"].iloc[distinct].tolist(), embeddings[distinct], device, captioner)

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
        captions = None if self.captioner is None else []
        for start in runtime.track(range(0, len(images), batch_size), "reading images"):
            chunk = images[start : start + batch_size]
            opened = [image.convert("RGB") if isinstance(image, Image.Image) else data.open_image(image) for image in chunk]
            batch = self._batch(opened, size)
            if captions is not None:
                captions += self.captioner.caption(self._batch(opened, self.captioner.image_size))
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
        return Prediction(embeddings, words, prompts, captions)

    def _batch(self, opened, size):
        """Return PIL images as one tensor (b, 3, size, size), uint8."""
        import torch

        return torch.from_numpy(data.Pictures(opened, size).batch(np.arange(len(opened)))).to(self.device)


def _open(folder, captions):
    """Return model and recipe of a finished run that answers in embeddings, or in captions."""
    wanted, notebook = ("captioner", "08_captioning") if captions else ("run that predicts embeddings", "01_train_vit")
    if not (folder / "difficulty.parquet").is_file() or _captions(folder) != captions:
        raise CacheError(f"{runtime.relative(folder)} holds no finished {wanted}", f"Train one: rsd run {notebook}.")
    return recipes.load_model(folder)


def _captions(folder):
    made_from = runtime.read_json(folder / "config.json")["recipe"]
    return made_from.get("backbone", {}).get("library") == "blip"


def _top(probabilities, words, n):
    order = np.argsort(-probabilities, kind="stable")[:n]
    return [(words[i], float(probabilities[i])) for i in order]


def best_run(profile="mini", captions=False):
    """Return a profile's finished run with the best validation score: of a model that predicts embeddings, or captions.

    Runs with a vocabulary head come before those without: they can say words, too.

    Raises
    ------
    CacheError
        There is none yet.
    """
    every = (path.parent for path in (runtime.root() / "runs" / profile).glob("*/difficulty.parquet"))
    finished = [folder for folder in sorted(every) if _captions(folder) == captions]
    if not finished:
        what, notebook = ("no captioner", "08_captioning") if captions else ("nothing", "01_train_vit")
        raise CacheError(f"{what} is trained yet below runs/{profile}", f"Run: rsd run {notebook}")

    from rsdlib import training

    def rank(folder):
        run = training.load_run(folder)
        return not captions and bool(run.recipe["words"]), run.metrics["val_similarity"].max()

    return max(finished, key=rank)
