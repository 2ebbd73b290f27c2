"""Figures that the main job draws before anything is measured: fake lesions, reconstructions.

N images, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from encoder import to_unit
from support.figures import image_grid, write_all
from support.options import Config
from support.paper_figures import views_figure

Array = NDArray[Any]


def draw_views(images: Array, config: Config, data_set: str, folder: Path) -> None:
    """figures/medmix.png, or the name of --strong: images under A_0 .. A_n.   [P:Fig.2]"""
    figure = views_figure(images, config, f"{data_set}, {config.method}")
    write_all(folder, {config.strong: figure})


def draw_reconstructions(
    name: str, detector: Any, images: Array, labels: Sequence[int] | None, folder: Path
) -> None:
    """figures/reconstruction_NAME.png: image, reconstruction and the size of their difference.

    images: (N, 3, S, S) uint8.   labels: (N,) of test images, of which three of each class are
    drawn; None: the first six images.
    """
    drawn, heads = np.arange(min(6, len(images))), []
    if labels is not None:
        y = np.array(labels)
        drawn = np.sort(np.r_[np.flatnonzero(y == 0)[:3], np.flatnonzero(y)[:3]])
        heads = ["abnormal" if y[i] else "normal" for i in drawn]
    x = to_unit(images[drawn], detector.device)
    with torch.no_grad():
        x_tilde = detector.reconstruct(x)
    difference = (x - x_tilde).abs().mean(dim=1).cpu().numpy()  # (6, S, S), over the colours
    white = max(float(difference.max()), 1e-6)
    cells: list[list[Array]] = [
        [(image * 255).byte().cpu().numpy() for image in images] for images in (x, x_tilde)
    ]
    cells.append([np.round(255 * d / white).astype(np.uint8) for d in difference])
    note = (
        "Difference: |image - reconstruction|, mean over the colours, from black, 0, to white, "
        f"{white:.2g} (an image goes from 0 to 1); one scale for all columns."
    )
    rows = ("image", "reconstruction", "difference")
    grid = image_grid(cells, rows=rows, columns=heads, title=name, note=note)
    write_all(folder, {f"reconstruction_{name}": grid})
