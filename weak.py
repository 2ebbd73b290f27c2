"""A_0, the weak augmentation: SimCLR's, on whole batches.  [P!§4.2 R16]

Everything works on the device of the images. Parameters are drawn per image from an explicit
`torch.Generator`; no loop runs over images. With images on a GPU a generator on the CPU is the
better choice: same seed, same parameters, and no wait for the GPU to learn how many images an
operation fires on.

Not here: the strong augmentations (medmix.py), which jitter colours with the same steps.

B images of S x S pixels in [0, 1]; T steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


@dataclass(frozen=True)
class Weak:
    area: float = 0.08  # smallest crop, share of the image             [P!§4.2 R16]
    jitter: tuple[float, ...] = (0.8, 0.8, 0.8, 0.2)  # brightness, contrast, saturation, hue
    jitter_p: float = 0.8  # probability of the jitter
    grey_p: float = 0.2  # … of going grey
    blur_p: float = 0.5  # … of the blur


WEAK = {"simclr": Weak(), "ccd": Weak(area=0.2, jitter=(0.4, 0.4, 0.4, 0.1), blur_p=0.0)}
CROP_ASPECT = (3 / 4, 4 / 3)  # width / height
SIGMA = (0.1, 2.0)  # of the blur, pixels at any image size
BLUR_REACH = 8  # pixels; what lies beyond 4 sigma weighs less than 1e-4 and is left out
LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, the digits that torchvision uses
MIN_SIDE = 8  # pixels
CACHE = 2**20  # values of images worked on at a time, so that they stay in a CPU's cache


def weak(
    x: Tensor,
    generator: Generator,
    *,
    preset: str = "simclr",
    min_area: float | None = None,
    strength: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """SimCLR's augmentation: crop and resize, flip, colour jitter, grey, blur.  [P!§4.2 R16]

    As torchvision does it, hue in HSV. The crop is resized bilinearly; since it never has more
    pixels than the result, anti-aliasing, which is for shrinking, would change nothing.

    x:        (B, 3, S, S) float in [0, 1].
    preset:   "simclr", or "ccd" for the strengths in the authors' earlier code.
    min_area: smallest crop, share of the image; None for the preset's (0.08, or 0.2).
    strength: factor of the preset's colour jitter, 0 or above.
    out:      (B, 3, S, S) to write into, not x: at 256 px new memory costs a tenth of the time.
    returns:  (B, 3, S, S) in [0, 1].
    raises:   ValueError for an unknown preset, a min_area outside (0, 1], other shapes.
    """
    side = side_of(x)
    if preset not in WEAK:
        raise ValueError(f"preset must be one of {', '.join(WEAK)}, got {preset!r}")
    w = WEAK[preset]
    area = w.area if min_area is None else min_area
    if not 0 < area <= 1:
        raise ValueError(f"min_area must be in (0, 1], got {area}")
    b = len(x)
    box = crop_boxes(b, side, generator, area)  # (B, 4)
    flip = rand(generator, b) < 0.5
    jitter = [s * strength for s in w.jitter]
    op, value = jitter_steps(b, generator, jitter, rand(generator, b) < w.jitter_p)  # (B, 4)
    greyed, blurred = rand(generator, b, 1) < w.grey_p, rand(generator, b, 1) < w.blur_p
    finish = (greyed | blurred) * (4 + greyed + 2 * blurred)  # (B, 1) which of STEPS
    op, value = torch.cat([op, finish], 1), torch.cat([value, uniform(generator, *SIGMA, b, 1)], 1)

    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    at_a_time = b if x.is_cuda else max(1, CACHE // x[0].numel())
    for first in range(0, b, at_a_time):
        part = slice(first, first + at_a_time)
        view = in_steps(
            crop(x[part].contiguous(), box[part], flip[part]), op[part], value[part], STEPS
        )
        torch.clamp(view, 0, 1, out=out[part])  # interpolation and blur may round to 1 + 2^-23
    return out


def crop_boxes(b: int, side: int, generator: Generator, min_area: float) -> Tensor:
    """(B, 4) top, left, height, width of random crops, drawn as torchvision does.

    Area and log aspect are uniform; of ten draws the first that fits counts, else the whole image.
    """
    area = uniform(generator, min_area, 1, b, 10) * side**2
    aspect = log_uniform(generator, *CROP_ASPECT, b, 10)
    width, height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (width >= 1) & (width <= side) & (height >= 1) & (height <= side)
    first, none = fits.int().argmax(1, keepdim=True), ~fits.any(1)
    height = height.gather(1, first)[:, 0].masked_fill(none, side)
    width = width.gather(1, first)[:, 0].masked_fill(none, side)
    size = torch.stack([height, width], 1)
    return torch.cat([whole_number(generator, side - size + 1), size], 1)


def crop(x: Tensor, box: Tensor, flip: Tensor) -> Tensor:
    """x inside each box (B, 4), resized to S x S bilinearly, mirrored where `flip` (B,)."""
    side = x.shape[-1]
    top, left, height, width = box.to(x.device, x.dtype)[:, :, None].unbind(1)  # (B, 1) each
    at = (torch.arange(side, device=x.device, dtype=x.dtype) + 0.5) / side  # pixel centres
    at_x = torch.where(flip.to(x.device)[:, None], at.flip(0), at)  # (B, S)
    row = top + (at * height - 0.5).clamp(min=0).minimum(height - 1)  # (B, S)
    col = left + (at_x * width - 0.5).clamp(min=0).minimum(width - 1)
    return sample(x, row[:, :, None], col[:, None, :])


def jitter_steps(
    b: int, generator: Generator, strength: Sequence[float], chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """Brightness, contrast, saturation and hue in random order for the chosen (B,) images.

    strength: of each; factors are uniform in 1 -+ strength and >= 0, turns of hue in -+ strength.
    returns:  op (B, 4), what to do in each step: 0 nothing, 1 brightness, … 4 hue; and the
              factors (B, 4) in the same order.
    """
    low = torch.tensor([max(0.0, 1 - s) for s in strength[:3]] + [-strength[3]])
    high = torch.tensor([1 + s for s in strength[:3]] + [strength[3]])
    low, high = low.to(generator.device), high.to(generator.device)
    factor = low + (high - low) * rand(generator, b, 4)
    order = rand(generator, b, 4).argsort(1)
    return (order + 1) * chosen[:, None], factor.gather(1, order)


def in_steps(
    x: Tensor, op: Tensor, value: Tensor, changes: Sequence[Callable[[Tensor, Tensor], object]]
) -> Tensor:
    """x after changes[op[i, t] - 1](x_i, value[i, t]) for t = 0..T-1; op = 0 does nothing.

    Each step sorts the images by what is to be done, so that each change works in place on a slice
    of them. Gathering and scattering the images of each change would cost more than the changes.

    x:         (B, 3, S, S); it is overwritten, and serves as working memory.
    op, value: (B, T).
    """
    order = op.T.argsort(stable=True)  # (T, B), which image lies where, sorted for each step
    place = order.argsort()  # (T, B), where each image lies
    take = torch.cat([order[:1], place[:-1].gather(1, order[1:])]).to(x.device)
    value = value.T.gather(1, order).to(x.device, x.dtype)
    counts = F.one_hot(op.T, len(changes) + 1).sum(1).tolist()  # (T, changes + 1)
    spare = torch.empty_like(x)
    for t, count in enumerate(counts):
        x, spare = torch.index_select(x, 0, take[t], out=spare), x
        groups = zip(x.split(count), value[t].view(-1, 1, 1, 1).split(count), strict=True)
        for change, (y, v) in zip((None, *changes), groups, strict=True):
            if change and len(y):
                change(y, v)
    return torch.index_select(x, 0, place[-1].to(x.device), out=spare)


def brightness(x: Tensor, factor: Tensor) -> None:
    """factor x, clipped to [0, 1]. In place, as all the steps; factors are (B, 1, 1, 1)."""
    x.mul_(factor).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> None:
    """factor x + (1 - factor) mean luma, clipped."""
    mean = luma(x.mean((2, 3), keepdim=True))  # (B, 1, 1, 1)
    x.mul_(factor).add_((1 - factor) * mean).clamp_(0, 1)


def saturation(x: Tensor, factor: Tensor) -> None:
    """factor x + (1 - factor) luma, clipped."""
    y = luma(x)
    x.mul_(factor).addcmul_(y, 1 - factor).clamp_(0, 1)


def hue(x: Tensor, turn: Tensor) -> None:
    """The hue of HSV moved by `turn` of the colour circle, value and chroma kept.

    With p = (x - min) / (max - min), the hue lies 1 + p_G + p_B - p_R sixths of a turn from red,
    towards green if G >= B and towards blue if not: no case for each of the six sectors.
    """
    red, green, blue = x.split(1, 1)  # (B, 1, S, S) each
    value = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - low
    h = (green + blue).sub_(red).sub_(low).div_(chroma.clamp(min=1e-12)).add_(1)
    h = h.copysign_(green - blue).add_(6 * turn)
    h.sub_((h / 6).floor_(), alpha=6)  # into [0, 6)
    for channel, middle, sign in (red, 3, -1), (green, 2, 1), (blue, 4, 1):
        missing = (h - middle).abs_().sub_(1.5 - 0.5 * sign).mul_(sign).clamp_(0, 1)
        torch.addcmul(value, missing, chroma, value=-1, out=channel)


def to_grey(x: Tensor, _: Tensor) -> None:
    """The luma in all three channels."""
    x.copy_(luma(x))


def luma(x: Tensor) -> Tensor:
    """(B, 1, S, S) of (B, 3, S, S)."""
    y = x[:, :1] * LUMA[0]
    return y.add_(x[:, 1:2], alpha=LUMA[1]).add_(x[:, 2:], alpha=LUMA[2])


def blur(x: Tensor, sigma: Tensor) -> None:
    """Gaussian blur of sigma pixels; the kernel is a tenth of the side, the edges mirrored."""
    b, _, side, _ = x.shape
    r = min(side // 20, BLUR_REACH)
    tap = torch.arange(-r, r + 1, device=x.device, dtype=x.dtype)
    kernel = torch.softmax(-0.5 * (tap / sigma.view(b, 1)) ** 2, 1)  # (B, 2r+1), sums to 1
    kernel = kernel.repeat_interleave(3, 0).view(3 * b, 1, 1, 2 * r + 1)
    y = F.pad(x, (r, r, r, r), mode="reflect").reshape(1, 3 * b, side + 2 * r, side + 2 * r)
    y = F.conv2d(F.conv2d(y, kernel, groups=3 * b), kernel.mT, groups=3 * b)
    x.copy_(y.view(b, 3, side, side))


def grey_blur(x: Tensor, sigma: Tensor) -> None:
    """Both."""
    to_grey(x, sigma)
    blur(x, sigma)


STEPS = (brightness, contrast, saturation, hue, to_grey, blur, grey_blur)  # 1, 2, …


# Images and draws ----------------------------------------------------------------------------


def side_of(x: Tensor) -> int:
    """S; raises ValueError unless x is a batch of float images, (B, 3, S, S) with S >= MIN_SIDE."""
    good = x.ndim == 4 and x.shape[1] == 3 and x.shape[2] == x.shape[3] >= MIN_SIDE
    if not good or not x.is_floating_point():
        raise ValueError(
            f"images must be float (B, 3, S, S), S >= {MIN_SIDE}, got {x.dtype} {tuple(x.shape)}"
        )
    return x.shape[3]


def sample(x: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """(B, 3, S, S): x at pixel positions row and col, which broadcast to (B, S, S); bilinear."""
    scale = 2 / (x.shape[-1] - 1)
    col, row = col * scale - 1, row * scale - 1
    pairs = torch.complex(col, torch.zeros_like(col)) + torch.complex(torch.zeros_like(row), row)
    grid = torch.view_as_real(pairs)  # (B, S, S, 2): to pair them so takes a fifth of stack's time
    return F.grid_sample(x, grid, padding_mode="border", align_corners=True)


def rand(generator: Generator, *shape: int) -> Tensor:
    """Uniform in [0, 1), on the generator's device."""
    return torch.rand(shape, generator=generator, device=generator.device)


def uniform(generator: Generator, low: float, high: float, *shape: int) -> Tensor:
    """Uniform in [low, high)."""
    return low + (high - low) * rand(generator, *shape)


def log_uniform(generator: Generator, low: float, high: float, *shape: int) -> Tensor:
    """Its logarithm is uniform between those of low and high."""
    return uniform(generator, math.log(low), math.log(high), *shape).exp()


def whole_number(generator: Generator, count: Tensor) -> Tensor:
    """Uniform in 0..count-1, int64, in the shape of count."""
    count = count.long()  # rand() * count may round up to count, in float32
    return (rand(generator, *count.shape) * count).long().minimum(count - 1)
