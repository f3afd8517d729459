"""A Kalman filter on a box, as DeepSORT and ByteTrack use it, in float64.

The state is the centre, the aspect ratio and the height of a box, and their velocities per frame;
noise is proportional to the height. Wojke et al., "Simple Online and Realtime Tracking with a Deep
Association Metric", ICIP 2017.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

_POSITION_NOISE = 1 / 20
_VELOCITY_NOISE = 1 / 160
_TRANSITION = np.eye(8) + np.eye(8, k=4)
_OBSERVATION = np.eye(4, 8)


class BoxMotion:
    """Where a box is, where it is going, and how sure that is.

    Parameters
    ----------
    box_xyxy : ndarray of float64, shape (4,)
        Where it is first seen, at rest.
    """

    def __init__(self, box_xyxy: FloatArray) -> None:
        measured = _measurement(box_xyxy)
        self.mean: FloatArray = np.concatenate([measured, np.zeros(4)])
        self.covariance: FloatArray = np.diag(_deviations(measured[3], 2, 1e-2, 10, 1e-5) ** 2)

    def predict(self) -> None:
        """Move on by one frame."""
        noise = np.diag(_deviations(self.mean[3], 1, 1e-2, 1, 1e-5) ** 2)
        self.mean = _TRANSITION @ self.mean
        self.covariance = _TRANSITION @ self.covariance @ _TRANSITION.T + noise

    def update(self, box_xyxy: FloatArray) -> None:
        """Take in where the box was seen on this frame."""
        noise = np.diag(_deviations(self.mean[3], 1, 1e-1, 1, 0)[:4] ** 2)
        seen = _OBSERVATION @ self.covariance @ _OBSERVATION.T + noise
        gain = np.linalg.solve(seen, _OBSERVATION @ self.covariance).T
        self.mean = self.mean + gain @ (_measurement(box_xyxy) - _OBSERVATION @ self.mean)
        self.covariance = self.covariance - gain @ seen @ gain.T

    @property
    def box_xyxy(self) -> FloatArray:
        """The box as the state has it, shape (4,)."""
        centre, aspect, height = self.mean[:2], self.mean[2], self.mean[3]
        half = np.array([aspect * height, height]) / 2
        return np.concatenate([centre - half, centre + half])

    def get_state(self) -> list[Any]:
        """Return it as arrays."""
        return [self.mean, self.covariance]

    @classmethod
    def from_state(cls, state: list[Any]) -> BoxMotion:
        """Return the motion that `get_state` was asked of."""
        motion = cls(np.array([0.0, 0.0, 1.0, 1.0]))
        motion.mean, motion.covariance = state
        return motion


def box_iou(box_xyxy: FloatArray, other_xyxy: FloatArray) -> float:
    """Return the IoU of two boxes; 0 where they have no area together."""
    low = np.maximum(box_xyxy[:2], other_xyxy[:2])
    high = np.minimum(box_xyxy[2:], other_xyxy[2:])
    common = float(np.prod(np.maximum(high - low, 0)))
    areas = [float(np.prod(b[2:] - b[:2])) for b in (box_xyxy, other_xyxy)]
    union = sum(areas) - common
    return common / union if union > 0 else 0.0


def _measurement(box_xyxy: FloatArray) -> FloatArray:
    """Return centre, aspect ratio and height; a flat box counts as one pixel high."""
    width, height = box_xyxy[2:] - box_xyxy[:2]
    height = height if height != 0 else 1.0
    centre = (box_xyxy[:2] + box_xyxy[2:]) / 2
    return np.array([*centre, width / height, height])


def _deviations(
    height: float, position: float, aspect: float, velocity: float, aspect_velocity: float
) -> FloatArray:
    """Return the standard deviations of the eight numbers of a state."""
    where = position * _POSITION_NOISE * height
    moves = velocity * _VELOCITY_NOISE * height
    return np.array([where, where, aspect, where, moves, moves, aspect_velocity, moves])
