"""What every worker pool offers, and the events it reports: the seam between driver and Ray.

`jobs.pool.RayPool` runs workers as actors, `jobs.threads.ThreadPool` in this process; the driver
knows neither. Events are about attempts and workers by id, so a worker may have many in flight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from workers.errors import (
    ConfigError,
    FailureKind,
    MaskmillError,
    StoreDenied,
    StoreFull,
    TaskError,
)
from workers.messages import Attempt, Progress, Proposal, TaskFailed, WorkerReady


@dataclass(frozen=True, slots=True)
class WorkerUp:
    """A worker has loaded its model and takes attempts."""

    worker_id: str
    ready: WorkerReady


@dataclass(frozen=True, slots=True)
class WorkerDown:
    """A worker is gone, and every attempt it had begun with it; nothing more comes from it."""

    worker_id: str
    kind: FailureKind
    message: str
    error: MaskmillError | None = None
    """What its setup raised, where that is an error of ours."""


@dataclass(frozen=True, slots=True)
class WorkerDraining:
    """A worker's node is going to be taken away; said once, while the worker is in service."""

    worker_id: str
    ends_in_s: float
    """Seconds until the node goes; infinity when nobody said."""


@dataclass(frozen=True, slots=True)
class PoolNotice:
    """Something about the machines that whoever watches the run should know."""

    text: str


@dataclass(frozen=True, slots=True)
class AttemptDone:
    """An attempt ended with something to commit."""

    attempt_id: str
    proposal: Proposal


@dataclass(frozen=True, slots=True)
class AttemptError:
    """An attempt ended with a failure."""

    attempt_id: str
    failed: TaskFailed


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Where the attempts of one worker are."""

    worker_id: str
    progress: tuple[Progress, ...]


Event = WorkerUp | WorkerDown | WorkerDraining | PoolNotice | AttemptDone | AttemptError | Heartbeat


class WorkerClass(Protocol):
    """What a pool makes workers of; `workers.actor.TrackingWorker` is the real one."""

    def __init__(self, spec: Any, *, keep_log: bool = False) -> None: ...

    def setup_on_node(self) -> None:
        """Prepare the node; raises `MaskmillError`."""

    def setup(self) -> WorkerReady:
        """Load the model; raises `MaskmillError`."""

    def process(self, attempt: Attempt) -> Proposal | TaskFailed:
        """Track one video; called from several threads."""

    def progress(self) -> dict[str, Progress]:
        """Return the heartbeats by attempt id; called from any thread."""

    def cancel(self, attempt_id: str) -> None:
        """Stop an attempt soon; called from any thread."""

    def destroy(self) -> None:
        """Stop all attempts and free the model."""


class Pool(Protocol):
    """Workers that can be started, given attempts, killed and listened to.

    Every call returns at once, but for `events`, which waits, and `close`.
    """

    @property
    def num_workers(self) -> int:
        """Workers that the run may have now; with ``auto`` it changes with the cluster."""

    @property
    def is_mixed(self) -> bool:
        """Whether the machines that hold workers are of several kinds."""

    def start_worker(self) -> str:
        """Start a worker and return its id; `WorkerUp` or `WorkerDown` follows."""

    def forgo_worker(self) -> str | None:
        """Give up a worker that has found no place yet; return which, and say no more of it."""

    def gpu_measured(self, peak_bytes: int, total_bytes: int) -> bool:
        """Hear how much memory of its GPU a worker needed.

        Returns
        -------
        bool
            Whether workers started from now on have another share of a GPU.
        """

    def begin(self, worker_id: str, attempt: Attempt) -> None:
        """Send an attempt; `AttemptDone`, `AttemptError` or its worker's `WorkerDown` follows."""

    def cancel(self, worker_id: str, attempt_id: str) -> None:
        """Ask for an attempt's end; the attempt still answers."""

    def kill(self, worker_id: str) -> None:
        """End a worker; no event about it or its attempts follows."""

    def release(self, worker_id: str) -> None:
        """End a worker that runs nothing, in good order; no event about it follows."""

    def events(self, timeout_s: float) -> list[Event]:
        """Return what happened, waiting at most `timeout_s` seconds for the first event."""

    def close(self) -> None:
        """End all workers, politely at first. May be called twice."""


