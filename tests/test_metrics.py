"""Scores: identities, chance, and refusals instead of NaN."""

import numpy as np
import pytest
from scipy import stats

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


def test_a_prompts_images_are_averaged_first():
    values, groups = np.array([1.0, 1, 1, 0]), ["a", "a", "a", "b"]
    for some in (values, np.tile(values, (3, 1))):
        assert metrics.bootstrap_ci(some, groups=groups).mean == 0.5
        assert metrics.paired_test(some, 0 * some, groups=groups).difference.mean == 0.5


def test_trainings_that_agree_add_nothing():
    """The interval is Student's over prompts."""
    a = rng.normal(size=40)
    thrice = metrics.bootstrap_ci(np.tile(a, (3, 1)))
    assert (thrice.n, thrice.trainings) == (40, 3)
    by_hand = stats.ttest_1samp(a, 0)
    interval = by_hand.confidence_interval()
    np.testing.assert_allclose([thrice.low, thrice.high], [interval.low, interval.high])
    assert thrice.of_trainings == pytest.approx(0, abs=1e-12)
    test = metrics.paired_test(np.tile(a, (3, 1)), np.zeros(40))
    assert test.p == pytest.approx(by_hand.pvalue)


def test_prompts_that_agree_add_nothing():
    """The interval is Student's over trainings, however many prompts there are; also of one."""
    a = rng.normal(size=5)
    by_hand = stats.ttest_1samp(a, 0)
    interval = by_hand.confidence_interval()
    for prompts in (1, 30):
        values = np.tile(a[:, None], prompts)
        estimate = metrics.bootstrap_ci(values)
        np.testing.assert_allclose([estimate.low, estimate.high], [interval.low, interval.high])
        assert estimate.of_trainings == pytest.approx(1)
        assert metrics.paired_test(values, 0 * values).p == pytest.approx(by_hand.pvalue)


def test_variance_components_by_hand():
    """Two seeds and two prompts: the table of a two-way analysis of variance."""
    estimate = metrics.bootstrap_ci([[1.0, 2.0], [4.0, 7.0]])
    seeds, prompts, rest = 16.0, 4.0, 1.0  # mean squares, each with one degree of freedom
    total = seeds + prompts - rest
    half = stats.t.ppf(0.975, total**2 / (seeds**2 + prompts**2 + rest**2)) * np.sqrt(total / 4)
    assert (estimate.mean, estimate.of_trainings) == (3.5, pytest.approx((seeds - rest) / total))
    assert estimate.high - 3.5 == pytest.approx(half)
    assert 3.5 - estimate.low == pytest.approx(half)


def test_a_variance_below_zero_is_that_of_the_rest():
    """Neither seeds nor prompts differ in the mean: MS_seeds + MS_prompts - MS_rest < 0."""
    estimate = metrics.bootstrap_ci([[1.0, -1.0], [-1.0, 1.0]])
    assert estimate.low == pytest.approx(-estimate.high)
    assert estimate.high > 1
    assert estimate.of_trainings == 0


def test_values_that_are_all_equal_have_no_interval():
    estimate = metrics.bootstrap_ci(np.full((3, 4), 0.5))
    assert (estimate.low, estimate.mean, estimate.high) == (0.5, 0.5, 0.5)
    a = rng.normal(size=(3, 4))
    assert metrics.paired_test(a, a).p == 1
    assert metrics.paired_test(np.full((3, 4), 0.5), np.zeros(4)).p == 0


PROMPTS, REPEATS = 500, 1000


@pytest.mark.parametrize(
    ("share", "covers", "over_prompts"),
    [(0, 0.95, 0.95), (0.3, 0.945, 0.90), (0.6, 0.94, 0.785), (0.9, 0.925, 0.47)],
)
def test_three_trainings_cover_the_method(share, covers, over_prompts):
    """Whatever share of the mean's variance they hold; prompts alone do not."""
    draw = np.random.default_rng(int(10 * share))
    of_rest = (1 + 1 / 3) / PROMPTS  # of the mean's variance: prompts and residuals of variance 1
    seeds = np.sqrt(3 * of_rest * share / (1 - share)) * draw.normal(size=(REPEATS, 3, 1))
    hits, alone = [], []
    for luck in seeds:
        values = luck + draw.normal(size=PROMPTS) + draw.normal(size=(3, PROMPTS))
        estimate = metrics.bootstrap_ci(values)
        hits.append(estimate.low <= 0 <= estimate.high)
        mean = values.mean(axis=0)
        alone.append(abs(mean.mean()) < 1.96 * mean.std(ddof=1) / np.sqrt(PROMPTS))
    for found, expected in ((hits, covers), (alone, over_prompts)):
        spread = np.sqrt(expected * (1 - expected) / REPEATS)
        assert np.mean(found) == pytest.approx(expected, abs=3 * spread)


def test_verdicts_are_of_the_interval_over_trainings():
    a = rng.normal(size=(3, 500))
    noise = 0.01 * rng.normal(size=(3, 500))
    for shift, verdict in ((0.2, "better"), (-0.2, "worse"), (0, "not told apart")):
        test = metrics.paired_test(a + shift + noise, a)
        assert test.verdict == verdict
        assert (test.p < 0.05) == (verdict != "not told apart")
        assert metrics.paired_test(a[0] + shift + noise[0], a[0]).verdict == "one training"
    luck = np.array([[0.3], [-0.1], [-0.05]])  # sure of these trainings, not of the method
    lucky = metrics.paired_test(a + luck, a)
    assert (lucky.verdict, lucky.p > 0.05) == ("not told apart", True)
    assert metrics.paired_test((a + luck)[0], a[0]).p < 0.001


def test_an_answer_without_training_is_compared_with_each():
    a, b = rng.normal(size=(3, 60)), rng.normal(size=60)
    assert metrics.paired_test(a, b) == metrics.paired_test(a, np.tile(b, (3, 1)))
    forth, back = metrics.paired_test(a, b), metrics.paired_test(b, a)
    assert forth.p == back.p
    assert forth.difference.low == pytest.approx(-back.difference.high)


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
        metrics.paired_test(np.zeros((3, 5)), np.zeros(4))
    with pytest.raises(BadValueError, match="equally many trainings"):
        metrics.paired_test(np.zeros((3, 5)), np.zeros((1, 5)))


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
