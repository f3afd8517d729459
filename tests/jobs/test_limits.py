"""Contract of limits and of workers that come and go, on workers in this process.

* A deadline is a duration, a clock time or a date with a time; anything else, and what is over, is
  refused with a sentence.
* A used-up budget and a reached deadline stop a run as Ctrl-C does: exit code 130 (0 where that is
  asked for), the reason told, the log closed, no video charged; the same command resumes.
* A worker that no video is left for is released while the others work; fixed numbers stay.
* Minimum and maximum go with ``auto`` only, and fit each other.
* The URL to notify and limits of an earlier start are not taken over from a stored configuration.
"""

from __future__ import annotations

import doctest
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from jobs import backlog, driver, limits, notify, speeds, workforce
from jobs.commit_log import read_state
from jobs.config import PoolConfig, RunConfig
from jobs.driver import RunSummary
from jobs.flags import CommandLine
from jobs.limits import Limits, parse_deadline
from jobs.progress import SilentReporter
from jobs.threads import ThreadPool
from jobs.verbs.running import stored_config
from tests.datasets import assert_whole, read_table
from tests.e2e.corpora import write_corpus
from tests.media import write_video
from workers.errors import ConfigError
from workers.storage import open_store

NOW = datetime(2026, 11, 20, 22, tzinfo=UTC)


def test_examples() -> None:
    for module in (backlog, limits, notify, speeds, workforce):
        assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("soon", "is no time"),
        ("", "is no time"),
        ("0h", "no time to work in"),
        ("25:00", "is no time"),
        ("2026-11-20T21:59", "is over"),
    ],
)
def test_what_is_no_deadline_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_deadline(text, NOW)


def test_limits_say_which_of_them_is_reached() -> None:
    both = Limits(2.0, parse_deadline("1h", NOW))
    assert both.exceeded(7199, NOW) is None
    assert "budget of 2 worker-hours" in str(both.exceeded(7200, NOW))
    assert "2026-11-20 23:00:00 UTC" in str(both.exceeded(0, NOW.replace(hour=23)))
    assert Limits().exceeded(1e9, NOW) is None


def run(folder: Path, *, workers: int = 2, **sections: Any) -> RunSummary:
    config = RunConfig.model_validate(
        {
            "corpus": {"paths": (str(folder / "corpus"),)},
            "out": {"uri": str(folder / "out")},
            "tracker": {"name": "fake", "options": {"sleep_s": 0.1}},
            "prompts": {"file": str(folder / "prompts.jsonl")},
            **sections,
        }
    )
    return driver.run(
        config,
        reporter=SilentReporter(),
        pool_factory=lambda _, spec: ThreadPool(spec, workers),
    )


def test_budget_and_deadline_stop_a_run_that_then_resumes(tmp_path: Path) -> None:
    frames = write_corpus(tmp_path / "corpus", 4, num_frames=20)  # two seconds each
    out = tmp_path / "out"
    # Schedulers that would try again at once ask for 0.
    for given, words, code in (
        ({"budget_hours": 1e-4}, "budget", 130),
        ({"deadline": "1s", "exit_code": 0}, "deadline", 0),
    ):
        stopped = run(tmp_path, limits=given)
        assert (stopped.exit_code, stopped.interrupted) == (code, True)
        assert words in stopped.stopped_by
        assert stopped.num_unfinished > 0
        assert read_state(open_store(str(out))).closed
    # Limits are of one start, so the stored one does not hold for the next.
    assert stored_config(open_store(str(out)), CommandLine()).limits.deadline is None
    whole = run(tmp_path)
    assert (whole.exit_code, whole.stopped_by, whole.quarantined) == (0, "", ())
    assert_whole(out, frames)


def exit_reasons(out: Path) -> list[str]:
    return [row["exit_reason"] for row in read_table(out, "workers").to_pylist()]


def test_workers_that_nothing_is_left_for_are_released(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 2, num_frames=3)
    write_video(tmp_path / "corpus" / "clip-000.mp4", num_frames=30)
    summary = run(tmp_path, workers=2, pool={"idle_after_s": 0.5})
    assert summary.exit_code == 0
    reasons = exit_reasons(tmp_path / "out")
    assert sorted(reasons) == ["no video was left for it", "the run ended"]


def test_a_fixed_number_of_workers_stays(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 2, num_frames=3)
    write_video(tmp_path / "corpus" / "clip-000.mp4", num_frames=20)
    run(tmp_path, workers=2, pool={"workers": 2, "idle_after_s": 0.5})
    assert set(exit_reasons(tmp_path / "out")) == {"the run ended"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"workers": 4, "max_workers": 8}, "exactly so many"),
        ({"min_workers": 5, "max_workers": 4}, "more than max_workers"),
        ({"max_workers": 0}, "greater than or equal to 1"),
        ({"gpus_per_worker": "some"}, "auto"),
    ],
)
def test_numbers_of_workers_fit_each_other(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        PoolConfig.model_validate(given)
