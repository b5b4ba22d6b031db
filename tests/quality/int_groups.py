"""Integers by groups of neighbouring channels of one token and head.

int4: asymmetric, round to nearest, as inference engines offer it (scale and zero point in fp16).
q4_0, q8_0: the block formats of llama.cpp, symmetric, groups of 32 with one fp16 scale
(https://github.com/ggml-org/llama.cpp, ggml-quants.c), which it offers for its KV cache.
"""

from __future__ import annotations

import numpy as np

from codec import AFFINE_BITS, RAW_BITS, RAW_TOKENS, Coded, PlainCodec, affine, to_half, with_raw_tokens
from traces import Floats, Trace


class IntGroups(PlainCodec):
    """Codes rows of `group` values; subclasses say how."""

    scale_bits = 16

    def __init__(self, name: str, bits: int, group: int, options: str = "") -> None:
        self.name, self.bits, self.group, self.options = name, bits, group, options

    def code_groups(self, groups: Floats) -> Floats:
        raise NotImplementedError

    def code_kind(self, values: Floats) -> Coded:
        group = min(self.group, values.shape[2])
        coded = self.code_groups(values.reshape(-1, group)).reshape(values.shape)
        raw = values[:RAW_TOKENS].size
        entries = values.size - raw
        bits = raw * RAW_BITS + entries * self.bits + entries // group * self.scale_bits
        return Coded(with_raw_tokens(values, coded, slice(RAW_TOKENS)), bits)

    def code(self, trace: Trace, layer: int) -> tuple[Coded, Coded]:
        return self.code_kind(trace.layers[layer].k), self.code_kind(trace.layers[layer].v)


class Asymmetric(IntGroups):
    scale_bits = AFFINE_BITS

    def __init__(self, bits: int, group: int) -> None:
        super().__init__(f"int{bits}", bits, group, f"group={group}")

    def code_groups(self, groups: Floats) -> Floats:
        return affine(groups, self.bits, axis=1)


class Q4(IntGroups):
    """The value of largest magnitude is level -8, exactly but for its scale's rounding."""

    def __init__(self) -> None:
        super().__init__("q4_0", 4, 32)

    def code_groups(self, groups: Floats) -> Floats:
        largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)
        scale = largest / np.float32(-8)
        inverse = np.where(scale != 0, 1 / np.where(scale != 0, scale, 1), 0)
        digits = np.clip(np.floor(groups * inverse + np.float32(8.5)), 0, 15)
        return np.asarray((digits - 8) * to_half(scale), np.float32)


class Q8(IntGroups):
    def __init__(self) -> None:
        super().__init__("q8_0", 8, 32)

    def code_groups(self, groups: Floats) -> Floats:
        scale = np.abs(groups).max(axis=1, keepdims=True) / np.float32(127)
        digits = np.rint(groups / np.where(scale > 0, scale, 1))
        return digits.astype(np.float32) * to_half(scale)
