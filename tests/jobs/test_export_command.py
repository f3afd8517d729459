"""Contract of `maskmill export` beside the formats: what is selected, and what goes wrong.

* `--video`, `--min-score` and `--fps` take what they say; `--where` takes the masks for which a
  predicate over masks, objects, videos and categories holds, or, over videos alone, whole videos;
  numbers and names of videos do not depend on what is selected.
* `Dataset.scan` yields the rows of every video, or of the wanted ones, with and without a log.
* Videos that would share a name get different ones.
* A destination that exists is refused, or replaced with --overwrite; a folder that holds anything
  else is never replaced; nothing is under a final name before it is complete.
* Two exports never write to one place at the same time.
* An interrupted export into a folder goes on where it ended, on a disk and in a bucket; one with
  other settings begins anew; a file is written again. A full disk is exit code 3, and the same
  command goes on when there is room.
* Objects without a category, ids that a format cannot hold, too many objects, unknown classes,
  and options of other formats are told, and so are an unfinished, an empty and a missing run.
"""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs.cli import main
from jobs.commit_log import CommitLog
from jobs.dataset import open_dataset
from jobs.export.exporter import ExportOptions, Format, export_dataset
from jobs.export.naming import VideoNames
from jobs.export.selection import Selection, select
from jobs.export.tally import Tally
from jobs.publication import Publisher
from jobs.records import Outcome
from tests import servers
from tests.exported import LABELS, Exported, make_run
from tests.jobs.outputs import commit_videos, run_plan, stage_video
from workers.errors import ConfigError, StoreError, StoreFull
from workers.storage import open_store

Key = tuple[str, int, int]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return make_run(tmp_path_factory.mktemp("run"))


def selected(run: Exported, **what: Any) -> tuple[set[Key], dict[str, list[int]]]:
    """Return the masks and the frames that a selection takes."""
    masks, frames = set(), {}
    for video in select(open_dataset(str(run.out)), Selection(**what)):
        name = video.video.name
        frames[name] = video.frame_idx.tolist()
        rows = video.masks.select(["frame_idx", "object_id"]).to_pylist()
        masks |= {(name, row["frame_idx"], row["object_id"]) for row in rows}
    return masks, frames


def command(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str]:
    """Run a command line in this process; return its exit code and all it printed."""
    code = main([str(word) for word in words])
    told = capsys.readouterr()
    return code, told.out + told.err


def test_everything_and_single_videos(run: Exported) -> None:
    assert selected(run) == (set(run.masks), run.frames)
    masks, frames = selected(run, videos=("dogs",))
    assert frames == {"park/dogs.mkv": run.frames["park/dogs.mkv"]}
    assert masks == {key for key in run.masks if key[0] == "park/dogs.mkv"}
    key = run.rows["street.mp4", 0, 1]["video_key"]
    assert list(selected(run, videos=(str(key), "street"))[1]) == ["street.mp4"]
    with pytest.raises(ConfigError, match="no video named 'cats'"):
        selected(run, videos=("cats",))


def test_scores_and_rates(run: Exported) -> None:
    masks, frames = selected(run, min_score=0.9)
    assert frames == run.frames
    scores = {key: np.float32(row["score"]) for key, row in run.rows.items()}
    assert masks == {key for key, score in scores.items() if score >= np.float32(0.9)}
    assert set(run.masks) > masks > {key for key, score in scores.items() if score == 1}
    # 24 frames a second; the times of the second video are whole milliseconds.
    masks, frames = selected(run, fps=8)
    assert frames == {name: found[::3] for name, found in run.frames.items()}
    assert masks == {key for key in run.masks if key[1] % 3 == 0}
    assert selected(run, fps=1000)[1] == run.frames
    for wrong in ({"fps": 0}, {"fps": float("nan")}, {"min_score": 2}):
        with pytest.raises(ConfigError, match=r"--(fps|min-score)"):
            Selection(**wrong)


