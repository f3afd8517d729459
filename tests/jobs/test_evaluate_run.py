"""`maskmill eval` on real runs.

* A perfect copy of the ground truth scores 1.0 in every measure, an empty result 0.0.
* All forms of the layout mean the same: pictures directly, in masks/, binary ones, masklets in the
  form of SA-V, an export of ours; names as in the layout's definition.
* Every number is that of vos-benchmark and TrackEval, on identities that switch, on objects that
  come and go, with void, and on masks of the tracker `flow` on DAVIS pictures.
* Known frames decide what is measured; frames that a stride left out do not count and are told.
* `--match iou` pairs objects one to one by overlap, and the output says so.
* Boxes are measured as OTB does, from its 1-based files and from plain ones.
* `--against` compares object by object, the largest loss first; each time range of a video with
  itself.
* JSON, CSV and what is kept below OUT/_evaluation hold the same numbers; the dataset stays whole.
* What cannot be measured is named in a sentence, the rest is measured, and the exit code is 1;
  nothing to measure at all is exit code 2, and so is a wrong command.
* A run that goes on is measured as far as it is readable, and that is said.
"""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs.cli import main
from jobs.commit_log import CommitLog
from jobs.dataset import open_dataset
from jobs.evaluation.davis import Statistics
from jobs.evaluation.runs import Evaluation, compare
from jobs.evaluation.scoring import Match, ObjectScore, SequenceScore
from jobs.evaluation.tables import read_scores
from jobs.maintenance import verify
from tests.elsewhere import install_elsewhere
from tests.jobs.outputs import commit_videos, run_plan
from tests.jobs.scored import (
    VOID,
    Labels,
    moving_disks,
    track,
    track_masks,
    write_prompts,
    write_truth,
    write_videos,
)
from tests.media import shared_dir
from workers import rle
from workers.storage import open_store

ROOT = Path(__file__).resolve().parents[2]
SPEED = ROOT / "tests" / "benchmarks" / "eval_speed.py"
STREET, DOGS = "street.mp4", "park/dogs"
ALL_MASKS = ("j_and_f", "j_mean", "j_recall", "f_mean", "f_recall")
IDENTITY = ("hota", "det_a", "ass_a", "mota", "idf1")


@dataclass(frozen=True, slots=True)
class Place:
    """Runs over one corpus, and the truth about it.

    Attributes
    ----------
    truth : dict of str to list of Labels
        What is right.
    gt : Path
        The same as pictures.
    copy, worse, empty : Path
        Outputs: the same masks; shifted ones whose identities switch; none.
    """

    folder: Path
    truth: dict[str, list[Labels]]
    gt: Path
    copy: Path
    worse: Path
    empty: Path


def spoiled(sequence: list[Labels]) -> list[Labels]:
    """Return masks that drift, swap identities halfway, and miss an object on one frame."""
    swapped = np.arange(256).astype(np.uint8)
    swapped[[1, 2]] = 2, 1
    result = []
    for frame, labels in enumerate(sequence):
        moved = np.roll(labels, frame, axis=1)
        if frame >= len(sequence) // 2:
            moved = swapped[moved]
        if frame == 2:
            moved = np.where(moved == 2, 0, moved).astype(np.uint8)
        result.append(moved)
    return result


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("scored")
    truth = {STREET: moving_disks(8), DOGS: moving_disks(6, 3, seed=5)}
    corpus = write_videos(folder / "corpus", truth)
    gt = folder / "gt"
    for name, labels in truth.items():
        write_truth(gt, name.removesuffix(".mp4"), labels)
    worse = {name: spoiled(labels) for name, labels in truth.items()}
    nothing = {name: [np.zeros_like(one) for one in labels] for name, labels in truth.items()}
    return Place(
        folder,
        truth,
        gt,
        track_masks(folder / "copy", truth, corpus),
        track_masks(folder / "worse", worse, corpus),
        track_masks(folder / "empty", nothing, corpus),
    )


