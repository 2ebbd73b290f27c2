"""The paper's protocol: evaluates runs, and scores new images.   [P:§4.3]

Everything here takes the scores and heat maps that a detector gives. Not here: fitting one
(detectors.py, igd.py), the formulas of the measures (measures.py), and how results are written
(support/tables.py) and drawn (support/figures.py). Sizes: N images, S pixels a side.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from detectors import PaDiM
from encoder import ResNet18
from igd import IGD
from measures import auroc, confusion, dice, dice_threshold, iou, pixel_measures, youden_threshold
from support import data, figures, layouts
from support.compared import COMPARED
from support.progress import progress, say
from support.run import Parser, pick_device, read_json, read_saved, write_file
from support.tables import measured, origin, write_results, write_scores

Array = NDArray[Any]

VALIDATION = 50  # images of each class that set the thresholds              [P:§4.3]
GROUPS = 5  # of abnormal images, for IoU, Dice and Pro                      [P:§4.5.1]
GROUP_SIZE = 100  # images                                                   [P:§4.5.1]
BATCH_SIZE = 8  # images scored at a time
KINDS: dict[str, Any] = {"padim": PaDiM, "igd": IGD, **COMPARED}  # of detectors
MAPS_FOR_SCALE = 64  # new images whose heat maps set the colour scale if there are no test images
MAPS_IN_MEMORY = 2**28  # pixels, 1 GiB: heat maps of a larger set are kept in a temporary file


# --- The protocol of section 4.3 -----------------------------------------------------------------


def validation_split(labels: ArrayLike, seed: int) -> Array:
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
        size = min(VALIDATION, len(members) // 2)
        chosen[rng.choice(members, size, replace=False)] = True
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
) -> dict[str, Any]:
    """All measures of one detector: thresholds from 50 + 50 images, the rest measured. [P!§4.3 R8]

    scores:  (N,) of the test images.      labels: (N,) 1 where abnormal.
    maps:    (N, S, S) heat maps.          masks:  (N, S, S), false for normal images; or None.
    known:   (N,) false where an abnormal image's mask is unknown: left out of pixel measures.
    seed:    of the validation images and of the five groups.
    paper_protocol: measure all test images, including those that set the thresholds.
    returns: a row of results.json: image_auroc, specificity, sensitivity, accuracy, threshold,
             images (counts), notes (sentences); with masks also what `localisation` returns.
    raises:  ValueError if a class has fewer than two images, or a score is NaN.
    """
    s, y = np.asarray(scores, np.float64), np.asarray(labels).astype(bool)
    validation = validation_split(y, seed)
    test = np.ones(len(y), bool) if paper_protocol else ~validation
    threshold = youden_threshold(s[validation], y[validation])
    row: dict[str, Any] = {"image_auroc": auroc(s[test], y[test])}
    row |= confusion(s[test], y[test], threshold) | {"threshold": threshold}
    lesion = None  # (N,) abnormal images whose mask is known
    if maps is not None and masks is not None:
        lesion = y & np.array([bool(m.any()) for m in masks])
        lesion &= True if known is None else np.asarray(known, bool)
        tuning, rest = np.flatnonzero(lesion & validation), np.flatnonzero(lesion & test)
        if len(tuning) and len(rest):
            everything = np.flatnonzero(test & (lesion | ~y))
            row |= localisation(maps, masks, tuning, abnormal_groups(rest, seed), everything)
    sets = {"validation_normal": validation & ~y, "validation_abnormal": validation & y}
    sets |= {"test_normal": test & ~y, "test_abnormal": test & y}
    row["images"] = {name: int(members.sum()) for name, members in sets.items()}
    row["notes"] = _notes(y, lesion, validation, test)
    return row


def _notes(y: Array, lesion: Array | None, validation: Array, test: Array) -> list[str]:
    """A sentence for everything that differs from 50 + 50 images and five groups of 100."""
    few = min(validation[~y].sum(), validation[y].sum()) < VALIDATION
    notes = {
        f"A class has fewer than {2 * VALIDATION} test images: half of it, not {VALIDATION}, "
        "helps to set the thresholds.": few,
        "The images that set the thresholds are measured as well.": (validation & test).any(),
    }
    if lesion is not None:
        rest, without = int((lesion & test).sum()), int((y & ~lesion).sum())
        usable = rest and (lesion & validation).any()
        one_group = usable and rest <= GROUP_SIZE
        shared = usable and GROUP_SIZE < rest < GROUPS * GROUP_SIZE
        notes |= {
            f"{without} abnormal images have no mask: left out of pixel measures.": without,
            "Too few masks for the pixel measures.": not usable,
            f"{rest} abnormal images with masks: one group, so no standard deviation.": one_group,
            f"The {GROUPS} groups of {GROUP_SIZE} are drawn from {rest} abnormal images and share "
            "some: their standard deviation is too small.": shared,
        }
    return [sentence for sentence, holds in notes.items() if holds]


def abnormal_groups(index: Array, seed: int) -> list[Array]:
    """Five groups of 100 abnormal images; only one, of all, if there are no more.   [P:§4.5.1]

    returns: arrays of indices, disjoint if there are 500 images or more.
    """
    rng = np.random.default_rng([seed, 1])
    if len(index) <= GROUP_SIZE:
        return [index]
    if len(index) < GROUPS * GROUP_SIZE:
        return [rng.choice(index, GROUP_SIZE, replace=False) for _ in range(GROUPS)]
    return list(rng.permutation(index)[: GROUPS * GROUP_SIZE].reshape(GROUPS, -1))


def localisation(
    maps: Array, masks: Array, tuning: Array, groups: Sequence[Array], everything: Array
) -> dict[str, Any]:
    """IoU, Dice and Pro over groups as in Table 6, pixel AUROC and AUPRO over all.   [P!§4.3 R9]

    tuning:     indices of the abnormal images that set the pixel threshold.
    groups:     indices of abnormal images, an array for each group.
    everything: indices of all images measured, normal ones (whose masks are empty) included.
    returns:    pixel_threshold; iou, dice, pro and *_sd over groups (None for one group);
                best_possible (threshold, iou, dice: what the best threshold for the groups
                themselves would give); pixel_auroc and aupro of everything.
    """
    t, _ = dice_threshold(maps, masks, tuning)
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


# --- Evaluating a run ----------------------------------------------------------------------------


def score_set(
    detector: Any, images: Array, *, batch: int = BATCH_SIZE, label: str = "score"
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
    for k in progress(range(0, n, batch), -(-n // batch), label):
        part = slice(k, k + batch)
        maps[part], scores[part] = (v.cpu().numpy() for v in detector.score(np.array(images[part])))
        if np.isnan(scores[part]).any() or np.isnan(maps[part]).any():
            raise ValueError(f"{label}: the detector gives NaN in images {k} to {k + batch - 1}")
    return scores, maps


def evaluate(
    folder: Path,
    dataset: layouts.Dataset,
    detectors: Mapping[str, Any],
    images: Array,
    masks: Array | None = None,
    known: Array | None = None,
    *,
    seed: int,
    paper_protocol: bool = False,
    batch: int = BATCH_SIZE,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Score the test images, apply the protocol, write results, scores and figures.   [P:§4.3]

    folder:    the run's, where results.json, results.md, scores.csv and figures/ are written.
    dataset:   its test samples are those of `images`, in the same order.
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
    samples = dataset.test
    labels = np.array([sample.label for sample in samples], bool)
    validation = validation_split(labels, seed)
    usable = ~validation & (known if masks is not None and known is not None else True)
    rows, scores, drawn = {}, {}, {}
    for name, detector in detectors.items():
        s, maps = score_set(detector, images, batch=batch, label=f"score {name}")
        row = protocol(s, labels, maps, masks, known, seed=seed, paper_protocol=paper_protocol)
        row["map_scale"] = figures.map_scale(maps, labels)
        row["data"] = origin(dataset, seed, paper_protocol)
        cases = figures.choose_cases(s, labels, usable)
        drawn[name] = figures.localisation_figure(images, maps, masks, samples, s, row, cases, name)
        rows[name], scores[name] = row, s
    results = {**rows, **(extra or {})}
    results["seconds"] = {**results.get("seconds", {}), "evaluate": time.perf_counter() - started}
    write_results(folder, results)
    write_scores(folder, samples, scores, rows, validation)
    for name, figure in drawn.items():
        write_file(folder / "figures" / f"localisation_{name}.png", figures.png(figure))
    return results


def load(path: str | Path, device: str = "cpu") -> Any:
    """The detector that a file holds, by its "kind".   raises: ValueError, or OSError."""
    state = read_saved(path, "detector", device)
    if not isinstance(state, dict) or "kind" not in state:
        raise ValueError(f"{path}: not a detector file")
    if (kind := KINDS.get(state["kind"])) is None:
        raise ValueError(f"{path}: holds a detector of unknown kind {state['kind']!r}")
    return kind.of(state, ResNet18().to(device) if getattr(kind, "pretrained", False) else device)


def load_run(folder: Path, device: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A run's config, its results (empty if there are none) and its detectors by name."""
    files = sorted(folder.glob("detector*.pt"))  # detector.pt comes first
    config = read_json(folder / "config.json")
    if not files or "image_size" not in config:
        raise ValueError(f"{folder}: no finished run here; looked for config.json and detector.pt")
    detectors = {type(d).__name__.lower(): d for d in (load(f, pick_device(device)) for f in files)}
    return config, read_json(folder / "results.json"), detectors


