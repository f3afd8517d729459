"""`workers.weights`.

- A local checkpoint is used in place; a remote one is downloaded once per content, whoever asks,
  also when many ask at once, and again when its content changes.
- No file with the final name is ever incomplete, and nothing is left behind by a failure.
- Missing, empty, truncated and wrong files are one sentence each, as `ConfigError`.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest

from workers.errors import ConfigError
from workers.storage import Store, open_store
from workers.weights import cache_folder, check_container, fetch_weights, file_sha256


def archive(text: str = "weights") -> bytes:
    """Return a small zip archive, the container of a .pt file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", text * 100)
    return buffer.getvalue()


def safetensors(num_bytes: int = 16) -> bytes:
    entry = {"a": {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}
    header = json.dumps(entry).encode()
    return len(header).to_bytes(8, "little") + header + bytes(num_bytes)


@pytest.fixture
def bucket() -> Store:
    """Return an in-process object store: remote as far as the cache is concerned."""
    return open_store(f"memory://weights-{uuid4().hex}")


def test_a_local_file_is_used_in_place(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(archive())
    found = fetch_weights(str(path), cache_dir=tmp_path / "cache")
    assert found.path == path
    assert found.sha256 == hashlib.sha256(archive()).hexdigest() == file_sha256(path)
    assert not (tmp_path / "cache").exists()


def test_a_remote_file_is_downloaded_once(bucket: Store, tmp_path: Path) -> None:
    # Given
    bucket.write_bytes("models/a b.pt", archive())
    uri = bucket.uri_of("models/a b.pt")
    downloads: list[int] = []
    # When eight ask at once, and one later
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(
                lambda _: fetch_weights(uri, cache_dir=tmp_path, on_bytes=downloads.append),
                range(8),
            )
        )
    found.append(fetch_weights(uri, cache_dir=tmp_path, on_bytes=downloads.append))
    # Then
    assert sum(downloads) == len(archive())
    assert len(set(found)) == 1
    assert found[0].path.read_bytes() == archive()
    assert found[0].path.suffix == ".pt"


def test_changed_content_is_fetched_again(bucket: Store, tmp_path: Path) -> None:
    uri = bucket.uri_of("a.pt")
    bucket.write_bytes("a.pt", archive("one"))
    first = fetch_weights(uri, cache_dir=tmp_path)
    bucket.write_bytes("a.pt", archive("three"))
    second = fetch_weights(uri, cache_dir=tmp_path)
    assert first.sha256 != second.sha256
    assert second.path.read_bytes() == archive("three")


def test_a_damaged_cache_file_is_replaced(bucket: Store, tmp_path: Path) -> None:
    bucket.write_bytes("a.pt", archive())
    found = fetch_weights(bucket.uri_of("a.pt"), cache_dir=tmp_path)
    found.path.write_bytes(archive()[:50])
    assert fetch_weights(bucket.uri_of("a.pt"), cache_dir=tmp_path) == found
    assert found.path.read_bytes() == archive()
    # Other bytes, but as many: only the digest tells
    bucket.write_bytes("a.pt.sha256", f"{found.sha256}  a.pt\n".encode())
    found.path.write_bytes(archive().swapcase())
    assert fetch_weights(bucket.uri_of("a.pt"), cache_dir=tmp_path) == found
    assert found.path.read_bytes() == archive()


def test_a_failed_download_leaves_nothing(bucket: Store, tmp_path: Path) -> None:
    bucket.write_bytes("a.pt", archive())

    def interrupt(num_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_weights(bucket.uri_of("a.pt"), cache_dir=tmp_path, on_bytes=interrupt)
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == []
    assert fetch_weights(bucket.uri_of("a.pt"), cache_dir=tmp_path).path.read_bytes() == archive()


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.pt", b"", "empty"),
        ("a.pt", archive()[:-40], "truncated"),
        ("a.pth", b"<html>not found</html>", "no PyTorch checkpoint"),
        ("a.safetensors", safetensors()[:-3], "truncated"),
        ("a.safetensors", b"\x00\x01", "truncated"),
        ("a.safetensors", b"<html>not found</html>", "truncated"),
    ],
)
def test_broken_files_are_named(
    bucket: Store, tmp_path: Path, name: str, data: bytes, said: str
) -> None:
    bucket.write_bytes(name, data)
    local = tmp_path / name
    local.write_bytes(data)
    for uri in (bucket.uri_of(name), str(local)):
        with pytest.raises(ConfigError, match=said) as caught:
            fetch_weights(uri, cache_dir=tmp_path / "cache")
        assert uri in str(caught.value)


def test_whole_files_pass(tmp_path: Path) -> None:
    for name, data in (("a.pt", archive()), ("a.safetensors", safetensors()), ("a.onnx", b"?")):
        (tmp_path / name).write_bytes(data)
        check_container(tmp_path / name)


@pytest.mark.parametrize("local", [True, False])
def test_a_missing_file_is_named(bucket: Store, tmp_path: Path, local: bool) -> None:
    uri = str(tmp_path / "gone.pt") if local else bucket.uri_of("gone.pt")
    with pytest.raises(ConfigError, match=r"gone\.pt does not exist"):
        fetch_weights(uri, cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        fetch_weights(str(tmp_path), cache_dir=tmp_path)


def test_another_digest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(archive())
    assert fetch_weights(str(path), sha256=file_sha256(path).upper()).path == path
    with pytest.raises(ConfigError, match="another file"):
        fetch_weights(str(path), sha256="0" * 64)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("MASKMILL_CACHE", raising=False)
    assert cache_folder() == Path("/x/maskmill/weights")
    monkeypatch.setenv("MASKMILL_CACHE", "/y")
    assert cache_folder() == Path("/y/weights")
