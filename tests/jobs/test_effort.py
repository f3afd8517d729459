"""What `maskmill plan` expects of a worker.

* The operations are those counted of the published networks: 292 GFLOP a frame and 621 an object
  at 1024 pixels for tiny, and at 512 pixels about a quarter and a twelfth.
* More objects, larger networks and larger pictures cost more; a prompted frame attends to nothing.
* Prompts tell how many objects there are; `--objects` and `--fps` overrule; what was assumed is
  said beside the hours.
* The device follows the configuration; shares of GPUs and numbers of cores count.
"""

from __future__ import annotations

import doctest
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from jobs import cli, effort
from jobs.config import RunConfig
from jobs.effort import (
    CPU_TFLOPS_PER_CORE,
    GPU_TFLOPS,
    encoder_gflop,
    estimate,
    object_gflop,
    runs_on_gpu,
)
from tests.media import write_video


def config(tracker: dict[str, Any], **sections: dict[str, Any]) -> RunConfig:
    tree = {"corpus": {}, "out": {"uri": "out"}, "tracker": tracker, **sections}
    return RunConfig.model_validate(tree)


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_operations_are_those_counted() -> None:
    assert doctest.testmod(effort).failed == 0
    assert encoder_gflop("tiny") == 292
    assert object_gflop() == pytest.approx(621, abs=1)
    assert encoder_gflop("large", 512) == 1823 / 4
    assert object_gflop(512) == pytest.approx(621 / 12, rel=0.01)
    assert object_gflop(prompted=True) == pytest.approx(3.6 + 11.6)


def test_cpu_and_gpu() -> None:
    on_cpu = estimate(config({"name": "samurai", "device": "cpu"}), 1)
    # One frame of tiny with one object took 10 s of one core under the official predictor.
    assert 1 / on_cpu.fps == pytest.approx(10, rel=0.02)
    on_gpu = estimate(config({"name": "samurai", "device": "cuda"}), 1)
    assert on_gpu.fps / on_cpu.fps == pytest.approx(GPU_TFLOPS / CPU_TFLOPS_PER_CORE)
    shared = config({"name": "samurai", "device": "cuda"}, pool={"gpus_per_worker": 0.25})
    assert estimate(shared, 1).fps == pytest.approx(on_gpu.fps / 4)
    wide = config({"name": "samurai", "device": "cpu"}, pool={"cpus_per_worker": 8})
    assert estimate(wide, 1).fps == pytest.approx(on_cpu.fps * 8)


def test_size_and_objects_decide() -> None:
    def fps(name: str, num_objects: float | None = 1, **more: Any) -> float:
        return estimate(config({"name": name, "device": "cuda", **more}), num_objects).fps

    assert fps("sam2:tiny") == fps("sam2") == fps("facebook/sam2.1-hiera-tiny")
    assert fps("sam2:large") < fps("sam2:base-plus") < fps("sam2:small") < fps("sam2:tiny")
    assert fps("sam2", checkpoint="s3://b/sam2.1_hiera_base_plus.pt") == fps("sam2:base-plus")
    assert fps("sam2", 5) < fps("sam2", 2) < fps("sam2", None) == fps("sam2")
    assert fps("sam2", image_size=512) > 4 * fps("sam2")
    every_frame = config({"name": "sam2", "device": "cuda"}, prompts={"mode": "every_frame"})
    assert estimate(every_frame, 5).fps > 5 * fps("sam2", 5)


def test_device_follows_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not runs_on_gpu(config({}))
    assert not runs_on_gpu(config({"device": "cpu"}))
    assert not runs_on_gpu(config({"device": "cuda"}, pool={"gpus_per_worker": 0}))
    assert runs_on_gpu(config({"device": "cuda:1"}))
    assert runs_on_gpu(config({}, pool={"gpus_per_worker": "auto"}))
    assert runs_on_gpu(config({}, pool={"ray_address": "head:6379"}))
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert runs_on_gpu(config({}))


def test_plan_tells_what_was_assumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for clip, num_objects in (("a.mp4", 1), ("b.mp4", 4)):
        write_video(tmp_path / clip, num_frames=12)
        rows += [
            {"video": clip, "frame_idx": 0, "object_id": n + 1, "box_xyxy": [5, 5, 40, 40]}
            for n in range(num_objects)
        ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    weights = tmp_path / "sam2.1_hiera_small.pt"
    with zipfile.ZipFile(weights, "w") as file:
        file.writestr("archive/data.pkl", "only its name is looked at")
    tracker = ["--tracker", "samurai", "--checkpoint", str(weights)]
    tracker += ["--image-size", "512", "--device", "cpu"]

    def plan(*more: str) -> str:
        assert cli.main(["plan", str(tmp_path / "*.mp4"), *tracker, *more]) == 0
        return capsys.readouterr().out

    prompts = ["--prompts", str(tmp_path / "prompts.jsonl")]
    told = plan(*prompts)
    assert "samurai small at 512 pixels, 2.5 objects in a video: 90 GFLOP a frame" in told
    assert "0.09 TFLOP/s of one core" in told
    assert "4 objects in a video" in plan(*prompts, "--objects", "4")
    assert "1 object in a video (--objects)" in plan("--allow-unprompted")
    stated = plan(*prompts, "--fps", "7")
    assert "7 frames/s" in stated
    assert "assumed" not in stated
