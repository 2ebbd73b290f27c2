"""A_0, the weak augmentation: SimCLR's, on B images of S x S pixels in [0, 1].  [P!§4.2 R16]

Everything works on the device of the images, and every draw comes from an explicit
`torch.Generator`. For images on a GPU, too, take one on the CPU: nothing then waits for the GPU to
say on which images a step fires. The strong augmentations (medmix.py) jitter with the same steps.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

# Smallest crop; strength of brightness, contrast, saturation, hue; p of jitter, grey and blur
WEAK = {
    "simclr": (0.08, (0.8, 0.8, 0.8, 0.2), 0.8, 0.2, 0.5),  # [P!§4.2 R16]
    "ccd": (0.2, (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, 0.0),
}
CROP_LOG_ASPECT = (math.log(3 / 4), math.log(4 / 3))  # of width / height
SIGMA = (0.1, 2.0)  # of the blur, pixels at any image size
BLUR_REACH = 8  # pixels; what lies beyond 4 sigma weighs less than 1e-4 and is left out
LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, the digits that torchvision uses
CHUNK, GPU_CHUNK = 64**3, 2**24  # pixels at a time: a CPU's cache; few large kernels


def weak(
    x: Tensor,
    generator: Generator,
    *,
    preset: str = "simclr",
    min_area: float | None = None,
    strength: float = 1.0,
) -> Tensor:
    """SimCLR's augmentation: crop and resize, flip, colour jitter, grey, blur.  [P!§4.2 R16]

    As torchvision does it, except that the images of a chunk share the random order of the jitter's
    four steps; the factors are each image's own. The crop is resized bilinearly; since it never has
    more pixels than the result, anti-aliasing would change nothing.

    x:        (B, 3, S, S) float32 or float64 in [0, 1], B >= 1; pixels are not checked.
    preset:   "simclr", or "ccd" for the strengths in the authors' earlier code.
    min_area: smallest crop, share of the image; None for the preset's (0.08, or 0.2).
    strength: factor of the preset's colour jitter, 0 or above.
    returns:  (B, 3, S, S) in [0, 1].
    raises:   ValueError for an unknown preset, min_area outside (0, 1], strength < 0, other shapes.
    """
    side = side_of(x)
    if preset not in WEAK:
        raise ValueError(f"preset must be one of {', '.join(WEAK)}, got {preset!r}")
    area, strengths, jitter_p, grey_p, blur_p = WEAK[preset]
    if not (0 < (area := area if min_area is None else min_area) <= 1 and strength >= 0):
        raise ValueError(f"needs 0 < min_area <= 1 and strength >= 0, got {area} and {strength}")
    chunk, views = max(16, (CHUNK if x.device.type == "cpu" else GPU_CHUNK) // side**2), []
    for images in x.split(chunk):
        b = len(images)
        y = crop(images, crop_boxes(b, side, generator, area), uniform(generator, 0, 1, b) < 0.5)
        at = moved((uniform(generator, 0, 1, b) < jitter_p).nonzero()[:, 0], y)
        y[at] = jitter(y.index_select(0, at), tuple(strength * s for s in strengths), generator)
        at = moved((uniform(generator, 0, 1, b) < grey_p).nonzero()[:, 0], y)
        y[at] = luma(y.index_select(0, at)).expand(-1, 3, -1, -1)
        at = moved((uniform(generator, 0, 1, b) < blur_p).nonzero()[:, 0], y)
        y[at] = blur(y.index_select(0, at), moved(uniform(generator, *SIGMA, b), y)[at])
        views.append(y.clamp_(0, 1))  # interpolation and blur may round to 1 + 2^-23
    return torch.cat(views)


def crop_boxes(b: int, side: int, generator: Generator, min_area: float) -> Tensor:
    """(B, 4) top, left, height, width of random crops, drawn as torchvision does.

    Area and log aspect are uniform; of ten draws the first that fits counts, else the whole image.
    """
    area = uniform(generator, min_area, 1, b, 10) * side**2
    aspect = uniform(generator, *CROP_LOG_ASPECT, b, 10).exp()
    sizes = torch.stack([area / aspect, area * aspect], 2).sqrt().round()  # (B, 10, 2)
    fits = ((sizes >= 1) & (sizes <= side)).all(2)
    size = sizes[torch.arange(b, device=fits.device), fits.int().argmax(1)]  # (B, 2)
    size[~fits.any(1)] = side
    return torch.cat([whole_number(generator, side - size + 1), size], 1)


def crop(x: Tensor, box: Tensor, flip: Tensor) -> Tensor:
    """x inside each box (B, 4), resized to S x S bilinearly, mirrored where `flip` (B,)."""
    side = x.shape[-1]
    top, left, height, width = moved(box, x)[:, :, None].unbind(1)  # (B, 1) each
    at = (torch.arange(side, device=x.device, dtype=x.dtype) + 0.5) / side  # pixel centres
    at_x = torch.where(moved(flip, x)[:, None], at.flip(0), at)  # (B, S)
    row = top + (at * height - 0.5).clamp(min=0).minimum(height - 1)  # (B, S)
    col = left + (at_x * width - 0.5).clamp(min=0).minimum(width - 1)
    return sample(x, row[:, :, None], col[:, None, :])


def jitter(
    x: Tensor, strength: tuple[float, ...], generator: Generator, region: Tensor | None = None
) -> Tensor:
    """x, overwritten, after brightness, contrast, saturation and hue in one random order.

    strength: four numbers s; factors are uniform in 1 ± s and >= 0, the hue's turn in ± s.
    region:   (B, 1, S, S) bool, where the contrast takes its mean; None: everywhere.
    """
    steps = (brightness, lambda x, factor: contrast(x, factor, region=region), saturation, hue)
    ranges = [(max(0.0, 1 - s), 1 + s) for s in strength[:3]] + [(-strength[3], strength[3])]
    for k in torch.randperm(4, generator=generator, device=generator.device).tolist():
        steps[k](x, moved(uniform(generator, *ranges[k], len(x), 1, 1, 1), x))
    return x


def brightness(x: Tensor, factor: Tensor) -> None:
    """factor x, clipped to [0, 1]. In place, like all the steps; factors are (B, 1, 1, 1)."""
    x.mul_(factor).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor, region: Tensor | None = None) -> None:
    """factor x + (1 - factor) m, clipped; m is the mean luma, of region (B, 1, S, S) if given."""
    mean = x.mean((2, 3), keepdim=True)  # (B, 3, 1, 1)
    if region is not None:
        mean = (x * region).sum((2, 3), keepdim=True) / region.sum((2, 3), keepdim=True)
    x.mul_(factor).add_((1 - factor) * luma(mean)).clamp_(0, 1)


def saturation(x: Tensor, factor: Tensor) -> None:
    """factor x + (1 - factor) luma, clipped."""
    grey = luma(x)
    x.mul_(factor).addcmul_(grey, 1 - factor).clamp_(0, 1)


def hue(x: Tensor, turn: Tensor) -> None:
    """The hue of HSV moved by `turn` of the colour circle, value and chroma kept.

    With p = (x - min) / (max - min), the hue lies 1 + p_G + p_B - p_R sixths of a turn from red,
    towards green if G >= B and towards blue if not: no case for each of the six sectors.
    """
    red, green, blue = x.split(1, 1)  # (B, 1, S, S) each
    value = red.maximum(green).maximum(blue)
    low = red.minimum(green).minimum(blue)
    chroma = value - low
    h = (green + blue).sub_(red).sub_(low).div_(chroma.clamp(min=1e-12)).add_(1)
    h.copysign_(green - blue).add_(6 * turn)
    h.sub_((h / 6).floor_(), alpha=6)  # into [0, 6)
    for channel, middle, sign, offset in (red, 3, -1, 2), (green, 2, 1, -1), (blue, 4, 1, -1):
        missing = (h - middle).abs_().mul_(sign).add_(offset).clamp_(0, 1)
        torch.addcmul(value, chroma, missing, value=-1, out=channel)


def luma(x: Tensor) -> Tensor:
    """0.2989 R + 0.587 G + 0.114 B: (B, 3, S, S) -> (B, 1, S, S)."""
    red, green, blue = x.split(1, 1)
    return (LUMA[0] * red).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of sigma (B,) px, edges mirrored; the kernel has 2 min(S // 20, 8) + 1 px."""
    b, _, side, _ = x.shape
    if not b:  # a convolution has at least one group
        return x
    r = min(side // 20, BLUR_REACH)
    tap = torch.arange(-r, r + 1, device=x.device, dtype=x.dtype)
    sigma = sigma.repeat_interleave(3).view(-1, 1, 1, 1)
    kernel = torch.softmax(-0.5 * (tap / sigma) ** 2, 3)  # (3 B, 1, 1, 2r + 1), sums to 1
    y = F.pad(x, (r, r, r, r), mode="reflect").reshape(1, 3 * b, side + 2 * r, side + 2 * r)
    if x.is_cpu:
        y = y.to(memory_format=torch.channels_last)  # 0.7 of the time at 256 px
    with torch.autocast(x.device.type, enabled=False):
        y = F.conv2d(F.conv2d(y, kernel, groups=3 * b), kernel.mT, groups=3 * b)
    return y.reshape(b, 3, side, side)


def side_of(x: Tensor) -> int:
    """S; raises ValueError unless x is (B, 3, S, S) float32 or float64, B >= 1, S >= 8."""
    shape = tuple(x.shape)
    square = len(shape) == 4 and shape[0] > 0 and shape[1] == 3 and 8 <= shape[2] == shape[3]
    if not square or x.dtype not in (torch.float32, torch.float64):
        wanted = "float32 or float64 (B, 3, S, S), B >= 1, S >= 8"
        raise ValueError(f"images must be {wanted}, got {x.dtype} {shape}")
    return shape[3]


def sample(x: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """x at pixel positions row and col, which broadcast to (B, height, width); bilinear."""
    col, row = (y * (2 / (x.shape[-1] - 1)) - 1 for y in (col, row))
    grid = torch.stack(torch.broadcast_tensors(col, row), -1)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=True)


def uniform(generator: Generator, low: float, high: float, *shape: int) -> Tensor:
    """Uniform in [low, high), on the generator's device."""
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


def whole_number(generator: Generator, count: Tensor) -> Tensor:
    """Uniform in 0..count-1, int64, in the shape of count."""
    count = count.long()  # the product may round up to count, in float32
    return (uniform(generator, 0, 1, *count.shape) * count).long().minimum(count - 1)


def moved(y: Tensor, x: Tensor) -> Tensor:
    """y on the device of x, by a copy that nothing waits for; floats get x's dtype."""
    return y.to(x.device, x.dtype if y.is_floating_point() else y.dtype, non_blocking=not x.is_cpu)
