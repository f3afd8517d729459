"""What is settled before the first video.

* The command that reproduces one video, typed, gives a configuration with everything that its
  masks depend on: tracker, options, prompts with mode and interval, threshold, detector with
  classes, stride and range, and how to reach the corpus; on one worker, into a folder of its own.
* It finds the prompts of the video by the name they have in the whole corpus.
* Any configuration can be typed: what no flag says goes into `--set`.
* A refusal of the store names the output, not the keys that are tried.
* Two owners of a fence are never the same.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import cli
from jobs.commit_log import read_state
from jobs.config import RunConfig
from jobs.flags import command_words
from jobs.planner import make_plan, read_inputs
from jobs.startup import owner_name, prove_store, reproduce_command
from jobs.verbs import running
from tests.servers import free_ports
from workers.errors import StoreDenied, StoreUnavailable
from workers.messages import StoreOptions
from workers.storage import open_store

Typed = Callable[[list[str]], RunConfig]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Typed:
    """Return what turns typed words into the configuration that would run; nothing is started."""
    seen: list[RunConfig] = []

    def collect(config: RunConfig, command: str, **options: Any) -> int:
        seen.append(config)
        return 0

    monkeypatch.setattr(running, "run_and_report", collect)

    def type_words(words: list[str]) -> RunConfig:
        assert cli.main(words) == 0
        return seen.pop()

    return type_words


FULL: dict[str, Any] = {
    "corpus": {
        "paths": ["s3://b/with blank", "/clips"],
        "manifest": "/m.csv",
        "limit": 5,
        "sample": 9,
        "seed": 3,
        "stride": 2,
        "store": {
            "endpoint_url": "http://s3:9000",
            "path_style": True,
            "profile": "lab",
            "region": "eu",
            "anonymous": True,
        },
    },
    "out": {
        "uri": "/out",
        "store": {"endpoint_url": "http://o:9000", "region": "us"},
        "single_driver": True,
    },
    "tracker": {
        "name": "yolo11n-seg",
        "checkpoint": "/w.pt",
        "image_size": 512,
        "dtype": "float16",
        "device": "cuda:1",
        "options": {"nms_iou": 0.25, "same_class": True},
    },
    "prompts": {
        "detector": {
            "name": "yolo11n",
            "checkpoint": "/d.pt",
            "classes": ["person", "traffic light"],
            "confidence": 0.5,
            "max_objects": 7,
            "forget_after": 90,
        },
        "mode": "every_n_frames",
        "interval": 12,
        "threshold": 0.25,
        "allow_unprompted": True,
    },
    "pool": {
        "workers": 3,
        "gpus_per_worker": 0.5,
        "cpus_per_worker": 2.0,
        "videos_per_worker": 4,
        "stuck_after_s": 60.0,
        "ray_address": "ray://head:10001",
        "spool_dir": "/spool",
    },
}
SMALL: dict[str, Any] = {"corpus": {"paths": ["/clips"]}, "out": {"uri": "/out"}}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"corpus": {"manifest": "/m.csv", "store": {"region": "eu"}}},
        {"prompts": {"file": "/p.csv"}},
        {"prompts": {"detector": {"name": "yolo11n", "checkpoint": "/d", "classes": ["a, b"]}}},
        {"tracker": {"options": {"flow_preset": "medium", "background_bias": -0.5}}},
    ],
)
def test_any_configuration_can_be_typed(changes: dict[str, Any], typed: Typed) -> None:
    for base in (FULL, SMALL):
        if base is FULL and changes:
            continue
        config = RunConfig.model_validate(base | changes)
        assert typed(["run", *command_words(config)]) == config


def test_one_video_keeps_what_its_masks_depend_on(typed: Typed) -> None:
    config = RunConfig.model_validate(FULL)
    words = shlex.split(reproduce_command(config, "s3://b/with blank/x y.mp4"))
    assert words[0] == "maskmill"
    alone = typed(words[1:])
    digests = {"tracker_sha256": "aa", "detector_sha256": "bb"}
    assert alone.mask_settings(**digests) == config.mask_settings(**digests)
    assert alone.tracker == config.tracker
    assert alone.prompts == config.prompts
    assert alone.corpus.videos == ("s3://b/with blank/x y.mp4",)
    selection = {"videos": (), "limit": 5, "sample": 9, "seed": 3}
    assert alone.corpus.model_copy(update=selection) == config.corpus
    assert alone.pool.workers == 1
    assert alone.pool.ray_address is None
    assert alone.out.uri.endswith("/reproduce")


def test_one_video_finds_its_prompts(
    typed: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/x.mp4", "b/x.mp4"):
        (tmp_path / "clips" / name).parent.mkdir(parents=True)
        (tmp_path / "clips" / name).write_bytes(b"listed, and not read")
    rows = [
        {"video": name, "time_s": 1, "object_id": 1, "box_xyxy": [0, 0, 9, 9]}
        for name in ("a/x.mp4", "b/x.mp4")
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps(row) for row in rows))
    manifest = tmp_path / "m.csv"
    manifest.write_text("video,start_s,end_s\nclips/a/x.mp4,0,2\nclips/b/x.mp4,1,3\n")
    monkeypatch.chdir(tmp_path)
    for corpus in ({"paths": [str(tmp_path / "clips")]}, {"manifest": str(manifest)}):
        config = RunConfig.model_validate(
            {"corpus": corpus, "out": {"uri": "/out"}, "prompts": {"file": str(prompts)}}
        )
        whole = make_plan(config, read_inputs(config))
        source = whole.corpus.source(1)
        alone = typed(shlex.split(reproduce_command(config, source.uri))[1:])
        plan = make_plan(alone, read_inputs(alone))
        assert [plan.corpus.source(row) for row in plan.order] == [source]
        assert plan.identity(0) == whole.identity(1)


def test_an_output_that_cannot_be_written_is_named_itself(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"no folder")
    out = tmp_path / "file" / "out"
    with pytest.raises(StoreDenied, match=f"^the output {out} cannot be written: "):
        prove_store(open_store(str(out)), single_driver=False)


def test_an_output_that_cannot_be_reached_is_named_itself() -> None:
    port = free_ports(1)[0]
    options = StoreOptions(endpoint_url=f"http://127.0.0.1:{port}", path_style=True, anonymous=True)
    with pytest.raises(StoreUnavailable) as refused:
        read_state(open_store("s3://b/run", options))
    assert "the output s3://b/run " in str(refused.value)


def test_owners_differ() -> None:
    assert owner_name() != owner_name()
