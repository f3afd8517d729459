"""What videos are like, from their headers: read by ranges, kept in the output, never waited for.

A probe reads the container's header and decodes one frame; nothing is downloaded. Results are
advice: they order tasks and estimate totals. Whether a video can be used is decided by the worker
that decodes it, so a wrong or missing probe costs time at most. During a run they are made in
child processes, since a file that crashes a decoder must not take the driver along.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from jobs.isolation import CallLostError, CannotStartError, Isolated
from workers.errors import InputError, StoreError, TaskError
from workers.messages import SourceKind, StoreOptions, VideoSource
from workers.storage import Store, open_store, split_uri

PROBES_PREFIX = "_probes/"
"""Where an output keeps what it knows about headers."""

SCHEMA = pa.schema(
    [
        pa.field("video_key", pa.int64(), nullable=False),
        pa.field("etag", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("rotation", pa.int16()),
        pa.field("fps", pa.float64()),
        pa.field("vfr", pa.bool_()),
        pa.field("num_frames", pa.int64()),
        pa.field("duration_us", pa.int64()),
        pa.field("codec", pa.string()),
        pa.field("readable", pa.bool_()),
        pa.field("reason", pa.string()),
    ]
)
"""Columns of the cache: what was probed, then the fields of `ProbeRow`."""

_BLOCK_BYTES = 256 << 10
_SAVE_ROWS = 1000
_SAVE_AFTER_S = 30.0
_MOST_FILES = 16
_MOST_FAILURES = 20
"""Probes that may fail in a row before there are no more."""
_MOST_LOSSES = 20
"""Children that may be lost in a run: each costs its successor's start."""
_GIVE_UP_AFTER_S = 120.0
"""A probe that takes longer hangs: requests to a store have shorter limits of their own."""
_VIDEOS_PER_CHILD = 16
"""A child starts when those before it have probed so many each: it must be worth its start."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProbeRow:
    """What a header tells about one video. Everything but the last two is None where it does not.

    Attributes
    ----------
    width, height : int or None
        Pixels, after rotation.
    rotation : int or None
        Degrees clockwise.
    fps : float or None
        Average frame rate.
    vfr : bool or None
        Whether the frame rate seems to vary.
    num_frames : int or None
        Frames within the source's time range, before the stride; often an estimate.
    duration_us : int or None
        Length of the source's time range, in microseconds.
    codec : str or None
        Coding format.
    readable : bool
        Whether the header made sense and a frame could be decoded.
    reason : str
        Why not, in one sentence; empty when readable.
    """

    width: int | None = None
    height: int | None = None
    rotation: int | None = None
    fps: float | None = None
    vfr: bool | None = None
    num_frames: int | None = None
    duration_us: int | None = None
    codec: str | None = None
    readable: bool = True
    reason: str = ""


def probe_video(source: VideoSource, options: StoreOptions) -> ProbeRow:
    """Read one video's header.

    Parameters
    ----------
    source : VideoSource
        A container file or a folder of frames.
    options : StoreOptions
        How to reach it.

    Returns
    -------
    ProbeRow
        Not readable, with its reason, where the video is at fault or gone.

    Raises
    ------
    StoreError
        The store refused or did not answer.
    """
    try:
        return _probe(source, options)
    except FileNotFoundError:
        return ProbeRow(readable=False, reason=f"{source.name} was listed but is gone")


def _probe(source: VideoSource, options: StoreOptions) -> ProbeRow:
    try:
        if source.kind is SourceKind.FRAMES:
            header, vfr = _read_folder(source, options), False
        else:
            header, vfr = _read_file(source, options)
    except InputError as error:
        return ProbeRow(readable=False, reason=str(error))
    num_frames, duration_us = header.num_frames, header.duration_us
    if duration_us and (source.start_us is not None or source.end_us is not None):
        end_us = duration_us if source.end_us is None else min(duration_us, source.end_us)
        part_us = max(0, end_us - (source.start_us or 0))
        if num_frames is not None:
            num_frames = round(num_frames * part_us / duration_us)
        duration_us = part_us
    return ProbeRow(
        width=header.width,
        height=header.height,
        rotation=header.rotation,
        fps=header.fps,
        vfr=vfr,
        num_frames=num_frames,
        duration_us=duration_us,
        codec=header.codec,
    )


def _read_file(source: VideoSource, options: StoreOptions) -> tuple[Any, bool]:
    # PyAV comes with the first probe: listing a corpus needs no decoder
    from workers.decode.container import read_header

    root, key = split_uri(source.uri)
    store = _store(root, options)
    path = store.local_path(key)
    if path is not None:
        return read_header(path, source.name)
    with store.open(key, block_size=_BLOCK_BYTES) as stream:
        return read_header(stream, source.name)


def _read_folder(source: VideoSource, options: StoreOptions) -> Any:
    from workers.decode.fetch import fetch_video
    from workers.decode.reader import open_video

    try:
        with fetch_video(source, options) as local, open_video(source, local) as reader:
            return reader.header
    except InputError:
        raise
    except TaskError as error:
        raise StoreError(str(error)) from error


@functools.lru_cache(maxsize=16)
def _store(root: str, options: StoreOptions) -> Store:
    """Return one store per bucket: making a client costs more than a probe."""
    return open_store(root, options)


class ProbeCache:
    """Probes kept in an output, by key and etag; read once, filled from the background.

    Saves in batches, each a new object, and merges them when there are many. Everything it stores
    can be lost or written twice without harm, so it needs no fence.

    Parameters
    ----------
    store : Store
        The output.
    probe : callable, optional
        Probes one video, in a child process; a function that can be imported by its name.
    """

    def __init__(
        self, store: Store, *, probe: Callable[[VideoSource, StoreOptions], ProbeRow] | None = None
    ) -> None:
        self._store = store
        self._probe = probe or _probe
        self._table: pa.Table | None = None
        self._keys = np.zeros(0, np.int64)
        self._files: list[str] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._children: list[Isolated[ProbeRow]] = []
        self._fresh: list[dict[str, Any]] = []
        self._saved_s = time.monotonic()
        self._num_failures = self._num_losses = self._num_probed = 0

    def get(self, keys: NDArray[np.int64], etags: Sequence[str | None] | pa.Array) -> pa.Table:
        """Return what is known about some videos, as `SCHEMA`.

        Parameters
        ----------
        keys : ndarray of int64, shape (N,)
            Video keys.
        etags : sequence of str or None, or Arrow array, length N
            What the videos are now; a probe of another content does not count.

        Returns
        -------
        pyarrow.Table
            N rows in the order asked for; all columns but the first two are null where nothing is
            known.
        """
        with self._lock:
            self._load()
            table, known_keys = self._table, self._keys
        assert table is not None
        wanted = etags if isinstance(etags, pa.Array) else pa.array(etags, pa.string())
        rows = np.searchsorted(known_keys, keys)
        inside = np.minimum(rows, max(0, len(known_keys) - 1))
        hit = np.zeros(len(keys), bool)
        if len(known_keys):
            hit = known_keys[inside] == keys
            known_etags = table["etag"].combine_chunks().take(pa.array(inside))
            same = pc.equal(pc.fill_null(known_etags, ""), pc.fill_null(wanted, ""))
            hit &= np.asarray(same)
        picked = table.take(pa.array(inside, mask=~hit))
        picked = picked.set_column(0, SCHEMA.field(0), pa.array(keys, pa.int64()))
        return picked.set_column(1, SCHEMA.field(1), wanted)

    def num_frames(
        self, keys: NDArray[np.int64], etags: Sequence[str | None] | pa.Array
    ) -> NDArray[np.int64]:
        """Return the frames per video, -1 where they are not known; arguments as of `get`."""
        frames = self.get(keys, etags)["num_frames"]
        return np.asarray(pc.fill_null(frames, -1), np.int64)

    def start(
        self,
        sources: Iterable[VideoSource],
        options: StoreOptions,
        max_workers: int = 4,
        *,
        after_s: float = 0.0,
    ) -> None:
        """Probe videos in the background; returns at once. Once per cache.

        A probe that crashes or hangs is lost, and nothing is said about its video.

        Parameters
        ----------
        sources : iterable of VideoSource
            Taken one at a time as children become free; those known already are passed over.
        options : StoreOptions
            How to reach them.
        max_workers : int
            Probes at the same time, each in a child process of its own; the first child starts
            with the first video that is not known, the others when there are many.
        after_s : float
            Seconds before the first probe: a run that ends sooner has no use for any, and one that
            is starting has better use for its cores.
        """
        pending = iter(sources)
        turn = threading.Lock()

        def next_source() -> VideoSource | None:
            with turn:
                return next(pending, None)

        def work() -> None:
            self._stop.wait(after_s)
            self._work(next_source, options, add_worker)

        def add_worker() -> None:
            with self._lock:
                if len(self._threads) >= max_workers:
                    return
                # a daemon: a probe that hangs must not keep the process alive
                name = f"probe-{len(self._threads)}"
                self._threads.append(threading.Thread(target=work, name=name, daemon=True))
                self._threads[-1].start()

        add_worker()

    def wait(self) -> None:
        """Wait until every source that was given to `start` is probed."""
        # a thread that adds another does so before it ends itself
        for thread in self._threads:
            thread.join()

    def close(self) -> None:
        """Stop probing, dropping what is under way, and save what is there; never raises."""
        self._stop.set()
        with self._lock:
            children = list(self._children)
        for child in children:
            child.close()
        deadline = time.monotonic() + 2
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        try:
            self._save()
            if len(self._files) > _MOST_FILES:
                self._merge()
        except Exception as error:
            # advice that cannot be kept is no reason to fail a run
            _log.warning("probes could not be saved: %s", error)

    def _work(
        self,
        next_source: Callable[[], VideoSource | None],
        options: StoreOptions,
        add_worker: Callable[[], None],
    ) -> None:
        child = Isolated(self._probe, timeout_s=_GIVE_UP_AFTER_S)
        with self._lock:
            self._children.append(child)
        try:
            while self._goes_on():
                source = None
                try:
                    source = next_source()
                    if source is None:
                        return
                    if self._is_known(source):
                        continue
                    row = child(source, options)
                    self._num_failures = 0
                    self._keep(source, row)
                except FileNotFoundError:
                    # the worker will say so; a cached "gone" would outlive the file's return
                    continue
                except CallLostError as error:
                    if not self._stop.is_set():
                        self._num_losses += 1
                        _log.warning("%s was not probed: %s", source and source.name, error)
                except CannotStartError as error:
                    _log.warning("headers are not read during this run: %s", error)
                    self._stop.set()
                except Exception as error:
                    # whatever a header or a store does to a probe, the run goes on without it
                    self._num_failures += 1
                    _log.warning("a probe failed: %s", error)
                else:
                    self._num_probed += 1
                    if self._num_probed >= _VIDEOS_PER_CHILD * len(self._threads):
                        add_worker()
        finally:
            child.close()

    def _goes_on(self) -> bool:
        return (
            not self._stop.is_set()
            and self._num_failures < _MOST_FAILURES
            and self._num_losses < _MOST_LOSSES
        )

    def _is_known(self, source: VideoSource) -> bool:
        with self._lock:
            self._load()
            table, keys = self._table, self._keys
        assert table is not None
        row = int(keys.searchsorted(source.video_key))
        known = row < len(keys) and int(keys[row]) == source.video_key
        return known and (table["etag"][row].as_py() or "") == (source.etag or "")

    def _keep(self, source: VideoSource, row: ProbeRow) -> None:
        with self._lock:
            self._fresh.append(
                {"video_key": source.video_key, "etag": source.etag} | dataclasses.asdict(row)
            )
            due = len(self._fresh) >= _SAVE_ROWS or time.monotonic() > self._saved_s + _SAVE_AFTER_S
        if due:
            self._save()

    def _save(self) -> None:
        with self._lock:
            rows, self._fresh = self._fresh, []
            self._saved_s = time.monotonic()
        if not rows:
            return
        table = pa.Table.from_pylist(rows, SCHEMA)
        key = _new_key()
        self._store.write_bytes(key, _to_parquet(table))
        # not added to what is known: this run asks for each video once, and sorting again for
        # every batch would cost more than the probes
        with self._lock:
            self._files.append(key)

    def _load(self) -> None:
        """Read what the output holds, once. The lock is held."""
        if self._table is None:
            self._files = self._read_all()

    def _read_all(self) -> list[str]:
        """Read every object of the cache; return their keys. The lock is held."""
        files: list[str] = []
        tables = [SCHEMA.empty_table()]
        for stat in self._store.list(PROBES_PREFIX):
            try:
                data = self._store.read_bytes(stat.key)
                tables.append(pq.read_table(pa.BufferReader(data)).select(SCHEMA.names))
            except (FileNotFoundError, pa.ArrowInvalid, KeyError, OSError):
                # merged away meanwhile, or written by another version: probe again
                continue
            files.append(stat.key)
        self._set_table(pa.concat_tables([table.cast(SCHEMA) for table in tables]))
        return files

    def _set_table(self, table: pa.Table) -> None:
        keys = table["video_key"].to_numpy()
        # of several probes of one video the newest content wins: the last one saved
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        last = np.append(keys[1:] != keys[:-1], True) if len(keys) else np.zeros(0, bool)
        self._keys = keys[last]
        self._table = table.take(pa.array(order[last])).combine_chunks()

    def _merge(self) -> None:
        with self._lock:
            old = self._read_all()
            table = self._table
        key = _new_key()
        self._store.write_bytes(key, _to_parquet(table))
        self._store.delete(old)
        self._files = [key]


def _new_key() -> str:
    """Return a key that is listed after all earlier ones, so that newer probes are read last."""
    return f"{PROBES_PREFIX}{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.parquet"


def _to_parquet(table: pa.Table) -> bytes:
    sink: BinaryIO = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()  # type: ignore[attr-defined,no-any-return]
