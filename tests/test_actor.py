"""Contract of `workers.actor`.

* `setup` loads tracker and detector, proves that the output can be written and leaves nothing
  there; what is wrong with the configuration or the output is an exception with a sentence.
* `process` never raises: every outcome is a Proposal or a TaskFailed with kind, sentence and
  traceback.
* One attempt more than may be tracked is prefetched: it waits, decoded, until a slot is free; an
  attempt with the small profile waits for all of them.
* Several videos in flight give the rows of one by one.
* The local files of a worker that was killed are removed by the next one on its node; those of a
  living one stay.
* `progress` and `cancel` concern one attempt, never another; `destroy` ends everything.
* Log lines carry run, video and attempt, and are put into the output on request, those of a failure
  at once.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests import media
from tests.one_video import BOX, attempt_of, read_rows, spec_of
from workers.actor import TrackingWorker
from workers.errors import ConfigError, FailureKind, StoreError
from workers.messages import (
    Attempt,
    DetectorSpec,
    Phase,
    Proposal,
    TaskFailed,
    TrackerSpec,
    WorkerSpec,
)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return media.write_video(tmp_path / "clip.mp4", num_frames=12)


Start = Callable[..., TrackingWorker]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start workers that are destroyed at the end."""
    workers: list[TrackingWorker] = []

    def make(spec: WorkerSpec, **kwargs: Any) -> TrackingWorker:
        worker = TrackingWorker(spec, **kwargs)
        workers.append(worker)
        worker.setup_on_node()
        worker.setup()
        return worker

    yield make
    for worker in workers:
        worker.destroy()


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def phase_of(worker: TrackingWorker, attempt_id: str) -> Phase | None:
    progress = worker.progress().get(attempt_id)
    return progress.phase if progress else None


def test_setup_says_where_and_what(tmp_path: Path, start: Start) -> None:
    worker = start(spec_of(tmp_path))
    ready = worker.ready
    assert ready is not None
    assert ready.host
    assert ready.pid > 0
    assert ready.load_s > 0
    assert ready.tracker_sha256 == ready.detector_sha256 == ""
    assert {"python", "numpy", "av", "pycocotools"} <= set(ready.versions)
    # The probe of the output is gone.
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tracker": TrackerSpec("nonesuch")}, "no tracker 'nonesuch'"),
        ({"tracker": TrackerSpec("fake", options={"speed": 3})}, "no option 'speed'"),
        ({"tracker": TrackerSpec("yolo11n-seg", checkpoint="/gone/w.pt")}, "/gone/w.pt does not"),
        ({"detector": DetectorSpec("nonesuch")}, "no detector 'nonesuch'"),
        ({"detector": DetectorSpec("yolo11n", checkpoint="/gone/w.pt")}, "/gone/w.pt does not"),
    ],
)
def test_a_wrong_configuration(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    worker = TrackingWorker(spec_of(tmp_path, **fields))
    with pytest.raises(ConfigError, match=words):
        worker.setup()
    worker.destroy()


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file where the output should be")
    with pytest.raises(StoreError, match="out"):
        TrackingWorker(spec_of(tmp_path)).setup()


def test_videos_one_after_the_other(tmp_path: Path, video: Path, start: Start) -> None:
    worker = start(spec_of(tmp_path))
    for name in ("a1", "a2"):
        proposal = worker.process(attempt_of(video, BOX, attempt_id=name))
        assert isinstance(proposal, Proposal)
        assert proposal.attempt_id == name
        assert len(read_rows(worker.spec, proposal)["frames"]) == 12
        assert worker.ready is not None
        assert proposal.video["host"] == worker.ready.host
    assert worker.progress() == {}


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"fail_on_step": 2}, FailureKind.TRACKER, "fake could not track it"),
        ({"oom_on_step": 2}, FailureKind.OUT_OF_MEMORY, "memory ran out"),
    ],
)
def test_failures_are_data(
    tmp_path: Path,
    video: Path,
    start: Start,
    options: dict[str, Any],
    kind: FailureKind,
    words: str,
) -> None:
    worker = start(spec_of(tmp_path, {**options, "faulty_width": 96}))
    failed = worker.process(attempt_of(video, BOX))
    assert isinstance(failed, TaskFailed)
    assert (failed.attempt_id, failed.kind) == ("a1", kind)
    assert words in failed.message
    assert "as it was told" in failed.traceback
    # The worker is as good as before: a video of another size is none of the faulty ones.
    other = media.write_video(tmp_path / "other.mp4", num_frames=3, width=64)
    assert isinstance(worker.process(attempt_of(other, BOX, attempt_id="a2")), Proposal)


def test_a_bad_video_is_data(tmp_path: Path, start: Start) -> None:
    (tmp_path / "zero.mp4").touch()
    failed = start(spec_of(tmp_path)).process(attempt_of(tmp_path / "zero.mp4", BOX))
    assert isinstance(failed, TaskFailed)
    assert failed.kind is FailureKind.INPUT
    assert "zero.mp4 is empty" in failed.message


def test_the_next_video_is_prefetched(tmp_path: Path, video: Path, start: Start) -> None:
    worker = start(spec_of(tmp_path, {"sleep_s": 0.05}))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(worker.process, attempt_of(video, BOX, attempt_id="first"))
        wait_for(lambda: phase_of(worker, "first") is Phase.TRACKING)
        second = pool.submit(worker.process, attempt_of(video, BOX, attempt_id="second"))
        wait_for(lambda: phase_of(worker, "second") is Phase.WAITING)
        assert phase_of(worker, "first") is Phase.TRACKING
        assert isinstance(first.result(), Proposal)
        assert isinstance(second.result(), Proposal)


