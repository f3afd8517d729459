"""Matrix products and attention on the CPU, by the faster of torch's two libraries.

In float32 torch multiplies matrices on the CPU with MKL, which uses half of what a processor that
is not Intel's can do. The other library inside torch, oneDNN, uses all of it, but torch asks it for
bfloat16 only. Here it is asked for float32, too. Attention to many keys is softmax over blocks of
them whose results are merged (Milakov & Gimelshein, "Online normalizer calculation for softmax",
2018), so that a block's scores stay in the cache; values may have fewer channels than keys.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_NUM_QUERIES, _NUM_KEYS = 512, 1024
"""Scores of a block: 2 MiB in float32."""
_BLOCKS = ("MultiScaleBlock", "Sam2MultiScaleBlock")
"""Classes of an image encoder's blocks, in sam2 and in transformers; told by their names, for
neither library need be installed."""
_MAX_WHOLE = 8192
"""Keys that are not worth blocks of them; the memories of pictures of 512 pixels are fewer."""


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``x @ weight.T + bias``.

    Parameters
    ----------
    x : Tensor, shape (..., C)
        Input.
    weight : Tensor, shape (D, C)
        Weights.
    bias : Tensor, shape (D,), optional
        Added.

    Returns
    -------
    Tensor, shape (..., D)
        The product.
    """
    import torch
    import torch.nn.functional as F  # noqa: N812 (its usual name)

    if x.dtype == torch.float32 and x.device.type == "cpu" and _has_onednn():
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return F.linear(x, weight, bias)


def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return softmax attention, also with values of fewer channels than the keys.

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
    On the CPU each of the batch is computed alone, in blocks whose bounds do not depend on the
    others, so its result is the same bit by bit in any batch.
    """
    import torch
    import torch.nn.functional as F  # noqa: N812

    if queries.device.type != "cpu":
        return F.scaled_dot_product_attention(queries[:, None], keys[:, None], values[:, None])[
            :, 0
        ]
    batch, num, channels = queries.shape
    seen = queries.new_empty(batch, num, values.shape[-1])
    for b in range(batch):
        scaled = queries[b] * channels**-0.5
        if keys.shape[1] <= _MAX_WHOLE:
            num_queries = max(_NUM_QUERIES * _NUM_KEYS * 4 // keys.shape[1], 64)
            for start in range(0, num, num_queries):
                scores = linear(scaled[start : start + num_queries], keys[b])
                torch.softmax(scores, -1, out=scores)
                torch.mm(scores, values[b], out=seen[b, start : start + num_queries])
            continue
        blocks = [
            (k, v.T.contiguous())
            for k, v in zip(keys[b].split(_NUM_KEYS), values[b].split(_NUM_KEYS), strict=True)
        ]
        for tile, out in zip(scaled.split(_NUM_QUERIES), seen[b].split(_NUM_QUERIES), strict=True):
            out.copy_(_attend_tile(tile, blocks))
    return seen


def attend_plainly(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return softmax attention of scores that are all held at once, shape (..., N, V).

    Parameters
    ----------
    queries, keys, values : Tensor, shapes (..., N, C), (..., L, C) and (..., L, V)
        As for `attend`.
    """
    import torch

    seen: torch.Tensor = torch.ops.aten._scaled_dot_product_attention_math(queries, keys, values)[0]
    return seen


def attend_plainly_in(modules: Any) -> None:
    """Let the attention layers of Meta's mask decoder attend plainly.

    Parameters
    ----------
    modules : torch.nn.Module
        Changed in place; its parameters and their names stay as they are.
    """
    for module in modules.modules():
        if type(module).__name__ == "Attention":
            module.forward = functools.partial(_attend_by_heads, module)


def _attend_by_heads(
    module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """Return what an attention layer of Meta's mask decoder sees, shape (B, N, C)."""
    heads = [
        layer(x).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        for layer, x in ((module.q_proj, q), (module.k_proj, k), (module.v_proj, v))
    ]
    return module.out_proj(attend_plainly(*heads).transpose(1, 2).flatten(2))


def _attend_tile(
    queries: torch.Tensor, blocks: list[tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """Let a few queries see all blocks of keys and transposed values."""
    import torch

    parts, peaks, shares = [], [], []
    for keys, values in blocks:
        scores = linear(queries, keys)
        peaks.append(scores.amax(-1))
        torch.softmax(scores, -1, out=scores)
        # The largest probability is one divided by the sum the block was normalised with.
        shares.append(scores.amax(-1))
        parts.append(linear(scores, values))
    weights = torch.softmax(torch.stack(peaks).float() - torch.stack(shares).float().log(), 0)
    return (torch.stack(parts) * weights[..., None]).sum(0)


def speed_up(modules: Any) -> None:
    """Let the linear layers and the global attention of an image encoder use these products.

    Parameters
    ----------
    modules : torch.nn.Module
        Changed in place; its parameters and their names stay as they are.
    """
    from torch import nn

    for module in modules.modules():
        if type(module) is nn.Linear:
            module.forward = functools.partial(linear, weight=module.weight, bias=module.bias)
        elif type(module).__name__ in _BLOCKS and not module.window_size:
            attention = module.attn
            if attention.q_pool is None:
                attention.forward = functools.partial(_attend_everywhere, attention)


def _attend_everywhere(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Return what a block of the image encoder that has no windows sees, shape (B, H, W, C)."""
    batch, height, width, _ = hidden_states.shape
    heads = module.num_heads
    qkv = module.qkv(hidden_states).reshape(batch, height * width, 3, heads, -1)
    queries, keys, values = qkv.permute(2, 0, 3, 1, 4).flatten(1, 2)
    seen = attend(queries.contiguous(), keys.contiguous(), values)
    together = seen.unflatten(0, (batch, heads)).transpose(1, 2)
    return module.proj(together.reshape(batch, height, width, -1))


@functools.cache
def _has_onednn() -> bool:
    import torch

    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
