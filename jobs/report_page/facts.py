"""What a report says about a run, gathered from its dataset in one pass per table.

Everything is a sum, a histogram or a list of bounded length, so that neither memory nor the page
grows with the number of videos.
"""

from __future__ import annotations

import heapq
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jobs.commit_log import iter_records
from jobs.parallel import map_bounded
from jobs.records import Kind, Record

if TYPE_CHECKING:
    from jobs.commit_log import LogState
    from jobs.dataset import Dataset
    from workers.storage import Store

FloatArray = NDArray[np.float64]

MAX_SLOWEST = 10
MAX_FAILURES_PER_KIND = 25
"""Quarantined videos shown of each kind; the rest is counted."""
MAX_KINDS = 12
"""Rows of a table of categories, formats or machines; the rest is summed up."""
MAX_EXECUTIONS = 30
MAX_RECORDS = 2_000
"""Log records read for the throughput over time; of longer logs, as many at equal distances."""
NUM_TIME_BINS = 120
VIDEO_COLUMNS = (
    "video_key",
    "name",
    "width",
    "height",
    "codec",
    "duration_us",
    "size_bytes",
    "frames_tracked",
    "frames_corrupt",
    "truncated",
    "num_objects",
    "num_masks",
    "attempts",
    "queue_s",
    "wall_s",
    "peak_memory_bytes",
    "gpu",
    "tracker",
    "weights_sha256",
    "detector_sha256",
)
"""What is read of `videos`."""
LOG_THREADS = 8


class Histogram:
    """Counts between fixed edges; what lies outside counts in the first or last bin.

    Parameters
    ----------
    edges : sequence of float
        Ascending.

    Attributes
    ----------
    edges : ndarray of float64, shape (N + 1,)
        As given.
    counts : ndarray of int64, shape (N,)
        How many values lie in each half-open bin.
    """

    def __init__(self, edges: Sequence[float] | FloatArray) -> None:
        self.edges: FloatArray = np.asarray(edges, np.float64)
        self.counts: NDArray[np.int64] = np.zeros(len(self.edges) - 1, np.int64)

    def add(self, values: NDArray[Any]) -> None:
        """Take in some values; those that are not numbers are left out."""
        known = values[~np.isnan(values)] if values.dtype.kind == "f" else values
        at = np.clip(np.searchsorted(self.edges, known, "right") - 1, 0, len(self.counts) - 1)
        self.counts += np.bincount(at, minlength=len(self.counts))

    @property
    def total(self) -> int:
        """Number of values."""
        return int(self.counts.sum())


