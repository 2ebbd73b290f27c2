"""What a number is worth: intervals, trivial baselines, fake lesions, near-duplicates.

None of this is in the paper. An AUROC has to be compared with that of a few pixels, of the
file's size and of an untrained network, and read with its confidence interval.

Sizes: N training images, M test images, P of them abnormal and Q normal, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray as Array

from detectors import PaDiM
from encoder import ResNet18, seeded, to_unit
from measures import aupro, auroc
from medmix import medmix
from support.layouts import Sample
from support.progress import progress

ROUNDS = 2000  # of a bootstrap
BLOCK = 100  # of them at once
PAIRS = 2**24  # of a test and a training image that are compared at once
NEIGHBOURS = 5
THUMBNAIL = 16  # pixels a side
FAKES = 300  # healthy images that get a fake lesion, at most
FITTED = 1000  # healthy images that the detector of fake lesions is fitted on, at most
ALIKE = 0.995  # correlation of thumbnails above which two images count as near-duplicates


# --- intervals -----------------------------------------------------------------------------------


def bootstrapped_aurocs(scores: Sequence[Array], labels: Array, seed: int) -> Array:
    """AUROCs of several detectors on the same resampled test images: (detectors, ROUNDS).

    Normal and abnormal images are resampled separately, with replacement. An AUROC is the mean over
    all pairs of [s+ > s-] + [s+ = s-] / 2, in a resample each image counts as often as it is drawn.

    scores: (M,) each.   labels: (M,) true where abnormal.
    """
    y, rng = np.asarray(labels, bool), np.random.default_rng([seed, 2])
    drawn, drawn_normal = (_counts(int(n), rng) for n in (y.sum(), (~y).sum()))
    values = np.zeros((len(scores), ROUNDS))
    for row, s in zip(values, scores, strict=True):
        order = np.argsort(s[~y])
        ends = [np.searchsorted(s[~y][order], s[y], side) for side in ("left", "right")]
        for k in range(0, ROUNDS, BLOCK):
            below = np.cumsum(drawn_normal[k : k + BLOCK, order], axis=1, dtype=np.int64)
            below = np.pad(below, ((0, 0), (1, 0)))  # (BLOCK, Q + 1): below none to below all
            twice = below[:, ends[0]] + below[:, ends[1]]  # (BLOCK, P): what is equal counts half
            row[k : k + BLOCK] = (drawn[k : k + BLOCK] * twice).sum(axis=1) / 2
    return values / (y.sum() * (~y).sum())


def _counts(n: int, rng: np.random.Generator) -> Array:
    """How often each of n images is drawn in each resample: (ROUNDS, n)."""
    blocks = (rng.multinomial(n, np.full(n, 1 / n), size=BLOCK) for _ in range(ROUNDS // BLOCK))
    return np.concatenate([block.astype(np.uint16) for block in blocks])


def interval(values: Array) -> list[float]:
    """The middle 95%."""
    return [float(v) for v in np.percentile(values, [2.5, 97.5])]


def add_worth(
    rows: Mapping[str, dict[str, Any]],
    scores: Mapping[str, Array],
    labels: Array,
    test: Array,
    kinds: Sequence[str],
    seed: int,
    before: Mapping[str, Any],
) -> None:
    """What each AUROC is worth, into its row; all rows see the same resampled test images.

    rows, scores: of each detector; scores are (M,), of the test images.
    labels, test, kinds: true where abnormal; true where measured; the kind of each image.
    before: results that hold the same rows, if they were measured before.

    image_auroc_interval: 95% bootstrap interval over the test images.
    over_untrained:       the difference to the row `untrained`, and its 95% interval, paired; that
                          of before if `untrained` is not scored again.
    kinds:                the AUROC of each kind of abnormal image, where there are several.
    """
    y, kind = labels[test], np.array(kinds)[test]
    aurocs = bootstrapped_aurocs([s[test] for s in scores.values()], y, seed)
    drawn = dict(zip(scores, aurocs, strict=True))
    for name, row in rows.items():
        row["image_auroc_interval"] = interval(drawn[name])
        if "untrained" in rows and name != "untrained":
            row["over_untrained"] = {
                "difference": row["image_auroc"] - rows["untrained"]["image_auroc"],
                "interval": interval(drawn[name] - drawn["untrained"]),
            }
        elif over := before.get(name, {}).get("over_untrained"):
            row["over_untrained"] = over
        abnormal = sorted(set(kind[y]))
        if len(abnormal) > 1:
            s = scores[name][test]
            row["kinds"] = {k: auroc(s[~y | (kind == k)], y[~y | (kind == k)]) for k in abnormal}


# --- trivial baselines ---------------------------------------------------------------------------


def trivial_scores(train: Array, test: Array, samples: Sequence[Sample]) -> dict[str, Array]:
    """Scores of the test images that need no network: name -> (M,).

    The distance to the nearest training thumbnails has one direction. File size and brightness
    count in both directions, since an abnormal image may have more or less of either.

    train, test: (N, 3, S, S) and (M, 3, S, S) uint8.   samples: of the test images.
    """
    a, b, k = thumbnails(train), thumbnails(test), NEIGHBOURS
    distances = (torch.cdist(part, a) for part in _parts(b, a, "nearest training images"))
    nearest = [d.topk(min(k, len(a)), largest=False).values.mean(dim=1) for d in distances]
    near = torch.cat(nearest).numpy()
    size = np.array([float(sample.path.stat().st_size) for sample in samples])
    light = b.mean(dim=1).numpy()
    return {
        f"{k} nearest neighbours on {THUMBNAIL} x {THUMBNAIL} pixels": near,
        "larger files": size,
        "smaller files": -size,
        "brighter images": light,
        "darker images": -light,
    }


def thumbnails(images: Array) -> torch.Tensor:
    """(N, 3 * 16 * 16): means over blocks of pixels, in [0, 1]."""
    small = torch.empty(len(images), 3 * THUMBNAIL**2)
    for k in range(0, len(images), 256):
        x = to_unit(images[k : k + 256], "cpu")
        small[k : k + 256] = F.adaptive_avg_pool2d(x, THUMBNAIL).flatten(1)
    return small


def _parts(b: torch.Tensor, a: torch.Tensor, label: str) -> Iterator[torch.Tensor]:
    """Rows of b, so many that PAIRS of them with all rows of a are held at once."""
    parts = b.split(max(1, PAIRS // len(a)))
    return progress(parts, len(parts), label)


# --- fake lesions --------------------------------------------------------------------------------


def fake_lesions(
    backbone: ResNet18, images: Array | torch.Tensor, *, seed: int
) -> dict[str, float]:
    """How well PaDiM on this encoder finds MedMix's lesions: needs healthy images only.

    It is fitted on half of the images, and scores the other half as it is and with one, two or
    three lesions of MedMix's default sizes, whatever the pre-training used, so that settings can be
    compared. Choose the settings for which it is high.

    images:  (N, 3, S, S) uint8, N >= 4.
    returns: image_auroc, and aupro with the lesions' masks.
    raises:  ValueError for fewer images.
    """
    if len(images) < 4:
        raise ValueError(
            f"fake lesions are looked for in 4 healthy images or more, got {len(images)}"
        )
    order = torch.randperm(len(images), generator=seeded(seed, 9)).numpy()
    held = np.sort(order[: min(len(images) // 2, FAKES)])
    fitted = np.sort(order[len(held) :][:FITTED])
    detector = PaDiM(backbone, seed=seed).fit(images[fitted])
    x = to_unit(images[held], detector.device)
    n = torch.arange(len(x)) % 3 + 1
    fake, masks = medmix(x, n, seeded(seed, 10), classes=4)
    maps, scores = detector.score(x)
    fake_maps, fake_scores = detector.score(fake)
    labels = torch.arange(2 * len(x)) >= len(x)
    masks = torch.cat([torch.zeros_like(masks), masks])[:, 0]
    return {
        "image_auroc": auroc(torch.cat([scores, fake_scores]), labels),
        "aupro": aupro(torch.cat([maps, fake_maps]), masks),
    }


# --- near-duplicates -----------------------------------------------------------------------------


def near_duplicates(train: Array, test: Array) -> list[tuple[int, int]]:
    """Pairs (test image, the training image that it is nearly the same as), by thumbnails.

    Thumbnails are compared by their correlation, after the mean training thumbnail is subtracted:
    what all images of a set share (the outline of a chest) makes no duplicates. An image's own mean
    is subtracted too, so that a brighter copy is one.
    """
    a, b = thumbnails(train), thumbnails(test)
    mean = a.mean(dim=0)
    for t in (a, b):  # in place: those of a hundred thousand images take 300 MB
        t -= mean
        t -= t.mean(dim=1, keepdim=True)
        F.normalize(t, dim=1, out=t)
    nearest = [(part @ a.T).max(dim=1) for part in _parts(b, a, "looking for near-duplicates")]
    best, which = (torch.cat(parts) for parts in zip(*nearest, strict=True))
    return [(i, int(which[i])) for i in (best > ALIKE).nonzero()[:, 0].tolist()]
