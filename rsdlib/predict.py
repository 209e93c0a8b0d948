"""Use what was trained: an image in; its prompt's embedding, words and nearest prompts out."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from rsdlib import data, ensemble, errors, experiment, files, models, runtime, training
from rsdlib.errors import CacheError, CheckpointError, ConfigError

# What to do where there is no model, or no captioner.
_TRAIN = {False: "Run: rsd run 01_train_vit", True: "Run: rsd run 08_captioning"}
_STORED = "stored_prompt", "stored_cosine", "stored_reason"


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
    stored : list of n (prompt, cosine, reason)
        The prompts that the images' files hold, and the cosine of what was read with their plain
        form's embedding; None where there is no prompt, and why.
    """

    embeddings: np.ndarray
    words: list
    prompts: list
    captions: list | None = None
    distances: np.ndarray | None = None
    stored: list = ()

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
        columns = {"image": list(map(runtime.shown, images)), "embedding": self.embeddings.tolist()}
        columns |= {"caption": self.captions, "words": self.words, "prompts": self.prompts}
        if self.distances is not None:
            columns["in_domain"] = self.in_domain.tolist()
            columns["distance"] = self.distances.round(3).tolist()
        columns |= zip(_STORED, zip(*self.stored, strict=True), strict=False)  # none of no images
        columns = {name: values for name, values in columns.items() if values is not None}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def table(self, images):
        """Return a DataFrame to save: one row an image, no embeddings; see `records`."""
        hidden = ["embedding", "prompts", "distance", "stored_reason"]
        table = pd.DataFrame(self.records(images)).drop(columns=hidden, errors="ignore")
        said = ("; ".join(f"{word} {share:.3f}" for word, share in words) for words in self.words)
        nearest = [near[0] if near else ("", np.nan) for near in self.prompts]
        nearest = pd.DataFrame(nearest, columns=["nearest_prompt", "similarity"])
        return table.assign(words=list(said)).join(nearest)

    def submission(self, images):
        """Return Kaggle's "Stable Diffusion - Image to Prompts": a DataFrame to save as CSV.

        Raises
        ------
        BadValueError
            Two images have one name but for folder and suffix, or embeddings other than 384 values.
        """
        names = [Path(runtime.shown(image)).stem for image in images]
        size = self.embeddings.shape[1]
        if len(set(names)) < len(names) or size != 384:
            message = f"{len(set(names))} names of {len(names)} images with {size} values each"
            raise errors.BadValueError(message, "Kaggle asks for distinct names, and 384 values.")
        rows = [f"{name}_{number}" for name in names for number in range(size)]
        return pd.DataFrame({"imgId_eId": rows, "val": self.embeddings.ravel()})


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

    def predict(self, images, n_words=8, n_prompts=5, batch_size=64, without=()):
        """Predict from images.

        Parameters
        ----------
        images : what `rsdlib.data.open_image` opens, or a sequence of them
        n_words, n_prompts : int
            How many words and prompts to name for each image; of prompts None means all.
        batch_size : int
        without : sequence of str
            Words that are not said, and are left out of the prompts named, with all that stands
            between the same commas. ``"artists"`` means what begins with "by" or "in the style of".

        Returns
        -------
        Prediction
        """
        one = isinstance(images, (str, os.PathLike, Image.Image, bytes))
        images, say = [images] if one else list(images), _saying(without)
        size = self.model.embedding_head.out_features
        parts = [(np.empty((0, size), np.float32), np.empty((0, len(self.words))), (), [], [])]
        for start in runtime.track(range(0, len(images), batch_size), "reading images"):
            parts.append(self._read(images[start : start + batch_size]))
        columns = map(np.concatenate, zip(*parts, strict=True))
        embeddings, probabilities, distances, captions, found = columns
        table = pd.DataFrame(probabilities, columns=map(say, self.words))
        rows = table.drop(columns="", errors="ignore").iterrows()  # what is left out is ""
        words = [list(row.nlargest(n_words).items()) for _, row in rows]
        prompts = self._nearest(embeddings, n_prompts, say)
        captions = None if self.captioner is None else captions.tolist()
        distances = None if self.domain is None else distances
        stored = _compared(embeddings, found, self.device)
        return Prediction(embeddings, words, prompts, captions, distances, stored)

    def _read(self, images):
        """Return embeddings, words' probabilities, distances, captions and stored prompts."""
        import torch

        encoder, front = self.model.backbone, getattr(self.model.backbone, "front", None)
        sizes = [reader.image_size for reader in (encoder, self.captioner) if reader is not None]
        *squares, found = zip(*(_look(image, sizes) for image in images), strict=True)
        pixels, *larger = (torch.from_numpy(np.stack(s)).to(self.device) for s in squares)
        distances, captions = (), []
        with data.evaluating(self.model.to(self.device)):
            features = encoder(pixels if front is None else front.to(self.device).eval()(pixels))
            embedding, logits = self.model.heads(features)
        logits = embedding[:, :0] if logits is None else logits
        if self.domain is not None:
            look = models.texture(pixels.cpu().numpy())
            distances = self.domain.distance({"features": features.float().cpu(), "texture": look})
        if self.captioner is not None:
            with data.evaluating(self.captioner.to(self.device)):
                captions = self.captioner.caption(*larger)
        probabilities = logits.float().sigmoid().cpu().numpy()
        return embedding.cpu().numpy(), probabilities, distances, captions, found

    def _nearest(self, embeddings, n_prompts, say):
        prompts, known = self.bank or ([], None)
        count = len(prompts[:n_prompts])
        if not (count and len(embeddings)):
            return [[] for _ in embeddings]
        near = zip(*ensemble.nearest(embeddings, known, count), strict=True)
        told = [[(say(prompts[i]), float(s)) for s, i in zip(*one, strict=True)] for one in near]
        return [[pair for pair in pairs if pair[0]] for pairs in told]


