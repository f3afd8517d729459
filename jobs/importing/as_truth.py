"""What an import has read, in the layout of ground truth that `jobs.ground_truth` defines.

Pictures of object ids where they can hold what was read, else masklets: masks that overlap, ids
above 254, and void before the first object, which alone would be taken for the object.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.corpus import VIDEO_SUFFIXES
from jobs.export.destination import Folder
from jobs.ground_truth import MASK_FOLDERS, MASKLETS_ENDING, PLAIN_BOXES
from jobs.importing.annotations import Annotations, ReadMask, ReadVideo
from workers import rle
from workers.errors import ConfigError
from workers.prompts.folder import ENDING, VOID

ACCEPTS = re.compile(rf".+/\d{{5,}}{re.escape(ENDING)}|.+{re.escape(MASKLETS_ENDING)}")
"""Keys that are written; a folder with any other is somebody else's, and not replaced."""


def write_truth(annotations: Annotations, folder: Folder) -> None:
    """Write ground truth.

    Parameters
    ----------
    annotations : Annotations
        What was read.
    folder : Folder
        Where it goes.

    Raises
    ------
    ConfigError
        The name of a video means something else in this layout.

    Notes
    -----
    Memory holds one picture, or the run lengths of one video of masklets.
    """
    for video in annotations.videos():
        name = _sequence_name(video, annotations)
        if _fits_pictures(annotations, video) and PurePosixPath(name).name not in MASK_FOLDERS:
            for frame_idx, masks, void in annotations.frames(video):
                key = f"{name}/{frame_idx:05d}{ENDING}"
                folder.write(key, _png(_picture(video, masks, void)))
            continue
        key = f"{name}{MASKLETS_ENDING}"
        above = [str(parent) for parent in PurePosixPath(name).parents][:-1]
        if PurePosixPath(key).name == PLAIN_BOXES or any(map(annotations.names_with, above)):
            raise ConfigError(
                f"the ground truth of {video.name} would be {key}, which has another meaning "
                f"there: rename that video in the source"
            )
        folder.write(key, _masklets(annotations, video))


def _sequence_name(video: ReadVideo, annotations: Annotations) -> str:
    """Return a video's name without its extension, unless that would be another's, too."""
    path = PurePosixPath(video.name)
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        return video.name
    stem = str(path.with_suffix(""))
    rivals = [
        name
        for name in annotations.names_with(stem)
        if name == stem or PurePosixPath(name).suffix.lower() in VIDEO_SUFFIXES
    ]
    return stem if rivals == [video.name] else video.name


def _fits_pictures(annotations: Annotations, video: ReadVideo) -> bool:
    """Tell whether pictures of object ids can hold what is known about a video."""
    from pycocotools import mask as coco

    if any(object_id >= VOID for object_id in annotations.object_ids(video)):
        return False
    size = [video.height, video.width]
    has_object = False
    for _, masks, void in annotations.frames(video):
        has_object |= bool(masks)
        if void is not None and not has_object:
            return False
        layers = [{"size": size, "counts": mask.counts} for mask in masks]
        if void is not None:
            layers.append({"size": size, "counts": void})
        if len(layers) > 1 and coco.area(coco.merge(layers)) < coco.area(layers).sum():
            return False
    return True


def _picture(video: ReadVideo, masks: Sequence[ReadMask], void: bytes | None) -> NDArray[np.uint8]:
    """Return the object id of every pixel, shape (H, W)."""
    values = np.zeros((video.height, video.width), np.uint8)
    for mask in masks:
        values[rle.decode(mask.counts, *values.shape) != 0] = mask.object_id
    if void is not None:
        values[rle.decode(void, *values.shape) != 0] = VOID
    return values


def _png(values: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def _masklets(annotations: Annotations, video: ReadVideo) -> bytes:
    ids = annotations.object_ids(video)
    size = [video.height, video.width]

    def entry(counts: bytes | None) -> dict[str, Any] | None:
        return None if counts is None else {"size": size, "counts": counts.decode("ascii")}

    content: dict[str, Any] = {
        "video_id": video.name,
        "video_height": video.height,
        "video_width": video.width,
        "masklet_id": ids,
        "frame_idx": [],
        "masklet": [],
        "void": [],
    }
    for frame_idx, masks, void in annotations.frames(video):
        by_id = {mask.object_id: mask.counts for mask in masks}
        content["frame_idx"].append(frame_idx)
        content["masklet"].append([entry(by_id.get(object_id)) for object_id in ids])
        content["void"].append(entry(void))
    if not any(content["void"]):
        del content["void"]
    return json.dumps(content).encode()
