"""The state machine of tasks, attempts and workers: decides, and does nothing itself.

Events come in (`worker_ready`, `attempt_failed`, `tick`, ...), actions come out (`Begin`, `Kill`,
`Commit`, ...), and the time is an argument, so every schedule of faults can be replayed in a test.
Pending tasks are arrays (`jobs.backlog`); only a task that was begun and has not ended is an
object, so ten million pending videos cost their order and their lengths, and nothing else.

What fails for good is judged by `jobs.outage`: unless it was the video alone, it is held back until
it is known whether it was the world around it.

Workers may be unlike each other. Where several have nothing to do, the fastest begins the longest
video. One that is clearly slower leaves the longest to the others and begins what it can do in the
time that the fastest would need for the longest one left; and it rests where it would still be at
its video long after the others had finished everything (`_longest_for`, `_is_better_left`).

Workers come and go. One whose node is being taken away begins nothing more; what it runs goes on
where it can end in time, and is cancelled, uncharged, where it cannot. One that has had nothing to
do for a while is released, where the caller allows it.
"""

from __future__ import annotations

import heapq
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from math import inf, isfinite

import numpy as np
from numpy.typing import NDArray

from jobs.backlog import Backlog
from jobs.outage import Failure, OutageWatch, Verdict
from jobs.outlook import Outlook
from workers.errors import (
    ConfigError,
    FailureKind,
    MaskmillError,
    StoreDenied,
    StoreError,
    StoreFull,
)
from workers.messages import Phase


@dataclass(frozen=True, slots=True)
class FaultPolicy:
    """How often what is tried again, and what counts as an outage.

    Attributes
    ----------
    max_charged : int
        Charged failures of all kinds together after which a video is quarantined.
    max_death_retries, max_memory_retries, max_tracker_retries : int
        Retries after a charged worker death, after memory ran out, after a tracker exception.
    stuck_after_s : float
        An attempt without progress for this long is stopped, in seconds.
    backoff_s, backoff_factor, backoff_max_s : float
        First pause before a transient failure is tried again, its growth and its limit.
    outage_after : int
        So many videos in a row that fail alike are an outage: on two or more workers, or on any
        number when it is the store that does not answer.
    max_start_failures : int
        With no worker ready, so many failures to start (beyond one per wanted worker) end the run.
    drain_margin_s : float
        So long before its node goes, a worker's last attempts are cancelled.
    prefetch_within_s : float
        Where lengths are known, a worker prefetches when a video of it ends within this time, in
        seconds: a long video that was prefetched earlier would wait behind another long one.
    """

    max_charged: int = 4
    max_death_retries: int = 2
    max_memory_retries: int = 1
    max_tracker_retries: int = 1
    stuck_after_s: float = 300.0
    backoff_s: float = 2.0
    backoff_factor: float = 4.0
    backoff_max_s: float = 60.0
    outage_after: int = 20
    max_start_failures: int = 3
    drain_margin_s: float = 5.0
    prefetch_within_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Begin:
    """Send an attempt to a worker."""

    worker_id: str
    task: int
    """Index of the task in the plan."""
    attempt_id: str
    number: int
    """1-based count of tries of this task in this run of the driver."""
    small_profile: bool


@dataclass(frozen=True, slots=True)
class Cancel:
    """Ask a worker to give an attempt up."""

    worker_id: str
    attempt_id: str


@dataclass(frozen=True, slots=True)
class Kill:
    """End a worker at once; whatever it still says is ignored."""

    worker_id: str
    reason: str
    stuck: str | None = None
    """The attempt that made no progress, where that is why; the others on it are innocent."""


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Start one more worker; it answers with `worker_ready` or `worker_lost`."""


@dataclass(frozen=True, slots=True)
class ForgoWorker:
    """One of the workers that are starting is not needed: give one up that has no place yet.

    It answers with `worker_lost`, as preempted; where all have a place nothing happens.
    """


@dataclass(frozen=True, slots=True)
class Release:
    """End a worker that runs nothing, in good order; nothing more is heard of it."""

    worker_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Commit:
    """The attempt's results become part of the dataset; said once per task at most."""

    task: int
    attempt_id: str
    number: int


@dataclass(frozen=True, slots=True)
class Quarantine:
    """The task will not be tried again; said once per task at most."""

    task: int
    kind: FailureKind
    message: str
    traceback: str
    attempts: int


@dataclass(frozen=True, slots=True)
class Stop:
    """The run cannot go on; nothing follows."""

    error: MaskmillError


Action = Begin | Cancel | Kill | StartWorker | ForgoWorker | Release | Commit | Quarantine | Stop


@dataclass(frozen=True, slots=True)
class TaskCounts:
    """Tasks by where they are; together they are all tasks."""

    pending: int
    running: int
    retrying: int
    withheld: int
    committed: int
    quarantined: int


