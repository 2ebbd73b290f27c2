"""The main job: find and decode the images, pre-train, fit detectors, evaluate, draw.

    python pmsacl.py [options]

Every phase can be interrupted and resumed. Equations are elsewhere: this composes the modules.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detectors import PaDiM
from encoder import Encoder, ResNet18, seeded, to_unit
from eval import evaluate
from igd import IGD
from pmsacl import pretrain, strong_set
from support import data, layouts, phantom
from support.features import draw_features
from support.figures import image_grid, png
from support.options import Config, parse, resolve
from support.progress import progress, say
from support.report import write_report
from support.run import (
    first_process_first,
    from_first_process,
    join_processes,
    make_folder,
    ranks,
    read_json,
    replacing,
    save_atomically,
    write_file,
)
from support.tables import write_results
from support.training import train


@dataclass(frozen=True)
class Images:
    """The decoded data set: what the phases after it share."""

    dataset: layouts.Dataset
    train: np.ndarray  # (N, 3, S, S) uint8
    test: np.ndarray | None  # (M, 3, S, S) uint8, one for each of dataset.test
    masks: np.ndarray | None  # (M, S, S)
    known: np.ndarray | None  # (M,) bool


def prepare(config: Config, folder: Path) -> Images:
    """Find, check and decode the images, or draw the phantoms (--data ""); then config.json.

    raises: ValueError or OSError.
    """
    root = Path(config.data or folder / "phantom").resolve()
    if not config.data:
        make_folder(folder)
        phantom.draw(root, size=config.image_size)
    dataset = layouts.discover(root, seed=config.seed)
    dataset.check_test()  # before anything of a user's data is written
    make_folder(folder)
    size, cache, skip = config.image_size, folder / "cache", config.skip_bad
    train_images, kept = data.decode(dataset.train, size, cache, skip_bad=skip)
    dataset = dataclasses.replace(dataset, train=tuple(dataset.train[i] for i in kept))
    test = masks = known = None
    if dataset.test:
        dataset, test, masks, known = data.decode_test(dataset, size, cache, skip_bad=skip)
    saved = read_json(folder / "config.json")
    if saved.get("data") != config.data:  # a new run, or images that have moved
        content = dataclasses.asdict(config) | versions() | saved | {"data": config.data}
        write_file(folder / "config.json", json.dumps(content, indent=2).encode())
    return Images(dataset, train_images, test, masks, known)


def versions() -> dict[str, str]:
    """What the numbers of a run depend on beside its options."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "commit": commit,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": np.__version__,
        "threads": str(torch.get_num_threads()),
    }


def main_job(config: Config, folder: Path) -> None:
    """Pre-train, fit the detectors, evaluate them beside the untrained network, report."""
    seconds: dict[str, float] = {}
    with first_process_first():  # it draws and decodes, the others read
        images = prepare(config, folder)
    say(plan(config, images, folder))

    began = time.monotonic()
    encoder, init = pretrain(images.train, config, folder)
    patches = None  # the encoder of IGD's local model
    if config.detector != "padim" and has_local_model(config):
        patches, _ = pretrain(images.train, config, folder, local=True)
    seconds["pretrain"] = time.monotonic() - began
    if ranks()[0] > 0:
        return  # the detectors are one process's work
    save_atomically(encoder.backbone.state_dict(), folder / "encoder.pt")
    draw_views(images, config, folder)
    draw_features(encoder, images.train, images.test, images.dataset, config, folder)

    detectors = fit_detectors(encoder, patches, images, config, folder, seconds)
    extra = {"config": dataclasses.asdict(config), "seconds": seconds, "init": init}
    if images.test is None:
        write_results(folder, extra)
        write_report(folder, images.dataset, extra)
        say(f"no test images: score some with  python eval.py {folder} --score FILES")
        return
    evaluate(
        folder,
        images.dataset,
        detectors,
        images.test,
        images.masks,
        images.known,
        seed=config.seed,
        paper_protocol=config.paper_protocol,
        extra=extra,
    )
    print((folder / "results.md").read_text(), end="")
    say(f"weights, scores and figures are in {folder}; to look at: {folder / 'report.html'}")


def has_local_model(config: Config) -> bool:
    """Whether IGD gets a model of patches.   [P:§4.2]"""
    return config.local == "yes" or (config.local == "auto" and config.image_size > 64)


