"""Publication: from commits to files that a plain glob reads.

* After `publish` every committed video is in the visible folders once, whole, sorted by video,
  frame and object, in files with the schema's version and a name no other plan uses.
* A video that was tracked again replaces its older rows; others of its segment stay.
* `compact` leaves few files with the same rows; files are cut near the target size at videos.
* Tables of current state say what the log says, also after a fenced driver wrote them late.
* A part that is missing or wrong rejects its video alone: it is work again, the rest is visible,
  and the publisher tells which and why until the video is published after all.
* Files under construction lie in a folder that is made when missing; what a killed process left
  there goes with the next driver.
* A driver that was fenced out writes nothing visible any more, and what it was just writing when
  it lost the fence does not stay.
* Dying before or after any write of a history with publication, replacement, compaction and gc,
  and recovering, leaves each committed video visible exactly once and loses none; readers that
  look in between never see a row twice.
* Two drivers in any order, and crashes at random, do not change that.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.dataset as pds
import pyarrow.parquet as pq
import pytest

from jobs import publication
from jobs.commit_log import CommitLog, Outcome, Quarantined, TaskState, read_state
from jobs.maintenance import collect, verify
from jobs.publication import Publisher
from jobs.records import SEGMENT_TABLES
from tests import servers
from tests.crashing import Crashed, CrashingStore
from tests.jobs.outputs import (
    commit_videos,
    identity_of,
    run_plan,
    stage_video,
    visible_table,
    visible_versions,
    worker_row,
)
from workers.errors import FailureKind, FencedOut, StoreError
from workers.sinks.schema import VERSION_KEY, arrow_schema
from workers.storage import Store, open_store
from workers.storage.local import LocalStore


@pytest.fixture(autouse=True)
def _no_power_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    # These tests kill processes, not machines. fsync is a promise about power, it changes nothing
    # that a process can see, and thousands of them take minutes.
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "out"))


def assert_whole(store: Store) -> None:
    report = verify(store, deep=True)
    assert report.problems == []


def test_a_glob_sees_every_video_once(store: Store) -> None:
    log = CommitLog.acquire(store, "one")
    keys = [5, -3, 2**62, -(2**62), 17]
    for key in keys:
        commit_videos(log, [key], mask_parts=2)
    commit_videos(log, [1000], num_objects=0)
    commit_videos(log, [1001], num_frames=0, num_objects=0)
    assert Publisher(log).publish() == 1
    assert visible_versions(store) == dict.fromkeys([*keys, 1000, 1001], 0)
    masks = visible_table(store, "masks")
    order = list(zip(*(masks[n].to_pylist() for n in ("video_key", "frame_idx", "object_id"))))  # noqa: B905 - columns of one table
    assert order == sorted(order)
    assert Publisher(log).publish() == 0
    assert_whole(store)


def test_everybodys_tools_read_it(store: Store) -> None:
    log = CommitLog.acquire(store, "one")
    log.plan(run_plan())
    publisher = Publisher(log)
    for start in (0, 10):
        commit_videos(log, range(start, start + 4))
        publisher.publish()
    for table in (*SEGMENT_TABLES, "categories", "workers", "runs", "quarantine"):
        folder = store.local_path(table)
        assert folder is not None
        rows = pds.dataset(folder, format="parquet").to_table().num_rows
        query = f"SELECT count(*) FROM '{folder}/*.parquet'"
        assert duckdb.sql(query).fetchall() == [(rows,)]
        for file in folder.iterdir():
            metadata = pq.read_schema(file).metadata
            assert metadata[VERSION_KEY] == b"1"
            assert pq.read_schema(file).field(0).metadata[b"description"]
    counted = duckdb.sql(
        f"SELECT max(n) FROM (SELECT count(*) AS n FROM '{store.local_path('masks')}/*.parquet' "
        f"GROUP BY video_key, frame_idx, object_id)"
    ).fetchall()
    assert counted == [(1,)]


def test_a_video_tracked_again_replaces_its_older_rows(store: Store) -> None:
    log = CommitLog.acquire(store, "one")
    publisher = Publisher(log)
    commit_videos(log, [1, 2, 3])
    publisher.publish()
    commit_videos(log, [4, 5])
    publisher.publish()
    commit_videos(log, [2, 6], version=1, num_frames=5)
    publisher.publish()
    assert visible_versions(store) == {1: 0, 2: 1, 3: 0, 4: 0, 5: 0, 6: 1}
    assert len(log.state.segments) == 2
    assert not list(store.list("_segments/"))
    assert_whole(store)


def test_a_commit_superseded_before_it_was_published_never_shows(store: Store) -> None:
    log = CommitLog.acquire(store, "one")
    commit_videos(log, [1])
    commit_videos(log, [1], version=1)
    Publisher(log).publish()
    assert visible_versions(store) == {1: 1}
    assert_whole(store)


def test_what_is_quarantined_later_stays_readable(store: Store) -> None:
    log = CommitLog.acquire(store, "one")
    commit_videos(log, [1])
    publisher = Publisher(log)
    publisher.publish()
    log.quarantine([Quarantined(1, identity_of(1, 1), "u", FailureKind.INPUT, "gone bad")])
    publisher.publish()
    assert visible_versions(store) == {1: 0}
    assert visible_table(store, "quarantine")["message"].to_pylist() == ["gone bad"]
    assert_whole(store)


def test_compaction_leaves_few_files_with_the_same_rows(store: Store) -> None:
    log = CommitLog.acquire(store, "one")
    publisher = Publisher(log)
    rng = random.Random(1)
    keys = [rng.randrange(-(2**63), 2**63) for _ in range(30)]
    for key in keys:
        commit_videos(log, [key])
        publisher.publish()
    before = {t: visible_table(store, t).sort_by("video_key") for t in ("videos", "objects")}
    assert publisher.compact() == 1
    assert len(log.state.segments) == 1
    assert len(list(store.list("masks/"))) == 1
    assert visible_versions(store) == dict.fromkeys(keys, 0)
    for table, rows in before.items():
        assert visible_table(store, table).sort_by("video_key").equals(rows)
    assert publisher.compact() == 0
    assert_whole(store)
    assert_whole_after_reopening(store)


def assert_whole_after_reopening(store: Store) -> None:
    Publisher(CommitLog.acquire(store, "again")).recover()
    assert_whole(store)


def test_files_are_cut_near_the_target_between_videos(store: Store) -> None:
    log = CommitLog.acquire(store, "one")
    publisher = Publisher(log, target_bytes=20_000)
    rng = random.Random(2)
    for _ in range(4):
        commit_videos(log, [rng.randrange(-(2**63), 2**63) for _ in range(8)], num_frames=12)
    publisher.publish()
    (segment,) = log.state.segments.values()
    masks = [file for file in segment.files if file.table == "masks"]
    assert len(masks) >= 3
    assert [file.low for file in masks[1:]] == [file.high + 1 for file in masks[:-1]]
    assert all(file.num_rows % 24 == 0 for file in masks)  # whole videos
    largest = max(file.num_rows for file in masks)
    assert largest < 2 * min(file.num_rows for file in masks[:-1])
    assert_whole(store)
    for _ in range(3):  # segments below half the target are merged, again cut
        commit_videos(log, [rng.randrange(-(2**63), 2**63) for _ in range(2)])
        publisher.publish()
    publisher.compact()
    assert_whole(store)


def test_a_plan_takes_whole_records_up_to_its_bounds(store: Store) -> None:
    log = CommitLog.acquire(store, "one")
    for start in range(0, 12, 3):
        commit_videos(log, range(start, start + 3))
    publisher = Publisher(log, max_plan_videos=7)
    assert publisher.publish() == 2
    assert [len(log.state.segment_keys(seq)) for seq in log.state.segments] == [6, 6]
    ranges = [(segment.first, segment.last) for segment in log.state.segments.values()]
    assert all(first <= last for first, last in ranges)
    assert ranges[0][1] + 1 == ranges[1][0]
    commit_videos(log, [0, 11], version=1)  # one record, but two segments to replace: too many
    commit_videos(log, [100])
    small = Publisher(log, max_plan_bytes=1)
    assert small.publish() == 2
    assert_whole(store)


def test_large_parts_go_through_the_disk(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publication, "SMALL_PART_BYTES", 0)
    monkeypatch.setattr(publication, "BATCH_ROWS", 7)
    log = CommitLog.acquire(store, "one")
    publisher = Publisher(log)
    for start in (0, 5):
        commit_videos(log, range(start, start + 5), num_frames=20)
        publisher.publish()
    commit_videos(log, [3, 30], version=1, num_frames=20)
    publisher.publish()
    publisher.compact()
    assert visible_versions(store) == dict.fromkeys(range(10), 0) | {3: 1, 30: 1}
    assert_whole(store)


def test_current_tables_say_what_the_log_says(store: Store) -> None:
    log = CommitLog.acquire(store, "host:1", clock=lambda: 1_700_000_000.0)
    log.plan(run_plan())
    log.commit([stage_video(store, 1, 1)], [worker_row("w1", 1, 1), worker_row("w0", 1)])
    log.quarantine(
        [Quarantined(9, 1, "/corpus/9.mp4", FailureKind.INPUT, "no frames", "", 0, "cmd", "9")]
    )
    publisher = Publisher(log)
    publisher.finish(Outcome.FINISHED, exit_code=1, workers=[worker_row("w0", 1, 7)])
    (run,) = visible_table(store, "runs").to_pylist()
    assert (run["run_id"], run["exit_code"], run["num_committed"]) == ("run-1", 1, 1)
    assert run["num_quarantined"] == 1
    assert run["ended_at"].timestamp() == 1_700_000_000.0
    workers = visible_table(store, "workers").to_pylist()
    assert [(w["worker_id"], w["num_videos"]) for w in workers] == [("w0", 7), ("w1", 1)]
    assert visible_table(store, "categories")["name"].to_pylist() == ["cat", "dog"]
    (bad,) = visible_table(store, "quarantine").to_pylist()
    assert (bad["video_key"], bad["error_class"], bad["name"]) == (9, "input", "9")
    assert read_state(store).closed
    # A retry releases it, and the table follows.
    again = CommitLog.acquire(store, "host:2")
    again.release([9])
    Publisher(again).recover()
    assert visible_table(store, "quarantine").num_rows == 0


def damage_nothing(store: Store, key: str) -> None:
    store.delete([key])


def damage_bytes(store: Store, key: str) -> None:
    data = store.read_bytes(key)
    store.write_bytes(key, data[:40] + b"xx" + data[42:])


@pytest.mark.parametrize("damage", [damage_nothing, damage_bytes])
@pytest.mark.parametrize("table", ["masks", "frames"])
def test_a_bad_part_rejects_its_video_alone(
    store: Store, damage: Callable[[Store, str], None], table: str
) -> None:
    log = CommitLog.acquire(store, "one")
    publisher = Publisher(log)
    commit_videos(log, [1, 2, 3])
    publisher.publish()
    commits = commit_videos(log, [2, 7], version=1) + commit_videos(log, [8, 9])
    for commit in (commits[0], commits[2]):
        (part,) = [p for p in commit.parts if p.table == table]
        damage(store, part.key)
    publisher.publish()
    # The older rows of a video whose newer ones are bad stay.
    assert visible_versions(store) == {1: 0, 2: 0, 3: 0, 7: 1, 9: 0}
    assert log.state.task(2)[1] is TaskState.UNKNOWN
    assert log.state.task(8)[1] is TaskState.UNKNOWN
    assert log.state.num_committed == 4
    rejected = [s.rejected for s in log.state.segments.values() if s.rejected]
    assert set(rejected[0]) == {2, 8}
    assert commits[2].parts[0].key.rpartition("/")[0] in rejected[0][8]
    assert publisher.rejected == rejected[0]
    commit_videos(log, [2], version=2)
    publisher.publish()
    assert set(publisher.rejected) == {8}
    commit_videos(log, [8], version=2)
    publisher.publish()
    assert publisher.rejected == {}
    assert visible_versions(store) == {1: 0, 2: 2, 3: 0, 7: 1, 8: 2, 9: 0}
    assert_whole(store)


def test_a_fenced_driver_that_wrote_current_tables_late_is_corrected(store: Store) -> None:
    # Given a driver that had nothing in quarantine, and its successor that has
    old = CommitLog.acquire(store, "old")
    Publisher(old).write_current()
    late = store.read_bytes("quarantine/current.parquet")
    new = CommitLog.acquire(store, "new")
    publisher = Publisher(new)
    publisher.recover()
    new.quarantine([Quarantined(9, 1, "/corpus/9.mp4", FailureKind.INPUT, "no frames")])
    publisher.publish()
    # when a write that the old one had begun lands only now,
    store.write_bytes("quarantine/current.parquet", late)
    # then the end of the run puts it right.
    publisher.finish(Outcome.FINISHED, exit_code=1)
    assert visible_table(store, "quarantine")["message"].to_pylist() == ["no frames"]


def test_the_spool_folder_is_made_and_cleared_of_the_dead(store: Store, tmp_path: Path) -> None:
    spool = tmp_path / "not" / "yet"
    killed = subprocess.run([sys.executable, "-c", DIE_IN_SPOOL, str(spool)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(spool.iterdir())) == 1
    log = CommitLog.acquire(store, "one")
    publisher = Publisher(log, spool_dir=str(spool))
    publisher.recover()
    assert list(spool.iterdir()) == []
    spool.rmdir()
    commit_videos(log, [1])
    assert publisher.publish() == 1
    assert list(spool.iterdir()) == []
    assert visible_versions(store) == {1: 0}


DIE_IN_SPOOL = """
import os, signal, sys
from workers.spool import spool_folder
with spool_folder(sys.argv[1]) as folder:
    (folder / "0000.parquet").write_bytes(b"half of it")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_part_with_rows_of_another_video_is_bad(store: Store) -> None:
    log = CommitLog.acquire(store, "one")
    one, two = stage_video(store, 1, 1), stage_video(store, 1, 2)
    mixed = type(one)(1, 1, "a", 1, two.parts, one.video)
    log.commit([mixed, two])
    Publisher(log).publish()
    assert visible_versions(store) == {2: 0}


