#!/usr/bin/env python3
"""Trains the trellis tables of proto/FORMAT.md section 5.5 and writes them.

    train_trellis.py             trains; writes proto/trellis_tables.txt and kernels/stages/trellis_tables.h
    train_trellis.py --header    writes the header anew from proto/trellis_tables.txt

Generalised Lloyd on samples of N(0, 1): code them with the tail-biting Viterbi search, move every entry to the mean of
what it stands for, repeat; round to 1/32 at the end. The start is what decides the outcome: Ungerboeck's 64-state code
(Channel coding with multilevel/phase signals, 1982, table I) picks one of four subsets of a scalar quantiser for every
value, the free bits a member of the subset. Needs numpy only; every number comes from elementwise operations and sums
in a fixed order, so that a run gives the same tables anywhere.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
TABLES = ROOT / "proto" / "trellis_tables.txt"
HEADER = ROOT / "kernels" / "stages" / "trellis_tables.h"

RUN = 128  # values of one circular bit string
STATE_BITS = 6
STATES = 1 << STATE_BITS
UNIT = 32  # entries are whole multiples of 1/32 that fit in eight bits
CHECKS = (0o103, 0o024)  # parity checks of the 64-state code: bit 1 and bit 0 of a value's subset
BATCH = 256  # runs searched at once

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Code:
    number: int  # of the index entry
    values: int  # of a step, which shifts as many bits into the state
    free_bits: int  # of a step
    spacing: float  # of the first quantiser where it is uniform, 0 where it has equally likely levels
    runs: int  # samples of the last iterations

    @property
    def windows(self) -> int:
        return STATES << self.values

    @property
    def rate(self) -> float:
        return 1 + self.free_bits / self.values


CODES = (
    Code(32, values=2, free_bits=1, spacing=0.6, runs=16384),
    Code(33, values=1, free_bits=1, spacing=0, runs=8192),
    Code(34, values=2, free_bits=3, spacing=0.29, runs=24576),
    Code(35, values=1, free_bits=2, spacing=0, runs=8192),
)


def subset_of(window: int) -> int:
    """Subset that the seven newest bits choose; bit 0 of a window is its oldest."""
    newest_first = int(f"{window:07b}"[::-1], 2)
    high, low = ((newest_first & check).bit_count() & 1 for check in CHECKS)
    return low + 2 * high


def first_table(code: Code, rng: np.random.Generator) -> Floats:
    """Table [free bits, window, value] to start from."""
    members = 1 << code.free_bits
    table = np.zeros((members, code.windows, code.values), np.float32)
    for window in range(code.windows):
        if code.values == 1:
            levels = 4 * members
            quantile = NormalDist().inv_cdf
            table[:, window, 0] = [quantile((subset_of(window) + 4 * u + 0.5) / levels) for u in range(members)]
            continue
        # The members of a pair are the points of the product of both subsets that are nearest to 0.
        subsets = (subset_of(window & 127), subset_of(window >> 1))
        axes = [code.spacing * (4 * np.arange(-8, 8) + subset - 1.5) for subset in subsets]
        points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
        jittered = points + 1e-3 * code.spacing * rng.standard_normal(points.shape)
        nearest = np.argsort((jittered**2).sum(axis=1), kind="stable")[:members]
        table[:, window, :] = points[nearest]
    return table


def branch_metrics(code: Code, table: Floats, x: Floats) -> Floats:
    """[step, run, window]: least |table entry|^2 / 2 - <x, entry> over the free bits."""
    steps = x.reshape(len(x), -1, code.values)
    best = np.full((steps.shape[1], len(x), code.windows), np.inf, np.float32)
    for entries in table:
        half = np.zeros(code.windows, np.float32)
        for value in range(code.values):
            half += entries[:, value] * entries[:, value] / np.float32(2)
        for step in range(steps.shape[1]):
            metric = half - steps[:, step, :1] * entries[:, 0]
            if code.values == 2:
                metric -= steps[:, step, 1:] * entries[:, 1]
            np.minimum(best[step], metric, out=best[step])
    return best


def search(code: Code, metrics: Floats, start: Ints | None) -> tuple[list[Floats], Floats]:
    """Sums before every step and after the last, of the best path to each state. No `start`: from any state."""
    runs = metrics.shape[1]
    sums = np.zeros((runs, STATES), np.float32)
    if start is not None:
        sums += np.float32(1e9)
        sums[np.arange(runs), start] = 0
    history = []
    ways = 1 << code.values
    for metric in metrics:
        history.append(sums)
        # window = next state << values | oldest bits; its state is the low six bits
        before = np.tile(sums.reshape(runs, -1, ways), (1, ways, 1))
        sums = (before + metric.reshape(runs, STATES, ways)).min(axis=2)
    return history, sums


def trace(code: Code, metrics: Floats, history: list[Floats], end: Ints) -> tuple[Ints, Ints]:
    """Windows [run, step] of the best paths that end in `end`, and the states they start from."""
    ways = 1 << code.values
    windows = np.zeros((metrics.shape[1], len(metrics)), np.int64)
    state = end
    row = np.arange(metrics.shape[1])[:, None]
    for step in range(len(metrics) - 1, -1, -1):
        candidates = (state[:, None] << code.values) | np.arange(ways)
        sums = history[step][row, candidates & (STATES - 1)] + metrics[step][row, candidates]
        windows[:, step] = candidates[row[:, 0], sums.argmin(axis=1)]
        state = windows[:, step] & (STATES - 1)
    return windows, state


def encode(code: Code, table: Floats, x: Floats) -> Ints:
    """Entries [run, step] (free bits x windows + window) of a tail-biting path for each run of x."""
    metrics = branch_metrics(code, table, x)
    half = len(metrics) // 2
    # First from the middle around to the middle: the state in between is where the run starts and ends.
    around = np.concatenate((metrics[half:], metrics[:half]))
    history, sums = search(code, around, None)
    _, start = trace(code, around[half:], history[half:], sums.argmin(axis=1))
    history, _ = search(code, metrics, start)
    windows, _ = trace(code, metrics, history, start)
    chosen = table[:, windows, :]  # [free bits, run, step, value]
    errors = ((chosen - x.reshape(1, *windows.shape, code.values)) ** 2).sum(axis=3)
    entries: Ints = errors.argmin(axis=0) * code.windows + windows
    return entries


def encode_all(code: Code, table: Floats, x: Floats) -> Ints:
    return np.concatenate([encode(code, table, x[i : i + BATCH]) for i in range(0, len(x), BATCH)])


def improved(code: Code, table: Floats, x: Floats) -> tuple[Floats, float]:
    """One step of Lloyd's; also the distortion of `table`."""
    entries = encode_all(code, table, x).ravel()
    flat = table.reshape(-1, code.values)
    error = float(((flat[entries] - x.reshape(-1, code.values)) ** 2).mean(dtype=np.float64))
    count = np.bincount(entries, minlength=len(flat))
    better = flat.copy()
    for value in range(code.values):
        sums = np.bincount(entries, x.reshape(-1, code.values)[:, value], len(flat))
        better[count > 0, value] = sums[count > 0] / count[count > 0]
    return better.reshape(table.shape), error


