"""docs/trackers.md says what the code does.

* Its table of options holds exactly the options of the trackers on the engine, with their defaults.
* Every registered tracker is mentioned; YOLO by its first family.
* Its operations a frame are those that `plan` reckons with.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

from jobs.effort import (
    CPU_TFLOPS_PER_CORE,
    ENCODER_GFLOP,
    GPU_TFLOPS,
    SAM3_ENCODER_GFLOP,
    SAM3_IMAGE_SIZE,
    SAM3_PIXELS,
    encoder_gflop,
    object_gflop,
)
from workers.trackers.registry import TRACKERS
from workers.trackers.sam2 import SHARED_OPTIONS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "trackers.md").read_text()
ON_THE_ENGINE = ("sam2", "samurai", "sam2long", "sam2-rt", "sam2video", "sam3-tracker")


def documented() -> dict[str, dict[str, object]]:
    """Return the options of the table, with defaults, by the tracker they are of."""
    found: dict[str, dict[str, object]] = {}
    for name, default, owner in re.findall(
        r"^\| `(\w+)` \| `(.+?)` \| (`[\w-]+`|all on the engine) \|", PAGE, re.MULTILINE
    ):
        found.setdefault(owner.strip("`"), {})[name] = json.loads(default)
    return found


@pytest.mark.parametrize("tracker", ON_THE_ENGINE)
def test_options_are_those_of_the_code(tracker: str) -> None:
    table = documented()
    assert table["all on the engine"] == dict(SHARED_OPTIONS)
    expected = importlib.import_module(f"workers.trackers.{tracker.replace('-', '_')}").OPTIONS
    written = table["all on the engine"] | table.get(tracker, {})
    assert written == dict(expected)
    assert {name: type(value) for name, value in written.items()} == {
        name: type(value) for name, value in expected.items()
    }


def test_every_tracker_is_mentioned() -> None:
    for info in TRACKERS:
        if info.name != "fake":  # for tests of clusters
            assert f"`{info.name}`" in PAGE or info.licence == "AGPL-3.0", info.name


def test_costs_are_those_of_plan() -> None:
    rows = {
        name: [int(value) for value in numbers.split("|")]
        for name, numbers in re.findall(r"^\| (.+?) \(GFLOP\) \| ([\d |]+) \|$", PAGE, re.MULTILINE)
    }
    assert rows["the picture, whatever is tracked"] == [encoder_gflop(s) for s in ENCODER_GFLOP]
    assert rows["each object, in the steady state"] == [pytest.approx(object_gflop(), abs=1)] * 4
    prompted = round(object_gflop(prompted=True))
    assert rows["each object where it is prompted"] == [prompted] * 4
    # One of SAM 3 has more cells on its picture.
    sam3 = round(object_gflop(SAM3_IMAGE_SIZE * SAM3_PIXELS))
    assert f"{SAM3_ENCODER_GFLOP:g} for the picture and {sam3} for each object" in PAGE
    assert f"{CPU_TFLOPS_PER_CORE:g} TFLOP/s per core" in PAGE
    assert f"{GPU_TFLOPS:g} TFLOP/s per GPU" in PAGE
