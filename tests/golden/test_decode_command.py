"""The Python decoder's command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from decode_kvs import decode_bytes
from make_kvs import FileSpec, ShardSpec, make_file, make_shard
from test_decoder import file_shards, good_blocks

HERE = Path(__file__).resolve().parent


def run_decoder(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE / "decode_kvs.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_command_writes_both_outputs(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    source = tmp_path / "in.kvs"
    source.write_bytes(make_file(FileSpec(file_shards(), [1, 5])))
    arrays, _ = decode_bytes(source.read_bytes())
    for name, load in (("out.safetensors", safetensors.load_file), ("out.npz", np.load)):
        assert run_decoder(source, tmp_path / name).returncode == 0
        loaded = load(tmp_path / name)
        assert sorted(loaded) == sorted(arrays)
        for key, array in arrays.items():
            np.testing.assert_array_equal(loaded[key], array)
    described = json.loads(run_decoder(source, "--json").stdout)
    assert [shard["layer"] for shard in described["shards"]] == [1, 5, 1, 5]


def test_command_names_the_damage(tmp_path: Path) -> None:
    source = tmp_path / "in.kvs"
    source.write_bytes(make_shard(ShardSpec(good_blocks(), flags=8)))
    result = run_decoder(source, tmp_path / "out.npz")
    assert result.returncode == 1
    assert "'flags' is 8" in result.stderr
    assert not (tmp_path / "out.npz").exists()
