"""The worker pools' contract, for Ray and for threads; real Ray, on this machine.

* A worker that was started answers with `WorkerUp` or `WorkerDown`, once.
* Every attempt that was begun answers once, or its worker's `WorkerDown` does.
* Attempts of one worker run at the same time, and heartbeats come meanwhile, per attempt.
* A cancelled attempt still answers; after `kill` nothing of that worker is heard.
* A setup that fails says why, and an error of ours arrives as itself.
* Ray: SIGKILL of an actor's process or of its node's raylet is a lost worker with all it had.
* Ray: an unreachable cluster, a wrong address, a refused token, a lost head node, a machine too
  small: one sentence and the right exit code, in bounded time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from jobs.config import PoolConfig
from jobs.submitted import METADATA_CPUS
from jobs.threads import ThreadPool
from jobs.workforce import (
    AttemptDone,
    AttemptError,
    Event,
    Heartbeat,
    Pool,
    PoolNotice,
    WorkerDown,
    WorkerUp,
)
from tests.cluster import RayCluster, free_port, ray_cluster
from workers.errors import ConfigError, FailureKind, StoreError, TransientError
from workers.messages import (
    Attempt,
    Phase,
    Progress,
    Proposal,
    SourceKind,
    TaskFailed,
    TrackerSpec,
    VideoSource,
    WorkerReady,
    WorkerSpec,
)

ROOT = Path(__file__).resolve().parents[2]


class ScriptedWorker:
    """Does what the video's name says.

    It stands in for the real worker because the pool's contract is about when calls end and how
    processes die, at a chosen moment; the end-to-end tests run the real one.
    """

    def __init__(self, spec: WorkerSpec, *, keep_log: bool = False) -> None:
        self.spec = spec
        self.running: dict[str, threading.Event] = {}

    def setup_on_node(self) -> None:
        if self.spec.tracker.name == "no-weights":
            raise ConfigError("no weights at nowhere.pt: name another file")

    def setup(self) -> WorkerReady:
        if self.spec.tracker.name == "bug":
            raise ZeroDivisionError("oops")
        if self.spec.tracker.name == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        return WorkerReady(host="here", gpu="", pid=os.getpid(), load_s=0.0)

    def process(self, attempt: Attempt) -> Proposal | TaskFailed:
        cancelled = self.running.setdefault(attempt.attempt_id, threading.Event())
        verb = attempt.source.name
        try:
            if verb == "wait":
                cancelled.wait(60)
                return TaskFailed(attempt.attempt_id, FailureKind.PREEMPTED, "cancelled")
            if verb == "raise":
                raise TransientError("the store is tired")
            if verb == "bug":
                raise ZeroDivisionError("oops")
            return Proposal(attempt.attempt_id, {"name": verb}, (), ())
        finally:
            del self.running[attempt.attempt_id]

    def progress(self) -> dict[str, Progress]:
        return {a: Progress(a, Phase.TRACKING, 7) for a in list(self.running)}

    def cancel(self, attempt_id: str) -> None:
        if attempt_id in self.running:
            self.running[attempt_id].set()

    def destroy(self) -> None:
        for cancelled in list(self.running.values()):
            cancelled.set()


def spec(tracker: str = "flow") -> WorkerSpec:
    return WorkerSpec(run_id="r", out_uri="memory://out", tracker=TrackerSpec(tracker))


def attempt(attempt_id: str, verb: str) -> Attempt:
    source = VideoSource(video_key=1, uri=verb, name=verb, kind=SourceKind.FILE)
    return Attempt(attempt_id, epoch=1, number=1, source=source)


def until(pool: Pool, done: Callable[[list[Event]], bool], timeout_s: float = 60) -> list[Event]:
    """Listen until the events heard so far satisfy `done`."""
    heard: list[Event] = []
    deadline = time.monotonic() + timeout_s
    while not done(heard):
        assert time.monotonic() < deadline, heard
        heard += pool.events(1.0)
    return heard


def has(kind: type[Event], count: int = 1) -> Callable[[list[Event]], bool]:
    return lambda heard: sum(isinstance(e, kind) for e in heard) >= count


def start(pool: Pool, count: int = 1) -> list[WorkerUp]:
    for _ in range(count):
        pool.start_worker()
    heard = until(pool, has(WorkerUp, count))
    return [e for e in heard if isinstance(e, WorkerUp)]


def ended(heard: list[Event]) -> dict[str, AttemptDone | AttemptError]:
    found: dict[str, AttemptDone | AttemptError] = {}
    for event in heard:
        if isinstance(event, (AttemptDone, AttemptError)):
            assert event.attempt_id not in found, "an attempt answers once"
            found[event.attempt_id] = event
    return found


PoolMaker = Callable[[WorkerSpec], Pool]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """One local Ray for the tests of this file that need no cluster of their own."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        # Workers must be able to import this file, as the real worker is importable.
        patch.setenv("PYTHONPATH", str(ROOT))
        ray.init(
            "local", include_dashboard=False, num_cpus=4, log_to_driver=False, logging_level=40
        )
        yield
        ray.shutdown()


