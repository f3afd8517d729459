"""Contract of `maskmill import`, on small files written by hand from the formats' definitions.

* Every format gives every mask, on its frame, with its object id and label, as prompts (JSONL and
  Parquet) and as ground truth, for two videos with several objects, absences, overlaps and frames
  without anything.
* By default an object is prompted once, where it is first seen; the file starts a run.
* COCO is read as labelling tools write it: polygons, lists of counts, tracks in attributes, crowd
  flags, annotations before images, no list of videos. What has no track is an object of its own.
* MOTS: instances that are not unique keep their whole id, ignored regions are void, frames count
  from 1 unless it is said otherwise. SA-V: every fourth frame. YouTube-VIS: results, too.
* Ground truth is pictures where they can hold it: overlaps, large ids and leading void are JSON.
* What is wrong with a source is one sentence and exit code 2, and nothing is written.
* A destination that exists is refused; `--overwrite` replaces it, but no folder of somebody else.
* Sources and results may be in a bucket; memory does not grow with the source.
"""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco

from jobs import cli, driver
from jobs.config import RunConfig
from jobs.ground_truth import open_ground_truth
from jobs.importing.formats import ImportFormat, PromptFrames
from jobs.importing.importer import ImportSource, import_prompts
from jobs.progress import SilentReporter
from jobs.threads import ThreadPool
from tests import servers
from tests.datasets import read_table
from tests.media import write_video
from workers import rle
from workers.messages import StoreOptions
from workers.prompts.table import read_prompts
from workers.storage import open_store

Mask = NDArray[np.uint8]
Json = dict[str, Any]
Frames = dict[int, dict[int, Mask]]
"""Masks by frame and object id."""

SIZES = {"street": (40, 60), "park/dogs": (24, 32)}
LABELS = {("street", 1): "pedestrian", ("street", 3): "car", ("park/dogs", 7): "car"}
CLASSES = {"car": 1, "pedestrian": 2}


def box(video: str, top: int, left: int, height: int, width: int) -> Mask:
    mask = np.zeros(SIZES[video], np.uint8)
    mask[top : top + height, left : left + width] = 1
    return mask


def scene(*, overlaps: bool) -> dict[str, Frames]:
    """Return two videos; in `street` object 3 is away on frame 2, and frame 4 is empty."""
    street: Frames = {}
    for frame_idx in (0, 1, 2, 3):
        street[frame_idx] = {1: box("street", 5 + frame_idx, 10, 12, 15)}
        if frame_idx != 2:
            left = 20 if overlaps else 30
            street[frame_idx][3] = box("street", 8, left + frame_idx, 20, 20)
    street[4] = {}
    dogs = {i: {7: box("park/dogs", 0, i, 10, 10)} for i in (1, 2)}
    return {"street": street, "park/dogs": {0: {}} | dogs}


def text_rle(mask: Mask) -> dict[str, Any]:
    return {"size": list(mask.shape), "counts": rle.encode(mask).decode()}


def list_rle(mask: Mask) -> dict[str, Any]:
    runs = rle.run_lengths(rle.encode(mask), *mask.shape)
    return {"size": list(mask.shape), "counts": runs.tolist()}


def sequence(video: str) -> str:
    return video.replace("/", "__")


def categories() -> list[dict[str, Any]]:
    return [{"id": number, "name": name} for name, number in CLASSES.items()]


def write_coco(
    folder: Path, videos: Mapping[str, Frames], encode: Callable[[Mask], Any] = text_rle
) -> Path:
    images: list[Json] = []
    annotations: list[Json] = []
    for number, (video, frames) in enumerate(videos.items(), 1):
        for frame_idx, masks in frames.items():
            image: Json = {"id": len(images) + 1, "video_id": number, "frame_id": frame_idx}
            image |= dict(zip(("height", "width"), SIZES[video], strict=True))
            images.append(image | {"file_name": f"{sequence(video)}/{frame_idx:05d}.jpg"})
            for object_id, mask in masks.items():
                annotation: Json = {"id": len(annotations) + 1, "image_id": image["id"]}
                annotation |= {"category_id": CLASSES[LABELS[video, object_id]]}
                annotation |= {"track_id": object_id, "segmentation": encode(mask)}
                annotations.append(annotation)
    listed = [{"id": number, "name": name} for number, name in enumerate(videos, 1)]
    path = folder / "coco.json"
    content = {"annotations": annotations, "images": images, "videos": listed}
    path.write_text(json.dumps(content | {"categories": categories()}))
    return path


