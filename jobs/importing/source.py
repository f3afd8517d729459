"""Where an import reads from, and how the user's options read what names and numbers mean."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jobs.importing.json_stream import JsonFile
from workers.errors import ConfigError
from workers.messages import StoreOptions
from workers.storage import open_store, split_uri

_LAST_NUMBER = re.compile(r"(\d+)(?:\.[A-Za-z0-9]+)?$")


@dataclass(slots=True)
class Naming:
    """What the user says about names and numbers in a source.

    Attributes
    ----------
    video : str or None
        Name of the only video, for a source that does not name it.
    first_frame : int
        Number that the source gives to the first frame of a video.
    frame_step : int or None
        Frames of the video from one number of the source to the next; None is what the format
        says, which is 1 but for SA-V.
    keep_names : bool
        Take the names of sequences as they are; else ``__`` in them is the ``/`` of a video's
        path, as `maskmill export` writes it.
    """

    video: str | None = None
    first_frame: int = 0
    frame_step: int | None = None
    keep_names: bool = False
    _named: str | None = None

    def frame_idx(self, number: int) -> int:
        """Return the 0-based frame of a video that a number of the source means."""
        return (number - self.first_frame) * (self.frame_step or 1)

    def frame_of(self, file_name: str, place: str) -> int:
        """Return the frame that a picture's file name means: the number at its end.

        Raises
        ------
        ConfigError
            There is no number.

        Examples
        --------
        >>> Naming().frame_of("street/frame_000012.PNG", "image 3")
        12
        """
        found = _LAST_NUMBER.search(file_name)
        if found is None:
            raise ConfigError(
                f"{place} has the file name {file_name!r}, which does not end in a frame number: "
                f"name its pictures like 00012.jpg, or give them a frame_id"
            )
        return self.frame_idx(int(found[1]))

    def video_of(self, name: str | None, place: str) -> str:
        """Return the name of the video; the one that the user gave wins.

        Raises
        ------
        ConfigError
            There is none, or the user gave one name and the source has several.
        """
        if self.video and name:
            if self._named not in (None, name):
                raise ConfigError(
                    f"{place} is of {name!r}, but others of {self._named!r}: --video {self.video} "
                    f"is for a source of one video, so leave it out"
                )
            self._named = name
        if self.video or name:
            return self.video or name or ""
        raise ConfigError(
            f"{place} does not say to which video it belongs: pass --video NAME if the source is "
            f"of one video, else put its pictures into a folder per video"
        )

    def video_of_sequence(self, sequence: str) -> str:
        """Return the name of the video that a sequence is of; the one that the user gave wins.

        Examples
        --------
        >>> Naming().video_of_sequence("park__dogs")
        'park/dogs'
        """
        return self.video_of(sequence if self.keep_names else sequence.replace("__", "/"), sequence)


class Source:
    """A file or a folder of files, on a disk or a bucket.

    Parameters
    ----------
    uri : str
        Path or URL.
    options : StoreOptions or None
        How to reach it.
    spool : Path
        Folder for downloads, which the caller deletes.

    Attributes
    ----------
    uri : str
        As given.
    options : StoreOptions or None
        As given.
    """

    def __init__(self, uri: str, options: StoreOptions | None, spool: Path) -> None:
        self.uri = uri.rstrip("/") or uri
        self.options = options
        self._spool = spool
        root, key = split_uri(self.uri)
        self._store = open_store(root, options)
        self._is_file = bool(key) and self._store.stat(key) is not None
        if self._is_file:
            self._key = key
        else:
            self._store = open_store(self.uri, options)

    def files(self, ending: str) -> Iterator[str]:
        """Yield the files with an ending: the source itself, or those below it at any depth.

        Yields
        ------
        str
            Path below the source, ordered; for a source that is a file its own name.

        Raises
        ------
        ConfigError
            There is none.
        """
        if self._is_file:
            yield self._key.rpartition("/")[2]
            return
        none = True
        for stat in self._store.list(""):
            if stat.key.lower().endswith(ending):
                none = False
                yield stat.key
        if none:
            raise ConfigError(
                f"{self.uri} does not exist or holds no {ending} file: give the file or folder "
                f"that was exported, and its --format"
            )

    def uri_of(self, file: str) -> str:
        """Return where a file is, for messages."""
        return self.uri if self._is_file else self._store.uri_of(file)

    def read_bytes(self, file: str) -> bytes:
        """Return the content of a file."""
        return self._store.read_bytes(self._key if self._is_file else file)

    @contextmanager
    def open_json(self, file: str) -> Iterator[JsonFile]:
        """Give a file as JSON; one that is not on this machine is fetched first."""
        with self.local(file) as path:
            yield JsonFile(path, self.uri_of(file))

    @contextmanager
    def local(self, file: str) -> Iterator[Path]:
        """Give the path of a file on this machine, fetched for the while if it is elsewhere."""
        key = self._key if self._is_file else file
        path = self._store.local_path(key)
        if path is not None:
            yield path
            return
        path = self._spool / "fetched"
        self._store.get_file(key, path)
        try:
            yield path
        finally:
            path.unlink()
