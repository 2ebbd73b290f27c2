"""IGD's networks: the auto-encoder with its Gaussian, and the critic with its loss.   [P:§3.3]

`[I:...]` is Chen et al., "Deep One-Class Classification via Interpolated Gaussian Descriptor",
2022, as in igd.py, where eq. 10-12 are. The critic of interpolations is that of Berthelot et al.,
"Understanding and Improving Interpolation in Autoencoders via an Adversarial Regularizer", 2019
(ACAI).

Sizes: N training images, B images or patches, S pixels a side, Z = 128 features of the latent
space.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from encoder import POOLED, ResNet18, Z, channels_last, initialise, normalise

Group: TypeAlias = "dist.ProcessGroup | None"  # of torch.distributed


class Block(nn.Module):
    """y = shortcut(x) + conv(relu(norm(conv(relu(norm(x)))))), twice or half as large.   [I:code]

    The decoder's blocks (up) copy pixels and have batch norm; the critic's take the mean of 2 x 2
    and normalise each sample, since its loss may not depend on the rest of the batch.
    """

    def __init__(self, inputs: int, outputs: int, *, up: bool) -> None:
        super().__init__()
        self.up = up
        hidden = outputs if up else inputs
        self.norm1 = nn.BatchNorm2d(inputs) if up else nn.GroupNorm(1, inputs)
        self.conv1 = nn.Conv2d(inputs, hidden, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden) if up else nn.GroupNorm(1, hidden)
        self.conv2 = nn.Conv2d(hidden, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        if self.up:
            y = self.conv2(F.relu(self.norm2(self.conv1(F.interpolate(y, scale_factor=2)))))
            return y + F.interpolate(self.shortcut(x), scale_factor=2)
        y = self.conv2(F.relu(self.norm2(self.conv1(y))))
        return F.avg_pool2d(y, 2) + self.shortcut(F.avg_pool2d(x, 2))


def widths(size: int, width: int) -> tuple[int, list[int]]:
    """Side of the smallest map and channels from the image to it: 32 px -> 4, [w, 2w, 4w, 8w].

    The side is halved while it is even and 8 or more: 3, 4, 5, 6 times for 32, 64, 128, 256.
    """
    side, channels = size, [width]
    while side % 2 == 0 and side >= 8:
        side, channels = side // 2, [*channels, min(2 * channels[-1], 8 * width)]
    return side, channels


class AutoEncoder(nn.Module):
    """x~ = g_phi(f_theta(x)), with the Gaussian of eq. 12 around f_theta of the normal images.

    f_theta is the pre-trained ResNet-18, fine-tuned, and a linear layer to Z.   [P:§3.3]

    backbone:  copied.
    size:      S of the images or patches.
    width:     channels at full size.
    generator: of the initial weights.
    """

    mu: Tensor  # (Z,)
    sigma2: Tensor  # ()

    def __init__(self, backbone: ResNet18, size: int, width: int, generator: Generator) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone)
        side, channels = widths(size, width)
        steps = zip(channels[:0:-1], channels[-2::-1], strict=True)
        self.linear = nn.Linear(POOLED, Z)
        self.decoder = nn.Sequential(
            nn.Linear(Z, channels[-1] * side**2),
            nn.Unflatten(1, (channels[-1], side, side)),
            *(Block(a, b, up=True) for a, b in steps),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 3, 3, padding=1, bias=False),
            nn.Sigmoid(),
        )
        for part in (self.linear, self.decoder):
            initialise(part, generator)
        self.register_buffer("mu", torch.zeros(Z))
        self.register_buffer("sigma2", torch.full((), math.nan))  # until it is fitted
        channels_last(self)

    def encode(self, x: Tensor) -> Tensor:
        """f_theta: (B, 3, S, S) in [0, 1] -> z (B, Z)."""
        return self.linear(self.backbone.pooled(normalise(channels_last(x))))

    def decode(self, z: Tensor) -> Tensor:
        """g_phi: (B, Z) -> (B, 3, S, S) in [0, 1]."""
        return self.decoder(z)

    @torch.no_grad()
    def estimate(
        self, batches: Iterable[Tensor], kappa: float, least: float, group: Group = None
    ) -> None:
        """Set mu and sigma^2 to those of the training images or patches.   [P!§3.3 R21]

        Eq. 12 pulls z together, so sigma^2 shrinks from one estimate to the next; a step of Adam
        then moves z by many sigma, and 1 - exp(.) saturates at 1, without a gradient. Hence a
        least value, as in IGD's code.

        batches: of x (B, 3, S, S) in [0, 1].   kappa, group: as in `gaussian`.   least: of sigma^2.
        """
        mu, sigma2 = gaussian(map(self.encode, batches), kappa, group)
        self.mu.copy_(mu)
        self.sigma2.copy_(sigma2.clamp(min=least))


def gaussian(batches: Iterable[Tensor], kappa: float, group: Group = None) -> tuple[Tensor, Tensor]:
    """mu = 1/N sum_i z_i and sigma^2 = kappa/N sum_i |z_i - mu|^2.   [P:§3.3]

    batches: of z (B, Z), summed in float64: one pass.
    kappa:   in (0, 1].
    group:   processes, each with at least one batch.
    returns: mu (Z,) and sigma2 (), float32; sigma2 is at least 1e-6, for equal z.
    """
    count, total, square = 0, torch.zeros(()), torch.zeros(())
    for z in batches:
        z = z.double()
        if count == 0:
            shift = z.mean(dim=0)  # against cancellation
            if group:
                dist.broadcast(shift, 0, group)
        count += len(z)
        total = total + (z - shift).sum(dim=0)
        square = square + (z - shift).square().sum()
    if group:
        counted = square.new_tensor(count)
        for part in (counted, total, square):
            dist.all_reduce(part, group=group)
        count = int(counted)
    mean = total / count
    sigma2 = kappa * (square / count - mean.square().sum())
    return (shift + mean).float(), sigma2.float().clamp(min=1e-6)


def critic(size: int, width: int, generator: Generator) -> nn.Sequential:
    """d: (B, 3, S, S) -> (B,), the share of a second image mixed in.   [I:critic]

    The last layer is linear, as in ACAI. The sigmoid of IGD's critic of patches saturates at 0.
    """
    side, channels = widths(size, width)
    network = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        *(Block(a, b, up=False) for a, b in zip(channels, channels[1:], strict=False)),
        nn.Flatten(),
        nn.Linear(channels[-1] * side**2, 1),
        nn.Flatten(0),
    )
    initialise(network, generator)
    channels_last(network)
    return network


def interpolate(z: Tensor, alpha: Tensor) -> Tensor:
    """z_alpha = alpha z + (1 - alpha) z', z' the batch in reverse.   [I:interpolation]

    z: (B, Z).   alpha: (B,) in [0, 0.5].
    """
    return alpha[:, None] * z + (1 - alpha)[:, None] * z.flip(0)


def critic_loss(of_mixture: Tensor, alpha: Tensor, of_blend: Tensor) -> Tensor:
    """E (d(g(z_alpha)) - alpha)^2 + E d(gamma x + (1 - gamma) x~)^2: guess the share.   [I:critic]

    of_mixture, alpha, of_blend: (B,).   returns: scalar.
    """
    return (of_mixture.view_as(alpha) - alpha).square().mean() + of_blend.square().mean()
