"""The command line: a verb runs (`jobs.verbs`), and its outcome becomes an exit code.

Exit codes: 0 all videos committed; 1 finished, some quarantined; 2 wrong command, configuration,
tracker, weights or prompts; 3 store or cluster; 70 a fault of this program; 130 interrupted.
Every room is imported by the verb that needs it, so that `maskmill --help` answers at once.
"""

from __future__ import annotations

import errno
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

# Importing a file of verbs registers them; `--help` shows them in this order.
from jobs.verbs import running, cluster, exchange, importing, looking, scoring, upkeep, machine  # isort: skip
from jobs.verbs.app import app
from workers.errors import FailureKind, MaskmillError, TaskError

VERBS = (running, cluster, exchange, importing, looking, scoring, upkeep, machine)
EXIT_FAULT = 70
"""A fault of this program (EX_SOFTWARE): not one of the outcomes a caller may act upon."""


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


if __name__ == "__main__":
    sys.exit(main())
