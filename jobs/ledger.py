"""Who did what in one execution: the rows of the tables `workers` and `runs`.

The driver tells the ledger what happens to its workers; the rows go into the log with the
record that closes the run, so that a dead node's numbers are not lost with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from workers.messages import WorkerReady


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

    def started(self, worker_id: str) -> None:
        """Open an account."""
        self._accounts[worker_id] = WorkerAccount(time.time())

    def ready(self, worker_id: str, ready: WorkerReady) -> None:
        """Note that a worker's model is loaded."""
        account = self._accounts[worker_id]
        account.ready, account.up_s = ready, self._clock()

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
        if not account.running:
            self._rest(account)
        if num_frames is not None:
            account.num_videos += 1
            account.num_frames += num_frames

    def gone(self, worker_id: str, reason: str) -> None:
        """Close an account; the first reason stands."""
        account = self._accounts.get(worker_id)
        if account is None or account.exit_reason is not None:
            return
        self._rest(account)
        account.running.clear()
        account.down_s = self._clock()
        account.exit_reason = reason

    def all_gone(self, reason: str) -> None:
        """Close every account that is still open."""
        for worker_id in self.living():
            self.gone(worker_id, reason)

    def living(self) -> list[str]:
        """Return the workers whose account is open."""
        return [key for key, account in self._accounts.items() if account.exit_reason is None]

    def held_s(self) -> float:
        """Return for how long workers were held, loading included, summed over all of them."""
        now, total_s = self._clock(), 0.0
        for account in self._accounts.values():
            if account.ready is not None and account.up_s is not None:
                end = account.down_s if account.down_s is not None else now
                total_s += end - account.up_s + account.ready.load_s
        return total_s

    def _rest(self, account: WorkerAccount) -> None:
        if account.busy_since_s is not None:
            account.busy_s += self._clock() - account.busy_since_s
            account.busy_since_s = None

    def worker_rows(self, *, run_id: str, epoch: int) -> list[dict[str, Any]]:
        """Return the rows of the table `workers`."""
        now = self._clock()
        rows = []
        for worker_id, account in self._accounts.items():
            ready = account.ready
            end = account.down_s if account.down_s is not None else now
            since = account.busy_since_s
            busy = account.busy_s + (now - since if since is not None else 0.0)
            life = end - account.up_s if account.up_s is not None else 0.0
            rows.append(
                {
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
            )
        return rows
