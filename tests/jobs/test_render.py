"""What `maskmill render` writes, decoded again.

* The film is H.264 in yuv420p at the front of an MP4, without audio, one picture per tracked
  frame, in its order and at its time from the first one on, also where the rate varies, where a
  range and a stride were tracked, for folders of frames, and upright where the source is turned.
* Objects have the colour of their id, on every frame and in the contact sheet; the rest of the
  picture is the source. A hidden object is marked where it was and named below.
* Corpus and dataset in buckets, files and folders of frames, are read alike.
* Side by side, the other run's masks are drawn to the right, and what it did not track stays bare.
* Labels, captions and titles stay inside their picture, in any script, however long.
* A source that is gone, another one, or moved; a video that failed, is unknown, or was not the
  same in both runs; a destination that exists, is no film or no path: one sentence, exit code 2,
  and nothing is left behind, half-written or not. A film that cannot be written ends with 3.
"""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from jobs import cli, driver
from jobs.config import RunConfig
from jobs.dataset import Frame, ObjectMask, open_dataset
from jobs.progress import SilentReporter
from jobs.rendering.colours import object_colour
from jobs.rendering.overlay import FILL_OPACITY, Overlay
from jobs.rendering.sheet import contact_sheet, fit_text, load_font
from jobs.threads import ThreadPool
from tests import media
from tests.jobs.pictured import BOXES, HEIGHT, SINK_PX, STREET_MS, WIDTH, track, write_corpus
from tests.servers import S3Server
from workers import rle
from workers.storage import open_store

