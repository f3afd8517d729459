"""Look at a finished dataset as any user's tools would, and compare two of them.

Nothing here uses the project's own reader: plain globs, DuckDB, pyarrow and pycocotools.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pycocotools import mask as coco

RESULT_TABLES = ("masks", "frames", "objects", "prompts", "videos")
"""Tables whose rows depend on the corpus and the configuration alone."""
VOLATILE = {
    "attempts",
    "error_class",
    "etag",
    "fps_end_to_end",
    "gpu",
    "host",
    "peak_gpu_memory_bytes",
    "peak_memory_bytes",
}
"""Columns of `videos` that depend on when and where; every `*_s` column does too."""


def read_table(out: Path, table: str) -> pa.Table:
    """Return all rows of a visible folder, in the order of their keys."""
    files = sorted((out / table).glob("*.parquet"))
    assert files, f"no file in {out / table}"
    rows = pa.concat_tables([pq.read_table(f) for f in files])
    wanted = ("epoch", "worker_id", "video_key", "frame_idx", "object_id", "stage")
    keys = [(column, "ascending") for column in wanted if column in rows.column_names]
    return rows.sort_by(keys) if keys else rows


def results(out: Path, *, but: Collection[str] = ()) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of a dataset that must not depend on what happened on the way.

    Columns in `but` are left out too.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for table in RESULT_TABLES:
        if not list((out / table).glob("*.parquet")):
            found[table] = []
            continue
        rows = read_table(out, table)
        left_out = VOLATILE | set(but)
        kept = [c for c in rows.column_names if c not in left_out and not c.endswith("_s")]
        found[table] = rows.select(kept).to_pylist()
    return found


def assert_same(
    out: Path, reference: Mapping[str, list[dict[str, Any]]], *, but: Collection[str] = ()
) -> None:
    """Fail unless a dataset equals a reference, row for row."""
    found = results(out, but=but)
    for table in RESULT_TABLES:
        assert len(found[table]) == len(reference[table]), (
            f"{table} has {len(found[table])} rows, the reference {len(reference[table])}"
        )
        for ours, theirs in zip(found[table], reference[table], strict=True):
            assert ours == theirs, f"a row of {table} differs"


def assert_whole(out: Path, frames_per_video: Mapping[str, int]) -> None:
    """Fail unless every frame and mask is there once, and every mask is what its row says.

    Parameters
    ----------
    out : Path
        The output.
    frames_per_video : Mapping of str to int
        Names of the committed videos, and how many frames each has.
    """
    db = duckdb.connect()

    def sql(query: str) -> list[tuple[Any, ...]]:
        tables = ("masks", "frames", "objects", "videos")
        globs = {table: f"'{out}/{table}/*.parquet'" for table in tables}
        rows: list[tuple[Any, ...]] = db.sql(query.format(**globs)).fetchall()
        return rows

    names = dict(sql("SELECT name, frames_tracked FROM {videos}"))
    assert names == dict(frames_per_video)
    assert sql("SELECT count(*), count(DISTINCT video_key) FROM {videos}") == [
        (len(names), len(names))
    ]
    counted = dict(
        sql(
            "SELECT v.name, count(f.frame_idx) FROM {videos} v "
            "LEFT JOIN {frames} f USING (video_key) GROUP BY v.name"
        )
    )
    assert counted == dict(frames_per_video)
    for key in (
        "video_key, frame_idx FROM {frames}",
        "video_key, frame_idx, object_id FROM {masks}",
    ):
        twice = f"SELECT {key} GROUP BY ALL HAVING count(*) > 1"
        assert sql(f"SELECT count(*) FROM ({twice})") == [(0,)]
    # A mask belongs to a frame that is there, of a video that is there.
    assert sql("SELECT count(*) FROM {masks} ANTI JOIN {frames} USING (video_key, frame_idx)") == [
        (0,)
    ]
    assert sql(
        "SELECT count(*) FROM (SELECT video_key, frame_idx, count(*) AS n FROM {masks} "
        "GROUP BY ALL) m JOIN {frames} f USING (video_key, frame_idx) WHERE m.n != f.num_objects"
    ) == [(0,)]
    for row in read_table(out, "masks").to_pylist():
        rle = {"size": [row["rle_h"], row["rle_w"]], "counts": row["rle_counts"]}
        mask = coco.decode(rle)
        assert mask.shape == (row["rle_h"], row["rle_w"])
        assert int(mask.sum()) == row["area"]
        box = [row["bbox_x"], row["bbox_y"], row["bbox_w"], row["bbox_h"]]
        assert np.allclose(coco.toBbox(rle), box)
