"""SAMURAI: motion helps to choose the mask, and only good frames are remembered.

Yang et al., "SAMURAI: Adapting Segment Anything Model for Zero-Shot Visual Tracking with
Motion-Aware Memory", 2024. Three faults of the published program are only kept for
``compat="original"``: masks of an absent object are measured, the filter starts on the first
tracked mask instead of the prompt, and the first tracked frame is never remembered for long.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.engine.bank import (
    NUM_SPATIAL,
    PROMPT_RANK,
    Candidates,
    Clock,
    Entry,
    Recall,
    Sighting,
)
from workers.engine.policies.base import Choice, Decided
from workers.engine.policies.motion import BoxMotion, box_iou
from workers.engine.policies.sam2 import Sam2Track

_EMPTY_BOX = np.zeros(4)


class SamuraiTrack(Sam2Track):
    """One object as SAMURAI tracks it.

    Parameters
    ----------
    options : Mapping
        Those of the tracker ``samurai``.
    clock : Clock
        How time is told in the session.
    """

    needs_boxes = True

    def __init__(self, options: Mapping[str, Any], clock: Clock) -> None:
        super().__init__(options, clock)
        self.min_object_logit = options["min_obj_score_logits"]
        self.motion: BoxMotion | None = None
        self.num_stable = 0
        self.motion_iou: float | None = None
        # Whether a frame is worth remembering is known when it is seen, and only the newest six
        # are ever attended to: a ring is all there is to it.
        self.admitted: deque[Entry] = deque(maxlen=NUM_SPATIAL)

    # -- which mask --------------------------------------------------------------------------

    def choose(self, step: int, offers: Sequence[Candidates]) -> list[Choice]:
        """Return the mask that motion and predicted IoU agree on best."""
        return [Choice(0, self._follow(offers[0]))]

    def choose_prompted(self, offer: Candidates) -> int:
        """Return the mask of the highest predicted IoU."""
        if self.is_faithful and len(offer.ious) > 1:
            return self._follow(offer)
        return offer.best

    def _follow(self, offer: Candidates) -> int:
        """Take the filter one frame further and return the index of the mask to take."""
        options, ious, boxes = self.options, offer.ious, offer.boxes
        assert boxes is not None
        taken = offer.best
        self.motion_iou = None
        if self.motion is None or self.num_stable == 0:
            if self._is_measurable(boxes[taken]):
                self.motion = BoxMotion(boxes[taken])
                self.num_stable += 1
            return taken
        self.motion.predict()
        if self.num_stable < options["stable_frames_threshold"]:
            if self._is_measurable(boxes[taken]):
                good = bool(ious[taken] > options["stable_ious_threshold"])
                self._learn(good, boxes[taken])
                self.num_stable += int(good)
            return taken
        overlaps = [self._overlap(box) for box in boxes]
        weight = options["kf_score_weight"]
        taken = int(np.argmax(weight * np.array(overlaps) + (1 - weight) * ious))
        if self._is_measurable(boxes[taken]):
            self._learn(not ious[taken] < options["stable_ious_threshold"], boxes[taken])
            self.motion_iou = overlaps[taken]
        return taken

    def _learn(self, good: bool, box_xyxy: NDArray[np.float64]) -> None:
        """Correct the filter by a good mask; after a bad one it begins anew."""
        assert self.motion is not None
        if good:
            self.motion.update(box_xyxy)
        else:
            self.num_stable = 0

    def _is_measurable(self, box_xyxy: NDArray[np.float64]) -> bool:
        return self.is_faithful or not np.array_equal(box_xyxy, _EMPTY_BOX)

    def _overlap(self, box_xyxy: NDArray[np.float64]) -> float:
        """Return the IoU of the predicted box with a candidate's."""
        assert self.motion is not None
        if np.array_equal(box_xyxy, _EMPTY_BOX):
            return 0.0
        predicted = self.motion.box_xyxy
        if not self.is_faithful and not (predicted[2:] > predicted[:2]).all():
            return 0.0
        return box_iou(predicted, box_xyxy)

    # -- what is remembered ------------------------------------------------------------------

    def recalls(self, step: int) -> list[Recall]:
        """Return the prompted frames, the newest good ones and the last one."""
        (recall,) = super().recalls(step)
        if not self.options["memory_selection"]:
            return [recall]
        chosen = list(self.admitted)
        newest = self.recent.entries[-1] if self.recent.entries else None
        is_last = newest is not None and newest.step == step - 1
        if newest is not None and is_last and (not chosen or chosen[-1].step != newest.step):
            chosen = [*chosen[1 - NUM_SPATIAL :], newest]
        prompted = [pair for pair in recall.memories if pair[1] == PROMPT_RANK]
        ranked = [(entry, len(chosen) - 1 - i) for i, entry in enumerate(chosen)]
        recall.memories = prompted + ranked
        return [recall]

    def keep(self, step: int, entries: Sequence[Entry], sightings: Sequence[Sighting]) -> Decided:
        """Remember the frame, for long if it is a good one."""
        (entry,) = entries
        entry.motion_iou = self.motion_iou
        options = self.options
        is_first = self.is_faithful and step == self.prompts.entries[0].step + 1
        judged = self.motion_iou if options["memory_bank_use_kf_score"] else None
        if (
            not is_first
            and entry.iou > options["memory_bank_iou_threshold"]
            and entry.object_logit > options["memory_bank_obj_score_threshold"]
            and (judged is None or judged > options["memory_bank_kf_score_threshold"])
        ):
            self.admitted.append(entry)
        return super().keep(step, entries, sightings)

    def keep_prompted(
        self,
        entry: Entry,
        sighting: Sighting,
        offer: Candidates,
        box_xyxy: NDArray[np.float64] | None,
    ) -> Decided:
        """Remember a prompted frame; motion starts at what was prompted."""
        if not self.is_faithful:
            assert offer.boxes is not None
            start = offer.boxes[offer.best] if box_xyxy is None else box_xyxy
            if self._is_measurable(start):
                self.motion, self.num_stable = BoxMotion(start), 1
        return super().keep_prompted(entry, sighting, offer, box_xyxy)

    # -- snapshots ---------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """Return the track as plain values and tensors."""
        return super().get_state() | {
            "motion": None if self.motion is None else self.motion.get_state(),
            "num_stable": self.num_stable,
            "admitted": [entry.to_state() for entry in self.admitted],
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `get_state` returned."""
        super().set_state(state)
        self.motion = None if state["motion"] is None else BoxMotion.from_state(state["motion"])
        self.num_stable = state["num_stable"]
        self.admitted.clear()
        self.admitted.extend(Entry(*values) for values in state["admitted"])
