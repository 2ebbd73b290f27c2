"""The centred contrastive loss, with a temperature for each pair of classes.   [P:(4)]-[P:(7)]

Sizes: N views (both weak views of every strong image), Z features, A classes, R of the N views
as queries (all of them in one process, a rank's own under torch.distributed).

Three ways to one number. `contrastive_ref` is the definition and holds the (R, N) matrix. The
torch path (`tiles.py`) holds one tile of it at a time. The Triton path does the same on a GPU, in
three launches forward and two backward. Neither path ever stores the matrix: the backward pass
computes its tiles again from the saved log-sum-exp. No floating-point atomics, so the same bits
every time.

No GPU was at hand: the kernels are checked in Triton's interpreter and by compiling them ahead of
time, and what follows is derived on paper, not measured (Z = 128, forward and backward, an H100
with 3.35 TB/s, 67 TFLOP/s in float32, about 400 in tf32):

    operations  2 N^2 Z forward, 4 N^2 Z backward (s again, then w f). One pass serves both roles
                of a view since kappa is symmetric; eager needs 2 + 4 as well, and 20 passes over
                N^2 numbers, 4 N^2 bytes each.
    bytes       16 N Z for z, f, dz and the partial sums; L2 serves the tiles.

        N        floor float32   floor tf32   bytes of the passes of eager   their floor
        256      0.8 us          0.1 us       5 MB                           1.6 us
        4096     0.19 ms         0.03 ms      1.3 GB                         0.40 ms
        16384    3.1 ms          0.5 ms       21 GB                          6.4 ms
        65536    49 ms           8.2 ms       344 GB (17 GB at a time)       103 ms

Eager pays products and passes, the kernels pay the products alone, at what `tl.dot` reaches. In
float32 that bounds the gain over eager to (0.19 + 0.40) / 0.19, three times, at the full float32
peak, so expect one to two times (and memory linear in N); in tf32 to (0.03 + 0.40) / 0.03, so
three times needs a quarter of the peak. At N = 256 launches decide, about 5 us each: some 10 of
ours and 15 of the checks against some 60.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from kernels import choose_backend, tl, triton
from kernels.tiles import KAPPA_MAX, TILE, Tiled

EPS = 1e-4  # clamp of the norm in eq. 6; eq. 3 drives that norm to zero              [P!(6) R6]
MAX_Z = 512  # widest feature of the Triton path: a tile of rows must fit a processor
PROGRAMS = 256  # columns are split until so many programs run, whatever the card: same bits

# ---------------------------------------------------------------------------- reference


def scales(tau: float, alpha: float, positive_scale: str | float) -> tuple[float, float, float]:
    """kappa(n, m) = 1/(alpha tau) if n = m, else 1/tau; and the factor of the positive.  [P:(7)]

    positive_scale: "kappa" 1/(alpha tau), "tau" 1/tau, or a number (0.5 as printed)  [P!(5) R2]
    returns:        kappa within a class, kappa between classes, the factor of the positive.
    raises:         ValueError unless tau and alpha are positive and everything is finite.
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
    """f_i = (z_i - c_n(i)) / max(|z_i - c_n(i)|_2, EPS), (N, Z).  [P!(6) R6]"""
    u = z - c[n]  # (N, Z)
    return u / torch.linalg.vector_norm(u, dim=1, keepdim=True).clamp_min(EPS)


def _kappa(n_i, n_j, same, different, dtype):
    """kappa(n_i, n_j) for every pair, (len(n_i), len(n_j)).  [P:(7)]"""
    kappa = torch.full((len(n_i), len(n_j)), different, dtype=dtype, device=n_i.device)
    return kappa.masked_fill_(n_i[:, None] == n_j[None, :], same)


def _row_losses(f, n, pair, kappa, start, stop):
    """[P:(5)] for the rows start <= i < stop of f (N, Z): a tensor (stop - start,)."""
    same, different, positive_scale = kappa
    f_i, i = f[start:stop], torch.arange(start, stop, device=f.device)
    s_ij = f_i @ f.T  # (R, N)
    s_ij = s_ij * _kappa(n[start:stop], n, same, different, f.dtype)
    itself = i[:, None] == torch.arange(len(f), device=f.device)[None, :]  # (R, N)
    denominator = s_ij.masked_fill(itself, -math.inf).logsumexp(dim=1)  # (R,)
    return denominator - positive_scale * (f_i * f[pair[start:stop]]).sum(dim=1)


