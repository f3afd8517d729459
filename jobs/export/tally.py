"""What became of an export: counts, and what its user must know about single videos."""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_TOLD = 5
"""Videos told by name for one reason; the others are counted."""


class RefusedVideoError(Exception):
    """A video that the format cannot hold; the message says why and what helps."""


@dataclass(slots=True)
class Tally:
    """Counts of one export.

    Attributes
    ----------
    num_videos, num_frames, num_masks : int
        What the destination holds at the end.
    num_continued : int
        Videos among them that an interrupted export had written.
    num_cut, num_covered : int
        Masks that lost pixels, and those that lost all, to masks in front of them.
    refused : dict of str to str
        Videos that are not in the destination, with the reason; the first ones only.
    num_refused : int
        How many there are.
    renumbered : list of str
        Videos whose object ids are not those of the dataset; the first ones only.
    num_renumbered : int
        How many there are.
    """

    num_videos: int = 0
    num_frames: int = 0
    num_masks: int = 0
    num_continued: int = 0
    num_cut: int = 0
    num_covered: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    num_refused: int = 0
    renumbered: list[str] = field(default_factory=list)
    num_renumbered: int = 0

    @property
    def exit_code(self) -> int:
        """0 when every video is there, 1 when some were refused."""
        return 1 if self.num_refused else 0

    def add(self, num_frames: int, num_masks: int) -> None:
        """Count a video."""
        self.num_videos += 1
        self.num_frames += num_frames
        self.num_masks += num_masks

    def refuse(self, name: str, reason: str) -> None:
        """Count a video that cannot be exported."""
        self.num_refused += 1
        if len(self.refused) < MAX_TOLD:
            self.refused[name] = reason

    def renumber(self, name: str) -> None:
        """Count a video whose objects have other ids."""
        self.num_renumbered += 1
        if len(self.renumbered) < MAX_TOLD:
            self.renumbered.append(name)

    def notes(self) -> list[str]:
        """Return sentences about what the format made necessary."""
        found = []
        if self.num_cut or self.num_covered:
            found.append(
                f"masks may not overlap here: {self.num_cut:,} were cut by masks in front of them, "
                f"and {self.num_covered:,} were covered and are left out"
            )
        if self.num_renumbered:
            more = self.num_renumbered - len(self.renumbered)
            found.append(
                "object ids are too large for the format and are counted from 1 in "
                + ", ".join(self.renumbered)
                + (f" and {more:,} more videos" if more else "")
            )
        return found

    def refusals(self) -> list[str]:
        """Return a sentence for the first videos that were refused, and one for the others."""
        found = [f"{name} is left out: {reason}" for name, reason in self.refused.items()]
        more = self.num_refused - len(self.refused)
        return [*found, f"{more:,} more videos are left out"] if more else found
