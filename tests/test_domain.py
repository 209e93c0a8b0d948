"""Pictures of another kind, which run answers, pairs and prompts from several places."""

import dataclasses
import gzip
import io
import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import squares
from PIL import Image, ImageFilter

from rsdlib import cli, config, data, experiment, files, predict
from rsdlib.data import load_pairs, load_prompts, prompt_key, split
from rsdlib.errors import BadTableError, BadValueError, CacheError
from rsdlib.models import Domain, texture

# --- distances ------------------------------------------------------------------------------------


def cloud(n, p=20, shift=0.0, seed=0):
    """Return rows of a correlated Gaussian."""
    rng = np.random.default_rng([seed, p])
    mixing = np.random.default_rng(p).normal(size=(p, p))
    return rng.normal(size=(n, p)) @ mixing + shift


def views(n, seed, **how):
    return {"features": cloud(n, seed=seed, **how), "texture": cloud(n, 8, seed=seed + 100, **how)}


@pytest.fixture(scope="module")
def domain():
    return Domain.fit(views(800, 1), views(500, 2))


def test_hardly_any_validation_picture_is_outside_and_the_limit_is_met(domain):
    distances = domain.distance(views(500, 2))
    assert 0 < (distances > 1).mean() <= 0.02
    assert np.isclose(distances, 1, rtol=2e-3).any()
    assert (domain.distance(views(2000, 3)) > 1).mean() < 0.05  # nor of the unseen of the kind


def test_another_distribution_is_outside(domain):
    assert (domain.distance(views(200, 4, shift=30.0)) > 1).all()
    rng = np.random.default_rng(0)
    white = {"features": 9 * rng.normal(size=(200, 20)), "texture": 9 * rng.normal(size=(200, 8))}
    assert (domain.distance(white) > 1).all()


@pytest.mark.parametrize("view", ["features", "texture"])
def test_one_strange_view_is_enough(domain, view):
    """And the others change nothing: the distance is the largest."""
    known, strange = views(50, 5), views(50, 6, shift=30.0)
    assert (domain.distance({**known, view: strange[view]}) > 1).all()
    alone = Domain({k: v for k, v in domain.arrays.items() if k == "edge" or k.startswith(view)})
    apart = alone.distance(strange)
    assert (domain.distance({**known, view: strange[view]}) >= apart).all()
    np.testing.assert_allclose(domain.distance({**known, view: strange[view]}), apart)


def test_distances_grow_with_the_way_and_ignore_the_units():
    known, held = views(800, 1), views(500, 2)
    domain = Domain.fit(known, held)
    way = [domain.distance(views(100, 7, shift=shift)).mean() for shift in (0, 5, 10, 20)]
    assert way == sorted(way)
    larger = Domain.fit(
        {**known, "texture": 1000 * known["texture"]}, {**held, "texture": 1000 * held["texture"]}
    )
    seen = views(100, 7, shift=5.0)
    again = larger.distance({**seen, "texture": 1000 * seen["texture"]})
    np.testing.assert_allclose(again, domain.distance(seen), rtol=1e-4)


