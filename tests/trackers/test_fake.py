"""Contract of `workers.trackers.fake`, beyond what the conformance suite checks of every tracker.

* Shapes move evenly: masks depend on prompts and steps alone.
* Late frames come out late, and the same.
* A faulty step kills, or raises, in videos of the faulty width only.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from workers.trackers.base import TrackingConfig, TrackingFrame
from workers.trackers.fake import FakeLoader

FRAME = np.zeros((20, 30, 3), np.uint8)


def steps(num_frames: int, **options: Any) -> list[list[TrackingFrame]]:
    loader = FakeLoader(TrackingConfig("fake", options=options))
    loader.load()
    with loader.open_session(20, 30) as session:
        session.prompt(0, 1, box_xyxy=(2, 3, 6, 9))
        return [*(session.step(FRAME) for _ in range(num_frames)), session.finish()]


def test_shapes_move_evenly() -> None:
    for idx, (frame,) in enumerate(steps(4, shift_x=3, shift_y=2)[:-1]):
        expected = np.zeros((20, 30), np.uint8)
        expected[3 + 2 * idx : 9 + 2 * idx, 2 + 3 * idx : 6 + 3 * idx] = 1
        np.testing.assert_array_equal(frame.masks[0].mask, expected)


def test_late_frames_are_the_same_frames() -> None:
    at_once, late = steps(6), steps(6, late_frames=4)
    assert [len(frames) for frames in late] == [0, 0, 0, 0, 1, 1, 4]
    for expected, frame in zip(chain(*at_once), chain(*late), strict=True):
        assert frame.frame_idx == expected.frame_idx
        np.testing.assert_array_equal(frame.masks[0].mask, expected.masks[0].mask)


def test_faults_hit_the_faulty_width_only() -> None:
    assert len(steps(3, fail_on_step=1, faulty_width=31)) == 4
    with pytest.raises(RuntimeError, match="step 1"):
        steps(3, fail_on_step=1, faulty_width=30)


def test_a_crash_is_a_crash() -> None:
    program = (
        "from tests.trackers.test_fake import steps; steps(3, crash_on_step=1); print('alive')"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == b""
