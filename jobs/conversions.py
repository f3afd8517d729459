"""A dataset as the values of other Python libraries: supervision's detections, FiftyOne's layout.

Masklets, the third way to hold the masks of a video, need no other library: `Dataset.masklets`.

    >>> from jobs.dataset import open_dataset
    >>> dataset = open_dataset("s3://bucket/masks")                          # doctest: +SKIP
    >>> for frame, detections in supervision_frames(dataset, dataset.video("street")):
    ...     print(frame.frame_idx, detections.tracker_id)                    # doctest: +SKIP
"""

from __future__ import annotations

import base64
import io
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jobs.dataset import Dataset, Frame
from jobs.export.destination import new_folder
from jobs.export.exporter import dataset_version
from jobs.export.json_file import to_json
from jobs.export.naming import NAMELESS
from jobs.export.selection import SelectedVideo, Selection, select
from jobs.export.tally import Tally
from workers import rle
from workers.errors import ConfigError
from workers.messages import StoreOptions

if TYPE_CHECKING:
    import supervision as sv

    from jobs.dataset import Video

NO_CLASS = -1
"""Class id of objects without a category: supervision has one number for every detection."""
_FIFTYONE_FILES = re.compile(r"manifest\.json|labels/[^/]+\.json")


def to_supervision(frame: Frame, categories: Mapping[int, str] | None = None) -> sv.Detections:
    """Return the masks of one frame as supervision has them.

    Parameters
    ----------
    frame : Frame
        The frame.
    categories : Mapping of int to str, optional
        Name per category id, `Dataset.categories`.

    Returns
    -------
    supervision.Detections
        By ascending object id: `xyxy` float32 (K, 4) in pixels, half-open; `mask` bool (K, H, W),
        None for a frame without masks; `confidence` float32 (K,), 0..1; `class_id` int (K,), -1
        for objects without a category; `tracker_id` int (K,), the object id. `data` has
        `class_name` where names were given, `metadata` has `frame_idx` and `pts_us`.
    """
    import supervision as sv

    masks = frame.masks
    boxes = np.array([mask.bbox_xywh for mask in masks], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    ids = [NO_CLASS if mask.category_id is None else mask.category_id for mask in masks]
    data: dict[str, Any] = {}
    if categories is not None:
        data["class_name"] = np.array([categories.get(number, NAMELESS) for number in ids], str)
    return sv.Detections(
        xyxy=boxes,
        mask=np.stack([mask.decode().view(bool) for mask in masks]) if masks else None,
        confidence=np.array([mask.score for mask in masks], np.float32),
        class_id=np.array(ids, np.int64),
        tracker_id=np.array([mask.object_id for mask in masks], np.int64),
        data=data,
        metadata={"frame_idx": frame.frame_idx, "pts_us": frame.pts_us},
    )


def supervision_frames(dataset: Dataset, video: Video) -> Iterator[tuple[Frame, sv.Detections]]:
    """Yield the frames of a video with their detections, in order of time.

    Parameters
    ----------
    dataset : Dataset
        The dataset.
    video : Video
        One of its videos.

    Yields
    ------
    frame : Frame
        The frame.
    detections : supervision.Detections
        See `to_supervision`.
    """
    categories = dataset.categories
    for frame in dataset.frames(video):
        yield frame, to_supervision(frame, categories)


def write_fiftyone(
    dataset: Dataset,
    dest: str,
    selection: Selection | None = None,
    *,
    overwrite: bool = False,
    store_options: StoreOptions | None = None,
) -> Tally:
    """Write a folder that FiftyOne imports as a `FiftyOneVideoLabelsDataset`.

    Parameters
    ----------
    dataset : Dataset
        The dataset.
    dest : str
        Path or URL of the folder.
    selection : Selection, optional
        What to take; everything by default.
    overwrite : bool
        Replace such a folder that is there.
    store_options : StoreOptions, optional
        How to reach it.

    Returns
    -------
    Tally
        What was written.

    Raises
    ------
    ConfigError
        The destination exists, or nothing is selected.
    StoreError
        A store failed, or the destination is full.

    Notes
    -----
    The layout is ``manifest.json`` with an entry per video and ``labels/<sequence>.json`` in ETA's
    VideoLabels format: frames counted from 1, boxes relative to the picture, a mask within its
    box, the object id as `index`. Videos are not copied. The manifest names those on this machine
    where they lie, and others as ``data/<sequence>`` with their extension, where to put them.
    """
    selection = selection or Selection()
    identity = {
        "dataset": dataset.uri,
        "version": dataset_version(dataset),
        "format": "fiftyone",
        "selection": repr(selection),
    }
    categories = dataset.categories
    tally = Tally()
    index = []
    with new_folder(
        dest, identity, _FIFTYONE_FILES, overwrite=overwrite, options=store_options
    ) as folder:
        for video in select(dataset, selection):
            labels = f"labels/{video.sequence}.json"
            index.append({"data": _media(video), "labels": labels})
            if folder.has(labels):
                tally.num_continued += 1
            else:
                folder.write(labels, to_json(_video_labels(video, categories)).encode())
            tally.add(len(video.frame_idx), len(video.masks))
        if not index:
            raise ConfigError(f"no video of {dataset.uri} is selected: there is nothing to write")
        manifest = {"type": "eta.core.datasets.LabeledVideoDataset", "index": index}
        folder.write("manifest.json", to_json(manifest).encode())
    return tally


def _media(selected: SelectedVideo) -> str:
    """Return where FiftyOne finds a video, joined to its folder as paths are joined."""
    uri = selected.video.uri
    if "://" not in uri and Path(uri).is_file():
        return uri
    return f"data/{selected.sequence}{PurePosixPath(selected.video.name).suffix}"


def _video_labels(selected: SelectedVideo, categories: Mapping[int, str]) -> dict[str, Any]:
    frames: dict[str, Any] = {
        str(frame_idx + 1): {"frame_number": frame_idx + 1, "objects": {"objects": []}}
        for frame_idx in selected.frame_idx.tolist()
    }
    for row in selected.masks.to_pylist():
        objects = frames[str(row["frame_idx"] + 1)]["objects"]["objects"]
        objects.append(_detected_object(row, categories))
    return {"filename": _media(selected), "frames": frames}


def _detected_object(row: Mapping[str, Any], categories: Mapping[int, str]) -> dict[str, Any]:
    height, width = row["rle_h"], row["rle_w"]
    left, top, w, h = (int(row[f"bbox_{side}"]) for side in "xywh")
    mask = rle.decode(row["rle_counts"], height, width)[top : top + h, left : left + w]
    return {
        "type": "eta.core.objects.DetectedObject",
        "label": categories.get(row["category_id"], NAMELESS),
        "index": row["object_id"],
        "confidence": row["score"],
        "bounding_box": {
            "top_left": {"x": left / width, "y": top / height},
            "bottom_right": {"x": (left + w) / width, "y": (top + h) / height},
        },
        "mask": _packed(mask.astype(bool)),
    }


def _packed(array: NDArray[np.bool_]) -> str:
    """Return an array as ETA keeps it in JSON: a NumPy file, zlib, base64."""
    out = io.BytesIO()
    np.save(out, np.ascontiguousarray(array), allow_pickle=False)
    return base64.b64encode(zlib.compress(out.getvalue())).decode("ascii")
