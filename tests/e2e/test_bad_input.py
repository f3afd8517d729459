"""Contract: bad videos and bad prompts cost nobody but themselves.

* A corpus with every kind of bad file and bad prompt among good ones: the good ones commit, each
  bad one is in quarantine with one sentence that names it and says what is wrong, exit code 1.
* A truncated file commits what decodes, and says so.
* A prompt for a video outside the corpus is a warning.
* `retry` after a file was replaced commits it; what is still bad stays in quarantine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco

from tests import media
from tests.datasets import assert_whole, read_table
from tests.e2e.corpora import finish, maskmill

BOX = {"box_xyxy": [10, 10, 40, 40]}


def wrong_size_mask() -> dict[str, Any]:
    rle = coco.encode(np.asfortranarray(np.ones((20, 30), np.uint8)))
    return {"mask_rle": {"size": [20, 30], "counts": rle["counts"].decode()}}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    prompts: list[dict[str, Any]] = []

    def prompt(name: str, **row: Any) -> None:
        prompts.append({"video": name, "frame_idx": 0, "object_id": 1} | (row or BOX))

    for name in ("good-1.mp4", "good-2.mkv", "truncated.ts"):
        media.write_video(folder / name, num_frames=30)
        prompt(name)
    media.truncate(folder / "truncated.ts", 0.6)

    (folder / "zero.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("<html>Not Found</html>" * 50)
    media.write_audio_only(folder / "audio.mp4")
    media.write_encrypted(folder / "encrypted.mp4")
    media.write_undecodable(folder / "undecodable.mp4")
    for name in ("zero.mp4", "text.mp4", "audio.mp4", "encrypted.mp4", "undecodable.mp4"):
        prompt(name)

    rows: dict[str, Any] = {
        "late.mp4": BOX | {"frame_idx": 4000},
        "outside.mp4": {"box_xyxy": [500, 500, 600, 600]},
        "nan.mp4": {"box_xyxy": [float("nan"), 0, 10, 10]},
        "flat.mp4": {"box_xyxy": [10, 10, 10, 40]},
        "size.mp4": wrong_size_mask(),
    }
    for name, row in rows.items():
        media.write_video(folder / name, num_frames=5)
        prompt(name, **row)
    media.write_video(folder / "twice.mp4", num_frames=5)
    prompt("twice.mp4")
    prompt("twice.mp4", box_xyxy=[50, 10, 80, 40])
    media.write_video(folder / "unprompted.mp4", num_frames=5)
    prompt("elsewhere.mp4")
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in prompts))
    return folder


REASONS = {
    "zero.mp4": "0 bytes",
    "text.mp4": "not a video",
    "audio.mp4": "audio",
    "encrypted.mp4": "encrypted",
    "undecodable.mp4": "frame",
    "late.mp4": "4000",
    "outside.mp4": "outside",
    "nan.mp4": "NaN",
    "flat.mp4": "area",
    "size.mp4": "30x20",
    "twice.mp4": "again",
    "unprompted.mp4": "no prompt",
}
"""A word of the reason, per bad video."""


def test_the_good_ones_commit(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--out", out, "--prompts", tmp_path / "prompts.jsonl", "--tracker", "fake")
    code, told = finish(maskmill("run", corpus, *words, "--workers", "1"))
    assert code == 1, told
    assert "Traceback" not in told
    assert "elsewhere.mp4" in told

    videos = {row["name"]: row for row in read_table(out, "videos").to_pylist()}
    assert videos["truncated.ts"]["truncated"]
    decoded = videos["truncated.ts"]["frames_decoded"]
    assert 5 <= decoded < 30
    good = {"good-1.mp4": 30, "good-2.mkv": 30, "truncated.ts": decoded}
    assert_whole(out, good)

    reasons = {row["name"]: row["message"] for row in quarantine(out)}
    assert reasons.keys() == REASONS.keys()
    for name, message in reasons.items():
        assert name in message, message
        assert REASONS[name].lower() in message.lower(), message
        assert "\n" not in message

    # When one file is replaced, `retry` commits it and leaves the others where they are.
    media.write_video(corpus / "zero.mp4", num_frames=7)
    code, told = finish(maskmill("retry", out))
    assert code == 1, told
    assert_whole(out, good | {"zero.mp4": 7})
    assert {row["name"] for row in quarantine(out)} == REASONS.keys() - {"zero.mp4"}
    code, told = finish(maskmill("verify", out))
    assert code == 0, told


def quarantine(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_table(out, "quarantine").to_pylist()
    return rows
