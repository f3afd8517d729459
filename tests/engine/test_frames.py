"""Real weights on real pictures: the image half of SAM 2 segments what a box shows.

* Boxes from the ground truth of DAVIS give the object, as well as by the official image predictor.
* A checkpoint without memory shows prompted frames; what is not prompted is occluded, and to track
  with it is refused.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.media import shared_dir
from workers.trackers.base import TrackingConfig
from workers.trackers.registry import create_tracking_loader
from workers.trackers.sam2 import EngineLoader

WEIGHTS = "sam2_hiera_tiny_image_only.fp16.safetensors"
SEQUENCES = os.environ.get("MASKMILL_SEQUENCES", "dog blackswan").split()


def checkpoint() -> Path:
    path = shared_dir() / "weights" / WEIGHTS
    if not path.is_file():
        if os.environ.get("CI"):
            pytest.fail(f"{WEIGHTS} is missing")
        pytest.skip(f"no weights {WEIGHTS} here")
    if not os.environ.get("CI"):
        pytest.importorskip("sam2")
    return path


@functools.cache
def loader() -> EngineLoader:
    config = TrackingConfig("sam2", device="cpu", checkpoint_path=str(checkpoint()))
    made = create_tracking_loader("sam2", config)
    made.load()
    assert isinstance(made, EngineLoader)
    return made


def first_frame(sequence: str) -> tuple[NDArray[np.uint8], NDArray[np.bool_], list[int]]:
    """Return a sequence's first picture, its mask, and the box around that."""
    folder = shared_dir() / "data" / "davis" / sequence
    (picture_name, *_) = sorted(folder.rglob("*.jpg"))
    (mask_name, *_) = sorted(p for p in folder.rglob("*.png") if "2017" not in str(p))
    mask = np.asarray(Image.open(mask_name).convert("L")) > 0
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
    return np.asarray(Image.open(picture_name).convert("RGB")), mask, box


@functools.cache
def official_predictor() -> Any:
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    from workers.engine.model import load_network

    network, _ = load_network(checkpoint(), 1024)
    return SAM2ImagePredictor(network)


def iou(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_a_box_gives_the_object_as_by_the_official_predictor() -> None:
    overlaps = []
    for sequence in SEQUENCES:
        picture, truth, box = first_frame(sequence)
        with loader().open_session(*truth.shape) as session:
            session.prompt(0, 1, box_xyxy=box)
            (frame,) = session.step(picture)
        predictor = official_predictor()
        predictor.set_image(picture)
        official = predictor.predict(box=np.array(box), multimask_output=False)[0][0] > 0
        overlaps.append(iou(frame.masks[0].mask > 0, truth))
        print(f"{sequence}: IoU {overlaps[-1]:.4f}, official {iou(official, truth):.4f}")
        assert abs(overlaps[-1] - iou(official, truth)) <= 0.005
        assert 0.5 < frame.masks[0].confidence <= 1
    assert np.mean(overlaps) >= 0.80


def test_frames_without_a_prompt_are_occluded_and_tracking_is_refused() -> None:
    config = TrackingConfig(
        "samurai", device="cpu", checkpoint_path=str(checkpoint()), image_size=256
    )
    made = create_tracking_loader("samurai", config)
    made.load()
    assert isinstance(made, EngineLoader)
    assert not made.can_track
    picture, truth, box = first_frame(SEQUENCES[0])
    with made.open_session(*truth.shape) as session:
        for frame_idx in (0, 2):
            session.prompt(frame_idx, 5, box_xyxy=box)
        seen = [session.step(picture)[0] for _ in range(3)]
        with made.restore(session.snapshot()) as restored:
            assert restored.latest() is not None
    assert [frame.occlusions for frame in seen] == [{5: False}, {5: True}, {5: False}]
    np.testing.assert_array_equal(seen[0].masks[0].mask, seen[2].masks[0].mask)
    with pytest.raises(RuntimeError, match="can segment frames, not track"):
        made.track([Image.fromarray(picture)], [truth], [1])
