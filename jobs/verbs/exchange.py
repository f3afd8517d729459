"""Verbs that take masks elsewhere: export."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Literal

import typer

from jobs.flags import OUT_STORE, CommandLine, configured
from jobs.verbs.app import OutArgument, app

PANEL = "Use the masks"
TOLD_EVERY_S = 10.0
INTERRUPTED = 130


@app.command(rich_help_panel=PANEL)
@configured(OUT_STORE)
def export(
    command: CommandLine,
    out: OutArgument,
    dest: Annotated[
        str,
        typer.Argument(
            metavar="DEST",
            help="File (coco, ytvis) or folder (davis, mots, sav) to write, or its URL.",
            show_default=False,
        ),
    ],
    format: Annotated[
        Literal["coco", "ytvis", "davis", "mots", "sav"],
        typer.Option(
            "--format", help="What to write; docs/formats.md says how.", show_default=False
        ),
    ],
    video: Annotated[
        list[str] | None,
        typer.Option(
            "--video",
            "--videos",
            metavar="NAME",
            help="Only this video, by name, URL or key; may be repeated.",
        ),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where",
            metavar="SQL",
            help="Only masks for which this holds, over the columns of masks, objects, videos and "
            "category; over those of videos alone it chooses whole videos. May be repeated.",
        ),
    ] = None,
    min_score: Annotated[
        float | None,
        typer.Option("--min-score", help="Only masks with this score or more, 0 to 1."),
    ] = None,
    fps: Annotated[
        float | None, typer.Option("--fps", metavar="N", help="At most N frames a second.")
    ] = None,
    category: Annotated[
        list[str] | None,
        typer.Option(
            "--category",
            metavar="NAME=ID",
            help="coco, ytvis, mots: the number of a class; may be repeated.",
        ),
    ] = None,
    uncompressed: Annotated[
        bool, typer.Option("--uncompressed", help="coco: counts as lists of run lengths.")
    ] = False,
    results: Annotated[
        bool, typer.Option("--results", help="ytvis, mots: as predictions for an evaluation.")
    ] = False,
    z_order: Annotated[
        str | None,
        typer.Option(
            "--z-order", metavar="ID,ID,...", help="davis: object ids from front to back."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an export that is there.")
    ] = False,
) -> None:
    """Write the masks as other tools expect them. Interrupted, the same command goes on."""
    from jobs.dataset import open_dataset
    from jobs.export.exporter import ExportOptions, Format, export_dataset
    from jobs.export.naming import parse_classes
    from jobs.export.selection import Selection
    from jobs.export.tally import Tally

    store_options = command.out_store().options()
    dataset = open_dataset(out, store_options)
    if dataset.state is not None and dataset.state.is_live:
        waiting = len(dataset.state.unpublished)
        more = f"; {waiting:,} committed videos are not readable yet" if waiting else ""
        print(f"the run in {out} has not ended: what is readable now is exported{more}")
    told_s = time.monotonic()

    def tell(tally: Tally) -> None:
        nonlocal told_s
        if time.monotonic() - told_s > TOLD_EVERY_S:
            told_s = time.monotonic()
            print(f"{tally.num_videos:,} videos, {tally.num_masks:,} masks", file=sys.stderr)

    try:
        tally = export_dataset(
            dataset,
            Format(format),
            dest,
            Selection(tuple(video or ()), tuple(where or ()), min_score, fps),
            ExportOptions(
                uncompressed, results, _ids(z_order), parse_classes(category or ()), overwrite
            ),
            store_options=store_options,
            on_video=tell,
        )
    except KeyboardInterrupt:
        print("interrupted; the same command again takes up the work", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    for note in tally.notes():
        print(note)
    for refusal in tally.refusals():
        print(f"problem: {refusal}", file=sys.stderr)
    earlier = f" ({tally.num_continued:,} of them before)" if tally.num_continued else ""
    print(
        f"{tally.num_videos:,} videos{earlier}, {tally.num_frames:,} frames and "
        f"{tally.num_masks:,} masks in {dest}"
    )
    raise typer.Exit(tally.exit_code)


def _ids(text: str | None) -> tuple[int, ...]:
    from workers.errors import ConfigError

    words = [word.strip() for word in (text or "").split(",") if word.strip()]
    if not all(word.isdecimal() for word in words):
        raise ConfigError(f"--z-order {text!r} is no list of object ids such as 3,1,2")
    return tuple(map(int, words))
