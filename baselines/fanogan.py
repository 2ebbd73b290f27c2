"""f-AnoGAN: a WGAN of healthy images, then an encoder into its latent space.   [P:Tab.1]

Schlegl et al., "f-AnoGAN: Fast unsupervised anomaly detection with generative adversarial
networks", Medical Image Analysis 54, 2019: `[F:...]`, `[F:code]` its authors' code. The gradient
penalty is Gulrajani et al.'s, 2017. Images are 2 x - 1 to all networks, in [-1, 1].
Sizes: B images, S pixels a side, Z latent features, C features of the critic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.steps import Detector, Terms, Training, autocast, frozen, widths


def gradient_penalty(
    critic: Callable[[Tensor], Tensor], x: Tensor, fake: Tensor, mix: Tensor
) -> Tensor:
    """E (|grad D(x^)|_2 - 1)^2, x^ = x + mix (fake - x).   [F:WGAN-GP]

    critic: (B, 3, S, S) -> (B,), each image for itself.   x, fake: (B, 3, S, S), without gradient.
    mix:    (B,) in [0, 1].   returns: scalar, with a gradient for the critic.
    """
    between = torch.lerp(x, fake, mix[:, None, None, None]).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


def residuals(x: Tensor, x_tilde: Tensor, f: Tensor, f_tilde: Tensor) -> tuple[Tensor, Tensor]:
    """1/n |x - G(E(x))|^2 and 1/n_d |f(x) - f(G(E(x)))|^2: (B,) each.   [F:izi_f]

    x, x_tilde: (B, 3, S, S).   f, f_tilde: (B, C) of the critic, before its last layer.
    """
    image = (x - x_tilde).square().mean(dim=(1, 2, 3))
    return image, (f - f_tilde).square().mean(dim=1)


class Block(nn.Module):
    """Residual block that doubles (up) or halves the side.   [F:code]

    norm: of its two inputs; one of each image alone for the critic.
    """

    def __init__(self, inputs: int, outputs: int, norm: Callable[[int], nn.Module], *, up: bool):
        super().__init__()
        hidden = outputs if up else inputs
        self.up, self.norm1, self.norm2 = up, norm(inputs), norm(hidden)
        self.conv1 = nn.Conv2d(inputs, hidden, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(hidden, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        if self.up:
            y = self.conv2(F.relu(self.norm2(self.conv1(F.interpolate(y, scale_factor=2)))))
            return y + F.interpolate(self.shortcut(x), scale_factor=2)
        y = F.avg_pool2d(self.conv2(F.relu(self.norm2(self.conv1(y)))), 2)
        return y + self.shortcut(F.avg_pool2d(x, 2))


def downwards(
    size: int, width: int, outputs: int, norm: Callable[[int], nn.Module]
) -> nn.Sequential:
    """(B, 3, S, S) -> (B, outputs); all but the last layer give the critic's features f."""
    side, channels = widths(size, width)
    blocks = [Block(a, b, norm, up=False) for a, b in zip(channels, channels[1:], strict=False)]
    last = nn.Linear(channels[-1] * side**2, outputs)
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), *blocks, nn.Flatten(), last)


def upwards(inputs: int, size: int, width: int) -> nn.Sequential:
    """(B, inputs) -> (B, 3, S, S) in [-1, 1]."""
    side, channels = widths(size, width)
    first = nn.Linear(inputs, channels[-1] * side**2)
    pairs = zip(channels[:0:-1], channels[-2::-1], strict=True)
    return nn.Sequential(
        first, nn.Unflatten(1, (channels[-1], side, side)),
        *(Block(a, b, nn.BatchNorm2d, up=True) for a, b in pairs),
        nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 3, 3, padding=1), nn.Tanh(),
    )  # fmt: skip


