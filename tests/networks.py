"""YOLO checkpoints for tests: the real ones where they are, small random ones everywhere.

A random network finds nonsense, but it finds it deterministically and in the format of its family,
which is what loading, letterboxing, suppression and mask assembly are tested on.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.media import shared_dir
from workers.yolo import _import_ultralytics

NUM_CLASSES = 5
IMAGE_SIZE = 160


def scene(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return a picture of smooth coloured blobs, uint8 RGB, shape (height, width, 3)."""
    import cv2

    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)


def real_checkpoint(name: str) -> Path:
    """Return an official checkpoint; absent weights skip at home and fail in CI."""
    path = shared_dir() / "weights" / name
    if not path.is_file():
        if os.environ.get("CI") == "true":
            pytest.fail(f"the official checkpoint {name} is missing")
        pytest.skip(f"no checkpoint {name} here")
    _use_one_thread()
    return path


def random_checkpoint(folder: Path, family: str, *, end2end: bool = False) -> Path:
    """Write an untrained network of a family, for instance ``yolo26n-seg``.

    Parameters
    ----------
    folder : Path
        Where to write it.
    family : str
        Name of the architecture.
    end2end : bool
        Use the head that needs no suppression, where the family has one.
    """
    _use_one_thread()
    path = folder / f"{family}{'-e2e' if end2end else ''}.pt"
    if path.exists():
        return path
    torch, tasks = _import_ultralytics()
    torch.manual_seed(0)
    segments = family.endswith("-seg")
    make = tasks.SegmentationModel if segments else tasks.DetectionModel
    model = make(f"{family}.yaml", nc=NUM_CLASSES, verbose=False)
    # One training pass sets the normalisation, without which the signal dies on the way. The last
    # layers are set so that some boxes of a few strides pass a confidence of 0.25.
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        pictures = np.stack([scene(IMAGE_SIZE, IMAGE_SIZE, seed) for seed in range(8)])
        model.train()(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255)
    model.eval()
    head = model.model[-1]
    for branch in [*head.cv3, *(getattr(head, "one2one_cv3", None) or [])]:
        branch[-1].bias.data.fill_(-2)
        branch[-1].weight.data *= 2
    if head.reg_max == 1:
        for branch in [*head.cv2, *head.one2one_cv2]:
            branch[-1].bias.data.fill_(3)
            branch[-1].weight.data *= 0.5
    if end2end:
        head.end2end = True
    task = "segment" if segments else "detect"
    torch.save({"model": model, "train_args": {"imgsz": IMAGE_SIZE, "task": task}}, path)
    return path


def _use_one_thread() -> None:
    """Keep torch from starting threads that only get in each other's way on a busy machine."""
    torch, _ = _import_ultralytics()
    torch.set_num_threads(1)
