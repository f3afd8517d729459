"""SAM 2 networks from a table of constants, and their checkpoints from safe files.

The modules are Meta's (package ``sam2``); which of them, and with what numbers, is said here and
not by configuration files, so that no global configuration state is read or needed. Architecture:
Ravi et al., "SAM 2: Segment Anything in Images and Videos", 2024.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.errors import how_to_install

if TYPE_CHECKING:
    import torch

HIDDEN_DIM = 256
MEMORY_DIM = 64
NUM_MEMORIES = 7
"""One slot for prompted frames and six for tracked ones."""
STRIDE = 16
"""Pixels of the model's picture per cell of its features, in each direction."""
MODEL_IMAGE_SIZE = 1024
"""Side of the picture the official checkpoints were trained with."""
IMAGE_SIZE_STEP = 32
"""Sides must be a multiple of this: the patches of the first stage come in windows of 8 x 4."""


@dataclass(frozen=True, slots=True)
class Trunk:
    """What distinguishes the sizes: the numbers of the Hiera image encoder.

    Attributes
    ----------
    embed_dim, num_heads : int
        Of the first stage.
    stages : tuple of int
        Blocks per stage.
    global_att_blocks : tuple of int
        Blocks without windows.
    background_size : tuple of int
        Grid of the learned position code.
    window_spec : tuple of int
        Window of each stage.
    """

    embed_dim: int
    num_heads: int
    stages: tuple[int, ...]
    global_att_blocks: tuple[int, ...]
    background_size: tuple[int, int] = (7, 7)
    window_spec: tuple[int, ...] = (8, 4, 14, 7)

    @property
    def channels(self) -> list[int]:
        """Channels of the four feature maps, coarse to fine."""
        return [self.embed_dim * factor for factor in (8, 4, 2, 1)]


SIZES: Mapping[str, Trunk] = {
    "tiny": Trunk(96, 1, (1, 2, 7, 2), (5, 7, 9)),
    "small": Trunk(96, 1, (1, 2, 11, 2), (7, 10, 13)),
    "base-plus": Trunk(112, 2, (2, 3, 16, 3), (12, 16, 20), (14, 14)),
    "large": Trunk(144, 2, (2, 6, 36, 4), (23, 33, 43), (7, 7), (8, 4, 16, 8)),
}
"""Sizes by name, smallest first."""

_TRACKING_PARTS = (
    "memory_attention.",
    "memory_encoder.",
    "maskmem_tpos_enc",
    "no_mem_pos_enc",
    "mask_downsample.",
    "no_obj_ptr",
    "no_obj_embed_spatial",
    "obj_ptr_proj.",
    "obj_ptr_tpos_proj.",
    "sam_mask_decoder.pred_obj_score_head.",
)
"""Parameters that only tracking needs."""
_SAM3_PARTS = (
    "vision_encoder.backbone.layers.",
    "tracker_model.",
    "tracker_neck.",
    "detector_model.",
)
"""How names of parameters of SAM 3 begin, and of no other checkpoint."""


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What a checkpoint is, read from the shapes in it.

    Attributes
    ----------
    size : str
        A key of `SIZES`; ``tracker`` of SAM 3.
    version : str
        ``2.0``, ``2.1`` or ``3``.
    has_memory : bool
        Whether it can track; one without can only segment single frames.
    """

    size: str
    version: str
    has_memory: bool


def read_checkpoint(
    path: str | Path, *, skip: Callable[[str], bool] = lambda name: False
) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint; nothing in the file is executed.

    Parameters
    ----------
    path : str or Path
        ``.safetensors``, or a PyTorch file with a state dictionary, bare or under ``model``.
    skip : callable, optional
        Tells by their names which tensors are not wanted; of ``.safetensors`` they are not read.

    Returns
    -------
    dict of str to Tensor
        By parameter name, on the CPU.

    Raises
    ------
    RuntimeError
        The file is missing, truncated, or holds anything but tensors.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise RuntimeError(f"the checkpoint {path} does not exist: give the path of a file")
    try:
        if path.suffix == ".safetensors":
            from safetensors import SafetensorError, safe_open

            try:
                with safe_open(path, framework="pt") as file:
                    wanted = [name for name in file.keys() if not skip(name)]  # noqa: SIM118
                    return {name: file.get_tensor(name) for name in wanted}
            except SafetensorError as error:
                raise RuntimeError(
                    f"the checkpoint {path} is truncated or no safetensors file ({error}): fetch "
                    f"it again"
                ) from error
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise RuntimeError(
            f"the checkpoint {path} cannot be read safely: it is damaged, or holds more than "
            f"tensors; fetch the official file again"
        ) from error
    except RuntimeError as error:
        if str(error).startswith("the checkpoint"):
            raise
        raise RuntimeError(
            f"the checkpoint {path} is truncated or no PyTorch checkpoint: fetch it again"
        ) from error
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise RuntimeError(f"the checkpoint {path} holds no state dictionary")
    return {name: tensor for name, tensor in state.items() if not skip(name)}


def identify_checkpoint(state: Mapping[str, torch.Tensor], name: str) -> CheckpointInfo:
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
        It is no checkpoint of SAM 2.
    """
    refuse_sam3(state, name)
    if any(key.startswith("vision_encoder.backbone.") for key in state):
        raise RuntimeError(
            f"the checkpoint {name} is in the layout of transformers: choose --tracker sam2video, "
            f"or give a sam2_hiera_*.pt or sam2.1_hiera_*.pt file"
        )
    patch = state.get("image_encoder.trunk.patch_embed.proj.weight")
    blocks = {k.split(".")[3] for k in state if k.startswith("image_encoder.trunk.blocks.")}
    for size, trunk in SIZES.items():
        if patch is None or patch.shape[0] != trunk.embed_dim or len(blocks) != sum(trunk.stages):
            continue
        has_memory = any(k.startswith("memory_attention.") for k in state)
        version = "2.1" if "no_obj_embed_spatial" in state else "2.0"
        return CheckpointInfo(size, version, has_memory)
    raise RuntimeError(
        f"the checkpoint {name} is not one of SAM 2: give a sam2_hiera_* or sam2.1_hiera_* file"
    )


