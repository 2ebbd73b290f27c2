"""eval.py: each measure against a slow loop from its definition, the protocol, tables, commands."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import data
import eval as ev

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


def flood_fill(mask, neighbours=8):
    """Connected regions as sets of pixels, in the order of their first pixel."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    regions = []
    for seed in sorted(left):
        if seed not in left:
            continue
        left.discard(seed)
        region, todo = {seed}, [seed]
        while todo:
            y, x = todo.pop()
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    q = (y + dy, x + dx)
                    if q in left and (neighbours == 8 or dy * dx == 0):
                        left.discard(q)
                        region.add(q)
                        todo.append(q)
        regions.append(region)
    return regions


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
    assert ev.auroc(scores, labels) == pytest.approx(auroc_by_pairs(scores, labels), abs=U64)


@given(scored(), st.integers(0, 99))
def test_auroc_depends_on_the_order_of_scores_only(case, seed):
    scores, labels = case
    shuffled = np.random.default_rng(seed).permutation(len(scores))
    value = ev.auroc(scores, labels)
    assert ev.auroc(squash(scores), labels) == value
    assert ev.auroc(scores[shuffled], labels[shuffled]) == value
    assert ev.auroc(-scores.astype(float), labels) == pytest.approx(1 - value, abs=U64)


@pytest.mark.parametrize(
    ("scores", "value"), [([0, 1, 2, 3], 1), ([3, 2, 1, 0], 0), ([1] * 4, 0.5)]
)
def test_auroc_of_perfect_reversed_and_tied_scores(scores, value):
    assert ev.auroc(scores, [0, 0, 1, 1]) == value


def test_auroc_of_many_pixels_does_not_overflow():
    labels = np.arange(2**22) % 2
    assert ev.auroc(labels.astype(np.float32), labels) == 1.0


@given(scored())
def test_negatives_counted_in_blocks_are_the_negatives_counted_at_once(case):
    scores, labels = case
    positive, negative = np.sort(scores[labels == 1]), scores[labels == 0]
    whole = ev._negatives_above(positive, [negative])
    parts = ev._negatives_above(positive, np.array_split(negative, 3))
    assert all((a == b).all() for a, b in zip(whole, parts, strict=True))


@given(scored())
def test_confusion_counts_cases(case):
    scores, labels = case
    t = float(np.median(scores))
    verdicts = [(s >= t, y) for s, y in zip(scores, labels, strict=True)]
    got = ev.confusion(scores, labels, t)
    assert got["sensitivity"] == verdicts.count((True, 1)) / sum(labels)
    assert got["specificity"] == verdicts.count((False, 0)) / (len(labels) - sum(labels))
    right = verdicts.count((True, 1)) + verdicts.count((False, 0))
    assert got["accuracy"] == right / len(labels)


@given(scored())
def test_youden_threshold_is_the_best_and_is_a_score(case):
    scores, labels = case

    def j(t):
        return sum(ev.confusion(scores, labels, t)[k] for k in ("sensitivity", "specificity"))

    t = ev.youden_threshold(scores, labels)
    assert t in scores
    best = max(j(s) for s in set(scores.tolist()))
    assert j(t) == pytest.approx(best, abs=4 * U64)
    assert all(j(s) < best - 1e-9 for s in scores if s > t)  # the highest of several
    assert ev.youden_threshold(squash(scores), labels) == squash(t)


@pytest.mark.parametrize("measure", [ev.auroc, ev.youden_threshold])
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
        assert ev.iou(pred, masks)[i] == (len(p & m) / len(p | m) if p | m else 1)
        assert ev.dice(pred[i], masks[i]) == (2 * len(p & m) / (len(p) + len(m)) if p | m else 1)


def labelled(masks):
    region, k = ev.components(masks)
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
    assert ev.components(np.stack([comb, chess, spiral(41)]))[1] == 3  # images never join


@given(heat_maps(), st.sampled_from([0.01, 0.3, 1.0]))
def test_aupro_is_bergmanns_curve(case, limit):
    maps, masks = case
    want = aupro_by_loop(maps, masks, limit)
    # Each of P pixels: 4 roundings of numbers below 1; differences (l - a) lose 1 / l of them.
    budget = 4 * U64 * (4 + math.log2(maps.size)) / limit
    assert ev.aupro(maps, masks, limit) == pytest.approx(want, abs=budget)


