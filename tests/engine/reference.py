"""The originals' outputs, and our trackers run on the same weights and frames.

The weights are structured random numbers that a recipe next to the outputs makes; they are written
to the temporary folder once and found there again, also by other processes.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.media import shared_dir
from workers.engine.bank import Candidates, Recall
from workers.engine.policies.base import Choice, Track
from workers.trackers.base import TrackingConfig, TrackingFrame
from workers.trackers.registry import create_tracking_loader
from workers.trackers.sam2 import EngineLoader, EngineSession

IMAGE_SIZE = 512
SMALL_OBJECT_BIAS, SMALL_MASK_BIAS = -1.8, 3.0


def folder() -> Path:
    """Return where the reference outputs are; absent ones skip at home and fail in CI."""
    path = shared_dir() / "golden"
    if not (path / "recipe.py").is_file():
        if os.environ.get("CI"):
            pytest.fail("the reference outputs are missing")
        pytest.skip("no reference outputs here")
    if not os.environ.get("CI"):
        pytest.importorskip("sam2")
    return path


@functools.cache
def checkpoint() -> Path:
    """Return the reference weights, written now if they are not there yet."""
    where = folder()
    name = f"maskmill-reference-{os.getuid()}-{(where / 'recipe.py').stat().st_mtime_ns}.pt"
    path = Path(tempfile.gettempdir()) / name
    if path.is_file():
        return path
    import torch

    from workers.engine.model import CheckpointInfo, build_network

    sys.path.insert(0, str(where))
    keep, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        recipe = importlib.import_module("recipe")
    finally:
        sys.path.remove(str(where))
        sys.dont_write_bytecode = keep
    constants = json.loads((where / f"constants_{IMAGE_SIZE}.json").read_text())
    template = build_network(CheckpointInfo("tiny", "2.1", True), IMAGE_SIZE).state_dict()
    state = recipe.golden_state_dict(template, constants, seed=constants.get("seed", 0))
    partial = path.with_suffix(f".{os.getpid()}")
    torch.save({"model": state}, partial)
    partial.replace(path)
    return path


def changed_checkpoint(name: str, object_bias: float, mask_bias: float) -> Path:
    """Return the reference weights with other biases of object scores and mask logits.

    The recipe's own fit pictures of 512 pixels: on smaller ones nearly all masks are empty.
    """
    import torch

    path = checkpoint().with_suffix(f".{name}.pt")
    if not path.is_file():
        state = torch.load(checkpoint(), weights_only=True)["model"]
        state["sam_mask_decoder.pred_obj_score_head.layers.2.bias"] += object_bias
        for i in range(4):
            # The last channel of what the masks are made from is constant.
            head = f"sam_mask_decoder.output_hypernetworks_mlps.{i}.layers.2.bias"
            state[head][31] += mask_bias
        partial = path.with_suffix(f".{os.getpid()}")
        torch.save({"model": state}, partial)
        partial.replace(path)
    return path


def seeing_checkpoint() -> Path:
    """Return weights that see every object on every frame."""
    return changed_checkpoint("seeing", 40, 11)


def small_checkpoint() -> Path:
    """Return weights for small pictures, on which objects come and go."""
    return changed_checkpoint("small", SMALL_OBJECT_BIAS, SMALL_MASK_BIAS)


@functools.cache
def small_loader(name: str, **options: Any) -> EngineLoader:
    """Return a loaded tracker of small pictures, whose objects come and go."""
    config = TrackingConfig(
        name,
        device="cpu",
        checkpoint_path=str(small_checkpoint()),
        image_size=128,
        options=options,
    )
    made = create_tracking_loader(name, config)
    made.load()
    assert isinstance(made, EngineLoader)
    return made


@functools.cache
def frames() -> tuple[NDArray[np.uint8], ...]:
    """Return the 24 frames, RGB."""
    names = sorted((folder() / "frames").glob("*.jpg"))
    return tuple(np.asarray(Image.open(name).convert("RGB")) for name in names)


@functools.cache
def loader(name: str, **options: Any) -> EngineLoader:
    """Return a loaded tracker on the reference weights."""
    config = TrackingConfig(
        name,
        device="cpu",
        checkpoint_path=str(checkpoint()),
        image_size=IMAGE_SIZE,
        options=options,
    )
    made = create_tracking_loader(name, config)
    made.load()
    assert isinstance(made, EngineLoader)
    return made


@dataclass
class Seen:
    """What a track did on one frame.

    Attributes
    ----------
    recalls, offers, choices : list
        What it attended to, was offered, and took; no recalls on a prompted frame.
    facts, facts_before : dict
        Further facts of its policy: when the frame is done, and when its choice is made.
    """

    recalls: list[Recall] = field(default_factory=list)
    offers: list[Candidates] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    facts_before: dict[str, Any] = field(default_factory=dict)


def observed(track: Track, log: list[Seen], facts: Callable[[Track], Mapping[str, Any]]) -> None:
    """Write down what a track is asked and what it answers from now on."""
    recalls, choose, keep = track.recalls, track.choose, track.keep
    prompted = track.choose_prompted

    def seen_recalls(step: int) -> list[Recall]:
        log.append(Seen(recalls=recalls(step)))
        return log[-1].recalls

    def seen_choose(step: int, offers: Any) -> list[Choice]:
        log[-1].offers = list(offers)
        log[-1].choices = choose(step, offers)
        log[-1].facts_before = dict(facts(track))
        return log[-1].choices

    def seen_keep(step: int, entries: Any, sightings: Any) -> Any:
        result = keep(step, entries, sightings)
        log[-1].facts = dict(facts(track))
        return result

    def seen_prompted(offer: Candidates) -> int:
        taken = prompted(offer)
        log.append(Seen(offers=[offer], choices=[Choice(0, taken)], facts=dict(facts(track))))
        return taken

    changes = {"recalls": seen_recalls, "choose": seen_choose, "keep": seen_keep}
    for name, replacement in (changes | {"choose_prompted": seen_prompted}).items():
        setattr(track, name, replacement)


@dataclass
class Run:
    """A tracked clip.

    Attributes
    ----------
    results : list of TrackingFrame
        What came out.
    logs : dict of int to list of Seen
        What each object's track did, per frame.
    """

    results: list[TrackingFrame]
    logs: dict[int, list[Seen]]

    def masks(self, object_id: int) -> NDArray[np.bool_]:
        """Return one object's masks, shape (T, H, W)."""
        size = frames()[0].shape[:2]
        stack = np.zeros((len(self.results), *size), bool)
        for t, frame in enumerate(self.results):
            for mask in frame.masks:
                if mask.object_id == object_id:
                    stack[t] = mask.mask > 0
        return stack

    def logits(self, object_id: int) -> list[NDArray[np.float32]]:
        """Return the low-resolution logits of the first mask that was taken, per frame."""
        return [
            seen.offers[seen.choices[0].recall].logits[seen.choices[0].candidate].numpy()
            for seen in self.logs[object_id]
        ]


def track(
    made: EngineLoader,
    prompts: Mapping[int, Mapping[str, Any]],
    num_frames: int,
    *,
    facts: Callable[[Track], Mapping[str, Any]] = lambda track: {},
    length: int | None = None,
) -> Run:
    """Track the clip's first frames from prompts on frame 0; `length` is the whole video's."""
    logs: dict[int, list[Seen]] = {object_id: [] for object_id in prompts}
    height, width = frames()[0].shape[:2]
    with made.open_session(height, width, num_frames=length or num_frames) as session:
        assert isinstance(session, EngineSession)
        make_track = session._make_track

        def make_observed(*arguments: Any) -> Track:
            made_track = make_track(*arguments)
            # Tracks are made in the order of prompts.
            object_id = list(prompts)[len(session.tracks)]
            observed(made_track, logs[object_id], facts)
            return made_track

        session._make_track = make_observed
        for object_id, prompt in prompts.items():
            session.prompt(0, object_id, **prompt)
        results = [f for frame in frames()[:num_frames] for f in session.step(frame)]
        results += session.finish()
    return Run(results, logs)