UInt8Array = NDArray[np.uint8]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a corpus and two runs over it, `out` and `still`."""
    folder = tmp_path_factory.mktemp("render")
    write_corpus(folder)
    track(folder, folder / "out")
    track(folder, folder / "still", sink_px=0)
    return folder


@pytest.fixture(scope="module")
def street(place: Path) -> Path:
    """Return the film of a video whose rate varies."""
    assert render(place / "out", "street", place / "films") == 0
    return place / "films" / "street.overlay.mp4"


def render(*words: Any) -> int:
    return cli.main(["render", *map(str, words)])


def read_film(path: Path) -> list[tuple[int, UInt8Array]]:
    """Return microsecond and picture of every frame, as a player shows them."""
    with av.open(str(path)) as container:
        (stream,) = container.streams
        context: Any = stream.codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.colorspace, context.color_range) == (1, 1)
        return [
            (round(frame.pts * frame.time_base * 1_000_000), frame.to_ndarray(format="rgb24"))
            for frame in container.decode(video=0)
        ]


def shown_index(picture: UInt8Array) -> int:
    """Return which frame a picture shows; two of its corners lie below objects."""
    return media.read_index(picture[:HEIGHT], tolerance=64)


def tinted(colour: tuple[int, int, int], object_id: int) -> UInt8Array:
    """Return the colour of a pixel below an object."""
    mixed = np.array(colour) * (1 - FILL_OPACITY) + FILL_OPACITY * np.array(
        object_colour(object_id)
    )
    return mixed.astype(np.uint8)


def assert_colour(picture: UInt8Array, x: int, y: int, colour: Any) -> None:
    """Fail unless a small patch has a colour, but for what the encoder loses."""
    found = picture[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3).mean(0)
    assert np.abs(found - np.array(colour)).max() < 14, (found, colour)


def test_film_plays_in_a_browser(street: Path) -> None:
    data = street.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "it plays while it still loads"
    frames = read_film(street)
    assert [time_us for time_us, _ in frames] == [1000 * ms for ms in STREET_MS]
    for index, (_, picture) in enumerate(frames):
        assert picture.shape[1] == WIDTH
        assert picture.shape[0] > HEIGHT, "the caption is below the picture"
        assert shown_index(picture) == index
        assert (picture[HEIGHT + 4 :].max(axis=(0, 1)) > 150).all(), "there is a caption"


def test_objects_keep_their_colours(street: Path) -> None:
    blue, grey = media.CORNERS[(3, 0)], media.CORNERS[(3, 3)]
    for index, (_, picture) in enumerate(read_film(street)[:3]):
        # Below the labels, which stand above the objects.
        y = BOXES[1][1] + 20 + SINK_PX * index
        assert_colour(picture, 28, y, tinted(blue, 1))
        assert_colour(picture, 348, y, tinted(grey, 2))
        assert_colour(picture, 72, y, blue)
        assert_colour(picture, 48, 20, media.CORNERS[(0, 0)])


def test_range_and_stride(place: Path, tmp_path: Path) -> None:
    assert render(place / "out", "long", tmp_path / "range.mp4") == 0
    frames = read_film(tmp_path / "range.mp4")
    assert [shown_index(picture) for _, picture in frames] == [10, 12, 14, 16, 18]
    assert [time_us for time_us, _ in frames] == [0, 80_000, 160_000, 240_000, 320_000]


def test_turned_source_is_upright(place: Path, tmp_path: Path) -> None:
    assert render(place / "out", "turned", tmp_path) == 0
    frames = read_film(tmp_path / "turned.overlay.mp4")
    assert len(frames) == 4
    for index, (_, picture) in enumerate(frames):
        stored = np.rot90(picture[:HEIGHT], 1)
        assert stored.shape == (WIDTH, HEIGHT, 3)
        # Turned back, the lower corners with their objects are on one side.
        expected = media.picture(index, HEIGHT, WIDTH)
        away = np.s_[: WIDTH // 3, : HEIGHT // 2]
        assert np.abs(stored[away].astype(int) - expected[away]).mean() < 12


def test_folder_of_frames(place: Path, tmp_path: Path) -> None:
    assert render(place / "out", "walk", tmp_path / "new" / "walk.mp4") == 0
    frames = read_film(tmp_path / "new" / "walk.mp4")
    assert [shown_index(picture) for _, picture in frames] == list(range(5))
    assert [time_us for time_us, _ in frames] == [i * 1_000_000 // 24 for i in range(5)]


def test_side_by_side(place: Path, tmp_path: Path) -> None:
    command = (place / "out", "street", tmp_path / "two.mp4", "--side-by-side", place / "still")
    assert render(*command) == 0
    frames = read_film(tmp_path / "two.mp4")
    assert len(frames) == len(STREET_MS)
    _, last = frames[-1]
    assert last.shape[1] == 2 * WIDTH
    left, right = last[:HEIGHT, :WIDTH], last[:HEIGHT, WIDTH:]
    grey = media.CORNERS[(3, 3)]
    y = BOXES[2][1] + 20
    assert_colour(left, 348, y, grey)
    assert_colour(right, 348, y, tinted(grey, 2))


def test_contact_sheet(place: Path, street: Path) -> None:
    sheet = np.asarray(Image.open(street.with_suffix(".png")).convert("RGB"))
    assert sheet.shape[1] > 3 * WIDTH, "three pictures in a row"
    assert sheet.shape[0] > 4 * HEIGHT, "of twelve"
    blue = tinted(media.CORNERS[(3, 0)], 1).astype(int)
    # On the first picture of the top row, and nowhere in the last row.
    near = (np.abs(sheet.astype(int) - blue) < 4).all(axis=2)
    assert near[: len(sheet) // 3, :WIDTH].sum() > 300
    assert near[-HEIGHT:].sum() < 20


@pytest.fixture
def spared(place: Path, tmp_path: Path) -> Iterator[Path]:
    """Return the source of `street`, which is put back after the test."""
    path = place / "videos" / "street.mp4"
    kept = tmp_path / "kept.mp4"
    shutil.copy2(path, kept)
    yield path
    shutil.copy2(kept, path)


def test_source_gone_changed_or_moved(
    place: Path, spared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dest = tmp_path / "films"
    command = (place / "out", "street", dest)
    moved = tmp_path / "elsewhere.mp4"
    shutil.copy(spared, moved)
    spared.unlink()
    assert render(*command) == 2
    assert "street.mp4 is gone from" in capsys.readouterr().err
    assert render(*command, "--source", moved) == 0
    moved.write_bytes(b"x" * 100)
    assert render(*command, "--source", moved, "--overwrite") == 2
    assert "has changed since" in capsys.readouterr().err
    media.write_video(spared, num_frames=12, width=WIDTH, height=HEIGHT)
    assert render(*command, "--overwrite") == 2
    told = capsys.readouterr().err
    assert told.count("error:") == 1
    assert "has changed since videos/street.mp4 was tracked" in told
    assert sorted(p.name for p in dest.iterdir()) == ["street.overlay.mp4", "street.overlay.png"]


def test_changed_folder_of_frames(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = place / "videos" / "walk" / "00009.png"
    shutil.copy(place / "videos" / "walk" / "00000.png", extra)
    try:
        assert render(place / "out", "walk", tmp_path / "films") == 2
    finally:
        extra.unlink()
    assert "videos/walk" in capsys.readouterr().err
    assert list((tmp_path / "films").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("{out}", "nobody"), "no video named 'nobody'"),
        (("{out}", "videos/broken.mp4"), "broken.mp4 was not tracked, it is in quarantine"),
        (("{out}", "street", "{here}/a.webm"), "a film is an MP4 file"),
        (("{out}", "street", "s3://bucket/a.mp4"), "is not on this machine"),
        (("{out}", "street", "{here}/taken.mp4"), "taken.mp4 exists"),
        (("{here}", "street"), "holds no dataset"),
        (("{out}", "street", "{here}/a.mp4", "--side-by-side", "{here}"), "holds no dataset"),
    ],
)
def test_bad_input(
    words: tuple[str, ...],
    sentence: str,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "taken.mp4").write_bytes(b"precious")
    assert render(*(word.format(out=place / "out", here=tmp_path) for word in words)) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("error:") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["taken.mp4"]
    assert (tmp_path / "taken.mp4").read_bytes() == b"precious"


def test_buckets(seaweedfs: S3Server, place: Path, tmp_path: Path) -> None:
    store = open_store(f"{seaweedfs.new_bucket()}/in", seaweedfs.options)
    for name in ("long.mp4", "walk/00000.png", "walk/00001.png"):
        store.put_file(place / "videos" / name, name)
    prompts = place / "bucket.jsonl"
    prompts.write_text(
        "".join(
            json.dumps({"video": name, "frame_idx": 0, "object_id": 1, "box_xyxy": BOXES[1]}) + "\n"
            for name in ("long", "walk")
        )
    )
    reached = {"endpoint_url": seaweedfs.endpoint_url, "path_style": True}
    out = f"{seaweedfs.new_bucket()}/set"
    config = {
        "corpus": {"paths": (store.uri,), "store": reached},
        "out": {"uri": out, "store": reached},
        "tracker": {"name": "fake"},
        "prompts": {"file": str(prompts)},
    }
    summary = driver.run(
        RunConfig.model_validate(config),
        reporter=SilentReporter(),
        pool_factory=lambda _, spec: ThreadPool(spec, 1),
    )
    assert summary.exit_code == 0, summary.quarantined
    reach = ("--endpoint-url", seaweedfs.endpoint_url, "--path-style")
    for name, num_frames in (("long", 30), ("walk", 2)):
        assert render(out, name, tmp_path, *reach) == 0
        frames = read_film(tmp_path / f"{name}.overlay.mp4")
        assert [shown_index(picture) for _, picture in frames] == list(range(num_frames))


def test_full_disk(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A limit on the size of files stands for a full disk: every write beyond it is refused.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        assert render(place / "out", "street", tmp_path) == 3
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    told = capsys.readouterr().err
    assert told.count("error:") == 1
    assert "maskmill itself" not in told
    assert list(tmp_path.iterdir()) == []


def test_colours_belong_to_ids() -> None:
    colours = [object_colour(object_id) for object_id in range(1, 201)]
    assert len(set(colours)) == 200
    assert colours == [object_colour(object_id) for object_id in range(1, 201)]


def object_mask(box_xywh: tuple[int, int, int, int], size: tuple[int, int]) -> ObjectMask:
    x, y, w, h = box_xywh
    pixels = np.zeros(size, np.uint8)
    pixels[y : y + h, x : x + w] = 1
    return ObjectMask(1, 7, 0.9, (x, y, w, h), w * h, size, rle.encode(pixels))


def test_overlay_changes_what_the_masks_cover() -> None:
    image = np.full((120, 160, 3), 100, np.uint8)
    overlay = Overlay(120, 160, {7: "cat"})
    mask = object_mask((30, 40, 80, 60), (120, 160))
    drawn = overlay.draw(image, Frame(0, 0, (mask,), ()))
    assert (image == 100).all(), "the frame itself stays"
    inside = drawn[60:90, 50:90].reshape(-1, 3)
    assert (np.abs(inside - tinted((100, 100, 100), 1).astype(int)) <= 1).all()
    assert (drawn[112:] == 100).all(), "far from the object nothing changes"
    assert (drawn[22:36] == object_colour(1)).all(axis=2).sum() > 100, "the label is above it"
    hidden = overlay.draw(image, Frame(1, 40_000, (), (1,)))
    assert (hidden[60:90, 50:90] == 100).all(), "nothing is where the object was"
    assert (hidden[36:46, 28:40] == object_colour(1)).all(axis=2).any(), "but its corners are"
    later = overlay.draw(image, Frame(2, 60_000_000, (), (1,)))
    assert (later == 100).all(), "and not for ever"
    with pytest.raises(ValueError, match="does not fit"):
        overlay.draw(image[:50], Frame(3, 70_000_000, (mask,), ()))


def test_labels_are_legible_when_shrunk() -> None:
    image = np.full((720, 1280, 3), 100, np.uint8)
    frame = Frame(0, 0, (object_mask((400, 300, 300, 200), (720, 1280)),), ())
    chips = []
    for shown_px in (None, 320):
        drawn = Overlay(720, 1280, {7: "cat"}, shown_px=shown_px).draw(image, frame)
        above = (drawn[:296] == object_colour(1)).all(axis=2)
        chips.append(int(above.any(axis=1).sum()))
    assert chips[1] / 4 >= 12, "a quarter of the size still has room for letters"
    assert chips[1] > 1.5 * chips[0]


def test_labels_stay_in_the_picture() -> None:
    image = np.full((90, 120, 3), 100, np.uint8)
    overlay = Overlay(90, 120, {7: "a name that is much longer than the picture is wide"})
    drawn = overlay.draw(image, Frame(0, 0, (object_mask((100, 0, 20, 20), (90, 120)),), ()))
    chip = np.argwhere((drawn == object_colour(1)).all(axis=2))
    assert chip[:, 1].min() > 0, "its left end is to be seen, so it is not cut off"
    assert len(chip) > 300


def test_stray_pixels_do_not_pull_the_label_away() -> None:
    image = np.full((200, 300, 3), 100, np.uint8)
    pixels = np.zeros((200, 300), np.uint8)
    pixels[100:160, 200:260] = 1
    pixels[2:5, 2:5] = 1
    box = (2.0, 2.0, 258.0, 158.0)
    mask = ObjectMask(1, 7, 0.9, box, int(pixels.sum()), (200, 300), rle.encode(pixels))
    drawn = Overlay(200, 300, {7: "cat"}).draw(image, Frame(0, 0, (mask,), ()))
    chip = (drawn == object_colour(1)).all(axis=2)
    assert chip[78:97, 200:260].sum() > 100
    assert chip[:40].sum() < 60, "no more than the outline of the stray pixels"


def test_contact_sheet_holds_every_picture() -> None:
    pictures = [np.full((60, 80, 3), value, np.uint8) for value in (60, 120, 180, 240)]
    sheet = contact_sheet(pictures, ["a", "b", "c", "d" * 99], title="t" * 999, num_columns=3)
    for value in (60, 120, 180, 240):
        assert (sheet == value).all(axis=2).sum() > 60 * 80 * 0.9
    assert (sheet[:, -4:] == sheet[0, 0]).all(), "nothing runs into the right edge"
    with pytest.raises(ValueError, match="as many captions"):
        contact_sheet(pictures, ["a"], title="t")


def test_texts_are_shortened_to_fit() -> None:
    font = load_font(14)
    assert fit_text("short", font, 100) == "short"
    cut = fit_text("frame 12   objects of many kinds", font, 100)
    assert cut.endswith("…")
    assert font.getlength(cut) <= 100 < font.getlength(cut[:-1] + "xx…")


def test_dataset_knows_what_is_drawn(place: Path) -> None:
    # What the films above show is what the tables say.
    dataset = open_dataset(str(place / "out"))
    frames = list(dataset.frames(dataset.video("street")))
    assert [mask.object_id for mask in frames[0].masks] == [1, 2]
    assert frames[-1].occluded_ids == (1, 2)
