"""The scheduler's contract.

* Whatever fails, whenever: no task is lost or doubled; each ends exactly once, committed or
  quarantined, or the run was stopped or interrupted.
* Never two live attempts of one task; never more attempts on a worker than it has room for.
* A suspect, and an attempt short of memory, is alone on its worker for its whole life.
* At most four charged failures of one task; what a companion or a preemption cost is not charged.
* Late news of attempts and workers that were given up changes nothing.
* Each failure kind is treated as the table in ARCHITECTURE.md says.
* An outage stops the run and quarantines nobody; bad videos do not look like one in the end.
* Unusable inputs are quarantined at once, however many, and neither make nor end an outage.
* A store that does not answer stops the run, whatever the number of workers and of videos left;
  one video that it does not give, among others that it does, is quarantined.
* What failed in the tracker goes to a worker that came later, while others have other work.
* A worker that never becomes ready ends the run with one sentence, instead of a loop; once some
  worker was ready, a node that cannot be used ends nothing.
* Workers of unlike speed: the fastest begins the longest video; a slower one the longest that it
  does in the time the fastest needs for the longest; one of several kinds that is not measured an
  average one; none rests but for a faster one that works.
* A long video is not prefetched behind another long one.
* A worker whose node is being taken away begins nothing, is cancelled what cannot end in time, and
  is released once it is empty; it is replaced at once.
* Only a worker that was idle for long, beyond those the tail can use and those to be kept, is
  released for want of work.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

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
from workers.errors import ConfigError, FailureKind, StoreDenied, StoreError
from workers.messages import Phase

CHARGED_KINDS = [
    FailureKind.TRANSIENT,
    FailureKind.INPUT,
    FailureKind.OUT_OF_MEMORY,
    FailureKind.TRACKER,
]
LOSSES = [FailureKind.WORKER_LOST, FailureKind.OUT_OF_MEMORY, FailureKind.PREEMPTED]


def begins(actions: list[Action]) -> list[Begin]:
    return [a for a in actions if isinstance(a, Begin)]


def quarantines(actions: list[Action]) -> list[Quarantine]:
    return [a for a in actions if isinstance(a, Quarantine)]


def stops(actions: list[Action]) -> list[Stop]:
    return [a for a in actions if isinstance(a, Stop)]


def scheduler(
    num_tasks: int,
    *,
    workers: int = 1,
    slots: int = 1,
    prefetch: int = 0,
    policy: FaultPolicy | None = None,
) -> Scheduler:
    return Scheduler(
        num_tasks,
        np.arange(num_tasks),
        num_workers=workers,
        slots_per_worker=slots,
        prefetch=prefetch,
        policy=policy,
    )


def only(actions: list[Action]) -> Begin:
    (begin,) = begins(actions)
    return begin


class AnySchedule(RuleBasedStateMachine):
    """A pool that fails in every way, and a book that checks what the scheduler does about it."""

    @initialize(
        num_tasks=st.integers(1, 40),
        num_workers=st.integers(1, 4),
        slots=st.integers(1, 2),
        prefetch=st.integers(0, 2),
        outage_after=st.sampled_from([3, 20]),
        seed=st.integers(0, 9),
        idle_after_s=st.sampled_from([None, 4.0, 100.0]),
        min_workers=st.integers(0, 2),
        knows_costs=st.booleans(),
    )
    def begin_run(
        self,
        num_tasks: int,
        num_workers: int,
        slots: int,
        prefetch: int,
        outage_after: int,
        seed: int,
        idle_after_s: float | None,
        min_workers: int,
        knows_costs: bool,
    ) -> None:
        self.now = 0.0
        dice = np.random.default_rng(seed)
        self.costs = dice.integers(1, 60, num_tasks).astype(np.float32)
        order = np.argsort(-self.costs) if knows_costs else dice.permutation(num_tasks)
        self.knows_costs = knows_costs
        self.idle_after_s, self.min_workers = idle_after_s, min_workers
        self.room = slots + prefetch
        self.policy = FaultPolicy(outage_after=outage_after)
        self.scheduler = Scheduler(
            num_tasks,
            order,
            num_workers=num_workers,
            policy=self.policy,
            slots_per_worker=slots,
            prefetch=prefetch,
            costs=self.costs if knows_costs else None,
            idle_after_s=idle_after_s,
            min_workers=min_workers,
        )
        self.num_tasks = num_tasks
        self.num_wanted = num_workers
        self.starting: list[str] = []
        self.num_started = 0
        self.workers: dict[str, dict[str, Begin]] = {}
        self.draining: set[str] = set()
        self.retiring: set[str] = set()
        self.speeds: dict[str, float] = {}
        self.kinds: dict[str, str] = {}
        self.idle_since: dict[str, float] = {}
        self.cancelled: set[str] = set()
        self.attempts: dict[str, Begin] = {}
        self.dead_attempts: list[str] = []
        self.dead_workers: list[str] = []
        self.committed: set[int] = set()
        self.quarantined: set[int] = set()
        self.must_be_alone: set[int] = set()
        self.charged: Counter[int] = Counter()
        self.numbers: Counter[int] = Counter()
        self.stopped = False
        self.interrupted = False
        self.do(self.scheduler.start(self.now))

    def do(self, actions: list[Action]) -> None:
        for action in actions:
            assert not self.stopped, "nothing follows a Stop"
            match action:
                case StartWorker():
                    self.num_started += 1
                    self.starting.append(f"w{self.num_started}")
                case Begin(worker_id, task, attempt_id, number, small_profile):
                    assert not self.interrupted
                    assert task not in self.committed | self.quarantined
                    assert task not in {b.task for b in self.attempts.values()}
                    assert attempt_id not in self.dead_attempts
                    assert number == self.numbers[task] + 1
                    self.numbers[task] = number
                    running = self.workers[worker_id]
                    assert len(running) < self.room
                    if task in self.must_be_alone or small_profile:
                        assert not running
                    assert not any(b.task in self.must_be_alone for b in running.values())
                    assert worker_id not in self.draining | self.retiring
                    if number == 1 and self.knows_costs:
                        self.check_choice(worker_id, task)
                    running[attempt_id] = self.attempts[attempt_id] = action
                case Kill(worker_id):
                    for attempt_id in self.workers.pop(worker_id):
                        self.end(attempt_id)
                    self.dead_workers.append(worker_id)
                case Release(worker_id, reason):
                    assert reason
                    assert not self.workers[worker_id]
                    if worker_id not in self.draining:
                        assert self.idle_after_s is not None
                        assert self.now - self.idle_since[worker_id] >= self.idle_after_s
                        assert self.num_staying > max(self.min_workers, self.num_unfinished)
                    del self.workers[worker_id]
                    self.dead_workers.append(worker_id)
                case ForgoWorker():
                    assert self.idle_after_s is not None
                    num_coming = self.num_staying + len(self.starting)
                    assert num_coming > max(self.min_workers, self.num_unfinished)
                    if len(self.starting) > 1:  # a single one has found its place
                        worker_id = self.starting.pop()
                        cause = FailureKind.PREEMPTED
                        self.do(self.scheduler.worker_lost(worker_id, cause, "forgone", self.now))
                case Commit(task, attempt_id):
                    assert task not in self.committed | self.quarantined
                    self.committed.add(task)
                case Quarantine(task, _, message, _, attempts):
                    assert task not in self.committed | self.quarantined
                    assert message
                    assert attempts == self.numbers[task]
                    self.quarantined.add(task)
                case Stop():
                    self.stopped = True
                case Cancel(worker_id, attempt_id):
                    assert worker_id in self.draining, "only an interrupt cancels elsewhere"
                    assert attempt_id in self.workers[worker_id]
                    assert attempt_id not in self.cancelled
                    self.cancelled.add(attempt_id)

    @property
    def num_staying(self) -> int:
        return len(self.workers.keys() - self.draining)

    @property
    def num_unfinished(self) -> int:
        done = len(self.committed) + len(self.quarantined) + self.scheduler.counts.withheld
        return min(self.num_wanted, self.num_tasks - done)

    def check_choice(self, worker_id: str, task: int) -> None:
        pending = [self.costs[t] for t in range(self.num_tasks) if self.numbers[t] == 0]
        pending.append(self.costs[task])
        staying = self.workers.keys() - self.draining - self.retiring
        top = max((self.speeds[w] for w in staying if w in self.speeds), default=None)
        speed = self.speeds.get(worker_id)
        limit = max(pending)
        if speed is None and len(set(self.kinds.values())) > 1:
            limit = sum(pending) / len(pending)
        elif top is not None and speed is not None and speed < 2 / 3 * top:
            limit = limit * speed / top
        assert self.costs[task] == max((c for c in pending if c <= limit), default=min(pending))

    def end(self, attempt_id: str) -> Begin:
        begin = self.attempts.pop(attempt_id)
        self.workers.get(begin.worker_id, {}).pop(attempt_id, None)
        self.idle_since[begin.worker_id] = self.now
        self.dead_attempts.append(attempt_id)
        return begin

    def charge(self, task: int) -> None:
        self.charged[task] += 1
        assert self.charged[task] <= self.policy.max_charged

    @precondition(lambda self: self.starting)
    @rule(data=st.data(), succeeds=st.integers(0, 9), kind=st.sampled_from(["", "", "H200"]))
    def worker_answers(self, data: st.DataObject, succeeds: int, kind: str) -> None:
        worker_id = data.draw(st.sampled_from(self.starting))
        self.starting.remove(worker_id)
        if succeeds:
            self.workers[worker_id] = {}
            self.idle_since[worker_id] = self.now
            self.kinds[worker_id] = kind
            self.do(self.scheduler.worker_ready(worker_id, self.now, kind))
        else:
            cause = FailureKind.WORKER_LOST
            self.do(self.scheduler.worker_lost(worker_id, cause, "setup failed", self.now))

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), cause=st.sampled_from(LOSSES))
    def worker_dies(self, data: st.DataObject, cause: FailureKind) -> None:
        worker_id = data.draw(st.sampled_from(sorted(self.workers)))
        lost = [self.end(a) for a in list(self.workers.pop(worker_id))]
        self.dead_workers.append(worker_id)
        if cause is not FailureKind.PREEMPTED and not (self.interrupted or self.stopped):
            self.must_be_alone.update(b.task for b in lost)
            if len(lost) == 1:
                self.charge(lost[0].task)
        self.do(self.scheduler.worker_lost(worker_id, cause, "worker died", self.now))

    @precondition(lambda self: self.attempts)
    @rule(data=st.data())
    def attempt_finishes(self, data: st.DataObject) -> None:
        attempt_id = data.draw(st.sampled_from(sorted(self.attempts)))
        begin = self.end(attempt_id)
        actions = self.scheduler.attempt_finished(attempt_id, self.now)
        if not self.stopped:
            assert Commit(begin.task, attempt_id, begin.number) in actions
        self.do(actions)

    @precondition(lambda self: self.attempts)
    @rule(
        data=st.data(),
        kind=st.sampled_from([*CHARGED_KINDS, FailureKind.PREEMPTED]),
        message=st.sampled_from(["it is broken", "nothing works here at all"]),
    )
    def attempt_fails(self, data: st.DataObject, kind: FailureKind, message: str) -> None:
        attempt_id = data.draw(st.sampled_from(sorted(self.attempts)))
        begin = self.end(attempt_id)
        if kind is not FailureKind.PREEMPTED and not (self.interrupted or self.stopped):
            self.charge(begin.task)
            if kind is FailureKind.OUT_OF_MEMORY:
                self.must_be_alone.add(begin.task)
            if kind is FailureKind.TRACKER:
                self.retiring.add(begin.worker_id)
        self.do(self.scheduler.attempt_failed(attempt_id, kind, message, "", self.now))

    @precondition(lambda self: self.attempts)
    @rule(data=st.data(), phase=st.sampled_from(list(Phase)), num_steps=st.integers(0, 50))
    def heartbeat(self, data: st.DataObject, phase: Phase, num_steps: int) -> None:
        attempt_id = data.draw(st.sampled_from(sorted(self.attempts)))
        self.do(self.scheduler.progress(attempt_id, phase, num_steps, self.now))

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), speed=st.sampled_from([0.1, 1.0, 1.2, 10.0]))
    def worker_is_measured(self, data: st.DataObject, speed: float) -> None:
        worker_id = data.draw(st.sampled_from(sorted(self.workers)))
        self.speeds[worker_id] = speed
        self.scheduler.set_speed(worker_id, speed)
        self.do(self.scheduler.tick(self.now))

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), seconds=st.sampled_from([0.0, 30.0, 600.0, float("inf")]))
    def node_drains(self, data: st.DataObject, seconds: float) -> None:
        worker_id = data.draw(st.sampled_from(sorted(self.workers)))
        self.draining.add(worker_id)
        self.do(self.scheduler.worker_draining(worker_id, self.now + seconds, self.now))
        if not (self.interrupted or self.stopped):
            assert (worker_id in self.workers) == bool(self.workers.get(worker_id))
            if seconds < self.policy.drain_margin_s:
                assert self.workers.get(worker_id, {}).keys() <= self.cancelled

    @rule(seconds=st.sampled_from([0.5, 5.0, 70.0, 400.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        actions = self.scheduler.tick(self.now)
        self.do(actions)
        deadline = self.scheduler.next_deadline()
        assert deadline is None or deadline > self.now, "tick leaves nothing that is due"

    @rule(data=st.data())
    def news_of_the_dead(self, data: st.DataObject) -> None:
        if self.dead_attempts:
            attempt_id = data.draw(st.sampled_from(self.dead_attempts))
            assert self.scheduler.attempt_finished(attempt_id, self.now) == []
            failed = self.scheduler.attempt_failed(
                attempt_id, FailureKind.INPUT, "late", "", self.now
            )
            assert failed == []
        if self.dead_workers:
            worker_id = data.draw(st.sampled_from(self.dead_workers))
            cause = FailureKind.WORKER_LOST
            assert self.scheduler.worker_lost(worker_id, cause, "late", self.now) == []
            assert self.scheduler.worker_ready(worker_id, self.now) == []

    @precondition(lambda self: not self.interrupted)
    @rule(sure=st.integers(0, 15))
    def interrupt(self, sure: int) -> None:
        if sure or self.stopped:
            return
        cancelled = self.scheduler.interrupt(self.now)
        assert {a.attempt_id for a in cancelled if isinstance(a, Cancel)} == set(self.attempts)
        self.interrupted = True

    @invariant()
    def adds_up(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        counts = self.scheduler.counts
        assert counts.committed == len(self.committed)
        assert counts.quarantined == len(self.quarantined)
        if not self.stopped:
            assert counts.running == len(self.attempts)
        total = counts.pending + counts.running + counts.retrying + counts.withheld
        assert total + counts.committed + counts.quarantined == self.num_tasks
        assert self.num_staying + len(self.starting) <= self.num_wanted or self.stopped

    @invariant()
    def rests_only_for_a_faster_one(self) -> None:
        if not hasattr(self, "scheduler") or self.stopped or self.interrupted:
            return
        if not self.scheduler.counts.pending:
            return
        leaving = self.draining | self.retiring
        busy = [self.speeds.get(w, 0) for w, a in self.workers.items() if a and w not in leaving]
        for worker_id, attempts in self.workers.items():
            if not attempts and worker_id not in leaving:
                assert self.knows_costs
                assert max(busy, default=0) > self.speeds[worker_id]

    def teardown(self) -> None:
        """From wherever it is: once nothing fails any more, every task ends."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(20 * self.num_tasks + 100):
            if self.scheduler.is_done:
                break
            self.now += 61
            for worker_id in list(self.starting):
                self.starting.remove(worker_id)
                self.workers[worker_id] = {}
                self.idle_since[worker_id] = self.now
                self.kinds[worker_id] = ""
                self.do(self.scheduler.worker_ready(worker_id, self.now))
            for attempt_id in list(self.attempts)[:1]:
                self.end(attempt_id)
                self.do(self.scheduler.attempt_finished(attempt_id, self.now))
            for attempt_id, begin in list(self.attempts.items()):
                self.scheduler.progress(attempt_id, Phase.TRACKING, int(self.now), self.now)
                assert begin.task not in self.committed
            self.do(self.scheduler.tick(self.now))
        assert self.scheduler.is_done, "the run hangs"
        if not (self.stopped or self.interrupted):
            assert self.committed | self.quarantined == set(range(self.num_tasks))