def test_a_damaged_visible_file_is_said_not_rewritten(store: Store) -> None:
    log = CommitLog.acquire(store, "one")
    publisher = Publisher(log)
    commit_videos(log, [1])
    publisher.publish()
    commit_videos(log, [2])
    publisher.publish()
    key = next(stat.key for stat in store.list("masks/"))
    kept = store.read_bytes(key)
    damage_bytes(store, key)
    with pytest.raises(StoreError, match=rf"{key} is damaged .* restore it"):
        publisher.compact()
    store.write_bytes(key, kept)
    assert_whole_after_reopening(store)


def test_parts_go_once_their_segment_is_old_enough(store: Store) -> None:
    now = [1_000_000.0]
    log = CommitLog.acquire(store, "one", clock=lambda: now[0])
    publisher = Publisher(log)
    commit_videos(log, [1])
    publisher.publish()
    now[0] += 3000
    commit_videos(log, [2])
    publisher.publish()
    commit_videos(log, [3])
    assert publisher.discard_published(now_s=now[0]) == 0
    assert publisher.discard_published(now_s=now[0] + 700) == 4
    attempts = {stat.key.split("/")[2] for stat in store.list("_staging/")}
    assert attempts == {"a1-2-0", "a1-3-0"}
    publisher.publish()
    assert_whole(store)


