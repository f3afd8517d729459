"""How good are masks: the region and boundary measures of the DAVIS challenge.

J is the intersection over union of a predicted and a true mask; F is the F-measure of their
outlines, matched within a tolerance of 0.8 % of the picture's diagonal. Both are as Perazzi et
al., "A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation" (CVPR 2016)
define them, with the conventions of the challenge for empty masks, for the frames that are left
out and for the three statistics of a sequence. Nothing here knows where masks are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.masks import Box, CroppedMask, crop_mask, intersection

BOUNDARY_TOLERANCE = 0.008
"""Distance at which two outlines still match, as a part of the picture's diagonal."""
RECALL_THRESHOLD = 0.5
"""A frame counts for the recall when its value is above this."""
NUM_DECAY_BINS = 4
"""Decay compares the first and the last of this many equal parts of a sequence."""

Mask = NDArray[Any]
Float64Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Statistics:
    """One measure over one sequence.

    Attributes
    ----------
    mean : float
        Mean over the frames, 0..1.
    recall : float
        Part of the frames whose value is above 0.5.
    decay : float
        Mean of the first quarter less that of the last: how much is lost on the way.
    """

    mean: float
    recall: float
    decay: float


@dataclass(frozen=True, slots=True)
class ObjectScore:
    """The measures of one object over one sequence.

    Attributes
    ----------
    region, boundary : Statistics
        J and F of the frames that count.
    region_per_frame, boundary_per_frame : ndarray of float64, shape (T,)
        The values they summarise, in order of the frames that count.
    """

    region: Statistics
    boundary: Statistics
    region_per_frame: Float64Array
    boundary_per_frame: Float64Array

    @property
    def j_and_f(self) -> float:
        """Mean of the mean J and the mean F, the number the challenge ranks by."""
        return (self.region.mean + self.boundary.mean) / 2


def region_similarity(prediction: Mask, truth: Mask, *, void: Mask | None = None) -> float:
    """Return J, the intersection over union of two masks.

    Parameters
    ----------
    prediction, truth : ndarray, shape (H, W)
        Non-zero on the object.
    void : ndarray, shape (H, W), optional
        Non-zero where nothing is known; these pixels count neither for nor against.

    Returns
    -------
    float
        0..1; 1 when both masks are empty.

    Raises
    ------
    ValueError
        The shapes differ.
    """
    return cropped_region_similarity(*_cropped_pair(prediction, truth, void))


def boundary_accuracy(
    prediction: Mask,
    truth: Mask,
    *,
    void: Mask | None = None,
    tolerance: float = BOUNDARY_TOLERANCE,
) -> float:
    """Return F, the F-measure of the outlines of two masks.

    Parameters
    ----------
    prediction, truth : ndarray, shape (H, W)
        Non-zero on the object.
    void : ndarray, shape (H, W), optional
        Non-zero where nothing is known; both masks are cleared there.
    tolerance : float
        Matching distance: below 1 a part of the diagonal, rounded up to whole pixels; from 1 on
        a number of pixels.

    Returns
    -------
    float
        0..1; 1 when neither mask has an outline, 0 when only one has.

    Raises
    ------
    ValueError
        The shapes differ.
    """
    predicted, true = _cropped_pair(prediction, truth, void)
    return cropped_boundary_accuracy(predicted, true, np.shape(truth), tolerance=tolerance)


def cropped_region_similarity(prediction: CroppedMask, truth: CroppedMask) -> float:
    """Return J of two masks that are cut to their boxes.

    Parameters
    ----------
    prediction, truth : CroppedMask
        Of pictures of one size.

    Returns
    -------
    float
        0..1; 1 when both masks are empty.
    """
    shared = intersection(prediction, truth)
    union = prediction.area + truth.area - shared
    return shared / union if union else 1.0


