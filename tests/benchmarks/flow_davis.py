"""Quality and speed of the flow tracker on sequences in DAVIS layout, on one core.

Each folder below DIR holds ``frames`` (or ``JPEGImages``) and ``masks`` (or ``Annotations``), one
image each per frame under the same name; masks are binary (any value above 0 is the object) or,
with ``--indexed``, hold one object per value (255 is void). Objects are prompted with their masks
on the first frame; the first and the last frame do not count. Frames are decoded beforehand, so
the rate is the tracker's alone: by the clock, and by processor time, which says more on a machine
that others use too. OpenCV is held to one thread and the process to one core. Results
do not depend on any of that, so the table of J and F is the same on every run.

    python tests/benchmarks/flow_davis.py DIR [--sequence NAME ...] [--option KEY=VALUE ...]
        [--tracker NAME] [--reverse] [--indexed] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.evaluation.davis import ObjectScore, evaluate_object
from workers.trackers.base import TrackingConfig, TrackingFrame, TrackingModelLoader
from workers.trackers.registry import create_tracking_loader

VOID = 255
Image = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Row:
    """One object of one sequence, with the rates of the whole sequence."""

    sequence: str
    object_id: int
    num_frames: int
    j_mean: float
    j_recall: float
    j_decay: float
    f_mean: float
    f_recall: float
    f_decay: float
    j_and_f: float
    frames_per_s: float
    frames_per_cpu_s: float


def subfolder(sequence: Path, *names: str) -> Path:
    for name in names:
        if (sequence / name).is_dir():
            return sequence / name
    raise SystemExit(f"{sequence} holds neither {' nor '.join(names)}")


def read_sequence(sequence: Path, *, indexed: bool) -> tuple[list[Image], list[Image]]:
    """Return the frames, RGB, and per frame an image of object ids (0 background, 255 void)."""
    import cv2
    from PIL import Image as Picture

    masks_dir = subfolder(sequence, "masks", "Annotations")
    names = sorted(p for p in masks_dir.iterdir() if p.suffix == ".png")
    frames_dir = subfolder(sequence, "frames", "JPEGImages")
    frames, labels = [], []
    for name in names:
        frame = cv2.imread(str(frames_dir / f"{name.stem}.jpg"))
        if frame is None:
            raise SystemExit(f"{frames_dir / name.stem}.jpg cannot be read")
        frames.append(np.ascontiguousarray(frame[:, :, ::-1]).astype(np.uint8))
        values = np.asarray(Picture.open(name))
        labels.append(values.astype(np.uint8) if indexed else (values > 0).astype(np.uint8))
    return frames, labels


def measure(
    loader: TrackingModelLoader, name: str, frames: Sequence[Image], labels: Sequence[Image]
) -> list[Row]:
    """Track one sequence and score each object that the first frame shows."""
    object_ids = [int(i) for i in np.unique(labels[0]) if i not in (0, VOID)]
    wall, cpu = time.perf_counter(), time.process_time()
    results: list[TrackingFrame] = []
    with loader.open_session(*frames[0].shape[:2]) as session:
        for object_id in object_ids:
            session.prompt(0, object_id, mask=labels[0] == object_id)
        for frame in frames:
            results += session.step(frame)
        results += session.finish()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    rows = []
    for object_id in object_ids:
        found = [
            next((m.mask for m in result.masks if m.object_id == object_id), None)
            for result in results
        ]
        score = evaluate_object(
            found,
            [image == object_id for image in labels],
            voids=[image == VOID for image in labels],
        )
        rows.append(_row(name, object_id, len(frames), score, wall, cpu))
    return rows


def _row(
    name: str, object_id: int, num_frames: int, score: ObjectScore, wall_s: float, cpu_s: float
) -> Row:
    return Row(
        sequence=name,
        object_id=object_id,
        num_frames=num_frames,
        j_mean=score.region.mean,
        j_recall=score.region.recall,
        j_decay=score.region.decay,
        f_mean=score.boundary.mean,
        f_recall=score.boundary.recall,
        f_decay=score.boundary.decay,
        j_and_f=score.j_and_f,
        frames_per_s=num_frames / wall_s,
        frames_per_cpu_s=num_frames / cpu_s,
    )


def print_table(rows: Sequence[Row]) -> None:
    columns = [c for c in asdict(rows[0]) if c not in ("sequence", "object_id", "num_frames")]
    head = f"{'sequence':<20} {'id':>3} {'frames':>6} "
    print(head + " ".join(f"{c.replace('frames_per_', 'f/'):>8}" for c in columns))
    for row in rows:
        values = asdict(row)
        cells = " ".join(_cell(c, values[c]) for c in columns)
        print(f"{row.sequence:<20} {row.object_id:>3} {row.num_frames:>6} {cells}")
    means = {c: float(np.mean([asdict(r)[c] for r in rows])) for c in columns}
    # The rate of all frames together, not the mean of rates. Objects share their sequence's time.
    for column in ("frames_per_s", "frames_per_cpu_s"):
        seconds = {r.sequence: r.num_frames / asdict(r)[column] for r in rows}
        total = sum({r.sequence: r.num_frames for r in rows}.values())
        means[column] = total / sum(seconds.values())
    cells = " ".join(_cell(c, means[c]) for c in columns)
    print(f"{'mean':<20} {'':>3} {'':>6} {cells}")


def _cell(column: str, value: float) -> str:
    return f"{value:>8.1f}" if column.startswith("frames") else f"{value:>8.3f}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("dir", type=Path, metavar="DIR")
    parser.add_argument("--tracker", default="flow")
    parser.add_argument("--checkpoint")
    parser.add_argument("--sequence", action="append", help="only this one; may be repeated")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--reverse", action="store_true", help="from the last frame to the first")
    parser.add_argument("--indexed", action="store_true", help="one object per mask value")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    arguments = parser.parse_args()

    # One core for the whole process, whatever threads libraries start.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import cv2

    cv2.setNumThreads(1)
    options: dict[str, Any] = dict(option.split("=", 1) for option in arguments.option)
    config = TrackingConfig(
        arguments.tracker,
        device="cpu",
        checkpoint_path=arguments.checkpoint,
        options=options,
    )
    loader = create_tracking_loader(arguments.tracker, config)
    loader.load()
    names = arguments.sequence or sorted(p.name for p in arguments.dir.iterdir() if p.is_dir())
    rows: list[Row] = []
    for name in names:
        frames, labels = read_sequence(arguments.dir / name, indexed=arguments.indexed)
        if arguments.reverse:
            frames, labels = frames[::-1], labels[::-1]
        rows += measure(loader, name, frames, labels)
    print_table(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
