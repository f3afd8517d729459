"""Contract: the same command every night tracks exactly what is new.

* Of a bucket with new, changed and unchanged videos, the second night tracks the new and the
  changed ones and nothing else; `plan --out` says so beforehand; the rows of the changed ones are
  replaced.
* A night without news ends well, with nothing tracked.
* While one night's run is still at work, the next one's start is refused with exit code 3 and
  disturbs nothing; after a driver that died, it is not refused.
"""

from __future__ import annotations

import os
import signal
import time
from datetime import UTC, datetime
from pathlib import Path

from tests.datasets import assert_whole, read_table
from tests.e2e.corpora import finish, maskmill, write_corpus
from tests.e2e.test_s3 import download, upload
from tests.media import write_video
from tests.servers import S3Server
from workers.storage import open_store


def test_two_nights_over_a_bucket(seaweedfs: S3Server, tmp_path: Path) -> None:
    frames = write_corpus(tmp_path / "corpus", 4)
    bucket = seaweedfs.new_bucket()
    prefix, out = f"{bucket}/in", f"{bucket}/set"
    upload(seaweedfs, tmp_path / "corpus", f"{prefix}/2026-11-18")
    words = (
        *(f"{prefix}/%Y-%m-%d", "--since", "2026-11-18", "--out", out, "--allow-unprompted"),
        *("--prompts", tmp_path / "prompts.jsonl", "--tracker", "fake", "--workers", "1"),
        *("--if-running", "refuse", "--path-style", "--endpoint-url", seaweedfs.endpoint_url),
    )

    def night(verb: str = "run") -> str:
        code, told = finish(maskmill(verb, *words, env=seaweedfs.environment()))
        assert code == 0, told
        return told

    assert "committed 4 of 4" in " ".join(night().split())

    # Between the nights: one changed, one new on a new day, three as they were.
    changed, new = "clip-002.mp4", "clip-009.mp4"
    for folder in ("changed", "new"):
        (tmp_path / folder).mkdir()
    write_video(tmp_path / "changed" / changed, num_frames=15)
    upload(seaweedfs, tmp_path / "changed", f"{prefix}/2026-11-18")
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    write_video(tmp_path / "new" / new, num_frames=6)
    upload(seaweedfs, tmp_path / "new", f"{prefix}/{today}")
    frames = {f"2026-11-18/{name}": count for name, count in frames.items()}
    frames |= {f"2026-11-18/{changed}": 15, f"{today}/{new}": 6}

    planned = " ".join(night("plan").split())
    assert "5, 2 to track" in planned
    assert "changed 1 of those to track" in planned
    told = night()
    first = download(seaweedfs, out, tmp_path / "second")
    assert_whole(first, frames)
    tracked = {row["epoch"]: row["num_videos"] for row in read_table(first, "workers").to_pylist()}
    assert [tracked[epoch] for epoch in sorted(tracked)] == [4, 2], told

    # The third night brings nothing.
    assert "5 of 5 videos, settled before" in night()
    assert read_table(download(seaweedfs, out, tmp_path / "third"), "videos") == read_table(
        first, "videos"
    )


def test_an_overlapping_start_is_refused(tmp_path: Path) -> None:
    frames = write_corpus(tmp_path / "corpus", 2, num_frames=40)
    out = tmp_path / "out"
    words = (
        *("run", tmp_path / "corpus", "--out", out, "--prompts", tmp_path / "prompts.jsonl"),
        *("--tracker", "fake", "--workers", "1", "--if-running", "refuse"),
    )
    slow = maskmill(*words, "--option", "sleep_s=0.5")
    store = open_store(str(out))
    while store.stat("_status.json") is None:
        assert slow.poll() is None, slow.communicate()
        time.sleep(0.2)
    same = (*words, "--option", "sleep_s=0.5")
    code, told = finish(maskmill(*same))
    assert code == 3, told
    assert "is at work on" in told
    assert slow.poll() is None, "the refused start disturbed the run"

    os.killpg(slow.pid, signal.SIGKILL)
    slow.wait()
    code, told = finish(maskmill(*same))
    assert code == 0, told
    assert_whole(out, frames)
