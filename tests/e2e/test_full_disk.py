"""A disk that fills up, at any moment of a run.

* The run ends with exit code 3 and one sentence: what is full, and what to do.
* Nothing that was committed is lost or done again, and no video is quarantined.
* After room is made the same command ends with exit code 0 and a whole dataset.
* The same holds for the spool directory.

Disks are file systems in memory of some kilobytes, which only root may mount; a limit on the size
of files is as real, needs no rights, and stops the same writes one by one.
"""

from __future__ import annotations

import contextlib
import resource
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from jobs import driver
from jobs.commit_log import read_state
from jobs.config import CorpusConfig, OutConfig, PoolConfig, PromptConfig, RunConfig, TrackerConfig
from jobs.driver import RunSummary
from jobs.progress import SilentReporter
from jobs.threads import ThreadPool
from tests.datasets import assert_whole
from tests.e2e.corpora import finish, maskmill, write_corpus
from workers.errors import StoreError
from workers.messages import WorkerSpec
from workers.storage import open_store

NUM_VIDEOS = 4
KIB = 1024


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """Return a folder with a corpus and its prompts, and frames per video."""
    place = tmp_path_factory.mktemp("full")
    return place, write_corpus(place / "corpus", NUM_VIDEOS)


@contextlib.contextmanager
def disk(place: Path, size_bytes: int) -> Iterator[Callable[[], object]]:
    """Mount a file system of some size; yields what makes it larger."""
    place.mkdir(exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(place)]
    mounted = subprocess.run(words, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        grow = ["mount", "-o", "remount,size=64m", str(place)]
        yield lambda: subprocess.run(grow, check=True)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@contextlib.contextmanager
def file_sizes(place: Path, size_bytes: int) -> Iterator[Callable[[], object]]:
    """Limit the size of every file that this process writes; yields what lifts the limit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def lift() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield lift
    finally:
        lift()


def drive(place: Path, out: Path, spool: Path | None = None) -> RunSummary:
    """Run in this process, on threads: for many runs at little cost."""

    def pool(config: RunConfig, spec: WorkerSpec) -> ThreadPool:
        return ThreadPool(spec, 1)

    config = RunConfig(
        corpus=CorpusConfig(paths=(str(place / "corpus"),)),
        out=OutConfig(uri=str(out)),
        tracker=TrackerConfig(name="fake"),
        prompts=PromptConfig(file=str(place / "prompts.jsonl")),
        pool=PoolConfig(spool_dir=str(spool) if spool else None),
    )
    return driver.run(config, reporter=SilentReporter(), pool_factory=pool)


@pytest.mark.parametrize(
    ("limit", "what", "sizes"),
    [
        (disk, "out", range(4 * KIB, 400 * KIB, 16 * KIB)),
        (disk, "spool", [4 * KIB, 8 * KIB, 16 * KIB, 24 * KIB, 32 * KIB, 64 * KIB]),
        (file_sizes, "", [10, 100, 400, 700, *range(1 * KIB, 26 * KIB, KIB)]),
    ],
)
def test_a_disk_that_is_full_at_any_moment(
    frames: tuple[Path, dict[str, int]],
    tmp_path: Path,
    limit: Callable[[Path, int], AbstractContextManager[Callable[[], object]]],
    what: str,
    sizes: Sequence[int],
) -> None:
    place, num_frames = frames
    num_full = 0
    for size in sizes:
        base = tmp_path / f"{size}"
        base.mkdir()
        out, spool = base / "out", base / "spool"
        spool.mkdir()
        # Given a disk of some size, a run meets its end at some moment
        with limit(base / what, size) as make_room:
            try:
                drive(place, out, spool)
                full = ""
            except StoreError as error:
                full = str(error)
            if full:
                num_full += 1
                assert_tells(full)
                assert "\n" not in full
            # Then what it has committed stays
            state = read_state(open_store(str(out)))
            assert not state.quarantined
            # And with more room the rest follows
            make_room()
            summary = drive(place, out, spool)
            assert (summary.exit_code, summary.num_skipped) == (0, state.num_committed)
            assert_whole(out, num_frames)
    # and there were sizes with room and without
    assert 0 < num_full < len(sizes)


@pytest.mark.parametrize(("what", "size"), [("out", 160 * KIB), ("spool", 8 * KIB)])
def test_a_full_disk_under_the_command(
    frames: tuple[Path, dict[str, int]], tmp_path: Path, what: str, size: int
) -> None:
    place, num_frames = frames
    out = tmp_path / "out"
    words = ["run", place / "corpus", "--prompts", place / "prompts.jsonl", "--out", out]
    words += ["--spool-dir", tmp_path / "spool" / "made", "--tracker", "fake", "--workers", "1"]
    with disk(tmp_path / what, size) as make_room:
        code, told = finish(maskmill(*words))
        assert code == 3, told
        assert "Traceback" not in told
        errors = [line for line in told.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, told
        assert_tells(errors[0])
        assert str(tmp_path / what) in errors[0]
        state = read_state(open_store(str(out)))
        assert not state.quarantined
        make_room()
        code, told = finish(maskmill(*words))
        assert code == 0, told
        if state.num_committed:
            assert f"{state.num_committed} of {NUM_VIDEOS} videos, settled before" in told
        assert_whole(out, num_frames)


def assert_tells(sentence: str) -> None:
    causes = ("no space left on device", "no space is left", "is full", "file too large")
    assert any(cause in sentence for cause in causes), sentence
    assert "free some" in sentence, sentence