class Interrupting(LocalStore):
    """A local store that calls something just before it does a named write."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.before: tuple[str, Callable[[], None]] | None = None

    def put_file(
        self, local_path: str | Path, key: str, *, on_bytes: Callable[[int], None] | None = None
    ) -> None:
        """Call what is due, then write."""
        if self.before is not None and key.startswith(self.before[0]):
            call, self.before = self.before[1], None
            call()
        super().put_file(local_path, key, on_bytes=on_bytes)


@pytest.mark.parametrize("moment", ["masks/", "objects/", "videos/", "_segments/"])
def test_a_fenced_driver_leaves_nothing_behind(tmp_path: Path, moment: str) -> None:
    # Given an old driver in the middle of a compaction, just past its look at the fence,
    slow = Interrupting(str(tmp_path))
    store = open_store(str(tmp_path))
    old = CommitLog.acquire(slow, "old")
    publisher = Publisher(old)
    for key in (1, 2):
        commit_videos(old, [key])
        publisher.publish()

    # when a new one takes over, finishes the plan, replaces the files it made, and goes on,
    def take_over() -> None:
        new = CommitLog.acquire(store, "new")
        successor = Publisher(new)
        successor.recover()
        commit_videos(new, [2, 3], version=1)
        successor.publish()
        new.close(Outcome.FINISHED)

    slow.before = (moment, take_over)
    with pytest.raises(FencedOut):
        publisher.compact()
    # then the late write of the old one is not there.
    assert visible_versions(store) == {1: 0, 2: 1, 3: 1}
    assert_whole(store)


# Crashes.


def first_driver(store: Store) -> None:
    """Commit, publish twice, replace, compact; leave something unpublished."""
    log = CommitLog.acquire(store, "first", snapshot_every=4)
    log.plan(run_plan())
    publisher = Publisher(log)
    publisher.recover()
    commit_videos(log, [1, 2], num_frames=2)
    commit_videos(log, [3], num_frames=2)
    publisher.publish()
    commit_videos(log, [4], num_frames=2)
    publisher.publish()
    log.quarantine([Quarantined(5, identity_of(5, 0), "u", FailureKind.INPUT, "bad")])
    commit_videos(log, [2], version=1, num_frames=2)
    publisher.publish()
    publisher.compact()
    log.release([5])
    commit_videos(log, [5], num_frames=2)
    publisher.finish(Outcome.FINISHED, exit_code=0, workers=[worker_row("w", log.epoch, 5)])
    collect(log, published_age_s=0, now_s=log.now() + 1)


WANTED = {1: 0, 2: 1, 3: 0, 4: 0, 5: 0}


def resume(store: Store) -> None:
    """Do what a driver does that finds some of the work done."""
    log = CommitLog.acquire(store, "second", snapshot_every=4)
    publisher = Publisher(log)
    publisher.recover()
    lost = set(committed_so_far(store)) - set(visible_versions(store)) - waiting(store)
    assert not lost
    for key, version in WANTED.items():
        if log.state.task(key) != (identity_of(key, version), TaskState.COMMITTED):
            if log.state.task(key)[1] is TaskState.QUARANTINED:
                log.release([key])
            commit_videos(log, [key], version=version, num_frames=2)
    publisher.finish(Outcome.FINISHED, exit_code=0)
    collect(log, published_age_s=0, now_s=log.now() + 1)


def committed_so_far(store: Store) -> list[int]:
    state = read_state(store)
    return [key for key in WANTED if state.task(key)[1] is TaskState.COMMITTED]


def waiting(store: Store) -> set[int]:
    return set(read_state(store).unpublished)


class Photographing(CrashingStore):
    """A store that keeps a copy of all its objects as they were after every write."""

    def __init__(self, store: Store, album: Path) -> None:
        super().__init__(store)
        self._album = album

    def _write(self, verb: str, key: str, call: Any) -> Any:
        result = super()._write(verb, key, call)
        # Links are copies here: a local store never writes into a file, it renames a new one.
        album = self._album / str(self.num_writes)
        shutil.copytree(self.uri, album, copy_function=os.link)
        return result


def test_dying_at_any_write_loses_and_doubles_nothing(tmp_path: Path) -> None:
    # What is left of a driver that died after its k-th write, or before the next one, is what the
    # store held between them: one history gives all these outputs.
    photographing = Photographing(open_store(str(tmp_path / "out")), tmp_path / "album")
    first_driver(photographing)
    assert photographing.num_writes > 150
    for k, (verb, key) in enumerate(photographing.log, start=1):
        told = f"died after write {k}, {verb} {key}"
        store = open_store(str(tmp_path / "album" / str(k)))
        before = set(committed_so_far(store))
        visible_versions(store)  # a reader between the two sees nothing twice
        resume(store)
        assert visible_versions(store) == WANTED, told
        assert before <= set(committed_so_far(store)), told
        assert {stat.key.split("/")[0] for stat in store.list("")} <= VISITED, told
        assert verify(store).problems == [], told


VISITED = {"_log", "_snapshots", *SEGMENT_TABLES, "_plans"}
VISITED |= {"categories", "workers", "runs", "quarantine"}
"""After gc: nothing in staging, nothing under construction."""


@pytest.mark.parametrize("seed", range(4))
def test_dying_again_and_again_while_recovering(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    store = open_store(str(tmp_path))
    history = first_driver
    while True:
        dying = CrashingStore(store, rng.randrange(1, 60), performed=rng.random() < 0.5)
        try:
            history(dying)
        except Crashed:
            visible_versions(store)
            history = resume
            continue
        break
    assert visible_versions(store) == WANTED
    assert_whole(store)


@pytest.mark.parametrize("seed", range(8))
def test_drivers_and_crashes_in_any_order(tmp_path: Path, seed: int) -> None:
    rng = random.Random(100 + seed)
    store = open_store(str(tmp_path))
    drivers: list[tuple[CrashingStore, CommitLog, Publisher]] = []
    accepted: dict[int, int] = {}

    def begin() -> None:
        crash_at = rng.randrange(5, 120) if rng.random() < 0.7 else None
        dying = CrashingStore(store, crash_at, performed=rng.random() < 0.5)
        log = CommitLog.acquire(dying, f"d{len(drivers)}", snapshot_every=7)
        publisher = Publisher(log, target_bytes=30_000)
        drivers.append((dying, log, publisher))
        publisher.recover()

    begin_chance = 0.06
    for step in range(1, 90):
        with contextlib.suppress(Crashed, FencedOut):
            if not drivers or rng.random() < begin_chance:
                begin()
                continue
            # Mostly the newest driver; sometimes one that does not know yet that it lost.
            _, log, publisher = drivers[-1] if rng.random() < 0.8 else rng.choice(drivers)
            action = rng.random()
            if action < 0.55:
                commit_videos(log, [rng.randrange(8)], version=step, num_frames=1)
            elif action < 0.85:
                publisher.publish()
            elif action < 0.93:
                publisher.compact()
            else:
                collect(log, published_age_s=0, now_s=log.now() + 1)
        state = read_state(store)
        for key in range(8):
            version = next(
                (v for v in range(step, -1, -1) if state.task(key)[0] == identity_of(key, v)), None
            )
            if state.task(key)[1] is TaskState.COMMITTED:
                assert version is not None
                assert accepted.get(key, 0) <= version, "an accepted commit went back"
                accepted[key] = version
        visible_versions(store)
    last = CommitLog.acquire(store, "last")
    publisher = Publisher(last)
    publisher.recover()
    publisher.publish()
    publisher.compact()
    last.close(Outcome.FINISHED)
    assert visible_versions(store) == accepted
    assert_whole(store)


def test_on_a_real_s3_server(seaweedfs: servers.S3Server) -> None:
    store = open_store(seaweedfs.new_bucket() + "/out", seaweedfs.options)
    total = 0
    with contextlib.suppress(Crashed):
        counting = CrashingStore(store, 40, performed=True)
        first_driver(counting)
    total = counting.num_writes
    assert total == 40
    resume(store)
    assert visible_versions(store) == WANTED
    assert_whole(store)
    assert visible_table(store, "masks").schema.equals(arrow_schema("masks"))
