"""Fetching: what lies where while a video is read, and what each store fault becomes.

* Local files and folders are used in place; remote files lie in the spool directory as long as
  the context lasts, whatever happens in it; remote folders of frames never touch the disk.
* An object that is gone or changed since it was listed is an InputError; refused credentials and
  a full disk are outages; everything else a store says is transient.
* Progress is reported in bytes; a cancelled download stops and leaves nothing.
* Images of a remote folder are read a bounded number ahead, in order.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import media
from workers import storage
from workers.decode import fetch
from workers.decode.fetch import FetchCancelled, fetch_video
from workers.decode.frames import folder_identity
from workers.decode.reader import open_video
from workers.errors import (
    InputError,
    OutageError,
    StoreDenied,
    StoreError,
    StoreFull,
    StoreUnavailable,
    TransientError,
)
from workers.messages import SourceKind, StoreOptions, VideoSource
from workers.storage import Store, open_store

OPTIONS = StoreOptions()
FILE, FRAMES = SourceKind.FILE, SourceKind.FRAMES


def source_of(uri: str, kind: SourceKind = FILE, **facts: Any) -> VideoSource:
    return VideoSource(1, uri, uri.rpartition("/")[2], kind, **facts)


@pytest.fixture
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """Return an in-process store: these tests are about fetching, not about the wire."""
    name = "".join(char for char in request.node.name if char.isalnum())
    store = open_store(f"memory://{name}", OPTIONS)
    yield store
    store.delete([stat.key for stat in store.list("")])


@pytest.fixture
def clip(bucket: Store, tmp_path: Path) -> VideoSource:
    """Return a video in the store, with its size and etag as listed."""
    key = "odd keys//a #1?%41.mp4"
    bucket.put_file(media.write_video(tmp_path / "made.mp4"), key)
    stat = bucket.stat(key)
    assert stat is not None
    return source_of(bucket.uri_of(key), size_bytes=stat.size_bytes, etag=stat.identity())


def test_a_local_file_is_used_in_place(tmp_path: Path) -> None:
    path = media.write_video(tmp_path / "clip.mp4")
    with fetch_video(source_of(str(path)), OPTIONS, tmp_path / "spool") as local:
        assert local.path == path
    assert path.exists()
    assert not (tmp_path / "spool").exists()


def test_a_remote_file_lies_in_the_spool_meanwhile(clip: VideoSource, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    arrived: list[int] = []
    with fetch_video(clip, OPTIONS, spool, arrived.append) as local:
        assert local.path is not None
        assert local.path.parent == spool
        assert local.path.suffix == ".mp4"
        with open_video(clip, local) as reader:
            assert [media.read_index(frame.image) for frame in reader] == list(range(12))
        # and two fetches of the same video do not meet
        with fetch_video(clip, OPTIONS, spool) as other:
            assert other.path != local.path
    assert list(spool.iterdir()) == []
    assert sum(arrived) == clip.size_bytes


def test_the_spool_is_emptied_after_an_error(clip: VideoSource, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), fetch_video(clip, OPTIONS, tmp_path / "spool"):
        raise ZeroDivisionError
    assert list((tmp_path / "spool").iterdir()) == []


@pytest.mark.parametrize("kind", [FILE, FRAMES])
def test_a_video_that_is_gone(bucket: Store, tmp_path: Path, kind: SourceKind) -> None:
    for uri in (bucket.uri_of("gone.mp4"), str(tmp_path / "gone.mp4")):
        with (
            pytest.raises(InputError, match=r"gone\.mp4 was listed but is gone"),
            fetch_video(source_of(uri, kind), OPTIONS),
        ):
            pass


def test_a_video_that_changed(clip: VideoSource, bucket: Store, tmp_path: Path) -> None:
    uri = clip.uri
    for changed in (
        source_of(uri, etag="other", size_bytes=clip.size_bytes),
        source_of(uri, size_bytes=3),
    ):
        with (
            pytest.raises(InputError, match="changed since it was listed: run the same command"),
            fetch_video(changed, OPTIONS, tmp_path),
        ):
            pass
    for same in (source_of(uri), source_of(uri, size_bytes=clip.size_bytes)):
        with fetch_video(same, OPTIONS, tmp_path):
            pass


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").touch()
    with (
        pytest.raises(InputError, match=r"clip\.mp4 is empty \(0 bytes\): upload it again"),
        fetch_video(source_of(str(tmp_path / "clip.mp4")), OPTIONS),
    ):
        pass


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (StoreDenied("s3://b refused"), OutageError),
        (StoreFull("no space"), OutageError),
        (StoreUnavailable("503"), TransientError),
        (StoreError("odd"), TransientError),
        (FileNotFoundError("gone"), InputError),
        (OSError(errno.ENOSPC, "No space left on device"), OutageError),
    ],
)
def test_store_faults_become_task_errors(
    clip: VideoSource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Exception,
    expected: type[Exception],
) -> None:
    # a real store cannot be made to fail on demand in all these ways, so its method is replaced
    def fail(*args: object, **kwargs: object) -> None:
        raise fault

    opened = open_store(storage.split_uri(clip.uri)[0], OPTIONS)
    monkeypatch.setattr(type(opened), "get_file", fail)
    with pytest.raises(expected) as caught, fetch_video(clip, OPTIONS, tmp_path / "spool"):
        pass
    if isinstance(fault, (StoreFull, OSError)) and expected is OutageError:
        assert str(tmp_path / "spool") in str(caught.value)
    assert list((tmp_path / "spool").iterdir()) == []


def test_a_short_download_is_transient(
    clip: VideoSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the server would have to break its own protocol
    opened = open_store(storage.split_uri(clip.uri)[0], OPTIONS)
    monkeypatch.setattr(
        type(opened), "get_file", lambda self, key, path, on_bytes: Path(path).write_bytes(b"short")
    )
    with pytest.raises(TransientError, match="arrived with 5 of"), fetch_video(clip, OPTIONS):
        pass


def test_a_spool_directory_that_cannot_be_made(clip: VideoSource, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutageError, match=r"the spool directory .*file/spool cannot be used"),
        fetch_video(clip, OPTIONS, tmp_path / "file/spool"),
    ):
        pass


def test_a_cancelled_download(clip: VideoSource, tmp_path: Path) -> None:
    cancelled = threading.Event()
    cancelled.set()
    with (
        pytest.raises(FetchCancelled),
        fetch_video(clip, OPTIONS, tmp_path / "spool", cancelled=cancelled),
    ):
        pass
    assert list((tmp_path / "spool").iterdir()) == []


def upload_frames(bucket: Store, folder: Path, prefix: str) -> VideoSource:
    for path in sorted(folder.iterdir()):
        bucket.put_file(path, f"{prefix}/{path.name}")
    bucket.write_bytes(f"{prefix}/deeper/00000.jpg", b"another video")
    bucket.write_bytes(f"{prefix}/notes.txt", b"ignored")
    images = [
        (stat.key.rpartition("/")[2], stat.identity())
        for stat in bucket.list(f"{prefix}/")
        if stat.key.endswith(".jpg") and "deeper" not in stat.key
    ]
    return source_of(bucket.uri_of(prefix), FRAMES, etag=folder_identity(images))


def test_a_remote_folder_of_frames(
    bucket: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = upload_frames(bucket, media.write_frames(tmp_path / "w", num_frames=40), "walk")
    read, handed_out, most_ahead = [], 0, 0
    original = type(bucket).read_bytes

    def counted(self: Store, key: str) -> bytes:
        nonlocal most_ahead
        read.append(key)
        most_ahead = max(most_ahead, len(read) - handed_out)
        return original(self, key)

    monkeypatch.setattr(type(bucket), "read_bytes", counted)
    arrived: list[int] = []
    with (
        fetch_video(source, OPTIONS, tmp_path / "spool", arrived.append) as local,
        open_video(source, local) as reader,
    ):
        for handed_out, frame in enumerate(reader, 1):
            assert media.read_index(frame.image) == handed_out - 1
    assert handed_out == 40
    assert len(arrived) == 41, "every picture once, and the first once more for the header"
    assert most_ahead <= fetch.IMAGES_AHEAD + 2
    assert not (tmp_path / "spool").exists()
    assert not any(thread.name.startswith("fetch") for thread in threading.enumerate())


def test_a_local_folder_of_frames(tmp_path: Path) -> None:
    source = source_of(str(media.write_frames(tmp_path / "walk", num_frames=7)), FRAMES)
    with fetch_video(source, OPTIONS) as local, open_video(source, local) as reader:
        assert [media.read_index(frame.image) for frame in reader] == list(range(7))


def test_a_folder_that_changed(bucket: Store, tmp_path: Path) -> None:
    source = upload_frames(bucket, media.write_frames(tmp_path / "w", num_frames=3), "walk")
    bucket.delete(["walk/00001.jpg"])
    with pytest.raises(InputError, match="walk changed since"), fetch_video(source, OPTIONS):
        pass


def test_an_image_that_vanishes_half_way(bucket: Store, tmp_path: Path) -> None:
    source = upload_frames(bucket, media.write_frames(tmp_path / "w", num_frames=60), "walk")
    with fetch_video(source, OPTIONS) as local, open_video(source, local) as reader:
        frames = iter(reader)
        next(frames)
        bucket.delete(["walk/00050.jpg"])
        with pytest.raises(InputError, match=r"walk/00050\.jpg was listed but is gone"):
            list(frames)