def is_sam3(names: Iterable[str]) -> bool:
    """Tell by its parameters' names whether a checkpoint is one of SAM 3."""
    return any(name.startswith(_SAM3_PARTS) for name in names)


def refuse_sam3(names: Iterable[str], path: str) -> None:
    """Refuse a checkpoint of SAM 3.

    Raises
    ------
    RuntimeError
        It is one.
    """
    if is_sam3(names):
        raise RuntimeError(
            f"the checkpoint {path} is one of SAM 3: choose --tracker sam3-tracker, or give one of "
            f"SAM 2"
        )


def build_network(info: CheckpointInfo, image_size: int) -> Any:
    """Assemble the modules of a network, with random weights.

    Parameters
    ----------
    info : CheckpointInfo
        Its size and version.
    image_size : int
        Side of the model's square picture, a multiple of `IMAGE_SIZE_STEP`.

    Returns
    -------
    sam2.modeling.sam2_base.SAM2Base
        On the CPU, in evaluation mode, under the parameter names of the official checkpoints.

    Raises
    ------
    RuntimeError
        The package ``sam2`` is not installed, or another one has its name.
    """
    try:
        from sam2.modeling.backbones.hieradet import Hiera
        from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
        from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
        from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
        from sam2.modeling.position_encoding import PositionEmbeddingSine
        from sam2.modeling.sam.transformer import RoPEAttention
        from sam2.modeling.sam2_base import SAM2Base
    except ImportError as error:
        raise RuntimeError(
            f"SAM 2 trackers need the package sam2 ({error}): {how_to_install('sam2')}"
        ) from error

    def sine(num_features: int) -> Any:
        return PositionEmbeddingSine(num_features, normalize=True, warmup_cache=False)

    def rotary(**more: Any) -> Any:
        return RoPEAttention(
            embedding_dim=HIDDEN_DIM, num_heads=1, downsample_rate=1, rope_theta=10_000.0, **more
        )

    trunk = SIZES[info.size]
    encoder = ImageEncoder(
        trunk=Hiera(
            embed_dim=trunk.embed_dim,
            num_heads=trunk.num_heads,
            stages=trunk.stages,
            global_att_blocks=trunk.global_att_blocks,
            window_pos_embed_bkg_spatial_size=trunk.background_size,
            window_spec=trunk.window_spec,
        ),
        neck=FpnNeck(
            position_encoding=sine(HIDDEN_DIM),
            d_model=HIDDEN_DIM,
            backbone_channel_list=trunk.channels,
            fpn_top_down_levels=[2, 3],
            fpn_interp_model="nearest",
        ),
        scalp=1,
    )
    layer = MemoryAttentionLayer(
        activation="relu",
        d_model=HIDDEN_DIM,
        dim_feedforward=2048,
        dropout=0.0,
        pos_enc_at_attn=False,
        pos_enc_at_cross_attn_keys=True,
        pos_enc_at_cross_attn_queries=False,
        self_attention=rotary(),
        cross_attention=rotary(rope_k_repeat=True, kv_in_dim=MEMORY_DIM),
    )
    memory_encoder = MemoryEncoder(
        out_dim=MEMORY_DIM,
        position_encoding=sine(MEMORY_DIM),
        mask_downsampler=MaskDownSampler(kernel_size=3, stride=2, padding=1),
        fuser=Fuser(CXBlock(dim=HIDDEN_DIM, layer_scale_init_value=1e-6), num_layers=2),
    )
    is_new = info.version == "2.1"
    network = SAM2Base(
        image_encoder=encoder,
        memory_attention=MemoryAttention(HIDDEN_DIM, True, layer, num_layers=4),
        memory_encoder=memory_encoder,
        num_maskmem=NUM_MEMORIES,
        image_size=image_size,
        backbone_stride=STRIDE,
        use_mask_input_as_output_without_sam=True,
        directly_add_no_mem_embed=True,
        use_high_res_features_in_sam=True,
        multimask_output_in_sam=True,
        multimask_output_for_tracking=True,
        use_multimask_token_for_obj_ptr=True,
        iou_prediction_use_sigmoid=True,
        use_obj_ptrs_in_encoder=True,
        add_tpos_enc_to_obj_ptrs=is_new,
        proj_tpos_enc_in_obj_ptrs=is_new,
        use_signed_tpos_enc_to_obj_ptrs=is_new,
        only_obj_ptrs_in_the_past_for_eval=True,
        pred_obj_scores=True,
        pred_obj_scores_mlp=True,
        fixed_no_obj_ptr=True,
        use_mlp_for_obj_ptr_proj=True,
        no_obj_embed_spatial=is_new,
        # A single mask that changes with the threshold gives way to the best of the three.
        sam_mask_decoder_extra_args={
            "dynamic_multimask_via_stability": True,
            "dynamic_multimask_stability_delta": 0.05,
            "dynamic_multimask_stability_thresh": 0.98,
        },
    )
    network.eval()
    network.requires_grad_(False)
    return network


