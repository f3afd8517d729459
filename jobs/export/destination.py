"""Where an export goes: one file or a folder of files, under its name only when it is complete.

On a disk everything is written beside the destination, under its name and ``.partial``, and
renamed at the end. In a bucket, which cannot rename, every object is complete by itself and a
marker lies beside them until the last one is there. A folder that an interrupted export left is
continued by the same one, and begun anew by any other.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from workers.errors import ConfigError, StoreError
from workers.messages import StoreOptions
from workers.spool import spool_folder
from workers.storage import canonical_uri, open_store, split_uri
from workers.storage.faults import os_fault

MARKER = "_export.json"
"""Lies in a folder as long as the export into it is not complete."""
PARTIAL = ".partial"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@contextlib.contextmanager
def new_file(
    uri: str, *, overwrite: bool = False, options: StoreOptions | None = None
) -> Iterator[Path]:
    """Give a local path to write to, which becomes the file `uri` when the block ends well.

    Parameters
    ----------
    uri : str
        Path or URL of the file to be.
    overwrite : bool
        Replace a file that is there.
    options : StoreOptions or None
        How to reach it.

    Yields
    ------
    Path
        Nothing is there yet.

    Raises
    ------
    ConfigError
        The destination exists, or is a folder.
    StoreError
        It cannot be written.
    """
    place = canonical_uri(uri)
    if "://" in place:
        root, key = split_uri(place)
        store = open_store(root, options)
        if not overwrite and store.stat(key) is not None:
            raise _exists(place)
        with spool_folder() as spool, _told(place):
            yield spool / "export"
            store.put_file(spool / "export", key)
        return
    path = Path(place)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: name the file to write, such as {path}/masks.json")
    if path.exists() and not overwrite:
        raise _exists(place)
    with _told(place):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + PARTIAL)
        with partial.open("ab") as held, _locked(held.fileno(), place):
            try:
                os.truncate(partial, 0)
                yield partial
                _sync(partial)
                partial.replace(path)
                _sync(path.parent)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise


class Folder(ABC):
    """A folder that is being filled; every file in it is complete."""

    @abstractmethod
    def has(self, key: str) -> bool:
        """Tell whether a file is there, from an earlier attempt at the same export."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Write a file, replacing what was there."""


@contextlib.contextmanager
def new_folder(
    uri: str,
    identity: Mapping[str, Any],
    accepts: re.Pattern[str],
    *,
    overwrite: bool = False,
    options: StoreOptions | None = None,
) -> Iterator[Folder]:
    """Give a folder to fill, which becomes the folder `uri` when the block ends well.

    Parameters
    ----------
    uri : str
        Path or URL of the folder to be.
    identity : Mapping
        What is exported and how; what an equal export left is kept.
    accepts : Pattern
        Keys that an export of this kind writes. A folder with others is never replaced.
    overwrite : bool
        Replace a complete export that is there.
    options : StoreOptions or None
        How to reach it.

    Yields
    ------
    Folder
        Empty, or with what an interrupted export left.

    Raises
    ------
    ConfigError
        The destination exists, or holds something else.
    StoreError
        It cannot be written.
    """
    place = canonical_uri(uri)
    target = _Bucket(place, options) if "://" in place else _Disk(place)
    with _told(place), target.opened(dict(identity), accepts, overwrite):
        yield target


