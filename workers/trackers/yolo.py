"""Tracking by detection: YOLO segments every frame, identities follow mask overlap.

Each frame is segmented on its own; a live object continues as the detection that overlaps the
mask it was last seen with. The assignment of objects to detections is one-to-one and optimal
(Hungarian on mask IoU), so two objects never share a detection and no object takes the one that
another needs more. An object without a match is occluded, keeps its id and its last mask, and
comes back when a detection overlaps that mask again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from workers.masks import CroppedMask, box_iou_matrix, crop_mask, intersection, match_one_to_one
from workers.trackers.base import (
    IOU_MATCH_THRESHOLD,
    LOW_CONFIDENCE_IOU_THRESHOLD,
    SessionPrompt,
    TrackingConfig,
    TrackingFrame,
    TrackingMask,
    TrackingModelLoader,
    TrackingSession,
    UInt8Array,
    check_options,
)

if TYPE_CHECKING:
    from workers.yolo import YoloDetection, YoloNetwork

OPTIONS: Mapping[str, Any] = {
    "confidence": 0.25,
    "iou_threshold": IOU_MATCH_THRESHOLD,
    "nms_iou": 0.7,
    "max_detections": 300,
    "same_class": False,
}
"""Options and their defaults.

* ``confidence``: smallest confidence of a detection, 0..1.
* ``iou_threshold``: smallest IoU at which a detection continues an object, 0..1.
* ``nms_iou``: overlap above which the less confident of two boxes of a class goes, 0..1.
* ``max_detections``: most detections of a frame.
* ``same_class``: a detection of another class never continues an object whose class is known. Off
  by default: the class of one thing flickers from frame to frame far more often than things of
  different classes change places (mean J over six DAVIS sequences 0.63 without, 0.51 with it).
