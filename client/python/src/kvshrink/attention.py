"""Requests and answers of Attend, and the reading of answers that are a header and frames."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kvshrink.errors import DataLoss, InvalidArgument
from kvshrink.streams import frames
from kvshrink.tensors import array_bytes, array_dtype
from kvshrink.types import Array, AttentionOutput, AttentionScores, status_error
from kvshrink.v1 import kvshrink_pb2 as pb
from kvshrink.v1 import types_pb2 as types

_MODES = {"output": pb.ATTEND_MODE_OUTPUT, "scores": pb.ATTEND_MODE_SCORES}


def header(
    chunks: Sequence[types.ChunkId], layer: int, q: Array, mode: str, options: Mapping[str, Any]
) -> pb.AttendHeader:
    if mode not in _MODES:
        raise InvalidArgument(f"argument 'mode' is {mode!r}: must be one of {', '.join(_MODES)}")
    dtype = array_dtype(q, "q")
    if q.ndim != 3 or q.size == 0:
        raise InvalidArgument(f"argument 'q' has shape {q.shape}: must be [queries, q_heads, head_dim], not empty")
    queries, q_heads, head_dim = q.shape
    return pb.AttendHeader(
        request_id=1,
        chunks=chunks,
        layer=layer,
        mode=_MODES[mode],
        queries=queries,
        q_heads=q_heads,
        head_dim=head_dim,
        dtype=dtype,
        **options,
    )


def requests(head: pb.AttendHeader, q: Array) -> Iterator[pb.AttendRequest]:
    yield pb.AttendRequest(header=head)
    for frame in frames([array_bytes(q)]):
        yield pb.AttendRequest(frame=frame)


def read_parts(responses: Iterable[Any]) -> Iterator[tuple[Any, bytes]]:
    """Headers with their bodies, of a stream of one request; the header's status is for the caller to read."""
    head: Any = None
    body: list[bytes] = []
    have, last = 0, False
    for response in responses:
        if last:
            raise DataLoss("field 'last' is true: more was sent after it")
        last = response.last
        part = response.WhichOneof("part")
        if part == "header":
            if head is not None:
                raise DataLoss(f"field 'body_bytes' is {head.body_bytes}: the frames have {have}")
            head, body, have = response.header, [], 0
        elif part == "frame":
            if head is None:
                raise DataLoss("field 'frame' is set: there is no header before it")
            body.append(response.frame)
            have += len(response.frame)
        if head is not None and (head.status.code or have >= head.body_bytes):
            if have > head.body_bytes:
                raise DataLoss(f"field 'body_bytes' is {head.body_bytes}: the frames have {have}")
            yield head, b"".join(body)
            head = None
    if not last or head is not None:
        raise DataLoss("field 'last' is false: the stream ended")


def answer(asked: pb.AttendHeader, head: pb.AttendAnswer, body: bytes) -> AttentionOutput | AttentionScores:
    error = status_error(head.status)
    if error is not None:
        raise error
    rows = (asked.queries, asked.q_heads)
    if asked.mode == pb.ATTEND_MODE_OUTPUT:
        output, lse = _arrays(body, [("<f4", (*rows, asked.head_dim)), ("<f4", rows)])
        return AttentionOutput(output, lse, head.tokens)
    if asked.top_k == 0:
        (logits,) = _arrays(body, [("<f4", (*rows, head.tokens))])
        return AttentionScores(logits, None, head.tokens)
    logits, indices = _arrays(body, [("<f4", (*rows, head.top_k)), ("<u4", (*rows, head.top_k))])
    return AttentionScores(logits, indices, head.tokens)


def _arrays(body: bytes, wanted: Sequence[tuple[str, tuple[int, ...]]]) -> list[Array]:
    """Read-only arrays over the body, one after the other."""
    size = sum(4 * math.prod(shape) for _, shape in wanted)
    if len(body) != size:
        raise DataLoss(f"field 'body_bytes' is {len(body)}: must be {size}")
    arrays, at = [], 0
    for dtype, shape in wanted:
        arrays.append(np.frombuffer(body, dtype, math.prod(shape), at).reshape(shape))
        at += 4 * math.prod(shape)
    return arrays
