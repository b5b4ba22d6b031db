"""Real traces through the real daemon: what comes back is what the codec promises, bit by bit where it promises so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import kvshrink
from decode_kvs import decode_shard
from kvshrink import Client
from support import TRACES, Array, chunk_of, given, layers_of, load_trace, relative_error, run_cli, run_json

# Relative errors that a profile must stay below on K and V of these traces, sinks kept; about twice what is measured.
BOUNDS = {"raw": 0.0, "fp8": 0.002, "tq4": 0.03, "eoptshrinkq2": 0.2}
BOUNDS |= {"kvs2": 0.3, "kvs3": 0.1, "kvs4": 0.03, "kvs2t": 0.25, "kvs3t": 0.06}


def same_bits(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# kvs2c needs a basis: test_calibrate.py.
@pytest.mark.parametrize("profile", [p for p in kvshrink.PROFILES if p != "kvs2c"])
def test_put_and_get(client: Client, smollm2: dict[str, Array], namespace: str, profile: str) -> None:
    layers = chunk_of(smollm2, 0, 256)
    results = client.put(namespace, b"0", layers, profile=profile)
    assert [r.layer for r in results] == list(range(len(layers)))
    fetched = list(client.get(namespace, b"0"))
    assert [f.layer for f in fetched] == list(range(len(layers)))
    for item, result, (k, v) in zip(fetched, results, layers, strict=True):
        assert item.k.shape == k.shape
        assert item.k.dtype == k.dtype  # the original's by default
        assert same_bits(item.k[:1], k[:1])  # the first token of a sequence is kept exactly
        for got, wanted, stats in ((item.k, k, result.stats.k), (given(item.v), v, given(result.stats.v))):
            error = relative_error(got, wanted)
            assert error <= BOUNDS.get(profile, 0.3)
            # the answer's errors are of fp32 values; here they are rounded to fp16, and the sinks are part of the sums
            assert error == pytest.approx(stats.relative_error, rel=0.3, abs=1e-6)
    raw = sum(r.stats.raw_bytes for r in results)
    encoded = sum(r.stats.encoded_bytes for r in results)
    assert raw == sum(k.nbytes + v.nbytes for k, v in layers)
    if profile != "raw":
        assert encoded < raw * 0.6
    entries = raw / 2
    assert 8 * encoded / entries == pytest.approx(np.mean([r.stats.bits_per_entry for r in results]))


@pytest.mark.parametrize("profile", ["fp8", "tq3", "eoptshrinkq2", "kvs2", "kvs4", "kvs2t"])
def test_shards_decode_alike_everywhere(
    client: Client, smollm2: dict[str, Array], namespace: str, profile: str, tmp_path: Path
) -> None:
    """The daemon's tensors, the command line's of the same shard, and the second decoder's."""
    layers = chunk_of(smollm2, 256, 256)[:2]
    client.put(namespace, b"0", layers, profile=profile, first_token=256)
    shards = list(client.get(namespace, b"0", form="shard"))
    tensors = list(client.get(namespace, b"0", dtype="fp32"))
    for shard, tensor in zip(shards, tensors, strict=True):
        assert shard.shard is not None
        assert shard.info is not None
        assert len(shard.shard) == shard.info.bytes
        (tmp_path / "one.kvs").write_bytes(shard.shard)
        run_cli("decode", tmp_path / "one.kvs", tmp_path / "one.safetensors", "--dtype", "fp32")
        by_cli = load_trace(tmp_path / "one.safetensors")
        assert same_bits(by_cli[f"layer.{shard.layer}.k"], tensor.k)
        assert same_bits(by_cli[f"layer.{shard.layer}.v"], given(tensor.v))
        second = decode_shard(shard.shard)
        np.testing.assert_allclose(second.k, tensor.k, atol=1e-5 * np.abs(tensor.k).max(), rtol=0)
        np.testing.assert_allclose(given(second.v), given(tensor.v), atol=1e-5 * np.abs(given(tensor.v)).max(), rtol=0)
        (stateless,) = client.decompress([shard.shard], dtype="fp32")
        assert same_bits(stateless.k, tensor.k)
        assert stateless.info == shard.info


def test_compress_is_what_put_stores(client: Client, smollm2: dict[str, Array], namespace: str) -> None:
    layers = chunk_of(smollm2, 0, 200)
    compressed = client.compress(layers, profile="kvs3")
    client.put(namespace, b"0", layers, profile="kvs3")
    stored = list(client.get(namespace, b"0", form="shard"))
    assert [c.shard for c in compressed] == [s.shard for s in stored]
    again = client.put_shards(namespace, b"0", [c.shard for c in compressed])
    assert all(r.already_present for r in again)


