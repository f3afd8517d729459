"""Container files (MP4, MOV, MKV, WebM, AVI, TS, ...) through PyAV, that is FFmpeg's libraries.

Colour. Pictures become 8-bit full-range RGB with the matrix and the range the stream names (BT.601,
BT.709, BT.2020, limited or full). A stream that names no matrix gets BT.709 when it is wider than
1279 or higher than 576 pixels, BT.601 otherwise, as video players guess. Transfer functions are
left alone: HDR is not tone-mapped. Pixels stay as stored: an anamorphic stream is not stretched.

Sizes. Rotation and mirroring of the display matrix are applied. If the picture size changes within
a stream (some screen and conference recordings), later pictures are scaled to the first one's
size, as the `ffmpeg` program does, so that one video has one coordinate system; they are counted.

Errors. A packet that cannot be decoded is left out and counted, and decoding goes on: frame_idx
counts the frames that came out.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import av
import numpy as np
from av.error import EOFError as AVEOFError
from av.error import FFmpegError
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from numpy.typing import NDArray

from workers.decode.reader import DecodedFrame, VideoHeader
from workers.errors import InputError
from workers.messages import VideoSource

SEEK_AFTER_US = 10_000_000
"""A range that starts later than this is reached by a seek where that keeps frame_idx exact."""

_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpegtsraw,mpeg,mpegvideo,flv,asf,ogg,mxf,"
    "h264,hevc,m4v,ivf,obu,av1,mjpeg,gif,dv,nut,rm,wtv,aac,mp3,wav,flac"
)
"""Demuxers that may be tried. Left out on purpose: playlists and scripts (hls, concat, dash), which
can name other files and hosts; pictures and text, which FFmpeg would play as videos."""

_SEEKABLE_FORMATS = ("mov", "matroska")
_SEEKABLE_CODECS = ("h264", "hevc", "vp9", "av1", "mjpeg", "prores", "ffv1")
"""Where one packet is one shown frame, so that packets can be counted instead of decoded."""

_WITHOUT_PTS = ("avi", "h264", "hevc", "m4v", "mpegvideo", "mjpeg", "obu")
"""Formats that store no presentation time, only an order."""

_VFR_INDEX, _VFR_PACKETS, _VFR_REORDERED = 512, 24, 6
"""How much of a video's beginning is looked at to guess whether its rate varies."""

_MAX_READ_ERRORS = 32
"""Read errors in a row after which the rest of a file counts as lost."""

_MATRIX_UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED

_MAGIC = (
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"%PDF", "a PDF document"),
    (b"PAR1", "a Parquet file"),
    (b"Rar!", "a RAR archive"),
    (b"7z\xbc\xaf", "a 7-Zip archive"),
)


