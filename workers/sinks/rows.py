"""From what was seen on each frame to the rows of the tables of one video.

Takes plain values, so it knows neither trackers nor prompts. Per object it keeps a handful of sums
and the last box, never a mask.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from workers.rle import EncodedMask
from workers.sinks.parts import PartWriter
from workers.sinks.schema import FLAG_BORDER, FLAG_OCCLUDED, FLAG_PROMPTED

ROW_OVERHEAD_BYTES = 16
"""Added to the variable bytes of a row when buffers are measured."""


@dataclass(frozen=True, slots=True)
class SeenMask:
    """One object's mask on one frame, ready to be stored.

    Attributes
    ----------
    object_id : int
        The object.
    score : float
        Confidence of the tracker, 0..1.
    encoded : EncodedMask
        The mask; never empty.
    prompted : bool
        Whether the object was prompted on this frame.
    occluded : bool
        Whether the tracker reports it as occluded all the same.
    """

    object_id: int
    score: float
    encoded: EncodedMask
    prompted: bool
    occluded: bool


@dataclass(slots=True)
class _ObjectSums:
    """What the table `objects` says about one object, as it grows."""

    category_id: int | None = None
    first_frame: int | None = None
    last_frame: int | None = None
    num_visible: int = 0
    score_sum: float = 0.0
    area_sum: int = 0
    last_step: int = -2
    last_box_xywh: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    iou_sum: float = 0.0
    num_pairs: int = 0

    def see(self, mask: SeenMask, frame_idx: int, step: int) -> None:
        if self.first_frame is None:
            self.first_frame = frame_idx
        self.last_frame = frame_idx
        self.num_visible += 1
        self.score_sum += mask.score
        self.area_sum += mask.encoded.area
        box = mask.encoded.bbox_xywh
        if self.last_step == step - 1:
            self.iou_sum += box_iou(self.last_box_xywh, box)
            self.num_pairs += 1
        self.last_step = step
        self.last_box_xywh = box


class VideoRows:
    """Writes one video's rows of `masks`, `frames`, `prompts` and `objects`.

    Parameters
    ----------
    parts : PartWriter
        Where rows go.
    video_key : int
        The video.
    height, width : int
        Size of the picture after rotation, in pixels.
    """

    def __init__(self, parts: PartWriter, video_key: int, height: int, width: int) -> None:
        self._parts = parts
        self._video_key = video_key
        self._height = height
        self._width = width
        self._objects: dict[int, _ObjectSums] = {}
        self.num_frames = 0
        self.num_masks = 0
        self.first_frame: int | None = None
        self.last_frame: int | None = None

    @property
    def num_objects(self) -> int:
        """Objects that were ever prompted."""
        return len(self._objects)

    def add_prompt(
        self,
        object_id: int,
        frame_idx: int,
        kind: str,
        payload: Any,
        source: str,
        category_id: int | None,
        score: float | None,
    ) -> None:
        """Add a prompt that was given to the tracker; see SCHEMA.md for the payload.

        Frames must come in order. An object keeps the first category it is given.
        """
        sums = self._objects.setdefault(object_id, _ObjectSums())
        if sums.category_id is None:
            sums.category_id = category_id
        text = json.dumps(payload, separators=(",", ":"))
        row = (
            self._video_key, object_id, frame_idx, kind, text, source, category_id, score,
        )  # fmt: skip
        self._parts.append("prompts", row, len(text) + ROW_OVERHEAD_BYTES)

    def add_frame(
        self,
        frame_idx: int,
        pts_us: int,
        masks: Sequence[SeenMask],
        occluded_ids: Sequence[int],
    ) -> None:
        """Add one tracked frame.

        Parameters
        ----------
        frame_idx : int
            The frame; frames come in order, each once.
        pts_us : int
            Its presentation time, in microseconds.
        masks : sequence of SeenMask
            What is written for it, ordered by object id.
        occluded_ids : sequence of int
            Objects that are hidden or gone, ascending.
        """
        key, height, width = self._video_key, self._height, self._width
        for mask in masks:
            sums = self._objects.setdefault(mask.object_id, _ObjectSums())
            sums.see(mask, frame_idx, self.num_frames)
            encoded = mask.encoded
            x, y, w, h = encoded.bbox_xywh
            flags = (
                FLAG_PROMPTED * mask.prompted
                + FLAG_OCCLUDED * mask.occluded
                + FLAG_BORDER * encoded.touches_border
            )
            row = (
                key, frame_idx, pts_us, mask.object_id, sums.category_id, mask.score,
                x, y, w, h, encoded.area, height, width, encoded.counts, flags,
            )  # fmt: skip
            self._parts.append("masks", row, len(encoded.counts) + ROW_OVERHEAD_BYTES)
        self._parts.append(
            "frames",
            (key, frame_idx, pts_us, len(masks), list(occluded_ids)),
            4 * len(occluded_ids) + ROW_OVERHEAD_BYTES,
        )
        self.num_frames += 1
        self.num_masks += len(masks)
        if self.first_frame is None:
            self.first_frame = frame_idx
        self.last_frame = frame_idx

    def finish(self) -> None:
        """Write the table `objects`."""
        for object_id, sums in sorted(self._objects.items()):
            seen = sums.num_visible
            row = (
                self._video_key,
                object_id,
                sums.category_id,
                sums.first_frame,
                sums.last_frame,
                seen,
                sums.score_sum / seen if seen else None,
                sums.area_sum / seen if seen else None,
                sums.iou_sum / sums.num_pairs if sums.num_pairs else None,
            )
            self._parts.append("objects", row)


def box_iou(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Return the intersection over union of two boxes, each left, top, width, height.

    Examples
    --------
    >>> box_iou((0, 0, 2, 2), (1, 0, 2, 2))
    0.3333333333333333
    """
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)
