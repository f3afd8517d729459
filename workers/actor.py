"""The worker: one loaded tracker, and the videos that are sent to it.

A plain class without Ray: `jobs.pool` wraps it, tests and notebooks use it as it is. Its life is
``setup_on_node`` (weights to this node), ``setup`` (weights into memory), any number of
``process``, and ``destroy``. Whatever happens to a video comes back as data; only the death of the
process, or a failed setup, is an exception.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import sys
import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workers import faults
from workers.errors import (
    ConfigError,
    FailureKind,
    MaskmillError,
    PreemptedError,
    StoreError,
    TaskError,
    is_out_of_memory,
)
from workers.logs import RunLog, log_context, process_name
from workers.messages import (
    Attempt,
    Phase,
    Progress,
    PromptMode,
    Proposal,
    TaskFailed,
    WorkerReady,
    WorkerSpec,
)
from workers.pipeline import track_video
from workers.prompts.detector import create_detector
from workers.sinks.parts import warm_up
from workers.spool import remove_abandoned
from workers.stepping import Stepper
from workers.storage import open_store
from workers.trackers.base import TrackingConfig, TrackingModelLoader
from workers.trackers.registry import create_tracking_loader, tracker_info
from workers.weights import WeightsFile, fetch_weights

if TYPE_CHECKING:
    from workers.prompts.detector import Detector

PROBE_PREFIX = "_probe/"
"""Below it a worker writes, reads and deletes a small object at its setup."""

_LOG_EVERY_S = 300.0
"""How often a worker puts its log lines into the output, in seconds; after a failure at once."""
_STOP_S = 20.0
"""How long `destroy` waits for attempts to stop, in seconds."""
_PACKAGES = (
    "maskmill",
    "av",
    "numpy",
    "opencv-python-headless",
    "pyarrow",
    "pycocotools",
    "torch",
    "torchvision",
    "ultralytics-opencv-headless",
    "ultralytics",
)

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Running:
    """One attempt in this worker."""

    attempt: Attempt
    cancelled: threading.Event = field(default_factory=threading.Event)
    phase: Phase = Phase.DOWNLOADING
    num_steps: int = 0
    num_masks: int = 0
    num_bytes: int = 0

    def report(self, phase: Phase, num_steps: int, num_masks: int = 0, num_bytes: int = 0) -> None:
        self.phase, self.num_steps = phase, num_steps
        self.num_masks, self.num_bytes = num_masks, num_bytes

    def progress(self) -> Progress:
        return Progress(
            self.attempt.attempt_id, self.phase, self.num_steps, self.num_masks, self.num_bytes
        )


class TrackingWorker:
    """One loaded tracker, and the videos that are sent to it.

    `process` may be called from several threads, for ``videos_in_flight`` videos at once and one
    more, which is prefetched. `progress` and `cancel` may be called at any time, from any thread.

    Parameters
    ----------
    spec : WorkerSpec
        What is the same for every video of the run.
    keep_log : bool
        Whether this process' log lines are put into the output from here. Not where the worker
        shares its process with the driver, which does it for both.
    """

    def __init__(self, spec: WorkerSpec, *, keep_log: bool = False) -> None:
        self.spec = spec
        self.ready: WorkerReady | None = None
        self._tracker_file: WeightsFile | None = None
        self._detector_file: WeightsFile | None = None
        self._loader: TrackingModelLoader | None = None
        self._detector: Detector | None = None
        self._turns = _Turns(spec.videos_in_flight)
        self._stepper: Stepper | None = None
        self._running: dict[str, _Running] = {}
        self._lock = threading.Lock()
        self._stopped = False
        self._kept_log = _KeptLog(spec) if keep_log else None

    def setup_on_node(self) -> None:
        """Prepare this node; safe to call from every worker of it.

        Brings the weights, and removes the local files of workers that were killed here.

        Raises
        ------
        ConfigError
            A checkpoint is missing, truncated, or not what it should be.
        StoreError
            The store of a checkpoint is unreachable or denies access.
        """
        remove_abandoned(self.spec.spool_dir)
        tracker, detector = self.spec.tracker, self.spec.detector
        if tracker.checkpoint is not None and self._tracker_file is None:
            try:
                file_name = tracker_info(tracker.name).weights
            except ValueError as error:
                raise ConfigError(str(error)) from error
            self._tracker_file = fetch_weights(
                tracker.checkpoint, self.spec.corpus_store, file_name=file_name
            )
        if detector is not None and detector.checkpoint is not None and self._detector_file is None:
            self._detector_file = fetch_weights(detector.checkpoint, self.spec.corpus_store)

    def setup(self) -> WorkerReady:
        """Load tracker and detector, and prove that the output can be written.

        Returns
        -------
        WorkerReady
            Where this worker runs and what it loaded.

        Raises
        ------
        ConfigError
            The tracker, an option, the detector or their weights are wrong.
        StoreError
            The output cannot be written, or another machine's view of it is not ours.
        """
        begin = time.perf_counter()
        self._prove_output()
        self.setup_on_node()
        _limit_threads(self.spec.num_threads)
        self._loader = self._load_tracker()
        self._stepper = Stepper(self._loader)
        self._detector = self._load_detector()
        warm_up()
        # Again, for the libraries that were imported on the way.
        _limit_threads(self.spec.num_threads)
        classes: Mapping[int, str] = (
            self._detector.classes if self._detector is not None else self._loader.classes
        )
        self.ready = WorkerReady(
            host=platform.node(),
            gpu=_gpu_name(),
            pid=os.getpid(),
            load_s=time.perf_counter() - begin,
            tracker_sha256=self._tracker_file.sha256 if self._tracker_file else "",
            detector_sha256=self._detector_file.sha256 if self._detector_file else "",
            classes=dict(classes),
            versions=software_versions(),
            gpu_memory_bytes=_gpu_memory_bytes(),
            dtype=self._loader.dtype,
        )
        _log.info("worker ready after %.1f s", self.ready.load_s)
        return self.ready

    def process(self, attempt: Attempt) -> Proposal | TaskFailed:
        """Track one video.

        Parameters
        ----------
        attempt : Attempt
            The video, its prompts, and where its parts go.

        Returns
        -------
        Proposal or TaskFailed
            What may be committed, or why there is nothing.
        """
        running = _Running(attempt)
        with self._lock:
            if self._stopped:
                running.cancelled.set()
            self._running[attempt.attempt_id] = running
        source = attempt.source
        with log_context(
            run_id=self.spec.run_id,
            video=source.name,
            video_key=source.video_key,
            attempt_id=attempt.attempt_id,
        ):
            try:
                return self._track(running)
            except Exception as error:
                return self._failed(attempt, error)
            finally:
                with self._lock:
                    self._running.pop(attempt.attempt_id, None)

    def progress(self) -> dict[str, Progress]:
        """Return the heartbeat of every attempt in this worker, by attempt id."""
        with self._lock:
            running = list(self._running.values())
        return {one.attempt.attempt_id: one.progress() for one in running}

    def cancel(self, attempt_id: str) -> None:
        """Stop an attempt soon; its `process` returns a TaskFailed. An unknown id is no error."""
        with self._lock:
            running = self._running.get(attempt_id)
        if running is not None:
            running.cancelled.set()

    def destroy(self) -> None:
        """Stop everything and free the model; may be called twice."""
        with self._lock:
            self._stopped = True
            running = list(self._running.values())
        for one in running:
            one.cancelled.set()
        deadline = time.monotonic() + _STOP_S
        while self.progress() and time.monotonic() < deadline:
            time.sleep(0.05)
        if self._detector is not None:
            self._detector.unload()
        if self._loader is not None:
            self._loader.unload()
        self._detector = self._loader = self._stepper = None
        _free_gpu()
        if self._kept_log is not None:
            self._kept_log.close()
            self._kept_log = None

    def _track(self, running: _Running) -> Proposal:
        if self._loader is None:
            if self._stopped:
                raise PreemptedError(f"{running.attempt.source.name}: the worker was stopped")
            raise ConfigError("the worker is not set up: call setup() before process()")
        attempt = running.attempt
        weight = self.spec.videos_in_flight if attempt.small_profile else 1
        _log.info("attempt %d begins", attempt.number)
        proposal = track_video(
            attempt,
            self.spec,
            self._loader,
            self._detector,
            report=running.report,
            gate=self._turns.turn(running.cancelled, weight),
            cancelled=running.cancelled,
            stepper=self._stepper,
            worker=self.ready,
        )
        _log.info(
            "staged %d frames and %d masks, %.1f frames/s",
            proposal.video["frames_tracked"],
            proposal.video["num_masks"],
            proposal.video["fps_end_to_end"],
        )
        return proposal

    def _failed(self, attempt: Attempt, error: Exception) -> TaskFailed:
        if not isinstance(error, TaskError):
            error = faults.task_error(error, attempt.source.name)
        text = "".join(traceback.format_exception(error))
        kind = error.kind if isinstance(error, TaskError) else FailureKind.TRACKER
        _log.warning("attempt %d failed (%s): %s", attempt.number, kind.value, error)
        kept_log = self._kept_log
        if kept_log is not None:
            # Whoever looks for the reason finds it now, also if this process dies next.
            kept_log.write_soon()
        if kind is FailureKind.OUT_OF_MEMORY:
            _free_gpu()
        return TaskFailed(attempt.attempt_id, kind, str(error), text)

    def _load_tracker(self) -> TrackingModelLoader:
        spec = self.spec.tracker
        config = TrackingConfig(
            spec.name,
            device=spec.device,
            checkpoint_path=str(self._tracker_file.path) if self._tracker_file else None,
            image_size=spec.image_size,
            dtype=spec.dtype,
            options=spec.options,
        )
        try:
            loader = create_tracking_loader(spec.name, config)
            loader.load()
        except (ValueError, RuntimeError, ImportError) as error:
            if is_out_of_memory(error):
                raise
            raise ConfigError(str(error)) from error
        if not loader.can_track and self.spec.prompt_mode is not PromptMode.EVERY_FRAME:
            raise ConfigError(
                "this checkpoint can segment frames, not track: give a complete checkpoint, or "
                "--prompt-mode every_frame"
            )
        return loader

    def _load_detector(self) -> Detector | None:
        if self.spec.detector is None:
            return None
        path = self._detector_file.path if self._detector_file else None
        detector = create_detector(
            self.spec.detector, device=self.spec.tracker.device, checkpoint_path=path
        )
        detector.load()
        return detector

    def _prove_output(self) -> None:
        """Write, read back and delete a small object: this worker sees the output."""
        store = open_store(self.spec.out_uri, self.spec.out_store)
        key = f"{PROBE_PREFIX}worker-{uuid.uuid4().hex}"
        text = f"{platform.node()} {os.getpid()}".encode()
        store.write_bytes(key, text)
        try:
            if store.read_bytes(key) != text:
                raise StoreError(
                    f"{store.uri} gives back something else than what {platform.node()} wrote: "
                    f"check the store with maskmill doctor"
                )
        except FileNotFoundError as error:
            raise StoreError(
                f"{store.uri} does not show what {platform.node()} has just written: check the "
                f"store with maskmill doctor"
            ) from error
        finally:
            store.delete([key])


class _KeptLog:
    """Puts this process' log lines into the output, in a thread that no attempt waits for.

    Parameters
    ----------
    spec : WorkerSpec
        The run and its output.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._run_log = RunLog(spec.run_id, process_name("worker"))
        self._run_log.__enter__()
        self._due = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="maskmill-log", daemon=True)
        self._thread.start()

    def write_soon(self) -> None:
        """Write what there is, instead of waiting for the next time."""
        self._due.set()

    def close(self) -> None:
        """Write the rest and listen no more."""
        self._closed = True
        self._due.set()
        self._thread.join(_STOP_S)
        self._write()
        self._run_log.__exit__(None, None, None)

    def _work(self) -> None:
        while not self._closed:
            self._due.wait(_LOG_EVERY_S)
            self._due.clear()
            self._write()

    def _write(self) -> None:
        try:
            self._run_log.write_to(open_store(self._spec.out_uri, self._spec.out_store))
        except MaskmillError as error:
            # Losing log lines must never cost a video; they are kept for the next try.
            _log.warning("the log could not be written: %s", error)


