"""`maskmill status`: where a run stands, from its output alone.

* The log alone tells what is committed, quarantined (with reasons) and left, also when there is no
  `_status.json`, an unreadable one, or one of another driver.
* A fresh status adds what is under way; a stale one is not believed.
* After a plan of fewer videos than are settled there is no share of them.
* A run whose driver died is told apart from one at work and from one that ended.
* A driver that is busy with one thing for long shows that it lives, and no other is started beside
  it; once it has ended, or died, another may start.
* `--watch` ends by itself when the run is closed.
"""

from __future__ import annotations

import io
import time
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import cli, startup, status
from jobs.commit_log import CommitLog, Outcome
from jobs.records import Quarantined
from jobs.startup import refuse_live
from jobs.status import (
    STALE_AFTER_S,
    STATUS_KEY,
    LifeSign,
    LiveStatus,
    read_live,
    read_log,
    status_lines,
    write_status,
)
from tests.jobs.outputs import commit_videos, run_plan
from workers.errors import FailureKind, StoreError
from workers.storage import Store, open_store

NOW_S = 1_800_000_000.0


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "out"))


@pytest.fixture
def log(store: Store) -> CommitLog:
    """Return the log of a run of ten videos: two committed, one in quarantine."""
    log = CommitLog.acquire(store, "host:1:aa")
    log.plan(replace(run_plan(), totals={"num_videos": 10}))
    commit_videos(log, [1, 2], num_frames=50, num_objects=1)
    log.quarantine(
        [Quarantined(3, 0, "s3://b/c.mp4", FailureKind.INPUT, "c.mp4 is empty", name="c.mp4")]
    )
    return log


def live(log: CommitLog, **changes: object) -> LiveStatus:
    said = LiveStatus(
        run_id="run-1",
        owner=log.owner,
        epoch=log.epoch,
        written_s=NOW_S - 1,
        started_s=NOW_S - 21,
        num_videos=10,
        num_committed=2,
        num_quarantined=1,
        num_frames=200,
        num_frames_planned=600,
        workers={"w0": {"state": "tracking", "video": "d.mp4", "num_steps": 40}},
    )
    return replace(said, **changes)  # type: ignore[arg-type]


def shown(store: Store) -> str:
    return "\n".join(status_lines(store, read_log(store), read_live(store), NOW_S))


def test_log_alone(store: Store, log: CommitLog) -> None:
    text = shown(store)
    assert "not closed" in text
    assert "committed    2 of 10 videos (20 %)" in text
    assert "quarantined  1 of 10 videos (10 %)" in text
    assert "100 frames" in text
    assert "c.mp4 (input): c.mp4 is empty" in text
    assert "tracking" not in text


def test_a_plan_of_a_part_has_no_share(store: Store, log: CommitLog) -> None:
    # Given three settled videos, when one of them is planned alone (--limit 1)
    log.plan(replace(run_plan(), totals={"num_videos": 1}))
    text = shown(store)
    assert "  committed    2 videos\n" in text
    assert "%" not in text


def test_fresh_status_adds_what_is_under_way(store: Store, log: CommitLog) -> None:
    store.write_bytes(STATUS_KEY, live(log).to_json())
    text = shown(store)
    assert f"running, driver {log.owner}" in text
    assert "200 frames in 20.0 s, 10.0 frames/s" in text
    assert "7 videos, about 40.0 s" in text
    assert "d.mp4 40" in text


def test_a_driver_that_still_plans(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "new"))
    log = CommitLog.acquire(store, "host:1:aa")
    store.write_bytes(STATUS_KEY, live(log, written_s=time.time()).to_json())
    stream = io.StringIO()
    write_status(store, stream)
    assert f"run run-1 in {store.uri}: driver host:1:aa is planning" in stream.getvalue()


@pytest.mark.parametrize(
    "changes",
    [{"written_s": NOW_S - STALE_AFTER_S - 1}, {"epoch": 99}, {"ended": True}],
    ids=["stale", "another driver", "ended"],
)
def test_status_that_is_not_believed(
    store: Store, log: CommitLog, changes: dict[str, object]
) -> None:
    store.write_bytes(STATUS_KEY, live(log, **changes).to_json())
    assert "not closed" in shown(store)
    assert "d.mp4" not in shown(store)


def test_a_busy_driver_shows_that_it_lives(
    store: Store, log: CommitLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "WRITE_EVERY_S", 0.1)
    monkeypatch.setattr(startup, "WATCH_LIVE_S", 2.5)
    with LifeSign(store, live(log)) as sign:
        with pytest.raises(StoreError, match=f"driver {log.owner} is at work"):
            refuse_live(store)
        sign.update(live(log, num_committed=7))
    written = read_live(store)
    assert written is not None
    assert abs(written.written_s - time.time()) < 60
    refuse_live(store)  # it is silent now
    sign.end(live(log, ended=True))
    last = read_live(store)
    assert last is not None
    assert last.ended


def test_unreadable_status(store: Store, log: CommitLog) -> None:
    for data in (b"", b"{", b"[1]", b'{"of": "another version"}'):
        store.write_bytes(STATUS_KEY, data)
        assert read_live(store) is None
        assert "2 of 10 videos" in shown(store)


def test_closed_run(store: Store, log: CommitLog, capsys: pytest.CaptureFixture[str]) -> None:
    log.close(Outcome.INTERRUPTED, exit_code=130)
    assert cli.main(["status", store.uri]) == 0
    assert ": interrupted" in capsys.readouterr().out
    assert cli.main(["status", store.uri, "--watch"]) == 0
