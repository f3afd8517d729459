"""One mask out of what labelling tools write: polygons, lists of counts, compressed counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from workers import rle

MAX_SIDE = 2**15 - 1
"""Largest height and width of a picture, in pixels; the tables store them as int16."""


def read_segmentation(value: Any, height: int, width: int) -> bytes | None:
    """Return the compressed counts of a COCO segmentation.

    Parameters
    ----------
    value : list of list of float, or Mapping
        Polygons ``[[x0, y0, x1, y1, ...], ...]`` in pixels of the picture, of which the mask is
        the union, or ``{"size": [H, W], "counts": list or str}``.
    height, width : int
        Size of the picture in pixels.

    Returns
    -------
    bytes or None
        COCO compressed counts; None for a mask without a pixel.

    Raises
    ------
    ValueError
        It is neither, or does not fit the picture; one clause that says what is wrong.
    """
    if isinstance(value, Mapping):
        counts = _from_counts(value, height, width)
    elif isinstance(value, list) and value:
        counts = _from_polygons(value, height, width)
    else:
        raise ValueError(
            "it has no mask: export polygons or masks, not only boxes"
            if value is None or value == []
            else f"its segmentation is neither polygons nor run lengths: {str(value)[:60]}"
        )
    # Compressed counts are checked here; InvalidRleError is a ValueError with a sentence.
    return counts if rle.area(counts, height, width) else None


def read_size(height: Any, width: Any) -> tuple[int, int]:
    """Return a size of a picture as integers.

    Parameters
    ----------
    height, width : Any
        As read.

    Returns
    -------
    tuple of (int, int)
        Height and width in pixels.

    Raises
    ------
    ValueError
        They are not whole numbers from 1 to `MAX_SIDE`.
    """
    sides = []
    for name, side in (("height", height), ("width", width)):
        if isinstance(side, bool) or not isinstance(side, (int, float)) or side != int(side):
            raise ValueError(f"its {name} is {side!r}, not a number of pixels")
        if not 1 <= side <= MAX_SIDE:
            raise ValueError(f"its {name} is {side:g}, but pictures have 1 to {MAX_SIDE} pixels")
        sides.append(int(side))
    return sides[0], sides[1]


def _from_counts(value: Mapping[str, Any], height: int, width: int) -> bytes:
    from pycocotools import mask as coco

    size, counts = value.get("size"), value.get("counts")
    if not isinstance(size, list) or len(size) != 2 or counts is None:
        raise ValueError('its run lengths are not {"size": [H, W], "counts": ...}')
    if read_size(*size) != (height, width):
        raise ValueError(
            f"its mask is {size[1]}x{size[0]} pixels, but its picture is {width}x{height}"
        )
    if isinstance(counts, (str, bytes)):
        return counts.encode("ascii", "replace") if isinstance(counts, str) else counts
    try:
        runs = np.array(counts, np.float64)
    except (TypeError, ValueError):
        raise ValueError("its counts are neither text nor a list of numbers") from None
    if runs.ndim != 1 or not (runs >= 0).all() or (runs % 1).any() or runs.sum() != height * width:
        raise ValueError(
            f"its counts are no run lengths of {height * width} pixels in all ({width}x{height})"
        )
    packed: bytes = coco.frPyObjects(
        {"counts": runs.astype(np.uint32), "size": [height, width]}, height, width
    )["counts"]
    return packed


def _from_polygons(value: list[Any], height: int, width: int) -> bytes:
    from pycocotools import mask as coco

    # Some tools write a single polygon without the outer list.
    polygons = value if isinstance(value[0], list) else [value]
    checked = []
    for polygon in polygons:
        try:
            corners = np.array(polygon, np.float64)
        except (TypeError, ValueError):
            raise ValueError("a polygon of it holds something that is no number") from None
        if corners.ndim != 1 or len(corners) < 6 or len(corners) % 2:
            raise ValueError("a polygon of it is not x, y, x, y, ... with three corners or more")
        limits = np.array([width, height])
        points = corners.reshape(-1, 2)
        # Corners a little outside are usual; far outside they are those of another picture.
        if not (np.abs(points - limits / 2) <= 1.5 * limits).all():
            raise ValueError(f"a polygon of it lies outside of its picture of {width}x{height}")
        checked.append(corners.tolist())
    counts: bytes = coco.merge(coco.frPyObjects(checked, height, width))["counts"]
    return counts
