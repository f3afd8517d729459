"""Detectors: pictures in, prompts-to-be out.

A detector only says what is on one picture; which object a detection belongs to is decided by
`workers.prompts.modes`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from workers.errors import ConfigError
from workers.messages import DetectorSpec

UInt8Array = NDArray[np.uint8]

DETECTORS: Mapping[str, str] = {
    f"{family}{size}{suffix}": "AGPL-3.0"
    for family, sizes in (("yolov8", "nsmlx"), ("yolo11", "nsmlx"), ("yolo26", "nsmlx"))
    for size in sizes
    for suffix in ("", "-seg")
}
"""Names of the detectors, and the licence of each; any other YOLO checkpoint works under them."""


@dataclass(frozen=True, slots=True, eq=False)
class Detection:
    """One object found on one picture.

    Attributes
    ----------
    box_xyxy : tuple of 4 float
        Pixels of the picture.
    score : float
        Confidence, 0..1.
    category_id : int
        Index of the class in the detector's `classes`.
    mask : ndarray of uint8, shape (H, W), or None
        1 on the object, at the picture's size; None from a detector without masks.
    """

    box_xyxy: tuple[float, float, float, float]
    score: float
    category_id: int
    mask: UInt8Array | None = None


class Detector(Protocol):
    """What the pipeline needs of a detector."""

    def load(self) -> None:
        """Load the weights.

        Raises
        ------
        ConfigError
            The weights are missing, truncated or of another model, or a wanted class is unknown.
        """

    def unload(self) -> None:
        """Free the weights."""

    @property
    def classes(self) -> dict[int, str]:
        """Class names by index; known once loaded."""

    def detect(self, image: UInt8Array) -> list[Detection]:
        """Return the detections that count on one picture, the most confident first.

        Parameters
        ----------
        image : ndarray of uint8, shape (H, W, 3)
            RGB, 0-255.
        """


def create_detector(
    spec: DetectorSpec, *, device: str = "auto", checkpoint_path: str | Path | None = None
) -> Detector:
    """Make a detector; nothing is loaded yet.

    Parameters
    ----------
    spec : DetectorSpec
        Which one, and which of its detections count.
    device : str
        ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    checkpoint_path : str or Path, optional
        Local file of the weights; the specification's own checkpoint, taken as a path, when left
        out.

    Raises
    ------
    ConfigError
        The name is unknown.
    """
    name = spec.name.lower().replace("_", "-")
    if name not in DETECTORS:
        # The names are alike: far from all of them, the nearest ones say nothing.
        close = difflib.get_close_matches(name, DETECTORS, n=3, cutoff=0.8)
        close = close or ["yolo11n", "yolo11n-seg"]
        raise ConfigError(
            f"there is no detector {spec.name!r}: did you mean {_either(close)}? Known are YOLO "
            f"v8, 11 and 26 in the sizes n, s, m, l, x, each also as -seg"
        )
    return YoloDetector(spec, device=device, checkpoint_path=checkpoint_path)


class YoloDetector:
    """A YOLO detection or segmentation checkpoint as a detector.

    Parameters
    ----------
    spec : DetectorSpec
        Which detections count.
    device : str
        ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    checkpoint_path : str or Path or None
        Local file of the weights.
    """

    def __init__(
        self,
        spec: DetectorSpec,
        *,
        device: str = "auto",
        checkpoint_path: str | Path | None = None,
    ) -> None:
        self.spec = spec
        self._device = device
        self._path = checkpoint_path or spec.checkpoint
        self._network: Any = None
        self._kept: frozenset[int] | None = None

    def load(self) -> None:
        """Load the weights, and find the wanted classes in them.

        Raises
        ------
        ConfigError
            The weights are missing, truncated or of another model, or a wanted class is unknown.
        """
        from workers.yolo import YoloNetwork

        if self._path is None:
            raise ConfigError(
                f"detector {self.spec.name} needs its weights: give --detector-checkpoint with "
                f"the path or URL of {self.spec.name}.pt"
            )
        task = "segment" if self.spec.name.lower().endswith("seg") else "detect"
        try:
            self._network = YoloNetwork(self._path, task=task, device=self._device)
        except RuntimeError as error:
            raise ConfigError(f"detector {self.spec.name}: {error}") from error
        self._kept = _find_classes(self.spec.classes, self._network.classes)

    def unload(self) -> None:
        """Free the weights."""
        self._network = None

    @property
    def classes(self) -> dict[int, str]:
        """Class names by index; empty before `load`."""
        return dict(self._network.classes) if self._network is not None else {}

    def detect(self, image: UInt8Array) -> list[Detection]:
        """Return the detections that count on one picture, the most confident first.

        Parameters
        ----------
        image : ndarray of uint8, shape (H, W, 3)
            RGB, 0-255.

        Returns
        -------
        list of Detection
            Of a segmentation network only those with at least one mask pixel.

        Raises
        ------
        RuntimeError
            `load` was not called.
        """
        if self._network is None:
            raise RuntimeError(f"detector {self.spec.name} is not loaded: call load() first")
        height, width = image.shape[:2]
        kept: list[Detection] = []
        for found in self._network.detect(
            [image], confidence=self.spec.confidence, categories=self._kept
        )[0]:
            if self.spec.max_objects is not None and len(kept) == self.spec.max_objects:
                break
            mask = found.mask
            if mask is not None and not mask.area:
                continue
            pasted = None if mask is None else mask.paste(height, width)
            kept.append(Detection(found.box_xyxy, found.score, found.category_id, pasted))
        return kept


def _find_classes(wanted: Sequence[str], classes: Mapping[int, str]) -> frozenset[int] | None:
    """Return the indices of the wanted names or indices; None when all are wanted."""
    if not wanted:
        return None
    by_name = {name.lower(): index for index, name in classes.items()}
    found = set()
    for text in wanted:
        if text.strip().lower() in by_name:
            found.add(by_name[text.strip().lower()])
        elif text.strip().isdecimal() and int(text) in classes:
            found.add(int(text))
        else:
            close = difflib.get_close_matches(text.strip().lower(), by_name, n=3)
            hint = f"did you mean {_either(close)}?" if close else f"it knows {_some(by_name)}"
            raise ConfigError(f"the detector has no class {text!r}: {hint}")
    return frozenset(found)


def _either(names: Sequence[str]) -> str:
    return " or ".join(names)


def _some(names: Mapping[str, int]) -> str:
    shown = ", ".join(list(names)[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"
