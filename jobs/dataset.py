"""The one reader of a dataset: videos, frames and masklets, for users and for everything here.

Where the output's log is there, it tells which file holds which video, so one video is read by
opening one file per table and only the row groups that hold it. A copy of the visible folders
alone is read as well, by looking into every file.

    >>> dataset = open_dataset("s3://bucket/masks")                    # doctest: +SKIP
    >>> for video in dataset.videos():                                 # doctest: +SKIP
    ...     for frame in dataset.frames(video):
    ...         print(frame.frame_idx, [mask.object_id for mask in frame.masks])
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from jobs.commit_log import LogState, read_state
from jobs.records import CURRENT_FILE, CURRENT_TABLES
from jobs.row_groups import batches
from workers import rle
from workers.errors import ConfigError, StoreError
from workers.messages import StoreOptions
from workers.sinks.schema import arrow_schema
from workers.storage import Store, open_store

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 16_384
"""Rows in memory at a time while a table is streamed."""
VIDEO_ROWS = 256
"""The same where rows become Python's values, of which one of `videos` takes kilobytes."""


@dataclass(frozen=True, slots=True)
class Video:
    """One video of a dataset.

    Attributes
    ----------
    video_key : int
        Its key in every table.
    name : str
        Path below the corpus root.
    uri : str
        Where the video is.
    width, height : int
        Pixels of the picture after rotation.
    num_frames : int
        Tracked frames.
    num_objects, num_masks : int
        Rows in `objects` and `masks`.
    row : Mapping of str to value
        The whole row of the table `videos`.
    """

    video_key: int
    name: str
    uri: str
    width: int
    height: int
    num_frames: int
    num_objects: int
    num_masks: int
    row: Mapping[str, Any] = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class VideoRows:
    """Everything about one video, as columns.

    Attributes
    ----------
    video : Video
        The video.
    frames, masks, objects : pyarrow.Table
        Its rows in these tables, sorted as the schema says.
    """

    video: Video
    frames: pa.Table
    masks: pa.Table
    objects: pa.Table


@dataclass(frozen=True, slots=True)
class ObjectMask:
    """One object on one frame.

    Attributes
    ----------
    object_id : int
        The object: unique within its video.
    category_id : int or None
        See `Dataset.categories`.
    score : float
        Confidence, 0..1.
    bbox_xywh : tuple of 4 float
        Box of the mask in pixels, as COCO writes it.
    area : int
        Pixels.
    size : tuple of (int, int)
        Height and width of the picture.
    counts : bytes
        COCO compressed counts.
    flags : int
        Bits, see the schema.
    """

    object_id: int
    category_id: int | None
    score: float
    bbox_xywh: tuple[float, float, float, float]
    area: int
    size: tuple[int, int]
    counts: bytes = field(repr=False)
    flags: int = 0

    def decode(self) -> NDArray[np.uint8]:
        """Return the mask as ndarray of uint8, shape (H, W), 1 on the object."""
        return rle.decode(self.counts, *self.size)


@dataclass(frozen=True, slots=True)
class Frame:
    """One tracked frame.

    Attributes
    ----------
    frame_idx : int
        0-based, in decoded order of the source.
    pts_us : int
        Presentation time in microseconds.
    masks : tuple of ObjectMask
        Objects that are present, by ascending id.
    occluded_ids : tuple of int
        Objects that are tracked but hidden.
    """

    frame_idx: int
    pts_us: int
    masks: tuple[ObjectMask, ...]
    occluded_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Masklet:
    """One object's masks through one video; N of them, in order of time.

    Attributes
    ----------
    video_key, object_id : int
        Which object.
    category_id : int or None
        See `Dataset.categories`.
    frame_idx : ndarray of int32, shape (N,)
        Frames on which it is present.
    pts_us : ndarray of int64, shape (N,)
        Their presentation times in microseconds.
    score : ndarray of float32, shape (N,)
        Confidence, 0..1.
    area : ndarray of int32, shape (N,)
        Pixels.
    bbox_xywh : ndarray of float32, shape (N, 4)
        Boxes in pixels, as COCO writes them.
    size : tuple of (int, int)
        Height and width of the picture.
    counts : tuple of bytes
        COCO compressed counts, one per mask.
    """

    video_key: int
    object_id: int
    category_id: int | None
    frame_idx: NDArray[np.int32]
    pts_us: NDArray[np.int64]
    score: NDArray[np.float32]
    area: NDArray[np.int32]
    bbox_xywh: NDArray[np.float32]
    size: tuple[int, int]
    counts: tuple[bytes, ...]

    def __len__(self) -> int:
        return len(self.counts)

    def __repr__(self) -> str:
        return f"Masklet(object_id={self.object_id}, {len(self)} masks of {self.size})"

    def decode(self, index: int) -> NDArray[np.uint8]:
        """Return mask number `index` as ndarray of uint8, shape (H, W), 1 on the object."""
        return rle.decode(self.counts[index], *self.size)


