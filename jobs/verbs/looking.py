"""Verbs for looking at a dataset: render, report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.flags import STORES, CommandLine, configured
from jobs.verbs.app import OutArgument, Overwrite, app, open_out
from workers.errors import ConfigError

if TYPE_CHECKING:
    from jobs.dataset import Dataset
    from workers.messages import StoreOptions

PANEL = "Look at a dataset"


@app.command(rich_help_panel=PANEL)
@configured(STORES)
def render(
    command: CommandLine,
    out: OutArgument,
    video: Annotated[
        str,
        typer.Argument(
            metavar="VIDEO",
            help="A video of it: its path below the corpus root, as short as is unambiguous, or "
            "its URL.",
            show_default=False,
        ),
    ],
    dest: Annotated[
        str | None,
        typer.Argument(
            metavar="DEST",
            help="The film, NAME.mp4, or a folder for it. The contact sheet goes beside it.",
            show_default="VIDEO.overlay.mp4 in this folder",
        ),
    ] = None,
    other: Annotated[
        str | None,
        typer.Option(
            "--side-by-side",
            metavar="OTHER",
            help="Folder or URL of another dataset that holds the video, drawn to the right.",
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--source",
            metavar="URL",
            help="Where the video is now, if it is not in its corpus any more.",
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Draw the masks of a video over it: a film for the browser, and a contact sheet."""
    from jobs.dataset import Dataset
    from jobs.rendering.clip import Run, find_video, render_video, same_video

    dataset = Dataset(open_out(out, command))
    found = find_video(dataset, video)
    film = film_path(dest, found.name)
    sheet = film.with_suffix(".png")
    refuse_existing((film, sheet), overwrite)
    run = Run(dataset, found)
    beside = None
    if other is not None:
        other_set = Dataset(open_out(other, command))
        twin = same_video(other_set, found)
        names = run_titles((out, other), (found.row["tracker"], twin.row["tracker"]))
        run, beside = Run(dataset, found, names[0]), Run(other_set, twin, names[1])
    film.parent.mkdir(parents=True, exist_ok=True)
    with progress_bar("drawing", found.num_frames) as told:
        options = corpus_options(dataset, command)
        made = render_video(
            run, options, film, sheet, beside=beside, moved_to=source, progress=told
        )
    print(f"{made.num_frames:,} frames in {made.film}")
    print(f"contact sheet in {made.sheet}")


@app.command(rich_help_panel=PANEL)
@configured(STORES)
def report(
    command: CommandLine,
    out: OutArgument,
    dest: Annotated[
        str | None,
        typer.Argument(
            metavar="DEST",
            help="The page, NAME.html, or a folder for it.",
            show_default="OUT.report.html in this folder",
        ),
    ] = None,
    pictures: Annotated[
        int,
        typer.Option(
            "--pictures",
            metavar="N",
            min=0,
            help="Read the sources of at most N videos again, to picture what stands out.",
        ),
    ] = 12,
    overwrite: Overwrite = False,
) -> None:
    """Write one HTML page about a run: time, failures, results, what to look at first."""
    from jobs.dataset import Dataset
    from jobs.report_page.page import make_page

    path = page_path(dest, out)
    refuse_existing((path,), overwrite)
    store = open_out(out, command)
    dataset = Dataset(store)
    options = corpus_options(dataset, command)
    with progress_bar("picturing", pictures) as told:
        page = make_page(dataset, store, options, num_pictured=pictures, progress=told)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page.encode())
    print(f"{path}, {path.stat().st_size / 1e6:.1f} MB: open it in a browser")


def page_path(dest: str | None, out: str) -> Path:
    """Return where the page about an output goes.

    Parameters
    ----------
    dest : str or None
        As typed.
    out : str
        Folder or URL of the output.

    Returns
    -------
    Path
        Ends with ``.html``.

    Raises
    ------
    ConfigError
        The destination is no file name of a page, or no local one.
    """
    name = f"{Path(out.rstrip('/')).name or 'maskmill'}.report.html"
    if dest is None:
        return Path(name)
    path = local_path(dest)
    if path.is_dir() or not path.suffix:
        return path / name
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"a report is an HTML page: end {dest} with .html, or give a folder")
    return path


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is complete when it takes its name."""
    from jobs.rendering.clip import replaced

    with replaced(path) as part:
        part.write_bytes(data)


def film_path(dest: str | None, name: str) -> Path:
    """Return where the film of a video goes.

    Parameters
    ----------
    dest : str or None
        As typed.
    name : str
        Of the video: its path below the corpus root.

    Returns
    -------
    Path
        Ends with ``.mp4``.

    Raises
    ------
    ConfigError
        The destination is no file name of a film, or no local one.

    Examples
    --------
    >>> str(film_path(None, "park/dogs.mkv")), str(film_path(None, "frames/v1.2"))
    ('dogs.overlay.mp4', 'v1.2.overlay.mp4')
    """
    from jobs.export.naming import plain_sequence

    # Of folders of frames, v1.1 and v1.2 are two names.
    stem = plain_sequence(Path(name).name) or "video"
    if dest is None:
        return Path(f"{stem}.overlay.mp4")
    path = local_path(dest)
    if path.is_dir() or not path.suffix:
        return path / f"{stem}.overlay.mp4"
    if path.suffix.lower() != ".mp4":
        raise ConfigError(f"a film is an MP4 file: end {dest} with .mp4, or give a folder")
    return path


def local_path(dest: str) -> Path:
    """Return a destination as a path of this machine.

    Raises
    ------
    ConfigError
        It is a URL.
    """
    if "://" in dest:
        raise ConfigError(f"{dest} is not on this machine: write to a local path, then upload it")
    return Path(dest).expanduser()


def refuse_existing(paths: tuple[Path, ...], overwrite: bool) -> None:
    """Refuse to replace files that exist, unless asked to.

    Raises
    ------
    ConfigError
        One exists.
    """
    for path in paths:
        if path.is_dir():
            raise ConfigError(f"{path} is a folder: choose another destination")
        if path.exists() and not overwrite:
            raise ConfigError(f"{path} exists: give another destination, or --overwrite")


def run_titles(outs: tuple[str, str], trackers: tuple[str, str]) -> tuple[str, str]:
    """Return what tells two runs apart: their trackers, or where they are.

    Examples
    --------
    >>> run_titles(("a/one", "b/two/"), ("flow", "sam2")), run_titles(("a/one", "b/"), ("x", "x"))
    (('flow', 'sam2'), ('one', 'b'))
    """
    if trackers[0] != trackers[1]:
        return trackers
    folders = tuple(out.rstrip("/").rpartition("/")[2] for out in outs)
    return (folders[0], folders[1]) if folders[0] != folders[1] else outs


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal, and nothing elsewhere.

    Yields
    ------
    callable
        To be told how many of `total` are done.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def corpus_options(dataset: Dataset, command: CommandLine) -> StoreOptions:
    """Return how to reach the corpus of a dataset: as its run did, but for the flags typed now."""
    from jobs.config import StoreConfig

    plan = dataset.state.plan if dataset.state is not None else None
    stored = plan.config.get("corpus", {}).get("store", {}) if plan is not None else {}
    prefix = "corpus.store."
    typed = {
        key.removeprefix(prefix): given.value
        for key, given in command.flags.items()
        if key.startswith(prefix)
    }
    return StoreConfig(**{**stored, **typed}).options()
