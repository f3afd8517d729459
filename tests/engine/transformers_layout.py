"""Checkpoints of SAM 2 in the layout of transformers, made from ones in Meta's."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.engine.model import read_checkpoint

if TYPE_CHECKING:
    import torch

_NAMES = (
    (r"^image_encoder\.trunk\.", "vision_encoder.backbone."),
    (r"^image_encoder\.neck\.convs\.(\d)\.conv\.", r"vision_encoder.neck.convs.\1."),
    (r"patch_embed\.proj\.", "patch_embed.projection."),
    (r"^sam_mask_decoder\.", "mask_decoder."),
    (r"^sam_prompt_encoder\.", "prompt_encoder."),
    (r"^no_mem_embed$", "no_memory_embedding"),
    (r"^no_mem_pos_enc$", "no_memory_positional_encoding"),
    (r"^maskmem_tpos_enc$", "memory_temporal_positional_encoding"),
    (r"^no_obj_ptr$", "no_object_pointer"),
    (r"^no_obj_embed_spatial$", "occlusion_spatial_embedding_parameter"),
    (r"^obj_ptr_proj\.", "object_pointer_proj."),
    (r"^obj_ptr_tpos_proj\.", "temporal_positional_encoding_projection_layer."),
    (r"^memory_encoder\.pix_feat_proj\.", "memory_encoder.feature_projection."),
    (r"^memory_encoder\.out_proj\.", "memory_encoder.projection."),
    (r"^memory_encoder\.fuser\.", "memory_encoder.memory_fuser."),
    (r"\.gamma$", ".scale"),
    (r"\.dwconv\.", ".depthwise_conv."),
    (r"\.pwconv(\d)\.", r".pointwise_conv\1."),
    (r"mask_downsampler\.encoder\.12\.", "mask_downsampler.final_conv."),
    (r"\.out_proj\.", ".o_proj."),
    (r"\.norm(\d?)\.", r".layer_norm\1."),
    (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
    (r"\.output_upscaling\.0\.", ".upscale_conv1."),
    (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
    (r"\.output_upscaling\.3\.", ".upscale_conv2."),
    (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
    (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
    (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
    (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
    (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
)
_TWO_LAYERS = re.compile(r"(\.mlp)\.layers\.(\d)\.")
_THREE_LAYERS = re.compile(
    r"(iou_prediction_head|pred_obj_score_head|object_pointer_proj"
    r"|output_hypernetworks_mlps\.\d)\.layers\.(\d)\."
)
_DOWNSAMPLER = re.compile(r"mask_downsampler\.encoder\.(\d+)\.")
_POSITIONS = "pe_layer.positional_encoding_gaussian_matrix"


def to_transformers(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint in Meta's layout under the names of transformers."""
    import torch

    given = dict(state)
    renamed: dict[str, torch.Tensor] = {}
    positions = given.pop(f"sam_prompt_encoder.{_POSITIONS}")
    for place in ("shared_image_embedding", "prompt_encoder.shared_embedding"):
        renamed[f"{place}.positional_embedding"] = positions.clone()
    points = [given.pop(f"sam_prompt_encoder.point_embeddings.{i}.weight") for i in range(4)]
    renamed["prompt_encoder.point_embed.weight"] = torch.cat(points)
    for name, tensor in given.items():
        renamed[_new_name(name)] = tensor.clone()
    return renamed


def _new_name(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    name = _TWO_LAYERS.sub(lambda m: f"{m[1]}.{('proj_in', 'proj_out')[int(m[2])]}.", name)
    name = _THREE_LAYERS.sub(
        lambda m: f"{m[1]}.{('proj_in', 'layers.0', 'proj_out')[int(m[2])]}.", name
    )
    return _DOWNSAMPLER.sub(
        lambda m: (
            f"mask_downsampler.layers.{int(m[1]) // 3}.{('conv', 'layer_norm')[int(m[1]) % 3]}."
        ),
        name,
    )


def settings_of(image_size: int) -> dict[str, Any]:
    """Return what a ``config.json`` says of SAM 2.1 tiny at an image size, beside defaults."""
    side = image_size // 16
    return {
        "model_type": "sam2_video",
        "architectures": ["Sam2VideoModel"],
        "image_size": image_size,
        "memory_attention_rope_feat_sizes": [side, side],
        "prompt_encoder_config": {"image_size": image_size},
        "vision_config": {"backbone_feature_sizes": [[side * n, side * n] for n in (4, 2, 1)]},
        "num_maskmem": 7,
        "sigmoid_scale_for_mem_enc": 20.0,
    }


def write_folder(
    folder: Path, state: Mapping[str, torch.Tensor], settings: Mapping[str, Any] | None = None
) -> Path:
    """Write a checkpoint as transformers keeps it; return the folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings or settings_of(512)))
    return folder


def converted(checkpoint: Path) -> Path:
    """Return a folder with the weights of a Meta checkpoint, made once per machine and file."""
    folder = checkpoint.with_suffix(".transformers")
    if not folder.is_dir():
        made = Path(tempfile.mkdtemp(dir=checkpoint.parent, prefix=f"{folder.name}."))
        write_folder(made, to_transformers(read_checkpoint(checkpoint)))
        try:
            made.rename(folder)
        except OSError:
            shutil.rmtree(made)  # another process was first
    return folder
