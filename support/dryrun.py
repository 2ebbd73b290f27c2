"""--dry-run: what a run would do, how long it takes, how much it needs; nothing is written."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from encoder import ResNet18
from igd import IGD
from pmsacl import Pretraining
from support import checks, healthy, layouts
from support.compared import COMPARED, build, chosen
from support.phantom import draw
from support.progress import duration, show, size_of
from support.run import real
from support.training import check_start


def dry_run(config: Any, folder: Path) -> None:
    """Print the plan of a run; raises what the run would raise at its start."""
    defaults = draw.__kwdefaults__ or {}
    train, normal, abnormal = (defaults[name] for name in ("train", "good", "abnormal"))
    masks, lines = abnormal, ["phantom images, which the run draws"]
    if config.data:
        dataset = layouts.discover(real(config.data), seed=config.seed)
        dataset.check_test()
        check_start(config.encoder, config.init, folder, local=config.local_igd)
        checks.at_the_start(config, folder, dataset)
        train, normal, abnormal, masks = dataset.counts
        lines = [f"{dataset.root}: {dataset.layout}"]
        for kind in dict.fromkeys(sample.kind for sample in dataset.test):
            of_kind = [sample for sample in dataset.test if sample.kind == kind]
            label = "abnormal" if of_kind[0].label else "normal"
            lines.append(f"  test {kind}: {len(of_kind)} images, {label}")
    counts = f"{normal} normal and {abnormal} abnormal test images, {masks} masks"
    lines.append(f"{train} healthy training images, {counts}")
    fit, kept = healthy.split(range(train), config.healthy_share)
    lines[-1] += f"; {len(kept)} of the healthy ones are held out of the training"
    total = 0.0
    for training in _trainings(config, len(fit)):
        per_step = _seconds(training)
        total += per_step * training.total
        lines.append(
            f"{training.name or config.method}: {training.total} steps of {training.images} images,"
            f" {per_step:.3g} s each: {duration(per_step * training.total)}"
        )
    lines.append(f"time: about {duration(total)} of training; then detectors and evaluation")
    lines.append(f"memory: about {_memory(config.device)}")
    disk = checks.disk_needed(config, train, normal + abnormal, masks)
    lines.append(f"disk: up to {size_of(disk)} in {folder}")
    show("\n".join([*lines, "dry run: nothing was written"]) + "\n")


def _trainings(config: Any, count: int) -> Iterator[Any]:
    """The trainings of a run, on random images in place of `count` decoded ones.

    raises: ValueError if there are too few images.
    """
    size = config.image_size
    image = np.random.default_rng(config.seed).integers(0, 256, (1, 3, size, size), np.uint8)
    images = np.broadcast_to(image, (count, 3, size, size))
    both = [False, True] if config.local_igd else [False]
    no_pass = dataclasses.replace(config, centres="random", warmup_epochs=0)  # over the images
    for patches in both if not config.encoder else ():
        yield Pretraining(images, no_pass, local=patches)
    if "igd" in chosen(config.detector):
        networks = [ResNet18().to(config.device) for _ in both]
        igd = IGD(*networks, **config.igd_settings())
        for of_igd in igd.trainings(images):
            of_igd.estimate = lambda: None  # type: ignore[method-assign]
            for model in igd.models.values():
                model.sigma2.fill_(1.0)
                model.mu.fill_(0.0)
            yield of_igd
    for name in filter(COMPARED.__contains__, chosen(config.detector)):
        detector = build(name, ResNet18(), dataclasses.asdict(config))

        def few(data: Any, whole: Any = detector.batches) -> Iterator[Any]:
            return islice(whole(data), 2)  # a pass over the images ends after two batches

        detector.batches = few  # type: ignore[method-assign]
        yield from detector.trainings(images)


def _seconds(training: Any) -> float:
    """Seconds of a step: the second, since the first fills caches; the first if it is long."""
    if training.total == 0:
        return 0.0
    took = 0.0
    for _ in range(2):
        began = time.perf_counter()
        training.update(training.losses())
        if training.device.type == "cuda":
            torch.cuda.synchronize(training.device)
        took = time.perf_counter() - began
        if took > 10 and training.device.type == "cpu":  # a GPU's first step compiles kernels
            break
    return took


def _memory(device: str) -> str:
    if device != "cpu":
        return f"{size_of(torch.cuda.max_memory_allocated(device))} of the GPU"
    try:
        import resource
    except ImportError:  # Windows
        return "what one step needed; see the system's monitor"
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes elsewhere
    return size_of(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
