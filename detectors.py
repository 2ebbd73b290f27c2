"""PaDiM on the pre-trained encoder, eq. 13.   [P:§3.3]

PaDiM is Defard et al., "PaDiM: a Patch Distribution Modeling Framework for Anomaly Detection and
Localization", 2020: `[D:(1)]` tags its equations. The distance itself is kernels/mahalanobis.py's.

Sizes: N training images, B images to score, S pixels a side, P = (S/4)^2 positions (those of
layer1), D channels, h = S/4.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from encoder import ResNet18, channels_last, normalise, to_unit
from kernels.mahalanobis import mahalanobis

LAYERS = (64, 128, 256)  # channels of layers 1-3, 448 together                   [P!§4.2 R19]
SIGMA_AT = 256  # pixels a side for which PaDiM's sigma is meant
CPU_PIXELS, GPU_PIXELS = 2**18, 2**22  # B S^2 that the network sees at once
IMAGES = 32  # whose embeddings are held at once: W is read once for all of them
POSITIONS = 256  # whose float64 factors are held at once
Track = Callable[[Sequence[int]], Iterable[int]]
Group: TypeAlias = "dist.ProcessGroup | None"  # of torch.distributed


def moments(batches: Iterable[Tensor], group: Group = None) -> tuple[int, Tensor, Tensor]:
    """mu_p = 1/N sum_n x_np and sum_n (x_np - mu_p)(x_np - mu_p)^T, in one pass.   [D:(1)]

    The data are shifted by the first batch's mean a: with r = x - a and its mean m, mu = a + m and
    the sum is sum_n r r^T - N m m^T, which then cancels little. A batch's products are float32,
    their sums float64.

    batches: of embeddings (B, P, D) float32; memory depends on P and D, not on N.
    group:   processes, each with at least one batch; all get the moments of all N.
    returns: N, mu (P, D), the scatter (P, D, D), float64; no image raises ValueError.
    """
    count = 0
    for x in batches:
        if count == 0:
            shift = x.mean(dim=0)  # (P, D)
            if group:
                dist.broadcast(shift, 0, group)
            total = torch.zeros_like(shift, dtype=torch.float64)  # (P, D)
            scatter = total.new_zeros(*shift.shape, shift.shape[1])  # (P, D, D)
        r = (x - shift).transpose(0, 1).contiguous()  # (P, B, D)
        for p in range(0, len(r), POSITIONS):
            block = r[p : p + POSITIONS]
            scatter[p : p + POSITIONS] += block.mT @ block
        total += r.sum(dim=1, dtype=torch.float64)
        count += len(x)
    if count == 0:
        raise ValueError("[D:(1)] needs N >= 2 images, got none")
    if group:
        counted = total.new_tensor([count])
        for part in (counted, total, scatter):
            dist.all_reduce(part, group=group)
        count = int(counted)
    mean = total / count
    for p in range(0, len(mean), POSITIONS):
        m = mean[p : p + POSITIONS]
        scatter[p : p + POSITIONS] -= count * m[:, :, None] * m[:, None, :]
    return count, shift.double() + mean, scatter


def whitening(scatter: Tensor, count: int, eps: float) -> Tensor:
    """W_p, the inverse of the Cholesky factor of Sigma_p = scatter_p / (N - 1) + eps I.   [D:(1)]

    W^T W = Sigma^-1. The factor and its inverse are float64 and only the result is rounded: a
    float32 inverse makes distances wrong by up to 6% where Sigma is ill-conditioned, this by 3e-7.

    scatter: (P, D, D) float64.
    count:   N; 1/(N - 1) is the unbiased estimate.
    eps:     ridge, in units of x squared: with N <= D images Sigma would be singular without it.
    returns: W (P, D, D) float32, lower triangular.
    raises:  ValueError if N < 2, or if some Sigma_p is not positive definite.
    """
    if count < 2:
        raise ValueError(f"[D:(1)] needs N >= 2 images, got N={count}")
    eye = torch.eye(scatter.shape[1], dtype=torch.float64, device=scatter.device)
    w, failed = torch.empty(scatter.shape, device=scatter.device), eye.new_zeros(())
    for p in range(0, len(scatter), POSITIONS):
        sigma = scatter[p : p + POSITIONS] / (count - 1) + eps * eye
        factor, bad = torch.linalg.cholesky_ex(sigma)
        failed += bad.count_nonzero() + (~sigma.isfinite()).any()  # a GPU may factor NaN
        w[p : p + POSITIONS] = torch.linalg.solve_triangular(factor, eye, upper=False)
    if failed:  # one synchronisation with a GPU, not one for each block
        raise ValueError(
            f"a Sigma_p is not positive definite (eps={eps:g}): is an image NaN or not in [0, 1]?"
        )
    return w


def block_rows(w: Tensor) -> list[Tensor]:
    """Four blocks of rows of W, each cut after its last nonzero column: 5/8 of the memory.

    A CPU reads W, 164 MB at 256 px, for every image. Transposed, x @ block reads it in order.

    w: (P, D, D), lower triangular.   returns: (P, j, j - i) each: rows i to j, transposed.
    """
    edges = [w.shape[1] * k // 4 for k in range(5)]
    return [w[:, i:j, :j].mT.contiguous() for i, j in itertools.pairwise(edges)]


def upsampling(h: int, size: int, sigma: float) -> Tensor:
    """U, with which U s U^T upsamples a map bilinearly and smooths it by a Gaussian.   [P!(13) R19]

    Both are linear and separable, so one matrix does both; with `F.interpolate` and convolutions,
    scoring eight images of 256 px takes 1.2 times as long. The edge is mirrored, as in PaDiM.

    h:       side of the map s.
    size:    S.
    sigma:   of the Gaussian, in pixels of S; cut at 4 sigma. 0: no smoothing.
    returns: (S, h) float32, each row summing to 1.
    """
    eye = torch.eye(h, dtype=torch.float64)
    bilinear = F.interpolate(eye[None], size=size, mode="linear")[0].T  # (S, h)
    offsets = torch.arange(-int(4 * sigma + 0.5), int(4 * sigma + 0.5) + 1)
    weights = torch.exp(-0.5 * (offsets / max(sigma, 1e-9)).double().square())
    at = (torch.arange(size)[:, None] + offsets) % (2 * size)  # mirrored: d c b a | a b c d
    at = torch.where(at < size, at, 2 * size - 1 - at)  # (S, 8 sigma + 1)
    gaussian = torch.zeros(size, size, dtype=torch.float64)
    gaussian.scatter_add_(1, at, (weights / weights.sum()).expand(at.shape))
    return (gaussian @ bilinear).float()


def folded(network: ResNet18) -> ResNet18:
    """The same function in evaluation mode, each batch norm folded into its convolution."""
    network = copy.deepcopy(network)
    for part in list(network.modules()):
        for conv, norm in (("conv1", "bn1"), ("conv2", "bn2"), ("0", "1")):
            if isinstance(getattr(part, norm, None), nn.modules.batchnorm._BatchNorm):
                both = fuse_conv_bn_eval(getattr(part, conv), getattr(part, norm))
                setattr(part, conv, both)
                setattr(part, norm, nn.Identity())
    return network


class PaDiM:
    """s(x_p) = sqrt((x_p - mu_p)^T Sigma_p^-1 (x_p - mu_p)) over the positions p.   [P:(13)]

    x_p are channels of the encoder's layers 1-3 at position p of layer1; mu_p and Sigma_p are
    those of healthy images, position by position.

    backbone: a pre-trained `encoder.ResNet18`; the detector keeps a copy, on the same device.
    channels: D, drawn from the 448 of layers 1-3 by `seed`.   [P!§4.2 R19]
    eps:      ridge of Sigma_p.
    sigma:    pixels at S = 256 of the map's smoothing, scaled with S.
    """

    def __init__(
        self,
        backbone: ResNet18,
        *,
        channels: int = 100,
        eps: float = 0.01,
        sigma: float = 4.0,
        seed: int = 0,
    ) -> None:
        if not isinstance(backbone, ResNet18):
            raise ValueError(f"backbone must be a ResNet18, as Encoder's, got {type(backbone)}")
        if not 1 <= channels <= sum(LAYERS):
            raise ValueError(f"channels must be 1 to {sum(LAYERS)}, got {channels}")
        if not (eps >= 0 and sigma >= 0 and math.isfinite(eps + sigma)):
            raise ValueError(f"eps and sigma must be 0 or above, got {eps} and {sigma}")
        self.backbone = copy.deepcopy(backbone).eval().requires_grad_(False)
        self.device = self.backbone.conv1.weight.device
        self.eps, self.sigma, self.size = eps, sigma, 0
        self.mean = self.whitening = self.upsampling = torch.empty(0)
        generator = torch.Generator().manual_seed(seed)
        self.channels = torch.randperm(sum(LAYERS), generator=generator)[:channels].sort().values

    @functools.cached_property
    def chosen(self) -> list[Tensor]:
        """The channels of each layer, counted from its first."""
        of_layer = torch.bucketize(self.channels, torch.tensor(LAYERS).cumsum(0), right=True)
        first = torch.tensor((0, *LAYERS)).cumsum(0)
        layers = (self.channels[of_layer == i] - first[i] for i in range(len(LAYERS)))
        return [layer.to(self.device) for layer in layers]

    @functools.cached_property
    def network(self) -> ResNet18:
        """The backbone with folded batch norms, without layer3's other channels: 5% less work."""
        network, chosen = folded(self.backbone), self.chosen[-1]
        if len(chosen):
            last: Any = network.layer3[-1]
            last.conv2.weight = nn.Parameter(last.conv2.weight[chosen])
            last.conv2.bias = nn.Parameter(last.conv2.bias[chosen])
            last.downsample = nn.Conv2d(LAYERS[-1], len(chosen), 1, bias=False)  # picks them
            eye = torch.eye(LAYERS[-1], device=self.device)
            last.downsample.weight = nn.Parameter(eye[chosen, :, None, None])
        channels_last(network)
        return network

    @torch.no_grad()
    def embeddings(self, images: np.ndarray | Tensor) -> Tensor:
        """x_p: the chosen channels of layers 1-3, brought to layer1's positions.   [D:§III-A]

        A deeper layer's vector is copied to the positions that it covers (nearest neighbour), as
        in PaDiM's own code. The channels are chosen first: the same numbers for less work.

        images:  (B, 3, S, S), uint8 or floating in [0, 1].
        returns: (B, P, D) float32.
        """
        size, h = images.shape[-1], -(-images.shape[-1] // 4)
        step = max(1, (CPU_PIXELS if self.device.type == "cpu" else GPU_PIXELS) // size**2)
        x = torch.empty(len(images), h, h, len(self.channels), device=self.device)
        for k in range(0, len(images), step):
            batch = normalise(to_unit(images[k : k + step], self.device))
            stages = self.network.stages(channels_last(batch), last=3)
            parts = []
            for layer, chosen in zip(stages, self.chosen, strict=True):
                if len(chosen):
                    part = layer[:, chosen] if layer.shape[1] > len(chosen) else layer
                    parts.append(F.interpolate(channels_last(part), size=h, mode="nearest"))
            x[k : k + step] = torch.cat(parts, dim=1).permute(0, 2, 3, 1)
        return x.flatten(1, 2)  # (B, P, D)

    def fit(self, images: ArrayLike | Tensor, *, track: Track = iter, group: Group = None) -> PaDiM:
        """mu_p and Sigma_p of healthy images, in one pass over them.   [D:(1)]

        images: (N, 3, S, S), N >= 2, uint8 (a memory-map is read batch by batch) or floating in
                [0, 1]. Memory does not depend on N.
        track:  wraps the iterable of steps, to show progress: tqdm, for instance.
        group:  processes that fit together, each on its share of the images: all get the same.
        raises: ValueError for another shape, or N < 2, or fewer images than processes.
        """
        images = square_images(images)
        rank, processes = (group.rank(), group.size()) if group else (0, 1)
        if (n := len(images)) < max(2, processes):
            raise ValueError(f"PaDiM needs N >= {max(2, processes)} training images, got N={n}")
        if group:
            images = images[n * rank // processes : n * (rank + 1) // processes]
        starts = track(range(0, len(images), IMAGES))
        batches = (self.embeddings(images[k : k + IMAGES]) for k in starts)
        with torch.autocast(self.device.type, enabled=False):
            count, mean, scatter = moments(batches, group)
        p = slice(len(mean) * rank // processes, len(mean) * (rank + 1) // processes)
        w = whitening(scatter[p], count, self.eps)
        if group:  # each has the factors of its positions
            w = F.pad(w, (0, 0, 0, 0, p.start, len(scatter) - p.stop))
            dist.all_reduce(w, group=group)
        self.mean, self.whitening = mean.float(), w
        self._prepare_maps(images.shape[-1])
        return self

    @torch.no_grad()
    def score(self, images: ArrayLike | Tensor) -> tuple[Tensor, Tensor]:
        """Heat maps of eq. 13, upsampled and smoothed, and s(x) = max_p s(x_p).   [P!(13) R19]

        images:  (B, 3, S, S), uint8 or floating in [0, 1], of the size of the training images.
        returns: maps (B, S, S) and scores (B,), float32: the score is its map's maximum.
        raises:  ValueError before fit, or for another shape.
        """
        images = square_images(images)
        if self.size == 0:
            raise ValueError("PaDiM has to be fitted or loaded before it scores")
        if images.shape[-1] != self.size:
            raise ValueError(f"images must be {self.size} pixels a side, got {images.shape[-1]}")
        maps = torch.empty(len(images), self.size, self.size, device=self.device)
        with torch.autocast(self.device.type, enabled=False):
            for k in range(0, len(images), IMAGES):
                x = self.embeddings(images[k : k + IMAGES])  # (B, P, D)
                s = mahalanobis(x, self.mean, self.whitening, rows=self.rows)  # (B, P)
                s = s.unflatten(1, (-1, self.upsampling.shape[1]))  # (B, h, h)
                maps[k : k + IMAGES] = self.upsampling @ s @ self.upsampling.T  # (B, S, S)
        return maps, maps.amax(dim=(1, 2))

    def save(self, path: str | Path) -> None:
        """Write all in one file, for `of(torch.load(path))`; raises ValueError before fit."""
        if self.size == 0:
            raise ValueError("PaDiM has to be fitted before it is saved")
        lower = torch.tril_indices(*self.whitening.shape[1:])
        state = {name: getattr(self, name) for name in ("channels", "eps", "sigma", "size", "mean")}
        state["whitening"] = self.whitening[:, lower[0], lower[1]]  # (P, D (D + 1) / 2)
        torch.save(state | {"kind": "padim", "backbone": self.backbone.state_dict()}, path)

    @classmethod
    def of(cls, state: dict[str, Any], device: torch.device | str = "cpu") -> PaDiM:
        """The detector whose `save` wrote this state: torch.load(path, weights_only=True)."""
        backbone = ResNet18().to(device)
        backbone.load_state_dict(state["backbone"])
        detector = cls(
            backbone, channels=len(state["channels"]), eps=state["eps"], sigma=state["sigma"]
        )
        detector.channels, detector.mean = state["channels"].cpu(), state["mean"].to(device)
        p, d = detector.mean.shape
        lower = torch.tril_indices(d, d)
        detector.whitening = torch.zeros(p, d, d, device=device)
        detector.whitening[:, lower[0], lower[1]] = state["whitening"].to(device)
        detector._prepare_maps(state["size"])
        return detector

    def _prepare_maps(self, size: int) -> None:
        """For images of `size` pixels a side."""
        self.size = size
        self.rows = block_rows(self.whitening) if self.device.type == "cpu" else None
        sigma = self.sigma * size / SIGMA_AT
        self.upsampling = upsampling(-(-size // 4), size, sigma).to(self.device, non_blocking=True)


def square_images(images: ArrayLike | Tensor) -> np.ndarray | Tensor:
    """The images as an array or tensor that can be sliced; a memory-map stays one.

    raises: ValueError unless they are (N, 3, S, S).
    """
    if not isinstance(images, Tensor):
        images = np.asanyarray(images)
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be (N, 3, S, S), got {tuple(images.shape)}")
    return images
