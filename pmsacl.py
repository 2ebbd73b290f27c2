"""PMSACL: self-supervised pseudo multi-class pre-training on healthy images; the main job.

Tian et al., "Self-supervised Pseudo Multi-class Pre-training for Unsupervised Anomaly Detection
and Segmentation in Medical Images", sections 3.2 and 4.2. `[P:(1)]` tags an equation of that
paper; `[P!(4) R4]` marks a place that row R4 of docs/deviations.md completes or corrects. Here are
eq. 1, the views that it is computed on, and the training. Its terms, eq. 2-9, are in losses.py,
MedMix is in medmix.py, A_0 in weak.py, the networks in encoder.py, the detectors in detectors.py
and igd.py.

    python pmsacl.py                    # the phantom data set, a few minutes on two cores
    python pmsacl.py --data ./kvasir    # a folder of healthy images

Sizes: B images of a batch, A classes, N = 2 A B views, Z features, S pixels a side. View
(n, i, l) stands in row 2 (n B + i) + l: class n, image i, weak view l; its pair is row ^ 1.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from baselines.pretraining import UNTRAINED, terms_of_others
from baselines.strong import PASTED, STRONG
from encoder import Encoder, channels_last, seeded, to_unit
from kernels.contrastive import contrastive
from losses import (
    augmentation_loss,
    class_centres,
    frozen_averages,
    multi_centring_loss,
    patch_pairs,
    position_loss,
)
from support.data import resident
from support.options import CENTRED, Config, lesion_area, positive_scale
from support.progress import as_program, notify, progress
from support.run import gather, mean_of_processes, ranks
from support.training import start_weights, train
from support.worth import fake_lesions
from weak import weak

# --- section 3.2: the views and the sum of the terms -------------------------------------------


def strong_set(config: Config) -> Callable[..., tuple[Tensor, Tensor]]:
    """A_n of --strong: (images, class ids, generator) -> images and masks.   [P:§4.7.2]"""
    augment: Callable[..., tuple[Tensor, Tensor]] = STRONG[config.strong]
    if config.strong == "rotation":
        return functools.partial(augment, classes=config.classes)
    if config.strong in PASTED:
        low, high = lesion_area(config)
        return functools.partial(augment, min_area=low, max_area=high)
    return augment


def class_views(
    x: Tensor, config: Config, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """x^(n,l) = a(x^(n)), a ~ A_0, x^(n) = a'(x), a' ~ A_n: two weak views of each class.

    One batch of them feeds all the terms of eq. 1. Rotation turns the views last.   [P!(4) R1 R4]

    x:       (B, 3, S, S) in [0, 1].
    returns: views (N, 3, S, S), class ids n (N,), pair ids (N,); N = 2 A B.
    """
    n = torch.arange(config.classes).repeat_interleave(len(x))  # (A B,), where the draws are made
    augment, turned = strong_set(config), config.strong == "rotation"
    x_n = x.repeat(config.classes, 1, 1, 1) if turned else augment(x, n, generator)[0]  # by class
    area = config.crop_area or None
    both = [weak(x_n, generator, preset=config.weak, min_area=area, strength=config.jitter)
            for _ in range(2)]  # fmt: skip
    views = torch.stack(both, dim=1).flatten(0, 1)  # (N, 3, S, S)
    if turned:  # flipped after a quarter turn, left would pass for right  [P!§4.7.2 R32]
        views = augment(views, n.repeat_interleave(2), generator)[0]
    n = torch.arange(config.classes, device=x.device).repeat_interleave(2 * len(x))  # (N,)
    return views, n, torch.arange(len(n), device=x.device) ^ 1


def loss_terms(
    encoder: Encoder,
    x: Tensor,
    c: Tensor,
    config: Config,
    generator: torch.Generator,
    *,
    local: bool = False,
) -> dict[str, Tensor]:
    """The terms of l = l_ctr + l_PMSACL + l_aug + l_pos; --terms switches each on or off.   [P:(1)]

    x:       (B, 3, S, S) in [0, 1].
    c:       (A, Z) frozen centres; empty during the warm-up, and the terms that need them wait.
    local:   train on 32 px patches of x instead of x, with --local-terms.   [P!(9) R13]
    returns: name -> scalar; their sum is the loss.
    """
    names = [name for name in config.names_of_terms(local) if len(c) or name not in CENTRED]
    patches = patch_pairs(x, generator) if local or "pos" in names else None
    views, n, pair = class_views(patches[0] if local and patches else x, config, generator)
    z, h = encoder.embed(channels_last(views))  # (N, Z), (N, 512)
    z_all, n_all, pair_all, rows = gather(z, n, pair)  # of all processes; this one's rows

    def l_pmsacl() -> Tensor:
        return contrastive(
            z_all, n_all, pair_all, c, tau=config.tau, alpha=config.alpha,
            positive_scale=positive_scale(config), rows=rows,
        )  # fmt: skip

    def l_pos() -> Tensor:
        assert patches is not None
        with frozen_averages(encoder):  # c was not computed from patches
            z_1, z_2 = encoder(channels_last(torch.cat(patches[:2]))).chunk(2)
        return position_loss(encoder.position_logits(z_1, z_2), patches[2])

    terms: dict[str, Callable[[], Tensor]] = {  # l is the sum of these
        "ctr": lambda: config.centre_weight * multi_centring_loss(z, n, c),
        "pmsacl": l_pmsacl,
        "aug": lambda: augmentation_loss(encoder.aug_logits(z, h), n),
        "pos": l_pos,
    }
    terms |= terms_of_others(z_all, n_all, pair_all, tau=config.tau, rows=rows)  # [P:Tab.9]
    return {name: term() for name, term in terms.items() if name in names}


# --- the procedure: centres, then stochastic gradient descent ----------------------------------

HELD_BACK = 0.05  # of the training images, 64 at most: they only watch the pretext task
WATCHED_VIEWS = 400  # of these, or more: an accuracy of 0.25 then has a standard error of 0.02
SETTLED = 30  # steps before batch norm's running averages, and so the spread of z, are reliable
MEASURED = 20  # to 39 times in a long run: how well fake lesions are found; takes seconds
RE_ESTIMATE = 5  # epochs, for --centres re-estimated   [P:§4.7.5]


def sizes(count: int, batch_size: int, processes: int) -> tuple[int, int]:
    """Of `count` images, how many only watch; and how many of the others a process's step takes."""
    held = max(2, min(64, max(batch_size // 2, round(HELD_BACK * count)), count // 4))
    return held, min(batch_size, max(0, count - held)) // processes


def cosine(start: float, end: float, progress: float) -> float:
    """The learning rate at a fraction 0..1 of the training.   [P!§4.2 R15]"""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


class Pretraining:
    """The state of one pre-training: data, encoder, centres, optimiser, progress.   [P:§4.2]

    support/training.py runs it. Every step draws from a generator made of (seed, step), so that a
    run that was stopped and one that was not draw the same numbers.

    images: (N, 3, S, S) uint8, healthy; perhaps on the GPU.
    local:  the encoder of 32 px patches for IGD's local model.
    raises: ValueError if there are too few images for a batch of two besides those held back.
    """

    def __init__(self, images: np.ndarray | Tensor, config: Config, *, local: bool = False) -> None:
        self.config, self.local = config, local
        self.name = "local" if local else ""
        self.device = torch.device(config.device)
        self.pixels = resident(images, self.device)
        self.rank, self.world = ranks()
        count = len(images)
        held, self.batch = sizes(count, config.batch_size, self.world)
        order = torch.randperm(count, generator=seeded(config.seed, 1)).numpy()
        self.watched, self.trained = order[:held], order[held:]
        if self.batch < 2:
            needed = f"a batch needs 2 for each of {self.world} process(es)"
            if config.batch_size < 2 * self.world:
                raise ValueError(f"--batch-size {config.batch_size} is too small: {needed}")
            left = f"{held} are held back for monitoring, {len(self.trained)} are left"
            raise ValueError(f"{count} healthy images are too few: {left}, and {needed}")
        self.images = self.batch * self.world  # of one step
        self.steps = len(self.trained) // self.images  # an epoch; no partial batch
        self.total = 0 if config.method in UNTRAINED else self.steps * config.epochs
        self.terms = config.names_of_terms(local)
        self.start_rate = config.local_lr if local else config.lr
        self.rate_option = "--local-lr" if local else "--lr"

        encoder = Encoder(
            classes=config.classes, features=config.features, aug_head=config.aug_head,
            generator=seeded(config.seed, 2),
        )  # fmt: skip
        self.encoder = self.networks = encoder.to(self.device).train()
        # torch's fused SGD fails where weights get their first gradient after a warm-up
        fused = self.device.type == "cuda" and not config.warmup_epochs
        self.optimiser = torch.optim.SGD(
            self.encoder.parameters(), self.start_rate, config.momentum,
            weight_decay=config.weight_decay, fused=fused or None,
        )  # fmt: skip
        self.step_done, self.epoch = 0, -1
        self.c = torch.zeros(0)  # (A, Z) once the warm-up is over
        self.spread = 0.0  # of z at the start
        self.collapsed = False  # the user was warned
        self.init = "random"

    def begin(self) -> None:
        """Load the initial weights, and measure the spread of z at the start.   [P!§4.2 R14]"""
        self.init = start_weights(self.encoder.backbone, self.config.init)
        if self.total:
            self.spread = self.health()["spread"]

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return cosine(self.start_rate, self.config.lr_end, self.step_done / self.total)

    def losses(self) -> dict[str, Tensor]:
        """The terms of eq. 1 for the next batch; eq. 2's centres when they are due."""
        if self.centres_due():
            self.c = self.centres()
        epoch, position = divmod(self.step_done, self.steps)
        if epoch != self.epoch:  # the order of millions of images is drawn once
            self.epoch, self.shuffled = epoch, self.trained[self._order(epoch)]
        first = position * self.images + self.rank * self.batch
        x = self.batch_of(self.shuffled[first : first + self.batch])
        draws = self.draws(6, self.step_done, self.rank)
        return loss_terms(self.encoder, x, self.c, self.config, draws, local=self.local)

    def update(self, terms: dict[str, Tensor]) -> None:
        """One step of SGD on l = l_ctr + l_PMSACL + l_aug + l_pos.   [P:(1)]"""
        loss = torch.stack(list(terms.values())).sum()
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.step_done += 1

    def draws(self, *purpose: int) -> torch.Generator:
        return seeded(self.config.seed, *purpose)

    def _order(self, epoch: int) -> np.ndarray:
        return torch.randperm(len(self.trained), generator=self.draws(5, epoch)).numpy()

    def batch_of(self, indices: np.ndarray) -> Tensor:
        rows: Any = np.sort(indices)  # in the order of the file
        if isinstance(self.pixels, Tensor):
            rows = torch.from_numpy(rows).to(self.device, non_blocking=True)
        return to_unit(self.pixels[rows], self.device)

    def centres_due(self) -> bool:
        """Right after the warm-up, and every 5 epochs if re-estimated.   [P:§4.7.5]"""
        since = self.step_done - self.config.warmup_epochs * self.steps
        again = since > 0 and since % (RE_ESTIMATE * self.steps) == 0
        due = since == 0 or (again and self.config.centres == "re-estimated")
        return due and bool(CENTRED & set(self.terms))

    def centres(self) -> Tensor:
        """c (A, Z) of eq. 2, or Table 10's others.   [P!(2) R5 R20] [P!§4.7.5 R31]"""
        if self.config.centres in ("random", "equidistant"):
            width = self.encoder.f_gamma.in_features
            c = torch.randn(width, self.config.classes, generator=self.draws(8))
            c = torch.linalg.qr(c).Q if self.config.centres == "equidistant" else c / c.norm(dim=0)
            return c.T.contiguous().to(self.device)
        each = -(-self.steps // self.world)  # chunks of a process: batch norm may be over all
        chunks = list(enumerate(np.array_split(self.trained, each * self.world)))
        chunks = chunks[self.rank :: self.world]
        shown = progress(chunks, each, "class centres")
        views = (self.views_of(chunk, self.draws(3, i)) for i, chunk in shown)
        c = class_centres(self.encoder, views)
        return mean_of_processes(c, sum(len(chunk) for _, chunk in chunks))

    def views_of(self, indices: np.ndarray, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        x = self.batch_of(indices)
        x = patch_pairs(x, draws)[0] if self.local else x
        views, n, _ = class_views(x, self.config, draws)
        return channels_last(views), n

    @torch.no_grad()
    def health(self) -> dict[str, float]:
        """Is the pretext task learned, or have the features collapsed under eq. 3?   [P!(3) R20]

        returns: spread, the mean standard deviation of z; distance, the mean distance between
                 class means if there are several; accuracy of f_beta if eq. 8 trains it; on
                 held-back images, in evaluation mode.
        """
        self.encoder.eval()
        rounds = math.ceil(WATCHED_VIEWS / (2 * self.config.classes * len(self.watched)))
        batches = [self.views_of(self.watched, self.draws(4, i)) for i in range(rounds)]
        embedded = [self.encoder.embed(views) for views, _ in batches]
        z, h = (torch.cat(part) for part in zip(*embedded, strict=True))
        n = torch.cat([classes for _, classes in batches])
        self.encoder.train()
        measured = {"spread": float(z.std(dim=0).mean())}
        if self.config.classes > 1:
            means = torch.stack([z[n == k].mean(dim=0) for k in n.unique()])  # (A, Z)
            measured["distance"] = float(torch.pdist(means).mean())
            if "aug" in self.terms:
                right = self.encoder.aug_logits(z, h).argmax(dim=1) == n
                measured["accuracy"] = float(right.float().mean())
        return measured

    def end_epoch(self) -> dict[str, float]:
        """For the log: the health of the pretext task, warning once of a collapse; fake lesions."""
        health = self.health()
        fallen = health["spread"] < 0.1 * self.spread and self.step_done >= SETTLED
        if fallen and not self.collapsed:
            self.collapsed = True
            notify(
                f"collapse: the spread of z fell from {self.spread:.2g} to {health['spread']:.2g}; "
                "see R20 in docs/deviations.md (--features, --centre-weight)"
            )
        finite = math.isfinite(health["spread"])  # if it is not, the next step says what to do
        every = max(1, self.config.epochs // MEASURED)
        due = self.step_done // self.steps % every == 0 or self.step_done == self.total
        if not self.local and self.rank == 0 and finite and due:
            fakes = fake_lesions(self.encoder.backbone, self.pixels, seed=self.config.seed)
            health |= {"fake_auroc": fakes["image_auroc"], "fake_aupro": fakes["aupro"]}
        return health

    def state_dict(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in PROGRESS}
        state["encoder"] = self.encoder.state_dict()
        return state | {"optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """raises: ValueError if the state is of other training images."""
        if state["total"] != self.total:
            raise ValueError(
                f"of {state['total']} steps, but these images make {self.total}: the training "
                "images have changed; begin another run"
            )
        self.encoder.load_state_dict(state["encoder"])
        self.optimiser.load_state_dict(state["optimiser"])
        for group in self.optimiser.param_groups:  # the run may have begun on another device
            group["fused"] = self.optimiser.defaults["fused"]
        for name in PROGRESS:
            setattr(self, name, state[name])
        self.c = self.c.to(self.device)


PROGRESS = ("step_done", "total", "c", "spread", "collapsed", "init")  # of a checkpoint


def pretrain(
    images: np.ndarray | Tensor, config: Config, folder: Path, *, local: bool = False
) -> tuple[Encoder, str]:
    """Minimise eq. 1 over D, from the start or from the run's checkpoint.   [P:§4.2]

    returns: the encoder in evaluation mode, and what it started from.
    raises:  as Pretraining; FloatingPointError when the loss is not finite.
    """
    suffix = "_local" if local else ""
    checkpoint = folder / f"checkpoint{suffix}.pt"
    training = Pretraining(images, config, local=local)
    if not checkpoint.exists():
        training.begin()
    train(training, checkpoint, folder / f"log{suffix}.csv")
    return training.encoder.eval(), training.init


if __name__ == "__main__":
    from support.job import main  # the command: it imports this module

    sys.exit(as_program(main))
