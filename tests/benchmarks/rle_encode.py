"""Masks to COCO compressed counts: `workers.rle` against pycocotools, on one core, in one run.

Every mask is encoded by both, the bytes are compared, and the ratio of the times is printed: the
median over real masks (DAVIS, scaled to 1080p), and the smallest over masks whose box covers the
frame. Both calls see the same C-ordered uint8 mask, as a tracker leaves it; they take turns, and
each time is the best of several.

    python tests/benchmarks/rle_encode.py --davis FOLDER [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco

from workers import rle

Mask = NDArray[np.uint8]

HEIGHT, WIDTH = 1080, 1920
REPEATS = 5


def best_s(call: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Return the shortest time of a call, in seconds."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def compare(mask: Mask) -> dict[str, float]:
    """Return both times for one mask, in milliseconds, and their ratio."""
    expected = coco.encode(np.asfortranarray(mask))["counts"]
    if rle.encode(mask) != expected or rle.encode_with_stats(mask).counts != expected:
        raise SystemExit("the counts differ from those of pycocotools")
    theirs = best_s(lambda: coco.encode(np.asfortranarray(mask)))
    ours = best_s(lambda: rle.encode(mask))
    with_stats = best_s(lambda: rle.encode_with_stats(mask))
    return {
        "pycocotools_ms": theirs * 1e3,
        "encode_ms": ours * 1e3,
        "encode_with_stats_ms": with_stats * 1e3,
        "ratio": theirs / ours,
        "ratio_with_stats": theirs / with_stats,
    }


def davis_masks(folder: Path, every: int) -> list[Mask]:
    """Return every n-th mask of the sequences below `folder`, scaled to 1080p."""
    masks = []
    for path in sorted(folder.glob("*/masks/*.png"))[::every]:
        picture = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        scaled = cv2.resize(picture, (WIDTH, HEIGHT), interpolation=cv2.INTER_NEAREST)
        masks.append(np.ascontiguousarray((scaled > 0).astype(np.uint8)))
    if not masks:
        raise SystemExit(f"no masks below {folder}: expected NAME/masks/*.png")
    return masks


def frame_filling_masks() -> dict[str, Mask]:
    """Return masks whose box is the whole frame, from simple to hopeless."""
    rng = np.random.default_rng(0)
    empty = np.zeros((HEIGHT, WIDTH), np.uint8)
    ellipse = cv2.ellipse(empty.copy(), (960, 540), (960, 540), 0, 0, 360, 1, -1)
    masks = {"full": empty + 1, "ellipse": ellipse, "frame": empty + 1}
    masks["frame"][40:-40, 40:-40] = 0
    for cells in (20, 100, 400):
        noise = rng.random((cells * 9 // 16, cells)).astype(np.float32)
        big = cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        masks[f"blobs, {cells} across"] = (big > 0.5).astype(np.uint8)
    masks["noise"] = (rng.random((HEIGHT, WIDTH)) > 0.5).astype(np.uint8)
    return masks


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--davis", type=Path, required=True, help="folder of DAVIS sequences")
    parser.add_argument("--every", type=int, default=1, help="take every n-th mask")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    cv2.setNumThreads(1)

    real = [compare(mask) for mask in davis_masks(args.davis, args.every)]
    medians = {key: statistics.median(row[key] for row in real) for key in real[0]}
    filling = {name: compare(mask) for name, mask in frame_filling_masks().items()}

    print(f"{'masks':24} {'pycocotools':>12} {'encode':>9} {'stats':>9} {'ratio':>7} {'stats':>7}")
    for name, row in {f"DAVIS median of {len(real)}": medians, **filling}.items():
        print(
            f"{name:24} {row['pycocotools_ms']:9.3f} ms {row['encode_ms']:6.3f} ms "
            f"{row['encode_with_stats_ms']:6.3f} ms {row['ratio']:7.2f} "
            f"{row['ratio_with_stats']:7.2f}"
        )
    if args.json:
        figures = {"davis_median": medians, "davis_masks": len(real), "frame_filling": filling}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
