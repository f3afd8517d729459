"""Who did what in one execution: the rows of the tables `workers` and `runs`.

The driver tells the ledger what happens to its workers; the rows go into the log with the commits
and with the record that closes the run, so that a dead node's numbers are not lost with it. A
record carries only the rows that say something new, since there may be thousands of workers and
hundred thousands of records: the log puts them together.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from workers.messages import WorkerReady

REFRESH_S = 300.0
"""Hours of work on one video are nowhere but here, so rows in the log are not older than this."""


@dataclass(slots=True)
class WorkerAccount:
    """What one worker did so far; times are of the ledger's clock, in seconds.

    Attributes
    ----------
    started_at : float
        When it was asked for, in seconds since 1970.
    ready : WorkerReady or None
        What it said when its model was loaded.
    up_s, down_s, busy_since_s : float or None
        When it became ready, when it ended, since when it has had work.
    running : set of str
        Attempts on it.
    num_videos, num_frames : int
        Accepted attempts and their frames.
    busy_s : float
        Closed stretches of work.
    exit_reason : str or None
        Why it ended.
    """

    started_at: float
    ready: WorkerReady | None = None
    up_s: float | None = None
    down_s: float | None = None
    busy_since_s: float | None = None
    running: set[str] = field(default_factory=set)
    num_videos: int = 0
    num_frames: int = 0
    busy_s: float = 0.0
    exit_reason: str | None = None


class Ledger:
    """The accounts of all workers of one execution.

    Parameters
    ----------
    clock : callable
        Returns seconds that never run backwards.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._accounts: dict[str, WorkerAccount] = {}
        # The open ones, so that those of a thousand lost spot nodes cost a turn nothing.
        self._living: dict[str, WorkerAccount] = {}
        self._held_s = 0.0  # by those that are gone
        self._changed: set[str] = set()
        # Living workers with the time of their last row, the oldest first.
        self._told_s: dict[str, float] = {}

    def started(self, worker_id: str) -> None:
        """Open an account."""
        self._accounts[worker_id] = self._living[worker_id] = WorkerAccount(time.time())
        self._changed.add(worker_id)

    def ready(self, worker_id: str, ready: WorkerReady) -> None:
        """Note that a worker's model is loaded."""
        account = self._accounts[worker_id]
        account.ready, account.up_s = ready, self._clock()
        self._changed.add(worker_id)

    def began(self, worker_id: str, attempt_id: str) -> None:
        """Note that an attempt was sent to a worker."""
        account = self._accounts[worker_id]
        if not account.running:
            account.busy_since_s = self._clock()
        account.running.add(attempt_id)

    def ended(self, worker_id: str, attempt_id: str, num_frames: int | None) -> None:
        """Note the end of an attempt; `num_frames` is None where it was not accepted."""
        account = self._accounts.get(worker_id)
        if account is None or attempt_id not in account.running:
            return
        account.running.discard(attempt_id)
        self._changed.add(worker_id)
        if not account.running:
            self._rest(account)
        if num_frames is not None:
            account.num_videos += 1
            account.num_frames += num_frames

    def gone(self, worker_id: str, reason: str) -> None:
        """Close an account; the first reason stands."""
        account = self._living.pop(worker_id, None)
        if account is None:
            return
        self._rest(account)
        account.running.clear()
        account.down_s = self._clock()
        account.exit_reason = reason
        self._held_s += _held_s(account, account.down_s)
        self._changed.add(worker_id)

    def all_gone(self, reason: str) -> None:
        """Close every account that is still open."""
        for worker_id in self.living():
            self.gone(worker_id, reason)

    def living(self) -> list[str]:
        """Return the workers whose account is open."""
        return list(self._living)

    def held_s(self) -> float:
        """Return for how long workers were held, loading included, summed over all of them."""
        now = self._clock()
        return self._held_s + sum(_held_s(account, now) for account in self._living.values())

    def _rest(self, account: WorkerAccount) -> None:
        if account.busy_since_s is not None:
            account.busy_s += self._clock() - account.busy_since_s
            account.busy_since_s = None

    def worker_rows(self, *, run_id: str, epoch: int) -> list[dict[str, Any]]:
        """Return the rows of the table `workers`, of all there ever were."""
        return [self._row(worker_id, run_id, epoch) for worker_id in self._accounts]

    def changed_rows(self, *, run_id: str, epoch: int) -> list[dict[str, Any]]:
        """Return the rows that the log must hear of since this was last asked.

        These are the rows of the workers that started, ended something or went, and of those that
        live and were not among them for `REFRESH_S`.
        """
        now = self._clock()
        for worker_id, told_s in self._told_s.items():
            if now - told_s < REFRESH_S:
                break
            self._changed.add(worker_id)
        rows = [self._row(worker_id, run_id, epoch) for worker_id in sorted(self._changed)]
        for worker_id in self._changed:
            self._told_s.pop(worker_id, None)
            if worker_id in self._living:
                self._told_s[worker_id] = now
        self._changed.clear()
        return rows

    def _row(self, worker_id: str, run_id: str, epoch: int) -> dict[str, Any]:
        account = self._accounts[worker_id]
        ready, now = account.ready, self._clock()
        end = account.down_s if account.down_s is not None else now
        since = account.busy_since_s
        busy = account.busy_s + (now - since if since is not None else 0.0)
        life = end - account.up_s if account.up_s is not None else 0.0
        return {
            "run_id": run_id,
            "epoch": epoch,
            "worker_id": f"{epoch}-{worker_id}",
            "host": ready.host if ready else "",
            "gpu": ready.gpu if ready else "",
            "pid": ready.pid if ready else None,
            "started_at": account.started_at,
            "load_s": ready.load_s if ready else None,
            "num_videos": account.num_videos,
            "num_frames": account.num_frames,
            "busy_s": busy,
            "idle_s": max(0.0, life - busy),
            "exit_reason": account.exit_reason,
        }


def _held_s(account: WorkerAccount, end_s: float) -> float:
    if account.ready is None or account.up_s is None:
        return 0.0
    return end_s - account.up_s + account.ready.load_s
