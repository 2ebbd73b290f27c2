"""The phantom data set: procedural close views of a colon's wall, with and without lesions.

A stand-in for trying the program without any data, never evidence about the method. S pixels a
side; places, heights and depths are in half-widths of the image, colours in [0, 1].
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
from numpy import ndarray as Array
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from support import data
from support.progress import progress


def draw(
    root: str | Path,
    *,
    train: int = 800,
    good: int = 150,
    abnormal: int = 150,
    size: int = 128,
    seed: int = 0,
) -> None:
    """Write procedural endoscopy-like images as an MVTec folder of PNG files with masks.

    Nothing is aligned: the wall is seen from anywhere, with trees of vessels, folds, light that
    falls off and highlights; lesions protrude or lie flat, with their own texture, shade and rim,
    and have all sizes. Two numbers alone fixed the difficulty, before any training, at 64 px: PaDiM
    on random weights has an image AUROC of 0.88 to 0.91, the nearest neighbours on 16 x 16 pixels
    have 0.85 to 0.87. The folder is written atomically; one that the same call wrote is left as is.

    root:    folder to make: train/good, test/good, test/lesion, ground_truth/lesion.
    train, good, abnormal: numbers of images; only the abnormal ones have lesions.
    size:    pixels a side, at least 32.
    seed:    image i of a split depends on the seed, the split and i alone.
    raises:  ValueError for an impossible number, or if root holds something else.
    """
    data.check_size(size)
    if train < 1 or min(good, abnormal) < 0:
        raise ValueError(f"phantom images: train={train}, good={good}, abnormal={abnormal}")
    root = Path(root)
    counts = {"train/good": train, "test/good": good, "test/lesion": abnormal}
    settings = json.dumps(dict(train=train, good=good, abnormal=abnormal, size=size, seed=seed))
    if root.is_dir() and any(root.iterdir()):
        drawn = root / "phantom.json"
        if drawn.is_file() and drawn.read_text("utf-8") == settings:
            return
        raise ValueError(f"{root}: holds something else; give the phantom images another folder")
    part = root.with_name(f".{root.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        for split in (*counts, "ground_truth/lesion"):
            (part / split).mkdir(parents=True)
        planned = [(split, i) for split, count in counts.items() for i in range(count)]
        for split, i in progress(planned, len(planned), "drawing phantom images"):
            rng = np.random.default_rng([seed, list(counts).index(split), i])
            image, mask = _colonoscopy(size, rng, lesions=split == "test/lesion")
            Image.fromarray(image).save(part / split / f"{i:04d}.png", compress_level=3)
            if split == "test/lesion":
                Image.fromarray(mask).save(part / "ground_truth/lesion" / f"{i:04d}_mask.png")
        (part / "phantom.json").write_text(settings)
        if root.is_dir():
            root.rmdir()  # empty
        os.replace(part, root)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _noise(rng: Generator, size: int, cells: float) -> Array:
    """Smooth noise (S, S) of about unit variance, `cells` bumps a side."""
    n = max(2, round(cells)) + 3
    grid = Image.fromarray(rng.standard_normal((n, n)).astype(np.float32))
    box = (1.5, 1.5, n - 1.5, n - 1.5)
    return 1.4 * np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC, box=box))


def _colonoscopy(size: int, rng: Generator, *, lesions: bool) -> tuple[Array, Array]:
    """One close view of a colon's wall: uint8 image (S, S, 3) and mask (S, S) of 0 and 255."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j].astype(np.float32)
    height, depth = _wall(rng, x, y)
    colour = _mucosa(rng, size)
    shadow = np.ones((size, size), np.float32)
    mask = np.zeros((size, size), np.uint8)
    for _ in range(1 + (rng.random() < 0.15) if lesions else 0):
        inside, dome, rim, tissue = _lesion(rng, x, y, colour)
        mask[inside > 0.5] = 255
        height = height * (1 - 0.7 * inside) + dome
        colour += inside[..., None] * (tissue - colour)
        shadow *= 1 - rim
    image = _photograph(rng, height, depth, colour, shadow)
    image = np.clip(image + rng.normal(0, 0.012, image.shape), 0, 1) ** rng.uniform(0.9, 1.05)
    return np.round(255 * image).astype(np.uint8), mask


def _wall(rng: Generator, x: Array, y: Array) -> tuple[Array, Array]:
    """Height of the wall and its distance from the camera: it curves away, with folds across it."""
    size, angle = len(x), rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * x + np.sin(angle) * y
    depth = rng.uniform(0, 0.2) * (along + 1) + rng.uniform(0, 0.12) * along**2
    height = 0.025 * _noise(rng, size, 3) + 0.006 * _noise(rng, size, 9)
    for _ in range(rng.integers(0, 3)):  # folds
        turn, at = rng.uniform(0, np.pi), rng.uniform(-1, 1)
        across = np.cos(turn) * x + np.sin(turn) * y - at + 0.12 * _noise(rng, size, 2)
        width = rng.uniform(0.12, 0.35)
        height = height + rng.uniform(0.03, 0.1) * np.exp(-((across / width) ** 2))
        depth = depth + rng.uniform(0, 0.15) * (across > 0) * np.clip(across / width, 0, 1)
    return height, depth


