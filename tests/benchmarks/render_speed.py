"""How fast a film is made: 720p with five objects, the whole way from dataset to MP4.

A clip of moving texture is rendered, tracked by the tracker without vision (its masks are known
shapes), and drawn by `jobs.rendering.clip`, decoder and encoder included. The stages are then
measured one by one on the same frames, to say where the time goes.

    python tests/benchmarks/render_speed.py                # 900 frames, about 2 minutes
    python tests/benchmarks/render_speed.py --frames 60    # smoke run
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import av
import cv2
import numpy as np

from jobs import driver
from jobs.config import RunConfig
from jobs.dataset import Dataset, Video, open_dataset
from jobs.progress import SilentReporter
from jobs.rendering.clip import Run, render_video
from jobs.rendering.film import write_film
from jobs.rendering.overlay import Overlay
from jobs.rendering.sheet import caption_bar
from jobs.rendering.source import open_source, tracked_source
from jobs.threads import ThreadPool
from workers.messages import StoreOptions

WIDTH, HEIGHT = 1280, 720
NUM_OBJECTS = 5
TARGET_FPS = 60.0
STAGE_FRAMES = 120
"""Frames held in memory while the stages are measured one by one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=900)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        dataset = make_dataset(folder, arguments.frames)
        video = dataset.video("clip")
        share = video.num_masks and mean_share(dataset, video)
        print(
            f"{video.num_frames} frames of {WIDTH}x{HEIGHT}, {NUM_OBJECTS} objects that cover "
            f"{share:.0%} of each, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
        )
        # The libraries that draw are loaded once, before anything is timed.
        Overlay(8, 8, {})
        import supervision  # noqa: F401

        best = 0.0
        for _ in range(arguments.repeats):
            begin, busy = time.perf_counter(), time.process_time()
            made = render_video(
                Run(dataset, video), StoreOptions(), folder / "film.mp4", folder / "sheet.png"
            )
            wall_s, cpu_s = time.perf_counter() - begin, time.process_time() - busy
            best = max(best, made.num_frames / wall_s)
            size_mb = (folder / "film.mp4").stat().st_size / 1e6
            print(
                f"film: {made.num_frames / wall_s:.1f} frames/s, "
                f"{cpu_s / made.num_frames * 1e3:.1f} ms of CPU a frame, {size_mb:.1f} MB"
            )
        for name, milliseconds in stages(dataset, video, folder).items():
            print(f"  {name:<8} {milliseconds:6.2f} ms of CPU a frame")
        print(f"target {TARGET_FPS:.0f} frames/s: {'met' if best >= TARGET_FPS else 'NOT met'}")


def make_dataset(folder: Path, num_frames: int) -> Dataset:
    """Render the clip and track it."""
    (folder / "videos").mkdir()
    write_clip(folder / "videos" / "clip.mp4", num_frames)
    rows = []
    for index in range(NUM_OBJECTS):
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        centre = (60 + 200 * index + 60, 180 + 90 * (index % 4))
        cv2.ellipse(mask, centre, (90 + 12 * index, 120), 25 * index, 0, 360, 255, -1)
        # Not a smooth outline: real masks have hundreds of corners.
        noise = np.random.default_rng(index).random((HEIGHT // 4, WIDTH // 4), np.float32)
        rough = cv2.GaussianBlur(cv2.resize(noise, (WIDTH, HEIGHT)), (0, 0), 5)
        edge = cv2.GaussianBlur(mask, (0, 0), 9).astype(np.float32) / 255 + (rough - 0.5)
        cv2.imwrite(str(folder / f"{index}.png"), np.where(edge > 0.5, 255, 0).astype(np.uint8))
        rows.append(
            {
                "video": "clip.mp4",
                "frame_idx": 0,
                "object_id": index + 1,
                "label": "some thing",
                "mask": f"{index}.png",
                "mask_value": 255,
            }
        )
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config: dict[str, Any] = {
        "corpus": {"paths": (str(folder / "videos"),)},
        "out": {"uri": str(folder / "out")},
        "tracker": {"name": "fake", "options": {"shift_x": 0}},
        "prompts": {"file": str(folder / "prompts.jsonl")},
    }
    summary = driver.run(
        RunConfig.model_validate(config),
        reporter=SilentReporter(),
        pool_factory=lambda _, spec: ThreadPool(spec, 1),
    )
    assert summary.exit_code == 0, summary.quarantined
    return open_dataset(str(folder / "out"))


def write_clip(path: Path, num_frames: int) -> None:
    """Write moving texture with fine detail, which a coder has to work for."""
    generator = np.random.default_rng(5)
    field = generator.random((HEIGHT, 2 * WIDTH, 3), np.float32)
    texture = sum(
        weight * cv2.GaussianBlur(field, (0, 0), blur)
        for weight, blur in ((0.1, 1.0), (0.6, 4.0), (3.0, 24.0))
    )
    low, high = texture.min(), texture.max()
    canvas = ((texture - low) / (high - low) * 255).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(
            "libx264", rate=30, options={"preset": "veryfast", "crf": "23"}
        )
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index in range(num_frames):
            left = index % WIDTH
            picture = np.ascontiguousarray(canvas[:, left : left + WIDTH])
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def mean_share(dataset: Dataset, video: Video) -> float:
    """Return the share of the picture that the objects cover, overlaps counted twice."""
    areas = dataset.table("masks", columns=("area",), video_key=video.video_key)["area"]
    return float(areas.to_numpy().sum()) / (WIDTH * HEIGHT * video.num_frames)


def stages(dataset: Dataset, video: Video, folder: Path) -> dict[str, float]:
    """Return the milliseconds of CPU per frame of each stage on its own."""
    source = tracked_source(video, StoreOptions())
    frames = list(itertools.islice(dataset.frames(video), STAGE_FRAMES))
    taken: dict[str, float] = {}

    def lap(name: str, since: float) -> None:
        taken[name] = (time.process_time() - since) / len(frames) * 1e3

    with open_source(source, StoreOptions()) as reader:
        begin = time.process_time()
        images = [decoded.image for decoded in itertools.islice(reader, len(frames))]
        lap("decode", begin)
    overlay = Overlay(HEIGHT, WIDTH, dataset.categories)
    begin = time.process_time()
    drawn = [overlay.draw(image, frame) for image, frame in zip(images, frames, strict=True)]
    lap("draw", begin)
    begin = time.process_time()
    drawn = [
        np.concatenate([each, caption_bar(WIDTH, 40, "frame 1   5 objects")]) for each in drawn
    ]
    lap("caption", begin)
    begin = time.process_time()
    with write_film(folder / "stage.mp4", HEIGHT + 40, WIDTH, 30.0) as film:
        for index, picture in enumerate(drawn):
            film.write(picture, index * 33_333, 33_333)
    lap("encode", begin)
    return taken


if __name__ == "__main__":
    main()
