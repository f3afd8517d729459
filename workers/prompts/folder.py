"""Prompts from a folder of mask images: ``DIR/<video name>/<frame>.png``.

Values 1 to 254 are object ids, 255 is void and 0 the background, as in DAVIS 2017; an image of
only 0 and 255 is one object with id 1, as in DAVIS 2016. Palettes are for the eye: what counts is
the stored index.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers import rle
from workers.errors import ConfigError, InputError
from workers.messages import Prompt, PromptMode, StoreOptions
from workers.storage import open_store

VOID = 255
"""Pixels of this value belong to nobody."""

ENDING = ".png"
OTHER_ENDINGS = (".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
"""Pictures that people put there by mistake; most of these types would blur object ids."""

_NUM_READERS = 8
_GREY_SCALE = {2: 85, 4: 17}
"""What PIL multiplies grey values of few bits with, by bits."""


def read_folder(
    uri: str,
    options: StoreOptions | None = None,
    frame_stems: Sequence[str] | None = None,
    mode: PromptMode = PromptMode.FIRST_FRAME,
    *,
    is_due: Callable[[int], bool] | None = None,
) -> list[Prompt]:
    """Read the mask images of one video.

    Parameters
    ----------
    uri : str
        The video's own folder. Pictures in folders below it are those of other videos.
    options : StoreOptions, optional
        How to reach the store.
    frame_stems : sequence of str, optional
        Names of the frame files without ending, in order, for a video that is a folder of
        frames. As soon as one picture is named like a frame, all must be; otherwise, and for
        container files, names are 0-based frame indices.
    mode : PromptMode
        In ``first_frame`` only the first picture on which an object appears prompts it.
    is_due : callable, optional
        Called with a frame index; pictures of other frames are not read. Only for the interval
        modes: in ``first_frame`` it would change which picture is an object's first.

    Returns
    -------
    list of Prompt
        Masks as RLE, ordered by frame, then object id; empty when there is no picture.

    Raises
    ------
    InputError
        A picture belongs to no frame, is unreadable, has colours, or ids outside 1..254.
    StoreError
        The store cannot be reached.
    """
    store = open_store(uri, options)
    names = [
        stat.key
        for stat in store.list("")
        if "/" not in stat.key and stat.key.lower().endswith(ENDING)
    ]
    frames = frame_indices(names, frame_stems, store.uri)
    if is_due is not None and mode is not PromptMode.FIRST_FRAME:
        frames = {frame_idx: name for frame_idx, name in frames.items() if is_due(frame_idx)}
    indices = sorted(frames)

    def read(frame_idx: int) -> dict[int, NDArray[np.uint8]]:
        name = frames[frame_idx]
        return _objects(store.read_bytes(name), store.uri_of(name))

    prompts: list[Prompt] = []
    seen: set[int] = set()
    # Masks are turned into runs as they arrive: at most a few decoded pictures are alive.
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        for start in range(0, len(indices), _NUM_READERS):
            chunk = indices[start : start + _NUM_READERS]
            for frame_idx, objects in zip(chunk, pool.map(read, chunk), strict=True):
                for object_id, mask in objects.items():
                    if mode is PromptMode.FIRST_FRAME and object_id in seen:
                        continue
                    seen.add(object_id)
                    prompts.append(
                        Prompt(
                            object_id=object_id,
                            frame_idx=frame_idx,
                            mask_rle={"size": mask.shape, "counts": rle.encode(mask)},
                            source="folder",
                        )
                    )
    return prompts


def folder_digests(
    root_uri: str,
    options: StoreOptions | None = None,
    *,
    on_other: Callable[[str], None] | None = None,
) -> dict[str, str]:
    """Return what identifies the pictures of each video, from one recursive listing.

    Parameters
    ----------
    root_uri : str
        The folder that holds one folder per video.
    options : StoreOptions, optional
        How to reach the store.
    on_other : callable, optional
        Called with the key of each picture of another type, which is not read.

    Returns
    -------
    dict of str to str
        32 hex digits over names and etags (else sizes and times), by the path of the video's
        folder below the root. Videos without a picture are left out.

    Raises
    ------
    ConfigError
        The folder does not exist, or holds no picture at all.
    """
    hashes: dict[str, Any] = {}
    for stat in open_store(root_uri, options).list(""):
        video, _, name = stat.key.rpartition("/")
        if not video or not name.lower().endswith(ENDING):
            if video and on_other is not None and name.lower().endswith(OTHER_ENDINGS):
                on_other(stat.key)
            continue
        if video not in hashes:
            hashes[video] = hashlib.blake2b(digest_size=16)
        # Listings come ordered by key, so the order within a video is always the same.
        hashes[video].update(f"{name}\0{stat.identity()}\n".encode("utf-8", "surrogateescape"))
    if not hashes:
        raise ConfigError(
            f"the prompts folder {root_uri} does not exist or holds no {ENDING} picture in "
            f"a folder per video: correct the path, or put pictures at VIDEO/FRAME{ENDING} below it"
        )
    return {video: found.hexdigest() for video, found in hashes.items()}


def frame_indices(
    names: Sequence[str], frame_stems: Sequence[str] | None, uri: str
) -> dict[int, str]:
    """Return the picture of each frame that has one.

    Parameters
    ----------
    names : sequence of str
        File names of the pictures, all ending in ``.png``.
    frame_stems : sequence of str, optional
        See `read_folder`.
    uri : str
        Their folder, for messages.

    Returns
    -------
    dict of int to str
        File name by 0-based frame index.

    Raises
    ------
    InputError
        A name means no frame, or two mean the same.
    """
    positions = {stem: i for i, stem in enumerate(frame_stems or ())}
    by_stem = any(name[: -len(ENDING)] in positions for name in names)
    frames: dict[int, str] = {}
    for name in names:
        stem = name[: -len(ENDING)]
        if by_stem and stem not in positions:
            raise InputError(
                f"the mask image {uri}/{name} is named like no frame of its video, as the others "
                f"are: rename it, or remove it"
            )
        if not by_stem and not (stem.isascii() and stem.isdigit()):
            raise InputError(
                f"the mask image {uri}/{name} must be named by a 0-based frame index such as "
                f"00000{ENDING}" + (", or like a frame file" if frame_stems is not None else "")
            )
        frame_idx = positions[stem] if by_stem else int(stem)
        if frame_idx in frames:
            raise InputError(
                f"the mask images {frames[frame_idx]} and {name} in {uri} are both for frame "
                f"{frame_idx}: remove one"
            )
        frames[frame_idx] = name
    return frames


def _objects(data: bytes, uri: str) -> dict[int, NDArray[np.uint8]]:
    """Return the mask of each object on a picture, uint8 of shape (H, W), by ascending id."""
    values = read_values(data, uri)
    present = np.unique(values)
    if present.max(initial=0) > VOID:
        raise InputError(
            f"the mask image {uri} holds the value {present.max()}, but object ids are 1 to 254 "
            f"and 255 is void"
        )
    if VOID in present and not np.setdiff1d(present, (0, VOID)).size:
        return {1: (values == VOID).astype(np.uint8)}
    return {
        int(object_id): (values == object_id).astype(np.uint8)
        for object_id in present
        if 0 < object_id < VOID
    }


def read_values(data: bytes, uri: str) -> NDArray[Any]:
    """Return the stored values of a mask image.

    Parameters
    ----------
    data : bytes
        Content of the file.
    uri : str
        The file, for messages.

    Returns
    -------
    ndarray of uint8 or int32, shape (H, W)
        Palette indices or grey values, of few bits as they are stored; int32 where the picture
        has more than 8 bits, or one. Perhaps read-only.

    Raises
    ------
    InputError
        It is no picture, or one with colours.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            kind = image.mode
            if kind not in ("1", "L", "P", "I", "I;16", "I;16B"):
                raise InputError(
                    f"the mask image {uri} has colours ({kind}), but object ids are read from "
                    f"indexed or greyscale pictures: save it with a palette, one index per object"
                )
            values = np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # PIL reports a broken PNG as SyntaxError.
        raise InputError(f"the mask image {uri} cannot be read as a picture: {error}") from error
    bits = data[24] if data[:8] == b"\x89PNG\r\n\x1a\n" else 8  # the header's bit depth
    if kind == "L" and bits in _GREY_SCALE:
        return values // _GREY_SCALE[bits]
    return values if values.dtype == np.uint8 else values.astype(np.int32)
