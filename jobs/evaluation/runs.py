"""A whole run against its ground truth, and two runs against each other.

Videos are measured a few at a time and summed up as they end. What is kept per object is a handful
of numbers, so memory follows the ground truth, not the masks.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from jobs.dataset import Dataset, Video
from jobs.evaluation.davis import Statistics
from jobs.evaluation.pairing import pair_videos
from jobs.evaluation.scoring import Match, ObjectScore, SequenceScore, score_video
from jobs.evaluation.tracking import TrackingCounts
from jobs.ground_truth import GroundTruth, TruthSequence
from jobs.parallel import map_bounded
from workers.errors import ConfigError, InputError
from workers.messages import StoreOptions

MAX_NAMED = 5
"""Sequences that one sentence names."""

Measures = dict[str, float | int | None]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A run against its ground truth.

    Attributes
    ----------
    out, truth : str
        Where both are.
    match : Match
        How objects were paired.
    skip_ends : bool
        Whether J and F leave out the first and the last frame.
    sequences : tuple of SequenceScore
        One per video that was measured.
    faults : tuple of str
        A sentence for what could not be measured.
    notes : tuple of str
        A sentence for what the reader of the numbers should know.
    created_s : float
        Unix time of measuring.
    """

    out: str
    truth: str
    match: Match
    skip_ends: bool
    sequences: tuple[SequenceScore, ...]
    faults: tuple[str, ...]
    notes: tuple[str, ...]
    created_s: float

    @property
    def objects(self) -> list[ObjectScore]:
        """All objects, sequence by sequence."""
        return [score for sequence in self.sequences for score in sequence.objects]

    def overall(self) -> Measures:
        """Return the measures of the run; see `summarise`."""
        return summarise(self.sequences)


@dataclass(frozen=True, slots=True)
class Difference:
    """One object in two runs.

    Attributes
    ----------
    video : str
        Name of its video.
    object_id : int
        Its id in the ground truth.
    score, other_score : float
        J&F, or the AUC of success for boxes, in the run and in the other one.
    """

    video: str
    object_id: int
    score: float
    other_score: float

    @property
    def gain(self) -> float:
        """What the run has more than the other one; negative is a loss."""
        return self.score - self.other_score


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs against one ground truth.

    Attributes
    ----------
    other : Evaluation
        The other run.
    differences : tuple of Difference
        Objects that both runs were measured on, the largest loss first.
    num_alone : int
        Objects that only one of the runs was measured on.
    """

    other: Evaluation
    differences: tuple[Difference, ...]
    num_alone: int

    @property
    def mean_gain(self) -> float:
        """Mean gain over the objects both have; NaN without any."""
        gains = [difference.gain for difference in self.differences]
        return float(np.mean(gains)) if gains else math.nan


def evaluate_run(
    dataset: Dataset,
    truth: GroundTruth,
    *,
    match: Match = Match.ID,
    skip_ends: bool = True,
    wanted: Collection[Video] | None = None,
    num_threads: int = 2,
    corpus_options: StoreOptions | None = None,
    on_sequence: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure a run.

    Parameters
    ----------
    dataset : Dataset
        The run.
    truth : GroundTruth
        What is known about its videos.
    match : Match
        How objects are paired.
    skip_ends : bool
        Leave out the first and the last frame for J and F.
    wanted : collection of Video, optional
        Only these videos.
    num_threads : int
        Videos measured at a time.
    corpus_options : StoreOptions, optional
        How to reach the corpus, whose folders name their frames.
    on_sequence : callable, optional
        Called with the number of sequences that are done, and of all.

    Returns
    -------
    Evaluation
        The measures.

    Raises
    ------
    ConfigError
        Not one video could be measured.
    """
    pairing = pair_videos(dataset, truth.sequences, wanted)
    if not pairing.pairs and not pairing.faults:
        raise ConfigError(_no_common_video(dataset, truth, wanted))

    def measure(pair: tuple[int, TruthSequence]) -> SequenceScore | str:
        video = dataset.video(pair[0])
        try:
            return score_video(
                dataset,
                video,
                truth,
                pair[1],
                match=match,
                skip_ends=skip_ends,
                corpus_options=corpus_options,
            )
        except InputError as error:
            return str(error)

    sequences: list[SequenceScore] = []
    faults = list(pairing.faults)
    for outcome in map_bounded(measure, pairing.pairs, num_threads):
        if isinstance(outcome, str):
            faults.append(outcome)
        else:
            sequences.append(outcome)
        if on_sequence is not None:
            on_sequence(len(sequences) + len(faults), len(pairing.pairs) + len(pairing.faults))
    if not sequences:
        raise ConfigError("\n".join(faults))
    if pairing.missing:
        faults.append(
            f"{_some(pairing.missing)} of the ground truth {truth.uri} has no video in "
            f"{dataset.uri}: not committed, or named otherwise; the scores are of the others"
        )
    return Evaluation(
        dataset.uri,
        truth.uri,
        match,
        skip_ends,
        tuple(sequences),
        tuple(faults),
        tuple(_notes(sequences, pairing.num_unknown, match)),
        time.time(),
    )


def compare(evaluation: Evaluation, other: Evaluation) -> Comparison:
    """Compare two runs object by object.

    Parameters
    ----------
    evaluation, other : Evaluation
        Against one ground truth.

    Returns
    -------
    Comparison
        Objects are the same when their video's name and their id in the ground truth are, and,
        of a video with several time ranges, the range.
    """
    ours, theirs = _main_scores(evaluation), _main_scores(other)
    differences = [Difference(*key[:2], ours[key], theirs[key]) for key in ours if key in theirs]
    differences.sort(key=lambda d: (d.gain, d.video, d.object_id))
    return Comparison(other, tuple(differences), len(ours.keys() ^ theirs.keys()))


