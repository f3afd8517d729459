"""YouTube-VIS: one annotation per object, with a list of its segmentations over the frames.

The fields are those of the YouTube-VIS challenge (Yang et al., "Video Instance Segmentation",
ICCV 2019): ground truth with `videos`, `annotations` and `categories`, or a list of results, which
counts videos and categories as a ground-truth file does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.importing.annotations import Annotations
from jobs.importing.coco import label_of, read_categories
from jobs.importing.json_stream import JsonFile, field
from jobs.importing.lookup import Lookup
from jobs.importing.segmentation import read_segmentation, read_size
from jobs.importing.source import Naming, Source
from workers.errors import ConfigError


def read_ytvis(
    source: Source, naming: Naming, into: Annotations, spool: Path, videos: Source | None = None
) -> None:
    """Read YouTube-VIS annotations or results.

    Parameters
    ----------
    source : Source
        A JSON file, or a folder of them; ids count within one file.
    naming : Naming
        What the user says about names and numbers.
    into : Annotations
        Receives what was read.
    spool : Path
        Folder for temporary files, which the caller deletes.
    videos : Source, optional
        The ground-truth file that numbers the videos and categories of results.

    Raises
    ------
    ConfigError
        The source is missing, broken or contradicts itself.
    """
    for number, name in enumerate(source.files(".json")):
        with (
            source.open_json(name) as file,
            Lookup(spool / f"videos-{number}") as frames,
        ):
            if not file.starts_with_array():
                labels = _read_videos(file, naming, into, frames)
                for annotation in file.objects("annotations"):
                    _read_annotation(annotation, "annotation", frames, labels, into, file)
                continue
            if videos is None:
                raise ConfigError(
                    f"{file.name} holds results, which only number their videos: pass "
                    f"--videos FILE with the ground truth they belong to"
                )
            for truth_name in videos.files(".json"):
                with videos.open_json(truth_name) as truth:
                    labels = _read_videos(truth, naming, into, frames)
            for place, result in enumerate(file.objects("")):
                _read_annotation({"id": place} | result, "result", frames, labels, into, file)


def _read_videos(
    file: JsonFile, naming: Naming, into: Annotations, frames: Lookup
) -> dict[Any, str]:
    """Read videos with their frames, and return the categories."""
    for video in file.objects("videos"):
        place = file.place(f"video {video.get('id')}")
        names = field(video, "file_names", place)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"{place} has file_names that are no list of names: mend them")
        if not names:
            # Without frames there is no folder that says what it is called, and no mask either.
            continue
        folder = names[0].rpartition("/")[0]
        title = naming.video_of(folder and naming.video_of_sequence(folder), place)
        try:
            size = read_size(video.get("height"), video.get("width"))
        except ValueError as error:
            raise ConfigError(f"{place}: {error}; export it again with sizes") from error
        indices = [naming.frame_of(name, place) for name in names]
        for frame_idx in indices:
            into.add_frame(title, frame_idx, size, place)
        try:
            frames.add(field(video, "id", place), [title, *size, indices])
        except KeyError:
            raise ConfigError(f"{place} is there twice: renumber or remove one") from None
    return read_categories(file)


def _read_annotation(
    annotation: Mapping[str, Any],
    kind: str,
    frames: Lookup,
    labels: Mapping[Any, str],
    into: Annotations,
    file: JsonFile,
) -> None:
    place = file.place(f"{kind} {annotation.get('id')}")
    video = frames.get(field(annotation, "video_id", place))
    if video is None:
        raise ConfigError(
            f"{place} is of the video {annotation['video_id']!r}, which is not listed in videos: "
            f"add it there"
        )
    title, height, width, indices = video
    segmentations = field(annotation, "segmentations", place)
    if not isinstance(segmentations, list) or len(segmentations) != len(indices):
        found = len(segmentations) if isinstance(segmentations, list) else "no list of"
        raise ConfigError(
            f"{place} has {found} segmentations, but its video has {len(indices)} frames: give "
            f"one per frame, null where the object is absent"
        )
    label = label_of(annotation.get("category_id"), labels, place)
    # Ids of annotations count through the file, so they only tell objects apart.
    track = annotation.get("object_id")
    if not isinstance(track, int):
        track = f"{kind} {field(annotation, 'id', place)}"
    for frame_idx, segmentation in zip(indices, segmentations, strict=True):
        if segmentation is None or segmentation == []:
            continue
        try:
            counts = read_segmentation(segmentation, height, width)
        except ValueError as error:
            raise ConfigError(f"{place}, frame {frame_idx}: {error}") from error
        if counts is not None:
            into.add_mask(title, frame_idx, track, counts, place, label=label)
