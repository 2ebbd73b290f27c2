"""figures/features.png: where images with 0, 1, ... lesions lie in f_theta's features.   [P:§4.6]

Not here: t-SNE itself (tsne.py). Sizes: A classes, N points, S pixels a side.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from encoder import Encoder, channels_last, seeded, to_unit
from pmsacl import strong_set
from support.charts import spread_out
from support.figures import write_all
from support.layouts import Dataset
from support.options import Config
from support.tsne import tsne

POINTS = 40  # of a class of views, and of the normal and the abnormal test images
LEAST = 12  # points: fewer say nothing
SIDE, SCALE = 640, 2  # pixels of the plot; it is drawn larger and reduced, for smooth edges
# Colours that differ for every kind of colour vision, each with a shape of its own.
COLOURS = ("#0b4f9e", "#e69f00", "#009e73", "#cc3377", "#56b4e9", "#8c564b", "#777777")
SHAPES = ("circle", "square", "triangle", "diamond")


def draw_features(
    encoder: Encoder,
    train: np.ndarray,
    test: np.ndarray | None,
    dataset: Dataset,
    config: Config,
    folder: Path,
) -> None:
    """Write figures/features.png, unless there are fewer than LEAST points to draw.

    encoder:     in evaluation mode.
    train, test: (N, 3, S, S) uint8; test may be None, else it is of dataset.test.
    """
    generator, device = seeded(config.seed, 12), next(encoder.parameters()).device
    x, augment = to_unit(train[spread_out(len(train), POINTS)], "cpu"), strong_set(config)
    groups = {"healthy: A_0": x}
    for n in range(1, config.classes):
        groups[f"A_{n}"] = augment(x, torch.full((len(x),), n), generator)[0]
    if test is not None:
        y = dataset.labels
        for name, members in (("test, normal", ~y), ("test, abnormal", y)):
            index = np.flatnonzero(members)
            groups[name] = to_unit(test[index[spread_out(len(index), POINTS)]], "cpu")
    sizes = [len(images) for images in groups.values()]
    if sum(sizes) < LEAST:
        return
    z = torch.cat([_features(encoder, images, device) for images in groups.values()])
    if not z.isfinite().all():
        raise FloatingPointError("the encoder's features are not finite; a lower --lr may help")
    places = tsne(z, generator, perplexity=min(30.0, len(z) / 4))
    points = {name: part.numpy() for name, part in zip(groups, places.split(sizes), strict=True)}
    title = f"t-SNE of z = f_theta(x): {dataset.root.name}, {config.method}, {config.strong}"
    write_all(folder, {"features": scatter(points, title)})


@torch.no_grad()
def _features(encoder: Encoder, x: Tensor, device: torch.device) -> Tensor:
    """f_theta of images in [0, 1]: (N, Z) on the CPU."""
    z = [encoder(channels_last(part.to(device))).float().cpu() for part in x.split(16)]
    return torch.cat(z)


def scatter(groups: dict[str, np.ndarray], title: str, means: bool = False) -> Image.Image:
    """Points of several groups with a legend; groups of test images are drawn hollow, on top.

    groups:  name -> (N, 2).   means: mark the mean of each group, larger.
    returns: an image, legible at half its size.
    """
    font, large = (ImageFont.load_default(size * SCALE) for size in (18, 20))
    everything = np.concatenate(list(groups.values()))
    low, high = everything.min(0), everything.max(0)
    unit = (SIDE - 60) * SCALE / max(float((high - low).max()), 1e-12)
    size = ((SIDE + 250) * SCALE, (SIDE + 50) * SCALE)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((20 * SCALE, 14 * SCALE), title, "black", large)
    frame = (10 * SCALE, 48 * SCALE, (SIDE + 10) * SCALE, (SIDE + 40) * SCALE)
    draw.rectangle(frame, None, "#999999", SCALE)
    middle = np.array([frame[0] + frame[2], frame[1] + frame[3]]) / 2
    large_marks = []  # on top of the others
    for k, (name, points) in enumerate(groups.items()):
        hollow = name.startswith("test")
        colour = ("black" if name == "test, normal" else "#c00000") if hollow else ""
        colour = colour or COLOURS[k % len(COLOURS)]
        shape = "circle" if hollow else SHAPES[k % len(SHAPES)]
        for at in middle + (points - (low + high) / 2) * unit:
            _mark(draw, at, shape, colour, hollow)
        if means:
            centre = middle + (points.mean(0) - (low + high) / 2) * unit
            large_marks.append((centre, shape, colour))
        y = (70 + 34 * k) * SCALE
        _mark(draw, np.array([(SIDE + 34) * SCALE, y]), shape, colour, hollow)
        draw.text(((SIDE + 52) * SCALE, y), name, "black", font, anchor="lm")
    for centre, shape, colour in large_marks:
        _mark(draw, centre, shape, colour, False, 11)
    if means:
        y = (74 + 34 * len(groups)) * SCALE
        _mark(draw, np.array([(SIDE + 34) * SCALE, y]), "circle", "#777777", False, 11)
        draw.text(((SIDE + 52) * SCALE, y), "mean of a class", "black", font, anchor="lm")
    return sheet.resize((size[0] // SCALE, size[1] // SCALE), Image.Resampling.LANCZOS)


def _mark(
    draw: ImageDraw.ImageDraw,
    at: np.ndarray,
    shape: str,
    colour: str,
    hollow: bool,
    radius: float = 5.5,
) -> None:
    """One point, some 2 radius pixels wide; a large one has a black rim."""
    x, y, r = float(at[0]), float(at[1]), radius * SCALE
    large = radius > 6
    fill, outline = (None, colour) if hollow else (colour, "black" if large else "white")
    width = 2 * SCALE if hollow or large else 1
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill, outline, width)
    else:
        corners = {
            "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
            "triangle": [(0, -1.1), (1.1, 0.9), (-1.1, 0.9)],
            "diamond": [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
        }[shape]
        draw.polygon([(x + r * a, y + r * b) for a, b in corners], fill, outline, width)
