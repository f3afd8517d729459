"""Small videos of every kind, made on the fly, whose frames say which frame they are.

Every picture is a grid of 4 × 4 flat cells. The corners are red, green, blue and grey, so that any
wrong rotation, flip or colour conversion shows; the twelve cells between them hold the frame's
index in black and white. `read_index` reads it back from decoded pixels, after any codec.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray
from PIL import Image

GRID = 4
CORNERS = {
    (0, 0): (200, 40, 40),
    (0, 3): (40, 180, 60),
    (3, 0): (40, 60, 200),
    (3, 3): (128, 128, 128),
}
"""Colour of each corner cell, by row and column."""

_BITS = [(row, col) for row in range(GRID) for col in range(GRID) if (row, col) not in CORNERS]

ENCODERS = {
    "h264": ("libx264", {"preset": "ultrafast", "tune": "zerolatency"}),
    "hevc": ("libx265", {"preset": "ultrafast", "x265-params": "log-level=none:pools=1"}),
    "vp9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    "av1": ("libsvtav1", {"preset": "12", "svtav1-params": "lp=1"}),
    "mjpeg": ("mjpeg", {}),
}
"""Encoder and its fastest settings, by the codec's name as the reader reports it."""

CONTAINERS = {
    "mp4": ("h264", "hevc", "av1", "vp9"),
    "mov": ("h264", "hevc", "mjpeg"),
    "mkv": ("h264", "hevc", "vp9", "av1", "mjpeg"),
    "webm": ("vp9", "av1"),
    "avi": ("h264", "mjpeg"),
    "ts": ("h264", "hevc"),
}
"""The codecs that are at home in each container."""


def shared_dir() -> Path:
    """Return the folder of real data, which may not be there."""
    default = Path(__file__).resolve().parents[1] / "../shared"
    return Path(os.environ.get("MASKMILL_SHARED", default)).resolve()


def picture(frame_idx: int, width: int = 96, height: int = 64) -> NDArray[np.uint8]:
    """Return the picture of one frame, uint8 RGB, shape (height, width, 3)."""
    image = np.zeros((height, width, 3), np.uint8)
    rows = np.linspace(0, height, GRID + 1).round().astype(int)
    cols = np.linspace(0, width, GRID + 1).round().astype(int)
    colours: dict[tuple[int, int], tuple[int, int, int]] = dict(CORNERS)
    for bit, cell in enumerate(_BITS):
        colours[cell] = (225,) * 3 if frame_idx >> bit & 1 else (30,) * 3
    for (row, col), colour in colours.items():
        image[rows[row] : rows[row + 1], cols[col] : cols[col + 1]] = colour
    return image


