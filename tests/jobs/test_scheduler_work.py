"""Contract: what an event costs the scheduler does not grow faster than the workers are many.

* A rest is decided as by asking every worker at work, and in one pass over them for all that rest.
* Suspects find their workers in one pass, the emptiest first.
* A result, where all are busy, looks at each worker a few times at most.
* The simulation of the benchmark ends every video.

Work is counted in calls, of Python and of C, not in seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from types import FrameType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.outlook import Outlook
from jobs.scheduler import Begin, Scheduler, StartWorker
from tests.benchmarks.scheduler_scale import react
from workers.errors import FailureKind
from workers.messages import Phase

FAST, SLOW = 10.0, 1.0
MANY = 4
"""How many times more workers the second count of work is of."""


class Calls:
    """A number that grows with every call while it is counted."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        self.count += event in ("call", "c_call")


@contextmanager
def counted() -> Iterator[Calls]:
    calls = Calls()
    before = sys.getprofile()
    sys.setprofile(calls)
    try:
        yield calls
    finally:
        sys.setprofile(before)


def all_busy(num_workers: int, costs: np.ndarray, prefetch: int = 0) -> tuple[Scheduler, list[str]]:
    """Return a scheduler whose workers each begin a video, and the attempts by worker."""
    run = Scheduler(
        len(costs), np.arange(len(costs)), num_workers=num_workers, prefetch=prefetch, costs=costs
    )
    assert run.start(0) == [StartWorker()] * num_workers
    attempts = []
    for number in range(num_workers):
        (begin,) = run.worker_ready(f"w{number}", 0)
        assert isinstance(begin, Begin)
        attempts.append(begin.attempt_id)
    return run, attempts


def work_of_rest(num_workers: int) -> int:
    # Given long videos, every other worker slow, and the fast ones busy
    half = num_workers // 2
    costs = np.array([1000.0] * num_workers + [900.0] * half)
    run, attempts = all_busy(num_workers, costs)
    for number in range(num_workers):
        run.set_speed(f"w{number}", SLOW if number % 2 else FAST)
    # When the slow ones have nothing to do
    for attempt_id in attempts[1::2]:
        actions = run.attempt_finished(attempt_id, 1)
        assert not [a for a in actions if isinstance(a, Begin)], "it leaves the rest to the others"
    assert run.worker_states["idle"] == half
    with counted() as calls:
        assert run.tick(2) == []
    return calls.count


def work_of_suspects(num_workers: int) -> int:
    # Given workers with two videos each
    costs = np.full(4 * num_workers, 100.0)
    run, attempts = all_busy(num_workers, costs, prefetch=1)
    for number in range(num_workers):
        run.set_speed(f"w{number}", FAST)
        run.progress(attempts[number], Phase.TRACKING, 1, 1)
    assert len(run.tick(2)) == num_workers
    # When a quarter of them dies
    lost = num_workers // 4
    for number in range(lost):
        run.worker_lost(f"w{number}", FailureKind.WORKER_LOST, "killed", 3)
    assert run.counts.retrying == 2 * lost
    with counted() as calls:
        assert run.tick(3) == []
    return calls.count


def work_of_result(num_workers: int) -> int:
    run, attempts = all_busy(num_workers, np.full(4 * num_workers, 1e6), prefetch=1)
    for number in range(num_workers):
        run.set_speed(f"w{number}", FAST + number / num_workers)
        run.progress(attempts[number], Phase.TRACKING, 1, 1)
    with counted() as calls:
        assert len(run.attempt_finished(attempts[0], 2)) == 2  # a commit, and the next video
    return calls.count


@pytest.mark.parametrize("work", [work_of_rest, work_of_suspects])
def test_work_grows_as_the_workers_do(work: Callable[[int], int]) -> None:
    few = work(40)
    assert work(MANY * 40) < 1.5 * MANY * few


def test_a_result_looks_at_each_worker_a_few_times() -> None:
    few, many = work_of_result(40), work_of_result(1040)
    assert (many - few) / 1000 < 3


SPEEDS = st.sampled_from([0.1, 1.0, 1.2, 10.0]) | st.floats(0.01, 100)


@given(
    at_work=st.lists(st.tuples(SPEEDS, st.floats(0, 1e6)), max_size=12),
    speed=SPEEDS | st.just(inf),
    shortest=st.floats(0, 1e6),
    others=st.floats(0, 1e9),
)
def test_the_outlook_is_what_asking_all_of_them_gives(
    at_work: list[tuple[float, float]], speed: float, shortest: float, others: float
) -> None:
    outlook = Outlook(at_work, shortest, shortest + others)
    faster = [worker for worker in at_work if worker[0] > speed]
    if not faster:
        assert outlook.done_in_s(speed) == inf
        return
    together_s = (shortest + others + sum(left for _, left in faster)) / sum(v for v, _ in faster)
    soonest_s = min((left + shortest) / v for v, left in faster)
    assert outlook.done_in_s(speed) == pytest.approx(max(soonest_s, together_s), rel=1e-9)


def test_the_benchmark_ends_every_video() -> None:
    seconds = react(12)
    results = [times for kind, times in seconds.items() if kind.startswith("result")]
    assert sum(len(times) for times in results) == 36