def write_ytvis(folder: Path, videos: Mapping[str, Frames]) -> Path:
    listed: list[Json] = []
    annotations: list[Json] = []
    for number, (video, frames) in enumerate(videos.items(), 1):
        names = [f"{sequence(video)}/{frame_idx:05d}.jpg" for frame_idx in frames]
        height, width = SIZES[video]
        listed.append({"id": number, "height": height, "width": width, "file_names": names})
        for object_id in sorted({i for masks in frames.values() for i in masks}):
            masks = [frames[frame_idx].get(object_id) for frame_idx in frames]
            annotation: Json = {
                "id": len(annotations) + 1,
                "video_id": number,
                "object_id": object_id,
            }
            annotation |= {"category_id": CLASSES[LABELS[video, object_id]]}
            annotation |= {"segmentations": [None if m is None else list_rle(m) for m in masks]}
            annotations.append(annotation)
    path = folder / "ytvis.json"
    content = {"videos": listed, "annotations": annotations, "categories": categories()}
    path.write_text(json.dumps(content))
    return path


def write_davis(folder: Path, videos: Mapping[str, Frames]) -> Path:
    for video, frames in videos.items():
        (folder / "davis" / sequence(video)).mkdir(parents=True)
        for frame_idx, masks in frames.items():
            values = np.zeros(SIZES[video], np.uint8)
            for object_id, mask in masks.items():
                values[mask != 0] = object_id
            image = Image.fromarray(values, mode="P")
            image.putpalette([value for colour in range(256) for value in (colour, 255, 0)])
            image.save(folder / "davis" / sequence(video) / f"{frame_idx:05d}.png")
    return folder / "davis"


def write_mots(folder: Path, videos: Mapping[str, Frames]) -> Path:
    for video, frames in videos.items():
        home = folder / "mots" / sequence(video)
        (home / "gt").mkdir(parents=True)
        height, width = SIZES[video]
        (home / "seqinfo.ini").write_text(
            f"[Sequence]\nname={sequence(video)}\nseqLength={max(frames) + 1}\n"
            f"imWidth={width}\nimHeight={height}\n"
        )
        lines = []
        for frame_idx, masks in frames.items():
            for object_id, mask in masks.items():
                number = CLASSES[LABELS[video, object_id]]
                id_ = number * 1000 + object_id
                counts = rle.encode(mask).decode()
                lines.append(f"{frame_idx + 1} {id_} {number} {height} {width} {counts}\n")
        (home / "gt" / "gt.txt").write_text("".join(lines))
    return folder / "mots"


def write_sav(folder: Path, videos: Mapping[str, Frames]) -> Path:
    (folder / "sav").mkdir()
    for video, frames in videos.items():
        height, width = SIZES[video]
        ids = sorted({i for masks in frames.values() for i in masks})
        empty = np.zeros((height, width), np.uint8)
        rows = [[text_rle(masks.get(i, empty)) for i in ids] for masks in frames.values()]
        content = {"video_id": sequence(video), "video_height": height, "video_width": width}
        content |= {"video_frame_count": max(frames) + 1, "masklet": rows, "masklet_id": ids}
        own = {"frame_idx": list(frames), "category": [LABELS[video, i] for i in ids]}
        path = folder / "sav" / f"{sequence(video)}_auto.json"
        path.write_text(json.dumps(content | {"maskmill": own | {"name": video}}))
    return folder / "sav"


WRITERS: dict[str, Callable[[Path, Mapping[str, Frames]], Path]] = {
    "coco": write_coco,
    "ytvis": write_ytvis,
    "davis": write_davis,
    "mots": write_mots,
    "sav": write_sav,
}
WITHOUT_OVERLAPS = ("davis", "mots")
WITHOUT_LABELS = ("davis",)


def maskmill_import(*words: Any) -> int:
    return cli.main(["import", *map(str, words)])


def read_back(path: Path) -> tuple[dict[str, Frames], dict[tuple[str, int], str | None]]:
    """Return the masks and the labels of a prompts file, as `maskmill run` reads it."""
    videos: dict[str, Frames] = {}
    labels = {}
    table = read_prompts(str(path))
    for name in table.names:
        for prompt in table.prompts_for(name):
            assert prompt.mask_rle is not None
            assert prompt.frame_idx is not None
            assert prompt.object_id is not None
            mask = rle.decode(prompt.mask_rle["counts"], *prompt.mask_rle["size"])
            videos.setdefault(name, {}).setdefault(prompt.frame_idx, {})[prompt.object_id] = mask
            labels[name, prompt.object_id] = prompt.label
    return videos, labels


def read_truth(folder: Path | str, options: StoreOptions | None = None) -> dict[str, Frames]:
    truth = open_ground_truth(str(folder), options)
    return {
        name: {
            frame.frame_idx: {i: m.paste(*frame.size) for i, m in frame.masks.items()}
            for frame in truth.frames(found)
        }
        for name, found in truth.sequences.items()
    }


