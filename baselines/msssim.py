"""MS-SSIM: DAE's auto-encoder trained and scored with eq. 11.   [P:Tab.1]

The ablation of IGD without its Gaussian and its critic. MS-SSIM itself is in ssim.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from baselines.steps import Detector, Terms, Training, autocast, convolutions, deconvolutions
from ssim import ms_ssim, residual_map, setting


@dataclass(eq=False)
class MSSSIM(Detector):
    """Auto-encoder through Z features; rho weighs the absolute error."""

    kind: ClassVar[str] = "msssim"
    quick: ClassVar[dict[str, Any]] = {"epochs": 15, "batch_size": 16, "width": 16}
    epochs: int = 256  #                                                             [I:code]
    batch_size: int = 16
    lr: float = 1e-3  # of Adam                                             [P!§4.4.1 R25]
    latent: int = 128  # Z                                                  [P!§4.4.1 R25]
    rho: float = 0.15  #                                                         [I:code]

    def build(self, start: Any) -> dict[str, nn.Module]:
        return {
            "encoder": convolutions(self.image_size, self.width, self.latent),
            "decoder": deconvolutions(self.latent, self.image_size, self.width),
        }

    def reconstruct(self, x: Tensor) -> Tensor:
        """x~: (B, 3, S, S) in [0, 1] -> (B, 3, S, S) in [0, 1]."""
        with autocast(x.device):
            return self.networks["decoder"](self.networks["encoder"](x)).float().contiguous()

    def error(self, x: Tensor, x_tilde: Tensor) -> Tensor:
        """rho |x - x~|_1 + (1 - rho) (1 - MS-SSIM), eq. 11 with nu = 1: (B,).   [P:(11)]"""
        mae = (x - x_tilde).abs().mean(dim=(1, 2, 3))
        return self.rho * mae + (1 - self.rho) * (1 - ms_ssim(x, x_tilde, **setting(x.shape[-1])))

    def phases(self, images: np.ndarray) -> Iterator[Training]:
        def terms(x: Tensor, generator: torch.Generator, step: int) -> Terms:
            self.networks.train()
            return {"rec": self.error(x, self.reconstruct(x)).mean()}

        adam = torch.optim.Adam(self.networks.parameters(), self.lr)
        yield Training(self, self.kind, images, terms, adam, epochs=self.epochs)

    def score_batch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The residual map of its scales, and eq. 11 of the image."""
        x_tilde = self.reconstruct(x)
        maps = residual_map(x, x_tilde, **setting(x.shape[-1]), rho=self.rho)
        return maps, self.error(x, x_tilde)
