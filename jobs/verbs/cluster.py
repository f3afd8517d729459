"""Verbs that run on a cluster as a job: submit, logs, cancel."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.flags import (
    CORPUS,
    LIMITS,
    MODEL,
    OUT,
    OUT_STORE,
    PROMPTS,
    STORES,
    WORKERS,
    CommandLine,
    configured,
)
from jobs.verbs.app import OutArgument, app, open_out
from jobs.verbs.running import EXIT_INTERRUPTED, notice_licence
from workers.errors import ConfigError

if TYPE_CHECKING:
    from jobs.ray_jobs import JobServer
    from jobs.submitted import Submission

PANEL = "On a cluster"

AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="The cluster's job server, where it is not as the output says.",
        show_default=False,
    ),
]
AttemptOption = Annotated[
    int | None,
    typer.Option(
        "--submission", metavar="N", help="Which; the newest by default.", show_default=False
    ),
]


@app.command(rich_help_panel=PANEL)
@configured(CORPUS, OUT, MODEL, PROMPTS, WORKERS, LIMITS, STORES, corpus=True)
def submit(
    command: CommandLine,
    wait: Annotated[
        bool,
        typer.Option(
            "--follow/--detach", help="Show what it prints until it ends, or leave it alone."
        ),
    ] = True,
    ship_code: Annotated[
        bool,
        typer.Option(
            "--ship-code",
            help="Send this maskmill along as a wheel, instead of what the nodes have installed.",
        ),
    ] = False,
    driver_cpus: Annotated[
        float,
        typer.Option(
            "--driver-cpus",
            min=0,
            metavar="NUMBER",
            help="CPUs reserved for the driver; 0 runs it on the head node.",
        ),
    ] = 1.0,
) -> None:
    """Run as a Ray job on the cluster of --address. The same command again resumes."""
    from jobs.ray_jobs import JobServer
    from jobs.settings import Given, check_models
    from jobs.submission import submit as start
    from workers.storage import open_store

    given = command.flags.get("pool.ray_address")
    # The cluster's packages count, not those of this machine.
    command.flags["pool.ray_address"] = given or Given("the cluster", "--address")
    config = command.config()
    if config.notify.url is not None:
        raise ConfigError(
            "the URL to notify is not sent with a job, whose record others can read: set "
            "MASKMILL_NOTIFY_URL in the environment of the cluster's nodes"
        )
    check_models(config)
    notice_licence(config)
    store = open_store(config.out.uri, config.out.store.options())
    server = JobServer(given.value if given else None)
    insists = command.flags.get("out.if_running")
    submission = start(
        config,
        store,
        server,
        tell=_tell,
        ship_code=ship_code,
        take_over=insists is not None and insists.value == "take-over",
        driver_cpus=driver_cpus,
    )
    out = shlex.quote(store.uri)
    _tell(
        f"submitted {submission.job.job_id} to {server.address}\n"
        f"  maskmill status {out}\n  maskmill logs {out} --follow\n  maskmill cancel {out}"
    )
    if wait:
        raise typer.Exit(_follow(server, submission, store.uri))


@app.command(rich_help_panel=PANEL)
@configured(OUT_STORE)
def logs(
    command: CommandLine,
    out: OutArgument,
    wait: Annotated[
        bool, typer.Option("--follow", help="Go on until the job ends, with its exit code.")
    ] = False,
    number: AttemptOption = None,
    address: AddressOption = None,
) -> None:
    """Show what a submitted run has printed; without its cluster, the log lines in the output."""
    from jobs.submission import find_submission, server_of, stored_log_lines
    from workers.errors import StoreDenied, StoreError

    store = open_out(out, command)
    submission = find_submission(store, number)
    try:
        server = server_of(submission, address)
        text = None if wait else server.output(submission.job.job_id)
    except StoreError as error:
        if wait or address is not None or isinstance(error, StoreDenied):
            raise
        _tell(f"{error}; what the output itself holds:")
        for line in stored_log_lines(store, submission.run_id):
            print(line)
        return
    if text is None:
        raise typer.Exit(_follow(server, submission, store.uri))
    print(text, end="")


@app.command(rich_help_panel=PANEL)
@configured(OUT_STORE)
def cancel(
    command: CommandLine,
    out: OutArgument,
    number: AttemptOption = None,
    address: AddressOption = None,
) -> None:
    """Stop a submitted run; what is committed stays, and submitting it again resumes."""
    from jobs.submission import cancel as stop
    from jobs.submission import find_submission, server_of

    store = open_out(out, command)
    submission = find_submission(store, number)
    print(stop(store, server_of(submission, address), submission))


def _follow(server: JobServer, submission: Submission, out: str) -> int:
    from jobs.submission import follow

    try:
        return follow(server, submission, _show)
    except KeyboardInterrupt:
        out = shlex.quote(out)
        _tell(f"\nthe job goes on: maskmill logs {out} --follow, or maskmill cancel {out}")
        return EXIT_INTERRUPTED


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
