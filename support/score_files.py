"""`eval.py RUN --score`: new images, which need no labels, are read, scored and shown.

Nothing is decoded into a cache first: files are read ahead of the detectors and overlays are drawn
behind them, in threads. What is written goes into a folder of its own. B images of a batch, S
pixels a side.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray as Array
from PIL import Image

from support import data, figures
from support.cache import ahead, attempt, complaint
from support.claim import OURS
from support.depth import window_of_set
from support.folders import EXTENSIONS, named, refuse, walk
from support.healthy import Healthy
from support.layouts import MASKS
from support.new_images import REPORT, NewImages, write_score_report
from support.progress import notify, ours_alone, progress, show
from support.run import encoded, make_folder, one_word, real, write_file
from support.scoring import score_batch
from support.tables import quoted

COLUMNS = ("score", "percentile", "threshold", "verdict")  # of a detector in scores.csv
MOST_SIDE = 32_000  # pixels of an overlay: JPEG has room for twice as many
MAPS_FOR_SCALE = 64  # new images whose heat maps set the scale if nothing else does


@dataclass(frozen=True)
class Judge:
    """What there is to say of a detector's scores.

    threshold: the run's own (R8) if it had test images, else that of its healthy images, or None.
    scale:     the ends of its heat maps' colours; None until the first new images set it.
    """

    threshold: float | None
    healthy: Healthy | None
    scale: tuple[float, float] | None

    def words(self, score: float) -> dict[str, Any]:
        """Score, percentile, threshold, verdict; None where there is none."""
        percentile = None if self.healthy is None else float(self.healthy.percentile(score))
        verdict = None
        if self.threshold is not None:
            verdict = "abnormal" if score >= self.threshold else "normal"
        words = {"score": score, "percentile": percentile}
        return words | {"threshold": self.threshold, "verdict": verdict}


def judge(name: str, detector: Any, results: Mapping[str, Any]) -> Judge:
    """From the run's results, and from what is stored with the detector."""
    row, healthy = results.get(name, {}), getattr(detector, "healthy", None)
    if healthy is None:
        notify(
            f"{name}: no healthy images were held out of its training (fewer than 20 of them, or "
            "--healthy-share 0): no percentiles"
            f"{'' if 'threshold' in row else ', no verdict'}"
        )
    threshold = row.get("threshold", healthy and healthy.threshold)
    return Judge(threshold, healthy, row.get("map_scale") or (healthy and healthy.scale))


@dataclass(frozen=True)
class Scored:
    """A new image: (3, S, S) uint8, its original in grey, and score and heat map by detector."""

    file: Path
    image: Array
    grey: Image.Image
    scores: Mapping[str, tuple[float, Array | None]]


def score_files(
    folder: Path,
    config: Mapping[str, Any],
    results: Mapping[str, Any],
    detectors: Mapping[str, Any],
    paths: Sequence[Path],
    out: Path | None,
    *,
    skip_bad: bool,
    batch: int,
    as_json: bool,
) -> None:
    """Print a line for each new image; write scores.csv, overlays/ and report_scored.html.

    folder: of the run.   out: an empty or new folder; None: RUN/scored, or the next free name.
    config, results, detectors: of the run, as eval.load_run gives them.
    as_json: the line is a JSON object.
    raises: ValueError or OSError, with nothing left behind, if an image cannot be read or the
            folder cannot be written to; KeyboardInterrupt, with what was scored kept.
    """
    files, left_out = check_files(image_files(paths), skip_bad)
    window = window_of_set(files, "", config)
    judges = {name: judge(name, detector, results) for name, detector in detectors.items()}
    new = [path for path in (out, *out.parents) if not path.exists()] if out else []
    size, made = config["image_size"], place(out, folder, paths)
    try:
        with Output(made, judges, files, as_json) as to:
            read = functools.partial(_read, size=size, window=window)
            shown = progress(ahead(functools.partial(attempt, read), files), len(files), "scoring")
            readable = _readable(shown, skip_bad, left_out)
            scored = _scored(detectors, readable, min(batch, len(files)))
            lacking = any(each.scale is None for each in judges.values())
            first = list(islice(scored, MAPS_FOR_SCALE if lacking else 0))
            to.set_scales(first)
            for _ in ahead(to.draw, map(to.add, chain(first, scored))):
                pass
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and (made / "scores.csv").exists():
            _tell_left_out(left_out, made)
            notify(f"interrupted: {made} has what was scored until then")
        else:
            shutil.rmtree(new[-1] if new else made, ignore_errors=True)  # and the folders above it
            if made == out and not new:  # it was there before
                out.mkdir(exist_ok=True)
        raise
    _tell_left_out(left_out, made)
    notify(f"scores.csv, overlays and {REPORT} are in {made}")


