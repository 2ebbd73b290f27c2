"""ADGAN: a dual GAN, images from latents and latents from images.   [P:Tab.1]

Liu et al., "Photoshopping Colonoscopy Video Frames", ISBI 2020, whose "two generators and two
discriminators" are read as a generator and a discriminator in either space, tied by both ways there
and back.   [P!§4.4.1 R28]   Sizes: B images, S pixels a side, Z features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.steps import (
    Detector,
    Terms,
    Training,
    autocast,
    convolutions,
    deconvolutions,
    frozen,
    squared_error,
)


def adversarial(of_real: Tensor, of_fake: Tensor) -> Tensor:
    """-E log D(real) - E log (1 - D(fake)), D the sigmoid of the logits.   [P!§4.4.1 R28]"""
    return F.softplus(-of_real).mean() + F.softplus(of_fake).mean()


def cycle(x: Tensor, x_tilde: Tensor, z: Tensor, z_tilde: Tensor) -> tuple[Tensor, Tensor]:
    """E |x - G_x(G_z(x))| and E |z - G_z(G_x(z))|, means over all elements.   [P!§4.4.1 R28]"""
    return (x - x_tilde).abs().mean(), (z - z_tilde).abs().mean()


@dataclass(eq=False)
class ADGAN(Detector):
    """Generators G_z of latents and G_x of images; discriminators D_z and D_x."""

    kind: ClassVar[str] = "adgan"
    quick: ClassVar[dict[str, Any]] = {"epochs": 15, "batch_size": 16, "width": 12, "lr": 1e-3}
    epochs: int = 500  #                                                      [P!§4.4.1 R28]
    batch_size: int = 32
    lr: float = 2e-4  # of Adam with betas 0.5 and 0.999                      [P!§4.4.1 R28]
    latent: int = 128  # Z, normal                                            [P!§4.4.1 R28]
    weight_x: float = 10.0  # of images there and back                        [P!§4.4.1 R28]
    weight_z: float = 1.0  # of latents there and back                        [P!§4.4.1 R28]

    def build(self, start: Any) -> dict[str, nn.Module]:
        size, width = self.image_size, self.width
        discriminator = nn.Sequential(
            nn.Linear(self.latent, 128), nn.LeakyReLU(0.2),
            nn.Linear(128, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1),
        )  # fmt: skip
        return {
            "to_latent": convolutions(size, width, self.latent),
            "to_image": deconvolutions(self.latent, size, width),
            "of_latent": discriminator,
            "of_image": convolutions(size, width, 1, norm=False),
        }

    def phases(self, images: np.ndarray) -> Iterator[Training]:
        adam = torch.optim.Adam(self.networks.parameters(), self.lr, betas=(0.5, 0.999))
        yield Training(self, self.kind, images, self.terms, adam, epochs=self.epochs)

    def terms(self, x: Tensor, draws: torch.Generator, step: int) -> Terms:
        """Both cycles, -E log D of both generators' outputs, and the discriminators' losses."""
        to_latent, to_image, of_latent, of_image = self.networks.train().children()
        z = torch.randn(len(x), self.latent, generator=draws).to(x.device)
        with autocast(x.device), frozen(of_latent, of_image):
            z_x, x_z = to_latent(x), to_image(z)
            x_tilde, z_tilde = to_image(z_x), to_latent(x_z)
            back_x, back_z = cycle(x, x_tilde.float(), z, z_tilde.float())
            terms = {
                "x": self.weight_x * back_x,
                "z": self.weight_z * back_z,
                "to_latent": F.softplus(-of_latent(z_x)).mean(),
                "to_image": F.softplus(-of_image(x_z)).mean(),
            }
        with autocast(x.device):
            terms["of_latent"] = adversarial(of_latent(z), of_latent(z_x.detach()))
            terms["of_image"] = adversarial(of_image(x), of_image(x_z.detach()))
        return {name: term.float() for name, term in terms.items()}

    def reconstruct(self, x: Tensor) -> Tensor:
        """G_x(G_z(x)): (B, 3, S, S) in [0, 1] -> (B, 3, S, S) in [0, 1]."""
        with autocast(x.device):
            return self.networks["to_image"](self.networks["to_latent"](x)).float()

    def score_batch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x - x~)^2 pixel by pixel, and its mean."""
        return squared_error(x, self.reconstruct(x))
