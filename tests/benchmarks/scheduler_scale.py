"""How fast the scheduler decides: a million tasks on 64 simulated workers, some of which fail.

Run it with ``python -m tests.benchmarks.scheduler_scale [--tasks N] [--workers N]``. Nothing is
tracked: a simulated worker finishes its attempts in turn, one in a hundred fails for a while and
one in ten thousand takes its worker with it. Printed are tasks per second of the driver's core, and
what the process' memory grew by.
"""

from __future__ import annotations

import argparse
import random
import resource
import time
from collections import deque

import numpy as np

from jobs.scheduler import Action, Begin, Kill, Scheduler, StartWorker
from workers.errors import FailureKind


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


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=64)
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


if __name__ == "__main__":
    main()
