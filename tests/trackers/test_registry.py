"""Names of trackers.

* Case, ``_`` and ``-`` do not matter; ``NAME:SIZE`` chooses a size; aliases are the same tracker.
* An unknown name or size is a ValueError that lists those there are.
* What is known of a tracker names its weights and its licence; YOLO is AGPL-3.0.
* Listing trackers imports none of their packages.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from workers.trackers.base import TrackingConfig
from workers.trackers.registry import TRACKERS, create_tracking_loader, tracker_info

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("flow", "flow"),
        ("FLOW", "flow"),
        ("yolo11n-seg", "yolo11n-seg"),
        ("YOLO11seg", "yolo11n-seg"),
        ("yolo11_seg", "yolo11n-seg"),
        ("yolo11seg:m", "yolo11m-seg"),
        ("yolo11s_seg", "yolo11s-seg"),
        ("yolo11s-seg:S", "yolo11s-seg"),
        ("yolov8x-seg", "yolov8x-seg"),
        ("yolov8-seg:l", "yolov8l-seg"),
        ("yolo26n-seg", "yolo26n-seg"),
    ],
)
def test_names_and_sizes(name: str, canonical: str) -> None:
    assert tracker_info(name).name == canonical
    loader = create_tracking_loader(name, TrackingConfig("whatever"))
    assert loader.config.model_id == canonical


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sam9", "no tracker 'sam9'.*flow, yolo11n-seg, yolo11seg"),
        ("", "no tracker ''"),
        ("yolo11z-seg", "no tracker"),
        ("flwo", "did you mean flow"),
        ("yolo9n-seg", "no tracker"),
        ("flow:tiny", "flow has no sizes"),
        ("flow:", "flow has no sizes"),
        ("yolo11seg:huge", "sizes are n, s, m, l, x"),
        ("yolo11s-seg:m", "two sizes, s and m"),
    ],
)
def test_unknown_names_list_the_known(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_tracking_loader(name, TrackingConfig(name))


def test_weights_and_licences_are_told() -> None:
    assert tracker_info("flow").weights == ""
    assert tracker_info("yolo11seg:s").weights == "yolo11s-seg.pt"
    for info in TRACKERS:
        others = {"yolo": "AGPL-3.0", "sam3": "LicenseRef-SAM"}
        assert info.licence == others.get(info.name[:4], "Apache-2.0")
        assert info.description.endswith(".")
        assert tracker_info(info.name) == info


def test_listing_imports_nothing_heavy() -> None:
    program = (
        "import sys; from workers.trackers.registry import TRACKERS, create_tracking_loader; "
        "from workers.trackers.base import TrackingConfig; "
        "create_tracking_loader('flow', TrackingConfig('flow')); "
        "create_tracking_loader('yolo11seg', TrackingConfig('yolo11seg')); "
        "print([m for m in ('cv2', 'torch', 'ultralytics', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"
