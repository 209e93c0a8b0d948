"""Prepare, train, predict, compare: the steps that notebooks share.

Each step stores what it made under a key of what made it, so that a notebook finds the work of an
earlier one or does it itself. A training is laid open as a `Trial`: `plan` makes one, its parts can
be looked at and changed, and `Trial.run` hands them to `rsdlib.training.fit`.
"""

import copy
import functools
import inspect
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from rsdlib import analysis, data, ensemble, errors, files, models, runtime, training
from rsdlib import config as configs
from rsdlib.config import as_dict, from_dict, replace

SPLITS = ("train", "val", "test")

# --- prepare --------------------------------------------------------------------------------------

UNSTORED = 512  # pixels a side from which images are not stored: 0.8 MB each
_RULES = "4"  # part of the key of prepared data: change it with what the rules of `data` do


@dataclass(frozen=True)
class Prepared:
    """Clean, split, labelled pairs.

    Attributes
    ----------
    key : str
        Of the source's rows and the settings.
    pairs : DataFrame
        id, prompt, image, key (of the normalised prompt), split, and the source's metadata.
    report : DataFrame
        One row per cleaning rule.
    vocabulary : rsdlib.data.Vocabulary
        Of the training prompts.
    targets : ndarray (n, 384), float32, memory-mapped
    labels : ndarray (n, ceil(m / 8)), uint8, memory-mapped
        Packed, see `rsdlib.data.pack`.
    unread : DataFrame
        What was left out when the source was read, see `bad`.
    """

    key: str
    config: configs.DataConfig
    pairs: pd.DataFrame
    report: pd.DataFrame
    vocabulary: data.Vocabulary
    targets: np.ndarray
    labels: np.ndarray
    unread: pd.DataFrame
    _stores: dict = field(default_factory=dict, repr=False)

    @property
    def bad(self):
        """What is left out, as ``config.on_bad`` allows: of the source, of the stores so far."""
        stores = [store.bad for store in self._stores.values()]
        return pd.concat([self.unread, *stores], ignore_index=True).drop_duplicates()

    def rows(self, split, store=None):
        """Return the rows of a split; with a store, those of them that it has."""
        rows = np.flatnonzero((self.pairs["split"] == split).to_numpy())
        return rows if store is None else rows[store.ok[rows]]

    def sizes(self):
        """Return a table: split, pairs, prompts, and how many of them another split shares."""
        table = []
        for split in SPLITS:
            inside = self.pairs["split"] == split
            mine, others = (set(self.pairs["key"][side]) for side in (inside, ~inside))
            table.append((split, inside.sum(), len(mine), len(mine & others)))
        return pd.DataFrame(table, columns=["split", "pairs", "prompts", "shared"])

    def images(self, size):
        """Return the images of all pairs, decoded once; large ones whenever they are looked at."""
        if size >= UNSTORED:
            return data.Unstored(self.pairs, size)
        return self.stores([data.pixels(size)])[0]

    def store(self, encoder, device="auto"):
        """Return what an encoder reads: images, or what its frozen front makes of them."""
        fronts = _fronts(encoder)
        return self.stores(fronts, device)[0] if fronts else self.images(encoder.image_size)

    def stores(self, fronts, device="auto"):
        """Return the stores of some fronts, made in one pass, checked once a session."""
        keys = [front.key for front in fronts]
        if not self._stores.keys() >= set(keys):
            made = data.extract(self.pairs, fronts, on_bad=self.config.on_bad, device=device)
            if os.environ.get("RSD_LOCAL"):  # a folder on a fast disk
                made = [store.copied(os.environ["RSD_LOCAL"]) for store in made]
            self._stores.update(zip(keys, made, strict=True))
        return [self._stores[key] for key in keys]

    def scores(self, store, split="test"):
        """Return empty `analysis.Scores` for the rows of a split that a store has."""
        rows = self.rows(split, store)
        return analysis.Scores(rows, self.targets[rows], self.pairs["key"].to_numpy()[rows])

    def figures(self, profile, folder=""):
        """Return the folder for results: `folder`, or one below ``runs`` of these data."""
        if folder:
            return files.resolve_path(folder)
        return files.root() / "runs" / profile.name / f"figures-{self.key[:8]}"


def _encoder(model):
    """Return the part of a model that reads images: of a captioner, all of it."""
    return getattr(model, "backbone", model)


def _fronts(encoder, described=None):
    """Return what an encoder reads, and the pixels it is looked at by, for `data.extract`."""
    size, front = encoder.image_size, getattr(encoder, "front", None)
    shown = [data.pixels(size)] if size < UNSTORED else []
    if front is None:
        return shown
    opener = described and functools.partial(models.open_front, as_dict(described))
    return [data.network(front, size, opener), *shown]


