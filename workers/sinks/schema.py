"""The tables of a dataset: every column with its type, its unit and one sentence.

Descriptions live here and nowhere else: they travel in the metadata of every Parquet file, and
``python -m workers.sinks.schema`` prints them as SCHEMA.md. The columns are declared without
pyarrow, which takes a third of a second to import, because the configuration needs the version of
the schema and ``--help`` must not wait for it; `TABLES` builds the Arrow schemas when first asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

    TABLES: dict[str, pa.Schema]

SCHEMA_VERSION = 1
"""Version of the tables; part of a run's fingerprint, and stored in every Parquet file."""

VERSION_KEY = b"maskmill.schema_version"
"""Key of the version in a file's metadata."""
TABLE_KEY = b"maskmill.table"
"""Key of the table's name in a file's metadata."""

COMPRESSION = "zstd"
COMPRESSION_LEVEL = 3
ROW_GROUP_ROWS = 131_072
"""Rows of a row group in the visible folders; parts in staging have smaller ones."""

NO_UNIT = "-"
"""Stands where a column is a name, a flag or an identity."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table.

    Attributes
    ----------
    name : str
        Its name.
    type : str
        Name of its Arrow type; ``list<int32>`` is the only nested one.
    unit : str
        Unit of its values, `NO_UNIT` for names, flags and identities.
    description : str
        What it says, in one sentence.
    nullable : bool
        Whether a row may leave it empty.
    """

    name: str
    type: str
    unit: str
    description: str
    nullable: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """One table of a dataset.

    Attributes
    ----------
    name : str
        Its name, and that of its visible folder.
    description : str
        What one row is.
    columns : tuple of Column
        Its columns in order.
    sorted_by : tuple of str
        Columns its rows are sorted by, in every file.
    plain : tuple of str
        Columns written without a dictionary: their values hardly ever repeat.
    """

    name: str
    description: str
    columns: tuple[Column, ...]
    sorted_by: tuple[str, ...] = ("video_key",)
    plain: tuple[str, ...] = ()


_VIDEO_KEY = Column(
    "video_key",
    "int64",
    NO_UNIT,
    "The video: first 8 bytes of blake2b(canonical URI and time range), signed.",
)
_FRAME_IDX = Column(
    "frame_idx",
    "int32",
    "frames",
    "0-based index of the frame in decoded order of the source, whatever the stride.",
)
_PTS_US = Column(
    "pts_us",
    "int64",
    "microseconds",
    "Presentation time from the start of the stream; right for variable frame rates.",
)
_OBJECT_ID = Column(
    "object_id", "int32", NO_UNIT, "The object: unique within run and video, never used again."
)
_CATEGORY_ID = Column(
    "category_id",
    "int16",
    NO_UNIT,
    "Category of the object, see `categories`; empty where none is known.",
    nullable=True,
)

