"""A codec in the manner of KVTC, "KV cache transform coding" (NVIDIA, arXiv 2511.01815).

As the paper has it: the rotary embedding of keys is undone; the features of all heads of a token are centred and
projected on the principal components of calibration data; runs of components get no bits, 2- or 4-bit integers (shift
and scale in fp16 per token and run) or fp8, by dynamic programming on the error over the calibration data; DEFLATE over
the result. Basis, means, bit allocation and fp8 scales belong to the model and are not charged.

Where it differs: the paper calibrates one basis over all layers of a model with many more tokens than a trace has; here
it is one basis per layer, K and V apart. The paper keeps the last 128 tokens out of the codec; here all but the first
are coded.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from codec import CHUNK_TOKENS, RAW_BITS, RAW_TOKENS, Coded, to_half, with_raw_tokens
from fp8_cast import to_e4m3
from traces import Floats, Trace

RUNS = (1, 16, 64, 256)  # components with one shift and scale
BITS = (0, 2, 4, 8)  # 8 is fp8
SINKS = 4  # first tokens, left out of the calibration
DP_SAMPLES = 256  # tokens of the calibration that the dynamic programme measures its errors on
_AFFINE_BITS = 32
_FP8_LARGEST = np.float32(448)

Doubles = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Run:
    first: int
    count: int
    bits: int
    fp8_scale: np.float32  # calibrated

    @property
    def at(self) -> slice:
        return slice(self.first, self.first + self.count)


def run_cost(count: int, bits: int) -> int:
    """Bits per token."""
    return count * bits + (_AFFINE_BITS if bits in (2, 4) else 0)


def rotate(x: Floats, base: float, direction: int) -> Floats:
    """The rotary embedding of [tokens, heads, head_dim] from position 0 on (direction 1), or its inverse (-1)."""
    half = x.shape[2] // 2
    angles = np.arange(len(x))[:, None] * base ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], direction * np.sin(angles)[:, None]
    a, b = x[..., :half].astype(np.float64), x[..., half:].astype(np.float64)
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=2).astype(np.float32)


def quantise(values: Floats, bits: int, fp8_scale: np.float32) -> tuple[Floats, list[bytes]]:
    """Values of one run, [tokens, count], as a decoder gives them, and its bytes before DEFLATE."""
    if bits == 0:
        return np.zeros_like(values), []
    if bits == 8:
        coded = to_e4m3(values / fp8_scale)
        # The byte of a number is that of its bits in fp16 but for the bias: any one-to-one byte compresses alike.
        stored = (coded.astype(np.float16).view(np.uint16) >> 7).astype(np.uint8)
        return coded * fp8_scale, [stored.tobytes()]
    levels = np.float32((1 << bits) - 1)
    low, high = values.min(axis=1, keepdims=True), values.max(axis=1, keepdims=True)
    shift, scale = to_half(low), to_half((high - low) / levels)
    digits = np.clip(np.rint((values - shift) / np.where(scale > 0, scale, 1)), 0, levels)
    per_byte = 8 // bits
    flat = np.pad(digits.astype(np.uint8).reshape(-1), (0, -digits.size % per_byte)).reshape(-1, per_byte)
    packed = np.bitwise_or.reduce(flat << (bits * np.arange(per_byte, dtype=np.uint8)), axis=1)
    fields = [side.astype(np.float16).tobytes() for side in (shift, scale)]
    return digits.astype(np.float32) * scale + shift, [*fields, packed.astype(np.uint8).tobytes()]


class Allocation:
    """Runs of components and their bits for any budget: error over the calibration data, by dynamic programming."""

    def __init__(self, components: Floats, largest_budget: int) -> None:
        """components: [tokens, count], strongest first; budgets are bits per token."""
        self.count = components.shape[1]
        step = -(-len(components) // DP_SAMPLES)
        self._choices: list[list[tuple[int, int, np.float32]]] = [[]]
        best = [np.zeros(largest_budget + 1)]
        self._chosen: list[npt.NDArray[np.int64]] = [np.zeros(largest_budget + 1, np.int64)]
        scales = np.maximum(np.abs(components).max(axis=0), np.float32(1e-20)) * 2 / _FP8_LARGEST  # twice: other texts
        for end in range(1, self.count + 1):
            choices = [
                (run, bits, np.float32(scales[end - run : end].max())) for run in RUNS if run <= end for bits in BITS
            ]
            errors = np.full((len(choices), largest_budget + 1), np.inf)
            for i, (run, bits, scale) in enumerate(choices):
                cost = run_cost(run, bits)
                if cost > largest_budget:
                    continue
                sample = components[::step, end - run : end]
                error = float(((quantise(sample, bits, scale)[0] - sample) ** 2).sum(dtype=np.float64))
                errors[i, cost:] = best[end - run][: largest_budget + 1 - cost] + error
            self._choices.append(choices)
            self._chosen.append(errors.argmin(axis=0))
            best.append(errors.min(axis=0))

    def runs(self, budget: int) -> list[Run]:
        result: list[Run] = []
        end = self.count
        while end > 0:
            count, bits, scale = self._choices[end][self._chosen[end][budget]]
            result.append(Run(end - count, count, bits, scale))
            budget -= run_cost(count, bits)
            end -= count
        return result[::-1]


@dataclasses.dataclass(frozen=True)
class Basis:
    """Of one layer, K or V."""

    mean: Floats
    components: Floats  # [features, features], columns by falling variance
    allocation: Allocation


def calibrate(features: Floats, largest_budget: int) -> Basis:
    mean = features.mean(axis=0)
    centred = (features - mean).astype(np.float64)
    vectors: Doubles = np.linalg.eigh(centred.T @ centred)[1][:, ::-1]
    components = vectors.astype(np.float32)
    return Basis(mean, components, Allocation((centred @ vectors).astype(np.float32), largest_budget))


def code_features(features: Floats, basis: Basis, runs: list[Run]) -> tuple[Floats, int]:
    """[tokens, features] of one chunk: what a decoder gives, and bits."""
    projected: Floats = np.asarray((features - basis.mean) @ basis.components, np.float32)
    parts: list[bytes] = []
    for run in runs:
        projected[:, run.at], stored = quantise(projected[:, run.at], run.bits, run.fp8_scale)
        parts += stored
    data = b"".join(parts)
    smallest = min(len(data), len(zlib.compress(data, 9)))
    return np.asarray(projected @ basis.components.T + basis.mean, np.float32), 8 * smallest


class Calibration:
    """Bases from the tokens of one trace, made when they are first asked for and kept for all rates."""

    def __init__(self, trace: Trace, tokens: slice, largest_rate: int) -> None:
        self.trace, self.tokens, self.largest_rate = trace, tokens, largest_rate
        self._bases: dict[tuple[int, str], Basis] = {}

    def basis(self, layer: int, kind: str) -> Basis:
        if (layer, kind) not in self._bases:
            features = features_of(self.trace, layer, kind)[self.tokens]
            self._bases[layer, kind] = calibrate(features, self.largest_rate * features.shape[1])
        return self._bases[layer, kind]


def features_of(trace: Trace, layer: int, kind: str) -> Floats:
    """[tokens, kv_heads x head_dim], keys before the rotary embedding."""
    x = trace.layers[layer].k if kind == "k" else trace.layers[layer].v
    if kind == "k":
        x = rotate(x, trace.rope_base(layer), -1)
    return x.reshape(len(x), -1)


class Kvtc:
    """`rate`: bits per entry before DEFLATE, shifts and scales included."""

    name = "kvtc"

    def __init__(self, rate: int, calibration: Calibration, options: str) -> None:
        self.options = f"rate={rate};{options}"
        self.rate, self.calibration = rate, calibration

    def layers(self, trace: Trace) -> list[int]:
        return [layer for layer in trace.layers if layer in self.calibration.trace.layers]

    def _code_kind(self, trace: Trace, layer: int, kind: str, back: Callable[[Floats], Floats]) -> Coded:
        original = trace.layers[layer].k if kind == "k" else trace.layers[layer].v
        basis = self.calibration.basis(layer, kind)
        features = features_of(trace, layer, kind)
        runs = basis.allocation.runs(self.rate * features.shape[1])
        coded = features.copy()
        bits = RAW_TOKENS * features.shape[1] * RAW_BITS
        for first in range(0, len(features), CHUNK_TOKENS):
            at = slice(max(first, RAW_TOKENS), min(first + CHUNK_TOKENS, len(features)))
            coded[at], chunk_bits = code_features(features[at], basis, runs)
            bits += chunk_bits
        values = back(coded.reshape(original.shape))
        return Coded(with_raw_tokens(original, values, slice(RAW_TOKENS)), bits)

    def code(self, trace: Trace, layer: int) -> tuple[Coded, Coded]:
        base = trace.rope_base(layer)
        return (
            self._code_kind(trace, layer, "k", lambda x: rotate(x, base, 1)),
            self._code_kind(trace, layer, "v", lambda x: x),
        )


# Traces of one model: each is calibrated on the other text, on the layers that both have.
OTHER_TEXT = {"smollm2-512": "smollm2-1024", "smollm2-1024": "smollm2-512"}


def calibration_of(
    trace: Trace, find: Callable[[str], Trace | None], largest_rate: int
) -> tuple[Calibration, str] | None:
    """With the text that it takes, for the options; None when that trace isn't there.

    Without another text of the model: the first half of the trace itself, which flatters that half.
    """
    name = OTHER_TEXT.get(trace.name)
    if name is None:
        return Calibration(trace, slice(SINKS, trace.tokens // 2), largest_rate), "calibration=first half"
    other = find(name)
    if other is None:
        return None
    shared = len(other.layers.keys() & trace.layers.keys())
    note = f"calibration={name}" + (f";layers={shared}" if shared < len(trace.layers) else "")
    return Calibration(other, slice(SINKS, None), largest_rate), note
