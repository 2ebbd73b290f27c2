"""PMSACL: self-supervised pseudo multi-class pre-training on healthy images, and the main job.

Tian et al., "Self-supervised Pseudo Multi-class Pre-training for Unsupervised Anomaly Detection
and Segmentation in Medical Images", section 3.2 and 4.2. `[P:(4)]` tags an equation of that
paper; `[P!(5) R2]` marks a place where the README's row R2 completes or corrects it. MedMix is in
medmix.py, A_0 in weak.py, the networks in encoder.py, the detectors in detectors.py and igd.py.

    python pmsacl.py                    # the phantom data set, about two minutes on two cores
    python pmsacl.py --data ./kvasir    # a folder of healthy images

Sizes: B images of a batch, A classes, N = 2 A B views, Z features, S pixels a side. View
(n, i, l) stands in row 2 (n B + i) + l: class n, image i, weak view l; its pair is row ^ 1.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

import detectors
import eval as evaluation
import medmix
from baselines import pretraining as baselines
from encoder import Encoder, ResNet18, channels_last, frozen_averages, start_weights, to_unit
from kernels.contrastive import contrastive
from patches import patch_pairs
from support import data, layouts, phantom
from support.figures import image_grid, png
from support.options import CENTRED, Config, lesion_area, parse, positive_scale, resolve
from support.run import (
    Meter,
    autocast,
    average_gradients,
    epoch_order,
    first_process_first,
    from_first_process,
    gather,
    generator,
    join_processes,
    make_folder,
    ranks,
    read_json,
    read_saved,
    save_atomically,
    say,
    synchronised,
    write_file,
    write_rows,
)
from support.tables import write_results
from weak import weak

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


def strong_set(config: Config) -> Callable[..., tuple[Tensor, Tensor]]:
    """A_n of --strong: (images, class ids, generator) -> images and masks.   [P:§4.7.2]"""
    augment: Callable[..., tuple[Tensor, Tensor]] = medmix.STRONG[config.strong]
    if config.strong == "rotation":
        return functools.partial(augment, classes=config.classes)
    if config.strong in ("medmix", "cutout", "cutmix"):
        low, high = lesion_area(config)
        return functools.partial(augment, min_area=low, max_area=high)
    return augment


def class_views(
    x: Tensor, config: Config, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """x^(n,l) = a(x^(n)), a ~ A_0, x^(n) = a'(x), a' ~ A_n: two weak views of each class.

    One batch of them feeds all the terms of eq. 1.   [P!(4) R1 R4]

    x:       (B, 3, S, S) in [0, 1].
    returns: views (N, 3, S, S), class ids n (N,), pair ids (N,); N = 2 A B.
    """
    n = torch.arange(config.classes, device=x.device).repeat_interleave(len(x))  # (A B,)
    x_n, _ = strong_set(config)(x, n, generator)  # (A B, 3, S, S), class by class
    views = x_n.new_empty(2 * len(x_n), *x.shape[1:])
    a_0 = functools.partial(
        weak,
        preset=config.weak,
        min_area=config.crop_area or None,
        strength=config.jitter,
    )
    for view in (0, 1):
        a_0(x_n, generator, out=views[view::2])
    n = n.repeat_interleave(2)  # (N,)
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
    """The terms of l = l_ctr + l_PMSACL + l_aug + l_pos that `terms` names.   [P:(1)]

    Other methods have con (NT-Xent) or sup (SupCon) in place of the first two: baselines.py.

    x:       (B, 3, S, S) in [0, 1].
    c:       (A, Z) frozen centres; empty during the warm-up, and the terms that need them wait.
    local:   train on 32 px patches of x instead of x.
    returns: name -> scalar, in the order of eq. 1; their sum is the loss.
    """
    names = (config.local_terms if local else config.terms).split(",")
    names = [name for name in names if len(c) or name not in CENTRED]
    terms: dict[str, Tensor] = {}
    pairs = patch_pairs(x, generator) if local or "pos" in names else None
    views, n, pair = class_views(pairs[0] if local and pairs else x, config, generator)
    with autocast(x.device):
        z, h = encoder.embed(channels_last(views))
        logits = encoder.aug_logits(z, h)
    z = z.float()
    if "ctr" in names:
        terms["ctr"] = config.centre_weight * multi_centring_loss(z, n, c)
    if {"pmsacl", "con", "sup"} & set(names):
        z_all, n_all, pair_all, rows = gather(z, n, pair)
    if "pmsacl" in names:
        terms["pmsacl"] = contrastive_loss(
            z_all,
            n_all,
            pair_all,
            c,
            tau=config.tau,
            alpha=config.alpha,
            positive_scale=positive_scale(config),
            rows=rows,
        )
    if "con" in names:
        terms["con"] = baselines.nt_xent(z_all, pair_all, tau=config.tau, rows=rows)
    if "sup" in names:
        terms["sup"] = baselines.supervised_contrastive(
            z_all, n_all, pair_all, tau=config.tau, rows=rows
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
WATCHED_VIEWS = 400  # of these, or more: an accuracy of 0.25 then has a deviation of 0.02
SAVE_EVERY = 60.0  # seconds between checkpoints
RE_ESTIMATE = 5  # epochs, for --centres re-estimated   [P:§4.7.5]


def cosine(start: float, end: float, progress: float) -> float:
    """The learning rate at a fraction 0..1 of the training.   [P!§4.2 R15]"""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


class Pretraining:
    """One encoder on its way: order of the data, centres, weights, optimiser, progress.

    Every step draws from a generator made of (seed, step), so that a run that was stopped and
    one that was not draw the same numbers.

    images: (N, 3, S, S) uint8, healthy.
    local:  the encoder of 32 px patches for IGD's local model.
    raises: ValueError if there are too few images for a batch of two beside those held back.
    """

    def __init__(self, images: np.ndarray, config: Config, *, local: bool = False) -> None:
        self.images, self.config, self.local = images, config, local
        self.device = torch.device(config.device)
        self.rank, world = ranks()
        n = len(images)
        held = max(2, min(64, max(config.batch_size // 2, round(HELD_BACK * n)), n // 4))
        order = np.random.default_rng([config.seed, 1]).permutation(n)
        self.watched, self.trained = order[:held], order[held:]
        self.batch = min(config.batch_size, len(self.trained)) // world  # images of this process
        if self.batch < 2:
            raise ValueError(
                f"{n} training images for {world} process(es): a batch needs two or more, and "
                f"{held} are held back"
            )
        self.global_batch = self.batch * world
        self.steps = len(self.trained) // self.global_batch  # an epoch; no partial batch
        self.total = 0 if config.method in baselines.UNTRAINED else self.steps * config.epochs
        self.names = set((config.local_terms if local else config.terms).split(","))

        self.encoder = Encoder(
            classes=config.classes,
            features=config.features,
            aug_head=config.aug_head,
            generator=generator(config.seed, 2),
        )
        channels_last(self.encoder.to(self.device)).train()
        self.encoder = cast(Encoder, synchronised(self.encoder))
        self.optimiser = torch.optim.SGD(
            self.encoder.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.step_done = 0
        self.c = torch.zeros(0)  # (A, Z) once the warm-up is over
        self.log: list[dict[str, float]] = []  # a row an epoch
        self.sums: dict[str, float] = {}  # of each loss term in the epoch under way
        self.spread = 0.0  # of z at the start
        self.init = "random"

    def begin(self) -> None:
        """The start weights, and what z looks like with them."""
        self.init = start_weights(self.encoder.backbone, self.config.init)
        if self.total:
            self.spread = self.health()["spread"]

    def draws(self, *purpose: int) -> torch.Generator:
        return generator(self.config.seed, *purpose)

    def batch_of(self, indices: np.ndarray) -> Tensor:
        return to_unit(self.images[np.sort(indices)], self.device)  # in the order of the file

    def centres_due(self) -> bool:
        """Right after the warm-up, and every 5 epochs if re-estimated.   [P:§4.7.5]"""
        late = self.step_done - self.config.warmup_epochs * self.steps
        again = late > 0 and late % (RE_ESTIMATE * self.steps) == 0
        return bool(CENTRED & self.names) and (
            late == 0 or again and self.config.centres == "re-estimated"
        )

    def centres(self) -> Tensor:
        """c (A, Z) of eq. 2, or Table 10's random or equidistant unit vectors.   [P!(2) R5 R20]"""
        if self.config.centres in ("random", "equidistant"):
            width = self.encoder.f_gamma.in_features
            c = torch.randn(width, self.config.classes, generator=generator(self.config.seed, 8))
            c = torch.linalg.qr(c).Q if self.config.centres == "equidistant" else c / c.norm(dim=0)
            return c.T.contiguous().to(self.device)
        chunks = np.array_split(self.trained, self.steps)

        def views() -> Iterator[tuple[Tensor, Tensor]]:
            for i, chunk in enumerate(data.progress(chunks, len(chunks), "class centres")):
                yield self.views_of(chunk, self.draws(3, i))

        return class_centres(self.encoder, views())

    def views_of(self, indices: np.ndarray, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        x = self.batch_of(indices)
        x = patch_pairs(x, draws)[0] if self.local else x
        views, n, _ = class_views(x, self.config, draws)
        return channels_last(views), n

    @torch.no_grad()
    def health(self) -> dict[str, float]:
        """Is the pretext task learned, or has eq. 3 collapsed?   [P!(3) R20]

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
        found = {"spread": float(z.std(dim=0).mean())}
        if self.config.classes > 1:
            means = torch.stack([z[n == k].mean(dim=0) for k in n.unique()])  # (A, Z)
            found["distance"] = float(torch.pdist(means).mean())
            if "aug" in self.names:
                right = self.encoder.aug_logits(z, h).argmax(dim=1) == n
                found["accuracy"] = float(right.float().mean())
        return found

    def step(self) -> dict[str, float]:
        """One step of SGD on the loss of eq. 1; the value of each term before it.

        raises: FloatingPointError when a term is not finite, before the weights are touched.
        """
        config = self.config
        if self.centres_due():
            self.c = self.centres()
        epoch, position = divmod(self.step_done, self.steps)
        shuffled = self.trained[epoch_order(len(self.trained), config.seed, 5, epoch)]
        first = position * self.global_batch + self.rank * self.batch
        start = config.local_lr if self.local else config.lr
        for group in self.optimiser.param_groups:
            group["lr"] = cosine(start, config.lr_end, self.step_done / self.total)

        x = self.batch_of(shuffled[first : first + self.batch])
        draws = self.draws(6, self.step_done, self.rank)
        terms = loss_terms(self.encoder, x, self.c, config, draws, local=self.local)
        values = {name: float(term.detach()) for name, term in terms.items()}
        if not all(map(math.isfinite, values.values())):
            raise FloatingPointError(
                f"the loss is not finite in epoch {epoch + 1}, step {position + 1} ({values}): "
                f"lower --{'local-' * self.local}lr ({start:g})"
            )
        self.optimiser.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        average_gradients(self.encoder)
        self.optimiser.step()
        self.step_done += 1
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in values.items()}
        return {name: value / (position + 1) for name, value in self.sums.items()}

    def end_epoch(self, row: dict[str, float]) -> None:
        """Log the epoch with the health of the pretext task; warn once of a collapse."""
        self.log.append(row | self.health())
        self.sums = {}
        low = [row["spread"] < 0.1 * self.spread for row in self.log]
        if low[-1] and not any(low[:-1]):
            say(
                f"collapse: the spread of z fell from {self.spread:.2g} to "
                f"{self.log[-1]['spread']:.2g}; see R20 in the README (--features, --centre-weight)"
            )

    def save(self, path: Path) -> None:
        save_atomically(
            {
                "encoder": self.encoder.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                **{name: getattr(self, name) for name in PROGRESS},
            },
            path,
        )

    def load(self, path: Path) -> None:
        """raises: ValueError if the checkpoint is of other training images."""
        saved = read_saved(path, "checkpoint", self.device)
        if saved["total"] != self.total:
            raise ValueError(
                f"{path}: of {saved['total']} steps, but these images make {self.total}: the "
                "training images have changed; begin another run"
            )
        self.encoder.load_state_dict(saved["encoder"])
        self.optimiser.load_state_dict(saved["optimiser"])
        for name in PROGRESS:
            setattr(self, name, saved[name])


PROGRESS = ("step_done", "total", "c", "log", "sums", "spread", "init")  # of a checkpoint


def pretrain(
    images: np.ndarray,
    config: Config,
    run: Path,
    *,
    local: bool = False,
    save_every: float = SAVE_EVERY,
) -> tuple[Encoder, str]:
    """Minimise eq. 1 over D; start anew, or go on from the run's checkpoint.   [P:§4.2]

    save_every: seconds between checkpoints.
    returns:    the encoder in evaluation mode, and what it started from.
    raises:     as Pretraining; FloatingPointError when the loss is not finite.
    """
    suffix = "_local" if local else ""
    path = run / f"checkpoint{suffix}.pt"
    training = Pretraining(images, config, local=local)
    if path.exists():
        training.load(path)
    else:
        training.begin()
    meter = Meter(training.step_done, training.total, training.global_batch, training.device)
    saved = time.monotonic()
    while training.step_done < training.total:
        means = training.step()
        epoch, position = divmod(training.step_done - 1, training.steps)
        lr = training.optimiser.param_groups[0]["lr"]
        last = position + 1 == training.steps
        where = f"{'local ' if local else ''}epoch {epoch + 1}/{config.epochs}"
        meter.show(training.step_done, where, means | {"lr": lr}, last=last)
        if last:
            row = {"epoch": epoch + 1, **means, "lr": lr, "images_per_second": meter.rate}
            training.end_epoch(row)
        due = training.step_done == training.total or time.monotonic() - saved > save_every
        if due and training.rank == 0:
            training.save(path)
            if training.log:
                write_rows(run / f"log{suffix}.csv", training.log)
            saved = time.monotonic()
    return training.encoder.eval(), training.init


# --- the main job ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """The decoded data set: what the phases after it share."""

    dataset: layouts.Dataset
    train: np.ndarray  # (N, 3, S, S) uint8
    test: np.ndarray | None  # (M, 3, S, S) uint8, one for each of dataset.test
    masks: np.ndarray | None  # (M, S, S)
    known: np.ndarray | None  # (M,) bool


def prepare(config: Config, run: Path) -> Images:
    """Find, check and decode the images, or draw the phantoms (--data ""); then config.json.

    raises: ValueError or OSError.
    """
    root = Path(config.data or run / "phantom").resolve()
    if not config.data:
        make_folder(run)
        phantom.draw(root, size=config.image_size)
    found = layouts.discover(root, seed=config.seed)
    found.check_test()  # before anything of a user's data is written
    make_folder(run)
    size, cache = config.image_size, run / "cache"
    train, kept = data.decode(found.train, size, cache, skip_bad=config.skip_bad)
    found = dataclasses.replace(found, train=tuple(found.train[i] for i in kept))
    test = masks = known = None
    if found.test:
        found, test, masks, known = data.decode_test(found, size, cache, skip_bad=config.skip_bad)
    saved = read_json(run / "config.json")
    if saved.get("data") != config.data:  # a new run, or images that have moved
        content = dataclasses.asdict(config) | versions() | saved | {"data": config.data}
        write_file(run / "config.json", json.dumps(content, indent=2).encode())
    return Images(found, train, test, masks, known)


def versions() -> dict[str, str]:
    """What the numbers of a run depend on beside its options."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "commit": commit,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": np.__version__,
        "threads": str(torch.get_num_threads()),
    }


