"""Contract: a scheduled run looks only at what can be new, and says what it looked at.

* `--since` and `--until` take dates, times and ages, UTC where no zone is given; what is neither,
  and a window that is empty or lies in the future, is one sentence.
* A path with date fields means the folders of the window's dates, each once, no others; a folder
  that is not there yet is empty, a place where nothing is at all is an error.
* Any other path is listed whole, and what changed outside the window is left out; a folder of
  frames counts whole when one of its images is inside.
* Names stay paths below the same root, whatever the window.
* A corpus without news is empty, not wrong.
* What an age meant when a run began stays what it means: settled, it is times that choose the same
  videos days later, for `retry` and for the command that reproduces one video.
* Tomorrow's window is no other configuration.
"""

from __future__ import annotations

import os
import shlex
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.config import CorpusConfig, OutConfig, RunConfig, fingerprint
from jobs.corpus import Corpus, list_corpus
from jobs.recency import Window, dated_paths, has_dates, settled
from jobs.startup import reproduce_command
from workers.errors import ConfigError

NOW = datetime(2026, 3, 2, 1, 30, tzinfo=UTC)


def window(since: str, until: str | None = None) -> Window:
    found = Window.parse(since, until, NOW)
    assert found is not None
    return found


def touch(path: Path, when: datetime | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"content")
    if when is not None:
        os.utime(path, (when.timestamp(), when.timestamp()))


def names(corpus: Corpus) -> list[str]:
    return sorted(corpus.table["name"].to_pylist())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-02-28", datetime(2026, 2, 28, tzinfo=UTC)),
        ("2026-02-28T22:00", datetime(2026, 2, 28, 22, tzinfo=UTC)),
        ("2026-02-28T22:00+02:00", datetime(2026, 2, 28, 20, tzinfo=UTC)),
        ("36h", datetime(2026, 2, 28, 13, 30, tzinfo=UTC)),
        ("2d", datetime(2026, 2, 28, 1, 30, tzinfo=UTC)),
        ("90m", datetime(2026, 3, 2, 0, 0, tzinfo=UTC)),
    ],
)
def test_moments(text: str, expected: datetime) -> None:
    assert window(text).since == expected


