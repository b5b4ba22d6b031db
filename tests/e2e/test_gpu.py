"""The daemon on a GPU against the daemon on the CPU: the same promises, whoever codes. Skips where there is no GPU."""

from __future__ import annotations

import ctypes
import re
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from kvshrink import Client
from support import BIN, Array, Daemon, chunk_of, given, relative_error

DEVICE_PROFILES = ["kvs2", "kvs3", "kvs4", "tq2", "tq3", "tq4"]
CPU_PROFILES = ["raw", "fp8", "eoptshrinkq2", "kvs2t"]


def missing() -> str:
    """Why these tests can't run here; empty when they can."""
    if not (BIN / "libkvshrink_cuda.so").exists():
        return "this build has no CUDA module"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver"
    return "" if driver.cuInit(0) == 0 else "no NVIDIA GPU"


pytestmark = pytest.mark.skipif(missing() != "", reason=missing() or "there is a GPU")


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    running = Daemon(tmp_path_factory.mktemp("gpu"), backend="cuda").start()
    yield running
    try:
        assert running.stop() == 0, running.log.read_text()
        assert "device_lost" not in running.log.read_text()
    finally:
        running.close()


@pytest.fixture
def on_gpu(gpu: Daemon) -> Iterator[Client]:
    with gpu.client() as connected:
        yield connected