AnySchedule.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestAnySchedule = AnySchedule.TestCase


def test_longest_first_and_retries_at_the_front() -> None:
    # Given an order that is not the index order
    order = np.array([2, 0, 1])
    run = Scheduler(3, order, num_workers=1, prefetch=0)
    assert run.start(0) == [StartWorker()]
    first = only(run.worker_ready("w", 0))
    assert first.task == 2
    # When the first one fails transiently and its pause is over before the next ends
    second = only(run.attempt_failed(first.attempt_id, FailureKind.TRANSIENT, "503", "", 0))
    assert second.task == 0
    assert run.tick(10) == []
    # Then it comes before what was never begun
    assert only(run.attempt_finished(second.attempt_id, 10)).task == 2


def test_transient_prefers_its_worker_and_waits_longer_each_time() -> None:
    run = scheduler(2, workers=2)
    run.start(0)
    begin = only(run.worker_ready("a", 0))
    other = only(run.worker_ready("b", 0))
    pauses = []
    for _ in range(3):
        start = run.next_deadline()
        run.attempt_failed(begin.attempt_id, FailureKind.TRANSIENT, "503", "", 0)
        due = min(d for d in [run.next_deadline()] if d is not None)
        assert start is None or due < start
        pauses.append(due)
        assert run.tick(due - 0.01) == []
        begin = only(run.tick(due))
        assert begin.worker_id == "a"
        run.progress(other.attempt_id, Phase.TRACKING, len(pauses), 0)
    assert pauses[0] < pauses[1] < pauses[2]
    # The fourth charged failure is the last.
    actions = run.attempt_failed(begin.attempt_id, FailureKind.TRANSIENT, "503", "", 100)
    assert begins(actions) == []
    assert run.counts.withheld == 1
    assert [q.attempts for q in quarantines(run.attempt_finished(other.attempt_id, 100))] == [4]