@dataclass(slots=True, eq=False)
class _Task:
    """A task that was begun and has not ended."""

    task: int
    number: int = 0
    charged: int = 0
    deaths: int = 0
    out_of_memory: int = 0
    tracker: int = 0
    transient: int = 0
    alone: bool = False
    """A suspect, or short of memory: no other attempt may be on its worker."""
    small_profile: bool = False
    prefers: str | None = None
    """Worker on which a transient failure is best tried again."""
    fresher_than: int = 0
    """After a tracker failure: the last worker that was ready by then, in order of readiness."""


@dataclass(slots=True)
class _Attempt:
    attempt_id: str
    entry: _Task
    worker_id: str
    phase: Phase = Phase.DOWNLOADING
    num_steps: int = 0
    num_bytes: int = 0
    progress_at: float = 0.0
    is_cancelled: bool = False


@dataclass(slots=True)
class _Worker:
    worker_id: str
    number: int
    """1-based, in the order in which workers became ready."""
    attempts: dict[str, _Attempt] = field(default_factory=dict)
    exclusive: bool = False
    """It runs an attempt that must be alone."""
    reserved: bool = False
    """It runs dry, because a suspect waits for a worker of its own."""
    retiring: str = ""
    """Why it ends what it has and is replaced by a fresh one; empty while it stays."""
    drains_at: float | None = None
    """When its node goes, where that is known to happen; infinity for some time."""
    speed: float | None = None
    """Units of cost per second, where measured."""
    left: float = 0.0
    """Units of cost that its attempts have left."""
    ends_at: float = inf
    """When the first of its attempts ends, as far as lengths and speed tell; see `_look_ahead`."""
    idle_since: float = 0.0

    @property
    def is_leaving(self) -> bool:
        """Whether it begins nothing more."""
        return bool(self.retiring) or self.drains_at is not None