def _tell_left_out(left_out: Sequence[str], made: Path) -> None:
    """On the screen and in left_out.txt: what --skip-bad has left out."""
    if left_out:
        write_file(made / "left_out.txt", encoded("".join(f"{line}\n" for line in left_out)))
    data.tell(left_out, f"{made / 'left_out.txt'} names all of them")


# --- which files, and where the scores go ---------------------------------------------------------


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files themselves and the images in folders, each once; not what a scoring has written.

    raises: ValueError if there is no such file, or a folder holds no images.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        inside = _inside(path) if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"{path}: no images in this folder")
        for file in inside:
            found.setdefault(os.path.abspath(file), file)
    return list(found.values())


def _inside(folder: Path) -> list[Path]:
    """Images below a folder, but not those in folders of masks and of an earlier scoring."""
    files: list[Path] = []
    masks: list[Path] = []
    for parent, folders, names in walk(folder, refuse):
        masks += [parent / f for f in folders if f.lower() in MASKS]
        folders[:] = [f for f in folders if f.lower() not in MASKS]
        if REPORT in names:  # the overlays of an earlier scoring
            folders.clear()
            continue
        files += [parent / n for n in names if Path(n).suffix.lower() in EXTENSIONS]
    if masks:
        notify(f"folders of masks are not scored: {named(masks)}; to score one, name it")
    return sorted(files)


def check_files(files: list[Path], skip_bad: bool) -> tuple[list[Path], list[str]]:
    """The files whose beginning is an image's, and a reason for each other one.

    raises: ValueError naming the others, unless skip_bad and some are left.
    """
    check = functools.partial(attempt, data.check_header)
    with ours_alone():
        looked = progress(ahead(check, files), len(files), "looking at the files")
        reasons = [text for _, text in looked]
    bad = [text for text in reasons if text]
    if bad and (not skip_bad or len(bad) == len(files)):
        raise ValueError(complaint(bad, len(files), skip_bad))
    return [file for file, text in zip(files, reasons, strict=True) if not text], bad


def place(out: Path | None, folder: Path, paths: Sequence[Path]) -> Path:
    """Make the folder that the scores go to, and only this process writes to.

    raises: ValueError if it holds something, lies among the images or cannot be made.
    """
    if out is not None:
        above = {real(path) for path in paths if path.is_dir()}
        if above & {real(out), *real(out).parents}:
            raise ValueError(f"--out {out}: lies among the images; name a folder outside them")
        if {real(folder / name) for name in OURS} & set(real(out).parents):
            raise ValueError(f"--out {out}: lies among the run's own files; name another folder")
        make_folder(out)
        if any(out.iterdir()):
            raise ValueError(f"--out {out}: is not empty; name another folder")
        return out
    number = 1
    while True:
        made = folder / ("scored" if number == 1 else f"scored-{number}")
        try:
            made.mkdir()
            return made
        except FileExistsError:
            number += 1
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(f"{made}: cannot be made ({reason}); name another, --out") from None


# --- reading, scoring -----------------------------------------------------------------------------


def _read(path: Path, *, size: int, window: data.Window | None) -> tuple[Array, Image.Image]:
    """The image as the detectors see it, and its original in grey.   raises: ValueError, OSError"""
    small, original = data.read_both(path, size, window)
    original = original.convert("L")
    original.thumbnail((MOST_SIDE, MOST_SIDE))
    return small, original


