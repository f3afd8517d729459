"""SAM 2 networks from the library transformers, in the place of Meta's modules.

The steps, the memories and the policies are the engine's own, so a tracker on these modules does
what it does on Meta's; only who computes image features, prompt codes and masks differs. What
transformers' own video session does otherwise is therefore not done here: it takes the pointer of
a prompted mask from the best of three candidates (Meta: from the single one), and when one object
is prompted on a frame it remembers all objects of that frame as prompted ones. Its processor
resizes bilinearly where Meta's loader resizes bicubically.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.engine.model import (
    NUM_MEMORIES,
    SIZES,
    STRIDE,
    CheckpointInfo,
    check_size,
    fill_network,
    read_checkpoint,
    refuse_sam3,
)
from workers.errors import how_to_install

if TYPE_CHECKING:
    import torch

CHECKPOINT_NAME = "model.safetensors"
"""Name of the weights in a folder of a transformers checkpoint."""

_TRUNK = "vision_encoder.backbone."
_TRACKING_PARTS = (
    "memory_attention.",
    "memory_encoder.",
    "memory_temporal_positional_encoding",
    "no_memory_positional_encoding",
    "mask_downsample.",
    "no_object_pointer",
    "object_pointer_proj.",
    "occlusion_spatial_embedding_parameter",
    "temporal_positional_encoding_projection_layer.",
    "mask_decoder.pred_obj_score_head.",
)
"""Parameters that only tracking needs."""
_FAMILIES = {"edgetam": "EdgeTAM", "sam_": "SAM"}
"""Model types of other networks begin so."""
_FIXED: Mapping[str, Any] = {
    "num_maskmem": NUM_MEMORIES,
    "sigmoid_scale_for_mem_enc": 20.0,
    "sigmoid_bias_for_mem_enc": -10.0,
    "multimask_output_in_sam": True,
    "multimask_output_for_tracking": True,
    "multimask_min_pt_num": 0,
    "multimask_max_pt_num": 1,
    "max_object_pointers_in_encoder": 16,
    "memory_attention_num_attention_heads": 1,
    "memory_attention_downsample_rate": 1,
    "memory_attention_feed_forward_hidden_act": "relu",
    "memory_attention_rope_theta": 10_000,
}
"""Settings of a checkpoint's configuration that the engine takes for granted."""
_SHARED = (
    "shared_image_embedding.positional_embedding",
    "prompt_encoder.shared_embedding.positional_embedding",
)
"""One matrix under two names."""
_NAMES = {
    "mask_downsample": "mask_downsample",
    "maskmem_tpos_enc": "memory_temporal_positional_encoding",
    "no_mem_embed": "no_memory_embedding",
    "no_obj_embed_spatial": "occlusion_spatial_embedding_parameter",
    "no_obj_ptr": "no_object_pointer",
    "obj_ptr_proj": "object_pointer_proj",
    "obj_ptr_tpos_proj": "temporal_positional_encoding_projection_layer",
}
"""Meta's names of parts that differ in nothing but their name."""


def load_transformers_network(
    path: str | Path, image_size: int, *, size: str | None = None
) -> tuple[Sam2VideoModules, CheckpointInfo]:
    """Read a transformers checkpoint and return its network under Meta's names.

    Parameters
    ----------
    path : str or Path
        A folder with ``model.safetensors``, or that file. A ``config.json`` beside it is checked;
        the network itself follows from the shapes of the tensors.
    image_size : int
        Side of the model's square picture.
    size : str, optional
        The size it must have.

    Returns
    -------
    network : Sam2VideoModules
        What `workers.engine.adapter.Sam2Network` works with, on the CPU, float32.
    info : CheckpointInfo
        What the checkpoint was.

    Raises
    ------
    RuntimeError
        The file is no complete checkpoint of SAM 2 in the layout of transformers, or of another
        size, or the library is not installed.
    """
    path = Path(path)
    if path.is_dir():
        path = path / CHECKPOINT_NAME
    _check_configuration(path.with_name("config.json"))
    state = read_checkpoint(path)
    info = identify_transformers_checkpoint(state, str(path))
    check_size(info, size, path)
    model = _build(info, image_size)
    fill_network(model, with_shared(state), info, path, _TRACKING_PARTS)
    return Sam2VideoModules(model), info


def identify_transformers_checkpoint(
    state: Mapping[str, torch.Tensor], name: str
) -> CheckpointInfo:
    """Tell a checkpoint's size and version by its shapes.

    Parameters
    ----------
    state : Mapping
        Tensors by parameter name.
    name : str
        For the message of an error.

    Returns
    -------
    CheckpointInfo
        What it is.

    Raises
    ------
    RuntimeError
        It is no checkpoint of SAM 2 in the layout of transformers.
    """
    if any(key.startswith("image_encoder.trunk.") for key in state):
        raise RuntimeError(
            f"the checkpoint {name} is in Meta's layout: choose --tracker sam2, or give the "
            f"{CHECKPOINT_NAME} of a transformers checkpoint"
        )
    refuse_sam3(state, name)
    patch = state.get(f"{_TRUNK}patch_embed.projection.weight")
    blocks = {k.split(".")[3] for k in state if k.startswith(f"{_TRUNK}blocks.")}
    for size, trunk in SIZES.items():
        if patch is None or patch.shape[0] != trunk.embed_dim or len(blocks) != sum(trunk.stages):
            continue
        has_memory = any(key.startswith("memory_attention.") for key in state)
        version = "2.1" if "occlusion_spatial_embedding_parameter" in state else "2.0"
        return CheckpointInfo(size, version, has_memory)
    raise RuntimeError(
        f"the checkpoint {name} is not one of SAM 2 in the layout of transformers: give the "
        f"{CHECKPOINT_NAME} of facebook/sam2.1-hiera-tiny or its like"
    )


