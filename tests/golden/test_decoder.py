"""The Python decoder against shards built by hand (make_kvs.py): values by the sums of FORMAT.md, and every check."""

from __future__ import annotations

import dataclasses
import math
import random
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import make_kvs as make
from decode_kvs import FormatError, decode_file, decode_shard
from kvs_blocks import TRELLISES, L, e4m3_table
from make_kvs import Block, FileSpec, ShardSpec, make_file, make_shard
from xxh64 import xxh64

HERE = Path(__file__).resolve().parent


def test_xxh64_vectors() -> None:
    """The vectors of the xxHash repository's specification and of common implementations."""
    assert xxh64(b"") == 0xEF46DB3751D8E999
    assert xxh64(b"a") == 0xD24EC4F1A98C6E5B
    assert xxh64(b"abc") == 0x44BC2CF5AD770999
    assert xxh64(b"Nobody inspects the spammish repetition") == 0xFBCEA83C8A378BF1


def test_levels_are_lloyd_max() -> None:
    """Each level is the mean of the standard normal over its cell: the tables are what the document says they are."""
    for count, levels in L.items():
        edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        density = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
        mass = np.array([0.5 * (1 + math.erf(e / math.sqrt(2))) for e in edges])
        centroids = (density[:-1] - density[1:]) / np.diff(mass)
        np.testing.assert_allclose(centroids, levels, atol=2e-6, rtol=2e-6, err_msg=str(count))


def test_e4m3_corners() -> None:
    table = e4m3_table()
    assert table[0x7E] == 448
    assert table[0x01] == 2.0**-9
    assert table[0xB8] == -1
    assert np.isnan(table[[0x7F, 0xFF]]).all()


@pytest.mark.parametrize("d", [1, 2, 3, 5, 8, 12])
def test_rotation_of_the_maker_is_orthogonal(d: int) -> None:
    x = [random.Random(d).gauss(0, 1) for _ in range(d)]
    back = make.unrotate(1, make.rotate(1, x))
    np.testing.assert_allclose(back, x, atol=1e-12)


LEVELS_OF = {16: 3, 17: 4, 18: 5, 19: 6, 20: 8, 21: 12, 22: 16}  # by code


def digits(rng: random.Random, levels: int, count: int) -> list[int]:
    return [rng.randrange(levels) for _ in range(count)]


def residual_rows(code: int, chosen: Sequence[int], d: int) -> list[list[float]]:
    table = L[LEVELS_OF[code]]
    rows = [chosen[start : start + d] for start in range(0, len(chosen), d)]
    return [make.unrotate(1, [float(table[c]) for c in row]) for row in rows]