"""


@dataclass(slots=True)
class _TrackedObject:
    """What a session remembers of one object.

    Attributes
    ----------
    last_seen : CroppedMask or None
        Its mask where it was last present or prompted; None before that.
    waiting : list of SessionPrompt
        Boxes and points that no detection has answered yet. Until one does, they, not
        `last_seen`, say what the object is.
    category_id : int or None
        Class of the detection that first answered its prompt.
    """

    last_seen: CroppedMask | None = None
    waiting: list[SessionPrompt] = field(default_factory=list)
    category_id: int | None = None


class YoloSession(TrackingSession):
    """One video tracked by detection.

    Notes
    -----
    A prompt chooses the detection that becomes the object:

    * a mask, by mask IoU. On its own frame the object is the prompted mask, with confidence 1,
      whether or not there is a detection; later frames are matched to that mask. Beside a mask,
      boxes and points for the same object on the same frame are not needed and not used.
    * a box, by the IoU with the detection's box.
    * points, by the share of points on the right side of the detection's mask (foreground inside,
      background outside): more than half of them, at least one inside; of equals the smaller.

    A box or points that no detection answers leave the object occluded, and are asked again on
    each later frame until one does. Prompted objects choose before the others.

    ``confidence`` is the detection's, times ``min(1, overlap / 0.5)``: a match below
    `LOW_CONFIDENCE_IOU_THRESHOLD` is worth proportionally less.

    Parameters
    ----------
    loader : YOLO11SegLoader
        The loaded tracker.
    height, width : int
        Size of every frame in pixels.
    num_frames : int or None
        Not used: results do not depend on it.
    """

    kind: ClassVar[str] = "yolo"

    def __init__(
        self, loader: YOLO11SegLoader, height: int, width: int, num_frames: int | None = None
    ) -> None:
        super().__init__(height, width, num_frames=num_frames)
        self._loader = loader
        self._objects: dict[int, _TrackedObject] = {}

    def _advance(
        self, frame: UInt8Array, frame_idx: int, prompts: Sequence[SessionPrompt]
    ) -> list[TrackingFrame]:
        start = time.perf_counter()
        (detections,) = self._loader.detect([frame])
        return self.associate(frame_idx, prompts, detections, start)

    def associate(
        self,
        frame_idx: int,
        prompts: Sequence[SessionPrompt],
        detections: Sequence[YoloDetection],
        start_s: float,
    ) -> list[TrackingFrame]:
        """Give the detections of one frame to the objects; the second half of a step.

        Parameters
        ----------
        frame_idx : int
            Label of the frame.
        prompts : sequence of SessionPrompt
            The prompts of this frame.
        detections : sequence of YoloDetection
            What the network found on it.
        start_s : float
            `time.perf_counter` when work on the frame began.
        """
        options = self._loader.options
        prompted: dict[int, list[SessionPrompt]] = {}
        for prompt in prompts:
            prompted.setdefault(prompt.object_id, []).append(prompt)
        with_mask: set[int] = set()
        for object_id, given in prompted.items():
            known = self._objects.setdefault(object_id, _TrackedObject())
            known.waiting = given
            for prompt in given:
                if prompt.mask is not None:
                    with_mask.add(object_id)
                    known.last_seen, known.waiting = crop_mask(prompt.mask), []

        free = list(detections)
        found: dict[int, tuple[YoloDetection, float]] = {}
        others = [i for i in self.object_ids if i not in prompted]
        for object_ids in (list(prompted), others):
            overlap = np.zeros((len(object_ids), len(free)))
            for row, object_id in enumerate(object_ids):
                known = self._objects[object_id]
                checks_class = options["same_class"] and object_id not in prompted
                for column, detection in enumerate(free):
                    if checks_class and known.category_id not in (None, detection.category_id):
                        continue
                    overlap[row, column] = self._overlap(known, detection)
            pairs = match_one_to_one(overlap, options["iou_threshold"])
            for row, column in pairs:
                found[object_ids[row]] = free[column], float(overlap[row, column])
            taken = {column for _, column in pairs}
            free = [d for column, d in enumerate(free) if column not in taken]

        masks: list[TrackingMask] = []
        for object_id in sorted(self.object_ids):
            known = self._objects[object_id]
            confidence: float | None = None
            if object_id in found:
                detection, overlap_with_it = found[object_id]
                if known.category_id is None or object_id in prompted:
                    known.category_id = detection.category_id
                known.waiting = []
                weight = min(1.0, overlap_with_it / LOW_CONFIDENCE_IOU_THRESHOLD)
                confidence = min(1.0, detection.score * weight)
                if object_id not in with_mask:
                    known.last_seen = detection.mask
            if object_id in with_mask:
                confidence = 1.0
            if confidence is not None:
                assert known.last_seen is not None
                mask = known.last_seen.paste(self.height, self.width)
                masks.append(TrackingMask(mask, confidence, object_id))
        present = {mask.object_id for mask in masks}
        frame = TrackingFrame(
            frame_idx,
            masks,
            {object_id: object_id not in present for object_id in sorted(self.object_ids)},
            time.perf_counter() - start_s,
        )
        self._latest = frame
        return [frame]

    def _overlap(self, known: _TrackedObject, detection: YoloDetection) -> float:
        """Return how well a detection fits an object, 0..1."""
        if known.waiting:
            return min(self._prompt_overlap(prompt, detection) for prompt in known.waiting)
        return _mask_iou(known.last_seen, detection) if known.last_seen is not None else 0.0

    def _prompt_overlap(self, prompt: SessionPrompt, detection: YoloDetection) -> float:
        if prompt.box_xyxy is not None:
            box = np.clip(prompt.box_xyxy, 0, [self.width, self.height] * 2)
            iou = float(box_iou_matrix([box], [detection.box_xyxy])[0, 0])
            # The mask is only made where the boxes meet.
            return iou if iou and detection.mask is not None and detection.mask.area else 0.0
        assert prompt.points_xy is not None
        assert prompt.point_labels is not None
        return self._points_overlap(prompt.points_xy, prompt.point_labels, detection)

    def _points_overlap(
        self, points_xy: NDArray[Any], labels: NDArray[Any], detection: YoloDetection
    ) -> float:
        x0, y0, x1, y1 = detection.pixel_box_xyxy
        columns, rows = np.floor(points_xy).astype(int).T
        in_box = (columns >= x0) & (columns < x1) & (rows >= y0) & (rows < y1)
        if not (in_box & (labels == 1)).any() or detection.mask is None:
            return 0.0
        x0, y0, x1, y1 = detection.mask.box_xyxy
        inside = (columns >= x0) & (columns < x1) & (rows >= y0) & (rows < y1)
        inside[inside] = detection.mask.crop[rows[inside] - y0, columns[inside] - x0] > 0
        right = np.mean(inside == (labels == 1))
        if right <= 0.5 or not (inside & (labels == 1)).any():
            return 0.0
        # Too little to outweigh a point, enough to prefer the smaller of two equals.
        return float(right) - 1e-6 * detection.mask.area / (self.height * self.width)

    def _forget(self, object_id: int) -> None:
        self._objects.pop(object_id, None)

    def _get_state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        arrays: dict[str, NDArray[Any]] = {}
        objects: list[dict[str, Any]] = []
        for object_id, known in self._objects.items():
            entry: dict[str, Any] = {"object_id": object_id, "category_id": known.category_id}
            if known.last_seen is not None:
                entry["box_xyxy"] = known.last_seen.box_xyxy
                arrays[f"{object_id}.last_seen"] = known.last_seen.crop
            entry["num_waiting"] = len(known.waiting)
            for slot, prompt in enumerate(known.waiting):
                for name in ("box_xyxy", "points_xy", "point_labels"):
                    value = getattr(prompt, name)
                    if value is not None:
                        arrays[f"{object_id}.waiting.{slot}.{name}"] = value
            objects.append(entry)
        return arrays, {"objects": objects}

    def _set_state(self, arrays: Mapping[str, NDArray[Any]], header: Mapping[str, Any]) -> None:
        self._objects = {}
        for entry in header["objects"]:
            object_id = entry["object_id"]
            known = _TrackedObject(category_id=entry["category_id"])
            if "box_xyxy" in entry:
                crop = arrays[f"{object_id}.last_seen"]
                x0, y0, x1, y1 = entry["box_xyxy"]
                known.last_seen = CroppedMask((x0, y0, x1, y1), crop, int(np.count_nonzero(crop)))
            for slot in range(entry["num_waiting"]):
                values = {
                    name: arrays.get(f"{object_id}.waiting.{slot}.{name}")
                    for name in ("box_xyxy", "points_xy", "point_labels")
                }
                known.waiting.append(SessionPrompt(object_id, **values))
            self._objects[object_id] = known

    def _fingerprint(self) -> str:
        return self._loader.fingerprint


class YOLO11SegLoader(TrackingModelLoader):
    """Tracking by detection with an Ultralytics YOLO segmentation checkpoint.

    Serves every family whose head makes mask prototypes: ``yolov8*-seg``, ``yolo11*-seg``,
    ``yolo26*-seg``. The weights and ultralytics are AGPL-3.0.

    Parameters
    ----------
    config : TrackingConfig
        ``checkpoint_path`` is the local ``.pt`` file; without it ``MODEL_ID.pt`` in ``cache_dir``.
        ``image_size`` is the longer side of the network's input, rounded up to whole strides.
        Options are those of `OPTIONS`.

    Raises
    ------
    ValueError
        An option is unknown or out of range.
    """

    def __init__(self, config: TrackingConfig) -> None:
        super().__init__(config)
        self.options: dict[str, Any] = check_options(config.model_id, config.options, OPTIONS)
        for name in ("confidence", "iou_threshold", "nms_iou"):
            if not 0 <= self.options[name] <= 1:
                raise ValueError(
                    f"option {name} of tracker {config.model_id} must lie between 0 and 1, got "
                    f"{self.options[name]}"
                )
        if self.options["max_detections"] < 1:
            raise ValueError(
                f"option max_detections of tracker {config.model_id} must be at least 1, got "
                f"{self.options['max_detections']}"
            )
        self.fingerprint = ""
        """Digest of the weights and of every setting that changes masks; empty before `load`."""
        self._network: YoloNetwork | None = None

    @property
    def is_loaded(self) -> bool:
        """Whether `load` has run."""
        return self._network is not None

    @property
    def classes(self) -> Mapping[int, str]:
        """Class names by index; empty before `load`."""
        return dict(self._network.classes) if self._network is not None else {}

    def load(self) -> None:
        """Load the weights.

        Raises
        ------
        RuntimeError
            The weights are missing, truncated, not for segmentation or not YOLO's, or ultralytics
            or the device is not there.
        """
        import hashlib
        import json

        from workers.weights import file_sha256
        from workers.yolo import YoloNetwork

        config = self.config
        path = config.checkpoint_path
        if path is None and config.cache_dir is not None:
            path = str(Path(config.cache_dir) / f"{config.model_id}.pt")
        if path is None:
            raise RuntimeError(
                f"tracker {config.model_id} needs its weights, which are not downloaded for you: "
                f"give the checkpoint {config.model_id}.pt"
            )
        network = YoloNetwork(
            path,
            task="segment",
            device=config.device,
            image_size=config.image_size,
            dtype=config.dtype,
        )
        settings = {
            "sha256": file_sha256(path),
            "image_size": network.image_size,
            "dtype": config.dtype or "float32",
            "options": self.options,
        }
        text = json.dumps(settings, sort_keys=True)
        self.fingerprint = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self._network = network

    def unload(self) -> None:
        """Free the weights."""
        self._network = None

    def detect(self, frames: Sequence[UInt8Array]) -> list[list[YoloDetection]]:
        """Return the detections of each frame under the tracker's options.

        Raises
        ------
        RuntimeError
            Nothing is loaded.
        """
        self._check_loaded()
        assert self._network is not None
        return self._network.detect(
            frames,
            confidence=self.options["confidence"],
            nms_iou=self.options["nms_iou"],
            max_detections=self.options["max_detections"],
        )

    def _step_many(
        self, begun: Sequence[tuple[TrackingSession, UInt8Array, int, list[SessionPrompt]]]
    ) -> list[list[TrackingFrame]]:
        """Finish steps that were begun with one batch per frame size.

        What comes out is what the sessions would have returned one by one, up to the rounding of
        batched convolutions.
        """
        start = time.perf_counter()
        detections = self.detect([frame for _, frame, *_ in begun])
        results = []
        for (session, _, label, prompts), found in zip(begun, detections, strict=True):
            assert isinstance(session, YoloSession)
            results.append(session.associate(label, prompts, found, start))
        return results

    def _open(self, height: int, width: int, num_frames: int | None) -> TrackingSession:
        return YoloSession(self, height, width, num_frames)


def _mask_iou(mask: CroppedMask, detection: YoloDetection) -> float:
    """Return the IoU of a mask with a detection's, which is only made where the boxes meet."""
    x0, y0, x1, y1 = detection.pixel_box_xyxy
    mx0, my0, mx1, my1 = mask.box_xyxy
    if min(x1, mx1) <= max(x0, mx0) or min(y1, my1) <= max(y0, my0) or detection.mask is None:
        return 0.0
    shared = intersection(mask, detection.mask)
    return shared / (mask.area + detection.mask.area - shared) if shared else 0.0
