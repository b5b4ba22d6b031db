"""Parts of requests, with their arguments checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from kvshrink.errors import InvalidArgument
from kvshrink.rope import Ropes, of_layer
from kvshrink.streams import Job
from kvshrink.types import profile_number
from kvshrink.v1 import types_pb2 as types


def sized(header: Any, body: Sequence[memoryview]) -> Job:
    job = Job(header, [*body])
    header.body_bytes = job.body_bytes
    return job


def count(items: Iterable[Any], given: int | None, argument: str) -> int:
    if given is not None:
        return given
    if isinstance(items, Sequence):
        return len(items)
    raise InvalidArgument(f"argument '{argument}' is a {type(items).__name__}: needs layer_count")


def encode_spec(
    profile: str | None,
    first_token: int,
    raw_tokens: int | None,
    max_relative_error: float,
    bits_per_entry: float,
    fixed_size: bool,
) -> types.EncodeSpec:
    return types.EncodeSpec(
        profile=profile_number(profile),
        max_relative_error=max_relative_error,
        raw_tokens=raw_tokens,
        first_token=first_token,
        bits_per_entry=bits_per_entry,
        fixed_size=fixed_size,
    )


def is_raw(layer: int, layers: int, raw_layers: int) -> bool:
    """Whether a layer is one of the first or last that are kept as they are."""
    if raw_layers < 0:
        raise InvalidArgument(f"argument 'raw_layers' is {raw_layers}: must not be negative")
    return layer < raw_layers or layers - layer <= raw_layers


def with_rope(encode: types.EncodeSpec, ropes: Ropes, layer: int) -> types.EncodeSpec:
    rope = of_layer(ropes, layer)
    if rope is None:
        return encode
    spec = types.EncodeSpec(rope=rope.to_proto())
    spec.MergeFrom(encode)
    return spec


def chunk_id(namespace: str, key: bytes) -> types.ChunkId:
    if not isinstance(key, bytes):
        raise InvalidArgument(f"argument 'key' is a {type(key).__name__}: must be bytes")
    return types.ChunkId(namespace=namespace, key=key)


def chunk_ids(namespace: str, keys: bytes | Sequence[bytes]) -> Sequence[types.ChunkId]:
    return [chunk_id(namespace, key) for key in ([keys] if isinstance(keys, bytes) else keys)]
