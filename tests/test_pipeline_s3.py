"""Contract of the pipeline on a real S3 server: corpus, mask images and output in a bucket.

* The rows are those of the same video on a local disk, for files and for folders of frames.
* A downloaded file is gone afterwards, and its bytes are counted.
* A missing video is an input error, refused credentials are an outage.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests import media
from tests.one_video import BOX, attempt_of, read_rows, spec_of, track, write_frames
from tests.servers import S3Server
from workers.errors import InputError, OutageError
from workers.messages import Attempt, Prompt, Proposal, SourceKind, Stage, VideoSource, WorkerSpec
from workers.storage import open_store


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket with a clip, a folder of frames and a mask image."""

    uri: str
    spec: WorkerSpec
    clip: Path
    frames: Path

    def source(self, name: str, kind: SourceKind) -> VideoSource:
        return VideoSource(77, f"{self.uri}/{name}", name, kind)


@pytest.fixture
def bucket(tmp_path: Path, seaweedfs: S3Server) -> Iterator[Bucket]:
    uri = seaweedfs.new_bucket()
    store = open_store(uri, seaweedfs.options)
    clip = media.write_video(tmp_path / "clip.mp4", num_frames=12)
    frames = write_frames(tmp_path / "frames", 12)
    store.put_file(clip, "in/clip.mp4")
    for path in frames.iterdir():
        store.put_file(path, f"in/frames/{path.name}")
    mask = np.zeros((64, 96), np.uint8)
    mask[8:30, 10:40] = 9
    picture = io.BytesIO()
    Image.fromarray(mask).save(picture, "png")
    store.write_bytes("mask.png", picture.getvalue())
    spec = spec_of(
        tmp_path,
        out_uri=f"{uri}/out",
        corpus_store=seaweedfs.options,
        out_store=seaweedfs.options,
    )
    yield Bucket(uri, spec, clip, frames)
    assert list((tmp_path / "spool").iterdir()) == []


def staged_rows(bucket: Bucket, proposal: Proposal) -> dict[str, list[dict[str, Any]]]:
    store = open_store(bucket.spec.out_uri, bucket.spec.out_store)
    rows = {}
    for part in proposal.parts:
        data = store.read_bytes(part.key)
        assert hashlib.sha256(data).hexdigest() == part.sha256
        rows[part.table] = pq.read_table(io.BytesIO(data)).to_pylist()
    return rows


@pytest.mark.parametrize("kind", list(SourceKind))
def test_the_rows_of_a_local_run(tmp_path: Path, bucket: Bucket, kind: SourceKind) -> None:
    local = bucket.clip if kind is SourceKind.FILE else bucket.frames
    spec = spec_of(tmp_path)
    expected = read_rows(spec, track(spec, attempt_of(local, BOX)))
    name = "in/clip.mp4" if kind is SourceKind.FILE else "in/frames"
    attempt = Attempt("a1", 3, 1, bucket.source(name, kind), prompts=(BOX,))
    proposal = track(bucket.spec, attempt)
    rows = staged_rows(bucket, proposal)
    assert rows == {table: expected[table] for table in rows}
    assert set(rows) == {table for table, found in expected.items() if found}
    download = next(stats for stats in proposal.stages if stats.stage is Stage.DOWNLOAD)
    sizes = [path.stat().st_size for path in ([local] if local.is_file() else local.iterdir())]
    # The first picture of a folder may be fetched twice: for the header, and in its turn.
    assert sum(sizes) <= download.items <= sum(sizes) + (0 if local.is_file() else max(sizes))


def test_a_mask_image_in_the_bucket(bucket: Bucket) -> None:
    prompt = Prompt(1, 0, mask_uri=f"{bucket.uri}/mask.png", mask_value=9)
    source = bucket.source("in/clip.mp4", SourceKind.FILE)
    rows = staged_rows(bucket, track(bucket.spec, Attempt("a1", 3, 1, source, prompts=(prompt,))))
    assert rows["masks"][0]["area"] == 22 * 30


def test_a_missing_video(bucket: Bucket) -> None:
    source = bucket.source("in/gone.mp4", SourceKind.FILE)
    with pytest.raises(InputError, match=r"in/gone\.mp4"):
        track(bucket.spec, Attempt("a1", 3, 1, source, prompts=(BOX,)))


def test_refused_credentials_are_an_outage(
    bucket: Bucket, seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in seaweedfs.environment(reader=True).items():
        monkeypatch.setenv(name, value)
    source = bucket.source("in/clip.mp4", SourceKind.FILE)
    with pytest.raises(OutageError):
        track(bucket.spec, Attempt("a1", 3, 1, source, prompts=(BOX,)))
