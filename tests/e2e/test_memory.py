"""Bounded memory: small budgets, far more data than they hold, slow and vanishing clients."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

import kvshrink
from kvshrink.v1 import kvshrink_pb2 as pb
from kvshrink.v1 import types_pb2 as types
from support import MIB, Daemon, until

Start = Callable[..., Daemon]
BUDGETS = {"inflight_bytes": "16MiB", "host_bytes": "16MiB", "uncommitted_bytes": "16MiB", "threads": 2}


def layer(seed: int) -> tuple[Any, Any]:
    """4 MiB raw."""
    x = np.random.default_rng(seed).standard_normal((2, 256, 16, 256), np.float32).astype(np.float16)
    return x[0], x[1]


class PeakRss:
    """The largest resident size of the daemon while the block runs, sampled."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon, self.peak_bytes = daemon, 0
        self._stop = threading.Event()

    def __enter__(self) -> PeakRss:
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.02):
            self.peak_bytes = max(self.peak_bytes, self.daemon.rss_bytes())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def test_resident_size_stays_within_the_budgets(start_daemon: Start) -> None:
    """800 MiB go through a daemon whose budgets are 48 MiB, by four clients at once, raw so that nothing shrinks."""
    daemon = start_daemon(**BUDGETS, disk_bytes="256MiB")
    with daemon.client() as client:
        client.put("warm", b"k", [layer(0)], profile="kvs2")
    errors: list[Exception] = []
    one = layer(1)

    def send(name: int) -> None:
        try:
            with daemon.client(timeout_s=120) as client:
                for i in range(50):
                    client.put("model", b"%d/%d" % (name, i), [one], profile="raw")
                    list(client.get("model", b"%d/%d" % (name, i), form="shard"))
        except Exception as error:
            errors.append(error)

    before = daemon.rss_bytes()
    with PeakRss(daemon) as rss:
        threads = [threading.Thread(target=send, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(150)
    assert not errors, errors
    # The budgets; three write buffers of the disk tier, each a sixteenth of its size; what gRPC holds per stream and
    # what malloc does not give back: about 50 MiB.
    assert rss.peak_bytes - before < (48 + 3 * 16 + 112) * MIB
    with daemon.client() as client:
        info = client.server_info()
        assert info.inflight_bytes == 0
        assert info.uncommitted_bytes == 0
        host = next(tier for tier in info.tiers if tier.tier == "host")
        assert host.used_bytes <= host.capacity_bytes


def header(number: int, body_bytes: int, tokens: int) -> pb.CompressHeader:
    shape = types.Shape(tokens=tokens, kv_heads=16, head_dim=256)
    tensor = types.TensorSpec(dtype=types.DTYPE_FP16, shape=shape)
    return pb.CompressHeader(object_id=number, tensor=tensor, body_bytes=body_bytes)


def half_sent(stub: Any, count: int) -> Any:
    """Calls that hold their budget: header and half a body of 4 MiB each. They wait until cancelled."""
    waiting, sent = threading.Event(), threading.Semaphore(0)
    calls = []

    def requests() -> Iterator[Any]:
        yield pb.CompressRequest(header=header(1, 4 * MIB, 256))
        yield pb.CompressRequest(frame=bytes(MIB))
        sent.release()
        waiting.wait(60)

    for _ in range(count):
        calls.append(stub.Compress(requests()))
        assert sent.acquire(timeout=20)
    return calls, waiting


def test_a_full_budget_refuses_before_the_body(start_daemon: Start) -> None:
    """The refusal comes with a time to try again while the body is still unsent, and the stream lives on."""
    daemon = start_daemon(inflight_bytes="64MiB", threads=2)
    with daemon.stub() as stub, daemon.client() as client:
        calls, waiting = half_sent(stub, 2)
        until(lambda: client.server_info().inflight_bytes >= 8 * MIB, 10, "admission")
        refused = threading.Event()

        def requests() -> Iterator[Any]:
            yield pb.CompressRequest(header=header(9, 60 * MIB, 3840))
            assert refused.wait(20), "no refusal while the body was unsent"
            for _ in range(60):
                yield pb.CompressRequest(frame=bytes(MIB))  # dropped
            yield pb.CompressRequest(header=header(10, 4 * 16 * 256, 1))
            yield pb.CompressRequest(frame=bytes(4 * 16 * 256))

        answers = stub.Compress(requests(), timeout=60)
        first = next(answers)
        refused.set()
        assert first.object_id == 9
        assert first.header.status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert first.header.status.retry_after_ms > 0
        rest = list(answers)
        assert {r.object_id for r in rest} == {10}
        assert rest[0].header.status.code == 0
        for call in calls:
            call.cancel()
        waiting.set()


def test_an_object_beyond_the_whole_budget_is_refused(start_daemon: Start) -> None:
    daemon = start_daemon(inflight_bytes="8MiB", threads=2)
    big = np.zeros((2048, 8, 512), np.float16)
    with daemon.client(timeout_s=2) as client:
        started = time.monotonic()
        with pytest.raises((kvshrink.InvalidArgument, kvshrink.ResourceExhausted)):
            client.compress([(big, big)])
        assert time.monotonic() - started < 5
        assert client.server_info().inflight_bytes == 0


def test_a_client_that_goes_frees_what_it_held(start_daemon: Start) -> None:
    daemon = start_daemon(inflight_bytes="64MiB", threads=2)
    with daemon.client() as client:

        def held() -> int:
            return client.server_info().inflight_bytes

        with daemon.stub() as stub:
            (first,), waiting = half_sent(stub, 1)
            until(lambda: held() > 0, 10, "admission")
            one = held()
            assert one >= 4 * MIB  # its body at least
            _, also_waiting = half_sent(stub, 1)
            until(lambda: held() == 2 * one, 10, "admission of the second")
            first.cancel()
            until(lambda: held() == one, 10, "the first one's share")
        # leaving the block closes the connection under the second one
        waiting.set()
        also_waiting.set()
        until(lambda: held() == 0, 10, "the second one's share")
        client.compress([layer(2)], profile="raw")


def test_a_reader_that_goes_frees_what_it_held(start_daemon: Start) -> None:
    daemon = start_daemon(**{**BUDGETS, "inflight_bytes": "32MiB"})
    with daemon.client() as client:
        for i in range(6):
            client.put("model", b"%d" % i, [layer(i)], profile="raw")
        for form in ("shard", "decoded"):
            items = client.get("model", [b"%d" % i for i in range(6)] * 4, form=form)
            next(items)
            items.close()
            until(lambda: client.server_info().inflight_bytes == 0, 10, f"what a Get of {form} held")


def test_uncommitted_chunks_are_bounded_and_expire(start_daemon: Start) -> None:
    daemon = start_daemon(uncommitted_bytes="10MiB", uncommitted_ttl=2)
    with daemon.client(timeout_s=1.0) as client:
        client.put("model", b"a", [layer(0)], layer_count=2, profile="raw", commit=False)
        client.put("model", b"b", [layer(1)], layer_count=2, profile="raw", commit=False)
        with pytest.raises(kvshrink.ResourceExhausted):
            client.put("model", b"c", [layer(2)], layer_count=2, profile="raw", commit=False)
        assert client.server_info().uncommitted_bytes >= 8 * MIB
        until(lambda: client.server_info().uncommitted_bytes == 0, 10, "their expiry")
        client.put("model", b"c", [layer(2)], profile="raw")
        assert client.stat("model", b"c").committed


def test_disk_budget_evicts_the_oldest_but_not_leased_ones(start_daemon: Start) -> None:
    daemon = start_daemon(disk_bytes="24MiB", host_bytes="8MiB")
    with daemon.client() as client:
        client.put("model", b"leased", [layer(0)], profile="raw")
        with client.lookup("model", [b"leased"], lease_s=60):
            for i in range(12):
                client.put("model", b"%02d" % i, [layer(i + 1)], profile="raw")
            keys = [info.key for info in client.list("model")]
            assert b"leased" in keys
            assert b"11" in keys
            assert b"00" not in keys
            disk = next(tier for tier in client.server_info().tiers if tier.tier == "disk")
            assert disk.used_bytes <= disk.capacity_bytes
            (item,) = client.get("model", b"leased")
            assert np.array_equal(item.k, layer(0)[0])
