"""The metrics' contract.

* The table says all: names are Prometheus names with their unit, labels have few values, and no
  run can have more than a few hundred series, however many workers and videos it has.
* Every metric is told by something that happens in a run, with the labels that the table gives.
* A label without a fixed list keeps the first texts and calls the others ``other``.
* Counters only grow; nobody is at work when a driver has ended.
* Without Ray metrics go nowhere, and asking for its sink does not import it; a broken exporter is
  a line in the log and never an error.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest

from jobs.metrics import (
    COMMON_LABELS,
    GPU_MEMORY,
    LAST_PROGRESS,
    MAX_FREE_VALUES,
    METRICS,
    OTHER,
    TASKS,
    WORKER_TIME,
    WORKERS,
    Metric,
    MetricKind,
    RunMetrics,
    ray_sink,
)
from jobs.records import VideoCommit
from jobs.scheduler import TaskCounts
from workers.errors import FailureKind
from workers.messages import Proposal, Stage, StageStats


class Told:
    """A sink that keeps what it was told."""

    def __init__(self) -> None:
        self.values: list[tuple[Metric, float, dict[str, str]]] = []

    def __call__(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        self.values.append((metric, value, dict(labels)))

    def of(self, metric: Metric) -> list[tuple[float, dict[str, str]]]:
        return [(value, labels) for one, value, labels in self.values if one is metric]


def commit(gpu: str = "", peak: int | None = None) -> VideoCommit:
    video = {
        "frames_tracked": 40,
        "num_masks": 80,
        "wall_s": 2.5,
        "gpu": gpu,
        "peak_gpu_memory_bytes": peak,
    }
    stages = (StageStats(Stage.TRACK, 40, 2.0, 0.25, 0.5), StageStats(Stage.UPLOAD, 900, 0.5))
    return VideoCommit.from_proposal(
        Proposal("1-0-1", video, stages, ()),
        video_key=1,
        identity=2,
        number=1,
        name="a.mp4",
        status="committed",
        queue_s=0.0,
        error_class=None,
    )


def tell_everything(metrics: RunMetrics) -> None:
    metrics.began()
    metrics.failed(FailureKind.TRANSIENT)
    metrics.worker_lost(FailureKind.PREEMPTED)
    metrics.stepped(8, 1e9)
    metrics.committed(commit("H200", 5 << 30), 1e9)
    metrics.quarantined(1, 1e9)
    metrics.logged(0.2)
    metrics.queue(TaskCounts(5, 4, 3, 2, 1, 0))
    metrics.workers({"idle": 1, "busy": 2}, 7.0)
    metrics.speed(100.0, {"H200": 50.0})


def test_the_table_is_fit_for_prometheus() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert re.fullmatch(r"maskmill_[a-z_]+", metric.name)
        assert not metric.name.endswith("_total"), "the exporter adds it"
        assert metric.help.endswith(".")
        assert not set(metric.labels) & set(COMMON_LABELS)
        assert bool(metric.boundaries) == (metric.kind is MetricKind.HISTOGRAM)
        assert list(metric.boundaries) == sorted(metric.boundaries)
    assert sum(metric.max_series * (len(metric.boundaries) + 3) for metric in METRICS) < 500


def test_every_metric_is_told_with_the_labels_of_the_table() -> None:
    told = Told()
    tell_everything(RunMetrics("run-1", "flow", told))
    assert {metric.name for metric, _, _ in told.values} == {metric.name for metric in METRICS}
    for metric, value, labels in told.values:
        assert labels.keys() == {*COMMON_LABELS, *metric.labels}
        assert (labels["run"], labels["tracker"]) == ("run-1", "flow")
        assert value >= 0
        for label, values in metric.labels.items():
            assert not values or labels[label] in values
    assert sorted(labels["state"] for _, labels in told.of(TASKS)) == sorted(TASKS.labels["state"])


def test_a_run_without_workers_is_seen() -> None:
    told = Told()
    RunMetrics("r", "flow", told).started(5.0)
    assert [value for value, _ in told.of(LAST_PROGRESS)] == [5.0]


def test_free_texts_are_bounded() -> None:
    told = Told()
    metrics = RunMetrics("r", "flow", told)
    for number in range(100):
        metrics.committed(commit(f"GPU {number}", 1000 + number), 1e9)
    seen = {labels["gpu"] for _, labels in told.of(GPU_MEMORY)}
    assert len(seen) == MAX_FREE_VALUES + 1
    assert OTHER in seen


def test_gpu_memory_is_the_largest_so_far() -> None:
    told = Told()
    metrics = RunMetrics("r", "flow", told)
    for peak in (5, 3, None, 9):
        metrics.committed(commit("H200", peak), 1e9)
    assert [value for value, _ in told.of(GPU_MEMORY)] == [5, 9]


def test_worker_seconds_grow_and_nobody_works_in_the_end() -> None:
    told = Told()
    metrics = RunMetrics("r", "flow", told)
    for held_s in (3.0, 3.0, 10.0):
        metrics.workers({"busy": 2}, held_s)
    metrics.ended(11.0)
    assert [value for value, _ in told.of(WORKER_TIME)] == [3.0, 7.0, 1.0]
    last = {labels["state"]: value for value, labels in told.of(WORKERS)}
    assert set(last.values()) == {0}


def test_without_ray_metrics_go_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    assert ray_sink() is None
    assert "ray" not in sys.modules
    tell_everything(RunMetrics("r", "flow", ray_sink()))


def test_a_broken_exporter_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray's own objects never fail on demand, so a broken stand-in takes their place."""

    class Broken:
        def __init__(self, name: str, *rest: Any) -> None:
            self.name = name

        def inc(self, value: float, labels: dict[str, str]) -> None:
            raise RuntimeError("the exporter is gone")

        set = observe = inc

    ray, util, exported = ModuleType("ray"), ModuleType("ray.util"), ModuleType("metrics")
    monkeypatch.setattr(ray, "is_initialized", lambda: True, raising=False)
    monkeypatch.setattr(ray, "util", util, raising=False)
    monkeypatch.setattr(util, "metrics", exported, raising=False)
    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(exported, kind, Broken, raising=False)
    for name, module in (("ray", ray), ("ray.util", util), ("ray.util.metrics", exported)):
        monkeypatch.setitem(sys.modules, name, module)
    metrics = RunMetrics("r", "flow", ray_sink())
    for _ in range(3):
        tell_everything(metrics)
    complaints = [line for line in caplog.messages if "told no more" in line]
    assert len(complaints) == len(METRICS), "one line each, not one per value"
