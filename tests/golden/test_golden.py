"""Golden files and fresh ones: C++ and Python decode alike, and encoding gives the same bytes as ever."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from decode_kvs import decode_bytes, describe_bytes
from golden_cases import BASIS_FILE, CASES, DATA, TRACES, read_safetensors, write_source, write_sources
from kvs_basis import read_basis
from kvs_blocks import exact_values
from kvs_shard import CALIBRATED, PROFILES
from make_golden import decode_sums, encode

BIN = Path(os.environ.get("KVSHRINK_BIN_DIR", Path(__file__).resolve().parents[2] / "build" / "dev" / "bin"))
KVSHRINK = BIN / "kvshrink"
MANIFEST: dict[str, Any] = json.loads((DATA / "manifest.json").read_text())
BASIS = read_basis((DATA / BASIS_FILE).read_bytes())
BLOCK = 128

# C++ computes in fp32, Python in fp64. A value of a block passes through two rotations of at most log2(512) = 9
# additions each, a sum over its components (12 at most in kvs, a few in eoptshrinkq), and a few products, each of which
# errs by at most 2^-24 of the block's largest magnitude: below 64 x 2^-24 = 4e-6 of it in all. A digit decoded wrongly
# differs by 1e-2 of it or more.
TOLERANCE = 4e-6


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    write_sources(folder)
    return folder


def floats(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    tensors = read_safetensors(path)
    assert {dtype for dtype, _, _ in tensors.values()} == {"F32"}
    return {name: np.frombuffer(data, "<f4").reshape(shape) for name, (_, shape, data) in tensors.items()}


def assert_alike(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32], what: str) -> None:
    """Equal up to TOLERANCE of each block's largest magnitude; not-a-number and infinity in the same places."""
    assert a.shape == b.shape, what
    np.testing.assert_array_equal(np.isnan(a), np.isnan(b), err_msg=what)
    np.testing.assert_array_equal(a[np.isinf(a)], b[np.isinf(a)], err_msg=what)
    for first in range(0, len(a), BLOCK):
        x, y = (np.where(np.isfinite(t[first : first + BLOCK]), t[first : first + BLOCK], 0) for t in (a, b))
        scale = np.abs(x.astype(np.float64)).max(axis=(0, 2), keepdims=True)
        worst = (np.abs(x.astype(np.float64) - y) - TOLERANCE * scale).max()
        assert worst <= 0, f"{what}: tokens {first}..: {worst} beyond the tolerance"


def assert_decoders_agree(file: Path, tmp_path: Path) -> None:
    decode_sums(KVSHRINK, file, tmp_path / "cpp.safetensors")
    by_cpp = floats(tmp_path / "cpp.safetensors")
    by_python, metadata = decode_bytes(file.read_bytes(), basis=BASIS)
    assert sorted(by_cpp) == sorted(by_python)
    for name, array in by_python.items():
        assert_alike(by_cpp[name], array, f"{file.name}: {name}")
    assert metadata == describe_bytes(file.read_bytes(), False, BASIS)["metadata"]


def test_the_files_are_those_of_the_manifest() -> None:
    assert sorted(MANIFEST) == sorted(CASES)
    assert sorted(p.stem for p in DATA.glob("*.kvs")) == sorted(CASES)
    for name, entry in MANIFEST.items():
        assert hashlib.sha256((DATA / f"{name}.kvs").read_bytes()).hexdigest() == entry["sha256"], name


def test_every_feature_of_the_format_is_in_a_golden_file() -> None:
    features = ("profile", "dtype", "code", "rank", "rows", "raw_rows", "keys_only", "rope")
    seen: dict[str, set[Any]] = {key: set() for key in features}
    for name in CASES:
        for shard in describe_bytes((DATA / f"{name}.kvs").read_bytes(), False, BASIS)["shards"]:
            for key in ("profile", "dtype", "raw_rows", "keys_only"):
                seen[key].add(shard[key])
            if shard["rope"] is not None:
                seen["rope"] |= {shard["rope"]["scaling"], shard["rope"]["gptj"]}
            for block in shard["blocks"]:
                seen["code"].add(block["code"])
                seen["rank"].add(min(block["rank"], 2))
                seen["rows"].add(block["rows"])
    assert seen["profile"] == set(PROFILES)
    assert seen["dtype"] == {"fp32", "fp16", "bf16", "fp8_e4m3"}
    assert seen["code"] == {0, 1, 2, *range(16, 23), *range(32, 36)}
    assert seen["rank"] == {0, 1, 2}
    assert {1, 128} <= seen["rows"]
    assert {"none", "llama3", False, True} <= seen["rope"]
    assert seen["keys_only"] == {False, True}
    assert {0, 1, 4} <= seen["raw_rows"]


