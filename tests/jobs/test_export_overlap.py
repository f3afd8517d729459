"""Contract of giving every pixel of a frame to one mask.

* The complement of compressed counts is byte for byte what pycocotools encodes.
* Masks keep exactly the pixels that no mask in front of them has, in the encoding of pycocotools;
  those that keep all are not mentioned, and those that keep nothing are empty.
"""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from jobs.export.overlap import complement, front_to_back, without_overlap
from workers import rle

Mask = NDArray[np.uint8]


@st.composite
def frames(draw: st.DrawFn) -> list[Mask]:
    """Return masks of one frame: boxes, noise, nothing and everything."""
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    masks = []
    for density in draw(st.lists(st.sampled_from([0, 0.05, 0.5, 0.95, 1]), max_size=6)):
        top, bottom = sorted(rng.integers(0, height + 1, 2))
        left, right = sorted(rng.integers(0, width + 1, 2))
        mask = np.zeros((height, width), np.uint8)
        noise = rng.random((bottom - top, right - left)) < density
        mask[top:bottom, left:right] = noise
        masks.append(mask)
    return masks


@given(frames())
@settings(deadline=None, max_examples=150)
def test_complement(masks: list[Mask]) -> None:
    for mask in masks:
        for either in (mask, 1 - mask):
            assert complement(rle.encode(either)) == rle.encode(1 - either)


@given(frames(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=150)
def test_every_pixel_has_one_mask(masks: list[Mask], random: object) -> None:
    if not masks:
        return
    encoded = [rle.encode_with_stats(mask) for mask in masks]
    boxes = np.array([mask.bbox_xywh for mask in encoded], np.float32)
    counts = [mask.counts for mask in encoded]
    order = list(range(len(masks)))
    random.shuffle(order)  # type: ignore[attr-defined]
    changed = without_overlap(counts, boxes, order, masks[0].shape)
    taken = np.zeros_like(masks[0])
    for position in order:
        own = masks[position] & (1 - taken)
        taken |= masks[position]
        if (own == masks[position]).all():
            assert position not in changed
        else:
            assert changed[position] == (rle.encode(own) if own.any() else b"")


def test_front_to_back() -> None:
    ids, scores = np.array([4, 5, 6], np.int32), np.array([0.5, 0.75, 0.75], np.float32)
    assert front_to_back(ids, scores) == [1, 2, 0]
    assert front_to_back(ids, scores, [6, 99, 4]) == [2, 0, 1]