class _Turns:
    """Who may use the tracker: first come, first served, a few at a time.

    Parameters
    ----------
    num_slots : int
        Videos that may be tracked at the same time.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_free = num_slots
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def turn(self, cancelled: threading.Event, weight: int = 1) -> Iterator[None]:
        """Hold `weight` slots; PreemptedError when the attempt is cancelled while it waits."""
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                while self._queue[0] is not ticket or self._num_free < weight:
                    if cancelled.is_set():
                        raise PreemptedError("the attempt was cancelled while it waited")
                    self._changed.wait(0.25)
                self._num_free -= weight
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._num_free += weight
                self._changed.notify_all()


def software_versions() -> dict[str, str]:
    """Return the versions of the packages that matter for results, those that are installed."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _limit_threads(num_threads: int) -> None:
    """Keep every library to the threads this worker was given."""
    import cv2
    import pyarrow as pa

    cv2.setNumThreads(num_threads)
    pa.set_cpu_count(num_threads)
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(num_threads)


def _gpu_name() -> str:
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return ""
    return str(torch.cuda.get_device_name())


def _gpu_memory_bytes() -> int:
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return 0
    return int(torch.cuda.mem_get_info()[1])


def _free_gpu() -> None:
    """Give cached GPU memory back, so that what comes next finds it."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
