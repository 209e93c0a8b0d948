"""Every backbone and every curriculum through the same steps: train, find again, score, predict."""

import json

import numpy as np
import pytest
import tiny
import torch
from test_experiment import settings, source

from rsdlib import config, data, experiment, files, models, predict, training
from rsdlib.data import forward
from rsdlib.errors import CheckpointError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        "diffusers": tiny.stable_diffusion(tmp_path_factory.mktemp("sd")),
        "open_clip": tiny.clip(tmp_path_factory.mktemp("clip")),
        "blip": tiny.blip(tmp_path_factory.mktemp("blip")),
    }


def world(source, folders):
    """Return settings with every kind of backbone, tiny."""
    backbones = {
        "vit": config.profile("smoke").backbone("vit"),
        "clip": config.BackboneConfig("open_clip", str(folders["open_clip"])),
        "clip-mlp": config.BackboneConfig(
            "open_clip", str(folders["open_clip"]), options={"mlp": (16, 24)}
        ),
        "unet": config.BackboneConfig("diffusers", str(folders["diffusers"])),
        "blip": config.BackboneConfig("blip", str(folders["blip"])),
    }
    return config.replace(settings(source), backbones=backbones)


@pytest.mark.parametrize("name", ["clip", "clip-mlp", "unet"])
def test_backbone_is_trained_found_again_scored_and_used(source, folders, name):
    chosen = world(source, folders)
    prepared = experiment.prepare(chosen.data)
    folder = experiment.train(
        chosen, name, prepared, weight=0.1, curriculum="ours", epochs=3, lr=1e-2
    )
    assert folder.name.startswith(f"{name}-mlc-ours-")
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("*.*") if path.name != ".lock"}
    assert (
        experiment.train(chosen, name, prepared, weight=0.1, curriculum="ours", epochs=3, lr=1e-2)
        == folder
    )
    assert stamps == {
        path: path.stat().st_mtime_ns for path in folder.glob("*.*") if path.name != ".lock"
    }

    start, (model, recipe) = experiment.starting_model(folder), experiment.load_model(folder)
    assert data.weights_key(start) == recipe.start != data.weights_key(model)
    store = prepared.store(model.backbone)
    pred = experiment.predict(folder, prepared, store, "test", device="cpu")
    rows = prepared.rows("test")
    found = predict.Predictor.load(folder, device="cpu").predict(
        prepared.pairs["image"].iloc[rows].tolist()
    )
    np.testing.assert_allclose(
        found.embeddings, pred, atol=2e-2 if model.backbone.front else 1e-5
    )  # stored in half precision
    assert len(found.words[0]) == 8


def test_frozen_parts_stay_as_they_were(source, folders):
    chosen = world(source, folders)
    prepared = experiment.prepare(chosen.data)
    before = experiment.starting_model(
        folder := experiment.train(chosen, "unet", prepared, weight=0.0, epochs=1, lr=1e-2)
    )
    after, _ = experiment.load_model(folder)
    assert data.weights_key(after.backbone.front) == data.weights_key(before.backbone.front)
    torch.testing.assert_close(after.backbone.context, before.backbone.context)
    changed = {
        n
        for n, p in after.backbone.unet.state_dict().items()
        if not torch.equal(p, before.backbone.unet.state_dict()[n])
    }
    assert {name.split(".")[0] for name in changed} == {
        "conv_in",
        "time_embedding",
        "down_blocks",
        "mid_block",
    }


@pytest.mark.parametrize("name", ["vit", "clip", "unet"])
def test_checkpointed_layers_train_the_same(source, folders, name):
    chosen = world(source, folders)
    prepared = experiment.prepare(chosen.data)
    sparing = chosen.with_backbone(name, gradient_checkpointing=True)
    one, other = (
        training.load_run(experiment.train(way, name, prepared, weight=0.0, epochs=1)).metrics
        for way in (chosen, sparing)
    )
    np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-6)


