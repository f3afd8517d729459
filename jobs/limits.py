"""`--deadline` and `--budget-hours`: when a run stops although work is left.

Both stop it as Ctrl-C does: what is committed stays, what is under way is given up and not
charged, the log is closed, and the same command resumes. Both count anew from each start.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta

from workers.errors import ConfigError

_DURATION = re.compile(
    r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+)s)?"
)
_SECONDS = (86_400, 3600, 60, 1)


def parse_deadline(text: str, now: datetime) -> datetime:
    """Return the moment that a text means.

    Parameters
    ----------
    text : str
        A duration (``90m``, ``1h30m``, ``2d``), a clock time (``06:30``), which is the next one,
        or a date with a time (``2026-11-21T06:30``). Times without a zone are UTC, as those of
        ``--since`` are; ``06:30+01:00`` names one.
    now : datetime
        What durations and clock times count from; has a zone.

    Returns
    -------
    datetime
        With a zone, and later than `now`.

    Raises
    ------
    ConfigError
        The text is none of these, or the moment is over.

    Examples
    --------
    >>> now = datetime(2026, 11, 20, 22, tzinfo=UTC)
    >>> for text in ("1h30m", "06:30", "23:00+01:00", "2026-11-22T00:00"):
    ...     print(parse_deadline(text, now).astimezone(UTC).isoformat())
    2026-11-20T23:30:00+00:00
    2026-11-21T06:30:00+00:00
    2026-11-21T22:00:00+00:00
    2026-11-22T00:00:00+00:00
    """
    words = text.strip()
    span = _DURATION.fullmatch(words)
    if words and span is not None:
        parts = zip(span.groups(), _SECONDS, strict=True)
        seconds = sum(float(number or 0) * unit for number, unit in parts)
        if not 0 < seconds < 3650 * 86_400:
            raise ConfigError(f"--deadline {text} is no time to work in: give for instance 8h")
        return now + timedelta(seconds=seconds)
    try:
        clock = time.fromisoformat(words)
    except ValueError:
        pass
    else:
        zone = clock.tzinfo or UTC
        moment = datetime.combine(now.astimezone(zone).date(), clock.replace(tzinfo=zone))
        return moment if moment > now else moment + timedelta(days=1)
    try:
        moment = datetime.fromisoformat(words)
    except ValueError as error:
        raise ConfigError(
            f"--deadline {text!r} is no time: give a duration (8h, 90m), a clock time (06:30, UTC "
            "unless a zone follows), or a date with a time (2026-11-21T06:30)"
        ) from error
    moment = moment.replace(tzinfo=moment.tzinfo or UTC)
    if moment <= now:
        raise ConfigError(f"--deadline {text} is over: give a later time")
    return moment


@dataclass(frozen=True, slots=True)
class Limits:
    """When one start of a run must stop.

    Attributes
    ----------
    budget_hours : float or None
        Worker-hours that it may use, the loading of models included.
    deadline : datetime or None
        When it stops; has a zone.
    """

    budget_hours: float | None = None
    deadline: datetime | None = None

    def exceeded(self, worker_s: float, now: datetime) -> str | None:
        """Return which limit is reached, in one sentence; None while there is time.

        Parameters
        ----------
        worker_s : float
            Seconds that workers were held since the start, summed over workers.
        now : datetime
            The time; has a zone.
        """
        if self.deadline is not None and now >= self.deadline:
            return f"the deadline, {self.deadline:%Y-%m-%d %H:%M:%S %Z}, is reached"
        if self.budget_hours is not None and worker_s >= 3600 * self.budget_hours:
            return f"the budget of {self.budget_hours:g} worker-hours is used up"
        return None
