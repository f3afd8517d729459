"""Undecided frames: a tree of hypotheses whose trunk is emitted as soon as it is one.

Every live hypothesis is about the newest frame. As long as all of them descend from one hypothesis
about an older frame, nothing that comes later can change that one, so it is final. A frame costs a
fixed amount of work however long the undecided part is: branches that die are cut from their tips,
and the trunk is followed from its root.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterable, Sequence
from typing import IO, Any

from workers.engine.bank import Sighting
from workers.rle import LazyMask

SPILL_BYTES = 64 << 20
"""Size of pending masks above which further ones go to a temporary file."""
_NOBODY = -1
_LENGTH_BITS = 32

Kept = bytes | int
"""Run lengths in a spool: themselves, or their place and length in its file as one number."""


class Spool:
    """Pending masks as COCO run lengths, in memory up to a limit and then in a temporary file.

    Parameters
    ----------
    limit_bytes : int, optional
        The limit, `SPILL_BYTES` when left out.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self._limit = SPILL_BYTES if limit_bytes is None else limit_bytes
        self._file: IO[bytes] | None = None
        self._num_spilled = 0
        self.num_bytes = 0
        """Of the masks in memory."""

    def put(self, counts: bytes) -> Kept:
        """Keep run lengths and return what `get` and `drop` take."""
        if self.num_bytes + len(counts) <= self._limit:
            self.num_bytes += len(counts)
            return counts
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="maskmill-pending-")  # noqa: SIM115
        start = self._file.seek(0, 2)
        self._file.write(counts)
        self._num_spilled += 1
        return start << _LENGTH_BITS | len(counts)

    def get(self, kept: Kept) -> bytes:
        """Return run lengths."""
        if isinstance(kept, bytes):
            return kept
        assert self._file is not None
        self._file.seek(kept >> _LENGTH_BITS)
        return self._file.read(kept & ((1 << _LENGTH_BITS) - 1))

    def close(self) -> None:
        """Forget everything."""
        if self._file is not None:
            self._file.close()
        self._file, self._num_spilled, self.num_bytes = None, 0, 0

    def drop(self, kept: Kept) -> None:
        """Forget run lengths; the file is emptied once nothing in it is wanted."""
        if isinstance(kept, bytes):
            self.num_bytes -= len(kept)
            return
        self._num_spilled -= 1
        if not self._num_spilled:
            assert self._file is not None
            self._file.truncate(0)


