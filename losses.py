"""The losses of PMSACL, eq. 2-9, in the paper's order.   [P:§3.2]

Tian et al., "Self-supervised Pseudo Multi-class Pre-training for Unsupervised Anomaly Detection
and Segmentation in Medical Images". `[P:(4)]` tags an equation of that paper; `[P!(5) R2]` marks
a place that row R2 of docs/deviations.md completes or corrects. Eq. 1, their sum, is in pmsacl.py;
kernels/contrastive.py has a Triton kernel for eq. 4-7, whose definition is here.

Sizes: A classes (n fake lesions in A_n), B images, N = 2 A B views, R queries, Z features, S px.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

EPS = 1e-4  # least norm in eq. 6, whose norm eq. 3 drives to zero                     [P!(6) R6]
PAIRS = 2**22  # similarities of a block; with its gradient it takes some 6 times 16 MiB
PATCH = 32  # pixels a side of eq. 9's patches                                          [P:§4.2]
# (dy, dx) of the eight neighbours, p = 0..7, clockwise from the top left
DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))


def class_centres(encoder: nn.Module, views: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """c_n = E_{x in D, a ~ A_n} f_theta(a(x)), computed once and frozen.   [P!(2) R5]

    encoder: f_theta, (N, 3, S, S) -> (N, Z); its running averages stay as they are.
    views:   batches of (views (N, 3, S, S), class ids (N,) int64): one pass over D.
    returns: c (A, Z) float32, A one more than the largest class id.
    raises:  ValueError if a class has no view.
    """
    total: dict[int, Tensor] = {}
    with torch.no_grad(), frozen_averages(encoder):
        for x, n in views:
            z = F.pad(encoder(x).double(), (0, 1), value=1.0)  # (N, Z + 1): the last one counts
            for k in n.unique().tolist():
                total[k] = total.get(k, 0) + z[n == k].sum(dim=0)
    if not total or sorted(total) != list(range(len(total))):
        raise ValueError(f"[P:(2)] needs a view of each class, got views of {sorted(total)}")
    return torch.stack([total[k][:-1] / total[k][-1] for k in sorted(total)]).float()


def multi_centring_loss(z: Tensor, n: Tensor, c: Tensor) -> Tensor:
    """l_ctr = E || z - c_n ||^2, a scalar.   [P:(3)]

    z: (N, Z) features of the views.   n: (N,) int64 class ids.   c: (A, Z) centres of eq. 2.
    """
    return (z - c[n.view(len(z))]).square().sum(dim=1).mean()  # of another shape it would broadcast


def contrastive_loss(
    z: Tensor,
    n: Tensor,
    pair: Tensor,
    c: Tensor,
    *,
    tau: float = 0.2,
    alpha: float = 2.0,
    positive_scale: str | float = "kappa",
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """l_PMSACL = E_i l_i, the mean of `contrastive_losses`, whose arguments it takes.   [P:(4)]"""
    return contrastive_losses(
        z, n, pair, c, tau=tau, alpha=alpha, positive_scale=positive_scale, rows=rows
    ).mean()


def contrastive_losses(
    z: Tensor,
    n: Tensor,
    pair: Tensor,
    c: Tensor,
    *,
    tau: float = 0.2,
    alpha: float = 2.0,
    positive_scale: str | float = "kappa",
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """l_i = -log [ exp(s f_i.f_pair(i)) / sum_{j != i} exp(kappa(n_i, n_j) f_i.f_j) ].

    [P!(5) R2]. Where R N exceeds PAIRS, blocks of rows are computed one after the other, and again
    in the backward pass: memory is linear in N.

    z, n, c: (N, Z), (N,) int64, (A, Z), as in eq. 3; 16-bit z are converted to float32.
    pair:    (N,) int64, the row of the same strong image's other weak view; not checked here.
    tau, alpha, positive_scale: as `kappas` takes them, or raises for them.   [P!(7) R3]
    rows:    (start, stop), the queries; None: all N. The denominator always has all N.
    returns: (R,), float32 or float64.
    """
    start, stop = rows or (0, len(z))
    kappa = kappas(tau, alpha, positive_scale)
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    with torch.autocast(z.device.type, enabled=False):
        f = centred_features(z.to(dtype), n, c.to(dtype))  # (N, Z)
        step = max(1, PAIRS // len(z))
        if stop - start <= step:
            return _rows_of_eq_5(f, n, pair, kappa, start, stop)
        blocks = [(f, n, pair, kappa, k, min(k + step, stop)) for k in range(start, stop, step)]
        return torch.cat([checkpoint(_rows_of_eq_5, *b, use_reentrant=False) for b in blocks])


def _rows_of_eq_5(f, n, pair, kappa, start, stop):
    """[P:(5)] of the views start <= i < stop: (stop - start,)."""
    same, different, positive = (f.new_full((), k) for k in kappa)  # of f's own dtype
    j = torch.arange(len(f), device=f.device)
    i, f_i = j[start:stop], f[start:stop]
    kappa_ij = torch.where(n[i, None] == n[None, :], same, different)  # (R, N)  [P:(7)]
    s_ij = (kappa_ij * (f_i @ f.T)).masked_fill(i[:, None] == j, -math.inf)  # (R, N), i != j
    return s_ij.logsumexp(dim=1) - positive * (f_i * f[pair[i]]).sum(dim=1)


def centred_features(z: Tensor, n: Tensor, c: Tensor) -> Tensor:
    """f_i = (z_i - c_n(i)) / max(|z_i - c_n(i)|_2, EPS): (N, Z).   [P!(6) R6]"""
    u = z - c[n.view(len(z))]  # (N, Z)
    return u / torch.linalg.vector_norm(u, dim=1, keepdim=True).clamp_min(EPS)


def kappas(tau: float, alpha: float, positive_scale: str | float) -> tuple[float, float, float]:
    """kappa(n, m) = 1/(alpha tau) if n = m, else 1/tau; and s, the factor of the positive.  [P:(7)]

    positive_scale: "kappa" 1/(alpha tau), "tau" 1/tau, or a number (0.5 as printed)  [P!(5) R2]
    returns:        kappa within a class, kappa between classes, s.
    raises:         ValueError unless tau and alpha are positive and everything is finite.
    """
    if not (tau > 0 and alpha > 0 and math.isfinite(1 / tau) and math.isfinite(1 / (alpha * tau))):
        raise ValueError(f"tau and alpha must be positive and finite, got {tau=} and {alpha=}")
    same, different = 1 / (alpha * tau), 1 / tau
    if positive_scale in ("kappa", "tau"):
        return same, different, same if positive_scale == "kappa" else different
    if isinstance(positive_scale, str | bool | None) or not math.isfinite(positive_scale):
        raise ValueError(f'positive_scale: "kappa", "tau" or a number, got {positive_scale!r}')
    return same, different, float(positive_scale)


def augmentation_loss(logits: Tensor, n: Tensor) -> Tensor:
    """l_aug = -E log a_n^T softmax(logits), a_n one-hot at n.   [P:(8)]

    logits: (N, A) of f_beta.   n: (N,) int64 class ids.   returns: scalar.
    """
    return F.cross_entropy(logits, n)


def position_loss(logits: Tensor, p: Tensor) -> Tensor:
    """l_pos = -E log p^T softmax(logits), p one-hot at the neighbour's direction.   [P:(9)]

    logits: (N, 8) of f_gamma.   p: (N,) int64 directions, 0..7.   returns: scalar.
    """
    return F.cross_entropy(logits, p)


def patch_pairs(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A patch of each image, one of its eight neighbours, and which.   [P!(9) R18]

    Along each axis of its direction the neighbour lies 24 + U{0..7} px away, never less: the
    first patch is drawn among the places that leave room for it.

    x:       (B, 3, S, S).
    returns: patches (B, 3, 32, 32), neighbours (B, 3, 32, 32), p (B,) int64: which of the eight.
    raises:  ValueError for other shapes, or if S < 63, where 32 + 31 px do not fit.
    """
    b, _, s, width = x.shape
    if not 2 * PATCH - 1 <= s == width:
        raise ValueError(
            f"[P:(9)] needs square images, {2 * PATCH - 1} px or more, got {s}, {width}"
        )
    p = torch.randint(8, (b,), generator=generator, device=generator.device)
    distance = 24 + torch.randint(8, (b, 2), generator=generator, device=generator.device)
    place = torch.rand(b, 2, generator=generator, device=generator.device)
    shift = distance * torch.tensor(DIRECTIONS, device=p.device)[p]  # (B, 2): dy, dx
    room = s - PATCH + 1 - shift.abs()  # (B, 2) places along each axis
    first = torch.minimum((place * room).long(), room - 1) - shift.clamp(max=0)  # (B, 2) corners
    windows = x.unfold(2, PATCH, 1).unfold(3, PATCH, 1)  # (B, 3, places, places, 32, 32), no copy
    first, shift, p = (t.to(x.device, non_blocking=not x.is_cpu) for t in (first, shift, p))
    image = torch.arange(b, device=x.device)
    (y_1, x_1), (y_2, x_2) = first.unbind(1), (first + shift).unbind(1)
    return windows[image, :, y_1, x_1], windows[image, :, y_2, x_2], p


@contextlib.contextmanager
def frozen_averages(module: nn.Module) -> Iterator[None]:
    """Batch-norm on batch statistics, its running averages left alone.   [P!(2) R5]"""
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    before = [(m.training, m.track_running_stats, dict(m.named_buffers())) for m in norms]
    try:
        for norm, (*_, averages) in zip(norms, before, strict=True):
            synchronised = isinstance(norm, nn.SyncBatchNorm)  # fails on bfloat16 without averages
            norm.training, norm.track_running_stats = True, synchronised
            for name, value in averages.items() if synchronised else ():
                setattr(norm, name, value.clone())
        yield
    finally:
        for norm, (training, tracked, averages) in zip(norms, before, strict=True):
            norm.training, norm.track_running_stats = training, tracked
            for name, value in averages.items():
                setattr(norm, name, value)
