"""Quality without ground truth, on real runs whose faults are made on purpose.

* A steady object raises no concern; each fault is found, counted, and shown on its frame.
* Overlaps of consecutive masks are those of decoded pixels.
* Identities that swap, and an object whose place a new one takes, are suspected; two objects that
  only overlap, or stand side by side, are not.
* Both tables are Parquet with types, units and descriptions; the list is ranked; both are read
  back, and are kept below OUT/_evaluation where no reader of the dataset looks.
* The list keeps the gravest, whatever the number of objects.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs import quality
from jobs.cli import main
from jobs.dataset import Dataset, open_dataset
from jobs.quality import Measuring, ObjectQuality, measure_run, measure_video
from tests.jobs.scored import Labels, track_masks
from workers.storage import open_store

SIZE = (64, 120)
NUM_FRAMES = 10


def squares(*boxes: tuple[int, int, int, int, int]) -> Labels:
    """Return a picture of filled boxes: id, left, top, width, height."""
    labels = np.zeros(SIZE, np.uint8)
    for object_id, left, top, width, height in boxes:
        labels[top : top + height, left : left + width] = object_id
    return labels


def steady() -> list[Labels]:
    return [squares((1, 20 + i, 20, 24, 24)) for i in range(NUM_FRAMES)]


def jumping() -> list[Labels]:
    """From frame 6 on it has a quarter of its area."""
    return [squares((1, 20, 20, *((12, 12) if i >= 6 else (24, 24)))) for i in range(NUM_FRAMES)]


def interrupted() -> list[Labels]:
    """Not there on frames 3, 4 and 8."""
    return [squares(*([] if i in (3, 4, 8) else [(1, 20, 20, 24, 24)])) for i in range(NUM_FRAMES)]


def swapped() -> list[Labels]:
    """Two objects stand still; from frame 5 on each has the other's id."""
    ids = [(1, 2) if i < 5 else (2, 1) for i in range(NUM_FRAMES)]
    return [squares((a, 10, 20, 20, 20), (b, 70, 20, 20, 20)) for a, b in ids]


def taken_over() -> list[Labels]:
    """Object 1 ends on frame 3, and object 2 begins in its place; 3 stands beside."""
    return [
        squares((1 if i < 4 else 2, 10, 20, 20, 20), (3, 40, 20, 20, 20)) for i in range(NUM_FRAMES)
    ]


def crossing() -> list[Labels]:
    """Object 2 passes in front of object 1, which stays; both touch the border."""
    return [squares((1, 40, 0, 30, 30), (2, 8 * i, 20, 28, 44)) for i in range(NUM_FRAMES)]