def load_network(
    path: str | Path, image_size: int, *, size: str | None = None
) -> tuple[Any, CheckpointInfo]:
    """Read a checkpoint and return its network.

    Parameters
    ----------
    path : str or Path
        The local file.
    image_size : int
        Side of the model's square picture.
    size : str, optional
        The size it must have.

    Returns
    -------
    network : sam2.modeling.sam2_base.SAM2Base
        On the CPU, float32.
    info : CheckpointInfo
        What the checkpoint was.

    Raises
    ------
    RuntimeError
        The file is no complete checkpoint of SAM 2, or of another size.
    """
    state = read_checkpoint(path)
    info = identify_checkpoint(state, str(path))
    check_size(info, size, path)
    network = build_network(info, image_size)
    fill_network(network, state, info, path, _TRACKING_PARTS)
    return network, info


def check_size(info: CheckpointInfo, size: str | None, path: str | Path) -> None:
    """Refuse a checkpoint of another size than was asked for.

    Raises
    ------
    RuntimeError
        Its size is another.
    """
    if size is not None and size != info.size:
        raise RuntimeError(
            f"the checkpoint {path} is of size {info.size}, but {size} was asked for: give a "
            f"{size} checkpoint, or choose :{info.size}"
        )


def fill_network(
    network: Any,
    state: Mapping[str, torch.Tensor],
    info: CheckpointInfo,
    path: str | Path,
    tracking_parts: tuple[str, ...],
) -> None:
    """Give a network its weights.

    Parameters
    ----------
    network : torch.nn.Module
        Filled in place.
    state : Mapping
        Tensors by parameter name.
    info : CheckpointInfo
        What they are.
    path : str or Path
        For the message of an error.
    tracking_parts : tuple of str
        How names of parameters begin that a checkpoint without memory lacks.

    Raises
    ------
    RuntimeError
        A parameter is missing, unknown, or of another shape.
    """
    wanted = {
        name: tensor.shape
        for name, tensor in network.state_dict().items()
        if info.has_memory or not name.startswith(tracking_parts)
    }
    missing = sorted(set(wanted) - set(state))
    unknown = sorted(set(state) - set(wanted))
    misfits = [n for n, shape in wanted.items() if n in state and state[n].shape != shape]
    for names, fault in (
        (missing, "lacks"),
        (unknown, "has the unknown parameter"),
        (misfits, "has another shape for"),
    ):
        if names:
            raise RuntimeError(
                f"the checkpoint {path} {fault} {names[0]}"
                + (f" and {len(names) - 1} more" if len(names) > 1 else "")
                + f": it is not a complete SAM {info.version} {info.size} checkpoint"
            )
    network.load_state_dict(state, strict=False)
