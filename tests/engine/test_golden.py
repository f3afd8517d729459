"""Each tracker gives its original's outputs, with the same weights and settings.

* Every discrete decision is the original's: candidates, filter, memories attended to, pathways.
* The low-resolution logits of the first 6 frames are within 1e-2 where both are above -1000, those
  of SAM 2 with the engine's savings and without.
* Masks at the size of the video: mean IoU >= 0.98 over the frames, >= 0.90 on every frame whose
  mask has at least 200 pixels. Predicted IoUs are within 5e-2.
* The comparison would notice: without memory selection, with one pathway, or without key scaling
  it fails.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.engine import reference
from tests.engine.reference import Run, Seen
from workers.engine.policies.base import Track
from workers.engine.policies.motion import BoxMotion
from workers.engine.policies.sam2long import Sam2LongTrack
from workers.engine.policies.samurai import SamuraiTrack

WIDTH = 960
BOX = [0, 0, 200, 300]


def golden(name: str) -> dict[str, NDArray[Any]]:
    with np.load(reference.folder() / f"{name}_512.npz") as arrays:
        return dict(arrays)


def unpacked(masks: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return np.unpackbits(masks, axis=-1)[..., :WIDTH].astype(bool)


def frame_ious(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> NDArray[np.float64]:
    union = (a | b).sum((1, 2))
    return np.where(union, (a & b).sum((1, 2)) / np.maximum(union, 1), 1.0)


def assert_same_masks(got: NDArray[np.bool_], expected: NDArray[np.bool_]) -> None:
    ious = frame_ious(got, expected)
    assert ious.mean() >= 0.98
    assert ious[expected.sum((1, 2)) >= 200].min() >= 0.90


def assert_same_logits(ours: list[NDArray[np.float32]], expected: NDArray[np.float32]) -> None:
    for got, wanted in zip(ours[:6], expected[:6], strict=True):
        both = (got > -1000) & (wanted > -1000)
        assert np.array_equal(got > -1000, wanted > -1000)
        assert np.abs(got - wanted)[both].max(initial=0) <= 1e-2


def assert_same_scores(log: list[Seen], ious: NDArray[Any], object_logits: NDArray[Any]) -> None:
    """Compare predicted IoUs, and on which side of the threshold the object score lies."""
    for seen, wanted, wanted_logit in zip(log, ious, object_logits, strict=True):
        known = ~np.isnan(wanted)
        offer = seen.offers[0]
        assert np.abs(offer.ious - wanted[known]).max() <= 5e-2
        if abs(wanted_logit) > 1e-3:
            assert (offer.object_logit > 0) == (wanted_logit > 0)


def memory_steps(seen: Seen, recall: int = 0) -> list[int]:
    return [entry.step for entry, _ in seen.recalls[recall].memories] if seen.recalls else []


def num_pointer_tokens(seen: Seen, recall: int = 0) -> int:
    return 4 * len(seen.recalls[recall].pointers) if seen.recalls else 0


def listed(frames: NDArray[np.int64]) -> list[int]:
    return [int(frame) for frame in frames if frame >= 0]


# -- SAM 2 and the camera predictor ----------------------------------------------------------


@functools.cache
def two_boxes(name: str) -> tuple[dict[str, NDArray[Any]], Run]:
    if name == "upstream_2obj":
        expected, made = golden(name), reference.loader("sam2")
    else:
        expected, made = golden(name), reference.loader("sam2-rt", compat="original")
    prompts = {
        int(object_id): {"box_xyxy": box}
        for object_id, box in zip(expected["obj_ids"], expected["boxes"], strict=True)
    }
    return expected, reference.track(made, prompts, 16)


@pytest.mark.parametrize("name", ["upstream_2obj", "camera_2box"])
def test_two_objects_are_tracked_as_by_the_original(name: str) -> None:
    expected, run = two_boxes(name)
    for k, object_id in enumerate(expected["obj_ids"]):
        log = run.logs[int(object_id)]
        assert_same_scores(log, expected["ious"][:, k], expected["object_score_logits"][:, k])
        assert_same_logits(run.logits(int(object_id)), expected["low_res_logits"][:, k])
        assert_same_masks(run.masks(int(object_id)), unpacked(expected["video_masks"][:, k]))


def test_without_savings_the_logits_are_those_of_the_original() -> None:
    expected = golden("upstream_2obj")
    made = reference.loader("sam2", compat="original")
    object_id = int(expected["obj_ids"][0])
    prompts = {object_id: {"box_xyxy": expected["boxes"][0]}}
    run = reference.track(made, prompts, 6, length=16)
    assert_same_logits(run.logits(object_id), expected["low_res_logits"][:6, 0])


def test_the_camera_remembers_as_much_as_the_original() -> None:
    expected, run = two_boxes("camera_2box")
    for seen, frames, tokens in zip(
        run.logs[1], expected["memory_frames"], expected["n_ptr_tokens"], strict=True
    ):
        # The reference lists what the bank holds; six tracked frames of it are attended to.
        held = listed(frames)
        assert memory_steps(seen) == held[:1] + held[1:][-6:]
        assert num_pointer_tokens(seen) == tokens


def test_the_pointers_are_those_of_the_original() -> None:
    expected, run = two_boxes("upstream_2obj")
    pointers: dict[int, NDArray[np.float32]] = {}
    for seen in run.logs[1]:
        for recall in seen.recalls:
            pointers |= {entry.step: entry.pointer.numpy() for entry, _ in recall.pointers}
    for step in range(6):
        np.testing.assert_allclose(pointers[step], expected["obj_ptr"][step, 0], atol=1e-2)


# -- SAMURAI ---------------------------------------------------------------------------------


class Filter:
    """What the motion filter of a track is asked, since it was last looked at."""

    def __init__(self, patched: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.overlaps: list[float] = []
        for name, shown in (("__init__", "initiate"), ("predict", "predict"), ("update", "update")):
            self._watch(patched, name, shown)
        overlap = SamuraiTrack._overlap

        def seen_overlap(track: SamuraiTrack, box: NDArray[np.float64]) -> float:
            self.overlaps.append(overlap(track, box))
            return self.overlaps[-1]

        patched.setattr(SamuraiTrack, "_overlap", seen_overlap)

    def _watch(self, patched: pytest.MonkeyPatch, name: str, shown: str) -> None:
        method = getattr(BoxMotion, name)

        def seen(*arguments: Any) -> Any:
            self.calls.append(shown)
            return method(*arguments)

        patched.setattr(BoxMotion, name, seen)

    def facts(self, track: Track) -> dict[str, Any]:
        """Return what a track knows, and what its filter did for it on this frame."""
        assert isinstance(track, SamuraiTrack)
        found = {
            "stable": track.num_stable,
            "mean": None if track.motion is None else track.motion.mean.copy(),
            "motion_iou": track.motion_iou,
            "branch": "+".join(self.calls) or "none",
            "overlaps": self.overlaps,
        }
        self.calls, self.overlaps = [], []
        return found


@functools.cache
def samurai(**options: Any) -> tuple[dict[str, NDArray[Any]], Run]:
    expected = golden("samurai_default")
    settings = json.loads(str(expected["config"]))
    for name in ("max_obj_ptrs_in_encoder", "num_maskmem"):
        settings.pop(name)
    made = reference.loader("samurai", compat="original", **(settings | options))
    with pytest.MonkeyPatch.context() as patched:
        facts = Filter(patched).facts
        return expected, reference.track(made, {1: {"box_xyxy": BOX}}, 24, facts=facts)


def test_samurai_decides_as_the_original() -> None:
    expected, run = samurai()
    num_stable = 0
    for t, seen in enumerate(run.logs[1]):
        assert memory_steps(seen) == listed(expected["memory_frames"][t])
        assert num_pointer_tokens(seen) == expected["n_ptr_tokens"][t]
        assert num_stable == expected["stable_before"][t]
        num_stable = seen.facts["stable"]
        assert num_stable == expected["stable_after"][t]
        assert seen.facts_before.get("branch", "none") == expected["branch"][t]
        if t:
            assert seen.choices[0].candidate == expected["best_candidate"][t]
            assert seen.offers[0].best == expected["argmax_iou"][t]
            # The boxes jump by hundreds of pixels, so a flipped pixel may move the filter a bit.
            np.testing.assert_allclose(
                seen.facts["mean"], expected["kf_mean"][t], rtol=0.05, atol=5
            )
        overlaps = seen.facts_before.get("overlaps") or [np.nan] * 3
        np.testing.assert_allclose(overlaps, expected["kf_ious"][t], atol=5e-2)
        wanted = expected["kf_score"][t]
        assert (seen.facts["motion_iou"] is None) == bool(np.isnan(wanted))
        if not np.isnan(wanted):
            assert seen.facts["motion_iou"] == pytest.approx(wanted, abs=5e-2)


def test_samurai_gives_the_masks_of_the_original() -> None:
    expected, run = samurai()
    assert_same_scores(run.logs[1], expected["ious"], expected["object_score_logits"])
    assert_same_logits(run.logits(1), expected["low_res_logits"])
    assert_same_masks(run.masks(1), unpacked(expected["video_masks"]))


def test_without_memory_selection_samurai_is_another() -> None:
    expected, run = samurai(memory_selection=False)
    with pytest.raises(AssertionError):
        assert_same_masks(run.masks(1), unpacked(expected["video_masks"]))


# -- SAM2Long --------------------------------------------------------------------------------


def long_facts(track: Track) -> dict[str, Any]:
    assert isinstance(track, Sam2LongTrack)
    return {
        "scores": [pathway.score for pathway in track.pathways],
        "slots": [id(pathway) for pathway in track.pathways],
        "held": list(track.pathways),  # so that no id is given twice
        "taken": [
            ([slot for slot, one in enumerate(track.pathways) if one is parent], iou)
            for parent, _, iou, _ in track._taken
        ],
    }


@functools.cache
def sam2long(**options: Any) -> tuple[dict[str, NDArray[Any]], Run]:
    expected = golden("sam2long_1obj")
    settings = json.loads(str(expected["config"]))
    made = reference.loader("sam2long", compat="original", **(settings | options))
    return expected, reference.track(made, {1: {"box_xyxy": BOX}}, 13, facts=long_facts)


def slot_recalls(run: Run, t: int) -> list[int]:
    """Return for each slot on frame `t` the index of the recall that was computed for it."""
    slots = run.logs[1][t - 1].facts["held"]
    order: list[int] = []
    for pathway in slots:
        if id(pathway.memory) not in order:
            order.append(id(pathway.memory))
    return [order.index(id(pathway.memory)) for pathway in slots]


def selected(run: Run, t: int) -> list[tuple[list[int], int]]:
    """Return for each slot on frame `t` the slots of its parent before, and its candidate."""
    recalls, seen = slot_recalls(run, t), run.logs[1][t]
    return [
        (parents, seen.offers[recalls[parents[0]]].ious.tolist().index(iou))
        for parents, iou in seen.facts_before["taken"]
    ]


def test_sam2long_selects_as_the_original() -> None:
    expected, run = sam2long()
    settings = json.loads(str(expected["config"]))
    for row, t in enumerate(expected["o1_frames"]):
        scores = [offer.object_logit for offer in run.logs[1][t].offers]
        is_certain = max(map(abs, scores)) > settings["uncertainty"]
        assert is_certain == expected["o1_certain"][row]
        ious = expected["o1_cand_ious"][row]
        got = selected(run, t)
        assert len(got) == len(expected["o1_selected"][row])
        for (parents, candidate), (parent, wanted) in zip(
            got, expected["o1_selected"][row], strict=True
        ):
            assert candidate == wanted
            # The number of a parent is arbitrary among those that offer the same.
            assert any(np.array_equal(ious[ours], ious[parent]) for ours in parents)


def test_sam2long_takes_the_path_of_the_original() -> None:
    expected, run = sam2long()
    slot, logits = 0, []
    for frame, wanted_slot, parent, wanted in expected["o1_final_path"][::-1]:
        ious = expected["o1_cand_ious"][list(expected["o1_frames"]).index(frame)]
        parents, candidate = selected(run, frame)[slot]
        assert candidate == wanted
        assert slot == wanted_slot
        assert any(np.array_equal(ious[ours], ious[parent]) for ours in parents)
        offer = run.logs[1][frame].offers[slot_recalls(run, frame)[parents[0]]]
        logits.append(offer.logits[candidate].numpy())
        slot = parent if parent in parents else parents[0]
    ours = run.logits(1)[:2] + logits[::-1]
    wanted_logits = expected["o1_low_res_logits"]
    assert len(ours) == len(wanted_logits)
    assert_same_logits(ours, wanted_logits)


def test_sam2long_decides_as_the_original() -> None:
    expected, run = sam2long()
    for row, t in enumerate(expected["o1_frames"]):
        seen = run.logs[1][t]
        for slot, recall in enumerate(slot_recalls(run, t)):
            assert memory_steps(seen, recall) == listed(expected["o1_memory_frames"][row, slot])
            assert num_pointer_tokens(seen, recall) == expected["o1_n_ptr_tokens"][row, slot]
            offer = seen.offers[recall]
            assert np.abs(offer.ious - expected["o1_cand_ious"][row, slot]).max() <= 5e-2
            assert offer.object_logit == pytest.approx(expected["o1_cand_obj"][row, slot], abs=0.2)
        np.testing.assert_allclose(
            seen.facts["scores"], expected["o1_acc_score"][row], atol=5e-2, rtol=1e-2
        )


def test_sam2long_gives_the_masks_of_the_original() -> None:
    expected, run = sam2long()
    path = run.results
    assert [frame.frame_idx for frame in path] == list(range(13))
    assert_same_masks(run.masks(1), unpacked(expected["o1_video_masks"]))


@pytest.mark.parametrize("options", [{"num_pathway": 1}, {"key_scaling": False}])
def test_without_its_features_sam2long_is_another(options: dict[str, Any]) -> None:
    expected, run = sam2long(**options)
    with pytest.raises(AssertionError):
        assert_same_masks(run.masks(1), unpacked(expected["o1_video_masks"]))
