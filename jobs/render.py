"""Pictures of results: masks over frames, and contact sheets of them.

An object's colour follows from its id alone, so it stays with the object from frame to frame and
from picture to picture.
"""

from __future__ import annotations

import colorsys
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

UInt8Array = NDArray[np.uint8]

FIRST_COLOURS = ((56, 189, 248), (255, 112, 82), (250, 204, 21), (74, 222, 128), (217, 119, 255))
"""Colours of the first ids: far apart for all common kinds of colour vision."""
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
"""Steps of this part of the colour circle never repeat and never fall close together."""
FILL_OPACITY = 0.24
CONTOUR_PX = 2
SHEET_BACKGROUND = (17, 19, 26)
SHEET_TEXT = (233, 236, 245)
SHEET_FAINT = (138, 146, 166)


@dataclass(frozen=True, slots=True)
class OverlayMask:
    """One object on one frame, to be drawn.

    Attributes
    ----------
    object_id : int
        Decides the colour.
    mask : ndarray, shape (H, W)
        Non-zero on the object.
    label : str
        Written beside the id; may be empty.
    """

    object_id: int
    mask: NDArray[Any]
    label: str = ""


def object_colour(object_id: int) -> tuple[int, int, int]:
    """Return the RGB colour of an object, 0..255 each.

    Examples
    --------
    >>> object_colour(1) == object_colour(1), object_colour(1) == object_colour(2)
    (True, False)
    """
    if 1 <= object_id <= len(FIRST_COLOURS):
        return FIRST_COLOURS[object_id - 1]
    hue = object_id * GOLDEN_RATIO % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.72, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_overlay(image: UInt8Array, masks: Sequence[OverlayMask]) -> UInt8Array:
    """Return a frame with translucent masks, their contours and a label for each.

    Parameters
    ----------
    image : ndarray of uint8, shape (H, W, 3)
        RGB, 0–255; not changed.
    masks : sequence of OverlayMask
        Drawn in this order.

    Returns
    -------
    ndarray of uint8, shape (H, W, 3)
        RGB, 0–255.

    Raises
    ------
    ValueError
        A mask has another size than the frame.
    """
    import cv2

    canvas = image.copy()
    for item in masks:
        if item.mask.shape != image.shape[:2]:
            raise ValueError(f"{item.mask.shape = } does not fit {image.shape = }")
        where = item.mask > 0
        colour = np.array(object_colour(item.object_id), np.float32)
        blend = canvas[where] * (1 - FILL_OPACITY) + colour * FILL_OPACITY
        canvas[where] = blend.astype(np.uint8)
    for item in masks:
        contours, _ = cv2.findContours(
            (item.mask > 0).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
        )
        # A dark rim under the coloured line keeps it legible on any background.
        for colour_bgr, width in (((12, 12, 16), CONTOUR_PX + 2), (None, CONTOUR_PX)):
            line = colour_bgr or object_colour(item.object_id)
            cv2.drawContours(canvas, contours, -1, line, width, cv2.LINE_AA)
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for item in masks:
        _draw_label(draw, item, picture.size)
    return np.asarray(picture)


def _draw_label(draw: ImageDraw.ImageDraw, item: OverlayMask, size: tuple[int, int]) -> None:
    """Write id and label in a chip above the object, inside the picture."""
    import cv2

    count, _, boxes, _ = cv2.connectedComponentsWithStats((item.mask > 0).astype(np.uint8))
    if count < 2:
        return
    # The largest piece carries the label: stray pixels must not pull it away from the object.
    largest = 1 + int(np.argmax(boxes[1:, cv2.CC_STAT_AREA]))
    box_x, box_y, box_w = (int(value) for value in boxes[largest, :3])
    width, height = size
    font = load_font(max(12, height // 24))
    text = f"{item.object_id} {item.label}".strip()
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    pad = max(3, height // 90)
    chip_w, chip_h = right - left + 2 * pad, bottom - top + 2 * pad
    x = float(np.clip(box_x + (box_w - chip_w) / 2, 2, max(2, width - chip_w - 2)))
    y = float(np.clip(box_y - chip_h - 4, 2, max(2, height - chip_h - 2)))
    draw.rounded_rectangle(
        (x, y, x + chip_w, y + chip_h), radius=pad + 1, fill=object_colour(item.object_id)
    )
    draw.text((x + pad - left, y + pad - top), text, font=font, fill=(16, 16, 20))


def contact_sheet(
    pictures: Sequence[UInt8Array],
    captions: Sequence[str],
    *,
    title: str,
    subtitle: str = "",
    num_columns: int = 3,
) -> UInt8Array:
    """Lay pictures of one size out in rows, each with a caption, under a title.

    Parameters
    ----------
    pictures : sequence of ndarray of uint8, shape (H, W, 3)
        RGB, 0–255.
    captions : sequence of str
        One per picture.
    title, subtitle : str
        Written above.
    num_columns : int
        Pictures per row.

    Returns
    -------
    ndarray of uint8, shape (H', W', 3)
        RGB, 0–255.

    Raises
    ------
    ValueError
        There is no picture, or captions and pictures differ in number.
    """
    if not pictures or len(pictures) != len(captions):
        raise ValueError(f"{len(pictures)} pictures need as many captions, got {len(captions)}")
    height, width = pictures[0].shape[:2]
    gap = max(8, width // 40)
    caption_h = max(20, height // 12)
    head_h = max(56, height // 4)
    num_rows = -(-len(pictures) // num_columns)
    num_columns = min(num_columns, len(pictures))
    sheet = Image.new(
        "RGB",
        (
            gap + num_columns * (width + gap),
            head_h + num_rows * (height + caption_h) + gap,
        ),
        SHEET_BACKGROUND,
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, head_h * 0.2), title, font=load_font(round(head_h * 0.32)), fill=SHEET_TEXT)
    draw.text((gap, head_h * 0.6), subtitle, font=load_font(round(head_h * 0.2)), fill=SHEET_FAINT)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        row, column = divmod(index, num_columns)
        x = gap + column * (width + gap)
        y = head_h + row * (height + caption_h)
        corners = Image.new("L", (width, height), 0)
        ImageDraw.Draw(corners).rounded_rectangle(
            (0, 0, width - 1, height - 1), radius=gap // 2, fill=255
        )
        sheet.paste(Image.fromarray(picture), (x, y), corners)
        draw.text(
            (x + 2, y + height + caption_h * 0.14),
            caption,
            font=load_font(round(caption_h * 0.55)),
            fill=SHEET_FAINT,
        )
    return np.asarray(sheet)


def write_png(path: str, image: UInt8Array) -> None:
    """Write an RGB picture as PNG.

    Parameters
    ----------
    path : str
        Where to.
    image : ndarray of uint8, shape (H, W, 3)
        RGB, 0–255.
    """
    Image.fromarray(image).save(path, optimize=True)


@functools.lru_cache(maxsize=16)
def load_font(size_px: int) -> Any:
    """Return the font that comes with Pillow, so that pictures look the same on every machine."""
    return ImageFont.load_default(size_px)
