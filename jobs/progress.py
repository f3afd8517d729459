"""What people see while a run is under way.

The driver tells a `Reporter` what happens; two of them draw it: `LiveReporter` on a terminal,
`PlainReporter` as lines of a log. Both write to standard error, so that standard output holds the
summary alone. A reporter never raises: a broken pipe must not end a run.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

SPEED_WINDOW_S = 30.0
"""Frames per second are taken over this many past seconds: short enough to follow a change."""
SPEED_SETTLES_S = 2.0
"""Over a shorter time the first few frames would make a meaningless speed."""
PLAIN_INTERVAL_S = 10.0
"""At most one progress line per this many seconds where there is no terminal."""
LOST_SHOWN_S = 30.0
"""A lost worker stays in view this long; another one takes its place."""
MAX_WORKER_LINES = 12
"""Workers shown one by one; the rest are summed up in a line."""


class WorkerState(StrEnum):
    """What a worker is doing, as the display shows it."""

    STARTING = "starting"
    IDLE = "idle"
    DOWNLOADING = "downloading"
    TRACKING = "tracking"
    FINISHING = "finishing"
    LOST = "lost"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class PlanTotals:
    """What a run sets out to do.

    Attributes
    ----------
    run_id, out_uri : str
        The run and its output.
    num_videos : int
        Videos of the corpus, those already done included.
    num_skipped : int
        Videos that were committed before this start.
    num_frames : int or None
        Estimated frames of the videos that are left; None when too few are probed to tell.
    """

    run_id: str
    out_uri: str
    num_videos: int
    num_skipped: int = 0
    num_frames: int | None = None

    @property
    def num_left(self) -> int:
        """Videos that this start has to do."""
        return self.num_videos - self.num_skipped


@dataclass(frozen=True, slots=True)
class Counts:
    """Where a run stands; each call replaces the one before.

    Attributes
    ----------
    num_committed, num_quarantined : int
        Videos settled since this start.
    num_retries : int
        Attempts that failed and were or will be tried again.
    num_frames, num_masks : int
        Frames stepped and masks emitted since this start, those of unfinished videos included.
    """

    num_committed: int = 0
    num_quarantined: int = 0
    num_retries: int = 0
    num_frames: int = 0
    num_masks: int = 0

    @property
    def num_settled(self) -> int:
        """Videos that need nothing more."""
        return self.num_committed + self.num_quarantined


class Reporter(Protocol):
    """What the driver calls; every call returns at once."""

    def on_plan(self, totals: PlanTotals) -> None:
        """Hear what there is to do; once, before any worker starts."""

    def on_worker(
        self, worker_id: str, state: WorkerState, video: str = "", num_steps: int = 0
    ) -> None:
        """Hear what a worker is doing, on which video, and how many frames of it are stepped."""

    def on_counts(self, counts: Counts) -> None:
        """Hear where the run stands."""

    def on_message(self, level: str, text: str) -> None:
        """Hear one sentence worth reading; `level` is ``info``, ``warning`` or ``error``."""

    def close(self) -> None:
        """Stop drawing; further calls are ignored."""


class SilentReporter:
    """A reporter that shows nothing, for callers from Python and for tests."""

    def on_plan(self, totals: PlanTotals) -> None:
        """Ignore the plan."""

    def on_worker(
        self, worker_id: str, state: WorkerState, video: str = "", num_steps: int = 0
    ) -> None:
        """Ignore a worker's state."""

    def on_counts(self, counts: Counts) -> None:
        """Ignore the counts."""

    def on_message(self, level: str, text: str) -> None:
        """Ignore a message."""

    def close(self) -> None:
        """Do nothing."""


class Pace:
    """Frames per second over the last seconds, and the time that is left at that speed.

    Parameters
    ----------
    clock : callable
        Returns seconds that never run backwards.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._start_s = clock()
        self._samples: deque[tuple[float, int]] = deque([(self._start_s, 0)])
        self._num_settled = 0
        self._settled_s = 0.0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the first sample."""
        return self._clock() - self._start_s

    def add(self, num_frames: int) -> None:
        """Take a sample of the running total."""
        now = self._clock()
        if num_frames == 0:
            # Workers are still loading: the time until the first frame is no speed.
            self._samples.clear()
        self._samples.append((now, num_frames))
        while len(self._samples) > 2 and self._samples[1][0] <= now - SPEED_WINDOW_S:
            self._samples.popleft()

    @property
    def frames_per_s(self) -> float:
        """Speed over the window; 0 before there is any."""
        (first_s, first), (last_s, last) = self._samples[0], self._samples[-1]
        span_s = last_s - first_s
        return max(last - first, 0) / span_s if span_s >= SPEED_SETTLES_S else 0.0

    def eta_s(self, totals: PlanTotals, counts: Counts) -> float | None:
        """Return the seconds left; None where nothing tells.

        From frames while fewer are done than were estimated, else from videos: each takes as long
        as those before, of which the time since the last one counts.
        """
        left = totals.num_left - counts.num_settled
        if left <= 0:
            return 0.0
        if totals.num_frames is not None and self.frames_per_s > 0:
            frames_left = totals.num_frames - counts.num_frames
            if frames_left > 0:
                return frames_left / self.frames_per_s
        if not counts.num_settled:
            return None
        if counts.num_settled != self._num_settled:
            self._num_settled, self._settled_s = counts.num_settled, self.elapsed_s
        each_s = self._settled_s / counts.num_settled
        left_s = left * each_s - (self.elapsed_s - self._settled_s)
        return left_s if left_s > 0 else None


