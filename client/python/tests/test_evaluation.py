"""`evaluate`: what goes into the trace, what is refused, and, with the program, that its figures arrive."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from kvshrink import FailedPrecondition, InvalidArgument, KVShrinkError, evaluate, evaluate_trace
from kvshrink.evaluation import ProfileEvaluation, find_binary
from kvshrink.trace_file import to_array, trace_arrays, write_trace

PROJECT = Path(__file__).resolve().parents[1]
BINARY = Path(os.environ.get("KVSHRINK_BIN_DIR", PROJECT.parents[1] / "build" / "dev" / "bin")) / "kvshrink"


def normal(*shape: int, seed: int = 0, dtype: Any = np.float16) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


class SpeaksArray:
    """A tensor of some library, known only by what it offers."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.array(self.array, dtype=dtype, copy=copy)


class SpeaksDlpack:
    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_dtypes_of_traces_are_kept(dtype: Any) -> None:
    array = normal(4, 2, 8, dtype=dtype)
    assert to_array(array, "x") is array or to_array(array, "x").dtype == array.dtype
    np.testing.assert_array_equal(to_array(array, "x"), array)


def test_other_tensors_become_arrays() -> None:
    array = normal(4, 2, 8)
    for tensor in (SpeaksArray(array), SpeaksDlpack(array), array.astype(">f2"), np.asfortranarray(array)):
        got = to_array(tensor, "x")
        assert got.dtype == np.dtype("<f2")
        np.testing.assert_array_equal(got, array)
    doubles = to_array(normal(4, 2, 8, dtype=np.float64), "x")
    assert doubles.dtype == np.float32
    bits = normal(4, 2, 8, dtype=ml_dtypes.bfloat16)
    np.testing.assert_array_equal(to_array(bits.view(np.uint16), "x"), bits)


def test_tensors_that_do_not_convert_are_named() -> None:
    """As torch refuses bfloat16 and tensors of a GPU."""

    class Refuses:
        def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
            raise TypeError("Got unsupported ScalarType BFloat16")

    with pytest.raises(InvalidArgument, match=r"'layers\[3\].v' doesn't convert .*BFloat16.*view\(torch.uint16\)"):
        evaluate({3: (KV, Refuses())})


def test_file_is_what_safetensors_reads(tmp_path: Path) -> None:
    k, v, q = normal(5, 2, 8), normal(5, 2, 8, seed=1).transpose(0, 1, 2)[:, ::-1], normal(3, 4, 8, dtype=np.float32)
    write_trace(tmp_path / "a.safetensors", trace_arrays({7: (k, v, q), 2: [k, v]}), {"scale": "0.5"})
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        assert file.metadata() == {"scale": "0.5"}
        names = {"layer.2.k": k, "layer.2.v": v, "layer.7.k": k, "layer.7.v": v, "layer.7.q": q}
        assert set(file.keys()) == set(names)
        for name, array in names.items():
            np.testing.assert_array_equal(file.get_tensor(name), array)


KV = normal(4, 2, 8)
BAD: list[tuple[str, Any]] = [
    (r"'layers' is dict of 0", {}),
    (r"'layers' is list", [(KV, KV)]),
    (r"'layers\[-1\]' has that key", {-1: (KV, KV)}),
    (r"'layers\[3\]' is a tuple", {3: (KV,)}),
    (r"'layers\[3\].k' is a list", {3: ([1.0], KV)}),
    (r"'layers\[3\].k' has dtype int64", {3: (KV.astype(np.int64), KV)}),
    (r"'layers\[3\].k' has shape \(8, 8\)", {3: (KV.reshape(8, 8), KV)}),
    (r"'layers\[3\].v' has shape \(3, 2, 8\): that of k is \(4, 2, 8\)", {3: (KV, KV[:3])}),
    (r"'layers\[3\].v' has dtype float32: that of k is float16", {3: (KV, KV.astype(np.float32))}),
    (r"'layers\[4\].k' has shape \(3, 2, 8\): the layers before have 4 tokens", {3: (KV, KV), 4: (KV[:3], KV[:3])}),
    (r"'layers\[3\].q' has shape \(4, 2, 4\): the head_dim of k is 8", {3: (KV, KV, KV[..., :4])}),
    (r"'layers\[3\].q' has shape \(4, 3, 8\): must have a multiple of 2 heads", {3: (KV, KV, normal(4, 3, 8))}),
    (r"'layers\[3\].q' has shape \(5, 2, 8\): there are 4 tokens", {3: (KV, KV, normal(5, 2, 8))}),
    (r"'layers\[3\].q' has shape \(0, 2, 8\)", {3: (KV, KV, KV[:0])}),
]


