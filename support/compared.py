"""The detectors of baselines/ in the main job: their names, their settings, their training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from baselines.adgan import ADGAN
from baselines.cutpaste import CutPaste
from baselines.dae import DAE
from baselines.fanogan import FAnoGAN
from baselines.msssim import MSSSIM
from baselines.ocgan import OCGAN
from baselines.panda import PANDA
from baselines.pretraining import UNTRAINED
from baselines.steps import Detector
from encoder import ResNet18
from support.progress import notify
from support.training import train

COMPARED: dict[str, type[Detector]] = {
    kind.kind: kind for kind in (DAE, MSSSIM, OCGAN, FAnoGAN, ADGAN, PANDA, CutPaste)
}
NAMES = ("padim", "igd", *COMPARED)  # of --detector, and of rows of results.json


def chosen(detector: str) -> tuple[str, ...]:
    """The names in --detector: some of NAMES with commas; "both" is padim,igd.

    raises: ValueError for another name, or one named twice.
    """
    names = tuple(("padim,igd" if detector == "both" else detector).split(","))
    if not set(names) <= set(NAMES) or len(set(names)) < len(names):
        raise ValueError(f"--detector must be both, or some of {', '.join(NAMES)} with commas")
    return names


def deciding(config: Any) -> set[str]:
    """The options that decide a run's results; runs of another device are the same."""
    detectors, without = set(chosen(config.detector)), {"out", "device"}
    if detectors <= {"padim", "igd"}:  # the preset sets their options, and others' settings itself
        without |= {"preset", "detector_epochs", "detector_lr", "denoise"}
    prefixes = () if "igd" in detectors else ("igd_", "local")
    names = [field.name for field in dataclasses.fields(config)]
    if config.method in UNTRAINED:  # what pre-trains has no part in them
        options = names[names.index("terms") : names.index("healthy_share")]  # of the pre-training
        without |= {*options} - {"encoder", "init"}
    return {name for name in names if name not in without and not name.startswith(prefixes)}


def build(name: str, backbone: nn.Module, options: Mapping[str, Any]) -> Detector:
    """The detector of this name, not trained.

    backbone: what a pre-trained one starts from.   options: those of the run, by name.
    """
    kind = COMPARED[name]
    settings = dict(kind.quick) if options["preset"] == "quick" else {}
    settings |= {"image_size": options["image_size"], "seed": options["seed"]}
    changed = {"epochs": options["detector_epochs"], "lr": options["detector_lr"]}
    settings |= {option: value for option, value in changed.items() if value}
    if name == "fanogan" and options["detector_epochs"]:
        settings["encoder_epochs"] = options["detector_epochs"]
    if name == "dae":
        settings["denoise"] = options["denoise"]
    start: Any = options["device"]
    if kind.pretrained:  # a plain copy: SyncBatchNorm would wait for processes that train nothing
        start = ResNet18().to(options["device"])
        start.load_state_dict(backbone.state_dict())
    return kind(start, **settings)


def fit(
    name: str, backbone: nn.Module, images: np.ndarray, options: Mapping[str, Any], folder: Path
) -> Detector:
    """The same, trained with checkpoints and a log in the run's folder."""
    detector = build(name, backbone, options)
    for training in detector.trainings(images):
        file = training.name.replace(" ", "_")
        notify(f"training {training.name}")
        train(training, folder / f"checkpoint_{file}.pt", folder / f"log_{file}.csv")
    return detector
