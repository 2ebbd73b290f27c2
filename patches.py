"""Eq. 9's pairs: a 32 px patch of an image and one of its eight neighbours.   [P!(9) R18]

Sizes: B images, S pixels a side.
"""

from __future__ import annotations

import torch
from torch import Tensor

PATCH = 32  # pixels a side of IGD's local patches   [P:§4.2]
# (dy, dx) of the eight neighbours, p = 0..7, clockwise from the top left
DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))


def patch_pairs(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A patch of each image, one of its eight neighbours, and which.   [P!(9) R18]

    Along each axis of its direction the neighbour lies 24 + U{0..7} px away, never less: the
    first patch is drawn among the places that leave room for it.

    x:       (B, 3, S, S).
    returns: patches (B, 3, 32, 32), neighbours (B, 3, 32, 32), p (B,) int64.
    raises:  ValueError if S < 63, where 32 + 31 px do not fit.
    """
    b, _, s, _ = x.shape
    if s < 2 * PATCH - 1:
        raise ValueError(f"eq. 9 needs images of {2 * PATCH - 1} px or more a side, got {s}")

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, device=generator.device)

    p = draw(8, b).to(x.device)
    shift = (24 + draw(8, b, 2)).to(x.device) * torch.tensor(DIRECTIONS, device=x.device)[p]
    room = s - PATCH + 1 - shift.abs()  # (B, 2) places along each axis
    place = torch.rand(b, 2, generator=generator, device=generator.device).to(x.device)
    first = torch.minimum((place * room).long(), room - 1) - shift.clamp(max=0)  # (B, 2) corners
    return crop(x, first), crop(x, first + shift), p


def crop(x: Tensor, corner: Tensor) -> Tensor:
    """The 32 px patch at (y, x) of each image: (B, 3, S, S), (B, 2) -> (B, 3, 32, 32)."""
    reach = torch.arange(PATCH, device=x.device)
    rows = (corner[:, :1] + reach)[:, None, :, None]  # (B, 1, 32, 1)
    columns = (corner[:, 1:] + reach)[:, None, None, :]  # (B, 1, 1, 32)
    batch = torch.arange(len(x), device=x.device)[:, None, None, None]
    channel = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    return x[batch, channel, rows, columns]
