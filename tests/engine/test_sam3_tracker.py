"""`sam3-tracker`: the engine on the tracker of transformers' SAM 3.

The weights are random, of a network with the real one's layers and a small image encoder; the real
weights are gated and large. Against the library's own video session on the same weights:

* Logits of a box and of points are the same on the prompted frame and on the tracked ones, with the
  engine's savings and without, and so is what is remembered; of a mask the logits of the prompted
  frame and the pointer of the single candidate are.
* Of many prompted frames the four newest are attended to.
* Pictures are what the library's processor makes of them.
* A whole SAM 3, its file, the tracker alone and the tracker as the library saves it are the same
  checkpoint; the detector is not read.
* In bfloat16 it runs, and its rotary frequencies keep their bits.
* What is no such checkpoint, a wrong image size and a size are one clear sentence; the id
  ``facebook/sam3`` means this tracker.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from jobs.config import RunConfig
from jobs.effort import estimate
from tests.engine.reference import Seen, observed
from tests.engine.sam3_weights import IMAGE_SIZE, alone, library_model, made_folder, settings
from workers.engine.pictures import SYMMETRIC, to_pixels
from workers.engine.policies.base import Track
from workers.engine.sam3_adapter import load_sam3_network
from workers.trackers.base import TrackingConfig
from workers.trackers.registry import create_tracking_loader, tracker_info
from workers.trackers.sam2 import EngineLoader, EngineSession

if TYPE_CHECKING:
    import torch

NUM_FRAMES = 5
HEIGHT, WIDTH = 90, 160
BOX = [40, 20, 100, 70]


@functools.cache
def clip() -> list[NDArray[np.uint8]]:
    """Return frames on which something soft moves to the right."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (9, 24, 3), np.uint8)
    scene = cv2.resize(small, (240, HEIGHT), interpolation=cv2.INTER_CUBIC)
    return [np.ascontiguousarray(scene[:, 9 * t : 9 * t + WIDTH]) for t in range(NUM_FRAMES)]


@functools.cache
def whole() -> Path:
    """Return a folder with a whole SAM 3: the tracker's parts renamed, and a detector."""
    import torch
    from safetensors.torch import load_file, save_file

    state: dict[str, torch.Tensor] = {}
    # The library's own renaming, the other way round (`conversion_mapping`, "sam3_tracker").
    for name, tensor in load_file(alone() / "model.safetensors").items():
        if name.startswith("vision_encoder.backbone."):
            state[f"detector_model.{name}"] = tensor
        elif name.startswith("vision_encoder.neck."):
            state[name.replace("vision_encoder.neck.", "tracker_neck.")] = tensor
        else:
            state[f"tracker_model.{name}"] = tensor
    state["detector_model.text_encoder.weight"] = torch.zeros(4)
    state["detector_model.vision_encoder.neck.weight"] = torch.zeros(4)
    folder = made_folder()
    save_file(state, folder / "model.safetensors")
    tracker = json.loads((alone() / "config.json").read_text())
    given = {"model_type": "sam3_video", "tracker_config": tracker}
    (folder / "config.json").write_text(json.dumps(given))
    return folder


def loaded(checkpoint: Path, image_size: int = IMAGE_SIZE, **more: Any) -> EngineLoader:
    config = TrackingConfig(
        "sam3-tracker",
        device="cpu",
        checkpoint_path=str(checkpoint),
        image_size=image_size,
        **more,
    )
    made = create_tracking_loader("sam3-tracker", config)
    made.load()
    assert isinstance(made, EngineLoader)
    return made


def square() -> NDArray[np.uint8]:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    x0, y0, x1, y1 = BOX
    mask[y0:y1, x0:x1] = 1
    return mask


PROMPTS: Mapping[str, Mapping[str, Any]] = {
    "box": {"box_xyxy": BOX},
    "point": {"points_xy": [[60, 60]], "point_labels": [1]},
    "points": {"points_xy": [[60, 60], [10, 10]], "point_labels": [1, 0]},
    "mask": {"mask": square()},
}


def pixels(frame: NDArray[np.uint8]) -> torch.Tensor:
    return to_pixels(frame, IMAGE_SIZE, "smooth", levels=SYMMETRIC)


@functools.cache
def theirs(kind: str) -> tuple[list[NDArray[np.float32]], torch.Tensor]:
    """Return the logits of the library's own video session, and what it remembers of the prompt."""
    import torch
    from transformers import Sam3TrackerVideoInferenceSession

    session = Sam3TrackerVideoInferenceSession(
        video=torch.cat([pixels(frame) for frame in clip()]),
        video_height=HEIGHT,
        video_width=WIDTH,
        dtype=torch.float32,
    )
    prompt, index = PROMPTS[kind], session.obj_id_to_idx(1)
    if kind == "mask":
        # At the network's size, for the library does not make it a mask of 0 and 1 again.
        given = made().engine._shrunk(prompt["mask"])
        session.add_mask_inputs(index, 0, given)
    else:
        points = prompt.get("points_xy", np.reshape(prompt.get("box_xyxy", []), (-1, 2)))
        scale = np.array([WIDTH, HEIGHT], np.float32)
        given = np.asarray(points, np.float32) / scale * np.float32(IMAGE_SIZE)
        labels = prompt.get("point_labels", [2, 3])
        session.add_point_inputs(
            index,
            0,
            {
                "point_coords": torch.from_numpy(given)[None, None],
                "point_labels": torch.tensor(labels, dtype=torch.int32)[None, None],
            },
        )
    session.obj_with_new_inputs = [1]
    model = library_model()
    with torch.inference_mode():
        logits = [
            model(inference_session=session, frame_idx=t).pred_masks[0, 0].numpy()
            for t in range(NUM_FRAMES)
        ]
    memory = session.get_output(index, 0, "maskmem_features", is_conditioning_frame=True)
    return logits, memory[:, 0]