@pytest.mark.parametrize(
    ("where", "holds"),
    [
        (("category = 'car'",), lambda key, row: LABELS[key[2]] == "car"),
        (("area > 300 AND score < 1",), lambda key, row: row["area"] > 300 and row["score"] < 1),
        (("area > 300", "score < 1"), lambda key, row: row["area"] > 300 and row["score"] < 1),
        (
            ("objects.frames_visible < 11 AND videos.width > 64 -- both",),
            lambda key, row: key[2] in (7, 300),
        ),
        (
            ("masks.object_id IN (7, 9) OR name LIKE 'park/%'",),
            lambda key, row: key[2] in (5, 7, 9),
        ),
    ],
)
def test_predicates_over_masks_take_masks(
    run: Exported, where: tuple[str, ...], holds: Any
) -> None:
    masks, frames = selected(run, where=where)
    assert frames == run.frames
    assert masks == {key for key, row in run.rows.items() if holds(key, row)}
    assert masks


def test_predicates_over_videos_take_videos(run: Exported) -> None:
    masks, frames = selected(run, where=("width > 64 AND codec = 'h264'",))
    assert list(frames) == ["street.mp4"]
    assert masks == {key for key in run.masks if key[0] == "street.mp4"}
    masks, frames = selected(run, where=("width > 64", "score = 1"))
    assert list(frames) == ["street.mp4"]
    assert all(run.rows[key]["score"] == 1 for key in masks)
    assert selected(run, where=("width > 4000",)) == (set(), {})


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        ("scor > 0.5", "there is no column 'scor', did you mean 'score'"),
        ("(area > 1", "no SQL expression"),
        ("area > 1; DROP TABLE masks", "no SQL expression"),
        ("name > 5", "Cannot compare"),
        ("area IN (SELECT size FROM read_text('/etc/passwd'))", "file system operations"),
        ("try_cast(name AS INT) / 0 = 'x'", "Could not convert|Conversion"),
    ],
)
def test_wrong_predicates(run: Exported, where: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as refused:
        selected(run, where=(where,))
    assert "\n" not in str(refused.value)


def test_numbers_and_names_do_not_depend_on_the_selection(run: Exported, tmp_path: Path) -> None:
    dataset = open_dataset(str(run.out))
    found = {video.sequence: video.number for video in select(dataset, Selection())}
    assert set(found) == {"street", "park__dogs"}
    assert sorted(found.values()) == [1, 2]
    for sequence, number in found.items():
        (video,) = select(dataset, Selection(videos=(sequence.replace("__", "/"),)))
        assert (video.sequence, video.number) == (sequence, number)


def make_output(folder: Path, *, live: bool = False) -> None:
    """Make an output of two segments, one of which replaces a video of the other."""
    log = CommitLog.acquire(open_store(str(folder)), "one")
    log.plan(run_plan())
    commit_videos(log, [3, 2**62, -9], num_frames=4, num_objects=3)
    Publisher(log).publish()
    commit_videos(log, [12], num_objects=0)
    commit_videos(log, [3], version=1, num_frames=5)
    Publisher(log).publish()
    if not live:
        log.close(Outcome.FINISHED)


def test_scan(tmp_path: Path) -> None:
    make_output(tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "copy", ignore=shutil.ignore_patterns("_*"))
    for place in ("out", "copy"):
        dataset = open_dataset(str(tmp_path / place))
        rows = {row.video.video_key: row for row in dataset.scan()}
        assert set(rows) == {3, 2**62, -9, 12}
        for key, row in rows.items():
            for table in ("frames", "masks", "objects"):
                assert getattr(row, table) == dataset.table(table, video_key=key), (key, table)
        assert rows[3].frames["pts_us"].to_pylist()[1] == 1001
        wanted = np.array([-9, 12, 400], np.int64)
        some = list(dataset.scan(wanted, mask_columns=("object_id",)))
        assert {row.video.video_key for row in some} == {-9, 12}
        for row in some:
            assert row.masks.column_names == ["video_key", "object_id"]
            expected = pa.array(rows[row.video.video_key].masks["object_id"].combine_chunks())
            assert row.masks["object_id"].combine_chunks() == expected


def test_videos_of_one_name(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "out"))
    log = CommitLog.acquire(store, "one")
    log.plan(run_plan())
    commits = []
    for key, name in {1: "clip.mp4", -2: "clip.mov", 3: "a/b.mp4", 4: "a__b", 5: "v1.2"}.items():
        commit = stage_video(store, 1, key)
        commits.append(replace(commit, video={**commit.video, "name": name}))
    log.commit(commits)
    Publisher(log).publish()
    dataset = open_dataset(str(tmp_path / "out"))
    names = VideoNames(dataset)
    assert {video.video_key: names.sequence(video) for video in dataset.videos()} == {
        1: "clip-0000000000000001",
        -2: "clip-fffffffffffffffe",
        3: "a__b-0000000000000003",
        4: "a__b-0000000000000004",
        5: "v1.2",
    }


