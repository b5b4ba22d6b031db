"""What calls return: plain records made from the protocol's messages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from kvshrink.errors import InvalidArgument, KVShrinkError, from_code
from kvshrink.v1 import kvshrink_pb2 as pb
from kvshrink.v1 import types_pb2 as types

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

PROFILES: tuple[str, ...] = tuple(
    name.removeprefix("PROFILE_").lower() for name, number in types.Profile.items() if number
)


def profile_number(name: str | None) -> types.Profile:
    """None is the service's default."""
    if name is None:
        return types.PROFILE_UNSPECIFIED
    if name not in PROFILES:
        raise InvalidArgument(f"argument 'profile' is {name!r}: must be one of {', '.join(PROFILES)}")
    return cast(types.Profile, types.Profile.Value(f"PROFILE_{name.upper()}"))


def _name(enum: Any, number: int, prefix: str) -> str:
    """A number that this version of the protocol doesn't know is kept as digits."""
    known = number in enum.values()
    return str(enum.Name(number)).removeprefix(prefix).lower() if known else str(number)


@dataclasses.dataclass(frozen=True)
class KindStats:
    """One half of a shard, K or V. Errors are sums of squared error over sums of squares."""

    bits_per_entry: float
    relative_error: float
    max_block_relative_error: float
    blocks: int
    raw_blocks: int
    escalated_blocks: int
    rank_histogram: tuple[int, ...]

    @classmethod
    def from_proto(cls, m: types.KindStats) -> KindStats:
        return cls(
            m.bits_per_entry,
            m.relative_error,
            m.max_block_relative_error,
            m.blocks,
            m.raw_blocks,
            m.escalated_blocks,
            tuple(m.rank_histogram),
        )


@dataclasses.dataclass(frozen=True)
class ShardStats:
    raw_bytes: int
    encoded_bytes: int
    bits_per_entry: float
    k: KindStats
    v: KindStats | None  # None: keys only

    @classmethod
    def from_proto(cls, m: types.ShardStats) -> ShardStats:
        k, v = KindStats.from_proto(m.k), KindStats.from_proto(m.v) if m.HasField("v") else None
        return cls(m.raw_bytes, m.encoded_bytes, m.bits_per_entry, k, v)


@dataclasses.dataclass(frozen=True)
class ShardInfo:
    layer: int
    profile: str
    dtype: str
    tokens: int
    kv_heads: int
    head_dim: int
    first_token: int
    bytes: int
    keys_only: bool = False

    @classmethod
    def from_proto(cls, m: types.ShardInfo) -> ShardInfo:
        return cls(
            m.layer,
            _name(types.Profile, m.profile, "PROFILE_"),
            _name(types.DType, m.dtype, "DTYPE_"),
            m.shape.tokens,
            m.shape.kv_heads,
            m.shape.head_dim,
            m.first_token,
            m.bytes,
            m.keys_only,
        )


@dataclasses.dataclass(frozen=True)
class PutResult:
    """The answer to one shard. `already_present`: the same bytes were there before."""

    layer: int
    already_present: bool
    stats: ShardStats
    tier: str

    @classmethod
    def from_proto(cls, layer: int, m: pb.PutResponse) -> PutResult:
        tier = _name(types.Tier, m.tier, "TIER_")
        return cls(layer, m.already_present, ShardStats.from_proto(m.stats), tier)


@dataclasses.dataclass(frozen=True)
class Compressed:
    shard: bytes
    stats: ShardStats


@dataclasses.dataclass(frozen=True)
class Decompressed:
    k: Array
    v: Array | None  # None: keys only
    info: ShardInfo


@dataclasses.dataclass(frozen=True)
class Fetched:
    """One shard of a Get. `shard` holds bytes for the forms shard and low_rank, `k` and `v` arrays for decoded."""

    key: bytes
    layer: int
    info: ShardInfo | None
    tier: str
    shard: bytes | None = None
    tensors: tuple[Array, Array | None] | None = None
    error: KVShrinkError | None = None

    @property
    def k(self) -> Array:
        return self._tensors()[0]

    @property
    def v(self) -> Array | None:
        """None: keys only."""
        return self._tensors()[1]

    def _tensors(self) -> tuple[Array, Array | None]:
        if self.error is not None:
            raise self.error
        if self.tensors is None:
            raise InvalidArgument("argument 'form' was not 'decoded': there are no tensors")
        return self.tensors

    @classmethod
    def from_proto(cls, m: pb.GetHeader) -> Fetched:
        error = status_error(m.status)
        info = ShardInfo.from_proto(m.shard) if m.HasField("shard") else None
        return cls(m.chunk.key, m.shard.layer, info, _name(types.Tier, m.tier, "TIER_"), error=error)


@dataclasses.dataclass(frozen=True)
class AttentionOutput:
    """Partial attention over the chunks asked for: merge exactly with another by weights exp(lse)."""

    output: Floats  # [queries, q_heads, head_dim]
    lse: Floats  # [queries, q_heads]
    tokens: int


@dataclasses.dataclass(frozen=True)
class AttentionScores:
    """Logits, all or the largest; `indices` count the tokens of all chunks in order, None when all are there."""

    logits: Floats  # [queries, q_heads, tokens or top_k]
    indices: npt.NDArray[np.uint32] | None
    tokens: int


@dataclasses.dataclass(frozen=True)
class ChunkInfo:
    namespace: str
    key: bytes
    committed: bool
    layers: int
    layers_present: int
    tokens: int
    raw_bytes: int
    bytes: int
    tiers: tuple[str, ...]
    leased: bool
    created_unix_ms: int
    shards: tuple[ShardInfo, ...] = ()

    @classmethod
    def from_proto(cls, m: pb.ChunkInfo, shards: Sequence[types.ShardInfo] = ()) -> ChunkInfo:
        return cls(
            m.id.namespace,
            m.id.key,
            m.committed,
            m.layers,
            m.layers_present,
            m.tokens,
            m.raw_bytes,
            m.bytes,
            tuple(_name(types.Tier, tier, "TIER_") for tier in m.tiers),
            m.leased,
            m.created_unix_ms,
            tuple(ShardInfo.from_proto(shard) for shard in shards),
        )


@dataclasses.dataclass(frozen=True)
class TierInfo:
    tier: str
    capacity_bytes: int
    used_bytes: int


@dataclasses.dataclass(frozen=True)
class ServerInfo:
    version: str
    backend: str
    device: str
    profiles: tuple[str, ...]
    default_profile: str
    max_frame_bytes: int
    max_object_bytes: int
    inflight_capacity_bytes: int
    inflight_bytes: int
    tiers: tuple[TierInfo, ...]
    chunks: int
    uncommitted_bytes: int
    draining: bool

    @classmethod
    def from_proto(cls, m: pb.ServerInfoResponse) -> ServerInfo:
        tiers = (TierInfo(_name(types.Tier, t.tier, "TIER_"), t.capacity_bytes, t.used_bytes) for t in m.tiers)
        return cls(
            m.version,
            m.backend,
            m.device,
            tuple(m.profiles),
            _name(types.Profile, m.default_profile, "PROFILE_"),
            m.max_frame_bytes,
            m.max_object_bytes,
            m.inflight_capacity_bytes,
            m.inflight_bytes,
            tuple(tiers),
            m.chunks,
            m.uncommitted_bytes,
            m.draining,
        )


def status_error(status: types.ObjectStatus) -> KVShrinkError | None:
    """None for OK."""
    return from_code(status.code, status.message, status.retry_after_ms) if status.code else None
