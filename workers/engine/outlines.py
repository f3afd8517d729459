"""From mask logits to masks at the size of a video.

On a GPU nothing but the places where masks change leaves the device: some thousand numbers instead
of two million pixels. On a CPU finding them takes twice as long as looking at the pixels does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from workers.rle import LazyMask

if TYPE_CHECKING:
    import torch

_MAX_PIXELS = 1 << 28
"""Pixels of masks that are searched at once; torch cannot search 2 ** 31."""
_MAX_ENLARGED = 8
"""Masks that are enlarged at once, in float32."""

Size = tuple[int, int]


def masks_of(logits: Sequence[torch.Tensor], sizes: Sequence[Size]) -> list[LazyMask]:
    """Return masks, each at the size of its frame.

    Parameters
    ----------
    logits : sequence of Tensor of float32, shape (h, w)
        Low-resolution logits of each mask.
    sizes : sequence of tuple of int
        Height and width of each mask.

    Returns
    -------
    list of LazyMask
        1 where the enlarged logits are above 0.
    """
    if logits and logits[0].device.type != "cpu":
        return changes_of(logits, sizes)
    masks = [_enlarged(one[None], size)[0] for one, size in zip(logits, sizes, strict=True)]
    return [LazyMask.of(np.asarray(mask.numpy()).view(np.uint8)) for mask in masks]


def changes_of(logits: Sequence[torch.Tensor], sizes: Sequence[Size]) -> list[LazyMask]:
    """Return masks by the places where they change, on any device; see `masks_of`.

    Notes
    -----
    Waits for the device twice, however many masks there are: for the number of changes, and for
    the changes.
    """
    import torch

    found: dict[int, LazyMask] = {}
    held: list[int] = []
    flags: list[torch.Tensor] = []
    for size in dict.fromkeys(sizes):
        of_size = [i for i, other in enumerate(sizes) if other == size]
        for start in range(0, len(of_size), _MAX_ENLARGED):
            part = of_size[start : start + _MAX_ENLARGED]
            held += part
            flags.append(_change_flags(_enlarged(torch.stack([logits[i] for i in part]), size)))
            if sum(some.numel() for some in flags) > _MAX_PIXELS:
                found |= zip(held, _split(flags, [sizes[i] for i in held]), strict=True)
                held, flags = [], []
    if held:
        found |= zip(held, _split(flags, [sizes[i] for i in held]), strict=True)
    return [found[i] for i in range(len(sizes))]


def _enlarged(logits: torch.Tensor, size: Size) -> torch.Tensor:
    """Return masks of bool, shape (N, H, W)."""
    import torch.nn.functional as F  # noqa: N812

    return F.interpolate(logits[:, None], size=size, mode="bilinear")[:, 0] > 0


def _change_flags(masks: torch.Tensor) -> torch.Tensor:
    """Mark the pixels that differ from the one before, down the columns, shape (N * H * W,)."""
    columns = masks.transpose(1, 2).flatten(1)
    flags = columns.clone()
    flags[:, 1:] ^= columns[:, :-1]
    return flags.flatten()


def _split(flags: list[torch.Tensor], sizes: Sequence[Size]) -> list[LazyMask]:
    """Return the masks whose changes are marked, one after the other."""
    import torch

    places = torch.cat(flags).nonzero()[:, 0].cpu().numpy()
    ends = np.cumsum([height * width for height, width in sizes])
    cuts = np.searchsorted(places, ends)
    return [
        LazyMask(*size, changes=places[begin:end] - offset)
        for size, begin, end, offset in zip(
            sizes, [0, *cuts[:-1]], cuts, [0, *ends[:-1]], strict=True
        )
    ]