def extract(profile, backbones, parts, pool=None, device="auto"):
    """Decode whole parts once and make all that some backbones read of them.

    Parameters
    ----------
    profile : rsdlib.config.Profile
    backbones : sequence of str
    parts : sequence of path-like
        Zips or folders of images, see `rsdlib.data.find_parts`.
    pool : concurrent.futures.Executor, optional
        See `rsdlib.data.executor`.
    device : str

    Returns
    -------
    fronts : list of rsdlib.data.Front
    images, bad : int
        How many images there are, and how many of them cannot be read.
    """
    fronts = {}
    for name in backbones:
        described = _settled(profile.backbone(name), device)
        model = Recipe(described, configs.HeadConfig()).build(load=False)
        fronts |= dict.fromkeys(_fronts(_encoder(model), described))
    folder, nothing = files.cache_dir() / "parts", [()] * len(parts)
    images = bad = 0
    for shards in data.run(parts, nothing, list(fronts), folder, device, pool):
        images += sum(len(shard.names) for shard in shards)
        bad += sum(len(shard.bad) for shard in shards)
    return list(fronts), images, bad


def prepare(config):
    """Read, clean, split, label and embed the pairs of a source, or find them done.

    Parameters
    ----------
    config : rsdlib.config.DataConfig

    Returns
    -------
    Prepared

    Raises
    ------
    BadTableError
        Too few pairs are left to train on and to judge by; see also `rsdlib.data.load_pairs`.
    """
    pairs = data.load_pairs(config.source, limit=config.limit, on_bad=config.on_bad)
    unread = pd.DataFrame(pairs.attrs.pop("bad"), columns=data.NONE_BAD.columns)
    ruled = pairs.columns.intersection(["id", "prompt", "image_nsfw", "prompt_nsfw", "reason"])
    fingerprint = pd.util.hash_pandas_object(pairs[ruled].astype(str), index=False).tolist()
    settings = {k: v for k, v in as_dict(config).items() if k not in ("source", "on_bad")}
    key = files.digest([settings, _RULES, fingerprint])
    folder = files.cache_dir() / "prepared" / key
    if not (folder / "vocabulary.json").exists():  # the last file of this step
        _prepare(config, pairs, folder)
    kept = pd.read_parquet(folder / "pairs.parquet")
    metadata = pairs.drop(columns=[*kept.columns.drop("id")], errors="ignore")  # ours are others
    kept = kept.merge(metadata, on="id", how="left", validate="1:1")
    vocabulary = data.Vocabulary.load(folder / "vocabulary.json")
    prompts = kept["prompt"]
    embed = functools.partial(data.embed_cached, prompts, device=runtime.device("auto"))
    targets = files.cached_rows(folder / "targets.npy", embed)
    labels = files.cached_rows(folder / "labels.npy", lambda: data.pack(vocabulary.encode(prompts)))
    report = pd.read_parquet(folder / "report.parquet")
    return Prepared(key, config, kept, report, vocabulary, targets, labels, unread)


def _prepare(config, pairs, folder):
    kept, report = data.clean(pairs, config.clean)
    if kept.empty:
        rule = report.loc[(report["rows_in"] - report["rows_out"]).idxmax(), "rule"]
        message = f"no pair of {config.source} is left after cleaning"
        raise errors.BadTableError(message, f"The rule {rule!r} took most: loosen it.")
    kept["split"] = data.split(kept["key"], config.val_fraction, config.test_fraction, config.turn)
    for split in SPLITS:
        prompts = kept.loc[kept["split"] == split, "key"].nunique()
        if prompts < 2:
            of = f"{prompts} of {kept['key'].nunique()} prompts"
            message = f"the {split} split of {config.source} has {of}, too few to judge by"
            raise errors.BadTableError(message, "Add data.")
    train = kept.loc[kept["split"] == "train", "prompt"]
    own = kept.columns.intersection(["id", "prompt", "key", "split", "raw_prompt"])
    files.write_parquet(folder / "pairs.parquet", kept[own])
    files.write_parquet(folder / "report.parquet", report)
    data.Vocabulary.fit(train, config.vocabulary_size).save(folder / "vocabulary.json")


