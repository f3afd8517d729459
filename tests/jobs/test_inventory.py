"""Contract: a bucket inventory is read in place of a listing, and gives the same corpus.

* CSV (gzip, percent-encoded keys), Parquet and ORC give the rows that listing the bucket gives,
  with the same identity, so that a run may go from one to the other without tracking again.
* With dates in a path it is read once for all of them.
* Old versions and deletion markers are no objects; paths and globs choose as they do in a listing.
* A manifest that is missing, is none, names files that are gone or another bucket's paths: one
  sentence.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote_plus

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import orc

from jobs.config import CorpusConfig, StoreConfig
from jobs.corpus import list_corpus
from jobs.inventory import Inventory
from tests.servers import S3Server
from workers.errors import ConfigError
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
