"""Nested state as named arrays and JSON, and back: what a snapshot is made of.

A tensor or an array that occurs several times is stored once, and is one again afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOB = "bytes"


def pack(value: Any) -> tuple[dict[str, NDArray[Any]], Any]:
    """Take state apart.

    Parameters
    ----------
    value : Any
        Mappings with string keys, lists, tuples, numbers, strings, bytes, None, NumPy arrays and
        tensors, nested in any way.

    Returns
    -------
    arrays : dict of str to ndarray
        Tensors and arrays, and all bytes in one.
    plain : Any
        The rest, which JSON can hold.
    """
    arrays: dict[str, NDArray[Any]] = {}
    names: dict[int, str] = {}
    held: list[Any] = []  # keeps ids from being given again while they are compared
    blob = bytearray()

    def walk(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {"map": {key: walk(child) for key, child in node.items()}}
        if isinstance(node, (list, tuple)):
            return [walk(child) for child in node]
        if isinstance(node, bytes):
            blob.extend(node)
            return {"bytes": [len(blob) - len(node), len(blob)]}
        if isinstance(node, np.generic):
            return node.item()
        is_tensor = hasattr(node, "detach")
        if not is_tensor and not isinstance(node, np.ndarray):
            return node
        if id(node) not in names:
            held.append(node)
            names[id(node)] = str(len(names))
            arrays[names[id(node)]] = _to_array(node) if is_tensor else node
        entry = {"array": names[id(node)]}
        return entry | {"tensor": str(node.dtype).rpartition(".")[2]} if is_tensor else entry

    plain = walk(value)
    arrays[_BLOB] = np.frombuffer(bytes(blob), np.uint8)
    return arrays, plain


def unpack(arrays: Mapping[str, NDArray[Any]], plain: Any, device: Any) -> Any:
    """Put together what `pack` took apart; tensors come back on `device`."""
    made: dict[str, Any] = {}
    blob = arrays[_BLOB].tobytes()

    def walk(node: Any) -> Any:
        if isinstance(node, list):
            return [walk(child) for child in node]
        if not isinstance(node, dict):
            return node
        if "map" in node:
            return {key: walk(child) for key, child in node["map"].items()}
        if "bytes" in node:
            return blob[slice(*node["bytes"])]
        name = node["array"]
        if name not in made:
            array = arrays[name]
            made[name] = _to_tensor(array, node["tensor"], device) if "tensor" in node else array
        return made[name]

    return walk(plain)


def _to_array(tensor: Any) -> NDArray[Any]:
    import torch

    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:  # which NumPy does not have
        tensor = tensor.view(torch.int16)
    return np.asarray(tensor.numpy())


def _to_tensor(array: NDArray[Any], dtype: str, device: Any) -> Any:
    import torch

    tensor = torch.from_numpy(np.array(array))
    return (tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor).to(device)
