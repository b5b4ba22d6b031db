"""One row of results.csv per trace, codec and options, its figures written so that the file can be made again."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterable
from pathlib import Path

FILE = Path(__file__).resolve().parent / "results.csv"


@dataclasses.dataclass(frozen=True)
class Row:
    trace: str
    model: str
    head_dim: int
    codec: str
    options: str
    bits_per_entry: float
    bits_k: float
    bits_v: float
    rel_mse_k: float
    rel_mse_v: float
    logit_rmse: float
    attention_rel_error: float
    attention_kl: float
    mean_rank_k: float | None  # None: the codec has no low-rank part
    mean_rank_v: float | None

    @property
    def key(self) -> tuple[str, str, str]:
        return self.trace, self.codec, self.options


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))
BITS = ("bits_per_entry", "bits_k", "bits_v")
ERRORS = ("rel_mse_k", "rel_mse_v", "logit_rmse", "attention_rel_error", "attention_kl")
_TEXT = ("trace", "model", "codec", "options")


def _format(name: str, value: object) -> str:
    if value is None:
        return ""
    if name in BITS:
        return f"{value:.4f}"
    if name in ERRORS:
        return f"{value:.3e}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def to_text(rows: Iterable[Row]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow([_format(name, getattr(row, name)) for name in COLUMNS])
    return out.getvalue()


def from_text(text: str) -> list[Row]:
    def value(name: str, word: str) -> str | int | float | None:
        if name in _TEXT:
            return word
        if name == "head_dim":
            return int(word)
        return float(word) if word else None

    lines = csv.DictReader(io.StringIO(text))
    return [Row(**{name: value(name, line[name]) for name in COLUMNS}) for line in lines]  # type: ignore[arg-type]


def read_results() -> list[Row]:
    return from_text(FILE.read_text())
