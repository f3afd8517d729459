"""Verbs that concern this machine and this installation: doctor, models, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.flags import OUT_STORE, CommandLine, configured
from jobs.verbs.app import app

PANEL = "This machine"


@app.command(rich_help_panel=PANEL)
@configured(OUT_STORE)
def doctor(
    command: CommandLine,
    uris: Annotated[
        list[str] | None,
        typer.Argument(metavar="URI", help="Folders or buckets to probe for what they support."),
    ] = None,
) -> None:
    """Check this machine: versions, GPUs, decoders; and what a bucket really supports."""
    from jobs.doctor import diagnose, exit_code
    from jobs.report import write_findings

    findings = diagnose(uris or (), command.out_store().options())
    write_findings(findings)
    raise typer.Exit(exit_code(findings))


@app.command(rich_help_panel=PANEL)
def models() -> None:
    """List the trackers and detectors, the weights they need and their licences."""
    from jobs.report import model_lines

    print("\n".join(model_lines()))


@app.command(rich_help_panel=PANEL)
def demo(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where everything goes.")
    ] = Path("maskmill-demo"),
) -> None:
    """Render a clip with known masks, track it, picture it and score it. Downloads nothing."""
    from jobs.demo import run_demo

    raise typer.Exit(run_demo(out))
