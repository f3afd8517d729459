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


models_app = typer.Typer()
app.add_typer(models_app, name="models", rich_help_panel=PANEL)


@models_app.callback(invoke_without_command=True)
def models(context: typer.Context) -> None:
    """List the trackers and detectors, the weights they need and their licences; copy weights."""
    if context.invoked_subcommand is not None:
        return
    from jobs.report import model_lines

    print("\n".join(model_lines()))


@models_app.command()
@configured(OUT_STORE)
def pull(
    command: CommandLine,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A tracker with its size (sam2:tiny), an id of the hub, a URL or a path.",
            show_default=False,
        ),
    ],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="URI",
            help="Folder or bucket to copy them to. Default: only this machine's cache.",
        ),
    ] = None,
    tracker: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="TRACKER",
            help="Which tracker they are for, where an id of the hub offers several layouts.",
        ),
    ] = None,
) -> None:
    """Fetch weights, or copy them to where a cluster without internet can read them."""
    from jobs.weights import pull_weights

    print("\n".join(pull_weights(name, to, command.out_store().options(), tracker=tracker)))


@app.command(rich_help_panel=PANEL)
def demo(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where everything goes.")
    ] = Path("maskmill-demo"),
) -> None:
    """Render a clip with known masks, track it, picture it and score it. Downloads nothing."""
    from jobs.demo import run_demo

    raise typer.Exit(run_demo(out))
