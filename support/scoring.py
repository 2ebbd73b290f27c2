"""Scores of a set of images; and of new ones, which need no labels: a line and a heat map for each.

Sizes: N images, S pixels a side.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from support import data, figures
from support.new_images import NewImages, write_score_report
from support.progress import progress
from support.run import write_file

Array = NDArray[Any]

BATCH_SIZE = 8  # images scored at a time
MAPS_IN_MEMORY = 2**28  # pixels, 1 GiB: heat maps of a larger set are kept in a temporary file
MAPS_FOR_SCALE = 64  # new images whose heat maps set the colour scale if there are no test images


def score_set(
    detector: Any, images: Array, *, batch: int = BATCH_SIZE, label: str = "score"
) -> tuple[Array, Array | None]:
    """Scores and heat maps of a whole set, with a progress line.

    detector: score(images (B, 3, S, S) uint8) -> maps (B, S, S) float32 or None, scores (B,).
    images:   (N, 3, S, S) uint8; a memory-map is read batch by batch.
    returns:  scores (N,) float32 and maps (N, S, S) float32, in a temporary file if large, or None.
    raises:   ValueError if a score or heat map is NaN.
    """
    n, side = len(images), images.shape[-1]
    scores: Array = np.zeros(n, np.float32)
    maps: Array | None = None
    for k in progress(range(0, n, batch), -(-n // batch), label):
        part = slice(k, k + batch)
        some_maps, some_scores = detector.score(np.array(images[part]))
        scores[part] = some_scores.cpu().numpy()
        if some_maps is not None:
            maps = _room_for_maps(n, side) if maps is None else maps
            maps[part] = some_maps.cpu().numpy()
        if np.isnan(scores[part]).any() or (maps is not None and np.isnan(maps[part]).any()):
            raise ValueError(f"{label}: the detector gives NaN in images {k} to {k + batch - 1}")
    return scores, maps


def _room_for_maps(n: int, side: int) -> Array:
    """(N, S, S) float32, in a temporary file if large."""
    if n * side * side <= MAPS_IN_MEMORY:
        return np.zeros((n, side, side), np.float32)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.float32, "w+", shape=(n, side, side))


def score_files(
    folder: Path,
    detectors: Mapping[str, Any],
    config: Mapping[str, Any],
    results: Mapping[str, Any],
    paths: Sequence[Path],
    skip_bad: bool,
    batch: int,
) -> None:
    """Print a line for each new image and write its heat map beside it, as NAME.heatmap.png.

    folder: of a run, whose report_scored.html is written.
    detectors, config, results: of the run, as eval.load_run gives them.

    A run without test images has no thresholds: its scores are printed without a verdict, and the
    heat maps share a colour scale from the first MAPS_FOR_SCALE of the new images.
    raises: ValueError, before anything is written, if an image cannot be read, or a heat map would
            replace a file that is not ours.  OSError if a folder cannot be written to.
    """
    targets = figures.heatmap_files(paths)
    for parent in {target.parent for target in targets.values()}:
        tempfile.TemporaryFile(dir=parent).close()  # fails in a folder that is not writable
    with tempfile.TemporaryDirectory() as cache:
        size = int(config["image_size"])
        images, kept = data.decode(
            list(targets), size, Path(cache), skip_bad=skip_bad, window=config.get("values_shown")
        )
        files = [list(targets)[i] for i in kept]
        scored = _scored(detectors, images, batch)
        rows = {name: results[name] for name in detectors if name in results}
        scales = {name: row["map_scale"] for name, row in rows.items() if "map_scale" in row}
        first = list(islice(scored, MAPS_FOR_SCALE))
        for name, (heat_map, _) in first[0].items() if first else ():
            if heat_map is not None and name not in scales:
                scales[name] = figures.map_scale(np.stack([maps[name][0] for maps in first]))
        new = NewImages(results, scales)
        for file, image, of_image in zip(files, images, chain(first, scored), strict=True):
            verdicts = new.add(file, image, of_image)
            line, captions = [str(file)], []
            for name, (_, score) in of_image.items():
                line += [name, f"{score:.6g}", *verdicts[name]]
                if name in scales:
                    captions.append(", ".join([f"{name}: {score:.4g}", *verdicts[name]]))
            maps = {name: heat_map for name, (heat_map, _) in of_image.items() if name in scales}
            figure = figures.heatmap_figure(image, maps, scales, captions, title=file.name)
            write_file(targets[file], figures.png(figure, file.name))
            print("\t".join(line), flush=True)
        write_score_report(folder, new)


def _scored(
    detectors: Mapping[str, Any], images: Array, batch: int
) -> Iterator[dict[str, tuple[Any, float]]]:
    """The heat map (S, S), or None, and the score of each image, by the detector's name."""
    for k in range(0, len(images), batch):
        part = np.array(images[k : k + batch])
        scored = {name: detector.score(part) for name, detector in detectors.items()}
        for i in range(len(part)):
            yield {
                name: (None if maps is None else maps[i].cpu().numpy(), float(scores[i]))
                for name, (maps, scores) in scored.items()
            }
