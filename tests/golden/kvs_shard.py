"""The structure of a KVS1 shard: header, index, places of the blocks' parts, and the checks of FORMAT.md section 6.

Numbers of sections in comments are those of proto/FORMAT.md. Everything is checked before it is used to size anything.
"""

from __future__ import annotations

import dataclasses
import struct
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvs_error import FormatError, require
from kvs_rope import Rope, read_extensions
from xxh64 import section_checksum, xxh64

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

HEADER_BYTES = 96
BLOCK_TOKENS = 128
MAX_ENTRIES = 1 << 27
FLAG_KEYS_ONLY = 1

PROFILES = ("raw", "fp8", "tq2", "tq3", "tq4", "eoptshrinkq2", "kvs2", "kvs3", "kvs4", "kvs2t", "kvs3t", "kvs2c")
FAMILIES = ("raw", "fp8", "tq", "tq", "tq", "eoptshrinkq", "kvs", "kvs", "kvs", "kvs", "kvs", "kvs")
CALIBRATED = "kvs2c"
DTYPES = ("fp32", "fp16", "bf16", "fp8_e4m3")
DTYPE_BYTES = (4, 2, 2, 1)

ZERO, RAW, FP8 = 0, 1, 2
FLAG_PADDED = 2
LEVELS = {16: 3, 17: 4, 18: 5, 19: 6, 20: 8, 21: 12, 22: 16}  # code -> levels of its alphabet
PLAIN_BITS = {17: 2, 20: 3, 22: 4}  # code -> bits of a digit
GROUPS = {16: (5, 8), 18: (3, 7), 19: (5, 13), 21: (5, 18)}  # code -> digits of a group, bits of its field
RUN_BYTES = {32: 24, 33: 32, 34: 40, 35: 48}  # code of a trellis -> bytes of its runs of 128 values
CODES_OF_FAMILY = {
    "raw": {ZERO, RAW},
    "fp8": {ZERO, RAW, FP8},
    "tq": {ZERO, RAW, 17, 20, 22},
    "eoptshrinkq": {ZERO, RAW, 17, 20, 22},
    "kvs": {ZERO, RAW, *LEVELS, *RUN_BYTES},
}


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclasses.dataclass(frozen=True)
class Header:
    """Section 3, without magic, version and checksums."""

    profile: str
    family: str
    dtype: str
    head_dim: int
    kv_heads: int
    tokens: int
    first_token: int
    layer: int
    keys_only: bool
    raw_rows: int
    low_bytes: int
    scales_bytes: int
    codes_bytes: int
    padded: bool

    @property
    def kinds(self) -> int:
        return 1 if self.keys_only else 2

    @property
    def blocks_per_head(self) -> int:
        return ceil_div(self.tokens, BLOCK_TOKENS)

    @property
    def blocks(self) -> int:
        return self.kinds * self.kv_heads * self.blocks_per_head


class Block(NamedTuple):
    """One index entry and the places of its parts in the shard."""

    number: int
    kind: int  # 0 = K, 1 = V
    head: int
    first_row: int
    n: int  # rows
    m: int  # coded rows, the last ones
    exponent: int
    code: int
    rank: int
    raw: slice
    factors: slice
    scales: slice
    codes: slice


@dataclasses.dataclass(frozen=True)
class Shard:
    header: Header
    blocks: list[Block]
    data: Bytes
    whole: bool  # False: a preview, SCALES and CODES are not to be read
    preview_bytes: int
    rope: Rope | None
    basis: bytes | None  # id


def read_header(data: bytes | memoryview) -> tuple[Header, dict[str, int]]:
    require(len(data) >= HEADER_BYTES, "size", len(data), f"a header is {HEADER_BYTES} bytes")
    fields = struct.unpack_from("<4sHBBHHIIHHIIQQQQQQQQ", data)
    (magic, version, profile, dtype, head_dim, kv_heads, tokens, first_token, layer, flags, raw_rows, ext_bytes) = (
        fields[:12]
    )
    low_bytes, scales_bytes, codes_bytes, *checksums = fields[12:]
    require(magic == b"KVS1", "magic", magic.hex(), "must be 4b565331")
    require(version == 1, "version", version, "must be 1")
    require(checksums[4] == xxh64(data[:88]), "header_checksum", f"{checksums[4]:016x}", "is not that of the header")

    require(profile < len(PROFILES), "profile", profile, f"must be 0..{len(PROFILES) - 1}")
    require(dtype < len(DTYPES), "dtype", dtype, "must be 0..3")
    require(1 <= head_dim <= 512, "head_dim", head_dim, "must be 1..512")
    require(1 <= kv_heads <= 256, "kv_heads", kv_heads, "must be 1..256")
    require(1 <= tokens <= 65536, "tokens", tokens, "must be 1..65536")
    entries = tokens * kv_heads * head_dim
    require(entries <= MAX_ENTRIES, "entries", entries, f"must be at most {MAX_ENTRIES}")
    require(first_token + tokens < 1 << 31, "first_token", first_token, "first_token + tokens must be below 2^31")
    require(layer <= 4095, "layer", layer, "must be 0..4095")
    require(flags & ~(FLAG_KEYS_ONLY | FLAG_PADDED) == 0, "flags", flags, "only bits 0 and 1 may be set")
    require(raw_rows <= tokens, "raw_rows", raw_rows, f"must be at most tokens ({tokens})")
    require(ext_bytes % 8 == 0 and ext_bytes <= 4096, "ext_bytes", ext_bytes, "must be a multiple of 8, at most 4096")
    header = Header(
        PROFILES[profile], FAMILIES[profile], DTYPES[dtype], head_dim, kv_heads, tokens, first_token,
        layer, bool(flags & FLAG_KEYS_ONLY), raw_rows, low_bytes, scales_bytes, codes_bytes, bool(flags & FLAG_PADDED),
    )  # fmt: skip
    checks = dict(zip(("index", "low", "scales", "codes"), checksums[:4], strict=True))
    return header, {**checks, "ext_bytes": ext_bytes}


