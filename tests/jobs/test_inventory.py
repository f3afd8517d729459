"""Contract: a bucket inventory is read in place of a listing, and gives the same corpus.

* CSV (gzip, percent-encoded keys), Parquet and ORC give the rows that listing the bucket gives,
  with the same identity, so that a run may go from one to the other without tracking again.
* With dates in a path it is read once for all of them.
* Old versions and deletion markers are no objects; paths and globs choose as they do in a listing.
* A manifest that is missing, is none, names files that are gone or another bucket's paths: one
  sentence; so is a field, of manifest or data, that holds what it should not, and the sentence
  names file and field.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import orc

from jobs.config import CorpusConfig, StoreConfig
from jobs.corpus import list_corpus
from jobs.inventory import Inventory, read_inventory
from tests.servers import S3Server
from workers.errors import ConfigError
from workers.messages import StoreOptions
from workers.storage import ObjectStat, open_store

DATED = "day/2026-11-19/d.mp4"
KEYS = (
    *("in/a b+c.mp4", "in/ü/x.mp4", "in/frames/0.jpg", "in/frames/1.jpg", "in/notes.txt"),
    *("z.mp4", DATED, "day/2026-11-17/old.mp4"),
)
FORMATS = ("CSV", "Parquet", "ORC")
SCHEMA = (
    "Bucket, Key, VersionId, IsLatest, IsDeleteMarker, Size, LastModifiedDate, ETag, StorageClass"
)


@pytest.fixture(scope="module")
def bucket(request: pytest.FixtureRequest) -> tuple[S3Server, str]:
    server: S3Server = request.getfixturevalue("seaweedfs")
    uri = server.new_bucket()
    store = open_store(uri, server.options)
    for number, key in enumerate(KEYS):
        store.write_bytes(key, b"x" * (number + 1))
    for kind in FORMATS:
        write_inventory(server, uri, kind)
    return server, uri


def write_inventory(server: S3Server, uri: str, kind: str) -> None:
    """Write what the provider would, with an old version and a deletion beside each object."""
    store = open_store(uri, server.options)
    found = [stat for stat in store.list("") if stat.key in KEYS]
    assert len(found) == len(KEYS)
    rows = [row for stat in found for row in versions_of(stat)]
    name = uri.removeprefix("s3://")
    key = f"report/{kind}/data.{kind.lower()}"
    if kind == "CSV":
        text = io.StringIO()
        writer = csv.writer(text, quoting=csv.QUOTE_ALL)
        for stat, latest, deleted in rows:
            changed = datetime.fromtimestamp(stat.mtime_s or 0, UTC)
            cells = (name, quote_plus(stat.key), "v1", latest, deleted, stat.size_bytes)
            writer.writerow([*cells, f"{changed:%Y-%m-%dT%H:%M:%S.000Z}", stat.etag, "STANDARD"])
        data = gzip.compress(text.getvalue().encode())
    else:
        times = [datetime.fromtimestamp(stat.mtime_s or 0, UTC) for stat, _, _ in rows]
        table = pa.table(
            {
                "bucket": [name] * len(rows),
                "key": [stat.key for stat, _, _ in rows],
                "is_latest": [latest == "true" for _, latest, _ in rows],
                "is_delete_marker": [deleted == "true" for _, _, deleted in rows],
                "size": [stat.size_bytes for stat, _, _ in rows],
                "last_modified_date": pa.array(times, pa.timestamp("ms", "UTC")),
                "e_tag": [stat.etag for stat, _, _ in rows],
            }
        )
        sink = io.BytesIO()
        if kind == "Parquet":
            pq.write_table(table, sink)
        else:
            orc.write_table(table, sink)
        data = sink.getvalue()
    store.write_bytes(key, data)
    manifest = {
        "sourceBucket": name,
        "destinationBucket": f"arn:aws:s3:::{name}",
        "version": "2016-11-30",
        "creationTimestamp": "1795132800000",
        "fileFormat": kind,
        "fileSchema": SCHEMA if kind == "CSV" else "message s3.inventory {}",
        "files": [{"key": key, "size": len(data), "MD5checksum": ""}],
    }
    store.write_bytes(f"report/{kind}/manifest.json", json.dumps(manifest).encode())


def versions_of(stat: ObjectStat) -> list[tuple[ObjectStat, str, str]]:
    older = ObjectStat(stat.key, 99, "old", stat.mtime_ns)
    gone = ObjectStat(f"gone/{stat.key}.mp4", 0, "", stat.mtime_ns)
    return [(stat, "true", "false"), (older, "false", "false"), (gone, "true", "true")]


def config(server: S3Server, *paths: str, inventory: str | None = None) -> CorpusConfig:
    store = StoreConfig(endpoint_url=server.endpoint_url, path_style=True, region="us-east-1")
    return CorpusConfig(paths=paths, inventory=inventory, store=store)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("place", ["in", "in/*.mp4", "in/**/*.mp4"])
def test_it_gives_what_a_listing_gives(bucket: tuple[S3Server, str], kind: str, place: str) -> None:
    server, uri = bucket
    path = f"{uri}/{place}"
    listed = list_corpus(config(server, path))
    read = list_corpus(config(server, path, inventory=f"{uri}/report/{kind}/manifest.json"))
    assert len(listed)
    order = [("uri", "ascending")]
    assert read.table.sort_by(order).equals(listed.table.sort_by(order))
    assert "2026-11-20" in read.warnings[0]


def test_without_a_path_it_is_the_whole_bucket(bucket: tuple[S3Server, str]) -> None:
    server, uri = bucket
    corpus = list_corpus(config(server, inventory=f"{uri}/report/Parquet/manifest.json"))
    videos = {"in/a b+c.mp4", "in/ü/x.mp4", "in/frames", "z.mp4", DATED, "day/2026-11-17/old.mp4"}
    assert videos == set(corpus.table["name"].to_pylist())


def test_with_dates(bucket: tuple[S3Server, str]) -> None:
    server, uri = bucket
    given = config(server, f"{uri}/day/%Y-%m-%d/", inventory=f"{uri}/report/CSV/manifest.json")
    given = given.model_copy(update={"since": "2026-11-18", "until": "2026-11-20"})
    assert list_corpus(given).table["uri"].to_pylist() == [f"{uri}/{DATED}"]


def test_a_narrowed_one_is_not_read_again(tmp_path: Path) -> None:
    keys = ["day=01/a.mp4", "day=02/a.mp4", "day=02/b.mp4", "other/z.mp4"]
    table = pa.table({"key": keys, "size": [1, 2, 3, 4], "e_tag": ["a", "b", "c", "d"]})
    pq.write_table(table, tmp_path / "data.parquet")
    data = open_store(str(tmp_path))
    whole = Inventory("uri", "s3://bucket", None, data, ("data.parquet",), "Parquet", ())
    narrowed = whole.narrowed(["day=02/", "day=03/"])
    (tmp_path / "data.parquet").unlink()
    assert [stat.key for stat in narrowed.list("day=02/")] == keys[1:3]
    assert [stat.key for stat in narrowed.list("day=02/b")] == keys[2:3]
    assert [*narrowed.list("day=01/"), *narrowed.list("day=03/")] == []


def test_buckets_go_by_name_or_arn(tmp_path: Path) -> None:
    for source, target in (("in", "arn:aws-cn:s3:::reports"), ("arn:aws:s3:::in", "reports")):
        given = MANIFEST | {"sourceBucket": source, "destinationBucket": target}
        (tmp_path / "manifest.json").write_text(json.dumps(given))
        inventory = read_inventory(str(tmp_path / "manifest.json"), StoreOptions())
        assert (inventory.root, inventory._data.uri) == ("s3://in", "s3://reports")


MANIFEST: dict[str, Any] = {
    "sourceBucket": "in",
    "destinationBucket": "arn:aws:s3:::reports",
    "creationTimestamp": "1795132800000",
    "fileFormat": "CSV",
    "fileSchema": SCHEMA,
    "files": [{"key": "data.csv.gz", "size": 1}],
}


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        *[(name, None, name) for name in MANIFEST if name != "creationTimestamp"],
        *[(name, [5], name) for name in MANIFEST if name != "files"],
        ("destinationBucket", "", "destinationBucket"),
        ("destinationBucket", "arn:aws:s3:::", "destinationBucket"),
        ("sourceBucket", "in/videos", "sourceBucket"),
        *[("creationTimestamp", moment, "creationTimestamp") for moment in (-1, 1e300)],
        pytest.param("creationTimestamp", 10**400, "creationTimestamp", id="digits"),
        pytest.param("creationTimestamp", "9" * 400, "creationTimestamp", id="text of digits"),
        ("creationTimestamp", "yesterday", "creationTimestamp"),
        ("files", "data.csv.gz", "files"),
        ("files", [{"key": "a"}, {"size": 5}], "files.1.key"),
        ("files", [{"key": None}], "files.0.key"),
        ("files", ["data.csv.gz"], "files.0"),
    ],
)
def test_a_field_of_a_manifest_that_holds_nonsense(
    tmp_path: Path, field: str, value: object, named: str
) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(MANIFEST | {field: value}))
    with pytest.raises(ConfigError) as caught:
        read_inventory(str(path), StoreOptions())
    assert str(caught.value).startswith(f"{path} is not the manifest.json")
    assert f"({named}: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"null", b"[1]"])
def test_a_manifest_that_is_no_json_object(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match="of a bucket inventory"):
        read_inventory(str(path), StoreOptions())


NOW = datetime(2026, 11, 20, tzinfo=UTC)


@pytest.mark.parametrize(
    ("field", "column"),
    [
        ("key", pa.array(["a.mp4", None])),
        ("key", pa.array(["a.mp4", ""])),
        ("key", pa.array([1, 2])),
        ("key", pa.array([b"a.mp4", b"b.mp4"])),
        ("key", pa.nulls(2, pa.string())),
        ("key", None),
        ("size", pa.array(["ten", "1"])),
        ("size", pa.array([1.5, 2])),
        ("size", pa.array([float("inf"), 2])),
        ("size", None),
        ("e_tag", pa.array([1, 2])),
        ("e_tag", pa.array([b"x", b"y"])),
        ("e_tag", None),
        ("last_modified_date", pa.array([1795132800000, 1])),
        ("last_modified_date", pa.array(["2026-11-20T00:00:00.000Z", "yesterday"])),
        ("last_modified_date", pa.array([date(2026, 11, 20), None])),
        ("last_modified_date", pa.array([2**62, 1], pa.timestamp("ms"))),
    ],
)
def test_a_field_of_the_data_that_holds_nonsense(
    tmp_path: Path, field: str, column: pa.Array | None
) -> None:
    table = pa.table(
        {
            "key": ["a.mp4", "b.mp4"],
            "size": [1, 2],
            "e_tag": ["x", None],
            "last_modified_date": pa.array([NOW, None], pa.timestamp("ms", "UTC")),
        }
    )
    position = table.schema.get_field_index(field)
    if column is None:
        table = table.remove_column(position)
    else:
        table = table.set_column(position, field, column)
    pq.write_table(table, tmp_path / "data")
    data = open_store(str(tmp_path))
    inventory = Inventory("the-manifest", "s3://bucket", None, data, ("data",), "Parquet", ())
    with pytest.raises(ConfigError) as caught:
        list(inventory.list(""))
    assert f"{tmp_path}/data of the inventory the-manifest cannot be read" in str(caught.value)
    assert f"field {field}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cells", "field"),
    [(("ten", "2026-11-20T00:00:00.000Z"), "size"), (("10", "soon"), "last_modified_date")],
)
def test_a_cell_that_holds_nonsense(tmp_path: Path, cells: tuple[str, str], field: str) -> None:
    text = f'"a.mp4","{cells[0]}","{cells[1]}","x"\n'
    (tmp_path / "data").write_bytes(gzip.compress(text.encode()))
    columns = ("key", "size", "last_modified_date", "e_tag")
    data = open_store(str(tmp_path))
    inventory = Inventory("uri", "s3://bucket", None, data, ("data",), "CSV", columns)
    with pytest.raises(ConfigError, match=f"its field {field} holds no"):
        list(inventory.list(""))


def test_empty_cells_and_columns_are_unknown(tmp_path: Path) -> None:
    text = '"a+1.mp4","","","true",""\n"gone","","","true","true"\n'
    (tmp_path / "data.csv").write_bytes(gzip.compress(text.encode()))
    nothing = pa.table({"key": ["a 1.mp4"], "size": pa.nulls(1), "e_tag": pa.nulls(1)})
    pq.write_table(nothing, tmp_path / "data.parquet")
    data = open_store(str(tmp_path))
    columns = ("key", "size", "e_tag", "is_latest", "is_delete_marker")
    for kind, names in (("CSV", columns), ("Parquet", ())):
        key = f"data.{kind.lower()}"
        inventory = Inventory("uri", "s3://bucket", None, data, (key,), kind, names)
        assert list(inventory.list("")) == [ObjectStat("a 1.mp4", 0, None, None)]


def test_what_is_no_inventory(bucket: tuple[S3Server, str]) -> None:
    server, uri = bucket
    store = open_store(uri, server.options)
    store.write_bytes("bad/none.json", b"[1]")
    text = store.read_bytes("report/CSV/manifest.json")
    moved = json.loads(text) | {"files": [{"key": "report/CSV/moved.gz"}]}
    store.write_bytes("bad/moved.json", json.dumps(moved).encode())
    lacking = json.loads(text) | {"fileSchema": "Bucket, Key, Size"}
    store.write_bytes("bad/lacking.json", json.dumps(lacking).encode())
    broken = json.loads(text) | {"fileFormat": "Parquet"}
    store.write_bytes("bad/broken.json", json.dumps(broken).encode())
    for name, words in (
        ("absent", "does not exist"),
        ("none", "is not the manifest.json of a bucket inventory"),
        ("moved", "moved.gz, which does not exist"),
        ("lacking", "has no field ETag"),
        ("broken", "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=words):
            list_corpus(config(server, f"{uri}/in", inventory=f"{uri}/bad/{name}.json"))
    with pytest.raises(ConfigError, match=f"is of {uri}, not of s3://elsewhere"):
        list_corpus(
            config(server, "s3://elsewhere/in/", inventory=f"{uri}/report/CSV/manifest.json")
        )
