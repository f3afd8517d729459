"""COCO: images and annotations of one or many videos, as maskmill and labelling tools write them.

The fields are those of the COCO data format (https://cocodataset.org/#format-data). What COCO does
not have, videos, frames and tracks, is read in the forms that are in use: `video_id` with a list
`videos`, or a folder per video in `file_name`; `frame_id`, `frame_idx` or `frame_index`, or the
number at the end of `file_name`; `object_id`, `track_id` or `instance_id`, of the annotation or in
its `attributes`. A crowd region is a mask like any other: labelling tools use the flag for
every mask that is not a polygon.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from jobs.importing.annotations import Annotations
from jobs.importing.json_stream import JsonFile, field
from jobs.importing.lookup import Lookup
from jobs.importing.segmentation import read_segmentation, read_size
from jobs.importing.source import Naming, Source
from workers.errors import ConfigError

FRAME_FIELDS = ("frame_id", "frame_idx", "frame_index")
TRACK_FIELDS = ("object_id", "track_id", "instance_id")


def read_coco(source: Source, naming: Naming, into: Annotations, spool: Path) -> None:
    """Read COCO annotations.

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

    Raises
    ------
    ConfigError
        The source is missing, broken or contradicts itself.
    """
    for number, name in enumerate(source.files(".json")):
        with (
            source.open_json(name) as file,
            Lookup(spool / f"videos-{number}") as videos,
            Lookup(spool / f"images-{number}") as images,
        ):
            labels = read_categories(file)
            for video in file.objects("videos"):
                place = file.place(f"video {video.get('id')}")
                title = video.get("file_name") or video.get("name")
                _add(videos, field(video, "id", place), title and str(title), place)
            for image in file.objects("images"):
                place = file.place(f"image {image.get('id')}")
                frame = _frame(image, videos, naming, place)
                _add(images, field(image, "id", place), frame, place)
                title, frame_idx, height, width = frame
                into.add_frame(title, frame_idx, (height, width), place)
            for annotation in file.objects("annotations"):
                _read_annotation(annotation, images, labels, into, file)


def read_categories(file: JsonFile) -> dict[Any, str]:
    """Return the name of each category id of a file.

    Raises
    ------
    ConfigError
        An id is there twice, or has no name.
    """
    labels: dict[Any, str] = {}
    for category in file.objects("categories"):
        place = file.place(f"category {category.get('id')}")
        category_id = field(category, "id", place)
        if not isinstance(category_id, Hashable) or category_id in labels:
            raise ConfigError(f"{place} is there twice or no id at all: remove or renumber it")
        labels[category_id] = str(field(category, "name", place))
    return labels


def label_of(category_id: Any, labels: Mapping[Any, str], place: str) -> str | None:
    """Return the label of a category id; None for none.

    Raises
    ------
    ConfigError
        The id is unknown.
    """
    if category_id is None:
        return None
    if not isinstance(category_id, Hashable) or category_id not in labels:
        some = ", ".join(f"{key} {name}" for key, name in list(labels.items())[:8])
        raise ConfigError(
            f"{place} is of the category {category_id!r}, which is not among the categories of "
            f"the file ({some or 'it has none'}): add it there"
        )
    return labels[category_id]


def _frame(
    image: Mapping[str, Any], videos: Lookup, naming: Naming, place: str
) -> tuple[str, int, int, int]:
    """Return the video, frame, height and width of an image."""
    file_name = str(image.get("file_name") or "").replace("\\", "/")
    title = file_name.rpartition("/")[0].lstrip("./") or None
    if image.get("video_id") is not None:
        title = videos.get(image["video_id"])
        if title is None:
            raise ConfigError(
                f"{place} is of the video {image['video_id']!r}, which the file does not list: "
                f"add it to videos"
            )
    number = next((image[name] for name in FRAME_FIELDS if image.get(name) is not None), None)
    if number is None:
        frame_idx = naming.frame_of(file_name, place)
    elif isinstance(number, (int, float)) and number == int(number):
        frame_idx = naming.frame_idx(int(number))
    else:
        raise ConfigError(f"{place} has the frame {number!r}, which is no whole number: mend it")
    try:
        height, width = read_size(image.get("height"), image.get("width"))
    except ValueError as error:
        raise ConfigError(f"{place}: {error}; export it again with sizes") from error
    return naming.video_of(title, place), frame_idx, height, width


def _read_annotation(
    annotation: Mapping[str, Any],
    images: Lookup,
    labels: Mapping[Any, str],
    into: Annotations,
    file: JsonFile,
) -> None:
    place = file.place(f"annotation {annotation.get('id')}")
    frame = images.get(field(annotation, "image_id", place))
    if frame is None:
        raise ConfigError(
            f"{place} is of the image {annotation['image_id']!r}, which the file does not list: "
            f"add it to images"
        )
    title, frame_idx, height, width = frame
    label = label_of(annotation.get("category_id"), labels, place)
    try:
        counts = read_segmentation(annotation.get("segmentation"), height, width)
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from error
    if counts is not None:
        track = _track(annotation, place)
        into.add_mask(title, frame_idx, track, counts, place, label=label)


def _track(annotation: Mapping[str, Any], place: str) -> int | str | None:
    """Return what links an annotation to others of its object; None when nothing does."""
    attributes = annotation.get("attributes")
    places = (annotation, attributes if isinstance(attributes, Mapping) else {})
    found = [a[name] for name in TRACK_FIELDS for a in places if a.get(name) is not None]
    if not found:
        return None
    track = found[0]
    if isinstance(track, float) and track.is_integer():
        track = int(track)
    if not isinstance(track, (int, str)):
        raise ConfigError(f"{place} has the track {track!r}: give it a whole number or a text")
    return track


def _add(lookup: Lookup, key: Any, value: Any, place: str) -> None:
    try:
        lookup.add(key, value)
    except KeyError:
        raise ConfigError(f"{place} is there twice: renumber or remove one") from None
