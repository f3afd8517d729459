"""The driver with a million planned videos and 64 simulated workers: memory, and time per task.

Run it with ``python -m tests.benchmarks.driver_scale [--videos N] [--workers N] [--for-s S]``. The
corpus is a manifest that names sizes and etags, so nothing is listed or fetched; the workers are
simulated (`SimulatedPool`): each ends its videos one after another, each after a time drawn from an
exponential distribution, with a proposal without parts. All else is the driver's own: the plan, the
scheduler, the log on this disk, the status, the display's counts.

Printed are the largest resident memory of the process, the driver's own time per task, and the
dispatch latency: from the moment at which a worker has a result to that at which its next attempt
is sent, so writing the log, and whatever else the driver is busy with, is in it. The run is
interrupted after ``--for-s`` seconds.
"""

from __future__ import annotations

import argparse
import heapq
import os
import platform
import random
import resource
import signal
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs import driver
from jobs.config import RunConfig
from jobs.progress import SilentReporter
from jobs.workforce import AttemptDone, Event, WorkerUp
from workers.messages import Attempt, Proposal, Stage, StageStats, WorkerReady
from workers.sinks.schema import DECLARATIONS

STAGES = tuple(StageStats(stage, 100, 0.5) for stage in Stage)
_OF_THE_DRIVER = ("video_key", "name", "status", "attempts", "queue_s", "error_class")
_VALUES = {"string": "simulated", "bool": False, "float32": 4.0, "float64": 4.0}
EMPTY_ROW = {
    column.name: _VALUES.get(column.type, 100)
    for table in DECLARATIONS
    if table.name == "videos"
    for column in table.columns
    if column.name not in _OF_THE_DRIVER
} | {"num_objects": 0, "num_masks": 0, "peak_gpu_memory_bytes": None}
"""A row of `videos` that fits the schema, but for what only the driver knows."""


def proposal(attempt: Attempt) -> Proposal:
    """Return what a worker says of a video in which it found nothing."""
    source = attempt.source
    video = EMPTY_ROW | {"uri": source.uri, "etag": source.etag, "size_bytes": source.size_bytes}
    return Proposal(attempt.attempt_id, video, STAGES, ())


@dataclass
class SimulatedPool:
    """Workers that exist only as names, and end what they are given after a while.

    It stands in for Ray because 64 processes do not fit this machine, and because what is measured
    is the driver alone.
    """

    num_workers: int
    video_s: float
    """Mean time for a video."""
    is_mixed: bool = False
    latencies_s: list[float] = field(default_factory=list)
    _given: dict[str, deque[Attempt]] = field(default_factory=dict)
    _results: list[tuple[float, str]] = field(default_factory=list)
    _waits_since_s: dict[str, float] = field(default_factory=dict)
    _starting: list[str] = field(default_factory=list)
    _chance: random.Random = field(default_factory=lambda: random.Random(0))

    def start_worker(self) -> str:
        """Name a worker; it is ready at the next `events`."""
        worker_id = f"worker-{len(self._given) + 1}"
        self._given[worker_id] = deque()
        self._starting.append(worker_id)
        return worker_id

    def forgo_worker(self) -> str | None:
        """Return None: all have a place."""
        return None

    def gpu_measured(self, peak_bytes: int, total_bytes: int) -> bool:
        """Return False: there is no GPU."""
        return False

    def begin(self, worker_id: str, attempt: Attempt) -> None:
        """Take an attempt, and note how long its worker waited for it."""
        now = time.perf_counter()
        since_s = self._waits_since_s.pop(worker_id, None)
        if since_s is not None:
            self.latencies_s.append(now - since_s)
        given = self._given[worker_id]
        given.append(attempt)
        if len(given) == 1:
            self._track_next(worker_id, now)

    def _track_next(self, worker_id: str, now: float) -> None:
        due_s = now + self._chance.expovariate(1 / self.video_s)
        heapq.heappush(self._results, (due_s, worker_id))

    def cancel(self, worker_id: str, attempt_id: str) -> None:
        """Do nothing: the driver gives up waiting."""

    def kill(self, worker_id: str) -> None:
        """Do nothing: there is no process."""

    def release(self, worker_id: str) -> None:
        """Do nothing: there is no process."""

    def events(self, timeout_s: float) -> list[Event]:
        """Return the results that are due, and who became ready."""
        events: list[Event] = [
            WorkerUp(worker_id, WorkerReady("simulated", "", 1, 0.0))
            for worker_id in self._starting
        ]
        self._starting.clear()
        deadline = time.perf_counter() + timeout_s
        next_s = self._results[0][0] if self._results else deadline
        if not events:
            time.sleep(max(0.0, min(next_s, deadline) - time.perf_counter()))
        now = time.perf_counter()
        while self._results and self._results[0][0] <= now:
            due_s, worker_id = heapq.heappop(self._results)
            attempt = self._given[worker_id].popleft()
            self._waits_since_s[worker_id] = due_s
            if self._given[worker_id]:
                self._track_next(worker_id, due_s)
            events.append(AttemptDone(attempt.attempt_id, proposal(attempt)))
        return events

    def close(self) -> None:
        """Do nothing: there is no process."""


