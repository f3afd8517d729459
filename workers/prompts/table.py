"""Prompts from a file: JSONL, CSV or Parquet, one prompt per row.

A file is refused as a whole when it cannot be read (`ConfigError`: wrong JSON, no column `video`,
a misspelt column). A fault in one row concerns only its video: it surfaces as `InputError` when
that video's prompts are asked for, so the others run. Rows stay columnar, or as the bytes of the
file, until somebody asks: a million of them cost their bytes and two integers each.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from workers import rle
from workers.errors import ConfigError, InputError
from workers.messages import Prompt, StoreOptions
from workers.storage import open_store, split_uri

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = (
    "video",
    "frame_idx",
    "time_s",
    "object_id",
    "label",
    "box_xyxy",
    "points",
    "point_labels",
    "mask_rle",
    "mask",
    "mask_value",
)
"""Every column a prompts file may have; `video` it must have."""

KINDS = ("box_xyxy", "points", "mask_rle", "mask")
"""The columns that say what is prompted; a row has exactly one of them."""

MAX_OBJECT_ID = 2**31 - 1
MAX_MASK_SIDE = 2**15 - 1


class PromptTable:
    """The prompts of a whole corpus, looked up by video.

    Parameters
    ----------
    uri : str
        The file, for messages and for relative mask images.
    rows : Rows
        Its rows.
    options : StoreOptions or None
        How to reach mask images.
    data : bytes
        The file as it was read.

    Attributes
    ----------
    uri, data : str, bytes
        The file, and what was in it.
    names : list of str
        The distinct values of `video`, verbatim, in order of first appearance.
    """

    def __init__(
        self, uri: str, rows: Rows, options: StoreOptions | None = None, data: bytes = b""
    ) -> None:
        self.uri = uri
        self.data = data
        self.names = rows.names
        self._rows = rows
        self._options = options
        # Rows of one video, in their order in the file: _order[_starts[code]:_starts[code + 1]].
        self._order = np.argsort(rows.codes, kind="stable")
        counts = np.bincount(rows.codes, minlength=len(self.names))
        self._starts = np.concatenate(([0], np.cumsum(counts)))
        self._codes = {name: code for code, name in enumerate(self.names)}
        self._listed: dict[tuple[str, str], dict[str, str]] = {}

    def __len__(self) -> int:
        return len(self._order)

    def __repr__(self) -> str:
        return f"PromptTable({self.uri!r}, rows={len(self)}, videos={len(self.names)})"

    def labels(self) -> list[str]:
        """Return the distinct labels, sorted."""
        return self._rows.labels()

    def prompts_for(self, name: str) -> tuple[Prompt, ...]:
        """Return the prompts of one video, in the order of the file.

        Parameters
        ----------
        name : str
            A value of `names`; any other has no prompts.

        Returns
        -------
        tuple of Prompt
            All with an object id: rows without one are objects of their own, numbered from 1 in
            the order of the file, past the ids that other rows of the video give.

        Raises
        ------
        InputError
            A row of this video cannot be used; one sentence that names row and fault.
        """
        parsed: list[tuple[int, Prompt]] = []
        for number, row in self._rows_of(name):
            try:
                parsed.append((number, self._parse(row)))
            except ValueError as error:
                place = self._rows.place(number)
                raise InputError(f"{place} of {self.uri}, video {name}: {error}") from error
        prompts = _numbered([prompt for _, prompt in parsed])
        seen: dict[tuple[int | None, int | None, int | None], int] = {}
        for (number, _), prompt in zip(parsed, prompts, strict=True):
            key = (prompt.object_id, prompt.frame_idx, prompt.time_us)
            if key in seen:
                raise InputError(
                    f"{self._rows.place(number)} of {self.uri}, video {name}: object "
                    f"{prompt.object_id} is prompted again on the same frame, as in "
                    f"{self._rows.place(seen[key])}: keep one of the two"
                )
            seen[key] = number
        return tuple(prompts)

    def digest(self, name: str) -> str:
        """Return a hash of one video's prompts, faulty ones included.

        It covers the content of the rows whatever their order (where rows give no object id, the
        order numbers the objects and counts), and the etags of mask images, for which their
        folders are listed once.

        Parameters
        ----------
        name : str
            A value of `names`.

        Returns
        -------
        str
            32 hex digits.
        """
        lines = []
        unnumbered = 0
        for _, row in self._rows_of(name):
            content = {k: v for k, v in row.items() if v is not None and k != "video"}
            if "object_id" not in content:
                unnumbered += 1
                content["object_id"] = f"#{unnumbered}"
            if isinstance(content.get("mask"), str):
                content["mask_identity"] = self._identity(self._mask_uri(content["mask"]))
            lines.append(json.dumps(content, sort_keys=True, default=_as_text))
        text = "\n".join(sorted(lines))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    # -- private -----------------------------------------------------------------------------

    def _rows_of(self, name: str) -> Iterable[tuple[int, Mapping[str, Any]]]:
        code = self._codes.get(name)
        if code is None:
            return []
        numbers = self._order[self._starts[code] : self._starts[code + 1]]
        return zip(numbers.tolist(), self._rows.take(numbers), strict=True)

    def _parse(self, row: Mapping[str, Any]) -> Prompt:
        """Return the prompt of a row; ValueError says what is wrong with it."""
        kinds = [name for name in KINDS if row.get(name) is not None]
        if len(kinds) != 1:
            raise ValueError(
                f"a prompt needs exactly one of {', '.join(KINDS)}, this one has "
                f"{' and '.join(kinds) or 'none'}"
            )
        frame_idx = _integer(row, "frame_idx", 0, 2**31 - 1)
        time_s = _number(row, "time_s")
        if (frame_idx is None) == (time_s is None):
            raise ValueError(
                "a prompt is placed by frame_idx or by time_s, this one has "
                + ("neither" if frame_idx is None else "both: leave one empty")
            )
        if time_s is not None and not 0 <= time_s < 1e9:
            raise ValueError(f"time_s must be 0 or later, in seconds, got {time_s}")
        label = row.get("label")
        prompt: dict[str, Any] = {
            "object_id": _integer(row, "object_id", 1, MAX_OBJECT_ID),
            "frame_idx": frame_idx,
            "time_us": None if time_s is None else round(time_s * 1e6),
            "label": None if label is None else str(label),
        }
        for name, owner in (("point_labels", "points"), ("mask_value", "mask")):
            if row.get(name) is not None and kinds != [owner]:
                raise ValueError(f"{name} belongs to {owner}, but this prompt has {kinds[0]}")
        if kinds == ["box_xyxy"]:
            prompt["box_xyxy"] = _box(row["box_xyxy"])
        elif kinds == ["points"]:
            points = _points(row["points"])
            prompt["points_xy"] = points
            prompt["point_labels"] = _point_labels(row.get("point_labels"), len(points))
        elif kinds == ["mask_rle"]:
            prompt["mask_rle"] = _mask_rle(row["mask_rle"])
        else:
            if not isinstance(row["mask"], str):
                raise ValueError(f"mask must be the path of a picture, got {row['mask']!r}")
            prompt["mask_uri"] = self._mask_uri(row["mask"])
            prompt["mask_value"] = _integer(row, "mask_value", 1, 2**16 - 1)
        return Prompt(source="file", **prompt)

    def _mask_uri(self, text: str) -> str:
        """Return the URI of a mask image; relative ones start at the prompts file."""
        if "://" in text or text.startswith(("/", "~")):
            return text
        return f"{self.uri.rpartition('/')[0]}/{text}"

    def _identity(self, uri: str) -> str:
        """Return what changes when a mask image does; empty when it is not there."""
        root, key = split_uri(uri)
        folder = key.rpartition("/")[0]
        above = [folder[:i] for i, c in enumerate(folder) if c == "/"] + [folder]
        for listed in above:
            if (root, listed) in self._listed:
                return self._listed[root, listed].get(key, "")
        prefix = f"{folder}/" if folder else ""
        found = open_store(root, self._options).list(prefix)
        self._listed[root, folder] = {stat.key: stat.identity() for stat in found}
        return self._listed[root, folder].get(key, "")


class Rows(ABC):
    """The rows of a prompts file as they were read, before anything in them is judged.

    Attributes
    ----------
    names : list of str
        Distinct videos, in order of first appearance.
    codes : ndarray of int, shape (rows,)
        Position in `names` of each row's video.
    """

    names: list[str]
    codes: NDArray[Any]

    @abstractmethod
    def take(self, numbers: NDArray[Any]) -> list[dict[str, Any]]:
        """Return some rows as mappings of column to raw value, null for what is empty."""

    @abstractmethod
    def labels(self) -> list[str]:
        """Return the distinct labels, sorted."""

    @abstractmethod
    def place(self, number: int) -> str:
        """Return where a row is, as a person would look for it."""


class JsonRows(Rows):
    """Rows of a JSONL file: its bytes, and where each line lies in them.

    Parameters
    ----------
    data : bytes
        The file.
    uri : str
        For messages.
    """

    def __init__(self, data: bytes, uri: str) -> None:
        self._data = data
        self.names = []
        labels: set[str] = set()
        known: dict[str, int] = {}
        codes: list[int] = []
        starts: list[int] = []
        lines: list[int] = []
        start = 3 if data.startswith(b"\xef\xbb\xbf") else 0
        columns = frozenset(COLUMNS)
        line = 0
        while start < len(data):
            line += 1
            end = data.find(b"\n", start)
            end = len(data) if end < 0 else end
            text = data[start:end]
            if not text.isspace() and text:
                try:
                    row = json.loads(text)
                except ValueError as error:
                    raise ConfigError(
                        f"line {line} of the prompts file {uri} is not JSON: "
                        f"{_json_fault(error)}; write one JSON object per line"
                    ) from error
                if not isinstance(row, dict):
                    raise ConfigError(
                        f"line {line} of the prompts file {uri} is no JSON object: write "
                        f'{{"video": ..., "frame_idx": ..., "box_xyxy": [...]}}'
                    )
                if not row.keys() <= columns:
                    raise _unknown_column(row, uri, f"line {line}")
                name = row.get("video")
                if not isinstance(name, str) or not name:
                    raise ConfigError(
                        f"line {line} of the prompts file {uri} names no video: give its path "
                        f"below the corpus in the column video"
                    )
                codes.append(known.setdefault(name, len(known)))
                starts.append(start)
                lines.append(line)
                if row.get("label") is not None:
                    labels.add(str(row["label"]))
            start = end + 1
        self.names = list(known)
        self.codes = np.array(codes, np.int32)
        self._starts = np.array(starts, np.int64)
        self._lines = np.array(lines, np.int32)
        self._labels = sorted(labels)

    def take(self, numbers: NDArray[Any]) -> list[dict[str, Any]]:
        """Return some rows as mappings of column to raw value."""
        rows = []
        for start in self._starts[numbers].tolist():
            end = self._data.find(b"\n", start)
            rows.append(json.loads(self._data[start : len(self._data) if end < 0 else end]))
        return rows

    def labels(self) -> list[str]:
        """Return the distinct labels, sorted."""
        return self._labels

    def place(self, number: int) -> str:
        """Return where a row is, as a person would look for it."""
        return f"line {self._lines[number]}"


class ArrowRows(Rows):
    """Rows of a CSV or Parquet file.

    Parameters
    ----------
    table : pyarrow.Table
        Known columns only.
    uri : str
        For messages.
    """

    def __init__(self, table: pa.Table, uri: str) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        self._table = table.combine_chunks()
        column = self._table["video"]
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            column = column.cast(pa.string())
        nameless = pc.or_kleene(column.is_null(), pc.equal(column, ""))
        if len(column) and (number := pc.index(nameless, True).as_py()) >= 0:
            raise ConfigError(
                f"row {number + 1} of the prompts file {uri} names no video: give its path below "
                f"the corpus in the column video"
            )
        encoded = column.combine_chunks().dictionary_encode()
        self.names = encoded.dictionary.to_pylist()
        self.codes = encoded.indices.to_numpy(zero_copy_only=False)

    def take(self, numbers: NDArray[Any]) -> list[dict[str, Any]]:
        """Return some rows as mappings of column to raw value."""
        rows: list[dict[str, Any]] = self._table.take(numbers).to_pylist()
        return rows

    def labels(self) -> list[str]:
        """Return the distinct labels, sorted."""
        if "label" not in self._table.column_names:
            return []
        found = self._table["label"].unique().to_pylist()
        return sorted(str(label) for label in found if label is not None)

    def place(self, number: int) -> str:
        """Return where a row is, as a person would look for it."""
        return f"row {number + 1}"


def read_prompts(uri: str, options: StoreOptions | None = None) -> PromptTable:
    """Read a prompts file.

    Parameters
    ----------
    uri : str
        Path or URL; the ending says what it is: ``.jsonl`` or ``.ndjson``, ``.csv``,
        ``.parquet``.
    options : StoreOptions, optional
        How to reach the store.

    Returns
    -------
    PromptTable
        Faults of single rows are kept for `PromptTable.prompts_for`.

    Raises
    ------
    ConfigError
        The file is missing, of another kind, or unreadable as a whole.

    Notes
    -----
    Columns: `video`; `frame_idx` (0-based) or `time_s`; optionally `object_id` and `label`; and
    one of `box_xyxy` (x0, y0, x1, y1), `points` ([[x, y], ...], optionally with `point_labels`, 1
    foreground and 0 background), `mask_rle` ({"size": [H, W], "counts": compressed counts}),
    `mask` (path of a picture, relative to this file, optionally with `mask_value`). Coordinates
    are pixels of the original frame. CSV writes lists as JSON, or numbers with commas or blanks.
    """
    ending = uri.rpartition(".")[2].lower()
    if ending not in _READERS:
        raise ConfigError(
            f"the prompts file {uri} is neither JSONL, CSV nor Parquet: name it .jsonl, .csv or "
            f".parquet"
        )
    root, key = split_uri(uri)
    store = open_store(root, options)
    try:
        data = store.read_bytes(key)
    except FileNotFoundError as error:
        raise ConfigError(f"the prompts file {uri} does not exist") from error
    return PromptTable(store.uri_of(key), _READERS[ending](data, uri), options, data)


def _read_csv(data: bytes, uri: str) -> Rows:
    import pyarrow as pa
    from pyarrow import csv

    try:
        table = csv.read_csv(
            io.BytesIO(data),
            # Only the serial reader knows in which row a fault is.
            read_options=csv.ReadOptions(use_threads=False),
            parse_options=csv.ParseOptions(newlines_in_values=True),
            # Every cell is text first: what is wrong with one is the fault of its row only.
            convert_options=csv.ConvertOptions(
                column_types=dict.fromkeys(COLUMNS, pa.string()),
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
    except pa.ArrowInvalid as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"the prompts file {uri} is no readable CSV: {reason}") from error
    _check_columns(table.column_names, uri)
    return ArrowRows(table, uri)


def _read_parquet(data: bytes, uri: str) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"the prompts file {uri} is no readable Parquet: {reason}") from error
    _check_columns(table.column_names, uri)
    return ArrowRows(table, uri)


_READERS: Mapping[str, Callable[[bytes, str], Rows]] = {
    "jsonl": JsonRows,
    "ndjson": JsonRows,
    "csv": _read_csv,
    "parquet": _read_parquet,
}


def _check_columns(columns: Sequence[str], uri: str) -> None:
    if set(columns) - set(COLUMNS):
        raise _unknown_column(columns, uri, "the header")
    if "video" not in columns:
        raise ConfigError(f"the prompts file {uri} has no column video, only {', '.join(columns)}")
    if len(set(columns)) != len(columns):
        twice = next(c for c in columns if list(columns).count(c) > 1)
        raise ConfigError(f"the prompts file {uri} has the column {twice} twice: remove one")


def _unknown_column(columns: Iterable[str], uri: str, place: str) -> ConfigError:
    name = next(column for column in columns if column not in COLUMNS)
    close = difflib.get_close_matches(name.lower(), COLUMNS, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else f"the columns are {', '.join(COLUMNS)}"
    return ConfigError(f"{place} of the prompts file {uri} has an unknown column {name!r}: {hint}")


def _json_fault(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.colno}"
    return "it is not UTF-8 text"


def _numbered(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Give an id to every prompt without one."""
    from dataclasses import replace

    used = {prompt.object_id for prompt in prompts}
    numbered = []
    next_id = 1
    for prompt in prompts:
        if prompt.object_id is None:
            while next_id in used:
                next_id += 1
            prompt = replace(prompt, object_id=next_id)
            next_id += 1
        numbered.append(prompt)
    return numbered