# --- train ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What makes a model, besides the training settings; enough to build the model again."""

    backbone: configs.BackboneConfig
    head: configs.HeadConfig
    words: tuple = ()  # the vocabulary; empty without vocabulary head
    prepared: str = ""  # key of the prompts and their split
    seed: int = 0
    images: str = ""  # key of the store that is read
    start: str = ""  # key of the starting weights: a pretrained file may change under its name
    front: str = ""  # key of the frozen front, which is no part of the run's own weights
    curriculum: configs.CurriculumConfig = field(default_factory=configs.CurriculumConfig)
    stages: str = ""  # key of which rows are read in which epoch
    objective: str = ""  # key of an objective that is not the joint one
    names: tuple = ()  # the classes that the encoder has names for; empty if it says nothing

    @property
    def named(self):
        """Whether the vocabulary is the encoder's classes."""
        return bool(self.words) and self.words == first_names(self.names)

    @property
    def captions(self):
        """Whether the model answers in words: BLIP does."""
        return self.backbone.library == "blip"

    def build(self, encoder=None, load=True, speech=None):
        """Return the model with its starting weights, a function of the recipe alone.

        `encoder` is what was handed to `plan`; without `load` the trained weights are to follow,
        and pretrained ones need not be here. `speech` is opened where it is not handed in.
        """
        if self.backbone.library == "own" and encoder is None:
            message = f"the encoder {self.backbone.model!r} of this run is not one of ours"
            raise errors.CheckpointError(message, "Hand it in again: encoder=...")
        if self.names and load and speech is None:
            _, speech = models.open_speech(self.backbone, self.names)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(runtime.torch_seed("weights", self.seed))
            if self.captions:
                pretrained = self.backbone.pretrained and load
                return models.open_captioner(self.backbone.model, len(self.words), pretrained)
            encoder = copy.deepcopy(encoder)  # what was handed in may be trained more than once
            if encoder is None:
                encoder = models.create(self.backbone, load=load)
            if self.names and speech is None:
                cosines = self.backbone.library == "open_clip"
                speech = models.Speech.blank(len(self.names), encoder.features, cosines=cosines)
            says = {"speech": speech, "reads": self.head.reads, "named": self.named}
            return models.PromptRegressor(encoder, self.head.head, len(self.words), **says)

    @classmethod
    def load(cls, folder):
        """Read the recipe of a run folder."""
        return from_dict(cls, training.runs.made_from(folder)["recipe"])


