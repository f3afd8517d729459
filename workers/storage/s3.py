"""Amazon S3 and what speaks its protocol.

The operations of S3 are called themselves, through botocore: its client is safe between threads,
starts no event loop, caches no listing and keeps a key as it is, and the answers to a conditional
write arrive as they were given.
"""
# ruff: noqa: D102 - the contracts stand on Store

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from workers.errors import ConfigError, StoreDenied, StoreError, StoreFull, StoreUnavailable
from workers.messages import StoreOptions
from workers.storage.base import ObjectStat, Store
from workers.storage.download import Download
from workers.storage.faults import os_fault

_ONE_PUT_BYTES = 32 << 20
_PART_BYTES = 8 << 20
_MAX_PARTS = 10_000
_NUM_TRANSFERS = 4
"""Parts of one file in flight at once; times the size of a part, this bounds its memory."""
_MAX_CONNECTIONS = 32
_CONNECT_TIMEOUT_S = 10
_READ_TIMEOUT_S = 60
_MAX_TRIES = 5
_MAX_CONFLICTS = 12
_DELETE_BATCH = 1000

_DENIED_CODES = {
    "AccessDenied",
    "AllAccessDisabled",
    "AccountProblem",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidSecurity",
    "InvalidToken",
    "NotSignedUp",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
    "UnauthorizedAccess",
}
_FULL_CODES = {
    "InsufficientStorage",
    "QuotaExceeded",
    "XMinioStorageFull",
    "XMinioAdminBucketQuotaExceeded",
}
_REGION_CODES = {
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
}
_NO_BATCH_CODES = {"NotImplemented", "MissingContentMD5", "MalformedXML", "InvalidRequest"}

T = TypeVar("T")

_clients: dict[Any, Any] = {}
_clients_lock = threading.Lock()


