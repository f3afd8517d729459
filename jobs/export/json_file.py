"""A JSON file with several long lists that grow at the same time, in bounded memory."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

_COPY_BYTES = 4 << 20


def to_json(value: Any) -> str:
    """Return a value as compact JSON; floats that are no numbers are refused."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


class JsonLists:
    """Collects the entries of some lists in files without a name.

    Parameters
    ----------
    folder : Path
        Where there is room for them.
    names : iterable of str
        The lists.
    """

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self._stack = contextlib.ExitStack()
        self._files: dict[str, IO[bytes]] = {}
        for name in names:
            file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - the stack closes it
            self._files[name] = self._stack.enter_context(file)

    def __enter__(self) -> JsonLists:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def extend(self, name: str, entries: Iterable[Any]) -> None:
        """Add entries to a list."""
        file = self._files[name]
        separator = b",\n" if file.tell() else b""
        for entry in entries:
            file.write(separator + to_json(entry).encode())
            separator = b",\n"

    def write(self, path: Path, others: Mapping[str, Any]) -> None:
        """Write an object of these lists and some other members.

        Parameters
        ----------
        path : Path
            The file.
        others : Mapping of str to value
            Members that come first.
        """
        with path.open("wb") as out:
            separator = b"{"
            for name, value in others.items():
                out.write(separator + f"{to_json(name)}: {to_json(value)}".encode())
                separator = b",\n"
            for name in self._files:
                out.write(separator + f"{to_json(name)}: ".encode())
                self._copy(name, out)
                separator = b",\n"
            out.write(b"}\n")

    def write_list(self, path: Path, name: str) -> None:
        """Write one of the lists, alone.

        Parameters
        ----------
        path : Path
            The file.
        name : str
            The list.
        """
        with path.open("wb") as out:
            self._copy(name, out)
            out.write(b"\n")

    def _copy(self, name: str, out: IO[bytes]) -> None:
        file = self._files[name]
        file.seek(0)
        out.write(b"[\n")
        shutil.copyfileobj(file, out, _COPY_BYTES)
        out.write(b"]")
