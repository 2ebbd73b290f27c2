"""f_theta: ResNet-18, its projection head, and the heads f_beta and f_gamma.   [P:§4.2]

The backbone is He et al. 2016 with torchvision's names and shapes, so that weights move between
the two in either direction. The losses that train it are in losses.py.

Sizes: B images, S pixels a side, Z = 128 output features, A classes; the backbone pools 512.
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

T = TypeVar("T", Tensor, nn.Module)

POOLED = 512  # channels of layer4
Z = 128  # output features                                                        [P:§4.2]
# Mean and standard deviation of ImageNet's channels, in [0, 1]: what its weights expect
IMAGENET = torch.tensor([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)])[:, :, None, None]


def to_unit(images: np.ndarray | Tensor, device: torch.device | str) -> Tensor:
    """Convert uint8 or float images to float32 in [0, 1] on the device.

    images:  (B, 3, S, S), uint8 in 0..255 or floating in [0, 1]; others raise ValueError.
    returns: (B, 3, S, S) float32.
    """
    on_cpu = torch.device(device).type == "cpu"
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(np.array(images))  # a copy: memory-maps are read-only
        images = images if on_cpu else images.pin_memory()  # else the next line would wait
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images must be uint8 or floating in [0, 1], got {images.dtype}")
    images = images.to(device, non_blocking=not on_cpu)
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def normalise(x: Tensor) -> Tensor:
    """(x - mean) / std per channel, with ImageNet's statistics whatever the initial weights.

    x: (B, 3, S, S) in [0, 1].   returns: (B, 3, S, S), about zero mean and unit variance.
    """
    mean, std = IMAGENET.to(x, non_blocking=not x.is_cpu)
    return (x - mean) / std


class Conv3x3(nn.Conv2d):
    """3 x 3 convolution with padding 1; on maps of 1 x 1 or 2 x 2 pixels, as linear layers.

    layer4's maps are that small for images of 32 and 64 px, and 8/9 or 5/9 of a convolution's
    products there are with the padding. Here each output pixel is a linear layer on the whole map,
    with the kernel's part that lies on it: the same sum, in 0.64 to 0.98 of the convolution's time.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, 3, stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        side = x.shape[-1]
        if side > 2 or x.shape[-2] != side:
            return super().forward(x)
        pixels = x.permute(0, 2, 3, 1).flatten(1)  # (B, side side C)
        kernel = self.weight.permute(0, 2, 3, 1)  # (C', 3, 3, C)
        first = [1 - i for i in range(0, side, self.stride[0])]  # kernel row on map row 0
        parts = [kernel[:, i : i + side, j : j + side].flatten(1) for i in first for j in first]
        outputs = torch.stack([F.linear(pixels, part, self.bias) for part in parts], dim=1)
        return outputs.unflatten(1, (len(first), len(first))).permute(0, 3, 1, 2)


class BasicBlock(nn.Module):
    """y = relu(x' + bn2(conv2(relu(bn1(conv1(x)))))), x' = x or its 1 x 1 projection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = Conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = Conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)).add_(shortcut), inplace=True)


class ResNet18(nn.Module):
    """ResNet-18 whose state dict is torchvision's `resnet18`, name by name and shape by shape.

    generator: where the initial weights are drawn from; None: a fixed seed of 0.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, 2), BasicBlock(128, 128, 1))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, 2), BasicBlock(256, 256, 1))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, 2), BasicBlock(512, 512, 1))
        self.fc = nn.Linear(POOLED, 1000)  # kept for the names' sake; PMSACL never trains it
        initialise(self, generator or torch.Generator().manual_seed(0))

    def stages(self, x: Tensor, last: int = 4) -> list[Tensor]:
        """Outputs of layer1 .. layer`last`: (B, 64, S/4, S/4) .. (B, 512, S/32, S/32).

        x: (B, 3, S, S), normalised.
        """
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.max_pool2d(x, 3, 2, 1)  # (B, 64, S/4, S/4)
        layers = (self.layer1, self.layer2, self.layer3, self.layer4)[:last]
        return [x := layer(x) for layer in layers]

    def pooled(self, x: Tensor) -> Tensor:
        """Mean of layer4 over its positions: (B, 3, S, S) normalised -> (B, 512)."""
        return self.stages(x)[-1].mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """ImageNet's logits: (B, 3, S, S) normalised -> (B, 1000)."""
        return self.fc(self.pooled(x))


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Draw the weights as torchvision does, from `generator`; convolutions here have no bias."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, 0, "fan_out", "relu", generator)
        elif isinstance(part, nn.Linear):
            bound = 1 / math.sqrt(part.in_features)
            nn.init.uniform_(part.weight, -bound, bound, generator=generator)
            if part.bias is not None:
                nn.init.uniform_(part.bias, -bound, bound, generator=generator)


