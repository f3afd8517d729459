"""Contract: workers and nodes come and go, and the dataset does not show it.

One run on a real cluster with token authentication: the driver is killed with a video committed
and is started again; both nodes are drained, as before a spot interruption, one with time for the
video on its worker and one without; a node of another type joins. Then:

* The drained nodes' workers get no new video; what they could not end was stopped and tried again
  elsewhere, and is not charged; nothing is lost or doubled.
* The node that joined is used, although the run had asked for its worker before it was there.
* The run's metrics are on the exporter of the driver's node, every series with run and tracker,
  and only those that the table of metrics names.
* Metrics are of one driver; the tables `videos`, `stages` and `workers` hold all of the run,
  what a killed driver and a vanished node did included.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.commit_log import read_state
from jobs.maintenance import verify
from jobs.metrics import METRICS, Metric, MetricKind
from tests.cluster import RayCluster, RayNode, ray_cluster
from tests.datasets import assert_whole, read_table
from tests.e2e.corpora import maskmill, write_corpus
from tests.scrapes import EXPORT_ENVIRONMENT, Sample, Scrape, scrape
from workers.storage import open_store

NUM_VIDEOS = 10
SLEEP_S = 0.1
"""Per frame: a video of 50 frames takes about five seconds."""
NOTICE_S = (600, 1)
"""How long before they go the nodes are told: much more than a video takes, and much less."""
OTHER_TYPE = '{"accelerator_type:OTHER": 1}'


@dataclass
class Story:
    """What happened, for the tests to look at."""

    out: Path
    frames: dict[str, int]
    code: int = -1
    told: str = ""
    scrapes: list[Scrape] = field(default_factory=list)
    joined: set[int] = field(default_factory=set)
    """Processes of the workers on the node that joined."""
    num_before: int = 0
    """Videos that the killed driver had committed."""

    def logs(self) -> list[dict[str, Any]]:
        files = sorted((self.out / "_logs").rglob("*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    @property
    def last_scrape(self) -> Scrape:
        return self.scrapes[-1]


def wait_until(happened: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.1)


def at_work(out: Path) -> int:
    """Return how many workers have a video, as the driver's status says."""
    try:
        status = json.loads((out / "_status.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return 0
    # Not only those that say "tracking": a worker's first word of a video takes seconds, and the
    # status, written every five, may come before it again and again.
    return len(status["workers"])


def drained(lines: list[str]) -> set[str]:
    """Return the workers of which a driver said that their node goes, or is gone already."""
    return set(
        re.findall(r"worker (worker-[12]):.* its node (?:is|was) taken away", "".join(lines))
    )


def workers_on(node: RayNode) -> set[int]:
    return {process.pid for process in node.find("ray::TrackingWorker")}


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster(num_nodes=2, environment=EXPORT_ENVIRONMENT) as running:
        yield running


@pytest.fixture(scope="module")
def story(cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("elastic")
    story = Story(folder / "out", write_corpus(folder / "corpus", NUM_VIDEOS, num_frames=50))
    command = (
        *("run", folder / "corpus", "--out", story.out, "--prompts", folder / "prompts.jsonl"),
        *("--tracker", "fake", "--option", f"sleep_s={SLEEP_S}"),
        *("--max-workers", "3"),  # the cluster has places for two
    )
    environment = cluster.environment | EXPORT_ENVIRONMENT
    store = open_store(str(story.out))
    # Given a driver that was killed when it had committed something
    driver = maskmill(*command, env=environment)
    wait_until(lambda: read_state(store).num_committed > 0, "a commit")
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    story.num_before = read_state(store).num_committed

    # and the same command again, at work
    (story.out / "_status.json").unlink(missing_ok=True)
    driver = maskmill(*command, env=environment)
    wait_until(lambda: at_work(story.out) == len(NOTICE_S), "both workers at work")
    lines: list[str] = []
    reader = threading.Thread(target=lines.extend, args=(driver.stdout,), daemon=True)
    reader.start()
    # When the nodes are to be taken away, and a larger one of another type comes. The workers
    # stand still until the driver knows: on a busy machine that takes longer than a video.
    workers = [process for node in cluster.nodes for process in node.find("ray::TrackingWorker")]
    for worker in workers:
        worker.suspend()
    for node, notice_s in zip(cluster.nodes, NOTICE_S, strict=True):
        cluster.drain(node, deadline_s=notice_s)
    wait_until(lambda: len(drained(lines)) == len(NOTICE_S), "word of both drains")
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.resume()
    cluster.cpus_per_node = 2
    other = cluster.add_node(resources=OTHER_TYPE)
    while driver.poll() is None:
        story.joined |= workers_on(other)
        found = scrape(cluster.head.ip, cluster.head.metrics_port)
        if found.samples:
            story.scrapes.append(found)
        time.sleep(0.5)
    reader.join()
    story.code, story.told = driver.returncode, "".join(lines)
    return story


def test_nothing_is_lost_doubled_or_charged(story: Story) -> None:
    assert story.code == 0, story.told
    assert_whole(story.out, story.frames)
    assert not verify(open_store(str(story.out)), deep=True).problems
    videos = read_table(story.out, "videos").to_pylist()
    assert {row["error_class"] for row in videos} <= {None, "", "preempted"}
    begun = [line for line in story.logs() if "the attempt failed" in line["message"]]
    assert all("(preempted)" in line["message"] for line in begun), begun
    assert "quarantine" not in story.told


def test_what_could_not_end_in_time_was_stopped_and_tried_elsewhere(story: Story) -> None:
    lines = story.logs()
    draining = [line for line in lines if "its node is taken away" in line["message"]]
    assert draining
    for line in draining:
        worker_id, since = line["message"].split()[1].rstrip(":"), line["time"]
        begun = [one for one in lines if f"begins on {worker_id}" in one["message"]]
        assert not [one for one in begun if one["time"] > since]
        # Empty in time it is released; where everything is slow its node takes it along.
        ends = (f"{worker_id} is released", f"{worker_id} is lost (preempted)")
        assert [one for one in lines if one["message"].startswith(ends)]
    # One worker ended its video and one was stopped; the second time nothing happened.
    videos = read_table(story.out, "videos").to_pylist()
    (stopped,) = [row for row in videos if row["attempts"] != 1]
    assert (stopped["attempts"], stopped["error_class"]) == (2, "preempted")


def test_the_node_that_joined_is_used(story: Story) -> None:
    workers = read_table(story.out, "workers").to_pylist()
    rows = [row for row in workers if row["pid"] in story.joined]
    assert sum(row["num_videos"] for row in rows) > 0
    drained = [row for row in workers if "taken away" in (row["exit_reason"] or "")]
    assert drained
    # What they did before their nodes went is kept.
    assert sum(row["busy_s"] for row in drained) > 0


def metric_of(sample: Sample) -> Metric:
    """Return the row of the table of metrics that a series is of."""
    by_name = {metric.exported_name: metric for metric in METRICS}
    histogram = re.sub("_(bucket|sum|count)$", "", sample.name)
    return by_name[sample.name if sample.name in by_name else histogram]


def test_metrics_are_those_of_the_table(story: Story) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    for sample in story.last_scrape.samples:
        metric = metric_of(sample)
        assert sample.labels["run"]
        assert sample.labels["tracker"] == "fake"
        assert metric.labels.keys() <= sample.labels.keys()
        for label, values in metric.labels.items():
            assert not values or sample.labels[label] in values
        # A killed driver's series stay on the exporter for a while, beside its successor's.
        counts[metric.exported_name, sample.labels["WorkerId"]] += 1
    by_name = {metric.exported_name: metric for metric in METRICS}
    for (name, _), count in counts.items():
        metric = by_name[name]
        num_buckets = len(metric.boundaries) + 3 if metric.kind is MetricKind.HISTOGRAM else 1
        assert count <= metric.max_series * num_buckets


def test_every_metric_of_the_table_is_told(story: Story) -> None:
    # In any scrape: Ray takes away a gauge that was not reported for two intervals, here two
    # seconds, and a busy machine is slower than that now and then.
    told = {metric_of(sample).exported_name for one in story.scrapes for sample in one.samples}
    # What did not happen, and what needs a GPU.
    silent = {"ray_maskmill_gpu_memory_bytes", "ray_maskmill_lost_workers_total"}
    assert {metric.exported_name for metric in METRICS} - told <= silent


def test_metrics_are_of_one_driver_and_the_log_is_of_the_run(story: Story) -> None:
    videos = read_table(story.out, "videos").to_pylist()
    stages = read_table(story.out, "stages").to_pylist()
    workers = read_table(story.out, "workers").to_pylist()
    last = story.last_scrape
    (run_id,) = {s.labels["run"] for s in last.samples}
    by_driver = max(
        sum(s.value for s in last.samples if s.name == name and s.labels["WorkerId"] == driver)
        for name in ["ray_maskmill_frames_committed_total"]
        for driver in {s.labels["WorkerId"] for s in last.samples}
    )
    # The tables hold every frame once, whoever tracked it.
    num_frames = sum(story.frames.values())
    assert sum(row["frames_tracked"] for row in videos) == num_frames
    assert sum(row["items"] for row in stages if row["stage"] == "track") == num_frames
    assert sum(row["num_frames"] for row in workers) == num_frames
    assert {row["run_id"] for row in workers} == {run_id}
    assert {row["epoch"] for row in workers} == {1, 2}
    # The metrics of the second driver know nothing of what the first one did; and what was stepped
    # and then stopped is in them, and in no table.
    assert story.num_before >= 1
    assert by_driver < num_frames
    stepped = last.total("ray_maskmill_frames_total")
    assert stepped > last.total("ray_maskmill_frames_committed_total")
    assert last.total("ray_maskmill_failed_attempts_total", kind="preempted") >= 1