def open_dataset(uri: str, options: StoreOptions | None = None) -> Dataset:
    """Open the dataset below `uri`.

    Parameters
    ----------
    uri : str
        The output of a run, or a copy of its visible folders.
    options : StoreOptions or None
        How to reach it.

    Returns
    -------
    Dataset
        As it is now: open it again to see what was committed since.

    Raises
    ------
    ConfigError
        There is no dataset.
    StoreError
        The store cannot be read.
    """
    return Dataset(open_store(uri, options))


class Dataset:
    """A dataset at one moment.

    Parameters
    ----------
    store : Store
        Root of the output.

    Raises
    ------
    ConfigError
        There is no dataset.

    Attributes
    ----------
    state : LogState or None
        What the log says; None for a copy without a log.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        state = read_state(store)
        self.state: LogState | None = state if state.last_seq else None
        if self.state is None and next(iter(store.list("videos/")), None) is None:
            raise ConfigError(
                f"{store.uri} holds no dataset: give the folder or URL that was --out of a run"
            )

    @property
    def uri(self) -> str:
        """Canonical root of the output."""
        return self._store.uri

    @property
    def categories(self) -> dict[int, str]:
        """Name per category id."""
        rows = self.table("categories").to_pylist()
        return {row["category_id"]: row["name"] for row in rows}

    def videos(self) -> Iterator[Video]:
        """Yield every readable video, in no particular order across files."""
        for batch in self.batches("videos"):
            for row in batch.to_pylist():
                yield _video(row)

    def video(self, name_or_key: str | int) -> Video:
        """Return one video.

        Parameters
        ----------
        name_or_key : str or int
            Its key, its URI, or its path below the corpus root; the extension and leading folders
            may be left out where that leaves one video.

        Returns
        -------
        Video
            The video.

        Raises
        ------
        ConfigError
            None fits, or several do; the message lists them.
        """
        if isinstance(name_or_key, int):
            for batch in self.batches("videos", video_key=name_or_key):
                return _video(batch.to_pylist()[0])
            raise ConfigError(f"{self._store.uri} holds no video with the key {name_or_key}")
        exact, loose = [], []
        for batch in self.batches("videos", columns=("video_key", "name", "uri")):
            for row in batch.to_pylist():
                if name_or_key in (row["name"], row["uri"]):
                    exact.append(row)
                elif _fits(name_or_key, row["name"]):
                    loose.append(row)
        found = exact or loose
        if len(found) == 1:
            return self.video(found[0]["video_key"])
        if not found:
            raise ConfigError(f"{self._store.uri} holds no video named {name_or_key!r}")
        names = ", ".join(sorted(row["uri"] if exact else row["name"] for row in found)[:5])
        raise ConfigError(
            f"{name_or_key!r} fits {len(found)} videos ({names}): write more of the path"
        )

    def frames(self, video: Video) -> Iterator[Frame]:
        """Yield the tracked frames of one video with their masks, in order of time.

        Holds one batch of rows at a time, whatever the length of the video.
        """
        masks = itertools.chain.from_iterable(
            batch.to_pylist() for batch in self.batches("masks", video_key=video.video_key)
        )
        mask = next(masks, None)
        for batch in self.batches("frames", video_key=video.video_key):
            for row in batch.to_pylist():
                present = []
                while mask is not None and mask["frame_idx"] == row["frame_idx"]:
                    present.append(_object_mask(mask))
                    mask = next(masks, None)
                yield Frame(
                    row["frame_idx"], row["pts_us"], tuple(present), tuple(row["occluded_ids"])
                )

    def masklets(self, video: Video) -> Iterator[Masklet]:
        """Yield the masklets of one video by ascending object id.

        Holds the compressed counts of the whole video: about 100 bytes a mask.
        """
        rows = self.table("masks", video_key=video.video_key)
        # The sort is stable, so every object's masks stay in order of time.
        ids = rows["object_id"].to_numpy()
        rows = rows.take(np.argsort(ids, kind="stable"))
        ids = np.sort(ids)
        starts = np.flatnonzero(np.diff(ids, prepend=ids[:1] - 1)).tolist()
        for start, stop in itertools.pairwise([*starts, len(ids)]):
            yield _masklet(rows.slice(start, stop - start))

    def scan(
        self,
        wanted: NDArray[np.int64] | None = None,
        *,
        mask_columns: Sequence[str] | None = None,
    ) -> Iterator[VideoRows]:
        """Yield many videos with their rows, each file read once from its begin to its end.

        This is how to go through a whole dataset: opening the files of every video anew, as
        `frames` and `masklets` do, costs more than the rows of a short video.

        Parameters
        ----------
        wanted : ndarray of int64, shape (N,), optional
            Only these video keys, ascending; row groups without any of them are not read.
        mask_columns : sequence of str, optional
            Only these columns of `masks`, beside `video_key`.

        Yields
        ------
        VideoRows
            Segment by segment, by ascending key within each. One video's rows are in memory at a
            time, whatever the number of videos.

        Raises
        ------
        StoreError
            A file is missing: the dataset was rewritten meanwhile, or is damaged.
        """
        columns = None if mask_columns is None else ["video_key", *mask_columns]
        for files in self._segments(wanted):
            with contextlib.ExitStack() as stack:
                frames, masks, objects = (
                    stack.enter_context(
                        contextlib.closing(
                            _Cursor(
                                name, self._rows_of(files.get(name, ()), wanted, chosen), chosen
                            )
                        )
                    )
                    for name, chosen in (("frames", None), ("masks", columns), ("objects", None))
                )
                few = self._rows_of(files.get("videos", ()), wanted, None, VIDEO_ROWS)
                for batch in few:
                    for row in batch.to_pylist():
                        key = row["video_key"]
                        if wanted is None or _holds(wanted, key, key):
                            yield VideoRows(
                                _video(row), frames.take(key), masks.take(key), objects.take(key)
                            )

    def _segments(self, wanted: NDArray[np.int64] | None) -> Iterator[dict[str, list[str]]]:
        """Yield the files of each segment by table, in order of the keys they hold."""
        if self.state is not None:
            for segment in self.state.segments.values():
                files: dict[str, list[str]] = {}
                for file in sorted(segment.files, key=lambda file: file.low):
                    if wanted is None or _holds(wanted, file.low, file.high):
                        files.setdefault(file.table, []).append(file.key)
                yield files
            return
        # The files of one segment share the number that their names begin with, and the number
        # behind it goes with their keys.
        tables = ("frames", "masks", "objects", "videos")
        named = {
            table: [(stat.key, _segment_number(stat.key)) for stat in self._store.list(f"{table}/")]
            for table in tables
        }
        for number in sorted({number for _, number in named["videos"]}):
            yield {
                table: sorted(key for key, found in named[table] if found == number)
                for table in tables
            }

    def _rows_of(
        self,
        keys: Sequence[str],
        wanted: NDArray[np.int64] | None,
        columns: Sequence[str] | None,
        max_rows: int = BATCH_ROWS,
    ) -> Iterator[pa.RecordBatch]:
        for key in keys:
            with self._open(key) as file:
                yield from _batches_of(file, columns, None, wanted, max_rows)

    def _open(self, key: str) -> BinaryIO:
        try:
            return self._store.open(key)
        except FileNotFoundError:
            raise StoreError(
                f"{self._store.uri_of(key)} is gone: the dataset was rewritten while it was "
                f"read, open it again; maskmill verify tells if it is damaged"
            ) from None

    def table(
        self,
        name: str,
        *,
        columns: Sequence[str] | None = None,
        video_key: int | None = None,
    ) -> pa.Table:
        """Return a table, or the rows of one video of it, in memory.

        Parameters
        ----------
        name : str
            One of `workers.sinks.schema.TABLES`.
        columns : sequence of str, optional
            Only these.
        video_key : int, optional
            Only the rows of this video.

        Returns
        -------
        pyarrow.Table
            Sorted within each file; a video's rows are always together and sorted.
        """
        import pyarrow as pa

        schema = arrow_schema(name)
        if columns is not None:
            schema = pa.schema([schema.field(column) for column in columns])
        found = list(self.batches(name, columns=columns, video_key=video_key))
        return pa.Table.from_batches([batch.cast(schema) for batch in found], schema)

    def batches(
        self,
        name: str,
        *,
        columns: Sequence[str] | None = None,
        video_key: int | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Stream a table, or the rows of one video of it.

        Parameters
        ----------
        name : str
            One of `workers.sinks.schema.TABLES`.
        columns : sequence of str, optional
            Only these.
        video_key : int, optional
            Only the rows of this video.

        Yields
        ------
        pyarrow.RecordBatch
            Never empty.

        Raises
        ------
        StoreError
            A file is missing: the dataset was rewritten meanwhile, or is damaged.
        """
        for key in self._files(name, video_key):
            with self._open(key) as file:
                yield from _batches_of(file, columns, video_key)

    def _files(self, name: str, video_key: int | None) -> list[str]:
        if name in CURRENT_TABLES:
            key = f"{name}/{CURRENT_FILE}"
            return [key] if self._store.stat(key) is not None else []
        if self.state is None:
            return [stat.key for stat in self._store.list(f"{name}/")]
        segments = list(self.state.segments.values())
        if video_key is None:
            return [f.key for segment in segments for f in segment.files if f.table == name]
        home = self.state.segment_of(video_key)
        return [
            f.key
            for segment in segments
            for f in segment.files
            if segment.seq == home and f.table == name and f.low <= video_key <= f.high
        ]


