"""The store interface, and how its places are named."""

from __future__ import annotations

import io
import re
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from workers.errors import ConfigError
from workers.messages import StoreOptions

BLOCK_BYTES = 1 << 20
"""Default size of one ranged read, in bytes."""

_CACHED_BLOCKS = 8
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SECRET = re.compile(r"^[^/@]*:[^/@]*@")


@dataclass(frozen=True, slots=True)
class ObjectStat:
    """What a store tells about one object.

    Attributes
    ----------
    key : str
        Key below the store's root, verbatim.
    size_bytes : int
        Size of the content.
    etag : str or None
        Entity tag without its quotes; None where the store has none.
    mtime_ns : int or None
        Time of the last change, in nanoseconds since 1970; None where the store tells none.
    """

    key: str
    size_bytes: int
    etag: str | None = None
    mtime_ns: int | None = None

    @property
    def mtime_s(self) -> float | None:
        """Time of the last change, in seconds since 1970."""
        return None if self.mtime_ns is None else self.mtime_ns / 1e9

    def identity(self) -> str:
        """Return what changes when the content does: the etag, else ``size-mtime_ns``."""
        return self.etag or f"{self.size_bytes}-{self.mtime_ns or 0}"


class Store(ABC):
    """One root, and objects below it by key.

    A key is any text without a leading meaning: it is never unquoted, normalised or listed from
    a cache. Every fault is one of `StoreDenied`, `StoreFull`, `StoreUnavailable`, another
    `StoreError`, or FileNotFoundError, each with one sentence that names the URI. Stores hold no
    connection before their first use, pickle as their URI and options, and may be shared between
    threads. All writing goes through `write_bytes`, `put_file`, `create` and `delete`.

    Parameters
    ----------
    uri : str
        Root; stored in canonical form, without a trailing slash.
    options : StoreOptions or None
        How to reach it.

    Attributes
    ----------
    uri : str
        Canonical root.
    options : StoreOptions
        As given.
    """

    def __init__(self, uri: str, options: StoreOptions | None = None) -> None:
        self.uri = canonical_uri(uri)
        self.options = options or StoreOptions()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"

    def __reduce__(self) -> tuple[type[Store], tuple[str, StoreOptions]]:
        return type(self), (self.uri, self.options)

    def uri_of(self, key: str) -> str:
        """Return the full URI of an object.

        Parameters
        ----------
        key : str
            The object.

        Returns
        -------
        str
            Root and key, the key verbatim.
        """
        return f"{self.uri.rstrip('/')}/{key}"

    def local_path(self, key: str) -> Path | None:
        """Return where an object lies on this machine's disk.

        Parameters
        ----------
        key : str
            The object, which need not exist.

        Returns
        -------
        Path or None
            None for a store that is not a local folder.
        """
        return None

    @abstractmethod
    def read_bytes(self, key: str) -> bytes:
        """Return the whole content of an object.

        Parameters
        ----------
        key : str
            The object.

        Returns
        -------
        bytes
            Its content.

        Raises
        ------
        FileNotFoundError
            There is no such object.
        """

    @abstractmethod
    def write_bytes(self, key: str, data: bytes) -> None:
        """Write an object, replacing what was there; nobody ever sees a part of it.

        Parameters
        ----------
        key : str
            The object.
        data : bytes
            Its whole content.
        """

    @abstractmethod
    def put_file(
        self, local_path: str | Path, key: str, *, on_bytes: Callable[[int], None] | None = None
    ) -> None:
        """Write a local file as an object, replacing what was there; never seen in part.

        Parameters
        ----------
        local_path : str or Path
            The file; it stays.
        key : str
            The object.
        on_bytes : callable, optional
            Called with the number of bytes that were sent since its last call; small files are
            one call, after they have arrived.
        """

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Write an object only if it does not exist.

        Parameters
        ----------
        key : str
            The object.
        data : bytes
            Its whole content.

        Returns
        -------
        bool
            True when this call made it, False when it existed already. After a lost response a
            retry inside can answer False for our own write: who must know reads the key.

        Raises
        ------
        StoreError
            The store says that it cannot create on this condition. A store that silently ignores
            the condition is only found by `probe_store`.
        """

    @abstractmethod
    def stat(self, key: str) -> ObjectStat | None:
        """Return what the store knows about an object now; the answer is never a cached one.

        Parameters
        ----------
        key : str
            The object.

        Returns
        -------
        ObjectStat or None
            None when there is no such object.
        """

    @abstractmethod
    def list(self, prefix: str = "", *, start_after: str | None = None) -> Iterator[ObjectStat]:
        """Yield all objects whose key starts with `prefix`, at any depth, ordered by key.

        Parameters
        ----------
        prefix : str
            Start of the keys, as text: ``a/b`` matches ``a/b.mp4`` and ``a/b/c.mp4``.
        start_after : str or None
            Only keys behind this one.

        Yields
        ------
        ObjectStat
            Ordered by the UTF-8 bytes of the key. A prefix without objects yields nothing. On a
            local disk names that start with a dot are left out below the prefix, links are
            followed, and sockets and devices are ignored.
        """

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; those that do not exist are fine.

        Parameters
        ----------
        keys : iterable of str
            The objects.
        """

    def sweep(self, *, older_than_s: float = 86_400) -> int:
        """Remove what killed writers left where no listing shows it.

        Parameters
        ----------
        older_than_s : float
            Younger leftovers stay: their writer may be alive.

        Returns
        -------
        int
            How many were removed: temporary files of a disk, unfinished uploads of a bucket.
        """
        return 0

    @abstractmethod
    def read_range(self, key: str, start: int, stop: int, *, etag: str | None = None) -> bytes:
        """Return bytes ``[start, stop)`` of `key`, fewer where the object ends earlier.

        Parameters
        ----------
        key : str
            The object.
        start, stop : int
            Half-open range of bytes; an empty one returns nothing.
        etag : str or None
            When given and the store can tell, a changed object is StoreUnavailable: what was
            read before does not fit what comes now.
        """

    def open(self, key: str, *, block_size: int = BLOCK_BYTES) -> BinaryIO:
        """Open `key` for reading at any position, fetching only the blocks that are touched.

        Parameters
        ----------
        key : str
            The object.
        block_size : int
            Bytes per request.

        Returns
        -------
        BinaryIO
            Seekable; the caller closes it. It keeps a few blocks, so a container header at the
            front and an index at the back cost a handful of requests.
        """
        found = self.stat(key)
        if found is None:
            raise FileNotFoundError(f"{self.uri_of(key)} does not exist")
        return cast(BinaryIO, RangedReader(self, found, block_size))

    @abstractmethod
    def get_file(
        self, key: str, local_path: str | Path, *, on_bytes: Callable[[int], None] | None = None
    ) -> None:
        """Download `key` to the file `local_path`.

        Parameters
        ----------
        key : str
            The object.
        local_path : str or Path
            Written in place and removed again when the download fails.
        on_bytes : callable or None
            Called in the calling thread with the number of bytes that arrived since its last
            call. What it raises ends the download and is passed on.
        """


