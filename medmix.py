"""A_n, MedMix: n fake lesions on each image of a batch.  [P:§3.1] [P:§4.2]

B images of S x S pixels in [0, 1]; A classes; N outputs. Lesions are pasted rank by rank, rank 0
being each image's largest: K outputs have one of the rank, and s is their longest side in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from weak import jitter, moved, sample, side_of, uniform, whole_number

LOG_ASPECT = (-math.log(3), math.log(3))  # of a lesion's height / width  [P!§4.2 R12]
JITTER = (0.6, 0.6, 0.6, 0.1)  # brightness, contrast, saturation, hue
NOISE = (0.03, 0.12)  # standard deviation
EDGE = 0.25  # width of a lesion's soft edge, in half-sides
# The wave's five points from top to bottom: least height, its spread, direction of the push
WAVE = ((-1, -5 / 6, -1 / 6, 1 / 2, 1), (0, 1 / 3, 1 / 3, 1 / 3, 0), (0, 1, -1, 1, 0))
PLACES = 16  # tried for each lesion


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

    Each is a patch of a random other image of the batch, altered by colour jitter, Gaussian noise,
    fisheye and horizontal wave, each with probability p, and pasted at a random place through a
    soft elliptic or rectangular mask. Its box has an area uniform between min_area and max_area of
    the image; its sides are rounded, and kept between 3 and S pixels. Of PLACES places the one that
    overlaps the image's earlier lesions least is taken.

    x:            (B, 3, S, S) float32 or float64 in [0, 1], B >= 2 unless all of n are 0.
    n:            (N,) integers in 0..A-1, N a multiple of B; output i comes from image i % B.
    classes:      A; None reads it from n.
    p:            probability of each of the four alterations.
    at_least_one: if none of the four fires, one is drawn: an unaltered patch is not a lesion.
    returns:      x' (N, 3, S, S) and mask (N, 1, S, S) bool, where a lesion may have changed x.
    raises:       ValueError for other shapes or numbers of lesions; pixels are not checked.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1], got {p}")
    out, n = start(x, n, generator, classes)
    mask = torch.zeros_like(out, dtype=torch.bool)
    for image, box in lesions(n, x.shape[3], generator, min_area, max_area):
        k = len(image)
        at, v, u = squares(image, box, x)
        share = opacity(v, u, uniform(generator, 0, 1, k) < 0.5)  # (K, 1, s, s)
        inside = ((v.abs() < 1) & (u.abs() < 1))[:, None]
        on = alterations(k, generator, p, at_least_one)  # (K, 4)
        jittered, noisy, bulged, waved = (moved(f.nonzero()[:, 0], x) for f in on.unbind(1))
        u[waved] = wave(v[waved], u[waved], generator)
        v[bulged], u[bulged] = fisheye(v[bulged], u[bulged], generator)
        patch = cut(x, image, box, v, u, generator)  # (K, 3, s, s)
        patch[jittered] = jitter(patch[jittered], JITTER, generator, inside[jittered])
        patch[noisy] = add_noise(patch[noisy], uniform(generator, *NOISE, k)[on[:, 1]], generator)
        paste(out, mask, at, patch, share)
    return out, mask[:, :1]


def lesions(
    n: Tensor, side: int, generator: Generator, min_area: float, max_area: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each rank, the outputs (K,) that show such a lesion, and its boxes (K, 4).  [P!§4.2 R12]

    Boxes: top, left, height, width in pixels; rank 0: an image's largest. ValueError for bad areas.
    """
    if not 0 < min_area <= max_area <= 1:
        raise ValueError(f"needs 0 < min_area <= max_area <= 1, got {min_area} and {max_area}")
    shows = torch.arange(int(n.max()), device=n.device) < n[:, None]  # (N, ranks)
    area = uniform(generator, min_area, max_area, *shows.shape) * side**2
    area = (area * shows).sort(1, descending=True).values
    aspect = uniform(generator, *LOG_ASPECT, *shows.shape).exp()
    sizes = torch.stack([area * aspect, area / aspect], 2).sqrt().round().clamp(3, side).long()
    boxes: list[Tensor] = []  # (N, 4) each
    for rank, size in enumerate(sizes.unbind(1)):  # (N, 2)
        place = whole_number(generator, (side - size + 1)[:, None].expand(-1, PLACES, -1))
        overlap = torch.zeros_like(place[..., 0])  # (N, PLACES) pixels
        for box in boxes:  # one more pixel is kept free around each
            first = place.maximum(box[:, None, :2] - 1)
            last = (place + size[:, None]).minimum((box[:, :2] + box[:, 2:])[:, None] + 1)
            overlap += (last - first).clamp(min=0).prod(2)
        best = place[torch.arange(len(n), device=n.device), overlap.argmin(1)]  # (N, 2)
        boxes.append(torch.cat([best, size], 1))
        image = shows[:, rank].nonzero()[:, 0]
        yield image, boxes[rank][image]