@pytest.mark.parametrize("name", CASES)
def test_cpp_decodes_a_golden_file_as_ever(name: str, tmp_path: Path) -> None:
    assert decode_sums(KVSHRINK, DATA / f"{name}.kvs", tmp_path / "out.safetensors") == MANIFEST[name]["fp32_sha256"]


@pytest.mark.parametrize("name", CASES)
def test_python_decodes_a_golden_file_alike(name: str, tmp_path: Path) -> None:
    assert_decoders_agree(DATA / f"{name}.kvs", tmp_path)


@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("name", CASES)
def test_encoding_gives_the_golden_bytes(name: str, threads: str, sources: Path, tmp_path: Path) -> None:
    encode(KVSHRINK, sources, name, tmp_path / "out.kvs", "--threads", threads)
    assert (tmp_path / "out.kvs").read_bytes() == (DATA / f"{name}.kvs").read_bytes()


def test_exact_values_come_back_exact(sources: Path) -> None:
    """Profile raw by the Python decoder against the source itself: nothing of C++'s decoder in between."""
    source = read_safetensors(sources / "real.safetensors")
    decoded, _ = decode_bytes((DATA / "raw.kvs").read_bytes())
    for name, (_, shape, data) in source.items():
        np.testing.assert_array_equal(decoded[name], exact_values(np.frombuffer(data, np.uint8), 1).reshape(shape))


@pytest.mark.parametrize("name", ["kvs2", "eoptshrinkq2", "tq3", "chunks", "rope_kvs2", "kvs2c"])
def test_low_rank_part_of_a_golden_file(name: str) -> None:
    """Exact where the whole is: the first four tokens. Elsewhere another value, as the residual is left out."""
    data = (DATA / f"{name}.kvs").read_bytes()
    low, _ = decode_bytes(data, low_rank=True, basis=BASIS)
    full, _ = decode_bytes(data, basis=BASIS)
    assert sorted(low) == sorted(full)
    for key in low:
        np.testing.assert_array_equal(low[key][:1], full[key][:1])
        assert not np.array_equal(low[key][4:], full[key][4:])


@pytest.mark.parametrize("profile", [p for p in PROFILES if p != CALIBRATED])
@pytest.mark.parametrize("trace", ["smollm2-512", "qwen2.5-coder-512"])
def test_fresh_files_decode_alike(trace: str, profile: str, tmp_path: Path) -> None:
    """Every profile on two whole layers of a real trace."""
    tensors = read_safetensors(TRACES / f"{trace}.safetensors")
    layers = sorted({int(name.split(".")[1]) for name in tensors})[1:3]
    source = tmp_path / "in.safetensors"
    write_layers(source, tensors, layers)
    subprocess.run([KVSHRINK, "encode", source, tmp_path / "out.kvs", "--profile", profile], check=True)
    assert_decoders_agree(tmp_path / "out.kvs", tmp_path)


def write_layers(path: Path, tensors: dict[str, tuple[str, list[int], bytes]], layers: list[int]) -> None:
    chosen = {f"layer.{i}.{kind}": tensors[f"layer.{i}.{kind}"] for i in layers for kind in "kv"}
    arrays = {name: np.frombuffer(data, "<f2").reshape(shape) for name, (_, shape, data) in chosen.items()}
    write_source(path, "F16", arrays)


def test_a_damaged_golden_file_is_refused_by_both(tmp_path: Path) -> None:
    """One bit in each of 40 places: verify exits 1, and the Python decoder raises."""
    data = (DATA / "chunks.kvs").read_bytes()
    for at in range(0, len(data), len(data) // 40):
        flipped = bytearray(data)
        flipped[at] ^= 4
        (tmp_path / "bad.kvs").write_bytes(flipped)
        result = subprocess.run([KVSHRINK, "verify", tmp_path / "bad.kvs"], capture_output=True, text=True, check=False)
        assert result.returncode == 1, f"byte {at}: {result.stdout}"
        with pytest.raises(ValueError, match="field"):
            decode_bytes(bytes(flipped))
