"""The command line: its numbers computed a second time, its JSON, its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from decode_kvs import decode_bytes, describe_bytes
from errors import Attention, Errors
from support import TRACES, Array, Daemon, layers_of, load_trace, run_cli, run_json

EVAL_FIELDS = {
    *("profile", "options", "bits_per_entry", "bits_per_entry_k", "bits_per_entry_v", "rel_mse_k", "rel_mse_v"),
    *("logit_rmse", "attention_rel_error", "attention_kl", "max_block_rel_error", "raw_blocks"),
    *("mean_rank_k", "mean_rank_v", "encode_mb_per_s", "decode_mb_per_s"),
}


def errors_of(trace: dict[str, Array], decoded: dict[str, Array]) -> dict[str, float]:
    """The quality figures of `eval`, in double, from the trace and what the Python decoder makes of its file."""
    sums = Errors()
    for layer in layers_of(trace):
        k, v, q = (trace[f"layer.{layer}.{kind}"] for kind in "kvq")
        exact = Attention(q, k, v, k.shape[2] ** -0.5)
        sums.add(exact.compare(decoded[f"layer.{layer}.k"], decoded[f"layer.{layer}.v"]))
    return sums.figures()


ROPE = ("--rope", "theta=1e5,dim=64,pairing=neox")  # SmolLM2's; any other is as good for what is tested here


@pytest.mark.parametrize(
    ("profile", "rope"), [("kvs2", ()), ("eoptshrinkq2", ()), ("tq3", ()), ("kvs3", ROPE), ("tq2", ROPE)]
)
@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_eval_is_honest(path: Path, profile: str, rope: tuple[str, ...], tmp_path: Path) -> None:
    """Every figure again: bits from the bytes of the shards, errors by the second decoder and numpy."""
    answer = run_json("eval", path, "--profile", profile, *rope)
    (figures,) = answer["profiles"]
    assert set(figures) >= EVAL_FIELDS
    assert figures["options"]["rope"] == (rope[1] if rope else "none")
    run_cli("encode", path, tmp_path / "out.kvs", "--profile", profile, *rope)
    data = (tmp_path / "out.kvs").read_bytes()
    trace = load_trace(path)
    decoded, _ = decode_bytes(data)
    entries = sum(trace[f"layer.{i}.{kind}"].size for i in layers_of(trace) for kind in "kv")
    shard_bytes = sum(shard["bytes"] for shard in describe_bytes(data, False)["shards"])
    assert figures["bits_per_entry"] == pytest.approx(8 * shard_bytes / entries)
    halves = (figures["bits_per_entry_k"] + figures["bits_per_entry_v"]) / 2
    assert halves == pytest.approx(figures["bits_per_entry"])
    for name, wanted in errors_of(trace, decoded).items():
        assert figures[name] == pytest.approx(wanted, rel=2e-3), name
    assert figures["encode_mb_per_s"] > 0
    assert figures["decode_mb_per_s"] > 0


@pytest.mark.parametrize("encode_at", ["client", "server"])
def test_rope_over_the_daemon(daemon: Daemon, namespace: str, encode_at: str, tmp_path: Path) -> None:
    """What is put with a rope comes back embedded, and attention agrees with it; the error is that of eval."""
    common = ["--server", daemon.target, "--namespace", namespace, "--prefix", "p"]
    put = run_json("put", TRACES[0], *common, "--profile", "kvs3", "--encode-at", encode_at, *ROPE)
    assert put["rope"] == ROPE[1]
    (plain, with_rope) = (run_json("eval", TRACES[0], "--profile", "kvs3", *rope)["profiles"][0] for rope in ((), ROPE))
    assert with_rope["rel_mse_k"] < 0.7 * plain["rel_mse_k"]
    got = run_json("get", *common, "--out", tmp_path / "out.kvs", "--trace", TRACES[0])
    assert got["rel_mse_k"] == pytest.approx(with_rope["rel_mse_k"], rel=1e-2)
    assert {s["rope"]["theta"] for s in describe_bytes((tmp_path / "out.kvs").read_bytes(), False)["shards"]} == {1e5}
    output = run_json("attend", TRACES[0], *common)
    assert output["attention_rel_error"] == pytest.approx(with_rope["attention_rel_error"], rel=1e-2)


def test_eval_keeps_the_order_asked() -> None:
    answer = run_json("eval", TRACES[0], "--profile", "tq2,raw,kvs3")
    assert [figures["profile"] for figures in answer["profiles"]] == ["tq2", "raw", "kvs3"]
    raw = answer["profiles"][1]
    assert raw["rel_mse_k"] == raw["rel_mse_v"] == raw["attention_rel_error"] == 0
    assert (answer["tokens"], answer["head_dim"], answer["layers"], answer["backend"]) == (512, 64, 6, "cpu")


def test_rate_target_is_kept_and_beats_the_fixed_rate() -> None:
    """At the bits of kvs3, shared out over the blocks of a shard: no more of them, and less error."""
    (fixed,) = run_json("eval", TRACES[1], "--profile", "kvs3")["profiles"]
    bits = fixed["bits_per_entry"]
    (target,) = run_json("eval", TRACES[1], "--profile", "kvs3", "--bits", f"{bits:.4f}")["profiles"]
    assert bits - 0.05 < target["bits_per_entry"] <= round(bits, 4)
    assert target["attention_rel_error"] < 0.95 * fixed["attention_rel_error"]
    assert target["options"]["bits_per_entry"] == round(bits, 4)


def test_slots_are_equal_here_and_over_the_daemon(daemon: Daemon, namespace: str, tmp_path: Path) -> None:
    common = ("--bits", "2.6", "--fixed-size")
    run_cli("encode", TRACES[0], tmp_path / "slots.kvs", *common)
    shards = describe_bytes((tmp_path / "slots.kvs").read_bytes(), False)["shards"]
    assert {shard["bytes"] for shard in shards} == {256 * 3 * 64 * 2 * 26 // 80 // 4 * 4}
    put = run_json("put", TRACES[0], "--namespace", namespace, "--prefix", "p", "--server", daemon.target, *common)
    assert put["encoded_bytes"] == sum(shard["bytes"] for shard in shards)
    message = run_cli("encode", TRACES[0], tmp_path / "no.kvs", "--bits", "1.2", code=1).stderr
    assert "'bits_per_entry' is 1.2" in message
    assert "at least" in message


def test_attend_over_the_daemon_is_what_eval_says(daemon: Daemon, namespace: str) -> None:
    common = ["--server", daemon.target, "--namespace", namespace, "--prefix", "p"]
    run_json("put", TRACES[0], *common, "--profile", "kvs3")
    (figures,) = run_json("eval", TRACES[0], "--profile", "kvs3")["profiles"]
    output = run_json("attend", TRACES[0], *common)
    assert output["attention_rel_error"] == pytest.approx(figures["attention_rel_error"], rel=1e-2)
    scores = run_json("attend", TRACES[0], *common, "--mode", "scores")
    assert scores["logit_rmse"] == pytest.approx(figures["logit_rmse"], rel=1e-2)
    top = run_json("attend", TRACES[0], *common, "--mode", "scores", "--top-k", 8, "--layer", 6)
    assert [layer["layer"] for layer in top["layers"]] == [6]
    assert top["wire_bytes"] < scores["wire_bytes"] / 6


def test_chunk_commands_tell_what_is_there(daemon: Daemon, namespace: str, tmp_path: Path) -> None:
    common = ["--server", daemon.target, "--namespace", namespace, "--prefix", "p"]
    put = run_json("put", TRACES[1], *common, "--profile", "kvs2")
    assert put["wire_bytes"] < put["raw_bytes"] / 5
    again = run_json("put", TRACES[1], *common, "--profile", "kvs2")
    assert again["already_present"] == put["shards"]
    assert run_json("lookup", *common)["present"] == 2
    stat = run_json("stat", *common)["chunks"]
    listed = run_json("ls", "--server", daemon.target, "--namespace", namespace)["chunks"]
    assert [chunk["key"] for chunk in listed] == [chunk["key"] for chunk in stat] == ["p/0", "p/1"]
    assert sum(chunk["bytes"] for chunk in stat) == put["encoded_bytes"]
    assert run_json("info", "--server", daemon.target)["chunks"] >= 2
    assert run_json("delete", *common)["deleted"] == 2
    assert "p" in run_cli("get", *common, "--out", tmp_path / "gone.kvs", code=1).stderr


FAILURES: list[tuple[int, list[str]]] = [
    (2, []),
    (2, ["no-such-command"]),
    (2, ["encode"]),
    (2, ["encode", str(TRACES[0]), "out.kvs", "--profile", "kvs9"]),
    (2, ["put", str(TRACES[0])]),
    (1, ["encode", "no-such-file", "out.kvs"]),
    (1, ["decode", str(TRACES[0]), "out.safetensors"]),
    (1, ["verify", str(TRACES[0])]),
    (1, ["info", "--server", "127.0.0.1:1", "--timeout-ms", "2000"]),
]


@pytest.mark.parametrize(("code", "arguments"), FAILURES, ids=lambda value: str(value)[-40:])
def test_failures_have_their_exit_code(
    code: int, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run_cli(*arguments, code=code)
    assert result.stderr or result.stdout  # verify tells what it found on stdout
    assert list(tmp_path.iterdir()) == []


def test_json_is_one_object_and_nothing_else(tmp_path: Path) -> None:
    for command in (
        ["encode", TRACES[0], tmp_path / "a.kvs"],
        ["inspect", tmp_path / "a.kvs"],
        ["verify", tmp_path / "a.kvs"],
    ):
        answer: Any = json.loads(run_cli(*command, "--json").stdout)
        assert isinstance(answer, dict)