def test_a_stored_domain_gives_the_same_distances(domain, tmp_path):
    path = tmp_path / "domain.safetensors"
    files.save_arrays(path, domain.arrays)
    again, seen = Domain(files.load_arrays(path)[0]), views(50, 5)
    np.testing.assert_array_equal(again.distance(seen), domain.distance(seen))
    assert again.views == domain.views == ["features", "texture"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(domain, value):
    seen = views(5, 5)
    seen["texture"][3, 2] = value
    with pytest.raises(BadValueError, match="texture"):
        domain.distance(seen)
    with pytest.raises(BadValueError, match="texture"):
        Domain.fit(seen, views(5, 6))
    with pytest.raises(BadValueError, match="texture"):
        Domain.fit(views(5, 6), seen)


@pytest.mark.parametrize("shape", [(8,), (5, 8, 1), ()])
def test_values_that_are_no_rows_are_refused(domain, shape):
    with pytest.raises(BadValueError, match="texture"):
        domain.distance({**views(5, 5), "texture": np.zeros(shape)})


def test_rows_of_another_width_are_refused(domain):
    with pytest.raises(BadValueError, match="texture"):
        domain.distance({**views(5, 5), "texture": np.zeros((5, 7))})


def test_few_pictures_with_many_features_still_have_a_distance():
    """Fewer pictures than features: a plain covariance has no inverse."""
    known, held = {"features": cloud(30, 200, seed=1)}, {"features": cloud(10, 200, seed=2)}
    domain = Domain.fit(known, held)
    np.testing.assert_array_less(domain.distance(held), 1.001)
    assert (domain.distance({"features": cloud(10, 200, seed=3, shift=300.0)}) > 1).all()


@pytest.mark.parametrize("n", [10, 30, 49])
def test_the_farthest_of_few_validation_pictures_is_not_outside(n):
    """Two of a hundred may be outside: of fewer than fifty none."""
    outside = []
    for seed in range(20):
        held = views(n, 50 + seed)
        outside.append((Domain.fit(views(100, 1), held).distance(held) > 1).sum())
    assert not any(outside)


@pytest.mark.parametrize(("values", "n"), [((100,), 40), ((60, 180), 16)])
def test_flat_pictures_of_few_colours_are_a_kind_too(values, n):
    """Their textures have no variance, or one direction of it."""
    flat = [np.full((3, 64, 64), value, np.uint8) for value in np.resize(values, n)]
    same = texture(np.stack(flat))
    domain = Domain.fit({"texture": same}, {"texture": same[:8]})
    np.testing.assert_array_less(domain.distance({"texture": same}), 1.001)
    noise = np.random.default_rng(0).integers(0, 256, (3, 3, 64, 64), dtype=np.uint8)
    assert (domain.distance({"texture": texture(noise)}) > 1).all()


# --- texture --------------------------------------------------------------------------------------


def scenes(n, seed=0, side=64, sharp=True):
    """Return pictures of edges, gradients and grain (n, 3, side, side), uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    made = []
    for _ in range(n):
        picture = np.zeros((side, side))
        for _ in range(rng.integers(4, 9)):
            a, b, c = rng.normal(size=3)
            picture += rng.uniform(20, 80) * (a * x + b * y > c / 3)
        picture += 40 * x + rng.normal(0, rng.uniform(4, 10), (side, side)) * sharp
        channels = [np.clip(picture * s, 0, 255) for s in rng.uniform(0.5, 1, 3)]
        made.append(np.array(channels).astype(np.uint8))
    return np.stack(made)


def changed(images, change):
    """Apply a function of PIL images."""
    pictures = [Image.fromarray(image.transpose(1, 2, 0)) for image in images]
    return np.stack([np.asarray(change(picture)).transpose(2, 0, 1) for picture in pictures])


def test_texture_is_that_of_the_mirrored_picture():
    images = scenes(20)
    mirrored = np.ascontiguousarray(images[..., ::-1])
    assert (images != mirrored).any()
    np.testing.assert_allclose(texture(mirrored), texture(images), atol=1e-5)
    np.testing.assert_allclose(texture(images[:, :, ::-1]), texture(images), atol=1e-5)


def test_texture_is_one_of_each_picture_alone_and_reads_the_lightness():
    images = scenes(6)
    whole = texture(images)
    assert whole.shape == (6, 32)
    assert whole.dtype == np.float64
    np.testing.assert_allclose(
        np.concatenate([texture(images[i : i + 1]) for i in range(6)]), whole
    )
    np.testing.assert_allclose(texture(images[:, ::-1]), whole, atol=1e-5)  # RGB or BGR
    cut = texture(np.pad(images, ((0, 0), (0, 0), (0, 3), (0, 3))))  # no whole tile more
    np.testing.assert_allclose(cut, whole)


def test_a_blurred_picture_has_less_of_the_finest_details():
    images = scenes(20)
    blurred = changed(images, lambda picture: picture.filter(ImageFilter.GaussianBlur(1)))
    before, after = texture(images), texture(blurred)
    finest = 15  # the last of the 16 coefficients
    assert (after[:, finest] < before[:, finest] - 0.5).all()
    assert (after[:, 16 + finest] < before[:, 16 + finest] - 1).all()
    np.testing.assert_allclose(after[:, 16], before[:, 16], atol=0.1)  # the mean stays


@pytest.mark.parametrize("colour", [0, 1, 128, 255])
def test_flat_pictures_have_a_finite_texture(colour):
    flat = texture(np.full((2, 3, 64, 64), colour, np.uint8))
    assert np.isfinite(flat).all()
    np.testing.assert_array_equal(flat[0], flat[1])
    np.testing.assert_allclose(flat[:, 1:16], flat[0, 1], rtol=1e-2)  # no detail of any kind


def auroc(inside, outside):
    """Probability that a picture from outside lies farther than one from inside."""
    from sklearn.metrics import roc_auc_score

    truth = np.repeat([0, 1], [len(inside), len(outside)])
    return roc_auc_score(truth, np.concatenate([inside, outside]))


def test_what_was_scaled_up_is_told_by_its_texture_alone():
    sharp = scenes(260, seed=1, side=128)
    large = changed(
        scenes(60, seed=2, side=64), lambda picture: picture.resize((128, 128), Image.BICUBIC)
    )
    known, held, test = (texture(part) for part in np.split(sharp, [150, 200]))
    domain = Domain.fit({"texture": known}, {"texture": held})
    inside, outside = (domain.distance({"texture": t}) for t in (test, texture(large)))
    assert auroc(inside, outside) == 1
    assert (outside > 1).all()
    assert auroc(inside, domain.distance({"texture": held})) < 0.9  # the own kind is not told


# --- the predictor --------------------------------------------------------------------------------


def small(source, name="smoke"):
    changes = {"val_fraction": 0.2, "test_fraction": 0.2, "near_duplicate": 0.99}
    profile = config.profile("smoke", str(source), **changes)
    train = config.replace(profile.train, device="cpu", epochs=2)
    return config.replace(profile, name=name, train=train)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a project with one run on squares, to be copied by each test."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RSD_ROOT", str(folder))
        profile = small(squares.write(folder / "squares"))
        run = experiment.train(profile, "vit", experiment.prepare(profile.data))
    return run


@pytest.fixture
def run(trained, tmp_path):
    """Return the run in a project of its own, below ``runs/smoke``."""
    shutil.copytree(trained.parents[2], tmp_path, dirs_exist_ok=True)
    return tmp_path / "runs" / "smoke" / trained.name


def noise(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def square(colour):
    return Image.new("RGB", (90, 80), squares.COLOURS[colour])


def test_squares_are_what_it_was_trained_on_and_noise_is_not(run):
    predictor = predict.Predictor.load(run, device="cpu")
    pictures = [square("red"), square("green"), noise(0), noise(1)]
    seen = predictor.predict(pictures)
    assert seen.in_domain.tolist() == [True, True, False, False]
    np.testing.assert_array_equal(seen.in_domain, seen.distances <= 1)
    assert seen.table("abcd")["in_domain"].tolist() == seen.in_domain.tolist()
    assert (seen.distances[2:] > 100).all()
    one_by_one = predictor.predict(pictures, batch_size=1)
    np.testing.assert_allclose(one_by_one.distances, seen.distances, rtol=1e-3)


def test_every_square_that_it_was_trained_on_is_inside(run):
    """Grey is 1.00000002 away: the farthest of few."""
    predictor = predict.Predictor.load(run, device="cpu")
    assert predictor.predict([square(colour) for colour in squares.COLOURS]).in_domain.all()


def test_a_frozen_encoders_own_pictures_are_inside_too(tmp_path):
    """Its features are stored in half precision; the predictor's are not."""
    import tiny

    (tmp_path / "clip").mkdir()
    clip = config.BackboneConfig("open_clip", str(tiny.clip(tmp_path / "clip")), fine_tune="never")
    head = config.HeadConfig(probe=True, reads="both", chosen=True, named_below=10**6)
    profile = small(squares.write(tmp_path / "squares"))
    profile = config.replace(profile, backbones={"it": clip}, head=head)
    run = experiment.train(profile, "it", experiment.prepare(profile.data))
    predictor = predict.Predictor.load(run, device="cpu")
    seen = predictor.predict([*(square(colour) for colour in squares.COLOURS), noise()])
    np.testing.assert_array_less(seen.distances[:4], 1.02)
    assert seen.distances[4] > 10
    assert len(seen.words[0]) == 8


def test_no_picture_is_neither_inside_nor_outside(run):
    nothing = predict.Predictor.load(run, device="cpu").predict([])
    assert nothing.in_domain.shape == (0,)
    assert nothing.table([]).empty


def test_a_run_that_does_not_know_says_nothing(run, tmp_path, capsys):
    (run / experiment.DOMAIN).unlink()
    noise().save(tmp_path / "noise.png")
    seen = predict.Predictor.load(run, device="cpu").predict([noise()])
    assert seen.in_domain is None
    assert seen.distances is None
    assert "in_domain" not in seen.table(["noise"])
    for format in ("text", "json", "csv"):
        cli.main(["predict", str(tmp_path / "noise.png"), "--run", str(run), "--format", format])
        out, err = capsys.readouterr()
        assert "in_domain" not in out
        assert "WARNING" not in out
        assert "trained on" not in err


def test_a_finished_run_without_its_domain_learns_it_again(run, trained):
    """Trained by an older version: the weights stay, and what it knows is what it would have."""
    before = files.load_arrays(run / experiment.DOMAIN)[0]
    weights = (run / "model.safetensors").read_bytes()
    (run / experiment.DOMAIN).unlink()
    profile = small(trained.parents[2] / "squares")
    assert experiment.train(profile, "vit", experiment.prepare(profile.data)) == run
    assert (run / "model.safetensors").read_bytes() == weights
    after = files.load_arrays(run / experiment.DOMAIN)[0]
    assert after.keys() == before.keys()
    for name, value in after.items():
        np.testing.assert_allclose(value, before[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("strange", [True, False])
@pytest.mark.parametrize("format", ["text", "json", "csv"])
def test_the_command_warns_of_pictures_of_another_kind(format, strange, run, tmp_path, capsys):
    square("red").save(tmp_path / "a.png")
    square("green").save(tmp_path / "b.png")
    paths = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    if strange:
        noise().save(tmp_path / "c.png")
        paths.append(str(tmp_path / "c.png"))
    cli.main(["predict", *paths, "--run", str(run), "--format", format, "--device", "cpu"])
    out, err = capsys.readouterr()
    expected = [True, True, False][: len(paths)]
    warned = [line for line in err.splitlines() if "trained on" in line]
    assert len(warned) == int(strange)
    if strange:
        assert warned[0].startswith(f"1 of {len(paths)} pictures ")
        assert "rsd run 01_train_vit -p profile desk -p source" in warned[0]
    if format == "json":
        records = json.loads(out)
        assert [record["in_domain"] for record in records] == expected
        assert [record["distance"] <= 1 for record in records] == expected
    elif format == "csv":
        assert pd.read_csv(io.StringIO(out))["in_domain"].tolist() == expected
    else:
        blocks = out.split("\n\n")[1:]
        assert [path in block for path, block in zip(paths, blocks, strict=True)] == [True] * len(
            paths
        )
        assert ["WARNING" not in block for block in blocks] == expected


def test_nearest_prompts_can_be_those_of_any_file(run, tmp_path, capsys):
    prompts = ["a red house, oil painting", "quantum chromodynamics lecture notes", "a blue boat"]
    (tmp_path / "bank.txt").write_text("\n".join(prompts))
    predictor = predict.Predictor.load(run, device="cpu", bank=tmp_path / "bank.txt")
    square("red").save(tmp_path / "red.png")
    seen = predictor.predict(tmp_path / "red.png")
    cosines = seen.embeddings[0] @ data.embed(prompts).T
    order = np.argsort(-cosines)
    assert [prompt for prompt, _ in seen.prompts[0]] == [prompts[i] for i in order]
    assert [s for _, s in seen.prompts[0]] == pytest.approx(cosines[order].tolist(), abs=1e-5)
    own = predict.Predictor.load(run, device="cpu").predict(tmp_path / "red.png")
    np.testing.assert_array_equal(own.embeddings, seen.embeddings)
    assert not {prompt for prompt, _ in own.prompts[0]} & set(prompts)
    command = ["predict", str(tmp_path / "red.png"), "--run", str(run), "--format", "json"]
    cli.main([*command, "--bank", str(tmp_path / "bank.txt")])
    told = json.loads(capsys.readouterr().out)[0]["prompts"]
    assert [prompt for prompt, _ in told] == [prompts[i] for i in order]
    with pytest.raises(SystemExit) as refused:
        cli.main([*command, "--bank", str(tmp_path / "absent.txt")])
    assert refused.value.code == 3
    assert "absent.txt" in capsys.readouterr().err


# --- which run answers ----------------------------------------------------------------------------


def place(run, profile, name=None, prepared=None, at=None):
    """Copy a run below another profile, perhaps as one on other data, finished at another time."""
    folder = shutil.copytree(run, run.parents[1] / profile / (name or run.name))
    if prepared is not None:
        stored = files.read_json(folder / "config.json")
        stored["recipe"]["prepared"] = prepared
        files.write_json(folder / "config.json", stored)
    if at is not None:
        os.utime(folder / "difficulty.parquet", (at, at))
    return folder


def raise_score(folder, score):
    """Give a run another validation score."""
    path = folder / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        if record.get("val_similarity") is not None:
            record["val_similarity"] = score
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def test_runs_on_real_pictures_answer_before_those_of_the_mini_world(run, capsys):
    with pytest.raises(CacheError, match="runs/desk or runs/mini"):
        predict.best_run()
    mini = place(run, "mini")
    assert predict.best_run() == mini
    raise_score(mini, 0.99)
    desk = place(run, "desk")
    raise_score(desk, 0.01)
    assert predict.best_run() == desk
    assert predict.best_run("mini") == mini
    assert predict.best_run("smoke") == run
    shutil.rmtree(desk)
    assert predict.best_run() == mini


def test_the_newest_data_come_first_and_the_best_run_on_them(run):
    old = place(run, "desk", "old", prepared="a" * 16, at=1000)
    new = place(run, "desk", "new", prepared="b" * 16, at=2000)
    better = place(run, "desk", "better", prepared="b" * 16, at=1500)
    raise_score(old, 0.9)
    raise_score(new, 0.1)
    raise_score(better, 0.2)
    assert predict.best_run("desk") == better
    again = place(run, "desk", "again", prepared="a" * 16, at=3000)  # trained on the old data
    raise_score(again, 0.0)
    assert predict.best_run("desk") == old


def test_an_unknown_profile_is_wrong_usage(run, tmp_path, capsys):
    noise().save(tmp_path / "a.png")
    with pytest.raises(SystemExit) as refused:
        cli.main(["predict", str(tmp_path / "a.png"), "--profile", "tiny"])
    assert refused.value.code == 2
    with pytest.raises(SystemExit) as refused:  # a known one with nothing in it is not
        cli.main(["predict", str(tmp_path / "a.png"), "--profile", "paper"])
    assert refused.value.code == 3
    assert "runs/paper" in capsys.readouterr().err


# --- pairs of several folders ---------------------------------------------------------------------


def folder_of(folder, rows):
    """Write a plain folder of pairs: file name to prompt."""
    folder.mkdir()
    for name in rows:
        Image.new("RGB", (8, 8)).save(folder / name)
    table = pd.DataFrame({"file_name": rows.keys(), "prompt": rows.values()})
    table.to_csv(folder / "metadata.csv", index=False)
    return folder


def test_pairs_of_several_folders_are_all_their_rows_sorted(tmp_path):
    first = folder_of(tmp_path / "first", {"c.png": "a cat", "a.png": "an ant"})
    second = folder_of(tmp_path / "second", {"b.png": "a bee", "d.png": "a dog", "e.png": "an eel"})
    both = load_pairs(f"{first}{os.pathsep}{second}")
    assert both["id"].tolist() == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert both["prompt"].tolist() == ["an ant", "a bee", "a cat", "a dog", "an eel"]
    folders = [first, second, first, second, second]
    assert both["image"].tolist() == [f"{f}/{i}" for f, i in zip(folders, both["id"], strict=True)]
    assert both.index.tolist() == list(range(5))
    pd.testing.assert_frame_equal(both, load_pairs(f"{second}{os.pathsep}{first}"))
    few = load_pairs(f"{first}{os.pathsep}{second}", limit=2)
    assert few["id"].tolist() == ["a.png", "b.png", "c.png", "d.png"]  # two of each
    pd.testing.assert_frame_equal(load_pairs(first), load_pairs(str(first)))


def test_an_id_in_two_folders_is_refused_by_name(tmp_path):
    first = folder_of(tmp_path / "first", {"a.png": "an ant", "b.png": "a bee"})
    second = folder_of(tmp_path / "second", {"b.png": "a bee"})
    with pytest.raises(BadTableError, match=r"'b\.png' in first, second: it stands there 2 times"):
        load_pairs(f"{first}{os.pathsep}{second}")
    with pytest.raises(BadTableError, match="first, first: it stands there 2 times"):
        load_pairs(f"{first}{os.pathsep}{first}")
    with pytest.raises(BadTableError, match=r"there is no folder .*third"):
        load_pairs(f"{first}{os.pathsep}{tmp_path / 'third'}")


def test_folders_with_other_columns_go_together_and_are_prepared(tmp_path):
    first, second = squares.write(tmp_path / "first", squares.THINGS[:6]), tmp_path / "second"
    second.mkdir()
    rows = []
    for thing in squares.THINGS[6:]:
        Image.new("RGB", (8, 8)).save(second / f"{thing}.png")
        prompt = f"one lonely {thing}, black on black, by nobody who ever saw a {thing}"
        rows.append({"file_name": f"{thing}.png", "text": prompt, "artist": "nobody"})
    lines = [json.dumps(row) for row in rows]
    (second / "metadata.jsonl").write_text("\n".join(lines))
    source = f"{first}{os.pathsep}{second}"
    prepared = experiment.prepare(small(source).data)
    assert len(prepared.pairs) == 6 * 4 + 6
    assert prepared.pairs["artist"].notna().sum() == 6
    assert prepared.images(16).ok.all()
    assert source.count(os.sep) > 2
    assert experiment.about(prepared, 0)["prepared"] == prepared.key


# --- prompts alone --------------------------------------------------------------------------------

LINES = [
    "a fox in the snow",
    "zwei Füchse",
    "",
    "  a   fox in the snow ",
    "two cats",
    "two cats",
    "   ",
]
TIDY = ["a fox in the snow", "zwei Füchse", "two cats"]


def text(folder):
    (folder / "bank.txt").write_text("\n".join(LINES), encoding="utf-8")
    return folder / "bank.txt"


def marked(folder):
    (folder / "bank.txt").write_text("\r\n".join(LINES), encoding="utf-8-sig")
    return folder / "bank.txt"


def gzipped(folder):
    with gzip.open(folder / "bank.txt.gz", "wt", encoding="utf-8") as stream:
        stream.write("\n".join(LINES))
    return folder / "bank.txt.gz"


def csv(folder, column="prompt"):
    frame = pd.DataFrame({"number": range(len(LINES)), column: LINES})
    frame.to_csv(folder / "bank.csv", index=False)
    return folder / "bank.csv"


def jsonl(folder):
    lines = [json.dumps({"caption": line}) for line in LINES]
    (folder / "bank.jsonl").write_text("\n".join(lines))
    return folder / "bank.jsonl"


def parquet(folder, name="bank.parquet"):
    pd.DataFrame({"prompt": [*LINES, None]}).to_parquet(folder / name)
    return folder / name


def table_of_a_folder(folder):
    return parquet(folder, "metadata.parquet").parent


KINDS = (text, marked, gzipped, csv, jsonl, parquet, table_of_a_folder)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_prompts_come_tidied_and_each_once(kind, tmp_path):
    assert load_prompts(kind(tmp_path)) == TIDY
    assert load_prompts(str(kind(tmp_path))) == TIDY


@pytest.mark.parametrize("column", ["prompt", "text", "caption"])
def test_prompts_stand_in_any_column_that_pairs_may_have(column, tmp_path):
    assert load_prompts(csv(tmp_path, column)) == TIDY


def test_a_table_without_prompts_is_refused(tmp_path):
    with pytest.raises(BadTableError, match=r"bank\.csv has no column 'prompt'"):
        load_prompts(csv(tmp_path, "title"))


@pytest.mark.parametrize("kind", [gzipped, parquet], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_prompts_that_were_cut_off_are_refused_by_name(kind, share, tmp_path):
    path = kind(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(BadTableError, match=f"{path.name} cannot be read"):
        load_prompts(path)


def test_prompts_that_are_no_text_are_refused_by_name(tmp_path):
    noise().save(tmp_path / "picture.png")
    for name in ("bank.txt", "bank.csv", "bank.jsonl", "bank.parquet", "bank.txt.gz"):
        shutil.copy(tmp_path / "picture.png", tmp_path / name)
        with pytest.raises(BadTableError, match=f"{name} cannot be read"):
            load_prompts(tmp_path / name)


def test_absent_and_empty_prompts_are_refused_by_name(tmp_path):
    with pytest.raises(BadTableError, match=r"absent\.txt cannot be read"):
        load_prompts(tmp_path / "absent.txt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(BadTableError, match="folder cannot be read"):
        load_prompts(tmp_path / "folder")
    for content in ("", "\n \n\t\n", "\u200b\n"):
        (tmp_path / "blank.txt").write_text(content, encoding="utf-8")
        with pytest.raises(BadTableError, match=r"blank\.txt holds no prompt"):
            load_prompts(tmp_path / "blank.txt")


# --- other splits ---------------------------------------------------------------------------------

KEYS = [prompt_key(f"prompt {number}") for number in range(3000)]


@pytest.mark.parametrize("k", [2, 3, 4, 5, 7, 10])
def test_turned_all_around_each_prompt_is_tested_once(k):
    sides = np.array([split(KEYS, 0.1, 1 / k, turn=turn / k) for turn in range(k)])
    assert ((sides == "test").sum(axis=0) == 1).all()
    shares = (sides == "test").mean(axis=1)
    assert (abs(shares - 1 / k) < 0.05).all()
    assert (abs((sides == "val").mean(axis=1) - 0.1) < 0.03).all()


def test_turn_of_zero_and_of_one_are_the_same_split_and_others_are_not():
    plain = split(KEYS, 0.1, 0.2)
    np.testing.assert_array_equal(split(KEYS, 0.1, 0.2, turn=0.0), plain)
    np.testing.assert_array_equal(split(KEYS, 0.1, 0.2, turn=1.0), plain)
    assert (split(KEYS, 0.1, 0.2, turn=0.2) != plain).any()


def test_a_turned_split_is_another_preparation_of_the_same_pairs(tmp_path):
    profile = small(squares.write(tmp_path / "squares"))
    plain = experiment.prepare(profile.data)
    turned = experiment.prepare(dataclasses.replace(profile.data, turn=0.2))
    assert turned.key != plain.key
    assert turned.pairs["id"].tolist() == plain.pairs["id"].tolist()
    tests = [set(p.pairs["key"][p.pairs["split"] == "test"]) for p in (plain, turned)]
    assert tests[0]
    assert tests[1]
    assert not tests[0] & tests[1]
