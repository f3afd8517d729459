"""SAMURAI: SAM 2.1 with a motion model and a choice of what to remember.

See `workers.engine.policies.samurai` for the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from workers.engine.bank import Clock
from workers.engine.lineage import Spool
from workers.engine.policies.base import Track
from workers.engine.policies.samurai import SamuraiTrack
from workers.trackers.sam2 import SHARED_OPTIONS, EngineLoader

OPTIONS: Mapping[str, Any] = {
    **SHARED_OPTIONS,
    "stable_frames_threshold": 15,
    "stable_ious_threshold": 0.3,
    "min_obj_score_logits": -1.0,
    "kf_score_weight": 0.25,
    "memory_bank_iou_threshold": 0.5,
    "memory_bank_obj_score_threshold": 0.0,
    "memory_bank_kf_score_threshold": 0.0,
    "memory_bank_use_kf_score": True,
    "memory_selection": True,
}
"""Options and their defaults, under the names of the published configuration.

* ``stable_frames_threshold``: good frames before motion takes part in the choice of the mask.
* ``stable_ious_threshold``: predicted IoU of a good frame, 0..1.
* ``min_obj_score_logits``: object score at or below which the object is absent.
* ``kf_score_weight``: weight of motion against the predicted IoU, 0..1. For the size large the
  default is 0.15.
* ``memory_bank_iou_threshold``, ``memory_bank_obj_score_threshold``,
  ``memory_bank_kf_score_threshold``: a frame is remembered if it is above all three.
* ``memory_bank_use_kf_score``: apply the third. The program behind the published figures did not.
* ``memory_selection``: off, the last six frames are remembered, as by SAM 2.
"""

_LARGE_KF_SCORE_WEIGHT = 0.15


class SAMURAILoader(EngineLoader):
    """SAMURAI on a SAM 2.1 checkpoint; any number of objects. Options: `OPTIONS`."""

    family: ClassVar[str] = "samurai"
    allowed: ClassVar[Mapping[str, Any]] = OPTIONS
    is_early_fork: ClassVar[bool] = True
    _bounds: ClassVar[Mapping[str, tuple[float, float]]] = {
        "kf_score_weight": (0, 1),
        "stable_ious_threshold": (0, 1),
        "stable_frames_threshold": (1, float("inf")),
        "memory_bank_iou_threshold": (0, 1),
        "memory_bank_kf_score_threshold": (0, 1),
        "min_obj_score_logits": (-1e9, 1e9),
        "memory_bank_obj_score_threshold": (-1e9, 1e9),
    }

    def _make_track(self, clock: Clock, spool: Spool) -> Track:
        return SamuraiTrack(self.options, clock)

    def _adapt_options(self, size: str) -> None:
        if size == "large" and "kf_score_weight" not in self.config.options:
            self.options["kf_score_weight"] = _LARGE_KF_SCORE_WEIGHT
