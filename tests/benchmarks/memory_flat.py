"""Peak memory of a worker against the length of the video: it must not depend on it.

A clip is written, then one fresh process per length tracks that many frames of it and reports its
peak resident memory. The lengths take turns, several times, and the medians are compared.

    python tests/benchmarks/memory_flat.py [--tracker flow] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, FPS = 640, 360, 25


def write_clip(path: Path, num_frames: int) -> None:
    """Write a clip in which textured squares circle over a textured ground."""
    import av
    import numpy as np

    rng = np.random.default_rng(0)
    ground = np.kron(rng.integers(0, 120, (HEIGHT // 8, WIDTH // 8, 3)), np.ones((8, 8, 1)))
    square = np.kron(rng.integers(120, 255, (12, 12, 3)), np.ones((6, 6, 1))).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("h264", rate=FPS, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for idx in range(num_frames):
            image = ground.astype(np.uint8)
            for object_id in range(2):
                angle = idx / 60 + object_id * np.pi
                x = int(WIDTH / 2 - 36 + 180 * np.cos(angle))
                y = int(HEIGHT / 2 - 36 + 90 * np.sin(angle))
                image[y : y + 72, x : x + 72] = square
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def peak_bytes(clip: str, num_frames: int, tracker: str, checkpoint: str | None, out: Any) -> None:
    """Track frames of the clip with a worker in this process; answer with its peak memory."""
    from workers.actor import TrackingWorker
    from workers.messages import (
        Attempt,
        Prompt,
        Proposal,
        SourceKind,
        TrackerSpec,
        VideoSource,
        WorkerSpec,
    )

    with tempfile.TemporaryDirectory() as folder:
        spec = WorkerSpec(
            run_id="benchmark",
            out_uri=f"{folder}/out",
            tracker=TrackerSpec(tracker, checkpoint=checkpoint, device="cpu"),
            spool_dir=folder,
        )
        worker = TrackingWorker(spec, keep_log=True)
        worker.setup()
        boxes = [(464, 144, 536, 216), (104, 144, 176, 216)]
        prompts = tuple(Prompt(object_id=n, frame_idx=0, box_xyxy=b) for n, b in enumerate(boxes))
        end_us = round((num_frames - 0.5) / FPS * 1e6)
        source = VideoSource(1, clip, "clip", SourceKind.FILE, end_us=end_us)
        result = worker.process(Attempt("a", 1, 1, source, prompts))
        if not isinstance(result, Proposal) or result.video["frames_tracked"] != num_frames:
            raise SystemExit(f"not tracked: {result}")
        out.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        worker.destroy()


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tracker", default="flow")
    parser.add_argument("--checkpoint", help="weights of the tracker")
    parser.add_argument("--lengths", type=int, nargs=2, default=[200, 4000], help="in frames")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    context = multiprocessing.get_context("spawn")
    peaks: dict[int, list[int]] = {length: [] for length in args.lengths}
    with tempfile.TemporaryDirectory() as folder:
        clip = str(Path(folder) / "clip.mp4")
        write_clip(Path(clip), max(args.lengths))
        for _ in range(args.repeats):
            for length in args.lengths:
                out = context.Queue()
                child = context.Process(
                    target=peak_bytes, args=(clip, length, args.tracker, args.checkpoint, out)
                )
                child.start()
                peaks[length].append(out.get())
                child.join()
                print(f"{length:6} frames {peaks[length][-1] / 2**20:9.1f} MiB", flush=True)
    medians = {length: statistics.median(values) for length, values in peaks.items()}
    growth = medians[max(args.lengths)] / medians[min(args.lengths)] - 1
    print(f"{args.tracker}: {max(args.lengths)} against {min(args.lengths)} frames: {growth:+.2%}")
    if args.json:
        figures = {"tracker": args.tracker, "peak_bytes": medians, "growth": growth}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
