"""Restart, drain, health and reflection, leases and pages."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import kvshrink
from decode_kvs import decode_shard
from kvshrink.v1 import kvshrink_pb2 as pb
from kvshrink.v1 import types_pb2 as types
from support import BIN, Array, Daemon, chunk_of, until

SERVICE = "kvshrink.v1.KVShrink"
Start = Callable[..., Daemon]


def test_restart_keeps_what_was_committed(start_daemon: Start, smollm2: dict[str, Array]) -> None:
    daemon = start_daemon()
    with daemon.client() as client:
        for i, profile in enumerate(("kvs2", "kvs4", "raw", "tq3")):
            client.put("model", b"%d" % i, chunk_of(smollm2, 128 * i, 128), profile=profile, first_token=128 * i)
        client.put("model", b"not committed", chunk_of(smollm2, 0, 64), commit=False)
        keys = [b"%d" % i for i in range(4)]
        before = [item.shard for item in client.get("model", keys, form="shard")]
        info = client.stat("model", b"0")
        assert "disk" in info.tiers
    assert daemon.stop() == 0
    daemon.start()
    with daemon.client() as client:
        assert [item.shard for item in client.get("model", keys, form="shard")] == before
        assert client.lookup("model", [*keys, b"not committed"]).present == 4
        with pytest.raises(kvshrink.NotFound):
            client.stat("model", b"not committed")
        after = client.stat("model", b"0")
        assert (after.created_unix_ms, after.shards, after.bytes) == (info.created_unix_ms, info.shards, info.bytes)
        assert client.server_info().chunks == 4


def test_a_damaged_shard_is_data_loss_then_a_miss(start_daemon: Start, smollm2: dict[str, Array]) -> None:
    """Bytes are changed behind the daemon's back, in the files of its disk tier."""
    daemon = start_daemon(host_bytes="1KiB")  # so that Get reads the disk
    with daemon.client() as client:
        client.put("model", b"k", chunk_of(smollm2, 0, 256)[:1], profile="raw")
        (shard,) = client.get("model", b"k", form="shard")
    assert daemon.stop() == 0
    daemon.start()  # moves what was in the log to the tables
    assert daemon.stop() == 0
    assert shard.shard is not None
    needle = shard.shard[-256:]
    hits = 0
    for path in (daemon.folder / "data").rglob("*"):
        data = bytearray(path.read_bytes()) if path.is_file() else bytearray()
        at = data.find(needle)
        if at >= 0:
            data[at + 100] ^= 1
            path.write_bytes(data)
            hits += 1
    assert hits >= 1
    daemon.start()
    with daemon.client() as client:
        with pytest.raises(kvshrink.DataLoss):
            list(client.get("model", b"k"))
        assert client.lookup("model", [b"k"]).present == 0
        with pytest.raises(kvshrink.NotFound):
            list(client.get("model", b"k"))
        assert client.health() == "SERVING"


def test_a_second_daemon_does_not_share_the_folder(start_daemon: Start) -> None:
    first = start_daemon()
    command = [
        str(BIN / "kvshrinkd"),
        "--listen",
        "127.0.0.1:0",
        "--http",
        "",
        "--data-dir",
        str(first.folder / "data"),
    ]
    second = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert second.returncode == 1
    assert str(first.folder / "data") in second.stderr


class Health:
    """Watch in a thread of its own: the states seen so far."""

    def __init__(self, daemon: Daemon, service: str) -> None:
        self.states: list[str] = []
        self._client = daemon.client()
        self._thread = threading.Thread(target=self._watch, args=(service,), daemon=True)
        self._thread.start()

    def _watch(self, service: str) -> None:
        try:
            for state in self._client.watch_health(service):
                self.states.append(state)
        except kvshrink.KVShrinkError:
            pass  # the daemon has ended

    def close(self) -> None:
        self._thread.join(10)
        self._client.close()


def test_health_check_and_unknown_service(start_daemon: Start) -> None:
    with start_daemon().client() as client:
        assert client.health() == "SERVING"
        assert client.health(SERVICE) == "SERVING"
        with pytest.raises(kvshrink.NotFound):
            client.health("no.such.Service")