VIDEOS = {
    "steady.mp4": steady(),
    "jumping.mp4": jumping(),
    "interrupted.mp4": interrupted(),
    "swapped.mp4": swapped(),
    "taken.mp4": taken_over(),
    "crossing.mp4": crossing(),
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return track_masks(tmp_path_factory.mktemp("quality") / "run", VIDEOS)


@pytest.fixture(scope="module")
def measured(out: Path) -> dict[tuple[str, int], ObjectQuality]:
    dataset = open_dataset(str(out))
    return {
        (video.name.removesuffix(".mp4"), found.object_id): found
        for video in dataset.videos()
        for found in measure_video(video, dataset.frames(video))
    }


def test_each_fault_is_found_on_its_frame(measured: dict[tuple[str, int], ObjectQuality]) -> None:
    calm = measured["steady", 1]
    assert (calm.num_masks, calm.first_frame, calm.last_frame) == (10, 0, 9)
    assert (calm.num_fragments, calm.num_area_jumps, calm.num_switches) == (1, 0, 0)
    assert calm.flicker == pytest.approx(1 - 23 / 25)  # a shift of one in 24 columns
    assert (calm.concern, calm.reason) == (0.0, "")
    jump = measured["jumping", 1]
    assert (jump.num_area_jumps, jump.largest_jump, jump.jump_frame) == (1, 4.0, 6)
    assert jump.flicker_frame == 6
    assert jump.flicker == pytest.approx(0.75 / 9)
    assert "area jumps once, up to 4.0-fold" in jump.reason
    assert jump.look_at_frame == 6
    gap = measured["interrupted", 1]
    assert (gap.num_fragments, gap.gap_frame, gap.num_masks) == (3, 5, 7)
    assert gap.share_occluded == pytest.approx(0.3)
    assert "seen in 3 stretches" in gap.reason
    border = measured["crossing", 1]
    assert border.share_border == 1.0


def test_only_real_switches_are_suspected(measured: dict[tuple[str, int], ObjectQuality]) -> None:
    switches = {
        key: (found.num_switches, found.switch_frame, found.switch_from)
        for key, found in measured.items()
        if found.num_switches
    }
    assert switches == {
        ("swapped", 1): (1, 5, 2),
        ("swapped", 2): (1, 5, 1),
        ("taken", 2): (1, 4, 1),
    }
    assert "may have taken over object 1 (once)" in measured["taken", 2].reason


def test_flicker_is_that_of_decoded_pixels(
    out: Path, measured: dict[tuple[str, int], ObjectQuality]
) -> None:
    frames = VIDEOS["crossing.mp4"]
    overlaps = [
        ((a == 1) & (b == 1)).sum() / ((a == 1) | (b == 1)).sum()
        for a, b in itertools.pairwise(frames)
    ]
    assert measured["crossing", 1].flicker == pytest.approx(1 - np.mean(overlaps))
    assert measured["crossing", 1].flicker_frame == 1 + int(np.argmin(overlaps))


def test_tables_are_kept_ranked_and_read_back(
    out: Path, measured: dict[tuple[str, int], ObjectQuality], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(out)]) == 0
    told = capsys.readouterr().out
    assert "10 objects with" in told
    store = open_store(str(out))
    review = quality.read_review(store)
    concerns = [item.concern for item in review]
    assert concerns == sorted(concerns, reverse=True)
    assert [item.rank for item in review] == list(range(1, len(review) + 1))
    assert ("steady.mp4", 1) not in {(item.video, item.object_id) for item in review}
    first = measured[review[0].video.removesuffix(".mp4"), review[0].object_id]
    assert review[0].reason == first.reason
    assert review[0].reason in told
    assert quality.read_review(store, 2) == review[:2]
    rows = pq.read_table(out / quality.QUALITY_KEY)
    assert rows.num_rows == len(measured) == 10
    for table, key in (
        (quality.QUALITY_TABLE, quality.QUALITY_KEY),
        (quality.REVIEW_TABLE, quality.REVIEW_KEY),
    ):
        schema = pq.read_schema(out / key)
        assert schema.metadata[b"maskmill.table"] == table.name.encode()
        for field, column in zip(schema, table.columns, strict=True):
            assert (field.name, field.nullable) == (column.name, column.nullable)
            assert field.metadata[b"description"].decode() == column.description
    summary = quality.read_summary(store)
    assert summary is not None
    assert (summary.num_videos, summary.num_objects, summary.num_switches) == (6, 10, 3)
    assert sum(summary.concern_histogram) == 10
    # What is read back is what the columns of one video say, too.
    by_name = {(r["video"].removesuffix(".mp4"), r["object_id"]): r for r in rows.to_pylist()}
    for name, found in measured.items():
        assert by_name[name]["concern"] == pytest.approx(found.concern)
        assert by_name[name]["look_at_frame"] == found.look_at_frame


def test_a_part_is_measured_and_not_kept(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = out / quality.SUMMARY_KEY
    before = kept.stat().st_mtime_ns if kept.exists() else None
    assert main(["eval", str(out), "--video", "swapped"]) == 0
    assert "2 objects with 20 masks in 1 videos" in capsys.readouterr().out
    assert (kept.stat().st_mtime_ns if kept.exists() else None) == before
    assert quality.read_review(open_store(str(tmp_path))) == []
    assert quality.read_summary(open_store(str(tmp_path))) is None


def test_the_list_keeps_the_gravest(
    measured: dict[tuple[str, int], ObjectQuality], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "MAX_REVIEW", 5)
    template = measured["steady", 1]
    order = np.random.default_rng(0).permutation(40)
    with Measuring() as measuring:
        for key in order.tolist():
            measuring.add([replace(template, video_key=key, concern=(key % 20) / 20)])
        kept = [(item.video_key, item.concern) for item in measuring.review()]
    assert kept == [(19, 0.95), (39, 0.95), (18, 0.9), (38, 0.9), (17, 0.85)]


def test_a_run_without_masks_is_measured(tmp_path: Path) -> None:
    nothing = track_masks(tmp_path / "run", {"blank.mp4": [np.zeros(SIZE, np.uint8)] * 3})
    dataset: Dataset = open_dataset(str(nothing))
    with Measuring() as measuring:
        measure_run(dataset, measuring)
        measuring.save(open_store(str(nothing)))
    summary = quality.read_summary(open_store(str(nothing)))
    assert summary is not None
    assert (summary.num_videos, summary.num_objects, summary.mean_flicker) == (1, 0, None)
    assert pq.read_table(nothing / quality.QUALITY_KEY).num_rows == 0
