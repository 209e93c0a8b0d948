"""Use what was trained: an image in; its prompt's embedding, words and nearest prompts out."""

import os
from dataclasses import dataclass

import numpy as np
import pandas as pd
from PIL import Image

from rsdlib import data, ensemble, experiment, files, models, runtime, training
from rsdlib.errors import CacheError, CheckpointError, ConfigError

# What to do where there is no model, or no captioner.
_TRAIN = {False: "Run: rsd run 01_train_vit", True: "Run: rsd run 08_captioning"}


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
    distances : ndarray (n,), or None
        How far a picture lies from those that the model was trained on, see `rsdlib.models.Domain`;
        None where the run does not know.
    """

    embeddings: np.ndarray
    words: list
    prompts: list
    captions: list | None = None
    distances: np.ndarray | None = None

    @property
    def in_domain(self):
        """Which pictures are of the kind that the model was trained on: (n,) bool, or None."""
        return None if self.distances is None else self.distances <= 1

    def lines(self, i, name, prompt=""):
        """Return what was read in picture `i` as text to stand below it.

        Parameters
        ----------
        i : int
        name : str
            Of the reader; a picture that it does not know the kind of is marked.
        prompt : str
            The true one, where it is known: words that stand in it are written in capitals.
        """
        said = [word for word, _ in self.words[i]]
        right = data.Vocabulary(tuple(said)).encode([prompt])[0]
        said = [w.upper() if is_right else w for w, is_right in zip(said, right, strict=True)]
        known = self.distances is None or self.in_domain[i]
        lines = [f"{name if known else f'{name} (unlike)'}: {', '.join(said)}"]
        lines += [f"   nearest: {near[:90]}" for near, _ in self.prompts[i][:1]]
        return "\n".join(lines)

    def records(self, images):
        """Return what was read as dicts of plain values, one an image, with its embedding.

        Parameters
        ----------
        images : sequence of str (n)
            Names of the images.
        """
        columns = {"image": list(map(str, images)), "embedding": self.embeddings.tolist()}
        columns |= {"caption": self.captions, "words": self.words, "prompts": self.prompts}
        if self.distances is not None:
            columns["in_domain"] = self.in_domain.tolist()
            columns["distance"] = self.distances.round(3).tolist()
        columns = {name: values for name, values in columns.items() if values is not None}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def table(self, images):
        """Return a DataFrame to save: one row an image, no embeddings; see `records`."""
        rows, hidden = [], ["embedding", "prompts", "distance"]
        for record in self.records(images):
            said = "; ".join(f"{word} {share:.3f}" for word, share in record["words"])
            nearest, similarity = record["prompts"][0] if record["prompts"] else ("", np.nan)
            seen = {"words": said, "nearest_prompt": nearest, "similarity": similarity}
            rows.append(record | seen)
        return pd.DataFrame(rows).drop(columns=hidden, errors="ignore")


@dataclass
class Predictor:
    """A trained run, ready for images. Use `Predictor.load`.

    Parameters
    ----------
    model : rsdlib.models.PromptRegressor
    words : sequence of str
        The vocabulary, in the order of the model's logits.
    bank : (list of str (n), ndarray (n, d)) or None
        Known prompts and their embeddings.
    device : str
    captioner : rsdlib.models.blip.Captioner or None
    domain : rsdlib.models.Domain or None
    """

    model: object
    words: tuple = ()
    bank: tuple | None = None
    device: str = "auto"
    captioner: object = None
    domain: models.Domain | None = None

    def __post_init__(self):
        self.device = runtime.device(self.device)

    @classmethod
    def load(cls, folder, device="auto", captioner=None, encoder=None, bank=None):
        """Open a finished run folder, and perhaps a captioner's beside it.

        Parameters
        ----------
        folder : path-like
        device : str
        captioner : path-like, optional
        encoder : nn.Module, optional
            What `rsdlib.experiment.plan` was given, if it was.
        bank : path-like, optional
            Prompts to find the nearest among, see `rsdlib.data.load_prompts`; default: those that
            the run was trained on. Embedded once.

        Raises
        ------
        CacheError
            A folder holds no finished run of its kind, or a file in it is damaged.
        CheckpointError
            See `rsdlib.experiment.load_model`.
        """
        folder = files.resolve_path(folder)
        model, recipe = _open(folder, captions=False, encoder=encoder)
        if captioner is not None:
            captioner, _ = _open(files.resolve_path(captioner), captions=True)
        bank = _known_prompts(folder, recipe) if bank is None else _embedded(bank, device)
        known = folder / experiment.DOMAIN
        domain = models.Domain(files.load_arrays(known)[0]) if known.exists() else None
        return cls(model, recipe.words, bank, device, captioner, domain)

    @classmethod
    def untrained(cls, backbone, bank=None, device="auto"):
        """Open an encoder that says what it sees, and has learnt from no prompt.

        Parameters
        ----------
        backbone : rsdlib.config.BackboneConfig
            Of a timm model with named classes.
        bank : path-like, optional
            See `load`.
        device : str

        Raises
        ------
        ConfigError
            Its classes have no names.
        """
        names, speech = models.open_speech(backbone)
        if not names:
            raise ConfigError(f"{backbone.model} has no classes with names", "Use a classifier.")
        how = {"speech": speech, "reads": "spoken", "named": True}
        model = models.PromptRegressor(models.create(backbone), "separate", len(names), **how)
        model.only_speak()
        return cls(model, experiment.first_names(names), bank and _embedded(bank, device), device)

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
        images = [images] if isinstance(images, (str, os.PathLike, Image.Image)) else list(images)
        size = self.model.embedding_head.out_features
        parts = [(np.empty((0, size), np.float32), np.empty((0, len(self.words))), np.empty(0), [])]
        for start in runtime.track(range(0, len(images), batch_size), "reading images"):
            parts.append(self._read(images[start : start + batch_size]))
        *arrays, captions = zip(*parts, strict=True)
        embeddings, probabilities, distances = map(np.concatenate, arrays)
        ranked = [pd.Series(row, self.words).nlargest(n_words) for row in probabilities]
        words = [list(row.items()) for row in ranked]
        prompts = self._nearest(embeddings, n_prompts)
        captions = None if self.captioner is None else [text for part in captions for text in part]
        distances = None if self.domain is None else distances
        return Prediction(embeddings, words, prompts, captions, distances)

    def _read(self, images):
        """Return of images the embeddings, words' probabilities, distances and captions."""
        images = [i if isinstance(i, Image.Image) else data.open_image(i) for i in images]
        encoder, front = self.model.backbone, getattr(self.model.backbone, "front", None)
        pixels = self._tensor(images, encoder.image_size)
        probabilities, distances, captions = np.empty((len(images), 0)), (), []
        with data.evaluating(self.model.to(self.device)):
            features = encoder(pixels if front is None else front.to(self.device).eval()(pixels))
            embedding, logits = self.model.heads(features)
        if logits is not None:
            probabilities = logits.float().sigmoid().cpu().numpy()
        if self.domain is not None:
            look = models.texture(pixels.cpu().numpy())
            distances = self.domain.distance({"features": features.float().cpu(), "texture": look})
        if self.captioner is not None:
            with data.evaluating(self.captioner.to(self.device)):
                captions = self.captioner.caption(self._tensor(images, self.captioner.image_size))
        return embedding.cpu().numpy(), probabilities, distances, captions

    def _tensor(self, images, size):
        import torch

        pixels = data.Pictures(images, size).batch(np.arange(len(images)))
        return torch.from_numpy(pixels).to(self.device)

    def _nearest(self, embeddings, n_prompts):
        if not (self.bank and n_prompts and len(embeddings)):
            return [[] for _ in embeddings]
        prompts, known = self.bank
        near = ensemble.nearest(embeddings, known, min(n_prompts, len(prompts)))
        pairs = [zip(*both, strict=True) for both in zip(*near, strict=True)]
        return [[(prompts[i], float(similarity)) for similarity, i in some] for some in pairs]