def test_drain_refuses_new_objects_of_open_streams(start_daemon: Start, smollm2: dict[str, Array]) -> None:
    """SIGTERM between two objects of a stream: the second is refused, Watch tells, and the exit code is 0."""
    daemon = start_daemon(drain_timeout=20)
    watched = [Health(daemon, ""), Health(daemon, SERVICE)]
    until(lambda: all(h.states == ["SERVING"] for h in watched), 10, "Watch")
    layer = chunk_of(smollm2, 0, 128)[0]
    sending, draining = threading.Event(), threading.Event()
    results: list[object] = []

    def layers() -> Iterator[Any]:
        yield layer
        sending.set()
        draining.wait(20)
        time.sleep(0.3)
        yield layer

    def run() -> None:
        with daemon.client() as client:
            try:
                results.append(client.put("model", b"k", layers(), layer_count=2, commit=False))
            except kvshrink.KVShrinkError as error:
                results.append(error)

    putter = threading.Thread(target=run)
    putter.start()
    assert sending.wait(20)
    daemon.signal(signal.SIGTERM)
    until(lambda: all(h.states[-1] == "NOT_SERVING" for h in watched), 10, "NOT_SERVING")
    draining.set()
    putter.join(30)
    assert isinstance(results[0], kvshrink.Unavailable), results
    assert daemon.wait(25) == 0
    for health in watched:
        health.close()


def test_drain_lets_an_open_object_end(start_daemon: Start) -> None:
    """The header was admitted before SIGTERM; the rest of the body comes after it and is answered OK."""
    daemon = start_daemon(drain_timeout=20)
    k = np.random.default_rng(0).standard_normal((64, 2, 64)).astype(np.float32)
    body = k.tobytes() * 2
    header = pb.CompressHeader(
        object_id=7,
        tensor=types.TensorSpec(dtype=types.DTYPE_FP32, shape=types.Shape(tokens=64, kv_heads=2, head_dim=64)),
        body_bytes=len(body),
    )
    half, draining = threading.Event(), threading.Event()

    def requests() -> Iterator[Any]:
        yield pb.CompressRequest(header=header)
        yield pb.CompressRequest(frame=body[:1000])
        half.set()
        draining.wait(20)
        yield pb.CompressRequest(frame=body[1000:])

    with daemon.stub() as stub, daemon.client() as client:
        answers = stub.Compress(requests(), timeout=30)
        assert half.wait(20)
        until(lambda: client.server_info().inflight_bytes >= len(body), 10, "admission")
        daemon.signal(signal.SIGTERM)
        until(lambda: "NOT_SERVING" in _health(client), 10, "NOT_SERVING")
        draining.set()
        first = next(answers)
        assert first.header.status.code == 0, first
        assert first.object_id == 7
        shard = b""
        with contextlib.suppress(grpc.RpcError):  # then the stream ends: UNAVAILABLE
            for response in answers:
                shard += response.frame
        assert len(shard) == first.header.body_bytes
        assert decode_shard(shard).k.shape == k.shape
    assert daemon.wait(25) == 0


def _health(client: kvshrink.Client) -> str:
    try:
        return client.health()
    except kvshrink.Unavailable:
        return "NOT_SERVING: no new calls"


def test_drain_ends_at_its_time_out(start_daemon: Start) -> None:
    """A client that never finishes doesn't hold the daemon up."""
    daemon = start_daemon(drain_timeout=1)
    hold = threading.Event()

    def requests() -> Iterator[Any]:
        hold.wait(30)
        yield from ()

    with daemon.stub() as stub:
        call = stub.Put(requests())
        time.sleep(0.3)
        started = time.monotonic()
        daemon.signal(signal.SIGTERM)
        assert daemon.wait(20) == 0
        assert time.monotonic() - started < 10
        with pytest.raises(grpc.RpcError):
            list(call)
        hold.set()


def test_reflection_describes_the_service(start_daemon: Start) -> None:
    with grpc.insecure_channel(start_daemon().target) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {SERVICE, "grpc.health.v1.Health"} <= set(database.get_services())
        service = DescriptorPool(database).FindServiceByName(SERVICE)
        methods = {method.name for method in service.methods}
        assert {"Put", "Get", "Attend", "Compress", "Decompress", "Lookup", "Commit", "ServerInfo"} <= methods


def test_http_pages(start_daemon: Start, smollm2: dict[str, Array]) -> None:
    daemon = start_daemon()
    with daemon.client() as client:
        client.put("model", b"k", chunk_of(smollm2, 0, 64)[:1])

    def page(name: str) -> str:
        with urllib.request.urlopen(f"http://{daemon.http}/{name}", timeout=10) as answer:
            return str(answer.read().decode())

    assert page("healthz")
    assert page("readyz")
    metrics = page("metrics")
    assert "# TYPE kvshrink_" in metrics


