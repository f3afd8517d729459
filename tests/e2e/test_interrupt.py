"""A run that is told to stop.

* Ctrl-C, which reaches every process of the terminal's group, and SIGTERM to the driver alone, as
  schedulers send it, both end the run within reasonable time with exit code 130.
* Nothing but sentences is printed; the log ends with `close`; what was committed is visible; no
  process of the run is left.
* A second Ctrl-C ends it at once.
* After each of them the same command ends with exit code 0 and a whole dataset.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from jobs.commit_log import read_state
from jobs.records import Outcome
from tests.datasets import assert_whole, read_table
from tests.e2e.corpora import finish, maskmill, write_corpus
from workers.storage import open_store

NUM_VIDEOS = 6
REASONABLE_S = 60.0
"""What the end of a run may take: attempts have ten seconds, Ray a few, and machines are busy."""


class Run:
    """One corpus, one output, and the command that joins them."""

    def __init__(self, place: Path) -> None:
        self.frames = write_corpus(place / "corpus", NUM_VIDEOS, num_frames=6)
        self.out = place / "out"
        prompts = place / "prompts.jsonl"
        self._words = ["run", place / "corpus", "--prompts", prompts, "--out", self.out]
        self._words += ["--workers", "2", "--tracker", "fake", "--option", "sleep_s=0.3"]

    def start(self) -> subprocess.Popen[str]:
        return maskmill(*self._words)

    def is_half_done(self) -> bool:
        """Whether two videos are settled for sure: a third has all its parts in staging."""
        return len(list(self.out.glob("_staging/1/*/frames-0.parquet"))) >= 3

    def assert_resumes(self) -> None:
        code, told = finish(self.start())
        assert code == 0, told
        assert_whole(self.out, self.frames)
        assert read_state(open_store(str(self.out))).closed


@pytest.mark.parametrize("how", ["ctrl-c", "sigterm"])
def test_an_interrupted_run(tmp_path: Path, how: str) -> None:
    # Given a run that has finished some videos, not all in the log yet, and is at work on others
    run = Run(tmp_path)
    process = run.start()
    wait_until(run.is_half_done, process)
    family = descendants(process)
    # When it is told to stop
    if how == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM)
    code, told = finish(process, REASONABLE_S)
    # Then it says so, and leaves a whole part of the dataset and no process
    assert code == 130, told
    assert "Traceback" not in told
    assert "KeyboardInterrupt" not in told
    state = read_state(open_store(str(run.out)))
    assert state.closed
    assert state.outcome is Outcome.INTERRUPTED
    assert not state.quarantined
    names = read_table(run.out, "videos")["name"].to_pylist()
    assert 2 <= len(names) == state.num_committed < NUM_VIDEOS
    assert f"{len(names)} of {NUM_VIDEOS} videos" in told
    assert_whole(run.out, {name: run.frames[name] for name in names})
    assert_gone(family)
    run.assert_resumes()


def test_ctrl_c_before_the_workers_are_ready(tmp_path: Path) -> None:
    run = Run(tmp_path)
    process = run.start()
    # The fence is taken before Ray is started.
    wait_until(lambda: read_state(open_store(str(run.out))).epoch == 1, process)
    os.killpg(process.pid, signal.SIGINT)
    family = descendants(process)
    code, told = finish(process, REASONABLE_S)
    assert code == 130, told
    assert "Traceback" not in told
    assert read_state(open_store(str(run.out))).closed
    assert_gone(family)


def test_a_second_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    run = Run(tmp_path)
    process = run.start()
    wait_until(run.is_half_done, process)
    family = descendants(process)
    os.killpg(process.pid, signal.SIGINT)
    # Once the first is heard: two signals in one breath of a busy process would count as one.
    assert process.stdout is not None
    assert any("stopping: what is committed stays" in line for line in process.stdout)
    os.killpg(process.pid, signal.SIGINT)
    code, told = finish(process, REASONABLE_S)
    assert code == 130, told
    assert "Traceback" not in told
    assert "stopped at once: what is committed stays" in told
    assert_gone(family)
    run.assert_resumes()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"the run ended too soon: {finish(process)}")
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found: list[psutil.Process] = psutil.Process(process.pid).children(recursive=True)
    return found


def assert_gone(family: list[psutil.Process]) -> None:
    # Ray's processes end by themselves a moment after they lose their head.
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive, [process.cmdline()[:3] for process in alive]
