"""Settings: checked, named when refused, never changed in place; profiles are data."""

import ast
import dataclasses
import json
from types import MappingProxyType

import pytest
from conftest import REPOSITORY

from rsdlib import config, files
from rsdlib.config import PROFILES, BackboneConfig, HeadConfig, TrainConfig, as_dict, replace
from rsdlib.errors import ConfigError

SETTINGS = (
    *(config.CleanConfig, config.DataConfig, BackboneConfig, HeadConfig),
    *(config.CurriculumConfig, TrainConfig, config.Profile),
)

# --- checks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epohcs": 3}, "TrainConfig has no setting 'epohcs'. Did you mean 'epochs'"),
        ({"epochs": "3"}, "epochs = '3' is refused: input should be a valid integer"),
        ({"epochs": 3.0}, "epochs = 3.0 is refused: input should be a valid integer"),
        ({"epochs": True}, "epochs = True is refused: input should be a valid integer"),
        ({"epochs": 0}, "epochs = 0 is refused: input should be greater than or equal to 1"),
        ({"epochs": None}, "epochs = None is refused"),
        (
            {"batch_size": 1},
            "batch_size = 1 is refused: input should be greater than or equal to 2",
        ),
        ({"seed": 2**40}, "seed = 1099511627776 is refused: input should be less than or equal to"),
        ({"lr": float("nan")}, "lr = nan is refused"),
        ({"lr": True}, "lr = True is refused"),
        ({"lr": "1e-3"}, "lr = '1e-3' is refused: input should be a valid number"),
        ({"workers": -1}, "workers = -1 is refused"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(ConfigError) as refusal:
        replace(TrainConfig(), **changes)
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize(
    ("kind", "setting", "value", "known"),
    [
        (HeadConfig, "head", "both", "'sequential'"),
        (config.CurriculumConfig, "name", "our", "'ours'"),
        (config.CurriculumConfig, "equal", "time", "'steps'"),
    ],
)
def test_word_that_is_none_of_the_choices_is_refused_with_them(kind, setting, value, known):
    with pytest.raises(ConfigError, match=f"{setting} = '{value}' is refused: .*{known}"):
        kind(**{setting: value})


@pytest.mark.parametrize("names", ["unet", {"unet"}, 3, None])
def test_names_are_a_list_of_them(names):
    """A bare text would be read letter by letter."""
    assert BackboneConfig("timm", "x", frozen=["unet"]).frozen == ("unet",)
    with pytest.raises(ConfigError, match=r"frozen = .* is refused"):
        BackboneConfig("timm", "x", frozen=names)


def test_whole_number_is_the_same_setting_as_a_fraction():
    """1 and 1.0 have one key."""
    whole, fraction = replace(TrainConfig(), lr=1), replace(TrainConfig(), lr=1.0)
    assert files.digest(as_dict(whole)) == files.digest(as_dict(fraction))


def test_setting_that_is_handed_over_twice_or_missing_is_a_config_error():
    with pytest.raises(ConfigError, match="source"):
        config.DataConfig()
    with pytest.raises(ConfigError, match="epochs = 2 is refused: got multiple values"):
        TrainConfig(2, epochs=2)


@pytest.mark.parametrize("name", PROFILES)
def test_settings_come_back_from_json(name):
    profile = PROFILES[name]
    stored = json.loads(json.dumps(as_dict(profile)))
    assert TrainConfig(**stored["train"]) == profile.train
    for backbone, settings in profile.backbones.items():
        assert BackboneConfig(**stored["backbones"][backbone]) == settings
    clean = config.CleanConfig(**stored["data"].pop("clean"))
    assert config.DataConfig(**stored["data"], clean=clean) == profile.data


def test_what_may_change_on_resume_is_all_that_fixed_leaves_out():
    assert as_dict(TrainConfig()).keys() - TrainConfig().fixed().keys() == config.FREE
    assert replace(TrainConfig(), micro_batches=3, workers=1).fixed() == TrainConfig().fixed()
    assert replace(TrainConfig(), seed=1).fixed() != TrainConfig().fixed()


# --- nothing changes in place ---------------------------------------------------------------------


def refuse_changes(value):
    """Try to change `value` and everything that hangs on it in place; return how much there is."""
    if isinstance(value, (str, int, float, type(None))):
        return 1
    if isinstance(value, tuple):
        return 1 + sum(map(refuse_changes, value))
    if isinstance(value, MappingProxyType):
        for name in [*value, "new"]:
            with pytest.raises(TypeError):
                value[name] = None
            with pytest.raises(TypeError):
                del value[name]
        with pytest.raises(TypeError):
            value |= {"new": 1}
        assert not hasattr(value, "update")
        return 1 + sum(map(refuse_changes, value.values()))
    assert isinstance(value, SETTINGS), f"{value!r} may be changed in place"
    names = [field.name for field in dataclasses.fields(value)]
    for name in [*names, "new"]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, None)
        with pytest.raises(dataclasses.FrozenInstanceError):
            delattr(value, name)
    return 1 + sum(refuse_changes(getattr(value, name)) for name in names)