def fit_detectors(
    encoder: Encoder,
    patches: Encoder | None,
    images: Images,
    config: Config,
    folder: Path,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The detectors of --detector, saved, and PaDiM on the untrained network; by name.

    seconds: receives how long each took.
    """
    detectors: dict[str, Any] = {}
    if config.detector in ("padim", "both"):
        began = time.monotonic()
        detectors["padim"] = fit_padim(encoder.backbone, images.train, config)
        save_detector(detectors["padim"], folder / "detector.pt")
        seconds["padim"] = time.monotonic() - began
    if config.detector in ("igd", "both"):
        began = time.monotonic()
        detectors["igd"] = fit_igd(encoder, patches, images, config, folder)
        name = "detector_igd.pt" if "padim" in detectors else "detector.pt"
        save_detector(detectors["igd"], folder / name)
        seconds["igd"] = time.monotonic() - began
    untrained = ResNet18(seeded(config.seed, 2)).to(config.device).eval()
    detectors["untrained"] = fit_padim(untrained, images.train, config)
    return detectors


def fit_padim(backbone: ResNet18, images: np.ndarray, config: Config) -> PaDiM:
    """PaDiM on this network, with its progress shown."""

    def track(steps: Iterable[int]) -> Iterable[int]:
        batches = list(steps)
        return progress(batches, len(batches), "fit PaDiM")

    return PaDiM(backbone, seed=config.seed).fit(images, track=track)


def save_detector(detector: Any, path: Path) -> None:
    with replacing(path) as partial:
        detector.save(partial)


def fit_igd(
    encoder: Encoder, patches: Encoder | None, images: Images, config: Config, folder: Path
) -> IGD:
    """IGD from the pre-trained encoders; its logs and a figure of reconstructions.   [P:§3.3]"""
    igd = IGD(
        encoder.backbone,
        patches.backbone if patches else None,
        image_size=config.image_size,
        epochs=config.igd_epochs,
        local_epochs=config.igd_local_epochs,
        batch_size=config.igd_batch_size,
        patches=config.igd_patches,
        lr=config.igd_lr,
        encoder_lr=config.igd_encoder_lr,
        warmup=config.igd_warmup,
        width=config.igd_width,
        seed=config.seed,
    )
    for training in igd.trainings(images.train):
        local = training.name.endswith("local")
        checkpoint = folder / ("checkpoint_igd_local.pt" if local else "checkpoint_igd.pt")
        train(training, checkpoint, folder / f"log_igd_{'local' if local else 'global'}.csv")
    draw_reconstructions(igd, images, folder)
    return igd


# --- what the screen and the folder show of it -------------------------------------------------


def plan(config: Config, images: Images, folder: Path) -> str:
    """What is about to happen, in a few lines."""
    dataset = images.dataset
    abnormal = sum(sample.label for sample in dataset.test)
    masks = sum(sample.mask is not None for sample in dataset.test)
    return (
        f"{dataset.root}: {dataset.layout}; {len(dataset.train)} healthy training images, "
        f"{len(dataset.test) - abnormal} normal and {abnormal} abnormal test images, "
        f"{masks} masks\n"
        f"{config.method}, {config.preset}: {config.classes} classes, {config.epochs} epochs, "
        "batches of "
        f"{config.batch_size} images ({2 * config.classes * config.batch_size} views) at "
        f"{config.image_size} px on {config.device}; results go to {folder}"
    )


def draw_views(images: Images, config: Config, folder: Path) -> None:
    """figures/medmix.png, or the name of --strong: images under A_0 .. A_n.   [P:Fig.2]"""
    x = to_unit(images.train[: max(2, min(5, len(images.train)))], "cpu")
    generator, augment = seeded(config.seed, 7), strong_set(config)
    columns = [x] + [
        augment(x, torch.full((len(x),), n), generator)[0] for n in range(1, config.classes)
    ]
    cells = [[(column[i] * 255).byte().numpy() for column in columns] for i in range(len(x))]
    names = [f"A_{n}" for n in range(config.classes)]
    if config.strong in ("medmix", "cutout", "cutmix"):
        names = [f"{name}: {n} lesion{'s' * (n != 1)}" for n, name in enumerate(names)]
    grid = image_grid(cells, columns=names, title=config.strong)
    write_file(folder / "figures" / f"{config.strong}.png", png(grid))


def draw_reconstructions(igd: IGD, images: Images, folder: Path) -> None:
    """figures/reconstruction_igd.png: image, reconstruction and their difference."""
    shown = images.train[:6]
    if images.test is not None:  # three healthy images, three with lesions
        labels = np.array([sample.label for sample in images.dataset.test])
        chosen = np.r_[np.flatnonzero(labels == 0)[:3], np.flatnonzero(labels)[:3]]
        shown = images.test[np.sort(chosen)]
    x = to_unit(shown, igd.device)
    x_tilde = igd.reconstruct(x)
    cells = [
        [(row * 255).byte().cpu().numpy() for row in rows]
        for rows in (x, x_tilde, (x - x_tilde).abs())
    ]
    grid = image_grid(cells, rows=("image", "reconstruction", "difference"), title="IGD")
    write_file(folder / "figures" / "reconstruction_igd.png", png(grid))


# --- the command -------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0, 2 for a mistake of the user's (one line), 130 when interrupted."""
    folder, existed = None, True
    try:
        options, resume = parse(argv)
        join_processes()
        config, folder = from_first_process(functools.partial(resolve, options, resume))
        existed = folder.exists()
        main_job(config, folder)
    except (ValueError, OSError, FloatingPointError) as error:
        if folder and not existed and not (folder / "checkpoint.pt").exists():
            shutil.rmtree(folder, ignore_errors=True)  # nothing in it is worth keeping
        print("pmsacl.py:", str(error).replace("\n", " "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        begun = folder and (folder / "config.json").exists()
        if folder and not begun and not existed:
            shutil.rmtree(folder, ignore_errors=True)
        go_on = f"; go on with  python pmsacl.py --resume {folder}" if begun else ""
        print(f"\ninterrupted{go_on}", file=sys.stderr)
        return 130
    return 0
