"""Every backbone and every curriculum through the same steps: train, find again, score, predict."""

import json

import numpy as np
import pytest
import tiny
import torch
from test_recipes import settings, source  # noqa: F401  the fixture

from rsdlib import config, curriculum, data, predict, recipes, runtime, training


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        "diffusers": tiny.stable_diffusion(tmp_path_factory.mktemp("sd")),
        "open_clip": tiny.clip(tmp_path_factory.mktemp("clip")),
    }


def world(source, folders):  # noqa: F811
    """Return settings with every kind of backbone, tiny."""
    backbones = {
        "vit": config.profile("smoke").backbone("vit"),
        "clip": config.BackboneConfig("open_clip", str(folders["open_clip"])),
        "clip-mlp": config.BackboneConfig("open_clip", str(folders["open_clip"]), options={"mlp": [16, 24]}),
        "unet": config.BackboneConfig("diffusers", str(folders["diffusers"])),
    }
    return config.replace(settings(source), backbones=backbones)


@pytest.mark.parametrize("name", ["clip", "clip-mlp", "unet"])
def test_backbone_is_trained_found_again_scored_and_used(source, folders, name):  # noqa: F811
    chosen = world(source, folders)
    prepared = recipes.prepare(chosen.data)
    folder = recipes.train(chosen, name, prepared, weight=0.1, curriculum="ours", epochs=3, lr=1e-2)
    assert folder.name.startswith(f"{name}-mlc-ours-")
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("*.*") if path.name != ".lock"}
    assert recipes.train(chosen, name, prepared, weight=0.1, curriculum="ours", epochs=3, lr=1e-2) == folder
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.glob("*.*") if path.name != ".lock"}

    start, (model, recipe) = recipes.starting_model(folder), recipes.load_model(folder)
    assert training.weights_key(start) == recipe.start != training.weights_key(model)
    store = prepared.inputs(model.backbone)
    pred = recipes.predict_run(folder, prepared, store, "test", device="cpu")
    rows = prepared.rows("test")
    found = predict.Predictor.load(folder, device="cpu").predict(prepared.pairs["image"].iloc[rows].tolist())
    np.testing.assert_allclose(found.embeddings, pred, atol=2e-2 if model.backbone.front else 1e-5)  # stored in half precision
    assert len(found.words[0]) == 8


def test_frozen_parts_stay_as_they_were(source, folders):  # noqa: F811
    chosen = world(source, folders)
    prepared = recipes.prepare(chosen.data)
    before = recipes.starting_model(folder := recipes.train(chosen, "unet", prepared, weight=0.0, epochs=1, lr=1e-2))
    after, _ = recipes.load_model(folder)
    assert after.backbone.front.key == before.backbone.front.key
    torch.testing.assert_close(after.backbone.context, before.backbone.context)
    changed = {n for n, p in after.backbone.unet.state_dict().items() if not torch.equal(p, before.backbone.unet.state_dict()[n])}
    assert {name.split(".")[0] for name in changed} == {"conv_in", "time_embedding", "down_blocks", "mid_block"}


@pytest.mark.parametrize("name", ["none", "ours", "cbs", "lerac"])
def test_each_curriculum_is_a_run_of_its_own(source, folders, name):  # noqa: F811
    chosen = world(source, folders)
    prepared = recipes.prepare(chosen.data)
    folder = recipes.train(chosen, "vit", prepared, weight=0.0, curriculum=name, epochs=3)
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


def test_papers_curriculum_begins_with_what_was_easy_before(source, folders):  # noqa: F811
    chosen = world(source, folders)
    prepared = recipes.prepare(chosen.data)
    ours = recipes.train(chosen, "vit", prepared, weight=0.0, curriculum="ours", epochs=3)
    vanilla = recipes.train(chosen, "vit", prepared, weight=0.0, epochs=3)
    rows, hardness = curriculum.run_difficulty(training.load_run(vanilla).difficulty)
    table = training.load_run(ours).difficulty.set_index("row")
    first = table.index[table["epoch_1"].notna()]
    easy = dict(zip(rows.tolist(), hardness.tolist(), strict=True))
    assert max(easy[row] for row in first) <= min(easy[row] for row in set(rows.tolist()) - set(first))


def test_same_validation_rows_with_and_without_curriculum(source, folders, monkeypatch):  # noqa: F811
    """D2 of the original: another split for the curriculum compared different sets."""
    seen = []
    fit = training.fit
    monkeypatch.setattr(
        training, "fit", lambda model, pairs, *a, **k: (seen.append(pairs.val.tolist()), fit(model, pairs, *a, **k))[1]
    )
    chosen = world(source, folders)
    prepared = recipes.prepare(chosen.data)
    for name in ("none", "ours", "cbs", "lerac"):
        recipes.train(chosen, "vit", prepared, weight=0.0, curriculum=name, epochs=1)
    assert len(seen) >= 4
    assert all(rows == seen[0] for rows in seen)


def test_another_difficulty_is_another_run(source, folders, monkeypatch):  # noqa: F811
    chosen = world(source, folders)
    prepared = recipes.prepare(chosen.data)
    first = recipes.train(chosen, "vit", prepared, weight=0.0, curriculum="ours", epochs=3)
    load = training.load_run

    def other(folder):
        run = load(folder)
        run.difficulty["epoch_1"] = run.difficulty["epoch_1"].to_numpy()[::-1]
        return run

    monkeypatch.setattr(training, "load_run", other)
    assert recipes.train(chosen, "vit", prepared, weight=0.0, curriculum="ours", epochs=3) != first


def test_features_are_computed_once_for_all_runs_of_a_front(source, folders, monkeypatch):  # noqa: F811
    calls, original = [], data._features
    monkeypatch.setattr(data, "_features", lambda *a: (calls.append(len(a[2])), original(*a))[1])
    chosen = world(source, folders)
    prepared = recipes.prepare(chosen.data)
    recipes.train(chosen, "unet", prepared, weight=0.0, epochs=1)
    recipes.train(chosen, "unet", recipes.prepare(chosen.data), weight=0.1, curriculum="ours", epochs=1)
    assert sum(calls) == len(prepared.pairs)
    assert len(list((runtime.cache_dir() / "features").glob("*"))) == len(calls)
