"""The main job: find and decode the images, pre-train, fit detectors, evaluate, draw.

    python pmsacl.py [options]

Every phase can be interrupted and resumed. Equations are elsewhere: this composes the modules.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from baselines.lesion_classifier import LesionClassifier
from baselines.pretraining import UNTRAINED
from detectors import PaDiM
from encoder import Encoder, ResNet18, seeded
from eval import evaluate
from igd import IGD
from pmsacl import pretrain
from support import checks, data, healthy, layouts, phantom
from support.claim import claimed
from support.compared import chosen, fit
from support.depth import window_of_set
from support.dryrun import dry_run, tell_how_long
from support.features import draw_features
from support.options import Config, parse, resolve
from support.progress import complain, notify, progress, show
from support.readers import read_config
from support.report import write_report
from support.run import (
    cache_folder,
    first_process_first,
    join_processes,
    lack,
    make_folder,
    ranks,
    read_saved,
    read_text,
    save_atomically,
    wait_for_all,
    write_file,
)
from support.run_figures import draw_reconstructions, draw_views
from support.tables import write_results
from support.together import assist, batch_of_all, offered
from support.training import train
from support.worth import fake_lesions, near_duplicates, trivial_scores


@dataclass(frozen=True)
class Images:
    """The decoded data set: what the phases after it share."""

    dataset: layouts.Dataset
    train: np.ndarray  # (N, 3, S, S) uint8
    test: np.ndarray | None  # (M, 3, S, S) uint8, one for each of dataset.test
    masks: np.ndarray | None  # (M, S, S)
    known: np.ndarray | None  # (M,) bool
    healthy: np.ndarray  # (H, 3, S, S) uint8, of healthy images that train nothing   [P!§3.3 R29]
    notes: tuple[str, ...] = ()  # on the data, for results.md


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
    notes = checks.at_the_start(config, folder, dataset)
    make_folder(folder)
    saved = read_config(folder)
    left_out: list[str] = []
    window = window_of_set(dataset.images, config.window, saved)
    size, cache = config.image_size, cache_folder(folder)
    how: dict[str, Any] = {"skip_bad": config.skip_bad, "window": window, "left_out": left_out}
    fit, kept_out = healthy.split(dataset.train, config.healthy_share)
    decoded, kept = data.decode([*fit, *kept_out], size, cache, **how)
    count = int((kept < len(fit)).sum())  # of those that train: the first ones
    dataset = dataclasses.replace(dataset, train=tuple(fit[i] for i in kept[:count]))
    test = masks = known = None
    if dataset.test:
        dataset, test, masks, known = data.decode_test(dataset, size, cache, **how)
    notes += checks.check_masks(dataset.test, masks, known)
    notes += [f"left out: {reason}" for reason in left_out]
    checks.check_threads(saved)
    if saved.get("data") != config.data:  # a new run, or images that have moved
        content = dataclasses.asdict(config) | versions() | saved | {"data": config.data}
        content |= {"values_shown": window}
        write_file(folder / "config.json", json.dumps(content, indent=2).encode())
    return Images(dataset, decoded[:count], test, masks, known, decoded[count:], tuple(notes))


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
    notify(plan(config, images, folder))
    warn_of_near_duplicates(images)
    tell_how_long(config, len(images.train))

    began = time.monotonic()
    encoder, init = pretrained(images.train, config, folder)
    local = has_local_model(config)
    patches = pretrained(images.train, config, folder, local=True)[0] if local else None
    seconds["pretrain"] = time.monotonic() - began
    if ranks()[0] > 0:
        return fit_together(encoder, patches, images, config, folder)  # the first does the rest
    draw_views(images.train, config, images.dataset.root.name, folder)
    draw_features(encoder, images.train, images.test, images.dataset, config, folder)
    extra: dict[str, Any] = {"config": dataclasses.asdict(config), "seconds": seconds, "init": init}
    extra["fake_lesions"] = watch_fake_lesions(encoder, images, config)
    extra["data_notes"] = list(images.notes)
    detectors = fit_detectors(encoder, patches, images, config, folder, seconds)
    if images.test is None:
        end_without_test(detectors, images, extra, folder)
        return
    baselines = trivial_scores(images.train, images.test, images.dataset.test)
    evaluate(
        folder, images.dataset, offered(detectors), images.test, images.masks, images.known,
        seed=config.seed, paper_protocol=config.paper_protocol, batch=batch_of_all(),
        baselines=baselines, extra=extra,
    )  # fmt: skip
    show(read_text(folder / "results.md"))
    notify(f"weights, scores and figures are in {folder}; to look at: {folder / 'report.html'}")


def end_without_test(
    detectors: dict[str, Any], images: Images, results: dict[str, Any], folder: Path
) -> None:
    """Write what there is to say without test images, and how to go on."""
    results["healthy"] = healthy.summary(detectors)
    write_results(folder, results)
    write_report(folder, images.dataset, results)
    for name, row in results["healthy"].items():
        notify(healthy.described(name, row))
    notify(f"no test images: score some with  python eval.py {folder} --score FILES")


def pretrained(
    images: np.ndarray, config: Config, folder: Path, *, local: bool = False
) -> tuple[Encoder, str]:
    """The pre-trained encoder and what it began with; with --encoder, that of the other run.

    Its backbone is kept as encoder.pt, that of patches as encoder_local.pt.
    raises: ValueError or OSError if that run has no such encoder, or as `pretrain`.
    """
    name = "encoder_local.pt" if local else "encoder.pt"
    if config.encoder:
        encoder, init = encoder_of(Path(config.encoder), name, config.device)
    else:
        encoder, init = pretrain(images, config, folder, local=local)
    if ranks()[0] == 0:
        save_atomically(encoder.backbone.state_dict(), folder / name)
    return encoder, init


def encoder_of(folder: Path, name: str, device: str) -> tuple[Encoder, str]:
    """Another run's encoder, with heads that nothing has trained.   raises: ValueError, OSError."""
    file, encoder = folder / name, Encoder()
    if not file.is_file():
        of_patches = "; it was run without IGD's local model" * name.startswith("encoder_local")
        raise ValueError(f"--encoder {folder}: there is no {name} here{of_patches}")
    try:
        encoder.backbone.load_state_dict(read_saved(file, "encoder", "cpu"))
    except (RuntimeError, TypeError, AttributeError):
        raise ValueError(f"{file}: no state dict of a resnet18") from None
    return encoder.to(device).eval(), f"the encoder of {folder.name}"