def test_any_change_of_a_heartbeat_is_progress() -> None:
    run = scheduler(1, policy=FaultPolicy(stuck_after_s=100))
    run.start(0)
    begin = only(run.worker_ready("w", 0))
    run.progress(begin.attempt_id, Phase.TRACKING, 5000, 10)  # frames decoded up to the range
    run.progress(begin.attempt_id, Phase.TRACKING, 1, 20)  # frames tracked
    assert run.next_deadline() == 120


def test_input_is_quarantined_at_once() -> None:
    run = scheduler(2)
    run.start(0)
    begin = only(run.worker_ready("w", 0))
    actions = run.attempt_failed(begin.attempt_id, FailureKind.INPUT, "no frame", "tb", 1)
    assert quarantines(actions) == [Quarantine(0, FailureKind.INPUT, "no frame", "tb", 1)]
    assert len(begins(actions)) == 1


def test_memory_once_more_alone_with_the_small_profile() -> None:
    run = scheduler(9, slots=2)
    run.start(0)
    first, second = begins(run.worker_ready("w", 0))
    assert not first.small_profile
    # The worker runs dry, because the small profile needs it for itself.
    assert run.attempt_failed(first.attempt_id, FailureKind.OUT_OF_MEMORY, "oom", "", 1) == []
    retry = only(run.attempt_finished(second.attempt_id, 2))
    assert (retry.task, retry.small_profile) == (first.task, True)
    actions = run.attempt_failed(retry.attempt_id, FailureKind.OUT_OF_MEMORY, "oom", "", 3)
    assert len(begins(actions)) == 2
    assert run.counts.withheld == 1


