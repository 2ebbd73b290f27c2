"""The main job: find and decode the images, pre-train, fit detectors, evaluate, draw.

    python pmsacl.py [options]

Every phase can be interrupted and resumed. Equations are elsewhere: this composes the modules.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from detectors import PaDiM
from encoder import Encoder, ResNet18, seeded, to_unit
from eval import evaluate
from igd import IGD
from pmsacl import pretrain, sizes
from support import checks, data, healthy, layouts, phantom
from support.cache import digest
from support.claim import claimed
from support.compared import chosen, fit
from support.depth import window_of_set
from support.dryrun import dry_run
from support.features import draw_features
from support.figures import reconstruction_figure, write_all
from support.lesion_classifier import LesionClassifier
from support.options import Config, parse, resolve
from support.paper_figures import views_figure
from support.progress import complain, notify, progress, show
from support.readers import read_config
from support.report import write_report
from support.run import (
    cache_folder,
    first_process_first,
    join_processes,
    leave_processes,
    ranks,
    read_text,
    real,
    save_atomically,
    wait_for_all,
    write_file,
)
from support.tables import fakes_described, write_results
from support.together import assist, batch_of_all, offered
from support.training import check_start, encoder_of, train
from support.versions import versions
from support.worth import fake_lesions, near_duplicates, trivial_scores

MANY = 500  # epochs


@dataclass(frozen=True)
class Images:
    """The decoded data set: what the phases after it share."""

    dataset: layouts.Dataset
    train: np.ndarray  # (N, 3, S, S) uint8
    pixels: np.ndarray | Tensor  # the same, on the GPU if they fit
    test: np.ndarray | None  # (M, 3, S, S) uint8, one for each of dataset.test
    masks: np.ndarray | None  # (M, S, S)
    known: np.ndarray | None  # (M,) bool
    healthy: np.ndarray  # (H, 3, S, S) uint8, of healthy images that train nothing   [P!§3.3 R29]
    notes: tuple[str, ...] = ()  # about the data, for results.md


def prepare(config: Config, folder: Path) -> Images:
    """Find, check and decode the images, or draw the phantoms (--data ""); then config.json.

    raises: ValueError or OSError.
    """
    check_start(config.encoder, config.init, folder, local=config.local_igd)
    root = real(config.data or folder / "phantom")
    if not config.data:
        phantom.draw(root, size=config.image_size)
    dataset = layouts.discover(root, seed=config.seed)
    dataset.check_test()  # before anything of a user's data is written
    notes = checks.at_the_start(config, folder, dataset)
    saved, listed = read_config(folder), digest(dataset.images, root)
    if saved.get("images", listed) != listed:
        raise ValueError(f"{root}: not the images that {folder} was begun with; begin another run")
    window = window_of_set(dataset.images, config.window, saved)
    how: dict[str, Any] = {"size": config.image_size, "cache_dir": cache_folder(folder)}
    how |= {"skip_bad": config.skip_bad, "window": window, "left_out": notes}
    paths, train, held_out = data.decode_train(dataset.train, config.healthy_share, **how)
    dataset = dataclasses.replace(dataset, train=paths)
    test = masks = known = None
    if dataset.test:
        dataset, test, masks, known = data.decode_test(dataset, **how)
    notes += checks.check_masks(dataset.test, masks, known)
    checks.check_threads(saved)
    if saved.get("data") != config.data:  # a new run, or images that have moved
        content = dataclasses.asdict(config) | versions(config.device) | saved
        content |= {"data": config.data, "values_shown": window, "images": listed}
        write_file(folder / "config.json", json.dumps(content, indent=2).encode())
    pixels = data.resident(train, torch.device(config.device))
    return Images(dataset, train, pixels, test, masks, known, held_out, tuple(notes))


@contextlib.contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """seconds[phase], how long the block took."""
    began = time.monotonic()
    yield
    seconds[phase] = time.monotonic() - began


def main_job(config: Config, folder: Path) -> None:
    """Pre-train, fit the detectors, evaluate them and the untrained network, report."""
    seconds: dict[str, float] = {}
    torch.backends.cudnn.deterministic = True  # the same seed, the same numbers on a GPU, too
    with timed(seconds, "images"), first_process_first():  # it draws and decodes, the others read
        images = prepare(config, folder)
    notify(plan(config, images, folder))
    notes = [*images.notes, *near_duplicates_note(images)]
    if config.device == "cpu" and config.epochs >= MANY and config.trains:
        notify(
            f"{config.epochs} epochs on a CPU take days to weeks: --dry-run estimates how long, "
            "--preset quick takes minutes"
        )

    with timed(seconds, "pretrain"):
        encoder, init = pretrained(images.pixels, config, folder)
        patches = None
        if config.local_igd:
            patches, _ = pretrained(images.pixels, config, folder, local=True)
    if ranks()[0] > 0:
        return fit_together(encoder, patches, images, config, folder)  # the first does the rest
    with timed(seconds, "figures"):
        shown = views_figure(images.train, config, f"{images.dataset.root.name}, {config.method}")
        write_all(folder, {config.strong: shown})
        draw_features(encoder, images.train, images.test, images.dataset, config, folder)
    extra: dict[str, Any] = {"config": dataclasses.asdict(config), "seconds": seconds, "init": init}
    with timed(seconds, "fake_lesions"):
        extra["fake_lesions"] = watch_fake_lesions(encoder, images, config)
    extra["data_notes"] = notes
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
    notify(f"weights, scores and figures are in {folder}; open {folder / 'report.html'}")


def end_without_test(
    detectors: dict[str, Any], images: Images, results: dict[str, Any], folder: Path
) -> None:
    """Write the results without test images, and print how to score some."""
    results["healthy"] = healthy.summary(detectors)
    write_report(folder, images.dataset, results)
    write_results(folder, results)
    for name, row in results["healthy"].items():
        notify(healthy.described(name, row))
    run = shlex.quote(str(folder))
    notify(f"no test images: score some with  python eval.py {run} --score FILES")


def pretrained(
    images: np.ndarray | Tensor, config: Config, folder: Path, *, local: bool = False
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
        file = folder / (f"detector_{name}.pt" if detectors else "detector.pt")
        with timed(seconds, name):
            if name == "padim":
                detector: Any = fit_padim(encoder.backbone, images.pixels, config)
            elif name == "igd":
                detector = fit_igd(encoder, patches, images, config, folder)
            else:
                settings = dataclasses.asdict(config)
                detector = fit(name, encoder.backbone, images.train, settings, folder)
            if hasattr(detector, "reconstruct"):
                draw_reconstructions(name, detector, images, folder)
            detectors[name] = with_healthy(detector, images, name, file)
    if config.trains and config.classes > 1 and "aug" in config.names_of_terms(local=False):
        file = folder / "detector_f_beta.pt"
        with timed(seconds, "f_beta"):
            detectors["f_beta"] = with_healthy(LesionClassifier(encoder), images, "f_beta", file)
    with timed(seconds, "untrained"):
        detectors["untrained"] = fit_padim(untrained(config), images.pixels, config)
    return detectors


def fit_together(
    encoder: Encoder, patches: Encoder | None, images: Images, config: Config, folder: Path
) -> None:
    """What the other processes do while the first one fits and evaluates: their shares."""
    own: dict[str, Any] = {"f_beta": LesionClassifier(encoder)}
    for name in chosen(config.detector):
        if name == "padim":
            own[name] = fit_padim(encoder.backbone, images.pixels, config)
        elif name == "igd":
            own[name] = fit_igd(encoder, patches, images, config, folder)
    own["untrained"] = fit_padim(untrained(config), images.pixels, config)
    if images.test is not None:
        assist(own, images.test, folder, config.device)


def untrained(config: Config) -> ResNet18:
    """The network that the pre-training starts from where --init is random."""
    return ResNet18(seeded(config.seed, 2)).to(config.device).eval()


def watch_fake_lesions(encoder: Encoder, images: Images, config: Config) -> dict[str, Any]:
    """How well fake lesions are found, with the encoder and with the untrained one; printed."""
    fakes: dict[str, Any] = fake_lesions(encoder.backbone, images.pixels, seed=config.seed)
    fakes["untrained"] = fake_lesions(untrained(config), images.pixels, seed=config.seed)
    notify(fakes_described(fakes))
    if config.trains and fakes["image_auroc"] <= fakes["untrained"]["image_auroc"]:
        steps = max(1, len(images.train) // config.batch_size) * config.epochs
        notify(
            f"so the pre-training, of about {steps} steps, has not paid off yet: try more --epochs "
            "(docs/experiments.md took 1,000 steps)"
        )
    return fakes


def fit_padim(backbone: ResNet18, images: np.ndarray | Tensor, config: Config) -> PaDiM:
    """PaDiM on this network, with its progress shown."""
    wait_for_all()
    return PaDiM(backbone, seed=config.seed).fit(
        images, track=lambda steps: progress(steps, len(steps), "fit PaDiM"), group=dist.group.WORLD
    )


def with_healthy(detector: Any, images: Images, name: str, file: Path) -> Any:
    """The detector, saved, with what it gives for healthy images that trained nothing."""
    detector.healthy = healthy.measure(detector, images.healthy, name)
    content = io.BytesIO()
    detector.save(content)
    content.seek(0)
    state = torch.load(content, weights_only=True)
    if detector.healthy is not None:
        state["healthy"] = healthy.to_state(detector.healthy)
    save_atomically(state, file)
    return detector


def fit_igd(
    encoder: Encoder, patches: Encoder | None, images: Images, config: Config, folder: Path
) -> IGD:
    """IGD from the pre-trained encoders; its logs.   [P:§3.3]"""
    local = patches.backbone if patches else None
    igd = IGD(encoder.backbone, local, **config.igd_settings())
    for training in igd.trainings(images.pixels, dist.group.WORLD):
        wait_for_all()
        which = training.which
        checkpoint = "checkpoint_igd_local.pt" if which == "local" else "checkpoint_igd.pt"
        train(training, folder / checkpoint, folder / f"log_igd_{which}.csv")
    return igd


# --- what the screen and the folder show of it -------------------------------------------------


def draw_reconstructions(name: str, detector: Any, images: Images, folder: Path) -> None:
    """figures/reconstruction_NAME.png: three test images of each class, or six training images."""
    shown, drawn, heads = images.train, np.arange(min(6, len(images.train))), []
    if images.test is not None:
        shown, y = images.test, images.dataset.labels
        drawn = np.sort(np.r_[np.flatnonzero(~y)[:3], np.flatnonzero(y)[:3]])
        heads = ["abnormal" if y[i] else "normal" for i in drawn]
    x = to_unit(shown[drawn], detector.device)
    with torch.no_grad():
        x_tilde = detector.reconstruct(x)
    figure = reconstruction_figure(x.cpu().numpy(), x_tilde.cpu().numpy(), heads, name)
    write_all(folder, {f"reconstruction_{name}": figure})


def plan(config: Config, images: Images, folder: Path) -> str:
    """What is about to happen, in a few lines."""
    dataset = images.dataset
    train, normal, abnormal, masks = dataset.counts
    processes = ranks()[1]
    batch = processes * sizes(train, config.batch_size, processes)[1]
    training = (
        f"{config.method}, {config.preset}: {config.classes} classes, {config.epochs} epochs, "
        f"batches of {batch} images ({2 * config.classes * batch} views)"
    )
    if config.encoder:
        training = f"no pre-training: encoder of {config.encoder}"
    elif not config.trains:
        training = "no pre-training: none"
    return (
        f"{dataset.root}: {dataset.layout}; {train} healthy training images, "
        f"{len(images.healthy)} healthy ones held out (--healthy-share), "
        f"{normal} normal and {abnormal} abnormal test images, {masks} masks\n"
        f"{training} at {config.image_size} px on {config.device}; results go to {folder}"
    )


def near_duplicates_note(images: Images) -> list[str]:
    """A warning if test images are nearly the same as training images; the first process looks."""
    pairs: list[tuple[int, int]] = []
    if images.test is not None and ranks()[0] == 0:
        pairs = near_duplicates(images.train, images.test)
    wait_for_all()
    if not pairs:
        return []
    test, train = pairs[0]
    dataset = images.dataset
    note = (
        f"test images that are nearly the same as a training image ({len(pairs)}), such as "
        f"{dataset.test[test].path} and {dataset.train[train]}: the results may be optimistic"
    )
    notify(f"warning: {note}")
    return [note]


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
        with claimed(functools.partial(resolve, options, resume)) as (config, folder):
            main_job(config, folder)
        leave_processes()
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        return complain("pmsacl.py", error)
    except KeyboardInterrupt:
        begun = folder and (folder / "config.json").exists()
        run = shlex.quote(str(folder))
        go_on = f"; continue with  python pmsacl.py --resume {run}" if begun else ""
        notify(f"\ninterrupted{go_on}")
        return 130
    return 0
