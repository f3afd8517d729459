"""Contract of `workers.rle`.

* `encode` gives byte for byte what pycocotools gives, for masks of every integer type, memory
  layout, size and density; non-zero is object, whatever the value.
* `encode_with_stats` gives pycocotools' area and box, and knows whether the border is touched.
* `decode`, `area`, `bbox_xywh` and `run_lengths` undo it, for text and bytes.
* Counts that do not fit the size, are cut off, or hold foreign characters are refused with a
  sentence; arrays that are no masks are refused.
"""

from __future__ import annotations

import doctest
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from pycocotools import mask as coco

from workers import rle

Mask = NDArray[Any]


def check_against_pycocotools(mask: Mask) -> None:
    height, width = mask.shape
    binary = np.asfortranarray((mask != 0).astype(np.uint8))
    expected = coco.encode(binary)

    assert rle.encode(mask) == expected["counts"]
    encoded = rle.encode_with_stats(mask)
    assert encoded.counts == expected["counts"]
    assert encoded.area == int(coco.area(expected))
    assert encoded.bbox_xywh == tuple(coco.toBbox(expected))
    edges = (binary[0], binary[-1], binary[:, 0], binary[:, -1])
    assert encoded.touches_border == any(edge.any() for edge in edges)

    assert rle.area(encoded.counts, height, width) == encoded.area
    assert rle.bbox_xywh(encoded.counts, height, width) == encoded.bbox_xywh
    for counts in (encoded.counts, encoded.counts.decode()):
        decoded = rle.decode(counts, height, width)
        assert decoded.dtype == np.uint8
        assert decoded.flags.c_contiguous
        np.testing.assert_array_equal(decoded, binary)


shapes = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        hnp.arrays(np.bool_, shapes),
        hnp.arrays(np.uint8, shapes, elements=st.sampled_from([0, 1])),
        hnp.arrays(np.uint8, shapes, elements=st.sampled_from([0, 255])),
        hnp.arrays(np.uint8, shapes, elements=st.integers(0, 3)),
        hnp.arrays(np.int8, shapes, elements=st.sampled_from([-128, 0, 2])),
        hnp.arrays(np.int64, shapes, elements=st.sampled_from([-256, 0, 1 << 40])),
    )
)
def test_small_masks_of_every_type(mask: Mask) -> None:
    check_against_pycocotools(mask)
    check_against_pycocotools(np.asfortranarray(mask))
    check_against_pycocotools(mask[::-1, ::-1])
    check_against_pycocotools(mask[::2, ::3])


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(30, 200),
    width=st.integers(30, 200),
    seed=st.integers(0, 1 << 30),
    cell=st.integers(1, 40),
)
def test_blobs_of_every_density(height: int, width: int, seed: int, cell: int) -> None:
    # Cells of one pixel are noise, which goes the dense way; large ones go the sparse way.
    rng = np.random.default_rng(seed)
    cells = rng.random((height // cell + 1, width // cell + 1)) < rng.random()
    mask = np.kron(cells, np.ones((cell, cell), np.uint8))[:height, :width]
    check_against_pycocotools(mask)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 8), (7, 16), (33, 65), (480, 854)])
def test_named_masks(shape: tuple[int, int]) -> None:
    empty = np.zeros(shape, np.uint8)
    check_against_pycocotools(empty)
    check_against_pycocotools(empty + 1)
    for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1), (shape[0] // 2, shape[1] // 2)):
        one = empty.copy()
        one[y, x] = 1
        check_against_pycocotools(one)
        check_against_pycocotools(1 - one)
    for step in (2, 3):
        rows, columns = empty.copy(), empty.copy()
        rows[::step] = 1
        columns[:, ::step] = 1
        check_against_pycocotools(rows)
        check_against_pycocotools(columns)


def test_one_large_mask() -> None:
    rows, columns = np.ogrid[:1080, :1920]
    ellipse = ((columns - 959.5) / 960) ** 2 + ((rows - 539.5) / 540) ** 2 <= 1
    check_against_pycocotools(ellipse)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        (b"", "not COCO compressed"),
        (b"7\x00", "not COCO compressed"),
        ("7é3".encode(), "not COCO compressed"),
        (b"72X", "not COCO compressed"),  # a continuation bit at the end: cut off
        (b"724", "do not fit"),
        (b"7", "do not fit"),
        (b"oooooooooooooooo0", "too large"),
    ],
)
def test_broken_counts_are_refused(counts: bytes, words: str) -> None:
    with pytest.raises(rle.InvalidRleError, match=words):
        rle.decode(counts, 3, 4)


def test_counts_of_another_size_are_refused() -> None:
    counts = rle.encode(np.eye(5, dtype=np.uint8))
    with pytest.raises(rle.InvalidRleError, match="6x5"):
        rle.area(counts, 6, 5)


@pytest.mark.parametrize(
    "array", [np.zeros((2, 3)), np.zeros((2, 3, 1), np.uint8), np.zeros((0, 3), np.uint8)]
)
def test_arrays_that_are_no_masks_are_refused(array: Mask) -> None:
    with pytest.raises(ValueError, match="a mask must be"):
        rle.encode(array)


def test_examples() -> None:
    assert doctest.testmod(rle).failed == 0
