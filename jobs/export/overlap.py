"""Masks of one frame that share no pixel, for formats that allow one object per pixel.

Nothing is decoded. Whether masks meet is asked of their boxes first; what a mask keeps is then its
intersection with the complement of those in front of it, all in run lengths.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


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
    shape = list(size)
    for at, position in enumerate(order):
        # Original masks do: together with those in front of them they cover the same pixels.
        front = [counts[p] for p in order[:at] if meets[position, p]]
        if not front:
            continue
        covered = front[0]
        if len(front) > 1:
            covered = coco.merge([{"size": shape, "counts": c} for c in front])["counts"]
        free = {"size": shape, "counts": complement(covered)}
        kept = coco.merge([{"size": shape, "counts": counts[position]}, free], intersect=True)
        if kept["counts"] != counts[position]:
            changed[position] = kept["counts"] if coco.area(kept) else b""
    return changed


def complement(counts: bytes) -> bytes:
    """Return the compressed counts of everything outside a mask.

    Parameters
    ----------
    counts : bytes
        COCO compressed counts.

    Returns
    -------
    bytes
        The same runs with the roles of the two values changed.

    Notes
    -----
    The first run is one of zeros. So the complement has a run of no zeros before all others, or
    loses one. From the fourth run on each is stored as the difference to the one two before: all
    these stay as they are, but for the one that becomes the fourth or ceases to be.

    Examples
    --------
    >>> complement(b"723"), complement(b"072L")  # 7 zeros, 2 ones, 3 zeros; 7 ones, 2 zeros, 3 ones
    (b'072L', b'723')
    """
    runs: list[int] = []
    ends: list[int] = []
    at = 0
    while at < len(counts) and len(runs) < 4:
        run, at = _number(counts, at)
        runs.append(run)
        ends.append(at)
    if runs[0]:
        if len(runs) < 3:
            return b"0" + counts
        return b"0" + counts[: ends[1]] + _digits(runs[2] - runs[0]) + counts[ends[2] :]
    if len(runs) < 4:
        return counts[ends[0] :]
    return counts[ends[0] : ends[2]] + _digits(runs[3] + runs[1]) + counts[ends[3] :]


def _number(counts: bytes, at: int) -> tuple[int, int]:
    """Return the number that begins at a digit, and where the next one does."""
    value = shift = 0
    while True:
        digit = counts[at] - 48
        value |= (digit & 31) << shift
        shift += 5
        at += 1
        if not digit & 32:
            return value - (1 << shift) if digit & 16 else value, at


def _digits(value: int) -> bytes:
    """Return a number as compressed counts have it."""
    digits = bytearray()
    while True:
        low = value & 31
        value >>= 5
        # The sign is the highest bit of the last digit.
        more = value != (-1 if low & 16 else 0)
        digits.append(48 + low + 32 * more)
        if not more:
            return bytes(digits)


def _meeting(boxes_xywh: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Tell which boxes share pixels, bool of shape (K, K), false on the diagonal."""
    begin, end = boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]
    before: NDArray[np.bool_] = np.all(begin[:, None] < end[None, :], axis=2)
    meets: NDArray[np.bool_] = np.logical_and(before, before.T)
    np.fill_diagonal(meets, False)
    return meets
