"""The steps that notebooks share: prepare the data, train a backbone, score it beside the baselines.

Each step stores what it made under a key of what made it, so that a notebook finds the work of an earlier one or does it itself.
"""

import contextlib
import dataclasses
import os
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from rsdlib import data, metrics, prompts, runtime
from rsdlib.config import BackboneConfig, CurriculumConfig, DataConfig, HeadConfig, as_dict, replace
from rsdlib.errors import BadTableError

# --- data -------------------------------------------------------------------------------------------------------------------

_RULES = "2"  # part of the key of prepared data: change it with what the rules of `rsdlib.prompts` do


@dataclass(frozen=True)
class Prepared:
    """Clean, split, labelled pairs.

    Attributes
    ----------
    key : str
        Of the source's rows and the settings.
    pairs : DataFrame
        id, prompt, image, key (of the normalised prompt), split ("train", "val", "test"), and the source's metadata.
    report : DataFrame
        One row per cleaning rule.
    vocabulary : rsdlib.prompts.Vocabulary
        Of the training prompts.
    targets : ndarray (n, 384), float32, memory-mapped
    labels : ndarray (n, ceil(m / 8)), uint8, memory-mapped
        Packed, see `rsdlib.training.pack`.
    """

    key: str
    config: DataConfig
    pairs: pd.DataFrame
    report: pd.DataFrame
    vocabulary: prompts.Vocabulary
    targets: np.ndarray
    labels: np.ndarray
    _stores: dict = field(default_factory=dict, repr=False)

    def rows(self, split, store=None):
        """Return the rows of ``"train"``, ``"val"`` or ``"test"``: with a store of images or features, those that it has."""
        rows = np.flatnonzero((self.pairs["split"] == split).to_numpy())
        return rows if store is None else rows[store.ok[rows]]

    def sizes(self):
        """Return a table: split, pairs, prompts, and how many of its prompts another split holds too (zero)."""
        rows = []
        for split in ("train", "val", "test"):
            mine = self.pairs["split"] == split
            shared = set(self.pairs.loc[mine, "key"]) & set(self.pairs.loc[~mine, "key"])
            rows.append(
                {"split": split, "pairs": int(mine.sum()), "prompts": self.pairs.loc[mine, "key"].nunique(), "shared": len(shared)}
            )
        return pd.DataFrame(rows)

    def images(self, size, on_bad="error"):
        """Return the decoded images of all pairs, stored once and checked once a session (see `rsdlib.data.ImageStore`)."""
        if (size, on_bad) not in self._stores:
            many = len(self.pairs) > 20_000  # below, starting processes costs more than it saves
            with ProcessPoolExecutor(os.cpu_count()) if many else contextlib.nullcontext() as executor:
                self._stores[size, on_bad] = data.ImageStore.build(self.pairs, size, on_bad=on_bad, executor=executor)
        return self._stores[size, on_bad]

    def inputs(self, encoder, on_bad="error", device="auto"):
        """Return what an encoder reads: the images, or what its frozen front makes of them, stored once."""
        from rsdlib import backbones, training

        store = self.images(encoder.image_size, on_bad)
        if encoder.front is None:
            return store
        key = (store.key, training.weights_key(encoder.front))
        if key not in self._stores:
            self._stores[key] = backbones.FeatureStore.build(store, encoder.front, device=device)
        return self._stores[key]

    def figures(self, profile, folder=""):
        """Return the folder for figures: `folder`, or one below ``runs/<profile>`` that belongs to these data."""
        return runtime.resolve_path(folder) if folder else runtime.root() / "runs" / profile.name / f"figures-{self.key[:8]}"


