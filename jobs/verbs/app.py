"""What the verbs share: the application they register with, and opening the output they name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jobs.flags import CommandLine

if TYPE_CHECKING:
    from workers.storage import Store

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
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]


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
