"""One video of a run against its ground truth: frames are joined, objects paired and measured.

Both sides are read frame by frame and never held as a whole; what stays is a few numbers per frame
and object. Frames of the ground truth that the run did not track (stride, time range) are left out
and counted; frames that the video does not have mean another video, and are refused.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from jobs.dataset import Dataset, Frame, ObjectMask, Video
from jobs.evaluation.boxes import BoxScores, score_boxes
from jobs.evaluation.davis import (
    Statistics,
    cropped_boundary_accuracy,
    cropped_region_similarity,
    statistics,
)
from jobs.evaluation.tracking import TrackingCounts, TrackingTally
from jobs.ground_truth import BOX_OBJECT_ID, GroundTruth, TruthFrame, TruthSequence
from workers import rle
from workers.decode.frames import order_frames
from workers.errors import InputError, MaskmillError
from workers.masks import CroppedMask, crop_mask, cropped_iou_matrix, match_one_to_one
from workers.messages import StoreOptions
from workers.storage import open_store

EMPTY = CroppedMask((0, 0, 0, 0), np.zeros((0, 0), np.uint8), 0)
"""The mask of an object that is not seen."""
FRAMES_DECODER = "pillow "
"""How the decoder of a folder of frames is called in the table `videos`."""
MIN_FRAMES = 3
"""Frames needed when the first and the last are left out."""

FloatArray = NDArray[np.float64]


class Match(StrEnum):
    """Which object of the run stands for which of the ground truth."""

    ID = "id"
    """The one with the same id."""
    IOU = "iou"
    """One to one, so that the summed overlap over the video is largest."""


@dataclass(frozen=True, slots=True)
class ObjectScore:
    """One object of the ground truth.

    Attributes
    ----------
    video : str
        Name of its video.
    object_id : int
        Its id in the ground truth.
    found_id : int or None
        The object of the run that stands for it; None where there is none.
    num_frames : int
        Frames that count.
    region, boundary : Statistics or None
        J and F; None where only boxes are known.
    boxes : BoxScores or None
        Success and precision; None where masks are known.
    """

    video: str
    object_id: int
    found_id: int | None
    num_frames: int
    region: Statistics | None = None
    boundary: Statistics | None = None
    boxes: BoxScores | None = None

    @property
    def j_and_f(self) -> float:
        """Mean of mean J and mean F; NaN where only boxes are known."""
        if self.region is None or self.boundary is None:
            return math.nan
        return (self.region.mean + self.boundary.mean) / 2

    @property
    def main_score(self) -> float:
        """J&F, or for boxes the AUC of success: what runs are compared by."""
        return self.j_and_f if self.boxes is None else self.boxes.success_auc


@dataclass(frozen=True, slots=True)
class SequenceScore:
    """One video against its ground truth.

    Attributes
    ----------
    video_key : int
        The video.
    video, truth : str
        Its name, and that of the sequence.
    objects : tuple of ObjectScore
        By ascending id.
    num_frames : int
        Frames known on both sides.
    num_untracked : int
        Frames of the ground truth that the run did not track.
    num_unpaired : int
        Objects of the run that stand for none.
    tracking : TrackingCounts or None
        What HOTA, MOTA and IDF1 follow from; None where only boxes are known.
    """

    video_key: int
    video: str
    truth: str
    objects: tuple[ObjectScore, ...]
    num_frames: int
    num_untracked: int
    num_unpaired: int
    tracking: TrackingCounts | None = None


def score_video(
    dataset: Dataset,
    video: Video,
    truth: GroundTruth,
    sequence: TruthSequence,
    *,
    match: Match = Match.ID,
    skip_ends: bool = True,
    corpus_options: StoreOptions | None = None,
) -> SequenceScore:
    """Measure one video.

    Parameters
    ----------
    dataset : Dataset
        The run.
    video : Video
        One of its videos.
    truth : GroundTruth
        What is known.
    sequence : TruthSequence
        What is known about this video.
    match : Match
        How objects are paired.
    skip_ends : bool
        Leave out the first and the last frame for J and F, as DAVIS does. HOTA, MOTA, IDF1 and
        box measures count all frames, as their authors do.
    corpus_options : StoreOptions, optional
        How to reach the video, whose folder names its frames.

    Returns
    -------
    SequenceScore
        The measures.

    Raises
    ------
    InputError
        The ground truth cannot be read or is about another video.
    """
    if sequence.kind.is_boxes:
        return _score_boxes(dataset, video, truth, sequence, match)
    return _MaskScoring(dataset, video, truth, sequence, skip_ends, corpus_options).score(match)


@dataclass(frozen=True, slots=True)
class _MaskScoring:
    """The masks of one video against the pictures or masklets of one sequence."""

    dataset: Dataset
    video: Video
    truth: GroundTruth
    sequence: TruthSequence
    skip_ends: bool
    corpus_options: StoreOptions | None

    def score(self, match: Match) -> SequenceScore:
        """Return the measures."""
        tally, curves = TrackingTally(), _Curves()
        overlaps: dict[tuple[int, int], float] = defaultdict(float)
        truth_ids: set[int] = set()
        found_ids: set[int] = set()
        num_frames = num_untracked = 0
        for known, frame in self._joined():
            if frame is None:
                num_untracked += 1
                continue
            true, found = _visible(known, frame)
            truth_ids |= true.keys()
            found_ids |= found.keys()
            similarity = cropped_iou_matrix(list(true.values()), list(found.values()))
            tally.add(list(true), list(found), similarity)
            if match is Match.ID:
                curves.add(num_frames, true, found, known.size)
            else:
                for row, column in np.argwhere(similarity).tolist():
                    overlaps[list(true)[row], list(found)[column]] += similarity[row, column]
            num_frames += 1
        self._check(num_frames, num_untracked, truth_ids)
        if match is Match.ID:
            pairs = {object_id: object_id for object_id in truth_ids & found_ids}
        else:
            # Who stands for whom is known only now: outlines need a second look.
            pairs = _best_pairs(overlaps)
            curves = self._curves(pairs)
        return SequenceScore(
            self.video.video_key,
            self.video.name,
            self.sequence.name,
            tuple(
                self._object_score(object_id, pairs.get(object_id), curves, num_frames)
                for object_id in sorted(truth_ids)
            ),
            num_frames,
            num_untracked,
            len(found_ids - set(pairs.values())),
            tally.counts(),
        )

    def _curves(self, pairs: Mapping[int, int]) -> _Curves:
        """Return J and F of every frame, once it is known who stands for whom."""
        names = {found_id: truth_id for truth_id, found_id in pairs.items()}
        curves = _Curves()
        both = ((known, frame) for known, frame in self._joined() if frame is not None)
        for position, (known, frame) in enumerate(both):
            true, found = _visible(known, frame)
            renamed = {names[i]: mask for i, mask in found.items() if i in names}
            curves.add(position, true, renamed, known.size)
        return curves

    def _object_score(
        self, object_id: int, found_id: int | None, curves: _Curves, num_frames: int
    ) -> ObjectScore:
        region, boundary = curves.of(object_id, num_frames)
        kept = slice(1, -1) if self.skip_ends else slice(None)
        return ObjectScore(
            self.video.name,
            object_id,
            found_id,
            len(region[kept]),
            statistics(region[kept]),
            statistics(boundary[kept]),
        )

    def _joined(self) -> Iterator[tuple[TruthFrame, Frame | None]]:
        """Yield the known frames with those of the run; None for one that was not tracked."""
        video, name = self.video, self.sequence.name
        num_frames = _num_source_frames(video)
        tracked = self.dataset.frames(video)
        frame = next(tracked, None)
        for known in self.truth.frames(self.sequence, self._frame_stems()):
            if known.frame_idx >= num_frames:
                raise InputError(
                    f"the ground truth {name} knows frame {known.frame_idx}, but {video.name} has "
                    f"frames 0 to {num_frames - 1}: give the ground truth of this video, its "
                    f"frames counted from 0"
                )
            if known.size != (video.height, video.width):
                raise InputError(
                    f"the ground truth {name} is for pictures of {known.size[1]}x{known.size[0]} "
                    f"pixels, but {video.name} has {video.width}x{video.height}: give the ground "
                    f"truth in the size of the video, upright"
                )
            while frame is not None and frame.frame_idx < known.frame_idx:
                frame = next(tracked, None)
            is_tracked = frame is not None and frame.frame_idx == known.frame_idx
            yield known, frame if is_tracked else None

    def _frame_stems(self) -> list[str] | None:
        """Return the names of the video's frames without ending, if it is a folder in reach."""
        if not self.video.row["decoder"].startswith(FRAMES_DECODER):
            return None
        try:
            folder = open_store(self.video.uri, self.corpus_options)
            keys = [stat.key for stat in folder.list() if "/" not in stat.key]
            names = order_frames(keys, folder.uri)
        except (MaskmillError, OSError):
            # Then names can only be frame indices.
            return None
        return [name.rpartition(".")[0] for name in names] or None

    def _check(self, num_frames: int, num_untracked: int, truth_ids: Collection[int]) -> None:
        """Refuse what cannot be measured."""
        name = self.sequence.name
        if not num_frames:
            what = (
                f"{num_untracked} known frames, none of which the run tracked"
                if num_untracked
                else "no frame"
            )
            raise InputError(f"the ground truth {name} has {what}: there is nothing to measure")
        if not truth_ids:
            raise InputError(
                f"the ground truth {name} shows no object on the {num_frames} frames that were "
                f"tracked: there is nothing to measure"
            )
        if self.skip_ends and num_frames < MIN_FRAMES:
            raise InputError(
                f"the ground truth {name} knows {num_frames} of the tracked frames, and J and F "
                f"leave out the first and the last: add frames, or count them with --all-frames"
            )


