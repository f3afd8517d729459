"""Live metrics of a run, scraped by Prometheus from Ray's exporters: what, under which name.

The table `METRICS` is what dashboards and alert rules are written against. Everything is told by
the driver, which hears of every attempt, so a worker that dies takes no series with it. Metrics are
for watching: Ray gathers them every few seconds, keeps them on the driver's node and starts from
nothing with the next driver. Numbers that must be right come from the log: the tables `videos`,
`stages`, `workers` and `runs`.

This file imports `ray.util.metrics`, late, beside `jobs.pool`, because these objects are Ray's own
way to its exporter; it calls nothing else of Ray. Without Ray metrics go nowhere.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from workers.errors import FailureKind
from workers.messages import Stage

if TYPE_CHECKING:
    from jobs.records import VideoCommit
    from jobs.scheduler import TaskCounts

_log = logging.getLogger(__name__)

EXPORT_PREFIX = "ray_"
"""Ray puts it before the names of all metrics that it exports."""
MAX_FREE_VALUES = 16
"""Different texts of a label without a fixed list (models of GPUs); later ones are ``other``."""
OTHER = "other"


class MetricKind(StrEnum):
    """What Prometheus calls the type of a metric."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes
    ----------
    name : str
        Name, without what the exporter adds.
    kind : MetricKind
        Its type.
    help : str
        One sentence; units are in the name.
    labels : Mapping of str to tuple of str
        Values that each label may have, beside the labels of every metric. An empty tuple is free
        text, of which the first `MAX_FREE_VALUES` are kept apart.
    boundaries : tuple of float
        Upper bounds of a histogram's buckets.
    """

    name: str
    kind: MetricKind
    help: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    boundaries: tuple[float, ...] = ()

    @property
    def exported_name(self) -> str:
        """Name in Prometheus; a histogram has ``_bucket``, ``_sum`` and ``_count`` after it."""
        suffix = "_total" if self.kind is MetricKind.COUNTER else ""
        return f"{EXPORT_PREFIX}{self.name}{suffix}"

    @property
    def max_series(self) -> int:
        """Most combinations of label values that one run can have."""
        count = 1
        for values in self.labels.values():
            count *= len(values) or MAX_FREE_VALUES + 1
        return count


COMMON_LABELS = ("run", "tracker")
"""Labels of every metric: the run's id and the tracker's name, one value each per driver."""

OUTCOMES = ("committed", "quarantined")
FAILURES = tuple(kind.value for kind in FailureKind)
STAGES = tuple(stage.value for stage in Stage)
TASK_STATES = ("pending", "running", "retrying", "withheld")
WORKER_STATES = ("starting", "idle", "busy", "draining")
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_SHORT_TO_HOURS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0, 30_000.0)

VIDEOS = Metric(
    "maskmill_videos",
    MetricKind.COUNTER,
    "Videos that this driver settled.",
    {"outcome": OUTCOMES},
)
FRAMES = Metric(
    "maskmill_frames",
    MetricKind.COUNTER,
    "Frames stepped by trackers, those of attempts that came to nothing included.",
)
FRAMES_COMMITTED = Metric(
    "maskmill_frames_committed",
    MetricKind.COUNTER,
    "Frames of the videos that this driver committed.",
)
MASKS_COMMITTED = Metric(
    "maskmill_masks_committed",
    MetricKind.COUNTER,
    "Masks of the videos that this driver committed.",
)
ATTEMPTS = Metric("maskmill_attempts", MetricKind.COUNTER, "Attempts sent to a worker.")
FAILED_ATTEMPTS = Metric(
    "maskmill_failed_attempts",
    MetricKind.COUNTER,
    "Attempts that came to nothing, by failure kind; what is cancelled counts as preempted.",
    {"kind": FAILURES},
)
STAGE_BUSY = Metric(
    "maskmill_stage_busy_seconds",
    MetricKind.COUNTER,
    "Busy seconds per stage, summed over committed videos.",
    {"stage": STAGES},
)
STAGE_WAITING = Metric(
    "maskmill_stage_waiting_seconds",
    MetricKind.COUNTER,
    "Seconds that stages of committed videos waited for the one before (input) or after (output).",
    {"stage": STAGES, "side": ("input", "output")},
)
WORKER_TIME = Metric(
    "maskmill_worker_seconds",
    MetricKind.COUNTER,
    "Seconds that workers were held, loading included: what --budget-hours counts.",
)
WORKERS_LOST = Metric(
    "maskmill_lost_workers",
    MetricKind.COUNTER,
    "Workers that ended without being told to, by failure kind.",
    {"kind": FAILURES},
)
COMMIT_LATENCY = Metric(
    "maskmill_commit_latency_seconds",
    MetricKind.HISTOGRAM,
    "From a video's result at the driver to its record in the log.",
    boundaries=_SECONDS,
)
VIDEO_TIME = Metric(
    "maskmill_video_seconds",
    MetricKind.HISTOGRAM,
    "From the begin of a committed attempt on its worker to its last part uploaded.",
    boundaries=_SHORT_TO_HOURS,
)
TASKS = Metric(
    "maskmill_tasks",
    MetricKind.GAUGE,
    "Videos not settled yet, by where they are: the depth of the queue.",
    {"state": TASK_STATES},
)
WORKERS = Metric(
    "maskmill_workers", MetricKind.GAUGE, "Workers, by what they do.", {"state": WORKER_STATES}
)
FRAMES_PER_SECOND = Metric(
    "maskmill_frames_per_second", MetricKind.GAUGE, "Frames stepped per second, over half a minute."
)
WORKER_SPEED = Metric(
    "maskmill_worker_frames_per_second",
    MetricKind.GAUGE,
    "Mean speed of the workers on one model of GPU while they track; no name is a CPU.",
    {"gpu": ()},
)
GPU_MEMORY = Metric(
    "maskmill_gpu_memory_bytes",
    MetricKind.GAUGE,
    "Largest memory that PyTorch held for a video so far, by model of GPU.",
    {"gpu": ()},
)
LAST_PROGRESS = Metric(
    "maskmill_last_progress_timestamp_seconds",
    MetricKind.GAUGE,
    "Unix time of the start, then of the last frame stepped or video settled: a stuck run leaves "
    "it behind.",
)

METRICS = (
    VIDEOS,
    FRAMES,
    FRAMES_COMMITTED,
    MASKS_COMMITTED,
    ATTEMPTS,
    FAILED_ATTEMPTS,
    STAGE_BUSY,
    STAGE_WAITING,
    WORKER_TIME,
    WORKERS_LOST,
    COMMIT_LATENCY,
    VIDEO_TIME,
    TASKS,
    WORKERS,
    FRAMES_PER_SECOND,
    WORKER_SPEED,
    GPU_MEMORY,
    LAST_PROGRESS,
)
"""All metrics; nothing else is exported under ``maskmill_``."""

Sink = Callable[[Metric, float, Mapping[str, str]], None]
"""Takes one value of one metric: an increment, a level or an observation, with all its labels."""


class RunMetrics:
    """What the driver tells about one run.

    Parameters
    ----------
    run_id, tracker : str
        Values of the labels that every metric has.
    sink : callable, optional
        Where values go; nowhere without.
    """

    def __init__(self, run_id: str, tracker: str, sink: Sink | None = None) -> None:
        self._common = dict(zip(COMMON_LABELS, (run_id, tracker), strict=True))
        self._sink = sink
        self._free: dict[str, set[str]] = {}
        self._gpu_memory: dict[str, int] = {}
        self._worker_s = 0.0

    def started(self, now_s: float) -> None:
        """Tell that there is a run, which may wait long for its first worker; Unix time."""
        self._tell(LAST_PROGRESS, now_s)

    def began(self) -> None:
        """Count an attempt that was sent to a worker."""
        self._tell(ATTEMPTS, 1)

    def failed(self, kind: FailureKind) -> None:
        """Count an attempt that came to nothing."""
        self._tell(FAILED_ATTEMPTS, 1, kind=kind.value)

    def worker_lost(self, kind: FailureKind) -> None:
        """Count a worker that ended without being told to."""
        self._tell(WORKERS_LOST, 1, kind=kind.value)

    def stepped(self, num_frames: int, now_s: float) -> None:
        """Count frames that trackers have stepped; `now_s` is Unix time."""
        if num_frames > 0:
            self._tell(FRAMES, num_frames)
            self._tell(LAST_PROGRESS, now_s)

    def committed(self, commit: VideoCommit, now_s: float) -> None:
        """Count a video that is accepted, with its frames, masks and stages."""
        video = commit.video
        self._tell(VIDEOS, 1, outcome="committed")
        self._tell(FRAMES_COMMITTED, float(video["frames_tracked"]))
        self._tell(MASKS_COMMITTED, float(video["num_masks"]))
        self._tell(VIDEO_TIME, float(video["wall_s"]))
        self._tell(LAST_PROGRESS, now_s)
        for stats in commit.stages:
            stage = stats.stage.value
            self._tell(STAGE_BUSY, stats.busy_s, stage=stage)
            self._tell(STAGE_WAITING, stats.wait_input_s, stage=stage, side="input")
            self._tell(STAGE_WAITING, stats.wait_output_s, stage=stage, side="output")
        gpu, peak = str(video["gpu"]), video["peak_gpu_memory_bytes"]
        if peak is not None and peak > self._gpu_memory.get(gpu, 0):
            self._gpu_memory[gpu] = peak
            self._tell(GPU_MEMORY, peak, gpu=gpu)

    def quarantined(self, num_videos: int, now_s: float) -> None:
        """Count videos that were set aside."""
        self._tell(VIDEOS, num_videos, outcome="quarantined")
        self._tell(LAST_PROGRESS, now_s)

    def logged(self, latency_s: float) -> None:
        """Observe how long a result waited for its record in the log."""
        self._tell(COMMIT_LATENCY, latency_s)

    def queue(self, counts: TaskCounts) -> None:
        """Tell where the unsettled videos are."""
        for state in TASK_STATES:
            self._tell(TASKS, getattr(counts, state), state=state)

    def workers(self, states: Mapping[str, int], worker_s: float) -> None:
        """Tell what the workers do, and how long all of them were held since the start."""
        for state in WORKER_STATES:
            self._tell(WORKERS, states.get(state, 0), state=state)
        self._tell(WORKER_TIME, worker_s - self._worker_s)
        self._worker_s = max(worker_s, self._worker_s)

    def speed(self, frames_per_s: float, by_gpu: Mapping[str, float]) -> None:
        """Tell how fast the run is, and a worker on each model of GPU."""
        self._tell(FRAMES_PER_SECOND, frames_per_s)
        for gpu, speed in by_gpu.items():
            self._tell(WORKER_SPEED, speed, gpu=gpu)

    def ended(self, worker_s: float) -> None:
        """Tell that nobody works any more; what is left in the queue stays told as it is.

        The exporter forgets levels some twenty seconds after a driver's end, and counters with the
        node that the driver ran on.
        """
        self.workers({}, worker_s)
        self.speed(0.0, {})

    def _tell(self, metric: Metric, value: float, **labels: str) -> None:
        if self._sink is None or (metric.kind is MetricKind.COUNTER and value <= 0):
            return
        for name, text in labels.items():
            if not metric.labels[name]:
                labels[name] = self._bounded(name, text)
        self._sink(metric, value, self._common | labels)

    def _bounded(self, name: str, text: str) -> str:
        known = self._free.setdefault(name, set())
        if len(known) < MAX_FREE_VALUES:
            known.add(text)
        return text if text in known else OTHER


def ray_sink() -> Sink | None:
    """Return a sink that hands values to the exporter of this node, or None without Ray.

    Returns
    -------
    callable or None
        It never raises: a metric that cannot be told is told no more, with one line in the log.
    """
    # Whoever joined a cluster has imported it; asking must not import it.
    ray: Any = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    from ray.util import metrics as exported

    made: dict[str, Any] = {}
    broken: set[str] = set()

    def make(metric: Metric) -> Any:
        keys = (*COMMON_LABELS, *metric.labels)
        match metric.kind:
            case MetricKind.COUNTER:
                return exported.Counter(metric.name, metric.help, keys).inc
            case MetricKind.GAUGE:
                return exported.Gauge(metric.name, metric.help, keys).set
            case MetricKind.HISTOGRAM:
                bounds = list(metric.boundaries)
                return exported.Histogram(metric.name, metric.help, bounds, keys).observe

    def tell(metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        if metric.name in broken:
            return
        try:
            if metric.name not in made:
                made[metric.name] = make(metric)
            made[metric.name](float(value), dict(labels))
        except Exception as error:  # whatever ails the exporter, it must not end a run
            broken.add(metric.name)
            _log.warning("the metric %s is told no more: %s", metric.name, error)

    return tell
