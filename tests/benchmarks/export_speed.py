"""Masks per second of every export format on one core, and memory against the number of videos.

A dataset is made of masks like those of real trackers: blobs with uneven edges, or, with
`--davis`, the masks of DAVIS sequences, placed at random so that many overlap. One fresh process
per format exports it to a local disk, pinned to one core, and reports its time and its peak
memory. Then a dataset of twice and one of six times as many videos are exported, and their peaks
compared: both are larger than a row group of Parquet, up to which memory grows. The JSON and text
formats have a goal of 5,000 masks a second.

    python tests/benchmarks/export_speed.py [--davis FOLDER] [--masks 100000] [--json FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

GOAL_PER_S = 5000
HEIGHT, WIDTH = 720, 1280
NUM_SHAPES = 400
FORMATS: dict[str, dict[str, Any]] = {
    "coco": {},
    "coco --uncompressed": {"uncompressed": True},
    "ytvis": {},
    "ytvis --results": {"results": True},
    "mots": {},
    "mots --results": {"results": True},
    "sav": {},
    "davis": {},
}
MEMORY_FORMATS = ("coco", "mots")
COMMIT_VIDEOS = 64


class VideoSize(NamedTuple):
    """What a video of the dataset holds."""

    num_frames: int
    num_objects: int

    @property
    def num_masks(self) -> int:
        """One of every object on every frame."""
        return self.num_frames * self.num_objects


def shapes(davis: Path | None) -> list[Any]:
    """Return masks to draw from, encoded."""
    import cv2

    from workers import rle

    rng = np.random.default_rng(0)
    pictures = []
    if davis is not None:
        paths = sorted(davis.glob("*/masks/*.png"))
        if not paths:
            raise SystemExit(f"no masks below {davis}: expected NAME/masks/*.png")
        for path in rng.choice(np.array(paths, object), NUM_SHAPES):
            picture: Any = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
            # Never enlarged: that would give them stairs that no tracker draws.
            side = int(rng.integers(WIDTH // 4, picture.shape[1]))
            picture = cv2.resize(picture, (side, side * 9 // 16), interpolation=cv2.INTER_NEAREST)
            pictures.append((picture > 0).astype(np.uint8))
    else:
        for _ in range(NUM_SHAPES):
            width, height = rng.integers(60, 400, 2).tolist()
            noise = cv2.resize(rng.random((4, 4)).astype(np.float32), (width, height))
            y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
            pictures.append((x**2 + y**2 + 0.6 * noise < 1).astype(np.uint8))
    found = []
    for picture in pictures:
        whole = np.zeros((HEIGHT, WIDTH), np.uint8)
        height, width = picture.shape
        top = int(rng.integers(0, max(1, HEIGHT - height)))
        left = int(rng.integers(0, max(1, WIDTH - width)))
        whole[top : top + height, left : left + width] = picture[: HEIGHT - top, : WIDTH - left]
        if whole.any():
            found.append(rle.encode_with_stats(whole))
    return found


def make_dataset(folder: Path, num_videos: int, size: VideoSize, masks: list[Any]) -> None:
    """Commit and publish videos as a run would."""
    from jobs.commit_log import CommitLog
    from jobs.publication import Publisher
    from jobs.records import Outcome, RunPlan
    from workers.storage import open_store

    store = open_store(str(folder))
    log = CommitLog.acquire(store, "benchmark")
    log.plan(
        RunPlan(
            "benchmark",
            config={},
            settings={},
            fingerprint="0" * 16,
            categories={0: "car", 1: "person"},
            versions={},
            totals={},
        )
    )
    for first in range(0, num_videos, COMMIT_VIDEOS):
        keys = range(first, min(first + COMMIT_VIDEOS, num_videos))
        log.commit([_commit(store, log.epoch, key, size, masks) for key in keys])
    Publisher(log).finish(Outcome.FINISHED, exit_code=0)


def _commit(store: Any, epoch: int, key: int, size: VideoSize, masks: list[Any]) -> Any:
    from jobs.commit_log import VideoCommit, input_identity
    from tests.jobs.outputs import video_row

    rng = np.random.default_rng(key)
    num_frames, num_objects = size
    count = size.num_masks
    frame_idx = np.repeat(np.arange(num_frames), num_objects)
    object_id = np.tile(np.arange(1, num_objects + 1), num_frames)
    drawn = [masks[at] for at in rng.integers(0, len(masks), count)]
    boxes = np.array([mask.bbox_xywh for mask in drawn], np.float32)
    pts_us = np.arange(num_frames) * 40_000
    tables: dict[str, dict[str, Any]] = {
        "masks": {
            "video_key": np.full(count, key),
            "frame_idx": frame_idx,
            "pts_us": pts_us[frame_idx],
            "object_id": object_id,
            "category_id": object_id % 2,
            "score": rng.random(count).astype(np.float32),
            **{f"bbox_{side}": boxes[:, at] for at, side in enumerate("xywh")},
            "area": [mask.area for mask in drawn],
            "rle_h": np.full(count, HEIGHT),
            "rle_w": np.full(count, WIDTH),
            "rle_counts": [mask.counts for mask in drawn],
            "flags": np.zeros(count, np.uint8),
        },
        "frames": {
            "video_key": np.full(num_frames, key),
            "frame_idx": np.arange(num_frames),
            "pts_us": pts_us,
            "num_objects": np.full(num_frames, num_objects),
            "occluded_ids": [[]] * num_frames,
        },
        "objects": {
            "video_key": np.full(num_objects, key),
            "object_id": np.arange(1, num_objects + 1),
            "category_id": np.arange(1, num_objects + 1) % 2,
            "frames_visible": np.full(num_objects, num_frames),
        },
    }
    parts = [_part(store, f"_staging/{epoch}/{key}/{t}.parquet", t, c) for t, c in tables.items()]
    row = video_row(key, num_frames, num_objects)
    row |= {"width": WIDTH, "height": HEIGHT, "fps": 25.0, "start_frame": 0}
    row |= {"end_frame": num_frames, "duration_us": num_frames * 40_000}
    identity = input_identity(f"etag-{key}", 1, None, None, 1, "")
    return VideoCommit(key, identity, f"a{key}", 1, tuple(parts), row, ())


def _part(store: Any, key: str, table: str, columns: dict[str, Any]) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from workers.messages import Part
    from workers.sinks.schema import arrow_schema, writer_options

    schema = arrow_schema(table)
    arrays = [
        pa.array(columns[field.name], field.type)
        if field.name in columns
        else pa.nulls(len(columns["video_key"]), field.type)
        for field in schema
    ]
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, schema, **writer_options(table)) as writer:
        writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
    data = sink.getvalue()
    store.write_bytes(key, data)
    digest = hashlib.sha256(data).hexdigest()
    return Part(table, key, len(columns["video_key"]), len(data), digest)


def measure(dataset: str, format: str, answer: Any) -> None:
    """Export in this process, on one core; answer with masks, seconds and peak memory."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    import pyarrow as pa

    from jobs.dataset import open_dataset
    from jobs.export.exporter import ExportOptions, Format, export_dataset

    pa.set_cpu_count(1)
    with tempfile.TemporaryDirectory() as folder:
        begin, begin_cpu = time.perf_counter(), time.process_time()
        tally = export_dataset(
            open_dataset(dataset),
            Format(format.split()[0]),
            f"{folder}/dest",
            options=ExportOptions(**FORMATS[format]),
        )
        took_s, cpu_s = time.perf_counter() - begin, time.process_time() - begin_cpu
        files = [Path(folder, "dest"), *Path(folder, "dest").rglob("*")]
        size = sum(path.stat().st_size for path in files if path.is_file())
    # Not ru_maxrss: it remembers the memory of the process that started this one.
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    answer.put(
        {
            "masks": tally.num_masks,
            "s": took_s,
            "cpu_s": cpu_s,
            "peak_bytes": peak,
            "size_bytes": size,
        }
    )


