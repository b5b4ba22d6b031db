"""What the baselines share: how they are called and how their bits are counted.

A baseline stores nothing for free that belongs to a text: codes, scales, zero points, and, as this project's shards
have them, a header of 144 bytes per layer and chunk of 256 tokens (half to K, half to V) and the first token of the
sequence exactly, at 16 bits an entry.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

from traces import Floats, Trace

CHUNK_TOKENS = 256
HEADER_BYTES = 144
RAW_TOKENS = 1
RAW_BITS = 16


@dataclasses.dataclass(frozen=True)
class Coded:
    """K or V of one layer: what a decoder gives, and the bits that it needs, header excluded."""

    values: Floats  # [tokens, kv_heads, head_dim]
    bits: int


class Codec(Protocol):
    name: str
    options: str  # of the results' column of that name

    def layers(self, trace: Trace) -> list[int]:
        """The layers that it can code, in order."""
        ...

    def code(self, trace: Trace, layer: int) -> tuple[Coded, Coded]:
        """K and V of a layer."""
        ...


class PlainCodec:
    """A baseline that needs nothing but the tensors: it codes any layer."""

    name = ""
    options = ""

    def layers(self, trace: Trace) -> list[int]:
        return list(trace.layers)


def header_bits(tokens: int) -> int:
    """Of K or V of one layer."""
    return -(-tokens // CHUNK_TOKENS) * HEADER_BYTES * 8 // 2


def to_half(values: Floats) -> Floats:
    """As a stored fp16 reads; what is beyond its range becomes its largest number."""
    limit = np.float32(65504)
    return np.clip(values, -limit, limit).astype(np.float16).astype(np.float32)


def affine(values: Floats, bits: int, axis: int) -> Floats:
    """Asymmetric integers: one fp16 scale and one fp16 zero point (the minimum) for all values along `axis`."""
    levels = (1 << bits) - 1
    low = values.min(axis=axis, keepdims=True)
    zero = to_half(low)
    scale = to_half((values.max(axis=axis, keepdims=True) - low) / np.float32(levels))
    digits = np.clip(np.rint((values - zero) / np.where(scale > 0, scale, 1)), 0, levels)
    return digits.astype(np.float32) * scale + zero


AFFINE_BITS = 32  # of the scale and the zero point


def with_raw_tokens(values: Floats, coded: Floats, raw: slice) -> Floats:
    """`coded` with the tokens of `raw` exactly."""
    result = coded.copy()
    result[raw] = values[raw]
    return result
