"""Scores: identities, chance, and refusals instead of NaN."""

import numpy as np
import pytest

from rsdlib import data
from rsdlib.analysis import metrics
from rsdlib.errors import BadValueError

rng = np.random.default_rng(0)


def unit(n, d=8):
    rows = rng.normal(size=(n, d))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_paper_score_has_one_home():
    assert metrics.cosine is data.cosine


def test_cosine_identities():
    x = rng.normal(size=(20, 8))
    np.testing.assert_allclose(metrics.cosine(x, x), 1)
    np.testing.assert_allclose(metrics.cosine(x, -3 * x), -1)
    y = rng.normal(size=(20, 8))
    loop = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(metrics.cosine(x, y), loop)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_rows_without_direction_are_named(value):
    x = unit(5)
    x[3] = value
    with pytest.raises(BadValueError, match="row 3 of target"):
        metrics.cosine(unit(5), x)


def test_shapes_must_agree():
    with pytest.raises(BadValueError, match="shape"):
        metrics.cosine(unit(5, 8), unit(5, 7))
    with pytest.raises(BadValueError, match="dimensions"):
        metrics.cosine(np.ones(4), np.ones(4))


def test_interval_covers_the_true_mean_about_95_times_in_100():
    estimates = [metrics.bootstrap_ci(rng.normal(size=60), resamples=500) for _ in range(200)]
    hits = [estimate.low <= 0 <= estimate.high for estimate in estimates]
    assert 0.88 <= np.mean(hits) <= 0.99


def test_groups_widen_the_interval():
    values = np.repeat(rng.normal(size=40), 10)
    alone = metrics.bootstrap_ci(values)
    grouped = metrics.bootstrap_ci(values, groups=np.repeat(np.arange(40), 10))
    assert alone.mean == pytest.approx(grouped.mean)
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)


def test_paired_test_finds_a_shift_and_nothing_in_noise():
    a = rng.normal(size=200)
    assert metrics.paired_test(a + 0.3 + 0.1 * rng.normal(size=200), a).p < 0.001
    noise = rng.normal(size=(200, 30))
    p = [metrics.paired_test(a[:30], a[:30] + noise, resamples=300).p for noise in noise]
    assert 0.01 < np.mean(np.array(p) < 0.05) < 0.11
    assert metrics.paired_test(a, a).p == 1


# --- several trainings ----------------------------------------------------------------------------


def width(estimate):
    return estimate.high - estimate.low


GROUPS = np.arange(300) % 120


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_one_training_in_a_row_is_one_training(groups):
    a, b = rng.normal(size=(2, 300))
    assert metrics.bootstrap_ci(a[None], groups=groups) == metrics.bootstrap_ci(a, groups=groups)
    pairs = metrics.paired_test(a[None], b[None], groups=groups)
    assert pairs == metrics.paired_test(a, b, groups=groups)
    assert pairs.difference.trainings == 1


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_trainings_that_agree_add_nothing(groups):
    """To the interval, which is that of one of them, or to the p-value."""
    a, b = rng.normal(size=(2, 300))
    thrice = metrics.bootstrap_ci(np.tile(a, (3, 1)), groups=groups)
    once = metrics.bootstrap_ci(a, groups=groups)
    assert (thrice.n, thrice.trainings) == (300, 3)
    bounds = [thrice.mean, thrice.low, thrice.high]
    np.testing.assert_allclose(bounds, [once.mean, once.low, once.high], atol=1e-12)
    test = metrics.paired_test(np.tile(a, (3, 1)), np.tile(b, (3, 1)), groups=groups)
    assert test.p == metrics.paired_test(a, b, groups=groups).p


