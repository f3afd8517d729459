"""Container files: what a reader promises, for every format we claim.

* Every frame of every container and codec comes out once, in presentation order, with its own
  index and time; the pixels say which frame it is.
* Ranges are half-open and in time; stride counts from the first frame of the range; frame_idx is
  the index in the whole source whatever the range, also where the range is reached by a seek.
* Display matrices (four rotations, with and without mirroring), odd sizes, 10-bit, 4:2:2, 4:4:4,
  limited and full range, BT.601 and BT.709 come out upright and in the right colours.
* A cut-off file yields what decodes and says that it is truncated; a whole one never does.
* Packets that cannot be decoded are left out and counted.
* What cannot be used is an InputError of one sentence that names the file and a remedy.
* One thread means one thread; images own their memory.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tests import media
from workers.decode import container
from workers.decode.reader import DecodedFrame, LocalVideo, VideoReader, open_video
from workers.errors import InputError
from workers.messages import SourceKind, VideoSource

EVERY_KIND = [(ext, codec) for ext, codecs in media.CONTAINERS.items() for codec in codecs]


def open_file(path: Path, *, num_threads: int = 1, **part: Any) -> VideoReader:
    source = VideoSource(1, str(path), path.name, SourceKind.FILE, **part)
    return open_video(source, LocalVideo(path=path), num_threads=num_threads)


def read(path: Path, **part: Any) -> tuple[list[DecodedFrame], VideoReader]:
    with open_file(path, **part) as reader:
        return list(reader), reader


def indices(frames: Sequence[DecodedFrame]) -> list[int]:
    """Return what the pixels say."""
    return [media.read_index(frame.image) for frame in frames]


def write_kind(path: Path, codec: str, **options: Any) -> Path:
    if codec == "mjpeg":
        options |= {"pix_fmt": "yuvj420p", "full_range": True}
    return media.write_video(path, codec=codec, **options)


@pytest.mark.parametrize(("ext", "codec"), EVERY_KIND)
def test_every_container_and_codec(tmp_path: Path, ext: str, codec: str) -> None:
    path = write_kind(tmp_path / f"clip.{ext}", codec, num_frames=20)
    frames, reader = read(path)
    assert [frame.frame_idx for frame in frames] == list(range(20))
    assert indices(frames) == list(range(20))
    assert [frame.pts_us for frame in frames] == [40_000 * idx for idx in range(20)]
    header = reader.header
    assert (header.codec, header.width, header.height) == (codec, 96, 64)
    assert header.fps == pytest.approx(25)
    assert header.num_frames == 20
    assert header.duration_us == pytest.approx(800_000, abs=1_000)
    assert (reader.num_decoded, reader.num_corrupt, reader.num_resized) == (20, 0, 0)
    assert (reader.truncated, reader.truncation, reader.vfr) == (False, None, False)


@pytest.mark.parametrize("ext", ["mp4", "mkv", "avi", "ts"])
def test_reordered_frames_come_out_in_presentation_order(tmp_path: Path, ext: str) -> None:
    path = media.write_video(tmp_path / f"clip.{ext}", num_frames=24, gop=12, b_frames=3)
    frames, reader = read(path)
    assert indices(frames) == list(range(24))
    assert [frame.pts_us for frame in frames] == [40_000 * idx for idx in range(24)]
    assert not reader.truncated
    assert not reader.vfr


@pytest.mark.parametrize("ext", ["mp4", "mkv"])
def test_variable_frame_rate(tmp_path: Path, ext: str) -> None:
    times = [0, 10, 50, 60, 200, 210, 220, 300, 400, 500, 510, 999]
    path = media.write_video(tmp_path / f"clip.{ext}", pts_ms=times)
    frames, reader = read(path)
    assert [frame.pts_us for frame in frames] == [1000 * time for time in times]
    assert reader.vfr
    assert not reader.truncated

    frames, _ = read(path, start_us=50_000, end_us=400_000, stride=2)
    assert [frame.pts_us for frame in frames] == [50_000, 200_000, 220_000]
    assert [frame.frame_idx for frame in frames] == [2, 4, 6]


def test_time_starts_at_the_first_frame(tmp_path: Path) -> None:
    # TS muxers start far from zero, and so do streams cut from a broadcast
    path = media.write_video(
        tmp_path / "clip.ts", muxer_options={"output_ts_offset": "5000"}, num_frames=5
    )
    frames, _ = read(path)
    assert [frame.pts_us for frame in frames] == [0, 40_000, 80_000, 120_000, 160_000]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"start_us": 0, "end_us": 120_000}, [0, 1, 2]),
        ({"start_us": 120_001}, [4, 5, 6, 7, 8, 9, 10, 11]),
        ({"end_us": 120_001}, [0, 1, 2, 3]),
        ({"stride": 5}, [0, 5, 10]),
        ({"start_us": 40_000, "stride": 5}, [1, 6, 11]),
        ({"start_us": 30_000, "end_us": 10**12, "stride": 100}, [1]),
    ],
)
def test_ranges_and_strides(tmp_path: Path, part: dict[str, int], expected: list[int]) -> None:
    path = media.write_video(tmp_path / "clip.mp4", num_frames=12)
    frames, _ = read(path, **part)
    assert [frame.frame_idx for frame in frames] == expected
    assert indices(frames) == expected


def test_a_range_outside_the_video_is_an_input_error(tmp_path: Path) -> None:
    path = media.write_video(tmp_path / "clip.mp4", num_frames=12)
    with pytest.raises(InputError, match=r"clip\.mp4 has no frame between 2\.000 s and 3\.000 s"):
        read(path, start_us=2_000_000, end_us=3_000_000)


@pytest.mark.parametrize("ext", ["mp4", "mkv"])
@pytest.mark.parametrize("codec", ["h264", "hevc", "vp9"])
@pytest.mark.parametrize("start_us", [400_000, 1_234_567, 2_360_000])
def test_a_late_range_is_reached_by_a_seek(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ext: str, codec: str, start_us: int
) -> None:
    # given a range that starts behind several key frames, among reordered frames
    path = media.write_video(
        tmp_path / f"clip.{ext}", codec=codec, num_frames=60, gop=8, b_frames=2 * (codec != "vp9")
    )
    part = {"start_us": start_us, "end_us": start_us + 200_000, "stride": 2}
    # when it is read once from the start, once with seeks allowed anywhere
    plain, plain_reader = read(path, **part)
    monkeypatch.setattr(container, "SEEK_AFTER_US", 0)
    sought, sought_reader = read(path, **part)
    # then the frames are the same, bit for bit, and fewer were decoded
    assert [(f.frame_idx, f.pts_us) for f in sought] == [(f.frame_idx, f.pts_us) for f in plain]
    for one, other in zip(sought, plain, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
    assert indices(sought) == [frame.frame_idx for frame in sought]
    assert sought_reader.num_decoded < plain_reader.num_decoded


@pytest.mark.parametrize("ext", ["mp4", "mkv"])
def test_truncation_shows_after_a_seek_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ext: str
) -> None:
    monkeypatch.setattr(container, "SEEK_AFTER_US", 0)
    path = media.write_video(
        tmp_path / f"clip.{ext}",
        num_frames=60,
        b_frames=2,
        muxer_options={"movflags": "+faststart"} if ext == "mp4" else None,
    )
    frames, reader = read(path, start_us=1_200_000)
    assert [frame.frame_idx for frame in frames] == list(range(30, 60))
    assert reader.num_decoded < 60
    assert not reader.truncated, reader.truncation

    media.truncate(path, 0.8)
    frames, reader = read(path, start_us=1_200_000)
    assert 0 < len(frames) < 30
    assert frames[0].frame_idx == 30
    assert reader.truncated


def test_no_seek_where_packets_are_not_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a transport stream has no exact index, so it is decoded from its start
    path = media.write_video(tmp_path / "clip.ts", num_frames=40)
    monkeypatch.setattr(container, "SEEK_AFTER_US", 0)
    frames, reader = read(path, start_us=1_000_000)
    assert [frame.frame_idx for frame in frames] == list(range(25, 40)) == indices(frames)
    assert reader.num_decoded == 40


def test_a_broken_stretch_before_the_range_falls_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = media.write_video(tmp_path / "clip.mp4", num_frames=40, gop=10, codec="h264")
    media.corrupt_packets(path, [21, 22])
    plain, _ = read(path, start_us=960_000)
    monkeypatch.setattr(container, "SEEK_AFTER_US", 0)
    sought, reader = read(path, start_us=960_000)
    assert [f.frame_idx for f in sought] == [f.frame_idx for f in plain]
    assert reader.num_corrupt == 2


@pytest.mark.parametrize("hflip", [False, True])
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_display_matrix(tmp_path: Path, rotation: int, hflip: bool) -> None:
    path = media.write_video(tmp_path / "clip.mp4", rotation=rotation, hflip=hflip, num_frames=3)
    frames, reader = read(path)
    # then undoing the turn by hand gives the picture back
    for idx, frame in enumerate(frames):
        image = frame.image[:, ::-1] if hflip else frame.image
        assert media.read_index(np.rot90(image, rotation // 90)) == idx
        assert frame.image.flags.c_contiguous
    turned = rotation in (90, 270)
    assert frames[0].image.shape == ((96, 64, 3) if turned else (64, 96, 3))
    assert (reader.header.width, reader.header.height) == ((64, 96) if turned else (96, 64))
    assert (reader.header.rotation, reader.header.mirrored) == (rotation, hflip)


@pytest.mark.parametrize(
    ("width", "height", "pix_fmt", "codec"),
    [
        (97, 65, "yuv444p", "h264"),
        (97, 65, "yuv420p", "vp9"),
        (64, 98, "yuv422p", "hevc"),
        (50, 38, "yuv420p", "h264"),
        (96, 64, "yuv422p", "h264"),
        (96, 64, "yuv444p", "hevc"),
        (96, 64, "yuv420p10le", "hevc"),
        (96, 64, "yuv422p10le", "h264"),
        (96, 64, "yuv444p10le", "hevc"),
        (96, 64, "yuv420p10le", "av1"),
    ],
)
def test_sizes_and_pixel_formats(
    tmp_path: Path, width: int, height: int, pix_fmt: str, codec: str
) -> None:
    path = media.write_video(
        tmp_path / "clip.mkv",
        width=width,
        height=height,
        pix_fmt=pix_fmt,
        codec=codec,
        num_frames=4,
    )
    frames, reader = read(path)
    assert indices(frames) == [0, 1, 2, 3]
    assert frames[0].image.shape == (height, width, 3)
    assert frames[0].image.flags.c_contiguous
    assert reader.header.pixel_format == pix_fmt
    assert media.corner_error(frames[0].image) < 12


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("matrix", ["601", "709", "2020"])
def test_stated_matrix_and_range(tmp_path: Path, matrix: str, full_range: bool) -> None:
    path = media.write_video(
        tmp_path / "clip.mp4",
        matrix=matrix,
        full_range=full_range,
        num_frames=1,
        pix_fmt="yuv444p",
        encoder_options={"qp": "5"},
    )
    frames, _ = read(path)
    assert media.corner_error(frames[0].image) <= 4


@pytest.mark.parametrize(("width", "height", "matrix"), [(640, 480, "601"), (1280, 720, "709")])
def test_a_stream_that_states_no_matrix(
    tmp_path: Path, width: int, height: int, matrix: str
) -> None:
    path = media.write_video(
        tmp_path / "clip.mkv",
        width=width,
        height=height,
        matrix=matrix,
        tagged=False,
        num_frames=1,
        encoder_options={"qp": "5"},
    )
    frames, _ = read(path)
    assert media.corner_error(frames[0].image) <= 4


@pytest.mark.parametrize(
    ("name", "codec", "muxer_options"),
    [
        ("clip.mp4", "h264", {"movflags": "+faststart"}),
        ("clip.mov", "mjpeg", {"movflags": "+faststart"}),
        ("fragmented.mp4", "h264", {"movflags": "frag_keyframe+empty_moov"}),
        ("clip.mkv", "h264", {}),
        ("clip.webm", "vp9", {}),
        ("clip.avi", "mjpeg", {}),
        ("clip.ts", "h264", {}),
    ],
)
def test_a_cut_off_tail(
    tmp_path: Path, name: str, codec: str, muxer_options: dict[str, str]
) -> None:
    path = write_kind(tmp_path / name, codec, num_frames=60, muxer_options=muxer_options)
    _, whole = read(path)
    assert whole.num_decoded == 60
    assert not whole.truncated

    media.truncate(path, 0.6)
    frames, reader = read(path)
    assert 0 < len(frames) < 60
    assert indices(frames) == [frame.frame_idx for frame in frames] == list(range(len(frames)))
    assert reader.truncated
    assert reader.truncation is not None
    assert reader.truncation.startswith("the file ends")


def test_a_cut_off_tail_behind_the_range_is_no_matter(tmp_path: Path) -> None:
    path = media.write_video(
        tmp_path / "clip.mp4", num_frames=60, muxer_options={"movflags": "+faststart"}
    )
    media.truncate(path, 0.6)
    frames, reader = read(path, end_us=200_000)
    assert indices(frames) == [0, 1, 2, 3, 4]
    assert not reader.truncated


@pytest.mark.parametrize("ext", ["mp4", "mkv", "mov", "ts"])
def test_longer_sound_is_no_truncation(tmp_path: Path, ext: str) -> None:
    path = media.write_video(tmp_path / f"clip.{ext}", num_frames=30, audio=True)
    frames, reader = read(path)
    assert len(frames) == 30
    assert not reader.truncated, reader.truncation


@pytest.mark.parametrize("num_threads", [1, 2])
def test_corrupt_packets_are_left_out_and_counted(tmp_path: Path, num_threads: int) -> None:
    path = media.write_video(
        tmp_path / "clip.mov", codec="mjpeg", pix_fmt="yuvj420p", full_range=True, num_frames=20
    )
    media.corrupt_packets(path, [8, 9])
    frames, reader = read(path, num_threads=num_threads)
    assert indices(frames) == [*range(8), *range(10, 20)]
    assert [frame.frame_idx for frame in frames] == list(range(18))
    assert [frame.pts_us for frame in frames] == [40_000 * idx for idx in indices(frames)]
    assert reader.num_corrupt == 2
    assert reader.num_decoded == 18
    assert not reader.truncated
    assert not reader.vfr or len(frames) < 20


def test_no_frame_count_in_the_header(tmp_path: Path) -> None:
    # written to a pipe, a Matroska file states neither duration nor count
    path = media.write_video(tmp_path / "live.mkv", num_frames=20, muxer_options={"live": "1"})
    frames, reader = read(path)
    assert len(frames) == 20
    assert not reader.truncated


def test_a_size_that_changes_is_scaled_to_the_first(tmp_path: Path) -> None:
    # two transport streams, one after the other, are one stream whose size changes
    one = media.write_video(tmp_path / "one.ts", num_frames=5)
    two = media.write_video(tmp_path / "two.ts", num_frames=5, width=192, height=128, first_idx=5)
    path = tmp_path / "clip.ts"
    path.write_bytes(one.read_bytes() + two.read_bytes())
    frames, reader = read(path)
    assert indices(frames) == list(range(10))
    assert {frame.image.shape for frame in frames} == {(64, 96, 3)}
    assert reader.num_resized == 5
    # the second stream starts again at zero, yet time goes on
    times = [frame.pts_us for frame in frames]
    assert times == sorted(set(times))


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Return every kind of unusable file, and what the sentence must say."""
    text = folder / "notes.mp4"
    text.write_text("this is a shopping list\n" * 50)
    zero = folder / "zero.mp4"
    zero.touch()
    zeros = folder / "zeros.mp4"
    zeros.write_bytes(bytes(10_000))
    noise = folder / "noise.mkv"
    noise.write_bytes(np.random.default_rng(1).bytes(20_000))
    secret = folder / "secret.mp4"
    media.write_video(secret)
    head = secret.read_bytes()[:32]
    secret.write_bytes(head + np.random.default_rng(2).bytes(20_000))
    picture = folder / "picture.mp4"
    media.write_frames(folder / "f", num_frames=1, suffix=".png")
    (folder / "f" / "00000.png").rename(picture)
    playlist = folder / "playlist.mp4"
    playlist.write_text("#EXTM3U\n#EXTINF:1,\nother.ts\n#EXT-X-ENDLIST\n")
    whole = media.write_video(folder / "whole.mp4", num_frames=30)
    cut = folder / "cut.mp4"
    cut.write_bytes(whole.read_bytes())
    media.truncate(cut, 0.5)
    return {
        "text": (text, "is text, not a video"),
        "zero": (zero, r"is empty \(0 bytes\)"),
        "zeros": (zeros, "begins with zeros only"),
        "noise": (noise, "is not a video in a format that can be read"),
        "random after ftyp": (secret, "not a video|cut off"),
        "picture": (picture, "is a PNG picture, not a video"),
        "playlist": (playlist, "is text, not a video"),
        "no index": (cut, r"is cut off: .*\(moov\)"),
        "audio": (media.write_audio_only(folder / "song.mp4"), r"only audio \(aac\)"),
        "encrypted": (media.write_encrypted(folder / "drm.mp4"), "is encrypted"),
        "undecodable": (media.write_undecodable(folder / "bad.mp4"), "no frame can be decoded"),
    }


