"""The prompts of a run, before any worker starts.

* A run without any source of prompts is refused at once, unless it allows unprompted videos.
* Prompts may stand in a manifest row itself.
* Prompts of a video outside the corpus are one counted warning; those of a video that a selection
  left out are none, and whether a name is ambiguous does not depend on the selection.
* One video in several time ranges: each range gets the prompts inside it, also when a selection
  shows one of them only. A range without one has no prompt. Where a prompt's range cannot be told,
  or there is none, the video is at fault with a sentence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.config import CorpusConfig, OutConfig, PromptConfig, RunConfig
from jobs.planner import Inputs, Plan, make_plan, read_inputs
from workers.errors import ConfigError, InputError

BOX = {"box_xyxy": [1, 1, 9, 9]}


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Return a folder of files that are listed, and not read."""
    folder = tmp_path / "clips"
    for name in ("a.mp4", "b.mp4", "deep/c.mp4", "flat/c.mp4"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def prompts_file(folder: Path, *rows: dict[str, Any]) -> PromptConfig:
    path = folder / "prompts.jsonl"
    text = "\n".join(json.dumps({"object_id": 1} | BOX | row) for row in rows)
    path.write_text(text)
    return PromptConfig(file=str(path))


def config_of(prompts: PromptConfig, **corpus: Any) -> RunConfig:
    return RunConfig(corpus=CorpusConfig(**corpus), out=OutConfig(uri="out"), prompts=prompts)


def inputs_of(prompts: PromptConfig, **corpus: Any) -> Inputs:
    return read_inputs(config_of(prompts, **corpus))


def plan_of(prompts: PromptConfig, **corpus: Any) -> Plan:
    config = config_of(prompts, **corpus)
    return make_plan(config, read_inputs(config))


def test_no_source_of_prompts_is_refused(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no prompts: give --prompts FILE, --prompts-dir DIR or"):
        inputs_of(PromptConfig(), paths=(str(clips),))
    assert inputs_of(PromptConfig(allow_unprompted=True), paths=(str(clips),))
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(
        json.dumps({"video": str(clips / "a.mp4")})
        + "\n"
        + json.dumps({"video": str(clips / "b.mp4"), "prompts": json.dumps(BOX | {"frame_idx": 0})})
    )
    for limit in (None, 1):
        plan = plan_of(PromptConfig(), manifest=str(manifest), limit=limit)
        assert [task.name for task in plan.invalid] == ["a.mp4"], "only that row has no prompt"


def test_prompts_in_the_manifest_itself(clips: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "m.jsonl"
    for given in (json.dumps(BOX | {"frame_idx": 0}), json.dumps([BOX | {"frame_idx": 0}])):
        row = {"video": str(clips / "a.mp4"), "prompts": given}
        manifest.write_text(json.dumps(row))
        inputs = inputs_of(PromptConfig(), manifest=str(manifest))
        assert inputs.prompts.fault(0) is None
        assert objects(inputs, 0) == [1]
    manifest.write_text(json.dumps(row | {"prompts": "[3]"}))
    fault = inputs_of(PromptConfig(), manifest=str(manifest)).prompts.fault(0)
    assert fault == "the prompts in the manifest must be an object or a list of objects, got '[3]'"


def test_a_selection_warns_of_nothing_that_is_there(clips: Path) -> None:
    prompts = prompts_file(
        clips.parent,
        {"video": "a.mp4", "frame_idx": 0},
        {"video": "b.mp4", "frame_idx": 0},
        {"video": "gone.mp4", "frame_idx": 0},
    )
    for selection in ({}, {"limit": 1}, {"sample": 1}, {"videos": ("b.mp4",)}):
        inputs = inputs_of(prompts, paths=(str(clips),), **selection)
        (warning,) = inputs.prompts.warnings
        assert "'gone.mp4'" in warning
    row = inputs.corpus.rows_named("b.mp4")[0]
    assert inputs.prompts.digest(row)


def test_ambiguous_is_ambiguous_in_a_selection_too(clips: Path) -> None:
    prompts = prompts_file(clips.parent, {"video": "c.mp4", "frame_idx": 0})
    for selection in ({}, {"videos": ("deep/c.mp4",)}):
        inputs = inputs_of(prompts, paths=(str(clips),), **selection)
        row = inputs.corpus.rows_named("deep/c.mp4")[0]
        fault = inputs.prompts.fault(row)
        assert fault is not None
        assert "fits several videos (deep/c.mp4, flat/c.mp4)" in fault


@pytest.fixture
def ranges(clips: Path) -> Path:
    """Return a manifest of three ranges of one video, and another video."""
    manifest = clips / "m.csv"
    manifest.write_text("video,start_s,end_s\na.mp4,,10\na.mp4,10,20\na.mp4,30,\nb.mp4,,\n")
    return manifest


def objects(inputs: Inputs, row: int) -> list[int | None]:
    prompts, folder = inputs.prompts.prompts_for(row, {})
    assert folder is None
    return [prompt.object_id for prompt in prompts or ()]


def test_each_range_gets_its_own_prompts(clips: Path, ranges: Path) -> None:
    prompts = prompts_file(
        clips.parent,
        {"video": "a.mp4", "time_s": 0, "object_id": 1},
        {"video": "a.mp4", "time_s": 9.5, "object_id": 2},
        {"video": "a.mp4", "time_s": 10, "object_id": 3},
        {"video": "b.mp4", "frame_idx": 40, "object_id": 4},
    )
    config = config_of(prompts, manifest=str(ranges))
    inputs = read_inputs(config)
    assert [objects(inputs, row) for row in range(4)] == [[1, 2], [3], [], [4]]
    plan = make_plan(config, inputs)
    assert sorted(plan.order.tolist()) == [0, 1, 3]
    (task,) = plan.invalid
    assert "a.mp4 has no prompt in" in task.message
    # When only one of them is selected, it is the same input.
    part = inputs_of(prompts, manifest=str(ranges), limit=1)
    assert objects(part, 0) == [1, 2]
    assert part.prompts.digest(0) == inputs.prompts.digest(0)


def test_a_range_that_cannot_be_told(clips: Path, ranges: Path) -> None:
    prompts = prompts_file(
        clips.parent,
        {"video": "a.mp4", "frame_idx": 0},
        {"video": "b.mp4", "frame_idx": 0},
    )
    plan = plan_of(prompts, manifest=str(ranges))
    assert plan.order.tolist() == [3]
    assert len(plan.invalid) == 3
    for task in plan.invalid:
        assert "a.mp4 is listed with 3 time ranges, and frame_idx in" in task.message

    prompts = prompts_file(clips.parent, {"video": "a.mp4", "time_s": 25})
    for limit in (None, 1):
        inputs = inputs_of(prompts, manifest=str(ranges), limit=limit)
        fault = inputs.prompts.fault(0)
        assert fault is not None
        assert "object 1 of a.mp4 is at 25.000 s, in none of the 3 time ranges" in fault


def test_a_malformed_prompt_is_told_when_it_is_asked_for(clips: Path, ranges: Path) -> None:
    prompts = prompts_file(clips.parent, {"video": "a.mp4", "time_s": -1})
    inputs = inputs_of(prompts, manifest=str(ranges))
    assert inputs.prompts.fault(0) is None
    assert inputs.prompts.digest(0)
    with pytest.raises(InputError, match="time_s must be 0 or later"):
        inputs.prompts.prompts_for(0, {})
