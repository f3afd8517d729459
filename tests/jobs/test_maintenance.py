"""compact, gc and verify.

* compact and gc refuse an output whose log does not end with close, unless told to take over,
  and leave it closed; how the run ended is not forgotten.
* gc deletes exactly what no commit names and what a segment has held for an hour; never a part of
  a live driver's epoch, a record, the newest snapshots, or a part that a segment still needs.
  What killed writers left where nothing lists it goes after a day, where the store lets us look.
* verify finds nothing on a whole dataset, and each of these when planted: a missing, damaged or
  stray file, a gap in the log, a lost, doubled or misplaced row, a mask that does not decode to its
  area or box, a count that another table contradicts, a summary that lies, a part lost before
  publication.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.commit_log import CommitLog, Outcome, find_tail, read_state
from jobs.maintenance import collect, compact, gc, verify
from jobs.publication import Publisher
from jobs.records import Record, log_key
from tests.jobs.outputs import (
    commit_videos,
    run_plan,
    stage_video,
    visible_versions,
)
from workers.errors import ConfigError, FencedOut, StoreDenied, StoreError
from workers.sinks.schema import arrow_schema, writer_options
from workers.storage import Store, open_store

HOUR = 3600.0


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "out"))


def run(store: Store, *, close: bool = True) -> CommitLog:
    """Leave an output with two segments."""
    log = CommitLog.acquire(store, "run", snapshot_every=3)
    log.plan(run_plan())
    publisher = Publisher(log)
    for keys in ([1, 2], [3, 4]):
        commit_videos(log, keys)
        publisher.publish()
    if close:
        log.close(Outcome.INTERRUPTED)
    return log


def attempts(store: Store) -> set[str]:
    return {stat.key.split("/")[2] for stat in store.list("_staging/")}


# compact and gc


@pytest.mark.parametrize("verb", [compact, gc])
def test_a_live_log_is_refused(store: Store, verb: Callable[..., Any]) -> None:
    log = run(store, close=False)
    with pytest.raises(StoreError, match=r"driver run.*--take-over") as caught:
        verb(store, "me")
    assert caught.value.exit_code == 3
    log.check_fence()  # nothing was taken
    verb(store, "me", take_over=True)
    with pytest.raises(FencedOut, match="me"):
        log.check_fence()
    assert not read_state(store).is_live
    verb(store, "me again")


@pytest.mark.parametrize("verb", [compact, gc, verify])
def test_nothing_there(store: Store, verb: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="holds no output"):
        verb(store, "me") if verb is not verify else verb(store)
    assert find_tail(store) == 0


def test_compact_publishes_and_merges_and_keeps_the_outcome(store: Store) -> None:
    log = run(store, close=False)
    commit_videos(log, [5])
    log.close(Outcome.INTERRUPTED)
    assert compact(store, "me") == 2
    assert len(list(store.list("videos/"))) == 1
    assert visible_versions(store) == dict.fromkeys(range(1, 6), 0)
    state = read_state(store)
    assert state.closed
    assert state.outcome is Outcome.INTERRUPTED
    assert verify(store, deep=True).problems == []


def test_gc_deletes_what_no_commit_names(store: Store) -> None:
    log = run(store, close=False)
    stage_video(store, log.epoch, 77)  # an attempt that failed at its end
    commit_videos(log, [5])  # committed, not visible yet
    log.close(Outcome.INTERRUPTED)
    store.write_bytes("_segments/000000000099/1-x/0000.parquet", b"left behind")
    store.write_bytes("_snapshots/000000000001-dead.parquet", b"never named")
    records = [stat.key for stat in store.list("_log/")]
    report = gc(store, "me")
    # The published parts are younger than an hour, and recovery publishes nothing new, so those of
    # video 5 are still needed.
    assert attempts(store) == {"a1-1-0", "a1-2-0", "a1-3-0", "a1-4-0", "a1-5-0"}
    assert report.num_parts == 4
    assert report.num_work_files == 1
    assert list(store.list("_segments/")) == []
    assert "_snapshots/000000000001-dead.parquet" not in {s.key for s in store.list("_snapshots/")}
    assert len(list(store.list("_snapshots/"))) <= 3  # gc's own comes after
    assert [stat.key for stat in store.list("_log/")][: len(records)] == records
    later = read_state(store).fence_s + HOUR + 60
    assert gc(store, "me", clock=lambda: later).num_parts == 16
    assert attempts(store) == {"a1-5-0"}
    compact(store, "me")
    assert visible_versions(store) == dict.fromkeys(range(1, 6), 0)
    assert gc(store, "me", published_age_s=-HOUR).num_parts == 4
    assert attempts(store) == set()
    assert verify(store, deep=True).problems == []


def test_gc_sweeps_what_no_listing_shows(tmp_path: Path) -> None:
    # Given a writer that was killed two days ago, and one that writes now
    store = open_store(str(tmp_path / "out"))
    run(store)
    dead, live = (tmp_path / "out" / "masks" / f".{uuid.uuid4().hex}.tmp" for _ in range(2))
    for path in (dead, live):
        path.write_bytes(b"half of it")
    two_days_ago_s = time.time() - 2 * 86_400
    os.utime(dead, (two_days_ago_s, two_days_ago_s))
    # When gc runs
    assert gc(store, "me").num_leftovers == 1
    # Then only what the dead one left is gone.
    assert not dead.exists()
    assert live.exists()


def test_gc_does_without_the_right_to_sweep(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    # A bucket with such a policy is nothing a test server offers.
    def refused(*, older_than_s: float = 0) -> int:
        raise StoreDenied("403 for uploads")

    log = run(store)
    stage_video(store, log.epoch, 77)
    monkeypatch.setattr(store, "sweep", refused)
    report = gc(store, "me")
    assert (report.num_parts, report.num_leftovers) == (4, 0)


def test_an_hour_counts_for_a_segment_that_was_compacted_since(store: Store) -> None:
    run(store)
    compact(store, "me")
    assert gc(store, "me").num_parts == 0
    assert len(attempts(store)) == 4


def test_gc_leaves_a_live_epoch_alone(store: Store) -> None:
    run(store, close=False)
    log = CommitLog.acquire(store, "next")
    stage_video(store, log.epoch, 50)
    stage_video(store, log.epoch - 1, 51)
    collect(log, published_age_s=-HOUR)
    assert attempts(store) == {"a2-50-0"}
    log.close(Outcome.FINISHED)
    collect(log, published_age_s=-HOUR)
    assert attempts(store) == set()


def test_gc_by_a_fenced_driver_deletes_nothing(store: Store) -> None:
    log = run(store)
    stage_video(store, log.epoch, 50)
    CommitLog.acquire(store, "newer")
    before = [stat.key for stat in store.list("")]
    with pytest.raises(FencedOut):
        collect(log, published_age_s=-HOUR)
    assert [stat.key for stat in store.list("")] == before


# verify


def first(store: Store, table: str) -> str:
    return next(stat.key for stat in store.list(f"{table}/"))


def rewrite(store: Store, table: str, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Change the rows of a visible file, and forge the log so that its digest is right."""
    key = first(store, table)
    path = store.local_path(key)
    assert path is not None
    rows = pq.read_table(path, memory_map=False).to_pylist()
    changed = change(rows) or rows
    schema = arrow_schema(table)
    with pq.ParquetWriter(path, schema, **writer_options(table)) as writer:
        writer.write_table(pa.Table.from_pylist(changed, schema=schema))
    data = path.read_bytes()
    for stat in list(store.list("_log/")):
        record = Record.from_bytes(store.read_bytes(stat.key), stat.key)
        if record.kind == "segment":
            for file in record.payload["files"]:
                if file[1] == key:
                    file[4:] = [len(changed), len(data), hashlib.sha256(data).hexdigest()]
            store.write_bytes(stat.key, record.to_bytes())
    for stat in list(store.list("_snapshots/")):
        store.delete([stat.key])


