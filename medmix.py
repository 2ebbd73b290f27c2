"""A_0, the weak augmentation, and A_n, the strong ones: MedMix and its rivals.  [P:§3.1 §4.2]

Everything works on whole batches of tensors, on the device of the images: parameters are drawn per
image from an explicit `torch.Generator`, and no loop runs over images. A generator on the CPU is
the better choice with images on a GPU too: the same seed gives the same parameters, and picking
the images on which an operation fires then needs no wait for the GPU.

Not here: the views' order in a training batch and what is learned from it (pmsacl.py).

B images of S x S pixels in [0, 1]; A classes; N outputs, a multiple of B; K lesions in the batch;
M = A - 1 lesions at most in one image; s the side of the square that bounds the largest lesion.

A strong augmentation takes images x (B, 3, S, S) and class ids n (N,), and returns x' (N, 3, S, S)
and the mask (N, 1, S, S) of what it may have changed: output i is image i % B with class n_i. With
N = B every image is augmented once; with n = torch.arange(A).repeat_interleave(B) every image gets
every class, and no lesion is cut from a copy of the image that it is pasted on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


@dataclass(frozen=True)
class Weak:
    area: float = 0.08  # smallest crop, as a share of the image        [P!§4.2 R16]
    jitter: tuple[float, float, float, float] = (0.8, 0.8, 0.8, 0.2)  # brightness … hue
    jitter_p: float = 0.8  # probability of the colour jitter
    grey_p: float = 0.2  # probability of going grey
    blur_p: float = 0.5  # probability of the Gaussian blur


WEAK = {
    "simclr": Weak(),
    "ccd": Weak(area=0.2, jitter=(0.4, 0.4, 0.4, 0.1), blur_p=0.0),
}
GREY = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision has it
SIGMA = (0.1, 2.0)  # of the blur, in pixels, as SimCLR has it at any size
ASPECT = (3 / 4, 4 / 3)  # of the crop, width to height
LESION_ASPECT = (1 / 3, 3.0)  # of a lesion                              [P!§4.2 R12]
LESION_JITTER = (0.8, 0.8, 0.8, 0.2)  # SimCLR's strengths
LESION_NOISE = (0.05, 0.2)  # standard deviation of the noise, image range 1
LESION_EDGE = 0.25  # width of the soft edge, in half-widths of the lesion
MIN_SIDE = 8  # pixels, of an image
CACHE = 2**20  # values that a CPU core handles at a time without leaving its cache
PLACES = 16  # places tried for each lesion
TILES = (  # classes of `permutation`: where each of 2 x 2 tiles comes from; the first 4 as in CSI
    (0, 1, 2, 3),
    (1, 0, 3, 2),
    (2, 3, 0, 1),
    (3, 2, 1, 0),
    (1, 2, 3, 0),
    (3, 0, 1, 2),
    (2, 0, 3, 1),
    (1, 3, 0, 2),
)


# A_0: the weak augmentation ------------------------------------------------------------------


def weak(
    x: Tensor, generator: Generator, *, preset: str = "simclr", min_area: float | None = None
) -> Tensor:
    """SimCLR's augmentation: crop and resize, flip, colour jitter, grey, blur.  [P!§4.2 R16]

    The crop covers min_area to 1 of the image, with an aspect of 3/4 to 4/3; it is resized
    bilinearly. It never has more pixels than the result has, so that anti-aliasing, which is for
    shrinking, has nothing to do. The hue is turned in HSV. All as torchvision does it.

    x:        (B, 3, S, S) float in [0, 1].
    preset:   "simclr", or "ccd" for the strengths in the authors' earlier code.
    min_area: smallest crop, share of the image; None for the preset's (0.08, ccd 0.2).
    returns:  (B, 3, S, S) in [0, 1], new memory.
    raises:   ValueError for an unknown preset, a min_area outside (0, 1], images not as above.
    """
    side = _side(x)
    if preset not in WEAK:
        raise ValueError(f"preset must be one of {', '.join(WEAK)}, got {preset!r}")
    w = WEAK[preset]
    area = w.area if min_area is None else min_area
    if not 0 < area <= 1:
        raise ValueError(f"min_area must be in (0, 1], got {min_area}")
    b = len(x)
    box = crop_boxes(b, side, generator, area)  # (B, 4)
    flip = _rand(generator, b) < 0.5
    jittered = _rand(generator, b) < w.jitter_p
    factor, order = jitter_parameters(b, generator, w.jitter)  # (B, 4) each
    greyed = _rand(generator, b) < w.grey_p
    blurred = _rand(generator, b) < w.blur_p
    sigma = _uniform(generator, *SIGMA, b)

    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    step = _images_at_a_time(x)
    for first in range(0, b, step):
        part = slice(first, first + step)
        view = crop(x[part], box[part], flip[part])
        jitter(view, factor[part], order[part], jittered[part])
        _where(view, greyed[part], grey)
        _where(view, blurred[part], blur, sigma[part])
        out[part] = view
    return out.clamp_(0, 1)  # interpolation and blur may round to 1 + 2^-23


def crop_boxes(b: int, side: int, generator: Generator, min_area: float) -> Tensor:
    """(B, 4) top, left, height, width of random crops, drawn as torchvision does.

    Area and log aspect are uniform; of ten draws the first that fits counts, else the whole image.
    """
    area = _uniform(generator, min_area, 1, b, 10) * side**2
    aspect = _uniform(generator, math.log(ASPECT[0]), math.log(ASPECT[1]), b, 10).exp()
    width, height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (width >= 1) & (width <= side) & (height >= 1) & (height <= side)
    first = fits.int().argmax(1, keepdim=True)
    whole = ~fits.any(1)
    height = height.gather(1, first)[:, 0].masked_fill(whole, side)
    width = width.gather(1, first)[:, 0].masked_fill(whole, side)
    top = _integer(generator, side - height + 1)
    left = _integer(generator, side - width + 1)
    return torch.stack([top, left, height, width], 1)


def crop(x: Tensor, box: Tensor, flip: Tensor) -> Tensor:
    """x inside each box (B, 4), resized to S x S bilinearly and mirrored where `flip` (B,)."""
    side = x.shape[-1]
    top, left, height, width = box.to(x.device, x.dtype)[:, :, None].unbind(1)  # (B, 1) each
    at = (torch.arange(side, device=x.device, dtype=x.dtype) + 0.5) / side  # pixel centres
    at_x = torch.where(flip.to(x.device)[:, None], at.flip(0), at)  # (B, S)
    row = top + (at * height - 0.5).clamp(min=0).minimum(height - 1)  # (B, S)
    col = left + (at_x * width - 0.5).clamp(min=0).minimum(width - 1)
    return _sample(x, row[:, :, None], col[:, None, :])


def jitter_parameters(
    b: int, generator: Generator, strength: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """(B, 4) factors of brightness, contrast, saturation and hue, and their (B, 4) order."""
    low = torch.tensor([max(0.0, 1 - s) for s in strength[:3]] + [-strength[3]])
    high = torch.tensor([1 + s for s in strength[:3]] + [strength[3]])
    low, high = low.to(generator.device), high.to(generator.device)
    factor = low + (high - low) * _rand(generator, b, 4)
    return factor, _rand(generator, b, 4).argsort(1)


def jitter(x: Tensor, factor: Tensor, order: Tensor, chosen: Tensor) -> None:
    """Brightness, contrast, saturation and hue on the chosen (B,) images, in place.

    factor: (B, 4) as `jitter_parameters` draws them.
    order:  (B, 4); order[i, k] is what happens to image i in step k.
    """
    for k in range(order.shape[1]):
        for j, change in enumerate((brightness, contrast, saturation, hue)):
            _where(x, chosen & (order[:, k] == j), change, factor[:, j])


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """factor x, clipped to [0, 1]; factor is (B, 1, 1, 1) here and below."""
    return (x * factor).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """factor x + (1 - factor) mean of the grey image, clipped."""
    return torch.lerp(grey(x).mean((1, 2, 3), keepdim=True), x, factor).clamp_(0, 1)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """factor x + (1 - factor) grey image, clipped."""
    return torch.lerp(grey(x), x, factor).clamp_(0, 1)


def grey(x: Tensor) -> Tensor:
    """(B, 1, S, S) luma of (B, 3, S, S)."""
    y = x[:, :1] * GREY[0]
    return y.add_(x[:, 1:2], alpha=GREY[1]).add_(x[:, 2:], alpha=GREY[2])


def hue(x: Tensor, turn: Tensor) -> Tensor:
    """The hue of HSV moved by `turn` of the colour circle, value and saturation kept."""
    red, green, blue = x.split(1, 1)  # (B, 1, S, S) each
    value = x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    h = torch.where(value == green, (blue - red) + 2 * chroma, (red - green) + 4 * chroma)
    h = torch.where(value == red, green - blue, h).div_(chroma.clamp(min=1e-12))  # sixths of a turn
    h += 6 * turn
    h -= 6 * (h / 6).floor_()  # into [0, 6)
    share = torch.cat([2 - (h - 3).abs(), (h - 2).abs() - 1, (h - 4).abs() - 1], 1).clamp_(0, 1)
    return value - chroma * share  # (B, 3, S, S)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur, sigma (B, 1, 1, 1) pixels, over a tenth of the side, edges mirrored."""
    b, _, side, _ = x.shape
    r = side // 20
    tap = torch.arange(-r, r + 1, device=x.device, dtype=x.dtype)
    kernel = torch.softmax(-0.5 * (tap / sigma.view(b, 1)) ** 2, 1)  # (B, 2r+1), sums to 1
    kernel = kernel.repeat_interleave(3, 0).view(3 * b, 1, 1, 2 * r + 1)
    y = F.pad(x, (r, r, r, r), mode="reflect").view(1, 3 * b, side + 2 * r, side + 2 * r)
    y = F.conv2d(F.conv2d(y, kernel, groups=3 * b), kernel.mT, groups=3 * b)
    return y.view(b, 3, side, side)


