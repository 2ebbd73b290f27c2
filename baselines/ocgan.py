"""OCGAN: a denoising auto-encoder whose whole latent space shows healthy images.   [P:Tab.1]

Perera et al., "OCGAN: One-class Novelty Detection Using GANs with Constrained Latent
Representations", CVPR 2019: `[O:...]`, `[O:code]` its authors' code.
Sizes: B images, S pixels a side, Z latent features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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


def real(logits: Tensor) -> Tensor:
    """-E log D, D the sigmoid of the logits."""
    return F.softplus(-logits).mean()


def fake(logits: Tensor) -> Tensor:
    """-E log (1 - D)."""
    return F.softplus(logits).mean()


def mine(s: Tensor, classify: Callable[[Tensor], Tensor], steps: int, length: float) -> Tensor:
    """Latents whose images the classifier takes for fakes.   [O:§3.4] [P!§4.4.1 R27]

    Informative negatives, by gradient ascent of -log C(De(s)); each step moves every feature by
    `length` and stays in the latent space.

    s: (B, Z) in [-1, 1].   classify: s -> logits (B,) of C(De(s)).   returns: (B, Z) in [-1, 1].
    """
    for _ in range(steps):
        s = s.detach().requires_grad_()
        (uphill,) = torch.autograd.grad(F.softplus(-classify(s)).sum(), s)
        s = (s + length * uphill.sign()).clamp(-1, 1)
    return s.detach()


@contextlib.contextmanager
def unrecorded(network: nn.Module) -> Iterator[None]:
    """Batch norm uses the batch, and leaves its running averages, used for scoring, as they are."""
    norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.track_running_stats = False
    yield
    for norm in norms:
        norm.track_running_stats = True


@dataclass(eq=False)
class OCGAN(Detector):
    """Auto-encoder with tanh latent, discriminators of latents and images, and a classifier."""

    kind: ClassVar[str] = "ocgan"
    zero: ClassVar[set[str]] = {"seed", "noise", "mining_steps"}
    quick: ClassVar[dict[str, Any]] = {"epochs": 15, "batch_size": 16, "width": 12, "lr": 1e-3}
    epochs: int = 500  #                                                      [P!§4.4.1 R27]
    batch_size: int = 32
    lr: float = 2e-4  # of Adam with betas 0.5 and 0.999                      [P!§4.4.1 R27]
    latent: int = 288  # Z                                                          [O:§4.1]
    noise: float = 0.1  # deviation of what is added to images in [0, 1]          [O:code]
    weight: float = 40.0  # of the squared error: 10 for images in [-1, 1]          [O:§3.5]
    mining_steps: int = 5  #                                                        [O:§3.4]
    mining_length: float = 0.05  #                                            [P!§4.4.1 R27]

    def build(self, start: Any) -> dict[str, nn.Module]:
        sides = [self.latent, 128, 64, 32, 16]  #                                   [O:§4.1]
        layers = [
            part
            for a, b in zip(sides, sides[1:], strict=False)
            for part in (nn.Linear(a, b), nn.LeakyReLU(0.2))
        ]
        size, width = self.image_size, self.width
        return {
            "encoder": nn.Sequential(convolutions(size, width, self.latent), nn.Tanh()),
            "decoder": deconvolutions(self.latent, size, width),
            "latent": nn.Sequential(*layers, nn.Linear(16, 1)),
            "visual": convolutions(size, max(1, width // 5), 1, norm=False),  # 12 of 64  [O:§4.1]
            "classifier": convolutions(size, width, 1, norm=False),
        }

    def phases(self, images: np.ndarray) -> Iterator[Training]:
        adam = torch.optim.Adam(self.networks.parameters(), self.lr, betas=(0.5, 0.999))
        yield Training(self, self.kind, images, self.terms, adam, epochs=self.epochs)

    def terms(self, x: Tensor, draws: torch.Generator, step: int) -> Terms:
        """10 l_MSE + l_latent + l_visual of the auto-encoder; the discriminators'.   [O:§3.5]

        l_MSE = E |x - De(En(x + n))|^2 on images in [-1, 1], so 40 times that of [0, 1]. D_l tells
        s ~ U(-1, 1) from z = En(x + n), D_v x from De(s), C De(z) from De(s); the auto-encoder is
        to fool D_v with De(s*), s* mined from s.
        """
        encoder, decoder, of_latent, of_image, classifier = self.networks.train().children()
        s = 2 * torch.rand(len(x), self.latent, generator=draws).to(x.device) - 1
        if not x.is_cpu:  # so many numbers are drawn where they are used
            draws = torch.Generator(x.device).manual_seed(
                int(torch.randint(2**62, (), generator=draws))
            )
        n = self.noise * torch.randn(x.shape, generator=draws, device=x.device)
        with autocast(x.device), frozen(of_latent, of_image, classifier):
            z = encoder(x + n)
            x_tilde = decoder(z)
            with unrecorded(decoder):  # what follows decodes no image's latent
                with frozen(decoder):
                    length, classify = self.mining_length, lambda s: classifier(decoder(s))[:, 0]
                    mined = mine(s, classify, self.mining_steps, length)
                drawn = decoder(mined)
                with torch.no_grad():
                    negative = decoder(s)
            terms = {
                "rec": self.weight * (x - x_tilde.float()).square().mean(),
                "latent": real(of_latent(z)),
                "visual": real(of_image(drawn)),
            }
        with autocast(x.device):
            terms["latent_discriminator"] = real(of_latent(s)) + fake(of_latent(z.detach()))
            terms["visual_discriminator"] = real(of_image(x)) + fake(of_image(negative))
            terms["classifier"] = real(classifier(x_tilde.detach())) + fake(classifier(negative))
        return {name: term.float() for name, term in terms.items()}

    def reconstruct(self, x: Tensor) -> Tensor:
        """De(En(x)), without noise: (B, 3, S, S) in [0, 1] -> (B, 3, S, S) in [0, 1]."""
        with autocast(x.device):
            return self.networks["decoder"](self.networks["encoder"](x)).float()

    def score_batch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x - De(En(x)))^2 pixel by pixel, and its mean.   [O:§3.5]"""
        return squared_error(x, self.reconstruct(x))
