"""The one reader of ground truth, and the definition of its layout.

A ground truth is a folder or URL `DIR`. What is known about one video is a *sequence*; its name is
the video's name, without extension, and it is kept in one of four ways:

``DIR/<name>/<frame>.png``
    Pictures of object ids, exactly what ``--prompts-dir`` takes: values 1 to 254 are object ids,
    255 is void (known to nobody, counts neither for nor against), 0 is background. A sequence
    whose pictures hold only 0 and 255 is binary: its one object has id 1. ``<frame>`` is the
    0-based frame index, or the stem of the frame's file where the video is a folder of frames.
    The pictures may lie in ``masks`` or ``Annotations`` below ``DIR/<name>``; then nothing else
    below ``DIR/<name>`` is looked at. Frames without a picture are unknown, not empty.
``DIR/<name>.json``, also ``DIR/<name>_manual.json`` and ``DIR/<name>_auto.json``
    Masks that overlap, or more than 254 objects: one JSON object in the form of SA-V's manual
    annotations. ``video_height`` and ``video_width``; ``masklet``, a list per frame of a list per
    object of COCO RLE ``{"size": [H, W], "counts": "..."}``, where null or counts without an
    object pixel mean absent; ``masklet_id``, the object id of each place in those lists (default
    1, 2, ...). ``frame_idx``, which SA-V does not have, is the 0-based frame index of each row of
    ``masklet`` (exports of ours have it below ``maskmill``); without it rows are ``frame_step``
    frames apart, by default 1, and 4 where ``video_frame_count`` says that only every fourth frame
    is there, as in SA-V. ``void``, which SA-V does not have either, is one RLE or null per row:
    pixels that are known to nobody. Other keys are not looked at.
``DIR/<name>/groundtruth_rect.txt``
    Boxes of one object, id 1, as OTB keeps them: one line ``x y w h`` per frame from frame 0 on,
    separated by comma, tab or blank, pixels *counted from 1*. No size, or NaN, means absent.
``DIR/<name>/boxes.json``
    ``{"xywh": [[x, y, w, h] or null, ...]}``: the same, pixels counted from 0.

Where several are there the first counts. Everything is read sequence by sequence and frame by
frame; only the names of the sequences are kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers import rle
from workers.errors import ConfigError, InputError
from workers.masks import CroppedMask, crop_mask
from workers.messages import StoreOptions
from workers.prompts.folder import ENDING, VOID, frame_indices, read_values
from workers.storage import Store, open_store

MASK_FOLDERS = ("masks", "Annotations")
"""Folders below a sequence's own that may hold its pictures."""
MASKLETS_ENDING = ".json"
SA_V_SUFFIXES = ("_manual", "_auto")
"""What SA-V puts between a video's name and the ending."""
OTB_BOXES = "groundtruth_rect.txt"
PLAIN_BOXES = "boxes.json"
BOX_OBJECT_ID = 1
"""Object id of the one object that box files know."""
SA_V_STEP = 4
"""SA-V annotates every fourth frame."""


class TruthKind(StrEnum):
    """How one sequence is kept; the first that is there counts."""

    PICTURES = "pictures"
    MASKLETS = "masklets"
    OTB_BOXES = "otb_boxes"
    PLAIN_BOXES = "plain_boxes"

    @property
    def is_boxes(self) -> bool:
        """Whether only boxes are known."""
        return self in (TruthKind.OTB_BOXES, TruthKind.PLAIN_BOXES)


@dataclass(frozen=True, slots=True)
class TruthSequence:
    """What is known about one video, unread.

    Attributes
    ----------
    name : str
        Name of the video it is about.
    kind : TruthKind
        How it is kept.
    key : str
        Folder of its pictures, or the file, below the root of the ground truth.
    """

    name: str
    kind: TruthKind
    key: str


@dataclass(frozen=True, slots=True, eq=False)
class TruthFrame:
    """What is known about one frame.

    Attributes
    ----------
    frame_idx : int
        0-based.
    size : tuple of (int, int)
        Height and width of the picture.
    masks : Mapping of int to CroppedMask
        The objects that are visible, by id; an object that is not here is absent.
    void : ndarray of bool, shape (H, W), or None
        True where nothing is known; None where everything is.
    """

    frame_idx: int
    size: tuple[int, int]
    masks: Mapping[int, CroppedMask]
    void: NDArray[np.bool_] | None = field(default=None, repr=False)


