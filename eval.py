"""The paper's measures and protocol, its tables and figures; scores new images.   [P:§4.3-4.6]

Everything here takes the scores and heat maps that a detector gives; fitting one is not here
(detectors.py), nor training (pmsacl.py). A larger score is more abnormal, and "abnormal" always
means score >= threshold, for images and for pixels.

Sizes: N images, S pixels a side, P abnormal pixels, K lesions (8-connected regions), T thresholds.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectors import load as load_detector
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

import data

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
    paper_protocol: bool = False  # keep the validation images in            [P!§4.3 R8]


DEFAULT = Config()

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
    if not total or np.isnan(positive[-1]):
        raise ValueError("no normal pixel in the masks" if not total else "a heat map holds NaN")
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
    step = (len(index) * size >> 22) | 1  # 4 M scores are enough to rank by; odd: meets all columns
    pooled = np.unique(np.concatenate([np.ravel(maps[i])[k % step :: step] for k, i in
                                       enumerate(index)]))  # fmt: skip
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
    returns: a row of results.json: image_auroc, specificity, sensitivity, accuracy, threshold;
             with masks also what `localisation` returns; images (counts) and notes (sentences).
    raises:  ValueError if a class has fewer than two images, or a score is NaN.
    """
    s, y = np.asarray(scores, np.float64), np.asarray(labels).astype(bool)
    validation = validation_split(y, seed, config)
    test = np.ones(len(y), bool) if paper_protocol else ~validation
    threshold = youden_threshold(s[validation], y[validation])
    row: dict[str, Any] = {"image_auroc": auroc(s[test], y[test])}
    row |= confusion(s[test], y[test], threshold) | {"threshold": threshold}
    row["images"] = {
        f"{split}_{kind}": int((chosen & (y == abnormal)).sum())
        for split, chosen in (("validation", validation), ("test", test))
        for kind, abnormal in (("normal", False), ("abnormal", True))
    }
    row["notes"] = []
    if (
        min(row["images"]["validation_normal"], row["images"]["validation_abnormal"])
        < config.validation
    ):
        row["notes"].append(
            f"A class has fewer than {2 * config.validation} test images: half of it, "
            f"not {config.validation}, helps to set the thresholds."
        )
    if paper_protocol:
        row["notes"].append("The images that set the thresholds are measured as well.")
    if maps is not None and masks is not None:
        known = np.ones(len(y), bool) if known is None else np.asarray(known, bool)
        row |= localisation(maps, masks, known, y, validation, test, seed, row["notes"], config)
    return row


