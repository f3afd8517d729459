"""Contract of what the benchmarks of scheduler and driver simulate, on a small scale.

* Longest first comes within a few percent of the shortest time there is, and is never longer than
  first come; guessed lengths cost little.
* On workers of unlike speed it comes as close, where the scheduler knows of them.
* The driver settles every video that simulated workers finish, each once.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.benchmarks.driver_scale import simulate
from tests.benchmarks.makespan import compare


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
