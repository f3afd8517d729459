"""Weights from the hub, and copies of weights: `workers.hub`, `jobs.weights`, `models pull`.

- An id of the hub is a checkpoint: the file that its tracker needs, of the revision that was
  named, downloaded once, checked against the hub's digest; transformers' configuration with it.
- A file, a folder or a URL of the same form is what it looks like.
- What is missing, refused, damaged or out of reach is one sentence with its exit code, and the
  last one says how to pull weights elsewhere; `HF_HUB_OFFLINE` is respected.
- `models pull` leaves weights and digest in a folder or bucket, twice without harm, and a run
  refuses them when they are no longer what the digest says; `models` names the ids.
- A configuration keeps ids, makes paths absolute, and lets the id of a model name its weights.

The hub is a server in a process of its own that speaks its protocol (`tests.hub`).
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from jobs import cli
from jobs.report import model_lines
from jobs.settings import Given, load_config
from jobs.weights import pull_weights
from tests import hub
from workers.errors import ConfigError, MaskmillError, StoreDenied, StoreUnavailable
from workers.hub import CHECKPOINT_FILES, TRANSFORMERS_FILE, is_hub_id
from workers.messages import StoreOptions
from workers.storage import open_store
from workers.trackers.registry import TRACKERS, tracker_info
from workers.weights import copy_weights, fetch_weights, file_sha256

TINY = "facebook/sam2.1-hiera-tiny"
NAME = "sam2.1_hiera_tiny.pt"


def archive(text: str) -> bytes:
    """Return a small zip archive, the container of a .pt file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        # With a fixed date: the same bytes whenever it is made.
        file.writestr(zipfile.ZipInfo("archive/data.pkl"), text)
    return buffer.getvalue()


