"""s_bp = sqrt((x_bp - mu_p)^T Sigma_p^-1 (x_bp - mu_p)) = |W_p (x_bp - mu_p)|.   [P:(13)]

Sizes: B images, P positions, D channels. W_p, lower triangular with W_p^T W_p = Sigma_p^-1, is
the inverse of Sigma_p's Cholesky factor. docs/speed.md: what W and the kernel cost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import choose_backend, precision, tf32, tl, triton

MAX_D = 1024
SCRATCH = 2**18  # values in each buffer of a block of the torch path

# ---------------------------------------------------------------------------- reference


def mahalanobis_ref(x: Tensor, mean: Tensor, whitening: Tensor) -> Tensor:
    """|W_p (x_bp - mu_p)|_2, the definition, (B, P).  [P:(13)]"""
    return torch.einsum("pij,bpj->bpi", whitening, x - mean).norm(dim=2)


def _torch_distance(x: Tensor, mean: Tensor, rows: list[Tensor]) -> Tensor:
    """The definition in blocks of positions, whose scratch stays small; W is read once."""
    (B, P, D), dtype = x.shape, torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = B * D if rows[0].dtype == dtype else max(B, D) * D  # else W is converted by the block
    step = max(1, SCRATCH // wide)
    out = torch.empty(B, P, dtype=dtype, device=x.device)
    for first in range(0, P, step):
        p = slice(first, first + step)
        delta = (x[:, p].to(dtype) - mean[p].to(dtype)).transpose(0, 1)  # (p, B, D)
        y = [delta[..., : w.shape[1]] @ w[p].to(dtype) for w in rows]
        out[:, p] = torch.cat(y, 2).norm(dim=2).T
    return out


# ---------------------------------------------------------------------------- kernel


@triton.jit
def _distance(
    x_ptr, mean_ptr, w_ptr, out_ptr,
    B, P, D, x_b, x_p, x_d, mean_p, mean_d, w_p, w_i, w_j,
    BB: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One position and BB images: the rows of W pass by once, y = W delta is summed as it comes."""
    groups = tl.cdiv(B, BB)
    p = (tl.program_id(0) // groups).to(tl.int64)
    b = (tl.program_id(0) % groups).to(tl.int64) * BB + tl.arange(0, BB)
    total = tl.zeros((BB,), tl.float32)
    for i0 in range(0, D, BI):
        i = i0 + tl.arange(0, BI).to(tl.int64)  # i * w_i passes 2**31 where P is the last axis
        y = tl.zeros((BI, BJ) if BB == 1 else (BB, BI), tl.float32)
        for j0 in range(0, tl.minimum(i0 + BI, D), BJ):  # right of the diagonal W is zero
            j = j0 + tl.arange(0, BJ).to(tl.int64)
            x_at = x_ptr + b[:, None] * x_b + p * x_p + j[None, :] * x_d
            x = tl.load(x_at, mask=(b < B)[:, None] & (j < D)[None, :], other=0.0)
            mean = tl.load(mean_ptr + p * mean_p + j * mean_d, mask=j < D, other=0.0)
            delta = x.to(tl.float32) - mean.to(tl.float32)[None, :]
            lower = (i < D)[:, None] & (j[None, :] <= i[:, None])
            w_at = w_ptr + p * w_p + i[:, None] * w_i + j[None, :] * w_j
            w = tl.load(w_at, mask=lower, other=0.0).to(tl.float32)
            if BB == 1:  # a product of one row: nothing for a matrix unit to do
                y += delta * w
            else:
                if PRECISION == "tf32":
                    delta, w = tf32(delta), tf32(w)
                y = tl.dot(delta, tl.trans(w), y, input_precision=PRECISION)
        y = tl.sum(y, axis=1)[None, :] if BB == 1 else y
        total += tl.sum(y * y, axis=1)
    tl.store(out_ptr + b * P + p, tl.sqrt_rn(total), mask=b < B)


# BB images: (BB, BI, BJ, warps, stages). A matrix unit wants 16 or more. Spills: docs/speed.md.
CONFIGS = {
    1: (1, 8, 64, 1, 1),
    16: (16, 64, 32, 4, 1),
    32: (32, 64, 32, 8, 1),
    64: (64, 64, 32, 4, 1),
}


def _launch(x, mean, whitening, allow_tf32):
    B, P, D = x.shape
    BB, BI, BJ, warps, stages = CONFIGS[next(size for size in CONFIGS if size >= min(B, 64))]
    strides = *x.stride(), *mean.stride(), *whitening.stride()
    out = torch.empty(B, P, dtype=torch.float32, device=x.device)
    _distance[(P * triton.cdiv(B, BB),)](
        x, mean, whitening, out, B, P, D, *strides, BB=BB, BI=BI, BJ=BJ,
        PRECISION=precision(x.device, allow_tf32),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def mahalanobis(
    x: Tensor,
    mean: Tensor,
    whitening: Tensor,
    *,
    rows: list[Tensor] | None = None,
    backend: str = "auto",
    allow_tf32: bool = False,
) -> Tensor:
    """s_bp = |W_p (x_bp - mu_p)|_2.  [P:(13)]

    x:          (B, P, D) embeddings of B >= 1 images, any float dtype and strides.
    mean:       (P, D) mu_p.
    whitening:  (P, D, D) W_p, lower triangular (the upper half must be zero; the Triton path
                never reads it). It may be stored as bfloat16, half the memory: each element is
                then off by up to 2^-9 of itself, and the distance by 2^-9 |(|W| |x - mu|)|.
    rows:       W's block rows transposed, (P, j, i); the torch path reads them instead of W.
    backend:    "auto" (by the device), "torch" or "triton" (D <= 1024).
    allow_tf32: Triton path: round x - mu and W to 10 bits for the products. False: float32.
    returns:    (B, P) float32 (float64 for a float64 x), all >= 0.
    raises:     ValueError for shapes, dtypes or devices that do not match, an unusable backend,
                and for an input that wants a gradient: use `mahalanobis_ref` for one.
    """
    shapes = tuple(tuple(t.shape) for t in (x, mean, whitening))
    if x.ndim != 3 or min(x.shape) < 1 or shapes[1:] != (x.shape[1:], (*x.shape[1:], x.shape[2])):
        raise ValueError(f"x, mean, whitening must be (B, P, D), (P, D), (P, D, D), got {shapes}")
    if not all(t.dtype.is_floating_point for t in (x, mean, whitening)):
        dtypes = ", ".join(str(t.dtype) for t in (x, mean, whitening))
        raise ValueError(f"x, mean, whitening must be floating point, got {dtypes}")
    if not x.device == mean.device == whitening.device:
        where = ", ".join(str(t.device) for t in (x, mean, whitening))
        raise ValueError(f"x, mean, whitening must be on one device, got {where}")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, mean, whitening)):
        raise ValueError("mahalanobis has no gradient: use torch.no_grad() or mahalanobis_ref")
    if rows and (rows[-1].shape[:2] != mean.shape or sum(w.shape[2] for w in rows) != x.shape[2]):
        raise ValueError(f"rows must be W's block rows, got {[tuple(w.shape) for w in rows]}")
    if choose_backend(backend, x.device) == "torch":
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return _torch_distance(x, mean, rows or [whitening.mT])
    if x.shape[2] > MAX_D or torch.float64 in (x.dtype, mean.dtype, whitening.dtype):
        raise ValueError(
            f"the Triton path takes 16- and 32-bit floats and D <= {MAX_D}, got {x.dtype} and "
            f'D={x.shape[2]}: use backend="torch"'
        )
    with torch.cuda.device_of(x):  # Triton launches on the current device
        return _launch(x, mean, whitening, allow_tf32)
