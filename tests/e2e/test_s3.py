"""Contract: a bucket for corpus and output works like a disk, if it keeps its conditions.

* On a server with faithful conditional writes a run over a bucket writes its dataset to a bucket;
  plain Polars reads it there, `verify` agrees, the same command again does nothing.
* A changed object is new work, and its rows replace the older ones.
* On a server that accepts conditions and ignores them, `doctor` says so and `run` refuses, both
  with exit code 3 and before anything is written.
* A bucket that denies is exit code 3, a bucket with no video exit code 2.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from tests.datasets import assert_whole
from tests.e2e.corpora import finish, maskmill, write_corpus
from tests.media import write_video
from tests.servers import S3Server
from workers.storage import open_store


def upload(server: S3Server, folder: Path, bucket: str) -> None:
    store = open_store(bucket, server.options)
    for path in folder.iterdir():
        store.put_file(path, path.name)


def download(server: S3Server, bucket: str, folder: Path) -> Path:
    store = open_store(bucket, server.options)
    for found in store.list():
        (folder / found.key).parent.mkdir(parents=True, exist_ok=True)
        store.get_file(found.key, folder / found.key)
    return folder


def run(server: S3Server, corpus: str, out: str, prompts: Path) -> tuple[int, str]:
    return finish(
        maskmill(
            *("run", corpus, "--out", out, "--prompts", prompts, "--tracker", "fake"),
            *("--workers", "2", "--endpoint-url", server.endpoint_url, "--path-style"),
            env=server.environment(),
        )
    )


def test_corpus_and_output_in_a_bucket(seaweedfs: S3Server, tmp_path: Path) -> None:
    frames = write_corpus(tmp_path / "corpus", 5)
    corpus, out = f"{seaweedfs.new_bucket()}/in", f"{seaweedfs.new_bucket()}/set"
    upload(seaweedfs, tmp_path / "corpus", corpus)

    code, told = run(seaweedfs, corpus, out, tmp_path / "prompts.jsonl")
    assert code == 0, told
    assert_whole(download(seaweedfs, out, tmp_path / "first"), frames)

    # Polars reads it where it is, as users do.
    secrets = {key.lower(): value for key, value in seaweedfs.environment().items()}
    rows = pl.scan_parquet(
        f"{out}/frames/*.parquet", storage_options=secrets | {"aws_allow_http": "true"}
    )
    assert rows.select(pl.len()).collect().item() == sum(frames.values())

    # The same command again has nothing to do; a changed object is new work.
    code, told = run(seaweedfs, corpus, out, tmp_path / "prompts.jsonl")
    assert code == 0, told
    assert "5 of 5 videos, settled before" in told
    frames["clip-002.mp4"] = 17
    write_video(tmp_path / "corpus" / "clip-002.mp4", num_frames=17)
    upload(seaweedfs, tmp_path / "corpus", corpus)
    code, told = run(seaweedfs, corpus, out, tmp_path / "prompts.jsonl")
    assert code == 0, told
    assert_whole(download(seaweedfs, out, tmp_path / "second"), frames)
    code, told = finish(
        maskmill(
            *("verify", out, "--endpoint-url", seaweedfs.endpoint_url, "--path-style"),
            env=seaweedfs.environment(),
        )
    )
    assert code == 0, told


def test_a_store_that_ignores_conditions_is_refused(rclone: S3Server, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 1)
    out = f"{rclone.new_bucket()}/set"
    code, told = run(rclone, str(tmp_path / "corpus"), out, tmp_path / "prompts.jsonl")
    assert code == 3, told
    assert "cannot keep two drivers apart" in told
    assert "Traceback" not in told
    code, told = finish(
        maskmill(
            *("doctor", out, "--endpoint-url", rclone.endpoint_url, "--path-style"),
            env=rclone.environment(),
        )
    )
    assert code == 3, told
    # Of the probe's race this server may end an upload after its object was deleted.
    left = [found.key for found in open_store(out, rclone.options).list()]
    assert [key for key in left if not key.startswith("_probe/")] == []


def test_denied_and_empty_buckets(seaweedfs: S3Server, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 1)
    out = seaweedfs.new_bucket()
    words = (
        *("--tracker", "fake", "--prompts", tmp_path / "prompts.jsonl"),
        *("--path-style", "--endpoint-url", seaweedfs.endpoint_url),
    )
    reader = seaweedfs.environment(reader=True)
    code, told = finish(maskmill("run", tmp_path / "corpus", "--out", out, *words, env=reader))
    assert code == 3, told
    assert "Traceback" not in told
    empty = seaweedfs.new_bucket()
    code, told = finish(maskmill("run", empty, "--out", out, *words, env=seaweedfs.environment()))
    assert code == 2, told
    assert empty in told


@pytest.fixture(autouse=True)
def _servers_need_credentials(s3_credentials: None) -> None:
    """Let this process look into the buckets too."""
