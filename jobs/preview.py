"""`maskmill plan`: what a run would do, found without writing anything anywhere.

Headers of some videos are read, so that frames and hours are more than guesses from file sizes
and so that a video nobody can read is found before a cluster is paid for. A large corpus is
sampled evenly; the rest is estimated from what the sample tells of frames per byte.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, TextIO

import numpy as np
from numpy.typing import NDArray

from jobs.effort import Effort, estimate
from jobs.isolation import CallLostError, Isolated
from jobs.planner import Plan, make_plan, read_inputs
from jobs.probe import ProbeRow, probe_video
from jobs.progress import format_duration
from jobs.report import fact, quarantine_lines
from jobs.settings import to_toml
from jobs.startup import weights_sha256
from workers.errors import InputError

if TYPE_CHECKING:
    from jobs.commit_log import LogState
    from jobs.config import RunConfig
    from jobs.corpus import Corpus
    from workers.messages import StoreOptions, VideoSource

MAX_PROBES = 256
"""Videos whose headers are read; a header costs a few ranged reads."""
PROBE_CHILDREN = 4
"""Processes that read headers; each waits for a store more than for a core."""
PROBE_TIMEOUT_S = 60.0
"""A header that takes longer is given up."""


@dataclass(frozen=True, slots=True)
class Preview:
    """What a run would do.

    Attributes
    ----------
    plan : Plan
        What is left, with frames from headers where they were read.
    probed : Mapping of int to ProbeRow
        By corpus row.
    hours : float or None
        Length of the videos that are left, in hours; None when no header tells.
    """

    plan: Plan
    probed: Mapping[int, ProbeRow]
    hours: float | None


class SampledCounts:
    """Frames per video: from a header where one was read, else by the sample's frames per byte.

    Parameters
    ----------
    corpus : Corpus
        The videos.
    probed : Mapping of int to ProbeRow
        By corpus row.
    """

    def __init__(self, corpus: Corpus, probed: Mapping[int, ProbeRow]) -> None:
        self._frames = np.full(len(corpus), -1, np.int64)
        sizes = corpus.table["size_bytes"].fill_null(0).to_numpy()
        for row, probe in probed.items():
            self._frames[row] = probe.num_frames or -1
        known = (self._frames > 0) & (sizes > 0)
        if known.any():
            per_byte = self._frames[known].sum() / sizes[known].sum()
            other = (self._frames < 0) & (sizes > 0)
            self._frames[other] = np.maximum(1, sizes[other] * per_byte)
        self._corpus = corpus

    def num_frames(self, keys: NDArray[np.int64], etags: Sequence[str | None]) -> NDArray[np.int64]:
        """Return the number of frames per row of the corpus, -1 where it is not known."""
        assert len(keys) == len(self._frames), "asked for the corpus it was made for"
        return self._frames


def make_preview(config: RunConfig, *, max_probes: int = MAX_PROBES) -> Preview:
    """Find out what a run would do.

    Parameters
    ----------
    config : RunConfig
        The run; with an empty output nothing counts as done.
    max_probes : int
        Read at most this many headers.

    Returns
    -------
    Preview
        What is left.

    Raises
    ------
    ConfigError
        The corpus or the prompts are unreadable as a whole, or the output holds another
        configuration.
    StoreError
        A store refused or did not answer.
    """
    state = _log_state(config)
    inputs = read_inputs(config)
    left = make_plan(config, inputs, state).order
    picked = np.unique(np.linspace(0, len(left) - 1, min(len(left), max_probes)).astype(int))
    rows = [int(left[at]) for at in picked] if len(left) else []
    options = config.corpus.store.options()
    sources = [inputs.corpus.source(row) for row in rows]
    probed = dict(zip(rows, probe_all(sources, options), strict=True))
    plan = make_plan(config, inputs, state, SampledCounts(inputs.corpus, probed))
    told = [p for p in probed.values() if p.duration_us and p.num_frames]
    hours = None
    if told:
        num_told = sum(p.num_frames or 0 for p in told)
        seconds_per_frame = sum(p.duration_us or 0 for p in told) / num_told / 1e6
        # Strides leave frames out, not time.
        stride = np.maximum(1, plan.corpus.table["stride"].to_numpy())
        rows_left = readable_rows(Preview(plan, probed, None))
        num_frames = float((plan.num_frames * stride)[rows_left].sum())
        hours = num_frames * seconds_per_frame / 3600
    return Preview(plan, probed, hours)


def probe_all(sources: Sequence[VideoSource], options: StoreOptions) -> list[ProbeRow]:
    """Read the headers of some videos, in child processes: a broken file may crash a decoder.

    Parameters
    ----------
    sources : sequence of VideoSource
        The videos.
    options : StoreOptions
        How to reach them.

    Returns
    -------
    list of ProbeRow
        In the order of the sources.

    Raises
    ------
    StoreError
        The store refused or did not answer.
    """
    children = [
        Isolated(probe_video, timeout_s=PROBE_TIMEOUT_S)
        for _ in range(min(len(sources), PROBE_CHILDREN))
    ]
    free: SimpleQueue[Isolated[ProbeRow]] = SimpleQueue()
    for child in children:
        free.put(child)

    def probe(source: VideoSource) -> ProbeRow:
        child = free.get()
        try:
            return child(source, options)
        except CallLostError as error:
            return ProbeRow(readable=False, reason=f"the header of {source.name} is fatal: {error}")
        finally:
            free.put(child)

    try:
        with ThreadPoolExecutor(max(1, len(children))) as pool:
            return list(pool.map(probe, sources))
    finally:
        for child in children:
            child.close()


def readable_rows(preview: Preview) -> NDArray[np.int64]:
    """Return the corpus rows that are left, but for those whose header says that they fail."""
    unreadable = [row for row, probe in preview.probed.items() if not probe.readable]
    return np.setdiff1d(preview.plan.order, np.array(unreadable, np.int64))


def preview_lines(
    config: RunConfig,
    preview: Preview,
    *,
    fps: float,
    basis: str = "",
    price: float | None = None,
) -> list[str]:
    """Return what a run would do, line by line.

    Parameters
    ----------
    config : RunConfig
        The run.
    preview : Preview
        What was found.
    fps : float
        Frames per second of one worker, assumed or stated.
    basis : str
        What `fps` rests on where it is assumed; empty where it was stated.
    price : float, optional
        Price of a worker-hour, in whatever currency.

    Returns
    -------
    list of str
        Without line ends.
    """
    plan = preview.plan
    names = {row: plan.corpus.source(row).name for row in preview.probed}
    unreadable = [
        (names[row], "input", probe.reason or "it cannot be read")
        for row, probe in preview.probed.items()
        if not probe.readable
    ]
    invalid = [(task.name, "input", task.message) for task in plan.invalid]
    readable = readable_rows(preview)
    lines = ["", fact("videos", f"{plan.num_videos:,}, {len(readable):,} to track")]
    if plan.num_settled:
        lines.append(
            fact(
                "settled",
                f"{plan.num_committed:,} committed, {plan.num_quarantined:,} in quarantine",
            )
        )
    if plan.num_changed:
        lines.append(
            fact("changed", f"{plan.num_changed:,} of those to track replace committed rows")
        )
    num_frames = int(plan.num_frames[readable].sum())
    lines.append(fact("frames", f"about {num_frames:,} to track"))
    if preview.hours is not None:
        lines.append(fact("length", f"about {_hours(preview.hours)} of video"))
    worker_hours = num_frames / fps / 3600
    lines.append(
        fact("work", f"about {_hours(worker_hours)} of one worker at {fps:.3g} frames/s (--fps)")
    )
    if basis:
        lines.append(fact("assumed", basis))
    if price is not None:
        cost = worker_hours * price
        lines.append(fact("cost", f"about {cost:,.2f} at {price:g} per worker-hour"))
    else:
        lines.append(fact("cost", "give --price, the price of a worker-hour"))
    lines.append(
        fact("headers", f"{len(preview.probed):,} read, {len(unreadable):,} of them unreadable")
    )
    lines += quarantine_lines([*invalid, *unreadable], head="would be quarantined")
    warnings = (*plan.corpus.warnings, *plan.prompts.warnings)
    lines += [f"warning: {text}" for text in warnings]
    lines += ["", "configuration", "", to_toml(config)]
    return lines


def write_preview(
    config: RunConfig,
    *,
    fps: float | None = None,
    num_objects: float | None = None,
    price: float | None = None,
    stream: TextIO | None = None,
) -> None:
    """Print what a run would do, and the configuration it would have.

    Parameters
    ----------
    config : RunConfig
        The run.
    fps : float, optional
        Frames per second of one worker; by default what `jobs.effort.estimate` expects.
    num_objects : float, optional
        Objects in a video, on average; by default those of the prompts, where they tell.
    price : float, optional
        Price of a worker-hour.
    stream : TextIO, optional
        Standard output by default.

    Raises
    ------
    ConfigError
        As `make_preview`.
    StoreError
        As `make_preview`.
    """
    preview = make_preview(config)
    effort = Effort(fps, "") if fps is not None else _estimate(config, preview, num_objects)
    lines = preview_lines(config, preview, fps=effort.fps, basis=effort.basis, price=price)
    print("\n".join(lines), file=stream or sys.stdout)


def prompted_objects(preview: Preview) -> float | None:
    """Return the objects of a video, on average over those whose headers were read.

    None where prompts do not tell before the videos are opened: pictures and detectors.
    """
    prompts = preview.plan.prompts
    counts = []
    for row in preview.probed:
        try:
            given, _ = prompts.prompts_for(row, dict.fromkeys(prompts.labels, 0))
        except InputError:
            continue  # a fault of this video, which the run tells
        if given:
            counts.append(len({prompt.object_id for prompt in given}))
    return sum(counts) / len(counts) if counts else None


def _estimate(config: RunConfig, preview: Preview, num_objects: float | None) -> Effort:
    return estimate(config, num_objects or prompted_objects(preview))


def _log_state(config: RunConfig) -> LogState | None:
    """Return what the output's log says, if any; refuse weights and settings as a run would."""
    detector = config.prompts.detector
    settings = config.mask_settings(
        tracker_sha256=weights_sha256(config, config.tracker.checkpoint),
        detector_sha256=weights_sha256(config, detector.checkpoint if detector else None),
    )
    if not config.out.uri:
        return None
    from jobs.commit_log import read_state
    from workers.storage import open_store

    state = read_state(open_store(config.out.uri, config.out.store.options()))
    state.check_settings(settings)
    return state


def _hours(hours: float) -> str:
    """Return hours as such where they are some, else as a duration."""
    return f"{hours:,.1f} hours" if hours >= 1 else format_duration(3600 * hours)
