"""`maskmill export`: one dataset, one format, one destination."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from jobs.dataset import Dataset
from jobs.export import davis, mots, sav
from jobs.export.coco import write_coco
from jobs.export.destination import Folder, new_file, new_folder
from jobs.export.naming import Classes, VideoNames, known_classes, numbered_classes
from jobs.export.selection import SelectedVideo, Selection, select
from jobs.export.tally import RefusedVideoError, Tally
from jobs.export.ytvis import write_ytvis
from workers.errors import ConfigError
from workers.messages import StoreOptions

Files = Iterator[tuple[str, bytes]]


class Format(StrEnum):
    """What `maskmill export` writes."""

    COCO = "coco"
    YTVIS = "ytvis"
    DAVIS = "davis"
    MOTS = "mots"
    SAV = "sav"


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How a format is written; an option that the format does not have is refused.

    Attributes
    ----------
    uncompressed : bool
        `coco`: counts as lists of run lengths.
    results : bool
        `ytvis`, `mots`: what an evaluation takes as predictions.
    z_order : tuple of int
        `davis`: objects from front to back.
    categories : Mapping of str to int
        `coco`, `ytvis`, `mots`: numbers of classes, by name.
    overwrite : bool
        Replace an export that is there.
    """

    uncompressed: bool = False
    results: bool = False
    z_order: tuple[int, ...] = ()
    categories: Mapping[str, int] = field(default_factory=dict)
    overwrite: bool = False

    def check(self, format: Format) -> None:
        """Refuse options that a format does not have.

        Raises
        ------
        ConfigError
            One was given.
        """
        given = {
            "--uncompressed": (self.uncompressed, (Format.COCO,)),
            "--results": (self.results, (Format.YTVIS, Format.MOTS)),
            "--z-order": (self.z_order, (Format.DAVIS,)),
            "--category": (self.categories, (Format.COCO, Format.YTVIS, Format.MOTS)),
        }
        for name, (value, formats) in given.items():
            if value and format not in formats:
                raise ConfigError(
                    f"{name} belongs to --format {' or '.join(formats)}: leave it out"
                )


def export_dataset(
    dataset: Dataset,
    format: Format,
    dest: str,
    selection: Selection | None = None,
    options: ExportOptions | None = None,
    *,
    store_options: StoreOptions | None = None,
    on_video: Callable[[Tally], None] | None = None,
) -> Tally:
    """Write a dataset, or a part of it, in another format.

    Parameters
    ----------
    dataset : Dataset
        The dataset.
    format : Format
        The format.
    dest : str
        Path or URL: of a file for `coco` and `ytvis`, else of a folder.
    selection : Selection, optional
        What to take; everything by default.
    options : ExportOptions, optional
        How to write it.
    store_options : StoreOptions, optional
        How to reach the destination.
    on_video : callable, optional
        Called with the counts so far after each video.

    Returns
    -------
    Tally
        What became of it.

    Raises
    ------
    ConfigError
        The destination exists, nothing is selected, or an option is wrong.
    StoreError
        A store failed, or the destination is full. Nothing is under its name then; for a folder,
        the same export goes on where this one ended.
    """
    selection, options = selection or Selection(), options or ExportOptions()
    options.check(format)
    names = VideoNames(dataset)
    if not len(names.keys):
        raise ConfigError(f"{dataset.uri} holds no readable video yet: there is nothing to export")
    tally = Tally()
    videos = _counted(select(dataset, selection, names), tally, on_video)
    if format in (Format.COCO, Format.YTVIS):
        classes = numbered_classes(dataset.categories, options.categories)
        with new_file(dest, overwrite=options.overwrite, options=store_options) as path:
            if format is Format.COCO:
                write_coco(path, videos, classes, tally, uncompressed=options.uncompressed)
            else:
                write_ytvis(path, videos, classes, tally, results=options.results)
            _check_not_empty(dataset, tally)
        return tally
    kind = _folder_kind(dataset, format, selection, options, tally)
    identity = {
        "dataset": dataset.uri,
        "version": dataset_version(dataset),
        "format": format.value,
        "selection": repr(selection),
        "options": repr((options.results, options.z_order, sorted(options.categories.items()))),
    }
    with new_folder(
        dest, identity, kind.accepts, overwrite=options.overwrite, options=store_options
    ) as folder:
        for video in videos:
            _write_video(folder, kind, video, tally)
        _check_not_empty(dataset, tally)
    return tally


@dataclass(frozen=True, slots=True)
class _FolderKind:
    """A format of many files."""

    accepts: re.Pattern[str]
    files: Callable[[SelectedVideo], Files]
    last_key: Callable[[SelectedVideo], str | None]


def _folder_kind(
    dataset: Dataset, format: Format, selection: Selection, options: ExportOptions, tally: Tally
) -> _FolderKind:
    if format is Format.DAVIS:
        return _FolderKind(
            davis.ACCEPTS,
            lambda video: davis.davis_files(video, tally, options.z_order),
            davis.last_key,
        )
    if format is Format.MOTS:
        classes = known_classes(dataset.categories, mots.CLASSES, options.categories)
        if not (selection.where or selection.min_score or selection.videos):
            _check_classes(dataset, classes)
        return _FolderKind(
            mots.ACCEPTS,
            lambda video: mots.mots_files(video, classes, tally, results=options.results),
            lambda video: mots.last_key(video, results=options.results),
        )
    categories = dataset.categories
    return _FolderKind(
        sav.ACCEPTS,
        lambda video: iter([(sav.last_key(video), sav.sav_file(video, categories))]),
        sav.last_key,
    )


def _write_video(folder: Folder, kind: _FolderKind, video: SelectedVideo, tally: Tally) -> None:
    last = kind.last_key(video)
    if last is not None and folder.has(last):
        tally.num_continued += 1
    else:
        try:
            for key, data in kind.files(video):
                folder.write(key, data)
        except RefusedVideoError as refusal:
            tally.refuse(video.video.name, str(refusal))
            return
    tally.add(len(video.frame_idx), len(video.masks))


def _counted(
    videos: Iterator[SelectedVideo], tally: Tally, on_video: Callable[[Tally], None] | None
) -> Iterator[SelectedVideo]:
    for video in videos:
        yield video
        if on_video is not None:
            on_video(tally)


def _check_not_empty(dataset: Dataset, tally: Tally) -> None:
    if tally.num_videos:
        return
    if tally.refused:
        raise ConfigError(f"no video can be exported: {tally.refusals()[0]}")
    raise ConfigError(
        f"no video of {dataset.uri} is selected: there is nothing to export, mend --where"
    )


def _check_classes(dataset: Dataset, classes: Classes) -> None:
    """Refuse classes that the format does not know before anything is written."""
    found: set[int | None] = set()
    for batch in dataset.batches("objects", columns=("category_id", "frames_visible")):
        visible = batch.column("frames_visible").to_numpy() > 0
        found.update(batch.column("category_id").filter(visible).unique().to_pylist())
    unknown = [category_id for category_id in found if category_id not in classes.numbers]
    if unknown:
        raise mots.unknown_class(classes, unknown)


def dataset_version(dataset: Dataset) -> str:
    """Return what changes when the readable rows of a dataset do.

    Parameters
    ----------
    dataset : Dataset
        The dataset.

    Returns
    -------
    str
        Empty for a copy without a log.
    """
    if dataset.state is None:
        return ""
    return f"{dataset.state.published_through}-{sorted(dataset.state.segments)}"
