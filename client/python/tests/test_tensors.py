"""Arrays to tensors: what is sent, and that what doesn't fit is named before anything is sent."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from kvshrink import DataLoss, InvalidArgument
from kvshrink.tensors import pack_kv, unpack_kv
from kvshrink.v1 import types_pb2 as types


def numbered(*shape: int, dtype: Any = np.float32) -> Any:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def element(spec: types.TensorSpec, body: bytes, token: int, head: int, channel: int) -> float:
    """K's element by the formula of the protocol, with the packed strides of the order."""
    h, d, n = spec.shape.kv_heads, spec.shape.head_dim, spec.layout.page_tokens
    strides = {
        types.ORDER_THD: (0, h * d, d),
        types.ORDER_HTD: (0, d, spec.shape.tokens * d),
        types.ORDER_BNHD: (n * h * d, h * d, d),
        types.ORDER_BHND: (n * h * d, d, n * d),
    }[spec.layout.order]
    page, row = divmod(token, n) if n else (0, token)
    return float(np.frombuffer(body, np.float32)[page * strides[0] + row * strides[1] + head * strides[2] + channel])


@pytest.mark.parametrize(
    ("layout", "shape", "axes", "tokens"),
    [
        ("THD", (5, 2, 3), (0, 1, 2), 5),
        ("HTD", (2, 5, 3), (1, 0, 2), 5),
        ("BNHD", (2, 4, 2, 3), None, 7),
        ("BHND", (2, 2, 4, 3), None, 6),
        ("BHND", (1, 2, 4, 3), None, 1),
    ],
)
def test_body_is_what_the_layout_says(layout: str, shape: Any, axes: Any, tokens: int) -> None:
    k = numbered(*shape)
    spec, body = pack_kv(k, -k, layout, tokens if axes is None else None, "layers[0]")
    assert spec.shape == types.Shape(tokens=tokens, kv_heads=2, head_dim=3)
    assert spec.v_offset_bytes == 0
    assert body[0].nbytes == body[1].nbytes
    if axes is not None:
        plain = k.transpose(axes)
    else:
        plain = (k if layout == "BNHD" else k.transpose(0, 2, 1, 3)).reshape(-1, 2, 3)
    for t in range(tokens):
        for h in range(2):
            for c in range(3):
                assert element(spec, bytes(body[0]), t, h, c) == plain[t, h, c]
    last = body[0].nbytes // 4 - 1  # nothing is sent beyond the last token's last element
    assert np.frombuffer(body[0], np.float32)[last] == plain[tokens - 1, 1, 2]


def test_a_view_is_sent_as_it_reads() -> None:
    k = numbered(3, 5, 2).transpose(1, 2, 0)
    _, body = pack_kv(k, k, "THD", None, "layers[0]")
    np.testing.assert_array_equal(np.frombuffer(body[0], np.float32).reshape(5, 2, 3), k)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize("layout", ["THD", "HTD"])
def test_there_and_back(dtype: Any, layout: str) -> None:
    k, v = numbered(3, 2, 4, dtype=dtype), numbered(3, 2, 4, dtype=dtype) + 1
    spec, body = pack_kv(k, v, layout, None, "layers[0]")
    got_k, got_v = unpack_kv(spec, b"".join(body))
    assert got_k.dtype == k.dtype
    np.testing.assert_array_equal(got_k, k)
    np.testing.assert_array_equal(got_v, v)


@pytest.mark.parametrize("layout", ["THD", "HTD"])
def test_keys_alone(layout: str) -> None:
    k = numbered(3, 2, 4)
    spec, body = pack_kv(k, None, layout, None, "layers[0]")
    assert spec.keys_only
    assert b"".join(body) == k.tobytes()
    got, values = unpack_kv(spec, k.tobytes())
    np.testing.assert_array_equal(got, k)
    assert values is None
    with pytest.raises(DataLoss, match="body_bytes"):
        unpack_kv(spec, k.tobytes() * 2)
    assert not pack_kv(k, k, layout, None, "layers[0]")[0].keys_only


GOOD = numbered(4, 2, 3)
BAD: list[tuple[str, tuple[Any, Any, Any, Any]]] = [
    (r"'layers\[0\].k' has dtype float64", (GOOD.astype(np.float64), GOOD, "THD", None)),
    (r"'layers\[0\].k' has dtype >f4", (GOOD.astype(">f4"), GOOD, "THD", None)),
    (r"'layers\[0\].k' is a list", ([1.0], GOOD, "THD", None)),
    (r"'layers\[0\].v' has dtype float16", (GOOD, GOOD.astype(np.float16), "THD", None)),
    (r"'layers\[0\].k' has shape \(8, 3\)", (GOOD.reshape(8, 3), GOOD, "THD", None)),
    (r"'layers\[0\].k' has shape \(4, 2, 3\): BNHD has 4 axes", (GOOD, GOOD, "BNHD", None)),
    (r"'layers\[0\].v' has shape \(3, 2, 3\)", (GOOD, GOOD[:3], "THD", None)),
    (r"'layers\[0\].k' has shape \(0, 2, 3\)", (GOOD[:0], GOOD[:0], "THD", None)),
    (r"'layout' is 'DHT'", (GOOD, GOOD, "DHT", None)),
    (r"'tokens' is 4", (GOOD, GOOD, "THD", 4)),
    (r"'tokens' is 4: 2 pages of 4 hold 5..8", (numbered(2, 4, 1, 3), numbered(2, 4, 1, 3), "BNHD", 4)),
    (r"'tokens' is 9", (numbered(2, 4, 1, 3), numbered(2, 4, 1, 3), "BNHD", 9)),
]


@pytest.mark.parametrize(("message", "arguments"), BAD, ids=[message for message, _ in BAD])
def test_what_does_not_fit_is_named(message: str, arguments: tuple[Any, Any, Any, Any]) -> None:
    with pytest.raises(InvalidArgument, match=message):
        pack_kv(*arguments, "layers[0]")


def test_answer_of_the_wrong_size_is_refused() -> None:
    spec, body = pack_kv(GOOD, GOOD, "THD", None, "layers[0]")
    with pytest.raises(DataLoss, match="body_bytes"):
        unpack_kv(spec, b"".join(body)[:-1])
