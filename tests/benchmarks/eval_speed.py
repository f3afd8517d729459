"""Evaluation against the reference implementations: the same numbers, and how much faster.

OUT is a run over sequences in DAVIS layout, DIR their ground truth, REFERENCE a folder with the
reference implementations, which are no dependency:

    pip install --no-deps --target REFERENCE trackeval==1.3.0 tabulate==0.10.0 vos-benchmark==0.1.0
    python tests/benchmarks/eval_speed.py OUT --gt DIR --reference REFERENCE
        [--processes 1 2] [--repeat 3] [--json FILE]

The masks of both sides are first written as PNG of object ids, which is what the references read;
that is not timed. vos-benchmark then evaluates J and F with so many processes, and maskmill J, F,
HOTA, MOTA and IDF1 from OUT's own tables with so many threads; both read their files from the
page cache, in turns, and the median of `--repeat` turns counts, by the clock and by processor
time. Then every number is compared: J and F of each object with vos-benchmark's, HOTA, DetA, AssA,
MOTA, IDF1 and switches of each sequence and of all with TrackEval's own loader and metrics. The
exit code is 1 if one differs by more than 1e-3. vos-benchmark counts an object from the frame on
that first shows it, DAVIS and maskmill always: objects that come later would differ.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jobs.dataset import Dataset, open_dataset
from jobs.evaluation.pairing import pair_videos
from jobs.evaluation.runs import (
    TRACKING_MEASURES,
    Evaluation,
    describe_object,
    evaluate_run,
    summarise,
)
from jobs.ground_truth import GroundTruth, open_ground_truth

TOLERANCE = 1e-3
TRACKER = "run"


def write_pictures(dataset: Dataset, truth: GroundTruth, folder: Path) -> dict[str, str]:
    """Write both sides as PNG of object ids; return the folder's name of each video."""
    names = {}
    for number, (key, sequence) in enumerate(pair_videos(dataset, truth.sequences).pairs):
        video = dataset.video(key)
        name = names[video.name] = f"{number:04d}"
        true_folder = folder / "gt" / name
        found_folder = folder / "trackers" / TRACKER / "data" / name
        true_folder.mkdir(parents=True)
        found_folder.mkdir(parents=True)
        known = {frame.frame_idx: frame for frame in truth.frames(sequence)}
        for frame in dataset.frames(video):
            if frame.frame_idx not in known:
                continue
            shape = video.height, video.width
            true, found = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
            for object_id, mask in known[frame.frame_idx].masks.items():
                true[mask.paste(*shape) > 0] = object_id
            for stored in frame.masks:
                found[stored.decode() > 0] = stored.object_id
            void = known[frame.frame_idx].void
            if void is not None:
                found[void] = 0
            Image.fromarray(true).save(true_folder / f"{frame.frame_idx:05d}.png")
            Image.fromarray(found).save(found_folder / f"{frame.frame_idx:05d}.png")
    return names


def run_vos_benchmark(folder: Path, processes: int) -> dict[str, Any]:
    """Return J and F, 0..100, per folder and object."""
    module = importlib.import_module("vos_benchmark.benchmark")
    # tqdm and prints of the reference are of no interest.
    with contextlib.redirect_stdout(io.StringIO()):
        *_, objects = module.benchmark(
            [str(folder / "gt")],
            [str(folder / "trackers" / TRACKER / "data")],
            num_processes=processes,
            verbose=False,
        )
    found: dict[str, Any] = objects[0]
    return found


def run_trackeval(folder: Path) -> dict[str, dict[str, float]]:
    """Return TrackEval's measures per folder, and of all under an empty name."""
    with contextlib.redirect_stdout(io.StringIO()):
        trackeval = importlib.import_module("trackeval")
        dataset = trackeval.datasets.DAVIS(
            {
                "GT_FOLDER": str(folder / "gt"),
                "TRACKERS_FOLDER": str(folder / "trackers"),
                "TRACKERS_TO_EVAL": [TRACKER],
                "PRINT_CONFIG": False,
            }
        )
        quiet = {"PRINT_CONFIG": False}
        metrics = [
            trackeval.metrics.HOTA(),
            trackeval.metrics.CLEAR(quiet),
            trackeval.metrics.Identity(quiet),
        ]
        results: dict[str, list[Any]] = {}
        for name in sorted(dataset.seq_list):
            raw = dataset.get_raw_seq_data(TRACKER, name)
            data = dataset.get_preprocessed_seq_data(raw, "general")
            results[name] = [metric.eval_sequence(data) for metric in metrics]
        results[""] = [
            metric.combine_sequences({name: parts[i] for name, parts in results.items()})
            for i, metric in enumerate(metrics)
        ]
    return {
        name: {
            "hota": float(np.mean(hota["HOTA"])),
            "det_a": float(np.mean(hota["DetA"])),
            "ass_a": float(np.mean(hota["AssA"])),
            "mota": float(clear["MOTA"]),
            "idf1": float(identity["IDF1"]),
            "num_switches": float(clear["IDSW"]),
        }
        for name, (hota, clear, identity) in results.items()
    }