def _as_text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _number(row: Mapping[str, Any], name: str) -> float | None:
    """Return a cell as a finite number; ValueError otherwise."""
    value = row.get(name)
    if value is None:
        return None
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
        if not math.isfinite(number):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a finite number, got {value!r}") from None
    return number


def _integer(row: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    """Return a cell as a whole number within bounds; ValueError otherwise."""
    number = _number(row, name)
    if number is None:
        return None
    if number != int(number) or not low <= number <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {row[name]!r}")
    return int(number)


def _numbers(value: Any, name: str) -> NDArray[np.float64]:
    """Return a cell that holds numbers, nested or not; ValueError otherwise.

    Text is taken as JSON when it starts with a bracket, else as numbers between commas or blanks.
    """
    if isinstance(value, str):
        text = value.strip()
        try:
            value = (
                json.loads(text)
                if text.startswith("[")
                else [float(part) for part in text.replace(",", " ").split()]
            )
        except ValueError:
            raise ValueError(f"{name} must be a list of numbers, got {text[:80]!r}") from None
    try:
        numbers = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a list of numbers, got {str(value)[:80]}") from None
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} holds a value that is not a finite number: {numbers.tolist()}")
    return numbers


def _box(value: Any) -> tuple[float, float, float, float]:
    numbers = _numbers(value, "box_xyxy")
    if numbers.shape != (4,):
        raise ValueError(f"box_xyxy must be 4 numbers x0, y0, x1, y1, got {numbers.tolist()}")
    x0, x1 = sorted(numbers[[0, 2]].tolist())
    y0, y1 = sorted(numbers[[1, 3]].tolist())
    if x0 == x1 or y0 == y1:
        raise ValueError(f"the box {numbers.tolist()} has no area")
    return x0, y0, x1, y1


