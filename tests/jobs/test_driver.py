"""Contract of the driver, on real stores and workers in this process.

* A run that finished is exit code 0 and closed; the same again does nothing; what is quarantined
  stays so and is exit code 1.
* What an age such as ``--since 2h`` meant is stored as a time: a retry comes days later.
* `retry` takes up what is in the corpus; the rest stays in quarantine, and that is said.
* A committed video whose files were damaged in staging is not counted as committed: exit code 1
  and a sentence; the same command again tracks it.
* The run is described in `runs`, `workers` and the log lines, its failures too.
* Videos that are tracked again because they changed are told, and so are videos without objects.
* An error that ends the run leaves a closed log with what was committed, and log lines.
* All masks of an output are computed in one number format: that of the first worker holds for later
  starts, and a worker that computes in another one ends the run with a sentence.
* A worker that gets stuck is replaced, and only the stuck video is said to have been stuck.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from jobs import driver
from jobs.commit_log import read_state
from jobs.config import RunConfig
from jobs.driver import RunSummary
from jobs.progress import SilentReporter
from jobs.publication import Publisher
from jobs.threads import ThreadPool
from tests.datasets import assert_whole, read_table
from tests.e2e.corpora import write_corpus
from tests.media import write_video
from workers.actor import TrackingWorker
from workers.errors import ConfigError, StoreError
from workers.messages import WorkerReady, WorkerSpec
from workers.storage import open_store


class Listener(SilentReporter):
    """A reporter that keeps what it was told."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def on_message(self, level: str, text: str) -> None:
        self.messages.append(f"{level}: {text}")


