"""Masks over frames: fill, contour, id and label of every object, and where a hidden one was.

Contours, corners and labels are drawn by the library `supervision`; here it gets our colours and
sizes, and masks cut to their boxes, so that a small object costs little on a large picture. Only
the fill is our own: the library's `MaskAnnotator` indexes pixels one by one, which on large objects
takes ten times as long as a table look-up and would be most of the time of a film.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jobs.rendering.colours import object_colour, palette, text_palette
from workers.sinks.schema import FLAG_OCCLUDED

if TYPE_CHECKING:
    from jobs.dataset import Frame, ObjectMask

UInt8Array = NDArray[np.uint8]
Box = tuple[float, float, float, float]

FILL_OPACITY = 0.3
RIM_RGB = (12, 12, 16)
"""Of the line under each contour, which keeps it legible on any background."""
SMALLEST_FONT_PX = 12
HIDDEN_SHOWN_US = 2_000_000
"""How long the last place of a hidden object stays marked; it may never come back."""


class Overlay:
    """Draws the objects of one video, frame after frame.

    Parameters
    ----------
    height, width : int
        Size of the frames in pixels.
    categories : Mapping of int to str
        Name per category id, for labels.
    shown_px : int, optional
        Width at which the pictures will be looked at, where that is smaller than theirs: lines and
        labels are drawn larger then, to be legible.
    """

    def __init__(
        self,
        height: int,
        width: int,
        categories: Mapping[int, str],
        *,
        shown_px: int | None = None,
    ) -> None:
        self._size = (height, width)
        reduction = max(1.0, width / shown_px) if shown_px else 1.0
        self._font_px = max(round(SMALLEST_FONT_PX * reduction), height // 32)
        self._categories = categories
        self._last_seen: dict[int, tuple[int, Box]] = {}
        self._names: dict[int, str] = {}

    def follow(self, frame: Frame) -> None:
        """Take note of a frame that is not drawn: where each object was seen last."""
        for mask in frame.masks:
            self._last_seen[mask.object_id] = (frame.pts_us, _box_xyxy(mask))
            self._names[mask.object_id] = self._name(mask)

    def draw(self, image: UInt8Array, frame: Frame) -> UInt8Array:
        """Return a frame with its objects drawn over it.

        Parameters
        ----------
        image : ndarray of uint8, shape (H, W, 3)
            RGB, 0–255; not changed.
        frame : Frame
            What the dataset says about it. Frames must come in order of time.

        Returns
        -------
        ndarray of uint8, shape (H, W, 3)
            RGB, 0–255.

        Raises
        ------
        ValueError
            A mask, or the image, has another size than the frames of this video.
        """
        import supervision as sv

        if image.shape[:2] != self._size:
            raise ValueError(f"{image.shape = } does not fit {self._size = }")
        self.follow(frame)
        masks = [mask for mask in frame.masks if mask.area > 0]
        hidden = self._hidden_lately(frame)
        if not masks and not hidden:
            return image.copy()
        tools = _tools(self._font_px)
        canvas = image.copy()
        crops = [self._crop(mask) for mask in masks]
        for mask, crop in zip(masks, crops, strict=True):
            _fill(canvas, mask, crop)
        boxes: list[Box] = [
            _outline(canvas, mask, crop, tools.line_px)
            for mask, crop in zip(masks, crops, strict=True)
        ]
        labels = [self._label(mask, frame) for mask in masks]
        if hidden:
            places = [self._last_seen[object_id][1] for object_id in hidden]
            gone = sv.Detections(xyxy=np.array(places, np.float32), tracker_id=np.array(hidden))
            canvas = tools.corners.annotate(canvas, gone)
            boxes += places
            labels += [f"{self.name(object_id)} hidden" for object_id in hidden]
        named = sv.Detections(
            xyxy=np.array(boxes, np.float32),
            tracker_id=np.array([*(mask.object_id for mask in masks), *hidden]),
        )
        limit = max(8, self._size[1] // self._font_px)
        labels = [text if len(text) <= limit else f"{text[: limit - 1]}…" for text in labels]
        # As a Pillow image the picture is RGB to the annotator, so its palette is not swapped.
        return np.asarray(tools.labels.annotate(Image.fromarray(canvas), named, labels))

    def name(self, object_id: int) -> str:
        """Return id and label of an object that was seen, the id alone of another."""
        return self._names.get(object_id, str(object_id))

    def _name(self, mask: ObjectMask) -> str:
        label = "" if mask.category_id is None else self._categories.get(mask.category_id, "")
        return f"{mask.object_id} {label}".strip()

    def _label(self, mask: ObjectMask, frame: Frame) -> str:
        doubtful = mask.flags & FLAG_OCCLUDED or mask.object_id in frame.occluded_ids
        return self.name(mask.object_id) + (" occluded" if doubtful else "")

    def _crop(self, mask: ObjectMask) -> UInt8Array:
        """Return a mask cut to its box, 1 on the object."""
        if mask.size != self._size:
            raise ValueError(f"{mask.size = } does not fit frames of {self._size}")
        x, y, w, h = (int(side) for side in mask.bbox_xywh)
        return mask.decode()[y : y + h, x : x + w]

    def _hidden_lately(self, frame: Frame) -> list[int]:
        """Return the hidden objects whose last place is still worth marking."""
        present = {mask.object_id for mask in frame.masks}
        return [
            object_id
            for object_id in frame.occluded_ids
            if object_id not in present
            and object_id in self._last_seen
            and frame.pts_us - self._last_seen[object_id][0] <= HIDDEN_SHOWN_US
        ]


class _Tools:
    """The annotators for one size of text, in pixels; lines go with it."""

    def __init__(self, font_px: int) -> None:
        import supervision as sv

        by_id = sv.ColorLookup.TRACK
        self.line_px = max(2, round(font_px / 11))
        self.corners = sv.BoxCornerAnnotator(
            palette(bgr=True), self.line_px, font_px, color_lookup=by_id
        )
        self.labels = sv.RichLabelAnnotator(
            palette(),
            by_id,
            text_palette(),
            font_path=str(font_path()),
            font_size=font_px,
            text_padding=max(3, font_px // 5),
            text_position=sv.Position.TOP_CENTER,
            border_radius=max(2, font_px // 5),
            # Keeps labels inside the picture, and apart from each other.
            smart_position=True,
        )


_tools = functools.lru_cache(maxsize=4)(_Tools)


@functools.cache
def font_path() -> Path:
    """Return the font of all pictures: DejaVu Sans, as it lies in matplotlib's wheel.

    It knows Latin, Greek, Cyrillic, Arabic and more, and looks the same on every machine.
    """
    from importlib.util import find_spec

    # The package is not imported: that takes a second, for one path.
    spec = find_spec("matplotlib")
    assert spec is not None, "supervision depends on matplotlib"
    assert spec.origin is not None, "matplotlib is a regular package"
    return Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"


def _box_xyxy(mask: ObjectMask) -> Box:
    """Return a mask's box as the library counts it: the last column and row belong to it."""
    x, y, w, h = mask.bbox_xywh
    return x, y, x + w - 1, y + h - 1