def _readable(
    read: Iterable[tuple[Path, tuple[Array, Image.Image] | str]],
    skip_bad: bool,
    left_out: list[str],
) -> Iterator[tuple[Path, Array, Image.Image]]:
    """What could be read; the other reasons go to `left_out`, or raise unless skip_bad."""
    for file, result in read:
        if isinstance(result, str):
            if not skip_bad:
                raise ValueError(complaint([result], 1, skip_bad))
            left_out.append(result)
        else:
            yield file, *result


def _scored(
    detectors: Mapping[str, Any], images: Iterator[tuple[Path, Array, Image.Image]], batch: int
) -> Iterator[Scored]:
    """Each image with its scores, which are made in batches."""
    while part := list(islice(images, batch)):
        stack, what = np.stack([image for _, image, _ in part]), f"{part[0][0]} or one after it"
        with_maps = {name: score_batch(d, stack, what) for name, d in detectors.items()}
        for i, (file, image, grey) in enumerate(part):
            scores = {
                name: (float(s[i]), None if maps is None else maps[i])
                for name, (s, maps) in with_maps.items()
            }
            yield Scored(file, image, grey, scores)


# --- writing --------------------------------------------------------------------------------------


class Output:
    """The folder of a scoring, as a context: scores.csv and the report are finished at its end.

    files: all images; an overlay is named after its image and its place below their common folder.
    """

    def __init__(
        self, folder: Path, judges: dict[str, Judge], files: Sequence[Path], as_json: bool
    ) -> None:
        self.folder, self.judges, self.as_json = folder, judges, as_json
        self.root = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
        self.partial = folder / "scores.csv.partial"
        self.table = open(self.partial, "xb")
        heads = (f"{name}_{what}" for name in judges for what in COLUMNS)
        self.table.write(encoded(",".join(["path", *heads]) + "\n"))
        self.new = NewImages(judges)

    def __enter__(self) -> Output:
        return self

    def set_scales(self, first: Sequence[Scored]) -> None:
        """Scales from the heat maps of new images, for detectors that have none."""
        for name, judge in self.judges.items():
            maps = [heat for s in first if (heat := s.scores[name][1]) is not None]
            if judge.scale is None and maps:
                scale = figures.map_scale(np.stack(maps))
                self.judges[name] = dataclasses.replace(judge, scale=scale)

    def add(self, of_image: Scored) -> Scored:
        """A line on the screen, a row, and perhaps a place in the report; the image again."""
        path = str(of_image.file)
        words = {n: self.judges[n].words(score) for n, (score, _) in of_image.scores.items()}
        cells = [_cell(words[name][what]) for name in words for what in COLUMNS]
        self.table.write(encoded(",".join([quoted(path), *cells]) + "\n"))
        if self.as_json:
            show(json.dumps({"path": path, "detectors": words}) + "\n")
        else:
            show(_line(path, words))
        self.new.add(of_image.file, of_image.image, of_image.scores, words)
        return of_image

    def draw(self, of_image: Scored) -> None:
        """Its overlays; in a thread."""
        place = os.path.relpath(os.path.abspath(of_image.file), self.root) + ".jpg"
        for name, (_, heat) in of_image.scores.items():
            if heat is not None and (scale := self.judges[name].scale):
                target = self.folder / "overlays" / name / place
                target.parent.mkdir(parents=True, exist_ok=True)
                overlay = figures.overlay_with_bar(of_image.grey, heat, scale)
                overlay.save(target, "JPEG", quality=90)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.table.close()
        if kind in (None, KeyboardInterrupt) and self.new.count:
            os.replace(self.partial, self.folder / "scores.csv")
            write_score_report(self.folder, self.new)


def _cell(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.9g}"


def _line(path: str, words: Mapping[str, Mapping[str, Any]]) -> str:
    """The path, then for each detector its name, score, percentile and verdict, with tabs."""
    cells = [one_word(path)]
    for name, of_score in words.items():
        percentile = of_score["percentile"]
        cells += [name, f"{of_score['score']:.6g}"]
        cells += ["-" if percentile is None else f"{percentile:.1f}%", of_score["verdict"] or "-"]
    return "\t".join(cells) + "\n"