def test_tracker_once_more_on_a_fresh_worker() -> None:
    run = scheduler(1)
    run.start(0)
    begin = only(run.worker_ready("w1", 0))
    actions = run.attempt_failed(begin.attempt_id, FailureKind.TRACKER, "NaN", "tb", 1)
    assert [type(a) for a in actions] == [Kill, StartWorker]
    retry = only(run.worker_ready("w2", 2))
    actions = run.attempt_failed(retry.attempt_id, FailureKind.TRACKER, "NaN", "tb", 3)
    assert quarantines(actions) == [Quarantine(0, FailureKind.TRACKER, "NaN", "tb", 2)]


def test_what_failed_in_the_tracker_waits_for_a_worker_that_came_later() -> None:
    # Given a worker with a spoiled tracker and another that is busy
    run = scheduler(9, workers=2)
    run.start(0)
    failed = only(run.worker_ready("spoiled", 0))
    other = only(run.worker_ready("old", 0))
    assert run.attempt_failed(failed.attempt_id, FailureKind.TRACKER, "NaN", "", 1) == [
        Kill("spoiled", "its tracker failed, a fresh worker takes over"),
        StartWorker(),
    ]
    # When the old one is free, it gets another video; the fresh one gets the failed one.
    assert only(run.attempt_finished(other.attempt_id, 2)).task == 2
    assert only(run.worker_ready("fresh", 3)).task == failed.task


