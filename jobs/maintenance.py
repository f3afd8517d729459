"""Keeping an output in order: `compact`, `gc` and `verify`.

The first two take the fence like any driver and give it back, so they cannot meet a run half way;
they refuse to take it from a log that does not end with `close`. `verify` only reads.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jobs.commit_log import (
    CommitLog,
    LogState,
    Outcome,
    find_tail,
    iter_records,
    read_state,
    replay,
    require_closed,
)
from jobs.publication import Publisher, file_sha256
from jobs.records import (
    CURRENT_FILE,
    CURRENT_TABLES,
    LOG_FOLDER,
    SEGMENT_TABLES,
    SEGMENTS_FOLDER,
    SNAPSHOTS_FOLDER,
    STAGING_FOLDER,
    Kind,
    Segment,
    SegmentFile,
    SegmentPlan,
    log_key,
)
from jobs.row_groups import batches
from workers import rle
from workers.errors import ConfigError, FencedOut, StoreDenied, StoreError
from workers.sinks.schema import DECLARATIONS, SCHEMA_VERSION, arrow_schema
from workers.spool import spool_folder
from workers.storage import Store

if TYPE_CHECKING:
    import pyarrow as pa

PUBLISHED_AGE_S = 3600.0
"""Parts stay in staging this long after their segment, for a slow driver that still reads them."""
DELETE_BATCH = 1000
"""Keys deleted between two looks at the fence."""
MAX_TOLD = 20
"""Problems of one kind that are told one by one."""
RESTORE = (
    "restore it from a backup; without one, run the corpus into a new --out, or delete this "
    "output and run again"
)
"""The way out of a damaged data file: what is committed is not tracked again on this output."""


@contextlib.contextmanager
def hold(
    store: Store, owner: str, what: str, *, take_over: bool, spool_dir: str | None = None
) -> Iterator[CommitLog]:
    """Take the fence of an output at rest, bring it in order, and give the fence back.

    Parameters
    ----------
    store : Store
        The output.
    owner : str
        Says who holds the fence; unique per process.
    what : str
        The command, for messages.
    take_over : bool
        Take the fence from a driver that has not closed the log, too.
    spool_dir : str or None
        Directory for files under construction.

    Yields
    ------
    CommitLog
        The hold, after recovery.

    Raises
    ------
    ConfigError
        There is no log.
    StoreError
        The log does not end with `close`, or the store failed.
    """
    state = read_state(store)
    if state.last_seq == 0:
        raise ConfigError(f"{store.uri} holds no output of maskmill: check the path")
    require_closed(state, what=what, take_over=take_over)
    log = CommitLog.acquire(store, owner)
    try:
        Publisher(log, spool_dir=spool_dir).recover()
        yield log
    except FencedOut:
        raise
    except BaseException:
        with contextlib.suppress(StoreError):
            log.close(Outcome.MAINTENANCE)
        raise
    log.snapshot()
    log.close(Outcome.MAINTENANCE)


def compact(
    store: Store, owner: str, *, take_over: bool = False, spool_dir: str | None = None
) -> int:
    """Publish what is left and merge small segments: fewer, larger files.

    Parameters
    ----------
    store : Store
        The output.
    owner : str
        Says who holds the fence meanwhile.
    take_over : bool
        Take the fence from a driver that has not closed the log, too.
    spool_dir : str or None
        Directory for files under construction.

    Returns
    -------
    int
        Segments made.

    Raises
    ------
    ConfigError
        There is no log.
    StoreError
        A driver may be at work, or the store failed.
    """
    with hold(store, owner, "compact", take_over=take_over, spool_dir=spool_dir) as log:
        publisher = Publisher(log, spool_dir=spool_dir)
        return publisher.publish() + publisher.compact()


@dataclass(frozen=True, slots=True)
class GcReport:
    """What `gc` deleted.

    Attributes
    ----------
    num_parts, num_work_files, num_snapshots : int
        Parts in staging, files under construction, summaries of the log.
    size_bytes : int
        Their size.
    num_leftovers : int
        What killed writers left where no listing shows it: temporary files of a disk, unfinished
        uploads of a bucket; older than a day.
    """

    num_parts: int
    num_work_files: int
    num_snapshots: int
    size_bytes: int
    num_leftovers: int = 0


def gc(
    store: Store,
    owner: str,
    *,
    take_over: bool = False,
    published_age_s: float = PUBLISHED_AGE_S,
    clock: Callable[[], float] = time.time,
) -> GcReport:
    """Remove what no commit names and what a segment holds anyway.

    Parameters
    ----------
    store : Store
        The output.
    owner : str
        Says who holds the fence meanwhile.
    take_over : bool
        Take the fence from a driver that has not closed the log, too.
    published_age_s : float
        Age of a segment, in seconds, before its parts in staging go.
    clock : callable
        Returns seconds since 1970.

    Returns
    -------
    GcReport
        What went.

    Raises
    ------
    ConfigError
        There is no log.
    StoreError
        A driver may be at work, or the store failed.
    """
    with hold(store, owner, "gc", take_over=take_over) as log:
        return collect(log, published_age_s=published_age_s, now_s=clock())


def collect(
    log: CommitLog, *, published_age_s: float = PUBLISHED_AGE_S, now_s: float | None = None
) -> GcReport:
    """Do the work of `gc` for the driver that holds the fence.

    Only parts of epochs before the driver's own are touched, or of its own too once it has closed
    the log: a live worker's parts are never its business.

    Parameters
    ----------
    log : CommitLog
        The hold.
    published_age_s : float
        Age of a segment, in seconds, before its parts in staging go.
    now_s : float, optional
        Seconds since 1970; the log's clock by default.

    Returns
    -------
    GcReport
        What went.
    """
    store, now_s = log.store, log.now() if now_s is None else now_s
    with log.lock:
        state = log.state
        keep = state.staged_parts()
        newest_epoch = log.epoch if state.closed else log.epoch - 1
        snapshots = set(state.snapshots)
        work = state.pending.plan.work_folder + "/" if state.pending is not None else None
        keep |= _recently_published(log, since_s=now_s - published_age_s)
    parts = [
        stat
        for stat in store.list(f"{STAGING_FOLDER}/")
        if stat.key not in keep and _epoch_of(stat.key) <= newest_epoch
    ]
    aside = [
        stat
        for stat in store.list(f"{SEGMENTS_FOLDER}/")
        if work is None or not stat.key.startswith(work)
    ]
    old = [stat for stat in store.list(f"{SNAPSHOTS_FOLDER}/") if stat.key not in snapshots]
    doomed = [*parts, *aside, *old]
    for start in range(0, len(doomed), DELETE_BATCH):
        # After the listing: what a newer driver made since is not in it, and what it may need was
        # made by plans and commits that this state knows.
        log.check_fence()
        store.delete([stat.key for stat in doomed[start : start + DELETE_BATCH]])
    log.check_fence()
    num_leftovers = 0
    # To list unfinished uploads is a right of its own in a bucket, which a run does not need.
    with contextlib.suppress(StoreDenied):
        num_leftovers = store.sweep()
    size_bytes = sum(stat.size_bytes for stat in doomed)
    return GcReport(len(parts), len(aside), len(old), size_bytes, num_leftovers)


def _epoch_of(staged_key: str) -> int:
    """Return the epoch of a key in staging; one that is nobody's belongs to no epoch at all."""
    folder = staged_key.removeprefix(f"{STAGING_FOLDER}/").split("/")[0]
    return int(folder) if folder.isdecimal() else 0


