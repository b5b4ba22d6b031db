"""Calibrated bases in the Python decoder: the file, every check, and shards that need one."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from decode_kvs import FormatError, decode_bytes
from golden_cases import BASIS_FILE, DATA, hadamard_basis
from kvs_basis import HEADER, HEADER_BYTES, id_of, read_basis, write_basis

GOOD = (DATA / BASIS_FILE).read_bytes()
LAYER = HEADER_BYTES + len("hadamard") + 2
HEAD = LAYER + 8


def sealed(data: bytes) -> bytes:
    """With the id of its content."""
    return data[: HEADER.size] + id_of(data[: HEADER.size] + data[HEADER_BYTES:]) + data[HEADER_BYTES:]


def changed(at: int, value: bytes) -> bytes:
    return sealed(GOOD[:at] + value + GOOD[at + len(value) :])


def test_the_golden_basis_is_made_as_ever() -> None:
    assert hadamard_basis() == GOOD


def test_metric_and_inverse() -> None:
    basis = read_basis(GOOD)
    metrics = basis.layers[6]
    assert (basis.head_dim, basis.kv_heads, basis.model, basis.metadata) == (64, 1, "hadamard", "{}")
    np.testing.assert_allclose(metrics.weight[0] @ metrics.inverse[0], np.eye(64), atol=1e-12)
    vector = np.frombuffer(GOOD, "<f4", 64, HEAD + 4 * 64 * 4)  # the fourth
    (gain,) = struct.unpack_from("<f", GOOD, HEAD + 4 * 3)
    np.testing.assert_allclose(metrics.weight[0] @ vector, gain * vector, atol=1e-12)


NAN = struct.pack("<f", float("nan"))


@pytest.mark.parametrize(
    ("field", "data"),
    [
        ("size", GOOD[:47]),
        ("size", sealed(GOOD[:-4])),
        ("size", sealed(GOOD + b"1234")),
        ("magic", b"KVS1" + GOOD[4:]),
        ("version", changed(4, b"\2")),
        ("flags", changed(6, b"\1")),
        ("head_dim", changed(8, bytes(2))),
        ("kv_heads", changed(10, b"\1\1")),
        ("layers", changed(12, bytes(2))),
        ("model_bytes", changed(25, b"\1")),
        ("reserved", changed(26, b"\1")),
        ("metadata_bytes", changed(28, b"\1")),
        ("id", GOOD[:32] + b"\0" + GOOD[33:]),
        ("id", GOOD[:-1] + b"\0"),
        ("model", changed(HEADER_BYTES, b"\n")),
        ("layer[0].layer", changed(LAYER, b"\0\x10")),
        ("layer[0].size", changed(LAYER + 2, b"\x08")),
        ("layer[0].reserved", changed(LAYER + 4, b"\1")),
        ("layer[0].head[0].gain[0]", changed(HEAD, NAN)),
        ("layer[0].head[0].gain[1]", changed(HEAD + 4, bytes(4))),
        ("layer[0].head[0].vector[0]", changed(HEAD + 256, NAN)),
        ("layer[0].head[0].vector[1]", changed(HEAD + 512, GOOD[HEAD + 256 : HEAD + 512])),
    ],
)
def test_every_violation_names_its_field(field: str, data: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        read_basis(data)
    assert caught.value.field == f"basis.{field}"


def test_a_shard_needs_its_own_basis() -> None:
    data = (DATA / "kvs2c.kvs").read_bytes()
    with pytest.raises(FormatError, match="field 'basis' is none: the shard was coded with basis"):
        decode_bytes(data)
    gains, vectors = np.ones((1, 64), np.float32), np.eye(64, dtype=np.float32)[None]
    with pytest.raises(FormatError, match="the shard was coded with basis"):
        decode_bytes(data, basis=read_basis(write_basis({6: (gains, vectors)})))