def test_what_failed_in_the_tracker_takes_any_worker_when_no_fresh_one_comes() -> None:
    run = scheduler(2, workers=2)
    run.start(0)
    failed = only(run.worker_ready("spoiled", 0))
    other = only(run.worker_ready("old", 0))
    run.attempt_failed(failed.attempt_id, FailureKind.TRACKER, "NaN", "", 1)
    assert begins(run.attempt_finished(other.attempt_id, 2)) == []  # one is on its way
    actions = run.worker_lost("fresh", FailureKind.WORKER_LOST, "no memory for the model", 3)
    assert (only(actions).task, only(actions).worker_id) == (failed.task, "old")


def test_dead_worker_makes_suspects_and_only_a_death_alone_is_charged() -> None:
    run = scheduler(4, prefetch=1)
    run.start(0)
    bad, innocent = begins(run.worker_ready("w0", 0))
    charged_deaths = 0
    actions = run.worker_lost("w0", FailureKind.WORKER_LOST, "SIGKILL", 1)
    assert actions == [StartWorker()]  # two deaths, none alone
    for n in range(1, 10):
        actions = run.worker_ready(f"w{n}", n)
        begin = only(actions)  # alone, although there is more to do
        if begin.task == innocent.task:
            begin = only(run.attempt_finished(begin.attempt_id, n))
        if begin.task != bad.task:
            break
        charged_deaths += 1
        run.worker_lost(f"w{n}", FailureKind.WORKER_LOST, "SIGKILL", n)
    assert charged_deaths == 3  # the first and two retries
    assert run.counts.withheld == 1
    assert run.counts.committed == 1


def test_preemption_is_never_charged() -> None:
    run = scheduler(1)
    run.start(0)
    for n in range(50):
        begin = only(run.worker_ready(f"w{n}", n))
        assert begin.number == n + 1
        run.worker_lost(f"w{n}", FailureKind.PREEMPTED, "drained", n)
    begin = only(run.worker_ready("last", 99))
    assert run.attempt_finished(begin.attempt_id, 99) == [Commit(0, begin.attempt_id, 51)]


def test_stuck_attempt_costs_its_worker_and_not_its_companion() -> None:
    run = scheduler(3, slots=2, policy=FaultPolicy(stuck_after_s=100))
    run.start(0)
    stuck, companion = begins(run.worker_ready("w1", 0))
    # Progress moves the deadline: more steps or another phase, and nothing else.
    run.progress(stuck.attempt_id, Phase.TRACKING, 5, 50)
    run.progress(companion.attempt_id, Phase.TRACKING, 5, 50)
    run.progress(stuck.attempt_id, Phase.TRACKING, 5, 120)
    run.progress(companion.attempt_id, Phase.TRACKING, 6, 120)
    assert run.next_deadline() == 150
    assert run.tick(149) == []
    actions = run.tick(150)
    assert [type(a) for a in actions] == [Kill, StartWorker]
    assert run.worker_lost("w1", FailureKind.WORKER_LOST, "killed", 151) == []
    retried = begins(run.worker_ready("w2", 160))
    assert [b.task for b in retried] == [stuck.task, companion.task]
    for n in range(3):
        run.progress(retried[1].attempt_id, Phase.TRACKING, 10, 160 + 100 * (n + 1))
        run.tick(160 + 100 * (n + 1))
        retried = begins(run.worker_ready(f"w{n + 3}", 160 + 100 * (n + 1)))
    # Four times stuck is enough; the companion is still unharmed.
    assert run.counts.withheld == 1
    assert companion.task in [b.task for b in retried]


def test_waiting_attempt_has_no_deadline_unless_everybody_waits() -> None:
    run = scheduler(9, prefetch=1, policy=FaultPolicy(stuck_after_s=100))
    run.start(0)
    tracking, waiting = begins(run.worker_ready("w", 0))
    run.progress(waiting.attempt_id, Phase.WAITING, 1, 10)
    run.progress(tracking.attempt_id, Phase.TRACKING, 1, 20)
    assert run.next_deadline() == 120
    run.progress(tracking.attempt_id, Phase.WAITING, 1, 30)
    assert run.next_deadline() == 130


def test_no_prefetch_near_the_end() -> None:
    run = scheduler(4, workers=2, prefetch=1)
    run.start(0)
    assert len(begins(run.worker_ready("a", 0))) == 2  # 3 left, 2 workers to come
    assert len(begins(run.worker_ready("b", 0))) == 1  # 2 left: each worker may want one
    assert run.counts.pending == 1


def test_refused_credentials_stop_the_run() -> None:
    run = scheduler(3)
    run.start(0)
    begin = only(run.worker_ready("w", 0))
    (action,) = run.attempt_failed(begin.attempt_id, FailureKind.OUTAGE, "403 for s3://b", "", 1)
    assert isinstance(action, Stop)
    assert action.error.exit_code == 3
    assert run.is_done
    assert run.tick(1000) == []


ONE_TRY = FaultPolicy(max_charged=1)
"""Every failure is a final one."""


def fail_all(
    run: Scheduler, live: list[Begin], kind: FailureKind = FailureKind.OUT_OF_MEMORY
) -> list[Action]:
    seen: list[Action] = []
    while live:
        begin = live.pop(0)
        text = f"cannot read 'x{begin.task}'"
        actions = run.attempt_failed(begin.attempt_id, kind, text, "", 1)
        live += begins(actions)
        seen += actions
    return seen


