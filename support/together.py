"""Scoring by several processes: each has a share of a batch, and the first one gets all of it.

All processes have the detectors, and score the same images at the same time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from eval import load
from support.run import from_first_process, patient, ranks
from support.scoring import BATCH_SIZE


class Together:
    """A detector whose `score` shares the images among the processes; the rest is its own."""

    def __init__(self, detector: Any) -> None:
        self.detector = detector

    def __getattr__(self, name: str) -> Any:
        return getattr(self.detector, name)

    def score(self, images: np.ndarray) -> tuple[Tensor | None, Tensor]:
        """Maps and scores of all images, in order, in the first process; elsewhere of its share."""
        (rank, world), n = ranks(), len(images)
        own = images[n * rank // world : n * (rank + 1) // world]
        maps, scores = self.detector.score(own) if len(own) else (None, torch.zeros(0))
        part = None if maps is None else maps.cpu(), scores.cpu()
        parts: list[Any] = [None] * world
        dist.gather_object(part, parts if rank == 0 else None, group=patient())
        if rank > 0:
            return part
        every = [some for some, _ in parts if some is not None]
        return torch.cat(every) if every else None, torch.cat([some for _, some in parts])


def batch_of_all() -> int:
    """Images that are scored at a time by all processes."""
    return BATCH_SIZE * ranks()[1]


def offered(detectors: Mapping[str, Any]) -> dict[str, Any]:
    """In the first process: the detectors, scoring with the others, which are in `assist`."""
    if ranks()[1] == 1:
        return dict(detectors)
    from_first_process(lambda: list(detectors))
    return {name: Together(detector) for name, detector in detectors.items()}


def assist(own: Mapping[str, Any], images: np.ndarray, folder: Path, device: str) -> None:
    """In the others: score with the first process, detector by detector as it does.

    own: detectors by name; those that the first one fitted alone are read from the run's folder.
    """
    for i, name in enumerate(from_first_process(list[str])):
        file = folder / (f"detector_{name}.pt" if i else "detector.pt")
        detector = Together(own[name] if name in own else load(file, device))
        for k in range(0, len(images), batch_of_all()):
            detector.score(np.array(images[k : k + batch_of_all()]))
