"""The fenced commit log: the one place where it is decided what counts.

`_log/<12 digits>.json` holds records with dense numbers, each created only if absent, so the next
number is the lock. Records are never overwritten and never deleted. A driver begins with a fence
(epoch, owner), and a record counts if it carries the epoch and owner of the last fence before it;
so the newer driver wins, at once, and whatever the older one had not appended is work left over.

Why numbers are dense: a writer appends only at the number after the last one it has read, so it
cannot write past a fence it has not seen, and the end of the log is found by galloping instead of
listing. Every record names the newest snapshot its writer knew, so a resume reads the last record,
that snapshot (one Parquet object) and the records behind it, whatever the length of the log.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from jobs.log_state import LogState, PendingPlan, input_identity
from jobs.records import (
    PLANS_FOLDER,
    SNAPSHOTS_FOLDER,
    Job,
    Kind,
    Outcome,
    Quarantined,
    Record,
    RunPlan,
    StoredTable,
    TaskState,
    VideoCommit,
    log_key,
    plain,
)
from workers.errors import FencedOut, StoreError, StoreUnavailable
from workers.sinks.schema import arrow_schema
from workers.storage import Store

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "CommitLog",
    "LogState",
    "Outcome",
    "PendingPlan",
    "Quarantined",
    "RunPlan",
    "TaskState",
    "VideoCommit",
    "check_video_row",
    "find_tail",
    "input_identity",
    "iter_records",
    "read_state",
    "replay",
    "require_closed",
]

SNAPSHOT_EVERY = 512
"""Records between two snapshots: 32,768 videos at 64 a record."""
READ_THREADS = 16
"""Records fetched at the same time during a replay; a record is a small object far away."""
CREATE_ATTEMPTS = 6
"""Tries of one append while the store does not answer; then the outcome stays unknown."""
BACKOFF_S = 0.25
"""Pause after the first of them; doubles each time."""

# Reading.


def find_tail(store: Store) -> int:
    """Return the number of the last record, in a logarithmic number of requests.

    Parameters
    ----------
    store : Store
        The output.

    Returns
    -------
    int
        0 for an empty log.
    """
    low, step = 0, 1
    while store.stat(log_key(low + step)) is not None:
        low += step
        step *= 2
    high = low + step
    while high - low > 1:
        middle = (low + high) // 2
        if store.stat(log_key(middle)) is not None:
            low = middle
        else:
            high = middle
    return low


def iter_records(store: Store, first: int, last: int) -> Iterator[Record]:
    """Read records in order, several at a time.

    Parameters
    ----------
    store : Store
        The output.
    first, last : int
        Closed range of record numbers.

    Yields
    ------
    Record
        One per number.

    Raises
    ------
    StoreError
        A record is missing or damaged.
    """
    if last - first < 4:
        for seq in range(first, last + 1):
            yield _read_record(store, seq)
        return
    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="log") as threads:
        block = READ_THREADS * 8
        for start in range(first, last + 1, block):
            numbers = range(start, min(start + block, last + 1))
            yield from threads.map(lambda seq: _read_record(store, seq), numbers)


def _read_record(store: Store, seq: int) -> Record:
    key = log_key(seq)
    try:
        data = store.read_bytes(key)
    except FileNotFoundError:
        raise StoreError(
            f"the log record {key} is missing although later ones exist: restore it from a backup"
        ) from None
    record = Record.from_bytes(data, key)
    if record.seq != seq:
        raise StoreError(f"the log record {key} says it is number {record.seq}: the log is damaged")
    return record


@contextlib.contextmanager
def told_of_output(store: Store) -> Iterator[None]:
    """Let a store's refusal name the output instead of a key that nobody asked for.

    Parameters
    ----------
    store : Store
        The output.

    Raises
    ------
    StoreDenied, StoreFull, StoreUnavailable, StoreError
        As raised inside, with the same reason.
    """
    try:
        yield
    except StoreError as error:
        key = rf"{re.escape(store.uri)}/_(probe|log)/[\w./]*\w"
        told = re.sub(key, lambda _: f"the output {store.uri}", str(error))
        raise type(error)(told) from error


def read_state(store: Store) -> LogState:
    """Return what the log says now, from the newest snapshot and the records behind it.

    Parameters
    ----------
    store : Store
        The output.

    Returns
    -------
    LogState
        Empty for an output without a log.

    Raises
    ------
    StoreError
        The store cannot be read, or the log is damaged.
    """
    with told_of_output(store):
        tail = find_tail(store)
    if tail == 0:
        return LogState()
    newest = _read_record(store, tail)
    snapshot_seq = newest.seq if newest.kind is Kind.SNAPSHOT else newest.snapshot_seq
    state = LogState()
    if snapshot_seq:
        record = newest if newest.seq == snapshot_seq else _read_record(store, snapshot_seq)
        # Records are never deleted, so a lost summary costs time and nothing else.
        with contextlib.suppress(FileNotFoundError, ValueError):
            state = LogState.from_snapshot(store.read_bytes(record.payload["key"]), record)
    return replay(store, state, tail)


def replay(store: Store, state: LogState, last: int) -> LogState:
    """Apply the records after `state` up to number `last`, and return the state."""
    for record in iter_records(store, state.last_seq + 1, last):
        state.apply(record)
    return state


def require_closed(state: LogState, *, what: str, take_over: bool) -> None:
    """Refuse to take the fence from a driver that may be at work.

    Parameters
    ----------
    state : LogState
        What the log says.
    what : str
        The command, for the message.
    take_over : bool
        The user insists.

    Raises
    ------
    StoreError
        The log does not end with `close`.
    """
    if state.is_live and not take_over:
        raise StoreError(
            f"{what} would take this output from the driver {state.owner}, which has not closed "
            f"it: wait for its end, or pass --take-over if that driver is dead"
        )


# Writing.


class CommitLog:
    """One driver's hold on one output: the only way to append to its log.

    Safe to use from several threads of one process: the publisher may build files in one while
    the driver commits in another. The hold is lost with the first `StoreError` of an append, since
    what the store holds is unknown then, and with the first `FencedOut`: from there on every append
    raises the same error. What is refused before anything is written (`ConfigError`, `ValueError`),
    and a look at the fence that the store did not answer, change nothing.

    Parameters
    ----------
    store : Store
        The output.
    state : LogState
        What the log says, our own fence included.
    snapshot_every : int
        Records between two snapshots.
    clock : callable
        Returns seconds since 1970.
    sleep : callable
        Waits some seconds between two tries.
    """

    def __init__(
        self,
        store: Store,
        state: LogState,
        *,
        snapshot_every: int = SNAPSHOT_EVERY,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.store = store
        self.state = state
        self.epoch = state.epoch
        self.owner = state.owner
        self.lock = threading.RLock()
        self._snapshot_every = snapshot_every
        self._clock = clock
        self._sleep = sleep
        self._lost: StoreError | None = None

    @classmethod
    def acquire(
        cls,
        store: Store,
        owner: str,
        *,
        job: Job | None = None,
        snapshot_every: int = SNAPSHOT_EVERY,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> CommitLog:
        """Take the output over: read the log and append a fence.

        Parameters
        ----------
        store : Store
            The output.
        owner : str
            Says who holds the fence, in errors of those who lost it; unique per driver.
        job : Job, optional
            The Ray job that the driver is.
        snapshot_every : int
            Records between two snapshots.
        clock, sleep : callable
            As in the class.

        Returns
        -------
        CommitLog
            The hold; a driver that had it before is fenced out from now on.

        Raises
        ------
        StoreError
            The store cannot be used, or the log is damaged.
        """
        state = read_state(store)
        log = cls(store, state, snapshot_every=snapshot_every, clock=clock, sleep=sleep)
        while True:
            log.epoch, log.owner = state.epoch + 1, owner
            record = log._record(Kind.FENCE, {"job": job.to_json()} if job else {})
            found = log._create(record)
            # Another driver took this number: read what it says, and ask for the next one. The
            # newest fence wins, so this one will be it unless yet another comes.
            state.apply(found)
            if found.id == record.id:
                return log

    def now(self) -> float:
        """Return seconds since 1970 by the log's clock."""
        return self._clock()

    def append(self, kind: Kind, payload: Mapping[str, Any]) -> int:
        """Append one record and apply it to `state`.

        Parameters
        ----------
        kind : Kind
            What it says.
        payload : Mapping
            JSON-serialisable.

        Returns
        -------
        int
            The number it got.

        Raises
        ------
        FencedOut
            A newer driver holds the fence; nothing was written.
        StoreUnavailable
            The store did not answer; whether the record was written is unknown.
        StoreError
            Any other fault of the store.
        """
        with self.lock:
            if self._lost is not None:
                raise self._lost
            try:
                while True:
                    record = self._record(kind, payload)
                    found = self._create(record)
                    self._admit(found, ours=record.id)
                    if found.id == record.id:
                        return record.seq
            except StoreError as error:
                self._lost = error
                raise

    def check_fence(self) -> None:
        """Look whether a newer driver has taken over; one request.

        Raises
        ------
        FencedOut
            It has.
        """
        with self.lock:
            if self._lost is not None:
                raise self._lost
            try:
                while self.store.stat(log_key(self.state.last_seq + 1)) is not None:
                    self._admit(_read_record(self.store, self.state.last_seq + 1), ours="")
            except FencedOut as error:
                self._lost = error
                raise

    def commit(
        self, commits: Sequence[VideoCommit], workers: Sequence[Mapping[str, Any]] = ()
    ) -> int:
        """Make videos part of the dataset.

        Parameters
        ----------
        commits : sequence of VideoCommit
            At most a few dozen: they share one record.
        workers : sequence of Mapping
            Rows of the table `workers` as they are now (``started_at`` in seconds since 1970);
            a newer row of a worker replaces its older one.

        Returns
        -------
        int
            Number of the record.

        Raises
        ------
        ValueError
            A row does not fit its table: it would fail the publication, when nobody can mend it.
            Nothing was written; `check_video_row` tells before whose row it is.
        FencedOut, StoreError
            As `append`.
        """
        payload = {"videos": [commit.to_json() for commit in commits]} | _worker_rows(workers)
        _check_videos(payload["videos"])
        seq = self.append(Kind.COMMIT, payload)
        self._snapshot_if_due()
        return seq

    def quarantine(self, entries: Sequence[Quarantined]) -> int:
        """Put videos into quarantine; return the number of the record."""
        seq = self.append(Kind.QUARANTINE, {"videos": [entry.to_json() for entry in entries]})
        self._snapshot_if_due()
        return seq

    def release(self, video_keys: Iterable[int]) -> int:
        """Take videos out of quarantine, so that they are work again; return the number."""
        return self.append(Kind.RELEASE, {"video_keys": [int(key) for key in video_keys]})

    def plan(self, plan: RunPlan, tables: Mapping[str, pa.Table] | None = None) -> int:
        """Say what a run sets out to do, with its inputs frozen beside the log.

        Parameters
        ----------
        plan : RunPlan
            The plan; its `tables` are replaced.
        tables : Mapping of str to pyarrow.Table, optional
            ``manifest`` and ``prompts``; an equal table that an earlier run stored is used again.

        Returns
        -------
        int
            Number of the record.

        Raises
        ------
        ConfigError
            The output holds another configuration.
        """
        self.state.check_settings(plan.settings)
        stored = {name: self._store_table(name, table) for name, table in (tables or {}).items()}
        return self.append(Kind.PLAN, dataclasses.replace(plan, tables=stored).to_json())

    def close(
        self,
        outcome: Outcome,
        *,
        exit_code: int | None = None,
        workers: Sequence[Mapping[str, Any]] = (),
    ) -> int:
        """Give the output back: no driver is at work from here on.

        Parameters
        ----------
        outcome : Outcome
            Why.
        exit_code : int, optional
            Of the run.
        workers : sequence of Mapping
            Last rows of the table `workers`.

        Returns
        -------
        int
            Number of the record.
        """
        payload: dict[str, Any] = {"outcome": outcome, "exit_code": exit_code}
        return self.append(Kind.CLOSE, payload | _worker_rows(workers))

    def snapshot(self) -> int | None:
        """Summarise the log, so that the next resume is cheap.

        Returns
        -------
        int or None
            Number of the record; None while a segment plan is pending, or when there is nothing
            new to summarise.
        """
        with self.lock:
            if self.state.pending is not None or self.state.snapshot_seq == self.state.last_seq:
                return None
            data = self.state.to_snapshot()
            # The name is this driver's alone: two that summarise at once must not overwrite each
            # other's bytes, of which a record may hold the digest.
            key = f"{SNAPSHOTS_FOLDER}/{self.state.last_seq:012d}-{uuid.uuid4().hex[:8]}.parquet"
            self.store.write_bytes(key, data)
            return self.append(
                Kind.SNAPSHOT,
                {
                    "key": key,
                    "sha256": hashlib.sha256(data).hexdigest(),
                    "size_bytes": len(data),
                },
            )

    def _snapshot_if_due(self) -> None:
        if self.state.last_seq - self.state.snapshot_seq >= self._snapshot_every:
            # The record before it is in the log: a summary that could not be written is tried again
            # after the next one, and a hold that was lost shows there too.
            with contextlib.suppress(StoreUnavailable):
                self.snapshot()

    def _store_table(self, name: str, table: pa.Table) -> StoredTable:
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", compression_level=3)
        data = memoryview(sink.getvalue())
        digest = hashlib.sha256(data).hexdigest()
        key = f"{PLANS_FOLDER}/{name}-{digest[:16]}.parquet"
        found = self.store.stat(key)
        if found is None or found.size_bytes != len(data):
            self.store.write_bytes(key, bytes(data))
        return StoredTable(key, digest, len(data))

    def _record(self, kind: Kind, payload: Mapping[str, Any]) -> Record:
        state = self.state
        return Record(
            state.last_seq + 1,
            uuid.uuid4().hex,
            self.epoch,
            self.owner,
            kind,
            self._clock(),
            state.snapshot_seq,
            payload,
        )

    def _create(self, record: Record) -> Record:
        """Create a record if its number is free; return the one that has the number now."""
        key, data = log_key(record.seq), record.to_bytes()
        pause = BACKOFF_S
        for attempt in range(1, CREATE_ATTEMPTS + 1):
            try:
                if self.store.create(key, data):
                    return Record.from_bytes(data, key)
                # Ours after all, if the response to an earlier try was lost.
                return _read_record(self.store, record.seq)
            except StoreUnavailable:
                # Unknown outcome. Trying again is safe: the same number, the same id.
                if attempt == CREATE_ATTEMPTS:
                    raise
            self._sleep(pause)
            pause *= 2
        raise AssertionError("unreachable")

    def _admit(self, record: Record, *, ours: str) -> None:
        """Apply a record found at the next number, ours or another's."""
        if record.id != ours and (record.epoch, record.owner) == (self.epoch, self.owner):
            raise StoreError(
                f"another process writes to this output in the name of {self.owner}: give every "
                f"driver an owner of its own"
            )
        self.state.apply(record)
        if self.state.epoch != self.epoch:
            raise FencedOut(
                f"another driver, {self.state.owner}, has taken over this output (epoch "
                f"{self.state.epoch} after {self.epoch}): this one stops, nothing it had "
                f"committed is lost"
            )


