"""Contract: a real Prometheus watches a run with the files of `infra/monitoring`.

* Prometheus, with our scrape configuration and alert rules, takes in the metrics of a run on a real
  cluster with token authentication.
* Every query of the board returns numbers from it while it runs, but for those that need a GPU.
* All alert rules are evaluated without an error.
* What Prometheus has counted in the end agrees with the run's own tables.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster import RayCluster, free_port, ray_cluster
from tests.datasets import read_table
from tests.e2e.corpora import ROOT, finish, maskmill, write_corpus
from tests.scrapes import EXPORT_ENVIRONMENT

MONITORING = ROOT / "infra" / "monitoring"
NUM_VIDEOS = 8
SILENT = ("ray_node_gpus_utilization", "ray_maskmill_gpu_memory_bytes")
"""Without a GPU nobody tells these."""


def board_queries() -> list[str]:
    """Return the queries of the board, for every run and tracker."""
    board = json.loads((MONITORING / "board.json").read_text())
    texts = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return [re.sub(r"\$\w+", ".*", text) for text in texts]


@dataclass
class Prometheus:
    """One that runs."""

    url: str

    def ask(self, path: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=20) as answer:
            return json.load(answer)["data"]

    def numbers(self, query: str) -> list[float]:
        """Return the finite values that a query gives now."""
        values = [float(row["value"][1]) for row in self.ask("query", query=query)["result"]]
        return [value for value in values if math.isfinite(value)]


@contextmanager
def prometheus(folder: Path, *targets: str) -> Iterator[Prometheus]:
    """Run Prometheus with our files; only the list of exporters, and the pace, are the test's."""
    program = shutil.which("prometheus")
    assert program is not None, "prometheus is not on the path: see .ci/debian-tools"
    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (scraped,) = config["scrape_configs"]
    exporters = folder / "exporters.json"
    exporters.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": targets}]))
    scraped["file_sd_configs"] = [{"files": [str(exporters)]}]
    shutil.copy(MONITORING / "alerts.yaml", folder)
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    port = free_port()
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
        try:
            yield Prometheus(f"http://127.0.0.1:{port}")
        finally:
            process.terminate()
            process.wait(30)


@dataclass
class Watched:
    """A run, and what Prometheus said of it."""

    out: Path
    code: int
    told: str
    answers: dict[str, list[float]] = field(default_factory=dict)
    rules: list[dict[str, Any]] = field(default_factory=list)
    committed: float = 0.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster(num_nodes=0, head_cpus=2, environment=EXPORT_ENVIRONMENT) as running:
        yield running


@pytest.fixture(scope="module")
def watched(cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    folder = tmp_path_factory.mktemp("watched")
    write_corpus(folder / "corpus", NUM_VIDEOS, num_frames=40)
    (folder / "corpus" / "broken.mp4").write_bytes(b"no video" * 5000)
    run = Watched(folder / "out", -1, "")
    left = set(board_queries())
    exporter = f"{cluster.head.ip}:{cluster.head.metrics_port}"
    with prometheus(folder, exporter) as server:
        driver = maskmill(
            *("run", folder / "corpus", "--out", run.out),
            *("--prompts", folder / "prompts.jsonl", "--tracker", "fake"),
            *("--option", "sleep_s=0.1", "--workers", "2"),
            env=cluster.environment | EXPORT_ENVIRONMENT,
        )
        was_killed = False
        while driver.poll() is None:
            time.sleep(1)
            try:
                committed = server.numbers('sum(ray_maskmill_videos_total{outcome="committed"})')
            except OSError:
                continue  # it is still starting
            run.committed = max([run.committed, *committed])
            for query in sorted(left):
                if values := server.numbers(query):
                    run.answers[query] = values
                    left.discard(query)
            if committed and not was_killed:  # so that a worker is lost, too
                cluster.head.find("ray::TrackingWorker")[0].send_signal(signal.SIGKILL)
                was_killed = True
        run.code, run.told = finish(driver)
        run.rules = [r for group in server.ask("rules")["groups"] for r in group["rules"]]
    return run


def test_the_queries_of_the_board_return_numbers(watched: Watched) -> None:
    assert watched.code == 1, watched.told  # the broken video is in quarantine
    queries = board_queries()
    assert len(queries) > 10
    silent = [query for query in queries if query not in watched.answers]
    assert all(any(name in query for name in SILENT) for query in silent), silent


def test_the_alert_rules_are_evaluated(watched: Watched) -> None:
    expected = yaml.safe_load((MONITORING / "alerts.yaml").read_text())
    names = {rule["alert"] for group in expected["groups"] for rule in group["rules"]}
    assert {rule["name"] for rule in watched.rules} == names
    assert {rule["health"] for rule in watched.rules} == {"ok"}


def test_the_counts_agree_with_the_tables(watched: Watched) -> None:
    videos = read_table(watched.out, "videos")
    assert len(videos) == NUM_VIDEOS
    # The last second may not have been scraped; more than there is it can never be.
    assert 1 <= watched.committed <= NUM_VIDEOS
    (lost,) = (values for query, values in watched.answers.items() if "lost_workers" in query)
    assert len(lost) == 1
