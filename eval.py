"""The paper's measures and protocol; evaluates runs and scores new images.   [P:§4.3]

Everything here takes the scores and heat maps that a detector gives; fitting one is not here
(detectors.py), nor what is written (tables.py) and drawn (figures.py) of the result. A larger
score is more abnormal, and "abnormal" always means score >= threshold, for images and for pixels.

Sizes: N images, S pixels a side, P abnormal pixels, K lesions (8-connected regions), T thresholds.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

import data
from detectors import load as load_detector
from figures import (
    choose_cases,
    image_grid,
    localisation_figure,
    map_scale,
    overlay,
    png,
    source_of,
)
from run import Parser, pick_device, write_file
from tables import measured, write_results, write_scores

Array = NDArray[Any]


@dataclass(frozen=True)
class Config:
    validation: int = 50  # images of each class that set the thresholds     [P:§4.3]
    groups: int = 5  # of abnormal images, for IoU, Dice and Pro             [P:§4.5.1]
    group_size: int = 100  # images                                          [P:§4.5.1]
    fpr_limit: float = 0.3  # where the Pro-score's integral ends            [P!§4.3 R10]
    levels: int = 2**14  # thresholds tried for the best mean Dice           [P!§4.3 R9]
    batch_size: int = 8  # images scored at a time
    device: str = "auto"  # cuda if there is one


DEFAULT = Config()
MAPS_IN_MEMORY = 2**28  # pixels, 1 GiB: above that a set's heat maps lie in a temporary file

# --- Measures, in the order of section 4.3 ----------------------------------------------------


def _negatives_above(positive: Array, negatives: Iterable[Array]) -> tuple[Array, Array]:
    """How many negatives lie above, and how many at or above, each (sorted) positive score.

    positive:  (P,) sorted, so that the searches walk through memory in order.
    negatives: blocks of scores; counts add up over blocks, so memory is that of one block.
    returns:   above (P,) and reached (P,), int64.
    """
    above = np.zeros(len(positive), np.int64)
    reached = np.zeros(len(positive), np.int64)
    for block in negatives:
        block = np.sort(block)
        if np.isnan(block[-1:]).any() or np.isnan(positive[-1:]).any():  # NaN is sorted last
            raise ValueError("a score is NaN")
        above += len(block) - np.searchsorted(block, positive, "right")
        reached += len(block) - np.searchsorted(block, positive, "left")
    return above, reached


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """P(s+ > s-) + 1/2 P(s+ = s-), the area under the ROC curve (ties by midrank).   [P:§4.3]

    scores:  any shape, of images or of pixels.
    labels:  same shape, true or 1 where abnormal.
    returns: the exact ratio of pairs, rounded once.
    raises:  ValueError if a class is absent or a score is NaN.
    """
    s, y = _checked(scores, labels)
    positive = np.sort(s[y])
    above, reached = _negatives_above(positive, [s[~y]])
    pairs = 2 * len(positive) * (s.size - len(positive))
    return (pairs - int(above.sum()) - int(reached.sum())) / pairs


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    """Scores and labels as flat arrays, after the checks that every measure needs."""
    s, y = np.asarray(scores).ravel(), np.asarray(labels).ravel().astype(bool)
    if s.shape != y.shape:
        raise ValueError(f"{s.size} scores for {y.size} labels; there must be one for each")
    if not 0 < (positives := int(y.sum())) < y.size:
        raise ValueError(
            f"a measure needs normal and abnormal cases, got {y.size - positives} normal and "
            f"{positives} abnormal"
        )
    if np.isnan(s.min()):
        raise ValueError(f"{int(np.isnan(s).sum())} of {s.size} scores are NaN")
    return s, y


def confusion(scores: ArrayLike, labels: ArrayLike, threshold: float) -> dict[str, float]:
    """Specificity, sensitivity and accuracy of "abnormal if score >= threshold".   [P:§4.3]

    returns: fractions of the normal, of the abnormal and of all cases that are judged rightly.
    raises:  ValueError if a class is absent or a score is NaN.
    """
    s, y = _checked(scores, labels)
    right = (s >= threshold) == y
    return {
        "specificity": float(right[~y].mean()),
        "sensitivity": float(right[y].mean()),
        "accuracy": float(right.mean()),
    }


def youden_threshold(scores: ArrayLike, labels: ArrayLike) -> float:
    """argmax_t J(t) = sensitivity(t) + specificity(t) - 1.   [P!§4.3 R8]

    returns: one of the scores; of several with the same J the highest (fewest false alarms).
    raises:  ValueError if a class is absent or a score is NaN.
    """
    s, y = _checked(scores, labels)
    t = np.unique(s)[::-1]  # (T,) from strict to lax
    hits = y.sum() - np.searchsorted(np.sort(s[y]), t, "left")
    alarms = (~y).sum() - np.searchsorted(np.sort(s[~y]), t, "left")
    j = hits * int((~y).sum()) - alarms * int(y.sum())  # J times both counts: whole numbers
    return float(t[j.argmax()])


def iou(pred: ArrayLike, mask: ArrayLike) -> Array:
    """|P and M| / |P or M| of each image, 1 where both are empty.   [P:§4.3]

    pred, mask: (..., S, S) bool.
    returns:    (...) float64.
    """
    p, m = np.asarray(pred, bool), np.asarray(mask, bool)
    union = (p | m).sum((-2, -1))
    return np.where(union > 0, (p & m).sum((-2, -1)) / np.maximum(union, 1), 1.0)


def dice(pred: ArrayLike, mask: ArrayLike) -> Array:
    """2 |P and M| / (|P| + |M|) of each image, 1 where both are empty.   [P:§4.3]

    pred, mask: (..., S, S) bool.
    returns:    (...) float64.
    """
    p, m = np.asarray(pred, bool), np.asarray(mask, bool)
    total = p.sum((-2, -1)) + m.sum((-2, -1))
    return np.where(total > 0, 2 * (p & m).sum((-2, -1)) / np.maximum(total, 1), 1.0)


def components(masks: Array) -> tuple[Array, int]:
    """The 8-connected regions of each mask: runs of pixels, joined by union-find.   [P!§4.3 R10]

    masks:   (N, H, W) bool.
    returns: (P,) the region 0..K-1 of every true pixel in the order of masks.nonzero(), and K;
             regions are numbered over the whole stack in the order of their first pixel.
    """
    n, h, w = masks.shape
    padded = np.zeros((n * h, w + 2), np.int8)
    padded[:, 1:-1] = masks.reshape(n * h, w)
    edge = np.diff(padded, axis=1)
    row, start = np.nonzero(edge == 1)  # (R,) runs [start, end) of a row
    end = np.nonzero(edge == -1)[1]
    # Runs touch if start' <= end and end' >= start one row up (<= for 8-connection, < for 4).
    key = row * (w + 2)
    up = key - (w + 2)
    first = np.searchsorted(key + end, up + start, "left")
    last = np.searchsorted(key + start, up + end, "right")
    count = np.where(row % h > 0, last - first, 0)  # an image's top row touches nothing above
    i = np.repeat(np.arange(len(row)), count)
    j = np.repeat(first - np.cumsum(count) + count, count) + np.arange(len(i))
    root = np.arange(len(row))
    while (root[i] != root[j]).any():
        a, b = root[i], root[j]
        np.minimum.at(root, a, np.minimum(a, b))  # the larger root hangs below the smaller
        np.minimum.at(root, b, np.minimum(a, b))
        while (root[root] != root).any():
            root = root[root]
    roots, region = np.unique(root, return_inverse=True)
    return np.repeat(region, end - start), len(roots)


def aupro(maps: Array, masks: Array, fpr_limit: float = DEFAULT.fpr_limit) -> float:
    """1/l int_0^l PRO d FPR, PRO(t) = 1/K sum_k |{p in C_k: s_p >= t}| / |C_k|.   [P!§4.3 R10]

    Bergmann et al. 2020: the C_k are the 8-connected regions of all masks, FPR(t) the fraction of
    normal pixels with s >= t. The curve is joined by straight lines between distinct thresholds
    (so tied pixels enter together) and cut at the limit by interpolation.
    maps:      (N, S, S) scores.
    masks:     (N, S, S) bool, all false for a normal image.
    fpr_limit: l, in (0, 1].
    returns:   in [0, 1].
    raises:    ValueError if there is no lesion or no normal pixel, or a score is NaN.
    """
    return pixel_measures(maps, masks, np.arange(len(maps)), fpr_limit)[1]


def pixel_measures(
    maps: Array, masks: Array, index: Array, fpr_limit: float = DEFAULT.fpr_limit
) -> tuple[float, float]:
    """Pixel AUROC and AUPRO of the images in `index`, from one sort of their normal pixels.

    A lesion pixel of score s enters the PRO curve while FPR goes from a (normal pixels above s)
    to b (at or above s), as a ramp of height w = 1 / (K |C_k|); its area up to the limit l is
    w (l - (a + b) / 2) if b <= l, w (l - a)^2 / 2 (b - a) if a < l < b, and 0 beyond.
    """
    if not 0 < fpr_limit <= 1:
        raise ValueError(f"fpr_limit must lie in (0, 1], got {fpr_limit}")
    block = max(1, 2**26 // max(1, maps[0].size))  # 64 M pixels are sorted at a time
    blocks = [index[k : k + block] for k in range(0, len(index), block)]
    found, weights, lesions = [], [], 0
    for part in blocks:
        abnormal = [i for i in part if masks[i].any()]
        if abnormal:
            inside = np.asarray(masks[abnormal], bool)
            region, k = components(inside)
            found += [maps[i][m] for i, m in zip(abnormal, inside, strict=True)]
            weights.append(1 / np.bincount(region)[region])
            lesions += k
    if not lesions:
        raise ValueError(f"no lesion in the masks of {len(index)} images")
    positive, w = np.concatenate(found), np.concatenate(weights)
    order = np.argsort(positive)
    positive, w = positive[order], w[order]
    negatives = (np.concatenate([maps[i][~masks[i].astype(bool)] for i in p]) for p in blocks)
    above, reached = _negatives_above(positive, negatives)
    total = sum(masks[i].size for i in index) - len(positive)
    if not total:
        raise ValueError(f"no normal pixel in the masks of {len(index)} images")
    area = (2 * len(positive) * total - int(above.sum()) - int(reached.sum())) / 2
    a, b = above / total, reached / total
    cut = np.maximum(fpr_limit - a, 0) ** 2 / np.maximum(2 * (b - a), 1e-300)
    ramp = np.where(b <= fpr_limit, fpr_limit - (a + b) / 2, cut)
    return area / (len(positive) * total), float((w * ramp).sum() / (lesions * fpr_limit))


def dice_threshold(
    maps: Array, masks: Array, index: Array, levels: int = DEFAULT.levels
) -> tuple[float, float]:
    """argmax_t mean_i Dice(s_i >= t, M_i) over the images in `index`, and that mean.   [P!§4.3 R9]

    The thresholds tried are `levels` of their distinct scores, at even ranks: all of them if
    there are no more. Each image is sorted once, and all thresholds are searched in it.
    returns: the threshold (the highest of several) and the mean Dice there.
    """
    size = maps[0].size
    step = (len(index) * size >> 22) | 1  # 4 M scores suffice to rank by; odd, to meet all columns
    pooled = np.unique(np.concatenate([np.ravel(maps[i])[i % step :: step] for i in index]))
    ranks = np.linspace(0, len(pooled) - 1, min(levels, len(pooled))).round().astype(int)
    t = pooled[ranks][::-1]  # (T,) from strict to lax
    total = np.zeros(len(t))
    for i in index:
        mask = np.asarray(masks[i], bool)
        inside = np.sort(maps[i][mask])
        hits = len(inside) - np.searchsorted(inside, t, "left")
        predicted = size - np.searchsorted(np.sort(maps[i], axis=None), t, "left")
        total += 2 * hits / np.maximum(predicted + len(inside), 1)
    best = int(total.argmax())
    return float(t[best]), float(total[best] / len(index))


# --- The protocol of section 4.3 ---------------------------------------------------------------


def validation_split(labels: ArrayLike, seed: int, config: Config = DEFAULT) -> Array:
    """50 normal and 50 abnormal test images, half of a class that has fewer than 100.   [P!§4.3 R8]

    labels:  (N,) 1 where abnormal.
    returns: (N,) bool, true for the images that set the thresholds.
    raises:  ValueError unless each class has two images or more.
    """
    y = np.asarray(labels).astype(bool)
    if min(y.sum(), (~y).sum()) < 2:
        raise ValueError(
            f"the test split has {int((~y).sum())} normal and {int(y.sum())} abnormal images; "
            "it needs two of each or more: some set the threshold, the others measure"
        )
    chosen, rng = np.zeros(len(y), bool), np.random.default_rng(seed)
    for members in (np.flatnonzero(~y), np.flatnonzero(y)):
        take = min(config.validation, len(members) // 2)
        chosen[rng.choice(members, take, replace=False)] = True
    return chosen


def protocol(
    scores: ArrayLike,
    labels: ArrayLike,
    maps: Array | None = None,
    masks: Array | None = None,
    known: Array | None = None,
    *,
    seed: int,
    paper_protocol: bool = False,
    config: Config = DEFAULT,
) -> dict[str, Any]:
    """All measures of one detector: thresholds on 50 + 50 images, the rest measured.   [P!§4.3 R8]

    scores:  (N,) of the test images.      labels: (N,) 1 where abnormal.
    maps:    (N, S, S) heat maps.          masks:  (N, S, S), false for normal images; or None.
    known:   (N,) false where an abnormal image's mask is unknown: left out of pixel measures.
    seed:    of the validation images and of the five groups.
    paper_protocol: measure on all test images, those that set the thresholds included.
    returns: a row of results.json: image_auroc, specificity, sensitivity, accuracy, threshold,
             images (counts), notes (sentences); with masks also what `localisation` returns.
    raises:  ValueError if a class has fewer than two images, or a score is NaN.
    """
    s, y = np.asarray(scores, np.float64), np.asarray(labels).astype(bool)
    validation = validation_split(y, seed, config)
    test = np.ones(len(y), bool) if paper_protocol else ~validation
    threshold = youden_threshold(s[validation], y[validation])
    row: dict[str, Any] = {"image_auroc": auroc(s[test], y[test])}
    row |= confusion(s[test], y[test], threshold) | {"threshold": threshold}
    if maps is not None and masks is not None:
        lesion = y & np.array([bool(m.any()) for m in masks])
        lesion &= True if known is None else np.asarray(known, bool)
        tune, rest = np.flatnonzero(lesion & validation), np.flatnonzero(lesion & test)
        if len(tune) and len(rest):
            groups, everything = abnormal_groups(rest, seed, config), test & (lesion | ~y)
            row |= localisation(maps, masks, tune, groups, np.flatnonzero(everything), config)
    else:
        lesion = None
    sets = {"validation_normal": validation & ~y, "validation_abnormal": validation & y}
    sets |= {"test_normal": test & ~y, "test_abnormal": test & y}
    row["images"] = {name: int(chosen.sum()) for name, chosen in sets.items()}
    row["notes"] = _notes(y, lesion, validation, test, config)
    return row


def _notes(
    y: Array, lesion: Array | None, validation: Array, test: Array, config: Config
) -> list[str]:
    """A sentence for whatever differs from 50 + 50 images and five groups of 100."""
    size, groups = config.group_size, config.groups
    few = min(validation[~y].sum(), validation[y].sum()) < config.validation
    notes = {
        f"A class has fewer than {2 * config.validation} test images: half of it, not "
        f"{config.validation}, helps to set the thresholds.": few,
        "The images that set the thresholds are measured as well.": (validation & test).any(),
    }
    if lesion is not None:
        rest, without = int((lesion & test).sum()), int((y & ~lesion).sum())
        usable = rest and (lesion & validation).any()
        notes |= {
            f"{without} abnormal images have no mask: left out of pixel measures.": without,
            "Too few masks for the pixel measures.": not usable,
            f"{rest} abnormal images with masks: one group, so no standard deviation.": (
                usable and rest <= size
            ),
            f"The {groups} groups of {size} are drawn from {rest} abnormal images and share some: "
            "their standard deviation is too small.": usable and size < rest < groups * size,
        }
    return [sentence for sentence, holds in notes.items() if holds]


def abnormal_groups(index: Array, seed: int, config: Config = DEFAULT) -> list[Array]:
    """Five groups of 100 abnormal images; only one, of all, if there are no more.   [P:§4.5.1]

    returns: arrays of indices, disjoint if there are 500 images or more.
    """
    rng = np.random.default_rng([seed, 1])
    if len(index) <= config.group_size:
        return [index]
    if len(index) < config.groups * config.group_size:
        return [rng.choice(index, config.group_size, replace=False) for _ in range(config.groups)]
    return list(
        rng.permutation(index)[: config.groups * config.group_size].reshape(config.groups, -1)
    )


def localisation(
    maps: Array,
    masks: Array,
    tune: Array,
    groups: Sequence[Array],
    everything: Array,
    config: Config = DEFAULT,
) -> dict[str, Any]:
    """IoU, Dice and Pro over groups as in Table 6, pixel AUROC and AUPRO over all.   [P!§4.3 R9]

    tune, groups, everything: indices of the abnormal images that set the pixel threshold, of the
             groups of abnormal images, and of all images measured, normal ones (empty masks) too.
    returns: pixel_threshold; iou, dice, pro and *_sd over groups (None for one group);
             best_possible (threshold, iou, dice: what the best threshold for the groups
             themselves would give); pixel_auroc and aupro of everything.
    """
    t, _ = dice_threshold(maps, masks, tune, config.levels)
    grouped = np.concatenate(groups)  # an image of two groups counts twice, as in their mean
    best, best_dice = dice_threshold(maps, masks, grouped, config.levels)
    values = np.zeros((3, len(maps)))  # IoU, Dice and the best possible IoU of each image
    for i in np.unique(grouped):
        mask = np.asarray(masks[i], bool)
        values[:, i] = iou(maps[i] >= t, mask), dice(maps[i] >= t, mask), iou(maps[i] >= best, mask)
    means = {
        "iou": [values[0, group].mean() for group in groups],
        "dice": [values[1, group].mean() for group in groups],
        "pro": [pixel_measures(maps, masks, group, config.fpr_limit)[1] for group in groups],
    }
    row: dict[str, Any] = {"pixel_threshold": t}
    for name, of_groups in means.items():
        row[name] = float(np.mean(of_groups))
        row[f"{name}_sd"] = float(np.std(of_groups, ddof=1)) if len(groups) > 1 else None
    row["best_possible"] = {"threshold": t, "iou": row["iou"], "dice": row["dice"]}
    if best_dice > row["dice"]:  # t itself may lie between the levels that were tried
        best_iou = float(values[2, grouped].mean())
        row["best_possible"] = {"threshold": best, "iou": best_iou, "dice": best_dice}
    row["pixel_auroc"], row["aupro"] = pixel_measures(maps, masks, everything, config.fpr_limit)
    return row


def score_set(
    detector: Any, images: Array, *, batch: int = DEFAULT.batch_size, label: str = "score"
) -> tuple[Array, Array]:
    """Scores and heat maps of a whole set, with a progress line.

    detector: score(images (B, 3, S, S) uint8) -> maps (B, S, S) float32, scores (B,).
    images:   (N, 3, S, S) uint8; a memory-map is read batch by batch.
    returns:  scores (N,) float32 and maps (N, S, S) float32, in a temporary file if large.
    raises:   ValueError if a score or heat map is NaN.
    """
    n, side = len(images), images.shape[-1]
    scores: Array = np.zeros(n, np.float32)
    maps: Array
    if n * side * side > MAPS_IN_MEMORY:
        with tempfile.TemporaryFile() as file:
            maps = np.memmap(file, np.float32, "w+", shape=(n, side, side))
    else:
        maps = np.zeros((n, side, side), np.float32)
    for k in data.progress(range(0, n, batch), -(-n // batch), label):
        part = slice(k, k + batch)
        maps[part], scores[part] = (v.cpu().numpy() for v in detector.score(np.array(images[part])))
        if np.isnan(scores[part]).any() or np.isnan(maps[part]).any():
            raise ValueError(f"{label}: the detector gives NaN in images {k} to {k + batch - 1}")
    return scores, maps


def evaluate(
    run: Path,
    dataset: data.Dataset,
    detectors: Mapping[str, Any],
    images: Array,
    masks: Array | None = None,
    known: Array | None = None,
    *,
    seed: int,
    paper_protocol: bool = False,
    batch: int = DEFAULT.batch_size,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Score the test images, apply the protocol, write results, scores and figures.   [P:§4.3]

    run:       folder that receives results.json, results.md, scores.csv and figures/.
    dataset:   its `test` samples belong to images, one each, in order.
    detectors: name of the row (padim, igd, untrained) -> detector; scored one after the other.
    images:    (N, 3, S, S) uint8.   masks: (N, S, S).   known: (N,) bool.
    extra:     top-level entries of results.json: config, seconds, init, rows of other detectors.
    returns:   what results.json holds. Nothing is written before all of it is computed.
    raises:    ValueError as `protocol`, before anything is scored.
    """
    if len(dataset.test) != len(images):
        raise ValueError(f"{len(images)} images for {len(dataset.test)} test samples")
    dataset.check_test()
    started = time.perf_counter()
    labels = np.array([sample.label for sample in dataset.test], bool)
    validation = validation_split(labels, seed)
    usable = ~validation & (known if masks is not None and known is not None else True)
    rows, scores, drawn = {}, {}, {}
    for name, detector in detectors.items():
        s, maps = score_set(detector, images, batch=batch, label=f"score {name}")
        row = protocol(s, labels, maps, masks, known, seed=seed, paper_protocol=paper_protocol)
        row["map_scale"] = map_scale(maps, labels)
        row["data"] = _data_key(dataset, seed, paper_protocol)
        cases = choose_cases(s, labels, usable)
        drawn[name] = localisation_figure(images, maps, masks, dataset.test, s, row, cases, name)
        rows[name], scores[name] = row, s
    results = {**rows, **(extra or {})}
    results["seconds"] = {**results.get("seconds", {}), "evaluate": time.perf_counter() - started}
    write_results(run, results)
    write_scores(run, dataset.test, scores, rows, validation)
    for name, figure in drawn.items():
        write_file(run / "figures" / f"localisation_{name}.png", png(figure))
    return results