def largest_differences(
    evaluation: Evaluation, names: dict[str, str], folder: Path, vos: dict[str, Any]
) -> dict[str, float]:
    """Return the largest difference from the references by measure."""
    worst: dict[str, float] = dict.fromkeys(("j_mean", "f_mean", *TRACKING_MEASURES), 0.0)

    def note(measure: str, ours: float | int | None, theirs: float) -> None:
        difference = abs((ours if ours is not None else float("nan")) - theirs)
        worst[measure] = max(worst[measure], difference) if difference == difference else np.inf

    for score in evaluation.objects:
        region, boundary = vos[names[score.video]]
        measures = describe_object(score)
        note("j_mean", measures["j_mean"], region[score.object_id] / 100)
        note("f_mean", measures["f_mean"], boundary[score.object_id] / 100)
    reference = run_trackeval(folder)
    for name, sequences in [
        *((names[s.video], [s]) for s in evaluation.sequences),
        ("", list(evaluation.sequences)),
    ]:
        ours = summarise(sequences)
        for measure in TRACKING_MEASURES:
            note(measure, ours[measure], reference[name][measure])
    return worst


def timed(function: Callable[[], Any]) -> tuple[float, float, Any]:
    """Return seconds by the clock, of processors (children included), and the result."""
    before = os.times()
    result = function()
    after = os.times()
    spent = [after[i] - before[i] for i in range(5)]
    return spent[4], sum(spent[:4]), result


def main() -> int:
    """Measure, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--gt", required=True, metavar="DIR")
    parser.add_argument("--reference", required=True, type=Path)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sys.path.append(str(arguments.reference))

    dataset, truth = open_dataset(arguments.out), open_ground_truth(arguments.gt)
    report: dict[str, Any] = {"out": arguments.out, "rows": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = write_pictures(dataset, truth, folder)
        # Imports and the page cache are warm before the first turn.
        evaluation = evaluate_run(dataset, truth, num_threads=1)
        vos = run_vos_benchmark(folder, 1)
        num_frames = sum(sequence.num_frames for sequence in evaluation.sequences)
        print(f"{len(names)} sequences, {len(evaluation.objects)} objects, {num_frames} frames")
        print("workers  vos-benchmark s (cpu)  maskmill s (cpu)  ratio (cpu)")
        for workers in arguments.processes:
            turns = [
                (
                    timed(lambda n=workers: run_vos_benchmark(folder, n))[:2],  # type: ignore[misc]
                    timed(lambda n=workers: evaluate_run(dataset, truth, num_threads=n))[:2],  # type: ignore[misc]
                )
                for _ in range(arguments.repeat)
            ]
            theirs, theirs_cpu, ours, ours_cpu = (
                statistics.median(turn[side][kind] for turn in turns)
                for side in (0, 1)
                for kind in (0, 1)
            )
            print(
                f"{workers:>7}  {theirs:>12.2f} ({theirs_cpu:.2f})  {ours:>9.2f} ({ours_cpu:.2f})  "
                f"{theirs / ours:>5.1f} ({theirs_cpu / ours_cpu:.1f})"
            )
            report["rows"].append(
                {
                    "workers": workers,
                    "vos_benchmark_s": theirs,
                    "vos_benchmark_cpu_s": theirs_cpu,
                    "maskmill_s": ours,
                    "maskmill_cpu_s": ours_cpu,
                }
            )
        worst = largest_differences(evaluation, names, folder, vos)
    report["largest_differences"] = worst
    print("largest difference from the references:")
    for measure, difference in worst.items():
        print(f"  {measure:<13}{difference:.2e}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))
    is_equal = max(worst.values()) <= TOLERANCE
    print("equal" if is_equal else f"NOT EQUAL: a difference is above {TOLERANCE}")
    return int(not is_equal)


if __name__ == "__main__":
    sys.exit(main())
