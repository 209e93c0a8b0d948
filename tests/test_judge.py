"""What belongs to the mini world: its judge's verdicts, and what is known of its scenes."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REPOSITORY

from mini_world import Judge, known_causes, names, scenes, shows
from rsdlib import files
from rsdlib.errors import ModelNotFoundError

GROUPS = {
    "noun": ["red", "green", "blue"],
    "setting": ["dark", "light"],
    "medium": ["a", "b"],
    "count": ["0", "1", "2"],
}


class Colours(torch.nn.Module):
    """Sees colours in place of things, light where it is bright, always medium b and one thing."""

    def forward(self, pixels):
        shown = ((pixels + 1) / 2).mean((2, 3))  # (b, 3)
        bright = shown.mean(1, keepdim=True)
        rest = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]).expand(len(pixels), 5)
        return torch.cat([shown, 0.25 - bright, bright - 0.25, rest], dim=1)


def picture(*halves):
    """Return a picture of two halves, each of one colour."""
    image = np.zeros((64, 64, 3), np.uint8)
    for i, name in enumerate(halves):
        image[:, 32 * i : 32 * (i + 1), GROUPS["noun"].index(name)] = 255
    return image


@pytest.fixture(scope="module")
def judge():
    return Judge(Colours(), GROUPS, 32, "cpu")


def test_verdicts_by_hand(judge):
    images = np.stack([picture("red", "green"), picture("blue", "blue") // 8])
    bright, dark = judge.verdicts(images, [2, 1])
    assert set(bright.pop("judged_nouns")) == {"red", "green"}
    assert bright == {"judged_count": 1, "judged_setting": "light", "judged_medium": "b"}
    assert dark["judged_nouns"] == ["blue"]
    assert dark["judged_setting"] == "dark"


def test_left_is_told_from_right(judge):
    images = np.stack([picture("red", "green"), picture("green", "red"), picture("blue", "green")])
    first = judge.left_first(images, ["red", "red", "blue"], ["green", "green", "green"])
    assert first.tolist() == [True, False, True]


def test_agreement_by_hand(judge):
    asked = [
        {"nouns": ["red", "green"], "count": 1, "setting": "light", "medium": "b"},
        {"nouns": ["red", "blue"], "count": 2, "setting": "dark", "medium": "b"},
    ]
    asked[0]["relation"], asked[1]["relation"] = "left of", "and"
    agreement = judge.agrees(np.stack([picture("red", "green")] * 2), asked)
    assert agreement["noun"].tolist() == [1, 0.5]
    assert agreement["setting"].tolist() == [1, 0]
    assert agreement["medium"].tolist() == [1, 1]
    assert agreement["count"].tolist() == [1, 0]
    assert agreement["order"][0] == 1
    assert np.isnan(agreement["order"][1])


def test_size_of_the_picture_does_not_matter(judge):
    small = picture("red", "green")
    large = small.repeat(4, axis=0).repeat(4, axis=1)
    of_small, of_large = (judge.see(image[None])["noun"] for image in (small, large))
    np.testing.assert_allclose(of_small, of_large, atol=0.05)


def test_folder_without_a_judge_is_named(tmp_path):
    with pytest.raises(ModelNotFoundError, match="holds no judge"):
        Judge.open(tmp_path)
    other = REPOSITORY / "data" / "mini" / "vit" / "config.json"
    (tmp_path / "config.json").write_text(other.read_text())
    with pytest.raises(ModelNotFoundError, match="holds no judge"):
        Judge.open(tmp_path)


# What is known of the scenes


@pytest.fixture
def prepared(tmp_path):
    """As much of prepared pairs as is asked for."""
    pairs = pd.DataFrame({"id": [f"{i}.webp" for i in range(5)], "prompt": "a cat"})
    return SimpleNamespace(config=SimpleNamespace(source=str(tmp_path)), pairs=pairs)


def test_other_data_tell_nothing(prepared):
    assert scenes(prepared) is None
    assert known_causes(prepared) is None
    assert names(prepared) == {}


def test_names_are_those_beside_the_data(prepared, tmp_path):
    said = {"setting": {"snow": ["snow", "in the snow"]}}
    files.write_json(tmp_path / "names.json", said)
    assert names(prepared) == said


def test_known_causes(prepared, tmp_path):
    scene = {"relation": "single", "has_referent": True}
    scene |= {"nouns": ["cat"], "count": 1, "setting": "snow", "medium": "neon"}
    judged = {f"judged_{name}": scene[name] for name in ("nouns", "count", "setting", "medium")}
    table = pd.DataFrame([{"image_name": name, **scene, **judged} for name in prepared.pairs["id"]])
    table.at[0, "judged_nouns"] = ["fox"]
    table.loc[1, ["has_referent", "relation"]] = [False, "none"]
    table.loc[2, ["count", "judged_count", "relation"]] = [2, 2, "count"]
    table.loc[3, ["count", "judged_count", "relation"]] = [2, 1, "left of"]
    table.sample(frac=1, random_state=0).to_parquet(tmp_path / "scenes.parquet")
    assert scenes(prepared)["id"].tolist() == prepared.pairs["id"].tolist()
    causes = known_causes(prepared)
    assert {name: np.flatnonzero(causes[name]).tolist() for name in causes} == {
        "nothing to see": [1],
        "several things": [2, 3],
        "a count": [2],
        "left of": [3],
        "not as asked": [0, 3],
    }


@pytest.mark.parametrize(
    ("caption", "thing", "there"),
    [
        ("Two foxes, in the snow", "fox", True),
        ("a pair of scissors", "scissors", True),
        ("a hot air balloon at night", "hot air balloon", True),
        ("a balloon", "hot air balloon", False),
        ("a firefox", "fox", False),
        ("", "fox", False),
    ],
)
def test_caption_names_a_thing(caption, thing, there):
    assert shows(caption, thing) == there
    assert shows(caption, "zebra", thing) == there
