"""Verbs that keep a dataset sound and small: verify, gc, compact."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from jobs.flags import OUT_STORE, CommandLine, configured
from jobs.verbs.app import OutArgument, app, open_out

TakeOver = Annotated[
    bool,
    typer.Option("--take-over", help="Do it although the log says that a driver is at work."),
]

PANEL = "Keep a dataset"


@app.command(rich_help_panel=PANEL)
@configured(OUT_STORE)
def verify(
    command: CommandLine,
    out: OutArgument,
    deep: Annotated[
        bool, typer.Option("--deep", help="Decode every mask and replay the whole log, too.")
    ] = False,
) -> None:
    """Prove that every committed video is in the dataset once, readable, its hashes right."""
    from jobs.maintenance import verify as verify_dataset

    report = verify_dataset(open_out(out, command), deep=deep)
    for note in report.notes:
        print(note)
    for problem in report.problems:
        print(f"problem: {problem}", file=sys.stderr)
    if report.num_uncounted:
        print(
            f"{report.num_uncounted:,} videos cannot be counted, because of the problems of their "
            f"files; the others:"
        )
    print(
        f"{report.num_videos:,} videos, {report.num_frames:,} frames and {report.num_masks:,} "
        f"masks in {report.num_files:,} files; {report.num_records:,} log records: "
        + ("the dataset is whole" if not report.problems else "the dataset is NOT whole")
    )
    raise typer.Exit(report.exit_code)


@app.command(rich_help_panel=PANEL)
@configured(OUT_STORE)
def gc(command: CommandLine, out: OutArgument, take_over: TakeOver = False) -> None:
    """Delete what no commit names: parts of dead attempts, parts already in the dataset."""
    from jobs.maintenance import gc as collect_garbage
    from jobs.startup import owner_name

    report = collect_garbage(open_out(out, command), owner_name(), take_over=take_over)
    print(
        f"deleted {report.num_parts:,} parts, {report.num_work_files:,} unfinished files and "
        f"{report.num_snapshots:,} old snapshots, {report.size_bytes / 1e6:,.1f} MB"
    )


@app.command(rich_help_panel=PANEL)
@configured(OUT_STORE)
def compact(command: CommandLine, out: OutArgument, take_over: TakeOver = False) -> None:
    """Merge the dataset into fewer, larger, sorted files."""
    from jobs.maintenance import compact as compact_dataset
    from jobs.startup import owner_name

    made = compact_dataset(open_out(out, command), owner_name(), take_over=take_over)
    print(f"made {made:,} segments" if made else "nothing to merge")
