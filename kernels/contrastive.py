"""The centred contrastive loss with a temperature kappa per pair of classes.   [P:(4)]-[P:(7)]

N views, Z features, A classes, R of the N views as queries (all of them in one process).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from kernels import choose_backend

EPS = 1e-4  # clamp of the norm in eq. 6; eq. 3 drives that norm to zero        [P!(6) R6]
DENSE_N = 512  # up to here the torch path holds the (N, N) matrix, beyond it tiles
TILE = 256  # rows and columns of a tile on the torch path; it stays in a core's cache
KAPPA_MAX = 43.0  # exp(+-kappa) N stays inside float32 below it, no maximum needed


def scales(tau: float, alpha: float, positive_scale: str | float) -> tuple[float, float, float]:
    """kappa(n, m) = 1/(alpha tau) if n = m, else 1/tau; and the factor of the positive.  [P:(7)]

    positive_scale: "kappa" 1/(alpha tau), "tau" 1/tau, or a number (0.5 as printed) [P!(5) R2].
    returns:        kappa of the same class, kappa of different classes, the positive's factor.
    """
    if not (tau > 0 and alpha > 0 and math.isfinite(1 / tau) and math.isfinite(1 / (alpha * tau))):
        raise ValueError(f"tau and alpha must be positive and finite, got {tau=} and {alpha=}")
    same, different = 1 / (alpha * tau), 1 / tau
    if positive_scale == "kappa":
        return same, different, same
    if positive_scale == "tau":
        return same, different, different
    if isinstance(positive_scale, str) or not math.isfinite(positive_scale):
        raise ValueError(
            f'positive_scale must be "kappa", "tau" or a finite number, got {positive_scale!r}'
        )
    return same, different, float(positive_scale)


def centred_features(z: Tensor, n: Tensor, c: Tensor) -> Tensor:
    """f_i = (z_i - c_n(i)) / max(|z_i - c_n(i)|_2, EPS).  [P!(6) R6]"""
    u = z - c[n]  # (N, Z)
    return u / u.norm(dim=1, keepdim=True).clamp_min(EPS)


def rows_ref(
    f: Tensor, n: Tensor, pair: Tensor, kappa: tuple[float, float, float], start: int, stop: int
) -> Tensor:
    """l_i = log sum_{j != i} exp(kappa(n_i, n_j) f_i.f_j) - s f_i.f_pair(i), start <= i < stop."""
    same, different, s = kappa
    i = torch.arange(start, stop, device=f.device)
    kappa_ij = torch.where(n[i, None] == n[None, :], same, different).to(f.dtype)  # (R, N)
    s_ij = kappa_ij * (f[start:stop] @ f.T)  # (R, N)
    s_ij = s_ij.masked_fill(i[:, None] == torch.arange(len(f), device=f.device), -math.inf)
    positive = s * (f[start:stop] * f[pair[start:stop]]).sum(dim=1)  # (R,)
    return torch.logsumexp(s_ij, dim=1) - positive


def contrastive_ref(
    z: Tensor,
    n: Tensor,
    pair: Tensor,
    c: Tensor,
    *,
    tau: float,
    alpha: float,
    positive_scale: str | float = "kappa",
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """The definition, R losses in the dtype of z, with the (R, N) matrix in memory.  [P:(5)]"""
    start, stop = rows or (0, len(z))
    f = centred_features(z, n, c)
    return rows_ref(f, n, pair, scales(tau, alpha, positive_scale), start, stop)


def contrastive(
    z: Tensor,
    n: Tensor,
    pair: Tensor,
    c: Tensor,
    *,
    tau: float,
    alpha: float,
    positive_scale: str | float = "kappa",
    backend: str = "auto",
    rows: tuple[int, int] | None = None,
) -> Tensor:
    choose_backend(backend, z.device)
    if not torch.equal(pair[pair], torch.arange(len(pair), device=pair.device)):
        raise ValueError("pair must be an involution")
    return contrastive_ref(
        z.float(), n, pair, c, tau=tau, alpha=alpha, positive_scale=positive_scale, rows=rows
    ).mean()


__all__ = ["checkpoint", "once_differentiable"]