def safetensors(fill: int) -> bytes:
    header = json.dumps({"a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes([fill] * 9)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hub.Hub]:
    with hub.running(tmp_path_factory.mktemp("hub")) as made:
        made.add(TINY, NAME, archive("new"), archive("old"))
        made.add(TINY, TRANSFORMERS_FILE, safetensors(2), safetensors(1))
        made.add(TINY, "config.json", b'{"model_type": "sam2_video"}', b'{"old": true}')
        made.add("someone/tuned", TRANSFORMERS_FILE, safetensors(3))
        made.add("someone/tuned", "config.json", b"{}")
        made.add("facebook/sam2-hiera-tiny", "README.md", b"nothing else")
        made.add("facebook/sam2-hiera-large", "sam2_hiera_large.pt", archive("x"))
        made.add("facebook/sam2-hiera-large", "sam2_hiera_large.pt.etag", b"0" * 64)
        yield made


@pytest.fixture(autouse=True)
def environment(server: hub.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the library use the server, and a cache of its own, which it reads when imported."""
    from huggingface_hub import constants

    cache = tmp_path / "hub-cache"
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("MASKMILL_CACHE", str(tmp_path / "cache"))
    return cache


# -- ids -------------------------------------------------------------------------------------


def test_what_is_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my/weights").mkdir(parents=True)
    for text in (TINY, f"{TINY}@main", f"{TINY}@{'a' * 40}", "someone/tuned@refs/pr/1"):
        assert is_hub_id(text)
    for text in ("my/weights", "weights/a.pt", "a.pt", "/a/b", "s3://a/b", "./a/b", "a/b/c", "~/a"):
        assert not is_hub_id(text)


def test_every_size_has_an_id_and_every_id_a_file() -> None:
    assert len(CHECKPOINT_FILES) == 8
    for info in TRACKERS:
        for size in info.sizes if info.hub_id else ():
            of_size = tracker_info(f"{info.name}:{size}")
            assert of_size.weights in (CHECKPOINT_FILES[of_size.hub_id], TRANSFORMERS_FILE)
    assert "facebook/sam2.1-hiera-tiny on the hub" in " ".join(" ".join(model_lines()).split())


def test_a_checkpoint_is_downloaded_once(server: hub.Hub, environment: Path) -> None:
    first = fetch_weights(TINY, file_name="sam2.1_hiera_tiny.pt")
    num_downloads = len([r for r in server.requests() if r.startswith("GET")])
    assert fetch_weights(TINY, file_name="sam2.1_hiera_small.pt") == first
    assert len([r for r in server.requests() if r.startswith("GET")]) == num_downloads
    assert first.path.read_bytes() == archive("new")
    assert first.sha256 == file_sha256(first.path)
    assert first.path.is_relative_to(environment)


def test_a_revision_is_pinned_and_brings_its_own_configuration() -> None:
    old = fetch_weights(f"{TINY}@{hub.COMMITS[0]}", file_name=TRANSFORMERS_FILE)
    new = fetch_weights(f"{TINY}@main", file_name=TRANSFORMERS_FILE)
    assert old.path.read_bytes() == safetensors(1)
    assert new.path.read_bytes() == safetensors(2)
    assert json.loads(old.path.with_name("config.json").read_text()) == {"old": True}
    assert "model_type" in json.loads(new.path.with_name("config.json").read_text())


@pytest.mark.parametrize(
    ("uri", "file_name", "kind", "said"),
    [
        ("someone/else", TRANSFORMERS_FILE, ConfigError, "no model someone/else"),
        ("someone/tuned", NAME, ConfigError, "which file of someone/tuned"),
        (f"{TINY}@v9", NAME, ConfigError, "no revision v9"),
        ("facebook/sam2-hiera-tiny", NAME, ConfigError, "no file sam2_hiera_tiny.pt"),
        ("someone/gated", TRANSFORMERS_FILE, StoreDenied, "HF_TOKEN"),
        ("facebook/sam2-hiera-large", NAME, ConfigError, "the hub says 0000"),
    ],
)
def test_faults_are_one_sentence(
    uri: str, file_name: str, kind: type[MaskmillError], said: str
) -> None:
    with pytest.raises(kind, match=said) as caught:
        fetch_weights(uri, file_name=file_name)
    assert uri.partition("@")[0] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_offline_only_the_cache_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    known = fetch_weights(TINY, file_name=NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_weights(TINY, file_name=NAME) == known
    with pytest.raises(StoreUnavailable, match=r"HF_HUB_OFFLINE is set.*pull .* --for sam2video"):
        fetch_weights(TINY, file_name=TRANSFORMERS_FILE)


# -- copies ----------------------------------------------------------------------------------


def pulled(name: str, to: str, **more: str) -> str:
    """Pull weights and return what is printed as their place."""
    facts, place = pull_weights(name, to, StoreOptions(), **more)
    assert "sha256" in facts
    return place.removeprefix("--checkpoint ")


def test_weights_are_copied_and_checked_where_they_are_used(tmp_path: Path) -> None:
    bucket = f"memory://pulled-{uuid4().hex}"
    for to in (str(tmp_path / "weights"), bucket):
        place = pulled("sam2:tiny", to)
        store = open_store(to)
        assert place == store.uri_of(NAME)
        digest = fetch_weights(place).sha256
        assert store.read_bytes(f"{NAME}.sha256").decode() == f"{digest}  {NAME}\n"
        # A folder is enough, as the tracker knows the file's name; and a second pull harms nothing.
        assert fetch_weights(to, file_name=NAME).sha256 == digest
        before = store.stat(NAME)
        assert pulled("samurai:tiny", to) == place
        assert store.stat(NAME) == before
        store.write_bytes(NAME, archive("changed"))
        with pytest.raises(ConfigError, match=rf"{NAME}\.sha256 says {digest}"):
            fetch_weights(place)
        pulled("sam2:tiny", to)
        assert fetch_weights(place).sha256 == digest


def test_transformers_weights_keep_their_configuration(tmp_path: Path) -> None:
    bucket = f"memory://pulled-{uuid4().hex}/models"
    for name, more in (("sam2video/tiny", {}), (TINY, {"tracker": "sam2video"})):
        assert (
            pulled(name, bucket, **more)
            == f"{bucket}/facebook--sam2.1-hiera-tiny/{TRANSFORMERS_FILE}"
        )
    again = pulled(f"{bucket}/facebook--sam2.1-hiera-tiny", str(tmp_path))
    tuned = pulled("someone/tuned", str(tmp_path))
    for folder, fill in (("facebook--sam2.1-hiera-tiny", 2), ("someone--tuned", 3)):
        assert (tmp_path / folder / TRANSFORMERS_FILE).read_bytes() == safetensors(fill)
        assert (tmp_path / folder / "config.json").is_file()
    assert [again, tuned] == [
        str(tmp_path / folder / TRANSFORMERS_FILE)
        for folder in ("facebook--sam2.1-hiera-tiny", "someone--tuned")
    ]
    # From a bucket they come to the node together, under the names their reader looks for.
    found = fetch_weights(f"{bucket}/facebook--sam2.1-hiera-tiny", file_name=TRANSFORMERS_FILE)
    assert found.path.name == TRANSFORMERS_FILE
    assert found.path.with_name("config.json").is_file()
    assert fetch_weights(f"{bucket}/facebook--sam2.1-hiera-tiny/{TRANSFORMERS_FILE}") == found


def test_any_file_can_be_copied(tmp_path: Path) -> None:
    (tmp_path / "a b.pt").write_bytes(archive("mine"))
    copy = copy_weights(str(tmp_path / "a b.pt"), str(tmp_path / "there"))
    assert Path(copy.uri) == tmp_path / "there/a b.pt"
    assert fetch_weights(copy.uri).sha256 == copy.sha256


def test_pull_without_a_place_fills_the_cache(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "pull", "Gy920/sam2-1-hiera-tiny"]) == 0
    shown = capsys.readouterr().out
    assert "Apache-2.0" in shown
    assert Path(shown.strip().rpartition("--checkpoint ")[2]).read_bytes() == archive("new")


def test_a_tracker_is_meant_also_where_a_folder_is_called_like_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sam2").mkdir()  # a clone of its repository, for instance
    monkeypatch.chdir(tmp_path)
    assert pulled("sam2", str(tmp_path / "weights")).endswith(".pt")


@pytest.mark.parametrize(
    ("name", "said", "code"),
    [
        ("flow", "needs no weights", 2),
        ("yolo11n-seg", "not on the hub", 2),
        ("nonsense", "no tracker 'nonsense'", 2),
        ("sam2:huge", "sizes are tiny", 2),
        ("someone/broken", "the hub answered", 3),
    ],
)
def test_what_cannot_be_pulled(
    name: str, said: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["models", "pull", name]) == code
    assert said in capsys.readouterr().err


def test_an_unreachable_hub_says_what_to_do(tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "models", "pull", "sam2:small", "--to", str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).resolve().parents[1],
        timeout=300,
    )
    assert done.returncode == 3
    assert done.stderr.startswith("error: the weights facebook/sam2.1-hiera-small cannot be had")
    assert "maskmill models pull facebook/sam2.1-hiera-small --to URI" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# -- in a configuration ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "checkpoint", "expected"),
    [
        (f"{TINY}@v1", None, ("sam2:tiny", f"{TINY}@v1")),
        (
            "facebook/sam2-hiera-base-plus",
            None,
            ("sam2:base-plus", "facebook/sam2-hiera-base-plus"),
        ),
        ("Gy920/sam2-1-hiera-large", None, ("sam2-rt:large", "facebook/sam2.1-hiera-large")),
        ("sam2video/small", None, ("sam2video:small", "facebook/sam2.1-hiera-small")),
        ("sam2video/small", "/w/a", ("sam2video:small", "/w/a")),
        ("samurai", "someone/tuned", ("samurai", "someone/tuned")),
        ("samurai", "a.pt", ("samurai", str(Path("a.pt").absolute()))),
    ],
)
def test_ids_in_a_configuration(
    name: str, checkpoint: str | None, expected: tuple[str, str]
) -> None:
    flags = {
        "corpus.paths": Given(["/v"], "CORPUS"),
        "out.uri": Given("/o", "--out"),
        "tracker.name": Given(name, "--tracker"),
    }
    if checkpoint is not None:
        flags["tracker.checkpoint"] = Given(checkpoint, "--checkpoint")
    tracker = load_config(flags=flags).tracker
    assert (tracker.name, tracker.checkpoint) == expected


def test_an_unknown_id_of_a_model_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "/v", "--tracker", "facebook/sam9"]) == 2
    assert "facebook/sam2.1-hiera-SIZE" in capsys.readouterr().err