def test_low_rank_is_a_prefix_of_the_shard(client: Client, smollm2: dict[str, Array], namespace: str) -> None:
    layers = chunk_of(smollm2, 0, 256)
    client.put(namespace, b"0", layers, profile="kvs2")
    whole = list(client.get(namespace, b"0", form="shard"))
    previews = list(client.get(namespace, b"0", form="low_rank"))
    for shard, preview in zip(whole, previews, strict=True):
        assert shard.shard is not None
        assert preview.shard is not None
        assert shard.shard.startswith(preview.shard)
        assert len(preview.shard) < len(shard.shard) / 2
        (tensors,) = client.decompress([preview.shard], dtype="fp32", low_rank=True)
        second = decode_shard(preview.shard, low_rank=True)
        np.testing.assert_allclose(second.k, tensors.k, atol=1e-5 * np.abs(tensors.k).max(), rtol=0)
    with pytest.raises(kvshrink.InvalidArgument, match="size"):
        client.decompress([previews[0].shard or b""])


def test_selection_of_layers_and_heads(client: Client, smollm2: dict[str, Array], namespace: str) -> None:
    client.put(namespace, b"0", chunk_of(smollm2, 0, 130), profile="kvs3")
    everything = list(client.get(namespace, b"0"))
    chosen = list(client.get(namespace, b"0", layers=[1, 4], kv_heads=[0, 2]))
    assert [c.layer for c in chosen] == [1, 4]
    for item in chosen:
        assert same_bits(item.k, np.ascontiguousarray(everything[item.layer].k[:, [0, 2]]))
        assert same_bits(given(item.v), np.ascontiguousarray(given(everything[item.layer].v)[:, [0, 2]]))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize("layout", ["THD", "HTD", "BNHD", "BHND"])
def test_layouts_and_dtypes_are_the_same_values(
    client: Client, smollm2: dict[str, Array], namespace: str, dtype: Any, layout: str
) -> None:
    """Every layout of the same values gives the same shard; profile raw gives them back bit by bit."""
    plain = [(k.astype(dtype), v.astype(dtype)) for k, v in chunk_of(smollm2, 0, 70)[:1]]

    def laid(x: Array) -> Array:
        if layout == "THD":
            return x
        if layout == "HTD":
            return np.ascontiguousarray(x.transpose(1, 0, 2))
        pages = np.zeros((5, 16, *x.shape[1:]), x.dtype)
        pages.reshape(80, *x.shape[1:])[:70] = x
        return pages if layout == "BNHD" else np.ascontiguousarray(pages.transpose(0, 2, 1, 3))

    tokens = 70 if layout.startswith("B") else None
    given: Any = [(laid(k), laid(v)) for k, v in plain]
    for profile in ("raw", "kvs2"):
        (wanted,) = client.compress(plain, profile=profile)
        (shard,) = client.compress(given, profile=profile, layout=layout, tokens=tokens)  # type: ignore[arg-type]
        assert shard.shard == wanted.shard
    client.put(namespace, b"0", given, profile="raw", layout=layout, tokens=tokens)  # type: ignore[arg-type]
    for answer_layout in ("THD", "HTD"):
        (item,) = client.get(namespace, b"0", layout=answer_layout)
        k = item.k if answer_layout == "THD" else item.k.transpose(1, 0, 2)
        assert k.tobytes() == plain[0][0].tobytes()


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256, 1, 33, 512])
def test_head_dims(client: Client, namespace: str, head_dim: int) -> None:
    rng = np.random.default_rng(head_dim)
    k = (rng.standard_normal((40, 3)) @ rng.standard_normal((3, 2 * head_dim))).reshape(40, 2, head_dim)
    k = (k + 0.1 * rng.standard_normal(k.shape)).astype(np.float16)
    client.put(namespace, b"0", [(k, -k)], profile="kvs3", raw_tokens=0)
    (item,) = client.get(namespace, b"0")
    assert relative_error(item.k, k) < 0.1
    (shard,) = client.get(namespace, b"0", form="shard")
    assert shard.shard is not None
    second = decode_shard(shard.shard)
    np.testing.assert_allclose(second.k.astype(np.float16), item.k, atol=2e-3 * np.abs(k).max(), rtol=0)


