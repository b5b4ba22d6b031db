"""Generates the protocol's Python code from proto/ when the package is built; everything else is in pyproject.toml."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = Path(__file__).resolve().parent
NAMES = ("types", "kvshrink")


def proto_root() -> Path:
    """The folder that holds kvshrink/v1: in a source distribution beside this file, else that of the repository."""
    for root in (HERE / "proto", HERE.parents[1] / "proto"):
        if (root / "kvshrink" / "v1" / "kvshrink.proto").is_file():
            return root
    sys.exit(f"no proto/kvshrink/v1/kvshrink.proto in {HERE} or {HERE.parents[1]}")


def generate(root: Path, out: Path) -> None:
    from grpc_tools import protoc  # noqa: PLC0415 - a build requirement only

    files = [str(root / "kvshrink" / "v1" / f"{name}.proto") for name in NAMES]
    out.mkdir(parents=True, exist_ok=True)
    outputs = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(["protoc", f"-I{root}", *outputs, *files]) != 0:
        sys.exit("protoc failed")


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        generate(proto_root(), HERE / "src" if self.editable_mode else Path(self.build_lib).resolve())


class Sdist(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        target = Path(base_dir) / "proto" / "kvshrink" / "v1"
        target.mkdir(parents=True, exist_ok=True)
        for name in NAMES:
            shutil.copy(proto_root() / "kvshrink" / "v1" / f"{name}.proto", target)


setup(cmdclass={"build_py": BuildPy, "sdist": Sdist})
