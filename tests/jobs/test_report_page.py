"""What `maskmill report` writes, parsed again.

* One HTML document that refers to nothing outside it, has every section, links that lead
  somewhere, ids that are unique, and pictures that decode; colours of its plots are variables that
  both light and dark define.
* It says what the tables say: totals, the command, versions, stages, workers, failures with the
  command that reproduces each, the ranked list, and the evaluation if there is one.
* Text from outside (names, messages) is text in it, never markup or a formula; signatures of URLs
  are left out.
* A source that is gone costs its pictures, not the page. A copy without its log, and a run that
  has not ended, are told as that.
* What is left is told of the newest plan, however few videos that was about; speeds are those of
  all executions, also of those that are not shown.
* Its size does not grow with the number of videos: ten thousand stay below 10 MB.
* A destination that exists or is no page: one sentence, exit code 2, nothing is left behind.
"""

from __future__ import annotations

import base64
import io
import re
import shutil
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs import cli
from jobs.commit_log import CommitLog
from jobs.dataset import open_dataset
from jobs.publication import Publisher
from jobs.records import Outcome
from jobs.report_page.facts import MAX_EXECUTIONS, MAX_FAILURES_PER_KIND, Histogram, gather, top
from jobs.report_page.page import MAX_REVIEW_ROWS, make_page
from jobs.report_page.plots import VARIABLES, Plots
from tests.jobs.outputs import run_plan, stage_video, visible_table, worker_row
from tests.jobs.pictured import track, write_corpus
from workers.messages import StoreOptions
from workers.sinks.schema import arrow_schema
from workers.storage import open_store

SECTIONS = ("ran", "time", "failures", "out", "review", "scores")
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """A page, taken apart; fails on elements that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: Counter[str] = Counter()
        self.references: list[str] = []
        self.images: list[str] = []
        self.texts: dict[str, list[str]] = {"": []}
        self.tags: Counter[str] = Counter()
        self._open: list[str] = []
        self._section = ""
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags[tag] += 1
        if values.get("id"):
            self.ids[str(values["id"])] += 1
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            if values.get(name) is not None:
                self.references.append(str(values[name]))
        if tag == "img":
            self.images.append(str(values["src"]))
            assert values.get("alt")
        if tag == "section":
            self._section = str(values["id"])
            self.texts[self._section] = []
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        if self._open[-1:] not in (["style"], ["script"]):
            self.texts[self._section].append(data)

    def text(self, section: str) -> str:
        return " ".join(" ".join(self.texts[section]).split())


def assert_self_contained(text: str) -> Page:
    """Fail unless a page needs nothing but itself, and return it."""
    page = Page(text)
    for reference in page.references:
        assert reference.startswith(("#", "data:")), reference
        if reference.startswith("#"):
            assert page.ids[reference[1:]] == 1, reference
    assert [name for name, count in page.ids.items() if count > 1] == []
    assert not re.search(r"@import|url\((?!#)", text)
    assert not page.tags["script"]
    assert [name for name in SECTIONS if name not in page.texts] == []
    for stand_in, variable in VARIABLES.items():
        assert stand_in not in text
        assert text.count(f"{variable}:") == 2, "light and dark"
    assert not re.search(r"(fill|stroke): #", text), "a plot has no colours of its own"
    return page


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a corpus and a run over it."""
    folder = tmp_path_factory.mktemp("report")
    write_corpus(folder)
    track(folder, folder / "out")
    return folder


@pytest.fixture(scope="module")
def text(place: Path) -> str:
    """Return the page about the run."""
    assert report(place / "out", place / "pages" / "page.html") == 0
    return (place / "pages" / "page.html").read_text()


def report(*words: Any) -> int:
    return cli.main(["report", *map(str, words)])


def test_page_is_one_document(text: str, place: Path) -> None:
    page = assert_self_contained(text)
    assert page.tags["svg"] >= 8
    dataset = open_dataset(str(place / "out"))
    pictured = [image for image in page.images if image.startswith("data:image/jpeg;base64,")]
    assert pictured == page.images
    assert len(pictured) >= 8, "close-ups and contact sheets"
    for image in pictured:
        with Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert pixels.shape[1] >= 320
        assert pixels.std() > 10, "there is something on it"
    assert sum(1 for _ in dataset.videos()) == 4


