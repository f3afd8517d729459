"""A dictionary on disk: what ids in a JSON file stand for, however many there are."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from types import TracebackType
from typing import Any


class Lookup:
    """Values by id, each written once; a context manager that closes its file.

    Parameters
    ----------
    path : Path
        A file that is not there yet, which the caller deletes.
    """

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path)
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("PRAGMA synchronous = OFF")
        self._database.execute("CREATE TABLE entries (id TEXT PRIMARY KEY, value) WITHOUT ROWID")

    def __enter__(self) -> Lookup:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._database.close()

    def add(self, key: Any, value: Any) -> None:
        """Keep a JSON value; KeyError when the id, a JSON value too, has one already."""
        try:
            self._database.execute(
                "INSERT INTO entries VALUES (?, ?)", (_text(key), json.dumps(value))
            )
        except sqlite3.IntegrityError:
            raise KeyError(key) from None

    def get(self, key: Any) -> Any:
        """Return the value of an id; None when there is none."""
        row = self._database.execute(
            "SELECT value FROM entries WHERE id = ?", (_text(key),)
        ).fetchone()
        return None if row is None else json.loads(row[0])


def _text(key: Any) -> str:
    # Tables that went through a spreadsheet or pandas write 7 as 7.0.
    whole = isinstance(key, float) and key.is_integer()
    return json.dumps(int(key) if whole else key)
