"""The real-time API: boxes in, masks out, frame by frame, with a state that travels.

* `prompt` tracks its own frame at once; `track` goes on; both give bool masks, ids and the state.
* `track` before `prompt` is a RuntimeError; malformed boxes and frames are ValueErrors that leave
  the stream as it was.
* Ids start at 0, are never given twice in a stream, and live through `add`; `reset` forgets the
  objects but not the ids given out.
* States are independent of each other: several streams share one tracker.
* A pickled state continues identically, in another process too, and on another tracker with the
  same settings only.
* Nested lists, arrays and tensors are boxes; the masks are those of a plain session.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.trackers.test_conformance import box_of, drawn_clip
from workers.trackers.base import TrackingConfig
from workers.trackers.realtime import RealtimeState, RealtimeTracker
from workers.trackers.registry import create_tracking_loader

ROOT = Path(__file__).resolve().parents[2]
CONFIG = TrackingConfig("flow")


@pytest.fixture
def tracker() -> Iterator[RealtimeTracker]:
    with RealtimeTracker(CONFIG) as made:
        yield made


def boxes() -> NDArray[np.float64]:
    """Return the boxes of the drawn clip's objects on its first frame."""
    return np.array([box_of(mask) for mask in drawn_clip().masks.values()])


def test_prompt_and_track_give_the_masks_of_a_session(tracker: RealtimeTracker) -> None:
    clip = drawn_clip()
    loader = create_tracking_loader("flow", CONFIG)
    loader.load()
    with loader.open_session(*clip.size) as session:
        for object_id, box in enumerate(boxes()):
            session.prompt(0, object_id, box_xyxy=box)
        expected = [f for frame in clip.frames for f in session.step(frame)]
    for t, frame in enumerate(clip.frames):
        masks, ids, state = tracker.prompt(frame, boxes()) if t == 0 else tracker.track(frame)
        assert masks.dtype == np.bool_
        assert masks.shape == (len(ids), *clip.size)
        assert ids.dtype == np.int64
        assert ids.tolist() == [m.object_id for m in expected[t].masks]
        for mask, other in zip(masks, expected[t].masks, strict=True):
            np.testing.assert_array_equal(mask, other.mask > 0)
        assert isinstance(state, RealtimeState)


def test_track_before_prompt_is_an_error(tracker: RealtimeTracker) -> None:
    frame = drawn_clip().frames[0]
    with pytest.raises(RuntimeError, match="track before prompt"):
        tracker.track(frame)
    with pytest.raises(RuntimeError, match="remove before prompt"):
        tracker.remove(0)
    with pytest.raises(RuntimeError, match="no stream to add to"):
        tracker.prompt(frame, boxes(), mode="add")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "at least one row"),
        ([[1, 2, 3]], "shape"),
        ([["a", 1, 2, 3]], "rows of 4 numbers"),
        ([[1, 2, 3, 4], [1, 2]], "rows of 4 numbers"),
        ([[1, float("nan"), 9, 9]], "finite"),
        ([[5, 5, 5, 9]], "no area"),
        ([[5, 5, 20, 20], [900, 900, 950, 950]], "outside"),
    ],
)
@pytest.mark.parametrize("mode", ["reset", "add"])
def test_wrong_boxes_leave_the_stream_as_it_was(
    tracker: RealtimeTracker, bad: Any, message: str, mode: Any
) -> None:
    clip = drawn_clip()
    with RealtimeTracker(CONFIG) as undisturbed:
        undisturbed.prompt(clip.frames[0], boxes())
        expected = undisturbed.track(clip.frames[1])[0]
    tracker.prompt(clip.frames[0], boxes())
    with pytest.raises(ValueError, match=message):
        tracker.prompt(clip.frames[1], bad, mode=mode)
    np.testing.assert_array_equal(tracker.track(clip.frames[1])[0], expected)


def test_wrong_frames_and_ids_are_refused(tracker: RealtimeTracker) -> None:
    clip = drawn_clip()
    first: Any = clip.frames[0]
    with pytest.raises(ValueError, match="frame must be"):
        tracker.prompt(first[..., 0], boxes())
    with pytest.raises(ValueError, match="frame must be"):
        tracker.prompt(first.astype(float), boxes())
    with pytest.raises(ValueError, match="frame must be"):
        tracker.prompt(None, boxes())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="object ids"):
        tracker.prompt(first, boxes(), object_ids=[1])
    with pytest.raises(ValueError, match="object ids"):
        tracker.prompt(first, boxes(), object_ids=[1, 1])
    with pytest.raises(ValueError, match="mode"):
        tracker.prompt(first, boxes(), mode="replace")  # type: ignore[arg-type]
    tracker.prompt(first, boxes())
    with pytest.raises(ValueError, match="frame must be"):
        tracker.track(first[1:])