def _points(value: Any) -> tuple[tuple[float, float], ...]:
    numbers = _numbers(value, "points")
    if numbers.ndim == 1 and len(numbers) == 2:
        numbers = numbers.reshape(1, 2)
    if numbers.ndim != 2 or numbers.shape[1] != 2 or not len(numbers):
        raise ValueError(f"points must be [[x, y], ...], got {numbers.tolist()}")
    return tuple((float(x), float(y)) for x, y in numbers)


def _point_labels(value: Any, num_points: int) -> tuple[int, ...]:
    if value is None:
        return (1,) * num_points
    numbers = _numbers(value, "point_labels").reshape(-1)
    if len(numbers) != num_points or not np.isin(numbers, (0, 1)).all():
        raise ValueError(
            f"point_labels must be {num_points} values 0 or 1, one per point, got "
            f"{numbers.tolist()}"
        )
    if not numbers.any():
        raise ValueError("points need at least one foreground point (label 1)")
    return tuple(int(number) for number in numbers)


def _mask_rle(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError('mask_rle must be {"size": [H, W], "counts": "..."}') from None
    if not isinstance(value, Mapping) or {"size", "counts"} - set(value):
        raise ValueError('mask_rle must be {"size": [H, W], "counts": "..."}')
    size = _numbers(value["size"], "the size of mask_rle")
    if (
        size.shape != (2,)
        or (size != size.astype(int)).any()
        or not ((size >= 1) & (size <= MAX_MASK_SIDE)).all()
    ):
        raise ValueError(f"the size of mask_rle must be [height, width], got {size.tolist()}")
    height, width = (int(side) for side in size)
    counts = value["counts"]
    if not isinstance(counts, (str, bytes)):
        raise ValueError("the counts of mask_rle must be COCO compressed counts, as text")
    if not rle.area(counts, height, width):  # InvalidRleError is a ValueError with a sentence
        raise ValueError("mask_rle is empty: it has no object pixel")
    return {
        "size": (height, width),
        "counts": counts.encode("ascii") if isinstance(counts, str) else counts,
    }
