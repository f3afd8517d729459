"""Manifests: CSV, JSON Lines or Parquet tables that name videos, their ranges and settings.

Columns: ``video`` (a URI, or a path from the manifest's own folder), and optionally ``start_s``,
``end_s``, ``stride``, ``prompts``, ``size_bytes`` and ``etag``. A column whose name starts with an
underscore is the writer's own and is left alone; any other is an error, since a misspelt column
must not pass in silence. A row that makes no sense costs that video only.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from workers.errors import ConfigError
from workers.messages import SourceKind
from workers.storage import Store, canonical_uri

MANIFEST_SUFFIXES = frozenset({".csv", ".jsonl", ".ndjson", ".parquet"})
"""Lower-case extensions by which a path is a manifest."""

COLUMNS = ("video", "start_s", "end_s", "stride", "prompts", "size_bytes", "etag")
"""The columns that mean something."""

# what canonical_uri would return as it is: tested here, since that takes far longer
_CLEAN_URI = re.compile(r"(?!s3[an]:|file:|local:)[a-z][a-z0-9+-]*://[^/@:\s][^@:]*[^/]", re.DOTALL)
_SLOPPY_PATH = re.compile(r"//|/\.\.?(?:/|$)|/$")
_MAX_INT = 1 << 62


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a corpus before they have names.

    Attributes
    ----------
    table : pyarrow.Table
        Columns of the corpus but for ``name``.
    faults : Mapping of int to str
        Unusable rows, each with its reason.
    """

    table: pa.Table
    faults: Mapping[int, str] = field(default_factory=dict)

    @staticmethod
    def build(
        *,
        uris: pa.Array,
        keys: NDArray[np.int64],
        kinds: pa.Array,
        sizes: pa.Array,
        etags: pa.Array,
        strides: pa.Array,
        starts: pa.Array | None = None,
        ends: pa.Array | None = None,
        prompts: pa.Array | None = None,
    ) -> pa.Table:
        """Return a table of the columns given, absent ones all null."""
        count = len(keys)
        return pa.table(
            {
                "video_key": pa.array(keys, pa.int64()),
                "uri": uris,
                "kind": kinds,
                "size_bytes": sizes,
                "etag": etags,
                "start_us": pa.nulls(count, pa.int64()) if starts is None else starts,
                "end_us": pa.nulls(count, pa.int64()) if ends is None else ends,
                "stride": strides,
                "prompts": pa.nulls(count, pa.large_string()) if prompts is None else prompts,
            }
        )


def video_key(uri: str, start_us: int | None = None, end_us: int | None = None) -> int:
    """Return the key of a video: the first 8 bytes of blake2b of its URI and range, signed.

    Parameters
    ----------
    uri : str
        Canonical URI.
    start_us, end_us : int or None
        Time range; a start of 0 is no start.
    """
    text = uri if not start_us and end_us is None else f"{uri}\0{start_us or 0}\0{end_us}"
    digest = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def video_keys(uris: Iterable[str]) -> NDArray[np.int64]:
    """Return `video_key` of many whole videos, at a third of its cost."""
    hashed = hashlib.blake2b
    digests = b"".join(
        hashed(uri.encode(errors="surrogateescape"), digest_size=8).digest() for uri in uris
    )
    return np.frombuffer(digests, ">i8").astype(np.int64)


def read_manifest(store: Store, key: str, stride: int) -> tuple[Rows, str]:
    """Read a manifest.

    Parameters
    ----------
    store : Store
        Where it lies.
    key : str
        Its key; the extension tells the format.
    stride : int
        For rows that give none.

    Returns
    -------
    rows : Rows
        One per row of the manifest.
    base : str
        The folder that contains all its videos, with a slash at the end.

    Raises
    ------
    ConfigError
        It cannot be read as a whole, has no column ``video`` or one that means nothing.
    """
    uri = store.uri_of(key)
    table = _read_table(store.read_bytes(key), uri)
    _check_columns(table.column_names, uri)
    return _Reader(table, uri, stride).read()


def _read_table(data: bytes, uri: str) -> pa.Table:
    """Return the manifest's columns as they are, CSV's all as text."""
    suffix = uri[uri.rfind(".") :].lower()
    try:
        if suffix == ".parquet":
            import pyarrow.parquet as pq

            return pq.read_table(pa.BufferReader(data))
        if suffix == ".csv":
            return _read_csv(data)
        if suffix in (".jsonl", ".ndjson"):
            return _read_json_lines(data, uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"the manifest {uri} cannot be read ({reason}): it must be a {suffix[1:]} table with "
            "a column `video`"
        ) from error
    raise ConfigError(f"the manifest {uri} must end in .csv, .jsonl or .parquet: rename it")


