"""Every scheme that has an fsspec file system, memory included."""

# ruff: noqa: D102 - the contracts stand on Store
from __future__ import annotations

import datetime
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from workers.errors import (
    ConfigError,
    MaskmillError,
    StoreDenied,
    StoreError,
    StoreUnavailable,
)
from workers.messages import StoreOptions
from workers.storage.base import ObjectStat, Store
from workers.storage.download import Download
from workers.storage.faults import os_fault

_CHUNK_BYTES = 8 << 20
_PACKAGES = {
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "adl": "adlfs",
    "oss": "ossfs",
    "hf": "huggingface_hub",
    "sftp": "paramiko",
    "ssh": "paramiko",
    "http": "aiohttp",
    "https": "aiohttp",
    "hdfs": "pyarrow",
    "smb": "smbprotocol",
    "webdav": "webdav4",
}
UNLISTED = ("http://", "https://")
"""Schemes of servers that serve files by name and list none."""
_MEMORY = threading.RLock()


class FsspecStore(Store):
    """A root of any fsspec file system; see `Store`.

    Raises
    ------
    ConfigError
        The scheme is unknown, or the package that serves it is not installed.
    """

    def __init__(self, uri: str, options: StoreOptions | None = None) -> None:
        super().__init__(uri, options)
        self._fs = _file_system(self.uri, self.options)
        self._root: str = self._fs._strip_protocol(self.uri).rstrip("/")

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _call(self, method: str, key: str, *arguments: Any, **named: Any) -> Any:
        """Call the file system, its listing cache emptied, its exceptions told as ours."""
        try:
            self._fs.invalidate_cache()
            return getattr(self._fs, method)(*arguments, **named)
        except (FileExistsError, MaskmillError):
            raise
        except Exception as error:
            writing = method in ("pipe_file", "put_file", "rm_file")
            raise _fault(error, self.uri_of(key), writing=writing) from error

    def read_bytes(self, key: str) -> bytes:
        return bytes(self._call("cat_file", key, self._path(key)))

    def read_range(self, key: str, start: int, stop: int, *, etag: str | None = None) -> bytes:
        if stop <= start:
            return b""
        return bytes(self._call("cat_file", key, self._path(key), start=start, end=stop))

    def get_file(
        self, key: str, local_path: str | Path, *, on_bytes: Callable[[int], None] | None = None
    ) -> None:
        found = self.stat(key)
        if found is None:
            raise FileNotFoundError(f"{self.uri_of(key)} does not exist")
        with Download(local_path) as target:
            for start in range(0, found.size_bytes, _CHUNK_BYTES):
                stop = min(start + _CHUNK_BYTES, found.size_bytes)
                chunk = self.read_range(key, start, stop)
                if len(chunk) != stop - start:
                    raise StoreUnavailable(
                        f"{self.uri_of(key)} changed while it was read: try again"
                    )
                target.write_at(start, chunk)
                if on_bytes is not None:
                    on_bytes(len(chunk))

    def write_bytes(self, key: str, data: bytes) -> None:
        self._call("pipe_file", key, self._path(key), data)

    def put_file(
        self, local_path: str | Path, key: str, *, on_bytes: Callable[[int], None] | None = None
    ) -> None:
        from fsspec.callbacks import Callback

        if not Path(local_path).is_file():
            raise FileNotFoundError(f"{local_path} does not exist")
        num_sent = 0

        def sent(total: int) -> None:
            nonlocal num_sent
            if on_bytes is not None and total > num_sent:
                on_bytes(total - num_sent)
            num_sent = max(num_sent, total)

        callback = Callback(hooks={"sent": lambda _, total: sent(total)})
        self._call("put_file", key, str(local_path), self._path(key), callback=callback)
        # Some of these file systems count nothing on the way.
        sent(Path(local_path).stat().st_size)

    def create(self, key: str, data: bytes) -> bool:
        try:
            self._call("pipe_file", key, self._path(key), data, mode="create")
        except FileExistsError:
            return False
        except (NotImplementedError, TypeError, ValueError) as error:
            raise StoreError(f"{self.uri} cannot create objects exclusively: {error}") from error
        return True

    def stat(self, key: str) -> ObjectStat | None:
        try:
            entry = self._call("info", key, self._path(key))
        except FileNotFoundError:
            return None
        return None if entry.get("type") == "directory" else _object_stat(key, entry)

    def list(self, prefix: str = "", *, start_after: str | None = None) -> Iterator[ObjectStat]:
        if self.uri.startswith(UNLISTED):
            raise StoreError(
                f"{self.uri} cannot be listed, since it is a web server: name each file, for "
                "instance in a manifest"
            )
        folder = self._path(prefix).rpartition("/")[0]
        try:
            entries = self._call("find", prefix, folder, detail=True)
        except FileNotFoundError:
            return
        start = len(self._root) + 1
        keyed = {name[start:]: entry for name, entry in entries.items()}
        for key in sorted(keyed, key=lambda key: key.encode("utf-8", "surrogateescape")):
            if key.startswith(prefix) and (start_after is None or key > start_after):
                yield _object_stat(key, keyed[key])

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            try:
                self._call("rm_file", key, self._path(key))
            except FileNotFoundError:
                continue
            except StoreError as error:
                # Most of these stores say nothing when a key is missing; some say it in their
                # own words.
                if self.stat(key) is not None:
                    raise error


