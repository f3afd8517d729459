"""What is settled before the first video: is the output fit, what made it, what are we running.

Everything here either answers or refuses with a sentence; nothing here changes an output.
"""

from __future__ import annotations

import contextlib
import platform
import shlex
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from types import FrameType

from jobs.commit_log import read_state
from jobs.config import RunConfig
from workers.errors import ConfigError, StoreError
from workers.storage import Store, probe_store
from workers.weights import fetch_weights


def stored_config(store: Store) -> RunConfig:
    """Return the configuration that an output was made with.

    Raises
    ------
    ConfigError
        The output holds no run.
    """
    plan = read_state(store).plan
    if plan is None:
        raise ConfigError(f"{store.uri} holds no run: give the --out of an earlier maskmill run")
    return RunConfig.model_validate(plan.config)


def prove_store(store: Store, *, single_driver: bool) -> None:
    """Refuse an output on which two drivers could not be kept apart.

    Raises
    ------
    StoreError
        The store ignores conditional writes, or does not show what was written.
    """
    report = probe_store(store)
    if not (report.read_after_write and report.list_after_write and report.overwrite):
        raise StoreError(f"{store.uri} cannot hold a run: {report.problems[0]}; use another store")
    if not report.create_if_absent and not single_driver:
        raise StoreError(
            f"{store.uri} cannot keep two drivers apart: {report.problems[0]}; use a store with "
            f"conditional writes, or pass --single-driver if no other driver will ever write there"
        )


def reproduce_command(config: RunConfig, uri: str) -> str:
    """Return a command that tries one video alone."""
    words = ["maskmill", "run", uri, "--out", "./reproduce", "--workers", "1"]
    words += ["--tracker", config.tracker.name]
    if config.tracker.checkpoint:
        words += ["--checkpoint", config.tracker.checkpoint]
    if config.tracker.image_size:
        words += ["--image-size", str(config.tracker.image_size)]
    for key, value in config.tracker.options.items():
        words += ["--option", f"{key}={value}"]
    prompts = config.prompts
    if prompts.detector is not None:
        words += ["--detector", prompts.detector.name]
        if prompts.detector.checkpoint:
            words += ["--detector-checkpoint", prompts.detector.checkpoint]
    elif prompts.file is not None:
        words += ["--prompts", prompts.file]
    elif prompts.dir is not None:
        words += ["--prompts-dir", prompts.dir]
    if config.corpus.store.endpoint_url:
        words += ["--endpoint-url", config.corpus.store.endpoint_url]
    return shlex.join(words)


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


def package_versions() -> dict[str, str]:
    """Return the versions of what results depend on, where it is installed."""
    versions = {"python": platform.python_version()}
    for name in ("maskmill", "ray", "numpy", "pyarrow", "av", "opencv-python-headless", "torch"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def weights_sha256(config: RunConfig, checkpoint: str | None) -> str:
    """Return the digest of a checkpoint; empty where there is none."""
    if checkpoint is None:
        return ""
    return fetch_weights(checkpoint, config.corpus.store.options()).sha256


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
