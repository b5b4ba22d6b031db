"""The tour in README.md, run as it stands there but for the server's address and the folder of its files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support import BIN, Daemon

ROOT = Path(__file__).resolve().parents[2]


def blocks(language: str) -> list[str]:
    """Code blocks marked as part of the tour."""
    return re.findall(rf"^```{language} tour\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_commands(daemon: Daemon, tmp_path: Path) -> None:
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "KVSHRINK_SERVER": daemon.target}
    [script] = blocks("bash")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script.replace("/tmp/", f"{tmp_path}/")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "gpl.safetensors").stat().st_size > 2_000_000


def test_python(daemon: Daemon) -> None:
    [script] = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", script.replace("127.0.0.1:7420", daemon.target)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "(1, 32, 128) (1, 32)" in done.stdout


@pytest.mark.parametrize(
    "document", ["README.md", "client/README.md", "tests/README.md", "service/README.md", "kernels/README.md"]
)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{document} links to {target}"