DECLARATIONS: tuple[Table, ...] = (
    Table(
        "masks",
        "One row per video, frame and object that is present there.",
        (
            _VIDEO_KEY,
            _FRAME_IDX,
            _PTS_US,
            _OBJECT_ID,
            _CATEGORY_ID,
            Column("score", "float32", "0..1", "Confidence of the tracker in this mask."),
            Column("bbox_x", "float32", "pixels", "Left edge of the mask's box (COCO xywh)."),
            Column("bbox_y", "float32", "pixels", "Top edge of the mask's box."),
            Column("bbox_w", "float32", "pixels", "Width of the mask's box."),
            Column("bbox_h", "float32", "pixels", "Height of the mask's box."),
            Column("area", "int32", "pixels", "Number of pixels of the mask."),
            Column("rle_h", "int16", "pixels", "Height of the picture after rotation."),
            Column("rle_w", "int16", "pixels", "Width of the picture after rotation."),
            Column(
                "rle_counts",
                "binary",
                NO_UNIT,
                "The mask as COCO compressed counts; with [rle_h, rle_w] as size, pycocotools "
                "takes them as they are.",
            ),
            Column(
                "flags",
                "uint8",
                "bits",
                "Sum of 1: the object was prompted on this frame, 2: the mask is not empty "
                "although the tracker reports the object as occluded, 16: the mask touches the "
                "border of the picture.",
            ),
        ),
        sorted_by=("video_key", "frame_idx", "object_id"),
        plain=("rle_counts", "score", "pts_us", "frame_idx"),
    ),
    Table(
        "frames",
        "One row per tracked frame, also where nothing is visible.",
        (
            _VIDEO_KEY,
            _FRAME_IDX,
            _PTS_US,
            Column("num_objects", "int32", "objects", "Number of rows in `masks` for the frame."),
            Column(
                "occluded_ids",
                "list<int32>",
                NO_UNIT,
                "Objects that are tracked but hidden or gone on this frame, ascending.",
            ),
        ),
        sorted_by=("video_key", "frame_idx"),
        plain=("pts_us", "frame_idx"),
    ),
    Table(
        "prompts",
        "One row per prompt that was given to the tracker.",
        (
            _VIDEO_KEY,
            _OBJECT_ID,
            _FRAME_IDX,
            Column("kind", "string", NO_UNIT, "`box`, `points` or `mask`."),
            Column(
                "payload",
                "string",
                "pixels",
                'The prompt as JSON, in pixels of the picture after rotation: `{"box_xyxy": '
                '[x0, y0, x1, y1]}`, `{"points_xy": [[x, y], ...], "point_labels": [1, ...]}` '
                '(1 foreground, 0 background) or `{"size": [H, W], "counts": "..."}` (COCO RLE).',
            ),
            Column("source", "string", NO_UNIT, "`file`, `folder` or `detector:NAME`."),
            _CATEGORY_ID,
            Column(
                "score",
                "float32",
                "0..1",
                "Confidence of the detector; empty for prompts that were given.",
                nullable=True,
            ),
        ),
        sorted_by=("video_key", "frame_idx", "object_id"),
        plain=("payload",),
    ),
    Table(
        "categories",
        "One row per category of the run; fixed when the run is planned.",
        (
            Column(
                "category_id",
                "int16",
                NO_UNIT,
                "The category: class index of the detector, else rank of the label.",
            ),
            Column("name", "string", NO_UNIT, "Name of the category."),
        ),
        sorted_by=("category_id",),
    ),
    Table(
        "objects",
        "One row per video and object that was ever prompted.",
        (
            _VIDEO_KEY,
            _OBJECT_ID,
            _CATEGORY_ID,
            Column(
                "first_frame",
                "int32",
                "frames",
                "frame_idx of the first mask; empty for an object never seen.",
                nullable=True,
            ),
            Column(
                "last_frame",
                "int32",
                "frames",
                "frame_idx of the last mask; empty for an object never seen.",
                nullable=True,
            ),
            Column("frames_visible", "int32", "frames", "Number of its masks."),
            Column(
                "mean_score",
                "float32",
                "0..1",
                "Mean score of its masks; empty for an object never seen.",
                nullable=True,
            ),
            Column(
                "mean_area",
                "float32",
                "pixels",
                "Mean area of its masks; empty for an object never seen.",
                nullable=True,
            ),
            Column(
                "stability",
                "float32",
                "0..1",
                "Mean overlap (IoU) of the boxes of its masks on consecutive tracked frames: 1 is "
                "at rest, low values mean fast motion or flicker; empty where no two such masks "
                "follow each other.",
                nullable=True,
            ),
        ),
        sorted_by=("video_key", "object_id"),
    ),
    Table(
        "videos",
        "One row per committed video; written last, so what it names is readable.",
        (
            _VIDEO_KEY,
            Column("uri", "string", NO_UNIT, "Canonical URI, the object's key kept verbatim."),
            Column("name", "string", NO_UNIT, "Path below the root of the corpus."),
            Column(
                "etag",
                "string",
                NO_UNIT,
                "Entity tag of the source, else its size and modification time.",
                nullable=True,
            ),
            Column("size_bytes", "int64", "bytes", "Size of the source.", nullable=True),
            Column("codec", "string", NO_UNIT, "Video codec of the source.", nullable=True),
            Column("width", "int32", "pixels", "Width of the picture after rotation."),
            Column("height", "int32", "pixels", "Height of the picture after rotation."),
            Column("rotation", "int16", "degrees", "Rotation that was applied: 0, 90, 180 or 270."),
            Column(
                "fps",
                "float64",
                "frames per second",
                "Average frame rate of the source; empty where it has none.",
                nullable=True,
            ),
            Column("vfr", "bool", NO_UNIT, "Whether the time between frames varies."),
            Column("duration_us", "int64", "microseconds", "Duration of the source.", True),
            Column("frames_decoded", "int32", "frames", "Number of frames decoded."),
            Column("frames_tracked", "int32", "frames", "Number of rows in `frames`."),
            Column(
                "frames_corrupt",
                "int32",
                "frames",
                "Number of packets or images inside the video that could not be decoded and were "
                "left out.",
            ),
            Column(
                "start_frame",
                "int32",
                "frames",
                "frame_idx of the first tracked frame; empty without any.",
                nullable=True,
            ),
            Column(
                "end_frame",
                "int32",
                "frames",
                "One more than the frame_idx of the last tracked frame; empty without any.",
                nullable=True,
            ),
            Column("stride", "int32", "frames", "Every how many decoded frames one is tracked."),
            Column(
                "truncated",
                "bool",
                NO_UNIT,
                "Whether the source ends before its header says, or in the middle of a frame.",
            ),
            Column("num_objects", "int32", "objects", "Number of rows in `objects`."),
            Column("num_masks", "int64", "masks", "Number of rows in `masks`."),
            Column("status", "string", NO_UNIT, "`committed`."),
            Column("attempts", "int32", "attempts", "Number of tries, the accepted one included."),
            Column(
                "error_class",
                "string",
                NO_UNIT,
                "Failure kind of the last try before the accepted one; empty if the first was.",
                nullable=True,
            ),
            Column(
                "queue_s",
                "float64",
                "seconds",
                "From the start of the run, or the end of the try before, to the begin of the "
                "accepted try.",
            ),
            Column(
                "wall_s",
                "float64",
                "seconds",
                "From the begin of the accepted try on its worker to its last part uploaded, "
                "waiting for the tracker included.",
            ),
            Column("download_s", "float64", "seconds", "Busy in the stage download."),
            Column("decode_s", "float64", "seconds", "Busy in the stage decode."),
            Column(
                "encode_image_s",
                "float64",
                "seconds",
                "Busy in the stage encode_image (image features made apart from tracking).",
            ),
            Column("track_s", "float64", "seconds", "Busy in the stage track, detection included."),
            Column("rle_s", "float64", "seconds", "Busy in the stage rle."),
            Column("write_s", "float64", "seconds", "Busy in the stage write."),
            Column("upload_s", "float64", "seconds", "Busy in the stage upload."),
            Column(
                "fps_end_to_end",
                "float64",
                "frames per second",
                "frames_tracked over the time from the first frame decoded to the last part "
                "closed, the wait for the tracker left out.",
            ),
            Column(
                "peak_memory_bytes",
                "int64",
                "bytes",
                "Largest resident memory of the worker's process up to the end of this video.",
            ),
            Column(
                "peak_gpu_memory_bytes",
                "int64",
                "bytes",
                "Largest memory PyTorch held on the worker's GPU up to the end of this video; "
                "empty without one.",
                nullable=True,
            ),
            Column("host", "string", NO_UNIT, "Host the accepted try ran on."),
            Column("gpu", "string", NO_UNIT, "Name of its GPU; empty text without one."),
            Column("decoder", "string", NO_UNIT, "Decoder that read the source, with version."),
            Column("tracker", "string", NO_UNIT, "Tracker, with its size where it has one."),
            Column(
                "config_fingerprint",
                "string",
                NO_UNIT,
                "Fingerprint of everything that changes masks.",
            ),
            Column(
                "weights_sha256",
                "string",
                NO_UNIT,
                "SHA-256 of the tracker's weights; empty text for a tracker without any.",
            ),
            Column(
                "detector_sha256",
                "string",
                NO_UNIT,
                "SHA-256 of the detector's weights; empty text without a detector.",
            ),
        ),
    ),
    Table(
        "stages",
        "One row per committed video and stage that ran.",
        (
            _VIDEO_KEY,
            Column(
                "stage",
                "string",
                NO_UNIT,
                "`download`, `decode`, `encode_image`, `track`, `rle`, `write` or `upload`.",
            ),
            Column(
                "items",
                "int64",
                "frames, masks or bytes",
                "What went through it: bytes for download and upload, masks for rle and write, "
                "else frames.",
            ),
            Column("busy_s", "float64", "seconds", "Time at work."),
            Column("wait_input_s", "float64", "seconds", "Time waiting for the stage before."),
            Column("wait_output_s", "float64", "seconds", "Time waiting for the stage after."),
        ),
        sorted_by=("video_key", "stage"),
    ),
    Table(
        "workers",
        "One row per worker of every execution; current state, replaced whole.",
        (
            Column("run_id", "string", NO_UNIT, "The run it served."),
            Column("epoch", "int64", NO_UNIT, "Epoch of the driver that started it."),
            Column("worker_id", "string", NO_UNIT, "The worker: unique within the output."),
            Column("host", "string", NO_UNIT, "Host it ran on."),
            Column("gpu", "string", NO_UNIT, "Name of its GPU; empty text without one."),
            Column("pid", "int64", NO_UNIT, "Process id on that host.", nullable=True),
            Column("started_at", "timestamp[us, UTC]", "UTC", "When it was asked for."),
            Column("load_s", "float64", "seconds", "Time its setup took.", nullable=True),
            Column("num_videos", "int64", "videos", "Accepted tries it finished."),
            Column("num_frames", "int64", "frames", "Frames tracked in them."),
            Column("busy_s", "float64", "seconds", "Time with at least one try on it."),
            Column("idle_s", "float64", "seconds", "Time without any, after its setup."),
            Column(
                "exit_reason",
                "string",
                NO_UNIT,
                "Why it ended; empty while it lives.",
                nullable=True,
            ),
        ),
        sorted_by=("epoch", "worker_id"),
    ),
    Table(
        "runs",
        "One row per execution of a driver; current state, replaced whole.",
        (
            Column("run_id", "string", NO_UNIT, "The run."),
            Column("epoch", "int64", NO_UNIT, "Epoch of the driver's fence."),
            Column("owner", "string", NO_UNIT, "Host and process of the driver."),
            Column("started_at", "timestamp[us, UTC]", "UTC", "When the driver took the fence."),
            Column(
                "ended_at", "timestamp[us, UTC]", "UTC", "When it ended; empty while it runs.", True
            ),
            Column("exit_code", "int32", NO_UNIT, "Exit code; empty while it runs.", True),
            Column(
                "config_fingerprint",
                "string",
                NO_UNIT,
                "Fingerprint of everything that changes masks.",
            ),
            Column("config", "string", NO_UNIT, "The resolved configuration, as JSON."),
            Column("versions", "string", NO_UNIT, "Versions of the software, as JSON."),
            Column("num_videos", "int64", "videos", "Videos of the corpus as planned."),
            Column("num_committed", "int64", "videos", "Videos committed by this execution."),
            Column("num_quarantined", "int64", "videos", "Videos it put into quarantine."),
            Column("num_frames", "int64", "frames", "Frames of the videos it committed."),
            Column("num_masks", "int64", "masks", "Masks of the videos it committed."),
            Column("wall_s", "float64", "seconds", "Time it ran."),
        ),
        sorted_by=("epoch",),
    ),
    Table(
        "quarantine",
        "One row per video that is not tried again without being asked; current state, replaced "
        "whole.",
        (
            _VIDEO_KEY,
            Column("uri", "string", NO_UNIT, "Canonical URI, the object's key kept verbatim."),
            Column("name", "string", NO_UNIT, "Path below the root of the corpus."),
            Column("error_class", "string", NO_UNIT, "Failure kind of the last try."),
            Column("message", "string", NO_UNIT, "What is wrong and what to do, in a sentence."),
            Column("traceback", "string", NO_UNIT, "For the engineer; may be empty text."),
            Column("attempts", "int32", "attempts", "Number of tries."),
            Column("reproduce", "string", NO_UNIT, "Command that tries this video alone."),
        ),
    ),
)