def test_no_profile_can_be_changed_in_place():
    """Fault 6: frozen profiles held dicts, and a notebook wrote into those of `PROFILES`."""
    before = files.digest(as_dict(PROFILES))
    assert refuse_changes(PROFILES) > 200
    assert files.digest(as_dict(PROFILES)) == before


@pytest.mark.parametrize("name", PROFILES)
def test_changed_profile_can_not_be_changed_in_place_either(name):
    profile = config.profile(name, limit=10)
    for backbone in profile.backbones:
        changes = {"options": {"mlp": [8, {"deep": [1]}]}, "frozen": ["unet", ["a"]]}
        refuse_changes(profile.with_backbone(backbone, **changes))


def test_settings_do_not_follow_what_they_were_made_from():
    options, frozen, overrides = {"mlp": [8, 8]}, ["a"], {"vit": {"lr": 1e-3}}
    backbone = BackboneConfig("timm", "x", options=options, frozen=frozen)
    profile = replace(PROFILES["mini"], train_overrides=overrides)
    options["mlp"].append(9)
    options["new"] = 1
    frozen.append("b")
    overrides["vit"]["lr"] = 1.0
    assert as_dict(backbone)["options"] == {"mlp": [8, 8]}
    assert backbone.frozen == ("a",)
    assert profile.training("vit").lr == 1e-3


def test_other_settings_for_one_backbone_leave_all_others_and_the_profile_as_they_were():
    """Fault 6: the next notebook of the same process met the changed profile."""
    profile = config.profile("mini")
    before = as_dict(profile)
    changed = profile.with_backbone("unet", frozen=["unet.conv_in"], pretrained=False)
    assert changed.backbone("unet").frozen == ("unet.conv_in",)
    assert changed.backbone("unet").model == profile.backbone("unet").model
    assert as_dict(profile) == before
    assert config.profile("mini") == profile
    expected = {**before["backbones"], "unet": as_dict(changed.backbone("unet"))}
    assert as_dict(changed) == {**before, "backbones": expected}
    with pytest.raises(ConfigError, match="backbone 'vti' is unknown"):
        profile.with_backbone("vti", pretrained=False)


# --- profiles -------------------------------------------------------------------------------------


def test_profiles_are_data_and_the_paper_is_the_papers():
    assert set(PROFILES) == {"smoke", "mini", "desk", "paper"}
    assert all(profile.name == name for name, profile in PROFILES.items())
    paper = PROFILES["paper"]
    train = paper.training("vit")
    assert (train.epochs, train.batch_size, train.lr) == (3, 64, 1e-4)
    assert (paper.head.weight, paper.data.vocabulary_size) == (0.1, 1000)