def localisation(
    maps: Array,
    masks: Array,
    known: Array,
    labels: Array,
    validation: Array,
    test: Array,
    seed: int,
    notes: list[str],
    config: Config = DEFAULT,
) -> dict[str, Any]:
    """The pixel measures of a row, for the images that validation and test select.   [P!§4.3 R9]

    notes:   receives a sentence for whatever differs from the paper's protocol.
    returns: pixel_threshold; iou, dice, pro (means over the groups of abnormal images, as Table 6)
             and their standard deviations *_sd (None for one group); best_possible (threshold,
             dice, iou on the measured images themselves); pixel_auroc and aupro, of all measured
             images, normal ones with an empty mask. Empty if no mask can be used.
    """
    lesion = labels & known & np.array([bool(m.any()) for m in masks])
    tune, rest = np.flatnonzero(lesion & validation), np.flatnonzero(lesion & test)
    if len(unused := np.flatnonzero(labels & ~lesion)):
        notes.append(
            f"{len(unused)} abnormal images without a usable mask: no pixel measures there."
        )
    if not len(tune) or not len(rest):
        notes.append("Too few masks for the pixel measures.")
        return {}
    t, _ = dice_threshold(maps, masks, tune, config.levels)
    best_t, best_dice = dice_threshold(maps, masks, rest, config.levels)
    rng = np.random.default_rng([seed, 1])
    g, size = config.groups, config.group_size
    if len(rest) <= size:
        groups = [rest]
        notes.append(f"{len(rest)} abnormal images: one group, so no standard deviation.")
    elif len(rest) >= g * size:
        groups = list(rng.permutation(rest)[: g * size].reshape(g, size))
    else:
        groups = [rng.choice(rest, size, replace=False) for _ in range(g)]
        notes.append(f"The {g} groups of {size} share images: only {len(rest)} are abnormal.")
    overlap = {"iou": iou, "dice": dice}
    per_image = {k: np.zeros(len(labels)) for k in overlap}
    best_iou = 0.0
    for i in rest:
        mask = np.asarray(masks[i], bool)
        for k, measure in overlap.items():
            per_image[k][i] = measure(maps[i] >= t, mask)
        best_iou += float(iou(maps[i] >= best_t, mask)) / len(rest)
    means = {k: [float(v[group].mean()) for group in groups] for k, v in per_image.items()}
    means["pro"] = [pixel_measures(maps, masks, group, config.fpr_limit)[1] for group in groups]
    row: dict[str, Any] = {"pixel_threshold": t}
    for k, values in means.items():
        row[k] = float(np.mean(values))
        row[f"{k}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    row["best_possible"] = {"threshold": best_t, "dice": best_dice, "iou": best_iou}
    measured = np.flatnonzero(test & (lesion | ~labels))
    row["pixel_auroc"], row["aupro"] = pixel_measures(maps, masks, measured, config.fpr_limit)
    return row


def score_set(
    detector: Any, images: Array, *, batch: int = DEFAULT.batch_size, label: str = "score"
):
    """Scores and heat maps of a whole set, with a progress line.

    detector: score(images (B, 3, S, S) uint8) -> maps (B, S, S) float32, scores (B,).
    images:   (N, 3, S, S) uint8; a memory-map is read batch by batch.
    returns:  scores (N,) float32 and maps (N, S, S) float32, in a temporary file above 1 GiB.
    raises:   ValueError if a score or heat map is NaN.
    """
    n, side = len(images), images.shape[-1]
    scores, shape = np.zeros(n, np.float32), (n, side, side)
    if n * side * side > 2**28:
        with tempfile.TemporaryFile() as file:
            maps: Array = np.memmap(file, np.float32, "w+", shape=shape)
    else:
        maps = np.zeros(shape, np.float32)
    starts = range(0, n, batch)
    for k in data.progress(starts, len(starts), label):
        found, value = detector.score(np.asarray(images[k : k + batch]))
        maps[k : k + batch], scores[k : k + batch] = found.cpu().numpy(), value.cpu().numpy()
        if np.isnan(scores[k : k + batch]).any() or np.isnan(maps[k : k + batch]).any():
            raise ValueError(
                f"{label}: the detector gives NaN for images {k} to {k + len(value) - 1}"
            )
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
    extra:     top-level entries of results.json: config, seconds, init.
    returns:   what results.json holds. Nothing is written before all of it is computed.
    raises:    ValueError as `protocol`, before anything is scored.
    """
    labels = np.array([s.label for s in dataset.test], bool)
    if len(labels) != len(images):
        raise ValueError(f"{len(images)} images for {len(labels)} test samples")
    validation = validation_split(labels, seed)
    started = time.perf_counter()
    rows: dict[str, Any] = {}
    scores: dict[str, Array] = {}
    figures: dict[str, Image.Image] = {}
    for name, detector in detectors.items():
        scores[name], maps = score_set(detector, images, batch=batch, label=f"score {name}")
        row = protocol(
            scores[name], labels, maps, masks, known, seed=seed, paper_protocol=paper_protocol
        )
        row["map_scale"] = map_scale(maps[~labels & ~validation], maps[labels & ~validation])
        row["data"] = {"layout": dataset.layout, "root": str(dataset.root)}
        row["data"] |= {"seed": seed, "paper_protocol": paper_protocol}
        rows[name] = row
        shown = choose_cases(
            scores[name], labels, ~validation & (known if known is not None else True)
        )
        figures[name] = localisation_figure(
            [images[i] for i in shown],
            [maps[i] for i in shown],
            None if masks is None else [masks[i] for i in shown],
            [dataset.test[i].kind for i in shown],
            scores[name][shown],
            labels[shown],
            row,
            title=name,
        )
    results = {**rows, **(extra or {})}
    results["seconds"] = {**results.get("seconds", {}), "evaluate": time.perf_counter() - started}
    write_results(run, results)
    write_scores(run, dataset.test, scores, rows, validation)
    for name, figure in figures.items():
        write_file(run / "figures" / f"localisation_{name}.png", png(figure))
    return results


# --- Tables ------------------------------------------------------------------------------------

_DETECTION = ("AUC", "Specificity", "Sensitivity", "Accuracy")
_LOCALISATION = ("IoU", "Dice", "Pro")
# The paper's Tables 1-7 as printed: number -> data set, columns, rows. In Table 3, * marks
# methods without ImageNet pre-training. Table 5 holds standard deviations of PMSACL - PaDiM.
# fmt: off
PAPER: dict[int, tuple[str, tuple[str, ...], dict[str, tuple[float, ...]]]] = {
    1: ("Hyper-Kvasir", _DETECTION, {
        "DAE": (0.705, 0.522, 0.756, 0.693),
        "OCGAN": (0.813, 0.691, 0.811, 0.795),
        "f-AnoGAN": (0.907, 0.846, 0.915, 0.883),
        "ADGAN": (0.913, 0.879, 0.946, 0.893),
        "MS-SSIM": (0.917, 0.857, 0.925, 0.912),
        "PANDA": (0.937, 0.805, 0.919, 0.917),
        "CutPaste": (0.949, 0.847, 0.957, 0.932),
        "PaDiM": (0.943, 0.846, 0.929, 0.898),
        "CCD - PaDiM": (0.978, 0.923, 0.961, 0.967),
        "PMSACL - PaDiM": (0.996, 0.966, 0.981, 0.983),
        "IGD": (0.939, 0.858, 0.913, 0.906),
        "CCD - IGD": (0.972, 0.934, 0.947, 0.956),
        "PMSACL - IGD": (0.995, 0.947, 0.965, 0.972),
    }),
    2: ("LAG", _DETECTION, {
        "MS-SSIM": (0.823, 0.257, 0.937, 0.774),
        "f-AnoGAN": (0.778, 0.565, 0.899, 0.763),
        "PANDA": (0.789, 0.624, 0.869, 0.767),
        "CutPaste": (0.745, 0.372, 0.788, 0.685),
        "PaDiM": (0.688, 0.314, 0.809, 0.673),
        "CCD - PaDiM": (0.728, 0.429, 0.779, 0.694),
        "PMSACL - PaDiM": (0.761, 0.466, 0.877, 0.753),
        "IGD": (0.796, 0.396, 0.958, 0.805),
        "CCD - IGD": (0.874, 0.572, 0.944, 0.875),
        "PMSACL - IGD": (0.908, 0.531, 0.979, 0.884),
    }),
    3: ("Liu et al.", _DETECTION, {
        "DAE*": (0.629, 0.733, 0.554, 0.597),
        "OCGAN*": (0.592, 0.716, 0.534, 0.624),
        "ADGAN*": (0.730, 0.852, 0.496, 0.713),
        "f-AnoGAN": (0.735, 0.865, 0.579, 0.694),
        "PANDA": (0.719, 0.846, 0.551, 0.671),
        "CutPaste": (0.779, 0.895, 0.772, 0.738),
        "PaDiM": (0.741, 0.851, 0.738, 0.751),
        "CCD - PaDiM": (0.789, 0.946, 0.792, 0.767),
        "PMSACL - PaDiM": (0.814, 0.973, 0.725, 0.803),
        "IGD": (0.787, 0.914, 0.596, 0.743),
        "CCD - IGD": (0.837, 0.985, 0.774, 0.815),
        "PMSACL - IGD": (0.851, 0.986, 0.792, 0.829),
    }),
    4: ("Covid-X", _DETECTION, {
        "MS-SSIM": (0.634, 0.572, 0.406, 0.577),
        "f-AnoGAN": (0.669, 0.718, 0.365, 0.532),
        "PANDA": (0.629, 0.762, 0.447, 0.591),
        "CutPaste": (0.658, 0.701, 0.494, 0.648),
        "PaDiM": (0.614, 0.753, 0.318, 0.559),
        "CCD - PaDiM": (0.632, 0.673, 0.569, 0.616),
        "PMSACL - PaDiM": (0.658, 0.749, 0.467, 0.615),
        "IGD": (0.699, 0.885, 0.490, 0.688),
        "CCD - IGD": (0.746, 0.851, 0.595, 0.722),
        "PMSACL - IGD": (0.872, 0.863, 0.775, 0.813),
    }),
    5: ("standard deviations", _DETECTION, {
        "Hyper-Kvasir": (0.0084, 0.0079, 0.0127, 0.0036),
        "LAG": (0.0163, 0.0085, 0.0105, 0.0121),
        "Covid-X": (0.0107, 0.0149, 0.0092, 0.0171),
    }),
    6: ("Hyper-Kvasir", _LOCALISATION, {
        "PaDiM": (0.341, 0.475, 0.803),
        "CCD - PaDiM": (0.378, 0.497, 0.881),
        "PMSACL - PaDiM": (0.406, 0.554, 0.854),
        "IGD": (0.303, 0.417, 0.794),
        "CCD - IGD": (0.372, 0.502, 0.865),
        "PMSACL - IGD": (0.384, 0.521, 0.876),
    }),
    7: ("LAG", _LOCALISATION, {
        "PaDiM": (0.427, 0.579, 0.596),
        "CCD - PaDiM": (0.462, 0.612, 0.634),
        "PMSACL - PaDiM": (0.475, 0.643, 0.628),
        "IGD": (0.409, 0.539, 0.603),
        "CCD - IGD": (0.509, 0.645, 0.677),
        "PMSACL - IGD": (0.516, 0.667, 0.693),
    }),
}
# fmt: on
_OURS = {"padim": "PMSACL - PaDiM", "igd": "PMSACL - IGD"}  # our row -> the paper's


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, making its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def png(image: Image.Image, source: str = "") -> bytes:
    """The PNG file of an image, marked as ours and with the file that it shows."""
    buffer, info = io.BytesIO(), PngImagePlugin.PngInfo()
    info.add_text("Software", "pmsacl")
    info.add_text("Source", source)
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def write_results(run: Path, results: Mapping[str, Any]) -> None:
    """results.json as given, and results.md in the paper's column order."""
    content = json.dumps(results, indent=2, allow_nan=False, default=str)
    write_file(run / "results.json", f"{content}\n".encode())
    write_file(run / "results.md", results_table(results).encode())


def results_table(results: Mapping[str, Any]) -> str:
    """results.md: Table 1's and Table 6's columns, the paper's row below ours on the same data.

    The paper's figures appear only if Dataset.layout says that the data set is Hyper-Kvasir.
    """
    rows = {k: v for k, v in results.items() if isinstance(v, dict) and "image_auroc" in v}
    first = next(iter(rows.values()))
    layout = first["data"]["layout"] if "data" in first else ""
    same = "hyperkvasir" in layout.lower().replace("-", "").replace(" ", "").replace("_", "")
    count = first["images"]

    def table(number: int, keys: Sequence[str], header: Sequence[str]) -> list[str]:
        lines = ["| | " + " | ".join(header) + " |", "|---" * (len(header) + 1) + "|"]
        for name, row in rows.items():
            if keys[0] not in row:
                continue
            cells = [f"{row[k]:.3f}" + (f" ± {row[sd]:.3f}" if row.get(sd := f"{k}_sd") else "")
                     for k in keys]  # fmt: skip
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
            if same and name in _OURS:
                printed = [f"{v:.3f}" for v in PAPER[number][2][_OURS[name]]]
                printed += [""] * (len(header) - len(printed))
                label = f"paper, Table {number}: {_OURS[name]}"
                lines.append(f"| *{label}* | " + " | ".join(printed) + " |")
        return [*lines, ""]

    text = [
        "# Results",
        "",
        f"Data: {first.get('data', {}).get('root', 'not said')} ({layout or 'layout not said'}). "
        f"Thresholds from {count['validation_normal']} normal and {count['validation_abnormal']} "
        f"abnormal test images; measured on {count['test_normal']} normal and "
        f"{count['test_abnormal']} abnormal ones."
        + (f" Start weights: {results['init']}." if "init" in results else ""),
        "",
        *table(1, ("image_auroc", "specificity", "sensitivity", "accuracy"), _DETECTION),
    ]
    if any("iou" in row for row in rows.values()):
        text += table(
            6,
            ("iou", "dice", "pro", "aupro", "pixel_auroc"),
            (*_LOCALISATION, "Pro with normal images", "pixel AUROC"),
        )
        text += [
            "IoU, Dice and Pro: abnormal images only, mean (± standard deviation) over groups of "
            "100 as in Table 6. The last two columns: all measured images.",
            "",
        ]
    for name, row in rows.items():
        line = f"- {name}: an image is abnormal at a score of {row['threshold']:.6g} or more"
        if "iou" in row:
            best = row["best_possible"]
            line += (
                f", a pixel at {row['pixel_threshold']:.6g} or more; the best possible pixel "
                f"threshold, {best['threshold']:.6g}, would give Dice {best['dice']:.3f} and IoU "
                f"{best['iou']:.3f}"
            )
        text.append(line + ".")
    text += ["", *dict.fromkeys(f"- {note}" for row in rows.values() for note in row["notes"])]
    return "\n".join(text).rstrip() + "\n"


def write_scores(
    run: Path,
    samples: Sequence[data.Sample],
    scores: Mapping[str, Array],
    rows: Mapping[str, Any],
    validation: Array,
) -> None:
    """scores.csv: path, kind, label, split, then score and predicted label of each detector."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"{name}_{what}" for name in scores for what in ("score", "predicted")]
    writer.writerow(["path", "kind", "label", "split", *columns])
    for i, sample in enumerate(samples):
        cells: list[Any] = [sample.path, sample.kind, sample.label]
        cells.append("validation" if validation[i] else "test")
        for name, s in scores.items():
            cells += [f"{s[i]:.9g}", int(s[i] >= rows[name]["threshold"])]
        writer.writerow(cells)
    write_file(run / "scores.csv", text.getvalue().encode())


# --- Figures, as Fig. 3-5 ----------------------------------------------------------------------

_INFERNO = np.array(  # dark is low, bright is high, for every kind of colour vision
    [(0, 0, 4), (40, 11, 84), (101, 21, 110), (159, 42, 99), (212, 72, 66), (245, 125, 21),
     (250, 193, 39), (252, 255, 164)]
)  # fmt: skip
GREEN, RED, YELLOW, CYAN = (40, 160, 60), (215, 40, 40), (255, 225, 0), (0, 235, 235)


def heat_colours(x: Array) -> Array:
    """Values in [0, 1] to RGB uint8, from dark violet to light yellow; clipped outside."""
    at = np.clip(x, 0, 1) * (len(_INFERNO) - 1)
    channels = [np.interp(at, np.arange(len(_INFERNO)), c) for c in _INFERNO.T]
    return np.stack(channels, -1).round().astype(np.uint8)


def map_scale(normal: Array, abnormal: Array) -> tuple[float, float]:
    """The ends of the colour scale that all heat maps of a detector share.

    returns: the median of the normal images' pixels (what is usual is dark) and the 99.5th
             percentile of the abnormal ones'.
    """
    step = max(1, max(normal.size, abnormal.size) // 2**22) | 1
    low = float(np.median(normal.reshape(-1)[::step]))
    high = float(np.percentile(abnormal.reshape(-1)[::step], 99.5))
    return low, max(high, low + 1e-12)


def image_grid(
    cells: Sequence[Sequence[Array | Image.Image | None]],
    *,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    title: str = "",
    note: str = "",
    side: int = 160,
) -> Image.Image:
    """A labelled grid of images on white.

    cells:   rows of images: PIL, (3, S, S) or (S, S, 3) uint8; None leaves the place empty.
    rows:    a label left of each row.        columns: a label above each column.
    title:   above all, larger.               note:    below all; its lines are kept.
    side:    pixels of a cell; images are resized to it.
    """
    font, large = ImageFont.load_default(14), ImageFont.load_default(18)
    gap, left = 6, 12 + max([int(font.getlength(r)) for r in rows], default=-6)
    heads = [_fit(c, font, side) for c in columns]
    top = gap + (28 if title else 0) + 18 * max([h.count("\n") + 1 for h in heads], default=0)
    width = max([len(r) for r in cells], default=0)
    notes = _fit(note, font, left + width * (side + gap) - 2 * gap, wrap=True) if note else ""
    bottom = 8 + 18 * (notes.count("\n") + 1) if note else 0
    height = top + len(cells) * (side + gap) + bottom
    sheet = Image.new("RGB", (left + width * (side + gap), height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, gap), title, "black", large)
    for c, head in enumerate(heads):
        draw.multiline_text((left + c * (side + gap), top - 18 * (head.count("\n") + 1) - 2), head,
                            "black", font, spacing=3)  # fmt: skip
    for r, row in enumerate(cells):
        y = top + r * (side + gap)
        if r < len(rows):
            draw.text((gap, y + side // 2), rows[r], "black", font, anchor="lm")
        for c, cell in enumerate(row):
            if cell is not None:
                sheet.paste(_picture(cell, side), (left + c * (side + gap), y))
    draw.multiline_text((gap, height - bottom + 2), notes, "black", font, spacing=3)
    return sheet


def _fit(text: str, font: Any, width: int, *, wrap: bool = False) -> str:
    """Lines shortened with "..." to a width in pixels, or wrapped at spaces."""
    lines = []
    for line in text.split("\n"):
        if wrap:
            kept = ""
            for word in line.split(" "):
                if kept and font.getlength(f"{kept} {word}") > width:
                    lines.append(kept)
                    kept = word
                else:
                    kept = f"{kept} {word}" if kept else word
            lines.append(kept)
            continue
        short = line
        while short and font.getlength(short + "...") > width and font.getlength(line) > width:
            short = short[:-1]
        lines.append(line if short == line else short + "...")
    return "\n".join(lines)


def _picture(image: Array | Image.Image, side: int) -> Image.Image:
    """An image as RGB of side x side pixels."""
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
            array = array.transpose(1, 2, 0)
        image = Image.fromarray(np.ascontiguousarray(array))
    image = image.convert("RGB")
    return (
        image
        if image.size == (side, side)
        else image.resize((side, side), Image.Resampling.BICUBIC)
    )


def overlay(image: Array, heat: Array, scale: tuple[float, float], side: int) -> Image.Image:
    """The heat map's colours over the grey image, on a scale shared by all images."""
    x = (np.asarray(heat, np.float32) - scale[0]) / (scale[1] - scale[0])
    resized = Image.fromarray(x).resize((side, side), Image.Resampling.BILINEAR)
    colours = Image.fromarray(heat_colours(np.asarray(resized)))
    return Image.blend(_picture(image, side).convert("L").convert("RGB"), colours, 0.6)


def outlined(image: Array, mask: Array, colour: tuple[int, int, int], side: int) -> Image.Image:
    """The image with a region tinted and outlined."""
    area = Image.fromarray(np.asarray(mask, bool)).convert("L").resize((side, side))
    m = np.pad(np.asarray(area) > 0, 2)
    inner = m.copy()
    for dy, dx in ((2, 0), (-2, 0), (0, 2), (0, -2)):
        inner &= np.roll(m, (dy, dx), (0, 1))
    pixels = np.asarray(_picture(image, side)).copy()
    m, inner = m[2:-2, 2:-2], inner[2:-2, 2:-2]
    pixels[inner] = pixels[inner] * 0.75 + np.array(colour) * 0.25
    pixels[m & ~inner] = colour
    return Image.fromarray(pixels)


def choose_cases(scores: Array, labels: Array, usable: Array, lesions: int = 6, normals: int = 3):
    """Indices for a figure: lesions evenly over their scores, failures included, then normals."""

    def spread(members: Array, count: int) -> Array:
        members = members[np.argsort(-scores[members], kind="stable")]
        ranks = np.linspace(0, len(members) - 1, min(count, len(members)))
        return members[ranks.round().astype(int)]

    y = labels.astype(bool)
    usable = usable & np.ones(len(y), bool)
    return np.concatenate(
        [spread(np.flatnonzero(y & usable), lesions), spread(np.flatnonzero(~y & usable), normals)]
    )


def localisation_figure(
    images: Sequence[Array],
    maps: Sequence[Array],
    masks: Sequence[Array] | None,
    kinds: Sequence[str],
    scores: Array,
    labels: Array,
    row: Mapping[str, Any],
    *,
    title: str = "",
    side: int = 160,
) -> Image.Image:
    """Image, heat map, prediction and ground truth, a column a case.   [P:§4.6.1]

    row:     of results.json: threshold, map_scale and, with masks, pixel_threshold.
    returns: green frames around images that are judged rightly, red around the others (Fig. 5).
    """
    low, high = row["map_scale"]
    judged = scores >= row["threshold"]
    words = {(1, 1): "found", (1, 0): "missed", (0, 0): "passed", (0, 1): "false alarm"}
    framed = []
    for image, right in zip(images, judged == labels.astype(bool), strict=True):
        picture = _picture(image, side).copy()
        ImageDraw.Draw(picture).rectangle(
            (0, 0, side - 1, side - 1), None, GREEN if right else RED, 5
        )
        framed.append(picture)
    cells: list[list[Any]] = [framed]
    cells.append([overlay(i, m, (low, high), side) for i, m in zip(images, maps, strict=True)])
    names = ["image", "heat map"]
    note = (
        f"Image abnormal at score >= {row['threshold']:.4g}; green frame: judged rightly, red: "
        f"wrongly. Heat map: one scale for all images, dark = {low:.4g} (median of normal pixels), "
        f"bright = {high:.4g} (99.5th percentile of abnormal images)."
    )
    if masks is not None and "pixel_threshold" in row:
        t = row["pixel_threshold"]
        cells.append([outlined(i, m >= t, YELLOW, side) for i, m in zip(images, maps, strict=True)])
        cells.append([outlined(i, m, CYAN, side) for i, m in zip(images, masks, strict=True)])
        names += ["prediction", "ground truth"]
        note += f" Prediction: pixels >= {t:.4g}."
    columns = [
        f"{kind}\n{score:.4g}, {words[int(y), int(p)]}"
        for kind, score, y, p in zip(kinds, scores, labels, judged, strict=True)
    ]
    return image_grid(cells, rows=names, columns=columns, title=title, note=note, side=side)


# --- New images, and the command line ----------------------------------------------------------


def load_run(run: Path, device: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A run folder's config, its results (empty if there are none) and its detectors by name."""
    if not (run / "config.json").is_file():
        raise ValueError(f"{run} is no run folder: it has no config.json")
    config = json.loads((run / "config.json").read_text())
    path = run / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    files = [run / name for name in ("detector.pt", "detector_igd.pt") if (run / name).is_file()]
    if not files:
        raise ValueError(f"{run} holds no detector.pt; let pmsacl.py finish the run first")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = [load_detector(file, device) for file in files]
    return config, results, {type(d).__name__.lower(): d for d in loaded}


def score_files(run: Path, paths: Sequence[Path], *, batch: int, device: str) -> None:
    """Print a line for each new image and write its heat map beside it, as NAME.heatmap.png.

    raises: ValueError, before anything is written, if an image cannot be read, a heat map would
            replace a file that is not ours, or the run has no thresholds.  OSError if a folder
            cannot be written.
    """
    config, results, found = load_run(run, device)
    for name in found:
        if name not in results:
            raise ValueError(f"{run}/results.json has no threshold for {name}; give --data first")
    files = list(_image_files(paths))
    stems = [f.with_suffix("") for f in files]
    targets = [
        (stem if stems.count(stem) == 1 else file).with_name(
            f"{stem.name if stems.count(stem) == 1 else file.name}.heatmap.png"
        )
        for file, stem in zip(files, stems, strict=True)
    ]
    for file, target in zip(files, targets, strict=True):
        if target.exists() and not _is_ours(target, file.name):
            raise ValueError(f"{target} exists and is not a heat map of {file.name}; move it away")
    for folder in {target.parent for target in targets}:
        with tempfile.TemporaryFile(dir=folder):
            pass  # an unwritable folder fails here, before anything is written
    size = int(config["image_size"])
    with tempfile.TemporaryDirectory() as cache:
        images, _ = data.decode(files, size, Path(cache))
        for k in range(0, len(files), batch):
            block = np.asarray(images[k : k + batch])
            given = {name: d.score(block) for name, d in found.items()}
            for i, file in enumerate(files[k : k + batch]):
                line, panels, heads = [str(file)], [block[i]], ["image"]
                for name, (maps, scores) in given.items():
                    row, score = results[name], float(scores[i])
                    verdict = "abnormal" if score >= row["threshold"] else "normal"
                    line += [name, f"{score:.6g}", verdict]
                    panels.append(overlay(block[i], maps[i].cpu().numpy(), row["map_scale"], 256))
                    heads.append(f"{name}: {score:.4g}, {verdict}")
                scales = [f"{n} {results[n]['map_scale'][0]:.4g} to {results[n]['map_scale'][1]:.4g}"
                          for n in found]  # fmt: skip
                note = f"Colours from dark to bright: {'; '.join(scales)}."
                figure = image_grid([panels], columns=heads, title=file.name, note=note, side=256)
                write_file(targets[k + i], png(figure, file.name))
                print("\t".join(line), flush=True)


def _image_files(paths: Sequence[Path]) -> Iterator[Path]:
    """Files as given, and the images in folders, without our own heat maps."""
    for path in paths:
        if path.is_dir():
            inside = [
                p
                for p in sorted(path.rglob("*"))
                if p.suffix.lower() in SUFFIXES
                and not p.name.startswith(".")
                and not p.name.endswith(".heatmap.png")
            ]
            if not inside:
                raise ValueError(f"{path} holds no images")
            yield from inside
        elif path.is_file():
            yield path
        else:
            raise ValueError(f"{path} does not exist")


SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm")


def _is_ours(path: Path, source: str) -> bool:
    """Whether a file is a heat map that this program wrote for that image."""
    try:
        with Image.open(path) as image:
            return (image.info.get("Software"), image.info.get("Source")) == ("pmsacl", source)
    except OSError:
        return False


def evaluate_run(run: Path, root: Path | None, *, paper_protocol: bool, batch: int, device: str):
    """Evaluate a run again, on its own data set or another; rows of other data are dropped."""
    config, old, found = load_run(run, device)
    root = root or (Path(config["data"]) if config.get("data") else None)
    if root is None:
        raise ValueError("--data is needed: the run's config.json names no data set")
    seed, size = int(config.get("seed", 0)), int(config["image_size"])
    dataset = data.discover(root, seed=seed)
    images, _ = data.decode([s.path for s in dataset.test], size, run / "cache")
    masks = known = None
    if dataset.has_masks:
        masks, known = data.decode_masks(dataset.test, size, run / "cache")
    same = {"layout": dataset.layout, "root": str(dataset.root), "seed": seed}
    same["paper_protocol"] = paper_protocol
    kept = {
        k: v
        for k, v in old.items()
        if k not in found and (not isinstance(v, dict) or v.get("data", same) == same)
    }
    return evaluate(
        run, dataset, found, images, masks, known,
        seed=seed, paper_protocol=paper_protocol, batch=batch, extra=kept,
    )  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for a mistake of the user's, in one line."""
    parser = _Parser(prog="eval.py", description=__doc__.splitlines()[0].split("  ")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="a folder that pmsacl.py wrote")
    parser.add_argument("--data", type=Path, help="data set to evaluate on (default: the run's)")
    parser.add_argument(
        "--score", type=Path, nargs="+", metavar="PATH", help="new images or folders"
    )
    parser.add_argument("--paper-protocol", action="store_true", default=DEFAULT.paper_protocol,
                        help="measure on the images that set the thresholds, too")  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=DEFAULT.batch_size)
    parser.add_argument("--device", default=DEFAULT.device, help="auto, cpu, cuda")
    args = parser.parse_args(argv)
    try:
        if args.score and (args.data or args.paper_protocol):
            raise ValueError("--score goes with neither --data nor --paper-protocol")
        if args.batch_size < 1:
            raise ValueError(f"--batch-size must be 1 or more, got {args.batch_size}")
        options: dict[str, Any] = {"batch": args.batch_size, "device": args.device}
        if args.score:
            score_files(args.run, args.score, **options)
        else:
            evaluate_run(args.run, args.data, paper_protocol=args.paper_protocol, **options)
            print((args.run / "results.md").read_text(), end="")
    except (ValueError, OSError) as error:
        print(f"eval.py: {error}".replace("\n", " "), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
