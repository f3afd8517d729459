"""A film of pictures: H.264 in MP4, as every browser plays it, each picture at its own time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from numpy.typing import NDArray

UInt8Array = NDArray[np.uint8]

TIME_BASE = Fraction(1, 1_000_000)
"""Of the stream: time stamps are kept to the microsecond."""
MAX_WIDTH_PX, MAX_HEIGHT_PX = 4096, 2304
"""What decoders of browsers and of common hardware take (H.264 level 5.1)."""
CRF = "21"
PRESET = "veryfast"
KEY_FRAME_EVERY = "48"
"""So that a click into the time line is answered at once."""
_BT709 = 1
"""Primaries, transfer function and matrix, as ITU-T H.273 numbers them."""


class FilmWriter:
    """An MP4 file under construction.

    Parameters
    ----------
    path : Path
        Where to; overwritten.
    height, width : int
        Size of the pictures in pixels. The film is smaller where they are larger than
        `MAX_HEIGHT_PX` and `MAX_WIDTH_PX`, and its sides are even.
    fps : float or None
        Average rate, for the encoder's rate control; time stamps decide what is played.
    """

    def __init__(self, path: Path, height: int, width: int, fps: float | None) -> None:
        scale = min(1.0, MAX_WIDTH_PX / width, MAX_HEIGHT_PX / height)
        self._width = max(2, round(width * scale) // 2 * 2)
        self._height = max(2, round(height * scale) // 2 * 2)
        self._reformatter = VideoReformatter()
        self._container = av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"})
        rate = Fraction(min(max(fps or 24.0, 1.0), 240.0)).limit_denominator(1001)
        self._stream: Any = self._container.add_stream("libx264", rate=rate)
        self._stream.width, self._stream.height = self._width, self._height
        self._stream.pix_fmt = "yuv420p"
        self._stream.time_base = TIME_BASE
        self._stream.options = {"preset": PRESET, "crf": CRF, "g": KEY_FRAME_EVERY}
        context = self._stream.codec_context
        context.time_base = TIME_BASE
        context.color_range = ColorRange.MPEG
        context.color_primaries = context.color_trc = context.colorspace = _BT709

    def write(self, picture: UInt8Array, pts_us: int, duration_us: int) -> None:
        """Add a picture.

        Parameters
        ----------
        picture : ndarray of uint8, shape (H, W, 3)
            RGB, 0–255.
        pts_us : int
            When it is shown, in microseconds from the start of the film; ascending.
        duration_us : int
            How long, in microseconds.
        """
        rgb = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame: Any = self._reformatter.reformat(
            rgb,
            width=self._width,
            height=self._height,
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation=Interpolation.BILINEAR,
            threads=1,
        )
        frame.pts, frame.time_base, frame.duration = pts_us, TIME_BASE, duration_us
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Finish the file."""
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def abandon(self) -> None:
        """Let go of the file, unfinished."""
        self._container.close()


@contextmanager
def write_film(path: Path, height: int, width: int, fps: float | None) -> Iterator[FilmWriter]:
    """Open a `FilmWriter` that is finished when the context ends well."""
    film = FilmWriter(path, height, width, fps)
    try:
        yield film
    except BaseException:
        film.abandon()
        raise
    film.close()
