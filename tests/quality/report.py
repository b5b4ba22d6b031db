"""The table of this folder's README, from the rows of results.csv."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from results import Row

README = Path(__file__).resolve().parent / "README.md"
_BEGIN, _END = "<!-- table: made by run.py -->\n", "<!-- end of table -->\n"


def _title(row: Row) -> str:
    """What is the same on all traces: a calibration isn't."""
    options = [
        option for option in row.options.split(";") if option and not option.startswith(("calibration", "layers"))
    ]
    return " ".join([f"`{row.codec}`", *options])


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row.bits_per_entry:.2f} / {row.attention_rel_error:.2g} / {row.attention_kl:.2g}"


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line per codec, a column per trace. The exact profile is left out."""
    shown = [row for row in rows if row.codec != "raw"]
    traces = list(dict.fromkeys(row.trace for row in shown))
    cells = {(_title(row), row.trace): row for row in shown}
    lines = [f"| | {' | '.join(traces)} |", "|---" * (len(traces) + 1) + "|"]
    for title in dict.fromkeys(title for title, _ in cells):
        lines.append(f"| {title} | {' | '.join(_cell(cells.get((title, trace))) for trace in traces)} |")
    return "\n".join(lines) + "\n"


def table_of_readme() -> str:
    return README.read_text().partition(_BEGIN)[2].partition(_END)[0]


def write_readme(rows: Sequence[Row]) -> None:
    before, begin, rest = README.read_text().partition(_BEGIN)
    _, end, after = rest.partition(_END)
    README.write_text(before + begin + table(rows) + end + after)
