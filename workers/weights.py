"""Checkpoints: from a path or URL to a checked file on this node, once per node.

A local file is used where it is. Anything else is downloaded into a cache whose names follow the
content (URL and etag), under a lock that all processes of the node respect, so ten workers that
start together download once; a half-written file never has the final name.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from workers.errors import ConfigError
from workers.messages import StoreOptions
from workers.storage import open_store, split_uri

CACHE_VARIABLE = "MASKMILL_CACHE"
"""Environment variable that names the cache folder."""


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """A checkpoint on this node.

    Attributes
    ----------
    path : Path
        The local file.
    sha256 : str
        Hex digest of its content.
    """

    path: Path
    sha256: str


def cache_folder() -> Path:
    """Return where downloaded weights are kept.

    Returns
    -------
    Path
        ``$MASKMILL_CACHE/weights``, else ``maskmill/weights`` below ``$XDG_CACHE_HOME`` or
        ``~/.cache``. Not created here.
    """
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser() / "weights"
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "maskmill" / "weights"


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_weights(
    uri: str,
    options: StoreOptions | None = None,
    *,
    cache_dir: str | Path | None = None,
    sha256: str | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> WeightsFile:
    """Bring a checkpoint to this node.

    Parameters
    ----------
    uri : str
        Local path, or URL of any store.
    options : StoreOptions, optional
        How to reach the store.
    cache_dir : str or Path, optional
        Where downloads are kept; `cache_folder()` when left out.
    sha256 : str, optional
        Digest the file must have.
    on_bytes : callable, optional
        Called with the number of bytes that arrived since its last call.

    Returns
    -------
    WeightsFile
        A complete file. Local files are used in place, never copied.

    Raises
    ------
    ConfigError
        The file is missing, empty, truncated, or has another digest.
    StoreError
        The store is unreachable, denies access, or this node's disk is full.
    """
    root, key = split_uri(uri)
    store = open_store(root, options)
    stat = store.stat(key) if key else None
    local = store.local_path(key) if key else None
    if stat is None or (local is not None and not local.is_file()):
        raise ConfigError(f"the checkpoint {uri} does not exist: give the path or URL of a file")
    if not stat.size_bytes:
        raise ConfigError(f"the checkpoint {uri} is empty (0 bytes): upload it again")
    if local is not None:
        found = WeightsFile(local, file_sha256(local))
    else:
        folder = Path(cache_dir) if cache_dir is not None else cache_folder()
        identity = f"{store.uri_of(key)}\n{stat.identity()}"
        digest = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
        name = re.sub(r"[^\w.-]", "_", key.rpartition("/")[2])[-100:]
        path = folder / f"{digest}-{name}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder / f".{digest}.lock"):
                known = _cached(path, stat.size_bytes)
                if known is None:
                    known = _download(
                        lambda to: store.get_file(key, to, on_bytes=on_bytes),
                        path,
                        uri,
                        stat.size_bytes,
                    )
        except FileNotFoundError as error:
            raise ConfigError(
                f"the checkpoint {uri} vanished while it was fetched: put it back"
            ) from error
        except PermissionError as error:
            raise ConfigError(
                f"the weights cache {folder} cannot be written: set {CACHE_VARIABLE} to a folder "
                f"that can ({error.strerror})"
            ) from error
        found = WeightsFile(path, known)
    check_container(found.path, uri)
    if sha256 is not None and found.sha256 != sha256.lower():
        raise ConfigError(
            f"the checkpoint {uri} has sha256 {found.sha256}, but {sha256} was expected: it is "
            f"another file, or it was damaged on the way"
        )
    return found


def check_container(path: Path, uri: str | None = None) -> None:
    """Refuse a checkpoint that is cut short, without loading it.

    Looks at the structure only: the archive's directory of a ``.pt``/``.pth`` file, the header of
    a ``.safetensors`` file. Whether the network fits is for the tracker to say.

    Raises
    ------
    ConfigError
        The file is truncated or no checkpoint at all.
    """
    name = uri or str(path)
    if path.suffix in (".pt", ".pth"):
        with path.open("rb") as file:
            head = file.read(4)
        # Checkpoints of torch before 1.6 are bare pickles, whose end only a full read would show.
        if not zipfile.is_zipfile(path) and head[:1] != b"\x80":
            cut = head.startswith(b"PK")
            raise ConfigError(
                f"the checkpoint {name} is {'truncated' if cut else 'no PyTorch checkpoint'}: "
                f"fetch it again"
            )
    elif path.suffix == ".safetensors" and _safetensors_size(path) != path.stat().st_size:
        raise ConfigError(
            f"the checkpoint {name} is truncated or no safetensors file: fetch it again"
        )


def _safetensors_size(path: Path) -> int | None:
    """Return the size the header promises, in bytes; None when there is no header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            return None
        try:
            entries = json.loads(file.read(length))
            ends = [e["data_offsets"][1] for k, e in entries.items() if k != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
    return 8 + length + int(max(ends, default=0))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that other processes of this node respect; it ends with its process."""
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _cached(path: Path, size_bytes: int) -> str | None:
    """Return the digest of a complete file in the cache, None when there is none."""
    if not path.is_file() or path.stat().st_size != size_bytes:
        return None
    return file_sha256(path)


def _download(get: Callable[[Path], None], path: Path, uri: str, size_bytes: int) -> str:
    """Download to a temporary name, check the size, and rename; return the digest."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        get(temporary)
        got = temporary.stat().st_size
        if got != size_bytes:
            raise ConfigError(
                f"the checkpoint {uri} arrived with {got} of {size_bytes} bytes: try again"
            )
        digest = file_sha256(temporary)
        temporary.replace(path)
        return digest
    finally:
        temporary.unlink(missing_ok=True)