@functools.cache
def made(**options: Any) -> EngineLoader:
    return loaded(alone(), options=options)


def observed_session(loader: EngineLoader, log: list[Seen], num_frames: int) -> EngineSession:
    """Open a session whose tracks write down what they do."""
    session = loader.open_session(HEIGHT, WIDTH, num_frames=num_frames)
    assert isinstance(session, EngineSession)
    make_track = session._make_track

    def make_observed(*arguments: Any) -> Track:
        track = make_track(*arguments)
        observed(track, log, lambda _: {})
        return track

    session._make_track = make_observed
    return session


def ours(loader: EngineLoader, kind: str) -> tuple[list[NDArray[np.float32]], torch.Tensor]:
    """Return the logits of the masks that the engine takes, and what it remembers of the prompt."""
    log: list[Seen] = []
    with observed_session(loader, log, NUM_FRAMES) as session:
        session.prompt(0, 1, **PROMPTS[kind])
        for frame in clip():
            session.step(frame)
    logits = [seen.offers[0].logits[seen.choices[0].candidate].numpy() for seen in log]
    memory = log[1].recalls[0].memories[0][0].memory
    assert memory is not None
    return logits, memory


def test_the_pointer_of_a_mask_is_that_of_the_single_candidate() -> None:
    import torch

    made_here, model = made(), library_model()
    network = made_here.engine.network
    with torch.inference_mode():
        (features,) = network.encode_images(pixels(clip()[0]))
        mask = made_here.engine._shrunk(square())
        heads = network.decode_mask(mask, features)
        got = network.point(heads.tokens[:, 0], heads.pointer_logits > 0)
        wanted = model._single_frame_forward(
            input_masks=model.mask_downsample(mask),
            image_embeddings=[*features.fine, features.vision],
            multimask_output=False,
        ).object_pointer
    assert float((got - wanted.reshape(1, -1)).abs().max()) < 1e-4
    assert float(got.abs().max()) > 1e-2


def test_four_prompted_frames_are_attended_to() -> None:
    import torch
    from transformers import Sam3TrackerVideoInferenceSession

    # Given a box on each of five frames, and one more frame
    frames = [*clip(), clip()[0]]
    session = Sam3TrackerVideoInferenceSession(
        video=torch.cat([pixels(frame) for frame in frames]),
        video_height=HEIGHT,
        video_width=WIDTH,
        dtype=torch.float32,
    )
    index = session.obj_id_to_idx(1)
    corners = np.reshape(BOX, (2, 2)) / np.array([WIDTH, HEIGHT], np.float32)
    given = {
        "point_coords": torch.from_numpy(corners * np.float32(IMAGE_SIZE)).float()[None, None],
        "point_labels": torch.tensor([[[2, 3]]], dtype=torch.int32),
    }
    model = library_model()
    with torch.inference_mode():
        for t in range(len(frames)):
            if t < len(clip()):
                session.add_point_inputs(index, t, given)
                session.obj_with_new_inputs = [1]
            wanted = model(inference_session=session, frame_idx=t).pred_masks[0, 0].numpy()
    # When the engine tracks the same
    log: list[Seen] = []
    with observed_session(made(), log, len(frames)) as ours_session:
        for t in range(len(clip())):
            ours_session.prompt(t, 1, box_xyxy=BOX)
        for frame in frames:
            ours_session.step(frame)
    (recall,), offer = log[-1].recalls, log[-1].offers[0]
    # Then it looks at four prompted frames, and at the oldest as one that was tracked
    assert sorted(rank for _, rank in recall.memories) == [4, 6, 6, 6, 6]
    np.testing.assert_allclose(offer.logits[offer.best].numpy(), wanted, atol=2e-3)


@pytest.mark.parametrize("options", [{}, {"compat": "original"}], ids=["saving", "as_written"])
@pytest.mark.parametrize("kind", PROMPTS)
def test_logits_are_those_of_the_librarys_session(kind: str, options: dict[str, Any]) -> None:
    expected, expected_memory = theirs(kind)
    got, memory = ours(made(**options), kind)
    assert len(got) == len(expected) == NUM_FRAMES
    # Of a prompted mask Meta, and so the engine, remembers what the network stores of it, and takes
    # the pointer from another candidate.
    compared = slice(1) if kind == "mask" else slice(None)
    for one, wanted in zip(got[compared], expected[compared], strict=True):
        np.testing.assert_allclose(one, wanted, atol=2e-3)
    if kind != "mask":
        assert float((memory.float() - expected_memory.float()).abs().max()) < 2e-2  # of bfloat16
    # What is compared is something: memories change masks, which are neither empty nor full.
    shares = [(wanted > 0).mean() for wanted in expected]
    assert 0.01 < np.mean(shares) < 0.99
    assert np.abs(expected[-1] - expected[0]).max() > 0.1