class _Disk(Folder):
    """A folder on a disk of this machine."""

    def __init__(self, place: str) -> None:
        # Behind a link, which stays what it is, and the folder on the disk that it names.
        self._path = Path(place).resolve()
        self._work = self._path.parent / f"{self._path.name}{PARTIAL}"

    @contextlib.contextmanager
    def opened(
        self, identity: dict[str, Any], accepts: re.Pattern[str], overwrite: bool
    ) -> Iterator[None]:
        if self._path.exists() and not self._path.is_dir():
            raise ConfigError(f"{self._path} is a file: name a folder to write to")
        _check_free(str(self._path), _files_below(self._path), accepts, overwrite)
        # What a power cut may have torn is not continued.
        with contextlib.suppress(OSError):
            identity["boot"] = _BOOT_ID.read_text().strip()
        self._work.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._work, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with _locked(descriptor, str(self._path)):
                marker = self._work / MARKER
                if _read(marker) != identity:
                    self._clear(marker, accepts)
                    marker.write_text(json.dumps(identity), encoding="utf-8")
                yield
                os.sync()
                marker.unlink()
                if self._path.exists():
                    shutil.rmtree(self._path)
                self._work.rename(self._path)
                _sync(self._path.parent)
        finally:
            os.close(descriptor)

    def _clear(self, marker: Path, accepts: re.Pattern[str]) -> None:
        """Remove what another export left; a folder that nobody marked may be the user's own."""
        if not marker.exists():
            _check_free(str(self._work), _files_below(self._work), accepts, overwrite=True)
        for child in self._work.iterdir():
            shutil.rmtree(child) if child.is_dir() else child.unlink()

    def has(self, key: str) -> bool:
        return (self._work / key).exists()

    def write(self, key: str, data: bytes) -> None:
        path = self._work / key
        partial = path.with_name(path.name + PARTIAL)
        try:
            partial.write_bytes(data)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)
        partial.replace(path)


class _Bucket(Folder):
    """A prefix of an object store."""

    def __init__(self, place: str, options: StoreOptions | None) -> None:
        self._store = open_store(place, options)
        self._continued = False

    @contextlib.contextmanager
    def opened(
        self, identity: dict[str, Any], accepts: re.Pattern[str], overwrite: bool
    ) -> Iterator[None]:
        try:
            found = json.loads(self._store.read_bytes(MARKER))
        except (FileNotFoundError, ValueError):
            found = None
        if found is None:
            keys = (stat.key for stat in self._store.list())
            _check_free(self._store.uri, keys, accepts, overwrite)
        self._continued = found == identity
        self._store.write_bytes(MARKER, json.dumps(identity).encode())
        if not self._continued:
            self._store.delete(s.key for s in self._store.list() if accepts.fullmatch(s.key))
        yield
        self._store.delete([MARKER])

    def has(self, key: str) -> bool:
        return self._continued and self._store.stat(key) is not None

    def write(self, key: str, data: bytes) -> None:
        self._store.write_bytes(key, data)


def _check_free(place: str, keys: Iterable[str], accepts: re.Pattern[str], overwrite: bool) -> None:
    """Refuse a folder with anything in it, or, to be overwritten, with anything of another kind."""
    for key in keys:
        if not overwrite:
            raise _exists(place)
        if not accepts.fullmatch(key):
            raise ConfigError(
                f"{place} holds {key}, which no export of this format writes: it is not "
                f"overwritten, choose another folder"
            )


def _files_below(folder: Path) -> Iterator[str]:
    """Yield everything that is lost with a folder: hidden files, too, which stores do not list."""
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        for name in itertools.chain(names, links):
            yield str(Path(parent, name).relative_to(folder))


def _exists(place: str) -> ConfigError:
    return ConfigError(f"{place} exists: choose another destination, or replace it by --overwrite")


@contextlib.contextmanager
def _told(place: str) -> Iterator[None]:
    """Tell a refusal of the operating system as a sentence about the destination."""
    try:
        yield
    except OSError as error:
        # Without a number it is not the system that speaks, but a library that reads the dataset.
        if error.errno is None:
            raise
        raise os_fault(error, place, writing=True) from error


@contextlib.contextmanager
def _locked(descriptor: int, place: str) -> Iterator[None]:
    """Hold the destination; the kernel lets go of it when this process ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StoreError(f"another export is writing to {place}: wait until it has ended") from None
    except OSError:
        # A file system without locks cannot tell; there is no other way to ask.
        pass
    yield


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(marker: Path) -> Any:
    try:
        return json.loads(marker.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
