"""s_bp = sqrt((x_bp - mu_p)^T Sigma_p^-1 (x_bp - mu_p)) = |W_p (x_bp - mu_p)|.   [P:(13)]

B images, P positions, D channels. W_p is lower triangular with W_p^T W_p = Sigma_p^-1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import choose_backend


def mahalanobis_ref(x: Tensor, mean: Tensor, whitening: Tensor) -> Tensor:
    """|W_p (x_bp - mu_p)|_2, the definition; any dtype.  [P:(13)]"""
    return torch.einsum("pij,bpj->bpi", whitening.tril(), x - mean).norm(dim=2)


def mahalanobis(x: Tensor, mean: Tensor, whitening: Tensor, *, backend: str = "auto") -> Tensor:
    choose_backend(backend, x.device)
    return mahalanobis_ref(x, mean, whitening)
