"""Which videos, frames and masks of a dataset are meant, streamed video by video.

Predicates are SQL expressions, judged by DuckDB with every access to files and network switched
off. One that speaks of columns of `videos` alone chooses whole videos. Any other chooses masks,
each joined with its object, video and category; no frame and no video is left out by it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jobs.dataset import Dataset, Video, VideoRows
from jobs.export.naming import VideoNames
from workers.errors import ConfigError, how_to_install
from workers.sinks.schema import arrow_schema

if TYPE_CHECKING:
    import pyarrow as pa

MASK_COLUMNS = (
    "frame_idx",
    "object_id",
    "category_id",
    "score",
    "bbox_x",
    "bbox_y",
    "bbox_w",
    "bbox_h",
    "area",
    "rle_h",
    "rle_w",
    "rle_counts",
)
"""Columns of `masks` that the formats need."""
_TIME_SLACK_US = 1000
"""By how much a stored time may be early: some containers keep whole milliseconds."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What to take of a dataset.

    Attributes
    ----------
    videos : tuple of str
        Names or keys of videos, as `Dataset.video` takes them; empty is all.
    where : tuple of str
        SQL predicates that must all hold.
    min_score : float or None
        Leave out masks with a lower score, 0..1.
    fps : float or None
        At most so many frames a second.
    """

    videos: tuple[str, ...] = ()
    where: tuple[str, ...] = ()
    min_score: float | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise ConfigError(f"--fps {self.fps} is no frame rate: give a number above 0")
        if self.min_score is not None and not 0 <= self.min_score <= 1:
            raise ConfigError(f"--min-score {self.min_score} is no score: they go from 0 to 1")


@dataclass(frozen=True, slots=True)
class SelectedVideo:
    """What is taken of one video.

    Attributes
    ----------
    video : Video
        The video.
    number : int
        Its number in the whole dataset, from 1.
    sequence : str
        Its name as one word of a path, unique in the dataset.
    frame_idx : ndarray of int32, shape (T,)
        The frames, ascending.
    pts_us : ndarray of int64, shape (T,)
        Their presentation times in microseconds.
    masks : pyarrow.Table
        The masks on them, by frame and object.
    """

    video: Video
    number: int
    sequence: str
    frame_idx: NDArray[np.int32]
    pts_us: NDArray[np.int64]
    masks: pa.Table

    def positions(self) -> NDArray[np.int64]:
        """Return the position among the frames of every mask, int64 of shape (N,)."""
        frames = self.masks["frame_idx"].to_numpy()
        found: NDArray[np.int64] = np.searchsorted(self.frame_idx, frames)
        return found

    def objects(self) -> dict[int, int | None]:
        """Return the category of every object that has a mask, by ascending object id."""
        ids = self.masks["object_id"].to_numpy()
        found, first = np.unique(ids, return_index=True)
        categories = self.masks["category_id"].take(first).to_pylist()
        return dict(zip(found.tolist(), categories, strict=True))


def select(
    dataset: Dataset, selection: Selection, names: VideoNames | None = None
) -> Iterator[SelectedVideo]:
    """Yield what a selection takes, video by video.

    Parameters
    ----------
    dataset : Dataset
        The dataset.
    selection : Selection
        What to take.
    names : VideoNames, optional
        Names of the dataset's videos, where they were made already.

    Yields
    ------
    SelectedVideo
        Every video once, those without any mask too.

    Raises
    ------
    ConfigError
        A video is not in the dataset, or a predicate is wrong.
    """
    names = names or VideoNames(dataset)
    predicates = [_Predicate(text, dataset.categories) for text in selection.where]
    wanted = _wanted(dataset, selection.videos, [p for p in predicates if p.on_videos])
    on_masks = [predicate for predicate in predicates if not predicate.on_videos]
    columns = None if on_masks else MASK_COLUMNS
    for rows in dataset.scan(wanted, mask_columns=columns):
        yield _selected(rows, selection, on_masks, names)


def _selected(
    rows: VideoRows, selection: Selection, predicates: Sequence[_Predicate], names: VideoNames
) -> SelectedVideo:
    import pyarrow as pa
    import pyarrow.compute as pc

    frames, masks = rows.frames, rows.masks
    for predicate in predicates:
        masks = predicate.masks(rows, masks)
    if selection.min_score is not None:
        masks = masks.filter(
            pc.greater_equal(masks["score"], pa.scalar(selection.min_score, pa.float32()))
        )
    if selection.fps is not None:
        frames = frames.filter(sampled(frames["pts_us"].to_numpy(), selection.fps))
        masks = masks.filter(pc.is_in(masks["frame_idx"], value_set=frames["frame_idx"]))
    return SelectedVideo(
        rows.video,
        names.number(rows.video),
        names.sequence(rows.video),
        frames["frame_idx"].to_numpy(),
        frames["pts_us"].to_numpy(),
        masks.combine_chunks(),
    )


def sampled(pts_us: NDArray[np.int64], fps: float) -> NDArray[np.bool_]:
    """Choose at most `fps` frames a second by their times.

    Parameters
    ----------
    pts_us : ndarray of int64, shape (T,)
        Presentation times in microseconds, ascending.
    fps : float
        Frames per second.

    Returns
    -------
    ndarray of bool, shape (T,)
        The first frame, and after it the first of every further ``1 / fps`` seconds.

    Examples
    --------
    >>> sampled(np.array([0, 41667, 83333, 125000, 166667, 208333]), 12).tolist()
    [True, False, True, False, True, False]
    """
    if not len(pts_us):
        return np.zeros(0, bool)
    step = np.floor((pts_us - pts_us[0] + _TIME_SLACK_US) * (fps / 1e6))
    chosen: NDArray[np.bool_] = np.diff(step, prepend=-1) > 0
    return chosen


def _wanted(
    dataset: Dataset, videos: Sequence[str], predicates: Sequence[_Predicate]
) -> NDArray[np.int64] | None:
    """Return the keys of the videos that are chosen, ascending; None for all."""
    wanted: NDArray[np.int64] | None = None
    if videos:
        keys = {_video_key(dataset, name) for name in videos}
        wanted = np.array(sorted(keys), np.int64)
    if predicates:
        chosen = [np.zeros(0, np.int64)]
        for batch in dataset.batches("videos"):
            keys_left = batch.column("video_key").to_numpy()
            for predicate in predicates:
                keys_left = np.intersect1d(keys_left, predicate.videos(batch))
            chosen.append(keys_left)
        found = np.sort(np.concatenate(chosen))
        wanted = found if wanted is None else np.intersect1d(wanted, found)
    return wanted


def _video_key(dataset: Dataset, name: str) -> int:
    """Return the key of a video by its name, or, where no video is called so, by its key."""
    try:
        return dataset.video(name).video_key
    except ConfigError:
        if re.fullmatch(r"-?\d+", name):
            return dataset.video(int(name)).video_key
        raise


class _Predicate:
    """A SQL predicate over the tables of a dataset.

    Parameters
    ----------
    text : str
        The predicate.
    categories : dict of int to str
        Name per category id.

    Attributes
    ----------
    on_videos : bool
        It speaks of columns of `videos` alone.
    """

    def __init__(self, text: str, categories: dict[int, str]) -> None:
        import pyarrow as pa

        try:
            import duckdb
        except ImportError as error:
            raise ConfigError(
                f"--where needs the package duckdb: {how_to_install('export')}"
            ) from error
        self._text = text
        self._error = duckdb.Error
        self._db = duckdb.connect(config={"enable_external_access": "false", "threads": "1"})
        self._db.register(
            "categories",
            pa.table(
                {
                    "category_id": pa.array(list(categories), pa.int16()),
                    "category": pa.array(list(categories.values()), pa.string()),
                }
            ),
        )
        videos = arrow_schema("videos").empty_table()
        masks = arrow_schema("masks").empty_table()
        objects = arrow_schema("objects").empty_table()
        try:
            self.videos(videos)
            self.on_videos = True
        except ConfigError:
            self._matching(videos, objects, masks)
            self.on_videos = False

    def videos(self, rows: Any) -> NDArray[np.int64]:
        """Return the keys of the rows of `videos` for which it holds."""
        self._db.register("videos", rows)
        query = f"SELECT video_key FROM videos WHERE ({self._text}\n)"
        return self._answer(query, "video_key")

    def masks(self, rows: VideoRows, masks: pa.Table) -> pa.Table:
        """Return the masks of one video for which it holds, in their order."""
        import pyarrow as pa

        videos = pa.Table.from_pylist([dict(rows.video.row)], arrow_schema("videos"))
        return masks.take(self._matching(videos, rows.objects, masks))

    def _matching(self, videos: pa.Table, objects: pa.Table, masks: pa.Table) -> NDArray[np.int64]:
        import pyarrow as pa

        # Where both tables tell the category, they tell the same one.
        self._db.register("videos", videos)
        self._db.register("objects", objects.drop_columns(["category_id"]))
        self._db.register("masks", masks.append_column("__row", pa.array(range(len(masks)))))
        query = (
            "SELECT masks.__row FROM masks JOIN objects USING (video_key, object_id) "
            "JOIN videos USING (video_key) LEFT JOIN categories USING (category_id) "
            f"WHERE ({self._text}\n) ORDER BY 1"
        )
        return self._answer(query, "__row")

    def _answer(self, query: str, column: str) -> NDArray[np.int64]:
        try:
            found: NDArray[np.int64] = self._db.execute(query).fetchnumpy()[column]
        except self._error as error:
            raise self._refusal(error) from error
        return found

    def _refusal(self, error: Exception) -> ConfigError:
        # DuckDB shows the place in the query, on lines of their own, after the sentence.
        reason = " ".join(str(error).split("\n")[0].split())
        missing = re.search(r'column "([^"]+)" not found', reason)
        if missing:
            close = difflib.get_close_matches(missing[1], _columns(), 1)
            reason = (
                f"there is no column {missing[1]!r}"
                + (f", did you mean {close[0]!r}?" if close else ";")
                + " SCHEMA.md lists those of masks, objects and videos, and category is the name"
            )
        elif "syntax error" in reason:
            reason = "it is no SQL expression; are all brackets and quotes closed?"
        return ConfigError(f"--where {self._text!r} cannot be asked: {reason}")


def _columns() -> list[str]:
    names = [name for table in ("masks", "objects", "videos") for name in arrow_schema(table).names]
    return [*names, "category"]
