"""The paper's curriculum and the two it is compared with."""

import functools
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
import toy
from torch import nn

from rsdlib import files, training
from rsdlib.config import CurriculumConfig, replace
from rsdlib.data import weights_key
from rsdlib.errors import BadValueError, ConfigError
from rsdlib.models import PromptRegressor
from rsdlib.training import CBS, LeRaC, curriculum

HARDNESS = np.random.default_rng(0).random(100)

# --- difficulty -----------------------------------------------------------------------------------


def test_difficulty_by_hand():
    history = [[0.0, 0.6], [0.5, 0.5], [np.nan, 0.2]]
    expected = [1 - (0 + 2 * 0.6) / 3, 0.5, 0.8]
    np.testing.assert_allclose(training.difficulty(history), expected)


def test_later_epochs_weigh_more():
    rising, falling = training.difficulty([[0.1, 0.5, 0.9], [0.9, 0.5, 0.1]])
    assert rising < 0.5 < falling


@pytest.mark.parametrize("epochs", [1, 2, 5, 9])
def test_difficulty_takes_any_number_of_epochs(epochs):
    """D5: literal lists of weights fitted one number alone."""
    constant = np.tile(HARDNESS[:, None], (1, epochs))
    np.testing.assert_allclose(training.difficulty(1 - constant), HARDNESS)


def test_pair_that_was_never_seen_is_named():
    with pytest.raises(BadValueError, match="pair 1"):
        training.difficulty([[0.5, 0.5], [np.nan, np.nan]])


def test_difficulty_of_a_run_belongs_to_its_rows(tmp_path):
    table = training.load_run(toy.fit(tmp_path / "run")).difficulty
    np.testing.assert_array_equal(np.sort(table["row"]), np.arange(50))
    hardness = training.hardness_of(table["row"], table.sample(frac=1, random_state=0))
    expected = training.difficulty(table[["epoch_1", "epoch_2", "epoch_3"]].to_numpy())
    np.testing.assert_allclose(hardness, expected)


def test_eleventh_epoch_comes_after_the_second():
    table = pd.DataFrame({"row": [0], **{f"epoch_{t}": [0.0] for t in range(1, 12)}})
    table["epoch_11"] = 1.0
    np.testing.assert_allclose(training.hardness_of([0], table), 1 - 11 / 66)


# --- stages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 7, 100])
def test_stages_are_nested_and_in_order(k):
    nested = training.stages(HARDNESS, k)
    assert len(nested) == k
    assert sorted(nested[-1]) == list(range(100))
    for stage, following in itertools.pairwise(nested):
        np.testing.assert_array_equal(stage, following[: len(stage)])
        assert len(stage) < len(following)
    assert (np.diff(HARDNESS[nested[-1]]) >= 0).all()


def test_stages_hold_the_easiest_pairs():
    """D1: a shuffling split after sorting made every stage a random part."""
    easy = training.stages(HARDNESS, 3)[0]
    assert HARDNESS[easy].max() <= np.delete(HARDNESS, easy).min()


def test_equally_hard_pairs_keep_their_order():
    np.testing.assert_array_equal(training.stages(np.zeros(9), 3)[-1], np.arange(9))


def test_levels_are_thirds_in_order():
    level = curriculum.levels(HARDNESS)
    parts = [HARDNESS[level == name] for name in ("easy", "medium", "hard")]
    assert [len(part) for part in parts] == [34, 33, 33]
    for lower, upper in itertools.pairwise(parts):
        assert lower.max() <= upper.min()


@pytest.mark.parametrize("k", [0, 101])
def test_stages_that_do_not_fit_are_refused(k):
    with pytest.raises(BadValueError, match="stages"):
        training.stages(HARDNESS, k)


@pytest.mark.parametrize(("epochs", "k"), [(3, 3), (6, 3), (8, 3), (1, 3), (5, 2), (4, 1)])
def test_equal_epochs_or_equal_steps(epochs, k):
    rows = np.arange(1000, 1100)
    by_epochs = training.growing(rows, HARDNESS, epochs, k)
    assert sum(stage.epochs for stage in by_epochs) == max(epochs, k)
    by_steps = training.growing(rows, HARDNESS, epochs, k, equal="steps")
    visits = sum(len(stage.rows) * stage.epochs for stage in by_steps)
    if epochs >= k:
        assert abs(visits - 100 * epochs) <= 1
    for plan in (by_epochs, by_steps):
        np.testing.assert_array_equal(plan[0].rows, rows[training.stages(HARDNESS, k)[0]])
    with pytest.raises(ConfigError, match="equal"):
        training.growing(rows, HARDNESS, epochs, k, equal="time")


