"""The contract of a store.

For every kind (local disk, memory, SeaweedFS, rclone's S3 server):
* what is written is read, replaced, listed and deleted at once, by the key as it was given;
* a missing key is FileNotFoundError, None for `stat`, nothing for `list` and `delete`;
* a listing starts with a text, is ordered by the bytes of the key, and can start behind a key;
* ranged reads give the same bytes as the whole, and a file survives the way there and back;
* a store pickles, and serves several threads.
For those with conditional writes:
* of any number of creators of one key, in threads or processes, exactly one is told so, and the
  content is its own; `probe_store` says yes to them and no to a server that ignores conditions.
Everywhere:
* nobody sees half a file, also when the writer is killed;
* each fault is the right error with a sentence that names the place: denied, full, unreachable,
  missing bucket, missing package, archived, changed while it was read;
* a secret in a URI is refused.
"""

from __future__ import annotations

import hashlib
import importlib.util
import multiprocessing
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.scripted import ScriptedS3, scripted_s3
from tests.servers import S3Server, free_ports
from workers.errors import ConfigError, StoreDenied, StoreError, StoreFull, StoreUnavailable
from workers.messages import StoreOptions
from workers.storage import (
    Store,
    canonical_uri,
    open_store,
    probe_store,
    split_uri,
)
from workers.storage.s3 import S3Store

KINDS = ["local", "memory", "seaweedfs", "rclone"]
CONDITIONAL = ["local", "memory", "seaweedfs"]
LARGE_BYTES = 40 << 20