@given(heat_maps())
def test_pixel_auroc_is_the_auroc_of_all_pixels(case):
    maps, masks = case
    value, _ = ev.pixel_measures(maps, masks, np.arange(len(maps)))
    assert value == pytest.approx(ev.auroc(maps, masks), abs=2 * U64)


@given(heat_maps(), st.integers(0, 99))
def test_aupro_depends_on_the_order_of_scores_only(case, seed):
    maps, masks = case
    value = ev.aupro(maps, masks)
    assert 0 <= value <= 1
    order = np.random.default_rng(seed).permutation(len(maps))
    budget = 4 * U64 * (4 + math.log2(maps.size)) / 0.3
    assert ev.aupro(squash(maps), masks) == pytest.approx(value, abs=budget)
    assert ev.aupro(maps[order], masks[order]) == pytest.approx(value, abs=budget)
    assert ev.aupro(maps[:, ::-1], masks[:, ::-1]) == pytest.approx(value, abs=budget)
    assert ev.aupro(masks.astype(np.float32), masks) == pytest.approx(1, abs=budget)
    assert ev.aupro(-masks.astype(np.float32), masks) == 0


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
    assert ev.aupro(maps, masks) == pytest.approx(area / 0.3, abs=1e-15)
    four = aupro_by_loop(maps, masks, 0.3, neighbours=4)  # canaries: known wrong answers
    assert abs(four - area / 0.3) > 0.01
    assert abs(area - area / 0.3) > 0.01


def test_pixel_measures_refuse_what_they_cannot_measure():
    maps, masks = np.zeros((1, 2, 2)), np.eye(2, dtype=bool)[None]
    with pytest.raises(ValueError, match="fpr_limit must lie in"):
        ev.aupro(maps, masks, 0.0)
    with pytest.raises(ValueError, match="no lesion"):
        ev.aupro(maps, np.zeros_like(masks))
    with pytest.raises(ValueError, match="no normal pixel"):
        ev.aupro(maps, np.ones_like(masks))
    for at in ((0, 0, 0), (0, 0, 1)):
        bad = maps.copy()
        bad[at] = math.nan
        with pytest.raises(ValueError, match="NaN"):
            ev.aupro(bad, masks)


def mean_dice(maps, masks, index, t):
    return float(ev.dice(maps[index] >= t, masks[index]).mean())


@given(heat_maps())
def test_dice_threshold_is_the_best_of_all_scores(case):
    maps, masks = case
    index = np.flatnonzero(masks.any((1, 2)))
    t, value = ev.dice_threshold(maps, masks, index)
    tried = np.unique(maps[index]).tolist()
    assert t in tried
    assert value == pytest.approx(mean_dice(maps, masks, index, t), abs=8 * U64)
    assert value == pytest.approx(max(mean_dice(maps, masks, index, s) for s in tried), abs=8 * U64)


def test_dice_threshold_between_levels_loses_little():
    rng = np.random.default_rng(0)
    masks = np.zeros((6, 64, 64), bool)
    masks[:, 20:34, 20:30] = True
    maps = rng.normal(size=masks.shape) + 2.0 * masks
    _, exact = ev.dice_threshold(maps, masks, np.arange(6), levels=maps.size)
    _, coarse = ev.dice_threshold(maps, masks, np.arange(6), levels=512)
    # 24576 scores in 511 steps: at most 48 pixels in or out of predictions of about 6 x 140
    assert exact - 48 / (6 * 140) <= coarse <= exact


# --- The protocol --------------------------------------------------------------------------------


@given(st.integers(2, 130), st.integers(2, 130), st.integers(0, 9))
def test_validation_takes_fifty_or_half_of_each_class(normal, abnormal, seed):
    labels = np.random.default_rng(seed).permutation([0] * normal + [1] * abnormal)
    chosen = ev.validation_split(labels, seed)
    assert (chosen & (labels == 0)).sum() == min(50, normal // 2)
    assert (chosen & (labels == 1)).sum() == min(50, abnormal // 2)
    assert (chosen == ev.validation_split(labels, seed)).all()


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1], [0, 0, 1], []])
def test_a_test_split_without_two_of_each_class_is_refused(labels):
    with pytest.raises(ValueError, match="two of each"):
        ev.protocol(np.zeros(len(labels)), labels, seed=0)


