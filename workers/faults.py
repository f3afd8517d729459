"""Whatever goes wrong in an attempt, told as one of the task errors the fault policy knows."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from workers.conveyor import ConveyorStopped
from workers.decode.fetch import FetchCancelled
from workers.errors import (
    ConfigError,
    InputError,
    OutageError,
    OutOfMemoryError,
    PreemptedError,
    StoreDenied,
    StoreError,
    StoreFull,
    TaskError,
    TrackerError,
    TransientError,
    is_out_of_memory,
)
from workers.storage.faults import FULL


@contextmanager
def as_task_errors(name: str, cancelled: threading.Event) -> Iterator[None]:
    """Turn every exception of an attempt into a `TaskError`.

    Parameters
    ----------
    name : str
        The video, for messages.
    cancelled : threading.Event
        Once it is set, whatever is raised is a consequence of the cancellation.

    Raises
    ------
    TaskError
        With the original exception as its cause. KeyboardInterrupt and SystemExit pass.
    """
    try:
        yield
    except TaskError:
        raise
    except Exception as error:
        if cancelled.is_set() or isinstance(error, (FetchCancelled, ConveyorStopped)):
            raise PreemptedError(f"{name}: the attempt was cancelled") from error
        raise task_error(error, name) from error


@contextmanager
def as_tracker_errors(name: str, tracker: str, step: int) -> Iterator[None]:
    """Turn exceptions of the model into `TrackerError`, or `OutOfMemoryError`.

    Parameters
    ----------
    name, tracker : str
        The video and the tracker, for messages.
    step : int
        0-based count of tracked frames.
    """
    try:
        yield
    except TaskError:
        raise
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, StoreError):
            raise task_error(error, name) from error
        raise tracker_fault(
            name, tracker, f"it failed in step {step} with {type(error).__name__}: {error}"
        ) from error


def tracker_fault(name: str, tracker: str, what: str) -> TrackerError:
    """Return the error for a tracker that did something wrong."""
    return TrackerError(f"{name}: tracker {tracker} could not track it: {what}")


def task_error(error: Exception, name: str) -> TaskError:
    """Return the task error that stands for any exception of an attempt.

    Parameters
    ----------
    error : Exception
        What was raised.
    name : str
        The video, for messages.
    """
    if isinstance(error, TaskError):
        return error
    if isinstance(error, (StoreDenied, StoreFull)):
        return OutageError(str(error))
    if isinstance(error, StoreError):
        return TransientError(str(error))
    if isinstance(error, ConfigError):
        return InputError(f"{name}: {error}")
    if is_out_of_memory(error):
        return OutOfMemoryError(
            f"{name}: memory ran out ({_first_line(error)}): give each worker more, or use a "
            f"smaller model or image size"
        )
    if isinstance(error, OSError) and error.errno in FULL:
        return OutageError(
            f"{name}: no space is left on {error.filename or 'the local disk'}: free some, or "
            f"name another --spool-dir"
        )
    return TrackerError(
        f"{name}: an unexpected {type(error).__name__} stopped it ({_first_line(error)}): the "
        f"traceback tells where; please report it"
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
