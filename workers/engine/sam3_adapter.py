"""The tracker inside SAM 3 for the engine: the memory of SAM 2.1 behind another image encoder.

Carion et al., "SAM 3: Segment Anything with Concepts", 2025. Its tracker takes boxes, points and
masks as SAM 2.1 does; the detector that understands words is another network, and is left out. The
modules are those of transformers' ``Sam3TrackerVideoModel``, and what they are fed is what its
video session feeds them: one cell for 14 pixels instead of 16, masks enlarged before they are
remembered, pictures resized bilinearly and normalised to -1..1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.engine.model import CheckpointInfo, fill_network, is_sam3, read_checkpoint
from workers.engine.transformers_adapter import (
    CHECKPOINT_NAME,
    Sam2VideoModules,
    check_settings,
    read_settings,
    with_shared,
)
from workers.errors import how_to_install

if TYPE_CHECKING:
    import torch

IMAGE_SIZE = 1008
"""Side of the picture that SAM 3 was trained with."""
STRIDE = 14
"""Pixels of the model's picture per cell of its features, in each direction."""

_NAMES = (
    (r"^tracker_model\.", ""),
    (r"^detector_model\.vision_encoder\.backbone\.", "vision_encoder.backbone."),
    (r"^tracker_neck\.", "vision_encoder.neck."),
)
"""How a whole SAM 3 names the tracker's parts, and their names in the tracker alone. The first may
stand before the others: so the library writes a tracker alone."""
_DETECTOR = "detector_model."
"""Names of the detector's own parts begin so."""
_KINDS = ("sam3_tracker_video", "sam3_video")
_BACKBONE = "vision_encoder.backbone."
_HEAD_CHANNELS = 64
_BACKBONE_SETTINGS: Mapping[str, Any] = {
    "window_size": 24,
    "global_attn_indexes": [7, 15, 23, 31],
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}
"""Settings of the image encoder that the shapes of its tensors do not tell."""


def load_sam3_network(path: str | Path, image_size: int) -> tuple[Sam2VideoModules, CheckpointInfo]:
    """Read a checkpoint of SAM 3 and return the network of its tracker under Meta's names.

    Parameters
    ----------
    path : str or Path
        A folder with ``model.safetensors``, or that file: a whole SAM 3, of which the detector is
        not read, or its tracker alone. A ``config.json`` beside it is checked; the network itself
        follows from the shapes of the tensors.
    image_size : int
        Side of the model's square picture, a multiple of 14.

    Returns
    -------
    network : Sam2VideoModules
        What `workers.engine.adapter.Sam2Network` works with, on the CPU, float32.
    info : CheckpointInfo
        What the checkpoint was.

    Raises
    ------
    RuntimeError
        The file is no complete checkpoint of SAM 3's tracker in the layout of transformers, has
        other settings, or the library is not installed.
    """
    path = Path(path)
    if path.is_dir():
        path = path / CHECKPOINT_NAME
    _check_library()
    state = _tracker_of(read_checkpoint(path, skip=_is_of_detector))
    backbone = _backbone_of(state, path)
    _check_configuration(path.with_name("config.json"), backbone)
    info = CheckpointInfo("tracker", "3", has_memory=True)
    model = _build(backbone, image_size)
    fill_network(model, with_shared(state), info, path, ())
    return Sam2VideoModules(model, STRIDE), info


def _check_library() -> None:
    try:
        from transformers import Sam3TrackerVideoModel  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"tracker sam3-tracker needs the library transformers, version 5 or newer ({error}): "
            f"{how_to_install('transformers')}"
        ) from error


def _is_of_detector(name: str) -> bool:
    return name.startswith(_DETECTOR) and not re.match(_NAMES[1][0], name)


def _tracker_of(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the parameters of the tracker under the names they have in it alone."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _backbone_of(state: Mapping[str, torch.Tensor], path: Path) -> dict[str, Any]:
    """Return the settings of the image encoder, most of them from the shapes of its tensors."""
    if not is_sam3(state):
        if any(name.startswith("image_encoder.trunk.") for name in state):
            raise RuntimeError(
                f"the checkpoint {path} is one of SAM 2: choose --tracker sam2, or give the "
                f"{CHECKPOINT_NAME} of facebook/sam3"
            )
        raise RuntimeError(
            f"the checkpoint {path} is not one of SAM 3 in the layout of transformers: give the "
            f"{CHECKPOINT_NAME} of facebook/sam3, or choose --tracker sam2video for one of SAM 2"
        )
    try:
        patches = state[f"{_BACKBONE}embeddings.patch_embeddings.projection.weight"]
        places = state[f"{_BACKBONE}embeddings.position_embeddings"]
        hidden = state[f"{_BACKBONE}layers.0.mlp.fc1.weight"]
    except KeyError as error:
        raise RuntimeError(
            f"the checkpoint {path} lacks {error.args[0]}: it is not a complete SAM 3 checkpoint"
        ) from error
    layers = {name.split(".")[3] for name in state if name.startswith(f"{_BACKBONE}layers.")}
    return {
        **_BACKBONE_SETTINGS,
        "model_type": "sam3_vit_model",
        "hidden_size": patches.shape[0],
        "intermediate_size": hidden.shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(1, patches.shape[0] // _HEAD_CHANNELS),
        "patch_size": STRIDE,
        "pretrain_image_size": STRIDE * round(places.shape[1] ** 0.5),
    }


def _check_configuration(path: Path, backbone: Mapping[str, Any]) -> None:
    """Refuse the configuration of another network, or one with settings that are not the engine's.

    Raises
    ------
    RuntimeError
        It is such, or cannot be read.
    """
    settings = read_settings(path)
    if settings is None:
        return
    kind = settings.get("model_type")
    if kind not in _KINDS:
        raise RuntimeError(
            f"{path.parent} holds a checkpoint of {kind}: sam3-tracker takes checkpoints of "
            f"{' and '.join(_KINDS)}, such as facebook/sam3"
        )
    tracker = settings.get("tracker_config") or settings
    vision = tracker.get("vision_config") if isinstance(tracker, dict) else None
    given = vision.get("backbone_config") if isinstance(vision, dict) else None
    if not isinstance(tracker, dict) or not isinstance(given, dict | None):
        raise RuntimeError(f"{path} is no configuration of SAM 3's tracker: fetch it again")
    check_settings(tracker, path)
    for key, value in backbone.items():
        if (given or {}).get(key, value) not in (value, None):
            raise RuntimeError(
                f"{path} sets {key} of the image encoder to {(given or {})[key]}, but the weights "
                f"beside it or the tracker know {value} only: give both as facebook/sam3 has them"
            )


def _build(backbone: Mapping[str, Any], image_size: int) -> Any:
    """Return transformers' model, in evaluation mode, its weights not yet filled in."""
    from transformers import Sam3TrackerVideoConfig, Sam3TrackerVideoModel

    vision = {"model_type": "sam3_vision_model", "backbone_config": dict(backbone)}
    config = Sam3TrackerVideoConfig(vision_config=vision)
    config.image_size = image_size
    model = Sam3TrackerVideoModel(config)
    model.eval()
    model.requires_grad_(False)
    return model
