"""The paper's measures: AUROC, specificity and other rates, IoU, Dice, Pro-score.   [P:§4.3]

A larger score is more abnormal, and "abnormal" always means score >= threshold, for images and for
pixels. Every measure takes arrays and tensors alike and needs NumPy alone. Those of scores raise
ValueError if a class is absent or a score is NaN. Not here: which images set thresholds (eval.py).

Sizes: N images, S pixels a side, P abnormal pixels, K lesions (8-connected regions), T thresholds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy import ndarray as Array

Values = Any  # an array, a tensor of any device, or a list
FPR_LIMIT = 0.3  # where the Pro-score's integral ends                    [P!§4.3 R10]
LEVELS = 2**14  # thresholds tried for the best mean Dice                 [P!§4.3 R9]
SORTED = 2**26  # pixels that are sorted at a time


def _array(values: Any) -> Array:
    """An array as it is (a memory-map is not read), or what a tensor or list holds."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _negatives_above(positive: Array, negatives: Iterable[Array]) -> tuple[Array, Array]:
    """How many negatives lie above, and at or above, each of the sorted positive (P,): int64 (P,).

    negatives: blocks of scores, of which one is in memory at a time.
    """
    above, reached = np.zeros((2, len(positive)), np.int64)
    for block in negatives:
        block = np.sort(block)
        if np.isnan(block[-1:]).any() or np.isnan(positive[-1:]).any():  # NaN is sorted last
            raise ValueError("a score is NaN")
        above += len(block) - np.searchsorted(block, positive, "right")
        reached += len(block) - np.searchsorted(block, positive, "left")
    return above, reached


def auroc(scores: Values, labels: Values) -> float:
    """P(s+ > s-) + 1/2 P(s+ = s-), the area under the ROC curve (ties by midrank).   [P:§4.3]

    scores, labels: of one size and order, images' or pixels'; labels are true where abnormal.
    returns: the exact ratio of pairs, rounded once.
    """
    s, y = _both_classes(scores, labels)
    positive = np.sort(s[y])
    above, reached = _negatives_above(positive, [s[~y]])
    pairs = 2 * len(positive) * (s.size - len(positive))
    return (pairs - int(above.sum()) - int(reached.sum())) / pairs


def _both_classes(scores: Values, labels: Values) -> tuple[Array, Array]:
    """Scores and labels as flat arrays; raises unless both classes are there and none is NaN."""
    s, y = _array(scores).ravel(), _array(labels).ravel()
    if s.shape != y.shape or (y != y).any():  # NaN differs from itself
        raise ValueError(f"{s.size} scores for {y.size} labels; there must be one for each, no NaN")
    if not 0 < (positives := int((y := y.astype(bool)).sum())) < y.size:
        counts = f"{y.size - positives} normal and {positives} abnormal"
        raise ValueError(f"a measure needs normal and abnormal cases, got {counts}")
    if np.isnan(s.min()):
        raise ValueError(f"{int(np.isnan(s).sum())} of {s.size} scores are NaN")
    return s, y


def confusion(scores: Values, labels: Values, threshold: float) -> dict[str, float]:
    """Specificity, sensitivity and accuracy of "abnormal if score >= threshold".   [P:§4.3]

    returns: the fraction judged correctly of the normal, of the abnormal and of all cases.
    """
    s, y = _both_classes(scores, labels)
    correct = (s >= threshold) == y
    parts = {"specificity": ~y, "sensitivity": y, "accuracy": slice(None)}
    return {name: float(correct[part].mean()) for name, part in parts.items()}


def youden_threshold(scores: Values, labels: Values) -> float:
    """argmax J(t) = sensitivity(t) + specificity(t) - 1, the highest such score t.   [P!§4.3 R8]"""
    s, y = _both_classes(scores, labels)
    t = np.unique(s)[::-1]  # (T,) from strict to lax
    hits = y.sum() - np.searchsorted(np.sort(s[y]), t, "left")
    alarms = (~y).sum() - np.searchsorted(np.sort(s[~y]), t, "left")
    j = hits * int((~y).sum()) - alarms * int(y.sum())  # J times both counts: whole numbers
    return float(t[j.argmax()])


def _regions(pred: Values, mask: Values) -> tuple[Array, Array]:
    """raises: ValueError unless they have one shape and the prediction is bool or 0 and 1."""
    p, m = _array(pred), _array(mask)
    if p.shape != m.shape or p.dtype.kind == "f" or p.max(initial=0) > 1:
        raise ValueError(f"predictions: bool, {m.shape} as the masks; got {p.dtype} {p.shape}")
    return p.astype(bool), m.astype(bool)


def iou(pred: Values, mask: Values) -> Array:
    """|P and M| / |P or M| of each image, 1 where both are empty.   [P:§4.3]

    pred, mask: (..., S, S) bool, of one shape.   returns: (...) float64.
    """
    p, m = _regions(pred, mask)
    union = (p | m).sum((-2, -1))
    return np.where(union > 0, (p & m).sum((-2, -1)) / np.maximum(union, 1), 1.0)


def dice(pred: Values, mask: Values) -> Array:
    """2 |P and M| / (|P| + |M|) of each image, 1 where both are empty.   [P:§4.3]

    pred, mask: (..., S, S) bool, of one shape.   returns: (...) float64.
    """
    p, m = _regions(pred, mask)
    total = p.sum((-2, -1)) + m.sum((-2, -1))
    return np.where(total > 0, 2 * (p & m).sum((-2, -1)) / np.maximum(total, 1), 1.0)


