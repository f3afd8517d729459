"""The notifier's contract, against a real web server on this machine.

* How a run ended, that it failed, and that too many videos fail, each arrive once, as JSON.
* The rate is judged from twenty settled videos on, and told once.
* A receiver that refuses, hangs or is not there is a warning and nothing else.
* The URL is in no sentence, no `repr`, no stored configuration, no command; only its host is named.
* A run tells its end; one that fails on the way tells that, too, and still fails.
* A URL that is none is refused before anything starts, without being repeated.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from jobs import driver, notify
from jobs.config import RunConfig
from jobs.flags import command_words
from jobs.notify import Notifier, check_url, notify_url
from jobs.progress import SilentReporter
from jobs.settings import to_toml
from jobs.threads import ThreadPool
from tests.cluster import free_port
from tests.e2e.corpora import write_corpus
from workers.errors import ConfigError

SECRET = "T0PSECRET"


@dataclass
class Receiver:
    """A webhook and what it heard."""

    url: str = ""
    status: int = 200
    heard: list[dict[str, Any]] = field(default_factory=list)
    hold: threading.Event = field(default_factory=threading.Event)


@contextmanager
def receiving() -> Iterator[Receiver]:
    state = Receiver()
    state.hold.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            state.hold.wait(30)
            assert self.headers["Content-Type"] == "application/json"
            state.heard.append(json.loads(body))
            self.send_response(state.status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}/hooks/{SECRET}?token={SECRET}"
    try:
        yield state
    finally:
        state.hold.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as state:
        yield state


def make(url: str | None, *, above: float | None = 0.1) -> tuple[Notifier, list[str]]:
    warnings: list[str] = []
    return Notifier(url, above, warnings.append), warnings


def test_a_message_arrives_as_json(receiver: Receiver) -> None:
    notifier, warnings = make(receiver.url)
    notifier.send("finished", "it is done", {"run_id": "r", "num_committed": 3})
    notifier.flush()
    assert receiver.heard == [
        {"text": "it is done", "event": "finished", "run_id": "r", "num_committed": 3}
    ]
    assert warnings == []


def test_the_rate_is_told_once_and_not_too_early(receiver: Receiver) -> None:
    notifier, _ = make(receiver.url, above=0.25)
    for quarantined in range(30):
        notifier.settled(14, quarantined, {"run_id": "r"})
    notifier.flush()
    (message,) = receiver.heard
    assert message["event"] == "quarantine_rate"
    assert "6 of 20 videos" in message["text"]  # 5 of 19 is more than a quarter, too, but early


def test_what_does_not_arrive_is_a_warning(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a receiver that refuses, one that hangs, and none at all
    monkeypatch.setattr(notify, "TIMEOUT_S", 0.3)
    receiver.status = 500
    refused, first = make(receiver.url)
    refused.send("finished", "x", {})
    refused.flush()
    receiver.hold.clear()
    hanging, second = make(receiver.url)
    hanging.send("finished", "x", {})
    hanging.flush()
    absent, third = make(f"http://127.0.0.1:{free_port()}/{SECRET}")
    absent.send("finished", "x", {})
    absent.flush()
    # Then each is one sentence that names the host and not the secret
    assert [len(first), len(second), len(third)] == [1, 1, 1]
    assert "it answered 500" in first[0]
    assert "no answer in time" in second[0]
    assert "cannot be reached" in third[0]
    for text in (*first, *second, *third, repr(refused), repr(absent)):
        assert SECRET not in text
        assert "127.0.0.1" in text or text.startswith("Notifier(")


def test_nothing_is_sent_without_a_url() -> None:
    notifier, warnings = make(None)
    notifier.send("finished", "x", {})
    notifier.settled(0, 50, {"run_id": "r"})
    notifier.flush()
    assert warnings == []


@pytest.mark.parametrize(
    "url", [f"ftp://host/{SECRET}", f"file:///etc/{SECRET}", SECRET, f"http:///{SECRET}"]
)
def test_what_is_no_webhook_is_refused_without_repeating_it(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError) as refused:
        check_url(url)
    assert SECRET not in str(refused.value)
    monkeypatch.setenv(notify.URL_VARIABLE, url)
    with pytest.raises(ConfigError) as refused:
        notify_url(None)
    assert SECRET not in str(refused.value)


class Listener(SilentReporter):
    """A reporter that keeps what it was told."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def on_message(self, level: str, text: str) -> None:
        self.messages.append(f"{level}: {text}")


def run_config(folder: Path, url: str | None) -> RunConfig:
    return RunConfig.model_validate(
        {
            "corpus": {"paths": (str(folder / "corpus"),)},
            "out": {"uri": str(folder / "out")},
            "tracker": {"name": "fake"},
            "prompts": {"file": str(folder / "prompts.jsonl")},
            "notify": {"url": url},
        }
    )


def test_a_run_tells_its_end_and_keeps_the_url_to_itself(
    receiver: Receiver, tmp_path: Path
) -> None:
    write_corpus(tmp_path / "corpus", 2, num_frames=4)
    (tmp_path / "corpus" / "broken.mp4").write_bytes(b"no video" * 100)
    config = run_config(tmp_path, receiver.url)
    listener = Listener()
    summary = driver.run(
        config, reporter=listener, pool_factory=lambda _, spec: ThreadPool(spec, 1)
    )
    (message,) = receiver.heard
    assert message["event"] == "finished"
    assert (message["exit_code"], message["run_id"]) == (summary.exit_code, summary.run_id)
    assert (message["num_committed"], message["num_quarantined"]) == (2, 1)
    # The secret is in nothing that was shown or stored.
    shown = [*listener.messages, to_toml(config), repr(config), *command_words(config)]
    assert not [text for text in shown if SECRET in text]
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_a_run_that_fails_tells_it_and_a_deaf_receiver_changes_nothing(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path / "corpus", 1, num_frames=4)
    (tmp_path / "prompts.jsonl").write_text("{")
    receiver.status = 503
    listener = Listener()
    monkeypatch.setenv(notify.URL_VARIABLE, receiver.url)
    with pytest.raises(ConfigError):
        driver.run(
            run_config(tmp_path, None),
            reporter=listener,
            pool_factory=lambda _, spec: ThreadPool(spec, 1),
        )
    (message,) = receiver.heard
    assert message["event"] == "failed"
    assert "prompts" in message["text"]
    (warning,) = listener.messages
    assert warning.startswith("warning: the message to the notify URL at 127.0.0.1:")
    assert SECRET not in warning