class Scheduler:
    """Decide which worker tracks which video next, and what becomes of every failure.

    Parameters
    ----------
    num_tasks : int
        Tasks are the indices 0 .. num_tasks - 1.
    order : ndarray of int, shape (num_tasks,)
        The tasks, longest first; each exactly once.
    num_workers : int
        Workers wanted; see `resize`.
    policy : FaultPolicy
        The fault policy.
    slots_per_worker : int
        Videos that one worker tracks at the same time.
    prefetch : int
        Further attempts that a worker may have begun, so that it never waits for a download.
    attempt_prefix : str
        Goes before every attempt id; carries the driver's epoch, which makes ids unique over the
        life of the output.
    costs : ndarray of number, shape (num_tasks,), optional
        Length of each task, in the unit in which speeds and steps are told (frames); the order is
        by falling cost. Without, all are alike and no speed matters.
    idle_after_s : float, optional
        A worker that had nothing to do for so long is released when fewer tasks are left than
        there are workers; never without.
    min_workers : int
        So many are kept all the same.
    is_mixed : bool
        Workers of several kinds are to be expected; found out as they come otherwise.

    Notes
    -----
    Times are seconds of any clock that never goes back. Every event returns the actions that
    follow from it, in the order in which they are to be done. An event about an attempt or a
    worker that is no longer known is ignored: a late result of a worker that was declared lost
    changes nothing. Call `tick` after a batch of events and whenever `next_deadline` has passed;
    calling it before the waiting heartbeats are handed in could take a late driver for a stuck
    video.
    """

    def __init__(
        self,
        num_tasks: int,
        order: NDArray[np.integer],
        *,
        num_workers: int,
        policy: FaultPolicy | None = None,
        slots_per_worker: int = 1,
        prefetch: int = 1,
        attempt_prefix: str = "",
        costs: NDArray[np.number] | None = None,
        idle_after_s: float | None = None,
        min_workers: int = 0,
        is_mixed: bool = False,
    ) -> None:
        if order.shape != (num_tasks,):
            raise ValueError(f"order needs one entry per task ({num_tasks}), got {order.shape = }")
        if num_workers < 1 or slots_per_worker < 1 or prefetch < 0:
            raise ValueError(
                "at least one worker with one slot is needed and prefetch is not negative, got "
                f"{num_workers = }, {slots_per_worker = }, {prefetch = }"
            )
        self.num_tasks = num_tasks
        self.policy = policy or FaultPolicy()
        self._backlog = Backlog(order, costs)
        self._knows_costs = costs is not None
        self._entries: dict[int, _Task] = {}
        self._attempts: dict[str, _Attempt] = {}
        self._workers: dict[str, _Worker] = {}
        self._open: dict[str, _Worker] = {}  # those that may have room, so that no event scans all
        self._reserved: list[_Worker] = []
        self._gone: set[str] = set()
        self._retries: deque[_Task] = deque()
        self._want_fresh: deque[_Task] = deque()
        self._suspects: deque[_Task] = deque()
        self._backoff: list[tuple[float, int, _Task]] = []
        self._backoff_count = 0
        self._wanted = num_workers
        self._slots = slots_per_worker
        self._prefetch = prefetch
        self._prefix = attempt_prefix
        self._idle_after_s = idle_after_s
        self._min_workers = min_workers
        self._forgo_not_before = -inf
        self._fastest: float | None = None
        self._fastest_is_known = True
        self._outlook: Outlook | None = None
        self._is_mixed = is_mixed
        self._kinds: set[str] = set()
        self._num_starting = 0
        self._start_failures = 0
        self._start_not_before = float("-inf")
        self._num_ready = 0
        self._num_draining = 0
        self._committed = 0
        self._quarantined = 0
        self._withheld: OutageWatch[_Task] = OutageWatch(self.policy.outage_after)
        self._interrupted = False
        self._stopped = False

    # -- what can be asked ---------------------------------------------------------------------

    @property
    def is_done(self) -> bool:
        """Whether every task has ended, the run was stopped, or an interrupt has run dry."""
        if self._stopped or self._committed + self._quarantined == self.num_tasks:
            return True
        return self._interrupted and not self._attempts

    @property
    def counts(self) -> TaskCounts:
        """Where the tasks are: proof that none is lost."""
        running = len(self._attempts)
        withheld = len(self._withheld)
        return TaskCounts(
            pending=len(self._backlog),
            running=running,
            retrying=len(self._entries) - running - withheld,
            withheld=withheld,
            committed=self._committed,
            quarantined=self._quarantined,
        )

    @property
    def worker_states(self) -> dict[str, int]:
        """How many workers are ``starting``, ``idle``, ``busy`` and ``draining``."""
        staying = [w for w in self._workers.values() if w.drains_at is None]
        busy = sum(bool(worker.attempts) for worker in staying)
        return {
            "starting": self._num_starting,
            "idle": len(staying) - busy,
            "busy": busy,
            "draining": self._num_draining,
        }

    def next_deadline(self) -> float | None:
        """Return the time by which `tick` must be called, or None when nothing is due."""
        if self._stopped:
            return None
        times = [deadline for _, deadline in self._deadlines()]
        if not self._interrupted:
            times += [due for _, due in self._drain_deadlines()]
            times += self._surplus_deadlines()
            if self._backoff:
                times.append(self._backoff[0][0])
            if self._num_missing() > 0 and isfinite(self._start_not_before):
                times.append(self._start_not_before)
        soonest = min(times, default=inf)
        return soonest if soonest < inf else None

    # -- events --------------------------------------------------------------------------------

    def start(self, now: float) -> list[Action]:
        """Begin the run: ask for the first workers."""
        return self._settle([], now)

    def resize(self, num_workers: int, now: float) -> list[Action]:
        """Want another number of workers; with fewer, those that work end what they have."""
        self._wanted = max(1, num_workers)
        return self._settle([], now)

    def set_speed(self, worker_id: str, speed: float | None) -> None:
        """Take note of a worker's measured speed, in units of cost per second."""
        worker = self._workers.get(worker_id)
        if worker is not None and speed != worker.speed:
            if worker.speed == self._fastest or (speed or 0) > (self._fastest or 0):
                self._fastest_is_known = False
            worker.speed = speed
            self._look_ahead(worker)

    def worker_draining(self, worker_id: str, ends_at: float, now: float) -> list[Action]:
        """Take note that a worker's node is going to be taken away.

        The worker gets no new video. What it tracks goes on if it can end in time, as far as
        length and speed tell; everything else on it is cancelled, which is not charged.

        Parameters
        ----------
        worker_id : str
            The worker; one that is not in service is no concern of this.
        ends_at : float
            When the node goes; infinity when nobody said.
        now : float
            The time.

        Returns
        -------
        list of Action
            What follows: `Cancel`, a worker in its place, and its `Release` once it is empty.
        """
        worker = self._workers.get(worker_id)
        if self._stopped or worker is None:
            return []
        self._num_draining += worker.drains_at is None
        worker.drains_at = min(ends_at, inf if worker.drains_at is None else worker.drains_at)
        self._open[worker_id] = worker
        self._fastest_is_known = False
        actions: list[Action] = []
        self._cancel_hopeless(now, actions)
        return self._settle(actions, now)

    def replace_workers(self, reason: str, now: float) -> list[Action]:
        """Have every worker end what it has begun, and a fresh one take its place."""
        if self._stopped:
            return []
        for worker in self._workers.values():
            worker.retiring = worker.retiring or reason
            self._open[worker.worker_id] = worker
        self._fastest_is_known = False
        return self._settle([], now)

    def worker_ready(self, worker_id: str, now: float, kind: str = "") -> list[Action]:
        """Take a worker whose model is loaded into service; `kind` is what it runs on."""
        if self._stopped or worker_id in self._workers or worker_id in self._gone:
            return []
        self._num_starting = max(0, self._num_starting - 1)
        self._start_failures = 0
        self._start_not_before = float("-inf")
        self._num_ready += 1
        worker = _Worker(worker_id, self._num_ready, idle_since=now)
        self._workers[worker_id] = self._open[worker_id] = worker
        self._kinds.add(kind)
        self._is_mixed = self._is_mixed or len(self._kinds) > 1
        return self._settle([], now)

    def worker_lost(
        self,
        worker_id: str,
        cause: FailureKind,
        message: str,
        now: float,
        error: MaskmillError | None = None,
    ) -> list[Action]:
        """Take note that a worker is gone, and with it every attempt it had begun.

        Parameters
        ----------
        worker_id : str
            The worker; one that never became ready counts as a failure to start.
        cause : FailureKind
            ``WORKER_LOST``, ``OUT_OF_MEMORY``, ``PREEMPTED`` or ``OUTAGE``.
        message : str
            One sentence.
        now : float
            The time.
        error : MaskmillError, optional
            What `setup` raised: before any worker was ready, a `ConfigError`, `StoreDenied` or
            `StoreFull` would meet every worker alike and ends the run; later it is the fault of
            one node, and the others go on.

        Returns
        -------
        list of Action
            What follows.
        """
        if self._stopped:
            return []
        if worker_id in self._gone:
            return []
        self._gone.add(worker_id)
        actions: list[Action] = []
        worker = self._workers.get(worker_id)
        if worker is None:
            self._failed_to_start(cause, message, error, now, actions)
            return self._settle(actions, now)
        self._drop_worker(worker)
        if cause is FailureKind.OUTAGE:
            return self._stop(actions, error or StoreError(message))
        if not self._workers:
            self._start_failures = 0  # those so far were beside a worker that could do it
        lost = list(worker.attempts.values())
        died_alone = len(lost) == 1
        for attempt in lost:
            entry = self._drop_attempt(attempt, now)
            if self._interrupted or cause is FailureKind.PREEMPTED:
                self._retry(entry)
            elif died_alone:
                entry.alone = True
                self._charge(entry, Failure(cause, message), worker_id, now, actions)
            else:
                entry.alone = True
                self._retry(entry)
        return self._settle(actions, now)

    def attempt_finished(self, attempt_id: str, now: float) -> list[Action]:
        """Accept an attempt's proposal: the task is done."""
        attempt = self._attempts.get(attempt_id)
        if self._stopped or attempt is None:
            return []
        entry = self._drop_attempt(attempt, now)
        del self._entries[entry.task]
        self._committed += 1
        actions: list[Action] = [Commit(entry.task, attempt_id, entry.number)]
        self._judge(self._withheld.committed(), actions)
        return self._settle(actions, now)

    def attempt_failed(
        self, attempt_id: str, kind: FailureKind, message: str, traceback: str, now: float
    ) -> list[Action]:
        """Judge an attempt's failure by the fault policy."""
        attempt = self._attempts.get(attempt_id)
        if self._stopped or attempt is None:
            return []
        if kind is FailureKind.OUTAGE:
            return self._stop([], StoreError(message))
        worker = self._workers[attempt.worker_id]
        entry = self._drop_attempt(attempt, now)
        actions: list[Action] = []
        if self._interrupted or kind is FailureKind.PREEMPTED:
            self._retry(entry)
        else:
            if kind is FailureKind.TRACKER:
                # An exception in the model may leave its process spoiled (a CUDA context after a
                # device-side assertion, say), so the worker gets nothing more.
                worker.retiring = "its tracker failed, a fresh worker takes over"
                self._fastest_is_known = False
            self._charge(entry, Failure(kind, message, traceback), worker.worker_id, now, actions)
        return self._settle(actions, now)

    def progress(
        self, attempt_id: str, phase: Phase, num_steps: int, now: float, num_bytes: int = 0
    ) -> list[Action]:
        """Take a heartbeat: another count, or another phase, starts the attempt's deadline anew.

        A smaller count is progress too: what is counted may change, as from frames decoded to
        frames tracked.
        """
        attempt = self._attempts.get(attempt_id)
        if attempt is None:
            return []
        heard = (phase, num_steps, num_bytes)
        if heard != (attempt.phase, attempt.num_steps, attempt.num_bytes):
            attempt.phase, attempt.num_steps, attempt.num_bytes = heard
            attempt.progress_at = now
            if (worker := self._workers.get(attempt.worker_id)) is not None:
                self._look_ahead(worker)
        return []

    def tick(self, now: float) -> list[Action]:
        """Do what is due: stop stuck attempts, bring held tasks back, start missing workers."""
        if self._stopped:
            return []
        actions: list[Action] = []
        for attempt, deadline in list(self._deadlines()):
            if deadline <= now and attempt.attempt_id in self._attempts and not self._stopped:
                self._stop_stuck(attempt, now, actions)
        if not (self._interrupted or self._stopped):
            self._cancel_hopeless(now, actions)
            self._let_go_of_surplus(now, actions)
        return self._settle(actions, now)

    def interrupt(self, now: float) -> list[Action]:
        """Begin nothing more and give up what runs; what still finishes is committed.

        Parameters
        ----------
        now : float
            The time.

        Returns
        -------
        list of Action
            One `Cancel` per running attempt.
        """
        if self._stopped or self._interrupted:
            return []
        self._interrupted = True
        return [Cancel(a.worker_id, a.attempt_id) for a in self._attempts.values()]

    # -- failures ------------------------------------------------------------------------------

    def _charge(
        self, entry: _Task, failure: Failure, worker_id: str, now: float, actions: list[Action]
    ) -> None:
        """Count a failure against its task, then retry or give up."""
        policy = self.policy
        entry.charged += 1
        give_up = entry.charged >= policy.max_charged
        delay_s = 0.0
        match failure.kind:
            case FailureKind.TRANSIENT:
                delay_s = self._backoff_s(entry)
                entry.transient += 1
                entry.prefers = worker_id
            case FailureKind.OUT_OF_MEMORY:
                entry.out_of_memory += 1
                entry.small_profile = entry.alone = True
                give_up |= entry.out_of_memory > policy.max_memory_retries
            case FailureKind.WORKER_LOST:
                entry.deaths += 1
                give_up |= entry.deaths > policy.max_death_retries
            case FailureKind.TRACKER:
                entry.tracker += 1
                entry.fresher_than = self._num_ready
                give_up |= entry.tracker > policy.max_tracker_retries
            case _:
                pass
        if failure.kind is FailureKind.INPUT:
            self._quarantine(entry, failure, actions)
        elif give_up:
            is_only = self._wanted == 1
            verdict = self._withheld.failed(entry, failure, worker_id, is_only_worker=is_only)
            self._judge(verdict, actions)
        else:
            self._retry(entry, now + delay_s if delay_s else None)

    def _backoff_s(self, entry: _Task) -> float:
        """Return the pause before the next try, with jitter that depends on the task alone."""
        policy = self.policy
        pause = policy.backoff_s * policy.backoff_factor**entry.transient
        spread = zlib.crc32(f"{entry.task}/{entry.transient}".encode()) / 2**32  # 0 .. 1
        return min(pause, policy.backoff_max_s) * (0.75 + 0.5 * spread)

    def _retry(self, entry: _Task, due: float | None = None) -> None:
        if due is not None:
            self._backoff_count += 1
            heapq.heappush(self._backoff, (due, self._backoff_count, entry))
        elif entry.alone:
            self._suspects.append(entry)
        elif entry.fresher_than:
            self._want_fresh.append(entry)
        else:
            self._retries.append(entry)

    def _judge(self, verdict: Verdict[_Task], actions: list[Action]) -> None:
        for entry, failure in verdict.let_out:
            self._quarantine(entry, failure, actions)
        if verdict.outage is not None:
            self._stop(actions, verdict.outage)

    def _quarantine(self, entry: _Task, failure: Failure, actions: list[Action]) -> None:
        del self._entries[entry.task]
        self._quarantined += 1
        actions.append(
            Quarantine(entry.task, failure.kind, failure.message, failure.traceback, entry.number)
        )

    def _stop_stuck(self, attempt: _Attempt, now: float, actions: list[Action]) -> None:
        worker = self._workers[attempt.worker_id]
        reason = (
            f"no progress for {self.policy.stuck_after_s:g} s while {attempt.phase.value}, so the "
            "worker was stopped; if the video is that slow, raise --stuck-after"
        )
        self._kill(worker, reason, actions, stuck=attempt.attempt_id)
        for other in list(worker.attempts.values()):
            entry = self._drop_attempt(other, now)
            is_charged = not self._interrupted and worker.drains_at is None
            if other is attempt and is_charged:
                failure = Failure(FailureKind.STUCK, reason)
                self._charge(entry, failure, worker.worker_id, now, actions)
            else:
                self._retry(entry)

    def _deadlines(self) -> Iterator[tuple[_Attempt, float]]:
        """Yield the attempts whose deadline runs, each with its time.

        An attempt that waits for its turn has none, but for the first of a worker on which all
        wait: nobody would ever end that.
        """
        patience_s = self.policy.stuck_after_s
        for worker in self._workers.values():
            any_active = False
            for attempt in worker.attempts.values():
                if attempt.phase is not Phase.WAITING:
                    any_active = True
                    yield attempt, attempt.progress_at + patience_s
            if worker.attempts and not any_active:
                latest = max(a.progress_at for a in worker.attempts.values())
                yield next(iter(worker.attempts.values())), latest + patience_s

    # -- workers -------------------------------------------------------------------------------

    def _failed_to_start(
        self,
        cause: FailureKind,
        message: str,
        error: MaskmillError | None,
        now: float,
        actions: list[Action],
    ) -> None:
        self._num_starting = max(0, self._num_starting - 1)
        if cause is FailureKind.PREEMPTED:
            self._start_not_before = now
            return
        is_fatal = cause is FailureKind.OUTAGE or isinstance(error, _FATAL_AT_START)
        if is_fatal and not self._num_ready:
            self._stop(actions, error or StoreError(message))
            return
        self._start_failures += 1
        limit = self.policy.max_start_failures + self._wanted - 1
        exhausted = self._start_failures >= limit
        if exhausted and not self._workers and not self._num_starting:
            self._stop(
                actions,
                error
                or StoreError(
                    f"no worker could be started, {self._start_failures} tries failed, the last "
                    f"one so: {message}"
                ),
            )
            return
        if exhausted and not self._workers:
            self._start_not_before = float("inf")  # those still under way decide
        else:
            self._start_not_before = now + min(2.0 ** (self._start_failures - 1), 60.0)

    def _kill(
        self, worker: _Worker, reason: str, actions: list[Action], *, stuck: str | None = None
    ) -> None:
        actions.append(Kill(worker.worker_id, reason, stuck))
        self._gone.add(worker.worker_id)
        self._drop_worker(worker)

    def _drop_worker(self, worker: _Worker) -> None:
        del self._workers[worker.worker_id]
        self._open.pop(worker.worker_id, None)
        self._num_draining -= worker.drains_at is not None
        self._fastest_is_known = False

    def _drop_attempt(self, attempt: _Attempt, now: float) -> _Task:
        del self._attempts[attempt.attempt_id]
        worker = self._workers.get(attempt.worker_id)
        if worker is not None:
            del worker.attempts[attempt.attempt_id]
            worker.exclusive = False
            worker.idle_since = now
            self._open[worker.worker_id] = worker
            self._look_ahead(worker)
        return attempt.entry

    def _num_missing(self) -> int:
        """Return how many workers are wanted beyond those that are there or on their way."""
        staying = len(self._workers) - self._num_draining
        return self._num_useful() - staying - self._num_starting

    def _num_useful(self) -> int:
        """Return how many workers could have something to do, and are wanted."""
        # Withheld tasks never run again, so they are no reason for a worker.
        unfinished = self.num_tasks - self._committed - self._quarantined - len(self._withheld)
        return min(self._wanted, unfinished)

    # -- nodes that go, workers without work -----------------------------------------------------

    def _drain_deadlines(self) -> Iterator[tuple[_Attempt, float]]:
        """Yield the attempts on draining workers that are not cancelled, and when they must be."""
        for worker in self._workers.values():
            if worker.drains_at is None:
                continue
            last_s = worker.drains_at - self.policy.drain_margin_s
            for attempt in worker.attempts.values():
                if not attempt.is_cancelled:
                    yield attempt, (last_s if self._may_end_by(attempt, worker, last_s) else -inf)

    def _may_end_by(self, attempt: _Attempt, worker: _Worker, time_s: float) -> bool:
        """Whether an attempt may end in time; what is not tracked yet is better begun elsewhere."""
        if attempt.phase is Phase.FINISHING:
            return True
        if attempt.phase is not Phase.TRACKING:
            return False
        if not self._knows_costs or not worker.speed:
            return True  # it may, and the worker has nothing else to do
        return attempt.progress_at + self._left_of(attempt) / worker.speed <= time_s

    def _left_of(self, attempt: _Attempt) -> float:
        """Return what is left of an attempt, in units of cost."""
        is_counting = attempt.phase in (Phase.TRACKING, Phase.FINISHING)
        done = attempt.num_steps if is_counting and self._knows_costs else 0
        return max(0.0, self._backlog.cost(attempt.entry.task) - done)

    def _cancel_hopeless(self, now: float, actions: list[Action]) -> None:
        for attempt, due in list(self._drain_deadlines()):
            if due <= now:
                attempt.is_cancelled = True
                actions.append(Cancel(attempt.worker_id, attempt.attempt_id))

    def _num_surplus(self) -> int:
        if self._idle_after_s is None:
            return 0
        staying = len(self._workers) - self._num_draining
        return staying + self._num_starting - max(self._min_workers, self._num_useful())

    def _surplus_deadlines(self) -> list[float]:
        """Return when workers that are too many are next let go."""
        if self._idle_after_s is None or self._num_surplus() <= 0:
            return []
        if self._num_starting:
            return [self._forgo_not_before]
        idle = [w.idle_since for w in self._workers.values() if not (w.attempts or w.is_leaving)]
        return [min(idle) + self._idle_after_s] if idle else []

    def _let_go_of_surplus(self, now: float, actions: list[Action]) -> None:
        """Give up workers that the tail does not need: those on their way, then slow idle ones."""
        surplus = self._num_surplus()
        if self._idle_after_s is None or surplus <= 0:
            return
        if self._num_starting:
            if now >= self._forgo_not_before:
                self._forgo_not_before = now + self._idle_after_s
                actions += [ForgoWorker()] * min(surplus, self._num_starting)
            return
        idle = [
            worker
            for worker in self._workers.values()
            if not (worker.attempts or worker.is_leaving)
            and now >= worker.idle_since + self._idle_after_s
        ]
        idle.sort(key=lambda worker: worker.speed or inf)
        for worker in idle[:surplus]:
            self._release_worker(worker, "no video was left for it", actions)

    def _release_worker(self, worker: _Worker, reason: str, actions: list[Action]) -> None:
        actions.append(Release(worker.worker_id, reason))
        self._gone.add(worker.worker_id)
        self._drop_worker(worker)

    # -- the next actions ----------------------------------------------------------------------

    def _settle(self, actions: list[Action], now: float) -> list[Action]:
        """Complete an event's actions: end, replace and fill workers."""
        if self._stopped:
            return actions
        self._outlook = None
        if len(self._withheld) == len(self._entries) and not len(self._backlog):
            self._judge(self._withheld.ended(), actions)
        if self._interrupted or self._stopped:
            return actions
        for worker in [w for w in self._open.values() if not w.attempts and w.is_leaving]:
            if worker.drains_at is not None:
                self._release_worker(worker, "its node is being taken away", actions)
            else:
                self._kill(worker, worker.retiring, actions)
        if now >= self._start_not_before:
            for _ in range(self._num_missing()):
                self._num_starting += 1
                actions.append(StartWorker())
        while self._backoff and self._backoff[0][0] <= now:
            entry = heapq.heappop(self._backoff)[2]
            self._retry(entry)
        self._begin_suspects(now, actions)
        self._begin_others(now, actions)
        return actions

    def _begin_suspects(self, now: float, actions: list[Action]) -> None:
        """Give each suspect an empty worker; where none is, let the emptiest run dry."""
        for worker in self._reserved:
            worker.reserved = False
            if worker.worker_id in self._workers:
                self._open[worker.worker_id] = worker
        self._reserved.clear()
        if not self._suspects:
            return
        able = [w for w in self._workers.values() if not (w.is_leaving or w.exclusive)]
        for worker in heapq.nsmallest(len(self._suspects), able, key=lambda w: len(w.attempts)):
            if worker.attempts:
                worker.reserved = True
                self._reserved.append(worker)
                self._open.pop(worker.worker_id, None)
            else:
                worker.exclusive = True
                self._begin(worker, self._suspects.popleft(), now, actions)

    def _begin_others(self, now: float, actions: list[Action]) -> None:
        """Fill tracking slots, the emptiest worker first; then prefetch while plenty is left."""
        self._begin_on_fresh(now, actions)
        for entry in list(islice(self._retries, _PREFERENCE_DEPTH)):
            preferred = self._open.get(entry.prefers or "")
            if preferred is not None and self._room(preferred) > 0:
                self._retries.remove(entry)
                self._begin(preferred, entry, now, actions)
        for depth in range(self._slots + self._prefetch):
            is_ahead = depth >= self._slots
            ends_by = now + self.policy.prefetch_within_s if is_ahead else inf
            # Near the end a prefetched video would wait behind a long one while another worker
            # has nothing to do.
            enough = self._wanted * self._slots if is_ahead else 0
            if self._num_waiting() <= enough:
                return
            for worker in self._fastest_first(depth, ends_by):
                if self._num_waiting() <= enough:
                    return
                following = self._next_task(worker)
                if following is not None:
                    self._begin(worker, following, now, actions)

    def _begin_on_fresh(self, now: float, actions: list[Action]) -> None:
        """Give tasks whose tracker failed to workers that came since: their state is clean."""
        while self._want_fresh:
            entry = self._want_fresh[0]  # the first one asks the least
            fresh = [
                w
                for w in self._open.values()
                if w.number > entry.fresher_than and self._room(w) > 0
            ]
            if not fresh:
                return
            worker = min(fresh, key=lambda w: len(w.attempts))
            self._begin(worker, self._want_fresh.popleft(), now, actions)

    def _room(self, worker: _Worker, *, prefetch: bool = False) -> int:
        if worker.exclusive or worker.reserved or worker.is_leaving:
            return 0
        return self._slots + (self._prefetch if prefetch else 0) - len(worker.attempts)

    def _num_waiting(self) -> int:
        """Return how many tasks any worker could begin now."""
        count = len(self._retries) + len(self._backlog)
        if count:
            return count
        # What waits for a fresh worker takes any other, once that has nothing better to do and no
        # fresh one is on its way.
        is_coming = self._num_starting > 0 and not self._start_failures
        return 0 if is_coming else len(self._want_fresh)

    def _next_task(self, worker: _Worker) -> _Task | None:
        """Return what a worker with room begins, or None when it had better rest."""
        if self._retries:
            return self._retries.popleft()
        if not len(self._backlog):
            return self._want_fresh.popleft()
        task = self._backlog.take(self._longest_for(worker))
        if task is None and not self._is_better_left(worker):
            task = self._backlog.take_shortest()
        if task is None:
            return None
        entry = self._entries[task] = _Task(task)
        return entry

    # -- workers that are unlike -----------------------------------------------------------------

    def _top_speed(self) -> float | None:
        """Return the speed of the fastest worker that stays; None while none is known."""
        if not self._fastest_is_known:
            speeds = [w.speed for w in self._workers.values() if w.speed and not w.is_leaving]
            self._fastest = max(speeds, default=None)
            self._fastest_is_known = True
        return self._fastest if self._knows_costs else None

    def _fastest_first(self, depth: int, ends_by: float) -> list[_Worker]:
        """Return the workers with room that run `depth` attempts, the first of which ends in time.

        One that is not measured is no slower than the others.
        """
        workers = [
            worker
            for worker in self._open.values()
            if worker.ends_at <= ends_by
            and len(worker.attempts) == depth
            and self._room(worker, prefetch=True) > 0
        ]
        top = self._top_speed()
        if top is not None and len(workers) > 1:
            workers.sort(key=lambda worker: -(worker.speed or top))
        return workers

    def _look_ahead(self, worker: _Worker) -> None:
        """Estimate anew what a worker has left, after anything that may change it.

        While its speed is unknown no end is in sight: its first video may be the longest of all.
        """
        worker.left, worker.ends_at = 0.0, inf
        for attempt in worker.attempts.values():
            left = self._left_of(attempt)
            worker.left += left
            if worker.speed:
                worker.ends_at = min(worker.ends_at, attempt.progress_at + left / worker.speed)
        if not self._knows_costs:
            worker.ends_at = -inf  # nobody can tell: as soon as may be

    def _longest_for(self, worker: _Worker) -> float:
        """Return the cost of the longest task that a worker should begin now.

        A slow worker takes no longer for its task than the fastest would for the longest one left.
        Among workers of several kinds one that is not measured yet begins with an average task.
        """
        if self._knows_costs and self._is_mixed and not worker.speed:
            return self._backlog.total_cost / len(self._backlog)
        top = self._top_speed()
        if top is None or not worker.speed or worker.speed >= _AS_FAST * top:
            return inf
        return self._backlog.longest * worker.speed / top

    def _is_better_left(self, worker: _Worker) -> bool:
        """Whether the others will have done the shortest task left long before this worker could.

        Only what works counts: while the others do, their news bring this worker back here.
        """
        if worker.attempts:
            return True  # for later: it is not idle
        if self._outlook is None:
            at_work = (
                (other.speed, other.left)
                for other in self._workers.values()
                if other.attempts and other.speed and not other.is_leaving
            )
            self._outlook = Outlook(at_work, self._backlog.shortest, self._backlog.total_cost)
        speed = worker.speed or inf
        return self._backlog.shortest / speed > _LONGER * self._outlook.done_in_s(speed)

    def _begin(self, worker: _Worker, entry: _Task, now: float, actions: list[Action]) -> None:
        entry.number += 1
        entry.prefers = None
        entry.fresher_than = 0
        attempt_id = f"{self._prefix}{entry.task}-{entry.number}"
        attempt = _Attempt(attempt_id, entry, worker.worker_id, progress_at=now)
        self._attempts[attempt_id] = worker.attempts[attempt_id] = attempt
        if self._room(worker, prefetch=True) <= 0:
            self._open.pop(worker.worker_id, None)
        self._look_ahead(worker)
        self._outlook = None
        actions.append(
            Begin(worker.worker_id, entry.task, attempt_id, entry.number, entry.small_profile)
        )

    def _stop(self, actions: list[Action], error: MaskmillError) -> list[Action]:
        self._stopped = True
        actions.append(Stop(error))
        return actions


_AS_FAST = 2 / 3  # of the fastest: speeds differ by what is in the videos, too
_LONGER = 1.2  # so much later than the others is too late; lengths and speeds are estimates
_FATAL_AT_START = (ConfigError, StoreDenied, StoreFull)  # every worker would meet the same
_PREFERENCE_DEPTH = 64  # retries looked through for one that prefers a worker with room