# A_n: MedMix ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lesions:
    """K lesions; the i-th of every image, then the next of every image that has more."""

    image: Tensor  # (K,) which output each is pasted on
    rank: Tensor  # (K,) ascending: 0 for an image's first lesion
    top: Tensor  # (K,) its place there, int64 pixels
    left: Tensor  # (K,)
    height: Tensor  # (K,)
    width: Tensor  # (K,)


def medmix(
    x: Tensor,
    n: Tensor,
    generator: Generator,
    *,
    classes: int | None = None,
    min_area: float = 0.005,
    max_area: float = 0.08,
    p: float = 0.25,
    at_least_one: bool = True,
) -> tuple[Tensor, Tensor]:
    """A_n: n_i lesions cut from other images, altered, pasted.  [P:§3.1] [P!§4.2 R11] [P!§4.2 R12]

    Each lesion is a patch of a random other image of the batch, altered by colour jitter, Gaussian
    noise, fisheye and horizontal wave, each with probability p; pasted at a random place through a
    soft elliptic or rectangular mask. Its area is uniform between min_area and max_area of the
    image (an ellipse fills 79% of that). Of PLACES places the one that overlaps the image's
    earlier lesions least is taken, the largest lesion first, so that class n shows n lesions.

    x:            (B, 3, S, S) float in [0, 1], B >= 2.
    n:            (N,) int64 in 0..A-1, N a multiple of B; output i comes from image i % B.
    classes:      A; None reads it from n.
    p:            probability of each of the four alterations.
    at_least_one: if none of the four fires, one is drawn: an unaltered patch is no lesion.
    returns:      x' (N, 3, S, S) and mask (N, 1, S, S), where a lesion may have changed x.
    raises:       ValueError for shapes or ranges other than these.
    """
    out, n, classes = _start(x, n, generator, classes)
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1], got {p}")
    mask = torch.zeros_like(out[:, :1], dtype=torch.bool)
    lesions = _lesions(n, x.shape[-1], generator, classes, min_area, max_area)
    if not len(lesions.image):
        return out, mask
    square = _square(lesions, x.shape[-1], x.device)
    patch = _cut(x, lesions, square, generator)  # (K, 3, s, s)
    patch = alter(patch, lesions, square, generator, p=p, at_least_one=at_least_one)
    ellipse = _rand(generator, len(patch)) < 0.5
    _paste(out, mask, patch, opacity(square.v, square.u, ellipse), lesions, square)
    return out, mask