GPU_HEADROOM = 1.2
"""A worker is given this much more GPU memory than was measured: other videos differ."""
GPU_CONTEXT_BYTES = 600 << 20
"""What a process needs on a GPU beside what PyTorch holds: the CUDA context and its kernels."""
GPU_SAMPLES = 3
"""Videos that are measured before workers share a GPU for the first time."""
MAX_PER_GPU = 16
"""More processes on one GPU only wait for each other."""


@dataclass(slots=True)
class GpuPacking:
    """How many workers share a GPU, from the memory that their videos needed.

    Workers begin with a GPU each. After a few videos they share it as far as memory allows; a
    video that needs more than any before makes the shares larger again, never smaller.

    Examples
    --------
    >>> packing = GpuPacking()
    >>> [packing.measured(9 << 30, 80 << 30) for _ in range(3)], packing.share
    ([False, False, True], 0.1428)
    >>> packing.measured(30 << 30, 80 << 30), packing.share
    (True, 0.5)
    """

    share: float = 1.0
    """Share of a GPU that a worker is given."""
    _need: float = 0.0
    _num_samples: int = 0

    def measured(self, peak_bytes: int, total_bytes: int) -> bool:
        """Take a measurement; return whether the share is another now.

        Parameters
        ----------
        peak_bytes : int
            Largest memory that PyTorch held in the worker's process.
        total_bytes : int
            Memory of its GPU.
        """
        if peak_bytes <= 0 or total_bytes <= 0:
            return False
        need = (peak_bytes * GPU_HEADROOM + GPU_CONTEXT_BYTES) / total_bytes
        self._need = max(self._need, need)
        self._num_samples += 1
        if self._num_samples < GPU_SAMPLES:
            return False
        per_gpu = min(MAX_PER_GPU, max(1, int(1 / self._need)))
        share = int(10_000 / per_gpu) / 10_000  # Ray counts in ten-thousandths
        is_other = share != self.share
        self.share = share
        return is_other


def down_after_setup(worker_id: str, error: BaseException) -> WorkerDown:
    """Return the event for a worker whose setup raised.

    Parameters
    ----------
    worker_id : str
        The worker.
    error : BaseException
        What was raised in it.

    Returns
    -------
    WorkerDown
        Refused credentials and full stores are an outage; other errors are kept as they are.
    """
    if isinstance(error, (StoreDenied, StoreFull)):
        return WorkerDown(worker_id, FailureKind.OUTAGE, str(error), error)
    if isinstance(error, TaskError):
        return WorkerDown(worker_id, error.kind, str(error))
    if isinstance(error, MaskmillError):
        return WorkerDown(worker_id, FailureKind.WORKER_LOST, str(error), error)
    if isinstance(error, MemoryError):
        sentence = "memory ran out while the worker loaded its model: give it a node with more"
        return WorkerDown(worker_id, FailureKind.OUT_OF_MEMORY, sentence, ConfigError(sentence))
    first_line = (str(error).strip().splitlines() or [""])[0]
    sentence = f"the worker's setup failed: {type(error).__name__}: {first_line}"
    return WorkerDown(worker_id, FailureKind.WORKER_LOST, sentence)


def failed_attempt(attempt_id: str, error: BaseException, traceback: str) -> AttemptError:
    """Return the event for an attempt whose `process` raised, which it should never do."""
    kind = error.kind if isinstance(error, TaskError) else FailureKind.TRACKER
    first_line = (str(error).strip().splitlines() or [""])[0]
    message = (
        str(error) if isinstance(error, TaskError) else f"{type(error).__name__}: {first_line}"
    )
    return AttemptError(attempt_id, TaskFailed(attempt_id, kind, message, traceback))
