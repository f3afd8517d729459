"""From commits in the log to data files that everybody's tools read with a glob.

A segment is made in three steps, each of which a successor can take up: a `segment-plan` record
names the commits and the files, the files are built and made visible, a `segment` record seals
them. File names are a function of the plan, so doing a step twice changes nothing.

A plan that takes over the rows of older segments (compaction, or a video that was tracked again)
must never let a reader see a row twice. Its files are first built aside, under `_segments/`, and a
marker that exists once says that all of them are complete; only then are the old files deleted,
and only then do the new ones appear. Whoever finds the marker copies what it names and builds
nothing, so it does not matter that the old files may be gone.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.commit_log import CommitLog, LogState, PendingPlan, read_state
from jobs.records import (
    CURRENT_FILE,
    CURRENT_TABLES,
    SEGMENT_TABLES,
    Kind,
    Outcome,
    PlannedFile,
    Segment,
    SegmentFile,
    SegmentPlan,
    VideoCommit,
)
from jobs.row_groups import batches
from workers.errors import FencedOut, StoreError
from workers.messages import Part
from workers.sinks.schema import ROW_GROUP_ROWS, arrow_schema, writer_options
from workers.spool import remove_abandoned, spool_folder
from workers.storage import Store
from workers.storage.faults import os_fault

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Publisher", "file_sha256"]

TARGET_FILE_BYTES = 512 * 2**20
"""Size a data file should have: few enough to list, small enough to read and to rewrite."""
MAX_PLAN_VIDEOS = 65_536
"""Videos one plan takes from the log."""
MAX_PLAN_BYTES = 4 * 2**30
"""Bytes one plan handles, staged and replaced: bounds the disk it needs and the time readers miss
replaced rows. One log record, or one replaced segment, may be more."""
MAX_MERGED_SEGMENTS = 64
"""Segments one compaction merges: each is one open file and one batch in memory."""
ROW_GROUP_BYTES = 32 * 2**20
"""Arrow bytes of a row group; about 16 MB in the file."""
BATCH_ROWS = 16_384
"""Rows read at a time from each file that is merged."""
SMALL_PART_BYTES = 16 * 2**20
"""Parts up to this size are read in one request and kept in memory; larger ones go to disk."""
READ_AHEAD = 8
"""Parts fetched before they are needed."""
ROW_BYTES = {"videos": 300, "stages": 150}
"""Estimated file bytes per video of the tables whose rows are in the log itself."""
SPREAD = 64
"""A replaced file counts as this many equal pieces when bounds are chosen: keys are hashes, so its
bytes are spread evenly over its range."""
LOWEST_KEY, HIGHEST_KEY = -(2**63), 2**63 - 1


class _BadPartError(Exception):
    """A committed part is missing or not what its commit says."""

    def __init__(self, video_key: int, reason: str) -> None:
        super().__init__(reason)
        self.video_key = video_key
        self.reason = reason


@dataclass(frozen=True, slots=True)
class _Built:
    """A finished file, not visible yet; `path` is None when it is only in the store, at `key`."""

    key: str
    num_rows: int
    size_bytes: int
    sha256: str
    path: Path | None = None


class Publisher:
    """Makes committed videos visible; only for the driver that holds the fence.

    Its methods may run in another thread than the one that commits, one at a time.

    Parameters
    ----------
    log : CommitLog
        The driver's hold on the output.
    spool_dir : str or None
        Directory for files under construction, made when missing; None is the system's temporary
        directory.
    target_bytes : int
        Size that data files should have.
    max_plan_videos, max_plan_bytes : int
        Upper bounds of one plan.

    Attributes
    ----------
    rejected : dict of int to str
        Videos that this publisher could not make visible, because a part of theirs was missing or
        damaged, with the reason by video key. They count as committed no more: the next run tracks
        them again. A video that was committed again and published since is not among them; one
        that an earlier driver had committed may be, after `recover`.
    """

    def __init__(
        self,
        log: CommitLog,
        *,
        spool_dir: str | None = None,
        target_bytes: int = TARGET_FILE_BYTES,
        max_plan_videos: int = MAX_PLAN_VIDEOS,
        max_plan_bytes: int = MAX_PLAN_BYTES,
    ) -> None:
        self._log = log
        self._store = log.store
        self._spool_dir = spool_dir
        self._target_bytes = target_bytes
        self._max_plan_videos = max_plan_videos
        self._max_plan_bytes = max_plan_bytes
        self.rejected: dict[int, str] = {}
        self._current: dict[str, str] = {}
        self._published: deque[tuple[float, list[str]]] = deque()

    # The verbs.

    def recover(self) -> None:
        """Bring the visible folders in line with the log; every driver's first step.

        Finishes the plan an earlier driver left, then removes visible files that no plan names,
        and what killed processes of this host left in the spool directory.

        Raises
        ------
        FencedOut
            A newer driver has taken over.
        StoreError
            The store failed, or a file that must be rewritten is damaged.
        """
        remove_abandoned(self._spool_dir)
        if self._log.state.pending is not None:
            self._finish(self._log.state.pending)
        self.sweep()
        self.write_current()

    def publish(self) -> int:
        """Make every commit of the log visible.

        Returns
        -------
        int
            Number of segments made.

        Raises
        ------
        FencedOut
            A newer driver has taken over.
        StoreError
            The store failed, or a file that must be rewritten is damaged.
        """
        made = 0
        if self._log.state.pending is not None:
            self._finish(self._log.state.pending)
        while True:
            with self._log.lock:
                plan = _plan_commits(
                    self._log.state,
                    self._target_bytes,
                    self._max_plan_videos,
                    self._max_plan_bytes,
                )
                if plan is None:
                    break
                pending = self._begin(plan)
            self._finish(pending)
            made += 1
        self.write_current()
        return made

    def compact(self) -> int:
        """Merge small segments until at most one is left.

        Returns
        -------
        int
            Number of merges.

        Raises
        ------
        FencedOut
            A newer driver has taken over.
        StoreError
            The store failed, or a file that must be rewritten is damaged.
        """
        made = 0
        while True:
            with self._log.lock:
                plan = _plan_merge(self._log.state, self._target_bytes)
                if plan is None:
                    return made
                pending = self._begin(plan)
            self._finish(pending)
            made += 1

    def finish(
        self,
        outcome: Outcome,
        *,
        exit_code: int | None = None,
        workers: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """End a run: publish, compact, snapshot, close.

        Parameters
        ----------
        outcome : Outcome
            Why it ends.
        exit_code : int, optional
            Of the run.
        workers : sequence of Mapping
            Last rows of the table `workers`.
        """
        self.publish()
        self.compact()
        self._log.snapshot()
        self._log.close(outcome, exit_code=exit_code, workers=workers)
        # A driver that lost the fence to this one may have written one of these tables after us,
        # late, so what we wrote last is not what is there: all are written once more.
        self._current.clear()
        # The run is over and said so: a successor that came this fast writes these tables itself.
        with contextlib.suppress(FencedOut):
            self.write_current()

    def sweep(self) -> list[str]:
        """Remove visible files that no accepted plan names.

        Returns
        -------
        list of str
            Their keys.
        """
        found = [
            stat.key
            for table in (*SEGMENT_TABLES, *CURRENT_TABLES)
            for stat in self._store.list(f"{table}/")
        ]
        # After the listing: as long as no newer driver has come, every file listed was made by a
        # plan that this state knows, and names of plans are never used again.
        self._log.check_fence()
        with self._log.lock:
            wanted = _wanted_files(self._log.state)
        stray = [key for key in found if key not in wanted]
        if stray:
            self._store.delete(stray)
        return stray

    def write_current(self) -> None:
        """Replace the tables that hold current state, where they have changed."""
        for table in CURRENT_TABLES:
            with self._log.lock:
                rows = _current_rows(self._log.state, table)
            data = _to_parquet(table, rows)
            digest = hashlib.sha256(data).hexdigest()
            if self._current.get(table) != digest:
                self._log.check_fence()
                self._store.write_bytes(f"{table}/{CURRENT_FILE}", data)
                self._current[table] = digest

    def discard_published(self, *, now_s: float, older_than_s: float = 3600.0) -> int:
        """Delete parts in staging that this publisher turned into segments a while ago.

        Keeps staging small during a long run; `gc` finds what a dead driver left.

        Parameters
        ----------
        now_s : float
            Seconds since 1970.
        older_than_s : float
            Age of a segment, in seconds, before its parts go.

        Returns
        -------
        int
            Number of parts deleted.
        """
        gone = 0
        while self._published and now_s - self._published[0][0] > older_than_s:
            self._log.check_fence()
            keys = self._published[0][1]
            self._store.delete(keys)
            self._published.popleft()
            gone += len(keys)
        return gone

    # One plan.

    def _begin(self, plan: SegmentPlan) -> PendingPlan:
        self._log.append(Kind.SEGMENT_PLAN, plan.to_json())
        pending = self._log.state.pending
        assert pending is not None
        return pending

    def _finish(self, pending: PendingPlan) -> None:
        """Build, show and seal one plan, from wherever it was left."""
        plan = pending.plan
        with _spool(self._spool_dir) as spool:
            build = self._build_aside if plan.replaces else self._build_visible
            built, rejected = build(pending, spool)
        files = tuple(
            SegmentFile(f.table, plan.key(i), f.low, f.high, b.num_rows, b.size_bytes, b.sha256)
            for i, (f, b) in enumerate(zip(plan.files, built, strict=True))
        )
        segment = Segment(plan.seq, plan.first, plan.last, files, self._log.now(), rejected)
        self._log.append(Kind.SEGMENT, segment.to_json())
        for key in pending.commits:
            self.rejected.pop(key, None)
        self.rejected.update(rejected)
        parts = [part.key for commit in pending.commits.values() for part in commit.parts]
        self._published.append((segment.time_s, parts))
        if plan.replaces:
            aside = [stat.key for stat in self._store.list(f"{plan.work_folder}/")]
            self._store.delete(aside)

    def _build_visible(
        self, pending: PendingPlan, spool: Path
    ) -> tuple[list[_Built], dict[int, str]]:
        """Build a plan that replaces nothing straight into the visible folders."""
        rejected: dict[int, str] = {}
        while True:
            builder = _Builder(self._store, self._log, pending, rejected, spool)
            built: list[_Built] = []
            try:
                for index in range(len(pending.plan.files)):
                    file = builder.build(index)
                    assert file.path is not None
                    self._show(file.path, pending.plan.key(index))
                    file.path.unlink()
                    built.append(file)
                return built, rejected
            except _BadPartError as bad:
                # Files already shown hold this video's rows: all are built again without it. No
                # reader has met them, since `videos` comes last.
                rejected[bad.video_key] = bad.reason

    def _build_aside(
        self, pending: PendingPlan, spool: Path
    ) -> tuple[list[_Built], dict[int, str]]:
        """Build a replacing plan under `_segments/`, then swap its files for the old ones."""
        plan = pending.plan
        marker = f"{plan.work_folder}/complete.json"
        try:
            complete = self._store.read_bytes(marker)
        except FileNotFoundError:
            complete = self._build_complete(pending, spool)
            self._log.check_fence()
            if not self._store.create(marker, complete):
                complete = self._store.read_bytes(marker)
        said = json.loads(complete)
        built = [_Built(*values) for values in said["files"]]
        self._delete_replaced(plan)
        for index, file in enumerate(built):
            local = spool / "visible.parquet"
            self._store.get_file(file.key, local)
            if file_sha256(local) != file.sha256:
                raise StoreError(
                    f"{file.key} is damaged although its write succeeded: check the store, then "
                    f"restore the file from a backup"
                )
            self._show(local, plan.key(index))
            local.unlink()
        return built, {int(key): reason for key, reason in said["rejected"].items()}

    def _build_complete(self, pending: PendingPlan, spool: Path) -> bytes:
        """Build all files of a replacing plan; return the marker that names them."""
        rejected: dict[int, str] = {}
        # A folder of this builder's own: an older driver may still be writing into its.
        folder = f"{pending.plan.work_folder}/{self._log.epoch}-{uuid.uuid4().hex[:8]}"
        while True:
            builder = _Builder(self._store, self._log, pending, rejected, spool)
            built: list[list[Any]] = []
            try:
                for index in range(len(pending.plan.files)):
                    file = builder.build(index)
                    assert file.path is not None
                    key = f"{folder}/{index:04d}.parquet"
                    self._log.check_fence()
                    self._store.put_file(file.path, key)
                    file.path.unlink()
                    built.append([key, file.num_rows, file.size_bytes, file.sha256])
            except _BadPartError as bad:
                rejected[bad.video_key] = bad.reason
                continue
            return json.dumps({"files": built, "rejected": rejected}).encode()

    def _delete_replaced(self, plan: SegmentPlan) -> None:
        """Delete the visible files of replaced segments, `videos` first."""
        old = [f for seq in plan.replaces for f in self._log.state.segments[seq].files]
        for is_videos in (True, False):
            self._log.check_fence()
            self._store.delete([f.key for f in old if (f.table == "videos") is is_videos])

    def _show(self, local: Path, key: str) -> None:
        """Make one file visible, unless a newer driver has come."""
        self._log.check_fence()
        self._store.put_file(local, key)
        try:
            self._log.check_fence()
        except FencedOut:
            # The newer driver came during the write and may have replaced this plan's files
            # already. What no plan names now was named only by us, so nobody else misses it.
            if key not in _wanted_files(read_state(self._store)):
                self._store.delete([key])
            raise


# Planning, pure.


def _plan_commits(
    state: LogState, target_bytes: int, max_videos: int, max_bytes: int
) -> SegmentPlan | None:
    """Return the plan for the oldest unpublished commits, or None without any."""
    if not state.unpublished:
        return None
    waiting = sorted(state.unpublished.values(), key=lambda entry: entry[0])
    taken: list[VideoCommit] = []
    replaces: set[int] = set()
    last = size = 0
    start = 0
    while start < len(waiting):
        # Whole records only: a plan's range is one of record numbers.
        seq = waiting[start][0]
        stop = start
        while stop < len(waiting) and waiting[stop][0] == seq:
            stop += 1
        group = [commit for _, commit in waiting[start:stop]]
        homes = {state.segment_of(commit.video_key) for commit in group} - replaces - {0}
        more = sum(part.size_bytes for commit in group for part in commit.parts)
        more += sum(state.segments[home].size_bytes for home in homes)
        if taken and (len(taken) + len(group) > max_videos or size + more > max_bytes):
            break
        taken += group
        replaces |= homes
        size += more
        last = seq
        start = stop
    old = [state.segments[seq] for seq in sorted(replaces)]
    files = _planned_files(taken, old, target_bytes)
    return SegmentPlan(0, state.published_through + 1, last, files, tuple(sorted(replaces)))


def _plan_merge(state: LogState, target_bytes: int) -> SegmentPlan | None:
    """Return the plan that merges the oldest small segments, or None when there are no two."""
    group: list[Segment] = []
    size = 0
    for segment in state.segments.values():
        if segment.size_bytes >= target_bytes // 2:
            continue
        group.append(segment)
        size += segment.size_bytes
        if size >= target_bytes or len(group) == MAX_MERGED_SEGMENTS:
            break
    if len(group) < 2:
        return None
    files = _planned_files([], group, target_bytes)
    replaces = tuple(segment.seq for segment in group)
    through = state.published_through
    return SegmentPlan(0, through + 1, through, files, replaces)


def _planned_files(
    commits: Sequence[VideoCommit], old: Sequence[Segment], target_bytes: int
) -> tuple[PlannedFile, ...]:
    """Return the files of a plan, each table cut at video keys into pieces of about one size."""
    planned: list[PlannedFile] = []
    for table in SEGMENT_TABLES:
        pieces = [
            (commit.video_key, ROW_BYTES.get(table) or commit.size_bytes(table))
            for commit in commits
        ]
        for file in (f for segment in old for f in segment.files if f.table == table):
            step = (file.high - file.low) // SPREAD
            pieces += [(file.low + i * step, file.size_bytes // SPREAD) for i in range(SPREAD)]
        pieces.sort()
        total = sum(size for _, size in pieces)
        low, done, cuts = LOWEST_KEY, 0, max(1, round(total / target_bytes))
        for (key, size), (following, _) in itertools.pairwise(pieces):
            done += size
            if cuts > 1 and done >= total / cuts and following > key:
                planned.append(PlannedFile(table, low, key))
                low, total, done, cuts = key + 1, total - done, 0, cuts - 1
        planned.append(PlannedFile(table, low, HIGHEST_KEY))
    return tuple(planned)


def _wanted_files(state: LogState) -> set[str]:
    """Return the keys that may be in the visible folders."""
    wanted = set(state.visible_files())
    wanted |= {f"{table}/{CURRENT_FILE}" for table in CURRENT_TABLES}
    if state.pending is not None:
        plan = state.pending.plan
        wanted |= {plan.key(index) for index in range(len(plan.files))}
    return wanted


def _current_rows(state: LogState, table: str) -> list[dict[str, Any]]:
    """Return the rows of a table of current state, sorted as its schema says."""
    if table == "categories":
        return [
            {"category_id": key, "name": name} for key, name in sorted(state.categories.items())
        ]
    if table == "quarantine":
        return [
            {
                "video_key": entry.video_key,
                "uri": entry.uri,
                "name": entry.name,
                "error_class": entry.error_class.value,
                "message": entry.message,
                "traceback": entry.traceback,
                "attempts": entry.attempts,
                "reproduce": entry.reproduce,
            }
            for _, entry in sorted(state.quarantined.items())
        ]
    if table == "workers":
        rows = [row | {"started_at": _date(row["started_at"])} for row in state.workers.values()]
        return sorted(rows, key=lambda row: (row["epoch"], row["worker_id"]))
    dates = ("started_s", "ended_s")
    return [
        {key: value for key, value in run.items() if key not in dates}
        | {
            "started_at": _date(run["started_s"]),
            "ended_at": _date(run["ended_s"]),
            "config": json.dumps(run["config"], sort_keys=True),
            "versions": json.dumps(run["versions"], sort_keys=True),
        }
        for _, run in sorted(state.runs.items())
    ]


def _date(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def _to_parquet(table: str, rows: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    schema = arrow_schema(table)
    with pq.ParquetWriter(sink, schema, **writer_options(table)) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    return bytes(memoryview(sink.getvalue()))


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a local file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Building: streams of rows in key order, merged.


class _Builder:
    """Builds the files of one plan, one after the other, in bounded memory."""

    def __init__(
        self,
        store: Store,
        log: CommitLog,
        pending: PendingPlan,
        rejected: Mapping[int, str],
        spool: Path,
    ) -> None:
        self._store = store
        self._log = log
        self._plan = pending.plan
        self._spool = spool
        self._commits = [
            commit for key, commit in sorted(pending.commits.items()) if key not in rejected
        ]

    def build(self, index: int) -> _Built:
        """Build file `index` of the plan on the local disk.

        Raises
        ------
        _BadPartError
            A part is missing or wrong.
        StoreError
            The store failed, or a file of an older segment is damaged.
        """
        import pyarrow.parquet as pq

        planned = self._plan.files[index]
        path = self._spool / f"{index:04d}.parquet"
        num_rows = 0
        with contextlib.ExitStack() as stack:
            schema = arrow_schema(planned.table)
            writer = stack.enter_context(
                pq.ParquetWriter(path, schema, **writer_options(planned.table))
            )
            streams = [self._committed(planned, stack)]
            streams += [
                self._replaced(file, planned, stack)
                for seq in self._plan.replaces
                for file in self._log.state.segments[seq].files
                if file.table == planned.table
                and file.low <= planned.high
                and planned.low <= file.high
            ]
            for group in _gathered(_merged(streams), ROW_GROUP_ROWS):
                writer.write_table(group, row_group_size=max(1, group.num_rows))
                num_rows += group.num_rows
        return _Built(self._plan.key(index), num_rows, path.stat().st_size, file_sha256(path), path)

    def _committed(self, planned: PlannedFile, stack: contextlib.ExitStack) -> Iterator[pa.Table]:
        """Yield the rows of this plan's own commits."""
        table = planned.table
        commits = [c for c in self._commits if planned.low <= c.video_key <= planned.high]
        if table in ROW_BYTES:
            rows_of = _video_rows if table == "videos" else _stage_rows
            return _from_log(commits, table, rows_of)
        parts = [
            (commit.video_key, part)
            for commit in commits
            for part in commit.parts
            if part.table == table
        ]
        threads = stack.enter_context(ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="parts"))
        return _gathered(self._from_parts(parts, threads), BATCH_ROWS)

    def _from_parts(
        self, parts: Sequence[tuple[int, Part]], threads: ThreadPoolExecutor
    ) -> Iterator[pa.Table]:
        import pyarrow as pa

        ahead: deque[Future[Any]] = deque()
        coming = iter(parts)
        try:
            for video_key, part in parts:
                while len(ahead) < READ_AHEAD and (one := next(coming, None)) is not None:
                    ahead.append(threads.submit(self._fetch, one[1]))
                try:
                    yield from _part_rows(ahead.popleft().result(), video_key, part)
                except (FileNotFoundError, ValueError, pa.ArrowException) as error:
                    # A part may be gone because a newer driver finished this plan and cleaned up:
                    # then it is not the commit that is bad, it is our time that is over.
                    self._log.check_fence()
                    reason = (
                        "is missing from staging"
                        if isinstance(error, FileNotFoundError)
                        else f"is damaged ({error})"
                    )
                    raise _BadPartError(video_key, f"{part.key} {reason}") from error
        finally:
            for future in ahead:
                future.cancel()

    def _fetch(self, part: Part) -> bytes | Path:
        """Fetch one part, whole, and compare its digest."""
        if part.size_bytes <= SMALL_PART_BYTES:
            data = self._store.read_bytes(part.key)
            digest = hashlib.sha256(data).hexdigest()
            found: bytes | Path = data
        else:
            found = self._spool / f"part-{uuid.uuid4().hex}.parquet"
            self._store.get_file(part.key, found)
            digest = file_sha256(found)
        if digest != part.sha256:
            raise ValueError("its SHA-256 is not the committed one")
        return found

    def _replaced(
        self, file: SegmentFile, planned: PlannedFile, stack: contextlib.ExitStack
    ) -> Iterator[pa.Table]:
        """Yield the rows of an older segment that this plan takes over."""
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        if file.num_rows == 0:
            return
        local = self._spool / f"old-{uuid.uuid4().hex}.parquet"
        stack.callback(local.unlink, missing_ok=True)
        fault = "missing"
        with contextlib.suppress(FileNotFoundError):
            self._store.get_file(file.key, local)
            fault = "" if file_sha256(local) == file.sha256 else "damaged"
        if fault:
            self._log.check_fence()
            raise StoreError(
                f"{file.key} is {fault} and cannot be rewritten: restore it from a backup"
            )
        superseded = pa.array([c.video_key for c in self._commits], pa.int64())
        with pq.ParquetFile(local) as parquet:
            for batch in batches(parquet, BATCH_ROWS):
                keys = batch.column("video_key")
                keep = pc.invert(pc.is_in(keys, superseded))
                keep = pc.and_(keep, pc.greater_equal(keys, planned.low))
                keep = pc.and_(keep, pc.less_equal(keys, planned.high))
                rows = pa.Table.from_batches([batch]).filter(keep)
                if rows.num_rows:
                    yield rows.cast(arrow_schema(planned.table))


