"""Objects on disks, buckets and in memory behind one small interface.

`open_store` gives a `Store`: one root (a folder, or a bucket with a prefix) and verbatim keys
below it. Local disks and S3 are served by their own system calls and operations, because the
commit log stands on exact semantics (complete before visible, create-if-absent, no cached
answers) that a general file system layer blurs; every other scheme goes through fsspec.
"""

from __future__ import annotations

from workers.messages import StoreOptions
from workers.storage.base import ObjectStat, Store, canonical_uri, split_uri
from workers.storage.probing import StoreReport, probe_store

__all__ = [
    "ObjectStat",
    "Store",
    "StoreReport",
    "canonical_uri",
    "open_store",
    "probe_store",
    "split_uri",
]


def open_store(uri: str, options: StoreOptions | None = None) -> Store:
    """Open the root `uri`; nothing is contacted before the first operation.

    Parameters
    ----------
    uri : str
        A folder (``/data/videos``, ``file:///data``), or ``SCHEME://bucket/prefix``.
    options : StoreOptions or None
        How to reach it; None asks the environment only.

    Returns
    -------
    Store
        Picklable and safe to share between threads.

    Raises
    ------
    ConfigError
        The URI is malformed, holds a secret, or its scheme needs a package that is missing.
    """
    uri = canonical_uri(uri)
    options = options or StoreOptions()
    scheme = uri.partition("://")[0] if "://" in uri else ""
    if not scheme:
        from workers.storage.local import LocalStore

        return LocalStore(uri, options)
    if scheme == "s3":
        from workers.storage.s3 import S3Store

        return S3Store(uri, options)
    from workers.storage.generic import FsspecStore, MemoryStore

    return MemoryStore(uri, options) if scheme == "memory" else FsspecStore(uri, options)
