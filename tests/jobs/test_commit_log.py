"""The fenced commit log.

* Records have dense numbers; each is created once and never changes.
* The newer fence wins at once: the older driver's next append and its next look at the fence
  raise FencedOut, which names the other driver, and nothing it appended after the fence counts.
* Whatever two drivers do in any order, all readers see one history, and every append that
  returned normally before the other's fence is in it.
* A response that got lost is no second record; a store that stays silent is an error, and the
  hold is lost. What is refused before it is written, and a failed look at the fence, lose nothing.
* A row that does not fit its table is refused alone, before it is in a group with others.
* A snapshot and the records behind it give the same state as the whole log; a damaged snapshot
  costs time only.
* A resume lists nothing and needs a logarithmic number of requests.
* The newest accepted commit of a video wins; quarantine and release follow one another.
* Another configuration on one output is refused by the names of the keys that differ.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs.commit_log import (
    CREATE_ATTEMPTS,
    CommitLog,
    LogState,
    Outcome,
    Quarantined,
    TaskState,
    check_video_row,
    find_tail,
    input_identity,
    read_state,
    replay,
)
from jobs.records import Kind, Record, log_key
from tests import servers
from tests.jobs.outputs import commit_videos, identity_of, run_plan, stage_video, worker_row
from workers.errors import ConfigError, FailureKind, FencedOut, StoreError, StoreUnavailable
from workers.messages import Stage, StageStats
from workers.storage import ObjectStat, Store, open_store
from workers.storage.local import LocalStore

STATE_FIELDS = (
    *("last_seq", "epoch", "owner", "closed", "outcome", "plan", "plan_seq", "segments"),
    *("published_through", "unpublished", "quarantined", "runs", "workers", "num_committed"),
    *("snapshots", "snapshot_seq"),
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "out"))


def reason(key: int, version: int = 0) -> Quarantined:
    return Quarantined(
        key, identity_of(key, version), f"/corpus/{key}.mp4", FailureKind.INPUT, "no frames"
    )


def assert_same(one: LogState, other: LogState) -> None:
    keys = np.union1d(one.known_keys(), other.known_keys())
    for a, b in zip(one.lookup(keys), other.lookup(keys), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(one.published_keys(), other.published_keys())
    for name in STATE_FIELDS:
        assert getattr(one, name) == getattr(other, name), name


def test_numbers_are_dense_and_the_tail_is_found(store: Store) -> None:
    assert find_tail(store) == 0
    assert read_state(store).last_seq == 0
    log = CommitLog.acquire(store, "one")
    for number in range(2, 40):
        assert log.release([]) == number
        assert find_tail(store) == number
    assert [stat.key for stat in store.list("_log/")] == [log_key(n) for n in range(1, 40)]


def test_the_newer_driver_wins_at_once(store: Store) -> None:
    old = CommitLog.acquire(store, "host-a:1")
    commit_videos(old, [1])
    new = CommitLog.acquire(store, "host-b:2")
    assert new.epoch == old.epoch + 1
    with pytest.raises(FencedOut, match="host-b:2") as caught:
        old.commit([stage_video(store, old.epoch, 2)])
    assert caught.value.exit_code == 3
    with pytest.raises(FencedOut):  # and for ever
        old.check_fence()
    state = read_state(store)
    assert state.owner == "host-b:2"
    assert state.task(1)[1] is TaskState.COMMITTED
    assert state.task(2)[1] is TaskState.UNKNOWN


def test_a_look_at_the_fence_is_enough(store: Store) -> None:
    old = CommitLog.acquire(store, "old")
    old.check_fence()
    CommitLog.acquire(store, "new")
    with pytest.raises(FencedOut, match="new"):
        old.check_fence()


def test_a_record_behind_a_fence_it_did_not_see_does_not_count(store: Store) -> None:
    # No honest writer can do this, so the record is forged: the rule must hold on replay all the
    # same.
    old = CommitLog.acquire(store, "old")
    new = CommitLog.acquire(store, "new")
    forged = Record(
        3,
        "x",
        old.epoch,
        "old",
        Kind.COMMIT,
        0.0,
        0,
        {"videos": [stage_video(store, old.epoch, 7).to_json()]},
    )
    assert store.create(log_key(3), forged.to_bytes())
    assert commit_videos(new, [8])
    assert new.state.num_ignored == 1
    state = read_state(store)
    assert state.task(7)[1] is TaskState.UNKNOWN
    assert state.task(8)[1] is TaskState.COMMITTED
    assert_same(state, new.state)


@pytest.mark.parametrize("seed", range(25))
def test_drivers_in_any_order_make_one_history(store: Store, seed: int) -> None:
    rng = random.Random(seed)
    template = stage_video(store, 0, 0)
    logs: list[CommitLog] = []
    accepted: dict[int, int] = {}
    refused: list[int] = []
    lost: set[int] = set()
    for step in range(60):
        choice = rng.random()
        if not logs or choice < 0.08:
            logs.append(CommitLog.acquire(store, f"driver-{len(logs)}", snapshot_every=9))
            continue
        which = rng.randrange(len(logs))
        key = rng.randrange(20)
        commit = type(template)(
            key, step, f"a{step}", 1, template.parts, {**template.video, "video_key": key}
        )
        try:
            if choice < 0.9:
                logs[which].commit([commit])
                accepted[key] = step
            else:
                logs[which].check_fence()
            assert which == len(logs) - 1, "an older driver was let through"
            assert which not in lost
        except FencedOut:
            assert which < len(logs) - 1
            lost.add(which)
            refused.append(step)
    state = read_state(store)
    found = {key: state.task(key) for key in range(20) if state.task(key)[1]}
    assert found == {key: (step, TaskState.COMMITTED) for key, step in accepted.items()}
    assert state.num_committed == len(accepted)
    assert_same(state, logs[-1].state)
    assert_same(state, replay(store, LogState(), state.last_seq))


class Unreliable(LocalStore):
    """A local store whose create answers as told: the rest is real."""

    def __init__(self, uri: str, script: list[str]) -> None:
        super().__init__(uri)
        self.script = script

    def create(self, key: str, data: bytes) -> bool:
        """Create, then lose the response, or do not create and fail."""
        what = self.script.pop(0) if self.script else "ok"
        if what == "lost":
            super().create(key, data)
            raise StoreUnavailable("the response got lost")
        if what == "retried":
            # What an SDK does on its own after a lost response: the second try meets the first.
            super().create(key, data)
            return super().create(key, data)
        if what == "down":
            raise StoreUnavailable("the store is down")
        return super().create(key, data)


def test_a_lost_response_is_no_second_record(tmp_path: Path) -> None:
    store = Unreliable(str(tmp_path), ["lost"])
    log = CommitLog.acquire(store, "one", sleep=lambda _: None)
    store.script = ["retried", "ok", "down", "lost"]
    assert [log.release([]) for _ in range(3)] == [2, 3, 4]
    assert find_tail(store) == 4
    assert read_state(store).num_ignored == 0


def test_a_store_that_stays_silent_ends_the_hold(tmp_path: Path) -> None:
    store = Unreliable(str(tmp_path), [])
    waits: list[float] = []
    log = CommitLog.acquire(store, "one", sleep=waits.append)
    store.script = ["down"] * CREATE_ATTEMPTS
    with pytest.raises(StoreUnavailable):
        log.release([])
    assert waits == sorted(waits)
    assert len(waits) == CREATE_ATTEMPTS - 1
    with pytest.raises(StoreUnavailable):  # its outcome is unknown: no further record is safe
        log.release([])
    # The next driver reads what there is.
    assert CommitLog.acquire(store, "two").epoch == 2


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"fingers": 5}, "the table videos has no column 'fingers'"),
        ({"width": None}, "videos has no 'width'"),
        ({"width": float("nan")}, "videos has no 'width'"),
        ({"width": "wide"}, "does not fit the table videos"),
        ({"width": 10**30}, "does not fit the table videos"),
        ({"width": {1, 2}}, "cannot be written to the log"),
    ],
)
def test_a_row_that_does_not_fit_is_told_before_its_group(
    store: Store, row: dict[str, Any], told: str
) -> None:
    log = CommitLog.acquire(store, "one")
    good, bad = (stage_video(store, 1, key) for key in (1, 2))
    bad = dataclasses.replace(bad, video=dict(bad.video) | row)
    check_video_row(good)
    with pytest.raises(ValueError, match=re.escape(told)):
        check_video_row(bad)
    with pytest.raises((ValueError, TypeError)):
        log.commit([good, bad])
    assert log.commit([good]) == 2  # nothing was written, and the hold is not lost


def test_a_time_that_is_no_number_is_told(store: Store) -> None:
    commit = stage_video(store, 1, 1)
    stages = (StageStats(Stage.TRACK, 3, float("nan")),)
    with pytest.raises(ValueError, match="stages has no 'busy_s'"):
        check_video_row(dataclasses.replace(commit, stages=stages))


def test_a_look_that_the_store_did_not_answer_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    log = CommitLog.acquire(store, "one")

    def silent(key: str) -> ObjectStat | None:
        raise StoreUnavailable("the store is down")

    with monkeypatch.context() as patch:
        patch.setattr(store, "stat", silent)
        with pytest.raises(StoreUnavailable):
            log.check_fence()
    log.check_fence()
    assert log.release([]) == 2


def test_snapshot_and_tail_say_what_the_log_says(store: Store) -> None:
    log = CommitLog.acquire(store, "one", snapshot_every=5)
    log.plan(run_plan(), {"manifest": pa.table({"video_key": [1, 2]})})
    for key in range(-30, 30):
        log.commit([stage_video(store, 1, key * 2**58, num_frames=1)], [worker_row("w", 1, key)])
        if key % 7 == 0:
            log.quarantine([reason(key * 2**58 + 1), reason(key * 2**58 + 2)])
            log.release([key * 2**58 + 2])
    log.close(Outcome.FINISHED, exit_code=1)
    state = read_state(store)
    assert state.snapshot_seq > 60
    assert_same(state, replay(store, LogState(), state.last_seq))
    assert_same(state, log.state)
    assert state.num_committed == 60
    assert state.num_quarantined == 9
    assert state.runs[1]["num_committed"] == 60
    assert state.runs[1]["num_frames"] == 60
    assert state.runs[1]["exit_code"] == 1
    assert state.workers["w"]["num_videos"] == 29
    assert state.categories == {0: "cat", 1: "dog"}
    assert state.plan is not None
    manifest = state.plan.tables["manifest"]
    assert store.stat(manifest.key) is not None


def test_a_damaged_snapshot_costs_time_only(store: Store) -> None:
    log = CommitLog.acquire(store, "one", snapshot_every=4)
    for key in range(12):
        commit_videos(log, [key], num_frames=1)
    newest = log.state.snapshots[-1]
    data = store.read_bytes(newest)
    store.write_bytes(newest, data[:-9] + bytes(9))
    assert_same(read_state(store), log.state)
    store.delete([newest])
    assert_same(read_state(store), log.state)


class Counting(LocalStore):
    """A local store that counts what is asked of it."""

    requests = 0

    def read_bytes(self, key: str) -> bytes:
        """Count and read."""
        self.requests += 1
        return super().read_bytes(key)

    def stat(self, key: str) -> ObjectStat | None:
        """Count and look."""
        self.requests += 1
        return super().stat(key)

    def list(self, prefix: str = "", *, start_after: str | None = None) -> Iterator[ObjectStat]:
        """Refuse: nothing may list."""
        raise AssertionError("a resume must not list")


def test_a_resume_lists_nothing_and_asks_little(tmp_path: Path) -> None:
    log = CommitLog.acquire(open_store(str(tmp_path)), "one", snapshot_every=10**9)
    for number in range(600):
        log.release([number])
    log.snapshot()
    commit_videos(log, [1])
    store = Counting(str(tmp_path))
    assert_same(read_state(store), log.state)
    assert store.requests < 32


def test_a_missing_or_damaged_record_is_said(store: Store) -> None:
    log = CommitLog.acquire(store, "one")
    for _ in range(6):
        log.release([])
    data = store.read_bytes(log_key(3))
    store.write_bytes(log_key(3), b"{")
    with pytest.raises(StoreError, match=r"_log/000000000003\.json is damaged"):
        read_state(store)
    store.delete([log_key(3)])
    with pytest.raises(StoreError, match=r"_log/000000000003\.json"):
        replay(store, LogState(), 7)
    store.write_bytes(log_key(3), data)
    assert read_state(store).last_seq == 7


def test_the_newest_commit_wins_and_quarantine_yields(store: Store) -> None:
    log = CommitLog.acquire(store, "one")
    state = log.state
    log.quarantine([reason(5)])
    assert state.task(5) == (identity_of(5, 0), TaskState.QUARANTINED)
    log.release([5, 6])
    assert state.task(5)[1] is TaskState.UNKNOWN
    assert state.num_quarantined == 0
    commit_videos(log, [5])
    commit_videos(log, [5], version=1)
    assert state.task(5) == (identity_of(5, 1), TaskState.COMMITTED)
    assert state.num_committed == 1
    assert state.unpublished[5][1].identity == identity_of(5, 1)
    log.quarantine([reason(5, version=2)])  # the next input of the video cannot be used
    assert state.num_committed == 0
    assert list(state.unpublished) == [5]  # what was accepted stays in the dataset
    keys = np.array([4, 5, -(2**63), 2**63 - 1], np.int64)
    identities, states = state.lookup(keys)
    assert states.tolist() == [0, 2, 0, 0]
    assert identities[1] == identity_of(5, 2)


def test_the_columns_agree_with_a_dict(store: Store) -> None:
    rng = random.Random(0)
    log = CommitLog.acquire(store, "one")
    told: dict[int, int] = {}
    for step in range(40):
        keys = [rng.randrange(-(2**63), 2**63) for _ in range(5)]
        keys += rng.sample(sorted(told), min(3, len(told)))
        log.quarantine([reason(key, step) for key in keys])
        told |= {key: identity_of(key, step) for key in keys}
        if step % 4 == 0:  # a lookup folds the changes into the columns
            asked = np.array([*sorted(told), 17], np.int64)
            identities, states = log.state.lookup(asked)
            assert identities[:-1].tolist() == [told[key] for key in sorted(told)]
            assert set(states[:-1].tolist()) == {TaskState.QUARANTINED}
            assert states[-1] == TaskState.UNKNOWN


def test_another_configuration_is_refused_by_name(store: Store) -> None:
    log = CommitLog.acquire(store, "one")
    log.plan(run_plan())
    log.plan(run_plan("run-2"))
    with pytest.raises(ConfigError, match=r"tracker\.image_size was 'absent' and is now 512"):
        log.plan(run_plan("run-3", **{"tracker.image_size": 512}))
    # Options that another tracker does not have are not told one by one.
    with pytest.raises(ConfigError, match=r"\(tracker\.name was 'flow' and is now 'sam2'\)"):
        read_state(store).check_settings({"tracker.name": "sam2", "tracker.options.a": 1})
    options = {f"tracker.options.{name}": 1 for name in "abcdef"}
    with pytest.raises(ConfigError, match=r"options\.d was .*; and 2 more\)"):
        log.plan(run_plan("run-3", **options))


def test_an_equal_manifest_is_stored_once(store: Store) -> None:
    log = CommitLog.acquire(store, "one")
    manifest = pa.table({"video_key": [1, 2, 3]})
    for run in range(3):
        log.plan(run_plan(f"run-{run}"), {"manifest": manifest})
    log.plan(run_plan("run-x"), {"manifest": manifest.slice(1)})
    assert len(list(store.list("_plans/"))) == 2


def test_rows_that_fit_no_table_are_refused_before_they_are_logged(store: Store) -> None:
    log = CommitLog.acquire(store, "one")
    good = stage_video(store, 1, 1)
    faults: list[tuple[dict[str, Any], str]] = [
        ({"nonsense": 1}, "nonsense"),
        ({"width": None}, "width"),
        ({"width": "wide"}, "does not fit"),
        ({"wall_s": float("nan")}, "wall_s"),
    ]
    for fault, told in faults:
        bad = type(good)(1, 1, "a", 1, good.parts, {**good.video, **fault})
        with pytest.raises(ValueError, match=told):
            log.commit([bad])
    with pytest.raises(ValueError, match="host"):
        log.commit([good], [worker_row("w", 1) | {"host": None}])
    assert find_tail(store) == 1
    assert log.commit([good]) == 2


def test_values_of_numpy_go_into_the_log(store: Store) -> None:
    log = CommitLog.acquire(store, "one")
    commit = stage_video(store, 1, 1)
    video = {**commit.video, "fps": np.float64("nan"), "width": np.int32(7)}
    log.commit([type(commit)(1, 1, "a", 1, commit.parts, video, commit.stages)])
    stored = read_state(store).unpublished[1][1]
    assert stored.video["fps"] is None
    assert stored.video["width"] == 7
    assert stored.parts == commit.parts
    assert stored.stages == commit.stages


def test_live_and_closed(store: Store) -> None:
    assert not read_state(store).is_live
    log = CommitLog.acquire(store, "one")
    assert read_state(store).is_live
    log.close(Outcome.INTERRUPTED)
    assert not read_state(store).is_live
    log.snapshot()  # says nothing new
    assert not read_state(store).is_live
    again = CommitLog.acquire(store, "two")
    assert read_state(store).is_live
    again.close(Outcome.MAINTENANCE)
    assert read_state(store).outcome is Outcome.INTERRUPTED


def test_identity_changes_with_every_part_of_the_input() -> None:
    base: tuple[Any, ...] = ("etag", 10, 0, 5, 1, "prompts")
    others: list[tuple[Any, ...]] = [
        (*base[:at], value, *base[at + 1 :]) for at, value in enumerate((None, 11, None, 6, 2, ""))
    ]
    seen = {input_identity(*values) for values in (base, *others)}
    assert len(seen) == 7
    assert input_identity(*base) == input_identity(*base)
    assert all(-(2**63) <= value < 2**63 for value in seen)


def test_on_a_real_s3_server(seaweedfs: servers.S3Server) -> None:
    store = open_store(seaweedfs.new_bucket() + "/out", seaweedfs.options)
    old = CommitLog.acquire(store, "old", snapshot_every=3)
    for key in range(5):
        commit_videos(old, [key], num_frames=1)
    new = CommitLog.acquire(store, "new")
    with pytest.raises(FencedOut, match="new"):
        commit_videos(old, [9], num_frames=1)
    state = read_state(store)
    assert state.snapshot_seq > 0
    assert_same(state, new.state)
    assert_same(state, replay(store, LogState(), state.last_seq))
