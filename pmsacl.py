"""PMSACL: self-supervised pseudo multi-class pre-training on healthy images, and the main job.

Tian et al., "Self-supervised Pseudo Multi-class Pre-training for Unsupervised Anomaly Detection
and Segmentation in Medical Images", section 3.2 and 4.2. `[P:(4)]` tags an equation of that
paper; `[P!(5) R2]` marks a place where the README's row R2 completes or corrects it. MedMix is in
medmix.py, the networks in encoder.py, the detectors in detectors.py, the measures in eval.py.

    python pmsacl.py                    # the phantom data set, about two minutes on two cores
    python pmsacl.py --data ./kvasir    # a folder of healthy images

Sizes: B images of a batch, A classes, N = 2 A B views, Z features, S pixels a side. View
(n, i, l) stands in row 2 (n B + i) + l: class n, image i, weak view l; its pair is row ^ 1.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
import urllib.error
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import detectors
import eval as evaluation
import medmix
from encoder import Encoder, ResNet18, to_unit
from kernels.contrastive import contrastive

TERMS = ("ctr", "pmsacl", "aug", "pos")  # of eq. 1, in its order


@dataclass(frozen=True)
class Config:
    """Every setting of a run, and the only source of its defaults."""

    data: str = ""  # folder of images; "" is the phantom data set
    out: str = ""  # run folder; "" is the next free runs/NAME
    preset: str = ""  # "paper" | "quick"; "" is quick for the phantoms, else paper
    terms: str = "ctr,pmsacl,aug"  # of eq. 1, for the encoder of whole images   [P!(1) R13]
    local_terms: str = "ctr,pmsacl,aug,pos"  # for IGD's encoder of 32 px patches    [P!(9) R13]
    classes: int = 4  # |A|                                                 [P:§3.1]
    tau: float = 0.2  # temperature                                         [P!(7) R3]
    alpha: float = 2.0  # weakens the repulsion within a class                [P!(7) R3]
    positive_scale: str = "kappa"  # "kappa" | "tau" | a number             [P!(5) R2]
    features: str = "unit"  # "unit" | "raw"                                [P!(3) R20]
    centre_weight: float = 1.0  # factor of the multi-centring loss           [P!(1) R20]
    aug_head: str = "backbone"  # "backbone" | "projection"                 [P!(8) R17]
    weak: str = "simclr"  # "simclr" | "ccd"                                [P!§4.2 R16]
    init: str = "auto"  # "auto" | "imagenet" | "random" | FILE             [P!§4.2 R14]
    epochs: int = 2000  #                                                     [P!§4.2 R15]
    batch_size: int = 32  # images                                            [P:§4.2]
    image_size: int = 256  # S, pixels                                        [P:§4.2]
    lr: float = 0.01  # at the start                                          [P:§4.2]
    lr_end: float = 1e-5  # of the cosine                                     [P!§4.2 R15]
    local_lr: float = 0.1  # at the start, for the encoder of patches         [P!§4.2 R15]
    momentum: float = 0.9  #                                                  [P!§4.2 R15]
    weight_decay: float = 3e-4  #                                             [P!§4.2 R15]
    detector: str = "padim"  # "padim" | "igd" | "both"
    igd_epochs: int = 256  # of IGD's own training                            [P!§4.2 IGD]
    paper_protocol: bool = False  # keep the validation images among the test images  [P!§4.3 R8]
    skip_bad: bool = False  # leave unreadable files out instead of stopping
    seed: int = 0
    device: str = "auto"  # "auto" | "cpu" | "cuda" | "cuda:1"

    def __post_init__(self) -> None:
        choices = {
            "preset": ("", *PRESETS),
            "features": ("unit", "raw"),
            "aug_head": ("backbone", "projection"),
            "weak": ("simclr", "ccd"),
            "detector": ("padim", "igd", "both"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise _bad(self, name, f"one of {', '.join(filter(None, allowed))}")
        for name in ("terms", "local_terms"):
            if not set(getattr(self, name).split(",")) <= set(TERMS):
                raise _bad(self, name, f"a comma-separated list out of {', '.join(TERMS)}")
        for name in ("tau", "alpha", "lr", "lr_end", "local_lr"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise _bad(self, name, "above 0")
        for name in ("centre_weight", "momentum", "weight_decay"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise _bad(self, name, "0 or above")
        least = {"classes": 1, "epochs": 1, "batch_size": 2, "igd_epochs": 1, "seed": 0}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise _bad(self, name, f"{lowest} or above")
        if self.image_size < 32 or self.image_size % 32:
            raise _bad(self, "image_size", "a multiple of 32, 32 or above")
        positive_scale(self)  # a word or a number


def _bad(config: Config, name: str, wanted: str) -> ValueError:
    option = "--" + name.replace("_", "-")
    return ValueError(f"{option} must be {wanted}, got {getattr(config, name)!r}")


PRESETS: dict[str, dict[str, int | float]] = {
    "paper": {},  # section 4.2, the defaults above
    "quick": {"image_size": 64, "batch_size": 16, "epochs": 8, "lr": 0.03, "igd_epochs": 30},
}


def positive_scale(config: Config) -> str | float:
    """The factor of eq. 5's numerator: "kappa", "tau" or a number.   [P!(5) R2]"""
    if config.positive_scale in ("kappa", "tau"):
        return config.positive_scale
    try:
        return float(config.positive_scale)
    except ValueError:
        raise _bad(config, "positive_scale", "kappa, tau or a number") from None