def contrastive_ref(z, n, pair, c, *, tau, alpha, positive_scale="kappa", rows=None):
    """l_i = log sum_{j != i} exp(kappa(n_i, n_j) f_i.f_j) - s f_i.f_pair(i).  [P:(5)]

    The definition; arguments as `contrastive`, any float dtype, nothing is checked.
    returns: (R,), one loss per query; eq. 4 is their mean.
    """
    start, stop = rows or (0, len(z))
    kappa = scales(tau, alpha, positive_scale)
    return _row_losses(centred_features(z, n, c), n, pair, kappa, start, stop)


# ---------------------------------------------------------------------------- torch


def _torch_losses(z, n, pair, c, kappa, start, stop):
    """[P:(5)] on the torch path, (R,): in tiles, or in strips of rows for a great kappa."""
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    with torch.autocast(z.device.type, enabled=False):
        f = centred_features(z.to(dtype), n, c.to(dtype))
        if max(kappa[:2]) < KAPPA_MAX:
            return Tiled.apply(f, n, pair, kappa, start, stop)
        strips = [(a, min(a + TILE, stop)) for a in range(start, stop, TILE)]
        return torch.cat(
            [checkpoint(_row_losses, f, n, pair, kappa, *ab, use_reentrant=False) for ab in strips]
        )


# ---------------------------------------------------------------------------- kernels


