"""The judge's verdicts, with an eye that sees colours in place of things."""

import numpy as np
import pytest
import torch
from conftest import REPOSITORY

from rsdlib.errors import ModelNotFoundError
from rsdlib.judge import Judge

GROUPS = {"noun": ["red", "green", "blue"], "setting": ["dark", "light"], "medium": ["a", "b"], "count": ["0", "1", "2"]}


class Colours(torch.nn.Module):
    """Sees a colour where it is, light where the picture is bright, always medium b and one thing."""

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
    found = judge.verdicts(np.stack([picture("red", "green"), picture("blue", "blue") // 8]), [2, 1])
    assert set(found[0].pop("judged_nouns")) == {"red", "green"}
    assert found[0] == {"judged_count": 1, "judged_setting": "light", "judged_medium": "b"}
    assert found[1]["judged_nouns"] == ["blue"]
    assert found[1]["judged_setting"] == "dark"


def test_left_is_told_from_right(judge):
    images = np.stack([picture("red", "green"), picture("green", "red"), picture("blue", "green")])
    assert judge.left_first(images, ["red", "red", "blue"], ["green", "green", "green"]).tolist() == [True, False, True]


def test_agreement_by_hand(judge):
    asked = [
        {"nouns": ["red", "green"], "count": 1, "setting": "light", "medium": "b", "relation": "left of"},
        {"nouns": ["red", "blue"], "count": 2, "setting": "dark", "medium": "b", "relation": "and"},
    ]
    found = judge.agrees(np.stack([picture("red", "green")] * 2), asked)
    assert found["noun"].tolist() == [1, 0.5]
    assert found["setting"].tolist() == [1, 0]
    assert found["medium"].tolist() == [1, 1]
    assert found["count"].tolist() == [1, 0]
    assert found["order"][0] == 1
    assert np.isnan(found["order"][1])


def test_size_of_the_picture_does_not_matter(judge):
    small = picture("red", "green")
    large = small.repeat(4, axis=0).repeat(4, axis=1)
    np.testing.assert_allclose(judge.see(small[None])["noun"], judge.see(large[None])["noun"], atol=0.05)


def test_folder_without_a_judge_is_named(tmp_path):
    with pytest.raises(ModelNotFoundError, match="holds no judge"):
        Judge.open(tmp_path)
    (tmp_path / "config.json").write_text((REPOSITORY / "data" / "mini" / "vit" / "config.json").read_text())
    with pytest.raises(ModelNotFoundError, match="holds no judge"):
        Judge.open(tmp_path)