# --- section 3.2, in its order -----------------------------------------------------------------


def class_centres(encoder: nn.Module, views: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """c_n = E_{x in D, a ~ A_n} f_theta(a(x)), computed once and frozen.   [P!(2) R5]

    encoder: f_theta, (N, 3, S, S) -> (N, Z); its batch-norm layers see the batch's statistics
             and keep their running averages as they are.
    views:   batches of (views (N, 3, S, S), class ids (N,) int64): one pass over D.
    returns: c (A, Z) float32, A one more than the largest class id.
    raises:  ValueError if a class has no view, since its mean is undefined.
    """
    with torch.no_grad(), frozen_averages(encoder):
        z_all, n_all = zip(*((encoder(x).double(), n) for x, n in views), strict=True)
    z, n = torch.cat(z_all), torch.cat(n_all)  # (sum of N, Z), (sum of N,)
    counts = n.bincount().tolist()
    if 0 in counts:
        raise ValueError(f"[P:(2)] needs a view of each class, got {counts} views a class")
    return torch.stack([z[n == k].mean(dim=0) for k in range(len(counts))]).float()  # (A, Z)


def multi_centring_loss(z: Tensor, n: Tensor, c: Tensor) -> Tensor:
    """l_ctr = E || z - c_n ||^2.   [P:(3)]

    z:       (N, Z) features of the views.
    n:       (N,) int64 class ids.
    c:       (A, Z) class centres of eq. 2.
    returns: scalar.
    """
    return (z - c[n]).square().sum(dim=1).mean()


def contrastive_loss(
    z: Tensor,
    n: Tensor,
    pair: Tensor,
    c: Tensor,
    *,
    tau: float = Config.tau,
    alpha: float = Config.alpha,
    positive_scale: str | float = Config.positive_scale,
    backend: str = "auto",
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """l_PMSACL = E_i -log [ exp(s f_i.f_pair(i)) / sum_{j != i} exp(kappa(n_i, n_j) f_i.f_j) ].

    f = (z - c_n) / ||z - c_n||, kappa = 1/(alpha tau) within a class and 1/tau across.
    The formula, the arguments and the Triton kernel are in kernels/contrastive.py.
    [P:(4) P!(5) R2 P!(6) R6 P!(7) R3]

    z, n, c: as in eq. 3.
    pair:    (N,) int64, the row of the other weak view of the same strong image.
    rows:    (start, stop) to average over these rows only; the denominator keeps all N.
    returns: scalar.
    """
    return contrastive(
        z,
        n,
        pair,
        c,
        tau=tau,
        alpha=alpha,
        positive_scale=positive_scale,
        backend=backend,
        rows=rows,
    )


def augmentation_loss(logits: Tensor, n: Tensor) -> Tensor:
    """l_aug = -E log a_n^T softmax(logits), a_n one-hot at n.   [P:(8)]

    logits:  (N, A) of f_beta.
    n:       (N,) int64 class ids.
    returns: scalar.
    """
    return -logits.log_softmax(dim=1).gather(1, n[:, None]).mean()


def position_loss(logits: Tensor, p: Tensor) -> Tensor:
    """l_pos = -E log p^T softmax(logits), p one-hot at the neighbour's direction.   [P:(9)]

    logits:  (N, 8) of f_gamma.
    p:       (N,) int64 directions, 0..7.
    returns: scalar.
    """
    return -logits.log_softmax(dim=1).gather(1, p[:, None]).mean()


PATCH = 32  # pixels a side of IGD's local patches   [P:§4.2]
# (dy, dx) of the eight neighbours, p = 0..7, clockwise from the top left
DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))


