"""kill -9 at any moment: what was acknowledged as committed is whole, and nothing half-written is visible."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable

import numpy as np

import kvshrink
from support import Array, Daemon, chunk_of, layers_of

ROUNDS = 8
LAYERS = 3


class Writers:
    """Threads that put and commit chunks of their own until the daemon dies, noting what was acknowledged."""

    def __init__(self, daemon: Daemon, trace: dict[str, Array], generation: int) -> None:
        self.daemon, self.trace, self.generation = daemon, trace, generation
        self.started: dict[bytes, int] = {}  # key -> first token
        self.committed: set[bytes] = set()
        self.threads = [threading.Thread(target=self._run, args=(i,)) for i in range(3)]
        for thread in self.threads:
            thread.start()

    def _run(self, writer: int) -> None:
        with self.daemon.client(timeout_s=10) as client, contextlib.suppress(kvshrink.KVShrinkError):
            for i in range(10_000):
                key = b"%d/%d/%d" % (self.generation, writer, i)
                first = 16 * random.Random(key).randrange(20)
                self.started[key] = first
                put(client, self.trace, key, first)
                self.committed.add(key)

    def join(self) -> None:
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive()


def put(client: kvshrink.Client, trace: dict[str, Array], key: bytes, first: int) -> None:
    layers = layers_of(trace)[:LAYERS]
    client.put("crash", key, chunk_of(trace, first, 64, layers), profile="kvs3", first_token=first)


def check(client: kvshrink.Client, trace: dict[str, Array], key: bytes, first: int) -> None:
    """All layers are there, and are what this chunk compresses to: the codec is deterministic."""
    wanted = client.compress(chunk_of(trace, first, 64, layers_of(trace)[:LAYERS]), profile="kvs3", first_token=first)
    got = list(client.get("crash", key, form="shard"))
    assert [g.layer for g in got] == list(range(LAYERS))
    assert [g.shard for g in got] == [w.shard for w in wanted]


def test_kill_in_the_middle_of_puts(start_daemon: Callable[..., Daemon], smollm2: dict[str, Array]) -> None:
    daemon = start_daemon()
    rng = random.Random(7)
    started: dict[bytes, int] = {}
    committed: set[bytes] = set()
    for generation in range(ROUNDS):
        writers = Writers(daemon, smollm2, generation)
        time.sleep(rng.uniform(0.05, 0.8))
        daemon.kill()
        writers.join()
        started |= writers.started
        committed |= writers.committed
        daemon.start()
        with daemon.client() as client:
            listed = {info.key: info for info in client.list("crash")}
            assert committed <= set(listed), "an acknowledged commit is lost"
            assert set(listed) <= set(started)
            for info in listed.values():
                assert info.committed
                assert info.layers == info.layers_present == LAYERS
            for key in set(writers.started) - set(listed):
                assert client.lookup("crash", [key]).present == 0
            fresh = [key for key in listed if key in writers.started]
            older = rng.sample(sorted(set(listed) - set(fresh)), min(5, len(listed) - len(fresh)))
            for key in [*fresh, *older]:
                check(client, smollm2, key, started[key])
    assert len(committed) >= ROUNDS, "too few commits for the test to mean anything"
    with daemon.client() as client:
        for key in sorted(committed):
            check(client, smollm2, key, started[key])
    assert daemon.stop() == 0


def test_an_interrupted_chunk_can_be_put_again(start_daemon: Callable[..., Daemon], smollm2: dict[str, Array]) -> None:
    daemon = start_daemon()
    layers = chunk_of(smollm2, 0, 64)[:2]
    with daemon.client() as client:
        client.put("crash", b"k", layers[:1], layer_count=2, commit=False)
    daemon.kill()
    daemon.start()
    with daemon.client() as client:
        results = client.put("crash", b"k", layers)
        assert not any(r.already_present for r in results)
        assert [item.layer for item in client.get("crash", b"k")] == [0, 1]
        assert np.isfinite(next(client.get("crash", b"k")).k.astype(np.float32)).all()
