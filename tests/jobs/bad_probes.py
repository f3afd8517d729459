"""Probes that misbehave, by the name of their video; child processes import them from here."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from jobs import probe
from jobs.probe import ProbeRow
from workers.errors import StoreUnavailable
from workers.messages import StoreOptions, VideoSource


def crash_on_b(source: VideoSource, options: StoreOptions) -> ProbeRow:
    """Die over ``b``, as native code does over a file that was made for it."""
    if source.name == "b":
        os.kill(os.getpid(), signal.SIGKILL)
    return probe._probe(source, options)


def crash(source: VideoSource, options: StoreOptions) -> ProbeRow:
    """Die over everything, leaving a line in the file that the URI names."""
    with Path(source.uri).open("a") as calls:
        calls.write("x\n")
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError("not reached")


def fail(source: VideoSource, options: StoreOptions) -> ProbeRow:
    """Meet a store that does not answer, leaving a line as `crash` does."""
    with Path(source.uri).open("a") as calls:
        calls.write("x\n")
    raise StoreUnavailable("503")


def hang(source: VideoSource, options: StoreOptions) -> ProbeRow:
    """Write the process id into the file that the URI names, then hang."""
    path = Path(source.uri)
    path.with_suffix(".tmp").write_text(str(os.getpid()))
    path.with_suffix(".tmp").replace(path)
    time.sleep(3600)
    return ProbeRow()
