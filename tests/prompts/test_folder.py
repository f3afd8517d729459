"""`workers.prompts.folder`.

- Values 1..254 are object ids and 255 is void, except that an image of only 0 and 255 is one
  object; palettes do not matter, whatever the bit depth; coloured images are refused.
- Pictures are named by frame index, or by the frame file where the video is a folder of frames;
  one that belongs to no frame is refused.
- In `first_frame` only the first picture on which an object appears prompts it; the interval
  modes give every picture, and read only those that are due.
- The digest of a video follows its pictures' names and content, and nothing else.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.media import shared_dir
from workers import rle
from workers.errors import ConfigError, InputError
from workers.messages import Prompt, PromptMode
from workers.prompts.folder import folder_digests, read_folder

VALUES = np.array([[0, 0, 3, 3], [1, 1, 255, 0], [1, 1, 0, 0]], np.uint8)


def save(path: Path, values: NDArray[Any], kind: str = "P", **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values > 0 if kind == "1" else values)
    if kind == "P":
        image = Image.frombytes("P", image.size, values.tobytes())
        # A palette on which no colour equals its index, and two indices look alike.
        image.putpalette([200 - 5 * (i // 6) for i in range(240)])
    assert image.mode == kind
    image.save(path, **options)


def decoded(prompt: Prompt) -> NDArray[np.uint8]:
    assert prompt.mask_rle is not None
    return rle.decode(prompt.mask_rle["counts"], *prompt.mask_rle["size"])


@pytest.mark.parametrize("kind", ["P", "L", "I;16"])
def test_values_are_object_ids(tmp_path: Path, kind: str) -> None:
    save(tmp_path / "0.png", VALUES.astype(np.uint16) if kind == "I;16" else VALUES, kind)
    prompts = read_folder(str(tmp_path))
    assert [(p.object_id, p.frame_idx, p.source) for p in prompts] == [
        (1, 0, "folder"),
        (3, 0, "folder"),
    ]
    for prompt in prompts:
        assert np.array_equal(decoded(prompt), prompt.object_id == VALUES)


@pytest.mark.parametrize(("kind", "bits"), [("P", 1), ("P", 2), ("P", 4), ("L", 2), ("L", 4)])
def test_few_bits(tmp_path: Path, kind: str, bits: int) -> None:
    values = np.array([[0, 1, 1, 0], [0, 1, 0, 0]], np.uint8)
    if kind == "P":
        save(tmp_path / "0.png", values, kind, bits=bits)
    else:
        (tmp_path / "0.png").write_bytes(grey_png(values, bits))
    (prompt,) = read_folder(str(tmp_path))
    assert prompt.object_id == 1
    assert np.array_equal(decoded(prompt), values)


def grey_png(values: NDArray[np.uint8], bits: int) -> bytes:
    """Return a greyscale PNG of few bits, which PIL reads but does not write."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width = values.shape
    bit_planes = np.unpackbits(values[..., None], axis=2)[..., -bits:].reshape(height, -1)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in bit_planes)
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["L", "P", "1"])
def test_only_0_and_255_is_one_object(tmp_path: Path, kind: str) -> None:
    values = np.where(VALUES == 3, 255, 0).astype(np.uint8)
    save(tmp_path / "7.png", values, kind)
    (prompt,) = read_folder(str(tmp_path))
    assert (prompt.object_id, prompt.frame_idx) == (1, 7)
    assert np.array_equal(decoded(prompt), VALUES == 3)


def test_the_first_picture_of_an_object_prompts_it(tmp_path: Path) -> None:
    # Given object 1 on frames 0 and 2, object 2 on frames 2 and 10, nothing on frame 1
    for frame_idx, ids in {0: [1], 1: [], 2: [1, 2], 10: [2]}.items():
        values = np.zeros((4, 4), np.uint8)
        values[0, : len(ids)] = ids
        save(tmp_path / f"{frame_idx:03d}.png", values, "L")
    (tmp_path / "notes.txt").write_text("not a picture")
    save(tmp_path / "another video" / "0.png", VALUES)

    def found(mode: PromptMode, **options: Any) -> list[tuple[int | None, int | None]]:
        prompts = read_folder(str(tmp_path), mode=mode, **options)
        return [(p.frame_idx, p.object_id) for p in prompts]

    assert found(PromptMode.FIRST_FRAME) == [(0, 1), (2, 2)]
    assert found(PromptMode.EVERY_FRAME) == [(0, 1), (2, 1), (2, 2), (10, 2)]
    due = found(PromptMode.EVERY_N_FRAMES, is_due=lambda frame_idx: frame_idx % 5 == 0)
    assert due == [(0, 1), (10, 2)]


