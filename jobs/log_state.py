"""Everything the log says, as one value: records go in, questions are answered. Pure.

A million settled videos are a few sorted columns (key, identity, state, segment) with the latest
changes in a dict beside them; only commits that are not in a segment yet, and the reasons of the
quarantined, are kept whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jobs.records import (
    Job,
    Kind,
    Outcome,
    Quarantined,
    Record,
    RunPlan,
    Segment,
    SegmentPlan,
    TaskState,
    VideoCommit,
    plain,
)
from workers.errors import ConfigError, StoreError

if TYPE_CHECKING:
    import pyarrow as pa

KEPT_SNAPSHOTS = 2
"""The newest, and the one before it for a reader that is just fetching it."""
FOLD_AT = 65_536
"""Changed videos kept in a dict before they are folded into the sorted arrays."""
MAX_TOLD = 4
"""Settings that differ from those of an output and are told."""
SNAPSHOT_VERSION = 1


def input_identity(
    etag: str | None,
    size_bytes: int | None,
    start_us: int | None,
    end_us: int | None,
    stride: int,
    prompts_digest: str,
) -> int:
    """Return the identity of one input: equal means the same work.

    Parameters
    ----------
    etag : str or None
        Entity tag, or ``size-mtime`` where the store has none.
    size_bytes : int or None
        Size, when the store tells it.
    start_us, end_us : int or None
        Time range in microseconds.
    stride : int
        Every how many frames one is tracked.
    prompts_digest : str
        Hash of the video's prompts; empty for none.

    Returns
    -------
    int
        First 8 bytes of blake2b over all of them, signed.
    """
    text = f"{etag}|{size_bytes}|{start_us}|{end_us}|{stride}|{prompts_digest}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


@dataclass(slots=True)
class PendingPlan:
    """A segment plan whose segment is not there yet.

    Attributes
    ----------
    plan : SegmentPlan
        The plan.
    commits : dict of int to VideoCommit
        What it takes from the log, by video key.
    """

    plan: SegmentPlan
    commits: dict[int, VideoCommit]


@dataclass(slots=True)
class _Tasks:
    """Sorted columns over all settled videos, with the latest changes in a dict beside them."""

    keys: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    identities: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    states: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    segments: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    changed: dict[int, tuple[int, int, int]] = field(default_factory=dict)

    def get(self, key: int) -> tuple[int, int, int]:
        """Return (identity, state, segment) of one video."""
        found = self.changed.get(key)
        if found is not None:
            return found
        at = int(np.searchsorted(self.keys, key))
        if at < len(self.keys) and self.keys[at] == key:
            return int(self.identities[at]), int(self.states[at]), int(self.segments[at])
        return 0, TaskState.UNKNOWN, 0

    def set(self, key: int, identity: int, state: int, segment: int) -> None:
        self.changed[key] = (identity, state, segment)
        if len(self.changed) >= FOLD_AT:
            self.fold()

    def fold(self) -> None:
        """Merge the changes into the sorted columns."""
        if not self.changed:
            return
        keys = np.fromiter(self.changed, np.int64, len(self.changed))
        values = np.array(list(self.changed.values()), np.int64).reshape(-1, 3)
        order = np.argsort(keys)
        keys, values = keys[order], values[order]
        at = np.searchsorted(self.keys, keys)
        known = np.zeros(len(keys), bool)
        inside = at < len(self.keys)
        known[inside] = self.keys[at[inside]] == keys[inside]
        old, new = at[known], ~known
        for name, column in (("identities", 0), ("states", 1), ("segments", 2)):
            array = getattr(self, name)
            array[old] = values[known, column]
            setattr(self, name, np.insert(array, at[new], values[new, column].astype(array.dtype)))
        self.keys = np.insert(self.keys, at[new], keys[new])
        self.changed = {}

    def move(self, segments: Iterable[int], to: int) -> None:
        """Give the videos of some segments another one."""
        gone = set(segments)
        if gone:
            self.segments[np.isin(self.segments, list(gone))] = to
            for key, (identity, state, segment) in self.changed.items():
                if segment in gone:
                    self.changed[key] = (identity, state, to)


class LogState:
    """Everything the log says, as of one record: pure, knows no store.

    Attributes
    ----------
    last_seq : int
        Number of the last record applied; 0 for an empty log.
    epoch, owner : int, str
        The last fence; 0 and empty before the first.
    job : Job or None
        The Ray job that took it; None for a driver that was not submitted.
    closed : bool
        The log ends with `close`: no driver is at work.
    outcome : Outcome or None
        How the last run ended; maintenance does not change it.
    snapshot_seq : int
        Number of the newest snapshot record; 0 for none.
    snapshots : list of str
        Keys of the newest snapshots, oldest first: those that `gc` keeps.
    plan, plan_seq : RunPlan or None, int
        The newest plan and the number of its record.
    segments : dict of int to Segment
        Live segments by number, ascending.
    pending : PendingPlan or None
        The segment plan that must be finished before anything else is published.
    published_through : int
        Last record number that a segment plan covers.
    unpublished : dict of int to (int, VideoCommit)
        Newest accepted commits not covered by a plan, with the number of their record.
    quarantined : dict of int to Quarantined
        Videos in quarantine.
    runs : dict of int to dict
        Per epoch that had a plan: counters and dates, as stored in `runs`.
    workers : dict of str to dict
        Rows of `workers`, by worker id.
    num_committed : int
        Videos whose newest input is committed.
    num_ignored : int
        Records that did not count: written by a driver that had been fenced out.
    """

    def __init__(self) -> None:
        self.last_seq = 0
        self.epoch = 0
        self.owner = ""
        self.fence_s = 0.0
        self.job: Job | None = None
        self.closed = False
        self.outcome: Outcome | None = None
        self.snapshot_seq = 0
        self.snapshots: list[str] = []
        self.plan: RunPlan | None = None
        self.plan_seq = 0
        self.segments: dict[int, Segment] = {}
        self.pending: PendingPlan | None = None
        self.published_through = 0
        self.unpublished: dict[int, tuple[int, VideoCommit]] = {}
        self.quarantined: dict[int, Quarantined] = {}
        self.runs: dict[int, dict[str, Any]] = {}
        self.workers: dict[str, dict[str, Any]] = {}
        self.num_committed = 0
        self.num_ignored = 0
        self._tasks = _Tasks()

    # What others ask.

    @property
    def is_live(self) -> bool:
        """Whether a driver may be at work: the log does not end with `close`."""
        return self.last_seq > 0 and not self.closed

    @property
    def num_quarantined(self) -> int:
        """Videos in quarantine."""
        return len(self.quarantined)

    @property
    def settings(self) -> Mapping[str, Any] | None:
        """What this output's masks were made with; None before the first plan."""
        return self.plan.settings if self.plan is not None else None

    @property
    def categories(self) -> Mapping[int, str]:
        """Name per category id."""
        return self.plan.categories if self.plan is not None else {}

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings other than this output's own.

        Parameters
        ----------
        settings : Mapping
            `RunConfig.mask_settings` of the run about to start.

        Raises
        ------
        ConfigError
            They differ; the message names the keys.
        """
        if self.settings is None:
            return
        stored, given = plain(self.settings), plain(settings)
        differ = sorted(
            key
            for key in stored.keys() | given.keys()
            if stored.get(key, _ABSENT) != given.get(key, _ABSENT)
        )
        # Another tracker or detector brings other values of everything else that concerns it.
        differ = [key for key in _MODEL_NAMES if key in differ] or differ
        if differ:
            told = "; ".join(
                f"{key} was {stored.get(key, 'absent')!r} and is now {given.get(key, 'absent')!r}"
                for key in differ[:MAX_TOLD]
            )
            if len(differ) > MAX_TOLD:
                told += f"; and {len(differ) - MAX_TOLD} more"
            raise ConfigError(
                f"this output holds another configuration ({told}): use the same settings, or "
                f"another --out"
            )

    def task(self, video_key: int) -> tuple[int, TaskState]:
        """Return the identity and state of one video."""
        identity, state, _ = self._tasks.get(video_key)
        return identity, TaskState(state)

    def lookup(self, keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Return what the log knows about many videos.

        Parameters
        ----------
        keys : ndarray of int64, shape (N,)
            Video keys, in any order.

        Returns
        -------
        identities : ndarray of int64, shape (N,)
            Identity of the newest input; meaningless where the state is UNKNOWN.
        states : ndarray of uint8, shape (N,)
            `TaskState` values.
        """
        self._tasks.fold()
        tasks = self._tasks
        identities = np.zeros(len(keys), np.int64)
        states = np.zeros(len(keys), np.uint8)
        if len(tasks.keys):
            at = np.searchsorted(tasks.keys, keys)
            at[at == len(tasks.keys)] = 0
            found = tasks.keys[at] == keys
            identities[found] = tasks.identities[at[found]]
            states[found] = tasks.states[at[found]]
        return identities, states

    def segment_of(self, video_key: int) -> int:
        """Return the segment that holds the rows of a video; 0 for none."""
        return self._tasks.get(video_key)[2]

    def known_keys(self) -> NDArray[np.int64]:
        """Return the keys of all videos the log has ever settled, ascending."""
        self._tasks.fold()
        return self._tasks.keys

    def segment_keys(self, segment: int) -> NDArray[np.int64]:
        """Return the keys of the videos whose rows are in a segment, ascending."""
        self._tasks.fold()
        keys: NDArray[np.int64] = self._tasks.keys[self._tasks.segments == segment]
        return keys

    def published_keys(self) -> NDArray[np.int64]:
        """Return the keys of all videos whose rows are in some segment, ascending."""
        self._tasks.fold()
        keys: NDArray[np.int64] = self._tasks.keys[self._tasks.segments != 0]
        return keys

    def staged_parts(self) -> set[str]:
        """Return the keys of all parts in staging that a segment will still need."""
        commits = [commit for _, commit in self.unpublished.values()]
        if self.pending is not None:
            commits += self.pending.commits.values()
        return {part.key for commit in commits for part in commit.parts}

    def visible_files(self) -> dict[str, Segment]:
        """Return the segment of every file that should be in a visible folder."""
        return {f.key: segment for segment in self.segments.values() for f in segment.files}

    # What records do to it.

    def apply(self, record: Record) -> None:
        """Take the next record of the log into account.

        Raises
        ------
        StoreError
            The record is not the next one.
        """
        if record.seq != self.last_seq + 1:
            raise StoreError(
                f"the log has a gap: record {record.seq} was read after {self.last_seq}; restore "
                f"the missing records from a backup"
            )
        self.last_seq = record.seq
        if record.kind is Kind.FENCE:
            if record.epoch <= self.epoch:
                self.num_ignored += 1
                return
            self.epoch, self.owner, self.closed = record.epoch, record.owner, False
            self.fence_s = record.time_s
            job = record.payload.get("job")
            self.job = Job.from_json(job) if job else None
        elif (record.epoch, record.owner) != (self.epoch, self.owner):
            self.num_ignored += 1
        else:
            # Only the last record decides; a summary says nothing new.
            self.closed = self.closed and record.kind is Kind.SNAPSHOT
            _APPLY[record.kind](self, record)

    def _apply_plan(self, record: Record) -> None:
        self.plan = RunPlan.from_json(record.payload)
        self.plan_seq = record.seq
        self.outcome = None
        self.runs[self.epoch] = {
            "run_id": self.plan.run_id,
            "epoch": self.epoch,
            "owner": self.owner,
            "started_s": self.fence_s,
            "ended_s": None,
            "exit_code": None,
            "config_fingerprint": self.plan.fingerprint,
            "config": dict(self.plan.config),
            "versions": dict(self.plan.versions),
            "num_videos": int(self.plan.totals.get("num_videos", 0)),
            "num_committed": 0,
            "num_quarantined": 0,
            "num_frames": 0,
            "num_masks": 0,
            "wall_s": 0.0,
        }

    def _apply_commit(self, record: Record) -> None:
        for value in record.payload["videos"]:
            commit = VideoCommit.from_json(value)
            key = commit.video_key
            self._settle(key, commit.identity, TaskState.COMMITTED)
            self.unpublished[key] = (record.seq, commit)
            self._count(
                record,
                num_committed=1,
                num_frames=int(commit.video.get("frames_tracked") or 0),
                num_masks=commit.num_rows("masks"),
            )
        self._count(record)
        self._note_workers(record)

    def _apply_quarantine(self, record: Record) -> None:
        for value in record.payload["videos"]:
            entry = Quarantined.from_json(value)
            self._settle(entry.video_key, entry.identity, TaskState.QUARANTINED)
            self.quarantined[entry.video_key] = entry
            self._count(record, num_quarantined=1)

    def _apply_release(self, record: Record) -> None:
        for key in record.payload["video_keys"]:
            if key in self.quarantined:
                self._settle(key, 0, TaskState.UNKNOWN)

    def _apply_segment_plan(self, record: Record) -> None:
        plan = SegmentPlan.from_json(record.seq, record.payload)
        taken = {
            key: commit
            for key, (seq, commit) in self.unpublished.items()
            if plan.first <= seq <= plan.last
        }
        for key in taken:
            del self.unpublished[key]
        self.pending = PendingPlan(plan, taken)
        self.published_through = max(self.published_through, plan.last)

    def _apply_segment(self, record: Record) -> None:
        segment = Segment.from_json(record.payload)
        pending = self.pending
        if pending is None or pending.plan.seq != segment.seq:
            raise StoreError(
                f"log record {record.seq} finishes the segment plan {segment.seq}, which is not "
                f"pending: the log is damaged"
            )
        self._tasks.move(pending.plan.replaces, segment.seq)
        for key, commit in pending.commits.items():
            identity, state, home = self._tasks.get(key)
            if key not in segment.rejected:
                self._tasks.set(key, identity, state, segment.seq)
            elif (
                state == TaskState.COMMITTED
                and identity == commit.identity
                and key not in self.unpublished
            ):
                self.num_committed -= 1
                self._tasks.set(key, 0, TaskState.UNKNOWN, home)
        for gone in pending.plan.replaces:
            del self.segments[gone]
        self.segments[segment.seq] = segment
        self.pending = None

    def _apply_snapshot(self, record: Record) -> None:
        self.snapshot_seq = record.seq
        self.snapshots = [*self.snapshots, record.payload["key"]][-KEPT_SNAPSHOTS:]

    def _apply_close(self, record: Record) -> None:
        self.closed = True
        outcome = Outcome(record.payload["outcome"])
        if outcome is not Outcome.MAINTENANCE:
            self.outcome = outcome
        run = self._count(record)
        if run is not None:
            run["ended_s"] = record.time_s
            run["exit_code"] = record.payload.get("exit_code")
        self._note_workers(record)

    def _settle(self, key: int, identity: int, state: TaskState) -> None:
        _, before, segment = self._tasks.get(key)
        if before == TaskState.QUARANTINED:
            self.quarantined.pop(key, None)
        self.num_committed += (state is TaskState.COMMITTED) - (before == TaskState.COMMITTED)
        self._tasks.set(key, identity, state, segment)

    def _count(self, record: Record, **counts: int) -> dict[str, Any] | None:
        run = self.runs.get(record.epoch)
        if run is not None:
            for name, count in counts.items():
                run[name] += count
            run["wall_s"] = max(0.0, record.time_s - run["started_s"])
        return run

    def _note_workers(self, record: Record) -> None:
        for row in record.payload.get("workers", ()):
            self.workers[row["worker_id"]] = row

    # Its summary.

    def to_snapshot(self) -> bytes:
        """Return the state as one Parquet object.

        Columns ``video_key`` (ascending), ``identity``, ``state``, ``segment``; ``commit`` holds
        the commits not yet in a segment and ``quarantine`` the reasons, as JSON, empty elsewhere.
        All the rest is JSON in the file's metadata.

        Raises
        ------
        ValueError
            A segment plan is pending: its commits are in no column.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self.pending is not None:
            raise ValueError("a snapshot cannot be taken while a segment plan is pending")
        self._tasks.fold()
        tasks = self._tasks
        commits = {key: [seq, c.to_json()] for key, (seq, c) in self.unpublished.items()}
        reasons = {key: entry.to_json() for key, entry in self.quarantined.items()}
        rest = {
            "version": SNAPSHOT_VERSION,
            "last_seq": self.last_seq,
            "epoch": self.epoch,
            "owner": self.owner,
            "fence_s": self.fence_s,
            "job": self.job.to_json() if self.job else None,
            "closed": self.closed,
            "outcome": self.outcome,
            "snapshots": self.snapshots,
            "plan": self.plan.to_json() if self.plan else None,
            "plan_seq": self.plan_seq,
            "segments": [segment.to_json() for segment in self.segments.values()],
            "published_through": self.published_through,
            "runs": list(self.runs.values()),
            "workers": list(self.workers.values()),
            "num_committed": self.num_committed,
            "num_ignored": self.num_ignored,
        }
        table = pa.table(
            {
                "video_key": tasks.keys,
                "identity": tasks.identities,
                "state": tasks.states,
                "segment": tasks.segments,
                "commit": _sparse_json(tasks.keys, commits),
                "quarantine": _sparse_json(tasks.keys, reasons),
            }
        ).replace_schema_metadata({"maskmill.log_state": json.dumps(plain(rest))})
        sink = pa.BufferOutputStream()
        pq.write_table(
            table,
            sink,
            compression="zstd",
            compression_level=3,
            use_dictionary=["state", "segment"],
            column_encoding={"video_key": "DELTA_BINARY_PACKED"},
        )
        return bytes(memoryview(sink.getvalue()))

    @classmethod
    def from_snapshot(cls, data: bytes, record: Record) -> LogState:
        """Return the state that `to_snapshot` wrote, the record that names it applied.

        Parameters
        ----------
        data : bytes
            The object.
        record : Record
            The ``snapshot`` record.

        Raises
        ------
        ValueError
            The bytes are not the ones the record names, or of another version.
        """
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        key = record.payload["key"]
        if hashlib.sha256(data).hexdigest() != record.payload["sha256"]:
            raise ValueError(f"the snapshot {key} is damaged: its SHA-256 is not the recorded one")
        # On this thread alone: a command that ends right after it would meet Arrow's threads at
        # work, and the C++ runtime then aborts the process.
        table = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(use_threads=False)
        rest = json.loads(table.schema.metadata[b"maskmill.log_state"])
        if rest["version"] != SNAPSHOT_VERSION:
            raise ValueError(
                f"the snapshot {key} has version {rest['version']}, this program reads "
                f"{SNAPSHOT_VERSION}"
            )
        state = cls()
        for name in ("epoch", "owner", "fence_s", "closed", "snapshots", "plan_seq"):
            setattr(state, name, rest[name])
        for name in ("published_through", "num_committed", "num_ignored"):
            setattr(state, name, rest[name])
        state.job = Job.from_json(rest["job"]) if rest.get("job") else None
        state.outcome = Outcome(rest["outcome"]) if rest["outcome"] else None
        state.plan = RunPlan.from_json(rest["plan"]) if rest["plan"] else None
        segments = [Segment.from_json(value) for value in rest["segments"]]
        state.segments = {segment.seq: segment for segment in segments}
        state.runs = {run["epoch"]: run for run in rest["runs"]}
        state.workers = {row["worker_id"]: row for row in rest["workers"]}
        for column, put in (("commit", state._put_commit), ("quarantine", state._put_reason)):
            for value in table[column].filter(pc.is_valid(table[column])).to_pylist():
                put(json.loads(value))
        state._tasks = _Tasks(
            _owned(table["video_key"], np.int64),
            _owned(table["identity"], np.int64),
            _owned(table["state"], np.uint8),
            _owned(table["segment"], np.int32),
        )
        # A record that does not count may stand between the last one in the snapshot and the
        # record that names it; nothing else can.
        state.last_seq = record.seq - 1
        state.apply(record)
        return state

    def _put_commit(self, value: list[Any]) -> None:
        commit = VideoCommit.from_json(value[1])
        self.unpublished[commit.video_key] = (value[0], commit)

    def _put_reason(self, value: Mapping[str, Any]) -> None:
        entry = Quarantined.from_json(value)
        self.quarantined[entry.video_key] = entry


_ABSENT = object()
_MODEL_NAMES = ("tracker.name", "detector.name")

_APPLY: dict[Kind, Callable[[LogState, Record], None]] = {
    Kind.PLAN: LogState._apply_plan,
    Kind.COMMIT: LogState._apply_commit,
    Kind.QUARANTINE: LogState._apply_quarantine,
    Kind.RELEASE: LogState._apply_release,
    Kind.SEGMENT_PLAN: LogState._apply_segment_plan,
    Kind.SEGMENT: LogState._apply_segment,
    Kind.SNAPSHOT: LogState._apply_snapshot,
    Kind.CLOSE: LogState._apply_close,
}


def _sparse_json(keys: NDArray[np.int64], values: Mapping[int, Any]) -> pa.Array:
    """Return a string column with the JSON of a few of `keys` and nulls elsewhere."""
    import pyarrow as pa

    filled = np.fromiter(values, np.int64, len(values))
    at = np.searchsorted(keys, np.sort(filled))
    indices = np.zeros(len(keys), np.int32)
    absent = np.ones(len(keys), bool)
    indices[at] = np.arange(len(at))
    absent[at] = False
    texts = [json.dumps(values[key], separators=(",", ":")) for key in sorted(values)]
    texts = texts or [""]
    return pa.array(texts, pa.string()).take(pa.array(indices, mask=absent))


def _owned(column: pa.ChunkedArray, dtype: Any) -> NDArray[Any]:
    """Return a column as an array of its own, so that the Arrow table can be freed."""
    return np.array(column.to_numpy(), dtype=dtype, copy=True)
