"""Folders of frames: what a reader of one promises.

* Frames come in the order of their names, numbers compared as numbers where all names are
  numbered alike; times are nominal, 24 frames a second.
* Every image kind becomes upright 8-bit RGB: JPEG, PNG, WebP, BMP, TIFF; grey, palette, alpha,
  16-bit, CMYK; orientation tags are applied.
* An unreadable image, one of another size, or two for one frame is an InputError that names it.
* Range and stride mean the same as for container files, and images outside them are not read.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests import media
from workers.decode.frames import folder_identity, frame_time_us, order_frames, read_image
from workers.decode.reader import DecodedFrame, LocalVideo, VideoReader, open_video
from workers.errors import InputError
from workers.messages import SourceKind, VideoSource


@dataclass
class Pictures:
    """A folder on this disk that notes which pictures were read."""

    folder: Path
    names: Sequence[str]
    read: list[int] = field(default_factory=list)

    def stream(self, indices: Iterable[int]) -> Iterator[bytes]:
        for index in indices:
            self.read.append(index)
            yield (self.folder / self.names[index]).read_bytes()


def read(folder: Path, **part: Any) -> tuple[list[DecodedFrame], VideoReader, Pictures]:
    names = order_frames([path.name for path in folder.iterdir()], folder.name)
    pictures = Pictures(folder, names)
    source = VideoSource(1, str(folder), folder.name, SourceKind.FRAMES, **part)
    with open_video(source, LocalVideo(images=pictures)) as reader:
        return list(reader), reader, pictures


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".TIFF"])
def test_every_image_format(tmp_path: Path, suffix: str) -> None:
    folder = media.write_frames(tmp_path / "walk", suffix=suffix, width=97, height=65)
    frames, reader, _ = read(folder)
    assert [media.read_index(frame.image) for frame in frames] == list(range(6))
    assert [frame.frame_idx for frame in frames] == list(range(6))
    assert [frame.pts_us for frame in frames] == [0, 41_666, 83_333, 125_000, 166_666, 208_333]
    header = reader.header
    assert (header.width, header.height, header.num_frames, header.fps) == (97, 65, 6, 24.0)
    assert header.container == "frames"
    assert (reader.num_decoded, reader.truncated, reader.vfr) == (6, False, False)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["10.jpg", "9.jpg", "1.jpg"], ["1.jpg", "9.jpg", "10.jpg"]),
        (["f_2.png", "f_10.png", "f_1.png"], ["f_1.png", "f_2.png", "f_10.png"]),
        (["a10.png", "b2.png", "a9.png"], ["a10.png", "a9.png", "b2.png"]),
        (["end.png", "2.png", "10.png"], ["10.png", "2.png", "end.png"]),
        (["2.png", "notes.txt", ".1.png", "1.PNG"], ["1.PNG", "2.png"]),
        (["00002.jpg", "1.jpg"], ["1.jpg", "00002.jpg"]),
    ],
)
def test_order(names: list[str], expected: list[str]) -> None:
    assert order_frames(names, "walk") == expected


def test_two_images_for_one_frame() -> None:
    with pytest.raises(InputError, match=r"walk holds two images for one frame, 1\.jpg and 1\.png"):
        order_frames(["1.png", "1.jpg"], "walk")


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"stride": 4}, [0, 4, 8]),
        ({"start_us": frame_time_us(3), "end_us": frame_time_us(6)}, [3, 4, 5]),
        ({"start_us": frame_time_us(3) + 1, "stride": 2}, [4, 6, 8]),
        ({"end_us": 10**9}, list(range(10))),
    ],
)
def test_ranges_and_strides(tmp_path: Path, part: dict[str, int], expected: list[int]) -> None:
    folder = media.write_frames(tmp_path / "walk", num_frames=10, suffix=".png")
    frames, _, pictures = read(folder, **part)
    assert [frame.frame_idx for frame in frames] == expected
    assert [media.read_index(frame.image) for frame in frames] == expected
    assert pictures.read == [0, *expected], "the first is read once more, for the header"


def test_a_range_outside_the_folder(tmp_path: Path) -> None:
    folder = media.write_frames(tmp_path / "walk", num_frames=10, suffix=".png")
    with pytest.raises(InputError, match="walk has no frame in its range: it holds 10 frames"):
        read(folder, start_us=1_000_000)


def encoded(image: Image.Image, suffix: str = "png", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, suffix, **options)
    return stream.getvalue()


def test_pixel_kinds() -> None:
    picture = Image.fromarray(media.picture(5))
    for kind, image in {
        "palette": picture.quantize(16),
        "alpha": picture.convert("RGBA"),
        "rgb": picture,
    }.items():
        rgb, _ = read_image(encoded(image), kind)
        assert media.read_index(rgb) == 5, kind
        assert rgb.flags.c_contiguous
        assert rgb.flags.owndata or rgb.base is not None
    rgb, header = read_image(encoded(picture.convert("CMYK"), "jpeg", quality=95), "cmyk.jpg")
    assert media.read_index(rgb) == 5
    assert header.pixel_format == "CMYK"

    grey = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    expected = np.repeat(grey[..., None], 3, axis=2)
    rgb, _ = read_image(encoded(Image.fromarray(grey)), "grey")
    np.testing.assert_array_equal(rgb, expected)
    deep = grey.astype(np.uint16) * 257
    for suffix in ("png", "tiff"):
        rgb, _ = read_image(encoded(Image.fromarray(deep), suffix), "deep")
        np.testing.assert_array_equal(rgb, expected)


@pytest.mark.parametrize("tag", range(1, 9))
def test_orientation_tags(tag: int) -> None:
    # given an upright picture stored turned, with the tag that says how to turn it back
    picture = Image.fromarray(media.picture(9))
    method = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(tag)
    stored = picture if method is None else picture.transpose(method)
    exif = Image.Exif()
    exif[0x0112] = tag
    rgb, header = read_image(encoded(stored, "png", exif=exif), "photo.png")
    assert media.read_index(rgb) == 9
    assert (header.width, header.height) == (96, 64)
    # then the header's rotation and mirror are what was applied
    turned = np.rot90(np.asarray(stored), -(header.rotation // 90))
    np.testing.assert_array_equal(rgb, turned[:, ::-1] if header.mirrored else turned)


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    folder = media.write_frames(tmp_path / "walk", suffix=".jpg")
    whole = (folder / "00003.jpg").read_bytes()
    for content, expected in {
        b"": r"walk/00003\.jpg is empty",
        b"hello": r"walk/00003\.jpg is not an image",
        whole[: len(whole) // 2]: r"walk/00003\.jpg cannot be decoded \(.*[Tt]runcated",
    }.items():
        (folder / "00003.jpg").write_bytes(content)
        with pytest.raises(InputError, match=expected):
            read(folder)


def test_an_image_of_another_size_is_named(tmp_path: Path) -> None:
    folder = media.write_frames(tmp_path / "walk", suffix=".png")
    Image.fromarray(media.picture(3, 40, 30)).save(folder / "00003.png")
    with pytest.raises(InputError, match=r"walk/00003\.png is 40x30 pixels, but .* is 96x64"):
        read(folder)


def test_identity_changes_with_any_image() -> None:
    images = [("1.jpg", "a"), ("2.jpg", "b")]
    same = folder_identity(iter(images))
    assert same == folder_identity(images)
    assert len(same) == 32
    others = [images[:1], images[::-1], [("1.jpg", "a"), ("2.jpg", "c")], [*images, ("3.jpg", "")]]
    assert same not in {folder_identity(other) for other in others}
