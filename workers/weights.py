"""Checkpoints: from a path, URL or hub id to a checked file on this node, once per node.

A local file is used where it is, and one of the hub in the cache of its library. Anything else is
downloaded into a cache whose names follow the content (URL and etag), under a lock that all
processes of the node respect, so ten workers that start together download once; a half-written
file never has the final name. A file is checked against the digest in ``NAME.sha256`` beside it,
where there is one, as `copy_weights` puts it there for clusters without internet.
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

from workers.errors import ConfigError, StoreDenied
from workers.hub import TRANSFORMERS_FILE, fetch_from_hub, is_hub_id
from workers.messages import StoreOptions
from workers.storage import Store, open_store, split_uri

CACHE_VARIABLE = "MASKMILL_CACHE"
"""Environment variable that names the cache folder."""
_CONFIGURATION = "config.json"
"""What belongs to the weights of a transformers checkpoint."""


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """A checkpoint on this node.

    Attributes
    ----------
    path : Path
        The local file.
    sha256 : str
        Hex digest of its content.
    name : str
        What the file is called at its source.
    """

    path: Path
    sha256: str
    name: str


@dataclass(frozen=True, slots=True)
class WeightsCopy:
    """A checkpoint that was copied to where a cluster can read it.

    Attributes
    ----------
    uri : str
        What to give as ``--checkpoint``.
    sha256 : str
        Hex digest of its content.
    size_bytes : int
        Its size.
    """

    uri: str
    sha256: str
    size_bytes: int


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
    file_name: str = "",
    cache_dir: str | Path | None = None,
    sha256: str | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> WeightsFile:
    """Bring a checkpoint to this node.

    Parameters
    ----------
    uri : str
        Local path, URL of any store, or an id of the Hugging Face hub.
    options : StoreOptions, optional
        How to reach the store.
    file_name : str
        The file that is meant where `uri` names a folder or an id of the hub.
    cache_dir : str or Path, optional
        Where downloads are kept; `cache_folder()` when left out.
    sha256 : str, optional
        Digest the file must have; else that of ``NAME.sha256`` beside it, where there is one.
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
        The store or the hub is unreachable, denies access, or this node's disk is full.
    """
    if is_hub_id(uri):
        path, known = fetch_from_hub(uri, file_name)
        found = WeightsFile(path, file_sha256(path), path.name)
        wanted, origin = sha256 or known, "the hub says"
    else:
        root, key = split_uri(uri)
        store = open_store(root, options)
        key = _file_key(store, key, uri, file_name)
        wanted, origin = sha256 or _noted_digest(store, key), f"{key}.sha256 says"
        local = store.local_path(key)
        if local is not None:
            found = WeightsFile(local, file_sha256(local), local.name)
        else:
            folder = Path(cache_dir) if cache_dir is not None else cache_folder()
            found = _fetch_remote(store, key, uri, folder, on_bytes, wanted)
    check_container(found.path, uri)
    if wanted is not None and found.sha256 != wanted.lower():
        expected = f"{wanted} was expected" if sha256 else f"{origin} {wanted}"
        raise ConfigError(
            f"the checkpoint {uri} has sha256 {found.sha256}, but {expected}: it is "
            f"another file, or it was damaged on the way"
        )
    return found


def copy_weights(
    uri: str,
    to: str,
    options: StoreOptions | None = None,
    *,
    file_name: str = "",
    on_bytes: Callable[[int], None] | None = None,
) -> WeightsCopy:
    """Copy a checkpoint into a folder or bucket, its digest beside it.

    Parameters
    ----------
    uri : str
        As for `fetch_weights`.
    to : str
        The folder, local or of any store. Weights of transformers, whose files are all named
        alike, get a folder of their own in it.
    options : StoreOptions, optional
        How to reach the stores.
    file_name : str
        As for `fetch_weights`.
    on_bytes : callable, optional
        Called with the number of bytes that were sent since its last call.

    Returns
    -------
    WeightsCopy
        Where they are now. What is there already is left as it is.

    Raises
    ------
    ConfigError
        As `fetch_weights`.
    StoreError
        A store or the hub is unreachable, denies access, or is full.
    """
    found = fetch_weights(uri, options, file_name=file_name)
    root, folder = split_uri(to)
    store = open_store(root, options)
    is_folder = found.name == TRANSFORMERS_FILE
    parts = (folder.strip("/"), _folder_name(uri) if is_folder else "", found.name)
    key = "/".join(part for part in parts if part)
    size_bytes = found.path.stat().st_size
    there = store.stat(key)
    if there is None or there.size_bytes != size_bytes or _noted_digest(store, key) != found.sha256:
        configuration = found.path.with_name(_CONFIGURATION)
        if is_folder and configuration.is_file():
            store.put_file(configuration, _configuration_key(key))
        store.put_file(found.path, key, on_bytes=on_bytes)
        store.write_bytes(f"{key}.sha256", f"{found.sha256}  {found.name}\n".encode())
    return WeightsCopy(store.uri_of(key), found.sha256, size_bytes)


def _configuration_key(key: str) -> str:
    return key.removesuffix(TRANSFORMERS_FILE) + _CONFIGURATION


def _folder_name(uri: str) -> str:
    """Return the name of the folder for a transformers checkpoint."""
    if is_hub_id(uri):
        return uri.partition("@")[0].replace("/", "--")
    parts = [part for part in split_uri(uri)[1].split("/") if part]
    if parts[-1:] == [TRANSFORMERS_FILE]:
        del parts[-1]
    return parts[-1] if parts else "transformers"


def _file_key(store: Store, key: str, uri: str, file_name: str) -> str:
    """Return the key of a checkpoint that is there and not empty."""
    tried = [key] if key and not key.endswith("/") else []
    if file_name:
        tried.append(f"{key.rstrip('/')}/{file_name}".lstrip("/"))
    for candidate in tried:
        stat = store.stat(candidate)
        local = store.local_path(candidate)
        if stat is None or (local is not None and not local.is_file()):
            continue
        if not stat.size_bytes:
            raise ConfigError(f"the checkpoint {uri} is empty (0 bytes): upload it again")
        return candidate
    inside = f", nor is {file_name} in a folder of that name" if file_name else ""
    raise ConfigError(
        f"the checkpoint {uri} does not exist{inside}: give the path or URL of a file"
    )


def _noted_digest(store: Store, key: str) -> str | None:
    """Return the digest in the file beside a checkpoint, None where there is none."""
    try:
        if store.stat(f"{key}.sha256") is None:
            return None
        words = store.read_bytes(f"{key}.sha256").decode("ascii", "replace").split()
    except (StoreDenied, FileNotFoundError):
        # Some stores deny what does not exist.
        return None
    return words[0].lower() if words else None


def _fetch_remote(
    store: Store,
    key: str,
    uri: str,
    folder: Path,
    on_bytes: Callable[[int], None] | None,
    wanted: str | None,
) -> WeightsFile:
    """Return a checkpoint of a store from the cache, downloaded now if it is not whole there."""
    stat = store.stat(key)
    if stat is None:
        raise ConfigError(f"the checkpoint {uri} vanished while it was fetched: put it back")
    identity = f"{store.uri_of(key)}\n{stat.identity()}"
    digest = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
    name = re.sub(r"[^\w.-]", "_", key.rpartition("/")[2])[-100:]
    # Files of transformers keep their names, by which their reader finds one beside the other.
    is_folder = name == TRANSFORMERS_FILE
    path = folder / digest / name if is_folder else folder / f"{digest}-{name}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f".{digest}.lock"):
            known = _cached(path, stat.size_bytes)
            if known is None or (wanted is not None and known != wanted.lower()):
                known = _download(
                    lambda to: store.get_file(key, to, on_bytes=on_bytes),
                    path,
                    uri,
                    stat.size_bytes,
                )
            if is_folder:
                _fetch_configuration(store, _configuration_key(key), path)
    except FileNotFoundError as error:
        raise ConfigError(
            f"the checkpoint {uri} vanished while it was fetched: put it back"
        ) from error
    except PermissionError as error:
        raise ConfigError(
            f"the weights cache {folder} cannot be written: set {CACHE_VARIABLE} to a folder "
            f"that can ({error.strerror})"
        ) from error
    return WeightsFile(path, known, key.rpartition("/")[2])


def _fetch_configuration(store: Store, key: str, path: Path) -> None:
    """Bring the configuration beside the weights, where there is one."""
    try:
        stat = store.stat(key)
    except StoreDenied:
        return
    if stat is not None:
        _download(
            lambda to: store.get_file(key, to),
            path.with_name(_CONFIGURATION),
            store.uri_of(key),
            stat.size_bytes,
        )


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