@triton.jit
def _prepare(
    z_ptr, n_ptr, c_ptr, f_ptr, norm_ptr,
    N, Z, z_row, z_col, c_row, c_col, eps,
    ZP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """f (N, ZP), zero in the columns past Z, and the norm of eq. 6 before its clamp."""
    i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # i * ZP passes 2**31
    d = tl.arange(0, ZP)
    live = (i < N)[:, None] & (d < Z)[None, :]
    n = tl.load(n_ptr + i, mask=i < N, other=0)
    z = tl.load(z_ptr + i[:, None] * z_row + d[None, :] * z_col, mask=live, other=0.0)
    c = tl.load(c_ptr + n[:, None] * c_row + d[None, :] * c_col, mask=live, other=0.0)
    u = z.to(tl.float32) - c.to(tl.float32)
    norm = tl.sqrt(tl.sum(u * u, axis=1))
    f = u / tl.maximum(norm, eps)[:, None]
    f = f.to(f_ptr.dtype.element_ty)
    tl.store(f_ptr + i[:, None] * ZP + d[None, :], f, mask=(i < N)[:, None])
    tl.store(norm_ptr + i, norm, mask=i < N)


@triton.jit
def _forward(
    f_ptr, n_ptr, max_ptr, sum_ptr,
    N, start, stop, same, different, span,
    ZP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online log-sum-exp of BM rows over `span` columns: running maximum and sum."""
    i = start + tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    d = tl.arange(0, ZP)
    f_i = tl.load(f_ptr + i[:, None] * ZP + d[None, :], mask=(i < stop)[:, None], other=0.0)
    n_i = tl.load(n_ptr + i, mask=i < stop, other=0)
    first = tl.program_id(1) * span
    # A start at the least possible value, not at -inf, keeps inf - inf out of a masked tile.
    m = tl.zeros((BM,), tl.float32) - tl.maximum(same, different)
    total = tl.zeros((BM,), tl.float32)
    for j0 in range(first, tl.minimum(first + span, N), BN):
        j = j0 + tl.arange(0, BN).to(tl.int64)
        f_j = tl.load(f_ptr + j[:, None] * ZP + d[None, :], mask=(j < N)[:, None], other=0.0)
        n_j = tl.load(n_ptr + j, mask=j < N, other=0)
        s = tl.dot(f_i, tl.trans(f_j), input_precision=PRECISION)
        s = s * tl.where(n_i[:, None] == n_j[None, :], same, different)
        s = tl.where((j < N)[None, :] & (i[:, None] != j[None, :]), s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        total = total * tl.exp(m - m_new) + tl.sum(tl.exp(s - m_new[:, None]), axis=1)
        m = m_new
    out = tl.program_id(1).to(tl.int64) * (stop - start) + i - start
    tl.store(max_ptr + out, m, mask=i < stop)
    tl.store(sum_ptr + out, total, mask=i < stop)


@triton.jit
def _finish_forward(
    f_ptr, pair_ptr, max_ptr, sum_ptr, lse_ptr, loss_ptr,
    start, stop, positive_scale, splits,
    ZP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Join the splits, then l_i = lse_i - s f_i.f_pair(i)."""
    i = start + tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    d = tl.arange(0, ZP)
    live = i < stop
    at = i - start
    m = tl.load(max_ptr + at, mask=live, other=0.0)
    total = tl.load(sum_ptr + at, mask=live, other=1.0)
    for _ in range(1, splits):
        at += stop - start
        m_k = tl.load(max_ptr + at, mask=live, other=0.0)
        m_new = tl.maximum(m, m_k)
        total_k = tl.load(sum_ptr + at, mask=live, other=0.0)
        total = total * tl.exp(m - m_new) + total_k * tl.exp(m_k - m_new)
        m = m_new
    lse = m + tl.log(total)
    partner = tl.load(pair_ptr + i, mask=live, other=0)
    f_i = tl.load(f_ptr + i[:, None] * ZP + d[None, :], mask=live[:, None], other=0.0)
    f_p = tl.load(f_ptr + partner[:, None] * ZP + d[None, :], mask=live[:, None], other=0.0)
    positive = positive_scale * tl.sum(f_i.to(tl.float32) * f_p.to(tl.float32), axis=1)
    tl.store(lse_ptr + i, lse, mask=live)
    tl.store(loss_ptr + i - start, lse - positive, mask=live)


@triton.jit
def _backward(
    f_ptr, n_ptr, lse_ptr, g_ptr, part_ptr,
    N, start, stop, same, different, span,
    ZP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """part_i = sum_j kappa_ij (g_i p_ij + g_j p_ji) f_j over `span` columns.

    Row i as a query gives g_i p_ij, as a column of query j it gives g_j p_ji. A view that is no
    query has g = 0 and lse = inf, so its p is zero.
    """
    block = tl.program_id(0) * BM
    i = block.to(tl.int64) + tl.arange(0, BM)
    d = tl.arange(0, ZP)
    f_i = tl.load(f_ptr + i[:, None] * ZP + d[None, :], mask=(i < N)[:, None], other=0.0)
    n_i = tl.load(n_ptr + i, mask=i < N, other=0)
    lse_i = tl.load(lse_ptr + i, mask=i < N, other=float("inf"))
    g_i = tl.load(g_ptr + i, mask=i < N, other=0.0)
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, N)
    if (block >= stop) | (block + BM <= start):  # no query in this block: queries as columns only
        first = tl.maximum(first, start // BN * BN)
        last = tl.minimum(last, stop)
    df = tl.zeros((BM, ZP), tl.float32)
    for j0 in range(first, last, BN):
        j = j0 + tl.arange(0, BN).to(tl.int64)
        f_j = tl.load(f_ptr + j[:, None] * ZP + d[None, :], mask=(j < N)[:, None], other=0.0)
        s = tl.dot(f_i, tl.trans(f_j), input_precision=PRECISION)
        n_j = tl.load(n_ptr + j, mask=j < N, other=0)
        lse_j = tl.load(lse_ptr + j, mask=j < N, other=float("inf"))
        g_j = tl.load(g_ptr + j, mask=j < N, other=0.0)
        kappa = tl.where(n_i[:, None] == n_j[None, :], same, different)
        keep = (i < N)[:, None] & (j < N)[None, :] & (i[:, None] != j[None, :])
        s = tl.where(keep, s * kappa, -float("inf"))
        w = g_i[:, None] * tl.exp(s - lse_i[:, None]) + g_j[None, :] * tl.exp(s - lse_j[None, :])
        df = tl.dot((kappa * w).to(f_j.dtype), f_j, df, input_precision=PRECISION)
    out = tl.program_id(1).to(tl.int64) * N + i
    tl.store(part_ptr + out[:, None] * ZP + d[None, :], df, mask=(i < N)[:, None])


@triton.jit
def _finish_backward(
    f_ptr, norm_ptr, pair_ptr, g_ptr, unit_ptr, part_ptr, dz_ptr,
    N, Z, positive_scale, splits, eps,
    ZP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """df_i = sum of its parts - s (g_i + g_pair(i)) f_pair(i); then through eq. 6 to z."""
    i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    d = tl.arange(0, ZP)
    live = i < N
    df = tl.zeros((BM, ZP), tl.float32)
    at = i
    for _ in range(0, splits):
        df += tl.load(part_ptr + at[:, None] * ZP + d[None, :], mask=live[:, None], other=0.0)
        at += N
    partner = tl.load(pair_ptr + i, mask=live, other=0)
    g = tl.load(g_ptr + i, mask=live, other=0.0) + tl.load(g_ptr + partner, mask=live, other=0.0)
    f_p = tl.load(f_ptr + partner[:, None] * ZP + d[None, :], mask=live[:, None], other=0.0)
    f_i = tl.load(f_ptr + i[:, None] * ZP + d[None, :], mask=live[:, None], other=0.0)
    f_i = f_i.to(tl.float32)
    df = tl.load(unit_ptr) * (df - (positive_scale * g)[:, None] * f_p.to(tl.float32))
    norm = tl.load(norm_ptr + i, mask=live, other=1.0)
    along = tl.where(norm >= eps, tl.sum(df * f_i, axis=1), 0.0)  # a clamped norm is a constant
    dz = (df - along[:, None] * f_i) / tl.maximum(norm, eps)[:, None]
    dz = dz.to(dz_ptr.dtype.element_ty)
    tl.store(dz_ptr + i[:, None] * Z + d[None, :], dz, mask=live[:, None] & (d < Z)[None, :])


# ---------------------------------------------------------------------------- autograd


# (BM, BN, warps, stages) for Z up to 128, 256 and 512. Fixed, not tuned at run time: a timing must
# not choose the order of a sum. A test compiles all of them: none spills, each fits 99 kB.
CONFIGS = {
    ("_forward", "ieee"): [(32, 64, 8, 1), (32, 32, 8, 1), (16, 16, 8, 1)],
    ("_forward", "tf32"): [(64, 64, 8, 2), (32, 32, 8, 1), (32, 16, 8, 1)],
    ("_forward", "half"): [(64, 64, 8, 2), (64, 32, 8, 1), (32, 32, 8, 1)],
    ("_backward", "ieee"): [(32, 64, 16, 1), (16, 32, 8, 1), (16, 16, 8, 1)],
    ("_backward", "tf32"): [(32, 64, 8, 1), (16, 32, 8, 1), (16, 16, 4, 1)],
    ("_backward", "half"): [(64, 64, 8, 2), (64, 32, 8, 1), (32, 16, 8, 1)],
}


def config(kernel: str, kind: str, ZP: int) -> tuple[dict, dict]:
    """Tile and launch arguments of `_forward` or `_backward`, for features padded to ZP.

    kind: "ieee" (float32), "tf32" (float32 on the matrix units), "half" (float16 and bfloat16).
    """
    BM, BN, warps, stages = CONFIGS[kernel, kind][0 if ZP <= 128 else 1 if ZP == 256 else 2]
    tile = dict(ZP=ZP, BM=BM, BN=BN, PRECISION="tf32" if kind == "tf32" else "ieee")
    return tile, dict(num_warps=warps, num_stages=stages)


class _Fused(torch.autograd.Function):
    """[P:(5)] by the kernels: R losses; gradients for z and, where asked for, for c."""

    @staticmethod
    def forward(ctx, z, n, pair, c, kappa, start, stop, allow_tf32):
        same, different, positive_scale = kappa
        (N, Z), R = z.shape, stop - start
        ZP = max(16, triton.next_power_of_2(Z))
        kind = "half" if z.dtype != torch.float32 else "tf32" if allow_tf32 else "ieee"
        tile, launch = config("_forward", kind, ZP)
        f, norm = z.new_empty(N, ZP), z.new_empty(N, dtype=torch.float32)
        _prepare[(triton.cdiv(N, 16),)](
            z, n, c, f, norm, N, Z, *z.stride(), *c.stride(), EPS, ZP=ZP, BM=16
        )
        splits, span = _splits(R, N, tile["BM"], tile["BN"])
        largest, total = norm.new_empty(2, splits, R)
        _forward[(triton.cdiv(R, tile["BM"]), splits)](
            f, n, largest, total, N, start, stop, same, different, span, **tile, **launch
        )
        lse, loss = torch.full_like(norm, math.inf), norm.new_empty(R)
        _finish_forward[(triton.cdiv(R, 16),)](
            f, pair, largest, total, lse, loss, start, stop, positive_scale, splits, ZP=ZP, BM=16
        )
        ctx.save_for_backward(f, norm, n, pair, lse)
        ctx.rest = kappa, start, stop, kind, z.dtype, c.dtype, c.shape
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        f, norm, n, pair, lse = ctx.saved_tensors
        (same, different, positive_scale), start, stop, kind, dtype, c_dtype, A_Z = ctx.rest
        (N, ZP), Z = f.shape, A_Z[1]
        tile, launch = config("_backward", kind, ZP)
        weight = torch.zeros_like(norm)
        weight[start:stop] = g  # (N,), zero where a view is no query; g may have stride 0
        # The mean's 1/N times p is nothing in float16: work in units of the largest |g|.
        unit = weight.abs().amax() if f.dtype == torch.float16 else norm.new_ones(())
        weight /= unit.clamp_min(torch.finfo(torch.float32).tiny)
        splits, span = _splits(N, N, tile["BM"], tile["BN"])
        parts = norm.new_empty(splits, N, ZP)
        _backward[(triton.cdiv(N, tile["BM"]), splits)](
            f, n, lse, weight, parts, N, start, stop, same, different, span, **tile, **launch
        )
        exact = torch.float32 if ctx.needs_input_grad[3] else dtype
        dz = torch.empty(N, Z, dtype=exact, device=f.device)
        _finish_backward[(triton.cdiv(N, 16),)](
            f, norm, pair, weight, unit, parts, dz, N, Z, positive_scale, splits, EPS, ZP=ZP, BM=16
        )
        dc = None
        if ctx.needs_input_grad[3]:  # dc_a = -sum of dz over class a, as a product: no atomics
            member = n[None, :] == torch.arange(A_Z[0], device=n.device)[:, None]  # (A, N)
            dc = -(member.to(dz.dtype) @ dz).to(c_dtype)
        return dz.to(dtype), None, None, dc, None, None, None, None


def _splits(rows: int, columns: int, BM: int, BN: int) -> tuple[int, int]:
    """How often to split the columns so that PROGRAMS run, and how many columns a split holds."""
    blocks = triton.cdiv(columns, BN)
    wanted = max(1, min(blocks, PROGRAMS // triton.cdiv(rows, BM)))
    span = triton.cdiv(blocks, wanted) * BN
    return triton.cdiv(columns, span), span


# ---------------------------------------------------------------------------- public functions


def _check(z, n, pair, c, rows):
    """Refuse what the formula does not define; one wait for the device in all."""
    if z.ndim != 2 or len(z) < 2 or z.shape[1] < 1 or not z.dtype.is_floating_point:
        raise ValueError(f"z must be a float (N >= 2, Z), got {tuple(z.shape)} {z.dtype}")
    N, Z = z.shape
    if c.ndim != 2 or c.shape[1] != Z or not c.dtype.is_floating_point or len(c) < 1:
        raise ValueError(f"c must be a float (A, Z={Z}), got {tuple(c.shape)} {c.dtype}")
    for name, ids in (("n", n), ("pair", pair)):
        if ids.shape != (N,) or ids.dtype != torch.int64:
            raise ValueError(f"{name} must be int64 ({N},), got {tuple(ids.shape)} {ids.dtype}")
    if not z.device == n.device == pair.device == c.device:
        where = ", ".join(str(t.device) for t in (z, n, pair, c))
        raise ValueError(f"z, n, pair, c must be on one device, got {where}")
    start, stop = rows if rows is not None else (0, N)
    if not 0 <= start < stop <= N:
        raise ValueError(f"rows must be (start, stop), 0 <= start < stop <= {N}, got {rows}")
    i = torch.arange(N, device=z.device)
    partner = pair.clamp(0, N - 1)
    wrong = (n.clamp(0, len(c) - 1) != n) | (partner != pair) | (pair == i)
    wrong |= (partner[partner] != i) | (n[partner] != n)
    if wrong.any():
        k = int(wrong.nonzero()[0])
        raise ValueError(
            f"n must be in 0..{len(c) - 1} and pair the other view of the same image (pair[pair[i]]"
            f" = i != pair[i], same class), got at i={k}: n={int(n[k])}, pair={int(pair[k])}, "
            f"n[pair]={int(n[partner[k]])}, pair[pair]={int(pair[partner[k]])}"
        )
    return start, stop


def contrastive_rows(
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
    allow_tf32: bool = False,
) -> Tensor:
    """-log exp(s f_i.f_pair(i)) / sum_{j != i} exp(kappa(n_i, n_j) f_i.f_j), per query.  [P:(5)]

    Arguments, `raises:` and precision as `contrastive`.
    returns: (R,) float32 (float64 for a float64 z).
    """
    start, stop = _check(z, n, pair, c, rows)
    kappa = scales(tau, alpha, positive_scale)
    if choose_backend(backend, z.device) == "torch":
        return _torch_losses(z, n, pair, c, kappa, start, stop)
    if z.dtype not in (torch.float32, torch.float16, torch.bfloat16) or z.shape[1] > MAX_Z:
        raise ValueError(
            f"the Triton path takes float32, float16, bfloat16 and Z <= {MAX_Z}, got {z.dtype} and "
            f'Z={z.shape[1]}: use backend="torch"'
        )
    n, pair = n.contiguous(), pair.contiguous()
    with torch.cuda.device_of(z):  # Triton launches on the current device
        return _Fused.apply(z, n, pair, c, kappa, start, stop, allow_tf32)


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
    allow_tf32: bool = False,
) -> Tensor:
    """E_i[-log exp(s f_i.f_pair(i)) / sum_{j != i} exp(kappa(n_i, n_j) f_i.f_j)].  [P:(4)]

    z:              (N, Z) features f_theta(x) of the views, N >= 2, any float dtype and strides.
                    A float16 or bfloat16 z keeps f of eq. 6 in its own dtype on a GPU; all sums
                    are float32. Z <= 512 on the Triton path.
    n:              (N,) int64, class of each view, 0..A-1, in any order.           [P!§3.1 R1]
    pair:           (N,) int64, the other weak view of the same strong image.
    c:              (A, Z) centres of eq. 2; gets a gradient only if it asks for one.
    tau, alpha:     temperature and its factor within a class, both > 0.            [P!(7) R3]
    positive_scale: s: "kappa", "tau" or a number, see `scales`.                    [P!(5) R2]
    backend:        "auto" (by the device), "torch" or "triton".
    rows:           (start, stop): only these views are queries, all N stay in the denominator.
                    With z gathered over ranks, each rank passes its own rows.
    allow_tf32:     Triton path, float32 z: round products to 10 bits, as fast as 16-bit floats.
    returns:        scalar, the mean over the queries; float32 (float64 for a float64 z).
    raises:         ValueError for a wrong shape, dtype, device or id, N < 2, a pair that is not
                    an involution within the class, an unusable backend.
    """
    return contrastive_rows(
        z, n, pair, c, tau=tau, alpha=alpha, positive_scale=positive_scale, backend=backend,
        rows=rows, allow_tf32=allow_tf32,
    ).mean()  # fmt: skip