@pytest.mark.parametrize(("format", "dest"), [("coco", "new/masks.json"), ("sav", "new/masks")])
def test_a_destination_that_exists(
    run: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str, dest: str
) -> None:
    words = ("export", run.out, tmp_path / dest, "--format", format)
    code, told = command(capsys, *words, "--video", "street")
    assert (code, told) == (0, f"1 videos, 14 frames and 43 masks in {tmp_path / dest}\n")
    code, told = command(capsys, *words)
    assert (code, "exists" in told, "--overwrite" in told) == (2, True, True)
    code, told = command(capsys, *words, "--overwrite")
    assert (code, told) == (0, f"2 videos, 23 frames and 57 masks in {tmp_path / dest}\n")
    assert [path.name for path in (tmp_path / "new").iterdir()] == [Path(dest).name]


def test_other_things_are_not_replaced(
    run: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dest = tmp_path / "mine"
    (dest / "street").mkdir(parents=True)
    (dest / "street/notes.txt").write_text("kept")
    (tmp_path / "file").write_text("kept")
    words = ("export", run.out, "--overwrite", "--format")
    for format, place, sentence in (
        ("davis", dest, "holds street/notes.txt"),
        ("coco", dest, "is a folder"),
        ("davis", tmp_path / "file", "is a file"),
    ):
        code, told = command(capsys, *words, format, place)
        assert (code, sentence in told) == (2, True), told
    # A folder that happens to be called as an unfinished export is, too.
    dest.rename(tmp_path / "other.partial")
    code, told = command(capsys, *words, "davis", tmp_path / "other")
    assert (code, "holds street/notes.txt" in told) == (2, True), told
    assert (tmp_path / "other.partial/street/notes.txt").read_text() == "kept"
    # Hidden files are things, too, and a link is followed.
    hidden = tmp_path / "repository"
    (hidden / ".git").mkdir(parents=True)
    (hidden / ".git/config").write_text("kept")
    code, told = command(capsys, "export", run.out, hidden, "--format", "mots")
    assert (code, "exists" in told) == (2, True), told
    code, told = command(capsys, *words, "mots", hidden)
    assert (code, "holds .git/config" in told) == (2, True), told
    assert (hidden / ".git/config").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    assert command(capsys, "export", run.out, tmp_path / "link", "--format", "mots")[0] == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "empty/street/seqinfo.ini").exists()


class Interrupted(BaseException):
    """What ends an export in the middle, as a signal would."""


def interrupt(run: Exported, dest: str, format: Format, options: Any = None, **more: Any) -> None:
    def stop(tally: Tally) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        export_dataset(
            open_dataset(str(run.out)),
            format,
            dest,
            Selection(**more),
            store_options=options,
            on_video=stop,
        )


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("format", [Format.DAVIS, Format.MOTS, Format.SAV])
def test_an_interrupted_folder_goes_on(run: Exported, tmp_path: Path, format: Format) -> None:
    dataset = open_dataset(str(run.out))
    export_dataset(dataset, format, str(tmp_path / "whole"))
    dest = tmp_path / "dest"
    interrupt(run, str(dest), format)
    assert not dest.exists()
    tally = export_dataset(dataset, format, str(dest))
    assert (tally.num_videos, tally.num_continued) == (2, 1)
    assert files_below(dest) == files_below(tmp_path / "whole")
    # Other settings begin anew.
    interrupt(run, str(tmp_path / "other"), format)
    tally = export_dataset(dataset, format, str(tmp_path / "other"), Selection(min_score=0.9))
    assert (tally.num_videos, tally.num_continued) == (2, 0)
    assert files_below(tmp_path / "other") != files_below(dest)


