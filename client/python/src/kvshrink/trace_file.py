"""Captured tensors as a trace file: safetensors with `layer.{i}.k`, `.v` and, where there are queries, `.q`."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from kvshrink.errors import InvalidArgument
from kvshrink.tensors import array_bytes
from kvshrink.types import Array

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_NAMES: dict[np.dtype[Any], str] = {
    np.dtype("<f4"): "F32",
    np.dtype("<f2"): "F16",
    _BFLOAT16: "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
}


def _convert(tensor: Any, argument: str) -> Array:
    """By what the tensor's library offers, without importing that library."""
    try:
        if hasattr(tensor, "__array__"):
            return np.asarray(tensor)
        if hasattr(tensor, "__dlpack__"):
            return np.from_dlpack(tensor)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise InvalidArgument(
            f"argument '{argument}' doesn't convert to an array: {error}. A torch tensor must be on the CPU and "
            "detached; bfloat16 goes as its bits: tensor.view(torch.uint16)"
        ) from error
    raise InvalidArgument(f"argument '{argument}' is a {type(tensor).__name__}: must be an array or a tensor")


def to_array(tensor: Any, argument: str) -> Array:
    """An array of a dtype that traces have: numpy arrays, torch tensors, and what else speaks __array__ or DLPack.

    uint16 is read as the bits of bfloat16; float64 is rounded to float32. The array may share the tensor's memory.
    """
    array = tensor if isinstance(tensor, np.ndarray) else _convert(tensor, argument)
    if array.dtype == np.uint16:
        return array.view(_BFLOAT16)
    if array.dtype == np.float64:
        return array.astype("<f4")
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    if array.dtype not in _NAMES:
        raise InvalidArgument(
            f"argument '{argument}' has dtype {array.dtype}: must be float16, float32, float64, bfloat16 (or its bits "
            "as uint16) or float8_e4m3fn"
        )
    return array


def _check_layer(k: Array, v: Array | None, q: Array | None, tokens: int | None, argument: str) -> None:
    for name, array in (("k", k), ("v", v), ("q", q)):
        if array is not None and (array.ndim != 3 or array.size == 0):
            raise InvalidArgument(
                f"argument '{argument}.{name}' has shape {array.shape}: must be [tokens, heads, head_dim], none 0"
            )
    if v is not None and v.shape != k.shape:
        raise InvalidArgument(f"argument '{argument}.v' has shape {v.shape}: that of k is {k.shape}")
    if v is not None and v.dtype != k.dtype:
        raise InvalidArgument(f"argument '{argument}.v' has dtype {v.dtype}: that of k is {k.dtype}")
    if tokens is not None and len(k) != tokens:
        raise InvalidArgument(f"argument '{argument}.k' has shape {k.shape}: the layers before have {tokens} tokens")
    if q is None:
        return
    if q.shape[2] != k.shape[2]:
        raise InvalidArgument(f"argument '{argument}.q' has shape {q.shape}: the head_dim of k is {k.shape[2]}")
    if q.shape[1] % k.shape[1]:
        raise InvalidArgument(
            f"argument '{argument}.q' has shape {q.shape}: must have a multiple of {k.shape[1]} heads"
        )
    if len(q) > len(k):
        raise InvalidArgument(f"argument '{argument}.q' has shape {q.shape}: there are {len(k)} tokens")


def trace_arrays(layers: Mapping[int, Sequence[Any]]) -> dict[str, Array]:
    """The tensors of a trace by their names, checked. `layers`: number -> (k, v) or (k, v, q); v and q may be None."""
    if not isinstance(layers, Mapping) or not layers:
        raise InvalidArgument(
            f"argument 'layers' is {type(layers).__name__} of {len(layers)}: must map layers to tensors"
        )
    arrays: dict[str, Array] = {}
    tokens: int | None = None
    for layer in sorted(layers):
        argument = f"layers[{layer}]"
        if isinstance(layer, bool) or not isinstance(layer, (int, np.integer)) or layer < 0:
            raise InvalidArgument(f"argument '{argument}' has that key: must be the number of a layer")
        tensors = layers[layer]
        if not isinstance(tensors, Sequence) or len(tensors) not in (2, 3):
            raise InvalidArgument(f"argument '{argument}' is a {type(tensors).__name__}: must be (k, v) or (k, v, q)")
        k = to_array(tensors[0], f"{argument}.k")
        v = to_array(tensors[1], f"{argument}.v") if tensors[1] is not None else None
        q = to_array(tensors[2], f"{argument}.q") if len(tensors) == 3 and tensors[2] is not None else None
        _check_layer(k, v, q, tokens, argument)
        tokens = len(k)
        for name, array in (("k", k), ("v", v), ("q", q)):
            if array is not None:
                arrays[f"layer.{layer}.{name}"] = array
    return arrays


def write_trace(path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """A safetensors file (https://huggingface.co/docs/safetensors/index#format)."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays.values():
            file.write(array_bytes(array))