def cropped_boundary_accuracy(
    prediction: CroppedMask,
    truth: CroppedMask,
    size: Sequence[int],
    *,
    tolerance: float = BOUNDARY_TOLERANCE,
) -> float:
    """Return F of two masks that are cut to their boxes.

    Parameters
    ----------
    prediction, truth : CroppedMask
        Of pictures of one size.
    size : sequence of 2 int
        Height and width of the picture.
    tolerance : float
        As in `boundary_accuracy`.

    Returns
    -------
    float
        0..1; 1 when neither mask has an outline, 0 when only one has.

    Notes
    -----
    The challenge grows each outline by a disk and counts the pixels of the other inside it. Here
    the disk is taken row by row, whose cost grows with the radius, not with its square; and
    outlines lie in the masks' boxes and one pixel around them, so nothing else is looked at.
    """
    height, width = size
    if not prediction.area or not truth.area:
        # A mask has no outline where it is empty, and where it is the whole picture.
        has_outline = 0 < prediction.area + truth.area < height * width
        return 0.0 if has_outline else 1.0
    radius = tolerance if tolerance >= 1 else math.ceil(tolerance * math.hypot(height, width))
    window = _window((prediction, truth), height, width)
    found, true = outline(_inside(prediction, window)), outline(_inside(truth, window))
    num_found, num_true = np.count_nonzero(found), np.count_nonzero(true)
    if num_found == 0 or num_true == 0:
        return 1.0 if num_found == num_true else 0.0
    precision = _num_near(found, true, radius) / num_found
    recall = _num_near(true, found, radius) / num_true
    total = precision + recall
    return 2 * precision * recall / total if total else 0.0


def outline(mask: Mask) -> NDArray[np.bool_]:
    """Return the pixels after which a mask changes, to the right, below or diagonally.

    Parameters
    ----------
    mask : ndarray, shape (H, W)
        Non-zero on the object.

    Returns
    -------
    ndarray of bool, shape (H, W)
        The outline, one pixel wide. The lower right corner never belongs to it.
    """
    import cv2

    # Beyond the border there is nothing to compare with: OpenCV leaves those pixels out.
    inside = (np.asarray(mask) != 0).view(np.uint8)
    block = np.ones((2, 2), np.uint8)
    edges: NDArray[np.uint8] = cv2.morphologyEx(inside, cv2.MORPH_GRADIENT, block, anchor=(0, 0))
    return edges.view(np.bool_)


def statistics(values: Sequence[float] | Float64Array) -> Statistics:
    """Return mean, recall and decay of one measure over a sequence.

    Parameters
    ----------
    values : sequence of float, shape (T,)
        One value per frame; NaN where a frame does not count.

    Returns
    -------
    Statistics
        All NaN for a sequence without frames.
    """
    array = np.asarray(values, np.float64)
    known = array[~np.isnan(array)]
    if not len(known):
        return Statistics(math.nan, math.nan, math.nan)
    # The bins share their end frames, as in the challenge's own tool.
    ends = np.floor(np.linspace(0, len(array) - 1, NUM_DECAY_BINS + 1) + 0.5 + 1e-10).astype(int)
    first, last = array[ends[0] : ends[1] + 1], array[ends[-2] : ends[-1] + 1]
    decay = math.nan
    if not (np.isnan(first).all() or np.isnan(last).all()):
        decay = float(np.nanmean(first) - np.nanmean(last))
    return Statistics(float(known.mean()), float((known > RECALL_THRESHOLD).mean()), decay)