def prepare(config):
    """Read, clean, split, label and embed the pairs of a source, or find them done.

    Parameters
    ----------
    config : rsdlib.config.DataConfig

    Returns
    -------
    Prepared
    """
    source = runtime.resolve_path(config.source)
    pairs = data.load_pairs(source, limit=config.limit)
    read = [column for column in ("id", "prompt", "image_nsfw", "prompt_nsfw") if column in pairs]  # by the rules
    fingerprint = pd.util.hash_pandas_object(pairs[read].astype(str), index=False).to_numpy()
    settings = {name: value for name, value in as_dict(config).items() if name != "source"}
    key = runtime.digest([settings, _RULES, fingerprint.tolist()])
    folder = runtime.cache_dir() / "prepared" / key
    if not (folder / "vocabulary.json").exists():  # the last file of this step
        _prepare(config, pairs, folder)
    rest = pairs.drop(columns=["prompt", "key", "split"], errors="ignore")  # a source's own split is not ours
    kept = pd.read_parquet(folder / "pairs.parquet").merge(rest, on="id", how="left", validate="1:1")
    vocabulary = prompts.Vocabulary.load(folder / "vocabulary.json")
    made_from = {"prepared": key}
    arrays = runtime.cached_arrays(folder / "answers.safetensors", lambda: _answers(kept["prompt"], vocabulary), made_from)
    report = pd.read_parquet(folder / "report.parquet")
    return Prepared(key, config, kept, report, vocabulary, arrays["targets"], arrays["labels"])


def _prepare(config, pairs, folder):
    kept, report = prompts.clean(pairs, config.clean)
    if kept.empty:
        rule = report.loc[(report["rows_in"] - report["rows_out"]).idxmax(), "rule"]
        raise BadTableError(f"no pair of {config.source} is left after cleaning", f"The rule {rule!r} took most: loosen it.")
    kept["split"] = prompts.split(kept["key"], config.val_fraction, config.test_fraction)
    for split in ("train", "val", "test"):
        if (found := kept.loc[kept["split"] == split, "key"].nunique()) < 2:
            message = f"the {split} split of {config.source} has {found} of {kept['key'].nunique()} prompts, too few to judge by"
            raise BadTableError(message, "Add data.")
    vocabulary = prompts.Vocabulary.fit(kept.loc[kept["split"] == "train", "prompt"], config.vocabulary_size)
    runtime.write_parquet(folder / "pairs.parquet", kept[["id", "prompt", "key", "split"]])
    runtime.write_parquet(folder / "report.parquet", report)
    vocabulary.save(folder / "vocabulary.json")


def _answers(texts, vocabulary):
    from rsdlib.training import pack

    return {"targets": prompts.embed_cached(texts, device=runtime.device("auto")), "labels": pack(vocabulary.encode(texts))}


# --- training ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What makes a model, besides the training settings; stored in the run folder, enough to build the model again."""

    backbone: BackboneConfig
    head: HeadConfig
    words: tuple = ()  # the vocabulary; empty without vocabulary head
    prepared: str = ""  # key of the prompts and their split
    seed: int = 0
    images: str = ""  # key of the pixels
    start: str = ""  # key of the starting weights: a pretrained file may change under its name
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    difficulty: str = ""  # key of the difficulty that the paper's curriculum sorts by

    @property
    def captions(self):
        """Whether the model answers in words: BLIP does."""
        return self.backbone.library == "blip"

    def build(self):
        """Return the model with its starting weights, a function of the recipe alone."""
        import torch

        from rsdlib import backbones, captioning
        from rsdlib.model import PromptRegressor

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(runtime.torch_seed("weights", self.seed))
            if self.captions:
                return captioning.open_captioner(self.backbone.model, len(self.words), self.backbone.pretrained)
            return PromptRegressor(backbones.create(self.backbone), self.head.head, len(self.words))

    @classmethod
    def load(cls, values):
        """Read a recipe back from ``config.json``."""
        nested = {
            "backbone": BackboneConfig(**values["backbone"]),
            "head": HeadConfig(**values["head"]),
            "words": tuple(values["words"]),
            "curriculum": CurriculumConfig(**values["curriculum"]),
        }
        return cls(**{**values, **nested})


