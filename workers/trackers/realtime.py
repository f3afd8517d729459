"""Tracking for people who feed frames themselves: a camera loop, a notebook, a service.

One `RealtimeTracker` holds a loaded model; each stream's state is a `RealtimeState`, which wraps
a session and is handed back with every result. Unlike predictors whose "state" is the weights,
or a live object that cannot leave its process, this one can be pickled: it travels as the
session's snapshot and continues with identical results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from workers.trackers.base import (
    TrackingConfig,
    TrackingFrame,
    TrackingModelLoader,
    TrackingSession,
    UInt8Array,
)
from workers.trackers.registry import create_tracking_loader

PromptUse = Literal["reset", "add"]


class RealtimeState:
    """The state of one stream: a session, and what is needed to open it elsewhere.

    Attributes
    ----------
    config : TrackingConfig
        Of the tracker the session belongs to.
    session : TrackingSession
        The live session.
    last_object_id : int
        Largest id ever given in this stream; ids are never given twice. -1 before the first.
    """

    def __init__(self, config: TrackingConfig, session: TrackingSession) -> None:
        self.config = config
        self._session: TrackingSession | None = session
        self._snapshot: bytes | None = None
        self.last_object_id = -1

    @property
    def session(self) -> TrackingSession:
        """The live session; a state out of a pickle gets one from the tracker it is given to."""
        if self._session is None:
            raise RuntimeError(
                "this state came out of a pickle: hand it to prompt() or track() of a tracker "
                "with the same weights and settings"
            )
        return self._session

    def attach(self, loader: TrackingModelLoader) -> TrackingSession:
        """Return the session, opened on `loader` when the state came out of a pickle.

        Raises
        ------
        ValueError
            The state belongs to other weights or settings.
        """
        if self._session is None:
            assert self._snapshot is not None
            self._session = loader.restore(self._snapshot)
            self._snapshot = None
        return self._session

    def close(self) -> None:
        """Free the session's memory."""
        if self._session is not None:
            self._session.close()

    def __getstate__(self) -> dict[str, Any]:
        snapshot = self._session.snapshot() if self._session is not None else self._snapshot
        return {
            "config": self.config,
            "snapshot": snapshot,
            "last_object_id": self.last_object_id,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.config = state["config"]
        self._session = None
        self._snapshot = state["snapshot"]
        self.last_object_id = state["last_object_id"]


Result = tuple[NDArray[np.bool_], NDArray[np.int64], RealtimeState]


class RealtimeTracker:
    """A loaded tracker for frames that arrive one by one. Use it as a context manager, or close it.

    Any number of streams may share one tracker: each has its own state. Without a state the
    tracker goes on with the stream of its last call, which is what a single camera wants.

    Parameters
    ----------
    config : TrackingConfig
        ``model_id`` is the tracker's name.

    Raises
    ------
    ValueError
        There is no such tracker, or an option is wrong.
    RuntimeError
        The weights or the device are not there.
    """

    def __init__(self, config: TrackingConfig) -> None:
        self._loader = create_tracking_loader(config.model_id, config)
        self._loader.load()
        self.config = self._loader.config
        self._current: RealtimeState | None = None

    def prompt(
        self,
        image: UInt8Array,
        bboxes: ArrayLike | Sequence[ArrayLike],
        *,
        state: RealtimeState | None = None,
        object_ids: Sequence[int] | None = None,
        mode: PromptUse = "reset",
    ) -> Result:
        """Name objects by boxes on a frame, and track that frame at once.

        Parameters
        ----------
        image : ndarray of uint8, shape (H, W, 3)
            RGB, 0-255.
        bboxes : array-like, shape (K, 4)
            Corners ``x0, y0, x1, y1`` in pixels of the image, one row per object; lists, arrays
            and tensors alike. One box alone may have shape (4,).
        state : RealtimeState, optional
            The stream the frame belongs to; None is the stream of the last call, a new one at
            first.
        object_ids : sequence of int, optional
            One per box. A known id prompts that object again; by default each box is a new object
            with the next free id, from 0 on.
        mode : str
            ``reset`` forgets the stream's objects first; ``add`` keeps tracking them beside the
            new ones. Ids are never given twice in either.

        Returns
        -------
        masks : ndarray of bool, shape (N, H, W)
            One per present object, ordered by id.
        object_ids : ndarray of int64, shape (N,)
            Their ids.
        state : RealtimeState
            To hand to the next call.

        Raises
        ------
        ValueError
            No box, a malformed one, or one outside the picture, ids that do not match the boxes,
            or a frame of another size or type. The stream is as it was.
        """
        if mode not in ("reset", "add"):
            raise ValueError(f"mode must be 'reset' or 'add', got {mode!r}")
        boxes = _as_boxes(bboxes)
        given = state if state is not None else self._current
        previous = given.attach(self._loader) if given is not None else None
        if mode == "add" and previous is None:
            raise RuntimeError("there is no stream to add to: call prompt() with mode='reset'")
        last_id = given.last_object_id if given is not None else -1
        ids = (
            list(range(last_id + 1, last_id + 1 + len(boxes)))
            if object_ids is None
            else [int(i) for i in object_ids]
        )
        if len(ids) != len(boxes) or len(set(ids)) != len(ids):
            raise ValueError(f"{len(boxes)} boxes need as many different object ids, got {ids}")
        if previous is None or mode == "reset":
            shape = np.shape(image)
            if len(shape) != 3:
                raise ValueError(f"a frame must be RGB of shape (H, W, 3), got {shape}")
            session = self._loader.open_session(shape[0], shape[1])
            kept = RealtimeState(self.config, session)
        else:
            assert given is not None
            session, kept = previous, given
        # Nothing may be left behind by a prompt that is refused, so all are checked on a session
        # of their own before the first is registered.
        with self._loader.open_session(session.height, session.width) as trial:
            for object_id, box in zip(ids, boxes, strict=True):
                trial.prompt(0, object_id, box_xyxy=box)
            trial.begin_step(image, 0)
        frame_idx = session.num_steps
        for object_id, box in zip(ids, boxes, strict=True):
            session.prompt(frame_idx, object_id, box_xyxy=box)
        kept.last_object_id = max([last_id, *ids])
        if previous is not None and previous is not session:
            previous.close()
        return self._step(kept, session, image)

    def track(self, image: UInt8Array, *, state: RealtimeState | None = None) -> Result:
        """Track the next frame of a stream.

        Parameters
        ----------
        image : ndarray of uint8, shape (H, W, 3)
            RGB, 0-255, of the size of the prompted frame.
        state : RealtimeState, optional
            The stream it belongs to; None is the stream of the last call.

        Returns
        -------
        masks : ndarray of bool, shape (N, H, W)
            One per present object, ordered by id.
        object_ids : ndarray of int64, shape (N,)
            Their ids.
        state : RealtimeState
            To hand to the next call.

        Raises
        ------
        RuntimeError
            Nothing was prompted yet.
        ValueError
            The frame has another size or type. The stream is as it was.
        """
        given = state if state is not None else self._current
        if given is None:
            raise RuntimeError("track before prompt: call prompt() with boxes first")
        return self._step(given, given.attach(self._loader), image)

    def remove(self, object_id: int, *, state: RealtimeState | None = None) -> None:
        """Forget one object of a stream.

        Raises
        ------
        RuntimeError
            Nothing was prompted yet.
        ValueError
            The stream has no such object.
        """
        given = state if state is not None else self._current
        if given is None:
            raise RuntimeError("remove before prompt: there is no object yet")
        given.attach(self._loader).remove(object_id)

    def close(self) -> None:
        """Free the current stream and the weights."""
        if self._current is not None:
            self._current.close()
            self._current = None
        self._loader.unload()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _step(self, state: RealtimeState, session: TrackingSession, image: UInt8Array) -> Result:
        session.step(image)
        latest = session.latest()
        assert latest is not None
        self._current = state
        masks, object_ids = _as_arrays(latest, session.height, session.width)
        return masks, object_ids, state


def _as_boxes(bboxes: ArrayLike | Sequence[ArrayLike]) -> NDArray[np.float64]:
    """Return boxes, tensors on any device included, as an array of shape (K, 4)."""
    given: Any = bboxes
    if hasattr(given, "detach"):
        given = given.detach().cpu().numpy()
    elif isinstance(given, (list, tuple)):
        given = [b.detach().cpu().numpy() if hasattr(b, "detach") else b for b in given]
    try:
        boxes = np.asarray(given, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"boxes must be rows of 4 numbers, got {bboxes!r}") from error
    if boxes.ndim == 1 and boxes.size == 4:
        boxes = boxes.reshape(1, 4)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not len(boxes):
        raise ValueError(f"boxes must have shape (K, 4) with at least one row, got {boxes.shape}")
    return boxes


def _as_arrays(
    frame: TrackingFrame, height: int, width: int
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    masks = np.zeros((len(frame.masks), height, width), bool)
    for i, mask in enumerate(frame.masks):
        masks[i] = mask.mask > 0
    return masks, np.array([m.object_id for m in frame.masks], np.int64)
