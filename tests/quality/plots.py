"""Rate-distortion plots of results.csv: one SVG per trace, the same bytes for the same rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from results import Row

PANELS = (
    ("rel_mse_k", "K error"),
    ("rel_mse_v", "V error"),
    ("attention_rel_error", "attention output error"),
    ("attention_kl", "KL of attention weights, nats"),
)
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "kvshrink",
    "svg.fonttype": "none",  # text stays text: small, and the same whatever the fonts
    "font.family": "DejaVu Sans",  # comes with matplotlib: the layout is the same everywhere
    "font.size": 9,
    "path.simplify": False,
}


@dataclasses.dataclass(frozen=True)
class Series:
    """Rows that belong together. Colours are Okabe and Ito's and a dark purple; shapes differ too."""

    label: str
    chosen: Callable[[Row], bool]
    colour: str
    marker: str
    line: str = ""

    def draw(self, axes: Any, rows: Sequence[Row], metric: str) -> None:
        points = sorted((row.bits_per_entry, getattr(row, metric)) for row in rows if self.chosen(row))
        points = [(x, y) for x, y in points if y > 0]
        if points:
            ours = self.label.startswith("kvs")
            axes.plot(
                *zip(*points, strict=True),
                color=self.colour,
                marker=self.marker,
                linestyle=self.line,
                linewidth=2 if ours else 1,
                markersize=6 if ours else 5,
                label=self.label,
                zorder=3 if ours else 2,
            )


def _named(*codecs: str, rope: bool = False, rate: bool = False) -> Callable[[Row], bool]:
    """rope: coded before the rotary embedding; rate: bits were asked for."""

    def chosen(row: Row) -> bool:
        return row.codec in codecs and rope == ("rope" in row.options) and rate == ("bits=" in row.options)

    return chosen


_BLUE, _RED, _PURPLE = "#0072B2", "#D55E00", "#661177"
SERIES = (
    Series("kvs2, kvs3, kvs4", _named("kvs2", "kvs3", "kvs4"), _BLUE, "o", "-"),
    Series("kvs with rope", _named("kvs2", "kvs3", "kvs4", rope=True), _BLUE, "v", "--"),
    Series("kvs2t, kvs3t (trellis)", _named("kvs2t", "kvs3t"), _PURPLE, "h", "-"),
    Series("kvs trellis, with rope", _named("kvs2t", "kvs3t", rope=True), _PURPLE, "<", "--"),
    Series("kvs at a rate", _named("kvs2", rate=True), _RED, "s", "-"),
    Series("kvs at a rate, with rope", _named("kvs2", rope=True, rate=True), _RED, "D", "--"),
    Series("eoptshrinkq2 (paper, literal)", _named("eoptshrinkq2"), "#000000", "*"),
    Series("TurboQuant (tq2, tq3, tq4)", _named("tq2", "tq3", "tq4"), "#009E73", "^", ":"),
    Series("KVTC-like", _named("kvtc"), "#CC79A7", "P", ":"),
    Series("KIVI 2, 4 bits", _named("kivi2", "kivi4"), "#E69F00", "X"),
    Series("int4, q4_0, q8_0", _named("int4", "q4_0", "q8_0"), "#56B4E9", "d"),
    Series("fp8", _named("fp8", "fp8_cast"), "#999999", "p"),
)


def draw(rows: Sequence[Row], path: Path) -> None:
    """The rows of one trace."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 6.8), layout="constrained")
        axes = figure.subplots(2, 2).reshape(-1)
        for panel, (metric, title) in zip(axes, PANELS, strict=True):
            for series in SERIES:
                series.draw(panel, rows, metric)
            panel.set_yscale("log")
            panel.set_title(title)
            panel.set_xlabel("bits per entry, every stored byte")
            panel.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
            panel.set_axisbelow(True)
            panel.minorticks_off()
        figure.suptitle(f"{rows[0].trace} ({rows[0].model}, head_dim {rows[0].head_dim})")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def draw_all(rows: Sequence[Row], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for trace in dict.fromkeys(row.trace for row in rows):
        draw([row for row in rows if row.trace == trace], folder / f"{trace}.svg")
