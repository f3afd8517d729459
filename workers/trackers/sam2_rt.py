"""SAM 2 for cameras: prompts on the current frame, new objects while tracking, removal.

What distinguishes it from ``sam2`` is that the length of the video never matters. The published
real-time fork (Gy920/segment-anything-2-real-time) resizes, counts and remembers differently from
the offline predictor, which only ``compat="original"`` reproduces: OpenCV's bilinear resizing, at
most seven tracked frames remembered, distances in time measured against the frames so far.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from workers.engine.bank import NUM_POINTERS, Clock
from workers.engine.lineage import Spool
from workers.engine.pictures import Resize
from workers.engine.policies.base import Track
from workers.engine.policies.sam2 import Sam2Track
from workers.trackers.sam2 import SHARED_OPTIONS, EngineLoader

OPTIONS: Mapping[str, Any] = SHARED_OPTIONS
"""Options and their defaults, see `workers.trackers.sam2.SHARED_OPTIONS`."""

_ORIGINAL_NUM_RECENT = 7


class SAM2RealtimeLoader(EngineLoader):
    """SAM 2 on a stream. Options: `OPTIONS`."""

    family: ClassVar[str] = "sam2-rt"
    allowed: ClassVar[Mapping[str, Any]] = OPTIONS

    def _make_track(self, clock: Clock, spool: Spool) -> Track:
        num_recent = _ORIGINAL_NUM_RECENT if self.is_faithful else NUM_POINTERS
        return Sam2Track(self.options, clock, num_recent)

    def _clock(self, num_frames: int | None) -> Clock:
        return Clock(None, grows=self.is_faithful)

    @property
    def _resize(self) -> Resize:
        return "bilinear" if self.is_faithful else "bicubic"
