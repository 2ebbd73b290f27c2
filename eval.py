"""The paper's protocol: evaluates runs, and scores new images.   [P:§4.3]

Everything here takes the scores and heat maps that a detector gives. Not here: fitting one
(detectors.py, igd.py), the formulas of the measures (measures.py), and how results are written
(support/tables.py) and drawn (support/figures.py). Sizes: N images, S pixels a side.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray as Array
from numpy.typing import ArrayLike
from PIL.Image import Image

from detectors import PaDiM
from igd import IGD
from measures import auroc, confusion, dice, dice_threshold, iou, pixel_measures, youden_threshold
from support import cards, checks, data, figures, healthy, layouts, report
from support.claim import held, signals
from support.compared import COMPARED, chosen
from support.depth import window_of_set
from support.lesion_classifier import LesionClassifier
from support.progress import as_program, complain, notify, show
from support.readers import build_detector, folder_of_other, read_config, read_results
from support.run import Parser, given_path, pick_device, read_saved, read_text, real
from support.score_files import score_files
from support.scoring import BATCH_SIZE, score_set
from support.tables import comparable, displayed, origin, write_results, write_scores
from support.worth import add_worth

VALIDATION = 50  # images of each class that set the thresholds              [P:§4.3]
GROUPS = 5  # of abnormal images, for IoU, Dice and Pro                      [P:§4.5.1]
GROUP_SIZE = 100  # images                                                   [P:§4.5.1]
KINDS: dict[str, Any] = {"padim": PaDiM, "igd": IGD, "f_beta": LesionClassifier, **COMPARED}


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
        m, mask = maps[i], masks[i]
        values[:, i] = iou(m >= t, mask), dice(m >= t, mask), iou(m >= best, mask)
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
    baselines: Mapping[str, Array] | None = None,
    extra: Mapping[str, Any] | None = None,
    home: Path | None = None,
) -> dict[str, Any]:
    """Score the test images, apply the protocol, write results, scores and figures.   [P:§4.3]

    folder:    where results.json, results.md, scores.csv, report.html and figures/ are written.
    dataset:   its test samples are those of `images`, in the same order.
    detectors: name of the row (padim, igd, untrained) -> detector; scored one after the other.
    images:    (N, 3, S, S) uint8.   masks: (N, S, S).   known: (N,) bool.
    baselines: name -> scores (N,); the best of them becomes the row `trivial`.
    extra:     top-level entries of results.json: config, seconds, init, rows of before.
    home:      the run's folder, if it is another one.
    returns:   what results.json holds. Nothing is written before all of it is computed.
    raises:    ValueError as `protocol`, before anything is scored.
    """
    started, labels = time.perf_counter(), dataset.labels
    validation = validation_split(labels, seed)
    test, usable = paper_protocol | ~validation, ~validation & (True if known is None else known)
    shared: dict[str, Any] = dict(seed=seed, paper_protocol=paper_protocol)
    rows, scores, drawn, shown, before = {}, {}, {}, {}, extra or {}
    source = {"data": origin(dataset, **shared)}
    for name, detector in detectors.items():
        s, maps = score_set(detector, images, batch=batch, label=f"score {name}")
        rows[name], scores[name] = protocol(s, labels, maps, masks, known, **shared), s
        if maps is not None:
            rows[name] |= _of_maps(maps, labels, test)
            of_set = images, maps, masks, dataset.test, s, rows[name] | source
            drawn[f"localisation_{name}"] = _figure(of_set, usable, dataset, name)
            shown[name] = cards.gallery(*of_set, validation)
    if baselines:
        rows["trivial"], scores["trivial"] = best_baseline(baselines, labels, **shared)
    add_worth(rows, scores, labels, test, [s.kind for s in dataset.test], seed, before)
    results = {"seconds": {}, **before, **{k: row | source for k, row in rows.items()}}
    results["healthy"] = healthy.summary(detectors, scores, labels, test)
    results["seconds"]["evaluate"] = time.perf_counter() - started
    figures.write_all(folder, drawn)
    write_scores(folder, dataset.test, scores, results, validation, detectors)
    report.write_report(home or folder, dataset, results, scores, validation, shown, folder)
    write_results(folder, results)
    return results


OfSet = tuple[Array, Array, Array | None, Sequence[layouts.Sample], Array, Mapping[str, Any]]


def _figure(of_set: OfSet, usable: Array, dataset: layouts.Dataset, name: str) -> Image:
    """figures/localisation_NAME.png of some images, each class at even ranks of its scores."""
    cases = figures.choose_cases(of_set[4], dataset.labels, usable)
    return figures.localisation_figure(*of_set, cases, f"{dataset.root.name}: {displayed(name)}")


def _of_maps(maps: Array, labels: Array, test: Array) -> dict[str, Any]:
    """The colour scale of the heat maps (N, S, S), and the AUROC of their means."""
    auroc_of_means = auroc(maps.mean(axis=(1, 2))[test], labels[test])
    return {"map_scale": figures.map_scale(maps, labels), "image_auroc_mean_of_map": auroc_of_means}


def best_baseline(
    baselines: Mapping[str, Array], labels: Array, *, seed: int, paper_protocol: bool
) -> tuple[dict[str, Any], Array]:
    """The row of the baseline with the highest AUROC, with its name, and its scores.

    Chosen by the test labels, in its favour: what a detector has to beat.
    """
    shared: dict[str, Any] = dict(seed=seed, paper_protocol=paper_protocol)
    rows = {name: protocol(s, labels, **shared) for name, s in baselines.items()}
    best = max(rows, key=lambda name: rows[name]["image_auroc"])
    every = {name: row["image_auroc"] for name, row in rows.items()}
    return rows[best] | {"baseline": best, "baselines": every}, baselines[best]


def load(path: str | Path, device: str = "cpu") -> Any:
    """The detector that a file holds, by its "kind".   raises: ValueError, or OSError."""
    return build_detector(read_saved(path, "detector", device), KINDS, path, device)


def load_run(folder: Path, device: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A run's config, its results (empty if there are none) and its detectors by name.

    raises: ValueError or OSError if the run is not finished, or a file damaged or missing.
    """
    files = sorted(folder.glob("detector*.pt"))  # detector.pt comes first
    config = read_config(folder)
    if not files or not config:
        hint = "; pmsacl.py --resume finishes it" if config else ", it has no config.json"
        raise ValueError(f"{folder}: no finished run here{hint}")
    loaded = [load(path, pick_device(device)) for path in files]
    kinds = {cls: kind for kind, cls in KINDS.items()}
    detectors = {kinds[type(detector)]: detector for detector in loaded}
    wanted = chosen(config["detector"]) if "detector" in config else ()
    if missing := [name for name in wanted if name not in detectors]:
        raise ValueError(f"{folder}: lacks {', '.join(missing)}; pmsacl.py --resume finishes it")
    return config, read_results(folder), detectors


