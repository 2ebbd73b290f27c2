"""What the compared detectors share: training by steps, files, two networks, a ResNet's layers.

Each is a file here, with its losses and score. Any loop can run `trainings` that calls `losses` and
`update` until `step_done` is `total`. Sizes: N training images, B images, S pixels a side.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, InitVar, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn

PIXELS = {"cpu": 2**18, "cuda": 2**22}  # B S^2 that are scored at once
Terms = dict[str, Tensor]
Track = Callable[[Iterable[int]], Iterable[int]]


@dataclass(eq=False)
class Detector(ABC):
    """Networks that are trained on healthy images; a subclass has their losses and the score.

    start: the device; for a `pretrained` one a ResNet with torchvision's names, which is copied.
    """

    kind: ClassVar[str]  # its name in files and options
    quick: ClassVar[dict[str, Any]]  # settings with which a CPU is done in minutes, at 64 px
    pretrained: ClassVar[bool] = False
    zero: ClassVar[set[str]] = {"seed"}  # settings that may be 0
    start: InitVar[Any] = "cpu"
    _: KW_ONLY
    image_size: int = 256  # S, pixels, a multiple of 32
    epochs: int = 100
    width: int = 64  # channels of the first layer
    batch_size: int = 32
    lr: float = 1e-3
    seed: int = 0

    def __post_init__(self, start: Any) -> None:
        for name, value in self.settings().items():
            if not (math.isfinite(value) and (value > 0 or (value == 0 and name in self.zero))):
                raise ValueError(f"impossible for {self.kind}: {name}={value!r}")
        if self.image_size % 32:
            raise ValueError(f"image_size must be a multiple of 32, got {self.image_size}")
        network = isinstance(start, nn.Module)
        self.device = next(start.parameters()).device if network else torch.device(start)
        if self.pretrained != network:
            raise ValueError(f"{self.kind} cannot start from {type(start).__name__}")
        with torch.random.fork_rng(devices=[]):  # layers draw their initial weights from it
            torch.manual_seed(self.seed)
            self.networks = nn.ModuleDict(self.build(start)).to(self.device).eval()
        self.networks.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.fitted: dict[str, Tensor] = {}  # what is estimated after the training
        self.ready = False

    @abstractmethod
    def build(self, start: Any) -> dict[str, nn.Module]:
        """The networks by name."""

    @abstractmethod
    def phases(self, images: np.ndarray) -> Iterator[Training]:
        """The trainings one after the other; after the last, what needs the trained networks."""

    @abstractmethod
    def score_batch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, 3, S, S) in [0, 1] -> maps (B, S, S), scores (B,)."""

    def fit(self, images: ArrayLike | Tensor, *, track: Track = iter) -> Detector:
        """Train on healthy images.

        images: (N, 3, S, S), N >= 2, uint8 (a memory-map is read batch by batch) or in [0, 1].
        track:  wraps the iterable of a training's steps, to show progress.
        raises: ValueError for other images, FloatingPointError when a loss is not finite.
        """
        for training in self.trainings(images):
            for i in track(range(training.total)):
                loss = torch.stack(list((terms := training.losses()).values())).sum()
                if not loss.isfinite():
                    raise FloatingPointError(f"{training.name}: loss {loss} in step {i}")
                training.update(terms)
        return self

    def trainings(self, images: ArrayLike | Tensor) -> Iterator[Training]:
        """`fit` for a caller who keeps checkpoints: take the next one when one is done.

        raises: ValueError for other images than `fit` takes.
        """
        data = self.checked(images)
        if len(data) < 2:
            raise ValueError(f"{self.kind} needs N >= 2 training images, got N={len(data)}")
        yield from self.phases(data)
        self.networks.eval()
        self.ready = True

    @torch.no_grad()
    def score(self, images: ArrayLike | Tensor) -> tuple[Tensor, Tensor]:
        """Heat maps (B, S, S) and scores (B,), float32, of images (B, 3, S, S) as in `fit`.

        raises: ValueError before fit, or for another shape.
        """
        data = self.checked(images)
        if not self.ready:
            raise ValueError(f"{self.kind} has to be fitted or loaded before it scores")
        parts = [self.score_batch(x) for x in self.batches(data)]
        return torch.cat([m for m, _ in parts]), torch.cat([s for _, s in parts])

    def batches(self, data: np.ndarray) -> Iterator[Tensor]:
        """The images in parts that fit in memory, in [0, 1] on the device."""
        step = max(1, PIXELS[self.device.type] // self.image_size**2)
        return (unit(data[k : k + step], self.device) for k in range(0, len(data), step))

    def checked(self, images: ArrayLike | Tensor) -> np.ndarray:
        """An array of the images, a memory-map as it is; raises ValueError unless (N, 3, S, S)."""
        data = np.asanyarray(images.cpu() if isinstance(images, Tensor) else images)
        s = self.image_size
        if data.shape[1:] != (3, s, s):
            raise ValueError(f"images must be (N, 3, {s}, {s}), got {tuple(data.shape)}")
        return data

    def settings(self) -> dict[str, Any]:
        """Every argument but `start`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def save(self, path: str | Path) -> None:
        """Write one file with everything, for `of`; raises ValueError before `fit`."""
        if not self.ready:
            raise ValueError(f"{self.kind} has to be fitted before it is saved")
        state = {"kind": self.kind, "settings": self.settings(), "fitted": self.fitted}
        torch.save(state | {"networks": self.networks.state_dict()}, path)

    @classmethod
    def of(cls, state: dict[str, Any], start: Any = "cpu") -> Detector:
        """The detector whose `save` wrote this: torch.load(path, weights_only=True)."""
        detector = cls(start, **state["settings"])
        detector.networks.load_state_dict(state["networks"])
        detector.fitted = {name: t.to(detector.device) for name, t in state["fitted"].items()}
        detector.ready = True
        return detector


class Training:
    """Steps of an optimiser on a loss; weights without a gradient stay as they are.

    The draws of a step come from (seed, name, step): a training resumed from a `state_dict`
    ends with the same weights as one that was not stopped, bit for bit.

    name:       the detector's kind, and a second word if it has several.
    terms:      (x (B, 3, S, S), generator, step) -> the loss's terms.
    optimiser:  with the rate at the start.   cosine: lets it fall to 0 in half a cosine.
    clip:       the most that the gradient's norm may be.
    """

    rate_option = "--detector-lr"  # lower it where a loss is not finite

    def __init__(
        self, detector: Detector, name: str, data: np.ndarray,
        terms: Callable[[Tensor, torch.Generator, int], Terms],
        optimiser: torch.optim.Optimizer,
        *, epochs: int, cosine: bool = False, clip: float = math.inf,
    ) -> None:  # fmt: skip
        self.detector, self.name, self.data, self.terms = detector, name, data, terms
        self.optimiser, self.cosine, self.clip = optimiser, cosine, clip
        self.device, self.step_done = detector.device, 0
        self.images = min(detector.batch_size, len(data))
        self.steps = len(data) // self.images  # an epoch; the last partial batch is left out
        self.total = self.steps * epochs
        self.key = detector.seed, zlib.crc32(name.encode())
        self.start_rate = optimiser.defaults["lr"]

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        fall = (1 + math.cos(math.pi * self.step_done / self.total)) / 2 if self.cosine else 1.0
        return self.start_rate * fall

    def losses(self) -> Terms:
        """The terms of the next step, whose sum is the loss."""
        epoch, position = divmod(self.step_done, self.steps)
        order = np.random.default_rng((*self.key, 0, epoch)).permutation(len(self.data))
        ids = np.sort(order[position * self.images : (position + 1) * self.images])
        seed = int(np.random.default_rng((*self.key, 1, self.step_done)).integers(2**62))
        generator = torch.Generator().manual_seed(seed)
        return self.terms(unit(self.data[ids], self.device), generator, self.step_done)

    def update(self, terms: Terms) -> None:
        """Back-propagate the sum of the terms, and step."""
        (group,) = self.optimiser.param_groups
        group["lr"] = self.rate
        self.optimiser.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        nn.utils.clip_grad_norm_(group["params"], self.clip)
        self.optimiser.step()
        self.step_done += 1

    def state_dict(self) -> dict[str, Any]:
        """All that a training of the same images and settings needs to resume."""
        return {
            "settings": self.detector.settings() | {"images": len(self.data)},
            "step": self.step_done,
            "networks": self.detector.networks.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """raises: ValueError if the state is of other settings or of another number of images."""
        here, there = self.state_dict()["settings"], state["settings"]
        if changed := [name for name in here if there.get(name) != here[name]]:
            raise ValueError(f"of a run with another {', '.join(changed)}; move it away")
        self.detector.networks.load_state_dict(state["networks"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step_done = state["step"]


def unit(images: np.ndarray, device: torch.device) -> Tensor:
    """(B, 3, S, S), uint8 or in [0, 1] -> float32 in [0, 1] on the device."""
    x = torch.as_tensor(np.array(images)).to(device, memory_format=torch.channels_last)
    return x.float() / 255 if x.dtype == torch.uint8 else x.float()


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU that has it; elsewhere it is emulated, and slower than float32."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


@contextlib.contextmanager
def frozen(*networks: nn.Module) -> Iterator[None]:
    """What is computed inside has no gradient for these networks' weights."""
    both = nn.ModuleList(networks).requires_grad_(False)
    yield
    both.requires_grad_(True)


def squared_error(x: Tensor, x_tilde: Tensor) -> tuple[Tensor, Tensor]:
    """Map (B, S, S), the mean of (x - x~)^2 over channels, and score (B,), its mean over pixels."""
    maps = (x - x_tilde).square().mean(dim=1)
    return maps, maps.mean(dim=(1, 2))


def widths(size: int, width: int) -> tuple[int, list[int]]:
    """Side of the smallest map, 4 to 7 px, and channels on the way: 16 px -> 4, [w, 2w, 4w]."""
    side, channels = size, [width]
    while side % 2 == 0 and side >= 8:
        side, channels = side // 2, [*channels, min(2 * channels[-1], 8 * width)]
    return side, channels


def convolutions(size: int, width: int, outputs: int, *, norm: bool = True) -> nn.Sequential:
    """(B, 3, S, S) -> (B, outputs): stride-2 convolutions, batch norm after all but the first."""
    side, channels = widths(size // 2, width)
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(zip([3, *channels], channels, strict=False)):
        normed = norm and i > 0
        layers.append(nn.Conv2d(a, b, 4, 2, 1, bias=not normed))
        if normed:
            layers.append(nn.BatchNorm2d(b))
        layers.append(nn.LeakyReLU(0.2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * side**2, outputs))


def deconvolutions(inputs: int, size: int, width: int) -> nn.Sequential:
    """(B, inputs) -> (B, 3, S, S) in [0, 1]: the reverse, with batch norm and a sigmoid."""
    side, channels = widths(size // 2, width)
    first = nn.Linear(inputs, channels[-1] * side**2)
    layers: list[nn.Module] = [first, nn.Unflatten(1, (channels[-1], side, side))]
    for a, b in zip(channels[::-1], [*channels[-2::-1], 3], strict=True):
        layers += [nn.BatchNorm2d(a), nn.LeakyReLU(0.2), nn.ConvTranspose2d(a, b, 4, 2, 1)]
    return nn.Sequential(*layers, nn.Sigmoid())


def stages(resnet: Any, x: Tensor) -> list[Tensor]:
    """Outputs of layer1 .. layer4 of a ResNet with torchvision's names; x is in [0, 1]."""
    mean, std = x.new_tensor([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)])[:, :, None, None]
    x = F.relu(resnet.bn1(resnet.conv1((x - mean) / std)))
    outputs = [F.max_pool2d(x, 3, 2, 1)]
    for layer in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4):
        outputs.append(layer(outputs[-1]))
    return outputs[1:]
