"""Contract: on a real cluster, whatever process dies, the dataset comes out whole and once.

* Forty videos run on a head and two nodes, with token authentication. Ten times, at a random
  moment, a worker process, a raylet (and with it its node) or the driver gets SIGKILL; a lost node
  is replaced by a new one and a dead driver by the same command.
* The final dataset equals an undisturbed run's row for row, nothing is quarantined, and `verify`
  agrees.
* Of two drivers on one output the older is fenced out with exit code 3, and nothing is doubled.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from jobs.commit_log import read_state
from jobs.maintenance import verify
from tests.cluster import RayCluster, RayNode, ray_cluster
from tests.datasets import assert_same, assert_whole, results
from tests.e2e.corpora import finish, maskmill, write_corpus
from workers.storage import open_store

NUM_VIDEOS = 40
NUM_KILLS = 10


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster(num_nodes=2) as running:
        yield running


def start(cluster: RayCluster, corpus: Path, out: Path, *, sleep_s: float) -> subprocess.Popen[str]:
    return maskmill(
        *("run", corpus, "--out", out, "--prompts", corpus.parent / "prompts.jsonl"),
        *("--tracker", "fake", "--option", f"sleep_s={sleep_s}", "--workers", "2"),
        env=cluster.environment,
    )


def num_committed(out: Path) -> int:
    return read_state(open_store(str(out))).num_committed


def wait_for_progress(driver: subprocess.Popen[str], out: Path, more_than: int) -> None:
    """Wait until the log holds more commits, or the driver has ended."""
    deadline = time.monotonic() + 120
    while driver.poll() is None and num_committed(out) <= more_than:
        assert time.monotonic() < deadline, "no commit for two minutes"
        time.sleep(0.1)


def living_nodes(cluster: RayCluster) -> list[RayNode]:
    """Return the nodes that are up, at least one: the others may still be starting."""
    wait_for_worker(cluster)
    return [node for node in cluster.nodes if node.find("raylet")]


def wait_for_worker(cluster: RayCluster) -> list[psutil.Process]:
    """Wait until a node runs a worker; return the processes of all workers."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = [p for node in cluster.nodes for p in node.find("ray::TrackingWorker")]
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError("no worker came up within two minutes")


def test_survives_ten_kills(cluster: RayCluster, tmp_path: Path) -> None:
    # Given an undisturbed run
    frames = write_corpus(tmp_path / "corpus", NUM_VIDEOS)
    corpus, calm, wild = tmp_path / "corpus", tmp_path / "calm", tmp_path / "wild"
    code, told = finish(start(cluster, corpus, calm, sleep_s=0.0))
    assert code == 0, told
    assert_whole(calm, frames)

    # When processes die ten times
    dice = random.Random(7)
    victims = ["worker", "raylet", "driver"] * 4
    dice.shuffle(victims)
    driver = start(cluster, corpus, wild, sleep_s=0.3)
    for victim in victims[:NUM_KILLS]:
        wait_for_worker(cluster)
        time.sleep(dice.uniform(0, 2.5))
        assert driver.poll() is None, f"the run ended before the {victim} could be killed"
        if victim == "worker":
            dice.choice(wait_for_worker(cluster)).send_signal(signal.SIGKILL)
        elif victim == "raylet":
            dice.choice(living_nodes(cluster)).kill_raylet()
            cluster.add_node(wait=False)
        else:
            os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
            driver = start(cluster, corpus, wild, sleep_s=0.3)
    code, told = finish(driver)

    # Then the dataset is the same
    assert code == 0, told
    assert_whole(wild, frames)
    assert_same(wild, results(calm, but={"config_fingerprint"}), but={"config_fingerprint"})
    assert not verify(open_store(str(wild)), deep=True).problems


def test_newer_driver_wins(cluster: RayCluster, tmp_path: Path) -> None:
    frames = write_corpus(tmp_path / "corpus", 12)
    out = tmp_path / "out"
    older = start(cluster, tmp_path / "corpus", out, sleep_s=0.3)
    wait_for_progress(older, out, 0)
    newer = start(cluster, tmp_path / "corpus", out, sleep_s=0.3)
    code, told = finish(older)
    assert code == 3, told
    assert "another driver" in told
    code, told = finish(newer)
    assert code == 0, told
    assert_whole(out, frames)
    assert not verify(open_store(str(out)), deep=True).problems
