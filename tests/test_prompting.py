"""Detections become prompts of the objects that they are (`workers.prompting.DetectedPrompts`).

* An object that the detector missed for some frames keeps its id when it is found where it was.
* An object in sight is preferred to a lost one that was there; what is neither is new.
* After too long, or in another category, it is a new object; ids are never used twice.
* With a limit, an object out of sight for so many frames is given up, and not known again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.decode.reader import DecodedFrame
from workers.messages import PromptMode
from workers.prompting import DetectedPrompts, Moment
from workers.prompts.detector import Detection
from workers.prompts.modes import LOST_STEPS, PromptPolicy
from workers.trackers.base import TrackingFrame, TrackingMask

SIZE = 40, 60
HERE, NEAR, FAR = (5, 5, 25, 25), (7, 5, 27, 25), (35, 10, 55, 30)
Box = tuple[int, int, int, int]


class Script:
    """A detector that finds what a script says."""

    def __init__(self, found: Mapping[int, Sequence[tuple[Box, int]]]) -> None:
        self._found = found
        self._asked = -1

    def detect(self, image: NDArray[np.uint8]) -> list[Detection]:
        """Return what is found on the next frame."""
        self._asked += 1
        found = self._found.get(self._asked, [])
        return [
            Detection(tuple(map(float, box)), 0.5, category, None)  # type: ignore[arg-type]
            for box, category in found
        ]


def _same(shown: TrackingFrame | None) -> TrackingFrame | None:
    return shown


def followed(
    found: Mapping[int, Sequence[tuple[Box, int]]], num_frames: int, forget_after: int | None = None
) -> tuple[list[list[int]], dict[int, list[int]]]:
    """Return the ids that are prompted per frame, and those that are given up on a frame.

    A prompted box is what a tracker then shows.
    """
    detector: Any = Script(found)
    policy = PromptPolicy(PromptMode.EVERY_FRAME, 1)
    source = DetectedPrompts(detector, "script", policy, forget_after)
    shown: TrackingFrame | None = None
    prompted, given_up = [], {}
    for t in range(num_frames):
        frame = DecodedFrame(t, 40_000 * t, np.zeros((*SIZE, 3), np.uint8))
        prompts = source.take(Moment(frame, None, t), partial(_same, shown))
        masks = []
        for prompt in prompts:
            mask = np.zeros(SIZE, np.uint8)
            x0, y0, x1, y1 = map(int, prompt.arguments["box_xyxy"])
            mask[y0:y1, x0:x1] = 1
            masks.append(TrackingMask(mask, 1.0, prompt.object_id))
        shown = TrackingFrame(t, masks, {}, 0.0)
        prompted.append([prompt.object_id for prompt in prompts])
        gone = source.forgotten(t)
        if gone:
            given_up[t] = gone
    return prompted, given_up


def ids(found: Mapping[int, Sequence[tuple[Box, int]]], num_frames: int) -> list[list[int]]:
    """Return the ids that are prompted per frame where none is given up."""
    prompted, given_up = followed(found, num_frames)
    assert not given_up
    return prompted


def test_what_was_missed_for_some_frames_is_known_again() -> None:
    assert ids({0: [(HERE, 1)], 4: [(NEAR, 1)], 5: [(NEAR, 1), (FAR, 1)]}, 6) == [
        [1], [], [], [], [1], [1, 2],
    ]  # fmt: skip


def test_what_is_in_sight_comes_first() -> None:
    # Object 2 moves to where object 1 was lost, and then something else is found there.
    found = {0: [(HERE, 1), (FAR, 1)], 1: [((28, 9, 48, 29), 1)], 2: [((20, 7, 40, 27), 1)]}
    found[3] = [((13, 6, 33, 26), 1), ((3, 5, 23, 25), 1)]
    assert ids(found, 4) == [[1, 2], [2], [2], [1, 2]]


def test_another_category_or_too_late_is_a_new_object() -> None:
    assert ids({0: [(HERE, 1)], 2: [(HERE, 3)]}, 3) == [[1], [], [2]]
    late = LOST_STEPS + 2
    assert ids({0: [(HERE, 1)], late - 1: [(HERE, 1)]}, late)[-1] == [1]
    assert ids({0: [(HERE, 1)], late: [(HERE, 1)]}, late + 1)[-1] == [2]


def test_what_is_out_of_sight_for_long_is_given_up() -> None:
    # In sight on frames 0 and 1, out of sight on three, and back on the fifth.
    found = {0: [(HERE, 1), (FAR, 1)], 1: [(HERE, 1)], 5: [(HERE, 1)]}
    assert followed(found, 6, 4) == ([[1, 2], [1], [], [], [], [1]], {5: [2]})
    assert followed(found, 6, 3) == ([[1, 2], [1], [], [], [], [1]], {4: [2]})
    # A frame earlier object 1 is given up, too: what is found then is a new one.
    assert followed(found, 6, 2) == ([[1, 2], [1], [], [], [], [3]], {3: [2], 4: [1]})
    assert followed(found, 9, 2)[1] == {3: [2], 4: [1], 8: [3]}
