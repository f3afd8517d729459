"""Contract: commits go into the log in groups, with what is new of the workers that made them.

* A full group is appended at once, others when they have waited, or when they are told to be.
* A record names only workers to which something happened since the one before, however many there
  are; the log of a driver that is killed has all that its workers did up to the last record.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from jobs.commit_log import (
    CommitLog,
    LogState,
    Outcome,
    VideoCommit,
    iter_records,
    read_state,
    replay,
)
from jobs.ledger import Ledger
from jobs.outbox import GROUP_SIZE, MAX_WAIT_S, Outbox
from jobs.records import Kind, Quarantined, Record
from tests.jobs.outputs import identity_of, run_plan, video_row
from workers.errors import FailureKind
from workers.messages import WorkerReady
from workers.storage import Store, open_store

NUM_WORKERS = 1000
NUM_AT_WORK = 10
NUM_FRAMES = 5


class Driver:
    """What the driver does with ledger and outbox, at a time that stands still unless told."""

    def __init__(self, store: Store) -> None:
        self.now = 0.0
        self.log = CommitLog.acquire(store, "driver")
        self.log.plan(run_plan())
        self.ledger = Ledger(lambda: self.now)
        self.outbox = Outbox(
            self.log,
            lambda: self.now,
            lambda: self.ledger.changed_rows(run_id="run-1", epoch=self.log.epoch),
        )
        self.numbers = itertools.count(1)

    def start(self, worker_id: str) -> None:
        self.ledger.started(worker_id)
        self.ledger.ready(worker_id, WorkerReady("host", "", 1, 1.0))

    def commit(self, worker_id: str) -> None:
        key = next(self.numbers)
        self.ledger.began(worker_id, str(key))
        self.ledger.ended(worker_id, str(key), NUM_FRAMES)
        row = video_row(key, NUM_FRAMES, 0)
        self.outbox.commit(VideoCommit(key, identity_of(key, 0), str(key), 1, (), row, ()))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "out"))


def records(store: Store, kind: Kind) -> list[Record]:
    found = iter_records(store, 1, read_state(store).last_seq)
    return [record for record in found if record.kind is kind]


def test_groups(store: Store) -> None:
    driver = Driver(store)
    driver.start("a")
    for _ in range(GROUP_SIZE - 1):
        driver.commit("a")
    assert driver.log.state.num_committed == 0
    driver.commit("a")
    assert (driver.log.state.num_committed, len(driver.outbox)) == (GROUP_SIZE, 0)
    driver.commit("a")
    driver.outbox.quarantine(
        Quarantined(99, identity_of(99, 0), "/99.mp4", FailureKind.INPUT, "no frames")
    )
    driver.now += MAX_WAIT_S / 2
    driver.outbox.flush_if_due()
    assert len(driver.outbox) == 2
    driver.now += MAX_WAIT_S / 2
    driver.outbox.flush_if_due()
    assert driver.log.state.num_committed == GROUP_SIZE + 1
    assert driver.log.state.quarantined.keys() == {99}


def test_a_record_names_only_workers_that_did_something(store: Store) -> None:
    # Given a thousand workers, most of which track something long
    driver = Driver(store)
    for number in range(NUM_WORKERS):
        driver.start(f"w{number}")
        driver.ledger.began(f"w{number}", "long")
    # When a few of them finish many videos, one after another
    for number in range(5 * GROUP_SIZE):
        driver.now += 0.1
        driver.commit(f"w{number % NUM_AT_WORK}")
    # Then the first record names them all, and each later one those few.
    counts = [len(record.payload["workers"]) for record in records(store, Kind.COMMIT)]
    assert counts == [NUM_WORKERS] + 4 * [NUM_AT_WORK]
    # Whoever reads the log of the killed driver knows of every worker, and of all that it did.
    workers = read_state(store).workers
    assert len(workers) == NUM_WORKERS
    for number in range(NUM_WORKERS):
        expected = 5 * GROUP_SIZE // NUM_AT_WORK if number < NUM_AT_WORK else 0
        assert workers[f"1-w{number}"]["num_videos"] == expected
    # A run that ends says once more what all of them did, to the last second.
    driver.now += 50
    rows = driver.ledger.worker_rows(run_id="run-1", epoch=1)
    driver.log.close(Outcome.FINISHED, exit_code=0, workers=rows)
    assert {row["busy_s"] for row in read_state(store).workers.values()} == {driver.now}


def test_a_killed_driver_leaves_what_its_workers_did_up_to_the_last_record(store: Store) -> None:
    driver = Driver(store)
    for number in range(3):
        driver.start(f"w{number}")
    for number in range(GROUP_SIZE):
        driver.commit(f"w{number % 2}")
    driver.ledger.gone("w0", "its node was taken away")
    driver.start("w3")
    for number in range(GROUP_SIZE // 2):
        driver.commit(f"w{1 + number % 3}")
    driver.outbox.flush()
    rows = driver.ledger.worker_rows(run_id="run-1", epoch=1)
    for _ in range(3):  # never said
        driver.commit("w2")
    again = CommitLog.acquire(store, "its successor")
    for state in (again.state, replay(store, LogState(), again.state.last_seq)):
        assert state.workers == {row["worker_id"]: row for row in rows}
    assert sum(row["num_videos"] for row in rows) == again.state.num_committed
