"""Runs whose masks are chosen by the test, and ground truth for them.

The tables are written by a real run with the fake tracker, which is shown every mask as a prompt on
its own frame and throws it out of the picture on the next, so what is not shown is absent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jobs import driver
from jobs.config import RunConfig
from jobs.progress import SilentReporter
from jobs.threads import ThreadPool
from tests.media import write_frames, write_video
from workers import rle

Labels = NDArray[np.uint8]
"""Object ids per pixel, shape (H, W); 0 is background, 255 void."""
VOID = 255
FAR_PX = 10_000


def write_videos(folder: Path, videos: Mapping[str, Sequence[Labels]]) -> Path:
    """Write a video for each sequence of labels; a name without ending is a folder of frames."""
    for name, labels in videos.items():
        height, width = labels[0].shape
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        size: dict[str, Any] = {"num_frames": len(labels), "width": width, "height": height}
        if path.suffix:
            write_video(path, **size)
        else:
            write_frames(path, **size)
    return folder


def write_prompts(path: Path, videos: Mapping[str, Sequence[Labels]]) -> None:
    """Write a prompt for every mask."""
    rows = [
        {
            "video": name,
            "frame_idx": frame_idx,
            "object_id": int(object_id),
            "mask_rle": {
                "size": list(labels.shape),
                "counts": rle.encode(labels == object_id).decode(),
            },
        }
        for name, sequence in videos.items()
        for frame_idx, labels in enumerate(sequence)
        for object_id in np.unique(labels)
        if 0 < object_id < VOID
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def track(corpus: Path, out: Path, *, stride: int = 1, **config: Any) -> Path:
    """Run in this process; return the output."""
    listed = {"paths": (str(corpus),), "stride": stride}
    given = {"corpus": listed, "out": {"uri": str(out)}} | config
    summary = driver.run(
        RunConfig.model_validate(given),
        reporter=SilentReporter(),
        pool_factory=lambda _, spec: ThreadPool(spec, 2),
    )
    assert summary.exit_code == 0, summary
    return out


def track_masks(
    folder: Path,
    found: Mapping[str, Sequence[Labels]],
    corpus: Path | None = None,
    *,
    stride: int = 1,
) -> Path:
    """Make a run with exactly these masks and return its output.

    Parameters
    ----------
    folder : Path
        New folder for all of it.
    found : Mapping of str to sequence of Labels
        Per video, the object ids on every frame.
    corpus : Path, optional
        Where the videos already are.
    stride : int
        Every how many frames one is tracked.
    """
    folder.mkdir(parents=True)
    prompts: dict[str, Any] = {"allow_unprompted": True}
    if any(labels.any() for sequence in found.values() for labels in sequence):
        prompts["file"] = str(folder / "prompts.jsonl")
        write_prompts(folder / "prompts.jsonl", found)
    return track(
        corpus or write_videos(folder / "corpus", found),
        folder / "out",
        tracker={"name": "fake", "options": {"shift_x": FAR_PX}},
        stride=stride,
        prompts=prompts,
    )


def write_truth(folder: Path, name: str, labels: Mapping[int, Labels] | Sequence[Labels]) -> Path:
    """Write pictures of object ids, of all frames or of those given; return the root."""
    frames = dict(labels if isinstance(labels, Mapping) else enumerate(labels))
    (folder / name).mkdir(parents=True, exist_ok=True)
    for frame_idx, picture in frames.items():
        Image.fromarray(picture).save(folder / name / f"{frame_idx:05d}.png")
    return folder


def moving_disks(
    num_frames: int, num_objects: int = 2, size: tuple[int, int] = (72, 128), seed: int = 0
) -> list[Labels]:
    """Return object ids of disks that wander through a picture; those with larger ids in front."""
    rng = np.random.default_rng(seed)
    height, width = size
    y, x = np.ogrid[:height, :width]
    centres = rng.uniform((12, 12), (height - 12, width - 12), (num_objects, 2))
    speeds = rng.uniform(-3, 3, (num_objects, 2))
    sequence = []
    for frame in range(num_frames):
        labels = np.zeros(size, np.uint8)
        for index, (cy, cx) in enumerate(centres + frame * speeds):
            labels[(y - cy) ** 2 + (x - cx) ** 2 <= (8 + 2 * index) ** 2] = index + 1
        sequence.append(labels)
    return sequence