def read_settings(path: Path) -> dict[str, Any] | None:
    """Return what a ``config.json`` says; None where there is none.

    Raises
    ------
    RuntimeError
        It cannot be read.
    """
    if not path.is_file():
        return None
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RuntimeError(
            f"{path} is no configuration of transformers ({error}): fetch it again"
        ) from error
    if not isinstance(given, dict):
        raise RuntimeError(f"{path} is no configuration of transformers: fetch it again")
    return given


def check_settings(settings: Mapping[str, Any], path: Path) -> None:
    """Refuse settings that are not the engine's.

    Raises
    ------
    RuntimeError
        There are such.
    """
    given = dict(settings)
    rotation = given.get("rope_parameters")
    if isinstance(rotation, dict) and "rope_theta" in rotation:
        given["memory_attention_rope_theta"] = rotation["rope_theta"]
    for key, value in _FIXED.items():
        if given.get(key, value) != value:
            raise RuntimeError(
                f"{path} sets {key} to {given[key]}, but the engine knows {value} only: give a "
                f"checkpoint with the settings of facebook/sam2.1-hiera-tiny"
            )


def with_shared(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors with the one that has two names under both; files may hold it once."""
    filled = dict(state)
    for name, other in (_SHARED, _SHARED[::-1]):
        if other in state:
            filled.setdefault(name, state[other])
    return filled


def _check_configuration(path: Path) -> None:
    """Refuse the configuration of another network, or one with settings that are not the engine's.

    Raises
    ------
    RuntimeError
        It is such, or cannot be read.
    """
    settings = read_settings(path)
    if settings is None:
        return
    kind = str(settings.get("model_type", "sam2_video"))
    if kind not in ("sam2_video", "sam2"):
        if kind.startswith("sam3"):
            raise RuntimeError(
                f"{path.parent} holds a checkpoint of SAM 3 ({kind}): choose --tracker "
                f"sam3-tracker, or give one of sam2_video, such as facebook/sam2.1-hiera-tiny"
            )
        family = next((f for start, f in _FAMILIES.items() if kind.startswith(start)), kind)
        raise RuntimeError(
            f"{path.parent} holds a checkpoint of {family} ({kind}), whose memory works otherwise: "
            f"sam2video takes checkpoints of sam2_video, such as facebook/sam2.1-hiera-tiny"
        )
    check_settings(settings, path)


def _build(info: CheckpointInfo, image_size: int) -> Any:
    """Return transformers' model, in evaluation mode, its weights not yet filled in."""
    try:
        from transformers import (
            Sam2HieraDetConfig,
            Sam2VideoConfig,
            Sam2VideoModel,
            Sam2VisionConfig,
        )
    except ImportError as error:
        raise RuntimeError(
            f"tracker sam2video needs the library transformers, version 5 or newer ({error}): "
            f"{how_to_install('transformers')}"
        ) from error
    trunk = SIZES[info.size]
    side = image_size // STRIDE
    backbone = Sam2HieraDetConfig(
        hidden_size=trunk.embed_dim,
        num_attention_heads=trunk.num_heads,
        image_size=[image_size, image_size],
        window_positional_embedding_background_size=list(trunk.background_size),
        blocks_per_stage=list(trunk.stages),
        embed_dim_per_stage=trunk.channels[::-1],
        num_attention_heads_per_stage=[trunk.num_heads * 2**stage for stage in range(4)],
        window_size_per_stage=list(trunk.window_spec),
        global_attention_blocks=list(trunk.global_att_blocks),
    )
    is_new = info.version == "2.1"
    config = Sam2VideoConfig(
        vision_config=Sam2VisionConfig(
            backbone_config=backbone,
            backbone_channel_list=trunk.channels,
            backbone_feature_sizes=[[side * 2**level] * 2 for level in (2, 1, 0)],
        ),
        prompt_encoder_config={"image_size": image_size},
        image_size=image_size,
        memory_attention_rope_feat_sizes=[side, side],
        enable_occlusion_spatial_embedding=is_new,
        enable_temporal_pos_encoding_for_object_pointers=is_new,
    )
    model = Sam2VideoModel(config)
    model.eval()
    model.requires_grad_(False)
    return model


class Sam2VideoModules:
    """The parts of transformers' ``Sam2VideoModel`` under the names and signatures of Meta's.

    Parameters
    ----------
    model : transformers.Sam2VideoModel
        The loaded model, or one made of the same parts; some of its layers get a second name.
    stride : int
        Pixels of the model's picture per cell of its features, in each direction.
    """

    def __init__(self, model: Any, stride: int = STRIDE) -> None:
        self._model = model
        self.image_size: int = model.image_size
        self.backbone_stride = stride
        self.image_encoder = _ImageEncoder(model.vision_encoder)
        self.memory_attention = model.memory_attention
        self.memory_encoder = _MemoryEncoder(model.memory_encoder)
        self.sam_prompt_encoder = _PromptEncoder(model)
        self.sam_mask_decoder = _MaskDecoder(model.mask_decoder)
        model.memory_attention.norm = model.memory_attention.layer_norm
        for layer in model.memory_attention.layers:
            layer.norm1, layer.norm2 = layer.layer_norm1, layer.layer_norm2
            layer.norm3 = layer.layer_norm3
            for attention in (layer.self_attn, layer.cross_attn_image):
                attention.out_proj = attention.o_proj
        for block in getattr(model.vision_encoder.backbone, "blocks", ()):
            block.attn.num_heads = block.attn.num_attention_heads
            block.attn.q_pool = block.attn.query_stride

    def __getattr__(self, name: str) -> Any:
        if name not in _NAMES:
            raise AttributeError(name)
        return getattr(self._model, _NAMES[name])

    def to(self, device: torch.device) -> Sam2VideoModules:
        """Move everything to a device."""
        self._model.to(device)
        return self

    def modules(self) -> Iterator[Any]:
        """Yield every layer."""
        yield from self._model.modules()


class _SineCode:
    """A position code that is asked for with a picture, not with its shape."""

    def __init__(self, code: Any) -> None:
        self._code = code

    def __call__(self, grid: torch.Tensor) -> torch.Tensor:
        code: torch.Tensor = self._code(grid.shape, grid.device, grid.dtype)
        return code

    @property
    def forward(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """What the library's encoder gets instead of the code, once it is set."""
        return self.__call__

    @forward.setter
    def forward(self, made: Callable[[torch.Tensor], torch.Tensor]) -> None:
        import torch

        def of_shape(
            shape: torch.Size, device: torch.device, dtype: torch.dtype, mask: None = None
        ) -> torch.Tensor:
            return made(torch.empty(0, device=device, dtype=dtype))

        self._code.forward = of_shape


class _SinePosition:
    """A part of the network with such a code."""

    def __init__(self, code: Any) -> None:
        self.position_encoding = _SineCode(code)


class _ImageEncoder:
    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self.neck = _SinePosition(encoder.neck.position_encoding)

    def to(self, dtype: torch.dtype) -> None:
        # What is no parameter are frequencies, and fewer bits would make others of them.
        kept = [(part, dict(part.named_buffers(recurse=False))) for part in self._encoder.modules()]
        self._encoder.to(dtype)
        for part, buffers in kept:
            for name, buffer in buffers.items():
                setattr(part, name, buffer)

    def __call__(self, pixels: torch.Tensor) -> dict[str, Any]:
        return {"backbone_fpn": self._encoder(pixels, return_dict=True).fpn_hidden_states}


class _MemoryEncoder(_SinePosition):
    def __init__(self, encoder: Any) -> None:
        super().__init__(encoder.position_encoding)
        self._encoder = encoder

    def to(self, dtype: torch.dtype) -> None:
        self._encoder.to(dtype)

    def __call__(
        self, vision: torch.Tensor, masks: torch.Tensor, *, skip_mask_sigmoid: bool
    ) -> dict[str, Any]:
        assert skip_mask_sigmoid
        return {"vision_features": self._encoder(vision, masks)[0]}


class _PromptEncoder:
    def __init__(self, model: Any) -> None:
        self._model = model

    def get_dense_pe(self) -> torch.Tensor:
        code: torch.Tensor = self._model.get_image_wide_positional_embeddings()
        return code

    def __call__(
        self, *, points: tuple[torch.Tensor, torch.Tensor], boxes: None, masks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # transformers has an axis of its own for the objects of a picture.
        where, labels = (of_points[:, None] for of_points in points)
        sparse, dense = self._model.prompt_encoder(where, labels, boxes, masks)
        return sparse[:, 0], dense


class _MaskDecoder:
    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self.conv_s0, self.conv_s1 = decoder.conv_s0, decoder.conv_s1

    def __call__(
        self,
        *,
        image_embeddings: torch.Tensor,
        image_pe: torch.Tensor,
        sparse_prompt_embeddings: torch.Tensor,
        dense_prompt_embeddings: torch.Tensor,
        multimask_output: bool,
        repeat_image: bool,
        high_res_features: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        assert not repeat_image
        outputs = self._decoder(
            image_embeddings=image_embeddings,
            image_positional_embeddings=image_pe,
            sparse_prompt_embeddings=sparse_prompt_embeddings[:, None],
            dense_prompt_embeddings=dense_prompt_embeddings,
            multimask_output=multimask_output,
            high_resolution_features=high_res_features,
        )
        return tuple(output[:, 0] for output in outputs)
