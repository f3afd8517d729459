"""What is settled before the first video: is the output fit, what made it, what are we running.

Everything here either answers or refuses with a sentence; nothing here changes an output.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from types import FrameType

from jobs.commit_log import read_state, told_of_output
from jobs.config import LimitsConfig, NotifyConfig, OutConfig, PoolConfig, RunConfig
from jobs.flags import command_words
from jobs.recency import settled
from jobs.status import STATUS_KEY
from workers.errors import StoreError
from workers.storage import Store, probe_store
from workers.trackers.registry import tracker_info
from workers.weights import fetch_weights

WATCH_LIVE_S = 12.0
"""A living driver overwrites its status within this, even if it misses one turn."""


def owner_name() -> str:
    """Return who holds a fence: host, process and something unique."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"


def prove_store(store: Store, *, single_driver: bool) -> None:
    """Refuse an output on which two drivers could not be kept apart.

    Raises
    ------
    StoreError
        The store ignores conditional writes, or does not show what was written.
    """
    with told_of_output(store):
        report = probe_store(store)
    if not (report.read_after_write and report.list_after_write and report.overwrite):
        raise StoreError(f"{store.uri} cannot hold a run: {report.problems[0]}; use another store")
    if not report.create_if_absent and not single_driver:
        raise StoreError(
            f"{store.uri} cannot keep two drivers apart: {report.problems[0]}; use a store with "
            f"conditional writes, or pass --single-driver if no other driver will ever write there"
        )


def refuse_live(store: Store) -> None:
    """Refuse to start while another driver is at work on an output.

    A log that is not closed belongs to a driver that works or to one that died. No clock can tell
    which, since two machines' clocks differ; but a living one overwrites its status every few
    seconds and appends to the log, so it is watched for somewhat longer than that.

    Parameters
    ----------
    store : Store
        The output.

    Raises
    ------
    StoreError
        A driver gave a sign of life.
    """
    state = read_state(store)
    if state.last_seq == 0 or state.closed:
        return
    status = _status_bytes(store)
    deadline = time.monotonic() + WATCH_LIVE_S
    while time.monotonic() < deadline:
        time.sleep(1.0)
        seen = read_state(store)
        if seen.closed:
            return
        if seen.last_seq != state.last_seq or _status_bytes(store) != status:
            raise StoreError(
                f"driver {seen.owner} is at work on {store.uri}: let it finish, or start with "
                f"--if-running take-over to fence it out"
            )


def _status_bytes(store: Store) -> bytes | None:
    try:
        return store.read_bytes(STATUS_KEY)
    except FileNotFoundError:
        return None


def reproduce_command(config: RunConfig, uri: str) -> str:
    """Return a command that tries one video alone, with everything that its masks depend on.

    Parameters
    ----------
    config : RunConfig
        The run.
    uri : str
        The video. The corpus stays as it was asked for, so that prompts find it by its name.

    Returns
    -------
    str
        For a shell; its output is a new folder here.
    """
    corpus = config.corpus.model_copy(
        update={"videos": (uri,), "limit": None, "sample": None, "seed": 0}
    )
    alone = config.model_copy(
        update={
            "corpus": corpus,
            # One flag speaks of both stores.
            "out": OutConfig(
                uri="./reproduce", store=corpus.store.model_copy(update={"anonymous": False})
            ),
            "pool": PoolConfig(workers=1, stuck_after_s=config.pool.stuck_after_s),
            "limits": LimitsConfig(),
            "notify": NotifyConfig(),
        }
    )
    return shlex.join(["maskmill", "run", *command_words(alone)])


def with_labels(known: Mapping[int, str], labels: Sequence[str]) -> dict[int, str]:
    """Return the categories of an output: those it has keep their ids, new labels follow.

    Examples
    --------
    >>> with_labels({}, ["cat", "dog"])
    {1: 'cat', 2: 'dog'}
    >>> with_labels({1: "cat", 2: "dog"}, ["ant", "dog"])
    {1: 'cat', 2: 'dog', 3: 'ant'}
    """
    categories = dict(known)
    for label in labels:
        if label not in categories.values():
            categories[max(categories, default=0) + 1] = label
    return categories


def with_settled_window(config: RunConfig) -> RunConfig:
    """Return a configuration with times for the ages of ``--since`` and ``--until``.

    An age counts from now, and the configuration is stored and read again days later, or waits in
    the queue of a cluster.
    """
    since, until = settled(config.corpus.since, config.corpus.until, datetime.now(UTC))
    corpus = config.corpus.model_copy(update={"since": since, "until": until})
    return config.model_copy(update={"corpus": corpus})


def weights_sha256(config: RunConfig, checkpoint: str | None) -> str:
    """Return the digest of a checkpoint; empty where there is none."""
    if checkpoint is None:
        return ""
    tracker = config.tracker
    file_name = tracker_info(tracker.name).weights if checkpoint == tracker.checkpoint else ""
    store = config.corpus.store.options()
    return fetch_weights(checkpoint, store, file_name=file_name).sha256


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Turn the first SIGINT or SIGTERM into an event; the second ends the process as usual."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