def _main_scores(evaluation: Evaluation) -> dict[tuple[str, int, int], float]:
    """Return the main score of every object by name of its video, its id, and the range's key."""
    num_ranges = Counter(sequence.video for sequence in evaluation.sequences)
    return {
        # A key differs between copies of a corpus, so it only tells ranges apart.
        (
            sequence.video,
            score.object_id,
            sequence.video_key * (num_ranges[sequence.video] > 1),
        ): score.main_score
        for sequence in evaluation.sequences
        for score in sequence.objects
    }


def summarise(sequences: Iterable[SequenceScore]) -> Measures:
    """Return the measures of one or more sequences by name.

    Parameters
    ----------
    sequences : iterable of SequenceScore
        What to sum up.

    Returns
    -------
    dict of str to number
        ``num_sequences``, ``num_objects``; ``j_and_f``, ``j_mean``, ``j_recall``, ``j_decay``,
        ``f_mean``, ``f_recall``, ``f_decay``, means in which every object has the same weight;
        ``hota``, ``det_a``, ``ass_a``, ``mota``, ``idf1``, ``num_switches`` over all masks
        together; ``mean_iou``, ``success_auc``, ``precision``, ``precision_auc`` of boxes, means
        over objects. None for what is not known.
    """
    sequences = list(sequences)
    objects = [score for sequence in sequences for score in sequence.objects]
    counts = [s.tracking for s in sequences if s.tracking is not None]
    tracking = sum(counts, TrackingCounts()).scores() if counts else None
    described = [describe_object(score) for score in objects]
    return {
        "num_sequences": len(sequences),
        "num_objects": len(objects),
        **{name: _mean([row[name] for row in described]) for name in OBJECT_MEASURES},
        **{name: _known(getattr(tracking, name, None)) for name in TRACKING_MEASURES},
    }


OBJECT_MEASURES = (
    "j_and_f",
    "j_mean",
    "j_recall",
    "j_decay",
    "f_mean",
    "f_recall",
    "f_decay",
    "mean_iou",
    "success_auc",
    "precision",
    "precision_auc",
)
"""Measures of one object."""
TRACKING_MEASURES = ("hota", "det_a", "ass_a", "mota", "idf1", "num_switches")
"""Measures of all objects of a sequence together."""


def describe_object(score: ObjectScore) -> Measures:
    """Return the measures of one object by name.

    Parameters
    ----------
    score : ObjectScore
        The object.

    Returns
    -------
    dict of str to number
        The `OBJECT_MEASURES`, see `summarise`.
    """

    def part(statistics: Statistics | None, name: str) -> float | None:
        return _known(getattr(statistics, name, None))

    return {
        "j_and_f": _known(score.j_and_f),
        **{f"j_{name}": part(score.region, name) for name in ("mean", "recall", "decay")},
        **{f"f_{name}": part(score.boundary, name) for name in ("mean", "recall", "decay")},
        **{name: _known(getattr(score.boxes, name, None)) for name in OBJECT_MEASURES[7:]},
    }


def _mean(values: Sequence[float | int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _known(value: float | int | None) -> float | int | None:
    """Return a number; None where it is not one, as JSON has no NaN."""
    return None if value is None or math.isnan(value) else value


def _some(names: Sequence[str]) -> str:
    """Return names for a sentence, the first few of many."""
    if len(names) == 1:
        return f"the sequence {names[0]}"
    shown = ", ".join(names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")
    return f"each of {len(names)} sequences ({shown})"


def _no_common_video(dataset: Dataset, truth: GroundTruth, wanted: Collection[Video] | None) -> str:
    """Return the sentence for a ground truth about other videos."""
    names = sorted(truth.sequences)[:MAX_NAMED]
    if wanted is not None:
        asked = ", ".join(video.name for video in wanted)
        return (
            f"the ground truth {truth.uri} knows nothing about {asked}: it has "
            f"{len(truth.sequences)} sequences ({', '.join(names)})"
        )
    some = [batch.to_pylist()[0]["name"] for batch in dataset.batches("videos", columns=("name",))]
    if not some:
        return f"{dataset.uri} has no committed video yet: wait for the first, then type it again"
    return (
        f"no sequence of the ground truth {truth.uri} ({', '.join(names)}) is named like a video "
        f"of {dataset.uri} (for instance {some[0]}): rename its folders to the names of the videos"
    )


def _notes(sequences: Sequence[SequenceScore], num_unknown: int, match: Match) -> list[str]:
    """Return what the reader of the numbers should know."""
    notes = []
    if match is Match.IOU:
        notes.append(
            "objects were paired one to one by overlap over the whole video (--match iou): the "
            "numbers are those of the best naming, not of the ids in the tables"
        )
    if num_unknown:
        notes.append(f"{num_unknown:,} videos of the run are not in the ground truth")
    num_untracked = sum(sequence.num_untracked for sequence in sequences)
    if num_untracked:
        notes.append(
            f"{num_untracked:,} frames of the ground truth were not tracked (stride or time "
            f"range) and do not count"
        )
    nobody = sum(score.found_id is None for s in sequences for score in s.objects)
    if nobody:
        hint = "" if match is Match.IOU else "; where a detector gave the ids, use --match iou"
        notes.append(f"{nobody:,} objects of the ground truth have none in the run{hint}")
    unpaired = sum(sequence.num_unpaired for sequence in sequences)
    if unpaired:
        notes.append(
            f"{unpaired:,} objects of the run stand for none of the ground truth: J and F do not "
            f"count them, HOTA and MOTA do"
        )
    return notes