def train(profile, backbone, prepared, *, weight=None, head=None, curriculum=None, on_bad="error", **changes):
    """Train one backbone on prepared pairs, or find the run done.

    Parameters
    ----------
    profile : rsdlib.config.Profile
    backbone : str
        A name in ``profile.backbones``, or ``"timm:<name>"``.
    prepared : Prepared
    weight : float, optional
        The vocabulary loss's weight lambda; 0 trains the embedding alone ("vanilla").
    head : str, optional
        Arrangement of the heads.
    curriculum : {"none", "ours", "cbs", "lerac"} or CurriculumConfig, optional
        By name with the profile's settings. ``"ours"`` sorts by the difficulty that the same training without curriculum recorded,
        and trains that first if it is not there.
    on_bad : {"error", "skip"}
        What to do about images that cannot be read.
    **changes
        Training settings that differ from the profile's, such as ``epochs=3``.

    Returns
    -------
    Path
        The run folder, ``runs/<profile>/<backbone>-<vanilla or mlc>[-<curriculum>]-<key>``.
    """
    import torch

    from rsdlib import backbones, training
    from rsdlib.captioning import CaptionObjective
    from rsdlib.curriculum import regime
    from rsdlib.losses import JointObjective

    asked = {name: value for name, value in (("weight", weight), ("head", head)) if value is not None}
    heads = replace(profile.head, **asked)
    captions = profile.backbone(backbone).library == "blip"
    if not heads.weight or captions:  # one vanilla run, whatever arrangement was asked for
        own = {} if captions else {"huber": heads.huber, "probe": heads.probe}
        heads = HeadConfig(weight=heads.weight, **own)
    settings = profile.training(backbone, **changes)
    words = prepared.vocabulary.words if heads.weight else ()
    if not isinstance(curriculum, CurriculumConfig):
        curriculum = replace(profile.curriculum, name=curriculum or profile.curriculum.name)
    before = None
    if curriculum.name == "ours":
        before = train(profile, backbone, prepared, weight=weight, head=head, curriculum="none", on_bad=on_bad, **changes)
        before = training.load_run(before).difficulty
    recipe = Recipe(profile.backbone(backbone), heads, words, prepared.key, settings.seed)
    model = recipe.build()
    store = prepared.inputs(model if captions else model.backbone, on_bad, settings.device)
    made_by = {"images": store.key, "start": training.weights_key(model), "curriculum": curriculum}
    if before is not None:
        made_by["difficulty"] = runtime.digest(before.to_numpy().tolist())
    recipe = dataclasses.replace(recipe, **made_by)
    name = f"{slug(backbone)}-{'mlc' if words else 'vanilla'}" + (f"-{curriculum.name}" if curriculum.name != "none" else "")
    folder = runtime.root() / "runs" / profile.name / f"{name}-{runtime.digest([as_dict(recipe), settings.fixed()], 8)}"
    rows = {split: prepared.rows(split, store) for split in ("train", "val")}
    targets = model.encode(prepared.pairs["prompt"]) if captions else prepared.targets
    if heads.probe:
        features = backbones.FeatureStore.build(store, model.backbone, device=settings.device).batch(rows["train"])
        model.probe(torch.from_numpy(features), torch.from_numpy(np.asarray(targets[rows["train"]])))
    pairs = training.PairData(store, targets, prepared.labels if words else None, len(words), **rows)
    runtime.log(f"{name}: {len(rows['train'])} training pairs, {settings.epochs} epochs -> {runtime.relative(folder)}")
    objective = CaptionObjective(heads.weight) if captions else JointObjective(heads.weight, heads.huber)
    learning = regime(curriculum, rows["train"], settings.epochs, before)
    return training.fit(model, pairs, settings, folder, objective=objective, recipe=as_dict(recipe), **learning)


def scenes(prepared):
    """Return what each pair's prompt asks for and what the judge sees in its image, where the source tells: the mini world does.

    Returns
    -------
    DataFrame or None
        One row a pair, columns as in ``scenes.parquet`` (see data/README.md). None for other sources.
    """
    path = runtime.resolve_path(prepared.config.source) / "scenes.parquet"
    if not path.is_file():
        return None
    return prepared.pairs[["id"]].merge(pd.read_parquet(path), left_on="id", right_on="image_name", how="left", validate="1:1")