@dataclass(slots=True)
class VideoFacts:
    """Sums over the table `videos`.

    Attributes
    ----------
    num_videos, num_frames, num_masks, num_objects : int
        Totals.
    num_retried, num_truncated, num_corrupt, num_empty : int
        Videos that needed more than one try, end early, lost frames, have no object.
    duration_s, size_bytes : float, int
        Of the sources, where known.
    queue_s, wall_s : float
        Sums of the time before, and of, the accepted try.
    kinds : dict of str to Counter
        Videos by picture size, codec, tracker and machine.
    objects : Histogram
        Objects per video.
    slowest : list of dict
        Rows with the most seconds per frame, the slowest first.
    weights : dict of str to str
        SHA-256 by what the weights are for.
    """

    num_videos: int = 0
    num_frames: int = 0
    num_masks: int = 0
    num_objects: int = 0
    num_retried: int = 0
    num_truncated: int = 0
    num_corrupt: int = 0
    num_empty: int = 0
    duration_s: float = 0.0
    size_bytes: int = 0
    queue_s: float = 0.0
    wall_s: float = 0.0
    kinds: dict[str, Counter[str]] = field(
        default_factory=lambda: {
            name: Counter() for name in ("size", "codec", "tracker", "machine")
        }
    )
    objects: Histogram = field(
        default_factory=lambda: Histogram([0, 1, 2, 3, 4, 5, 6, 8, 11, 16, 21, 51, 101])
    )
    slowest: list[dict[str, Any]] = field(default_factory=list)
    weights: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class ObjectFacts:
    """Distributions over the table `objects`.

    Attributes
    ----------
    area : Histogram
        Mean area of each object, as the base-10 logarithm of pixels.
    score, stability : Histogram
        Mean score, and mean overlap of consecutive boxes, of each object.
    visible : Histogram
        Masks of each object, as the base-10 logarithm.
    num_never_seen : int
        Objects without any mask.
    by_category : dict of int or None to [objects, masks, sum of scores]
        Sums; scores are weighted by masks.
    """

    area: Histogram = field(default_factory=lambda: Histogram(np.linspace(0, 8, 41)))
    score: Histogram = field(default_factory=lambda: Histogram(np.linspace(0, 1, 26)))
    stability: Histogram = field(default_factory=lambda: Histogram(np.linspace(0, 1, 26)))
    visible: Histogram = field(default_factory=lambda: Histogram(np.linspace(0, 6, 31)))
    num_never_seen: int = 0
    by_category: dict[int | None, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StageFacts:
    """One stage over all videos, in seconds; items are frames, masks or bytes."""

    stage: str
    items: int
    busy_s: float
    wait_input_s: float
    wait_output_s: float


@dataclass(frozen=True, slots=True)
class Throughput:
    """Frames per second over the running time of all executions, one after the other.

    Attributes
    ----------
    edges_s : ndarray of float64, shape (N + 1,)
        Running time.
    frames_per_s : ndarray of float64, shape (N,)
        Mean between two edges.
    restarts_s : tuple of float
        Where a later execution begins.
    share_read : float
        Part of the log that was read; below 1 the curve is an estimate.
    """

    edges_s: FloatArray
    frames_per_s: FloatArray
    restarts_s: tuple[float, ...]
    share_read: float


@dataclass(frozen=True, slots=True)
class FailureKindFacts:
    """One kind of failure: how many videos, and the first of them."""

    kind: str
    num_videos: int
    rows: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything of a report that comes out of tables and log.

    Attributes
    ----------
    uri : str
        The output.
    created_s : float
        Unix time.
    condition : str
        ``finished``, ``interrupted``, ``failed``, ``not ended`` or ``a copy without its log``.
    num_planned : int or None
        Videos of the newest plan, where there is a log or a run; None where it was about a part
        of them only, as that of a nightly run is.
    num_left : int or None
        Videos that the newest plan had to do and that are neither committed nor in quarantine;
        None without a log.
    wall_s : float
        Running time of all executions.
    executions : list of dict
        The newest rows of `runs`; `config` and `versions` as mappings.
    num_executions : int
        How many there are.
    videos : VideoFacts
        See there.
    objects : ObjectFacts
        See there.
    stages : list of StageFacts
        By busy time.
    workers : list of dict
        Rows of `workers`.
    throughput : Throughput or None
        None without a log, or before the first commit.
    failures : list of FailureKindFacts
        Quarantine, the commonest kind first.
    categories : Mapping of int to str
        Names.
    """

    uri: str
    created_s: float
    condition: str
    num_planned: int | None
    num_left: int | None
    wall_s: float
    executions: list[dict[str, Any]]
    num_executions: int
    videos: VideoFacts
    objects: ObjectFacts
    stages: list[StageFacts]
    workers: list[dict[str, Any]]
    throughput: Throughput | None
    failures: list[FailureKindFacts]
    categories: Mapping[int, str]

    @property
    def num_quarantined(self) -> int:
        """Videos in quarantine."""
        return sum(kind.num_videos for kind in self.failures)


def gather(dataset: Dataset, store: Store) -> Facts:
    """Read the tables and the log of a run.

    Parameters
    ----------
    dataset : Dataset
        The run.
    store : Store
        Its output.

    Returns
    -------
    Facts
        What is known now.

    Raises
    ------
    StoreError
        A file or a log record is missing.
    """
    state = dataset.state
    executions = _executions(dataset)
    if state is None:
        condition = "a copy without its log"
    elif state.closed:
        condition = state.outcome.value if state.outcome is not None else "finished"
    else:
        condition = "not ended"
    videos, failures = _videos(dataset), _failures(dataset)
    num_settled = videos.num_videos + sum(kind.num_videos for kind in failures)
    num_planned = executions[0]["num_videos"] if executions else None
    return Facts(
        uri=dataset.uri,
        created_s=time.time(),
        condition=condition,
        num_planned=None if num_planned is None or num_settled > num_planned else num_planned,
        num_left=None if state is None else _num_left(state, executions),
        wall_s=float(sum(run["wall_s"] for run in executions)),
        executions=executions[:MAX_EXECUTIONS],
        num_executions=len(executions),
        videos=videos,
        objects=_objects(dataset),
        stages=_stages(dataset),
        workers=_workers(dataset),
        throughput=None if state is None else _throughput(store, state.last_seq, executions),
        failures=failures,
        categories=dataset.categories if state is None else state.categories,
    )


def _num_left(state: LogState, executions: Sequence[Mapping[str, Any]]) -> int | None:
    """Return what the newest plan had to do, less what its execution has settled."""
    if state.plan is None or not executions:
        return None
    totals = state.plan.totals
    todo = totals.get("num_left", totals.get("num_videos", 0)) + totals.get("num_invalid", 0)
    settled = executions[0]["num_committed"] + executions[0]["num_quarantined"]
    return max(0, int(todo) - int(settled))


def _executions(dataset: Dataset) -> list[dict[str, Any]]:
    """Return the runs, the newest first."""
    if dataset.state is not None:
        rows = [dict(run) for run in dataset.state.runs.values()]
    else:
        rows = dataset.table("runs").to_pylist()
        for row in rows:
            row["started_s"] = row["started_at"].timestamp()
            row["ended_s"] = row["ended_at"].timestamp() if row["ended_at"] else None
            row["config"], row["versions"] = (json.loads(row[c]) for c in ("config", "versions"))
    return sorted(rows, key=lambda row: -row["epoch"])


def _videos(dataset: Dataset) -> VideoFacts:
    facts = VideoFacts()
    slowest: list[tuple[float, int, dict[str, Any]]] = []
    for batch in dataset.batches("videos", columns=VIDEO_COLUMNS):
        rows = batch.to_pylist()
        facts.objects.add(np.array([row["num_objects"] for row in rows]))
        for row in rows:
            _add_video(facts, row)
            if row["frames_tracked"]:
                entry = (row["wall_s"] / row["frames_tracked"], row["video_key"], row)
                push = heapq.heappush if len(slowest) < MAX_SLOWEST else heapq.heappushpop
                push(slowest, entry)
    facts.slowest = [row for *_, row in sorted(slowest, key=lambda entry: -entry[0])]
    return facts


def _add_video(facts: VideoFacts, row: Mapping[str, Any]) -> None:
    facts.num_videos += 1
    facts.num_frames += row["frames_tracked"]
    facts.num_masks += row["num_masks"]
    facts.num_objects += row["num_objects"]
    facts.num_retried += row["attempts"] > 1
    facts.num_truncated += row["truncated"]
    facts.num_corrupt += row["frames_corrupt"] > 0
    facts.num_empty += row["num_objects"] == 0
    facts.duration_s += (row["duration_us"] or 0) / 1e6
    facts.size_bytes += row["size_bytes"] or 0
    facts.queue_s += row["queue_s"]
    facts.wall_s += row["wall_s"]
    facts.kinds["size"][f"{row['width']}x{row['height']}"] += 1
    facts.kinds["codec"][row["codec"] or "unknown"] += 1
    facts.kinds["tracker"][row["tracker"]] += 1
    facts.kinds["machine"][row["gpu"] or "CPU only"] += 1
    for what in ("weights", "detector"):
        if row[f"{what}_sha256"]:
            facts.weights["tracker" if what == "weights" else what] = row[f"{what}_sha256"]


def _objects(dataset: Dataset) -> ObjectFacts:
    facts = ObjectFacts()
    columns = ("category_id", "frames_visible", "mean_score", "mean_area", "stability")
    for batch in dataset.batches("objects", columns=columns):
        number = {
            name: batch.column(name).to_numpy(zero_copy_only=False).astype(np.float64)
            for name in columns[1:]
        }
        seen = number["frames_visible"] > 0
        facts.num_never_seen += int((~seen).sum())
        facts.area.add(np.log10(np.maximum(number["mean_area"][seen], 1)))
        facts.score.add(number["mean_score"])
        facts.stability.add(number["stability"])
        facts.visible.add(np.log10(np.maximum(number["frames_visible"][seen], 1)))
        scores = np.nan_to_num(number["mean_score"]) * number["frames_visible"]
        ids = batch.column("category_id").to_pylist()
        for category, masks, score in zip(
            ids, number["frames_visible"].tolist(), scores.tolist(), strict=True
        ):
            sums = facts.by_category.setdefault(category, [0, 0, 0])
            sums[0] += 1
            sums[1] += masks
            sums[2] += score
    return facts


def _stages(dataset: Dataset) -> list[StageFacts]:
    import pyarrow as pa

    columns = ("items", "busy_s", "wait_input_s", "wait_output_s")
    sums: dict[str, FloatArray] = {}
    for batch in dataset.batches("stages", columns=("stage", *columns)):
        grouped = pa.Table.from_batches([batch]).group_by("stage")
        for row in grouped.aggregate([(name, "sum") for name in columns]).to_pylist():
            values = np.array([row[f"{name}_sum"] for name in columns], np.float64)
            sums[row["stage"]] = sums.get(row["stage"], np.zeros(len(columns))) + values
    found = [StageFacts(stage, int(each[0]), *map(float, each[1:])) for stage, each in sums.items()]
    return sorted(found, key=lambda stage: -stage.busy_s)


def _workers(dataset: Dataset) -> list[dict[str, Any]]:
    if dataset.state is not None:
        return sorted(
            dataset.state.workers.values(), key=lambda row: (row["epoch"], row["worker_id"])
        )
    rows: list[dict[str, Any]] = dataset.table("workers").to_pylist()
    return rows


def _failures(dataset: Dataset) -> list[FailureKindFacts]:
    if dataset.state is not None:
        rows: Iterable[Mapping[str, Any]] = (
            entry.to_json() for entry in dataset.state.quarantined.values()
        )
    else:
        rows = dataset.table("quarantine").to_pylist()
    counts: Counter[str] = Counter()
    first: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        kind = str(row["error_class"])
        counts[kind] += 1
        if counts[kind] <= MAX_FAILURES_PER_KIND:
            first.setdefault(kind, []).append(row)
    return [FailureKindFacts(kind, n, tuple(first[kind])) for kind, n in counts.most_common()]


def _throughput(
    store: Store, last_seq: int, executions: Sequence[Mapping[str, Any]]
) -> Throughput | None:
    """Spread the frames of each video evenly over the time it was worked on, before its commit."""
    begins, restarts, offset_s = {}, [], 0.0
    for run in sorted(executions, key=lambda run: run["epoch"]):
        begins[run["epoch"]] = run["started_s"] - offset_s
        restarts.append(offset_s)
        offset_s += run["wall_s"]
    every = -(-last_seq // MAX_RECORDS) or 1
    spans = [
        (record.time_s - begins[record.epoch], video["wall_s"], video["frames_tracked"])
        for record in _commits(store, last_seq, every)
        if record.epoch in begins
        for video in (value["video"] for value in record.payload["videos"])
    ]
    if not spans or offset_s <= 0:
        return None
    ends, walls, frames = np.array(spans, np.float64).T
    walls = np.maximum(walls, 1e-3)
    edges = np.linspace(0, offset_s, NUM_TIME_BINS + 1)
    done = np.array(
        [float((frames * np.clip((at - ends + walls) / walls, 0, 1)).sum()) for at in edges]
    )
    rates = np.array([b - a for a, b in pairwise(done)]) / (edges[1] - edges[0]) * every
    return Throughput(edges, rates, tuple(restarts[1:]), 1 / every)


def _commits(store: Store, last_seq: int, every: int) -> Iterable[Record]:
    if every == 1:
        records: Iterable[Record] = iter_records(store, 1, last_seq)
    else:

        def read(seq: int) -> Record:
            (record,) = iter_records(store, seq, seq)
            return record

        records = map_bounded(read, range(1, last_seq + 1, every), LOG_THREADS)
    return (record for record in records if record.kind is Kind.COMMIT)


def top(counts: Mapping[str, int], limit: int = MAX_KINDS) -> list[tuple[str, int]]:
    """Return the largest counts, and one entry for all others.

    Examples
    --------
    >>> top({"a": 3, "b": 5, "c": 1, "d": 1}, limit=3)
    [('b', 5), ('a', 3), ('2 others', 2)]
    """
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    if len(ranked) <= limit:
        return ranked
    rest = ranked[limit - 1 :]
    return [*ranked[: limit - 1], (f"{len(rest):,} others", sum(number for _, number in rest))]