def squares(image: Tensor, box: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A square around each box: `at` (K, 3, s, s), its pixels' indices in the flattened outputs;
    and v, u (K, s, s), half-heights and half-widths from the middle of the box.
    """
    side, s = x.shape[3], int(box[:, 2:].max())
    first = box[:, :2].clamp(max=side - s)  # the square lies inside the image
    row, col = (moved(first, x)[:, :, None] + torch.arange(s, device=x.device)).unbind(1)  # (K, s)
    plane = moved(3 * image[:, None] + torch.arange(3, device=image.device), x)  # (K, 3)
    at = ((plane[:, :, None] * side + row[:, None]) * side)[..., None] + col[:, None, None]
    top, left, height, width = moved(box.float(), x)[:, :, None].unbind(1)  # (K, 1) each
    v, u = (row - top + 0.5) * (2 / height) - 1, (col - left + 0.5) * (2 / width) - 1  # (K, s)
    v, u = torch.broadcast_tensors(v[:, :, None], u[:, None, :])
    return at, v.clone(), u.clone()


def opacity(v: Tensor, u: Tensor, ellipse: Tensor) -> Tensor:
    """(K, 1, s, s): from 0 on the lesion's outline (ellipse or rectangle) smoothly to 1 inside."""
    r = torch.where(moved(ellipse, v)[:, None, None], v.hypot(u), v.abs().maximum(u.abs()))
    t = ((1 - r) / EDGE).clamp_(0, 1)
    return (t * t * (3 - 2 * t))[:, None]


def alterations(k: int, generator: Generator, p: float, at_least_one: bool) -> Tensor:
    """(K, 4), which of jitter, noise, fisheye and wave alter each lesion.  [P!§4.2 R11]"""
    fired = uniform(generator, 0, 1, k, 4) < p
    if at_least_one:
        one = (4 * uniform(generator, 0, 1, k, 1)).long() == torch.arange(4, device=fired.device)
        fired |= one & ~fired.any(1, keepdim=True)
    return fired


def wave(v: Tensor, u: Tensor, generator: Generator) -> Tensor:
    """u' = u + f(v), f a cosine curve through three random points, 0 at both ends.  [P!§4.2 R11]

    One point lies in each third of the patch's height; they push left and right alternately. The
    patch is mirrored at its sides. v, u: (K, s, s) in half-sides from the middle of the patch.
    """
    low, spread, sign = torch.tensor(WAVE, device=generator.device)
    height = moved(low + spread * uniform(generator, 0, 1, len(v), 5), v)  # (K, 5)
    sign = torch.where(uniform(generator, 0, 1, len(v), 1) < 0.5, sign, -sign)
    step = moved(sign * uniform(generator, 0.2, 0.6, len(v), 5), v).diff()  # (K, 4)
    t = (v[:, :, :1] - height[:, None, :-1]) / height.diff()[:, None]  # (K, s, 4)
    f = (step[:, None] * (0.5 - 0.5 * torch.cos(math.pi * t.clamp(0, 1)))).sum(2, keepdim=True)
    return 1 - (2 - (u + f + 1).abs()).abs()  # mirrored at -1 and at 1


def fisheye(v: Tensor, u: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Where each point (v, u) is taken from: r' = R (r / R)^gamma for r < R.  [P!§4.2 R11]

    Of its three random points the first is the lens's centre, the second lies on its rim, and the
    third between the two: it is seen half-way to the rim. Points only move inwards. v, u: as above.
    """
    centre_v, centre_u = moved(uniform(generator, -0.4, 0.4, 2, len(v), 1, 1), v)
    radius = moved(uniform(generator, 0.7, 1.3, len(v), 1, 1), v)
    third = moved(uniform(generator, 0.1, 0.35, len(v), 1, 1), v)  # of the radius; 0.5: no change
    dv, du = v - centre_v, u - centre_u
    gamma = third.log() / math.log(0.5)
    scale = ((dv**2 + du**2) / radius**2).clamp_(max=1).pow_((gamma - 1) / 2)  # r' / r
    return centre_v + dv * scale, centre_u + du * scale


def cut(
    x: Tensor, image: Tensor, box: Tensor, v: Tensor, u: Tensor, generator: Generator
) -> Tensor:
    """(K, 3, s, s): a random other image at (v, u), half-sides from the middle of a random box."""
    if len(x) < 2:
        raise ValueError("lesions are cut from other images: the batch needs at least 2, got 1")
    away = 1 + whole_number(generator, torch.full_like(image, len(x) - 1))
    box = torch.cat([whole_number(generator, x.shape[3] - box[:, 2:] + 1), box[:, 2:]], 1).float()
    top, left, height, width = moved(box, x)[..., None, None].unbind(1)  # (K, 1, 1) each
    row, col = top + (v + 1) * height / 2 - 0.5, left + (u + 1) * width / 2 - 0.5
    return sample(x.index_select(0, moved((image + away) % len(x), x)), row, col)


def add_noise(x: Tensor, std: Tensor, generator: Generator) -> Tensor:
    """x + std e, clipped; std (B,), e ~ N(0, 1) the same in all channels: grey images stay grey."""
    if x.device != generator.device:  # so many numbers are drawn where they are used
        generator = Generator(x.device).manual_seed(int(uniform(generator, 0, 2**62)))
    e = torch.randn(len(x), 1, *x.shape[2:], generator=generator, device=x.device)
    return (x + (moved(std, x)[:, None, None, None] * e).to(x)).clamp_(0, 1)


def paste(out: Tensor, mask: Tensor, at: Tensor, patch: Tensor, share: Tensor) -> None:
    """out + share (patch - out) at `at` (K, 3, s, s), and mask[:, 0] where share > 0."""
    out, mask = out.view(-1), mask.view(-1)  # deterministic GPUs garble views that overlap
    at, first = at.flatten(), at[:, :1].flatten()  # out[at] takes five times as long
    old = out.index_select(0, at).view_as(patch)
    out.scatter_(0, at, old.lerp(patch, share).clamp_(0, 1).flatten())
    mask.scatter_(0, first, mask.index_select(0, first) | (share > 0).flatten())


def start(x: Tensor, n: Tensor, generator: Generator, classes: int | None) -> tuple[Tensor, Tensor]:
    """The outputs to work on (N, 3, S, S) and n on the generator's device, both checked."""
    side_of(x)
    if n.ndim != 1 or n.is_floating_point() or not len(x) or not len(n) or len(n) % len(x):
        raise ValueError(f"n must be ({len(x)} k,) integers, got {n.dtype} {tuple(n.shape)}")
    n = n.to(generator.device)
    low, high = int(n.min()), int(n.max())
    if low < 0 or (classes is not None and high >= classes):
        raise ValueError(f"n must be in 0..classes-1, got {low}..{high} with classes={classes}")
    return x.contiguous().repeat(len(n) // len(x), 1, 1, 1), n
