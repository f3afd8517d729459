"""What an import has read, in the layout of ground truth that `jobs.ground_truth` defines.

Pictures of object ids where they can hold what was read, else masklets: masks that overlap, ids
above 254, and void before the first object, which alone would be taken for the object.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.corpus import VIDEO_SUFFIXES
from jobs.ground_truth import MASKLETS_ENDING, open_ground_truth
from jobs.importing.annotations import Annotations, ReadMask, ReadVideo
from workers import rle
from workers.errors import ConfigError
from workers.prompts.folder import ENDING, VOID

MARKER = ".maskmill-import"
"""File that tells a folder of ours, which may be replaced, from anybody else's."""


def write_truth(annotations: Annotations, folder: Path) -> None:
    """Write ground truth.

    Parameters
    ----------
    annotations : Annotations
        What was read.
    folder : Path
        A folder that is empty or not there yet.

    Raises
    ------
    ConfigError
        The name of a video means something else in this layout.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text("written by maskmill import\n", encoding="utf-8")
    for video in annotations.videos():
        name = _sequence_name(video, annotations)
        if not _write_pictures(annotations, video, folder / name):
            shutil.rmtree(folder / name, ignore_errors=True)
            _write_masklets(annotations, video, folder / f"{name}{MASKLETS_ENDING}")
    # A video named like a folder or file that the layout gives a meaning would be read as that.
    read = open_ground_truth(str(folder)).sequences
    for video in annotations.videos():
        name = _sequence_name(video, annotations)
        if name not in read:
            raise ConfigError(
                f"the name of the video {name} has another meaning in a folder of ground truth: "
                f"rename it in the source"
            )


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


def _write_pictures(annotations: Annotations, video: ReadVideo, folder: Path) -> bool:
    """Write a picture per frame; tell whether pictures can hold this video."""
    if any(object_id >= VOID for object_id in annotations.object_ids(video)):
        return False
    has_object = False
    for frame_idx, masks, void in annotations.frames(video):
        has_object |= bool(masks)
        if void is not None and not has_object:
            return False
        values = _picture(video, masks, void)
        if values is None:
            return False
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{frame_idx:05d}{ENDING}").write_bytes(_png(values))
    return True


def _picture(
    video: ReadVideo, masks: Sequence[ReadMask], void: bytes | None
) -> NDArray[np.uint8] | None:
    """Return the object id of every pixel, shape (H, W); None where two claim one."""
    values = np.zeros((video.height, video.width), np.uint8)
    layers = [(mask.object_id, mask.counts) for mask in masks]
    if void is not None:
        layers.append((VOID, void))
    for value, counts in layers:
        mask = rle.decode(counts, video.height, video.width)
        if (values[mask != 0]).any():
            return None
        values += mask * np.uint8(value)
    return values


def _png(values: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def _write_masklets(annotations: Annotations, video: ReadVideo, path: Path) -> None:
    """Write one JSON file, frame by frame."""
    ids = annotations.object_ids(video)
    size = [video.height, video.width]

    def entry(counts: bytes | None) -> dict[str, Any] | None:
        return None if counts is None else {"size": size, "counts": counts.decode("ascii")}

    head = {
        "video_id": video.name,
        "video_height": video.height,
        "video_width": video.width,
        "masklet_id": ids,
        "frame_idx": [frame_idx for frame_idx, _, _ in annotations.frames(video)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(head)[:-1])
        for key in ("masklet", "void"):
            file.write(f', "{key}": [')
            for number, (_, masks, void) in enumerate(annotations.frames(video)):
                by_id = {mask.object_id: mask.counts for mask in masks}
                row = [entry(by_id.get(i)) for i in ids] if key == "masklet" else entry(void)
                file.write((",\n" if number else "\n") + json.dumps(row))
            file.write("]")
        file.write("}\n")
