"""[P:(5)] on the torch path: one tile of the (N, N) matrix in memory, for `contrastive.py`.

Rows are sorted by class, so that kappa is one number in a tile; the matrix is symmetric, so that
only tiles of its upper triangle are computed; and the backward pass computes them again, so that
memory is linear in N.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 256  # side of a tile: 256 kB in float32, which a core's cache holds
KAPPA_MAX = 43.0  # below it exp(+-kappa) N fits float32, and no maximum need be subtracted


def _blocks(sizes: list[int]) -> list[tuple[int, int, int]]:
    """Cut rows sorted by label into blocks of at most TILE rows: (start, stop, label).

    A block holds one label, so that kappa is one number in a tile; scraps of several labels
    share a block of label -1.
    """
    blocks: list[tuple[int, int, int]] = []
    first = 0
    for label, size in enumerate(sizes):
        parts = -(-size // TILE)
        for k in range(parts):
            start, stop = first + size * k // parts, first + size * (k + 1) // parts
            begin, end, last = blocks[-1] if blocks else (0, TILE, 0)
            scraps = stop - start < TILE // 4 and (last == -1 or end - begin < TILE // 4)
            if scraps and stop - begin <= TILE:
                blocks[-1] = (begin, stop, -1)
            else:
                blocks.append((start, stop, label))
        first += size
    return blocks


def _tiles(f, n, blocks, same, different):
    """exp(kappa_ij f_i.f_j) for every tile of the upper triangle, zero where i = j.

    f, n:   (N, Z) and (N,) in sorted order.
    blocks: of `_blocks`; label 2 a is class a as a query, 2 a + 1 class a as a column only.
    yields: slice of rows, slice of columns, kappa (a number or a tile), the tile. It is a
            buffer that the next tile overwrites.
    """
    label = n.to(f.dtype)  # compared into a float buffer: five times cheaper than into a mask
    buffer, kappas = f.new_empty(2, min(len(f), TILE) ** 2)
    for k, (i0, i1, label_i) in enumerate(blocks):
        for j0, j1, label_j in blocks[k:]:
            if label_i % 2 == 1 and label_j % 2 == 1 and -1 not in (label_i, label_j):
                continue  # neither side is a query
            i, j = slice(i0, i1), slice(j0, j1)
            e = buffer[: (i1 - i0) * (j1 - j0)].view(i1 - i0, j1 - j0)
            if label_i == -1 or label_j == -1:
                kappa = torch.eq(label[i, None], label[None, j], out=kappas[: e.numel()].view_as(e))
                kappa.mul_(same - different).add_(different)
                torch.mm(f[i], f[j].T, out=e).mul_(kappa)
            else:
                kappa = same if label_i // 2 == label_j // 2 else different
                torch.addmm(e, f[i], f[j].T, beta=0, alpha=kappa, out=e)
            e.exp_()
            if i0 == j0:
                e.diagonal().zero_()
            yield i, j, kappa, e


class Tiled(torch.autograd.Function):
    """[P:(5)] with one tile in memory: sorted by class, upper triangle, recomputed in backward."""

    @staticmethod
    def forward(ctx, f, n, pair, kappa, start, stop):
        same, different, positive_scale = kappa
        label = 2 * n + 1
        label[start:stop] -= 1
        if len(f) > TILE:
            order = label.argsort(stable=True)
            blocks = _blocks(torch.bincount(label).tolist())
        else:  # one tile, which is kept for the backward pass
            order, blocks = slice(None), [(0, len(f), -1)]
        total = f.new_zeros(len(f))  # sum_j exp(s_ij), sorted
        for tile in _tiles(f[order], n[order], blocks, same, different):
            i, j, _, e = tile
            total[i] += e.sum(dim=1)
            if i != j:
                total[j] += e.sum(dim=0)
        ctx.save_for_backward(f, n, pair, total)
        ctx.rest = kappa, start, stop, order, blocks, [tile] if len(blocks) == 1 else None
        lse = torch.empty_like(total)
        lse[order] = total.log()
        return (lse - positive_scale * (f * f[pair]).sum(dim=1))[start:stop]

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        f, n, pair, total = ctx.saved_tensors
        (same, different, positive_scale), start, stop, order, blocks, kept = ctx.rest
        weight = f.new_zeros(len(f))
        weight[start:stop] = g  # (N,), zero where a view is no query
        over = weight[order] / total
        f_sorted, both = f[order], f.new_empty(min(len(f), TILE) ** 2)
        df_sorted = torch.zeros_like(f)
        for i, j, kappa, e in kept or _tiles(f_sorted, n[order], blocks, same, different):
            w = both[: e.numel()].view_as(e)
            torch.add(over[i, None], over[None, j], out=w)
            w.mul_(e)  # g_i p_ij + g_j p_ji
            if isinstance(kappa, Tensor):
                w.mul_(kappa)
                kappa = 1.0
            df_sorted[i].addmm_(w, f_sorted[j], alpha=kappa)
            if i != j:
                df_sorted[j].addmm_(w.T, f_sorted[i], alpha=kappa)
        df = torch.empty_like(f)
        df[order] = df_sorted
        df -= positive_scale * (weight + weight[pair])[:, None] * f[pair]
        return df, None, None, None, None, None