@pytest.mark.parametrize(("message", "layers"), BAD, ids=[message for message, _ in BAD])
def test_what_does_not_fit_is_named(message: str, layers: Any) -> None:
    with pytest.raises(InvalidArgument, match=message):
        evaluate(layers)


def test_program_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FailedPrecondition, match=r"argument 'binary' is .*nowhere"):
        evaluate({0: (KV, KV)}, binary=tmp_path / "nowhere")
    monkeypatch.setenv("KVSHRINK_BIN", str(tmp_path))
    with pytest.raises(FailedPrecondition, match="KVSHRINK_BIN"):
        find_binary()
    monkeypatch.delenv("KVSHRINK_BIN")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FailedPrecondition, match="PATH"):
        find_binary()
    program = tmp_path / "kvshrink"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert find_binary() == program


def test_figures_of_captured_tensors() -> None:
    layers = {3: (normal(200, 2, 64), normal(200, 2, 64, seed=1), normal(9, 4, 64, seed=2))}
    layers[5] = (normal(200, 1, 32), normal(200, 1, 32), None)  # of another shape, without queries
    answer = evaluate(layers, ["kvs3", "raw"], binary=BINARY, raw_tokens=2, threads=1, timeout_s=60)
    assert (answer.tokens, answer.layers, answer.backend) == (200, 2, "cpu")
    assert [found.profile for found in answer.profiles] == ["kvs3", "raw"]
    kvs3, raw = answer["kvs3"], answer["raw"]
    assert (kvs3.options["raw_tokens"], kvs3.options["threads"]) == (2, 1)
    assert 2.7 < kvs3.bits_per_entry < 3.5
    assert 0.01 < kvs3.rel_mse_k < 0.1
    assert kvs3.attention_kl is not None
    assert kvs3.attention_kl > 0
    assert raw.attention_rel_error == raw.rel_mse_v == raw.max_block_rel_error == 0
    with pytest.raises(KeyError):
        answer["tq2"]


def test_dtype_and_scale_reach_the_program() -> None:
    """bfloat16 and its bits are one thing, and half the scale is not."""
    k, v, q = (normal(64, 2, 64, seed=i, dtype=ml_dtypes.bfloat16) for i in range(3))
    plain = evaluate({0: (k, v, q)}, ["tq3"], binary=BINARY)["tq3"]
    same = evaluate({0: (k.view(np.uint16), v.view(np.uint16), q)}, ["tq3"], binary=BINARY)["tq3"]
    for field in dataclasses.fields(ProfileEvaluation):
        if not field.name.endswith("per_s"):
            assert getattr(same, field.name) == getattr(plain, field.name), field.name
    half = evaluate({0: (k, v, q)}, ["tq3"], scale=0.5 / 8, binary=BINARY)["tq3"]
    assert half.logit_rmse == pytest.approx((plain.logit_rmse or 0) / 2)


def test_without_queries_there_is_no_attention() -> None:
    found = evaluate({0: (normal(64, 1, 64), normal(64, 1, 64))}, binary=BINARY)["kvs2"]
    assert found.attention_kl is found.attention_rel_error is found.logit_rmse is None


def test_refusals_of_the_program() -> None:
    with pytest.raises(InvalidArgument, match="kvs9"):
        evaluate({0: (KV, KV)}, ["kvs9"], binary=BINARY)
    with pytest.raises(InvalidArgument, match="no-such-option"):
        evaluate({0: (KV, KV)}, binary=BINARY, no_such_option=1)
    with pytest.raises(KVShrinkError, match=r"layer\.5000\.k"):
        evaluate({5000: (KV, KV)}, binary=BINARY)
    with pytest.raises(KVShrinkError, match="nowhere"):
        evaluate_trace("nowhere.safetensors", binary=BINARY)
    with pytest.raises(InvalidArgument, match="profiles"):
        evaluate({0: (KV, KV)}, "kvs2", binary=BINARY)


def test_example_of_the_readme(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = (PROJECT / "README.md").read_text().split("```python\n")[1:]
    (example,) = (block.partition("```")[0] for block in blocks if "kvshrink.evaluate(" in block)
    monkeypatch.setenv("KVSHRINK_BIN", str(BINARY))
    exec(example, {})  # noqa: S102
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["kvs2", "kvs3", "tq3"]