class Place:
    """A corpus, an output, and runs from one to the other."""

    def __init__(self, folder: Path, num_videos: int) -> None:
        self.corpus, self.out = folder / "corpus", folder / "out"
        self.frames = write_corpus(self.corpus, num_videos, num_frames=6)
        self.told: list[str] = []

    def run(
        self,
        *,
        paths: tuple[str, ...] = (),
        corpus: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        pool: dict[str, Any] | None = None,
        prompts: dict[str, Any] | None = None,
        make: Callable[[WorkerSpec], ThreadPool] | None = None,
        **more: Any,
    ) -> RunSummary:
        config = RunConfig.model_validate(
            {
                "corpus": {"paths": paths or (str(self.corpus),)} | (corpus or {}),
                "out": {"uri": str(self.out)},
                "tracker": {"name": "fake", "options": options or {}},
                "prompts": {"file": str(self.corpus.parent / "prompts.jsonl")} | (prompts or {}),
                "pool": pool or {},
            }
        )
        listener = Listener()
        try:
            return driver.run(
                config,
                reporter=listener,
                pool_factory=lambda _, spec: make(spec) if make else ThreadPool(spec, 2),
                **more,
            )
        finally:
            self.told = listener.messages

    def lines(self) -> list[dict[str, Any]]:
        files = sorted((self.out / "_logs").rglob("driver*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path, 4)


class Float16Worker(TrackingWorker):
    """A worker whose network computes in float16, unless it is told what to compute in."""

    own = "float16"

    def setup(self) -> WorkerReady:
        return replace(super().setup(), dtype=self.spec.tracker.dtype or self.own)


class ConvertedWorker(Float16Worker):
    """The same on a device that has chosen another format."""

    def setup(self) -> WorkerReady:
        return replace(super().setup(), dtype="bfloat16")


def test_one_number_format(place: Place) -> None:
    made = place.run(make=lambda spec: ThreadPool(spec, 1, worker_cls=Float16Worker))
    assert made.exit_code == 0
    write_video(place.corpus / "new.mp4", num_frames=3)
    with pytest.raises(ConfigError, match="in bfloat16, others have begun in float16"):
        place.run(
            prompts={"allow_unprompted": True},
            make=lambda spec: ThreadPool(spec, 1, worker_cls=ConvertedWorker),
        )

    def make(spec: WorkerSpec) -> ThreadPool:
        assert spec.tracker.dtype == "float16"
        return ThreadPool(spec, 1, worker_cls=Float16Worker)

    assert place.run(prompts={"allow_unprompted": True}, make=make).num_committed == 1


def test_an_age_is_stored_as_the_time_that_it_meant(place: Place) -> None:
    write_video(place.corpus / "empty.mp4", num_frames=3)
    (place.corpus / "empty.mp4").write_bytes(b"")
    assert place.run(corpus={"since": "2h"}).exit_code == 1
    state = read_state(open_store(str(place.out)))
    assert state.plan is not None
    since = datetime.fromisoformat(state.plan.config["corpus"]["since"])
    assert timedelta(hours=2) <= datetime.now(UTC) - since < timedelta(hours=3)
    (entry,) = state.quarantined.values()
    assert f"--since {state.plan.config['corpus']['since']}" in entry.reproduce


def test_run_and_run_again(place: Place) -> None:
    summary = place.run()
    assert (summary.exit_code, summary.num_committed, summary.num_skipped) == (0, 4, 0)
    assert_whole(place.out, place.frames)
    assert read_state(open_store(str(place.out))).closed
    again = place.run()
    assert (again.exit_code, again.num_committed, again.num_skipped) == (0, 0, 4)
    runs = read_table(place.out, "runs").to_pylist()
    assert [(row["num_committed"], row["exit_code"]) for row in runs] == [(4, 0), (0, 0)]
    workers = read_table(place.out, "workers").to_pylist()
    assert sum(row["num_videos"] for row in workers) == 4
    assert all(row["exit_reason"] for row in workers)
    begun = [line for line in place.lines() if "begins" in line["message"]]
    assert {line["video"] for line in begun} == set(place.frames)
    assert all(line["run_id"] == summary.run_id and line["attempt_id"] for line in begun)


def test_quarantine_and_retry(place: Place) -> None:
    for name in ("clip-000.mp4", "clip-001.mp4"):
        (place.corpus / name).write_bytes(b"no video" * 100)
    (place.corpus / "clip-002.mp4").write_bytes(b"")
    summary = place.run()
    assert (summary.exit_code, summary.num_quarantined) == (1, 3)
    assert read_table(place.out, "runs")["num_quarantined"].to_pylist() == [3]

    # A run over a part of the corpus, then a retry: what is outside stays in quarantine.
    place.run(paths=(str(place.corpus / "clip-000.mp4"),))
    summary = place.run(paths=(str(place.corpus / "clip-000.mp4"),), retry=True)
    assert summary.exit_code == 1
    assert any("2 quarantined videos are not in the corpus" in text for text in place.told)
    quarantined = read_table(place.out, "quarantine")["name"].to_pylist()
    assert len(quarantined) == 3


def test_damaged_parts_are_work_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = Publisher.publish

    def damaged(publisher: Publisher) -> int:
        for part in sorted(place.out.glob("_staging/1/1-0-*/masks-0.parquet")):
            part.write_bytes(b"x" * part.stat().st_size)
        return publish(publisher)

    with monkeypatch.context() as patch:
        patch.setattr(Publisher, "publish", damaged)
        summary = place.run()
    assert (summary.exit_code, summary.num_committed) == (1, 3)
    assert any("damaged" in text for text in summary.warnings)
    summary = place.run()
    assert (summary.exit_code, summary.num_committed) == (0, 1)
    assert_whole(place.out, place.frames)


def test_replaced_and_empty_videos_are_told(place: Place) -> None:
    place.run()
    write_video(place.corpus / "clip-001.mp4", num_frames=11)
    summary = place.run()
    assert summary.num_committed == 1
    assert any(text.startswith("1 committed videos are tracked again") for text in summary.warnings)
    assert_whole(place.out, place.frames | {"clip-001.mp4": 11})

    write_video(place.corpus / "new.mp4", num_frames=3)
    summary = place.run(prompts={"allow_unprompted": True})
    assert (summary.exit_code, summary.num_committed) == (0, 1)
    assert any("1 of 1 committed videos have no object" in text for text in summary.warnings)


def test_an_error_leaves_a_closed_log(place: Place) -> None:
    class Lost(ThreadPool):
        """A pool whose cluster goes away once two videos are done."""

        num_done = 0

        def events(self, timeout_s: float) -> list[Any]:
            found: list[Any] = super().events(timeout_s)
            self.num_done += sum(type(event).__name__ == "AttemptDone" for event in found)
            if self.num_done > 2:
                raise StoreError("the head node is gone")
            return found

    with pytest.raises(StoreError, match="head node is gone"):
        place.run(make=lambda spec: Lost(spec, 1))
    state = read_state(open_store(str(place.out)))
    assert state.closed
    assert state.num_committed == 2
    assert any("head node is gone" in line["message"] for line in place.lines())
    assert place.run().exit_code == 0
    assert_whole(place.out, place.frames)


def test_stuck_videos_are_named(place: Place) -> None:
    summary = place.run(
        paths=(str(place.corpus / "clip-000.mp4"),),
        options={"hang_on_step": 2, "sleep_s": 0.01},
        pool={"stuck_after_s": 2.0, "workers": 1},
    )
    assert summary.exit_code == 1
    assert {kind for _, kind, _ in summary.quarantined} == {"stuck"}
    assert all("--stuck-after" in message for _, _, message in summary.quarantined)
