"""CutPaste: tell images from those with a moved patch, then a Gaussian of the features.   [P:Tab.1]

Li et al., "CutPaste: Self-Supervised Learning for Anomaly Detection and Localization", CVPR 2021:
`[C:...]`, 3-way: 0 an image, 1 CutPaste, 2 CutPaste-Scar. B images, S pixels a side, C features.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.steps import Detector, Terms, Training, autocast, stages

AREA = (0.02, 0.15)  # of a CutPaste patch, shares of the image                        [C:§A]
ASPECT = (0.3, 3.3)  # uniform below 1 or above 1, with equal chances                  [C:§A]
SCAR_WIDTH, SCAR_LENGTH = (2, 16), (10, 25)  # pixels at S = 256                       [C:§A]
JITTER = 0.1  # of brightness, contrast and saturation                       [P!§4.4.1 R24]
KEPT = 20_000  # patches that their Gaussian is estimated from, at most      [P!§4.4.1 R24]
STEPS = 256 * 256  # its 256 epochs are of 256 steps each, whatever the images         [C:§A]


def paste(
    x: Tensor, sides: Tensor, source: Tensor, target: Tensor, angle: Tensor, factors: Tensor
) -> tuple[Tensor, Tensor]:
    """Copy a rectangle of each image to another place of it, turned, its colours changed.

    Pixel p of the target shows source + R(-angle)(p - target) where that lies in the rectangle
    around the source's centre; the nearest pixel is taken.   [C:CutPaste]

    x:       (B, 3, S, S) in [0, 1].      sides: (B, 2) height and width, pixels.
    source:  (B, 2), target (B, 2): centres, row and column; pixel i has its centre at i + 0.5.
    angle:   (B,) radians.                factors: (B, 3) of brightness, contrast and saturation.
    returns: images (B, 3, S, S), and where they were pasted on, (B, S, S) bool.
    """
    size = x.shape[-1]
    grid = torch.arange(size, device=x.device) + 0.5
    place = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), dim=-1)  # (S, S, 2)
    dy, dx = (place - target[:, None, None]).unbind(dim=-1)  # (B, S, S) each
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    turned = torch.stack([cos * dy - sin * dx, sin * dy + cos * dx], dim=-1)
    mask = (turned.abs() < sides[:, None, None] / 2).all(dim=-1)
    at = (turned + source[:, None, None]).floor().long().clamp(0, size - 1)
    index = (at[..., 0] * size + at[..., 1]).flatten(1)[:, None].expand(-1, 3, -1)
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(dim=1)
    moved = x.flatten(2).gather(2, index).view_as(x) * brightness
    inside = mask[:, None].float()
    mean = (moved * inside).sum(dim=(1, 2, 3), keepdim=True) / (3 * inside.sum((2, 3), True) + 1e-6)
    moved = mean + contrast * (moved - mean)
    grey = moved.mean(dim=1, keepdim=True)
    moved = (grey + saturation * (moved - grey)).clamp(0, 1)
    return torch.where(mask[:, None], moved, x), mask


def draw_pastes(
    b: int, size: int, generator: torch.Generator, *, scar: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `paste` takes, drawn: rectangles of whole pixels in the image.   [C:§A] [P!§4.4.1 R24]

    scar: thin ones, turned by up to 45 degrees; their pixels are scaled with S, by 0.5 at least.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    if scar:
        scale = max(size / 256, 0.5)
        sides = torch.stack([uniform(*SCAR_LENGTH, b), uniform(*SCAR_WIDTH, b)], dim=1) * scale
    else:
        wide, tall = uniform(ASPECT[0], 1, b), uniform(1, ASPECT[1], b)
        aspect = torch.where(torch.rand(b, generator=generator) < 0.5, wide, tall)
        area = uniform(*AREA, b) * size**2
        sides = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], dim=1)
    sides = sides.round().clamp(1, size)
    corners = (torch.rand(2, b, 2, generator=generator) * (size - sides + 1)).floor()
    source, target = corners + sides / 2
    angle = uniform(-math.pi / 4, math.pi / 4, b) if scar else torch.zeros(b)
    return sides, source, target, angle, uniform(1 - JITTER, 1 + JITTER, b, 3)


def gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """mu and W with W^T W = Sigma^-1, Sigma = (1 - s) S + s tr(S)/C I.   [C:GDE] [P!§4.4.1 R24]

    S is the covariance with 1/N; s is Ledoit and Wolf's (2004) shrinkage, without which S could not
    be inverted for N <= C.

    features: (N, C).   returns: mu (C,), W (C, C) lower triangular, float32.
    """
    x = features.double()
    mu, (n, c) = x.mean(dim=0), x.shape
    x = x - mu
    cov = x.mT @ x / n
    away = cov.square().sum() - cov.trace() ** 2 / c  # |S - tr(S)/C I|^2
    noise = (x.square().sum(dim=1).square().mean() - cov.square().sum()) / n
    s = float((noise / away.clamp(min=1e-12)).clamp(0, 1))
    eye = torch.eye(c, dtype=x.dtype, device=x.device)
    sigma = (1 - s) * cov + (s * cov.trace() / c + 1e-9) * eye
    w = torch.linalg.solve_triangular(torch.linalg.cholesky(sigma), eye, upper=False)
    return mu.float(), w.float()


@dataclass(eq=False)
class CutPaste(Detector):
    """Two networks that begin alike: of whole images for the score, of patches for the map."""

    kind: ClassVar[str] = "cutpaste"
    pretrained: ClassVar[bool] = True
    zero: ClassVar[set[str]] = {"seed", "epochs"}
    quick: ClassVar[dict[str, Any]] = {"epochs": 4, "batch_size": 16}
    epochs: int = 0  # of either network; 0: as many as take STEPS                     [C:§A]
    batch_size: int = 32  # images; each is seen three times
    lr: float = 0.03  # of SGD with momentum 0.9, weight decay 3e-5, half a cosine     [C:§A]
    width: int = 512  # of the head's hidden layer

    def __post_init__(self, start: nn.Module) -> None:
        super().__post_init__(start)
        self.patch = max(32, self.image_size // 4)  # 64 px of 256                     [C:§3.3]
        self.stride = self.patch // 8

    def build(self, start: nn.Module) -> dict[str, nn.Module]:
        pooled: int = start.fc.in_features  # type: ignore[union-attr, assignment]
        networks: dict[str, nn.Module] = {}
        for name in ("image", "patch"):
            networks[name] = copy.deepcopy(start)
            networks[f"{name} head"] = nn.Sequential(
                nn.Linear(pooled, self.width, bias=False), nn.BatchNorm1d(self.width), nn.ReLU(),
                nn.Linear(self.width, 3),
            )  # fmt: skip
        return networks

    def features(self, name: str, x: Tensor) -> Tensor:
        """Pooled features (B, C) of one of the networks."""
        with autocast(x.device):
            return stages(self.networks[name], x)[-1].mean(dim=(2, 3)).float()

    def loss(self, name: str, x: Tensor, generator: torch.Generator) -> Terms:
        """E [CE(g(x), 0) + CE(g(CutPaste(x)), 1) + CE(g(Scar(x)), 2)] / 3.   [C:3-way]"""
        views = [x]
        for scar in (False, True):
            drawn = draw_pastes(len(x), x.shape[-1], generator, scar=scar)
            views.append(paste(x, *(d.to(x.device) for d in drawn))[0])
        logits = self.networks[f"{name} head"](self.features(name, torch.cat(views)))
        target = torch.arange(3, device=x.device).repeat_interleave(len(x))
        return {"class": F.cross_entropy(logits, target)}

    def phases(self, images: np.ndarray) -> Iterator[Training]:
        epochs = self.epochs or math.ceil(STEPS / max(1, len(images) // self.batch_size))
        for name in ("image", "patch"):
            both = name, f"{name} head"
            weights = [w for part in both for w in self.networks[part].parameters()]
            sgd = torch.optim.SGD(weights, self.lr, momentum=0.9, weight_decay=3e-5)

            def terms(x: Tensor, generator: torch.Generator, step: int, name: str = name) -> Terms:
                self.networks.train()
                return self.loss(name, self.crop(x, generator) if name == "patch" else x, generator)

            title = self.kind if name == "image" else f"{self.kind} patch"
            yield Training(self, title, images, terms, sgd, epochs=epochs, cosine=True)
            self.networks.eval()
        self.estimate(images)

    def crop(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A patch of each image, anywhere."""
        room = self.image_size - self.patch + 1
        y, z = torch.randint(room, (2, len(x)), generator=generator).to(x.device)
        windows = x.unfold(2, self.patch, 1).unfold(3, self.patch, 1)
        return windows[torch.arange(len(x), device=x.device), :, y, z]

    def patches(self, x: Tensor) -> Tensor:
        """All patches, row by row: (B L, 3, p, p)."""
        parts = x.unfold(2, self.patch, self.stride).unfold(3, self.patch, self.stride)
        return parts.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, self.patch, self.patch)

    @torch.no_grad()
    def estimate(self, images: np.ndarray) -> None:
        """The Gaussian of all images, and the one of at most KEPT patches of any place."""
        draws = torch.Generator().manual_seed(self.seed)
        each, whole, local = -(-KEPT // len(images)), [], []
        for x in self.batches(images):
            whole.append(self.features("image", x))
            patches = self.patches(x)
            chosen = torch.randperm(len(patches), generator=draws)[: each * len(x)]
            local.append(self.features("patch", patches[chosen.to(x.device)]))
        of_patches = torch.cat(local)[torch.randperm(sum(map(len, local)), generator=draws)[:KEPT]]
        for name, features in (("image", torch.cat(whole)), ("patch", of_patches)):
            self.fitted[f"{name} mu"], self.fitted[f"{name} w"] = gaussian(features)

    def distance(self, name: str, x: Tensor) -> Tensor:
        """sqrt((f - mu)^T Sigma^-1 (f - mu)), which falls with log p(f): (B,).   [C:GDE]"""
        f = torch.cat([self.features(name, part) for part in x.split(256)])
        return ((f - self.fitted[f"{name} mu"]) @ self.fitted[f"{name} w"].T).norm(dim=1)

    def score_batch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The image's distance, and at each pixel the mean of those of the patches over it."""
        s = self.distance("patch", self.patches(x)).view(len(x), 1, -1)  # (B, 1, L)
        columns = s.expand(-1, self.patch**2, -1)
        fold = nn.Fold(self.image_size, self.patch, stride=self.stride)
        return (fold(columns) / fold(torch.ones_like(columns)))[:, 0], self.distance("image", x)
