"""Contract of `workers.sinks.parts` and `workers.sinks.rows`.

* Rows come back as they went in, in row groups of bounded rows and bytes.
* Size and SHA-256 of a part are those of the uploaded file; its key is the attempt's own.
* A table without rows has no file. The spool directory is made when missing; local files are gone
  at the end, whatever happened.
* Writers that fail say so with the errors of the store.
* Sums per object: first and last frame, means, and the overlap of boxes on consecutive frames.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from workers import rle
from workers.errors import StoreError
from workers.sinks.parts import FLUSH_BYTES, FLUSH_ROWS, PartWriter
from workers.sinks.rows import SeenMask, VideoRows
from workers.storage import open_store


def frame_row(idx: int) -> tuple[int, int, int, int, list[int]]:
    return (7, idx, idx * 40_000, idx % 3, list(range(idx % 4)))


def test_rows_come_back_in_bounded_groups(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "out"))
    num_rows = 2 * FLUSH_ROWS + 5
    with PartWriter(store, 4, "attempt", tmp_path) as parts:
        for idx in range(num_rows):
            parts.append("frames", frame_row(idx))
        size_bytes = parts.close_files()
        sent: list[int] = []
        (part,) = parts.upload(sent.append)
        assert sum(sent) == size_bytes == part.size_bytes

    assert (part.table, part.key) == ("frames", "_staging/4/attempt/frames-0.parquet")
    path = tmp_path / "out" / part.key
    data = path.read_bytes()
    assert (part.num_rows, part.size_bytes) == (num_rows, len(data))
    assert part.sha256 == hashlib.sha256(data).hexdigest()
    file = pq.ParquetFile(path)
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert groups == [FLUSH_ROWS, FLUSH_ROWS, 5]
    rows = [tuple(row.values()) for row in file.read().to_pylist()]
    assert rows == [frame_row(idx) for idx in range(num_rows)]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_large_values_bring_the_next_flush_nearer(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "out"))
    with PartWriter(store, 1, "a", tmp_path) as parts:
        for idx in range(9):
            parts.append("frames", frame_row(idx), FLUSH_BYTES // 4)
        parts.close_files()
        (part,) = parts.upload()
    file = pq.ParquetFile(tmp_path / "out" / part.key)
    assert [file.metadata.row_group(i).num_rows for i in range(3)] == [4, 4, 1]


def test_nothing_written_is_nothing_staged(tmp_path: Path) -> None:
    with PartWriter(open_store(str(tmp_path / "out")), 1, "a", tmp_path) as parts:
        parts.close_files()
        assert parts.upload() == ()
    assert not (tmp_path / "out").exists()


def test_a_spool_directory_is_made(tmp_path: Path) -> None:
    spool = tmp_path / "not" / "yet"
    with PartWriter(open_store(str(tmp_path / "out")), 1, "a", spool) as parts:
        parts.append("frames", frame_row(0))
        parts.close_files()
        assert len(parts.upload()) == 1
    assert list(spool.iterdir()) == []


@pytest.mark.parametrize("num_rows", [1, FLUSH_ROWS + 1])
def test_abort_leaves_nothing(tmp_path: Path, num_rows: int) -> None:
    store = open_store(str(tmp_path / "out"))

    def fail() -> None:
        with PartWriter(store, 1, "a", tmp_path) as parts:
            for idx in range(num_rows):
                parts.append("frames", frame_row(idx))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("not a folder")
    store = open_store(str(tmp_path / "out"))
    with PartWriter(store, 1, "a", tmp_path) as parts:
        parts.append("frames", frame_row(0))
        parts.close_files()
        with pytest.raises(StoreError, match="out"):
            parts.upload()


def test_a_full_spool_is_a_full_store(tmp_path: Path) -> None:
    # /dev/full refuses every write as a full disk does.
    with PartWriter(open_store(str(tmp_path / "out")), 1, "a", tmp_path) as parts:
        folder = next(path for path in tmp_path.iterdir() if path.name.startswith("maskmill"))
        (folder / "frames-0.parquet").symlink_to("/dev/full")
        parts.append("frames", frame_row(0))
        with pytest.raises(StoreError, match="no space left"):
            parts.close_files()


def seen(object_id: int, x: int, score: float = 0.5) -> SeenMask:
    mask = np.zeros((20, 40), np.uint8)
    mask[5:15, x : x + 10] = 1
    return SeenMask(object_id, score, rle.encode_with_stats(mask), False, False)


def test_sums_per_object(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "out"))
    with PartWriter(store, 1, "a", tmp_path) as parts:
        rows = VideoRows(parts, 7, 20, 40)
        rows.add_prompt(1, 10, "box", {"box_xyxy": [1, 2, 3, 4]}, "file", 3, None)
        rows.add_prompt(9, 10, "box", {"box_xyxy": [1, 2, 3, 4]}, "file", None, None)
        rows.add_frame(10, 0, [seen(1, 5, 1.0)], [9])
        rows.add_frame(12, 80, [seen(1, 10, 0.5)], [9])  # boxes share half of each: IoU 1/3
        rows.add_frame(14, 160, [], [1, 9])
        rows.add_frame(16, 240, [seen(1, 10, 0.0)], [9])  # does not follow its last mask
        rows.add_frame(18, 320, [seen(1, 10, 0.5)], [9])  # at rest: IoU 1
        rows.finish()
        assert (rows.num_objects, rows.num_frames, rows.num_masks) == (2, 5, 4)
        assert (rows.first_frame, rows.last_frame) == (10, 18)
        parts.close_files()
        staged = {part.table: part for part in parts.upload()}
    table = pq.read_table(tmp_path / "out" / staged["objects"].key).to_pylist()
    first, never = table
    assert (first["object_id"], first["category_id"]) == (1, 3)
    assert (first["first_frame"], first["last_frame"], first["frames_visible"]) == (10, 18, 4)
    assert first["mean_score"] == 0.5
    assert first["mean_area"] == 100
    assert first["stability"] == pytest.approx((1 / 3 + 1) / 2)
    assert never["object_id"] == 9
    assert never["frames_visible"] == 0
    assert [never[name] for name in ("first_frame", "mean_score", "stability")] == [None] * 3
    prompts = pq.read_table(tmp_path / "out" / staged["prompts"].key).to_pylist()
    assert json.loads(prompts[0]["payload"]) == {"box_xyxy": [1, 2, 3, 4]}
