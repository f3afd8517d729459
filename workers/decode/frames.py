"""Folders of frames: every image that lies directly in a folder is one frame of one video.

Order. If every stem is the same prefix followed by digits (`frame1`, `frame2`, ..., `frame10`),
frames are ordered by that number; otherwise by name, character by character.

Time. A folder has no clock: frames are `FRAMES_FOLDER_FPS` apart, so that ranges in seconds and
rates mean something. Orientation tags (EXIF) are applied, as rotation is for container files.

Errors. A folder has no tail that could be cut off: a picture that cannot be read, or one of another
size than the first, is an InputError that names it, since leaving it out would shift every later
frame against the masks and prompts that are named after them.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from workers.decode.reader import DecodedFrame, ImageFiles, VideoHeader
from workers.errors import InputError
from workers.messages import VideoSource

FRAMES_FOLDER_FPS = 24
"""Nominal frame rate of every folder of frames."""

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
"""Lower-case extensions of the files that are frames."""

_NUMBERED = re.compile(r"(.*?)(\d+)", re.DOTALL)

_EXIF_TURNS = {
    2: (0, True),
    3: (180, False),
    4: (180, True),
    5: (90, True),
    6: (90, False),
    7: (270, True),
    8: (270, False),
}
"""Degrees clockwise, and whether mirrored after that, by the value of the orientation tag."""


@dataclass(slots=True)
class FramesReader:
    """One folder of frames; see `VideoReader` for what it promises.

    Parameters
    ----------
    source : VideoSource
        Name, range and stride.
    images : ImageFiles
        The pictures, in frame order.
    """

    source: VideoSource
    images: ImageFiles
    header: VideoHeader = field(init=False)
    num_decoded: int = field(init=False, default=0)
    num_corrupt: int = field(init=False, default=0)
    num_frames: int | None = field(init=False)
    num_resized: int = field(init=False, default=0)
    vfr: bool = field(init=False, default=False)
    truncated: bool = field(init=False, default=False)
    truncation: str | None = field(init=False, default=None)
    _started: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        names = self.images.names
        if not names:
            raise InputError(
                f"{self.source.name} holds no images directly: remove it from the corpus"
            )
        first = next(iter(self.images.stream([0])))
        self.num_frames = len(names)
        _, self.header = read_image(first, f"{self.source.name}/{names[0]}", len(names))

    def __iter__(self) -> Iterator[DecodedFrame]:
        """Yield the tracked frames; see `VideoReader`."""
        if self._started:
            raise RuntimeError(f"{self.source.name} was read already: open it again")
        self._started = True
        return self._tracked()

    def close(self) -> None:
        """Nothing is held open between frames."""

    def __enter__(self) -> Self:
        """Return the reader itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the reader."""
        self.close()

    def _tracked(self) -> Iterator[DecodedFrame]:
        source, names = self.source, self.images.names
        first = _frame_at(source.start_us or 0)
        stop = len(names) if source.end_us is None else min(len(names), _frame_at(source.end_us))
        if first >= stop:
            raise InputError(
                f"{source.name} has no frame in its range: it holds {len(names)} frames, taken as "
                f"{FRAMES_FOLDER_FPS} per second: correct start_s and end_s"
            )
        indices = range(first, stop, source.stride)
        size = self.header.width, self.header.height
        for frame_idx, data in zip(indices, self.images.stream(indices), strict=True):
            name = f"{source.name}/{names[frame_idx]}"
            image, header = read_image(data, name, len(names))
            if (header.width, header.height) != size:
                raise InputError(
                    f"{name} is {header.width}x{header.height} pixels, but the first frame of its "
                    f"folder is {size[0]}x{size[1]}: give the folder frames of one size only"
                )
            self.num_decoded += 1
            yield DecodedFrame(frame_idx, frame_time_us(frame_idx), image)


def frame_time_us(frame_idx: int) -> int:
    """Return the nominal time of a folder's frame, in microseconds, rounded down."""
    return frame_idx * 1_000_000 // FRAMES_FOLDER_FPS


