"""Contract: workers and nodes come and go, and the dataset does not show it.

One run on a real cluster with token authentication: the driver is killed with a video committed
and is started again; both nodes are drained, as before a spot interruption, with videos on their
workers; a node of another type joins. Then:

* What the drained nodes' workers could not end is tried again elsewhere, and is not charged;
  nothing is lost or doubled.
* The node that joined is used, although the run had asked for its worker before it was there.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.commit_log import read_state
from jobs.maintenance import verify
from tests.cluster import RayCluster, RayNode, ray_cluster
from tests.datasets import assert_whole, read_table
from tests.e2e.corpora import finish, maskmill, write_corpus
from tests.scrapes import EXPORT_ENVIRONMENT, Scrape, scrape
from workers.storage import open_store

NUM_VIDEOS = 12
SLEEP_S = 0.06
"""Per frame: a video of 50 frames takes about three seconds."""
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


def tracking(out: Path) -> int:
    """Return how many workers are tracking a video, as the driver's status says."""
    try:
        status = json.loads((out / "_status.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return 0
    return sum(worker["state"] == "tracking" for worker in status["workers"].values())


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
    wait_until(lambda: tracking(story.out) > 0, "a worker at work")
    # When the nodes are to be taken away, and a larger one of another type comes. The workers
    # stand still while that is announced: on a busy machine it takes longer than a video.
    workers = [process for node in cluster.nodes for process in node.find("ray::TrackingWorker")]
    for worker in workers:
        worker.suspend()
    for node in list(cluster.nodes):
        cluster.drain(node, deadline_s=8)
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
    story.code, story.told = finish(driver)
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


def test_the_node_that_joined_is_used(story: Story) -> None:
    workers = read_table(story.out, "workers").to_pylist()
    rows = [row for row in workers if row["pid"] in story.joined]
    assert sum(row["num_videos"] for row in rows) > 0
    drained = [row for row in workers if "taken away" in (row["exit_reason"] or "")]
    assert drained
    # What they did before their nodes went is kept.
    assert sum(row["busy_s"] for row in drained) > 0
