"""J and F are those of the DAVIS challenge.

* J is intersection over union, and 1 where both masks are empty.
* F matches outlines within ceil(0.008 of the diagonal) pixels of a disk; the numbers are those of
  a plain re-derivation with an explicit disk, on random shapes and on real masks.
* A perfect copy scores 1, an empty prediction 0, an outline shifted by the tolerance still 1.
* Mean, recall above 0.5 and decay between the first and last quarter follow the challenge's bins.
* The first and the last frame are left out; void pixels count neither for nor against.
* Wrong shapes and numbers of frames are errors that say so.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from jobs.evaluation import davis as evaluate

Mask = NDArray[np.bool_]
SHARED = Path(
    os.environ.get("MASKMILL_SHARED", Path(__file__).resolve().parents[2] / "../shared")
).resolve()


def plain_outline(mask: Mask) -> Mask:
    """Compare each pixel with its right, lower and lower right neighbour."""
    height, width = mask.shape
    edges = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            for dy, dx in ((0, 1), (1, 0), (1, 1)):
                # Beyond the border the neighbour is the nearest pixel of the picture.
                below, right = min(y + dy, height - 1), min(x + dx, width - 1)
                edges[y, x] |= mask[y, x] != mask[below, right]
    return edges


def plain_f(prediction: Mask, truth: Mask) -> float:
    """Compute F by dilating each outline with an explicit disk, pixel by pixel."""
    radius = math.ceil(0.008 * math.sqrt(truth.shape[0] ** 2 + truth.shape[1] ** 2))

    def dilated(points: Mask) -> Mask:
        grown = np.zeros_like(points)
        for y, x in np.argwhere(points):
            for dy in range(-radius, radius + 1):
                for dx in range(-radius, radius + 1):
                    inside = 0 <= y + dy < grown.shape[0] and 0 <= x + dx < grown.shape[1]
                    if dy * dy + dx * dx <= radius * radius and inside:
                        grown[y + dy, x + dx] = True
        return grown

    found, true = plain_outline(prediction), plain_outline(truth)
    if not found.any() or not true.any():
        return float(found.any() == true.any())
    precision = (found & dilated(true)).sum() / found.sum()
    recall = (true & dilated(found)).sum() / true.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def blob(seed: int, height: int = 60, width: int = 83) -> Mask:
    """Draw a few random ellipses; some touch the border."""
    rng = np.random.default_rng(seed)
    y, x = np.ogrid[:height, :width]
    mask = np.zeros((height, width), bool)
    for _ in range(rng.integers(1, 4)):
        cy, cx = rng.uniform(0, height), rng.uniform(0, width)
        ry, rx = rng.uniform(2, height / 3, 2)
        mask |= ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1
    return mask


@pytest.mark.parametrize("seed", range(12))
def test_f_equals_the_plain_derivation(seed: int) -> None:
    truth = blob(seed)
    prediction = np.roll(truth, (seed % 4, seed % 3), (0, 1)) if seed % 2 else blob(seed + 100)
    assert evaluate.boundary_accuracy(prediction, truth) == pytest.approx(
        plain_f(prediction, truth), abs=1e-12
    )


@pytest.mark.parametrize("seed", range(6))
def test_outline_equals_the_plain_derivation(seed: int) -> None:
    noise = np.random.default_rng(seed).random((17, 23)) > 0.5
    np.testing.assert_array_equal(evaluate.outline(noise), plain_outline(noise))


def test_real_masks_equal_the_plain_derivation() -> None:
    folder = SHARED / "data/davis/dog/masks"
    if not folder.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"{folder} is missing")
        pytest.skip("needs the DAVIS sequence dog")
    masks = [np.asarray(Image.open(folder / f"{i:05d}.png")) > 0 for i in (0, 7)]
    # A sixteenth of the pixels keeps the loops short; the tolerance shrinks with the picture.
    first, second = (mask[::4, ::4] for mask in masks)
    assert evaluate.boundary_accuracy(first, second) == pytest.approx(
        plain_f(first, second), abs=1e-12
    )
    expected = (first & second).sum() / (first | second).sum()
    assert evaluate.region_similarity(first, second) == pytest.approx(expected)


def test_perfect_copy_is_one_and_empty_is_zero() -> None:
    truths = [blob(seed) for seed in range(8)]
    perfect = evaluate.evaluate_object(truths, truths)
    assert perfect.j_and_f == 1.0
    assert perfect.region == evaluate.Statistics(1.0, 1.0, 0.0)
    empty = evaluate.evaluate_object([None] * 8, truths)
    assert empty.region == empty.boundary == evaluate.Statistics(0.0, 0.0, 0.0)


def test_both_empty_is_one() -> None:
    nothing = np.zeros((9, 9), bool)
    assert evaluate.region_similarity(nothing, nothing) == 1.0
    assert evaluate.boundary_accuracy(nothing, nothing) == 1.0


def test_outline_matches_up_to_the_tolerance_and_no_further() -> None:
    truth = np.zeros((300, 400), np.uint8)  # diagonal 500: tolerance 4 pixels
    truth[100:200, 100:300] = 1
    assert evaluate.boundary_accuracy(np.roll(truth, 4, 1), truth) == 1.0
    assert evaluate.boundary_accuracy(np.roll(truth, 5, 1), truth) < 1.0
    assert evaluate.boundary_accuracy(np.roll(truth, 5, 1), truth, tolerance=5) == 1.0


def test_statistics_follow_the_bins_of_the_challenge() -> None:
    values = np.linspace(0.9, 0.1, 9)
    got = evaluate.statistics(values)
    # Bins of nine values, with shared ends: frames 0-2, 2-4, 4-6 and 6-8.
    assert got.mean == pytest.approx(0.5)
    assert got.recall == pytest.approx(4 / 9)
    assert got.decay == pytest.approx(values[:3].mean() - values[6:].mean())
    assert math.isnan(evaluate.statistics([]).mean)
    assert evaluate.statistics([0.2, math.nan, 0.8]).mean == pytest.approx(0.5)


def test_first_and_last_frame_are_left_out() -> None:
    truths = [blob(seed) for seed in range(5)]
    predictions = [np.zeros_like(truths[0]), *truths[1:4], np.zeros_like(truths[0])]
    score = evaluate.evaluate_object(predictions, truths)
    assert score.j_and_f == 1.0
    assert len(score.region_per_frame) == len(score.boundary_per_frame) == 3
    whole = evaluate.evaluate_object(predictions, truths, skip_ends=False)
    assert whole.region.mean == pytest.approx(3 / 5)


def test_void_pixels_do_not_count() -> None:
    truth = np.zeros((40, 40), np.uint8)
    truth[10:20, 10:20] = 1
    prediction = truth.copy()
    prediction[30:35, 30:35] = 1
    void = np.zeros_like(truth)
    void[29:36, 29:36] = 255
    assert evaluate.region_similarity(prediction, truth) < 1
    assert evaluate.region_similarity(prediction, truth, void=void) == 1
    assert evaluate.boundary_accuracy(prediction, truth, void=void) == 1


def test_mean_over_objects_gives_each_the_same_weight() -> None:
    truths = [blob(seed) for seed in range(5)]
    scores = {
        ("a", 1): evaluate.evaluate_object(truths, truths),
        ("a", 2): evaluate.evaluate_object([None] * 5, truths),
    }
    assert evaluate.mean_j_and_f(scores) == 0.5
    with pytest.raises(ValueError, match="no object"):
        evaluate.mean_j_and_f({})


def test_wrong_input_is_named() -> None:
    mask = blob(0)
    with pytest.raises(ValueError, match=r"\(60, 83\) against \(60, 82\)"):
        evaluate.region_similarity(mask, mask[:, :-1])
    with pytest.raises(ValueError, match="void mask"):
        evaluate.boundary_accuracy(mask, mask, void=mask[1:])
    with pytest.raises(ValueError, match="1 predictions do not match 2"):
        evaluate.evaluate_object([mask], [mask, mask])
    with pytest.raises(ValueError, match="no frame is left"):
        evaluate.evaluate_object([mask, mask], [mask, mask])