def open_kind(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Return an empty store of a kind, rooted below a prefix."""
    if kind == "local":
        return open_store(str(tmp_path / "root"))
    if kind == "memory":
        return open_store(f"memory://{uuid.uuid4().hex}/root")
    server: S3Server = request.getfixturevalue(kind)
    return open_store(f"{server.new_bucket()}/some/root", server.options)


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_kind(request.param, request, tmp_path)


@pytest.fixture(params=CONDITIONAL)
def conditional(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_kind(request.param, request, tmp_path)


@pytest.fixture
def scripted(s3_credentials: None) -> Iterator[ScriptedS3]:
    with scripted_s3() as server:
        yield server


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of one megabyte; only root may."""
    place = tmp_path / "tiny"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def keys(store: Store, prefix: str = "", *, start_after: str | None = None) -> list[str]:
    return [found.key for found in store.list(prefix, start_after=start_after)]


def content(num_bytes: int, seed: int = 0) -> bytes:
    """Return bytes without a period."""
    return hashlib.shake_128(seed.to_bytes(4, "little")).digest(num_bytes)


# Every kind of store


def test_written_is_read_replaced_listed_and_deleted_at_once(store: Store) -> None:
    for data in (b"first", b"", b"a longer second"):
        store.write_bytes("a/b.bin", data)
        found = store.stat("a/b.bin")
        assert store.read_bytes("a/b.bin") == data
        assert found is not None
        assert (found.key, found.size_bytes) == ("a/b.bin", len(data))
        assert [(f.key, f.size_bytes) for f in store.list()] == [("a/b.bin", len(data))]
    store.delete(["a/b.bin"])
    assert store.stat("a/b.bin") is None
    assert keys(store) == []


def test_missing_is_missing(store: Store, tmp_path: Path) -> None:
    store.write_bytes("there", b"x")
    assert store.stat("gone") is None
    assert keys(store, "gone/") == []
    store.delete(["gone", "gone/too", "gone/three"])
    for read in (
        lambda: store.read_bytes("gone"),
        lambda: store.read_range("gone", 0, 3),
        lambda: store.open("gone"),
        lambda: store.get_file("gone", tmp_path / "gone.bin"),
    ):
        with pytest.raises(FileNotFoundError, match=r"gone does not exist"):
            read()
    assert not (tmp_path / "gone.bin").exists()
    with pytest.raises(FileNotFoundError, match=r"unsent does not exist"):
        store.put_file(tmp_path / "unsent", "x")


def test_keys_are_verbatim(store: Store) -> None:
    names = [
        "sp ace.mp4",
        "two  spaces.mp4",
        "pct%41.mp4",
        "pct%2F.mp4",
        "ha#sh.mp4",
        "que?ry=1&b.mp4",
        "pl+us.mp4",
        "ünï/日本語.mp4",
        "quo'te\".mp4",
        "<amp&>.mp4",
        "co,mma;[x]{y}~.mp4",
        "UPPER/lower.MP4",
        "trailing. ",
    ]
    for name in names:
        store.write_bytes(name, name.encode())
    assert keys(store) == sorted(names, key=str.encode)
    for name in names:
        found = store.stat(name)
        assert found is not None
        assert found.size_bytes == len(name.encode())
        assert store.read_bytes(name) == name.encode()
    store.delete(names[:3])
    store.delete(names[3:4])
    assert keys(store) == sorted(names[4:], key=str.encode)


def test_listing_is_ordered_and_a_prefix_is_text(store: Store) -> None:
    names = ["a", "b/1", "b/2/x", "b/2-x", "b-1", "b.txt", "b0", "c/é", "c/z", "_log/7"]
    for name in names:
        store.write_bytes(name.replace("a", "a.bin") if name == "a" else name, b"x")
    expected = sorted(["a.bin", *names[1:]], key=str.encode)
    assert keys(store) == expected
    assert keys(store, "b") == [name for name in expected if name.startswith("b")]
    assert keys(store, "b/") == ["b/1", "b/2-x", "b/2/x"]
    assert keys(store, "b/2") == ["b/2-x", "b/2/x"]
    assert keys(store, "c/z") == ["c/z"]
    assert keys(store, "b/", start_after="b/1") == ["b/2-x", "b/2/x"]
    assert keys(store, "c/", start_after="c/z") == ["c/é"]
    assert keys(store, "c/", start_after="c/é") == []


def test_roots_do_not_see_each_other(store: Store) -> None:
    inner = open_store(store.uri_of("in"), store.options)
    inner.write_bytes("x", b"inner")
    store.write_bytes("inside", b"outer")
    assert keys(inner) == ["x"]
    assert keys(store) == ["in/x", "inside"]


def test_ranges_and_seeking(store: Store) -> None:
    data = content(300_000)
    store.write_bytes("v.mp4", data)
    assert store.read_range("v.mp4", 10, 20) == data[10:20]
    assert store.read_range("v.mp4", 10, 10) == b""
    assert store.read_range("v.mp4", len(data) - 5, len(data) + 5) == data[-5:]
    assert store.read_range("v.mp4", len(data) + 1, len(data) + 5) == b""
    with store.open("v.mp4", block_size=4096) as file:
        assert file.seek(-1000, os.SEEK_END) == len(data) - 1000
        assert file.read(100) == data[-1000:-900]
        assert file.tell() == len(data) - 900
        file.seek(5)
        file.seek(4090, os.SEEK_CUR)
        assert file.read(200_000) == data[4095:204_095]
        assert file.read() == data[204_095:]
        assert file.read(1) == b""


def test_files_go_there_and_back(store: Store, tmp_path: Path) -> None:
    for size in (0, 1, 100_000):
        sent, received = tmp_path / "sent", tmp_path / "received"
        sent.write_bytes(content(size))
        counted: list[int] = []
        store.put_file(sent, "dir/file.bin", on_bytes=counted.append)
        assert sum(counted) == size
        counted.clear()
        store.get_file("dir/file.bin", received, on_bytes=counted.append)
        assert received.read_bytes() == sent.read_bytes()
        assert sum(counted) == size


@pytest.mark.parametrize("kind", ["local", "seaweedfs", "rclone"])
def test_large_files_go_there_and_back(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    store = open_kind(kind, request, tmp_path)
    data = content(LARGE_BYTES + 12_345)
    sent, received = tmp_path / "sent", tmp_path / "received"
    sent.write_bytes(data)
    counted: list[int] = []
    store.put_file(sent, "large.bin", on_bytes=counted.append)
    assert sum(counted) == len(data)
    assert len(counted) > 1, "a large file is told piece by piece"
    counted.clear()
    found = store.stat("large.bin")
    assert found is not None
    assert found.size_bytes == len(data)
    assert [listed.identity() for listed in store.list()] == [found.identity()]
    store.get_file("large.bin", received, on_bytes=counted.append)
    assert received.read_bytes() == data
    assert sum(counted) == len(data)
    with store.open("large.bin") as file:
        file.seek(LARGE_BYTES)
        assert file.read() == data[LARGE_BYTES:]


def test_a_cancelled_download_leaves_nothing(store: Store, tmp_path: Path) -> None:
    store.write_bytes("x", content(20_000))

    def cancel(num_bytes: int) -> None:
        raise TimeoutError(f"cancelled after {num_bytes}")

    with pytest.raises(TimeoutError, match="cancelled after 20000"):
        store.get_file("x", tmp_path / "x", on_bytes=cancel)
    assert not (tmp_path / "x").exists()


def test_identity_changes_with_the_content(store: Store) -> None:
    store.write_bytes("x", b"one")
    before = store.stat("x")
    (again,) = store.list()
    time.sleep(0.02)
    store.write_bytes("x", b"two")
    after = store.stat("x")
    assert before is not None
    assert after is not None
    assert before.identity() == again.identity() != after.identity()


def test_threads_share_a_store_and_it_pickles(store: Store) -> None:
    copy: Store = pickle.loads(pickle.dumps(store))
    assert copy.uri == store.uri
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: copy.write_bytes(f"k{n:02}", b"%d" % n), range(40)))
        assert list(threads.map(lambda n: store.read_bytes(f"k{n:02}"), range(40))) == [
            b"%d" % n for n in range(40)
        ]
    assert keys(store) == [f"k{n:02}" for n in range(40)]