def test_alike_failures_on_two_workers_are_an_outage() -> None:
    run = scheduler(100, workers=2, policy=ONE_TRY)
    run.start(0)
    seen = fail_all(run, begins(run.worker_ready("a", 0)) + begins(run.worker_ready("b", 0)))
    (stop,) = stops(seen)
    assert isinstance(stop.error, StoreError)
    assert "cannot read" in str(stop.error)
    assert quarantines(seen) == []
    assert run.counts.withheld == 20


@pytest.mark.parametrize(("num_tasks", "workers"), [(5, 1), (25, 1), (19, 2)])
def test_bad_videos_are_quarantined_in_the_end(num_tasks: int, workers: int) -> None:
    run = scheduler(num_tasks, workers=workers, policy=ONE_TRY)
    run.start(0)
    live = [b for n in range(workers) for b in begins(run.worker_ready(f"w{n}", 0))]
    seen = fail_all(run, live)
    assert sorted(q.task for q in quarantines(seen)) == list(range(num_tasks))
    assert stops(seen) == []
    assert run.is_done


@pytest.mark.parametrize("workers", [1, 2])
def test_unusable_inputs_never_stop_a_run(workers: int) -> None:
    run = scheduler(100, workers=workers)
    run.start(0)
    live = [b for n in range(workers) for b in begins(run.worker_ready(f"w{n}", 0))]
    seen = fail_all(run, live, FailureKind.INPUT)
    assert sorted(q.task for q in quarantines(seen)) == list(range(100))
    assert stops(seen) == []
    assert run.is_done


def test_unusable_inputs_neither_extend_nor_end_a_streak() -> None:
    run = scheduler(100, workers=2, policy=ONE_TRY)
    run.start(0)
    live = begins(run.worker_ready("a", 0)) + begins(run.worker_ready("b", 0))
    kinds = [FailureKind.OUT_OF_MEMORY, FailureKind.OUT_OF_MEMORY, FailureKind.INPUT]
    seen: list[Action] = []
    num_failures = 0
    while not stops(seen):
        kind = kinds[num_failures % 3]
        actions = run.attempt_failed(live.pop(0).attempt_id, kind, "it cannot be", "", 1)
        live += begins(actions)
        seen += actions
        num_failures += 1
    assert num_failures == 20 + 9  # 20 that count, and what came between them
    assert {q.kind for q in quarantines(seen)} == {FailureKind.INPUT}
    assert run.counts.withheld == 20


@pytest.mark.parametrize(("num_tasks", "workers"), [(100, 1), (100, 3), (2, 1), (5, 2)])
def test_a_store_that_does_not_answer_stops_the_run(num_tasks: int, workers: int) -> None:
    # Given a store that is gone, and says so in several ways
    run = scheduler(num_tasks, workers=workers)
    run.start(0)
    live = [b for n in range(workers) for b in begins(run.worker_ready(f"w{n}", 0))]
    says = ["connection refused", "no answer within a minute", "503"]
    seen: list[Action] = []
    now = 0.0
    while not run.is_done:
        if not live:
            due = run.next_deadline()
            assert due is not None
            now = max(now, due)
            live = begins(run.tick(now))
            continue
        begin = live.pop(0)
        actions = run.attempt_failed(
            begin.attempt_id, FailureKind.TRANSIENT, says[begin.task % 3], "", now
        )
        live += begins(actions)
        seen += actions
    # Then nobody is quarantined, whatever the number of workers and videos.
    (stop,) = stops(seen)
    assert stop.error.exit_code == 3
    assert "run the same command again" in str(stop.error)
    assert quarantines(seen) == []
    assert run.counts.withheld == min(num_tasks, 20)


def test_a_video_the_store_does_not_give_is_quarantined_after_a_commit() -> None:
    run = scheduler(4, policy=ONE_TRY)
    run.start(0)
    begin = only(run.worker_ready("w", 0))
    quarantined = []
    for kind in (FailureKind.TRANSIENT, None, FailureKind.OUT_OF_MEMORY, FailureKind.TRANSIENT):
        if kind is None:
            actions = run.attempt_finished(begin.attempt_id, 1)
        else:
            actions = run.attempt_failed(begin.attempt_id, kind, "it fails", "", 1)
        assert stops(actions) == []
        quarantined += quarantines(actions)
        if not run.is_done:
            begin = only(actions)
    assert [q.task for q in quarantined] == [0, 2, 3]


def test_other_failures_do_not_let_out_what_the_store_did_not_answer() -> None:
    run = scheduler(9, policy=ONE_TRY)
    run.start(0)
    begin = only(run.worker_ready("w", 0))
    seen: list[Action] = []
    for n in range(9):
        kind = FailureKind.OUT_OF_MEMORY if n % 3 == 1 else FailureKind.TRANSIENT
        actions = run.attempt_failed(begin.attempt_id, kind, f"{kind} happened", "", 1)
        seen += actions
        if begins(actions):
            begin = only(actions)
    assert {q.kind for q in quarantines(seen)} <= {FailureKind.OUT_OF_MEMORY}
    assert len(stops(seen)) == 1


