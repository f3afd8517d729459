"""From a frame to the network's picture: square, normalised, as the originals' loaders do it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Resize = Literal["bicubic", "bilinear", "smooth"]
"""``bicubic``: PIL's, antialiased, as the video loader of ``sam2``. ``bilinear``: OpenCV's on
bytes, as Gy920/segment-anything-2-real-time. ``smooth``: bilinear, antialiased, on floating-point
numbers, as the image predictor of ``sam2``."""

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


def to_pixels(frame: NDArray[np.uint8], image_size: int, resize: Resize) -> torch.Tensor:
    """Return a frame as the network's input.

    Parameters
    ----------
    frame : ndarray of uint8, shape (H, W, 3)
        RGB, 0-255.
    image_size : int
        Side of the square it is squashed to.
    resize : str
        See `Resize`.

    Returns
    -------
    Tensor of float32, shape (1, 3, image_size, image_size)
        Normalised by mean and deviation of ImageNet, on the CPU.
    """
    import torch
    import torch.nn.functional as F  # noqa: N812

    size = (image_size, image_size)
    if resize == "smooth":
        given = torch.from_numpy(np.ascontiguousarray(frame.transpose(2, 0, 1))[None]).float() / 255
        small = F.interpolate(given, size=size, mode="bilinear", antialias=True)
        mean, std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
        return (small - mean) / std
    if resize == "bicubic":
        from PIL import Image

        resized = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))
    else:
        import cv2

        resized = np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_LINEAR))
    table = _levels()
    planes = [table[c][resized[..., c]] for c in range(3)]
    return torch.from_numpy(np.stack(planes)[None])


@functools.cache
def _levels() -> list[NDArray[np.float32]]:
    """Return the value of each of the 256 levels, per channel.

    The division by 255 is in float64 and the rest in float32, which is what the originals' mixture
    of libraries amounts to; the last bit depends on it.
    """
    scaled = (np.arange(256) / 255.0).astype(np.float32)
    return [
        (scaled - np.float32(mean)) / np.float32(std) for mean, std in zip(_MEAN, _STD, strict=True)
    ]