# Conditional writes


def test_create_only_if_absent(conditional: Store) -> None:
    assert conditional.create("_log/000000000001.json", b"ours")
    assert not conditional.create("_log/000000000001.json", b"theirs")
    assert conditional.read_bytes("_log/000000000001.json") == b"ours"
    assert keys(conditional) == ["_log/000000000001.json"]
    conditional.delete(["_log/000000000001.json"])
    assert conditional.create("_log/000000000001.json", b"again")


def create_all(store: Store, barrier: Any, name: str, num_keys: int, won: Any) -> None:
    """Run by the processes of the race below."""
    store.stat("warm")
    barrier.wait()
    won.put((name, [n for n in range(num_keys) if store.create(f"race/{n:03}", name.encode())]))


@pytest.mark.parametrize("kind", ["local", "seaweedfs"])
def test_one_process_wins_each_key(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    store = open_kind(kind, request, tmp_path)
    context = multiprocessing.get_context("spawn")
    barrier, won = context.Barrier(3), context.Queue()
    racers = [
        context.Process(target=create_all, args=(store, barrier, f"racer{n}", 60, won))
        for n in range(3)
    ]
    for racer in racers:
        racer.start()
    claims = [won.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join()
    owner = {number: name for name, numbers in claims for number in numbers}
    assert sum(len(numbers) for _, numbers in claims) == len(owner) == 60
    assert {n: store.read_bytes(f"race/{n:03}").decode() for n in range(60)} == owner


def test_probe_trusts_conditional_stores_and_cleans_up(conditional: Store) -> None:
    report = probe_store(conditional)
    assert report.problems == ()
    assert report.create_if_absent
    assert report.race_winners == 1
    assert report.read_after_write
    assert report.list_after_write
    assert report.overwrite
    assert report.delete
    assert keys(conditional) == []


def test_probe_finds_ignored_conditions(rclone: S3Server) -> None:
    report = probe_store(open_store(rclone.new_bucket(), rclone.options))
    assert not report.create_if_absent
    assert report.read_after_write
    assert "ignores the condition" in report.problems[0]
    assert "--single-driver" in report.problems[0]


def test_probe_of_a_denied_store_raises(
    seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = seaweedfs.new_bucket()
    for name, value in seaweedfs.environment(reader=True).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StoreDenied, match=uri):
        probe_store(open_store(uri, seaweedfs.options))


# Local disks


def test_dot_names_links_and_devices(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "real" / "sub").mkdir(parents=True)
    (root / "real" / "sub" / "a.mp4").write_bytes(b"a")
    (root / "real" / ".b.mp4.part").write_bytes(b"b")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "c.mp4").write_bytes(b"c")
    (root / "file-link.mp4").symlink_to(root / "real" / "sub" / "a.mp4")
    (root / "folder-link").symlink_to(root / "real")
    (root / "real" / "sub" / "loop").symlink_to(root)
    (root / "broken.mp4").symlink_to(root / "nothing")
    os.mkfifo(root / "pipe.mp4")
    with socket.socket(socket.AF_UNIX) as listener:
        # A socket's path may hold about 100 characters only: bind it from its own folder.
        here = Path.cwd()
        os.chdir(root)
        try:
            listener.bind("socket.mp4")
        finally:
            os.chdir(here)
        store = open_store(str(root))
        assert keys(store) == ["file-link.mp4", "folder-link/sub/a.mp4", "real/sub/a.mp4"]
        assert store.read_bytes("folder-link/sub/a.mp4") == b"a"
        assert store.stat("pipe.mp4") is None
        assert keys(open_store(str(root / ".hidden"))) == ["c.mp4"]
        assert keys(store, ".hidden/") == [".hidden/c.mp4"]


def test_emptied_folders_go_but_not_the_root(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "root"))
    store.write_bytes("_staging/3/abc/masks-0.parquet", b"x")
    store.write_bytes("_staging/3/def/masks-0.parquet", b"x")
    store.delete(["_staging/3/abc/masks-0.parquet"])
    assert sorted(p.name for p in (tmp_path / "root/_staging/3").iterdir()) == ["def"]
    store.delete(["_staging/3/def/masks-0.parquet"])
    assert list((tmp_path / "root").iterdir()) == []


