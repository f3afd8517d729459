"""Verbs that say how good masks are: eval."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.flags import STORES, CommandLine, configured
from jobs.verbs.app import OutArgument, Overwrite, app, open_out
from workers.errors import ConfigError

if TYPE_CHECKING:
    from jobs.dataset import Dataset, Video
    from jobs.evaluation.runs import Evaluation
    from jobs.evaluation.scoring import Match
    from jobs.ground_truth import GroundTruth
    from workers.storage import Store

PANEL = "Look at a dataset"
EXIT_INCOMPLETE = 1
MAX_THREADS = 8
"""More do not help: part of the work is Python's own, which one thread at a time can do."""


@app.command(name="eval", rich_help_panel=PANEL)
@configured(STORES)
def evaluate(
    command: CommandLine,
    out: OutArgument,
    gt: Annotated[
        str | None,
        typer.Option(
            "--gt",
            metavar="DIR",
            help="Ground truth, as --prompts-dir takes pictures: DIR/VIDEO/FRAME.png with object "
            "ids. docs/evaluation.md has the other forms. Without it only what needs no truth is "
            "measured.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", metavar="OTHER", help="Another dataset to compare with, object by object."
        ),
    ] = None,
    match: Annotated[
        str,
        typer.Option(
            "--match",
            metavar="id|iou",
            help="Which object of the run stands for which of the truth: the one with its id, or "
            "one to one by overlap, where a detector gave the ids.",
        ),
    ] = "id",
    video: Annotated[
        list[str] | None,
        typer.Option(
            "--video", "--videos", metavar="NAME", help="Only this video; may be repeated."
        ),
    ] = None,
    all_frames: Annotated[
        bool,
        typer.Option("--all-frames", help="Count the first and the last frame for J and F, too."),
    ] = False,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write all measures here.")
    ] = None,
    csv_file: Annotated[
        str | None,
        typer.Option("--csv", metavar="FILE", help="Write a row per object and sequence here."),
    ] = None,
    overwrite: Overwrite = False,
    top: Annotated[
        int, typer.Option("--top", metavar="N", min=0, help="How many objects to look at first.")
    ] = 10,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", min=1, help="Videos at a time.", show_default="one per CPU, at most 8"
        ),
    ] = None,
    no_save: Annotated[
        bool, typer.Option("--no-save", help="Do not keep the measures in OUT/_evaluation.")
    ] = False,
) -> None:
    """Measure masks: J&F, HOTA and boxes against ground truth, and quality without any."""
    from jobs.dataset import Dataset
    from jobs.evaluation import tables
    from jobs.evaluation.runs import compare
    from jobs.ground_truth import GroundTruth

    chosen = _match(match)
    for flag, value in (("--against", against), ("--json", json_file), ("--csv", csv_file)):
        if value is not None and gt is None:
            raise ConfigError(f"{flag} needs the ground truth to measure by: give --gt DIR")
    for path in (json_file, csv_file):
        if path is not None:
            _refuse_existing(path, overwrite, command)
    store = open_out(out, command)
    dataset = Dataset(store)
    _tell_state(dataset, out)
    wanted = [dataset.video(name) for name in dict.fromkeys(video)] if video else None
    exit_code = 0
    if gt is not None:
        truth = GroundTruth(open_out(gt, command))
        num_threads = threads or min(os.cpu_count() or 1, MAX_THREADS)

        def measured(run: Dataset, videos: Sequence[Video] | None) -> Evaluation:
            return _measure(run, truth, command, chosen, all_frames, videos, num_threads)

        evaluation = measured(dataset, wanted)
        comparison = None
        if against is not None:
            other = Dataset(open_out(against, command))
            _tell_state(other, against)
            same = None if wanted is None else [other.video(found.name) for found in wanted]
            comparison = compare(evaluation, measured(other, same))
        for line in tables.evaluation_lines(evaluation):
            print(line)
        if comparison is not None:
            print()
            for line in tables.comparison_lines(evaluation, comparison):
                print(line)
        for note in evaluation.notes:
            print(f"note: {note}")
        faults = list(evaluation.faults)
        if comparison is not None:
            faults += [f"{against}: {fault}" for fault in comparison.other.faults]
        for fault in faults:
            print(f"problem: {fault}", file=sys.stderr)
        if faults:
            exit_code = EXIT_INCOMPLETE
        if json_file is not None:
            _write(json_file, tables.to_json(evaluation, comparison), command)
        if csv_file is not None:
            _write(csv_file, tables.to_csv(evaluation), command)
        if not no_save:
            tables.save_scores(store, evaluation, comparison)
        print()
    _look(dataset, wanted, None if no_save else store, top)
    raise typer.Exit(exit_code)


def _measure(
    dataset: Dataset,
    truth: GroundTruth,
    command: CommandLine,
    match: Match,
    all_frames: bool,
    wanted: Sequence[Video] | None,
    num_threads: int,
) -> Evaluation:
    """Measure one run, with a bar on a terminal."""
    from jobs.evaluation.runs import evaluate_run
    from jobs.verbs.looking import corpus_options, progress_bar

    with progress_bar("measuring", len(truth.sequences)) as tell:
        return evaluate_run(
            dataset,
            truth,
            match=match,
            skip_ends=not all_frames,
            wanted=wanted,
            num_threads=num_threads,
            corpus_options=corpus_options(dataset, command),
            on_sequence=lambda done, total: tell(done),
        )


def _look(
    dataset: Dataset, wanted: Sequence[Video] | None, store: Store | None, limit: int
) -> None:
    """Measure what needs no ground truth, print it, and keep it in `store`."""
    import numpy as np

    from jobs.evaluation import tables
    from jobs.quality import QUALITY_KEY, REVIEW_KEY, Measuring, measure_run

    keys = None
    if wanted is not None:
        keys = np.array(sorted({found.video_key for found in wanted}), np.int64)
    with Measuring() as measuring:
        measure_run(dataset, measuring, keys)
        for line in tables.quality_lines(measuring.summary(), measuring.review(), limit):
            print(line)
        # Measures of a part would look like those of the run to who reads them later.
        if store is not None and wanted is None:
            measuring.save(store)
            print()
            print(f"kept in {store.uri_of(QUALITY_KEY)} and {store.uri_of(REVIEW_KEY)}")


def _tell_state(dataset: Dataset, out: str) -> None:
    """Say when a run has not ended, and refuse one without any video."""
    if next(dataset.videos(), None) is None:
        raise ConfigError(
            f"{out} has no readable video yet: wait until maskmill status shows committed videos"
        )
    if dataset.state is not None and dataset.state.is_live:
        print(f"the run in {out} has not ended: what is readable now is measured")


def _match(text: str) -> Match:
    from jobs.evaluation.scoring import Match

    try:
        return Match(text)
    except ValueError:
        raise ConfigError(f"--match is id or iou, not {text!r}") from None


def _refuse_existing(path: str, overwrite: bool, command: CommandLine) -> None:
    """Refuse a folder, and a file that exists unless it may be replaced; measuring takes long."""
    from workers.storage import split_uri

    if "://" not in path and Path(path).is_dir():
        raise ConfigError(f"{path} is a folder: give the name of a file")
    root, key = split_uri(path)
    if not overwrite and open_out(root, command).stat(key) is not None:
        raise ConfigError(f"{path} exists: give another name, or --overwrite")


def _write(path: str, data: bytes, command: CommandLine) -> None:
    """Write a file whole or not at all; a path, or a URL that is reached as OUT is."""
    from workers.storage import split_uri

    root, key = split_uri(path)
    open_out(root, command).write_bytes(key, data)