def main_job(config: Config, run: Path) -> None:
    """Pre-train, fit the detectors, evaluate them beside the untrained network, report."""
    seconds: dict[str, float] = {}
    with first_process_first():  # it draws and decodes, the others read
        images = prepare(config, run)
    say(plan(config, images, run))

    began = time.monotonic()
    encoder, init = pretrain(images.train, config, run)
    patches = None  # the encoder of IGD's local model
    wanted = config.local == "yes" or (config.local == "auto" and config.image_size > 64)
    if config.detector != "padim" and wanted:
        patches, _ = pretrain(images.train, config, run, local=True)
    seconds["pretrain"] = time.monotonic() - began
    if ranks()[0] > 0:
        return  # the detectors are one process's work
    save_atomically(encoder.backbone.state_dict(), run / "encoder.pt")
    figures(images, config, run)

    found: dict[str, Any] = {}
    if config.detector in ("padim", "both"):
        began = time.monotonic()
        found["padim"] = detectors.PaDiM(encoder.backbone, seed=config.seed).fit(images.train)
        found["padim"].save(run / "detector.pt")
        seconds["padim"] = time.monotonic() - began
    if config.detector in ("igd", "both"):
        began = time.monotonic()
        found["igd"] = train_igd(encoder, patches, images, config, run)
        found["igd"].save(run / ("detector_igd.pt" if "padim" in found else "detector.pt"))
        seconds["igd"] = time.monotonic() - began
    untrained = ResNet18(generator(config.seed, 2)).to(config.device).eval()
    found["untrained"] = detectors.PaDiM(untrained, seed=config.seed).fit(images.train)

    extra = {"config": dataclasses.asdict(config), "seconds": seconds, "init": init}
    if images.test is None:
        write_results(run, extra)
        say(f"no test images: score some with  python eval.py {run} --score FILES")
        return
    evaluation.evaluate(
        run,
        images.dataset,
        found,
        images.test,
        images.masks,
        images.known,
        seed=config.seed,
        paper_protocol=config.paper_protocol,
        extra=extra,
    )
    print((run / "results.md").read_text(), end="")
    say(f"weights, scores and figures are in {run}")


