"""Calibrated bases: FORMAT.md section 9. Reads and writes .kvb files."""

from __future__ import annotations

import dataclasses
import struct

import numpy as np
import numpy.typing as npt

from kvs_error import FormatError, require
from kvs_rope import Rope, read_rope
from xxh64 import xxh64

Floats = npt.NDArray[np.float64]

HEADER = struct.Struct("<4sHHHHIQHHI")
ID_BYTES = 16
HEADER_BYTES = HEADER.size + ID_BYTES
LEAST_GAIN, MOST_GAIN = 1 / 64, 64.0
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Of one layer: W and W^-1, [kv_heads, head_dim, head_dim]."""

    rope: Rope | None
    weight: Floats
    inverse: Floats


@dataclasses.dataclass(frozen=True)
class Basis:
    id: bytes
    model: str
    metadata: str
    head_dim: int
    kv_heads: int
    queries: int
    layers: dict[int, Metrics]


def id_of(content: bytes) -> bytes:
    return b"".join(xxh64(content, seed).to_bytes(8, "little") for seed in range(2))


def write_basis(
    layers: dict[int, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]], queries: int = 0, model: str = ""
) -> bytes:
    """Gains [kv_heads, d] and vectors [kv_heads, d, d] by layer, for keys as they are."""
    kv_heads, d = next(iter(layers.values()))[0].shape
    metadata = b"{}"
    head = HEADER.pack(b"KVSB", 1, 0, d, kv_heads, len(layers), queries, len(model.encode()), 0, len(metadata))
    body = model.encode() + metadata
    for layer, (gains, vectors) in sorted(layers.items()):
        body += struct.pack("<HHI", layer, 0, 0)
        for g, u in zip(gains, vectors, strict=True):
            body += g.astype("<f4").tobytes() + u.astype("<f4").tobytes()
    return head + id_of(head + body) + body


def read_basis(data: bytes) -> Basis:
    require(len(data) >= HEADER_BYTES, "basis.size", len(data), f"a header is {HEADER_BYTES} bytes")
    magic, version, flags, d, kv_heads, layers, queries, model_bytes, reserved, metadata_bytes = HEADER.unpack_from(
        data
    )
    require(magic == b"KVSB", "basis.magic", magic.hex(), "must be 4b565342")
    require(version == 1, "basis.version", version, "must be 1")
    require(flags == 0, "basis.flags", flags, "must be 0")
    require(1 <= d <= 512, "basis.head_dim", d, "must be 1..512")
    require(1 <= kv_heads <= 256, "basis.kv_heads", kv_heads, "must be 1..256")
    require(1 <= layers <= 4096, "basis.layers", layers, "must be 1..4096")
    require(model_bytes <= 255, "basis.model_bytes", model_bytes, "must be at most 255")
    require(reserved == 0, "basis.reserved", reserved, "must be 0")
    require(2 <= metadata_bytes <= 1 << 20, "basis.metadata_bytes", metadata_bytes, "must be 2..2^20")
    head_bytes = 4 * d * (d + 1)
    least = HEADER_BYTES + model_bytes + metadata_bytes + layers * (8 + kv_heads * head_bytes)
    require(len(data) >= least, "basis.size", len(data), f"must be at least {least}")
    own = data[HEADER.size : HEADER_BYTES]
    require(
        own == id_of(data[: HEADER.size] + data[HEADER_BYTES:]), "basis.id", own.hex(), "is not that of the content"
    )
    at = HEADER_BYTES + model_bytes + metadata_bytes
    model = data[HEADER_BYTES : HEADER_BYTES + model_bytes].decode()
    require(not any(ord(c) < 32 or ord(c) == 127 for c in model), "basis.model", model, "has control characters")
    metadata = data[HEADER_BYTES + model_bytes : at].decode()
    found: dict[int, Metrics] = {}
    for i in range(layers):
        field = f"basis.layer[{i}]"
        require(len(data) - at >= 8, f"{field}.size", len(data) - at, "a layer begins with 8 bytes")
        layer, rope_bytes, zero = struct.unpack_from("<HHI", data, at)
        at += 8
        require(layer <= 4095 and layer > max(found, default=-1), f"{field}.layer", layer, "must ascend, at most 4095")
        require(zero == 0, f"{field}.reserved", zero, "must be 0")
        size = rope_bytes + kv_heads * head_bytes
        require(len(data) - at >= size, f"{field}.size", len(data) - at, f"must be {size}")
        rope = read_rope(data[at : at + rope_bytes], d) if rope_bytes else None
        values = np.frombuffer(data, "<f4", kv_heads * d * (d + 1), at + rope_bytes).reshape(kv_heads, d + 1, d)
        found[layer] = metrics(field, rope, values.astype(np.float64))
        at += size
    require(at == len(data), "basis.size", len(data), f"its layers end at {at}")
    return Basis(own, model, metadata, d, kv_heads, queries, found)


def metrics(field: str, rope: Rope | None, values: Floats) -> Metrics:
    """Rows of a head: gains, then the vectors."""
    gains, vectors = values[:, 0], values[:, 1:]
    with np.errstate(invalid="ignore"):
        for head, (g, u) in enumerate(zip(gains, vectors, strict=True)):
            bad_gain = ~((g >= LEAST_GAIN) & (g <= MOST_GAIN))
            if bad_gain.any():
                j = int(np.argmax(bad_gain))
                raise FormatError(f"{field}.head[{head}].gain[{j}]", g[j], "must be 1/64..64")
            off = np.tril(~(np.abs(u @ u.T - np.eye(len(u))) <= TOLERANCE)).any(axis=1)
            if off.any():
                j = int(np.argmax(off))
                raise FormatError(f"{field}.head[{head}].vector[{j}]", j, "is not orthonormal within 1e-4")
    weight = np.einsum("hi,hia,hib->hab", gains, vectors, vectors)
    return Metrics(rope, weight, np.einsum("hi,hia,hib->hab", 1 / gains, vectors, vectors))


def metrics_of(basis: Basis | None, basis_id: bytes, layer: int, kv_heads: int, head_dim: int) -> Metrics:
    """Those of a shard that names `basis_id`."""
    given = "none" if basis is None else basis.id.hex()
    if basis is None or basis.id != basis_id:
        raise FormatError("basis", given, f"the shard was coded with basis {basis_id.hex()}")
    require(basis.head_dim == head_dim, "basis.head_dim", basis.head_dim, f"the shard's is {head_dim}")
    require(basis.kv_heads == kv_heads, "basis.kv_heads", basis.kv_heads, f"the shard's is {kv_heads}")
    require(layer in basis.layers, "basis.layers", sorted(basis.layers), f"has no layer {layer}")
    return basis.layers[layer]
