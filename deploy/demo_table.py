"""The table of deploy/demo.sh, from the JSON that `kvshrink` printed. Standard library only."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

COLUMNS = (
    "profile",
    "bits/entry",
    "K error",
    "V error",
    "attention error",
    "encode MB/s",
    "decode MB/s",
    "wire bytes",
    "of raw",
)


def load(path: pathlib.Path) -> Any:
    return json.loads(path.read_text())


def row(results: pathlib.Path, trace: str, measured: dict[str, Any]) -> list[str]:
    profile = measured["profile"]
    got = load(results / f"{trace}.{profile}.get.json")
    attended = load(results / f"{trace}.{profile}.attend.json")
    # What the daemon gave must be what `eval` measured on the trace itself.
    for name in ("rel_mse_k", "rel_mse_v"):
        if abs(got[name] - measured[name]) > 0.01 * measured[name]:
            sys.exit(f"{trace}, {profile}: {name} is {got[name]} over the wire and {measured[name]} in eval")
    if abs(attended["attention_rel_error"] - measured["attention_rel_error"]) > 0.01 * max(
        measured["attention_rel_error"], 1e-9
    ):
        sys.exit(f"{trace}, {profile}: attention over the wire differs from eval")
    return [
        profile,
        f"{measured['bits_per_entry']:.3f}",
        f"{got['rel_mse_k']:.5f}",
        f"{got['rel_mse_v']:.5f}",
        f"{attended['attention_rel_error']:.5f}",
        f"{measured['encode_mb_per_s']:.0f}",
        f"{measured['decode_mb_per_s']:.0f}",
        f"{got['wire_bytes']:,}",
        f"{100 * got['wire_bytes'] / got['raw_bytes']:.1f}%",
    ]


def print_table(rows: list[list[str]]) -> None:
    widths = [max(len(line[i]) for line in [list(COLUMNS), *rows]) for i in range(len(COLUMNS))]
    for line in [list(COLUMNS), *rows]:
        cells = [line[0].ljust(widths[0])] + [
            cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)
        ]
        print("  ".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=pathlib.Path, help="folder of results, or with --check-tier the answer of one get")
    parser.add_argument("--check-tier", help="fail unless all shards of the answer came from this tier")
    arguments = parser.parse_args()
    if arguments.check_tier:
        answer = load(arguments.path)
        if answer["tiers"] != {arguments.check_tier: answer["shards"]}:
            sys.exit(f"{arguments.path.name}: expected all shards from {arguments.check_tier}, got {answer['tiers']}")
        return
    for path in sorted(arguments.path.glob("*.eval.json")):
        evaluation = load(path)
        trace = path.name.removesuffix(".eval.json")
        print(
            f"\n{trace}: {evaluation['tokens']} tokens, {evaluation['layers']} layers, "
            f"head_dim {evaluation['head_dim']}, backend {evaluation['backend']}"
        )
        print_table([row(arguments.path, trace, measured) for measured in evaluation["profiles"]])
    print("\nErrors are sums of squared error / sums of squares: of keys, of values, of the attention outputs of the")
    print("trace's own queries. Bits count every byte of the shards; wire bytes are those of `get`, protocol included.")


if __name__ == "__main__":
    main()
