"""SAM 2: the mask of the highest predicted IoU, the memories of the last six frames.

Ravi et al., "SAM 2: Segment Anything in Images and Videos", 2024. The real-time fork
(Gy920/segment-anything-2-real-time) is the same with a shorter memory of pointers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from workers.engine.bank import NUM_POINTERS, Clock, Entry, Recall, Recent, Sighting
from workers.engine.policies.base import Decided, Track


class Sam2Track(Track):
    """One object as SAM 2 tracks it.

    Parameters
    ----------
    options : Mapping
        ``max_cond_frames_in_attn``: prompted frames that are attended to, -1 for all.
    clock : Clock
        How time is told in the session.
    num_recent : int
        Tracked frames that are remembered; with fewer than 15 some pointers are missing.
    """

    def __init__(
        self, options: Mapping[str, Any], clock: Clock, num_recent: int = NUM_POINTERS
    ) -> None:
        super().__init__(options, clock)
        self.recent = Recent(num_recent)

    def recalls(self, step: int) -> list[Recall]:
        """Return the prompted frames and the last ones."""
        recall, demoted = self.prompt_recall(step)
        past = self.recent.spatial(step)
        pointers = self.recent.pointers(step, recall.max_distance)
        if demoted:
            older = Recent(len(demoted))
            older.entries.extend(demoted)
            past = sorted(past + older.spatial(step), key=lambda pair: pair[0].step)
            pointers += older.pointers(step, recall.max_distance)
        recall.memories += past
        recall.pointers += pointers
        return [recall]

    def keep(self, step: int, entries: Sequence[Entry], sightings: Sequence[Sighting]) -> Decided:
        """Remember the frame; it is final at once."""
        self.recent.add(entries[0])
        self.latest = sightings[0]
        return [(step, sightings[0])]

    def get_state(self) -> dict[str, Any]:
        """Return the track as plain values and tensors."""
        return super().get_state() | {"recent": self.recent.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `get_state` returned."""
        super().set_state(state)
        self.recent.set_state(state["recent"])