@dataclass(frozen=True)
class Measured:
    """What a simulated run cost its driver."""

    num_planned: int
    num_committed: int
    plan_s: float
    """From the start to the first attempt sent."""
    run_s: float
    busy_s: float
    """Time of the processor that the driver used in it."""
    peak_bytes: int
    latencies_s: np.ndarray


def write_manifest(path: Path, num_videos: int) -> None:
    """Write a manifest of videos that exist nowhere, of log-normal size."""
    dice = np.random.default_rng(0)
    sizes = np.exp(dice.normal(15, 1.2, num_videos)).astype(np.int64) + 10_000
    names = [f"s3://corpus/day-{i // 1000:04d}/video-{i:07d}.mp4" for i in range(num_videos)]
    etags = [f"{i:032x}" for i in range(num_videos)]
    pq.write_table(pa.table({"video": names, "size_bytes": sizes, "etag": etags}), path)


def simulate(
    folder: Path, num_videos: int, num_workers: int, for_s: float, video_s: float = 2.0
) -> Measured:
    """Run the driver for a while.

    Parameters
    ----------
    folder : Path
        An empty folder for manifest and output.
    num_videos, num_workers : int
        Planned videos, simulated workers.
    for_s : float
        Seconds from the first attempt to the interrupt.
    video_s : float
        Mean time that a worker needs for a video.
    """
    write_manifest(folder / "corpus.parquet", num_videos)
    pool = SimulatedPool(num_workers, video_s)
    config = RunConfig.model_validate(
        {
            "corpus": {"manifest": str(folder / "corpus.parquet")},
            "out": {"uri": str(folder / "out")},
            "tracker": {"name": "fake"},
            "prompts": {"allow_unprompted": True},
            "pool": {"workers": num_workers},
        }
    )
    begin_s = first_s = time.monotonic()
    first_busy_s = last_busy_s = 0.0
    over = threading.Event()

    def interrupt() -> None:
        nonlocal first_s, first_busy_s, last_busy_s
        while not pool.latencies_s and not over.wait(0.01):
            pass
        first_s, first_busy_s = time.monotonic(), time.process_time()
        is_over = over.wait(for_s)
        last_busy_s = time.process_time()
        if not is_over:
            os.kill(os.getpid(), signal.SIGINT)

    watch = threading.Thread(target=interrupt, daemon=True)
    watch.start()
    summary = driver.run(config, reporter=SilentReporter(), pool_factory=lambda *_: pool)
    over.set()
    watch.join()
    return Measured(
        num_planned=num_videos,
        num_committed=summary.num_committed,
        plan_s=first_s - begin_s,
        run_s=summary.wall_s,
        busy_s=last_busy_s - first_busy_s,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        latencies_s=np.array(pool.latencies_s),
    )


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--for-s", type=float, default=120.0)
    parser.add_argument("--video-s", type=float, default=2.0, help="mean time for a video")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = simulate(
            Path(folder), options.videos, options.workers, options.for_s, options.video_s
        )
    mean, middle, high, most = (
        1000 * value
        for value in (
            found.latencies_s.mean(),
            *np.quantile(found.latencies_s, [0.5, 0.99]),
            found.latencies_s.max(),
        )
    )
    print(f"{platform.machine()}, {os.cpu_count()} cores")
    print(f"{found.num_planned} planned videos, {options.workers} simulated workers")
    print(f"first attempt after {found.plan_s:.1f} s")
    print(
        f"{found.num_committed} videos in {found.run_s:.0f} s, "
        f"{1000 * found.busy_s / found.num_committed:.2f} ms of the driver's processor each"
    )
    print(
        f"dispatch latency: mean {mean:.2f} ms, median {middle:.2f} ms, 99 % {high:.2f} ms, "
        f"longest {most:.0f} ms"
    )
    print(f"largest resident memory: {found.peak_bytes / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