def test_page_says_what_the_tables_say(text: str, place: Path) -> None:
    page = assert_self_contained(text)
    head = page.text("")
    assert "4 of 5 videos committed" in head
    assert "1 in quarantine" in head
    assert "26 frames tracked" in head
    assert "8 objects" in head
    ran = page.text("ran")
    assert f"maskmill run --manifest {place / 'manifest.csv'}" in ran
    assert "--tracker fake" in ran
    assert re.search(r"numpy \d", ran)
    time = page.text("time")
    for stage in ("decode", "track", "rle", "write", "upload"):
        assert stage in time
    assert "Frames per second over running time" in text
    assert "1-worker-1" in text
    failures = page.text("failures")
    assert "input: 1 in quarantine" in failures
    assert "broken.mp4 is text, not a video" in failures
    assert f"--video {place / 'videos' / 'broken.mp4'} --out ./reproduce" in failures
    out = page.text("out")
    assert "кот 4" in out
    assert "dog 4" in out
    assert "384x256 4" in out
    review = page.text("review")
    assert "8 objects are ranked" in review
    assert "videos/street.mp4" in review
    assert "maskmill eval" in page.text("scores"), "how to measure, since nobody has"


def test_page_shows_an_evaluation(place: Path) -> None:
    truth = place / "truth" / "videos" / "walk"
    truth.mkdir(parents=True)
    for index in range(5):
        pixels = np.zeros((256, 384), np.uint8)
        pixels[200 + 8 * index : 230 + 8 * index, 8:48] = 1
        Image.fromarray(pixels).save(truth / f"{index:05d}.png")
    copy = place / "evaluated"
    shutil.copytree(place / "out", copy)
    assert cli.main(["eval", str(copy), "--gt", str(place / "truth")]) == 0
    assert report(copy, place / "pages" / "evaluated.html", "--pictures", 0) == 0
    page = assert_self_contained((place / "pages" / "evaluated.html").read_text())
    assert page.images == []
    scores = page.text("scores")
    assert "1.000 J&F" in scores
    assert "videos/walk 1 1.000" in scores


