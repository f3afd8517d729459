"""The tasks that were never begun, longest first: taken from the front, or the longest that fits.

A plan may hold ten million tasks, so this is arrays: the order, what each costs, and, only once
something was taken from the middle, one more that leaps over what is taken.
"""

from __future__ import annotations

from math import inf

import numpy as np
from numpy.typing import NDArray


class Backlog:
    """Tasks never begun, with what they cost.

    Parameters
    ----------
    order : ndarray of int, shape (N,)
        The tasks 0 .. N - 1, longest first; each exactly once.
    costs : ndarray of number, shape (N,), optional
        What each task costs, by task and not by place in the order, in any unit (frames, say).
        Without, all cost the same.

    Raises
    ------
    ValueError
        The order is not by falling cost.

    Examples
    --------
    >>> backlog = Backlog(np.array([2, 0, 1]), np.array([30, 10, 90]))
    >>> backlog.longest, backlog.take(), backlog.take(limit=20), backlog.take(limit=20)
    (90.0, 2, 1, None)
    >>> len(backlog), backlog.total_cost
    (1, 30.0)
    """

    def __init__(self, order: NDArray[np.integer], costs: NDArray[np.number] | None = None) -> None:
        self._order = order
        self._costs = None if costs is None else np.asarray(costs, np.float32)
        # By rising cost, as searching wants it; the place p of the order is at -1 - p.
        self._rising = None if self._costs is None else self._costs[order][::-1]
        if self._rising is not None and np.any(np.diff(self._rising) < 0):
            raise ValueError("the order must be by falling cost: sort it, longest first")
        self._num_left = len(order)
        self._front = 0
        self._back = len(order) - 1
        self._total_cost = float(
            len(order) if self._rising is None else self._rising.sum(dtype=np.float64)
        )
        # For each place the next one that is free, as far as known; made when first needed.
        self._next_free: NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return self._num_left

    @property
    def total_cost(self) -> float:
        """What all that is left costs."""
        return self._total_cost if self._num_left else 0.0

    @property
    def longest(self) -> float:
        """Cost of the longest task left; 0 when none is."""
        return self._cost_at(self._front) if self._num_left else 0.0

    @property
    def shortest(self) -> float:
        """Cost of the shortest task left; 0 when none is."""
        return self._cost_at(self._back) if self._num_left else 0.0

    def cost(self, task: int) -> float:
        """Return what a task costs, taken or not."""
        return 1.0 if self._costs is None else float(self._costs[task])

    def take(self, limit: float = inf) -> int | None:
        """Take the longest task that costs at most `limit`; None when there is none."""
        if not self._num_left:
            return None
        place = self._front
        if self._cost_at(place) > limit:
            if self._rising is None or self._cost_at(self._back) > limit:
                return None
            first = len(self._order) - int(np.searchsorted(self._rising, limit, side="right"))
            place = self._free_from(first)
        return self._take_at(place) if place < len(self._order) else None

    def take_shortest(self) -> int | None:
        """Take the shortest task; None when none is left."""
        return self._take_at(self._back) if self._num_left else None

    def _cost_at(self, place: int) -> float:
        return 1.0 if self._rising is None else float(self._rising[-1 - place])

    def _take_at(self, place: int) -> int:
        task = int(self._order[place])
        self._num_left -= 1
        self._total_cost -= self._cost_at(place)
        if self._next_free is None and place != self._front:
            self._next_free = np.arange(len(self._order) + 1, dtype=np.int32)
            self._next_free[: self._front] = self._front
        if self._next_free is not None:
            self._next_free[place] = place + 1
        if self._num_left:
            if place == self._front:
                self._front = self._free_from(place + 1)
            while self._is_taken(self._back):
                self._back -= 1
        return task

    def _is_taken(self, place: int) -> bool:
        return self._next_free is not None and int(self._next_free[place]) != place

    def _free_from(self, place: int) -> int:
        """Return the first free place at or after one; the number of tasks when there is none."""
        leaps = self._next_free
        if leaps is None:
            return max(place, self._front)
        free = place
        while (after := int(leaps[free])) != free:
            free = after
        while place != free:  # whoever comes this way next leaps at once
            place, leaps[place] = int(leaps[place]), free
        return free