def assert_same(found: Mapping[str, Frames], wanted: Mapping[str, Frames]) -> None:
    assert set(found) == set(wanted)
    for video, frames in wanted.items():
        assert set(found[video]) == set(frames), video
        for frame_idx, masks in frames.items():
            assert set(found[video][frame_idx]) == set(masks), (video, frame_idx)
            for object_id, mask in masks.items():
                np.testing.assert_array_equal(found[video][frame_idx][object_id], mask)


def not_empty(videos: Mapping[str, Frames]) -> dict[str, Frames]:
    return {
        video: {i: masks for i, masks in frames.items() if masks}
        for video, frames in videos.items()
    }


@pytest.mark.parametrize("name", WRITERS)
def test_every_mask_as_prompts_and_as_ground_truth(name: str, tmp_path: Path) -> None:
    wanted = scene(overlaps=name not in WITHOUT_OVERLAPS)
    source = WRITERS[name](tmp_path, wanted)
    words = (source, "--format", name)
    labels = {key: None if name in WITHOUT_LABELS else label for key, label in LABELS.items()}
    for ending in ("jsonl", "parquet"):
        path = tmp_path / f"prompts.{ending}"
        assert maskmill_import(*words, "--prompts", path, "--frames", "all") == 0
        found, told = read_back(path)
        assert_same(found, not_empty(wanted))
        assert told == labels
    assert maskmill_import(*words, "--gt", tmp_path / "gt") == 0
    assert_same(read_truth(tmp_path / "gt"), wanted)


def test_an_object_is_prompted_where_it_is_first_seen(tmp_path: Path) -> None:
    source = write_coco(tmp_path, scene(overlaps=True))
    path = tmp_path / "prompts.jsonl"
    assert maskmill_import(source, "--format", "coco", "--prompts", path) == 0
    found, _ = read_back(path)
    where = {v: {f: sorted(masks) for f, masks in frames.items()} for v, frames in found.items()}
    assert where == {"street": {0: [1, 3]}, "park/dogs": {1: [7]}}


def test_imported_prompts_start_a_run(tmp_path: Path) -> None:
    (tmp_path / "clips" / "park").mkdir(parents=True)
    write_video(tmp_path / "clips" / "street.mp4", num_frames=6, width=60, height=40)
    write_video(tmp_path / "clips" / "park" / "dogs.mkv", num_frames=4, width=32, height=24)
    source = write_ytvis(tmp_path, scene(overlaps=True))
    prompts = tmp_path / "prompts.parquet"
    assert maskmill_import(source, "--format", "ytvis", "--prompts", prompts) == 0
    config = RunConfig.model_validate(
        {
            "corpus": {"paths": (str(tmp_path / "clips"),)},
            "out": {"uri": str(tmp_path / "out")},
            "tracker": {"name": "fake", "options": {"shift_x": 0}},
            "prompts": {"file": str(prompts)},
        }
    )
    summary = driver.run(
        config, reporter=SilentReporter(), pool_factory=lambda _, spec: ThreadPool(spec, 1)
    )
    assert (summary.exit_code, summary.num_committed) == (0, 2)
    objects = read_table(tmp_path / "out", "objects").to_pylist()
    assert sorted(row["object_id"] for row in objects) == [1, 3, 7]
    names = read_table(tmp_path / "out", "categories")["name"].to_pylist()
    assert names == ["car", "pedestrian"]
    masks = read_table(tmp_path / "out", "masks").to_pylist()
    wanted = rle.encode(scene(overlaps=True)["park/dogs"][1][7])
    assert [m["rle_counts"] for m in masks if m["object_id"] == 7] == [wanted] * 3


# -- COCO of labelling tools -----------------------------------------------------------------


def labelled(**more: Any) -> dict[str, Any]:
    """Return a COCO file as a labelling tool writes it: no videos, frames in the file names."""
    names = ("street/frame_000000.PNG", "street/frame_000002.PNG")
    images = [{"id": i, "file_name": n, "height": 40, "width": 60} for i, n in enumerate(names)]
    return {"images": images, "categories": categories(), "annotations": []} | more


