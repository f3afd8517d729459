"""MOTS: a line per mask, and no pixel in two masks of a frame.

The format is that of Voigtlaender et al., "MOTS: Multi-Object Tracking and Segmentation" (CVPR
2019), with frames counted from 1 as the MOTS Challenge does; TrackEval reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from jobs.export.naming import PICTURE_SUFFIX, Classes
from jobs.export.overlap import front_to_back, without_overlap
from jobs.export.selection import SelectedVideo
from jobs.export.tally import RefusedVideoError, Tally
from workers.errors import ConfigError

ACCEPTS = re.compile(r"[^/]+\.txt|[^/]+/gt/gt\.txt|[^/]+/seqinfo\.ini")
CLASSES = {"car": 1, "pedestrian": 2, "person": 2}
MAX_OBJECTS = 999


def last_key(selected: SelectedVideo, *, results: bool) -> str:
    """Return the file of a video that is written last."""
    return f"{selected.sequence}.txt" if results else f"{selected.sequence}/gt/gt.txt"


def mots_files(
    selected: SelectedVideo, classes: Classes, tally: Tally, *, results: bool = False
) -> Iterator[tuple[str, bytes]]:
    """Yield the files of a video.

    Parameters
    ----------
    selected : SelectedVideo
        The video.
    classes : Classes
        Numbers of the categories.
    tally : Tally
        Counts masks that lose pixels and videos whose objects have other ids.
    results : bool
        The layout of a tracker's results, else that of the ground truth.

    Yields
    ------
    key : str
        Path below the destination.
    data : bytes
        The file.

    Raises
    ------
    ConfigError
        An object has a class that MOTS does not know.
    RefusedVideoError
        There are more objects than instance numbers.
    """
    lines = _lines(selected, classes, tally)
    if not results:
        yield f"{selected.sequence}/seqinfo.ini", _sequence_file(selected)
    yield last_key(selected, results=results), "".join(lines).encode("ascii")


def _lines(selected: SelectedVideo, classes: Classes, tally: Tally) -> list[str]:
    objects = selected.objects()
    instances = _instances(selected, list(objects), tally)
    numbers = {}
    for object_id, category_id in objects.items():
        number = _class_number(classes, category_id)
        numbers[object_id] = (number * 1000 + instances[object_id], number)
    masks = selected.masks
    size = (selected.video.height, selected.video.width)
    ids, scores = masks["object_id"].to_numpy(), masks["score"].to_numpy()
    counts = masks["rle_counts"].to_pylist()
    boxes = np.stack([masks[f"bbox_{side}"].to_numpy() for side in "xywh"], axis=1)
    starts = np.searchsorted(selected.positions(), np.arange(len(selected.frame_idx) + 1)).tolist()
    lines = []
    for at, frame_idx in enumerate(selected.frame_idx.tolist()):
        begin, end = starts[at], starts[at + 1]
        own = counts[begin:end]
        if end - begin > 1:
            order = front_to_back(ids[begin:end], scores[begin:end])
            changed = without_overlap(own, boxes[begin:end], order, size)
            for position, kept in changed.items():
                own[position] = kept
            num_covered = sum(not kept for kept in changed.values())
            tally.num_covered += num_covered
            tally.num_cut += len(changed) - num_covered
        rows = [
            (*numbers[object_id], kept.decode("ascii"))
            for object_id, kept in zip(ids[begin:end].tolist(), own, strict=True)
            if kept
        ]
        lines += [
            f"{frame_idx + 1} {identity} {number} {size[0]} {size[1]} {text}\n"
            for identity, number, text in sorted(rows)
        ]
    return lines


def _class_number(classes: Classes, category_id: int | None) -> int:
    try:
        return classes.number(category_id)
    except KeyError:
        raise unknown_class(classes, [category_id]) from None


def unknown_class(classes: Classes, category_ids: list[int | None]) -> ConfigError:
    """Return the refusal of objects of classes that MOTS does not know."""
    names = sorted({classes.name(category_id) for category_id in category_ids})
    return ConfigError(
        f"MOTS knows cars and pedestrians, and these objects are of other classes: "
        f"{', '.join(names)} (object is one without a category); give each a class with --category "
        f"{names[0]}=3, or leave them out with --where \"category IN ('car', 'person')\""
    )


def _instances(selected: SelectedVideo, ids: list[int], tally: Tally) -> dict[int, int]:
    """Return the instance of every object: its id where all ids fit, else its rank."""
    if len(ids) > MAX_OBJECTS:
        raise RefusedVideoError(
            f"it has {len(ids):,} objects and MOTS numbers {MAX_OBJECTS}; take fewer with "
            "--min-score or --where, or export to another format"
        )
    if not ids or max(ids) <= MAX_OBJECTS:
        return {object_id: object_id for object_id in ids}
    tally.renumber(selected.video.name)
    return {object_id: rank for rank, object_id in enumerate(ids, 1)}


def _sequence_file(selected: SelectedVideo) -> bytes:
    video = selected.video
    # Empty for a video without a tracked frame.
    length = video.row["end_frame"] or 0
    rows = {
        "name": selected.sequence,
        "imDir": "img1",
        "frameRate": video.row["fps"] or 0,
        "seqLength": length,
        "imWidth": video.width,
        "imHeight": video.height,
        "imExt": PICTURE_SUFFIX,
    }
    text = "".join(f"{key}={value}\n" for key, value in rows.items())
    return f"[Sequence]\n{text}".encode()
