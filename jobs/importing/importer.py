"""`maskmill import`: annotations in other formats become prompts or ground truth."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from jobs.export.destination import new_file, new_folder
from jobs.importing import mots
from jobs.importing.annotations import Annotations
from jobs.importing.as_prompts import ENDINGS, write_prompts
from jobs.importing.as_truth import ACCEPTS, write_truth
from jobs.importing.coco import read_coco
from jobs.importing.davis import read_davis
from jobs.importing.formats import ImportFormat, PromptFrames
from jobs.importing.sav import read_sav
from jobs.importing.source import Naming, Source
from jobs.importing.ytvis import read_ytvis
from workers.errors import ConfigError, StoreFull
from workers.messages import StoreOptions
from workers.spool import spool_folder
from workers.storage import canonical_uri, open_store


@dataclass(frozen=True, slots=True)
class ImportSource:
    """What is read, and how.

    Attributes
    ----------
    uri : str
        File or folder.
    format : ImportFormat
        What it is.
    video : str or None
        Name of its only video.
    first_frame : int or None
        Number that it gives to the first frame; None is what the format says.
    frame_step : int or None
        Frames of the video from one of its numbers to the next; None is what the format says.
    keep_names : bool
        Names of sequences are those of videos, ``__`` included.
    classes : Mapping of int to str
        Further names of classes, for MOTS.
    videos : str or None
        The ground-truth file that numbers the videos of YouTube-VIS results.
    options : StoreOptions or None
        How to reach stores.
    """

    uri: str
    format: ImportFormat
    video: str | None = None
    first_frame: int | None = None
    frame_step: int | None = None
    keep_names: bool = False
    classes: Mapping[int, str] = field(default_factory=dict)
    videos: str | None = None
    options: StoreOptions | None = None

    def __post_init__(self) -> None:
        if self.classes and self.format is not ImportFormat.MOTS:
            raise ConfigError(
                f"--category belongs to the format mots; {self.format} has its own names: leave "
                f"it out"
            )
        if self.videos and self.format is not ImportFormat.YTVIS:
            raise ConfigError("--videos belongs to results in the format ytvis: leave it out")


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What an import did.

    Attributes
    ----------
    num_videos, num_frames, num_masks : int
        What was read; frames are those that are annotated, also with nothing on them.
    num_unlinked : int
        Masks without a track, each of which became an object of its own.
    num_prompts : int
        Prompts that were written; 0 for ground truth.
    """

    num_videos: int
    num_frames: int
    num_masks: int
    num_unlinked: int
    num_prompts: int = 0


def import_prompts(
    source: ImportSource,
    destination: str,
    *,
    frames: PromptFrames = PromptFrames.FIRST,
    overwrite: bool = False,
) -> ImportReport:
    """Turn annotations into a prompts file for ``maskmill run --prompts``.

    Parameters
    ----------
    source : ImportSource
        What is read.
    destination : str
        Path or URL of the file; ``.jsonl`` or ``.parquet``.
    frames : PromptFrames
        Which masks of an object become prompts.
    overwrite : bool
        Replace a file that exists.

    Returns
    -------
    ImportReport
        What was done. The file is there whole, or not at all.

    Raises
    ------
    ConfigError
        The source is faulty, or the destination exists.
    InputError
        A picture is unreadable.
    StoreError
        A store refused, did not answer, or is full.
    """
    ending = next((ending for ending in ENDINGS if destination.lower().endswith(ending)), None)
    if ending is None:
        raise ConfigError(f"the prompts file {destination} must end in .jsonl or .parquet: rename")
    with (
        new_file(destination, overwrite=overwrite, options=source.options) as path,
        _read(source) as annotations,
    ):
        if not annotations.num_masks:
            raise ConfigError(f"{source.uri} holds no mask: there is nothing to prompt with")
        num_prompts = write_prompts(annotations, path, ending, frames)
        return _report(annotations, num_prompts)


def import_truth(
    source: ImportSource, destination: str, *, overwrite: bool = False
) -> ImportReport:
    """Turn annotations into ground truth for ``maskmill eval --gt``.

    Parameters
    ----------
    source : ImportSource
        What is read.
    destination : str
        Path or URL of the folder; see `jobs.ground_truth` for its layout.
    overwrite : bool
        Replace a folder of ground truth that is there.

    Returns
    -------
    ImportReport
        What was done. The folder is there whole, or as it was.

    Raises
    ------
    ConfigError
        The source is faulty, or the destination exists.
    InputError
        A picture is unreadable.
    StoreError
        A store refused or did not answer, or no space is left.
    """
    folder_uri = canonical_uri(destination)
    for uri in filter(None, (source.uri, source.videos)):
        if f"{canonical_uri(uri)}/".startswith(f"{folder_uri}/"):
            raise ConfigError(f"{uri} lies in {destination}, to be replaced: choose another folder")
    if not overwrite and next(iter(open_store(destination, source.options).list()), None):
        raise ConfigError(f"{destination} exists: choose another folder, or pass --overwrite")
    # Nothing that an interrupted import left is continued: its source may have changed.
    identity = {"import": uuid.uuid4().hex}
    with _read(source) as annotations:
        if not annotations.num_frames:
            raise ConfigError(f"{source.uri} annotates no frame: there is no ground truth")
        with new_folder(
            destination, identity, ACCEPTS, overwrite=overwrite, options=source.options
        ) as folder:
            write_truth(annotations, folder)
        return _report(annotations)


@contextmanager
def _read(source: ImportSource) -> Iterator[Annotations]:
    """Read a source, and give what was read."""
    with spool_folder() as spool:
        try:
            with Annotations(spool) as annotations:
                _fill(annotations, source, spool)
                annotations.number_objects()
                yield annotations
        except sqlite3.OperationalError as error:
            raise StoreFull(
                f"the temporary folder {spool.parent} cannot be written ({error}): free some "
                f"space, or set TMPDIR to a larger disk"
            ) from error


def _fill(annotations: Annotations, source: ImportSource, spool: Path) -> None:
    first = source.first_frame
    if first is None:
        first = mots.FIRST_FRAME if source.format is ImportFormat.MOTS else 0
    naming = Naming(source.video, first, source.frame_step, source.keep_names)
    given = Source(source.uri, source.options, spool)
    match source.format:
        case ImportFormat.COCO:
            read_coco(given, naming, annotations, spool)
        case ImportFormat.YTVIS:
            truth = None
            if source.videos is not None:
                (spool / "videos").mkdir()
                truth = Source(source.videos, source.options, spool / "videos")
            read_ytvis(given, naming, annotations, spool, truth)
        case ImportFormat.DAVIS:
            read_davis(given, naming, annotations)
        case ImportFormat.MOTS:
            mots.read_mots(given, naming, annotations, {**mots.CLASSES, **source.classes})
        case ImportFormat.SAV:
            read_sav(given, naming, annotations)


def _report(annotations: Annotations, num_prompts: int = 0) -> ImportReport:
    return ImportReport(
        annotations.num_videos,
        annotations.num_frames,
        annotations.num_masks,
        annotations.num_unlinked,
        num_prompts,
    )