class Lineage:
    """The undecided frames of one object.

    Parameters
    ----------
    spool : Spool
        Where masks wait.
    num_slots : int
        Hypotheses about a frame at most.

    Notes
    -----
    Where hypotheses never agree, every frame of a video may wait. So only run lengths are objects:
    a hypothesis is a slot of its frame, and columns hold which slot of the frame before it descends
    from, its confidence, and where its mask is.
    """

    def __init__(self, spool: Spool, num_slots: int) -> None:
        self.spool = spool
        self._num_slots = num_slots
        self._size = (0, 0)  # of every mask
        self._next = 0  # step of the next frame
        self._parents = array("b")
        self._confidences = array("d")
        self._masks: list[Kept | None] = []

    def plant(self, step: int) -> None:
        """Begin: everything up to this frame is decided."""
        self._forget_oldest(self.num_undecided)
        self._next = step + 1

    @property
    def num_undecided(self) -> int:
        """Frames that are not final."""
        return len(self._masks) // self._num_slots

    def grow(self, hypotheses: Sequence[tuple[int, Sighting]]) -> list[tuple[int, Sighting]]:
        """Add a frame.

        Parameters
        ----------
        hypotheses : sequence of (int, Sighting)
            What each slot, from 0 on, descends from, and what it says of this frame. Slots of the
            frame before from which none descends have ended, and with them whatever leads to them
            alone. After a decided frame the slot does not matter.

        Returns
        -------
        list of (int, Sighting)
            Steps and sightings that became final, in order.
        """
        if len(hypotheses) == 1:
            # Final at once: it need not wait, and so it need not be encoded.
            ((slot, sighting),) = hypotheses
            decided = [*self.follow(slot), (self._next, sighting)]
            self._next += 1
            return decided
        self._next += 1
        num_empty = self._num_slots - len(hypotheses)
        self._parents.extend([slot for slot, _ in hypotheses] + [_NOBODY] * num_empty)
        self._confidences.extend([seen.confidence for _, seen in hypotheses] + [0.0] * num_empty)
        for _, seen in hypotheses:
            self._masks.append(None if seen.mask is None else self.spool.put(seen.mask.counts))
            if seen.mask is not None:
                self._size = seen.mask.height, seen.mask.width
        self._masks += [None] * num_empty
        return self._settled()

    def drop(self, slots: Iterable[int]) -> list[tuple[int, Sighting]]:
        """End hypotheses about the newest frame; return what became final."""
        newest = len(self._masks) - self._num_slots
        for slot in set(slots):
            self._cut(newest + slot)
        return self._settled()

    def follow(self, slot: int) -> list[tuple[int, Sighting]]:
        """Decide everything in favour of one hypothesis about the newest frame."""
        path = []
        for start in range(len(self._masks) - self._num_slots, -1, -self._num_slots):
            path.append(start + slot)
            slot = self._parents[start + slot]
        return self._taken_out(path[::-1])

    def branch_of(self, slot: int) -> int:
        """Return the slot of the oldest undecided frame that one of the newest descends from."""
        for start in range(len(self._masks) - self._num_slots, 0, -self._num_slots):
            slot = self._parents[start + slot]
        return slot

    # -- private -----------------------------------------------------------------------------

    def _settled(self) -> list[tuple[int, Sighting]]:
        """Cut what has ended, and take out what is final by now."""
        num_slots = self._num_slots
        for start in range(len(self._masks) - num_slots, 0, -num_slots):
            wanted = set(self._parents[start : start + num_slots])
            before = start - num_slots
            ended = [slot for slot in self._alive(before) if slot not in wanted]
            if not ended:
                break
            for slot in ended:
                self._cut(before + slot)
        path = []
        for start in range(0, len(self._masks), num_slots):
            alive = self._alive(start)
            if len(alive) != 1:
                break
            path.append(start + alive[0])
        return self._taken_out(path)

    def _taken_out(self, path: Sequence[int]) -> list[tuple[int, Sighting]]:
        """Decide the oldest frames in favour of these places, one a frame."""
        oldest = self._next - self.num_undecided
        decided = [(oldest + i, self._sighting(place)) for i, place in enumerate(path)]
        self._forget_oldest(len(path))
        return decided

    def _alive(self, start: int) -> list[int]:
        """Return the slots of a frame that have a hypothesis."""
        parents = self._parents[start : start + self._num_slots]
        return [slot for slot, parent in enumerate(parents) if parent != _NOBODY]

    def _sighting(self, place: int) -> Sighting:
        kept = self._masks[place]
        mask = None if kept is None else LazyMask(*self._size, counts=self.spool.get(kept))
        # SAM2Long shows nothing of a hidden object: where there is a mask, it is not hidden.
        return Sighting(self._confidences[place], mask)

    def _cut(self, place: int) -> None:
        kept = self._masks[place]
        if kept is not None:
            self.spool.drop(kept)
        self._parents[place], self._masks[place] = _NOBODY, None

    def _forget_oldest(self, num_frames: int) -> None:
        end = num_frames * self._num_slots
        for kept in self._masks[:end]:
            if kept is not None:
                self.spool.drop(kept)
        del self._parents[:end], self._confidences[:end], self._masks[:end]

    # -- snapshots ---------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """Return the tree as plain values and bytes."""
        return {
            "size": list(self._size),
            "next": self._next,
            "parents": list(self._parents),
            "confidences": list(self._confidences),
            "masks": [None if kept is None else self.spool.get(kept) for kept in self._masks],
        }

    def set_state(self, state: Any) -> None:
        """Take back what `get_state` returned."""
        self._size = tuple(state["size"])
        self._next = state["next"]
        self._parents = array("b", state["parents"])
        self._confidences = array("d", state["confidences"])
        self._masks = [
            None if counts is None else self.spool.put(counts) for counts in state["masks"]
        ]