@pytest.fixture(params=["threads", "ray"])
def make_pool(request: pytest.FixtureRequest) -> Iterator[PoolMaker]:
    pools: list[Pool] = []

    def make(worker_spec: WorkerSpec) -> Pool:
        if request.param == "threads":
            pool: Pool = ThreadPool(worker_spec, 2, worker_cls=ScriptedWorker)
        else:
            from jobs.pool import RayPool

            request.getfixturevalue("local_ray")
            config = PoolConfig(workers=2, cpus_per_worker=0.5, videos_per_worker=2)
            pool = RayPool(worker_spec, config, worker_cls=ScriptedWorker)
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        pool.close()


def test_attempts_end_each_with_its_own_answer(make_pool: PoolMaker) -> None:
    pool = make_pool(spec())
    assert pool.num_workers == 2
    first, second = start(pool, 2)
    assert first.worker_id != second.worker_id
    pool.begin(first.worker_id, attempt("a", "good"))
    pool.begin(first.worker_id, attempt("b", "raise"))
    pool.begin(second.worker_id, attempt("c", "bug"))
    answers = ended(until(pool, lambda heard: len(ended(heard)) == 3))
    done, refused, bug = answers["a"], answers["b"], answers["c"]
    assert isinstance(done, AttemptDone)
    assert done.proposal.video == {"name": "good"}
    assert isinstance(refused, AttemptError)
    assert (refused.failed.kind, refused.failed.message) == (
        FailureKind.TRANSIENT,
        "the store is tired",
    )
    assert isinstance(bug, AttemptError)
    assert (bug.failed.kind, bug.failed.message) == (
        FailureKind.TRACKER,
        "ZeroDivisionError: oops",
    )
    assert "in process" in bug.failed.traceback


def test_heartbeats_and_cancel_while_videos_run(make_pool: PoolMaker) -> None:
    pool = make_pool(spec())
    (worker,) = start(pool)
    for name in ("a", "b", "c"):
        pool.begin(worker.worker_id, attempt(name, "wait"))

    def all_beat(heard: list[Event]) -> bool:
        beats = [e for e in heard if isinstance(e, Heartbeat)]
        return bool(beats) and {p.attempt_id for p in beats[-1].progress} == {"a", "b", "c"}

    beats = [e for e in until(pool, all_beat) if isinstance(e, Heartbeat)]
    assert beats[-1].worker_id == worker.worker_id
    assert beats[-1].progress[0].num_steps == 7
    pool.cancel(worker.worker_id, "b")
    heard = until(pool, lambda heard: bool(ended(heard)))
    assert list(ended(heard)) == ["b"]


def test_nothing_is_heard_of_a_killed_worker(make_pool: PoolMaker) -> None:
    pool = make_pool(spec())
    (worker,) = start(pool)
    pool.begin(worker.worker_id, attempt("a", "wait"))
    until(pool, has(Heartbeat))
    pool.kill(worker.worker_id)
    pool.begin(worker.worker_id, attempt("b", "good"))
    heard = [event for _ in range(3) for event in pool.events(0.5)]
    assert heard == []