def _vessels(rng: Generator, size: int) -> Array:
    """Trees of vessels (S, S) in [0, 1]: branches that wander, part and grow thin."""
    side = 2 * size  # drawn twice as large, so that their edges are soft
    sheet = Image.new("L", (side, side))
    pen = ImageDraw.Draw(sheet)
    branches = []  # place, direction, width, generation
    for _ in range(rng.integers(2, 6)):
        edge = rng.uniform(0, 2 * np.pi)
        root = side * (0.5 + 0.6 * np.array([np.cos(edge), np.sin(edge)]))
        inwards = edge + np.pi + rng.normal(0, 0.5)
        branches.append((root, inwards, rng.uniform(0.012, 0.028) * side, 0))
    dark = rng.uniform(120, 255)
    for point, angle, width, level in branches:  # it grows while it is walked
        angles = angle + rng.normal(0, 0.22, rng.integers(10, 26)).cumsum()
        steps = 0.03 * side * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        points = np.vstack([point, point + steps.cumsum(axis=0)])
        pen.line(points.ravel().tolist(), int(dark * 0.8**level), max(1, round(width)))
        for i in np.flatnonzero(rng.random(len(angles)) < 0.2):
            if level == 4 or len(branches) == 90:
                break
            turn = rng.choice([-1, 1]) * rng.uniform(0.4, 1.0)
            branches.append((points[i], angles[i] + turn, 0.65 * width, level + 1))
    blurred = sheet.filter(ImageFilter.GaussianBlur(side / 200))
    small = blurred.resize((size, size), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255


def _mucosa(rng: Generator, size: int) -> Array:
    """Colour (S, S, 3): two tints blended by noise, and trees of vessels."""
    tint = np.array([0.87, 0.52, 0.40]) * (1 + rng.normal(0, [0.03, 0.06, 0.06]))
    other = tint * (1 + rng.normal(0, [0.01, 0.025, 0.03]))
    blend = np.clip(0.5 + 0.4 * _noise(rng, size, 2.5), 0, 1)[..., None]
    grain = rng.uniform(0, 0.03) * _noise(rng, size, 20)[..., None]
    colour = blend * tint + (1 - blend) * other + grain
    vessel = rng.uniform(0.25, 0.55) * _vessels(rng, size)
    vessel *= np.clip(0.7 + 0.5 * _noise(rng, size, 3), 0, 1)
    return colour * (1 - vessel[..., None] * [0.25, 1.0, 0.9])  # blood takes green and blue


def _lesion(rng: Generator, x: Array, y: Array, colour: Array) -> tuple[Array, Array, Array, Array]:
    """A raised polyp, or one time in four a flat lesion, anywhere and of any size.

    returns: coverage (S, S) in [0, 1], height (S, S), shadow around it (S, S), colour (S, S, 3).
    """
    size, flat = len(x), rng.random() < 0.25
    at = rng.uniform(-0.85, 0.85, 2)
    radius = np.exp(rng.uniform(np.log(0.22), np.log(0.65)))
    turn, aspect = rng.uniform(0, np.pi), rng.uniform(1, 1.5) ** 0.5
    p = (np.cos(turn) * (x - at[0]) + np.sin(turn) * (y - at[1])) / aspect
    q = (np.cos(turn) * (y - at[1]) - np.sin(turn) * (x - at[0])) * aspect
    theta = np.arctan2(q, p)
    rho = np.hypot(p, q) / radius
    for k in range(2, 6):
        rho = rho * (1 + rng.normal(0, 0.16 / k) * np.cos(k * theta + rng.uniform(0, 2 * np.pi)))
    inside = np.clip((1 - rho) / rng.uniform(0.05, 0.2) + 0.5, 0, 1)
    dome = np.clip(1 - rho**2, 0, 1) ** 0.8 * radius * rng.uniform(0.28, 0.75)
    dome = dome * (0.12 if flat else 1) * (1 + 0.08 * _noise(rng, size, rng.uniform(5, 11)))
    rim = rng.uniform(0.05, 0.1 if flat else 0.3) * np.exp(-(((rho - 1.1) / 0.14) ** 2))
    tints = (1.06, 0.74, 0.78), (1.05, 1.14, 1.16), (0.92, 0.78, 0.72)
    paint, strength = np.array(tints[rng.integers(3)]), rng.uniform(0.25, 0.8)
    base = colour.mean(axis=(0, 1)) * 0.75 + colour * 0.25
    pits = rng.uniform(0.06, 0.12) * _noise(rng, size, rng.uniform(12, 26))
    return inside, dome, rim, base * (1 + strength * (paint - 1)) + pits[..., None] * [0.5, 1, 1]


def _photograph(rng: Generator, height: Array, depth: Array, colour: Array, shadow: Array) -> Array:
    """Light from next to the camera that falls off with depth, and highlights on wet slopes."""
    size = len(height)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    gy, gx = (g * (size / 2) for g in np.gradient(height))
    angle = rng.uniform(0, 2 * np.pi)
    slope = np.tanh(gx * np.cos(angle) + gy * np.sin(angle))
    facing = 1 / np.sqrt(1 + 0.5 * (gx**2 + gy**2))
    spot = rng.uniform(-0.6, 0.6, 2)
    light = facing * (1 - 0.35 * slope) * shadow
    light *= np.exp(-rng.uniform(0.8, 1.3) * np.clip(depth, 0, 2))
    light *= 1 - rng.uniform(0.05, 0.2) * ((x - spot[0]) ** 2 + (y - spot[1]) ** 2)
    image = (0.03 + rng.uniform(0.95, 1.1) * light[..., None]) * colour
    away = (x - rng.uniform(-1, 1)) ** 2 + (y - rng.uniform(-1, 1)) ** 2
    wet = 1.5 * np.exp(-away / rng.uniform(0.02, 0.2)) + 0.4 * facing - 1.2 * np.abs(slope + 0.2)
    wet += 0.7 * _noise(rng, size, 36) + 0.3 * _noise(rng, size, 9)
    shine = np.clip(3 * (wet - rng.uniform(2.4, 3.0)), 0, 1)
    return image + 0.6 * shine[..., None] * (1 - image)