def patch_pairs(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A patch of each image, one of its eight neighbours, and which.   [P!(9) R18]

    Along each axis of its direction the neighbour lies 24 + U{0..7} px away, never less: the
    first patch is drawn among the places that leave room for it.

    x:       (B, 3, S, S).
    returns: patches (B, 3, 32, 32), neighbours (B, 3, 32, 32), p (B,) int64.
    raises:  ValueError if S < 63, where 32 + 31 px do not fit.
    """
    b, _, s, _ = x.shape
    if s < 2 * PATCH - 1:
        raise ValueError(f"eq. 9 needs images of {2 * PATCH - 1} px or more a side, got {s}")

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, device=generator.device)

    p = draw(8, b).to(x.device)
    shift = (24 + draw(8, b, 2)).to(x.device) * torch.tensor(DIRECTIONS, device=x.device)[p]
    room = s - PATCH + 1 - shift.abs()  # (B, 2) places along each axis
    place = torch.rand(b, 2, generator=generator, device=generator.device).to(x.device)
    first = (place * room).long() - shift.clamp(max=0)  # (B, 2) top left corners
    return crop(x, first), crop(x, first + shift), p


def crop(x: Tensor, corner: Tensor) -> Tensor:
    """The 32 px patch of each image at its corner (y, x): (B, 3, S, S), (B, 2) -> (B, 3, 32, 32)."""
    reach = torch.arange(PATCH, device=x.device)
    rows = (corner[:, :1] + reach)[:, None, :, None]  # (B, 1, 32, 1)
    columns = (corner[:, 1:] + reach)[:, None, None, :]  # (B, 1, 1, 32)
    batch = torch.arange(len(x), device=x.device)[:, None, None, None]
    channel = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    return x[batch, channel, rows, columns]


def class_views(
    x: Tensor, config: Config, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """x^(n,l) = a(x^(n)), a ~ A_0, x^(n) = a'(x), a' ~ A_n: two weak views of each class.

    One batch of them feeds all the terms of eq. 1.   [P!(4) R1 R4]

    x:       (B, 3, S, S) in [0, 1].
    returns: views (N, 3, S, S), class ids n (N,), pair ids (N,); N = 2 A B.
    """
    strong = []
    for k in range(config.classes):
        ids = torch.full((len(x),), k, device=x.device)
        strong.append(medmix.medmix(x, ids, generator)[0] if k else x)
    x_n = torch.cat(strong).repeat_interleave(2, dim=0)  # (N, 3, S, S)
    n = torch.arange(config.classes, device=x.device).repeat_interleave(2 * len(x))
    pair = torch.arange(len(n), device=x.device) ^ 1
    return medmix.weak(x_n, generator, preset=config.weak), n, pair


def loss_terms(
    encoder: Encoder,
    x: Tensor,
    c: Tensor,
    config: Config,
    generator: torch.Generator,
    *,
    local: bool = False,
) -> dict[str, Tensor]:
    """The terms of l = l_ctr + l_PMSACL + l_aug + l_pos that `terms` names.   [P:(1)]

    x:       (B, 3, S, S) in [0, 1].
    c:       (A, Z) frozen centres.
    local:   train on 32 px patches of x instead of x.
    returns: name -> scalar, in the order of eq. 1; their sum is the loss.
    """
    names = (config.local_terms if local else config.terms).split(",")
    terms: dict[str, Tensor] = {}
    pairs = patch_pairs(x, generator) if local or "pos" in names else None
    views, n, pair = class_views(pairs[0] if local and pairs else x, config, generator)
    with autocast(x.device):
        z, h = encoder.embed(channels_last(views))
        logits = encoder.aug_logits(z, h)
    z = z.float()
    if "ctr" in names:
        terms["ctr"] = config.centre_weight * multi_centring_loss(z, n, c)
    if "pmsacl" in names:
        terms["pmsacl"] = contrastive_loss(
            *gather(z, n, pair),
            c=c,
            tau=config.tau,
            alpha=config.alpha,
            positive_scale=positive_scale(config),
            rows=own_rows(len(z)),
        )
    if "aug" in names:
        terms["aug"] = augmentation_loss(logits.float(), n)
    if "pos" in names and pairs:
        with autocast(x.device), frozen_averages(encoder):  # patches are not what c is made of
            z_1, z_2 = encoder(channels_last(torch.cat(pairs[:2]))).chunk(2)
            position = encoder.position_logits(z_1, z_2)
        terms["pos"] = position_loss(position.float(), pairs[2])
    return terms


# --- the procedure: centres, then stochastic gradient descent ----------------------------------

HELD_BACK = 0.05  # of the training images, 64 at most: they only watch the pretext task
SAVE_EVERY = 60.0  # seconds between checkpoints


@dataclass
class State:
    """What a checkpoint holds, beside the weights and the optimiser's buffers."""

    step: int
    c: Tensor  # (A, Z)
    spread: float  # of z at the start
    log: list[dict[str, float]]  # a row an epoch
    sums: dict[str, float]  # of the loss terms in the epoch under way


def pretrain(
    images: np.ndarray,
    config: Config,
    run: Path,
    *,
    local: bool = False,
    save_every: float = SAVE_EVERY,
) -> tuple[Encoder, str]:
    """Minimise eq. 1 over D; start anew, or go on from the run's checkpoint.   [P:§4.2]

    Every step draws from a generator made of (seed, step), so that a run that was stopped and
    one that was not draw the same numbers.

    images:  (N, 3, S, S) uint8, healthy.
    local:   the encoder of 32 px patches for IGD's local model.
    returns: the encoder in evaluation mode, and what it started from.
    raises:  FloatingPointError when the loss is not finite; the last checkpoint stays.
    """
    suffix = "_local" if local else ""
    path = run / f"checkpoint{suffix}.pt"
    device = torch.device(config.device)
    rank, world = ranks()
    held = min(64, max(config.batch_size // 2, round(HELD_BACK * len(images))), len(images) // 4)
    order = np.random.default_rng([config.seed, 1]).permutation(len(images))
    watched, trained = order[:held], order[held:]
    batch = min(config.batch_size, len(trained)) // world
    if batch < 2:
        raise ValueError(f"{len(images)} training images are too few: each batch needs two or more")
    steps = max(1, len(trained) // (batch * world))  # an epoch; the last partial batch is left out
    total = steps * config.epochs

    encoder = Encoder(
        classes=config.classes,
        features=config.features,
        aug_head=config.aug_head,
        generator=generator(config.seed, 2),
    )
    started_from = start_weights(encoder.backbone, config.init)
    encoder = synchronised(channels_last(encoder.to(device)).train())
    optimiser = torch.optim.SGD(
        encoder.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )

    def batch_of(indices: np.ndarray) -> Tensor:
        return to_unit(images[np.sort(indices)], device)

    def all_views() -> Iterator[tuple[Tensor, Tensor]]:
        chunks = np.array_split(trained, max(1, len(trained) // batch))
        for i, chunk in enumerate(chunks):
            draws = generator(config.seed, 3, i, device=device)
            x = batch_of(chunk)
            x = patch_pairs(x, draws)[0] if local else x
            views, n, _ = class_views(x, config, draws)
            yield channels_last(views), n

    def watch() -> dict[str, float]:
        draws = generator(config.seed, 4, device=device)
        x = batch_of(watched)
        x = patch_pairs(x, draws)[0] if local else x
        return pretext_health(encoder, *class_views(x, config, draws)[:2])

    if path.exists():
        state = load_checkpoint(path, encoder, optimiser, device)
    else:
        say(f"class centres: one pass over {len(trained)} images")
        c = class_centres(encoder, all_views())
        state = State(0, c, watch()["spread"], [], {})

    meter = Meter(state.step, total, batch * world, device)
    saved = time.monotonic()
    while state.step < total:
        epoch, position = divmod(state.step, steps)
        shuffled = np.random.default_rng([config.seed, 5, epoch]).permutation(trained)
        start = (position * world + rank) * batch
        draws = generator(config.seed, 6, state.step, rank, device=device)
        lr = cosine(config.local_lr if local else config.lr, config.lr_end, state.step / total)
        for group in optimiser.param_groups:
            group["lr"] = lr

        x = batch_of(shuffled[start : start + batch])
        terms = loss_terms(encoder, x, state.c, config, draws, local=local)
        loss = torch.stack(list(terms.values())).sum()
        values = {name: float(term.detach()) for name, term in terms.items()}
        if not all(map(math.isfinite, values.values())):
            raise FloatingPointError(
                f"the loss is not finite at epoch {epoch + 1}, step {position + 1} ({values}): "
                f"lower --lr ({config.lr:g}); the last good state is kept in {run}"
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(encoder)
        optimiser.step()

        state.step += 1
        for name, value in values.items():
            state.sums[name] = state.sums.get(name, 0.0) + value
        means = {name: value / (position + 1) for name, value in state.sums.items()}
        meter.show(state.step, epoch, config.epochs, means, lr)
        if position + 1 == steps:
            row = {"epoch": epoch + 1, **means, "lr": lr, "images_per_second": meter.rate}
            state.log.append(row | watch())
            state.sums = {}
            if row_collapsed(state) and rank == 0:
                say(f"collapse: the spread of z fell to {state.log[-1]['spread']:.2g}; see R20")
        if rank == 0 and (state.step == total or time.monotonic() - saved > save_every):
            save_checkpoint(path, encoder, optimiser, state)
            write_log(run / f"log{suffix}.csv", state.log)
            saved = time.monotonic()
    return encoder.eval(), started_from


def cosine(start: float, end: float, progress: float) -> float:
    """The learning rate at a fraction 0..1 of the training.   [P!§4.2 R15]"""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def pretext_health(encoder: Encoder, views: Tensor, n: Tensor) -> dict[str, float]:
    """Is anything learned, or has eq. 3 collapsed?   [P!(3) R20]

    returns: spread, the mean standard deviation of z; distance, the mean distance between class
             means; accuracy of f_beta; all on held-back images in evaluation mode.
    """
    encoder.eval()
    z, h = encoder.embed(channels_last(views))
    accuracy = (encoder.aug_logits(z, h).argmax(dim=1) == n).float().mean()
    means = torch.stack([z[n == k].mean(dim=0) for k in n.unique()])
    distance = torch.pdist(means).mean() if len(means) > 1 else torch.zeros(())
    encoder.train()
    return {"spread": float(z.std(dim=0).mean()), "distance": float(distance),
            "accuracy": float(accuracy)}


def row_collapsed(state: State) -> bool:
    """True in the first epoch whose spread of z is under a tenth of the start's.   [P!(3) R20]"""
    low = [row["spread"] < 0.1 * state.spread for row in state.log]
    return low[-1] and not any(low[:-1])


# --- plumbing: checkpoints, weights, devices, ranks, the screen --------------------------------


@contextlib.contextmanager
def frozen_averages(module: nn.Module) -> Iterator[None]:
    """Batch-norm on batch statistics, its running averages left alone.   [P!(2) R5]"""
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    for norm in norms:
        norm.train()
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm, (training, tracking) in zip(norms, before, strict=True):
            norm.train(training)
            norm.track_running_stats = tracking


def generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose draws depend on all the numbers of `key`: seed, purpose, step, rank."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(seed)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU; float32 on a CPU, where bfloat16 is many times slower."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def channels_last(x):
    """The memory order in which convolutions are fastest, for a batch or a network."""
    return x.to(memory_format=torch.channels_last)


def save_atomically(value: dict, path: Path) -> None:
    """torch.save by way of a temporary file: an interruption leaves the old file whole."""
    partial = path.with_name(path.name + ".partial")
    torch.save(value, partial)
    os.replace(partial, path)


def save_checkpoint(
    path: Path, encoder: nn.Module, optimiser: torch.optim.Optimizer, state: State
) -> None:
    """Weights, momentum and progress, as plain tensors and numbers."""
    save_atomically(
        {
            "encoder": encoder.state_dict(),
            "optimiser": optimiser.state_dict(),
            "state": dataclasses.asdict(state),
        },
        path,
    )


def load_checkpoint(
    path: Path, encoder: nn.Module, optimiser: torch.optim.Optimizer, device: torch.device
) -> State:
    """The inverse of `save_checkpoint`: fills the network and the optimiser in place."""
    saved = torch.load(path, map_location=device, weights_only=True)
    encoder.load_state_dict(saved["encoder"])
    optimiser.load_state_dict(saved["optimiser"])
    return State(**saved["state"])


def write_log(path: Path, rows: list[dict[str, float]]) -> None:
    """log.csv: a row an epoch, each loss term a column."""
    if rows:
        partial = path.with_name(path.name + ".partial")
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" for k, v in row.items()} for row in rows)
        os.replace(partial, path)


IMAGENET = "https://download.pytorch.org/models/resnet18-f37072fd.pth"


def start_weights(backbone: ResNet18, init: str) -> str:
    """Fill the backbone as `--init` says.   [P!§4.2 R14]

    returns: "random", "imagenet" or the file's name: what the network starts from.
    raises:  ValueError if the file is no ResNet-18, or ImageNet's weights are insisted on and
             cannot be had.
    """
    if init == "random":
        return "random"
    if init in ("auto", "imagenet"):
        try:
            weights = torch.hub.load_state_dict_from_url(
                IMAGENET, map_location="cpu", progress=False, check_hash=True, weights_only=True
            )
        except (urllib.error.URLError, OSError, RuntimeError) as error:
            if init == "imagenet":
                raise ValueError(
                    f"--init imagenet: {IMAGENET} cannot be had ({error}); put it into "
                    f"{torch.hub.get_dir()}/checkpoints, or use --init random"
                ) from error
            say("ImageNet's weights are neither cached nor to be downloaded: random start weights")
            return "random"
        backbone.load_state_dict(weights)
        return "imagenet"
    try:
        backbone.load_state_dict(torch.load(init, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises many kinds on a file that is not a state dict
        reason = str(error).splitlines()[0]
        raise ValueError(f"--init {init}: not a state dict of torchvision's resnet18: {reason}") from error
    return Path(init).name


def ranks() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) unless torchrun started it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class _Gather(torch.autograd.Function):
    """Rows of all ranks, rank by rank; the gradient of each row returns to its rank."""

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        parts = [torch.empty_like(z) for _ in range(ranks()[1])]
        torch.distributed.all_gather(parts, z.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
        return gradient.chunk(ranks()[1])[ranks()[0]]


def gather(z: Tensor, n: Tensor, pair: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z, n and pair of the global batch, so that eq. 5's denominator is over all of it."""
    rank, world = ranks()
    if world == 1:
        return z, n, pair
    ids = torch.stack([n, pair + rank * len(n)])  # (2, N)
    parts = [torch.empty_like(ids) for _ in range(world)]
    torch.distributed.all_gather(parts, ids)
    n, pair = torch.cat(parts, dim=1)
    return _Gather.apply(z), n, pair


def own_rows(n: int) -> tuple[int, int] | None:
    """The rows of this rank among the gathered ones."""
    rank, world = ranks()
    return (rank * n, (rank + 1) * n) if world > 1 else None


def average_gradients(module: nn.Module) -> None:
    """Mean over the ranks: each rank's loss is a mean over its share of the rows."""
    world = ranks()[1]
    if world > 1:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients]) / world
        torch.distributed.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def synchronised(module: Encoder) -> Encoder:
    """Batch-norm over all ranks where torch has it, which is on GPUs."""
    on_gpu = next(module.parameters()).is_cuda
    return nn.SyncBatchNorm.convert_sync_batchnorm(module) if ranks()[1] > 1 and on_gpu else module


def say(text: str) -> None:
    """A line on the screen, from the first process only."""
    if ranks()[0] == 0:
        print(text, file=sys.stderr, flush=True)


class Meter:
    """The progress line: in place on a terminal, a line now and then elsewhere."""

    def __init__(self, done: int, total: int, images: int, device: torch.device) -> None:
        self.first, self.total, self.images, self.device = done, total, images, device
        self.started = self.shown = time.monotonic()
        self.rate = 0.0  # images a second

    def show(
        self, step: int, epoch: int, epochs: int, means: dict[str, float], lr: float
    ) -> None:
        now = time.monotonic()
        done = step - self.first
        if done == 1:  # the first step warms caches up and would spoil the estimate
            self.started, self.first, self.after_first = now, step, now - self.started
            return
        per_step = (now - self.started) / done
        self.rate = self.images / per_step
