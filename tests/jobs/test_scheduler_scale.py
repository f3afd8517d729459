"""Contract of what the benchmarks of scheduler and driver simulate, on a small scale.

* Longest first comes within a few percent of the shortest time there is, and is never longer than
  first come; guessed lengths cost little.
* On workers of unlike speed it comes as close, where the scheduler knows of them.
* The driver settles every video that simulated workers finish, each once.
* A commit names only workers that ended something since the one before, and the log has after each
  record what they did so far.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jobs.commit_log import iter_records, read_state
from jobs.records import Kind
from tests.benchmarks.driver_scale import simulate
from tests.benchmarks.makespan import compare
from workers.storage import open_store


def test_makespan_is_close_to_the_ideal() -> None:
    found = compare(200, np.full(8, 25.0), 1.2, range(3))
    assert max(found["longest first"]) < 1.02
    assert max(found["guessed"]) < 1.05
    assert np.mean(found["first come"]) > np.mean(found["longest first"])


def test_makespan_is_close_to_the_ideal_on_unlike_workers() -> None:
    speeds = np.array([6.0, 25.0] * 4)
    found = compare(200, speeds, 1.2, range(3))
    assert max(found["longest first"]) < 1.05
    assert np.mean(found["blind"]) > 1.2


def test_the_driver_settles_what_simulated_workers_finish(tmp_path: Path) -> None:
    found = simulate(tmp_path, num_videos=150, num_workers=8, for_s=120, video_s=0.01)
    assert found.num_committed == found.num_planned == 150
    assert 100 < len(found.latencies_s) <= 150


def test_the_log_hears_of_a_worker_when_it_did_something(tmp_path: Path) -> None:
    simulate(tmp_path, num_videos=300, num_workers=64, for_s=120, video_s=0.02)
    store = open_store(str(tmp_path / "out"))
    done: dict[str, int] = {}
    num_committed = num_records = 0
    for record in iter_records(store, 1, read_state(store).last_seq):
        if record.kind is not Kind.COMMIT:
            continue
        num_records += 1
        num_committed += len(record.payload["videos"])
        for row in record.payload["workers"]:
            assert row["num_videos"] > done.get(row["worker_id"], -1)
            done[row["worker_id"]] = row["num_videos"]
        assert sum(done.values()) == num_committed
    assert num_records >= 5