def objects(daemon: Daemon) -> Counter[tuple[str, str]]:
    """Objects so far, by (rpc, what coded them)."""
    with urllib.request.urlopen(f"http://{daemon.http}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found: Counter[tuple[str, str]] = Counter()
    for labels, value in re.findall(r"^kvshrink_codec_objects_total\{([^}]*)\} (\S+)$", text, re.MULTILINE):
        named = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        found[named["rpc"], named["backend"]] += int(float(value))
    return found


def made(tokens: int, heads: int, head_dim: int, dtype: Any, seed: int) -> tuple[Array, Array]:
    """Rows of low rank and noise."""
    rng = np.random.default_rng(seed)

    def one() -> Array:
        rows = rng.standard_normal((heads, tokens, 4)) @ (2 * rng.standard_normal((heads, 4, head_dim)))
        noisy = rows + 0.3 * rng.standard_normal(rows.shape)
        return np.ascontiguousarray(noisy.transpose(1, 0, 2)).astype(dtype)

    return one(), one()


def close(a: Array, b: Array) -> None:
    """Two decoders of one shard: equal but for their arithmetic and the rounding of the last place."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    place = 2.0**-7 if a.dtype == ml_dtypes.bfloat16 else 2.0**-10
    np.testing.assert_allclose(x, y, rtol=place, atol=2.0**-11 * np.abs(y).max())


def test_says_what_it_runs_on(on_gpu: Client) -> None:
    info = on_gpu.server_info()
    assert info.backend == "cuda"
    assert "NVIDIA" in info.device


@pytest.mark.parametrize("profile", DEVICE_PROFILES)
@pytest.mark.parametrize("data", ["smollm2", "fp16-128", "bf16-128", "fp32-64", "bf16-256"])
def test_is_as_good_as_the_cpu(
    gpu: Daemon, on_gpu: Client, client: Client, smollm2: dict[str, Array], namespace: str, profile: str, data: str
) -> None:
    kinds = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp32": np.float32}
    if data == "smollm2":
        layers = chunk_of(smollm2, 0, 300)
    else:
        dtype, head_dim = data.split("-")
        layers = [made(300, 2, int(head_dim), kinds[dtype], seed) for seed in (1, 2)]
    before = objects(gpu)
    by_gpu = on_gpu.put(namespace, b"0", layers, profile=profile)
    by_cpu = client.put(namespace, b"0", layers, profile=profile)
    shards = [item.shard for item in on_gpu.get(namespace, b"0", form="shard")]
    decoded = list(on_gpu.get(namespace, b"0"))
    after = objects(gpu)
    assert after["Put", "cuda"] - before["Put", "cuda"] == len(layers)
    assert after["Get", "cuda"] - before["Get", "cuda"] == len(layers)
    assert after["Put", "cpu"] == before["Put", "cpu"]
    client.put_shards(namespace, b"theirs", [shard for shard in shards if shard is not None])
    for mine, theirs, item, other, (k, v) in zip(
        by_gpu, by_cpu, decoded, client.get(namespace, b"theirs"), layers, strict=True
    ):
        assert mine.stats.encoded_bytes == pytest.approx(theirs.stats.encoded_bytes, rel=0.02)
        assert mine.stats.raw_bytes == theirs.stats.raw_bytes
        for got, same, wanted, a, b in (
            (item.k, other.k, k, mine.stats.k, theirs.stats.k),
            (given(item.v), given(other.v), v, given(mine.stats.v), given(theirs.stats.v)),
        ):
            assert got.dtype == wanted.dtype
            assert got[:1].tobytes() == np.ascontiguousarray(wanted[:1]).tobytes()  # the sink is kept exactly
            close(got, same)
            assert a.relative_error == pytest.approx(b.relative_error, rel=0.03)
            assert a.bits_per_entry == pytest.approx(b.bits_per_entry, rel=0.03)
            assert relative_error(got, wanted) == pytest.approx(a.relative_error, rel=0.05, abs=2e-6)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "fp8_e4m3"])
@pytest.mark.parametrize("layout", ["THD", "HTD"])
@pytest.mark.parametrize("heads", [(), (0,), (1, 2, 4), (0, 2, 5)])
def test_answers_of_every_form(
    on_gpu: Client, client: Client, namespace: str, dtype: Any, layout: Any, heads: tuple[int, ...]
) -> None:
    layer = made(200, 6, 64, np.float16, 3)
    on_gpu.put(namespace, b"0", [layer], profile="kvs3")
    (shard,) = on_gpu.get(namespace, b"0", form="shard")
    client.put_shards(namespace, b"0", [shard.shard or b""])
    (mine,) = on_gpu.get(namespace, b"0", dtype=dtype, layout=layout, kv_heads=heads)
    (theirs,) = client.get(namespace, b"0", dtype=dtype, layout=layout, kv_heads=heads)
    if dtype == "fp8_e4m3":  # the CPU's work in both
        assert mine.k.tobytes() == theirs.k.tobytes()
    else:
        close(mine.k, theirs.k)
        close(given(mine.v), given(theirs.v))


@pytest.mark.parametrize("layout", ["HTD", "BNHD", "BHND"])
def test_layouts_give_the_same_shard(on_gpu: Client, layout: Any) -> None:
    k, v = made(70, 2, 128, np.float16, 4)

    def laid(x: Array) -> Array:
        if layout == "HTD":
            return np.ascontiguousarray(x.transpose(1, 0, 2))
        pages = np.zeros((5, 16, *x.shape[1:]), x.dtype)
        pages.reshape(80, *x.shape[1:])[:70] = x
        return pages if layout == "BNHD" else np.ascontiguousarray(pages.transpose(0, 2, 1, 3))

    (plain,) = on_gpu.compress([(k, v)], profile="kvs2")
    tokens = 70 if layout.startswith("B") else None
    (other,) = on_gpu.compress([(laid(k), laid(v))], profile="kvs2", layout=layout, tokens=tokens)
    assert other.shard == plain.shard


def test_the_cpu_does_the_rest(gpu: Daemon, on_gpu: Client, client: Client) -> None:
    """What the device can't do has the CPU's bytes."""
    k, v = made(150, 2, 64, np.float16, 5)
    odd = made(150, 2, 80, np.float16, 6)
    cases: list[tuple[tuple[Array, Array], dict[str, Any]]] = [((k, v), {"profile": name}) for name in CPU_PROFILES]
    cases += [
        (odd, {"profile": "kvs2"}),
        ((k, v), {"profile": "kvs2", "max_relative_error": 0.01}),
        ((k, v), {"profile": "kvs2", "bits_per_entry": 2.5, "fixed_size": True}),
    ]
    before = objects(gpu)
    for layer, options in cases:
        (mine,) = on_gpu.compress([layer], **options)
        (theirs,) = client.compress([layer], **options)
        assert mine.shard == theirs.shard, options
        (a,), (b,) = on_gpu.decompress([mine.shard]), client.decompress([mine.shard])
        close(a.k, b.k)
        close(given(a.v), given(b.v))
    after = objects(gpu)
    assert after["Compress", "cpu"] - before["Compress", "cpu"] == len(cases)
    assert after["Compress", "cuda"] == before["Compress", "cuda"]


def test_not_finite_blocks_are_kept_bit_by_bit(on_gpu: Client, namespace: str) -> None:
    k, v = made(256, 2, 64, np.float16, 7)
    k[200, 1, 3] = np.nan
    v[10, 0, 0] = np.inf
    (result,) = on_gpu.put(namespace, b"0", [(k, v)], profile="kvs2")
    assert (result.stats.k.raw_blocks, given(result.stats.v).raw_blocks) == (1, 1)
    (item,) = on_gpu.get(namespace, b"0")
    assert item.k[128:, 1].tobytes() == k[128:, 1].tobytes()
    assert given(item.v)[:128, 0].tobytes() == v[:128, 0].tobytes()


def test_many_clients_get_their_own(gpu: Daemon, namespace: str) -> None:
    """Clients at once, objects of many sizes: each gets what one alone would get, twice the same bytes."""

    def work(number: int) -> None:
        with gpu.client() as mine:
            for turn in range(6):
                layers = [made(64 + 97 * ((number + turn) % 5), 4, 64, np.float16, 100 * number + turn)]
                key = b"%d.%d" % (number, turn)
                (result,) = mine.put(namespace, key, layers, profile="kvs3")
                (again,) = mine.put(namespace, key, layers, profile="kvs3")
                assert not result.already_present
                assert again.already_present  # the same tensors have the same bytes
                (item,) = mine.get(namespace, key)
                assert relative_error(item.k, layers[0][0]) < 0.05
                assert relative_error(given(item.v), layers[0][1]) < 0.05

    with ThreadPoolExecutor(12) as threads:
        list(threads.map(work, range(12)))


def test_little_device_memory_is_waited_for_or_done_without(start_daemon: Any) -> None:
    running = start_daemon(backend="cuda", device_bytes="2MiB")
    small, large = made(128, 2, 64, np.float16, 8), made(4096, 8, 64, np.float16, 9)

    def work(number: int) -> None:
        with running.client() as mine:
            for layer in (small, large) if number % 2 else (small, small):
                (shard,) = mine.compress([layer], profile="kvs3")
                (item,) = mine.decompress([shard.shard])
                assert relative_error(item.k, layer[0]) < 0.05

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    counts = objects(running)
    assert counts["Compress", "cuda"] == 12
    assert counts["Compress", "cpu"] == 4
    assert running.stop() == 0
