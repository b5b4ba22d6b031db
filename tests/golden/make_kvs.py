"""Builds KVS1 shards and .kvs files by hand, for tests: any field can be made wrong, with checksums that are right.

Everything is scalar and slow, and nothing is taken from the decoder but its checksum: a mistake would have to be made
twice.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Sequence

from xxh64 import section_checksum, xxh64

PROFILE_ID = {"raw": 0, "fp8": 1, "tq2": 2, "tq3": 3, "tq4": 4, "eoptshrinkq2": 5}
PROFILE_ID |= {"kvs2": 6, "kvs3": 7, "kvs4": 8, "kvs2t": 9, "kvs3t": 10}


class BitWriter:
    def __init__(self) -> None:
        self.value, self.bits = 0, 0

    def put(self, number: int, width: int) -> None:
        assert 0 <= number < 1 << width
        self.value |= number << self.bits
        self.bits += width

    def bytes(self) -> bytes:
        return self.value.to_bytes((self.bits + 7) // 8, "little")


@dataclasses.dataclass
class Block:
    raw: bytes = b""
    code: int = 0
    exponent: int = 0
    rank: int = 0
    reserved: int = 0
    factors: bytes = b""
    scales: bytes = b""
    codes: bytes = b""
    factor_bytes: int | None = None  # of the index entry, if it shall differ


@dataclasses.dataclass
class ShardSpec:
    """The fields of a header. None: what the blocks give."""

    blocks: Sequence[Block]
    profile: int = PROFILE_ID["kvs2"]
    dtype: int = 1
    head_dim: int = 4
    kv_heads: int = 1
    tokens: int = 3
    first_token: int = 0
    layer: int = 0
    flags: int = 0
    raw_rows: int = 0
    extensions: bytes = b""
    ext_bytes: int | None = None
    magic: bytes = b"KVS1"
    version: int = 1
    low_bytes: int | None = None
    scales_bytes: int | None = None
    codes_bytes: int | None = None
    header_checksum: int | None = None
    index_checksum: int | None = None
    low_checksum: int | None = None
    scales_checksum: int | None = None
    codes_checksum: int | None = None
    tail: bytes = b""


def given(value: int | None, otherwise: int) -> int:
    return otherwise if value is None else value


def padded(part: bytes) -> bytes:
    return part + bytes(-len(part) % 4)


def make_shard(spec: ShardSpec) -> bytes:
    index = b"".join(
        struct.pack("<bBBBH", b.exponent, b.code, b.rank, b.reserved, given(b.factor_bytes, len(b.factors)))
        for b in spec.blocks
    )
    low = b"".join(padded(b.raw + b.factors) for b in spec.blocks)
    scales = b"".join(padded(b.scales) for b in spec.blocks)
    codes = b"".join(padded(b.codes) for b in spec.blocks)
    header = struct.pack(
        "<4sHBBHHIIHHIIQQQQQQQ",
        spec.magic,
        spec.version,
        spec.profile,
        spec.dtype,
        spec.head_dim,
        spec.kv_heads,
        spec.tokens,
        spec.first_token,
        spec.layer,
        spec.flags,
        spec.raw_rows,
        given(spec.ext_bytes, len(spec.extensions)),
        given(spec.low_bytes, len(low)),
        given(spec.scales_bytes, len(scales)),
        given(spec.codes_bytes, len(codes)),
        given(spec.index_checksum, section_checksum(spec.extensions + index)),
        given(spec.low_checksum, section_checksum(low)),
        given(spec.scales_checksum, section_checksum(scales)),
        given(spec.codes_checksum, section_checksum(codes)),
    )
    header += struct.pack("<Q", given(spec.header_checksum, xxh64(header)))
    return header + spec.extensions + index + low + scales + codes + spec.tail


@dataclasses.dataclass
class FileSpec:
    """A .kvs file: shards by chunk, then by layer. None: what the shards give."""

    shards: Sequence[bytes]
    layers: Sequence[int]
    metadata: bytes = json.dumps({"model": "none"}).encode()
    magic: bytes = b"KVSF"
    version: int = 1
    flags: int = 0
    chunks: int | None = None
    layer_count: int | None = None
    metadata_bytes: int | None = None
    reserved: int = 0
    header_checksum: int | None = None
    directory_checksum: int | None = None
    metadata_checksum: int | None = None
    entries: dict[int, dict[str, int]] = dataclasses.field(default_factory=dict)  # entry number -> fields to change


def make_file(spec: FileSpec) -> bytes:
    at = 48 + 32 * len(spec.shards) + len(spec.metadata)
    directory = b""
    for i, shard in enumerate(spec.shards):
        chunk, place = divmod(i, len(spec.layers))
        entry = {
            "chunk": chunk,
            "layer": spec.layers[place],
            "offset": at,
            "length": len(shard),
            "checksum": xxh64(shard),
        }
        entry |= spec.entries.get(i, {})
        directory += struct.pack("<IIQQQ", *entry.values())
        at += len(shard)
    header = struct.pack(
        "<4sHHIIIIQQ",
        spec.magic,
        spec.version,
        spec.flags,
        given(spec.chunks, len(spec.shards) // len(spec.layers)),
        given(spec.layer_count, len(spec.layers)),
        given(spec.metadata_bytes, len(spec.metadata)),
        spec.reserved,
        given(spec.directory_checksum, xxh64(directory)),
        given(spec.metadata_checksum, xxh64(spec.metadata)),
    )
    header += struct.pack("<Q", given(spec.header_checksum, xxh64(header)))
    return header + directory + spec.metadata + b"".join(spec.shards)


# --- what a decoder must make of digits, by the sums of section 5


def sign(seed: int, j: int) -> int:
    z = (seed * 2**32 + j + 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return -1 if (z ^ (z >> 31)) >= 2**63 else 1


def wht(x: Sequence[float]) -> list[float]:
    return [sum((-1) ** (i & j).bit_count() * x[j] for j in range(len(x))) for i in range(len(x))]


def rotate(seed: int, x: Sequence[float]) -> list[float]:
    d = len(x)
    p = 2 ** int(math.log2(d))
    y = wht([sign(seed, j) * x[j] for j in range(p)])
    out = [value / math.sqrt(p) for value in y] + list(x[p:])
    if p < d:
        y = wht([sign(seed + 1, j) * out[j] for j in range(d - p, d)])
        out[d - p :] = [value / math.sqrt(p) for value in y]
    return out


def unrotate(seed: int, y: Sequence[float]) -> list[float]:
    d = len(y)
    p = 2 ** int(math.log2(d))
    out = list(y)
    if p < d:
        x = wht(out[d - p :])
        out[d - p :] = [sign(seed + 1, d - p + j) * x[j] / math.sqrt(p) for j in range(p)]
    x = wht(out[:p])
    return [sign(seed, j) * x[j] / math.sqrt(p) for j in range(p)] + out[p:]


def pack_digits(code: int, digits: Sequence[int]) -> bytes:
    writer = BitWriter()
    plain = {17: 2, 20: 3, 22: 4}
    if code in plain:
        for digit in digits:
            writer.put(digit, plain[code])
    else:
        base, group, width = {16: (3, 5, 8), 18: (5, 3, 7), 19: (6, 5, 13), 21: (12, 5, 18)}[code]
        for start in range(0, len(digits), group):
            writer.put(sum(c * base**i for i, c in enumerate(digits[start : start + group])), width)
    return writer.bytes()


def pack_offsets(offsets: Sequence[int]) -> bytes:
    writer = BitWriter()
    for offset in offsets:
        writer.put(offset, 4)
    return writer.bytes()


def pack_kvs_factors(parts: Sequence[tuple[int, int, int, Sequence[int], Sequence[int]]]) -> bytes:
    """For each component: x, y, scale, token digits, channel digits."""
    writer = BitWriter()
    for x, y, _, token, channel in parts:
        for digit in channel:
            writer.put(digit, y)
        for digit in token:
            writer.put(digit, x)
    return b"".join(bytes([x + 16 * y, scale]) for x, y, scale, _, _ in parts) + writer.bytes()
