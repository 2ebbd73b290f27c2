"""The strong augmentations that Fig. 6 compares with MedMix.  [P:§4.7.2] [P:Fig.6]

Arguments and results are those of `medmix`: images x (B, 3, S, S) and class ids n (N,) give the
outputs (N, 3, S, S) and the mask (N, 1, S, S) of what may have changed.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from medmix import add_noise, cut, lesions, medmix, paste, squares, start

# Class n of `permutation`: which of the 2 x 2 tiles comes where; 0..3 as in CSI. None is another
# one mirrored, since weak views are.
TILES = (
    (0, 1, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0),
    (2, 3, 1, 0), (3, 2, 0, 1), (1, 2, 3, 0), (2, 0, 3, 1),
)  # fmt: skip


def rotation(
    x: Tensor, n: Tensor, generator: Generator, *, classes: int | None = None
) -> tuple[Tensor, Tensor]:
    """Turned counter-clockwise by 360 n / A degrees; A is 4 unless given or n has more.

    Multiples of 90 degrees move pixels only; other angles are bilinear with mirrored corners.
    [P!§4.7.2 R32]
    """
    out, n = start(x, n, generator, classes)
    a = max(4, int(n.max()) + 1) if classes is None else classes
    for k in n.unique().tolist():
        out[n == k] = turn(out[n == k], 4 * k / a)
    return out, everywhere(out, n)


def turn(x: Tensor, quarters: float) -> Tensor:
    """x turned counter-clockwise by `quarters` of 90 degrees."""
    if quarters.is_integer():
        return torch.rot90(x, int(quarters), (2, 3))
    cos, sin = math.cos(quarters * math.pi / 2), math.sin(quarters * math.pi / 2)
    theta = torch.tensor([[cos, -sin, 0], [sin, cos, 0]], device=x.device, dtype=x.dtype)
    grid = F.affine_grid(theta.expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False).clamp_(0, 1)


def permutation(
    x: Tensor, n: Tensor, generator: Generator, *, classes: int | None = None
) -> tuple[Tensor, Tensor]:
    """The image's 2 x 2 tiles in the n-th order of TILES, as in CSI and CCD.  [P!§4.7.2 R32]

    Each class but 0 moves every tile; an odd side keeps its last row and column. A > 8
    raises ValueError.
    """
    out, n = start(x, n, generator, classes)
    a = int(n.max()) + 1 if classes is None else classes
    if a > len(TILES):
        raise ValueError(f"permutation has {len(TILES)} classes, got {a}")
    for k in n.unique().tolist():
        out[n == k] = shuffle(out[n == k], TILES[k])
    mask = everywhere(out, n)
    even = x.shape[3] // 2 * 2
    mask[:, :, even:], mask[..., even:] = False, False
    return out, mask


def shuffle(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """x with, as tile i of 2 x 2, what was tile order[i]."""
    y, h = x.clone(), x.shape[3] // 2
    for to, source in enumerate(order):
        (i, j), (k, m) = divmod(to, 2), divmod(source, 2)
        tile = x[:, :, k * h : (k + 1) * h, m * h : (m + 1) * h]
        y[:, :, i * h : (i + 1) * h, j * h : (j + 1) * h] = tile
    return y


def cutout(
    x: Tensor,
    n: Tensor,
    generator: Generator,
    *,
    classes: int | None = None,
    min_area: float = 0.005,
    max_area: float = 0.08,
) -> tuple[Tensor, Tensor]:
    """n_i boxes, sized and placed as MedMix does, filled with the image's mean. [P!§4.7.2 R32]"""
    out, n = start(x, n, generator, classes)
    mask = torch.zeros_like(out, dtype=torch.bool)
    mean = x.mean((2, 3), keepdim=True)  # (B, 3, 1, 1)
    for image, box in lesions(n, x.shape[3], generator, min_area, max_area):
        at, v, u = squares(image, box, x)
        fill = mean[image.to(x.device) % len(x)].expand(-1, -1, *v.shape[1:])
        paste(out, mask, at, fill, inside(v, u))
    return out, mask[:, :1]


def cutmix(
    x: Tensor,
    n: Tensor,
    generator: Generator,
    *,
    classes: int | None = None,
    min_area: float = 0.005,
    max_area: float = 0.08,
) -> tuple[Tensor, Tensor]:
    """n_i boxes of other images, sized and placed as MedMix does, unaltered.  [P!Fig.6 R32]"""
    out, n = start(x, n, generator, classes)
    mask = torch.zeros_like(out, dtype=torch.bool)
    for image, box in lesions(n, x.shape[3], generator, min_area, max_area):
        at, v, u = squares(image, box, x)
        paste(out, mask, at, cut(x, image, box, v, u, generator), inside(v, u))
    return out, mask[:, :1]


def inside(v: Tensor, u: Tensor) -> Tensor:
    """(K, 1, s, s): 1 inside the box, 0 outside."""
    return ((v.abs() < 1) & (u.abs() < 1))[:, None].to(v)


def gaussian_noise(
    x: Tensor, n: Tensor, generator: Generator, *, classes: int | None = None, std: float = 0.1
) -> tuple[Tensor, Tensor]:
    """x + n_i std e, clipped; e ~ N(0, 1), the same in all channels.  [P!§4.7.2 R32]"""
    out, n = start(x, n, generator, classes)
    return add_noise(out, n * std, generator), everywhere(out, n)


def everywhere(out: Tensor, n: Tensor) -> Tensor:
    """(N, 1, S, S) mask of all pixels where n > 0."""
    return (n > 0).to(out.device)[:, None, None, None].repeat(1, 1, *out.shape[2:])


STRONG = {
    "medmix": medmix,
    "rotation": rotation,
    "permutation": permutation,
    "cutout": cutout,
    "noise": gaussian_noise,
    "cutmix": cutmix,
}
PASTED = ("medmix", "cutout", "cutmix")  # those that change a part of an image, and say which
