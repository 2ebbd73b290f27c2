"""Scores and heat maps of a set of images, batch by batch.

Sizes: N images, B of a batch, S pixels a side.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy import ndarray as Array

from support.progress import progress

BATCH_SIZE = 8  # images scored at a time
MAPS_IN_MEMORY = 2**28  # pixels, 1 GiB: heat maps of a larger set are kept in a temporary file


def score_batch(detector: Any, images: Array, what: str) -> tuple[Array, Array | None]:
    """Scores (B,) and heat maps (B, S, S) or None, float32.

    detector: score(images (B, 3, S, S) uint8) -> maps (B, S, S) float32 or None, scores (B,).
    raises:   ValueError, naming `what`, if a score or heat map is NaN or infinite.
    """
    of_batch, of_images = detector.score(np.array(images))
    scores = of_images.cpu().numpy()
    maps = None if of_batch is None else of_batch.cpu().numpy()
    if not (np.isfinite(scores).all() and (maps is None or np.isfinite(maps).all())):
        raise ValueError(f"the detector's output is not finite in {what}")
    return scores, maps


def scored_batches(
    detector: Any, images: Array, batch: int, label: str
) -> Iterator[tuple[Array, Array | None]]:
    """What `score_batch` returns for each batch of a set, with a progress line.

    images: (N, 3, S, S) uint8; a memory-map is read batch by batch.
    """
    n = len(images)
    for k in progress(range(0, n, batch), -(-n // batch), label):
        some = images[k : k + batch]
        try:
            yield score_batch(detector, some, f"images {k} to {k + len(some) - 1}")
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from None


def score_set(
    detector: Any, images: Array, *, batch: int = BATCH_SIZE, label: str = "score"
) -> tuple[Array, Array | None]:
    """Scores and heat maps of a whole set, with a progress line.

    images:  (N, 3, S, S) uint8.
    returns: scores (N,) float32 and maps (N, S, S) float32, in a temporary file if large, or None.
    raises:  ValueError if a score or heat map is NaN or infinite.
    """
    n, side, done = len(images), images.shape[-1], 0
    scores: Array = np.zeros(n, np.float32)
    maps: Array | None = None
    for some_scores, some_maps in scored_batches(detector, images, batch, label):
        part = slice(done, done := done + len(some_scores))
        scores[part] = some_scores
        if some_maps is not None:
            maps = _room_for_maps(n, side) if maps is None else maps
            maps[part] = some_maps
    return scores, maps


def _room_for_maps(n: int, side: int) -> Array:
    """(N, S, S) float32, in a temporary file if large."""
    if n * side * side <= MAPS_IN_MEMORY:
        return np.zeros((n, side, side), np.float32)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.float32, "w+", shape=(n, side, side))
