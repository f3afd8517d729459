"""One function over a stream of things, a few at a time, results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_bounded(
    function: Callable[[Item], Result], items: Iterable[Item], num_threads: int
) -> Iterator[Result]:
    """Yield what a function makes of each item, in order, with a bounded number under way.

    Parameters
    ----------
    function : callable
        Called in threads.
    items : iterable
        Read only as far ahead as there are threads, so it may be endless.
    num_threads : int
        Calls under way at a time; with 1 everything happens in the caller's thread.

    Yields
    ------
    Result
        In order of the items. An exception of `function` is raised where its result would be,
        and nothing is started after it.
    """
    if num_threads == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                # One more than threads, so that none waits while the oldest result is consumed.
                if len(pending) > num_threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