def _data_key(dataset: data.Dataset, seed: int, paper_protocol: bool) -> dict[str, Any]:
    """What two rows of a results table must share to be comparable."""
    key = {"layout": dataset.layout, "root": str(dataset.root), "seed": seed}
    return key | {"paper_protocol": paper_protocol}


# --- New images, and the command line ----------------------------------------------------------


def load_run(run: Path, device: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A run folder's config, its results (empty if there are none) and its detectors by name."""
    files = [run / name for name in ("detector.pt", "detector_igd.pt") if (run / name).is_file()]
    config = _read_json(run / "config.json")
    if not files or "image_size" not in config:
        raise ValueError(
            f"{run}: no finished run here (config.json and detector.pt are looked for)"
        )
    loaded = [load_detector(file, pick_device(device)) for file in files]
    return config, _read_json(run / "results.json"), {type(d).__name__.lower(): d for d in loaded}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); move it away or run again") from None


def evaluate_run(
    run: Path,
    root: Path | None,
    *,
    paper_protocol: bool,
    skip_bad: bool,
    batch: int,
    device: str,
) -> dict[str, Any]:
    """Evaluate a run again, on its own data set (root None) or another one.

    Rows that cannot be made again (untrained) stay if they are of the same data and protocol.
    """
    config, old, found = load_run(run, device)
    root = root or (Path(config["data"]) if config.get("data") else None)
    if root is None:
        raise ValueError(f"--data is needed: {run / 'config.json'} names no data set")
    seed, size = int(config.get("seed", 0)), int(config["image_size"])
    dataset = data.discover(root, seed=seed)
    if not dataset.test:
        raise ValueError(f"{root}: {dataset.layout} without test images: nothing to measure")
    dataset.check_test()  # before anything is written
    dataset, images, masks, known = data.decode_test(
        dataset, size, run / "cache", skip_bad=skip_bad or bool(config.get("skip_bad"))
    )
    extra = {}
    for name, value in old.items():
        if name in measured(old) and value.get("data") != _data_key(dataset, seed, paper_protocol):
            print(f"left out: the row {name}, of other data or another protocol", file=sys.stderr)
        elif name not in found:
            extra[name] = value
    return evaluate(
        run, dataset, found, images, masks, known,
        seed=seed, paper_protocol=paper_protocol, batch=batch, extra=extra,
    )  # fmt: skip


