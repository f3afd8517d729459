"""Contract of the conversions to other Python libraries.

* `supervision.Detections` per frame hold every mask pixel-identical, with box, score, class, name
  and object id; an object without a category has class -1; a frame without masks has none.
* supervision's own tools take them: filtering, and boxes of masks.
* The layout for FiftyOne has a manifest and a file of labels per video; masks are within their
  boxes, frames count from 1, and every tracked frame is there.
"""

from __future__ import annotations

import base64
import io
import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import supervision as sv

from jobs.conversions import supervision_frames, to_supervision, write_fiftyone
from jobs.dataset import open_dataset
from jobs.export.selection import Selection
from tests.exported import LABELS, SEQUENCES, SIZES, Exported, Mask, assert_same_masks, make_run
from workers.errors import ConfigError

Key = tuple[str, int, int]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return make_run(tmp_path_factory.mktemp("run"))


def test_supervision(run: Exported) -> None:
    dataset = open_dataset(str(run.out))
    found: dict[Key, Mask] = {}
    for video in dataset.videos():
        frames = list(supervision_frames(dataset, video))
        assert [frame.frame_idx for frame, _ in frames] == run.frames[video.name]
        for frame, detections in frames:
            assert detections.metadata == {"frame_idx": frame.frame_idx, "pts_us": frame.pts_us}
            if not frame.masks:
                assert (len(detections), detections.mask) == (0, None)
                continue
            assert isinstance(detections.mask, np.ndarray)
            assert detections.mask.dtype == bool
            # supervision's boxes of masks end on their last pixel, ours after it.
            inclusive = sv.mask_to_xyxy(detections.mask)
            np.testing.assert_array_equal(detections.xyxy, inclusive + np.array([0, 0, 1, 1]))
            for xyxy, mask, score, class_id, object_id, data in detections:
                key = (video.name, frame.frame_idx, int(object_id))  # type: ignore[arg-type]
                assert mask is not None
                found[key] = mask.astype(np.uint8)
                row = run.rows[key]
                assert score == np.float32(row["score"])
                assert class_id == row["category_id"]
                assert data["class_name"] == LABELS[key[2]]
                left, top, right, bottom = xyxy
                assert [left, top, right - left, bottom - top] == [
                    row[f"bbox_{side}"] for side in "xywh"
                ]
            sure = detections[detections.confidence == 1]
            assert isinstance(sure, sv.Detections)
            assert len(sure) == sum(mask.score == 1 for mask in frame.masks)
    assert_same_masks(found, run.masks)


def test_supervision_without_categories(run: Exported) -> None:
    dataset = open_dataset(str(run.out))
    frame = next(iter(dataset.frames(dataset.video("street"))))
    assert "class_name" not in to_supervision(frame).data
    bare = replace(frame, masks=tuple(replace(mask, category_id=None) for mask in frame.masks))
    detections = to_supervision(bare, dataset.categories)
    assert detections.class_id is not None
    assert set(detections.class_id.tolist()) == {-1}
    assert set(detections.data["class_name"]) == {"object"}


def test_fiftyone(run: Exported, tmp_path: Path) -> None:
    # FiftyOne brings a database server, and the library that reads this layout an older OpenCV:
    # neither can be installed beside what is here. The layout is read as its manual describes it.
    dataset = open_dataset(str(run.out))
    (run.out.parent / "corpus/park/dogs.mkv").rename(tmp_path / "elsewhere.mkv")
    try:
        tally = write_fiftyone(dataset, str(tmp_path / "fo"))
    finally:
        (tmp_path / "elsewhere.mkv").rename(run.out.parent / "corpus/park/dogs.mkv")
    assert (tally.num_videos, tally.num_masks) == (2, len(run.masks))
    manifest = json.loads((tmp_path / "fo/manifest.json").read_bytes())
    assert manifest["type"] == "eta.core.datasets.LabeledVideoDataset"
    media = {Path(entry["labels"]).stem: entry["data"] for entry in manifest["index"]}
    assert media == {
        "street": str(run.out.parent / "corpus/street.mp4"),
        "park__dogs": "data/park__dogs.mkv",
    }
    found: dict[Key, Mask] = {}
    for name, (width, height, num_frames) in SIZES.items():
        labels = json.loads((tmp_path / f"fo/labels/{SEQUENCES[name]}.json").read_bytes())
        assert list(labels["frames"]) == [str(number + 1) for number in range(num_frames)]
        for number, frame in labels["frames"].items():
            assert frame["frame_number"] == int(number)
            for row in frame["objects"]["objects"]:
                assert row["label"] == LABELS[row["index"]]
                corners = [
                    round(row["bounding_box"][corner][axis] * extent)
                    for corner in ("top_left", "bottom_right")
                    for axis, extent in (("x", width), ("y", height))
                ]
                left, top, right, bottom = corners
                packed = zlib.decompress(base64.b64decode(row["mask"]))
                mask = np.zeros((height, width), np.uint8)
                mask[top:bottom, left:right] = np.load(io.BytesIO(packed), allow_pickle=False)
                key = (name, int(number) - 1, row["index"])
                found[key] = mask
                assert row["confidence"] == run.rows[key]["score"]
    assert_same_masks(found, run.masks)
    with pytest.raises(ConfigError, match="exists"):
        write_fiftyone(dataset, str(tmp_path / "fo"))
    only = Selection(videos=("street",))
    write_fiftyone(dataset, str(tmp_path / "fo"), only, overwrite=True)
    assert [path.name for path in (tmp_path / "fo/labels").iterdir()] == ["street.json"]
    with pytest.raises(ConfigError, match="nothing to write"):
        write_fiftyone(dataset, str(tmp_path / "none"), Selection(where=("width > 4000",)))
    assert not (tmp_path / "none").exists()
