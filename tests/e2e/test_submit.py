"""Contract: a run as a job of a real cluster, from its output alone.

The cluster is a head with a job server and two nodes, each processes of their own, with token
authentication on.

* `submit --follow` shows what the driver prints and ends with its exit code, over the address of
  the job server or of the head node; `status` and `logs` name and show the job, the log and
  `_status.json` name it too. Submitted again, a run that has ended has nothing to do.
* A missing or a wrong token is one sentence and exit code 3.
* A run that is live is refused with exit code 3; `cancel` closes its log and leaves it resumable;
  submitted again, with this code as a wheel, it ends with the dataset of an undisturbed run.
* Workers whose version is not the driver's are refused before they see a video.
* What is secret in the environment of nodes and command appears in no log, table, job record or
  process title.
* When the head is killed in the middle, `submit --follow` and `cancel` say so, `status` answers all
  the same; submitted to a new cluster the dataset equals an undisturbed run's.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs import cli
from jobs.commit_log import read_state
from jobs.records import Outcome
from jobs.shipping import build_wheel, installed_version
from jobs.status import read_live
from jobs.submitted import read_submission
from tests.cluster import RayCluster, ray_cluster
from tests.datasets import assert_same, assert_whole, results
from tests.e2e.corpora import finish, maskmill, write_corpus
from tests.e2e.test_s3 import download, upload
from tests.servers import S3Server
from workers.storage import open_store

NUM_VIDEOS = 6
PLANTED = secrets.token_hex(16)
"""What must be found nowhere: as a key of the nodes, and of the machine that submits."""
BUT = {"config_fingerprint"}
"""`sleep_s` of the fake tracker is a setting, so runs of another pace have another fingerprint."""


@pytest.fixture(scope="module")
def cluster(seaweedfs: S3Server) -> Iterator[RayCluster]:
    nodes = {"SOME_API_KEY": PLANTED, **seaweedfs.environment()}
    with ray_cluster(num_nodes=2, head_cpus=1, job_server=True, environment=nodes) as running:
        yield running


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    place = tmp_path_factory.mktemp("submitted")
    return place / "corpus", write_corpus(place / "corpus", NUM_VIDEOS)


@pytest.fixture(scope="module")
def calm(
    cluster: RayCluster, corpus: tuple[Path, dict[str, int]]
) -> tuple[Path, str, dict[str, list[dict[str, Any]]]]:
    """Return the output of an undisturbed run, what was shown of it, and its rows."""
    out = corpus[0].parent / "calm"
    code, told = call(*submit_words(cluster, corpus[0], out, "--follow"), env=token(cluster))
    assert code == 0, told
    assert_whole(out, corpus[1])
    return out, told, results(out, but=BUT)


def submit_words(
    cluster: RayCluster, corpus: Path, out: object, *more: object, sleep_s: float = 0.0
) -> list[object]:
    prompts = corpus.parent / "prompts.jsonl"
    return [
        *("submit", corpus, "--out", out, "--prompts", prompts, "--address", cluster.job_server),
        *("--tracker", "fake", "--option", f"sleep_s={sleep_s}", "--workers", "1", *more),
    ]


def token(cluster: RayCluster) -> dict[str, str]:
    return {"RAY_AUTH_TOKEN": cluster.token, "SOME_API_KEY": PLANTED}


def call(*words: object, env: Mapping[str, str]) -> tuple[int, str]:
    """Run a command line in this process; return its exit code and everything it printed."""
    told = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        for name, value in env.items():
            patch.setenv(name, value)
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            code = cli.main([str(word) for word in words])
    return code, told.getvalue()


def hold_half_done(cluster: RayCluster, out: Path) -> list[psutil.Process]:
    """Wait until some videos of a run are committed, and stop the time for its worker."""
    deadline = time.monotonic() + 240
    while len(list(out.glob("_staging/*/*/frames-0.parquet"))) < 2:
        assert time.monotonic() < deadline, "the run did not come to its second video"
        time.sleep(0.05)
    workers = [w for node in (cluster.head, *cluster.nodes) for w in node.find("ray::Tracking")]
    assert workers
    for worker in workers:
        worker.suspend()
    while not read_state(open_store(str(out))).num_committed:
        assert time.monotonic() < deadline, "nothing was committed"
        time.sleep(0.1)
    assert read_state(open_store(str(out))).num_committed < NUM_VIDEOS
    return workers


def test_follow_status_and_logs(
    cluster: RayCluster, corpus: tuple[Path, dict[str, int]], calm: tuple[Path, str, Any]
) -> None:
    out, told, _ = calm
    store = open_store(str(out))
    submission = read_submission(store)
    assert submission is not None
    job = submission.job
    assert f"submitted {job.job_id} to {cluster.job_server}" in told
    assert f"run {submission.run_id} finished" in told
    assert read_state(store).job == job
    live = read_live(store)
    assert live is not None
    assert live.job == job.to_json()

    code, shown = call("status", out, env={})
    assert code == 0, shown
    assert f"run {submission.run_id} in {out}: finished" in shown
    assert f"{job.job_id} on {cluster.job_server}" in shown
    code, shown = call("logs", out, env=token(cluster))
    assert code == 0, shown
    assert f"run {submission.run_id} finished" in shown

    # Once more, by the address of the head node: it has nothing to do. In a process of its own,
    # because Ray keeps the token of the first head node that a process has spoken to.
    again = submit_words(cluster, corpus[0], out, "--follow", "--address", cluster.address)
    code, told = finish(maskmill(*again, env=token(cluster)))
    assert code == 0, told
    assert "nothing was left to do" in told
    code, told = call("cancel", out, env=token(cluster))
    assert code == 0, told
    assert f"maskmill-{submission.run_id}-2 has ended already" in told


@pytest.mark.usefixtures("calm")
def test_token(cluster: RayCluster, corpus: tuple[Path, dict[str, int]], tmp_path: Path) -> None:
    out = corpus[0].parent / "calm"
    code, told = call("logs", out, env={"HOME": str(tmp_path)})
    assert code == 3, told
    assert "wants a token and none was found: set RAY_AUTH_TOKEN" in told
    code, told = call("logs", out, env={"RAY_AUTH_TOKEN": "0" * 64})
    assert code == 3, told
    assert "refused the token" in told
    assert "Traceback" not in told
    path = tmp_path / "token"
    path.write_text(f"{cluster.token}\n")
    code, told = call("logs", out, env={"RAY_AUTH_TOKEN_PATH": str(path)})
    assert code == 0, told


def test_live_cancelled_resumed(
    cluster: RayCluster,
    corpus: tuple[Path, dict[str, int]],
    calm: tuple[Path, str, Any],
    tmp_path: Path,
) -> None:
    # Given a run that is at work
    out = tmp_path / "out"
    words = submit_words(cluster, corpus[0], out, sleep_s=0.1)
    code, told = call(*words, "--detach", env=token(cluster))
    assert code == 0, told
    workers = hold_half_done(cluster, out)
    # Then it cannot be submitted again, and it can be looked at
    code, told = call(*words, env=token(cluster))
    assert code == 3, told
    assert "is live: maskmill-" in told
    code, told = call("status", out, env={})
    assert "running, driver" in told
    # When it is cancelled
    for worker in workers:
        worker.resume()
    code, told = call("cancel", out, env=token(cluster))
    assert code == 0, told
    assert "the same submit command resumes it" in told
    state = read_state(open_store(str(out)))
    assert state.closed
    assert state.outcome is Outcome.INTERRUPTED
    assert not state.quarantined
    code, told = call("status", out, env={})
    assert "to resume    the same submit command" in told
    # Then the same command resumes it, here with the code of this process sent along
    code, told = call(*words, "--follow", "--ship-code", env=token(cluster))
    assert code == 0, told
    assert_whole(out, corpus[1])
    assert_same(out, calm[2], but=BUT)
    plan, submission = read_state(open_store(str(out))).plan, read_submission(open_store(str(out)))
    assert plan is not None
    assert submission is not None
    assert plan.versions["maskmill"] == submission.version
    assert "+code." in submission.version


def test_workers_of_another_version(
    cluster: RayCluster, corpus: tuple[Path, dict[str, int]], tmp_path: Path
) -> None:
    # Given a driver that runs a wheel, beside nodes with the installed package
    wheel, version = build_wheel(tmp_path)
    install = [sys.executable, "-m", "pip", "install", "--no-index", "--quiet"]
    subprocess.run([*install, "--target", str(tmp_path / "place"), str(wheel)], check=True)
    words = ["run", corpus[0], "--prompts", corpus[0].parent / "prompts.jsonl"]
    driver = maskmill(
        *(*words, "--out", tmp_path / "out", "--tracker", "fake", "--workers", "1"),
        env={**cluster.environment, "PYTHONPATH": str(tmp_path / "place")},
        cwd=tmp_path,
    )
    code, told = finish(driver)
    assert code == 2, told
    assert (
        f"the driver has maskmill {version}, and a worker's node has maskmill {installed_version()}"
    ) in told


def test_no_secret_is_seen(
    cluster: RayCluster,
    corpus: tuple[Path, dict[str, int]],
    seaweedfs: S3Server,
    tmp_path: Path,
) -> None:
    # Given a run in buckets, whose secrets nodes and submitter have in their environment
    source, out = f"{seaweedfs.new_bucket()}/in", f"{seaweedfs.new_bucket()}/out"
    upload(seaweedfs, corpus[0], source)
    open_store(source, seaweedfs.options).write_bytes("broken.mp4", b"no video")
    environment = {**seaweedfs.environment(), **token(cluster)}
    endpoint = ("--endpoint-url", seaweedfs.endpoint_url, "--path-style")
    words = ["submit", source, "--prompts", corpus[0].parent / "prompts.jsonl", "--out", out]
    words += ["--tracker", "fake", "--option", "sleep_s=0.05", "--workers", "1", "--detach"]
    code, told = call(*words, "--address", cluster.job_server, *endpoint, env=environment)
    assert code == 0, told
    # When it has run, one of its videos into quarantine
    following = maskmill("logs", out, "--follow", *endpoint, env=environment)
    titles: set[bytes] = set()
    while following.poll() is None:
        titles |= process_titles(cluster)
        time.sleep(0.2)
    code, shown = finish(following)
    assert code == 1, shown
    # Then no secret is in what it left behind
    store = open_store(out, seaweedfs.options)
    submission = read_submission(store)
    assert submission is not None
    record = job_record(cluster, submission.job.job_id)
    assert "maskmill run" in record, "the record was read"
    assert any(b"maskmill" in title for title in titles), "titles of the driver were read"
    download(seaweedfs, out, tmp_path / "set")
    hidden = [PLANTED, cluster.token, seaweedfs.environment()["AWS_SECRET_ACCESS_KEY"]]
    places = {"the terminal": (told + shown).encode(), "the job's record": record.encode()}
    places |= {f"a title: {title!r}": title for title in titles}
    for folder in (tmp_path / "set", *cluster.folder.glob("*/session_2*/logs")):
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert files
        places |= {str(path): path.read_bytes() for path in files}
    found = [(where, s) for where, data in places.items() for s in hidden if s.encode() in data]
    assert not found


def process_titles(cluster: RayCluster) -> set[bytes]:
    """Return the command lines of every process of the cluster."""
    titles = set()
    for node in (cluster.head, *cluster.nodes):
        for process in node.processes():
            try:
                titles.add(Path(f"/proc/{process.pid}/cmdline").read_bytes())
            except OSError:
                continue
    return titles


def job_record(cluster: RayCluster, job_id: str) -> str:
    """Return everything that the job server tells about a job."""
    request = urllib.request.Request(
        f"{cluster.job_server}/api/jobs/{job_id}",
        headers={"Authorization": f"Bearer {cluster.token}"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.dumps(json.load(answer))


def test_lost_head(
    cluster: RayCluster,
    corpus: tuple[Path, dict[str, int]],
    calm: tuple[Path, str, Any],
    tmp_path: Path,
) -> None:
    """Last in this file: it leaves the cluster in ruins."""
    out = tmp_path / "out"
    words = submit_words(cluster, corpus[0], out, "--follow", sleep_s=0.1)
    following = maskmill(*words, env=token(cluster))
    hold_half_done(cluster, out)
    # When the head is killed, and with it the cluster goes
    cluster.head.kill()
    for node in cluster.nodes:
        node.kill()
    code, told = finish(following)
    assert code == 3, told
    assert "was lost while maskmill-" in told
    assert "Traceback" not in told
    code, told = call("cancel", out, env=token(cluster))
    assert code == 3, told
    assert "no Ray job server answers" in told
    # Then the output still tells how far it is
    code, told = call("status", out, env={})
    assert code == 0, told
    assert "gives no answer" in told
    assert "to resume    the same submit command" in told
    # And another cluster finishes it
    with ray_cluster(num_nodes=1, job_server=True, cpus_per_node=2) as another:
        words = submit_words(another, corpus[0], out, "--follow", sleep_s=0.1)
        code, told = call(*words, env=token(another))
        assert code == 0, told
    assert_whole(out, corpus[1])
    assert_same(out, calm[2], but=BUT)
