"""What every tracker must do in the same way: one suite, one line per tracker.

* A tracker is made by name, whatever its case and separators; it must be loaded before use.
* Wrong calls are refused with the documented exception, and leave the session as it was.
* Every step yields final frames in order; each frame comes out once. Masks are uint8 {0, 1} of the
  frame's size, confidences lie in 0..1, occlusions cover every live object, masks only those
  present, ordered by id.
* Identities are those prompted, whatever their order; later prompts act from their frame on;
  removed objects are gone; `latest` is the newest estimate.
* `track`, `step_many`, interleaved sessions and repeated runs give the masks of a plain session.
* A snapshot continues identically in another process; any other bytes are refused.
* Labels may have gaps, or decrease; nothing depends on them.
* A session's memory does not grow with the number of frames.
* Boxes, points, masks, lists and tensors are prompts; frames may have any size.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.engine import reference as sam2_reference
from tests.engine import sam3_weights, transformers_layout
from workers.trackers import base
from workers.trackers.base import (
    TrackingConfig,
    TrackingFrame,
    TrackingModelLoader,
    TrackingSession,
)
from workers.trackers.registry import create_tracking_loader

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("MASKMILL_SHARED", ROOT / "../shared")).resolve()
NUM_FRAMES = 8
MANY_FRAMES = int(os.environ.get("MASKMILL_MANY_FRAMES", "0"))
"""Length of the memory test, for a longer one than each tracker's own."""

Frames = list[NDArray[np.uint8]]


@dataclass(frozen=True)
class Clip:
    """A few frames with two objects on all of them, and their masks on the first."""

    frames: Frames
    masks: Mapping[int, NDArray[np.uint8]]

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.frames[0].shape[:2]
        return height, width