def test_success_or_an_unlike_failure_ends_the_streak() -> None:
    run = scheduler(100, workers=2, policy=ONE_TRY)
    run.start(0)
    live = begins(run.worker_ready("a", 0)) + begins(run.worker_ready("b", 0))
    num_quarantined = 0
    for n in range(90):
        begin = live.pop(0)
        if n == 45:
            actions = run.attempt_finished(begin.attempt_id, n)
        else:
            text = ["it has no frame", "the codec is unknown to us"][n // 15 % 2]
            kind = FailureKind.OUT_OF_MEMORY
            actions = run.attempt_failed(begin.attempt_id, kind, text, "", n)
        assert stops(actions) == []
        num_quarantined += len(quarantines(actions))
        live += begins(actions)
    assert num_quarantined + run.counts.withheld == 89


@pytest.mark.parametrize("error", [ConfigError("no such tracker"), StoreDenied("403")])
def test_setup_that_every_worker_would_fail_stops_at_once(error: Exception) -> None:
    assert isinstance(error, (ConfigError, StoreDenied))
    run = scheduler(3, workers=2)
    run.start(0)
    actions = run.worker_lost("a", FailureKind.WORKER_LOST, str(error), 0, error)
    assert actions == [Stop(error)]


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (FailureKind.WORKER_LOST, ConfigError("the node has no decoder for it")),
        (FailureKind.OUTAGE, StoreDenied("403")),
    ],
)
def test_a_late_node_that_cannot_be_used_ends_nothing(
    kind: FailureKind, error: ConfigError | StoreDenied
) -> None:
    # Given a worker that does its work
    run = scheduler(9, workers=2)
    run.start(0)
    begin = only(run.worker_ready("good", 0))
    # When another node cannot load the model, again and again
    now = 0.0
    for n in range(20):
        assert stops(run.worker_lost(f"bad{n}", kind, str(error), now, error)) == []
        due = run.next_deadline()
        assert due is not None
        now = max(now, due)
        run.progress(begin.attempt_id, Phase.TRACKING, n, now)
        run.tick(now)
    # Then the good one goes on; without it, some tries later, there is nobody left.
    assert len(begins(run.attempt_finished(begin.attempt_id, now))) == 1
    run.worker_lost("good", FailureKind.PREEMPTED, "drained", now)
    stopped: list[Stop] = []
    num_tries = 0
    while not stopped:
        num_tries += 1
        stopped = stops(run.worker_lost(f"last{num_tries}", kind, str(error), now, error))
        now = max(now, run.next_deadline() or 0)
        run.tick(now)
    assert stopped == [Stop(error)]
    assert 2 < num_tries < 6


def test_workers_that_never_start_end_the_run() -> None:
    run = scheduler(3, workers=2)
    num_started = len(run.start(0))
    now = 0.0
    for n in range(100):
        actions = run.worker_lost(f"w{n}", FailureKind.WORKER_LOST, "segmentation fault", now)
        if stops(actions):
            break
        deadline = run.next_deadline()
        if deadline is not None:
            now = max(now, deadline)
            num_started += len(run.tick(now))
        assert num_started - n < 4
    (stop,) = stops(actions)
    assert stop.error.exit_code == 3
    assert "segmentation fault" in str(stop.error)
    assert n < 10


def test_lost_worker_is_replaced_only_while_work_remains() -> None:
    run = scheduler(1, workers=3)
    assert run.start(0) == [StartWorker()]
    begin = only(run.worker_ready("a", 0))
    run.attempt_finished(begin.attempt_id, 1)
    assert run.worker_lost("a", FailureKind.WORKER_LOST, "gone", 2) == []


def test_withheld_tasks_are_no_reason_for_a_worker() -> None:
    run = scheduler(2, workers=2, policy=ONE_TRY)
    run.start(0)
    bad = only(run.worker_ready("a", 0))
    good = only(run.worker_ready("b", 0))
    run.attempt_failed(bad.attempt_id, FailureKind.OUT_OF_MEMORY, "too large", "", 1)
    assert run.counts.withheld == 1
    assert run.worker_lost("a", FailureKind.WORKER_LOST, "gone", 2) == []
    assert len(quarantines(run.attempt_finished(good.attempt_id, 3))) == 1


def test_preemption_while_starting_is_no_failure_to_start() -> None:
    run = scheduler(3, workers=2)
    run.start(0)
    lost, now = 0, 0.0
    while (deadline := run.next_deadline()) is not None or lost == 0:
        now = now if deadline is None else deadline
        run.tick(now)
        assert stops(run.worker_lost(f"w{lost}", FailureKind.WORKER_LOST, "crash", now)) == []
        lost += 1
    # No more is started: the last one still under way would decide. It is taken away instead.
    actions = run.worker_lost("last", FailureKind.PREEMPTED, "drained", now)
    assert actions == [StartWorker(), StartWorker()]


def test_more_workers_may_come_at_any_time() -> None:
    run = scheduler(9)
    run.start(0)
    run.worker_ready("a", 0)
    assert run.resize(3, 1) == [StartWorker(), StartWorker()]
    assert only(run.worker_ready("b", 2)).worker_id == "b"


def test_interrupt_begins_nothing_and_commits_what_still_ends() -> None:
    run = scheduler(5, workers=2)
    run.start(0)
    first = only(run.worker_ready("a", 0))
    second = only(run.worker_ready("b", 0))
    assert len(run.interrupt(1)) == 2
    assert run.attempt_finished(first.attempt_id, 1) == [Commit(0, first.attempt_id, 1)]
    assert run.attempt_failed(second.attempt_id, FailureKind.INPUT, "cancelled", "", 1) == []
    assert run.is_done
    assert run.counts.quarantined == 0


def test_nothing_to_do_is_done() -> None:
    run = scheduler(0)
    assert run.start(0) == []
    assert run.is_done


