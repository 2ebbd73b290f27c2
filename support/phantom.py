"""The phantom data set: procedural endoscopy with lesions.

A stand-in for trying the program without any data, never evidence about the method. S pixels a
side; heights are in half-widths of the image, colours in [0, 1].
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from support import data
from support.progress import progress


def draw(
    root: str | Path,
    *,
    train: int = 200,
    good: int = 150,
    abnormal: int = 150,
    size: int = 128,
    seed: int = 0,
) -> None:
    """Write procedural endoscopy-like images as an MVTec folder of PNG files with masks.

    All images look along the colon, so that they align as position-wise detectors need them to.
    The variation was set so that PaDiM on a network with random weights reaches about the AUROC
    that the paper gives for PaDiM without its pre-training, 0.943 [P:Tab.1]; on harder phantoms a
    pre-trained network falls short of it. The folder is written atomically; if the same call has
    written it before, it is left as it is.

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
        if (root / "phantom.json").is_file() and (root / "phantom.json").read_text(
            "utf-8"
        ) == settings:
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


def _noise(rng: np.random.Generator, size: int, cells: float) -> np.ndarray:
    """Smooth noise (S, S) of about unit variance, `cells` bumps a side."""
    n = max(2, round(cells)) + 3
    grid = Image.fromarray(rng.standard_normal((n, n)).astype(np.float32))
    box = (1.5, 1.5, n - 1.5, n - 1.5)
    return 1.4 * np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC, box=box))


def _colonoscopy(
    size: int, rng: np.random.Generator, *, lesions: bool
) -> tuple[np.ndarray, np.ndarray]:
    """One view down a colon: uint8 image (S, S, 3) and mask (S, S) of 0 and 255.

    A height field (haustral folds, unevenness, lesions) on a bent tube, painted as mucosa with
    vessels, is lit from the camera.
    """
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j].astype(np.float32)  # (S, S)
    frame = np.hypot(x, y)
    x, y = x + 0.06 * _noise(rng, size, 3), y + 0.06 * _noise(rng, size, 3)  # the tube bends
    angle = rng.uniform(0, 2 * np.pi)
    lumen = rng.uniform(0, 0.1) * np.array([np.cos(angle), np.sin(angle)])
    u, v = x - lumen[0], y - lumen[1]
    r = np.hypot(u, v) + 1e-3
    u, v = u / r, v / r  # outwards: the side of a slope that the camera sees
    lobes = rng.uniform(0.04, 0.1) * np.cos(3 * np.arctan2(v, u) + rng.uniform(0, 2 * np.pi))
    r *= 1 + lobes  # three taeniae make the section a triangle

    # Folds are rings in perspective, broken into crescents by noise.
    turns = rng.uniform(1.2, 2.4) * np.log(r + 0.1) + 0.12 * _noise(rng, size, 3) + rng.uniform()
    ring = (0.5 + 0.5 * np.cos(2 * np.pi * turns)) ** rng.uniform(1.5, 4)
    crest = np.clip(0.5 + 0.55 * _noise(rng, size, 2.5), 0, 1)
    height = rng.uniform(0.008, 0.02) * crest * ring * np.minimum(r, 1)
    height += 0.012 * _noise(rng, size, 5) + 0.003 * _noise(rng, size, 14)
    colour = _mucosa(rng, size)
    shadow = np.ones((size, size))
    mask = np.zeros((size, size), np.uint8)
    for _ in range(1 + (rng.random() < 0.2) if lesions else 0):
        inside, dome, rim, tissue = _lesion(rng, x, y, lumen, colour)
        mask[inside > 0.5] = 255
        height = height * (1 - 0.7 * inside) + dome
        colour += inside[..., None] * (tissue - colour)
        shadow *= 1 - rim
    edge = 1.08  # the scope's round frame
    mask[frame > edge] = 0
    image = _photograph(rng, height, colour, shadow, (u, v, r))
    image *= (1 - rng.uniform(0.1, 0.25) * frame**2)[..., None]
    image *= np.clip((edge - frame) * size / 4, 0, 1)[..., None]
    image = np.clip(image + rng.normal(0, 0.012, image.shape), 0, 1) ** rng.uniform(0.85, 1.05)
    return np.round(255 * image).astype(np.uint8), mask


