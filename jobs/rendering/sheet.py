"""Contact sheets and captions: pictures of a video laid out in rows, with a line under each."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from jobs.rendering.overlay import font_path

UInt8Array = NDArray[np.uint8]

BACKGROUND = (17, 19, 26)
TEXT = (233, 236, 245)
FAINT = (138, 146, 166)


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
        One per picture. What is too long is shortened, here and in the titles.
    title, subtitle : str
        Written above, where they are not empty.
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
    num_rows = -(-len(pictures) // num_columns)
    num_columns = min(num_columns, len(pictures))
    gap = max(8, width // 40)
    sheet_w = gap + num_columns * (width + gap)
    caption_px = max(12, min(width, height) // 18)
    caption_h = 2 * caption_px if any(captions) else gap
    title_px = max(18, sheet_w // 50)
    head_h = gap + (2 * title_px if title else 0) + (round(1.2 * title_px) if subtitle else 0)
    sheet_h = head_h + num_rows * (height + caption_h) + gap // 2
    sheet = Image.new("RGB", (sheet_w, sheet_h), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    _write(draw, (gap, gap), title, title_px, TEXT, sheet_w - 2 * gap)
    below = gap + round(1.6 * title_px)
    _write(draw, (gap, below), subtitle, round(0.65 * title_px), FAINT, sheet_w - 2 * gap)
    rounded = Image.new("L", (width, height), 0)
    ImageDraw.Draw(rounded).rounded_rectangle(
        (0, 0, width - 1, height - 1), radius=gap // 2, fill=255
    )
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        row, column = divmod(index, num_columns)
        x = gap + column * (width + gap)
        y = head_h + row * (height + caption_h)
        sheet.paste(Image.fromarray(picture), (x, y), rounded)
        at = (x + 2, y + height + caption_px // 4)
        _write(draw, at, caption, caption_px, FAINT, width - 4)
    return np.asarray(sheet)


def caption_bar(width: int, height: int, text: str) -> UInt8Array:
    """Return a bar with one line of text, to stand under a picture.

    Parameters
    ----------
    width, height : int
        Size in pixels.
    text : str
        Shortened where it does not fit.

    Returns
    -------
    ndarray of uint8, shape (H, W, 3)
        RGB, 0–255.
    """
    bar = Image.new("RGB", (width, height), BACKGROUND)
    size_px = max(8, round(0.56 * height))
    at = (size_px // 2, (height - round(1.2 * size_px)) // 2)
    _write(ImageDraw.Draw(bar), at, text, size_px, TEXT, width - size_px)
    return np.asarray(bar)


def write_png(path: Path, picture: UInt8Array) -> None:
    """Write a picture as PNG.

    Parameters
    ----------
    path : Path
        Where to; replaced.
    picture : ndarray of uint8, shape (H, W, 3)
        RGB, 0–255.
    """
    Image.fromarray(picture).save(path, format="PNG", optimize=True)


def shrink(picture: UInt8Array, max_width: int) -> UInt8Array:
    """Return a picture that is at most so many pixels wide, its proportions kept."""
    import cv2

    height, width = picture.shape[:2]
    if width <= max_width:
        return picture
    size = (max_width, max(1, round(height * max_width / width)))
    smaller: UInt8Array = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    return smaller


def fit_text(text: str, font: Any, max_width: float) -> str:
    """Return a text, shortened with an ellipsis until it is no wider than so many pixels."""
    if font.getlength(text) <= max_width:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if font.getlength(f"{text[:middle].rstrip()}…") <= max_width:
            low = middle
        else:
            high = middle - 1
    return f"{text[:low].rstrip()}…"


@functools.lru_cache(maxsize=32)
def load_font(size_px: int) -> ImageFont.FreeTypeFont:
    """Return the font of all pictures at a size."""
    return ImageFont.truetype(str(font_path()), size_px)


def _write(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size_px: int,
    colour: tuple[int, int, int],
    max_width: float,
) -> None:
    if text:
        font = load_font(size_px)
        draw.text(at, fit_text(text, font, max_width), font=font, fill=colour)
