"""One worker on one core against the plain loop a person would write, on the same clips.

The plain loop decodes with PyAV, steps the same tracker, encodes with pycocotools and writes one
Parquet file, in one thread. The worker does everything it does in a run: log, hashes, statistics,
heartbeats, parts and their upload to a local output. Both sit in one process that is held to one
core; they take turns, clip by clip, and the median of the pairs counts. Times run from the first
frame decoded to the last file closed; loading the model is outside. The processor time of both is
printed beside it: on a machine that others use too, it says more than the clock.

With ``--ray`` a second part does the same with whole runs: `jobs.driver.run` on a real Ray, driver
and raylet on one core, the one actor and the plain loop, in turns, on the other. The actor tracks
the clip once before its run begins, since the plain loop is warm, too.

With ``--scaling`` another part compares one worker on one core with two workers on two.

    python tests/benchmarks/one_core.py --tracker flow CLIP [CLIP ...] [--json FILE]
    python tests/benchmarks/one_core.py --tracker yolo11n-seg --checkpoint W.pt CLIP ...
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEARTBEAT_S = 1.0


@dataclass(frozen=True, slots=True)
class Task:
    """What both sides shall do.

    Attributes
    ----------
    tracker : str
        Name of the tracker.
    checkpoint : str or None
        Path of its weights.
    clips : tuple of str
        Video files.
    boxes : dict of str to list of box
        Per clip the boxes that prompt its first frame, pixels, xyxy.
    max_frames : int
        Frames of each clip that are tracked.
    """

    tracker: str
    checkpoint: str | None
    clips: tuple[str, ...]
    boxes: dict[str, list[tuple[float, float, float, float]]]
    max_frames: int


class PlainLoop:
    """The loop a person would write."""

    def __init__(self, task: Task, loader: Any, folder: Path) -> None:
        self.task = task
        self.loader = loader
        self.folder = folder

    def run(self, clip: str) -> tuple[int, float]:
        """Track one clip; return frames and seconds."""
        import av
        import numpy as np
        import pyarrow as pa
        import pyarrow.parquet as pq
        from pycocotools import mask as coco

        rows: list[dict[str, Any]] = []
        num_frames = 0
        begin = 0.0
        with av.open(clip) as container:
            session = None
            for frame in container.decode(video=0):
                if not num_frames:
                    begin = time.perf_counter()
                if num_frames == self.task.max_frames:
                    break
                image = frame.to_ndarray(format="rgb24")
                if session is None:
                    session = self.loader.open_session(*image.shape[:2])
                    for object_id, box in enumerate(self.task.boxes[clip], 1):
                        session.prompt(0, object_id, box_xyxy=box)
                for result in session.step(image):
                    for mask in result.masks:
                        encoded = coco.encode(np.asfortranarray(mask.mask))
                        x, y, w, h = coco.toBbox(encoded)
                        rows.append(
                            {
                                "frame_idx": result.frame_idx,
                                "object_id": mask.object_id,
                                "score": mask.confidence,
                                "bbox": [x, y, w, h],
                                "area": int(coco.area(encoded)),
                                "counts": encoded["counts"],
                            }
                        )
                num_frames += 1
            if session is not None:
                session.finish()
                session.close()
        table = pa.Table.from_pylist(rows)
        with pq.ParquetWriter(self.folder / "plain.parquet", table.schema, compression="zstd") as w:
            w.write_table(table)
        return num_frames, time.perf_counter() - begin


class Worker:
    """The worker of a run, with somebody who asks for its heartbeat."""

    def __init__(self, task: Task, folder: Path) -> None:
        from workers.actor import TrackingWorker
        from workers.messages import TrackerSpec, WorkerSpec

        self.task = task
        tracker = TrackerSpec(task.tracker, checkpoint=task.checkpoint, device="cpu")
        spec = WorkerSpec(
            run_id="benchmark", out_uri=str(folder / "out"), tracker=tracker, spool_dir=str(folder)
        )
        self.worker = TrackingWorker(spec, keep_log=True)
        self.worker.setup()
        self._num_attempts = 0
        threading.Thread(target=self._ask, daemon=True).start()

    def _ask(self) -> None:
        while True:
            self.worker.progress()
            time.sleep(HEARTBEAT_S)

    def run(self, clip: str) -> tuple[int, float]:
        """Track one clip; return frames and seconds."""
        from workers.messages import Proposal

        self._num_attempts += 1
        result = self.worker.process(attempt_for(self.task, clip, f"a{self._num_attempts}"))
        if not isinstance(result, Proposal):
            raise SystemExit(f"{result.message}\n{result.traceback}")
        num_frames = result.video["frames_tracked"]
        return num_frames, num_frames / result.video["fps_end_to_end"]


def attempt_for(task: Task, clip: str, attempt_id: str) -> Any:
    """Return the attempt that tracks one clip."""
    from workers.messages import Attempt, Prompt, SourceKind, VideoSource

    prompts = tuple(
        Prompt(object_id=object_id, frame_idx=0, box_xyxy=box)
        for object_id, box in enumerate(task.boxes[clip], 1)
    )
    source = VideoSource(
        1, clip, Path(clip).name, SourceKind.FILE, end_us=end_us(clip, task.max_frames)
    )
    return Attempt(attempt_id, 1, 1, source, prompts)


def end_us(clip: str, max_frames: int) -> int | None:
    """Return a time between the last wanted frame of a clip and the next, in microseconds."""
    import av

    with av.open(clip) as container:
        stream = container.streams.video[0]
        assert stream.average_rate is not None
        if stream.frames and stream.frames <= max_frames:
            return None
        return int((max_frames - 0.5) * 1_000_000 / stream.average_rate)


def hold_to(core: int) -> None:
    """Let this process, and all its threads to come, run on one core only."""
    for thread in Path("/proc/self/task").iterdir():  # an actor has many already
        os.sched_setaffinity(int(thread.name), {core})
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"


def pairs_on_one_core(task: Task, core: int, num_pairs: int, answer: Any) -> None:
    """Let loop and worker take turns; answer with one row per pair."""
    hold_to(core)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        worker = Worker(task, folder)
        loop = PlainLoop(task, worker.worker._loader, folder)
        first = min(task.clips, key=lambda clip: Path(clip).stat().st_size)
        for side in (loop, worker):  # nothing is timed cold
            side.run(first)
        rows = []
        for pair in range(num_pairs):
            sums = {"plain": [0.0, 0.0, 0.0], "worker": [0.0, 0.0, 0.0]}
            for clip in task.clips:
                sides: list[tuple[str, Any]] = [("plain", loop), ("worker", worker)]
                for side_name, side in sides if pair % 2 == 0 else reversed(sides):
                    cpu_begin = time.process_time()
                    num_frames, seconds = side.run(clip)
                    cpu_s = time.process_time() - cpu_begin
                    for slot, value in enumerate((num_frames, seconds, cpu_s)):
                        sums[side_name][slot] += value
            row = {}
            for side_name, (frames, seconds, cpu_s) in sums.items():
                row[side_name] = frames / seconds
                row[f"{side_name}_per_cpu_s"] = frames / cpu_s
            rows.append(row)
        worker.worker.destroy()
    answer.put(rows)


def plain_on_core(task: Task, core: int, asked: Any, answer: Any) -> None:
    """Run the plain loop over the clip that is asked for; answer with frames and seconds."""
    hold_to(core)
    from workers.messages import TrackerSpec
    from workers.trackers.base import TrackingConfig
    from workers.trackers.registry import create_tracking_loader

    name = TrackerSpec(task.tracker).name
    loader = create_tracking_loader(
        name, TrackingConfig(name, device="cpu", checkpoint_path=task.checkpoint)
    )
    loader.load()
    with tempfile.TemporaryDirectory() as folder:
        loop = PlainLoop(task, loader, Path(folder))
        while clip := asked.get():
            answer.put(loop.run(clip))


def run_on_ray(task: Task, clip: str, core: int, folder: Path) -> tuple[int, float]:
    """Run one clip with one actor on `core`; return frames and the seconds of their window."""
    import pyarrow.parquet as pq

    from jobs.config import RunConfig
    from jobs.driver import run
    from jobs.pool import RayPool
    from jobs.progress import SilentReporter
    from workers.actor import TrackingWorker
    from workers.messages import WorkerReady

    warm_up = attempt_for(task, clip, "warm-up")

    class Pinned(TrackingWorker):
        """A worker held to one core, warm before its first attempt, as the plain loop is."""

        def setup_on_node(self) -> None:
            hold_to(core)  # before it starts any thread
            super().setup_on_node()

        def setup(self) -> WorkerReady:
            ready = super().setup()
            self.process(warm_up)  # no commit names its parts, so nobody reads them
            return ready

    end = end_us(clip, task.max_frames)
    row = {"video": clip, "end_s": None if end is None else end / 1e6}
    prompts = [
        {"video": clip, "frame_idx": 0, "object_id": object_id, "box_xyxy": list(box)}
        for object_id, box in enumerate(task.boxes[clip], 1)
    ]
    for name, lines in (("manifest", [row]), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    config = RunConfig.model_validate(
        {
            "corpus": {"manifest": str(folder / "manifest.jsonl")},
            "out": {"uri": str(out)},
            "prompts": {"file": str(folder / "prompts.jsonl")},
            "tracker": {"name": task.tracker, "checkpoint": task.checkpoint, "device": "cpu"},
            "pool": {"workers": 1},
        }
    )
    summary = run(
        config,
        reporter=SilentReporter(),
        pool_factory=lambda given, spec: RayPool(spec, given.pool, worker_cls=Pinned),
    )
    if summary.exit_code:
        raise SystemExit(f"the run failed: {summary.quarantined}")
    (video,) = pq.read_table(out / "videos").to_pylist()
    return video["frames_tracked"], video["frames_tracked"] / video["fps_end_to_end"]


def pairs_on_ray(task: Task, cores: list[int], num_pairs: int) -> float:
    """Let the plain loop and whole runs take turns; print each pair, return the median ratio."""
    import ray

    hold_to(cores[0])
    context = multiprocessing.get_context("spawn")
    asked, answer = context.Queue(), context.Queue()
    child = context.Process(target=plain_on_core, args=(task, cores[-1], asked, answer))
    child.start()
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=40)
    ratios: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        for pair in range(-1, num_pairs):  # the first is not timed: nothing is warm
            totals = {"plain": [0, 0.0], "ray": [0, 0.0]}
            for clip in task.clips:
                asked.put(clip)
                sides = {
                    "plain": answer.get(),
                    "ray": run_on_ray(task, clip, cores[-1], Path(name)),
                }
                for side, (frames, seconds) in sides.items():
                    totals[side][0] += frames
                    totals[side][1] += seconds
            plain, worker = (frames / seconds for frames, seconds in totals.values())
            if pair >= 0:
                ratios.append(worker / plain)
                print(f"plain {plain:8.2f}   run on Ray {worker:8.2f} frames/s   {ratios[-1]:.3f}")
    asked.put(None)
    child.join()
    ray.shutdown()
    return float(statistics.median(ratios))


def worker_on_core(task: Task, core: int, start: Any, answer: Any) -> None:
    """Track all clips as soon as everybody is ready; answer with frames, begin and end."""
    hold_to(core)
    with tempfile.TemporaryDirectory() as name:
        worker = Worker(task, Path(name))
        worker.run(min(task.clips, key=lambda clip: Path(clip).stat().st_size))
        start.wait()
        begin = time.monotonic()
        num_frames = sum(worker.run(clip)[0] for clip in task.clips)
        answer.put((num_frames, begin, time.monotonic()))
        worker.worker.destroy()


def frames_per_s(task: Task, cores: list[int]) -> float:
    """Return the frames per second of one worker on each of the cores, all together."""
    context = multiprocessing.get_context("spawn")
    start, answer = context.Barrier(len(cores)), context.Queue()
    children = [
        context.Process(target=worker_on_core, args=(task, core, start, answer)) for core in cores
    ]
    for child in children:
        child.start()
    answers = [answer.get() for _ in children]
    for child in children:
        child.join()
    total = sum(frames for frames, _, _ in answers)
    return float(total / (max(a[2] for a in answers) - min(a[1] for a in answers)))


def find_boxes(
    clips: list[str], detector: str | None, max_objects: int
) -> dict[str, list[tuple[float, float, float, float]]]:
    """Return boxes on the first frame of each clip: detections, else one in the middle."""
    import av

    from workers.messages import DetectorSpec
    from workers.prompts.detector import create_detector

    network = None
    if detector is not None:
        spec = DetectorSpec("yolo11n", checkpoint=detector, max_objects=max_objects)
        network = create_detector(spec, device="cpu")
        network.load()
    boxes = {}
    for clip in clips:
        with av.open(clip) as container:
            image = next(container.decode(video=0)).to_ndarray(format="rgb24")
        height, width = image.shape[:2]
        found = [d.box_xyxy for d in network.detect(image)] if network is not None else []
        boxes[clip] = found or [(width * 0.35, height * 0.35, width * 0.65, height * 0.65)]
    return boxes


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clips", nargs="+", help="video files")
    parser.add_argument("--tracker", default="flow")
    parser.add_argument("--checkpoint", help="weights of the tracker")
    parser.add_argument("--detector", help="weights of yolo11n, for the boxes that are prompted")
    parser.add_argument("--max-objects", type=int, default=2)
    parser.add_argument("--max-frames", type=int, default=100, help="frames of each clip")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--ray", action="store_true", help="also whole runs on a real Ray")
    parser.add_argument("--scaling", action="store_true", help="also two workers on two cores")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()

    cores = sorted(os.sched_getaffinity(0))
    args.clips = [str(Path(clip).resolve()) for clip in args.clips]
    boxes = find_boxes(args.clips, args.detector, args.max_objects)
    task = Task(args.tracker, args.checkpoint, tuple(args.clips), boxes, args.max_frames)
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    child = context.Process(target=pairs_on_one_core, args=(task, cores[-1], args.pairs, answer))
    child.start()
    rows = answer.get()
    child.join()
    for row in rows:
        print(
            f"plain {row['plain']:8.2f}   worker {row['worker']:8.2f} frames/s   "
            f"{row['worker'] / row['plain']:.3f}   by processor time "
            f"{row['worker_per_cpu_s'] / row['plain_per_cpu_s']:.3f}"
        )
    by_clock = statistics.median(row["worker"] / row["plain"] for row in rows)
    by_cpu = statistics.median(row["worker_per_cpu_s"] / row["plain_per_cpu_s"] for row in rows)
    print(
        f"{args.tracker}: median of {len(rows)} pairs {by_clock:.3f}, "
        f"by processor time {by_cpu:.3f}"
    )
    figures: dict[str, Any] = {
        "tracker": args.tracker,
        "pairs": rows,
        "median_ratio": by_clock,
        "median_ratio_processor_time": by_cpu,
    }
    if (args.scaling or args.ray) and len(cores) < 2:
        raise SystemExit("--scaling and --ray need two cores")
    if args.scaling:
        ratios = []
        for _ in range(args.pairs):
            one, two = frames_per_s(task, cores[-1:]), frames_per_s(task, cores[-2:])
            ratios.append(two / one)
            print(f"one {one:8.2f}   two {two:8.2f} frames/s   {two / one:.3f}")
        figures["two_over_one"] = statistics.median(ratios)
        print(f"two workers over one: median {figures['two_over_one']:.3f}")
    if args.ray:
        figures["median_ratio_on_ray"] = pairs_on_ray(task, cores, args.pairs)
        print(f"{args.tracker}: median of {args.pairs} pairs {figures['median_ratio_on_ray']:.3f}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