def alter(
    patch: Tensor,
    lesions: Lesions,
    square: Square,
    generator: Generator,
    *,
    p: float,
    at_least_one: bool,
) -> Tensor:
    """The patches (K, 3, s, s) after colour jitter, noise, fisheye and wave.  [P!§4.2 R11]"""
    k = len(patch)
    fired = _rand(generator, k, 4) < p
    forced = F.one_hot((_rand(generator, k) * 4).long(), 4).bool()
    fired = torch.where(at_least_one & ~fired.any(1, keepdim=True), forced, fired)
    factor, order = jitter_parameters(k, generator, LESION_JITTER)
    std = _uniform(generator, *LESION_NOISE, k)
    centre, radius, gamma = fisheye_points(k, generator)
    knot, shift = wave_points(k, generator)

    jitter(patch, factor, order, fired[:, 0])
    _where(patch, fired[:, 1], lambda y, std: noisy(y, std, generator), std)
    gamma = gamma.where(fired[:, 2], 1.0)  # the identity
    shift = shift.where(fired[:, 3, None], 0.0)
    which = (fired[:, 2] | fired[:, 3]).nonzero()[:, 0]
    centre, radius, gamma, knot, shift = (
        value[which].to(patch.device, patch.dtype) for value in (centre, radius, gamma, knot, shift)
    )
    which = which.to(patch.device)
    if len(which):
        v, u = square.v[which, :, None], square.u[which, None, :]  # (k, s, 1), (k, 1, s)
        u = wave(v, u, knot, shift)  # (k, s, s); the wave comes last, so that its map comes first
        v, u = fisheye(v, u, centre, radius, gamma)
        row = _pixels(v, square.v[which])
        col = _pixels(u, square.u[which])
        patch[which] = _sample(patch[which], row, col)
    return patch


