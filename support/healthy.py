"""Healthy images that train nothing, and what they say of a score.   [P!§3.3 R29]

They are held out of the pre-training and of every detector's fit, so that their scores are those of
healthy images that a detector has not seen. What is measured on them lies in the detector's file,
as the entry `healthy`. Sizes: N healthy images, H of them held out, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from measures import confusion
from support.scoring import BATCH_SIZE, scored_batches

T = TypeVar("T")

LEAST = 10  # images that are held out, if any are
BELOW = 0.95  # of their scores lie below the threshold
GRID = 16  # pixels a side of a heat map that the middle of the scale is estimated from


@dataclass(frozen=True)
class Healthy:
    """What a detector gives for the images that were held out.

    scores:    (H,) float64, ascending.
    threshold: their BELOW quantile.
    scale:     the ends of the heat maps' colours; None for a detector without heat maps.
    """

    scores: NDArray[np.float64]
    threshold: float
    scale: tuple[float, float] | None

    def percentile(self, scores: ArrayLike) -> Any:
        """How many of 100 images that were held out have a lower score; shaped as the scores."""
        lower = np.searchsorted(self.scores, np.asarray(scores, np.float64), side="left")
        return 100 * lower / len(self.scores)


def split(files: Sequence[T], share: float) -> tuple[list[T], list[T]]:
    """What trains, and what is held out: `share` of the files, LEAST or more, evenly spread.

    Fewer than 2 LEAST files all train, for more of them would be held out than left.
    """
    n = len(files)
    if share == 0 or n < 2 * LEAST:
        return list(files), []
    count = max(LEAST, round(share * n))
    kept = set(np.linspace(0, n - 1, count).round().astype(int).tolist())
    return [f for i, f in enumerate(files) if i not in kept], [files[i] for i in sorted(kept)]


def measure(detector: Any, images: NDArray[np.uint8], name: str) -> Healthy | None:
    """Score the images that were held out.   images: (H, 3, S, S) uint8; None is returned for none.

    The scale is dark at the median pixel; its middle is the value that the brightest pixel of 95%
    of these images lies below, so that what is beyond the middle is rare in healthy images.
    """
    if not len(images):
        return None
    scores, grids, brightest = [], [], []
    for s, maps in scored_batches(detector, images, BATCH_SIZE, f"healthy {name}"):
        scores.append(s)
        if maps is not None:
            step = -(-maps.shape[-1] // GRID)
            grids.append(maps[:, ::step, ::step])
            brightest.append(maps.max(axis=(1, 2)))
    ascending = np.sort(np.concatenate(scores).astype(np.float64))
    scale = None
    if grids:
        low = float(np.median(np.concatenate(grids)))
        middle = float(np.quantile(np.concatenate(brightest), BELOW))
        scale = low, low + max(2 * (middle - low), 1e-6 * max(abs(low), 1))
    return Healthy(ascending, float(np.quantile(ascending, BELOW)), scale)


def to_state(healthy: Healthy) -> dict[str, Any]:
    """What a detector's file holds of it: loads with weights_only=True."""
    return {
        "scores": torch.from_numpy(healthy.scores),
        "threshold": healthy.threshold,
        "scale": None if healthy.scale is None else list(healthy.scale),
    }


def of_state(state: Any) -> Healthy | None:
    """The same read again; None for a file without it.   raises: anything if it is damaged."""
    if state is None:
        return None
    scores = state["scores"].cpu().numpy().astype(np.float64)  # it may be read onto a GPU
    threshold = float(state["threshold"])
    scale = None if state["scale"] is None else tuple(map(float, state["scale"]))
    numbers = [*scores, threshold, *(scale or (0.0, 1.0))]
    whole = scores.ndim == 1 and len(scores) > 0 and bool(np.isfinite(numbers).all())
    whole = whole and bool((np.diff(scores) >= 0).all())
    if not (whole and (scale is None or (len(scale) == 2 and scale[0] < scale[1]))):
        raise ValueError("impossible scores of healthy images")
    return Healthy(scores, threshold, scale)  # type: ignore[arg-type]


def summary(
    detectors: Mapping[str, Any],
    scores: Mapping[str, NDArray[Any]] | None = None,
    labels: NDArray[Any] | None = None,
    test: NDArray[Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """The entry `healthy` of results.json, for each detector that has it.

    scores, labels: (M,) of the test images; None: there are none.   test: (M,) true if measured.
    returns:        images, threshold, and with test images how well that threshold does.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, detector in detectors.items():
        healthy = getattr(detector, "healthy", None)
        if healthy is not None:
            rows[name] = {"images": len(healthy.scores), "threshold": healthy.threshold}
            if scores is not None and labels is not None:
                rows[name] |= confusion(scores[name][test], labels[test], healthy.threshold)
    return rows


def described(name: str, row: Mapping[str, Any]) -> str:
    """A sentence on a detector's entry."""
    text = (
        f"{name}: the 95th percentile of the scores of {row['images']} held-out healthy images is "
        f"{row['threshold']:.6g}"
    )
    if "sensitivity" in row:
        text += (
            f"; as the threshold it gives sensitivity {row['sensitivity']:.3f} and specificity "
            f"{row['specificity']:.3f}"
        )
    return text + "."