def test_writing_while_folders_vanish(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))

    def come_and_go(number: int) -> None:
        for _ in range(50):
            store.write_bytes(f"a/b/{number}", b"x")
            store.delete([f"a/b/{number}"])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(come_and_go, range(4)))
    assert keys(store) == []


def test_a_killed_writer_leaves_no_torn_file(tmp_path: Path) -> None:
    code = (
        "import sys; from workers.storage import open_store\n"
        "store = open_store(sys.argv[1]); n = 0\n"
        "while True:\n"
        "    store.write_bytes('x', bytes([n % 256]) * 4_000_000); n += 1; print(n, flush=True)\n"
    )
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
        ) as writer:
            assert writer.stdout is not None
            for _ in range(3):
                assert writer.stdout.readline()
            writer.send_signal(signal.SIGKILL)
        data = open_store(str(tmp_path)).read_bytes("x")
        assert len(data) == 4_000_000
        assert len(set(data)) == 1
        assert keys(open_store(str(tmp_path))) == ["x"]


def test_a_full_disk(tmpfs: Path, tmp_path: Path) -> None:
    store = open_store(str(tmpfs))
    store.write_bytes("kept", b"kept")
    large = tmp_path / "large"
    large.write_bytes(content(3 << 20))
    source = open_store(str(tmp_path))
    for fill in (
        lambda: store.write_bytes("kept", large.read_bytes()),
        lambda: store.put_file(large, "kept"),
        lambda: store.create("new", large.read_bytes()),
        lambda: source.get_file("large", tmpfs / "down"),
    ):
        with pytest.raises(StoreFull, match=r"tiny/.* cannot be written: no space left.*free some"):
            fill()
    assert store.read_bytes("kept") == b"kept"
    assert [path.name for path in tmpfs.iterdir()] == ["kept"]


def test_a_file_size_limit_is_a_full_disk(tmp_path: Path) -> None:
    code = (
        "import sys; from workers.storage import open_store\n"
        "from workers.errors import StoreFull\n"
        "try:\n"
        "    open_store(sys.argv[1]).write_bytes('x', bytes(200_000))\n"
        "except StoreFull as full:\n"
        "    print(full)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert "cannot be written: file too large" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_place_is_denied(tmpfs: Path) -> None:
    (tmpfs / "kept").write_bytes(b"x")
    subprocess.run(["mount", "-o", "remount,ro", str(tmpfs)], check=True)
    store = open_store(str(tmpfs))
    assert store.read_bytes("kept") == b"x"
    for write in (
        lambda: store.write_bytes("new/x", b"x"),
        lambda: store.create("x", b"x"),
        lambda: store.delete(["kept"]),
    ):
        with pytest.raises(StoreDenied, match="read-only file system"):
            write()


def test_a_file_where_a_folder_must_be(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write_bytes("a", b"x")
    with pytest.raises(StoreDenied, match=r"a/b cannot be written: not a directory"):
        store.write_bytes("a/b", b"x")
    assert store.stat("a/b") is None
    assert keys(store, "a/b") == []
    with pytest.raises(FileNotFoundError):
        store.read_bytes("a/b")


@pytest.mark.parametrize("key", ["", "../x", "a/../../x", "nul\0"])
def test_a_key_cannot_leave_the_root(tmp_path: Path, key: str) -> None:
    store = open_store(str(tmp_path / "root"))
    with pytest.raises(StoreError, match="is not a place below"):
        store.write_bytes(key, b"x")


# S3


def test_pages_of_a_listing(seaweedfs: S3Server) -> None:
    store = open_store(seaweedfs.new_bucket(), seaweedfs.options)
    names = [f"d/{n:05}" for n in range(1100)]
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda name: store.write_bytes(name, b"x"), names))
    assert keys(store, "d/") == names
    assert keys(store, "d/", start_after=names[1049]) == names[1050:]
    store.delete(names)
    assert keys(store) == []