def format_duration(seconds: float | None) -> str:
    """Return a duration as people say it.

    Examples
    --------
    >>> format_duration(4.26), format_duration(75), format_duration(3 * 3600 + 62)
    ('4.3 s', '1 min 15 s', '3 h 01 min')
    >>> format_duration(None)
    'unknown'
    """
    if seconds is None:
        return "unknown"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


class PlainReporter:
    """Progress as lines: one when something is settled, at most every few seconds.

    Parameters
    ----------
    stream : TextIO
        Where lines go.
    interval_s : float
        Shortest time between two progress lines.
    clock : callable
        Returns seconds that never run backwards.

    Attributes
    ----------
    told : set of str
        Messages that were printed.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        interval_s: float = PLAIN_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._interval_s = interval_s
        self._clock = clock
        self._pace = Pace(clock)
        self._totals: PlanTotals | None = None
        self._counts = Counts()
        self._shown = Counts()
        self._shown_s = clock()
        self._closed = False
        self.told: set[str] = set()

    def on_plan(self, totals: PlanTotals) -> None:
        """Print what there is to do."""
        self._totals = totals
        done = f", {totals.num_skipped:,} of them done before" if totals.num_skipped else ""
        videos = "1 video" if totals.num_videos == 1 else f"{totals.num_videos:,} videos"
        self._print(f"run {totals.run_id}: {videos}{done} -> {totals.out_uri}")

    def on_worker(
        self, worker_id: str, state: WorkerState, video: str = "", num_steps: int = 0
    ) -> None:
        """Ignore a worker's state: messages say what matters in a log."""

    def on_counts(self, counts: Counts) -> None:
        """Print a progress line when enough time has passed since the last."""
        self._counts = counts
        self._pace.add(counts.num_frames)
        if counts != self._shown and self._clock() - self._shown_s >= self._interval_s:
            self._show()

    def on_message(self, level: str, text: str) -> None:
        """Print the message."""
        self.told.add(text)
        self._print(text if level == "info" else f"{level}: {text}")

    def close(self) -> None:
        """Print the last state, if it was not shown."""
        if not self._closed and self._counts != self._shown:
            self._show()
        self._closed = True

    def _show(self) -> None:
        self._shown, self._shown_s = self._counts, self._clock()
        if self._totals is not None:
            self._print(progress_line(self._totals, self._counts, self._pace))

    def _print(self, text: str) -> None:
        if self._closed:
            return
        try:
            print(text, file=self._stream, flush=True)
        except (OSError, ValueError):
            self._closed = True  # nobody listens any more; the run goes on


def progress_line(totals: PlanTotals, counts: Counts, pace: Pace) -> str:
    """Return the state of a run in one line."""
    parts = [f"{counts.num_settled:,}/{totals.num_left:,} videos", f"{counts.num_frames:,} frames"]
    if pace.frames_per_s:
        parts.append(f"{pace.frames_per_s:,.1f} frames/s")
    if counts.num_quarantined:
        parts.append(f"{counts.num_quarantined:,} quarantined")
    if counts.num_retries:
        parts.append(f"{counts.num_retries:,} tried again")
    eta_s = pace.eta_s(totals, counts)
    if eta_s:
        parts.append(f"about {format_duration(eta_s)} left")
    return ", ".join(parts)


@dataclass(slots=True)
class _WorkerLine:
    """One worker as the live display shows it."""

    state: WorkerState
    video: str = ""
    num_steps: int = 0
    changed_s: float = 0.0


