"""Contract: the ledger knows of every worker what it did, and tells the log only what is new.

* A row says how long a worker was busy and idle, what it finished and why it ended; the first
  reason stands, and an attempt that was not accepted counts as work, not as a video.
* Changed rows are those of workers that started, ended something or went since the last ones, and
  no row of a living worker is older than five minutes; a dead one is told of once.
* The last row of each worker, whenever the telling ends, has every video that was ended by then.
* Workers are held from the beginning of their loading to their end.
"""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from jobs.ledger import REFRESH_S, Ledger
from workers.messages import WorkerReady

READY = WorkerReady("host", "H200", 7, load_s=4.0)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def ledger_of(*worker_ids: str) -> tuple[Ledger, Clock]:
    clock = Clock()
    ledger = Ledger(clock)
    for worker_id in worker_ids:
        ledger.started(worker_id)
        ledger.ready(worker_id, READY)
    return ledger, clock


def rows(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    by_id = {row["worker_id"].removeprefix("1-"): row for row in found}
    assert len(by_id) == len(found)
    return by_id


def all_rows(ledger: Ledger) -> dict[str, dict[str, Any]]:
    return rows(ledger.worker_rows(run_id="run", epoch=1))


def changed(ledger: Ledger) -> dict[str, dict[str, Any]]:
    return rows(ledger.changed_rows(run_id="run", epoch=1))


def test_a_row_is_what_a_worker_did() -> None:
    ledger, clock = ledger_of("a")
    clock.now += 10
    ledger.began("a", "1")
    ledger.began("a", "2")
    clock.now += 5
    ledger.ended("a", "1", 50)
    clock.now += 5
    ledger.ended("a", "2", None)
    ledger.ended("a", "2", 50)  # it has ended
    clock.now += 3
    ledger.gone("a", "killed")
    clock.now += 9
    ledger.gone("a", "the run ended")
    row = all_rows(ledger)["a"]
    assert (row["busy_s"], row["idle_s"], row["load_s"]) == (10, 13, 4)
    assert (row["num_videos"], row["num_frames"], row["exit_reason"]) == (1, 50, "killed")


def test_only_workers_to_which_something_happened_are_told_of() -> None:
    ledger, clock = ledger_of(*(f"w{number}" for number in range(100)))
    assert len(changed(ledger)) == 100
    assert changed(ledger) == {}
    for number in (3, 5):
        ledger.began(f"w{number}", "1")
        ledger.ended(f"w{number}", "1", 9)
    ledger.started("late")
    ledger.gone("w7", "its node is gone")
    assert changed(ledger).keys() == {"w3", "w5", "w7", "late"}
    clock.now += 1
    assert changed(ledger) == {}
    assert len(all_rows(ledger)) == 101


def test_no_row_of_a_living_worker_is_old() -> None:
    # Given one worker with a video that takes hours, one with short ones, and a dead one
    ledger, clock = ledger_of("long", "short", "dead")
    ledger.began("long", "hours")
    ledger.gone("dead", "killed")
    changed(ledger)
    told_s, num_rows = clock.now, 0
    for number in range(100):
        clock.now += 60
        ledger.began("short", str(number))
        ledger.ended("short", str(number), 9)
        found = changed(ledger)
        num_rows += len(found)
        assert "short" in found
        assert "dead" not in found
        if "long" in found:
            told_s = clock.now
            assert found["long"]["busy_s"] == 60 * (number + 1)
        assert clock.now - told_s < REFRESH_S
    assert num_rows == 100 + 100 * 60 / REFRESH_S


WORKERS = ("a", "b", "c")
EVENTS = st.tuples(
    st.sampled_from(["start", "begin", "end", "fail", "go", "tell", "wait"]),
    st.sampled_from(WORKERS),
)


@given(st.lists(EVENTS, max_size=60))
def test_what_was_told_is_all_that_was_done(events: list[tuple[str, str]]) -> None:
    ledger, clock = ledger_of()
    told: dict[str, dict[str, Any]] = {}
    names: dict[str, str] = {}
    running: dict[str, list[str]] = {}
    for number, (event, worker) in enumerate(events):
        if event == "start":  # another one in its place
            worker_id = names[worker] = f"{worker}{number}"
            ledger.started(worker_id)
            ledger.ready(worker_id, READY)
            running[worker_id] = []
        elif event == "tell":
            told |= changed(ledger)
            exact = all_rows(ledger)
            assert told.keys() == exact.keys()
            for worker_id, row in exact.items():
                for name in ("num_videos", "num_frames", "exit_reason", "load_s"):
                    assert told[worker_id][name] == row[name]
                age_s = row["busy_s"] + row["idle_s"]
                age_s -= told[worker_id]["busy_s"] + told[worker_id]["idle_s"]
                assert age_s < REFRESH_S
        elif event == "wait":
            clock.now += 70
        elif worker in names:
            worker_id = names[worker]
            if event == "begin":
                ledger.began(worker_id, str(number))
                running[worker_id].append(str(number))
            elif event == "go":
                ledger.gone(worker_id, "killed")
            elif running[worker_id]:
                ledger.ended(worker_id, running[worker_id].pop(), 5 if event == "end" else None)


def test_workers_are_held_until_they_are_gone() -> None:
    ledger, clock = ledger_of("a", "b")
    ledger.started("loading")
    clock.now += 10
    assert ledger.held_s() == 2 * (10 + 4)
    ledger.gone("a", "released")
    ledger.gone("loading", "forgone")
    clock.now += 5
    assert ledger.held_s() == 10 + 4 + 15 + 4
    assert ledger.living() == ["b"]
    ledger.all_gone("the run ended")
    clock.now += 5
    assert ledger.held_s() == 10 + 4 + 15 + 4
    assert {row["exit_reason"] for row in all_rows(ledger).values()} == {
        *("released", "forgone", "the run ended")
    }
