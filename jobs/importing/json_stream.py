"""JSON files larger than memory, read piece by piece."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import ijson

from workers.errors import ConfigError

_BUFFER_BYTES = 1 << 20
_END = object()

T = TypeVar("T")


class JsonFile:
    """One JSON file on this machine's disk.

    Parameters
    ----------
    path : Path
        Where it lies.
    name : str
        How the user knows it, for messages.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name

    def objects(self, key: str) -> Iterator[dict[str, Any]]:
        """Yield the objects in one of the top-level arrays; a key that is not there has none.

        Parameters
        ----------
        key : str
            The array, such as ``annotations``; empty for a file that is an array itself.

        Raises
        ------
        ConfigError
            The file is broken, or an entry is no object.
        """
        return self._items(key, dict)

    def lists(self, key: str) -> Iterator[list[Any]]:
        """Yield the arrays in one of the top-level arrays, as `objects` does its objects."""
        return self._items(key, list)

    def values(self, keys: Collection[str]) -> dict[str, Any]:
        """Return the values of some top-level keys, in one pass; those that are missing are not.

        Raises
        ------
        ConfigError
            The file is broken, or no object at its top.
        """
        found: dict[str, Any] = {}
        builder: ijson.ObjectBuilder | None = None
        key = ""
        try:
            with self.path.open("rb") as file:
                events = ijson.parse(file, use_float=True, buf_size=_BUFFER_BYTES)
                for prefix, event, value in events:
                    if builder is not None:
                        if prefix == "" and event in ("map_key", "end_map"):
                            found[key], builder = builder.value, None
                        else:
                            builder.event(event, value)
                    if prefix == "" and event == "map_key" and value in keys:
                        key, builder = value, ijson.ObjectBuilder()
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise self._broken(error) from error
        return found

    def starts_with_array(self) -> bool:
        """Tell whether the file is an array, and not an object."""
        with self.path.open("rb") as file:
            return file.read(64).lstrip()[:1] == b"["

    def place(self, what: str) -> str:
        """Return where something is, as a person would look for it."""
        return f"{what} in {self.name}"

    def _items(self, key: str, kind: type[T]) -> Iterator[T]:
        with self.path.open("rb") as file:
            found = ijson.items(
                file, f"{key}.item" if key else "item", use_float=True, buf_size=_BUFFER_BYTES
            )
            for number in itertools.count():
                try:
                    item = next(found, _END)
                except (ijson.JSONError, UnicodeDecodeError) as error:
                    raise self._broken(error) from error
                if item is _END:
                    return
                if not isinstance(item, kind):
                    wanted = "object" if kind is dict else "array"
                    raise ConfigError(
                        f"entry {number} of {key or 'the list'} in {self.name} is no JSON "
                        f"{wanted}, but {str(item)[:40]!r}: export it again"
                    )
                yield item

    def _broken(self, error: Exception) -> ConfigError:
        # The parser shows the place in further lines, which may be a piece of counts.
        reason = " ".join(str(error).split("\n")[0].split())[:120]
        return ConfigError(
            f"{self.name} is no whole JSON file ({reason}): it may be cut off, so copy or export "
            f"it again"
        )


def field(item: Mapping[str, Any], name: str, place: str) -> Any:
    """Return a field that must be there.

    Parameters
    ----------
    item : Mapping
        A JSON object.
    name : str
        The field.
    place : str
        Where the object is, for the message.

    Returns
    -------
    Any
        Its value, never None.

    Raises
    ------
    ConfigError
        It is missing or null.
    """
    value = item.get(name)
    if value is None:
        raise ConfigError(f"{place} has no {name}: export it again with that field")
    return value