def test_profile_changes_as_asked():
    changes = {"near_duplicate": 0.9, "limit": 10, "vocabulary_size": None}
    changed = config.profile("mini", source="elsewhere/pairs", **changes)
    assert changed.data.source == "elsewhere/pairs"
    assert (changed.data.clean.near_duplicate, changed.data.limit) == (0.9, 10)
    mini = config.profile("mini")
    assert changed.data.vocabulary_size == mini.data.vocabulary_size
    assert (changed.generator, changed.published) == ("", "")  # who made other data is not known
    assert replace(changed, data=mini.data, generator=mini.generator, published="figures") == mini


def test_unknown_profile_backbone_or_setting_is_named():
    with pytest.raises(ConfigError, match="Did you mean 'mini'"):
        config.profile("miny")
    with pytest.raises(ConfigError, match="Did you mean 'limit'"):
        config.profile("mini", limits=9)
    with pytest.raises(ConfigError, match="backbone 'vti' is unknown"):
        config.profile("paper").backbone("vti")


def test_any_timm_model_is_a_backbone():
    assert config.profile("mini").backbone("timm:resnet18") == BackboneConfig("timm", "resnet18")


def test_a_backbones_settings_win_over_the_profiles_and_changes_over_both():
    profile = config.profile("mini")
    assert profile.training("vit") == profile.train
    assert profile.training("unet") == replace(profile.train, **profile.train_overrides["unet"])
    changed = profile.training("unet", lr=0.5, seed=3)
    assert (changed.lr, changed.seed) == (0.5, 3)
    assert changed.epochs == profile.train_overrides["unet"]["epochs"]


def asked_names(tree):
    """Return the places that compare with a profile's name, or a profile's name with a text."""
    places = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.match_case):
            sides = [node.pattern]
        elif isinstance(node, ast.Subscript) and is_profiles_name(node.slice):
            sides = [node.slice, node.value]
        else:
            continue
        texts = set().union(*map(texts_of, sides))
        if texts & PROFILES.keys() or (texts and any(map(is_profiles_name, sides))):
            places.append(ast.unparse(node))
    return places


def texts_of(side):
    """Return the texts that a side of a comparison is, or lists; not those within its terms."""
    match side:
        case ast.Constant(value=str(text)):
            return {text}
        case ast.Tuple(elts=sides) | ast.List(elts=sides) | ast.Set(elts=sides):
            return set().union(*map(texts_of, sides))
        case ast.Dict(keys=sides) | ast.MatchOr(patterns=sides):
            return set().union(*map(texts_of, sides))
        case ast.MatchValue(value=value):
            return texts_of(value)
    return set()


def is_profiles_name(node):
    """Tell whether an expression reads ``profile.name``, however the profile is reached."""
    if not (isinstance(node, ast.Attribute) and node.attr == "name"):
        return False
    return ast.unparse(node.value).split(".")[-1].split("(")[0].endswith("profile")


@pytest.mark.parametrize(
    "code",
    [
        "if profile == 'mini': pass",
        "x = 1 if 'paper' != name else 2",
        "name in ('smoke', 'mini')",
        "prepared.profile.name == 'huge'",
        "config.profile(x).name in {'a', 'b'}",
        "match name:\n    case 'mini': pass",
        "{'mini': 1}[profile.name]",
    ],
)
def test_asking_for_a_profiles_name_is_noticed(code):
    assert asked_names(ast.parse(code))


@pytest.mark.parametrize(
    "code",
    ["row['paper'] is None", "runs[profile.name]", "a == profile.name", "x.name == 'mini.csv'"],
)
def test_using_a_profiles_name_is_no_asking(code):
    assert not asked_names(ast.parse(code))


def test_no_profile_name_is_asked_for_outside_config():
    """Sizes are data: what differs between them is a setting."""
    sources = [path for path in (REPOSITORY / "rsdlib").rglob("*.py") if path.name != "config.py"]
    assert len(sources) > 20
    for path in sources:
        assert not asked_names(ast.parse(path.read_text())), path.name
