"""The mini world's renderer: what it draws and how its prompts are worded."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

DATA = Path(__file__).resolve().parents[1] / "data"
sys.path.insert(0, str(DATA / "mini" / "build"))

import backdrops  # noqa: E402
import media  # noqa: E402
import renderer  # noqa: E402
import scenes  # noqa: E402
import sprites  # noqa: E402

ARTICLE = re.compile(r"\ba (?!unicorn)[aeiou]|\ban (?!hourglass)[^aeiou]", re.IGNORECASE)


@pytest.fixture
def cached_sprites():
    """Skip where the sprites were never fetched: tests use no network."""
    if not sprites.sprite_file().exists():
        pytest.skip("sprites are not cached; run data/mini/build/contact_sheet.py once, with npm")


def sampled(number=2000, seed=1):
    rng = np.random.default_rng(seed)
    return [scenes.sample_scene(rng) for _ in range(number)]


# What is sampled


def test_noun_table_has_good_english():
    assert len(sprites.NOUNS) == 60
    assert len({noun.codepoint for noun in sprites.NOUNS.values()}) == 60
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


def test_captions_say_plainly_what_is_shown():
    assert scenes.caption(["fox"], 2, "snow", "cartoon") == "a cartoon of two foxes in the snow"
    several = scenes.caption(["fox", "pair of scissors"], 2, "night", "pixel art")
    assert several == "pixel art of a fox and a pair of scissors at night"
    for scene in sampled(300):
        assert not ARTICLE.search(
            scenes.caption(scene.objects, scene.count, scene.setting, scene.medium)
        )


def test_no_misaligned_scene_where_none_is_wanted():
    rng = np.random.default_rng(0)
    assert not any(scenes.sample_scene(rng, misaligned=0).misaligned for _ in range(1000))


def test_shares_of_odd_pairs():
    some = sampled(4000)
    assert np.mean([not scene.has_referent for scene in some]) == pytest.approx(
        scenes.NO_REFERENT, abs=0.02
    )
    shown = [scene.misaligned for scene in some if scene.has_referent]
    assert np.mean(shown) == pytest.approx(scenes.MISALIGNED, abs=0.02)


# What is drawn


@pytest.mark.parametrize("medium", scenes.MEDIA)
@pytest.mark.parametrize("size", [32, 64])
def test_draw_depends_on_the_generator_alone(cached_sprites, medium, size):
    for setting in scenes.SETTINGS:
        scene = scenes.Scene(("fox", "tent"), 2, "left of", setting, medium)
        first, again, other = (
            renderer.draw(scene, np.random.default_rng(seed), size) for seed in (1, 1, 2)
        )
        assert first.shape == (size, size, 3)
        assert first.dtype == np.uint8
        assert first.std() > 8
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()


def test_left_of_keeps_the_order(cached_sprites):
    scene = scenes.Scene(("apple", "frog"), 2, "left of", "snow", "3d render")
    for seed in range(5):
        red, green, _ = (
            renderer.draw(scene, np.random.default_rng(seed)).astype(int).transpose(2, 0, 1)
        )
        columns = np.arange(64)
        centres = [
            np.average(columns, weights=(part > 40).sum(axis=0))
            for part in (red - green, green - red)
        ]
        assert centres[0] < centres[1]


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