def test_several_videos_in_flight_give_the_same_rows(
    tmp_path: Path, video: Path, start: Start
) -> None:
    one = start(spec_of(tmp_path, {"late_frames": 2}))
    expected = one.process(attempt_of(video, BOX))
    assert isinstance(expected, Proposal)
    rows = read_rows(one.spec, expected)
    many = start(spec_of(tmp_path, {"late_frames": 2}, videos_in_flight=3))
    attempts = [attempt_of(video, BOX, attempt_id=f"b{n}") for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for proposal in pool.map(many.process, attempts):
            assert isinstance(proposal, Proposal)
            assert read_rows(many.spec, proposal) == rows


def test_a_small_profile_is_tracked_alone(tmp_path: Path, video: Path, start: Start) -> None:
    worker = start(spec_of(tmp_path, {"sleep_s": 0.03}, videos_in_flight=2))
    seen: set[frozenset[str]] = set()
    attempts: list[Attempt] = [
        attempt_of(video, BOX, attempt_id="x"),
        attempt_of(video, BOX, attempt_id="small", small=True),
        attempt_of(video, BOX, attempt_id="y"),
    ]
    with ThreadPoolExecutor(3) as pool:
        results = [pool.submit(worker.process, attempt) for attempt in attempts]
        while not all(result.done() for result in results):
            progress = worker.progress().values()
            seen.add(frozenset(p.attempt_id for p in progress if p.phase is Phase.TRACKING))
            time.sleep(0.002)
    assert all(isinstance(result.result(), Proposal) for result in results)
    assert frozenset({"small"}) in seen
    assert not {names for names in seen if "small" in names and len(names) > 1}


def test_cancelling_concerns_one_attempt(tmp_path: Path, video: Path, start: Start) -> None:
    worker = start(spec_of(tmp_path, {"sleep_s": 0.05}))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(worker.process, attempt_of(video, BOX, attempt_id="first"))
        wait_for(lambda: phase_of(worker, "first") is Phase.TRACKING)
        second = pool.submit(worker.process, attempt_of(video, BOX, attempt_id="second"))
        wait_for(lambda: phase_of(worker, "second") is Phase.WAITING)
        worker.cancel("unknown")
        worker.cancel("second")
        stopped = second.result()
        assert isinstance(stopped, TaskFailed)
        assert stopped.kind is FailureKind.PREEMPTED
        assert isinstance(first.result(), Proposal)


def test_destroy_ends_everything(tmp_path: Path, video: Path, start: Start) -> None:
    worker = start(spec_of(tmp_path, {"sleep_s": 0.1}))
    with ThreadPoolExecutor(2) as pool:
        results = [
            pool.submit(worker.process, attempt_of(video, BOX, attempt_id=name))
            for name in ("first", "second")
        ]
        wait_for(lambda: len(worker.progress()) == 2)
        worker.destroy()
        for result in results:
            failed = result.result()
            assert isinstance(failed, TaskFailed)
            assert failed.kind is FailureKind.PREEMPTED
    again = worker.process(attempt_of(video, BOX))
    assert isinstance(again, TaskFailed)
    assert again.kind is FailureKind.PREEMPTED
    assert list((tmp_path / "spool").iterdir()) == []
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("maskmill-")]


def test_the_log_of_a_worker(tmp_path: Path, video: Path, start: Start) -> None:
    folder = tmp_path / "out" / "_logs" / "run"

    def logged(words: str) -> list[dict[str, Any]]:
        paths = sorted(path for path in folder.glob("*.jsonl")) if folder.exists() else []
        lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
        return [line for line in lines if words in line["message"]]

    worker = start(spec_of(tmp_path, {"fail_on_step": 1}), keep_log=True)
    worker.process(attempt_of(video, BOX))
    # The reason of a failure does not wait for the next time, nor for the end of the worker.
    wait_for(lambda: bool(logged("failed")))
    worker.destroy()
    assert len(logged("worker ready")) == 1
    (failed,) = logged("failed")
    assert failed["run_id"] == "run"
    assert failed["video"] == "clip.mp4"
    assert failed["attempt_id"] == "a1"
    assert failed["video_key"] == "77"


def test_the_files_of_a_killed_worker_are_removed(
    tmp_path: Path, video: Path, start: Start
) -> None:
    # Given a worker process that is killed while it tracks,
    spec = spec_of(tmp_path)
    words = [sys.executable, "-c", _WORKER, str(video), spec.out_uri, str(spec.spool_dir)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"tracking\n"
        # when another starts beside it, its files stay,
        start(spec)
        spool = tmp_path / "spool"
        assert len(list(spool.iterdir())) == 1
        process.kill()
    # and when one starts after its death, they go.
    start(spec)
    assert list(spool.iterdir()) == []


_WORKER = """
import sys, threading, time
from pathlib import Path
from tests.one_video import BOX, attempt_of
from workers.actor import TrackingWorker
from workers.messages import Phase, TrackerSpec, WorkerSpec
video, out_uri, spool_dir = sys.argv[1:]
tracker = TrackerSpec("fake", options={"sleep_s": 5.0})
worker = TrackingWorker(WorkerSpec("run", out_uri, tracker, spool_dir=spool_dir))
worker.setup()
attempt = attempt_of(Path(video), BOX)
threading.Thread(target=worker.process, args=(attempt,), daemon=True).start()
while not any(p.phase is Phase.TRACKING for p in worker.progress().values()):
    time.sleep(0.01)
print("tracking", flush=True)
time.sleep(60)
"""
