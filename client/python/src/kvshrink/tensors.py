"""numpy arrays as the protocol's tensors, and back."""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import ml_dtypes
import numpy as np

from kvshrink.errors import DataLoss, InvalidArgument
from kvshrink.types import Array
from kvshrink.v1 import types_pb2 as types

LayoutName = Literal["THD", "HTD", "BNHD", "BHND"]
DTypeName = Literal["fp32", "fp16", "bf16", "fp8_e4m3"]

_NUMPY: dict[types.DType, np.dtype[Any]] = {
    types.DTYPE_FP32: np.dtype("<f4"),
    types.DTYPE_FP16: np.dtype("<f2"),
    types.DTYPE_BF16: np.dtype(ml_dtypes.bfloat16),
    types.DTYPE_FP8_E4M3: np.dtype(ml_dtypes.float8_e4m3fn),
}
_AXES = {"THD": 3, "HTD": 3, "BNHD": 4, "BHND": 4}


def dtype_number(name: str | None) -> types.DType:
    """None is the original's."""
    if name is None:
        return types.DTYPE_UNSPECIFIED
    known = [key.removeprefix("DTYPE_").lower() for key, number in types.DType.items() if number]
    if name not in known:
        raise InvalidArgument(f"argument 'dtype' is {name!r}: must be one of {', '.join(known)}")
    return cast(types.DType, types.DType.Value(f"DTYPE_{name.upper()}"))


def packed_layout(name: str) -> types.Layout:
    """The layout of a tensor that an answer brings."""
    if name not in ("THD", "HTD"):
        raise InvalidArgument(f"argument 'layout' is {name!r}: must be THD or HTD")
    return types.Layout(order=f"ORDER_{name}")


def array_dtype(array: Array, argument: str) -> types.DType:
    if not isinstance(array, np.ndarray):
        raise InvalidArgument(f"argument '{argument}' is a {type(array).__name__}: must be a numpy array")
    for number, dtype in _NUMPY.items():
        if array.dtype == dtype:
            return number
    raise InvalidArgument(
        f"argument '{argument}' has dtype {array.dtype}: must be float32, float16, bfloat16 or float8_e4m3fn"
    )


def array_bytes(array: Array) -> memoryview:
    """A view where the array is contiguous, else of a copy."""
    return memoryview(cast(Any, np.ascontiguousarray(array).reshape(-1).view(np.uint8))).toreadonly()


def _shape(array: Array, layout: str, tokens: int | None) -> tuple[types.Shape, int, int]:
    """Shape, tokens of a page (0: no pages), and elements up to the end of the last token."""
    if layout in ("THD", "HTD"):
        if tokens is not None:
            raise InvalidArgument(f"argument 'tokens' is {tokens}: is for paged layouts only")
        t, h, d = array.shape if layout == "THD" else (array.shape[1], array.shape[0], array.shape[2])
        return types.Shape(tokens=t, kv_heads=h, head_dim=d), 0, array.size
    pages, n, h, d = array.shape if layout == "BNHD" else tuple(array.shape[i] for i in (0, 2, 1, 3))
    t = pages * n if tokens is None else tokens
    if not (pages - 1) * n < t <= pages * n:
        raise InvalidArgument(f"argument 'tokens' is {t}: {pages} pages of {n} hold {(pages - 1) * n + 1}..{pages * n}")
    rows = t - (pages - 1) * n
    last_page = rows * h * d if layout == "BNHD" else ((h - 1) * n + rows) * d
    return types.Shape(tokens=t, kv_heads=h, head_dim=d), n, (pages - 1) * n * h * d + last_page


def pack_kv(
    k: Array, v: Array | None, layout: str, tokens: int | None, argument: str
) -> tuple[types.TensorSpec, list[memoryview]]:
    """Spec and body of a layer: K, then V unless that is None. `argument` names the layer in errors."""
    if layout not in _AXES:
        raise InvalidArgument(f"argument 'layout' is {layout!r}: must be one of {', '.join(_AXES)}")
    dtype = array_dtype(k, f"{argument}.k")
    if v is not None and array_dtype(v, f"{argument}.v") != dtype:
        raise InvalidArgument(f"argument '{argument}.v' has dtype {v.dtype}: that of k is {k.dtype}")
    if k.ndim != _AXES[layout]:
        raise InvalidArgument(f"argument '{argument}.k' has shape {k.shape}: {layout} has {_AXES[layout]} axes")
    if v is not None and v.shape != k.shape:
        raise InvalidArgument(f"argument '{argument}.v' has shape {v.shape}: that of k is {k.shape}")
    if k.size == 0:
        raise InvalidArgument(f"argument '{argument}.k' has shape {k.shape}: must not be empty")
    shape, page_tokens, extent = _shape(k, layout, tokens)
    spec = types.TensorSpec(
        dtype=dtype,
        shape=shape,
        layout=types.Layout(order=f"ORDER_{layout}", page_tokens=page_tokens),
        keys_only=v is None,
    )
    size = extent * k.dtype.itemsize
    return spec, [array_bytes(array)[:size] for array in (k, v) if array is not None]


def unpack_kv(spec: types.TensorSpec, body: bytes) -> tuple[Array, Array | None]:
    """K and V (None: keys only) of a decoded answer, as read-only arrays over its bytes."""
    dtype = _NUMPY.get(spec.dtype)
    if dtype is None:
        raise DataLoss(f"field 'tensor.dtype' is {spec.dtype}: is not known to this client")
    t, h, d = spec.shape.tokens, spec.shape.kv_heads, spec.shape.head_dim
    order = spec.layout.order
    if order not in (types.ORDER_UNSPECIFIED, types.ORDER_THD, types.ORDER_HTD):
        raise DataLoss(f"field 'tensor.layout.order' is {order}: was not asked for")
    shape = (h, t, d) if order == types.ORDER_HTD else (t, h, d)
    size = math.prod(shape) * dtype.itemsize
    expected, offsets = (size, (0,)) if spec.keys_only else (2 * size, (0, size))
    if len(body) != expected or spec.v_offset_bytes not in offsets:
        what = "K" if spec.keys_only else "K and V"
        raise DataLoss(f"field 'body_bytes' is {len(body)}: {what} of shape {shape} are {expected}")
    k = np.frombuffer(body, dtype, math.prod(shape), 0).reshape(shape)
    if spec.keys_only:
        return k, None
    v = np.frombuffer(body, dtype, math.prod(shape), size).reshape(shape)
    return k, v
