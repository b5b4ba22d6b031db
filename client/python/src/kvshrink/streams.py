"""Objects over a bidirectional stream: a header and frames each, a bounded number of them on their way."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

import grpc

from kvshrink.errors import DataLoss, DeadlineExceeded, ResourceExhausted, from_rpc
from kvshrink.types import status_error

FRAME_BYTES = 1 << 20
WINDOW = 8  # objects sent and not yet answered

Request = TypeVar("Request")


@dataclasses.dataclass(frozen=True)
class Job:
    """One object: its header (whose object_id is set when it is sent) and the parts of its body."""

    header: Any
    body: list[memoryview]

    @property
    def body_bytes(self) -> int:
        return sum(part.nbytes for part in self.body)


@dataclasses.dataclass(frozen=True)
class Answer:
    """`header` carries the object's status; `body` is empty where the RPC has none."""

    object_id: int
    header: Any
    body: bytes = b""


def frames(parts: list[memoryview]) -> Iterator[bytes]:
    """The body in frames of at most FRAME_BYTES; frames don't join parts."""
    for part in parts:
        for start in range(0, part.nbytes, FRAME_BYTES):
            yield bytes(part[start : start + FRAME_BYTES])


def pause(refusal: object, deadline: float) -> bool:
    """Waits as long as a refusal asks for. False, at once, when it is none or that is beyond the deadline."""
    if not isinstance(refusal, ResourceExhausted) or refusal.retry_after_s <= 0:
        return False
    if time.monotonic() + refusal.retry_after_s > deadline:
        return False
    time.sleep(refusal.retry_after_s)
    return True


class Stream(Generic[Request]):
    """A call whose requests come from an iterator that may block in `hold`, and whose errors are ours.

    gRPC pulls the iterator in a thread of its own: an exception there (a caller's generator of layers, a check of an
    array) ends the call and is raised to whoever reads the answers.
    """

    def __init__(
        self,
        method: Callable[..., Any],
        requests: Callable[[Stream[Request]], Iterable[Request]],
        window: int,
        timeout_s: float,
    ) -> None:
        self._places = threading.Condition()
        self._free = window
        self._ended = False
        self._failure: Exception | None = None
        self._bound = threading.Event()  # gRPC may pull requests before the call is ours to cancel
        self._call = method(self._guarded(requests), timeout=timeout_s)
        self._bound.set()

    def _guarded(self, requests: Callable[[Stream[Request]], Iterable[Request]]) -> Iterator[Request]:
        self._bound.wait()
        try:
            yield from requests(self)
        except Exception as error:  # handed to the reader
            self._failure = error
            self._call.cancel()

    def hold(self) -> bool:
        """Takes a place of the window, waiting for one. False when the stream has ended: stop sending."""
        with self._places:
            self._places.wait_for(lambda: self._free > 0 or self._ended)
            self._free -= 1
            return not self._ended

    def free(self) -> None:
        with self._places:
            self._free += 1
            self._places.notify()

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._call
        except grpc.RpcError as error:
            if self._failure is not None:
                raise self._failure from None
            raise from_rpc(error) from None
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> Stream[Request]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._call.cancel()  # no effect on a call that has ended
        with self._places:
            self._ended = True
            self._places.notify_all()


def _assemble(responses: Iterable[Any]) -> Iterator[Answer]:
    """Answers of header and frames, which may be interleaved between objects but not within one."""
    headers: dict[int, Any] = {}
    bodies: dict[int, list[bytes]] = {}
    for response in responses:
        number = response.object_id
        if response.WhichOneof("part") == "header":
            if number in headers:
                raise DataLoss(f"field 'object_id' is {number}: has two headers")
            headers[number], bodies[number] = response.header, []
        elif number not in headers:
            raise DataLoss(f"field 'object_id' is {number}: a frame before its header")
        else:
            bodies[number].append(response.frame)
        have, header = sum(map(len, bodies[number])), headers[number]
        if have > header.body_bytes:
            raise DataLoss(f"field 'body_bytes' is {header.body_bytes}: the frames have {have}")
        if header.status.code or have == header.body_bytes:
            yield Answer(number, headers.pop(number), b"".join(bodies.pop(number)))


def plain_answers(responses: Iterable[Any]) -> Iterator[Answer]:
    """Of Put, whose answers have no body."""
    for response in responses:
        yield Answer(response.object_id, response)


def framed_answers(responses: Iterable[Any]) -> Iterator[Answer]:
    """Of Compress and Decompress."""
    return _assemble(responses)


class Exchange:
    """Sends jobs over one stream at a time and gathers their answers; sends again what a full budget refused."""

    def __init__(
        self,
        method: Callable[..., Any],
        request: Callable[..., Any],
        answers: Callable[[Iterable[Any]], Iterator[Answer]],
        timeout_s: float,
    ) -> None:
        self._method = method
        self._request = request
        self._answers = answers
        self._deadline = time.monotonic() + timeout_s

    def run(self, jobs: Iterable[Job]) -> list[Answer]:
        """Answers in the order of the jobs. Raises the first error of an object; the rest is then abandoned."""
        done: dict[int, Answer] = {}
        window, todo = WINDOW, cast(Iterator[tuple[int, Job]], enumerate(jobs, start=1))
        refusal: ResourceExhausted | None = None
        while True:
            try:
                refused, refusal = self._round(todo, window, done)
            except DeadlineExceeded:
                raise refusal or DeadlineExceeded("no answer within the time-out") from None
            if refusal is None:
                return [done[number] for number in sorted(done)]
            if not pause(refusal, self._deadline):
                raise refusal
            window, todo = max(1, window // 2), iter(sorted(refused.items()))

    def _round(
        self, todo: Iterator[tuple[int, Job]], window: int, done: dict[int, Answer]
    ) -> tuple[dict[int, Job], ResourceExhausted | None]:
        """One stream. Returns the jobs that were refused, and the refusal that asks for the longest pause."""
        sent: dict[int, Job] = {}
        refused: dict[int, Job] = {}
        longest: ResourceExhausted | None = None
        all_sent = False

        def requests(stream: Stream[Any]) -> Iterator[Any]:
            nonlocal all_sent
            for number, job in todo:
                if not stream.hold():
                    return
                job.header.object_id = number
                sent[number] = job
                yield self._request(header=job.header)
                for frame in frames(job.body):
                    yield self._request(frame=frame)
            all_sent = True

        with Stream(self._method, requests, window, max(0.0, self._deadline - time.monotonic())) as stream:
            for answer in self._answers(stream):
                job = sent.pop(answer.object_id, None)
                if job is None:
                    raise DataLoss(f"field 'object_id' is {answer.object_id}: was not asked for")
                stream.free()
                error = status_error(answer.header.status)
                if isinstance(error, ResourceExhausted) and error.retry_after_s > 0:
                    refused[answer.object_id] = job
                    longest = max(longest or error, error, key=lambda e: e.retry_after_s)
                elif error is not None:
                    raise error
                else:
                    done[answer.object_id] = answer
        if sent or not all_sent:
            raise DataLoss(f"field 'object_id' is {max(done, default=0) + 1}: the stream ended without its answer")
        return refused, longest