def test_unusable_files(tmp_path: Path) -> None:
    for kind, (path, expected) in bad_files(tmp_path).items():
        with pytest.raises(InputError, match=expected) as caught:
            open_file(path)
        sentence = str(caught.value)
        assert sentence.startswith(path.name), kind
        assert ": " in sentence, f"no remedy for {kind}"
        assert "\n" not in sentence


def test_one_thread_means_one_thread(tmp_path: Path) -> None:
    path = media.write_video(tmp_path / "clip.mp4", num_frames=10, width=320, height=240)
    with open_file(path) as reader:
        before = len(list(Path("/proc/self/task").iterdir()))
        python_threads = threading.active_count()
        frames = list(reader)
        assert len(frames) == 10
        assert len(list(Path("/proc/self/task").iterdir())) <= before
        assert threading.active_count() == python_threads


@pytest.mark.parametrize("width", [96, 97])
def test_images_own_their_memory(tmp_path: Path, width: int) -> None:
    path = media.write_video(tmp_path / "clip.mkv", width=width, pix_fmt="yuv444p", num_frames=12)
    with open_file(path) as reader:
        frames = list(reader)
    del reader
    assert indices(frames) == list(range(12))
    assert not any(
        np.shares_memory(one.image, other.image) for one, other in itertools.pairwise(frames)
    )


def test_a_reader_is_read_once(tmp_path: Path) -> None:
    with open_file(media.write_video(tmp_path / "clip.mp4")) as reader:
        assert len(list(reader)) == 12
        with pytest.raises(RuntimeError, match="open it again"):
            iter(reader)


def test_stopping_half_way_closes_cleanly(tmp_path: Path) -> None:
    reader = open_file(media.write_video(tmp_path / "clip.mp4", num_frames=30))
    first = next(iter(reader))
    reader.close()
    reader.close()
    assert media.read_index(first.image) == 0


def test_real_videos_agree_with_the_libraries_own_loop(real_videos: list[Path]) -> None:
    for path in real_videos[:2]:
        with av.open(str(path)) as plain:
            times = [frame.time for frame in plain.decode(video=0)]
        count = 0
        with open_file(path) as reader:
            for frame in reader:
                assert frame.pts_us == pytest.approx((times[count] - times[0]) * 1e6, abs=1)
                count += 1
            assert count == len(times) == reader.header.num_frames
            assert not reader.truncated
            assert reader.num_corrupt == 0