def known_causes(prepared):
    """Return what is known about why a pair may be hard, where the source tells.

    Parameters
    ----------
    prepared : Prepared

    Returns
    -------
    DataFrame of bool or None
        One row a pair: "nothing to see" (the prompt names nothing visible), "several things" (more than one), "a count" (two or
        three of a kind), "left of" (an order), "not as asked" (the judge sees another thing, setting, medium or number). None for
        other sources.
    """
    if (told := scenes(prepared)) is None:
        return None
    visible, relation = told["has_referent"].to_numpy(bool), told["relation"].to_numpy()
    nouns = zip(told["nouns"], told["judged_nouns"], strict=True)
    same = np.array([set(asked) == set(judged) for asked, judged in nouns])
    for name in ("count", "setting", "medium"):
        same &= told[name].to_numpy() == told[f"judged_{name}"].to_numpy()
    return pd.DataFrame(
        {
            "nothing to see": ~visible,
            "several things": visible & (told["count"].to_numpy() > 1),
            "a count": relation == "count",
            "left of": relation == "left of",
            "not as asked": visible & ~same,
        }
    )


def about(prepared, seed):
    """Return what every stored result says of itself: its data and their sizes, the seed, the machine."""
    return {
        "source": runtime.relative(runtime.resolve_path(prepared.config.source)),
        "prepared": prepared.key,
        "sizes": prepared.sizes().to_dict("records"),
        "seed": seed,
        "environment": runtime.environment(),
    }


def slug(backbone):
    """Return a backbone's name as part of a file name."""
    return re.sub(r"[^\w.]+", "-", backbone)


def image_size(profile, backbone):
    """Return the pixels a side that a backbone reads."""
    from rsdlib import backbones

    size = profile.backbone(backbone).image_size
    return size if size is not None else backbones.create(replace(profile.backbone(backbone), pretrained=False)).image_size


def starting_model(folder):
    """Return the model that a run started from."""
    return Recipe.load(runtime.read_json(Path(folder) / "config.json")["recipe"]).build()


def load_model(folder):
    """Return the trained model of a run folder, and its recipe."""
    from rsdlib import training

    recipe = Recipe.load(runtime.read_json(Path(folder) / "config.json")["recipe"])
    # The run's own weights follow: pretrained ones need not be here.
    model = dataclasses.replace(recipe, backbone=replace(recipe.backbone, pretrained=False)).build()
    training.load_weights(model, Path(folder) / "model.safetensors")
    return model, recipe


# --- scores -----------------------------------------------------------------------------------------------------------------


def score(pred, target, groups):
    """Return the figures that every result states.

    Parameters
    ----------
    pred, target : ndarray (n, d)
    groups : array-like (n,)
        The prompts' keys: images of one prompt are resampled together and share one candidate in the retrieval.

    Returns
    -------
    dict
        cosine (mean, low, high, n), median_rank, recall@1/5/10 and the number of candidates.
    """
    found = metrics.retrieval(pred, target, groups)
    cosine = metrics.bootstrap_ci(metrics.cosine(pred, target), groups=groups)
    recalls = {f"recall@{k}": found.recall(k) for k in (1, 5, 10)}
    return {"cosine": as_dict(cosine), "median_rank": found.median_rank, **recalls, "candidates": found.candidates}


@dataclass
class Scores:
    """Predictions of several methods on one split, compared on the same items.

    Parameters
    ----------
    prepared : Prepared
    store : rsdlib.data.ImageStore or rsdlib.backbones.FeatureStore
    split : {"val", "test"}
    """

    prepared: Prepared
    store: object
    split: str = "test"
    predictions: dict = field(default_factory=dict)  # method -> (n, d)

    @cached_property
    def rows(self):
        """Rows of the split whose images can be read."""
        return self.prepared.rows(self.split, self.store)

    @property
    def target(self):
        """True embeddings (n, d)."""
        return self.prepared.targets[self.rows]

    @property
    def groups(self):
        """Prompt of each item."""
        return self.prepared.pairs["key"].to_numpy()[self.rows]

    def cosine(self, method):
        """Return each item's cosine similarity under `method`."""
        return metrics.cosine(self.predictions[method], self.target)

    def table(self, baselines):
        """Return one row per method: its scores, its gain over each baseline with interval and p-value."""
        rows = []
        for method, pred in self.predictions.items():
            row = {"method": method, **score(pred, self.target, self.groups)}
            for baseline in baselines:
                if method not in baselines:
                    test = metrics.paired_test(self.cosine(method), self.cosine(baseline), groups=self.groups)
                    row[f"gain over {baseline}"] = as_dict(test)
            rows.append(row)
        return rows


