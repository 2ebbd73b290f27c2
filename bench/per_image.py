"""A view at a time with Pillow: what data loaders do, as a peer of the batched augmentations.

MedMix and SimCLR's weak augmentation with the same steps and probabilities, on PIL images. Random
numbers come from random.Random: drawing each with torch would cost more than what it is for.
"""

from __future__ import annotations

import math
import random
from itertools import pairwise

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter
from torch import Tensor

ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def jittered(image: Image.Image, strength: tuple[float, ...], draw: random.Random) -> Image.Image:
    """Brightness, contrast, saturation and hue in random order."""
    for step in draw.sample(range(4), 4):
        amount = draw.uniform(-strength[step], strength[step])
        if step < 3:
            image = ENHANCERS[step](image).enhance(1 + amount)
        else:
            hue, saturation, value = image.convert("HSV").split()
            hue = hue.point([(h + round(256 * amount)) % 256 for h in range(256)])
            image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    return image


def weak_view(image: Image.Image, draw: random.Random) -> Image.Image:
    """SimCLR's A_0: crop, flip, jitter, grey, blur."""
    side = image.width
    for _ in range(10):
        area = draw.uniform(0.08, 1) * side * side
        aspect = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= side and 0 < height <= side:
            break
    else:
        width = height = side
    left, top = draw.randint(0, side - width), draw.randint(0, side - height)
    box = (left, top, left + width, top + height)
    image = image.resize((side, side), Image.Resampling.BILINEAR, box)
    if draw.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if draw.random() < 0.8:
        image = jittered(image, (0.8, 0.8, 0.8, 0.2), draw)
    if draw.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if draw.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(draw.uniform(0.1, 2.0)))
    return image


def with_lesions(
    image: Image.Image, others: list[Image.Image], count: int, draw: random.Random
) -> Image.Image:
    """MedMix: `count` patches of other images, altered and pasted through a soft mask."""
    image, side = image.copy(), image.width
    for _ in range(count):
        area = draw.uniform(0.005, 0.08) * side * side
        aspect = math.exp(draw.uniform(math.log(1 / 3), math.log(3)))
        width = min(side, max(3, round(math.sqrt(area * aspect))))
        height = min(side, max(3, round(math.sqrt(area / aspect))))
        x, y = draw.randint(0, side - width), draw.randint(0, side - height)
        patch = draw.choice(others).crop((x, y, x + width, y + height))
        if draw.random() < 0.25:
            patch = jittered(patch, (0.6, 0.6, 0.6, 0.1), draw)
        if draw.random() < 0.25:
            noise = Image.effect_noise(patch.size, 255 * draw.uniform(0.03, 0.12))
            patch = ImageChops.add(patch, Image.merge("RGB", [noise] * 3), 1, -128)
        if draw.random() < 0.25 or draw.random() < 0.25:  # fisheye or wave, as a mesh
            bend = draw.randint(-width // 4, width // 4)
            edges = [round(k * height / min(4, height)) for k in range(min(4, height) + 1)]
            strips = [(0, top, width, bottom) for top, bottom in pairwise(edges)]
            mesh = [(s, _bent(s, bend * (-1) ** k)) for k, s in enumerate(strips)]
            patch = patch.transform(patch.size, Image.Transform.MESH, mesh, 2)
        mask = Image.new("L", patch.size)
        shape = ImageDraw.Draw(mask)
        fill = shape.ellipse if draw.random() < 0.5 else shape.rectangle
        fill((1, 1, width - 2, height - 2), 255)
        mask = mask.filter(ImageFilter.GaussianBlur(max(1, min(width, height) // 8)))
        place = draw.randint(0, side - width), draw.randint(0, side - height)
        image.paste(patch, place, mask)
    return image


def _bent(strip: tuple[int, int, int, int], bend: int) -> tuple[int, ...]:
    """Corners of what a strip is taken from: upper left, lower left, lower right, upper right."""
    left, top, right, bottom = strip
    return left + bend, top, left, bottom, right, bottom, right + bend, top


def class_views(images: np.ndarray, classes: int, seed: int) -> Tensor:
    """(N, 3, S, S) views in [0, 1] of (B, 3, S, S) uint8 images, as pmsacl.class_views has them."""
    draw = random.Random(seed)
    pictures = [Image.fromarray(image.transpose(1, 2, 0)) for image in images]
    views = []
    for count in range(classes):
        for i, picture in enumerate(pictures):
            strong = with_lesions(picture, pictures[:i] + pictures[i + 1 :], count, draw)
            pair = [torch.from_numpy(np.array(weak_view(strong, draw))) for _ in range(2)]
            views += [view.permute(2, 0, 1).float() / 255 for view in pair]
    return torch.stack(views)