def test_keys_that_only_s3_can_hold(scripted: ScriptedS3) -> None:
    store = open_store("s3://bucket", scripted.options)
    names = ["/lead.mp4", "a//b.mp4", "a/b.mp4", "a+b c.mp4", "a%2Bb.mp4", "end/"]
    for name in names:
        store.write_bytes(name, name.encode())
        assert store.read_bytes(name) == name.encode()
    assert list(scripted.objects) == [
        "/bucket//lead.mp4",
        "/bucket/a//b.mp4",
        "/bucket/a/b.mp4",
        "/bucket/a%2Bb%20c.mp4",
        "/bucket/a%252Bb.mp4",
        "/bucket/end/",
    ]
    assert keys(store) == sorted(names)


def test_a_conflict_is_tried_again(scripted: ScriptedS3) -> None:
    store = open_store("s3://bucket", scripted.options)
    scripted.script.extend([(409, "ConditionalRequestConflict")] * 2)
    assert store.create("x", b"ours")
    scripted.script.extend([(409, "ConditionalRequestConflict"), (412, "PreconditionFailed")])
    assert not store.create("x", b"theirs")
    assert store.read_bytes("x") == b"ours"


def test_a_store_without_conditions_says_so(scripted: ScriptedS3) -> None:
    store = open_store("s3://bucket", scripted.options)
    scripted.script.append((501, "NotImplemented"))
    with pytest.raises(StoreError, match=r"s3://bucket does not support conditional writes"):
        store.create("x", b"ours")


def test_a_connection_that_breaks_within_a_body(scripted: ScriptedS3, tmp_path: Path) -> None:
    store = open_store("s3://bucket", scripted.options)
    store.write_bytes("x", content(50_000))
    scripted.script.extend([(0, ""), (0, "")])
    assert store.read_bytes("x") == content(50_000)
    assert scripted.requests.count("GET /bucket/x") == 3


def test_throttling_passes(scripted: ScriptedS3) -> None:
    store = open_store("s3://bucket", scripted.options)
    scripted.script.extend([(503, "SlowDown"), (500, "InternalError")])
    store.write_bytes("x", b"x")
    assert scripted.requests == ["PUT /bucket/x"] * 3


@pytest.mark.parametrize(
    ("status", "code", "kind", "sentence"),
    [
        (403, "InvalidObjectState", StoreError, "is archived: restore it"),
        (403, "AccessDenied", StoreDenied, "is denied.*check the credentials"),
        (400, "ExpiredToken", StoreDenied, "is denied"),
        (507, "XMinioStorageFull", StoreFull, "the store is full"),
        (412, "PreconditionFailed", StoreUnavailable, "changed while it was read"),
        (400, "PermanentRedirect", StoreError, "another region.*give its region"),
        (405, "MethodNotAllowed", StoreError, "is refused, the store says MethodNotAllowed"),
    ],
)
def test_answers_of_a_server(
    scripted: ScriptedS3, status: int, code: str, kind: type[Exception], sentence: str
) -> None:
    store = open_store("s3://bucket", scripted.options)
    store.write_bytes("x", b"x")
    scripted.script.append((status, code))
    with pytest.raises(kind, match=sentence) as raised:
        store.read_range("x", 0, 1, etag="tag")
    assert raised.type is kind
    assert "bucket" in str(raised.value)