# --- what order adds, what selection adds ---------------------------------------------------------

ROWS = np.random.default_rng(1).permutation(np.arange(1000, 1100))
RANK = HARDNESS.argsort().argsort()


def visits(plan):
    """Return how often each of `ROWS` is read."""
    read = np.concatenate([np.tile(stage.rows, stage.epochs) for stage in plan])
    assert np.isin(read, ROWS).all()
    return (read[:, None] == ROWS).sum(axis=0)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_another_order_has_the_same_sizes_and_steps(k):
    """The order reversed, or a random one, is the paper's plan with another difficulty."""
    chance = np.random.default_rng(2).random(100)
    plans = [
        training.growing(ROWS, order, 6, k, "steps") for order in (HARDNESS, -HARDNESS, chance)
    ]
    for plan in plans[1:]:
        assert [len(stage.rows) for stage in plan] == [len(stage.rows) for stage in plans[0]]
        assert [stage.epochs for stage in plan] == [stage.epochs for stage in plans[0]]
    assert len({training.Plan(plan, toy.CONFIG).total for plan in plans}) == 1
    easy, hard = (set(plan[0].rows.tolist()) for plan in plans[:2])
    assert bool(easy & hard) == (k == 1)


@pytest.mark.parametrize(("epochs", "share"), [(3, 0.1), (6, 0.1), (4, 0.25), (1, 0.5), (2, 0.0)])
def test_without_the_hardest_the_others_come_more_often(epochs, share):
    plan = curriculum.without_hardest(ROWS, HARDNESS, epochs, share)
    read = visits(plan)
    left_out = round(100 * (1 - share)) <= RANK
    np.testing.assert_array_equal(read == 0, left_out)
    assert np.ptp(read[~left_out]) <= 1
    assert abs(read.sum() - epochs * 100) <= 1
    np.testing.assert_array_equal(plan[0].rows, ROWS[~left_out])  # in no order of difficulty


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_all_pairs_cannot_be_left_out(share):
    with pytest.raises(BadValueError, match=r"share .* cannot be left out"):
        curriculum.without_hardest(ROWS, HARDNESS, 3, share)


def test_shuffled_visits_each_pair_as_often_and_in_no_order():
    ours = training.growing(ROWS, HARDNESS, 3, 3, "steps")
    mixed = curriculum.shuffled(ours, seed=4)
    np.testing.assert_array_equal(visits(mixed), visits(ours))
    assert [stage.epochs for stage in mixed] == [1] * sum(stage.epochs for stage in ours)
    assert all(len(set(stage.rows.tolist())) == len(stage.rows) for stage in mixed)
    hard = ROWS[RANK >= 67]
    assert not np.isin(hard, ours[0].rows).any()
    assert np.isin(hard, mixed[0].rows).mean() == pytest.approx(0.5, abs=0.2)  # 2 of 4 epochs


def test_shuffled_is_a_function_of_the_plan_and_the_seed():
    ours = training.growing(ROWS, HARDNESS, 3, 3, "steps")
    once, again, other = (curriculum.shuffled(ours, seed) for seed in (0, 0, 1))
    assert all(map(np.array_equal, [s.rows for s in once], [s.rows for s in again]))
    assert not all(map(np.array_equal, [s.rows for s in once], [s.rows for s in other]))


def test_curriculum_validates_on_the_same_rows_and_never_raises_the_rate(tmp_path):
    """D2: validation rows are the data's own. D7: the cosine spans all stages."""
    data = toy.data()
    plain = training.load_run(toy.fit(tmp_path / "plain"))
    rows = plain.difficulty["row"].to_numpy()
    stages = training.growing(rows, training.hardness_of(rows, plain.difficulty), 6)
    trained, rates = set(), []

    class Watch(training.Callback):
        def before_step(self, state):
            trained.update(next(state.plan.batches(state.step)).tolist())
            rates.append(state.plan.lr_factor(state.step))

    folder = toy.fit(tmp_path / "ours", stages=stages, callbacks=[Watch()])
    assert not trained & set(data.val.tolist())
    assert trained == set(data.train.tolist())
    assert len(rates) == training.Plan(stages, toy.CONFIG).total
    warm = int(toy.CONFIG.warmup * len(rates))
    assert (np.diff(rates[warm:]) <= 0).all()
    assert rates[-1] < 0.02
    assert len(training.load_run(folder).metrics.dropna(subset="val_similarity")) == 6


