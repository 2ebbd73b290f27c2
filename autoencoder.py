"""IGD's networks: the auto-encoder of images or patches and the critic.   [P:§3.3]

`[I:...]` is Chen et al., "Deep One-Class Classification via Interpolated Gaussian Descriptor",
2022, as in igd.py, where the losses that train the networks are.

Sizes: B images or patches, S pixels a side, Z = 128 features of the latent space.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder import POOLED, ResNet18, channels_last, initialise, normalise

Z = 128  # features of the latent space                                       [P:§4.2]


class Block(nn.Module):
    """y = shortcut(x) + conv(relu(norm(conv(relu(norm(x)))))), twice or half as large.   [I:code]

    The decoder's blocks (up) copy pixels and have batch norm; the critic's take the mean of 2 x 2
    and normalise each sample, since its loss may not depend on the rest of the batch.
    """

    def __init__(self, inputs: int, outputs: int, *, up: bool) -> None:
        super().__init__()
        self.up, hidden = up, outputs if up else inputs
        self.norm1 = nn.BatchNorm2d(inputs) if up else nn.GroupNorm(1, inputs)
        self.conv1 = nn.Conv2d(inputs, hidden, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden) if up else nn.GroupNorm(1, hidden)
        self.conv2 = nn.Conv2d(hidden, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        if self.up:
            y = self.conv2(F.relu(self.norm2(self.conv1(_double(y)))))
            return y + _double(self.shortcut(x))
        y = self.conv2(F.relu(self.norm2(self.conv1(y))))
        return F.avg_pool2d(y, 2) + self.shortcut(F.avg_pool2d(x, 2))


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def widths(size: int, width: int) -> tuple[int, list[int]]:
    """Side of the smallest map and channels from the image to it: 32 px -> 4, [w, 2w, 4w, 8w].

    The side is halved while it stays even and 4 or more: 3, 4, 5, 6 times for 32, 64, 128, 256.
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
    generator: of the start weights.
    """

    mu: Tensor  # (Z,)
    sigma2: Tensor  # ()

    def __init__(
        self, backbone: ResNet18, size: int, width: int, generator: torch.Generator
    ) -> None:
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

    def encode(self, x: Tensor) -> Tensor:
        """f_theta: (B, 3, S, S) in [0, 1] -> z (B, Z)."""
        return self.linear(self.backbone.pooled(normalise(channels_last(x))))

    def decode(self, z: Tensor) -> Tensor:
        """g_phi: (B, Z) -> (B, 3, S, S) in [0, 1]."""
        return self.decoder(z)


def critic(size: int, width: int, generator: torch.Generator) -> nn.Sequential:
    """d: (B, 3, S, S) -> (B,), the share of a second image mixed in.   [I:critic]

    The last layer is linear, as in ACAI. The sigmoid of IGD's code saturates at 0 and stays there.
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
    return network