def _frame_at(time_us: int) -> int:
    """Return the index of the first frame whose time is not before `time_us`."""
    frame_idx = time_us * FRAMES_FOLDER_FPS // 1_000_000
    while frame_time_us(frame_idx) < time_us:
        frame_idx += 1
    return frame_idx


def order_frames(names: Iterable[str], folder: str) -> list[str]:
    """Return the image files among `names`, in frame order.

    Parameters
    ----------
    names : iterable of str
        File names without their folder; hidden files and other kinds are left out.
    folder : str
        How messages call the folder.

    Raises
    ------
    InputError
        Two images have the same stem, so it is not clear which one is the frame.
    """
    images = sorted(name for name in names if is_image(name) and not name.startswith("."))
    stems = [name.rpartition(".")[0] for name in images]
    seen: dict[str, str] = {}
    for stem, name in zip(stems, images, strict=True):
        if stem in seen:
            raise InputError(
                f"{folder} holds two images for one frame, {seen[stem]} and {name}: keep one"
            )
        seen[stem] = name
    matches = [_NUMBERED.fullmatch(stem) for stem in stems]
    if all(matches) and len({match[1] for match in matches if match}) == 1:
        numbers = {
            name: int(match[2]) for name, match in zip(images, matches, strict=True) if match
        }
        images.sort(key=lambda name: (numbers[name], name))
    return images


def is_image(name: str) -> bool:
    """Tell by its extension whether a file is a frame."""
    stem, dot, suffix = name.rpartition(".")
    return bool(stem) and dot + suffix.lower() in IMAGE_SUFFIXES


def folder_identity(images: Iterable[tuple[str, str]]) -> str:
    """Return what changes when any image of a folder does.

    Parameters
    ----------
    images : iterable of (str, str)
        Name and identity (`ObjectStat.identity`) of every image that lies directly in the folder,
        ordered by name.

    Returns
    -------
    str
        32 hex digits.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, identity in images:
        digest.update(f"{name}\0{identity}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def read_image(
    data: bytes, name: str, num_frames: int | None = None
) -> tuple[NDArray[np.uint8], VideoHeader]:
    """Decode one picture.

    Parameters
    ----------
    data : bytes
        The file's content.
    name : str
        How messages call it.
    num_frames : int or None
        Frames in its folder, for the header.

    Returns
    -------
    image : ndarray of uint8, shape (H, W, 3)
        RGB, upright. Grey and palette pictures are expanded, alpha is dropped, 16-bit values
        keep their upper byte.
    header : VideoHeader
        As of a video made of such pictures.

    Raises
    ------
    InputError
        Empty, cut off, too large or not an image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError, __version__

    if not data:
        raise InputError(f"{name} is empty (0 bytes): upload it again or remove it")
    try:
        with Image.open(io.BytesIO(data)) as opened:
            codec, mode = (opened.format or "image").lower(), opened.mode
            rotation, mirrored = _EXIF_TURNS.get(opened.getexif().get(0x0112, 1), (0, False))
            upright = ImageOps.exif_transpose(opened) if rotation or mirrored else opened
            image = _rgb(upright)
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not an image that can be read: replace it") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{name} cannot be decoded ({error}): replace it") from error
    height, width = image.shape[:2]
    duration_us = None if num_frames is None else frame_time_us(num_frames)
    return image, VideoHeader(
        codec=codec,
        container="frames",
        decoder=f"pillow {__version__} {codec}",
        pixel_format=mode,
        width=width,
        height=height,
        rotation=rotation,
        mirrored=mirrored,
        fps=float(FRAMES_FOLDER_FPS),
        num_frames=num_frames,
        duration_us=duration_us,
    )


def _rgb(image: Any) -> NDArray[np.uint8]:
    """Return a Pillow image as uint8 RGB, contiguous."""
    if image.mode.startswith(("I", "F")):
        # Pillow would clip these to 0..255 on conversion: scale 16-bit values, clip floats
        values = np.asarray(image)
        if image.mode == "F":
            grey = np.clip(np.nan_to_num(values), 0, 255).astype(np.uint8)
        else:
            grey = (np.clip(values, 0, 65535).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    rgb: NDArray[np.uint8] = np.ascontiguousarray(np.asarray(image.convert("RGB")))
    return rgb