@dataclass(slots=True)
class ContainerReader:
    """One container file; see `VideoReader` for what it promises.

    Parameters
    ----------
    source : VideoSource
        Name, range and stride.
    path : Path
        The file on a local disk.
    num_threads : int
        Threads of the decoder and of the colour conversion.
    """

    source: VideoSource
    path: Path
    num_threads: int = 1
    header: VideoHeader = field(init=False)
    num_decoded: int = field(init=False, default=0)
    num_corrupt: int = field(init=False, default=0)
    num_frames: int | None = field(init=False, default=None)
    num_resized: int = field(init=False, default=0)
    vfr: bool = field(init=False, default=False)
    truncated: bool = field(init=False, default=False)
    truncation: str | None = field(init=False, default=None)
    _decoder: _Decoder = field(init=False)
    _first: Any = field(init=False, default=None)
    _reformatter: Any = field(init=False)
    _started: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self._reformatter = VideoReformatter()
        self._decoder = _Decoder(self.path, self.source.name, self.num_threads)
        try:
            self._first = self._decoder.first_frame()
            self.header = describe(self._decoder.container, self._decoder.stream, self._first)
        except BaseException:
            self._decoder.close()
            raise

    def __iter__(self) -> Iterator[DecodedFrame]:
        """Yield the tracked frames; see `VideoReader`."""
        if self._started:
            raise RuntimeError(f"{self.source.name} was read already: open it again")
        self._started = True
        return self._tracked()

    def close(self) -> None:
        """Free the decoder; harmless when called again."""
        self._decoder.close()
        self._first = None

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
        start_us, end_us = self.source.start_us or 0, self.source.end_us
        in_range = 0
        frame_idx, last_us = -1, 0
        for frame_idx, pts_us, frame in self._timed(start_us):
            last_us = pts_us
            if pts_us < start_us:
                continue
            if end_us is not None and pts_us >= end_us:
                break
            if in_range % self.source.stride == 0:
                yield DecodedFrame(frame_idx, pts_us, self._to_rgb(frame))
            in_range += 1
        else:
            self.num_frames = frame_idx + 1
            self._judge_end()
        if not in_range:
            raise InputError(
                f"{self.source.name} has no frame between {_seconds(start_us)} and "
                f"{_seconds(end_us)}, its last one decoded is at {_seconds(last_us)}: "
                "correct start_s and end_s"
            )

    def _timed(self, start_us: int) -> Iterator[tuple[int, int, Any]]:
        """Yield every decoded frame from the start or a seek point with its index and time."""
        clock = _Clock(self._decoder)
        first_idx, frames = 0, self._decoder.frames(self._first)
        if start_us > SEEK_AFTER_US:
            sought = self._seek(clock, start_us)
            if sought is not None:
                first_idx, frames = sought
            else:
                self.num_decoded = 0
        self._first = None
        for frame_idx, frame in enumerate(frames, first_idx):
            self.num_decoded += 1
            self.num_corrupt = self._decoder.num_corrupt
            yield frame_idx, clock.time_us(frame, frame_idx), frame
            self.vfr = clock.vfr
        self.num_corrupt = self._decoder.num_corrupt
        self.vfr = clock.vfr

    def _seek(self, clock: _Clock, start_us: int) -> tuple[int, Iterator[Any]] | None:
        """Jump to the key frame before `start_us`; None where the index would not be certain.

        The packets before the range are counted, not decoded. That is exact where one packet is
        one frame; the stretch from the key frame to the range is decoded anyway and must agree
        with the count, frame by frame, or the file is decoded from its beginning.
        """
        order = _packet_order(self.path, self._decoder, clock, start_us)
        if order is None or self._first.pts != order.pts[0]:
            return None
        decoder = _Decoder(self.path, self.source.name, self.num_threads)
        ahead: list[Any] = []
        try:
            decoder.container.seek(order.key_pts, stream=decoder.stream, backward=True)
            stretch = order.pts[order.pts.searchsorted(order.key_pts) : order.first + 1]
            for frame in decoder.frames():
                if frame.pts is not None and frame.pts < order.key_pts:
                    continue  # leading pictures of an open group: their references are missing
                self.num_decoded += 1
                if len(ahead) < len(stretch) and frame.pts == stretch[len(ahead)]:
                    ahead.append(frame if len(ahead) == len(stretch) - 1 else None)
                    if len(ahead) == len(stretch):
                        break
                else:
                    decoder.close()
                    return None
            if len(ahead) != len(stretch) or decoder.num_corrupt:
                decoder.close()
                return None
        except FFmpegError:
            decoder.close()
            return None
        self._decoder.close()
        self._decoder = decoder
        self.num_decoded -= 1  # the last one comes out again, as the first of the range
        return order.first, decoder.frames(ahead[-1])

    def _to_rgb(self, frame: Any) -> NDArray[np.uint8]:
        turned = self.header.rotation in (90, 270)
        width = self.header.height if turned else self.header.width
        height = self.header.width if turned else self.header.height
        if (frame.width, frame.height) != (width, height):
            self.num_resized += 1
        image = to_rgb(
            frame, self._reformatter, width, height, self.source.name, threads=self.num_threads
        )
        return turn(image, self.header.rotation, self.header.mirrored)

    def _judge_end(self) -> None:
        self.truncation = self._decoder.truncation(self.path)
        self.truncated = self.truncation is not None


