"""Contract of `workers.conveyor`.

* Items arrive in order; the end and a failure of the producer come behind them.
* What lies on it never exceeds its bound, but one item always fits.
* Stopping, or cancelling the attempt, wakes both sides.
* Waiting is counted on the side that waits.
"""

from __future__ import annotations

import threading
import time

import pytest

from workers.conveyor import Conveyor, ConveyorStopped, PictureQueue, StageThread
from workers.errors import PreemptedError


def fill(queue: Conveyor[int], num_items: int, cost: int = 1) -> StageThread:
    def work() -> None:
        for item in range(num_items):
            queue.put(item, cost)
        queue.end()

    thread = StageThread("maskmill-test", work, queue.fail)
    thread.start()
    return thread


def test_items_in_order_through_a_narrow_queue() -> None:
    queue: Conveyor[int] = Conveyor(3, threading.Event())
    thread = fill(queue, 500)
    assert list(queue) == list(range(500))
    assert queue.get() is None
    assert thread.join()


@pytest.mark.parametrize(("cost", "most"), [(1, 10), (3, 3), (6, 1), (100, 1)])
def test_the_bound_holds(cost: int, most: int) -> None:
    queue: Conveyor[int] = Conveyor(10, threading.Event())
    thread = fill(queue, 30, cost)
    # When the producer cannot go on it sleeps, and exactly so many items lie on the queue.
    largest = 0
    for _ in range(30):
        deadline = time.monotonic() + 5
        while not queue._items and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.002)
        largest = max(largest, len(queue._items))
        assert queue.get() is not None
    assert largest == most
    assert thread.join()


def test_pictures_are_bounded_by_bytes_and_by_number() -> None:
    few: PictureQueue[int] = PictureQueue(False, threading.Event())
    many: PictureQueue[int] = PictureQueue(False, threading.Event())
    threads = [fill(few, 40, 16 << 20), fill(many, 40, 1)]
    time.sleep(0.2)
    assert (len(few._items), len(many._items)) == (3, 12)
    assert len(list(few)) == len(list(many)) == 40
    assert all(thread.join() for thread in threads)


def test_a_failure_comes_behind_the_items() -> None:
    queue: Conveyor[int] = Conveyor(9, threading.Event())

    def work() -> None:
        queue.put(1)
        queue.put(2)
        raise KeyError("broken")

    thread = StageThread("maskmill-test", work, queue.fail)
    thread.start()
    assert thread.join()
    assert (queue.get(), queue.get()) == (1, 2)
    with pytest.raises(KeyError, match="broken"):
        queue.get()
    assert isinstance(thread.failure, KeyError)


def test_peek_takes_nothing() -> None:
    queue: Conveyor[int] = Conveyor(9, threading.Event())
    fill(queue, 2)
    assert (queue.peek(), queue.peek(), queue.get(), queue.get()) == (0, 0, 0, 1)
    assert queue.peek() is None


def test_stopping_wakes_the_producer_and_the_consumer() -> None:
    full: Conveyor[int] = Conveyor(1, threading.Event())
    thread = fill(full, 3)
    while not full._items:
        time.sleep(0.001)
    full.stop()
    assert thread.join(5)
    assert thread.failure is None
    with pytest.raises(ConveyorStopped):
        full.get()


def test_cancelling_wakes_a_waiting_consumer() -> None:
    cancelled = threading.Event()
    empty: Conveyor[int] = Conveyor(1, cancelled)
    threading.Timer(0.05, cancelled.set).start()
    with pytest.raises(PreemptedError):
        empty.get()


def test_waiting_is_counted_where_it_happens() -> None:
    queue: Conveyor[int] = Conveyor(2, threading.Event())
    thread = fill(queue, 4)
    time.sleep(0.1)
    assert list(queue) == [0, 1, 2, 3]
    assert thread.join()
    assert queue.wait_put_s > 0.05
    assert queue.wait_get_s < queue.wait_put_s
