"""Several sessions and frames at once: batches, frames known ahead, videos in flight.

* Sessions stepped together give what each gives alone: bit by bit on a CPU, batched to rounding,
  whatever their sizes, objects, prompts and lengths.
* A wrong frame among them changes no session.
* Frames named ahead are encoded once, and change nothing; frames that never come do no harm.
* A worker with several videos in flight gives the masks of one with a single one.
* A batch that fails is nobody's fault: everybody may try again, one at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.engine import reference
from tests.engine.test_engine import BOXES, assert_equal, clip, masks_of, opened, stepped
from workers import stepping
from workers.actor import TrackingWorker
from workers.errors import TransientError
from workers.messages import (
    Attempt,
    Prompt,
    Proposal,
    SourceKind,
    TrackerSpec,
    VideoSource,
    WorkerSpec,
)
from workers.stepping import Stepper
from workers.trackers.base import TrackingConfig, TrackingFrame
from workers.trackers.fake import FakeLoader
from workers.trackers.registry import create_tracking_loader
from workers.trackers.sam2 import EngineLoader, EngineSession

NAMES = ("sam2", "samurai", "sam2long")
NUM_FRAMES = 8


@pytest.fixture(params=NAMES)
def made(request: pytest.FixtureRequest) -> EngineLoader:
    return reference.small_loader(request.param)


def three(made: EngineLoader) -> tuple[list[EngineSession], list[Sequence[Any]]]:
    """Open three sessions that differ in all that may differ, and return their frames."""
    frames = clip()
    sessions = [
        opened(made, {1: {0: BOXES[1]}, 2: {3: BOXES[2]}}),
        opened(made, {7: {0: BOXES[7], 4: BOXES[7]}}),
    ]
    tall = [np.ascontiguousarray(frame.transpose(1, 0, 2)) for frame in frames[6:]]
    session = made.open_session(*tall[0].shape[:2])
    assert isinstance(session, EngineSession)
    session.prompt(0, 1, box_xyxy=[0, 75, 99, 129])
    return [*sessions, session], [frames[:NUM_FRAMES], frames[10 : 10 + NUM_FRAMES], tall[:5]]


def together(made: EngineLoader) -> list[list[TrackingFrame]]:
    sessions, frames = three(made)
    results: list[list[TrackingFrame]] = [[] for _ in sessions]
    for t in range(NUM_FRAMES):
        live = [i for i in range(len(sessions)) if t < len(frames[i])]
        out = made.step_many([(sessions[i], frames[i][t]) for i in live])
        for i, final in zip(live, out, strict=True):
            results[i] += final
    for result, session in zip(results, sessions, strict=True):
        result += session.finish()
        session.close()
    return results


def test_sessions_together_are_as_one_by_one(made: EngineLoader) -> None:
    expected = [stepped(s, f) for s, f in zip(*three(made), strict=True)]
    exact = together(made)
    made.engine.max_batch = 8
    try:
        batched = together(made)
    finally:
        made.engine.max_batch = 1
    for i, ids in enumerate(((1, 2), (7,), (1,))):
        for object_id in ids:
            alone = masks_of(expected[i], object_id)
            assert_equal(masks_of(exact[i], object_id), alone)
            assert_equal(masks_of(batched[i], object_id)[:5], alone[:5], rounded=True)


def test_a_wrong_frame_changes_no_session() -> None:
    made = reference.small_loader("sam2")
    frames = clip()[:3]
    with opened(made, {1: {0: BOXES[1]}}) as one, opened(made, {2: {0: BOXES[2]}}) as other:
        with pytest.raises(ValueError, match="a frame must be"):
            made.step_many([(one, frames[0]), (other, frames[0][1:])])
        with pytest.raises(ValueError, match="twice"):
            made.step_many([(one, frames[0]), (one, frames[0])])
        assert (one.num_steps, other.num_steps) == (0, 0)
        results = [f for frame in frames for f in made.step_many([(one, frame)])[0]]
    with opened(made, {1: {0: BOXES[1]}}) as session:
        assert_equal(masks_of(results, 1), masks_of(stepped(session, frames), 1))


def test_frames_named_ahead_are_encoded_once_and_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = reference.small_loader("samurai")
    frames = clip()[:7]
    with opened(made, {1: {0: BOXES[1]}}) as session:
        expected = stepped(session, frames)
    encode, sizes = made.engine.network.encode_images, []

    def counted(pixels: Any) -> Any:
        sizes.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(made.engine.network, "encode_images", counted)
    monkeypatch.setattr(made.engine, "max_batch", 3)
    assert made.num_ahead == 3
    results = []
    with opened(made, {1: {0: BOXES[1]}}) as session:
        for t, frame in enumerate(frames):
            if t == 3:
                session.look_ahead([frames[6], frames[5]])  # which do not come next
            session.look_ahead(frames[t : t + 9])
            results += session.step(frame)
    assert sizes == [3, 2, 3, 1]
    assert_equal(masks_of(results, 1), masks_of(expected, 1), rounded=True)


# -- videos in flight ------------------------------------------------------------------------


def attempts(folder: Path) -> list[Attempt]:
    """Write three folders of frames and return an attempt for each."""
    made = []
    for n, (start, box) in enumerate(((0, BOXES[1]), (5, BOXES[2]), (9, BOXES[7]))):
        video = folder / f"video{n}"
        video.mkdir()
        for i, frame in enumerate(clip()[start : start + NUM_FRAMES - n]):
            Image.fromarray(frame).save(video / f"{i:05d}.png")
        source = VideoSource(n, str(video), video.name, SourceKind.FRAMES)
        x0, y0, x1, y1 = (float(edge) for edge in box)
        prompt = Prompt(object_id=n, frame_idx=0, box_xyxy=(x0, y0, x1, y1))
        made.append(Attempt(f"attempt{n}", 1, 1, source, (prompt,)))
    return made


def tracked_masks(folder: Path, videos: Sequence[Attempt], in_flight: int) -> list[Any]:
    """Track videos with one worker and return the rows of their masks."""
    spec = WorkerSpec(
        run_id="run",
        out_uri=str(folder),
        tracker=TrackerSpec(
            "samurai",
            checkpoint=str(reference.small_checkpoint()),
            device="cpu",
            image_size=128,
        ),
        spool_dir=str(folder / "spool"),
        videos_in_flight=in_flight,
    )
    worker = TrackingWorker(spec)
    worker.setup()
    try:
        with ThreadPoolExecutor(in_flight) as threads:
            results = list(threads.map(worker.process, videos))
    finally:
        worker.destroy()
    rows = []
    for result in results:
        assert isinstance(result, Proposal), result
        (part,) = [p for p in result.parts if p.table == "masks"]
        table = pq.read_table(folder / part.key)
        kept = ["video_key", "frame_idx", "object_id", "score", "rle_counts"]
        rows.append(table.select(kept).sort_by([("frame_idx", "ascending")]).to_pylist())
    return rows


def test_videos_in_flight_give_the_masks_of_a_single_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "videos").mkdir()
    videos = attempts(tmp_path / "videos")
    sizes: list[int] = []
    step_many = EngineLoader.step_many

    def counted(self: EngineLoader, steps: Any, **more: Any) -> Any:
        sizes.append(len(steps))
        return step_many(self, steps, **more)

    monkeypatch.setattr(EngineLoader, "step_many", counted)
    monkeypatch.setattr(stepping, "_PATIENCE", 100)  # or a busy machine would let them miss
    alone = tracked_masks(tmp_path / "one", videos, 1)
    assert set(sizes) == {1}
    assert all(alone)
    assert tracked_masks(tmp_path / "three", videos, 3) == alone
    assert max(sizes) > 1


class _Fragile(FakeLoader):
    """A tracker that cannot step two sessions together."""

    def _step_many(self, begun: Any) -> Any:
        if len(begun) > 1:
            raise RuntimeError("an illegal memory access was encountered")
        return super()._step_many(begun)


def test_a_batch_that_fails_is_tried_again_one_at_a_time() -> None:
    loader = _Fragile(TrackingConfig("fake"))
    loader.load()
    stepper = Stepper(loader)
    frame = clip()[0]
    met = threading.Barrier(2)

    def outcome(_: int) -> list[str]:
        seen = []
        with stepper.member():
            for _ in range(2):
                met.wait(30)
                with stepper.alone():
                    session = loader.open_session(*frame.shape[:2])
                    session.prompt(0, 1, box_xyxy=BOXES[1])
                try:
                    seen.append(str(stepper.step(session, frame, 0)[0].frame_idx))
                except TransientError as error:
                    seen.append(str(error))
        return seen

    stepper._patience_s = 30
    with ThreadPoolExecutor(2) as threads:
        outcomes = list(threads.map(outcome, range(2)))
    for first, second in outcomes:
        assert "2 videos that were stepped together failed with RuntimeError" in first
        assert second == "0"


# -- arithmetic ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_keys", "dtype", "tolerance"),
    [(900, "float32", 1e-5), (9000, "float32", 1e-5), (9000, "bfloat16", 3e-2)],
)
def test_attention_in_blocks_is_attention(num_keys: int, dtype: str, tolerance: float) -> None:
    import torch
    import torch.nn.functional as F  # noqa: N812

    from workers.engine.products import attend

    torch.manual_seed(0)
    queries, keys = 2 * torch.randn(2, 600, 32), torch.randn(2, num_keys, 32)
    values = torch.randn(2, num_keys, 8)
    expected = F.scaled_dot_product_attention(queries, keys, values)
    with torch.inference_mode():
        given = [one.to(getattr(torch, dtype)) for one in (queries, keys, values)]
        got = attend(*given).float()
    assert float((got - expected).abs().max()) < tolerance
    assert float(expected.abs().max()) > 0.3


@pytest.mark.parametrize(
    ("settings", "overlap"),
    [({"options": {"fast_float32": True}}, 0.999), ({"dtype": "bfloat16"}, 0.99)],
)
def test_faster_arithmetic_gives_the_same_masks(settings: dict[str, Any], overlap: float) -> None:
    config = {"device": "cpu", "image_size": 128, "options": {}, **settings}
    checkpoint = str(reference.seeing_checkpoint())
    made = create_tracking_loader(
        "sam2", TrackingConfig("sam2", checkpoint_path=checkpoint, **config)
    )
    made.load()
    plain = create_tracking_loader(
        "sam2",
        TrackingConfig("sam2", checkpoint_path=checkpoint, device="cpu", image_size=128),
    )
    plain.load()
    ious = []
    for results in zip(*(run_of(loader) for loader in (made, plain)), strict=True):
        got, expected = (frame.masks[0].mask > 0 for frame in results)
        ious.append((got & expected).sum() / (got | expected).sum())
    print(settings, np.round(ious, 4))
    assert np.mean(ious) >= overlap


def run_of(loader: Any) -> list[TrackingFrame]:
    with opened(loader, {1: {0: BOXES[1]}}) as session:
        return stepped(session, clip()[:NUM_FRAMES])
