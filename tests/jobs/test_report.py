"""What people read when a run has ended.

* Every video is accounted for: committed, skipped, quarantined; frames, masks and speed.
* Reasons are grouped, the commonest first, the first few named, the rest counted.
* The next command to type fits the outcome: resume, retry, verify.
* Models and findings are complete: every tracker with weights and licence, every finding a line.
"""

from __future__ import annotations

import io
from dataclasses import replace

from jobs.doctor import Finding, Level
from jobs.driver import RunSummary
from jobs.report import MAX_EXAMPLES, model_lines, summary_lines, write_findings
from workers.trackers.registry import TRACKERS

DONE = RunSummary(
    exit_code=0,
    run_id="run-1",
    out_uri="/data/my masks",
    num_committed=30,
    num_quarantined=0,
    num_skipped=10,
    num_frames=3000,
    num_masks=9000,
    wall_s=60.0,
    stage_seconds={"track": 90.0, "decode": 10.0},
    quarantined=(),
)


def text_of(summary: RunSummary) -> str:
    return "\n".join(summary_lines(summary, "maskmill run clips --out masks"))


def test_all_committed() -> None:
    text = text_of(DONE)
    assert "10 of 40 videos, settled before" in text
    assert "30 of 30 videos" in text
    assert "3,000 frames, 9,000 masks" in text
    assert "50.0 frames/s over 1 min 00 s" in text
    assert "90 %" in text
    assert "quarantine" not in text
    assert text.endswith("maskmill verify '/data/my masks'")


def test_quarantine_is_grouped_and_cut_short() -> None:
    reasons = [(f"v{i}.mp4", "input", f"v{i}.mp4 is empty") for i in range(MAX_EXAMPLES + 2)]
    reasons.append(("w.mp4", "worker_lost", "the worker died"))
    summary = replace(
        DONE, exit_code=1, num_quarantined=len(reasons), quarantined=tuple(reversed(reasons))
    )
    text = text_of(summary)
    assert text.index("quarantined, input: 12") < text.index("quarantined, worker lost: 1")
    assert "and 2 more" in text
    assert "maskmill status '/data/my masks'" in text
    assert "w.mp4: the worker died" in text
    assert "v4.mp4: v4.mp4" not in text
    assert "maskmill retry '/data/my masks'" in text


def test_interrupted_says_how_to_resume() -> None:
    text = text_of(replace(DONE, exit_code=130, interrupted=True))
    assert "run run-1 stopped" in text
    assert text.endswith("maskmill run clips --out masks")


def test_nothing_was_left_to_do() -> None:
    summary = replace(
        DONE, num_committed=0, num_frames=0, num_masks=0, wall_s=0.0, stage_seconds={}
    )
    text = text_of(summary)
    assert "10 of 10 videos, settled before" in text
    assert "nothing was left to do" in text
    assert "frames/s" not in text
    assert "where the time went" not in text


def test_all_in_quarantine() -> None:
    # Given a run whose ten videos were quarantined before
    reasons = tuple((f"v{i}.mp4", "input", f"v{i}.mp4 is empty") for i in range(10))
    text = text_of(replace(DONE, exit_code=1, num_committed=0, quarantined=reasons))
    assert "nothing was left to do but for 10 in quarantine (maskmill retry)" in text
    assert "verify" not in text


def test_every_model_is_listed() -> None:
    text = "\n".join(model_lines())
    for info in TRACKERS:
        assert info.name in text
        assert info.licence in text
        assert info.weights in text


def test_findings_are_whole_lines_in_a_pipe() -> None:
    stream = io.StringIO()
    message = "this sentence is longer than a line of eighty characters " * 3
    findings = [Finding(Level.OK, "gpu", message), Finding(Level.FAIL, "s3://b", "denied", 3)]
    write_findings(findings, stream)
    first, second = stream.getvalue().splitlines()
    assert message in first
    assert second.startswith("fail")
