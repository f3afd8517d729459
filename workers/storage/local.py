"""A folder on a disk of this machine, or on one that every machine mounts at the same place.

Files become visible by a rename, and exclusively by a hard link, of a complete and synced file
with a dot-name in the same folder: both are atomic on POSIX file systems, NFS included.
"""

# ruff: noqa: D102, PTH102, PTH106, PTH108, PTH112, PTH116, PTH118, PTH120
# (contracts stand on Store; paths are strings here, since a folder may hold a million files)
from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from workers.errors import StoreError
from workers.storage.base import BLOCK_BYTES, ObjectStat, Store
from workers.storage.download import Download
from workers.storage.faults import os_fault

_COPY_BYTES = 4 << 20
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")
_MAX_MKDIR_RACES = 100


class LocalStore(Store):
    """A folder; see `Store`.

    Notes
    -----
    The operating system folds ``a//b`` into ``a/b`` and a disk cannot hold ``a`` beside ``a/b``;
    a key that would leave the root is refused. Folders that `delete` empties are removed.
    """

    def local_path(self, key: str) -> Path:
        """Return where `key` lies."""
        return Path(self._path(key))

    def _path(self, key: str) -> str:
        if not key or "\0" in key or ".." in key.split("/"):
            raise StoreError(f"{self.uri_of(key)!r} is not a place below {self.uri}: rename it")
        return self.uri_of(key)

    @contextlib.contextmanager
    def _faults(self, key: str, *, writing: bool = False) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise os_fault(error, self.uri_of(key), writing=writing) from error

    def read_bytes(self, key: str) -> bytes:
        with self._faults(key):
            return Path(self._path(key)).read_bytes()

    def read_range(self, key: str, start: int, stop: int, *, etag: str | None = None) -> bytes:
        with self._faults(key), Path(self._path(key)).open("rb") as file:
            file.seek(start)
            return file.read(max(0, stop - start))

    def open(self, key: str, *, block_size: int = BLOCK_BYTES) -> BinaryIO:
        with self._faults(key):
            return cast(BinaryIO, Path(self._path(key)).open("rb"))

    def get_file(
        self, key: str, local_path: str | Path, *, on_bytes: Callable[[int], None] | None = None
    ) -> None:
        offset = 0
        with self.open(key) as source, Download(local_path) as target:
            while chunk := self._read(source, key):
                target.write_at(offset, chunk)
                offset += len(chunk)
                if on_bytes is not None:
                    on_bytes(len(chunk))

    def _read(self, file: BinaryIO, key: str) -> bytes:
        with self._faults(key):
            return file.read(_COPY_BYTES)

    def write_bytes(self, key: str, data: bytes) -> None:
        with self._faults(key, writing=True), self._complete_file(key, data) as temporary:
            Path(temporary).replace(self._path(key))

    def put_file(
        self, local_path: str | Path, key: str, *, on_bytes: Callable[[int], None] | None = None
    ) -> None:
        try:
            source = Path(local_path).open("rb")  # noqa: SIM115 - closed below
        except OSError as error:
            raise os_fault(error, str(local_path), writing=False) from error
        with (
            source,
            self._faults(key, writing=True),
            self._complete_file(key, source, on_bytes) as temporary,
        ):
            Path(temporary).replace(self._path(key))

    def create(self, key: str, data: bytes) -> bool:
        with self._faults(key, writing=True), self._complete_file(key, data) as temporary:
            try:
                os.link(temporary, self._path(key))
            except FileExistsError:
                # Over NFS the reply to a link that was made can be lost and the call repeated;
                # the second name of our own file tells (open(2), under O_EXCL).
                return os.stat(temporary).st_nlink > 1
            except OSError as error:
                if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                    raise StoreError(
                        f"{self.uri} cannot create files exclusively: its file system has no hard "
                        "links; choose another place for the output"
                    ) from error
                raise
            return True

    @contextlib.contextmanager
    def _complete_file(
        self, key: str, content: bytes | BinaryIO, on_bytes: Callable[[int], None] | None = None
    ) -> Iterator[str]:
        """Yield a synced file with a dot-name in the folder of `key`; then sync that folder."""
        folder = os.path.dirname(self._path(key))
        temporary = os.path.join(folder, f".{uuid.uuid4().hex}.tmp")
        file = _open_new(folder, temporary)
        try:
            with file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    while chunk := content.read(_COPY_BYTES):
                        file.write(chunk)
                        if on_bytes is not None:
                            on_bytes(len(chunk))
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        _sync_folder(folder)

    def stat(self, key: str) -> ObjectStat | None:
        try:
            with self._faults(key):
                found = os.stat(self._path(key))
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(found.st_mode):
            return None
        return ObjectStat(key, found.st_size, None, found.st_mtime_ns)

    def list(self, prefix: str = "", *, start_after: str | None = None) -> Iterator[ObjectStat]:
        folder, slash, _ = prefix.rpartition("/")
        after = os.fsencode(start_after) if start_after is not None else b""
        yield from self._walk(folder + slash, os.fsencode(prefix), after, ())

    def _walk(
        self, folder: str, prefix: bytes, after: bytes, above: tuple[tuple[int, int], ...]
    ) -> Iterator[ObjectStat]:
        path = self._path(folder) if folder else self.uri
        try:
            with self._faults(folder):
                found = os.stat(path)
                # A link back to a folder above would list for ever.
                if (found.st_dev, found.st_ino) in above:
                    return
                with os.scandir(path) as entries:
                    children = [_Child(entry) for entry in entries if entry.name[0] != "."]
        except FileNotFoundError:
            return
        above = (*above, (found.st_dev, found.st_ino))
        start = os.fsencode(folder)
        # As keys compare: a folder's own keys all continue with a slash.
        for child in sorted(children, key=lambda child: child.tail):
            key = start + child.tail
            if child.is_folder:
                agrees = key.startswith(prefix) or prefix.startswith(key)
                if agrees and (key > after or after.startswith(key)):
                    yield from self._walk(os.fsdecode(key), prefix, after, above)
            elif key.startswith(prefix) and key > after:
                listed = self.stat(os.fsdecode(key))
                if listed is not None:
                    yield listed

    def delete(self, keys: Iterable[str]) -> None:
        folders = set()
        for key in keys:
            path = self._path(key)
            try:
                with self._faults(key):
                    os.unlink(path)
            except FileNotFoundError:
                continue
            folders.add(os.path.dirname(path))
        for folder in sorted(folders, key=len, reverse=True):
            self._remove_empty(folder)

    def sweep(self, *, older_than_s: float = 86_400) -> int:
        num_removed = 0
        newest = time.time() - older_than_s
        for folder, _, names in os.walk(self.uri):
            for name in filter(_TEMPORARY.fullmatch, names):
                path = os.path.join(folder, name)
                with contextlib.suppress(FileNotFoundError), self._faults(path, writing=True):
                    if os.stat(path).st_mtime <= newest:
                        os.unlink(path)
                        num_removed += 1
        return num_removed

    def _remove_empty(self, folder: str) -> None:
        while len(folder) > len(self.uri):
            try:
                os.rmdir(folder)
            except OSError:
                return
            folder = os.path.dirname(folder)


class _Child:
    """One entry of a folder, as it takes part in keys."""

    __slots__ = ("is_folder", "tail")

    def __init__(self, entry: os.DirEntry[str]) -> None:
        try:
            self.is_folder = entry.is_dir()
        except OSError:
            self.is_folder = False
        self.tail = os.fsencode(entry.name) + (b"/" if self.is_folder else b"")


def _open_new(folder: str, path: str) -> BinaryIO:
    """Open a new file, making its folder; a `delete` elsewhere may remove the folder meanwhile."""
    for _ in range(_MAX_MKDIR_RACES):
        try:
            return cast(BinaryIO, Path(path).open("xb"))
        except FileNotFoundError:
            _make_folders(folder)
    return cast(BinaryIO, Path(path).open("xb"))


def _make_folders(folder: str) -> None:
    """Make a folder and those above it, each synced into its parent so that it survives."""
    parent = os.path.dirname(folder)
    if not os.path.isdir(parent) and parent != folder:
        _make_folders(parent)
    with contextlib.suppress(FileExistsError, FileNotFoundError):
        os.mkdir(folder)
        _sync_folder(parent)


def _sync_folder(folder: str) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems cannot sync a folder; there is no other way to ask.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