def _cell_means(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    height, width = image.shape[:2]
    means = np.zeros((GRID, GRID, 3))
    for row in range(GRID):
        for col in range(GRID):
            top, left = int((row + 0.3) * height / GRID), int((col + 0.3) * width / GRID)
            bottom, right = int((row + 0.7) * height / GRID), int((col + 0.7) * width / GRID)
            means[row, col] = image[top:bottom, left:right].mean(axis=(0, 1))
    return means


def corner_error(image: NDArray[np.uint8]) -> float:
    """Return the largest difference of a corner cell from its colour, over the three channels."""
    means = _cell_means(image)
    return max(float(np.abs(means[cell] - colour).max()) for cell, colour in CORNERS.items())


def read_index(image: NDArray[np.uint8], *, tolerance: float = 32) -> int:
    """Return the index of the frame from its pixels.

    Raises
    ------
    AssertionError
        The corners do not have their colours: the picture is turned, flipped, torn or miscoloured.
    """
    assert image.dtype == np.uint8
    assert image.ndim == 3
    error = corner_error(image)
    assert error <= tolerance, f"corner colours are off by {error:.0f} of 255: {image.shape = }"
    means = _cell_means(image).mean(axis=2)
    return sum(1 << bit for bit, cell in enumerate(_BITS) if means[cell] > 128)


def write_video(
    path: Path,
    *,
    num_frames: int = 12,
    codec: str = "h264",
    width: int = 96,
    height: int = 64,
    fps: int = 25,
    pix_fmt: str = "yuv420p",
    pts_ms: Sequence[int] | None = None,
    rotation: int = 0,
    hflip: bool = False,
    gop: int = 6,
    b_frames: int = 0,
    matrix: str | None = None,
    full_range: bool = False,
    tagged: bool = True,
    audio: bool = False,
    format: str | None = None,
    encoder_options: Mapping[str, str] | None = None,
    muxer_options: Mapping[str, str] | None = None,
    first_idx: int = 0,
) -> Path:
    """Write a video of `picture` frames and return its path.

    Parameters
    ----------
    pts_ms : sequence of int or None
        Presentation times in milliseconds, for a variable frame rate; None is constant `fps`.
    rotation, hflip
        Display matrix to write: degrees clockwise that a player turns the picture, after which it
        is mirrored. The stored pictures are upright as `picture` makes them.
    matrix : str or None
        ``601``, ``709`` or ``2020``: how RGB became YUV; None is 601.
    tagged : bool
        Write matrix and range into the stream; otherwise a reader has to guess.
    """
    encoder, options = ENCODERS[codec]
    options = dict(options)
    if b_frames and codec == "h264":
        options.pop("tune")
    options |= encoder_options or {}
    with av.open(str(path), "w", format=format, options=dict(muxer_options or {})) as container:
        stream: Any = container.add_stream(encoder, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        context = stream.codec_context
        context.thread_count = 1
        context.gop_size = gop
        context.max_b_frames = b_frames
        if pts_ms is not None:
            context.time_base = Fraction(1, 1000)
        if tagged:
            context.colorspace = {"601": 6, "709": 1, "2020": 9, None: 6}[matrix]
            context.color_range = 2 if full_range else 1
        if rotation or hflip:
            stream.set_display_rotation(-rotation, hflip=hflip)
        sound: Any = container.add_stream("aac", rate=44100) if audio else None
        for idx in range(num_frames):
            frame = av.VideoFrame.from_ndarray(
                picture(first_idx + idx, width, height), format="rgb24"
            ).reformat(
                format=pix_fmt,
                dst_colorspace={"601": Colorspace.ITU601, "709": Colorspace.ITU709}.get(
                    matrix or "601", Colorspace.BT2020
                ),
                dst_color_range=ColorRange.JPEG if full_range else ColorRange.MPEG,
            )
            if pts_ms is not None:
                frame.pts, frame.time_base = pts_ms[idx], Fraction(1, 1000)
            else:
                frame.pts, frame.time_base = idx, Fraction(1, fps)
            container.mux(stream.encode(frame))
            if sound is not None and idx * 44100 // fps % 1024 < 44100 // fps:
                container.mux(sound.encode(_silence(idx * 44100 // fps)))
        container.mux(stream.encode(None))
        if sound is not None:
            container.mux(sound.encode(None))
    return path


def _silence(start: int, num_samples: int = 1764) -> Any:
    frame: Any = av.AudioFrame.from_ndarray(
        np.zeros((2, num_samples), np.float32), format="fltp", layout="stereo"
    )
    frame.sample_rate, frame.pts, frame.time_base = 44100, start, Fraction(1, 44100)
    return frame


def write_audio_only(path: Path) -> Path:
    """Write a file with a video's name that holds one second of silence."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=44100)
        for start in range(0, 44100, 1764):
            container.mux(stream.encode(_silence(start)))
        container.mux(stream.encode(None))
    return path


def write_encrypted(path: Path, **options: Any) -> Path:
    """Write an MP4 under common encryption (CENC), as a DRM packager would."""
    return write_video(
        path,
        muxer_options={
            "encryption_scheme": "cenc-aes-ctr",
            "encryption_key": "76a6c65c5ea762046bd749a2e632ccbb",
            "encryption_kid": "a7e61c373e219033c21091fa607bf3b8",
        },
        **options,
    )


def write_undecodable(path: Path) -> Path:
    """Write a well-formed MP4 whose every video sample is noise: no frame can be decoded."""
    write_video(path, num_frames=8, gop=1)
    data = bytearray(path.read_bytes())
    noise = np.random.default_rng(0)
    with av.open(str(path)) as container:
        spans = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for position, size in spans:
        assert position is not None
        data[position : position + size] = noise.bytes(size)
    path.write_bytes(data)
    return path


def truncate(path: Path, share: float) -> Path:
    """Cut a file's tail off, keeping `share` of its bytes."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def corrupt_packets(path: Path, indices: Sequence[int]) -> Path:
    """Overwrite whole video samples of a file with zeros, so that they cannot be decoded."""
    with av.open(str(path)) as container:
        spans = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for index in indices:
        position, size = spans[index]
        assert position is not None
        data[position : position + size] = bytes(size)
    path.write_bytes(data)
    return path


def write_frames(
    folder: Path,
    *,
    num_frames: int = 6,
    width: int = 96,
    height: int = 64,
    suffix: str = ".jpg",
    name: str = "{:05d}",
) -> Path:
    """Write a folder of frames and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"quality": 92} if suffix in (".jpg", ".jpeg", ".webp") else {}
    for idx in range(num_frames):
        Image.fromarray(picture(idx, width, height)).save(
            folder / (name.format(idx) + suffix), **options
        )
    return folder