def train(code: Code) -> NDArray[np.int8]:
    rng = np.random.default_rng(code.number)
    table = first_table(code, rng)
    samples = rng.standard_normal((code.runs, RUN), np.float32)
    for iteration in range(72):
        runs = code.runs // 8 if iteration < 64 else code.runs
        table, error = improved(code, table, samples[:runs])
        print(f"code {code.number} iteration {iteration}: {error:.5f}", flush=True)
    rounded = np.clip(np.rint(table * UNIT), -127, 127)
    unseen = rng.standard_normal((4096, RUN), np.float32)
    _, error = improved(code, (rounded / UNIT).astype(np.float32), unseen)
    print(f"code {code.number}: distortion {error:.5f} on unseen samples at {code.rate} bits")
    return rounded.astype(np.int8)


def lines_of(table: Ints) -> list[str]:
    numbers = [str(entry) for entry in table.ravel()]
    return [" ".join(numbers[i : i + 32]) for i in range(0, len(numbers), 32)]


def read_tables() -> dict[int, Ints]:
    tables: dict[int, list[int]] = {}
    number = 0
    for line in TABLES.read_text().splitlines():
        if line.startswith("code"):
            number = int(line.split()[1])
            tables[number] = []
        elif line and not line.startswith("#"):
            tables[number] += [int(entry) for entry in line.split()]
    return {number: np.array(table, np.int64) for number, table in tables.items()}


def write_header() -> None:
    parts = [
        "// The trellis tables of proto/trellis_tables.txt, in its order and in units of 1/32. Written by",
        "// kernels/tools/train_trellis.py.",
        "#pragma once",
        "",
        "#include <cstdint>",
        "",
        "namespace kvshrink::stages {",
        "",
        "// clang-format off",
    ]
    for number, table in read_tables().items():
        entries = [str(entry) for entry in table]
        parts.append(f"inline constexpr int8_t kTrellis{number}[{len(entries)}] = {{")
        parts += ["    " + ", ".join(entries[i : i + 32]) + "," for i in range(0, len(entries), 32)]
        parts += ["};"]
    parts += ["// clang-format on", "", "}  // namespace kvshrink::stages"]
    HEADER.write_text("\n".join(parts) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the trellis tables.")
    parser.add_argument("--header", action="store_true", help="only writes the header anew")
    if not parser.parse_args().header:
        parts = [
            "# Trellis tables of KVS1 (proto/FORMAT.md section 5.5), in units of 1/32. Entry number",
            "# free bits x 2^(6 + values of a step) + window, the values of a step next to each other.",
        ]
        for code in CODES:
            parts.append(f"code {code.number} values {code.values} free_bits {code.free_bits}")
            parts += lines_of(train(code).astype(np.int64))
        TABLES.write_text("\n".join(parts) + "\n")
    write_header()


if __name__ == "__main__":
    main()
