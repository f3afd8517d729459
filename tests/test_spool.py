"""Contract of `workers.spool`.

* A folder is made with the directory above it, and gone at the end, whatever happened in it.
* The folders of killed processes are removed; those of living ones, of this and other processes,
  stay, and so does everything that is none of ours, or another host's.
* A folder that is removed while it is being made is made again.
* A place that cannot be used is a StoreError that names it.
"""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from workers.errors import StoreDenied
from workers.spool import remove_abandoned, spool_folder

HOLD = """
import sys
from workers.spool import spool_folder
with spool_folder(sys.argv[1]) as folder:
    (folder / "video.mp4").write_bytes(b"half of it")
    print(folder, flush=True)
    sys.stdin.read()
"""


def hold(place: Path) -> tuple[subprocess.Popen[str], Path]:
    """Start a process that holds a folder with a file in it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(place)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_folder_lasts_as_long_as_its_block(tmp_path: Path) -> None:
    place = tmp_path / "not" / "yet"
    with spool_folder(place) as one, spool_folder(place) as other:
        assert one.parent == other.parent == place
        assert one != other
        (one / "file").touch()
    assert list(place.iterdir()) == []
    with pytest.raises(ZeroDivisionError), spool_folder(place):
        raise ZeroDivisionError
    assert list(place.iterdir()) == []


def test_only_the_folders_of_the_dead_are_removed(tmp_path: Path) -> None:
    strangers = ["maskmill-a1b2c3d4", "maskmill-elsewhere-17-abc", "notes"]
    for name in strangers:
        (tmp_path / name).mkdir()
    living, its = hold(tmp_path)
    killed, left = hold(tmp_path)
    with spool_folder(tmp_path) as mine:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert (left / "video.mp4").exists()
        assert remove_abandoned(tmp_path) == 1
        assert {path.name for path in tmp_path.iterdir()} == {its.name, mine.name, *strangers}
        assert (its / "video.mp4").exists()
    living.communicate("")
    assert living.returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == set(strangers)
    assert remove_abandoned(tmp_path) == 0
    assert remove_abandoned(tmp_path / "nowhere") == 0


def test_a_folder_that_is_taken_away_at_its_birth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The moment between making and locking is too short to be met on purpose.
    lock = fcntl.flock
    removed: list[int] = []

    def taken_away(descriptor: int, operation: int) -> None:
        if not removed:
            removed.append(0)
            removed[0] = remove_abandoned(tmp_path)
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", taken_away)
    with spool_folder(tmp_path) as folder:
        assert removed == [1]
        assert folder.is_dir()


def test_a_place_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "spool"):
        words = f"the spool directory {place} cannot be written"
        with pytest.raises(StoreDenied, match=words), spool_folder(place):
            pass