def _recently_published(log: CommitLog, *, since_s: float) -> set[str]:
    """Return the parts of all commits that became part of a segment after `since_s`."""
    plans: dict[int, SegmentPlan] = {}
    sealed: list[int] = []
    last = log.state.last_seq
    while last > 0:
        first = max(1, last - 127)
        block = list(iter_records(log.store, first, last))
        for record in reversed(block):
            if record.kind is Kind.SEGMENT and record.time_s > since_s:
                sealed.append(record.payload["plan"])
            elif record.kind is Kind.SEGMENT_PLAN:
                plans[record.seq] = SegmentPlan.from_json(record.seq, record.payload)
        last = first - 1
        # A segment is sealed after its plan, so older blocks matter only for plans still missing.
        if block[0].time_s < since_s and all(seq in plans for seq in sealed):
            break
    return {
        part[1]
        for seq in sealed
        for record in iter_records(log.store, plans[seq].first, plans[seq].last)
        if record.kind is Kind.COMMIT
        for video in record.payload["videos"]
        for part in video["parts"]
    }


# verify


@dataclass(slots=True)
class VerifyReport:
    """What `verify` found.

    Attributes
    ----------
    problems : list of str
        One sentence each; empty for a whole dataset.
    notes : list of str
        What is normal but worth knowing, as commits of a live run that are not visible yet.
    num_records, num_files : int
        Log records and data files looked at.
    num_videos, num_frames, num_masks : int
        Rows in the visible tables, those of segments with a problem left out.
    num_uncounted : int
        Videos of segments with a problem, whose rows are not counted.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_records: int = 0
    num_files: int = 0
    num_videos: int = 0
    num_frames: int = 0
    num_masks: int = 0
    num_uncounted: int = 0

    @property
    def exit_code(self) -> int:
        """0 for a whole dataset, 1 otherwise."""
        return 1 if self.problems else 0


def verify(
    store: Store, *, deep: bool = False, advance: Callable[[str], None] | None = None
) -> VerifyReport:
    """Prove that every committed video is in the dataset exactly once, whole and readable.

    Reads every visible file once. The number of masks of every frame is compared with what the
    table `frames` says, per video, through a checksum that adds up whatever the order.

    Parameters
    ----------
    store : Store
        The output.
    deep : bool
        Decode every mask too and compare its size, area and box; replay the whole log too and
        compare it with its summary.
    advance : callable, optional
        Called with the key of every file that was read.

    Returns
    -------
    VerifyReport
        What is wrong, if anything.

    Raises
    ------
    ConfigError
        There is no log.
    StoreError
        The store failed, or a log record is damaged.
    """
    report = VerifyReport()
    if find_tail(store) == 0 and next(iter(store.list(f"{LOG_FOLDER}/")), None) is None:
        raise ConfigError(f"{store.uri} holds no output of maskmill: check the path")
    if not _verify_numbers(store, report):
        return report
    state = read_state(store)
    if deep:
        _verify_summary(store, state, report)
    _verify_unpublished(store, state, report)
    _verify_strays(store, state, report)
    with spool_folder() as spool:
        for segment in state.segments.values():
            _verify_segment(store, state, segment, spool, deep, report, advance)
    return report


def _verify_numbers(store: Store, report: VerifyReport) -> bool:
    """Look for gaps in the log; without them every record has its number."""
    expected = 1
    for stat in store.list(f"{LOG_FOLDER}/"):
        report.num_records += 1
        if stat.key != log_key(expected):
            report.problems.append(
                f"the log has a gap: {log_key(expected)} is missing before {stat.key}; restore it "
                f"from a backup"
            )
            return False
        expected += 1
    return True


def _verify_summary(store: Store, state: LogState, report: VerifyReport) -> None:
    """Compare the state that a summary gives with that of the whole log."""
    whole = replay(store, LogState(), state.last_seq)
    keys = np.union1d(whole.known_keys(), state.known_keys())
    (identities, states), (told, as_) = whole.lookup(keys), state.lookup(keys)
    same = np.array_equal(identities, told) and np.array_equal(states, as_)
    same &= whole.segments == state.segments and whole.unpublished == state.unpublished
    same &= np.array_equal(whole.published_keys(), state.published_keys())
    if not same:
        report.problems.append(
            f"the newest summary of the log, record {state.snapshot_seq}, does not say what the "
            f"records before it say: delete {state.snapshots[-1]}, the whole log is read then"
        )


def _verify_unpublished(store: Store, state: LogState, report: VerifyReport) -> None:
    waiting = {key: commit for key, (_, commit) in state.unpublished.items()}
    if state.pending is not None:
        waiting |= state.pending.commits
        _tell(state, report, f"a publication (record {state.pending.plan.seq}) is not finished")
    if waiting:
        _tell(state, report, f"{len(waiting)} committed videos are not visible yet")
    for key, commit in waiting.items():
        for part in commit.parts:
            stat = store.stat(part.key)
            if stat is None or stat.size_bytes != part.size_bytes:
                fault = "missing" if stat is None else f"{stat.size_bytes} bytes long"
                report.problems.append(
                    f"{part.key} of the committed video {key} is {fault} instead of "
                    f"{part.size_bytes} bytes long: the video will be tracked again"
                )


def _tell(state: LogState, report: VerifyReport, sentence: str) -> None:
    """Report what is normal while a driver is at work, and a problem otherwise."""
    again = "run the same command again, or maskmill compact"
    if state.is_live:
        report.notes.append(
            f"{sentence}: the log is open, so a driver is at work and will finish this; should it "
            f"be dead, {again} --take-over"
        )
    else:
        report.problems.append(f"{sentence}: {again}")


def _verify_strays(store: Store, state: LogState, report: VerifyReport) -> None:
    wanted = set(state.visible_files())
    if state.pending is not None:
        plan = state.pending.plan
        wanted |= {plan.key(index) for index in range(len(plan.files))}
    for table in (*SEGMENT_TABLES, *CURRENT_TABLES):
        for stat in store.list(f"{table}/"):
            current = table in CURRENT_TABLES and stat.key == f"{table}/{CURRENT_FILE}"
            if stat.key not in wanted and not current:
                report.problems.append(
                    f"{stat.key} is visible but no accepted plan names it: maskmill gc removes it"
                )


@dataclass(slots=True)
class _PerVideo:
    """Sums per video over the files of one table of a segment."""

    keys: list[NDArray[np.int64]] = field(default_factory=list)
    sums: list[NDArray[np.uint64]] = field(default_factory=list)

    def add(self, keys: NDArray[np.int64], *columns: NDArray[np.uint64]) -> None:
        starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
        self.keys.append(keys[starts])
        self.sums.append(np.stack([np.add.reduceat(column, starts) for column in columns], axis=1))

    def totals(self, keys: NDArray[np.int64], width: int) -> NDArray[np.uint64]:
        """Return the sums of some sorted keys, shape (N, width); zero where a key is absent."""
        result = np.zeros((len(keys), width), np.uint64)
        if self.keys and len(keys):
            found = np.concatenate(self.keys)
            at = np.minimum(np.searchsorted(keys, found), len(keys) - 1)
            known = keys[at] == found
            np.add.at(result, at[known], np.concatenate(self.sums)[known])
        return result

    def strangers(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the keys seen that are none of `keys`."""
        if not self.keys:
            return np.zeros(0, np.int64)
        return np.setdiff1d(np.concatenate(self.keys), keys)


