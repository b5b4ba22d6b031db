"""Attention on the compressed form against exact attention over what the same shards decode to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import kvshrink
from kvshrink import Client
from support import Array, attention, chunk_of, layers_of

# Single-precision sums over 400 tokens and 64 channels: a few times 1e-6 of the largest value. A decoder that differed
# by one level of one entry would show at 1e-3.
TOLERANCE = 2e-5


@pytest.fixture(params=["raw", "fp8", "tq2", "eoptshrinkq2", "kvs2", "kvs4", "kvs2 rope", "kvs2t"])
def stored(request: Any, client: Client, qwen: dict[str, Array], namespace: str) -> Any:
    """Two chunks of 200 tokens; the namespace, keys, and K, V and Q of one layer as decoded."""
    layers = layers_of(qwen)[:2]
    keys = [b"0", b"1"]
    for i, key in enumerate(keys):
        chunk = chunk_of(qwen, 200 * i, 200, layers)
        profile, rope = request.param.split(" ")[0], kvshrink.Rope(1e6) if "rope" in request.param else None
        client.put(namespace, key, chunk, profile=profile, first_token=200 * i, rope=rope)
    decoded = [next(client.get(namespace, key, layers=[1], dtype="fp32")) for key in keys]
    k = np.concatenate([d.k for d in decoded])
    v = np.concatenate([d.v for d in decoded])
    q = qwen[f"layer.{layers[1]}.q"][:17].astype(np.float32)
    return keys, k, v, q


def close(got: Array, wanted: Array) -> None:
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(np.isfinite(got), finite)
    np.testing.assert_allclose(got[finite], wanted[finite], rtol=0, atol=TOLERANCE * np.abs(wanted[finite]).max())


CASES: list[dict[str, Any]] = [
    {"first_query": None},
    {"first_query": 383},
    {"first_query": 390, "window": 64},
    {"first_query": 100},
    {"first_query": None, "softcap": 15.0},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output(client: Client, namespace: str, stored: Any, case: dict[str, Any]) -> None:
    keys, k, v, q = stored
    got = client.attend(namespace, keys, 1, q, **case)
    output, lse, _ = attention(q, k, v, **case)
    assert got.tokens == 400
    close(got.output, output)
    close(got.lse, lse)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores(client: Client, namespace: str, stored: Any, case: dict[str, Any]) -> None:
    keys, k, v, q = stored
    logits = attention(q, k, v, **case)[2]
    close(client.attend(namespace, keys, 1, q, mode="scores", **case).logits, logits)


def test_top_k_is_the_head_of_the_sorted_scores(client: Client, namespace: str, stored: Any) -> None:
    keys, _, _, q = stored
    scores = client.attend(namespace, keys, 1, q, mode="scores").logits
    top = client.attend(namespace, keys, 1, q, mode="scores", top_k=10)
    assert top.indices is not None
    assert top.indices.dtype == np.uint32
    np.testing.assert_array_equal(top.logits, -np.sort(-scores, axis=2)[..., :10])
    np.testing.assert_array_equal(np.take_along_axis(scores, top.indices.astype(np.int64), 2), top.logits)
    everything = client.attend(namespace, keys, 1, q, mode="scores", top_k=1000)
    assert everything.logits.shape[2] == 400


def test_partial_outputs_merge_exactly(client: Client, namespace: str, stored: Any) -> None:
    keys, _, _, q = stored
    both = client.attend(namespace, keys, 1, q)
    parts = [client.attend(namespace, key, 1, q) for key in keys]
    lse = np.logaddexp(parts[0].lse, parts[1].lse)
    merged = sum(p.output * np.exp(p.lse - lse)[..., None] for p in parts)
    close(both.output, np.asarray(merged))
    close(both.lse, lse)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_query_dtypes(client: Client, namespace: str, stored: Any, dtype: Any) -> None:
    keys, k, v, q = stored
    q = q.astype(np.float16).astype(dtype)
    close(client.attend(namespace, keys, 1, q).output, attention(q, k, v, None)[0])


def test_what_does_not_fit_is_named(client: Client, namespace: str, qwen: dict[str, Array]) -> None:
    client.put(namespace, b"0", chunk_of(qwen, 0, 64)[:1], profile="kvs2")
    q = np.ones((2, 14, 64), np.float32)
    with pytest.raises(kvshrink.InvalidArgument, match="head_dim"):
        client.attend(namespace, b"0", 0, np.ones((2, 14, 32), np.float32))
    with pytest.raises(kvshrink.InvalidArgument, match="q_heads"):
        client.attend(namespace, b"0", 0, np.ones((2, 13, 64), np.float32))
    with pytest.raises(kvshrink.InvalidArgument, match="window"):
        client.attend(namespace, b"0", 0, q, window=8)
    with pytest.raises(kvshrink.InvalidArgument, match="layer"):
        client.attend(namespace, b"0", 4096, q)
    with pytest.raises(kvshrink.NotFound):
        client.attend(namespace, b"none", 0, q)
    with pytest.raises(kvshrink.KVShrinkError):
        client.attend(namespace, b"0", 7, q)
