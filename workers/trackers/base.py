"""The tracker contract: a loaded model, and one video's session on it.

The model holds weights only; prompts, object ids and memory of one video live in a
`TrackingSession` that is thrown away at its end. The batch call `TrackingModelLoader.track` is
built on the session, so both see the same masks. What every tracker must get right in the same
way (validation, the order of frames, prompts kept for later frames, snapshots) is done here once;
a family implements the methods with a leading underscore.
"""

from __future__ import annotations

import abc
import json
import operator
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from workers import rle

if TYPE_CHECKING:
    from PIL import Image

OCCLUSION_CONFIDENCE_THRESHOLD = 0.5
"""Below this confidence a tracker without a presence logit reports an object as occluded."""
IOU_MATCH_THRESHOLD = 0.3
"""Smallest mask IoU at which a detection is taken for a known object."""
LOW_CONFIDENCE_IOU_THRESHOLD = 0.5
"""Matches below this IoU are reported with reduced confidence."""

SNAPSHOT_VERSION = 2

UInt8Array = NDArray[np.uint8]


class TrackingFramework(StrEnum):
    """Which library the weights belong to."""

    PYTORCH = "pytorch"
    ULTRALYTICS = "ultralytics"
    SAM2 = "sam2"


@dataclass(frozen=True)
class TrackingConfig:
    """How to load a tracker.

    Attributes
    ----------
    model_id : str
        Registered name with an optional ``:SIZE``, or a hub id.
    framework : TrackingFramework
        Library of the weights.
    device : str
        ``cpu``, ``cuda`` or ``cuda:N``. Trackers that have no use for a GPU ignore it.
    cache_dir : str or None
        Where weights are kept.
    checkpoint_path : str or None
        Local path of the weights.
    image_size : int or None
        Side of the model's square input in pixels; None is the model's own.
    dtype : str or None
        ``float32``, ``bfloat16`` or ``float16``; None is the tracker's own.
    options : Mapping
        Tracker options by name; unknown names are errors.
    """

    model_id: str
    framework: TrackingFramework = TrackingFramework.PYTORCH
    device: str = "cuda"
    cache_dir: str | None = None
    checkpoint_path: str | None = None
    image_size: int | None = None
    dtype: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


class TrackingMask:
    """The mask of one object on one frame.

    Parameters
    ----------
    mask : ndarray of uint8, shape (H, W), or rle.LazyMask
        1 where the object is visible, else 0; pixels of the original frame.
    confidence : float
        The tracker's own estimate of the mask's quality, 0..1.
    object_id : int
        Identity of the object.

    Raises
    ------
    ValueError
        An array is of another type or shape.
    """

    __slots__ = ("_mask", "confidence", "object_id")

    def __init__(self, mask: UInt8Array | rle.LazyMask, confidence: float, object_id: int) -> None:
        if not isinstance(mask, rle.LazyMask):
            if mask.ndim != 2 or mask.dtype != np.uint8:
                raise ValueError(
                    f"a mask must be uint8 of shape (H, W), got {mask.dtype} {mask.shape}"
                )
            mask = rle.LazyMask.of(mask)
        self._mask = mask
        self.confidence = confidence
        self.object_id = object_id

    @property
    def mask(self) -> UInt8Array:
        """1 where the object is visible, shape (H, W); made when it is asked for."""
        return self._mask.pixels

    @property
    def num_bytes(self) -> int:
        """Memory the mask takes now."""
        return self._mask.num_bytes

    def __repr__(self) -> str:
        return (
            f"TrackingMask(object_id={self.object_id}, confidence={self.confidence:.3f}, "
            f"mask={(self._mask.height, self._mask.width)})"
        )

    def encoded(self) -> rle.EncodedMask:
        """Return the mask as it is stored, with area, box and border contact."""
        return self._mask.encoded()

    def to_rle(self) -> dict[str, Any]:
        """Return the mask as COCO RLE, ``{"size": [H, W], "counts": str}``."""
        size = [self._mask.height, self._mask.width]
        return {"size": size, "counts": self._mask.counts.decode("ascii")}


