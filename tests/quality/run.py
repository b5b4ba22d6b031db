"""Rate and distortion of every profile and of the baselines on captured traces: results.csv and plots/.

build/venv/bin/python tests/quality/run.py [--traces DIR...] [--binary build/release/bin/kvshrink]
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from tqdm import tqdm

from codec import Codec, header_bits
from errors import Attention, Errors
from fp8_cast import Fp8Cast
from int_groups import Q4, Q8, Asymmetric
from kivi import Kivi
from kvshrink import evaluate_trace
from kvtc import Kvtc, calibration_of
from plots import draw_all
from report import write_readme
from results import FILE, Row, from_text, to_text
from traces import FOLDERS, ROOT, Trace, find_traces, load_trace

KVTC_RATES = (2, 3, 4)


RATES = (2.25, 2.75, 3.25, 4.25)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A profile; rope: K is coded before the model's rotary embedding; bits: the rate that shards keep to.

    kvs2c is calibrated on the first half of the trace's queries: those are also among the ones it is measured with.
    """

    profile: str
    rope: bool = False
    bits: float | None = None

    @property
    def text(self) -> str:
        """For the column of options."""
        words = [f"bits={self.bits}"] if self.bits else []
        words += ["calibration=first half of the queries"] if self.profile == "kvs2c" else []
        return ";".join(words + ["rope"] * self.rope)


SETTINGS = (
    *(Setting(name) for name in ("raw", "fp8", "tq2", "tq3", "tq4", "eoptshrinkq2")),
    *(Setting(name, rope) for rope in (False, True) for name in ("kvs2", "kvs3", "kvs4", "kvs2t", "kvs3t")),
    *(Setting("kvs2c", rope) for rope in (False, True)),
    *(Setting("kvs2", rope, bits) for rope in (False, True) for bits in RATES),
)


def calibrate(trace: Trace, rope: str, binary: Path, folder: Path) -> Path:
    basis = folder / "basis.kvb"
    queries = f"first:{next(iter(trace.layers.values())).q.shape[0] // 2}"
    command = [binary, "calibrate", trace.path, "--out", basis, "--rope", rope, "--queries", queries]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    return basis


def profile_row(trace: Trace, setting: Setting, binary: Path) -> Row:
    """By the program: its bits are the bytes of real shards."""
    rope = trace.rope if setting.rope else "none"
    with tempfile.TemporaryDirectory() as folder:
        basis = calibrate(trace, rope, binary, Path(folder)) if setting.profile == "kvs2c" else None
        (found,) = evaluate_trace(
            trace.path, [setting.profile], binary=binary, rope=rope, bits=setting.bits, basis=basis
        ).profiles
    if found.logit_rmse is None or found.attention_rel_error is None or found.attention_kl is None:
        raise ValueError(f"trace '{trace.name}' has no queries: attention can't be measured")
    if found.bits_per_entry_v is None or found.rel_mse_v is None:
        raise ValueError(f"trace '{trace.name}' has keys only: the table is of keys and values")
    ranked = setting.profile.startswith(("kvs", "eoptshrink"))
    return Row(
        trace=trace.name,
        model=trace.model,
        head_dim=trace.head_dim,
        codec=setting.profile,
        options=setting.text,
        bits_per_entry=found.bits_per_entry,
        bits_k=found.bits_per_entry_k,
        bits_v=found.bits_per_entry_v,
        rel_mse_k=found.rel_mse_k,
        rel_mse_v=found.rel_mse_v,
        logit_rmse=found.logit_rmse,
        attention_rel_error=found.attention_rel_error,
        attention_kl=found.attention_kl,
        mean_rank_k=found.mean_rank_k if ranked else None,
        mean_rank_v=found.mean_rank_v if ranked else None,
    )


class Sums:
    """Of a baseline, over the layers of a trace."""

    def __init__(self) -> None:
        self.errors = Errors()
        self.bits_k = self.bits_v = self.entries = 0

    def row(self, trace: Trace, codec: Codec) -> Row:
        """entries are those of K, and of V."""
        figures = self.errors.figures()
        return Row(
            trace=trace.name,
            model=trace.model,
            head_dim=trace.head_dim,
            codec=codec.name,
            options=codec.options,
            bits_per_entry=(self.bits_k + self.bits_v) / (2 * self.entries),
            bits_k=self.bits_k / self.entries,
            bits_v=self.bits_v / self.entries,
            mean_rank_k=None,
            mean_rank_v=None,
            **figures,
        )


def baseline_rows(trace: Trace, codecs: list[Codec], progress: tqdm) -> list[Row]:  # type: ignore[type-arg]
    """Layer by layer, so that exact attention is computed once."""
    sums = [Sums() for _ in codecs]
    for number, layer in trace.layers.items():
        exact = Attention(layer.q, layer.k, layer.v, trace.scale)
        header = header_bits(trace.tokens)
        for codec, total in zip(codecs, sums, strict=True):
            if number in codec.layers(trace):
                k, v = codec.code(trace, number)
                total.errors.add(exact.compare(k.values, v.values))
                total.bits_k += k.bits + header
                total.bits_v += v.bits + header
                total.entries += layer.k.size
            progress.update(1 / len(trace.layers))
    return [total.row(trace, codec) for codec, total in zip(codecs, sums, strict=True)]


def baselines(trace: Trace, paths: dict[str, Path]) -> list[Codec]:
    groups = [group for group in (32, 64, 256) if group <= trace.head_dim]
    codecs: list[Codec] = [Fp8Cast(), Q8(), Q4(), *(Asymmetric(4, group) for group in groups)]
    codecs += [Kivi(bits, window) for bits in (2, 4) for window in (32, 128)]
    found = calibration_of(trace, lambda name: load_trace(paths[name]) if name in paths else None, max(KVTC_RATES))
    if found is None:
        print(f"{trace.name}: kvtc is left out, the trace that it is calibrated on isn't there", file=sys.stderr)
    else:
        codecs += [Kvtc(rate, *found) for rate in KVTC_RATES]
    return codecs


def run(paths: Iterable[Path], binary: Path, settings: Iterable[Setting] = SETTINGS) -> Iterator[Row]:
    """Rows of all traces in a stable order. Traces are calibrated on others of `paths` only.

    One thread of linear algebra: sums are then taken in one order, and small products are faster.
    """
    known = {path.stem: path for path in paths}
    settings = tuple(settings)
    total = 0
    with threadpool_limits(1), tqdm(total=0, unit="codec", disable=None) as progress:
        for path in known.values():
            trace = load_trace(path)
            codecs = baselines(trace, known)
            total += len(settings) + len(codecs)
            progress.total = total
            for setting in settings:
                progress.set_description(f"{trace.name}: {setting.profile}")
                yield profile_row(trace, setting, binary)
                progress.update()
            progress.set_description(f"{trace.name}: baselines")
            yield from baseline_rows(trace, codecs, progress)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", nargs="+", type=Path, metavar="DIR", default=[], help="more folders of traces")
    parser.add_argument("--binary", type=Path, default=ROOT / "build" / "release" / "bin" / "kvshrink")
    parser.add_argument("--out", type=Path, default=FILE, help="table to write; plots/ beside it")
    arguments = parser.parse_args()
    rows = list(run(find_traces([*FOLDERS, *arguments.traces]), arguments.binary))
    arguments.out.write_text(to_text(rows))
    rows = from_text(arguments.out.read_text())  # what others can make again from the table
    draw_all(rows, arguments.out.parent / "plots")
    if arguments.out.resolve() == FILE:
        write_readme(rows)
    print(f"{arguments.out}: {len(rows)} rows")


if __name__ == "__main__":
    main()
