"""What `maskmill export` writes, `maskmill import` reads: equal to the tables but for known losses.

* Masks, frames without masks, frame numbers, object ids, labels, sizes and names of every format,
  as prompts and as ground truth, against the tables of one real run.
* What a format has no place for is lost as docs/formats.md says, and nothing else.
* The imported prompts of a run, given to the same tracker on the same videos, make its masks again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import cli, driver
from jobs.config import RunConfig
from jobs.ground_truth import open_ground_truth
from jobs.progress import SilentReporter
from jobs.threads import ThreadPool
from tests.datasets import read_table
from tests.exported import (
    LABELS,
    SHIFT_X,
    Exported,
    Mask,
    assert_same_masks,
    decode,
    make_run,
    one_object_per_pixel,
    read_run,
)
from workers.prompts.table import read_prompts

Masks = dict[tuple[str, int, int], Mask]

STEMS = {"street.mp4": "street", "park/dogs.mkv": "park/dogs"}
"""What is left of names where a format keeps no extension."""
RANKS = {1: 1, 2: 2, 7: 3, 300: 4, 5: 5, 9: 9}
"""Ids in DAVIS: those of `street` are numbered, because one of them is above 254."""
NUMBERS = {1: 1, 2: 2, 7: 4, 300: 3, 5: 1, 9: 2}
"""Ids of YouTube-VIS results, which have none: objects in the order in which they appear."""
MOTS = ("--category", "person=2", "--category", "car=1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return make_run(tmp_path_factory.mktemp("round-trip"))


def maskmill(*words: Any) -> None:
    assert cli.main([str(word) for word in words]) == 0


def read_imported(path: Path) -> tuple[Masks, dict[tuple[str, int], str | None]]:
    masks, labels = {}, {}
    table = read_prompts(str(path))
    for name in table.names:
        for prompt in table.prompts_for(name):
            assert prompt.mask_rle is not None
            assert prompt.frame_idx is not None
            assert prompt.object_id is not None
            size, counts = list(prompt.mask_rle["size"]), prompt.mask_rle["counts"]
            masks[name, prompt.frame_idx, prompt.object_id] = decode(size, counts)
            labels[name, prompt.object_id] = prompt.label
    return masks, labels


def read_truth(folder: Path) -> tuple[Masks, dict[str, list[int]]]:
    truth = open_ground_truth(str(folder))
    masks: Masks = {}
    frames: dict[str, list[int]] = {}
    for name, sequence in truth.sequences.items():
        frames[name] = []
        for frame in truth.frames(sequence):
            frames[name].append(frame.frame_idx)
            for object_id, mask in frame.masks.items():
                masks[name, frame.frame_idx, object_id] = mask.paste(*frame.size)
    return masks, frames


def renamed(masks: Masks, ids: dict[int, int] | None = None) -> Masks:
    """Return masks under names without extension, and under other ids."""
    return {
        (STEMS[name], frame_idx, ids[object_id] if ids else object_id): mask
        for (name, frame_idx, object_id), mask in masks.items()
    }


CASES: dict[str, dict[str, Any]] = {
    "coco": {"format": "coco", "whole_names": True},
    "coco, lists": {"format": "coco", "export": ["--uncompressed"], "whole_names": True},
    "ytvis": {"format": "ytvis"},
    "ytvis, results": {"format": "ytvis", "export": ["--results"], "ids": NUMBERS},
    "davis": {"format": "davis", "flat": True, "ids": RANKS, "labels": False},
    "mots": {"format": "mots", "export": MOTS, "flat": True, "mots_labels": True},
    "mots, results": {
        "format": "mots",
        "export": ["--results", *MOTS],
        "flat": True,
        "mots_labels": True,
        "frames": "up to the last mask",
    },
    "sav": {"format": "sav", "whole_names": True},
}


@pytest.mark.parametrize("name", CASES)
def test_an_export_is_read_back(name: str, run: Exported, tmp_path: Path) -> None:
    case = CASES[name]
    suffix = ".json" if case["format"] in ("coco", "ytvis") else ""
    made = tmp_path / f"made{suffix}"
    maskmill("export", run.out, made, "--format", case["format"], *case.get("export", ()))
    words = ["import", made, "--format", case["format"]]
    if name == "ytvis, results":
        # Results only number videos and categories, as the ground truth of the same run does.
        maskmill("export", run.out, tmp_path / "truth.json", "--format", "ytvis")
        words += ["--videos", tmp_path / "truth.json"]
    wanted = one_object_per_pixel(run) if case.get("flat") else run.masks
    stems = renamed(wanted, case.get("ids"))
    # As prompts: every mask, its object and its label.
    maskmill(*words, "--prompts", tmp_path / "p.jsonl", "--frames", "all")
    found, labels = read_imported(tmp_path / "p.jsonl")
    assert_same_masks(found, wanted if case.get("whole_names") else stems)
    ids = {video: {o for v, _, o in wanted if v == video} for video in STEMS}
    expected: dict[tuple[str, int], str | None] = {}
    for video, objects in ids.items():
        for object_id in objects:
            label: str | None = LABELS[object_id]
            if case.get("mots_labels"):
                label = {"person": "pedestrian", "car": "car"}[LABELS[object_id]]
            title = video if case.get("whole_names") else STEMS[video]
            new_id = (case.get("ids") or {}).get(object_id, object_id)
            expected[title, new_id] = label if case.get("labels", True) else None
    assert labels == expected
    # As ground truth: every frame, also those where nothing is.
    maskmill(*words, "--gt", tmp_path / "gt")
    truth, frames = read_truth(tmp_path / "gt")
    assert_same_masks(truth, stems)
    last = {v: max(f for title, f, _ in stems if title == v) for v in STEMS.values()}
    for video, indices in run.frames.items():
        kept = case.get("frames") is None
        title = STEMS[video]
        assert frames[title] == (indices if kept else list(range(last[title] + 1)))


def test_what_a_pass_found_starts_the_next(run: Exported, tmp_path: Path) -> None:
    maskmill("export", run.out, tmp_path / "made", "--format", "sav")
    prompts = tmp_path / "p.parquet"
    maskmill("import", tmp_path / "made", "--format", "sav", "--prompts", prompts)
    config = RunConfig.model_validate(
        {
            "corpus": {"paths": (str(run.out.parent / "corpus"),)},
            "out": {"uri": str(tmp_path / "out")},
            "tracker": {"name": "fake", "options": {"shift_x": SHIFT_X}},
            "prompts": {"file": str(prompts)},
        }
    )
    summary = driver.run(
        config, reporter=SilentReporter(), pool_factory=lambda _, spec: ThreadPool(spec, 2)
    )
    assert (summary.exit_code, summary.num_committed) == (0, 2)
    again = read_run(tmp_path / "out")
    # The second prompt of object 300 is not an object's first mask, so it is not given again.
    gone = {key for key in run.masks if key[2] == 300 and key[1] >= 10}
    assert_same_masks(again.masks, {k: m for k, m in run.masks.items() if k not in gone})
    kinds = set(read_table(tmp_path / "out", "prompts")["kind"].to_pylist())
    assert kinds == {"mask"}
    np.testing.assert_equal(sorted(again.frames.items()), sorted(run.frames.items()))