def test_not_finite_blocks_are_kept_bit_by_bit(client: Client, smollm2: dict[str, Array], namespace: str) -> None:
    k, v = (x.copy() for x in chunk_of(smollm2, 0, 256)[0])
    k[200, 1, 3] = np.nan
    v[10, 0, 0] = np.inf
    (result,) = client.put(namespace, b"0", [(k, v)], profile="kvs2")
    assert (result.stats.k.raw_blocks, given(result.stats.v).raw_blocks) == (1, 1)
    (item,) = client.get(namespace, b"0")
    assert same_bits(np.ascontiguousarray(item.k[128:, 1]), np.ascontiguousarray(k[128:, 1]))
    assert same_bits(np.ascontiguousarray(given(item.v)[:128, 0]), np.ascontiguousarray(v[:128, 0]))
    assert not same_bits(np.ascontiguousarray(item.k[128:, 0]), np.ascontiguousarray(k[128:, 0]))


def test_error_bound_escalates_then_keeps_raw(client: Client, smollm2: dict[str, Array], namespace: str) -> None:
    layers = chunk_of(smollm2, 0, 256)[:2]
    for bound in (0.02, 1e-7):
        key = str(bound).encode()
        results = client.put(namespace, key, layers, profile="kvs2", max_relative_error=bound)
        for r in results:
            for stats in (r.stats.k, given(r.stats.v)):
                assert stats.max_block_relative_error <= bound
                assert stats.escalated_blocks > 0 or stats.raw_blocks > 0
        if bound < 1e-6:
            for item, (k, v) in zip(client.get(namespace, key), layers, strict=True):
                assert relative_error(item.k, k) <= bound
                assert relative_error(given(item.v), v) <= bound


@pytest.mark.parametrize("encode_at", ["client", "server"])
def test_error_bound_and_raw_layers_of_put(daemon: Any, namespace: str, encode_at: str) -> None:
    """More bits, then raw blocks, both counted; boundary layers are raw by choice. Client and server alike."""
    common = ["--server", daemon.target, "--namespace", namespace, "--encode-at", encode_at]
    plain, more, exact, kept = (
        run_json("put", TRACES[0], *common, "--prefix", str(i), *options)
        for i, options in enumerate(
            ([], ["--max-relative-error", "0.05"], ["--max-relative-error", "1e-9"], ["--raw-layers", "1"])
        )
    )
    assert (plain["escalated_blocks"], plain["raw_blocks"]) == (0, 0)
    assert (more["escalated_blocks"] > 0, more["raw_blocks"]) == (True, 0)
    assert more["rel_mse_v"] < 0.05 < plain["rel_mse_v"]
    assert (exact["escalated_blocks"], exact["raw_blocks"]) == (0, 144)
    assert (exact["rel_mse_k"], exact["rel_mse_v"]) == (0, 0)
    assert kept["raw_blocks"] == 144 // 3  # two of six layers
    assert plain["bits_per_entry"] < more["bits_per_entry"] < kept["bits_per_entry"] < exact["bits_per_entry"]


@pytest.mark.parametrize("trace", TRACES, ids=lambda path: path.stem)
@pytest.mark.parametrize("profile", ["kvs2", "tq3"])
def test_command_line_round_trip(daemon: Any, namespace: str, trace: Path, profile: str, tmp_path: Path) -> None:
    """put, ls, lookup, get in two forms, delete; get's tensors are those that decode makes of got shards."""
    common = ["--server", daemon.target, "--namespace", namespace, "--prefix", "p"]
    run_json("put", trace, *common, "--profile", profile)
    assert run_json("lookup", *common) is not None
    run_json("ls", "--server", daemon.target, "--namespace", namespace)
    run_cli("get", *common, "--out", tmp_path / "got.safetensors", "--form", "decoded")
    run_cli("get", *common, "--out", tmp_path / "got.kvs", "--form", "shard")
    run_cli("verify", tmp_path / "got.kvs")
    run_cli("decode", tmp_path / "got.kvs", tmp_path / "decoded.safetensors")
    got, decoded = load_trace(tmp_path / "got.safetensors"), load_trace(tmp_path / "decoded.safetensors")
    original = load_trace(trace)
    assert layers_of(got) == layers_of(decoded)
    assert len(layers_of(got)) == len(layers_of(original))
    for mine, theirs in zip(layers_of(got), layers_of(original), strict=True):
        for kind in "kv":
            assert same_bits(got[f"layer.{mine}.{kind}"], decoded[f"layer.{mine}.{kind}"])
            assert relative_error(got[f"layer.{mine}.{kind}"], original[f"layer.{theirs}.{kind}"]) < 0.3
    with daemon.client() as client:
        keys = [info.key for info in client.list(namespace)]
        assert keys == [b"p/0", b"p/1"]
    run_cli("delete", *common)
    with daemon.client() as client:
        assert list(client.list(namespace)) == []
