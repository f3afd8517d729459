"""`maskmill status`: where a run stands, read from its output alone.

The log is the truth and says what is settled; `_status.json`, which the driver overwrites every
few seconds, adds what is under way. It is advisory: without it, or when it is old, the log is
shown on its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

STATUS_KEY = "_status.json"
"""Key of the advisory status below the root of the output."""
STALE_AFTER_S = 30.0
"""A status older than this is not believed: the driver writes one every 5 seconds."""


@dataclass(frozen=True, slots=True)
class LiveStatus:
    """What a driver says about itself while it runs.

    Attributes
    ----------
    run_id, owner : str
        The run, and the driver's ``host:pid``.
    epoch : int
        Epoch of its fence.
    written_s : float
        Unix time of writing.
    started_s : float
        Unix time at which the driver started.
    num_videos, num_skipped : int
        Videos of the corpus, and those committed before this start.
    num_committed, num_quarantined, num_retries, num_frames, num_masks : int
        Since this start, as in `jobs.progress.Counts`.
    num_frames_planned : int or None
        Estimated frames this start has to do.
    workers : Mapping of str to Mapping
        Per worker: ``state``, ``video``, ``num_steps``.
    ended : bool
        The driver has finished or was stopped cleanly.
    """

    run_id: str
    owner: str
    epoch: int
    written_s: float
    started_s: float
    num_videos: int
    num_skipped: int = 0
    num_committed: int = 0
    num_quarantined: int = 0
    num_retries: int = 0
    num_frames: int = 0
    num_masks: int = 0
    num_frames_planned: int | None = None
    workers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ended: bool = False

    def to_json(self) -> bytes:
        """Return the bytes of `_status.json`."""
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> LiveStatus | None:
        """Return the status, or None when the bytes are not one of this version."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError):
            return None

    def is_fresh(self, now_s: float | None = None) -> bool:
        """Tell whether a driver wrote this a moment ago and still runs."""
        now_s = time.time() if now_s is None else now_s
        return not self.ended and now_s - self.written_s < STALE_AFTER_S
