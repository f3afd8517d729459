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

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jobs.commit_log import LogState, read_state
from jobs.records import CURRENT_FILE, CURRENT_TABLES
from workers import rle
from workers.errors import ConfigError, StoreError
from workers.messages import StoreOptions
from workers.sinks.schema import arrow_schema
from workers.storage import Store, open_store

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 16_384
"""Rows in memory at a time while a table is streamed."""


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
            try:
                file = self._store.open(key)
            except FileNotFoundError:
                raise StoreError(
                    f"{self._store.uri_of(key)} is gone: the dataset was rewritten while it was "
                    f"read, open it again; maskmill verify tells if it is damaged"
                ) from None
            with file:
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


def _batches_of(
    file: Any, columns: Sequence[str] | None, video_key: int | None
) -> Iterator[pa.RecordBatch]:
    """Stream one Parquet file, skipping the row groups that cannot hold the video."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as parquet:
        groups = list(range(parquet.num_row_groups))
        wanted = list(columns) if columns is not None else None
        if video_key is not None:
            # video_key is the first column of every table that has it.
            groups = [
                group
                for group in groups
                if (stats := parquet.metadata.row_group(group).column(0).statistics) is None
                or stats.min <= video_key <= stats.max
            ]
            if wanted is not None and "video_key" not in wanted:
                wanted = ["video_key", *wanted]
        if not groups:
            return
        for batch in parquet.iter_batches(BATCH_ROWS, row_groups=groups, columns=wanted):
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
