"""SAM2Long: several hypotheses per object, and the one that proves best in the end.

Ding et al., "SAM2Long: Enhancing SAM 2 for Long Video Segmentation with a Training-Free Memory
Tree", 2024. Written from the paper and a description of its behaviour. A pathway is one hypothesis:
what it remembers, its cumulative score, and its place in the tree of undecided frames. What the
published program does wrong is only kept for ``compat="original"``: the pointer of the oldest
remembered frame is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.engine.bank import (
    NUM_POINTERS,
    NUM_SPATIAL,
    Candidates,
    Clock,
    Entry,
    Recall,
    Sighting,
)
from workers.engine.lineage import Lineage, Spool
from workers.engine.policies.base import Choice, Decided, Track

_EPSILON = 1e-5
_PROMPT_SCORE = 10.0


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """What a pathway remembers; pathways that remember the same share it.

    Attributes
    ----------
    admitted : tuple of Entry
        The newest fifteen frames that were worth it, oldest first; the last six with their
        spatial memory.
    newest : Entry or None
        The last frame, worth it or not; None right after a prompt.
    """

    admitted: tuple[Entry, ...]
    newest: Entry | None

    def after(self, entry: Entry, is_good: bool) -> Memory:
        """Return what is remembered after one more frame."""
        if not is_good:
            return Memory(self.admitted, entry)
        older = self.admitted[1 - NUM_POINTERS :]
        cut = max(0, len(older) + 1 - NUM_SPATIAL)
        bare = tuple(e if e.memory is None else e.without_memory() for e in older[:cut])
        return Memory((*bare, *older[cut:], entry), entry)

    def entries(self, step: int) -> list[Entry]:
        """Return the frames to attend to, oldest first; the last frame is always among them."""
        chosen = list(self.admitted)
        newest = self.newest
        if newest is not None and (not chosen or chosen[-1].step != newest.step):
            chosen.append(newest)
        return chosen


@dataclass(frozen=True, slots=True, eq=False)
class Pathway:
    """One hypothesis.

    Attributes
    ----------
    memory : Memory
        What it remembers.
    score : float
        Sum of the logarithms of its predicted IoUs.
    slot : int
        Its place among the hypotheses about the newest frame.
    """

    memory: Memory
    score: float
    slot: int


class Sam2LongTrack(Track):
    """One object as SAM2Long tracks it.

    Parameters
    ----------
    options : Mapping
        Those of the tracker ``sam2long``.
    clock : Clock
        How time is told in the session.
    spool : Spool
        Where the masks of undecided frames wait.
    share : bool
        Run pathways that remember the same once; the results do not depend on it.
    """

    def __init__(
        self, options: Mapping[str, Any], clock: Clock, spool: Spool, *, share: bool = True
    ) -> None:
        super().__init__(options, clock)
        self.lineage = Lineage(spool, options["num_pathway"])
        self.pathways: list[Pathway] = []
        """One per slot, best first; slots may hold the same one."""
        self._share = share
        self._memories: list[Memory] = []
        self._taken: list[tuple[Pathway, int, float, float]] = []
        self._is_first = False

    # -- prompted frames ---------------------------------------------------------------------

    def keep_prompted(
        self,
        entry: Entry,
        sighting: Sighting,
        offer: Candidates,
        box_xyxy: NDArray[np.float64] | None,
    ) -> Decided:
        """Remember a prompted frame; whatever was undecided is decided for the best pathway."""
        decided = self.finish()
        memory, score = Memory((), None), 0.0
        if self.pathways:
            best = self.pathways[0]
            memory, score = Memory(best.memory.admitted, None), best.score
        self._is_first = not self.pathways
        self.lineage.plant(entry.step)
        self.pathways = [Pathway(memory, score, 0)] * self.options["num_pathway"]
        return decided + super().keep_prompted(entry, sighting, offer, box_xyxy)

    # -- tracked frames ----------------------------------------------------------------------

    def recalls(self, step: int) -> list[Recall]:
        """Return what each distinct memory attends to."""
        if self._share:
            self._memories = list({id(p.memory): p.memory for p in self.pathways}.values())
        else:
            self._memories = [p.memory for p in self.pathways]
        return [self._recall(step, memory) for memory in self._memories]

    def _recall(self, step: int, memory: Memory) -> Recall:
        recall, demoted = self.prompt_recall(step)
        num_prompts = len(recall.memories)
        prompt_scores = [_PROMPT_SCORE] * num_prompts
        entries = sorted(demoted + memory.entries(step), key=lambda e: e.step)
        spatial = entries[-NUM_SPATIAL:]
        recall.memories += [(entry, len(spatial) - 1 - i) for i, entry in enumerate(spatial)]
        num_pointers = min(len(entries) - self.is_faithful, recall.max_distance)
        newest_first = entries[::-1][: max(0, num_pointers)]
        # The distance is the rank among the remembered frames, not the time since then.
        recall.pointers += [(entry, float(rank + 1)) for rank, entry in enumerate(newest_first)]
        if len(recall.memories) > 1 and self.options["key_scaling"]:
            recall.memory_factors = self._factors(prompt_scores, spatial)
            recall.pointer_factors = self._factors(prompt_scores, newest_first)
        return recall

    def _factors(self, prompt_scores: list[float], entries: Sequence[Entry]) -> list[float]:
        """Return evenly spaced factors, in the order of the object scores."""
        import torch

        scores = np.array(prompt_scores + [entry.object_logit for entry in entries])
        least, most = self.options["min_key_scale"], self.options["max_key_scale"]
        factors = np.empty(len(scores), np.float32)
        # Of this library, as the original's: NumPy's differ in the last bit.
        factors[np.argsort(scores, kind="stable")] = torch.linspace(least, most, len(scores))
        return [float(factor) for factor in factors]

    def choose(self, step: int, offers: Sequence[Candidates]) -> list[Choice]:
        """Return the branches that live on."""
        if self._share:
            of_memory = {id(memory): i for i, memory in enumerate(self._memories)}
            runs = [of_memory[id(pathway.memory)] for pathway in self.pathways]
        else:
            runs = list(range(len(self.pathways)))
        if self._is_first:
            # The first tracked frame is taken as it comes, and is not counted.
            offer = offers[0]
            taken = [(0, offer.best, self.pathways[0].score)] * self.options["num_pathway"]
        else:
            taken = self._pruned([offers[run] for run in runs])
        self._taken = []
        choices: dict[tuple[int, int], Choice] = {}
        for slot, candidate, score in taken:
            offer = offers[runs[slot]]
            # An absent object has three equal masks, of which one is kept.
            kept = candidate if offer.object_logit > self.min_object_logit else 0
            choices.setdefault((runs[slot], kept), Choice(runs[slot], kept))
            place = list(choices).index((runs[slot], kept))
            iou = float(offer.ious[candidate])
            self._taken.append((self.pathways[slot], place, iou, score))
        return list(choices.values())

    def _pruned(self, offers: Sequence[Candidates]) -> list[tuple[int, int, float]]:
        """Return slot, candidate and score of the branches to keep, best first."""
        num = self.options["num_pathway"]
        branches = []
        for slot, (pathway, offer) in enumerate(zip(self.pathways, offers, strict=True)):
            for candidate, iou in enumerate(offer.ious):
                score = pathway.score + math.log(float(iou) + _EPSILON)
                signed = float(iou) if offer.object_logit > 0 else -float(iou)
                branches.append((slot, candidate, score, round(signed, 2)))
        branches.sort(key=lambda branch: -branch[2])
        certainty = max(abs(offer.object_logit) for offer in offers)
        if certainty > self.options["uncertainty"]:
            kept = branches[:num]
        else:
            # Hypotheses about an uncertain frame should differ.
            first_of: dict[float, tuple[int, int, float, float]] = {}
            for branch in branches:
                first_of.setdefault(branch[3], branch)
            kept = list(first_of.values())[:num]
            for slot in range(len(self.pathways)):
                if len(kept) < num and slot not in {branch[0] for branch in kept}:
                    kept.append(next(b for b in branches if b[0] == slot))
        return [(slot, candidate, score) for slot, candidate, score, _ in kept]

    def keep(self, step: int, entries: Sequence[Entry], sightings: Sequence[Sighting]) -> Decided:
        """Grow the tree by the branches that live on; return what they agree about."""
        grown: dict[tuple[int, int, float], Pathway] = {}
        hypotheses: list[tuple[int, Sighting]] = []
        memories: dict[tuple[int, int, bool], Memory] = {}
        pathways = []
        for parent, place, iou, score in self._taken:
            key = (id(parent), place, iou)
            if key not in grown:
                entry, sighting = entries[place], sightings[place]
                good = iou > self.options["iou_thre"] and entry.object_logit > 0
                memory_key = (id(parent.memory), place, good)
                if memory_key not in memories:
                    memories[memory_key] = parent.memory.after(entry, good)
                confidence = min(1.0, max(0.0, iou))
                grown[key] = Pathway(memories[memory_key], score, len(hypotheses))
                hypotheses.append((parent.slot, replace(sighting, confidence=confidence)))
            pathways.append(grown[key])
        self.pathways = pathways
        self._is_first = False
        best_place, best_iou = self._taken[0][1:3]
        self.latest = replace(sightings[best_place], confidence=min(1.0, max(0.0, best_iou)))
        self._taken = []
        decided = self.lineage.grow(hypotheses)
        limit = self.options["max_lag_frames"]
        if limit and self.lineage.num_undecided > limit:
            decided += self._decide_oldest()
        return decided

    def _decide_oldest(self) -> Decided:
        """Decide the oldest undecided frame for the best pathway; drop those that disagree."""
        branch = self.lineage.branch_of(self.pathways[0].slot)
        agrees = [self.lineage.branch_of(p.slot) == branch for p in self.pathways]
        kept = [p for p, agreed in zip(self.pathways, agrees, strict=True) if agreed]
        dropped = [p.slot for p, agreed in zip(self.pathways, agrees, strict=True) if not agreed]
        self.pathways = kept + [kept[0]] * len(dropped)
        return self.lineage.drop(dropped)

    def finish(self) -> Decided:
        """Decide everything for the best pathway."""
        return self.lineage.follow(self.pathways[0].slot) if self.pathways else []

    # -- snapshots ---------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """Return the track as plain values and tensors."""
        distinct = list({id(p): p for p in self.pathways}.values())
        memories = list({id(p.memory): p.memory for p in distinct}.values())
        entries = list(
            {id(e): e for m in memories for e in (*m.admitted, m.newest) if e is not None}.values()
        )
        place = {id(e): i for i, e in enumerate(entries)}
        where = [id(m) for m in memories]
        return super().get_state() | {
            "entries": [entry.to_state() for entry in entries],
            "memories": [
                [
                    [place[id(e)] for e in m.admitted],
                    None if m.newest is None else place[id(m.newest)],
                ]
                for m in memories
            ],
            "pathways": [[where.index(id(p.memory)), p.score, p.slot] for p in distinct],
            "slots": [[id(p) for p in distinct].index(id(p)) for p in self.pathways],
            "tree": self.lineage.get_state(),
            "is_first": self._is_first,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `get_state` returned."""
        super().set_state(state)
        entries = [Entry(*values) for values in state["entries"]]
        memories = [
            Memory(tuple(entries[i] for i in admitted), None if newest is None else entries[newest])
            for admitted, newest in state["memories"]
        ]
        self.lineage.set_state(state["tree"])
        distinct = [
            Pathway(memories[memory], score, slot) for memory, score, slot in state["pathways"]
        ]
        self.pathways = [distinct[i] for i in state["slots"]]
        self._is_first = state["is_first"]
