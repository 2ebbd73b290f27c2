"""What is known at the start is said at the start: places, content, masks, space on the disk.

Everything here raises ValueError with one line that says what to do, or returns notes: sentences
that the screen, results.md and report.html show.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import stat
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from support.compared import chosen
from support.folders import EXTENSIONS, how_to_convert, named, walk
from support.layouts import MASKS, Dataset, Sample, discover
from support.progress import notify, progress, size_of
from support.run import read_json, real


def at_the_start(config: Any, folder: Path, dataset: Dataset) -> list[str]:
    """What the files show before one is decoded: notes, which the screen shows, too.

    raises: ValueError as `check_content` and `check_disk`.
    """
    train, normal, abnormal, masks = dataset.counts
    check_disk(config, folder, (train, normal + abnormal, masks))
    elsewhere = trained_on(Path(config.encoder)) if config.encoder else ()
    notes = check_content(dataset, elsewhere, allow=config.allow_duplicates)
    return told(notes + check_unused(dataset))


def told(notes: list[str]) -> list[str]:
    """The notes, shown on the screen."""
    for note in notes:
        notify(note)
    return notes


def of_other(run: Path, dataset: Dataset) -> list[str]:
    """Notes on a data set that a run was not trained on, which the screen shows, too."""
    return told(check_content(dataclasses.replace(dataset, train=()), trained_on(run), allow=True))


def check_places(data: str, folder: Path) -> None:
    """raises: ValueError if the results would go among the images; data: "" for none."""
    root, out = real(data), real(folder)
    if data and root in (out, *out.parents):
        raise ValueError(f"--out {folder}: lies in --data {data}; name a folder outside it")


def check_threads(saved: Mapping[str, Any]) -> None:
    """Say so if a run goes on with another number of threads: sums are rounded otherwise."""
    before, now = str(saved.get("threads", "")), str(torch.get_num_threads())
    if before and before != now:
        notify(
            f"this run was begun with {before} threads and goes on with {now}: its numbers will "
            f"differ in the last digits (OMP_NUM_THREADS={before} keeps them)"
        )


# --- content -------------------------------------------------------------------------------------


def trained_on(run: Path) -> tuple[Path, ...]:
    """The healthy images of another run's data set, if it still is where that run had it."""
    saved = read_json(run / "config.json")
    try:
        return discover(saved["data"], seed=saved["seed"]).train if saved.get("data") else ()
    except (KeyError, TypeError, ValueError):
        return ()


def check_content(dataset: Dataset, elsewhere: Sequence[Path] = (), *, allow: bool) -> list[str]:
    """Look for the same image in places that exclude one another, by content and not by name.

    Only files of equal size are read.

    elsewhere: images that trained another run, whose encoder or detector is used.
    allow:     --allow-duplicates: what is found becomes notes.
    returns:   notes.
    raises:    ValueError naming test images that also train, images that are both normal and
               abnormal, and files that are listed twice.
    """
    places = [(path, "train") for path in dataset.train]
    places += [(s.path, "abnormal" if s.label else "normal") for s in dataset.test]
    places += [(path, "elsewhere") for path in elsewhere]
    twice: list[str] = []
    copies: list[str] = []
    both: dict[str, list[str]] = {"test images that also train": [], "images with both labels": []}
    for same in _same_content(places):
        sets, files = {place for _, place in same}, {real(path) for path, _ in same}
        text = " = ".join(str(path) for path, _ in same[:3])
        if sets & {"train", "elsewhere"} and sets & {"normal", "abnormal"}:
            both["test images that also train"].append(text)
        if {"normal", "abnormal"} <= sets:
            both["images with both labels"].append(text)
        elif len(sets) == 1 and "elsewhere" not in sets:
            (twice if len(files) < len(same) else copies).append(text)
    found = [f"{what} ({len(texts)}): {named(texts)}" for what, texts in both.items() if texts]
    if twice:
        found.append(f"files listed twice ({len(twice)}): {named(twice)}")
    if found and not allow:
        raise ValueError(f"{'; '.join(found)}. Remove them, or go on: --allow-duplicates")
    if copies:
        found.append(f"images with copies in their class ({len(copies)}): {named(copies)}")
    return found