def has_local_model(config: Config) -> bool:
    """Whether there is IGD, with a model of patches.   [P:§4.2]"""
    wanted = config.local == "yes" or (config.local == "auto" and config.image_size > 64)
    return "igd" in chosen(config.detector) and wanted


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
    for name in chosen(config.detector):
        began = time.monotonic()
        if name == "padim":
            detector: Any = fit_padim(encoder.backbone, images.train, config)
        elif name == "igd":
            detector = fit_igd(encoder, patches, images, config, folder)
        else:
            detector = fit(name, encoder.backbone, images.train, dataclasses.asdict(config), folder)
        if hasattr(detector, "reconstruct"):
            labels = None if images.test is None else [s.label for s in images.dataset.test]
            shown = images.train if images.test is None else images.test
            draw_reconstructions(name, detector, shown, labels, folder)
        file = folder / (f"detector_{name}.pt" if detectors else "detector.pt")
        detectors[name] = with_healthy(detector, images, name, file)
        seconds[name] = time.monotonic() - began
    trained = config.method not in UNTRAINED and not config.encoder
    if trained and config.classes > 1 and "aug" in config.names_of_terms(local=False):
        file = folder / "detector_f_beta.pt"
        detectors["f_beta"] = with_healthy(LesionClassifier(encoder), images, "f_beta", file)
    detectors["untrained"] = fit_padim(untrained(config), images.train, config)
    return detectors


def fit_together(
    encoder: Encoder, patches: Encoder | None, images: Images, config: Config, folder: Path
) -> None:
    """What the other processes do while the first one fits and evaluates: their shares."""
    own: dict[str, Any] = {"f_beta": LesionClassifier(encoder)}
    for name in chosen(config.detector):
        if name == "padim":
            own[name] = fit_padim(encoder.backbone, images.train, config)
        elif name == "igd":
            own[name] = fit_igd(encoder, patches, images, config, folder)
    own["untrained"] = fit_padim(untrained(config), images.train, config)
    if images.test is not None:
        assist(own, images.test, folder, config.device)


def untrained(config: Config) -> ResNet18:
    """The network that the pre-training starts from where --init is random."""
    return ResNet18(seeded(config.seed, 2)).to(config.device).eval()


