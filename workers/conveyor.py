"""Bounded queues between the threads of one video, and who waited for whom.

Decoding, tracking and writing overlap in threads; a queue between two of them bounds the memory
they may hold together and measures their waiting. A producer that filled its queue sleeps until
half of it is free again: on a busy machine the threads then change places once per batch, not
once per frame.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Generic, TypeVar

from workers.errors import PreemptedError

T = TypeVar("T")

QUEUE_BYTES = 48 << 20
"""Pixels that may wait between two threads, in bytes."""
QUEUE_FRAMES = 12
"""Frames that may wait between two threads, however small they are."""

_LOOK_UP_S = 0.25
"""How often a waiting thread looks whether the attempt was cancelled, in seconds."""
_JOIN_S = 30.0
"""How long the end of an attempt waits for its threads, in seconds; they are daemons."""


class ConveyorStopped(Exception):  # noqa: N818 - not an error: the other side gave up first
    """The other threads of the video have stopped; there is nobody left to work for."""


class Conveyor(Generic[T]):
    """A bounded queue from one thread to another.

    Parameters
    ----------
    max_cost : int
        Sum of the costs of what may lie on it; one item always may.
    cancelled : threading.Event
        Set when the attempt must stop.

    Attributes
    ----------
    wait_put_s, wait_get_s : float
        Seconds the producer, and the consumer, have waited so far.
    """

    def __init__(self, max_cost: int, cancelled: threading.Event) -> None:
        self.wait_put_s = 0.0
        self.wait_get_s = 0.0
        self._max_cost = max_cost
        self._cancelled = cancelled
        self._items: deque[tuple[T, int]] = deque()
        self._cost = 0
        self._ended = False
        self._stopped = False
        self._failure: BaseException | None = None
        lock = threading.Lock()
        self._filled = threading.Condition(lock)
        self._freed = threading.Condition(lock)

    def put(self, item: T, cost: int = 1) -> None:
        """Add an item, waiting while the queue is full.

        Raises
        ------
        ConveyorStopped
            The consumer is gone.
        PreemptedError
            The attempt was cancelled.
        """
        with self._freed:
            if self._items and self._cost + cost > self._max_cost:
                begin = time.perf_counter()
                room = self._max_cost - cost
                self._wait(
                    self._freed,
                    lambda: not self._items or self._cost <= min(room, self._max_cost // 2),
                )
                self.wait_put_s += time.perf_counter() - begin
            if self._stopped:
                raise ConveyorStopped
            self._items.append((item, cost))
            self._cost += cost
            if len(self._items) == 1:
                self._filled.notify()

    def get(self) -> T | None:
        """Take the next item, waiting for one; None at the end.

        Raises
        ------
        BaseException
            What the producer failed with, once everything before it was taken.
        ConveyorStopped
            The video is being given up.
        PreemptedError
            The attempt was cancelled.
        """
        with self._filled:
            self._wait_for_item()
            if not self._items:
                return None
            item, cost = self._items.popleft()
            self._cost -= cost
            if not self._items or self._cost <= self._max_cost // 2:
                self._freed.notify()
            return item

    def peek(self, while_waiting: Callable[[], None] | None = None) -> T | None:
        """Return the next item without taking it, waiting for one; None at the end.

        Parameters
        ----------
        while_waiting : callable, optional
            Called a few times a second until there is one; must be quick.
        """
        with self._filled:
            self._wait_for_item(while_waiting)
            return self._items[0][0] if self._items else None

    def waiting(self, limit: int) -> list[T]:
        """Return the next items that are there already, at most `limit`, without taking them."""
        with self._filled:
            return [item for item, _ in islice(self._items, limit)]

    def __iter__(self) -> Iterator[T]:
        """Take items until the end."""
        while (item := self.get()) is not None:
            yield item

    def end(self) -> None:
        """Say that no item will follow."""
        with self._filled:
            self._ended = True
            self._filled.notify()

    def fail(self, failure: BaseException) -> None:
        """Pass a failure of the producer on to the consumer, behind the items already there."""
        with self._filled:
            self._failure = failure
            self._ended = True
            self._filled.notify()

    def stop(self) -> None:
        """Wake both sides and let them give up; may be called by anybody, also twice."""
        with self._filled:
            self._stopped = True
            self._items.clear()
            self._cost = 0
            self._filled.notify()
            self._freed.notify()

    def _wait_for_item(self, while_waiting: Callable[[], None] | None = None) -> None:
        if not self._items and not self._ended:
            begin = time.perf_counter()
            self._wait(self._filled, lambda: bool(self._items) or self._ended, while_waiting)
            self.wait_get_s += time.perf_counter() - begin
        if self._stopped:
            raise ConveyorStopped
        if not self._items and self._failure is not None:
            raise self._failure

    def _wait(
        self,
        condition: threading.Condition,
        ready: Callable[[], bool],
        while_waiting: Callable[[], None] | None = None,
    ) -> None:
        while not ready() and not self._stopped:
            condition.wait(_LOOK_UP_S)
            if while_waiting is not None:
                while_waiting()
            if self._cancelled.is_set():
                raise PreemptedError("the attempt was cancelled")


class PictureQueue(Conveyor[T]):
    """A conveyor for pictures or masks, bounded by their bytes and by their number.

    Parameters
    ----------
    small_profile : bool
        Hold a quarter of it.
    cancelled : threading.Event
        Set when the attempt must stop.
    """

    def __init__(self, small_profile: bool, cancelled: threading.Event) -> None:
        share = 4 if small_profile else 1
        super().__init__(QUEUE_BYTES // share, cancelled)
        self._smallest_cost = QUEUE_BYTES // QUEUE_FRAMES

    def put(self, item: T, cost: int = 1) -> None:
        """Add an item; its cost is the bytes of its pixels."""
        super().put(item, max(cost, self._smallest_cost))


class StageThread:
    """A daemon thread that does one stage of a video and keeps what it failed with.

    Parameters
    ----------
    name : str
        Name of the thread.
    work : callable
        The whole stage.
    on_failure : callable
        Called in the thread with what `work` raised, to wake whoever waits for it.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self.failure: BaseException | None = None
        self._work = work
        self._on_failure = on_failure
        # The thread logs in the name of the attempt that started it.
        run = partial(contextvars.copy_context().run, self._run)
        self._thread = threading.Thread(target=run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def join(self, timeout_s: float = _JOIN_S) -> bool:
        """Wait for the thread; return whether it has ended."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._work()
        except ConveyorStopped:
            pass
        except BaseException as error:
            self.failure = error
            self._on_failure(error)