def in_a_process(dataset: Path, format: str) -> dict[str, float]:
    """Return what `measure` finds in a fresh process."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    child = context.Process(target=measure, args=(str(dataset), format, answer))
    child.start()
    found: dict[str, float] = answer.get()
    child.join()
    return found


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--davis", type=Path, help="folder of DAVIS sequences")
    parser.add_argument("--masks", type=int, default=100_000)
    parser.add_argument("--size", type=int, nargs=2, default=[100, 10], help="frames and objects")
    parser.add_argument("--growth", type=int, nargs=2, default=[2, 6], help="for the memory")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()

    size = VideoSize(*args.size)
    num_videos = max(1, args.masks // size.num_masks)
    drawn = shapes(args.davis)
    mean = statistics.mean(len(mask.counts) for mask in drawn)
    print(
        f"{num_videos} videos of {size.num_frames} frames and {size.num_objects} objects, "
        f"{mean:.0f} B/mask"
    )
    figures: dict[str, Any] = {"bytes_per_mask": mean}
    with tempfile.TemporaryDirectory() as folder:
        dataset = Path(folder, "1")
        make_dataset(dataset, num_videos, size, drawn)
        print(f"{'format':22} {'masks/s':>9} {'busy':>6} {'MB':>7} {'peak MiB':>9}")
        for format in args.formats:
            runs = [in_a_process(dataset, format) for _ in range(args.repeats)]
            best = min(runs, key=lambda run: run["s"])
            speed, busy = best["masks"] / best["s"], best["cpu_s"] / best["s"]
            peak = statistics.median(run["peak_bytes"] for run in runs)
            figures[format] = {
                "masks_per_s": speed,
                "busy": busy,
                "size_bytes": best["size_bytes"],
                "peak_bytes": peak,
            }
            verdict = "" if speed >= GOAL_PER_S or format == "davis" else "  below the goal"
            print(
                f"{format:22} {speed:9,.0f} {busy:6.0%} {best['size_bytes'] / 1e6:7.1f} "
                f"{peak / 2**20:9.1f}{verdict}",
                flush=True,
            )
        for times in args.growth:
            dataset = Path(folder, str(times))
            make_dataset(dataset, times * num_videos, size, drawn)
            for format in [format for format in MEMORY_FORMATS if format in args.formats]:
                peak = in_a_process(dataset, format)["peak_bytes"]
                figures[format][f"peak_bytes_{times}"] = peak
                print(
                    f"{format:22} {times * num_videos} videos {peak / 2**20:9.1f} MiB", flush=True
                )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
