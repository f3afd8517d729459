"""The memory attention of SAM 2 with fewer operations than its modules do, and equal results.

Three identities are used, none of them an approximation:

* *Values re-associated.* A memory has 64 channels; its value projection has 256. As the rows of a
  softmax sum to one, ``softmax(S) (M V + b) = (softmax(S) M) V + b``: attend over the 64 channels
  and project the result.
* *The first self-attention is shared.* Before any memory is read, all objects see the same picture.
* *Keys are kept.* The key of a memory depends on its age by a summand only: its projection and
  rotation are linear, so what does not change with age is computed once.

In bfloat16 the projections and the attention are rounded to it; the sums between them are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workers.engine.model import HIDDEN_DIM
from workers.engine.positions import axial_rotation
from workers.engine.products import attend, attend_plainly, linear

if TYPE_CHECKING:
    import torch


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
    attention : bool
        Attend as `workers.engine.products` does.
    keys : bool
        Keep the projected keys of a memory as long as the memory; at 1024 pixels they take 16 MiB
        in float32 and 8 in bfloat16, where the memory takes half of one.
    products : bool
        Multiply by layers' weights, and attend in the image encoder, as `workers.engine.products`
        does. In float32 that rounds differently than the originals do, from the first layer on.
    """

    values: bool = True
    first_attention: bool = True
    no_prompt: bool = True
    pathways: bool = True
    attention: bool = True
    keys: bool = False
    products: bool = False


NO_SAVINGS = Savings(False, False, False, False, False, False, False)


@dataclass(slots=True)
class Remembered:
    """What B objects attend to: spatial memories, whole frames after each other, then pointers.

    Attributes
    ----------
    values : Tensor, shape (B, L, 64)
        Without position codes.
    keys : Tensor, shape (B, L, 64) or (B, P, 64)
        The same with their position codes; those of the P tokens of pointers where the keys of
        the spatial memories are kept.
    num_pointer_tokens : int
        P.
    kept : sequence of sequence of Tensor, shapes (layers, h * w, 256), or None
        For each object and memory what `MemoryAttention.keys_of` returned.
    ranks : Tensor of int64, shape (B, n)
        The age of each of these memories, as the index of its code.
    factors : Tensor, shape (B, n), or None
        By what their keys are multiplied.
    """

    values: torch.Tensor
    keys: torch.Tensor
    num_pointer_tokens: int
    kept: Sequence[Sequence[torch.Tensor]] | None = None
    ranks: torch.Tensor | None = None
    factors: torch.Tensor | None = None


