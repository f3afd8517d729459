"""The records of the commit log and the values in them: frozen, and JSON both ways.

The log itself (who may append, what counts) is `jobs.commit_log`; this file only says what a
record holds. Keys of an output that more than one room must spell alike are here too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import IntEnum, StrEnum
from typing import Any

from workers.errors import FailureKind, StoreError
from workers.messages import Part, Proposal, Stage, StageStats

JOBS_FOLDER = "_jobs"
LOG_FOLDER = "_log"
PLANS_FOLDER = "_plans"
SEGMENTS_FOLDER = "_segments"
SNAPSHOTS_FOLDER = "_snapshots"
STAGING_FOLDER = "_staging"
CURRENT_FILE = "current.parquet"
"""The one file of a visible folder that holds current state and is replaced whole."""

SEGMENT_TABLES = ("masks", "frames", "objects", "prompts", "stages", "videos")
"""Tables that grow by one set of files per segment, in the order in which they become visible:
a video is readable when its row in `videos` is, so that table is last."""
CURRENT_TABLES = ("categories", "workers", "runs", "quarantine")
"""Tables that hold current state and are replaced whole."""


class Kind(StrEnum):
    """What a record says."""

    FENCE = "fence"
    """A driver takes the output over."""
    PLAN = "plan"
    """A run starts: its configuration, categories and frozen inputs."""
    COMMIT = "commit"
    """Videos became part of the dataset."""
    QUARANTINE = "quarantine"
    """Videos will not be tried again without being asked."""
    RELEASE = "release"
    """Quarantined videos are work again."""
    SEGMENT_PLAN = "segment-plan"
    """Commits are about to become data files with these names."""
    SEGMENT = "segment"
    """They did."""
    SNAPSHOT = "snapshot"
    """A summary of everything before."""
    CLOSE = "close"
    """The driver is done with the output."""


class TaskState(IntEnum):
    """What the log knows about one video."""

    UNKNOWN = 0
    COMMITTED = 1
    QUARANTINED = 2


class Outcome(StrEnum):
    """Why a log was closed."""

    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    MAINTENANCE = "maintenance"
    """`compact`, `gc` or `retry` took the fence and gave it back."""


def log_key(seq: int) -> str:
    """Return the key of the record with number `seq`; the first record is 1."""
    return f"{LOG_FOLDER}/{seq:012d}.json"


def plain(value: Any) -> Any:
    """Return `value` as what JSON holds: NumPy scalars become Python's, NaN and infinity None.

    Raises
    ------
    TypeError
        A value has no JSON form.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, StrEnum):
        return value.value
    if value is None or isinstance(value, (bool, int, str)):
        return int(value) if isinstance(value, IntEnum) else value
    if hasattr(value, "item"):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    raise TypeError(f"{value!r} ({type(value).__name__}) cannot be written to the log")


@dataclass(frozen=True, slots=True)
class Record:
    """One record of the log.

    Attributes
    ----------
    seq : int
        Its number; numbers are dense and start at 1.
    id : str
        Unique per record: tells our own success from another's after a lost response.
    epoch, owner : int, str
        The fence under which it was written.
    kind : Kind
        What it says.
    time_s : float
        Seconds since 1970 by the writer's clock.
    snapshot_seq : int
        Number of the newest snapshot record its writer knew; 0 for none.
    payload : Mapping
        The rest, by kind.
    """

    seq: int
    id: str
    epoch: int
    owner: str
    kind: Kind
    time_s: float
    snapshot_seq: int
    payload: Mapping[str, Any]

    def to_bytes(self) -> bytes:
        """Return the record as UTF-8 JSON."""
        head = {name: getattr(self, name) for name in _HEAD}
        text = json.dumps(plain(head | dict(self.payload)), separators=(",", ":"), allow_nan=False)
        return text.encode()

    @classmethod
    def from_bytes(cls, data: bytes, key: str) -> Record:
        """Return the record in `data`.

        Raises
        ------
        StoreError
            It is no record; the message names `key`.
        """
        try:
            value = json.loads(data)
            head = {name: value.pop(name) for name in _HEAD}
            head["kind"] = Kind(head["kind"])
            return cls(**head, payload=value)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"the log record {key} is damaged ({error}): restore it from a backup, or start "
                f"a new output"
            ) from error


_HEAD = tuple(f.name for f in fields(Record) if f.name != "payload")