class _Cursor:
    """The rows of one table, taken video by video in ascending order of their keys.

    Parameters
    ----------
    table : str
        Which table.
    batches : iterator of pyarrow.RecordBatch
        Its rows, sorted by `video_key`.
    columns : sequence of str or None
        The columns they have; None is all.
    """

    def __init__(
        self, table: str, batches: Iterator[pa.RecordBatch], columns: Sequence[str] | None
    ) -> None:
        import pyarrow as pa

        schema = arrow_schema(table)
        if columns is not None:
            schema = pa.schema([schema.field(column) for column in columns])
        self._schema = schema
        self._batches = batches
        self._batch: pa.RecordBatch | None = None
        self._keys: NDArray[np.int64] = np.zeros(0, np.int64)

    def take(self, video_key: int) -> pa.Table:
        """Return the rows of one video; those of videos before it are passed over."""
        import pyarrow as pa

        found = []
        while self._batch is not None or self._next():
            assert self._batch is not None
            begin = int(np.searchsorted(self._keys, video_key))
            end = int(np.searchsorted(self._keys, video_key, side="right"))
            if end > begin:
                found.append(self._batch.slice(begin, end - begin).cast(self._schema))
            if end < len(self._keys):
                self._batch, self._keys = self._batch.slice(end), self._keys[end:]
                break
            self._batch = None
        return pa.Table.from_batches(found, self._schema)

    def _next(self) -> bool:
        self._batch = next(self._batches, None)
        if self._batch is None:
            return False
        self._keys = self._batch.column("video_key").to_numpy()
        return True

    def close(self) -> None:
        """Close the file that is open."""
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()


