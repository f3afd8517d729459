"""The errors of the whole project: what went wrong, whose fault it is and what to do next.

Every message is one sentence that names the thing, what is wrong with it and how to mend it, so
the command line prints it as it is. Two families: a `MaskmillError` ends the command with its
exit code; a `TaskError` concerns one video, and its kind decides who retries what.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar


def how_to_install(extra: str) -> str:
    """Return what to type where an extra is missing; maskmill is on no package index.

    Examples
    --------
    >>> how_to_install("yolo")
    "pip install '.[yolo]' in the sources of maskmill"
    """
    return f"pip install '.[{extra}]' in the sources of maskmill"


class FailureKind(StrEnum):
    """Why an attempt failed; the scheduler's fault policy is keyed by it."""

    TRANSIENT = "transient"
    """Storage 5xx, time-outs, throttling: retried with backoff on the same worker."""
    INPUT = "input"
    """The video or its prompts cannot be used: quarantined at once."""
    OUT_OF_MEMORY = "out_of_memory"
    """Device or host memory ran out: once more with the small profile."""
    WORKER_LOST = "worker_lost"
    """The process died under the attempt: retried on another worker."""
    PREEMPTED = "preempted"
    """The node was taken away on purpose: retried, never charged."""
    STUCK = "stuck"
    """No progress for the whole deadline: the worker was killed, one attempt is charged."""
    TRACKER = "tracker"
    """An exception in the model: once more on a fresh worker."""
    OUTAGE = "outage"
    """Credentials refused or a disk full: no video's fault, the run stops with exit code 3."""


class MaskmillError(Exception):
    """Base of every error that ends a command with a sentence and an exit code."""

    exit_code: ClassVar[int] = 1


class ConfigError(MaskmillError):
    """A wrong command, configuration, tracker, weights file or prompts file (exit code 2)."""

    exit_code = 2


class StoreError(MaskmillError):
    """A store or cluster that is unreachable, denied, full or ignores conditions (exit code 3)."""

    exit_code = 3


class StoreDenied(StoreError):  # noqa: N818 - reads as the outcome it is, beside FencedOut
    """The store refused the credentials (401, 403)."""


class StoreFull(StoreError):  # noqa: N818 - as above
    """No space is left where something had to be written."""


class StoreUnavailable(StoreError):  # noqa: N818 - as above
    """The store did not answer, throttled, or failed in a way that may pass (5xx, time-out)."""


class FencedOut(StoreError):  # noqa: N818 - as above
    """A newer driver holds the fence of this output; this one must stop writing."""


class TaskError(MaskmillError):
    """Something that concerns one video only; returned to the driver as data."""

    kind: ClassVar[FailureKind]


class InputError(TaskError):
    """The video, or a prompt for it, cannot be used."""

    kind = FailureKind.INPUT


class TransientError(TaskError):
    """A storage fault that may pass on its own."""

    kind = FailureKind.TRANSIENT


class OutOfMemoryError(TaskError):
    """Host or device memory ran out while the video was tracked."""

    kind = FailureKind.OUT_OF_MEMORY


class TrackerError(TaskError):
    """The tracker raised on input that should have been fine."""

    kind = FailureKind.TRACKER


class PreemptedError(TaskError):
    """The attempt was told to stop; nothing is wrong with its video."""

    kind = FailureKind.PREEMPTED


class OutageError(TaskError):
    """A refusal that would meet every video alike: denied credentials or a full disk."""

    kind = FailureKind.OUTAGE


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception of any library says that host or device memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    # cv2 and parts of CUDA's libraries only say it in words.
    text = str(error).lower()
    phrases = ("out of memory", "insufficient memory", "cannot allocate memory")
    is_library = isinstance(error, RuntimeError | OSError) or type(error).__module__ == "cv2"
    return is_library and any(phrase in text for phrase in phrases)
