"""The corpus: which videos a run is about, and how people may call them.

* Files, folders, globs, lists and manifests (CSV, JSON Lines, Parquet) become rows, each video
  once, keys verbatim: double slashes, spaces, #, ?, %41, unicode, glob characters.
* A folder that directly holds images is one video; a folder may hold both kinds, at any depth.
* A malformed manifest row, or one whose object does not exist, costs that video only; a manifest
  that is unreadable as a whole, or a misspelt column, is a ConfigError.
* Names are paths below the corpus root; shortened names are found where they are unambiguous.
* Samples depend on the seed and the videos only; keys on URI and range only.
* Videos can be picked by name; a name means the same in a selection as in the whole corpus.
* What matches nothing is one sentence that says what was looked for.
"""

from __future__ import annotations

import functools
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import corpus as corpus_module
from jobs.config import CorpusConfig, StoreConfig
from jobs.corpus import SCHEMA, Corpus, list_corpus, video_key
from jobs.manifest import video_keys
from tests import servers
from workers.decode.fetch import fetch_video
from workers.errors import ConfigError, StoreDenied, StoreError, StoreUnavailable
from workers.messages import SourceKind, StoreOptions
from workers.storage import Store, open_store


def listed(*paths: str | Path, **settings: Any) -> Corpus:
    return list_corpus(CorpusConfig(paths=tuple(map(str, paths)), **settings))


def from_manifest(path: Path, *, stat: bool = True, **settings: Any) -> Corpus:
    return list_corpus(CorpusConfig(manifest=str(path), **settings), stat=stat)


def names(corpus: Corpus) -> list[str]:
    return list(corpus.table["name"].to_pylist())


