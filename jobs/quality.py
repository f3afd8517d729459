"""How trustworthy masks look without ground truth: per object, per run, and what to look at first.

Nothing is decoded: overlaps come from run lengths (pycocotools), the rest from boxes, areas and
flags. A *step* is two tracked frames that follow each other. What is measured:

flicker
    One less the mean overlap (IoU) of an object's masks over its steps. Fast motion raises it too.
area jumps
    Steps over which the area at least doubles or halves.
fragments
    Stretches of frames on which the object is seen without a gap; 1 is never interrupted.
suspected identity switches
    Frames on which an object lies where *another* object lay one frame before (IoU at least 0.5),
    more than where it lay itself, while that other one has left the place.
occlusion
    Share of its frames, from the first mask on, on which the tracker calls the object hidden.
border
    Share of its masks that touch the border of the picture: what lies beyond is not seen.

`concern`, 0 to 1, joins them as independent chances of being wrong; it ranks, it is no
probability. The weights are judgement, not learnt, and stand in `_severities` in one place.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from jobs.dataset import BATCH_ROWS, Dataset, Frame, ObjectMask, Video, VideoRows
from workers.sinks.schema import (
    FLAG_BORDER,
    NO_UNIT,
    Column,
    Table,
    schema_of,
    writer_options_of,
)
from workers.spool import spool_folder

if TYPE_CHECKING:
    import pyarrow.parquet as pq

    from workers.storage import Store

FOLDER = "_evaluation"
"""Folder below an output that keeps what was measured; no table of the dataset."""
QUALITY_KEY = f"{FOLDER}/quality.parquet"
"""One row per object."""
REVIEW_KEY = f"{FOLDER}/review.parquet"
"""What a person should look at first, ranked."""
SUMMARY_KEY = f"{FOLDER}/quality.json"
"""The measures of the run."""
MAX_REVIEW = 1000
"""Objects in the ranked list."""
NUM_BINS = 10
"""Equal parts of 0..1 in the histogram of concern."""

JUMP_RATIO = 2.0
"""From this ratio of areas on, a step is an area jump."""
SWITCH_IOU = 0.5
"""Overlap from which an object lies where another one lay."""
MIN_SEVERITY = 0.02
"""What is less grave is not named as a reason."""

QUALITY_TABLE = Table(
    "quality",
    "One row per video and object that has a mask: measures that need no ground truth.",
    (
        Column("video_key", "int64", NO_UNIT, "The video, see `videos`."),
        Column("video", "string", NO_UNIT, "Its name: path below the root of the corpus."),
        Column("object_id", "int32", NO_UNIT, "The object, see `objects`."),
        Column("category_id", "int16", NO_UNIT, "Its category, see `categories`.", True),
        Column("num_masks", "int32", "masks", "Number of its masks."),
        Column("first_frame", "int32", "frames", "frame_idx of its first mask."),
        Column("last_frame", "int32", "frames", "frame_idx of its last mask."),
        Column("mean_score", "float32", "0..1", "Mean score of its masks."),
        Column("mean_area", "float32", "pixels", "Mean area of its masks."),
        Column(
            "flicker",
            "float32",
            "0..1",
            "One less the mean IoU of its masks on consecutive tracked frames; empty where no two "
            "follow each other.",
            True,
        ),
        Column(
            "flicker_frame",
            "int32",
            "frames",
            "frame_idx at the end of the step with the lowest IoU.",
            True,
        ),
        Column(
            "num_area_jumps",
            "int32",
            "steps",
            "Steps over which its area at least doubles or halves.",
        ),
        Column("largest_jump", "float32", "ratio", "Largest ratio of areas over a step.", True),
        Column("jump_frame", "int32", "frames", "frame_idx at the end of that step.", True),
        Column(
            "num_fragments",
            "int32",
            "stretches",
            "Stretches of tracked frames on which it is seen without a gap.",
        ),
        Column("gap_frame", "int32", "frames", "frame_idx where the second one begins.", True),
        Column(
            "num_switches",
            "int32",
            "frames",
            "Suspected identity switches: it lies where another object lay one frame before.",
        ),
        Column("switch_frame", "int32", "frames", "frame_idx of the first of them.", True),
        Column("switch_from", "int32", NO_UNIT, "object_id of that other object.", True),
        Column(
            "share_occluded",
            "float32",
            "0..1",
            "Share of the tracked frames from its first mask on with the object hidden.",
        ),
        Column("share_border", "float32", "0..1", "Share of its masks that touch the border."),
        Column("concern", "float32", "0..1", "How much it deserves a look; ranks, no probability."),
        Column("reason", "string", NO_UNIT, "Why, the gravest first; empty text for no concern."),
        Column("look_at_frame", "int32", "frames", "frame_idx that shows the gravest."),
    ),
    sorted_by=(),
)
REVIEW_TABLE = Table(
    "review",
    f"What a person should look at first: the {MAX_REVIEW} objects with the highest concern.",
    (
        Column("rank", "int32", NO_UNIT, "1 comes first."),
        *(
            column
            for column in QUALITY_TABLE.columns
            if column.name
            in ("video_key", "video", "object_id", "concern", "reason", "look_at_frame")
        ),
    ),
    sorted_by=("rank",),
)


@dataclass(frozen=True, slots=True)
class ObjectQuality:
    """One object without ground truth; the columns of `QUALITY_TABLE` say what each means.

    Attributes
    ----------
    video_key, object_id : int
        Which object.
    video : str
        Name of its video.
    category_id : int or None
        Its category.
    num_masks, first_frame, last_frame : int
        Extent.
    mean_score, mean_area : float
        Over its masks; the area in pixels.
    flicker : float or None
        0..1; None where no two masks follow each other.
    flicker_frame : int or None
        End of the step with the lowest overlap.
    num_area_jumps : int
        Steps over which the area at least doubles or halves.
    largest_jump : float or None
        Largest ratio of areas over a step.
    jump_frame : int or None
        End of that step.
    num_fragments : int
        Stretches without a gap.
    gap_frame : int or None
        Where the second begins.
    num_switches : int
        Suspected identity switches.
    switch_frame, switch_from : int or None
        Frame of the first, and the object that lay there before.
    share_occluded, share_border : float
        0..1.
    concern : float
        0..1, how much it deserves a look.
    reason : str
        Why, the gravest first.
    look_at_frame : int
        Frame that shows the gravest.
    """

    video_key: int
    video: str
    object_id: int
    category_id: int | None
    num_masks: int
    first_frame: int
    last_frame: int
    mean_score: float
    mean_area: float
    flicker: float | None
    flicker_frame: int | None
    num_area_jumps: int
    largest_jump: float | None
    jump_frame: int | None
    num_fragments: int
    gap_frame: int | None
    num_switches: int
    switch_frame: int | None
    switch_from: int | None
    share_occluded: float
    share_border: float
    concern: float = 0.0
    reason: str = ""
    look_at_frame: int = 0


@dataclass(frozen=True, slots=True)
class ReviewItem:
    """One line of the ranked list; see `REVIEW_TABLE`.

    Attributes
    ----------
    rank : int
        1 comes first.
    video_key, object_id : int
        Which object.
    video : str
        Name of its video.
    concern : float
        0..1.
    reason : str
        Why, the gravest first.
    look_at_frame : int
        Frame that shows it.
    """

    rank: int
    video_key: int
    video: str
    object_id: int
    concern: float
    reason: str
    look_at_frame: int


@dataclass(frozen=True, slots=True)
class RunQuality:
    """A whole run without ground truth.

    Attributes
    ----------
    num_videos, num_objects, num_masks : int
        What was measured; objects without any mask are not counted.
    mean_flicker : float or None
        Mean over the objects that have one, 0..1.
    num_area_jumps, num_switches : int
        Totals.
    num_fragmented : int
        Objects that are interrupted.
    mean_share_occluded, mean_share_border : float
        Mean over objects, 0..1.
    concern_histogram : tuple of int
        Objects by concern in `NUM_BINS` equal parts of 0..1.
    created_s : float
        Unix time of measuring.
    """

    num_videos: int
    num_objects: int
    num_masks: int
    mean_flicker: float | None
    num_area_jumps: int
    num_switches: int
    num_fragmented: int
    mean_share_occluded: float
    mean_share_border: float
    concern_histogram: tuple[int, ...]
    created_s: float


def measure_video(video: Video, frames: Iterable[Frame]) -> list[ObjectQuality]:
    """Measure the objects of one video.

    Parameters
    ----------
    video : Video
        The video.
    frames : iterable of Frame
        All its frames in order of time, as `Dataset.frames` yields them.

    Returns
    -------
    list of ObjectQuality
        Objects with at least one mask, by ascending id.

    Notes
    -----
    Holds two frames and a few numbers per object, whatever the length of the video.
    """
    tallies: dict[int, _Tally] = {}
    before: tuple[ObjectMask, ...] = ()
    num_positions = 0
    for position, frame in enumerate(frames):
        num_positions += 1
        masks = tuple(mask for mask in frame.masks if mask.area)
        for mask in masks:
            tally = tallies.setdefault(mask.object_id, _Tally(mask.object_id, mask.category_id))
            tally.add_mask(mask, frame.frame_idx, position)
        for object_id in frame.occluded_ids:
            if object_id in tallies:
                tallies[object_id].num_occluded += 1
        if before and masks:
            _compare(before, masks, tallies, frame.frame_idx)
        before = masks
    return [tallies[object_id].result(video, num_positions) for object_id in sorted(tallies)]


class Measuring:
    """What the videos of a run amount to, taken in one after the other.

    Rows go to a local file as they come; only the ranked list stays in memory. A context manager:
    the local file is gone at the end.

    Parameters
    ----------
    spool_dir : Path, optional
        Where the local file lies; by default the system's folder for temporary files.
    """

    def __init__(self, spool_dir: Path | None = None) -> None:
        self._exits = contextlib.ExitStack()
        self._spool_dir = spool_dir
        self._writer: pq.ParquetWriter | None = None
        self._rows: list[ObjectQuality] = []
        self._worst: list[tuple[float, int, int, ObjectQuality]] = []
        self._totals = _Totals()

    def __enter__(self) -> Self:
        self._path = self._exits.enter_context(spool_folder(self._spool_dir)) / "quality.parquet"
        self._writer = self._exits.enter_context(_open_writer(self._path, QUALITY_TABLE))
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def add(self, objects: Iterable[ObjectQuality]) -> None:
        """Take in the objects of one video.

        Parameters
        ----------
        objects : iterable of ObjectQuality
            As `measure_video` returns them.
        """
        self._totals.num_videos += 1
        for quality in objects:
            self._totals.add(quality)
            self._rows.append(quality)
            if quality.concern > 0:
                # What falls out first has the least concern, then the largest key.
                entry = (quality.concern, -quality.video_key, -quality.object_id, quality)
                if len(self._worst) < MAX_REVIEW:
                    heapq.heappush(self._worst, entry)
                else:
                    heapq.heappushpop(self._worst, entry)
        if len(self._rows) >= BATCH_ROWS:
            self._flush()

    def review(self) -> list[ReviewItem]:
        """Return what to look at first, ranked.

        Returns
        -------
        list of ReviewItem
            At most `MAX_REVIEW`.
        """
        names = [f.name for f in fields(ReviewItem) if f.name != "rank"]
        return [
            ReviewItem(rank, **{name: getattr(quality, name) for name in names})
            for rank, (*_, quality) in enumerate(sorted(self._worst, reverse=True), 1)
        ]

    def summary(self) -> RunQuality:
        """Return the measures of the run so far.

        Returns
        -------
        RunQuality
            Of the videos taken in.
        """
        return self._totals.result()

    def save(self, store: Store) -> None:
        """Put both tables and the summary into an output; nothing can be added after it.

        Parameters
        ----------
        store : Store
            The output. What was kept there before is replaced.
        """
        assert self._writer is not None
        self._flush()
        self._writer.close()
        review = self._path.with_name("review.parquet")
        with _open_writer(review, REVIEW_TABLE) as writer:
            _write(writer, REVIEW_TABLE, self.review())
        store.put_file(self._path, QUALITY_KEY)
        store.put_file(review, REVIEW_KEY)
        store.write_bytes(SUMMARY_KEY, json.dumps(asdict(self.summary()), indent=1).encode())

    def _flush(self) -> None:
        _write(self._writer, QUALITY_TABLE, self._rows)
        self._rows.clear()


def measure_run(
    dataset: Dataset,
    measuring: Measuring,
    wanted: NDArray[np.int64] | None = None,
    *,
    on_video: Callable[[int], None] | None = None,
) -> None:
    """Measure the videos of a dataset.

    Parameters
    ----------
    dataset : Dataset
        What to measure.
    measuring : Measuring
        Takes it in.
    wanted : ndarray of int64, shape (N,), optional
        Only these video keys, ascending.
    on_video : callable, optional
        Called with the number of videos that are done.
    """
    for count, rows in enumerate(dataset.scan(wanted), 1):
        measuring.add(measure_video(rows.video, _frames(rows)))
        if on_video is not None:
            on_video(count)


def read_summary(store: Store) -> RunQuality | None:
    """Return the measures of a run that were kept, if any.

    Parameters
    ----------
    store : Store
        The output.

    Returns
    -------
    RunQuality or None
        None where nobody has measured, or another version of maskmill did.
    """
    try:
        content = json.loads(store.read_bytes(SUMMARY_KEY))
        content["concern_histogram"] = tuple(content["concern_histogram"])
        return RunQuality(**content)
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def read_review(store: Store, limit: int | None = None) -> list[ReviewItem]:
    """Return the ranked list that was kept.

    Parameters
    ----------
    store : Store
        The output.
    limit : int, optional
        Only the first.

    Returns
    -------
    list of ReviewItem
        By rank; empty where nobody has measured.
    """
    import pyarrow.parquet as pq

    try:
        with store.open(REVIEW_KEY) as file:
            rows = pq.read_table(file).slice(0, limit).to_pylist()
    except FileNotFoundError:
        return []
    return [ReviewItem(**row) for row in rows]


def _frames(rows: VideoRows) -> Iterator[Frame]:
    """Yield the frames of one video from its columns."""
    names = ("object_id", "category_id", "score", "area", "rle_counts", "flags", "frame_idx")
    columns = zip(*(rows.masks[name].to_pylist() for name in names), strict=True)
    size, no_box = (rows.video.height, rows.video.width), (0.0, 0.0, 0.0, 0.0)
    by_frame = itertools.groupby(columns, key=operator.itemgetter(6))
    frame_idx, masks = next(by_frame, (None, iter(())))
    for row in rows.frames.to_pylist():
        present: list[ObjectMask] = []
        if row["frame_idx"] == frame_idx:
            present = [
                ObjectMask(object_id, category_id, score, no_box, area, size, counts, flags)
                for object_id, category_id, score, area, counts, flags, _ in masks
            ]
            frame_idx, masks = next(by_frame, (None, iter(())))
        yield Frame(row["frame_idx"], row["pts_us"], tuple(present), tuple(row["occluded_ids"]))


@dataclass(slots=True)
class _Tally:
    """What is known of one object while its video goes by."""

    object_id: int
    category_id: int | None
    first_frame: int = 0
    last_frame: int = 0
    first_position: int = 0
    last_position: int = -2
    num_masks: int = 0
    num_border: int = 0
    num_occluded: int = 0
    num_fragments: int = 0
    gap_frame: int | None = None
    score: float = 0.0
    area: float = 0.0
    num_steps: int = 0
    overlap: float = 0.0
    lowest: float = math.inf
    flicker_frame: int | None = None
    num_jumps: int = 0
    largest_jump: float = 0.0
    jump_frame: int | None = None
    num_switches: int = 0
    switch_frame: int | None = None
    switch_from: int | None = None

    def add_mask(self, mask: ObjectMask, frame_idx: int, position: int) -> None:
        """Take in a mask on the tracked frame number `position`."""
        if not self.num_masks:
            self.first_frame, self.first_position = frame_idx, position
        if position != self.last_position + 1:
            self.num_fragments += 1
            if self.num_fragments == 2:
                self.gap_frame = frame_idx
        self.last_frame, self.last_position = frame_idx, position
        self.num_masks += 1
        self.num_border += bool(mask.flags & FLAG_BORDER)
        self.score += mask.score
        self.area += mask.area

    def add_step(self, iou: float, ratio: float, frame_idx: int) -> None:
        """Take in what happened between two tracked frames that both show it."""
        self.num_steps += 1
        self.overlap += iou
        if iou < self.lowest:
            self.lowest, self.flicker_frame = iou, frame_idx
        self.num_jumps += ratio >= JUMP_RATIO
        if ratio > self.largest_jump:
            self.largest_jump, self.jump_frame = ratio, frame_idx

    def add_switch(self, other_id: int, frame_idx: int) -> None:
        """Take in that it lies where another object lay."""
        self.num_switches += 1
        if self.switch_frame is None:
            self.switch_frame, self.switch_from = frame_idx, other_id

    def result(self, video: Video, num_positions: int) -> ObjectQuality:
        """Return the measures of a video of so many tracked frames."""
        measured = ObjectQuality(
            video_key=video.video_key,
            video=video.name,
            object_id=self.object_id,
            category_id=self.category_id,
            num_masks=self.num_masks,
            first_frame=self.first_frame,
            last_frame=self.last_frame,
            mean_score=self.score / self.num_masks,
            mean_area=self.area / self.num_masks,
            flicker=1 - self.overlap / self.num_steps if self.num_steps else None,
            flicker_frame=self.flicker_frame,
            num_area_jumps=self.num_jumps,
            largest_jump=self.largest_jump if self.num_steps else None,
            jump_frame=self.jump_frame,
            num_fragments=self.num_fragments,
            gap_frame=self.gap_frame,
            num_switches=self.num_switches,
            switch_frame=self.switch_frame,
            switch_from=self.switch_from,
            share_occluded=self.num_occluded / (num_positions - self.first_position),
            share_border=self.num_border / self.num_masks,
        )
        return _judged(measured)


@dataclass(slots=True)
class _Totals:
    """Sums over the objects of a run."""

    num_videos: int = 0
    num_objects: int = 0
    num_masks: int = 0
    num_with_flicker: int = 0
    flicker: float = 0.0
    num_jumps: int = 0
    num_switches: int = 0
    num_fragmented: int = 0
    share_occluded: float = 0.0
    share_border: float = 0.0
    histogram: list[int] = field(default_factory=lambda: [0] * NUM_BINS)

    def add(self, quality: ObjectQuality) -> None:
        self.num_objects += 1
        self.num_masks += quality.num_masks
        if quality.flicker is not None:
            self.num_with_flicker += 1
            self.flicker += quality.flicker
        self.num_jumps += quality.num_area_jumps
        self.num_switches += quality.num_switches
        self.num_fragmented += quality.num_fragments > 1
        self.share_occluded += quality.share_occluded
        self.share_border += quality.share_border
        self.histogram[min(int(quality.concern * NUM_BINS), NUM_BINS - 1)] += 1

    def result(self) -> RunQuality:
        count = max(self.num_objects, 1)
        return RunQuality(
            num_videos=self.num_videos,
            num_objects=self.num_objects,
            num_masks=self.num_masks,
            mean_flicker=self.flicker / self.num_with_flicker if self.num_with_flicker else None,
            num_area_jumps=self.num_jumps,
            num_switches=self.num_switches,
            num_fragmented=self.num_fragmented,
            mean_share_occluded=self.share_occluded / count,
            mean_share_border=self.share_border / count,
            concern_histogram=tuple(self.histogram),
            created_s=time.time(),
        )


def _compare(
    before: Sequence[ObjectMask],
    now: Sequence[ObjectMask],
    tallies: Mapping[int, _Tally],
    frame_idx: int,
) -> None:
    """Take in one step: each object against itself, and against where the others lay."""
    from pycocotools import mask as coco

    # float64 of shape (now, before); boxes that do not meet are not looked into.
    ious = coco.iou([_rle(m) for m in now], [_rle(m) for m in before], [0] * len(before))
    columns = {mask.object_id: column for column, mask in enumerate(before)}
    own = {}
    for row, mask in enumerate(now):
        column = columns.get(mask.object_id)
        own[mask.object_id] = 0.0 if column is None else float(ious[row, column])
        if column is not None:
            areas = sorted((mask.area, before[column].area))
            tallies[mask.object_id].add_step(own[mask.object_id], areas[1] / areas[0], frame_idx)
    for row, column in np.argwhere(ious >= SWITCH_IOU).tolist():
        object_id, other_id = now[row].object_id, before[column].object_id
        if other_id == object_id or ious[row, column] <= own[object_id]:
            continue
        # Where the other one stayed in its place, two objects overlap, and nothing was switched.
        if own.get(other_id, 0.0) < SWITCH_IOU:
            tallies[object_id].add_switch(other_id, frame_idx)


def _rle(mask: ObjectMask) -> dict[str, Any]:
    return {"size": list(mask.size), "counts": mask.counts}


def _judged(quality: ObjectQuality) -> ObjectQuality:
    """Return the measures with the concern they give and its reasons."""
    grave = sorted(_severities(quality), key=lambda s: -s[0])
    calm = math.prod(1 - severity for severity, _, _ in grave)
    told = [(text, frame) for severity, text, frame in grave if severity >= MIN_SEVERITY]
    return replace(
        quality,
        concern=1 - calm,
        reason="; ".join(text for text, _ in told),
        look_at_frame=told[0][1] if told else quality.first_frame,
    )


def _severities(quality: ObjectQuality) -> list[tuple[float, str, int]]:
    """Return how grave each measure is, 0..1, in words, and the frame that shows it."""
    first = quality.first_frame
    flicker, jump = quality.flicker or 0.0, quality.largest_jump or 1.0
    found = [
        (
            1 - 0.4**quality.num_switches,
            f"may have taken over object {quality.switch_from} ({_times(quality.num_switches)})",
            quality.switch_frame,
        ),
        # A few jumps are as telling as many; a large one more than one that just counts.
        (
            (1 - 0.7**quality.num_area_jumps) * (1 - 1 / jump),
            f"area jumps {_times(quality.num_area_jumps)}, up to {jump:.1f}-fold",
            quality.jump_frame,
        ),
        # An overlap of 0.8 from frame to frame is usual for what moves.
        (
            0.8 * min(max((flicker - 0.2) / 0.6, 0.0), 1.0),
            f"masks of consecutive frames overlap by {1 - flicker:.2f} only",
            quality.flicker_frame,
        ),
        (
            0.6 * (1 - 0.8 ** (quality.num_fragments - 1)),
            f"seen in {quality.num_fragments} stretches",
            quality.gap_frame,
        ),
        (
            0.4 * quality.share_occluded,
            f"hidden on {quality.share_occluded:.0%} of its frames",
            quality.gap_frame,
        ),
        (
            0.1 * quality.share_border,
            f"touches the border on {quality.share_border:.0%} of its masks",
            first,
        ),
        (
            0.5 * min(max((0.6 - quality.mean_score) / 0.6, 0.0), 1.0),
            f"mean score of {quality.mean_score:.2f}",
            first,
        ),
        # One mask cannot be judged by how it changes.
        (0.2 * (quality.num_masks == 1), "one mask only", first),
    ]
    return [(severity, text, first if at is None else at) for severity, text, at in found]


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _open_writer(path: Path, table: Table) -> pq.ParquetWriter:
    import pyarrow.parquet as pq

    return pq.ParquetWriter(path, schema_of(table), **writer_options_of(table))


def _write(writer: pq.ParquetWriter, table: Table, rows: Sequence[Any]) -> None:
    """Append dataclasses whose fields are the table's columns."""
    import pyarrow as pa

    if rows:
        writer.write_table(pa.Table.from_pylist([asdict(r) for r in rows], schema_of(table)))
