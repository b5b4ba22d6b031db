#!/usr/bin/env python3
"""Decodes KVS1 shards and .kvs files: a second reader, written from proto/FORMAT.md alone.

It shares no code with the C++ library, so that the two can be held against each other. kvs_shard.py is the structure and
its checks, kvs_blocks.py the values, kvs_file.py the container.

    decode_kvs.py IN.kvs OUT.npz     arrays layer.{i}.k and layer.{i}.v, float32 [tokens, kv_heads, head_dim]
    decode_kvs.py IN.kvs --json      headers, sizes and blocks

IN is a bare shard or a .kvs file. As a module: decode_shard(bytes) gives K, V and the header, decode_file(bytes) those of a file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from kvs_blocks import Decoded, decode_parsed, decode_shard
from kvs_file import decode_file, parse_file
from kvs_shard import FormatError, Header, parse_shard

__all__ = ["Decoded", "FormatError", "Header", "decode_file", "decode_shard"]


def describe(data: bytes | memoryview, preview: bool) -> dict[str, Any]:
    """Header, sizes and blocks of a shard, all of it checked."""
    shard = parse_shard(data, preview)
    decoded = decode_parsed(shard, preview)
    return {
        **dataclasses.asdict(shard.header),
        "bytes": len(data),
        "preview_bytes": shard.preview_bytes,
        "bits_per_entry": 8 * len(data) / (decoded.k.size + decoded.v.size),
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


def run(data: bytes, output: Path | None, as_json: bool, low_rank: bool) -> None:
    arrays: dict[str, Any] = {}
    if data[:4] == b"KVS1":
        summary: dict[str, Any] = {"metadata": {}, "shards": [describe(data, low_rank)] if as_json else []}
        if output is not None:
            k, v, header = decode_shard(data, low_rank)
            arrays = {f"layer.{header.layer}.k": k, f"layer.{header.layer}.v": v}
    else:
        file = parse_file(data)
        numbers = range(len(file.entries)) if as_json else ()
        shards = [describe(file.shard(i), low_rank or file.previews) for i in numbers]
        summary = {"metadata": file.metadata, "shards": shards}
        if output is not None:
            for layer, tensors in decode_file(data, low_rank)[1].items():
                arrays |= {f"layer.{layer}.k": tensors.k, f"layer.{layer}.v": tensors.v}
    if as_json:
        print(json.dumps(summary))
    if output is not None:
        np.savez(output, **arrays)


def main() -> int:
    parser = argparse.ArgumentParser(description="Decodes shards and .kvs files (independent of the C++ library).")
    parser.add_argument("input", type=Path, metavar="IN.kvs")
    parser.add_argument("output", type=Path, nargs="?", metavar="OUT.npz")
    parser.add_argument("--json", action="store_true", help="print headers, sizes and blocks")
    parser.add_argument("--low-rank", action="store_true", help="decode the low-rank part only; IN may be a preview")
    options = parser.parse_args()
    if options.output is None and not options.json:
        parser.error("give OUT.npz or --json")
    try:
        run(options.input.read_bytes(), options.output, options.json, options.low_rank)
    except (FormatError, OSError) as error:
        print(f"{options.input}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
