"""s_bp = sqrt((x_bp - mu_p)^T Sigma_p^-1 (x_bp - mu_p)) = |W_p (x_bp - mu_p)|.   [P:(13)]

Sizes: B images, P positions, D channels. W_p, lower triangular with W_p^T W_p = Sigma_p^-1, is
the inverse of Sigma_p's Cholesky factor. A sum of squares cannot be negative under the root.

W is the large operand: 4 P D^2 bytes, 164 MB at P = 4096 and D = 100. What reading its lower half
must cost (derived on paper, not measured; float32, an H100 with 3.35 TB/s and 67 TFLOP/s):

    P = 4096     bytes of W, x    their floor   operations B P D^2   their floor   decides
    D = 100
      B = 1      83 MB, 2 MB      25 us         0.04 GFLOP           0.6 us        memory
      B = 32     83 MB, 52 MB     40 us         1.3 GFLOP            20 us         memory
      B = 128    83 MB, 210 MB    87 us         5.2 GFLOP            78 us         memory
    D = 448
      B = 1      1.65 GB, 7 MB    0.49 ms       0.8 GFLOP            12 us         memory
      B = 32     1.65 GB, 0.2 GB  0.56 ms       26 GFLOP             0.39 ms       memory
      B = 128    1.65 GB, 0.9 GB  0.77 ms       105 GFLOP            1.6 ms        operations

Memory moves in sectors of 32 bytes, so a lower half costs about (D + 8) / (2 D) of the whole:
0.54 at D = 100. The tiles on the diagonal are computed whole, (D + BI) / D of the operations, and
B is rounded up to 16. Eager with a full inverse reads twice the bytes, writes (B, P, D) twice
and computes 2 B P D^2: at B = 32 some 160 MB + 4 x 52 MB, 0.11 ms at D = 100 at the best.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import choose_backend, tl, triton

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
        y = [delta[..., : w.shape[2]] @ w[p].to(dtype).mT for w in rows]
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
        i = i0 + tl.arange(0, BI)
        y = tl.zeros((BB, BI), tl.float32)
        for j0 in range(0, tl.minimum(i0 + BI, D), BJ):  # right of the diagonal W is zero
            j = j0 + tl.arange(0, BJ)
            x_at = x_ptr + b[:, None] * x_b + p * x_p + j[None, :] * x_d
            x = tl.load(x_at, mask=(b < B)[:, None] & (j < D)[None, :], other=0.0)
            mean = tl.load(mean_ptr + p * mean_p + j * mean_d, mask=j < D, other=0.0)
            delta = x.to(tl.float32) - mean.to(tl.float32)[None, :]
            lower = (i < D)[:, None] & (j[None, :] <= i[:, None])
            w_at = w_ptr + p * w_p + i[:, None] * w_i + j[None, :] * w_j
            w = tl.load(w_at, mask=lower, other=0.0).to(tl.float32)
            if BB == 1:  # a product of one row: nothing for a matrix unit to do
                y += tl.sum(delta * w, axis=1)[None, :]
            else:
                y = tl.dot(delta, tl.trans(w), y, input_precision=PRECISION)
        total += tl.sum(y * y, axis=1)
    tl.store(out_ptr + b * P + p, tl.sqrt(total), mask=b < B)


# ---------------------------------------------------------------------------- no autograd: scoring


# BB images: (BB, BI, BJ, warps, stages). A matrix unit wants 16 or more; one image needs none.
# A test compiles all of them: none spills.
CONFIGS = {
    1: (1, 8, 128, 4, 1),
    16: (16, 32, 32, 4, 1),
    32: (32, 32, 32, 4, 1),
    64: (64, 32, 32, 8, 2),
}


def _launch(x, mean, whitening, allow_tf32):
    (B, P, D), kind = x.shape, "tf32" if allow_tf32 else "ieee"
    BB, BI, BJ, warps, stages = CONFIGS[next(size for size in CONFIGS if size >= min(B, 64))]
    out = torch.empty(B, P, dtype=torch.float32, device=x.device)
    _distance[(P * triton.cdiv(B, BB),)](
        x, mean, whitening, out, B, P, D, *x.stride(), *mean.stride(), *whitening.stride(),
        BB=BB, BI=BI, BJ=BJ, PRECISION=kind, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


# ---------------------------------------------------------------------------- public function


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
    rows:       W's block rows (P, i, j), columns 0 to j; the torch path reads them instead of W.
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
    if choose_backend(backend, x.device) == "torch":
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return _torch_distance(x, mean, rows or [whitening])
    if x.shape[2] > MAX_D or torch.float64 in (x.dtype, mean.dtype, whitening.dtype):
        raise ValueError(
            f"the Triton path takes 16- and 32-bit floats and D <= {MAX_D}, got {x.dtype} and "
            f'D={x.shape[2]}: use backend="torch"'
        )
    with torch.cuda.device_of(x):  # Triton launches on the current device
        return _launch(x, mean, whitening, allow_tf32)
