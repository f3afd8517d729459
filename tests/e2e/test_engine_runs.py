"""The trackers on SAM 2 in the product: the command line, Ray, and drivers that die.

* `samurai`, `sam2long`, `sam2-rt` and `sam2video` run over a corpus on the reference weights, with
  two videos per worker at once. The dataset equals, row for row, what the driver makes without Ray
  and with one video at a time; `verify --deep` finds it whole.
* That holds, too, after a driver got SIGKILL in the middle and the same command was given again.
* With a checkpoint that can segment but not track, and a detector asked on every frame, objects
  keep their identities, and every mask is where its detection is.

By hand at the size of the reference outputs, each tracker killed:

    MASKMILL_IMAGE_SIZE=512 python -m pytest -n0 tests/e2e/test_engine_runs.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from jobs import cli, driver
from jobs.commit_log import read_state
from jobs.config import RunConfig
from jobs.progress import SilentReporter
from jobs.threads import ThreadPool
from tests.cluster import RayCluster, ray_cluster
from tests.datasets import assert_same, assert_whole, read_table, results
from tests.e2e.corpora import finish, maskmill
from tests.engine import reference
from tests.engine.test_frames import checkpoint as image_only
from tests.engine.transformers_layout import converted
from tests.media import shared_dir
from tests.networks import real_checkpoint
from workers.masks import box_iou_matrix
from workers.storage import open_store

NAMES = ("samurai", "sam2long", "sam2-rt", "sam2video")
IMAGE_SIZE = int(os.environ.get("MASKMILL_IMAGE_SIZE", "128"))
IS_FULL = IMAGE_SIZE >= reference.IMAGE_SIZE
KILLED = NAMES if IS_FULL else ("samurai", "sam2long")
"""What a driver leaves behind does not depend on the tracker, but for frames that are undecided."""
NUM_CLIPS, NUM_FRAMES = (3, 6) if IS_FULL else (2, 8)
PATIENCE_S = 3000 if IS_FULL else 300
BOXES = {1: (0.31, 0.0, 0.54, 0.73), 2: (0.17, 0.24, 0.30, 0.76)}
"""Corners as shares of the picture; the second object is there from the third frame on."""


def pictures(clip: int) -> Sequence[NDArray[np.uint8]]:
    """Return the pictures of one clip, RGB, with even sides."""
    step = 1 if IS_FULL else 4
    frames = reference.frames()[4 * clip :][:NUM_FRAMES]
    return [np.ascontiguousarray(frame[:536:step, ::step]) for frame in frames]


def write_corpus(folder: Path) -> dict[str, int]:
    """Write the clips and ``prompts.jsonl`` beside them; return the frames of each."""
    folder.mkdir()
    frames, rows = {}, []
    for clip in range(NUM_CLIPS):
        shown = pictures(clip)
        name = f"clip-{clip}.mp4"
        frames[name] = len(shown)
        with av.open(str(folder / name), "w") as container:
            stream: Any = container.add_stream("h264", rate=24, options={"preset": "ultrafast"})
            stream.height, stream.width = height, width = shown[0].shape[:2]
            stream.pix_fmt = "yuv420p"
            for picture in shown:
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        for object_id, box in BOXES.items():
            sides = (width, height, width, height)
            xyxy = [round(share * side) for share, side in zip(box, sides, strict=True)]
            row = {"video": name, "frame_idx": 2 * (object_id - 1), "object_id": object_id}
            rows.append(json.dumps(row | {"label": "thing", "box_xyxy": xyxy}))
    (folder.parent / "prompts.jsonl").write_text("\n".join(rows))
    return frames


@dataclass(frozen=True)
class Corpus:
    """Clips, prompts for them, and the tracker's weights for the commands over them."""

    folder: Path
    frames: dict[str, int]

    @property
    def prompts(self) -> Path:
        return self.folder.parent / "prompts.jsonl"

    def weights(self, tracker: str) -> Path:
        made = reference.checkpoint() if IS_FULL else reference.small_checkpoint()
        return converted(made) / "model.safetensors" if tracker == "sam2video" else made

    def start(
        self, tracker: str, out: Path, cluster: RayCluster, *, in_flight: int
    ) -> subprocess.Popen[str]:
        return maskmill(
            *("run", self.folder, "--out", out, "--prompts", self.prompts),
            *("--tracker", tracker, "--checkpoint", self.weights(tracker)),
            *("--image-size", IMAGE_SIZE, "--workers", 1, "--videos-per-worker", in_flight),
            *("--stuck-after", PATIENCE_S),
            env=cluster.environment,
        )

    def track_here(self, tracker: str, out: Path) -> None:
        """Track the corpus undisturbed, in this process and without Ray."""
        config: dict[str, Any] = {
            "corpus": {"paths": [str(self.folder)]},
            "out": {"uri": str(out)},
            "tracker": {
                "name": tracker,
                "checkpoint": str(self.weights(tracker)),
                "image_size": IMAGE_SIZE,
            },
            "prompts": {"file": str(self.prompts)},
            "pool": {"stuck_after_s": PATIENCE_S},
        }
        run_here(config)


