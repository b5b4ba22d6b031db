"""The client: one method per RPC, numpy in and out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, cast, overload

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvshrink import attention, messages, tensors
from kvshrink.errors import DataLoss, InvalidArgument, KVShrinkError, from_rpc
from kvshrink.lease import Lease
from kvshrink.rope import Ropes
from kvshrink.streams import FRAME_BYTES, Answer, Exchange, Job, Stream, framed_answers, pause, plain_answers
from kvshrink.tensors import DTypeName, LayoutName
from kvshrink.types import (
    Array,
    AttentionOutput,
    AttentionScores,
    ChunkInfo,
    Compressed,
    Decompressed,
    Fetched,
    PutResult,
    ServerInfo,
    ShardInfo,
    ShardStats,
    status_error,
)
from kvshrink.v1 import kvshrink_pb2 as pb
from kvshrink.v1 import kvshrink_pb2_grpc

Form = Literal["shard", "decoded", "low_rank"]
Layer = tuple[Array, Array | None]  # K and V; None: keys only
Answers = list[Answer]  # the name list is a method of the class
PutResults = list[PutResult]
_FORMS = {"shard": pb.GET_FORM_SHARD, "decoded": pb.GET_FORM_DECODED, "low_rank": pb.GET_FORM_LOW_RANK}
_COMMIT_BATCH = 4096


class Client:
    """A connection to one kvshrinkd. Thread-safe; close it, or use it in a `with`.

    Every method raises a subclass of KVShrinkError. `timeout_s` bounds each call; a call of several objects that a full
    budget refused sends them again, when the service says, until then. So does a call of one request.
    """

    def __init__(
        self,
        target: str = "127.0.0.1:7420",
        *,
        timeout_s: float = 60.0,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        if timeout_s <= 0:
            raise InvalidArgument(f"argument 'timeout_s' is {timeout_s}: must be positive")
        options = [("grpc.max_receive_message_length", 2 * FRAME_BYTES)]
        self._channel = (
            grpc.insecure_channel(target, options)
            if credentials is None
            else grpc.secure_channel(target, credentials, options)
        )
        self._timeout_s = timeout_s
        self._stub = cast(Any, kvshrink_pb2_grpc).KVShrinkStub(self._channel)
        self._health = cast(Any, health_pb2_grpc).HealthStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # --- storing

    def put(
        self,
        namespace: str,
        key: bytes,
        layers: Iterable[Layer],
        *,
        layer_count: int | None = None,
        profile: str | None = None,
        first_token: int = 0,
        raw_tokens: int | None = None,
        raw_layers: int = 0,
        max_relative_error: float = 0.0,
        bits_per_entry: float = 0.0,
        fixed_size: bool = False,
        rope: Ropes = None,
        layout: LayoutName = "THD",
        tokens: int | None = None,
        commit: bool = True,
    ) -> PutResults:
        """Compresses and stores a chunk: (K, V) of layer 0, 1, ... . V is None where a layer has keys only (MLA).

        `layers` may be a generator that yields while prefill goes on; then give `layer_count`. Arrays lie as `layout`
        says; `tokens` is needed for paged layouts whose last page isn't full. `bits_per_entry` is a rate that every
        shard keeps to, every byte counted; with `fixed_size` all shards of a shape have its size. `rope` is what K
        carries, for all layers or one for each. The first and the last `raw_layers` layers take the profile raw,
        and no rate. With commit=False the chunk stays invisible until `commit`.
        """
        encode = messages.encode_spec(profile, first_token, raw_tokens, max_relative_error, bits_per_entry, fixed_size)
        raw = messages.encode_spec("raw", first_token, raw_tokens, 0.0, 0.0, False)

        def jobs(count: int) -> Iterator[Job]:
            for i, (k, v) in enumerate(layers):
                tensor, body = tensors.pack_kv(k, v, layout, tokens, f"layers[{i}]")
                spec = raw if messages.is_raw(i, count, raw_layers) else messages.with_rope(encode, rope, i)
                header = pb.PutHeader(
                    chunk=messages.chunk_id(namespace, key), layer=i, layers=count, tensor=tensor, encode=spec
                )
                yield messages.sized(header, body)

        return self._put(namespace, key, jobs(messages.count(layers, layer_count, "layers")), commit)

    def put_shards(
        self,
        namespace: str,
        key: bytes,
        shards: Iterable[bytes],
        *,
        layer_count: int | None = None,
        commit: bool = True,
    ) -> PutResults:
        """Stores a chunk whose layers are compressed already."""

        def jobs(count: int) -> Iterator[Job]:
            for i, shard in enumerate(shards):
                header = pb.PutHeader(
                    chunk=messages.chunk_id(namespace, key), layer=i, layers=count, encoded=pb.EncodedSpec()
                )
                yield messages.sized(header, [memoryview(shard)])

        return self._put(namespace, key, jobs(messages.count(shards, layer_count, "shards")), commit)

    def commit(self, namespace: str, keys: bytes | Sequence[bytes]) -> None:
        """Makes chunks visible; durable when it returns. Raises the first error, after all chunks were tried."""
        self._each(namespace, keys, pb.CommitRequest, self._stub.Commit)

    def delete(self, namespace: str, keys: bytes | Sequence[bytes]) -> None:
        """Raises the first error (NotFound, FailedPrecondition while leased), after all chunks were tried."""
        self._each(namespace, keys, pb.DeleteRequest, self._stub.Delete)

    # --- fetching

    def get(
        self,
        namespace: str,
        keys: bytes | Sequence[bytes],
        *,
        layers: Sequence[int] = (),
        kv_heads: Sequence[int] = (),
        form: Form = "decoded",
        dtype: DTypeName | None = None,
        layout: Literal["THD", "HTD"] = "THD",
        errors: Literal["raise", "return"] = "raise",
    ) -> Generator[Fetched, None, None]:
        """Shards, chunk by chunk and layer by layer, as they arrive; gRPC's flow control bounds what waits.

        Closing the generator ends the call.

        An error of one chunk is raised where its turn is, or with errors="return" comes as an item with its `error`.
        """
        if form not in _FORMS:
            raise InvalidArgument(f"argument 'form' is {form!r}: must be one of {', '.join(_FORMS)}")
        request = pb.GetRequest(
            request_id=1,
            chunks=messages.chunk_ids(namespace, keys),
            layers=layers,
            kv_heads=kv_heads,
            form=_FORMS[form],
            dtype=tensors.dtype_number(dtype),
            layout=tensors.packed_layout(layout) if form == "decoded" else None,
        )
        return self._fetch(request, raising=errors == "raise")

    def _fetch(self, request: pb.GetRequest, raising: bool) -> Generator[Fetched, None, None]:
        deadline = time.monotonic() + self._timeout_s
        while (yield from self._fetch_once(request, raising, deadline)):
            pass

    def _fetch_once(self, request: pb.GetRequest, raising: bool, deadline: float) -> Generator[Fetched, None, bool]:
        """True: a full budget refused the request, its pause is over, and it may be tried again."""
        left_s = max(0.0, deadline - time.monotonic())
        with Stream[Any](self._stub.Get, lambda _: [request], 1, left_s) as stream:
            for number, (header, body) in enumerate(attention.read_parts(stream)):
                item = Fetched.from_proto(header)
                if item.error is not None:
                    if number == 0 and pause(item.error, deadline):
                        return True
                    if raising:
                        raise item.error
                    yield item
                elif request.form == pb.GET_FORM_DECODED:
                    yield dataclasses.replace(item, tensors=tensors.unpack_kv(header.tensor, body))
                else:
                    yield dataclasses.replace(item, shard=body)
        return False

    @overload
    def attend(
        self,
        namespace: str,
        keys: bytes | Sequence[bytes],
        layer: int,
        q: Array,
        *,
        mode: Literal["output"] = "output",
        scale: float = 0.0,
        softcap: float = 0.0,
        first_query: int | None = None,
        window: int = 0,
    ) -> AttentionOutput: ...

    @overload
    def attend(
        self,
        namespace: str,
        keys: bytes | Sequence[bytes],
        layer: int,
        q: Array,
        *,
        mode: Literal["scores"],
        scale: float = 0.0,
        softcap: float = 0.0,
        first_query: int | None = None,
        window: int = 0,
        top_k: int = 0,
    ) -> AttentionScores: ...

    def attend(
        self,
        namespace: str,
        keys: bytes | Sequence[bytes],
        layer: int,
        q: Array,
        *,
        mode: Literal["output", "scores"] = "output",
        scale: float = 0.0,
        softcap: float = 0.0,
        first_query: int | None = None,
        window: int = 0,
        top_k: int = 0,
    ) -> AttentionOutput | AttentionScores:
        """Attention of q [queries, q_heads, head_dim] against a layer of chunks, in sequence order.

        scale=0 is 1 / sqrt(head_dim). `first_query` is the position of the first query: a query then sees keys up to
        its own position, the last `window` of them where that isn't 0; without it every key is seen. `top_k` > 0 asks
        for the largest logits only.
        """
        options = {"scale": scale, "softcap": softcap, "first_query": first_query, "window": window, "top_k": top_k}
        header = attention.header(messages.chunk_ids(namespace, keys), layer, q, mode, options)
        deadline = time.monotonic() + self._timeout_s
        while True:
            left_s = max(0.0, deadline - time.monotonic())
            with Stream[Any](self._stub.Attend, lambda _: attention.requests(header, q), 1, left_s) as stream:
                answers = list(attention.read_parts(stream))
            if len(answers) != 1:
                raise DataLoss(f"field 'request_id' is 1: has {len(answers)} answers")
            if not pause(status_error(answers[0][0].status), deadline):
                return attention.answer(header, *answers[0])

    # --- stateless

    def compress(
        self,
        layers: Iterable[Layer],
        *,
        profile: str | None = None,
        first_layer: int = 0,
        first_token: int = 0,
        raw_tokens: int | None = None,
        max_relative_error: float = 0.0,
        bits_per_entry: float = 0.0,
        fixed_size: bool = False,
        rope: Ropes = None,
        layout: LayoutName = "THD",
        tokens: int | None = None,
    ) -> Sequence[Compressed]:
        """Shards of (K, V) of layer first_layer, first_layer + 1, ...; nothing is stored."""
        encode = messages.encode_spec(profile, first_token, raw_tokens, max_relative_error, bits_per_entry, fixed_size)

        def jobs() -> Iterator[Job]:
            for i, (k, v) in enumerate(layers):
                tensor, body = tensors.pack_kv(k, v, layout, tokens, f"layers[{i}]")
                spec = messages.with_rope(encode, rope, i)
                yield messages.sized(pb.CompressHeader(tensor=tensor, encode=spec, layer=first_layer + i), body)

        answers = self._exchange(self._stub.Compress, pb.CompressRequest, framed_answers, jobs())
        return [Compressed(a.body, ShardStats.from_proto(a.header.stats)) for a in answers]

    def decompress(
        self,
        shards: Iterable[bytes],
        *,
        dtype: DTypeName | None = None,
        layout: Literal["THD", "HTD"] = "THD",
        low_rank: bool = False,
    ) -> Sequence[Decompressed]:
        """Tensors of shards; with low_rank of their low-rank part alone, and then they may be previews."""
        number, packed = tensors.dtype_number(dtype), tensors.packed_layout(layout)

        def jobs() -> Iterator[Job]:
            for shard in shards:
                yield messages.sized(
                    pb.DecompressHeader(dtype=number, layout=packed, low_rank=low_rank), [memoryview(shard)]
                )

        answers = self._exchange(self._stub.Decompress, pb.DecompressRequest, framed_answers, jobs())
        return [
            Decompressed(*tensors.unpack_kv(a.header.tensor, a.body), info=ShardInfo.from_proto(a.header.shard))
            for a in answers
        ]

    # --- chunks

    def lookup(self, namespace: str, keys: Sequence[bytes], *, lease_s: float = 30.0) -> Lease:
        """The longest run of leading keys that is there, under a lease: in a `with` it is released at the end."""
        if not 0.001 <= lease_s <= 600:
            raise InvalidArgument(f"argument 'lease_s' is {lease_s}: must be 0.001..600")
        request = pb.LookupRequest(namespace=namespace, keys=keys, lease_ms=round(lease_s * 1000))
        response = self._unary(self._stub.Lookup, request)
        return Lease(self.release, response.present, response.tokens, response.lease_id, response.lease_ms / 1000)

    def release(self, lease_id: int) -> bool:
        """False: unknown, or ended before."""
        return bool(self._unary(self._stub.Release, pb.ReleaseRequest(lease_id=lease_id)).released)

    def stat(self, namespace: str, key: bytes) -> ChunkInfo:
        response = self._unary(self._stub.Stat, pb.StatRequest(chunk=messages.chunk_id(namespace, key)))
        return ChunkInfo.from_proto(response.chunk, response.shards)

    def list(self, namespace: str = "", *, page_size: int = 0) -> Iterator[ChunkInfo]:
        """Committed chunks of a namespace, or of all; the next page is asked for when it is needed."""
        token = ""
        while True:
            request = pb.ListRequest(namespace=namespace, page_size=page_size, page_token=token)
            response = self._unary(self._stub.List, request)
            yield from map(ChunkInfo.from_proto, response.chunks)
            token = response.next_page_token
            if not token:
                return

    # --- the service

    def server_info(self) -> ServerInfo:
        return ServerInfo.from_proto(self._unary(self._stub.ServerInfo, pb.ServerInfoRequest()))

    def health(self, service: str = "") -> str:
        """SERVING, NOT_SERVING or UNKNOWN."""
        response = self._unary(self._health.Check, health_pb2.HealthCheckRequest(service=service))
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))

    def watch_health(self, service: str = "", *, timeout_s: float | None = None) -> Iterator[str]:
        """The state now, and each change of it, until `timeout_s` (None: no limit) or until the generator is closed."""
        call = self._health.Watch(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
        try:
            for response in call:
                yield str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))
        except grpc.RpcError as error:
            raise from_rpc(error) from None
        finally:
            call.cancel()

    # --- helpers

    def _unary(self, method: Callable[..., Any], request: Any) -> Any:
        try:
            return method(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise from_rpc(error) from None

    def _each(self, namespace: str, keys: bytes | Sequence[bytes], request: Any, method: Callable[..., Any]) -> None:
        ids = messages.chunk_ids(namespace, keys)
        first: KVShrinkError | None = None
        for start in range(0, len(ids), _COMMIT_BATCH):
            for status in self._unary(method, request(chunks=ids[start : start + _COMMIT_BATCH])).statuses:
                first = first or status_error(status)
        if first is not None:
            raise first

    def _exchange(
        self, method: Any, request: Any, answers: Callable[[Iterable[Any]], Iterator[Answer]], jobs: Iterable[Job]
    ) -> Answers:
        return Exchange(method, request, answers, self._timeout_s).run(jobs)

    def _put(self, namespace: str, key: bytes, jobs: Iterator[Job], commit: bool) -> PutResults:
        answers = self._exchange(self._stub.Put, pb.PutRequest, plain_answers, jobs)
        if commit:
            self.commit(namespace, key)
        return [PutResult.from_proto(layer, answer.header) for layer, answer in enumerate(answers)]