class _Decoder:
    """The packets and frames of one open file, errors skipped and counted."""

    def __init__(
        self,
        file: str | Path | BinaryIO,
        name: str,
        num_threads: int,
        max_packets: int | None = None,
    ) -> None:
        self.name = name
        self.max_packets = max_packets
        self.container = open_container(file, name)
        try:
            self.stream = video_stream(self.container, name)
        except InputError:
            self.container.close()
            raise
        self.stream.codec_context.thread_count = num_threads
        self.stream.codec_context.thread_type = "NONE" if num_threads == 1 else "AUTO"
        self.num_corrupt = 0
        self.num_packets = 0
        self.num_slots = 0
        """Frame slots passed, in formats whose time is a count of frames."""
        self.last_dts: int | None = None
        """Decoding time of the last whole packet, in ticks."""
        self.cut_packet = False
        self.read_error: str | None = None
        self.end_us = 0
        """End of the last packet of any stream."""
        self.video_end_us = 0
        """End of the last video packet."""
        self.slots: deque[int] | None = deque() if _short(self.container) in _WITHOUT_PTS else None
        """Times of the packets whose frames are still to come, where there is no other time."""
        self._frames = self._decode()

    def first_frame(self) -> Any:
        """Return the first frame that can be decoded."""
        for frame in self._frames:
            return frame
        raise InputError(
            f"{self.name} holds a video stream ({codec_name(self.stream)}) of which no frame can "
            "be decoded: check the file with a player, then replace it or remove it from the corpus"
        )

    def frames(self, first: Any = None) -> Iterator[Any]:
        """Yield `first`, if given, then every frame that is still to come."""
        if first is not None:
            yield first
            del first
        # not `yield from`: dropping this iterator must not end the one below it
        for frame in self._frames:  # noqa: UP028
            yield frame

    def close(self) -> None:
        # a suspended generator holds the codec's packet: end it before the container goes
        with contextlib.suppress(ValueError, RuntimeError):
            self._frames.close()
        self.container.close()

    def truncation(self, path: Path) -> str | None:
        """Say how the file shows that its tail is missing; None if it does not. After the end."""
        container = _short(self.container)
        if container == "mov":
            # by time, not by count: after a seek only some of the packets were read
            entries = self.stream.index_entries
            reached = -(1 << 63) if self.last_dts is None else self.last_dts
            if len(entries) and entries[len(entries) - 1].timestamp > reached:
                whole = sum(entry.timestamp <= reached for entry in entries)
                return f"the file ends after {whole} of the {len(entries)} frames of its index"
        elif container == "avi" and self.num_slots < self.stream.frames:
            # slots, not packets: a slot without data repeats the picture before it
            return (
                f"the file ends after {self.num_slots} of the {self.stream.frames} frames of its "
                "index"
            )
        if self.cut_packet:
            return "the file ends in the middle of a frame"
        if self.read_error is not None:
            return f"reading stopped before the end: {self.read_error}"
        if container == "mpegts":
            size = path.stat().st_size
            if all(size % packet for packet in (188, 192, 204)):
                return "the file ends in the middle of a transport packet"
        elif container in ("matroska", "webm", "mov"):
            return self._missing_time()
        return None

    def _missing_time(self) -> str | None:
        tag = self.stream.metadata.get("DURATION")
        stated_us, reached_us = 0, self.end_us
        if tag is not None:
            stated_us, reached_us = _parse_duration_us(tag), self.video_end_us
        elif self.container.duration is not None:
            stated_us = self.container.duration
        rate = self.stream.average_rate
        # headers round, and the last frame's own duration is often unknown
        slack_us = max(500_000, 3 * int(1e6 / rate) if rate else 0)
        slack_us = min(slack_us, max(stated_us // 10, 3 * int(1e6 / rate) if rate else 0))
        if stated_us and reached_us + slack_us < stated_us:
            return (
                f"the file ends at {_seconds(reached_us)} of the {_seconds(stated_us)} "
                "its header states"
            )
        return None

    def _decode(self) -> Generator[Any, None, None]:
        for packet in self._packets():
            if packet.dts is not None:
                self.num_slots = packet.dts + 1
            if self.slots is not None and packet.size:
                self.slots.append(packet.dts if packet.dts is not None else self.num_packets - 1)
            try:
                frames = packet.decode()
            except AVEOFError:
                return
            except FFmpegError:
                self.num_corrupt += 1
                if self.slots:
                    self.slots.pop()
                continue
            for frame in frames:
                if frame.is_corrupt:
                    self.num_corrupt += 1
                    if self.slots:
                        self.slots.popleft()
                    continue
                yield frame

    def _packets(self) -> Iterator[Any]:
        """Yield the video's packets and the flush at the end; survive errors on the way."""
        num_errors = 0
        source = self.container.demux()
        index = self.stream.index
        while True:
            try:
                packet = next(source)
            except StopIteration:
                return
            except FFmpegError as error:
                num_errors += 1
                self.num_corrupt += 1
                if num_errors >= _MAX_READ_ERRORS or isinstance(error, AVEOFError):
                    self.read_error = str(error.strerror or error)
                    yield from _flush(self.stream)
                    return
                source = self.container.demux()
                continue
            num_errors = 0
            self._note_time(packet)
            if packet.stream.index != index:
                continue
            if packet.size:
                if packet.has_sidedata("encryption_info"):
                    raise InputError(
                        f"{self.name} is encrypted (common encryption, DRM): decrypt it first, or "
                        "remove it from the corpus"
                    )
                self.num_packets += 1
                if self.max_packets is not None and self.num_packets > self.max_packets:
                    return
                if packet.is_corrupt and _short(self.container) != "mpegts":
                    # the demuxer got less of it than the index states; half a picture is none
                    self.cut_packet = True
                    self.num_corrupt += 1
                    continue
                if packet.dts is not None:
                    self.last_dts = packet.dts
            yield packet

    def _note_time(self, packet: Any) -> None:
        if packet.pts is None or packet.time_base is None:
            return
        end = (packet.pts + (packet.duration or 0)) * packet.time_base
        end_us = int(end * 1_000_000)
        self.end_us = max(self.end_us, end_us)
        if packet.stream.index == self.stream.index:
            self.video_end_us = max(self.video_end_us, end_us)


class _Clock:
    """Presentation times in microseconds from the first frame, which never run backwards."""

    def __init__(self, decoder: _Decoder) -> None:
        self.slots = decoder.slots
        self.time_base = decoder.stream.time_base
        rate = decoder.stream.average_rate or decoder.stream.base_rate
        self.step_us = int(1_000_000 / rate) if rate else 40_000
        self.vfr = False
        self._origin: int | None = None
        self._shift_us = 0
        self._last: tuple[int, int] | None = None
        self._shortest_us, self._longest_us = 1 << 62, 0

    def set_origin(self, pts: int) -> None:
        self._origin = pts

    def pts_to_us(self, pts: int) -> int:
        """Return the time of a raw timestamp, rounded to the nearest microsecond."""
        assert self._origin is not None
        ticks = (pts - self._origin) * self.time_base.numerator * 1_000_000
        return int((2 * ticks + self.time_base.denominator) // (2 * self.time_base.denominator))

    def time_us(self, frame: Any, frame_idx: int) -> int:
        """Return the time of the next frame.

        A frame without a timestamp, or one that does not advance (a splice), follows the frame
        before it by one nominal frame duration, and the frames after it keep their distances.
        """
        if self.slots is not None:
            pts = self.slots.popleft() if self.slots else None
        else:
            pts = frame.pts if frame.pts is not None else frame.dts
        if pts is not None and self._origin is None:
            self.set_origin(pts)
        last_us = self._last[1] if self._last is not None else -self.step_us
        if pts is None:
            time_us = last_us + self.step_us
        else:
            time_us = self.pts_to_us(pts) + self._shift_us
            if time_us <= last_us:
                self._shift_us += last_us + self.step_us - time_us
                time_us = last_us + self.step_us
        if self._last is not None and self._last[0] == frame_idx - 1:
            self._note_step(time_us - last_us)
        self._last = frame_idx, time_us
        return time_us

    def _note_step(self, step_us: int) -> None:
        self._shortest_us = min(self._shortest_us, step_us)
        self._longest_us = max(self._longest_us, step_us)
        # ticks round each time by up to half of one, so two steps may differ by two of them
        tick_us = float(self.time_base) * 1e6
        allowed_us = 2 * tick_us + 0.02 * self._longest_us + 2
        self.vfr = self._longest_us - self._shortest_us > allowed_us


@dataclass(frozen=True, slots=True)
class _PacketOrder:
    """Presentation times of the packets up to the range, counted without decoding."""

    pts: NDArray[np.int64]
    """Ascending, in ticks of the stream."""
    first: int
    """Position in `pts`, hence frame_idx, of the first frame of the range."""
    key_pts: int
    """Time of the last key frame that is not after it."""


def _packet_order(
    path: Path, decoder: _Decoder, clock: _Clock, start_us: int
) -> _PacketOrder | None:
    if _short(decoder.container) not in _SEEKABLE_FORMATS:
        return None
    if codec_name(decoder.stream) not in _SEEKABLE_CODECS:
        return None
    times: list[int] = []
    keys: list[int] = []
    wanted: int | None = None
    with av.open(str(path), metadata_errors="ignore", options=_open_options()) as container:
        stream = container.streams[decoder.stream.index]
        try:
            for packet in container.demux(stream):
                if not packet.size:
                    continue
                if packet.pts is None or packet.is_corrupt or packet.is_discard:
                    return None
                if not times:
                    clock.set_origin(packet.pts)
                # decoding order only grows, and no frame is shown before it is decoded
                if wanted is not None and packet.dts is not None and packet.dts > wanted:
                    break
                times.append(packet.pts)
                if packet.is_keyframe:
                    keys.append(packet.pts)
                if clock.pts_to_us(packet.pts) >= start_us:
                    wanted = packet.pts if wanted is None else min(wanted, packet.pts)
        except FFmpegError:
            return None
    pts = np.unique(np.asarray(times, np.int64))
    if wanted is None or len(pts) != len(times) or not keys or pts[0] != times[0]:
        return None
    key_pts = max((key for key in keys if key <= wanted), default=None)
    if key_pts is None:
        return None
    return _PacketOrder(pts, int(pts.searchsorted(wanted)), key_pts)


def read_header(
    file: str | Path | BinaryIO, name: str, *, max_packets: int = 256
) -> tuple[VideoHeader, bool]:
    """Read what a container states, and decode its first frame, reading as little as that takes.

    Parameters
    ----------
    file : str, Path or BinaryIO
        Path, or a seekable stream of bytes.
    name : str
        How messages call it.
    max_packets : int
        Give a video up that shows no frame within so many packets.

    Returns
    -------
    header : VideoHeader
        As a reader would state it.
    vfr : bool
        Whether the frame rate seems to vary, judged by the beginning of the index.

    Raises
    ------
    InputError
        As `open_video`.
    """
    decoder = _Decoder(file, name, 1, max_packets)
    try:
        header = describe(decoder.container, decoder.stream, decoder.first_frame())
        return header, _seems_vfr(decoder)
    finally:
        decoder.close()


def _seems_vfr(decoder: _Decoder) -> bool:
    stream = decoder.stream
    if _short(decoder.container) == "mov":
        times = [entry.timestamp for entry in stream.index_entries[:_VFR_INDEX]]
    else:
        average, base = stream.average_rate, stream.base_rate
        # the base rate fits every timestamp that FFmpeg looked at: far above the average one if
        # they are not evenly spaced
        if average and base and abs(float(base / average) - 1) > 0.02:
            return True
        packets = itertools.islice(decoder.container.demux(stream), _VFR_PACKETS)
        try:
            times = [packet.pts for packet in packets if packet.pts is not None]
        except FFmpegError:
            return False
        # in decoding order the last few may still lack a neighbour that is shown before them
        times = sorted(times)[: max(0, len(times) - _VFR_REORDERED)]
    steps = np.diff(np.asarray(times, np.int64))
    return bool(len(steps)) and int(np.ptp(steps)) > max(2, int(0.02 * steps.max()))


def open_container(file: str | Path | BinaryIO, name: str) -> Any:
    """Open a file or a seekable stream as a video container.

    Parameters
    ----------
    file : str, Path or BinaryIO
        Path, or a seekable stream of bytes.
    name : str
        How messages call it.

    Raises
    ------
    InputError
        It is not a video container, or a cut one; the sentence says what it is instead.
    """
    path = Path(file) if isinstance(file, (str, Path)) else None
    if path is not None and path.stat().st_size == 0:
        raise InputError(empty_sentence(name))
    target = str(path) if path is not None else file
    try:
        return av.open(target, mode="r", metadata_errors="ignore", options=_open_options())
    except (FFmpegError, ValueError) as error:
        with path.open("rb") if path is not None else contextlib.nullcontext(file) as stream:
            size_bytes = stream.seek(0, 2)  # type: ignore[union-attr]
            raise InputError(why_unreadable(stream, size_bytes, name)) from error  # type: ignore[arg-type]


def empty_sentence(name: str) -> str:
    """Return the sentence for a file without content."""
    return f"{name} is empty (0 bytes): upload it again or remove it from the corpus"


def why_unreadable(stream: BinaryIO, size_bytes: int, name: str) -> str:
    """Return a sentence that says what a file is that cannot be opened as a video."""
    if size_bytes == 0:
        return empty_sentence(name)
    stream.seek(0)
    head = stream.read(4096)
    if _is_cut_mp4(stream, head, size_bytes):
        return (
            f"{name} is cut off: it is an MP4 or MOV file that ends before its index (moov), "
            "without which no frame can be found: upload it again"
        )
    for magic, what in _MAGIC:
        if head.startswith(magic):
            return f"{name} is {what}, not a video: remove it from the corpus"
    if not any(head):
        return f"{name} begins with zeros only, not with a video: upload it again"
    with contextlib.suppress(UnicodeDecodeError):
        text = head[: len(head) - 4].decode() if len(head) > 8 else head.decode()
        if all(char.isprintable() or char.isspace() for char in text):
            return f"{name} is text, not a video: remove it from the corpus"
    return (
        f"{name} is not a video in a format that can be read (MP4, MOV, MKV, WebM, AVI, TS, ...), "
        "or its beginning is damaged: check it with a player, then replace it or remove it from "
        "the corpus"
    )


def video_stream(container: Any, name: str) -> Any:
    """Return the best video stream, cover pictures left aside.

    Raises
    ------
    InputError
        There is none.
    """
    cover = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        audio = [stream.codec_context.name for stream in container.streams.audio]
        holds = f", only audio ({', '.join(audio)})" if audio else ""
        raise InputError(f"{name} holds no video stream{holds}: remove it from the corpus")
    best = container.streams.best("video")
    stream = next((s for s in streams if best is not None and s.index == best.index), streams[0])
    if stream.codec_context is None:
        raise InputError(
            f"{name} is coded in a format that this FFmpeg cannot decode: convert it to H.264"
        )
    return stream


def describe(container: Any, stream: Any, first: Any) -> VideoHeader:
    """Return the header of an open container whose first frame is decoded."""
    rotation, mirrored = orientation(first)
    width, height = first.width, first.height
    if rotation in (90, 270):
        width, height = height, width
    rate = stream.average_rate or stream.base_rate
    duration_us: int | None = None
    if stream.duration is not None and stream.time_base is not None:
        duration_us = round(stream.duration * stream.time_base * 1_000_000)
    elif "DURATION" in stream.metadata:
        duration_us = _parse_duration_us(stream.metadata["DURATION"])
    if not duration_us:
        duration_us = container.duration
    num_frames = stream.frames or None
    if num_frames is None and duration_us and rate:
        num_frames = max(1, round(duration_us * rate / 1_000_000))
    return VideoHeader(
        codec=codec_name(stream),
        container=_short(container),
        decoder=f"pyav {av.__version__} {stream.codec_context.codec.name}",
        pixel_format=first.format.name,
        width=width,
        height=height,
        rotation=rotation,
        mirrored=mirrored,
        fps=float(rate) if rate else None,
        num_frames=num_frames,
        duration_us=duration_us,
    )


def codec_name(stream: Any) -> str:
    """Return the coding format of a stream, whichever decoder is used: ``av1``, not a library."""
    return str(stream.codec_context.codec.canonical_name)


def orientation(frame: Any) -> tuple[int, bool]:
    """Return the degrees clockwise, and whether to mirror after that, that make a frame upright.

    The display matrix maps a stored point (x right, y down) to the displayed one; whatever it
    holds is rounded to the nearest multiple of 90 degrees.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return 0, False
    matrix = np.frombuffer(bytes(data), np.int32)
    a, b, c, d = (int(matrix[i]) for i in (0, 1, 3, 4))
    mirrored = a * d - b * c < 0
    if mirrored:
        a = -a
    if abs(a) >= abs(b):
        return (0 if a >= 0 else 180), mirrored
    return (90 if b > 0 else 270), mirrored


def turn(image: NDArray[np.uint8], rotation: int, mirrored: bool) -> NDArray[np.uint8]:
    """Return an image turned clockwise by a multiple of 90 degrees, then mirrored if asked."""
    if not rotation and not mirrored:
        return image
    import cv2

    turns = {90: cv2.ROTATE_90_CLOCKWISE, 180: cv2.ROTATE_180, 270: cv2.ROTATE_90_COUNTERCLOCKWISE}
    if rotation:
        image = cv2.rotate(image, turns[rotation])
    return cv2.flip(image, 1) if mirrored else image


def to_rgb(
    frame: Any, reformatter: Any, width: int, height: int, name: str, *, threads: int = 1
) -> NDArray[np.uint8]:
    """Return a decoded frame as uint8 RGB of the given size, in memory of its own."""
    matrix = None
    if frame.colorspace == _MATRIX_UNSPECIFIED:
        is_hd = frame.width >= 1280 or frame.height > 576
        matrix = Colorspace.ITU709 if is_hd else Colorspace.ITU601
    try:
        rgb = reformatter.reformat(
            frame,
            width=width,
            height=height,
            format="rgb24",
            src_colorspace=matrix,
            # bit-exact paths give the same pixels on every processor, at the same speed
            interpolation=Interpolation.BILINEAR | Interpolation.BITEXACT,
            threads=threads,  # the library's default is one thread for every core
        )
    except (FFmpegError, ValueError) as error:
        raise InputError(
            f"{name} has pictures of format {frame.format.name} that cannot be turned into RGB "
            f"({error}): convert it to 8-bit YUV 4:2:0"
        ) from error
    plane = rgb.planes[0]
    if rgb is not frame and plane.line_size == 3 * width:
        # the converted frame is new each time and lives as long as this view of it: no copy
        pixels = np.frombuffer(plane, np.uint8, count=3 * width * height)
        return pixels.reshape(height, width, 3)
    image: NDArray[np.uint8] = rgb.to_ndarray()
    return np.ascontiguousarray(image)


def _flush(stream: Any) -> Iterator[Any]:
    packet = av.Packet()
    packet.stream = stream
    yield packet


def _open_options() -> dict[str, str]:
    return {"format_whitelist": _FORMATS, "protocol_whitelist": "file,pipe"}


def _short(container: Any) -> str:
    """Return the container's format as one word."""
    name = str(container.format.name)
    if name.startswith("mov"):
        return "mov"
    return "matroska" if name.startswith("matroska") else name


def _is_cut_mp4(stream: BinaryIO, head: bytes, size_bytes: int) -> bool:
    """Walk the top-level boxes of an MP4 or MOV file: True if they start well and lack `moov`."""
    if head[4:8] not in (b"ftyp", b"mdat", b"wide", b"free", b"skip", b"moov"):
        return False
    position = 0
    while position + 8 <= size_bytes:
        stream.seek(position)
        box = stream.read(16)
        length, kind = int.from_bytes(box[:4], "big"), box[4:8]
        if length == 1:
            length = int.from_bytes(box[8:16], "big")
        if kind == b"moov":
            return position + length > size_bytes
        if length == 0:
            return True  # this box claims the rest of the file
        if length < 8:
            return False
        position += length
    return True


def _parse_duration_us(text: str) -> int:
    """Return the microseconds of Matroska's ``HH:MM:SS.nnnnnnnnn``; 0 if it is something else."""
    with contextlib.suppress(ValueError):
        hours, minutes, seconds = text.strip("\0 ").split(":")
        return int(hours) * 3_600_000_000 + int(minutes) * 60_000_000 + round(float(seconds) * 1e6)
    return 0


def _seconds(time_us: int | None) -> str:
    return "the end" if time_us is None else f"{time_us / 1e6:.3f} s"
