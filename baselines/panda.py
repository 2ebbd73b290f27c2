"""PANDA: pre-trained features pulled to their centre, then nearest neighbours.   [P:Tab.1]

Reiss et al., "PANDA: Adapting Pretrained Features for Anomaly Detection and Segmentation", CVPR
2021: `[N:...]`, `[N:code]` its authors' code. Not here: the pre-training; any will
do. Sizes: N training images, B images, S pixels a side, C pooled features, k neighbours.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.steps import Detector, Terms, Training, autocast, stages, unit

KEPT = 10_000  # positions whose features are kept for the heat map      [P!§4.4.1 R23]
FISHER_IMAGES = 200  # that the Fisher information is estimated on, at most [P!§4.4.1 R23]


def compactness_loss(features: Tensor, centre: Tensor) -> Tensor:
    """l = E_x |psi(x) - c|^2 / C, c the centre of the pre-trained features.   [N:compactness]

    features: (B, C).   centre: (C,).   returns: scalar.
    """
    return (features - centre).square().mean()


def ewc_loss(
    weights: Iterable[Tensor], start: Iterable[Tensor], fisher: Iterable[Tensor]
) -> Tensor:
    """1/2 sum_i F_i (theta_i - theta*_i)^2, the pull back to the pre-trained weights.   [N:EWC]

    weights, start, fisher: theta, theta* and F, each some tensors of the same shapes.
    """
    terms = zip(weights, start, fisher, strict=True)
    return torch.stack([(f * (w - s).square()).sum() / 2 for w, s, f in terms]).sum()


def fisher_information(
    resnet: Any, images: Tensor, weights: list[Tensor], generator: torch.Generator
) -> list[Tensor]:
    """F_i = E_x (d log p(y | x) / d theta_i)^2, y drawn from p(y | x).   [P!§4.4.1 R23]

    p is the ResNet's own classifier (fc) on its pooled features.

    images: (B, 3, S, S) in [0, 1], each for itself.   returns: tensors shaped as `weights`.
    """
    total = [torch.zeros_like(w) for w in weights]
    for x in images.split(1):
        logits = resnet.fc(stages(resnet, x)[-1].mean(dim=(2, 3)))
        p = logits.detach().softmax(dim=1).cpu()
        y = torch.multinomial(p, 1, generator=generator)[:, 0].to(x.device)
        gradient = torch.autograd.grad(F.cross_entropy(logits, y), weights)
        for t, g in zip(total, gradient, strict=True):
            t += g.square() / len(images)
    return total


def knn_distance(x: Tensor, bank: Tensor, k: int) -> Tensor:
    """d(x) = 1/k sum over the k nearest f of the bank of |x - f|^2.   [N:kNN]

    x: (M, C).   bank: (N, C).   returns: (M,).
    """
    exact = "donot_use_mm_for_euclid_dist"  # products of large features cancel in float32
    parts = [torch.cdist(part, bank, compute_mode=exact) for part in x.split(4096)]
    nearest = [part.topk(min(k, len(bank)), largest=False).values for part in parts]
    return torch.cat(nearest).square().mean(dim=1)


@dataclass(eq=False)
class PANDA(Detector):
    """Fine-tuned features of a pre-trained ResNet, and the distance to their nearest neighbours.

    start: the ResNet; layers 3 and 4 are fine-tuned, batch norm keeps its averages.   [N:code]
    ewc:   lambda of the pull back to the initial weights; 0: a short training alone ("early").
    """

    kind: ClassVar[str] = "panda"
    pretrained: ClassVar[bool] = True
    zero: ClassVar[set[str]] = {"seed", "ewc"}
    quick: ClassVar[dict[str, Any]] = {"epochs": 2, "batch_size": 16}
    epochs: int = 50  # its code's with EWC                                          [N:code]
    lr: float = 1e-2  # of SGD with momentum 0.9, weight decay 5e-5                 [N:code]
    ewc: float = 1e4  #                                                             [N:code]
    clip: float = 1e-3  # the most that the gradient's norm may be                  [N:code]
    k: int = 2  #                                                                   [N:code]

    def build(self, start: nn.Module) -> dict[str, nn.Module]:
        return {"resnet": copy.deepcopy(start)}

    def weights(self) -> list[Tensor]:
        """Those that are fine-tuned."""
        resnet: Any = self.networks["resnet"]
        return [*resnet.layer3.parameters(), *resnet.layer4.parameters()]

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features (B, C), and those of layers 2 and 3 at layer 2's positions (B, D, h, h).

        A deeper layer's vector is copied to the positions that it covers.
        """
        with autocast(x.device):
            _, two, three, four = stages(self.networks["resnet"], x)
        wide = F.interpolate(three.float(), size=two.shape[2:], mode="nearest")
        return four.mean(dim=(2, 3)).float(), torch.cat([two.float(), wide], dim=1)

    def phases(self, images: np.ndarray) -> Iterator[Training]:
        self.networks.eval().requires_grad_(False)
        with torch.no_grad():  # before a step, so that a resumed training has the same centre
            centre = torch.cat([self.features(x)[0] for x in self.batches(images)]).mean(dim=0)
        weights = [w.requires_grad_() for w in self.weights()]
        start = [w.detach().clone() for w in weights]
        draws = torch.Generator().manual_seed(self.seed)
        some = torch.randperm(len(images), generator=draws)[:FISHER_IMAGES].sort().values
        x = unit(images[some.numpy()], self.device) if self.ewc else torch.empty(0)
        fisher = fisher_information(self.networks["resnet"], x, weights, draws) if self.ewc else []

        def terms(x: Tensor, generator: torch.Generator, step: int) -> Terms:
            losses = {"compact": compactness_loss(self.features(x)[0], centre)}
            if fisher:
                losses["ewc"] = self.ewc * ewc_loss(weights, start, fisher)
            return losses

        sgd = torch.optim.SGD(weights, self.lr, momentum=0.9, weight_decay=5e-5)
        yield Training(self, self.kind, images, terms, sgd, epochs=self.epochs, clip=self.clip)
        self.keep(images)

    @torch.no_grad()
    def keep(self, images: np.ndarray) -> None:
        """Keep the features of all images and of KEPT positions of them.   [P!§4.4.1 R23]"""
        draws = torch.Generator().manual_seed(self.seed)
        each = -(-KEPT // len(images))  # of an image
        bank, positions = [], []
        for x in self.batches(images):
            pooled, local = self.features(x)
            bank.append(pooled)
            flat = local.flatten(2).mT  # (B, h h, D)
            chosen = torch.rand(flat.shape[:2], generator=draws).argsort(dim=1)[:, :each]
            index = chosen[..., None].expand(-1, -1, flat.shape[2]).to(flat.device)
            positions.append(flat.gather(1, index).flatten(0, 1))
        kept = torch.randperm(sum(map(len, positions)), generator=draws)[:KEPT]
        self.fitted = {"bank": torch.cat(bank), "positions": torch.cat(positions)[kept]}

    def score_batch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """d of the pooled features, and of each position, upsampled bilinearly.   [P!§4.4.1 R23]"""
        pooled, local = self.features(x)
        d = knn_distance(local.flatten(2).mT.flatten(0, 1), self.fitted["positions"], self.k)
        maps = d.view(len(x), 1, *local.shape[2:])
        maps = F.interpolate(maps, size=x.shape[2:], mode="bilinear", align_corners=False)[:, 0]
        return maps, knn_distance(pooled, self.fitted["bank"], self.k)