def rows_of_blocks(header: Header) -> tuple[Ints, Ints]:
    """n and m of every block, in the order of the index."""
    first = np.arange(header.blocks_per_head) * BLOCK_TOKENS
    n = np.minimum(BLOCK_TOKENS, header.tokens - first)
    m = n - np.clip(header.raw_rows - first, 0, n)
    heads = header.kinds * header.kv_heads
    return np.tile(n, heads), np.tile(m, heads)


INDEX_ENTRY = np.dtype(
    [("exponent", "i1"), ("code", "u1"), ("rank", "u1"), ("reserved", "u1"), ("factor_bytes", "<u2")]
)


def check_index(header: Header, index: npt.NDArray[Any], n: Ints, m: Ints) -> None:
    """Section 4. Entries are checked in order, and the fields of an entry in the order of their offsets."""
    exponent, code = index["exponent"].astype(int), index["code"].astype(int)
    rank, factor_bytes = index["rank"].astype(int), index["factor_bytes"].astype(int)
    may_have_factors = (code >= 16) & (header.family in ("eoptshrinkq", "kvs"))
    max_rank = np.minimum(np.minimum(n, header.head_dim), 127) * may_have_factors
    bad_factor_bytes = (rank == 0) & (factor_bytes != 0)
    if header.family == "eoptshrinkq":
        exact = 2 * rank + 64 + (4 * rank * (n + header.head_dim) + 7) // 8
        bad_factor_bytes |= (rank > 0) & (factor_bytes != exact)
    bad = {
        "exponent": (exponent < -126) | (exponent != 0) & np.isin(code, (ZERO, RAW)),
        "code": ~np.isin(code, list(CODES_OF_FAMILY[header.family])) | (m == 0) & (code != ZERO),
        "rank": rank > max_rank,
        "reserved": index["reserved"] != 0,
        "factor_bytes": bad_factor_bytes,
    }
    any_bad = np.any(list(bad.values()), axis=0)
    if any_bad.any():
        i = int(np.argmax(any_bad))
        field = next(name for name, mask in bad.items() if mask[i])
        rule = {
            "exponent": "must be -126..127, and 0 for codes 0 and 1",
            "code": f"must belong to family {header.family}" if m[i] else "must be 0 where all rows are raw rows",
            "rank": f"must be at most {max_rank[i]}",
            "reserved": "must be 0",
            "factor_bytes": "must be what the rank gives",
        }[field]
        raise FormatError(f"index[{i}].{field}", int(index[field][i]), rule)


def codes_bytes_of(header: Header, code: Ints, m: Ints) -> Ints:
    """Bytes in CODES, the table of section 4."""
    entries = m * header.head_dim
    sizes = np.zeros_like(entries)
    sizes[code == RAW] = entries[code == RAW] * DTYPE_BYTES[DTYPES.index(header.dtype)]
    sizes[code == FP8] = entries[code == FP8]
    for value, bits in PLAIN_BITS.items():
        sizes[code == value] = (bits * entries[code == value] + 7) // 8
    for value, (digits, bits) in GROUPS.items():
        groups = (entries[code == value] + digits - 1) // digits
        sizes[code == value] = (bits * groups + 7) // 8
    for value, run_bytes in RUN_BYTES.items():
        sizes[code == value] = (entries[code == value] + 127) // 128 * run_bytes
    return sizes


def padded(sizes: Ints) -> Ints:
    return (sizes + 3) // 4 * 4


def place(start: int, sizes: Ints) -> list[int]:
    """Offsets of consecutive padded parts: one more than there are parts."""
    return [start, *(start + np.cumsum(padded(sizes))).tolist()]