def test_server_info(start_daemon: Start) -> None:
    with start_daemon(inflight_bytes="64MiB", host_bytes="32MiB", disk_bytes="1GiB").client() as client:
        info = client.server_info()
    assert info.backend == "cpu"
    assert info.profiles == kvshrink.PROFILES
    assert info.default_profile == "kvs2"
    assert info.max_frame_bytes == 1 << 20
    assert info.inflight_capacity_bytes == 64 << 20
    assert {tier.tier: tier.capacity_bytes for tier in info.tiers} == {"host": 32 << 20, "disk": 1 << 30}
    assert not info.draining


def test_leases_hold_and_end(start_daemon: Start, smollm2: dict[str, Array]) -> None:
    with start_daemon().client() as client:
        for i in range(3):
            client.put("model", b"%d" % i, chunk_of(smollm2, 64 * i, 64)[:1], first_token=64 * i)
        with client.lookup("model", [b"0", b"1", b"no", b"2"]) as lease:
            assert (lease.present, lease.tokens) == (2, 128)
            assert client.stat("model", b"0").leased
            assert not client.stat("model", b"2").leased
            with pytest.raises(kvshrink.FailedPrecondition):
                client.delete("model", b"0")
        assert not client.stat("model", b"0").leased
        client.delete("model", [b"0", b"1"])
        with pytest.raises(kvshrink.NotFound):
            client.stat("model", b"0")
        short = client.lookup("model", [b"2"], lease_s=0.2)
        until(lambda: not client.stat("model", b"2").leased, 5, "the end of the lease")
        assert short.release() is False
        empty = client.lookup("model", [b"no"])
        assert (empty.present, empty.lease_id) == (0, 0)


def test_list_by_pages(start_daemon: Start, smollm2: dict[str, Array]) -> None:
    with start_daemon().client() as client:
        keys = [b"%02d" % i for i in range(11)]
        for key in reversed(keys):
            client.put("a", key, chunk_of(smollm2, 0, 8)[:1])
        client.put("b", b"00", chunk_of(smollm2, 0, 8)[:1])
        assert [info.key for info in client.list("a", page_size=3)] == keys
        assert [info.key for info in client.list("a", page_size=11)] == keys
        everything = [(info.namespace, info.key) for info in client.list(page_size=5)]
        assert everything == [("a", key) for key in keys] + [("b", b"00")]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--listen", "nowhere"], "listen"),
        (["--inflight-bytes", "many"], "inflight-bytes"),
        (["--backend", "tpu"], "--backend"),
        (["--no-such-flag"], "no-such-flag"),
    ],
)
def test_bad_flags_are_usage_errors(flags: list[str], message: str) -> None:
    command = [str(BIN / "kvshrinkd"), "--data-dir", "", *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_cuda_without_its_module_is_refused(tmp_path: Path) -> None:
    """One line says what is missing and what to do."""
    command = [str(BIN / "kvshrinkd"), "--data-dir", "", "--backend", "cuda", "--listen", "127.0.0.1:0", "--http", ""]
    environment = {**os.environ, "KVSHRINK_CUDA_MODULE": str(tmp_path / "libkvshrink_cuda.so")}
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, env=environment)
    assert result.returncode == 1
    (line,) = result.stderr.strip().splitlines()
    assert "backend cuda: " in line
    assert str(tmp_path / "libkvshrink_cuda.so") in line
    assert "put libkvshrink_cuda.so beside kvshrinkd" in line
    assert "--backend cpu" in line


def test_auto_says_why_it_runs_on_the_cpu(start_daemon: Start) -> None:
    daemon = start_daemon(backend="auto")
    chosen = [line for line in daemon.log.read_text().splitlines() if "backend_chosen" in line]
    with daemon.client() as client:
        backend = client.server_info().backend
    assert (backend, len(chosen)) in {("cpu", 1), ("cuda", 0)}


def test_command_line_info_is_one_object(start_daemon: Start) -> None:
    daemon = start_daemon()
    command = [str(BIN / "kvshrink"), "info", "--server", daemon.target, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert json.loads(result.stdout)
    daemon.kill()
    failed = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert failed.returncode == 1
