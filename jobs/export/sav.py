"""SA-V: a file per video with the masklets as a table of frames and objects, and its statistics.

The members are those of the training set of Ravi et al., "SAM 2: Segment Anything in Images and
Videos" (2024), as its README describes them. What has no place there is in a member of our own.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.export.coco import rles, shortest
from jobs.export.json_file import to_json
from jobs.export.selection import SelectedVideo
from workers import rle

ACCEPTS = re.compile(r"[^/]+_auto\.json")
OURS = "maskmill"
"""The member for what SA-V has no place for."""
SMALL_PX, MEDIUM_PX = 32**2, 96**2
"""Areas from which on a masklet is medium and large."""


def last_key(selected: SelectedVideo) -> str:
    """Return the file of a video."""
    return f"{selected.sequence}_auto.json"


def sav_file(selected: SelectedVideo, categories: dict[int, str]) -> bytes:
    """Return the file of a video.

    Parameters
    ----------
    selected : SelectedVideo
        The video.
    categories : dict of int to str
        Name per category id.

    Returns
    -------
    bytes
        JSON.
    """
    video = selected.video
    objects = selected.objects()
    ids = np.fromiter(objects, np.int32, len(objects))
    masks = selected.masks
    at = selected.positions()
    column = np.searchsorted(ids, masks["object_id"].to_numpy())
    present = np.zeros((len(selected.frame_idx), len(ids)), bool)
    present[at, column] = True
    areas = np.bincount(column, masks["area"].to_numpy(), len(ids)) / present.sum(axis=0)
    absent = _absent(video.height, video.width)
    masklet = [[absent] * len(ids) for _ in selected.frame_idx]
    score: list[list[float | None]] = [[None] * len(ids) for _ in selected.frame_idx]
    rows = zip(
        at.tolist(), column.tolist(), rles(masks), shortest(masks["score"].to_numpy()), strict=True
    )
    for frame, nth, coded, value in rows:
        masklet[frame][nth] = coded
        score[frame][nth] = value
    resolution = float(video.height * video.width)
    duration_us = video.row["duration_us"]
    content = {
        "video_id": selected.sequence,
        "video_duration": None if duration_us is None else duration_us / 1e6,
        "video_frame_count": float(video.row["frames_decoded"]),
        "video_height": float(video.height),
        "video_width": float(video.width),
        "video_resolution": resolution,
        "video_environment": [],
        "video_split": "",
        "masklet": masklet,
        "masklet_id": ids.tolist(),
        "masklet_size_rel": (areas / resolution).tolist(),
        "masklet_size_abs": areas.tolist(),
        "masklet_size_bucket": [_bucket(area) for area in areas.tolist()],
        "masklet_visibility_changes": _changes(present),
        "masklet_first_appeared_frame": selected.frame_idx[present.argmax(axis=0)].tolist()
        if len(ids)
        else [],
        "masklet_frame_count": [len(selected.frame_idx)] * len(ids),
        "masklet_edited_frame_count": [0] * len(ids),
        "masklet_type": ["auto"] * len(ids),
        "masklet_stability_score": None,
        "masklet_num": len(ids),
        OURS: {
            "name": video.name,
            "frame_idx": selected.frame_idx.tolist(),
            "pts_us": selected.pts_us.tolist(),
            "category": [
                None if category_id is None else categories.get(category_id)
                for category_id in objects.values()
            ],
            "score": score,
        },
    }
    return to_json(content).encode()


def _absent(height: int, width: int) -> dict[str, Any]:
    """Return an object that is not there: the RLE of an empty mask."""
    counts = rle.encode(np.zeros((height, width), np.uint8))
    return {"size": [height, width], "counts": counts.decode("ascii")}


def _bucket(area: float) -> str:
    return "small" if area < SMALL_PX else "medium" if area < MEDIUM_PX else "large"


def _changes(present: NDArray[np.bool_]) -> list[int]:
    """Return how often each object came or went after its first appearance, over the frames."""
    changes = np.abs(np.diff(present.astype(np.int8), axis=0)).sum(axis=0)
    # Coming for the first time is none, unless it was there from the begin.
    late = present.any(axis=0) & ~present[:1].any(axis=0)
    found: list[int] = (changes - late).tolist()
    return found