@pytest.mark.parametrize(("format", "dest"), [(Format.COCO, "masks.json"), (Format.SAV, "sav")])
def test_two_exports_to_one_place(run: Exported, tmp_path: Path, format: Format, dest: str) -> None:
    dataset = open_dataset(str(run.out))

    def meanwhile(tally: Tally) -> None:
        with pytest.raises(StoreError, match="another export is writing"):
            export_dataset(dataset, format, str(tmp_path / dest))

    export_dataset(dataset, format, str(tmp_path / dest), on_video=meanwhile)
    assert [path.name for path in tmp_path.iterdir()] == [dest]


def test_ctrl_c(
    run: Exported,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("export", run.out, tmp_path / "sav", "--format", "sav")
    with monkeypatch.context() as patch:
        # The signal arrives where the verb looks at its clock after the first video.
        clock = SimpleNamespace(monotonic=raise_on_call(2))
        patch.setattr("jobs.verbs.exchange.time", clock)
        code, told = command(capsys, *words)
    assert (code, "same command again" in told) == (130, True), told
    code, told = command(capsys, *words)
    assert (code, "(1 of them before)" in told) == (0, True), told


def raise_on_call(number: int) -> Any:
    """Return a clock that is interrupted at its n-th reading."""
    calls = iter(range(1, 1000))

    def read() -> float:
        at = next(calls)
        if at == number:
            raise KeyboardInterrupt
        return float(at)

    return read


def test_an_interrupted_file_is_written_again(run: Exported, tmp_path: Path) -> None:
    dest = tmp_path / "masks.json"
    interrupt(run, str(dest), Format.COCO)
    assert list(tmp_path.iterdir()) == []
    # A killed process cannot clean up.
    (tmp_path / "masks.json.partial").write_bytes(b"{" * 100_000)
    export_dataset(open_dataset(str(run.out)), Format.COCO, str(dest))
    assert len(json.loads(dest.read_bytes())["annotations"]) == len(run.masks)
    assert list(tmp_path.iterdir()) == [dest]


def test_into_a_bucket(run: Exported, tmp_path: Path, seaweedfs: servers.S3Server) -> None:
    dataset = open_dataset(str(run.out))
    bucket, options = seaweedfs.new_bucket(), seaweedfs.options
    store = open_store(bucket, options)
    export_dataset(dataset, Format.SAV, str(tmp_path / "whole"))
    interrupt(run, f"{bucket}/sav", Format.SAV, options)
    assert len(list(store.list("sav/"))) == 2
    tally = export_dataset(dataset, Format.SAV, f"{bucket}/sav", store_options=options)
    assert tally.num_continued == 1
    keys = [stat.key for stat in store.list("sav/")]
    assert {key.removeprefix("sav/"): store.read_bytes(key) for key in keys} == files_below(
        tmp_path / "whole"
    )
    with pytest.raises(ConfigError, match="exists"):
        export_dataset(dataset, Format.SAV, f"{bucket}/sav", store_options=options)
    again = ExportOptions(overwrite=True)
    only = Selection(videos=("street",))
    export_dataset(dataset, Format.SAV, f"{bucket}/sav", only, again, store_options=options)
    assert [stat.key for stat in store.list("sav/")] == ["sav/street_auto.json"]
    export_dataset(dataset, Format.COCO, f"{bucket}/coco.json", store_options=options)
    assert len(json.loads(store.read_bytes("coco.json"))["annotations"]) == len(run.masks)
    with pytest.raises(ConfigError, match="exists"):
        export_dataset(dataset, Format.COCO, f"{bucket}/coco.json", store_options=options)


@pytest.mark.parametrize(("format", "limit"), [("coco", 4096), ("sav", 3000)])
def test_a_full_disk(
    run: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str, limit: int
) -> None:
    dest = tmp_path / "dest"
    words = ("export", run.out, dest, "--format", format)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        code, told = command(capsys, *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (code, "free some space" in told, told.count("\n")) == (3, True, 1), told
    assert not dest.exists()
    code, told = command(capsys, *words)
    assert code == 0, told


def staged(folder: Path, shapes: Sequence[dict[str, Any]]) -> str:
    """Make an output with a video per shape, by its keyword arguments of `stage_video`."""
    store = open_store(str(folder))
    log = CommitLog.acquire(store, "one")
    log.plan(run_plan())
    log.commit([stage_video(store, 1, key, **shape) for key, shape in enumerate(shapes)])
    Publisher(log).publish()
    log.close(Outcome.FINISHED)
    return str(folder)


def test_too_many_objects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = staged(tmp_path / "out", [{"num_objects": 3}, {"num_objects": 256, "num_frames": 1}])
    code, told = command(capsys, "export", out, tmp_path / "davis", "--format", "davis")
    assert code == 1
    assert "problem: 1.mp4 is left out: it has 256 objects" in told
    assert [path.name for path in (tmp_path / "davis").iterdir()] == ["0"]
    code, told = command(
        capsys, "export", out, tmp_path / "one", "--format", "davis", "--video", "1.mp4"
    )
    assert (code, "no video can be exported" in told) == (2, True), told
    assert not (tmp_path / "one").exists()


def test_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Objects are cats and dogs.
    out = staged(tmp_path / "out", [{"num_objects": 2}])
    words = ("export", out, tmp_path / "mots", "--format", "mots", "--results")
    code, told = command(capsys, *words)
    assert (code, "of other classes: cat, dog" in told, "--category cat=3" in told) == (
        2,
        True,
        True,
    )
    code, told = command(capsys, *words, "--category", "cat=3", "--where", "category <> 'x'")
    assert (code, "of other classes: dog" in told) == (2, True)
    assert not (tmp_path / "mots").exists()
    code, told = command(capsys, *words, "--category", "cat=3", "--category", "dog=2")
    assert code == 0, told
    lines = (tmp_path / "mots/0.txt").read_text().splitlines()
    assert {tuple(line.split()[1:3]) for line in lines} <= {("2001", "2"), ("3002", "3")}
    coco = ("export", out, tmp_path / "coco.json", "--format", "coco", "--category")
    for given, sentence in (
        ("cow=1", "no category 'cow'"),
        ("cat=2", "'cat' and 'dog' would both have the number 2"),
        ("cat", "NAME=ID"),
        ("cat=0", "NAME=ID"),
    ):
        code, told = command(capsys, *coco, given)
        assert (code, sentence in told) == (2, True), told
    code, told = command(capsys, *coco, "cat=17")
    categories = json.loads((tmp_path / "coco.json").read_bytes())["categories"]
    assert {row["name"]: row["id"] for row in categories} == {"cat": 17, "dog": 2}


def test_options_of_other_formats(
    run: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for format, option in (
        ("ytvis", ["--uncompressed"]),
        ("sav", ["--results"]),
        ("coco", ["--z-order", "1,2"]),
        ("davis", ["--category", "car=1"]),
    ):
        code, told = command(capsys, "export", run.out, tmp_path / "x", "--format", format, *option)
        assert (code, f"{option[0]} belongs to" in told) == (2, True), told
    code, told = command(
        capsys, "export", run.out, tmp_path / "x", "--format", "davis", "--z-order", "1;2"
    )
    assert (code, "no list of object ids" in told) == (2, True)
    code, told = command(capsys, "export", run.out, tmp_path / "x", "--format", "voc")
    assert (code, "coco" in told) == (2, True)


def test_runs_that_are_not_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--format", "coco")
    code, told = command(capsys, "export", tmp_path / "none", tmp_path / "x.json", *words)
    assert (code, "holds no dataset" in told) == (2, True)
    CommitLog.acquire(open_store(str(tmp_path / "empty")), "one").plan(run_plan())
    code, told = command(capsys, "export", tmp_path / "empty", tmp_path / "x.json", *words)
    assert (code, "nothing to export" in told) == (2, True), told
    make_output(tmp_path / "live", live=True)
    code, told = command(capsys, "export", tmp_path / "live", tmp_path / "x.json", *words)
    assert (code, "has not ended" in told) == (0, True), told
    assert len(json.loads((tmp_path / "x.json").read_bytes())["videos"]) == 4
    # A dataset of videos without any object is one, too.
    out = staged(tmp_path / "bare", [{"num_objects": 0}])
    for format in Format:
        dest = tmp_path / f"bare-{format}"
        assert command(capsys, "export", out, dest, "--format", format)[0] == 0
        assert dest.exists()


def test_a_full_disk_is_the_stores_fault(run: Exported, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(StoreFull):
            export_dataset(open_dataset(str(run.out)), Format.DAVIS, str(tmp_path / "davis"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
