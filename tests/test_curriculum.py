"""The paper's curriculum and the two it is compared with."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
import toy
from torch import nn

from rsdlib import curriculum, runtime, training
from rsdlib.config import replace
from rsdlib.errors import BadValueError, ConfigError

RNG = np.random.default_rng(0)
HARDNESS = RNG.random(100)


# Difficulty


def test_difficulty_by_hand():
    history = [[0.0, 0.6], [0.5, 0.5], [np.nan, 0.2]]
    np.testing.assert_allclose(curriculum.difficulty(history), [1 - (0 + 2 * 0.6) / 3, 0.5, 0.8])


def test_later_epochs_weigh_more():
    rising, falling = curriculum.difficulty([[0.1, 0.5, 0.9], [0.9, 0.5, 0.1]])
    assert rising < 0.5 < falling


@pytest.mark.parametrize("epochs", [1, 2, 5, 9])
def test_difficulty_takes_any_number_of_epochs(epochs):  # D5: literal lists of weights fitted one number alone
    constant = np.tile(HARDNESS[:, None], (1, epochs))
    np.testing.assert_allclose(curriculum.difficulty(1 - constant), HARDNESS)


def test_pair_that_was_never_seen_is_named():
    with pytest.raises(BadValueError, match="pair 1"):
        curriculum.difficulty([[0.5, 0.5], [np.nan, np.nan]])


def test_difficulty_of_a_run_belongs_to_its_rows(tmp_path):
    folder = toy.fit(tmp_path / "run")
    table = pd.read_parquet(folder / "difficulty.parquet")
    rows, hardness = curriculum.run_difficulty(table.sample(frac=1, random_state=0))
    order = np.argsort(rows)
    np.testing.assert_array_equal(rows[order], np.arange(50))
    np.testing.assert_allclose(hardness[order], curriculum.difficulty(table[["epoch_1", "epoch_2", "epoch_3"]].to_numpy()))


def test_eleventh_epoch_comes_after_the_second():
    table = pd.DataFrame({"row": [0], **{f"epoch_{t}": [0.0] for t in range(1, 12)}})
    table["epoch_11"] = 1.0
    np.testing.assert_allclose(curriculum.run_difficulty(table)[1], 1 - 11 / 66)


# Stages


@pytest.mark.parametrize("k", [1, 2, 3, 7, 100])
def test_stages_are_nested_and_in_order(k):
    found = curriculum.stages(HARDNESS, k)
    assert len(found) == k
    assert sorted(found[-1]) == list(range(100))
    for stage, following in itertools.pairwise(found):
        np.testing.assert_array_equal(stage, following[: len(stage)])
        assert len(stage) < len(following)
    assert (np.diff(HARDNESS[found[-1]]) >= 0).all()


def test_stages_hold_the_easiest_pairs():
    """D1: a shuffling split after sorting made every stage a random part; then this mean would be about the mean of all."""
    easy = curriculum.stages(HARDNESS, 3)[0]
    assert HARDNESS[easy].max() <= np.delete(HARDNESS, easy).min()
    shuffled = RNG.permutation(100)[: len(easy)]
    assert HARDNESS[easy].mean() < HARDNESS[shuffled].mean() - 0.2


def test_levels_are_thirds_in_order():
    found = curriculum.levels(HARDNESS)
    means = [HARDNESS[found == name].mean() for name in ("easy", "medium", "hard")]
    assert means == sorted(means)
    assert [int((found == name).sum()) for name in ("easy", "medium", "hard")] == [34, 33, 33]


@pytest.mark.parametrize("k", [0, 101])
def test_stages_that_do_not_fit_are_refused(k):
    with pytest.raises(BadValueError, match="stages"):
        curriculum.stages(HARDNESS, k)


@pytest.mark.parametrize(("epochs", "k"), [(3, 3), (6, 3), (8, 3), (1, 3), (5, 2), (4, 1)])
def test_equal_epochs_or_equal_steps(epochs, k):
    rows = np.arange(1000, 1100)
    by_epochs = curriculum.growing(rows, HARDNESS, epochs, k)
    assert sum(stage.epochs for stage in by_epochs) == max(epochs, k)
    by_steps = curriculum.growing(rows, HARDNESS, epochs, k, equal="steps")
    visits = sum(len(stage.rows) * stage.epochs for stage in by_steps)
    if epochs >= k:
        assert abs(visits - 100 * epochs) <= 1
    for plan in (by_epochs, by_steps):
        np.testing.assert_array_equal(plan[0].rows, rows[curriculum.stages(HARDNESS, k)[0]])
    with pytest.raises(ConfigError, match="equal"):
        curriculum.growing(rows, HARDNESS, epochs, k, equal="time")


def test_curriculum_run_validates_on_the_same_rows_and_never_raises_the_rate(tmp_path):
    """D2: validation rows are the data's own. D7: the cosine spans all stages instead of the first one's steps times the epochs."""
    data = toy.data()
    rows, hardness = curriculum.run_difficulty(pd.read_parquet(toy.fit(tmp_path / "vanilla") / "difficulty.parquet"))
    seen = set()

    class Watch(training.Callback):
        def before_step(self, state):
            seen.update(state.plan.rows(state.step).tolist())

    plan = curriculum.growing(rows, hardness, 6)
    folder = training.fit(
        toy.model(), data, toy.CONFIG, tmp_path / "cl", objective=toy.JointObjective(), stages=plan, callbacks=[Watch()]
    )
    assert not seen & set(data.val.tolist())
    assert seen == set(data.train.tolist())
    rates = [training.Plan(plan, toy.CONFIG).lr_factor(step) for step in range(training.Plan(plan, toy.CONFIG).total)]
    warm = int(toy.CONFIG.warmup * len(rates))
    assert (np.diff(rates[warm:]) <= 0).all()
    assert rates[-1] < 0.02
    assert len(training.load_run(folder).metrics.dropna(subset="val_similarity")) == 6


# Curriculum by Smoothing


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
    return toy.PromptRegressor(Convolutional(), "sequential", 20, 12)


@pytest.mark.parametrize("shape", [(2, 5, 8, 8), (2, 8, 8, 5), (2, 64, 5), (2, 65, 5)])
def test_blur_keeps_constants_and_smooths_the_rest(shape):
    constant = torch.full(shape, 0.7)
    torch.testing.assert_close(curriculum.smoothed(constant, 1.0), constant)
    rough = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert curriculum.smoothed(rough, 1.0).shape == rough.shape
    assert curriculum.smoothed(rough, 1.0).std() < 0.7 * rough.std()
    torch.testing.assert_close(curriculum.smoothed(rough, 0.1), rough)
    if shape[1] == 65:  # the class token is no place in the picture
        torch.testing.assert_close(curriculum.smoothed(rough, 1.0)[:, 0], rough[:, 0])


def test_blur_is_a_gaussian_in_every_layout():
    maps = torch.randn(2, 5, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = curriculum.smoothed(maps, 0.8)
    last = curriculum.smoothed(maps.permute(0, 2, 3, 1), 0.8).permute(0, 3, 1, 2)
    tokens = curriculum.smoothed(maps.flatten(2).transpose(1, 2), 0.8).transpose(1, 2).unflatten(2, (8, 8))
    torch.testing.assert_close(last, expected)
    torch.testing.assert_close(tokens, expected)
    weights = np.exp(-0.5 * np.array([1, 0, 1]) / 0.8**2)
    weights = np.outer(weights, weights) / weights.sum() ** 2
    by_hand = (maps[0, 0, 2:5, 2:5].double().numpy() * weights).sum()
    assert float(expected[0, 0, 3, 3]) == pytest.approx(by_hand, abs=1e-6)


def test_cbs_blurs_less_and_less_and_only_in_training(tmp_path):
    sigmas = []

    class Watch(curriculum.CBS):
        def before_step(self, state):
            super().before_step(state)
            sigmas.append(self.sigma)

    model = convolutional()
    training.fit(model, toy.data(), toy.CONFIG, tmp_path, objective=toy.JointObjective(), callbacks=[Watch(falls=4)])
    assert sigmas[0] == 1.0
    assert (np.diff(sigmas) <= 0).all()
    assert len(set(sigmas)) == 4
    assert not model.backbone.conv._forward_hooks


def test_cbs_changes_training_and_no_blur_changes_nothing(tmp_path):
    def fit(name, callbacks):
        model = convolutional()
        training.fit(model, toy.data(), toy.CONFIG, tmp_path / name, objective=toy.JointObjective(), callbacks=callbacks)
        return training.weights_key(model)

    plain = fit("plain", [])
    assert fit("none", [curriculum.CBS(sigma=0.0)]) == plain
    assert fit("blurred", [curriculum.CBS()]) != plain


def test_cbs_says_where_it_can_not_smooth(tmp_path):
    with pytest.raises(ConfigError, match="no feature maps"):
        toy.fit(tmp_path, callbacks=[curriculum.CBS()])


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}, "Block"),
        (
            "swinv2_tiny_window8_256",
            {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4)},
            "SwinTransformerV2Block",
        ),
        ("resnet18", {}, "Conv2d"),
    ],
)
def test_cbs_knows_the_maps_of_each_kind_of_backbone(name, options, kind):
    import timm

    model = timm.create_model(name, num_classes=0, **options)
    places = curriculum.feature_maps(model)
    assert {type(place).__name__ for place in places} == {kind}
    assert len(places) >= 2
    shapes = []
    for place in places:
        place.register_forward_hook(lambda _, __, output: shapes.append(curriculum.smoothed(output, 1.0).shape == output.shape))
    model(torch.zeros(2, 3, 32, 32))
    assert all(shapes)
    assert len(shapes) == len(places)


# LeRaC


def test_lerac_starts_deep_layers_slowly_and_lets_all_meet(tmp_path):
    scales = []

    class Watch(curriculum.LeRaC):
        def before_step(self, state):
            super().before_step(state)
            scales.append({g["depth"]: g["lr_scale"] for g in state.optimizer.param_groups})

    toy.fit(tmp_path, callbacks=[Watch(lowest=1e-2, until=0.5)])
    depths = sorted(scales[0])
    assert depths[0] == 0
    assert depths[-1] == 1
    assert scales[0][0] == 1
    assert scales[0][1] == pytest.approx(1e-2)
    for before, after in itertools.pairwise(scales):
        assert all(before[d] <= after[d] + 1e-12 for d in depths)
        assert [before[d] for d in depths] == sorted((before[d] for d in depths), reverse=True)
    assert all(scale == pytest.approx(1) for scale in scales[len(scales) // 2 + 1].values())


def test_lerac_keeps_every_parameter_and_its_decay(tmp_path):
    model, found = toy.model(), {}

    class Watch(curriculum.LeRaC):
        def before_step(self, state):
            super().before_step(state)
            found.update({p: g["weight_decay"] for g in state.optimizer.param_groups for p in g["params"]})

    training.fit(model, toy.data(), toy.CONFIG, tmp_path, objective=toy.JointObjective(), callbacks=[Watch()])
    assert set(found) == set(model.parameters())
    assert all(decay == (toy.CONFIG.weight_decay if p.ndim >= 2 else 0) for p, decay in found.items())


def test_layers_count_modules_from_the_input():
    depth = curriculum.layers(toy.model())
    model = toy.model()
    depth = curriculum.layers(model)
    linear, embedding, words = model.backbone.body[1], model.embedding_head, model.vocabulary_head
    assert [depth[m.weight] for m in (linear, embedding, words)] == [0, 1, 2]
    assert all(depth[m.weight] == depth[m.bias] for m in (linear, embedding, words))


@pytest.mark.parametrize("make", [lambda: curriculum.CBS(sigma=0.5), curriculum.LeRaC])
@pytest.mark.parametrize("step", [5, 11])
def test_stopped_and_resumed_is_the_whole_run(tmp_path, make, step):
    def fit(folder, callbacks):
        return training.fit(convolutional(), toy.data(), toy.CONFIG, folder, objective=toy.JointObjective(), callbacks=callbacks)

    class Stop(training.Callback):
        def before_step(self, state):
            if state.step == step:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "b", [make(), Stop()])
    fit(tmp_path / "b", [make()])
    assert toy.fingerprint(tmp_path / "b") == toy.fingerprint(fit(tmp_path / "a", [make()]))


def test_siblings_change_what_is_learnt(tmp_path):
    base = replace(toy.CONFIG, epochs=2)
    keys = set()
    for name, callbacks in (("none", []), ("lerac", [curriculum.LeRaC()]), ("cbs", [curriculum.CBS()])):
        model = convolutional()
        training.fit(model, toy.data(), base, tmp_path / name, objective=toy.JointObjective(), callbacks=callbacks)
        keys.add(runtime.digest(training.weights_key(model)))
    assert len(keys) == 3