def annotation(number: float, segmentation: Any, **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": 0, "category_id": 1, "segmentation": segmentation} | more


def import_labelled(folder: Path, content: Any, *words: Any) -> dict[str, Frames]:
    (folder / "labels.json").write_text(json.dumps(content))
    path = folder / "prompts.jsonl"
    given = (folder / "labels.json", "--format", "coco", "--prompts", path, "--frames", "all")
    assert maskmill_import(*given, *words) == 0
    return read_back(path)[0]


def test_polygons_and_lists_of_counts(tmp_path: Path) -> None:
    polygons = [[5, 5, 20.5, 5, 20.5, 18, 5, 18.0], [30, 30, 50, 30, 40, 38.5]]
    mask = box("street", 2, 3, 4, 5)
    annotations = [
        annotation(1, polygons, attributes={"track_id": 4, "occluded": False}),
        annotation(2, list_rle(mask), attributes={"track_id": 5}, iscrowd=1),
    ]
    found = import_labelled(tmp_path, labelled(annotations=annotations))
    merged = coco.decode(coco.merge(coco.frPyObjects(polygons, 40, 60)))
    assert_same(found, {"street": {0: {4: merged, 5: mask}}})


def test_tracks_that_are_no_object_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks = [box("street", 5 * i, 5 * i, 4, 4) for i in range(6)]
    annotations = [
        annotation(1, text_rle(masks[0]), track_id=0),
        annotation(2, text_rle(masks[1]), track_id=0, image_id=1),
        annotation(3, text_rle(masks[2]), instance_id="b1c"),
        annotation(4, text_rle(masks[3]), track_id=2),
        annotation(5, text_rle(masks[4])),
        annotation(6, text_rle(masks[5]), image_id=1),
    ]
    found = import_labelled(tmp_path, labelled(annotations=annotations))
    first = {2: masks[3], 3: masks[0], 4: masks[2], 5: masks[4]}
    assert_same(found, {"street": {0: first, 2: {3: masks[1], 6: masks[5]}}})
    assert "2 masks have no track_id" in capsys.readouterr().err


def test_numbers_that_went_through_a_table(tmp_path: Path) -> None:
    mask = box("street", 2, 3, 4, 5)
    content = labelled(annotations=[annotation(1.0, text_rle(mask), track_id=3.0, image_id=1.0)])
    content["images"][1]["frame_id"] = 7.0
    assert_same(import_labelled(tmp_path, content), {"street": {7: {3: mask}}})


def test_a_source_that_names_no_video(tmp_path: Path) -> None:
    mask = box("street", 2, 3, 4, 5)
    content = labelled(annotations=[annotation(1, text_rle(mask), track_id=1)])
    content["images"][0]["file_name"] = "frame_000110.PNG"
    content["images"][1]["file_name"] = "frame_000112.PNG"
    words = ("--video", "a/b.mp4", "--first-frame", 100, "--frame-step", 3)
    assert_same(import_labelled(tmp_path, content, *words), {"a/b.mp4": {30: {1: mask}}})


# -- the other formats -----------------------------------------------------------------------


def test_results_of_youtube_vis(tmp_path: Path) -> None:
    wanted = scene(overlaps=True)
    truth = write_ytvis(tmp_path, wanted)
    annotations = json.loads(truth.read_text())["annotations"]
    results = [
        {"video_id": a["video_id"], "category_id": a["category_id"], "score": 0.5}
        | {
            "segmentations": [
                s and text_rle(coco.decode(coco.frPyObjects(s, *s["size"])))
                for s in a["segmentations"]
            ]
        }
        for a in annotations
    ]
    (tmp_path / "results.json").write_text(json.dumps(results))
    path = tmp_path / "prompts.jsonl"
    words = (tmp_path / "results.json", "--format", "ytvis", "--frames", "all", "--prompts", path)
    assert maskmill_import(*words) == 2
    assert maskmill_import(*words, "--videos", truth) == 0
    found, labels = read_back(path)
    # Results have no object ids: objects are numbered in each video, in order.
    renamed = {"street": {1: 1, 3: 2}, "park/dogs": {7: 1}}
    assert_same(
        found,
        {
            video: {f: {renamed[video][i]: m for i, m in ms.items()} for f, ms in frames.items()}
            for video, frames in not_empty(wanted).items()
        },
    )
    assert labels == {(v, renamed[v][i]): label for (v, i), label in LABELS.items()}


def test_videos_without_frames(tmp_path: Path) -> None:
    wanted = scene(overlaps=True)
    ytvis, sav = write_ytvis(tmp_path, wanted), write_sav(tmp_path, wanted)
    content = json.loads(ytvis.read_text())
    content["videos"].append({"id": 9, "height": 40, "width": 60, "length": 0, "file_names": []})
    ytvis.write_text(json.dumps(content))
    content = {"video_id": "none", "video_height": 40.0, "video_width": 60.0, "masklet": []}
    content |= {"masklet_id": [], "maskmill": {"name": "none.mp4", "frame_idx": []}}
    (sav / "none_auto.json").write_text(json.dumps(content))
    for name, source in (("ytvis", ytvis), ("sav", sav)):
        assert (
            maskmill_import(source, "--format", name, "--gt", tmp_path / "gt", "--overwrite") == 0
        )
        assert_same(read_truth(tmp_path / "gt"), wanted)


def test_mots_of_kitti(tmp_path: Path) -> None:
    first, second = box("street", 0, 0, 5, 5), box("street", 10, 10, 5, 5)
    region = box("street", 30, 0, 10, 60)
    rows = [(0, 1001, 1, first), (0, 2001, 2, second), (0, 10000, 10, region), (3, 1001, 1, second)]
    text = "".join(f"{f} {i} {c} 40 60 {rle.encode(m).decode()}\n" for f, i, c, m in rows)
    (tmp_path / "street.txt").write_text(text)
    words = (tmp_path / "street.txt", "--format", "mots", "--first-frame", 0)
    assert maskmill_import(*words, "--gt", tmp_path / "gt") == 0
    # Two objects share the instance 1, so the whole ids are kept, which no picture can hold.
    assert [path.name for path in (tmp_path / "gt").glob("[!.]*")] == ["street.json"]
    wanted = {0: {1001: first, 2001: second}, 1: {}, 2: {}, 3: {1001: second}}
    assert_same(read_truth(tmp_path / "gt"), {"street": wanted})
    truth = open_ground_truth(str(tmp_path / "gt"))
    voids = [frame.void for frame in truth.frames(truth.sequences["street"])]
    assert voids[0] is not None
    np.testing.assert_array_equal(voids[0], region != 0)
    assert voids[1:] == [None] * 3


def test_ignored_regions_are_void(tmp_path: Path) -> None:
    first, region = box("street", 0, 0, 5, 5), box("street", 30, 0, 10, 60)
    halves = [np.where(np.arange(60) < 30, region, 0), np.where(np.arange(60) < 30, 0, region)]
    rows = [(1, 1001, 1, first)] + [(1, 10000, 10, half) for half in halves]
    text = "".join(f"{f} {i} {c} 40 60 {rle.encode(m).decode()}\n" for f, i, c, m in rows)
    (tmp_path / "street.txt").write_text(text)
    words = (tmp_path / "street.txt", "--format", "mots")
    assert maskmill_import(*words, "--gt", tmp_path / "gt") == 0
    truth = open_ground_truth(str(tmp_path / "gt"))
    (frame,) = truth.frames(truth.sequences["street"])
    assert frame.void is not None
    np.testing.assert_array_equal(frame.void, region != 0)
    np.testing.assert_array_equal(frame.masks[1].paste(40, 60), first)


# SA-V itself writes its numbers as floats.
@pytest.mark.parametrize("frame_count", [9, 9.0, 3.0])
def test_sa_v_annotates_every_fourth_frame(tmp_path: Path, frame_count: float) -> None:
    masks = [box("street", i, i, 5, 5) for i in range(3)]
    content = {"video_id": "sav_000", "video_height": 40.0, "video_width": 60.0}
    content |= {"video_frame_count": frame_count, "masklet": [[text_rle(m)] for m in masks]}
    (tmp_path / "sav_000_manual.json").write_text(json.dumps(content))
    assert maskmill_import(tmp_path, "--format", "sav", "--gt", tmp_path / "gt") == 0
    step = 4 if frame_count == 9 else 1
    wanted = {step * i: {1: mask} for i, mask in enumerate(masks)}
    assert_same(read_truth(tmp_path / "gt"), {"sav_000": wanted})


def test_names_of_sequences(tmp_path: Path) -> None:
    source = write_davis(tmp_path, scene(overlaps=False))
    path = tmp_path / "prompts.jsonl"
    words = (source, "--format", "davis", "--prompts", path, "--keep-names")
    assert maskmill_import(*words) == 0
    assert sorted(read_back(path)[0]) == ["park__dogs", "street"]


# -- ground truth ----------------------------------------------------------------------------


def test_pictures_where_they_hold_it(tmp_path: Path) -> None:
    source = write_coco(tmp_path, scene(overlaps=True))
    assert maskmill_import(source, "--format", "coco", "--gt", tmp_path / "gt") == 0
    files = (path for path in (tmp_path / "gt").rglob("[!.]*") if path.is_file())
    found = sorted(str(path.relative_to(tmp_path / "gt")) for path in files)
    pictures = [f"park/dogs/{frame_idx:05d}.png" for frame_idx in range(3)]
    assert found == [*pictures, "street.json"]


def test_void_before_the_first_object_is_not_taken_for_one(tmp_path: Path) -> None:
    first, region = box("street", 0, 0, 5, 5), box("street", 30, 0, 10, 60)
    rows = [(1, 10000, 10, region), (2, 1001, 1, first)]
    text = "".join(f"{f} {i} {c} 40 60 {rle.encode(m).decode()}\n" for f, i, c, m in rows)
    (tmp_path / "street.txt").write_text(text)
    words = (tmp_path / "street.txt", "--format", "mots")
    assert maskmill_import(*words, "--gt", tmp_path / "gt") == 0
    assert_same(read_truth(tmp_path / "gt"), {"street": {0: {}, 1: {1: first}}})


def test_a_name_that_means_something_else_in_a_ground_truth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = scene(overlaps=True)
    videos = {"park/dogs": wanted["park/dogs"], "street": wanted["street"]}
    source = write_coco(tmp_path, videos)
    # Masklets of a video whose folder is full of another one's pictures would not be found.
    text = source.read_text().replace('"street"', '"park/dogs/masks"')
    source.write_text(text)
    words = (source, "--format", "coco", "--gt", tmp_path / "gt")
    assert maskmill_import(*words) == 2
    assert_one_sentence(capsys.readouterr().err, "park/dogs/masks.json, which has another meaning")
    assert not (tmp_path / "gt").exists()
    source.write_text(text.replace('"park/dogs/masks"', '"elsewhere/masks"'))
    assert maskmill_import(*words) == 0
    assert sorted(read_truth(tmp_path / "gt")) == ["elsewhere/masks", "park/dogs"]


def test_void_of_davis_stays(tmp_path: Path) -> None:
    (tmp_path / "davis" / "street").mkdir(parents=True)
    values = box("street", 0, 0, 5, 5) * 255
    values[20:, 20:] = 2
    Image.fromarray(values).save(tmp_path / "davis" / "street" / "00007.png")
    words = (tmp_path / "davis", "--format", "davis", "--first-frame", 7)
    assert maskmill_import(*words, "--gt", tmp_path / "gt") == 0
    made = np.asarray(Image.open(tmp_path / "gt" / "street" / "00000.png"))
    np.testing.assert_array_equal(made, values)


def test_videos_that_differ_in_their_extension_stay_apart(tmp_path: Path) -> None:
    mask = box("street", 2, 3, 4, 5)
    content = labelled(annotations=[annotation(1, text_rle(mask), track_id=1)])
    names = ("a/clip.mp4", "a/clip.mov", "a/clip.v2.mp4", "b.c.mp4", "b.d/e.mp4", "b")
    content["videos"] = [{"id": i, "name": name} for i, name in enumerate(names)]
    image = {"frame_id": 0, "height": 40, "width": 60}
    content["images"] = [image | {"id": i, "video_id": i} for i in range(len(names))]
    (tmp_path / "labels.json").write_text(json.dumps(content))
    words = (tmp_path / "labels.json", "--format", "coco", "--gt", tmp_path / "gt")
    assert maskmill_import(*words) == 0
    wanted = ["a/clip.mov", "a/clip.mp4", "a/clip.v2", "b", "b.c", "b.d/e"]
    assert sorted(read_truth(tmp_path / "gt")) == wanted


# -- faults ----------------------------------------------------------------------------------

GOOD = text_rle(box("street", 2, 3, 4, 5))
FAULTS: dict[str, tuple[Any, str]] = {
    "other size": (
        labelled(annotations=[annotation(9, GOOD | {"size": [60, 40]})]),
        "annotation 9 in .*its mask is 40x60 pixels, but its picture is 60x40",
    ),
    "broken counts": (
        labelled(annotations=[annotation(9, GOOD | {"counts": "77"})]),
        "annotation 9 in .* do not fit a mask of 40x60",
    ),
    "broken list": (
        labelled(annotations=[annotation(9, {"size": [40, 60], "counts": [7, 3]})]),
        "annotation 9 in .* no run lengths of 2400 pixels",
    ),
    "open polygon": (labelled(annotations=[annotation(9, [[1, 2, 3, 4]])]), "three corners"),
    "far polygon": (
        labelled(annotations=[annotation(9, [[1, 2, 900, 4, 5, 6]])]),
        "lies outside of its picture of 60x40",
    ),
    "only a box": (labelled(annotations=[annotation(9, [])]), "has no mask: export polygons"),
    "no image": (labelled(annotations=[annotation(9, GOOD, image_id=77)]), "of the image 77"),
    "no image id": (
        labelled(annotations=[{"id": 9, "segmentation": GOOD}]),
        "annotation 9 in .* has no image_id",
    ),
    "unknown category": (
        labelled(annotations=[annotation(9, GOOD, category_id=5)]),
        r"of the category 5, which is not among .*\(1 car, 2 pedestrian\)",
    ),
    "category twice": (labelled(categories=[{"id": 1, "name": "a"}] * 2), "category 1 .* twice"),
    "image twice": (
        labelled(images=[{"id": 1, "file_name": "v/1.png", "height": 4, "width": 4}] * 2),
        "image 1 in .* is there twice",
    ),
    "object twice": (
        labelled(annotations=[annotation(i, GOOD, track_id=3) for i in (8, 9)]),
        "annotation 9 .*object 3 has a second mask on frame 0 of street",
    ),
    "track twice": (
        labelled(annotations=[annotation(i, GOOD, track_id="x") for i in (8, 9)]),
        "the track x has a second mask on frame 0 of street",
    ),
    "two sizes": (
        labelled(
            images=[
                {"id": i, "file_name": f"v/{i}.png", "height": 4 + i, "width": 4} for i in (0, 1)
            ]
        ),
        "image 1 in .* is 4x5 pixels, but other frames of v are 4x4",
    ),
    "no size": (labelled(images=[{"id": 1, "file_name": "v/1.png"}]), "its height is None"),
    "no frame": (
        labelled(images=[{"id": 1, "file_name": "v/one.png", "height": 4, "width": 4}]),
        "does not end in a frame number",
    ),
    "no video": (
        labelled(images=[{"id": 1, "file_name": "1.png", "height": 4, "width": 4}]),
        "does not say to which video it belongs: pass --video",
    ),
    "unlisted video": (
        labelled(images=[{"id": 1, "video_id": 6, "frame_id": 0, "height": 4, "width": 4}]),
        "of the video 6, which the file does not list",
    ),
    "upward path": (
        labelled(images=[{"id": 1, "file_name": "a/../../b/1.png", "height": 4, "width": 4}]),
        "no path below a corpus",
    ),
    "nothing": (labelled(), "holds no mask"),
    "half a frame": (
        labelled(images=[{"id": 1, "file_name": "v/1.png", "frame_id": 0.5}]),
        "has the frame 0.5, which is no whole number",
    ),
    "a track of lists": (
        labelled(annotations=[annotation(9, GOOD, track_id=[1])]),
        r"has the track \[1\]: give it",
    ),
    "no object": (labelled(annotations=[7]), "entry 0 of annotations in .* no JSON object"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_source(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, sentence = FAULTS[fault]
    (tmp_path / "labels.json").write_text(json.dumps(content))
    words = (tmp_path / "labels.json", "--format", "coco", "--prompts", tmp_path / "p.jsonl")
    assert maskmill_import(*words) == 2
    assert_one_sentence(capsys.readouterr().err, sentence)
    assert [path.name for path in tmp_path.iterdir()] == ["labels.json"]


def assert_one_sentence(told: str, pattern: str) -> None:
    assert told.startswith("error: ")
    assert told.count("\n") == 1, told
    assert re.search(pattern, told), told


SAV_HEAD = '{"video_height": 4, "video_width": 4, '


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("coco", '{"images": [{"id": 1', "is no whole JSON file"),
        ("coco", "\xff\xfe", "is no whole JSON file"),
        ("mots", "1 1001 1 40 60", "line 1 of .* has 5 columns"),
        ("mots", "1 2001 1 40 60 PPP", "does not begin with the class"),
        ("mots", "1 1001 1 40 60 PPP", "no line of MOTS .* not COCO"),
        ("mots", f"1 3001 3 40 60 {GOOD['counts']}", "pass --category NAME=3"),
        ("mots", f"0 1001 1 40 60 {GOOD['counts']}", "pass --first-frame"),
        ("sav", "{}", "is no SA-V annotation"),
        ("sav", SAV_HEAD + '"masklet": []}', "has no masklet"),
        ("sav", SAV_HEAD + '"masklet": [[null]], "masklet_id": [1, 2]}', "1 masks for 2 objects"),
        (
            "ytvis",
            '{"videos": [{"id": 1, "height": 4, "width": 4, "file_names": ["v/0.jpg"]}], '
            '"annotations": [{"id": 5, "video_id": 1, "segmentations": []}]}',
            "has 0 segmentations, but its video has 1 frames",
        ),
        ("ytvis", '{"annotations": [{"id": 5, "video_id": 1}]}', "of the video 1, which is not"),
        ("davis", "nothing", "does not exist or holds nothing"),
        ("sav", SAV_HEAD + '"masklet": [[null]], "frame_step": "x"}', "no whole number from 1 on"),
        ("sav", SAV_HEAD + '"masklet": [[null]], "maskmill": {"category": [1]}}', "list of names"),
        ("coco", '{"categories": [{"id": [1], "name": "dog"}]}', "is there twice or no id"),
    ],
)
def test_faults_of_other_formats(
    name: str, content: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / ("v.txt" if name == "mots" else "v.json")
    source.write_bytes(content.encode("latin-1"))
    words = (source, "--format", name)
    for target in (("--prompts", tmp_path / "p.jsonl"), ("--gt", tmp_path / "gt")):
        assert maskmill_import(*words, *target) == 2
        assert_one_sentence(capsys.readouterr().err, sentence)
        assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_several_videos_cannot_have_one_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_coco(tmp_path, scene(overlaps=True))
    words = (source, "--format", "coco", "--prompts", tmp_path / "p.jsonl", "--video", "one")
    assert maskmill_import(*words) == 2
    assert_one_sentence(capsys.readouterr().err, "'park/dogs', but others of 'street'")


def test_wrong_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_coco(tmp_path, scene(overlaps=True))
    for words, sentence in [
        ((), "--prompts FILE or --gt DIR, one of the two"),
        (("--prompts", "p.jsonl", "--gt", "gt"), "one of the two"),
        (("--prompts", "p.txt"), "must end in .jsonl or .parquet"),
        (("--gt", "gt", "--frames", "all"), "--frames chooses prompts"),
        (("--prompts", "p.jsonl", "--category", "dog=3"), "--category belongs to the format mots"),
        (("--prompts", "p.jsonl", "--category", "dog"), "is not NAME=ID"),
        (("--prompts", "p.jsonl", "--videos", "x.json"), "--videos belongs to results"),
    ]:
        assert maskmill_import(source, "--format", "coco", *words) == 2
        assert_one_sentence(capsys.readouterr().err, sentence)
    missing = (tmp_path / "none.json", "--format", "coco", "--prompts", tmp_path / "p.jsonl")
    assert maskmill_import(*missing) == 2
    assert_one_sentence(capsys.readouterr().err, "does not exist or holds no .json file")


# -- destinations ----------------------------------------------------------------------------


def test_a_destination_that_exists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_coco(tmp_path, scene(overlaps=True))
    prompts, folder, foreign = tmp_path / "p.jsonl", tmp_path / "gt", tmp_path / "foreign"
    prompts.write_text("mine")
    foreign.mkdir()
    (foreign / "mine").write_text("mine")
    words = (source, "--format", "coco")
    assert maskmill_import(*words, "--prompts", prompts) == 2
    assert_one_sentence(capsys.readouterr().err, "exists: .* --overwrite")
    assert prompts.read_text() == "mine"
    assert maskmill_import(*words, "--prompts", prompts, "--overwrite") == 0
    assert len(prompts.read_text().splitlines()) == 3
    folder.mkdir()
    assert maskmill_import(*words, "--gt", folder) == 0, "an empty folder is no obstacle"
    assert maskmill_import(*words, "--gt", folder) == 2
    only = {"park/dogs": scene(overlaps=True)["park/dogs"]}
    write_coco(tmp_path, only)
    assert maskmill_import(*words, "--gt", folder, "--overwrite") == 0
    assert_same(read_truth(folder), only)
    capsys.readouterr()
    assert maskmill_import(*words, "--gt", foreign, "--overwrite") == 2
    assert_one_sentence(capsys.readouterr().err, "holds mine, which no")
    # What is read is not removed to make room for what is written.
    assert maskmill_import(*words, "--gt", source.parent, "--overwrite") == 2
    assert_one_sentence(capsys.readouterr().err, "lies in .*, to be replaced")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "coco.json",
        "foreign",
        "gt",
        "p.jsonl",
    ]


def test_sources_and_results_in_a_bucket(seaweedfs: servers.S3Server, tmp_path: Path) -> None:
    wanted = scene(overlaps=False)
    bucket = seaweedfs.new_bucket()
    store = open_store(bucket, seaweedfs.options)
    flags = ("--endpoint-url", seaweedfs.options.endpoint_url, "--path-style")
    for name in ("sav", "mots", "davis"):
        for path in WRITERS[name](tmp_path, wanted).rglob("*.*"):
            store.put_file(path, str(path.relative_to(tmp_path)))
        words = (f"{bucket}/{name}", "--format", name, *flags)
        prompts = f"{bucket}/{name}.parquet"
        assert maskmill_import(*words, "--prompts", prompts, "--frames", "all") == 0
        (tmp_path / "p.parquet").write_bytes(store.read_bytes(f"{name}.parquet"))
        assert_same(read_back(tmp_path / "p.parquet")[0], not_empty(wanted))
        assert maskmill_import(*words, "--prompts", prompts) == 2, "it exists"
    assert maskmill_import(*words, "--gt", f"{bucket}/gt") == 0
    assert maskmill_import(*words, "--gt", f"{bucket}/gt") == 2, "it exists"
    assert maskmill_import(*words, "--gt", f"{bucket}/gt", "--overwrite") == 0
    assert_same(read_truth(f"{bucket}/gt", seaweedfs.options), wanted)


def test_memory_does_not_grow_with_the_source(tmp_path: Path) -> None:
    num_masks = 2_500
    source = tmp_path / "large.json"
    padding = "x" * 4_000
    with source.open("w") as file:
        file.write('{"categories": [{"id": 1, "name": "car"}], "images": [')
        images = (
            json.dumps({"id": i, "file_name": f"v{i % 7}/{i}.jpg", "height": 40, "width": 60})
            for i in range(num_masks)
        )
        file.write(",".join(images) + '], "annotations": [')
        rows = (
            json.dumps(annotation(i, GOOD, image_id=i, track_id=1, note=padding))
            for i in range(num_masks)
        )
        file.write(",".join(rows) + "]}")
    tracemalloc.start()
    try:
        report = import_prompts(
            ImportSource(str(source), ImportFormat.COCO),
            str(tmp_path / "p.parquet"),
            frames=PromptFrames.ALL,
        )
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert report.num_prompts == num_masks
    assert source.stat().st_size > 10_000_000
    assert peak_bytes < 5_000_000
