"""The mini world's renderer and the renders that ship with the project."""

import hashlib
import io
import json
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

DATA = Path(__file__).resolve().parents[1] / "data"
SHIPPED = DATA / "mini" / "diffusiondb"
sys.path.insert(0, str(DATA / "mini" / "build"))

import backdrops  # noqa: E402
import make_renders  # noqa: E402
import media  # noqa: E402
import renderer  # noqa: E402
import scenes  # noqa: E402
import sprites  # noqa: E402

ARTICLE = re.compile(r"\ba (?!unicorn)[aeiou]|\ban (?!hourglass)[^aeiou]", re.IGNORECASE)


@pytest.fixture
def cached_sprites():
    """Skip where the sprites were never fetched: tests use no network."""
    if not sprites.sprite_file().exists():
        pytest.skip("sprites are not cached; run data/mini/build/make_renders.py once, with npm")


@pytest.fixture(scope="module")
def metadata():
    return pq.read_table(SHIPPED / "metadata.parquet")


@pytest.fixture(scope="module")
def truth():
    return pq.read_table(SHIPPED / "scenes.parquet")


@pytest.fixture(scope="module")
def archives():
    return {path.stem: zipfile.ZipFile(path) for path in sorted((SHIPPED / "images").glob("part-*.zip"))}


def sampled(number=2000, seed=1):
    rng = np.random.default_rng(seed)
    return [scenes.sample_scene(rng) for _ in range(number)]


# What is sampled


def test_noun_table_has_good_english():
    assert len(sprites.NOUNS) == 100
    assert len({noun.codepoint for noun in sprites.NOUNS.values()}) == 100
    for noun in sprites.NOUNS.values():
        assert not ARTICLE.search(f"{noun.article} {noun.singular}")
        assert noun.scale in renderer.SCALE
        assert noun.place in {"ground", "air", "water"}


def test_every_setting_and_medium_can_be_drawn():
    assert list(scenes.SETTINGS) == list(backdrops.BACKDROPS)
    assert list(scenes.MEDIA) == list(media.FILTERS)
    assert set(renderer.STYLE) == set(scenes.MEDIA)


def test_scenes_agree_with_themselves():
    for scene in sampled():
        assert 1 <= len(scene.objects) <= scene.count <= 3
        assert len(set(scene.objects)) == len(scene.objects)
        assert (scene.relation == "single") <= (scene.count == 1)
        assert (scene.relation in {"and", "left of"}) <= (len(scene.objects) == scene.count > 1)
        assert not (scene.misaligned and not scene.has_referent)


def test_aligned_prompts_name_what_is_shown():
    for scene in sampled():
        prompt = scene.prompt.lower()
        assert "{" not in prompt
        assert not ARTICLE.search(prompt)
        assert all(modifier in prompt for modifier in scene.modifiers)
        if not scene.has_referent:
            continue
        assert any(place in prompt for place in scenes.SETTINGS[scene.setting])
        assert any(name in prompt for names in scenes.MEDIA[scene.medium] for name in names)
        if not scene.misaligned:
            named = [sprites.NOUNS[name][scene.relation == "count"] for name in scene.objects]
            assert all(re.search(rf"\b{name}\b", prompt) for name in named)


def test_shares_of_odd_pairs():
    some = sampled(4000)
    assert np.mean([not scene.has_referent for scene in some]) == pytest.approx(scenes.NO_REFERENT, abs=0.02)
    shown = [scene.misaligned for scene in some if scene.has_referent]
    assert np.mean(shown) == pytest.approx(scenes.MISALIGNED, abs=0.02)


def test_records_refuse_near_duplicates():
    records = make_renders.sample_records(300, seed=5)
    assert records == make_renders.sample_records(300, seed=5)
    assert len({record.image_name for record in records}) == 300
    prompts = {record.scene.prompt for record in records}
    words = [set(re.findall(r"\w+", prompt.lower())) for prompt in sorted(prompts)]
    assert all(len(a & b) < 0.8 * len(a | b) for i, a in enumerate(words) for b in words[:i])


# What is drawn


@pytest.mark.parametrize("medium", scenes.MEDIA)
@pytest.mark.parametrize("size", [32, 64])
def test_draw_depends_on_the_generator_alone(cached_sprites, medium, size):
    for setting in scenes.SETTINGS:
        scene = scenes.Scene(("fox", "tent"), 2, "left of", setting, medium)
        first, again, other = (renderer.draw(scene, np.random.default_rng(seed), size) for seed in (1, 1, 2))
        assert first.shape == (size, size, 3)
        assert first.dtype == np.uint8
        assert first.std() > 8
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()


