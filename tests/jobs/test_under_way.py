"""What the driver knows of attempts under way.

* Frames are counted once, however often a heartbeat repeats them, and never twice by the end.
* Of several attempts on a worker the one is shown that is tracked, else finished, else fetched.
* An ended attempt is off the books, and its worker with the last one.
"""

from __future__ import annotations

from jobs.progress import WorkerState
from jobs.under_way import Attempts, UnderWay
from workers.messages import Phase, Progress, SourceKind, VideoSource


def under_way(name: str, worker_id: str = "worker-1") -> UnderWay:
    source = VideoSource(1, f"/videos/{name}", name, SourceKind.FILE)
    return UnderWay(task=0, number=1, worker_id=worker_id, source=source, queue_s=0.0)


def beat(attempt_id: str, phase: Phase, num_steps: int, num_masks: int = 0) -> Progress:
    return Progress(attempt_id, phase, num_steps, num_masks=num_masks)


def test_frames_are_counted_once() -> None:
    one = under_way("a")
    assert one.heard(beat("1", Phase.DOWNLOADING, 700)) == 0  # steps of a download are no frames
    assert one.heard(beat("1", Phase.TRACKING, 3)) == 3
    assert one.heard(beat("1", Phase.TRACKING, 3)) == 0
    assert one.heard(beat("1", Phase.FINISHING, 5)) == 2
    assert one.gained(8) == 3
    assert one.gained(8) == 0


def test_the_furthest_attempt_is_shown() -> None:
    attempts = Attempts()
    attempts.begin("1", under_way("a"))
    attempts.begin("2", under_way("b"))
    attempts.begin("3", under_way("c", "worker-2"))
    for attempt_id, phase in (("1", Phase.FINISHING), ("2", Phase.TRACKING)):
        found = attempts.get(attempt_id)
        assert found is not None
        found.heard(beat(attempt_id, phase, 4, num_masks=2))
    furthest = attempts.furthest("worker-1")
    assert furthest is attempts.get("2")
    assert furthest is not None
    assert furthest.shown is WorkerState.TRACKING
    assert attempts.unfinished() == (8, 4)
    assert attempts.status() == {
        "worker-1": {"state": "tracking", "video": "b", "num_steps": 4},
        "worker-2": {"state": "starting", "video": "c", "num_steps": 0},
    }


def test_what_has_ended_is_off_the_books() -> None:
    attempts = Attempts()
    one = under_way("a")
    attempts.begin("1", one)
    assert attempts.end("1") is one
    assert attempts.end("1") is None
    assert attempts.get("1") is None
    assert attempts.ids_on("worker-1") == []
    assert attempts.furthest("worker-1") is None
    assert attempts.status() == {}
