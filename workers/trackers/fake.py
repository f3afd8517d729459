"""A tracker without vision: it follows the whole contract and moves each prompted shape evenly.

It exists for tests of everything around a tracker (scheduling, faults, commits, memory), where a
real one would only cost time, and for anybody who wants to try a cluster or a store. Its masks
depend on the prompts and the count of steps alone. Its options make it late, slow or faulty on
purpose; faults may be limited to videos of one width, which makes a poison video of any clip.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.trackers.base import (
    SessionPrompt,
    TrackingConfig,
    TrackingFrame,
    TrackingMask,
    TrackingModelLoader,
    TrackingSession,
    UInt8Array,
    check_options,
)

OPTIONS: Mapping[str, Any] = {
    "shift_x": 1,  # pixels per step, to the right
    "shift_y": 0,  # pixels per step, down
    "late_frames": 0,  # a frame becomes final this many steps later
    "sleep_s": 0.0,  # seconds to sleep in each step
    "fail_on_step": -1,  # raise in this step, 0-based; -1 never
    "oom_on_step": -1,  # raise MemoryError in this step
    "crash_on_step": -1,  # kill the own process in this step
    "hang_on_step": -1,  # sleep for an hour in this step
    "faulty_width": 0,  # only videos of this width in pixels fail; 0 is all
}
"""Options by name, with their defaults."""


@dataclass(slots=True)
class _Shape:
    """One object: the pixels of its prompt, cut out, and where they are now."""

    patch: UInt8Array
    top: int
    left: int


class FakeSession(TrackingSession):
    """One video of the fake tracker.

    Parameters
    ----------
    height, width : int
        Size of every frame in pixels.
    num_frames : int or None
        Ignored: results depend on prompts and steps alone.
    options : Mapping
        See `OPTIONS`.
    """

    kind = "fake"

    def __init__(
        self, height: int, width: int, *, num_frames: int | None, options: Mapping[str, Any]
    ) -> None:
        super().__init__(height, width, num_frames=num_frames)
        self._options = options
        self._shapes: dict[int, _Shape] = {}
        self._undecided: list[TrackingFrame] = []

    def _advance(
        self, frame: UInt8Array, frame_idx: int, prompts: Sequence[SessionPrompt]
    ) -> list[TrackingFrame]:
        begin = time.perf_counter()
        self._misbehave(self.num_steps - 1)
        for shape in self._shapes.values():
            shape.left += self._options["shift_x"]
            shape.top += self._options["shift_y"]
        prompted = {prompt.object_id for prompt in prompts}
        for prompt in prompts:
            self._shapes[prompt.object_id] = _cut_out(self._painted(prompt))
        masks: list[TrackingMask] = []
        occlusions: dict[int, bool] = {}
        for object_id in sorted(self._shapes):
            mask, share = self._rendered(self._shapes[object_id])
            occlusions[object_id] = share == 0
            if share:
                confidence = 1.0 if object_id in prompted else 0.5 + 0.5 * share
                masks.append(TrackingMask(mask, confidence, object_id))
        self._latest = TrackingFrame(frame_idx, masks, occlusions, time.perf_counter() - begin)
        self._undecided.append(self._latest)
        num_final = max(0, len(self._undecided) - self._options["late_frames"])
        final, self._undecided = self._undecided[:num_final], self._undecided[num_final:]
        return final

    def _flush(self) -> list[TrackingFrame]:
        final, self._undecided = self._undecided, []
        return final

    def _is_idle(self) -> bool:
        return not self._undecided

    def _forget(self, object_id: int) -> None:
        self._shapes.pop(object_id, None)

    def _get_state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        arrays: dict[str, NDArray[Any]] = {}
        shapes = {}
        for object_id, shape in self._shapes.items():
            arrays[f"patch.{object_id}"] = shape.patch
            shapes[str(object_id)] = [shape.top, shape.left]
        undecided = []
        for slot, frame in enumerate(self._undecided):
            for mask in frame.masks:
                arrays[f"late.{slot}.{mask.object_id}"] = mask.mask
            undecided.append(
                {
                    "frame_idx": frame.frame_idx,
                    "masks": [[m.object_id, m.confidence] for m in frame.masks],
                    "occlusions": {str(k): v for k, v in frame.occlusions.items()},
                    "processing_time": frame.processing_time,
                }
            )
        return arrays, {"shapes": shapes, "undecided": undecided}

    def _set_state(self, arrays: Mapping[str, NDArray[Any]], header: Mapping[str, Any]) -> None:
        self._shapes = {
            int(object_id): _Shape(arrays[f"patch.{object_id}"], top, left)
            for object_id, (top, left) in header["shapes"].items()
        }
        self._undecided = [
            TrackingFrame(
                frame["frame_idx"],
                [
                    TrackingMask(arrays[f"late.{s}.{oid}"], conf, oid)
                    for oid, conf in frame["masks"]
                ],
                {int(k): v for k, v in frame["occlusions"].items()},
                frame["processing_time"],
            )
            for s, frame in enumerate(header["undecided"])
        ]

    def _fingerprint(self) -> str:
        text = json.dumps(dict(self._options), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def _painted(self, prompt: SessionPrompt) -> UInt8Array:
        """Return the pixels a prompt stands for: its mask, its box, or discs about its points."""
        if prompt.mask is not None:
            return prompt.mask
        mask = np.zeros((self.height, self.width), np.uint8)
        if prompt.box_xyxy is not None:
            x0, y0, x1, y1 = prompt.box_xyxy
            # A box that reaches beyond the picture is cut; a thin one covers a pixel all the same.
            left = min(max(int(x0), 0), self.width - 1)
            top = min(max(int(y0), 0), self.height - 1)
            mask[top : max(top + 1, round(y1)), left : max(left + 1, round(x1))] = 1
            return mask
        assert prompt.points_xy is not None
        assert prompt.point_labels is not None
        rows, columns = np.ogrid[: self.height, : self.width]
        radius = max(1.0, 0.08 * min(self.height, self.width))
        # Foreground last: a point always lies in its own object.
        for label in (0, 1):
            for x, y in prompt.points_xy[prompt.point_labels == label]:
                disc = (columns - int(x)) ** 2 + (rows - int(y)) ** 2 <= radius**2
                mask[disc] = label
        return mask

    def _rendered(self, shape: _Shape) -> tuple[UInt8Array, float]:
        """Return a shape where it is now, and the share of it that lies inside the picture."""
        mask = np.zeros((self.height, self.width), np.uint8)
        height, width = shape.patch.shape
        top, left = max(shape.top, 0), max(shape.left, 0)
        bottom = min(shape.top + height, self.height)
        right = min(shape.left + width, self.width)
        if bottom <= top or right <= left:
            return mask, 0.0
        inside = shape.patch[
            top - shape.top : bottom - shape.top, left - shape.left : right - shape.left
        ]
        mask[top:bottom, left:right] = inside
        return mask, float(np.count_nonzero(inside) / np.count_nonzero(shape.patch))

    def _misbehave(self, step: int) -> None:
        """Do what the options ask for in this step."""
        options = self._options
        if options["sleep_s"]:
            time.sleep(options["sleep_s"])
        if options["faulty_width"] not in (0, self.width):
            return
        if step == options["fail_on_step"]:
            raise RuntimeError(f"the fake tracker fails in step {step}, as it was told to")
        if step == options["oom_on_step"]:
            raise MemoryError(f"the fake tracker is out of memory in step {step}, as it was told")
        if step == options["crash_on_step"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == options["hang_on_step"]:
            time.sleep(3600)


class FakeLoader(TrackingModelLoader):
    """The fake tracker; needs no weights.

    Parameters
    ----------
    config : TrackingConfig
        Its options are those of `OPTIONS`.

    Raises
    ------
    ValueError
        An option is unknown or does not convert.
    """

    def __init__(self, config: TrackingConfig) -> None:
        super().__init__(config)
        self._options = check_options("fake", config.options, OPTIONS)
        self._loaded = False

    @property
    def is_loaded(self) -> bool:
        """Whether `load` has run."""
        return self._loaded

    def load(self) -> None:
        """Make sessions possible; there is nothing to read."""
        self._loaded = True

    def unload(self) -> None:
        """Undo `load`."""
        self._loaded = False

    def _open(self, height: int, width: int, num_frames: int | None) -> TrackingSession:
        return FakeSession(height, width, num_frames=num_frames, options=self._options)


def _cut_out(mask: UInt8Array) -> _Shape:
    """Return the box of a mask that has at least one pixel, with where it was."""
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    return _Shape(mask[top : rows[-1] + 1, left : columns[-1] + 1].copy(), top, left)
