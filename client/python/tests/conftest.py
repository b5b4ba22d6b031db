"""A service in this process whose answers a test chooses: what the client does with them is under test, not a codec."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest

from kvshrink import Client
from kvshrink.v1 import kvshrink_pb2_grpc


class Scripted(kvshrink_pb2_grpc.KVShrinkServicer):
    """RPCs are looked up in `script`; an RPC that a test didn't set is UNIMPLEMENTED."""

    def __init__(self) -> None:
        self.script: dict[str, Callable[..., Any]] = {}

    def __getattribute__(self, name: str) -> Any:
        if name[0].isupper() and name in self.script:
            return self.script[name]
        return super().__getattribute__(name)


@pytest.fixture
def scripted() -> Iterator[tuple[Callable[..., Client], dict[str, Callable[..., Any]]]]:
    """connect(**options of Client) and the script."""
    service = Scripted()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    clients: list[Client] = []
    started = False

    def connect(**options: Any) -> Client:
        nonlocal started
        if not started:  # handlers are taken from the servicer when it is added
            kvshrink_pb2_grpc.add_KVShrinkServicer_to_server(service, server)  # type: ignore[no-untyped-call]
            connect.port = server.add_insecure_port("127.0.0.1:0")  # type: ignore[attr-defined]
            server.start()
            started = True
        clients.append(Client(f"127.0.0.1:{connect.port}", **options))  # type: ignore[attr-defined]
        return clients[-1]

    yield connect, service.script
    for client in clients:
        client.close()
    server.stop(0).wait()