def _embedded(path, device):
    """Return the prompts of a file and their embeddings."""
    prompts = data.load_prompts(path)
    return prompts, data.embed_cached(prompts, device=runtime.device(device))


def _known_prompts(folder, recipe):
    """Return the distinct training prompts of a run and their embeddings, or None."""
    prepared = files.cache_dir() / "prepared" / recipe.prepared
    try:
        pairs = pd.read_parquet(prepared / "pairs.parquet", columns=["prompt", "split"])
        embeddings = files.open_rows(prepared / "targets.npy")
    except (OSError, CacheError):
        runtime.log(f"{folder.name}: no training prompts (rsd run 00_prepare_data brings them)")
        return None
    train = pairs[pairs["split"] == "train"].drop_duplicates("prompt")
    return train["prompt"].tolist(), embeddings[train.index.to_numpy()]


def _open(folder, captions, encoder=None):
    """Return model and recipe of a finished run that answers in embeddings, or in captions."""
    if not training.is_finished(folder) or experiment.Recipe.load(folder).captions != captions:
        what = "captioner" if captions else "run that predicts embeddings"
        raise CacheError(f"{files.relative(folder)} holds no finished {what}", _TRAIN[captions])
    return experiment.load_model(folder, encoder)


def best_run(profile=None, captions=False):
    """Return a profile's finished run with the best validation score on the newest of its data.

    Of models that predict embeddings, or of captioners. Runs with a vocabulary head come before
    those without: they can say words, too.

    Parameters
    ----------
    profile : str, optional
        Default: desk, which knows real pictures, or else mini.
    captions : bool

    Returns
    -------
    Path

    Raises
    ------
    CacheError
        There is none yet.
    """
    profiles = ("desk", "mini") if profile is None else (profile,)
    for name in profiles:
        runs = pd.DataFrame(_finished(files.root() / "runs" / name, captions))
        if len(runs):
            runs["newest"] = runs.groupby("data")["made"].transform("max")
            return runs.sort_values(["newest", "words", "score"])["folder"].iloc[-1]
    what = "no captioner" if captions else "nothing"
    message = f"{what} is trained yet below {' or '.join(f'runs/{name}' for name in profiles)}"
    raise CacheError(message, _TRAIN[captions])


def _finished(folder, captions):
    """Yield what is to be known of a profile's runs of a kind to choose among them."""
    for path in sorted(folder.glob("*/difficulty.parquet")):
        try:
            recipe = experiment.Recipe.load(path.parent)
        except CheckpointError as error:  # of another version: named, and left alone
            runtime.log(str(error))
            continue
        if recipe.captions == captions and recipe.backbone.library != "own":
            score = training.load_run(path.parent).metrics["val_similarity"].max()
            run = {"folder": path.parent, "data": recipe.prepared, "made": path.stat().st_mtime}
            yield run | {"words": bool(recipe.words) and not captions, "score": score}