@dataclass(frozen=True, slots=True)
class TrackingFrame:
    """The state of every live object on one frame.

    Attributes
    ----------
    frame_idx : int
        The label the frame was stepped with.
    masks : list of TrackingMask
        The objects that are present, ordered by object id.
    occlusions : dict of int to bool
        Every live object: True where it is occluded or gone.
    processing_time : float
        Seconds spent on the frame.
    """

    frame_idx: int
    masks: list[TrackingMask]
    occlusions: dict[int, bool]
    processing_time: float


@dataclass(frozen=True, slots=True)
class TrackingResult:
    """All frames of one batch call.

    Attributes
    ----------
    frames : list of TrackingFrame
        One per input frame, in order.
    video_width, video_height : int
        Size of the frames in pixels.
    total_processing_time : float
        Seconds for the whole call.
    fps : float
        Frames per second of the call.
    """

    frames: list[TrackingFrame]
    video_width: int
    video_height: int
    total_processing_time: float
    fps: float


@dataclass(frozen=True, slots=True)
class SessionPrompt:
    """One validated prompt, as a tracker family receives it.

    Exactly one of `box_xyxy`, `points_xy` (with `point_labels`) and `mask` is set.

    Attributes
    ----------
    object_id : int
        The object it belongs to.
    box_xyxy : ndarray of float64, shape (4,), or None
        Ordered corners, pixels of the original frame.
    points_xy : ndarray of float64, shape (P, 2), or None
        Pixels of the original frame.
    point_labels : ndarray of int64, shape (P,), or None
        1 foreground, 0 background.
    mask : ndarray of uint8, shape (H, W), or None
        1 on the object.
    """

    object_id: int
    box_xyxy: NDArray[np.float64] | None = None
    points_xy: NDArray[np.float64] | None = None
    point_labels: NDArray[np.int64] | None = None
    mask: UInt8Array | None = None


