"""Binary masks: boxes, overlap, one-to-one matching, resizing.

Overlaps are exact counts of pixels. They are cheap because a mask is kept as the crop of its
bounding box: two masks only have to be compared where their boxes meet, which for most pairs is
nowhere, and never over the whole frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

UInt8Array = NDArray[np.uint8]
FloatArray = NDArray[np.float64]
Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class CroppedMask:
    """A mask cut to its bounding box.

    Attributes
    ----------
    box_xyxy : tuple of 4 int
        The box in pixels of the frame, half-open: columns ``x0 <= x < x1``, rows ``y0 <= y < y1``.
        All zeros for an empty mask.
    crop : ndarray of uint8, shape (y1 - y0, x1 - x0)
        1 on the object.
    area : int
        Number of pixels on the object.
    """

    box_xyxy: Box
    crop: UInt8Array
    area: int

    def paste(self, height: int, width: int) -> UInt8Array:
        """Return the mask on a frame of this size, uint8 of shape (H, W)."""
        mask = np.zeros((height, width), np.uint8)
        x0, y0, x1, y1 = self.box_xyxy
        mask[y0:y1, x0:x1] = self.crop
        return mask


def box_xyxy(mask: NDArray[Any]) -> Box | None:
    """Return the bounding box of a mask.

    Parameters
    ----------
    mask : ndarray of bool or integer, shape (H, W)
        Non-zero on the object.

    Returns
    -------
    tuple of 4 int, or None
        ``(x0, y0, x1, y1)`` in pixels, half-open: ``mask[y0:y1, x0:x1]`` holds every object
        pixel. None for an empty mask.
    """
    import cv2

    binary = _as_binary(mask)
    if not binary.size:
        return None
    x0, y0, width, height = cv2.boundingRect(binary)
    return (x0, y0, x0 + width, y0 + height) if width and height else None


def crop_mask(mask: NDArray[Any]) -> CroppedMask:
    """Cut a mask to its bounding box.

    Parameters
    ----------
    mask : ndarray of bool or integer, shape (H, W)
        Non-zero on the object.

    Returns
    -------
    CroppedMask
        Holds a copy of the crop, never a view of `mask`.
    """
    binary = _as_binary(mask)
    box = box_xyxy(binary)
    if box is None:
        return CroppedMask((0, 0, 0, 0), np.zeros((0, 0), np.uint8), 0)
    x0, y0, x1, y1 = box
    crop = np.minimum(binary[y0:y1, x0:x1], 1)
    return CroppedMask(box, crop, int(np.count_nonzero(crop)))


def intersection(a: CroppedMask, b: CroppedMask) -> int:
    """Return the number of pixels that two masks of one frame share."""
    ax0, ay0, ax1, ay1 = a.box_xyxy
    bx0, by0, bx1, by1 = b.box_xyxy
    x0, y0, x1, y1 = max(ax0, bx0), max(ay0, by0), min(ax1, bx1), min(ay1, by1)
    if x0 >= x1 or y0 >= y1:
        return 0
    part_a = a.crop[y0 - ay0 : y1 - ay0, x0 - ax0 : x1 - ax0]
    part_b = b.crop[y0 - by0 : y1 - by0, x0 - bx0 : x1 - bx0]
    return int(np.count_nonzero(part_a & part_b))


def cropped_iou_matrix(a: Sequence[CroppedMask], b: Sequence[CroppedMask]) -> FloatArray:
    """Return the intersection over union of every pair of cropped masks.

    Parameters
    ----------
    a, b : sequence of CroppedMask
        N and M masks of frames of one size.

    Returns
    -------
    ndarray of float64, shape (N, M)
        0..1; 0 where both masks are empty.
    """
    iou = np.zeros((len(a), len(b)), np.float64)
    for i, first in enumerate(a):
        for j, second in enumerate(b):
            shared = intersection(first, second)
            if shared:
                iou[i, j] = shared / (first.area + second.area - shared)
    return iou


def iou_matrix(
    a: NDArray[Any] | Sequence[NDArray[Any]], b: NDArray[Any] | Sequence[NDArray[Any]]
) -> FloatArray:
    """Return the intersection over union of every pair of masks, from exact pixel counts.

    Parameters
    ----------
    a : ndarray, shape (N, H, W), or sequence of N ndarray, shape (H, W)
        Non-zero on the object.
    b : ndarray, shape (M, H, W), or sequence of M ndarray, shape (H, W)
        Non-zero on the object.

    Returns
    -------
    ndarray of float64, shape (N, M)
        0..1; 0 where both masks are empty.

    Raises
    ------
    ValueError
        The masks are not all of one size.
    """
    shapes = {mask.shape for mask in a} | {mask.shape for mask in b}
    if len(shapes) > 1:
        raise ValueError(f"masks to compare must all be of one size, got {sorted(shapes)}")
    return cropped_iou_matrix([crop_mask(m) for m in a], [crop_mask(m) for m in b])


def box_iou_matrix(a: Any, b: Any) -> FloatArray:
    """Return the intersection over union of every pair of boxes.

    Parameters
    ----------
    a : array-like of float, shape (N, 4)
        ``x0, y0, x1, y1`` in pixels, as edges: the area is ``(x1 - x0) * (y1 - y0)``.
    b : array-like of float, shape (M, 4)
        The same.

    Returns
    -------
    ndarray of float64, shape (N, M)
        0..1; 0 where both boxes have no area.
    """
    first = np.asarray(a, np.float64).reshape(-1, 4)
    second = np.asarray(b, np.float64).reshape(-1, 4)
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=2)
    area_a = np.prod(np.clip(first[:, 2:] - first[:, :2], 0, None), axis=1)
    area_b = np.prod(np.clip(second[:, 2:] - second[:, :2], 0, None), axis=1)
    union = area_a[:, None] + area_b[None, :] - shared
    iou: FloatArray = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return iou


def match_one_to_one(iou: NDArray[Any], threshold: float) -> list[tuple[int, int]]:
    """Return the one-to-one matching with the largest total overlap.

    Pairs below the threshold count as no match *before* the optimum is sought, so a forbidden
    pair never takes the place of an allowed one.

    Parameters
    ----------
    iou : ndarray of float, shape (N, M)
        Overlap of every row with every column, 0..1.
    threshold : float
        Smallest overlap that may be a match; pairs without any overlap never are.

    Returns
    -------
    list of (int, int)
        Matched ``(row, column)``, ordered by row; each row and each column at most once.

    Notes
    -----
    Solved as a linear assignment problem (Kuhn 1955) by `scipy.optimize.linear_sum_assignment`.
    """
    from scipy.optimize import linear_sum_assignment

    overlap = np.asarray(iou, np.float64)
    if not overlap.size:
        return []
    allowed = (overlap >= threshold) & (overlap > 0)
    rows, columns = linear_sum_assignment(np.where(allowed, overlap, 0.0), maximize=True)
    return [(int(i), int(j)) for i, j in zip(rows, columns, strict=True) if allowed[i, j]]


def resize_mask(mask: NDArray[Any], height: int, width: int) -> UInt8Array:
    """Return a mask at another size.

    Parameters
    ----------
    mask : ndarray of bool or integer, shape (h, w)
        Non-zero on the object.
    height, width : int
        Wanted size in pixels.

    Returns
    -------
    ndarray of uint8, shape (H, W)
        1 where at least half of the (bilinearly interpolated, or when shrinking averaged)
        coverage is object. A copy of the binary mask when the size is already right.
    """
    import cv2

    binary: UInt8Array = np.minimum(_as_binary(mask), 1)
    if binary.shape == (height, width):
        return binary
    shrinks = height <= binary.shape[0] and width <= binary.shape[1]
    coverage = cv2.resize(
        binary.astype(np.float32),
        (width, height),
        interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR,
    )
    resized: UInt8Array = (coverage >= 0.5).astype(np.uint8)
    return resized


def _as_binary(mask: NDArray[Any]) -> UInt8Array:
    """Return the mask as contiguous uint8, non-zero on the object, copied only where needed."""
    if mask.ndim != 2:
        raise ValueError(f"a mask must have shape (H, W), got {mask.shape}")
    binary = mask if mask.dtype in (np.uint8, np.bool_) else mask != 0
    contiguous: UInt8Array = np.ascontiguousarray(binary).view(np.uint8)
    return contiguous
