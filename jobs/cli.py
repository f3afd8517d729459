"""The command line: arguments become a configuration, a verb runs, its outcome an exit code.

Exit codes: 0 all videos committed; 1 finished, some quarantined; 2 wrong command, configuration,
tracker, weights or prompts; 3 store or cluster; 70 a fault of this program; 130 interrupted.
Every room is imported by the verb that needs it, so that `maskmill --help` answers at once.
"""

from __future__ import annotations

import errno
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.flags import (
    CORPUS,
    MODEL,
    OUT,
    OUT_STORE,
    PROMPTS,
    STORES,
    WORKERS,
    CommandLine,
    configured,
)
from workers.errors import ConfigError, FailureKind, MaskmillError, TaskError

if TYPE_CHECKING:
    from jobs.config import RunConfig
    from workers.storage import Store

EXIT_INTERRUPTED = 130
EXIT_FAULT = 70
"""A fault of this program (EX_SOFTWARE): not one of the outcomes a caller may act upon."""
AGPL_NOTICE = (
    "notice: ultralytics (YOLO) is licensed under AGPL-3.0; using it in a service or product "
    "obliges you to its terms, unless you hold a licence of Ultralytics"
)
"""Printed once wherever a YOLO model is chosen."""

app = typer.Typer(
    name="maskmill",
    help="Turn a corpus of videos into a dataset of per-frame object masks.",
    epilog="Start with: maskmill demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

OutArgument = Annotated[
    str, typer.Argument(metavar="OUT", help="Folder or URL of a dataset.", show_default=False)
]
TakeOver = Annotated[
    bool,
    typer.Option("--take-over", help="Do it although the log says that a driver is at work."),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; those of the process by default.

    Returns
    -------
    int
        Exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Taken out here: it belongs to no verb, and must work when parsing itself fails.
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    try:
        app(arguments, prog_name="maskmill")
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except MaskmillError as error:
        if debug:
            traceback.print_exc()
        for sentence in str(error).splitlines() or [type(error).__name__]:
            print(f"error: {sentence}", file=sys.stderr)
        return _exit_code(error)
    except OSError as error:
        if debug:
            traceback.print_exc()
        return _explain_os_error(error)
    except Exception as error:
        return _explain_fault(error, debug)
    return 0


def _exit_code(error: MaskmillError) -> int:
    """Return an error's exit code; one of a single video never means "some are quarantined"."""
    if isinstance(error, TaskError):
        return 3 if error.kind in (FailureKind.OUTAGE, FailureKind.TRANSIENT) else 2
    return error.exit_code


def _explain_os_error(error: OSError) -> int:
    """Print what the operating system refused; a full disk and a missing right are the store's."""
    where = f"{error.filename}: " if error.filename else ""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = "; free some space and type the same command again" if is_full else ""
    print(f"error: {where}{error.strerror or error}{advice}", file=sys.stderr)
    return 3 if is_full or error.errno in (errno.EACCES, errno.EROFS) else 2


def _explain_fault(error: Exception, debug: bool) -> int:
    """Keep the traceback of a fault of ours in a file, and say where."""
    import tempfile

    text = traceback.format_exc()
    if debug:
        print(text, file=sys.stderr)
    path = Path(tempfile.gettempdir()) / f"maskmill-fault-{time.strftime('%Y%m%d-%H%M%S')}.txt"
    try:
        path.write_text(text, encoding="utf-8")
        where = f"the details are in {path}, please report them"
    except OSError as refused:
        where = f"the details cannot be kept in {path} ({refused.strerror}), --debug shows them"
    what = " ".join(f"{type(error).__name__}: {error}".split())
    print(f"error: maskmill itself failed ({what}); {where}", file=sys.stderr)
    return EXIT_FAULT


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"maskmill {version('maskmill')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (after any verb).")
    ] = False,
) -> None:
    """Turn a corpus of videos into a dataset of per-frame object masks."""


@app.command()
@configured(CORPUS, OUT, MODEL, PROMPTS, WORKERS, STORES, corpus=True)
def plan(
    command: CommandLine,
    fps: Annotated[
        float | None,
        typer.Option("--fps", min=0.001, help="Frames per second of one worker, for the estimate."),
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
    write_preview(config, fps=fps, price=price)


@app.command()
@configured(CORPUS, OUT, MODEL, PROMPTS, WORKERS, STORES, corpus=True)
def run(command: CommandLine) -> None:
    """Track a corpus into a dataset. The same command again resumes."""
    from jobs.settings import check_models

    config = command.config()
    check_models(config)
    notice_licence(config)
    raise typer.Exit(run_and_report(config, _typed_command()))


@app.command()
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


@app.command()
@configured(WORKERS, OUT_STORE)
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


@app.command()
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


@app.command()
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


@app.command()
@configured(OUT_STORE)
def compact(command: CommandLine, out: OutArgument, take_over: TakeOver = False) -> None:
    """Merge the dataset into fewer, larger, sorted files."""
    from jobs.maintenance import compact as compact_dataset
    from jobs.startup import owner_name

    made = compact_dataset(open_out(out, command), owner_name(), take_over=take_over)
    print(f"made {made:,} segments" if made else "nothing to merge")


@app.command()
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


@app.command()
def models() -> None:
    """List the trackers and detectors, the weights they need and their licences."""
    from jobs.report import model_lines

    print("\n".join(model_lines()))


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where everything goes.")
    ] = Path("maskmill-demo"),
) -> None:
    """Render a clip with known masks, track it, picture it and score it. Downloads nothing."""
    from jobs.demo import run_demo

    raise typer.Exit(run_demo(out))


def open_out(uri: str, command: CommandLine) -> Store:
    """Open an existing output.

    Parameters
    ----------
    uri : str
        As typed.
    command : CommandLine
        Holds how to reach it.

    Returns
    -------
    Store
        The output.
    """
    from workers.storage import open_store

    return open_store(uri, command.out_store().options())


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
        config = RunConfig.model_validate(plan.config)
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
    detector = config.prompts.detector
    names = [config.tracker.name, detector.name if detector else ""]
    if any(name.lower().startswith("yolo") for name in names):
        print(AGPL_NOTICE, file=sys.stderr)


def _typed_command() -> str:
    return shlex.join(["maskmill", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