def _mixed(values: NDArray[Any]) -> NDArray[np.uint64]:
    """Return a well-mixed 64-bit hash of integers (the finaliser of SplitMix64, Steele 2014)."""
    mixed = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _verify_segment(
    store: Store,
    state: LogState,
    segment: Segment,
    spool: Path,
    deep: bool,
    report: VerifyReport,
    advance: Callable[[str], None] | None,
) -> None:
    seen = {table: _PerVideo() for table in SEGMENT_TABLES}
    before = len(report.problems)
    for file in segment.files:
        local = spool / "file.parquet"
        try:
            if _fetch_verified(store, file, local, report):
                _verify_file(file, local, seen[file.table], deep, report)
        finally:
            local.unlink(missing_ok=True)
        report.num_files += 1
        if advance is not None:
            advance(file.key)
    if len(report.problems) > before:
        report.num_uncounted += len(state.segment_keys(segment.seq))
        return  # what does not add up now follows from what was told already
    keys = state.segment_keys(segment.seq)
    present = seen["videos"].totals(keys, 4)
    for told, rows in (
        ("is committed but has no row in videos", present[:, 0] == 0),
        ("has more than one row in videos", present[:, 0] > 1),
    ):
        _name_videos(report, segment, keys[rows], told)
    for table in SEGMENT_TABLES:
        told = f"has rows in {table} but is not committed in this segment"
        _name_videos(report, segment, seen[table].strangers(keys), told)
    frames = seen["frames"].totals(keys, 3)
    masks = seen["masks"].totals(keys, 2)
    objects = seen["objects"].totals(keys, 1)
    for told, wrong in (
        ("has another number of rows in frames than videos says", frames[:, 0] != present[:, 1]),
        ("has another number of rows in objects than videos says", objects[:, 0] != present[:, 2]),
        ("has another number of rows in masks than videos says", masks[:, 0] != present[:, 3]),
        (
            "has frames with another number of masks than frames says",
            (masks[:, 0] != frames[:, 1]) | (masks[:, 1] != frames[:, 2]),
        ),
    ):
        _name_videos(report, segment, keys[wrong], told)
    report.num_videos += int(present[:, 0].sum())
    report.num_frames += int(frames[:, 0].sum())
    report.num_masks += int(masks[:, 0].sum())


