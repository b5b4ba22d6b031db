"""Calibrated bases from the command line to the daemon: profile kvs2c."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import kvshrink
from decode_kvs import decode_bytes
from kvs_basis import read_basis
from support import BIN, TRACES, Array, Daemon, chunk_of, load_trace, run_cli, run_json, until
from test_cli import ROPE, errors_of

SMOL = TRACES[0]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """On the first half of the trace's queries: for keys as they are, before their embedding, and numbered by place."""
    folder = tmp_path_factory.mktemp("bases")
    for name, options in {"plain": (), "rope": ROPE, "places": ("--renumber",)}.items():
        run_cli("calibrate", SMOL, "--out", folder / f"{name}.kvb", "--queries", "first:64", *options)
    return {path.stem: path for path in folder.glob("*.kvb")}


@pytest.mark.parametrize(("name", "rope"), [("plain", ()), ("rope", ROPE)])
def test_eval_is_honest_and_attention_loses_less(
    bases: dict[str, Path], name: str, rope: tuple[str, ...], tmp_path: Path
) -> None:
    basis = ("--basis", bases[name])
    calibrated, plain = run_json("eval", SMOL, "--profile", "kvs2c,kvs2", *basis, *rope)["profiles"]
    assert calibrated["attention_kl"] < 0.5 * plain["attention_kl"]
    assert calibrated["attention_rel_error"] < 0.9 * plain["attention_rel_error"]
    encoded = run_json("encode", SMOL, tmp_path / "out.kvs", "--profile", "kvs2c", *basis, *rope)
    assert encoded["rel_mse_k"] == pytest.approx(calibrated["rel_mse_k"], rel=1e-2)
    data = (tmp_path / "out.kvs").read_bytes()
    decoded, _ = decode_bytes(data, basis=read_basis(bases[name].read_bytes()))
    for field, wanted in errors_of(load_trace(SMOL), decoded).items():
        assert calibrated[field] == pytest.approx(wanted, rel=2e-3), field
    run_cli("decode", tmp_path / "out.kvs", tmp_path / "out.safetensors", "--dtype", "fp32", *basis)
    for tensor, values in load_trace(tmp_path / "out.safetensors").items():
        np.testing.assert_allclose(values, decoded[tensor], atol=1e-4 * np.abs(values).max())


def test_files_name_their_basis(bases: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.kvs"
    run_cli("encode", SMOL, out, "--profile", "kvs2c", "--basis", bases["plain"])
    own, other = (read_basis(bases[name].read_bytes()).id.hex() for name in ("plain", "rope"))
    for given, matches in (((), None), (("--basis", bases["plain"]), True), (("--basis", bases["rope"]), False)):
        shards = run_json("inspect", out, *given)["shards"]
        assert {(shard["basis"], shard["basis_matches"]) for shard in shards} == {(own, matches)}
    assert run_json("verify", out)["ok"]
    refused = run_cli("decode", out, tmp_path / "out.safetensors", code=1).stderr
    assert f"field 'basis' is none: the shard was coded with basis {own} (FAILED_PRECONDITION)" in refused
    refused = run_cli("decode", out, tmp_path / "o.safetensors", "--basis", bases["rope"], code=1).stderr
    assert f"field 'basis' is {other}: the shard was coded with basis {own}" in refused
    refused = run_cli("encode", SMOL, tmp_path / "x.kvs", "--profile", "kvs2c", code=1).stderr
    assert "field 'basis' is none: profile kvs2c needs a calibrated one (INVALID_ARGUMENT)" in refused
    refused = run_cli("encode", SMOL, tmp_path / "x.kvs", "--profile", "kvs2c", "--basis", SMOL, code=1).stderr
    assert "field 'basis.magic'" in refused


def test_traces_that_disagree_are_refused(tmp_path: Path) -> None:
    refused = run_cli("calibrate", *TRACES[:2], "--out", tmp_path / "x.kvb", code=1).stderr
    assert f"{TRACES[1]}: field 'layer.0.kv_heads' is 2: the traces before have 3" in refused
    assert not (tmp_path / "x.kvb").exists()


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    traces = [SMOL] * 60
    whole = run_json("calibrate", *traces, "--out", tmp_path / "whole.kvb")
    assert whole["resumed_traces"] == 0
    out, partial = tmp_path / "out.kvb", tmp_path / "out.kvb.partial"
    command = [str(part) for part in (BIN / "kvshrink", "calibrate", *traces, "--out", out)]
    with subprocess.Popen(command) as process:
        until(partial.exists, 60, "the sums of the first trace")
        process.kill()
    assert not out.exists()
    resumed = run_json("calibrate", *traces, "--out", out, "--resume")
    assert 1 <= resumed["resumed_traces"] < len(traces)
    assert out.read_bytes() == (tmp_path / "whole.kvb").read_bytes()
    assert not partial.exists()


@pytest.mark.parametrize("encode_at", ["client", "server"])
def test_over_the_daemon(
    start_daemon: Callable[..., Daemon], bases: dict[str, Path], encode_at: str, tmp_path: Path
) -> None:
    """Coded, decoded and attended to by the daemon as by `eval`; a trace with gaps is numbered by place."""
    daemon = start_daemon(basis=bases["places"])
    common = ["--server", daemon.target, "--namespace", "model", "--prefix", "p"]
    basis = ("--basis", bases["places"])
    (info,) = run_json("info", "--server", daemon.target)["bases"]
    assert info["id"] == read_basis(bases["places"].read_bytes()).id.hex()
    assert info["layers"] == list(range(6))
    run_json("put", SMOL, *common, "--profile", "kvs2c", "--encode-at", encode_at, *basis)
    wanted = run_json("eval", SMOL, "--profile", "kvs2c", "--basis", bases["plain"])["profiles"][0]
    for form, given in (("decoded", ()), ("shard", basis)):
        out = tmp_path / f"{form}.safetensors"
        got = run_json("get", *common, "--form", form, "--out", out, "--trace", SMOL, *given)
        assert got["rel_mse_k"] == pytest.approx(wanted["rel_mse_k"], rel=1e-2)
    output = run_json("attend", SMOL, *common)
    assert output["attention_rel_error"] == pytest.approx(wanted["attention_rel_error"], rel=1e-2)


def test_python_passes_the_profile_alone(
    start_daemon: Callable[..., Daemon], bases: dict[str, Path], smollm2: dict[str, Array]
) -> None:
    chunk = chunk_of(smollm2, 0, 200)
    with start_daemon(basis=bases["places"]).client() as client:
        client.put("model", b"a", chunk, profile="kvs2c")
        (got,) = client.get("model", [b"a"], layers=[2])
        assert got.k.shape == chunk[2][0].shape
    with start_daemon().client() as client, pytest.raises(kvshrink.InvalidArgument, match="kvshrink calibrate"):
        client.put("model", b"a", chunk, profile="kvs2c")
