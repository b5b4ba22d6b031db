"""Hostile sources: every profile's shards of them pass the second decoder's checks, and both decoders agree."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from golden_cases import write_source
from kvs_shard import PROFILES
from test_golden import KVSHRINK, assert_decoders_agree

Floats = npt.NDArray[np.float32]


def noise(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.standard_normal(shape).astype(np.float32)


def hostile(kind: str, rng: np.random.Generator, tokens: int, heads: int, head_dim: int) -> Floats:
    x = noise(rng, tokens, heads, head_dim)
    if kind == "outlier channels":
        x[:, :, rng.integers(0, head_dim, 3)] *= 200
    elif kind == "bias":
        x += 60 * noise(rng, 1, heads, head_dim)
    elif kind == "massive first tokens":
        x[:3] *= 3000
    elif kind == "dead and constant heads":
        x[:, 0] = 0
        x[:, -1] = -2.5
    elif kind == "denormals":
        x = (x * 2.0**-140).astype(np.float32)
    elif kind == "largest":
        x = np.where(x < 0, -3.3e38, 3.3e38).astype(np.float32)
    elif kind == "uneven rows":
        x *= (2.0 ** rng.integers(-14, 13, (tokens, 1, 1))).astype(np.float32)
    elif kind == "sparse":
        x *= rng.integers(0, 60, x.shape) == 0
    return x


KINDS = (
    *("outlier channels", "bias", "massive first tokens", "dead and constant heads"),
    *("denormals", "largest", "uneven rows", "sparse"),
)
SHAPES = ((1, 2, 64), (130, 2, 80), (77, 3, 33))


def dtype_of(kind: str) -> tuple[str, Any]:
    return ("F32", np.float32) if kind in ("denormals", "largest") else ("F16", np.float16)


@pytest.mark.parametrize("profile", PROFILES)
def test_both_decoders_agree(profile: str, tmp_path: Path) -> None:
    """One trace with a layer for each kind and shape; every other layer has keys only."""
    for shape in SHAPES:
        rng = np.random.default_rng(shape[2])
        for dtype in ("F32", "F16"):
            tensors: dict[str, Any] = {}
            for layer, kind in enumerate(KINDS):
                name, numpy_type = dtype_of(kind)
                if name == dtype:
                    tensors[f"layer.{layer}.k"] = hostile(kind, rng, *shape).astype(numpy_type)
                    if layer % 2 == 0:
                        tensors[f"layer.{layer}.v"] = hostile(kind, rng, *shape).astype(numpy_type)
            source, out = tmp_path / "in.safetensors", tmp_path / "out.kvs"
            write_source(source, dtype, tensors)
            subprocess.run([KVSHRINK, "encode", source, out, "--profile", profile], check=True)
            assert_decoders_agree(tmp_path / "out.kvs", tmp_path)
