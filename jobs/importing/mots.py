"""MOTS: a text file per video with a line per mask.

The lines are those of MOTS (Voigtlaender et al., "MOTS: Multi-Object Tracking and Segmentation",
CVPR 2019): frame, class * 1000 + instance, class, height, width, counts. Class 10 is the region
that is ignored; nobody's pixels, void in a ground truth.
"""

from __future__ import annotations

import configparser
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from jobs.importing.annotations import Annotations
from jobs.importing.segmentation import read_size
from jobs.importing.source import Naming, Source
from workers import rle
from workers.errors import ConfigError

CLASSES: Mapping[int, str] = {1: "car", 2: "pedestrian"}
"""The classes of MOTS by number."""
IGNORED_CLASS = 10
FIRST_FRAME = 1
"""MOTS Challenge counts frames from 1, KITTI MOTS from 0."""

_GROUND_TRUTH = "gt/gt.txt"


@dataclass(frozen=True, slots=True)
class _Line:
    place: str
    frame: int
    id: int
    class_id: int
    size: tuple[int, int]
    counts: bytes


def read_mots(
    source: Source, naming: Naming, into: Annotations, classes: Mapping[int, str]
) -> None:
    """Read MOTS text files.

    Parameters
    ----------
    source : Source
        A text file; or a folder of them, ``<sequence>.txt`` or ``<sequence>/gt/gt.txt``.
    naming : Naming
        What the user says about names and numbers.
    into : Annotations
        Receives what was read.
    classes : Mapping of int to str
        Name of each class.

    Raises
    ------
    ConfigError
        The source is missing, a line is broken, or its class has no name.
    """
    for name in source.files(".txt"):
        sequence = name.removesuffix(f"/{_GROUND_TRUTH}")
        if sequence == name and name.rpartition("/")[2] == "gt.txt":
            raise ConfigError(
                f"{source.uri_of(name)} does not say of which video it is: give the folder of the "
                f"sequence, named like the video, or the folder above it"
            )
        video = naming.video_of_sequence(sequence.removesuffix(".txt"))
        told = _told_frames(source, sequence) if sequence != name else None
        with source.local(name) as path:
            keep_ids = _needs_whole_ids(path, source.uri_of(name))
            last = -1
            size: tuple[int, int] | None = None
            for line in _lines(path, source.uri_of(name)):
                frame_idx = naming.frame_idx(line.frame)
                into.add_frame(video, frame_idx, line.size, line.place)
                last, size = max(last, line.frame), line.size
                _add(line, video, frame_idx, into, classes, keep_ids)
        # No line means that nothing is there, so the frames between are annotated, too.
        if told is not None:
            last, size = max(last, naming.first_frame + told[0] - 1), told[1]
        if size is not None:
            for number in range(naming.first_frame, last + 1):
                into.add_frame(video, naming.frame_idx(number), size, source.uri_of(name))


def _add(
    line: _Line,
    video: str,
    frame_idx: int,
    into: Annotations,
    classes: Mapping[int, str],
    keep_ids: bool,
) -> None:
    if line.class_id == IGNORED_CLASS:
        into.add_void(video, frame_idx, line.counts)
        return
    if line.class_id not in classes:
        some = ", ".join(f"{number} {name}" for number, name in classes.items())
        raise ConfigError(
            f"{line.place} is of class {line.class_id}, which has no name (known are {some}): "
            f"pass --category NAME={line.class_id}"
        )
    object_id = line.id if keep_ids else line.id % 1000
    label = classes[line.class_id]
    into.add_mask(video, frame_idx, object_id, line.counts, line.place, label=label)


def _needs_whole_ids(path: Path, name: str) -> bool:
    """Tell whether instances alone would not tell all objects of one file apart.

    Instances are numbered within their class and may start at 0.
    """
    ids = {line.id for line in _lines(path, name, check=False) if line.class_id != IGNORED_CLASS}
    instances = {number % 1000 for number in ids}
    return len(instances) < len(ids) or 0 in instances


def _lines(path: Path, name: str, *, check: bool = True) -> Iterator[_Line]:
    """Yield the lines of one file; `check` also looks at sizes and counts."""
    with path.open(encoding="ascii", errors="replace") as file:
        for number, text in enumerate(file, 1):
            place = f"line {number} of {name}"
            words = text.split()
            if not words:
                continue
            try:
                if len(words) != 6:
                    raise ValueError(f"it has {len(words)} columns")
                frame, id_, class_id, height, width = (int(word) for word in words[:5])
                if id_ < 0 or id_ // 1000 != class_id:
                    raise ValueError(f"the id {id_} does not begin with the class {class_id}")
                size = read_size(height, width) if check else (height, width)
                if check and not rle.area(words[5], *size):
                    raise ValueError("its mask is empty")
            except ValueError as error:
                raise ConfigError(
                    f"{place} is no line of MOTS ({error}): it needs frame, class * 1000 + "
                    f"instance, class, height, width, counts"
                ) from error
            yield _Line(place, frame, id_, class_id, size, words[5].encode("ascii"))


def _told_frames(source: Source, sequence: str) -> tuple[int, tuple[int, int]] | None:
    """Return number and size of the frames that a sequence's own description tells."""
    name = f"{sequence}/seqinfo.ini"
    parser = configparser.ConfigParser()
    try:
        parser.read_string(source.read_bytes(name).decode())
        told = parser["Sequence"]
        return int(told["seqLength"]), read_size(int(told["imHeight"]), int(told["imWidth"]))
    except FileNotFoundError:
        return None
    except (configparser.Error, KeyError, ValueError) as error:
        what = " ".join(str(error).split())[:120]
        raise ConfigError(
            f"{source.uri_of(name)} is no description of a sequence ({what}): it needs a section "
            f"[Sequence] with seqLength, imHeight and imWidth"
        ) from error