def _fill(canvas: UInt8Array, mask: ObjectMask, crop: UInt8Array) -> None:
    """Tint the pixels of an object."""
    import cv2

    x, y = (int(side) for side in mask.bbox_xywh[:2])
    height, width = crop.shape
    part = canvas[y : y + height, x : x + width]
    cv2.copyTo(cv2.LUT(part, _tint(mask.object_id)), crop, part)


@functools.lru_cache(maxsize=256)
def _tint(object_id: int) -> UInt8Array:
    """Return what becomes of each value of each channel under an object's colour."""
    colour = np.array(object_colour(object_id), np.float32)
    values = np.arange(256, dtype=np.float32)[:, None]
    table: UInt8Array = np.rint(values * (1 - FILL_OPACITY) + colour * FILL_OPACITY).astype(
        np.uint8
    )
    return table.reshape(1, 256, 3)


def _outline(canvas: UInt8Array, mask: ObjectMask, crop: UInt8Array, line_px: int) -> Box:
    """Draw the contours of an object, each with a dark rim under the coloured line.

    Returns the box of the largest piece, which carries the label: stray pixels must not pull it
    away from the object.
    """
    import cv2
    import supervision as sv

    corner = np.array(mask.bbox_xywh[:2], np.int32)
    colour = palette(bgr=True).by_idx(mask.object_id)
    polygons = [polygon + corner for polygon in sv.mask_to_polygons(crop.view(np.bool_))]
    for polygon in polygons:
        sv.draw_polygon(canvas, polygon, sv.Color(*RIM_RGB), line_px + 2)
    for polygon in polygons:
        sv.draw_polygon(canvas, polygon, colour, line_px)
    if not polygons:
        return _box_xyxy(mask)
    largest = max(polygons, key=cv2.contourArea)
    (left, top), (right, bottom) = largest.min(axis=0), largest.max(axis=0)
    return float(left), float(top), float(right), float(bottom)