def drop_mask(rows: list[dict[str, Any]]) -> Any:
    return rows[:-1]


def double_mask(rows: list[dict[str, Any]]) -> Any:
    return [*rows, rows[-1]]


def move_mask(rows: list[dict[str, Any]]) -> None:
    # As many masks per video as before, but on another frame.
    rows[-1]["frame_idx"] += 1


def swap_rows(rows: list[dict[str, Any]]) -> None:
    rows[0], rows[1] = rows[1], rows[0]


def drop_row(rows: list[dict[str, Any]]) -> Any:
    return rows[1:]


def other_video(rows: list[dict[str, Any]]) -> None:
    rows[-1]["video_key"] = 4711


def wrong_area(rows: list[dict[str, Any]]) -> None:
    rows[0]["area"] += 1


def wrong_box(rows: list[dict[str, Any]]) -> None:
    rows[0]["bbox_x"] += 1


def wrong_counts(rows: list[dict[str, Any]]) -> None:
    rows[0]["rle_counts"] = b"P"


@pytest.mark.parametrize(
    ("table", "change", "told", "deep"),
    [
        ("masks", drop_mask, "has another number of rows in masks than videos says", False),
        ("masks", double_mask, "rows twice or out of order", False),
        ("masks", move_mask, "another number of masks than frames says", False),
        ("masks", swap_rows, "rows twice or out of order", False),
        ("masks", other_video, "video 4711 has rows in masks but is not committed", False),
        ("frames", drop_row, "has another number of rows in frames than videos says", False),
        ("objects", drop_row, "has another number of rows in objects than videos says", False),
        ("prompts", swap_rows, "rows twice or out of order", False),
        ("prompts", double_mask, "rows twice or out of order", False),
        ("videos", drop_row, "video 1 is committed but has no row in videos", False),
        ("videos", double_mask, "rows twice or out of order", False),
        ("masks", wrong_area, "frame 0, object 1 has another area or box", True),
        ("masks", wrong_box, "frame 0, object 1 has another area or box", True),
        ("masks", wrong_counts, "does not decode", True),
    ],
)
def test_verify_finds_planted_rows(
    store: Store, table: str, change: Callable[..., Any], told: str, deep: bool
) -> None:
    run(store)
    assert verify(store, deep=True).problems == []
    rewrite(store, table, change)
    report = verify(store, deep=deep)
    assert any(told in problem for problem in report.problems), report.problems
    assert report.exit_code == 1