def train_igd(
    encoder: Encoder, patches: Encoder | None, images: Images, config: Config, run: Path
) -> detectors.IGD:
    """IGD from the pre-trained encoders; its log and a figure of its reconstructions.   [P:§3.3]"""
    igd = detectors.IGD(
        encoder.backbone,
        patches.backbone if patches else None,
        image_size=config.image_size,
        epochs=config.igd_epochs,
        local_epochs=config.igd_local_epochs,
        batch_size=config.igd_batch_size,
        patches=config.igd_patches,
        lr=config.igd_lr,
        encoder_lr=config.igd_encoder_lr,
        warmup=config.igd_warmup,
        width=config.igd_width,
        seed=config.seed,
    )
    igd.fit(images.train, checkpoint=run / "checkpoint_igd.pt")
    for name, rows in igd.log.items():
        write_rows(run / f"log_igd_{name}.csv", rows)
    shown = images.train[:6] if images.test is None else images.test
    if images.test is not None:  # three healthy images, three with lesions
        labels = np.array([sample.label for sample in images.dataset.test])
        shown = shown[np.sort(np.r_[np.flatnonzero(labels == 0)[:3], np.flatnonzero(labels)[:3]])]
    x = to_unit(shown, igd.device)
    x_tilde = igd.reconstruct(x)
    cells = [
        [(row * 255).byte().cpu().numpy() for row in rows]
        for rows in (x, x_tilde, (x - x_tilde).abs())
    ]
    grid = image_grid(cells, rows=("image", "reconstruction", "difference"), title="IGD")
    write_file(run / "figures" / "reconstruction_igd.png", png(grid))
    return igd


