"""Commits and quarantines on their way into the log, in groups.

A record per video would be a request per video; a group waits for company, but not for long. What
is in the outbox when the driver dies was never said: those videos are simply tracked again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jobs.commit_log import CommitLog
from jobs.records import Quarantined, VideoCommit

GROUP_SIZE = 64
"""Videos per record."""
MAX_WAIT_S = 5.0
"""Seconds a video waits for company."""


class Outbox:
    """Groups what is to be appended to the log.

    Parameters
    ----------
    log : CommitLog
        Where records go.
    clock : callable
        Returns seconds that never run backwards.
    changed_rows : callable
        Returns the rows of the table `workers` that have changed since it was last called; they
        ride with the commits, so that they survive the driver.
    """

    def __init__(
        self,
        log: CommitLog,
        clock: Callable[[], float],
        changed_rows: Callable[[], Sequence[Mapping[str, Any]]],
    ) -> None:
        self._log = log
        self._clock = clock
        self._changed_rows = changed_rows
        self._commits: list[VideoCommit] = []
        self._quarantined: list[Quarantined] = []
        self._oldest_s = 0.0

    def __len__(self) -> int:
        return len(self._commits) + len(self._quarantined)

    @property
    def num_commits(self) -> int:
        """Videos that wait to be committed."""
        return len(self._commits)

    def commit(self, commit: VideoCommit) -> None:
        """Take a commit; a full group is appended at once."""
        self._mark()
        self._commits.append(commit)
        if len(self._commits) >= GROUP_SIZE:
            self.flush()

    def quarantine(self, entry: Quarantined) -> None:
        """Take a quarantined video; a full group is appended at once."""
        self._mark()
        self._quarantined.append(entry)
        if len(self._quarantined) >= GROUP_SIZE:
            self.flush()

    def flush_if_due(self) -> None:
        """Append what has waited long enough."""
        if len(self) and self._clock() - self._oldest_s >= MAX_WAIT_S:
            self.flush()

    def flush(self) -> None:
        """Append everything.

        Raises
        ------
        StoreError
            The log cannot be appended to; what was not appended stays in the outbox.
        """
        if self._commits:
            self._log.commit(self._commits, self._changed_rows())
            self._commits = []
        if self._quarantined:
            self._log.quarantine(self._quarantined)
            self._quarantined = []

    def _mark(self) -> None:
        if not len(self):
            self._oldest_s = self._clock()