def test_an_object_replaced_while_it_is_read(seaweedfs: S3Server) -> None:
    store = open_store(seaweedfs.new_bucket(), seaweedfs.options)
    store.write_bytes("x", content(100_000))
    with store.open("x", block_size=1000) as file:
        assert file.read(10) == content(100_000)[:10]
        store.write_bytes("x", content(100_000, seed=1))
        file.seek(50_000)
        with pytest.raises(StoreUnavailable, match="changed while it was read"):
            file.read(10)


def test_a_failed_multipart_upload_leaves_nothing(seaweedfs: S3Server, tmp_path: Path) -> None:
    uri = seaweedfs.new_bucket()
    store = S3Store(uri, seaweedfs.options)
    short = tmp_path / "short"
    short.write_bytes(content(20 << 20))
    # As if the file had shrunk after its size was taken.
    with pytest.raises(StoreError, match="short changed while it was uploaded"):
        store._put_parts(short, 36 << 20, "x")
    assert store.stat("x") is None
    uploads = seaweedfs.client().list_multipart_uploads(Bucket=uri.removeprefix("s3://"))
    assert not uploads.get("Uploads")


def test_leftovers_of_killed_writers_are_swept(seaweedfs: S3Server, tmp_path: Path) -> None:
    # Given an upload nobody will finish, below and beside a root, and a file half written
    uri = seaweedfs.new_bucket()
    client, bucket = seaweedfs.client(), uri.removeprefix("s3://")
    for key in ("out/masks/a.parquet", "other/b.parquet"):
        client.create_multipart_upload(Bucket=bucket, Key=key)
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / f".{uuid.uuid4().hex}.tmp").write_bytes(b"half")
    (tmp_path / "masks" / ".mine").write_bytes(b"kept")
    stores = [open_store(f"{uri}/out", seaweedfs.options), open_store(str(tmp_path))]
    for store in stores:
        store.write_bytes("masks/whole", b"x")
        # When they are young they stay, when they are old they go, and nothing else does
        assert store.sweep(older_than_s=3600) == 0
        assert store.sweep(older_than_s=-5) == 1
        assert store.sweep(older_than_s=-5) == 0
        assert keys(store) == ["masks/whole"]
    uploads = client.list_multipart_uploads(Bucket=bucket)["Uploads"]
    assert [upload["Key"] for upload in uploads] == ["other/b.parquet"]
    assert (tmp_path / "masks" / ".mine").exists()