@contextlib.contextmanager
def _spool(spool_dir: str | None) -> Iterator[Path]:
    """Yield a folder for files under construction; what the disk refuses becomes a StoreError."""
    with spool_folder(spool_dir) as spool:
        try:
            yield spool
        except OSError as error:
            where = f"the spool directory {spool.parent}"
            raise os_fault(error, where, writing=True) from error


def _part_rows(found: bytes | Path, video_key: int, part: Part) -> Iterator[pa.Table]:
    """Yield the rows of one fetched part, refusing those of another video."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    schema = arrow_schema(part.table)
    source = found if isinstance(found, Path) else pa.BufferReader(found)
    num_rows = 0
    with pq.ParquetFile(source) as parquet:
        for batch in batches(parquet, BATCH_ROWS):
            rows = pa.Table.from_batches([batch]).cast(schema)
            num_rows += rows.num_rows
            if not pc.all(pc.equal(rows["video_key"], video_key)).as_py():
                raise ValueError("it holds rows of another video")
            yield rows
    if num_rows != part.num_rows:
        raise ValueError(f"it has {num_rows} rows instead of {part.num_rows}")
    if isinstance(found, Path):
        found.unlink()


def _from_log(
    commits: Sequence[VideoCommit],
    table: str,
    rows_of: Callable[[VideoCommit], Iterable[Mapping[str, Any]]],
) -> Iterator[pa.Table]:
    import pyarrow as pa

    schema = arrow_schema(table)
    for start in range(0, len(commits), 1024):
        rows = [dict(row) for c in commits[start : start + 1024] for row in rows_of(c)]
        yield pa.Table.from_pylist(rows, schema=schema)


def _video_rows(commit: VideoCommit) -> Iterator[Mapping[str, Any]]:
    yield {**commit.video, "video_key": commit.video_key}


def _stage_rows(commit: VideoCommit) -> Iterator[Mapping[str, Any]]:
    for stats in sorted(commit.stages, key=lambda stats: stats.stage.value):
        yield {
            "video_key": commit.video_key,
            "stage": stats.stage.value,
            "items": stats.items,
            "busy_s": stats.busy_s,
            "wait_input_s": stats.wait_input_s,
            "wait_output_s": stats.wait_output_s,
        }


def _merged(streams: Sequence[Iterator[pa.Table]]) -> Iterator[pa.Table]:
    """Merge streams that are sorted by video key and share no video.

    Holds one batch per stream. Up to the smallest of the batches' last keys everything is known,
    so those rows are sorted and passed on; the sort is stable and a video is in one stream only,
    so the order inside a video stays.
    """
    import pyarrow as pa

    heads: list[tuple[pa.Table, Any, Iterator[pa.Table]]] = []

    def advance(stream: Iterator[pa.Table]) -> None:
        for table in stream:
            if table.num_rows:
                heads.append((table, table["video_key"].to_numpy(), stream))
                return

    for stream in streams:
        advance(stream)
    while len(heads) > 1:
        cut = min(keys[-1] for _, keys, _ in heads)
        ready: list[pa.Table] = []
        waiting, heads = heads, []
        for table, keys, stream in waiting:
            count = int(np.searchsorted(keys, cut, side="right"))
            if count:
                ready.append(table.slice(0, count))
            if count < len(keys):
                heads.append((table.slice(count), keys[count:], stream))
            else:
                advance(stream)
        rows = pa.concat_tables(ready)
        order = np.argsort(rows["video_key"].to_numpy(), kind="stable")
        yield rows.take(order)
    for table, _, stream in heads:
        yield table
        yield from stream


def _gathered(batches: Iterable[pa.Table], max_rows: int) -> Iterator[pa.Table]:
    """Gather and cut batches into tables of `max_rows` rows, or fewer when they are large."""
    import pyarrow as pa

    gathered: list[pa.Table] = []
    num_rows = num_bytes = 0
    for batch in batches:
        start = 0
        while start < batch.num_rows:
            piece = batch.slice(start, max_rows - num_rows)
            start += piece.num_rows
            gathered.append(piece)
            num_rows += piece.num_rows
            num_bytes += piece.nbytes
            if num_rows >= max_rows or num_bytes >= ROW_GROUP_BYTES:
                yield pa.concat_tables(gathered)
                gathered, num_rows, num_bytes = [], 0, 0
    if gathered:
        yield pa.concat_tables(gathered)