def evaluated(*words: object, code: int = 0, folder: Path) -> dict[str, Any]:
    """Run `eval` without keeping anything; return its JSON."""
    path = folder / "scores.json"
    path.unlink(missing_ok=True)
    assert main(["eval", *map(str, words), "--no-save", "--json", str(path)]) == code
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def test_a_perfect_copy_is_one(place: Place, tmp_path: Path) -> None:
    document = evaluated(place.copy, "--gt", place.gt, folder=tmp_path)
    overall = document["overall"]
    assert (overall["num_sequences"], overall["num_objects"]) == (2, 5)
    assert {name: overall[name] for name in ALL_MASKS + IDENTITY} == dict.fromkeys(
        ALL_MASKS + IDENTITY, 1.0
    )
    assert overall["num_switches"] == 0
    assert (document["faults"], document["notes"]) == ([], [])


def test_an_empty_result_is_zero(place: Place, tmp_path: Path) -> None:
    # Every object is visible on all frames: where truth is empty, an empty mask is right.
    assert all(set(np.unique(p)) >= {1, 2} for labels in place.truth.values() for p in labels)
    overall = evaluated(place.empty, "--gt", place.gt, folder=tmp_path)["overall"]
    assert {name: overall[name] for name in ALL_MASKS + IDENTITY} == dict.fromkeys(
        ALL_MASKS + IDENTITY, 0.0
    )


def masklets(truth: list[Labels], **more: Any) -> dict[str, Any]:
    """Return labels in the form of SA-V."""
    height, width = truth[0].shape
    ids = [int(i) for i in np.unique(truth) if i]
    rows = [
        [
            {"size": [height, width], "counts": rle.encode(labels == i).decode()}
            if (labels == i).any()
            else None
            for i in ids
        ]
        for labels in truth
    ]
    return {
        "video_height": height,
        "video_width": width,
        "masklet": rows,
        "masklet_id": ids,
    } | more


def test_all_forms_of_the_layout_mean_the_same(place: Place, tmp_path: Path) -> None:
    expected = evaluated(place.worse, "--gt", place.gt, folder=tmp_path)["overall"]
    assert 0 < expected["hota"] < 1
    # Pictures below masks/, beside things that are not looked at; leading folders left out.
    nested = tmp_path / "nested"
    write_truth(nested, "street/masks", place.truth[STREET])
    write_truth(nested, "street/frames", place.truth[DOGS])
    write_truth(nested, "dogs/Annotations", place.truth[DOGS])
    (nested / "street" / "meta.json").write_text("{}")
    assert evaluated(place.worse, "--gt", nested, folder=tmp_path)["overall"] == expected
    # Masklets.
    sav = tmp_path / "sav" / "park"
    sav.mkdir(parents=True)
    (sav.parent / "street_manual.json").write_text(json.dumps(masklets(place.truth[STREET])))
    (sav / "dogs.json").write_text(
        json.dumps(masklets(place.truth[DOGS], frame_idx=list(range(6)), other=1))
    )
    assert evaluated(place.worse, "--gt", sav.parent, folder=tmp_path)["overall"] == expected
    # What export writes, of both kinds.
    for kind in ("davis", "sav"):
        gt = tmp_path / f"exported-{kind}"
        assert main(["export", str(place.copy), str(gt), "--format", kind]) == 0
        assert evaluated(place.worse, "--gt", gt, folder=tmp_path)["overall"] == expected


def test_binary_pictures_are_object_one(place: Place, tmp_path: Path) -> None:
    first = [np.where(labels == 1, 255, 0).astype(np.uint8) for labels in place.truth[STREET]]
    first[3][:] = 0  # not seen there, and known to be
    gt = write_truth(tmp_path / "gt", "street", first)
    (sequence,) = evaluated(place.copy, "--gt", gt, folder=tmp_path)["sequences"]
    assert [score["object_id"] for score in sequence["objects"]] == [1]
    # Six frames count; on one of them the run has a mask where there is nothing.
    assert sequence["j_mean"] == pytest.approx(5 / 6)