def evaluate_run(
    folder: Path,
    root: Path | None,
    *,
    paper_protocol: bool,
    skip_bad: bool,
    batch: int,
    device: str,
) -> Path:
    """Evaluate a run again, on its own data set (root None) or on another one.

    Results of another one go into RUN/eval-NAME, those of the paper's protocol, if the run's are
    not, into RUN/eval-paper-protocol. Rows of unsaved detectors (untrained) are kept.
    returns: the folder of the results.
    raises:  ValueError or OSError as `load_run`, or if a set has no test images or cannot be read.
    """
    config, old, detectors = load_run(folder, device)
    own = real(config["data"] or folder / "phantom")
    if root is None and not own.exists():
        raise ValueError(f"{own}: the images of {folder} are not there; --data names their place")
    root = real(root or own)
    seed, size = config["seed"], config["image_size"]
    another = root == own and paper_protocol > config.get("paper_protocol", False)
    skip_bad |= config.get("skip_bad", False)
    paper_protocol |= config.get("paper_protocol", False)
    dataset = layouts.discover(root, seed=seed, training=root == own)
    if not dataset.test:
        raise ValueError(f"{root}: {dataset.layout} without test images: nothing to measure")
    dataset.check_test()  # before anything is written
    notes = checks.of_other(folder, dataset) if root != own else list(old.get("data_notes", ()))
    place = folder if root == own else folder_of_other(folder, root)
    to = place / "eval-paper-protocol" if another else place
    of_run = {name: old[name] for name in ("init", "config") if name in old}
    old = old if to == folder else of_run | read_results(to)
    train = tuple(healthy.split(dataset.train, config.get("healthy_share", 0))[0])
    dataset, images, masks, known = data.decode_test(
        dataclasses.replace(dataset, train=train), size, place / "cache",
        skip_bad=skip_bad, window=window_of_set([s.path for s in dataset.test], "", config),
        left_out=notes,
    )  # fmt: skip
    kept = comparable(old, origin(dataset, seed, paper_protocol))
    kept |= {"data_notes": list(dict.fromkeys(notes))} if notes else {}
    evaluate(
        to, dataset, detectors, images, masks, known, seed=seed, paper_protocol=paper_protocol,
        batch=batch, extra=kept, home=folder,
    )  # fmt: skip
    return to


# --- The command line -----------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for a mistake of the user's, in one line."""
    parser = Parser(prog="eval.py", description="Evaluates a run again, or scores new images.")
    add = parser.add_argument
    add("run", type=given_path, metavar="RUN", help="a folder that pmsacl.py wrote")
    add("--data", type=given_path, help="data set to evaluate on (default: the run's own)")
    add("--score", type=given_path, nargs="+", metavar="PATH", help="new images, or folders")
    add("--out", type=given_path, help="new folder for what --score writes (default: RUN/scored)")
    add("--json", action="store_true", help="with --score: a JSON object for each image")
    add("--paper-protocol", action="store_true", help="also measure images that set thresholds")
    add("--skip-bad", action="store_true", help="leave unreadable files out")
    add("--batch-size", type=int, default=BATCH_SIZE, help="images scored at a time")
    add("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args(argv)
    try:
        if args.score and (args.data or args.paper_protocol):
            raise ValueError("--score goes with neither --data nor --paper-protocol")
        if not args.score and (args.out or args.json):
            raise ValueError("--out and --json go with --score alone")
        if args.batch_size < 1:
            raise ValueError(f"--batch-size must be 1 or more, got {args.batch_size}")
        shared = {"skip_bad": args.skip_bad, "batch": args.batch_size}
        if args.score:
            run = load_run(args.run, args.device)
            with signals():
                score_files(args.run, *run, args.score, args.out, as_json=args.json, **shared)
            return 0
        shared |= {"device": args.device, "paper_protocol": args.paper_protocol}
        with held(args.run):
            to = evaluate_run(args.run, args.data, **shared)
        show(read_text(to / "results.md"))
        notify(f"results, scores and figures are in {to}")
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        return complain("eval.py", error)
    except KeyboardInterrupt:
        notify("\ninterrupted" + ("" if args.score else "; run the same command to start over"))
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(as_program(main))
