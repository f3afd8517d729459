"""Several threads, one model: their sessions are stepped together.

Each video of a worker is tracked by a thread of its own. A step waits a moment for those of the
others, and the last to come takes all of them through the model as one batch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from workers.errors import TaskError, TransientError, is_out_of_memory
from workers.trackers.base import (
    TrackingFrame,
    TrackingModelLoader,
    TrackingSession,
    UInt8Array,
)

_PATIENCE = 0.25
"""How long a step waits for others, as a share of what the last one took."""


@dataclass(slots=True, eq=False)
class _Request:
    """A step that a thread waits for."""

    session: TrackingSession
    frame: UInt8Array
    frame_idx: int
    result: list[TrackingFrame] | None = None
    error: Exception | None = None

    @property
    def is_done(self) -> bool:
        return self.result is not None or self.error is not None


class Stepper:
    """Takes the sessions of one model through it, for any number of threads.

    Parameters
    ----------
    loader : TrackingModelLoader
        Loaded.
    """

    def __init__(self, loader: TrackingModelLoader) -> None:
        self.loader = loader
        self._changed = threading.Condition()
        self._waiting: list[_Request] = []
        self._num_members = 0
        self._num_before = 0  # threads that wait to hold the model; steps let them go first
        self._is_busy = False
        self._idle_since = 0.0
        self._patience_s = 0.0
        self._one_by_one = False

    @contextmanager
    def member(self) -> Iterator[None]:
        """Say that this thread will step a session until the block ends."""
        with self._changed:
            self._num_members += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_members -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the model for something else than a step; not inside another such block."""
        with self._changed:
            self._num_before += 1
            while self._is_busy:
                self._changed.wait()
            self._num_before -= 1
            self._is_busy = True
        try:
            yield
        finally:
            self._release()

    def step(
        self, session: TrackingSession, frame: UInt8Array, frame_idx: int
    ) -> list[TrackingFrame]:
        """Return what `TrackingSession.step` would return, which may be computed with others'.

        Raises
        ------
        TransientError
            A batch of several videos failed, and it is not known which of them is at fault; from
            now on each is stepped alone.
        Exception
            What `TrackingSession.step` raises.
        """
        request = _Request(session, frame, frame_idx)
        with self._changed:
            asked = time.monotonic()
            self._waiting.append(request)
            self._changed.notify_all()
            while not request.is_done:
                due = max(asked, self._idle_since) + self._patience_s
                left = due - time.monotonic()
                if self._is_busy or self._num_before:
                    self._changed.wait()
                elif left <= 0 or self._one_by_one or len(self._waiting) >= self._num_members:
                    self._is_busy = True
                    break
                else:
                    self._changed.wait(left)
            group = [] if request.is_done else self._group(request)
        if group:
            begin = time.monotonic()
            try:
                self._run(group)
            finally:
                self._patience_s = _PATIENCE * (time.monotonic() - begin)
                self._release()
        if request.error is not None:
            raise request.error
        assert request.result is not None
        return request.result

    def _group(self, request: _Request) -> list[_Request]:
        """Take the steps to compute now; `request` is among them."""
        group = [request] if self._one_by_one else self._waiting
        self._waiting = [one for one in self._waiting if one not in group]
        return group

    def _run(self, group: list[_Request]) -> None:
        try:
            results = self.loader.step_many(
                [(one.session, one.frame) for one in group],
                frame_idxs=[one.frame_idx for one in group],
            )
        except Exception as error:
            for one in group:
                one.error = self._failure(error, len(group))
            return
        for one, result in zip(group, results, strict=True):
            one.result = result

    def _failure(self, error: Exception, num: int) -> Exception:
        """Return what each video of a failed batch gets."""
        if num == 1 or is_out_of_memory(error) or isinstance(error, TaskError):
            return error
        self._one_by_one = True
        return TransientError(
            f"{num} videos that were stepped together failed with {type(error).__name__}: {error}; "
            f"they are tried again one at a time"
        )

    def _release(self) -> None:
        with self._changed:
            self._is_busy = False
            self._idle_since = time.monotonic()
            self._changed.notify_all()
