"""Contract of `workers.faults`.

* Every exception of an attempt becomes the task error whose policy fits, keeps its cause, and is
  told in one sentence that names the video.
* Once an attempt is cancelled, whatever it raises is a consequence of that.
* Keyboard interrupts and exits pass.
"""

from __future__ import annotations

import errno
import threading

import cv2
import numpy as np
import pytest

from workers import faults
from workers.conveyor import ConveyorStopped
from workers.decode.fetch import FetchCancelled
from workers.errors import (
    ConfigError,
    FailureKind,
    FencedOut,
    InputError,
    StoreDenied,
    StoreFull,
    StoreUnavailable,
    TaskError,
)


class OutOfMemoryError(RuntimeError):
    """Named like that of torch.cuda, which no CPU can be made to raise."""


def insufficient_memory() -> Exception:
    """Return what OpenCV raises when it gets no memory: a real one."""
    try:
        # One and a half exabytes, far beyond any address space that is allowed.
        cv2.copyMakeBorder(np.zeros((1, 1), np.uint8), 2**30, 0, 2**30, 0, cv2.BORDER_CONSTANT)
    except cv2.error as error:
        return error
    raise AssertionError("there is a machine with an exabyte of memory")


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (StoreDenied("s3://b is denied"), FailureKind.OUTAGE, "s3://b is denied"),
        (StoreFull("/out is full"), FailureKind.OUTAGE, "/out is full"),
        (StoreUnavailable("s3://b timed out"), FailureKind.TRANSIENT, "s3://b timed out"),
        (FencedOut("another driver"), FailureKind.TRANSIENT, "another driver"),
        (ConfigError("no such folder"), FailureKind.INPUT, "clip.mp4: no such folder"),
        (InputError("clip.mp4 is bad"), FailureKind.INPUT, "clip.mp4 is bad"),
        (MemoryError(), FailureKind.OUT_OF_MEMORY, "clip.mp4: memory ran out"),
        (OutOfMemoryError("CUDA"), FailureKind.OUT_OF_MEMORY, "memory ran out"),
        (RuntimeError("CUDA error: out of memory"), FailureKind.OUT_OF_MEMORY, "memory ran out"),
        (insufficient_memory(), FailureKind.OUT_OF_MEMORY, "memory ran out"),
        (OSError(errno.ENOSPC, "full", "/spool/x"), FailureKind.OUTAGE, "no space is left on"),
        (KeyError("lost"), FailureKind.TRACKER, "clip.mp4: an unexpected KeyError"),
        (RuntimeError(""), FailureKind.TRACKER, "an unexpected RuntimeError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_every_exception_has_its_kind(error: Exception, kind: FailureKind, words: str) -> None:
    with pytest.raises(TaskError) as caught, faults.as_task_errors("clip.mp4", threading.Event()):
        raise error
    assert caught.value.kind is kind
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value is error or caught.value.__cause__ is error


@pytest.mark.parametrize("error", [FetchCancelled("stop"), ConveyorStopped()])
def test_what_gives_up_was_cancelled(error: Exception) -> None:
    with pytest.raises(TaskError) as caught, faults.as_task_errors("clip.mp4", threading.Event()):
        raise error
    assert caught.value.kind is FailureKind.PREEMPTED


def test_a_consequence_of_the_cancellation() -> None:
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(TaskError) as caught, faults.as_task_errors("clip.mp4", cancelled):
        raise OSError("the file was closed under it")
    assert caught.value.kind is FailureKind.PREEMPTED


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupts_pass(error: type[BaseException]) -> None:
    with pytest.raises(error), faults.as_task_errors("clip.mp4", threading.Event()):
        raise error


def test_the_model_is_named_where_it_fails() -> None:
    with pytest.raises(TaskError) as caught, faults.as_tracker_errors("clip.mp4", "flow", 7):
        raise ZeroDivisionError("division by zero")
    assert caught.value.kind is FailureKind.TRACKER
    assert str(caught.value) == (
        "clip.mp4: tracker flow could not track it: it failed in step 7 with ZeroDivisionError: "
        "division by zero"
    )