@pytest.mark.parametrize(
    ("since", "until", "words"),
    [
        ("yesterday", None, "'yesterday' is no time"),
        ("2026-02-30", None, "is no time"),
        ("99999999999999d", None, "is no time"),
        (None, "2026-03-01", "--until needs --since"),
        ("2026-03-01", "2026-02-01", "is not before"),
        ("2027-01-01", None, "future"),
    ],
)
def test_what_is_no_window(since: str | None, until: str | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Window.parse(since, until, NOW)


@pytest.mark.parametrize(
    ("path", "since", "until", "expected"),
    [
        ("v/%Y-%m-%d", "2d", None, ["v/2026-02-28", "v/2026-03-01", "v/2026-03-02"]),
        ("v/%Y/%m/x", "2026-01-31", None, ["v/2026/01/x", "v/2026/02/x", "v/2026/03/x"]),
        ("v/%Y", "2025-12-31", None, ["v/2025", "v/2026"]),
        ("%Y%m%d/%H", "90m", None, ["20260302/00", "20260302/01"]),
        # the end is not inside: midnight belongs to the next day
        ("d=%Y-%m-%d", "2026-02-01", "2026-02-03", ["d=2026-02-01", "d=2026-02-02"]),
        ("100%%/%Y", "1d", None, ["100%/2026"]),
    ],
)
def test_dated_paths(path: str, since: str, until: str | None, expected: list[str]) -> None:
    assert has_dates(path)
    assert list(dated_paths(path, window(since, until), NOW)) == expected


@pytest.mark.parametrize(
    ("path", "since", "words"),
    [
        ("v/%Y/%j", "2d", "date field %j"),
        ("v/%m/%d", "2d", "without %Y"),
        ("v/%Y%m%d/%H", "900w", "more than 10,000 dates"),
    ],
)
def test_paths_that_mean_no_dates(path: str, since: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        list(dated_paths(path, window(since), NOW))


def test_only_the_dated_folders_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for day in (16, 17, 18, 19):
        touch(tmp_path / "in" / f"day=2026-11-{day}" / "a.mp4")
    touch(tmp_path / "in" / "other" / "z.mp4")
    config = CorpusConfig(
        paths=(f"{tmp_path}/in/day=%Y-%m-%d/",), since="2026-11-17", until="2026-11-19"
    )
    corpus = list_corpus(config)
    # when a file arrived in a dated folder does not matter: all were written now
    assert names(corpus) == ["day=2026-11-17/a.mp4", "day=2026-11-18/a.mp4"]
    assert corpus.root == f"{tmp_path}/in/"
    monkeypatch.chdir(tmp_path / "in")
    relative = config.model_copy(update={"paths": ("day=%Y-%m-%d/",)})
    assert list_corpus(relative).table.equals(list_corpus(config).table)
    globbed = config.model_copy(update={"paths": (f"{tmp_path}/in/day=%Y-%m-%d/*.mp4",)})
    assert names(list_corpus(globbed)) == names(corpus)


def test_a_day_without_videos_is_no_error(tmp_path: Path) -> None:
    touch(tmp_path / "in" / "2026-11-16" / "a.mp4")
    config = CorpusConfig(paths=(f"{tmp_path}/in/%Y-%m-%d",), since="2026-11-18")
    assert len(list_corpus(config)) == 0
    nowhere = config.model_copy(update={"paths": (f"{tmp_path}/inn/%Y-%m-%d",)})
    with pytest.raises(ConfigError, match="inn/ holds nothing"):
        list_corpus(nowhere)
    literal = config.model_copy(update={"since": None})
    with pytest.raises(ConfigError, match="or say --since"):
        list_corpus(literal)


def test_what_changed_is_found_by_its_time(tmp_path: Path) -> None:
    old = datetime(2026, 1, 1, tzinfo=UTC)
    touch(tmp_path / "in" / "old.mp4", old)
    touch(tmp_path / "in" / "new.mp4", datetime(2026, 2, 1, tzinfo=UTC))
    touch(tmp_path / "in" / "still" / "0.jpg", old)
    touch(tmp_path / "in" / "grown" / "0.jpg", old)
    touch(tmp_path / "in" / "grown" / "1.jpg", datetime(2026, 2, 1, tzinfo=UTC))
    config = CorpusConfig(paths=(str(tmp_path / "in"),), since="2026-01-15")
    corpus = list_corpus(config)
    assert names(corpus) == ["grown", "new.mp4"]
    # both images make its identity, the old one, too
    whole = list_corpus(CorpusConfig(paths=(str(tmp_path / "in"),)))
    etags = dict(zip(*(whole.table[c].to_pylist() for c in ("name", "etag")), strict=True))
    assert corpus.table["etag"].to_pylist() == [etags[n] for n in corpus.table["name"].to_pylist()]
    assert len(list_corpus(config.model_copy(update={"since": "2026-02-02"}))) == 0


@pytest.mark.parametrize(
    ("since", "until", "expected"),
    [
        (None, None, (None, None)),
        ("2026-02-28", None, ("2026-02-28", None)),
        ("2026-02-28T22:00+02:00", "2026-03-01", ("2026-02-28T22:00+02:00", "2026-03-01")),
        ("36h", None, ("2026-02-28T13:30Z", None)),
        (" 2d ", "90m", ("2026-02-28T01:30Z", "2026-03-02T00:00Z")),
        ("1500w", None, ("1997-06-02T01:30Z", None)),
    ],
)
def test_ages_become_times(
    since: str | None, until: str | None, expected: tuple[str | None, str | None]
) -> None:
    assert settled(since, until, NOW) == expected
    assert settled(since, until, NOW.astimezone(timezone(timedelta(hours=5)))) == expected
    # ages are half open: part of a minute still belongs to it
    later = settled("36h", "90m", NOW + timedelta(seconds=20))
    assert later == ("2026-02-28T13:30Z", "2026-03-02T00:01Z")


def test_what_is_no_window_cannot_be_settled() -> None:
    for since, until in (("yesterday", None), (None, "1d"), ("1d", "2d"), ("9999999999w", None)):
        with pytest.raises(ConfigError):
            settled(since, until, NOW)


AGES = st.builds("{}{}".format, st.integers(0, 60), st.sampled_from("mhd"))
MOMENTS = st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1)) | st.builds(
    lambda day, microseconds: day + timedelta(microseconds=microseconds),
    st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1)).map(
        lambda moment: moment.replace(hour=0, minute=0, second=0, microsecond=0)
    ),
    st.integers(-2, 2),
)