class RangedReader(io.RawIOBase):
    """A seekable file over ranged reads of one object, with a small cache of blocks.

    Parameters
    ----------
    store : Store
        Where the object is.
    stat : ObjectStat
        The object; its etag pins the content, so a replaced object is noticed.
    block_size : int
        Bytes per request.
    """

    def __init__(self, store: Store, stat: ObjectStat, block_size: int = BLOCK_BYTES) -> None:
        super().__init__()
        self._store = store
        self._stat = stat
        self._block_size = block_size
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._position = 0
        self.name = store.uri_of(stat.key)

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position, in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to `offset` bytes from the start, the position or the end; return the position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._stat.size_bytes}
        position = base[whence] + offset
        if position < 0:
            raise ValueError(f"cannot seek to byte {position} of {self.name}")
        self._position = position
        return position

    def readinto(self, buffer: object) -> int:
        """Fill `buffer` from the position; return how many bytes it got, 0 at the end."""
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        filled = 0
        while filled < len(view):
            number, offset = divmod(self._position, self._block_size)
            if self._position >= self._stat.size_bytes:
                break
            piece = self._block(number)[offset : offset + len(view) - filled]
            if not piece:
                break
            view[filled : filled + len(piece)] = piece
            filled += len(piece)
            self._position += len(piece)
        return filled

    def _block(self, number: int) -> bytes:
        block = self._blocks.get(number)
        if block is None:
            start = number * self._block_size
            stop = min(start + self._block_size, self._stat.size_bytes)
            block = self._store.read_range(self._stat.key, start, stop, etag=self._stat.etag)
            self._blocks[number] = block
            if len(self._blocks) > _CACHED_BLOCKS:
                self._blocks.popitem(last=False)
        else:
            self._blocks.move_to_end(number)
        return block


def canonical_uri(text: str) -> str:
    """Return the one spelling of a location.

    Parameters
    ----------
    text : str
        A path, absolute or not, or a URL. Keys are taken verbatim: nothing is unquoted.

    Returns
    -------
    str
        Local: absolute, ``file://`` stripped, links not resolved. Remote: scheme in lower case
        (``s3a`` and ``s3n`` are ``s3``). Neither ends with a slash, but for the root ``/``.

    Raises
    ------
    ConfigError
        Empty, without a bucket, or with a secret inside.
    """
    if not text.strip():
        raise ConfigError("a location is empty: give a folder or a URL such as s3://bucket/prefix")
    match = _SCHEME.match(text)
    scheme = match[1].lower() if match else "file"
    rest = text[match.end() :] if match else text
    if scheme in ("file", "local"):
        path = Path(rest).expanduser()
        # Not resolve(): a link is part of the name that the user chose.
        parts: list[str] = []
        for part in path.absolute().parts[1:]:
            if part == "..":
                del parts[-1:]
            else:
                parts.append(part)
        return "/" + "/".join(parts)
    if _SECRET.match(rest):
        raise ConfigError(
            f"the {scheme} URL ending in @{rest.partition('@')[2]} holds a password: give secrets "
            "through the environment, never in a URL"
        )
    if not rest.strip("/") or (rest.startswith("/") and scheme != "memory"):
        raise ConfigError(f"{text} names no bucket: write {scheme}://bucket/prefix")
    scheme = "s3" if scheme in ("s3a", "s3n") else scheme
    return f"{scheme}://{rest.rstrip('/')}"


def split_uri(uri: str) -> tuple[str, str]:
    """Split a location into the root of its store and the key below it.

    Parameters
    ----------
    uri : str
        As for `canonical_uri`.

    Returns
    -------
    root : str
        ``scheme://bucket``, or ``/`` for local paths.
    key : str
        Verbatim, trailing slashes kept; empty when `uri` is a bucket.
    """
    canonical = canonical_uri(uri)
    # The key's own trailing slashes say "below this", and are not part of a root.
    slashes = uri[len(uri.rstrip("/")) :]
    if "://" not in canonical:
        key = canonical.lstrip("/")
        return "/", f"{key}/" if key and slashes else key
    scheme, _, rest = canonical.partition("://")
    bucket, slash, key = rest.lstrip("/").partition("/")
    return f"{scheme}://{bucket}", key + slashes if slash else ""
