"""`maskmill status`: where a run stands, read from its output alone.

The log is the truth and says what is settled; `_status.json`, which the driver overwrites every
few seconds, adds what is under way. It is advisory: without it, or when it is old, the log is
shown on its own. Of a submitted run the output names cluster and job; the cluster is asked only
where the output does not tell whether a driver is at work, and may be gone.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, TextIO

from jobs.commit_log import read_state
from jobs.progress import format_duration
from jobs.records import Outcome
from jobs.submitted import Submission, read_submission
from workers.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from jobs.commit_log import LogState
    from workers.storage import Store

STATUS_KEY = "_status.json"
"""Key of the advisory status below the root of the output."""
STALE_AFTER_S = 30.0
"""A status older than this is not believed."""
WRITE_EVERY_S = 5.0
"""How often a driver overwrites its status."""
WATCH_EVERY_S = 2.0
"""How often `status --watch` looks."""
ASK_WITHIN_S = 3.0
"""How long a cluster may take to accept a connection from `status`."""
MAX_REASONS = 5
"""Quarantined videos named by `status --watch`, which must fit a screen."""


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
    job : Mapping or None
        The Ray job that the driver is (`jobs.records.Job`).
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
    job: Mapping[str, str] | None = None

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


class LifeSign:
    """The status of a driver, overwritten every few seconds for as long as the driver lives.

    A thread of its own writes it, since the driver may be busy for minutes with one thing, such as
    the plan of millions of videos, and is no less alive. It is advisory: a store that fails is no
    reason to stop.

    Parameters
    ----------
    store : Store
        The output.
    status : LiveStatus
        What is known at first.
    """

    def __init__(self, store: Store, status: LiveStatus) -> None:
        self._store = store
        self._status = status
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="life-sign", daemon=True)

    def __enter__(self) -> LifeSign:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(timeout=2 * WRITE_EVERY_S)  # the grace of a signal is short

    def update(self, status: LiveStatus) -> None:
        """Have this written from now on."""
        self._status = status

    def end(self, status: LiveStatus) -> None:
        """Write the last one."""
        self.__exit__()
        self._status = status
        self._write()

    def _repeat(self) -> None:
        while True:
            self._write()
            if self._ended.wait(WRITE_EVERY_S):
                return

    def _write(self) -> None:
        status = replace(self._status, written_s=time.time())
        with contextlib.suppress(StoreError):
            self._store.write_bytes(STATUS_KEY, status.to_json())


def read_live(store: Store) -> LiveStatus | None:
    """Return what the driver last said about itself, if anything."""
    try:
        return LiveStatus.from_json(store.read_bytes(STATUS_KEY))
    except FileNotFoundError:
        return None


def read_log(store: Store) -> LogState:
    """Return what the log of an existing output says.

    Parameters
    ----------
    store : Store
        The output.

    Returns
    -------
    LogState
        Its state, with a plan.

    Raises
    ------
    ConfigError
        There is no run in this place.
    """
    state = read_state(store)
    if state.plan is None:
        raise _no_run(store)
    return state


def _no_run(store: Store) -> ConfigError:
    return ConfigError(
        f"there is no run in {store.uri}: check the path, or start one with maskmill run CORPUS "
        f"--out {store.uri}"
    )


def status_lines(
    store: Store,
    state: LogState,
    live: LiveStatus | None,
    now_s: float,
    *,
    max_reasons: int | None = None,
) -> list[str]:
    """Return where a run stands, line by line.

    Parameters
    ----------
    store : Store
        The output.
    state : LogState
        What its log says.
    live : LiveStatus or None
        What its driver last said.
    now_s : float
        Unix time.
    max_reasons : int, optional
        Quarantined videos named; all by default.

    Returns
    -------
    list of str
        Without line ends.
    """
    assert state.plan is not None
    runs = state.runs.values()
    num_videos = int(state.plan.totals.get("num_videos", 0))
    fresh = live is not None and live.is_fresh(now_s) and live.epoch == state.epoch
    lines = [f"run {state.plan.run_id} in {store.uri}: {_condition(state, fresh)}", ""]
    settled = state.num_committed + state.num_quarantined
    # The newest plan may be of a part, with --limit for instance, while the log knows of more.
    is_part = settled > num_videos

    def counted(count: int) -> str:
        whole = "" if is_part else f" of {num_videos:,}"
        share = "" if is_part or not num_videos else f" ({100 * count / num_videos:.0f} %)"
        return f"{count:,}{whole} videos{share}"

    lines.append(f"  committed    {counted(state.num_committed)}")
    if state.num_quarantined:
        lines.append(f"  quarantined  {counted(state.num_quarantined)}")
    num_frames, num_masks = (sum(int(run[n]) for run in runs) for n in ("num_frames", "num_masks"))
    lines.append(f"  tracked      {num_frames:,} frames, {num_masks:,} masks")
    lines.append(f"  started {len(state.runs)} time{'s' if len(state.runs) != 1 else ''}")
    if live is not None and fresh:
        lines += _live_lines(live)
    if state.quarantined:
        lines += ["", "in quarantine:"]
        for entry in list(state.quarantined.values())[:max_reasons]:
            lines.append(f"  {entry.name or entry.uri} ({entry.error_class}): {entry.message}")
        if max_reasons is not None and len(state.quarantined) > max_reasons:
            lines.append(f"  and {len(state.quarantined) - max_reasons:,} more")
    return lines


def _condition(state: LogState, fresh: bool) -> str:
    if state.closed:
        return state.outcome.value if state.outcome is not None else "closed"
    if fresh:
        return f"running, driver {state.owner}"
    return (
        f"not closed: driver {state.owner} is starting, out of reach or dead; the same command "
        f"resumes it"
    )


def _live_lines(live: LiveStatus) -> list[str]:
    elapsed_s = max(live.written_s - live.started_s, 0.001)
    lines = [
        f"  under way    {live.num_frames:,} frames in {format_duration(elapsed_s)}, "
        f"{live.num_frames / elapsed_s:,.1f} frames/s"
    ]
    left = live.num_videos - live.num_skipped - live.num_committed - live.num_quarantined
    if live.num_frames_planned and 0 < live.num_frames < live.num_frames_planned:
        rest_s = (live.num_frames_planned - live.num_frames) * elapsed_s / live.num_frames
        lines.append(f"  left         {left:,} videos, about {format_duration(rest_s)}")
    elif left > 0:
        lines.append(f"  left         {left:,} videos")
    if live.workers:
        lines.append("")
    for worker_id, worker in sorted(live.workers.items()):
        lines.append(
            f"  {worker_id:<12} {worker.get('state', ''):<12} {worker.get('video', '')} "
            f"{worker.get('num_steps') or ''}".rstrip()
        )
    return lines


def write_status(store: Store, stream: TextIO | None = None) -> None:
    """Print where the run in an output stands.

    Parameters
    ----------
    store : Store
        The output.
    stream : TextIO, optional
        Standard output by default.

    Raises
    ------
    ConfigError
        There is no run in this place.
    """
    print("\n".join(_lines_now(store, read_state(store))), file=stream or sys.stdout)


def _lines_now(store: Store, state: LogState, *, max_reasons: int | None = None) -> list[str]:
    """Return where the run in an output stands now, its job included."""
    live, now_s = read_live(store), time.time()
    submission = read_submission(store)
    fresh = live is not None and live.is_fresh(now_s) and live.epoch == state.epoch
    if state.plan is None:
        if live is not None and fresh:
            return [f"run {live.run_id} in {store.uri}: driver {live.owner} is planning"]
        if submission is None:
            raise _no_run(store)
        return [
            f"run {submission.run_id} in {store.uri}: submitted, nothing is planned yet",
            "",
            *job_lines(submission, _ask_cluster(submission), resumes=False),
        ]
    lines = status_lines(store, state, live, now_s, max_reasons=max_reasons)
    if submission is not None:
        told = "" if state.closed or fresh else _ask_cluster(submission)
        ended = state.closed and state.outcome is not Outcome.FINISHED
        lines += ["", *job_lines(submission, told, resumes=ended or not (state.closed or fresh))]
    return lines


def job_lines(submission: Submission, told: str, *, resumes: bool) -> list[str]:
    """Return which Ray job a run is, line by line.

    Parameters
    ----------
    submission : Submission
        The newest submission of the run.
    told : str
        What its cluster says about it; empty if it was not asked.
    resumes : bool
        Whether submitting again would go on with what is left.

    Returns
    -------
    list of str
        Without line ends.
    """
    job = submission.job
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(submission.time_s))
    lines = [
        f"  job          {job.job_id} on {job.address}",
        f"  submitted    {when} from {submission.host}, submission {submission.number}",
    ]
    if told:
        lines.append(f"  cluster      {told}")
    if resumes:
        lines.append("  to resume    the same submit command, on this cluster or another")
    return lines


def _ask_cluster(submission: Submission) -> str:
    """Return what the cluster of a submission says about its job, however that ends."""
    from jobs.ray_jobs import JobServer

    job = submission.job
    try:
        server = JobServer(job.address, reach_s=ASK_WITHIN_S)
        report = server.report(job.job_id) if server.session == job.session else None
    except (StoreError, ConfigError) as error:
        return f"gives no answer: {error}"
    if server.session != job.session:
        return "is gone: another one answers at this address"
    if report is None:
        return "does not know the job"
    state = report.state.lower()
    if not report.state.has_ended():
        return f"the job is {state}"
    return f"the job has ended ({state}): maskmill logs tells why"


def watch_status(store: Store) -> None:
    """Show the status again and again, until the run is closed or Ctrl-C.

    Parameters
    ----------
    store : Store
        The output.

    Raises
    ------
    ConfigError
        There is no run in this place.
    """
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()
    with Live(console=console, auto_refresh=False) as display:
        while True:
            state = read_state(store)
            lines = _lines_now(store, state, max_reasons=MAX_REASONS)
            display.update(Text("\n".join(lines)), refresh=True)
            if state.closed:
                return
            time.sleep(WATCH_EVERY_S)
