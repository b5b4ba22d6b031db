"""The client's handling of streams: pipelining, refusals, errors and answers that break the protocol."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

import kvshrink
from kvshrink.v1 import kvshrink_pb2 as pb
from kvshrink.v1 import types_pb2 as types

LAYER = (np.ones((2, 1, 4), np.float16), np.zeros((2, 1, 4), np.float16))


def put_objects(requests: Iterator[Any]) -> Iterator[tuple[Any, bytes]]:
    """Checks the legal sequence of Put and gives each object whole."""
    header, body = None, b""
    for request in requests:
        if request.WhichOneof("part") == "header":
            assert header is None
            header, body = request.header, b""
        else:
            assert 0 < len(request.frame) <= 1 << 20
            body += request.frame
        assert header is not None
        if len(body) == header.body_bytes:
            yield header, body
            header = None
    assert header is None


def refused(number: int, retry_after_ms: int = 1) -> pb.PutResponse:
    code = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    status = types.ObjectStatus(code=code, message="full", retry_after_ms=retry_after_ms)
    return pb.PutResponse(object_id=number, status=status)


def test_put_sends_each_layer_in_frames(scripted: Any) -> None:
    connect, script = scripted
    seen: list[tuple[Any, bytes]] = []

    def put(requests: Any, _: Any) -> Iterator[Any]:
        for header, body in put_objects(requests):
            seen.append((header, body))
            yield pb.PutResponse(object_id=header.object_id, tier=types.TIER_HOST)

    script["Put"] = put
    k = np.arange(3 << 18, dtype=np.float32).reshape(-1, 2, 128)  # K alone is three frames
    results = connect().put("model", b"key", [(k, -k), (-k, k)], profile="kvs3", raw_tokens=0, commit=False)
    assert [r.layer for r in results] == [0, 1]
    assert results[0].tier == "host"
    assert [h.layer for h, _ in seen] == [0, 1]
    assert {h.layers for h, _ in seen} == {2}
    assert seen[1][1] == (-k).tobytes() + k.tobytes()
    assert seen[0][0].encode.profile == types.PROFILE_KVS3
    assert seen[0][0].encode.HasField("raw_tokens")


def test_boundary_layers_are_put_raw(scripted: Any) -> None:
    connect, script = scripted
    specs: list[types.EncodeSpec] = []

    def put(requests: Any, _: Any) -> Iterator[Any]:
        for header, _ in put_objects(requests):
            specs.append(header.encode)
            yield pb.PutResponse(object_id=header.object_id)

    script["Put"] = put
    k = np.zeros((2, 1, 4), np.float32)
    options = {"profile": "kvs2", "bits_per_entry": 2.5, "raw_tokens": 3, "commit": False}
    connect().put("m", b"k", [(k, k)] * 5, raw_layers=2, **options)
    raw, coded = types.PROFILE_RAW, types.PROFILE_KVS2
    assert [spec.profile for spec in specs] == [raw, raw, coded, raw, raw]
    assert [spec.bits_per_entry for spec in specs] == [0, 0, 2.5, 0, 0]
    assert {spec.raw_tokens for spec in specs} == {3}
    with pytest.raises(kvshrink.InvalidArgument, match="'raw_layers' is -1"):
        connect().put("m", b"k", [(k, k)], raw_layers=-1)


def test_each_layer_carries_its_own_rope(scripted: Any) -> None:
    connect, script = scripted
    specs: list[types.EncodeSpec] = []

    def put(requests: Any, _: Any) -> Iterator[Any]:
        for header, _ in put_objects(requests):
            specs.append(header.encode)
            yield pb.PutResponse(object_id=header.object_id)

    script["Put"] = put
    yarn = kvshrink.Rope(1e6, scaling="yarn_untruncated", factor=4, original_max_position=4096, pairing="gptj")
    ropes = [kvshrink.Rope(1e4, rotary_dim=2), None, yarn]
    connect().put("model", b"key", [LAYER] * 3, profile="kvs3", rope=ropes, commit=False)
    assert [spec.HasField("rope") for spec in specs] == [True, False, True]
    assert {spec.profile for spec in specs} == {types.PROFILE_KVS3}
    assert specs[0].rope == types.Rope(
        theta=1e4, rotary_dim=2, pairing=types.ROPE_PAIRING_NEOX, scaling=types.ROPE_SCALING_NONE
    )
    assert specs[2].rope == types.Rope(
        theta=1e6,
        pairing=types.ROPE_PAIRING_GPTJ,
        scaling=types.ROPE_SCALING_YARN_UNTRUNCATED,
        factor=4,
        original_max_position=4096,
    )
    with pytest.raises(kvshrink.InvalidArgument, match="'rope' has 1 entries: needs one for layer 1"):
        connect().put("model", b"key", [LAYER] * 2, rope=[yarn], commit=False)
    wrong: Any = "half"
    with pytest.raises(kvshrink.InvalidArgument, match=r"'rope\.pairing' is 'half': must be one of neox, gptj"):
        connect().put("model", b"key", [LAYER], rope=kvshrink.Rope(1e4, pairing=wrong), commit=False)


def test_put_sends_refused_layers_again(scripted: Any) -> None:
    connect, script = scripted
    tries: dict[int, int] = {}

    def put(requests: Any, _: Any) -> Iterator[Any]:
        for header, _ in put_objects(requests):
            tries[header.layer] = tries.get(header.layer, 0) + 1
            busy = header.layer % 2 == 1 and tries[header.layer] < 3
            yield refused(header.object_id) if busy else pb.PutResponse(object_id=header.object_id)

    script["Put"] = put
    assert len(connect().put("model", b"key", [LAYER] * 5, commit=False)) == 5
    assert tries == {0: 1, 1: 3, 2: 1, 3: 3, 4: 1}


def test_put_gives_up_at_its_time_out(scripted: Any) -> None:
    connect, script = scripted
    script["Put"] = lambda requests, _: (refused(h.object_id, 200) for h, _ in put_objects(requests))
    started = time.monotonic()
    with pytest.raises(kvshrink.ResourceExhausted) as error:
        connect(timeout_s=0.5).put("model", b"key", [LAYER], commit=False)
    assert error.value.retry_after_s == pytest.approx(0.2)
    assert time.monotonic() - started < 5


def test_a_bounded_number_of_layers_waits_for_answers(scripted: Any) -> None:
    """The service answers nothing: the client must stop pulling layers, and end when it times out."""
    connect, script = scripted
    pulled = 0

    def layers() -> Iterator[Any]:
        nonlocal pulled
        for _ in range(1000):
            pulled += 1
            yield LAYER

    def put(requests: Any, _: Any) -> Iterator[Any]:
        with contextlib.suppress(grpc.RpcError):  # the client has given up
            for _ in requests:
                pass
        yield from ()

    script["Put"] = put
    with pytest.raises(kvshrink.DeadlineExceeded):
        connect(timeout_s=0.7).put("model", b"key", layers(), layer_count=1000, commit=False)
    assert pulled <= 9


def test_the_first_error_of_an_object_is_raised(scripted: Any) -> None:
    connect, script = scripted
    status = types.ObjectStatus(code=6, message="field 'key' is taken")
    script["Put"] = lambda requests, _: (
        pb.PutResponse(object_id=h.object_id, status=status) for h, _ in put_objects(requests)
    )
    with pytest.raises(kvshrink.AlreadyExists, match="field 'key' is taken"):
        connect().put("model", b"key", [LAYER] * 20)


def test_an_error_of_the_callers_generator_is_its_own(scripted: Any) -> None:
    connect, script = scripted
    script["Put"] = lambda requests, _: (pb.PutResponse(object_id=h.object_id) for h, _ in put_objects(requests))

    def layers() -> Iterator[Any]:
        yield LAYER
        raise ZeroDivisionError("prefill failed")

    with pytest.raises(ZeroDivisionError, match="prefill failed"):
        connect().put("model", b"key", layers(), layer_count=2, commit=False)
    with pytest.raises(kvshrink.InvalidArgument, match=r"'layers\[1\].k' has dtype int64"):
        connect().put("model", b"key", [LAYER, (np.ones((2, 1, 4), int), LAYER[1])])


def test_a_stream_that_ends_early_is_an_error(scripted: Any) -> None:
    connect, script = scripted

    def one(requests: Any, _: Any) -> Iterator[Any]:
        header, _ = next(put_objects(requests))
        yield pb.PutResponse(object_id=header.object_id)

    script["Put"] = one
    with pytest.raises(kvshrink.DataLoss, match="without its answer"):
        connect().put("model", b"key", [LAYER, LAYER], commit=False)


def test_commit_raises_the_status_of_a_chunk(scripted: Any) -> None:
    connect, script = scripted
    missing = types.ObjectStatus(code=9, message="layers 1, 2 are missing")
    script["Commit"] = lambda _r, _c: pb.CommitResponse(statuses=[types.ObjectStatus(), missing])
    with pytest.raises(kvshrink.FailedPrecondition, match="layers 1, 2"):
        connect().commit("model", [b"a", b"b"])


def get_response(body: bytes, last: bool = False, **header: Any) -> pb.GetResponse:
    chunk = types.ChunkId(namespace="model", key=b"key")
    return pb.GetResponse(request_id=1, header=pb.GetHeader(chunk=chunk, body_bytes=len(body), **header), last=last)


def test_get_gives_shards_and_errors_in_order(scripted: Any) -> None:
    connect, script = scripted

    def get(requests: Any, _: Any) -> Iterator[Any]:
        assert next(requests).form == pb.GET_FORM_SHARD
        yield get_response(b"abcd", shard=types.ShardInfo(layer=0))
        yield pb.GetResponse(request_id=1, frame=b"ab")
        yield pb.GetResponse(request_id=1, frame=b"cd")
        yield get_response(b"", last=True, status=types.ObjectStatus(code=5, message="no such chunk"))

    script["Get"] = get
    first, second = connect().get("model", [b"key", b"other"], form="shard", errors="return")
    assert first.shard == b"abcd"
    assert isinstance(second.error, kvshrink.NotFound)
    with pytest.raises(kvshrink.NotFound):
        list(connect().get("model", [b"key", b"other"], form="shard"))
    with pytest.raises(kvshrink.InvalidArgument, match="form"):
        _ = first.k


@pytest.mark.parametrize(
    "responses",
    [
        [],
        [get_response(b"abcd")],
        [get_response(b"abcd"), pb.GetResponse(request_id=1, frame=b"abcd")],
        [pb.GetResponse(request_id=1, frame=b"abcd", last=True)],
        [get_response(b"abcd"), pb.GetResponse(request_id=1, frame=b"abcde", last=True)],
        [get_response(b"abcd"), get_response(b"", last=True)],
    ],
)
def test_get_refuses_a_broken_sequence(scripted: Any, responses: Any) -> None:
    connect, script = scripted
    script["Get"] = lambda _r, _c: iter(responses)
    with pytest.raises(kvshrink.DataLoss):
        list(connect().get("model", b"key", form="shard"))


def test_closing_a_get_cancels_the_call(scripted: Any) -> None:
    connect, script = scripted
    cancelled = threading.Event()

    def get(_: Any, context: Any) -> Iterator[Any]:
        context.add_callback(cancelled.set)
        for _ in range(100000):
            yield get_response(b"")

    script["Get"] = get
    items = connect().get("model", b"key", form="shard")
    next(items)
    items.close()
    assert cancelled.wait(5)


def test_get_and_attend_try_again_after_a_refusal(scripted: Any) -> None:
    connect, script = scripted
    tries = {"Get": 0, "Attend": 0}

    def get(_r: Any, _c: Any) -> Iterator[Any]:
        tries["Get"] += 1
        if tries["Get"] < 3:
            yield get_response(b"", last=True, status=refused(0).status)
        else:
            yield get_response(b"", last=True)

    def attend(_r: Any, _c: Any) -> Iterator[Any]:
        tries["Attend"] += 1
        if tries["Attend"] < 3:
            yield pb.AttendResponse(request_id=1, header=pb.AttendAnswer(status=refused(0).status), last=True)
        else:
            body = bytes(4 * 5)
            yield pb.AttendResponse(request_id=1, header=pb.AttendAnswer(body_bytes=len(body), tokens=1))
            yield pb.AttendResponse(request_id=1, frame=body, last=True)

    script["Get"], script["Attend"] = get, attend
    assert len(list(connect().get("model", b"key", form="shard"))) == 1
    assert connect().attend("model", b"key", 0, np.ones((1, 1, 4), np.float32)).tokens == 1
    assert tries == {"Get": 3, "Attend": 3}


def test_attend_reads_scores_and_top_k(scripted: Any) -> None:
    connect, script = scripted
    asked: list[Any] = []

    def attend(requests: Any, _: Any) -> Iterator[Any]:
        asked.append(next(requests).header)
        assert b"".join(r.frame for r in requests) == q.tobytes()
        body = np.array([[[3, 1]]], np.float32).tobytes() + np.array([[[7, 0]]], np.uint32).tobytes()
        yield pb.AttendResponse(request_id=1, header=pb.AttendAnswer(body_bytes=len(body), tokens=8, top_k=2))
        yield pb.AttendResponse(request_id=1, frame=body, last=True)

    script["Attend"] = attend
    q = np.ones((1, 1, 4), np.float32)
    scores = connect().attend("model", [b"a", b"b"], 3, q, mode="scores", top_k=2, first_query=0)
    assert scores.tokens == 8
    assert scores.indices is not None
    assert scores.indices.tolist() == [[[7, 0]]]
    assert asked[0].layer == 3
    assert asked[0].HasField("first_query")
    with pytest.raises(kvshrink.InvalidArgument, match=r"'q' has shape \(4,\)"):
        connect().attend("model", [b"a"], 0, np.ones(4, np.float32))


def test_lease_is_released_once(scripted: Any) -> None:
    connect, script = scripted
    released: list[int] = []

    def release(request: Any, _: Any) -> Any:
        released.append(request.lease_id)
        return pb.ReleaseResponse(released=True)

    script["Lookup"] = lambda r, _: pb.LookupResponse(present=len(r.keys), tokens=512, lease_id=77, lease_ms=r.lease_ms)
    script["Release"] = release
    with connect().lookup("model", [b"a", b"b"], lease_s=2) as lease:
        assert (lease.present, lease.tokens, lease.duration_s) == (2, 512, 2.0)
        assert lease.release()
    assert released == [77]
    with pytest.raises(kvshrink.InvalidArgument, match="lease_s"):
        connect().lookup("model", [b"a"], lease_s=601)


def test_list_follows_pages(scripted: Any) -> None:
    connect, script = scripted
    asked: list[str] = []

    def pages(request: Any, _: Any) -> Any:
        asked.append(request.page_token)
        number = len(asked)
        chunk = pb.ChunkInfo(id=types.ChunkId(namespace="model", key=bytes([number])))
        return pb.ListResponse(chunks=[chunk], next_page_token=str(number) if number < 3 else "")

    script["List"] = pages
    assert [info.key for info in connect().list("model")] == [b"\1", b"\2", b"\3"]
    assert asked == ["", "1", "2"]


def test_no_service_is_unavailable() -> None:
    with kvshrink.Client("127.0.0.1:1", timeout_s=5) as client, pytest.raises(kvshrink.Unavailable):
        client.server_info()


def test_unknown_names_are_refused_here(scripted: Any) -> None:
    connect, _ = scripted
    with pytest.raises(kvshrink.InvalidArgument, match="'profile' is 'kvs9'"):
        connect().put("model", b"key", [LAYER], profile="kvs9")
    with pytest.raises(kvshrink.InvalidArgument, match="'dtype' is 'int4'"):
        connect().get("model", b"key", dtype="int4")
    with pytest.raises(kvshrink.InvalidArgument, match="needs layer_count"):
        connect().put("model", b"key", iter([LAYER]))
    with pytest.raises(kvshrink.InvalidArgument, match="'key' is a str"):
        connect().stat("model", "key")