def evaluate_object(
    predictions: Iterable[Mask | None],
    truths: Iterable[Mask],
    *,
    voids: Iterable[Mask | None] | None = None,
    skip_ends: bool = True,
) -> ObjectScore:
    """Measure one object over one sequence.

    Parameters
    ----------
    predictions : iterable of ndarray, shape (H, W), or None
        One per frame; None where the object was not seen.
    truths : iterable of ndarray, shape (H, W)
        One per frame, as many as predictions.
    voids : iterable of ndarray or None, optional
        One per frame: pixels that count neither for nor against.
    skip_ends : bool
        Leave out the first frame, which was given, and the last, as the challenge does.

    Returns
    -------
    ObjectScore
        J and F with their statistics.

    Raises
    ------
    ValueError
        The numbers of frames or the shapes differ, or no frame is left to count.
    """
    found, true = list(predictions), list(truths)
    ignored: list[Mask | None] = [None] * len(true) if voids is None else list(voids)
    for given, name in ((found, "predictions"), (ignored, "void masks")):
        if len(given) != len(true):
            raise ValueError(f"{len(given)} {name} do not match {len(true)} true masks")
    kept = slice(1, -1) if skip_ends else slice(None)
    region: list[float] = []
    boundary: list[float] = []
    for prediction, truth, void in zip(found[kept], true[kept], ignored[kept], strict=True):
        seen = np.zeros(np.shape(truth), bool) if prediction is None else prediction
        region.append(region_similarity(seen, truth, void=void))
        boundary.append(boundary_accuracy(seen, truth, void=void))
    if not region:
        ends = " once the first and the last are left out" if skip_ends else ""
        raise ValueError(f"no frame is left to measure among {len(true)}{ends}")
    return ObjectScore(
        statistics(region), statistics(boundary), np.array(region), np.array(boundary)
    )


def mean_j_and_f(scores: Mapping[Any, ObjectScore]) -> float:
    """Return the mean J&F over objects: every object of every sequence has the same weight.

    Parameters
    ----------
    scores : Mapping of any key to ObjectScore
        One entry per object.

    Returns
    -------
    float
        0..1.

    Raises
    ------
    ValueError
        There is no object.
    """
    if not scores:
        raise ValueError("there is no object to take the mean over")
    return float(np.mean([score.j_and_f for score in scores.values()]))


def _cropped_pair(
    prediction: Mask, truth: Mask, void: Mask | None
) -> tuple[CroppedMask, CroppedMask]:
    predicted, true = np.asarray(prediction) != 0, np.asarray(truth) != 0
    if predicted.shape != true.shape or true.ndim != 2:
        raise ValueError(
            f"masks must have one shape (H, W), got {predicted.shape} against {true.shape}"
        )
    if void is not None:
        known = np.asarray(void) == 0
        if known.shape != true.shape:
            raise ValueError(f"the void mask has shape {known.shape}, the truth {true.shape}")
        predicted, true = predicted & known, true & known
    return crop_mask(predicted), crop_mask(true)


def _window(masks: Sequence[CroppedMask], height: int, width: int) -> Box:
    """Return the box around masks and one pixel more on each side, within the picture.

    The outer pixels are background unless they lie at the border of the picture, so that the
    outline inside the window is the one in the picture.
    """
    lefts, tops, rights, bottoms = zip(*(mask.box_xyxy for mask in masks), strict=True)
    return (
        max(min(lefts) - 1, 0),
        max(min(tops) - 1, 0),
        min(max(rights) + 1, width),
        min(max(bottoms) + 1, height),
    )


def _inside(mask: CroppedMask, window: Box) -> NDArray[np.bool_]:
    """Return a mask as it lies in a window that holds all of it."""
    left, top, right, bottom = window
    pasted = np.zeros((bottom - top, right - left), np.bool_)
    x0, y0, x1, y1 = mask.box_xyxy
    pasted[y0 - top : y1 - top, x0 - left : x1 - left] = mask.crop
    return pasted


def _num_near(points: NDArray[np.bool_], target: NDArray[np.bool_], radius: float) -> int:
    """Return how many of `points` lie within `radius` pixels of `target`."""
    import cv2

    pixels = target.view(np.uint8)
    near = pixels.copy()
    # A disk is a stack of rows: each is grown sideways at once, and laid above and below.
    squared = math.floor(radius * radius)
    widths = [math.isqrt(squared - dy * dy) for dy in range(math.isqrt(squared) + 1)]
    for dy, width in enumerate(widths[: len(near)]):
        if dy == 0 or width != widths[dy - 1]:
            grown = cv2.dilate(pixels, np.ones((1, 2 * width + 1), np.uint8))
        near[dy:] |= grown[: len(near) - dy]
        near[: len(near) - dy] |= grown[dy:]
    return int(np.count_nonzero(points & near.view(np.bool_)))