def _holds(keys: NDArray[np.int64], low: int, high: int) -> bool:
    """Tell whether ascending keys have one within a closed range."""
    at = int(np.searchsorted(keys, low))
    return at < len(keys) and int(keys[at]) <= high


def _segment_number(key: str) -> str:
    return key.rpartition("/")[2].partition("-")[0]


def _batches_of(
    file: Any,
    columns: Sequence[str] | None,
    video_key: int | None,
    wanted: NDArray[np.int64] | None = None,
    max_rows: int = BATCH_ROWS,
) -> Iterator[pa.RecordBatch]:
    """Stream one Parquet file, skipping the row groups that cannot hold the videos."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as parquet:
        groups = list(range(parquet.num_row_groups))
        chosen = list(columns) if columns is not None else None
        if video_key is not None:
            wanted = np.array([video_key], np.int64)
            if chosen is not None and "video_key" not in chosen:
                chosen = ["video_key", *chosen]
        if wanted is not None:
            # video_key is the first column of every table that has it.
            groups = [
                group
                for group in groups
                if (stats := parquet.metadata.row_group(group).column(0).statistics) is None
                or _holds(wanted, stats.min, stats.max)
            ]
        for batch in batches(parquet, max_rows, groups=groups, columns=chosen):
            if video_key is not None:
                batch = batch.filter(pc.equal(batch.column("video_key"), video_key))
            if columns is not None:
                batch = batch.select(list(columns))
            if batch.num_rows:
                yield batch


def _video(row: Mapping[str, Any]) -> Video:
    return Video(
        row["video_key"],
        row["name"],
        row["uri"],
        row["width"],
        row["height"],
        row["frames_tracked"],
        row["num_objects"],
        row["num_masks"],
        row,
    )


def _fits(asked: str, name: str) -> bool:
    """Tell whether `asked` is `name` without its extension or leading folders."""
    folder, slash, last = name.rpartition("/")
    stem = folder + slash + (last.rpartition(".")[0] or last)
    return any(full == asked or full.endswith(f"/{asked}") for full in (name, stem))


def _object_mask(row: Mapping[str, Any]) -> ObjectMask:
    return ObjectMask(
        row["object_id"],
        row["category_id"],
        row["score"],
        (row["bbox_x"], row["bbox_y"], row["bbox_w"], row["bbox_h"]),
        row["area"],
        (row["rle_h"], row["rle_w"]),
        row["rle_counts"],
        row["flags"],
    )


def _masklet(rows: pa.Table) -> Masklet:
    return Masklet(
        rows["video_key"][0].as_py(),
        rows["object_id"][0].as_py(),
        rows["category_id"][0].as_py(),
        rows["frame_idx"].to_numpy(),
        rows["pts_us"].to_numpy(),
        rows["score"].to_numpy(),
        rows["area"].to_numpy(),
        np.stack([rows[f"bbox_{side}"].to_numpy() for side in "xywh"], axis=1),
        (rows["rle_h"][0].as_py(), rows["rle_w"][0].as_py()),
        tuple(rows["rle_counts"].to_pylist()),
    )
