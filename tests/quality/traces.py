"""Captured traces: their tensors, and what is known of their models."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
# Where traces are looked for. The second folder, beside the repository, holds those that are too large for it.
FOLDERS = (ROOT / "tests" / "data", ROOT.parent / "shared" / "data")

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Layer:
    """float32, as the trace's own dtype reads."""

    k: Floats  # [tokens, kv_heads, head_dim], after the rotary embedding
    v: Floats  # of the same shape
    q: Floats  # [queries, q_heads, head_dim], of the last tokens


@dataclasses.dataclass(frozen=True)
class Trace:
    path: Path
    model: str
    layers: dict[int, Layer]

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def tokens(self) -> int:
        return len(next(iter(self.layers.values())).k)

    @property
    def head_dim(self) -> int:
        return int(next(iter(self.layers.values())).k.shape[2])

    @property
    def scale(self) -> float:
        """Of q.k."""
        return float(1 / np.sqrt(self.head_dim))

    def rope_base(self, layer: int) -> float:
        """Of the rotary embedding: channel j pairs with j + head_dim / 2, by base ^ (-2 j / head_dim) per position."""
        return rope_base(self.model, layer)

    @property
    def rope(self) -> str:
        """The embedding of all layers as `--rope` takes it."""
        layers_of: dict[float, list[int]] = {}
        for layer in self.layers:
            layers_of.setdefault(self.rope_base(layer), []).append(layer)
        (most, _), *others = sorted(layers_of.items(), key=lambda item: -len(item[1]))
        return ",".join([f"theta={most:g}", *(f"theta@{'/'.join(map(str, of))}={base:g}" for base, of in others)])


def rope_base(model: str, layer: int) -> float:
    if model.startswith("Gemma 3"):
        return 1e6 if layer % 6 == 5 else 1e4  # every sixth layer attends to all tokens, the others to a window
    known = {"SmolLM2": 1e5, "Qwen2.5": 1e6}
    for name, base in known.items():
        if model.startswith(name):
            return base
    raise ValueError(f"the rotary embedding of model '{model}' isn't known: add it to tests/quality/traces.py")


def load_trace(path: Path, queries: bool = True) -> Trace:
    """queries=False: a file without them; q is empty."""
    with safe_open(path, "np") as file:
        names = list(file.keys())
        metadata = file.metadata() or {}
        numbers = sorted(int(name.split(".")[1]) for name in names if name.endswith(".k"))

        def tensor(layer: int, kind: str) -> Floats:
            array: Array = file.get_tensor(f"layer.{layer}.{kind}")
            return array.astype(np.float32)

        none = np.empty((0, 0, 0), np.float32)
        layers = {i: Layer(tensor(i, "k"), tensor(i, "v"), tensor(i, "q") if queries else none) for i in numbers}
    return Trace(path, metadata.get("model", "").partition(" (")[0], layers)


def find_traces(folders: Iterable[Path]) -> list[Path]:
    """Files of the folders by name; of two with one name, that of the first folder."""
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.safetensors")):
            found.setdefault(path.stem, path)
    return [found[name] for name in sorted(found)]
