"""Probes: what a header tells, and how little it costs to ask.

* Containers and folders of frames, local and remote, tell size after rotation, rate, whether it
  varies, frames, duration and codec; a range counts only its part.
* Only a part of a remote file is read.
* An unusable video is a row with a reason, never an exception; a store that refuses is one.
* The cache lives in the output, by key and etag; it fills in the background, survives its own
  loss, merges its files, and neither blocks a start nor raises.
* A probe that kills its process, or hangs, is that video's loss alone, and no verdict about it;
  where every probe dies, there is an end to new processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from jobs import probe as probe_module
from jobs.config import CorpusConfig
from jobs.corpus import Corpus, list_corpus, video_key
from jobs.probe import PROBES_PREFIX, SCHEMA, ProbeCache, ProbeRow, probe_video
from tests import media, servers
from tests.jobs import bad_probes
from workers.errors import StoreUnavailable
from workers.messages import SourceKind, StoreOptions, VideoSource
from workers.storage import Store, open_store

OPTIONS = StoreOptions()


def source_of(uri: str | Path, kind: SourceKind = SourceKind.FILE, **facts: Any) -> VideoSource:
    uri = str(uri)
    return VideoSource(video_key(uri), uri, uri.rpartition("/")[2], kind, **facts)


@pytest.fixture
def out(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "out"))


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Return three videos, one of them unusable."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    media.write_video(folder / "a.mp4", num_frames=10)
    media.write_frames(folder / "b", num_frames=4)
    (folder / "c.mp4").write_text("no video\n" * 20)
    return list_corpus(CorpusConfig(paths=(str(folder),)))


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "h264"), ("a.mkv", "vp9"), ("a.avi", "mjpeg"), ("a.ts", "hevc")]
)
def test_a_container(tmp_path: Path, name: str, codec: str) -> None:
    options = {"pix_fmt": "yuvj420p", "full_range": True} if codec == "mjpeg" else {}
    path = media.write_video(tmp_path / name, codec=codec, num_frames=50, **options)  # type: ignore[arg-type]
    row = probe_video(source_of(path), OPTIONS)
    assert (row.width, row.height, row.rotation, row.codec) == (96, 64, 0, codec)
    assert row.fps == pytest.approx(25, rel=0.01)
    assert row.vfr is False
    assert row.num_frames == pytest.approx(50, abs=1)
    assert row.duration_us == pytest.approx(2_000_000, abs=50_000)
    assert (row.readable, row.reason) == (True, "")


def test_rotation_and_variable_rate(tmp_path: Path) -> None:
    times = [0, 10, 50, 60, 200, 210, 220, 300, 400, 500, 510, 999]
    for name in ("a.mp4", "a.mkv"):
        path = media.write_video(tmp_path / name, rotation=90, pts_ms=times)
        row = probe_video(source_of(path), OPTIONS)
        assert (row.width, row.height, row.rotation) == (64, 96, 90)
        assert row.vfr is True, name


def test_a_folder_of_frames(tmp_path: Path) -> None:
    folder = media.write_frames(tmp_path / "walk", num_frames=48)
    row = probe_video(source_of(folder, SourceKind.FRAMES), OPTIONS)
    assert row == ProbeRow(96, 64, 0, 24.0, False, 48, 2_000_000, "jpeg")


def test_a_range_counts_its_part(tmp_path: Path) -> None:
    path = media.write_video(tmp_path / "a.mp4", num_frames=50)
    for start_us, end_us, expected in [
        (1_000_000, None, 25),
        (None, 400_000, 10),
        (1_600_000, 99_000_000, 10),
        (9_000_000, None, 0),
    ]:
        row = probe_video(source_of(path, start_us=start_us, end_us=end_us), OPTIONS)
        assert row.num_frames == expected
        assert row.duration_us == expected * 40_000


def test_unusable_videos_have_a_reason(tmp_path: Path) -> None:
    (tmp_path / "zero.mp4").touch()
    (tmp_path / "text.mp4").write_text("hello\n" * 99)
    cut = media.truncate(media.write_video(tmp_path / "cut.mp4"), 0.5)
    sound = media.write_audio_only(tmp_path / "sound.mp4")
    noise = media.write_undecodable(tmp_path / "noise.mp4")
    for path, expected in {
        tmp_path / "zero.mp4": "zero.mp4 is empty",
        tmp_path / "text.mp4": "text.mp4 is text",
        cut: "cut.mp4 is cut off",
        sound: "only audio",
        noise: "no frame can be decoded",
        tmp_path / "gone.mp4": "gone.mp4 was listed but is gone",
    }.items():
        row = probe_video(source_of(path), OPTIONS)
        assert row.readable is False
        assert expected in row.reason
        assert row.num_frames is None


def test_a_remote_file_is_not_downloaded(
    seaweedfs: servers.S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a file of some size, its index at the front or at the back
    store = open_store(seaweedfs.new_bucket(), seaweedfs.options)
    read: list[int] = []
    original = type(store).read_range

    def counted(self: Store, key: str, start: int, stop: int, **more: Any) -> bytes:
        read.append(stop - start)
        return original(self, key, start, stop, **more)

    monkeypatch.setattr(type(store), "read_range", counted)
    for name, flags in (("front.mp4", "+faststart"), ("back.mp4", "")):
        path = media.write_video(
            tmp_path / name,
            num_frames=200,
            width=640,
            height=360,
            muxer_options={"movflags": flags} if flags else None,
            encoder_options={"qp": "1"},
        )
        # and a tail nobody needs, as in any long video
        data = path.read_bytes()
        padding = (8 << 20).to_bytes(4, "big") + b"free" + bytes((8 << 20) - 8)
        moov = data.rfind(b"moov") - 4
        data = data + padding if flags else data[:moov] + padding + data[moov:]
        store.write_bytes(name, data)
        read.clear()
        row = probe_video(source_of(store.uri_of(name)), seaweedfs.options)
        assert (row.num_frames, row.codec, row.readable) == (200, "h264", True)
        assert 0 < sum(read) < len(data) / 4


def test_a_store_that_fails_is_no_videos_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a real server cannot be made to fail between two requests
    store = open_store("memory://probes")
    store.put_file(media.write_video(tmp_path / "a.mp4"), "a.mp4")

    def fail(*args: object, **kwargs: object) -> bytes:
        raise StoreUnavailable("503")

    monkeypatch.setattr(type(store), "read_range", fail)
    with pytest.raises(StoreUnavailable):
        probe_video(source_of("memory://probes/a.mp4"), OPTIONS)


def everything(cache: ProbeCache, corpus: Corpus) -> list[int]:
    frames = cache.num_frames(corpus.keys, corpus.table["etag"].to_pylist())
    return [int(count) for count in frames]


def sources(corpus: Corpus) -> Iterator[VideoSource]:
    return (corpus.source(row) for row in range(len(corpus)))


def test_the_cache_fills_and_is_kept(out: Store, corpus: Corpus) -> None:
    cache = ProbeCache(out)
    assert everything(cache, corpus) == [-1, -1, -1]
    cache.start(sources(corpus), OPTIONS)
    cache.wait()
    cache.close()
    # then another run over the same output knows them
    again = ProbeCache(out)
    names = corpus.table["name"].to_pylist()
    frames = dict(zip(names, everything(again, corpus), strict=True))
    assert frames == {"a.mp4": 10, "b": 4, "c.mp4": -1}
    table = again.get(corpus.keys, corpus.table["etag"].combine_chunks())
    assert table.schema.equals(SCHEMA)
    reasons = dict(zip(names, table["reason"].to_pylist(), strict=True))
    assert reasons["a.mp4"] == ""
    assert "c.mp4 is text" in reasons["c.mp4"]
    # and does not read them again: no process is started for it
    again.start(sources(corpus), OPTIONS)
    again.wait()
    again.close()
    assert [child.pid for child in again._children] == [None]


def test_a_crash_is_one_videos_loss(out: Store, corpus: Corpus) -> None:
    # given a video that kills the process that looks at it
    cache = ProbeCache(out, probe=bad_probes.crash_on_b)
    cache.start(sources(corpus), OPTIONS, max_workers=1)
    cache.wait()
    cache.close()
    # then the others are known, and of that one nothing is said, neither good nor bad
    again = ProbeCache(out)
    table = again.get(corpus.keys, corpus.table["etag"].combine_chunks())
    found = dict(zip(corpus.table["name"].to_pylist(), table.to_pylist(), strict=True))
    assert found["a.mp4"]["num_frames"] == 10
    assert found["c.mp4"]["readable"] is False
    assert (found["b"]["num_frames"], found["b"]["readable"]) == (None, None)
    # and a decoder that can read it is asked again
    again.start(sources(corpus), OPTIONS)
    again.wait()
    again.close()
    assert sorted(everything(ProbeCache(out), corpus)) == [-1, 4, 10]


def test_crashes_have_an_end(out: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "_MOST_LOSSES", 3)
    calls = tmp_path / "calls"
    cache = ProbeCache(out, probe=bad_probes.crash)
    cache.start((source_of(calls) for _ in iter(int, 1)), OPTIONS, max_workers=1)
    cache.wait()
    assert calls.read_text().split() == ["x"] * 3
    cache.close()


def test_more_children_for_many_videos(
    out: Store, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_module, "_VIDEOS_PER_CHILD", 1)
    cache = ProbeCache(out)
    cache.start(sources(corpus), OPTIONS, max_workers=2)
    cache.wait()
    cache.close()
    assert len(cache._children) == 2
    assert sorted(everything(ProbeCache(out), corpus)) == [-1, 4, 10]


def test_another_content_is_another_probe(out: Store, corpus: Corpus) -> None:
    cache = ProbeCache(out)
    cache.start(sources(corpus), OPTIONS)
    cache.wait()
    cache.close()
    etags = ["other"] * len(corpus)
    assert ProbeCache(out).num_frames(corpus.keys, etags).tolist() == [-1, -1, -1]
    assert ProbeCache(out).num_frames(corpus.keys + 1, etags).tolist() == [-1, -1, -1]
    assert ProbeCache(out).num_frames(np.zeros(0, np.int64), []).tolist() == []


def test_small_files_are_merged(
    out: Store, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_module, "_SAVE_ROWS", 1)
    monkeypatch.setattr(probe_module, "_MOST_FILES", 2)
    cache = ProbeCache(out)
    before = everything(cache, corpus)
    cache.start(sources(corpus), OPTIONS, max_workers=2)
    cache.wait()
    assert len(list(out.list(PROBES_PREFIX))) == 3
    cache.close()
    assert len(list(out.list(PROBES_PREFIX))) == 1
    assert sorted(everything(ProbeCache(out), corpus)) == [-1, 4, 10] != before


def test_a_damaged_cache_is_probed_again(out: Store, corpus: Corpus) -> None:
    out.write_bytes(f"{PROBES_PREFIX}old.parquet", b"not parquet")
    cache = ProbeCache(out)
    cache.start(sources(corpus), OPTIONS)
    cache.wait()
    cache.close()
    assert sorted(everything(ProbeCache(out), corpus)) == [-1, 4, 10]


def test_failures_never_reach_the_run(
    out: Store, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # even when there is no end of sources, probing gives up
    calls = tmp_path / "calls"
    cache = ProbeCache(out, probe=bad_probes.fail)
    cache.start((source_of(calls) for _ in iter(int, 1)), OPTIONS)
    cache.wait()
    assert len(calls.read_text().split()) == 20

    def fail(*args: object) -> None:
        raise StoreUnavailable("503")

    monkeypatch.setattr(type(out), "write_bytes", fail)
    cache._keep(corpus.source(0), ProbeRow())
    cache.close()


def test_a_probe_that_hangs_does_not_hold_the_end(out: Store, tmp_path: Path) -> None:
    began = tmp_path / "pid"
    cache = ProbeCache(out, probe=bad_probes.hang)
    cache.start([source_of(began)], OPTIONS)
    [thread] = [one for one in threading.enumerate() if one.name == "probe-0"]
    assert thread.daemon
    wait_until(began.exists)
    assert thread.is_alive()
    cache.close()
    assert not thread.is_alive()
    assert not psutil.pid_exists(int(began.read_text()))


def test_a_probe_that_hangs_is_given_up(
    out: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_module, "_GIVE_UP_AFTER_S", 0.5)
    began = tmp_path / "pid"
    cache = ProbeCache(out, probe=bad_probes.hang)
    cache.start([source_of(began)], OPTIONS)
    cache.wait()
    assert not psutil.pid_exists(int(began.read_text()))
    cache.close()


def test_children_end_with_the_driver(tmp_path: Path) -> None:
    # given a driver, which has no guard around its main module, and a probe that hangs in its child
    began, script = tmp_path / "pid", tmp_path / "driver.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from jobs.probe import ProbeCache\n"
        "from tests.jobs import bad_probes\n"
        "from tests.jobs.test_probe import OPTIONS, source_of\n"
        "from workers.storage import open_store\n"
        "cache = ProbeCache(open_store(sys.argv[1]), probe=bad_probes.hang)\n"
        "cache.start([source_of(sys.argv[2])], OPTIONS)\n"
        "if len(sys.argv) == 3:\n"
        "    time.sleep(3600)\n"
        "while not Path(sys.argv[2]).exists():\n"
        "    time.sleep(0.05)\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    words = [sys.executable, str(script), str(tmp_path / "out"), str(began)]
    environment = os.environ | {"PYTHONPATH": root}
    # when it is killed, its child ends too
    driver = subprocess.Popen(words, env=environment)
    try:
        wait_until(began.exists)
        child = int(began.read_text())
        assert psutil.pid_exists(child)
    finally:
        driver.kill()
        driver.wait()
    wait_until(lambda: not psutil.pid_exists(child))
    # and when it ends by itself, without closing anything, the child does not hold it up
    began.unlink()
    assert subprocess.run([*words, "ends"], env=environment, timeout=60).returncode == 0
    child = int(began.read_text())
    wait_until(lambda: not psutil.pid_exists(child))


def wait_until(condition: Callable[[], bool], within_s: float = 60) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
