"""Fixtures of the end-to-end tests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "golden"))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "quality"))

from kvshrink import Client
from support import TRACES, Array, Daemon, load_trace


@pytest.fixture
def start_daemon(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """start_daemon(**flags): a daemon of its own folder each; those still running are killed at the end."""
    daemons: list[Daemon] = []

    def start(**flags: Any) -> Daemon:
        daemons.append(Daemon(tmp_path / f"daemon{len(daemons)}", **{k.replace("_", "-"): v for k, v in flags.items()}))
        return daemons[-1].start()

    yield start
    for daemon in daemons:
        daemon.close()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for the tests of a file that keep to a namespace of their own. It must end cleanly."""
    running = Daemon(tmp_path_factory.mktemp("daemon")).start()
    yield running
    try:
        assert running.stop() == 0, running.log.read_text()
    finally:
        running.close()


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with daemon.client() as connected:
        yield connected


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)


@pytest.fixture(scope="session")
def smollm2() -> dict[str, Array]:
    return load_trace(TRACES[0])


@pytest.fixture(scope="session")
def qwen() -> dict[str, Array]:
    return load_trace(TRACES[1])
