"""How well objects keep their identity: HOTA, CLEAR MOT and identity measures, for masks.

HOTA is defined by Luiten et al., "HOTA: A Higher Order Metric for Evaluating Multi-Object
Tracking" (IJCV 2021); MOTA by Bernardin and Stiefelhagen, "Evaluating Multiple Object Tracking
Performance: The CLEAR MOT Metrics" (2008); IDF1 by Ristani et al., "Performance Measures and a
Data Set for Multi-Target, Multi-Camera Tracking" (2016). The similarity of two objects on a frame
is the IoU of their masks. Where a paper leaves a choice, it is made as TrackEval makes it; equality
with it is tested. Nothing here knows where masks are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

ALPHAS = np.arange(1, 20) * 0.05
"""Similarities from which HOTA takes a pair for a match; its scores are means over them."""
MATCH_SIMILARITY = 0.5
"""The same for MOTA and IDF1."""

_EPS = float(np.finfo(np.float64).eps)
_STICKY = 1000.0
"""More than any sum of similarities: MOTA prefers the pairs of the frame before to all others."""

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TrackingScores:
    """The measures, each 0..1 but for MOTA.

    Attributes
    ----------
    hota : float
        Geometric mean of detection and association, averaged over `ALPHAS`.
    det_a, ass_a : float
        Detection and association accuracy, averaged over `ALPHAS`.
    mota : float
        One less the share of misses, false masks and identity switches; negative where there are
        more of those than objects.
    idf1 : float
        F-measure of masks with the right identity under the best one-to-one naming.
    num_switches : int
        Identity switches, as MOTA counts them.
    """

    hota: float
    det_a: float
    ass_a: float
    mota: float
    idf1: float
    num_switches: int


@dataclass(frozen=True, slots=True)
class TrackingCounts:
    """What one or more videos add up to; the measures follow from the sums.

    Attributes
    ----------
    num_truths, num_found : int
        Masks of the ground truth, and of the run.
    matches : ndarray of float64, shape (19,)
        True positives at each of `ALPHAS`.
    association : ndarray of float64, shape (19,)
        Sum of the association accuracy over the true positives.
    num_clear_matches, num_switches : int
        True positives and identity switches of CLEAR.
    num_identity_matches : int
        Masks with the right identity.
    """

    num_truths: int = 0
    num_found: int = 0
    matches: FloatArray = field(default_factory=lambda: np.zeros(len(ALPHAS)))
    association: FloatArray = field(default_factory=lambda: np.zeros(len(ALPHAS)))
    num_clear_matches: int = 0
    num_switches: int = 0
    num_identity_matches: int = 0

    def __add__(self, other: TrackingCounts) -> TrackingCounts:
        return TrackingCounts(
            self.num_truths + other.num_truths,
            self.num_found + other.num_found,
            self.matches + other.matches,
            self.association + other.association,
            self.num_clear_matches + other.num_clear_matches,
            self.num_switches + other.num_switches,
            self.num_identity_matches + other.num_identity_matches,
        )

    def scores(self) -> TrackingScores:
        """Return the measures.

        Returns
        -------
        TrackingScores
            All 0 where there is nothing to match; NaN where there is no mask on either side.
        """
        total = self.num_truths + self.num_found
        if not total:
            return TrackingScores(math.nan, math.nan, math.nan, math.nan, math.nan, 0)
        detection = self.matches / np.maximum(total - self.matches, 1)
        association = self.association / np.maximum(self.matches, 1)
        num_false = self.num_found - self.num_clear_matches
        num_right = self.num_clear_matches - num_false - self.num_switches
        return TrackingScores(
            hota=float(np.sqrt(detection * association).mean()),
            det_a=float(detection.mean()),
            ass_a=float(association.mean()),
            mota=num_right / max(self.num_truths, 1),
            idf1=2 * self.num_identity_matches / total,
            num_switches=self.num_switches,
        )


class TrackingTally:
    """Collects the frames of one video."""

    def __init__(self) -> None:
        self._truths: dict[int, int] = {}
        self._found: dict[int, int] = {}
        self._frames: list[tuple[IntArray, IntArray, FloatArray]] = []

    def add(
        self, truth_ids: Sequence[int], found_ids: Sequence[int], similarity: FloatArray
    ) -> None:
        """Take in one frame.

        Parameters
        ----------
        truth_ids : sequence of int
            N objects that are visible in truth.
        found_ids : sequence of int
            M objects of the run with a mask.
        similarity : ndarray of float64, shape (N, M)
            IoU of their masks.
        """
        # Positions instead of ids: they index the matrices below.
        rows = [self._truths.setdefault(object_id, len(self._truths)) for object_id in truth_ids]
        columns = [self._found.setdefault(object_id, len(self._found)) for object_id in found_ids]
        if rows or columns:
            self._frames.append((np.array(rows, int), np.array(columns, int), similarity))

    def counts(self) -> TrackingCounts:
        """Return what the video adds up to."""
        shape = len(self._truths), len(self._found)
        truth_frames = _occurrences([rows for rows, _, _ in self._frames], shape[0])
        found_frames = _occurrences([columns for _, columns, _ in self._frames], shape[1])
        matches, association = self._higher_order(truth_frames, found_frames)
        num_matches, num_switches = self._clear(shape[0])
        return TrackingCounts(
            int(truth_frames.sum()),
            int(found_frames.sum()),
            matches,
            association,
            num_matches,
            num_switches,
            self._num_identity_matches(shape),
        )

    def _higher_order(
        self, truth_frames: IntArray, found_frames: IntArray
    ) -> tuple[FloatArray, FloatArray]:
        """Return true positives, and their summed association accuracy, at each of `ALPHAS`."""
        shape = len(truth_frames), len(found_frames)
        together = truth_frames[:, None] + found_frames[None, :]
        # First how well two identities agree over the whole video, without any matching; each
        # pair of a frame counts by its share of what its row and its column have.
        potential = np.zeros(shape)
        for rows, columns, similarity in self._frames:
            around = similarity.sum(0)[None, :] + similarity.sum(1)[:, None] - similarity
            potential[np.ix_(rows, columns)] += np.divide(
                similarity, around, out=np.zeros_like(similarity), where=around > _EPS
            )
        alignment = potential / np.maximum(together - potential, _EPS)
        # Then one matching per frame, which prefers identities that agree overall.
        matched = [
            (rows[i], columns[j], similarity[i, j])
            for rows, columns, similarity in self._frames
            for i, j in [_assign(alignment[np.ix_(rows, columns)] * similarity)]
        ]
        matches, association = np.zeros(len(ALPHAS)), np.zeros(len(ALPHAS))
        if not matched:
            return matches, association
        truths, found, similar = (np.concatenate(part) for part in zip(*matched, strict=True))
        pairs = truths * shape[1] + found
        for index, alpha in enumerate(ALPHAS):
            counts = np.bincount(pairs[similar >= alpha - _EPS], minlength=shape[0] * shape[1])
            counts = counts.reshape(shape)
            matches[index] = counts.sum()
            association[index] = (counts * (counts / np.maximum(together - counts, 1))).sum()
        return matches, association

    def _clear(self, num_truths: int) -> tuple[int, int]:
        """Return true positives and identity switches of CLEAR MOT."""
        num_matches = num_switches = 0
        # Who was matched last, whenever that was, and who on the frame before; -1 is nobody.
        last = np.full(num_truths, -1)
        before = np.full(num_truths, -1)
        for rows, columns, similarity in self._frames:
            if not len(rows) or not len(columns):
                continue
            allowed = similarity >= MATCH_SIMILARITY - _EPS
            kept = columns[None, :] == before[rows][:, None]
            i, j = _assign(np.where(allowed, similarity + _STICKY * kept, 0.0))
            i, j = i[allowed[i, j]], j[allowed[i, j]]
            truths, found = rows[i], columns[j]
            num_matches += len(truths)
            num_switches += int(((last[truths] >= 0) & (last[truths] != found)).sum())
            last[truths] = found
            before[:] = -1
            before[truths] = found
        return num_matches, num_switches

    def _num_identity_matches(self, shape: tuple[int, int]) -> int:
        """Return the masks with the right identity under the best one-to-one naming.

        The best naming has the fewest misses and false masks together, which is the one with the
        most frames on which named pairs are similar.
        """
        overlapping = np.zeros(shape)
        for rows, columns, similarity in self._frames:
            overlapping[np.ix_(rows, columns)] += similarity >= MATCH_SIMILARITY
        i, j = _assign(overlapping)
        return int(overlapping[i, j].sum())


def _occurrences(positions: Sequence[IntArray], size: int) -> IntArray:
    """Return how often each position occurs."""
    every = np.concatenate([np.zeros(0, int), *positions])
    return np.bincount(every, minlength=size)


def _assign(score: FloatArray) -> tuple[IntArray, IntArray]:
    """Return rows and columns of the one-to-one assignment with the highest total score."""
    if score.shape == (1, 1):
        return np.zeros(1, int), np.zeros(1, int)
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(score, maximize=True)
    return rows, columns
