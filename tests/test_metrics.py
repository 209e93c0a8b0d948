"""Scores: identities, chance, and refusals instead of NaN."""

import numpy as np
import pytest

from rsdlib import metrics, retrieval
from rsdlib.errors import BadValueError

rng = np.random.default_rng(0)


def unit(n, d=8):
    rows = rng.normal(size=(n, d))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


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
    hits = sum((found := metrics.bootstrap_ci(rng.normal(size=60), resamples=500)).low <= 0 <= found.high for _ in range(200))
    assert 0.88 <= hits / 200 <= 0.99


def test_groups_widen_the_interval():
    values = np.repeat(rng.normal(size=40), 10)
    alone = metrics.bootstrap_ci(values)
    grouped = metrics.bootstrap_ci(values, groups=np.repeat(np.arange(40), 10))
    assert alone.mean == pytest.approx(grouped.mean)
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)


def test_paired_test_finds_a_shift_and_nothing_in_noise():
    a = rng.normal(size=200)
    assert metrics.paired_test(a + 0.3 + 0.1 * rng.normal(size=200), a).p < 0.001
    p = [metrics.paired_test(x := rng.normal(size=30), x + rng.normal(size=30), resamples=300).p for _ in range(200)]
    assert 0.01 < np.mean(np.array(p) < 0.05) < 0.11
    assert metrics.paired_test(a, a).p == 1


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
    found = metrics.retrieval(target, target, groups=np.repeat(np.arange(10), 3))
    assert found.candidates == 10
    assert (found.ranks == 1).all()


def test_nearest_equals_brute_force_for_any_block():
    queries, base = unit(9), unit(300)
    scores = queries @ base.T
    for block in (7, 64, 1000):
        similarity, index = retrieval.nearest(queries, base, 5, block)
        np.testing.assert_array_equal(index, np.argsort(-scores, axis=1)[:, :5])
        np.testing.assert_allclose(similarity, np.sort(scores, axis=1)[:, ::-1][:, :5], atol=1e-6)


def test_nearest_refuses_what_cannot_be():
    for k in (0, 301):
        with pytest.raises(BadValueError, match="neighbours"):
            retrieval.nearest(unit(2), unit(300), k)
    with pytest.raises(BadValueError, match="dimensions"):
        retrieval.nearest(unit(2, 8), unit(300, 9), 1)


def test_knn_of_one_neighbour_returns_its_target():
    base, targets = unit(40), unit(40, 5)
    np.testing.assert_allclose(retrieval.knn_regress(base, base, targets, k=1), targets, atol=1e-6)


def at_angle(*angles):
    """Return unit vectors at angles in degrees: (n, 2)."""
    return np.stack([np.cos(np.radians(angles)), np.sin(np.radians(angles))], axis=1)


def test_clipscore_by_hand_and_its_bounds():
    found = metrics.clipscore(at_angle(0, 0, 0, 0), at_angle(0, 60, 90, 180))
    np.testing.assert_allclose(found, [2.5, 1.25, 0, 0], atol=1e-6)
    np.testing.assert_allclose(metrics.clipscore(3 * at_angle(10), 7 * at_angle(70)), 1.25, atol=1e-6)


def test_ref_clipscore_by_hand():
    image, caption, reference = at_angle(0, 0, 0, 0), at_angle(60, 0, 180, 60), at_angle(60, 60, 0, 240)
    by_hand = [2 * 1.25 * 1 / 2.25, 2 * 2.5 * 0.5 / 3, 0, 0]
    np.testing.assert_allclose(metrics.ref_clipscore(image, caption, reference), by_hand, atol=1e-6)


def test_ref_clipscore_takes_the_nearest_reference():
    several = np.stack([at_angle(180, 90), at_angle(60, 30), at_angle(90, 0)], axis=1)  # (2, 3, d)
    nearest = np.stack([at_angle(60)[0], at_angle(30)[0]])
    image, caption = at_angle(0, 0), at_angle(60, 30)
    np.testing.assert_allclose(metrics.ref_clipscore(image, caption, several), metrics.ref_clipscore(image, caption, nearest))


def test_caption_that_is_the_reference_has_a_closed_form():
    """cos(c, r) = 1: RefCLIPScore = 2 s / (1 + s) with s the CLIPScore."""
    score = metrics.clipscore(at_angle(0), at_angle(40))
    np.testing.assert_allclose(metrics.ref_clipscore(at_angle(0), at_angle(40), at_angle(40)), 2 * score / (1 + score))


def test_frechet_distance_of_gaussians_with_a_closed_form():
    a = np.random.default_rng(0).normal(size=(500, 6))
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-9)
    shift = np.arange(6) / 3
    assert metrics.frechet(a, a + shift) == pytest.approx((shift**2).sum())
    scaled = (a - a.mean(axis=0)) * 3 + a.mean(axis=0)  # covariances commute: tr(C + 9 C - 6 C) = 4 tr C
    assert metrics.frechet(a, scaled) == pytest.approx(4 * np.trace(np.cov(a, rowvar=False)))
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0]
    b = np.random.default_rng(2).normal(size=(400, 6)) * shift
    assert metrics.frechet(a @ turn, b @ turn) == pytest.approx(metrics.frechet(a, b))
    assert metrics.frechet(a, b) == pytest.approx(metrics.frechet(b, a))
    with pytest.raises(BadValueError, match="cannot be compared"):
        metrics.frechet(a, b[:, :3])
