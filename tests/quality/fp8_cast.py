"""fp8 as engines cast it (the fp8 KV cache of vLLM, TensorRT-LLM): e4m3, one fp32 scale per layer, kind and chunk."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from codec import CHUNK_TOKENS, RAW_BITS, RAW_TOKENS, Coded, PlainCodec, with_raw_tokens
from traces import Floats, Trace

_LARGEST = np.float32(448)
_SCALE_BITS = 32


def to_e4m3(values: Floats) -> Floats:
    """Rounded to the nearest; magnitudes above 448 saturate."""
    return np.clip(values, -_LARGEST, _LARGEST).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


class Fp8Cast(PlainCodec):
    name = "fp8_cast"

    def code_kind(self, values: Floats) -> Coded:
        coded = np.empty_like(values)
        bits = 0
        for first in range(0, len(values), CHUNK_TOKENS):
            chunk = values[first : first + CHUNK_TOKENS]
            scale = np.float32(np.abs(chunk).max()) / _LARGEST
            coded[first : first + CHUNK_TOKENS] = to_e4m3(chunk / (scale or 1)) * scale
            bits += _SCALE_BITS
        raw = values[:RAW_TOKENS].size
        bits += raw * RAW_BITS + (values.size - raw) * 8
        return Coded(with_raw_tokens(values, coded, slice(RAW_TOKENS)), bits)

    def code(self, trace: Trace, layer: int) -> tuple[Coded, Coded]:
        return self.code_kind(trace.layers[layer].k), self.code_kind(trace.layers[layer].v)
