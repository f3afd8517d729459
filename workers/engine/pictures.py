"""From a frame to the network's picture: square, normalised, as the originals' loaders do it.

PIL resizes bytes in whole numbers: the weights of a pixel's neighbours are rounded to 22 bits, rows
are done before columns, and each result is rounded to a byte. That can be done on a GPU bit by bit,
where it costs next to nothing; on a CPU PIL itself is the fastest.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from workers.engine.devices import upload

if TYPE_CHECKING:
    import torch

Resize = Literal["bicubic", "bilinear", "smooth"]
"""``bicubic``: PIL's, antialiased, as the video loader of ``sam2``. ``bilinear``: OpenCV's on
bytes, as Gy920/segment-anything-2-real-time. ``smooth``: bilinear, antialiased, on floating-point
numbers, as the image predictor of ``sam2``."""


class Levels(NamedTuple):
    """Mean and deviation of the channels, of 0..1, that a network's pictures are normalised by."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = Levels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SYMMETRIC = Levels((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

_WEIGHT_BITS = 22
"""Of PIL's resizing weights, behind the point."""
_SHARPNESS = -0.5
"""The free number of the cubic convolution (Keys, 1981), as PIL has it."""
_MAX_TABLES = 64
"""Sizes of frames whose resizing weights are kept."""


def to_pixels(
    frame: NDArray[np.uint8],
    image_size: int,
    resize: Resize,
    device: torch.device | None = None,
    levels: Levels = IMAGENET,
) -> torch.Tensor:
    """Return a frame as the network's input.

    Parameters
    ----------
    frame : ndarray of uint8, shape (H, W, 3)
        RGB, 0-255.
    image_size : int
        Side of the square it is squashed to.
    resize : str
        See `Resize`.
    device : torch.device, optional
        Where it is wanted; the CPU when left out. ``bicubic`` is computed there, and the frame
        goes there as bytes.
    levels : Levels
        What the network's pictures are normalised by.

    Returns
    -------
    Tensor of float32, shape (1, 3, image_size, image_size)
        Normalised.
    """
    if device is None or device.type == "cpu":
        return _on_host(frame, image_size, resize, levels)
    if resize == "bicubic":
        return normalised(resized(upload(frame, device), image_size), levels)
    return upload(_on_host(frame, image_size, resize, levels).numpy(), device)


def resized(frame: torch.Tensor, image_size: int) -> torch.Tensor:
    """Return a frame as PIL resizes it bicubically, on any device.

    Parameters
    ----------
    frame : Tensor of uint8, shape (H, W, 3)
        RGB, 0-255.
    image_size : int
        Side of the square it is squashed to.

    Returns
    -------
    Tensor of int32, shape (3, image_size, image_size)
        0-255.
    """
    import torch

    planes = frame.permute(2, 0, 1).to(torch.int32)
    for dim in (2, 1):
        length = planes.shape[dim]
        if length != image_size:
            planes = _resized_along(planes, dim, *_weights(length, image_size, planes.device))
    return planes


def normalised(planes: torch.Tensor, levels: Levels = IMAGENET) -> torch.Tensor:
    """Return planes of 0-255, shape (3, H, W), as the network's input, shape (1, 3, H, W)."""
    import torch

    table = _table_on(planes.device, levels)
    looked_up = [of_channel[plane] for of_channel, plane in zip(table, planes, strict=True)]
    return torch.stack(looked_up)[None]


def _resized_along(
    planes: torch.Tensor, dim: int, places: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Return planes of int32, resized in one of their directions."""
    import torch

    shape = [-1 if i == dim else 1 for i in range(3)]
    total = torch.full_like(planes.index_select(dim, places[0]), 1 << (_WEIGHT_BITS - 1))
    for place, weight in zip(places, weights, strict=True):
        total.addcmul_(planes.index_select(dim, place), weight.view(shape))
    return (total >> _WEIGHT_BITS).clamp_(0, 255)


@functools.lru_cache(_MAX_TABLES)
def _weights(length: int, wanted: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what each pixel of a resized line is made of.

    Parameters
    ----------
    length, wanted : int
        Pixels of the line, before and after.
    device : torch.device
        Where they are used.

    Returns
    -------
    places : Tensor of int64, shape (n, wanted)
        The n neighbours of each pixel.
    weights : Tensor of int32, shape (n, wanted)
        Their weights, in units of 2 ** -22.
    """
    scale = length / wanted
    stretch = max(scale, 1.0)  # a smaller picture is made of wider neighbourhoods
    reach = 2.0 * stretch
    centres = (np.arange(wanted) + 0.5) * scale
    first = np.maximum((centres - reach + 0.5).astype(np.int64), 0)
    end = np.minimum((centres + reach + 0.5).astype(np.int64), length)
    steps = np.arange(int(np.ceil(reach)) * 2 + 1)[:, None]
    values = _cubic((steps + first - centres + 0.5) / stretch)
    values[first + steps >= end] = 0.0
    total = np.zeros(wanted)
    for value in values:  # one after the other, for the rounding of the sum is PIL's, too
        total += value
    units = values / total * (1 << _WEIGHT_BITS)
    whole = np.trunc(units + np.where(units < 0, -0.5, 0.5)).astype(np.int32)
    places = np.minimum(first + steps, length - 1)
    return upload(places, device), upload(whole, device)


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the kernel of the cubic convolution."""
    a, x = _SHARPNESS, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    values: NDArray[np.float64] = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
    return values


def _on_host(
    frame: NDArray[np.uint8], image_size: int, resize: Resize, levels: Levels
) -> torch.Tensor:
    import torch
    import torch.nn.functional as F  # noqa: N812

    size = (image_size, image_size)
    if resize == "smooth":
        given = torch.from_numpy(np.ascontiguousarray(frame.transpose(2, 0, 1))[None]).float() / 255
        small = F.interpolate(given, size=size, mode="bilinear", antialias=True)
        mean, std = (torch.tensor(values)[:, None, None] for values in levels)
        return (small - mean) / std
    if resize == "bicubic":
        from PIL import Image

        # In two calls, for from version 13 on PIL does the columns of upright pictures first, which
        # rounds otherwise.
        image = Image.fromarray(frame)
        for part in ((image_size, image.height), size):
            image = image.resize(part, Image.Resampling.BICUBIC)
        small = np.asarray(image)
    else:
        import cv2

        small = np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_LINEAR))
    table = _table(levels)
    planes = [table[c][small[..., c]] for c in range(3)]
    return torch.from_numpy(np.stack(planes)[None])


@functools.cache
def _table_on(device: torch.device, levels: Levels) -> torch.Tensor:
    """Return the table of `_table` on a device, shape (3, 256)."""
    return upload(np.stack(_table(levels)), device)


@functools.cache
def _table(levels: Levels) -> list[NDArray[np.float32]]:
    """Return the value of each of the 256 levels, per channel.

    The division by 255 is in float64 and the rest in float32, which is what the originals' mixture
    of libraries amounts to; the last bit depends on it.
    """
    scaled = (np.arange(256) / 255.0).astype(np.float32)
    return [
        (scaled - np.float32(mean)) / np.float32(std) for mean, std in zip(*levels, strict=True)
    ]
