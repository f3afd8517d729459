"""Contract of the formats of `maskmill export`: each is read back by the tool that owns it.

* COCO, compressed and not: pycocotools and faster-coco-eval load it; every mask is pixel-identical,
  on the right frame, of the right object and class, with its score; an absent object has no row; a
  perfect copy of the ground truth has an average precision of 1 in both evaluators.
* YouTube-VIS ground truth and results: TrackEval's loader finds every mask, null where the object
  is absent, and a track's identity.
* DAVIS: palette PNGs with the challenge's palette, every pixel the object in front, 0 elsewhere;
  TrackEval's loader finds the same objects.
* MOTS ground truth and results: TrackEval's loader accepts both; no pixel is in two masks.
* SA-V: pycocotools decodes every field; absent objects are empty masks; statistics are right.
"""

from __future__ import annotations

import configparser
import json
from pathlib import Path
from typing import Any

import faster_coco_eval
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from jobs.dataset import open_dataset
from jobs.export.exporter import ExportOptions, Format, export_dataset
from tests.exported import (
    LABELS,
    SEQUENCES,
    SIZES,
    Exported,
    Mask,
    assert_same_masks,
    decode,
    make_run,
    one_object_per_pixel,
)
from tests.trackeval_home import import_trackeval

NAMES = {sequence: name for name, sequence in SEQUENCES.items()}
Key = tuple[str, int, int]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return make_run(tmp_path_factory.mktemp("run"))


def export(run: Exported, dest: Path, format: Format, **options: Any) -> None:
    export_dataset(open_dataset(str(run.out)), format, str(dest), options=ExportOptions(**options))


def frame_of(file_name: str) -> tuple[str, int]:
    sequence, picture = file_name.split("/")
    return NAMES[sequence], int(picture.removesuffix(".jpg"))


