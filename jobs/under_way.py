"""Attempts under way: what the driver knows of each between its beginning and its end.

An attempt belongs to the worker it was sent to, and a worker may have several.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from jobs.progress import WorkerState
from jobs.records import VideoCommit
from workers.logs import log_context
from workers.messages import Phase, Progress, VideoSource

_RANKED = (Phase.WAITING, Phase.DOWNLOADING, Phase.FINISHING, Phase.TRACKING)
_TRACKED = (Phase.TRACKING, Phase.FINISHING)
"""Phases whose steps are those of the tracker."""
_SHOWN = {
    Phase.DOWNLOADING: WorkerState.DOWNLOADING,
    Phase.TRACKING: WorkerState.TRACKING,
    Phase.FINISHING: WorkerState.FINISHING,
}


@dataclass(slots=True)
class UnderWay:
    """An attempt that was sent to a worker.

    Attributes
    ----------
    task : int
        The scheduler's number of the video.
    number : int
        Which try it is, from 1.
    worker_id : str
        The worker.
    source : VideoSource
        The video.
    queue_s : float
        How long the video waited for this attempt, in seconds.
    progress : Progress or None
        What was last heard of it.
    commit : VideoCommit or None
        What it wants to commit, once it has ended well.
    """

    task: int
    number: int
    worker_id: str
    source: VideoSource
    queue_s: float
    progress: Progress | None = None
    commit: VideoCommit | None = None
    _num_counted: int = 0

    def heard(self, beat: Progress) -> int:
        """Take note of a heartbeat; return the frames tracked since what was counted before."""
        self.progress = beat
        return self.gained(beat.num_steps if beat.phase in _TRACKED else 0)

    def gained(self, num_frames: int) -> int:
        """Return how many frames are new, of all that it has tracked, and count them."""
        num_new = max(0, num_frames - self._num_counted)
        self._num_counted += num_new
        return num_new

    @property
    def shown(self) -> WorkerState | None:
        """What its worker is shown to be doing; None while that is not known yet."""
        return None if self.progress is None else _SHOWN.get(self.progress.phase)

    @property
    def rank(self) -> int:
        """How much its worker is busy with it."""
        return _RANKED.index(self.progress.phase) if self.progress is not None else -1


class Attempts:
    """Every attempt under way, by its id and by its worker."""

    def __init__(self) -> None:
        self._by_id: dict[str, UnderWay] = {}
        self._by_worker: defaultdict[str, dict[str, UnderWay]] = defaultdict(dict)

    def begin(self, attempt_id: str, under_way: UnderWay) -> None:
        """Enter an attempt."""
        self._by_id[attempt_id] = self._by_worker[under_way.worker_id][attempt_id] = under_way

    def get(self, attempt_id: str) -> UnderWay | None:
        """Return an attempt; None for one that has ended."""
        return self._by_id.get(attempt_id)

    def end(self, attempt_id: str) -> UnderWay | None:
        """Take an attempt off the books, and return it."""
        under_way = self._by_id.pop(attempt_id, None)
        if under_way is not None:
            on_worker = self._by_worker[under_way.worker_id]
            del on_worker[attempt_id]
            if not on_worker:
                del self._by_worker[under_way.worker_id]
        return under_way

    def ids_on(self, worker_id: str) -> list[str]:
        """Return the attempts of a worker."""
        return list(self._by_worker.get(worker_id, ()))

    def furthest(self, worker_id: str) -> UnderWay | None:
        """Return the attempt of a worker that is tracked, else finished, downloaded or waiting."""
        mine = self._by_worker.get(worker_id, {}).values()
        return max(mine, key=lambda under_way: under_way.rank, default=None)

    def about(self, attempt_id: str) -> contextlib.AbstractContextManager[None]:
        """Say which attempt the lines logged within the block are about."""
        under_way = self.get(attempt_id)
        if under_way is None:
            return log_context(attempt_id=attempt_id)
        source = under_way.source
        return log_context(video=source.name, video_key=source.video_key, attempt_id=attempt_id)

    def unfinished(self) -> tuple[int, int]:
        """Return the frames and the masks of attempts that have not ended."""
        beats = [u.progress for u in self._by_id.values() if u.progress is not None]
        num_frames = sum(beat.num_steps for beat in beats if beat.phase in _TRACKED)
        return num_frames, sum(beat.num_masks for beat in beats)

    def status(self) -> dict[str, dict[str, Any]]:
        """Return what each busy worker does, as `_status.json` says it."""
        found = {}
        for worker_id in self._by_worker:
            furthest = self.furthest(worker_id)
            assert furthest is not None, "workers without attempts are not kept"
            progress = furthest.progress
            found[worker_id] = {
                "state": progress.phase.value if progress else "starting",
                "video": furthest.source.name,
                "num_steps": progress.num_steps if progress else 0,
            }
        return found
