"""How well boxes follow one object: success and precision as OTB defines them.

Wu, Lim and Yang, "Online Object Tracking: A Benchmark" (CVPR 2013). Every frame counts on which the
true box is known, the first one too; a frame without a found box has no overlap and no centre.
Nothing here knows where boxes are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

OVERLAPS = np.arange(21) * 0.05
"""Overlaps of the success plot."""
DISTANCES = np.arange(51)
"""Distances of centres in the precision plot, in pixels."""
DISTANCE_PX = 20
"""Distance of the single number that OTB ranks by."""


@dataclass(frozen=True, slots=True)
class BoxScores:
    """The measures of one object.

    Attributes
    ----------
    mean_iou : float
        Mean overlap, 0..1: the area below a success plot of infinitely many overlaps.
    success_auc : float
        Mean over `OVERLAPS` of the share of frames whose overlap is *above*: a perfect copy has
        20/21, since no overlap is above 1.
    precision : float
        Share of frames whose centres are at most `DISTANCE_PX` apart.
    precision_auc : float
        Mean over `DISTANCES` of the share of frames whose centres are at most that far apart.
    num_frames : int
        Frames that count.
    """

    mean_iou: float
    success_auc: float
    precision: float
    precision_auc: float
    num_frames: int


def score_boxes(found: NDArray[np.float64], truth: NDArray[np.float64]) -> BoxScores:
    """Measure the boxes of one object.

    Parameters
    ----------
    found : ndarray of float64, shape (T, 4)
        ``x0, y0, x1, y1`` as edges in pixels; NaN where there is none.
    truth : ndarray of float64, shape (T, 4)
        The same; NaN where it is not known, and such a frame does not count.

    Returns
    -------
    BoxScores
        The measures.

    Raises
    ------
    ValueError
        The shapes differ, or no frame counts.
    """
    if found.shape != truth.shape or truth.ndim != 2 or truth.shape[1] != 4:
        raise ValueError(f"boxes must have one shape (T, 4): {found.shape = }, {truth.shape = }")
    known = ~np.isnan(truth).any(1)
    found, truth = found[known], truth[known]
    if not len(truth):
        raise ValueError("no frame has a known box")
    low = np.maximum(found[:, :2], truth[:, :2])
    high = np.minimum(found[:, 2:], truth[:, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=1)
    areas = np.prod(found[:, 2:] - found[:, :2], axis=1) + np.prod(
        truth[:, 2:] - truth[:, :2], axis=1
    )
    # A comparison with NaN is false, so a frame without a box never counts as near or similar.
    overlap = np.nan_to_num(shared / (areas - shared), nan=0.0)
    centres = (found[:, :2] + found[:, 2:] - truth[:, :2] - truth[:, 2:]) / 2
    distance = np.hypot(*centres.T)
    return BoxScores(
        mean_iou=float(overlap.mean()),
        success_auc=float((overlap[:, None] > OVERLAPS).mean()),
        precision=float((distance <= DISTANCE_PX).mean()),
        precision_auc=float((distance[:, None] <= DISTANCES).mean()),
        num_frames=len(truth),
    )