@given(since=AGES, until=AGES | st.none(), moment=MOMENTS)
def test_settled_times_choose_what_the_ages_did(
    since: str, until: str | None, moment: datetime
) -> None:
    now = moment.replace(tzinfo=UTC)
    try:
        asked = Window.parse(since, until, now)
    except ConfigError:
        return
    times = settled(since, until, now)
    assert times[0] is not None
    assert (times[1] is None) == (until is None)
    found = Window.parse(*times, now)
    assert asked is not None
    assert found is not None
    for path in ("%Y-%m-%d", "%Y%m%d/%H", "%Y/%m"):
        assert list(dated_paths(path, found, now)) == list(dated_paths(path, asked, now))
    # nothing falls out, and no more than a minute falls in
    assert timedelta() <= asked.since - found.since < timedelta(minutes=1)
    if until is not None:
        assert timedelta() <= found.until - asked.until < timedelta(minutes=1)
    # and whenever it is read again, it is the same
    later = now + timedelta(days=400)
    assert Window.parse(*times, later) == found
    assert settled(*times, later) == times


def test_days_later_a_settled_window_still_holds_its_videos(tmp_path: Path) -> None:
    # Given a nightly run of ten days ago, for what was new then
    now = datetime.now(UTC)
    night = now - timedelta(days=10)
    video = tmp_path / "in" / "a.mp4"
    touch(video, night - timedelta(hours=3))
    touch(tmp_path / "in" / "older.mp4", night - timedelta(days=2))
    dated = tmp_path / "dated" / f"{night:%Y-%m-%d}" / "a.mp4"
    touch(dated)
    typed = CorpusConfig(paths=(str(tmp_path / "in"),), since="1d")
    since, until = settled(typed.since, typed.until, night)
    stored = typed.model_copy(update={"since": since, "until": until})
    # When its configuration is read again, by retry
    assert len(list_corpus(typed)) == 0
    assert names(list_corpus(stored)) == ["a.mp4"]
    by_date = stored.model_copy(update={"paths": (f"{tmp_path}/dated/%Y-%m-%d/",)})
    assert names(list_corpus(by_date)) == [f"{night:%Y-%m-%d}/a.mp4"]
    # or by the command that reproduces one video
    config = RunConfig(corpus=stored, out=OutConfig(uri=str(tmp_path / "out")))
    words = shlex.split(reproduce_command(config, str(video)))
    assert words[words.index("--since") + 1] == since
    assert names(list_corpus(stored.model_copy(update={"videos": (str(video),)}))) == ["a.mp4"]


def test_the_window_is_no_part_of_the_configuration_of_an_output(tmp_path: Path) -> None:
    prints = set()
    for since, until in ((None, None), settled("3d", None, NOW), settled("3d", "1d", NOW)):
        config = RunConfig(
            corpus=CorpusConfig(paths=(str(tmp_path),), since=since, until=until),
            out=OutConfig(uri=str(tmp_path / "out")),
        )
        prints.add(fingerprint(config.mask_settings(tracker_sha256="", detector_sha256="")))
    assert len(prints) == 1
