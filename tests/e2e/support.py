"""What the end-to-end tests share: the binaries, a daemon in its own folder, traces, and numpy's idea of attention."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
import numpy.typing as npt
import psutil
from safetensors import safe_open

from kvshrink import Client
from kvshrink.v1 import kvshrink_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(os.environ.get("KVSHRINK_BIN_DIR", ROOT / "build" / "dev" / "bin"))
TRACES = [ROOT / "tests" / "data" / f"{name}.safetensors" for name in ("smollm2-512", "qwen2.5-coder-512")]
START_S = 30
MIB = 1 << 20

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
T = TypeVar("T")


class Daemon:
    """One kvshrinkd on free ports, on the CPU unless told otherwise.

    It may be stopped, killed and started again over the same data.
    """

    def __init__(self, folder: Path, **flags: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.flags = {"data-dir": folder / "data", "backend": "cpu", **flags}
        self.log = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self.target = ""
        self.http = ""

    def start(self) -> Daemon:
        port_file = self.folder / "ports"
        port_file.unlink(missing_ok=True)
        command = [str(BIN / "kvshrinkd"), "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]
        command += ["--port-file", str(port_file)]
        command += [part for name, value in self.flags.items() for part in (f"--{name}", str(value))]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("KVSHRINK_")}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        until(lambda: port_file.exists() or self.process_ended(), START_S, "the daemon's port file")
        assert not self.process_ended(), f"kvshrinkd ended:\n{self.log.read_text()}"
        ports = json.loads(port_file.read_text())
        self.target, self.http = ports["listen"], ports["http"]
        return self

    def process_ended(self) -> bool:
        assert self.process is not None
        return self.process.poll() is not None

    def client(self, **options: Any) -> Client:
        return Client(self.target, **options)

    @contextlib.contextmanager
    def stub(self) -> Iterator[Any]:
        """The bare protocol, for what the client wouldn't send."""
        with grpc.insecure_channel(self.target) as channel:
            yield kvshrink_pb2_grpc.KVShrinkStub(channel)  # type: ignore[no-untyped-call]

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 30) -> int:
        assert self.process is not None
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    def stop(self) -> int:
        """Drains it. Returns the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def close(self) -> None:
        """At the end of a test, however it went."""
        if self.process is not None and not self.process_ended():
            self.kill()

    def rss_bytes(self) -> int:
        assert self.process is not None
        return int(psutil.Process(self.process.pid).memory_info().rss)


def until(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)


def run_cli(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """The command line; its exit code must be `code`."""
    command = [str(BIN / "kvshrink"), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == code, f"{command} gave {result.returncode}:\n{result.stdout}\n{result.stderr}"
    return result


def run_json(*arguments: object) -> Any:
    return json.loads(run_cli(*arguments, "--json").stdout)


def load_trace(path: Path) -> dict[str, Array]:
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def layers_of(trace: dict[str, Array]) -> list[int]:
    return sorted(int(name.split(".")[1]) for name in trace if name.endswith(".k"))


def chunk_of(trace: dict[str, Array], first: int, count: int, layers: list[int] | None = None) -> list[Any]:
    """(K, V) of each layer, tokens first .. first + count - 1."""
    at = slice(first, first + count)
    return [(trace[f"layer.{i}.k"][at], trace[f"layer.{i}.v"][at]) for i in (layers or layers_of(trace))]


def given(value: T | None) -> T:
    """V of what has V."""
    assert value is not None
    return value


def relative_error(got: Array, wanted: Array) -> float:
    """Sum of squared error / sum of squares."""
    a, b = got.astype(np.float64), wanted.astype(np.float64)
    return float(((a - b) ** 2).sum() / (b**2).sum())


def attention(
    q: Array, k: Array, v: Array, first_query: int | None, window: int = 0, softcap: float = 0.0
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Exact attention in double: output [Q, heads, d], log-sum-exp [Q, heads], logits [Q, heads, T] (-inf: unseen)."""
    queries, q_heads, d = q.shape
    tokens, kv_heads, _ = k.shape
    group = q_heads // kv_heads
    keys = np.repeat(k.astype(np.float64), group, axis=1)
    values = np.repeat(v.astype(np.float64), group, axis=1)
    logits = np.einsum("qhd,thd->qht", q.astype(np.float64), keys) / np.sqrt(d)
    if softcap:
        logits = softcap * np.tanh(logits / softcap)
    if first_query is not None:
        distance = first_query + np.arange(queries)[:, None] - np.arange(tokens)
        seen = (distance >= 0) & ((distance < window) if window else True)
        logits = np.where(seen[:, None, :], logits, -np.inf)
    largest = logits.max(axis=2, keepdims=True)
    largest = np.where(np.isfinite(largest), largest, 0)
    weights = np.exp(logits - largest)
    total = weights.sum(axis=2, keepdims=True)
    output = np.einsum("qht,thd->qhd", weights / np.where(total > 0, total, 1), values)
    with np.errstate(divide="ignore"):
        return output, (np.log(total) + largest)[..., 0], logits