_BY_NAME = {table.name: table for table in DECLARATIONS}

FLAG_PROMPTED = 1
FLAG_OCCLUDED = 2
FLAG_BORDER = 16


@cache
def arrow_schema(table: str) -> pa.Schema:
    """Return the Arrow schema of a table.

    Parameters
    ----------
    table : str
        Name of the table.

    Returns
    -------
    pyarrow.Schema
        As `schema_of` makes it.

    Raises
    ------
    KeyError
        There is no such table.
    """
    return schema_of(_BY_NAME[table])


def schema_of(declared: Table) -> pa.Schema:
    """Return the Arrow schema of a declared table.

    Parameters
    ----------
    declared : Table
        One of `DECLARATIONS`, or a table that is kept beside the dataset.

    Returns
    -------
    pyarrow.Schema
        Unit and description of every column are in the fields' metadata, name, description and
        `SCHEMA_VERSION` in the schema's.
    """
    import pyarrow as pa

    types = {
        "bool": pa.bool_(),
        "list<int32>": pa.list_(pa.field("element", pa.int32(), nullable=False)),
        "timestamp[us, UTC]": pa.timestamp("us", tz="UTC"),
    }
    fields = [
        pa.field(
            column.name,
            types.get(column.type) or pa.type_for_alias(column.type),
            nullable=column.nullable,
            metadata={"unit": column.unit, "description": column.description},
        )
        for column in declared.columns
    ]
    return pa.schema(
        fields,
        metadata={
            VERSION_KEY: str(SCHEMA_VERSION),
            TABLE_KEY: declared.name,
            b"maskmill.description": declared.description,
        },
    )


