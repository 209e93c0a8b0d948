"""The shared steps on a small folder of pairs, and the figures that are drawn from them."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import squares
import torch
from PIL import Image

from rsdlib import analysis, config, data, experiment, files, predict, training
from rsdlib.errors import (
    BadImageError,
    BadTableError,
    CacheError,
    CheckpointError,
    ConfigError,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return a folder of coloured squares: the thing is in the prompt alone, the colour in both."""
    return squares.write(tmp_path_factory.mktemp("пример dir ☂"))


def settings(source, **changes):
    return config.profile(
        "smoke", str(source), val_fraction=0.2, test_fraction=0.2, near_duplicate=0.99, **changes
    )


def test_prepared_data_hold_together(source):
    prepared = experiment.prepare(settings(source).data)
    n = len(prepared.pairs)
    assert n == len(squares.THINGS) * len(squares.COLOURS)
    assert prepared.targets.shape == (n, 384)
    np.testing.assert_allclose(np.linalg.norm(prepared.targets, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(prepared.targets, data.embed(prepared.pairs["prompt"]), atol=1e-6)
    rows = np.concatenate([prepared.rows(split) for split in ("train", "val", "test")])
    assert sorted(rows) == list(range(n))
    sizes = prepared.sizes()
    assert sizes["pairs"].sum() == n
    assert not sizes["shared"].any()
    labels = np.unpackbits(
        np.asarray(prepared.labels), axis=1, count=len(prepared.vocabulary.words)
    ).astype(bool)
    np.testing.assert_array_equal(labels, prepared.vocabulary.encode(prepared.pairs["prompt"]))


def test_vocabulary_counts_training_prompts_alone(source):
    """Fault L1 of the original: words of validation and test prompts were counted too."""
    prepared = experiment.prepare(settings(source).data)
    train = prepared.pairs["prompt"].iloc[prepared.rows("train")]
    assert prepared.vocabulary == data.Vocabulary.fit(train, 32)
    assert prepared.vocabulary.encode(train).any(axis=0).all()


def test_reading_order_changes_nothing_and_one_prompt_changes_the_key(source, tmp_path):
    key = experiment.prepare(settings(source).data).key
    table = pd.read_csv(source / "metadata.csv")
    for name in table["file_name"]:
        (tmp_path / name).symlink_to(source / name)
    table.sample(frac=1, random_state=0).to_csv(tmp_path / "metadata.csv", index=False)
    assert experiment.prepare(settings(tmp_path).data).key == key
    table.loc[0, "prompt"] += "!"
    table.to_csv(tmp_path / "metadata.csv", index=False)
    assert experiment.prepare(settings(tmp_path).data).key != key


def test_damaged_answers_are_made_again(source):
    prepared = experiment.prepare(settings(source).data)
    path = files.cache_dir() / "prepared" / prepared.key / "targets.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + b"abc")
    again = experiment.prepare(settings(source).data)
    np.testing.assert_array_equal(again.targets, data.embed(again.pairs["prompt"]))
    assert path.read_bytes() == whole


def copy(source, folder):
    """Copy the pairs; return their table."""
    table = pd.read_csv(source / "metadata.csv")
    for name in table["file_name"]:
        (folder / name).write_bytes((source / name).read_bytes())
    table.to_csv(folder / "metadata.csv", index=False)
    return table


def test_other_pixels_are_another_run(source, tmp_path):
    """Same prompts, another sampler or a repaired image: never the old model's scores."""
    table = copy(source, tmp_path)
    profile = settings(tmp_path)
    first = experiment.train(profile, "vit", experiment.prepare(profile.data), epochs=1)
    Image.new("RGB", (64, 64)).save(tmp_path / table["file_name"].iloc[0])
    second = experiment.train(profile, "vit", experiment.prepare(profile.data), epochs=1)
    assert first != second
    assert (
        experiment.prepare(profile.data).key == experiment.prepare(settings(source).data).key
    )  # the prompts are the same


def test_other_starting_weights_are_another_run(source, tmp_path):
    """A pretrained encoder may be trained again under its path: never its predecessor's scores."""
    import timm

    profile = settings(source)
    prepared = experiment.prepare(profile.data)
    options = profile.backbone("vit").options
    facts = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 0,
        "pretrained_cfg": {"input_size": [3, 64, 64]},
    }
    files.write_json(tmp_path / "config.json", {**facts, "model_args": dict(options)})
    own = dataclasses.replace(
        profile, backbones={"own": config.BackboneConfig("timm", str(tmp_path), image_size=64)}
    )
    folders = []
    for scale in (1.0, 1.0, 0.5):
        torch.manual_seed(0)
        body = timm.create_model("vit_tiny_patch16_224", num_classes=0, **options)
        weights = {
            name: value.numpy() * np.float32(scale) for name, value in body.state_dict().items()
        }
        files.save_arrays(tmp_path / "model.safetensors", weights)
        folders.append(experiment.train(own, "own", prepared, epochs=1))
    assert folders[0] == folders[1] != folders[2]


def test_what_a_rule_reads_is_in_the_key(source, tmp_path):
    table = copy(source, tmp_path)
    before = experiment.prepare(settings(tmp_path).data)
    table.assign(image_nsfw=[2.0] * 8 + [0.0] * (len(table) - 8)).to_csv(
        tmp_path / "metadata.csv", index=False
    )
    after = experiment.prepare(settings(tmp_path).data)
    assert after.key != before.key
    assert len(after.pairs) == len(before.pairs) - 8


def test_columns_of_the_source_named_like_ours_do_no_harm(source, tmp_path):
    table = copy(source, tmp_path)
    table.assign(split="train", key="x", artist="old master").to_csv(
        tmp_path / "metadata.csv", index=False
    )
    prepared = experiment.prepare(settings(tmp_path).data)
    assert set(prepared.pairs["split"]) == {"train", "val", "test"}
    assert set(prepared.pairs["artist"]) == {"old master"}


def test_prompts_made_plain_keep_the_raw_ones_and_the_report_its_examples(source, tmp_path):
    table = copy(source, tmp_path)
    raw = [f"({prompt}:1.2)" for prompt in table["prompt"]]
    twins = table.iloc[:2].assign(prompt=[f"{prompt}, 8k" for prompt in raw[:2]])
    twins["file_name"] = [f"z{name}" for name in twins["file_name"]]
    for name, twin in zip(table["file_name"], twins["file_name"], strict=False):
        (tmp_path / twin).write_bytes((tmp_path / name).read_bytes())
    pd.concat([table.assign(prompt=raw), twins]).to_csv(tmp_path / "metadata.csv", index=False)
    prepared = experiment.prepare(settings(tmp_path, plain=True).data)
    assert sorted(prepared.pairs["prompt"]) == sorted(table["prompt"])
    assert sorted(prepared.pairs["raw_prompt"]) == sorted(raw)
    shown = sorted(tuple(pair) for pair in prepared.report["examples"].iloc[-1])
    assert shown == sorted((f"{prompt}, 8k", prompt) for prompt in table["prompt"][:2])


def test_neighbours_are_chosen_on_validation_not_on_the_test_set(source, monkeypatch):
    profile = settings(source)
    prepared = experiment.prepare(profile.data)
    model = experiment.starting_model(experiment.train(profile, "vit", prepared, epochs=1))
    monkeypatch.setattr(experiment, "NEIGHBOURS", (1, 2, 3, 5, 8))
    store, rows, chosen = prepared.images(64), prepared.rows("test"), []
    for targets in (prepared.targets, np.array(prepared.targets)):
        if chosen:  # other answers on the test set must not matter
            targets[rows] = np.random.default_rng(0).normal(size=(len(rows), 384))
        other = dataclasses.replace(prepared, targets=targets)
        scores = other.scores(store)
        k = experiment.predict_baselines(scores, other, store, model, model)
        chosen.append(k)
    assert chosen[0] == chosen[1]


def test_images_of_one_prompt_count_as_one_in_every_interval(source):
    prepared = experiment.prepare(settings(source).data)
    rows = prepared.rows("test")
    pred = np.random.default_rng(0).normal(size=(len(rows), 384))
    groups = np.arange(len(rows))
    one = [prepared.targets[rows], groups, {"noise": pred}]
    three = [*(np.repeat(x, 3, axis=0) for x in one[:2]), {"noise": np.repeat(pred, 3, axis=0)}]
    alone, thrice = (analysis.Scores(None, *some).score("noise") for some in (one, three))
    for name in ("mean", "low", "high"):
        assert thrice["cosine"][name] == pytest.approx(alone["cosine"][name])
    assert thrice["median_rank"] == alone["median_rank"]


def test_too_few_pairs_are_refused(source):
    with pytest.raises(BadTableError, match="too few to judge by"):
        experiment.prepare(settings(source, limit=2).data)
    with pytest.raises(BadTableError, match="no pair"):
        experiment.prepare(settings(source, min_characters=500).data)


def test_bad_images_stop_or_are_left_out_of_every_figure(source, tmp_path):
    copy(source, tmp_path)
    profile = settings(tmp_path)
    prepared = experiment.prepare(profile.data)
    broken = prepared.rows("test")[0]
    (tmp_path / prepared.pairs["id"].iloc[broken]).write_bytes(b"<html>404</html>")
    with pytest.raises(BadImageError, match="none of PNG"):
        prepared.images(64)
    prepared = experiment.prepare(settings(tmp_path, on_bad="skip").data)
    store = prepared.images(64)
    assert store.key != experiment.prepare(settings(source).data).images(64).key
    assert prepared.bad["id"].tolist() == [prepared.pairs["id"].iloc[broken]]
    scores = prepared.scores(store)
    assert broken not in scores.rows
    assert len(scores.rows) == len(prepared.rows("test")) - 1


def test_a_run_is_trained_scored_and_read_back(source):
    profile = settings(source)
    prepared = experiment.prepare(profile.data)
    store = prepared.images(64)
    folder = experiment.train(profile, "vit", prepared, epochs=1)
    assert (
        experiment.train(profile, "vit", prepared, epochs=1, micro_batches=2) == folder
    )  # not another run
    assert experiment.train(profile, "vit", prepared, epochs=1, seed=1) != folder

    scores = prepared.scores(store)
    after, recipe = experiment.load_model(folder)
    before = experiment.starting_model(folder)
    experiment.predict_baselines(scores, prepared, store, before, after)
    scores.predictions["vit"] = experiment.predict(folder, prepared, store, "test")
    assert recipe.words == prepared.vocabulary.words
    np.testing.assert_array_equal(
        experiment.predict(folder, prepared, store, "test"), scores.predictions["vit"]
    )
    table = scores.table(experiment.BASELINES)
    assert [row["method"] for row in table] == [*experiment.BASELINES, "vit"]
    gain = table[-1][f"gain over {experiment.MEAN}"]["difference"]["mean"]
    assert gain == pytest.approx(
        scores.estimate("vit")["mean"] - scores.estimate(experiment.MEAN)["mean"]
    )
    assert table[-1]["cosine"]["n"] == len(scores.rows)
    assert analysis.as_table(table).shape[1] == 4

    ax = analysis.plot_scores(table, reference={"vit": 0.5})
    assert [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "D"] == [0.5]
    drawn = sorted(line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o")
    assert drawn == pytest.approx(sorted(row["cosine"]["mean"] for row in table))


def test_predictor_without_its_data_still_reads_images(source, tmp_path, capsys):
    profile = settings(source)
    folder = experiment.train(profile, "vit", experiment.prepare(profile.data), epochs=1)
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    model = predict.Predictor.load(moved)
    with_data = model.predict([source / "tree-red.png"])
    for same in (
        str(source / "tree-red.png"),
        Image.open(source / "tree-red.png"),
        [source / "tree-red.png"],
    ):
        np.testing.assert_array_equal(model.predict(same).embeddings, with_data.embeddings)
    assert model.predict([]).embeddings.shape == (0, 384)
    assert model.predict(source / "tree-red.png", n_prompts=0).prompts == [[]]
    assert len(with_data.prompts[0]) == 5
    (files.cache_dir() / "prepared").rename(tmp_path / "gone")
    without = predict.Predictor.load(moved).predict([source / "tree-red.png"])
    assert "rsd run 00_prepare_data" in capsys.readouterr().out
    assert without.prompts == [[]]
    np.testing.assert_array_equal(without.embeddings, with_data.embeddings)
    (moved / "difficulty.parquet").unlink()
    with pytest.raises(CacheError, match="no finished run"):
        predict.Predictor.load(moved)


# --- a newcomer's paths ---------------------------------------------------------------------------


def squared(model, batch):
    """Return the squared distance and the similarities: a loss of one's own."""
    embedding, _ = model(batch["input"])
    loss = (embedding - batch["target"]).square().sum(dim=1).mean()
    return loss, torch.nn.functional.cosine_similarity(embedding, batch["target"])


@dataclasses.dataclass(frozen=True)
class Scaled:
    """The same with a factor: an objective with a field."""

    factor: float = 1.0

    def __call__(self, model, batch):
        loss, similarity = squared(model, batch)
        return self.factor * loss, similarity


class Mean(torch.nn.Module):
    """An encoder of one's own: the mean colour."""

    features, image_size = 3, 16

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, images):
        return images.float().mean(dim=(2, 3)) / 255 * self.scale


def test_an_objective_of_ones_own_is_what_is_minimised_and_part_of_the_key(source):
    profile = settings(source)
    prepared = experiment.prepare(profile.data)
    how = {"weight": 0.0, "epochs": 1}
    trial = experiment.plan(profile, "vit", prepared, objective=squared, **how)
    loss, _ = trial.objective(trial.model, trial.pairs.batch(trial.pairs.train[:8]))
    assert float(loss.detach()) == pytest.approx(
        float(squared(trial.model, trial.pairs.batch(trial.pairs.train[:8]))[0].detach())
    )
    objectives = (None, squared, Scaled(1.0), Scaled(2.0))
    plans = [experiment.plan(profile, "vit", prepared, objective=o, **how) for o in objectives]
    assert len({plan.folder for plan in plans}) == 4
    assert experiment.plan(profile, "vit", prepared, objective=Scaled(2.0), **how).folder == (
        plans[-1].folder
    )
    with pytest.raises(ConfigError, match="source of"):
        experiment.plan(profile, "vit", prepared, objective=len, **how)


def test_stages_of_ones_own_are_what_is_read(source):
    profile = settings(source)
    prepared = experiment.prepare(profile.data)

    def hard_first(rows, hardness, epochs):
        order = rows[np.argsort(-hardness)]
        return [training.Stage(order[: len(order) // 2], 1), training.Stage(order, epochs)]

    run = experiment.train(profile, "vit", prepared, weight=0.0, epochs=1, stages=hard_first)
    vanilla = experiment.train(profile, "vit", prepared, weight=0.0, epochs=1)
    record = training.load_run(vanilla).difficulty
    rows = record["row"].to_numpy()
    hardness = training.hardness_of(rows, record)
    table = training.load_run(run).difficulty.set_index("row")
    first = set(table.index[table["epoch_1"].notna()])
    assert first == set(rows[np.argsort(-hardness)][: len(rows) // 2])
    assert table["epoch_2"].notna().all()
    half = [training.Stage(rows[: len(rows) // 2], 1)]
    listed = experiment.train(profile, "vit", prepared, weight=0.0, epochs=1, stages=half)
    assert len({run, vanilla, listed}) == 3


def test_an_encoder_of_ones_own_is_trained_scored_and_asked_for_again(source):
    profile = settings(source)
    prepared = experiment.prepare(profile.data)
    mine = Mean()
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    how = {"weight": 0.0, "epochs": 1, "lr": 0.1, "encoder": mine}
    run = experiment.train(profile, "mine", prepared, **how)
    assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())
    assert experiment.train(profile, "mine", prepared, **how) == run
    store = prepared.images(16)
    _, table = experiment.compare({"mine": run}, prepared, store, device="cpu", encoder=mine)
    assert table[-1]["method"] == "mine"
    with pytest.raises(CheckpointError, match="Hand it in again"):
        experiment.load_model(run)


def test_every_training_in_one_line_is_the_trial_that_was_laid_open(source):
    profile = settings(source)
    prepared = experiment.prepare(profile.data)
    trial = experiment.plan(profile, "vit", prepared, weight=0.0, epochs=1)
    assert not trial.folder.exists()
    runs = experiment.three_ways(profile, "vit", prepared, epochs=1)
    assert list(runs) == ["vit", "vit + MLC", "vit + MLC + CL"]
    assert runs["vit"] == [trial.folder]


def test_trainings_of_several_seeds_are_those_of_each(source):
    profile = settings(source)
    prepared = experiment.prepare(profile.data)
    how = {"epochs": 1, "weight": 0.0}
    runs = experiment.three_ways(profile, "vit", prepared, seed=3, seeds=2, **how)
    assert list(runs) == ["vit", "vit + CL"]
    for number, (vanilla, full) in enumerate(zip(*runs.values(), strict=True), 3):
        assert training.load_run(full).config.seed == number
        assert experiment.train(profile, "vit", prepared, seed=number, **how) == vanilla


def test_a_run_of_an_older_layout_is_refused_by_name_and_never_the_best(source, capsys):
    profile = settings(source)
    prepared = experiment.prepare(profile.data)
    run = experiment.train(profile, "vit", prepared, epochs=1)
    stored = files.read_json(run / "config.json")
    del stored["layout"]
    files.write_json(run / "config.json", stored)
    with pytest.raises(CheckpointError, match=f"{run.name} has layout 1"):
        experiment.load_model(run)
    with pytest.raises(CacheError, match="nothing is trained yet"):
        predict.best_run("smoke")
    assert f"{run.name} has layout 1" in capsys.readouterr().out


def test_results_are_those_on_the_profiles_own_data_or_those_that_ship(source):
    profile = settings(source)
    with pytest.raises(CacheError, match="rsd reproduce --profile smoke"):
        experiment.results_folder(profile)
    shipped = config.replace(profile, published="figures")
    assert experiment.results_folder(shipped) == files.root() / "figures"
    own = experiment.prepare(profile.data).figures(profile)
    for folder in (own.with_name("figures-of-other-data"), own):
        for number in range(1, 9):
            assert experiment.results_folder(shipped) == files.root() / "figures"
            files.write_json(folder / f"0{number}_x.json", {})
    assert experiment.results_folder(shipped) == experiment.results_folder(profile) == own
