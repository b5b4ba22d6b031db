#!/usr/bin/env python3
"""Decodes KVS1 shards and .kvs files: a second reader, written from proto/FORMAT.md alone.

It shares no code with the C++ library, so that the two can be held against each other. kvs_shard.py is the structure
and its checks, kvs_blocks.py the values, kvs_file.py the container.

    decode_kvs.py IN.kvs OUT.safetensors|OUT.npz   layer.{i}.k and (where there is V) layer.{i}.v, float32
                                                   [tokens, kv_heads, head_dim]
    decode_kvs.py IN.kvs --json                    headers, sizes and blocks

IN is a bare shard or a .kvs file. As a module: decode_shard(bytes) gives K, V and the header, decode_file(bytes) those
of a file, decode_bytes(bytes) the arrays of either.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np

from kvs_basis import Basis, read_basis
from kvs_blocks import Decoded, Output, decode_parsed, decode_shard
from kvs_error import FormatError
from kvs_file import decode_file, parse_file
from kvs_shard import Header, parse_shard
from safetensors_writer import write_safetensors

__all__ = ["Decoded", "FormatError", "Header", "decode_bytes", "decode_file", "decode_shard"]


def describe(data: bytes | memoryview, preview: bool, basis: Basis | None = None) -> dict[str, Any]:
    """Header, sizes and blocks of a shard, all of it checked."""
    shard = parse_shard(data, preview)
    decoded = decode_parsed(shard, preview, basis)
    return {
        **dataclasses.asdict(shard.header),
        "bytes": len(data),
        "preview_bytes": shard.preview_bytes,
        "rope": None if shard.rope is None else dataclasses.asdict(shard.rope),
        "basis": None if shard.basis is None else shard.basis.hex(),
        "bits_per_entry": 8 * len(data) / (shard.header.kinds * decoded.k.size),
        "blocks": [
            {
                "kind": "kv"[block.kind],
                "head": block.head,
                "first_row": block.first_row,
                "rows": block.n,
                "coded_rows": block.m,
                "exponent": block.exponent,
                "code": block.code,
                "rank": block.rank,
            }
            for block in shard.blocks
        ],
    }


def name_arrays(layer: int, k: Output, v: Output | None) -> dict[str, Output]:
    named = {f"layer.{layer}.k": k}
    return named if v is None else {**named, f"layer.{layer}.v": v}


def decode_bytes(
    data: bytes, low_rank: bool = False, basis: Basis | None = None
) -> tuple[dict[str, Output], dict[str, str]]:
    """Arrays by name (layer.{i}.k, layer.{i}.v) and metadata, of a bare shard or a .kvs file."""
    if data[:4] == b"KVS1":
        k, v, header = decode_shard(data, low_rank, basis)
        return name_arrays(header.layer, k, v), {}
    file, layers = decode_file(data, low_rank, basis)
    arrays: dict[str, Output] = {}
    for layer, (k, v) in layers.items():
        arrays |= name_arrays(layer, k, v)
    return arrays, file.metadata


def describe_bytes(data: bytes, low_rank: bool, basis: Basis | None = None) -> dict[str, Any]:
    if data[:4] == b"KVS1":
        return {"metadata": {}, "shards": [describe(data, low_rank, basis)]}
    file = parse_file(data)
    shards = [describe(file.shard(i), low_rank or file.previews, basis) for i in range(len(file.entries))]
    return {"metadata": file.metadata, "shards": shards}


def run(data: bytes, output: Path | None, as_json: bool, low_rank: bool, basis: Basis | None) -> None:
    if as_json:
        print(json.dumps(describe_bytes(data, low_rank, basis)))
    if output is None:
        return
    arrays, metadata = decode_bytes(data, low_rank, basis)
    if output.suffix == ".npz":
        np.savez(output, **cast(Any, arrays))
    else:
        write_safetensors(output, arrays, metadata)


def main() -> int:
    parser = argparse.ArgumentParser(description="Decodes shards and .kvs files (independent of the C++ library).")
    parser.add_argument("input", type=Path, metavar="IN.kvs")
    parser.add_argument("output", type=Path, nargs="?", metavar="OUT.safetensors|OUT.npz")
    parser.add_argument("--json", action="store_true", help="print headers, sizes and blocks")
    parser.add_argument("--low-rank", action="store_true", help="decode the low-rank part only; IN may be a preview")
    parser.add_argument("--basis", type=Path, help="calibrated basis (.kvb) of profile kvs2c")
    options = parser.parse_args()
    if options.output is None and not options.json:
        parser.error("give an output or --json")
    if options.output is not None and options.output.suffix not in (".npz", ".safetensors"):
        parser.error(f"{options.output}: must end in .safetensors or .npz")
    try:
        basis = None if options.basis is None else read_basis(options.basis.read_bytes())
        run(options.input.read_bytes(), options.output, options.json, options.low_rank, basis)
    except (FormatError, OSError) as error:
        print(f"{options.input}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