def _read_csv(data: bytes) -> pa.Table:
    from pyarrow import csv

    head = data[3:] if data.startswith(b"\xef\xbb\xbf") else data
    names = csv.open_csv(io.BytesIO(head)).schema.names if head.strip() else []
    if not names:
        raise pa.ArrowInvalid("it is empty")
    return csv.read_csv(
        pa.BufferReader(head),
        parse_options=csv.ParseOptions(newlines_in_values=True),
        convert_options=csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            strings_can_be_null=True,
            quoted_strings_can_be_null=True,
            null_values=[""],
        ),
    )


def _read_json_lines(data: bytes, uri: str) -> pa.Table:
    columns: dict[str, list[Any]] = {}
    count = 0
    for number, line in enumerate(data.decode("utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ConfigError(
                f"line {number} of the manifest {uri} is not a JSON object: correct that line"
            )
        for name, value in row.items():
            if isinstance(value, (dict, list)):
                value = json.dumps(value)
            columns.setdefault(name, [None] * count).append(
                value if value is None or isinstance(value, str) else json.dumps(value)
            )
        count += 1
        for values in columns.values():
            if len(values) < count:
                values.append(None)
    if not count:
        raise pa.ArrowInvalid("it is empty")
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


def _check_columns(names: list[str], uri: str) -> None:
    if "video" not in names:
        raise ConfigError(
            f"the manifest {uri} has no column `video`, only {', '.join(names)}: name the column "
            "that holds the videos so"
        )
    if len(set(names)) < len(names):
        raise ConfigError(f"the manifest {uri} has a column twice: {', '.join(names)}")
    unknown = [name for name in names if name not in COLUMNS and not name.startswith("_")]
    if unknown:
        raise ConfigError(
            f"the manifest {uri} has an unknown column {unknown[0]!r}: the columns are "
            f"{', '.join(COLUMNS)}; start its name with _ to have it left alone"
        )


class _Reader:
    """Turns a manifest's columns into rows, noting what is wrong with which."""

    def __init__(self, table: pa.Table, uri: str, stride: int) -> None:
        self._table = table
        self._uri = uri
        self._folder = uri[: uri.rfind("/") + 1]
        self._stride = stride
        self._faults: dict[int, str] = {}
        self._relative = False

    def read(self) -> tuple[Rows, str]:
        starts = self._microseconds("start_s")
        ends = self._microseconds("end_s")
        strides = self._numbers("stride", pa.int64(), "a whole number, at least 1", 1)
        sizes = self._numbers("size_bytes", pa.int64(), "a whole number of bytes", 0)
        self._check_ranges(starts, ends)
        uris, folders = self._uris()
        keys = self._keys(uris, starts, ends)
        etags = self._text("etag")
        table = Rows.build(
            uris=pa.array(uris, pa.large_string()),
            keys=keys,
            kinds=self._kinds(folders),
            sizes=sizes,
            etags=pc.utf8_trim(etags, characters='"'),
            strides=pc.fill_null(strides, self._stride).cast(pa.int32()),
            starts=starts,
            ends=ends,
            prompts=self._prompts(),
        )
        return Rows(table, self._faults), self._base(table)

    def _base(self, table: pa.Table) -> str:
        if self._relative:
            return self._folder
        usable = np.ones(table.num_rows, bool)
        usable[list(self._faults)] = False
        good = np.flatnonzero(usable)
        if not len(good):
            return self._folder
        ends = pc.min_max(table["uri"].take(pa.array(good))).as_py()
        low, high = ends["min"], ends["max"]
        length = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), None)
        common = low if length is None else low[:length]
        return str(common[: common.rfind("/") + 1])

    def _fault(self, row: int, reason: str) -> None:
        self._faults.setdefault(row, f"row {row + 1} of the manifest {self._uri} {reason}")

    def _text(self, name: str) -> pa.Array:
        if name not in self._table.column_names:
            return pa.nulls(self._table.num_rows, pa.string())
        column = self._table[name].combine_chunks()
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        return column.cast(pa.string())

    def _numbers(self, name: str, kind: pa.DataType, what: str, least: float) -> pa.Array:
        """Return a column of numbers; a value that is none is a fault and becomes null."""
        if name not in self._table.column_names:
            return pa.nulls(self._table.num_rows, kind)
        column = self._table[name].combine_chunks()
        try:
            numbers = column.cast(kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            numbers = self._numbers_one_by_one(name, column, kind, what)
        bad = pc.fill_null(pc.invert(pc.greater_equal(numbers, least)), False)
        if pa.types.is_floating(kind):
            bad = pc.or_(bad, pc.fill_null(pc.invert(pc.is_finite(numbers)), False))
        rows = np.flatnonzero(np.asarray(bad))
        for row in rows.tolist():
            self._fault(row, f"has {name} {numbers[row].as_py()}: it must be {what}")
        return pc.if_else(bad, pa.scalar(None, kind), numbers) if len(rows) else numbers

    def _numbers_one_by_one(
        self, name: str, column: pa.Array, kind: pa.DataType, what: str
    ) -> pa.Array:
        whole = pa.types.is_integer(kind)
        values: list[float | None] = []
        for row, value in enumerate(column.to_pylist()):
            number: float | None = None
            if value is not None:
                try:
                    number = float(value)
                    if whole and (number != math.floor(number) or abs(number) > _MAX_INT):
                        raise ValueError
                except (TypeError, ValueError, OverflowError):
                    number = None
                    self._fault(row, f"has {name} {str(value)[:40]!r}: it must be {what}")
            values.append(int(number) if whole and number is not None else number)
        return pa.array(values, kind)

    def _microseconds(self, name: str) -> pa.Array:
        seconds = self._numbers(name, pa.float64(), "seconds from the start of the video", 0)
        return pc.round(pc.multiply(seconds, 1e6)).cast(pa.int64(), safe=False)

    def _check_ranges(self, starts: pa.Array, ends: pa.Array) -> None:
        empty = pc.less_equal(ends, pc.fill_null(starts, 0))
        for row in np.flatnonzero(np.asarray(pc.fill_null(empty, False))).tolist():
            self._fault(row, "has end_s at or before start_s: the range holds no frame")

    def _uris(self) -> tuple[list[str], set[int]]:
        """Return canonical URIs, and the rows that say with a slash that they are folders."""
        uris: list[str] = []
        folders: set[int] = set()
        for row, value in enumerate(self._text("video").to_pylist()):
            text = value or ""
            if not text.strip():
                self._fault(row, "has no video: fill the column or remove the row")
                uris.append(f"{self._uri} row {row + 1}")
                continue
            if text.endswith("/"):
                folders.add(row)
            if _CLEAN_URI.fullmatch(text):
                uris.append(text)
                continue
            if text[0] != "/" and "://" not in text:
                self._relative = True
                text = self._folder + text
            if text[0] == "/" and not _SLOPPY_PATH.search(text):
                uris.append(text)
                continue
            try:
                uris.append(canonical_uri(text))
            except ConfigError as error:
                self._fault(row, f"names no place: {error}")
                uris.append(f"{self._uri} row {row + 1}")
        return uris, folders

    def _keys(self, uris: list[str], starts: pa.Array, ends: pa.Array) -> NDArray[np.int64]:
        if starts.null_count == ends.null_count == len(uris):
            return video_keys(uris)
        ranges = zip(uris, starts.to_pylist(), ends.to_pylist(), strict=True)
        return np.fromiter((video_key(*one) for one in ranges), np.int64, len(uris))

    def _kinds(self, folders: set[int]) -> pa.Array:
        """Guess from the name: settled by the store where it is asked."""
        names = self._text("video")
        bare = pc.invert(pc.match_substring_regex(names, r"\.[A-Za-z0-9]{1,8}$"))
        frames = np.asarray(pc.fill_null(bare, False)).copy()
        frames[list(folders)] = True
        return pa.array(
            np.where(frames, SourceKind.FRAMES.value, SourceKind.FILE.value), pa.string()
        )

    def _prompts(self) -> pa.Array:
        """Return references as given, a path from the manifest's folder made absolute."""
        column = self._text("prompts")
        if column.null_count == len(column):
            return column.cast(pa.large_string())
        return pa.array(
            [
                value
                if not value or value.lstrip()[:1] in "{[/" or "://" in value
                else self._folder + value
                for value in column.to_pylist()
            ],
            pa.large_string(),
        )
