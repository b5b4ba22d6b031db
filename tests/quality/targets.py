"""The project's goals for quality, checked on results.csv.

`python tests/quality/targets.py` prints the table; its exit code is 1 when a goal is not met.

A ratio is a profile's error over that of another on the same trace; a mean is that of the ratios over all traces.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence

from results import Row, read_results

MAX_OVERHEAD_BITS = 0.03  # header, index and checksums, for a chunk of 256 tokens of 8 heads x 128


@dataclasses.dataclass(frozen=True)
class Check:
    goal: str
    trace: str  # or "mean"
    value: float
    at_most: float

    @property
    def met(self) -> bool:
        return self.value <= self.at_most  # false for NaN


class Table:
    """Rows by trace, codec and options."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = {row.key: row for row in rows}
        self.traces = list(dict.fromkeys(row.trace for row in rows))

    def row(self, trace: str, codec: str, options: str = "") -> Row:
        return self._rows[trace, codec, options]

    def ratios(self, codec: str, other: str, options: str = "") -> dict[str, float]:
        """Of attention_rel_error."""
        return {
            trace: self.row(trace, codec, options).attention_rel_error / self.row(trace, other).attention_rel_error
            for trace in self.traces
        }

    def more_bits(self, codec: str, other: str, options: str = "") -> dict[str, float]:
        """Bits per entry of `codec` minus those of `other`."""
        return {
            trace: self.row(trace, codec, options).bits_per_entry - self.row(trace, other).bits_per_entry
            for trace in self.traces
        }


def mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def _each(goal: str, values: dict[str, float], at_most: float) -> Iterator[Check]:
    for trace, value in values.items():
        yield Check(goal, trace, value, at_most)


def _mean(goal: str, values: dict[str, float], at_most: float) -> Check:
    return Check(goal, "mean", mean(values), at_most)


def _against_the_paper(
    table: Table, codec: str, options: str, bits: float, each: float, average: float
) -> Iterator[Check]:
    name = f"{codec} {options}".strip()
    error = f"{name}: attention error / that of eoptshrinkq2"
    yield from _each(f"{name}: bits - those of eoptshrinkq2", table.more_bits(codec, "eoptshrinkq2", options), -bits)
    ratios = table.ratios(codec, "eoptshrinkq2", options)
    yield from _each(error, ratios, each)
    yield _mean(error, ratios, average)


def _against_turboquant(table: Table) -> Iterator[Check]:
    for codec, other in (("kvs3", "tq3"), ("kvs4", "tq4")):
        yield from _each(f"{codec}: bits - those of {other}", table.more_bits(codec, other), 0.0)
    ratios = table.ratios("kvs3", "tq3")
    yield from _each("kvs3: attention error / that of tq3", ratios, 0.8)
    yield _mean("kvs3: attention error / that of tq3", ratios, 0.65)
    yield _mean("kvs4: attention error / that of tq4", table.ratios("kvs4", "tq4"), 1.0)
    for trace, ratio in table.ratios("kvs3", "tq4").items():
        if trace.startswith("qwen"):
            yield Check("kvs3: attention error / that of tq4", trace, ratio, 0.5)


def _rates(table: Table) -> Iterator[Check]:
    for head_dim, at_most in ((64, 2.25), (256, 2.10)):
        rows = [table.row(trace, "kvs2") for trace in table.traces]
        bits = {row.trace: row.bits_per_entry for row in rows if row.head_dim == head_dim}
        yield _mean(f"kvs2: bits at head_dim {head_dim}", bits, at_most)


def checks(rows: Sequence[Row]) -> list[Check]:
    """All goals on these rows, which must hold those of all traces."""
    table = Table(rows)
    return [
        *_against_the_paper(table, "kvs2", "", 0.3, 0.8, 0.6),
        *_against_the_paper(table, "kvs2t", "rope", 0.38, 0.7, 0.45),
        *_against_turboquant(table),
        *_rates(table),
    ]


def to_text(found: Sequence[Check]) -> str:
    width = max(len(check.goal) for check in found)
    lines = [f"{'goal':{width}}  {'trace':18}  {'value':>8}  {'at most':>8}"]
    for check in found:
        verdict = "" if check.met else "  NOT MET"
        lines.append(f"{check.goal:{width}}  {check.trace:18}  {check.value:8.3f}  {check.at_most:8.3f}{verdict}")
    return "\n".join(lines)


def main() -> int:
    found = checks(read_results())
    print(to_text(found))
    return 0 if all(check.met for check in found) else 1


if __name__ == "__main__":
    sys.exit(main())
