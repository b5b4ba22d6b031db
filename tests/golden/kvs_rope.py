"""The extensions of a KVS1 shard and the rotary embedding: FORMAT.md sections 3.2 and 3.3."""

from __future__ import annotations

import dataclasses
import struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvs_error import FormatError, require

Floats = npt.NDArray[np.float64]

SCALINGS = ("none", "linear", "ntk", "yarn", "llama3", "yarn-untruncated")
NUMBERS = (0, 1, 1, 4, 4, 4)


@dataclasses.dataclass(frozen=True)
class Rope:
    theta: float
    rotary_dim: int
    gptj: bool
    scaling: str
    position_offset: int
    numbers: tuple[float, ...]


class Extensions(NamedTuple):
    rope: Rope | None = None
    basis: bytes | None = None  # the id of a calibrated basis


def read_extensions(data: bytes | memoryview, head_dim: int) -> Extensions:
    """The records of section 3.2."""
    found, last_type = Extensions(), 0
    while len(data):
        require(len(data) >= 8, "extension.size", len(data), "a record begins with 8 bytes")
        kind, size, reserved = struct.unpack_from("<HHI", data)
        require(kind > last_type, "extension.type", kind, "types must ascend from 1 on, each once")
        last_type = kind
        fits = size % 8 == 0 and size <= len(data) - 8
        require(fits, "extension.size", size, f"must be a multiple of 8, at most {len(data) - 8}")
        require(reserved == 0, "extension.reserved", reserved, "must be 0")
        payload = data[8 : 8 + size]
        if kind == 1:
            found = found._replace(rope=read_rope(payload, head_dim))
        elif kind == 2:
            require(size == 16, "extension.size", size, "must be 16 for a basis")
            found = found._replace(basis=bytes(payload))
        else:
            raise FormatError("extension.type", kind, "unknown to version 1")
        data = data[8 + size :]
    return found


def read_rope(payload: bytes | memoryview, head_dim: int) -> Rope:
    require(len(payload) >= 16, "extension.size", len(payload), "must be at least 16")
    theta, rotary_dim, pairing, scaling, offset = struct.unpack_from("<dHBBi", payload)
    count = NUMBERS[scaling] if scaling < len(NUMBERS) else 0
    require(len(payload) == 16 + 8 * count, "extension.size", len(payload), f"must be {16 + 8 * count}")
    numbers = struct.unpack_from(f"<{count}d", payload, 16)
    require(1 < theta <= 1e15, "extension.rope.theta", theta, "must be above 1, at most 1e15")
    require(pairing < 2, "extension.rope.pairing", pairing, "must be 0 or 1")
    require(scaling < len(SCALINGS), "extension.rope.scaling", scaling, "must be 0..5")
    least = 4 if SCALINGS[scaling] == "ntk" else 2
    fits = least <= rotary_dim <= head_dim and rotary_dim % 2 == 0
    require(fits, "extension.rope.rotary_dim", rotary_dim, f"must be even, {least}..{head_dim}")
    check_numbers(SCALINGS[scaling], numbers)
    return Rope(theta, rotary_dim, pairing == 1, SCALINGS[scaling], offset, numbers)


def check_numbers(scaling: str, numbers: tuple[float, ...]) -> None:
    if not numbers:
        return
    require(1 <= numbers[0] <= 1e6, "extension.rope.factor", numbers[0], "must be 1..1e6")
    if len(numbers) == 1:
        return
    require(1 <= numbers[1] <= 2**31, "extension.rope.original_max_position", numbers[1], "must be 1..2^31")
    first, second = numbers[2:]
    if scaling == "llama3":
        require(0 < first <= 1e6, "extension.rope.low_freq_factor", first, "must be above 0, at most 1e6")
        require(first < second <= 1e6, "extension.rope.high_freq_factor", second, "must be above the low one")
    else:
        require(0 < second <= 1e6, "extension.rope.beta_slow", second, "must be above 0, at most 1e6")
        require(second <= first <= 1e6, "extension.rope.beta_fast", first, "must be at least beta_slow")


def frequencies(rope: Rope) -> Floats:
    """Radians per position of each pair: the table of section 3.3."""
    r = rope.rotary_dim
    power = -np.arange(0, r, 2) / r
    w: Floats = rope.theta**power
    if rope.scaling == "none":
        return w
    factor = rope.numbers[0]
    if rope.scaling == "linear":
        return w / factor
    if rope.scaling == "ntk":
        return np.asarray((rope.theta * factor ** (r / (r - 2))) ** power)
    context = rope.numbers[1]
    if rope.scaling == "llama3":
        a, b = rope.numbers[2:]
        turns = context * w / (2 * np.pi)
        c = np.clip((turns - a) / (b - a), 0, 1)
        return np.asarray((1 - c) * w / factor + c * w)
    x, y = (r * np.log(context / (2 * np.pi * beta)) / (2 * np.log(rope.theta)) for beta in rope.numbers[2:])
    if rope.scaling == "yarn":
        x, y = np.floor(x), np.ceil(y)
    x, y = max(0.0, x), min(r - 1.0, y)
    ramp = np.clip((np.arange(r // 2) - x) / ((y + 0.001 if x == y else y) - x), 0, 1)
    return np.asarray(ramp * w / factor + (1 - ramp) * w)


def embed(rope: Rope, first_position: int, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Consecutive rows, the first being at `first_position` before the offset, turned."""
    half = rope.rotary_dim // 2
    positions = first_position + rope.position_offset + np.arange(len(rows), dtype=np.float64)
    angle = positions[:, None] * frequencies(rope)
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if rope.gptj else (slice(half), slice(half, 2 * half))
    )
    out = rows.astype(np.float64)
    u, w = out[:, first].copy(), out[:, second].copy()
    out[:, first] = u * np.cos(angle) - w * np.sin(angle)
    out[:, second] = w * np.cos(angle) + u * np.sin(angle)
    largest = float(np.finfo(np.float32).max)
    return np.clip(out, -largest, largest).astype(np.float32)