def evaluate_run(
    folder: Path,
    root: Path | None,
    *,
    paper_protocol: bool,
    skip_bad: bool,
    batch: int,
    device: str,
) -> None:
    """Evaluate a run again, on its own data set (root None) or on another one.

    Rows of detectors that the run did not save (untrained) are kept if they are of the same data
    and protocol.
    """
    config, old, detectors = load_run(folder, device)
    path = Path(config.get("data") or folder / "phantom")
    if root is None and not path.exists():
        raise ValueError(f"{path}: the images of {folder} are not there; --data names their place")
    root = (root or path).resolve()
    seed, size = int(config.get("seed", 0)), int(config["image_size"])
    dataset = layouts.discover(root, seed=seed)
    if not dataset.test:
        raise ValueError(f"{root}: {dataset.layout} without test images: nothing to measure")
    dataset.check_test()  # before anything is written
    dataset, images, masks, known = data.decode_test(
        dataset, size, folder / "cache", skip_bad=skip_bad or bool(config.get("skip_bad"))
    )
    kept = {}
    for name, entry in old.items():
        if name in measured(old) and entry.get("data") != origin(dataset, seed, paper_protocol):
            say(f"left out: the row {name}, of other data or another protocol")
        elif name not in detectors:
            kept[name] = entry
    evaluate(
        folder, dataset, detectors, images, masks, known,
        seed=seed, paper_protocol=paper_protocol, batch=batch, extra=kept,
    )  # fmt: skip