def touch(folder: Path, *keys: str) -> None:
    for key in keys:
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(key.encode())


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a folder with videos, folders of frames and other things."""
    folder = tmp_path / "corpus"
    touch(folder, "a.mp4", "sub/b.MKV", "sub/deep/c.webm", "walk/1.jpg", "walk/2.jpg")
    touch(folder, "sub/run/0.png", "readme.txt", "sub/list.json", ".hidden.mp4", ".git/d.mp4")
    return folder


@pytest.fixture
def bucket(request: pytest.FixtureRequest) -> Iterator[Store]:
    """Return an in-process store, where keys are truly verbatim."""
    name = "".join(char for char in request.node.name if char.isalnum())
    store = open_store(f"memory://{name}")
    yield store
    store.delete([stat.key for stat in store.list("")])


def test_a_folder(tree: Path) -> None:
    corpus = listed(tree)
    assert sorted(names(corpus)) == ["a.mp4", "sub/b.MKV", "sub/deep/c.webm", "sub/run", "walk"]
    assert corpus.table.schema.equals(SCHEMA)
    assert corpus.root == f"{tree}/"
    assert corpus.num_ignored == 2
    assert corpus.faults == {}
    source = corpus.source(names(corpus).index("a.mp4"))
    assert source.uri == str(tree / "a.mp4")
    assert source.kind is SourceKind.FILE
    assert (source.size_bytes, source.stride) == (5, 1)
    assert source.video_key == video_key(source.uri) == corpus.keys[names(corpus).index("a.mp4")]
    walk = corpus.source(names(corpus).index("walk"))
    assert (walk.kind, walk.size_bytes) == (SourceKind.FRAMES, 20)
    # then the worker accepts both as the ones that were listed
    for one in (source, walk):
        with fetch_video(one, StoreOptions()):
            pass


def test_other_spellings_are_the_same_video(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    whole = listed(tree)
    for again in (
        listed(tree, tree),
        listed(f"{tree}/", f"file://{tree}/sub"),
        listed(".", "a.mp4", "sub/../walk"),
    ):
        assert sorted(again.keys.tolist()) == sorted(whole.keys.tolist())


def test_a_folder_of_frames_given_itself(tree: Path) -> None:
    corpus = listed(tree / "walk")
    assert names(corpus) == ["walk"]
    assert corpus.source(0).kind is SourceKind.FRAMES
    assert corpus.root == f"{tree}/"


def test_files_and_roots(tree: Path) -> None:
    assert names(listed(tree / "sub/b.MKV")) == ["b.MKV"]
    assert names(listed(tree / "sub/b.MKV", tree / "a.mp4")) == ["sub/b.MKV", "a.mp4"]
    assert sorted(names(listed(tree / "sub/deep", tree / "walk"))) == ["sub/deep/c.webm", "walk"]
    # a file named explicitly is taken whatever its extension
    assert names(listed(tree / "readme.txt")) == ["readme.txt"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.mp4", ["a.mp4"]),
        ("sub/*", ["sub/b.MKV", "sub/deep/c.webm", "sub/run"]),
        ("**/*.webm", ["sub/deep/c.webm"]),
        ("sub/[a-c].MK?", ["sub/b.MKV"]),
        ("sub/[!b]*", ["sub/deep/c.webm", "sub/run"]),
        ("w*", ["walk"]),
        ("walk/*.jpg", ["walk"]),
        ("*.txt", ["readme.txt"]),
    ],
)
def test_globs(tree: Path, pattern: str, expected: list[str]) -> None:
    corpus = listed(f"{tree}/{pattern}")
    uris = sorted(corpus.table["uri"].to_pylist())
    assert uris == [str(tree / name) for name in expected]


def test_keys_are_verbatim(bucket: Store) -> None:
    keys = ["a//b.mp4", "a/b.mp4", "a b#1?.mp4", "%41.mp4", "A.mp4", "clip[1].mp4", "ü/日本.mp4"]
    for key in [*keys, "frames//x/1.png"]:
        bucket.write_bytes(key, key.encode())
    corpus = listed(bucket.uri)
    assert sorted(names(corpus)) == sorted([*keys, "frames//x"])
    for row in range(len(corpus)):
        with fetch_video(corpus.source(row), StoreOptions()) as local:
            if local.path is not None:
                assert local.path.read_bytes() == names(corpus)[row].encode()
    # then an object whose name looks like a glob is that object
    assert names(listed(bucket.uri_of("clip[1].mp4"))) == ["clip[1].mp4"]
    assert names(listed(bucket.uri_of("a b#1?.mp4"))) == ["a b#1?.mp4"]
    assert names(listed(bucket.uri_of("a//"))) == ["b.mp4"]


def test_thumbnails_beside_videos_are_no_video(tmp_path: Path) -> None:
    touch(tmp_path, "v/a.mp4", "v/a.jpg", "v/b.jpg", "v/walk/1.jpg")
    corpus = listed(tmp_path / "v")
    assert sorted(names(corpus)) == ["a.mp4", "walk"]
    assert corpus.num_ignored == 2
    assert "2 images are taken for thumbnails" in corpus.warnings[0]


def write_csv(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_csv_manifest(tree: Path) -> None:
    path = write_csv(
        tree / "list.csv",
        "video,start_s,end_s,stride,prompts,_note\n"
        f"a.mp4,,,,,x\n"
        f"a.mp4,0.5,1.25,2,boxes.jsonl,\n"
        f'{tree}/sub/b.MKV,,,3,"{{""x"": 1}}",y\n'
        "walk,,,,,\n",
    )
    corpus = from_manifest(path, stride=5)
    rows = [corpus.source(row) for row in range(4)]
    assert [row.name for row in rows] == ["a.mp4", "a.mp4", "sub/b.MKV", "walk"]
    assert [(row.start_us, row.end_us) for row in rows] == [
        (None, None),
        (500_000, 1_250_000),
        (None, None),
        (None, None),
    ]
    assert [row.stride for row in rows] == [5, 2, 3, 5]
    assert [row.kind.value for row in rows] == ["file", "file", "file", "frames"]
    assert len(set(corpus.keys.tolist())) == 4
    assert rows[1].video_key == video_key(rows[1].uri, 500_000, 1_250_000)
    assert corpus.table["prompts"].to_pylist() == [None, f"{tree}/boxes.jsonl", '{"x": 1}', None]
    assert rows[0].etag == listed(tree / "a.mp4").source(0).etag
    # then the same file given as a path is the same manifest
    assert listed(path, stride=5).table.equals(corpus.table)


def test_jsonl_and_parquet_manifests_mean_the_same(tree: Path) -> None:
    rows = [
        {"video": "a.mp4", "start_s": 0.5, "stride": 2},
        {"video": str(tree / "walk"), "end_s": 3, "prompts": {"box": [1, 2]}},
    ]
    lines = tree / "list.jsonl"
    lines.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    parquet = tree / "list.parquet"
    table = pa.Table.from_pylist(
        [
            {**row, "prompts": json.dumps(row["prompts"]) if "prompts" in row else None}
            | {
                "start_s": row.get("start_s"),
                "end_s": row.get("end_s"),
                "stride": row.get("stride"),
            }
            for row in rows
        ]
    )
    pq.write_table(table, parquet)
    one, other = from_manifest(lines), from_manifest(parquet)
    assert one.table.equals(other.table)
    assert one.source(0).start_us == 500_000
    assert one.source(1).kind is SourceKind.FRAMES
    assert one.table["prompts"][1].as_py() == '{"box": [1, 2]}'


def test_bad_rows_cost_their_video_only(tree: Path) -> None:
    path = write_csv(
        tree / "list.csv",
        "video,start_s,end_s,stride\n"
        "a.mp4,,,\n"
        "sub/b.MKV,soon,,\n"
        "sub/deep/c.webm,3,2,\n"
        ",,,\n"
        "gone.mp4,,,\n"
        "walk,,,0\n"
        "sub/run,nan,,\n"
        "s3://user:secret@bucket/x.mp4,,,\n"
        "a.mp4,,1,1.5\n",
    )
    corpus = from_manifest(path)
    assert len(corpus) == 9
    reasons = [corpus.faults.get(row, "") for row in range(9)]
    assert reasons[0] == ""
    for row, expected in {
        1: "row 2 of the manifest .* has start_s 'soon': it must be seconds",
        2: "row 3 .* has end_s at or before start_s",
        3: "row 4 .* has no video",
        4: "gone.mp4 does not exist",
        5: "row 6 .* has stride 0: it must be a whole number, at least 1",
        6: "row 7 .* has start_s nan",
        7: "row 8 .* names no place: .* holds a password",
        8: "row 9 .* has stride '?1.5'?",
    }.items():
        assert re.search(expected, reasons[row]), (row, reasons[row])
    assert not any("secret" in str(value) for value in corpus.table["uri"].to_pylist())


def test_the_same_video_with_two_settings_is_a_fault(tree: Path) -> None:
    path = write_csv(tree / "list.csv", "video,stride\na.mp4,1\nwalk,1\na.mp4,2\nwalk/,1\n")
    corpus = from_manifest(path)
    assert names(corpus) == ["a.mp4", "walk"]
    assert list(corpus.faults) == [0]
    assert "is listed twice with another stride" in corpus.faults[0]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("list.csv", "path\na.mp4\n", "has no column `video`, only path"),
        ("list.csv", "video,strid\na.mp4,2\n", "has an unknown column 'strid'"),
        ("list.csv", "video,video\na.mp4,2\n", "has a column twice"),
        ("list.csv", "", "cannot be read"),
        ("list.csv", "video,stride\na.mp4\n", "cannot be read"),
        ("list.jsonl", '{"video": "a.mp4"}\nnot json\n', "line 2 of the manifest .* is not a JSON"),
        ("list.jsonl", "[1]\n", "line 1 of the manifest"),
        ("list.parquet", "PAR1", "cannot be read"),
        ("list.csv", "video\n", "no video was found in the manifest"),
    ],
)
def test_unreadable_manifests(tree: Path, name: str, content: str, expected: str) -> None:
    (tree / name).write_text(content)
    with pytest.raises(ConfigError, match=expected) as caught:
        from_manifest(tree / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("list_from", [0, 100])
def test_rows_without_facts_are_looked_up(
    tree: Path, monkeypatch: pytest.MonkeyPatch, list_from: int
) -> None:
    # once by listing their folders, once one by one, with the same result
    monkeypatch.setattr(corpus_module, "LIST_FROM", list_from)
    path = write_csv(tree / "m.csv", "video\na.mp4\nsub/b.MKV\nwalk\nsub/run\ngone.mp4\nsub\n")
    corpus = from_manifest(path)
    plain = listed(tree)
    for name in ("a.mp4", "sub/b.MKV", "walk", "sub/run"):
        [row], [same] = corpus.rows_named(name), plain.rows_named(name)
        assert corpus.source(row) == plain.source(same)
    assert sorted(corpus.faults) == [4, 5]


def test_facts_in_the_manifest_are_taken(tree: Path) -> None:
    path = write_csv(tree / "m.csv", 'video,size_bytes,etag\nx.mp4,7,"""abc"""\ny,,\nz.mp4,,e\n')
    corpus = from_manifest(path, stat=False)
    assert corpus.faults == {}
    assert [(s.kind.value, s.size_bytes, s.etag) for s in map(corpus.source, range(3))] == [
        ("file", 7, "abc"),
        ("frames", None, None),
        ("file", None, "e"),
    ]
    assert sorted(from_manifest(path).faults) == [1], "only what tells nothing is asked for"


def test_keys() -> None:
    assert video_key("s3://b/a.mp4") == video_key("s3://b/a.mp4", 0, None)
    different = [
        video_key("s3://b/a.mp4"),
        video_key("s3://b/a.mp4", 1),
        video_key("s3://b/a.mp4", 0, 1),
        video_key("s3://b/A.mp4"),
        video_key("s3://b//a.mp4"),
    ]
    assert len(set(different)) == 5
    assert all(-(2**63) <= key < 2**63 for key in different)
    uris = ["s3://b/a.mp4", "s3://b/ü//日本.mp4", "/a b"]
    assert video_keys(uris).tolist() == [video_key(uri) for uri in uris]
    # stored in every output: must never change
    assert video_key("s3://bucket/a//b.mp4", 1_000_000, 2_000_000) == -7714860790436715898


def test_samples(bucket: Store) -> None:
    for number in range(200):
        bucket.write_bytes(f"v/{number:03d}.mp4", b"x")
    whole = listed(bucket.uri)
    few = listed(bucket.uri, sample=10)
    more = listed(bucket.uri, sample=50)
    assert len(few) == 10
    assert set(names(few)) < set(names(more)) < set(names(whole))
    assert names(few) == sorted(names(few)), "in listed order"
    assert names(few) == names(listed(bucket.uri, sample=10))
    assert names(few) != names(listed(bucket.uri, sample=10, seed=1))
    assert names(listed(bucket.uri, sample=10, limit=3)) == names(few)[:3]
    assert names(listed(bucket.uri, limit=2)) == names(whole)[:2]
    assert all(name in names(whole) for name in names(few)), "names do not depend on the sample"


def test_names_may_be_shortened(bucket: Store) -> None:
    keys = ["a.mp4", "x/a.mp4", "x/b.mkv", "y/b.mp4", "y/c.tar.mp4", "z/d.v1/1.jpg", "x/e", "x.mp4"]
    for key in keys:
        bucket.write_bytes(key, b"x")
    corpus = listed(bucket.uri, bucket.uri_of("x/e"))

    def found(name: str) -> list[str]:
        return [names(corpus)[row] for row in corpus.rows_named(name)]

    for name in names(corpus):
        assert found(name) == [name]
        assert found(bucket.uri_of(name)) == [name]
    assert found("a") == ["a.mp4"], "the whole name without its extension wins"
    assert found("x/a") == ["x/a.mp4"]
    assert found("b.mkv") == ["x/b.mkv"]
    assert found("c.tar") == ["y/c.tar.mp4"]
    assert found("d.v1") == ["z/d.v1"]
    assert found("d") == [], "a folder of frames has no extension"
    assert found("e") == ["x/e"]
    assert found("x") == ["x.mp4"]
    assert sorted(found("b")) == ["x/b.mkv", "y/b.mp4"]
    assert found("") == found("p4") == found("nothing") == []
    assert corpus.rows_named("x/b") == corpus.rows_named("x/b.mkv")


def test_what_a_selection_leaves_out_still_has_its_name(tree: Path) -> None:
    touch(tree, "x/b.mkv", "y/b.mp4")
    whole = listed(tree)
    part = listed(tree, videos=("x/b",))
    assert names(part) == ["x/b.mkv"]
    for name in ("b", "x/b", "y/b", "nothing", *names(whole)):
        assert part.match(name).names == whole.match(name).names, name
        assert len(whole.rows_named(name)) == len(part.match(name).ranges), name
    assert part.rows_named("b") == [0], "rows are those of the selection"
    assert part.rows_named("y/b") == []
    limited = listed(tree, limit=1)
    assert limited.match("b").names == whole.match("b").names


def test_videos_are_picked_by_name(tree: Path, tmp_path: Path) -> None:
    touch(tree, "x/b.mkv", "y/b.mp4")
    whole = listed(tree)
    uri = str(tree / "y/b.mp4")
    for picked in (("y/b.mp4",), ("y/b",), (uri,), (uri, "y/b")):
        part = listed(tree, videos=picked)
        assert part.source(0) == whole.source(whole.rows_named("y/b.mp4")[0])
        assert len(part) == 1
    assert names(listed(tree, videos=("y/b", "x/b"), limit=1)) == ["x/b.mkv"]
    with pytest.raises(
        ConfigError, match=r"the name 'b' fits 3 videos \(sub/b.MKV, x/b.mkv, y/b.mp4\)"
    ):
        listed(tree, videos=("b",))
    with pytest.raises(ConfigError, match=r"no video of the corpus is named 'q\.mp4'"):
        listed(tree, videos=("q.mp4",))
    manifest = tmp_path / "ranges.csv"
    manifest.write_text(f"video,start_s,end_s\n{uri},0,1\n{uri},1,2\n{tree}/x/b.mkv,,\n")
    ranges = from_manifest(manifest, videos=(uri,))
    assert ranges.table["start_us"].to_pylist() == [0, 1_000_000]
    both = [(0, 1_000_000), (1_000_000, 2_000_000)]
    assert ranges.match(uri).ranges == both
    one = from_manifest(manifest, limit=1)
    assert (one.rows_named(uri), one.match(uri).ranges) == ([0], both)


@given(st.lists(st.text("ab/.", min_size=1, max_size=6), min_size=1, max_size=12, unique=True))
def test_every_name_finds_itself(parts: list[str]) -> None:
    store = open_store("memory://hypothesis")
    stems = [f"{part.strip('/.')}{number}" for number, part in enumerate(parts)]
    store.delete([stat.key for stat in store.list("")])
    for stem in stems:
        store.write_bytes(f"{stem}.mp4", b"x")
    try:
        corpus = listed(store.uri)
    except ConfigError:
        return  # every one of them was a dot-file
    for row, name in enumerate(names(corpus)):
        assert corpus.rows_named(name) == [row]


def test_nothing_found(tree: Path, bucket: Store) -> None:
    (tree / "empty").mkdir()
    for path, expected in {
        str(tree / "nowhere"): "nowhere does not exist",
        str(tree / "empty"): r"no video was found in .*empty: looked for files such as \.mp4",
        str(tree / "*.avi"): r"no video was found in .*\*\.avi",
        bucket.uri: f"no video was found in {bucket.uri}",
    }.items():
        with pytest.raises(ConfigError, match=expected):
            listed(path)
    touch(tree, "docs/a.txt", "docs/b.txt")
    with pytest.raises(ConfigError, match=r"docs \(2 other files\)"):
        listed(tree / "docs")
    with pytest.raises(ConfigError, match="no corpus was given"):
        listed()
    with pytest.raises(ConfigError, match=r"the manifest .*none\.csv does not exist"):
        from_manifest(tree / "none.csv")


def test_files_of_a_web_server(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"listed, and not read")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}"
        assert names(listed(f"{root}/a.mp4")) == ["a.mp4"]
        with pytest.raises(ConfigError, match=r"b\.mp4 does not exist: correct the URL"):
            listed(f"{root}/b.mp4")
        manifest = tmp_path / "m.csv"
        manifest.write_text(f"video\n{root}/a.mp4\n{root}/b.mp4\n")
        assert len(from_manifest(manifest).faults) == 1
        server.shutdown()
    with pytest.raises(StoreUnavailable, match=r"a\.mp4 cannot be read now"):
        listed(f"{root}/a.mp4")


def test_a_scheme_without_its_package() -> None:
    with pytest.raises(ConfigError, match="pip install"):
        listed("gs://bucket/videos")


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    folder = tmp_path / "v"
    touch(folder, "good.mp4")
    bad = bytes(folder) + b"/b\xffd.mp4"
    with open(bad, "wb") as stream:  # noqa: PTH123 - a Path cannot hold such a name
        stream.write(b"x")
    corpus = listed(folder)
    assert len(corpus) == 2
    [reason] = corpus.faults.values()
    assert "not valid UTF-8: rename it" in reason


def test_a_real_bucket(seaweedfs: servers.S3Server, tmp_path: Path) -> None:
    config = StoreConfig(endpoint_url=seaweedfs.endpoint_url, path_style=True, region="us-east-1")
    root = f"{seaweedfs.new_bucket()}/in"
    store = open_store(root, config.options())
    keys = ["a b#1.mp4", "deep/%41ü.mkv", "walk/1.png", "walk/2.png", "notes.txt"]
    for key in keys:
        store.write_bytes(key, key.encode())
    corpus = listed(root, store=config)
    assert sorted(names(corpus)) == ["a b#1.mp4", "deep/%41ü.mkv", "walk"]
    for row in range(3):
        with fetch_video(corpus.source(row), config.options(), tmp_path) as local:
            assert (local.path is None) == (names(corpus)[row] == "walk")
    manifest = tmp_path / "m.csv"
    manifest.write_text(f"video\n{root}/walk\n{root}/gone.mp4\n{root}/a b#1.mp4\n")
    from_rows = from_manifest(manifest, store=config)
    assert list(from_rows.faults) == [1]
    assert from_rows.source(0).etag == corpus.source(corpus.rows_named("walk")[0]).etag


def test_a_bucket_without_permission(seaweedfs: servers.S3Server) -> None:
    config = StoreConfig(
        endpoint_url=seaweedfs.endpoint_url, path_style=True, region="us-east-1", anonymous=True
    )
    with pytest.raises(StoreError) as caught:
        listed(f"{seaweedfs.new_bucket()}/in", store=config)
    assert isinstance(caught.value, StoreDenied)
