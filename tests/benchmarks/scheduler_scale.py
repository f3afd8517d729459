"""How fast the scheduler decides: a million tasks on 64 workers, and each event among a thousand.

Run it with ``python -m tests.benchmarks.scheduler_scale [--tasks N] [--workers N] [--unlike N]``.
Nothing is tracked. First a simulated worker finishes its attempts in turn, one in a hundred fails
for a while and one in ten thousand takes its worker with it; printed are tasks per second of the
driver's core, and what the process' memory grew by. Then a thousand workers, half of them four
times slower, track three videos each, to the last; printed are the milliseconds of the core that
the scheduler took for each kind of event. The videos are much alike, so that in the end the slow
workers rest, and are asked at each event whether they should.
"""

from __future__ import annotations

import argparse
import heapq
import random
import resource
import time
from collections import defaultdict, deque

import numpy as np

from jobs.scheduler import Action, Begin, Kill, Scheduler, StartWorker
from workers.errors import FailureKind
from workers.messages import Phase

SPEEDS = (40.0, 10.0)
"""Frames per second of every other worker."""
BEATS = 16
"""Workers that are heard of between two results."""


def simulate(num_tasks: int, num_workers: int) -> Scheduler:
    """Run `num_tasks` tasks to their end on workers that exist only as names."""
    chance = random.Random(0)
    now = 0.0
    scheduler = Scheduler(num_tasks, np.arange(num_tasks, dtype=np.int32), num_workers=num_workers)
    starting: deque[str] = deque()
    running: deque[Begin] = deque()
    dead: set[str] = set()
    num_started = 0

    def do(actions: list[Action]) -> None:
        nonlocal num_started
        for action in actions:
            if isinstance(action, Begin):
                running.append(action)
            elif isinstance(action, StartWorker):
                num_started += 1
                starting.append(f"w{num_started}")
            elif isinstance(action, Kill):
                dead.add(action.worker_id)

    do(scheduler.start(now))
    while not scheduler.is_done:
        now += 0.01
        while starting:
            do(scheduler.worker_ready(starting.popleft(), now))
        if not running:
            deadline = scheduler.next_deadline()
            now = now if deadline is None else max(now, deadline)
            do(scheduler.tick(now))
            continue
        begin = running.popleft()
        if begin.worker_id in dead:
            continue
        fate = chance.random()
        if fate < 1e-4:
            dead.add(begin.worker_id)
            do(scheduler.worker_lost(begin.worker_id, FailureKind.WORKER_LOST, "killed", now))
        elif fate < 1e-2:
            do(
                scheduler.attempt_failed(
                    begin.attempt_id, FailureKind.TRANSIENT, "503 from the store", "", now
                )
            )
        else:
            do(scheduler.attempt_finished(begin.attempt_id, now))
        if fate > 0.99:
            do(scheduler.tick(now))
    return scheduler


def react(num_workers: int, videos_per_worker: int = 3) -> dict[str, list[float]]:
    """Run a corpus on workers of two speeds; return the seconds of each event, by its kind.

    A ``turn`` is what the driver asks after each batch of events, `next_deadline` and `tick`; those
    with rest come while some workers leave the last videos to faster ones.
    """
    num_tasks = videos_per_worker * num_workers
    lengths = -np.sort(-np.random.default_rng(0).lognormal(np.log(1000), 0.2, num_tasks))
    scheduler = Scheduler(
        num_tasks, np.arange(num_tasks), num_workers=num_workers, costs=lengths, is_mixed=True
    )
    seconds: dict[str, list[float]] = defaultdict(list)
    ends: list[tuple[float, str, str]] = []
    queues: dict[str, deque[tuple[str, float]]] = {}
    speeds = {f"w{number}": SPEEDS[number % 2] for number in range(num_workers)}
    since: dict[str, float] = {}
    now = 0.0

    def track_next(worker_id: str) -> None:
        attempt_id, length = queues[worker_id][0]
        since[worker_id] = now
        heapq.heappush(ends, (now + length / speeds[worker_id], worker_id, attempt_id))

    def do(actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Begin):
                queue = queues[action.worker_id]
                queue.append((action.attempt_id, float(lengths[action.task])))
                if len(queue) == 1:
                    track_next(action.worker_id)

    def heartbeat(worker_id: str) -> None:
        if queues[worker_id]:
            num_steps = int((now - since[worker_id]) * speeds[worker_id])
            attempt_id = queues[worker_id][0][0]
            scheduler.progress(attempt_id, Phase.TRACKING, num_steps, now)
            # Measured speeds differ from beat to beat.
            scheduler.set_speed(worker_id, speeds[worker_id] * (1 + 1e-3 * (num_steps % 7)))

    do(scheduler.start(now))
    for worker_id in speeds:
        queues[worker_id] = deque()
        begin_s = time.thread_time()
        actions = scheduler.worker_ready(worker_id, now, f"{speeds[worker_id]:g}")
        seconds["worker ready"].append(time.thread_time() - begin_s)
        do(actions)
    beating = deque(speeds)
    while ends:
        now, worker_id, attempt_id = heapq.heappop(ends)
        for _ in range(BEATS):
            beating.rotate(-1)
            begin_s = time.thread_time()
            heartbeat(beating[0])
            seconds["heartbeat"].append(time.thread_time() - begin_s)
        queues[worker_id].popleft()
        if queues[worker_id]:
            track_next(worker_id)
        with_rest = ", rest" if scheduler.counts.pending and not all(queues.values()) else ""
        begin_s = time.thread_time()
        actions = scheduler.attempt_finished(attempt_id, now)
        seconds[f"result{with_rest}"].append(time.thread_time() - begin_s)
        do(actions)
        begin_s = time.thread_time()
        scheduler.next_deadline()
        actions = scheduler.tick(now)
        seconds[f"turn{with_rest}"].append(time.thread_time() - begin_s)
        do(actions)
    assert scheduler.is_done, "a video was left over"
    return seconds


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--unlike", type=int, default=1000, help="workers of two speeds")
    options = parser.parse_args()
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin_s = time.process_time()
    scheduler = simulate(options.tasks, options.workers)
    busy_s = time.process_time() - begin_s
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) / 1024
    print(f"{scheduler.counts}")
    print(
        f"{options.tasks} tasks, {options.workers} workers: {busy_s:.1f} s of one core, "
        f"{options.tasks / busy_s:.0f} tasks/s, memory grew by {grown_mb:.0f} MB"
    )
    print(f"{options.unlike} workers of two speeds: milliseconds per event")
    for kind, times in react(options.unlike).items():
        median, high = np.percentile(times, [50, 99]) * 1e3
        print(
            f"  {kind:<13} {len(times):>6} events: median {median:.3f}, 99 % {high:.3f}, "
            f"worst {max(times) * 1e3:.3f}"
        )


if __name__ == "__main__":
    main()
