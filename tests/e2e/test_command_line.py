"""The life of one dataset, typed: plan, run, status, retry, verify, gc, compact.

* `plan` tells videos, frames and hours from headers, names what would be quarantined, prints the
  configuration in a form that `--config` reads, and writes nothing.
* `run` with one bad file among good ones is exit code 1; the summary accounts for every video,
  says why, and names the next command; the same command again skips what is settled.
* `status` says the same from the log alone.
* Another configuration on the same output is exit code 2 and names the key; the dataset stays.
* `retry` after the file was replaced commits it: exit code 0.
* `verify` proves it; `gc` and `compact` leave it whole.
* A corpus that matches nothing is exit code 2 and makes no output.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from jobs import cli
from jobs.config import RunConfig
from jobs.settings import load_config
from tests.datasets import read_table
from tests.media import write_video

FRAMES = {"a.mp4": 20, "deep/b.mkv": 15, "c.mp4": 10}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a corpus of three videos, one of them empty, and prompts for all."""
    root = tmp_path_factory.mktemp("typed")
    (root / "clips" / "deep").mkdir(parents=True)
    for name in ("a.mp4", "deep/b.mkv"):
        write_video(root / "clips" / name, num_frames=FRAMES[name])
    (root / "clips" / "c.mp4").write_bytes(b"")
    rows = [
        {
            "video": name,
            "frame_idx": 0,
            "object_id": 1,
            "label": "dot",
            "box_xyxy": [10, 10, 40, 40],
        }
        for name in FRAMES
    ]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def command(place: Path, *more: str) -> list[str]:
    corpus, prompts = str(place / "clips"), str(place / "prompts.jsonl")
    return [corpus, "--prompts", prompts, "--out", str(place / "out"), "--workers", "1", *more]


def test_plan_writes_nothing(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "nothing"
    line = [*command(place), "--out", str(out), "--price", "2"]
    assert cli.main(["plan", *line]) == 0
    text = capsys.readouterr().out
    assert "3, " in text
    assert f"about {FRAMES['a.mp4'] + FRAMES['deep/b.mkv']}" in text
    assert "per worker-hour" in text
    assert "c.mp4" in text
    assert not out.exists()
    printed = tmp_path / "run.toml"
    printed.write_text(text.partition("\nconfiguration\n")[2])
    again: RunConfig = load_config(file=str(printed))
    assert again.out.uri == str(out)
    assert again.pool.workers == 1


def test_plan_without_an_output(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(place / "clips"), "--allow-unprompted"]) == 0
    assert "s of video" in capsys.readouterr().out


def test_life_of_a_dataset(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "out"

    # Given a corpus with one empty file, when it is run, then the rest is committed.
    assert cli.main(["run", *command(place)]) == 1
    text = capsys.readouterr()
    assert "Traceback" not in text.err
    assert "2 of 3 videos" in text.out
    assert "35 frames" in text.out
    assert "c.mp4" in text.out
    assert f"maskmill retry {out}" in text.out
    assert "where the time went" in text.out

    # The same command again finds everything settled.
    assert cli.main(["run", *command(place)]) == 1
    assert "3 of 3 videos, settled before" in capsys.readouterr().out

    assert cli.main(["status", str(out)]) == 0
    text = capsys.readouterr()
    assert "finished" in text.out
    assert "2 of 3 videos" in text.out
    assert "c.mp4" in text.out

    assert cli.main(["plan", *command(place)]) == 0
    assert "2 committed, 1 in quarantine" in capsys.readouterr().out

    # Another configuration is refused by plan and run alike.
    for verb in ("plan", "run"):
        assert cli.main([verb, *command(place, "--threshold", "0.75")]) == 2
        assert "prompts.threshold was 0.0 and is now 0.75" in capsys.readouterr().err

    # When the file is replaced, retry commits it.
    write_video(place / "clips" / "c.mp4", num_frames=FRAMES["c.mp4"])
    assert cli.main(["retry", str(out)]) == 0
    capsys.readouterr()

    assert cli.main(["verify", str(out), "--deep"]) == 0
    assert "the dataset is whole" in capsys.readouterr().out
    frames = read_table(out, "frames")
    assert frames.num_rows == sum(FRAMES.values())

    assert cli.main(["gc", str(out)]) == 0
    assert "deleted" in capsys.readouterr().out
    assert cli.main(["compact", str(out)]) == 0
    assert cli.main(["verify", str(out), "--deep"]) == 0
    assert read_table(out, "frames").num_rows == sum(FRAMES.values())


def test_damage_is_found(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    shutil.copytree(place / "out", out)
    next((out / "masks").glob("*.parquet")).unlink()
    assert cli.main(["verify", str(out)]) == 1
    text = capsys.readouterr()
    assert "problem: " in text.err
    assert "NOT whole" in text.out


def test_empty_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "clips").mkdir()
    out = tmp_path / "out"
    assert cli.main(["run", str(tmp_path / "clips"), "--out", str(out)]) == 2
    assert str(tmp_path / "clips") in capsys.readouterr().err
    assert not out.exists()
