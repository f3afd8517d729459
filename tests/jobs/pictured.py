"""A run over videos of every kind, to be drawn and reported on.

It is tracked in this process, by a tracker without vision whose objects sink out of the picture:
at the end they are hidden.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from jobs import driver
from jobs.config import RunConfig
from jobs.progress import SilentReporter
from jobs.threads import ThreadPool
from tests.media import write_frames, write_video

WIDTH, HEIGHT = 384, 256
STREET_MS = [0, 40, 80, 120, 160, 200, 300, 420, 440, 480, 900, 940]
"""Times of the frames of ``street.mp4``, whose rate varies."""
BOXES = {1: (8, 200, 48, 230), 2: (320, 196, 376, 232)}
"""Of the two objects on their first frame; in the two lower corners, away from the frame's index.
They sink by `SINK_PX` per frame and are gone after seven frames or less."""
SINK_PX = 8
LABELS = {1: "кот", 2: "dog"}


def write_corpus(folder: Path) -> None:
    """Write the videos, ``manifest.csv`` and ``prompts.jsonl``."""
    videos = folder / "videos"
    videos.mkdir(parents=True)
    size: dict[str, Any] = {"width": WIDTH, "height": HEIGHT}
    write_video(videos / "street.mp4", num_frames=12, pts_ms=STREET_MS, audio=True, **size)
    # A player turns it clockwise, so that what is seen is WIDTH wide and HEIGHT high again.
    write_video(videos / "turned.mp4", num_frames=4, width=HEIGHT, height=WIDTH, rotation=90)
    write_video(videos / "long.mp4", num_frames=30, **size)
    write_frames(videos / "walk", num_frames=5, suffix=".png", **size)
    (videos / "broken.mp4").write_bytes(b"no video" * 100)
    rows = [
        ("videos/street.mp4", "", "", 1, 0),
        ("videos/turned.mp4", "", "", 1, 0),
        ("videos/long.mp4", 0.4, 0.8, 2, 10),
        ("videos/walk", "", "", 1, 0),
        ("videos/broken.mp4", "", "", 1, 0),
    ]
    with (folder / "manifest.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["video", "start_s", "end_s", "stride"])
        table.writerows(row[:4] for row in rows)
    prompts = [
        {"video": row[0], "frame_idx": row[4], "object_id": i, "label": LABELS[i], "box_xyxy": box}
        for row in rows
        for i, box in BOXES.items()
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))


def track(folder: Path, out: Path, *, sink_px: int = SINK_PX) -> None:
    """Track the corpus of `write_corpus`."""
    config: dict[str, Any] = {
        "corpus": {"manifest": str(folder / "manifest.csv")},
        "out": {"uri": str(out)},
        "tracker": {"name": "fake", "options": {"shift_x": 0, "shift_y": sink_px}},
        "prompts": {"file": str(folder / "prompts.jsonl")},
    }
    summary = driver.run(
        RunConfig.model_validate(config),
        reporter=SilentReporter(),
        pool_factory=lambda _, spec: ThreadPool(spec, 2),
    )
    assert (summary.exit_code, summary.num_committed) == (1, 4), summary.quarantined
