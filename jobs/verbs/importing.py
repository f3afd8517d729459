"""The verb that takes masks of other tools in: import."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from jobs.flags import OUT_STORE, CommandLine, configured
from jobs.importing.formats import ImportFormat, PromptFrames
from jobs.verbs.app import app
from workers.errors import ConfigError

PANEL = "Use the masks"


@app.command("import", rich_help_panel=PANEL)
@configured(OUT_STORE)
def import_masks(
    command: CommandLine,
    src: Annotated[
        str,
        typer.Argument(metavar="SRC", help="What was exported: a file, a folder or a URL."),
    ],
    format_: Annotated[ImportFormat, typer.Option("--format", help="What SRC is.")],
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Write prompts for maskmill run --prompts: .jsonl or .parquet.",
        ),
    ] = None,
    gt: Annotated[
        str | None,
        typer.Option("--gt", metavar="DIR", help="Write ground truth for maskmill eval --gt."),
    ] = None,
    frames: Annotated[
        PromptFrames | None,
        typer.Option("--frames", help="Masks of an object that become prompts. Default: first."),
    ] = None,
    video: Annotated[
        str | None,
        typer.Option("--video", metavar="NAME", help="The video, where SRC is of one unnamed."),
    ] = None,
    first_frame: Annotated[
        int | None,
        typer.Option(
            "--first-frame",
            metavar="N",
            help="Number of the first frame in SRC. Default: 1 for mots, else 0.",
        ),
    ] = None,
    frame_step: Annotated[
        int | None,
        typer.Option(
            "--frame-step",
            metavar="N",
            min=1,
            help="Frames of the video from one number in SRC to the next. Default: 1; 4 in SA-V.",
        ),
    ] = None,
    keep_names: Annotated[
        bool,
        typer.Option("--keep-names", help="__ in the name of a sequence is no / of a path."),
    ] = False,
    categories: Annotated[
        list[str] | None,
        typer.Option("--category", metavar="NAME=ID", help="Name of a class of mots; repeatable."),
    ] = None,
    videos: Annotated[
        str | None,
        typer.Option("--videos", metavar="FILE", help="The ground truth of ytvis results."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Take masks of another tool, or of another run, as prompts or as ground truth."""
    from jobs.importing.importer import ImportSource, import_prompts, import_truth

    if (prompts is None) == (gt is None):
        raise ConfigError("say what SRC becomes: --prompts FILE or --gt DIR, one of the two")
    if frames is not None and gt is not None:
        raise ConfigError("--frames chooses prompts; ground truth takes every frame: leave it out")
    source = ImportSource(
        src,
        format_,
        video,
        first_frame,
        frame_step,
        keep_names,
        dict(_category(text) for text in categories or ()),
        videos,
        command.out_store().options(),
    )
    if gt is not None:
        report = import_truth(source, gt, overwrite=overwrite)
        written = f"ground truth in {gt}"
    else:
        assert prompts is not None
        report = import_prompts(
            source, prompts, frames=frames or PromptFrames.FIRST, overwrite=overwrite
        )
        written = f"{report.num_prompts:,} prompts in {prompts}"
    print(
        f"{report.num_masks:,} masks on {report.num_frames:,} frames of {report.num_videos:,} "
        f"videos are now {written}"
    )
    if report.num_unlinked:
        print(
            f"warning: {report.num_unlinked:,} masks have no track_id, so each became an object "
            f"of its own",
            file=sys.stderr,
        )


def _category(text: str) -> tuple[int, str]:
    name, _, number = text.rpartition("=")
    if not name or not number.isdigit():
        raise ConfigError(f"--category {text} is not NAME=ID, such as dog=3: correct it")
    return int(number), name
