"""Single frames: a checkpoint without memory segments what is prompted, and tracks nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from workers.engine.bank import Candidates, Entry, Recall, Sighting
from workers.engine.policies.base import Choice, Decided, Track


class FrameTrack(Track):
    """One object that is present where it is prompted, and occluded everywhere else."""

    def keep_prompted(
        self,
        entry: Entry,
        sighting: Sighting,
        offer: Candidates,
        box_xyxy: NDArray[np.float64] | None,
    ) -> Decided:
        """Show the prompted frame and remember nothing."""
        self.latest = sighting
        return [(entry.step, sighting)]

    def recalls(self, step: int) -> list[Recall]:
        """Attend to nothing."""
        return []

    def choose(self, step: int, offers: Sequence[Candidates]) -> list[Choice]:
        """Take nothing."""
        return []

    def keep(self, step: int, entries: Sequence[Entry], sightings: Sequence[Sighting]) -> Decided:
        """Say that nothing is seen."""
        self.latest = Sighting(0.0, None)
        return [(step, self.latest)]
