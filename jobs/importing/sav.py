"""SA-V: a JSON file per video with the masks of every object on every annotated frame.

The fields are those of the SA-V dataset (Ravi et al., "SAM 2: Segment Anything in Images and
Videos", 2024). What it has no place for, `maskmill export` adds below the key `maskmill`, and a
ground truth of `maskmill import` has `frame_idx` beside the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from jobs.ground_truth import sa_v_step
from jobs.importing.annotations import Annotations
from jobs.importing.json_stream import JsonFile
from jobs.importing.segmentation import read_segmentation, read_size
from jobs.importing.source import Naming, Source
from workers.errors import ConfigError

_FIELDS = (
    "video_id",
    "video_height",
    "video_width",
    "video_frame_count",
    "masklet_id",
    "frame_idx",
    "frame_step",
    "maskmill",
)
_ENDING = re.compile(r"(_manual|_auto)?\.json$")


def read_sav(source: Source, naming: Naming, into: Annotations) -> None:
    """Read SA-V annotations.

    Parameters
    ----------
    source : Source
        A JSON file, or a folder of them, one per video.
    naming : Naming
        What the user says about names and numbers.
    into : Annotations
        Receives what was read.

    Raises
    ------
    ConfigError
        The source is missing, broken or contradicts itself.
    """
    for name in source.files(".json"):
        with source.open_json(name) as file:
            _read_video(file, name, naming, into)


def _read_video(file: JsonFile, name: str, naming: Naming, into: Annotations) -> None:
    place = file.name
    known = file.values(_FIELDS)
    own = known.get("maskmill")
    own = own if isinstance(own, Mapping) else {}
    try:
        size = read_size(known.get("video_height"), known.get("video_width"))
    except ValueError as error:
        raise ConfigError(
            f"{place} is no SA-V annotation ({error}): give the files with masklet, video_height "
            f"and video_width"
        ) from error
    title = own.get("name") or naming.video_of_sequence(
        str(known.get("video_id") or _ENDING.sub("", name))
    )
    video = naming.video_of(str(title), place)
    ids = known.get("masklet_id")
    if ids is not None and (not isinstance(ids, list) or len({str(i) for i in ids}) != len(ids)):
        raise ConfigError(f"masklet_id in {place} is no list of different ids: renumber them")
    labels = own.get("category") or []
    if not isinstance(labels, list) or not all(n is None or isinstance(n, str) for n in labels):
        raise ConfigError(f"category in {place} is no list of names: mend it")
    frame_of = _frame_indices(file, own.get("frame_idx", known.get("frame_idx")), known, naming)
    number = -1
    for number, row in enumerate(file.lists("masklet")):
        ids = list(range(1, len(row) + 1)) if ids is None else ids
        if len(row) != len(ids):
            raise ConfigError(
                f"frame {number} of masklet in {place} has {len(row)} masks for {len(ids)} "
                f"objects: give one per object, null where it is absent"
            )
        frame_idx = frame_of(number)
        into.add_frame(video, frame_idx, size, place)
        for index, (object_id, entry) in enumerate(zip(ids, row, strict=True)):
            where = f"object {object_id} on frame {number} of masklet in {place}"
            counts = _read_mask(entry, size, where)
            if counts is not None:
                label = labels[index] if index < len(labels) else None
                into.add_mask(video, frame_idx, object_id, counts, where, label=label)
    # Of a video without frames there is an empty one.
    if number < 0 and own.get("frame_idx") != []:
        raise ConfigError(f"{place} has no masklet: give the files that SA-V calls annotations")


def _frame_indices(
    file: JsonFile, told: Any, known: Mapping[str, Any], naming: Naming
) -> Callable[[int], int]:
    """Return what gives the frame of each row of masklet."""
    if told is not None:
        if not isinstance(told, list) or not all(isinstance(index, int) for index in told):
            raise ConfigError(f"frame_idx in {file.name} is no list of whole numbers: mend it")

        def frame_of(row: int) -> int:
            if row >= len(told):
                raise ConfigError(
                    f"frame_idx in {file.name} has {len(told)} entries, but masklet more frames: "
                    f"give one per frame"
                )
            return int(told[row])

        return frame_of
    step = naming.frame_step or known.get("frame_step")
    if step is not None and (not isinstance(step, (int, float)) or step < 1 or step % 1):
        raise ConfigError(
            f"frame_step in {file.name} is {step!r}, no whole number from 1 on: mend it"
        )
    total = known.get("video_frame_count")
    if step is None and isinstance(total, (int, float)):
        step = sa_v_step(sum(1 for _ in file.lists("masklet")), total)
    return lambda row: (row - naming.first_frame) * int(step or 1)


def _read_mask(entry: Any, size: tuple[int, int], where: str) -> bytes | None:
    """Return the counts of one mask; None where the object is absent."""
    if entry is None or (isinstance(entry, Mapping) and not entry.get("counts")):
        return None
    try:
        return read_segmentation(entry, *size)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