def test_variance_over_trainings_is_kept():
    """Of trainings that differ by constants it is theirs, whatever the number of items."""
    shifts = rng.normal(size=12)
    constant = metrics.bootstrap_ci(np.tile(shifts[:, None], (1, 5)), resamples=8000)
    by_theory = 2 * 1.96 * shifts.std(ddof=1) / np.sqrt(12)
    assert width(constant) == pytest.approx(by_theory, rel=0.1)
    items = rng.normal(size=100)
    both = metrics.bootstrap_ci(shifts[:, None] + items, resamples=8000)
    alone = width(metrics.bootstrap_ci(items, resamples=8000))
    assert width(both) == pytest.approx(np.hypot(by_theory, alone), rel=0.1)
    assert both.mean == pytest.approx(shifts.mean() + items.mean())


def test_of_two_trainings_one_is_drawn():
    """So that the mean of a resample varies as the mean of two does; drawing two varies half."""
    estimate = metrics.bootstrap_ci([[0.0] * 5, [1.0] * 5], level=0.4)
    assert (estimate.low, estimate.mean, estimate.high) == (0, 0.5, 1)


def test_p_is_that_of_the_mean_over_trainings():
    a, b = rng.normal(size=(2, 3, 60))
    groups = np.arange(60) % 25
    p = metrics.paired_test(a, b, groups=groups).p
    assert p == metrics.paired_test(a.mean(axis=0), b.mean(axis=0), groups=groups).p
    assert p != metrics.paired_test(a[0], b[0], groups=groups).p


def test_the_mean_of_trainings_forgets_their_spread():
    """What was done before: as narrow as if there were one training."""
    values = 0.5 * rng.normal(size=(3, 1)) + 0.1 * rng.normal(size=(3, 400))
    kept, dropped = metrics.bootstrap_ci(values), metrics.bootstrap_ci(values.mean(axis=0))
    assert kept.mean == pytest.approx(dropped.mean)
    assert width(kept) > 10 * width(dropped)
    by_training = values.mean(axis=1)
    assert kept.low == pytest.approx(by_training.min(), abs=0.02)  # of three, their range
    assert kept.high == pytest.approx(by_training.max(), abs=0.02)


def test_interval_over_trainings_covers_the_method():
    """With eight trainings; the interval of their mean alone hardly ever does."""
    hits, naive = [], []
    for _ in range(150):
        values = rng.normal(size=(8, 1)) + rng.normal(size=(8, 60))
        for covered, sample in ((hits, values), (naive, values.mean(axis=0))):
            estimate = metrics.bootstrap_ci(sample, resamples=300)
            covered.append(estimate.low <= 0 <= estimate.high)
    assert 0.82 < np.mean(hits) < 0.99
    assert np.mean(naive) < 0.5


def test_a_difference_of_trainings_is_not_one_of_methods():
    """Three lucky and unlucky seeds: sure of these trainings (p), not of the method (interval)."""
    luck = np.array([[0.3], [-0.1], [-0.05]])
    a = rng.normal(size=(3, 500))
    test = metrics.paired_test(a + luck + 0.01 * rng.normal(size=(3, 500)), a)
    assert test.p < 0.001
    assert test.difference.low < 0 < test.difference.high
    assert test.difference.mean == pytest.approx(luck.mean(), abs=0.005)


def test_images_of_a_prompt_stay_together_over_trainings():
    values = np.repeat(rng.normal(size=40), 10) + 0.01 * rng.normal(size=(4, 400))
    alone = metrics.bootstrap_ci(values)
    grouped = metrics.bootstrap_ci(values, groups=np.repeat(np.arange(40), 10))
    assert width(grouped) > 2 * width(alone)


def test_values_that_cannot_be_averaged_are_named():
    for values in ([], np.zeros((2, 0)), np.zeros((2, 2, 2)), 3.0):
        with pytest.raises(BadValueError, match="cannot be averaged"):
            metrics.bootstrap_ci(values)
    values = np.zeros((3, 5))
    values[1, 4] = np.nan
    with pytest.raises(BadValueError, match="value 4 is not finite"):
        metrics.bootstrap_ci(values)
    with pytest.raises(BadValueError, match="4 groups for 5 values"):
        metrics.bootstrap_ci(np.zeros((3, 5)), groups=[1, 2, 3, 4])
    with pytest.raises(BadValueError, match="same items"):
        metrics.paired_test(np.zeros((3, 5)), np.zeros(5))


