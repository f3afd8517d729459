"""What a tracking policy decides: which mask is taken, what is remembered, when a frame is final.

A `Track` is one object under one policy. The engine asks it what to attend to (`recalls`), shows
it what the network offers (`choose`), and hands it what became of its choices (`keep`).
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.engine.bank import (
    PROMPT_RANK,
    Candidates,
    Clock,
    Entry,
    PromptBank,
    Recall,
    Sighting,
)

Decided = list[tuple[int, Sighting]]
"""Frames that became final: step and sighting, in order."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A candidate a track wants to keep.

    Attributes
    ----------
    recall : int
        Index of the recall that led to it.
    candidate : int
        Its index among that recall's candidates.
    """

    recall: int
    candidate: int


class Track(abc.ABC):
    """One object's memory and choices.

    Parameters
    ----------
    options : Mapping
        Options of the policy.
    clock : Clock
        How time is told in the session.
    """

    min_object_logit: float = 0.0
    """At or below this object score the object is absent: its masks are empty."""
    needs_boxes: bool = False
    """Whether candidates must have their boxes."""

    def __init__(self, options: Mapping[str, Any], clock: Clock) -> None:
        self.options = options
        self.clock = clock
        self.prompts = PromptBank(options.get("max_cond_frames_in_attn", -1))
        self.latest = Sighting(0.0, None)

    @property
    def is_faithful(self) -> bool:
        """Whether the original's faults are reproduced."""
        return bool(self.options.get("compat") == "original")

    # -- prompted frames ---------------------------------------------------------------------

    def choose_prompted(self, offer: Candidates) -> int:
        """Return which candidate of a prompted frame is taken."""
        return offer.best

    def keep_prompted(
        self,
        entry: Entry,
        sighting: Sighting,
        offer: Candidates,
        box_xyxy: NDArray[np.float64] | None,
    ) -> Decided:
        """Remember a prompted frame.

        Parameters
        ----------
        entry : Entry
            What it leaves behind.
        sighting : Sighting
            The object on it.
        offer : Candidates
            What was chosen from.
        box_xyxy : ndarray of float64, shape (4,), or None
            Prompted box in pixels of the model's picture.

        Returns
        -------
        Decided
            Frames that became final.
        """
        self.prompts.add(entry)
        self.latest = sighting
        return [(entry.step, sighting)]

    # -- tracked frames ----------------------------------------------------------------------

    @abc.abstractmethod
    def recalls(self, step: int) -> list[Recall]:
        """Return what is attended to on a frame; more than one where hypotheses differ."""

    def choose(self, step: int, offers: Sequence[Candidates]) -> list[Choice]:
        """Return the candidates to keep, of those that each recall led to."""
        return [Choice(0, offers[0].best)]

    @abc.abstractmethod
    def keep(self, step: int, entries: Sequence[Entry], sightings: Sequence[Sighting]) -> Decided:
        """Remember what became of the choices, in their order; return what became final."""

    def finish(self) -> Decided:
        """Return the frames that were undecided at the end of the video."""
        return []

    # -- shared ------------------------------------------------------------------------------

    def prompt_recall(self, step: int) -> tuple[Recall, list[Entry]]:
        """Return a recall of the prompted frames, and those that count as tracked ones instead.

        Distances in time are those in steps, so a reverse pass is like a forward one.
        """
        demoted, kept = self.prompts.split()
        recall = Recall(
            memories=[(entry, PROMPT_RANK) for entry in kept],
            pointers=[(entry, float(step - entry.step)) for entry in kept],
            max_distance=self.clock.max_distance(step),
        )
        return recall, demoted

    # -- snapshots ---------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """Return the track as plain values and tensors, however nested."""
        return {
            "prompts": [entry.to_state() for entry in self.prompts.entries],
            "latest": self.latest.to_state(),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `get_state` returned."""
        self.prompts.entries = [Entry(*values) for values in state["prompts"]]
        self.latest = Sighting.from_state(state["latest"])
