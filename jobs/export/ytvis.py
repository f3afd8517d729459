"""YouTube-VIS: an entry per object, with a list of its masks over the frames of its video.

The format is that of Yang et al., "Video Instance Segmentation" (ICCV 2019), as its evaluation
server and TrackEval read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jobs.export.coco import INFO, boxes, rles
from jobs.export.json_file import JsonLists
from jobs.export.naming import Classes, picture_name
from jobs.export.selection import SelectedVideo
from jobs.export.tally import Tally

RESULT = ("video_id", "category_id", "score", "segmentations")
"""Members of a prediction."""


def write_ytvis(
    path: Path,
    videos: Iterable[SelectedVideo],
    classes: Classes,
    tally: Tally,
    *,
    results: bool = False,
) -> None:
    """Write a YouTube-VIS file.

    Parameters
    ----------
    path : Path
        The file; it needs as much room again beside it while it is written.
    videos : iterable of SelectedVideo
        What to write.
    classes : Classes
        Numbers of the categories.
    tally : Tally
        Counts what was written.
    results : bool
        Write what an evaluation takes as predictions, else what it takes as the truth.
    """
    num_annotations = 0
    with JsonLists(path.parent, ("videos", "annotations")) as lists:
        for video in videos:
            tracks = _tracks(video, classes, uncompressed=not results)
            if results:
                lists.extend("annotations", ({k: track[k] for k in RESULT} for track in tracks))
            else:
                lists.extend("videos", [_video(video)])
                numbered = enumerate(tracks, num_annotations + 1)
                lists.extend("annotations", ({"id": n} | track for n, track in numbered))
                num_annotations += len(video.objects())
            tally.add(len(video.frame_idx), len(video.masks))
        if results:
            lists.write_list(path, "annotations")
        else:
            lists.write(path, {"info": INFO, "licenses": [], "categories": classes.listed()})


def _video(selected: SelectedVideo) -> dict[str, Any]:
    frames = selected.frame_idx.tolist()
    return {
        "id": selected.number,
        "width": selected.video.width,
        "height": selected.video.height,
        "length": len(frames),
        "file_names": [picture_name(selected.sequence, frame_idx) for frame_idx in frames],
    }


def _tracks(
    selected: SelectedVideo, classes: Classes, *, uncompressed: bool
) -> Iterator[dict[str, Any]]:
    """Yield the objects of a video; one object's lists are in memory at a time."""
    length = len(selected.frame_idx)
    ids = selected.masks["object_id"].to_numpy()
    positions = selected.positions()
    for object_id, category_id in selected.objects().items():
        rows = np.flatnonzero(ids == object_id)
        masks = selected.masks.take(rows)
        at = positions[rows].tolist()
        yield {
            "video_id": selected.number,
            "category_id": classes.number(category_id),
            "iscrowd": 0,
            "width": selected.video.width,
            "height": selected.video.height,
            "length": length,
            "segmentations": _spread(at, rles(masks, uncompressed=uncompressed), length),
            "bboxes": _spread(at, boxes(masks), length),
            "areas": _spread(at, masks["area"].to_pylist(), length),
            "object_id": object_id,
            "score": round(float(masks["score"].to_numpy().mean(dtype=np.float64)), 6),
        }


def _spread(positions: list[int], values: Iterable[Any], length: int) -> list[Any]:
    """Return a list with the values at their positions and None everywhere else."""
    spread: list[Any] = [None] * length
    for at, value in zip(positions, values, strict=True):
        spread[at] = value
    return spread