def test_denied_credentials(seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = seaweedfs.new_bucket()
    store = open_store(uri, seaweedfs.options)
    store.write_bytes("x", b"x")
    for name, value in seaweedfs.environment(reader=True).items():
        monkeypatch.setenv(name, value)
    assert store.read_bytes("x") == b"x"
    for write in (
        lambda: store.write_bytes("x", b"y"),
        lambda: store.create("y", b"y"),
        lambda: store.delete(["x"]),
        lambda: store.delete(["x", "y"]),
    ):
        with pytest.raises(StoreDenied, match=f"{uri}/[xy] is denied"):
            write()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not the secret")
    for read in (
        lambda: store.read_bytes("x"),
        lambda: store.stat("x"),
        lambda: keys(store),
    ):
        with pytest.raises(StoreDenied, match=f"{uri}/.*check the credentials"):
            read()


def test_no_credentials_and_anonymous(seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = seaweedfs.new_bucket()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", "/nonexistent")
    with pytest.raises(StoreDenied, match="needs credentials and none are usable"):
        open_store(uri, seaweedfs.options).read_bytes("x")
    anonymous = StoreOptions(endpoint_url=seaweedfs.endpoint_url, path_style=True, anonymous=True)
    with pytest.raises(StoreDenied, match=f"{uri}/x is denied"):
        open_store(uri, anonymous).read_bytes("x")


def test_the_environment_names_the_endpoint(
    seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = seaweedfs.new_bucket()
    open_store(uri, seaweedfs.options).write_bytes("x", b"x")
    for name, value in seaweedfs.environment().items():
        monkeypatch.setenv(name, value)
    assert open_store(uri).read_bytes("x") == b"x"


def test_a_missing_bucket(seaweedfs: S3Server) -> None:
    store = open_store("s3://no-such-bucket/prefix", seaweedfs.options)
    for use in (
        lambda: keys(store),
        lambda: store.write_bytes("x", b""),
        lambda: store.create("x", b""),
    ):
        with pytest.raises(StoreError, match="bucket no-such-bucket does not exist"):
            use()


def test_nobody_listens(s3_credentials: None) -> None:
    options = StoreOptions(endpoint_url=f"http://127.0.0.1:{free_ports(1)[0]}", path_style=True)
    with pytest.raises(StoreUnavailable, match=r"s3://bucket/x cannot be reached.*the endpoint"):
        open_store("s3://bucket", options).read_bytes("x")


@pytest.mark.parametrize(
    ("uri", "options", "sentence"),
    [
        ("s3://bucket", StoreOptions(profile="no-such-profile"), "no-such-profile"),
        ("s3://bucket", StoreOptions(endpoint_url="nonsense"), "endpoint nonsense cannot be used"),
        ("s3://B_AD!!", StoreOptions(), "not a valid S3 location"),
    ],
)
def test_wrong_settings(
    s3_credentials: None, uri: str, options: StoreOptions, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        open_store(uri, options).read_bytes("x")


# Names of places


@pytest.mark.parametrize(
    ("text", "canonical", "root", "key"),
    [
        ("s3://b", "s3://b", "s3://b", ""),
        ("s3://b/", "s3://b", "s3://b", ""),
        ("s3a://b/x", "s3://b/x", "s3://b", "x"),
        ("S3://b/a//b.mp4", "s3://b/a//b.mp4", "s3://b", "a//b.mp4"),
        ("s3://b//lead.mp4", "s3://b//lead.mp4", "s3://b", "/lead.mp4"),
        ("s3://b/dir/", "s3://b/dir", "s3://b", "dir/"),
        ("s3://b/%41 +#?.mp4", "s3://b/%41 +#?.mp4", "s3://b", "%41 +#?.mp4"),
        ("/a/b.mp4", "/a/b.mp4", "/", "a/b.mp4"),
        ("/a/b/", "/a/b", "/", "a/b/"),
        ("/a/./c/../b%20.mp4", "/a/b%20.mp4", "/", "a/b%20.mp4"),
        ("file:///a/b", "/a/b", "/", "a/b"),
        ("/", "/", "/", ""),
        ("memory://a/b", "memory://a/b", "memory://a", "b"),
        ("https://host/x/y.mp4", "https://host/x/y.mp4", "https://host", "x/y.mp4"),
    ],
)
def test_one_spelling(text: str, canonical: str, root: str, key: str) -> None:
    assert canonical_uri(text) == canonical
    assert canonical_uri(canonical) == canonical
    assert split_uri(text) == (root, key)


def test_local_paths_are_absolute_and_links_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    assert canonical_uri("link/v.mp4") == f"{tmp_path}/link/v.mp4"
    root, key = split_uri("link/v.mp4")
    open_store(root).write_bytes(key, b"v")
    assert (tmp_path / "real" / "v.mp4").read_bytes() == b"v"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "empty"),
        ("s3://", "names no bucket"),
        ("s3:///key", "names no bucket"),
        ("https://me:hunter22@host/x", "holds a password"),
    ],
)
def test_impossible_places(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as raised:
        open_store(text)
    assert "hunter22" not in str(raised.value)


def test_a_scheme_without_its_package() -> None:
    packages = {"gs": "gcsfs", "abfs": "adlfs", "oss": "ossfs"}
    scheme = next(s for s, package in packages.items() if not importlib.util.find_spec(package))
    with pytest.raises(ConfigError, match=f"needs the package .*pip install {packages[scheme]}"):
        open_store(f"{scheme}://bucket/x")


def test_a_web_server_serves_files_and_lists_none(scripted: ScriptedS3, tmp_path: Path) -> None:
    scripted.objects["/dir/v.mp4"] = b"video"
    store = open_store(scripted.endpoint_url)
    store.get_file("dir/v.mp4", tmp_path / "v.mp4")
    assert (tmp_path / "v.mp4").read_bytes() == b"video"
    assert store.stat("dir/other.mp4") is None
    with pytest.raises(StoreError, match="cannot be listed, since it is a web server"):
        list(store.list("dir/"))


def test_an_unknown_scheme() -> None:
    with pytest.raises(ConfigError, match=r"nosuch://x cannot be opened: no file system is known"):
        open_store("nosuch://x")
