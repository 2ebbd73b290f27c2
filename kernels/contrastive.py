"""The centred contrastive loss, with a temperature for each pair of classes.   [P:(4)]-[P:(7)]

The definition is losses.contrastive_losses, which is also what runs on a CPU. The kernels here
never store its (R, N) matrix: three launches forward and two backward, in which the tiles are
computed again from the saved log-sum-exp. No floating-point atomics, so the same bits every time.
What they should cost on a GPU is in docs/speed.md; no GPU was at hand, so the kernels are checked
in Triton's interpreter and by compiling them ahead of time.

Sizes: N views (both weak views of every strong image), Z features, A classes, R of the N views
as queries (all of them in one process, a rank's own under torch.distributed).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import choose_backend, tl, triton
from losses import EPS, contrastive_losses, kappas

MAX_Z = 512  # widest feature of the Triton path: a tile of rows must fit a processor
PROGRAMS = 256  # columns are split until so many programs run, whatever the card: same bits

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
    reduction: str = "mean",
) -> Tensor:
    """E_i -log exp(s f_i.f_pair(i)) / sum_{j != i} exp(kappa(n_i, n_j) f_i.f_j).   [P:(4) P:(5)]

    z, n, pair, c, tau, alpha, positive_scale, rows: as losses.contrastive_losses takes them.

    z:          (N, Z), N >= 2, any float dtype and strides. A 16-bit z keeps f of eq. 6 in its own
                dtype on a GPU; all sums are float32. Z <= 512 on the Triton path.
    c:          gets a gradient only if it requires one.
    backend:    "auto" (by the device), "torch" or "triton".
    rows:       with z gathered over ranks, each rank passes its own.
    allow_tf32: Triton path, float32 z: round products to 10 bits, as fast as 16-bit floats.
    reduction:  "mean" (eq. 4) or "none" (eq. 5 for each query).
    returns:    scalar or (R,), float32 (float64 for a float64 z).
    raises:     ValueError for a wrong shape, dtype, device or id, N < 2, a pair that is not
                an involution within the class, an unusable backend or reduction.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction must be "mean" or "none", got {reduction!r}')
    start, stop = _check(z, n, pair, c, rows)
    kappa = kappas(tau, alpha, positive_scale)
    if choose_backend(backend, z.device) == "torch":
        losses = contrastive_losses(
            z, n, pair, c, tau=tau, alpha=alpha, positive_scale=positive_scale, rows=rows
        )
    elif z.dtype not in (torch.float32, torch.float16, torch.bfloat16) or z.shape[1] > MAX_Z:
        raise ValueError(
            f"the Triton path takes float32, float16, bfloat16 and Z <= {MAX_Z}, got {z.dtype} and "
            f'Z={z.shape[1]}: use backend="torch"'
        )
    else:
        with torch.cuda.device_of(z):  # Triton launches on the current device
            ids = n.contiguous(), pair.contiguous()
            losses = _Fused.apply(z, *ids, c, kappa, start, stop, allow_tf32)
    return losses.mean() if reduction == "mean" else losses