def kvs_factor_bits(shard: Shard, block: Block) -> tuple[Ints, Ints]:
    """x_i and y_i of a kvs factor record, checked against its size."""
    record, r = shard.data[block.factors], block.rank
    field = f"block[{block.number}]"
    require(len(record) >= 2 * r, f"{field}.factor_bytes", len(record), f"must be at least {2 * r} for rank {r}")
    pairs = record[: 2 * r : 2].astype(np.int64)
    x, y = pairs & 15, pairs >> 4
    bad = (x < 2) | (x > 8) | (y < 2) | (y > 8)
    if bad.any():
        raise FormatError(f"{field}.bits", f"{int(pairs[bad][0]):02x}", "both halves must be 2..8")
    size = 2 * r + ceil_div(int((y * shard.header.head_dim + x * block.n).sum()), 8)
    require(len(record) == size, f"{field}.factor_bytes", len(record), f"its bits give {size}")
    return x, y


class Layout(NamedTuple):
    """Bytes of each block's parts: raw rows and factor record in LOW, then SCALES and CODES."""

    raw: Ints
    factors: Ints
    scales: Ints
    codes: Ints


def check_layout(header: Header, index: npt.NDArray[Any], n: Ints, m: Ints) -> Layout:
    code = index["code"].astype(np.int64)
    layout = Layout(
        raw=(n - m) * header.head_dim * DTYPE_BYTES[DTYPES.index(header.dtype)],
        factors=index["factor_bytes"].astype(np.int64),
        scales=np.where(code < 16, 0, 2 + (m + 1) // 2 if header.family == "kvs" else 2 * m),
        codes=codes_bytes_of(header, code, m),
    )
    for name, sizes in (("low", layout.raw + layout.factors), ("scales", layout.scales), ("codes", layout.codes)):
        given, total = int(getattr(header, f"{name}_bytes")), int(padded(sizes).sum())
        longer = name == "codes" and header.padded and total <= given <= 1 << 31
        require(given == total or longer, f"{name}_bytes", given, f"the index gives {total}")
    return layout


def check_sections(header: Header, data: memoryview, low_start: int, checksums: dict[str, int], preview: bool) -> bool:
    """Size of the byte string and checksums of the sections that are there. True when all are."""
    low_end = low_start + header.low_bytes
    scales_end = low_end + header.scales_bytes
    end = scales_end + header.codes_bytes
    if preview:
        require(low_end <= len(data) <= end, "size", len(data), f"must be {low_end}..{end}")
    else:
        require(len(data) == end, "size", len(data), f"must be {end}")
    for name, first, last in (("low", low_start, low_end), ("scales", low_end, scales_end), ("codes", scales_end, end)):
        if last <= len(data):
            ok = checksums[name] == section_checksum(data[first:last])
            require(ok, f"{name}_checksum", f"{checksums[name]:016x}", f"is not that of the {name.upper()} section")
    return len(data) == end


def place_blocks(header: Header, index: npt.NDArray[Any], n: Ints, m: Ints, layout: Layout, at: int) -> list[Block]:
    low = place(at, layout.raw + layout.factors)
    scales = place(low[-1], layout.scales)
    codes = place(scales[-1], layout.codes)
    blocks = []
    for i in range(header.blocks):
        pair, b = divmod(i, header.blocks_per_head)
        kind, head = divmod(pair, header.kv_heads)
        factors = low[i] + int(layout.raw[i])
        blocks.append(Block(
            i, kind, head, b * BLOCK_TOKENS, int(n[i]), int(m[i]), int(index["exponent"][i]), int(index["code"][i]),
            int(index["rank"][i]), slice(low[i], factors), slice(factors, factors + int(layout.factors[i])),
            slice(scales[i], scales[i] + int(layout.scales[i])), slice(codes[i], codes[i] + int(layout.codes[i])),
        ))  # fmt: skip
    return blocks


def parse_shard(data: bytes | memoryview, allow_preview: bool = False) -> Shard:
    """The checks of section 6, in order, up to the factor records."""
    header, rest = read_header(data)
    data = memoryview(data)
    index_start = HEADER_BYTES + rest["ext_bytes"]
    low_start = index_start + INDEX_ENTRY.itemsize * header.blocks
    require(len(data) >= low_start, "size", len(data), f"header, extensions and index are {low_start} bytes")
    ok = rest["index"] == section_checksum(data[HEADER_BYTES:low_start])
    require(ok, "index_checksum", f"{rest['index']:016x}", "is not that of extensions and index")
    rope, basis = read_extensions(data[HEADER_BYTES:index_start], header.head_dim)
    fits = (basis is not None) == (header.profile == CALIBRATED)
    named = "none" if basis is None else basis.hex()
    require(fits, "extension.basis", named, f"must be there exactly with profile {CALIBRATED}")
    index = np.frombuffer(data[index_start:low_start], INDEX_ENTRY)
    n, m = rows_of_blocks(header)
    check_index(header, index, n, m)
    layout = check_layout(header, index, n, m)
    whole = check_sections(header, data, low_start, rest, allow_preview)
    blocks = place_blocks(header, index, n, m, layout, low_start)
    shard = Shard(header, blocks, np.frombuffer(data, np.uint8), whole, low_start + header.low_bytes, rope, basis)
    if header.family == "kvs":
        for block in blocks:
            if block.rank:
                kvs_factor_bits(shard, block)
    return shard