class S3Store(Store):
    """A bucket, or a prefix in one; see `Store`.

    Notes
    -----
    S3 lists by the bytes of the key. Some servers that stand on a tree of folders (SeaweedFS)
    list folder by folder, so what a server that is not Amazon's lists is collected and sorted;
    with them `start_after` can be relied on among the keys of one folder only. Such servers may
    also fold ``a//b`` into ``a/b``; here the key is sent and returned as it is.
    """

    def __init__(self, uri: str, options: StoreOptions | None = None) -> None:
        super().__init__(uri, options)
        self._bucket, slash, prefix = self.uri.removeprefix("s3://").partition("/")
        self._prefix = prefix + slash

    def read_bytes(self, key: str) -> bytes:
        return self._get(key)

    def read_range(self, key: str, start: int, stop: int, *, etag: str | None = None) -> bytes:
        if stop <= start:
            return b""
        more = {"IfMatch": f'"{etag}"'} if etag else {}
        return self._get(key, Range=f"bytes={start}-{stop - 1}", **more)

    def _get(self, key: str, **more: Any) -> bytes:
        """Return the body of a GET; a connection that breaks within it is tried again."""
        from botocore.exceptions import (
            ClientError,
            IncompleteReadError,
            ReadTimeoutError,
            ResponseStreamingError,
        )

        def get() -> bytes:
            try:
                answer = self._client.get_object(**self._object(key), **more)
            except ClientError as error:
                if _code(error) == "InvalidRange" or _status(error) == 416:
                    return b""
                raise
            data: bytes = answer["Body"].read()
            return data

        for number in range(1, _MAX_TRIES + 1):
            try:
                return self._call(get, key)
            except StoreUnavailable as error:
                broken = (IncompleteReadError, ReadTimeoutError, ResponseStreamingError)
                if not isinstance(error.__cause__, broken) or number == _MAX_TRIES:
                    raise
                _back_off(number)
        raise AssertionError("unreachable: the last try returns or raises")

    def get_file(
        self, key: str, local_path: str | Path, *, on_bytes: Callable[[int], None] | None = None
    ) -> None:
        found = self.stat(key)
        if found is None:
            raise FileNotFoundError(f"{self.uri_of(key)} does not exist")
        ranges = [
            (start, min(start + _PART_BYTES, found.size_bytes))
            for start in range(0, found.size_bytes, _PART_BYTES)
        ]

        def fetch(part: tuple[int, int]) -> int:
            start, stop = part
            data = self.read_range(key, start, stop, etag=found.etag)
            if len(data) != stop - start:
                raise StoreUnavailable(f"{self.uri_of(key)} changed while it was read: try again")
            target.write_at(start, data)
            return len(data)

        with Download(local_path) as target:
            _in_parallel(fetch, ranges, on_bytes)

    def write_bytes(self, key: str, data: bytes) -> None:
        self._call(lambda: self._client.put_object(**self._object(key), Body=data), key)

    def put_file(
        self, local_path: str | Path, key: str, *, on_bytes: Callable[[int], None] | None = None
    ) -> None:
        path = Path(local_path)
        try:
            size = path.stat().st_size
            if size <= _ONE_PUT_BYTES:
                data = path.read_bytes()
        except OSError as error:
            raise os_fault(error, str(path), writing=False) from error
        if size <= _ONE_PUT_BYTES:
            self.write_bytes(key, data)
            if on_bytes is not None:
                on_bytes(size)
        else:
            self._put_parts(path, size, key, on_bytes)

    def _put_parts(
        self, path: Path, size: int, key: str, on_bytes: Callable[[int], None] | None = None
    ) -> None:
        """Upload a large file in parts; a failed upload leaves nothing behind."""
        part_bytes = max(_PART_BYTES, -(-size // _MAX_PARTS))
        place = self._object(key)
        client = self._client
        upload = self._call(lambda: client.create_multipart_upload(**place), key)["UploadId"]

        def send(number: int) -> dict[str, Any]:
            try:
                with path.open("rb") as file:
                    file.seek((number - 1) * part_bytes)
                    data = file.read(part_bytes)
            except OSError as error:
                raise os_fault(error, str(path), writing=False) from error
            if len(data) != min(part_bytes, size - (number - 1) * part_bytes):
                raise StoreError(f"{path} changed while it was uploaded to {self.uri_of(key)}")
            answer = self._call(
                lambda: client.upload_part(**place, UploadId=upload, PartNumber=number, Body=data),
                key,
            )
            return {"ETag": answer["ETag"], "PartNumber": number}

        def sent(part: dict[str, Any]) -> None:
            if on_bytes is not None:
                on_bytes(min(part_bytes, size - (part["PartNumber"] - 1) * part_bytes))

        try:
            parts = _in_parallel(send, range(1, -(-size // part_bytes) + 1), sent)
            self._call(lambda: self._complete(place, upload, parts, key, size), key)
        except BaseException:
            # The first fault is the one to tell.
            with contextlib.suppress(Exception):
                client.abort_multipart_upload(**place, UploadId=upload)
            raise

    def _complete(
        self, place: dict[str, str], upload: str, parts: list[dict[str, Any]], key: str, size: int
    ) -> None:
        from botocore.exceptions import ClientError

        try:
            self._client.complete_multipart_upload(
                **place, UploadId=upload, MultipartUpload={"Parts": parts}
            )
        except ClientError as error:
            # A lost answer and botocore's own retry: the upload is gone because it is complete.
            found = self.stat(key) if _code(error) == "NoSuchUpload" else None
            if found is None or found.size_bytes != size:
                raise

    def create(self, key: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        def put() -> str:
            try:
                self._client.put_object(**self._object(key), Body=data, IfNoneMatch="*")
            except ClientError as error:
                status = _status(error)
                if status == 412 or _code(error) == "PreconditionFailed":
                    return "exists"
                if status == 409:
                    return "again"
                if status == 501 or _code(error) == "NotImplemented":
                    raise StoreError(
                        f"{self.uri} does not support conditional writes; use a store that does, "
                        "or --single-driver at your own risk"
                    ) from error
                raise
            return "created"

        for number in range(1, _MAX_CONFLICTS + 1):
            outcome = self._call(put, key)
            if outcome != "again":
                return outcome == "created"
            _back_off(number, 0.05)
        raise StoreUnavailable(
            f"{self.uri_of(key)} stays in conflict with other writers: try again later"
        )

    def stat(self, key: str) -> ObjectStat | None:
        try:
            head = self._call(lambda: self._client.head_object(**self._object(key)), key)
        except FileNotFoundError:
            return None
        return _object_stat(key, head, head["ContentLength"])

    def list(self, prefix: str = "", *, start_after: str | None = None) -> Iterator[ObjectStat]:
        found = self._pages(prefix, start_after)
        if not self._is_amazon():
            found = iter(sorted(found, key=lambda entry: entry.key.encode()))
        for entry in found:
            if start_after is None or entry.key.encode() > start_after.encode():
                yield entry

    def _pages(self, prefix: str, start_after: str | None) -> Iterator[ObjectStat]:
        request: dict[str, Any] = {"Bucket": self._bucket, "Prefix": self._prefix + prefix}
        if start_after is not None:
            request["StartAfter"] = self._prefix + start_after
        while True:
            page = self._call(lambda: self._client.list_objects_v2(**request), prefix)
            for entry in page.get("Contents", ()):
                # botocore asks for url-encoded keys and has decoded them.
                key = entry["Key"].removeprefix(self._prefix)
                yield _object_stat(key, entry, entry["Size"])
            token = page.get("NextContinuationToken")
            if not page.get("IsTruncated") or not token:
                return
            request["ContinuationToken"] = token

    def delete(self, keys: Iterable[str]) -> None:
        waiting = list(dict.fromkeys(keys))
        for start in range(0, len(waiting), _DELETE_BATCH):
            batch: Sequence[str] = waiting[start : start + _DELETE_BATCH]
            if len(batch) > 1:
                batch = self._delete_batch(batch)
            _in_parallel(self._delete_one, batch)

    def _delete_batch(self, keys: Sequence[str]) -> Sequence[str]:
        """Delete in one request; return the keys that must be deleted one by one."""
        from botocore.exceptions import ClientError

        objects = [{"Key": self._prefix + key} for key in keys]

        def delete() -> dict[str, Any]:
            try:
                answer: dict[str, Any] = self._client.delete_objects(
                    Bucket=self._bucket, Delete={"Objects": objects, "Quiet": True}
                )
            except ClientError as error:
                # Servers without this operation, or with another idea of its checksum.
                if _code(error) in _NO_BATCH_CODES or _status(error) == 501:
                    return {"Errors": objects}
                raise
            return answer

        failed = self._call(delete, keys[0]).get("Errors", ())
        return [entry["Key"].removeprefix(self._prefix) for entry in failed]

    def _delete_one(self, key: str) -> None:
        try:
            self._call(lambda: self._client.delete_object(**self._object(key)), key)
        except FileNotFoundError:
            return

    def sweep(self, *, older_than_s: float = 86_400) -> int:
        num_removed = 0
        newest = time.time() - older_than_s
        request: dict[str, Any] = {"Bucket": self._bucket, "Prefix": self._prefix}
        while True:
            page = self._call(lambda: self._client.list_multipart_uploads(**request), "")
            for upload in page.get("Uploads", ()):
                if upload["Initiated"].timestamp() <= newest:
                    self._abort(upload["Key"], upload["UploadId"])
                    num_removed += 1
            if not page.get("IsTruncated") or not page.get("NextKeyMarker"):
                return num_removed
            request["KeyMarker"] = page["NextKeyMarker"]
            request["UploadIdMarker"] = page.get("NextUploadIdMarker", "")

    def _abort(self, full_key: str, upload: str) -> None:
        try:
            self._call(
                lambda: self._client.abort_multipart_upload(
                    Bucket=self._bucket, Key=full_key, UploadId=upload
                ),
                full_key.removeprefix(self._prefix),
            )
        except StoreDenied:
            raise
        except (FileNotFoundError, StoreError) as error:
            # It ended by itself meanwhile.
            if _code(error.__cause__) != "NoSuchUpload":
                raise

    def _object(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    @property
    def _client(self) -> Any:
        return _shared_client(self.options)

    def _is_amazon(self) -> bool:
        host = str(self._client.meta.endpoint_url).partition("://")[2].partition("/")[0]
        return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))

    def _call(self, operation: Callable[[], T], key: str) -> T:
        """Run `operation` and tell its faults as ours."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return operation()
        except ClientError as error:
            raise self._client_fault(error, key) from error
        except BotoCoreError as error:
            raise self._sdk_fault(error, key) from error

    def _client_fault(self, error: Any, key: str) -> Exception:
        """Return what to raise for an answer of the server that is an error."""
        code, status = _code(error), _status(error)
        message = str(error.response.get("Error", {}).get("Message", "")).strip(" .")
        uri = self.uri_of(key)
        said = f"{code} ({message})" if message and message != code else code
        if code == "InvalidObjectState":
            return StoreError(f"{uri} is archived: restore it from its storage class first")
        if code in _FULL_CODES or status == 507:
            return StoreFull(f"{uri} cannot be written: the store is full, it says {said}")
        if code in _REGION_CODES:
            return StoreError(
                f"bucket {self._bucket} lies in another region, the store says {said}: give its "
                "region"
            )
        if code in _DENIED_CODES or status in (401, 403):
            return StoreDenied(
                f"{uri} is denied, the store says {said}: check the credentials in the environment "
                "and what they may do with this bucket"
            )
        if code == "NoSuchBucket":
            return StoreError(f"bucket {self._bucket} does not exist: create it, or check {uri}")
        if code in ("NoSuchKey", "NoSuchVersion") or (status == 404 and code != "NoSuchUpload"):
            return FileNotFoundError(f"{uri} does not exist")
        if status == 412:
            return StoreUnavailable(f"{uri} changed while it was read: try again")
        throttled = code in ("SlowDown", "RequestTimeout", "BadDigest") or "Throttl" in code
        if throttled or status == 429 or (status >= 500 and status != 501):
            return StoreUnavailable(
                f"{uri} is not served now, the store says {said} again and again: try later"
            )
        return StoreError(f"{uri} is refused, the store says {said}")

    def _sdk_fault(self, error: Any, key: str) -> Exception:
        """Return what to raise when no answer came, or no request could be made."""
        from botocore import exceptions

        uri = self.uri_of(key)
        said = " ".join(str(error).split()).strip(" .")
        if isinstance(error, exceptions.ProfileNotFound):
            return ConfigError(f"{uri} cannot be opened: {said}; check --profile or AWS_PROFILE")
        denied = (
            exceptions.NoCredentialsError,
            exceptions.PartialCredentialsError,
            exceptions.CredentialRetrievalError,
            exceptions.TokenRetrievalError,
            exceptions.NoAuthTokenError,
            exceptions.SSOError,
        )
        if isinstance(error, denied):
            return StoreDenied(
                f"{uri} needs credentials and none are usable ({said}): set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, a profile, or an anonymous store"
            )
        if isinstance(error, (exceptions.ParamValidationError, exceptions.InvalidRegionError)):
            # The rest of botocore's sentence is a screenful of regular expressions.
            reason = said.partition(": Bucket name must match")[0]
            return ConfigError(f"{uri} is not a valid S3 location: {reason}")
        lost = (
            exceptions.HTTPClientError,
            exceptions.ConnectionError,
            exceptions.IncompleteReadError,
        )
        if isinstance(error, lost):
            return StoreUnavailable(
                f"{uri} cannot be reached ({said}): check the endpoint and the network"
            )
        return StoreError(f"{uri} failed: {said}")


def _in_parallel(
    function: Callable[[Any], T],
    items: Iterable[Any],
    on_result: Callable[[T], None] | None = None,
) -> list[T]:
    """Return ``function(item)`` of all, some at a time; no thread outlives the call.

    After a fault, in `function` or in `on_result` (called in this thread, in order), nothing new
    begins.
    """
    results: list[T] = []
    with concurrent.futures.ThreadPoolExecutor(_NUM_TRANSFERS) as executor:
        futures = [executor.submit(function, item) for item in items]
        try:
            for future in futures:
                results.append(future.result())
                if on_result is not None:
                    on_result(results[-1])
        except BaseException:
            executor.shutdown(wait=True, cancel_futures=True)
            raise
    return results


def _back_off(number: int, first_s: float = 0.2) -> None:
    time.sleep(min(5.0, first_s * 2 ** (number - 1)) * random.uniform(0.5, 1.0))


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)


def _object_stat(key: str, entry: dict[str, Any], size: int) -> ObjectStat:
    etag = (entry.get("ETag") or "").strip('"')
    changed = entry.get("LastModified")
    mtime_ns = int(changed.timestamp() * 1000) * 1_000_000 if changed is not None else None
    return ObjectStat(key, int(size), etag or None, mtime_ns)


def _shared_client(options: StoreOptions) -> Any:
    """Return this process's client for `options` and the present environment."""
    environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    identity = (os.getpid(), options, environment)
    client = _clients.get(identity)
    if client is None:
        with _clients_lock:
            client = _clients.get(identity)
            if client is None:
                client = _clients[identity] = _new_client(options)
    return client


def _new_client(options: StoreOptions) -> Any:
    import botocore.session
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ProfileNotFound

    settings: dict[str, Any] = {
        "connect_timeout": _CONNECT_TIMEOUT_S,
        "read_timeout": _READ_TIMEOUT_S,
        "max_pool_connections": _MAX_CONNECTIONS,
        "retries": {"mode": "standard", "total_max_attempts": _MAX_TRIES},
        "tcp_keepalive": True,
        "user_agent_extra": "maskmill",
        # Several servers refuse the checksum headers that are new; content is hashed by us.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    if options.path_style:
        settings["s3"] = {"addressing_style": "path"}
    if options.anonymous:
        settings["signature_version"] = UNSIGNED
    try:
        session = botocore.session.Session(profile=options.profile)
        # botocore itself reads AWS_DEFAULT_REGION only.
        region = (
            options.region
            or os.environ.get("AWS_REGION")
            or session.get_config_variable("region")
            or "us-east-1"
        )
        return session.create_client(
            "s3",
            endpoint_url=options.endpoint_url,
            region_name=region,
            config=Config(**settings),
        )
    except ProfileNotFound as error:
        raise ConfigError(f"{error}: check --profile or AWS_PROFILE") from error
    except (BotoCoreError, ValueError) as error:
        where = f"the S3 endpoint {options.endpoint_url}" if options.endpoint_url else "S3"
        raise ConfigError(f"{where} cannot be used: {error}") from error