class Encoder(nn.Module):
    """f_theta with its heads: z = head(backbone(x)), on the unit sphere or raw.   [P!(3) R20]

    classes:   A, that f_beta tells apart.
    features:  "unit" scales z to length 1, "raw" leaves it as printed; others raise ValueError.
    aug_head:  what f_beta sees: "backbone" (512-d) or "projection" (z).   [P!(8) R17]
    generator: of the initial weights; None: a fixed seed of 0, whatever torch.manual_seed says.
    """

    def __init__(
        self,
        *,
        classes: int = 4,
        features: str = "unit",
        aug_head: str = "backbone",
        generator: torch.Generator | None = None,
    ) -> None:
        if features not in ("unit", "raw"):
            raise ValueError(f"features must be 'unit' or 'raw', got {features!r}")
        if aug_head not in ("backbone", "projection"):
            raise ValueError(f"aug_head must be 'backbone' or 'projection', got {aug_head!r}")
        super().__init__()
        generator = generator or torch.Generator().manual_seed(0)
        self.features, self.aug_head = features, aug_head
        self.backbone = ResNet18(generator)
        self.head = nn.Sequential(nn.Linear(POOLED, POOLED), nn.ReLU(), nn.Linear(POOLED, Z))
        self.f_beta = nn.Linear(POOLED if aug_head == "backbone" else Z, classes)
        self.f_gamma = nn.Linear(Z, 8)
        initialise(nn.ModuleList([self.head, self.f_beta, self.f_gamma]), generator)
        channels_last(self)  # from the start: in another order the same weights round differently

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z = f_theta(x) and the pooled backbone features h that it is made from.

        x:       (B, 3, S, S), uint8 or floating in [0, 1].
        returns: z (B, Z), h (B, 512), float32.
        """
        x = x if x.dtype == self.f_beta.weight.dtype else to_unit(x, x.device)
        with autocast(x.device):
            h = self.backbone.pooled(normalise(x))
            z, h = self.head(h).float(), h.float()
        return (F.normalize(z, dim=1) if self.features == "unit" else z), h

    def forward(self, x: Tensor) -> Tensor:
        """f_theta: (B, 3, S, S) in [0, 1] -> z (B, Z)."""
        return self.embed(x)[0]

    def aug_logits(self, z: Tensor, h: Tensor) -> Tensor:
        """f_beta before its softmax: (B, A).   [P:(8)]"""
        return self.f_beta(h if self.aug_head == "backbone" else z)

    def position_logits(self, z_1: Tensor, z_2: Tensor) -> Tensor:
        """f_gamma before its softmax, on the difference of two patches: (B, 8).   [P!(9) R18]"""
        return self.f_gamma(z_1 - z_2)


# --- memory order, precision, random numbers -----------------------------------------------------


def channels_last(x: T) -> T:
    """The memory order in which convolutions are fastest, for a batch or a network."""
    return x.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU that has it; elsewhere it is emulated, and slower than float32."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def seeded(*key: int) -> torch.Generator:
    """A generator on the CPU for a key such as (seed, purpose, step), each below 2^32."""
    words = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))
