"""Bucket inventories: what a bucket holds, as the provider's nightly report says it.

Listing ten million objects takes an hour and is billed by the thousand; the report is a few files.
This reads Amazon S3 Inventory, which other S3-compatible stores write as well: a ``manifest.json``
that names data files in CSV (gzip), ORC or Parquet. Source: "Amazon S3 User Guide", section
"Cataloging and analyzing your data with S3 Inventory".
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote_plus

import pyarrow as pa

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
            except (pa.ArrowException, KeyError, OSError, ValueError) as error:
                raise ConfigError(
                    f"{self._data.uri_of(key)} of the inventory {self.uri} cannot be read "
                    f"({' '.join(str(error).split())[:120]}): take the newest inventory"
                ) from error

    def _batches(self, data: bytes) -> Iterator[pa.RecordBatch]:
        if self._format == "Parquet":
            import pyarrow.parquet as pq

            names = pq.read_schema(pa.BufferReader(data)).names
            columns = [name for name in _NAMES.values() if name in names]
            yield from pq.ParquetFile(pa.BufferReader(data)).iter_batches(
                BATCH_ROWS, columns=columns
            )
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
        manifest = json.loads(open_store(root, options).read_bytes(key))
        source, target = manifest["sourceBucket"], manifest["destinationBucket"]
        keys = tuple(str(file["key"]) for file in manifest["files"])
        kind, schema = manifest["fileFormat"], manifest["fileSchema"]
        stamp = manifest.get("creationTimestamp")
        written = None if stamp is None else datetime.fromtimestamp(int(stamp) / 1000, UTC)
    except FileNotFoundError:
        raise ConfigError(f"the inventory {uri} does not exist: name its manifest.json") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{uri} is not the manifest.json of a bucket inventory (it lacks {error}): name the "
            f"file that lies beside manifest.checksum"
        ) from error
    if kind not in ("CSV", "ORC", "Parquet"):
        raise ConfigError(f"the inventory {uri} is in the format {kind!r}: use CSV, ORC or Parquet")
    columns: tuple[str, ...] = ()
    if kind == "CSV":
        columns = tuple(_NAMES.get(name.strip(), name.strip()) for name in schema.split(","))
        _check_columns(uri, columns)
    data = open_store(f"s3://{str(target).removeprefix('arn:aws:s3:::')}", options)
    return Inventory(uri, f"s3://{source}", written, data, keys, kind, columns)


def _check_columns(uri: str, columns: tuple[str, ...]) -> None:
    lacking = [label for label, name in _NAMES.items() if name not in columns][:4]
    needed = [label for label in lacking if label in ("Key", "Size", "ETag")]
    if needed:
        raise ConfigError(
            f"the inventory {uri} has no field {needed[0]}: add Size, Last modified and ETag to "
            f"its configuration"
        )


def _stats(batch: pa.RecordBatch, prefix: str, *, quoted: bool) -> Iterator[ObjectStat]:
    """Yield the present objects of some rows."""
    count = batch.num_rows

    def column(name: str) -> list[Any]:
        if name in batch.schema.names:
            return list(batch.column(name).to_pylist())
        return [None] * count

    columns = [batch.column("key").to_pylist(), batch.column("size").to_pylist()]
    columns += [batch.column("e_tag").to_pylist()]
    columns += [column(name) for name in ("last_modified_date", "is_latest", "is_delete_marker")]
    for key, size, etag, changed, latest, deleted in zip(*columns, strict=True):
        if str(latest).lower() == "false" or str(deleted).lower() == "true":
            continue
        key = unquote_plus(key) if quoted else key
        if key.startswith(prefix):
            yield ObjectStat(key, int(size or 0), (etag or "").strip('"') or None, _ns(changed))


def _ns(changed: str | datetime | None) -> int | None:
    """Return a time of change in nanoseconds since 1970."""
    if not changed:
        return None
    moment = datetime.fromisoformat(changed) if isinstance(changed, str) else changed
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return round(moment.timestamp() * 1e9)