def _look(image, sizes):
    """Return an image at some sizes, and what its file says of its prompt; then it is let go."""
    file = data.read_file(image)
    picture = data.decode_image(*file)
    return *(data.resize(picture, size) for size in sizes), data.read_prompt(file[0])


def _compared(embeddings, found, device):
    """Return the prompts that files hold, their cosines with embeddings, and why there are none."""
    cosines, rows = np.full(len(found), None), [i for i, file in enumerate(found) if file.prompt]
    try:
        if rows:
            own = data.embed([data.plain(found[i].prompt) for i in rows], device=device)
            cosines[rows] = data.cosine(embeddings[rows], own)
    except (errors.ModelNotFoundError, errors.BadValueError) as error:  # learnt another embedding
        runtime.log(f"stored prompts are not compared: {error}")
    prompts = [file.prompt and runtime.shown(file.prompt) for file in found]
    return list(zip(prompts, cosines, [file.reason for file in found], strict=True))


# Parts of prompts that name artists: "by X", "art by X", "in the style of X".
_ARTISTS = r"((art|artwork|painting|illustration) )?by .*|(in the )?style of .*"


def _saying(without):
    """Return a function that says a text but for the parts that hold what is to be left out."""
    known = {"artists": _ARTISTS}
    texts = filter(None, map(str.strip, without))
    unsaid = [known.get(text, rf".*(?<!\w){re.escape(text)}(?!\w).*") for text in texts]
    is_unsaid = re.compile("|".join(unsaid) or "(?!)", re.I | re.S).fullmatch
    return lambda text: ",".join(p for p in text.split(",") if not is_unsaid(p.strip())).strip()


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
    what, places = "no captioner" if captions else "nothing", " or runs/".join(profiles)
    raise CacheError(f"{what} is trained yet below runs/{places}", _TRAIN[captions])


def best_readers(profile, prepared):
    """Return each backbone's best finished run on some prepared pairs.

    Parameters
    ----------
    profile : str
    prepared : str
        Key of the pairs.

    Returns
    -------
    dict of str to Path
    """
    runs = pd.DataFrame(_finished(files.root() / "runs" / profile, captions=False))
    runs = runs[runs["data"] == prepared].sort_values(["words", "score"])
    return runs.groupby("reader")["folder"].last().to_dict()


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
            run["reader"] = re.split("-(?:mlc|vanilla)", path.parent.name)[0]
            yield run | {"words": bool(recipe.words) and not captions, "score": score}
