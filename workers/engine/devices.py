"""From the host to a device, without waiting for the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    import torch


def upload(values: ArrayLike, device: torch.device, dtype: Any = None) -> torch.Tensor:
    """Return values as a tensor on a device.

    Parameters
    ----------
    values : array-like
        Lists of numbers, or an array; it may change afterwards.
    device : torch.device
        Where they are wanted.
    dtype : numpy dtype, optional
        As what; by default as they are.

    Returns
    -------
    Tensor
        A copy, on the way to the device perhaps.

    Notes
    -----
    A copy out of ordinary memory would wait until a GPU has done all that was asked of it before.
    From locked memory it is one more thing in the queue; torch keeps that memory until it is done.
    """
    import torch

    array = np.asarray(values, dtype)
    if device.type != "cuda":
        return torch.tensor(array, device=device)
    like = torch.from_numpy(np.empty(0, array.dtype)).dtype
    locked = torch.empty(array.shape, dtype=like, pin_memory=True)
    locked.numpy()[...] = array
    return locked.to(device, non_blocking=True)
