"""Colours of objects: they follow from the id alone.

So an object keeps its colour from frame to frame, from picture to picture and from run to run.
"""

from __future__ import annotations

import colorsys
import functools
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import supervision as sv

RGB = tuple[int, int, int]

FIRST_COLOURS: tuple[RGB, ...] = (
    (56, 189, 248),
    (255, 112, 82),
    (250, 204, 21),
    (74, 222, 128),
    (217, 119, 255),
)
"""Colours of the first ids: far apart for all common kinds of colour vision."""
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
"""Steps of this part of the colour circle never repeat and never fall close together."""
PALETTE_SIZE = 4096
"""Ids with a colour of their own in a palette; later ones begin again."""
DARK_TEXT: RGB = (16, 16, 20)
LIGHT_TEXT: RGB = (255, 255, 255)


def object_colour(object_id: int) -> RGB:
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


def text_colour(background: RGB) -> RGB:
    """Return dark or light, whichever is legible on a colour (WCAG 2.2 relative luminance).

    Examples
    --------
    >>> text_colour((250, 204, 21)) == DARK_TEXT, text_colour((40, 40, 160)) == LIGHT_TEXT
    (True, True)
    """
    linear = [(value / 255) ** 2.2 for value in background]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # At this luminance black and white text have the same contrast.
    return DARK_TEXT if luminance > 0.179 else LIGHT_TEXT


@functools.cache
def palette(*, bgr: bool = False) -> sv.ColorPalette:
    """Return the colours by id, for annotators that look them up by `tracker_id`.

    Parameters
    ----------
    bgr : bool
        Swap red and blue. The annotators take an array for BGR and ours are RGB: colours that
        are swapped, too, come out right, and no picture has to be converted there and back.

    Returns
    -------
    supervision.ColorPalette
        `PALETTE_SIZE` colours, that of id 0 first.
    """
    return _palette([object_colour(object_id) for object_id in range(PALETTE_SIZE)], bgr)


@functools.cache
def text_palette() -> sv.ColorPalette:
    """Return what is legible on each colour of `palette`."""
    colours = (object_colour(object_id) for object_id in range(PALETTE_SIZE))
    return _palette([text_colour(colour) for colour in colours], bgr=False)


def _palette(colours: list[RGB], bgr: bool) -> sv.ColorPalette:
    import supervision as sv

    step = -1 if bgr else 1
    return sv.ColorPalette([sv.Color(*colour[::step]) for colour in colours])
