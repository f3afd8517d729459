"""HOTA, MOTA and IDF1 are TrackEval's, box measures are those of plain loops.

* On random identities and overlaps each sequence's numbers, and those of all together, are the
  same as TrackEval's to the last digits, also where one side of a frame or of a video is empty.
* Nothing on either side is no number, not a perfect one.
* Success and precision count frames as OTB's definition says.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from jobs.evaluation.boxes import score_boxes
from jobs.evaluation.tracking import TrackingCounts, TrackingTally
from tests.trackeval_home import import_trackeval

Frame = tuple[list[int], list[int], NDArray[np.float64]]
NUM_VIDEOS = 21


def random_video(seed: int) -> list[Frame]:
    """Return identities and overlaps of 25 frames; every tenth video has none found."""
    rng = np.random.default_rng(seed)
    num_true, num_found = rng.integers(1, 8, 2)
    frames = []
    for _ in range(25):
        true = sorted(rng.choice(num_true, rng.integers(0, num_true + 1), replace=False).tolist())
        count = 0 if seed % 10 == 0 else rng.integers(0, num_found + 1)
        found = sorted((rng.choice(num_found, count, replace=False) + 100).tolist())
        similarity = rng.random((len(true), len(found))) ** 2
        for i, true_id in enumerate(true):
            for j, found_id in enumerate(found):
                if true_id == found_id - 100 and rng.random() < 0.8:
                    # Exactly at a threshold every now and then.
                    similarity[i, j] = rng.choice([0.5, 0.75, rng.uniform(0.4, 1)])
        frames.append((true, found, similarity))
    return frames


def reference(trackeval: Any, frames: list[Frame]) -> list[dict[str, Any]]:
    """Return what TrackEval's three metrics say."""
    true_ids = sorted({i for true, _, _ in frames for i in true})
    found_ids = sorted({i for _, found, _ in frames for i in found})
    data = {
        "num_timesteps": len(frames),
        "num_gt_ids": len(true_ids),
        "num_tracker_ids": len(found_ids),
        "num_gt_dets": sum(len(true) for true, _, _ in frames),
        "num_tracker_dets": sum(len(found) for _, found, _ in frames),
        "gt_ids": [np.searchsorted(true_ids, true) for true, _, _ in frames],
        "tracker_ids": [
            np.searchsorted(found_ids, found) if found else np.zeros(0, int)
            for _, found, _ in frames
        ],
        "similarity_scores": [similarity for _, _, similarity in frames],
    }
    return [metric.eval_sequence(data) for metric in metrics(trackeval)]


def metrics(trackeval: Any) -> list[Any]:
    quiet = {"PRINT_CONFIG": False}
    module = trackeval.metrics
    return [module.HOTA(), module.CLEAR(quiet), module.Identity(quiet)]


def assert_same(counts: TrackingCounts, results: list[dict[str, Any]]) -> None:
    hota, clear, identity = results
    scores = counts.scores()
    found = (scores.hota, scores.det_a, scores.ass_a, scores.mota, scores.idf1)
    expected = (
        np.mean(hota["HOTA"]),
        np.mean(hota["DetA"]),
        np.mean(hota["AssA"]),
        clear["MOTA"],
        identity["IDF1"],
    )
    assert found == pytest.approx(expected, abs=1e-12)
    assert scores.num_switches == clear["IDSW"]


def test_numbers_are_those_of_trackeval(capsys: pytest.CaptureFixture[str]) -> None:
    trackeval = import_trackeval()
    total = TrackingCounts()
    every = []
    for seed in range(NUM_VIDEOS):
        frames = random_video(seed)
        tally = TrackingTally()
        for true, found, similarity in frames:
            tally.add(true, found, similarity)
        results = reference(trackeval, frames)
        assert_same(tally.counts(), results)
        total += tally.counts()
        every.append(results)
    combined = [
        metric.combine_sequences({seed: results[i] for seed, results in enumerate(every)})
        for i, metric in enumerate(metrics(trackeval))
    ]
    assert_same(total, combined)


def test_nothing_is_no_number() -> None:
    tally = TrackingTally()
    tally.add([], [], np.zeros((0, 0)))
    scores = tally.counts().scores()
    assert all(math.isnan(s) for s in (scores.hota, scores.det_a, scores.mota, scores.idf1))
    tally.add([], [5], np.zeros((0, 1)))
    scores = tally.counts().scores()
    assert (scores.hota, scores.idf1, scores.mota) == (0.0, 0.0, -1.0)


def test_boxes_are_counted_frame_by_frame() -> None:
    rng = np.random.default_rng(3)
    truth = rng.uniform(0, 100, (50, 4))
    truth[:, 2:] += truth[:, :2] + 10
    found = truth + rng.normal(0, 8, truth.shape)
    found[7] = np.nan
    truth[9] = np.nan
    overlaps, distances = [], []
    for a, b in zip(found, truth, strict=True):
        if np.isnan(b).any():
            continue
        if np.isnan(a).any():
            overlaps.append(0.0)
            distances.append(math.inf)
            continue
        width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
        height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        sides = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
        overlaps.append(width * height / (sum(sides) - width * height))
        distances.append(
            math.dist(
                ((a[0] + a[2]) / 2, (a[1] + a[3]) / 2), ((b[0] + b[2]) / 2, (b[1] + b[3]) / 2)
            )
        )
    scores = score_boxes(found, truth)
    assert scores.num_frames == 49
    assert scores.mean_iou == pytest.approx(np.mean(overlaps))
    shares = [np.mean([o > 0.05 * k for o in overlaps]) for k in range(21)]
    assert scores.success_auc == pytest.approx(np.mean(shares))
    assert scores.precision == pytest.approx(np.mean([d <= 20 for d in distances]))
    shares = [np.mean([d <= k for d in distances]) for k in range(51)]
    assert scores.precision_auc == pytest.approx(np.mean(shares))
    with pytest.raises(ValueError, match="no frame has a known box"):
        score_boxes(found[:1], np.full((1, 4), np.nan))
    with pytest.raises(ValueError, match="one shape"):
        score_boxes(found, truth[:3])