def as_table(rows):
    """Return score rows as a data frame to read: intervals in brackets, gains with their p-values."""

    def text(value):
        if isinstance(value, dict) and "p" in value:
            return f"{text(value['difference'])}, p = {value['p']:.2g}"
        if isinstance(value, dict):
            return f"{value['mean']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"
        return f"{value:.3g}" if isinstance(value, float) else value

    return pd.DataFrame([{name: text(value) for name, value in row.items()} for row in rows]).fillna("").set_index("method").T


MEAN, KNN_BEFORE, KNN_AFTER = "mean embedding", "k-NN, features as they came", "k-NN, features as trained (vanilla)"
BASELINES = (MEAN, KNN_BEFORE, KNN_AFTER)


def predict_baselines(scores, before, after, neighbours=(1, 4, 16, 64), device="auto"):
    """Add the predictions that a trained model has to beat.

    Parameters
    ----------
    scores : Scores
    before, after : PromptRegressor
        With starting and with trained weights: their backbones give the features for the k-NN.
    neighbours : sequence of int
        Candidates for k; the best on validation is used.

    Returns
    -------
    dict
        Chosen k of each k-NN.
    """
    from rsdlib.backbones import FeatureStore

    prepared, store = scores.prepared, scores.store
    train, val = (prepared.rows(split, store) for split in ("train", "val"))
    mean = prepared.targets[train].mean(axis=0, keepdims=True)  # (1, d)
    scores.predictions[MEAN] = np.repeat(mean, len(scores.rows), axis=0)
    chosen = {}
    for name, model in ((KNN_BEFORE, before), (KNN_AFTER, after)):
        features = FeatureStore.build(store, model.backbone, device=device)
        base, own, queries = map(features.batch, (train, val, scores.rows))
        chosen[name] = _regress(scores, name, queries, own, base, (train, val), neighbours)
    return chosen


CLIP_KNN = "CLIP + k-NN"


def predict_clip_knn(scores, backbone, images, neighbours=(1, 4, 16, 64), device="auto"):
    """Add the paper's CLIP + k-NN (supplementary, Table 4): image embeddings against the text embeddings of the training prompts.

    Differs from the paper: CLIP is not fine-tuned before.

    Parameters
    ----------
    scores : Scores
    backbone : rsdlib.config.BackboneConfig
        Of the library open_clip.
    images : ImageStore
        At the size that this CLIP reads.
    neighbours : sequence of int
        Candidates for k; the best on validation is used.

    Returns
    -------
    int
        The chosen k.
    """
    from rsdlib import backbones
    from rsdlib.training import apply

    train, val = (scores.prepared.rows(split, images) for split in ("train", "val"))
    encoder, read = backbones.clip_pair(backbone)
    base = read(scores.prepared.pairs["prompt"].iloc[train].tolist())
    own, queries = (apply(encoder, images, rows, device=device, description="CLIP embeddings") for rows in (val, scores.rows))
    return _regress(scores, CLIP_KNN, queries, own, base, (train, val), neighbours)


def _regress(scores, name, queries, own, base, rows, neighbours):
    """Add a k-NN's predictions, with the k that is best on validation, and return that k."""
    from rsdlib.retrieval import knn_regress

    train, val = rows
    targets, true = np.asarray(scores.prepared.targets[train]), scores.prepared.targets[val]
    k = max(
        (k for k in neighbours if k <= len(base)), key=lambda k: metrics.cosine(knn_regress(own, base, targets, k), true).mean()
    )
    scores.predictions[name] = knn_regress(queries, base, targets, k)
    return k


