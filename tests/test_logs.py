"""The contract of the logs.

* Each record is one line of JSON with time, level, message and what `log_context` said.
* Contexts nest, and threads have their own.
* No secret of the environment, of a URL or of a signature reaches a line.
* Lines wait in bounded memory: the oldest are dropped and counted, a giant one is cut.
* `write_to` makes one new file per call; after a store's fault nothing is lost.
* Only this project's loggers are kept, only while the block runs.
"""

from __future__ import annotations

import contextvars
import json
import logging
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest

from workers.errors import StoreDenied
from workers.logs import RunLog, log_context, process_name
from workers.storage import Store, open_store

LOGGER = logging.getLogger("workers.pipeline")


@pytest.fixture
def store() -> Store:
    return open_store(f"memory://{uuid.uuid4().hex}")


def written(log: RunLog, store: Store) -> list[dict[str, Any]]:
    key = log.write_to(store)
    return [] if key is None else [json.loads(line) for line in store.read_bytes(key).splitlines()]


def test_a_line_says_what_it_is_about(store: Store) -> None:
    with RunLog("run1", "driver") as log, log_context(run_id="run1"):
        with log_context(video="ä/b.mp4", video_key=-(2**62) - 1, attempt_id="a7"):
            LOGGER.warning("frame %d is\nbroken", 3)
        LOGGER.info("between")
        LOGGER.debug("not kept")
    first, second = written(log, store)
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "WARNING",
        "logger": "workers.pipeline",
        "run_id": "run1",
        "video": "ä/b.mp4",
        "video_key": str(-(2**62) - 1),
        "attempt_id": "a7",
        "message": "frame 3 is\nbroken",
    }
    assert second["message"] == "between"
    assert "video" not in second
    assert next(iter(second)) == "time"


def test_an_exception_brings_its_traceback(store: Store) -> None:
    with RunLog("run1", "driver") as log:
        try:
            raise ValueError("too odd")
        except ValueError:
            LOGGER.exception("stopped")
    (line,) = written(log, store)
    assert line["level"] == "ERROR"
    assert line["traceback"].endswith("ValueError: too odd")


def test_threads_have_their_own_context(store: Store) -> None:
    with RunLog("run1", "worker") as log, log_context(run_id="run1"):

        def work(name: str) -> None:
            with log_context(attempt_id=name):
                barrier.wait(5)
                LOGGER.info(name)

        barrier = threading.Barrier(2)
        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(work, name))
            for name in ("a1", "a2")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = written(log, store)
    assert sorted(line["message"] for line in lines) == ["a1", "a2"]
    assert all(line["attempt_id"] == line["message"] for line in lines)
    assert all(line["run_id"] == "run1" for line in lines)


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("signed with {secret} just now", "wJalrXUtnFEMI/K7MDENG"),
        ("GET /b/k?X-Amz-Signature={secret}&x=1", "8f2c7a9b"),
        ("GET /b/k?X-Amz-Security-Token={secret} failed", "IQoJb3JpZ2lu"),
        ("proxy http://me:{secret}@proxy:3128 refused", "hunter22"),
        ("Authorization: Bearer {secret}", "eyJhbGciOi.x-y_z"),
    ],
)
def test_secrets_never_reach_a_line(
    text: str, secret: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
    text = text.format(secret=secret)
    with RunLog("run1", "driver") as log:
        LOGGER.info(text)
        LOGGER.info("the argument %s", text)
        try:
            raise OSError(text)
        except OSError:
            LOGGER.exception("failed")
    key = log.write_to(store)
    assert key is not None
    data = store.read_bytes(key).decode()
    assert secret not in data
    assert data.count("***") == 3
    assert text.partition(secret)[0] in data


def test_memory_is_bounded_and_the_loss_is_told(store: Store) -> None:
    with RunLog("run1", "driver", max_bytes=10_000) as log:
        for number in range(1000):
            LOGGER.info("line %d", number)
    told, *kept = written(log, store)
    assert 50 < len(kept) < 120
    assert kept[-1]["message"] == "line 999"
    assert kept[0]["message"] == f"line {1000 - len(kept)}"
    assert told["message"] == f"{1000 - len(kept)} earlier lines were dropped: the log was full"


def test_a_giant_line_is_cut(store: Store) -> None:
    with RunLog("run1", "driver") as log:
        LOGGER.info("x" * 1_000_000)
        LOGGER.info("next")
    giant, following = written(log, store)
    assert len(giant["message"]) < 20_000
    assert giant["message"].endswith("bytes, cut)")
    assert following["message"] == "next"


def test_one_new_file_per_call(store: Store) -> None:
    with RunLog("run1", "worker-x") as log:
        assert log.write_to(store) is None
        LOGGER.info("one")
        assert log.write_to(store) == "_logs/run1/worker-x-00000.jsonl"
        assert log.write_to(store) is None
        LOGGER.info("two")
        assert log.write_to(store) == "_logs/run1/worker-x-00001.jsonl"
    assert b"one" in store.read_bytes("_logs/run1/worker-x-00000.jsonl")
    assert b"two" in store.read_bytes("_logs/run1/worker-x-00001.jsonl")


def test_nothing_is_lost_when_the_store_fails(store: Store, tmp_path: Path) -> None:
    (tmp_path / "_logs").write_bytes(b"a file where the folder must be")
    failing = open_store(str(tmp_path))
    with RunLog("run1", "driver") as log:
        LOGGER.info("one")
        with pytest.raises(StoreDenied):
            log.write_to(failing)
        LOGGER.info("two")
        assert [line["message"] for line in written(log, store)] == ["one", "two"]


def test_only_our_loggers_and_only_within_the_block(store: Store) -> None:
    with RunLog("run1", "driver") as log:
        logging.getLogger("jobs.driver").info("ours")
        logging.getLogger("botocore").warning("theirs")
    LOGGER.warning("afterwards")
    assert [line["message"] for line in written(log, store)] == ["ours"]


def test_process_names_differ_and_are_plain() -> None:
    names = {process_name("worker") for _ in range(20)}
    assert len(names) == 20
    assert all(name.startswith("worker-") and "/" not in name for name in names)
