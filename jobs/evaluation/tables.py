"""An evaluation as people and programs read it: text, JSON, CSV.

The JSON is also what an output keeps of its last evaluation, below `jobs.quality.FOLDER`, for
`maskmill report`. Its form: ``format`` (1), ``out``, ``truth``, ``match``, ``skip_ends``,
``created_s``; ``overall``, the measures of `jobs.evaluation.runs.summarise`; ``sequences``, each
with ``video``, ``truth``, ``num_frames``, ``num_untracked``, ``num_unpaired``, the same measures,
and ``objects``, each with ``object_id``, ``found_id``, ``num_frames`` and its measures; ``faults``
and ``notes``, sentences; ``comparison`` (null without ``--against``) with ``other``,
``other_overall``, ``mean_gain``, ``num_alone`` and ``differences``, the largest loss first.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jobs.evaluation.runs import (
    OBJECT_MEASURES,
    TRACKING_MEASURES,
    Comparison,
    Evaluation,
    Measures,
    describe_object,
    summarise,
)
from jobs.evaluation.scoring import Match, ObjectScore, SequenceScore
from jobs.quality import FOLDER, ReviewItem, RunQuality

if TYPE_CHECKING:
    from workers.storage import Store

SCORES_KEY = f"{FOLDER}/scores.json"
"""The last evaluation of an output."""
FORMAT = 1
"""Version of the JSON."""
MAX_ROWS = 30
"""Rows of a table in the terminal."""

_MASK_COLUMNS = OBJECT_MEASURES[:7]
_BOX_COLUMNS = OBJECT_MEASURES[7:]
_TITLES = {
    "j_and_f": "J&F",
    "j_mean": "J",
    "j_recall": "J rec",
    "j_decay": "J dec",
    "f_mean": "F",
    "f_recall": "F rec",
    "f_decay": "F dec",
    "mean_iou": "IoU",
    "success_auc": "success",
    "precision": "prec@20",
    "precision_auc": "prec",
    "hota": "HOTA",
    "det_a": "DetA",
    "ass_a": "AssA",
    "mota": "MOTA",
    "idf1": "IDF1",
    "num_switches": "switches",
}


def to_document(evaluation: Evaluation, comparison: Comparison | None = None) -> dict[str, Any]:
    """Return an evaluation as plain values, in the form that the head of this file says.

    Parameters
    ----------
    evaluation : Evaluation
        The run.
    comparison : Comparison, optional
        Against another one.

    Returns
    -------
    dict
        Ready for JSON.
    """
    return {
        "format": FORMAT,
        "out": evaluation.out,
        "truth": evaluation.truth,
        "match": evaluation.match.value,
        "skip_ends": evaluation.skip_ends,
        "created_s": evaluation.created_s,
        "overall": evaluation.overall(),
        "sequences": [_sequence_document(sequence) for sequence in evaluation.sequences],
        "faults": list(evaluation.faults),
        "notes": list(evaluation.notes),
        "comparison": None if comparison is None else _comparison_document(comparison),
    }


def to_json(evaluation: Evaluation, comparison: Comparison | None = None) -> bytes:
    """Return `to_document` as bytes."""
    return json.dumps(to_document(evaluation, comparison), indent=1, allow_nan=False).encode()


def to_csv(evaluation: Evaluation) -> bytes:
    """Return an evaluation as CSV.

    Parameters
    ----------
    evaluation : Evaluation
        The run.

    Returns
    -------
    bytes
        A row per object, per sequence and for the run; the column `level` says which. Empty where
        a measure is not known.
    """
    text = io.StringIO()
    head = ["level", "video", "object_id", "found_id", "num_frames"]
    writer = csv.DictWriter(text, [*head, *OBJECT_MEASURES, *TRACKING_MEASURES], restval="")
    writer.writeheader()
    for sequence in evaluation.sequences:
        for score in sequence.objects:
            writer.writerow({"level": "object", "video": score.video} | _object_document(score))
        row = {"level": "sequence", "video": sequence.video, "num_frames": sequence.num_frames}
        writer.writerow(row | _measures([sequence]))
    writer.writerow({"level": "overall"} | _measures(evaluation.sequences))
    return text.getvalue().encode()


def read_scores(store: Store) -> dict[str, Any] | None:
    """Return the last evaluation that an output keeps.

    Parameters
    ----------
    store : Store
        The output.

    Returns
    -------
    dict or None
        In the form that the head of this file says; None where nobody has evaluated, or another
        version of maskmill did.
    """
    try:
        document: dict[str, Any] = json.loads(store.read_bytes(SCORES_KEY))
    except (FileNotFoundError, ValueError):
        return None
    return document if document.get("format") == FORMAT else None


def save_scores(store: Store, evaluation: Evaluation, comparison: Comparison | None = None) -> None:
    """Keep an evaluation in its output, replacing the last one.

    Parameters
    ----------
    store : Store
        The output.
    evaluation : Evaluation
        The run.
    comparison : Comparison, optional
        Against another one.
    """
    store.write_bytes(SCORES_KEY, to_json(evaluation, comparison))


def evaluation_lines(evaluation: Evaluation) -> Iterator[str]:
    """Yield an evaluation as text for a terminal.

    Parameters
    ----------
    evaluation : Evaluation
        The run.

    Yields
    ------
    str
        Lines: J and F per object, identities per sequence, boxes per object, each only where
        there is something; of long tables the worst rows.
    """
    overall = evaluation.overall()
    by_masks = [score for score in evaluation.objects if score.region is not None]
    by_boxes = [score for score in evaluation.objects if score.boxes is not None]
    if by_masks:
        ends = "first and last frame left out" if evaluation.skip_ends else "all frames"
        yield f"Masks, J and F as DAVIS 2017 defines them ({ends})"
        yield from _object_table(by_masks, _MASK_COLUMNS, overall, evaluation.match)
        yield ""
        yield "Identities, masks of all frames"
        tracked = [s for s in evaluation.sequences if s.tracking is not None]
        rows = [((s.video, ""), summarise([s])) for s in tracked]
        rows.sort(key=lambda row: (row[1]["hota"] or 0.0, row[0]))
        yield from _table(("video", ""), rows, TRACKING_MEASURES, overall, len(rows))
    if by_boxes:
        if by_masks:
            yield ""
        yield "Boxes, success and precision as OTB defines them (all frames)"
        yield from _object_table(by_boxes, _BOX_COLUMNS, overall, evaluation.match)


def comparison_lines(evaluation: Evaluation, comparison: Comparison) -> Iterator[str]:
    """Yield a comparison as text for a terminal.

    Parameters
    ----------
    evaluation : Evaluation
        The run.
    comparison : Comparison
        Against another one.

    Yields
    ------
    str
        Lines: the measures of both, then the largest losses.
    """
    yield f"Against {comparison.other.out}"
    ours, theirs = evaluation.overall(), comparison.other.overall()
    for name in (*OBJECT_MEASURES, *TRACKING_MEASURES):
        mine, other = ours[name], theirs[name]
        if mine is not None and other is not None:
            yield f"  {_TITLES[name]:<9}{_number(mine)}  was {_number(other)}  {mine - other:+8.3f}"
    losses = [difference for difference in comparison.differences if difference.gain < 0]
    count = len(comparison.differences)
    yield (
        f"  {len(losses):,} of {count:,} objects have lost, mean gain {comparison.mean_gain:+.3f}"
        + (
            f"; {comparison.num_alone:,} are in one of the runs only"
            if comparison.num_alone
            else ""
        )
    )
    if losses:
        width = max(len(loss.video) for loss in losses[:MAX_ROWS])
        yield f"  largest losses{'':<{max(width - 14, 0)}}  object     now     was"
    for loss in losses[:MAX_ROWS]:
        yield (
            f"  {loss.video:<{max(width, 14)}}  {loss.object_id:>6}  {loss.score:.3f}   "
            f"{loss.other_score:.3f}  {loss.gain:+.3f}"
        )


def quality_lines(summary: RunQuality, review: Sequence[ReviewItem], limit: int) -> Iterator[str]:
    """Yield what was measured without ground truth as text for a terminal.

    Parameters
    ----------
    summary : RunQuality
        The run.
    review : sequence of ReviewItem
        The ranked list.
    limit : int
        Rows of it to show.

    Yields
    ------
    str
        Lines.
    """
    yield "Quality without ground truth"
    yield (
        f"  {summary.num_objects:,} objects with {summary.num_masks:,} masks in "
        f"{summary.num_videos:,} videos"
    )
    if summary.mean_flicker is not None:
        yield f"  flicker {summary.mean_flicker:.3f} (one less the overlap from frame to frame)"
    yield (
        f"  {summary.num_area_jumps:,} area jumps, {summary.num_fragmented:,} objects interrupted, "
        f"{summary.num_switches:,} suspected identity switches"
    )
    yield (
        f"  hidden on {summary.mean_share_occluded:.1%} of the frames, at the border on "
        f"{summary.mean_share_border:.1%} of the masks"
    )
    if not review:
        return
    yield ""
    yield "Look at these first"
    shown = review[:limit]
    width = max(len(item.video) for item in shown)
    yield f"  {'video':<{width}}  object  frame  concern  why"
    for item in shown:
        yield (
            f"  {item.video:<{width}}  {item.object_id:>6}  {item.look_at_frame:>5}     "
            f"{item.concern:.2f}  {item.reason}"
        )


def _object_table(
    scores: Sequence[ObjectScore], columns: Sequence[str], overall: Measures, match: Match
) -> Iterator[str]:
    """Yield a row per object, those with the lowest score where there are too many."""
    shown = scores
    if len(scores) > MAX_ROWS:
        shown = sorted(scores, key=lambda s: (s.main_score, s.video, s.object_id))[:MAX_ROWS]
    rows = [((score.video, _label(score, match)), describe_object(score)) for score in shown]
    yield from _table(("video", "object"), rows, columns, overall, len(scores))


def _label(score: ObjectScore, match: Match) -> str:
    if match is Match.ID:
        return str(score.object_id)
    return f"{score.object_id}={'-' if score.found_id is None else score.found_id}"


def _table(
    heads: tuple[str, str],
    rows: Sequence[tuple[tuple[str, str], Measures]],
    columns: Sequence[str],
    overall: Measures,
    num_rows: int,
) -> Iterator[str]:
    """Yield aligned lines, the last of them for the run."""
    shown = rows[:MAX_ROWS]
    total = f"all {num_rows:,}" if num_rows != 1 else "all"
    first = max(len(text) for text in (heads[0], total, *(names[0] for names, _ in shown)))
    second = max(len(text) for text in (heads[1], *(names[1] for names, _ in shown)))
    widths = [max(7, len(_TITLES[column])) for column in columns]

    def line(names: tuple[str, str], cells: Sequence[str]) -> str:
        aligned = "  ".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))
        return f"  {names[0]:<{first}}  {names[1]:>{second}}  {aligned}"

    yield line(heads, [_TITLES[column] for column in columns])
    for names, measures in shown:
        yield line(names, [_number(measures[column]) for column in columns])
    if num_rows > len(shown):
        yield f"  ... these are the lowest {len(shown)}; --json and --csv have all"
    yield line((total, ""), [_number(overall[column]) for column in columns])


def _number(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _measures(sequences: Sequence[SequenceScore]) -> Measures:
    """Return the measures alone, without the counts beside them."""
    summary = summarise(sequences)
    return {name: summary[name] for name in (*OBJECT_MEASURES, *TRACKING_MEASURES)}


def _object_document(score: ObjectScore) -> dict[str, Any]:
    return {
        "object_id": score.object_id,
        "found_id": score.found_id,
        "num_frames": score.num_frames,
        **describe_object(score),
    }


def _sequence_document(sequence: SequenceScore) -> dict[str, Any]:
    return {
        "video_key": sequence.video_key,
        "video": sequence.video,
        "truth": sequence.truth,
        "num_frames": sequence.num_frames,
        "num_untracked": sequence.num_untracked,
        "num_unpaired": sequence.num_unpaired,
        **_measures([sequence]),
        "objects": [_object_document(score) for score in sequence.objects],
    }


def _comparison_document(comparison: Comparison) -> dict[str, Any]:
    return {
        "other": comparison.other.out,
        "other_overall": comparison.other.overall(),
        "mean_gain": comparison.mean_gain if comparison.differences else None,
        "num_alone": comparison.num_alone,
        "differences": [
            {
                "video": difference.video,
                "object_id": difference.object_id,
                "score": difference.score,
                "other_score": difference.other_score,
                "gain": difference.gain,
            }
            for difference in comparison.differences
        ],
    }
