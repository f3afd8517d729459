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

from workers.engine.model import CheckpointInfo, fill_network, read_checkpoint
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


def load_sam3_network(path: str | Path, image_size: int) -> tuple[Sam2VideoModules, CheckpointInfo]:
    """Read a checkpoint of SAM 3 and return the network of its tracker under Meta's names.

    Parameters
    ----------
    path : str or Path
        A folder with ``model.safetensors``, or that file: a whole SAM 3, of which the detector is
        not read, or its tracker alone. Without a ``config.json`` beside it, it is taken for one of
        ``facebook/sam3``.
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
        The file is no complete checkpoint of SAM 3's tracker in the layout of transformers, or the
        library is not installed.
    """
    path = Path(path)
    if path.is_dir():
        path = path / CHECKPOINT_NAME
    settings = _settings(path.with_name("config.json"))
    state = _tracker_of(read_checkpoint(path, skip=_is_of_detector))
    if not any(name.startswith("vision_encoder.backbone.layers.") for name in state):
        raise RuntimeError(
            f"the checkpoint {path} is not one of SAM 3 in the layout of transformers: give the "
            f"{CHECKPOINT_NAME} of facebook/sam3"
        )
    info = CheckpointInfo("tracker", "3", has_memory=True)
    model = _build(settings, image_size, path)
    fill_network(model, with_shared(state), info, path, ())
    return Sam2VideoModules(model, STRIDE), info


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


def _settings(path: Path) -> dict[str, Any]:
    """Return the tracker's settings in a ``config.json``; none are those of facebook/sam3."""
    settings = read_settings(path)
    if settings is None:
        return {}
    kind = settings.get("model_type")
    if kind not in _KINDS:
        raise RuntimeError(
            f"{path.parent} holds a checkpoint of {kind}: sam3-tracker takes checkpoints of "
            f"{' and '.join(_KINDS)}, such as facebook/sam3"
        )
    tracker: dict[str, Any] = settings.get("tracker_config") or settings
    check_settings(tracker, path)
    return tracker


def _build(settings: Mapping[str, Any], image_size: int, path: Path) -> Any:
    """Return transformers' model, in evaluation mode, its weights not yet filled in."""
    try:
        from transformers import Sam3TrackerVideoConfig, Sam3TrackerVideoModel
    except ImportError as error:
        raise RuntimeError(
            f"tracker sam3-tracker needs the library transformers, version 5 or newer ({error}): "
            f"{how_to_install('transformers')}"
        ) from error
    try:
        config = Sam3TrackerVideoConfig.from_dict(dict(settings))
        config.image_size = image_size
        model = Sam3TrackerVideoModel(config)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise RuntimeError(
            f"the config.json beside {path} is no configuration of SAM 3's tracker ({error}): "
            f"fetch it again"
        ) from error
    model.eval()
    model.requires_grad_(False)
    return model