def components(masks: Values) -> tuple[Array, int]:
    """The 8-connected regions of each mask: runs of pixels, joined by union-find.   [P!§4.3 R10]

    masks:   (N, H, W) bool.
    returns: (P,) the region 0..K-1 of each true pixel, in the order of masks.nonzero(), and K.
    """
    n, h, w = (masks := _array(masks)).shape
    padded = np.zeros((n * h, w + 2), np.int8)
    padded[:, 1:-1] = masks.reshape(n * h, w) != 0
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


def aupro(maps: Values, masks: Values, fpr_limit: float = FPR_LIMIT) -> float:
    """1/l int_0^l PRO d FPR, PRO(t) = 1/K sum_k |{p in C_k: s_p >= t}| / |C_k|.   [P!§4.3 R10]

    Bergmann et al. 2020: the C_k are the 8-connected regions of all masks, FPR(t) the fraction of
    normal pixels with s >= t. The curve is joined by straight lines between distinct thresholds
    (so tied pixels enter together) and cut at the limit by interpolation.

    maps:      (N, S, S) scores.
    masks:     (N, S, S) bool, all false for a normal image.
    fpr_limit: l, in (0, 1].   returns: in [0, 1].
    raises:    ValueError for other shapes, no lesion, no normal pixel, NaN, or l outside (0, 1].
    """
    return pixel_measures(maps, masks, np.arange(len(maps)), fpr_limit)[1]


def _images(maps: Values, masks: Values, index: Values) -> tuple[Array, Array, Array]:
    """Maps and masks (N, S, S) as arrays, and the numbers of the chosen images; raises for none."""
    maps, masks, index = map(_array, (maps, masks, index))
    if maps.shape != masks.shape or maps.ndim != 3:
        raise ValueError(f"maps and masks must be (N, S, S), got {maps.shape} and {masks.shape}")
    index = np.arange(len(maps))[index] if len(index) else index
    if not len(index):  # or a mask that is false everywhere
        raise ValueError("no images to measure")
    return maps, masks, index


def pixel_measures(
    maps: Values, masks: Values, index: Values, fpr_limit: float = FPR_LIMIT
) -> tuple[float, float]:
    """Pixel AUROC and AUPRO of some images, from one sort of the normal pixels.

    A lesion pixel of score s enters the PRO curve while FPR goes from a (normal pixels above s)
    to b (at or above s), as a ramp of height w = 1 / (K |C_k|); its area up to the limit l is
    w (l - (a + b) / 2) if b <= l, w (l - a)^2 / 2 (b - a) if a < l < b, and 0 beyond.

    index: the images, as numbers or N bools.   maps, masks, fpr_limit, raises: as in `aupro`.
    """
    if not 0 < fpr_limit <= 1:
        raise ValueError(f"fpr_limit must lie in (0, 1], got {fpr_limit}")
    maps, masks, index = _images(maps, masks, index)
    size = max(1, SORTED // max(1, maps[:1].size))
    blocks = [index[k : k + size] for k in range(0, len(index), size)]
    scores, weights, lesions = [], [], 0
    for block in blocks:
        abnormal = [i for i in block if masks[i].any()]
        if abnormal:
            inside = masks[abnormal].astype(bool)
            region, k = components(inside)
            scores += [maps[i][m] for i, m in zip(abnormal, inside, strict=True)]
            weights.append(1 / np.bincount(region)[region])
            lesions += k
    if not lesions:
        raise ValueError(f"no lesion in the masks of {len(index)} images")
    positive, w = np.concatenate(scores), np.concatenate(weights)
    order = np.argsort(positive)
    positive, w = positive[order], w[order]
    negatives = (np.concatenate([maps[i][~masks[i].astype(bool)] for i in b]) for b in blocks)
    above, reached = _negatives_above(positive, negatives)
    if not (total := len(index) * maps[0].size - len(positive)):
        raise ValueError(f"no normal pixel in the masks of {len(index)} images")
    area = (2 * len(positive) * total - int(above.sum()) - int(reached.sum())) / 2
    a, b = above / total, reached / total
    cut = np.maximum(fpr_limit - a, 0) ** 2 / np.maximum(2 * (b - a), 1e-300)
    ramp = np.where(b <= fpr_limit, fpr_limit - (a + b) / 2, cut)
    pro = float((w * ramp).sum() / (lesions * fpr_limit))
    return area / (len(positive) * total), min(pro, 1.0)  # the sum's rounding may exceed 1


def dice_threshold(
    maps: Values, masks: Values, index: Values, levels: int = LEVELS
) -> tuple[float, float]:
    """argmax_t mean_i Dice(s_i >= t, M_i) over the images in `index`, and that mean.   [P!§4.3 R9]

    It tries `levels` of their distinct scores (of 4 million or so, if more), at even ranks.
    returns: the threshold (the highest of several) and the mean Dice there; raises as `aupro`.
    """
    maps, masks, index = _images(maps, masks, index)
    size = maps[0].size
    step = (len(index) * size >> 22) | 1  # 4 M scores suffice to rank by; odd, to meet all columns
    pooled = np.unique(np.concatenate([np.ravel(maps[i])[i % step :: step] for i in index]))
    ranks = np.linspace(0, len(pooled) - 1, min(levels, len(pooled))).round().astype(int)
    t = pooled[ranks][::-1]  # (T,) from strict to lax
    total = np.zeros(len(t))
    for i in index:
        inside, ranked = np.sort(maps[i][masks[i].astype(bool)]), np.sort(maps[i], axis=None)
        if np.isnan(ranked[-1]):
            raise ValueError("a score is NaN")
        hits = len(inside) - np.searchsorted(inside, t, "left")
        both = size - np.searchsorted(ranked, t, "left") + len(inside)  # |P| + |M|
        total += np.where(both > 0, 2 * hits / np.maximum(both, 1), 1.0)
    return float(t[total.argmax()]), float(total.max() / len(index))