@dataclass(frozen=True, slots=True)
class Job:
    """The Ray job that a driver is: how others find its cluster from the output alone.

    Attributes
    ----------
    job_id : str
        Submission id on the cluster.
    address : str
        URL of the cluster's job server, as whoever submitted reached it; empty when another tool
        did.
    session : str
        Name of the cluster's session: tells it from a later cluster at the same address.
    """

    job_id: str
    address: str = ""
    session: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Job:
        """Return what `to_json` wrote."""
        return cls(**{f.name: value[f.name] for f in fields(cls)})


@dataclass(frozen=True, slots=True)
class VideoCommit:
    """One video's accepted attempt.

    Attributes
    ----------
    video_key, identity : int
        Which video, and which input of it (see `jobs.commit_log.input_identity`).
    attempt_id : str
        The attempt whose parts count.
    number : int
        1-based count of tries it took.
    parts : tuple of Part
        Files in staging.
    video : Mapping of str to value
        The complete row of the table `videos`.
    stages : tuple of StageStats
        The rows of the table `stages`.
    chunk, num_chunks : int
        Which piece of the video; 0 of 1 today.
    """

    video_key: int
    identity: int
    attempt_id: str
    number: int
    parts: tuple[Part, ...]
    video: Mapping[str, Any]
    stages: tuple[StageStats, ...] = ()
    chunk: int = 0
    num_chunks: int = 1

    @classmethod
    def from_proposal(
        cls, proposal: Proposal, *, video_key: int, identity: int, number: int, **row: Any
    ) -> VideoCommit:
        """Return the commit of a proposal; `row` adds the columns that only the driver knows."""
        video = dict(proposal.video) | {"video_key": video_key, "attempts": number} | row
        return cls(
            video_key,
            identity,
            proposal.attempt_id,
            number,
            proposal.parts,
            video,
            proposal.stages,
        )

    def num_rows(self, table: str) -> int:
        """Return how many rows of `table` its parts hold."""
        return sum(part.num_rows for part in self.parts if part.table == table)

    def size_bytes(self, table: str) -> int:
        """Return the size of its parts of `table`."""
        return sum(part.size_bytes for part in self.parts if part.table == table)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "video_key": self.video_key,
            "identity": self.identity,
            "chunk": self.chunk,
            "num_chunks": self.num_chunks,
            "attempt_id": self.attempt_id,
            "number": self.number,
            "parts": [[p.table, p.key, p.num_rows, p.size_bytes, p.sha256] for p in self.parts],
            "video": plain(self.video),
            "stages": [
                plain([s.stage, s.items, s.busy_s, s.wait_input_s, s.wait_output_s])
                for s in self.stages
            ],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> VideoCommit:
        """Return the commit that `to_json` wrote."""
        return cls(
            video_key=value["video_key"],
            identity=value["identity"],
            attempt_id=value["attempt_id"],
            number=value["number"],
            parts=tuple(Part(*part) for part in value["parts"]),
            video=value["video"],
            stages=tuple(StageStats(Stage(s[0]), *s[1:]) for s in value["stages"]),
            chunk=value["chunk"],
            num_chunks=value["num_chunks"],
        )


@dataclass(frozen=True, slots=True)
class Quarantined:
    """One video that will not be tried again without being asked: a row of `quarantine`.

    Attributes
    ----------
    video_key, identity : int
        Which video, and which input of it: another input is new work.
    uri : str
        Where it is.
    error_class : FailureKind
        Why.
    message : str
        The reason, one sentence a stranger understands.
    traceback : str
        For the engineer; may be empty.
    attempts : int
        How often it was tried; 0 when it was known beforehand.
    reproduce : str
        A command that shows the failure.
    name : str
        Path below the corpus root.
    """

    video_key: int
    identity: int
    uri: str
    error_class: FailureKind
    message: str
    traceback: str = ""
    attempts: int = 0
    reproduce: str = ""
    name: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Quarantined:
        """Return what `to_json` wrote."""
        known = {f.name for f in fields(cls)}
        values = {key: item for key, item in value.items() if key in known}
        return cls(**values | {"error_class": FailureKind(value["error_class"])})


