"""Exact t-SNE of a few hundred points, for the figure of section 4.6.   [P:§4.6]

van der Maaten and Hinton, "Visualizing Data using t-SNE", 2008, with the exaggeration, the gains
and the learning rate that scikit-learn has. Time and memory grow with N^2. Sizes: N points, D axes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BISECTIONS = 60  # of each point's precision: to 2^-60 of the range searched
EXAGGERATED = 250  # steps with p times EXAGGERATION, so that clusters find each other
EXAGGERATION = 12.0
TINY = 1e-12  # least p and q: their logarithms stay finite


def affinities(x: Tensor, perplexity: float) -> Tensor:
    """p_ij = (p_j|i + p_i|j) / 2N, where row i of p_j|i has the entropy log(perplexity): (N, N).

    x: (N, D) float64. p_j|i is proportional to exp(-b_i |x_i - x_j|^2); b_i is found by bisection.
    """
    d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()  # (N, N)
    d = d / d.mean().clamp_min(1e-300)  # b_i is then of the order of 1
    low = torch.full((len(x), 1), -60.0, dtype=x.dtype)
    high = -low
    for _ in range(BISECTIONS):
        log_b = (low + high) / 2
        log_p = (-log_b.exp() * d).fill_diagonal_(-math.inf).log_softmax(dim=1)
        p = log_p.exp()
        entropy = -(p * log_p.fill_diagonal_(0)).sum(dim=1, keepdim=True)
        wide = entropy > math.log(perplexity)  # then b_i has to grow
        low, high = torch.where(wide, log_b, low), torch.where(wide, high, log_b)
    return ((p + p.T) / (2 * len(x))).clamp_min(TINY)


def start(x: Tensor, generator: torch.Generator) -> Tensor:
    """The two principal axes, small, and a little noise, which parts equal points: (N, 2)."""
    u, s, _ = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)
    y = torch.zeros(len(x), 2, dtype=x.dtype)
    axes = min(2, len(s))
    y[:, :axes] = u[:, :axes] * s[:axes]
    y *= y.gather(0, y.abs().argmax(dim=0, keepdim=True)).sign()  # an axis has no sign of its own
    noise = torch.randn(y.shape, generator=generator, dtype=x.dtype)
    return 1e-4 * (y / y[:, 0].std().clamp_min(TINY) + 1e-2 * noise)


def tsne(
    x: Tensor, generator: torch.Generator, *, perplexity: float = 30.0, steps: int = 1000
) -> Tensor:
    """Points in the plane whose neighbours are those of x: they minimise KL(P || Q).

    x:       (N, D).   returns: (N, 2) float64.
    raises:  ValueError unless 1 < perplexity < N.
    """
    if not 1 < perplexity < len(x):
        raise ValueError(f"perplexity must lie between 1 and N = {len(x)}, got {perplexity}")
    x = x.double().cpu()
    p, y = affinities(x, perplexity), start(x, generator)
    rate = max(len(x) / EXAGGERATION / 4, 50.0)
    velocity, gains = torch.zeros_like(y), torch.ones_like(y)
    for step in range(steps):
        early = step < EXAGGERATED
        w = (1 / (1 + torch.cdist(y, y).square())).fill_diagonal_(0)  # (N, N)
        q = (w / w.sum()).clamp_min(TINY)
        pull = ((EXAGGERATION if early else 1.0) * p - q) * w
        gradient = 4 * (pull.sum(dim=1, keepdim=True) * y - pull @ y)
        gains = torch.where(gradient * velocity < 0, gains + 0.2, gains * 0.8).clamp_min(0.01)
        velocity = (0.5 if early else 0.8) * velocity - rate * gains * gradient
        y = y + velocity
    return y
