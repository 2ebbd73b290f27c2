"""The paper's protocol: evaluates runs, and scores new images.   [P:§4.3]

Everything here takes the scores and heat maps that a detector gives; fitting one is not here
(detectors.py), nor the formulas of the measures (measures.py), nor what is written (tables.py) and
drawn (figures.py) of the result.

Sizes: N images, S pixels a side.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from detectors import load as load_detector
from measures import aupro as aupro  # eval.aupro, beside the measures below
from measures import (
    auroc,
    confusion,
    dice,
    dice_threshold,
    iou,
    pixel_measures,
    youden_threshold,
)
from support import data, layouts
from support.figures import (
    choose_cases,
    image_grid,
    localisation_figure,
    map_scale,
    overlay,
    png,
    source_of,
)
from support.run import Parser, pick_device, read_json, write_file
from support.tables import measured, write_results, write_scores

Array = NDArray[Any]


@dataclass(frozen=True)
class Config:
    validation: int = 50  # images of each class that set the thresholds     [P:§4.3]
    groups: int = 5  # of abnormal images, for IoU, Dice and Pro             [P:§4.5.1]
    group_size: int = 100  # images                                          [P:§4.5.1]
    batch_size: int = 8  # images scored at a time
    device: str = "auto"  # cuda if there is one


DEFAULT = Config()
MAPS_FOR_SCALE = 64  # new images whose heat maps set a scale where no test images have
MAPS_IN_MEMORY = 2**28  # pixels, 1 GiB: above that a set's heat maps lie in a temporary file


# --- The protocol of section 4.3 ---------------------------------------------------------------


def validation_split(labels: ArrayLike, seed: int, config: Config = DEFAULT) -> Array:
    """50 normal and 50 abnormal test images, half of a class that has fewer than 100.   [P!§4.3 R8]

    labels:  (N,) 1 where abnormal.
    returns: (N,) bool, true for the images that set the thresholds.
    raises:  ValueError unless each class has two images or more.
    """
    y = np.asarray(labels).astype(bool)
    if min(y.sum(), (~y).sum()) < 2:
        raise ValueError(
            f"the test split has {int((~y).sum())} normal and {int(y.sum())} abnormal images; "
            "it needs two of each or more: some set the threshold, the others measure"
        )
    chosen, rng = np.zeros(len(y), bool), np.random.default_rng(seed)
    for members in (np.flatnonzero(~y), np.flatnonzero(y)):
        take = min(config.validation, len(members) // 2)
        chosen[rng.choice(members, take, replace=False)] = True
    return chosen


def protocol(
    scores: ArrayLike,
    labels: ArrayLike,
    maps: Array | None = None,
    masks: Array | None = None,
    known: Array | None = None,
    *,
    seed: int,
    paper_protocol: bool = False,
    config: Config = DEFAULT,
) -> dict[str, Any]:
    """All measures of one detector: thresholds on 50 + 50 images, the rest measured.   [P!§4.3 R8]

    scores:  (N,) of the test images.      labels: (N,) 1 where abnormal.
    maps:    (N, S, S) heat maps.          masks:  (N, S, S), false for normal images; or None.
    known:   (N,) false where an abnormal image's mask is unknown: left out of pixel measures.
    seed:    of the validation images and of the five groups.
    paper_protocol: measure on all test images, those that set the thresholds included.
    returns: a row of results.json: image_auroc, specificity, sensitivity, accuracy, threshold,
             images (counts), notes (sentences); with masks also what `localisation` returns.
    raises:  ValueError if a class has fewer than two images, or a score is NaN.
    """
    s, y = np.asarray(scores, np.float64), np.asarray(labels).astype(bool)
    validation = validation_split(y, seed, config)
    test = np.ones(len(y), bool) if paper_protocol else ~validation
    threshold = youden_threshold(s[validation], y[validation])
    row: dict[str, Any] = {"image_auroc": auroc(s[test], y[test])}
    row |= confusion(s[test], y[test], threshold) | {"threshold": threshold}
    if maps is not None and masks is not None:
        lesion = y & np.array([bool(m.any()) for m in masks])
        lesion &= True if known is None else np.asarray(known, bool)
        tune, rest = np.flatnonzero(lesion & validation), np.flatnonzero(lesion & test)
        if len(tune) and len(rest):
            groups, everything = abnormal_groups(rest, seed, config), test & (lesion | ~y)
            row |= localisation(maps, masks, tune, groups, np.flatnonzero(everything))
    else:
        lesion = None
    sets = {"validation_normal": validation & ~y, "validation_abnormal": validation & y}
    sets |= {"test_normal": test & ~y, "test_abnormal": test & y}
    row["images"] = {name: int(chosen.sum()) for name, chosen in sets.items()}
    row["notes"] = _notes(y, lesion, validation, test, config)
    return row


def _notes(
    y: Array, lesion: Array | None, validation: Array, test: Array, config: Config
) -> list[str]:
    """A sentence for whatever differs from 50 + 50 images and five groups of 100."""
    size, groups = config.group_size, config.groups
    few = min(validation[~y].sum(), validation[y].sum()) < config.validation
    notes = {
        f"A class has fewer than {2 * config.validation} test images: half of it, not "
        f"{config.validation}, helps to set the thresholds.": few,
        "The images that set the thresholds are measured as well.": (validation & test).any(),
    }
    if lesion is not None:
        rest, without = int((lesion & test).sum()), int((y & ~lesion).sum())
        usable = rest and (lesion & validation).any()
        notes |= {
            f"{without} abnormal images have no mask: left out of pixel measures.": without,
            "Too few masks for the pixel measures.": not usable,
            f"{rest} abnormal images with masks: one group, so no standard deviation.": (
                usable and rest <= size
            ),
            f"The {groups} groups of {size} are drawn from {rest} abnormal images and share some: "
            "their standard deviation is too small.": usable and size < rest < groups * size,
        }
    return [sentence for sentence, holds in notes.items() if holds]


def abnormal_groups(index: Array, seed: int, config: Config = DEFAULT) -> list[Array]:
    """Five groups of 100 abnormal images; only one, of all, if there are no more.   [P:§4.5.1]

    returns: arrays of indices, disjoint if there are 500 images or more.
    """
    rng = np.random.default_rng([seed, 1])
    if len(index) <= config.group_size:
        return [index]
    if len(index) < config.groups * config.group_size:
        return [rng.choice(index, config.group_size, replace=False) for _ in range(config.groups)]
    return list(
        rng.permutation(index)[: config.groups * config.group_size].reshape(config.groups, -1)
    )


def localisation(
    maps: Array,
    masks: Array,
    tune: Array,
    groups: Sequence[Array],
    everything: Array,
) -> dict[str, Any]:
    """IoU, Dice and Pro over groups as in Table 6, pixel AUROC and AUPRO over all.   [P!§4.3 R9]

    tune, groups, everything: indices of the abnormal images that set the pixel threshold, of the
             groups of abnormal images, and of all images measured, normal ones (empty masks) too.
    returns: pixel_threshold; iou, dice, pro and *_sd over groups (None for one group);
             best_possible (threshold, iou, dice: what the best threshold for the groups
             themselves would give); pixel_auroc and aupro of everything.
    """
    t, _ = dice_threshold(maps, masks, tune)
    grouped = np.concatenate(groups)  # an image of two groups counts twice, as in their mean
    best, best_dice = dice_threshold(maps, masks, grouped)
    values = np.zeros((3, len(maps)))  # IoU, Dice and the best possible IoU of each image
    for i in np.unique(grouped):
        mask = np.asarray(masks[i], bool)
        values[:, i] = iou(maps[i] >= t, mask), dice(maps[i] >= t, mask), iou(maps[i] >= best, mask)
    means = {
        "iou": [values[0, group].mean() for group in groups],
        "dice": [values[1, group].mean() for group in groups],
        "pro": [pixel_measures(maps, masks, group)[1] for group in groups],
    }
    row: dict[str, Any] = {"pixel_threshold": t}
    for name, of_groups in means.items():
        row[name] = float(np.mean(of_groups))
        row[f"{name}_sd"] = float(np.std(of_groups, ddof=1)) if len(groups) > 1 else None
    row["best_possible"] = {"threshold": t, "iou": row["iou"], "dice": row["dice"]}
    if best_dice > row["dice"]:  # t itself may lie between the levels that were tried
        best_iou = float(values[2, grouped].mean())
        row["best_possible"] = {"threshold": best, "iou": best_iou, "dice": best_dice}
    row["pixel_auroc"], row["aupro"] = pixel_measures(maps, masks, everything)
    return row


def score_set(
    detector: Any, images: Array, *, batch: int = DEFAULT.batch_size, label: str = "score"
) -> tuple[Array, Array]:
    """Scores and heat maps of a whole set, with a progress line.

    detector: score(images (B, 3, S, S) uint8) -> maps (B, S, S) float32, scores (B,).
    images:   (N, 3, S, S) uint8; a memory-map is read batch by batch.
    returns:  scores (N,) float32 and maps (N, S, S) float32, in a temporary file if large.
    raises:   ValueError if a score or heat map is NaN.
    """
    n, side = len(images), images.shape[-1]
    scores: Array = np.zeros(n, np.float32)
    maps: Array
    if n * side * side > MAPS_IN_MEMORY:
        with tempfile.TemporaryFile() as file:
            maps = np.memmap(file, np.float32, "w+", shape=(n, side, side))
    else:
        maps = np.zeros((n, side, side), np.float32)
    for k in data.progress(range(0, n, batch), -(-n // batch), label):
        part = slice(k, k + batch)
        maps[part], scores[part] = (v.cpu().numpy() for v in detector.score(np.array(images[part])))
        if np.isnan(scores[part]).any() or np.isnan(maps[part]).any():
            raise ValueError(f"{label}: the detector gives NaN in images {k} to {k + batch - 1}")
    return scores, maps


def evaluate(
    run: Path,
    dataset: layouts.Dataset,
    detectors: Mapping[str, Any],
    images: Array,
    masks: Array | None = None,
    known: Array | None = None,
    *,
    seed: int,
    paper_protocol: bool = False,
    batch: int = DEFAULT.batch_size,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Score the test images, apply the protocol, write results, scores and figures.   [P:§4.3]

    run:       folder that receives results.json, results.md, scores.csv and figures/.
    dataset:   its `test` samples belong to images, one each, in order.
    detectors: name of the row (padim, igd, untrained) -> detector; scored one after the other.
    images:    (N, 3, S, S) uint8.   masks: (N, S, S).   known: (N,) bool.
    extra:     top-level entries of results.json: config, seconds, init, rows of other detectors.
    returns:   what results.json holds. Nothing is written before all of it is computed.
    raises:    ValueError as `protocol`, before anything is scored.
    """
    if len(dataset.test) != len(images):
        raise ValueError(f"{len(images)} images for {len(dataset.test)} test samples")
    dataset.check_test()
    started = time.perf_counter()
    labels = np.array([sample.label for sample in dataset.test], bool)
    validation = validation_split(labels, seed)
    usable = ~validation & (known if masks is not None and known is not None else True)
    rows, scores, drawn = {}, {}, {}
    for name, detector in detectors.items():
        s, maps = score_set(detector, images, batch=batch, label=f"score {name}")
        row = protocol(s, labels, maps, masks, known, seed=seed, paper_protocol=paper_protocol)
        row["map_scale"] = map_scale(maps, labels)
        row["data"] = _data_key(dataset, seed, paper_protocol)
        cases = choose_cases(s, labels, usable)
        drawn[name] = localisation_figure(images, maps, masks, dataset.test, s, row, cases, name)
        rows[name], scores[name] = row, s
    results = {**rows, **(extra or {})}
    results["seconds"] = {**results.get("seconds", {}), "evaluate": time.perf_counter() - started}
    write_results(run, results)
    write_scores(run, dataset.test, scores, rows, validation)
    for name, figure in drawn.items():
        write_file(run / "figures" / f"localisation_{name}.png", png(figure))
    return results


