"""Verbs that make a dataset and say how far it is: plan, run, status, retry."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.flags import (
    CORPUS,
    LIMITS,
    MODEL,
    NOTIFY,
    OUT,
    OUT_STORE,
    PROMPTS,
    STORES,
    WORKERS,
    CommandLine,
    configured,
)
from jobs.verbs.app import OutArgument, app, open_out
from workers.errors import ConfigError, FailureKind

if TYPE_CHECKING:
    from jobs.config import RunConfig
    from workers.storage import Store

EXIT_INTERRUPTED = 130
AGPL_NOTICE = (
    "notice: ultralytics (YOLO) is licensed under AGPL-3.0; using it in a service or product "
    "obliges you to its terms, unless you hold a licence of Ultralytics"
)
"""Printed once wherever a YOLO model is chosen."""
SAM3_NOTICE = (
    "notice: the weights of SAM 3 are under Meta's SAM License, which restricts what they may be "
    "used for; read it where you got them"
)
"""Printed once wherever SAM 3 is chosen."""

PANEL = "Make a dataset"


@app.command(rich_help_panel=PANEL)
@configured(CORPUS, OUT, MODEL, PROMPTS, WORKERS, LIMITS, NOTIFY, STORES, corpus=True)
def plan(
    command: CommandLine,
    fps: Annotated[
        float | None,
        typer.Option("--fps", min=0.001, help="Frames per second of one worker, for the estimate."),
    ] = None,
    objects: Annotated[
        float | None,
        typer.Option(
            "--objects",
            min=0.001,
            metavar="N",
            help="Objects in a video, for the estimate, where prompts do not tell.",
        ),
    ] = None,
    price: Annotated[
        float | None,
        typer.Option("--price", min=0, help="Price of a worker-hour, for the estimate."),
    ] = None,
) -> None:
    """Show what would run: videos, frames, invalid inputs, worker-hours. Writes nothing."""
    from jobs.preview import write_preview
    from jobs.settings import check_models

    config = command.config(with_out=False)
    check_models(config)
    notice_licence(config)
    write_preview(config, fps=fps, num_objects=objects, price=price)


@app.command(rich_help_panel=PANEL)
@configured(CORPUS, OUT, MODEL, PROMPTS, WORKERS, LIMITS, NOTIFY, STORES, corpus=True)
def run(command: CommandLine) -> None:
    """Track a corpus into a dataset. The same command again resumes."""
    from jobs.settings import check_models

    config = command.config()
    check_models(config)
    notice_licence(config)
    raise typer.Exit(run_and_report(config, _typed_command()))


@app.command(rich_help_panel=PANEL)
@configured(OUT_STORE)
def status(
    command: CommandLine,
    out: OutArgument,
    watch: Annotated[bool, typer.Option("--watch", help="Keep showing it until Ctrl-C.")] = False,
) -> None:
    """Show how far a run is, from its log alone; no cluster is needed."""
    from jobs.status import watch_status, write_status

    store = open_out(out, command)
    if watch:
        watch_status(store)
    else:
        write_status(store)


@app.command(rich_help_panel=PANEL)
@configured(WORKERS, LIMITS, NOTIFY, OUT_STORE)
def retry(
    command: CommandLine,
    out: OutArgument,
    kinds: Annotated[
        list[FailureKind] | None,
        typer.Option("--class", help="Only videos quarantined for this reason; may be repeated."),
    ] = None,
) -> None:
    """Try the quarantined videos of a run once more, with the configuration it had."""
    from jobs.settings import check_models

    config = stored_config(open_out(out, command), command)
    check_models(config)
    notice_licence(config)
    raise typer.Exit(
        run_and_report(
            config,
            _typed_command(),
            retry=True,
            retry_kinds=frozenset(kinds) if kinds else None,
        )
    )


def stored_config(store: Store, command: CommandLine) -> RunConfig:
    """Return the configuration that an output was made with.

    Parameters
    ----------
    store : Store
        The output, as the command reaches it now.
    command : CommandLine
        Flags that were typed: how to reach the output and what workers may use may have changed.

    Returns
    -------
    RunConfig
        As the newest plan record holds it, but for the flags.

    Raises
    ------
    ConfigError
        There is no run in this place, or another version of maskmill wrote it.
    """
    from pydantic import ValidationError

    from jobs.config import RunConfig
    from jobs.settings import Given, with_flags
    from jobs.status import read_log

    plan = read_log(store).plan
    assert plan is not None, "read_log refuses a log without a plan"
    try:
        # Limits are of one start, and may be over.
        config = RunConfig.model_validate({**plan.config, "limits": {}})
    except ValidationError as error:
        raise ConfigError(
            f"the configuration stored in {store.uri} is of another version of maskmill "
            f"({error.errors()[0]['msg']}): repeat the run command instead"
        ) from error
    return with_flags(config, command.flags | {"out.uri": Given(store.uri, "OUT")})


def run_and_report(config: RunConfig, command: str, **options: Any) -> int:
    """Run with a display, print the summary, return the exit code.

    Parameters
    ----------
    config : RunConfig
        The run.
    command : str
        What was typed, for the summary.
    **options
        Passed on to `jobs.driver.run`.

    Returns
    -------
    int
        Exit code of the run.
    """
    from jobs.driver import run as drive
    from jobs.progress import make_reporter
    from jobs.report import write_summary

    reporter = make_reporter()
    try:
        summary = drive(config, reporter=reporter, **options)
    except KeyboardInterrupt:
        text = "stopped at once: what is committed stays, the same command again resumes"
        reporter.on_message("warning", text)
        return EXIT_INTERRUPTED
    finally:
        reporter.close()
    new = tuple(text for text in summary.warnings if text not in reporter.told)
    write_summary(replace(summary, warnings=new), command)
    return summary.exit_code


def notice_licence(config: RunConfig) -> None:
    """Say under which licence the chosen models stand, where it obliges the user."""
    from workers.trackers.registry import tracker_info

    detector = config.prompts.detector
    names = [config.tracker.name, detector.name if detector else ""]
    if any(name.lower().startswith("yolo") for name in names):
        print(AGPL_NOTICE, file=sys.stderr)
    if tracker_info(config.tracker.name).licence == "LicenseRef-SAM":
        print(SAM3_NOTICE, file=sys.stderr)


def _typed_command() -> str:
    """Return what was typed, for people to type again, without what is secret in it."""
    words = list(sys.argv[1:])
    for i, word in enumerate(words):
        if word == "--notify" and i + 1 < len(words):
            words[i + 1] = "URL"
        elif word.startswith("--notify=") or "notify.url=" in word:
            words[i] = word.partition("=")[0] + ("=notify.url=URL" if "--set=" in word else "=URL")
    return shlex.join(["maskmill", *words])
