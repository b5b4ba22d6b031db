"""KIVI (arXiv 2402.02750): K per channel in groups of 32 tokens, V per token in groups of 32 channels, both asymmetric
with fp16 scale and zero point; a window of the last tokens stays in fp16 and is charged. The paper's window is 128.
"""

from __future__ import annotations

import numpy as np

from codec import AFFINE_BITS, RAW_BITS, RAW_TOKENS, Coded, PlainCodec, affine
from traces import Floats, Trace

_GROUP = 32


class Kivi(PlainCodec):
    def __init__(self, bits: int, window: int) -> None:
        self.name, self.options = f"kivi{bits}", f"window={window}"
        self.bits, self.window = bits, window

    def _coded_range(self, values: Floats) -> slice:
        return slice(RAW_TOKENS, max(RAW_TOKENS, len(values) - self.window))

    def _finish(self, values: Floats, coded: Floats, groups: int) -> Coded:
        """`coded` holds the tokens of the coded range."""
        at = self._coded_range(values)
        result = values.copy()
        result[at] = coded
        bits = coded.size * self.bits + groups * AFFINE_BITS + (values.size - coded.size) * RAW_BITS
        return Coded(result, bits)

    def code_keys(self, values: Floats) -> Coded:
        """Groups begin at multiples of 32 tokens, so that the first one lacks the token that is kept."""
        at = self._coded_range(values)
        parts = []
        first = at.start
        while first < at.stop:
            last = min(at.stop, (first // _GROUP + 1) * _GROUP)
            parts.append(affine(values[first:last], self.bits, axis=0))
            first = last
        coded = np.concatenate(parts) if parts else values[at]
        return self._finish(values, coded, len(parts) * values[0].size)

    def code_values(self, values: Floats) -> Coded:
        rows = values[self._coded_range(values)]
        coded = affine(rows.reshape(-1, _GROUP), self.bits, axis=1).reshape(rows.shape)
        return self._finish(values, coded, rows.size // _GROUP)

    def code(self, trace: Trace, layer: int) -> tuple[Coded, Coded]:
        return self.code_keys(trace.layers[layer].k), self.code_values(trace.layers[layer].v)