@dataclass(eq=False)
class FAnoGAN(Detector):
    """Generator and critic, then with both frozen the encoder (izi_f)."""

    kind: ClassVar[str] = "fanogan"
    quick: ClassVar[dict[str, Any]] = {
        "epochs": 15, "encoder_epochs": 15, "batch_size": 16, "width": 8, "critic_steps": 2,
        "lr": 5e-4, "encoder_lr": 5e-4,
    }  # fmt: skip
    epochs: int = 2000  # of the GAN                                          [P!§4.4.1 R26]
    encoder_epochs: int = 1000  # the code counts 50,000 steps                [P!§4.4.1 R26]
    batch_size: int = 64  #                                                         [F:code]
    lr: float = 1e-4  # of Adam with betas 0 and 0.9                                [F:code]
    encoder_lr: float = 5e-5  # of RMSProp                                          [F:code]
    latent: int = 128  # Z                                                          [F:code]
    critic_steps: int = 5  # for one of the generator                               [F:code]
    penalty: float = 10.0  #                                                        [F:code]
    kappa: float = 1.0  # weight of the critic's features                           [F:code]

    def build(self, start: Any) -> dict[str, nn.Module]:
        def of_image(channels: int) -> nn.Module:
            return nn.GroupNorm(1, channels)

        return {
            "generator": upwards(self.latent, self.image_size, self.width),
            "critic": downwards(self.image_size, self.width, 1, of_image),
            "encoder": nn.Sequential(
                downwards(self.image_size, self.width, self.latent, nn.BatchNorm2d), nn.Tanh()
            ),
        }

    def phases(self, images: np.ndarray) -> Iterator[Training]:
        generator, critic, encoder = self.networks.values()
        weights = [*generator.parameters(), *critic.parameters()]
        adam = torch.optim.Adam(weights, self.lr, betas=(0.0, 0.9))
        yield Training(self, self.kind, images, self.gan_terms, adam, epochs=self.epochs)
        rmsprop = torch.optim.RMSprop(encoder.parameters(), self.encoder_lr, alpha=0.9)
        title, epochs = f"{self.kind} encoder", self.encoder_epochs
        yield Training(self, title, images, self.encoder_terms, rmsprop, epochs=epochs)

    def gan_terms(self, x: Tensor, draws: torch.Generator, step: int) -> Terms:
        """E D(G(z)) - E D(x) + 10 penalty for D, -E D(G(z)) for G in each fifth step.   [F:WGAN-GP]

        The penalty is float32 also on a GPU: its gradient is a second derivative.
        """
        self.networks.train()
        generator, critic, _ = self.networks.values()
        x, z = 2 * x - 1, torch.randn(len(x), self.latent, generator=draws).to(x.device)
        mix = torch.rand(len(x), generator=draws).to(x.device)
        with (
            torch.set_grad_enabled(step % self.critic_steps == self.critic_steps - 1),
            autocast(x.device), frozen(critic),
        ):  # fmt: skip
            fake = generator(z)
            fooled = critic(fake)[:, 0]
        fake = fake.detach().float()
        with autocast(x.device):
            of_x, of_fake = critic(torch.cat([x, fake]))[:, 0].float().chunk(2)
        penalty = gradient_penalty(lambda y: critic(y)[:, 0], x, fake, mix)
        return {
            "critic": of_fake.mean() - of_x.mean(),
            "penalty": self.penalty * penalty,
            "generator": -fooled.float().mean(),
        }

    def look(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """G(E(x)) and the critic's f(x) and f(G(E(x))); x in [-1, 1]."""
        generator, critic, encoder = self.networks.values()
        with autocast(x.device), frozen(generator, critic):
            x_tilde = generator(encoder(x))
            f, f_tilde = critic[:-1](torch.cat([x, x_tilde])).float().chunk(2)  # type: ignore[index]
        return x_tilde.float(), f, f_tilde

    def encoder_terms(self, x: Tensor, draws: torch.Generator, step: int) -> Terms:
        """E [residual of images + kappa residual of features].   [F:izi_f]"""
        self.networks.eval()["encoder"].train()  # type: ignore[index]
        image, features = residuals(2 * x - 1, *self.look(2 * x - 1))
        return {"image": image.mean(), "features": self.kappa * features.mean()}

    def reconstruct(self, x: Tensor) -> Tensor:
        """G(E(x)): (B, 3, S, S) in [0, 1] -> (B, 3, S, S) in [0, 1]."""
        return (self.look(2 * x - 1)[0] + 1) / 2

    def score_batch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """|x - G(E(x))| pixel by pixel; both residuals, kappa times that of features.   [F:A]"""
        x = 2 * x - 1
        x_tilde, f, f_tilde = self.look(x)
        image, features = residuals(x, x_tilde, f, f_tilde)
        return (x - x_tilde).abs().mean(dim=1), image + self.kappa * features
