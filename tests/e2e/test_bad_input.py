"""What bad input gets, over the wire: an answer or an error that names field and value, and a stream that lives on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, cast

import grpc
import numpy as np
import pytest

import kvshrink
from kvshrink import Client
from kvshrink.v1 import kvshrink_pb2 as pb
from kvshrink.v1 import types_pb2 as types
from support import MIB, Array, Daemon, chunk_of, until

INVALID = grpc.StatusCode.INVALID_ARGUMENT
T, H, D = 8, 2, 16
BODY = np.ones((2, T, H, D), np.float16).tobytes()


def header(namespace: str, number: int = 1, **changes: Any) -> pb.PutHeader:
    fields: dict[str, Any] = {
        "object_id": number,
        "chunk": types.ChunkId(namespace=namespace, key=b"k%d" % number),
        "layer": 0,
        "layers": 1,
        "body_bytes": len(BODY),
        "tensor": types.TensorSpec(
            dtype=types.DTYPE_FP16, shape=types.Shape(tokens=T, kv_heads=H, head_dim=D), layout=types.Layout()
        ),
        "encode": types.EncodeSpec(profile=types.PROFILE_KVS2),
    }
    return pb.PutHeader(**{**fields, **changes})


def spec(**changes: Any) -> types.TensorSpec:
    shape = {"tokens": T, "kv_heads": H, "head_dim": D}
    layout = types.Layout(**changes.pop("layout", {}))
    shape |= {name: changes.pop(name) for name in list(changes) if name in shape}
    return types.TensorSpec(**{"dtype": types.DTYPE_FP16, "shape": types.Shape(**shape), "layout": layout, **changes})


def put(stub: Any, *parts: pb.PutHeader | bytes) -> list[pb.PutResponse]:
    requests = [pb.PutRequest(frame=p) if isinstance(p, bytes) else pb.PutRequest(header=p) for p in parts]
    return list(stub.Put(iter(requests), timeout=30))


BAD_HEADERS: list[tuple[str, dict[str, Any]]] = [
    ("tokens", {"tensor": spec(tokens=0)}),
    ("tokens", {"tensor": spec(tokens=65537)}),
    ("kv_heads", {"tensor": spec(kv_heads=0)}),
    ("kv_heads", {"tensor": spec(kv_heads=257)}),
    ("head_dim", {"tensor": spec(head_dim=0)}),
    ("head_dim", {"tensor": spec(head_dim=513)}),
    ("dtype", {"tensor": spec(dtype=0)}),
    ("dtype", {"tensor": spec(dtype=99)}),
    ("order", {"tensor": spec(layout={"order": 99})}),
    ("page_tokens", {"tensor": spec(layout={"order": types.ORDER_BNHD})}),
    ("page_tokens", {"tensor": spec(layout={"page_tokens": 4})}),
    ("stride", {"tensor": spec(layout={"token_stride": 1, "head_stride": 1})}),
    ("stride", {"tensor": spec(layout={"token_stride": 2**63, "head_stride": D})}),
    ("stride", {"tensor": spec(layout={"token_stride": H * D})}),
    ("v_offset_bytes", {"tensor": spec(v_offset_bytes=1)}),
    ("v_offset_bytes", {"tensor": spec(v_offset_bytes=2**63)}),
    ("body_bytes", {"body_bytes": len(BODY) - 2}),
    ("body_bytes", {"body_bytes": len(BODY) + 2}),
    ("body_bytes", {"body_bytes": 0}),
    ("body_bytes", {"body_bytes": 2**62}),
    ("body_bytes", {"encoded": pb.EncodedSpec(), "encode": None, "body_bytes": 2**62}),
    ("encode", {"encoded": pb.EncodedSpec()}),
    ("layer", {"layer": 1}),
    ("layers", {"layers": 0}),
    ("layers", {"layers": 4097}),
    ("profile", {"encode": types.EncodeSpec(profile=cast(Any, 99))}),
    ("max_relative_error", {"encode": types.EncodeSpec(max_relative_error=-1)}),
    ("max_relative_error", {"encode": types.EncodeSpec(max_relative_error=float("nan"))}),
    ("first_token", {"encode": types.EncodeSpec(first_token=2**31)}),
    ("namespace", {"chunk": types.ChunkId(namespace="", key=b"k")}),
    ("namespace", {"chunk": types.ChunkId(namespace="n" * 257, key=b"k")}),
    ("key", {"chunk": types.ChunkId(namespace="n", key=b"")}),
    ("key", {"chunk": types.ChunkId(namespace="n", key=b"k" * 129)}),
]


@pytest.mark.parametrize(("field", "changes"), BAD_HEADERS, ids=[f"{i}-{f}" for i, (f, _) in enumerate(BAD_HEADERS)])
def test_a_bad_header_fails_its_object_alone(
    daemon: Daemon, namespace: str, field: str, changes: dict[str, Any]
) -> None:
    """The good objects before and after it are stored; its frames may still come, and are dropped."""
    bad = header(namespace, 2, **changes)
    parts: list[pb.PutHeader | bytes] = [header(namespace, 1), BODY, bad]
    if frames := bad.body_bytes == len(BODY):
        parts += [BODY, header(namespace, 3), BODY]
    with daemon.stub() as stub:
        answers = {r.object_id: r.status for r in put(stub, *parts)}
    assert answers[1].code == 0
    assert answers[2].code == INVALID.value[0]
    assert field in answers[2].message
    if frames:
        assert answers[3].code == 0


def illegal_sequences() -> dict[str, list[Any]]:
    n = "sequences"
    return {
        "a frame first": [BODY],
        "a frame beyond the body": [header(n), BODY, b"x"],
        "a frame that ends beyond the body": [header(n), BODY + b"x"],
        "an empty frame": [header(n), b"", BODY],
        "a frame over 1 MiB": [header(n, tensor=spec(tokens=65536), body_bytes=65536 * H * D * 4), bytes(MIB + 1)],
        "a header inside a body": [header(n, 1), BODY[:10], header(n, 2), BODY],
        "the end inside a body": [header(n), BODY[:10]],
        "the end after a header": [header(n)],
    }


@pytest.mark.parametrize("name", illegal_sequences())
def test_an_illegal_sequence_ends_the_stream(daemon: Daemon, name: str) -> None:
    with daemon.stub() as stub, pytest.raises(grpc.RpcError) as error:
        put(stub, *illegal_sequences()[name])
    assert error.value.code() == INVALID
    with daemon.client() as client:
        until(lambda: client.server_info().inflight_bytes == 0, 10, "what the stream held")


def test_a_message_beyond_the_limit_is_refused(daemon: Daemon) -> None:
    with daemon.stub() as stub, pytest.raises(grpc.RpcError) as error:
        put(stub, header("big"), bytes(64 * MIB))
    assert error.value.code() in (INVALID, grpc.StatusCode.RESOURCE_EXHAUSTED)
    with daemon.client() as client:
        assert client.health() == "SERVING"


def test_same_key_again(client: Client, smollm2: dict[str, Array], namespace: str) -> None:
    layers = chunk_of(smollm2, 0, 64)
    assert not any(r.already_present for r in client.put(namespace, b"k", layers, profile="kvs3"))
    assert all(r.already_present for r in client.put(namespace, b"k", layers, profile="kvs3"))
    with pytest.raises(kvshrink.AlreadyExists):
        client.put(namespace, b"k", chunk_of(smollm2, 64, 64), profile="kvs3")
    (item, *_) = client.get(namespace, b"k")
    assert np.array_equal(item.k[:1], layers[0][0][:1])


def test_layers_must_agree(client: Client, smollm2: dict[str, Array], namespace: str) -> None:
    layers = chunk_of(smollm2, 0, 64)
    client.put(namespace, b"k", layers[:1], layer_count=3, commit=False)
    with pytest.raises(kvshrink.InvalidArgument, match="layers"):
        client.put(namespace, b"k", layers[:2], layer_count=2, commit=False)
    with pytest.raises(kvshrink.FailedPrecondition, match=r"1, 2"):
        client.commit(namespace, b"k")
    with pytest.raises(kvshrink.NotFound):
        list(client.get(namespace, b"k"))
    assert client.lookup(namespace, [b"k"]).present == 0


def test_what_is_not_there(client: Client, namespace: str) -> None:
    with pytest.raises(kvshrink.NotFound):
        client.stat(namespace, b"none")
    with pytest.raises(kvshrink.NotFound):
        client.commit(namespace, b"none")
    with pytest.raises(kvshrink.NotFound):
        client.delete(namespace, b"none")
    with pytest.raises(kvshrink.NotFound):
        list(client.get(namespace, b"none"))
    assert list(client.list(namespace)) == []
    assert client.release(123456789) is False


def test_a_missing_chunk_leaves_the_others(client: Client, smollm2: dict[str, Array], namespace: str) -> None:
    client.put(namespace, b"a", chunk_of(smollm2, 0, 64)[:1])
    client.put(namespace, b"c", chunk_of(smollm2, 64, 64)[:1])
    a, b, c = client.get(namespace, [b"a", b"b", b"c"], errors="return")
    assert (a.error, c.error) == (None, None)
    assert isinstance(b.error, kvshrink.NotFound)
    assert b.key == b"b"


BAD_GETS: list[tuple[str, Callable[[Client, str], Any]]] = [
    ("form", lambda c, n: c._fetch(pb.GetRequest(chunks=[types.ChunkId(namespace=n, key=b"k")]), True)),
    ("layers", lambda c, n: c.get(n, b"k", layers=[1, 0])),
    ("layers", lambda c, n: c.get(n, b"k", layers=[0, 0])),
    ("kv_heads", lambda c, n: c.get(n, b"k", kv_heads=[9])),
    ("kv_heads", lambda c, n: c.get(n, b"k", kv_heads=[1, 0])),
    ("kv_heads", lambda c, n: c.get(n, b"k", kv_heads=[0], form="shard")),
    ("key", lambda c, n: c.get(n, b"")),
    ("chunks", lambda c, n: c.get(n, [b"k"] * 4097)),
    ("chunks", lambda c, n: c.get(n, [])),
]


@pytest.mark.parametrize(("field", "call"), BAD_GETS, ids=[f"{i}-{f}" for i, (f, _) in enumerate(BAD_GETS)])
def test_bad_get(
    client: Client, smollm2: dict[str, Array], namespace: str, field: str, call: Callable[[Client, str], Iterator[Any]]
) -> None:
    client.put(namespace, b"k", chunk_of(smollm2, 0, 64)[:2])
    with pytest.raises(kvshrink.InvalidArgument, match=field):
        list(call(client, namespace))


def test_get_from_another_daemon_is_off(daemon: Daemon, namespace: str) -> None:
    request = pb.GetRequest(
        chunks=[types.ChunkId(namespace=namespace, key=b"k")], form=pb.GET_FORM_SHARD, source="10.0.0.1:7420"
    )
    with daemon.client() as client, pytest.raises(kvshrink.KVShrinkError, match="source"):
        list(client._fetch(request, True))


BAD_CALLS: list[tuple[str, Callable[[Any, str], Any]]] = [
    ("keys", lambda s, n: s.Lookup(pb.LookupRequest(namespace=n, keys=[b""]))),
    ("lease_ms", lambda s, n: s.Lookup(pb.LookupRequest(namespace=n, keys=[b"k"], lease_ms=600_001))),
    ("namespace", lambda s, _: s.Lookup(pb.LookupRequest(namespace="", keys=[b"k"]))),
    ("page_size", lambda s, n: s.List(pb.ListRequest(namespace=n, page_size=10_001))),
    ("page_token", lambda s, _: s.List(pb.ListRequest(page_token="not ours"))),  # noqa: S106 - no secret
    ("chunks", lambda s, n: s.Commit(pb.CommitRequest(chunks=[types.ChunkId(namespace=n, key=b"k")] * 4097))),
    ("chunks", lambda s, n: s.Delete(pb.DeleteRequest(chunks=[types.ChunkId(namespace=n, key=b"k")] * 4097))),
    ("key", lambda s, n: s.Stat(pb.StatRequest(chunk=types.ChunkId(namespace=n)))),
]


@pytest.mark.parametrize(("field", "call"), BAD_CALLS, ids=[f"{i}-{f}" for i, (f, _) in enumerate(BAD_CALLS)])
def test_bad_unary_call(daemon: Daemon, namespace: str, field: str, call: Callable[[Any, str], Any]) -> None:
    with daemon.stub() as stub, pytest.raises(grpc.RpcError) as error:
        call(stub, namespace)
    assert error.value.code() == INVALID
    assert field in (error.value.details() or "")


def test_hostile_shards_are_refused(client: Client, smollm2: dict[str, Array], namespace: str) -> None:
    """Truncated, flipped and foreign bytes: refused by Put and Decompress naming a field; never stored, no crash."""
    (good,) = client.compress(chunk_of(smollm2, 0, 64)[:1], profile="kvs2")
    shard, rng = good.shard, random.Random(1)
    hostile = [b"x" * 200, shard[:95], shard[:-1], shard + b"x", shard[: len(shard) // 2]]
    for _ in range(60):
        flipped = bytearray(shard)
        flipped[rng.randrange(len(shard))] ^= 1 << rng.randrange(8)
        hostile.append(bytes(flipped))
    for i, data in enumerate(hostile):
        for call in (client.decompress, lambda d, i=i: client.put_shards(namespace, b"h%d" % i, d)):
            with pytest.raises(kvshrink.InvalidArgument, match="field"):
                call([data])
    assert list(client.list(namespace)) == []
    (fine,) = client.put_shards(namespace, b"good", [shard])
    assert fine.stats.encoded_bytes == len(shard)


def test_an_encoded_shard_must_be_of_its_layer(client: Client, smollm2: dict[str, Array], namespace: str) -> None:
    (shard,) = client.compress(chunk_of(smollm2, 0, 64)[:1], first_layer=3)
    with pytest.raises(kvshrink.InvalidArgument, match="layer"):
        client.put_shards(namespace, b"k", [shard.shard])
