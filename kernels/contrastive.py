"""The centred contrastive loss, with a temperature for each pair of classes.   [P:(4)]-[P:(7)]

The definition, losses.contrastive_losses, also runs on a CPU. The kernels never store its (R, N)
matrix: the backward pass computes tiles again. No atomics: the same bits every time. Exponents
kappa_ij f_i.f_j are taken less the largest kappa, in base 2: with kappa <= MAX_KAPPA float32 holds
them, so no running maximum is needed. Rows are padded to whole tiles, so that only tiles at the
edge and on the diagonal need a mask.

Sizes: N views (both weak views of every strong image), Z features, A classes, R of the N views
as queries (all of them in one process, a rank's own under torch.distributed).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import choose_backend, precision, tf32, tl, triton
from losses import EPS, contrastive_losses, kappas

MAX_KAPPA = 43  # exp(-2 * 43) is a normal float32
MAX_Z = 512  # widest feature of the Triton path: a tile of rows must fit a processor
PAD = 128  # rows of the largest tile
PROGRAMS = 1024  # columns are split until so many programs run, whatever the card: same bits

# ---------------------------------------------------------------------------- kernels


@triton.jit
def _prepare(
    z_ptr, n_ptr, pair_ptr, c_ptr, f_ptr, norm_ptr, id_ptr, partner_ptr,
    N, A, Z, z_row, z_col, c_row, c_col, eps,
    ZP: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """f and the norm of eq. 6 before its clamp; zero past N and Z, NaN where n or pair is wrong."""
    i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # i * ZP passes 2**31
    d = tl.arange(0, ZP).to(tl.int64)  # d * z_col too, where N is the last axis
    n = tl.load(n_ptr + i, mask=i < N, other=-1)
    pair = tl.load(pair_ptr + i, mask=i < N, other=-1)
    known, inside = (n >= 0) & (n < A), (pair >= 0) & (pair < N)
    right = known & (pair != i) & (tl.load(pair_ptr + pair, mask=inside, other=-1) == i)
    right &= tl.load(n_ptr + pair, mask=inside, other=-1) == n
    live = known[:, None] & (d < Z)[None, :]
    z = tl.load(z_ptr + i[:, None] * z_row + d[None, :] * z_col, mask=live, other=0.0)
    c = tl.load(c_ptr + n[:, None] * c_row + d[None, :] * c_col, mask=live, other=0.0)
    u = tl.where((right | (i >= N))[:, None], z.to(tl.float32) - c.to(tl.float32), float("nan"))
    norm = tl.sqrt_rn(tl.sum(u * u, axis=1))
    f = tl.div_rn(u, tl.broadcast_to(tl.maximum(norm, eps)[:, None], BM, ZP))
    if PRECISION == "tf32":
        f = tf32(f)
    tl.store(f_ptr + i[:, None] * ZP + d[None, :], f.to(f_ptr.dtype.element_ty))
    tl.store(norm_ptr + i, norm)
    tl.store(id_ptr + i, n.to(tl.int32))
    tl.store(partner_ptr + i, tl.where(inside, pair, 0).to(tl.int32))


@triton.jit
def _rows(f_ptr, id_ptr, i0, ZP: tl.constexpr, B: tl.constexpr):
    """Numbers, f and class ids of the B rows from i0 on."""
    i = i0 + tl.arange(0, B)
    f = tl.load(f_ptr + i.to(tl.int64)[:, None] * ZP + tl.arange(0, ZP)[None, :])
    return i, f, tl.load(id_ptr + i)


@triton.jit
def _exponents(
    i0, i, f_i, n_i, j0, j, f_j, n_j, N, same, different,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """log2(e) (kappa_ij f_i.f_j - max kappa), -inf where j = i or j >= N; and log2(e) kappa_ij."""
    same, different = same * 1.4426950408889634, different * 1.4426950408889634  # log2(e)
    kappa = tl.where(n_i[:, None] == n_j[None, :], same, different)
    s = tl.dot(f_i, tl.trans(f_j), input_precision=PRECISION) * kappa - tl.maximum(same, different)
    if (j0 + BN > N) | ((j0 < i0 + BM) & (i0 < j0 + BN)):
        s = tl.where((j < N)[None, :] & (i[:, None] != j[None, :]), s, -float("inf"))
    return s, kappa


@triton.jit
def _forward(
    f_ptr, id_ptr, sum_ptr, N, start, stop, same, different, span,
    ZP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_j exp(kappa_ij f_i.f_j - max kappa) of BM rows over `span` columns."""
    i0 = (start // BM + tl.program_id(0)) * BM
    i, f_i, n_i = _rows(f_ptr, id_ptr, i0, ZP, BM)
    first = tl.program_id(1) * span
    total = tl.zeros((BM,), tl.float32)
    for j0 in range(first, tl.minimum(first + span, N), BN):
        j, f_j, n_j = _rows(f_ptr, id_ptr, j0, ZP, BN)
        s, _ = _exponents(i0, i, f_i, n_i, j0, j, f_j, n_j, N, same, different, BM, BN, PRECISION)
        total += tl.sum(tl.exp2(s), axis=1)
    at = tl.program_id(1).to(tl.int64) * N + i
    tl.store(sum_ptr + at, total, mask=(i >= start) & (i < stop))


@triton.jit
def _finish_forward(
    f_ptr, partner_ptr, sum_ptr, inverse_ptr, loss_ptr,
    N, start, stop, positive_scale, largest, splits, ZP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Join the splits, then l_i = max kappa + log(sum) - s f_i.f_pair(i); and ln(2) / sum."""
    i = start + tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    d, live = tl.arange(0, ZP)[None, :], i < stop
    total, at = tl.zeros((BM,), tl.float32), i
    for _ in range(0, splits):
        total += tl.load(sum_ptr + at, mask=live, other=1.0)
        at += N
    p = tl.load(partner_ptr + i, mask=live, other=0).to(tl.int64)
    f_i = tl.load(f_ptr + i[:, None] * ZP + d, mask=live[:, None], other=0.0).to(tl.float32)
    f_p = tl.load(f_ptr + p[:, None] * ZP + d, mask=live[:, None], other=0.0).to(tl.float32)
    loss = largest + tl.log(total) - positive_scale * tl.sum(f_i * f_p, axis=1)
    tl.store(loss_ptr + i - start, loss, mask=live)
    inverse = tl.div_rn(tl.full((BM,), 0.6931471805599453, tl.float32), total)
    tl.store(inverse_ptr + i - start, inverse, mask=live)


@triton.jit
def _backward(
    f_ptr, id_ptr, a_ptr, part_ptr, N, start, stop, same, different, span,
    ZP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """part_i = sum_j kappa_ij (a_i + a_j) exp(...) f_j over `span` columns, a = g / sum: row i as
    a query gives a_i, as a column of query j it gives a_j, and a is zero for a non-query."""
    i0 = tl.program_id(0) * BM
    i, f_i, n_i = _rows(f_ptr, id_ptr, i0, ZP, BM)
    a_i = tl.load(a_ptr + i)
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, N)
    if (i0 >= stop) | (i0 + BM <= start):  # no query in this block: queries as columns only
        first = tl.maximum(first, start // BN * BN)
        last = tl.minimum(last, stop)
    df = tl.zeros((BM, ZP), tl.float32)
    for j0 in range(first, last, BN):
        j, f_j, n_j = _rows(f_ptr, id_ptr, j0, ZP, BN)
        a_j = tl.load(a_ptr + j)
        s, k = _exponents(i0, i, f_i, n_i, j0, j, f_j, n_j, N, same, different, BM, BN, PRECISION)
        w = (a_i[:, None] + a_j[None, :]) * (k * tl.exp2(s))  # a alone may near the largest float
        if PRECISION == "tf32":
            w = tf32(w)
        df = tl.dot(w.to(f_j.dtype), f_j, df, input_precision=PRECISION)
    at = (tl.program_id(1).to(tl.int64) * N + i)[:, None] * ZP + tl.arange(0, ZP)[None, :]
    tl.store(part_ptr + at, df, mask=(i < N)[:, None])


@triton.jit
def _finish_backward(
    f_ptr, norm_ptr, partner_ptr, g_ptr, unit_ptr, part_ptr, dz_ptr,
    Z, N, start, stop, g_stride, positive_scale, splits, eps, ZP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """df_i = sum of its parts - s (g_i + g_pair(i)) f_pair(i); then through eq. 6 to z."""
    i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    d, live = tl.arange(0, ZP)[None, :], (i < N)[:, None]
    df, at = tl.zeros((BM, ZP), tl.float32), i
    for _ in range(0, splits):
        df += tl.load(part_ptr + at[:, None] * ZP + d, mask=live, other=0.0)
        at += N
    if unit_ptr is not None:
        df *= tl.load(unit_ptr)
    p = tl.load(partner_ptr + i).to(tl.int64)
    g = tl.load(g_ptr + (i - start) * g_stride, mask=(i >= start) & (i < stop), other=0.0)
    g += tl.load(g_ptr + (p - start) * g_stride, mask=(p >= start) & (p < stop), other=0.0)
    df -= (positive_scale * g)[:, None] * tl.load(f_ptr + p[:, None] * ZP + d).to(tl.float32)
    f_i = tl.load(f_ptr + i[:, None] * ZP + d).to(tl.float32)
    norm = tl.load(norm_ptr + i)
    along = tl.where(norm >= eps, tl.sum(df * f_i, axis=1), 0.0)  # a clamped norm is a constant
    norm = tl.broadcast_to(tl.maximum(norm, eps)[:, None], BM, ZP)
    dz = tl.div_rn(df - along[:, None] * f_i, norm)
    tl.store(dz_ptr + i[:, None] * Z + d, dz, mask=live & (d < Z))


# ---------------------------------------------------------------------------- autograd

# (BM, BN, warps, stages) for Z up to 128, 256, 512, all within 99 kB; fixed, as are the sums
CONFIGS = {
    ("_forward", "half"): [(128, 64, 8, 3), (64, 32, 8, 1), (32, 32, 8, 1)],
    ("_forward", "tf32"): [(64, 64, 4, 2), (32, 32, 8, 1), (32, 16, 8, 1)],
    ("_forward", "tf32x3"): [(32, 64, 4, 2)],
    ("_forward", "ieee"): [(32, 64, 4, 1), (32, 32, 8, 1), (16, 16, 8, 1)],
    ("_backward", "half"): [(64, 64, 4, 2), (64, 32, 8, 1), (32, 16, 8, 1)],
    ("_backward", "tf32"): [(64, 32, 4, 2), (16, 32, 8, 1), (16, 16, 4, 1)],
    ("_backward", "tf32x3"): [(32, 64, 8, 1)],
    ("_backward", "ieee"): [(64, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)],
}


def config(kernel: str, kind: str, ZP: int) -> tuple[dict, dict]:
    """Tile and launch arguments. kind: "half" (16-bit floats) or what kernels.precision says."""
    kind = "ieee" if kind == "tf32x3" and ZP > 128 else kind  # no registers for both halves
    BM, BN, warps, stages = CONFIGS[kernel, kind][0 if ZP <= 128 else 1 if ZP == 256 else 2]
    tile = dict(ZP=ZP, BM=BM, BN=BN, PRECISION="ieee" if kind == "half" else kind)
    return tile, dict(num_warps=warps, num_stages=stages)


class _Fused(torch.autograd.Function):
    """[P:(5)] by the kernels: R losses; gradients for z and, where asked for, for c."""

    @staticmethod
    def forward(ctx, z, n, pair, c, kappa, rows, allow_tf32):
        (N, Z), A, (start, stop) = z.shape, len(c), rows
        kind = precision(z.device, allow_tf32) if z.dtype == torch.float32 else "half"
        tile, launch = config("_forward", kind, max(16, triton.next_power_of_2(Z)))
        ZP, padded = tile["ZP"], triton.cdiv(N, PAD) * PAD
        f, norm = z.new_empty(padded, ZP), z.new_empty(padded, dtype=torch.float32)
        ids, partner = n.new_empty(2, padded, dtype=torch.int32)
        _prepare[(padded // 16,)](
            z, n, pair, c, f, norm, ids, partner, N, A, Z, *z.stride(), *c.stride(), EPS,
            ZP=ZP, BM=16, PRECISION=tile["PRECISION"],
        )  # fmt: skip
        (blocks, splits), span = _grid(start, stop, N, tile)
        sums, (inverse, loss) = norm.new_empty(splits, N), norm.new_empty(2, stop - start)
        _forward[blocks, splits](f, ids, sums, N, start, stop, *kappa[:2], span, **tile, **launch)
        _finish_forward[(triton.cdiv(stop - start, 16),)](
            f, partner, sums, inverse, loss, N, start, stop, kappa[2], max(kappa[:2]), splits,
            ZP=ZP, BM=16,
        )  # fmt: skip
        ctx.save_for_backward(f, norm, ids, partner, inverse)
        ctx.rest = kappa, start, stop, kind, z.dtype, c.dtype, N, Z, A
        return loss

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            raise RuntimeError('no second derivative on the Triton path: use backend="torch"')
        f, norm, ids, partner, inverse = ctx.saved_tensors
        kappa, start, stop, kind, dtype, c_dtype, N, Z, A = ctx.rest
        a, unit = torch.zeros_like(norm), None
        torch.mul(g, inverse, out=a[start:stop])
        if dtype == torch.float16:  # too narrow for the mean's 1/N: in units of the largest |g|
            unit = g.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
            a /= unit
        tile, launch = config("_backward", kind, f.shape[1])
        (blocks, splits), span = _grid(0, N, N, tile)
        parts, dz = norm.new_empty(splits, N, tile["ZP"]), norm.new_empty(N, Z)
        size = N, start, stop
        _backward[blocks, splits](f, ids, a, parts, *size, *kappa[:2], span, **tile, **launch)
        _finish_backward[(triton.cdiv(N, 16),)](
            f, norm, partner, g, unit, parts, dz, Z, *size, g.stride(0), kappa[2], splits, EPS,
            ZP=tile["ZP"], BM=16,
        )  # fmt: skip
        dc = None
        if ctx.needs_input_grad[3]:  # dc_a = -sum of dz over class a, without atomics
            member = ids[:N] == torch.arange(A, device=ids.device)[:, None]  # (A, N); no
            dc = -(member.double() @ dz.double()).to(c_dtype)  # autocast or TF32 touches float64
        return dz.to(dtype), None, None, dc, None, None, None


def _grid(start: int, stop: int, N: int, tile: dict) -> tuple[tuple[int, int], int]:
    """Blocks of rows, splits of the columns so that PROGRAMS run, and the columns of a split."""
    blocks, tiles = triton.cdiv(stop, tile["BM"]) - start // tile["BM"], triton.cdiv(N, tile["BN"])
    span = triton.cdiv(tiles, max(1, min(tiles, PROGRAMS // blocks))) * tile["BN"]
    return (blocks, triton.cdiv(N, span)), span


# ---------------------------------------------------------------------------- public functions


def _check(z, n, pair, c, rows):
    """Refuse shapes, dtypes and devices that the formula does not define."""
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
    if not 0 <= rows[0] < rows[1] <= N:
        raise ValueError(f"rows must be (start, stop), 0 <= start < stop <= {N}, got {rows}")


def _check_ids(n, pair, A):
    """Refuse wrong ids in words, at the price of a wait for the device."""
    i = torch.arange(len(n), device=n.device)
    p = pair.clamp(0, len(n) - 1)
    wrong = (n < 0) | (n >= A) | (p != pair) | (p == i) | (p[p] != i) | (n[p] != n)
    if wrong.any():
        k = int(wrong.nonzero()[0])
        raise ValueError(
            f"n must be in 0..{A - 1}, pair[i] a view of the same class with pair[pair[i]] = i != "
            f"pair[i], got at i={k}: n={int(n[k])}, pair={int(pair[k])}"
        )


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

    n, pair, c, tau, alpha, positive_scale, rows: as losses.contrastive_losses takes them.

    z:          (N, Z), N >= 2, any float dtype and strides. A 16-bit z keeps f of eq. 6 in its own
                dtype on a GPU; all sums are float32. Z <= 512 on the Triton path.
    backend:    "auto" (by the device), "torch" or "triton"; with kappa > 43 always torch.
    allow_tf32: Triton path, float32 z: round products to 10 bits, as fast as 16-bit floats.
    reduction:  "mean" (eq. 4) or "none" (eq. 5 for each query).
    returns:    scalar or (R,), float32 (float64 for a float64 z); on the Triton path NaN if an id
                is out of range or pairs are not mutual within a class: nothing waits for the GPU.
    raises:     ValueError for all else that is wrong, and on the torch path for ids and pairs.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction must be "mean" or "none", got {reduction!r}')
    rows = rows or (0, len(z))
    _check(z, n, pair, c, rows)
    kappa = kappas(tau, alpha, positive_scale)
    if choose_backend(backend, z.device) == "torch" or max(kappa[:2]) > MAX_KAPPA:
        _check_ids(n, pair, len(c))
        losses = contrastive_losses(
            z, n, pair, c, tau=tau, alpha=alpha, positive_scale=positive_scale, rows=rows
        )
    elif z.dtype not in (torch.float32, torch.float16, torch.bfloat16) or z.shape[1] > MAX_Z:
        raise ValueError(
            f"the Triton path takes float32, float16, bfloat16 and Z <= {MAX_Z}, got {z.dtype} and "
            f'Z={z.shape[1]}: use backend="torch"'
        )
    else:
        with torch.cuda.device(z.get_device()):  # Triton launches on the current device
            losses = _Fused.apply(z, n.contiguous(), pair.contiguous(), c, kappa, rows, allow_tf32)
    return losses.mean() if reduction == "mean" else losses
