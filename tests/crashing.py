"""A store that dies: for tests that crash a driver at every write of a history.

`CrashingStore` counts writes (`write_bytes`, `put_file`, `create`, `delete`) of the store it
wraps and, at the k-th, raises `Crashed` before or after doing it. From then on every operation,
reads too, raises: a dead process does nothing more, also not in its clean-up code.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from workers.storage import ObjectStat, Store


class Crashed(BaseException):
    """The process died here. Not an Exception, so that no handler of the product survives it."""


class CrashingStore(Store):
    """A store that dies at its k-th write.

    Parameters
    ----------
    store : Store
        The store that keeps the data.
    die_after : int or None
        1-based number of the write at which it dies; None only counts.
    performed : bool
        Whether that write still happens.

    Attributes
    ----------
    num_writes : int
        Writes begun so far.
    log : list of (str, str)
        Verb and key of each.
    """

    def __init__(
        self, store: Store, die_after: int | None = None, *, performed: bool = False
    ) -> None:
        super().__init__(store.uri, store.options)
        self._inner = store
        self.num_writes = 0
        self.log: list[tuple[str, str]] = []
        self._die_after = die_after
        self._performed = performed
        self._dead = False
        self._lock = threading.Lock()

    def _alive(self) -> None:
        if self._dead:
            raise Crashed

    def _write(self, verb: str, key: str, call: Any) -> Any:
        with self._lock:
            self._alive()
            self.num_writes += 1
            self.log.append((verb, key))
            dies = self.num_writes == self._die_after
            self._dead = dies
        if dies and not self._performed:
            raise Crashed
        result = call()
        if dies:
            raise Crashed
        return result

    def write_bytes(self, key: str, data: bytes) -> None:
        """Overwrite one object; may die."""
        self._write("write_bytes", key, lambda: self._inner.write_bytes(key, data))

    def put_file(
        self, local_path: str | Path, key: str, *, on_bytes: Callable[[int], None] | None = None
    ) -> None:
        """Upload one file; may die."""
        self._write(
            "put_file", key, lambda: self._inner.put_file(local_path, key, on_bytes=on_bytes)
        )

    def create(self, key: str, data: bytes) -> bool:
        """Create one object if absent; may die."""
        return bool(self._write("create", key, lambda: self._inner.create(key, data)))

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects one by one, each a write, so that a crash may leave some; may die."""
        for key in keys:
            self._write("delete", key, functools.partial(self._inner.delete, [key]))

    def read_bytes(self, key: str) -> bytes:
        """Read one object."""
        self._alive()
        return self._inner.read_bytes(key)

    def read_range(self, key: str, start: int, stop: int, *, etag: str | None = None) -> bytes:
        """Read a part of one object."""
        self._alive()
        return self._inner.read_range(key, start, stop, etag=etag)

    def local_path(self, key: str) -> Path | None:
        """Return where an object lies on this machine's disk."""
        return self._inner.local_path(key)

    def stat(self, key: str) -> ObjectStat | None:
        """Look at one object."""
        self._alive()
        return self._inner.stat(key)

    def list(self, prefix: str = "", *, start_after: str | None = None) -> Iterator[ObjectStat]:
        """List objects."""
        self._alive()
        return self._inner.list(prefix, start_after=start_after)

    def get_file(
        self, key: str, local_path: str | Path, *, on_bytes: Callable[[int], None] | None = None
    ) -> None:
        """Download one object."""
        self._alive()
        self._inner.get_file(key, local_path, on_bytes=on_bytes)
