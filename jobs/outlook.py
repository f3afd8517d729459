"""When the workers that are at work will be through, as a slower one that is idle needs to know."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from math import inf


class Outlook:
    """Makes one pass over the workers at work, so that each idle one is answered by a lookup.

    Parameters
    ----------
    at_work : iterable of (float, float)
        Speed of each worker at work, in units of cost per second, and what it has left, in units
        of cost.
    shortest : float
        Cost of the shortest task that nobody has begun.
    waiting : float
        Cost of all tasks that nobody has begun.

    Examples
    --------
    >>> outlook = Outlook([(10.0, 50.0), (2.0, 4.0)], shortest=20.0, waiting=130.0)
    >>> outlook.done_in_s(5.0), outlook.done_in_s(1.0), outlook.done_in_s(10.0)
    (18.0, 15.333333333333334, inf)
    """

    def __init__(
        self, at_work: Iterable[tuple[float, float]], shortest: float, waiting: float
    ) -> None:
        # The speeds are negative, since bisect wants them to rise.
        self._speeds: list[float] = []
        self._done_in_s = [inf]
        total_speed, total_left, soonest_s = 0.0, waiting, inf
        for speed, left in sorted(at_work, reverse=True):
            total_speed += speed
            total_left += left
            soonest_s = min(soonest_s, (left + shortest) / speed)
            self._speeds.append(-speed)
            self._done_in_s.append(max(soonest_s, total_left / total_speed))

    def done_in_s(self, speed: float) -> float:
        """Return when the workers faster than `speed` will have done it all without any other.

        At the earliest that is when one of them can have done the shortest task after its own;
        infinity where none is faster.
        """
        return self._done_in_s[bisect_left(self._speeds, -speed)]