def _mucosa(rng: np.random.Generator, size: int) -> np.ndarray:
    """Colour (S, S, 3): two tints blended by noise, and branching vessels.

    Vessels run where smooth noise crosses zero, coarse ones and fine ones.
    """
    tint = np.array([0.88, 0.48, 0.35]) * (1 + rng.normal(0, [0.01, 0.015, 0.02]))
    other = tint * (1 + rng.normal(0, [0.015, 0.02, 0.03]))
    blend = np.clip(0.5 + 0.4 * _noise(rng, size, 3), 0, 1)[..., None]
    colour = blend * tint + (1 - blend) * other + 0.012 * _noise(rng, size, 20)[..., None]
    depth = rng.uniform(0.05, 0.25)
    for cells, width in ((4, 0.08), (8, 0.12)):
        wave = (_noise(rng, size, cells) + 0.3 * _noise(rng, size, 3 * cells)) / width
        vessel = depth * np.clip(0.3 + 0.8 * _noise(rng, size, 3), 0, 1) * np.exp(-(wave**2))
        colour *= 1 - vessel[..., None] * [0.35, 1.0, 0.9]  # blood takes green and blue
    return colour


def _lesion(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray, lumen: np.ndarray, colour: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A raised polyp, or one time in four a flat lesion, in view and away from the lumen.

    returns: coverage (S, S) in [0, 1], height (S, S), shadow around it (S, S), colour (S, S, 3).
    """
    for _ in range(100):
        at = rng.uniform(-0.75, 0.75, 2)
        away = np.hypot(*(at - lumen))
        if away > 0.45 and np.hypot(*at) < 0.85:
            break
    size, flat = len(x), rng.random() < 0.25
    radius = np.exp(rng.uniform(np.log(0.2), np.log(0.6))) * min(1.0, 0.6 + 0.4 * away)
    turn, aspect = rng.uniform(0, np.pi), rng.uniform(1, 1.6) ** 0.5
    p = (np.cos(turn) * (x - at[0]) + np.sin(turn) * (y - at[1])) / aspect
    q = (np.cos(turn) * (y - at[1]) - np.sin(turn) * (x - at[0])) * aspect
    theta = np.arctan2(q, p)
    rho = np.hypot(p, q) / radius  # 1 on the outline
    for k in range(2, 6):
        rho *= 1 + rng.normal(0, 0.16 / k) * np.cos(k * theta + rng.uniform(0, 2 * np.pi))
    inside = np.clip((1 - rho) / rng.uniform(0.1, 0.3) + 0.5, 0, 1)
    dome = np.clip(1 - rho**2, 0, 1) ** rng.uniform(0.7, 1.2) * radius * rng.uniform(0.25, 0.6)
    dome *= (0.08 if flat else 1) * (1 + 0.06 * _noise(rng, size, rng.uniform(5, 11)))
    rim = rng.uniform(0, 0.05 if flat else 0.3) * np.exp(-(((rho - 1.08) / 0.12) ** 2))
    tints = (1.04, 0.78, 0.80), (1.03, 1.12, 1.14), (0.9, 0.8, 0.74)  # redder, paler, browner
    paint = np.array(tints[rng.integers(3)])
    strength = rng.uniform(0.9, 1.6) + (0.7 if flat else 0.4)  # of that tint over the mucosa's
    base = colour.mean(axis=(0, 1)) * 0.6 + colour * 0.4  # vessels fade under it
    pits = rng.uniform(0.02, 0.06) * _noise(rng, size, rng.uniform(22, 40))
    return inside, dome, rim, base * (1 + strength * (paint - 1)) + pits[..., None]


def _photograph(
    rng: np.random.Generator,
    height: np.ndarray,
    colour: np.ndarray,
    shadow: np.ndarray,
    tube: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> np.ndarray:
    """Light from the camera, which falls off along the tube, and highlights on wet slopes."""
    u, v, r = tube
    gy, gx = (g * (len(height) / 2) for g in np.gradient(height))
    slope = np.tanh(gx * u + gy * v + 0.4 * (gx * rng.normal() + gy * rng.normal()))
    near = 1 - np.exp(-((r / rng.uniform(0.25, 0.5)) ** 1.6))  # the lumen is dark
    light = near * (1 - 0.65 * slope) * shadow * rng.uniform(0.9, 1.1)
    image = (0.03 + light[..., None]) * colour
    wet = 0.6 * _noise(rng, len(height), 26) + 0.3 * _noise(rng, len(height), 8)
    wet = (wet - 1.5 * np.abs(slope + 0.3)) * near - rng.uniform(1.3, 1.8)
    shine = np.clip(3 * wet, 0, 1) * (near > 0.3)
    return image + 0.8 * shine[..., None] * (1 - image)
