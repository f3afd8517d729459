"""The numeric steps of a SAM 2 network, each as a batch over objects, without any state.

What becomes of the numbers (which mask is taken, what is remembered) is not decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from workers.engine import products
from workers.engine.attention import MemoryAttention, Remembered, Savings
from workers.engine.bank import Entry, Recall
from workers.engine.devices import upload
from workers.engine.model import HIDDEN_DIM, MEMORY_DIM, CheckpointInfo
from workers.engine.positions import distance_code

if TYPE_CHECKING:
    import torch

ABSENT_LOGIT = -1024.0
"""Mask logit of an object that is not there."""
_TOKENS_PER_POINTER = HIDDEN_DIM // MEMORY_DIM
_MASK_SCALE, _MASK_BIAS = 20.0, -10.0
_MASK_STRIDE = 16
"""Pixels of a mask per cell of its memory, in each direction; of a picture there may be fewer."""
_ASSUMED_PRESENT = 10.0
"""Object score of a checkpoint without the head that predicts it."""


@dataclass(slots=True)
class Features:
    """One picture as the image encoder sees it.

    Attributes
    ----------
    vision : Tensor, shape (1, 256, side, side)
        Features that memories are attended from.
    fine : list of Tensor, shapes (1, 32, 4 * side, 4 * side) and (1, 64, 2 * side, 2 * side)
        Features of higher resolution, for the mask decoder.
    begun : Tensor, shape (1, side * side, 256), or None
        What the memory attention makes of them before it looks at memories, once it is known.
    """

    vision: torch.Tensor
    fine: list[torch.Tensor]
    begun: torch.Tensor | None = None


@dataclass(slots=True)
class HeadOutput:
    """What prompt encoder and mask decoder say of B objects.

    Attributes
    ----------
    logits : Tensor of float32, shape (B, M, 4 * side, 4 * side)
        Mask logits of the M candidates.
    ious : Tensor of float32, shape (B, M)
        Their predicted IoUs.
    tokens : Tensor of float32, shape (B, M or 1, 256)
        Their output tokens.
    object_logits : Tensor of float32, shape (B,)
        Object scores.
    pointer_logits : Tensor of float32, shape (B,)
        Object scores that decide whether the pointer is that of an object. They differ from the
        others for prompted masks only, of which the decoder has its own opinion.
    """

    logits: torch.Tensor
    ious: torch.Tensor
    tokens: torch.Tensor
    object_logits: torch.Tensor
    pointer_logits: torch.Tensor


class Sam2Network:
    """A loaded SAM 2 network, from Meta's modules.

    Parameters
    ----------
    modules : sam2.modeling.sam2_base.SAM2Base
        Its weights.
    info : CheckpointInfo
        What they are.
    device : torch.device
        Where to compute.
    savings : Savings
        Which exact savings to use.
    dtype : torch.dtype, optional
        What the image encoder, the memory attention and the memory encoder compute in: float32,
        or bfloat16. Masks, scores and pointers are made in float32 always.
    plain_attention : bool
        Without the saving of attention, attend in memory and mask decoder as programs on the first
        releases of ``sam2`` do where there is no GPU. That rounds differently.

    Notes
    -----
    On a GPU TF32 is switched off for the whole process, see `forbid_tf32`.
    """

    def __init__(
        self,
        modules: Any,
        info: CheckpointInfo,
        device: torch.device,
        savings: Savings,
        dtype: torch.dtype | None = None,
        *,
        plain_attention: bool = False,
    ) -> None:
        import torch

        self.info = info
        self.device = device
        self.dtype = dtype or torch.float32
        self.image_size: int = modules.image_size
        self.side = self.image_size // modules.backbone_stride
        self.savings = savings
        if device.type == "cuda":
            forbid_tf32()
        self._modules = modules.to(device)
        if savings.products:
            products.speed_up(modules)
        # On a GPU they attend otherwise, and all scores of a batch would not fit.
        plain_attention &= device.type == "cpu" and not savings.attention
        if plain_attention:
            products.attend_plainly_in(modules.sam_mask_decoder)
        modules.image_encoder.to(self.dtype)
        modules.memory_encoder.to(self.dtype)
        for module in modules.memory_attention.modules():
            if isinstance(module, torch.nn.Linear):
                module.to(self.dtype)
        with torch.inference_mode():
            grid = torch.zeros(1, 1, self.side, self.side, device=device)
            picture_position = modules.image_encoder.neck.position_encoding(grid)
            memory_position = modules.memory_encoder.position_encoding(grid)
            cells, ages = memory_position[0].flatten(1).T, modules.maskmem_tpos_enc[:, 0, 0]
            self._attention = MemoryAttention(
                modules.memory_attention,
                self.side,
                picture_position.flatten(2).transpose(1, 2),
                cells,
                ages,
                savings,
                plain=plain_attention,
            )
            # One code for each rank, shape (7, side * side, 64).
            self._memory_codes = cells + ages[:, None]
            self._dense_position = modules.sam_prompt_encoder.get_dense_pe()
            self._no_prompt = self._encode_prompts(None, None, 1)
        # The encoders make the position codes of every level anew for every picture, which takes
        # longer than the rest of the neck; the two that are needed are known by now.
        for part in (modules.image_encoder.neck, modules.memory_encoder):
            part.position_encoding.forward = _no_code

    def use_savings(self, savings: Savings) -> None:
        """Use these savings from now on."""
        self.savings = savings
        self._attention.savings = savings

    # -- the picture -------------------------------------------------------------------------

    def encode_images(self, pixels: torch.Tensor) -> list[Features]:
        """Encode pictures, which depends on nothing but themselves.

        Parameters
        ----------
        pixels : Tensor of float32, shape (N, 3, image_size, image_size)
            Normalised pictures.

        Returns
        -------
        list of Features
            One per picture.
        """
        decoder = self._modules.sam_mask_decoder
        given = pixels.to(self.device, self.dtype)
        levels = [level.float() for level in self._modules.image_encoder(given)["backbone_fpn"]]
        fine = decoder.conv_s0(levels[0]), decoder.conv_s1(levels[1])
        return [
            Features(levels[2][i : i + 1], [level[i : i + 1] for level in fine])
            for i in range(len(pixels))
        ]

    def without_memory(self, features: Features) -> torch.Tensor:
        """Return the features as a prompted frame sees them, shape (1, 256, side, side)."""
        return features.vision + self._modules.no_mem_embed.reshape(1, -1, 1, 1)

    # -- memory ------------------------------------------------------------------------------

    def condition(self, features: Sequence[Features], recalls: Sequence[Recall]) -> torch.Tensor:
        """Let each track see its picture through its memories.

        Parameters
        ----------
        features : sequence of Features
            The picture of each track.
        recalls : sequence of Recall
            One per track, all of one signature.

        Returns
        -------
        Tensor, shape (B, 256, side, side)
            Conditioned features.
        """
        return self._attention(self._begun(features), self._remembered(recalls))

    def _begun(self, features: Sequence[Features]) -> torch.Tensor:
        """Return what the memory attention begins with, one row for each track or one for all."""
        import torch

        if not self.savings.first_attention:
            return self._attention.begin(torch.cat([one.vision for one in features]))
        new = list({id(one): one for one in features if one.begun is None}.values())
        if new:
            begun = self._attention.begin(torch.cat([one.vision for one in new]))
            for one, row in zip(new, begun.split(1), strict=True):
                one.begun = row
        return _rows([one.begun for one in features if one.begun is not None])

    def _remembered(self, recalls: Sequence[Recall]) -> Remembered:
        """Return what recalls attend to."""
        import torch

        num = len(recalls)
        memories = torch.stack([_memory_of(e) for r in recalls for e, _ in r.memories])
        values = memories.float().unflatten(0, (num, -1))
        ranks = upload([[rank for _, rank in r.memories] for r in recalls], self.device)
        factors = None
        if any(r.memory_factors is not None for r in recalls):
            listed = [r.memory_factors or [1.0] * len(r.memories) for r in recalls]
            factors = upload(listed, self.device, np.float32)
        tokens, pointer_keys = self._pointers(recalls)
        together = torch.cat([values.flatten(1, 2), tokens], 1)
        num_tokens = tokens.shape[1]
        if self.savings.keys:
            kept = self._kept_keys(recalls)
            return Remembered(together, pointer_keys, num_tokens, kept, ranks, factors)
        keys = values + self._memory_codes[ranks]
        if factors is not None:
            keys = keys * factors[..., None, None]
        return Remembered(together, torch.cat([keys.flatten(1, 2), pointer_keys], 1), num_tokens)

    def _kept_keys(self, recalls: Sequence[Recall]) -> list[list[torch.Tensor]]:
        """Return what is kept of the keys of each recall's memories; what is new is made now."""
        import torch

        entries = {id(e): e for r in recalls for e, _ in r.memories if e.keys is None}
        new = list(entries.values())
        if new:
            made = self._attention.keys_of(torch.stack([_memory_of(e) for e in new]).float())
            for entry, keys in zip(new, made, strict=True):
                # Of its own, or all of them would live as long as one does.
                entry.keys = keys.clone()
        return [[e.keys for e, _ in r.memories if e.keys is not None] for r in recalls]

    def _pointers(self, recalls: Sequence[Recall]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens of pointers without and with their codes, both of shape (B, P, 64)."""
        import torch

        num = len(recalls)
        if not recalls[0].pointers:
            none = torch.zeros(num, 0, MEMORY_DIM, device=self.device)
            return none, none
        pointers = torch.stack([e.pointer for r in recalls for e, _ in r.pointers])
        tokens = pointers.reshape(num, -1, MEMORY_DIM)
        keys = tokens
        if self.info.version != "2.0":
            shares = [d / r.max_distance for r in recalls for _, d in r.pointers]
            codes = distance_code(upload(shares, self.device, np.float32))
            codes = self._modules.obj_ptr_tpos_proj(codes).repeat_interleave(_TOKENS_PER_POINTER, 0)
            keys = tokens + codes.unflatten(0, (num, -1))
        if any(r.pointer_factors is not None for r in recalls):
            factors = [r.pointer_factors or [1.0] * len(r.pointers) for r in recalls]
            scales = upload(factors, self.device, np.float32)
            keys = keys * scales.repeat_interleave(_TOKENS_PER_POINTER, 1)[..., None]
        return tokens, keys

    def memorise(
        self,
        features: Sequence[Features],
        logits: torch.Tensor,
        object_logits: torch.Tensor,
        *,
        binary: bool,
    ) -> torch.Tensor:
        """Encode masks into spatial memories.

        Parameters
        ----------
        features : sequence of Features
            The picture of each of the B objects.
        logits : Tensor, shape (B, 4 * side, 4 * side)
            Masks.
        object_logits : Tensor, shape (B,)
            Object scores; at or below 0 the memory says that the object is hidden.
        binary : bool
            Take the mask instead of its probabilities, as on prompted frames.

        Returns
        -------
        Tensor of bfloat16, shape (B, side * side, 64)
            Memories, rounded as the originals store them.
        """
        import torch

        # The library rounds one channel differently from three, and rounding to bfloat16 makes it
        # visible: the originals enlarge three candidates and take one, except on prompted frames.
        num_together = 1 if binary else 3
        masks = self.enlarge(logits[:, None].expand(-1, num_together, -1, -1))[:, :1]
        masks = _resized(masks, _MASK_STRIDE * self.side)
        probabilities = (masks > 0).float() if binary else torch.sigmoid(masks)
        # In this memory layout the convolutions round as they do for the originals; in the other
        # one many values would fall on the other side when they are rounded to bfloat16.
        vision = _rows([one.vision for one in features]).contiguous()
        masks = probabilities * _MASK_SCALE + _MASK_BIAS
        encoded = self._modules.memory_encoder(
            vision.to(self.dtype), masks.to(self.dtype), skip_mask_sigmoid=True
        )["vision_features"].float()
        hidden_code = self._modules.no_obj_embed_spatial
        if hidden_code is not None:
            hidden = (object_logits <= 0).float()[:, None, None, None]
            encoded = encoded + hidden * hidden_code[..., None, None]
        return encoded.flatten(2).transpose(1, 2).to(torch.bfloat16)

    # -- masks -------------------------------------------------------------------------------

    def decode(
        self,
        conditioned: torch.Tensor,
        features: Sequence[Features],
        *,
        points: tuple[torch.Tensor, torch.Tensor] | None = None,
        mask: torch.Tensor | None = None,
        multimask: bool = True,
    ) -> HeadOutput:
        """Run the prompt encoder and the mask decoder.

        Parameters
        ----------
        conditioned : Tensor, shape (B, 256, side, side)
            The picture as each track sees it; B may be 1 for all.
        features : sequence of Features
            The picture of each track, or one for all.
        points : tuple of Tensor, shapes (B, P, 2) and (B, P), optional
            Points in pixels of the model's picture, and labels: 1 foreground, 0 background, 2 and
            3 the corners of a box.
        mask : Tensor, shape (B, 1, 4 * side, 4 * side), optional
            Dense prompt.
        multimask : bool
            Offer three candidates instead of one.

        Returns
        -------
        HeadOutput
            For B objects.
        """
        num = max(len(conditioned), 0 if points is None else len(points[0]))
        if points is None and mask is None and self.savings.no_prompt:
            sparse, dense = (code.expand(num, *code.shape[1:]) for code in self._no_prompt)
        else:
            sparse, dense = self._encode_prompts(points, mask, num)
        decoder = self._modules.sam_mask_decoder
        logits, ious, tokens, object_logits = decoder(
            image_embeddings=conditioned.expand(num, -1, -1, -1),
            image_pe=self._dense_position,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
            repeat_image=False,
            high_res_features=[
                _rows(list(level)) for level in zip(*(one.fine for one in features), strict=True)
            ],
        )
        if not self.info.has_memory:
            object_logits = object_logits.new_full(object_logits.shape, _ASSUMED_PRESENT)
        scores = object_logits[:, 0].float()
        return HeadOutput(logits.float(), ious.float(), tokens, scores, scores)

    def decode_mask(self, masks: torch.Tensor, features: Features) -> HeadOutput:
        """Take masks as they are, and look at the picture for their tokens only.

        Parameters
        ----------
        masks : Tensor of float32, shape (B, 1, image_size, image_size)
            0 or 1.
        features : Features
            The picture.

        Returns
        -------
        HeadOutput
            One candidate each, of IoU 1; the object score says whether the mask is empty.
        """
        import torch

        logits = _resized(masks * _MASK_SCALE + _MASK_BIAS, 4 * self.side)
        present = masks.flatten(1).any(1)
        object_logits = present.float() * _MASK_SCALE + _MASK_BIAS
        tokens = features.vision.new_zeros(len(masks), 1, HIDDEN_DIM)
        pointer_logits = object_logits
        if self.info.has_memory:
            heads = self.decode(
                features.vision.expand(len(masks), -1, -1, -1),
                [features],
                mask=_resized(self._modules.mask_downsample(masks), 4 * self.side),
                multimask=False,
            )
            tokens = heads.tokens
            pointer_logits = torch.where(present, heads.object_logits, ABSENT_LOGIT)
        ious = torch.ones(len(masks), 1, device=self.device)
        return HeadOutput(logits, ious, tokens, object_logits, pointer_logits)

    def point(self, tokens: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Turn output tokens into object pointers.

        Parameters
        ----------
        tokens : Tensor, shape (B, 256)
            Of the candidates that were taken.
        present : Tensor of bool, shape (B,)
            Where False the pointer says that there is no object.

        Returns
        -------
        Tensor of float32, shape (B, 256)
            Pointers.
        """
        gate = present.float()[:, None]
        return gate * self._modules.obj_ptr_proj(tokens) + (1 - gate) * self._modules.no_obj_ptr

    def enlarge(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits of shape (B, M, h, w) at the size of the model's picture."""
        import torch.nn.functional as F  # noqa: N812

        return F.interpolate(logits, size=(self.image_size, self.image_size), mode="bilinear")

    def _encode_prompts(
        self,
        points: tuple[torch.Tensor, torch.Tensor] | None,
        mask: torch.Tensor | None,
        num: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        if points is None:
            # Nothing is said by a point that is none.
            points = (
                torch.zeros(num, 1, 2, device=self.device),
                torch.full((num, 1), -1, dtype=torch.int32, device=self.device),
            )
        sparse, dense = self._modules.sam_prompt_encoder(points=points, boxes=None, masks=mask)
        return sparse, dense


def forbid_tf32() -> None:
    """Let float32 be float32 on GPUs, in this process and from now on.

    Torch lets convolutions round their factors to TF32, of ten bits, unless it is told not to, and
    products of matrices where somebody asked for it. Masks, scores and pointers are made in
    float32 because ten bits are not enough for them: the reference outputs are of float32, too.
    What is heavy runs in bfloat16 anyway.
    """
    import torch

    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def _memory_of(entry: Entry) -> torch.Tensor:
    assert entry.memory is not None
    return entry.memory


def _no_code(x: torch.Tensor) -> torch.Tensor:
    """Stand in for a position code that nobody looks at."""
    return x.new_empty(0)


def _resized(masks: torch.Tensor, side: int) -> torch.Tensor:
    """Return masks of shape (B, M, side, side)."""
    import torch.nn.functional as F  # noqa: N812

    if masks.shape[-2:] == (side, side):
        return masks
    return F.interpolate(masks, size=(side, side), mode="bilinear", antialias=True)


def _rows(of_each: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return tensors of one row each as the rows of one; a single row where all are the same."""
    import torch

    first = of_each[0]
    return first if all(one is first for one in of_each) else torch.cat(list(of_each))