class MemoryStore(FsspecStore):
    """Objects in this process, for tests: every operation is atomic under one lock."""

    def _call(self, method: str, key: str, *arguments: Any, **named: Any) -> Any:
        with _MEMORY:
            return super()._call(method, key, *arguments, **named)


def _file_system(uri: str, options: StoreOptions) -> Any:
    import fsspec

    scheme = uri.partition("://")[0]
    try:
        factory = fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        hint = f"the package {package}: pip install {package}" if package else str(error)
        raise ConfigError(f"{uri} needs {hint}") from error
    except ValueError as error:
        raise ConfigError(
            f"{uri} cannot be opened: no file system is known for {scheme}://; use a path, s3://, "
            "gs:// or another scheme of fsspec"
        ) from error
    named: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if options.anonymous and scheme in ("gs", "gcs"):
        named["token"] = "anon"
    if options.endpoint_url and scheme in ("gs", "gcs"):
        named["endpoint_url"] = options.endpoint_url
    try:
        return factory(**named)
    except MaskmillError:
        raise
    except Exception as error:
        raise _fault(error, uri, writing=False) from error


def _object_stat(key: str, entry: dict[str, Any]) -> ObjectStat:
    etag = next((entry[name] for name in ("etag", "ETag", "md5Hash") if entry.get(name)), None)
    changed = next(
        (entry[n] for n in ("mtime", "updated", "last_modified", "created") if entry.get(n)), None
    )
    mtime_ns = None
    if isinstance(changed, datetime.datetime):
        mtime_ns = round(changed.timestamp() * 1e6) * 1000
    elif isinstance(changed, (int, float)):
        mtime_ns = round(changed * 1e6) * 1000  # as above: list and stat must agree
    size = entry.get("size")
    return ObjectStat(key, int(size or 0), str(etag).strip('"') if etag else None, mtime_ns)


def _fault(error: Exception, uri: str, *, writing: bool) -> Exception:
    """Tell what a cloud library raised by its HTTP status where it carries one."""
    # A web server that refuses or does not answer is told as a missing file, with the real cause.
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and uri.startswith(UNLISTED):
        error = cause if isinstance(cause, Exception) else error
    status = next(
        (
            value
            for name in ("status", "status_code", "code")
            if isinstance(value := getattr(error, name, None), int)
        ),
        None,
    )
    text = " ".join(str(error).split()) or type(error).__name__
    if status in (401, 403) or isinstance(error, PermissionError):
        return StoreDenied(f"{uri} refused the credentials: {text}")
    if status == 404:
        return FileNotFoundError(f"{uri} does not exist")
    if status is not None and (status == 429 or status >= 500):
        return StoreUnavailable(f"{uri} did not answer properly: {text}")
    if isinstance(error, OSError):
        return os_fault(error, uri, writing=writing)
    if "credential" in type(error).__name__.lower():
        return StoreDenied(f"{uri} needs credentials: {text}")
    return StoreError(f"{uri} cannot be {'written' if writing else 'read'}: {text}")