# --- curriculum by smoothing ----------------------------------------------------------------------


class Convolutional(nn.Module):
    """A convolution on the toy's images, so that there is a map to blur."""

    features = 16

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Linear(128, 16)

    def forward(self, images):
        return self.body(torch.relu(self.conv(images.float() / 255)).flatten(1))


def convolutional():
    torch.manual_seed(0)
    return PromptRegressor(Convolutional(), "sequential", 20, 12)


def random_maps(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def blurred_as(layout, maps, sigma):
    """Blur maps (b, c, h, h) in another layout, with a class token before tokens."""
    if layout == curriculum.CHANNELS_LAST:
        last = curriculum.smoothed(maps.permute(0, 2, 3, 1), sigma, layout)
        return last.permute(0, 3, 1, 2)
    tokens = torch.cat([torch.ones(len(maps), 1, maps.shape[1]), maps.flatten(2).mT], dim=1)
    blurred = curriculum.smoothed(tokens, sigma, layout)
    assert torch.equal(blurred[:, 0], tokens[:, 0])  # it is no place in the picture
    return blurred[:, 1:].mT.unflatten(2, maps.shape[2:])


LAYOUTS = (curriculum.CHANNELS_FIRST, curriculum.CHANNELS_LAST, curriculum.TOKENS)
SHAPES = ((2, 5, 8, 8), (2, 8, 8, 5), (2, 65, 5))


@pytest.mark.parametrize(("layout", "shape"), [*zip(LAYOUTS, SHAPES, strict=True)])
def test_blur_keeps_constants_and_smooths_the_rest(layout, shape):
    constant, rough = torch.full(shape, 0.7), random_maps(*shape)
    torch.testing.assert_close(curriculum.smoothed(constant, 1.0, layout), constant)
    assert curriculum.smoothed(rough, 1.0, layout).shape == rough.shape
    assert curriculum.smoothed(rough, 1.0, layout).std() < 0.7 * rough.std()
    torch.testing.assert_close(curriculum.smoothed(rough, 0.1, layout), rough)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("channels", [5, 8])
def test_blur_is_the_same_in_every_layout(layout, channels):
    """The layout was guessed from the shape: eight channels of 8 x 8 last passed for first."""
    maps = random_maps(2, channels, 8, 8)
    expected = curriculum.smoothed(maps, 0.8, curriculum.CHANNELS_FIRST)
    torch.testing.assert_close(blurred_as(layout, maps, 0.8), expected)


def test_maps_whose_sides_look_like_channels_are_blurred_along_their_sides():
    """The layout was guessed from the shape: (b, c, h, w) with c = h passed for (b, h, w, c)."""
    maps = random_maps(2, 8, 8, 6)
    blurred = curriculum.smoothed(maps, 0.8, curriculum.CHANNELS_FIRST)
    for channel in range(8):
        alone = curriculum.smoothed(maps[:, [channel]], 0.8, curriculum.CHANNELS_FIRST)
        torch.testing.assert_close(blurred[:, [channel]], alone)


def test_blur_is_a_gaussian():
    maps = random_maps(2, 5, 8, 8)
    line = np.exp(-0.5 * np.array([1, 0, 1]) / 0.8**2)
    kernel = np.outer(line, line) / line.sum() ** 2
    by_hand = (maps[0, 0, 2:5, 2:5].double().numpy() * kernel).sum()
    blurred = curriculum.smoothed(maps, 0.8, curriculum.CHANNELS_FIRST)
    assert float(blurred[0, 0, 3, 3]) == pytest.approx(by_hand, abs=1e-6)


def test_cbs_blurs_less_and_less(tmp_path):
    sigmas = []

    class Watch(CBS):
        def before_step(self, state):
            super().before_step(state)
            sigmas.append(self.sigma)

    toy.train(convolutional(), tmp_path, callbacks=[Watch(falls=4)])
    assert sigmas[0] == 1.0
    assert (np.diff(sigmas) <= 0).all()
    assert len(set(sigmas)) == 4


@pytest.mark.parametrize("stop", [None, 9])
def test_cbs_is_taken_off_again_whatever_ends_the_run(tmp_path, stop):
    model, callbacks = convolutional(), [CBS()]
    if stop is None:
        toy.train(model, tmp_path, callbacks=callbacks)
    else:
        with pytest.raises(toy.Stop):
            toy.train(model, tmp_path, callbacks=[*callbacks, toy.StopAt(stop)])
    assert not model.backbone.conv._forward_hooks


def test_cbs_blurs_in_training_alone():
    model, blur = convolutional(), CBS()
    images = toy.data().batch(np.arange(4))["input"]
    with torch.no_grad():
        expected = model.backbone.conv(images.float())
    hook = functools.partial(blur._blur, curriculum.CHANNELS_FIRST)
    model.backbone.conv.register_forward_hook(hook)
    blur.sigma = 1.0
    with torch.no_grad():
        blurred = model.train().backbone.conv(images.float())
        as_it_is = model.eval().backbone.conv(images.float())
    torch.testing.assert_close(
        blurred, curriculum.smoothed(expected, 1.0, curriculum.CHANNELS_FIRST)
    )
    torch.testing.assert_close(as_it_is, expected)


def test_cbs_changes_training_and_no_blur_changes_nothing(tmp_path):
    def fit(name, callbacks):
        model = convolutional()
        toy.train(model, tmp_path / name, callbacks=callbacks)
        return weights_key(model)

    plain = fit("plain", [])
    assert fit("none", [CBS(sigma=0.0)]) == plain
    assert fit("blurred", [CBS()]) != plain


def test_cbs_says_where_it_can_not_smooth(tmp_path):
    with pytest.raises(ConfigError, match="no feature maps"):
        toy.fit(tmp_path, callbacks=[CBS()])


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN = {
    **{"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 24},
    **{"depths": (1, 1), "num_heads": (2, 4)},
}


@pytest.mark.parametrize(
    ("name", "options", "kind", "layout"),
    [
        ("vit_tiny_patch16_224", VIT, "Block", curriculum.TOKENS),
        ("swinv2_tiny_window8_256", SWIN, "SwinTransformerV2Block", curriculum.CHANNELS_LAST),
        ("resnet18", {}, "Conv2d", curriculum.CHANNELS_FIRST),
    ],
)
def test_cbs_knows_the_maps_of_each_kind_of_backbone(name, options, kind, layout):
    """Each map has its channels where its layout says, and its shape survives the blur."""
    import timm

    model = timm.create_model(name, num_classes=0, **options)
    places = curriculum.feature_maps(model)
    assert {type(module).__name__ for module in places} == {kind}
    assert set(places.values()) == {layout}
    assert len(places) >= 2
    maps = []
    for module in places:
        module.register_forward_hook(lambda _, __, output: maps.append(output))
    model(torch.zeros(2, 3, 32, 32))
    assert len(maps) == len(places)
    for output in maps:
        assert curriculum.smoothed(output, 1.0, layout).shape == output.shape
        if layout != curriculum.TOKENS:
            height, width = output.shape[1:3] if layout == LAYOUTS[1] else output.shape[2:]
            assert height == width


# --- LeRaC ----------------------------------------------------------------------------------------


def test_lerac_starts_deep_layers_slowly_and_lets_all_meet(tmp_path):
    scales = []

    class Watch(LeRaC):
        def before_step(self, state):
            super().before_step(state)
            groups = state.optimizer.param_groups
            scales.append({group["depth"]: group["lr_scale"] for group in groups})

    toy.fit(tmp_path, callbacks=[Watch(lowest=1e-2, until=0.5)])
    depths = sorted(scales[0])
    assert (depths[0], depths[-1]) == (0, 1)
    assert scales[0][0] == 1
    assert scales[0][1] == pytest.approx(1e-2)
    for before, after in itertools.pairwise(scales):
        assert all(before[depth] <= after[depth] + 1e-12 for depth in depths)
        ordered = [before[depth] for depth in depths]
        assert ordered == sorted(ordered, reverse=True)
    assert all(scale == pytest.approx(1) for scale in scales[len(scales) // 2 + 1].values())


def test_lerac_keeps_every_parameter_and_its_decay(tmp_path):
    model, decays = toy.model(), {}

    class Watch(LeRaC):
        def before_step(self, state):
            super().before_step(state)
            for group in state.optimizer.param_groups:
                decays.update(dict.fromkeys(group["params"], group["weight_decay"]))

    toy.train(model, tmp_path, callbacks=[Watch()])
    assert set(decays) == set(model.parameters())
    for parameter, decay in decays.items():
        assert decay == (toy.CONFIG.weight_decay if parameter.ndim >= 2 else 0)


def test_layers_count_modules_from_the_input():
    model = toy.model()
    depth = curriculum.layers(model)
    in_order = (model.backbone.body[1], model.embedding_head, model.vocabulary_head)
    assert [depth[module.weight] for module in in_order] == [0, 1, 2]
    assert all(depth[module.weight] == depth[module.bias] for module in in_order)


# --- all of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: CBS(sigma=0.5), LeRaC])
@pytest.mark.parametrize("step", [5, 11])
def test_stopped_and_resumed_is_the_whole_run(tmp_path, make, step):
    with pytest.raises(toy.Stop):
        toy.train(convolutional(), tmp_path / "b", callbacks=[make(), toy.StopAt(step)])
    toy.train(convolutional(), tmp_path / "b", callbacks=[make()])
    whole = toy.train(convolutional(), tmp_path / "a", callbacks=[make()])
    assert toy.fingerprint(tmp_path / "b") == toy.fingerprint(whole)


def test_siblings_change_what_is_learnt(tmp_path):
    config = replace(toy.CONFIG, epochs=2)
    keys = set()
    for name, callbacks in (("none", []), ("lerac", [LeRaC()]), ("cbs", [CBS()])):
        model = convolutional()
        toy.train(model, tmp_path / name, config, callbacks=callbacks)
        keys.add(files.digest(weights_key(model)))
    assert len(keys) == 3


def history(rows):
    """Return a run's table of difficulties in which row r has 1 - r / 1000 in one epoch."""
    return pd.DataFrame({"row": rows, "epoch_1": 1 - np.asarray(rows) / 1000})


@pytest.mark.parametrize(
    ("name", "kind", "attributes"),
    [
        ("none", None, {}),
        ("cbs", CBS, {"first": 0.7, "decay": 0.3, "falls": 5}),
        ("lerac", LeRaC, {"lowest": 0.02, "until": 0.4}),
    ],
)
def test_regime_without_stages_reads_all_rows_in_every_epoch(name, kind, attributes):
    settings = {"sigma": 0.7, "decay": 0.3, "falls": 5, "lowest": 0.02, "until": 0.4}
    stages, callbacks = training.regime(CurriculumConfig(name, **settings), [5, 3, 9], 4)
    assert [(stage.rows.tolist(), stage.epochs) for stage in stages] == [([5, 3, 9], 4)]
    assert [type(callback) for callback in callbacks] == ([kind] if kind else [])
    for callback in callbacks:
        assert {attribute: getattr(callback, attribute) for attribute in attributes} == attributes


@pytest.mark.parametrize("equal", ["epochs", "steps"])
def test_regime_of_the_paper_is_the_growing_plan(equal):
    rows = np.random.default_rng(0).permutation(np.arange(100, 130))
    config = CurriculumConfig("ours", stages=3, equal=equal)
    stages, callbacks = training.regime(config, rows, 6, history(np.arange(200)))
    expected = training.growing(rows, rows, 6, 3, equal)
    assert not callbacks
    assert len(stages) == len(expected)
    for stage, other in zip(stages, expected, strict=True):
        np.testing.assert_array_equal(stage.rows, other.rows)
        assert stage.epochs == other.epochs


def test_hardness_belongs_to_the_rows_asked_for():
    rows = np.array([7, 2, 40])
    known = np.random.default_rng(0).permutation(50)
    np.testing.assert_allclose(training.hardness_of(rows, history(known)), rows / 1000)


def test_rows_without_difficulty_are_named():
    with pytest.raises(BadValueError, match=r"rows without difficulty.*60"):
        training.hardness_of(np.array([3, 60, 61]), history(np.arange(50)))