def watch_fake_lesions(encoder: Encoder, images: Images, config: Config) -> dict[str, Any]:
    """How well fake lesions are found, with the encoder and with the untrained one; said."""
    fakes: dict[str, Any] = fake_lesions(encoder.backbone, images.train, seed=config.seed)
    fakes["untrained"] = fake_lesions(untrained(config), images.train, seed=config.seed)
    auroc, aupro = (
        f"{fakes[k]:.3f} ({fakes['untrained'][k]:.3f})" for k in ("image_auroc", "aupro")
    )
    notify(f"fake lesions (untrained): image AUROC {auroc}, AUPRO {aupro}; healthy images only")
    return fakes


def fit_padim(backbone: ResNet18, images: np.ndarray, config: Config) -> PaDiM:
    """PaDiM on this network, with its progress shown."""

    def track(steps: Iterable[int]) -> Iterable[int]:
        batches = list(steps)
        return progress(batches, len(batches), "fit PaDiM")

    wait_for_all()
    return PaDiM(backbone, seed=config.seed).fit(images, track=track, group=dist.group.WORLD)


def with_healthy(detector: Any, images: Images, name: str, file: Path) -> Any:
    """The detector, saved, with what it gives for healthy images that trained nothing."""
    detector.healthy = healthy.measure(detector, images.healthy, name)
    content = io.BytesIO()
    detector.save(content)
    if detector.healthy is not None:
        content.seek(0)
        state = torch.load(content, weights_only=True)
        state["healthy"] = healthy.to_state(detector.healthy)
        content = io.BytesIO()
        torch.save(state, content)
    write_file(file, content.getbuffer())
    return detector


def fit_igd(
    encoder: Encoder, patches: Encoder | None, images: Images, config: Config, folder: Path
) -> IGD:
    """IGD from the pre-trained encoders; its logs.   [P:§3.3]"""
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
    for training in igd.trainings(images.train, dist.group.WORLD):
        wait_for_all()
        local = training.name.endswith("local")
        checkpoint = folder / ("checkpoint_igd_local.pt" if local else "checkpoint_igd.pt")
        train(training, checkpoint, folder / f"log_igd_{'local' if local else 'global'}.csv")
    return igd


# --- what the screen and the folder show of it -------------------------------------------------


def plan(config: Config, images: Images, folder: Path) -> str:
    """What is about to happen, in a few lines."""
    dataset = images.dataset
    abnormal = sum(sample.label for sample in dataset.test)
    masks = sum(sample.mask is not None for sample in dataset.test)
    return (
        f"{dataset.root}: {dataset.layout}; {len(dataset.train)} healthy training images, "
        f"{len(images.healthy)} healthy ones kept out (--healthy-share), "
        f"{len(dataset.test) - abnormal} normal and {abnormal} abnormal test images, "
        f"{masks} masks\n"
        f"{config.method}, {config.preset}: {config.classes} classes, {config.epochs} epochs, "
        "batches of "
        f"{config.batch_size} images ({2 * config.classes * config.batch_size} views) at "
        f"{config.image_size} px on {config.device}; results go to {folder}"
    )


def warn_of_near_duplicates(images: Images) -> None:
    """Say so if test images are nearly the same as training images."""
    if images.test is None or not (pairs := near_duplicates(images.train, images.test)):
        return
    test, train = pairs[0]
    dataset = images.dataset
    notify(
        f"warning: {len(pairs)} test images are nearly the same as a training image, such as "
        f"{dataset.test[test].path} and {dataset.train[train]}: the results may be too good"
    )


# --- the command -------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0, 2 for a mistake of the user's (one line), 130 when interrupted."""
    folder = None
    try:
        options, resume = parse(argv)
        join_processes()
        if options.pop("dry_run", False):
            dry_run(*resolve(options, resume))
            return 0
        choose = functools.partial(resolve, options, resume)
        resumed, named = resume is not None, "out" in options
        with claimed(choose, resumed=resumed, named=named) as (config, folder):
            main_job(config, folder)
    except (ValueError, OSError, FloatingPointError) as error:
        return complain("pmsacl.py", error)
    except (MemoryError, RuntimeError) as error:
        return complain("pmsacl.py", lack(error))
    except KeyboardInterrupt:
        begun = folder and (folder / "config.json").exists()
        go_on = f"; go on with  python pmsacl.py --resume {folder}" if begun else ""
        notify(f"\ninterrupted{go_on}")
        return 130
    return 0