def plan(config: Config, images: Images, run: Path) -> str:
    """What is about to happen, in a few lines."""
    dataset = images.dataset
    abnormal = sum(sample.label for sample in dataset.test)
    masks = sum(sample.mask is not None for sample in dataset.test)
    return (
        f"{dataset.root}: {dataset.layout}; {len(dataset.train)} healthy training images, "
        f"{len(dataset.test) - abnormal} normal and {abnormal} abnormal test images, "
        f"{masks} masks\n"
        f"{config.method}, {config.preset}: {config.classes} classes, {config.epochs} epochs, "
        "batches of "
        f"{config.batch_size} images ({2 * config.classes * config.batch_size} views) at "
        f"{config.image_size} px on {config.device}; results go to {run}"
    )


def figures(images: Images, config: Config, run: Path) -> None:
    """figures/medmix.png, or the name of --strong: images under A_0 .. A_n.   [P:Fig.2]"""
    x = to_unit(images.train[: max(2, min(5, len(images.train)))], "cpu")
    draws, augment = generator(config.seed, 7), strong_set(config)
    columns = [x] + [
        augment(x, torch.full((len(x),), n), draws)[0] for n in range(1, config.classes)
    ]
    cells = [[(column[i] * 255).byte().numpy() for column in columns] for i in range(len(x))]
    names = [f"A_{n}" for n in range(config.classes)]
    if config.strong in ("medmix", "cutout", "cutmix"):
        names = [f"{name}: {n} lesion{'s' * (n != 1)}" for n, name in enumerate(names)]
    grid = image_grid(cells, columns=names, title=config.strong)
    write_file(run / "figures" / f"{config.strong}.png", png(grid))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0, 2 for a mistake of the user's (one line), 130 when interrupted."""
    run, existed = None, True
    try:
        given, resume = parse(argv)
        join_processes()
        config, run = from_first_process(lambda: resolve(given, resume))
        existed = run.exists()
        main_job(config, run)
    except (ValueError, OSError, FloatingPointError) as error:
        if run and not existed and not (run / "checkpoint.pt").exists():
            shutil.rmtree(run, ignore_errors=True)  # nothing in it is worth keeping
        print("pmsacl.py:", str(error).replace("\n", " "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        begun = run and (run / "config.json").exists()
        if run and not begun and not existed:
            shutil.rmtree(run, ignore_errors=True)
        print(f"\ninterrupted; go on with  python pmsacl.py --resume {run}" if begun else
              "\ninterrupted", file=sys.stderr)  # fmt: skip
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
