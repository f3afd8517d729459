"""A job beside the driver's loop, whose failure surfaces in the loop."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """One job at a time beside the loop, whose failure surfaces in the loop.

    Parameters
    ----------
    name : str
        Name of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way."""
        return self._thread is None or not self._thread.is_alive()

    def start(self, job: Callable[[], object]) -> None:
        """Run `job` in a thread of its own; the one before must have ended."""

        def guarded() -> None:
            try:
                job()
            except BaseException as error:
                # Everything, so that the loop stops for what the job stopped for.
                self._error = error

        self._thread = threading.Thread(target=guarded, name=self._name, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what the last job raised."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Wait for the job under way, then `check`."""
        if self._thread is not None:
            self._thread.join()
        self.check()
