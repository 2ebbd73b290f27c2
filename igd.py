"""IGD on pre-trained encoders: eq. 10-12 with global and local auto-encoders.   [P:§3.3]

IGD is Chen et al., "Deep One-Class Classification via Interpolated Gaussian Descriptor", 2022,
`[I:...]`. Its networks, the critic's loss and the Gaussian's mu and sigma^2 are in autoencoder.py.

Sizes: N training images, B images or patches, S pixels a side, L patches an image, Z = 128.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, InitVar, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn

from autoencoder import AutoEncoder, Group, critic, critic_loss, interpolate
from encoder import ResNet18, autocast, seeded, to_unit
from ssim import ms_ssim, residual_map, setting

PATCH = 32  # pixels a side of the local model's patches                            [P:§4.2]
CPU_PIXELS, GPU_PIXELS = 2**18, 2**23  # B S^2 that are scored at once
Track = Callable[[Iterable[int]], Iterable[int]]


def anomaly_score(rec: Tensor, h: Tensor, *, xi: float) -> Tensor:
    """s_IGD = xi l_rec + (1 - xi) h.   [P!(10) R7]

    The paper prints (1 - xi)(1 - h) but its h is 1 - exp(-d^2 / sigma^2), which is near 1 far from
    the normal images: as printed, a far sample would rank as normal.

    rec, h: (...) of eq. 11 and 12.   returns: (...), larger is more abnormal.
    """
    return xi * rec + (1 - xi) * h


def reconstruction_error(
    x: Tensor, x_tilde: Tensor, m_global: Tensor, m_local: Tensor, *, nu: float, rho: float = 0.15
) -> Tensor:
    """l_rec = rho |x - x~|_1 + (1 - rho) (1 - (nu m_G + (1 - nu) m_L)).   [P:(11)]

    The norm is the mean over pixels, as in IGD's code. The global model is trained and scored with
    nu = 1, the local one with nu = 0.

    x, x_tilde:        (B, 3, S, S) in [0, 1].
    m_global, m_local: (B,) MS-SSIM of the two.   returns: (B,).
    """
    mae = (x - x_tilde).abs().mean(dim=(1, 2, 3))
    return rho * mae + (1 - rho) * (1 - (nu * m_global + (1 - nu) * m_local))


def anomaly_likelihood(z: Tensor, mu: Tensor, sigma2: Tensor | float) -> Tensor:
    """l_h = h_psi(z) = 1 - exp(-|z - mu|^2 / sigma^2).   [P:(12) P!§3.3 R7]

    z:       (B, Z) of f_theta; mu (Z,), sigma2 scalar.
    returns: (B,) in [0, 1]: the likelihood that x is abnormal, and the loss of a normal x.
    """
    return -torch.expm1(-(z - mu).square().sum(dim=1) / sigma2)


def unfold(x: Tensor, stride: int) -> Tensor:
    """All 32 px patches, row by row: (B, C, S, S) -> (B L, C, 32, 32).   [P:§4.2]"""
    patches = x.unfold(2, PATCH, stride).unfold(3, PATCH, stride)  # (B, C, rows, columns, 32, 32)
    return patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, x.shape[1], PATCH, PATCH)


def fold(patches: Tensor, size: int, stride: int) -> Tensor:
    """Maps (B, S, S): at a pixel the mean of the patches (B, L, 32, 32), or values (B, L, 1, 1)."""
    columns = patches.expand(-1, -1, PATCH, PATCH).flatten(2).mT  # (B, 1024, L)
    total = F.fold(columns, size, PATCH, stride=stride)
    return (total / F.fold(torch.ones_like(columns[:1]), size, PATCH, stride=stride))[:, 0]


@dataclass(eq=False)
class IGD:
    """The detector: a global auto-encoder of images, and a local one of their 32 px patches.

    backbone: pre-trained `encoder.ResNet18` of whole images; copied, and fine-tuned by `fit`.
    local:    the same of 32 px patches. None: global model only, as the paper's 64 px setting.
    """

    backbone: InitVar[ResNet18]
    local: InitVar[ResNet18 | None] = None
    _: KW_ONLY
    image_size: int = 256  # S, pixels                                          [P:§4.2]
    epochs: int = 256  # of the global model                                    [I:code]
    local_epochs: int = 256  # of the local model, over all patches             [I:code]
    batch_size: int = 16  # images in a step of the global model
    patches: int = 450  # in a step of the local model, those of 2 images of 256 px [I:code]
    stride: int = 16  # pixels between patches                                  [I:code]
    width: int = 64  # channels of decoder and critic at full size              [I:code]
    lr: float = 1e-4  # of Adam, at the start                                   [I:code]
    encoder_lr: float = 1e-4  # of the encoder; 0 keeps it, as in [I:code]      [P!§3.3 R21]
    rho: float = 0.15  # weight of the absolute error                           [I:code]
    kappa: float = 1.0  # of sigma^2                                            [P:§3.3]
    sigma2_least: float = 1.0  # sigma^2 is never less                          [I:code]
    interval: int = 10  # epochs between estimates of mu and sigma^2            [I:code]
    warmup: float = 0.0  # share of the global epochs without eq. 12            [P!§3.3 R21]
    critic_weight: float = 0.1  #                                               [I:code]
    gamma: float = 0.2  # share of x in the critic's blend                      [I:code]
    xi_global: float = 0.1  # share of l_rec in the score                       [I:code]
    xi_local: float = 0.9  # the same, of a patch                               [I:code]
    heat_map: str = "patch"  # eq. 10 for each patch | "residual", the authors' code
    seed: int = 0

    def __post_init__(self, backbone: ResNet18, local: ResNet18 | None) -> None:
        self._check(local is not None)
        self.device = backbone.conv1.weight.device
        self.pixels = CPU_PIXELS if self.device.type == "cpu" else GPU_PIXELS
        self.models: dict[str, AutoEncoder] = {}
        networks = ("global", backbone, self.image_size), ("local", local, PATCH)
        for i, (name, network, size) in enumerate(networks):
            if network is not None:
                model = AutoEncoder(network, size, self.width, seeded(self.seed, 20, i))
                self.models[name] = model.to(self.device).eval()

    def _check(self, local: bool) -> None:
        settings, least = self.settings(), PATCH * (1 + local)
        shares = "rho kappa gamma xi_global xi_local warmup".split()
        positive = "kappa lr epochs local_epochs stride width interval".split()
        wrong = [name for name in shares if not 0 <= settings[name] <= 1]
        wrong += [name for name in positive if not 0 < settings[name] < math.inf]
        wrong += [name for name in ("batch_size", "patches") if settings[name] < 2]
        wrong += ["stride"] * (self.stride > PATCH)  # heat maps would have gaps
        zero = ("sigma2_least", "encoder_lr")  # may be 0
        wrong += [name for name in zero if not 0 <= settings[name] < math.inf]
        wrong += ["heat_map"] * (self.heat_map not in ("patch", "residual"))
        if wrong:
            got = ", ".join(f"{name}={settings[name]!r}" for name in wrong)
            raise ValueError(f"impossible for IGD: got {got}")
        if self.image_size < least or (self.image_size - PATCH) % self.stride:
            rule = f"{PATCH} plus a multiple of stride={self.stride}, {least} or more"
            raise ValueError(f"image_size must be {rule}, got {self.image_size}")

    def error(self, name: str, x: Tensor, x_tilde: Tensor) -> Tensor:
        """[P:(11)] for one of the two models, "global" or "local": (B,)."""
        m = ms_ssim(x, x_tilde, **setting(x.shape[-1]))
        return reconstruction_error(x, x_tilde, m, m, rho=self.rho, nu=float(name == "global"))

    def fit(self, images: ArrayLike | Tensor, *, track: Track = iter) -> IGD:
        """Train the global model on the images, then the local one on their patches.

        images: (N, 3, S, S), N >= 2, uint8 (a memory-map is read batch by batch) or in [0, 1].
        track:  wraps the iterable of a model's steps, to show progress: tqdm, for instance.
        raises: ValueError for other images, FloatingPointError when a loss is not finite.
        """
        for training in self.trainings(images):
            for i in track(range(training.total)):
                terms = training.losses()
                if not (loss := torch.stack(list(terms.values())).sum()).isfinite():
                    raise FloatingPointError(f"{training.name}: loss {loss} in step {i}; lower lr")
                training.update(terms)
        return self

    def trainings(self, images: ArrayLike | Tensor, group: Group = None) -> Iterator[Training]:
        """The training of each model, for a caller who keeps checkpoints; a group shares it."""
        images, least = self._array_of_images(images), 2 * (group.size() if group else 1)
        if len(images) < least:
            raise ValueError(f"IGD needs N >= {least} training images, got N={len(images)}")
        for name in self.models:
            yield Training(self, name, images, group)

    @torch.no_grad()
    def score(self, images: ArrayLike | Tensor) -> tuple[Tensor, Tensor]:
        """Heat maps and scores of eq. 10: half the local and half the global model's.   [P!(10) R7]

        An image's local score is the largest of its patches.   [I:code]

        images:  (B, 3, S, S), uint8 or in [0, 1].
        returns: maps (B, S, S) and scores (B,), float32.
        raises:  ValueError before fit, or for another shape.
        """
        images = self._array_of_images(images)
        if any(model.sigma2.isnan() for model in self.models.values()):
            raise ValueError("IGD has to be fitted or loaded before it scores")
        maps = torch.empty(len(images), *images.shape[2:], device=self.device)
        scores = torch.empty(len(images), device=self.device)
        step = max(1, self.pixels // self.image_size**2)
        for k in range(0, len(images), step):
            x = to_unit(images[k : k + step], self.device)
            parts = [self._score(name, x) for name in self.models]
            maps[k : k + step] = torch.stack([m for m, _ in parts]).mean(dim=0)
            scores[k : k + step] = torch.stack([s for _, s in parts]).mean(dim=0)
        return maps, scores

    def _score(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (B, S, S) and scores (B,) of one of the models."""
        b, size, whole = len(x), x.shape[-1], name == "global"
        y = x if whole else unfold(x, self.stride)  # (B, 3, S, S) or (B L, 3, 32, 32)
        z, y_tilde = self._encode_decode(name, y)
        h = anomaly_likelihood(z, self.models[name].mu, self.models[name].sigma2)
        xi = self.xi_global if whole else self.xi_local
        s = anomaly_score(self.error(name, y, y_tilde), h, xi=xi)  # (B,) or (B L,)
        scores = s.view(b, -1).amax(dim=1)
        if self.heat_map == "residual":
            r = residual_map(y, y_tilde, **setting(y.shape[-1]), rho=self.rho)
            return (r if whole else fold(r.unflatten(0, (b, -1)), size, self.stride)), scores
        if whole:  # eq. 10 of each patch, with the xi of patches
            rec = self.error(name, unfold(x, self.stride), unfold(y_tilde, self.stride))
            s = anomaly_score(rec.view(b, -1), h[:, None], xi=self.xi_local)  # (B, L)
        return fold(s.view(b, -1, 1, 1), size, self.stride), scores

    @torch.no_grad()
    def reconstruct(self, images: ArrayLike | Tensor) -> Tensor:
        """x~ of the global model: (B, 3, S, S) in [0, 1]."""
        return self._encode_decode("global", to_unit(self._array_of_images(images), self.device))[1]

    def _encode_decode(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """z (B, Z) and x~ (B, 3, S, S), in batches that fit in memory."""
        model, z, x_tilde = self.models[name], [], []
        for part in x.split(max(1, self.pixels // x.shape[-1] ** 2)):
            z.append(model.encode(part))
            x_tilde.append(model.decode(z[-1]).contiguous())
        return torch.cat(z), torch.cat(x_tilde)

    def _array_of_images(self, images: ArrayLike | Tensor) -> np.ndarray | Tensor:
        """The images as an array or tensor of the shape that fits; a memory-map stays one."""
        s = self.image_size
        images = images if isinstance(images, Tensor) else np.asanyarray(images)
        if images.shape[1:] != (3, s, s):
            raise ValueError(f"images must be (N, 3, {s}, {s}), got {tuple(images.shape)}")
        return images

    def settings(self) -> dict[str, Any]:
        """Every argument but the networks."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def save(self, path: str | Path) -> None:
        """Write one file with everything, the networks too: `of(torch.load(path))` reads it."""
        models = {name: model.state_dict() for name, model in self.models.items()}
        torch.save({"kind": "igd", "settings": self.settings(), "models": models}, path)

    @classmethod
    def of(cls, state: dict[str, Any], device: torch.device | str = "cpu") -> IGD:
        """The detector whose `save` wrote this state: torch.load(path, weights_only=True)."""
        local = ResNet18().to(device) if "local" in state["models"] else None
        detector = cls(ResNet18().to(device), local, **state["settings"])
        for name, model in detector.models.items():
            model.load_state_dict(state["models"][name])
        return detector


class Training:
    """The training of one of the two models: Adam, with a polynomial decay.   [I:code]

    A step's draws come from (seed, purpose, step): a training resumed from a `state_dict` ends
    with the same weights as one that was not stopped, bit for bit.

    igd:   the detector, whose model is trained in place.
    which: "global" or "local".
    data:  (N, 3, S, S) images, for either model: an array, or a tensor on the GPU.
    group: processes with a share of each step; the caller averages the gradients.
    """

    rate_option = "--igd-lr"  # lower it where a loss is not finite

    def __init__(self, igd: IGD, which: str, data: Any, group: Group = None) -> None:
        self.igd, self.which, self.data, self.group = igd, which, data, group
        self.name, self.model, self.device = f"IGD {which}", igd.models[which], igd.device
        whole = which == "global"
        self.model.backbone.requires_grad_(igd.encoder_lr > 0)
        size, start = (igd.image_size if whole else PATCH), seeded(igd.seed, 21)
        self.critic = critic(size, igd.width, start).to(igd.device)
        self.networks = nn.ModuleList([self.model, self.critic])
        self.rank, self.world = (group.rank(), group.size()) if group else (0, 1)
        if isinstance(data, Tensor):
            windows: Any = data.unfold(2, PATCH, 1).unfold(3, PATCH, 1)
        else:
            windows = np.lib.stride_tricks.sliding_window_view(data, (PATCH, PATCH), (2, 3))
        self.pixels = data if whole else windows[:, :, :: igd.stride, :: igd.stride]
        self.places = len(data), *(() if whole else self.pixels.shape[2:4])  # image, row, column
        self.count = math.prod(self.places)
        self.images = max(2 * self.world, min(igd.batch_size if whole else igd.patches, self.count))
        self.images -= self.images % (2 * self.world)  # of a step
        # Row i is mixed with row -1 - i of a step (`interpolate`): a process has both of each pair.
        i, pairs = np.arange(self.images), self.images // (2 * self.world)
        self.rows = i[np.minimum(i, i[::-1]) // pairs == self.rank]
        self.steps = self.count // self.images  # an epoch; the last partial batch is left out
        self.epochs = igd.epochs if whole else igd.local_epochs
        self.total = self.steps * self.epochs
        self.warmup = round(igd.warmup * igd.epochs) if whole else 0  # epochs without eq. 12

        def adam(network: nn.Module, lr: float, decay: float = 1e-6) -> torch.optim.Adam:
            weights = [{"params": list(network.parameters()), "initial_lr": lr}]
            return torch.optim.Adam(weights, betas=(0.0, 0.9), weight_decay=decay, fused=True)

        self.optimisers = {
            "encoder": adam(self.model.backbone, igd.encoder_lr),
            "model": adam(nn.ModuleList([self.model.linear, self.model.decoder]), igd.lr),
            "critic": adam(self.critic, igd.lr, decay=0.0),
        }
        self.step_done, self.start_rate, self._order = 0, igd.lr, (-1, np.empty(0))

    @property
    def rate(self) -> float:
        """The learning rate of the next step, lr (1 - t / T)^0.9 after t of T.   [I:code]"""
        return (1 - self.step_done / self.total) ** 0.9 * self.start_rate

    def losses(self) -> dict[str, Tensor]:
        """l_rec + l_h + 0.1 E d(g(z_alpha))^2 of the next batch, and the critic's loss.   [P:§3.3]

        The auto-encoder's terms have no gradient for the critic, and the critic's loss none for the
        auto-encoder. l_h has none at all before eq. 12 joins: if it pulls z together before the
        decoder uses z, all x~ stay the same image.

        returns: "rec", "h", "critic" and "critic_loss" -> scalar.
        """
        igd, (epoch, position) = self.igd, divmod(self.step_done, self.steps)
        joined = epoch - self.warmup  # epochs with eq. 12
        if position == 0 and (epoch == 0 or (joined >= 0 and joined % igd.interval == 0)):
            self.estimate()
        self.model.train()
        # train eq. 12 on the z used for scoring: averages of small batches put some of them far out
        self.model.backbone.train(joined < 0 and igd.encoder_lr > 0)
        ids = np.sort(self.order(epoch)[position * self.images : (position + 1) * self.images])
        x = self.take(ids[self.rows])
        alpha = 0.5 * torch.rand(self.images, generator=seeded(igd.seed, 22, self.step_done))
        alpha = alpha[self.rows].to(x.device, non_blocking=not x.is_cpu)  # (B,)

        self.critic.requires_grad_(False)
        with autocast(x.device):
            z = self.model.encode(x)
            x_tilde, mixture = self.model.decode(torch.cat([z, interpolate(z, alpha)])).chunk(2)
            fooled = self.critic(mixture)
        self.critic.requires_grad_(True)
        h = anomaly_likelihood(z.float(), self.model.mu, self.model.sigma2).mean()
        blend = igd.gamma * x + (1 - igd.gamma) * x_tilde.detach()
        with autocast(x.device):
            of_mixture, of_blend = self.critic(torch.cat([mixture.detach(), blend])).chunk(2)
        return {
            "rec": igd.error(self.which, x, x_tilde.float()).mean(),
            "h": h if joined >= 0 else h.detach(),
            "critic": igd.critic_weight * fooled.float().square().mean(),
            "critic_loss": critic_loss(of_mixture.float(), alpha, of_blend.float()),
        }

    def update(self, terms: dict[str, Tensor]) -> None:
        """One step of the auto-encoder and one of the critic on the terms that `losses` gave."""
        for optimiser in self.optimisers.values():
            optimiser.zero_grad(set_to_none=True)
            for group in optimiser.param_groups:
                group["lr"] = group["initial_lr"] * self.rate / self.start_rate
        torch.stack(list(terms.values())).sum().backward()
        for optimiser in self.optimisers.values():
            optimiser.step()
        self.step_done += 1
        if self.step_done == self.total:
            self.model.eval()
            if self.warmup == self.epochs:  # eq. 12 never joined
                self.estimate()

    def state_dict(self) -> dict[str, Any]:
        """All that a training of the same images and settings needs to resume."""
        return {
            "settings": self.igd.settings() | {"images": len(self.data)},
            "step": self.step_done,
            "model": self.model.state_dict(),
            "critic": self.critic.state_dict(),
            "optimisers": {name: o.state_dict() for name, o in self.optimisers.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """raises: ValueError if the state is of other settings or of another number of images."""
        settings = self.igd.settings() | {"images": len(self.data)}
        if changed := [name for name in settings if state["settings"].get(name) != settings[name]]:
            raise ValueError(f"of a run with another {', '.join(changed)}; move it away")
        self.model.load_state_dict(state["model"])
        self.critic.load_state_dict(state["critic"])
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        self.step_done = state["step"]

    def order(self, epoch: int) -> np.ndarray:
        """The images, or all patches of all images, in an epoch's order; the last one is kept."""
        if self._order[0] != epoch:
            generator = np.random.default_rng((self.igd.seed, 23, epoch))
            self._order = epoch, generator.permutation(self.count)
        return self._order[1]

    def take(self, ids: np.ndarray) -> Tensor:
        """The images (B, 3, S, S), or patches (B, 3, 32, 32) counted image by image, row by row."""
        index: Any = np.unravel_index(ids, self.places)
        if isinstance(self.pixels, Tensor):  # a GPU that has the images need not be waited for
            index = (torch.from_numpy(i).to(self.device, non_blocking=True) for i in index)
        image, *place = index
        return to_unit(self.pixels[(image, slice(None), *place)], self.device)

    def estimate(self) -> None:
        """mu and sigma^2 of all training images or patches; the last ones score.   [P!§3.3 R21]"""
        self.model.backbone.eval()
        batches = np.array_split(self.order(0), max(self.steps, self.world))
        share = (self.take(np.sort(ids)) for ids in batches[self.rank :: self.world])
        self.model.estimate(share, self.igd.kappa, self.igd.sigma2_least, self.group)