# --- New images, and the command line ------------------------------------------------------------


def score_files(
    folder: Path, paths: Sequence[Path], *, skip_bad: bool, batch: int, device: str
) -> None:
    """Print a line for each new image and write its heat map beside it, as NAME.heatmap.png.

    A run without test images has no thresholds: its scores are printed without a verdict, and the
    heat maps share a colour scale from the first MAPS_FOR_SCALE of the new images.
    raises: ValueError, before anything is written, if an image cannot be read, or a heat map would
            replace a file that is not ours.  OSError if a folder cannot be written to.
    """
    config, results, detectors = load_run(folder, device)
    targets = figures.heatmap_files(paths)
    for parent in {target.parent for target in targets.values()}:
        tempfile.TemporaryFile(dir=parent).close()  # fails in a folder that is not writable
    with tempfile.TemporaryDirectory() as cache:
        size = int(config["image_size"])
        images, kept = data.decode(list(targets), size, Path(cache), skip_bad=skip_bad)
        files = [list(targets)[i] for i in kept]
        scored = _scored(detectors, images, batch)
        scales = {name: results[name]["map_scale"] for name in detectors if name in results}
        unscaled = [name for name in detectors if name not in scales]
        first = list(islice(scored, MAPS_FOR_SCALE)) if unscaled else []
        for name in unscaled:
            scales[name] = figures.map_scale(np.stack([of_image[name][0] for of_image in first]))
        for file, image, of_image in zip(files, images, chain(first, scored), strict=True):
            line, captions = [str(file)], []
            for name, (_, score) in of_image.items():
                high = name in results and score >= results[name]["threshold"]
                verdict = ["abnormal" if high else "normal"] if name in results else []
                line += [name, f"{score:.6g}", *verdict]
                captions.append(", ".join([f"{name}: {score:.4g}", *verdict]))
            maps = {name: heat_map for name, (heat_map, _) in of_image.items()}
            figure = figures.heatmap_figure(image, maps, scales, captions, title=file.name)
            write_file(targets[file], figures.png(figure, file.name))
            print("\t".join(line), flush=True)


def _scored(
    detectors: Mapping[str, Any], images: Array, batch: int
) -> Iterator[dict[str, tuple[Array, float]]]:
    """The heat map (S, S) and the score of each image, by the detector's name."""
    for k in range(0, len(images), batch):
        part = np.array(images[k : k + batch])
        scored = {name: detector.score(part) for name, detector in detectors.items()}
        for i in range(len(part)):
            yield {n: (maps[i].cpu().numpy(), float(s[i])) for n, (maps, s) in scored.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for a mistake of the user's, in one line."""
    parser = Parser(prog="eval.py", description="Evaluates a run again, or scores new images.")
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a folder that pmsacl.py wrote")
    add("--data", type=Path, help="data set to evaluate on (default: the run's own)")
    add("--score", type=Path, nargs="+", metavar="PATH", help="new images, or folders of them")
    add("--paper-protocol", action="store_true", help="also measure what sets the thresholds")
    add("--skip-bad", action="store_true", help="leave unreadable files out")
    add("--batch-size", type=int, default=BATCH_SIZE, help="images at a time")
    add("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args(argv)
    try:
        if args.score and (args.data or args.paper_protocol):
            raise ValueError("--score goes with neither --data nor --paper-protocol")
        if args.batch_size < 1:
            raise ValueError(f"--batch-size must be 1 or more, got {args.batch_size}")
        shared = {"skip_bad": args.skip_bad, "batch": args.batch_size, "device": args.device}
        if args.score:
            score_files(args.run, args.score, **shared)
        else:
            evaluate_run(args.run, args.data, paper_protocol=args.paper_protocol, **shared)
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
