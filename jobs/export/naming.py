"""What videos and classes are called and numbered in other formats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from jobs.corpus import VIDEO_SUFFIXES
from workers.errors import ConfigError

if TYPE_CHECKING:
    from jobs.dataset import Dataset, Video

NAMELESS = "object"
"""The class of objects without a category, in formats that need one."""
PICTURE_SUFFIX = ".jpg"


def picture_name(sequence: str, frame_idx: int) -> str:
    """Return what formats call the picture of a frame; it need not exist.

    Examples
    --------
    >>> picture_name("park__dogs", 7)
    'park__dogs/00007.jpg'
    """
    return f"{sequence}/{frame_idx:05d}{PICTURE_SUFFIX}"


def plain_sequence(name: str) -> str:
    """Return a video's name as one word of a path, without the extension of a video file.

    Examples
    --------
    >>> plain_sequence("park/dogs.mkv"), plain_sequence("frames/v1.2")
    ('park__dogs', 'frames__v1.2')
    """
    stem, dot, suffix = name.rpartition(".")
    if dot and stem and f".{suffix.lower()}" in VIDEO_SUFFIXES:
        name = stem
    return name.strip("/").replace("/", "__")


class VideoNames:
    """A number and a name for every video of a dataset, whatever is selected of it.

    Holds 16 bytes per video: videos whose names would be equal must be known before any is named.

    Parameters
    ----------
    dataset : Dataset
        The dataset.

    Attributes
    ----------
    keys : ndarray of int64, shape (N,)
        Keys of all its readable videos, ascending.
    """

    def __init__(self, dataset: Dataset) -> None:
        keys, names = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for batch in dataset.batches("videos", columns=("video_key", "name")):
            keys.append(batch.column(0).to_numpy())
            hashed = (hash(plain_sequence(name)) for name in batch.column(1).to_pylist())
            names.append(np.fromiter(hashed, np.int64, batch.num_rows))
        self.keys: NDArray[np.int64] = np.sort(np.concatenate(keys))
        found, counts = np.unique(np.concatenate(names), return_counts=True)
        self._shared = set(found[counts > 1].tolist())

    def number(self, video: Video) -> int:
        """Return the number of a video, from 1, by ascending key."""
        return int(np.searchsorted(self.keys, video.video_key)) + 1

    def sequence(self, video: Video) -> str:
        """Return the name of a video, unique in the dataset and fit to be that of a file."""
        name = plain_sequence(video.name)
        if hash(name) in self._shared:
            return f"{name}-{video.video_key & (1 << 64) - 1:016x}"
        return name


@dataclass(frozen=True, slots=True)
class Classes:
    """The numbers of classes in a format.

    Attributes
    ----------
    names : Mapping of int to str
        Names by category id.
    numbers : Mapping of (int or None) to int
        Numbers by category id; None is the class of objects without one.
    """

    names: Mapping[int, str]
    numbers: Mapping[int | None, int]
    _used: set[int | None] = field(default_factory=set, compare=False)

    def name(self, category_id: int | None) -> str:
        """Return the name of a class."""
        return NAMELESS if category_id is None else self.names.get(category_id, str(category_id))

    def number(self, category_id: int | None) -> int:
        """Return the number of a class, and remember that it was used.

        Raises
        ------
        KeyError
            The format has no such class.
        """
        number = self.numbers[category_id]
        self._used.add(category_id)
        return number

    def listed(self) -> list[dict[str, int | str]]:
        """Return the classes as COCO lists them: all named ones, and the nameless one if used."""
        wanted = [*self.names, *({None} & self._used)]
        rows: list[dict[str, int | str]] = [
            {"id": self.numbers[key], "name": self.name(key), "supercategory": ""} for key in wanted
        ]
        return sorted(rows, key=lambda row: row["id"])


def numbered_classes(names: Mapping[int, str], given: Mapping[str, int]) -> Classes:
    """Give the classes of a dataset numbers from 1, as COCO and YouTube-VIS have them.

    Parameters
    ----------
    names : Mapping of int to str
        Names by category id.
    given : Mapping of str to int
        Numbers that are wanted for some classes, by name.

    Returns
    -------
    Classes
        Every class has a number.

    Raises
    ------
    ConfigError
        A given name is no class, or two classes would share a number.
    """
    numbers: dict[int | None, int] = {key: key + 1 for key in names}
    numbers[None] = max(names, default=-1) + 2
    numbers |= _given(names, given)
    owners: dict[int, str] = {}
    for key, number in numbers.items():
        name = NAMELESS if key is None else names[key]
        if number in owners:
            raise ConfigError(
                f"the classes {owners[number]!r} and {name!r} would both have the number "
                f"{number}: give each its own with --category NAME=ID"
            )
        owners[number] = name
    return Classes(dict(names), numbers)


def known_classes(
    names: Mapping[int, str], known: Mapping[str, int], given: Mapping[str, int]
) -> Classes:
    """Give the classes of a dataset the numbers of a format with a fixed list.

    Parameters
    ----------
    names : Mapping of int to str
        Names by category id.
    known : Mapping of str to int
        The format's own numbers, by name in lower case.
    given : Mapping of str to int
        Numbers that are wanted for some classes, by name.

    Returns
    -------
    Classes
        Only classes that are known or given have a number.

    Raises
    ------
    ConfigError
        A given name is no class.
    """
    numbers: dict[int | None, int] = {
        key: known[name.lower()] for key, name in names.items() if name.lower() in known
    }
    return Classes(dict(names), numbers | _given(names, given))


def parse_classes(texts: Iterable[str]) -> dict[str, int]:
    """Return ``NAME=ID`` texts as a mapping.

    Raises
    ------
    ConfigError
        A text is none, or the number is not positive.

    Examples
    --------
    >>> parse_classes(["dog=3"])
    {'dog': 3}
    """
    found = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        if not name.strip() or not number.strip().isdecimal() or int(number) == 0:
            raise ConfigError(f"--category {text!r} is not NAME=ID with a whole number above 0")
        found[name.strip()] = int(number)
    return found


def _given(names: Mapping[int, str], given: Mapping[str, int]) -> dict[int | None, int]:
    keys: dict[str, int | None] = {NAMELESS: None} | {name: key for key, name in names.items()}
    unknown = sorted(given.keys() - keys.keys())
    if unknown:
        raise ConfigError(
            f"this dataset has no category {unknown[0]!r}: it has "
            + ", ".join(sorted(names.values())[:20])
            + f", and {NAMELESS!r} stands for objects without one"
        )
    return {keys[name]: number for name, number in given.items()}
