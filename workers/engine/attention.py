"""The memory attention of SAM 2 with fewer operations than its modules do, and equal results.

Two identities are used, neither of them an approximation:

* *Values re-associated.* A memory has 64 channels; its value projection has 256. As the rows of a
  softmax sum to one, ``softmax(S) (M V + b) = (softmax(S) M) V + b``: attend over the 64 channels
  and project the result.
* *The first self-attention is shared.* Before any memory is read, all objects see the same picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workers.engine.model import HIDDEN_DIM

if TYPE_CHECKING:
    import torch

_TILE_ELEMENTS = 1 << 21
"""Scores computed at a time, so that a tile of them stays in the processor's cache."""


@dataclass(frozen=True, slots=True)
class Savings:
    """Which of the exact savings are used; all can be switched off for a comparison.

    Attributes
    ----------
    values : bool
        Re-associate the values of the cross-attention.
    first_attention : bool
        Compute the first self-attention once for all objects.
    no_prompt : bool
        Compute the decoder's input for "no prompt" once.
    pathways : bool
        Run pathways of SAM2Long that remember the same once.
    """

    values: bool = True
    first_attention: bool = True
    no_prompt: bool = True
    pathways: bool = True


class MemoryAttention:
    """Conditions the features of a picture on memories.

    Parameters
    ----------
    module : sam2.modeling.memory_attention.MemoryAttention
        The weights.
    side : int
        Cells of the features in each direction.
    position : Tensor, shape (1, side * side, 256)
        Position code of the picture.
    savings : Savings
        Which savings to use.
    """

    def __init__(self, module: Any, side: int, position: torch.Tensor, savings: Savings) -> None:
        from sam2.modeling.position_encoding import compute_axial_cis

        self._layers = list(module.layers)
        self._norm = module.norm
        self._num_cells = side * side
        self._position = 0.1 * position
        self.savings = savings
        self._rotation = compute_axial_cis(HIDDEN_DIM, side, side).to(position.device)

    def begin(self, vision: torch.Tensor) -> torch.Tensor:
        """Return what the first layer sees before it looks at memories, shape (1, h * w, 256).

        Parameters
        ----------
        vision : Tensor, shape (1, 256, h, w)
            Features of the picture.
        """
        x = vision.flatten(2).transpose(1, 2) + self._position
        first = self._layers[0]
        return x + self._among_itself(first.self_attn, first.norm1(x))

    def __call__(
        self,
        begun: torch.Tensor,
        values: torch.Tensor,
        keys: torch.Tensor,
        num_pointer_tokens: int,
    ) -> torch.Tensor:
        """Return the features as each object's memories let it see them.

        Parameters
        ----------
        begun : Tensor, shape (1, h * w, 256)
            What `begin` returned for the picture.
        values : Tensor, shape (B, L, 64)
            Memories: spatial ones, whole frames after each other, then pointers.
        keys : Tensor, shape (B, L, 64)
            The same with their position codes added.
        num_pointer_tokens : int
            How many of the L tokens, at their end, are pointers.

        Returns
        -------
        Tensor, shape (B, 256, h, w)
            Conditioned features.
        """
        num = len(values)
        x = begun.expand(num, -1, -1)
        for i, layer in enumerate(self._layers):
            if i:
                x = x + self._among_itself(layer.self_attn, layer.norm1(x))
            x = x + self._to_memory(i, layer.norm2(x), values, keys, num_pointer_tokens)
            x = x + layer.linear2(layer.linear1(layer.norm3(x)).relu_())
        side = round(self._num_cells**0.5)
        return self._norm(x).transpose(1, 2).reshape(num, HIDDEN_DIM, side, side)

    def _among_itself(self, attention: Any, x: torch.Tensor) -> torch.Tensor:
        import torch.nn.functional as F  # noqa: N812 (its usual name)

        queries = self._rotated(attention.q_proj(x))
        keys = self._rotated(attention.k_proj(x))
        seen = F.scaled_dot_product_attention(
            queries[:, None], keys[:, None], attention.v_proj(x)[:, None]
        )
        return attention.out_proj(seen[:, 0])

    def _to_memory(
        self,
        index: int,
        x: torch.Tensor,
        values: torch.Tensor,
        keys: torch.Tensor,
        num_pointer_tokens: int,
    ) -> torch.Tensor:
        import torch.nn.functional as F  # noqa: N812

        attention = self._layers[index].cross_attn_image
        queries = self._rotated(attention.q_proj(x))
        keys = attention.k_proj(keys)
        num_spatial = keys.shape[1] - num_pointer_tokens
        keys[:, :num_spatial] = self._rotated(keys[:, :num_spatial])
        if not self.savings.values:
            seen = F.scaled_dot_product_attention(
                queries[:, None], keys[:, None], attention.v_proj(values)[:, None]
            )
            return attention.out_proj(seen[:, 0])
        # The two projections could be one matrix, but its rounding costs accuracy: ten times the
        # difference to the originals after a few frames.
        return attention.out_proj(attention.v_proj(attend(queries, keys, values)))

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the rotary position code to whole frames of tokens, shape (B, n * cells, 256)."""
        import torch

        paired = x.unflatten(1, (-1, self._num_cells)).unflatten(-1, (-1, 2)).contiguous()
        turned = torch.view_as_complex(paired) * self._rotation
        return torch.view_as_real(turned).flatten(-2).flatten(1, 2)


def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return softmax attention with values of fewer channels than the keys.

    Parameters
    ----------
    queries : Tensor, shape (B, N, C)
        Not yet scaled.
    keys : Tensor, shape (B, L, C)
        Keys.
    values : Tensor, shape (B, L, V)
        Values.

    Returns
    -------
    Tensor, shape (B, N, V)
        Attended values.

    Notes
    -----
    The library's own attention falls back to a slow path for V != C on the CPU. Here a tile of
    queries sees all keys at once; what is kept at any time is the tile's scores.
    """
    import torch
    import torch.nn.functional as F  # noqa: N812

    if queries.is_cuda:
        return F.scaled_dot_product_attention(queries[:, None], keys[:, None], values[:, None])[
            :, 0
        ]
    batch, num, channels = queries.shape
    scale = channels**-0.5
    tile = max(16, _TILE_ELEMENTS // keys.shape[1])
    seen = queries.new_empty(batch, num, values.shape[-1])
    for b in range(batch):
        transposed = keys[b].T
        for start in range(0, num, tile):
            scores = (queries[b, start : start + tile] * scale) @ transposed
            torch.softmax(scores, dim=-1, out=scores)
            torch.mm(scores, values[b], out=seen[b, start : start + tile])
    return seen