class _Curves:
    """J and F of the objects of one video, frame by frame.

    Kept are the frames on which an object is seen on either side; on all others both masks are
    empty, which counts as 1.
    """

    def __init__(self) -> None:
        self._values: dict[int, list[tuple[int, float, float]]] = defaultdict(list)

    def add(
        self,
        position: int,
        true: Mapping[int, CroppedMask],
        found: Mapping[int, CroppedMask],
        size: tuple[int, int],
    ) -> None:
        """Take in frame number `position`; masks of one object have one id on both sides."""
        for object_id in true.keys() | found.keys():
            pair = found.get(object_id, EMPTY), true.get(object_id, EMPTY)
            values = cropped_region_similarity(*pair), cropped_boundary_accuracy(*pair, size)
            self._values[object_id].append((position, *values))

    def of(self, object_id: int, num_frames: int) -> tuple[FloatArray, FloatArray]:
        """Return J and F of one object on every frame, each of shape (T,)."""
        region, boundary = np.ones(num_frames), np.ones(num_frames)
        for position, j, f in self._values.get(object_id, ()):
            region[position], boundary[position] = j, f
        return region, boundary


def _score_boxes(
    dataset: Dataset, video: Video, truth: GroundTruth, sequence: TruthSequence, match: Match
) -> SequenceScore:
    """Measure one video of which boxes are known."""
    known = truth.boxes(sequence)
    num_frames = _num_source_frames(video)
    if len(known) > num_frames:
        raise InputError(
            f"the ground truth {sequence.name} has boxes for {len(known)} frames, but {video.name} "
            f"has {num_frames}: give the ground truth of this video"
        )
    tracked = np.zeros(len(known), bool)
    tracks: dict[int, FloatArray] = {}
    for frame in dataset.frames(video):
        if frame.frame_idx >= len(known):
            break
        tracked[frame.frame_idx] = True
        for mask in frame.masks:
            x, y, width, height = mask.bbox_xywh
            track = tracks.setdefault(mask.object_id, np.full(known.shape, np.nan))
            track[frame.frame_idx] = (x, y, x + width, y + height)
    is_known = ~np.isnan(known).any(1)
    if not (is_known & tracked).any():
        raise InputError(
            f"the ground truth {sequence.name} knows no box on a frame that was tracked: there is "
            f"nothing to measure"
        )
    truths = known[tracked]
    scores = {i: score_boxes(track[tracked], truths) for i, track in tracks.items()}
    found_id: int | None = BOX_OBJECT_ID if BOX_OBJECT_ID in scores else None
    if match is Match.IOU and scores:
        found_id = max(scores, key=lambda i: (scores[i].mean_iou, -i))
    nothing = np.full(truths.shape, np.nan)
    measured = score_boxes(nothing, truths) if found_id is None else scores[found_id]
    return SequenceScore(
        video.video_key,
        video.name,
        sequence.name,
        (ObjectScore(video.name, BOX_OBJECT_ID, found_id, measured.num_frames, boxes=measured),),
        measured.num_frames,
        int((is_known & ~tracked).sum()),
        len(scores) - (found_id is not None),
    )