def cases(normal=20, abnormal=24, side=16, seed=0):
    """Scores, labels, maps, masks, known: square lesions, detected better than chance."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation([0] * normal + [1] * abnormal)
    masks = np.zeros((len(labels), side, side), bool)
    for i in np.flatnonzero(labels):
        y, x = rng.integers(0, side - 5, 2)
        masks[i, y : y + 5, x : x + 4] = True
    maps = (rng.normal(size=masks.shape) + 1.5 * masks).astype(np.float32)
    return maps.max((1, 2)), labels, maps, masks, np.ones(len(labels), bool)


def test_protocol_measures_the_images_that_set_no_threshold():
    scores, labels, maps, masks, known = cases()
    row = ev.protocol(scores, labels, maps, masks, known, seed=3)
    val = ev.validation_split(labels, 3)
    assert row["threshold"] == ev.youden_threshold(scores[val], labels[val])
    assert row["image_auroc"] == ev.auroc(scores[~val], labels[~val])
    want = ev.confusion(scores[~val], labels[~val], row["threshold"])
    assert {k: row[k] for k in want} == want
    assert row["images"] == {
        "validation_normal": 10,
        "validation_abnormal": 12,
        "test_normal": 10,
        "test_abnormal": 12,
    }
    tune, rest = (np.flatnonzero(labels & s) for s in (val, ~val))
    assert row["pixel_threshold"] == ev.dice_threshold(maps, masks, tune)[0]
    assert row["dice"] == pytest.approx(mean_dice(maps, masks, rest, row["pixel_threshold"]))
    assert row["iou"] == pytest.approx(
        ev.iou(maps[rest] >= row["pixel_threshold"], masks[rest]).mean()
    )
    best = row["best_possible"]
    assert best["dice"] >= row["dice"]
    assert best["dice"] == pytest.approx(mean_dice(maps, masks, rest, best["threshold"]))
    assert row["pixel_auroc"] == pytest.approx(ev.auroc(maps[~val], masks[~val]), abs=1e-15)
    assert row["aupro"] == pytest.approx(ev.aupro(maps[~val], masks[~val]), abs=1e-14)
    assert row["pro"] == pytest.approx(ev.aupro(maps[rest], masks[rest]), abs=1e-14)
    assert row["iou_sd"] is row["dice_sd"] is row["pro_sd"] is None
    assert any("half of it" in note for note in row["notes"])
    assert any("one group" in note for note in row["notes"])


def test_paper_protocol_measures_every_image_with_the_same_thresholds():
    case = cases()
    row, paper = (ev.protocol(*case, seed=3, paper_protocol=p) for p in (False, True))
    assert paper["threshold"] == row["threshold"]
    assert paper["pixel_threshold"] == row["pixel_threshold"]
    assert paper["image_auroc"] == ev.auroc(case[0], case[1])
    assert paper["aupro"] == pytest.approx(ev.aupro(case[2], case[3]), abs=1e-14)
    assert paper["images"]["test_abnormal"] == 24
    assert any("set the thresholds are measured" in note for note in paper["notes"])


def test_images_without_a_mask_are_left_out_of_the_pixel_measures():
    scores, labels, maps, masks, known = cases()
    odd = np.flatnonzero(labels)[::2]
    known[odd] = False
    masks[odd] = False
    spoilt = maps.copy()
    spoilt[odd] = 99  # would count as false alarms
    rows = [ev.protocol(scores, labels, m, masks, known, seed=0) for m in (maps, spoilt)]
    assert rows[0] == rows[1]
    assert any("12 abnormal images have no mask" in note for note in rows[0]["notes"])
    none = ev.protocol(scores, labels, maps, masks, labels == 0, seed=0)
    assert "aupro" not in none and any("Too few masks" in note for note in none["notes"])
    assert "aupro" not in ev.protocol(scores, labels, maps, None, None, seed=0)


def test_groups_of_abnormal_images():
    small = ev.Config(groups=5, group_size=10)
    disjoint = ev.abnormal_groups(np.arange(100, 157), 0, small)
    assert [len(g) for g in disjoint] == [10] * 5
    assert len(set(np.concatenate(disjoint).tolist())) == 50
    shared = ev.abnormal_groups(np.arange(12), 0, small)
    assert [len(set(g.tolist())) for g in shared] == [10] * 5
    assert len(ev.abnormal_groups(np.arange(10), 0, small)) == 1
    case = cases()
    row = ev.protocol(*case, seed=0, config=ev.Config(validation=4, groups=5, group_size=4))
    val = ev.validation_split(case[1], 0, ev.Config(validation=4))
    groups = ev.abnormal_groups(
        np.flatnonzero(case[1] & ~val), 0, ev.Config(groups=5, group_size=4)
    )
    dices = [mean_dice(case[2], case[3], g, row["pixel_threshold"]) for g in groups]
    assert row["dice"] == pytest.approx(np.mean(dices))
    assert row["dice_sd"] == pytest.approx(np.std(dices, ddof=1))
    pros = [ev.aupro(case[2][g], case[3][g]) for g in groups]
    assert (row["pro"], row["pro_sd"]) == pytest.approx((np.mean(pros), np.std(pros, ddof=1)))


# --- Scoring, evaluation and the command line ----------------------------------------------------


class Padim:
    """A stand-in with the interface of a detector: redness is abnormal."""

    calls: list[int] = []

    def score(self, images):
        x = torch.as_tensor(np.asarray(images)).float() / 255
        self.calls.append(len(x))
        maps = x[:, 0] - x[:, 1]
        return maps, maps.flatten(1).amax(1)


class Igd(Padim):
    def score(self, images):
        maps, _ = super().score(images)
        return maps, maps.flatten(1).mean(1)


def make_set(root, normal=6, abnormal=6, side=32):
    """An MVTec folder: grey-green images, red squares as lesions, noise."""
    rng = np.random.default_rng(0)

    def image(lesion):
        x = rng.normal(120, 10, (side, side, 3))
        mask = np.zeros((side, side), bool)
        if lesion:
            y, z = rng.integers(2, side - 12, 2)
            mask[y : y + 9, z : z + 8] = True
            x[mask] += (70, -40, -40)
        return np.clip(x, 0, 255).astype(np.uint8), mask

    for folder in ("train/good", "test/good", "test/spot", "ground_truth/spot"):
        (root / folder).mkdir(parents=True)
    for k in range(2):
        Image.fromarray(image(False)[0]).save(root / f"train/good/{k}.png")
    for k in range(normal):
        Image.fromarray(image(False)[0]).save(root / f"test/good/{k}.png")
    for k in range(abnormal):
        x, mask = image(True)
        Image.fromarray(x).save(root / f"test/spot/{k}.png")
        Image.fromarray(mask).save(root / f"ground_truth/spot/{k}_mask.png")
    return root


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder with two detectors, not evaluated yet."""
    folder = tmp_path / "run"
    folder.mkdir()
    root = make_set(tmp_path / "set")
    config = {"image_size": 32, "seed": 1, "data": str(root)}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("detector.pt", "detector_igd.pt"):
        (folder / name).touch()
    monkeypatch.setattr(
        ev, "load_detector", lambda p, device: (Igd if "igd" in p.name else Padim)()
    )
    return folder


