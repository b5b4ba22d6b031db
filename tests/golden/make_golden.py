#!/usr/bin/env python3
"""Makes the golden files and their manifest anew, with a given `kvshrink`: tests/golden/make_golden.sh calls it.

The manifest holds SHA-256 sums: of each file, and of its tensors as C++ decodes them to fp32.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from golden_cases import BASIS_FILE, CASES, DATA, read_safetensors, write_sources

MAX_BYTES = 40_000


def encode(kvshrink: Path, sources: Path, name: str, output: Path, *options: str) -> None:
    case = CASES[name]
    source = sources / f"{case.source}.safetensors"
    filled = [option.format(sources) for option in case.options]
    subprocess.run([kvshrink, "encode", source, output, *filled, *options], check=True, capture_output=True)


def decode_sums(kvshrink: Path, file: Path, output: Path) -> dict[str, str]:
    """SHA-256 of each tensor as fp32; `output` is left there."""
    subprocess.run(
        [kvshrink, "decode", file, output, "--dtype", "fp32", "--basis", DATA / BASIS_FILE],
        check=True,
        capture_output=True,
    )
    tensors = sorted(read_safetensors(output).items())
    return {name: hashlib.sha256(data).hexdigest() for name, (_, _, data) in tensors}


def main() -> int:
    kvshrink = Path(sys.argv[1])
    manifest: dict[str, Any] = {}
    DATA.mkdir(exist_ok=True)
    for old in DATA.glob("*.kvs"):
        old.unlink()
    with tempfile.TemporaryDirectory() as folder:
        write_sources(Path(folder))
        shutil.copy(Path(folder) / BASIS_FILE, DATA)
        for name, case in CASES.items():
            file = DATA / f"{name}.kvs"
            encode(kvshrink, Path(folder), name, file)
            size = file.stat().st_size
            if size > MAX_BYTES:
                sys.exit(f"{file} has {size} bytes: must be at most {MAX_BYTES}")
            manifest[name] = {
                "source": case.source,
                "options": " ".join(case.options),
                "bytes": size,
                "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
                "fp32_sha256": decode_sums(kvshrink, file, Path(folder) / "out.safetensors"),
            }
            print(f"{name}: {size} bytes")
    (DATA / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
