"""What is remembered of an object: entries, and the part of them that a frame attends to."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from workers.rle import LazyMask

if TYPE_CHECKING:
    import torch

NUM_SPATIAL = 6
"""Tracked frames whose spatial memory is attended to."""
NUM_POINTERS = 15
"""Tracked frames whose pointer is attended to."""
PROMPT_RANK = 6
"""Index of the temporal code of prompted frames; tracked ones have 0, the newest, to 5."""


@dataclass(slots=True, eq=False)
class Entry:
    """What one frame leaves behind of one object.

    Attributes
    ----------
    step : int
        When it was seen, in steps of the session.
    iou : float
        Predicted IoU of the mask that was taken.
    object_logit : float
        Object score.
    pointer : Tensor of float32, shape (256,)
        Object pointer.
    memory : Tensor of bfloat16, shape (cells, 64), or None
        Spatial memory; None once nothing can attend to it any more.
    motion_iou : float or None
        IoU of the mask with what motion predicted, where that was asked for.
    keys : Tensor, shape (layers, cells, 256), or None
        What `workers.engine.attention.MemoryAttention.keys_of` made of the memory, once it is
        known; no part of a snapshot.
    """

    step: int
    iou: float
    object_logit: float
    pointer: torch.Tensor
    memory: torch.Tensor | None
    motion_iou: float | None = None
    keys: torch.Tensor | None = None

    def without_memory(self) -> Entry:
        """Return the entry of a frame that is too old to be attended to."""
        return Entry(self.step, self.iou, self.object_logit, self.pointer, None, self.motion_iou)

    def to_state(self) -> list[Any]:
        """Return it as a list of plain values and tensors."""
        return [
            self.step, self.iou, self.object_logit, self.pointer, self.memory, self.motion_iou,
        ]  # fmt: skip


@dataclass(slots=True)
class Recall:
    """The memories one track attends to on one frame.

    Attributes
    ----------
    memories : list of (Entry, int)
        Spatial memories and the index of their temporal code.
    pointers : list of (Entry, float)
        Pointers and their temporal distance in steps.
    max_distance : int
        What distances are divided by.
    memory_factors, pointer_factors : list of float or None
        Factor of the keys of each memory and each pointer; None for all ones.
    """

    memories: list[tuple[Entry, int]]
    pointers: list[tuple[Entry, float]]
    max_distance: int
    memory_factors: list[float] | None = None
    pointer_factors: list[float] | None = None

    @property
    def signature(self) -> tuple[int, int]:
        """Recalls of one signature can be computed as one batch."""
        return len(self.memories), len(self.pointers)


@dataclass(slots=True)
class Candidates:
    """The masks the network offers for one object on one frame.

    Attributes
    ----------
    logits : Tensor of float32, shape (M, 4 * side, 4 * side)
        Mask logits, -1024 everywhere where the object is judged absent.
    ious : ndarray of float32, shape (M,)
        Predicted IoUs.
    object_logit : float
        Object score.
    tokens : Tensor of float32, shape (M or 1, 256)
        Output tokens that become pointers.
    pointer_logit : float
        Object score that decides whether the pointer is that of an object.
    scores : Tensor of float32, shape (2,)
        The two scores once more, where the network is.
    boxes : ndarray of float64, shape (M, 4), or None
        Boxes of the masks in the model's picture, see `workers.engine.tracking.mask_boxes`; for
        tracks that need them only.
    """

    logits: torch.Tensor
    ious: NDArray[np.float32]
    object_logit: float
    tokens: torch.Tensor
    pointer_logit: float
    scores: torch.Tensor
    boxes: NDArray[np.float64] | None = None

    @property
    def best(self) -> int:
        """Index of the candidate of the highest predicted IoU; the first of equals."""
        return int(np.argmax(self.ious))

    def token(self, index: int) -> torch.Tensor:
        """Return the token of a candidate; a single-mask decoder has one for all."""
        return self.tokens[index if len(self.tokens) > 1 else 0]


@dataclass(slots=True)
class Sighting:
    """What is known of an object on one frame, as a user sees it.

    Attributes
    ----------
    confidence : float
        Predicted IoU, clipped to 0..1.
    mask : LazyMask or None
        At the size of the frame. None where nothing is to be seen.
    is_hidden : bool
        Whether the object score says that the object is not there. A policy whose own threshold is
        lower may show a mask all the same.
    """

    confidence: float
    mask: LazyMask | None
    is_hidden: bool = False

    def to_state(self) -> list[Any]:
        """Return it as a list of plain values."""
        mask = self.mask
        size_and_counts = None if mask is None else [mask.height, mask.width, mask.counts]
        return [self.confidence, self.is_hidden, size_and_counts]

    @classmethod
    def from_state(cls, state: Sequence[Any]) -> Sighting:
        """Return the sighting that `to_state` was asked of."""
        confidence, is_hidden, size_and_counts = state
        if size_and_counts is None:
            return cls(confidence, None, is_hidden)
        height, width, counts = size_and_counts
        return cls(confidence, LazyMask(height, width, counts=counts), is_hidden)


@dataclass(slots=True)
class Clock:
    """How time is told in a session.

    Attributes
    ----------
    num_frames : int or None
        Length of the video; None for a stream.
    grows : bool
        Distances are measured against the frames seen so far, as the camera predictor does.
    """

    num_frames: int | None = None
    grows: bool = False

    def max_distance(self, step: int) -> int:
        """Return what temporal distances of pointers are divided by on a step."""
        length = step + 1 if self.grows else self.num_frames
        return NUM_POINTERS if length is None else max(1, min(length, NUM_POINTERS + 1) - 1)


@dataclass(slots=True)
class PromptBank:
    """The prompted frames of an object, attended to for ever.

    Attributes
    ----------
    limit : int
        How many of them at most, -1 for all. The older ones are then remembered like tracked
        frames.
    entries : list of Entry
        Oldest first.
    """

    limit: int = -1
    entries: list[Entry] = field(default_factory=list)

    def add(self, entry: Entry) -> None:
        """Remember a prompted frame, and forget what can never be attended to again."""
        self.entries.append(entry)
        old, kept = self.split()
        self.entries = [e for e in old if entry.step - e.step < NUM_POINTERS] + kept

    def split(self) -> tuple[list[Entry], list[Entry]]:
        """Return those beyond the limit, and those within it."""
        cut = 0 if self.limit < 0 else max(0, len(self.entries) - self.limit)
        return self.entries[:cut], self.entries[cut:]


class Recent:
    """A ring of the newest tracked frames: pointers of all, spatial memories of the last six.

    Parameters
    ----------
    size : int
        How many frames it holds.
    """

    def __init__(self, size: int = NUM_POINTERS) -> None:
        self.entries: deque[Entry] = deque(maxlen=size)

    def add(self, entry: Entry) -> None:
        """Remember a frame; the oldest is forgotten when the ring is full."""
        self.entries.append(entry)
        if len(self.entries) > NUM_SPATIAL:
            old = len(self.entries) - NUM_SPATIAL - 1
            self.entries[old] = self.entries[old].without_memory()

    def spatial(self, step: int) -> list[tuple[Entry, int]]:
        """Return the memories of the last six steps, oldest first, ranked by age."""
        ages = [(entry, step - entry.step) for entry in self.entries]
        return [(entry, age - 1) for entry, age in ages if age <= NUM_SPATIAL]

    def pointers(self, step: int, max_distance: int) -> list[tuple[Entry, float]]:
        """Return the pointers of the last steps, newest first, with their age."""
        ages = [(entry, step - entry.step) for entry in reversed(self.entries)]
        return [(entry, float(age)) for entry, age in ages if age <= max_distance]

    def get_state(self) -> list[Any]:
        """Return it as plain values and tensors."""
        return [entry.to_state() for entry in self.entries]

    def set_state(self, state: Sequence[Any]) -> None:
        """Take back what `get_state` returned."""
        self.entries.clear()
        self.entries.extend(Entry(*values) for values in state)
