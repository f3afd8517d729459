"""DAVIS: a palette PNG per frame whose values are objects.

As Pont-Tuset et al., "The 2017 DAVIS Challenge on Video Object Segmentation" (2017) has it: 0 is
the background, 255 in a ground truth is void.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence

import numpy as np

from jobs.export.overlap import front_to_back
from jobs.export.selection import SelectedVideo
from jobs.export.tally import RefusedVideoError, Tally
from workers import rle

ACCEPTS = re.compile(r"[^/]+/\d{5,}\.png")
MAX_OBJECTS = 255
VOID = 255
_FIRST_COLOURS = (
    *(0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128, 128, 0, 128, 0, 128, 128),
    *(128, 128, 128, 64, 0, 0, 191, 0, 0, 64, 128, 0, 191, 128, 0, 64, 0, 128, 191, 0, 128),
    *(64, 128, 128, 191, 128, 128, 0, 64, 0, 128, 64, 0, 0, 191, 0, 128, 191, 0, 0, 64, 128),
    *(128, 64, 128),
)
PALETTE = bytes(_FIRST_COLOURS) + bytes(
    value for value in range(len(_FIRST_COLOURS) // 3, 256) for _ in range(3)
)
"""Colours of the 256 values, RGB: those of the challenge's own annotations."""


def last_key(selected: SelectedVideo) -> str | None:
    """Return the file of a video that is written last; None for a video without frames."""
    if not len(selected.frame_idx):
        return None
    return _key(selected, int(selected.frame_idx[-1]))


def davis_files(
    selected: SelectedVideo, tally: Tally, z_order: Sequence[int] = ()
) -> Iterator[tuple[str, bytes]]:
    """Yield the pictures of a video.

    Parameters
    ----------
    selected : SelectedVideo
        The video.
    tally : Tally
        Counts videos whose objects have other ids than in the dataset.
    z_order : sequence of int
        Objects from front to back; those not listed follow, by falling score.

    Yields
    ------
    key : str
        Path below the destination.
    data : bytes
        The PNG.

    Raises
    ------
    RefusedVideoError
        There are more objects than values.
    """
    values = _values(selected, tally)
    size = (selected.video.height, selected.video.width)
    ids = selected.masks["object_id"].to_numpy()
    scores = selected.masks["score"].to_numpy()
    counts = selected.masks["rle_counts"]
    starts = np.searchsorted(selected.positions(), np.arange(len(selected.frame_idx) + 1)).tolist()
    for at, frame_idx in enumerate(selected.frame_idx.tolist()):
        begin, end = starts[at], starts[at + 1]
        picture = np.zeros(size, np.uint8)
        order = front_to_back(ids[begin:end], scores[begin:end], z_order)
        for position in reversed(order):
            mask = rle.decode(counts[begin + position].as_py(), *size)
            picture[mask != 0] = values[int(ids[begin + position])]
        yield _key(selected, frame_idx), _png(picture)


def _values(selected: SelectedVideo, tally: Tally) -> dict[int, int]:
    """Return the value of every object: its id where all ids fit, else its rank."""
    ids = list(selected.objects())
    if len(ids) > MAX_OBJECTS:
        raise RefusedVideoError(
            f"it has {len(ids):,} objects and a DAVIS picture holds {MAX_OBJECTS}; take fewer with "
            "--min-score or --where, or export to another format"
        )
    if not ids or (min(ids) > 0 and max(ids) < VOID):
        return {object_id: object_id for object_id in ids}
    tally.renumber(selected.video.name)
    return {object_id: rank for rank, object_id in enumerate(ids, 1)}


def _key(selected: SelectedVideo, frame_idx: int) -> str:
    return f"{selected.sequence}/{frame_idx:05d}.png"


def _png(picture: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    from PIL import Image

    image = Image.fromarray(picture)
    image.putpalette(PALETTE)
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()
