"""Small outputs with real parts in staging, and a reader of visible folders that knows no log."""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.commit_log import CommitLog, VideoCommit, input_identity
from jobs.records import RunPlan
from workers import rle
from workers.messages import Part, Stage, StageStats
from workers.sinks.schema import arrow_schema, writer_options
from workers.storage import Store

HEIGHT, WIDTH = 12, 16
FILLERS: dict[str, Any] = {"bool": False, "string": "", "double": 0.0, "float": 0.0}


def identity_of(key: int, version: int) -> int:
    return input_identity(f"etag-{key}-{version}", 1000, None, None, 1, "")


def stage_video(
    store: Store,
    epoch: int,
    key: int,
    *,
    version: int = 0,
    num_frames: int = 3,
    num_objects: int = 2,
    attempt_id: str | None = None,
    mask_parts: int = 1,
) -> VideoCommit:
    """Write the parts of one video, as a worker would, and return its commit.

    `version` is what tells two inputs of a video apart: it is in the identity and in every pts_us.
    """
    attempt_id = attempt_id or f"a{epoch}-{key}-{version}"
    generator = np.random.default_rng(abs(key) * 7 + version)
    masks: list[dict[str, Any]] = []
    frames: list[dict[str, Any]] = []
    for frame in range(num_frames):
        pts = frame * 1000 + version
        for object_id in range(1, num_objects + 1):
            mask = np.zeros((HEIGHT, WIDTH), np.uint8)
            top, left = generator.integers(0, 8, 2)
            mask[top : top + 4, left : left + 5] = 1
            encoded = rle.encode_with_stats(mask)
            box = dict(
                zip(("bbox_x", "bbox_y", "bbox_w", "bbox_h"), encoded.bbox_xywh, strict=True)
            )
            masks.append(
                {
                    "video_key": key,
                    "frame_idx": frame,
                    "pts_us": pts,
                    "object_id": object_id,
                    "category_id": object_id % 2,
                    "score": 0.5,
                    "area": encoded.area,
                    "rle_h": HEIGHT,
                    "rle_w": WIDTH,
                    "rle_counts": encoded.counts,
                    "flags": 0,
                }
                | box
            )
        frames.append(
            {
                "video_key": key,
                "frame_idx": frame,
                "pts_us": pts,
                "num_objects": num_objects,
                "occluded_ids": [],
            }
        )
    objects = [
        {
            "video_key": key,
            "object_id": object_id,
            "category_id": object_id % 2,
            "frames_visible": num_frames,
        }
        for object_id in range(1, num_objects + 1)
    ]
    prompts = [
        {
            "video_key": key,
            "object_id": object_id,
            "frame_idx": 0,
            "kind": "box",
            "payload": "{}",
            "source": "file",
        }
        for object_id in range(1, num_objects + 1)
    ]
    cut = -(-len(masks) // mask_parts) or 1
    pieces = [("masks", masks[at : at + cut]) for at in range(0, len(masks), cut)]
    pieces += [("frames", frames), ("objects", objects), ("prompts", prompts)]
    parts = tuple(
        _stage(store, f"_staging/{epoch}/{attempt_id}/{table}-{number}.parquet", table, rows)
        for number, (table, rows) in enumerate(pieces)
        if rows
    )
    return VideoCommit(
        key,
        identity_of(key, version),
        attempt_id,
        1,
        parts,
        video_row(key, num_frames, num_objects, version),
        (
            StageStats(Stage.TRACK, num_frames, 0.5),
            StageStats(Stage.DECODE, num_frames, 0.25, 0.0, 0.125),
        ),
    )


def _stage(store: Store, key: str, table: str, rows: list[dict[str, Any]]) -> Part:
    sink = io.BytesIO()
    schema = arrow_schema(table)
    with pq.ParquetWriter(sink, schema, **writer_options(table)) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    data = sink.getvalue()
    store.write_bytes(key, data)
    return Part(table, key, len(rows), len(data), hashlib.sha256(data).hexdigest())


def video_row(key: int, num_frames: int, num_objects: int, version: int = 0) -> dict[str, Any]:
    """Return a complete row of `videos`; columns that do not matter here are filled."""
    row = {
        field.name: FILLERS.get(str(field.type), 0)
        for field in arrow_schema("videos")
        if not field.nullable
    }
    return row | {
        "video_key": key,
        "uri": f"/corpus/{key}.mp4",
        "name": f"{key}.mp4",
        "etag": f"etag-{key}-{version}",
        "width": WIDTH,
        "height": HEIGHT,
        "frames_decoded": num_frames,
        "frames_tracked": num_frames,
        "num_objects": num_objects,
        "num_masks": num_frames * num_objects,
        "stride": 1,
        "status": "committed",
        "attempts": 1,
    }


def run_plan(run_id: str = "run-1", **settings: Any) -> RunPlan:
    return RunPlan(
        run_id,
        config={"out": {"uri": "somewhere"}},
        settings={"tracker.name": "flow"} | settings,
        fingerprint="0123456789abcdef",
        categories={0: "cat", 1: "dog"},
        versions={"maskmill": "0"},
        totals={"num_videos": 5},
    )


def worker_row(worker_id: str, epoch: int, num_videos: int = 0) -> dict[str, Any]:
    return {
        "run_id": "run-1",
        "epoch": epoch,
        "worker_id": worker_id,
        "host": "here",
        "gpu": "",
        "pid": 1,
        "started_at": 1_700_000_000.0,
        "load_s": 1.0,
        "num_videos": num_videos,
        "num_frames": 3 * num_videos,
        "busy_s": 1.0,
        "idle_s": 1.0,
        "exit_reason": None,
    }


def commit_videos(
    log: CommitLog, keys: Sequence[int], *, version: int = 0, **shape: Any
) -> list[VideoCommit]:
    """Stage some videos under the log's epoch and commit them in one record."""
    commits = [stage_video(log.store, log.epoch, key, version=version, **shape) for key in keys]
    log.commit(commits)
    return commits


def visible_table(store: Store, table: str) -> pa.Table:
    """Read a visible folder as a stranger would: every Parquet file in it, nothing else asked."""
    tables = [arrow_schema(table).empty_table()]
    with tempfile.TemporaryDirectory() as folder:
        for stat in store.list(f"{table}/"):
            local = Path(folder) / "file.parquet"
            store.get_file(stat.key, local)
            tables.append(pq.read_table(local, memory_map=False))
    return pa.concat_tables(tables)


def visible_versions(store: Store) -> dict[int, int]:
    """Return the version of each visible video; fail when a row is doubled, lost or mixed up."""
    videos = visible_table(store, "videos").to_pylist()
    seen = Counter(row["video_key"] for row in videos)
    assert not [key for key, count in seen.items() if count > 1], f"doubled videos: {seen}"
    frames = visible_table(store, "frames").to_pylist()
    masks = visible_table(store, "masks").to_pylist()
    for name, rows, keys in (
        ("frames", frames, ("video_key", "frame_idx")),
        ("masks", masks, ("video_key", "frame_idx", "object_id")),
        ("objects", visible_table(store, "objects").to_pylist(), ("video_key", "object_id")),
        ("prompts", visible_table(store, "prompts").to_pylist(), ("video_key", "object_id")),
        ("stages", visible_table(store, "stages").to_pylist(), ("video_key", "stage")),
    ):
        counts = Counter(tuple(row[key] for key in keys) for row in rows)
        doubled = [key for key, count in counts.items() if count > 1 and key[0] in seen]
        assert not doubled, f"doubled rows in {name}: {doubled}"
    versions: dict[int, int] = {}
    for row in videos:
        key = row["video_key"]
        version = int(row["etag"].rpartition("-")[2])
        own_frames = [frame for frame in frames if frame["video_key"] == key]
        own_masks = [mask for mask in masks if mask["video_key"] == key]
        assert len(own_frames) == row["frames_tracked"], f"frames of {key}"
        assert len(own_masks) == row["num_masks"], f"masks of {key}"
        assert {r["pts_us"] % 1000 for r in (*own_frames, *own_masks)} <= {version}, (
            f"rows of several versions of video {key}"
        )
        versions[key] = version
    return versions