def test_left_of_keeps_the_order(cached_sprites):
    scene = scenes.Scene(("apple", "frog"), 2, "left of", "snow", "3d render")
    for seed in range(5):
        red, green, _ = renderer.draw(scene, np.random.default_rng(seed)).astype(int).transpose(2, 0, 1)
        columns = np.arange(64)
        centres = [np.average(columns, weights=(part > 40).sum(axis=0)) for part in (red - green, green - red)]
        assert centres[0] < centres[1]


def test_shipped_images_are_drawn_again_from_their_rows(cached_sprites, metadata, truth, archives):
    for i in np.linspace(0, metadata.num_rows - 1, 25).astype(int).tolist():
        row = metadata.slice(i, 1).to_pylist()[0] | truth.slice(i, 1).to_pylist()[0]
        data = archives[f"part-{row['part_id']:06d}"].read(row["image_name"])
        shipped = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), int)
        assert np.abs(shipped - renderer.render_row(row)).mean() < 9  # what WebP's chroma subsampling may cost


def test_a_data_set_is_made_byte_for_byte_again(cached_sprites, tmp_path):
    for name in ("a", "b"):
        make_renders.make(tmp_path / name, count=30, seed=3, workers=1)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert [str(file) for file in files] == ["images/part-000001.zip", "metadata.parquet", "scenes.parquet"]
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_a_tarball_with_another_checksum_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sprites, "CACHE", tmp_path)
    package = sprites.PACKAGES["noto"]
    package.tarball.write_bytes(b"something else")
    with pytest.raises(RuntimeError, match="sha256"):
        sprites._fetch(package)


def test_missing_npm_is_said_clearly(tmp_path, monkeypatch):
    monkeypatch.setattr(sprites, "CACHE", tmp_path)
    monkeypatch.setattr(sprites.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="npm is needed"):
        sprites._fetch(sprites.PACKAGES["fluent"])


# What ships


def test_columns_are_those_of_diffusiondb(metadata, truth):
    assert metadata.schema.equals(make_renders.METADATA)
    assert truth.schema.equals(make_renders.SCENES)
    assert metadata["image_name"].equals(truth["image_name"])


def test_rows_are_enough_and_labelled_as_renders(metadata):
    names, prompts = metadata["image_name"].to_pylist(), metadata["prompt"].to_pylist()
    assert len(set(names)) == len(names)
    assert len(set(metadata["seed"].to_pylist())) == len(names)
    assert len(set(prompts)) >= 2000
    assert max(prompts.count(prompt) for prompt in set(prompts)) <= 4
    for column, value in make_renders.RENDER.items():
        assert set(metadata[column].to_pylist()) == {value}
    assert not any(ARTICLE.search(prompt) for prompt in prompts)


def test_parts_list_their_images(metadata, archives):
    rows = metadata.to_pylist()
    assert sorted(archives) == [f"part-{part:06d}" for part in sorted({row["part_id"] for row in rows})]
    for name, archive in archives.items():
        listed = json.loads(archive.read(f"{name}.json"))
        assert set(archive.namelist()) == {*listed, f"{name}.json"}
        assert len(listed) <= 1000
        here = [row for row in rows if row["part_id"] == int(name[-6:])]
        keys = {"p": "prompt", "se": "seed", "c": "cfg", "st": "step", "sa": "sampler"}
        assert listed == {row["image_name"]: {k: row[column] for k, column in keys.items()} for row in here}


def test_images_can_be_read(metadata, archives):
    for archive in archives.values():
        for name in archive.namelist()[:40]:
            with Image.open(io.BytesIO(archive.read(name))) as image:
                assert (image.format, image.size, image.mode) == ("WEBP", (64, 64), "RGB")


def test_checksums_in_the_readme():
    listed = dict(re.findall(r"^([0-9a-f]{64})  (\S+)$", (DATA / "README.md").read_text("utf-8"), re.MULTILINE))
    listed = {path: digest for digest, path in listed.items()}
    shipped = {path.relative_to(DATA).as_posix(): path for path in SHIPPED.rglob("*") if path.is_file()}
    assert set(shipped) <= set(listed)
    for name, path in shipped.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == listed[name], name
    assert sum(path.stat().st_size for path in shipped.values()) < 6_000_000
