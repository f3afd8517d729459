"""What every decoder yields and promises, and the one place that picks the decoder.

A reader turns one `VideoSource` into the frames to be tracked, in presentation order. Container
files and folders of frames have one backend each; there is no silent fallback from one decoder to
another, so one table never mixes two decoders for the same kind of input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from workers.messages import SourceKind, VideoSource


@dataclass(frozen=True, slots=True)
class DecodedFrame:
    """One frame to be tracked.

    Attributes
    ----------
    frame_idx : int
        0-based index in presentation order among all decoded frames of the source, whatever range
        and stride.
    pts_us : int
        Presentation time in microseconds from the first frame of the stream.
    image : ndarray of uint8, shape (H, W, 3)
        RGB, 0–255, upright, C-contiguous. Owned by this frame: no later frame reuses its memory,
        so it may wait in a queue.
    """

    frame_idx: int
    pts_us: int
    image: NDArray[np.uint8]

    def __post_init__(self) -> None:
        if self.image.ndim != 3 or self.image.shape[2] != 3 or self.image.dtype != np.uint8:
            raise ValueError(
                "an image is uint8 (H, W, 3), got "
                f"{self.image.dtype} {self.image.shape} for frame {self.frame_idx}"
            )

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        return f"DecodedFrame({self.frame_idx}, {self.pts_us} us, {width}x{height})"


@dataclass(frozen=True, slots=True)
class VideoHeader:
    """What is known about a video once its first frame is decoded.

    Attributes
    ----------
    codec : str
        Name of the coding format, such as ``h264``, or of the picture format of a folder's first
        image, such as ``jpeg``.
    container : str
        Name of the container format, such as ``mp4``; ``frames`` for a folder.
    decoder : str
        Library and decoder that made the pixels.
    pixel_format : str
        Of the stored pictures, such as ``yuv420p10le``.
    width, height : int
        Size in pixels of the images that are yielded, after rotation.
    rotation : int
        Degrees clockwise by which stored pictures are turned: 0, 90, 180 or 270.
    mirrored : bool
        Whether they are also mirrored left to right, after the rotation.
    fps : float or None
        Average frame rate as the container states it.
    num_frames : int or None
        Frames in the whole source: exact for a folder, the container's claim for a file, or an
        estimate from duration and rate.
    duration_us : int or None
        Length of the video stream as the container states it, in microseconds.
    """

    codec: str
    container: str
    decoder: str
    pixel_format: str
    width: int
    height: int
    rotation: int = 0
    mirrored: bool = False
    fps: float | None = None
    num_frames: int | None = None
    duration_us: int | None = None


class ImageFiles(Protocol):
    """The pictures of one folder of frames, as encoded bytes, in frame order."""

    @property
    def names(self) -> Sequence[str]:
        """File names, in frame order."""

    def stream(self, indices: Iterable[int]) -> Iterator[bytes]:
        """Yield the content of the files at `indices`, reading a bounded number ahead."""


@dataclass(frozen=True, slots=True)
class LocalVideo:
    """A video as a decoder can open it: exactly one of the two attributes is set.

    Attributes
    ----------
    path : Path or None
        The container file on a local disk.
    images : ImageFiles or None
        The pictures of a folder of frames.
    """

    path: Path | None = None
    images: ImageFiles | None = None


class VideoReader(Protocol):
    """An open video: iterate it once, then ask how it went.

    Iterating yields the tracked frames only: those whose time lies in the half-open range
    ``[start_us, end_us)`` of the source, every `stride`-th counted from the first of them. The
    attributes below are final once the iteration has ended, by exhaustion or by ``close()``.

    Attributes
    ----------
    header : VideoHeader
        Known from the start.
    num_decoded : int
        Frames the decoder delivered, those before the range or between strides included.
    num_corrupt : int
        Packets or frames that could not be decoded and were left out.
    num_frames : int or None
        Frames in the whole source, for whatever range and stride; None when it is a file whose end
        was not reached, since the range ended before.
    num_resized : int
        Frames whose stored size differed from the first one's and which were scaled to it.
    vfr : bool
        Whether the frame rate varied over the decoded frames.
    truncated : bool
        Whether the source ends before its own header says it should.
    truncation : str or None
        How that showed, as a sentence.
    """

    header: VideoHeader
    num_decoded: int
    num_corrupt: int
    num_frames: int | None
    num_resized: int
    vfr: bool
    truncated: bool
    truncation: str | None

    def __iter__(self) -> Iterator[DecodedFrame]:
        """Yield the tracked frames in presentation order; may be called once.

        Raises
        ------
        InputError
            No frame lies in the range, or a picture of a folder cannot be read.
        """

    def close(self) -> None:
        """Free the decoder; harmless when called again."""

    def __enter__(self) -> Self:
        """Return the reader itself."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the reader."""


def open_video(source: VideoSource, local: LocalVideo, *, num_threads: int = 1) -> VideoReader:
    """Open a video for decoding; its first frame is decoded here, so that an unusable one fails.

    Parameters
    ----------
    source : VideoSource
        What to read: name for messages, range and stride.
    local : LocalVideo
        Where it lies now, from `workers.decode.fetch.fetch_video`. It must stay in place until the
        reader is closed.
    num_threads : int
        Threads the decoder may use; 1 decodes in the calling thread alone.

    Returns
    -------
    VideoReader
        The caller closes it.

    Raises
    ------
    InputError
        The source is empty, not a video, encrypted, without a video stream, or without any frame
        that can be decoded.
    """
    if source.stride < 1:
        raise ValueError(f"stride must be at least 1, got {source.stride}")
    if source.kind is SourceKind.FRAMES:
        from workers.decode.frames import FramesReader

        if local.images is None:
            raise ValueError(f"{source.name} is a folder of frames, but no images were fetched")
        return FramesReader(source, local.images)
    from workers.decode.container import ContainerReader

    if local.path is None:
        raise ValueError(f"{source.name} is a container file, but no path was fetched")
    return ContainerReader(source, local.path, num_threads=num_threads)
