"""The main job's speed beside the bare network's, in one run, as ratios.

    python -m bench.training      # prints and writes docs/speed.csv; about two minutes on two cores

Each pair is timed in turn, round by round, and the median ratio is kept: absolute times of shared
machines drift, ratios hold. bench/kernels.py times the kernels.
"""

from __future__ import annotations

import csv
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn

import pmsacl
from detectors import PaDiM
from encoder import Conv3x3, ResNet18, channels_last, normalise, to_unit
from igd import IGD, Training
from support.run import generator


def paired(
    ours: Callable[[], object], bare: Callable[[], object], rounds: int
) -> tuple[float, float, float]:
    """Median seconds of both, and the median of the rounds' ratios ours / bare."""
    times: list[tuple[float, float]] = []
    ours(), bare()  # caches and allocators
    for _ in range(rounds):
        start = time.perf_counter()
        ours()
        middle = time.perf_counter()
        bare()
        times.append((middle - start, time.perf_counter() - middle))
    a, b = zip(*times, strict=True)
    return statistics.median(a), statistics.median(b), statistics.median(p / q for p, q in times)


def training_step(rounds: int) -> tuple[float, float, float]:
    """A whole step against forward and backward of the encoder on as many views, 64 px."""
    images = np.random.default_rng(0).integers(0, 255, (64, 3, 64, 64), np.uint8)
    config = pmsacl.Config(batch_size=32, image_size=64, init="random", device="cpu")
    training = pmsacl.Pretraining(images, config)
    training.c = torch.zeros(config.classes, 128)
    training.total = 1000
    views = channels_last(torch.rand(2 * config.classes * 32, 3, 64, 64, generator=generator(0)))

    def bare() -> None:
        training.optimiser.zero_grad(set_to_none=True)
        training.encoder(views).sum().backward()

    return paired(training.step, bare, rounds)


def small_maps(side: int, rounds: int) -> tuple[float, float, float]:
    """Forward and backward of the encoder's network, 128 views, against plain convolutions."""
    x = channels_last(torch.rand(128, 3, side, side, generator=generator(0)))
    network = ResNet18()
    channels_last(network)

    def passes() -> None:
        network.zero_grad(set_to_none=True)
        network.pooled(x).sum().backward()

    def plain() -> None:
        with mock.patch.object(Conv3x3, "forward", nn.Conv2d.forward):
            passes()

    return paired(passes, plain, rounds)


def scoring(batch: int, rounds: int) -> tuple[float, float, float]:
    """PaDiM's heat maps against the layers 1-3 that they are made from, 256 px."""
    images = np.random.default_rng(0).integers(0, 255, (8, 3, 256, 256), np.uint8)
    network = ResNet18().eval()
    channels_last(network)
    detector = PaDiM(network).fit(images)

    @torch.no_grad()
    def bare() -> None:
        x = channels_last(normalise(to_unit(images[:batch], "cpu")))
        step = 1  # images at a time: faster here than more
        for k in range(0, batch, step):
            network.stages(x[k : k + step], last=3)

    return paired(lambda: detector.score(images[:batch]), bare, rounds)


def igd_step(side: int, width: int, rounds: int) -> tuple[float, float, float]:
    """A step of IGD's global model against its networks' bare passes over as many images."""
    images = np.random.default_rng(0).integers(0, 255, (32, 3, side, side), np.uint8)
    detector = IGD(ResNet18(), image_size=side, width=width)
    training = Training(detector, "global", images, None)
    training.estimate()
    draws = generator(0)
    x = channels_last(torch.rand(detector.batch_size, 3, side, side, generator=draws))
    made = channels_last(torch.rand(2 * len(x), 3, side, side, generator=draws))

    def bare() -> None:
        for optimiser in training.optimisers.values():
            optimiser.zero_grad(set_to_none=True)
        z = training.model.encode(x)
        decoded = training.model.decode(torch.cat([z, z]))
        training.judge.requires_grad_(False)
        (training.judge(decoded[: len(x)]).sum() + decoded.sum()).backward()
        training.judge.requires_grad_(True)
        training.judge(made).sum().backward()

    return paired(lambda: training.step(*divmod(training.step_done, training.steps)), bare, rounds)


def igd_scoring(rounds: int) -> tuple[float, float, float]:
    """IGD's global and local model, 225 patches, against PaDiM, an image of 256 px."""
    images = np.random.default_rng(0).integers(0, 255, (8, 3, 256, 256), np.uint8)
    network = ResNet18().eval()
    channels_last(network)
    igd, padim = IGD(network, network), PaDiM(network).fit(images)
    for model in igd.models.values():
        model.sigma2.fill_(1.0)
    return paired(lambda: igd.score(images[:1]), lambda: padim.score(images[:1]), rounds)


def augmentation(side: int, batch: int) -> float:
    """Views a second: MedMix classes 0 to 3 and two weak views of each."""
    x = torch.rand(batch, 3, side, side, generator=generator(0))
    config = pmsacl.Config()
    pmsacl.class_views(x, config, generator(1))
    start = time.perf_counter()
    for k in range(5):
        pmsacl.class_views(x, config, generator(2, k))
    return 5 * 8 * batch / (time.perf_counter() - start)


def main() -> None:
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    rows = []
    for name, (ours, bare, ratio) in (
        ("training step, 256 views, 64 px / encoder forward and backward", training_step(7)),
        ("ResNet-18, 128 views, 64 px / with plain convolutions", small_maps(64, 5)),
        ("ResNet-18, 128 views, 32 px / with plain convolutions", small_maps(32, 5)),
        ("PaDiM score, 1 image, 256 px / layers 1-3", scoring(1, 15)),
        ("PaDiM score, 8 images, 256 px / layers 1-3", scoring(8, 7)),
        ("IGD step, 16 images, 64 px, width 8 / its networks' passes", igd_step(64, 8, 7)),
        ("IGD step, 16 images, 128 px, width 16 / its networks' passes", igd_step(128, 16, 3)),
        ("IGD score, 1 image, 256 px, 225 patches / PaDiM's", igd_scoring(3)),
    ):
        rows.append([name, f"{1e3 * ours:.1f}", f"{1e3 * bare:.1f}", f"{ratio:.2f}", machine])
        print(f"{name}: {1e3 * ours:.1f} ms / {1e3 * bare:.1f} ms = {ratio:.2f}", flush=True)
    torch.set_num_threads(1)
    machine = f"{platform.machine()}, 1 thread, torch {torch.__version__}"
    for side, batch in ((64, 32), (256, 4)):
        rate = augmentation(side, batch)
        rows.append([f"augmentation, {side} px, views a second", f"{rate:.0f}", "", "", machine])
        print(f"augmentation, {side} px: {rate:.0f} views a second", flush=True)
    with open(Path(__file__).parent / "docs" / "speed.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["what", "ours_ms_or_rate", "bare_ms", "ratio", "machine"])
        writer.writerows(rows)


if __name__ == "__main__":
    main()
