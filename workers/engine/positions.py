"""Where and when, as the memory attention of SAM 2 is told: rotations and sine codes.

The formulas are those of Heo et al., "Rotary Position Embedding for Vision Transformer", 2024, and
Vaswani et al., "Attention Is All You Need", 2017, in the order of operations of the originals, so
that every bit is theirs.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from workers.engine.model import HIDDEN_DIM

if TYPE_CHECKING:
    import torch

_LONGEST_WAVE = 10_000.0


def axial_rotation(side: int) -> torch.Tensor:
    """Return by what the channels of each cell are turned, in pairs, for its place in the picture.

    Parameters
    ----------
    side : int
        Cells in each direction.

    Returns
    -------
    Tensor of complex64, shape (side * side, 128)
        Unit numbers: the first half of the pairs tells the column, the second the row.
    """
    import torch

    frequencies = 1.0 / _LONGEST_WAVE ** (torch.arange(0, HIDDEN_DIM, 4).float() / HIDDEN_DIM)
    angles = torch.outer(torch.arange(side).float(), frequencies)
    turns = torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turns.repeat(side, 1), turns.repeat_interleave(side, 0)], -1)


def distance_code(shares: torch.Tensor) -> torch.Tensor:
    """Return the sine code of temporal distances.

    Parameters
    ----------
    shares : Tensor of float32, shape (n,)
        Distances of n frames, as shares of the largest one.

    Returns
    -------
    Tensor of float32, shape (n, 256)
        Sines, then cosines.
    """
    import torch

    angles = shares[:, None] / _waves(shares.device)
    return torch.cat([angles.sin(), angles.cos()], -1)


@functools.cache
def _waves(device: torch.device) -> torch.Tensor:
    """Return by what a distance is divided for each of the sines."""
    import torch

    half = HIDDEN_DIM // 2
    waves: torch.Tensor = _LONGEST_WAVE ** (
        2 * (torch.arange(half, device=device).float() // 2) / half
    )
    return waves
