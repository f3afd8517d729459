"""What people read when a run has ended: what became of the videos, where the time went, what next.

Plain text on standard output, so that it can be kept; colours only on a terminal.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TextIO

from jobs.progress import format_duration

if TYPE_CHECKING:
    from jobs.driver import RunSummary

MAX_EXAMPLES = 3
"""Quarantined videos named per reason; the table `quarantine` names all."""
BAR_WIDTH = 24
"""Characters of the longest bar."""


def write_summary(summary: RunSummary, command: str, stream: TextIO | None = None) -> None:
    """Print how a run ended.

    Parameters
    ----------
    summary : RunSummary
        What `jobs.driver.run` returned.
    command : str
        The command that was typed; an interrupted run is resumed by it.
    stream : TextIO, optional
        Standard output by default.
    """
    print("\n".join(summary_lines(summary, command)), file=stream or sys.stdout)


def summary_lines(summary: RunSummary, command: str) -> list[str]:
    """Return the summary of a run, line by line."""
    num_total = summary.num_committed + summary.num_quarantined + summary.num_skipped
    head = "stopped" if summary.interrupted else "finished"
    lines = ["", f"run {summary.run_id} {head} -> {summary.out_uri}", ""]
    lines.append(_fact("committed", f"{summary.num_committed:,} of {num_total:,} videos"))
    if summary.num_skipped:
        lines.append(_fact("skipped", f"{summary.num_skipped:,} settled before"))
    if summary.quarantined:
        lines.append(_fact("quarantined", f"{len(summary.quarantined):,}"))
    lines.append(_fact("tracked", f"{summary.num_frames:,} frames, {summary.num_masks:,} masks"))
    if summary.wall_s > 0 and summary.num_frames:
        speed = summary.num_frames / summary.wall_s
        lines.append(
            _fact("throughput", f"{speed:,.1f} frames/s over {format_duration(summary.wall_s)}")
        )
    lines += stage_lines(summary.stage_seconds)
    lines += quarantine_lines(summary.quarantined)
    lines += [f"warning: {text}" for text in summary.warnings]
    lines += ["", *next_steps(summary, command)]
    return lines


def stage_lines(stage_seconds: Mapping[str, float]) -> list[str]:
    """Return one bar per stage: busy seconds, summed over videos and threads.

    Examples
    --------
    >>> for line in stage_lines({"decode": 1.0, "track": 3.0}):
    ...     print(line)
    <BLANKLINE>
    where the time went (busy seconds over all workers; stages overlap)
      track          3.0 s   75 %  ████████████████████████
      decode         1.0 s   25 %  ████████
    """
    busy = {name: seconds for name, seconds in stage_seconds.items() if seconds > 0}
    if not busy:
        return []
    total, longest = sum(busy.values()), max(busy.values())
    lines = ["", "where the time went (busy seconds over all workers; stages overlap)"]
    for name, seconds in sorted(busy.items(), key=lambda item: -item[1]):
        bar = "█" * max(1, round(BAR_WIDTH * seconds / longest))
        share = f"{100 * seconds / total:.0f} %"
        lines.append(f"  {name:<12} {format_duration(seconds):>7} {share:>6}  {bar}")
    return lines


def quarantine_lines(quarantined: Iterable[tuple[str, str, str]]) -> list[str]:
    """Return the reasons of quarantine, the commonest first, each with its first videos."""
    by_kind: dict[str, list[tuple[str, str]]] = {}
    for name, kind, message in quarantined:
        by_kind.setdefault(str(kind), []).append((name, message))
    lines: list[str] = []
    for kind, videos in sorted(by_kind.items(), key=lambda item: -len(item[1])):
        lines += ["", f"quarantined, {kind.replace('_', ' ')}: {len(videos):,}"]
        for name, message in videos[:MAX_EXAMPLES]:
            # Most sentences name the video themselves.
            lines.append(f"  {message}" if name in message else f"  {name}: {message}")
        if len(videos) > MAX_EXAMPLES:
            lines.append(f"  and {len(videos) - MAX_EXAMPLES:,} more")
    return lines


def next_steps(summary: RunSummary, command: str) -> list[str]:
    """Return what to type next."""
    out = shlex.quote(summary.out_uri)
    if summary.interrupted:
        return ["The run can be resumed: type the same command again.", f"  {command}"]
    lines: list[str] = []
    if summary.quarantined:
        lines += [
            "Every reason is in the table quarantine; once the cause is mended:",
            f"  maskmill retry {out}",
        ]
    lines += ["Prove that the dataset is whole:", f"  maskmill verify {out}"]
    return lines


def _fact(label: str, value: str) -> str:
    return f"  {label:<12} {value}"
