"""Masks of one frame that share no pixel, for formats that allow one object per pixel.

Nothing is decoded. Whether two masks meet is asked of their boxes first. What a mask keeps is the
symmetric difference of itself and its intersection with a mask before it, and two run-length
coded masks differ exactly where one of them, but not both, changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from workers import rle


def front_to_back(
    object_ids: NDArray[np.int32], scores: NDArray[np.float32], z_order: Sequence[int] = ()
) -> list[int]:
    """Return the masks of a frame from front to back.

    Parameters
    ----------
    object_ids : ndarray of int32, shape (K,)
        Their objects.
    scores : ndarray of float32, shape (K,)
        Their scores.
    z_order : sequence of int
        Objects that lie in front of all others, in this order.

    Returns
    -------
    list of int
        Their positions: listed objects first, then by falling score and rising id.

    Examples
    --------
    >>> front_to_back(np.array([1, 2, 3]), np.array([0.5, 0.9, 0.9]))
    [1, 2, 0]
    >>> front_to_back(np.array([1, 2, 3]), np.array([0.5, 0.9, 0.9]), [3, 1])
    [2, 0, 1]
    """
    place = {object_id: at for at, object_id in enumerate(z_order)}
    listed = [place.get(object_id, len(place)) for object_id in object_ids.tolist()]
    order: list[int] = np.lexsort((object_ids, -scores, np.array(listed, np.int64))).tolist()
    return order


def without_overlap(
    counts: Sequence[bytes],
    boxes_xywh: NDArray[np.float32],
    order: Sequence[int],
    size: tuple[int, int],
) -> dict[int, bytes]:
    """Give every pixel of a frame to one mask.

    Parameters
    ----------
    counts : sequence of bytes, K of them
        COCO compressed counts.
    boxes_xywh : ndarray of float32, shape (K, 4)
        Boxes of the masks in pixels.
    order : sequence of int
        Positions of the masks from front to back.
    size : tuple of (int, int)
        Height and width of the picture.

    Returns
    -------
    dict of int to bytes
        The masks that lose pixels, by position, with the counts of what they keep; empty counts
        for one that keeps nothing.
    """
    from pycocotools import mask as coco

    changed: dict[int, bytes] = {}
    meets = _meeting(boxes_xywh)
    if not meets.any():
        return changed
    kept = list(counts)
    for at, position in enumerate(order):
        own = kept[position]
        for front in order[:at]:
            if not own or not kept[front] or not meets[position, front]:
                continue
            pair = [{"size": list(size), "counts": c} for c in (own, kept[front])]
            common = coco.merge(pair, intersect=True)["counts"]
            if common == own:
                own = b""
            elif rle.area(common, *size):
                own = _difference(own, common, size)
        if own != kept[position]:
            kept[position] = changed[position] = own
    return changed


def _meeting(boxes_xywh: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Tell which boxes share pixels, bool of shape (K, K), false on the diagonal."""
    begin, end = boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]
    before: NDArray[np.bool_] = np.all(begin[:, None] < end[None, :], axis=2)
    meets: NDArray[np.bool_] = np.logical_and(before, before.T)
    np.fill_diagonal(meets, False)
    return meets


def _difference(counts: bytes, part: bytes, size: tuple[int, int]) -> bytes:
    """Return the counts of a mask without a part of itself."""
    from pycocotools import mask as coco

    height, width = size
    # A run without pixels begins and ends at one place, which is no change.
    first, second = (
        np.cumsum(rle.run_lengths(c, height, width))[:-1].astype(np.int64) for c in (counts, part)
    )
    changes = _once(np.concatenate((first, second)))
    runs = np.diff(changes, prepend=0, append=height * width)
    coded = coco.frPyObjects({"counts": runs.tolist(), "size": [height, width]}, height, width)
    found: bytes = coded["counts"]
    return found


def _once(positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the positions that occur an odd number of times, ascending."""
    found, counts = np.unique(positions, return_counts=True)
    once: NDArray[np.int64] = found[counts % 2 == 1]
    return once
