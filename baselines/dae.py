"""DAE: a convolutional auto-encoder and its squared error.   [P:Tab.1]

Masci et al., "Stacked Convolutional Auto-Encoders for Hierarchical Feature Extraction", ICANN 2011:
`[M:...]`. Trained as one network, not layer by layer.   [P!§4.4.1 R25]
Sizes: B images, S pixels a side, Z features of the latent space.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from baselines.steps import (
    Detector,
    Terms,
    Training,
    autocast,
    convolutions,
    deconvolutions,
    squared_error,
)


def hide(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Set each pixel to 0 with probability `share`: (B, 3, S, S) -> (B, 3, S, S).   [M:§2.3]"""
    kept = torch.rand(len(x), 1, *x.shape[2:], generator=generator) >= share
    return x * kept.to(x.device)


@dataclass(eq=False)
class DAE(Detector):
    """Auto-encoder through Z features.

    denoise: share of pixels that are hidden from the encoder in training.
    """

    kind: ClassVar[str] = "dae"
    zero: ClassVar[set[str]] = {"seed", "denoise"}
    quick: ClassVar[dict[str, Any]] = {"epochs": 20, "batch_size": 16, "width": 16}
    epochs: int = 256  # as many as IGD has                                 [P!§4.4.1 R25]
    batch_size: int = 16
    lr: float = 1e-3  # of Adam                                             [P!§4.4.1 R25]
    latent: int = 128  # Z                                                  [P!§4.4.1 R25]
    denoise: float = 0.0

    def build(self, start: Any) -> dict[str, nn.Module]:
        return {
            "encoder": convolutions(self.image_size, self.width, self.latent),
            "decoder": deconvolutions(self.latent, self.image_size, self.width),
        }

    def reconstruct(self, x: Tensor) -> Tensor:
        """x~: (B, 3, S, S) in [0, 1] -> (B, 3, S, S) in [0, 1]."""
        with autocast(x.device):
            return self.networks["decoder"](self.networks["encoder"](x)).float()

    def loss(self, x: Tensor, x_tilde: Tensor) -> Tensor:
        """E (x - x~)^2, the mean over pixels and channels.   [M:(3)]"""
        return (x - x_tilde).square().mean()

    def phases(self, images: np.ndarray) -> Iterator[Training]:
        def terms(x: Tensor, generator: torch.Generator, step: int) -> Terms:
            self.networks.train()
            seen = hide(x, self.denoise, generator) if self.denoise else x
            return {"rec": self.loss(x, self.reconstruct(seen))}

        adam = torch.optim.Adam(self.networks.parameters(), self.lr)
        yield Training(self, self.kind, images, terms, adam, epochs=self.epochs)

    def score_batch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x - x~)^2 pixel by pixel, and its mean."""
        return squared_error(x, self.reconstruct(x))
