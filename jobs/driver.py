"""The one loop: events of the pool in, decisions of the scheduler out, records into the log.

The loop owns no policy. The scheduler decides what is tried again, the commit log decides what
counts, the publisher decides what is visible; the driver carries their words between them and the
pool, and may die at any line: whatever it had not appended to the log is simply work left over.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.background import Background
from jobs.commit_log import CommitLog, check_video_row, read_state
from jobs.config import RunConfig, fingerprint
from jobs.ledger import Ledger
from jobs.limits import Limits, parse_deadline
from jobs.metrics import RunMetrics, ray_sink
from jobs.notify import Notifier, notify_url
from jobs.outbox import Outbox
from jobs.planner import Inputs, make_plan, read_inputs
from jobs.probe import ProbeCache
from jobs.progress import Counts, Pace, PlanTotals, Reporter, WorkerState
from jobs.prompts import PromptSource
from jobs.publication import Publisher
from jobs.records import Outcome, Quarantined, RunPlan, TaskState, VideoCommit
from jobs.scheduler import (
    Action,
    Begin,
    Cancel,
    Commit,
    FaultPolicy,
    ForgoWorker,
    Kill,
    Quarantine,
    Release,
    Scheduler,
    StartWorker,
    Stop,
)
from jobs.shipping import installed_version
from jobs.speeds import Speeds
from jobs.startup import (
    owner_name,
    prove_store,
    refuse_live,
    reproduce_command,
    stop_signals,
    weights_sha256,
    with_labels,
    with_settled_window,
)
from jobs.status import LifeSign, LiveStatus
from jobs.submitted import own_submission
from jobs.under_way import Attempts, UnderWay
from jobs.workforce import (
    AttemptDone,
    AttemptError,
    Event,
    Heartbeat,
    Pool,
    PoolNotice,
    WorkerDown,
    WorkerDraining,
    WorkerUp,
)
from workers.errors import ConfigError, FailureKind, InputError, MaskmillError, StoreError
from workers.logs import RunLog, log_context, process_name, redact
from workers.messages import (
    Attempt,
    Phase,
    Proposal,
    TaskFailed,
    WorkerReady,
    WorkerSpec,
)
from workers.storage import Store, open_store

STATUS_EVERY_S = 1.0
"""How often the content of `_status.json` is made anew."""
PUBLISH_AFTER_VIDEOS = 256
"""Unpublished commits that are worth a segment while the run goes on."""
PUBLISH_AFTER_S = 300.0
"""Commits become visible at the latest after this long."""
QUICK_BYTES = 64 * 2**20
"""An interrupted run still shows its last commits if their parts are no larger than this."""
INTERRUPT_WITHIN_S = 10.0
"""An interrupted run waits this long for its attempts to end: notices of spot nodes are short."""
PROBE_AFTER_S = 2.0
"""Headers are read from here on: before, the workers' start needs the cores."""
METRICS_EVERY_S = 1.0
"""How often levels (queue, workers, speed) are told to the exporter."""
POLL_S = 0.2
"""The loop wakes at least this often, to draw progress and to see a signal."""

DTYPE_KEY = "dtype"
"""Beside the versions of packages in the plan: the number format of the network."""

_log = logging.getLogger(__name__)

PoolFactory = Callable[[RunConfig, WorkerSpec], Pool]


@dataclass(frozen=True, slots=True)
class RunSummary:
    """How a run ended.

    Attributes
    ----------
    exit_code : int
        0 all committed, 1 some quarantined, 130 interrupted.
    run_id, out_uri : str
        Which run, where.
    num_committed, num_quarantined, num_skipped : int
        Videos committed or quarantined now, and videos that were settled before.
    num_frames, num_masks : int
        Frames tracked and masks written now.
    wall_s : float
        Seconds from the first worker's start to the last commit.
    stage_seconds : dict of str to float
        Busy seconds per stage, summed over videos.
    quarantined : tuple of (name, kind, message)
        Every video of the corpus that is in quarantine now.
    interrupted : bool
        A signal, the deadline or the budget ended the run.
    stopped_by : str
        Which of the latter, in a sentence; empty for a signal.
    num_unfinished : int
        Videos that an interrupted run has left over.
    warnings : tuple of str
        What did not stop the run but should be known.
    """

    exit_code: int
    run_id: str
    out_uri: str
    num_committed: int
    num_quarantined: int
    num_skipped: int
    num_frames: int
    num_masks: int
    wall_s: float
    stage_seconds: dict[str, float]
    quarantined: tuple[tuple[str, str, str], ...]
    interrupted: bool = False
    stopped_by: str = ""
    num_unfinished: int = 0
    warnings: tuple[str, ...] = ()