def _name_videos(
    report: VerifyReport, segment: Segment, keys: NDArray[np.int64], told: str
) -> None:
    for key in keys[:MAX_TOLD].tolist():
        report.problems.append(f"video {key} {told} (segment {segment.seq})")
    if len(keys) > MAX_TOLD:
        report.problems.append(
            f"{len(keys) - MAX_TOLD} more videos of segment {segment.seq}: each {told}"
        )


def _fetch_verified(store: Store, file: SegmentFile, local: Path, report: VerifyReport) -> bool:
    try:
        store.get_file(file.key, local)
    except FileNotFoundError:
        report.problems.append(f"{file.key} is missing: {RESTORE}")
        return False
    size = local.stat().st_size
    fault = ""
    if size != file.size_bytes:
        fault = f"{size} bytes instead of {file.size_bytes}"
    elif file_sha256(local) != file.sha256:
        fault = "its SHA-256 is not the recorded one"
    if fault:
        report.problems.append(f"{file.key} is damaged ({fault}): {RESTORE}")
        return False
    return True


def _verify_file(
    file: SegmentFile, local: Path, seen: _PerVideo, deep: bool, report: VerifyReport
) -> None:
    """Read one file: columns, order, key range; add up what it says per video."""
    import pyarrow.parquet as pq

    schema = arrow_schema(file.table)
    with pq.ParquetFile(local) as parquet:
        if not parquet.schema_arrow.equals(schema):
            report.problems.append(
                f"{file.key} has other columns than schema version {SCHEMA_VERSION} of {file.table}"
            )
            return
        if parquet.metadata.num_rows != file.num_rows:
            report.problems.append(
                f"{file.key} has {parquet.metadata.num_rows} rows instead of {file.num_rows}"
            )
            return
        columns = list(dict.fromkeys([*_SORTED_BY[file.table], *_SUMMED.get(file.table, ())]))
        if deep and file.table == "masks":
            columns = schema.names
        last: tuple[Any, ...] | None = None
        for batch in batches(parquet, columns=columns):
            if not batch.num_rows:
                continue
            last = _verify_order(file, batch, last, report)
            if last is None:
                return
            keys = batch.column("video_key").to_numpy()
            ones = np.ones(len(keys), np.uint64)
            seen.add(keys, *_sums(file.table, batch, ones))
            if deep and file.table == "masks":
                _verify_masks(file, batch, report)


