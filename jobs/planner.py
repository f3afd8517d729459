"""What there is to do: the corpus, its prompts and the log, joined into an ordered list of tasks.

Everything is columnar: a million videos are a few arrays, and a `VideoTask` object exists only
while its video is under way. The join with the log compares, per video key, the identity of the
input (etag, range, stride, prompts): equal means done, different means new work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from jobs.commit_log import LogState, TaskState, input_identity
from jobs.config import RunConfig
from jobs.corpus import Corpus, list_corpus
from jobs.prompts import RunPrompts
from workers.messages import VideoSource

BYTES_PER_FRAME = 12_000
"""Compressed bytes per frame of ordinary 720p video: how an unprobed video's length is guessed."""


class FrameCounts(Protocol):
    """Where the planner learns how long videos are; the probe cache is one."""

    def num_frames(self, keys: NDArray[np.int64], etags: Sequence[str | None]) -> NDArray[np.int64]:
        """Return the number of frames per video, -1 where it is not known."""


@dataclass(frozen=True, slots=True)
class InvalidTask:
    """A video that is known beforehand to be unusable: quarantined without an attempt.

    Attributes
    ----------
    video_key, identity : int
        As in the log.
    uri, name, message : str
        Which video, and why, in one sentence.
    """

    video_key: int
    identity: int
    uri: str
    name: str
    message: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run has to do.

    Attributes
    ----------
    corpus : Corpus
        All videos asked for.
    prompts : RunPrompts
        Their prompts.
    order : ndarray of int64, shape (N,)
        Corpus rows still to be tracked, longest first.
    invalid : tuple of InvalidTask
        Videos known to be unusable.
    num_committed, num_quarantined : int
        Videos of the corpus that the log already settled.
    num_changed : int
        Videos left that are committed with another source, stride or prompts: what is
        tracked now replaces their rows.
    num_frames : ndarray of int64, shape (videos,)
        Frames per corpus row, guessed from the size where unknown.
    """

    corpus: Corpus
    prompts: RunPrompts
    order: NDArray[np.int64]
    invalid: tuple[InvalidTask, ...]
    num_committed: int
    num_quarantined: int
    num_changed: int
    num_frames: NDArray[np.int64]

    @property
    def num_settled(self) -> int:
        """Videos that need nothing more: committed or in quarantine already."""
        return self.num_committed + self.num_quarantined

    @property
    def num_videos(self) -> int:
        """Videos settled, left and invalid."""
        return self.num_settled + len(self.order) + len(self.invalid)

    def sources(self, rows: NDArray[np.int64]) -> Iterator[VideoSource]:
        """Yield the sources of some corpus rows, one at a time."""
        return (self.corpus.source(int(row)) for row in rows)

    @property
    def num_frames_left(self) -> int:
        """Frames still to be tracked."""
        return int(self.num_frames[self.order].sum())

    def identity(self, row: int) -> int:
        """Return the identity of one row's input, as it is stored in the log."""
        return row_identity(self.corpus.source(row), self.prompts.digest(row))


