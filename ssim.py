"""MS-SSIM, the multi-scale structural similarity of eq. 11, and its maps.   [P:(11)]

Wang, Simoncelli, Bovik, "Multiscale structural similarity for image quality assessment", 2003.

Sizes: B images, C channels, S pixels a side, K scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al.'s weights, finest first
PATCH_SCALES = (0.0516, 0.3295, 0.3463, 0.2726)  # four of them, for 32 px and window 3  [I:code]


def ms_ssim(
    x: Tensor,
    y: Tensor,
    *,
    weights: Sequence[float] | None = None,
    window: int = 11,
    data_range: float = 1.0,
) -> Tensor:
    """m = E(l_K cs_K)^w_K prod_{k < K} E(cs_k)^w_k, a mean over channels: 1 for equal images.

    l = (2 mu_x mu_y + C1) / (mu_x^2 + mu_y^2 + C1), cs = (2 s_xy + C2) / (s_x^2 + s_y^2 + C2) with
    the moments under a Gaussian window of sigma 1.5; C1 = (0.01 R)^2, C2 = (0.03 R)^2. E is
    the mean over a channel's map; a negative one counts as 0, with gradient 0.

    x, y:       (B, C, S, S) floating; a constant offset costs no digits.
    weights:    w_k of the scales, finest first; each halves the side. None: Wang et al.'s five, or
                as many of them as the window fits into (ceil(S / 2^k) >= window), scaled to sum 1.
    window:     odd, pixels.
    data_range: R, of the values.
    returns:    (B,), at most 1.
    raises:     ValueError for shapes that differ, or a window that the coarsest scale cannot hold.
    """
    if x.shape != y.shape or x.ndim != 4 or not (x.dtype.is_floating_point and x.dtype == y.dtype):
        got = f"{x.dtype} {tuple(x.shape)} and {y.dtype} {tuple(y.shape)}"
        raise ValueError(f"x, y must be floating (B, C, S, S), of one type, got {got}")
    weights = scale_weights(min(x.shape[2:]), window) if weights is None else weights
    maps = ssim_maps(x, y, len(weights), window, data_range)
    last = maps[-1][0] * maps[-1][1]
    means = torch.stack([m.mean(dim=(2, 3)) for m in [*(cs for _, cs in maps[:-1]), last]])
    powers = torch.tensor(weights, dtype=means.dtype)[:, None, None]  # (K, 1, 1)
    powers = powers.to(means.device, non_blocking=not means.is_cpu)  # nothing waits for it
    absent = means <= 0  # (K, B, C); a power's gradient at 0 would be infinite
    return torch.where(absent, 0.0, torch.where(absent, 1.0, means) ** powers).prod(0).mean(dim=1)


def scale_weights(size: int, window: int) -> tuple[float, ...]:
    """Wang et al.'s weights of the scales that a window fits into, scaled to sum 1 if not all."""
    scales = 1
    while scales < len(SCALES) and (size := (size + 1) // 2) >= window:
        scales += 1
    total = sum(SCALES[:scales]) if scales < len(SCALES) else 1.0
    return tuple(w / total for w in SCALES[:scales])


def ssim_maps(
    x: Tensor, y: Tensor, scales: int, window: int, data_range: float
) -> list[tuple[Tensor, Tensor]]:
    """Luminance l and contrast-structure cs of each scale, as maps.

    With s = x + y and d = x - y the two fractions are l = 1 - mu_d^2 / (... + C1) and
    cs = 1 - var_d / (... + C2): four averages instead of five, and never above 1 by rounding. The
    means are subtracted before squaring, or the variance of a bright flat region would cancel.

    returns: K pairs of maps (B, C, S / 2^k - window + 1, same).
    raises:  ValueError for an even window, or one that is larger than the smallest scale.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"the window must be odd and at least 1, got {window}")
    c_1, c_2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    maps = []
    with torch.autocast(x.device.type, enabled=False):
        x, y = (t if t.dtype == torch.float64 else t.float() for t in (x, y))
        t = torch.stack([x + y, x - y])  # s, d: (2, B, C, S, S)
        g = _window(window, t)
        for k in range(scales):
            if min(t.shape[3:]) < window:
                raise ValueError(
                    f"images of {min(x.shape[2:])} px hold {k} scales of window {window}, "
                    f"not {scales}"
                )
            shift = t.detach().mean(dim=(3, 4), keepdim=True)
            r = t - shift
            mean, square = _average(torch.stack([r, r * r]), g)  # (2, B, C, H, W) each
            var_s, var_d = (square - mean * mean).clamp(min=0)
            mu_s, mu_d = (mean + shift).square()
            luminance = 1 - mu_d / ((mu_s + mu_d) / 2 + c_1)
            maps.append((luminance, 1 - var_d / ((var_s + var_d) / 2 + c_2)))
            if k + 1 < scales:
                halves = F.avg_pool2d(t.flatten(0, 1), 2, padding=[n % 2 for n in t.shape[3:]])
                t = halves.unflatten(0, (2, -1))
    return maps


def _average(t: Tensor, g: Tensor) -> Tensor:
    """The mean under a window at each place that holds it: (..., H, W) -> (..., H-w+1, W-w+1).

    Sums along columns, then rows, with a group for each map: a convolution of one channel
    takes 8 to 11 times as long with its gradient.

    g: (w,); the window is its outer product.
    """
    maps = t.reshape(1, -1, *t.shape[-2:])  # (1, maps, H, W)
    kernel = g.expand(maps.shape[1], 1, 1, -1)
    maps = F.conv2d(maps, kernel.mT, groups=maps.shape[1])
    maps = F.conv2d(maps, kernel, groups=maps.shape[1])
    return maps.view(*t.shape[:-2], *maps.shape[-2:])


def _window(window: int, like: Tensor) -> Tensor:
    """(window,): a Gaussian of sigma 1.5 that sums to 1."""
    offset = torch.arange(window, dtype=torch.float64, device=like.device) - window // 2
    g = torch.exp(-(offset**2) / (2 * 1.5**2))
    return (g / g.sum()).to(like.dtype)


def residual_map(
    x: Tensor, y: Tensor, *, weights: Sequence[float], window: int, rho: float
) -> Tensor:
    """rho |x - y| + (1 - rho) sum_k w_k (1 - ssim_k), pixel by pixel.   [I:code]

    The maps of the scales are brought to S by copying pixels, and the channels averaged.

    x, y:    (B, C, S, S) in [0, 1].
    returns: (B, S, S), at least 0.
    """
    maps = ssim_maps(x, y, len(weights), window, 1.0)
    total = rho * (x - y).abs()
    for w, (luminance, cs) in zip(weights, maps, strict=True):
        total = total + (1 - rho) * w * (1 - F.interpolate(luminance * cs, size=x.shape[2:]))
    return total.mean(dim=1)


def setting(size: int) -> dict[str, Any]:
    """Window and weights at a size: IGD's for 32 px patches, else window 11 and what fits it."""
    if size <= 32:
        return {"window": 3, "weights": PATCH_SCALES if size == 32 else scale_weights(size, 3)}
    return {"window": 11, "weights": scale_weights(size, 11)}
