"""COCO: images and annotations in one file, with videos, frames and tracks beside them.

The format is that of the COCO API (https://cocodataset.org/#format-data); `video_id`, `frame_id`
and `track_id` are named as the tracking datasets built on it do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jobs.export.json_file import JsonLists
from jobs.export.naming import Classes, picture_name
from jobs.export.selection import SelectedVideo
from jobs.export.tally import Tally
from workers import rle

_AT_ONCE = 256
"""Masks whose counts are turned into run lengths together."""
INFO = {"description": "exported by maskmill", "version": "1.0"}


def write_coco(
    path: Path,
    videos: Iterable[SelectedVideo],
    classes: Classes,
    tally: Tally,
    *,
    uncompressed: bool = False,
) -> None:
    """Write a COCO file.

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
    uncompressed : bool
        Write counts as lists of run lengths.
    """
    num_images = num_annotations = num_tracks = 0
    with JsonLists(path.parent, ("videos", "images", "annotations")) as lists:
        for video in videos:
            objects = video.objects()
            tracks = {object_id: num_tracks + at for at, object_id in enumerate(objects, 1)}
            lists.extend("videos", [_video(video)])
            lists.extend("images", _images(video, num_images + 1))
            lists.extend(
                "annotations",
                (
                    annotation | {"id": number, "track_id": tracks[annotation["object_id"]]}
                    for number, annotation in enumerate(
                        _annotations(video, num_images + 1, classes, uncompressed),
                        num_annotations + 1,
                    )
                ),
            )
            num_images += len(video.frame_idx)
            num_annotations += len(video.masks)
            num_tracks += len(objects)
            tally.add(len(video.frame_idx), len(video.masks))
        lists.write(path, {"info": INFO, "licenses": [], "categories": classes.listed()})


def _video(selected: SelectedVideo) -> dict[str, Any]:
    video = selected.video
    return {
        "id": selected.number,
        "name": selected.sequence,
        "width": video.width,
        "height": video.height,
        "file_name": video.name,
        "fps": video.row["fps"],
    }


def _images(selected: SelectedVideo, first_id: int) -> Iterator[dict[str, Any]]:
    frames = zip(selected.frame_idx.tolist(), selected.pts_us.tolist(), strict=True)
    for image_id, (frame_idx, pts_us) in enumerate(frames, first_id):
        yield {
            "id": image_id,
            "file_name": picture_name(selected.sequence, frame_idx),
            "width": selected.video.width,
            "height": selected.video.height,
            "video_id": selected.number,
            "frame_id": frame_idx,
            "pts_us": pts_us,
        }


def _annotations(
    selected: SelectedVideo, first_image: int, classes: Classes, uncompressed: bool
) -> Iterator[dict[str, Any]]:
    masks = selected.masks
    columns = [masks[name].to_pylist() for name in ("object_id", "category_id", "area")]
    rows = zip(
        (selected.positions() + first_image).tolist(),
        *columns,
        shortest(masks["score"].to_numpy()),
        boxes(masks),
        rles(masks, uncompressed=uncompressed),
        strict=True,
    )
    for image_id, object_id, category_id, area, score, box, segmentation in rows:
        yield {
            "id": 0,
            "image_id": image_id,
            "category_id": classes.number(category_id),
            "segmentation": segmentation,
            "area": area,
            "bbox": box,
            "iscrowd": 0,
            "video_id": selected.number,
            "track_id": 0,
            "object_id": object_id,
            "score": score,
        }


def rles(masks: Any, *, uncompressed: bool = False) -> Iterator[dict[str, Any]]:
    """Yield masks as COCO writes them.

    Parameters
    ----------
    masks : pyarrow.Table
        Rows of `masks` of one video.
    uncompressed : bool
        Write counts as lists of run lengths.

    Yields
    ------
    dict
        ``size`` and ``counts``.
    """
    heights, widths = masks["rle_h"].to_pylist(), masks["rle_w"].to_pylist()
    texts: list[bytes] = masks["rle_counts"].to_pylist()
    for begin in range(0, len(texts), _AT_ONCE):
        chunk = slice(begin, begin + _AT_ONCE)
        sizes = list(zip(heights[chunk], widths[chunk], strict=True))
        counts: list[Any] = (
            # The masks of one video have one size.
            [runs.tolist() for runs in rle.run_lengths_of(texts[chunk], *sizes[0])]
            if uncompressed
            else [text.decode("ascii") for text in texts[chunk]]
        )
        for size, value in zip(sizes, counts, strict=True):
            yield {"size": size, "counts": value}


def boxes(masks: Any) -> list[list[float]]:
    """Return the boxes of masks, ``[x, y, width, height]`` in pixels."""
    sides = [masks[f"bbox_{side}"].to_numpy() for side in "xywh"]
    found: list[list[float]] = np.stack(sides, axis=1).astype(np.float64).tolist()
    return found


def shortest(values: Any) -> list[float]:
    """Return float32 values as the shortest numbers that are read back as the same ones.

    Examples
    --------
    >>> shortest(np.array([0.9], np.float32))
    [0.9]
    """
    return [float(text) for text in map(str, values)]
