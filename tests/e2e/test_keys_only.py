"""Layers without V: an MLA layer as two traces, the latent (kvs2) and the shared rotary keys (fp8)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from decode_kvs import decode_bytes, describe_bytes
from kvshrink import Client, FailedPrecondition
from support import Array, Daemon, load_trace, relative_error, run_cli, run_json

TOKENS, QUERIES, Q_HEADS = 300, 4, 8
PARTS = {"latent": (512, "kvs2"), "rotary": (64, "fp8")}
OF_VALUES = ("bits_per_entry_v", "rel_mse_v", "mean_rank_v", "attention_rel_error")


def make_trace(path: Path, head_dim: int) -> dict[str, Array]:
    """Two layers of one head: eight shared directions and noise."""
    rng = np.random.default_rng(head_dim)
    tensors: dict[str, Array] = {}
    for layer in (0, 4):
        shared = rng.standard_normal((TOKENS, 8)) @ rng.standard_normal((8, head_dim))
        k = shared + 0.3 * rng.standard_normal((TOKENS, head_dim))
        tensors[f"layer.{layer}.k"] = k[:, None].astype(np.float16)
        tensors[f"layer.{layer}.q"] = (rng.standard_normal((QUERIES, Q_HEADS, head_dim)) / 8).astype(np.float16)
    save_file(tensors, path)
    return tensors


def logits(trace: dict[str, Array], k: Array, layer: int) -> Any:
    q = trace[f"layer.{layer}.q"].astype(np.float64)
    return np.einsum("qhd,td->qht", q, k[:, 0].astype(np.float64)) / np.sqrt(q.shape[2])


@pytest.mark.parametrize("part", PARTS)
def test_files_and_eval(part: str, tmp_path: Path) -> None:
    head_dim, profile = PARTS[part]
    trace = make_trace(tmp_path / "in.safetensors", head_dim)
    encoded = run_json("encode", tmp_path / "in.safetensors", tmp_path / "a.kvs", "--profile", profile)
    assert encoded["rel_mse_v"] is None
    decoded, _ = decode_bytes((tmp_path / "a.kvs").read_bytes())
    assert sorted(decoded) == ["layer.0.k", "layer.4.k"]
    run_cli("decode", tmp_path / "a.kvs", tmp_path / "out.safetensors", "--dtype", "fp32")
    for name, array in load_trace(tmp_path / "out.safetensors").items():
        np.testing.assert_allclose(array, decoded[name], atol=1e-4)
    shards = describe_bytes((tmp_path / "a.kvs").read_bytes(), False)["shards"]
    assert all(shard["keys_only"] for shard in shards)
    assert encoded["bits_per_entry"] == pytest.approx(8 * sum(s["bytes"] for s in shards) / (2 * TOKENS * head_dim))
    inspected = run_json("inspect", tmp_path / "a.kvs")
    assert all(s["keys_only"] and s["mean_rank_v"] is None for s in inspected["shards"])
    run_cli("verify", tmp_path / "a.kvs")

    (found,) = run_json("eval", tmp_path / "in.safetensors", "--profile", profile)["profiles"]
    assert [found[name] for name in OF_VALUES] == [None] * len(OF_VALUES)
    assert found["bits_per_entry_k"] == found["bits_per_entry"] == pytest.approx(encoded["bits_per_entry"])
    squares = [
        np.mean((logits(trace, decoded[f"layer.{i}.k"], i) - logits(trace, trace[f"layer.{i}.k"], i)) ** 2)
        for i in (0, 4)
    ]
    assert found["logit_rmse"] == pytest.approx(np.sqrt(np.mean(squares)), rel=2e-3)
    assert found["attention_kl"] > 0
    assert "-" in run_cli("eval", tmp_path / "in.safetensors", "--profile", profile).stdout.splitlines()[-1].split()


@pytest.mark.parametrize("encode_at", ["client", "server"])
def test_daemon_and_command(daemon: Daemon, namespace: str, encode_at: str, tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "in.safetensors", 512)
    common = ["--server", daemon.target, "--namespace", namespace, "--prefix", "p"]
    put = run_json("put", tmp_path / "in.safetensors", *common, "--encode-at", encode_at)
    assert put["rel_mse_v"] is None
    assert put["raw_bytes"] == 2 * 2 * TOKENS * 512
    for form in ("shard", "decoded", "low-rank"):
        out = tmp_path / f"{form}.safetensors"
        got = run_json("get", *common, "--form", form, "--out", out, "--trace", tmp_path / "in.safetensors")
        assert got["rel_mse_v"] is None
        assert got["rel_mse_k"] < (1 if form == "low-rank" else 0.1)
        assert sorted(load_trace(out)) == ["layer.0.k", "layer.4.k"]
    run_cli("get", *common, "--out", tmp_path / "got.kvs")
    run_cli("verify", tmp_path / "got.kvs")
    scores = run_json("attend", tmp_path / "in.safetensors", *common, "--mode", "scores")
    (found,) = run_json("eval", tmp_path / "in.safetensors", "--profile", "kvs2")["profiles"]
    assert 0 < scores["logit_rmse"] < 2 * found["logit_rmse"]
    refused = run_cli("attend", tmp_path / "in.safetensors", *common, code=1)
    assert "keys only" in refused.stderr
    assert trace["layer.0.k"].shape == (TOKENS, 1, 512)


def test_python_client(client: Client, namespace: str, tmp_path: Path) -> None:
    """A model's MLA layers: two chunks under two keys, both without values."""
    for part, (head_dim, profile) in PARTS.items():
        trace = make_trace(tmp_path / f"{part}.safetensors", head_dim)
        layers = [(trace[f"layer.{i}.k"], None) for i in (0, 4)]
        results = client.put(namespace, part.encode(), layers, profile=profile)
        assert all(result.stats.v is None for result in results)
        for item, (k, _) in zip(client.get(namespace, part.encode()), layers, strict=True):
            assert item.v is None
            assert item.info is not None
            assert item.info.keys_only
            assert relative_error(item.k, k) < 0.1
        (compressed,) = client.compress(layers[:1], profile=profile)
        (back,) = client.decompress([compressed.shard])
        assert back.v is None
        q = trace["layer.4.q"].astype(np.float32)
        scores = client.attend(namespace, part.encode(), 1, q, mode="scores")
        stored = next(iter(client.get(namespace, part.encode(), layers=[1], dtype="fp32"))).k
        np.testing.assert_allclose(scores.logits, logits(trace, stored, 4), atol=2e-3)
        with pytest.raises(FailedPrecondition, match="keys only"):
            client.attend(namespace, part.encode(), 1, q)