def trellis_rows(code: int, codes: bytes, m: int, d: int) -> list[list[float]]:
    """Bit by bit. The shape of each code is written here once more."""
    values, free_bits = {32: (2, 1), 33: (1, 1), 34: (2, 3), 35: (1, 2)}[code]
    run_bytes = 16 + 128 // values * free_bits // 8
    out: list[float] = []
    for start in range(0, len(codes), run_bytes):
        bits = [byte >> i & 1 for byte in codes[start : start + run_bytes] for i in range(8)]
        for step in range(128 // values):
            window = sum(bits[(values * step + i) % 128] << i for i in range(6 + values))
            free = sum(bits[128 + free_bits * step + i] << i for i in range(free_bits))
            out += [float(value) for value in TRELLISES[code].table[(free << 6 + values) + window]]
    return [make.unrotate(1, out[t * d : (t + 1) * d]) for t in range(m)]


@dataclasses.dataclass
class Made:
    shard: bytes
    k: npt.NDArray[np.float64]  # [tokens, 1, d]
    low: npt.NDArray[np.float64]


def kvs_shard(code: int, d: int, n: int, raw_rows: int, exponent: int, parts: Sequence[tuple[int, int]]) -> Made:
    """K has one block of every feature, V is zero."""
    rng = random.Random(1000 * code + d)
    m = n - raw_rows
    raw = [[rng.choice([-2.5, 0.0, 1.25]) for _ in range(d)] for _ in range(raw_rows)]
    factors = [(x, y, rng.randrange(170, 200), digits(rng, 2**x, n), digits(rng, 2**y, d)) for x, y in parts]
    offsets = [rng.randrange(16) for _ in range(m - 1)] + [15]
    if code in LEVELS_OF:
        chosen = digits(rng, LEVELS_OF[code], m * d)
        codes = make.pack_digits(code, chosen)
        residual = residual_rows(code, chosen, d)
    else:
        codes = rng.randbytes(-(-m * d // 128) * {32: 24, 33: 32, 34: 40, 35: 48}[code])
        residual = trellis_rows(code, codes, m, d)
    low = np.zeros((n, d))
    for x, y, scale, token, channel in factors:
        u = [float(L[2**y][c]) for c in channel]
        length = math.sqrt(sum(value * value for value in u))
        v = make.unrotate(3, [value / length for value in u])
        a = make.unrotate(5, [2 ** ((scale - 191) / 8) * float(L[2**x][c]) for c in token])
        low += np.outer(a, v)
    step = 1 + code
    gains = [0.0 if o == 15 else 2 ** ((180 - 191) / 8) * 2 ** (-o * step / 16) for o in offsets]
    rows = low[raw_rows:] + np.array(gains)[:, None] * residual
    record = bytes([180, step]) + make.pack_offsets(offsets)
    raw_bytes = np.array(raw, np.float16).tobytes()
    block = Block(
        raw=raw_bytes, code=code, exponent=exponent, rank=len(parts), factors=make.pack_kvs_factors(factors),
        scales=record, codes=codes,
    )  # fmt: skip
    shard = make_shard(ShardSpec([block, Block(raw=raw_bytes)], head_dim=d, tokens=n, raw_rows=raw_rows))
    head = np.array(raw).reshape(raw_rows, d)
    k = np.concatenate([head, 2.0**exponent * rows])
    return Made(shard, k[:, None], np.concatenate([head, 2.0**exponent * low[raw_rows:]])[:, None])


@pytest.mark.parametrize("code", [16, 17, 18, 19, 20, 21, 22, 32, 33, 34, 35])
@pytest.mark.parametrize(("d", "n", "raw_rows"), [(4, 3, 1), (5, 7, 0), (12, 6, 2), (1, 2, 0), (30, 10, 1)])
def test_kvs_block(code: int, d: int, n: int, raw_rows: int) -> None:
    made = kvs_shard(code, d, n, raw_rows, exponent=-3, parts=[(3, 5), (2, 8)][: min(n, d)])
    decoded = decode_shard(made.shard)
    np.testing.assert_allclose(decoded.k, made.k, rtol=1e-6, atol=1e-6)
    assert decoded.v is not None
    assert not decoded.v[raw_rows:].any()
    low = decode_shard(made.shard, low_rank=True)
    np.testing.assert_allclose(low.k, made.low, rtol=1e-6, atol=1e-6)


def test_preview_is_the_low_rank_part() -> None:
    made = kvs_shard(18, 8, 9, 2, 0, [(4, 4)])
    codes_bytes = 20  # ceil(7 ceil(7 * 8 / 3) / 8) = 17, padded
    scales_bytes = 8  # 2 + 7 offsets of 4 bits, padded
    cut = made.shard[: len(made.shard) - codes_bytes - scales_bytes]
    np.testing.assert_allclose(decode_shard(cut, low_rank=True).k, made.low, atol=1e-6)
    with pytest.raises(FormatError, match="'size'"):
        decode_shard(cut)
    with pytest.raises(FormatError, match="'size'"):
        decode_shard(cut[:-1], low_rank=True)


@pytest.mark.parametrize("code", [17, 20, 22])
@pytest.mark.parametrize("family", ["tq2", "eoptshrinkq2"])
def test_tq_and_eoptshrinkq_block(code: int, family: str) -> None:
    d, n, r = 6, 5, 2
    rng = random.Random(code)
    gains = [0.5, 1.25, 3.0, 0.0, 7.5]
    chosen = digits(rng, {17: 4, 20: 8, 22: 16}[code], n * d)
    rows = np.array(gains)[:, None] / math.sqrt(d) * residual_rows(code, chosen, d)
    block = Block(code=code, scales=struct.pack("<5e", *gains), codes=make.pack_digits(code, chosen))
    if family == "eoptshrinkq2":
        phi, book_u, book_v = [3.0, 0.75], [i / 4 - 2 for i in range(16)], [i / 8 - 1 for i in range(16)]
        writer = make.BitWriter()
        for i in range(r):
            u, v = digits(rng, 16, n), digits(rng, 16, d)
            rows = rows + phi[i] * np.outer([book_u[c] for c in u], [book_v[c] for c in v])
            for c in u + v:
                writer.put(c, 4)
        block.rank, block.factors = r, struct.pack("<34e", *phi, *book_u, *book_v) + writer.bytes()
    spec = ShardSpec([block, Block()], profile=make.PROFILE_ID[family], head_dim=d, tokens=n)
    np.testing.assert_allclose(decode_shard(make_shard(spec)).k[:, 0], rows, rtol=1e-6, atol=1e-6)


def test_fp8_block() -> None:
    block = Block(code=2, exponent=4, codes=bytes([0x38, 0xB8, 0x7E, 0x01]))
    decoded = decode_shard(make_shard(ShardSpec([block, Block()], profile=1, head_dim=4, tokens=1)))
    np.testing.assert_array_equal(decoded.k[0, 0], np.array([1, -1, 448, 2.0**-9]) * 16 / 256)


@pytest.mark.parametrize("dtype", [0, 1, 2, 3])
def test_raw_blocks_are_bit_exact(dtype: int) -> None:
    size, exact = (4, 2, 2, 1)[dtype], [0x3F800000, 0x3C00, 0x3F80, 0x38][dtype]
    nan = [0x7FC00000, 0x7E00, 0x7FC0, 0x7F][dtype]
    block = Block(code=1, codes=exact.to_bytes(size, "little") + nan.to_bytes(size, "little"))
    decoded = decode_shard(make_shard(ShardSpec([block, Block()], profile=0, dtype=dtype, head_dim=2, tokens=1)))
    assert decoded.k[0, 0, 0] == 1
    assert np.isnan(decoded.k[0, 0, 1])


def test_blocks_are_placed_by_kind_head_and_number() -> None:
    """Two heads of 129 tokens: 8 blocks, each with its own number as its value."""
    blocks = []
    for number in range(8):
        rows = 128 if number % 2 == 0 else 1
        blocks.append(Block(code=1, codes=np.full(rows, number, np.float16).tobytes()))
    decoded = decode_shard(make_shard(ShardSpec(blocks, profile=0, head_dim=1, kv_heads=2, tokens=129)))
    assert decoded.k[0].ravel().tolist() == [0, 2]
    assert decoded.k[128].ravel().tolist() == [1, 3]
    assert decoded.v is not None
    assert decoded.v[127].ravel().tolist() == [4, 6]
    assert decoded.v[128].ravel().tolist() == [5, 7]


def test_keys_alone() -> None:
    """With flag 1 there are the blocks of K and no others."""
    blocks = [Block(code=1, codes=np.full(3, number, np.float16).tobytes()) for number in range(2)]
    decoded = decode_shard(make_shard(ShardSpec(blocks, profile=0, head_dim=1, kv_heads=2, tokens=3, flags=1)))
    assert decoded.header.keys_only
    assert decoded.v is None
    assert decoded.k[:, :, 0].tolist() == [[0, 1]] * 3


def good_blocks() -> list[Block]:
    scales = bytes([190, 5]) + make.pack_offsets([0, 1, 2])
    block = Block(code=17, scales=scales, codes=make.pack_digits(17, [0, 1, 2, 3] * 3))
    return [block, Block()]


FACTORS = make.pack_kvs_factors([(2, 2, 190, [0, 1, 2], [0, 1, 2, 3])])


def numbered(cases: Sequence[tuple[Any, ...]]) -> list[str]:
    return [f"{i}-{case[0]}" for i, case in enumerate(cases)]


BAD_SHARDS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("magic", {"magic": b"KVS2"}, {}),
    ("version", {"version": 2}, {}),
    ("header_checksum", {"header_checksum": 1}, {}),
    ("profile", {"profile": 12}, {}),
    ("dtype", {"dtype": 4}, {}),
    ("head_dim", {"head_dim": 0}, {}),
    ("head_dim", {"head_dim": 513}, {}),
    ("kv_heads", {"kv_heads": 0}, {}),
    ("kv_heads", {"kv_heads": 257}, {}),
    ("tokens", {"tokens": 0}, {}),
    ("tokens", {"tokens": 65537}, {}),
    ("entries", {"tokens": 65536, "kv_heads": 256, "head_dim": 512}, {}),
    ("first_token", {"first_token": 2**31 - 3}, {}),
    ("layer", {"layer": 4096}, {}),
    ("flags", {"flags": 4}, {}),
    ("codes_bytes", {"flags": 2, "codes_bytes": 2**31 + 4}, {}),
    ("codes_checksum", {"flags": 2, "codes_bytes": 8, "tail": b"\0\0\0\1"}, {}),
    ("flags", {"flags": 7}, {}),
    ("flags", {"flags": 0x8001}, {}),
    ("index_checksum", {"flags": 1}, {}),
    ("raw_rows", {"raw_rows": 4}, {}),
    ("ext_bytes", {"ext_bytes": 4}, {}),
    ("ext_bytes", {"ext_bytes": 4104}, {}),
    ("size", {"kv_heads": 256}, {}),
    ("index_checksum", {"index_checksum": 1}, {}),
    ("extension.type", {"extensions": bytes(8)}, {}),
    ("index[0].exponent", {}, {"exponent": -127}),
    ("index[0].code", {}, {"code": 2}),
    ("index[0].code", {}, {"code": 36}),
    ("index[0].rank", {}, {"rank": 4}),
    ("index[0].reserved", {}, {"reserved": 1}),
    ("index[0].factor_bytes", {}, {"factor_bytes": 1}),
    ("low_bytes", {"low_bytes": 1}, {}),
    ("scales_bytes", {"scales_bytes": 1}, {}),
    ("codes_bytes", {"codes_bytes": 1}, {}),
    ("size", {"tail": b"x"}, {}),
    ("low_checksum", {"low_checksum": 1}, {}),
    ("scales_checksum", {"scales_checksum": 1}, {}),
    ("codes_checksum", {"codes_checksum": 1}, {}),
    ("block[0].bits", {}, {"rank": 1, "factors": b"\x12" + FACTORS[1:]}),
    ("block[0].factor_bytes", {}, {"rank": 1, "factors": FACTORS + b"\0"}),
    ("block[0].codes", {}, {"code": 18, "codes": bytes([125, 0, 0, 0])}),
    ("block[0].codes", {}, {"code": 16, "codes": bytes([243, 0, 0])}),
    ("block[0].codes", {}, {"code": 21, "codes": b"\xff\xff\x03\0\0\0\0"}),
    ("block[0].codes", {}, {"code": 19, "codes": b"\x60\x1e\0\0\0"}),
    ("block[0].scale", {}, {"scales": b"\xbe\0" + bytes(2)}),
]


@pytest.mark.parametrize(("field", "header", "block"), BAD_SHARDS, ids=numbered(BAD_SHARDS))
def test_violation_names_its_field(field: str, header: dict[str, Any], block: dict[str, Any]) -> None:
    blocks = good_blocks()
    decode_shard(make_shard(ShardSpec(blocks)))
    blocks[0] = dataclasses.replace(blocks[0], **block)
    with pytest.raises(FormatError) as error:
        decode_shard(make_shard(ShardSpec(blocks, **header)))
    assert error.value.field == field


@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0])
def test_bad_row_scale(scale: float) -> None:
    block = Block(code=17, scales=struct.pack("<e", scale), codes=b"\0")
    shard = make_shard(ShardSpec([block, Block()], profile=2, head_dim=4, tokens=1))
    with pytest.raises(FormatError, match=r"block\[0\].scale"):
        decode_shard(shard)