@pytest.mark.parametrize(
    ("tracker", "error", "words"),
    [
        ("no-weights", ConfigError, "no weights at nowhere.pt"),
        ("bug", type(None), "ZeroDivisionError: oops"),
    ],
)
def test_failed_setup_says_why(make_pool: PoolMaker, tracker: str, error: type, words: str) -> None:
    pool = make_pool(spec(tracker))
    worker_id = pool.start_worker()
    (down,) = until(pool, has(WorkerDown))
    assert isinstance(down, WorkerDown)
    assert (down.worker_id, down.kind) == (worker_id, FailureKind.WORKER_LOST)
    assert words in down.message
    assert isinstance(down.error, error)


def test_killed_process_is_a_lost_worker_with_all_it_had(local_ray: None) -> None:
    from jobs.pool import RayPool

    pool = RayPool(spec(), PoolConfig(workers=2, cpus_per_worker=1), worker_cls=ScriptedWorker)
    try:
        victim, survivor = start(pool, 2)
        pool.begin(victim.worker_id, attempt("a", "wait"))
        pool.begin(victim.worker_id, attempt("b", "wait"))
        until(pool, lambda heard: any(isinstance(e, Heartbeat) and e.progress for e in heard))
        # When the process is killed
        psutil.Process(victim.ready.pid).kill()
        heard = until(pool, has(WorkerDown))
        # Then there is one event for the worker and none for its attempts
        (down,) = [e for e in heard if isinstance(e, WorkerDown)]
        assert (down.worker_id, down.kind) == (victim.worker_id, FailureKind.WORKER_LOST)
        assert "killed or crashed" in down.message
        assert ended(heard) == {}
        # And the others go on
        pool.begin(survivor.worker_id, attempt("c", "good"))
        assert "c" in ended(until(pool, has(AttemptDone)))
    finally:
        pool.close()


def test_death_in_setup_is_a_lost_worker(local_ray: None) -> None:
    from jobs.pool import RayPool

    pool = RayPool(spec("dies"), PoolConfig(workers=1), worker_cls=ScriptedWorker)
    try:
        pool.start_worker()
        (down,) = until(pool, has(WorkerDown))
        assert isinstance(down, WorkerDown)
        assert (down.kind, down.error) == (FailureKind.WORKER_LOST, None)
    finally:
        pool.close()


def test_slow_setup_is_given_up(local_ray: None) -> None:
    from jobs.pool import RayPool

    pool = RayPool(spec(), PoolConfig(workers=1), worker_cls=ScriptedWorker, setup_within_s=0.0)
    try:
        pool.start_worker()
        (down,) = until(pool, has(WorkerDown))
        assert isinstance(down, WorkerDown)
        assert "not ready" in down.message
    finally:
        pool.close()


