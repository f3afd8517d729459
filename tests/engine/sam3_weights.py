"""Random weights of SAM 3's tracker with a small image encoder; real ones are gated and large."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

IMAGE_SIZE = 112


def made_folder() -> Path:
    """Return a new folder that is removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="maskmill-sam3-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def settings() -> dict[str, Any]:
    """Return the configuration of a tracker with a small image encoder."""
    backbone = {
        "model_type": "sam3_vit_model",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 8,  # of which the last one looks at the whole picture
        "num_attention_heads": 1,
        "image_size": 1008,
        "pretrain_image_size": 56,
    }
    vision = {"model_type": "sam3_vision_model", "backbone_config": backbone}
    return {"model_type": "sam3_tracker_video", "vision_config": vision}


@functools.cache
def library_model() -> Any:
    """Return the library's model with weights that see something everywhere."""
    import torch
    from transformers import Sam3TrackerVideoConfig, Sam3TrackerVideoModel

    config = Sam3TrackerVideoConfig.from_dict(settings())
    config.image_size = IMAGE_SIZE
    torch.manual_seed(0)
    model = Sam3TrackerVideoModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "embed" in name or "pointer" in name:
                spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
                parameter.normal_(0, spread, generator=generator)
        # The object is there, and its masks have both signs.
        model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(5.0)
    return model


@functools.cache
def alone() -> Path:
    """Return a folder with the tracker alone."""
    from safetensors.torch import save_model

    folder = made_folder()
    save_model(library_model(), str(folder / "model.safetensors"))
    library_model().config.save_pretrained(folder)
    return folder