def refused(capsys, *arguments):
    """The one line that a mistake prints; checks the exit status, 2."""
    status: object
    try:
        status = ev.main([str(a) for a in arguments])
    except SystemExit as stopped:
        status = stopped.code
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and err.count("\n") == 1, (status, out, err)
    return err


def test_score_set_does_not_depend_on_the_batch(monkeypatch):
    images = np.random.default_rng(0).integers(0, 255, (7, 3, 32, 32), np.uint8)
    Padim.calls = []
    one, two = ev.score_set(Padim(), images, batch=3), ev.score_set(Padim(), images, batch=7)
    assert Padim.calls == [3, 3, 1, 7]
    assert all((a == b).all() and a.dtype == np.float32 for a, b in zip(one, two, strict=True))

    monkeypatch.setattr(ev, "MAPS_IN_MEMORY", 0)
    scores, maps = ev.score_set(Padim(), images, batch=3)
    assert isinstance(maps, np.memmap) and (maps == one[1]).all() and (scores == one[0]).all()

    class Broken(Padim):
        def score(self, images):
            return tuple(v * math.nan for v in super().score(images))

    with pytest.raises(ValueError, match="NaN in images 0 to 2"):
        ev.score_set(Broken(), images, batch=3)


def test_evaluate_a_run_writes_all_that_a_run_holds(run, capsys):
    old = {"untrained": {"image_auroc": 0.5}, "init": "random", "seconds": {"fit": 2}}
    (run / "results.json").write_text(json.dumps(old))
    assert ev.main([str(run), "--batch-size", "5"]) == 0
    out, err = capsys.readouterr()
    assert "left out: the row untrained" in err  # it says nothing about its data
    assert out == (run / "results.md").read_text()
    stored = json.loads((run / "results.json").read_text())
    assert set(stored) == {"padim", "igd", "init", "seconds"}
    assert stored["seconds"]["fit"] == 2 and stored["seconds"]["evaluate"] > 0
    assert stored["padim"]["image_auroc"] == 1.0 and stored["padim"]["aupro"] > 0.95
    assert sorted(p.name for p in (run / "figures").iterdir()) == [
        "localisation_igd.png",
        "localisation_padim.png",
    ]
    with open(run / "scores.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and {r["split"] for r in rows} == {"validation", "test"}
    assert [r["label"] for r in rows] == [str(int(r["kind"] == "spot")) for r in rows]
    for r in rows:
        above = float(r["padim_score"]) >= stored["padim"]["threshold"]
        assert r["padim_predicted"] == str(int(above)) and Path(r["path"]).is_file()
    stored["untrained"] = stored["padim"]
    (run / "results.json").write_text(json.dumps(stored))
    assert ev.main([str(run)]) == 0  # the same data: the row stays
    assert "untrained" in json.loads((run / "results.json").read_text())
    assert ev.main([str(run), "--paper-protocol"]) == 0
    stored = json.loads((run / "results.json").read_text())
    assert "untrained" not in stored and stored["igd"]["images"]["test_normal"] == 6


def test_evaluate_without_masks_skips_the_pixel_measures(run, tmp_path):
    (tmp_path / "set" / "ground_truth").rename(tmp_path / "elsewhere")
    assert ev.main([str(run)]) == 0
    row = json.loads((run / "results.json").read_text())["padim"]
    assert "image_auroc" in row and "aupro" not in row and "iou" not in row
    assert "IoU" not in (run / "results.md").read_text()


def test_evaluate_takes_as_many_images_as_samples(tmp_path):
    dataset = data.discover(make_set(tmp_path / "set"))
    with pytest.raises(ValueError, match="3 images for 12 test samples"):
        ev.evaluate(tmp_path, dataset, {}, np.zeros((3, 3, 32, 32), np.uint8), seed=0)
    one = dataclasses.replace(dataset, test=dataset.test[:6])
    with pytest.raises(ValueError, match="both classes"):
        ev.evaluate(tmp_path, one, {}, np.zeros((6, 3, 32, 32), np.uint8), seed=0)


def test_new_images_are_scored_with_a_line_and_a_heat_map_each(run, tmp_path, capsys):
    assert ev.main([str(run)]) == 0
    capsys.readouterr()
    new = tmp_path / "new"
    (new / "inside").mkdir(parents=True)
    for k, name in enumerate(("a.png", "b.png", "inside/a.png")):
        source = tmp_path / "set" / "test" / ("spot" if k else "good") / f"{k}.png"
        Image.open(source).save(new / name)
    Image.open(new / "a.png").save(new / "a.bmp")
    assert ev.main([str(run), "--score", str(new), "--batch-size", "2"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [str(Path(c[0]).relative_to(new)) for c in lines] == [
        "a.bmp",
        "a.png",
        "b.png",
        "inside/a.png",
    ]
    stored = json.loads((run / "results.json").read_text())
    verdicts = []
    for _, padim, score, verdict, igd, other, last in lines:
        assert (padim, igd) == ("padim", "igd")
        above = (
            float(score) >= stored["padim"]["threshold"],
            float(other) >= stored["igd"]["threshold"],
        )
        assert (verdict, last) == tuple("abnormal" if a else "normal" for a in above)
        verdicts.append(last)
    assert verdicts == ["normal", "normal", "abnormal", "abnormal"]
    written = sorted(str(p.relative_to(new)) for p in new.rglob("*.heatmap.png"))
    assert written == [
        "a.bmp.heatmap.png",
        "a.png.heatmap.png",
        "b.heatmap.png",
        "inside/a.heatmap.png",
    ]
    assert ev.main([str(run), "--score", str(new)]) == 0  # our heat maps are neither read nor kept
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert ev.main([str(run), "--score", str(new / "b.png")]) == 0
    assert capsys.readouterr().out.startswith(f"{new / 'b.png'}\tpadim\t")


def test_scoring_never_replaces_a_file_of_the_users(run, tmp_path, capsys):
    assert ev.main([str(run)]) == 0
    capsys.readouterr()
    new = tmp_path / "new"
    new.mkdir()
    for name in ("a.png", "b.png", "b.heatmap.png"):
        Image.open(tmp_path / "set" / "test" / "good" / "0.png").save(new / name)
    before = (new / "b.heatmap.png").read_bytes()
    assert "b.heatmap.png: exists and is no heat map" in refused(
        capsys, run, "--score", new / "a.png", new / "b.png"
    )
    assert (new / "b.heatmap.png").read_bytes() == before
    assert not (new / "a.heatmap.png").exists()


def test_mistakes_take_one_line_and_write_nothing(run, tmp_path, capsys):
    image = tmp_path / "set" / "test" / "good" / "0.png"
    assert "no threshold for padim, igd" in refused(capsys, run, "--score", image)
    assert ev.main([str(run)]) == 0
    capsys.readouterr()
    stamps = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    assert "bad.png" in refused(capsys, run, "--score", image, bad)
    assert "missing.png: no such file" in refused(capsys, run, "--score", tmp_path / "missing.png")
    (tmp_path / "empty").mkdir()
    assert "no images in this folder" in refused(capsys, run, "--score", tmp_path / "empty")
    assert "no finished run here" in refused(capsys, tmp_path / "empty")
    assert "--score goes with neither" in refused(capsys, run, "--score", image, "--data", tmp_path)
    assert "must be 1 or more, got 0" in refused(capsys, run, "--batch-size", 0)
    assert "invalid int value: 'x'" in refused(capsys, run, "--batch-size", "x")
    assert "unrecognized arguments: --nonsense" in refused(capsys, run, "--nonsense")
    assert "RUN" in refused(capsys)
    assert "--device must be auto, cpu or cuda" in refused(capsys, run, "--device", "tpu")
    (tmp_path / "empty" / "config.json").write_text('{"image_size": 3')
    assert "config.json: damaged" in refused(capsys, tmp_path / "empty")
    assert refused(capsys, run, "--data", tmp_path / "nowhere")
    for path in (tmp_path / "set" / "test" / "spot").iterdir():
        path.unlink()
    for path in (tmp_path / "set" / "ground_truth" / "spot").iterdir():
        path.unlink()
    assert "both classes" in refused(capsys, run, "--data", tmp_path / "set")
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == stamps
    assert not list(tmp_path.rglob("*.heatmap.png"))


def test_an_unwritable_folder_is_found_before_anything_is_written(
    run, tmp_path, capsys, monkeypatch
):
    assert ev.main([str(run)]) == 0
    capsys.readouterr()

    def refuse(*, dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(ev.tempfile, "TemporaryFile", refuse)
    image = tmp_path / "set" / "test" / "good" / "0.png"
    assert "Permission denied" in refused(capsys, run, "--score", image)
    assert not list(tmp_path.rglob("*.heatmap.png"))