@pytest.mark.parametrize("uncompressed", [False, True])
def test_coco(run: Exported, tmp_path: Path, uncompressed: bool) -> None:
    path = tmp_path / "coco.json"
    export(run, path, Format.COCO, uncompressed=uncompressed)
    for reader in (COCO, faster_coco_eval.COCO):
        loaded = reader(str(path))
        images = {image["id"]: image for image in loaded.loadImgs(loaded.getImgIds())}
        found: dict[Key, Mask] = {}
        tracks: dict[int, tuple[str, int]] = {}
        for row in loaded.loadAnns(loaded.getAnnIds()):
            image = images[row["image_id"]]
            name, frame_idx = frame_of(image["file_name"])
            assert (image["width"], image["height"]) == SIZES[name][:2]
            assert image["frame_id"] == frame_idx
            assert isinstance(row["segmentation"]["counts"], list if uncompressed else str)
            key = (name, frame_idx, row["object_id"])
            mask = found[key] = loaded.annToMask(row)
            assert row["area"] == mask.sum()
            assert np.float32(row["score"]) == run.rows[key]["score"]
            ys, xs = mask.nonzero()
            box = [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
            assert row["bbox"] == box
            (category,) = loaded.loadCats([row["category_id"]])
            assert category["name"] == LABELS[row["object_id"]]
            assert tracks.setdefault(row["track_id"], (name, row["object_id"])) == key[::2]
        assert_same_masks(found, run.masks)
        assert len(set(tracks.values())) == len(tracks)
        frames: dict[str, list[int]] = {name: [] for name in SIZES}
        for image in images.values():
            frames[frame_of(image["file_name"])[0]].append(image["frame_id"])
        assert frames == run.frames


def test_coco_is_evaluated_as_perfect_against_itself(
    run: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "coco.json"
    export(run, path, Format.COCO)
    for reader, judge in (
        (COCO, COCOeval),
        (faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster),
    ):
        truth = reader(str(path))
        results = truth.loadRes(truth.loadAnns(truth.getAnnIds()))
        evaluation = judge(truth, results, "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] == pytest.approx(1)
    capsys.readouterr()


def youtube_vis(run: Exported, folder: Path) -> Any:
    """Write ground truth and results into TrackEval's folders, and load both."""
    export(run, folder / "gt/youtube_vis_all/gt.json", Format.YTVIS)
    results = folder / "trackers/youtube_vis_all/us/data/results.json"
    export(run, results, Format.YTVIS, results=True)
    config = {
        "GT_FOLDER": f"{folder}/gt/",
        "TRACKERS_FOLDER": f"{folder}/trackers/",
        "SPLIT_TO_EVAL": "all",
        "PRINT_CONFIG": False,
    }
    return import_trackeval().datasets.YouTubeVIS(config)


def test_ytvis(run: Exported, tmp_path: Path) -> None:
    loader = youtube_vis(run, tmp_path)
    assert sorted(loader.seq_list) == sorted(SEQUENCES.values())
    truth = {row["id"]: row for row in loader.gt_data["annotations"]}
    results = loader.tracker_data["us"]
    assert len(results) == len(truth)
    names = {row["id"]: row["name"] for row in loader.gt_data["categories"]}
    frames = {
        row["file_names"][0].split("/")[0]: [frame_of(name)[1] for name in row["file_names"]]
        for row in loader.gt_data["videos"]
    }
    assert {NAMES[sequence]: found for sequence, found in frames.items()} == run.frames
    for kind in ("gt", "tracker"):
        found: dict[Key, Mask] = {}
        for sequence in loader.seq_list:
            raw = loader.get_raw_seq_data("us", sequence)
            assert raw["num_timesteps"] == len(frames[sequence])
            for t, frame_idx in enumerate(frames[sequence]):
                for mask, identity, number in zip(
                    raw[f"{kind}_dets"][t],
                    raw[f"{kind}_ids"][t],
                    raw[f"{kind}_classes"][t],
                    strict=True,
                ):
                    # Results have no ids; the loader counts them in the order of the file.
                    nth = identity if kind == "gt" else identity % len(results) + 1
                    object_id = truth[nth]["object_id"]
                    assert names[number] == LABELS[object_id]
                    assert not isinstance(mask["counts"], list)
                    key = (NAMES[sequence], frame_idx, object_id)
                    found[key] = decode(mask["size"], mask["counts"])
        assert_same_masks(found, run.masks)


def test_ytvis_lists(run: Exported, tmp_path: Path) -> None:
    export(run, tmp_path / "gt.json", Format.YTVIS)
    export(run, tmp_path / "results.json", Format.YTVIS, results=True)
    truth = json.loads((tmp_path / "gt.json").read_bytes())
    results = json.loads((tmp_path / "results.json").read_bytes())
    for track, result in zip(truth["annotations"], results, strict=True):
        assert len(track["segmentations"]) == track["length"] == len(result["segmentations"])
        absent = [segmentation is None for segmentation in track["segmentations"]]
        assert absent == [box is None for box in track["bboxes"]]
        assert absent == [area is None for area in track["areas"]]
        assert absent == [segmentation is None for segmentation in result["segmentations"]]
        for mask, coded, area in zip(
            track["segmentations"], result["segmentations"], track["areas"], strict=True
        ):
            if mask is not None:
                assert isinstance(mask["counts"], list)
                assert isinstance(coded["counts"], str)
                assert decode(**mask).sum() == area
        assert set(result) == {"video_id", "category_id", "score", "segmentations"}
        rows = [run.rows[key]["score"] for key in run.rows if key[::2] == _track_key(truth, track)]
        assert track["score"] == result["score"] == pytest.approx(np.mean(rows), abs=1e-6)


def _track_key(truth: dict[str, Any], track: dict[str, Any]) -> tuple[str, int]:
    (video,) = (video for video in truth["videos"] if video["id"] == track["video_id"])
    return frame_of(video["file_names"][0])[0], track["object_id"]


def test_davis(run: Exported, tmp_path: Path) -> None:
    dest = tmp_path / "davis"
    export(run, dest, Format.DAVIS)
    # The largest id of street does not fit a byte, so its objects are counted by rank.
    ids = {"street.mp4": {1: 1, 2: 2, 3: 7, 4: 300}, "park/dogs.mkv": {5: 5, 9: 9}}
    found: dict[Key, Mask] = {}
    frames: dict[str, list[int]] = {}
    for path in sorted(dest.rglob("*.png")):
        name = NAMES[path.parent.name]
        frames.setdefault(name, []).append(int(path.stem))
        with Image.open(path) as image:
            assert image.mode == "P"
            assert image.size == SIZES[name][:2]
            palette = image.getpalette()
            values = np.array(image)
        assert palette is not None
        assert palette[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
        assert palette[27:30] == [191, 0, 0]
        assert palette[66:69] == [22, 22, 22]
        assert palette[-3:] == [255, 255, 255]
        for value in np.unique(values[values > 0]).tolist():
            key = (name, int(path.stem), ids[name][value])
            found[key] = (values == value).astype(np.uint8)
    assert frames == run.frames
    assert sorted(path.name for path in dest.iterdir()) == sorted(SEQUENCES.values())
    assert_same_masks(found, one_object_per_pixel(run))


def test_davis_is_loaded_by_trackeval(run: Exported, tmp_path: Path) -> None:
    export(run, tmp_path / "gt", Format.DAVIS)
    export(run, tmp_path / "trackers/us/data", Format.DAVIS)
    config = {
        "GT_FOLDER": str(tmp_path / "gt"),
        "TRACKERS_FOLDER": str(tmp_path / "trackers"),
        "PRINT_CONFIG": False,
    }
    loader = import_trackeval().datasets.DAVIS(config)
    left = one_object_per_pixel(run)
    for sequence in loader.seq_list:
        raw = loader.get_raw_seq_data("us", sequence)
        assert raw["num_timesteps"] == len(run.frames[NAMES[sequence]])
        for t, scores in enumerate(raw["similarity_scores"]):
            np.testing.assert_array_equal(scores.diagonal(), 1)
            here = [key for key in left if key[:2] == (NAMES[sequence], t)]
            assert len(raw["tracker_ids"][t]) == len(here)


def test_davis_z_order(run: Exported, tmp_path: Path) -> None:
    export(run, tmp_path / "davis", Format.DAVIS, z_order=(7, 2))
    pictures = tmp_path / "davis/street"
    for frame_idx in run.frames["street.mp4"]:
        with Image.open(pictures / f"{frame_idx:05d}.png") as image:
            values = np.array(image)
        front = run.masks.get(("street.mp4", frame_idx, 7), np.zeros_like(values))
        next_ = run.masks.get(("street.mp4", frame_idx, 2), np.zeros_like(values))
        np.testing.assert_array_equal(values == 3, front)
        np.testing.assert_array_equal(values == 2, next_ & (1 - front))


def test_mots(run: Exported, tmp_path: Path) -> None:
    export(run, tmp_path / "gt", Format.MOTS)
    export(run, tmp_path / "trackers/us/data", Format.MOTS, results=True)
    config = {
        "GT_FOLDER": str(tmp_path / "gt"),
        "TRACKERS_FOLDER": str(tmp_path / "trackers"),
        "SKIP_SPLIT_FOL": True,
        "SEQ_INFO": dict.fromkeys(SEQUENCES.values()),
        "PRINT_CONFIG": False,
    }
    # Loading refuses overlapping masks and frames beyond the length in seqinfo.ini.
    loader = import_trackeval().datasets.MOTSChallenge(config)
    left = one_object_per_pixel(run)
    classes = {"car": 1, "person": 2}
    for kind in ("gt", "tracker"):
        found: dict[Key, Mask] = {}
        for sequence, name in NAMES.items():
            raw = loader.get_raw_seq_data("us", sequence)
            assert raw["num_timesteps"] == SIZES[name][2]
            for t in range(raw["num_timesteps"]):
                for mask, identity, number in zip(
                    raw[f"{kind}_dets"][t],
                    raw[f"{kind}_ids"][t],
                    raw[f"{kind}_classes"][t],
                    strict=True,
                ):
                    assert identity // 1000 == number == classes[LABELS[identity % 1000]]
                    key = (name, t, int(identity % 1000))
                    found[key] = decode(mask["size"], mask["counts"])
        assert_same_masks(found, left)
    info = configparser.ConfigParser()
    info.read(tmp_path / "gt/street/seqinfo.ini")
    assert dict(info["Sequence"]) == {
        "name": "street",
        "imdir": "img1",
        "framerate": "24.0",
        "seqlength": "14",
        "imwidth": "96",
        "imheight": "64",
        "imext": ".jpg",
    }


def test_sav(run: Exported, tmp_path: Path) -> None:
    export(run, tmp_path / "sav", Format.SAV)
    found: dict[Key, Mask] = {}
    for name, (width, height, num_frames) in SIZES.items():
        data = json.loads((tmp_path / f"sav/{SEQUENCES[name]}_auto.json").read_bytes())
        assert data["video_id"] == SEQUENCES[name]
        assert (data["video_width"], data["video_height"]) == (width, height)
        assert data["video_frame_count"] == len(data["masklet"]) == num_frames
        assert data["video_duration"] == pytest.approx(num_frames / 24, abs=0.01)
        ids = data["masklet_id"]
        assert data["masklet_num"] == len(ids)
        assert data["maskmill"]["category"] == [LABELS[object_id] for object_id in ids]
        seen: dict[int, list[int]] = {object_id: [] for object_id in ids}
        for frame_idx, row in zip(data["maskmill"]["frame_idx"], data["masklet"], strict=True):
            for object_id, coded in zip(ids, row, strict=True):
                mask = decode(**coded)
                assert mask.shape == (height, width)
                seen[object_id].append(int(mask.sum()))
                if mask.any():
                    found[name, frame_idx, object_id] = mask
        for nth, object_id in enumerate(ids):
            areas = np.array(seen[object_id])
            visible = areas > 0
            mean = areas[visible].mean()
            assert data["masklet_size_abs"][nth] == pytest.approx(mean)
            assert data["masklet_size_rel"][nth] == pytest.approx(mean / (width * height))
            assert data["masklet_size_bucket"][nth] == ("small" if mean < 1024 else "medium")
            first = int(visible.argmax())
            assert data["masklet_first_appeared_frame"][nth] == first
            changes = np.count_nonzero(np.diff(visible[first:].astype(int)))
            assert data["masklet_visibility_changes"][nth] == changes
            assert data["masklet_frame_count"][nth] == num_frames
    assert_same_masks(found, run.masks)
