"""The baselines: bits counted by hand, errors within what their digits allow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from codec import Codec, Coded
from fp8_cast import Fp8Cast
from int_groups import Q4, Q8, Asymmetric
from kivi import Kivi
from kvtc import Allocation, Calibration, Kvtc, quantise, rotate, run_cost
from traces import Floats, Layer, Trace

TOKENS, HEADS, DIM = 256, 2, 64
ENTRIES = TOKENS * HEADS * DIM
ROW = HEADS * DIM  # entries of a token


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16).astype(np.float32)


@pytest.fixture(scope="module")
def trace() -> Trace:
    """Qwen's rotary embedding, and a strong common part in K, as that model has it."""
    k, v, q = (
        normal(TOKENS, HEADS, DIM) + 20 * normal(1, HEADS, DIM),
        normal(TOKENS, HEADS, DIM, seed=1),
        normal(8, 4, DIM),
    )
    return Trace(Path("random.safetensors"), "Qwen2.5 of a test", {0: Layer(k, v, q)})


def error(coded: Coded, exact: Floats) -> float:
    return float(((coded.values - exact) ** 2).sum() / (exact**2).sum())


@pytest.mark.parametrize(
    ("codec", "bits", "largest_error"),
    [
        (Asymmetric(4, 32), 16 * ROW + (ENTRIES - ROW) * (4 + 32 / 32), 0.008),
        (Asymmetric(4, 64), 16 * ROW + (ENTRIES - ROW) * (4 + 32 / 64), 0.012),
        (Q4(), 16 * ROW + (ENTRIES - ROW) * (4 + 16 / 32), 0.011),
        (Q8(), 16 * ROW + (ENTRIES - ROW) * (8 + 16 / 32), 0.0001),
        (Fp8Cast(), 16 * ROW + (ENTRIES - ROW) * 8 + 32, 0.001),
        (Kivi(2, 32), 16 * 33 * ROW + 223 * ROW * (2 + 32 / 32), 0.15),
        (Kivi(4, 128), 16 * 129 * ROW + 127 * ROW * (4 + 32 / 32), 0.008),
    ],
    ids=lambda value: f"{value.name}-{value.options}" if hasattr(value, "name") else "",
)
def test_bits_and_error_of_values(trace: Trace, codec: Codec, bits: float, largest_error: float) -> None:
    _, v = codec.code(trace, 0)
    assert v.bits == bits
    assert 0 < error(v, trace.layers[0].v) < largest_error
    np.testing.assert_array_equal(v.values[:1], trace.layers[0].v[:1])


def test_kivi_scales_keys_by_channel(trace: Trace) -> None:
    """A common part, ruinous for groups of one token, costs it nothing; 7 groups of tokens have 32 bits per channel."""
    codec = Kivi(2, 32)
    k, _ = codec.code(trace, 0)
    assert k.bits == 16 * 33 * ROW + 223 * ROW * 2 + 7 * ROW * 32
    assert error(k, trace.layers[0].k) < 0.001
    assert error(Asymmetric(4, 64).code(trace, 0)[0], trace.layers[0].k) > 2 * error(k, trace.layers[0].k)


def test_rotary_embedding_and_back() -> None:
    x = normal(100, 2, 64)
    np.testing.assert_allclose(rotate(rotate(x, 1e4, 1), 1e4, -1), x, atol=1e-5)
    two = rotate(np.ones((3, 1, 2), np.float32), 1e4, 1)  # one pair of channels: the angle is the position
    np.testing.assert_allclose(two[2, 0], [np.cos(2) - np.sin(2), np.sin(2) + np.cos(2)], rtol=1e-6)


def test_rotary_embedding_as_the_command_takes_it(trace: Trace) -> None:
    layer = trace.layers[0]
    assert trace.rope == "theta=1e+06"
    gemma = Trace(Path("a"), "Gemma 3 of a test", dict.fromkeys((0, 2, 5, 8, 11), layer))
    assert gemma.rope == "theta=10000,theta@5/11=1e+06"
    with pytest.raises(ValueError, match="Unknown"):
        Trace(Path("a"), "Unknown", {0: layer}).rope_base(0)


def test_bytes_of_a_run() -> None:
    x = normal(50, 16)
    for bits, size, largest in ((2, 50 * 16 // 4 + 200, 0.12), (4, 50 * 16 // 2 + 200, 0.006), (8, 50 * 16, 0.001)):
        coded, parts = quantise(x, bits, np.float32(0.02))
        assert sum(map(len, parts)) == size
        assert ((coded - x) ** 2).sum() / (x**2).sum() < largest


def test_allocation_spends_bits_where_variance_is() -> None:
    scale = 2.0 ** -np.arange(8)
    components = (normal(500, 8) * np.repeat(scale, [1, 1, 1, 1, 1, 1, 1, 1])).astype(np.float32)
    allocation = Allocation(components, 32)
    for budget in (0, 8, 20, 32):
        runs = allocation.runs(budget)
        assert sum(run_cost(run.count, run.bits) for run in runs) <= budget
        assert sum(run.count for run in runs) == 8
        bits = [run.bits for run in runs for _ in range(run.count)]
        assert bits == sorted(bits, reverse=True)
        assert any(bits) == (budget >= 8)


def test_kvtc_gains_by_rate_and_by_the_common_part(trace: Trace) -> None:
    calibration = Calibration(trace, slice(4, None), 4)
    codes = [Kvtc(rate, calibration, "").code(trace, 0) for rate in (2, 4)]
    for kind, exact in enumerate((trace.layers[0].k, trace.layers[0].v)):
        coarse, fine = (code[kind] for code in codes)
        assert coarse.bits < fine.bits <= 16 * ROW + 4 * ENTRIES
        assert error(fine, exact) < error(coarse, exact) / 2
