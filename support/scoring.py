"""Scores of new images, which need no labels: a line and a heat map for each.

Sizes: S pixels a side.
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
from support.run import write_file

Array = NDArray[Any]

MAPS_FOR_SCALE = 64  # new images whose heat maps set the colour scale if there are no test images


def score_files(
    detectors: Mapping[str, Any],
    config: Mapping[str, Any],
    results: Mapping[str, Any],
    paths: Sequence[Path],
    skip_bad: bool,
    batch: int,
) -> None:
    """Print a line for each new image and write its heat map beside it, as NAME.heatmap.png.

    detectors, config, results: of a run, as eval.load_run gives them.

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
        images, kept = data.decode(list(targets), size, Path(cache), skip_bad=skip_bad)
        files = [list(targets)[i] for i in kept]
        scored = _scored(detectors, images, batch)
        rows = {name: results[name] for name in detectors if name in results}
        scales = {name: row["map_scale"] for name, row in rows.items() if "map_scale" in row}
        first = list(islice(scored, MAPS_FOR_SCALE))
        for name, (heat_map, _) in first[0].items() if first else ():
            if heat_map is not None and name not in scales:
                scales[name] = figures.map_scale(np.stack([maps[name][0] for maps in first]))
        for file, image, of_image in zip(files, images, chain(first, scored), strict=True):
            line, captions = [str(file)], []
            for name, (_, score) in of_image.items():
                high = name in rows and score >= rows[name]["threshold"]
                verdict = ["abnormal" if high else "normal"] if name in rows else []
                line += [name, f"{score:.6g}", *verdict]
                if name in scales:
                    captions.append(", ".join([f"{name}: {score:.4g}", *verdict]))
            maps = {name: heat_map for name, (heat_map, _) in of_image.items() if name in scales}
            figure = figures.heatmap_figure(image, maps, scales, captions, title=file.name)
            write_file(targets[file], figures.png(figure, file.name))
            print("\t".join(line), flush=True)


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