def _visible(
    known: TruthFrame, frame: Frame
) -> tuple[dict[int, CroppedMask], dict[int, CroppedMask]]:
    """Return the masks of one frame on both sides, by id, without what nobody knows."""
    found = {mask.object_id: _crop(mask) for mask in frame.masks if mask.area}
    return _outside(known.masks, known.void), _outside(found, known.void)


def _outside(
    masks: Mapping[int, CroppedMask], void: NDArray[np.bool_] | None
) -> dict[int, CroppedMask]:
    """Return what is left of masks outside of `void`; those with nothing left are gone."""
    if void is None:
        return dict(masks)
    rest = {object_id: _without(mask, void) for object_id, mask in masks.items()}
    return {object_id: mask for object_id, mask in rest.items() if mask.area}


def _crop(mask: ObjectMask) -> CroppedMask:
    """Return a stored mask cut to its box, decoding only the columns of the box."""
    height, width = mask.size
    x0, y0, box_width, box_height = map(int, mask.bbox_xywh)
    # Runs go down the columns, so those of the box are one stretch of pixels.
    first, last = x0 * height, (x0 + box_width) * height
    ends = np.clip(np.cumsum(rle.run_lengths(mask.counts, height, width)), first, last)
    values = (np.arange(len(ends)) & 1).astype(np.uint8)
    columns = np.repeat(values, np.diff(ends, prepend=first)).reshape(box_width, height)
    crop = np.ascontiguousarray(columns[:, y0 : y0 + box_height].T)
    return CroppedMask((x0, y0, x0 + box_width, y0 + box_height), crop, mask.area)


