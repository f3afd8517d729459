"""Tracker `sam2` beside Meta's own video predictor, on small pictures.

* The same weights and pixels give the same masks, whatever the prompts: a click, several points, a
  box with a point, a mask, a second prompted frame; forward and reverse; several objects at once.

The predictor attends to prompts on future frames, which a session that has not seen them cannot. So
it is led through the frames by turns of prompting and propagating.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.engine import reference
from tests.engine.test_engine import BOXES, clip
from workers.engine.pictures import resized

SIZE = 128
NUM_FRAMES = 8
SECOND = 4
"""Frame on which an object is prompted again."""


Prompts = dict[int, dict[int, dict[str, Any]]]
"""Keywords of `prompt`, by frame and object."""
Masks = dict[tuple[int, int], NDArray[np.bool_]]
"""By frame and object."""


def drawn_mask() -> NDArray[np.uint8]:
    """Return a mask of an object, at the size of the frames."""
    height, width = clip()[0].shape[:2]
    y, x = np.mgrid[:height, :width]
    return np.asarray(np.hypot(y - 60, (x - 100) * 0.7) < 30, np.uint8)


def prompts() -> Prompts:
    """Return a prompt of every kind, and two on a second frame."""
    points = {"points_xy": [[30, 40], [60, 80], [200, 20]], "point_labels": [1, 1, 0]}
    both = {"points_xy": [[100, 50]], "point_labels": [1], "box_xyxy": BOXES[1]}
    return {
        0: {
            1: {"points_xy": [[100, 50]], "point_labels": [1]},
            2: points,
            3: both,
            4: {"mask": drawn_mask()},
            5: {"box_xyxy": BOXES[2]},
        },
        SECOND: {5: {"box_xyxy": BOXES[7]}, 1: {"points_xy": [[40, 90]], "point_labels": [1]}},
    }


@functools.cache
def predictor() -> Any:
    from sam2.build_sam import build_sam2_video_predictor

    made = build_sam2_video_predictor(
        "configs/sam2.1/sam2.1_hiera_t.yaml",
        str(reference.small_checkpoint()),
        device="cpu",
        hydra_overrides_extra=[f"++model.image_size={SIZE}"],
    )
    made.fill_hole_area = 0
    return made


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Open a state of the predictor on the frames, with the pixels that a session has."""
    import torch

    def pixels(path: str, image_size: int) -> tuple[Any, int, int]:
        frame = clip()[int(Path(path).stem)]
        small = resized(torch.from_numpy(frame), image_size)
        return small.double() / 255.0, *frame.shape[:2]

    reference.folder()
    monkeypatch.setattr("sam2.utils.misc._load_img_as_tensor", pixels)
    for i in range(NUM_FRAMES):
        (tmp_path / f"{i:05d}.jpg").touch()
    return predictor().init_state(str(tmp_path))


def prompt_predictor(state: Any, frame_idx: int, object_id: int, given: dict[str, Any]) -> None:
    if "mask" in given:
        predictor().add_new_mask(state, frame_idx, object_id, given["mask"].astype(bool))
        return
    arrays: dict[str, Any] = {}
    if "points_xy" in given:
        arrays["points"] = np.array(given["points_xy"], np.float32)
        arrays["labels"] = np.array(given["point_labels"], np.int32)
    if "box_xyxy" in given:
        arrays["box"] = np.array(given["box_xyxy"], np.float32)
    predictor().add_new_points_or_box(state, frame_idx, object_id, **arrays)


def propagated(state: Any, start: int, num: int, *, reverse: bool = False) -> Masks:
    masks = {}
    for frame_idx, object_ids, logits in predictor().propagate_in_video(
        state, start_frame_idx=start, max_frame_num_to_track=num - 1, reverse=reverse
    ):
        for object_id, of_object in zip(object_ids, logits, strict=True):
            masks[frame_idx, object_id] = (of_object[0] > 0).numpy()
    return masks


def tracked(given: Prompts, order: range) -> Masks:
    """Return the masks of our session; frames are stepped in this order."""
    frames, size = clip(), clip()[0].shape[:2]
    # Rounding, and what is shown of a prompted mask, is then the original's.
    made = reference.small_loader("sam2", compat="original")
    masks = {}
    with made.open_session(*size, num_frames=NUM_FRAMES) as session:
        for frame_idx, by_object in given.items():
            for object_id, prompt in by_object.items():
                prompt = dict(prompt)
                box = prompt.pop("box_xyxy", None)
                if box is not None:
                    session.prompt(frame_idx, object_id, box_xyxy=box)
                if prompt:
                    session.prompt(frame_idx, object_id, **prompt)
        for frame_idx in order:
            (frame,) = session.step(frames[frame_idx], frame_idx=frame_idx)
            for object_id in frame.occlusions:
                masks[frame_idx, object_id] = np.zeros(size, bool)
            for mask in frame.masks:
                masks[frame_idx, mask.object_id] = mask.mask > 0
    return masks


def assert_same(got: Masks, expected: Masks) -> None:
    assert got.keys() == expected.keys()
    overlaps = {}
    for key, mask in got.items():
        union = (mask | expected[key]).sum()
        overlaps[key] = (mask & expected[key]).sum() / union if union else 1.0
    print({key: round(float(overlap), 4) for key, overlap in overlaps.items() if overlap < 1})
    assert sum(mask.any() for mask in expected.values()) > len(expected) / 2
    for object_id in {object_id for _, object_id in got}:
        of_object = [overlap for (_, i), overlap in overlaps.items() if i == object_id]
        assert np.mean(of_object) >= 0.98
        assert min(of_object) >= 0.90


def test_every_kind_of_prompt_gives_the_masks_of_the_official_predictor(state: Any) -> None:
    # Given the predictor, led through the frames
    expected: Masks = {}
    bounds = [*prompts(), NUM_FRAMES]
    for start, end in itertools.pairwise(bounds):
        for object_id, given in prompts()[start].items():
            prompt_predictor(state, start, object_id, given)
        expected |= propagated(state, start, end - start)
    # When ours tracks the same, then
    assert_same(tracked(prompts(), range(NUM_FRAMES)), expected)


def test_a_reverse_pass_gives_the_masks_of_the_official_predictor(state: Any) -> None:
    last = NUM_FRAMES - 1
    click = {"points_xy": [[30, 40]], "point_labels": [1]}
    given: Prompts = {last: {1: {"box_xyxy": BOXES[1]}, 2: click}}
    for object_id, prompt in given[last].items():
        prompt_predictor(state, last, object_id, prompt)
    expected = propagated(state, last, NUM_FRAMES, reverse=True)
    assert_same(tracked(given, range(last, -1, -1)), expected)
