"""Bucket inventories: what a bucket holds, as the provider's nightly report says it.

Listing ten million objects takes an hour and is billed by the thousand; the report is a few files.
This reads Amazon S3 Inventory, which other S3-compatible stores write as well: a ``manifest.json``
that names data files in CSV (gzip), ORC or Parquet. Source: "Amazon S3 User Guide", section
"Cataloging and analyzing your data with S3 Inventory".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Annotated, Any
from urllib.parse import unquote_plus

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from jobs.row_groups import batches
from workers.errors import ConfigError
from workers.messages import StoreOptions
from workers.storage import ObjectStat, Store, open_store, split_uri

BATCH_ROWS = 65_536

_NAMES = {
    "Key": "key",
    "Size": "size",
    "LastModifiedDate": "last_modified_date",
    "ETag": "e_tag",
    "IsLatest": "is_latest",
    "IsDeleteMarker": "is_delete_marker",
}
"""Columns of the CSV form, by their names in the others."""

_Bucket = Annotated[str, Field(pattern=r"^(arn:[a-z-]+:s3:::)?[^/:\s]+$")]
_LAST_MS = 253_402_300_799_999  # of the year 9999


class _File(BaseModel):
    key: str = Field(min_length=1)


class _Manifest(BaseModel):
    """What is read of a ``manifest.json``."""

    model_config = ConfigDict(alias_generator=to_camel)

    source_bucket: _Bucket
    destination_bucket: _Bucket
    creation_timestamp: int | None = Field(default=None, ge=0, le=_LAST_MS)
    """Milliseconds since 1970."""
    file_format: str
    file_schema: str
    files: tuple[_File, ...]


@dataclass(frozen=True, slots=True)
class Inventory:
    """A report on one bucket.

    Attributes
    ----------
    uri : str
        Of its ``manifest.json``.
    root : str
        Root of the bucket it is about.
    written : datetime or None
        When the provider began it; nothing newer is in it.
    """

    uri: str
    root: str
    written: datetime | None
    _data: Store
    _keys: tuple[str, ...]
    _format: str
    _columns: tuple[str, ...]
    _kept: tuple[ObjectStat, ...] | None = None

    def narrowed(self, prefixes: Sequence[str]) -> Inventory:
        """Return the report on some prefixes alone, in memory, so that it is read only once.

        Parameters
        ----------
        prefixes : sequence of str
            What will be listed, many times.
        """
        wanted = tuple(prefixes)
        kept = tuple(stat for stat in self.list("") if stat.key.startswith(wanted))
        return replace(self, _kept=kept)

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        """Yield the objects whose keys begin with `prefix`, in the order of the report.

        Raises
        ------
        ConfigError
            A data file is missing or is not what the manifest says.
        """
        if self._kept is not None:
            yield from (stat for stat in self._kept if stat.key.startswith(prefix))
            return
        for key in self._keys:
            try:
                data = self._data.read_bytes(key)
            except FileNotFoundError:
                raise ConfigError(
                    f"the inventory {self.uri} names {self._data.uri_of(key)}, which does not "
                    f"exist: take the newest inventory"
                ) from None
            try:
                for batch in self._batches(data):
                    yield from _stats(batch, prefix, quoted=self._format == "CSV")
            except (pa.ArrowException, OSError, ValueError) as error:
                raise ConfigError(
                    f"{self._data.uri_of(key)} of the inventory {self.uri} cannot be read "
                    f"({' '.join(str(error).split())[:120]}): take the newest inventory"
                ) from error

    def _batches(self, data: bytes) -> Iterator[pa.RecordBatch]:
        if self._format == "Parquet":
            import pyarrow.parquet as pq

            names = pq.read_schema(pa.BufferReader(data)).names
            columns = [name for name in _NAMES.values() if name in names]
            parquet = pq.ParquetFile(pa.BufferReader(data))
            yield from batches(parquet, BATCH_ROWS, columns=columns)
            return
        if self._format == "ORC":
            from pyarrow import orc

            yield from orc.ORCFile(pa.BufferReader(data)).read().to_batches(BATCH_ROWS)
            return
        from pyarrow import csv

        yield from csv.open_csv(
            pa.CompressedInputStream(pa.BufferReader(data), "gzip"),
            read_options=csv.ReadOptions(column_names=list(self._columns)),
            convert_options=csv.ConvertOptions(
                column_types=dict.fromkeys(self._columns, pa.string()),
                include_columns=[name for name in _NAMES.values() if name in self._columns],
            ),
        )


def read_inventory(uri: str, options: StoreOptions) -> Inventory:
    """Open a report.

    Parameters
    ----------
    uri : str
        Its ``manifest.json``.
    options : StoreOptions
        How to reach it and the bucket.

    Returns
    -------
    Inventory
        Nothing but the manifest is read yet.

    Raises
    ------
    ConfigError
        There is none, or it lacks what an inventory must have.
    StoreError
        The store refuses or does not answer.
    """
    root, key = split_uri(uri)
    try:
        manifest = _Manifest.model_validate_json(open_store(root, options).read_bytes(key))
    except FileNotFoundError:
        raise ConfigError(f"the inventory {uri} does not exist: name its manifest.json") from None
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise ConfigError(
            f"{uri} is not the manifest.json of a bucket inventory "
            f"({f'{where}: ' if where else ''}{fault['msg']}): name the file that lies beside "
            f"manifest.checksum"
        ) from error
    kind, stamp = manifest.file_format, manifest.creation_timestamp
    if kind not in ("CSV", "ORC", "Parquet"):
        raise ConfigError(f"the inventory {uri} is in the format {kind!r}: use CSV, ORC or Parquet")
    columns: tuple[str, ...] = ()
    if kind == "CSV":
        fields = (name.strip() for name in manifest.file_schema.split(","))
        columns = tuple(_NAMES.get(name, name) for name in fields)
        _check_columns(uri, columns)
    return Inventory(
        uri,
        _bucket_uri(manifest.source_bucket),
        None if stamp is None else datetime.fromtimestamp(stamp / 1000, UTC),
        open_store(_bucket_uri(manifest.destination_bucket), options),
        tuple(file.key for file in manifest.files),
        kind,
        columns,
    )


def _bucket_uri(name: str) -> str:
    """Return the root of a bucket, which goes by its name or by its ARN."""
    return f"s3://{name.rpartition(':')[2]}"


def _check_columns(uri: str, columns: tuple[str, ...]) -> None:
    lacking = [label for label, name in _NAMES.items() if name not in columns][:4]
    needed = [label for label in lacking if label in ("Key", "Size", "ETag")]
    if needed:
        raise ConfigError(
            f"the inventory {uri} has no field {needed[0]}: add Size, Last modified and ETag to "
            f"its configuration"
        )


def _stats(batch: pa.RecordBatch, prefix: str, *, quoted: bool) -> Iterator[ObjectStat]:
    """Yield the present objects of some rows.

    Raises
    ------
    ValueError
        A column is missing or holds what it should not; which, and what.
    """
    columns = [
        _texts(batch, "key"),
        _sizes(batch),
        _texts(batch, "e_tag"),
        _times(batch),
        *(_values(batch, name) for name in ("is_latest", "is_delete_marker")),
    ]
    for key, size, etag, changed, latest, deleted in zip(*columns, strict=True):
        if str(latest).lower() == "false" or str(deleted).lower() == "true":
            continue
        if not key:
            raise ValueError("its field key is empty in a row")
        key = unquote_plus(key) if quoted else key
        if key.startswith(prefix):
            yield ObjectStat(key, size or 0, (etag or "").strip('"') or None, changed)


def _values(batch: pa.RecordBatch, name: str) -> list[Any]:
    if name not in batch.schema.names:
        return [None] * batch.num_rows
    return list(batch.column(name).to_pylist())


def _needed(batch: pa.RecordBatch, name: str) -> pa.Array:
    if name not in batch.schema.names:
        raise ValueError(f"it has no field {name}")
    return batch.column(name)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _texts(batch: pa.RecordBatch, name: str) -> list[str | None]:
    column = _needed(batch, name)
    if not (_is_text(column.type) or pa.types.is_null(column.type)):
        raise ValueError(f"its field {name} holds {column.type}, not text")
    return list(column.to_pylist())


def _sizes(batch: pa.RecordBatch) -> list[int | None]:
    column = _needed(batch, "size")
    if _is_text(column.type):
        column = pc.if_else(pc.equal(column, ""), None, column)
    try:
        return list(column.cast(pa.int64()).to_pylist())
    except pa.ArrowException as error:
        raise ValueError(f"its field size holds no whole numbers: {error}") from error


def _times(batch: pa.RecordBatch) -> list[int | None]:
    """Return the times of change in nanoseconds since 1970."""
    try:
        return [_ns(value) for value in _values(batch, "last_modified_date")]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"its field last_modified_date holds no times: {error}") from error


def _ns(changed: object) -> int | None:
    if changed is None or changed == "":
        return None
    moment = datetime.fromisoformat(changed) if isinstance(changed, str) else changed
    if not isinstance(moment, datetime):
        raise TypeError(f"{changed!r} is none")
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return round(moment.timestamp() * 1e9)
