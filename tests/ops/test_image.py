"""`make image-test`: what the Dockerfile does, step by step, in a fresh virtual environment and without Docker."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.support import ROOT

pytestmark = pytest.mark.image

DOCKERFILE = (ROOT / "Dockerfile").read_text()


def copied_before(step: str) -> list[str]:
    """What the build stage has copied when it comes to a step."""
    before = DOCKERFILE.partition(step)[0]
    lines = [line for line in before.splitlines() if line.startswith("COPY ") and "--from" not in line]
    return [source for line in lines for source in line.split()[1:-1]]


@pytest.mark.timeout(1800)
def test_the_entry_point_starts(tmp_path: Path) -> None:
    source, venv = tmp_path / "src", tmp_path / "venv"
    source.mkdir()
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    for step in ("dependencies", "package"):
        run = f"./install.sh {step} /opt/loramux"
        assert run in DOCKERFILE
        for name in copied_before(run):
            origin, target = ROOT / name, source / Path(name).name
            if origin.is_dir():
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(origin, target, dirs_exist_ok=True, ignore=ignore)
            else:
                shutil.copy(origin, target)
        subprocess.run(["./install.sh", step, venv], cwd=source, check=True)
    environment = {"PATH": f"{venv}/bin:{os.environ['PATH']}", "HOME": str(tmp_path)}
    shutil.rmtree(source)  # the image has the environment alone
    for arguments in (["--help"], ["serve", "--help"], ["version"]):
        done = subprocess.run(
            ["loramux", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode, done.stderr) == (0, ""), arguments
        assert "loramux" in done.stdout
    check = "import loramux_server.tracing as t, loramux_server.serve; t._check_installed()"
    subprocess.run([venv / "bin" / "python", "-c", check], cwd=tmp_path, env=environment, check=True)
