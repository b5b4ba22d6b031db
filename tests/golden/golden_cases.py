#!/usr/bin/env python3
"""The golden files: what each is encoded from, and with which options.

Sources are made here on the fly: slices of the traces in tests/data, and arrays of exact arithmetic on raw generator
bits, which no version of numpy changes.

    golden_cases.py FOLDER      writes the sources FOLDER/NAME.safetensors
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvs_basis import write_basis
from kvs_shard import CALIBRATED, PROFILES

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"
TRACES = HERE.parent / "data"
Array = npt.NDArray[Any]


BASIS_FILE = "hadamard.kvb"
BASIS = f"{{}}/{BASIS_FILE}"


class Case(NamedTuple):
    source: str
    options: tuple[str, ...]


# Half of a head, interleaved, positions that don't count tokens; another theta on one of the layers.
LLAMA3 = (
    "theta=5e5,theta@17=1e4,dim=32,pairing=gptj,position_offset=-7,"
    "scaling=llama3,factor=8,original_max_position=64,low_freq_factor=1,high_freq_factor=4"
)

# Every profile on a slice of a real trace (a whole block and a part of one), then the corners of the format.
CASES: dict[str, Case] = {
    **{profile: Case("real", ("--profile", profile)) for profile in PROFILES if profile != CALIBRATED},
    "chunks": Case("layers", ("--profile", "kvs2", "--chunk-tokens", "100")),
    "escalated": Case("layers", ("--profile", "kvs2", "--max-relative-error", "0.02")),
    "escalated_2t": Case("layers", ("--profile", "kvs2t", "--max-relative-error", "0.02")),
    "no_sinks": Case("layers", ("--profile", "kvs3", "--raw-tokens", "0")),
    "sinks_only": Case("one_token_fp32_96", ("--profile", "kvs2", "--raw-tokens", "4")),
    "one_token_fp32_96": Case("one_token_fp32_96", ("--profile", "kvs4", "--raw-tokens", "0")),
    "bf16_80_kvs3": Case("bf16_80", ("--profile", "kvs3", "--raw-tokens", "4")),
    "bf16_80_kvs2t": Case("bf16_80", ("--profile", "kvs2t")),
    "bf16_80_eoptshrinkq2": Case("bf16_80", ("--profile", "eoptshrinkq2")),
    "bf16_80_tq2": Case("bf16_80", ("--profile", "tq2")),
    "fp8_48_kvs4": Case("fp8_48", ("--profile", "kvs4")),
    "flat_kvs2": Case("flat", ("--profile", "kvs2")),
    "flat_kvs2t": Case("flat", ("--profile", "kvs2t")),
    "flat_fp8": Case("flat", ("--profile", "fp8")),
    "flat_tq3": Case("flat", ("--profile", "tq3")),
    "rope_kvs2": Case("real", ("--profile", "kvs2", "--rope", "theta=1e5")),
    "rope_llama3": Case("layers", ("--profile", "kvs3", "--chunk-tokens", "100", "--rope", LLAMA3)),
    "rope_not_finite": Case("not_finite", ("--profile", "kvs2", "--rope", "theta=1e5")),
    "rate_2.5": Case("layers", ("--profile", "kvs2", "--bits", "2.5")),
    "slots": Case("layers", ("--profile", "kvs2", "--bits", "2.7", "--fixed-size")),
    # {} is the folder of the sources.
    "kvs2c": Case("real", ("--profile", "kvs2c", "--basis", BASIS)),
    "bounded_kvs2c": Case("real", ("--profile", "kvs2c", "--basis", BASIS, "--max-relative-error", "0.01")),
    "not_finite": Case("not_finite", ("--profile", "kvs2")),
    "mla_latent_kvs2": Case("mla_latent", ("--profile", "kvs2")),
    "mla_rotary_fp8": Case("mla_rotary", ("--profile", "fp8")),
}


def read_safetensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """dtype, shape and bytes of each tensor."""
    data = path.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    header: dict[str, Any] = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, last = (8 + size + offset for offset in entry["data_offsets"])
        tensors[name] = (entry["dtype"], entry["shape"], data[first:last])
    return tensors


def write_source(path: Path, dtype: str, tensors: Mapping[str, Array]) -> None:
    """Arrays hold the bits of `dtype`."""
    header: dict[str, Any] = {"__metadata__": {"source": path.stem}}
    at = 0
    for name, array in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(a.tobytes() for a in tensors.values()))


def real(layers: tuple[int, ...], tokens: int, heads: slice) -> dict[str, Array]:
    trace = read_safetensors(TRACES / "smollm2-512.safetensors")
    out: dict[str, Array] = {}
    for layer in layers:
        for kind in "kv":
            _, shape, data = trace[f"layer.{layer}.{kind}"]
            array = np.frombuffer(data, "<f2").reshape(shape)[:tokens, heads]
            out[f"layer.{layer}.{kind}"] = np.ascontiguousarray(array)
    return out


def noise(seed: int, *shape: int) -> npt.NDArray[np.float32]:
    """Sums of four uniform 16-bit integers around zero, scaled by a power of two: about normal, and exact."""
    bits = np.random.PCG64(seed).random_raw(int(np.prod(shape)))
    total = sum(((bits >> np.uint64(16 * i)) & np.uint64(0xFFFF)).astype(np.int64) for i in range(4))
    return ((np.asarray(total) - 4 * 32768) / 65536).astype(np.float32).reshape(shape)


def with_context(seed: int, tokens: int, heads: int, head_dim: int) -> npt.NDArray[np.float32]:
    """Noise around two shared directions, with small integers so that every product and sum is exact."""
    factors = np.round(noise(seed, tokens, heads, 2) * 4) / 2
    directions = np.round(noise(seed + 1, heads, 2, head_dim) * 4) / 2
    context = sum(factors[:, :, i, None] * directions[:, i] for i in range(2))
    return (context + noise(seed + 2, tokens, heads, head_dim)).astype(np.float32)


def bf16_bits(x: npt.NDArray[np.float32]) -> Array:
    return (x.view(np.uint32) >> 16).astype("<u2")  # rounds towards zero


def flat() -> dict[str, Array]:
    """Zero, a constant, a single spike, and values that differ by 2^24 between rows."""
    k, v = np.zeros((40, 2, 64), "<f2"), np.zeros((40, 2, 64), "<f2")
    k[:, 1] = 0.75
    v[20, 0, 5] = 1000
    v[:, 1] = noise(9, 40, 64) * (2.0 ** (np.arange(40) % 25 - 20))[:, None]
    return {"layer.3.k": k, "layer.3.v": v}


def not_finite() -> dict[str, Array]:
    tensors = {name: array.copy() for name, array in real((12,), 60, slice(0, 2)).items()}
    tensors["layer.12.k"][50, 1, 7] = np.nan
    tensors["layer.12.v"][2, 0, 0] = -np.inf
    return tensors


def sources() -> dict[str, tuple[str, dict[str, Array]]]:
    """dtype of safetensors and tensors, by name."""
    fp8 = np.random.PCG64(5).random_raw(70 * 2 * 48 * 2).astype(np.uint8)
    fp8 = np.where((fp8 & 0x7F) == 0x7F, 0, fp8).astype(np.uint8).reshape(2, 70, 2, 48)
    odd = [with_context(seed, 130, 1, 80) for seed in (20, 30)]
    single = [noise(seed, 1, 3, 96) for seed in (40, 50)]
    return {
        "real": ("F16", real((6,), 140, slice(1, 2))),
        "layers": ("F16", real((0, 17), 150, slice(2, 3))),
        "one_token_fp32_96": ("F32", {"layer.0.k": single[0], "layer.0.v": single[1]}),
        "bf16_80": ("BF16", {"layer.1.k": bf16_bits(odd[0]), "layer.1.v": bf16_bits(odd[1])}),
        "fp8_48": ("F8_E4M3", {"layer.0.k": fp8[0], "layer.0.v": fp8[1]}),
        "flat": ("F16", flat()),
        "not_finite": ("F16", not_finite()),
        "mla_latent": ("BF16", {"layer.5.k": bf16_bits(with_context(60, 133, 1, 512))}),
        "mla_rotary": ("BF16", {"layer.5.k": bf16_bits(with_context(70, 133, 1, 64))}),
    }


def hadamard_basis() -> bytes:
    """Of the layer and head of `real`: vectors of +-1/8, gains from 0.2 to 8."""
    i, j = np.meshgrid(np.arange(64), np.arange(64), indexing="ij")
    odd = np.array([bin(x).count("1") % 2 for x in (i & j).ravel()]).reshape(64, 64)
    gains = (np.round(64 * np.exp2(np.arange(64) % 11 / 2 - 2.25)) / 64).astype(np.float32)
    vectors = np.where(odd, np.float32(-0.125), np.float32(0.125))
    return write_basis({6: (gains[None], vectors[None])}, 1, "hadamard")


def write_sources(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Path(BASIS.format(folder)).write_bytes(hadamard_basis())
    for name, (dtype, tensors) in sources().items():
        write_source(folder / f"{name}.safetensors", dtype, tensors)


if __name__ == "__main__":
    write_sources(Path(sys.argv[1]))
