"""`workers.prompts.modes`.

When:
- `first_frame` is due until one frame gave a prompt, then never.
- `every_n_frames` is due on multiples of the period; a due frame without a detection stays due
  and does not move the period. `every_frame` is always due.
- Given rows are used on the exact period only, and all of them in `first_frame`.

Who:
- Each detection becomes exactly one object, each object at most one detection; new ids count up
  from the next free one, so none is ever reused.
- A match overlaps by at least the threshold and never crosses two known categories.
- The total overlap is the largest of all such assignments.
- A detection with a box only is compared with the bounding box of an object's mask.
- An object that is out of sight is remembered where it was seen last, for a bounded time, and not
  longer than it is out of sight.
"""

from __future__ import annotations

import doctest
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from workers.masks import box_iou_matrix, box_xyxy, iou_matrix
from workers.messages import PromptMode
from workers.prompts import modes
from workers.prompts.modes import (
    LOST_STEPS,
    MATCH_THRESHOLD,
    LostObjects,
    PromptPolicy,
    assign_ids,
)

HEIGHT, WIDTH = 12, 16


@dataclass(frozen=True, eq=False)
class Found:
    box_xyxy: tuple[float, float, float, float]
    category_id: int = 0
    mask: NDArray[Any] | None = None


def rectangle(x0: int, y0: int, x1: int, y1: int) -> NDArray[np.uint8]:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[y0:y1, x0:x1] = 1
    return mask


def found(box: tuple[int, int, int, int], category_id: int = 0, *, masked: bool = True) -> Found:
    return Found(box, category_id, rectangle(*box) if masked else None)


boxes = st.builds(
    lambda x, y, w, h: (x, y, min(x + w, WIDTH), min(y + h, HEIGHT)),
    st.integers(0, WIDTH - 1),
    st.integers(0, HEIGHT - 1),
    st.integers(1, 8),
    st.integers(1, 8),
)
category_ids = st.integers(0, 1)


def test_examples() -> None:
    assert doctest.testmod(modes).failed == 0


@given(
    st.sampled_from(list(PromptMode)),
    st.integers(1, 7),
    st.lists(st.booleans(), min_size=1, max_size=40),
)
def test_when(mode: PromptMode, interval: int, answers: list[bool]) -> None:
    # Given a video where the detector would find something on the frames of `answers`
    policy = PromptPolicy(mode, interval)
    period = 1 if mode is PromptMode.EVERY_FRAME else interval
    prompted: list[int] = []
    for step_idx, answer in enumerate(answers):
        # When a frame is asked
        due = policy.is_due(step_idx)
        # Then it is due if no prompt was given since the last multiple of the period
        start = 0 if mode is PromptMode.FIRST_FRAME else step_idx // period * period
        assert due == (not any(p >= start for p in prompted))
        if due and answer:
            policy.on_prompted(step_idx)
            prompted.append(step_idx)
    if all(answers):
        expected = [0] if mode is PromptMode.FIRST_FRAME else range(0, len(answers), period)
        assert prompted == list(expected)


def test_given_rows_are_used_on_the_exact_period() -> None:
    every_third = PromptPolicy(PromptMode.EVERY_N_FRAMES, 3)
    assert [i for i in range(8) if every_third.takes_row(i)] == [0, 3, 6]
    assert all(PromptPolicy(PromptMode.EVERY_FRAME, 3).takes_row(i) for i in range(8))
    assert all(PromptPolicy(PromptMode.FIRST_FRAME, 3).takes_row(i) for i in range(8))


def test_an_interval_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        PromptPolicy(PromptMode.EVERY_N_FRAMES, 0)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(boxes, category_ids), max_size=4),
    st.lists(st.tuples(boxes, st.none() | category_ids), max_size=4),
    st.booleans(),
)
def test_who(
    seen: list[tuple[tuple[int, int, int, int], int]],
    live: list[tuple[tuple[int, int, int, int], int | None]],
    masked: bool,
) -> None:
    # Given live objects 3, 6, 9, ... of known or unknown category
    detections = [found(box, category, masked=masked) for box, category in seen]
    latest = {3 * (i + 1): rectangle(*box) for i, (box, _) in enumerate(live)}
    categories = {3 * (i + 1): category for i, (_, category) in enumerate(live)}
    # When
    assignments = assign_ids(detections, latest, categories, 50)
    # Then
    assert [a.detection for a in assignments] == detections
    ids = [a.object_id for a in assignments]
    assert len(set(ids)) == len(ids)
    new = [a.object_id for a in assignments if a.is_new]
    assert new == list(range(50, 50 + len(new)))
    overlap = np.zeros((len(detections), len(live)))
    for row, detection in enumerate(detections):
        for column, (box, category) in enumerate(live):
            if category in (None, detection.category_id):
                iou = box_iou_matrix([detection.box_xyxy], [box])[0, 0]  # masks fill their boxes
                overlap[row, column] = iou if iou >= MATCH_THRESHOLD else 0
    total = 0.0
    for row, assignment in enumerate(assignments):
        if not assignment.is_new:
            gain = overlap[row, list(latest).index(assignment.object_id)]
            assert gain > 0
            total += gain
    table = overlap if overlap.shape[0] <= overlap.shape[1] else overlap.T
    best = max(
        sum(table[i, j] for i, j in enumerate(chosen))
        for chosen in permutations(range(table.shape[1]), table.shape[0])
    )
    assert total == pytest.approx(best)


def test_a_box_is_compared_with_the_box_of_the_mask() -> None:
    # Given an L-shaped object, which fills too little of its box for a mask overlap of 0.3
    mask = rectangle(0, 0, 1, 10) | rectangle(0, 9, 10, 10)
    box = box_xyxy(mask)
    assert box is not None
    assert iou_matrix([mask], [rectangle(*box)])[0, 0] < MATCH_THRESHOLD
    # When the detector has no masks
    (assignment,) = assign_ids([found(box, masked=False)], {7: mask}, {}, 8)
    # Then it is still the same object, and a solid detection of the box is not
    assert assignment.object_id == 7
    assert assign_ids([found(box)], {7: mask}, {}, 8)[0].is_new


def test_one_object_lost_and_one_found_in_its_place_of_another_category() -> None:
    (assignment,) = assign_ids([found((0, 0, 5, 5), 1)], {1: rectangle(0, 0, 5, 5)}, {1: 0}, 2)
    assert assignment.is_new
    assert assignment.object_id == 2


def test_lost_objects_are_remembered_for_a_while() -> None:
    lost = LostObjects()
    lost.update(0, {1: rectangle(0, 0, 5, 5), 2: rectangle(8, 0, 12, 4)})
    lost.update(1, {1: rectangle(1, 0, 6, 5), 2: rectangle(8, 0, 12, 4)})
    assert lost.last_seen == {}
    # Object 1 is last seen on frame 1, and object 2 comes back.
    lost.update(2, {})
    assert sorted(lost.last_seen) == [1, 2]
    lost.update(3, {2: rectangle(8, 0, 12, 4)})
    assert sorted(lost.last_seen) == [1]
    assert lost.last_seen[1].box_xyxy == (1, 0, 6, 5)
    (assignment,) = assign_ids([found((1, 1, 6, 5), masked=False)], lost.last_seen, {1: 0}, 3)
    assert (assignment.object_id, assignment.is_new) == (1, False)
    for step_idx in range(4, 2 + LOST_STEPS):
        lost.update(step_idx, {2: rectangle(8, 0, 12, 4)})
        assert sorted(lost.last_seen) == [1]
    lost.update(2 + LOST_STEPS, {2: rectangle(8, 0, 12, 4)})
    assert lost.last_seen == {}