@dataclass(frozen=True, slots=True)
class StoredTable:
    """A Parquet object beside the log, named with its digest.

    Attributes
    ----------
    key, sha256 : str
        Where, and the hex digest of the whole object.
    size_bytes : int
        Its size.
    """

    key: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What a run set out to do: the payload of a `plan` record.

    Attributes
    ----------
    run_id : str
        The run.
    config : Mapping
        The resolved configuration.
    settings : Mapping
        Everything that changes masks, by dotted key.
    fingerprint : str
        Its fingerprint.
    categories : Mapping of int to str
        Name per category id; fixed for the life of the output.
    versions : Mapping of str to str
        Package versions that matter for results.
    totals : Mapping
        Counts of the plan: videos, frames, what is left.
    tables : Mapping of str to StoredTable
        The frozen inputs: ``manifest``, ``prompts``.
    """

    run_id: str
    config: Mapping[str, Any]
    settings: Mapping[str, Any]
    fingerprint: str
    categories: Mapping[int, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    totals: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, StoredTable] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        value = {f.name: plain(getattr(self, f.name)) for f in fields(self) if f.name != "tables"}
        value["tables"] = {
            name: [table.key, table.sha256, table.size_bytes] for name, table in self.tables.items()
        }
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RunPlan:
        """Return what `to_json` wrote."""
        values = {f.name: value[f.name] for f in fields(cls)}
        values["categories"] = {int(key): name for key, name in value["categories"].items()}
        values["tables"] = {name: StoredTable(*table) for name, table in value["tables"].items()}
        return cls(**values)


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One data file to be: the rows of `table` whose video key lies in a closed range.

    Attributes
    ----------
    table : str
        Which table.
    low, high : int
        Smallest and largest video key it may hold; the files of a table cover all keys.
    """

    table: str
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """Commits that are to become data files: the payload of a `segment-plan` record.

    Attributes
    ----------
    seq : int
        Number of its record: the identity of the plan and of the segment it becomes.
    first, last : int
        Closed range of record numbers whose newest commits it takes; empty when last < first.
    files : tuple of PlannedFile
        The files, in the order in which they become visible.
    replaces : tuple of int
        Segments whose other rows it takes over.
    """

    seq: int
    first: int
    last: int
    files: tuple[PlannedFile, ...]
    replaces: tuple[int, ...] = ()

    def key(self, index: int) -> str:
        """Return the visible key of file `index`: a function of the plan, used by no other."""
        table = self.files[index].table
        nth = sum(file.table == table for file in self.files[:index])
        return f"{table}/{self.seq:012d}-{nth:04d}.parquet"

    @property
    def work_folder(self) -> str:
        """Where the files of a replacing plan are built before they are visible."""
        return f"{SEGMENTS_FOLDER}/{self.seq:012d}"

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values; the number is the record's own."""
        return {
            "first": self.first,
            "last": self.last,
            "files": [[f.table, f.low, f.high] for f in self.files],
            "replaces": list(self.replaces),
        }

    @classmethod
    def from_json(cls, seq: int, value: Mapping[str, Any]) -> SegmentPlan:
        """Return what `to_json` wrote into record `seq`."""
        files = tuple(PlannedFile(*f) for f in value["files"])
        return cls(seq, value["first"], value["last"], files, tuple(value["replaces"]))


@dataclass(frozen=True, slots=True)
class SegmentFile:
    """One visible data file.

    Attributes
    ----------
    table, key : str
        Which table, and where.
    low, high : int
        Closed range of video keys it may hold.
    num_rows, size_bytes : int
        Rows and size.
    sha256 : str
        Hex digest of the whole file.
    """

    table: str
    key: str
    low: int
    high: int
    num_rows: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Segment:
    """A finished plan: the payload of a `segment` record.

    Attributes
    ----------
    seq : int
        Number of the plan's record.
    first, last : int
        The plan's range of records.
    files : tuple of SegmentFile
        Its data files.
    time_s : float
        When it was finished, by the writer's clock.
    rejected : Mapping of int to str
        Videos whose parts were missing or wrong, with the reason: they are work again.
    """

    seq: int
    first: int
    last: int
    files: tuple[SegmentFile, ...]
    time_s: float = 0.0
    rejected: Mapping[int, str] = field(default_factory=dict)

    def num_rows(self, table: str) -> int:
        """Return how many rows of `table` it holds."""
        return sum(f.num_rows for f in self.files if f.table == table)

    @property
    def size_bytes(self) -> int:
        """Size of all its files."""
        return sum(f.size_bytes for f in self.files)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "plan": self.seq,
            "first": self.first,
            "last": self.last,
            "files": [[getattr(f, name) for name in _FILE_FIELDS] for f in self.files],
            "finished_s": self.time_s,
            "rejected": {str(key): reason for key, reason in self.rejected.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Segment:
        """Return what `to_json` wrote."""
        return cls(
            value["plan"],
            value["first"],
            value["last"],
            tuple(SegmentFile(*f) for f in value["files"]),
            value["finished_s"],
            {int(key): reason for key, reason in value["rejected"].items()},
        )


_FILE_FIELDS = tuple(f.name for f in fields(SegmentFile))