def run(
    config: RunConfig,
    *,
    reporter: Reporter,
    pool_factory: PoolFactory | None = None,
    retry: bool = False,
    retry_kinds: frozenset[FailureKind] | None = None,
    out: Store | None = None,
) -> RunSummary:
    """Track what is left of a corpus and commit it.

    Parameters
    ----------
    config : RunConfig
        The run.
    reporter : Reporter
        What people see.
    pool_factory : callable, optional
        Makes the worker pool; Ray by default.
    retry : bool
        Take quarantined videos up again.
    retry_kinds : frozenset of FailureKind, optional
        Only those that were quarantined for one of these reasons.
    out : Store, optional
        The output, when the caller has opened it already.

    Returns
    -------
    RunSummary
        Exit code and totals.

    Raises
    ------
    ConfigError
        Wrong configuration, corpus, prompts or weights, or the output holds another configuration.
    StoreError
        The output or the cluster cannot be used, or another driver took over.
    """
    notifier = Notifier(
        notify_url(config.notify.url),
        config.notify.above_rate,
        lambda text: reporter.on_message("warning", text),
    )
    try:
        summary = _drive(
            config,
            reporter,
            notifier,
            pool_factory=pool_factory or _ray_pool,
            retry=retry,
            retry_kinds=retry_kinds,
            out=out,
        )
    except Exception as error:
        sentence = redact(" ".join(str(error).split())) or type(error).__name__
        notifier.send("failed", f"maskmill run failed: {sentence}", {"out_uri": config.out.uri})
        notifier.flush()
        raise
    notifier.send(*_message(summary))
    notifier.flush()
    return summary


def _message(summary: RunSummary) -> tuple[str, str, dict[str, Any]]:
    """Return what a webhook hears of a run that has ended."""
    event = "stopped" if summary.interrupted else "finished"
    why = f", because {summary.stopped_by}" if summary.stopped_by else ""
    text = (
        f"maskmill run {summary.run_id} {event}{why}: {summary.num_committed} videos committed, "
        f"{len(summary.quarantined)} in quarantine, {summary.num_unfinished} left"
    )
    facts = {
        name: getattr(summary, name)
        for name in ("run_id", "out_uri", "exit_code", "num_committed", "num_skipped")
    }
    facts |= {
        "num_quarantined": len(summary.quarantined),
        "num_unfinished": summary.num_unfinished,
        "num_frames": summary.num_frames,
        "wall_s": round(summary.wall_s, 3),
    }
    return event, text, facts


def _drive(
    config: RunConfig,
    reporter: Reporter,
    notifier: Notifier,
    *,
    pool_factory: PoolFactory,
    retry: bool,
    retry_kinds: frozenset[FailureKind] | None,
    out: Store | None,
) -> RunSummary:
    """Check everything, take the fence, and execute the run."""
    limits = _limits(config)
    config = with_settled_window(config)
    store = out or open_store(config.out.uri, config.out.store.options())
    settings = config.mask_settings(
        tracker_sha256=weights_sha256(config, config.tracker.checkpoint),
        detector_sha256=weights_sha256(
            config, config.prompts.detector.checkpoint if config.prompts.detector else None
        ),
    )
    # Everything that can be wrong with the command is found before the fence is taken: a mistyped
    # path must not throw out a driver that is at work.
    read_state(store).check_settings(settings)
    inputs = read_inputs(config)
    prove_store(store, single_driver=config.out.single_driver)
    job, run_id = own_submission(store, installed_version())
    if config.out.if_running == "refuse":
        refuse_live(store)
    with stop_signals() as stopped:
        log = CommitLog.acquire(store, owner_name(), job=job)
        execution = _Run(
            config, settings, log, inputs, reporter, notifier, pool_factory, stopped, limits, run_id
        )
        with execution.life_sign, execution.run_log, log_context(run_id=execution.run_id):
            try:
                return execution.execute(retry=retry, retry_kinds=retry_kinds)
            except Exception as error:
                execution.give_up(error)
                raise