def noisy(x: Tensor, std: Tensor, generator: Generator) -> Tensor:
    """x + std e, e ~ N(0, 1) for each pixel, clipped.

    The channels share e, so that grey images stay grey and colour is no clue that gives them away.
    """
    e = torch.randn(len(x), 1, *x.shape[2:], generator=generator, device=generator.device)
    return (x + std * e.to(x.device, x.dtype)).clamp_(0, 1)


def fisheye_points(k: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The three control points of each fisheye, as centre (k, 2), radius (k,) and gamma (k,).

    In units of the half-sides, from the middle of the patch. The first is the lens's centre; the
    second lies on its rim; the third, between them, is the one seen half-way to the rim.
    """
    centre = _uniform(generator, -0.4, 0.4, k, 2)
    radius = _uniform(generator, 0.7, 1.3, k)
    third = _uniform(generator, 0.1, 0.35, k)  # share of the radius; 0.5 would change nothing
    return centre, radius, third.log() / math.log(0.5)


def fisheye(
    v: Tensor, u: Tensor, centre: Tensor, radius: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor]:
    """Where each point (v, u) is taken from: r' = R (r / R)^gamma for r < R.  [P!§4.2 R11]

    gamma >= 1 magnifies; it only moves points towards the centre, so that all stay in the patch.
    """
    centre_v, centre_u = centre[:, 0, None, None], centre[:, 1, None, None]
    radius, gamma = radius[:, None, None], gamma[:, None, None]
    dv, du = v - centre_v, u - centre_u
    scale = ((dv**2 + du**2) / radius**2).clamp_(max=1).pow((gamma - 1) / 2)  # r' / r
    return centre_v + dv * scale, centre_u + du * scale


def wave_points(k: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """The three control points of each wave: heights (k, 3) and displacements (k, 3).

    One lies in each third of the patch; they push left and right by turns.
    """
    third = torch.tensor([-1.0, -1 / 3, 1 / 3], device=generator.device)
    knot = third + 2 / 3 * _uniform(generator, 0.25, 0.75, k, 3)
    sign = torch.tensor([1.0, -1.0, 1.0], device=generator.device)
    sign = torch.where(_rand(generator, k, 1) < 0.5, sign, -sign)
    return knot, sign * _uniform(generator, 0.2, 0.6, k, 3)


def wave(v: Tensor, u: Tensor, knot: Tensor, shift: Tensor) -> Tensor:
    """u' = u + f(v), f a cosine curve through the knots, 0 at both ends.  [P!§4.2 R11]

    The patch is mirrored at its sides.
    """
    k = len(knot)
    ends = torch.ones(k, 1, device=knot.device, dtype=knot.dtype)
    knot = torch.cat([-ends, knot, ends], 1)[:, :, None, None]  # (k, 5, 1, 1)
    shift = torch.cat([0 * ends, shift, 0 * ends], 1)[:, :, None, None]
    f = torch.zeros_like(v)  # (k, s, 1)
    for i in range(4):
        t = ((v - knot[:, i]) / (knot[:, i + 1] - knot[:, i])).clamp(0, 1)
        f += (shift[:, i + 1] - shift[:, i]) * (0.5 - 0.5 * torch.cos(math.pi * t))
    u = (u + f + 1).abs()  # mirrored at -1 …
    return 1 - (2 - u).abs()  # … and at 1


def opacity(v: Tensor, u: Tensor, ellipse: Tensor) -> Tensor:
    """(K, 1, s, s) from 0 at the lesion's outline to 1 within, a smooth step LESION_EDGE wide.

    v, u:    (K, s) rows and columns in units of the half-sides.
    ellipse: (K,) elliptic where true, else rectangular.
    """
    v, u = v[:, :, None].abs(), u[:, None, :].abs()
    r = torch.where(ellipse.to(v.device)[:, None, None], (v**2 + u**2).sqrt(), v.maximum(u))
    t = ((1 - r) / LESION_EDGE).clamp_(0, 1)
    return (t * t * (3 - 2 * t))[:, None]


# The other strong augmentations --------------------------------------------------------------


def rotation(
    x: Tensor, n: Tensor, generator: Generator, *, classes: int | None = None
) -> tuple[Tensor, Tensor]:
    """Turned by 360 n / A degrees, counter-clockwise.  [P:§4.7.2]

    Multiples of 90 degrees move pixels only; other angles are bilinear with mirrored corners.
    classes: A; None is 4, or what n needs if that is more.  The rest is as in `medmix`.
    """
    out, n, classes = _start(
        x, n, generator, max(4, int(n.max()) + 1) if classes is None else classes
    )

    def turn(y: Tensor) -> Tensor:
        if 4 * k % classes == 0:
            return torch.rot90(y, 4 * k // classes, (2, 3))
        cos, sin = math.cos(2 * math.pi * k / classes), math.sin(2 * math.pi * k / classes)
        theta = torch.tensor([[cos, -sin, 0], [sin, cos, 0]], device=y.device, dtype=y.dtype)
        grid = F.affine_grid(theta.expand(len(y), 2, 3), list(y.shape), align_corners=False)
        return F.grid_sample(y, grid, padding_mode="reflection", align_corners=False).clamp_(0, 1)

    for k in range(1, classes):
        _where(out, n == k, turn)
    return out, _whole(out, n)


def permutation(
    x: Tensor, n: Tensor, generator: Generator, *, classes: int | None = None
) -> tuple[Tensor, Tensor]:
    """The image's 2 x 2 tiles in the n-th order of TILES, as in CSI and CCD.  [P:§4.7.2]

    Each class moves every tile; an odd side leaves its last row and column as they are.
    The arguments are those of `medmix`; A is at most 8.
    """
    out, n, classes = _start(x, n, generator, classes)
    if classes > len(TILES):
        raise ValueError(f"permutation knows {len(TILES)} classes, got classes={classes}")
    h = x.shape[-1] // 2

    def shuffle(y: Tensor) -> Tensor:
        tile = y[:, :, : 2 * h, : 2 * h].unflatten(3, (2, h)).unflatten(2, (2, h))
        tile = tile.transpose(3, 4).flatten(2, 3)[:, :, list(TILES[k])]  # (B, 3, 4, h, h)
        y[:, :, : 2 * h, : 2 * h] = (
            tile.unflatten(2, (2, 2)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
        )
        return y

    for k in range(1, classes):
        _where(out, n == k, shuffle)
    mask = _whole(out, n)
    mask[:, :, 2 * h :] = False
    mask[:, :, :, 2 * h :] = False
    return out, mask


def cutout(
    x: Tensor,
    n: Tensor,
    generator: Generator,
    *,
    classes: int | None = None,
    min_area: float = 0.005,
    max_area: float = 0.08,
) -> tuple[Tensor, Tensor]:
    """n_i boxes, as MedMix places them, filled with the image's mean colour.  [P:§4.7.2]"""
    out, n, classes = _start(x, n, generator, classes)
    mask = torch.zeros_like(out[:, :1], dtype=torch.bool)
    lesions = _lesions(n, x.shape[-1], generator, classes, min_area, max_area)
    if len(lesions.image):
        square = _square(lesions, x.shape[-1], x.device)
        mean = x.mean((2, 3), keepdim=True)[lesions.image % len(x)]  # (K, 3, 1, 1)
        _paste(out, mask, mean, _box(square), lesions, square)
    return out, mask


def cutmix(
    x: Tensor,
    n: Tensor,
    generator: Generator,
    *,
    classes: int | None = None,
    min_area: float = 0.005,
    max_area: float = 0.08,
) -> tuple[Tensor, Tensor]:
    """n_i boxes, as MedMix places them, from other images, as they are.  [P:Fig.6]"""
    out, n, classes = _start(x, n, generator, classes)
    mask = torch.zeros_like(out[:, :1], dtype=torch.bool)
    lesions = _lesions(n, x.shape[-1], generator, classes, min_area, max_area)
    if len(lesions.image):
        square = _square(lesions, x.shape[-1], x.device)
        patch = _cut(x, lesions, square, generator)
        _paste(out, mask, patch, _box(square), lesions, square)
    return out, mask


def gaussian_noise(
    x: Tensor,
    n: Tensor,
    generator: Generator,
    *,
    classes: int | None = None,
    std: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """x + n std e, e ~ N(0, 1) for each pixel, clipped to [0, 1].  [P:§4.7.2]"""
    out, n, _ = _start(x, n, generator, classes)
    _where(out, n > 0, lambda y, std: noisy(y, std, generator), n * std)
    return out, _whole(out, n)


STRONG = {
    "medmix": medmix,
    "rotation": rotation,
    "permutation": permutation,
    "cutout": cutout,
    "noise": gaussian_noise,
    "cutmix": cutmix,
}


# Lesions: where they lie, cutting and pasting ------------------------------------------------


@dataclass(frozen=True)
class Square:
    """For each lesion a square of s x s pixels inside the image that contains it."""

    row: Tensor  # (K, s) its rows in the image
    col: Tensor  # (K, s)
    v: Tensor  # (K, s) the same rows from the lesion's middle, in units of half its height
    u: Tensor  # (K, s)


def _lesions(
    n: Tensor, side: int, generator: Generator, classes: int, min_area: float, max_area: float
) -> Lesions:
    """Sizes and places of all lesions; places so that those of one image overlap least."""
    if not 0 < min_area <= max_area <= 1:
        raise ValueError(
            f"areas must have 0 < min_area <= max_area <= 1, got {min_area}, {max_area}"
        )
    m = classes - 1
    rank = torch.arange(m, device=n.device)
    area = _uniform(generator, min_area, max_area, len(n), m) * side**2
    area = area.where(rank < n[:, None], 0.0).sort(1, descending=True).values  # largest first
    low, high = math.log(LESION_ASPECT[0]), math.log(LESION_ASPECT[1])
    aspect = _uniform(generator, low, high, len(n), m).exp()
    height = (area * aspect).sqrt().round().clamp(3, side).long()  # (N, M)
    width = (area / aspect).sqrt().round().clamp(3, side).long()
    top = _integer(generator, (side - height + 1)[..., None].expand(-1, -1, PLACES))
    left = _integer(generator, (side - width + 1)[..., None].expand(-1, -1, PLACES))
    for i in range(1, m):  # (N, PLACES, i) overlaps of the i-th lesion's places with those before
        overlap = _shared(top[:, i], height[:, i], top[:, :i, 0], height[:, :i])
        overlap = overlap * _shared(left[:, i], width[:, i], left[:, :i, 0], width[:, :i])
        best = overlap.sum(2).argmin(1, keepdim=True)
        top[:, i, :1] = top[:, i].gather(1, best)
        left[:, i, :1] = left[:, i].gather(1, best)
    rank, image = (rank[:, None] < n).nonzero().unbind(1)
    at = (image, rank)
    return Lesions(image, rank, top[..., 0][at], left[..., 0][at], height[at], width[at])


def _shared(start: Tensor, size: Tensor, other: Tensor, other_size: Tensor) -> Tensor:
    """(N, PLACES, i) pixels that [start, start + size] shares with the others, with 1 between."""
    first = start[:, :, None].maximum(other[:, None] - 1)
    last = (start + size[:, None])[:, :, None].minimum((other + other_size)[:, None] + 1)
    return (last - first).clamp(min=0)


def _square(lesions: Lesions, side: int, device: torch.device) -> Square:
    s = int(torch.maximum(lesions.height, lesions.width).max())

    def axis(start: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        first = start.clamp(max=side - s)
        at = first[:, None] + torch.arange(s, device=start.device)
        from_middle = (at - start[:, None] + 0.5) / (size[:, None] / 2) - 1
        return at.to(device), from_middle.to(device)

    row, v = axis(lesions.top, lesions.height)
    col, u = axis(lesions.left, lesions.width)
    return Square(row, col, v, u)


def _cut(x: Tensor, lesions: Lesions, square: Square, generator: Generator) -> Tensor:
    """(K, 3, s, s): for each lesion a patch of another image, with what lies around it.

    The patch lies at any place inside its image; what of the square does not is never pasted.
    """
    b, side = len(x), x.shape[-1]
    if b < 2:
        raise ValueError(
            "lesions are cut from other images of the batch: it needs 2 or more, got 1"
        )
    source = lesions.image + 1 + _integer(generator, torch.full_like(lesions.image, b - 1))
    top = _integer(generator, side - lesions.height + 1)
    left = _integer(generator, side - lesions.width + 1)
    row = square.row + (top - lesions.top)[:, None].to(x.device)
    col = square.col + (left - lesions.left)[:, None].to(x.device)
    return x[_index(source % b, row.clamp_(0, side - 1), col.clamp_(0, side - 1))]


def _paste(
    out: Tensor, mask: Tensor, patch: Tensor, opacity: Tensor, lesions: Lesions, square: Square
) -> None:
    """out + opacity (patch - out) in each square, in place; where opacity > 0 the mask is set.

    One rank after the other, since the squares of one image may overlap.
    """
    start = 0
    for count in lesions.rank.bincount().tolist():
        part = slice(start, start := start + count)
        at = _index(lesions.image[part], square.row[part], square.col[part])
        out[at] = torch.lerp(out[at], patch[part], opacity[part]).clamp_(0, 1)
        at = (at[0], torch.zeros_like(at[0]), *at[2:])
        mask[at] |= opacity[part] > 0


def _index(image: Tensor, row: Tensor, col: Tensor) -> tuple[Tensor, ...]:
    """An index of (N, 3, S, S) whose result is (K, 3, s, s)."""
    channel = torch.arange(3, device=row.device)[:, None, None]
    image = image.to(row.device)[:, None, None, None]
    return image, channel, row[:, None, :, None], col[:, None, None, :]


def _pixels(v: Tensor, axis: Tensor) -> Tensor:
    """v (k, s, s) in half-sides, kept to the lesion's pixel centres, in pixels of its square.

    axis: (k, s) v of the square's pixels.
    """
    start, step = axis[:, :1, None], axis[:, 1:2, None] - axis[:, :1, None]
    return (v.clamp(step / 2 - 1, 1 - step / 2) - start) / step


def _box(square: Square) -> Tensor:
    """(K, 1, s, s): 1 inside the lesion's rectangle, 0 outside."""
    inside = (square.v[:, :, None].abs() < 1) & (square.u[:, None, :].abs() < 1)
    return inside[:, None].to(square.v.dtype)


# Shared by all -------------------------------------------------------------------------------


def _side(x: Tensor) -> int:
    if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] != x.shape[3] or x.shape[3] < MIN_SIDE:
        raise ValueError(f"images must be (B, 3, S, S) with S >= {MIN_SIDE}, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"images must be float in [0, 1], got {x.dtype}")
    return x.shape[3]


def _start(
    x: Tensor, n: Tensor, generator: Generator, classes: int | None
) -> tuple[Tensor, Tensor, int]:
    """The images to work on (N, 3, S, S), n on the generator's device, and A."""
    _side(x)
    if n.ndim != 1 or not len(n) or not len(x) or len(n) % len(x) or n.is_floating_point():
        raise ValueError(
            f"n must be (N,) integers, N a multiple of the {len(x)} images, got "
            f"{tuple(n.shape)} {n.dtype}"
        )
    n = n.to(generator.device)
    low, high = int(n.min()), int(n.max())
    if low < 0 or (classes is not None and high >= classes):
        raise ValueError(f"n must be in 0..classes-1, got {low}..{high} with classes={classes}")
    return x.repeat(len(n) // len(x), 1, 1, 1), n, high + 1 if classes is None else classes


def _whole(out: Tensor, n: Tensor) -> Tensor:
    """(N, 1, S, S): everything where n > 0."""
    return (n > 0).to(out.device)[:, None, None, None].repeat(1, 1, *out.shape[2:])


def _where(x: Tensor, chosen: Tensor, change: Callable[..., Tensor], *parameters: Tensor) -> None:
    """x = change(x, *parameters) for the chosen (B,) images, in place; the others cost nothing."""
    which = chosen.nonzero()[:, 0]
    if len(which):
        chosen_parameters = (
            value[which].to(x.device, x.dtype)[:, None, None, None] for value in parameters
        )
        which = which.to(x.device)
        x[which] = change(x[which], *chosen_parameters)


def _sample(x: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """(B, 3, S, S) x at pixel positions row, col, which broadcast to (B, S, S); bilinear."""
    grid = torch.stack(torch.broadcast_tensors(col, row), 3)  # (B, S, S, 2)
    grid = grid.mul_(2 / (x.shape[-1] - 1)).sub_(1)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=True)


def _rand(generator: Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device)


def _uniform(generator: Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * _rand(generator, *shape)


def _integer(generator: Generator, count: Tensor) -> Tensor:
    """Whole numbers, uniform in 0..count-1, of the shape of count."""
    # in float32 rand() * count may round up to count: once in 2^24 / count draws
    return (_rand(generator, *count.shape) * count).long().minimum(count.long() - 1)


def _images_at_a_time(x: Tensor) -> int:
    """All on a GPU; on a CPU as many as stay in its cache."""
    return len(x) if x.is_cuda else max(1, CACHE // x[0].numel())
