"""The main job's speed beside the bare network's, in one run, as ratios.

    python -m bench.training      # prints and writes docs/speed.csv; a few minutes on two cores

Each pair is timed in turn, round by round, and the median ratio is kept: absolute times of shared
machines drift, ratios hold. bench/kernels.py times the kernels.
"""

from __future__ import annotations

import csv
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads spoil a shared machine

import numpy as np
import torch
from torch import Tensor, nn

from bench import per_image
from detectors import PaDiM
from encoder import Conv3x3, ResNet18, channels_last, normalise, seeded, to_unit
from igd import IGD
from pmsacl import Pretraining, class_views
from support.options import Config

Times = tuple[float, float, float]  # seconds of ours, of the other, median ratio


def paired(ours: Callable[[], object], other: Callable[[], object], rounds: int) -> Times:
    """Median seconds of both, and the median of the rounds' ratios ours / other."""
    times: list[tuple[float, float]] = []
    ours(), other()  # caches and allocators
    for _ in range(rounds):
        start = time.perf_counter()
        ours()
        middle = time.perf_counter()
        other()
        times.append((middle - start, time.perf_counter() - middle))
    a, b = zip(*times, strict=True)
    return statistics.median(a), statistics.median(b), statistics.median(p / q for p, q in times)


def pictures(count: int, side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (count, 3, side, side), np.uint8)


def random_views(count: int, side: int) -> Tensor:
    return channels_last(torch.rand(count, 3, side, side, generator=seeded(0)))


def network() -> ResNet18:
    resnet = ResNet18().eval()
    channels_last(resnet)
    return resnet


def training_step(rounds: int) -> Times:
    """A whole step against forward and backward of the encoder on as many views, 64 px."""
    config = Config(batch_size=32, image_size=64, init="random", device="cpu")
    training = Pretraining(pictures(64, 64), config)
    training.c = torch.zeros(config.classes, 128)
    training.step_done = 1  # the centres are there
    views = random_views(2 * config.classes * 32, 64)

    def bare() -> None:
        training.optimiser.zero_grad(set_to_none=True)
        training.encoder(views).sum().backward()

    return paired(lambda: training.update(training.losses()), bare, rounds)


def small_maps(side: int, rounds: int) -> Times:
    """Forward and backward of the encoder's network, 128 views, against plain convolutions."""
    x, resnet = random_views(128, side), network().train()

    def passes() -> None:
        resnet.zero_grad(set_to_none=True)
        resnet.pooled(x).sum().backward()

    def plain() -> None:
        with mock.patch.object(Conv3x3, "forward", nn.Conv2d.forward):
            passes()

    return paired(passes, plain, rounds)


def scoring(batch: int, rounds: int) -> Times:
    """PaDiM's heat maps against the layers 1-3 that they are made from, 256 px."""
    images, resnet = pictures(8, 256), network()
    detector = PaDiM(resnet).fit(images)

    @torch.no_grad()
    def bare() -> None:  # an image at a time: faster here than more
        x = channels_last(normalise(to_unit(images[:batch], "cpu")))
        for k in range(batch):
            resnet.stages(x[k : k + 1], last=3)

    return paired(lambda: detector.score(images[:batch]), bare, rounds)


def igd_step(side: int, width: int, rounds: int) -> Times:
    """A step of IGD's global model against its networks' bare passes over as many images."""
    detector = IGD(ResNet18(), image_size=side, width=width)
    training = next(iter(detector.trainings(pictures(32, side))))
    training.update(training.losses())  # mu and sigma are estimated
    x = random_views(detector.batch_size, side)
    made = random_views(2 * len(x), side)

    def bare() -> None:
        for optimiser in training.optimisers.values():
            optimiser.zero_grad(set_to_none=True)
        z = training.model.encode(x)
        decoded = training.model.decode(torch.cat([z, z]))
        training.critic.requires_grad_(False)
        (training.critic(decoded[: len(x)]).sum() + decoded.sum()).backward()
        training.critic.requires_grad_(True)
        training.critic(made).sum().backward()

    return paired(lambda: training.update(training.losses()), bare, rounds)


def igd_scoring(rounds: int) -> Times:
    """IGD's global and local model, 225 patches, against PaDiM, an image of 256 px."""
    images, resnet = pictures(8, 256), network()
    igd, padim = IGD(resnet, resnet), PaDiM(resnet).fit(images)
    for model in igd.models.values():
        model.sigma2.fill_(1.0)
    return paired(lambda: igd.score(images[:1]), lambda: padim.score(images[:1]), rounds)


def augmentation(side: int, batch: int, rounds: int) -> Times:
    """MedMix's four classes and two weak views of each, against a view at a time with Pillow."""
    images, config = pictures(batch, side), Config()

    def ours() -> None:
        class_views(to_unit(images, "cpu"), config, seeded(1))

    return paired(ours, lambda: per_image.class_views(images, config.classes, 1), rounds)


def main() -> None:
    rows = []

    def measure(what: str, times: Times) -> None:
        ours, other, ratio = times
        threads = f"{torch.get_num_threads()} threads"
        machine = f"{platform.machine()}, {threads}, torch {torch.__version__}"
        rows.append([what, f"{1e3 * ours:.1f}", f"{1e3 * other:.1f}", f"{ratio:.3f}", machine])
        print(f"{what}: {1e3 * ours:.1f} ms / {1e3 * other:.1f} ms = {ratio:.3f}", flush=True)

    measure("training step, 256 views, 64 px / encoder forward and backward", training_step(7))
    measure("ResNet-18, 128 views, 64 px / with plain convolutions", small_maps(64, 5))
    measure("ResNet-18, 128 views, 32 px / with plain convolutions", small_maps(32, 5))
    measure("PaDiM score, 1 image, 256 px / layers 1-3", scoring(1, 15))
    measure("PaDiM score, 8 images, 256 px / layers 1-3", scoring(8, 7))
    measure("IGD step, 16 images, 64 px, width 8 / its networks' passes", igd_step(64, 8, 7))
    measure("IGD step, 16 images, 128 px, width 16 / its networks' passes", igd_step(128, 16, 3))
    measure("IGD score, 1 image, 256 px, 225 patches / PaDiM's", igd_scoring(3))
    torch.set_num_threads(1)
    measure("MedMix and weak views, 256 views, 64 px / with Pillow", augmentation(64, 32, 7))
    measure("MedMix and weak views, 64 views, 256 px / with Pillow", augmentation(256, 8, 5))
    with open(Path(__file__).parent.parent / "docs" / "speed.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["what", "ours_ms", "other_ms", "ratio", "machine"])
        writer.writerows(rows)


if __name__ == "__main__":
    main()