class TrackingSession(abc.ABC):
    """One video's mutable state on a loaded model.

    Time is the count of steps; `frame_idx` is only a label, strictly increasing, or strictly
    decreasing in a reverse pass. After a `ValueError` the session is as it was before the call and
    stays usable; after any other exception it must be closed.

    Parameters
    ----------
    height, width : int
        Size of every frame in pixels.
    num_frames : int or None
        Length of the video where it is known and results may depend on it; None for a stream.
    """

    kind: ClassVar[str]
    """Name of the family; part of a snapshot's header."""

    def __init__(self, height: int, width: int, *, num_frames: int | None = None) -> None:
        if height < 1 or width < 1:
            raise ValueError(f"a frame must have at least one pixel, got {height}x{width}")
        self.height = height
        self.width = width
        self.num_frames = num_frames
        self.num_steps = 0
        self.object_ids: list[int] = []
        self._last_idx: int | None = None
        self._direction = 0
        self._pending: dict[int, list[SessionPrompt]] = {}
        self._latest: TrackingFrame | None = None
        self._ever_prompted = False
        self._finished = False
        self._closed = False

    # -- what a family implements ------------------------------------------------------------

    @abc.abstractmethod
    def _advance(
        self, frame: UInt8Array, frame_idx: int, prompts: Sequence[SessionPrompt]
    ) -> list[TrackingFrame]:
        """Track one frame; the prompts of this frame act on it. Sets `_latest`.

        New object ids are already in `object_ids` when it is called.
        """

    def _flush(self) -> list[TrackingFrame]:
        """Return the frames that were still undecided; the end of the video was reached."""
        return []

    @abc.abstractmethod
    def _forget(self, object_id: int) -> None:
        """Drop the state of one object."""

    @abc.abstractmethod
    def _get_state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Return the family's state as named arrays and a JSON-serialisable mapping."""

    @abc.abstractmethod
    def _set_state(self, arrays: Mapping[str, NDArray[Any]], header: Mapping[str, Any]) -> None:
        """Take back what `_get_state` returned."""

    @abc.abstractmethod
    def _fingerprint(self) -> str:
        """Return a digest of the weights and of every setting that changes masks."""

    # -- the public face ---------------------------------------------------------------------

    def prompt(
        self,
        frame_idx: int,
        object_id: int,
        *,
        box_xyxy: ArrayLike | None = None,
        points_xy: ArrayLike | None = None,
        point_labels: ArrayLike | None = None,
        mask: ArrayLike | None = None,
    ) -> None:
        """Register a prompt for the frame about to be stepped, or a later one.

        Parameters
        ----------
        frame_idx : int
            Label of the frame the prompt belongs to. It acts from this frame on.
        object_id : int
            Object it belongs to; a new id is a new object.
        box_xyxy : array-like, shape (4,), optional
            Corners in pixels of the original frame; reversed corners are put in order.
        points_xy : array-like, shape (P, 2), optional
            Points in pixels of the original frame.
        point_labels : array-like, shape (P,), optional
            1 foreground, 0 background; all foreground when left out.
        mask : array-like, shape (H, W), optional
            Above 0 on the object.

        Raises
        ------
        ValueError
            The frame is already past, the prompt is empty, malformed or outside the picture.
        RuntimeError
            The session is closed or finished.
        """
        self._check_open()
        if self._finished:
            raise RuntimeError("the session is finished: open another one for another video")
        frame_idx, object_id = _as_int(frame_idx, "frame_idx"), _as_int(object_id, "object_id")
        prompt = self._validated(object_id, box_xyxy, points_xy, point_labels, mask)
        if self._last_idx is not None and not self._is_ahead(frame_idx):
            raise ValueError(
                f"the prompt for object {object_id} is on frame {frame_idx}, but frame "
                f"{self._last_idx} was already tracked: prompt a frame before stepping it"
            )
        self._pending.setdefault(frame_idx, []).append(prompt)
        self._ever_prompted = True

    def remove(self, object_id: int) -> None:
        """Forget an object: it is in no later frame.

        Raises
        ------
        ValueError
            No live or registered object has this id.
        """
        self._check_open()
        waiting = any(p.object_id == object_id for ps in self._pending.values() for p in ps)
        if object_id not in self.object_ids and not waiting:
            raise ValueError(f"there is no object {object_id}: live ids are {self.object_ids}")
        for idx in list(self._pending):
            kept = [p for p in self._pending[idx] if p.object_id != object_id]
            if kept:
                self._pending[idx] = kept
            else:
                del self._pending[idx]
        if object_id in self.object_ids:
            self.object_ids.remove(object_id)
            self._forget(object_id)
            if self._latest is not None:
                self._latest = TrackingFrame(
                    self._latest.frame_idx,
                    [m for m in self._latest.masks if m.object_id != object_id],
                    {k: v for k, v in self._latest.occlusions.items() if k != object_id},
                    self._latest.processing_time,
                )

    def step(self, frame: UInt8Array, *, frame_idx: int | None = None) -> list[TrackingFrame]:
        """Track one frame and return the frames that became final.

        Parameters
        ----------
        frame : ndarray of uint8, shape (H, W, 3)
            RGB, 0-255.
        frame_idx : int, optional
            Its label; one after the last when left out (0 at first).

        Returns
        -------
        list of TrackingFrame
            Zero or more final frames, each of which comes out once, in order.

        Raises
        ------
        ValueError
            Wrong size or dtype, a label out of order, or a registered prompt was passed over.
        RuntimeError
            No prompt was ever registered, or the session is closed or finished.
        """
        label, prompts = self.begin_step(frame, frame_idx)
        return self.run_step(frame, label, prompts)

    def check_step(self, frame: UInt8Array, frame_idx: int | None) -> tuple[int, int]:
        """Raise what `step` would raise for a wrong call; change nothing.

        Returns
        -------
        label : int
            The frame's label.
        direction : int
            1 or -1 as labels increase or decrease, 0 before the second frame.
        """
        self._check_open()
        if self._finished:
            raise RuntimeError("the session is finished: open another one for another video")
        self._check_frame(frame)
        if not self._ever_prompted:
            raise RuntimeError("step before any prompt: call prompt() first")
        label = self._next_idx() if frame_idx is None else _as_int(frame_idx, "frame_idx")
        direction = self._direction
        if self._last_idx is not None:
            if label == self._last_idx or (direction and (label - self._last_idx) * direction < 0):
                order = "decreasing" if direction < 0 else "increasing"
                raise ValueError(
                    f"frame_idx must be strictly {order}, got {label} after {self._last_idx}"
                )
            direction = 1 if label > self._last_idx else -1
        missed = [i for i in self._pending if direction and (label - i) * direction > 0]
        if missed:
            raise ValueError(
                f"frame {label} passes over frame {missed[0]}, for which a prompt is registered"
            )
        return label, direction

    def begin_step(
        self, frame: UInt8Array, frame_idx: int | None
    ) -> tuple[int, list[SessionPrompt]]:
        """Validate a step and take its prompts; the first half of `step`.

        `TrackingModelLoader.step_many` calls this for each session.
        """
        label, self._direction = self.check_step(frame, frame_idx)
        self._last_idx = label
        self.num_steps += 1
        prompts = self._pending.pop(label, [])
        for prompt in prompts:
            if prompt.object_id not in self.object_ids:
                self.object_ids.append(prompt.object_id)
        return label, prompts

    def run_step(
        self, frame: UInt8Array, label: int, prompts: Sequence[SessionPrompt]
    ) -> list[TrackingFrame]:
        """Run the second half of `step`, with what `begin_step` returned."""
        empty = self.empty_step(label)
        return self._advance(frame, label, prompts) if empty is None else empty

    def empty_step(self, label: int) -> list[TrackingFrame] | None:
        """Return the empty frame of a step with nothing to track, None where there is something."""
        if self.object_ids or not self._is_idle():
            return None
        self._latest = TrackingFrame(label, [], {}, 0.0)
        return [self._latest]

    def look_ahead(self, frames: Sequence[UInt8Array]) -> None:  # noqa: B027 (most have no use)
        """Say which frames will be stepped next, in this order; results do not depend on it.

        Parameters
        ----------
        frames : sequence of ndarray of uint8, shape (H, W, 3)
            The very arrays that `step` will be given, unchanged. A tracker may compute what
            depends on nothing else in one batch, at most for `TrackingModelLoader.num_ahead`.
        """

    def finish(self) -> list[TrackingFrame]:
        """End the video and return the frames that were still undecided.

        Raises
        ------
        ValueError
            A prompt is registered for a frame that was never stepped.
        """
        self._check_open()
        if self._finished:
            return []
        if self._pending:
            raise ValueError(
                f"the video ended, but a prompt is registered for frame {min(self._pending)}"
            )
        self._finished = True
        return self._flush()

    def latest(self) -> TrackingFrame | None:
        """Return the best estimate for the last stepped frame, None before the first."""
        return self._latest

    def snapshot(self) -> bytes:
        """Return the whole session as bytes that `TrackingModelLoader.restore` takes.

        Returns
        -------
        bytes
            A safetensors file whose metadata holds a version, the fingerprint of weights and
            configuration, and the undecided frames. Never a pickle.
        """
        from safetensors.numpy import save

        self._check_open()
        arrays, extra = self._get_state()
        packed = {f"state.{name}": np.ascontiguousarray(a) for name, a in arrays.items()}
        pending: list[dict[str, Any]] = []
        for idx, prompts in self._pending.items():
            for prompt in prompts:
                slot = len(pending)
                entry: dict[str, Any] = {"frame_idx": idx, "object_id": prompt.object_id}
                for name in ("box_xyxy", "points_xy", "point_labels", "mask"):
                    value = getattr(prompt, name)
                    if value is not None:
                        packed[f"pending.{slot}.{name}"] = np.ascontiguousarray(value)
                pending.append(entry)
        latest = None
        if self._latest is not None:
            latest = {
                "frame_idx": self._latest.frame_idx,
                "occlusions": {str(k): v for k, v in self._latest.occlusions.items()},
                "processing_time": self._latest.processing_time,
                "masks": [[m.object_id, m.confidence] for m in self._latest.masks],
            }
            for mask in self._latest.masks:
                packed[f"latest.{mask.object_id}"] = np.ascontiguousarray(mask.mask)
        header = {
            "version": SNAPSHOT_VERSION,
            "kind": self.kind,
            "fingerprint": self._fingerprint(),
            "height": self.height,
            "width": self.width,
            "num_frames": self.num_frames,
            "num_steps": self.num_steps,
            "object_ids": self.object_ids,
            "last_idx": self._last_idx,
            "direction": self._direction,
            "ever_prompted": self._ever_prompted,
            "finished": self._finished,
            "pending": pending,
            "latest": latest,
            "extra": extra,
        }
        return bytes(save(packed, metadata={"maskmill": json.dumps(header)}))

    def restore_state(self, data: bytes) -> None:
        """Take the state of a snapshot made by the same tracker with the same weights.

        Raises
        ------
        ValueError
            The bytes are no snapshot, or one of other weights, settings or version.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        header = read_snapshot_header(data)
        if header["kind"] != self.kind or header["fingerprint"] != self._fingerprint():
            raise ValueError(
                f"the snapshot was made by tracker {header['kind']!r} with other weights or "
                f"settings: restore it with the loader it came from"
            )
        if (header["height"], header["width"]) != (self.height, self.width):
            raise ValueError(
                f"the snapshot is of a {header['width']}x{header['height']} video, this session "
                f"of a {self.width}x{self.height} one"
            )
        try:
            arrays = load(data)
        except SafetensorError as error:
            raise ValueError(f"the session snapshot is damaged: {error}") from error
        self.num_steps = header["num_steps"]
        self.object_ids = list(header["object_ids"])
        self._last_idx = header["last_idx"]
        self._direction = header["direction"]
        self._ever_prompted = header["ever_prompted"]
        self._finished = header["finished"]
        self._pending = {}
        for slot, entry in enumerate(header["pending"]):
            values = {
                name: arrays.get(f"pending.{slot}.{name}")
                for name in ("box_xyxy", "points_xy", "point_labels", "mask")
            }
            prompt = SessionPrompt(entry["object_id"], **values)
            self._pending.setdefault(entry["frame_idx"], []).append(prompt)
        latest = header["latest"]
        self._latest = latest and TrackingFrame(
            latest["frame_idx"],
            [TrackingMask(arrays[f"latest.{oid}"], conf, oid) for oid, conf in latest["masks"]],
            {int(k): v for k, v in latest["occlusions"].items()},
            latest["processing_time"],
        )
        state = {k[6:]: v for k, v in arrays.items() if k.startswith("state.")}
        self._set_state(state, header["extra"])

    def close(self) -> None:
        """Free the session's memory; it cannot be used afterwards."""
        if self._closed:
            return
        for object_id in list(self.object_ids):
            self._forget(object_id)
        self.object_ids = []
        self._pending = {}
        self._latest = None
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    # -- private -----------------------------------------------------------------------------

    def _is_idle(self) -> bool:
        """Return whether an empty frame may be emitted at once (nothing is undecided)."""
        return True

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the session is closed: open another one")

    def _check_frame(self, frame: UInt8Array) -> None:
        if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8:
            got = getattr(frame, "dtype", type(frame).__name__)
            raise ValueError(f"a frame must be a uint8 RGB array, got {got}")
        if frame.shape != (self.height, self.width, 3):
            raise ValueError(
                f"a frame must be RGB of shape ({self.height}, {self.width}, 3), got {frame.shape}"
            )

    def _is_ahead(self, frame_idx: int) -> bool:
        assert self._last_idx is not None
        if self._direction == 0:
            return frame_idx != self._last_idx
        return (frame_idx - self._last_idx) * self._direction > 0

    def _next_idx(self) -> int:
        if self._last_idx is None:
            return 0
        return self._last_idx + (self._direction or 1)

    def _validated(
        self,
        object_id: int,
        box_xyxy: ArrayLike | None,
        points_xy: ArrayLike | None,
        point_labels: ArrayLike | None,
        mask: ArrayLike | None,
    ) -> SessionPrompt:
        if sum(v is not None for v in (box_xyxy, points_xy, mask)) != 1:
            raise ValueError(f"the prompt for object {object_id} needs one of box, points, mask")
        if points_xy is None and point_labels is not None:
            raise ValueError(f"object {object_id} has point labels, but no points")
        if box_xyxy is not None:
            box = _as_array(box_xyxy, np.float64).reshape(-1)
            if box.shape != (4,) or not np.isfinite(box).all():
                raise ValueError(
                    f"the box of object {object_id} must be 4 finite numbers, got {box.tolist()}"
                )
            x0, x1 = sorted(box[[0, 2]])
            y0, y1 = sorted(box[[1, 3]])
            if x1 <= x0 or y1 <= y0:
                raise ValueError(f"the box of object {object_id} has no area: {box.tolist()}")
            if x1 <= 0 or y1 <= 0 or x0 >= self.width or y0 >= self.height:
                raise ValueError(
                    f"the box of object {object_id} is outside the {self.width}x{self.height} "
                    f"picture: {box.tolist()}"
                )
            return SessionPrompt(object_id, box_xyxy=np.array([x0, y0, x1, y1]))
        if points_xy is not None:
            points = _as_array(points_xy, np.float64)
            if points.ndim == 1:
                points = points.reshape(1, -1)
            if points.ndim != 2 or points.shape[1] != 2 or not len(points):
                raise ValueError(
                    f"the points of object {object_id} must have shape (P, 2): {points.shape}"
                )
            if not np.isfinite(points).all():
                raise ValueError(f"a point of object {object_id} is not a finite number")
            inside = (points >= 0) & (points < [self.width, self.height])
            if not inside.all():
                raise ValueError(
                    f"a point of object {object_id} is outside the {self.width}x{self.height} "
                    f"picture: {points[~inside.all(axis=1)][0].tolist()}"
                )
            labels = (
                np.ones(len(points), np.int64)
                if point_labels is None
                else _as_array(point_labels, np.int64).reshape(-1)
            )
            if len(labels) != len(points) or not np.isin(labels, (0, 1)).all():
                raise ValueError(
                    f"object {object_id} needs one label, 0 or 1, per point: {labels.tolist()}"
                )
            if not labels.any():
                raise ValueError(f"object {object_id} needs at least one foreground point")
            return SessionPrompt(object_id, points_xy=points, point_labels=labels)
        array = _as_array(mask, None)
        array = array[0] if array.ndim == 3 and array.shape[0] == 1 else array
        if array.shape != (self.height, self.width):
            raise ValueError(
                f"the mask of object {object_id} must have shape ({self.height}, {self.width}), "
                f"got {array.shape}"
            )
        binary = (array > 0).astype(np.uint8)
        if not binary.any():
            raise ValueError(f"the mask of object {object_id} is empty")
        return SessionPrompt(object_id, mask=binary)


