"""The package as others install it: built from a source distribution, outside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]


def test_wheel_of_a_source_distribution(tmp_path: Path) -> None:
    """The archive brings the protocol along, and the wheel its generated code; neither writes into the repository."""
    build = "import sys, setuptools.build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"
    subprocess.run([sys.executable, "-c", build, "sdist", tmp_path], cwd=PROJECT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("kvshrink-*.tar.gz")
    subprocess.run(["tar", "-xzf", archive, "-C", tmp_path], check=True)
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    subprocess.run([sys.executable, "-c", build, "wheel", tmp_path], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("kvshrink-*.whl")
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
        content.extractall(tmp_path / "installed")
    assert {"kvshrink/py.typed", "kvshrink/v1/kvshrink_pb2.py", "kvshrink/v1/kvshrink_pb2.pyi"} <= names
    program = "import kvshrink; print(kvshrink.__file__, kvshrink.PROFILES[-1])"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert result.stdout.split() == [str(tmp_path / "installed" / "kvshrink" / "__init__.py"), "kvs2c"]