def writer_options(table: str) -> dict[str, Any]:
    """Return the settings every Parquet file of a table is written with.

    Parameters
    ----------
    table : str
        Name of the table.

    Returns
    -------
    dict of str to value
        Keyword arguments of `pyarrow.parquet.ParquetWriter`, beside the schema.
    """
    return writer_options_of(_BY_NAME[table])


def writer_options_of(declared: Table) -> dict[str, Any]:
    """Return the settings the Parquet files of a declared table are written with.

    Parameters
    ----------
    declared : Table
        One of `DECLARATIONS`, or a table that is kept beside the dataset.

    Returns
    -------
    dict of str to value
        Keyword arguments of `pyarrow.parquet.ParquetWriter`, beside the schema.
    """
    import pyarrow.parquet as pq

    schema = schema_of(declared)
    dictionary = [c.name for c in declared.columns if c.name not in declared.plain]
    measured = [c.name for c in declared.columns if c.type != "binary"]
    return {
        "compression": COMPRESSION,
        "compression_level": COMPRESSION_LEVEL,
        "write_page_index": True,
        "use_dictionary": [_leaf(schema, name) for name in dictionary],
        # Smallest and largest counts of a mask help nobody to skip a page.
        "write_statistics": [_leaf(schema, name) for name in measured],
        "sorting_columns": pq.SortingColumn.from_ordering(
            schema, [(name, "ascending") for name in declared.sorted_by]
        ),
    }