def test_long_videos_do_not_queue_up_behind_each_other() -> None:
    costs = np.array([900.0, 800.0, 30.0, 20.0, 10.0, 5.0])
    run = Scheduler(6, np.arange(6), num_workers=2, prefetch=1, costs=costs)
    run.start(0)
    # Given two workers: each gets one of the long videos, and nothing behind it
    first = only(run.worker_ready("a", 0))
    second = only(run.worker_ready("b", 0))
    assert [first.task, second.task] == [0, 1]
    run.set_speed("a", 10.0)
    run.progress(first.attempt_id, Phase.TRACKING, 100, 10)
    assert begins(run.tick(10)) == []  # 80 s are left
    # When the end comes near
    run.progress(first.attempt_id, Phase.TRACKING, 500, 50)
    assert begins(run.tick(59)) == []
    (prefetched,) = begins(run.tick(60))
    # Then the next is fetched meanwhile.
    assert (prefetched.worker_id, prefetched.task) == ("a", 2)


def test_a_draining_worker_keeps_what_it_can_end() -> None:
    costs = np.array([100.0, 90.0, 80.0])
    run = Scheduler(3, np.arange(3), num_workers=2, prefetch=0, costs=costs)
    run.start(0)
    long, other = only(run.worker_ready("a", 0)), only(run.worker_ready("b", 0))
    for begin in (long, other):
        run.set_speed(begin.worker_id, 2.0)
        run.progress(begin.attempt_id, Phase.TRACKING, 20, 10)
    # Given notices of 60 s: 80 frames take 40 s, and 5 s are kept in hand
    assert run.worker_draining("a", 10 + 60, 10) == [StartWorker()]
    # and of 30 s: 70 frames take 35 s
    cancel, start = run.worker_draining("b", 10 + 30, 10)
    assert cancel == Cancel("b", other.attempt_id)
    assert start == StartWorker()
    # When the cancelled one answers, its worker is released and it is pending for another
    actions = run.attempt_failed(other.attempt_id, FailureKind.PREEMPTED, "stopped", "", 11)
    assert [type(a) for a in actions] == [Release]
    assert run.counts.retrying == 1
    # When the first ends, it counts
    done = run.attempt_finished(long.attempt_id, 50)
    assert [type(a) for a in done] == [Commit, Release]
    # Then what was stopped comes first on the next worker, as its second try
    again = only(run.worker_ready("c", 51))
    assert (again.task, again.number) == (other.task, 2)


def test_a_draining_worker_that_is_slower_than_thought_is_stopped_in_time() -> None:
    costs = np.array([100.0])
    run = Scheduler(1, np.arange(1), num_workers=1, costs=costs)
    run.start(0)
    begin = only(run.worker_ready("a", 0))
    run.progress(begin.attempt_id, Phase.TRACKING, 1, 0)
    assert [type(a) for a in run.worker_draining("a", 60, 0)] == [StartWorker]  # nobody knows
    assert run.next_deadline() == 55
    assert run.tick(54) == []
    assert run.tick(55) == [Cancel("a", begin.attempt_id)]
    assert run.tick(56) == []


def test_workers_go_when_the_tail_is_short() -> None:
    run = Scheduler(3, np.arange(3), num_workers=3, prefetch=0, idle_after_s=60, min_workers=1)
    run.start(0)
    one, two, three = (only(run.worker_ready(name, 0)) for name in "abc")
    run.attempt_finished(one.attempt_id, 10)
    run.attempt_finished(two.attempt_id, 20)
    for now in (69, 79):
        run.progress(three.attempt_id, Phase.TRACKING, now, now)
    assert run.next_deadline() == 70
    assert [a for a in run.tick(69) if isinstance(a, Release)] == []
    assert [a.worker_id for a in run.tick(70) if isinstance(a, Release)] == ["a"]
    assert [a.worker_id for a in run.tick(80) if isinstance(a, Release)] == ["b"]
    # The last one works on; its failure finds a worker again.
    actions = run.worker_lost("c", FailureKind.WORKER_LOST, "SIGKILL", 90)
    assert actions == [StartWorker()]


def test_workers_that_have_no_place_are_given_up_when_little_is_left() -> None:
    run = Scheduler(5, np.arange(5), num_workers=5, prefetch=0, idle_after_s=60)
    assert run.start(0) == [StartWorker()] * 5
    begin = only(run.worker_ready("a", 0))  # the others wait for nodes
    for now in range(1, 4):
        begin = only(run.attempt_finished(begin.attempt_id, now))
    assert run.tick(4) == [ForgoWorker()] * 3  # two videos are left
    assert run.tick(5) == []  # the pool has been asked
    assert run.worker_lost("e", FailureKind.PREEMPTED, "no longer needed", 5) == []


def test_a_fixed_number_of_workers_stays() -> None:
    run = scheduler(3, workers=3)
    run.start(0)
    one, *_ = (only(run.worker_ready(name, 0)) for name in "abc")
    run.attempt_finished(one.attempt_id, 1)
    assert run.tick(290) == []


def test_all_workers_are_replaced_when_they_are_to_share_a_gpu() -> None:
    run = scheduler(9, workers=2)
    run.start(0)
    one, two = only(run.worker_ready("a", 0)), only(run.worker_ready("b", 0))
    assert run.replace_workers("smaller shares", 1) == []
    actions = run.attempt_finished(one.attempt_id, 2)
    assert [type(a) for a in actions] == [Commit, Kill, StartWorker]
    assert only(run.worker_ready("c", 3)).task == 2
    assert begins(run.attempt_failed(two.attempt_id, FailureKind.INPUT, "empty", "", 4)) == []