def test_the_driver_of_a_job_takes_places(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs.pool import RayPool

    def num_workers() -> int:
        pool = RayPool(spec(), PoolConfig(), worker_cls=ScriptedWorker)
        try:
            return pool.num_workers
        finally:
            pool.close()

    job = {"metadata": {METADATA_CPUS: "1.5"}}
    assert num_workers() == 4
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert num_workers() == 2


def test_places_that_others_hold(local_ray: None) -> None:
    import ray

    from jobs.pool import RayPool

    other = ray.remote(num_cpus=4)(ScriptedWorker).remote(spec())
    ray.get(other.progress.remote())
    pool = RayPool(spec(), PoolConfig(place_within_s=1), worker_cls=ScriptedWorker)
    try:
        pool.start_worker()
        with pytest.raises(StoreError, match="for 1 s none was free on a cluster with 4 CPUs"):
            until(pool, lambda _: False)
    finally:
        pool.close()
        ray.kill(other)


def test_gpus_that_may_come_are_asked_for(local_ray: None) -> None:
    from jobs.pool import RayPool

    config = PoolConfig(gpus_per_worker="auto", place_within_s=1)
    pool = RayPool(spec("sam2"), config, worker_cls=ScriptedWorker)
    try:
        (notice,) = [e for e in until(pool, has(PoolNotice, 1)) if isinstance(e, PoolNotice)]
        assert "1 GPUs, and the cluster has 4 CPUs and 0 GPUs on 1 node: waiting" in notice.text
        with pytest.raises(StoreError, match="needs 1 CPUs and 1 GPUs, and for 1 s no node"):
            until(pool, lambda _: False)
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("address", "error", "words"),
    [
        ("hello", ConfigError, "HOST:PORT"),
        ("ray://127.0.0.1:10001", ConfigError, "HOST:PORT"),
        ("127.0.0.1:FREE", StoreError, "no Ray cluster answers"),
    ],
)
def test_wrong_address(
    address: str, error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs import pool

    monkeypatch.setattr(pool, "_REACH_S", 1.0)
    with pytest.raises(error, match=words):
        pool._check_reachable(address.replace("FREE", str(free_port())))


# A driver of its own process, because Ray ends the process in some of these, and keeps the token
# of the first cluster that a process has seen.
_DRIVER = """
    import sys, time
    from jobs.config import PoolConfig
    from jobs.pool import RayPool
    from tests.jobs.test_pool import ScriptedWorker, attempt, spec, start
    from workers.errors import MaskmillError

    try:
        pool = RayPool(
            spec(),
            PoolConfig(
                workers="auto",
                gpus_per_worker=float(sys.argv[1]),
                # Soon given up only where the test waits for that.
                place_within_s=4 if float(sys.argv[1]) else 60,
            ),
            worker_cls=ScriptedWorker,
            # Longer than a busy machine keeps a living head from answering.
            head_lost_after_s=15,
        )
        try:
            # Not pool.num_workers: its first census may still count a node that has just died.
            ups = start(pool, 2)
            for up in ups:
                pool.begin(up.worker_id, attempt("on-" + up.worker_id, "wait"))
                print("UP", up.worker_id, up.ready.pid, flush=True)
            while True:
                for event in pool.events(1.0):
                    print(event, flush=True)
        finally:
            pool.close()
    except MaskmillError as error:
        print("ERROR", error, flush=True)
        raise SystemExit(error.exit_code)
"""


def driver(environment: dict[str, str], num_gpus: float = 0) -> subprocess.Popen[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_DRIVER), str(num_gpus)],
        env={**clean, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def expect(process: subprocess.Popen[str], words: str) -> str:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            return line
    raise AssertionError(f"{words!r} was not said: {''.join(lines)}")


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster(num_nodes=2, cpus_per_node=1) as running:
        yield running


def test_refused_token(cluster: RayCluster, tmp_path: Path) -> None:
    no_token = {"RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}
    missing = driver(no_token)
    wrong = driver({**cluster.environment, "RAY_AUTH_TOKEN": "0" * 64})
    assert "wants a token and none was found" in expect(missing, "ERROR")
    assert "did not let us in: check the token" in expect(wrong, "ERROR")
    assert missing.wait(30) == wrong.wait(30) == 3


def test_no_node_has_what_a_worker_needs(cluster: RayCluster) -> None:
    process = driver(cluster.environment, num_gpus=2)
    assert "a worker needs 1 CPUs and 2 GPUs" in expect(process, "ERROR")
    assert process.wait(30) == 3


def test_loss_of_a_node_that_is_taken_away_is_a_preemption(cluster: RayCluster) -> None:
    # Given a worker on a node of its own, which is then drained as before a spot interruption
    process = driver(cluster.environment)
    pids = [int(expect(process, "UP").split()[2]) for _ in range(2)]
    victim = next(n for n in cluster.nodes if pids[0] in {p.pid for p in n.processes()})
    cluster.drain(victim)
    # When the node goes
    victim.kill_raylet()
    # Then the worker was preempted
    assert "'preempted'" in expect(process, "WorkerDown")
    process.kill()
    process.wait(30)
    cluster.nodes.remove(victim)
    victim.kill()
    cluster.add_node()


def test_lost_node_and_lost_head(cluster: RayCluster) -> None:
    """Last in this file: it leaves the cluster in ruins."""
    # Given a driver with a worker on each of two nodes
    process = driver(cluster.environment)
    pids = [int(expect(process, "UP").split()[2]) for _ in range(2)]
    victim = next(n for n in cluster.nodes if pids[0] in {p.pid for p in n.processes()})
    # When a raylet is killed, its worker is lost
    victim.kill_raylet()
    line = expect(process, "WorkerDown")
    assert "worker_lost" in line
    assert "was lost" in line
    # When the head node is killed, the driver ends with a sentence
    cluster.head.kill_gcs()
    assert "head node of the Ray cluster" in expect(process, "ERROR")
    assert process.wait(30) == 3
