"""What people read when a command has ended: above all, what became of the videos of a run.

Plain text on standard output, so that it can be kept; colours only on a terminal.
"""

from __future__ import annotations

import shlex
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from jobs.progress import format_duration

if TYPE_CHECKING:
    from jobs.doctor import Finding
    from jobs.driver import RunSummary

MAX_EXAMPLES = 10
"""Quarantined videos named per reason; `maskmill status` names all."""
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
    num_left = summary.num_committed + summary.num_quarantined + summary.num_unfinished
    num_total = num_left + summary.num_skipped
    head = "stopped" if summary.interrupted else "finished"
    lines = ["", f"run {summary.run_id} {head} -> {summary.out_uri}", ""]
    if summary.stopped_by:
        lines.append(fact("stopped", summary.stopped_by))
    if summary.num_skipped:
        skipped = f"{summary.num_skipped:,} of {num_total:,} videos, settled before"
        lines.append(fact("skipped", skipped))
    committed = f"{summary.num_committed:,} of {num_left:,} videos"
    if not num_left:
        committed = "nothing was left to do"
        if summary.quarantined:
            committed += f" but for {len(summary.quarantined):,} in quarantine (maskmill retry)"
    lines.append(fact("committed", committed))
    if summary.quarantined:
        lines.append(fact("quarantined", f"{len(summary.quarantined):,}"))
    lines.append(fact("tracked", f"{summary.num_frames:,} frames, {summary.num_masks:,} masks"))
    if summary.wall_s > 0 and summary.num_frames:
        speed = summary.num_frames / summary.wall_s
        lines.append(
            fact("throughput", f"{speed:,.1f} frames/s over {format_duration(summary.wall_s)}")
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


def quarantine_lines(
    quarantined: Iterable[tuple[str, str, str]], *, head: str = "quarantined"
) -> list[str]:
    """Return the reasons of quarantine, the commonest first, each with its first videos.

    Parameters
    ----------
    quarantined : iterable of (name, kind, message)
        Videos and their reasons.
    head : str
        What is said of them.

    Returns
    -------
    list of str
        Without line ends.
    """
    by_kind: dict[str, list[tuple[str, str]]] = {}
    for name, kind, message in quarantined:
        by_kind.setdefault(str(kind), []).append((name, message))
    lines: list[str] = []
    for kind, videos in sorted(by_kind.items(), key=lambda item: -len(item[1])):
        lines += ["", f"{head}, {kind.replace('_', ' ')}: {len(videos):,}"]
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
            "See every video in quarantine, with its reason:",
            f"  maskmill status {out}",
            "Try them again, once the cause is mended:",
            f"  maskmill retry {out}",
        ]
    num_settled_in_quarantine = len(summary.quarantined) - summary.num_quarantined
    if summary.num_committed + summary.num_skipped > num_settled_in_quarantine:
        lines += ["Prove that the dataset is whole:", f"  maskmill verify {out}"]
    return lines


def fact(label: str, value: str) -> str:
    """Return one line of a summary: what it is, and how much."""
    return f"  {label:<12} {value}"


def write_findings(findings: Sequence[Finding], stream: TextIO | None = None) -> None:
    """Print what `doctor` found.

    Parameters
    ----------
    findings : sequence of Finding
        In order.
    stream : TextIO, optional
        Standard output by default.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=stream)
    if not console.is_terminal:
        # Whole sentences on lines of their own, so that they can be searched.
        width = max((len(finding.subject) for finding in findings), default=0)
        for finding in findings:
            print(
                f"{finding.level.value:<4}  {finding.subject:<{width}}  {finding.message}",
                file=stream,
            )
        return
    table = Table.grid(padding=(0, 2))
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for finding in findings:
        level = finding.level.value
        table.add_row(Text(level, style=styles[level]), finding.subject, Text(finding.message))
    console.print(table)


def model_lines() -> list[str]:
    """Return the trackers and detectors, line by line."""
    from workers.prompts.detector import DETECTORS
    from workers.trackers.registry import TRACKERS

    lines = ["trackers (--tracker NAME)"]
    for info in TRACKERS:
        sizes = f"; sizes {', '.join(f':{size}' for size in info.sizes)}" if info.sizes else ""
        needs = f"--checkpoint {info.weights}" if info.weights else "no weights"
        if info.hub_id:
            needs += f", which is {info.hub_id} on the hub"
        lines.append(f"  {info.name}")
        lines += _wrapped(f"{info.description} Needs {needs}{sizes}. Licence {info.licence}.")
    lines += [
        "",
        "maskmill models pull NAME --to URI copies weights for a cluster without internet",
    ]
    lines += ["", "detectors (--detector NAME --detector-checkpoint NAME.pt)"]
    by_licence: dict[str, list[str]] = {}
    for name, licence in DETECTORS.items():
        by_licence.setdefault(licence, []).append(name)
    for licence, names in by_licence.items():
        lines += _wrapped(f"{', '.join(names)}. Licence {licence}.")
    return lines


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 88, initial_indent="      ", subsequent_indent="      ")
