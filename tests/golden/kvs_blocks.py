"""The values of a KVS1 shard: FORMAT.md section 5, with the tables of section 7 read from that document when loaded."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvs_basis import Basis, metrics_of
from kvs_error import FormatError, require
from kvs_rope import embed
from kvs_shard import (
    DTYPES,
    FP8,
    GROUPS,
    LEVELS,
    PLAIN_BITS,
    RAW,
    RUN_BYTES,
    ZERO,
    Block,
    Bytes,
    Header,
    Ints,
    Shard,
    ceil_div,
    kvs_factor_bits,
    parse_shard,
)

Floats = npt.NDArray[np.float64]
Output = npt.NDArray[np.float32]

FORMAT_MD = Path(os.environ.get("KVSHRINK_FORMAT_MD", Path(__file__).resolve().parents[2] / "proto" / "FORMAT.md"))

TRELLIS_TABLES = FORMAT_MD.with_name("trellis_tables.txt")


def read_levels(document: Path = FORMAT_MD) -> dict[int, Floats]:
    """L_a for each a: ascending, both signs."""
    match = re.search(r"^```levels\n(.*?)^```", document.read_text("utf-8"), re.M | re.S)
    if match is None:
        raise ValueError(f"{document}: no ```levels block")
    tables: dict[int, Floats] = {}
    for part in re.split(r"^(?=\d+:$)", match[1], flags=re.M):
        if not part:
            continue
        name, _, numbers = part.partition(":")
        half = np.array(numbers.split(), np.float32).astype(np.float64)
        table = np.concatenate([-half[half > 0][::-1], half])
        if len(table) != int(name) or not (np.diff(table) > 0).all():
            raise ValueError(f"{document}: table {name} has {len(table)} levels or is not ascending")
        tables[int(name)] = table
    return tables


L = read_levels()


class Trellis(NamedTuple):
    values: int  # of a step
    free_bits: int  # of a step
    table: Floats  # [entry, value]


def read_trellises(document: Path = TRELLIS_TABLES) -> dict[int, Trellis]:
    """The tables of section 5.5, by code."""
    trellises: dict[int, Trellis] = {}
    lines = [line for line in document.read_text("utf-8").splitlines() if not line.startswith("#")]
    for part in re.split(r"^(?=code )", "\n".join(lines), flags=re.M)[1:]:
        head, _, numbers = part.partition("\n")
        _, code, _, values, _, free_bits = head.split()
        table = np.array(numbers.split(), np.float64).reshape(-1, int(values)) / 32
        if len(table) != 1 << (6 + int(values) + int(free_bits)):
            raise ValueError(f"{document}: table {code} has {len(table)} entries")
        trellises[int(code)] = Trellis(int(values), int(free_bits), table)
    return trellises


TRELLISES = read_trellises()


def e4m3_table() -> Floats:
    """Value of each e4m3 byte (OCP, finite): bias 7, subnormals below 2^-6, NaN at 7F and FF."""
    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    value = np.where(exponent == 0, mantissa / 8.0 * 2.0**-6, (1 + mantissa / 8.0) * 2.0 ** (exponent - 7.0))
    value[(byte & 127) == 127] = np.nan
    return np.where(byte & 128, -value, value)


E4M3 = e4m3_table()


def exact_values(data: Bytes, dtype: int) -> Output:
    """Raw rows in the header's dtype, as float32 without any rounding."""
    if dtype == 0:
        return data.view("<f4")
    if dtype == 1:
        return data.view("<f2").astype(np.float32)
    if dtype == 2:
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return E4M3[data].astype(np.float32)


def bit_fields(data: Bytes, start_bit: int, width: int, count: int) -> Ints:
    """`count` fields of `width` bits of a bit string, from `start_bit` on."""
    bits = np.unpackbits(data, bitorder="little")[start_bit : start_bit + width * count]
    weights = 1 << np.arange(width, dtype=np.int64)
    return bits.reshape(count, width).astype(np.int64) @ weights


