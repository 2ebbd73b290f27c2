"""The main job's speed beside the bare network's, as ratios, on the GPU if there is one.

    python -m bench.training                   at most eight minutes, on a GPU three
    python -m bench.training --commit 1f56c3f  where there is no git to ask

It prints its rows and writes them: to docs/speed.csv, on a GPU to docs/speed_gpu.csv and to their
table in docs/speed.md.

Each pair is timed in turn, round by round, and the median ratio is kept: absolute times of shared
machines drift, ratios hold. On a GPU a round ends when it has: the host waits. bench/kernels.py
times the kernels.
"""

from __future__ import annotations

import argparse
import csv
import os
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
from bench.page import SPEED, add_commit, provenance, write_block
from detectors import PaDiM
from encoder import Conv3x3, ResNet18, autocast, channels_last, normalise, seeded, to_unit
from igd import IGD
from pmsacl import Pretraining, class_views
from support.launches import of_step
from support.options import Config
from support.run import keep_freed_memory
from support.training import step

Times = tuple[float, float, float]  # seconds of ours, of the other, median ratio

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SECONDS = 12.0 if DEVICE.type == "cuda" else 30.0  # for a row's rounds after the first LEAST
LEAST, MOST = 2, 15  # rounds


def finished() -> float:
    """The time once the device has done all that it was told."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def paired(ours: Callable[[], object], other: Callable[[], object]) -> Times:
    """Median seconds of both, and the median of the rounds' ratios ours / other."""
    times: list[tuple[float, float]] = []
    ours(), other()  # caches and allocators
    began = finished()
    while len(times) < LEAST or (len(times) < MOST and finished() - began < SECONDS):
        start = finished()
        ours()
        middle = finished()
        other()
        times.append((middle - start, finished() - middle))
    a, b = zip(*times, strict=True)
    return statistics.median(a), statistics.median(b), statistics.median(p / q for p, q in times)


def pictures(count: int, side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (count, 3, side, side), np.uint8)


def random_views(count: int, side: int) -> Tensor:
    return channels_last(torch.rand(count, 3, side, side, generator=seeded(0)).to(DEVICE))


def network() -> ResNet18:
    resnet = ResNet18().eval().to(DEVICE)
    channels_last(resnet)
    return resnet


def training_step(side: int) -> Times:
    """A whole step against forward and backward of the encoder on as many views."""
    config = Config(batch_size=32, image_size=side, init="random", device=str(DEVICE))
    training = Pretraining(pictures(64, side), config)
    training.c = torch.zeros(config.classes, 128, device=DEVICE)
    training.step_done = 1  # the centres are there
    views = random_views(2 * config.classes * 32, side)

    def bare() -> None:
        training.optimiser.zero_grad(set_to_none=True)
        training.encoder(views).sum().backward()

    return paired(lambda: step(training, training.losses, Path("none")), bare)


def small_maps(side: int) -> Times:
    """Forward and backward of the encoder's network, 128 views, against plain convolutions."""
    x, resnet = random_views(128, side), network().train()

    def passes() -> None:
        resnet.zero_grad(set_to_none=True)
        with autocast(DEVICE):
            pooled = resnet.pooled(x)
        pooled.sum().backward()

    def plain() -> None:
        with mock.patch.object(Conv3x3, "forward", nn.Conv2d.forward):
            passes()

    return paired(passes, plain)


@torch.no_grad()
def layers(resnet: ResNet18, images: np.ndarray) -> None:
    """Layers 1-3 alone, which PaDiM's features are."""
    at_once = 4 if DEVICE.type == "cpu" else 64  # images, as PaDiM takes them
    for k in range(0, len(images), at_once):
        x = channels_last(normalise(to_unit(images[k : k + at_once], DEVICE)))
        resnet.stages(x, last=3)


def scoring(batch: int) -> Times:
    """PaDiM's heat maps against the layers 1-3 that they are made from, 256 px."""
    images, resnet = pictures(max(batch, 8), 256), network()
    detector = PaDiM(resnet).fit(images)
    return paired(lambda: detector.score(images[:batch]), lambda: layers(resnet, images[:batch]))


def fitting(count: int) -> Times:
    """PaDiM's fit against the layers 1-3 of its images, 256 px."""
    images, resnet = pictures(count, 256), network()
    detector = PaDiM(resnet)
    return paired(lambda: detector.fit(images), lambda: layers(resnet, images))


