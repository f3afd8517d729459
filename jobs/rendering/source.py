"""The pictures of a video that was tracked, read again from its corpus.

Masks only fit the very frames they were made on, so a source that is gone or has changed since is
refused, and so is one that decodes to other frames than it did then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from workers.decode.fetch import fetch_video
from workers.decode.reader import VideoReader, open_video
from workers.errors import ConfigError, InputError
from workers.messages import SourceKind, StoreOptions, VideoSource
from workers.storage import canonical_uri, open_store, split_uri

if TYPE_CHECKING:
    from jobs.dataset import Frame, Video

UInt8Array = NDArray[np.uint8]

STREAMED_FRAMES = 1_500
"""A few frames out of no more than this many are found by decoding all; out of more, by seeking."""


def tracked_source(
    video: Video, options: StoreOptions, *, moved_to: str | None = None
) -> VideoSource:
    """Return where a tracked video is, once it is sure that it is still the one.

    Parameters
    ----------
    video : Video
        From the dataset.
    options : StoreOptions
        How to reach the corpus.
    moved_to : str, optional
        Read it from this URI instead. A copy has another entity tag, so that only its size is
        compared.

    Returns
    -------
    VideoSource
        The whole video; range and stride are left to the caller.

    Raises
    ------
    ConfigError
        The video is not there, or not the one that was tracked.
    """
    uri = video.uri if moved_to is None else canonical_uri(moved_to)
    etag = video.row["etag"] if moved_to is None else None
    source = VideoSource(
        video.video_key, uri, video.name, SourceKind.FILE, video.row["size_bytes"], etag
    )
    root, key = split_uri(uri)
    store = open_store(root, options)
    found = store.stat(key)
    if found is None:
        if next(iter(store.list(f"{key.rstrip('/')}/")), None) is None:
            raise ConfigError(
                f"the video {video.name} is gone from {uri}: put it back, or say with --source "
                f"where it is now"
            )
        return replace(source, kind=SourceKind.FRAMES)
    same = found.size_bytes == source.size_bytes if etag is None else True
    if not same or etag not in (None, found.etag, found.identity()):
        raise ConfigError(
            f"{uri} has changed since {video.name} was tracked, so that its masks do not fit: put "
            f"the earlier file back, or track it again with the run command"
        )
    return source


@contextmanager
def open_source(
    source: VideoSource, options: StoreOptions, *, num_threads: int = 1
) -> Iterator[VideoReader]:
    """Open the source of a tracked video for decoding.

    Parameters
    ----------
    source : VideoSource
        From `tracked_source`, with the range and stride to read.
    options : StoreOptions
        How to reach the corpus.
    num_threads : int
        Threads the decoder may use.

    Yields
    ------
    VideoReader
        Closed when the context ends; a downloaded file is removed then.

    Raises
    ------
    ConfigError
        A folder of frames has changed since it was tracked.
    """
    try:
        with (
            fetch_video(source, options) as local,
            open_video(source, local, num_threads=num_threads) as reader,
        ):
            yield reader
    except InputError as error:
        raise ConfigError(f"the source of {source.name} cannot be drawn on: {error}") from error


def check_same_frame(source: VideoSource, expected_idx: int, frame_idx: int | None) -> None:
    """Refuse a source that does not decode to the frames it had when it was tracked.

    Raises
    ------
    ConfigError
        The indices differ, or there is no further frame (`frame_idx` is None).
    """
    if frame_idx != expected_idx:
        instead = "ends" if frame_idx is None else f"has frame {frame_idx}"
        raise ConfigError(
            f"{source.uri} decodes to other frames than when {source.name} was tracked: it "
            f"{instead} where frame {expected_idx} was; use the FFmpeg libraries of then, or track "
            f"it again"
        )


def pictures_at(
    source: VideoSource, options: StoreOptions, frames: Sequence[Frame]
) -> Iterator[tuple[Frame, UInt8Array]]:
    """Yield some tracked frames of a video with their pictures, in order of time.

    Parameters
    ----------
    source : VideoSource
        From `tracked_source`.
    options : StoreOptions
        How to reach the corpus.
    frames : sequence of Frame
        Which; ascending.

    Yields
    ------
    tuple of (Frame, ndarray of uint8, shape (H, W, 3))
        The picture is RGB, 0–255.

    Raises
    ------
    ConfigError
        The source does not decode to these frames.
    """
    if not frames:
        return
    if frames[-1].frame_idx - frames[0].frame_idx < STREAMED_FRAMES:
        groups: Iterable[Sequence[Frame]] = (frames,)
    else:
        groups = ((frame,) for frame in frames)
    for group in groups:
        part = replace(source, start_us=group[0].pts_us, end_us=group[-1].pts_us + 1)
        wanted = {frame.frame_idx: frame for frame in group}
        with open_source(part, options) as reader:
            for decoded in reader:
                frame = wanted.pop(decoded.frame_idx, None)
                if frame is not None:
                    yield frame, decoded.image
        for missing in wanted:
            check_same_frame(source, missing, None)
