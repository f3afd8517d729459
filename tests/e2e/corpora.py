"""Small corpora with prompts, and the commands that run over them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.media import write_video

ROOT = Path(__file__).resolve().parents[2]


def write_corpus(folder: Path, num_videos: int, *, num_frames: int = 8) -> dict[str, int]:
    """Write videos of `num_frames` to `num_frames` + 2 frames, and ``prompts.jsonl`` beside them.

    Returns
    -------
    dict of str to int
        Frames per video name.
    """
    folder.mkdir(parents=True)
    frames, rows = {}, []
    for i in range(num_videos):
        name = f"clip-{i:03d}.mp4"
        frames[name] = num_frames + i % 3
        write_video(folder / name, num_frames=frames[name])
        rows += [
            {"video": name, "frame_idx": 0, "object_id": 1, "box_xyxy": [10, 10, 40, 40]},
            {"video": name, "frame_idx": 2, "object_id": 2, "box_xyxy": [50, 5, 90, 30]},
        ]
    text = "\n".join(json.dumps(row | {"label": "thing"}) for row in rows)
    (folder.parent / "prompts.jsonl").write_text(text)
    return frames


def maskmill(
    *words: Any, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.Popen[str]:
    """Start the command line as a process of its own group."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(ROOT)} | dict(env or {})
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=cwd,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 240) -> tuple[int, str]:
    """Wait for a command; return its exit code and everything it printed."""
    try:
        told, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        told, _ = process.communicate()
        raise AssertionError(f"the command did not end within {timeout_s} s: {told}") from None
    return process.returncode, told