class _Run:
    """One execution: the state of the loop, and one method per thing that can happen."""

    def __init__(
        self,
        config: RunConfig,
        settings: Mapping[str, Any],
        log: CommitLog,
        inputs: Inputs,
        reporter: Reporter,
        notifier: Notifier,
        pool_factory: PoolFactory,
        stopped: threading.Event,
        limits: Limits,
        run_id: str | None = None,
    ) -> None:
        self.config = config
        self.settings = settings
        self.log = log
        self.store = log.store
        self.inputs = inputs
        self.reporter = reporter
        self.notifier = notifier
        self.pool_factory = pool_factory
        self.stopped = stopped
        self.limits = limits
        self.clock = time.monotonic
        self.started_s = time.time()
        self.ledger = Ledger(self.clock)
        self.publisher = Publisher(log, spool_dir=config.pool.spool_dir)
        self.publishing = Background("publish")
        self.fingerprint = fingerprint(settings)
        plan = log.state.plan
        # What masks were computed in so far; unknown before the first worker of an output.
        self.dtype = plan.versions.get(DTYPE_KEY, "") if plan else ""
        self.run_id = (
            plan.run_id if plan else run_id or f"{self.fingerprint[:6]}-{uuid.uuid4().hex[:6]}"
        )
        self.run_log = RunLog(self.run_id, process_name("driver"))
        self.life_sign = LifeSign(
            self.store,
            LiveStatus(
                self.run_id,
                log.owner,
                log.epoch,
                self.started_s,
                self.started_s,
                num_videos=0,
                job=log.state.job.to_json() if log.state.job else None,
            ),
        )
        self.metrics = RunMetrics(self.run_id, config.tracker.name)
        self.speeds = Speeds()
        self.pace = Pace(self.clock)
        self.num_stepped = 0
        self.proposed_s: list[float] = []
        self.gpus: dict[str, int] = {}
        self.outbox = Outbox(log, self.clock, self.changed_worker_rows)
        self.attempts = Attempts()
        self.failures: dict[int, FailureKind] = {}
        self.waiting_since_s: dict[int, float] = {}
        self.category_ids: dict[str, int] = {}
        self.has_plan_record = False
        self.interrupted = False
        self.stopped_by = ""
        self.give_up_at_s = math.inf
        self.num_committed = self.num_quarantined = self.num_retries = 0
        self.num_frames = self.num_masks = self.num_empty = 0
        self.stage_seconds: defaultdict[str, float] = defaultdict(float)
        self.start_s = self.status_s = self.published_s = self.metrics_s = self.clock()

    def execute(self, *, retry: bool, retry_kinds: frozenset[FailureKind] | None) -> RunSummary:
        """Recover, plan, track, publish, close; whatever ends it, what was committed stays."""
        self.publisher.recover()
        self.rejected_before = set(self.publisher.rejected)
        released = self.release(retry_kinds) if retry else None
        probes = ProbeCache(self.store)
        try:
            self.plan = make_plan(self.config, self.inputs, self.log.state, probes, only=released)
            self.announce()
            if len(self.plan.order):
                self.track(probes)
            elif not self.has_plan_record:
                before = self.log.state.plan
                self.write_plan(self.log.state.categories, before.versions if before else {})
        finally:
            probes.close()
        return self.finish()

    # Before the first video.

    def warnings(self) -> tuple[str, ...]:
        """Return what does not stop the run but should be known."""
        found = [*self.inputs.corpus.warnings, *self.inputs.prompts.warnings]
        if self.plan.num_changed:
            found.append(
                f"{self.plan.num_changed} committed videos are tracked again, because their "
                f"source, stride or prompts changed: their older rows are replaced"
            )
        if self.num_empty:
            found.append(
                f"{self.num_empty} of {self.num_committed} committed videos have no object: "
                f"nothing was detected in them, or they were not prompted"
            )
        return tuple(found)

    def release(self, kinds: frozenset[FailureKind] | None) -> NDArray[np.int64]:
        """Take videos of this corpus out of quarantine; return their keys."""
        ours = set(self.inputs.corpus.keys.tolist())
        asked = [
            key
            for key, entry in self.log.state.quarantined.items()
            if kinds is None or entry.error_class in kinds
        ]
        keys = [key for key in asked if key in ours]
        if keys:
            self.log.release(keys)
        if len(keys) < len(asked):
            self.reporter.on_message(
                "warning",
                f"{len(asked) - len(keys)} quarantined videos are not in the corpus that this "
                f"output was last run with, and stay in quarantine: run it with a corpus that "
                f"holds them",
            )
        return np.array(keys, np.int64)

    def announce(self) -> None:
        """Say what there is to do."""
        plan = self.plan
        for text in self.warnings():
            _log.warning("%s", text)
            self.reporter.on_message("warning", text)
        _log.info(
            "%d videos: %d to track, %d unusable, %d settled before",
            plan.num_videos,
            len(plan.order),
            len(plan.invalid),
            plan.num_settled,
        )
        self.reporter.on_plan(
            PlanTotals(
                run_id=self.run_id,
                out_uri=self.config.out.uri,
                num_videos=plan.num_videos,
                num_skipped=plan.num_settled,
                num_frames=plan.num_frames_left or None,
            )
        )

    def quarantine_invalid(self) -> None:
        """Put what is known to be unusable into quarantine, without an attempt."""
        self.metrics.quarantined(len(self.plan.invalid), time.time())
        for task in self.plan.invalid:
            self.num_quarantined += 1
            self.outbox.quarantine(
                Quarantined(
                    video_key=task.video_key,
                    identity=task.identity,
                    uri=task.uri,
                    name=task.name,
                    error_class=FailureKind.INPUT,
                    message=task.message,
                    reproduce=reproduce_command(self.config, task.uri),
                )
            )

    def write_plan(self, classes: Mapping[int, str], versions: Mapping[str, str]) -> None:
        """Put the plan into the log: configuration, categories, frozen corpus and prompts.

        It waits for the first worker, because the class names of a detector, and the versions of
        what makes the masks, are known only where the weights are loaded.
        """
        plan, prompts = self.plan, self.plan.prompts
        if prompts.kind is PromptSource.DETECTOR:
            categories = dict(classes)
        else:
            categories = with_labels(self.log.state.categories, prompts.labels)
        self.category_ids = {name: category_id for category_id, name in categories.items()}
        tables = {"manifest": plan.corpus.table}
        if (frozen := prompts.frozen()) is not None:
            tables["prompts"] = frozen
        self.log.plan(
            RunPlan(
                run_id=self.run_id,
                config=self.config.model_dump(mode="json"),
                settings=self.settings,
                fingerprint=self.fingerprint,
                categories=categories,
                versions={**versions, DTYPE_KEY: self.dtype} if self.dtype else versions,
                totals={
                    "num_videos": len(plan.corpus),
                    "num_left": len(plan.order),
                    "num_invalid": len(plan.invalid),
                    "num_frames_left": plan.num_frames_left,
                },
            ),
            tables,
        )
        self.has_plan_record = True
        self.quarantine_invalid()

    # The loop.

    def track(self, probes: ProbeCache) -> None:
        """Track every video of the plan."""
        num_tasks, pool = len(self.plan.order), self.config.pool
        probes.start(
            self.plan.sources(self.plan.order),
            self.config.corpus.store.options(),
            after_s=PROBE_AFTER_S,
        )
        spec = self.config.worker_spec(
            run_id=self.run_id, config_fingerprint=self.fingerprint, dtype=self.dtype or None
        )
        self.pool = self.pool_factory(self.config, spec)
        self.metrics = RunMetrics(self.run_id, self.config.tracker.name, ray_sink())
        self.metrics.started(time.time())
        try:
            self.start_s = self.clock()
            self.num_workers = self.pool.num_workers
            self.scheduler = Scheduler(
                num_tasks,
                np.arange(num_tasks),  # a task is a place in the plan's order
                num_workers=self.num_workers,
                policy=FaultPolicy(stuck_after_s=pool.stuck_after_s),
                slots_per_worker=pool.videos_per_worker,
                attempt_prefix=f"{self.log.epoch}-",
                costs=self.plan.num_frames[self.plan.order],
                idle_after_s=pool.idle_after_s if pool.workers == "auto" else None,
                min_workers=pool.min_workers or 0,
                is_mixed=self.pool.is_mixed,
            )
            self.perform(self.scheduler.start(self.clock()))
            while not self.scheduler.is_done and self.clock() < self.give_up_at_s:
                self.turn()
            self.outbox.flush()
            self.note_logged()
            self.metrics.queue(self.scheduler.counts)
        except KeyboardInterrupt:
            # Told a second time: no worker gets time to free its model.
            for worker_id in self.ledger.living():
                self.pool.kill(worker_id)
            raise
        finally:
            self.metrics.ended(self.ledger.held_s())
            self.pool.close()
            self.ledger.all_gone("the run ended")

    def turn(self) -> None:
        """One turn of the loop: hear, decide, write down, show."""
        deadline = self.scheduler.next_deadline()
        wait_s = POLL_S if deadline is None else min(POLL_S, max(0.0, deadline - self.clock()))
        for event in self.pool.events(wait_s):
            self.perform(self.hear(event))
        if self.pool.num_workers != self.num_workers:
            self.num_workers = self.pool.num_workers
            self.perform(self.scheduler.resize(self.num_workers, self.clock()))
        self.perform(self.scheduler.tick(self.clock()))
        if not self.interrupted:
            reason = self.limits.exceeded(self.ledger.held_s(), datetime.now(UTC))
            if reason is not None or self.stopped.is_set():
                self.interrupt("" if reason is None else reason)
        self.outbox.flush_if_due()
        self.note_logged()
        self.publish_if_due()
        self.tell_metrics_if_due()
        self.show()

    def interrupt(self, reason: str) -> None:
        """Give up what is under way; `reason` is empty where a signal asked for it."""
        self.interrupted, self.stopped_by = True, reason
        self.give_up_at_s = self.clock() + INTERRUPT_WITHIN_S
        because = f" because {reason}" if reason else ""
        _log.warning("stopping%s", because)
        self.reporter.on_message("warning", f"stopping{because}: what is committed stays")
        self.perform(self.scheduler.interrupt(self.clock()))

    def hear(self, event: Event) -> list[Action]:
        """Pass one event of the pool to the scheduler; return what it decides."""
        now = self.clock()
        actions: list[Action] = []
        match event:
            case WorkerUp(worker_id=worker_id, ready=ready):
                _log.info("%s is ready on %s after %.1f s", worker_id, ready.host, ready.load_s)
                self.check_dtype(ready)
                if not self.has_plan_record:
                    self.write_plan(ready.classes, ready.versions)
                self.ledger.ready(worker_id, ready)
                self.speeds.add(worker_id, ready.gpu)
                self.gpus[worker_id] = ready.gpu_memory_bytes
                self.reporter.on_worker(worker_id, WorkerState.IDLE)
                return self.scheduler.worker_ready(worker_id, now, ready.gpu)
            case WorkerDown(worker_id=worker_id, kind=kind, message=message, error=error):
                _log.warning("%s is lost (%s): %s", worker_id, kind.value, message)
                self.metrics.worker_lost(kind)
                self.lost(worker_id, kind, message)
                self.reporter.on_message("warning", f"worker {worker_id}: {message}")
                return self.scheduler.worker_lost(worker_id, kind, message, now, error)
            case WorkerDraining(worker_id=worker_id, ends_in_s=ends_in_s):
                until = f" in {ends_in_s:.0f} s" if ends_in_s < math.inf else ""
                text = f"worker {worker_id}: its node is taken away{until}, it gets no new video"
                _log.warning("%s", text)
                self.reporter.on_message("warning", text)
                return self.scheduler.worker_draining(worker_id, now + ends_in_s, now)
            case PoolNotice(text=text):
                self.reporter.on_message("warning", text)
            case AttemptDone(attempt_id=attempt_id, proposal=proposal):
                if self.attempts.get(attempt_id) is not None:
                    fault = self.propose(attempt_id, proposal)
                    if fault is not None:
                        self.ended(attempt_id, fault.kind)
                        return self.scheduler.attempt_failed(
                            attempt_id, fault.kind, fault.message, "", now
                        )
                return self.scheduler.attempt_finished(attempt_id, now)
            case AttemptError(attempt_id=attempt_id, failed=failed):
                with self.attempts.about(attempt_id):
                    _log.warning("the attempt failed (%s): %s", failed.kind.value, failed.message)
                self.ended(attempt_id, failed.kind)
                return self.scheduler.attempt_failed(
                    attempt_id, failed.kind, failed.message, failed.traceback, now
                )
            case Heartbeat(worker_id=worker_id, progress=beats):
                for beat in beats:
                    if (under_way := self.attempts.get(beat.attempt_id)) is not None:
                        self.stepped(under_way.heard(beat))
                    actions += self.scheduler.progress(
                        beat.attempt_id, beat.phase, beat.num_steps, now, beat.num_bytes
                    )
                tracked = {b.attempt_id: b.num_steps for b in beats if b.phase is Phase.TRACKING}
                self.speeds.heard(worker_id, tracked, now)
                self.scheduler.set_speed(worker_id, self.speeds.of(worker_id))
                self.show_worker(worker_id)
        return actions

    def check_dtype(self, ready: WorkerReady) -> None:
        """Hold all workers to one number format, since masks differ with it.

        Raises
        ------
        ConfigError
            Devices of this cluster would each choose another one.
        """
        if self.dtype and ready.dtype != self.dtype:
            raise ConfigError(
                f"workers on {ready.host} would compute in {ready.dtype}, others have begun in "
                f"{self.dtype}, and masks would differ: run the same command again, which goes on "
                f"in {self.dtype} everywhere, or choose with --dtype and another output"
            )
        self.dtype = ready.dtype

    def perform(self, actions: Iterable[Action]) -> None:
        """Carry out what the scheduler decided, and what follows from that."""
        queue = deque(actions)
        while queue:
            match queue.popleft():
                case Begin() as begin:
                    queue.extend(self.begin(begin))
                case Commit(attempt_id=attempt_id):
                    queue.extend(self.commit(attempt_id))
                case Quarantine() as quarantine:
                    self.quarantine(quarantine)
                case StartWorker():
                    worker_id = self.pool.start_worker()
                    self.ledger.started(worker_id)
                    self.reporter.on_worker(worker_id, WorkerState.STARTING)
                case ForgoWorker():
                    queue.extend(self.forgo_worker())
                case Release(worker_id=worker_id, reason=reason):
                    _log.info("%s is released: %s", worker_id, reason)
                    self.pool.release(worker_id)
                    self.lost(worker_id, FailureKind.PREEMPTED, reason)
                    self.reporter.on_worker(worker_id, WorkerState.STOPPED)
                case Kill(worker_id=worker_id, reason=reason, stuck=stuck):
                    _log.warning("%s is stopped: %s", worker_id, reason)
                    if stuck is not None:
                        self.ended(stuck, FailureKind.STUCK)
                    self.lost(worker_id, FailureKind.WORKER_LOST, reason)
                    self.pool.kill(worker_id)
                case Cancel(worker_id=worker_id, attempt_id=attempt_id):
                    self.pool.cancel(worker_id, attempt_id)
                case Stop(error=error):
                    raise error

    def forgo_worker(self) -> list[Action]:
        """Give up a worker that has no place yet and is not needed any more."""
        worker_id = self.pool.forgo_worker()
        if worker_id is None:
            return []
        reason = "no video was left for it before it had a place"
        _log.info("%s is given up: %s", worker_id, reason)
        self.lost(worker_id, FailureKind.PREEMPTED, reason)
        self.reporter.on_worker(worker_id, WorkerState.STOPPED)
        kind = FailureKind.PREEMPTED
        return self.scheduler.worker_lost(worker_id, kind, reason, self.clock())

    def begin(self, action: Begin) -> list[Action]:
        """Send an attempt to its worker."""
        row = int(self.plan.order[action.task])
        source = self.plan.corpus.source(row)
        since_s = self.waiting_since_s.pop(action.task, self.start_s)
        queue_s = self.clock() - since_s
        under_way = UnderWay(action.task, action.number, action.worker_id, source, queue_s)
        self.attempts.begin(action.attempt_id, under_way)
        self.num_retries += action.number > 1
        self.metrics.began()
        self.ledger.began(action.worker_id, action.attempt_id)
        with self.attempts.about(action.attempt_id):
            _log.info("try %d begins on %s", action.number, action.worker_id)
        try:
            prompts, prompts_dir = self.plan.prompts.prompts_for(row, self.category_ids)
        except InputError as error:
            self.ended(action.attempt_id, error.kind)
            return self.scheduler.attempt_failed(
                action.attempt_id, error.kind, str(error), "", self.clock()
            )
        self.pool.begin(
            action.worker_id,
            Attempt(
                attempt_id=action.attempt_id,
                epoch=self.log.epoch,
                number=action.number,
                source=source,
                prompts=prompts,
                prompts_dir=prompts_dir,
                small_profile=action.small_profile,
            ),
        )
        return []

    def propose(self, attempt_id: str, proposal: Proposal) -> TaskFailed | None:
        """Keep what a finished attempt wants to commit; return why it cannot be, if so."""
        under_way = self.attempts.get(attempt_id)
        assert under_way is not None
        source = under_way.source
        commit = VideoCommit.from_proposal(
            proposal,
            video_key=source.video_key,
            identity=self.plan.identity(int(self.plan.order[under_way.task])),
            number=under_way.number,
            name=source.name,
            status="committed",
            queue_s=under_way.queue_s,
            error_class=self.failures.get(under_way.task),
        )
        try:
            check_video_row(commit)
        except ValueError as error:
            # Found here it costs one attempt; in the log it would stop every later driver.
            message = f"{source.name}: its row of statistics cannot be stored: {error}"
            return TaskFailed(attempt_id, FailureKind.TRACKER, message)
        under_way.commit = commit
        return None

    def commit(self, attempt_id: str) -> list[Action]:
        """Make a finished attempt part of the dataset."""
        with self.attempts.about(attempt_id):
            _log.info("tracked, to be committed")
        under_way = self.attempts.end(attempt_id)
        assert under_way is not None
        assert under_way.commit is not None, "the scheduler commits only what has finished"
        self.failures.pop(under_way.task, None)
        num_frames = int(under_way.commit.video["frames_tracked"])
        self.stepped(under_way.gained(num_frames))
        self.metrics.committed(under_way.commit, time.time())
        # Before the record that may hold it, so that its worker's row counts it.
        self.ledger.ended(under_way.worker_id, attempt_id, num_frames)
        self.proposed_s.append(self.clock())
        self.outbox.commit(under_way.commit)
        self.note_logged()
        self.num_committed += 1
        self.num_frames += num_frames
        self.num_masks += int(under_way.commit.video["num_masks"])
        self.num_empty += not under_way.commit.video["num_objects"]
        for stats in under_way.commit.stages:
            self.stage_seconds[stats.stage.value] += stats.busy_s
        self.show_worker(under_way.worker_id)
        self.tell_of_quarantine()
        fps = float(under_way.commit.video["fps_end_to_end"])
        self.speeds.finished(under_way.worker_id, num_frames, fps)
        self.scheduler.set_speed(under_way.worker_id, self.speeds.of(under_way.worker_id))
        peak = under_way.commit.video["peak_gpu_memory_bytes"] or 0
        if not self.pool.gpu_measured(peak, self.gpus.get(under_way.worker_id, 0)):
            return []
        reason = "another number of workers shares a GPU from now on"
        self.reporter.on_message("info", f"{peak / 2**30:.1f} GiB of GPU memory measured: {reason}")
        return self.scheduler.replace_workers(reason, self.clock())

    def stepped(self, num_frames: int) -> None:
        """Count frames that trackers have stepped."""
        if num_frames:
            self.num_stepped += num_frames
            self.metrics.stepped(num_frames, time.time())

    def note_logged(self) -> None:
        """Observe how long results waited for the log, once it has them."""
        if self.proposed_s and not self.outbox.num_commits:
            now = self.clock()
            for since_s in self.proposed_s:
                self.metrics.logged(now - since_s)
            self.proposed_s.clear()

    def tell_of_quarantine(self) -> None:
        """Have the notifier look at how many of the settled videos are in quarantine."""
        facts = {"run_id": self.run_id, "out_uri": self.config.out.uri}
        self.notifier.settled(self.num_committed, self.num_quarantined, facts)

    def quarantine(self, action: Quarantine) -> None:
        """Set a video aside with its reason."""
        row = int(self.plan.order[action.task])
        source = self.plan.corpus.source(row)
        with log_context(video=source.name, video_key=source.video_key):
            _log.warning("quarantined (%s): %s", action.kind.value, action.message)
        self.failures.pop(action.task, None)
        self.num_quarantined += 1
        self.metrics.quarantined(1, time.time())
        self.tell_of_quarantine()
        self.outbox.quarantine(
            Quarantined(
                video_key=source.video_key,
                identity=self.plan.identity(row),
                uri=source.uri,
                name=source.name,
                error_class=action.kind,
                message=action.message,
                traceback=action.traceback,
                attempts=action.attempts,
                reproduce=reproduce_command(self.config, source.uri),
            )
        )
        named = source.name if source.name not in action.message else "quarantined"
        self.reporter.on_message("warning", f"{named}: {action.message}")

    def ended(self, attempt_id: str, kind: FailureKind) -> None:
        """Note that an attempt came to nothing."""
        under_way = self.attempts.end(attempt_id)
        if under_way is None:
            return
        self.metrics.failed(kind)
        self.failures[under_way.task] = kind
        self.waiting_since_s[under_way.task] = self.clock()
        self.ledger.ended(under_way.worker_id, attempt_id, None)
        self.show_worker(under_way.worker_id)

    def lost(self, worker_id: str, kind: FailureKind, reason: str) -> None:
        """Note that a worker is gone, and every attempt on it."""
        for attempt_id in self.attempts.ids_on(worker_id):
            self.ended(attempt_id, kind)
        self.speeds.remove(worker_id)
        self.gpus.pop(worker_id, None)
        self.ledger.gone(worker_id, reason)
        self.reporter.on_worker(worker_id, WorkerState.LOST)

    # Beside the loop.

    def publish_if_due(self) -> None:
        """Make commits visible in the background while the run goes on."""
        self.publishing.check()
        waited_s = self.clock() - self.published_s
        unpublished = len(self.log.state.unpublished)
        if not self.publishing.is_idle or not unpublished:
            return
        if unpublished >= PUBLISH_AFTER_VIDEOS or waited_s >= PUBLISH_AFTER_S:
            self.published_s = self.clock()
            self.publishing.start(self.publish)

    def publish(self) -> None:
        """Publish what is committed, and clear staging of what was published long ago."""
        self.publisher.publish()
        self.publisher.discard_published(now_s=time.time())
        self.write_log_lines()

    def worker_rows(self) -> list[dict[str, Any]]:
        """Return the rows of the table `workers` as they are now."""
        return self.ledger.worker_rows(run_id=self.run_id, epoch=self.log.epoch)

    def changed_worker_rows(self) -> list[dict[str, Any]]:
        """Return those of them that say something which the log has not heard."""
        return self.ledger.changed_rows(run_id=self.run_id, epoch=self.log.epoch)

    def show_worker(self, worker_id: str) -> None:
        """Tell what a worker is doing: of several attempts, the one that is furthest."""
        furthest = self.attempts.furthest(worker_id)
        if furthest is None:
            self.reporter.on_worker(worker_id, WorkerState.IDLE)
        elif furthest.progress is not None and furthest.shown is not None:
            num_steps = furthest.progress.num_steps
            self.reporter.on_worker(worker_id, furthest.shown, furthest.source.name, num_steps)

    def counts(self) -> Counts:
        """Return where the run stands, unfinished videos included."""
        num_frames, num_masks = self.attempts.unfinished()
        return Counts(
            num_committed=self.num_committed,
            num_quarantined=self.num_quarantined,
            num_retries=self.num_retries,
            num_frames=self.num_frames + num_frames,
            num_masks=self.num_masks + num_masks,
        )

    def show(self) -> None:
        """Redraw the display, and refresh the advisory status in the output."""
        self.reporter.on_counts(self.counts())
        if self.clock() - self.status_s >= STATUS_EVERY_S:
            self.status_s = self.clock()
            self.life_sign.update(self.status())

    def tell_metrics_if_due(self) -> None:
        """Tell the exporter the levels: queue, workers, speeds."""
        if self.clock() - self.metrics_s < METRICS_EVERY_S:
            return
        self.metrics_s = self.clock()
        self.pace.add(self.num_stepped)
        self.metrics.queue(self.scheduler.counts)
        self.metrics.workers(self.scheduler.worker_states, self.ledger.held_s())
        self.metrics.speed(self.pace.frames_per_s, self.speeds.by_gpu())

    def status(self, *, ended: bool = False) -> LiveStatus:
        """Return what this driver says about itself."""
        return LiveStatus(
            run_id=self.run_id,
            owner=self.log.owner,
            epoch=self.log.epoch,
            written_s=time.time(),
            started_s=self.started_s,
            num_videos=self.plan.num_videos,
            num_skipped=self.plan.num_settled,
            num_frames_planned=self.plan.num_frames_left or None,
            ended=ended,
            workers=self.attempts.status(),
            job=self.log.state.job.to_json() if self.log.state.job else None,
            **asdict(self.counts()),
        )

    def write_log_lines(self) -> None:
        """Put the log lines beside the results; they must never cost a video."""
        with contextlib.suppress(StoreError):
            self.run_log.write_to(self.store)

    # The end.

    def finish(self) -> RunSummary:
        """Make everything visible, summarise and close."""
        wall_s = self.clock() - self.start_s
        if self.interrupted:
            self.stop()
        else:
            self.complete()
        self.life_sign.end(self.status(ended=True))
        self.write_log_lines()
        return RunSummary(
            exit_code=self.exit_code(),
            run_id=self.run_id,
            out_uri=self.config.out.uri,
            num_committed=self.num_committed,
            num_quarantined=self.num_quarantined,
            num_skipped=self.plan.num_settled,
            num_frames=self.num_frames,
            num_masks=self.num_masks,
            wall_s=wall_s,
            stage_seconds=dict(self.stage_seconds),
            quarantined=self.quarantined(),
            interrupted=self.interrupted,
            stopped_by=self.stopped_by,
            num_unfinished=self.plan.num_videos
            - self.plan.num_settled
            - self.num_committed
            - self.num_quarantined,
            warnings=(*self.warnings(), *self.rejections()),
        )

    def complete(self) -> None:
        """Publish, compact and close, while the status stays alive."""
        self.publishing.wait()
        self.outbox.flush()
        self.beside(self.publisher.publish)
        rejected = self.rejections()
        self.num_committed -= len(self.publisher.rejected.keys() - self.rejected_before)
        for text in rejected:
            _log.error("%s", text)
            self.reporter.on_message("error", text)
        self.write_log_lines()
        outcome, code, workers = Outcome.FINISHED, self.exit_code(), self.worker_rows()
        self.beside(lambda: self.publisher.finish(outcome, exit_code=code, workers=workers))

    def stop(self) -> None:
        """Close what was interrupted; the grace of a signal is short, so little is published."""
        self.outbox.flush()
        deadline = self.clock() + INTERRUPT_WITHIN_S
        while not self.publishing.is_idle:
            if self.clock() > deadline:
                return  # still building files: the next start finishes them
            time.sleep(POLL_S)
        self.publishing.check()
        unpublished = [commit for _, commit in self.log.state.unpublished.values()]
        if sum(part.size_bytes for commit in unpublished for part in commit.parts) <= QUICK_BYTES:
            self.publisher.publish()
        self.log.close(Outcome.INTERRUPTED, exit_code=self.exit_code(), workers=self.worker_rows())

    def beside(self, job: Callable[[], object]) -> None:
        """Run a long job beside the display and the status."""
        self.publishing.start(job)
        while not self.publishing.is_idle:
            self.show()
            time.sleep(POLL_S / 4)
        self.publishing.check()

    def exit_code(self) -> int:
        """Return what the command ends with."""
        if self.interrupted and not (self.stopped_by and self.config.limits.exit_code == 0):
            return 130
        return int(bool(self.quarantined() or self.rejections()))

    def rejections(self) -> tuple[str, ...]:
        """Return a sentence per committed video whose files turned out damaged."""
        rows = {key: row for row, key in enumerate(self.plan.corpus.keys.tolist())}
        return tuple(
            f"{self.plan.corpus.source(rows[key]).name if key in rows else key} was committed, but "
            f"its files in staging are damaged ({reason}): run the same command again to track it "
            f"once more"
            for key, reason in self.publisher.rejected.items()
            if self.log.state.task(key)[1] is TaskState.UNKNOWN  # else it was tracked again
        )

    def give_up(self, error: Exception) -> None:
        """Write down what can still be written, after an error that ends the run."""
        _log.error("the run ends: %s", error)
        self.write_log_lines()
        with contextlib.suppress(Exception):
            self.publishing.wait()
        with contextlib.suppress(Exception):
            self.outbox.flush()
            code = error.exit_code if isinstance(error, MaskmillError) else None
            self.log.close(Outcome.FAILED, exit_code=code, workers=self.worker_rows())

    def quarantined(self) -> tuple[tuple[str, str, str], ...]:
        """Return every video of this corpus that is in quarantine: name, kind, reason."""
        ours = set(self.plan.corpus.keys.tolist())
        return tuple(
            (entry.name, entry.error_class.value, entry.message)
            for key, entry in self.log.state.quarantined.items()
            if key in ours
        )


def _limits(config: RunConfig) -> Limits:
    deadline = config.limits.deadline
    now = datetime.now(UTC)
    moment = parse_deadline(deadline, now) if deadline is not None else None
    return Limits(config.limits.budget_hours, moment)


def _ray_pool(config: RunConfig, spec: WorkerSpec) -> Pool:
    from jobs.pool import RayPool

    return RayPool(spec, config.pool)