def run_here(config: dict[str, Any]) -> None:
    summary = driver.run(
        RunConfig.model_validate(config),
        reporter=SilentReporter(),
        pool_factory=lambda _, spec: ThreadPool(spec),
    )
    assert summary.exit_code == 0, summary


def kill_in_the_middle(corpus: Corpus, tracker: str, out: Path, cluster: RayCluster) -> None:
    """Run until one video is tracked and others are not, and SIGKILL the driver."""
    driver_process = corpus.start(tracker, out, cluster, in_flight=1)
    deadline = time.monotonic() + PATIENCE_S
    while not list(out.glob("_staging/1/*/frames-0.parquet")):
        assert driver_process.poll() is None, finish(driver_process)
        assert time.monotonic() < deadline, "no video was tracked"
        time.sleep(0.02)
    os.killpg(driver_process.pid, signal.SIGKILL)
    driver_process.communicate()
    assert not read_state(open_store(str(out))).closed, "the run ended before it could be killed"


@dataclass(frozen=True)
class Runs:
    """What the runs of all trackers left.

    Attributes
    ----------
    corpus : Corpus
        What was tracked.
    resumed, calm : Path
        Outputs, by tracker: of runs on Ray, some killed and resumed, and of undisturbed ones.
    """

    corpus: Corpus
    resumed: Path
    calm: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Run every tracker on one cluster, and undisturbed in this process beside it."""
    place = tmp_path_factory.mktemp("engine")
    corpus = Corpus(place / "corpus", write_corpus(place / "corpus"))
    for tracker in NAMES:
        corpus.weights(tracker)  # written once, here

    def disturbed(tracker: str) -> None:
        out = place / "resumed" / tracker
        if tracker in KILLED:
            kill_in_the_middle(corpus, tracker, out, cluster)
        resumed = corpus.start(tracker, out, cluster, in_flight=2)
        code, told = finish(resumed, PATIENCE_S)
        assert code == 0, told

    with ray_cluster(num_nodes=0, head_cpus=8) as cluster, ThreadPoolExecutor(2) as threads:
        pending = [threads.submit(disturbed, tracker) for tracker in NAMES]
        for tracker in NAMES:
            corpus.track_here(tracker, place / "calm" / tracker)
        for done in pending:
            done.result()
    return Runs(corpus, place / "resumed", place / "calm")


@pytest.mark.parametrize("tracker", NAMES)
def test_a_run_on_ray_gives_what_an_undisturbed_one_gives(
    runs: Runs, tracker: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = runs.resumed / tracker
    assert_whole(out, runs.corpus.frames)
    assert_same(out, results(runs.calm / tracker))
    assert cli.main(["verify", str(out), "--deep"]) == 0, capsys.readouterr()
    objects = read_table(out, "objects").to_pylist()
    assert {row["object_id"] for row in objects} == set(BOXES)
    assert any(row["frames_visible"] > 2 for row in objects)
    (weights,) = {row["weights_sha256"] for row in read_table(out, "videos").to_pylist()}
    assert weights


def test_detections_on_every_frame_become_masks_with_stable_identities(tmp_path: Path) -> None:
    # Given a checkpoint without a memory, a real detector, and twelve frames of a real clip
    clip = shared_dir() / "data" / "videos" / "bedroom.mp4"
    (tmp_path / "one.csv").write_text(f"video,end_s,stride\n{clip},0.38,2\n")
    out = tmp_path / "out"
    # When every other frame is tracked
    run_here(
        {
            "corpus": {"manifest": str(tmp_path / "one.csv")},
            "out": {"uri": str(out)},
            "tracker": {"name": "sam2", "checkpoint": str(image_only()), "image_size": 256},
            "prompts": {
                "mode": "every_frame",
                "detector": {"name": "yolo11n", "checkpoint": str(real_checkpoint("yolo11n.pt"))},
            },
        }
    )
    # Then whatever is surely there, a child or a bed, is one object from beginning to end
    frames = [row["frame_idx"] for row in read_table(out, "frames").to_pylist()]
    assert len(frames) == 6
    prompts = read_table(out, "prompts").to_pylist()
    scores: dict[int, list[float]] = {}
    for row in prompts:
        scores.setdefault(row["object_id"], []).append(row["score"])
    sure = [object_id for object_id, seen in scores.items() if np.mean(seen) > 0.7]
    assert len(sure) >= 2
    assert all(len(scores[object_id]) == len(frames) for object_id in sure)
    assert len(scores) <= max(frames_of(prompts).values()) + 1
    # And each mask is where its detection is, on the frames that have one
    boxes = {(row["frame_idx"], row["object_id"]): row["payload"] for row in prompts}
    masks = read_table(out, "masks").to_pylist()
    assert {(row["frame_idx"], row["object_id"]) for row in masks} == set(boxes)
    for row in masks:
        x0, y0 = row["bbox_x"], row["bbox_y"]
        ours = [(x0, y0, x0 + row["bbox_w"], y0 + row["bbox_h"])]
        theirs = [json.loads(boxes[row["frame_idx"], row["object_id"]])["box_xyxy"]]
        assert box_iou_matrix(ours, theirs)[0, 0] > 0.5


def frames_of(rows: list[dict[str, Any]]) -> Counter[int]:
    """Return how many rows each frame has."""
    return Counter(row["frame_idx"] for row in rows)
