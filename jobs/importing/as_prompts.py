"""What an import has read, as a prompts file of `maskmill run`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.importing.annotations import Annotations, ReadMask, ReadVideo
from jobs.importing.formats import PromptFrames

if TYPE_CHECKING:
    import pyarrow as pa

ENDINGS = (".jsonl", ".ndjson", ".parquet")
"""What a prompts file may end with."""

_ROW_GROUP_ROWS = 8192


def write_prompts(annotations: Annotations, path: Path, ending: str, frames: PromptFrames) -> int:
    """Write a prompts file.

    Parameters
    ----------
    annotations : Annotations
        What was read.
    path : Path
        The file, on this machine.
    ending : str
        One of `ENDINGS`; it decides the form.
    frames : PromptFrames
        Which masks of an object become prompts.

    Returns
    -------
    int
        Number of prompts, which come by video, frame and object.
    """
    rows = _rows(annotations, frames)
    return _write_parquet(rows, path) if ending == ".parquet" else _write_json(rows, path)


def _rows(annotations: Annotations, frames: PromptFrames) -> Iterator[dict[str, Any]]:
    for video in annotations.videos():
        for mask in _chosen(annotations, video, frames):
            yield {
                "video": video.name,
                "frame_idx": mask.frame_idx,
                "object_id": mask.object_id,
                "label": mask.label,
                "mask_rle": {
                    "size": [video.height, video.width],
                    "counts": mask.counts.decode("ascii"),
                },
            }


def _chosen(annotations: Annotations, video: ReadVideo, frames: PromptFrames) -> Iterator[ReadMask]:
    if frames is PromptFrames.FIRST:
        yield from annotations.first_masks(video)
    else:
        for _, masks, _ in annotations.frames(video):
            yield from masks


def _write_json(rows: Iterator[dict[str, Any]], path: Path) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _write_parquet(rows: Iterator[dict[str, Any]], path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        {
            "video": pa.string(),
            "frame_idx": pa.int32(),
            "object_id": pa.int32(),
            "label": pa.string(),
            "mask_rle": pa.struct({"size": pa.list_(pa.int32()), "counts": pa.string()}),
        }
    )
    count = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for table in _tables(rows, schema):
            writer.write_table(table)
            count += table.num_rows
    return count


def _tables(rows: Iterator[dict[str, Any]], schema: pa.Schema) -> Iterator[pa.Table]:
    import pyarrow as pa

    while chunk := list(itertools.islice(rows, _ROW_GROUP_ROWS)):
        yield pa.Table.from_pylist(chunk, schema=schema)