class MemoryAttention:
    """Conditions the features of a picture on memories.

    Parameters
    ----------
    module : sam2.modeling.memory_attention.MemoryAttention
        The weights; its linear layers may be in bfloat16.
    side : int
        Cells of the features in each direction.
    position : Tensor, shape (1, side * side, 256)
        Position code of the picture.
    cell_code : Tensor, shape (side * side, 64)
        Position code of a memory's cells.
    age_codes : Tensor, shape (7, 64)
        Codes of a memory's age.
    savings : Savings
        Which savings to use.
    plain : bool
        Without the saving of attention, attend as `workers.engine.products.attend_plainly`.
    """

    def __init__(
        self,
        module: Any,
        side: int,
        position: torch.Tensor,
        cell_code: torch.Tensor,
        age_codes: torch.Tensor,
        savings: Savings,
        *,
        plain: bool = False,
    ) -> None:
        self._layers = list(module.layers)
        self._norm = module.norm
        self._num_cells = side * side
        self._position = 0.1 * position
        self.savings = savings
        self._plain = plain
        self._rotation = axial_rotation(side).to(position.device)
        self._cell_code = cell_code
        self._age_codes = age_codes
        self._age_keys: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Of each layer: the part of keys that is a memory's age, and that of the bias."""

    def begin(self, vision: torch.Tensor) -> torch.Tensor:
        """Return what the first layer sees before it looks at memories, shape (N, h * w, 256).

        Parameters
        ----------
        vision : Tensor, shape (N, 256, h, w)
            Features of pictures.
        """
        x = vision.flatten(2).transpose(1, 2) + self._position
        first = self._layers[0]
        return x + self._among_itself(first.self_attn, first.norm1(x))

    def keys_of(self, memories: torch.Tensor) -> torch.Tensor:
        """Return what of the keys of memories does not depend on their age.

        Parameters
        ----------
        memories : Tensor, shape (N, h * w, 64)
            Spatial memories.

        Returns
        -------
        Tensor, shape (N, layers, h * w, 256)
            In the number format of the layers.
        """
        import torch

        placed = memories + self._cell_code
        layers = [self._rotated(self._unbiased_keys(i, placed)) for i in range(len(self._layers))]
        return torch.stack(layers, 1)

    def __call__(self, begun: torch.Tensor, remembered: Remembered) -> torch.Tensor:
        """Return the features as each object's memories let it see them.

        Parameters
        ----------
        begun : Tensor, shape (B or 1, h * w, 256)
            What `begin` returned for the picture of each object, or for that of all.
        remembered : Remembered
            What they attend to.

        Returns
        -------
        Tensor of float32, shape (B, 256, h, w)
            Conditioned features.
        """
        num = len(remembered.values)
        x = begun.expand(num, -1, -1)
        for i, layer in enumerate(self._layers):
            if i:
                x = x + self._among_itself(layer.self_attn, layer.norm1(x))
            x = x + self._to_memory(i, layer.norm2(x), remembered)
            hidden = self._linear(layer.linear1, layer.norm3(x)).relu_()
            x = x + self._linear(layer.linear2, hidden)
        side = round(self._num_cells**0.5)
        return self._norm(x).transpose(1, 2).reshape(num, HIDDEN_DIM, side, side)

    def _among_itself(self, attention: Any, x: torch.Tensor) -> torch.Tensor:
        seen = self._attend(
            self._rotated(self._linear(attention.q_proj, x)),
            self._rotated(self._linear(attention.k_proj, x)),
            self._linear(attention.v_proj, x),
        )
        return self._linear(attention.out_proj, seen)

    def _to_memory(self, index: int, x: torch.Tensor, remembered: Remembered) -> torch.Tensor:
        attention, values = self._layers[index].cross_attn_image, remembered.values
        queries = self._rotated(self._linear(attention.q_proj, x))
        keys = self._keys(index, remembered)
        if not self.savings.values:
            seen = self._attend(queries, keys, self._linear(attention.v_proj, values))
            return self._linear(attention.out_proj, seen)
        # The two projections could be one matrix, but its rounding costs accuracy: ten times the
        # difference to the originals after a few frames.
        seen = attend(queries, keys, values.to(keys.dtype))
        return self._linear(attention.out_proj, self._linear(attention.v_proj, seen))

    def _keys(self, index: int, remembered: Remembered) -> torch.Tensor:
        """Return the projected keys of a layer, shape (B, L, 256)."""
        import torch

        keys = self._linear(self._layers[index].cross_attn_image.k_proj, remembered.keys)
        if remembered.kept is None:
            num_spatial = keys.shape[1] - remembered.num_pointer_tokens
            keys[:, :num_spatial] = self._rotated(keys[:, :num_spatial])
            return keys
        ages, bias = self._ages_of(index)
        of_memories = [memory[index] for memories in remembered.kept for memory in memories]
        spatial = torch.stack(of_memories).unflatten(0, (len(keys), -1))
        spatial += ages[remembered.ranks]
        if remembered.factors is not None:
            spatial *= remembered.factors[..., None, None]
        spatial += bias
        return torch.cat([spatial.flatten(1, 2), keys], 1)

    def _ages_of(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys of ages, shape (7, h * w, 256), and of the bias, shape (h * w, 256)."""
        if not self._age_keys:
            for i, layer in enumerate(self._layers):
                ages = self._unbiased_keys(i, self._age_codes[:, None])
                bias = layer.cross_attn_image.k_proj.bias[None, None]
                turned = [
                    self._rotated(one.expand(-1, self._num_cells, -1).contiguous())
                    for one in (ages, bias)
                ]
                self._age_keys.append((turned[0], turned[1][0]))
        return self._age_keys[index]

    def _unbiased_keys(self, index: int, x: torch.Tensor) -> torch.Tensor:
        import torch.nn.functional as F  # noqa: N812

        weight = self._layers[index].cross_attn_image.k_proj.weight
        x = x.to(weight.dtype)
        return linear(x, weight) if self.savings.products else F.linear(x, weight)

    def _linear(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.to(layer.weight.dtype)
        return linear(x, layer.weight, layer.bias) if self.savings.products else layer(x)

    def _attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        import torch.nn.functional as F  # noqa: N812 (its usual name)

        if self.savings.attention:
            return attend(queries, keys, values)
        if self._plain:
            return attend_plainly(queries[:, None], keys[:, None], values[:, None])[:, 0]
        return F.scaled_dot_product_attention(queries[:, None], keys[:, None], values[:, None])[
            :, 0
        ]

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the rotary position code to whole frames of tokens, shape (B, n * cells, 256)."""
        import torch

        paired = x.float().unflatten(1, (-1, self._num_cells)).unflatten(-1, (-1, 2)).contiguous()
        turned = torch.view_as_complex(paired) * self._rotation
        return torch.view_as_real(turned).flatten(-2).flatten(1, 2).to(x.dtype)