def test_source_that_is_gone_and_copy_without_log(place: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for folder in ("masks", "frames", "objects", "categories", "videos", "stages", "workers"):
        shutil.copytree(place / "out" / folder, copy / folder)
    street = place / "videos" / "street.mp4"
    street.rename(tmp_path / "street.mp4")
    try:
        assert report(copy, tmp_path / "page.html") == 0
    finally:
        (tmp_path / "street.mp4").rename(street)
    page = assert_self_contained((tmp_path / "page.html").read_text())
    assert "a copy without its log" in page.text("")
    assert "Nothing is known about how these tables were made" in page.text("ran")
    assert "No picture: the video videos/street.mp4 is gone" in page.text("review")
    assert page.images, "of the others"


NUM_CROWDED = 10_000
HOSTILE = "<script>alert(1)</script>&\"'.mp4"
SIGNED = "X-Amz-Signature=0badc0de"


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a page about ten thousand videos and two thousand failures, with hostile names."""
    folder = tmp_path_factory.mktemp("crowded")
    store = open_store(str(folder / "one"))
    log = CommitLog.acquire(store, "one")
    log.plan(run_plan())
    log.commit([stage_video(store, log.epoch, 1)], [worker_row("1-worker-1", log.epoch)])
    Publisher(log).publish()
    log.close(Outcome.FINISHED, exit_code=0)
    keys = range(1, NUM_CROWDED + 1)
    for table in ("videos", "objects", "frames", "masks", "stages"):
        whole = visible_table(store, table)
        count = whole.num_rows
        copies = whole.take(np.tile(np.arange(count), NUM_CROWDED))
        copies = copies.set_column(0, copies.schema.field(0), [np.repeat(np.array(keys), count)])
        if table == "videos":
            names = [HOSTILE if key == 7 else f"folder/{'long-' * 12}{key}.mp4" for key in keys]
            at = copies.schema.get_field_index("name")
            copies = copies.set_column(at, copies.schema.field(at), [names])
        _publish(folder / "many", table, "000000000001-0000", copies)
    workers = [worker_row(f"1-worker-{i}", 1, 3) | {"idle_s": float(i)} for i in range(300)]
    for row in workers:
        row["started_at"] = datetime.fromtimestamp(row["started_at"], UTC)
    failed = [
        {
            "video_key": 30_000 + number,
            "uri": f"/corpus/{number}.mp4",
            "name": f"{number}.mp4",
            "error_class": "input" if number % 2 else "stuck",
            "message": f"{HOSTILE} is broken: " + "a long story, " * 400,
            "traceback": "Traceback",
            "attempts": 1,
            "reproduce": f"maskmill run 'https://web/{number}.mp4?{SIGNED}' --out somewhere",
        }
        for number in range(2_000)
    ]
    for table, given in (("workers", workers), ("quarantine", failed)):
        made = pa.Table.from_pylist(given, arrow_schema(table))
        _publish(folder / "many", table, "current", made)
    dataset = open_dataset(str(folder / "many"))
    return make_page(dataset, open_store(dataset.uri), StoreOptions())


def _publish(out: Path, table: str, name: str, rows: pa.Table) -> None:
    (out / table).mkdir(parents=True)
    pq.write_table(rows, out / table / f"{name}.parquet")


def test_size_does_not_grow_with_the_run(crowded: str) -> None:
    page = assert_self_contained(crowded)
    assert len(crowded.encode()) < 1_500_000
    assert "10,000 videos" in page.text("")
    assert "60,000 masks" in page.text("")
    failures = page.text("failures")
    assert "input: 1,000 in quarantine" in failures
    assert "stuck: 1,000 in quarantine" in failures
    assert f"and {1_000 - MAX_FAILURES_PER_KIND:,} more" in failures
    assert "300 workers were busy" in crowded
    assert "20,000 objects are ranked" in page.text("review")
    assert crowded.count('class="meter"') == MAX_REVIEW_ROWS
    assert "No picture" in page.text("review"), "their sources are not there"


def test_run_that_has_not_ended(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    log = CommitLog.acquire(store, "one")
    log.plan(run_plan())
    empty = assert_self_contained(make_page(open_dataset(store.uri), store, StoreOptions()))
    assert "0 of 5 videos committed" in empty.text("")
    assert "No video is committed yet" in empty.text("time")
    log.commit([stage_video(store, log.epoch, 1)], [worker_row("1-worker-1", log.epoch)])
    Publisher(log).publish()
    text = make_page(open_dataset(store.uri), store, StoreOptions())
    page = assert_self_contained(text)
    assert "not ended" in page.text("")
    assert "1 of 5 videos committed" in page.text("")
    assert "4 videos of the last plan are left" in page.text("failures")
    assert "Frames per second over running time" in text


def test_newest_plan_is_about_a_part(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    log = CommitLog.acquire(store, "one")
    log.plan(run_plan())
    log.commit([stage_video(store, log.epoch, key) for key in (1, 2, 3)])
    Publisher(log).publish()
    log.close(Outcome.FINISHED, exit_code=0)
    for _ in range(MAX_EXECUTIONS):
        log = CommitLog.acquire(store, "one")
        log.plan(replace(run_plan(), totals={"num_videos": 2, "num_left": 1, "num_invalid": 1}))
    dataset = open_dataset(store.uri)
    assert dataset.state is not None
    # Given executions that took a second each, more than are shown
    for run in dataset.state.runs.values():
        run["wall_s"] = 1.0
    facts = gather(dataset, store)
    assert (facts.videos.num_videos, facts.num_planned, facts.num_left) == (3, None, 2)
    assert len(facts.executions) < facts.num_executions == facts.wall_s
    page = assert_self_contained(make_page(dataset, store, StoreOptions()))
    assert "3 videos committed" in page.text("")
    assert "2 videos of the last plan are left" in page.text("failures")


def test_text_is_never_markup(crowded: str) -> None:
    assert "<script" not in crowded
    assert HOSTILE in Page(crowded).text("failures")
    plot = Plots().ranked([("$\\frac$ <b>", 3), ("dog", 2)], "Objects per category", "objects")
    assert "$\\frac$ &lt;b&gt;" in plot


def test_signed_urls_are_not_passed_on(crowded: str) -> None:
    assert SIGNED not in crowded
    assert "?X-Amz-Signature=***" in Page(crowded).text("failures")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("{out}", "{here}/page.pdf"), "a report is an HTML page"),
        (("{out}", "{here}/taken.html"), "taken.html exists"),
        (("{out}", "s3://bucket/page.html"), "is not on this machine"),
        (("{here}",), "holds no dataset"),
    ],
)
def test_bad_input(
    words: tuple[str, ...],
    sentence: str,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "taken.html").write_text("precious")
    assert report(*(word.format(out=place / "out", here=tmp_path) for word in words)) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("error:") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["taken.html"]
    assert (tmp_path / "taken.html").read_text() == "precious"


def test_histogram() -> None:
    histogram = Histogram([0, 1, 2, 4])
    histogram.add(np.array([-5, 0, 0.5, 1, 3.9, 4, 99, np.nan]))
    assert histogram.counts.tolist() == [3, 1, 3]
    assert histogram.total == 7


def test_top() -> None:
    assert top({"a": 1}) == [("a", 1)]
    assert top({"a": 1, "b": 2, "c": 3}, limit=2) == [("c", 3), ("2 others", 3)]
