"""Contract of `workers.pipeline` and `workers.prompting`.

* Every tracked frame is in `frames` once, in order; `masks` is sorted by frame and object; every
  RLE decodes to the stated size, area and box; parts have the stated rows, bytes and hashes.
* Results do not depend on when a tracker decides a frame.
* A prompt acts from its own frame on; frames before it are there, and empty. A time means the
  frame shown then, at any frame rate.
* What is wrong with a video's prompts is an InputError with a sentence; a video without any prompt
  is one too, unless that is allowed. No detection in a whole video is a result.
* Detections keep identities through the interval modes; a due prompt stays due. With a limit, an
  object that was out of sight for long is tracked no more.
* Faults of tracker, memory, output and source become their own kinds of error; a cancelled attempt
  stops. In every case the spool is empty and no thread is left.
* Heartbeats pass through the phases in order and count steps; frames decoded before the first
  tracked one, and bytes uploaded, are progress too.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests import media
from tests.one_video import (
    BOX,
    DETECTOR,
    Reports,
    ScriptedDetector,
    attempt_of,
    read_rows,
    source_of,
    spec_of,
    track,
    write_frames,
)
from workers import rle
from workers.decode import container
from workers.errors import (
    FailureKind,
    InputError,
    OutageError,
    OutOfMemoryError,
    PreemptedError,
    TaskError,
    TrackerError,
)
from workers.messages import Attempt, Phase, Prompt, PromptMode, Stage

HEIGHT, WIDTH = 64, 96


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return media.write_video(tmp_path / "clip.mp4", num_frames=12)


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Any:
    """Whatever a test does: no thread and no spooled file survives the attempt."""
    yield
    alive = [t.name for t in threading.enumerate() if t.name.startswith("maskmill-")]
    assert not alive
    spool = tmp_path / "spool"
    assert not spool.exists() or not list(spool.iterdir())


def test_every_frame_once_and_every_mask_as_stated(tmp_path: Path, video: Path) -> None:
    spec = spec_of(tmp_path, {"shift_x": 6})
    second = Prompt(object_id=7, frame_idx=0, box_xyxy=(0, 40, 20, 64), category_id=2)
    proposal = track(spec, attempt_of(video, BOX, second))
    rows = read_rows(spec, proposal)

    assert [row["frame_idx"] for row in rows["frames"]] == list(range(12))
    assert [row["pts_us"] for row in rows["frames"]] == [idx * 40_000 for idx in range(12)]
    order = [(row["frame_idx"], row["object_id"]) for row in rows["masks"]]
    assert order == sorted(order)
    assert len(set(order)) == len(order)
    per_frame = {row["frame_idx"]: row["num_objects"] for row in rows["frames"]}
    for idx in range(12):
        assert per_frame[idx] == sum(frame == idx for frame, _ in order)
    for row in rows["masks"]:
        mask = rle.decode(row["rle_counts"], row["rle_h"], row["rle_w"])
        assert mask.shape == (HEIGHT, WIDTH)
        assert row["area"] == mask.sum()
        box = (row["bbox_x"], row["bbox_y"], row["bbox_w"], row["bbox_h"])
        assert box == rle.bbox_xywh(row["rle_counts"], HEIGHT, WIDTH)
        touches = bool(mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())
        assert row["flags"] == (row["frame_idx"] == 0) + 16 * touches
        assert row["category_id"] == (2 if row["object_id"] == 7 else None)
    # Object 1 starts at column 10, 30 wide, and leaves the 96 columns at 6 a step: never quite.
    objects = {row["object_id"]: row for row in rows["objects"]}
    assert objects[1]["first_frame"] == 0
    assert objects[1]["frames_visible"] == 12
    assert objects[7]["category_id"] == 2
    assert 0 < objects[1]["stability"] < 1


def test_the_video_row_and_the_stages(tmp_path: Path, video: Path) -> None:
    spec = spec_of(tmp_path, config_fingerprint="f00d")
    proposal = track(spec, attempt_of(video, BOX, size_bytes=video.stat().st_size))
    row = proposal.video
    facts = {
        "video_key": 77, "uri": str(video), "etag": None, "codec": "h264",
        "size_bytes": video.stat().st_size,
        "width": WIDTH, "height": HEIGHT, "rotation": 0, "fps": 25.0, "vfr": False,
        "frames_decoded": 12, "frames_tracked": 12, "frames_corrupt": 0, "start_frame": 0,
        "end_frame": 12, "stride": 1, "truncated": False, "num_objects": 1, "num_masks": 12,
        "tracker": "fake", "config_fingerprint": "f00d", "weights_sha256": "",
    }  # fmt: skip
    assert {name: row[name] for name in facts} == facts
    assert row["peak_memory_bytes"] > 1 << 20
    assert row["fps_end_to_end"] > 0
    stages = {stats.stage: stats for stats in proposal.stages}
    assert stages[Stage.DECODE].items == stages[Stage.TRACK].items == 12
    assert stages[Stage.RLE].items == stages[Stage.WRITE].items == 12
    assert stages[Stage.UPLOAD].items == sum(part.size_bytes for part in proposal.parts)
    for stats in proposal.stages:
        assert row[f"{stats.stage.value}_s"] == stats.busy_s
        assert 0 <= stats.busy_s <= row["wall_s"]


def test_the_video_row_is_the_table_but_for_what_the_driver_knows(
    tmp_path: Path, video: Path
) -> None:
    from workers.sinks.schema import TABLES

    proposal = track(spec_of(tmp_path), attempt_of(video, BOX))
    drivers = {"name", "status", "attempts", "queue_s", "error_class"}
    assert set(proposal.video) == set(TABLES["videos"].names) - drivers


@pytest.mark.parametrize("late", [1, 5, 30])
def test_a_late_tracker_gives_the_same_rows(tmp_path: Path, video: Path, late: int) -> None:
    prompts = (BOX, Prompt(object_id=2, frame_idx=4, box_xyxy=(50, 20, 70, 50)))
    at_once = spec_of(tmp_path)
    later = spec_of(tmp_path, {"late_frames": late}, out_uri=str(tmp_path / "late"))
    expected = read_rows(at_once, track(at_once, attempt_of(video, *prompts)))
    assert read_rows(later, track(later, attempt_of(video, *prompts))) == expected


def test_many_row_groups(tmp_path: Path) -> None:
    frames = write_frames(tmp_path / "frames", 3, 16, 16)
    boxes = [
        Prompt(object_id=n, frame_idx=0, box_xyxy=(n % 16, n // 16, n % 16 + 1, n // 16 + 1))
        for n in range(1, 256)
    ]
    spec = spec_of(tmp_path, {"shift_x": 0})
    rows = read_rows(spec, track(spec, attempt_of(frames, *boxes)))
    assert len(rows["masks"]) == 3 * 255
    assert len(rows["objects"]) == len(rows["prompts"]) == 255


def test_range_and_stride(tmp_path: Path, video: Path) -> None:
    spec = spec_of(tmp_path)
    prompt = Prompt(object_id=1, frame_idx=2, box_xyxy=(10, 8, 40, 30))
    attempt = attempt_of(video, prompt, start_us=80_000, end_us=400_000, stride=3)
    proposal = track(spec, attempt)
    rows = read_rows(spec, proposal)
    assert [row["frame_idx"] for row in rows["frames"]] == [2, 5, 8]
    assert (proposal.video["start_frame"], proposal.video["end_frame"]) == (2, 9)
    assert proposal.video["stride"] == 3


def test_frames_before_the_first_prompt_are_there_and_empty(tmp_path: Path, video: Path) -> None:
    spec = spec_of(tmp_path)
    prompt = Prompt(object_id=4, frame_idx=5, box_xyxy=(10, 8, 40, 30))
    rows = read_rows(spec, track(spec, attempt_of(video, prompt)))
    assert [row["num_objects"] for row in rows["frames"]] == [0] * 5 + [1] * 7
    assert rows["prompts"][0]["frame_idx"] == 5
    assert rows["prompts"][0]["payload"] == '{"box_xyxy":[10.0,8.0,40.0,30.0]}'


@pytest.mark.parametrize(
    ("time_us", "frame_idx"), [(0, 0), (39_999, 0), (40_000, 1), (500_000, 2), (899_999, 3)]
)
def test_a_time_is_the_frame_shown_then(tmp_path: Path, time_us: int, frame_idx: int) -> None:
    # Frames at 0, 40, 100 and 860 ms: a variable rate. The last one is shown for a while, too.
    video = media.write_video(tmp_path / "vfr.mkv", num_frames=4, pts_ms=[0, 40, 100, 860])
    prompt = Prompt(object_id=1, time_us=time_us, points_xy=((20.0, 20.0),))
    spec = spec_of(tmp_path)
    rows = read_rows(spec, track(spec, attempt_of(video, prompt)))
    assert rows["prompts"][0]["frame_idx"] == frame_idx
    assert rows["masks"][0]["frame_idx"] == frame_idx


def test_masks_as_prompts(tmp_path: Path, video: Path) -> None:
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[5:25, 10:30] = 1
    labels[40:50, 60:90] = 2
    picture = Image.fromarray(labels, mode="P")
    picture.putpalette([0, 0, 0, 255, 0, 0, 255, 0, 0])  # both objects look alike
    picture.save(tmp_path / "labels.png")
    runs = {"size": [HEIGHT, WIDTH], "counts": rle.encode(labels == 1)}
    prompts = (
        Prompt(object_id=1, frame_idx=0, mask_rle=runs),
        Prompt(object_id=2, frame_idx=0, mask_uri=str(tmp_path / "labels.png"), mask_value=2),
        Prompt(object_id=3, frame_idx=0, mask_uri=str(tmp_path / "labels.png")),
    )
    spec = spec_of(tmp_path)
    rows = read_rows(spec, track(spec, attempt_of(video, *prompts)))
    first = {row["object_id"]: row["area"] for row in rows["masks"] if row["frame_idx"] == 0}
    assert first == {1: 400, 2: 300, 3: 700}
    assert [row["kind"] for row in rows["prompts"]] == ["mask"] * 3


@pytest.mark.parametrize("as_frames", [False, True])
def test_a_folder_of_masks(tmp_path: Path, video: Path, as_frames: bool) -> None:
    source = write_frames(tmp_path / "frames", 12) if as_frames else video
    masks = tmp_path / "masks"
    masks.mkdir()
    for idx in range(12):
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[5:25, 10 + idx : 30 + idx] = 255
        name = f"{idx:05d}.png" if as_frames else f"{idx}.png"
        Image.fromarray(mask).save(masks / name)
    attempt = Attempt("a1", 3, 1, source_of(source), prompts_dir=str(masks))
    spec = spec_of(tmp_path)
    rows = read_rows(spec, track(spec, attempt))
    assert [(row["frame_idx"], row["source"]) for row in rows["prompts"]] == [(0, "folder")]
    every = spec_of(tmp_path, prompt_mode=PromptMode.EVERY_N_FRAMES, prompt_interval=4)
    rows = read_rows(every, track(every, attempt))
    assert [row["frame_idx"] for row in rows["prompts"]] == [0, 4, 8]
    flagged = [row["frame_idx"] for row in rows["masks"] if row["flags"] & 1]
    assert flagged == [0, 4, 8]


@pytest.mark.parametrize("start_us", [None, 80_000])
def test_a_dense_folder_with_a_stride(tmp_path: Path, video: Path, start_us: int | None) -> None:
    # Every second frame is tracked and every second tracked one prompted: the mode picks its
    # pictures from a folder that has one for every frame.
    masks = tmp_path / "masks"
    masks.mkdir()
    for idx in range(12):
        Image.fromarray(np.full((HEIGHT, WIDTH), 3, np.uint8)).save(masks / f"{idx}.png")
    source = source_of(video, stride=2, start_us=start_us)
    attempt = Attempt("a1", 3, 1, source, prompts_dir=str(masks))
    spec = spec_of(tmp_path, prompt_mode=PromptMode.EVERY_N_FRAMES, prompt_interval=2)
    rows = read_rows(spec, track(spec, attempt))
    expected = [0, 4, 8] if start_us is None else [2, 6, 10]
    assert [row["frame_idx"] for row in rows["prompts"]] == expected
    assert [row["object_id"] for row in rows["objects"]] == [3]


@pytest.mark.parametrize(
    ("suffix", "num_frames", "source", "expected"),
    [
        # The range ends before the pictures do.
        (".mp4", 12, {"end_us": 240_000}, [0, 4]),
        (".mp4", 12, {"start_us": 80_000, "end_us": 240_000}, [2]),
        # The range is reached by a seek, so that most frames before it are never decoded.
        (".mp4", 300, {"start_us": 10_400_000, "stride": 7}, [260, 288]),
        # Of a folder only the tracked frames are decoded.
        ("", 12, {"start_us": 41_666, "stride": 4}, [1]),
    ],
)
def test_a_dense_folder_and_a_range(
    tmp_path: Path, suffix: str, num_frames: int, source: dict[str, Any], expected: list[int]
) -> None:
    # Pictures before, between and behind the tracked frames are passed over.
    path = tmp_path / f"clip{suffix}"
    video = (
        media.write_video(path, num_frames=num_frames, gop=12)
        if suffix
        else write_frames(path, num_frames)
    )
    masks = tmp_path / "masks"
    masks.mkdir()
    for idx in range(num_frames):
        Image.fromarray(np.full((HEIGHT, WIDTH), 3, np.uint8)).save(masks / f"{idx}.png")
    attempt = Attempt("a1", 3, 1, source_of(video, **source), prompts_dir=str(masks))
    spec = spec_of(tmp_path, prompt_mode=PromptMode.EVERY_N_FRAMES, prompt_interval=4)
    rows = read_rows(spec, track(spec, attempt))
    assert [row["frame_idx"] for row in rows["prompts"]] == expected


@pytest.mark.parametrize(
    ("prompts", "source", "words"),
    [
        ((), {}, "has no prompt"),
        ((Prompt(1, 12, box_xyxy=(1, 1, 9, 9)),), {}, "ends with frame 11"),
        ((Prompt(1, 3, box_xyxy=(1, 1, 9, 9)),), {"stride": 2}, "stride leaves out"),
        ((Prompt(1, 11, box_xyxy=(1, 1, 9, 9)),), {"stride": 2}, "stride leaves out"),
        ((Prompt(1, 0, box_xyxy=(1, 1, 9, 9)),), {"start_us": 80_000}, "range or stride"),
        ((Prompt(1, -1, box_xyxy=(1, 1, 9, 9)),), {}, "counted from 0"),
        ((Prompt(1, time_us=9_000_000, box_xyxy=(1, 1, 9, 9)),), {}, "at 9.000 s, after the last"),
        ((Prompt(1, time_us=0, box_xyxy=(1, 1, 9, 9)),), {"start_us": 80_000}, "before the first"),
        (
            (Prompt(1, 9, box_xyxy=(1, 1, 9, 9)),),
            {"end_us": 200_000},
            "frame 9, which its time range",
        ),
        ((Prompt(1, 0),), {}, "is missing"),
        ((BOX, BOX), {}, "prompted twice on frame 0"),
        ((Prompt(1, 0, box_xyxy=(200, 1, 209, 9)),), {}, "outside the 96x64 picture"),
        ((Prompt(1, 0, box_xyxy=(5, 5, 5, 9)),), {}, "no area"),
        ((Prompt(1, 0, box_xyxy=(float("nan"), 5, 5, 9)),), {}, "finite"),
        ((Prompt(1, 0, points_xy=((96.0, 3.0),)),), {}, "outside"),
        (
            (Prompt(1, 0, mask_rle={"size": [4, 4], "counts": rle.encode(np.eye(4, dtype=int))}),),
            {},
            "4x4 pixels, but the picture is 96x64",
        ),
        ((Prompt(1, 0, mask_rle={"size": [64, 96], "counts": b"123"}),), {}, "is no COCO RLE"),
        # The size is judged before anything is decoded.
        (
            (Prompt(1, 0, mask_rle={"size": [10**6, 10**6], "counts": b"123"}),),
            {},
            "is 1000000x1000000 pixels, but",
        ),
        ((Prompt(1, 0, mask_uri="/nowhere/mask.png"),), {}, "does not exist"),
    ],
)
def test_prompts_that_cannot_be_used(
    tmp_path: Path, video: Path, prompts: tuple[Prompt, ...], source: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        track(spec_of(tmp_path), attempt_of(video, *prompts, **source))
    assert "clip.mp4" in str(caught.value)


def test_a_mask_image_without_the_object(tmp_path: Path, video: Path) -> None:
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save(tmp_path / "empty.png")
    prompt = Prompt(1, 0, mask_uri=str(tmp_path / "empty.png"))
    with pytest.raises(InputError, match="no pixel above 0"):
        track(spec_of(tmp_path), attempt_of(video, prompt))


def test_no_prompt_where_that_is_allowed(tmp_path: Path, video: Path) -> None:
    spec = spec_of(tmp_path, allow_unprompted=True)
    proposal = track(spec, attempt_of(video))
    rows = read_rows(spec, proposal)
    assert [row["num_objects"] for row in rows["frames"]] == [0] * 12
    assert [part.table for part in proposal.parts] == ["frames"]
    assert proposal.video["num_objects"] == 0


def test_given_prompts_in_an_interval_mode(tmp_path: Path, video: Path) -> None:
    spec = spec_of(tmp_path, prompt_mode=PromptMode.EVERY_N_FRAMES, prompt_interval=5)
    prompts = [Prompt(1, idx, box_xyxy=(10, 8, 40, 30)) for idx in (0, 2, 5, 7, 10)]
    rows = read_rows(spec, track(spec, attempt_of(video, *prompts)))
    assert [row["frame_idx"] for row in rows["prompts"]] == [0, 5, 10]
    with pytest.raises(InputError, match="none on a frame that every_n_frames takes"):
        track(spec, attempt_of(video, prompts[1]))


def detected(path: Path) -> Attempt:
    return Attempt("a1", 3, 1, source_of(path))


def test_a_detector_is_asked_until_it_finds_something(tmp_path: Path, video: Path) -> None:
    detector = ScriptedDetector({3: [(10, 8, 40, 30), (60, 8, 90, 30)], 5: [(0, 0, 9, 9)]})
    spec = spec_of(tmp_path, {"shift_x": 0}, detector=DETECTOR)
    rows = read_rows(spec, track(spec, detected(video), detector))
    assert detector.asked == [0, 1, 2, 3]
    assert [row["num_objects"] for row in rows["frames"]] == [0] * 3 + [2] * 9
    assert [row["object_id"] for row in rows["objects"]] == [1, 2]
    assert rows["prompts"][0]["source"] == "detector:scripted"
    assert (rows["prompts"][0]["category_id"], rows["prompts"][0]["score"]) == (5, 0.75)


def test_identities_survive_new_prompts(tmp_path: Path, video: Path) -> None:
    near, moved, other = (10, 8, 40, 30), (12, 9, 42, 31), (60, 34, 90, 60)
    detector = ScriptedDetector({0: [near], 4: [], 5: [other, moved], 8: [moved, other]})
    spec = spec_of(
        tmp_path,
        {"shift_x": 0},
        detector=DETECTOR,
        prompt_mode=PromptMode.EVERY_N_FRAMES,
        prompt_interval=4,
    )
    rows = read_rows(spec, track(spec, detected(video), detector))
    # Due on 0, 4 and 8; frame 4 finds nothing, so it stays due, and frame 8 is due all the same.
    assert detector.asked == [0, 4, 5, 8]
    given = [(row["frame_idx"], row["object_id"]) for row in rows["prompts"]]
    assert given == [(0, 1), (5, 1), (5, 2), (8, 1), (8, 2)]
    assert len(rows["objects"]) == 2


def test_what_is_out_of_sight_for_long_is_tracked_no_more(tmp_path: Path, video: Path) -> None:
    detector = ScriptedDetector({0: [(10, 8, 40, 30)], 9: [(10, 8, 40, 30)]})
    spec = spec_of(
        tmp_path,
        {"shift_x": 20},
        detector=replace(DETECTOR, forget_after=2),
        prompt_mode=PromptMode.EVERY_N_FRAMES,
        prompt_interval=9,
    )
    rows = read_rows(spec, track(spec, detected(video), detector))
    # Columns 10 to 40 of 96, 20 a step: gone from frame 5 on, and given up on frame 7.
    occluded = [list(row["occluded_ids"]) for row in rows["frames"]]
    assert occluded == [[]] * 5 + [[1]] * 2 + [[]] * 5
    assert [row["object_id"] for row in rows["masks"]] == [1] * 5 + [2] * 3
    assert [row["object_id"] for row in rows["objects"]] == [1, 2]


def test_no_detection_in_a_whole_video_is_a_result(tmp_path: Path, video: Path) -> None:
    spec = spec_of(tmp_path, detector=DETECTOR)
    detector = ScriptedDetector({})
    proposal = track(spec, detected(video), detector)
    assert detector.asked == list(range(12))
    assert proposal.video["num_objects"] == proposal.video["num_masks"] == 0
    assert [row["num_objects"] for row in read_rows(spec, proposal)["frames"]] == [0] * 12


def test_objects_that_leave_are_occluded(tmp_path: Path, video: Path) -> None:
    spec = spec_of(tmp_path, {"shift_x": 20})
    rows = read_rows(spec, track(spec, attempt_of(video, BOX)))
    # Columns 10 to 40 of 96, 20 a step: gone from frame 5 on.
    assert [row["occluded_ids"] for row in rows["frames"]] == [[]] * 5 + [[1]] * 7
    assert rows["objects"][0]["last_frame"] == 4
    assert rows["objects"][0]["frames_visible"] == 5


def test_masks_below_the_threshold_are_not_written(tmp_path: Path, video: Path) -> None:
    # The fake tracker's confidence falls with the share of the shape that is inside.
    spec = spec_of(tmp_path, {"shift_x": 20}, threshold=0.9)
    rows = read_rows(spec, track(spec, attempt_of(video, BOX)))
    assert [row["frame_idx"] for row in rows["masks"]] == [0, 1, 2, 3]
    assert [row["occluded_ids"] for row in rows["frames"]][3:6] == [[], [], [1]]
    assert [row["num_objects"] for row in rows["frames"]][3:6] == [1, 0, 0]
    assert rows["objects"][0]["frames_visible"] == 4


def test_a_truncated_tail_is_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    video = media.write_video(tmp_path / "cut.mkv", num_frames=60, gop=12)
    media.truncate(video, 0.6)
    spec = spec_of(tmp_path)
    proposal = track(spec, attempt_of(video, BOX))
    assert proposal.video["truncated"] is True
    assert 5 < proposal.video["frames_tracked"] < 60
    assert len(read_rows(spec, proposal)["frames"]) == proposal.video["frames_tracked"]
    assert "the file ends" in caplog.text


def test_a_size_that_changes_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = media.write_video(tmp_path / "one.ts", num_frames=5)
    two = media.write_video(tmp_path / "two.ts", num_frames=5, width=192, height=128, first_idx=5)
    video = tmp_path / "clip.ts"
    video.write_bytes(one.read_bytes() + two.read_bytes())
    track(spec_of(tmp_path), attempt_of(video, BOX))
    assert "5 frames were scaled to the first one's size" in caplog.text


@pytest.mark.parametrize("step", [0, 5, 11])
def test_an_exception_of_the_tracker(tmp_path: Path, video: Path, step: int) -> None:
    with pytest.raises(TrackerError, match=f"clip.mp4: tracker fake .* step {step}") as caught:
        track(spec_of(tmp_path, {"fail_on_step": step}), attempt_of(video, BOX))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_memory_that_runs_out(tmp_path: Path, video: Path) -> None:
    with pytest.raises(OutOfMemoryError, match="memory ran out"):
        track(spec_of(tmp_path, {"oom_on_step": 4}), attempt_of(video, BOX))


def test_a_missing_and_a_broken_source(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.mp4"):
        track(spec_of(tmp_path), attempt_of(tmp_path / "gone.mp4", BOX))
    noise = media.write_undecodable(tmp_path / "noise.mp4")
    with pytest.raises(InputError, match=r"noise\.mp4"):
        track(spec_of(tmp_path), attempt_of(noise, BOX))


def test_an_output_that_cannot_be_written_is_an_outage(tmp_path: Path, video: Path) -> None:
    (tmp_path / "out").write_text("a file where the output should be")
    with pytest.raises(OutageError) as caught:
        track(spec_of(tmp_path), attempt_of(video, BOX))
    assert caught.value.kind is FailureKind.OUTAGE


def test_a_missing_spool_directory_is_no_bare_traceback(tmp_path: Path, video: Path) -> None:
    spec = spec_of(tmp_path)
    (tmp_path / "spool").rmdir()
    (tmp_path / "spool").write_text("a file where the spool should be")
    with pytest.raises(TaskError, match="spool"):
        track(spec, attempt_of(video, BOX))
    (tmp_path / "spool").unlink()


def test_a_cancelled_attempt_stops(tmp_path: Path, video: Path) -> None:
    cancelled = threading.Event()

    def report(phase: Phase, num_steps: int, num_masks: int = 0, num_bytes: int = 0) -> None:
        if num_steps == 3 and phase is Phase.TRACKING:
            cancelled.set()

    with pytest.raises(PreemptedError):
        track(spec_of(tmp_path), attempt_of(video, BOX), report=report, cancelled=cancelled)


def test_heartbeats(tmp_path: Path, video: Path) -> None:
    reports = Reports()
    spec = spec_of(tmp_path, {"late_frames": 4})
    proposal = track(spec, attempt_of(video, BOX), report=reports)
    phases = [Phase.DOWNLOADING, Phase.WAITING, Phase.TRACKING, Phase.FINISHING]
    assert reports.phases() == phases
    steps = [num_steps for phase, num_steps, *_ in reports.seen if phase is Phase.TRACKING]
    assert steps == sorted(steps)
    # Steps are counted, not emitted frames: the first four steps emit nothing.
    assert set(range(13)) == set(steps)
    # The upload is told in bytes.
    num_bytes = sum(part.size_bytes for part in proposal.parts)
    assert reports.seen[-1] == (Phase.FINISHING, 12, 12, num_bytes)
    assert (Phase.FINISHING, 12, 12, 0) in reports.seen


def test_frames_before_the_range_are_progress(
    tmp_path: Path, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a decoder that does not get beyond frame 6, of a range that begins with frame 8, before
    # somebody has heard of the frames it decoded,
    heard = threading.Event()
    time_us = container._Clock.time_us

    def waits(self: Any, frame: Any, frame_idx: int) -> int:
        if frame_idx == 6:
            heard.wait(20)
        return time_us(self, frame, frame_idx)

    def report(phase: Phase, num_steps: int, num_masks: int = 0, num_bytes: int = 0) -> None:
        if phase is Phase.DOWNLOADING and num_steps == 7:
            heard.set()

    monkeypatch.setattr(container._Clock, "time_us", waits)
    # when the attempt waits for its first frame,
    prompt = Prompt(object_id=1, frame_idx=8, box_xyxy=(10, 8, 40, 30))
    proposal = track(spec_of(tmp_path), attempt_of(video, prompt, start_us=320_000), report=report)
    # then it told how many were decoded meanwhile.
    assert heard.is_set()
    assert proposal.video["frames_tracked"] == 4


def test_a_cancelled_upload_stops(tmp_path: Path, video: Path) -> None:
    cancelled = threading.Event()

    def report(phase: Phase, num_steps: int, num_masks: int = 0, num_bytes: int = 0) -> None:
        if phase is Phase.FINISHING and num_bytes:
            cancelled.set()

    with pytest.raises(PreemptedError):
        track(spec_of(tmp_path), attempt_of(video, BOX), report=report, cancelled=cancelled)


def test_the_small_profile_gives_the_same_rows(tmp_path: Path, video: Path) -> None:
    spec = spec_of(tmp_path)
    expected = read_rows(spec, track(spec, attempt_of(video, BOX)))
    small = attempt_of(video, BOX, attempt_id="a2", small=True)
    assert read_rows(spec, track(spec, small)) == expected


def test_the_gate_is_entered_once_with_frames_ready(tmp_path: Path, video: Path) -> None:
    seen: list[str] = []
    reports = Reports()

    class Gate:
        def __enter__(self) -> None:
            seen.append(reports.seen[-1][0].value)

        def __exit__(self, *failure: object) -> None:
            seen.append(reports.seen[-1][0].value)

    track(spec_of(tmp_path), attempt_of(video, BOX), report=reports, gate=Gate())
    assert seen == ["waiting", "finishing"]
