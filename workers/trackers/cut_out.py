"""From a box or points to a first mask, by colour: what a tracker without a network begins with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from workers.trackers.base import SessionPrompt, UInt8Array

_CUT_PIXELS = 40_000
"""A prompt is cut out on a picture of at most this many pixels."""


def prompted_mask(frame: UInt8Array, prompts: Sequence[SessionPrompt], seed: int) -> UInt8Array:
    """Return the mask that the prompts of one object on one frame ask for; never empty.

    A mask is taken as it is. A box is cut out by GrabCut (Rother et al., SIGGRAPH 2004) with what
    surrounds it as background; points are its seeds, inside the box if there is one, else in a
    window around them. Where the cut finds next to nothing, or all, the ellipse in the box or a
    disk on each point stands in.

    Parameters
    ----------
    frame : ndarray of uint8, shape (H, W, 3)
        RGB.
    prompts : sequence of SessionPrompt
        Those of the object on this frame.
    seed : int
        For OpenCV's generator, which GrabCut draws from.

    Returns
    -------
    ndarray of uint8, shape (H, W)
        1 on the object.
    """
    for prompt in reversed(prompts):
        if prompt.mask is not None:
            return prompt.mask.copy()
    height, width = frame.shape[:2]
    boxes = [p.box_xyxy for p in prompts if p.box_xyxy is not None]
    points = [p.points_xy for p in prompts if p.points_xy is not None]
    labels = [p.point_labels for p in prompts if p.point_labels is not None]
    points_xy = np.concatenate(points) if points else np.zeros((0, 2))
    point_labels = np.concatenate(labels) if labels else np.zeros(0, np.int64)
    if boxes:
        box = np.clip(boxes[-1], 0, [width, height, width, height])
    else:
        on_object = points_xy[point_labels == 1]
        room = 0.25 * max(height, width)
        box = np.concatenate([on_object.min(0) - room, on_object.max(0) + room])
        box = np.clip(box, 0, [width, height, width, height])
    return _cut_out(frame, box, points_xy, point_labels, is_box=bool(boxes), seed=seed)


def _cut_out(
    frame: UInt8Array,
    box_xyxy: NDArray[np.float64],
    points_xy: NDArray[np.float64],
    point_labels: NDArray[np.int64],
    *,
    is_box: bool,
    seed: int,
) -> UInt8Array:
    import cv2

    height, width = frame.shape[:2]
    # The surroundings teach the background: a third of the box on every side.
    pad = np.maximum((box_xyxy[2:] - box_xyxy[:2]) / 3, 4) if is_box else np.zeros(2)
    left, top = np.maximum(np.floor(box_xyxy[:2] - pad), 0).astype(int)
    right, bottom = np.minimum(np.ceil(box_xyxy[2:] + pad), [width, height]).astype(int)
    crop = frame[top:bottom, left:right]
    scale = min(1.0, (_CUT_PIXELS / (crop.shape[0] * crop.shape[1])) ** 0.5)
    size = max(1, round(crop.shape[1] * scale)), max(1, round(crop.shape[0] * scale))
    small = cv2.resize(crop, size, interpolation=cv2.INTER_AREA)
    ratio = np.array([size[0] / crop.shape[1], size[1] / crop.shape[0]])
    seeds = (points_xy - [left, top]) * ratio
    radius = max(1, round(0.01 * sum(size)))
    disks = np.zeros((2, size[1], size[0]), np.uint8)
    for (x, y), label in zip(seeds, point_labels, strict=True):
        cv2.circle(disks[int(label)], (int(x), int(y)), radius, 1, -1)

    prior = np.zeros((size[1], size[0]), np.uint8)
    if is_box:
        x0, y0 = (box_xyxy[:2] - [left, top]) * ratio
        x1, y1 = (box_xyxy[2:] - [left, top]) * ratio
        columns, rows = np.arange(size[0]) + 0.5, np.arange(size[1])[:, None] + 0.5
        # At least the pixel under the centre, however thin the box.
        half_x, half_y = max((x1 - x0) / 2, 0.5), max((y1 - y0) / 2, 0.5)
        from_x = np.abs(columns - (x0 + x1) / 2) / half_x
        from_y = np.abs(rows - (y0 + y1) / 2) / half_y
        within = (from_x <= 1) & (from_y <= 1)
        stand_in = (from_x**2 + from_y**2 <= 1).astype(np.uint8)
        trimap = np.where(within, cv2.GC_PR_FGD, cv2.GC_BGD).astype(np.uint8)
        if within.all():
            # Nothing is left to learn the background from but the corners.
            trimap[stand_in == 0] = cv2.GC_PR_BGD
    else:
        prior = _similar_to(small, disks[1])
        stand_in = disks[1]
        trimap = np.where(prior > 0, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
        edge = np.ones_like(trimap)
        edge[1:-1, 1:-1] = 0
        trimap[(edge > 0) & (prior == 0)] = cv2.GC_BGD
    trimap[disks[0] > 0] = cv2.GC_BGD
    trimap[disks[1] > 0] = cv2.GC_FGD

    cut = _grab_cut(small, trimap, seed)
    if is_box:
        if 10 * np.count_nonzero(cut) < np.count_nonzero(within):
            cut = stand_in
    else:
        _, components = cv2.connectedComponents(cut)
        touched = np.unique(components[disks[1] > 0])
        cut = np.isin(components, touched[touched > 0]).astype(np.uint8)
    cut = np.where(disks[1] > 0, 1, np.where(disks[0] > 0, 0, cut)).astype(np.float32)
    mask = np.zeros((height, width), np.uint8)
    back = cv2.resize(cut, (crop.shape[1], crop.shape[0]), interpolation=cv2.INTER_LINEAR)
    mask[top:bottom, left:right] = back > 0.5
    if not mask.any():
        # Thinner than a pixel of the reduced picture: the pixel in the middle.
        centre = box_xyxy.reshape(2, 2).mean(0) if is_box else points_xy[point_labels == 1][0]
        x, y = centre
        mask[min(int(y), height - 1), min(int(x), width - 1)] = 1
    return mask


def _grab_cut(picture: UInt8Array, trimap: UInt8Array, seed: int) -> UInt8Array:
    """Return GrabCut's answer, 1 on the object; nothing where there is too little to learn from."""
    import cv2

    on_object = np.isin(trimap, (cv2.GC_FGD, cv2.GC_PR_FGD))
    num_object = np.count_nonzero(on_object)
    # Each of its mixtures has five components, and needs as many pixels.
    if min(num_object, on_object.size - num_object) < 5:
        return on_object.astype(np.uint8)
    # Its k-means draws from OpenCV's generator, which every session of this thread shares.
    cv2.setRNGSeed(seed)
    labels = trimap.copy()
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(picture, labels, None, *models, 5, cv2.GC_INIT_WITH_MASK)
    return np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8)


def _similar_to(picture: UInt8Array, seeds: UInt8Array) -> UInt8Array:
    """Return the pixels connected to the seeds whose colour is like theirs."""
    import cv2

    lab = cv2.GaussianBlur(cv2.cvtColor(picture, cv2.COLOR_RGB2Lab), (0, 0), 1.5)
    colours = lab.astype(np.float32)
    similar = seeds.copy()
    num, components = cv2.connectedComponents(seeds)
    for i in range(1, num):
        of_seed = components == i
        distance = np.abs(colours - colours[of_seed].mean(0)) @ np.array([0.5, 1, 1], np.float32)
        close = ((distance < 22) | of_seed).astype(np.uint8)
        _, regions = cv2.connectedComponents(close)
        similar[np.isin(regions, np.unique(regions[of_seed]))] = 1
    return similar