def _verify_order(
    file: SegmentFile, batch: pa.RecordBatch, last: tuple[Any, ...] | None, report: VerifyReport
) -> tuple[Any, ...] | None:
    """Check that rows ascend strictly and lie in the file's range; return the last row's key."""
    names = _SORTED_BY[file.table]
    columns = [
        np.unique(batch.column(name).to_numpy(zero_copy_only=False), return_inverse=True)[1]
        if batch.schema.field(name).type == "string"
        else batch.column(name).to_numpy()
        for name in names
    ]
    ascends = np.zeros(batch.num_rows - 1, bool)
    for column in reversed(columns):
        ascends = (column[1:] > column[:-1]) | ((column[1:] == column[:-1]) & ascends)
    first, end = (tuple(batch.column(name)[at].as_py() for name in names) for at in (0, -1))
    ordered = bool(ascends.all()) and (last is None or last < first)
    inside = file.low <= first[0] and end[0] <= file.high
    if ordered and inside:
        return end
    fault = "rows twice or out of order" if not ordered else "rows outside its range of videos"
    report.problems.append(f"{file.key} has {fault}: {RESTORE}")
    return None


def _verify_masks(file: SegmentFile, batch: pa.RecordBatch, report: VerifyReport) -> None:
    names = ("video_key", "frame_idx", "object_id", "rle_counts", "rle_h", "rle_w", "area")
    boxes = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")
    columns = [batch.column(name).to_pylist() for name in (*names, *boxes)]
    for key, frame, object_id, counts, height, width, area, *box in zip(*columns, strict=True):
        try:
            wrong = rle.area(counts, height, width) != area or list(
                rle.bbox_xywh(counts, height, width)
            ) != list(box)
            fault = "has another area or box than its row says" if wrong else ""
        except rle.InvalidRleError as error:
            fault = f"does not decode ({error})"
        if fault:
            report.problems.append(
                f"{file.key}: the mask of video {key}, frame {frame}, object {object_id} {fault}"
            )


_SORTED_BY = {table.name: table.sorted_by for table in DECLARATIONS}
"""What no two rows of a table share, and the order of its rows."""
_SUMMED = {
    "masks": ("frame_idx",),
    "frames": ("frame_idx", "num_objects"),
    "videos": ("frames_tracked", "num_objects", "num_masks"),
}
"""Columns that are added up per video, beside the number of rows."""


def _sums(table: str, batch: pa.RecordBatch, ones: NDArray[np.uint64]) -> list[NDArray[np.uint64]]:
    """Return what is added up per video for one batch: the number of rows first."""
    if table == "masks":
        return [ones, _mixed(batch.column("frame_idx").to_numpy())]
    if table == "frames":
        masks = batch.column("num_objects").to_numpy().astype(np.uint64)
        return [ones, masks, masks * _mixed(batch.column("frame_idx").to_numpy())]
    return [
        ones,
        *(batch.column(name).to_numpy().astype(np.uint64) for name in _SUMMED.get(table, ())),
    ]