def mix(z: int) -> int:
    mask = (1 << 64) - 1
    z = (z + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def signs(seed: int, count: int) -> Floats:
    return np.array([-1.0 if mix((seed << 32) + j) >> 63 else 1.0 for j in range(count)])


def hadamard(order: int) -> Floats:
    """(-1)^popcount(i AND j), by doubling."""
    matrix = np.ones((1, 1))
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


@functools.cache
def rotation(seed: int, d: int) -> Floats:
    """The orthogonal matrix R with rot(seed, x) = R x. Its inverse is its transpose: inverses of rows are rows @ R."""
    p = 1 << (d.bit_length() - 1)
    first = np.eye(d)
    first[:p, :p] = hadamard(p) * signs(seed, p) / np.sqrt(p)
    if p == d:
        return first
    second = np.eye(d)
    second[d - p :, d - p :] = hadamard(p) * signs(seed + 1, d)[d - p :] / np.sqrt(p)
    return second @ first


def scale8(q: npt.ArrayLike) -> Floats:
    return np.exp2((np.asarray(q, np.float64) - 191) / 8)


def residual_digits(shard: Shard, block: Block) -> Ints:
    """Digits of the coded rows, m x d."""
    data, d = shard.data[block.codes], shard.header.head_dim
    count = block.m * d
    if block.code in PLAIN_BITS:
        return bit_fields(data, 0, PLAIN_BITS[block.code], count).reshape(block.m, d)
    digits, bits = GROUPS[block.code]
    base = LEVELS[block.code]
    groups = bit_fields(data, 0, bits, ceil_div(count, digits))
    if (groups >= base**digits).any():
        value = int(groups[groups >= base**digits][0])
        raise FormatError(f"block[{block.number}].codes", value, f"a group must be below {base**digits}")
    columns = groups[:, None] // base ** np.arange(digits, dtype=np.int64) % base
    return columns.reshape(-1)[:count].reshape(block.m, d)


def trellis_values(data: Bytes, code: int, m: int, d: int) -> Floats:
    """Values of the coded rows, m x d: section 5.5."""
    values, free_bits, table = TRELLISES[code]
    runs = data.reshape(-1, RUN_BYTES[code])
    steps = 128 // values
    coded = np.unpackbits(runs[:, :16], axis=1, bitorder="little").astype(np.int64)
    free = np.unpackbits(runs[:, 16:], axis=1, bitorder="little").astype(np.int64).reshape(len(runs), steps, free_bits)
    width = 6 + values
    places = (values * np.arange(steps)[:, None] + np.arange(width)) % 128
    entries = coded[:, places] @ (1 << np.arange(width)) + (free @ (1 << np.arange(free_bits)) << width)
    rows: Floats = table[entries].reshape(-1)[: m * d].reshape(m, d)
    return rows


def finite_fp16(data: Bytes, field: str) -> Floats:
    values = data.view("<f2").astype(np.float64)
    if not np.isfinite(values).all():
        raise FormatError(field, float(values[~np.isfinite(values)][0]), "must be finite")
    return values


def kvs_low(shard: Shard, block: Block) -> Floats:
    x, y = kvs_factor_bits(shard, block)
    d, n, r = shard.header.head_dim, block.n, block.rank
    record = shard.data[block.factors]
    scale, digits = scale8(record[1 : 2 * r : 2]), record[2 * r :]
    channel, token = np.empty((r, d)), np.empty((r, n))
    at = 0
    for i in range(r):
        u = L[1 << int(y[i])][bit_fields(digits, at, int(y[i]), d)]
        at += int(y[i]) * d
        channel[i] = u / np.linalg.norm(u)
        token[i] = scale[i] * L[1 << int(x[i])][bit_fields(digits, at, int(x[i]), n)]
        at += int(x[i]) * n
    return (token @ rotation(5, n)).T @ (channel @ rotation(3, d))


def kvs_residual(shard: Shard, block: Block) -> Floats:
    record, d = shard.data[block.scales], shard.header.head_dim
    step = int(record[1])
    require(1 <= step <= 64, f"block[{block.number}].scale", step, "the step must be 1..64")
    offsets = bit_fields(record[2:], 0, 4, block.m)
    gains = np.where(offsets == 15, 0.0, scale8(record[0]) * np.exp2(-offsets * step / 16))
    if block.code in RUN_BYTES:
        values = trellis_values(shard.data[block.codes], block.code, block.m, d)
    else:
        values = L[LEVELS[block.code]][residual_digits(shard, block)]
    return gains[:, None] * (values @ rotation(1, d))


def eoptshrinkq_low(shard: Shard, block: Block) -> Floats:
    d, n, r = shard.header.head_dim, block.n, block.rank
    record = shard.data[block.factors]
    words = finite_fp16(record[: 2 * r + 64], f"block[{block.number}].factor")
    phi, book_u, book_v = words[:r], words[r : r + 16], words[r + 16 :]
    digits = bit_fields(record[2 * r + 64 :], 0, 4, r * (n + d)).reshape(r, n + d)
    low: Floats = (phi[:, None] * book_u[digits[:, :n]]).T @ book_v[digits[:, n:]]
    return low


def tq_residual(shard: Shard, block: Block) -> Floats:
    field, d = f"block[{block.number}].scale", shard.header.head_dim
    gains = finite_fp16(shard.data[block.scales], field)
    if (gains < 0).any():
        raise FormatError(field, float(gains[gains < 0][0]), "must not be negative")
    rows: Floats = L[LEVELS[block.code]][residual_digits(shard, block)] @ rotation(1, d)
    scaled: Floats = gains[:, None] / np.sqrt(d) * rows
    return scaled


def fp8_rows(shard: Shard, block: Block) -> Floats:
    data = shard.data[block.codes]
    values = E4M3[data]
    if np.isnan(values).any():
        raise FormatError(f"block[{block.number}].codes", f"{data[np.isnan(values)][0]:02x}", "is a NaN of e4m3")
    rows: Floats = values.reshape(block.m, -1) / 256
    return rows


def finite(rows: Floats) -> Output:
    largest = float(np.finfo(np.float32).max)
    return np.clip(rows, -largest, largest).astype(np.float32)


def coded_rows(shard: Shard, block: Block, low_rank: bool) -> Output:
    """The coded rows of a block whose code is not RAW or ZERO, m x d."""
    family, d = shard.header.family, shard.header.head_dim
    rows = np.zeros((block.m, d))
    if block.rank:
        low = kvs_low(shard, block) if family == "kvs" else eoptshrinkq_low(shard, block)
        rows += low[block.n - block.m :]
    if not low_rank:
        if block.code == FP8:
            rows += fp8_rows(shard, block)
        else:
            rows += kvs_residual(shard, block) if family == "kvs" else tq_residual(shard, block)
    return finite(np.ldexp(rows, block.exponent))


class Decoded(NamedTuple):
    k: Output  # [tokens, kv_heads, head_dim]
    v: Output | None  # None: a shard of keys only
    header: Header


def decode_shard(data: bytes | memoryview, low_rank: bool = False, basis: Basis | None = None) -> Decoded:
    """K and V (None: keys only) of a shard.

    With low_rank, `data` may be a preview: raw rows and the low-rank part only, the rest 0.
    """
    return decode_parsed(parse_shard(data, allow_preview=low_rank), low_rank, basis)


def decode_parsed(shard: Shard, low_rank: bool = False, basis: Basis | None = None) -> Decoded:
    header = shard.header
    dtype = DTYPES.index(header.dtype)
    metrics = None
    if shard.basis is not None:
        metrics = metrics_of(basis, shard.basis, header.layer, header.kv_heads, header.head_dim)
    out = np.zeros((header.kinds, header.tokens, header.kv_heads, header.head_dim), np.float32)
    for block in shard.blocks:
        rows = out[block.kind, block.first_row : block.first_row + block.n, block.head]
        split = block.n - block.m
        rows[:split] = exact_values(shard.data[block.raw], dtype).reshape(split, header.head_dim)
        if block.code == RAW:
            if not low_rank:
                rows[split:] = exact_values(shard.data[block.codes], dtype).reshape(block.m, header.head_dim)
        elif block.code != ZERO:
            coded = coded_rows(shard, block, low_rank)
            if metrics is not None and block.kind == 0:
                coded = finite(coded @ metrics.inverse[block.head])
            if shard.rope is not None and block.kind == 0:
                coded = embed(shard.rope, header.first_token + block.first_row + split, coded)
            rows[split:] = coded
    return Decoded(out[0], None if header.keys_only else out[1], header)
