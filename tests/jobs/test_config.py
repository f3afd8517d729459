"""What of a configuration changes masks, and so belongs to its fingerprint.

* Another tracker, option, size, precision, weights, prompt mode, interval or threshold is another
  fingerprint.
* Workers, paths, stores, where prompts come from and whether unprompted videos are allowed are not
  in it: prompts are part of each video's identity.
* The same thing said otherwise is the same: an alias or another spelling of a name, an option
  spelt out at its default or as text.
* Where frames are prompted again and again, a network attends to a few of them only, unless told
  otherwise; what workers get says so, too.
* An unknown tracker or option is one sentence.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from jobs.config import RunConfig, fingerprint
from workers.errors import ConfigError
from workers.trackers.registry import TRACKERS


def settings(**sections: Any) -> dict[str, Any]:
    """Return the settings of a configuration, each section given by its keys."""
    config = RunConfig.model_validate(
        {"corpus": {"paths": ["clips"]}, "out": {"uri": "out"}} | sections
    )
    return config.mask_settings(tracker_sha256="aa", detector_sha256="bb")


DETECTOR = {"name": "yolo11n", "classes": ["car", "person"]}


@pytest.mark.parametrize(
    "sections",
    [
        {"tracker": {"name": "fake"}},
        {"tracker": {"options": {"reach_px": 11}}},
        {"tracker": {"image_size": 512}},
        {"tracker": {"dtype": "float32"}},
        {"prompts": {"mode": "every_frame"}},
        {"prompts": {"mode": "every_n_frames", "interval": 7}},
        {"prompts": {"threshold": 0.5}},
        {"prompts": {"detector": DETECTOR}},
    ],
)
def test_what_changes_masks_is_another_fingerprint(sections: dict[str, Any]) -> None:
    assert fingerprint(settings(**sections)) != fingerprint(settings())


@pytest.mark.parametrize(
    "sections",
    [
        {"pool": {"workers": 3, "videos_per_worker": 2}},
        {"corpus": {"paths": ["other"], "limit": 3, "stride": 2, "store": {"region": "eu"}}},
        {"prompts": {"file": "p.csv"}},
        {"prompts": {"dir": "p"}},
        {"prompts": {"allow_unprompted": True}},
        {"prompts": {"interval": 7}},
        {"tracker": {"name": "FLOW"}},
        {"tracker": {"options": {"reach_px": 12}}},
        {"tracker": {"options": {"reach_px": "12", "redetect": "true"}}},
    ],
)
def test_what_does_not_is_the_same(sections: dict[str, Any]) -> None:
    assert settings(**sections) == settings()


def test_names_of_one_model_are_the_same() -> None:
    names = ("yolo11n-seg", "YOLO11_seg", "yolo11-seg:n", "yolo11seg")
    found = [settings(tracker={"name": name}) for name in names]
    assert all(other == found[0] for other in found)
    assert settings(tracker={"name": "yolo11-seg:s"}) != found[0]
    spelt = [
        settings(prompts={"detector": DETECTOR}),
        settings(prompts={"detector": {"name": "YOLO11n", "classes": ["person", "car"]}}),
    ]
    assert spelt[0] == spelt[1]


@pytest.mark.parametrize(
    ("mode", "given", "expected"),
    [
        ("first_frame", {}, -1),
        ("every_n_frames", {}, 4),
        ("every_frame", {}, 4),
        ("every_frame", {"max_cond_frames_in_attn": 9}, 9),
    ],
)
def test_prompted_frames_do_not_pile_up(mode: str, given: dict[str, Any], expected: int) -> None:
    sections = {"tracker": {"name": "sam2", "options": given}, "prompts": {"mode": mode}}
    assert settings(**sections)["tracker.options.max_cond_frames_in_attn"] == expected
    config = RunConfig.model_validate(
        {"corpus": {"paths": ["clips"]}, "out": {"uri": "out"}} | sections
    )
    options = config.worker_spec(run_id="r", config_fingerprint="f").tracker.options
    assert options.get("max_cond_frames_in_attn", -1) == expected


@pytest.mark.parametrize("name", [info.name for info in TRACKERS])
def test_every_tracker_has_settings_that_can_be_stored(name: str) -> None:
    found = settings(tracker={"name": name})
    assert any(key.startswith("tracker.options.") for key in found)
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("tracker", "sentence"),
    [
        ({"name": "flwo"}, "there is no tracker 'flwo'"),
        ({"options": {"warp": 9}}, "tracker flow has no option 'warp'"),
        ({"options": {"reach_px": "far"}}, "option reach_px of tracker flow must be of type int"),
    ],
)
def test_unknown_is_one_sentence(tracker: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        settings(tracker=tracker)
