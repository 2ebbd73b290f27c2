"""IGD on pre-trained encoders: eq. 10-12 with global and local auto-encoders.   [P:§3.3]

IGD is Chen et al., "Deep One-Class Classification via Interpolated Gaussian Descriptor", 2022,
`[I:...]`; the critic of interpolations is Berthelot et al.'s, 2019 (ACAI). The networks are in
autoencoder.py, MS-SSIM in ssim.py, the pre-training of the two encoders in pmsacl.py.

Sizes: N training images, B images or patches, S pixels a side, L patches an image,
Z = 128 features of the latent space.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable
from dataclasses import KW_ONLY, InitVar, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn

from autoencoder import AutoEncoder, critic
from encoder import ResNet18, channels_last, to_unit
from patches import PATCH
from ssim import ms_ssim, residual_map, setting
from support.run import Meter, autocast, epoch_order, generator, read_saved, save_atomically

CPU_PIXELS, GPU_PIXELS = 2**18, 2**23  # B S^2 that are scored at once


# --- section 3.3, in its order -------------------------------------------------------------------


def anomaly_score(rec: Tensor, h: Tensor, *, xi: float) -> Tensor:
    """s_IGD = xi l_rec + (1 - xi) h.   [P!(10) R7]

    The paper prints (1 - xi)(1 - h) but its h is 1 - exp(-d^2 / sigma^2), which is near 1 far from
    the normal images: as printed, a far sample would rank as normal.

    rec, h:  (...) of eq. 11 and 12.
    returns: (...), larger is more abnormal.
    """
    return xi * rec + (1 - xi) * h


def reconstruction_error(
    x: Tensor,
    x_tilde: Tensor,
    m_global: Tensor | float = 0.0,
    m_local: Tensor | float = 0.0,
    *,
    rho: float = 0.15,
    nu: float,
) -> Tensor:
    """l_rec = rho |x - x~|_1 + (1 - rho) (1 - (nu m_G + (1 - nu) m_L)).   [P:(11)]

    The norm is the mean over pixels, as in IGD's code. The global model is trained and scored with
    nu = 1, the local one with nu = 0.

    x, x_tilde:        (B, 3, S, S) in [0, 1].
    m_global, m_local: (B,) MS-SSIM of the two.
    returns:           (B,).
    """
    mae = (x - x_tilde).abs().mean(dim=(1, 2, 3))
    return rho * mae + (1 - rho) * (1 - (nu * m_global + (1 - nu) * m_local))


def anomaly_likelihood(z: Tensor, mu: Tensor, sigma2: Tensor | float) -> Tensor:
    """l_h = h_psi(z) = 1 - exp(-|z - mu|^2 / sigma^2).   [P:(12) P!§3.3 R7]

    z:       (B, Z) of f_theta; mu (Z,), sigma2 scalar.
    returns: (B,) in [0, 1]: the likelihood that x is abnormal, and the loss of a normal x.
    """
    return -torch.expm1(-(z - mu).square().sum(dim=1) / sigma2)


def gaussian(batches: Iterable[Tensor], kappa: float) -> tuple[Tensor, Tensor]:
    """mu = 1/N sum_i z_i and sigma^2 = kappa/N sum_i |z_i - mu|^2.   [P:§3.3]

    batches: of z (B, Z), summed in float64: one pass.
    kappa:   in (0, 1].
    returns: mu (Z,) and sigma2 (), float32; sigma2 is at least 1e-6, for equal z.
    """
    count, total, square = 0, torch.zeros(()), torch.zeros(())
    for z in batches:
        z = z.double()
        if count == 0:
            shift = z.mean(dim=0)  # against cancellation
        count += len(z)
        total = total + (z - shift).sum(dim=0)
        square = square + (z - shift).square().sum()
    mean = total / count
    sigma2 = kappa * (square / count - mean.square().sum())
    return (shift + mean).float(), sigma2.float().clamp(min=1e-6)


def interpolate(z: Tensor, alpha: Tensor) -> Tensor:
    """z_alpha = alpha z + (1 - alpha) z', z' the batch in reverse.   [I:interpolation]

    z: (B, Z).   alpha: (B,) in [0, 0.5].
    """
    return alpha[:, None] * z + (1 - alpha)[:, None] * z.flip(0)


def critic_loss(of_mixture: Tensor, alpha: Tensor, of_blend: Tensor) -> Tensor:
    """E (d(g(z_alpha)) - alpha)^2 + E d(gamma x + (1 - gamma) x~)^2: tell how mixed.   [I:critic]

    of_mixture, alpha, of_blend: (B,).   returns: scalar.
    """
    return (of_mixture - alpha).square().mean() + of_blend.square().mean()


# --- patches of an image -------------------------------------------------------------------------


def unfold(x: Tensor, stride: int) -> Tensor:
    """All 32 px patches, row by row: (B, C, S, S) -> (B L, C, 32, 32).   [P:§4.2]"""
    patches = x.unfold(2, PATCH, stride).unfold(3, PATCH, stride)  # (B, C, rows, columns, 32, 32)
    return patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, x.shape[1], PATCH, PATCH)


def fold(patches: Tensor, size: int, stride: int) -> Tensor:
    """Maps that are the mean of the patches over each pixel.

    patches: (B, L, 32, 32), or (B, L, 1, 1) for one value a patch.
    returns: (B, S, S).
    """
    columns = patches.expand(-1, -1, PATCH, PATCH).flatten(2).mT  # (B, 1024, L)
    total = F.fold(columns, size, PATCH, stride=stride)
    return (total / F.fold(torch.ones_like(columns[:1]), size, PATCH, stride=stride))[:, 0]


# --- training and scoring ------------------------------------------------------------------------


@dataclass(eq=False)
class IGD:
    """The detector: a global auto-encoder of images, and a local one of their 32 px patches.

    backbone: pre-trained ResNet-18 of whole images; copied, and fine-tuned by `fit`.
    local:    the same of 32 px patches. None: global model only, as the paper's 64 px setting.
    """

    backbone: InitVar[ResNet18]
    local: InitVar[ResNet18 | None] = None
    _: KW_ONLY
    image_size: int = 256  # S, pixels                                          [P:§4.2]
    epochs: int = 256  # of the global model                                    [I:code]
    local_epochs: int = 256  # of the local model, over all patches             [I:code]
    batch_size: int = 16  # images in a step of the global model
    patches: int = 450  # in a step of the local model: 2 x 225                 [I:code]
    stride: int = 16  # pixels between patches                                  [I:code]
    width: int = 64  # channels of decoder and critic at full size              [I:code]
    lr: float = 1e-4  # of Adam, at the start                                   [I:code]
    encoder_lr: float = 1e-4  # the same, of the pre-trained encoder            [I:code]
    rho: float = 0.15  # weight of the absolute error                           [P:(11)]
    kappa: float = 1.0  # of sigma^2                                            [P:§3.3]
    sigma2_least: float = 1.0  # sigma^2 is never less                          [I:code]
    interval: int = 10  # epochs between estimates of mu and sigma^2            [I:code]
    warmup: float = 0.0  # share of the global model's epochs without eq. 12    [R21]
    critic_weight: float = 0.1  #                                               [I:code]
    gamma: float = 0.2  # share of x in the critic's blend                      [I:code]
    xi_global: float = 0.1  # share of l_rec in the score                       [P:(10)]
    xi_local: float = 0.9  # the same, of a patch                               [P:(10)]
    heat_map: str = "patch"  # eq. 10 for each patch | "residual", the authors' code
    seed: int = 0

    def __post_init__(self, backbone: ResNet18, local: ResNet18 | None) -> None:
        self._check(local is not None)
        self.device = backbone.conv1.weight.device
        sizes = {"global": self.image_size, "local": PATCH}
        self.models: dict[str, AutoEncoder] = {}
        for i, (name, network) in enumerate((("global", backbone), ("local", local))):
            if network is not None:
                start = generator(self.seed, 20, i)
                model = AutoEncoder(network, sizes[name], self.width, start).to(self.device)
                channels_last(model.eval())
                self.models[name] = model
        self.log: dict[str, list[dict[str, float]]] = {name: [] for name in self.models}

    def _check(self, local: bool) -> None:
        if self.image_size < PATCH or (self.image_size - PATCH) % self.stride:
            raise ValueError(
                f"image_size must be {PATCH} plus a multiple of stride={self.stride}, "
                f"got {self.image_size}"
            )
        if local and self.image_size < 2 * PATCH:
            raise ValueError(f"a local model needs image_size >= 64, got {self.image_size}")
        if self.heat_map not in ("patch", "residual"):
            raise ValueError(f"heat_map must be 'patch' or 'residual', got {self.heat_map!r}")
        for name in ("rho", "kappa", "gamma", "xi_global", "xi_local", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("kappa", "lr", "encoder_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.sigma2_least < math.inf:
            raise ValueError(f"sigma2_least must be 0 or above, got {self.sigma2_least}")
        least = {"epochs": 1, "local_epochs": 1, "batch_size": 2, "patches": 2}
        least |= {"stride": 1, "width": 1, "interval": 1}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} must be {lowest} or above, got {getattr(self, name)}")

    # training

    def loss_terms(
        self, name: str, judge: nn.Module, x: Tensor, alpha: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """l_rec + l_h + 0.1 E d(g(z_alpha))^2, the loss of an auto-encoder.   [P:§3.3 P:(12)]

        name:    "global" or "local".
        judge:   the critic d.
        x:       (B, 3, S, S) images or patches.
        alpha:   (B,) coefficients, U(0, 0.5).
        returns: name -> scalar, whose sum is the loss; x~ and g(z_alpha), detached.
        """
        model = self.models[name]
        with autocast(x.device):
            z = model.encode(x)
            decoded = model.decode(torch.cat([z, interpolate(z, alpha)]))
            x_tilde, mixture = decoded.chunk(2)
            of_mixture = judge(mixture)
        terms = {
            "rec": self.error(name, x, x_tilde.float()).mean(),
            "h": anomaly_likelihood(z.float(), model.mu, model.sigma2).mean(),
            "critic": self.critic_weight * of_mixture.float().square().mean(),
        }
        return terms, x_tilde.detach(), mixture.detach()

    def error(self, name: str, x: Tensor, x_tilde: Tensor) -> Tensor:
        """Eq. 11 for one of the two models: (B,)."""
        m = ms_ssim(x, x_tilde, **setting(x.shape[-1]))
        m_global, m_local = (m, 0.0) if name == "global" else (0.0, m)
        nu = float(name == "global")
        return reconstruction_error(x, x_tilde, m_global, m_local, rho=self.rho, nu=nu)

    def fit(
        self,
        images: ArrayLike | Tensor,
        *,
        checkpoint: str | Path | None = None,
        save_every: float = 60.0,
    ) -> IGD:
        """Train the global model on the images, then the local one on their patches.

        Each step's draws come from (seed, step): a fit that was stopped and started again with the
        same checkpoint ends with the same weights, bit for bit.

        images:     (N, 3, S, S), N >= 2, uint8 (a memory-map is read batch by batch) or in [0, 1].
        checkpoint: file to go on from and to save to; the local model's gets "_local" in its name.
        save_every: seconds between checkpoints.
        raises:     FloatingPointError when a loss is not finite; the last good checkpoint stays.
        """
        images = self._checked(images)
        if len(images) < 2:
            raise ValueError(f"IGD needs N >= 2 training images, got N={len(images)}")
        for name in self.models:
            path = None if checkpoint is None else Path(checkpoint)
            if path is not None and name == "local":
                path = path.with_stem(f"{path.stem}_local")
            Training(self, name, images, path).run(save_every)
        return self

    # scoring

    @torch.no_grad()
    def score(self, images: ArrayLike | Tensor) -> tuple[Tensor, Tensor]:
        """Heat maps and scores of eq. 10: half the local and half the global model's.   [P!(10) R7]

        An image's local score is the largest of its patches.   [I:code]

        images:  (B, 3, S, S), uint8 or in [0, 1].
        returns: maps (B, S, S) and scores (B,), float32.
        raises:  ValueError before fit, or for another shape.
        """
        images = self._checked(images)
        if any(model.sigma2.isnan() for model in self.models.values()):
            raise ValueError("IGD has to be fitted or loaded before it scores")
        maps = torch.empty(len(images), *images.shape[2:], device=self.device)
        scores = torch.empty(len(images), device=self.device)
        step = self._at_once(self.image_size)
        for k in range(0, len(images), step):
            x = to_unit(images[k : k + step], self.device)
            parts = [self._score(name, x) for name in self.models]
            maps[k : k + step] = torch.stack([m for m, _ in parts]).mean(dim=0)
            scores[k : k + step] = torch.stack([s for _, s in parts]).mean(dim=0)
        return maps, scores

    def _score(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (B, S, S) and scores (B,) of one of the models."""
        b, size = len(x), x.shape[-1]
        y = x if name == "global" else unfold(x, self.stride)  # (B, ...) or (B L, 3, 32, 32)
        xi = self.xi_global if name == "global" else self.xi_local
        z, y_tilde = self._pass(name, y)
        h = anomaly_likelihood(z, self.models[name].mu, self.models[name].sigma2)
        s = anomaly_score(self.error(name, y, y_tilde), h, xi=xi)
        scores = s.view(b, -1).amax(dim=1)
        if self.heat_map == "residual":
            r = residual_map(y, y_tilde, **setting(y.shape[-1]), rho=self.rho)
            return (
                r if name == "global" else fold(r.unflatten(0, (b, -1)), size, self.stride)
            ), scores
        if name == "global":  # eq. 10 of each patch x_w, with the xi of patches
            rec = self.error(name, unfold(x, self.stride), unfold(y_tilde, self.stride))
            s = anomaly_score(rec.view(b, -1), h[:, None], xi=self.xi_local)  # (B, L)
        return fold(s.view(b, -1, 1, 1), size, self.stride), scores

    @torch.no_grad()
    def reconstruct(self, images: ArrayLike | Tensor) -> Tensor:
        """x~ of the global model: (B, 3, S, S) in [0, 1]."""
        return self._pass("global", to_unit(self._checked(images), self.device))[1]

    def _pass(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """z (B, Z) and x~ (B, 3, S, S), as many at once as memory likes."""
        model, z, x_tilde = self.models[name], [], []
        for part in x.split(self._at_once(x.shape[-1])):
            z.append(model.encode(part))
            x_tilde.append(model.decode(z[-1]).contiguous())
        return torch.cat(z), torch.cat(x_tilde)

    def _at_once(self, size: int) -> int:
        pixels = CPU_PIXELS if self.device.type == "cpu" else GPU_PIXELS
        return max(1, pixels // size**2)

    def _checked(self, images: ArrayLike | Tensor) -> np.ndarray:
        images = images.cpu().numpy() if isinstance(images, Tensor) else np.asanyarray(images)
        if images.ndim != 4 or images.shape[1:] != (3, self.image_size, self.image_size):
            s = self.image_size
            raise ValueError(f"images must be (N, 3, {s}, {s}), got {tuple(images.shape)}")
        return images

    # files

    def settings(self) -> dict[str, Any]:
        """Every argument but the networks."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "_"}

    def save(self, path: str | Path) -> None:
        """One file that holds everything; it appears when it is complete."""
        models = {name: model.state_dict() for name, model in self.models.items()}
        save_atomically({"kind": "igd", "settings": self.settings(), "models": models}, Path(path))

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> IGD:
        """What `save` wrote, on a device.   raises: ValueError if the file is another's."""
        return cls.of(read_state(path, device, "igd"), device)

    @classmethod
    def of(cls, state: dict[str, Any], device: torch.device | str) -> IGD:
        """The detector of what `save` wrote."""
        local = ResNet18().to(device) if "local" in state["models"] else None
        detector = cls(ResNet18().to(device), local, **state["settings"])
        for name, model in detector.models.items():
            model.load_state_dict(state["models"][name])
        return detector


def read_state(path: str | Path, device: torch.device | str, kind: str = "") -> dict[str, Any]:
    """What a detector's file holds.

    raises: OSError if it cannot be opened, ValueError if it is no detector, or of another kind.
    """
    state = read_saved(path, "detector", device)
    if not isinstance(state, dict) or "kind" not in state:
        raise ValueError(f"{path}: not a detector file")
    if kind and state["kind"] != kind:
        raise ValueError(f"{path}: holds a detector of kind {state['kind']!r}, not {kind!r}")
    return state


class Training:
    """The training of one of IGD's two models: Adam, with a polynomial decay.   [I:code]"""

    def __init__(self, igd: IGD, name: str, images: np.ndarray, path: Path | None) -> None:
        self.igd, self.name, self.images, self.path = igd, name, images, path
        self.model = igd.models[name]
        size, start = (igd.image_size if name == "global" else PATCH), generator(igd.seed, 21)
        self.judge = channels_last(critic(size, igd.width, start).to(igd.device))
        self.places = (igd.image_size - PATCH) // igd.stride + 1  # of patches, a side
        self.count = len(images) * (1 if name == "global" else self.places**2)
        self.batch = min(igd.batch_size if name == "global" else igd.patches, self.count)
        self.steps = self.count // self.batch  # an epoch; the last partial batch is left out
        self.epochs = igd.epochs if name == "global" else igd.local_epochs
        self.total = self.steps * self.epochs
        self.warmup = round(igd.warmup * igd.epochs) if name == "global" else 0  # epochs

        def adam(network: nn.Module, lr: float, decay: float = 1e-6) -> torch.optim.Adam:
            weights = [{"params": list(network.parameters()), "initial_lr": lr}]
            return torch.optim.Adam(weights, betas=(0.0, 0.9), weight_decay=decay, fused=True)

        self.optimisers = {
            "encoder": adam(self.model.backbone, igd.encoder_lr),
            "model": adam(nn.ModuleList([self.model.linear, self.model.decoder]), igd.lr),
            "judge": adam(self.judge, igd.lr, decay=0.0),
        }
        self.step_done, self.sums, self.log = 0, dict[str, float](), igd.log[name]

    def run(self, save_every: float) -> None:
        """All steps, from the checkpoint on if there is one."""
        if self.path is not None and self.path.exists():
            self.load(self.path)
        meter = Meter(self.step_done, self.total, self.batch, self.igd.device)
        saved = time.monotonic()
        while self.step_done < self.total:
            epoch, position = divmod(self.step_done, self.steps)
            since = epoch - self.warmup  # epochs with eq. 12
            if position == 0 and (epoch == 0 or (since >= 0 and since % self.igd.interval == 0)):
                self.estimate()
            means = self.step(epoch, position)
            last = position + 1 == self.steps
            where = f"IGD {self.name} epoch {epoch + 1}/{self.epochs}"
            meter.show(self.step_done, where, means, last=last)
            if last:
                self.log.append({"epoch": epoch + 1, **means, "images_per_second": meter.rate})
                self.sums = {}
            due = self.step_done == self.total or time.monotonic() - saved > save_every
            if due and self.path is not None:
                self.save(self.path)
                saved = time.monotonic()
        self.model.eval()
        if self.warmup == self.epochs:  # eq. 12 never joined
            self.estimate()

    def step(self, epoch: int, position: int) -> dict[str, float]:
        """One of the auto-encoder and one of the critic; the epoch's mean terms so far."""
        igd, decay = self.igd, (1 - self.step_done / self.total) ** 0.9
        for optimiser in self.optimisers.values():
            optimiser.zero_grad(set_to_none=True)
            for group in optimiser.param_groups:
                group["lr"] = decay * group["initial_lr"]
        self.model.train()
        # eq. 12 shall gather the z that score: averages of small batches leave some of them far out
        self.model.backbone.train(epoch < self.warmup)
        draws = generator(igd.seed, 22, self.step_done)
        x = self.take(self.order(epoch)[position * self.batch : (position + 1) * self.batch])
        alpha = (0.5 * torch.rand(len(x), generator=draws)).to(x.device)  # (B,)

        self.judge.requires_grad_(False)
        terms, x_tilde, mixture = igd.loss_terms(self.name, self.judge, x, alpha)
        # z that eq. 12 gathers before the decoder reads it stays one point, and x~ one image
        used = [term for key, term in terms.items() if key != "h" or epoch >= self.warmup]
        torch.stack(used).sum().backward()
        self.judge.requires_grad_(True)
        blend = igd.gamma * x + (1 - igd.gamma) * x_tilde
        with autocast(x.device):
            of_mixture, of_blend = self.judge(torch.cat([mixture, blend])).chunk(2)
        terms["judge"] = critic_loss(of_mixture.float(), alpha, of_blend.float())
        terms["judge"].backward()

        for name, term in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(term.detach())
        if not all(map(math.isfinite, self.sums.values())):
            raise FloatingPointError(
                f"IGD {self.name}: the loss is not finite at epoch {epoch + 1}, step "
                f"{position + 1} ({', '.join(f'{k} {v:.3g}' for k, v in self.sums.items())}); "
                f"lower lr={igd.lr:g}. {self._kept()}"
            )
        for optimiser in self.optimisers.values():
            optimiser.step()
        self.step_done += 1
        means = {name: value / (position + 1) for name, value in self.sums.items()}
        return means | {"lr": decay * igd.lr}

    def order(self, epoch: int) -> np.ndarray:
        """The images, or all patches of all images, in an epoch's order."""
        return epoch_order(self.count, self.igd.seed, 23, epoch)

    def take(self, ids: np.ndarray) -> Tensor:
        """Images, or patches: number i is place i mod L of image i div L."""
        ids = np.sort(ids)  # neighbours in the memory-map together
        if self.name == "global":
            return to_unit(self.images[ids], self.igd.device)
        image, place = np.divmod(ids, self.places**2)
        corner = self.igd.stride * np.stack(np.divmod(place, self.places))  # (2, B): y, x
        rows, columns = corner[:, :, None] + np.arange(PATCH)  # (B, 32) each
        at = image[:, None, None, None], np.arange(3)[:, None, None]
        patches = self.images[*at, rows[:, None, :, None], columns[:, None, None, :]]
        return to_unit(patches, self.igd.device)

    @torch.no_grad()
    def estimate(self) -> None:
        """mu and sigma^2 over all training images or patches.   [P!§3.3 R21]

        Scores have the last ones that eq. 12 was trained with, as in IGD's code.

        Eq. 12 pulls z together, so sigma^2 shrinks from one estimate to the next; a step of Adam
        then moves z by many sigma, and 1 - exp(.) saturates at 1, without a gradient. Hence a
        least value, as in IGD's code.
        """
        self.model.backbone.eval()
        batches = np.array_split(self.order(0), self.steps)
        mu, sigma2 = gaussian((self.model.encode(self.take(b)) for b in batches), self.igd.kappa)
        self.model.mu.copy_(mu)
        self.model.sigma2.copy_(sigma2.clamp(min=self.igd.sigma2_least))

    def _kept(self) -> str:
        kept = self.path is not None and self.path.exists()
        return f"The last good state is kept in {self.path}" if kept else "No state was saved yet"

    def save(self, path: Path) -> None:
        """raises: FloatingPointError, with the old file kept, if a weight is not finite."""
        networks = {"model": self.model, "judge": self.judge}
        if not all(p.isfinite().all() for n in networks.values() for p in n.parameters()):
            raise FloatingPointError(
                f"IGD {self.name}: a weight is not finite after step {self.step_done}; "
                f"lower lr={self.igd.lr:g}. {self._kept()}"
            )
        state = {
            "settings": self.igd.settings() | {"images": len(self.images)},
            "step": self.step_done,
            "sums": self.sums,
            "log": self.log,
            **{name: network.state_dict() for name, network in networks.items()},
            "optimisers": {name: o.state_dict() for name, o in self.optimisers.items()},
        }
        save_atomically(state, path)

    def load(self, path: Path) -> None:
        state = read_saved(path, "checkpoint", self.igd.device)
        want = self.igd.settings() | {"images": len(self.images)}
        changed = [k for k in want if state["settings"].get(k) != want[k]]
        if changed:
            raise ValueError(f"{path}: of a run with another {', '.join(changed)}; move it away")
        self.model.load_state_dict(state["model"])
        self.judge.load_state_dict(state["judge"])
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        self.step_done, self.sums = state["step"], state["sums"]
        self.log[:] = state["log"]