def test_pictures_that_are_not_due_are_not_read(tmp_path: Path) -> None:
    save(tmp_path / "0.png", VALUES)
    (tmp_path / "1.png").write_bytes(b"broken")
    prompts = read_folder(
        str(tmp_path), mode=PromptMode.EVERY_N_FRAMES, is_due=lambda frame_idx: frame_idx == 0
    )
    assert len(prompts) == 2


def test_names_are_stems_as_soon_as_one_is(tmp_path: Path) -> None:
    # Given frames that do not count from 0
    stems = ["00005", "00006", "00007"]
    save(tmp_path / "00006.png", VALUES)
    assert {p.frame_idx for p in read_folder(str(tmp_path), None, stems)} == {1}
    assert {p.frame_idx for p in read_folder(str(tmp_path), None, ["a", "b"])} == {6}
    assert {p.frame_idx for p in read_folder(str(tmp_path))} == {6}
    # When another picture is like no frame
    save(tmp_path / "00002.png", VALUES)
    # Then it is not taken for an index
    with pytest.raises(InputError, match=r"00002\.png is named like no frame"):
        read_folder(str(tmp_path), None, stems)


def test_an_empty_folder_has_no_prompts(tmp_path: Path) -> None:
    assert read_folder(str(tmp_path)) == []
    assert read_folder(str(tmp_path / "missing")) == []


def test_bad_pictures_are_named(tmp_path: Path) -> None:
    cases: dict[str, tuple[str, bytes]] = {}
    colours = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(colours, "png")
    cases["0.png"] = ("has colours", colours.getvalue())
    large = io.BytesIO()
    Image.fromarray(np.full((4, 4), 300, np.uint16)).save(large, "png")
    cases["1.png"] = ("value 300", large.getvalue())
    cases["2.png"] = ("cannot be read", large.getvalue()[:40])
    cases["3.png"] = ("cannot be read", b"<html>")
    cases["4.png"] = ("cannot be read", b"")
    cases["first.png"] = ("0-based frame index", b"")
    for name, (said, data) in cases.items():
        folder = tmp_path / name[:-4]
        folder.mkdir()
        (folder / name).write_bytes(data)
        with pytest.raises(InputError, match=said) as caught:
            read_folder(str(folder))
        assert name in str(caught.value)


def test_two_pictures_of_one_frame_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "1.png", VALUES)
    save(tmp_path / "01.png", VALUES)
    with pytest.raises(InputError, match="both for frame 1"):
        read_folder(str(tmp_path))


def test_digests(tmp_path: Path) -> None:
    # Given two videos, one with leading folders
    save(tmp_path / "a" / "0.png", VALUES)
    save(tmp_path / "b" / "c" / "0.png", VALUES)
    (tmp_path / "b" / "notes.txt").write_text("x")
    before = folder_digests(str(tmp_path))
    assert sorted(before) == ["a", "b/c"]
    # When one changes, and a file that is no picture does
    save(tmp_path / "b" / "c" / "1.png", VALUES)
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "a" / "first.jpg").write_bytes(b"of another type")
    others: list[str] = []
    after = folder_digests(str(tmp_path), on_other=others.append)
    assert others == ["a/first.jpg"]
    # Then only that one has another digest
    assert after["a"] == before["a"]
    assert after["b/c"] != before["b/c"]
    save(tmp_path / "a" / "0.png", np.zeros((9, 9), np.uint8))
    assert folder_digests(str(tmp_path))["a"] != before["a"]


def test_real_annotations() -> None:
    """Every mask of a DAVIS sequence, as it is distributed."""
    masks = shared_dir() / "data/davis/dog/masks"
    if not masks.is_dir():
        pytest.skip("the real sequences are not here")
    stems = [path.stem for path in sorted((masks.parent / "frames").iterdir())]
    prompts = read_folder(str(masks), None, stems, PromptMode.EVERY_FRAME)
    assert [p.frame_idx for p in prompts] == list(range(len(stems)))
    assert {p.object_id for p in prompts} == {1}
    (first,) = read_folder(str(masks), None, stems)
    assert first == prompts[0]
    truth = np.asarray(Image.open(min(masks.iterdir())))
    assert np.array_equal(decoded(first), truth > 0)


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "missing", tmp_path / "empty"):
        with pytest.raises(ConfigError, match="does not exist or holds no"):
            folder_digests(str(folder))
