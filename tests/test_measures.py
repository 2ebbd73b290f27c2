"""measures.py: each measure against a slow loop from its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import flood_fill, mean_dice
from hypothesis import given
from hypothesis import strategies as st

import measures

U64 = 2.0**-53  # one rounding in float64


# --- Slow loops, written from the definitions ---------------------------------------------------


def auroc_by_pairs(scores, labels):
    """Pairs (abnormal, normal) that are ordered rightly, a tie counting one half."""
    won = 0.0
    for p, y in zip(scores, labels, strict=True):
        for q, z in zip(scores, labels, strict=True):
            if y and not z:
                won += 1.0 if p > q else 0.5 if p == q else 0.0
    return won / (sum(labels) * (len(labels) - sum(labels)))


def pro_curve(maps, masks, neighbours=8):
    """Bergmann et al. 2020: (FPR, mean per-region overlap) at each threshold, strict to lax."""
    regions = [(i, r) for i, m in enumerate(masks) for r in flood_fill(m, neighbours)]
    normal = [maps[i][y, x] for i, y, x in np.argwhere(~masks)]
    curve = [(0.0, 0.0)]
    for t in sorted(set(maps.ravel().tolist()), reverse=True):
        fpr = sum(s >= t for s in normal) / len(normal)
        covered = [sum(maps[i][q] >= t for q in r) / len(r) for i, r in regions]
        curve.append((fpr, sum(covered) / len(regions)))
    return curve


def aupro_by_loop(maps, masks, limit, neighbours=8):
    """The trapezoids below that curve from 0 to the limit, interpolated there, over the limit."""
    curve = pro_curve(maps, masks, neighbours)
    area = 0.0
    for (x0, y0), (x1, y1) in zip(curve, curve[1:], strict=False):
        if x0 >= limit or x1 == x0:
            continue
        end = min(x1, limit)
        y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
        area += (end - x0) * (y0 + y_end) / 2
    return area / limit


def as_tensors(*arrays):
    """The same values as tensors, scores with a gradient, as a network gives them."""
    tensors = [torch.from_numpy(np.ascontiguousarray(a)) for a in arrays]
    return [t.requires_grad_() if t.is_floating_point() else t for t in tensors]


# --- Strategies: structure, and a seed for the values -------------------------------------------


@st.composite
def scored(draw, most=40):
    """Scores with chosen ties, and labels with both classes."""
    n = draw(st.integers(2, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**31 - 1)))
    levels = draw(st.sampled_from([1, 2, 5, 1000]))  # all tied, mostly tied, some ties, hardly any
    labels = rng.integers(0, 2, n)
    labels[rng.permutation(n)[:2]] = [0, 1]
    dtype = draw(st.sampled_from([np.float32, np.float64, np.int64]))
    return rng.integers(-levels, levels, n).astype(dtype), labels


@st.composite
def mask_stacks(draw, least=1, most=9):
    """Masks of sparse to full noise, so that regions touch by edges, corners and borders."""
    side = st.integers(least, most)
    shape = draw(st.integers(1, 3)), draw(side), draw(side)
    rng = np.random.default_rng(draw(st.integers(0, 2**31 - 1)))
    return rng.random(shape) < draw(st.sampled_from([0.0, 0.1, 0.4, 0.6, 1.0]))


@st.composite
def heat_maps(draw):
    """Maps and masks with at least one lesion and one normal pixel; few or many ties."""
    masks = draw(mask_stacks(2, 12))
    masks[0, 0, 0], masks[-1, -1, -1] = True, False
    rng = np.random.default_rng(draw(st.integers(0, 2**31 - 1)))
    levels = draw(st.sampled_from([1, 3, 20, 10**6]))
    maps = rng.integers(0, levels, masks.shape) + draw(st.sampled_from([0, 2])) * masks
    return maps.astype(np.float32), masks


def squash(x):
    """An increasing function that keeps every distinct integer distinct, also in float32."""
    return np.asarray(x, np.float64) ** 3 * 0.5 - 7


# --- Measures of images --------------------------------------------------------------------------


@given(scored())
def test_auroc_counts_pairs(case):
    scores, labels = case
    assert measures.auroc(scores, labels) == pytest.approx(auroc_by_pairs(scores, labels), abs=U64)


@given(scored(), st.integers(0, 99))
def test_auroc_depends_on_the_order_of_scores_only(case, seed):
    scores, labels = case
    shuffled = np.random.default_rng(seed).permutation(len(scores))
    value = measures.auroc(scores, labels)
    assert measures.auroc(squash(scores), labels) == value
    assert measures.auroc(scores[shuffled], labels[shuffled]) == value
    assert measures.auroc(-scores.astype(float), labels) == pytest.approx(1 - value, abs=U64)


def test_auroc_of_many_pixels_does_not_overflow():
    labels = np.arange(2**22) % 2
    assert measures.auroc(labels.astype(np.float32), labels) == 1.0


@given(scored())
def test_confusion_counts_cases(case):
    scores, labels = case
    t = float(np.median(scores))
    verdicts = [(s >= t, y) for s, y in zip(scores, labels, strict=True)]
    got = measures.confusion(scores, labels, t)
    assert got["sensitivity"] == verdicts.count((True, 1)) / sum(labels)
    assert got["specificity"] == verdicts.count((False, 0)) / (len(labels) - sum(labels))
    right = verdicts.count((True, 1)) + verdicts.count((False, 0))
    assert got["accuracy"] == right / len(labels)


@given(scored())
def test_youden_threshold_is_the_best_and_is_a_score(case):
    scores, labels = case

    def j(t):
        return sum(measures.confusion(scores, labels, t)[k] for k in ("sensitivity", "specificity"))

    t = measures.youden_threshold(scores, labels)
    assert t in scores
    best = max(j(s) for s in set(scores.tolist()))
    assert j(t) == pytest.approx(best, abs=4 * U64)
    assert all(j(s) < best - 1e-9 for s in scores if s > t)  # the highest of several
    assert measures.youden_threshold(squash(scores), labels) == squash(t)


@given(scored())
def test_measures_of_images_take_tensors_as_they_take_arrays_and_lists(case):
    scores, labels = case
    for s, y in (as_tensors(scores, labels), (scores.tolist(), labels.tolist())):
        assert measures.auroc(s, y) == measures.auroc(scores, labels)
        t = measures.youden_threshold(s, y)
        assert t == measures.youden_threshold(scores, labels)
        assert measures.confusion(s, y, t) == measures.confusion(scores, labels, t)


@pytest.mark.parametrize("measure", [measures.auroc, measures.youden_threshold])
def test_measures_refuse_one_class_and_nan(measure):
    with pytest.raises(ValueError, match="2 normal and 0 abnormal"):
        measure([1.0, 2.0], [0, 0])
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        measure([1.0, math.nan], [0, 1])
    with pytest.raises(ValueError, match="3 scores for 2 labels"):
        measure([1.0, 2.0, 3.0], [0, 1])


# --- Measures of pixels --------------------------------------------------------------------------


@given(mask_stacks(), st.integers(0, 99))
def test_iou_and_dice_are_those_of_sets(masks, seed):
    pred = np.random.default_rng(seed).random(masks.shape) < 0.5
    for i in range(len(masks)):
        p = {tuple(q) for q in np.argwhere(pred[i])}
        m = {tuple(q) for q in np.argwhere(masks[i])}
        assert measures.iou(pred, masks)[i] == (len(p & m) / len(p | m) if p | m else 1)
        want = 2 * len(p & m) / (len(p) + len(m)) if p | m else 1
        assert measures.dice(pred[i], masks[i]) == want


@given(heat_maps())
def test_measures_of_pixels_take_tensors_as_they_take_arrays(case):
    maps, masks = case
    m, k = as_tensors(maps, masks)
    index = np.flatnonzero(masks.any((1, 2)))
    (i,) = as_tensors(index)
    assert measures.aupro(m, k) == measures.aupro(maps, masks)
    assert measures.pixel_measures(m, k, i) == measures.pixel_measures(maps, masks, index)
    assert measures.dice_threshold(m, k, i) == measures.dice_threshold(maps, masks, index)
    for measure in (measures.iou, measures.dice):
        assert (measure(m >= 1, k) == measure(maps >= 1, masks)).all()


def labelled(masks):
    region, k = measures.components(masks)
    image = np.zeros(masks.shape, int)
    image[masks] = region + 1
    return image, k


@given(mask_stacks())
def test_components_are_those_of_flood_fill(masks):
    image, k = labelled(masks)
    regions = [(i, r) for i, m in enumerate(masks) for r in flood_fill(m)]
    assert k == len(regions)
    for number, (i, r) in enumerate(regions, 1):
        assert {tuple(q) for q in np.argwhere(image[i] == number)} == r
        assert (image == number).sum() == len(r)


def spiral(side):
    """A one-pixel corridor that winds inwards: the longest chain of runs for its size."""
    mask, y, x, dy, dx = np.zeros((side, side), bool), 0, 0, 0, 1
    mask[0, 0] = True
    turns = 0
    while turns < 2:
        ahead = (y + dy, x + dx)
        beyond = (y + 2 * dy, x + 2 * dx)
        inside = 0 <= ahead[0] < side and 0 <= ahead[1] < side
        closed = 0 <= beyond[0] < side and 0 <= beyond[1] < side and mask[beyond]
        if not inside or closed:
            dy, dx = dx, -dy
            turns += 1
        else:
            (y, x), turns = ahead, 0
            mask[y, x] = True
    return mask


def test_components_of_hard_shapes():
    comb = np.zeros((41, 41), bool)
    comb[:, ::2], comb[-1] = True, True  # teeth that meet in the last row only
    chess = np.indices((41, 41)).sum(0) % 2 == 0  # joined by corners only
    assert [labelled(m[None])[1] for m in (spiral(41), comb, comb[::-1], comb.T, chess)] == [1] * 5
    assert len(flood_fill(chess, neighbours=4)) == chess.sum()
    assert measures.components(np.stack([comb, chess, spiral(41)]))[1] == 3  # images never join


@given(heat_maps(), st.sampled_from([0.01, 0.3, 1.0]))
def test_aupro_is_bergmanns_curve(case, limit):
    maps, masks = case
    want = aupro_by_loop(maps, masks, limit)
    # Each of P pixels: 4 roundings of numbers below 1; differences (l - a) lose 1 / l of them.
    budget = 4 * U64 * (4 + math.log2(maps.size)) / limit
    assert measures.aupro(maps, masks, limit) == pytest.approx(want, abs=budget)


def test_pixel_measures_are_the_same_in_blocks_of_two_images_and_a_last_one(monkeypatch):
    g = np.random.default_rng(0)
    maps, masks = g.normal(size=(5, 8, 8)), g.random((5, 8, 8)) < 0.2
    whole = measures.pixel_measures(maps, masks, np.arange(5))
    monkeypatch.setattr(measures, "SORTED", 2 * 64)
    assert measures.pixel_measures(maps, masks, np.arange(5)) == pytest.approx(whole, abs=8 * U64)


@given(heat_maps())
def test_pixel_auroc_is_the_auroc_of_all_pixels(case):
    maps, masks = case
    value, _ = measures.pixel_measures(maps, masks, np.arange(len(maps)))
    assert value == pytest.approx(measures.auroc(maps, masks), abs=2 * U64)


@given(heat_maps(), st.integers(0, 99))
def test_aupro_depends_on_the_order_of_scores_only(case, seed):
    maps, masks = case
    value = measures.aupro(maps, masks)
    assert 0 <= value <= 1
    order = np.random.default_rng(seed).permutation(len(maps))
    budget = 4 * U64 * (4 + math.log2(maps.size)) / 0.3
    assert measures.aupro(squash(maps), masks) == pytest.approx(value, abs=budget)
    assert measures.aupro(maps[order], masks[order]) == pytest.approx(value, abs=budget)
    assert measures.aupro(maps[:, ::-1], masks[:, ::-1]) == pytest.approx(value, abs=budget)
    assert measures.aupro(masks.astype(np.float32), masks) == pytest.approx(1, abs=budget)
    assert measures.aupro(-masks.astype(np.float32), masks) == 0


def test_aupro_weighs_regions_equally_and_joins_corners():
    masks = np.zeros((1, 4, 12), bool)
    masks[0, 0, 0] = masks[0, 1, 1] = True  # one region, by a corner
    masks[0, :, 8:] = True  # a region of 16 pixels
    maps = np.zeros(masks.shape)
    maps[0, :2, :2] = 2  # covers the small region, with 2 of the 30 normal pixels
    curve = [(0, 0), (2 / 30, 1 / 2), (1, 1)]  # by hand: the two regions weigh the same
    at = 1 / 2 + (0.3 - 2 / 30) / (1 - 2 / 30) * 1 / 2
    area = 2 / 30 * 1 / 4 + (0.3 - 2 / 30) * (1 / 2 + at) / 2
    assert pro_curve(maps, masks) == curve
    assert measures.aupro(maps, masks) == pytest.approx(area / 0.3, abs=1e-15)
    four = aupro_by_loop(maps, masks, 0.3, neighbours=4)  # canaries: known wrong answers
    assert abs(four - area / 0.3) > 0.01
    assert abs(area - area / 0.3) > 0.01


def test_pixel_measures_refuse_what_they_cannot_measure():
    maps, masks = np.zeros((1, 2, 2)), np.eye(2, dtype=bool)[None]
    with pytest.raises(ValueError, match="fpr_limit must lie in"):
        measures.aupro(maps, masks, 0.0)
    with pytest.raises(ValueError, match="no lesion"):
        measures.aupro(maps, np.zeros_like(masks))
    with pytest.raises(ValueError, match="no normal pixel"):
        measures.aupro(maps, np.ones_like(masks))
    with pytest.raises(ValueError, match=r"got \(1, 2, 2\) and \(2, 2\)"):
        measures.aupro(maps, masks[0])
    for at in ((0, 0, 0), (0, 0, 1)):
        bad = maps.copy()
        bad[at] = math.nan
        with pytest.raises(ValueError, match="NaN"):
            measures.aupro(bad, masks)
        with pytest.raises(ValueError, match="NaN"):
            measures.dice_threshold(bad, masks, [0])
    with pytest.raises(ValueError, match="no images to measure"):
        measures.aupro(maps[:0], masks[:0])
    with pytest.raises(ValueError, match="no images"):
        measures.dice_threshold(maps, masks, np.arange(0))


@given(heat_maps())
def test_dice_threshold_is_the_best_of_all_scores(case):
    maps, masks = case
    index = np.flatnonzero(masks.any((1, 2)))
    t, value = measures.dice_threshold(maps, masks, index)
    tried = np.unique(maps[index]).tolist()
    assert t in tried
    assert value == pytest.approx(mean_dice(maps, masks, index, t), abs=8 * U64)
    assert value == pytest.approx(max(mean_dice(maps, masks, index, s) for s in tried), abs=8 * U64)


def test_dice_threshold_between_levels_loses_little():
    rng = np.random.default_rng(0)
    masks = np.zeros((6, 64, 64), bool)
    masks[:, 20:34, 20:30] = True
    maps = rng.normal(size=masks.shape) + 2.0 * masks
    _, exact = measures.dice_threshold(maps, masks, np.arange(6), levels=maps.size)
    _, coarse = measures.dice_threshold(maps, masks, np.arange(6), levels=512)
    # 24576 scores in 511 steps: at most 48 pixels in or out of predictions of about 6 x 140
    assert exact - 48 / (6 * 140) <= coarse <= exact


def test_of_several_best_thresholds_the_highest_is_taken():
    assert measures.youden_threshold([1, 2, 3, 4], [0, 1, 0, 1]) == 4  # J is 1/2 at 2 and at 4
    maps, masks = np.array([[[4, 3, 2, 1]]]), np.array([[[1, 0, 0, 1]]], bool)
    assert measures.dice_threshold(maps, masks, [0]) == (4, 2 / 3)  # and at 1: 2 * 2 / (4 + 2)


def test_a_missed_pixel_is_no_hit_and_every_pixel_of_a_later_image_is_a_threshold():
    maps = np.array([[[1, 2]], [[3, 4]]])
    assert measures.dice_threshold(maps, np.eye(2, dtype=bool)[:, None], [0, 1]) == (1, 2 / 3)
    maps, masks = np.array([[[2, 5]], [[3, 4]]]), np.array([[[0, 1]], [[1, 1]]], bool)
    assert measures.dice_threshold(maps, masks, [0, 1]) == (3, 1.0)


def test_the_lesions_of_all_blocks_count():
    """Images of more than 32 M pixels are sorted one at a time."""
    maps = np.zeros((2, 1, 2**25 + 1), np.int8)
    masks = np.zeros(maps.shape, bool)
    masks[0, 0, 0] = masks[1, 0, 5] = True
    maps[0, 0, 0] = 1  # the other lesion is missed
    _, pro = measures.pixel_measures(maps, masks, np.arange(2))
    assert pro == pytest.approx(1 / 2 + 1 / 2 * 0.15, abs=1e-6)


def test_the_thresholds_tried_miss_no_score_and_no_column():
    rank = np.arange(2**13).reshape(1, 64, 128)
    assert measures.dice_threshold(rank, rank >= 4001, [0]) == (4001, 1.0)
    maps = np.zeros((1, 2048, 2050), np.int8)  # just above 4 million
    maps[0, 7, 33] = 5
    assert measures.dice_threshold(maps, maps == 5, [0]) == (5, 1.0)
    maps = np.zeros((2, 2048, 2050), np.int8)  # every third, from an image's own number on
    maps[1, 0, 4] = 5
    assert measures.dice_threshold(maps, maps == 5, [0, 1]) == (5, 1.0)  # no lesion, none found


def test_shapes_that_would_broadcast_and_heat_maps_are_no_regions():
    masks = np.zeros((4, 8, 8), bool)
    for measure in (measures.iou, measures.dice):
        full = np.full(masks.shape, 200, np.uint8)
        for pred in (masks[:1], masks[:, None], masks.astype(np.float32), full):
            with pytest.raises(ValueError, match=r"predictions: bool, \(4, 8, 8\) as the masks"):
                measure(pred, masks)


def test_images_are_chosen_by_numbers_or_by_true_and_false():
    g = np.random.default_rng(0)
    maps, masks, chosen = g.normal(size=(5, 8, 8)), g.random((5, 8, 8)) < 0.2, np.arange(5) % 2 == 0
    for measure in (measures.pixel_measures, measures.dice_threshold):
        assert measure(maps, masks, chosen) == measure(maps, masks, np.flatnonzero(chosen))
        for none in ([], chosen & ~chosen):
            with pytest.raises(ValueError, match="no images to measure"):
                measure(maps, masks, none)
        with pytest.raises(ValueError, match="must be"):
            measure(maps[0], masks[0], [0])
    bright = 255 * masks.astype(np.uint8)
    assert measures.pixel_measures(maps, bright, chosen) == measures.pixel_measures(
        maps, masks, chosen
    )
    with pytest.raises(ValueError, match="no NaN"):
        measures.auroc([0.1, 0.2, 0.3], [0, 1, np.nan])