def test_ids_are_never_given_twice(tracker: RealtimeTracker) -> None:
    frames = drawn_clip().frames
    first, second = boxes()
    _, ids, _ = tracker.prompt(frames[0], first)
    assert ids.tolist() == [0]
    _, ids, _ = tracker.prompt(frames[1], [second], mode="add")
    assert ids.tolist() == [0, 1]
    tracker.remove(0)
    _, ids, _ = tracker.track(frames[2])
    assert ids.tolist() == [1]
    _, ids, _ = tracker.prompt(frames[3], [first], mode="add")
    assert ids.tolist() == [1, 2]
    _, ids, state = tracker.prompt(frames[4], [first, second])
    assert ids.tolist() == [3, 4]
    _, ids, _ = tracker.prompt(frames[5], [first], object_ids=[9], state=state, mode="add")
    assert ids.tolist() == [3, 4, 9]
    assert state.last_object_id == 9


def test_streams_do_not_touch_each_other(tracker: RealtimeTracker) -> None:
    frames = drawn_clip().frames
    small = [np.ascontiguousarray(frame[:80, :100]) for frame in frames]
    with RealtimeTracker(CONFIG) as alone:
        alone.prompt(frames[0], boxes())
        expected = [alone.track(frame)[0] for frame in frames[1:4]]
    _, _, one = tracker.prompt(frames[0], boxes())
    other: RealtimeState | None = None
    with RealtimeTracker(CONFIG) as second:
        _, _, other = second.prompt(small[0], boxes()[:1])
        for t, masks in enumerate(expected, start=1):
            got, _, one = tracker.track(frames[t], state=one)
            np.testing.assert_array_equal(got, masks)
            _, _, other = tracker.track(small[t], state=other)


def test_a_pickled_state_continues_identically(tracker: RealtimeTracker) -> None:
    frames = drawn_clip().frames
    tracker.prompt(frames[0], boxes())
    _, _, state = tracker.track(frames[1])
    travelled = pickle.loads(pickle.dumps(state))
    expected = [tracker.track(frame, state=state)[0] for frame in frames[2:4]]
    with RealtimeTracker(CONFIG) as other:
        for frame, masks in zip(frames[2:4], expected, strict=True):
            got, ids, travelled = other.track(frame, state=travelled)
            np.testing.assert_array_equal(got, masks)
            assert ids.tolist() == [0, 1]
        assert travelled.last_object_id == 1


def test_a_state_travels_before_it_is_used_again(tracker: RealtimeTracker) -> None:
    frames = drawn_clip().frames
    _, _, state = tracker.prompt(frames[0], boxes())
    twice = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(state))))
    with pytest.raises(RuntimeError, match="came out of a pickle"):
        _ = twice.session
    expected = tracker.track(frames[1], state=state)[0]
    np.testing.assert_array_equal(tracker.track(frames[1], state=twice)[0], expected)


def test_a_state_of_other_settings_is_refused(tracker: RealtimeTracker) -> None:
    frames = drawn_clip().frames
    _, _, state = tracker.prompt(frames[0], boxes())
    travelled = pickle.loads(pickle.dumps(state))
    other = TrackingConfig("flow", options={"persistence": 0.5})
    with (
        RealtimeTracker(other) as different,
        pytest.raises(ValueError, match="other weights or settings"),
    ):
        different.track(frames[1], state=travelled)


def continue_pickled(state_path: Path, out_path: Path) -> None:
    """Track one more frame of a pickled stream, in a process that knows nothing else."""
    state = pickle.loads(state_path.read_bytes())
    with RealtimeTracker(state.config) as tracker:
        masks, _, _ = tracker.track(drawn_clip().frames[2], state=state)
    np.save(out_path, masks)


def test_a_pickled_state_continues_in_another_process(
    tracker: RealtimeTracker, tmp_path: Path
) -> None:
    frames = drawn_clip().frames
    tracker.prompt(frames[0], boxes())
    _, _, state = tracker.track(frames[1])
    (tmp_path / "state").write_bytes(pickle.dumps(state))
    program = (
        "import sys, pathlib; from tests.trackers.test_realtime import continue_pickled; "
        "continue_pickled(*map(pathlib.Path, sys.argv[1:]))"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "state"), str(tmp_path / "out.npy")],
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    expected, _, _ = tracker.track(frames[2])
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)


def test_tensors_are_boxes(tracker: RealtimeTracker) -> None:
    if os.environ.get("CI"):
        import torch
    else:
        torch = pytest.importorskip("torch")
    frame = drawn_clip().frames[0]
    expected, _, _ = tracker.prompt(frame, boxes().tolist())
    whole = torch.tensor(boxes())
    for given in (whole, list(whole), boxes()):
        np.testing.assert_array_equal(tracker.prompt(frame, given)[0], expected)


def test_an_unknown_tracker_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no tracker 'nothing'.*flow.*yolo11n-seg"):
        RealtimeTracker(TrackingConfig("nothing"))