def run_speed(out: Path, gt: Path, report: Path) -> dict[str, float]:
    """Run the program that compares with the references; return the largest differences."""
    packages = "trackeval==1.3.0", "tabulate==0.10.0", "vos-benchmark==0.1.0"
    home = install_elsewhere("trackeval-1.3.0-vos-benchmark-0.1.0", *packages)
    words = [str(SPEED), str(out), "--gt", str(gt), "--reference", str(home)]
    words += ["--processes", "1", "--repeat", "1", "--json", str(report)]
    done = subprocess.run(
        [sys.executable, *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    differences: dict[str, float] = json.loads(report.read_text())["largest_differences"]
    return differences


def test_numbers_are_those_of_the_references(tmp_path: Path) -> None:
    # Given: identities that switch, objects that come and go, void, and a video of flow.
    hidden = moving_disks(9, 3, seed=2)
    # Gone after the first frame that counts: vos-benchmark does not count an object before it was
    # seen, which is not what DAVIS defines.
    for labels in hidden[2:5]:
        labels[labels == 3] = 0
    hidden[6][:] = 0
    for labels in hidden:
        labels[:20, :30] = VOID
    truth = {"hidden.mp4": hidden, "many": moving_disks(10, 4, seed=7)}
    found = {name: spoiled([np.where(p == VOID, 0, p) for p in s]) for name, s in truth.items()}
    crafted = track_masks(tmp_path / "crafted", found)
    for name, sequence in truth.items():
        write_truth(tmp_path / "gt", name.removesuffix(".mp4"), sequence)
    flow_gt = tmp_path / "flow-gt"
    flow_corpus = tmp_path / "flow"
    real = real_crops(flow_corpus)
    for name, sequence in real.items():
        write_truth(flow_gt, name, sequence)
    write_prompts(tmp_path / "flow.jsonl", {name: s[:1] for name, s in real.items()})
    flow = track(flow_corpus, tmp_path / "flow-out", prompts={"file": str(tmp_path / "flow.jsonl")})
    # When, then
    for out, gt in ((crafted, tmp_path / "gt"), (flow, flow_gt)):
        differences = run_speed(out, gt, tmp_path / "report.json")
        assert len(differences) == 8
        assert max(differences.values()) < 1e-9, differences


def real_crops(corpus: Path) -> dict[str, list[Labels]]:
    """Write small pieces of two DAVIS sequences as folders of frames; return their labels."""
    davis = shared_dir() / "data" / "davis"
    if not davis.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"{davis} is missing")
        truth = {"a": moving_disks(6, 1, seed=1), "b": moving_disks(6, 1, seed=4)}
        write_videos(corpus, truth)
        return truth
    labels: dict[str, list[Labels]] = {}
    for name in ("dog", "bmx-trees"):
        (corpus / name).mkdir(parents=True)
        labels[name] = []
        for index in range(7):
            frame = Image.open(davis / name / "frames" / f"{index:05d}.jpg")
            frame.resize((284, 160)).save(corpus / name / f"{index:05d}.png")
            mask = Image.open(davis / name / "masks" / f"{index:05d}.png")
            small = mask.resize((284, 160), Image.Resampling.NEAREST)
            labels[name].append((np.asarray(small) > 0).astype(np.uint8))
    return labels


def test_only_known_and_tracked_frames_count(place: Place, tmp_path: Path) -> None:
    some = {i: place.truth[STREET][i] for i in (0, 2, 3, 7)}
    gt = write_truth(tmp_path / "sparse", "street", some)
    (sequence,) = evaluated(place.copy, "--gt", gt, folder=tmp_path)["sequences"]
    assert (sequence["num_frames"], sequence["num_untracked"]) == (4, 0)
    assert [score["num_frames"] for score in sequence["objects"]] == [2, 2]
    whole = evaluated(place.copy, "--gt", gt, "--all-frames", folder=tmp_path)
    assert [score["num_frames"] for score in whole["sequences"][0]["objects"]] == [4, 4]
    # A stride of three tracks 0, 3 and 6 of the eight frames.
    shown = [p if i % 3 == 0 else np.zeros_like(p) for i, p in enumerate(place.truth[STREET])]
    out = track_masks(tmp_path / "strided", {STREET: shown}, stride=3)
    document = evaluated(out, "--gt", place.gt, "--video", "street", folder=tmp_path)
    (sequence,) = document["sequences"]
    assert (sequence["num_frames"], sequence["num_untracked"]) == (3, 5)
    assert sequence["j_and_f"] == 1.0
    assert any("5 frames of the ground truth were not tracked" in n for n in document["notes"])


def test_frames_are_named_like_the_files_of_a_folder(tmp_path: Path) -> None:
    truth = moving_disks(4)
    corpus = write_videos(tmp_path / "corpus", {"walk": truth})
    gt = write_truth(tmp_path / "gt", "walk", truth)
    for folder, ending in ((corpus / "walk", ".jpg"), (gt / "walk", ".png")):
        for index in reversed(range(4)):
            (folder / f"{index:05d}{ending}").rename(folder / f"{index + 1:05d}{ending}")
    out = track_masks(tmp_path / "run", {"walk": truth}, corpus)
    assert evaluated(out, "--gt", gt, folder=tmp_path)["overall"]["j_and_f"] == 1.0


def test_the_one_video_of_a_corpus_is_known_by_the_folders_above(tmp_path: Path) -> None:
    truth = moving_disks(4)
    frames = write_videos(tmp_path / "corpus", {"dog/frames": truth}) / "dog" / "frames"
    gt = write_truth(tmp_path / "gt", "dog", truth)
    out = track_masks(tmp_path / "run", {"frames": truth}, frames)
    (sequence,) = evaluated(out, "--gt", gt, folder=tmp_path)["sequences"]
    assert (sequence["video"], sequence["truth"], sequence["hota"]) == ("frames", "dog", 1.0)


def test_a_name_that_fits_two_videos_is_refused(tmp_path: Path) -> None:
    truth = moving_disks(4)
    videos = dict.fromkeys(("a/clip.mp4", "b/clip.mp4", "clip.mp4/c.mp4"), truth)
    out = track_masks(tmp_path / "run", videos)
    gt = write_truth(tmp_path / "gt", "clip", truth)
    write_truth(gt, "c", truth)
    document = evaluated(out, "--gt", gt, code=1, folder=tmp_path)
    assert [s["video"] for s in document["sequences"]] == ["clip.mp4/c.mp4"]
    assert "clip fits 2 videos (a/clip.mp4, b/clip.mp4)" in document["faults"][0]
    write_truth(gt, "a/clip", truth)
    document = evaluated(out, "--gt", gt, folder=tmp_path)
    assert {s["video"]: s["truth"] for s in document["sequences"]} == {
        "a/clip.mp4": "a/clip",
        "b/clip.mp4": "clip",
        "clip.mp4/c.mp4": "c",
    }


def test_objects_are_paired_by_overlap_when_asked(place: Place, tmp_path: Path) -> None:
    renamed = np.arange(256).astype(np.uint8)
    renamed[[1, 2, 3]] = 30, 10, 20
    found = {name: [renamed[p] for p in labels] for name, labels in place.truth.items()}
    out = track_masks(tmp_path / "renamed", found, place.folder / "corpus")
    by_id = evaluated(out, "--gt", place.gt, folder=tmp_path)
    assert by_id["overall"]["j_and_f"] == 0.0
    assert any("use --match iou" in note for note in by_id["notes"])
    paired = evaluated(out, "--gt", place.gt, "--match", "iou", folder=tmp_path)
    assert paired["overall"]["j_and_f"] == 1.0
    pairs = {s["object_id"]: s["found_id"] for s in paired["sequences"][0]["objects"]}
    assert pairs == {1: 30, 2: 10, 3: 20}
    assert any("paired one to one by overlap" in note for note in paired["notes"])
    assert by_id["overall"]["hota"] == paired["overall"]["hota"] == 1.0


def test_boxes_are_measured_as_otb_does(place: Place, tmp_path: Path) -> None:
    boxes = []
    for labels in place.truth[STREET]:
        rows, columns = np.nonzero(labels == 1)
        boxes.append([columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1])
    known = np.array(boxes, float)
    (tmp_path / "otb" / "street").mkdir(parents=True)
    (tmp_path / "plain" / "street").mkdir(parents=True)
    lines = [f"{x + 1:g},{y + 1:g},{w:g},{h:g}" for x, y, w, h in known]
    (tmp_path / "otb" / "street" / "groundtruth_rect.txt").write_text("\n".join(lines))
    (tmp_path / "plain" / "street" / "boxes.json").write_text(json.dumps({"xywh": known.tolist()}))
    for form in ("otb", "plain"):
        overall = evaluated(place.copy, "--gt", tmp_path / form, folder=tmp_path)["overall"]
        assert (overall["mean_iou"], overall["precision"], overall["precision_auc"]) == (1, 1, 1)
        # Overlap must be above the threshold, and none is above 1.
        assert overall["success_auc"] == pytest.approx(20 / 21)
        assert overall["j_and_f"] is None
    # Half the width to the right, everywhere but on an unknown frame: IoU 1/3.
    moved = [None if i == 2 else [x + w / 2, y, w, h] for i, (x, y, w, h) in enumerate(boxes)]
    text = json.dumps({"xywh": [m if m is None else [float(v) for v in m] for m in moved]})
    (tmp_path / "plain" / "street" / "boxes.json").write_text(text)
    (score,) = evaluated(place.copy, "--gt", tmp_path / "plain", folder=tmp_path)["sequences"]
    assert score["num_frames"] == 7
    assert score["mean_iou"] == pytest.approx(1 / 3)
    assert score["success_auc"] == pytest.approx(7 / 21)  # above 0, 0.05, ..., 0.30
    distance = known[0, 2] / 2
    assert score["precision_auc"] == pytest.approx((50 - math.ceil(distance) + 1) / 51)


def test_two_runs_are_compared_object_by_object(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = evaluated(place.worse, "--gt", place.gt, "--against", place.copy, folder=tmp_path)
    told = capsys.readouterr().out
    comparison = document["comparison"]
    assert comparison["other"] == str(place.copy)
    assert comparison["other_overall"]["j_and_f"] == 1.0
    gains = [difference["gain"] for difference in comparison["differences"]]
    assert gains == sorted(gains)
    assert len(gains) == 5
    assert gains[0] < 0
    assert comparison["mean_gain"] == pytest.approx(document["overall"]["j_and_f"] - 1)
    assert "5 of 5 objects have lost" in told
    worst = comparison["differences"][0]
    assert f"{worst['score']:.3f}   1.000  {worst['gain']:+.3f}" in told


def test_time_ranges_of_one_video_are_compared_with_themselves() -> None:
    def evaluation(scores: dict[int, float]) -> Evaluation:
        sequences = []
        for video_key, value in scores.items():
            mean = Statistics(value, value, 0.0)
            score = ObjectScore("long.mp4", 1, 1, 9, mean, mean)
            sequences.append(SequenceScore(video_key, "long.mp4", "long", (score,), 9, 0, 0))
        return Evaluation("out", "gt", Match.ID, True, tuple(sequences), (), (), 0.0)

    compared = compare(evaluation({5: 0.75, 6: 0.5}), evaluation({5: 1.0, 6: 0.25, 7: 0.5}))
    assert [difference.gain for difference in compared.differences] == [-0.25, 0.25]
    assert compared.num_alone == 1
    # Copies of a corpus have other keys, and one range each.
    assert len(compare(evaluation({5: 0.5}), evaluation({8: 0.5})).differences) == 1


def test_files_and_what_is_kept_hold_the_same(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(place.worse, out)
    words = ["eval", str(out), "--gt", str(place.gt)]
    words += ["--json", str(tmp_path / "s.json"), "--csv", str(tmp_path / "s.csv")]
    assert main(words) == 0
    document = json.loads((tmp_path / "s.json").read_text())
    assert read_scores(open_store(str(out))) == document
    rows = list(csv.DictReader((tmp_path / "s.csv").open()))
    assert [row["level"] for row in rows].count("object") == 5
    assert [row["level"] for row in rows].count("sequence") == 2
    assert float(rows[-1]["hota"]) == document["overall"]["hota"]
    first = document["sequences"][0]["objects"][0]
    (row,) = [
        row
        for row in rows
        if (row["level"], row["video"], row["object_id"])
        == ("object", document["sequences"][0]["video"], str(first["object_id"]))
    ]
    assert float(row["f_mean"]) == first["f_mean"]
    # Files that are there are only replaced when asked for.
    (tmp_path / "s.csv").unlink()
    assert main(words) == 2
    assert f"{tmp_path / 's.json'} exists" in capsys.readouterr().err
    assert not (tmp_path / "s.csv").exists()
    assert main([*words, "--overwrite"]) == 0
    assert (tmp_path / "s.csv").exists()
    # The tables of the dataset are not touched.
    assert verify(open_store(str(out))).exit_code == 0
    assert open_dataset(str(out)).table("videos").num_rows == 2


def test_what_cannot_be_measured_is_named_and_the_rest_measured(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases: dict[str, tuple[Any, str]] = {
        "size": ([p[:-8] for p in place.truth[STREET]], "128x64 pixels, but street.mp4 has 128x72"),
        "length": ([*place.truth[STREET], place.truth[STREET][0]], "knows frame 8, but"),
        "short": (place.truth[STREET][:2], "add frames, or count them with --all-frames"),
        "empty": ([np.zeros_like(p) for p in place.truth[STREET]], "shows no object"),
        "deep": ([p.astype(np.uint16) * 300 for p in place.truth[STREET]], "holds the value 600"),
        "mixed": (
            [np.where(place.truth[STREET][0], 255, 0).astype(np.uint8), *place.truth[STREET][1:]],
            "has object ids, but the pictures before it only 0 and 255",
        ),
    }
    for case, (labels, sentence) in cases.items():
        gt = tmp_path / case
        write_truth(gt, "street", labels)
        write_truth(gt, DOGS, place.truth[DOGS])
        document = evaluated(place.copy, "--gt", gt, code=1, folder=tmp_path)
        told = capsys.readouterr()
        assert [s["video"] for s in document["sequences"]] == [DOGS], case
        assert sentence in " ".join(document["faults"]), case
        assert f"problem: {document['faults'][0]}" in told.err
        assert "Traceback" not in told.err
    # Colours, a file that is no picture, a name that is no frame, a truth about no video.
    gt = tmp_path / "mess"
    write_truth(gt, DOGS, place.truth[DOGS])
    write_truth(gt, "nobody", place.truth[DOGS])
    (gt / "street").mkdir()
    Image.new("RGB", (128, 72)).save(gt / "street" / "0.png")
    faults = evaluated(place.copy, "--gt", gt, code=1, folder=tmp_path)["faults"]
    assert "has colours (RGB)" in faults[0]
    assert "the sequence nobody of the ground truth" in faults[1]
    for name, data, sentence in (
        ("0.png", b"no picture", "cannot be read as a picture"),
        ("first.png", b"no picture", "must be named by a 0-based frame index"),
    ):
        shutil.rmtree(gt / "street")
        (gt / "street").mkdir()
        (gt / "street" / name).write_bytes(data)
        faults = evaluated(place.copy, "--gt", gt, code=1, folder=tmp_path)["faults"]
        assert sentence in faults[0]
    shutil.rmtree(gt / "street")
    for content, sentence in (
        ("[", "is no ground truth in the form of SA-V"),
        (json.dumps({"video_height": 72}), "'video_width' is missing"),
        (json.dumps(masklets(place.truth[STREET], masklet_id=[1])), "contradicts itself"),
        (json.dumps(masklets(place.truth[STREET], video_width=127)), "is no COCO RLE"),
    ):
        (gt / "street.json").write_text(content)
        faults = evaluated(place.copy, "--gt", gt, code=1, folder=tmp_path)["faults"]
        assert sentence in faults[0]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["{out}", "--gt", "{folder}/none"], "does not exist or holds nothing to score against"),
        (["{out}", "--gt", "{gt}/street"], "has its pictures directly inside"),
        (["{out}", "--gt", "{other}"], "is named like a video of"),
        (["{out}", "--gt", "{gt}", "--match", "name"], "--match is id or iou"),
        (["{out}", "--gt", "{gt}", "--video", "cat"], "holds no video named 'cat'"),
        (["{out}", "--against", "{out}"], "--against needs the ground truth"),
        (["{out}", "--gt", "{gt}", "--json", "{folder}"], "is a folder"),
        (["{folder}/none", "--gt", "{gt}"], "holds no dataset"),
    ],
)
def test_a_wrong_command_is_told(
    words: list[str],
    sentence: str,
    place: Place,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = write_truth(tmp_path / "other", "boat", place.truth[STREET])
    given = {"out": place.copy, "gt": place.gt, "other": other, "folder": tmp_path}
    assert main(["eval", *(word.format(**given) for word in words), "--no-save"]) == 2
    told = capsys.readouterr()
    assert sentence in told.err
    assert "Traceback" not in told.err


def test_a_run_that_goes_on_is_measured_as_far_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs.publication import Publisher

    log = CommitLog.acquire(open_store(str(tmp_path)), "one")
    log.plan(run_plan())
    assert main(["eval", str(tmp_path)]) == 2
    assert "has no readable video yet" in capsys.readouterr().err
    publisher = Publisher(log)
    commit_videos(log, (3, 4), num_frames=4)
    publisher.publish()
    assert main(["eval", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "has not ended: what is readable now is measured" in told
    assert "4 objects with 16 masks in 2 videos" in told