def _data_key(dataset: layouts.Dataset, seed: int, paper_protocol: bool) -> dict[str, Any]:
    """What two rows of a results table must share to be comparable."""
    key = {"layout": dataset.layout, "root": str(dataset.root), "seed": seed}
    return key | {"paper_protocol": paper_protocol}


# --- New images, and the command line ----------------------------------------------------------


def load_run(run: Path, device: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A run folder's config, its results (empty if there are none) and its detectors by name."""
    files = [run / name for name in ("detector.pt", "detector_igd.pt") if (run / name).is_file()]
    config = read_json(run / "config.json")
    if not files or "image_size" not in config:
        raise ValueError(
            f"{run}: no finished run here (config.json and detector.pt are looked for)"
        )
    loaded = [load_detector(file, pick_device(device)) for file in files]
    return config, read_json(run / "results.json"), {type(d).__name__.lower(): d for d in loaded}


def evaluate_run(
    run: Path,
    root: Path | None,
    *,
    paper_protocol: bool,
    skip_bad: bool,
    batch: int,
    device: str,
) -> dict[str, Any]:
    """Evaluate a run again, on its own data set (root None) or another one.

    Rows that cannot be made again (untrained) stay if they are of the same data and protocol.
    """
    config, old, found = load_run(run, device)
    own = Path(config.get("data") or run / "phantom")
    if root is None and not own.exists():
        raise ValueError(f"{own}: the images of {run} are not there; --data names their place")
    root = (root or own).resolve()
    seed, size = int(config.get("seed", 0)), int(config["image_size"])
    dataset = layouts.discover(root, seed=seed)
    if not dataset.test:
        raise ValueError(f"{root}: {dataset.layout} without test images: nothing to measure")
    dataset.check_test()  # before anything is written
    dataset, images, masks, known = data.decode_test(
        dataset, size, run / "cache", skip_bad=skip_bad or bool(config.get("skip_bad"))
    )
    extra = {}
    for name, value in old.items():
        if name in measured(old) and value.get("data") != _data_key(dataset, seed, paper_protocol):
            print(f"left out: the row {name}, of other data or another protocol", file=sys.stderr)
        elif name not in found:
            extra[name] = value
    return evaluate(
        run, dataset, found, images, masks, known,
        seed=seed, paper_protocol=paper_protocol, batch=batch, extra=extra,
    )  # fmt: skip


def score_files(
    run: Path, paths: Sequence[Path], *, skip_bad: bool, batch: int, device: str
) -> None:
    """Print a line for each new image and write its heat map beside it, as NAME.heatmap.png.

    A run without test images has no thresholds: then its scores stand without a verdict, and the
    heat maps share a scale from the first MAPS_FOR_SCALE of the new images.
    raises: ValueError, before anything is written, if an image cannot be read, or a heat map would
            replace a file that is not ours.  OSError if a folder cannot be written.
    """
    config, results, found = load_run(run, device)
    targets = _heatmap_files([file for path in paths for file in _image_files(path)])
    for folder in {target.parent for target in targets.values()}:
        tempfile.TemporaryFile(dir=folder).close()  # an unwritable folder fails here
    with tempfile.TemporaryDirectory() as cache:
        size = int(config["image_size"])
        images, kept = data.decode(list(targets), size, Path(cache), skip_bad=skip_bad)
        files = [list(targets)[i] for i in kept]
        scales = {name: results[name]["map_scale"] for name in found if name in results}
        starts = range(0, len(files), batch)
        blocks = (np.array(images[k : k + batch]) for k in starts)
        scored = ((block, {name: found[name].score(block) for name in found}) for block in blocks)
        unscaled = [name for name in found if name not in scales]
        first = list(islice(scored, -(-MAPS_FOR_SCALE // batch))) if unscaled else []
        for name in unscaled:
            scales[name] = map_scale(np.concatenate([given[name][0].cpu() for _, given in first]))
        note = "Scale from dark to bright: "
        note += ", ".join(f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in scales.items())
        for k, (block, given) in zip(starts, chain(first, scored), strict=True):
            for i, file in enumerate(files[k : k + batch]):
                line, panels, heads = [str(file)], [block[i]], ["image"]
                for name, (maps, scores) in given.items():
                    score = float(scores[i])
                    verdict = []
                    if name in results:
                        high = score >= results[name]["threshold"]
                        verdict = ["abnormal" if high else "normal"]
                    line += [name, f"{score:.6g}", *verdict]
                    panels.append(overlay(block[i], maps[i].cpu().numpy(), scales[name], 256))
                    heads.append(", ".join([f"{name}: {score:.4g}", *verdict]))
                figure = image_grid([panels], columns=heads, title=file.name, note=note, side=256)
                write_file(targets[file], png(figure, file.name))
                print("\t".join(line), flush=True)


def _image_files(path: Path) -> list[Path]:
    """A file as given, or the images of a folder, without our own heat maps."""
    if not path.is_dir():
        if not path.is_file():
            raise ValueError(f"{path}: no such file or folder")
        return [path]
    inside = [
        p
        for p in sorted(path.rglob("*"))
        if p.suffix.lower() in layouts.EXTENSIONS
        and not p.name.startswith(".")
        and not source_of(p)
    ]
    if not inside:
        raise ValueError(f"{path}: no images in this folder")
    return inside


def _heatmap_files(files: Sequence[Path]) -> dict[Path, Path]:
    """The heat map's path of each image: NAME without its ending, unless two share that."""
    files = list(dict.fromkeys(files))  # a file given twice is scored once
    stems = [file.with_suffix("") for file in files]
    targets = {}
    for file, stem in zip(files, stems, strict=True):
        name = file.stem if stems.count(stem) == 1 else file.name
        targets[file] = target = file.with_name(f"{name}.heatmap.png")
        if target.exists() and source_of(target) != file.name:
            raise ValueError(f"{target}: exists and is no heat map of {file.name}; move it away")
    return targets


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for a mistake of the user's, in one line."""
    parser = Parser(prog="eval.py", description="Evaluates a run again, or scores new images.")
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a folder that pmsacl.py wrote")
    add("--data", type=Path, help="data set to evaluate on (default: the run's own)")
    add("--score", type=Path, nargs="+", metavar="PATH", help="new images, or folders of them")
    add("--paper-protocol", action="store_true", help="also measure what sets the thresholds")
    add("--skip-bad", action="store_true", help="leave unreadable files out")
    add("--batch-size", type=int, default=DEFAULT.batch_size, help="images at a time")
    add("--device", default=DEFAULT.device, help="auto, cpu or cuda")
    args = parser.parse_args(argv)
    try:
        if args.score and (args.data or args.paper_protocol):
            raise ValueError("--score goes with neither --data nor --paper-protocol")
        if args.batch_size < 1:
            raise ValueError(f"--batch-size must be 1 or more, got {args.batch_size}")
        how = {"skip_bad": args.skip_bad, "batch": args.batch_size, "device": args.device}
        if args.score:
            score_files(args.run, args.score, **how)
        else:
            evaluate_run(args.run, args.data, paper_protocol=args.paper_protocol, **how)
            print((args.run / "results.md").read_text(), end="")
    except (ValueError, OSError) as error:
        print("eval.py:", str(error).replace("\n", " "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command begins again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
