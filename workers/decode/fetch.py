"""Bringing one video to where a decoder can open it, and taking it away again.

Local files are used in place. A remote container file is downloaded to the spool directory, since
decoders seek; the images of a remote folder of frames are fetched a few ahead of the decoder and
never touch the disk. Store faults become the task errors that the fault policy knows.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from workers.decode.frames import folder_identity, is_image, order_frames
from workers.decode.reader import LocalVideo
from workers.errors import (
    InputError,
    OutageError,
    StoreDenied,
    StoreError,
    StoreFull,
    TransientError,
)
from workers.messages import SourceKind, StoreOptions, VideoSource
from workers.storage import ObjectStat, Store, open_store, split_uri

IMAGES_AHEAD = 16
"""Images of a remote folder that are fetched before the decoder asks for them."""

_FETCH_THREADS = 8

_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,8}")

OnBytes = Callable[[int], None]
"""Called with the number of bytes that arrived since its last call."""


class FetchCancelled(Exception):  # noqa: N818 - an outcome that was asked for, not a fault
    """The attempt was cancelled while its video was fetched."""


@contextlib.contextmanager
def fetch_video(
    source: VideoSource,
    options: StoreOptions,
    spool_dir: str | Path | None = None,
    on_bytes: OnBytes | None = None,
    cancelled: threading.Event | None = None,
) -> Iterator[LocalVideo]:
    """Make one video readable on this machine for as long as the context lasts.

    Parameters
    ----------
    source : VideoSource
        The video; its size and etag, where given, must still be those of the object.
    options : StoreOptions
        How to reach the corpus.
    spool_dir : str, Path or None
        Where a remote file is kept meanwhile; made when missing. None is the system's temporary
        directory.
    on_bytes : callable or None
        Called as bytes arrive, for progress: in the calling thread for files, in the thread that
        iterates for folders of frames.
    cancelled : threading.Event or None
        When set, the download stops.

    Yields
    ------
    LocalVideo
        For `open_video`. A downloaded file is removed when the context ends.

    Raises
    ------
    InputError
        The video is gone, empty, or not the one that was listed.
    TransientError
        The store did not answer or delivered less than it promised.
    OutageError
        The store refused the credentials, or the spool directory is full.
    FetchCancelled
        `cancelled` was set.
    """
    root, key = split_uri(source.uri)
    with _task_errors(source.name, spool_dir):
        store = open_store(root, options)
        if source.kind is SourceKind.FRAMES:
            video = LocalVideo(images=_find_images(store, key, source, on_bytes, cancelled))
        else:
            found = store.stat(key)
            if found is None:
                raise FileNotFoundError
            _check_unchanged(source, found)
            if not found.size_bytes:
                raise InputError(
                    f"{source.name} is empty (0 bytes): upload it again or remove it from the "
                    "corpus"
                )
            local = store.local_path(key)
            if local is None:
                path = _download(store, found, source, spool_dir, on_bytes, cancelled)
                video = LocalVideo(path=path)
            else:
                path = None
                video = LocalVideo(path=local)
    if source.kind is SourceKind.FRAMES or path is None:
        yield video
        return
    try:
        yield video
    finally:
        path.unlink(missing_ok=True)


def _download(
    store: Store,
    found: ObjectStat,
    source: VideoSource,
    spool_dir: str | Path | None,
    on_bytes: OnBytes | None,
    cancelled: threading.Event | None,
) -> Path:
    def arrived(num_bytes: int) -> None:
        if cancelled is not None and cancelled.is_set():
            raise FetchCancelled(f"the download of {source.name} was cancelled")
        if on_bytes is not None:
            on_bytes(num_bytes)

    suffix = _SUFFIX.fullmatch(Path(found.key).suffix)
    if spool_dir is not None:
        Path(spool_dir).mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        prefix="maskmill-", suffix=suffix[0] if suffix else "", dir=spool_dir
    )
    os.close(handle)
    path = Path(name)
    try:
        arrived(0)
        store.get_file(found.key, path, on_bytes=arrived)
        size_bytes = path.stat().st_size
        if size_bytes != found.size_bytes:
            raise TransientError(
                f"{source.name} arrived with {size_bytes} of {found.size_bytes} bytes"
            )
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def _check_unchanged(source: VideoSource, found: ObjectStat) -> None:
    if source.etag is not None:
        same = source.etag in (found.etag, found.identity())
    else:
        same = source.size_bytes in (None, found.size_bytes)
    if not same:
        _raise_changed(source)


def _raise_changed(source: VideoSource) -> NoReturn:
    raise InputError(f"{source.name} changed since it was listed: run the same command again")


def _find_images(
    store: Store,
    key: str,
    source: VideoSource,
    on_bytes: OnBytes | None,
    cancelled: threading.Event | None,
) -> Images:
    prefix = f"{key.rstrip('/')}/"
    found: list[tuple[str, str]] = []
    for stat in store.list(prefix):
        name = stat.key.removeprefix(prefix)
        if "/" not in name and is_image(name) and not name.startswith("."):
            found.append((name, stat.identity()))
    if not found:
        raise FileNotFoundError
    if source.etag is not None and source.etag != folder_identity(found):
        _raise_changed(source)
    names = order_frames((name for name, _ in found), source.name)
    return Images(store, prefix, names, source.name, on_bytes, cancelled)


@dataclass(frozen=True, slots=True)
class Images:
    """The pictures of one folder in any store, fetched a bounded number ahead.

    Attributes
    ----------
    store : Store
        Where they are.
    prefix : str
        Key of the folder, with its slash.
    names : sequence of str
        File names in frame order.
    video : str
        How messages call the folder.
    on_bytes : callable or None
        Told of every picture that is handed out.
    cancelled : threading.Event or None
        When set, the next picture is FetchCancelled.
    """

    store: Store
    prefix: str
    names: Sequence[str]
    video: str
    on_bytes: OnBytes | None = None
    cancelled: threading.Event | None = None

    def stream(self, indices: Iterable[int]) -> Iterator[bytes]:
        """Yield the content of the files at `indices`, at most `IMAGES_AHEAD` in memory."""
        read = self._read_local if self.store.local_path(self.prefix) else self._read_ahead
        for data in read(indices):
            if self.cancelled is not None and self.cancelled.is_set():
                raise FetchCancelled(f"the download of {self.video} was cancelled")
            if self.on_bytes is not None:
                self.on_bytes(len(data))
            yield data

    def _read_local(self, indices: Iterable[int]) -> Iterator[bytes]:
        # a disk is read in order already, threads would only add switches
        for index in indices:
            yield self._read(index)

    def _read_ahead(self, indices: Iterable[int]) -> Iterator[bytes]:
        pool = ThreadPoolExecutor(_FETCH_THREADS, thread_name_prefix="fetch")
        pending: deque[Future[bytes]] = deque()
        try:
            for index in indices:
                pending.append(pool.submit(self._read, index))
                if len(pending) >= IMAGES_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            # after the last one there is nothing to wait for; when stopped half way, a slow store
            # must not hold the attempt up
            pool.shutdown(wait=not pending, cancel_futures=True)

    def _read(self, index: int) -> bytes:
        name = self.names[index]
        with _task_errors(f"{self.video}/{name}", None):
            return self.store.read_bytes(self.prefix + name)


@contextlib.contextmanager
def _task_errors(name: str, spool_dir: str | Path | None) -> Iterator[None]:
    """Turn store faults into the kinds that decide who retries."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(
            f"{name} was listed but is gone: put it back, or run the same command again"
        ) from error
    except StoreDenied as error:
        raise OutageError(str(error)) from error
    except StoreFull as error:
        raise OutageError(_full_sentence(spool_dir)) from error
    except StoreError as error:
        # StoreUnavailable passes by itself; whatever else a store says of one object is retried
        # too, and an outage shows as many videos failing alike
        raise TransientError(f"{name} could not be fetched: {error}") from error
    except OSError as error:
        # only the spool directory is touched directly
        raise OutageError(
            f"the spool directory {spool_dir or tempfile.gettempdir()} cannot be used ({error}): "
            "choose another with --spool-dir"
        ) from error


def _full_sentence(spool_dir: str | Path | None) -> str:
    return (
        f"the spool directory {spool_dir or tempfile.gettempdir()} is full: free some space, or "
        "choose another with --spool-dir"
    )