@functools.cache
def drawn_clip() -> Clip:
    """Draw two textured shapes that move over a textured background."""
    random = np.random.default_rng(5)
    height, width = 97, 131

    def texture(*shape: int, low: int, high: int) -> NDArray[np.uint8]:
        coarse = random.integers(low, high, (*[-(-s // 3) for s in shape], 3), dtype=np.uint8)
        return coarse.repeat(3, 0).repeat(3, 1)[: shape[0], : shape[1]]

    background = texture(height, width, low=60, high=120)
    sprites = {
        4: texture(30, 40, low=0, high=60) + np.array([180, 20, 0], np.uint8),
        2: texture(36, 22, low=0, high=60) + np.array([0, 60, 190], np.uint8),
    }
    starts = {4: (12, 10, 1, 3), 2: (50, 95, 0, -2)}
    frames: Frames = []
    for t in range(NUM_FRAMES):
        frame = background.copy()
        for object_id, sprite in sprites.items():
            y, x, dy, dx = starts[object_id]
            y, x = y + t * dy, x + t * dx
            frame[y : y + sprite.shape[0], x : x + sprite.shape[1]] = sprite
        frames.append(frame)
    masks = {}
    for object_id, sprite in sprites.items():
        y, x = starts[object_id][:2]
        masks[object_id] = np.zeros((height, width), np.uint8)
        masks[object_id][y : y + sprite.shape[0], x : x + sprite.shape[1]] = 1
    return Clip(frames, masks)


@functools.cache
def filmed_clip() -> Clip:
    """Read real frames with a dog and a car: a detector sees nothing in drawn ones."""
    folder = SHARED / "data/multi_libby_fullocc"
    frames: Frames = []
    for i in range(NUM_FRAMES):
        picture = Image.open(folder / f"frames/{i + 3:05d}.jpg").convert("RGB")
        frames.append(np.asarray(picture.resize((427, 240), Image.Resampling.BOX)))
    labels = Image.open(folder / "masks/00003.png").resize((427, 240), Image.Resampling.NEAREST)
    indexed = np.asarray(labels)
    return Clip(frames, {4: (indexed == 1).astype(np.uint8), 2: (indexed == 2).astype(np.uint8)})


@dataclass(frozen=True)
class Case:
    """One tracker of the suite.

    Attributes
    ----------
    name : str
        Registered name.
    clip : callable
        Frames it can see something in.
    other_options : Mapping
        Options that change masks, for a snapshot that must be refused.
    checkpoint : Path, callable or None
        Weights it needs, or what makes them.
    package : str
        What it needs beside them.
    is_trained : bool
        Whether the weights find what is asked for; random ones only do as they are told.
    extra : Mapping
        Further fields of its `TrackingConfig`; they keep the suite fast.
    batch_tolerance : float
        Share of pixels by which `step_many` may differ from one by one.
    many_frames : int
        So many that memory would have grown.
    small_image_size : int
        Side of the network's picture where nothing depends on it.
    """

    name: str
    clip: Callable[[], Clip]
    other_options: Mapping[str, Any]
    checkpoint: Path | Callable[[], Path] | None = None
    package: str = "ultralytics"
    is_trained: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    batch_tolerance: float = 0.0
    many_frames: int = 500
    small_image_size: int = 64

    def config(self, **changes: Any) -> TrackingConfig:
        path = self.checkpoint() if callable(self.checkpoint) else self.checkpoint
        checkpoint = None if path is None else str(path)
        config = TrackingConfig(self.name, device="cpu", checkpoint_path=checkpoint, **self.extra)
        return replace(config, **changes)

    def loader(self, **changes: Any) -> TrackingModelLoader:
        return create_tracking_loader(self.name, self.config(**changes))


def seeing_transformers_checkpoint() -> Path:
    """Return the weights of the other SAM 2 trackers in the layout of transformers."""
    return transformers_layout.converted(sam2_reference.seeing_checkpoint())


CASES = {
    case.name: case
    for case in (
        Case("flow", drawn_clip, {"persistence": 0.5}),
        Case("fake", drawn_clip, {"shift_x": 3}),
        Case(
            "yolo11n-seg",
            filmed_clip,
            {"confidence": 0.4},
            checkpoint=SHARED / "weights/yolo11n-seg.pt",
            extra={"image_size": 416},
            batch_tolerance=1e-3,
        ),
        *(
            Case(
                name,
                drawn_clip,
                {"fill_hole_area": 4},
                checkpoint=checkpoint,
                package=package,
                is_trained=False,
                many_frames=100 if package == "sam2" else 60,
                # The engine is the same: for other modules smaller pictures are enough.
                extra={"image_size": 128 if package == "sam2" else 64, "options": options},
            )
            for name, options, package, checkpoint in (
                ("sam2", {}, "sam2", sam2_reference.seeing_checkpoint),
                ("samurai", {}, "sam2", sam2_reference.seeing_checkpoint),
                # Pathways of random weights never agree, unless all frames are certain.
                ("sam2long", {"uncertainty": 0}, "sam2", sam2_reference.seeing_checkpoint),
                ("sam2-rt", {}, "sam2", sam2_reference.seeing_checkpoint),
                ("sam2video", {}, "transformers", seeing_transformers_checkpoint),
            )
        ),
        Case(
            "sam3-tracker",
            drawn_clip,
            {"fill_hole_area": 4},
            checkpoint=sam3_weights.alone,
            package="transformers",
            is_trained=False,
            many_frames=60,
            extra={"image_size": sam3_weights.IMAGE_SIZE},
            small_image_size=56,
        ),
    )
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    chosen = CASES[request.param]
    if isinstance(chosen.checkpoint, Path) and not chosen.checkpoint.is_file():
        if os.environ.get("CI"):
            pytest.fail(f"{chosen.checkpoint} is missing")
        pytest.skip(f"needs the weights {chosen.checkpoint.name}")
    is_here = chosen.checkpoint is None or os.environ.get("CI")
    # Not imported: ultralytics would change PIL and NumPy for the tests after this one.
    if not is_here and importlib.util.find_spec(chosen.package) is None:
        pytest.skip(f"needs the package {chosen.package}")
    if callable(chosen.checkpoint):
        chosen.checkpoint()
    return chosen


@pytest.fixture(scope="module")
def loader(case: Case) -> Iterator[TrackingModelLoader]:
    loaded = case.loader()
    loaded.load()
    yield loaded
    loaded.unload()


@pytest.fixture
def clip(case: Case) -> Clip:
    return case.clip()


@pytest.fixture
def session(loader: TrackingModelLoader, clip: Clip) -> Iterator[TrackingSession]:
    with loader.open_session(*clip.size) as opened:
        yield opened


def prompted(
    loader: TrackingModelLoader, clip: Clip, num_frames: int | None = None
) -> TrackingSession:
    """Open a session with every object of the clip prompted by its mask on frame 0."""
    session = loader.open_session(*clip.size, num_frames=num_frames)
    for object_id, mask in clip.masks.items():
        session.prompt(0, object_id, mask=mask)
    return session


def run(session: TrackingSession, frames: Sequence[NDArray[np.uint8]]) -> list[TrackingFrame]:
    """Step through frames with their own count as labels, to the end."""
    results = [f for i, frame in enumerate(frames) for f in session.step(frame, frame_idx=i)]
    return results + session.finish()


@functools.cache
def reference(name: str) -> list[TrackingFrame]:
    """Track a case's clip once, from masks, in a session of a loader of its own."""
    loader = CASES[name].loader()
    loader.load()
    with prompted(loader, CASES[name].clip()) as session:
        return run(session, CASES[name].clip().frames)


def assert_same(
    got: Sequence[TrackingFrame], expected: Sequence[TrackingFrame], tolerance: float = 0.0
) -> None:
    """Compare everything but labels and times."""
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.occlusions == theirs.occlusions
        assert [m.object_id for m in ours.masks] == [m.object_id for m in theirs.masks]
        for mask, other in zip(ours.masks, theirs.masks, strict=True):
            assert np.mean(mask.mask != other.mask) <= tolerance
            assert mask.confidence == pytest.approx(other.confidence, abs=10 * tolerance)


# -- making and loading ----------------------------------------------------------------------


def test_names_do_not_depend_on_case_and_separators(case: Case) -> None:
    plain = case.name.replace("-", "")
    for name in (case.name, case.name.upper(), plain, case.name.replace("-", "_"), f" {plain} "):
        made = create_tracking_loader(name, case.config())
        assert type(made) is type(case.loader())
        assert made.config.model_id == case.name


def test_constants_are_those_users_know() -> None:
    assert base.OCCLUSION_CONFIDENCE_THRESHOLD == 0.5
    assert base.IOU_MATCH_THRESHOLD == 0.3
    assert base.LOW_CONFIDENCE_IOU_THRESHOLD == 0.5
    assert [f.name for f in base.TrackingFramework] == ["PYTORCH", "ULTRALYTICS", "SAM2"]
    assert isinstance(base.TrackingFramework.SAM2, str)


def test_nothing_works_before_load_and_after_unload(case: Case, clip: Clip) -> None:
    made = case.loader()
    picture, mask = Image.fromarray(clip.frames[0]), clip.masks[4]
    snapshot = prompted_snapshot(case)
    for _ in ("made", "unloaded"):
        assert (made.is_loaded, made.config.model_id) == (False, case.name)
        with pytest.raises(RuntimeError, match=r"not loaded.*load\(\)"):
            made.open_session(*clip.size)
        with pytest.raises(RuntimeError, match="not loaded"):
            made.track([picture], [mask], [1])
        with pytest.raises(RuntimeError, match="not loaded"):
            made.restore(snapshot)
        made.load()
        assert (made.is_loaded, made.config.model_id) == (True, case.name)
        made.open_session(*clip.size).close()
        made.unload()


def test_unknown_options_are_named_with_the_known_ones(case: Case) -> None:
    known = next(iter(case.other_options))
    with pytest.raises(ValueError, match=f"has no option 'no_such'.*{known}"):
        case.loader(options={"no_such": 1})
    with pytest.raises(ValueError, match=known):
        case.loader(options={known: "nonsense"})


# -- what is refused -------------------------------------------------------------------------


def test_track_refuses_masks_and_ids_that_do_not_match(
    loader: TrackingModelLoader, clip: Clip
) -> None:
    pictures = [Image.fromarray(f) for f in clip.frames[:2]]
    mask = clip.masks[4]
    with pytest.raises(ValueError, match="1 initial masks do not match 2 object ids"):
        loader.track(pictures, [mask], [1, 2])
    with pytest.raises(ValueError, match="twice"):
        loader.track(pictures, [mask, mask], [1, 1])
    with pytest.raises(ValueError, match="at least one"):
        loader.track([], [mask], [1])
    with pytest.raises(ValueError, match="shape"):
        loader.track(pictures, [mask[:-1]], [1])


def test_step_before_any_prompt_raises(session: TrackingSession, clip: Clip) -> None:
    with pytest.raises(RuntimeError, match="before any prompt"):
        session.step(clip.frames[0])


def test_wrong_frames_are_refused_and_change_nothing(
    case: Case, loader: TrackingModelLoader, clip: Clip
) -> None:
    first = clip.frames[0]
    wrong: list[Any] = [
        first[:-1],
        first[:, 1:],
        first[..., 0],
        np.dstack([first, first[..., :1]]),
        first.astype(np.float32),
        first.tolist(),
        None,
    ]
    with prompted(loader, clip) as session:
        results = []
        for i, frame in enumerate(clip.frames):
            for bad in wrong:
                with pytest.raises(ValueError, match="a frame must be"):
                    session.step(bad, frame_idx=i)
            results += session.step(frame, frame_idx=i)
        assert_same(results + session.finish(), reference(case.name))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({}, "needs one of"),
        ({"box_xyxy": [1, 1, 9, 9], "points_xy": [[2, 2]]}, "needs one of"),
        ({"box_xyxy": [1, 1, 9]}, "4 finite numbers"),
        ({"box_xyxy": [1, float("nan"), 9, 9]}, "4 finite numbers"),
        ({"box_xyxy": [1, 1, float("inf"), 9]}, "4 finite numbers"),
        ({"box_xyxy": "here"}, "made of numbers"),
        ({"box_xyxy": [5, 5, 5, 9]}, "no area"),
        ({"box_xyxy": [-9, 5, -1, 9]}, "outside"),
        ({"box_xyxy": [5000, 5, 5010, 9]}, "outside"),
        ({"points_xy": []}, "shape"),
        ({"points_xy": [[1, 2, 3]]}, "shape"),
        ({"points_xy": [[1, float("nan")]]}, "not a finite number"),
        ({"points_xy": [[1, -2]]}, "outside"),
        ({"points_xy": [[5000, 2]]}, "outside"),
        ({"points_xy": [[1, 2]], "point_labels": [1, 0]}, "one label"),
        ({"points_xy": [[1, 2]], "point_labels": [3]}, "one label"),
        ({"points_xy": [[1, 2]], "point_labels": [0]}, "foreground"),
        ({"box_xyxy": [1, 1, 9, 9], "point_labels": [1]}, "no points"),
        ({"mask": np.zeros((4, 4))}, "shape"),
        ({"mask": [[1, 2], [3]]}, "made of numbers"),
    ],
)
def test_wrong_prompts_are_refused(
    session: TrackingSession, clip: Clip, prompt: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        session.prompt(0, 1, **prompt)
    with pytest.raises(RuntimeError, match="before any prompt"):
        session.step(clip.frames[0])


def test_empty_mask_is_refused(session: TrackingSession, clip: Clip) -> None:
    with pytest.raises(ValueError, match="empty"):
        session.prompt(0, 1, mask=np.zeros(clip.size, bool))


def test_past_frames_and_unknown_ids_are_refused(loader: TrackingModelLoader, clip: Clip) -> None:
    with loader.open_session(*clip.size) as session:
        session.prompt(5, 4, mask=clip.masks[4])
        session.step(clip.frames[0], frame_idx=5)
        session.step(clip.frames[1], frame_idx=6)
        for past in (0, 5, 6):
            with pytest.raises(ValueError, match="already tracked"):
                session.prompt(past, 9, box_xyxy=[1, 1, 20, 20])
        with pytest.raises(ValueError, match="no object 9"):
            session.remove(9)
        for label in (6, 3):
            with pytest.raises(ValueError, match="strictly increasing"):
                session.step(clip.frames[2], frame_idx=label)
        session.prompt(8, 9, box_xyxy=[1, 1, 20, 20])
        with pytest.raises(ValueError, match="passes over frame 8"):
            session.step(clip.frames[2], frame_idx=9)
        with pytest.raises(ValueError, match="registered for frame 8"):
            session.finish()
        assert [f.frame_idx for f in session.step(clip.frames[2])][-1:] in ([7], [])


def test_closed_and_finished_sessions_are_refused(loader: TrackingModelLoader, clip: Clip) -> None:
    session = prompted(loader, clip)
    session.step(clip.frames[0])
    session.finish()
    assert session.finish() == []
    with pytest.raises(RuntimeError, match="finished"):
        session.step(clip.frames[1])
    with pytest.raises(RuntimeError, match="finished"):
        session.prompt(3, 1, mask=clip.masks[4])
    session.close()
    session.close()
    for call in (
        lambda: session.step(clip.frames[1]),
        lambda: session.prompt(3, 1, mask=clip.masks[4]),
        lambda: session.remove(4),
        session.finish,
        session.snapshot,
    ):
        with pytest.raises(RuntimeError, match="closed"):
            call()


# -- what comes out --------------------------------------------------------------------------


def test_each_frame_comes_out_once_and_is_well_formed(case: Case, clip: Clip) -> None:
    results = reference(case.name)
    assert [f.frame_idx for f in results] == list(range(NUM_FRAMES))
    for frame in results:
        assert set(frame.occlusions) == set(clip.masks)
        present = [m.object_id for m in frame.masks]
        assert present == sorted(set(present))
        assert present == [i for i in sorted(clip.masks) if not frame.occlusions[i]]
        assert frame.processing_time >= 0
        for mask in frame.masks:
            assert mask.mask.dtype == np.uint8
            assert mask.mask.shape == clip.size
            assert set(np.unique(mask.mask)) <= {0, 1}
            assert mask.mask.any()
            assert 0 <= mask.confidence <= 1
            assert isinstance(mask.confidence, float)
            assert mask.to_rle()["size"] == list(clip.size)


def test_a_mask_prompt_is_its_frames_mask(case: Case, clip: Clip) -> None:
    first = reference(case.name)[0]
    assert [m.object_id for m in first.masks] == [2, 4]
    for mask in first.masks:
        np.testing.assert_array_equal(mask.mask, clip.masks[mask.object_id])


def test_objects_are_seen_after_the_first_frame(case: Case) -> None:
    seen = {m.object_id for frame in reference(case.name)[1:] for m in frame.masks}
    assert seen == {2, 4}


def test_ids_do_not_depend_on_the_order_of_prompts(
    case: Case, loader: TrackingModelLoader, clip: Clip
) -> None:
    backwards = Clip(clip.frames, dict(sorted(clip.masks.items())))
    with prompted(loader, backwards) as session:
        assert_same(run(session, clip.frames), reference(case.name))


def test_exchanged_ids_exchange_masks(case: Case, loader: TrackingModelLoader, clip: Clip) -> None:
    exchanged = Clip(clip.frames, {2: clip.masks[4], 4: clip.masks[2]})
    with prompted(loader, exchanged) as session:
        results = run(session, clip.frames)
    for got, expected in zip(results, reference(case.name), strict=True):
        masks = {m.object_id: m.mask for m in expected.masks}
        assert got.occlusions == {2: expected.occlusions[4], 4: expected.occlusions[2]}
        for mask in got.masks:
            np.testing.assert_array_equal(mask.mask, masks[6 - mask.object_id])


def test_later_prompts_act_from_their_frame_on(session: TrackingSession, clip: Clip) -> None:
    session.prompt(3, 8, mask=clip.masks[4])
    results = run(session, clip.frames)
    assert [f.frame_idx for f in results] == list(range(NUM_FRAMES))
    for frame in results[:3]:
        assert frame.masks == []
        assert frame.occlusions == {}
    assert [m.object_id for m in results[3].masks] == [8]
    assert all(set(f.occlusions) == {8} for f in results[3:])


def test_a_later_prompt_leaves_the_others_their_ids(session: TrackingSession, clip: Clip) -> None:
    session.prompt(0, 4, mask=clip.masks[4])
    session.prompt(4, 2, mask=clip.masks[2])
    results = run(session, clip.frames)
    assert [set(f.occlusions) for f in results] == [{4}] * 4 + [{2, 4}] * (NUM_FRAMES - 4)
    assert 2 in {m.object_id for m in results[4].masks}


def test_removed_objects_are_gone(loader: TrackingModelLoader, clip: Clip) -> None:
    with prompted(loader, clip) as session:
        results = []
        for i, frame in enumerate(clip.frames[:6]):
            results += session.step(frame, frame_idx=i)
            if i == 2:
                session.remove(4)
                latest = session.latest()
                assert latest is not None
                assert set(latest.occlusions) == {2}
                assert 4 not in {m.object_id for m in latest.masks}
            if i == 4:
                session.remove(2)
        results += session.finish()
    assert [set(f.occlusions) for f in results[3:]] == [{2}, {2}, set()]
    assert results[5].masks == []


def test_a_removed_object_may_be_prompted_again(session: TrackingSession, clip: Clip) -> None:
    session.prompt(0, 4, mask=clip.masks[4])
    session.prompt(2, 9, mask=clip.masks[2])
    session.remove(9)
    session.step(clip.frames[0])
    session.remove(4)
    session.step(clip.frames[1])
    session.prompt(2, 4, mask=clip.masks[2])
    session.step(clip.frames[2])
    latest = session.latest()
    assert latest is not None
    assert latest.frame_idx == 2
    assert [m.object_id for m in latest.masks] == [4]
    np.testing.assert_array_equal(latest.masks[0].mask, clip.masks[2])


def test_latest_is_the_last_stepped_frame(loader: TrackingModelLoader, clip: Clip) -> None:
    with prompted(loader, clip) as session:
        assert session.latest() is None
        for i, frame in enumerate(clip.frames[:3]):
            session.step(frame)
            latest = session.latest()
            assert latest is not None
            assert latest.frame_idx == i
            assert set(latest.occlusions) == {2, 4}
            assert session.num_steps == i + 1


# -- the same masks by every way -------------------------------------------------------------


def test_track_gives_the_masks_of_a_session(loader: TrackingModelLoader, clip: Clip) -> None:
    pictures = [Image.fromarray(f) for f in clip.frames]
    result = loader.track(pictures, list(clip.masks.values()), list(clip.masks))
    with prompted(loader, clip, NUM_FRAMES) as session:
        assert_same(result.frames, run(session, clip.frames))
    assert (result.video_height, result.video_width) == clip.size
    assert result.total_processing_time > 0
    assert result.fps == pytest.approx(NUM_FRAMES / result.total_processing_time)


def test_runs_are_repeatable(case: Case, loader: TrackingModelLoader, clip: Clip) -> None:
    with prompted(loader, clip) as session:
        assert_same(run(session, clip.frames), reference(case.name))


def test_interleaved_sessions_do_not_touch_each_other(
    case: Case, loader: TrackingModelLoader, clip: Clip
) -> None:
    with prompted(loader, clip) as one, loader.open_session(*clip.size) as other:
        x0, y0, x1, y1 = box_of(clip.masks[2])
        other.prompt(1, 7, box_xyxy=[x0, y0, x1, y1])
        results = []
        for i, frame in enumerate(clip.frames):
            results += one.step(frame, frame_idx=i)
            other.step(clip.frames[-1 - i])
        assert_same(results + one.finish(), reference(case.name))


def test_step_many_equals_one_by_one(case: Case, loader: TrackingModelLoader, clip: Clip) -> None:
    backwards = Clip(clip.frames[::-1], {3: clip.masks[2]})
    with prompted(loader, backwards) as session:
        expected = run(session, backwards.frames)
    with prompted(loader, clip) as one, prompted(loader, backwards) as other:
        results: tuple[list[TrackingFrame], list[TrackingFrame]] = ([], [])
        for pair in zip(clip.frames, backwards.frames, strict=True):
            stepped = loader.step_many([(one, pair[0]), (other, pair[1])])
            for kept, frames in zip(results, stepped, strict=True):
                kept.extend(frames)
        assert_same(results[0] + one.finish(), reference(case.name), case.batch_tolerance)
        assert_same(results[1] + other.finish(), expected, case.batch_tolerance)


# -- snapshots -------------------------------------------------------------------------------


@functools.cache
def _snapshot_after(name: str, num_steps: int) -> bytes:
    case = CASES[name]
    loader = case.loader()
    loader.load()
    clip = case.clip()
    with prompted(loader, clip) as session:
        session.prompt(num_steps + 1, 11, box_xyxy=box_of(clip.masks[2]))
        for frame in clip.frames[:num_steps]:
            session.step(frame)
        return session.snapshot()


def prompted_snapshot(case: Case, num_steps: int = 3) -> bytes:
    """Return a snapshot with live objects and one prompt still to come."""
    return _snapshot_after(case.name, num_steps)


def resume(name: str, snapshot: str, out: str, torch_threads: str) -> None:
    """Continue a snapshot to the end of its clip and write what comes out."""
    case = CASES[name]
    loader = case.loader()
    loader.load()
    if int(torch_threads):
        import torch

        torch.set_num_threads(int(torch_threads))
    with loader.restore(Path(snapshot).read_bytes()) as session:
        frames = case.clip().frames[session.num_steps :]
        results = [f for frame in frames for f in session.step(frame)] + session.finish()
    arrays: Any = flattened(results)
    np.savez(out, **arrays)


def flattened(results: Sequence[TrackingFrame]) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {"labels": np.array([f.frame_idx for f in results])}
    for frame in results:
        occlusions = sorted(frame.occlusions.items())
        arrays[f"occlusions.{frame.frame_idx}"] = np.array(occlusions)
        for mask in frame.masks:
            key = f"{frame.frame_idx}.{mask.object_id}"
            arrays[f"mask.{key}"] = mask.mask
            arrays[f"confidence.{key}"] = np.array(mask.confidence)
    return arrays


def test_a_snapshot_continues_identically_in_another_process(
    case: Case, loader: TrackingModelLoader, clip: Clip, tmp_path: Path
) -> None:
    snapshot = prompted_snapshot(case)
    (tmp_path / "session").write_bytes(snapshot)
    program = (
        "import sys; from tests.trackers.test_conformance import resume; resume(*sys.argv[1:])"
    )
    # Sums inside a network depend on how many threads share them, and that on which of torch and
    # ultralytics was imported first: only with as many threads must the results be identical.
    torch_threads = sys.modules["torch"].get_num_threads() if case.checkpoint else 0
    arguments = [case.name, tmp_path / "session", tmp_path / "out.npz", torch_threads]
    subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    with prompted(loader, clip) as session:
        session.prompt(4, 11, box_xyxy=box_of(clip.masks[2]))
        expected = run(session, clip.frames)[3:]
    with np.load(tmp_path / "out.npz") as got:
        # A tracker that decides late has not yet given out the frames before the snapshot.
        late = [f for f in expected if f.frame_idx in got["labels"]]
        wanted = flattened(late)
        assert sorted(got) == sorted(wanted)
        for name, array in wanted.items():
            np.testing.assert_array_equal(got[name], array, err_msg=name)


def test_a_snapshot_keeps_what_is_known(
    case: Case, loader: TrackingModelLoader, clip: Clip
) -> None:
    with loader.restore(prompted_snapshot(case)) as session:
        assert session.num_steps == 3
        assert sorted(session.object_ids) == [2, 4]
        latest = session.latest()
        assert latest is not None
        assert_same([latest], [reference(case.name)[2]])
        with pytest.raises(ValueError, match="already tracked"):
            session.prompt(2, 5, mask=clip.masks[4])


def test_foreign_snapshots_are_refused(case: Case, loader: TrackingModelLoader) -> None:
    snapshot = prompted_snapshot(case)
    version = rb"\"version\": %d"
    other_version = snapshot.replace(version % base.SNAPSHOT_VERSION, version % 99)
    for wrong in (
        b"",
        b"no snapshot",
        snapshot[:40],
        snapshot[: len(snapshot) - 10],
        other_version,
    ):
        assert wrong != snapshot
        with pytest.raises(ValueError, match="snapshot"):
            loader.restore(wrong)


def test_snapshots_of_other_settings_and_trackers_are_refused(
    case: Case, loader: TrackingModelLoader
) -> None:
    snapshot = prompted_snapshot(case)
    other = case.loader(options=case.other_options)
    other.load()
    with pytest.raises(ValueError, match="other weights or settings"):
        other.restore(snapshot)
    foreign = CASES["fake" if case.name != "fake" else "flow"]
    with pytest.raises(ValueError, match="other weights or settings"):
        loader.restore(prompted_snapshot(foreign))


# -- time is the count of steps --------------------------------------------------------------


def test_labels_with_gaps_change_nothing_else(
    case: Case, loader: TrackingModelLoader, clip: Clip
) -> None:
    with loader.open_session(*clip.size) as session:
        for object_id, mask in clip.masks.items():
            session.prompt(10, object_id, mask=mask)
        results = []
        for i, frame in enumerate(clip.frames):
            results += session.step(frame, frame_idx=10 + 7 * i)
        results += session.finish()
    assert [f.frame_idx for f in results] == [10 + 7 * i for i in range(NUM_FRAMES)]
    assert_same(results, reference(case.name))


def test_a_reverse_pass_counts_down(case: Case, loader: TrackingModelLoader, clip: Clip) -> None:
    with loader.open_session(*clip.size) as session:
        for object_id, mask in clip.masks.items():
            session.prompt(20, object_id, mask=mask)
        results = session.step(clip.frames[0], frame_idx=20)
        results += session.step(clip.frames[1], frame_idx=19)
        with pytest.raises(ValueError, match="strictly decreasing"):
            session.step(clip.frames[2], frame_idx=21)
        with pytest.raises(ValueError, match="already tracked"):
            session.prompt(25, 5, mask=clip.masks[4])
        for frame in clip.frames[2:]:
            results += session.step(frame)
        results += session.finish()
    assert [f.frame_idx for f in results] == [20 - i for i in range(NUM_FRAMES)]
    assert_same(results, reference(case.name))


def test_numpy_labels_and_ids_survive_a_snapshot(loader: TrackingModelLoader, clip: Clip) -> None:
    with loader.open_session(*clip.size) as session:
        session.prompt(np.int64(3), np.int32(4), mask=clip.masks[4])  # type: ignore[arg-type]
        session.step(clip.frames[0], frame_idx=np.int64(3))  # type: ignore[arg-type]
        with loader.restore(session.snapshot()) as restored:
            assert restored.object_ids == [4]
        with pytest.raises(ValueError, match="whole number"):
            session.step(clip.frames[1], frame_idx=4.5)  # type: ignore[arg-type]


# -- memory ----------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_number_of_frames(case: Case) -> None:
    height, width = 48, 64
    num_frames = max(case.many_frames, MANY_FRAMES)
    random = np.random.default_rng(0)
    picture = random.integers(0, 255, (height, 2 * width, 3), np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[10:30, 12:40] = 1
    small = case.loader(image_size=case.small_image_size)
    small.load()
    sizes: dict[int, tuple[int, int]] = {}
    tracemalloc.start()
    try:
        with small.open_session(height, width) as session:
            session.prompt(0, 1, mask=mask)
            session.prompt(0, 2, box_xyxy=[2, 2, 11, 11])
            for i in range(1, num_frames + 1):
                shift = i % width
                session.step(np.ascontiguousarray(picture[:, shift : shift + width]))
                if i in (50, num_frames):
                    sizes[i] = len(session.snapshot()), tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    # A few digits of counters and of the last masks' sizes may differ, nothing that counts.
    assert sizes[num_frames][0] <= sizes[50][0] * 1.02 + 8192
    assert sizes[num_frames][1] <= sizes[50][1] * 1.02 + 65536


# -- every kind of prompt, every size of frame -----------------------------------------------


def box_of(mask: NDArray[np.uint8]) -> list[float]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]


def only_mask(session: TrackingSession, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    session.step(frame)
    latest = session.latest()
    assert latest is not None
    assert len(latest.masks) == 1
    return latest.masks[0].mask


def iou(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_a_box_becomes_the_object_in_it(case: Case, session: TrackingSession, clip: Clip) -> None:
    session.prompt(0, 1, box_xyxy=box_of(clip.masks[4]))
    mask = only_mask(session, clip.frames[0])
    if case.is_trained:
        assert iou(mask, clip.masks[4]) > 0.6


def test_reversed_corners_are_put_in_order(loader: TrackingModelLoader, clip: Clip) -> None:
    x0, y0, x1, y1 = box_of(clip.masks[4])
    masks = []
    for box in ([x0, y0, x1, y1], [x1, y1, x0, y0], [x1, y0, x0, y1]):
        with loader.open_session(*clip.size) as session:
            session.prompt(0, 1, box_xyxy=box)
            masks.append(only_mask(session, clip.frames[0]))
    for mask in masks[1:]:
        np.testing.assert_array_equal(mask, masks[0])


def test_points_become_the_object_under_them(
    case: Case, session: TrackingSession, clip: Clip
) -> None:
    rows, columns = np.nonzero(clip.masks[4])
    middle = np.argmin(abs(rows - rows.mean()) + abs(columns - columns.mean()))
    corner = [1.0, clip.size[0] - 2.0]
    points = [[float(columns[middle]), float(rows[middle])], corner]
    session.prompt(0, 1, points_xy=points, point_labels=[1, 0])
    mask = only_mask(session, clip.frames[0])
    if not case.is_trained:
        return
    assert mask[rows[middle], columns[middle]] == 1
    assert mask[int(corner[1]), int(corner[0])] == 0
    if case.name != "fake":  # which marks a disc and never looks
        assert iou(mask, clip.masks[4]) > 0.3


@pytest.mark.parametrize("kind", ["list", "bool", "float", "int64", "extra axis", "strided"])
def test_masks_of_any_kind_are_the_same_prompt(
    session: TrackingSession, clip: Clip, kind: str
) -> None:
    mask = clip.masks[4]
    given: dict[str, Any] = {
        "list": mask.tolist(),
        "bool": mask > 0,
        "float": mask * 0.25,
        "int64": mask.astype(np.int64) * 255,
        "extra axis": mask[None],
        "strided": np.asfortranarray(mask),
    }
    session.prompt(0, 1, mask=given[kind])
    np.testing.assert_array_equal(only_mask(session, clip.frames[0]), mask)
    assert session.snapshot()


def test_tensors_are_prompts(loader: TrackingModelLoader, clip: Clip) -> None:
    if os.environ.get("CI"):
        import torch
    else:
        torch = pytest.importorskip("torch")
    box = box_of(clip.masks[4])
    rows, columns = np.nonzero(clip.masks[4])
    points = [[float(columns[len(rows) // 2]), float(rows[len(rows) // 2])]]
    prompts: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"box_xyxy": box}, {"box_xyxy": torch.tensor(box, requires_grad=True)}),
        (
            {"points_xy": points, "point_labels": [1]},
            {"points_xy": torch.tensor(points), "point_labels": torch.tensor([1])},
        ),
        ({"mask": clip.masks[4]}, {"mask": torch.from_numpy(clip.masks[4])}),
    ]
    for plain, tensors in prompts:
        masks = []
        for prompt in (plain, tensors):
            with loader.open_session(*clip.size) as session:
                session.prompt(0, 1, **prompt)
                masks.append(only_mask(session, clip.frames[0]))
        np.testing.assert_array_equal(masks[0], masks[1])


@pytest.mark.parametrize("size", [(97, 61), (61, 97), (33, 200), (9, 7), (1, 40), (1, 1)])
def test_frames_of_any_size(loader: TrackingModelLoader, size: tuple[int, int]) -> None:
    random = np.random.default_rng(1)
    frames = random.integers(0, 255, (3, *size, 3), np.uint8)
    mask = np.zeros(size, np.uint8)
    mask[: size[0] // 2 + 1, : size[1] // 2 + 1] = 1
    with loader.open_session(*size) as session:
        session.prompt(0, 1, mask=mask)
        results = run(session, list(frames))
    assert [f.frame_idx for f in results] == [0, 1, 2]
    np.testing.assert_array_equal(results[0].masks[0].mask, mask)
    assert all(m.mask.shape == size for f in results for m in f.masks)


def test_a_size_without_pixels_is_refused(loader: TrackingModelLoader) -> None:
    for size in ((0, 5), (5, 0), (-1, 5)):
        with pytest.raises(ValueError, match="at least one pixel"):
            loader.open_session(*size)