def _without(mask: CroppedMask, void: NDArray[np.bool_]) -> CroppedMask:
    x0, y0, x1, y1 = mask.box_xyxy
    hidden = void[y0:y1, x0:x1]
    if not (mask.crop & hidden).any():
        return mask
    rest = crop_mask(mask.crop & ~hidden)
    left, top, right, bottom = rest.box_xyxy
    return CroppedMask((left + x0, top + y0, right + x0, bottom + y0), rest.crop, rest.area)


def _best_pairs(overlaps: Mapping[tuple[int, int], float]) -> dict[int, int]:
    """Return for each object of the truth the one of the run that stands for it."""
    truth_ids = sorted({truth_id for truth_id, _ in overlaps})
    found_ids = sorted({found_id for _, found_id in overlaps})
    total = np.zeros((len(truth_ids), len(found_ids)))
    for (truth_id, found_id), overlap in overlaps.items():
        total[bisect_left(truth_ids, truth_id), bisect_left(found_ids, found_id)] = overlap
    return {truth_ids[i]: found_ids[j] for i, j in match_one_to_one(total, 0.0)}


def _num_source_frames(video: Video) -> int:
    """Return how many frames the source has; a time range decodes fewer."""
    fps, duration_us = video.row["fps"], video.row["duration_us"]
    estimated = round(duration_us * fps / 1e6) if fps and duration_us else 0
    return max(int(video.row["frames_decoded"]), estimated)
