"""What profiles cost and keep on captured tensors: `kvshrink eval`, driven from Python."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvshrink.errors import FailedPrecondition, InvalidArgument, KVShrinkError
from kvshrink.trace_file import trace_arrays, write_trace

_USAGE_ERROR = 2


@dataclasses.dataclass(frozen=True)
class ProfileEvaluation:
    """One profile on one trace. Errors are sums of squared error / sums of squares, of what a decoder gives.

    The three figures of attention are None where the trace has no queries; attention_rel_error and the figures of V
    also where it has keys only.
    """

    profile: str
    options: Mapping[str, Any]  # what it was coded with
    bits_per_entry: float  # 8 x bytes of the shards, all of them, / entries
    bits_per_entry_k: float
    bits_per_entry_v: float | None
    rel_mse_k: float
    rel_mse_v: float | None
    logit_rmse: float | None  # of q.k x scale, over queries and keys
    attention_rel_error: float | None  # of the attention outputs
    attention_kl: float | None  # nats, mean over queries and heads
    max_block_rel_error: float
    raw_blocks: int  # kept exactly
    mean_rank_k: float
    mean_rank_v: float | None
    encode_mb_per_s: float  # of 2 bytes per entry
    decode_mb_per_s: float


@dataclasses.dataclass(frozen=True)
class Evaluation:
    trace: str
    head_dim: int
    tokens: int
    layers: int
    backend: str
    profiles: tuple[ProfileEvaluation, ...]  # in the order asked

    def __getitem__(self, profile: str) -> ProfileEvaluation:
        for found in self.profiles:
            if found.profile == profile:
                return found
        raise KeyError(profile)


def find_binary(binary: str | os.PathLike[str] | None = None) -> Path:
    """The program: `binary`, else $KVSHRINK_BIN, else beside the package or the interpreter, else on PATH."""
    for name, value in (("argument 'binary'", binary), ("KVSHRINK_BIN", os.environ.get("KVSHRINK_BIN"))):
        if value:
            path = Path(value)
            if not (path.is_file() and os.access(path, os.X_OK)):
                raise FailedPrecondition(f"{name} is '{path}': must be the kvshrink program")
            return path
    places = (Path(__file__).resolve().parent / "bin", Path(sys.executable).parent)
    found = shutil.which("kvshrink", path=os.pathsep.join(map(str, places))) or shutil.which("kvshrink")
    if found is None:
        raise FailedPrecondition(
            "the program 'kvshrink' isn't beside the package nor on PATH: build it (cmake --preset release && cmake "
            "--build --preset release) and name build/release/bin/kvshrink by KVSHRINK_BIN"
        )
    return Path(found)


def _command_options(options: Mapping[str, object]) -> list[str]:
    """threads=2 -> --threads 2, of those that are given; True -> the flag alone."""
    words: list[str] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(str(value))
    return words


def _read(text: str) -> Evaluation:
    answer = json.loads(text)

    def fields_of(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
        return {field.name: values[field.name] for field in dataclasses.fields(cls)}

    answer["profiles"] = tuple(ProfileEvaluation(**fields_of(ProfileEvaluation, found)) for found in answer["profiles"])
    return Evaluation(**fields_of(Evaluation, answer))


def evaluate_trace(
    path: str | os.PathLike[str],
    profiles: Sequence[str] = ("kvs2",),
    *,
    binary: str | os.PathLike[str] | None = None,
    timeout_s: float | None = None,
    **options: object,
) -> Evaluation:
    """Measures profiles on a trace file. See `evaluate`; errors of the file come as KVShrinkError."""
    if isinstance(profiles, str) or not profiles:
        raise InvalidArgument(f"argument 'profiles' is {profiles!r}: must be a sequence of names")
    command = [str(find_binary(binary)), "eval", str(path), "--profile", ",".join(profiles), "--json"]
    command += _command_options(options)
    # No shell; the program is the caller's own.
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)  # noqa: S603
    if result.returncode != 0:
        message = result.stderr.strip() or f"exit code {result.returncode}"
        raise (InvalidArgument if result.returncode == _USAGE_ERROR else KVShrinkError)(message)
    return _read(result.stdout)


def evaluate(
    layers: Mapping[int, Sequence[Any]],
    profiles: Sequence[str] = ("kvs2",),
    *,
    scale: float | None = None,
    metadata: Mapping[str, str] | None = None,
    binary: str | os.PathLike[str] | None = None,
    timeout_s: float | None = None,
    **options: object,
) -> Evaluation:
    """Measures profiles on captured tensors.

    layers: number of the layer -> (k, v) or (k, v, q). k and v are [tokens, kv_heads, head_dim], v is None where there
    are keys only; q, the queries of the last tokens, is [queries, q_heads, head_dim]; query head h reads kv head
    h / (q_heads / kv_heads). Floats of any kind (bfloat16 by ml_dtypes or as uint16 bits): numpy arrays, or what
    converts to them on the CPU, as torch tensors do. They are not changed. scale is that of q.k, 1 / sqrt(head_dim) by
    default; metadata goes into the trace.

    options are those of the command `kvshrink eval`: chunk_tokens, raw_tokens, raw_layers, max_relative_error, rope (as
    text: "theta=1e6"), threads, backend.

    Errors: InvalidArgument names the layer and what doesn't fit, or the option; FailedPrecondition: no program;
    KVShrinkError: what the program said; subprocess.TimeoutExpired after timeout_s.
    """
    arrays = trace_arrays(layers)
    about = dict(metadata or {})
    if scale is not None:
        about["scale"] = repr(float(scale))
    with tempfile.TemporaryDirectory(prefix="kvshrink-") as folder:
        path = Path(folder) / "captured.safetensors"
        write_trace(path, arrays, about)
        return evaluate_trace(path, profiles, binary=binary, timeout_s=timeout_s, **options)