def row_identity(source: VideoSource, prompts_digest: str) -> int:
    """Return the identity of one input: what must be equal for a video to count as done."""
    return input_identity(
        source.etag,
        source.size_bytes,
        source.start_us,
        source.end_us,
        source.stride,
        prompts_digest,
    )


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run reads: the corpus, and the prompts for it.

    Attributes
    ----------
    corpus : Corpus
        All videos asked for.
    prompts : RunPrompts
        Their prompts.
    """

    corpus: Corpus
    prompts: RunPrompts


def read_inputs(config: RunConfig) -> Inputs:
    """List the corpus and read the prompts.

    Raises
    ------
    ConfigError
        The corpus or the prompts are unreadable as a whole, or match nothing.
    StoreError
        A store refused or did not answer.
    """
    corpus = list_corpus(config.corpus)
    return Inputs(corpus, RunPrompts(config, corpus))


def make_plan(
    config: RunConfig,
    inputs: Inputs,
    state: LogState | None = None,
    counts: FrameCounts | None = None,
    *,
    only: NDArray[np.int64] | None = None,
) -> Plan:
    """Decide what is left to do; reads and writes nothing.

    Parameters
    ----------
    config : RunConfig
        The run.
    inputs : Inputs
        What `read_inputs` found.
    state : LogState, optional
        What the output's log says; None plans a run from nothing.
    counts : FrameCounts, optional
        Known numbers of frames; sizes are used without.
    only : ndarray of int64, optional
        Plan these video keys alone.

    Returns
    -------
    Plan
        Tasks in the order they should start.
    """
    corpus, prompts = inputs.corpus, inputs.prompts
    keys = corpus.keys
    settled = np.zeros(len(corpus), bool)
    changed = np.zeros(len(corpus), bool)
    num_committed = num_quarantined = 0
    if state is not None and len(corpus):
        known, states = state.lookup(keys)
        seen = np.flatnonzero(states != TaskState.UNKNOWN)
        same = seen[known[seen] == _identities(corpus, prompts, seen)]
        committed = same[states[same] == TaskState.COMMITTED]
        quarantined = same[states[same] == TaskState.QUARANTINED]
        num_committed, num_quarantined = len(committed), len(quarantined)
        settled[committed] = settled[quarantined] = True
        changed = (states == TaskState.COMMITTED) & ~settled
    if only is not None:
        settled |= ~np.isin(keys, only)
    faults = _faults(corpus, prompts, config, settled)
    settled[list(faults)] = True
    invalid = [
        InvalidTask(
            source.video_key,
            row_identity(source, prompts.digest(row)),
            source.uri,
            source.name,
            message,
        )
        for row, message in faults.items()
        for source in (corpus.source(row),)
    ]
    num_frames = _frame_counts(corpus, counts)
    left = np.flatnonzero(~settled)
    order = left[np.argsort(-num_frames[left], kind="stable")]
    return Plan(
        corpus,
        prompts,
        order,
        tuple(invalid),
        num_committed,
        num_quarantined,
        int(np.count_nonzero(changed[left])),
        num_frames,
    )


def _identities(corpus: Corpus, prompts: RunPrompts, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the identities of some rows without building a value object for each."""
    picked = corpus.table.take(rows)
    columns = [
        picked[name].to_pylist() for name in ("etag", "size_bytes", "start_us", "end_us", "stride")
    ]
    if prompts.is_per_video:
        digests = [prompts.digest(row) for row in rows.tolist()]
    else:
        digests = [""] * len(rows)
    return np.fromiter(
        (input_identity(*values) for values in zip(*columns, digests, strict=True)),
        np.int64,
        len(rows),
    )


def _faults(
    corpus: Corpus, prompts: RunPrompts, config: RunConfig, settled: NDArray[np.bool_]
) -> dict[int, str]:
    """Return the rows that cannot be tracked as they are, each with its reason."""
    import pyarrow.compute as pc

    faults = {row: reason for row, reason in corpus.faults.items() if not settled[row]}
    # Known from the listing: longest first would line all of them up at the end of a run, where so
    # many alike failures in a row look like an outage.
    empty = pc.and_(pc.equal(corpus.table["kind"], "file"), pc.equal(corpus.table["size_bytes"], 0))
    for row in np.flatnonzero(pc.fill_null(empty, False).to_numpy() & ~settled).tolist():
        name = corpus.source(row).name
        faults[row] = f"{name} is empty (0 bytes): upload it again or remove it from the corpus"
    if prompts.is_per_video:
        where = config.prompts.file or config.prompts.dir or "the manifest"
        for row in np.flatnonzero(~settled).tolist():
            if row in faults:
                continue
            ambiguous = prompts.fault(row)
            if ambiguous is not None:
                faults[row] = ambiguous
            elif not prompts.digest(row) and not config.prompts.allow_unprompted:
                faults[row] = (
                    f"{corpus.source(row).name} has no prompt in {where}: add one, or pass "
                    f"--allow-unprompted to commit it without objects"
                )
    return faults


def _frame_counts(corpus: Corpus, counts: FrameCounts | None) -> NDArray[np.int64]:
    """Return the tracked frames per row, guessed from sizes where they are not known."""
    table = corpus.table
    frames = np.full(len(corpus), -1, np.int64)
    if counts is not None and len(corpus):
        frames = counts.num_frames(corpus.keys, table["etag"].to_pylist())
    sizes = table["size_bytes"].fill_null(0).to_numpy().astype(np.int64)
    frames = np.where(frames < 0, np.maximum(1, sizes // BYTES_PER_FRAME), frames)
    stride = table["stride"].to_numpy().astype(np.int64)
    tracked: NDArray[np.int64] = np.maximum(1, frames // np.maximum(1, stride))
    return tracked
