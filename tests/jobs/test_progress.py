"""What a run shows while it is under way.

* Without a terminal: plain lines, at most one per interval, and the last state at the end.
* On a terminal: a display with videos, frames, speed, time left, and a line per worker; many
  workers are summed up; a stopped worker disappears, a lost one after a while.
* Speed is that of the last seconds; the time left follows from frames where they are estimated,
  else from videos; a run with nothing to do shows no nonsense.
* A reader that went away (a closed pipe) does not end the run.
"""

from __future__ import annotations

import contextlib
import io
import os

import pytest
from rich.console import Console

from jobs.progress import (
    LOST_SHOWN_S,
    MAX_WORKER_LINES,
    Counts,
    LiveReporter,
    Pace,
    PlainReporter,
    PlanTotals,
    WorkerState,
    make_reporter,
    progress_line,
)

TOTALS = PlanTotals("run-1", "/data/masks", num_videos=40, num_skipped=10, num_frames=3000)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_plain_lines_keep_their_distance(clock: Clock) -> None:
    stream = io.StringIO()
    reporter = PlainReporter(stream, interval_s=10, clock=clock)
    reporter.on_plan(TOTALS)
    for step in range(1, 31):
        clock.now_s += 1
        reporter.on_counts(Counts(num_committed=step // 10, num_frames=50 * step))
    reporter.on_message("warning", "a prompt fits no video")
    reporter.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "run run-1: 40 videos, 10 of them done before -> /data/masks"
    progress = [line for line in lines if "frames/s" in line]
    assert progress == [
        "1/30 videos, 500 frames, 50.0 frames/s, about 50.0 s left",
        "2/30 videos, 1,000 frames, 50.0 frames/s, about 40.0 s left",
        "3/30 videos, 1,500 frames, 50.0 frames/s, about 30.0 s left",
    ]
    assert "warning: a prompt fits no video" in lines


def test_plain_shows_the_last_state_once(clock: Clock) -> None:
    stream = io.StringIO()
    reporter = PlainReporter(stream, interval_s=10, clock=clock)
    reporter.on_plan(TOTALS)
    clock.now_s += 2
    reporter.on_counts(Counts(num_committed=30, num_quarantined=0, num_frames=3000))
    reporter.close()
    reporter.close()
    assert stream.getvalue().splitlines()[1:] == ["30/30 videos, 3,000 frames, 1,500.0 frames/s"]


def test_a_closed_pipe_does_not_end_the_run(clock: Clock) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    stream = os.fdopen(write_end, "w")
    reporter = PlainReporter(stream, clock=clock)
    reporter.on_plan(TOTALS)
    reporter.on_message("info", "nobody reads this")
    reporter.close()
    with contextlib.suppress(BrokenPipeError):
        stream.close()


def test_speed_follows_a_change(clock: Clock) -> None:
    pace = Pace(clock)
    for second in range(1, 61):
        clock.now_s += 1
        pace.add(100 * second)
    assert pace.frames_per_s == pytest.approx(100)
    for second in range(1, 41):
        clock.now_s += 1
        pace.add(6000 + 10 * second)
    assert pace.frames_per_s == pytest.approx(10)


def test_time_left_from_videos_when_frames_are_unknown(clock: Clock) -> None:
    pace = Pace(clock)
    totals = PlanTotals("run-1", "/out", num_videos=10)
    assert pace.eta_s(totals, Counts()) is None
    clock.now_s += 20
    assert pace.eta_s(totals, Counts(num_committed=1, num_quarantined=1)) == pytest.approx(80)
    clock.now_s += 30
    assert pace.eta_s(totals, Counts(num_committed=1, num_quarantined=1)) == pytest.approx(50)
    clock.now_s += 70
    assert pace.eta_s(totals, Counts(num_committed=1, num_quarantined=1)) is None
    assert pace.eta_s(totals, Counts(num_committed=10)) == 0


def test_nothing_to_do(clock: Clock) -> None:
    totals = PlanTotals("run-1", "/out", num_videos=5, num_skipped=5, num_frames=0)
    assert progress_line(totals, Counts(), Pace(clock)) == "0/0 videos, 0 frames"
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    reporter = LiveReporter(console, clock)
    reporter.on_plan(totals)
    reporter.close()


def test_live_display(clock: Clock) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, height=40, color_system=None)
    reporter = LiveReporter(console, clock)
    reporter.on_plan(TOTALS)
    reporter.on_worker("w0", WorkerState.TRACKING, "street/a.mp4", 120)
    reporter.on_worker("w1", WorkerState.STARTING)
    for index in range(2, MAX_WORKER_LINES + 3):
        reporter.on_worker(f"x{index:02d}", WorkerState.TRACKING, "b.mp4", 1)
    clock.now_s += 10
    reporter.on_counts(Counts(num_committed=3, num_quarantined=1, num_retries=2, num_frames=1000))
    with console.capture() as capture:
        console.print(reporter)
    shown = capture.get()
    for expected in (
        "4/30 videos",
        "1,000 frames",
        "100.0 frames/s",
        "about 20.0 s left",
        "1 quarantined",
        "2 tried again",
        "tracking",
        "street/a.mp4",
        "120 frames",
        "starting",
        "and 3 more",
    ):
        assert expected in shown
    reporter.on_worker("w1", WorkerState.STOPPED)
    with console.capture() as capture:
        console.print(reporter)
    assert "starting" not in capture.get()
    reporter.on_worker("x02", WorkerState.LOST)
    with console.capture() as capture:
        console.print(reporter)
    assert "lost" in capture.get()
    clock.now_s += LOST_SHOWN_S
    with console.capture() as capture:
        console.print(reporter)
    assert "lost" not in capture.get()
    reporter.close()
    assert "4/30 videos" in stream.getvalue().splitlines()[-1]


def test_no_terminal_means_lines() -> None:
    assert isinstance(make_reporter(io.StringIO()), PlainReporter)