class TrackingModelLoader(abc.ABC):
    """A tracker: loads weights once, then opens any number of sessions on them.

    Parameters
    ----------
    config : TrackingConfig
        What to load, and how.

    Raises
    ------
    ValueError
        An option of the configuration is unknown or out of range.
    """

    def __init__(self, config: TrackingConfig) -> None:
        self.config = config

    @property
    @abc.abstractmethod
    def is_loaded(self) -> bool:
        """Whether `load` has run."""

    @property
    def can_track(self) -> bool:
        """Whether the loaded weights can track; False where they only segment prompted frames."""
        return True

    @property
    def classes(self) -> Mapping[int, str]:
        """Class names by index, for trackers that detect; empty for the others."""
        return {}

    @property
    def dtype(self) -> str:
        """Number format that the loaded network computes in; empty for trackers without one."""
        return ""

    @abc.abstractmethod
    def load(self) -> None:
        """Load the weights.

        Raises
        ------
        RuntimeError
            The weights are missing, truncated or of another model, or the device is not there.
        """

    @abc.abstractmethod
    def unload(self) -> None:
        """Free the weights."""

    @abc.abstractmethod
    def _open(self, height: int, width: int, num_frames: int | None) -> TrackingSession:
        """Return a fresh session."""

    def open_session(
        self, height: int, width: int, *, num_frames: int | None = None
    ) -> TrackingSession:
        """Open a session for a video of this size.

        Parameters
        ----------
        height, width : int
            Size of every frame in pixels.
        num_frames : int, optional
            Length of the video; None for a stream of unknown length.

        Returns
        -------
        TrackingSession
            A fresh session; the caller closes it.

        Raises
        ------
        RuntimeError
            Nothing is loaded.
        """
        self._check_loaded()
        return self._open(height, width, num_frames)

    def restore(self, data: bytes) -> TrackingSession:
        """Open the session a snapshot was taken of; it continues with identical results.

        Raises
        ------
        ValueError
            The bytes are no snapshot, or one of other weights, settings or version.
        RuntimeError
            Nothing is loaded.
        """
        self._check_loaded()
        header = read_snapshot_header(data)
        session = self._open(header["height"], header["width"], header["num_frames"])
        session.restore_state(data)
        return session

    @property
    def num_ahead(self) -> int:
        """Frames that are worth naming to `TrackingSession.look_ahead`; 0 where it has no use."""
        return 0

    def step_many(
        self,
        steps: Sequence[tuple[TrackingSession, UInt8Array]],
        *,
        frame_idxs: Sequence[int | None] | None = None,
    ) -> list[list[TrackingFrame]]:
        """Step many sessions of this model together.

        Parameters
        ----------
        steps : sequence of (TrackingSession, ndarray of uint8, shape (H, W, 3))
            Each session at most once.
        frame_idxs : sequence of int or None, optional
            A label for each frame, as for `TrackingSession.step`.

        Returns
        -------
        list of list of TrackingFrame
            For each pair what `TrackingSession.step` would have returned.

        Raises
        ------
        ValueError
            A session occurs twice, or what `TrackingSession.step` raises for one of them; all
            sessions are then as they were.
        RuntimeError
            As `TrackingSession.step`.
        """
        labels = [None] * len(steps) if frame_idxs is None else list(frame_idxs)
        if len(labels) != len(steps):
            raise ValueError(f"{len(labels)} labels do not match {len(steps)} frames")
        if len({id(session) for session, _ in steps}) != len(steps):
            raise ValueError("a session occurs twice: step it once for each of its frames")
        for (session, frame), label in zip(steps, labels, strict=True):
            session.check_step(frame, label)
        results: dict[int, list[TrackingFrame]] = {}
        begun = []
        for place, ((session, frame), given) in enumerate(zip(steps, labels, strict=True)):
            label, prompts = session.begin_step(frame, given)
            empty = session.empty_step(label)
            if empty is None:
                begun.append((place, (session, frame, label, prompts)))
            else:
                results[place] = empty
        if begun:
            stepped = self._step_many([step for _, step in begun])
            results |= zip((place for place, _ in begun), stepped, strict=True)
        return [results[place] for place in range(len(steps))]

    def _step_many(
        self, begun: Sequence[tuple[TrackingSession, UInt8Array, int, list[SessionPrompt]]]
    ) -> list[list[TrackingFrame]]:
        """Finish steps that were begun: session, frame, label and prompts of each."""
        return [session.run_step(frame, label, prompts) for session, frame, label, prompts in begun]

    def track(
        self,
        frames: Sequence[Image.Image],
        initial_masks: Sequence[ArrayLike],
        object_ids: Sequence[int],
    ) -> TrackingResult:
        """Track objects from their masks on the first frame through a whole clip.

        Parameters
        ----------
        frames : list of PIL.Image
            The clip, all of one size.
        initial_masks : list of ndarray, shape (H, W)
            Masks on the first frame, non-zero on the object.
        object_ids : list of int
            One id per mask.

        Returns
        -------
        TrackingResult
            One `TrackingFrame` per input frame.

        Raises
        ------
        ValueError
            Masks and ids differ in number, an id is given twice, or there is nothing to track.
        RuntimeError
            Nothing is loaded, or tracking failed.
        """
        if len(initial_masks) != len(object_ids):
            raise ValueError(
                f"{len(initial_masks)} initial masks do not match {len(object_ids)} object ids"
            )
        if len(set(object_ids)) != len(object_ids):
            raise ValueError(f"an object id is given twice: {list(object_ids)}")
        if not frames or not object_ids:
            raise ValueError("track needs at least one frame and one object")
        self._check_loaded()
        start = time.perf_counter()
        width, height = frames[0].size
        results: list[TrackingFrame] = []
        with self.open_session(height, width, num_frames=len(frames)) as session:
            for mask, object_id in zip(initial_masks, object_ids, strict=True):
                session.prompt(0, object_id, mask=mask)
            try:
                for image in frames:
                    results += session.step(np.asarray(image.convert("RGB")))
                results += session.finish()
            except (ValueError, RuntimeError):
                raise
            except Exception as error:
                raise RuntimeError(
                    f"tracking failed on frame {session.num_steps - 1}: {error}"
                ) from error
        total = time.perf_counter() - start
        return TrackingResult(results, width, height, total, len(frames) / total if total else 0.0)

    def _check_loaded(self) -> None:
        if not self.is_loaded:
            raise RuntimeError(f"{self.config.model_id} is not loaded: call load() first")


