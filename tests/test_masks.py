"""`workers.masks`.

- The box of a mask is half-open and the tightest; an empty mask has none.
- Overlaps equal the counts over whole frames, for every integer or bool dtype and memory order.
- Matching is one-to-one, never uses a pair below the threshold, and its total overlap is the
  largest of all such matchings.
- Resizing to the same size changes nothing; a constant mask stays constant.
"""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from workers import masks

small_masks = arrays(np.uint8, st.just((7, 9)), elements=st.integers(0, 1))


def naive_iou(a: NDArray[Any], b: NDArray[Any]) -> float:
    union = np.count_nonzero(a | b)
    return float(np.count_nonzero(a & b) / union) if union else 0.0


@settings(deadline=None)  # the first call imports cv2
@given(small_masks)
def test_box_is_the_tightest(mask: NDArray[np.uint8]) -> None:
    box = masks.box_xyxy(mask)
    if box is None:
        assert not mask.any()
        return
    x0, y0, x1, y1 = box
    ys, xs = np.nonzero(mask)
    assert (x0, y0, x1, y1) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int32, np.int64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_any_dtype_and_order(dtype: Any, order: Any) -> None:
    mask = np.zeros((300, 200), dtype, order=order)
    mask[256:260, 3:9] = 1
    assert masks.box_xyxy(mask) == (3, 256, 9, 260)
    cropped = masks.crop_mask(mask)
    assert cropped.area == 24
    assert np.array_equal(cropped.paste(300, 200), mask.astype(np.uint8))


def test_values_above_one_count_as_the_object() -> None:
    mask = np.array([[0, 256], [255, 2]], np.int64)
    cropped = masks.crop_mask(mask)
    assert cropped.area == 3
    assert cropped.crop.max() == 1


def test_a_crop_is_no_view() -> None:
    mask = np.ones((4, 4), np.uint8)
    cropped = masks.crop_mask(mask)
    mask[:] = 0
    assert cropped.crop.all()


@settings(deadline=None)
@given(st.lists(small_masks, max_size=4), st.lists(small_masks, max_size=4))
def test_iou_equals_the_count_over_the_frame(
    a: list[NDArray[np.uint8]], b: list[NDArray[np.uint8]]
) -> None:
    got = masks.iou_matrix(a, b)
    assert got.shape == (len(a), len(b))
    for i, first in enumerate(a):
        for j, second in enumerate(b):
            assert got[i, j] == pytest.approx(naive_iou(first, second))


def test_iou_of_two_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match="one size"):
        masks.iou_matrix(np.ones((1, 2, 2)), np.ones((1, 2, 3)))


def test_box_iou() -> None:
    got = masks.box_iou_matrix([[0, 0, 2, 2], [5, 5, 5, 5]], [[1, 0, 3, 2], [0, 0, 2, 2]])
    assert got == pytest.approx(np.array([[1 / 3, 1.0], [0.0, 0.0]]))
    assert masks.box_iou_matrix([], [[0, 0, 1, 1]]).shape == (0, 1)


@settings(max_examples=200, deadline=None)  # the first call imports scipy
@given(
    arrays(
        np.float64,
        array_shapes(min_dims=2, max_dims=2, max_side=4),
        elements=st.floats(0, 1, width=32),
    ),
    st.sampled_from([0.0, 0.3, 0.5, 0.9]),
)
def test_matching_is_optimal(iou: NDArray[np.float64], threshold: float) -> None:
    # Given the best total by brute force over all injections of the shorter side.
    rows, columns = iou.shape
    gain = np.where((iou >= threshold) & (iou > 0), iou, 0.0)
    gain = gain if rows <= columns else gain.T
    best = max(
        sum(gain[i, j] for i, j in enumerate(chosen))
        for chosen in permutations(range(gain.shape[1]), gain.shape[0])
    )
    # When matched
    pairs = masks.match_one_to_one(iou, threshold)
    # Then
    assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)
    assert all(iou[i, j] >= threshold and iou[i, j] > 0 for i, j in pairs)
    assert sum(iou[i, j] for i, j in pairs) == pytest.approx(best)


def test_matching_is_not_greedy() -> None:
    # The best single pair (0, 0) would leave object 1 alone; together the others are better.
    iou = np.array([[0.60, 0.55], [0.58, 0.0]])
    assert masks.match_one_to_one(iou, 0.3) == [(0, 1), (1, 0)]


def test_resize() -> None:
    mask = np.zeros((4, 6), np.uint8)
    mask[1:3, 2:5] = 1
    assert np.array_equal(masks.resize_mask(mask, 4, 6), mask)
    bigger = masks.resize_mask(mask, 8, 12)
    assert bigger.dtype == np.uint8
    assert abs(int(bigger.sum()) - 4 * int(mask.sum())) <= 8
    assert np.array_equal(masks.resize_mask(bigger, 4, 6), mask)
    assert masks.resize_mask(np.ones((5, 7), bool), 31, 3).all()