@pytest.mark.parametrize("name", ["none", "ours", "cbs", "lerac"])
def test_each_curriculum_is_a_run_of_its_own(source, folders, name):
    chosen = world(source, folders)
    prepared = experiment.prepare(chosen.data)
    folder = experiment.train(chosen, "vit", prepared, weight=0.0, curriculum=name, epochs=3)
    run = training.load_run(folder)
    assert run.recipe["curriculum"]["name"] == name
    assert ("-" + name in folder.name) == (name != "none")
    visits = run.difficulty.filter(like="epoch_").notna().sum()
    n = len(prepared.rows("train"))
    assert visits.tolist() == ([-(-n * k // 3) for k in (1, 2, 3)] if name == "ours" else [n] * 3)
    vanilla = [
        path
        for path in folder.parent.glob("vit-vanilla-*")
        if "none" in json.loads((path / "config.json").read_text())["recipe"]["curriculum"]["name"]
    ]
    assert len(vanilla) == (name in ("none", "ours"))


def test_papers_curriculum_begins_with_what_was_easy_before(source, folders):
    chosen = world(source, folders)
    prepared = experiment.prepare(chosen.data)
    ours = experiment.train(chosen, "vit", prepared, weight=0.0, curriculum="ours", epochs=3)
    vanilla = experiment.train(chosen, "vit", prepared, weight=0.0, epochs=3)
    record = training.load_run(vanilla).difficulty
    rows = record["row"].to_numpy()
    hardness = training.hardness_of(rows, record)
    table = training.load_run(ours).difficulty.set_index("row")
    first = table.index[table["epoch_1"].notna()]
    easy = dict(zip(rows.tolist(), hardness.tolist(), strict=True))
    assert max(easy[row] for row in first) <= min(
        easy[row] for row in set(rows.tolist()) - set(first)
    )


def test_same_validation_rows_with_and_without_curriculum(source, folders, monkeypatch):
    """D2 of the original: another split for the curriculum compared different sets."""
    seen = []
    fit = training.fit
    monkeypatch.setattr(
        training,
        "fit",
        lambda model, pairs, *a, **k: (seen.append(pairs.val.tolist()), fit(model, pairs, *a, **k))[
            1
        ],
    )
    chosen = world(source, folders)
    prepared = experiment.prepare(chosen.data)
    for name in ("none", "ours", "cbs", "lerac"):
        experiment.train(chosen, "vit", prepared, weight=0.0, curriculum=name, epochs=1)
    assert len(seen) >= 4
    assert all(rows == seen[0] for rows in seen)


def test_another_difficulty_is_another_run(source, folders, monkeypatch):
    chosen = world(source, folders)
    prepared = experiment.prepare(chosen.data)
    first = experiment.train(chosen, "vit", prepared, weight=0.0, curriculum="ours", epochs=3)
    load = training.load_run

    def other(folder):
        run = load(folder)
        run.difficulty["epoch_1"] = run.difficulty["epoch_1"].to_numpy()[::-1]
        return run

    monkeypatch.setattr(training, "load_run", other)
    assert (
        experiment.train(chosen, "vit", prepared, weight=0.0, curriculum="ours", epochs=3) != first
    )


def test_features_are_computed_once_for_all_runs_of_a_front(source, folders, monkeypatch):
    calls, original = [], forward.Forward.__call__

    def counted(self, inputs):
        if isinstance(self.model, models.unet.Latents):  # the front
            calls.append(len(inputs))
        return original(self, inputs)

    monkeypatch.setattr(forward.Forward, "__call__", counted)
    chosen = world(source, folders)
    prepared = experiment.prepare(chosen.data)
    experiment.train(chosen, "unet", prepared, weight=0.0, epochs=1)
    experiment.train(
        chosen, "unet", experiment.prepare(chosen.data), weight=0.1, curriculum="ours", epochs=1
    )
    assert sum(calls) == len(prepared.pairs)


def test_another_front_than_the_runs_own_is_refused(source, folders, tmp_path):
    """Fault 1: a reloaded perceptron answered through a random CLIP."""
    chosen = world(source, folders)
    prepared = experiment.prepare(chosen.data)
    folder = experiment.train(chosen, "clip-mlp", prepared, weight=0.0, epochs=1)
    model, recipe = experiment.load_model(folder)
    start = experiment.starting_model(folder)
    assert data.weights_key(model.backbone.front) == recipe.front
    assert data.weights_key(start.backbone.front) == recipe.front
    other = tiny.clip(tmp_path, seed=1)
    stored = files.read_json(folder / "config.json")
    stored["recipe"]["backbone"]["model"] = str(other)
    files.write_json(folder / "config.json", stored)
    with pytest.raises(CheckpointError, match="frozen part of"):
        experiment.load_model(folder)


# captioner


def test_captioner_is_trained_found_again_and_used(source, folders, tmp_path, monkeypatch):
    from rsdlib.errors import CacheError

    chosen = world(source, folders)
    prepared = experiment.prepare(chosen.data)
    folder = experiment.train(
        chosen, "blip", prepared, weight=0.1, curriculum="ours", epochs=3, lr=1e-2
    )
    assert folder.name.startswith("blip-mlc-ours-")
    assert (
        experiment.train(chosen, "blip", prepared, weight=0.1, curriculum="ours", epochs=3, lr=1e-2)
        == folder
    )
    assert experiment.train(chosen, "blip", prepared, weight=0.0, epochs=3, lr=1e-2) != folder
    start, (model, recipe) = experiment.starting_model(folder), experiment.load_model(folder)
    assert data.weights_key(start) == recipe.start != data.weights_key(model)
    store, rows = prepared.images(model.image_size), prepared.rows("test")
    said = experiment.captions(model, prepared, store, "test", device="cpu")
    assert said == models.caption_all(model, store, rows, device="cpu")
    monkeypatch.setattr(models, "caption_all", None)
    assert experiment.captions(model, prepared, store, "test", device="cpu") == said  # stored

    reader = experiment.train(chosen, "vit", prepared, weight=0.0, epochs=1)
    images = prepared.pairs["image"].iloc[rows].tolist()
    found = predict.Predictor.load(reader, "cpu", folder).predict(images)
    assert found.captions == said
    table = found.table(images)
    assert table["caption"].tolist() == said
    assert table["nearest_prompt"].tolist() == [nearest[0][0] for nearest in found.prompts]
    for wrong in ({"folder": folder}, {"folder": reader, "captioner": reader}):
        with pytest.raises(CacheError, match="holds no finished"):
            predict.Predictor.load(**wrong)
    assert predict.best_run(chosen.name, captions=True).name.startswith("blip-")
    assert not predict.best_run(chosen.name).name.startswith("blip-")


# scores side by side


def test_runs_are_compared_with_the_first_and_with_what_needs_no_training(source, folders):
    chosen = world(source, folders)
    prepared = experiment.prepare(chosen.data)
    runs = {"a": experiment.train(chosen, "clip", prepared, weight=0.0, epochs=1)}
    runs["b"] = experiment.train(chosen, "clip", prepared, weight=0.1, epochs=1)
    images = prepared.images(32)
    _, table = experiment.compare(runs, prepared, images, device="cpu")
    rows = {row["method"]: row for row in table}
    assert list(rows) == [*experiment.BASELINES, "a", "b"]
    assert "gain over a" in rows["b"]
    assert "gain over a" not in rows["a"]
    gain = rows["b"]["gain over a"]["difference"]["mean"]
    assert gain == pytest.approx(rows["b"]["cosine"]["mean"] - rows["a"]["cosine"]["mean"])


def test_runs_of_several_trainings_are_compared_seed_by_seed(source, folders, tmp_path):
    chosen = world(source, folders)
    prepared = experiment.prepare(chosen.data)
    runs = experiment.three_ways(chosen, "clip", prepared, seeds=2, epochs=1)
    images = prepared.images(32)
    scores, table = experiment.compare(runs, prepared, images, device="cpu")
    rows = {row["method"]: row for row in table}
    several = [experiment.KNN_AFTER, *runs]
    assert [name for name in rows if rows[name]["trainings"] == 2] == several
    assert len(rows[experiment.KNN_AFTER]["k"]) == 2
    for k, run in enumerate(runs["clip"]):
        alone, _ = experiment.compare({"clip": run}, prepared, images, device="cpu")
        for name in (experiment.KNN_AFTER, "clip"):
            (pred,) = alone.predictions[name]
            np.testing.assert_array_equal(scores.predictions[name][k], pred)
    full = rows["clip + MLC + CL"]
    assert full["gain over clip"] == scores.gain("clip + MLC + CL", "clip")
    assert full["gain over clip"]["difference"]["trainings"] == 2
    drawn = experiment.draw("x", runs, scores, table, prepared, images, tmp_path)
    assert len(drawn["curves"].axes[0].lines) == 3 * 2 * 3  # lines of 2 trainings of 3 methods
    stored = files.read_json(tmp_path / "x.json")
    assert stored["table"] == json.loads(json.dumps(table))


def test_clips_neighbours_among_the_prompts(source, folders, monkeypatch):
    monkeypatch.setattr(experiment, "NEIGHBOURS", (1,))
    chosen = world(source, folders)
    prepared = experiment.prepare(chosen.data)
    images = prepared.images(32)
    scores = prepared.scores(images)
    assert (
        experiment.predict_clip_knn(scores, prepared, chosen.backbone("clip"), images, "cpu") == 1
    )
    train = set(prepared.pairs["prompt"].iloc[prepared.rows("train")])
    for answer in scores.predictions[
        experiment.CLIP_KNN
    ]:  # with one neighbour each answer is a training prompt's embedding
        row = np.argmax(prepared.targets @ answer)
        assert prepared.targets[row] @ answer == pytest.approx(1, abs=1e-5)
        assert prepared.pairs["prompt"].iloc[row] in train
