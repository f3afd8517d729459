"""The worker pool of one process: the same verbs as on Ray, with threads.

For notebooks, for small runs without a cluster, and for tests that kill the driver at every write.
A thread cannot be killed: `ThreadPool.kill` asks its attempts to stop, forgets them, and hears
nothing of them any more; what hangs in native code goes on until the process ends.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

from jobs.workforce import (
    AttemptDone,
    AttemptError,
    Event,
    Heartbeat,
    WorkerClass,
    WorkerUp,
    down_after_setup,
    failed_attempt,
)
from workers.messages import Attempt, Proposal, WorkerSpec

_HEARTBEAT_S = 1.0
_CLOSE_S = 10.0


@dataclass(slots=True, eq=False)
class _Local:
    worker: WorkerClass
    ready: bool = False
    attempts: set[str] = field(default_factory=set)
    heard_at: float = 0.0


class ThreadPool:
    """Workers that are objects of this process, each attempt a daemon thread.

    Parameters
    ----------
    spec : WorkerSpec
        What every worker is born with.
    num_workers : int
        How many workers the run may have.
    worker_cls : type, optional
        The worker; `workers.actor.TrackingWorker` by default.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        num_workers: int = 1,
        *,
        worker_cls: Callable[[WorkerSpec], WorkerClass] | None = None,
    ) -> None:
        if worker_cls is None:
            from workers.actor import TrackingWorker

            worker_cls = TrackingWorker
        self.num_workers = num_workers
        self.is_mixed = False
        self._spec = spec
        self._worker_cls = worker_cls
        self._workers: dict[str, _Local] = {}
        self._num_started = 0
        # What threads say: the worker they speak for, and the event.
        self._heard: queue.SimpleQueue[tuple[str, Event]] = queue.SimpleQueue()

    def start_worker(self) -> str:
        """Make a worker and load its model in a thread of its own."""
        self._num_started += 1
        worker_id = f"worker-{self._num_started}"
        worker = self._worker_cls(self._spec)
        self._workers[worker_id] = _Local(worker)
        self._run(worker_id, lambda: self._setup(worker_id, worker))
        return worker_id

    def forgo_worker(self) -> str | None:
        """Return None: a thread has its place at once."""
        return None

    def gpu_measured(self, peak_bytes: int, total_bytes: int) -> bool:
        """Return False: the workers of a process share what it has."""
        return False

    def begin(self, worker_id: str, attempt: Attempt) -> None:
        """Track one video in a thread of its own."""
        local = self._workers.get(worker_id)
        if local is None:
            return
        local.attempts.add(attempt.attempt_id)
        self._run(worker_id, lambda: self._process(worker_id, local.worker, attempt))

    def cancel(self, worker_id: str, attempt_id: str) -> None:
        """Ask an attempt to stop; it answers with an `AttemptError`."""
        local = self._workers.get(worker_id)
        if local is not None:
            local.worker.cancel(attempt_id)

    def kill(self, worker_id: str) -> None:
        """Ask the worker's attempts to stop and forget it; its threads may outlive this call."""
        local = self._workers.pop(worker_id, None)
        if local is not None:
            for attempt_id in local.attempts:
                local.worker.cancel(attempt_id)

    def release(self, worker_id: str) -> None:
        """Free a worker's model beside everything else, and forget the worker."""
        local = self._workers.pop(worker_id, None)
        if local is not None:
            threading.Thread(target=local.worker.destroy, name=worker_id, daemon=True).start()

    def events(self, timeout_s: float) -> list[Event]:
        """Return what happened, waiting at most `timeout_s` seconds for the first event."""
        deadline = time.monotonic() + timeout_s
        events: list[Event] = []
        while True:
            now = time.monotonic()
            events += self._heartbeats(now)
            wait_s = 0.0 if events else max(0.0, min(deadline - now, _HEARTBEAT_S))
            try:
                while True:
                    self._take(*self._heard.get(timeout=wait_s), events)
                    wait_s = 0.0
            except queue.Empty:
                pass
            if events or time.monotonic() >= deadline:
                return events

    def close(self) -> None:
        """Stop all attempts and free the models; waits a few seconds for each."""
        closing = [
            threading.Thread(target=local.worker.destroy, daemon=True)
            for local in self._workers.values()
            if local.ready
        ]
        self._workers.clear()
        for thread in closing:
            thread.start()
        deadline = time.monotonic() + _CLOSE_S
        for thread in closing:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _take(self, worker_id: str, event: Event, events: list[Event]) -> None:
        local = self._workers.get(worker_id)
        if local is None:  # it was killed
            return
        match event:
            case WorkerUp():
                local.ready = True
            case AttemptDone(attempt_id) | AttemptError(attempt_id):
                local.attempts.discard(attempt_id)
            case _:
                del self._workers[worker_id]
        events.append(event)

    def _heartbeats(self, now: float) -> list[Event]:
        beats: list[Event] = []
        for worker_id, local in self._workers.items():
            if local.attempts and now - local.heard_at >= _HEARTBEAT_S:
                local.heard_at = now
                beats.append(Heartbeat(worker_id, tuple(local.worker.progress().values())))
        return beats

    def _run(self, worker_id: str, work: Callable[[], Event]) -> None:
        threading.Thread(
            target=lambda: self._heard.put((worker_id, work())), name=worker_id, daemon=True
        ).start()

    def _setup(self, worker_id: str, worker: WorkerClass) -> Event:
        try:
            worker.setup_on_node()
            return WorkerUp(worker_id, worker.setup())
        except BaseException as error:  # a thread that ends without a word would hang the run
            return down_after_setup(worker_id, error)

    def _process(self, worker_id: str, worker: WorkerClass, attempt: Attempt) -> Event:
        try:
            result = worker.process(attempt)
        except BaseException as error:  # as above
            return failed_attempt(attempt.attempt_id, error, traceback.format_exc())
        if isinstance(result, Proposal):
            return AttemptDone(attempt.attempt_id, result)
        return AttemptError(attempt.attempt_id, result)
