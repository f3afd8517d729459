"""One small real run with all that formats differ in, and what its tables say in plain words.

Two videos of different sizes and lengths; objects that overlap, that come late, that leave the
picture, that come back, and one that is never seen again; objects of two categories and scores
below 1. Nothing of the project's reader or exporters is used to look at it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco

from jobs import driver
from jobs.config import RunConfig
from jobs.progress import SilentReporter
from jobs.threads import ThreadPool
from tests.datasets import read_table
from tests.media import write_video

Mask = NDArray[np.uint8]

SIZES = {"street.mp4": (96, 64, 14), "park/dogs.mkv": (64, 48, 9)}
"""Width, height and number of frames by name."""
SEQUENCES = {"street.mp4": "street", "park/dogs.mkv": "park__dogs"}
PROMPTS: tuple[dict[str, Any], ...] = (
    {"video": "street.mp4", "frame_idx": 0, "object_id": 1, "box_xyxy": [10, 10, 40, 40]},
    # Overlaps 1, is cut off more and more on the right, and is gone at the end.
    {"video": "street.mp4", "frame_idx": 0, "object_id": 2, "box_xyxy": [30, 20, 90, 50]},
    # Comes late, and lies within 1: nothing of it is left where one pixel has one object.
    {"video": "street.mp4", "frame_idx": 3, "object_id": 7, "box_xyxy": [40, 15, 50, 25]},
    # Leaves and is shown again.
    {"video": "street.mp4", "frame_idx": 0, "object_id": 300, "box_xyxy": [76, 2, 94, 8]},
    {"video": "street.mp4", "frame_idx": 10, "object_id": 300, "box_xyxy": [5, 50, 20, 60]},
    {"video": "park/dogs.mkv", "frame_idx": 2, "object_id": 5, "box_xyxy": [4, 4, 20, 30]},
    {"video": "park/dogs.mkv", "frame_idx": 2, "object_id": 9, "box_xyxy": [10, 20, 60, 40]},
)
LABELS = {1: "person", 2: "car", 7: "car", 300: "person", 5: "person", 9: "car"}
SHIFT_X = 6


@dataclass(frozen=True, slots=True)
class Exported:
    """A run's output.

    Attributes
    ----------
    out : Path
        The output.
    masks : dict of (name, frame_idx, object_id) to ndarray of uint8, shape (H, W)
        Every mask, decoded.
    rows : dict of the same to dict
        The rows of `masks`.
    frames : dict of name to list of int
        Every tracked frame.
    """

    out: Path
    masks: dict[tuple[str, int, int], Mask]
    rows: dict[tuple[str, int, int], dict[str, Any]]
    frames: dict[str, list[int]]


def make_run(folder: Path, **tracker_options: Any) -> Exported:
    """Track the videos and read the tables."""
    corpus = folder / "corpus"
    for name, (width, height, num_frames) in SIZES.items():
        (corpus / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(corpus / name, num_frames=num_frames, width=width, height=height, fps=24)
    rows = [prompt | {"label": LABELS[prompt["object_id"]]} for prompt in PROMPTS]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, rows)))
    config = RunConfig.model_validate(
        {
            "corpus": {"paths": (str(corpus),)},
            "out": {"uri": str(folder / "out")},
            "tracker": {"name": "fake", "options": {"shift_x": SHIFT_X} | tracker_options},
            "prompts": {"file": str(prompts)},
        }
    )
    summary = driver.run(
        config,
        reporter=SilentReporter(),
        pool_factory=lambda _, spec: ThreadPool(spec, 2),
    )
    assert summary.exit_code == 0
    return read_run(folder / "out")


def read_run(out: Path) -> Exported:
    """Read the tables of an output."""
    names = {row["video_key"]: row["name"] for row in read_table(out, "videos").to_pylist()}
    masks, rows = {}, {}
    for row in read_table(out, "masks").to_pylist():
        key = (names[row["video_key"]], row["frame_idx"], row["object_id"])
        rows[key] = row
        masks[key] = decode([row["rle_h"], row["rle_w"]], row["rle_counts"])
    frames: dict[str, list[int]] = {name: [] for name in names.values()}
    for row in read_table(out, "frames").to_pylist():
        frames[names[row["video_key"]]].append(row["frame_idx"])
    return Exported(out, masks, rows, frames)


def decode(size: list[int], counts: Any) -> Mask:
    """Decode an RLE as pycocotools does, whether its counts are text or a list."""
    if isinstance(counts, list):
        coded = coco.frPyObjects({"size": size, "counts": counts}, *size)
    else:
        coded = {"size": size, "counts": counts}
    mask: Mask = coco.decode(coded)
    return mask


def one_object_per_pixel(run: Exported) -> dict[tuple[str, int, int], Mask]:
    """Return the masks with every pixel given to the highest score, then to the lowest id."""
    left: dict[tuple[str, int, int], Mask] = {}
    for name, frames in run.frames.items():
        for frame_idx in frames:
            here = [key for key in run.masks if key[:2] == (name, frame_idx)]
            taken: Mask | None = None
            for key in sorted(here, key=lambda key: (-run.rows[key]["score"], key[2])):
                mask = run.masks[key]
                taken = np.zeros_like(mask) if taken is None else taken
                own = mask & (1 - taken)
                taken |= mask
                if own.any():
                    left[key] = own
    return left


def assert_same_masks(
    found: dict[tuple[str, int, int], Mask], expected: dict[tuple[str, int, int], Mask]
) -> None:
    """Fail unless the masks are the same objects on the same frames with the same pixels."""
    assert found.keys() == expected.keys()
    for key, mask in found.items():
        np.testing.assert_array_equal(mask, expected[key], err_msg=str(key))
