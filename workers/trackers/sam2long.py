"""SAM2Long: SAM 2.1 that follows several hypotheses and decides late.

See `workers.engine.policies.sam2long` for the method. A frame comes out once all live hypotheses
about it agree on their past; `latest` has the best estimate at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from workers.engine.bank import Clock
from workers.engine.lineage import Spool
from workers.engine.policies.base import Track
from workers.engine.policies.sam2long import Sam2LongTrack
from workers.trackers.sam2 import SHARED_OPTIONS, EngineLoader

OPTIONS: Mapping[str, Any] = {
    **SHARED_OPTIONS,
    "num_pathway": 3,
    "iou_thre": 0.3,
    "uncertainty": 2.0,
    "min_key_scale": 0.95,
    "max_key_scale": 1.05,
    "key_scaling": True,
    "max_lag_frames": 0,
}
"""Options and their defaults: those the paper found best.

* ``num_pathway``: hypotheses per object.
* ``iou_thre``: predicted IoU above which a frame is remembered, 0..1.
* ``uncertainty``: object score, positive or negative, above which a frame is certain.
* ``min_key_scale``, ``max_key_scale``: range of the factors of memory keys.
* ``key_scaling``: off, keys are not scaled.
* ``max_lag_frames``: a frame is decided for the best hypothesis once so many later ones have been
  seen; 0 for never, which alone is exact.
"""


class SAM2LongLoader(EngineLoader):
    """SAM2Long on a SAM 2.1 checkpoint; any number of objects. Options: `OPTIONS`."""

    family: ClassVar[str] = "sam2long"
    allowed: ClassVar[Mapping[str, Any]] = OPTIONS
    is_early_fork: ClassVar[bool] = True
    _bounds: ClassVar[Mapping[str, tuple[float, float]]] = {
        "num_pathway": (1, 16),
        "iou_thre": (0, 1),
        "uncertainty": (0, float("inf")),
        "min_key_scale": (0, 10),
        "max_key_scale": (0, 10),
        "max_lag_frames": (0, float("inf")),
    }

    def _make_track(self, clock: Clock, spool: Spool) -> Track:
        share = self.engine.network.savings.pathways
        return Sam2LongTrack(self.options, clock, spool, share=share)