class GroundTruth:
    """A ground truth at one moment; see the head of this file for its layout.

    Parameters
    ----------
    store : Store
        Its root.

    Raises
    ------
    ConfigError
        It does not exist or holds no sequence.

    Attributes
    ----------
    sequences : dict of str to TruthSequence
        By name, in order of the listing.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.sequences = _find_sequences(store)
        if not self.sequences:
            lies_flat = any("/" not in stat.key and _is_picture(stat.key) for stat in store.list())
            raise ConfigError(
                f"the ground truth {store.uri} has its pictures directly inside: give the folder "
                f"above, whose folders are named like the videos"
                if lies_flat
                else f"the ground truth {store.uri} does not exist or holds nothing to score "
                f"against: correct the path, or put pictures of object ids at "
                f"VIDEO/FRAME{ENDING} below it"
            )

    @property
    def uri(self) -> str:
        """Where it is."""
        return self._store.uri

    def frames(
        self, sequence: TruthSequence, frame_stems: Sequence[str] | None = None
    ) -> Iterator[TruthFrame]:
        """Yield the known frames of one sequence of masks, in order of time.

        Parameters
        ----------
        sequence : TruthSequence
            One of `sequences`, of pictures or masklets.
        frame_stems : sequence of str, optional
            For a video that is a folder of frames: names of its files without ending, in order.

        Yields
        ------
        TruthFrame
            Ascending by `frame_idx`.

        Raises
        ------
        InputError
            A picture or the file is unreadable, names no frame, or contradicts itself.
        """
        if sequence.kind is TruthKind.PICTURES:
            return self._pictures(sequence, frame_stems)
        if sequence.kind is TruthKind.MASKLETS:
            return self._masklets(sequence)
        raise ValueError(f"{sequence.name} has boxes only: use boxes()")

    def boxes(self, sequence: TruthSequence) -> NDArray[np.float64]:
        """Return the boxes of one sequence of boxes.

        Parameters
        ----------
        sequence : TruthSequence
            One of `sequences`, of boxes.

        Returns
        -------
        ndarray of float64, shape (T, 4)
            ``x0, y0, x1, y1`` as edges in pixels, from frame 0 on; NaN where the object is absent.

        Raises
        ------
        InputError
            The file is not of that form.
        """
        uri, data = self._store.uri_of(sequence.key), self._store.read_bytes(sequence.key)
        if sequence.kind is TruthKind.OTB_BOXES:
            # OTB's tools are MATLAB's: the first pixel is 1.
            return _edges(_text_rows(data, uri), origin=1)
        if sequence.kind is TruthKind.PLAIN_BOXES:
            return _edges(_json_rows(data, uri), origin=0)
        raise ValueError(f"{sequence.name} has masks: use frames()")

    def _pictures(
        self, sequence: TruthSequence, frame_stems: Sequence[str] | None
    ) -> Iterator[TruthFrame]:
        folder = f"{sequence.key}/"
        names = [
            name
            for stat in self._store.list(folder)
            if "/" not in (name := stat.key[len(folder) :]) and _is_picture(name)
        ]
        by_frame = frame_indices(names, frame_stems, self._store.uri_of(sequence.key))
        size: tuple[int, int] | None = None
        # Whether 255 is the object is known at the first picture that is not blank.
        is_binary: bool | None = None
        for frame_idx in sorted(by_frame):
            key = folder + by_frame[frame_idx]
            uri = self._store.uri_of(key)
            values = _labels(self._store.read_bytes(key), uri)
            size = size or values.shape
            if values.shape != size:
                raise InputError(
                    f"{uri} has {_shown(values.shape)} pixels, the pictures before it "
                    f"{_shown(size)}: all of one video must have one size"
                )
            ids, has_void = _present(values)
            if is_binary is None and (ids or has_void):
                is_binary = not ids
            if is_binary and ids:
                raise InputError(
                    f"{uri} has object ids, but the pictures before it only 0 and {VOID}, where "
                    f"{VOID} means the object: save them all with object ids"
                )
            if is_binary:
                ids, values, has_void = ([1] if has_void else []), np.minimum(values, 1), False
            yield TruthFrame(
                frame_idx,
                size,
                {object_id: crop_mask(values == object_id) for object_id in ids},
                values == VOID if has_void else None,
            )

    def _masklets(self, sequence: TruthSequence) -> Iterator[TruthFrame]:
        uri = self._store.uri_of(sequence.key)
        try:
            content = json.loads(self._store.read_bytes(sequence.key))
            size = int(content["video_height"]), int(content["video_width"])
            rows: list[list[Any]] = content["masklet"]
            num_objects = len(rows[0]) if rows else 0
            ids = [int(i) for i in content.get("masklet_id") or range(1, num_objects + 1)]
            indices = _row_frames(content, len(rows))
            voids = content.get("void") or [None] * len(rows)
            is_square = all(len(row) == len(ids) for row in rows) and len(voids) == len(rows)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise InputError(
                f"{uri} is no ground truth in the form of SA-V ({what}): it needs video_height, "
                f"video_width and masklet, a list per frame of a COCO RLE per object"
            ) from error
        if not is_square or len(indices) != len(rows) or len(set(ids)) != len(ids):
            raise InputError(
                f"{uri} contradicts itself: every frame of masklet must have an entry for each of "
                f"the {len(ids)} different ids in masklet_id, and frame_idx and void one per frame"
            )
        if sorted(set(indices)) != indices or (indices and indices[0] < 0):
            raise InputError(f"frame_idx in {uri} must ascend from 0 or more: sort its frames")
        for frame_idx, row, unknown in zip(indices, rows, voids, strict=True):
            void = _decode(unknown, size, f"void on frame {frame_idx} of {uri}")
            masks = {}
            for object_id, entry in zip(ids, row, strict=True):
                mask = _decode(entry, size, f"object {object_id} on frame {frame_idx} of {uri}")
                if mask is not None:
                    masks[object_id] = mask
            yield TruthFrame(
                frame_idx, size, masks, None if void is None else void.paste(*size) != 0
            )


def open_ground_truth(uri: str, options: StoreOptions | None = None) -> GroundTruth:
    """Open the ground truth below `uri`; one recursive listing.

    Parameters
    ----------
    uri : str
        Folder or URL.
    options : StoreOptions, optional
        How to reach it.

    Returns
    -------
    GroundTruth
        With its sequences found, nothing of them read.

    Raises
    ------
    ConfigError
        It does not exist or holds no sequence.
    StoreError
        The store cannot be read.
    """
    return GroundTruth(open_store(uri, options))


def sa_v_step(num_rows: int, num_frames: float | None) -> int:
    """Return how many frames of the video lie from one row of `masklet` to the next.

    Parameters
    ----------
    num_rows : int
        Annotated frames.
    num_frames : float or None
        ``video_frame_count``, which SA-V writes as a float; None where it is not told.

    Returns
    -------
    int
        `SA_V_STEP` where the rows are every so many frames of them, else 1.

    Examples
    --------
    >>> sa_v_step(3, 9.0), sa_v_step(9, 9.0), sa_v_step(9, None)
    (4, 1, 1)
    """
    total = num_rows if num_frames is None else int(num_frames)
    return SA_V_STEP if num_rows < total and num_rows == -(-total // SA_V_STEP) else 1


def _find_sequences(store: Store) -> dict[str, TruthSequence]:
    folders: set[str] = set()
    files: list[str] = []
    for stat in store.list():
        folder, _, name = stat.key.rpartition("/")
        if folder and _is_picture(name):
            folders.add(folder)
        elif name in (OTB_BOXES, PLAIN_BOXES) or name.endswith(MASKLETS_ENDING):
            files.append(stat.key)
    found: dict[str, TruthSequence] = {}
    # Pictures in masks/ or Annotations/ make the folder above a sequence.
    for folder in sorted(folders):
        above, _, last = folder.rpartition("/")
        if above and last in MASK_FOLDERS:
            found.setdefault(above, TruthSequence(above, TruthKind.PICTURES, folder))
    owners = set(found)
    for folder in sorted(folders):
        if folder not in found and not _is_below(folder, owners):
            found[folder] = TruthSequence(folder, TruthKind.PICTURES, folder)
    for key in files:
        folder, _, name = key.rpartition("/")
        if name == OTB_BOXES and folder:
            found.setdefault(folder, TruthSequence(folder, TruthKind.OTB_BOXES, key))
    for key in files:
        folder, _, name = key.rpartition("/")
        if name == PLAIN_BOXES and folder:
            found.setdefault(folder, TruthSequence(folder, TruthKind.PLAIN_BOXES, key))
    # Any other JSON inside a sequence's folder is a note about it.
    owners = set(found)
    for key in files:
        name = key.removesuffix(MASKLETS_ENDING)
        for suffix in SA_V_SUFFIXES:
            name = name.removesuffix(suffix)
        if (
            key.endswith(MASKLETS_ENDING)
            and not key.endswith(f"/{PLAIN_BOXES}")
            and not _is_below(key, owners)
        ):
            found.setdefault(name, TruthSequence(name, TruthKind.MASKLETS, key))
    return found


def _is_below(key: str, folders: Collection[str]) -> bool:
    """Tell whether one of the folders contains `key`."""
    while "/" in key:
        key = key.rpartition("/")[0]
        if key in folders:
            return True
    return False


def _is_picture(name: str) -> bool:
    return name.lower().endswith(ENDING)


def _labels(data: bytes, uri: str) -> NDArray[np.uint8]:
    """Return the values of a picture of object ids."""
    values = read_values(data, uri)
    if values.dtype != np.uint8 and values.max(initial=0) > VOID:
        raise InputError(
            f"{uri} holds the value {values.max()}, but object ids are 1 to {VOID - 1} and {VOID} "
            f"is void: for more objects use the form {MASKLETS_ENDING} of SA-V"
        )
    return values.astype(np.uint8, copy=False)


def _present(labels: NDArray[np.uint8]) -> tuple[list[int], bool]:
    """Return the object ids of a picture, ascending, and whether it has void pixels."""
    import cv2

    # Ten times faster than sorting the pixels, as numpy.unique does.
    counts = cv2.calcHist([labels], [0], None, [VOID + 1], [0, VOID + 1]).reshape(-1)
    return [int(value) for value in np.flatnonzero(counts[1:VOID]) + 1], bool(counts[VOID])


def _row_frames(content: Mapping[str, Any], num_rows: int) -> list[int]:
    """Return the frame index of each row of `masklet`."""
    told = content.get("frame_idx") or content.get("maskmill", {}).get("frame_idx")
    if told is not None:
        return [int(index) for index in told]
    step = int(content.get("frame_step") or sa_v_step(num_rows, content.get("video_frame_count")))
    return [row * step for row in range(num_rows)]


def _decode(entry: Any, size: tuple[int, int], what: str) -> CroppedMask | None:
    """Return one mask; None where the object is absent."""
    if entry is None or (isinstance(entry, Mapping) and not entry.get("counts")):
        return None
    try:
        told = tuple(int(side) for side in entry["size"])
        counts = entry["counts"]
        if isinstance(counts, list):
            raise ValueError("counts are a list, not compressed text")
        if told != size:
            raise ValueError(f"it has {_shown(told)} pixels, the video {_shown(size)}")
        mask = crop_mask(rle.decode(counts, *size))
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"{what} is no COCO RLE ({error}): correct it") from error
    return mask if mask.area else None


def _text_rows(data: bytes, uri: str) -> list[list[float]]:
    try:
        lines = data.decode().replace(",", " ").strip().splitlines()
        rows = [[float(number) for number in line.split()] for line in lines]
    except ValueError as error:
        raise InputError(f"{uri} is no list of boxes ({error}): correct it") from error
    return _checked_rows(rows, uri)


def _json_rows(data: bytes, uri: str) -> list[list[float]]:
    try:
        rows = [
            [math.nan] * 4 if row is None else [float(number) for number in row]
            for row in json.loads(data)["xywh"]
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f'{uri} must be {{"xywh": [[x, y, w, h] or null, ...]}} ({error}): correct it'
        ) from error
    return _checked_rows(rows, uri)


def _checked_rows(rows: list[list[float]], uri: str) -> list[list[float]]:
    if not rows:
        raise InputError(f"{uri} is empty: it needs a line x y w h per frame")
    for number, row in enumerate(rows):
        if len(row) != 4:
            raise InputError(f"frame {number} in {uri} has {len(row)} numbers instead of x y w h")
    return rows


def _edges(rows: list[list[float]], origin: int) -> NDArray[np.float64]:
    """Return boxes as edges; NaN where there is none."""
    boxes = np.asarray(rows, np.float64)
    absent = ~(np.isfinite(boxes).all(1) & (boxes[:, 2] > 0) & (boxes[:, 3] > 0))
    boxes[:, :2] -= origin
    boxes[:, 2:] += boxes[:, :2]
    boxes[absent] = math.nan
    return boxes


def _shown(size: Sequence[int]) -> str:
    """Return a size (H, W) as people say it."""
    return f"{size[1]}x{size[0]}"