def check_unused(dataset: Dataset) -> list[str]:
    """Notes on what lies in the data set's folder and is not used, and what cannot be read."""
    failed: list[str] = []
    mine = set(map(real, dataset.images))
    unused: dict[str, int] = {}
    for parent, _, files in walk(dataset.root, lambda e: failed.append(str(e.filename))):
        if MASKS & {part.lower() for part in parent.relative_to(dataset.root).parts}:
            continue
        images = [f for f in files if Path(f).suffix.lower() in EXTENSIONS]
        left = [f for f in images if real(parent / f) not in mine]
        if left and dataset.layout != "HyperKvasir":  # which is drawn from
            unused[str(parent.relative_to(dataset.root))] = len(left)
    notes = [f"folders that cannot be read: {named(failed)}"] if failed else []
    if unused:
        total, places = sum(unused.values()), [f"{n} in {place}/" for place, n in unused.items()]
        notes.append(f"{total} images are not used: {named(places)}")
    convert = how_to_convert(dataset.root).strip()
    return notes + [convert] * bool(convert)


def _same_content(places: Sequence[tuple[Path, str]]) -> list[list[tuple[Path, str]]]:
    """Groups of two or more files with the same bytes."""
    of_size: dict[int, list[tuple[Path, str]]] = defaultdict(list)
    for path, place in places:
        try:
            status = path.stat()
        except OSError:
            continue  # said when it is decoded
        if stat.S_ISREG(status.st_mode):
            of_size[status.st_size].append((path, place))
    alike = [entry for group in of_size.values() if len(group) > 1 for entry in group]
    of_content: dict[str, list[tuple[Path, str]]] = defaultdict(list)
    for path, place in progress(alike, len(alike), "comparing files"):
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError:
            continue
        of_content[digest].append((path, place))
    return [group for group in of_content.values() if len(group) > 1]


def check_masks(samples: Sequence[Sample], masks: np.ndarray | None, known: Any) -> list[str]:
    """masks: (N, S, S) of N samples, known (N,).

    returns: notes.   raises: ValueError unless the known masks hold both kinds of pixels.
    """
    if masks is None:
        return []
    index = [i for i, s in enumerate(samples) if s.label and known[i]]
    empty = [i for i in index if not masks[i].any()]
    full = [i for i in index if masks[i].all()]
    notes = []
    kinds = (empty, "no lesion", ": left out of pixel measures"), (full, "nothing but lesion", "")
    for which, what, then in kinds:
        if which and len(which) == len(index):
            raise ValueError(
                f"all {len(index)} masks hold {what}, the first is {samples[which[0]].mask}: "
                "a mask is 255 in the lesion and 0 elsewhere"
            )
        if which:
            files = named(samples[i].mask for i in which)
            notes.append(f"{len(which)} masks hold {what}{then}: {files}")
    return told(notes)


# --- space on the disk ---------------------------------------------------------------------------

WEIGHTS = 48e6  # bytes of a ResNet-18 with its heads, float32
IGD_WEIGHTS = 2.3e6  # bytes of IGD's decoder and critic at width 8; they grow with its square


def disk_needed(config: Any, train: int, test: int, masks: int) -> float:
    """Bytes that a run writes, at most: the cache, checkpoints, detectors, figures."""
    pixels = config.image_size**2
    needed = 3 * pixels * (train + test) + pixels * (test if masks else 0)
    encoders, detectors = 1 + config.local_igd, chosen(config.detector)
    needed += encoders * 2 * WEIGHTS + WEIGHTS  # with the optimiser's momentum; encoder.pt
    if "padim" in detectors:
        needed += WEIGHTS + pixels / 16 * (100 * 101 / 2 + 100) * 4  # Sigma_p^-1/2 of 100 channels
    if "igd" in detectors:
        models = encoders * (WEIGHTS + IGD_WEIGHTS * (config.igd_width / 8) ** 2)
        needed += 4 * models  # with Adam's two moments; the detector
    needed += 6 * WEIGHTS * len(set(detectors) - {"padim", "igd"})  # with Adam's two moments
    return needed + WEIGHTS * 2 + 20e6  # a checkpoint is written beside the old one; figures


def check_disk(config: Any, folder: Path, counts: tuple[int, int, int]) -> None:
    """raises: ValueError if the disk has no room for the run.

    counts: training images, test images, masks.
    """
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    have = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if place == folder else 0
    needed, free = disk_needed(config, *counts) - have, shutil.disk_usage(place).free
    if needed > free:
        raise ValueError(
            f"--out {folder}: the run writes up to {size_of(needed)}, but {size_of(free)} are free"
            " there; name a folder on another disk, or lower --image-size"
        )