def lose_file(store: Store) -> None:
    store.delete([first(store, "frames")])


def damage_file(store: Store) -> None:
    key = first(store, "masks")
    store.write_bytes(key, store.read_bytes(key)[:-1] + b"x")


def stray_file(store: Store) -> None:
    store.write_bytes("masks/copy.parquet", store.read_bytes(first(store, "masks")))


def stray_status(store: Store) -> None:
    store.write_bytes("quarantine/old.parquet", b"")


def lose_record(store: Store) -> None:
    store.delete([log_key(3)])


def lie(store: Store) -> None:
    # Records before the newest summary are not read in a resume; a deep verify reads them.
    newest = read_state(store)
    for seq in range(1, newest.snapshot_seq):
        record = Record.from_bytes(store.read_bytes(log_key(seq)), "")
        if record.kind == "commit":
            record.payload["videos"][0]["identity"] += 1
            store.write_bytes(log_key(seq), record.to_bytes())
            return


@pytest.mark.parametrize(
    ("plant", "told"),
    [
        (lose_file, "is missing: restore it"),
        (damage_file, "is damaged (its SHA-256 is not the recorded one): restore it"),
        (stray_file, "masks/copy.parquet is visible but no accepted plan names it"),
        (stray_status, "quarantine/old.parquet is visible"),
        (lose_record, "_log/000000000003.json is missing"),
        (lie, "summary"),
    ],
)
def test_verify_finds_planted_files(
    store: Store, plant: Callable[[Store], None], told: str
) -> None:
    run(store)
    plant(store)
    report = verify(store, deep=True)
    assert any(told in problem for problem in report.problems), report.problems
    assert len(report.problems) == 1
    # What could not be read is not told as absent.
    assert report.num_videos + report.num_uncounted == (0 if plant is lose_record else 4)


def test_verify_counts_and_tells_what_waits(store: Store) -> None:
    log = run(store, close=False)
    (commit,) = commit_videos(log, [5])
    report = verify(store)
    assert report.problems == []  # a live run
    assert "1 committed videos are not visible yet" in report.notes[0]
    assert "a driver is at work and will finish this" in report.notes[0]
    assert (report.num_videos, report.num_frames, report.num_masks) == (4, 12, 24)
    assert report.num_files == 12
    assert report.num_records == find_tail(store)
    log.close(Outcome.INTERRUPTED)
    assert "not visible yet" in verify(store).problems[0]
    store.delete([commit.parts[0].key])
    assert any("will be tracked again" in problem for problem in verify(store).problems)


def test_stray_files_go_with_the_next_driver(store: Store) -> None:
    run(store)
    stray_file(store)
    assert verify(store).problems
    gc(store, "me")
    assert verify(store).problems == []