def test_bad_fp8_value() -> None:
    shard = make_shard(ShardSpec([Block(), Block(code=2, codes=b"\xff")], profile=1, head_dim=1, tokens=1))
    with pytest.raises(FormatError, match=r"block\[1\].codes"):
        decode_shard(shard)


def test_every_truncation_is_refused() -> None:
    shard = make_shard(ShardSpec(good_blocks()))
    for size in range(len(shard)):
        with pytest.raises(FormatError):
            decode_shard(shard[:size])


def test_every_bit_flip_is_refused() -> None:
    shard = make_shard(ShardSpec(good_blocks()))
    for bit in range(8 * len(shard)):
        flipped = bytearray(shard)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            decode_shard(bytes(flipped))


def file_shards(**changes: Any) -> list[bytes]:
    """Two chunks of 3 tokens, layers 1 and 5; `changes` go to the last shard."""
    shards = []
    for i in range(4):
        spec = ShardSpec(good_blocks(), layer=(1, 5)[i % 2], first_token=3 * (i // 2))
        shards.append(make_shard(dataclasses.replace(spec, **changes) if i == 3 else spec))
    return shards


def test_file_joins_its_chunks() -> None:
    file, layers = decode_file(make_file(FileSpec(file_shards(), [1, 5])))
    assert file.metadata == {"model": "none"}
    assert sorted(layers) == [1, 5]
    k = decode_shard(file_shards()[0]).k
    np.testing.assert_array_equal(layers[5].k, np.concatenate([k, k]))


BAD_FILES: list[tuple[str, dict[str, Any]]] = [
    ("magic", {"magic": b"KVSG"}),
    ("version", {"version": 2}),
    ("header_checksum", {"header_checksum": 1}),
    ("flags", {"flags": 2}),
    ("chunks", {"chunks": 0}),
    ("chunks", {"chunks": 65537}),
    ("layers", {"layer_count": 0}),
    ("layers", {"layer_count": 4097}),
    ("layers", {"chunks": 65536, "layer_count": 17}),
    ("metadata_bytes", {"metadata_bytes": 1}),
    ("metadata_bytes", {"metadata_bytes": 2**20 + 1}),
    ("reserved", {"reserved": 1}),
    ("size", {"chunks": 60000}),
    ("directory_checksum", {"directory_checksum": 1}),
    ("metadata_checksum", {"metadata_checksum": 1}),
    ("metadata", {"metadata": b'{"a": 1}'}),
    ("metadata", {"metadata": b"[]"}),
    ("metadata", {"metadata": b"{\xff}"}),
    ("directory[1].chunk", {"entries": {1: {"chunk": 1}}}),
    ("directory[1].layer", {"entries": {1: {"layer": 1}}}),
    ("directory[1].layer", {"entries": {1: {"layer": 4096}}}),
    ("directory[2].layer", {"entries": {2: {"layer": 2}}}),
    ("directory[0].offset", {"entries": {0: {"offset": 0}}}),
    ("directory[0].length", {"entries": {0: {"length": 95}}}),
    ("directory[3].length", {"entries": {3: {"length": 2**63}}}),
    ("directory[0].checksum", {"entries": {0: {"checksum": 1}}}),
    ("layer", {"shards": file_shards(layer=6)}),
    ("tokens", {"shards": file_shards(blocks=[Block(), Block()], tokens=2)}),
    ("first_token", {"shards": file_shards(first_token=4)}),
    ("dtype", {"shards": file_shards(dtype=2)}),
    ("kv_heads", {"shards": file_shards(blocks=[Block()] * 4, kv_heads=2)}),
    ("head_dim", {"shards": file_shards(blocks=[Block(), Block()], head_dim=2)}),
    ("flags", {"shards": file_shards(blocks=[Block()], flags=1)}),
]


@pytest.mark.parametrize(("field", "changes"), BAD_FILES, ids=numbered(BAD_FILES))
def test_file_violation_names_its_field(field: str, changes: dict[str, Any]) -> None:
    spec = FileSpec(**{"shards": file_shards(), "layers": [1, 5], **changes})
    with pytest.raises(FormatError) as error:
        decode_file(make_file(spec))
    assert error.value.field == field
