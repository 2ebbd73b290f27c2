"""The page: the paper's formulas, and those it compares with, as loops in float64; and batches.

Sizes as in losses.py: N views, A classes, B images, Z features.
"""

from __future__ import annotations

import math

import torch
from conftest import U32
from hypothesis import strategies as st


@st.composite
def features(draw):
    """z (N, Z), class ids n in any order, pairs and centres c: N = 2 A B; some z at its centre."""
    a, b, z_dim = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 8]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    n = torch.randperm(a, generator=g).repeat_interleave(2 * b)
    c = torch.randn(a, z_dim, generator=g, dtype=torch.float64)
    scale = draw(st.sampled_from([1e-3, 1.0, 1e3]))
    z = c[n] + scale * torch.randn(len(n), z_dim, generator=g, dtype=torch.float64)
    if draw(st.booleans()):
        z[0] = c[n[0]]  # the zero vector after centring
    return z.float().double(), n, torch.arange(len(n)) ^ 1, c.float().double()


def printed_eq_3(z, n, c):
    """E || z - c_n ||^2."""
    total = 0.0
    for i in range(len(z)):
        total += sum(float(z[i, d] - c[n[i], d]) ** 2 for d in range(z.shape[1]))
    return total / len(z)


def units(z, centres):
    """Eq. 6 with R6's clamp: rows of z minus rows of centres, divided by their norms."""
    f = []
    for row, centre in zip(z.tolist(), centres.tolist(), strict=True):
        u = [a - b for a, b in zip(row, centre, strict=True)]
        norm = max(math.sqrt(sum(v * v for v in u)), 1e-4)
        f.append([v / norm for v in u])
    return f


def dot(f, i, j):
    return sum(p * q for p, q in zip(f[i], f[j], strict=True))


def printed_rows_of_eq_5(z, n, pair, c, tau, alpha, scale):
    """-log of eq. 5's fraction for each i, f by eq. 6 and kappa by eq. 7."""
    f, rows = units(z, c[n]), []
    for i in range(len(z)):
        denominator = 0.0
        for j in range(len(z)):
            if j != i:
                kappa = 1 / (alpha * tau) if n[i] == n[j] else 1 / tau
                denominator += math.exp(kappa * dot(f, i, j))
        rows.append(-math.log(math.exp(scale * dot(f, i, int(pair[i]))) / denominator))
    return rows


def printed_eq_5(*batch_and_constants):
    """Their mean, eq. 4."""
    rows = printed_rows_of_eq_5(*batch_and_constants)
    return sum(rows) / len(rows)


def printed_cross_entropy(logits, target):
    """Eq. 8 and 9: -E log of the softmax at the target, as a product with a one-hot vector."""
    total = 0.0
    for row, wanted in zip(logits.tolist(), target.tolist(), strict=True):
        denominator = sum(math.exp(v) for v in row)
        probabilities = [math.exp(v) / denominator for v in row]
        one_hot = [float(j == wanted) for j in range(len(row))]
        total -= math.log(sum(p * q for p, q in zip(one_hot, probabilities, strict=True)))
    return total / len(logits)


def printed_nt_xent(z, pair, tau):
    """Chen et al., eq. 1, averaged over all views."""
    f, total = units(z, torch.zeros_like(z)), 0.0
    for i in range(len(f)):
        others = sum(math.exp(dot(f, i, j) / tau) for j in range(len(f)) if j != i)
        total -= math.log(math.exp(dot(f, i, int(pair[i])) / tau) / others)
    return total / len(f)


def printed_supcon(z, n, tau):
    """Khosla et al., eq. 2, averaged over all views."""
    f, total = units(z, torch.zeros_like(z)), 0.0
    for i in range(len(f)):
        positives = [p for p in range(len(f)) if p != i and n[p] == n[i]]
        others = sum(math.exp(dot(f, i, j) / tau) for j in range(len(f)) if j != i)
        for p in positives:
            total -= math.log(math.exp(dot(f, i, p) / tau) / others) / len(positives)
    return total / len(f)


def budget(z, want, tau):
    """f: 8 roundings a component, its sums over Z and N, amplified by 1/tau in the exponent."""
    return U32 * (1 / tau) * (16 + 2 * z.shape[1]) + U32 * (8 + 2 * len(z)) * (1 / tau + abs(want))
