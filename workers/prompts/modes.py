"""When a video is prompted, and which object a detection belongs to. Pure policy: no I/O.

Two questions, kept apart: `PromptPolicy` says on which tracked frames prompts are taken,
`assign_ids` says which live object each detection of such a frame is. The pipeline asks the
detector in between.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from workers.masks import CroppedMask, box_iou_matrix, crop_mask, intersection, match_one_to_one
from workers.messages import PromptMode

MATCH_THRESHOLD = 0.3
"""Smallest overlap at which a detection is taken for a live object."""

LOST_STEPS = 30
"""Tracked frames for which an object that was lost sight of is known again where it was."""

FIRST_OBJECT_ID = 1
"""Object ids start here where we give them."""


class PromptPolicy:
    """When prompts are taken, counted in tracked frames.

    ``first_frame``: on the first tracked frame, and after that on every frame until one gave a
    prompt; then never again. ``every_n_frames``: on the tracked frames 0, n, 2n, ...; a due
    frame without a detection keeps the prompt due on the frames after it, and does not move the
    period. ``every_frame``: always.

    Parameters
    ----------
    mode : PromptMode
        When prompts are taken.
    interval : int
        Period of ``every_n_frames``, in tracked frames.

    Raises
    ------
    ValueError
        The interval is less than one.

    Examples
    --------
    >>> policy = PromptPolicy(PromptMode.EVERY_N_FRAMES, 3)
    >>> policy.is_due(0)
    True
    >>> policy.on_prompted(0)
    >>> [step_idx for step_idx in range(1, 8) if policy.is_due(step_idx)]
    [3, 4, 5, 6, 7]
    >>> policy.on_prompted(4)
    >>> [step_idx for step_idx in range(5, 8) if policy.is_due(step_idx)]
    [6, 7]
    """

    def __init__(self, mode: PromptMode, interval: int = 1) -> None:
        if interval < 1:
            raise ValueError(f"a prompt interval must be at least 1, got {interval}")
        self.mode = mode
        self._period = 1 if mode is PromptMode.EVERY_FRAME else interval
        self._next_due: int | None = 0

    def is_due(self, step_idx: int) -> bool:
        """Return whether prompts are to be taken on a tracked frame.

        Parameters
        ----------
        step_idx : int
            0-based count of tracked frames.
        """
        return self._next_due is not None and step_idx >= self._next_due

    def on_prompted(self, step_idx: int) -> None:
        """Note that a tracked frame gave at least one prompt.

        Parameters
        ----------
        step_idx : int
            0-based count of tracked frames.
        """
        if self.mode is PromptMode.FIRST_FRAME:
            self._next_due = None
        else:
            self._next_due = (step_idx // self._period + 1) * self._period

    def takes_row(self, step_idx: int) -> bool:
        """Return whether a prompt that is *given* for a tracked frame is used.

        With ``--prompts`` or ``--prompts-dir`` there is nothing to look for, so nothing stays
        due: ``first_frame`` uses every given prompt on its own frame, the interval modes only
        those on the exact period.

        Parameters
        ----------
        step_idx : int
            0-based count of tracked frames.
        """
        return self.mode is PromptMode.FIRST_FRAME or step_idx % self._period == 0


class Detected(Protocol):
    """What matching needs of a detection."""

    @property
    def box_xyxy(self) -> tuple[float, float, float, float]:
        """Pixels of the frame."""

    @property
    def category_id(self) -> int:
        """Index of its class."""

    @property
    def mask(self) -> NDArray[Any] | None:
        """1 on the object, shape (H, W); None from a detector without masks."""


DetectedT = TypeVar("DetectedT", bound=Detected)


class Assignment(NamedTuple, Generic[DetectedT]):
    """Which object a detection is.

    Attributes
    ----------
    object_id : int
        The object.
    detection : Detected
        As it was given.
    is_new : bool
        Whether the object is first seen now.
    """

    object_id: int
    detection: DetectedT
    is_new: bool


def assign_ids(
    detections: Sequence[DetectedT],
    latest: Mapping[int, NDArray[Any] | CroppedMask],
    categories: Mapping[int, int | None],
    next_id: int,
) -> list[Assignment[DetectedT]]:
    """Match the detections of one frame to the live objects; the rest are new objects.

    One-to-one, with the largest total overlap, and never across two known categories. The
    overlap of a detection with a mask is the IoU of the two masks. Of a detection with a box
    only, it is the IoU of the box with the bounding box of the object's mask.

    Parameters
    ----------
    detections : sequence of Detected
        What the detector found.
    latest : mapping of int to ndarray of shape (H, W), or CroppedMask
        The masks of the objects that detections may be, by object id: the session's latest
        estimate of those that are present, or where lost ones were seen last.
    categories : mapping of int to int or None
        Category of each object, from its first prompt; None or absent is unknown, and matches any.
    next_id : int
        The first id no object has had so far.

    Returns
    -------
    list of Assignment
        One per detection, in their order. New ids count up from `next_id`, so the next free one
        is `next_id` plus the number of new objects.
    """
    object_ids = sorted(latest)
    objects = [
        mask if isinstance(mask, CroppedMask) else crop_mask(mask)
        for mask in (latest[object_id] for object_id in object_ids)
    ]
    overlap = np.zeros((len(detections), len(objects)))
    for row, detection in enumerate(detections):
        mask = None if detection.mask is None else crop_mask(detection.mask)
        for column, (object_id, known) in enumerate(zip(object_ids, objects, strict=True)):
            if categories.get(object_id) not in (None, detection.category_id):
                continue
            overlap[row, column] = (
                _box_overlap(detection.box_xyxy, known)
                if mask is None
                else _mask_overlap(mask, known)
            )
    matched = {
        row: object_ids[column] for row, column in match_one_to_one(overlap, MATCH_THRESHOLD)
    }
    assignments: list[Assignment[DetectedT]] = []
    for row, detection in enumerate(detections):
        if row in matched:
            assignments.append(Assignment(matched[row], detection, False))
        else:
            assignments.append(Assignment(next_id, detection, True))
            next_id += 1
    return assignments


class LostObjects:
    """Where objects were that are out of sight: a detector may miss what it found before.

    Kept for `LOST_STEPS` tracked frames, so what is remembered does not grow with the video.
    """

    def __init__(self) -> None:
        self._present: Mapping[int, NDArray[Any]] = {}
        self._lost: dict[int, tuple[int, CroppedMask]] = {}

    def update(self, step_idx: int, present: Mapping[int, NDArray[Any]]) -> None:
        """Take note of what is in sight; to be called with every tracked frame.

        Parameters
        ----------
        step_idx : int
            0-based count of tracked frames.
        present : mapping of int to ndarray, shape (H, W)
            The session's latest estimate: the masks of the objects that are present.
        """
        for object_id, mask in self._present.items():
            if object_id not in present:
                self._lost[object_id] = step_idx, crop_mask(mask)
        self._lost = {
            object_id: (since, mask)
            for object_id, (since, mask) in self._lost.items()
            if object_id not in present and step_idx - since < LOST_STEPS
        }
        self._present = present

    def forget(self, object_ids: Collection[int]) -> None:
        """Know these objects no more."""
        self._lost = {i: lost for i, lost in self._lost.items() if i not in object_ids}

    @property
    def last_seen(self) -> dict[int, CroppedMask]:
        """The last mask of each object that is out of sight."""
        return {object_id: mask for object_id, (_, mask) in self._lost.items()}


def _mask_overlap(a: CroppedMask, b: CroppedMask) -> float:
    shared = intersection(a, b)
    return shared / (a.area + b.area - shared) if shared else 0.0


def _box_overlap(box_xyxy: Sequence[float], known: CroppedMask) -> float:
    return float(box_iou_matrix([box_xyxy], [known.box_xyxy])[0, 0])