def test_a_frame_becomes_what_the_librarys_processor_makes_of_it() -> None:
    import torch
    from transformers import Sam3ImageProcessor

    frame = clip()[0]
    processor = Sam3ImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    image = torch.from_numpy(frame.transpose(2, 0, 1).copy())
    wanted = processor(images=[image], return_tensors="pt")["pixel_values"][0]
    # The processor rounds to bytes on the way.
    assert float((pixels(frame)[0] - wanted).abs().max()) < 1.1 / 255 / 0.5


def test_a_whole_sam3_and_its_tracker_alone_are_the_same(tmp_path: Path) -> None:
    library_model().save_pretrained(tmp_path)
    expected = made().engine.network._modules._model.state_dict()
    for checkpoint in (whole(), whole() / "model.safetensors", tmp_path):
        got = loaded(checkpoint).engine.network._modules._model.state_dict()
        assert got.keys() == expected.keys()
        assert all((got[name] == tensor).all() for name, tensor in expected.items())


def test_bfloat16_keeps_the_frequencies() -> None:
    import torch

    loader = loaded(alone(), dtype="bfloat16")
    network = loader.engine.network._modules._model.vision_encoder
    buffers = [(n, b) for part in network.modules() for n, b in part.named_buffers(recurse=False)]
    assert {name for name, _ in buffers} >= {"inv_freq", "position_ids"}
    assert all(n == "position_ids" or buffer.dtype == torch.float32 for n, buffer in buffers)
    (wanted, *_), _ = ours(made(), "box")
    (got, *_), _ = ours(loader, "box")
    assert np.abs(got - wanted).max() < 0.5 * np.abs(wanted).max()


def test_what_is_no_such_checkpoint_is_refused(tmp_path: Path) -> None:
    def message(folder: Path) -> str:
        with pytest.raises(RuntimeError) as caught:
            load_sam3_network(folder, IMAGE_SIZE)
        return str(caught.value)

    def copied(name: str, given: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").symlink_to(alone() / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(given))
        return folder

    assert "a checkpoint of sam2_video" in message(copied("a", {"model_type": "sam2_video"}))
    assert "no configuration" in message(copied("b", []))
    assert "sets num_maskmem to 5" in message(copied("c", settings() | {"num_maskmem": 5}))
    other: dict[str, Any] = settings()
    other["vision_config"]["backbone_config"]["window_size"] = 8
    assert "sets window_size of the image encoder to 8" in message(copied("d", other))
    turned = settings() | {"rope_parameters": {"rope_type": "axial", "rope_theta": 500.0}}
    assert "sets memory_attention_rope_theta to 500" in message(copied("e", turned))
    nonsense = {"model_type": "sam3_video", "tracker_config": "x"}
    assert "no configuration of SAM 3" in message(copied("f", nonsense))
    assert "does not exist" in message(tmp_path / "nowhere")


def test_trackers_know_whose_weights_they_are_given(tmp_path: Path) -> None:
    def message(name: str, checkpoint: Path) -> str:
        config = TrackingConfig(name, device="cpu", checkpoint_path=str(checkpoint))
        with pytest.raises(RuntimeError) as caught:
            create_tracking_loader(name, config).load()
        return str(caught.value)

    bare = tmp_path / "bare.safetensors"
    bare.symlink_to(whole() / "model.safetensors")
    for checkpoint in (alone(), whole(), bare):
        assert "choose --tracker sam3-tracker" in message("sam2video", checkpoint)
        file = checkpoint / "model.safetensors" if checkpoint.is_dir() else checkpoint
        assert "choose --tracker sam3-tracker" in message("samurai", file)


def test_names_sizes_and_cost(tmp_path: Path) -> None:
    info = tracker_info("facebook/sam3@main")
    assert (info.name, info.hub_id) == ("sam3-tracker", "facebook/sam3@main")
    for wrong in ("facebook/sam3.5", "sam3-tracker:tiny"):
        with pytest.raises(ValueError, match=r"no tracker|no sizes"):
            tracker_info(wrong)
    with pytest.raises(ValueError, match="must be a multiple of 14 from 28 on, got 512"):
        create_tracking_loader("sam3-tracker", TrackingConfig("sam3-tracker", image_size=512))
    config = RunConfig.model_validate(
        {
            "out": {"uri": str(tmp_path)},
            "corpus": {"paths": [str(tmp_path)]},
            "tracker": {"name": "sam3-tracker", "device": "cpu"},
        }
    )
    told = estimate(config, 2.0)
    assert "sam3-tracker at 1008 pixels, 2 objects in a video: 5613 GFLOP a frame" in told.basis
    assert 0 < told.fps < 0.05