def score_files(
    run: Path, paths: Sequence[Path], *, skip_bad: bool, batch: int, device: str
) -> None:
    """Print a line for each new image and write its heat map beside it, as NAME.heatmap.png.

    raises: ValueError, before anything is written, if an image cannot be read, a heat map would
            replace a file that is not ours, or the run has no thresholds.  OSError if a folder
            cannot be written.
    """
    config, results, found = load_run(run, device)
    if missing := [name for name in found if name not in results]:
        raise ValueError(
            f"{run}: no threshold for {', '.join(missing)}; evaluate it first (--data)"
        )
    targets = _heatmap_files([file for path in paths for file in _image_files(path)])
    for folder in {target.parent for target in targets.values()}:
        tempfile.TemporaryFile(dir=folder).close()  # an unwritable folder fails here
    scales = {name: results[name]["map_scale"] for name in found}
    note = "Scale from dark to bright: "
    note += ", ".join(f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in scales.items())
    with tempfile.TemporaryDirectory() as cache:
        size = int(config["image_size"])
        images, kept = data.decode(list(targets), size, Path(cache), skip_bad=skip_bad)
        files = [list(targets)[i] for i in kept]
        for k in range(0, len(files), batch):
            block = np.array(images[k : k + batch])
            given = {name: detector.score(block) for name, detector in found.items()}
            for i, file in enumerate(files[k : k + batch]):
                line, panels, heads = [str(file)], [block[i]], ["image"]
                for name, (maps, scores) in given.items():
                    score = float(scores[i])
                    verdict = "abnormal" if score >= results[name]["threshold"] else "normal"
                    line += [name, f"{score:.6g}", verdict]
                    panels.append(overlay(block[i], maps[i].cpu().numpy(), scales[name], 256))
                    heads.append(f"{name}: {score:.4g}, {verdict}")
                figure = image_grid([panels], columns=heads, title=file.name, note=note, side=256)
                write_file(targets[file], png(figure, file.name))
                print("\t".join(line), flush=True)


