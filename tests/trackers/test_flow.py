"""The flow tracker beyond the common contract.

* It follows real objects: J&F over the first third of six DAVIS sequences, default options.
* An object that is hidden is reported occluded and is found again under its id.
* Boxes and points become masks that fit the object, not the box.
* Results do not depend on OpenCV's threads, on its random generator, or on other sessions.
* Objects never share a pixel.
* Wrong options, weights and types are refused with a sentence that names them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from jobs.evaluation import davis as evaluate
from tests.trackers.test_conformance import Frames, box_of, drawn_clip, iou, run
from workers.trackers.base import TrackingConfig, TrackingFrame
from workers.trackers.flow import FlowLoader

SHARED = Path(
    os.environ.get("MASKMILL_SHARED", Path(__file__).resolve().parents[2] / "../shared")
).resolve()
SEQUENCES = ("blackswan", "bmx-trees", "car-shadow", "dog", "kite-surf", "libby")

Mask = NDArray[np.uint8]


def loaded(**options: Any) -> FlowLoader:
    loader = FlowLoader(TrackingConfig("flow", options=options))
    loader.load()
    return loader


def follow(frames: Frames, masks: dict[int, Mask], **options: Any) -> list[TrackingFrame]:
    with loaded(**options).open_session(*frames[0].shape[:2]) as session:
        for object_id, mask in masks.items():
            session.prompt(0, object_id, mask=mask)
        return run(session, frames)


def mask_of(frame: TrackingFrame, object_id: int) -> Mask | None:
    return next((m.mask for m in frame.masks if m.object_id == object_id), None)


def shared_folder(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"{folder} is missing")
        pytest.skip(f"needs {name}")
    return folder


def hidden_clip() -> tuple[Frames, Mask]:
    """Draw a disc that walks behind a post, stays hidden for five frames, and walks on."""
    random = np.random.default_rng(3)
    height, width = 120, 200
    background = random.integers(70, 110, (height // 4, width // 4, 3), np.uint8)
    background = background.repeat(4, 0).repeat(4, 1)
    post = random.integers(10, 40, (height, 44, 3), np.uint8)
    texture = random.integers(0, 50, (height, width, 3), np.uint8) // 2
    frames: Frames = []
    first = np.zeros((height, width), np.uint8)
    for t in range(26):
        frame = background.copy()
        disc = np.zeros((height, width), np.uint8)
        cv2.circle(disc, (30 + 6 * t, 60), 16, 1, -1)
        moved = np.roll(texture, 6 * t, 1) + np.array([190, 40, 10], np.uint8)
        frame[disc > 0] = moved[disc > 0]
        frame[:, 80:124] = post
        frames.append(frame)
        if t == 0:
            first = disc
    return frames, first


def test_a_hidden_object_is_occluded_and_comes_back() -> None:
    # Given a disc that is whole until frame 6, hidden from 12 to 13 and whole again from 19 on.
    frames, first = hidden_clip()
    # When it is followed from its first mask.
    results = follow(frames, {5: first})
    # Then it is occluded in between, still known, and the same object afterwards.
    assert not any(r.occlusions[5] for r in results[:8])
    assert any(r.occlusions[5] for r in results[10:15])
    assert all(set(r.occlusions) == {5} for r in results)
    for t in (21, 25):
        truth = np.zeros_like(first)
        cv2.circle(truth, (30 + 6 * t, 60), 16, 1, -1)
        found = mask_of(results[t], 5)
        assert found is not None
        assert iou(found, truth) > 0.6


def test_a_real_object_that_is_wholly_hidden_comes_back() -> None:
    folder = shared_folder("data/multi_libby_fullocc")
    names = sorted(p.stem for p in (folder / "frames").iterdir())
    frames = [np.asarray(Image.open(folder / f"frames/{n}.jpg").convert("RGB")) for n in names]
    truths = [np.asarray(Image.open(folder / f"masks/{n}.png")) for n in names]
    ids = [int(i) for i in np.unique(truths[0]) if i]
    results = follow(frames, {i: (truths[0] == i).astype(np.uint8) for i in ids})
    visible = {i: [t for t, truth in enumerate(truths) if (truth == i).any()] for i in ids}
    gone = [(t, i) for i in ids for t in range(visible[i][-1]) if t not in visible[i]]
    assert gone
    for object_id in {i for _, i in gone}:
        assert any(results[t].occlusions[object_id] for t, i in gone if i == object_id)
        back = max(t for t, i in gone if i == object_id) + 1
        found = [mask_of(result, object_id) for result in results]
        overlaps = [
            iou(mask, (truth == object_id).astype(np.uint8))
            for mask, truth in zip(found[back:], truths[back:], strict=True)
            if mask is not None
        ]
        assert max(overlaps) > 0.4
    for result in results:
        assert np.max(np.sum([m.mask for m in result.masks], axis=0)) <= 1


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_a_davis_sequence_is_followed(sequence: str) -> None:
    folder = shared_folder(f"data/davis/{sequence}")
    # The first third keeps the test short; the benchmark measures whole sequences.
    names = sorted(p.stem for p in (folder / "frames").iterdir())
    names = names[: len(names) // 3]
    frames = [np.asarray(Image.open(folder / f"frames/{n}.jpg").convert("RGB")) for n in names]
    truths = [np.asarray(Image.open(folder / f"masks/{n}.png")) > 0 for n in names]
    results = follow(frames, {1: truths[0].astype(np.uint8)})
    score = evaluate.evaluate_object([mask_of(r, 1) for r in results], truths)
    assert score.j_and_f > 0.45, score


def test_confidence_falls_when_the_picture_breaks() -> None:
    clip = drawn_clip()
    random = np.random.default_rng(0)
    noise = [random.integers(0, 255, f.shape, np.uint8) for f in clip.frames[:2]]
    good = follow(clip.frames, dict(clip.masks))
    bad = follow([*clip.frames[:3], *noise], dict(clip.masks))
    assert min(m.confidence for m in good[3].masks) > 0.8
    assert all(m.confidence < 0.8 for m in bad[4].masks)


def test_objects_never_share_a_pixel() -> None:
    clip = drawn_clip()
    # Both prompts claim half of the other's neighbourhood.
    wide = {i: cv2.dilate(m, np.ones((41, 41), np.uint8)) for i, m in clip.masks.items()}
    for result in follow(clip.frames, wide)[1:]:
        total = np.sum([m.mask for m in result.masks], axis=0)
        assert np.max(total) <= 1


def test_a_second_prompt_corrects_an_object() -> None:
    clip = drawn_clip()
    with loaded().open_session(*clip.size) as session:
        session.prompt(0, 1, mask=clip.masks[4])
        session.prompt(3, 1, mask=clip.masks[2])
        results = run(session, clip.frames)
    found = mask_of(results[3], 1)
    assert found is not None
    np.testing.assert_array_equal(found, clip.masks[2])
    assert [set(r.occlusions) for r in results] == [{1}] * len(clip.frames)


def test_box_and_points_on_one_frame_work_together() -> None:
    clip = drawn_clip()
    box = box_of(clip.masks[4])
    wide = [box[0] - 8, box[1] - 8, box[2] + 8, box[3] + 8]
    with loaded().open_session(*clip.size) as session:
        session.prompt(0, 1, box_xyxy=wide)
        session.prompt(0, 1, points_xy=[[box[0] + 5, box[1] + 5]])
        first = run(session, clip.frames[:1])[0]
    found = mask_of(first, 1)
    assert found is not None
    assert iou(found, clip.masks[4]) > 0.7


def test_a_box_around_everything_still_gives_a_mask() -> None:
    clip = drawn_clip()
    height, width = clip.size
    with loaded().open_session(height, width) as session:
        session.prompt(0, 1, box_xyxy=[-5, -5, width + 5, height + 5])
        session.prompt(0, 2, box_xyxy=[10.2, 10.2, 10.4, 10.4])
        results = run(session, clip.frames[:2])
    assert [m.object_id for m in results[0].masks] == [1, 2]


def test_results_do_not_depend_on_threads_or_the_random_generator() -> None:
    clip = drawn_clip()
    threads = cv2.getNumThreads()
    outcomes = []
    try:
        for num_threads, seed in ((1, 7), (4, 99)):
            cv2.setNumThreads(num_threads)
            cv2.setRNGSeed(seed)
            with loaded().open_session(*clip.size) as session:
                session.prompt(0, 1, box_xyxy=box_of(clip.masks[4]))
                session.prompt(0, 2, points_xy=[[106, 68]])
                outcomes.append(run(session, clip.frames))
    finally:
        cv2.setNumThreads(threads)
    for one, other in zip(*outcomes, strict=True):
        assert one.occlusions == other.occlusions
        assert [m.confidence for m in one.masks] == [m.confidence for m in other.masks]
        for mask, same in zip(one.masks, other.masks, strict=True):
            np.testing.assert_array_equal(mask.mask, same.mask)


def test_options_arrive_as_text_or_as_values() -> None:
    as_text = FlowLoader(TrackingConfig("flow", options={"redetect": "false", "reach_px": "9"}))
    as_value = FlowLoader(TrackingConfig("flow", options={"redetect": False, "reach_px": 9}))
    as_text.load()
    as_value.load()
    clip = drawn_clip()
    with as_text.open_session(*clip.size) as session:
        session.prompt(0, 1, mask=clip.masks[4])
        session.step(clip.frames[0])
        as_value.restore(session.snapshot()).close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"persistence": 1.5}, r"persistence.*0\.\.1"),
        ({"lost_area": float("nan")}, "lost_area"),
        ({"work_pixels": 10}, "work_pixels.*at least 1024"),
        ({"reach_px": 0}, "reach_px"),
        ({"reach_px": 2.5}, "reach_px.*int"),
        ({"num_features": 1}, "num_features"),
        ({"motion_weight": -1}, "motion_weight"),
        ({"motion_weight": float("nan")}, "motion_weight"),
        ({"background_bias": float("inf")}, "background_bias"),
        ({"flow_preset": "best"}, "flow_preset.*ultrafast, fast, medium"),
        ({"redetect": "perhaps"}, "redetect"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowLoader(TrackingConfig("flow", options=options))


def test_weights_and_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match="no weights"):
        FlowLoader(TrackingConfig("flow", checkpoint_path="flow.pt"))
    with pytest.raises(ValueError, match="float32"):
        FlowLoader(TrackingConfig("flow", dtype="float16"))
