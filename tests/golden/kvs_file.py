"""Reads .kvs files: the shards of a whole run of tokens, FORMAT.md section 8."""

from __future__ import annotations

import dataclasses
import json
import struct
from typing import Any, NamedTuple

import numpy as np

from kvs_basis import Basis
from kvs_blocks import Output, decode_shard
from kvs_error import require
from kvs_shard import Header
from xxh64 import xxh64

HEADER_BYTES = 48
ENTRY = struct.Struct("<IIQQQ")
FLAG_PREVIEWS = 1


class Entry(NamedTuple):
    chunk: int
    layer: int
    offset: int
    length: int
    checksum: int


@dataclasses.dataclass(frozen=True)
class KvsFile:
    previews: bool
    chunks: int
    layers: list[int]
    metadata: dict[str, str]
    entries: list[Entry]
    data: memoryview

    def shard(self, number: int) -> memoryview:
        entry = self.entries[number]
        shard = self.data[entry.offset : entry.offset + entry.length]
        ok = entry.checksum == xxh64(shard)
        require(ok, f"directory[{number}].checksum", f"{entry.checksum:016x}", "is not that of the shard")
        return shard


class LayerTensors(NamedTuple):
    k: Output  # [tokens of all chunks, kv_heads, head_dim]
    v: Output | None  # None: keys only


def read_directory(data: memoryview, chunks: int, layers: int, shards_start: int) -> list[Entry]:
    entries: list[Entry] = []
    at = shards_start
    for i in range(chunks * layers):
        entry = Entry(*ENTRY.unpack_from(data, HEADER_BYTES + i * ENTRY.size))
        chunk, place = divmod(i, layers)
        require(entry.chunk == chunk, f"directory[{i}].chunk", entry.chunk, f"must be {chunk}")
        require(entry.layer <= 4095, f"directory[{i}].layer", entry.layer, "must be 0..4095")
        if chunk > 0:
            same = entries[place].layer
            require(entry.layer == same, f"directory[{i}].layer", entry.layer, f"is {same} in chunk 0")
        elif place > 0:
            before = entries[i - 1].layer
            require(entry.layer > before, f"directory[{i}].layer", entry.layer, f"must be above {before}")
        require(entry.offset == at, f"directory[{i}].offset", entry.offset, f"must be {at}")
        require(entry.length >= 96, f"directory[{i}].length", entry.length, "must be at least 96")
        at += entry.length
        require(at <= len(data), f"directory[{i}].length", entry.length, f"the file ends at {len(data)}")
        entries.append(entry)
    last = len(entries) - 1
    require(at == len(data), f"directory[{last}].length", entries[last].length, f"the file ends at {len(data)}")
    return entries


def read_metadata(data: memoryview) -> dict[str, str]:
    try:
        metadata: Any = json.loads(bytes(data).decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        require(False, "metadata", str(error), "must be JSON in UTF-8")
    ok = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    require(ok, "metadata", type(metadata).__name__, "must be an object whose values are strings")
    return dict(metadata)


def parse_file(data: bytes | memoryview) -> KvsFile:
    """All checks of section 8 but those of the shards."""
    data = memoryview(data)
    require(len(data) >= HEADER_BYTES, "size", len(data), f"a header is {HEADER_BYTES} bytes")
    (magic, version, flags, chunks, layers, metadata_bytes, reserved, directory_sum, metadata_sum, header_sum) = (
        struct.unpack_from("<4sHHIIIIQQQ", data)
    )
    require(magic == b"KVSF", "magic", magic.hex(), "must be 4b565346")
    require(version == 1, "version", version, "must be 1")
    require(header_sum == xxh64(data[:40]), "header_checksum", f"{header_sum:016x}", "is not that of the header")
    require(flags & ~FLAG_PREVIEWS == 0, "flags", flags, "bits 1 and up must be 0")
    require(1 <= chunks <= 65536, "chunks", chunks, "must be 1..65536")
    require(1 <= layers <= 4096, "layers", layers, "must be 1..4096")
    require(chunks * layers <= 1 << 20, "layers", layers, f"chunks ({chunks}) x layers must be at most 2^20")
    require(2 <= metadata_bytes <= 1 << 20, "metadata_bytes", metadata_bytes, "must be 2..2^20")
    require(reserved == 0, "reserved", reserved, "must be 0")
    directory_end = HEADER_BYTES + ENTRY.size * chunks * layers
    shards_start = directory_end + metadata_bytes
    require(len(data) >= shards_start, "size", len(data), f"header, directory and metadata are {shards_start} bytes")
    ok = directory_sum == xxh64(data[HEADER_BYTES:directory_end])
    require(ok, "directory_checksum", f"{directory_sum:016x}", "is not that of the directory")
    ok = metadata_sum == xxh64(data[directory_end:shards_start])
    require(ok, "metadata_checksum", f"{metadata_sum:016x}", "is not that of the metadata")
    entries = read_directory(data, chunks, layers, shards_start)
    metadata = read_metadata(data[directory_end:shards_start])
    names = [entry.layer for entry in entries[:layers]]
    return KvsFile(bool(flags & FLAG_PREVIEWS), chunks, names, metadata, entries, data)


def check_agreement(
    entry: Entry, header: Header, of_chunk: Header | None, end: int | None, first: Header | None
) -> None:
    """`of_chunk` is a shard of the same chunk, `end` where the chunk before ends, `first` a shard of the same layer."""
    require(header.layer == entry.layer, "layer", header.layer, f"the directory says {entry.layer}")
    if of_chunk is not None:
        require(header.tokens == of_chunk.tokens, "tokens", header.tokens, f"the chunk has {of_chunk.tokens}")
        same = of_chunk.first_token
        require(header.first_token == same, "first_token", header.first_token, f"the chunk starts at {same}")
    elif end is not None:
        require(header.first_token == end, "first_token", header.first_token, f"the chunk before ends at {end}")
    if first is not None:
        for field in ("dtype", "kv_heads", "head_dim"):
            given, expected = getattr(header, field), getattr(first, field)
            require(given == expected, field, given, f"is {expected} in chunk 0")
        require(header.keys_only == first.keys_only, "flags", int(header.keys_only), "differ from those in chunk 0")


def join(pieces: list[LayerTensors]) -> LayerTensors:
    values = [piece.v for piece in pieces if piece.v is not None]
    return LayerTensors(np.concatenate([piece.k for piece in pieces]), np.concatenate(values) if values else None)


def decode_file(
    data: bytes | memoryview, low_rank: bool = False, basis: Basis | None = None
) -> tuple[KvsFile, dict[int, LayerTensors]]:
    """K and V of every layer, chunks joined."""
    file = parse_file(data)
    low_rank = low_rank or file.previews
    parts: dict[int, list[LayerTensors]] = {layer: [] for layer in file.layers}
    first: dict[int, Header] = {}
    of_chunk: Header | None = None
    end: int | None = None
    for i, entry in enumerate(file.entries):
        if i % len(file.layers) == 0 and of_chunk is not None:
            end, of_chunk = of_chunk.first_token + of_chunk.tokens, None
        k, v, header = decode_shard(file.shard(i), low_rank, basis)
        check_agreement(entry, header, of_chunk, end, first.get(entry.layer))
        of_chunk = header
        first.setdefault(entry.layer, header)
        parts[entry.layer].append(LayerTensors(k, v))
    return file, {layer: join(pieces) for layer, pieces in parts.items()}