# --- ranks, captions, features --------------------------------------------------------------------


def test_retrieval_ranks():
    target = unit(50)
    perfect = metrics.retrieval(target, target)
    assert perfect.median_rank == 1
    assert perfect.recall(1) == 1
    constant = metrics.retrieval(np.repeat(unit(1), 50, axis=0), target)
    assert constant.ranks.mean() == pytest.approx(25.5)  # chance
    same = metrics.retrieval(unit(50), np.repeat(unit(1), 50, axis=0))
    assert (same.ranks == 25.5).all()  # ties count half: nothing can be told apart
    np.testing.assert_array_equal(metrics.retrieval(unit(7), unit(7), block=2).candidates, 7)


def test_images_of_one_prompt_share_a_candidate():
    target = np.repeat(unit(10), 3, axis=0)
    ranked = metrics.retrieval(target, target, groups=np.repeat(np.arange(10), 3))
    assert ranked.candidates == 10
    assert (ranked.ranks == 1).all()


def at_angle(*angles):
    """Return unit vectors at angles in degrees: (n, 2)."""
    return np.stack([np.cos(np.radians(angles)), np.sin(np.radians(angles))], axis=1)


def test_clipscore_by_hand_and_its_bounds():
    scores = metrics.clipscore(at_angle(0, 0, 0, 0), at_angle(0, 60, 90, 180))
    np.testing.assert_allclose(scores, [2.5, 1.25, 0, 0], atol=1e-6)
    np.testing.assert_allclose(
        metrics.clipscore(3 * at_angle(10), 7 * at_angle(70)), 1.25, atol=1e-6
    )


def test_ref_clipscore_by_hand():
    image, caption = at_angle(0, 0, 0, 0), at_angle(60, 0, 180, 60)
    by_hand = [2 * 1.25 * 1 / 2.25, 2 * 2.5 * 0.5 / 3, 0, 0]
    score = metrics.ref_clipscore(image, caption, at_angle(60, 60, 0, 240))
    np.testing.assert_allclose(score, by_hand, atol=1e-6)


def test_ref_clipscore_takes_the_nearest_reference():
    several = np.stack([at_angle(180, 90), at_angle(60, 30), at_angle(90, 0)], axis=1)  # (2, 3, d)
    nearest = np.stack([at_angle(60)[0], at_angle(30)[0]])
    image, caption = at_angle(0, 0), at_angle(60, 30)
    score = metrics.ref_clipscore(image, caption, several)
    np.testing.assert_allclose(score, metrics.ref_clipscore(image, caption, nearest))


def test_caption_that_is_the_reference_has_a_closed_form():
    """cos(c, r) = 1: RefCLIPScore = 2 s / (1 + s) with s the CLIPScore."""
    score = metrics.clipscore(at_angle(0), at_angle(40))
    with_reference = metrics.ref_clipscore(at_angle(0), at_angle(40), at_angle(40))
    np.testing.assert_allclose(with_reference, 2 * score / (1 + score))


def test_frechet_distance_of_gaussians_with_a_closed_form():
    a = np.random.default_rng(0).normal(size=(500, 6))
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-9)
    shift = np.arange(6) / 3
    assert metrics.frechet(a, a + shift) == pytest.approx((shift**2).sum())
    scaled = (a - a.mean(axis=0)) * 3 + a.mean(
        axis=0
    )  # covariances commute: tr(C + 9 C - 6 C) = 4 tr C
    assert metrics.frechet(a, scaled) == pytest.approx(4 * np.trace(np.cov(a, rowvar=False)))
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0]
    b = np.random.default_rng(2).normal(size=(400, 6)) * shift
    assert metrics.frechet(a @ turn, b @ turn) == pytest.approx(metrics.frechet(a, b))
    assert metrics.frechet(a, b) == pytest.approx(metrics.frechet(b, a))
    with pytest.raises(BadValueError, match="cannot be compared"):
        metrics.frechet(a, b[:, :3])