def check_video_row(commit: VideoCommit) -> None:
    """Refuse a commit whose rows would not fit the tables `videos` and `stages`.

    `CommitLog.commit` refuses the whole group that such a commit is in; asked when its attempt
    ends, it is that attempt's failure alone.

    Parameters
    ----------
    commit : VideoCommit
        What would be committed.

    Raises
    ------
    ValueError
        A column is unknown or missing, or a value is of another type; the message names it.
    """
    try:
        value = commit.to_json()
    except TypeError as error:
        raise ValueError(str(error)) from error
    _check_videos([value])


def _check_videos(values: Sequence[Mapping[str, Any]]) -> None:
    _check_rows("videos", [value["video"] for value in values])
    names = ("stage", "items", "busy_s", "wait_input_s", "wait_output_s")
    _check_rows(
        "stages",
        [
            {"video_key": value["video_key"], **dict(zip(names, stage, strict=True))}
            for value in values
            for stage in value["stages"]
        ],
    )


def _worker_rows(workers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows = [plain(row) for row in workers]
    _check_rows("workers", [{**row, "started_at": 0} for row in rows])
    return {"workers": rows} if rows else {}


def _check_rows(table: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse rows that a table cannot hold.

    Raises
    ------
    ValueError
        A column is unknown or missing, or a value is of another type.
    """
    import pyarrow as pa

    schema = arrow_schema(table)
    unknown = sorted({name for row in rows for name in row} - set(schema.names))
    if unknown:
        raise ValueError(f"the table {table} has no column {unknown[0]!r}")
    try:
        made = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
    except (pa.ArrowException, OverflowError) as error:
        raise ValueError(f"a row does not fit the table {table}: {error}") from error
    for field_, column in zip(schema, made.columns, strict=True):
        if column.null_count and not field_.nullable:
            raise ValueError(f"a row of the table {table} has no {field_.name!r}")
