"""Runs as Ray jobs, as far as no cluster is needed; `tests/e2e/test_submit.py` has the rest.

* Of two submissions with one number one is recorded; a damaged record says so.
* A driver knows from its environment which job it is; it refuses an output that does not hold its
  submission, and a command of another version. Outside of a job, or in another tool's, it runs.
* Its workers get none of the variables that are for the job's supervisor.
* The fence names the job, and a snapshot keeps it.
* The command that is submitted means the same configuration, on the cluster that runs it; one that
  holds a secret is refused without showing it.
* The wheel installs without an index and runs; the same code is the same bytes.
* An address that is none, one where nothing answers, where another server answers, or where none
  ever answers, and a token file that is not there: one sentence and its exit code.
* An address with a password is refused without showing it.
* An error of the job server after it has taken a job is no failed submission; the record of a job
  that was not taken is gone; an id that is taken already leaves its number used up.
* `logs` and `cancel` of an output that was never submitted are refused; `status` of a submitted run
  whose cluster is gone still answers, and says what resumes it.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import ray

from jobs import cli, ray_jobs
from jobs.commit_log import CommitLog, Outcome, read_state
from jobs.config import CorpusConfig, OutConfig, PoolConfig, RunConfig, StoreConfig
from jobs.ray_jobs import JobReport, JobServer, JobState
from jobs.records import Job
from jobs.shipping import build_wheel, installed_version
from jobs.submission import _run_words, exit_code, submit
from jobs.submitted import (
    METADATA_NUMBER,
    METADATA_OUT,
    Submission,
    claim_submission,
    own_submission,
    read_submission,
    reserved_cpus,
    submission_key,
    submission_numbers,
    use_spare_workers,
)
from tests.cluster import free_port
from tests.jobs.outputs import run_plan
from workers.errors import ConfigError, StoreDenied, StoreError, StoreUnavailable
from workers.storage import Store, open_store

JOB = Job("maskmill-aa-bb-1", "http://127.0.0.1:9", "session_1")
FIRST = Submission(1, "aa-bb", JOB, 1_800_000_000.0, "laptop", "0.1.0")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "out"))


# The records.


def test_one_record_per_number(store: Store) -> None:
    assert read_submission(store) is None
    assert claim_submission(store, FIRST)
    assert not claim_submission(store, replace(FIRST, host="another"))
    second = replace(FIRST, number=2, job=replace(JOB, job_id="maskmill-aa-bb-2"))
    assert claim_submission(store, second)
    assert submission_numbers(store) == [1, 2]
    assert read_submission(store, 1) == FIRST
    assert read_submission(store) == second
    assert read_submission(store, 3) is None


@pytest.mark.parametrize("data", [b"", b"[]", b'{"number": 1}'])
def test_damaged_record(store: Store, data: bytes) -> None:
    store.write_bytes(submission_key(1), data)
    with pytest.raises(StoreError, match=r"_jobs/000001.json is damaged"):
        read_submission(store)


def environment(store: Store, **metadata: str) -> dict[str, str]:
    """Return what Ray puts into the environment of an entrypoint."""
    told = {"job_submission_id": JOB.job_id, METADATA_OUT: store.uri, METADATA_NUMBER: "1"}
    return {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"metadata": told | metadata})}


def test_a_driver_knows_its_job(store: Store) -> None:
    claim_submission(store, FIRST)
    assert own_submission(store, "0.1.0", environment(store)) == (JOB, "aa-bb")
    assert own_submission(store, "0.1.0", {}) == (None, None)
    # A job of another tool, or one that was submitted for another output.
    elsewhere = environment(store, **{METADATA_OUT: "s3://elsewhere"})
    assert own_submission(store, "0.1.0", elsewhere) == (Job(JOB.job_id), None)


def test_a_driver_that_sees_another_output(store: Store, tmp_path: Path) -> None:
    claim_submission(store, FIRST)
    other = open_store(str(tmp_path / "elsewhere"))
    with pytest.raises(StoreError, match="give --out a bucket, or a folder that all machines"):
        own_submission(other, "0.1.0", environment(other))


def test_a_driver_of_another_version(store: Store) -> None:
    claim_submission(store, FIRST)
    with pytest.raises(ConfigError, match=r"submitted by maskmill 0\.1\.0.*has maskmill 0\.2\.0"):
        own_submission(store, "0.2.0", environment(store))


def test_what_concerns_the_supervisor_is_kept_from_workers(store: Store) -> None:
    def variables(**given: str) -> dict[str, object]:
        config = {"runtime_env": {"env_vars": given, "py_modules": ["x.whl"]}, "metadata": {}}
        now = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(config)}
        use_spare_workers(now)
        left: dict[str, object] = json.loads(now["RAY_JOB_CONFIG_JSON_ENV_VAR"])["runtime_env"]
        return left

    assert variables(RAY_JOB_STOP_WAIT_TIME_S="60") == {"py_modules": ["x.whl"]}
    assert variables(RAY_JOB_STOP_WAIT_TIME_S="60", MINE="1")["env_vars"] == {"MINE": "1"}
    assert variables(MINE="1")["env_vars"] == {"MINE": "1"}
    nothing: dict[str, str] = {}
    use_spare_workers(nothing)
    assert not nothing


def test_the_fence_names_the_job(store: Store) -> None:
    log = CommitLog.acquire(store, "host:1:aa", job=JOB)
    assert read_state(store).job == JOB
    log.plan(run_plan())
    log.snapshot()
    log.close(Outcome.FINISHED)
    assert read_state(store).job == JOB
    CommitLog.acquire(store, "host:2:bb")
    assert read_state(store).job is None


# The command.


def config(store: Store, **corpus: object) -> RunConfig:
    return RunConfig(
        corpus=CorpusConfig(**{"paths": ("s3://footage/2025/a b.mp4",), "stride": 3} | corpus),  # type: ignore[arg-type]
        out=OutConfig(uri=store.uri, store=StoreConfig(endpoint_url="https://minio.example.org")),
        pool=PoolConfig(workers=3, ray_address="http://10.0.0.1:8265"),
    )


def test_the_command_means_the_same_on_the_cluster(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[RunConfig] = []

    def keep(config: RunConfig, _: str) -> int:
        ran.append(config)
        return 0

    monkeypatch.setattr("jobs.verbs.running.run_and_report", keep)
    asked = config(store)
    assert cli.main(["run", *_run_words(asked, store)]) == 0
    assert ran[0].pool.ray_address is None  # Ray itself says on which cluster a job is
    pool = ran[0].pool.model_copy(update={"ray_address": asked.pool.ray_address})
    assert ran[0].model_copy(update={"pool": pool}) == asked


def test_an_age_counts_from_the_submission(store: Store) -> None:
    words = _run_words(config(store, since="2d"), store)
    since = datetime.fromisoformat(words[words.index("--since") + 1])
    assert timedelta(days=2) <= datetime.now(UTC) - since < timedelta(days=2, minutes=5)


@pytest.mark.parametrize(
    "path",
    [
        "https://host/a.mp4?X-Amz-Signature=0123456789abcdef",
        "https://user:correct-horse@host/a.mp4",
        "s3://bucket/planted-in-the-environment/a.mp4",
    ],
)
def test_no_secret_in_a_command(store: Store, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET_KEY", "planted-in-the-environment")
    with pytest.raises(ConfigError, match="holds a secret") as refused:
        _run_words(config(store, paths=(path,)), store)
    for secret in ("0123456789abcdef", "correct-horse", "planted"):
        assert secret not in str(refused.value)


@pytest.mark.parametrize(
    ("state", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 1, 1), ("FAILED", 3, 3), ("STOPPED", None, 130)],
)
def test_exit_code_is_the_drivers(state: str, code: int | None, expected: int) -> None:
    assert exit_code(JobReport(JobState(state), "", code), FIRST) == expected


def test_exit_code_of_a_driver_that_was_lost() -> None:
    with pytest.raises(ConfigError, match="no maskmill on the PATH"):
        exit_code(JobReport(JobState.FAILED, "", 127), FIRST)
    lost = JobReport(JobState.FAILED, "Job supervisor actor died.\nmore", None)
    with pytest.raises(StoreError, match=r"was lost \(Job supervisor actor died\)"):
        exit_code(lost, FIRST)


# The wheel.


def test_wheel_installs_and_runs(tmp_path: Path) -> None:
    wheel, version = build_wheel(tmp_path)
    assert version.startswith(installed_version().partition("+")[0] + "+code.")
    (tmp_path / "again").mkdir()
    assert build_wheel(tmp_path / "again")[0].read_bytes() == wheel.read_bytes()
    place = tmp_path / "place"
    install = [sys.executable, "-m", "pip", "install", "--no-index", "--quiet"]
    subprocess.run([*install, "--target", str(place), str(wheel)], check=True)
    told = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "--version"],
        env={"PYTHONPATH": str(place)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert told.stdout.strip() == f"maskmill {version}"


# The cluster that is not there.


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def stranger() -> Iterator[str]:
    """Return the address of a web server that is no job server."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, *_: object) -> None:
            pass

    with serving(Handler) as address:
        yield address


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve HTTP on a free port of this machine; yields the address."""
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.usefixtures("no_cluster")
@pytest.mark.parametrize("address", ["hello", "ray://127.0.0.1:10001", "http://", "host:port"])
def test_address_that_is_none(address: str) -> None:
    with pytest.raises(ConfigError, match="is not the address of a Ray cluster"):
        JobServer(address)


@pytest.mark.usefixtures("no_cluster")
def test_address_with_a_password() -> None:
    with pytest.raises(ConfigError, match=":8265 holds a name or password") as refused:
        JobServer("http://me:correct-horse@127.0.0.1:8265")
    assert "correct-horse" not in str(refused.value)


class FailingFront(BaseHTTPRequestHandler):
    """A proxy that loses the job server's answers; Ray's own cannot be made to fail just then."""

    takes = True
    jobs: ClassVar[set[str]] = set()

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if name == "version":
            versions = {"version": "4", "ray_version": ray.__version__, "ray_commit": ""}
            self.answer(200, versions | {"session_name": "session_9"})
        elif name in self.jobs:
            job = {"type": "SUBMISSION", "submission_id": name, "status": "RUNNING"}
            self.answer(200, job | {"entrypoint": "exec maskmill run"})
        else:
            self.answer(404, {})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = asked["submission_id"]
        if name in self.jobs:
            self.answer(400, f"Job with submission_id {name} already exists")
            return
        if self.takes:
            self.jobs.add(name)
        self.answer(502, "bad gateway")

    def answer(self, code: int, body: object) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.usefixtures("no_cluster")
def test_answers_that_were_lost(store: Store) -> None:
    class Front(FailingFront):
        jobs: ClassVar[set[str]] = set()

    with serving(Front) as address:
        server = JobServer(address)
        Front.takes = False
        with pytest.raises(StoreError, match="bad gateway"):
            submit(config(store), store, server, tell=print)
        assert submission_numbers(store) == []
        Front.takes = True
        taken = submit(config(store), store, server, tell=print)
        assert read_submission(store) == taken
        # Another output's record with the same id: its number must not come up again and again.
        Front.jobs = {f"maskmill-{taken.run_id}-2"}
        with pytest.raises(StoreError, match="already exists"):
            submit(config(store), store, server, tell=print, take_over=True)
        assert submission_numbers(store) == [1, 2]
        third = submit(config(store), store, server, tell=print, take_over=True)
        assert third.number == 3


def test_cpus_of_a_driver() -> None:
    job = {"metadata": {"job_submission_id": "x", "maskmill_driver_cpus": "2"}}
    variable = "RAY_JOB_CONFIG_JSON_ENV_VAR"
    assert reserved_cpus({variable: json.dumps(job)}) == 2
    assert reserved_cpus({variable: json.dumps({"metadata": {}})}) == 0
    assert reserved_cpus({}) == 0


@pytest.mark.usefixtures("no_cluster")
def test_nothing_answers(stranger: str) -> None:
    for address in (f"http://127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}", stranger):
        with pytest.raises(StoreUnavailable, match=f"no Ray job server answers at {address}"):
            JobServer(address)


@pytest.mark.usefixtures("no_cluster")
def test_a_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"http://127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(StoreUnavailable, match="no Ray job server answers"):
            JobServer(address)


@pytest.mark.usefixtures("no_cluster")
def test_token_file_that_is_not_there(stranger: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere/token")
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN_PATH names /nowhere/token"):
        JobServer(stranger)


@pytest.mark.usefixtures("no_cluster")
@pytest.mark.parametrize("verb", ["logs", "cancel"])
def test_never_submitted(verb: str, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, store.uri]) == 2
    assert "nothing was submitted for" in capsys.readouterr().err
    claim_submission(store, FIRST)
    assert cli.main([verb, store.uri, "--submission", "7"]) == 2
    assert "no submission 7: the newest is 1" in capsys.readouterr().err
    # Its cluster is gone: there is nothing to cancel, and the log lines are in the output.
    store.write_bytes("_logs/aa-bb/driver-1.jsonl", b'{"message": "kept"}\n')
    assert cli.main([verb, store.uri]) == (0 if verb == "logs" else 3)
    shown = capsys.readouterr()
    assert "no Ray job server answers at http://127.0.0.1:9" in shown.err
    assert ('{"message": "kept"}' in shown.out) == (verb == "logs")


@pytest.mark.usefixtures("no_cluster")
def test_status_without_the_cluster(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    # Submitted, and nothing heard of it since
    claim_submission(store, FIRST)
    assert cli.main(["status", store.uri]) == 0
    shown = capsys.readouterr().out
    assert "run aa-bb" in shown
    assert "submitted, nothing is planned yet" in shown
    assert "gives no answer: no Ray job server answers at http://127.0.0.1:9" in shown
    # Its driver died
    log = CommitLog.acquire(store, "host:1:aa", job=JOB)
    log.plan(replace(run_plan(), run_id="aa-bb", totals={"num_videos": 10}))
    assert cli.main(["status", store.uri]) == 0
    shown = capsys.readouterr().out
    assert "not closed" in shown
    assert f"{JOB.job_id} on {JOB.address}" in shown
    assert "to resume    the same submit command" in shown
    # It ended
    log.close(Outcome.FINISHED, exit_code=0)
    assert cli.main(["status", store.uri]) == 0
    shown = capsys.readouterr().out
    assert "finished" in shown
    assert "to resume" not in shown
    assert "cluster " not in shown, "a run that has ended needs no cluster's word"


def test_denied_is_an_error_of_the_cluster() -> None:
    assert StoreDenied.exit_code == 3