@dataclass(slots=True)
class LiveReporter:
    """Progress as a display that redraws itself on a terminal.

    Attributes
    ----------
    console : rich.console.Console
        A terminal, usually standard error.
    clock : callable
        Returns seconds that never run backwards.
    told : set of str
        Messages that were printed.
    """

    console: Console
    clock: Callable[[], float] = time.monotonic
    told: set[str] = field(default_factory=set)
    _totals: PlanTotals | None = None
    _counts: Counts = Counts()
    _workers: dict[str, _WorkerLine] = field(default_factory=dict)
    _pace: Pace = field(init=False)
    _live: object | None = None

    def __post_init__(self) -> None:
        self._pace = Pace(self.clock)

    def on_plan(self, totals: PlanTotals) -> None:
        """Start the display."""
        from rich.live import Live

        self._totals = totals
        if self._live is None:
            # Ray and libraries print while we draw: what they print goes above the display.
            live = Live(self, console=self.console, refresh_per_second=4, transient=True)
            live.start()
            self._live = live

    def on_worker(
        self, worker_id: str, state: WorkerState, video: str = "", num_steps: int = 0
    ) -> None:
        """Update one worker's line."""
        if state is WorkerState.STOPPED:
            self._workers.pop(worker_id, None)
            return
        line = self._workers.setdefault(worker_id, _WorkerLine(state, changed_s=self.clock()))
        if (line.state, line.video) != (state, video):
            line.changed_s = self.clock()
        line.state, line.video, line.num_steps = state, video, num_steps

    def on_counts(self, counts: Counts) -> None:
        """Update the totals."""
        self._counts = counts
        self._pace.add(counts.num_frames)

    def on_message(self, level: str, text: str) -> None:
        """Print a message above the display."""
        from rich.text import Text

        self.told.add(text)
        style = {"warning": "yellow", "error": "bold red"}.get(level, "")
        self.console.print(Text(text if level == "info" else f"{level}: {text}", style=style))

    def close(self) -> None:
        """Take the display down and leave its last line."""
        from rich.live import Live

        if isinstance(self._live, Live):
            self._live.stop()
            self._live = None
            if self._totals is not None:
                self.console.print(progress_line(self._totals, self._counts, self._pace))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the display; rich calls it from its own thread."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        totals, counts = self._totals, self._counts
        if totals is None:
            return
        head = Table.grid(padding=(0, 2))
        head.add_column(width=28)
        head.add_column(no_wrap=True)
        # A run with nothing left would divide by zero in the bar: it is shown as full.
        total = max(totals.num_left, 1)
        settled = counts.num_settled if totals.num_left else 1
        head.add_row(
            ProgressBar(total=total, completed=settled, width=28),
            Text(f"{counts.num_settled:,}/{totals.num_left:,} videos", style="bold"),
        )
        yield head
        eta_s = self._pace.eta_s(totals, counts)
        speed = self._pace.frames_per_s
        facts = [f"{counts.num_frames:,} frames", f"{counts.num_masks:,} masks"]
        facts += [f"{speed:,.1f} frames/s"] if speed else []
        facts += [f"{format_duration(self._pace.elapsed_s)} so far"]
        facts += [f"about {format_duration(eta_s)} left"] if eta_s else []
        facts += [] if self._workers else ["starting workers"]
        line = Text("  ".join(facts), style="dim")
        if counts.num_retries:
            line.append(f"  {counts.num_retries:,} tried again", style="yellow")
        if counts.num_quarantined:
            line.append(f"  {counts.num_quarantined:,} quarantined", style="red")
        yield line
        yield self._worker_table()

    def _worker_table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        styles = {
            WorkerState.TRACKING: "green",
            WorkerState.LOST: "red",
            WorkerState.IDLE: "dim",
            WorkerState.STARTING: "cyan",
        }
        table = Table.grid(padding=(0, 2))
        now = self.clock()
        workers = [
            (worker_id, line)
            for worker_id, line in sorted(dict(self._workers).items(), key=lambda item: item[0])
            if line.state is not WorkerState.LOST or now - line.changed_s < LOST_SHOWN_S
        ]
        for worker_id, line in workers[:MAX_WORKER_LINES]:
            steps = f"{line.num_steps:,} frames" if line.num_steps else ""
            table.add_row(
                Text(worker_id, style="dim"),
                Text(line.state.value, style=styles.get(line.state, "")),
                Text(line.video, overflow="ellipsis", no_wrap=True),
                Text(steps),
                Text(format_duration(now - line.changed_s), style="dim"),
            )
        rest = workers[MAX_WORKER_LINES:]
        if rest:
            busy = sum(line.state is WorkerState.TRACKING for _, line in rest)
            table.add_row(Text(f"and {len(rest)} more", style="dim"), Text(f"{busy} tracking"))
        return table


def make_reporter(stream: TextIO | None = None) -> PlainReporter | LiveReporter:
    """Return the reporter that fits the stream: live on a terminal, lines elsewhere."""
    from rich.console import Console

    stream = stream if stream is not None else sys.stderr
    console = Console(file=stream)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveReporter(console)
    return PlainReporter(stream)
