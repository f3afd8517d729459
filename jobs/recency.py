"""`--since` and `--until`: which part of a growing corpus a scheduled run looks at.

The log decides what is done; these only keep a run from listing what cannot be new. A path may
carry date fields (``s3://bucket/day=%Y-%m-%d/``): then the folders of the dates in question are
listed and no others. Any other path is listed whole, and what changed outside the window is left
out. Times without a zone are UTC, as object stores count.

An age means another time whenever it is read, so a run settles what it means before anything
depends on it: what is stored and what is sent to others are times (`settled`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from workers.errors import ConfigError

MAX_DATES = 10_000
"""A window of more dated folders than this is a slip of the hand."""

_AGE = re.compile(r"(\d+)([mhdw])")
_FIELD = re.compile(r"%(.?)")
_STEPS = {"H": timedelta(hours=1), "d": timedelta(days=1), "m": timedelta(days=32)}
_UNITS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@dataclass(frozen=True, slots=True)
class Window:
    """A span of time, half-open.

    Attributes
    ----------
    since : datetime
        First moment inside, UTC.
    until : datetime
        First moment after it, UTC.
    """

    since: datetime
    until: datetime

    @classmethod
    def parse(cls, since: str | None, until: str | None, now: datetime) -> Window | None:
        """Return the window that two texts mean; None where both are absent.

        Parameters
        ----------
        since, until : str or None
            A date (``2026-11-19``), a time (``2026-11-19T22:00``), or an age such as ``36h``,
            ``7d`` or ``2w``. Without `until` the window is open towards the future.
        now : datetime
            What ages count from; has a zone.

        Raises
        ------
        ConfigError
            A text is none of these, `since` is missing, or the window is empty.

        Examples
        --------
        >>> now = datetime(2026, 11, 20, 3, tzinfo=UTC)
        >>> Window.parse("1d", None, now).since.isoformat()
        '2026-11-19T03:00:00+00:00'
        """
        if since is None and until is None:
            return None
        if since is None:
            raise ConfigError("--until needs --since: say where the window begins")
        begin = _moment("--since", since, now)
        end = datetime.max.replace(tzinfo=UTC) if until is None else _moment("--until", until, now)
        if begin >= end:
            raise ConfigError(f"--since {since} is not before --until {until}: exchange them")
        if until is None and begin > now:
            raise ConfigError(f"--since {since} lies in the future: give an earlier time")
        return cls(begin, end)

    def holds(self, mtime_ns: int | None) -> bool:
        """Tell whether a change at this time counts; one of an unknown time does."""
        if mtime_ns is None:
            return True
        until = self.until.timestamp() if self.until.year < datetime.max.year else float("inf")
        return self.since.timestamp() <= mtime_ns / 1e9 < until

    def __str__(self) -> str:
        end = "now" if self.until.year == datetime.max.year else f"{self.until:%Y-%m-%dT%H:%MZ}"
        return f"{self.since:%Y-%m-%dT%H:%MZ} to {end}"


def settled(since: str | None, until: str | None, now: datetime) -> tuple[str | None, str | None]:
    """Return the same window in times alone, which mean the same whenever they are read.

    Parameters
    ----------
    since, until : str or None
        As for `Window.parse`.
    now : datetime
        What ages count from; has a zone.

    Returns
    -------
    since, until : str or None
        Ages have become whole minutes in UTC, `since` rounded down and `until` up: a minute too
        much costs nothing, since the log decides what is done, and it is in the same dated
        folders. All else is as it was; a window that is open towards the future stays so.

    Raises
    ------
    ConfigError
        As `Window.parse`.

    Examples
    --------
    >>> settled("36h", None, datetime(2026, 11, 20, 3, 0, 20, tzinfo=UTC))
    ('2026-11-18T15:00Z', None)
    >>> settled("2026-11-01", "1d", datetime(2026, 11, 20, 3, 0, 20, tzinfo=UTC))
    ('2026-11-01', '2026-11-19T03:01Z')
    """
    window = Window.parse(since, until, now)
    if window is None:
        return None, None
    if since is not None and _AGE.fullmatch(since.strip()):
        since = _to_minute(window.since)
    if until is not None and _AGE.fullmatch(until.strip()):
        until = _to_minute(window.until + timedelta(minutes=1, microseconds=-1))
    return since, until


def has_dates(path: str) -> bool:
    """Tell whether a path carries date fields."""
    return any(field[1] in ("Y", *_STEPS) for field in _FIELD.finditer(path))


def dated_paths(path: str, window: Window, now: datetime) -> Iterator[str]:
    """Yield the paths that the dates of a window give, the earliest first.

    Parameters
    ----------
    path : str
        With the fields ``%Y``, ``%m``, ``%d`` and ``%H``; ``%%`` is a percent sign.
    window : Window
        Every date that overlaps it counts.
    now : datetime
        Where a window without an end stops.

    Raises
    ------
    ConfigError
        A field is unknown, a coarser one is missing, or there are more than `MAX_DATES`.

    Examples
    --------
    >>> now = datetime(2026, 11, 20, 3, tzinfo=UTC)
    >>> list(dated_paths("v/%Y/%m/%d", Window.parse("1d", None, now), now))
    ['v/2026/11/19', 'v/2026/11/20']
    """
    fields = {field[1] for field in _FIELD.finditer(path)} - {"%"}
    unknown = fields - {"Y", *_STEPS}
    if unknown:
        raise ConfigError(
            f"{path} has the date field %{min(unknown)}: the fields are %Y, %m, %d and %H, and a "
            f"percent sign is written %%"
        )
    for finer, coarser in (("H", "d"), ("d", "m"), ("m", "Y")):
        if finer in fields and coarser not in fields:
            raise ConfigError(f"{path} has %{finer} without %{coarser}: a date must be whole")
    step = next((_STEPS[name] for name in _STEPS if name in fields), _STEPS["m"])
    moment = window.since.replace(minute=0, second=0, microsecond=0)
    if step >= _STEPS["d"]:
        moment = moment.replace(hour=0)
    if step >= _STEPS["m"]:
        moment = moment.replace(day=1)
    end = min(window.until, now + timedelta(microseconds=1))
    if (end - moment) / step > MAX_DATES:
        raise ConfigError(
            f"{path} has more than {MAX_DATES:,} dates in {window}: give a later --since"
        )
    last = None
    while moment < end:
        dated = moment.strftime(path)
        if dated != last:
            yield dated
        last = dated
        moment += step
        if step == _STEPS["m"]:
            moment = moment.replace(day=1)


def fixed_folder(path: str) -> str:
    """Return the part of a path before its first date field, up to a slash."""
    field = next(field for field in _FIELD.finditer(path) if field[1] != "%")
    return path[: path.rfind("/", 0, field.start()) + 1].replace("%%", "%")


def _moment(flag: str, text: str, now: datetime) -> datetime:
    age = _AGE.fullmatch(text.strip())
    try:
        if age:
            return now - timedelta(seconds=int(age[1]) * _UNITS[age[2]])
        moment = datetime.fromisoformat(text.strip())
    except (ValueError, OverflowError):
        raise ConfigError(
            f"{flag} {text!r} is no time: give a date (2026-11-19), a time (2026-11-19T22:00) or "
            f"an age (36h, 7d)"
        ) from None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def _to_minute(moment: datetime) -> str:
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="minutes") + "Z"