def check_options(
    name: str, given: Mapping[str, Any], allowed: Mapping[str, Any]
) -> dict[str, Any]:
    """Return `allowed` (the defaults) updated by `given`, each converted to its default's type.

    Raises
    ------
    ValueError
        A name is not an option of the tracker, or a value does not convert.
    """
    unknown = sorted(set(given) - set(allowed))
    if unknown:
        known = ", ".join(sorted(allowed)) or "none"
        raise ValueError(f"tracker {name} has no option {unknown[0]!r}: its options are {known}")
    merged = dict(allowed)
    for key, value in given.items():
        default = allowed[key]
        try:
            merged[key] = _convert(value, default)
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(
                f"option {key} of tracker {name} must be of type {type(default).__name__}, got "
                f"{value!r}"
            ) from error
    return merged


def read_snapshot_header(data: bytes) -> dict[str, Any]:
    """Return the header of a session snapshot.

    Raises
    ------
    ValueError
        The bytes are no snapshot of this version.
    """
    try:
        size = int.from_bytes(data[:8], "little")
        header: dict[str, Any] = json.loads(
            json.loads(data[8 : 8 + size])["__metadata__"]["maskmill"]
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError("these bytes are not a session snapshot") from error
    if header.get("version") != SNAPSHOT_VERSION:
        raise ValueError(
            f"the snapshot has version {header.get('version')}, this program reads "
            f"{SNAPSHOT_VERSION}"
        )
    return header


def _as_array(value: Any, dtype: Any) -> NDArray[Any]:
    """Return any array-like, torch tensors on any device included, as a NumPy array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    try:
        return np.asarray(value, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a prompt must be made of numbers, got {value!r}") from error


def _as_int(value: Any, name: str) -> int:
    """Return a whole number of any kind as an int: a NumPy one could not be put in a snapshot."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from error


def _convert(value: Any, default: Any) -> Any:
    if isinstance(default, bool):
        if isinstance(value, str):
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        if isinstance(value, (bool, int)) and value in (0, 1):
            return bool(value)
        raise ValueError
    if isinstance(value, bool) and default is not None:
        raise ValueError
    if default is None or isinstance(value, type(default)):
        return value
    if isinstance(default, int) and isinstance(value, float) and not value.is_integer():
        raise ValueError
    return type(default)(value)