def _image_files(path: Path) -> list[Path]:
    """A file as given, or the images of a folder, without our own heat maps."""
    if not path.is_dir():
        if not path.is_file():
            raise ValueError(f"{path}: no such file or folder")
        return [path]
    inside = [
        p
        for p in sorted(path.rglob("*"))
        if p.suffix.lower() in data.EXTENSIONS and not p.name.startswith(".") and not source_of(p)
    ]
    if not inside:
        raise ValueError(f"{path}: no images in this folder")
    return inside


def _heatmap_files(files: Sequence[Path]) -> dict[Path, Path]:
    """The heat map's path of each image: NAME without its ending, unless two share that."""
    files = list(dict.fromkeys(files))  # a file given twice is scored once
    stems = [file.with_suffix("") for file in files]
    targets = {}
    for file, stem in zip(files, stems, strict=True):
        name = file.stem if stems.count(stem) == 1 else file.name
        targets[file] = target = file.with_name(f"{name}.heatmap.png")
        if target.exists() and source_of(target) != file.name:
            raise ValueError(f"{target}: exists and is no heat map of {file.name}; move it away")
    return targets


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for a mistake of the user's, in one line."""
    parser = Parser(prog="eval.py", description="Evaluates a run again, or scores new images.")
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a folder that pmsacl.py wrote")
    add("--data", type=Path, help="data set to evaluate on (default: the run's own)")
    add("--score", type=Path, nargs="+", metavar="PATH", help="new images, or folders of them")
    add("--paper-protocol", action="store_true", help="also measure what sets the thresholds")
    add("--skip-bad", action="store_true", help="leave unreadable files out")
    add("--batch-size", type=int, default=DEFAULT.batch_size, help="images at a time")
    add("--device", default=DEFAULT.device, help="auto, cpu or cuda")
    args = parser.parse_args(argv)
    try:
        if args.score and (args.data or args.paper_protocol):
            raise ValueError("--score goes with neither --data nor --paper-protocol")
        if args.batch_size < 1:
            raise ValueError(f"--batch-size must be 1 or more, got {args.batch_size}")
        how = {"skip_bad": args.skip_bad, "batch": args.batch_size, "device": args.device}
        if args.score:
            score_files(args.run, args.score, **how)
        else:
            evaluate_run(args.run, args.data, paper_protocol=args.paper_protocol, **how)
            print((args.run / "results.md").read_text(), end="")
    except (ValueError, OSError) as error:
        print("eval.py:", str(error).replace("\n", " "), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
