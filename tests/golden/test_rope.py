"""The rotary embedding in the Python decoder: values by scalar sums of FORMAT.md section 3.3, and every check."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import numpy as np
import pytest

from decode_kvs import FormatError, decode_shard
from kvs_rope import SCALINGS
from make_kvs import Block, ShardSpec, make_shard

FP8_PROFILE = 1
ROPES: dict[str, tuple[float, ...]] = {
    "none": (),
    "linear": (4.0,),
    "ntk": (2.5,),
    "yarn": (4.0, 64.0, 8.0, 1.0),
    "llama3": (8.0, 64.0, 1.0, 4.0),
    "yarn-untruncated": (4.0, 64.0, 8.0, 1.0),
}


def record(payload: bytes, kind: int = 1, size: int | None = None, reserved: int = 0) -> bytes:
    return struct.pack("<HHI", kind, len(payload) if size is None else size, reserved) + payload


def rope_payload(
    scaling: str = "none",
    numbers: Sequence[float] | None = None,
    theta: float = 100.0,
    rotary_dim: int = 8,
    pairing: int = 0,
    offset: int = 0,
) -> bytes:
    given = ROPES[scaling] if numbers is None else numbers
    head = struct.pack("<dHBBi", theta, rotary_dim, pairing, SCALINGS.index(scaling), offset)
    return head + struct.pack(f"<{len(given)}d", *given)


def frequency(scaling: str, theta: float, r: int, j: int) -> float:
    w = math.pow(theta, -2 * j / r)
    numbers = ROPES[scaling]
    if scaling == "none":
        return w
    if scaling == "linear":
        return w / numbers[0]
    if scaling == "ntk":
        return math.pow(theta * math.pow(numbers[0], r / (r - 2)), -2 * j / r)
    factor, context, first, second = numbers
    if scaling == "llama3":
        n = context * w / (2 * math.pi)
        if n < first:
            return w / factor
        c = (n - first) / (second - first)
        return w if n > second else (1 - c) * w / factor + c * w
    x = r * math.log(context / (2 * math.pi * first)) / (2 * math.log(theta))
    y = r * math.log(context / (2 * math.pi * second)) / (2 * math.log(theta))
    if scaling == "yarn":
        x, y = math.floor(x), math.ceil(y)
    x, y = max(0, x), min(r - 1, y)
    s = min(1, max(0, (j - x) / ((y - x) or 0.001)))
    return s * w / factor + (1 - s) * w


def shard_of(extensions: bytes, first_token: int = 0) -> bytes:
    """Two tokens of one head: a raw row of ones, then fp8 codes 1.0 (0x38) in the order of the channels, K and V."""
    raw = np.ones(10, "<f2").tobytes()
    codes = bytes([0x38, 0x40, 0xB8, 0x30, 0x38, 0x44, 0x28, 0xC0, 0x38, 0x40])
    block = Block(raw=raw, code=2, exponent=8, codes=codes)
    spec = ShardSpec([block, block], profile=FP8_PROFILE, head_dim=10, tokens=2, raw_rows=1)
    spec.extensions, spec.first_token = extensions, first_token
    return make_shard(spec)


@pytest.mark.parametrize("pairing", [0, 1])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_coded_rows_of_k_are_turned(scaling: str, pairing: int) -> None:
    plain = decode_shard(shard_of(b"", 70)).k[1, 0].astype(float)
    assert plain[:4].tolist() == [1, 2, -1, 0.5]
    decoded = decode_shard(shard_of(record(rope_payload(scaling, pairing=pairing, offset=-30)), 70))
    expected = plain.copy()
    for j in range(4):
        a, b = (2 * j, 2 * j + 1) if pairing else (j, j + 4)
        angle = (70 + 1 - 30) * frequency(scaling, 100.0, 8, j)
        expected[a] = plain[a] * math.cos(angle) - plain[b] * math.sin(angle)
        expected[b] = plain[b] * math.cos(angle) + plain[a] * math.sin(angle)
    np.testing.assert_allclose(decoded.k[1, 0], expected, atol=1e-6)
    assert (decoded.k[0] == 1).all()  # a raw row
    assert decoded.v is not None
    np.testing.assert_array_equal(decoded.v[1, 0], plain)


BAD = [
    ("extension.type", record(rope_payload(), kind=3)),
    ("extension.size", record(rope_payload("linear"), kind=2)),
    ("extension.basis", record(rope_payload(), kind=2)),
    ("extension.type", record(rope_payload(), kind=0)),
    ("extension.type", record(rope_payload()) * 2),
    ("extension.size", record(rope_payload(), size=12)),
    ("extension.size", record(rope_payload(), size=24)),
    ("extension.size", record(rope_payload()[:8])),
    ("extension.size", record(rope_payload("linear", numbers=()))),
    ("extension.size", record(rope_payload("none", numbers=(1.0,)))),
    ("extension.reserved", record(rope_payload(), reserved=1)),
    ("extension.rope.theta", record(rope_payload(theta=1.0))),
    ("extension.rope.theta", record(rope_payload(theta=math.nan))),
    ("extension.rope.theta", record(rope_payload(theta=math.inf))),
    ("extension.rope.rotary_dim", record(rope_payload(rotary_dim=0))),
    ("extension.rope.rotary_dim", record(rope_payload(rotary_dim=7))),
    ("extension.rope.rotary_dim", record(rope_payload(rotary_dim=12))),
    ("extension.rope.rotary_dim", record(rope_payload("ntk", rotary_dim=2))),
    ("extension.rope.pairing", record(rope_payload(pairing=2))),
    ("extension.rope.scaling", record(rope_payload()[:11] + b"\6" + rope_payload()[12:])),
    ("extension.rope.factor", record(rope_payload("linear", numbers=(0.5,)))),
    ("extension.rope.factor", record(rope_payload("ntk", numbers=(math.nan,)))),
    ("extension.rope.original_max_position", record(rope_payload("yarn", numbers=(2, 0, 32, 1)))),
    ("extension.rope.beta_slow", record(rope_payload("yarn", numbers=(2, 64, 32, 0)))),
    ("extension.rope.beta_fast", record(rope_payload("yarn-untruncated", numbers=(2, 64, 1, 2)))),
    ("extension.rope.low_freq_factor", record(rope_payload("llama3", numbers=(2, 64, -1, 4)))),
    ("extension.rope.high_freq_factor", record(rope_payload("llama3", numbers=(2, 64, 4, 4)))),
]


@pytest.mark.parametrize(("field", "extensions"), BAD, ids=[f"{i}-{field}" for i, (field, _) in enumerate(BAD)])
def test_violation_names_its_field(field: str, extensions: bytes) -> None:
    with pytest.raises(FormatError) as error:
        decode_shard(shard_of(extensions))
    assert error.value.field == field