def as_markdown() -> str:
    """Return SCHEMA.md."""
    lines = [
        "# Tables",
        "",
        f"Schema version {SCHEMA_VERSION}. This file is printed by `python -m "
        "workers.sinks.schema`; the same words are in the metadata of every Parquet file.",
        "",
        "Each table is a folder of Parquet files (zstd, page index) below the output: read it "
        "with a glob, `SELECT * FROM 'OUT/masks/*.parquet'`. Every committed video is there "
        "exactly once. Pixels are those of the picture after rotation, x to the right, y down, "
        "origin at the top left corner. Frames are counted from 0.",
    ]
    for table in DECLARATIONS:
        order = ", ".join(f"`{name}`" for name in table.sorted_by)
        lines += ["", f"## {table.name}", "", f"{table.description} Sorted by {order}.", ""]
        lines += ["| column | type | unit | what it says |", "|---|---|---|---|"]
        for column in table.columns:
            kind = column.type + (", null" if column.nullable else "")
            text = column.description.replace("|", "\\|")
            lines.append(f"| `{column.name}` | {kind} | {column.unit} | {text} |")
    return "\n".join(lines) + "\n"


def _leaf(schema: pa.Schema, name: str) -> str:
    """Return the path of a column's values in a Parquet file."""
    import pyarrow as pa

    return f"{name}.list.element" if pa.types.is_list(schema.field(name).type) else name


def __getattr__(name: str) -> Any:
    if name == "TABLES":
        tables = {table.name: arrow_schema(table.name) for table in DECLARATIONS}
        globals()["TABLES"] = tables
        return tables
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    print(as_markdown(), end="")