@dataclass(frozen=True)
class Trial:
    """One training, laid open: everything that `rsdlib.training.fit` is given.

    Attributes
    ----------
    model : nn.Module
    pairs : rsdlib.data.PairStore
        Inputs, targets and labels; ``train`` and ``val`` rows.
    objective : callable
        ``objective(model, batch) -> (loss, similarity (b,))``.
    stages : list of rsdlib.training.Stage
    callbacks : list of rsdlib.training.Callback
    config : rsdlib.config.TrainConfig
    recipe : Recipe
    folder : Path
        ``runs/<profile>/<name>-<key>``.
    prepared : Prepared
    """

    model: object
    pairs: data.PairStore
    objective: object
    stages: list
    callbacks: list
    config: configs.TrainConfig
    recipe: Recipe
    folder: Path
    prepared: Prepared

    def run(self):
        """Train, or find the run done; return its folder."""
        steps = f"{len(self.pairs.train)} training pairs, {self.config.epochs} epochs"
        runtime.log(f"{files.relative(self.folder)}: {steps}")
        if not (training.is_finished(self.folder) or training.is_one_of_many()):
            processes = self.config.processes or max(torch.cuda.device_count(), 1)
            if processes > 1:
                self.hand_over()
                training.launch(self.folder, processes)
        how = {"objective": self.objective, "stages": self.stages, "callbacks": self.callbacks}
        how["recipe"] = as_dict(self.recipe)
        training.fit(self.model, self.pairs, self.config, self.folder, **how)
        if runtime.is_main_process():
            if not (self.recipe.captions or (self.folder / DOMAIN).exists()):
                self._learn_domain()
            for name in (training.runs.CHECKPOINT, PLAN):  # large, and no longer of use
                (self.folder / name).unlink(missing_ok=True)
        return self.folder

    def hand_over(self):
        """Write what other processes need to train this run; `planned` reads it."""
        if self.recipe.objective or self.recipe.backbone.library == "own":
            message = f"{self.folder.name} has an encoder or objective that only this process knows"
            raise errors.ConfigError(message, "Use processes=1.")
        arrays = training.runs.to_numpy(self.model.state_dict(), "model.")
        arrays |= {f"stage.{n}": stage.rows for n, stage in enumerate(self.stages)}
        # The callbacks are the curriculum's own: see `planned`.
        meta = {"data": as_dict(self.prepared.config), "callbacks": bool(self.callbacks)}
        meta["epochs"] = [stage.epochs for stage in self.stages]
        settings = training.Plan(self.stages, self.config).settings(as_dict(self.recipe))
        training.runs.claim(self.folder, settings)
        files.save_arrays(self.folder / PLAN, arrays, meta)

    def _learn_domain(self):
        """Store which pictures the trained model knows, for `rsdlib.Predictor`."""
        sides, images = [], self.prepared.images(self.model.backbone.image_size)
        for rows in (self.pairs.train, self.pairs.val):
            some = rows[:: -(-len(rows) // KNOWN)]
            read = {"device": self.config.device, "description": "what it knows"}
            features = data.apply(self.model.backbone, self.pairs.store, some, **read)
            sides.append({"features": features, "texture": models.texture(images.batch(some))})
        files.save_arrays(self.folder / DOMAIN, models.Domain.fit(*sides).arrays)


PLAN = "plan.safetensors"
DOMAIN, KNOWN = "domain.safetensors", 2000  # at most so many pictures say what a model knows


def train(profile, backbone, prepared, **options):
    """Train one backbone on prepared pairs, or find the run done: ``plan(...).run()``.

    Parameters
    ----------
    profile, backbone, prepared, **options
        See `plan`.

    Returns
    -------
    Path
        The run folder.
    """
    return plan(profile, backbone, prepared, **options).run()


def at_hand(profile, backbones):
    """Return which of some backbones' pretrained weights are here or come when they are asked for.

    The log names the others. After a first that the hub does not give, no other is asked for.

    Parameters
    ----------
    profile : rsdlib.config.Profile
    backbones : sequence of str

    Returns
    -------
    list of str
    """
    there, asking = [], True
    for name in backbones:
        described = profile.backbone(name)
        needed = {described.model, described.options.get("captioner")} & set(models.MODELS)
        absent = [model for model in sorted(needed) if models.whereabouts(model)[1] is None]
        from_hub = any(models.MODELS[model].hub for model in absent)
        try:
            if from_hub and not asking:
                raise errors.ModelNotFoundError(f"the weights of {absent[0]} are not here")
            for model in absent:
                models.locate(model)
            there.append(name)
        except errors.ModelNotFoundError as error:
            runtime.log(f"{name} is left out: {error}")
            asking = asking and not from_hub
    return there


def three_ways(profile, backbone, prepared, *, seed=0, seeds=1, **options):
    """Train a backbone vanilla, with vocabulary head (MLC), and with curriculum as well (CL).

    Parameters
    ----------
    profile, backbone, prepared, **options
        See `plan`.
    seed, seeds : int
        The first seed, and how many trainings of each kind there are, of one seed after another.

    Returns
    -------
    dict of str to list of Path
        Method to run folders, one a seed; the vanilla runs first.
    """
    seeded = [{**options, "seed": number} for number in range(seed, seed + seeds)]
    vanilla = [train(profile, backbone, prepared, **{**how, "weight": 0.0}) for how in seeded]
    mlc = [train(profile, backbone, prepared, **how) for how in seeded]
    full = [train(profile, backbone, prepared, curriculum="ours", **how) for how in seeded]
    if mlc == vanilla:  # with weight 0 they are one run
        return {backbone: vanilla, f"{backbone} + CL": full}
    return {backbone: vanilla, f"{backbone} + MLC": mlc, f"{backbone} + MLC + CL": full}


def plan(
    profile, backbone, prepared, curriculum=None, encoder=None, objective=None, stages=None, **how
):
    """Put together what one training needs, and train nothing yet.

    Parameters
    ----------
    profile : rsdlib.config.Profile
    backbone : str
        A name in ``profile.backbones``, or ``"timm:<name>"``; a name of your own with `encoder`.
    prepared : Prepared
    curriculum : {"none", "ours", "cbs", "lerac"} or CurriculumConfig, optional
        By name with the profile's settings. ``"ours"`` sorts by the difficulty that the same
        training without curriculum recorded, and trains that first if it is not there.
    encoder : nn.Module, optional
        In place of the profile's: maps uint8 images (b, 3, s, s) to features (b, p) and states p as
        ``features`` and s as ``image_size``.
    objective : callable, optional
        In place of the joint one: ``objective(model, batch) -> (loss, similarity (b,))``. Its
        source and its fields are part of the run's key.
    stages : list of rsdlib.training.Stage, or callable, optional
        An order of your own; a callable ``stages(rows, hardness, epochs)`` is given what the same
        training without curriculum recorded.
    **how
        What differs from the profile: settings of the training, such as ``epochs=3``; ``weight``,
        the vocabulary loss's lambda, 0 trains the embedding alone ("vanilla"); ``head``, the heads'
        arrangement.

    Returns
    -------
    Trial
    """
    heads = {name: how.pop(name, None) for name in ("weight", "head")}
    config = profile.training(backbone, **how)
    recipe, speech = _recipe(profile, backbone, prepared, encoder, heads, curriculum, config)
    model = recipe.build(encoder, speech=speech)
    start, front = data.weights_key(model), getattr(_encoder(model), "front", None)
    pairs = _pairs(prepared, model, recipe, config.device)
    if recipe.head.probe:
        features = data.features(pairs.store, model.backbone, device=config.device)
        read = data.PairStore(features, pairs.targets, None, 0, pairs.train, pairs.val)
        known, held = (tuple(read.batch(rows).values()) for rows in (read.train, read.val))
        model.probe(*known, held if recipe.head.chosen else None)

    def history():
        plain = {"curriculum": "none", "encoder": encoder, "objective": objective, **heads, **how}
        return training.load_run(train(profile, backbone, prepared, **plain)).difficulty

    stages, callbacks = _order(recipe.curriculum, pairs.train, config.epochs, stages, history)
    keys = {"images": pairs.key, "start": start}
    keys["front"] = "" if front is None else data.weights_key(front)
    keys["stages"] = files.digest([[stage.rows.tolist(), stage.epochs] for stage in stages])
    keys["objective"] = "" if objective is None else identity(objective)
    recipe = replace(recipe, **keys)
    key = files.digest([as_dict(recipe), config.fixed()], 8)
    parts = [slug(backbone), "mlc" if recipe.words else "vanilla", recipe.curriculum.name]
    name = "-".join(parts).removesuffix("-none")
    folder = files.root() / "runs" / profile.name / f"{name}-{key}"
    order = objective or _objective(model, recipe), stages, callbacks
    return Trial(model, pairs, *order, config, recipe, folder, prepared)


def planned(folder):
    """Return the trial that another process wrote into its folder, to train it here as well.

    Parameters
    ----------
    folder : path-like

    Returns
    -------
    Trial

    Raises
    ------
    CheckpointError
        The images are not those that it was planned with.
    """
    folder = Path(os.path.abspath(folder))
    recipe, (stored, meta) = Recipe.load(folder), files.load_arrays(folder / PLAN)
    config = from_dict(configs.TrainConfig, training.runs.made_from(folder)["train"])
    prepared = prepare(from_dict(configs.DataConfig, meta["data"]))
    model, weights = recipe.build(load=False), training.runs.below(stored, "model.")
    training.runs.load_arrays_into(model, weights, folder / PLAN)
    pairs = _pairs(prepared, model, recipe, config.device)
    if pairs.key != recipe.images:
        message = f"the images of {files.relative(folder)} are not those it was planned with"
        raise errors.CheckpointError(message, "Plan it again: run the notebook that made it.")
    stages = [training.Stage(stored[f"stage.{n}"], count) for n, count in enumerate(meta["epochs"])]
    callbacks = []
    if meta["callbacks"]:
        _, callbacks = training.regime(recipe.curriculum, pairs.train, config.epochs)
    how = _objective(model, recipe), stages, callbacks, config
    return Trial(model, pairs, *how, recipe, folder, prepared)


def white_box(profile, prepared, context="caption", noised=False, frozen=(), keep=0.0, **options):
    """Plan the training of a U-Net encoder that is to go back into its painter.

    Parameters
    ----------
    profile : rsdlib.config.Profile
    prepared : Prepared
    context : {"caption", "empty"}
        What it reads beside an image.
    noised : bool
        Whether it is trained on latents with the sampler's noise; clean ones are the paper's.
    frozen : sequence of str
        Parts that keep their weights, such as ``"unet.conv_in"``.
    keep : float
        Weight of the distance to the original's maps, see `rsdlib.models.KeepingObjective`.
    **options
        See `plan`; without a ``weight`` there is no vocabulary loss.

    Returns
    -------
    Trial
    """
    options = {"weight": 0.0, **options}
    profile = profile.with_context("unet", context)
    read = dict(profile.backbone("unet").options) | ({"noised": True} if noised else {})
    profile = profile.with_backbone("unet", options=read, frozen=frozen, fine_tune="always")
    if keep:
        original = models.create(profile.backbone("unet"))
        losses = {"weight": options["weight"], "huber": profile.head.huber}
        options["objective"] = models.KeepingObjective(**losses, keep=keep, original=original)
    return plan(profile, "unet", prepared, **options)


def _recipe(profile, backbone, prepared, encoder, heads, curriculum, config):
    """Return what was asked for, in full: the profile's settings wherever nothing else was said.

    With what the encoder can say, if the heads are to hear it.
    """
    if encoder is None:
        described = _settled(profile.backbone(backbone), config.device)
    else:
        name, size = type(encoder).__name__, encoder.image_size
        described = configs.BackboneConfig("own", name, image_size=size)
    heads = replace(profile.head, **{k: value for k, value in heads.items() if value is not None})
    if described.library == "blip":  # it has one arrangement
        heads = configs.HeadConfig(weight=heads.weight)
    elif not heads.weight:  # one vanilla run, whatever arrangement was asked for
        heads = replace(heads, head=configs.HeadConfig().head)
    if not isinstance(curriculum, configs.CurriculumConfig):
        curriculum = replace(profile.curriculum, name=curriculum or profile.curriculum.name)
    words, (names, speech) = prepared.vocabulary.words, ((), None)
    if heads.reads != "features":
        names, speech = models.open_speech(described, words)
        heads = heads if names else replace(heads, reads="features")
    if names and prepared.sizes()["prompts"][0] < heads.named_below:
        words = first_names(names)
    words = words if heads.weight else ()
    made = {"curriculum": curriculum, "names": names}
    return Recipe(described, heads, words, prepared.key, config.seed, **made), speech


def _settled(backbone, device):
    """Return a backbone's settings with the device's answer to whether it is trained."""
    on_gpu = runtime.device(device).type != "cpu"
    trained = backbone.fine_tune == "always" or (backbone.fine_tune == "gpu" and on_gpu)
    return replace(backbone, fine_tune="always" if trained else "never")


def first_names(names):
    """Return the first synonym of each class's name."""
    return tuple(name.partition(",")[0] for name in names)


def _pairs(prepared, model, recipe, device):
    store = prepared.store(_encoder(model), device)
    targets = model.encode(prepared.pairs["prompt"]) if recipe.captions else prepared.targets
    labels = prepared.labels if recipe.words else None
    if recipe.named:
        labels = data.pack(data.Vocabulary(recipe.words).encode(prepared.pairs["prompt"]))
    train, val = (prepared.rows(split, store) for split in ("train", "val"))
    return data.PairStore(store, targets, labels, len(recipe.words), train, val)


def _order(curriculum, rows, epochs, stages, history):
    """Return stages and callbacks; `history` trains what an order by difficulty is made from."""
    if callable(stages):
        return stages(rows, training.hardness_of(rows, history()), epochs), []
    if stages is not None:
        return stages, []
    known = history() if curriculum.name == "ours" else None
    return training.regime(curriculum, rows, epochs, known)


def _objective(model, recipe):
    if recipe.captions:
        return models.CaptionObjective(recipe.head.weight, model.pad)
    return models.JointObjective(recipe.head.weight, recipe.head.huber)


def slug(backbone):
    """Return a backbone's name as part of a file name."""
    return re.sub(r"[^\w.]+", "-", backbone)


def identity(thing):
    """Return a key of a function or of an object that is called: its source and its fields.

    What a function takes from around itself is not seen: make it an argument or a field.
    """
    function = thing if inspect.isfunction(thing) else type(thing).__call__
    message = f"the source of {thing!r} cannot be read, so its run would have no key"
    fix = "Define it in a notebook cell or a module."
    with errors.refusing((OSError, TypeError), errors.ConfigError, message, fix):
        source = inspect.getsource(function)
    fields = getattr(thing, "__dict__", {})
    keys = {n: data.weights_key(f) if hasattr(f, "state_dict") else f for n, f in fields.items()}
    return files.digest([source, keys])


# --- open -----------------------------------------------------------------------------------------


def starting_model(folder, encoder=None):
    """Return the model that a run started from."""
    return Recipe.load(folder).build(encoder)


def load_model(folder, encoder=None):
    """Return the trained model of a run folder, and its recipe.

    Parameters
    ----------
    folder : path-like
    encoder : nn.Module, optional
        What `plan` was given, if it was.

    Returns
    -------
    model : nn.Module
    recipe : Recipe

    Raises
    ------
    CheckpointError
        The weights do not fit, or the frozen front is not the one that the run was trained with.
    """
    recipe = Recipe.load(folder)
    model = recipe.build(encoder, load=False)
    training.load_weights(model, Path(folder) / training.WEIGHTS)
    if recipe.front and data.weights_key(_encoder(model).front) != recipe.front:
        message = f"the frozen part of {recipe.backbone.model} is not {files.relative(folder)}'s"
        raise errors.CheckpointError(message, "Bring its files back, or train again.")
    return model, recipe


# --- predict --------------------------------------------------------------------------------------


def predict(folder, prepared, store, split, device="auto", encoder=None):
    """Return a run's predictions on a split, stored in its folder with a table of the same rows.

    Parameters
    ----------
    folder : path-like
        A run.
    prepared : Prepared
    store : rsdlib.data.Store
        What the model reads, see `Prepared.store`.
    split : {"train", "val", "test"}
    device : str
    encoder : nn.Module, optional
        What `plan` was given, if it was.

    Returns
    -------
    ndarray (n, d), float32, unit rows
    """
    rows = prepared.rows(split, store)
    items = prepared.pairs.iloc[rows][["id", "prompt"]]
    key = files.digest([items.to_numpy().tolist(), store.key])
    path = Path(folder) / f"predictions-{split}-{key[:8]}.npy"

    def answer():
        model, _ = load_model(folder, encoder)
        pred = data.apply(model, store, rows, device=device, description=f"predicting {split}")
        cosine = analysis.cosine(pred, prepared.targets[rows])
        files.write_parquet(path.with_suffix(".parquet"), items.assign(cosine=cosine))
        return pred

    return files.cached_rows(path, answer)


def captions(model, prepared, store, split, beams=3, device="auto"):
    """Return a captioner's captions of a split, stored under the model's weights and the images.

    Parameters
    ----------
    model : rsdlib.models.blip.Captioner
    prepared : Prepared
    store : rsdlib.data.Store
        At the size that this captioner reads.
    split : {"train", "val", "test"}
    beams : int
        1 is greedy.
    device : str

    Returns
    -------
    list of str
        One for each row of the split that has an image.
    """
    rows = prepared.rows(split, store)
    how = [beams, models.LENGTH, models.REPEAT]
    key = files.digest([data.weights_key(model), store.key, rows.tolist(), *how])
    path = files.cache_dir() / "captions" / f"{key}.json"
    if not path.exists():
        files.write_json(path, models.caption_all(model, store, rows, beams, device))
    return files.read_json(path)


MEAN, ZERO_SHOT = "mean embedding", "zero-shot: classes' names"
KNN_BEFORE, KNN_AFTER = "k-NN, features as they came", "k-NN, features as trained (vanilla)"
BASELINES = (MEAN, KNN_BEFORE, KNN_AFTER)
CLIP_KNN = "CLIP + k-NN"
NEIGHBOURS = (1, 4, 16, 64)  # candidates for k; the best on validation is used


def predict_baselines(scores, prepared, store, before, after, device="auto"):
    """Add the predictions that a trained model has to beat; return the chosen k of each k-NN.

    Parameters
    ----------
    scores : rsdlib.analysis.Scores
    prepared : Prepared
    store : rsdlib.data.Store
    before, after : rsdlib.models.PromptRegressor
        With starting and with trained weights: their backbones give the features for the k-NN.
        `after` may be a list, of several trainings.
    device : str

    Returns
    -------
    dict of str to list of int
        One for each training.
    """
    train = prepared.rows("train", store)
    mean = prepared.targets[train].mean(axis=0, keepdims=True)  # (1, d)
    scores.predictions[MEAN] = np.repeat(mean, len(scores.rows), axis=0)
    chosen = {}
    if getattr(before, "speech", None) is not None:
        before.only_speak()
        scores.predictions[ZERO_SHOT] = data.apply(before, store, scores.rows, device=device)
    for name, those in ((KNN_BEFORE, [before]), (KNN_AFTER, analysis.metrics.each_training(after))):
        features = (data.features(store, model.backbone, device=device) for model in those)
        found = [_regress(scores, prepared, store, one.batch, one.batch(train)) for one in features]
        chosen[name], scores.predictions[name] = map(list, zip(*found, strict=True))
    return chosen


def predict_clip_knn(scores, prepared, backbone, images, device="auto"):
    """Add the paper's CLIP + k-NN (supplementary, Table 4): image against prompts' text embeddings.

    Differs from the paper: CLIP is not fine-tuned before.

    Parameters
    ----------
    scores : rsdlib.analysis.Scores
    prepared : Prepared
    backbone : rsdlib.config.BackboneConfig
        Of the library open_clip.
    images : rsdlib.data.Store
        At the size that this CLIP reads.
    device : str

    Returns
    -------
    int
        The chosen k.
    """
    encoder, read = models.clip_pair(backbone, device=device)
    base = read(prepared.pairs["prompt"].iloc[prepared.rows("train", images)].tolist())
    look = functools.partial(data.apply, encoder, images, device=device, description="embedding")
    k, scores.predictions[CLIP_KNN] = _regress(scores, prepared, images, look, base)
    return k


CAPTION, TRANSLATED = analysis.tables.CAPTIONS


def predict_captions(scores, prepared, encoder, store):
    """Add what the captions that a white box reads know by themselves.

    Their own embedding, and a ridge regression from it to the prompts' that has seen no image.

    Parameters
    ----------
    scores : rsdlib.analysis.Scores
    prepared : Prepared
    encoder : rsdlib.models.unet.UNetEncoder
        One that reads captions.
    store : rsdlib.data.Store
        What it reads.
    """

    def embedded(rows):
        captions = encoder.captions(torch.from_numpy(store.batch(rows)))
        return torch.from_numpy(data.embed_cached([caption or "." for caption in captions]))

    train, said = prepared.rows("train", store), embedded(scores.rows)
    weight, bias = models.ridge([embedded(train)], torch.from_numpy(prepared.targets[train]))
    scores.predictions[CAPTION] = said.numpy()
    scores.predictions[TRANSLATED] = (said.double() @ weight.T + bias).float().numpy()


def _regress(scores, prepared, store, look, base):
    """Return the k that is best on validation, and the k-NN's predictions with it.

    ``look(rows)`` returns features to find among the training pairs' `base`.
    """
    train, val = (prepared.rows(split, store) for split in ("train", "val"))
    own, targets = look(val), prepared.targets[train]

    def on_validation(k):
        pred = ensemble.knn_regress(own, base, targets, k)
        return analysis.cosine(pred, prepared.targets[val]).mean()

    k = max((k for k in NEIGHBOURS if k <= len(base)), key=on_validation)
    return k, ensemble.knn_regress(look(scores.rows), base, targets, k)


# --- compare --------------------------------------------------------------------------------------


def compare(runs, prepared, store, split="test", device="auto", encoder=None):
    """Score runs of one backbone beside the answers that they have to beat.

    Parameters
    ----------
    runs : dict of str to Path, or to list of Path
        Method to run folder, or to those of several trainings; the first is the vanilla run, whose
        features the k-NN baselines use and with which the others are compared.
    prepared : Prepared
    store : rsdlib.data.Store
        What the backbone reads, see `Prepared.store`.
    split : {"val", "test"}
    device : str
    encoder : nn.Module, optional
        What `plan` was given, if it was.

    Returns
    -------
    scores : rsdlib.analysis.Scores
    table : list of dict
        One row a method, for `analysis.as_table` and `analysis.plot_scores`.
    """
    folders = {name: analysis.metrics.each_training(run) for name, run in runs.items()}
    first = next(iter(runs))
    scores = prepared.scores(store, split)
    before = starting_model(folders[first][0], encoder)
    after = [load_model(folder, encoder)[0] for folder in folders[first]]
    neighbours = predict_baselines(scores, prepared, store, before, after, device)
    how = {"split": split, "device": device, "encoder": encoder}
    for name, some in folders.items():
        scores.predictions[name] = [predict(folder, prepared, store, **how) for folder in some]
    table = scores.table(BASELINES)
    for row in table:
        name = row["method"]
        if name in neighbours:
            row["k"] = neighbours[name]
        if name in runs and name != first:
            row[f"gain over {first}"] = scores.gain(name, first)
    return scores, table


def draw(name, runs, scores, table, prepared, images, folder, paper=None):
    """Write a comparison's JSON file and draw what it shows.

    Parameters
    ----------
    name : str
        Of the files, such as ``"01_vit"``.
    runs, scores, table
        What `compare` took and returned.
    prepared : Prepared
    images : rsdlib.data.Store
    folder : path-like
        Where the files go.
    paper : dict of str to float, optional
        The paper's score of some methods, to stand beside ours.

    Returns
    -------
    dict of str to Figure
        ``curves``, ``scores``, ``recall`` and ``neighbours``, saved as PNG.
    """
    curves = {}
    for method, run in runs.items():
        opened = [training.load_run(one) for one in analysis.metrics.each_training(run)]
        curves[method] = [one.metrics for one in opened]
    facts = about(prepared, opened[0].config.seed)
    files.write_json(folder / f"{name}.json", {"table": table, **facts})
    ranks = {method: scores.ranks(method) for method in scores.predictions}
    candidates = next(iter(ranks.values())).candidates
    figures = {
        "curves": analysis.plot_curves(curves).figure,
        "scores": analysis.plot_scores(table, reference=paper).figure,
        "recall": analysis.plot_recall({m: r.ranks for m, r in ranks.items()}, candidates).figure,
        "neighbours": _draw_answers(scores, list(runs)[-1], prepared, images),
    }
    for kind, figure in figures.items():
        analysis.save_figure(figure, folder / f"{name}_{kind}.png")
    return figures


def _draw_answers(scores, method, prepared, images, count=8):
    """Draw items from the first training's best to its worst, with true and nearest prompt."""
    pred = analysis.metrics.each_training(scores.predictions[method])[0]
    cosine = analysis.cosine(pred, scores.target)
    order = np.argsort(-cosine, kind="stable")
    picked = order[np.linspace(0, len(order) - 1, count).round().astype(int)]
    prompts, bank = prepared.pairs["prompt"].to_numpy(), prepared.rows("train")
    nearest = ensemble.nearest_prompts(pred[picked], prepared.targets[bank], prompts[bank])
    answers = zip(cosine[picked], prompts[scores.rows[picked]], nearest, strict=True)
    texts = [f"cosine {c:.2f}\nTRUE: {true}\nNEAREST: {near}" for c, true, near in answers]
    return analysis.plot_images(images.batch(scores.rows[picked]), texts, columns=4, wrap=41)


def about(prepared, seed):
    """Return what every stored result says of itself: its data, the seed, the machine."""
    parts = prepared.config.source.split(os.pathsep)
    folders = [files.relative(files.resolve_path(part)) for part in parts]
    # Of folders elsewhere, the name alone.
    source = ", ".join(Path(f).name if os.path.isabs(f) else f for f in folders)
    facts = {"source": source, "prepared": prepared.key}
    facts["sizes"] = prepared.sizes().to_dict("records")
    return {**facts, "seed": seed, "environment": runtime.environment()}


def results_folder(profile):
    """Return where the results on a profile's data lie: its own, else those that ship with it.

    Raises
    ------
    CacheError
        There are none yet.
    """
    own = prepare(profile.data).figures(profile)
    if all(list(own.glob(f"0{number}_*.json")) for number in range(1, 9)):
        return own
    if profile.published:
        return files.root() / profile.published
    message = f"profile {profile.name!r} has no results yet in {files.relative(own)}"
    raise errors.CacheError(message, f"Run: rsd reproduce --profile {profile.name}")