def igd_step(side: int, width: int) -> Times:
    """A step of IGD's global model against its networks' bare passes over as many images."""
    detector = IGD(network(), image_size=side, width=width)
    training = next(iter(detector.trainings(pictures(32, side))))
    training.update(training.losses())  # mu and sigma are estimated
    x = random_views(detector.batch_size, side)
    made = random_views(2 * len(x), side)

    def bare() -> None:
        for optimiser in training.optimisers.values():
            optimiser.zero_grad(set_to_none=True)
        with autocast(DEVICE):
            z = training.model.encode(x)
            decoded = training.model.decode(torch.cat([z, z]))
            training.critic.requires_grad_(False)
            judged = training.critic(decoded[: len(x)])
        (judged.sum() + decoded.sum()).backward()
        training.critic.requires_grad_(True)
        with autocast(DEVICE):
            judged = training.critic(made)
        judged.sum().backward()

    return paired(lambda: step(training, training.losses, Path("none")), bare)


def igd_scoring() -> Times:
    """IGD's global and local model, 225 patches, against PaDiM, an image of 256 px."""
    images, resnet = pictures(8, 256), network()
    igd, padim = IGD(resnet, resnet), PaDiM(resnet).fit(images)
    for model in igd.models.values():
        model.sigma2.fill_(1.0)
    return paired(lambda: igd.score(images[:1]), lambda: padim.score(images[:1]))


def augmentation(side: int, batch: int) -> Times:
    """MedMix's four classes and two weak views of each, against a view at a time with Pillow."""
    images, config = pictures(batch, side), Config()

    def ours() -> None:
        class_views(to_unit(images, DEVICE), config, seeded(1))

    return paired(ours, lambda: per_image.class_views(images, config.classes, 1))


def counts() -> str:
    """What a GPU would be told and waited for in a step of the paper's size."""
    whole, bare = of_step(Config(device="meta", init="random"), pictures(64, 256))
    launches = whole.launches.total() - bare.launches.total()
    told = f"{launches} launches beside its encoder's, {whole.waits.total()} wait(s)"
    return f"a step of 256 views, 256 px: {told}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_commit(parser)
    keep_freed_memory()  # as the programs do
    commit, rows = parser.parse_args().commit, []

    def measure(what: str, times: Times) -> None:
        ours, other, ratio = times
        row = [what, f"{1e3 * ours:.1f}", f"{1e3 * other:.1f}", f"{ratio:.3f}"]
        rows.append(row + list(provenance(commit).values()))
        print(f"{what}: {1e3 * ours:.1f} ms / {1e3 * other:.1f} ms = {ratio:.3f}", flush=True)

    gpu = DEVICE.type == "cuda"
    for side in (64, 256) if gpu else (64,):  # a CPU takes a minute for one step at 256 px
        what = f"training step, 256 views, {side} px / encoder forward and backward"
        measure(what, training_step(side))
    for side in (64, 32):
        measure(f"ResNet-18, 128 views, {side} px / with plain convolutions", small_maps(side))
    for batch in (1, 8, 32) if gpu else (1, 8):
        images = "1 image" if batch == 1 else f"{batch} images"
        measure(f"PaDiM score, {images}, 256 px / layers 1-3", scoring(batch))
    measure("PaDiM fit, 64 images, 256 px / layers 1-3", fitting(64))
    measure("IGD step, 16 images, 64 px, width 8 / its networks' passes", igd_step(64, 8))
    measure("IGD step, 16 images, 128 px, width 16 / its networks' passes", igd_step(128, 16))
    measure("IGD score, 1 image, 256 px, 225 patches / PaDiM's", igd_scoring())
    torch.set_num_threads(1)
    measure("MedMix and weak views, 256 views, 64 px, a thread / Pillow", augmentation(64, 32))
    measure("MedMix and weak views, 64 views, 256 px, a thread / Pillow", augmentation(256, 8))
    print(counts())
    with open(SPEED.with_name("speed_gpu.csv" if gpu else "speed.csv"), "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["what", "ours_ms", "other_ms", "ratio", *provenance(commit)])
        writer.writerows(rows)
    if gpu:
        told = ", ".join(f"{key} {value}" for key, value in provenance(commit).items())
        lines = [f"{told}; {counts()}:", "", "| what | ours, ms | other, ms | ratio |"]
        lines += ["| --- " * 4 + "|", *(f"| {' | '.join(row[:4])} |" for row in rows)]
        write_block("bench.training", lines)


if __name__ == "__main__":
    main()
