"""`workers.trackers.yolo`, beyond what every tracker must do (the conformance suite).

- Detections are given to objects one-to-one with the largest total overlap, never greedily; no
  detection is shared.
- An object without a detection is occluded, keeps its id and last mask, and comes back; a frame
  without any detection is a frame with every object occluded.
- A mask prompt is reported as it is; a box and points choose a detection, now or when one comes;
  prompted objects choose first.
- Confidence is the detection's, less where the overlap is below 0.5.
- A class never matters unless it is asked for.
- Snapshots carry everything, waiting prompts too; sessions stepped together are as if alone.
- On real video the tracker keeps real objects.

What an object gets is tested on hand-made detections, since a network cannot be told what to see;
everything from the picture on is tested on real and random networks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.media import shared_dir
from tests.networks import random_checkpoint, real_checkpoint, scene
from workers.masks import iou_matrix
from workers.trackers.base import TrackingConfig, TrackingFrame
from workers.trackers.yolo import YOLO11SegLoader, YoloSession
from workers.yolo import Letterbox, YoloDetection, _Prototypes

HEIGHT, WIDTH = 64, 96
FRAME = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
Box = tuple[int, int, int, int]


def rectangle(x0: int, y0: int, x1: int, y1: int) -> NDArray[np.uint8]:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[y0:y1, x0:x1] = 1
    return mask


def seen(
    box: Box, score: float = 0.8, category_id: int = 0, *, mask: NDArray[Any] | None = None
) -> YoloDetection:
    """Return a detection with this mask, the whole box when left out."""
    logits = np.where(rectangle(*box) if mask is None else mask, 1, -1).astype(np.float32)
    whole = Letterbox(HEIGHT, WIDTH, HEIGHT, WIDTH, 0, 0, HEIGHT, WIDTH)
    floats = (float(box[0]), float(box[1]), float(box[2]), float(box[3]))
    return YoloDetection(
        floats, score, category_id, _Prototypes(logits[None], whole), np.ones(1, np.float32)
    )


def session(**options: Any) -> YoloSession:
    config = TrackingConfig("yolo11n-seg", device="cpu", options=options)
    return YoloSession(YOLO11SegLoader(config), HEIGHT, WIDTH)


def step(tracked: YoloSession, *detections: YoloDetection) -> TrackingFrame:
    """Step a frame on which the network finds these detections."""
    label, prompts = tracked.begin_step(FRAME, None)
    (frame,) = tracked.associate(label, prompts, detections, 0.0)
    assert tracked.latest() == frame
    return frame


def boxes(frame: TrackingFrame) -> dict[int, Box]:
    from workers.masks import box_xyxy

    found = {mask.object_id: box_xyxy(mask.mask) for mask in frame.masks}
    assert set(found) == {i for i, occluded in frame.occlusions.items() if not occluded}
    return {object_id: box for object_id, box in found.items() if box is not None}


def test_assignment_is_optimal_not_greedy() -> None:
    # Given objects 1 and 2; the detection nearest to both is 2's only chance
    tracked = session()
    tracked.prompt(0, 1, mask=rectangle(0, 0, 20, 10))
    tracked.prompt(0, 2, mask=rectangle(8, 0, 28, 10))
    step(tracked)
    # When 1 overlaps `near` more than 2 does, and also `far`, which 2 does not reach
    near, far = (4, 0, 24, 10), (0, 0, 13, 10)
    first, second = rectangle(0, 0, 20, 10), rectangle(8, 0, 28, 10)
    overlap = iou_matrix([first, second], [rectangle(*near), rectangle(*far)])
    assert overlap[0, 0] >= overlap[1, 0] > 0.3 > overlap[1, 1]
    assert overlap[0, 1] > 0.3
    # Then 1 leaves it to 2
    assert boxes(step(tracked, seen(near), seen(far))) == {1: far, 2: near}


def test_a_detection_is_never_shared() -> None:
    tracked = session()
    tracked.prompt(0, 5, mask=rectangle(0, 0, 20, 10))
    tracked.prompt(0, 3, mask=rectangle(1, 0, 21, 10))
    assert set(boxes(step(tracked, seen((0, 0, 20, 10))))) == {3, 5}  # the prompts themselves
    frame = step(tracked, seen((0, 0, 20, 10)))
    assert boxes(frame) == {5: (0, 0, 20, 10)}
    assert frame.occlusions == {3: True, 5: False}


def test_an_object_is_occluded_and_comes_back_under_its_id() -> None:
    # Given
    tracked = session()
    tracked.prompt(0, 7, mask=rectangle(10, 10, 30, 30))
    step(tracked, seen((10, 10, 30, 30)))
    assert boxes(step(tracked, seen((12, 10, 32, 30)))) == {7: (12, 10, 32, 30)}
    # When nothing is there, and then something that is not it
    for detections in ([], [seen((60, 10, 80, 30))]):
        frame = step(tracked, *detections)
        assert frame.masks == []
        assert frame.occlusions == {7: True}
    # Then it comes back where it was last seen
    assert boxes(step(tracked, seen((14, 12, 34, 32)))) == {7: (14, 12, 34, 32)}


def test_overlap_is_of_masks_not_of_boxes() -> None:
    lower = np.tril(np.ones((40, 40), np.uint8))
    upper = np.zeros((HEIGHT, WIDTH), np.uint8)
    upper[:40, :40] = lower
    other = np.zeros((HEIGHT, WIDTH), np.uint8)
    other[:40, :40] = 1 - lower
    tracked = session()
    tracked.prompt(0, 1, mask=upper)
    step(tracked)
    assert step(tracked, seen((0, 0, 40, 40), mask=other)).occlusions == {1: True}
    assert step(tracked, seen((0, 0, 40, 40), mask=upper)).occlusions == {1: False}


def test_a_mask_prompt_is_reported_as_it_is() -> None:
    tracked = session()
    given = rectangle(10, 10, 30, 30)
    tracked.prompt(0, 1, mask=given)
    (mask,) = step(tracked, seen((12, 12, 34, 34))).masks
    assert np.array_equal(mask.mask, given)
    assert mask.confidence == 1.0


def test_a_box_chooses_the_detection_it_fits() -> None:
    tracked = session()
    tracked.prompt(0, 1, box_xyxy=[10, 10, 30, 30])
    round_mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    ys, xs = np.mgrid[:HEIGHT, :WIDTH]
    round_mask[(ys - 20) ** 2 + (xs - 20) ** 2 < 81] = 1
    inner, outer = seen((11, 11, 29, 29), mask=round_mask), seen((0, 0, 50, 50), 0.99)
    (mask,) = step(tracked, outer, inner).masks
    assert np.array_equal(mask.mask, round_mask)
    assert mask.confidence == pytest.approx(0.8)


def test_a_box_or_points_wait_for_their_detection() -> None:
    # Given prompts that nothing answers yet
    tracked = session()
    tracked.prompt(0, 1, box_xyxy=[10, 10, 30, 30])
    tracked.prompt(0, 2, points_xy=[[60, 20], [75, 20]], point_labels=[1, 0])
    assert step(tracked).occlusions == {1: True, 2: True}
    too_wide = seen((50, 10, 90, 30))
    assert step(tracked, too_wide).occlusions == {1: True, 2: True}
    # When detections come, then they are the objects from there on
    assert boxes(step(tracked, too_wide, seen((50, 10, 70, 30)), seen((8, 8, 28, 28)))) == {
        1: (8, 8, 28, 28),
        2: (50, 10, 70, 30),
    }
    frame = step(tracked, seen((44, 10, 64, 30)))  # no longer over the point: overlap decides
    assert boxes(frame) == {2: (44, 10, 64, 30)}


def test_points_prefer_the_smaller_of_equals() -> None:
    tracked = session()
    tracked.prompt(0, 1, points_xy=[[20, 20]])
    frame = step(tracked, seen((0, 0, 60, 60)), seen((15, 15, 25, 25)))
    assert boxes(frame) == {1: (15, 15, 25, 25)}


def test_prompted_objects_choose_first() -> None:
    # Given an object that would overlap a detection fully
    tracked = session()
    tracked.prompt(0, 1, mask=rectangle(10, 10, 30, 30))
    step(tracked)
    # When another is prompted with it, loosely
    tracked.prompt(1, 2, box_xyxy=[5, 5, 33, 33])
    # Then the prompt has it
    assert boxes(step(tracked, seen((10, 10, 30, 30)))) == {2: (10, 10, 30, 30)}


def test_a_prompt_again_moves_an_object() -> None:
    tracked = session()
    tracked.prompt(0, 1, mask=rectangle(10, 10, 30, 30))
    step(tracked)
    tracked.prompt(1, 1, box_xyxy=[60, 10, 80, 30])
    both = seen((10, 10, 30, 30)), seen((60, 10, 80, 30))
    assert boxes(step(tracked, *both)) == {1: (60, 10, 80, 30)}
    assert boxes(step(tracked, *both)) == {1: (60, 10, 80, 30)}


def test_a_weak_overlap_costs_confidence() -> None:
    tracked = session()
    tracked.prompt(0, 1, mask=rectangle(0, 0, 20, 10))
    step(tracked)
    (strong,) = step(tracked, seen((2, 0, 22, 10), 0.9)).masks  # IoU 18/22
    assert strong.confidence == pytest.approx(0.9)
    (weak,) = step(tracked, seen((12, 0, 32, 10), 0.9)).masks  # IoU 10/30
    assert weak.confidence == pytest.approx(0.9 * (1 / 3) / 0.5)


def test_classes_matter_only_when_asked_for() -> None:
    for same_class, kept in ((False, True), (True, False)):
        tracked = session(same_class=same_class)
        tracked.prompt(0, 1, mask=rectangle(10, 10, 30, 30))
        step(tracked, seen((10, 10, 30, 30), category_id=3))
        frame = step(tracked, seen((10, 10, 30, 30), category_id=4))
        assert frame.occlusions == {1: not kept}
        assert step(tracked, seen((10, 10, 30, 30), category_id=3)).occlusions == {1: False}


def test_removed_objects_free_their_detections() -> None:
    tracked = session()
    for object_id in (1, 2):
        tracked.prompt(0, object_id, mask=rectangle(10, 10, 30, 30 + object_id))
    step(tracked)
    tracked.remove(1)
    assert boxes(step(tracked, seen((10, 10, 30, 30)))) == {2: (10, 10, 30, 30)}


def test_masks_are_only_made_where_they_can_matter() -> None:
    tracked = session()
    tracked.prompt(0, 1, mask=rectangle(10, 10, 30, 30))
    near, far = seen((12, 12, 32, 32)), seen((60, 10, 80, 30))
    step(tracked, near, far)
    assert "mask" in vars(near)
    assert "mask" not in vars(far)


def test_a_snapshot_carries_waiting_prompts_and_last_masks() -> None:
    # Given an object that was seen, one that waits for its box, one for its points, one occluded
    tracked = session()
    tracked.prompt(0, 1, mask=rectangle(10, 10, 30, 30))
    tracked.prompt(0, 2, box_xyxy=[60, 10, 80, 30])
    tracked.prompt(0, 3, points_xy=[[70, 50]], point_labels=[1])
    step(tracked, seen((10, 10, 30, 30), category_id=2))
    step(tracked)
    # When it goes through bytes
    again = session()
    again.restore_state(tracked.snapshot())
    # Then both continue alike
    detections = [seen((11, 10, 31, 30)), seen((60, 11, 80, 30)), seen((60, 40, 80, 60))]
    ours, theirs = step(tracked, *detections), step(again, *detections)
    assert set(boxes(ours)) == {1, 2, 3}
    assert boxes(ours) == boxes(theirs)
    assert ours.occlusions == theirs.occlusions
    (arrays, header), (other_arrays, other_header) = tracked._get_state(), again._get_state()
    assert json.dumps(header) == json.dumps(other_header)
    assert arrays.keys() == other_arrays.keys()
    assert all(np.array_equal(arrays[name], other_arrays[name]) for name in arrays)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"confidense": 0.1}, "no option 'confidense'.*confidence"),
        ({"confidence": 1.5}, "confidence of tracker yolo11n-seg must lie between 0 and 1"),
        ({"iou_threshold": -0.1}, "iou_threshold"),
        ({"max_detections": 0}, "at least 1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        YOLO11SegLoader(TrackingConfig("yolo11n-seg", options=options))


# -- with networks ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("networks")


def loaded(path: Path | str | None, model_id: str = "yolo11n-seg", **rest: Any) -> YOLO11SegLoader:
    checkpoint = None if path is None else str(path)
    loader = YOLO11SegLoader(
        TrackingConfig(model_id, device="cpu", checkpoint_path=checkpoint, **rest)
    )
    loader.load()
    return loader


def test_weights_come_from_a_path_or_the_cache(folder: Path) -> None:
    path = random_checkpoint(folder, "yolo11n-seg")
    by_path = loaded(path)
    assert list(by_path.classes) == [0, 1, 2, 3, 4]
    by_name = loaded(None, cache_dir=str(folder))
    assert by_name.fingerprint == by_path.fingerprint
    assert loaded(path, options={"confidence": 0.3}).fingerprint != by_path.fingerprint
    assert loaded(path, image_size=320).fingerprint != by_path.fingerprint
    by_path.unload()
    assert not by_path.is_loaded
    assert by_path.classes == {}
    with pytest.raises(RuntimeError, match="needs its weights"):
        loaded(None)
    with pytest.raises(RuntimeError, match=r"yolo26n\.pt does not exist"):
        loaded(None, "yolo26n", cache_dir=str(folder / "elsewhere"))


def test_weights_of_a_detector_are_refused(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="segmentation is needed"):
        loaded(random_checkpoint(folder, "yolo26n"))


@pytest.mark.parametrize("family", ["yolov8n-seg", "yolo26n-seg"])
def test_other_families_track(folder: Path, family: str) -> None:
    loader = loaded(random_checkpoint(folder, family), family)
    image = scene(180, 320)
    (found,) = loader.detect([image])
    wanted = found[0].box_xyxy
    # An untrained network may find one box several times; any of these is the object.
    fitting = [d.mask for d in found if d.box_xyxy == wanted and d.mask is not None]
    with loader.open_session(180, 320) as tracked:
        tracked.prompt(0, 1, box_xyxy=wanted)
        for _ in range(2):
            (frame,) = tracked.step(image)
            (mask,) = frame.masks
            assert any(np.array_equal(mask.mask, m.paste(180, 320)) for m in fitting)


def test_sessions_stepped_together_are_as_if_alone(folder: Path) -> None:
    # Given sessions of two sizes, one of which was emptied
    loader = loaded(random_checkpoint(folder, "yolo11n-seg"))
    images = [scene(180, 320), scene(180, 320, 2), scene(96, 160, 1), scene(96, 160)]

    def opened() -> list[Any]:
        sessions = []
        for i, image in enumerate(images):
            tracked = loader.open_session(*image.shape[:2])
            for object_id, found in enumerate(loader.detect([image])[0][:4], 1):
                tracked.prompt(0, object_id, box_xyxy=found.box_xyxy)
            tracked.step(image)
            if i == 3:
                for object_id in list(tracked.object_ids):
                    tracked.remove(object_id)
            sessions.append(tracked)
        return sessions

    # When
    alone = [s.step(image) for s, image in zip(opened(), images, strict=True)]
    together = loader.step_many(list(zip(opened(), images, strict=True)))
    # Then
    assert len(together) == 4
    for (one,), (other,) in zip(alone, together, strict=True):
        assert one.frame_idx == other.frame_idx == 1
        assert one.occlusions == other.occlusions
        for a, b in zip(one.masks, other.masks, strict=True):
            assert a.object_id == b.object_id
            assert a.confidence == pytest.approx(b.confidence, abs=1e-3)
            assert iou_matrix([a.mask], [b.mask])[0, 0] > 0.9
    assert together[3][0].masks == []


def test_a_frame_without_any_detection(folder: Path) -> None:
    loader = loaded(random_checkpoint(folder, "yolo11n-seg"), options={"confidence": 1.0})
    with loader.open_session(180, 320) as tracked:
        tracked.prompt(0, 2, box_xyxy=[10, 10, 50, 50])
        tracked.prompt(0, 9, mask=np.eye(180, 320))
        (first,) = tracked.step(scene(180, 320))
        (second,) = tracked.step(scene(180, 320))
    assert first.occlusions == {2: True, 9: False}
    assert second.occlusions == {2: True, 9: True}
    assert second.masks == []


def test_a_real_dog_is_kept() -> None:
    """Every third frame of a real sequence, prompted with a box: the dog, at full resolution."""
    loader = loaded(real_checkpoint("yolo11n-seg.pt"))
    sequence = shared_dir() / "data/davis/dog"
    frames = sorted((sequence / "frames").iterdir())[::3]
    truth: Sequence[NDArray[Any]] = [
        np.asarray(Image.open(path)) > 0 for path in sorted((sequence / "masks").iterdir())[::3]
    ]
    ys, xs = np.nonzero(truth[0])
    overlaps = []
    with loader.open_session(*truth[0].shape) as tracked:
        tracked.prompt(0, 4, box_xyxy=[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        for path, mask in zip(frames, truth, strict=True):
            (frame,) = tracked.step(np.asarray(Image.open(path).convert("RGB")))
            assert list(frame.occlusions) == [4]
            overlaps += [iou_matrix([found.mask], [mask])[0, 0] for found in frame.masks]
    assert len(overlaps) >= 0.9 * len(frames)
    assert np.mean(overlaps) > 0.85