def predict_run(folder, prepared, store, split, device="auto"):
    """Return a run's predictions on a split, stored in its folder with a table of the same rows.

    Returns
    -------
    ndarray (n, d), float32, unit rows
        Also in ``predictions-<split>.safetensors``; ``predictions-<split>.parquet`` has id, prompt and cosine of each row.
    """
    from rsdlib.training import apply

    rows = prepared.rows(split, store)
    items = prepared.pairs.iloc[rows][["id", "prompt"]]

    def predict():
        model, _ = load_model(folder)
        pred = apply(model, store, rows, pick=lambda out: out[0], device=device, description=f"predicting {split}")
        cosine = metrics.cosine(pred, prepared.targets[rows])
        runtime.write_parquet(Path(folder) / f"predictions-{split}.parquet", items.assign(cosine=cosine))
        return {"embedding": pred}

    made_from = {"items": runtime.digest([items.to_numpy().tolist(), store.key])}
    return runtime.cached_arrays(Path(folder) / f"predictions-{split}.safetensors", predict, made_from)["embedding"]


def captions(model, prepared, store, split, beams=3, device="auto"):
    """Return a captioner's captions of a split, stored in the cache under the model's weights and the images.

    Parameters
    ----------
    model : rsdlib.captioning.Captioner
    prepared : Prepared
    store : ImageStore
        At the size that this captioner reads.
    split : {"val", "test"}
    beams : int
        1 is greedy.

    Returns
    -------
    list of str
        One for each row of the split that has an image.
    """
    from rsdlib.captioning import LENGTH, REPEAT, caption_all
    from rsdlib.training import weights_key

    rows = prepared.rows(split, store)
    key = runtime.digest([weights_key(model), store.key, rows.tolist(), beams, LENGTH, REPEAT])
    path = runtime.cache_dir() / "captions" / f"{key}.json"
    if not path.exists():
        runtime.write_json(path, caption_all(model, store, rows, beams, device))
    return runtime.read_json(path)


def compare(runs, prepared, inputs, split="test", device="auto"):
    """Score runs of one backbone beside the baselines and the later ones beside the first, and write each run's results.

    Parameters
    ----------
    runs : dict of str to Path
        Method to run folder; the first is the vanilla run, whose features the k-NN baselines use.
    prepared : Prepared
    inputs : ImageStore or FeatureStore
        What the backbone reads, see `Prepared.inputs`.
    split : {"val", "test"}
    device : str

    Returns
    -------
    scores : Scores
    table : list of dict
        One row a method, for `as_table` and `rsdlib.plots.plot_scores`.
    """
    first = next(iter(runs))
    scores = Scores(prepared, inputs, split)
    after, _ = load_model(runs[first])
    chosen = predict_baselines(scores, starting_model(runs[first]), after, device=device)
    for name, folder in runs.items():
        scores.predictions[name] = predict_run(folder, prepared, inputs, split, device)
    table = scores.table(BASELINES)
    baselines = {row["method"]: row for row in table if row["method"] in BASELINES}
    for row in table:
        if row["method"] in runs:
            if row["method"] != first:
                test = metrics.paired_test(scores.cosine(row["method"]), scores.cosine(first), groups=scores.groups)
                row[f"gain over {first}"] = as_dict(test)
            write_results(runs[row["method"]], prepared, row, baselines=baselines, neighbours=chosen)
    return scores, table


def write_results(folder, prepared, row, **more):
    """Write a run's ``results.json``: its figures, and the data, seed and hardware behind them."""
    from rsdlib.training import load_run

    run = load_run(folder)
    best = run.metrics.dropna(subset="val_similarity").sort_values("val_similarity").iloc[-1]
    facts = {
        **about(prepared, run.config.seed),
        "epochs": run.config.epochs,
        "best_epoch": int(best["epoch"]) + 1,
        "val_cosine": float(best["val_similarity"]),
        "environment": runtime.read_json(run.folder / "run.json"),
        "images": run.recipe["images"],
    }
    runtime.write_json(run.folder / "results.json", {**row, **facts, **more})
