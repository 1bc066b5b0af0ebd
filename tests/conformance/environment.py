"""Virtual environments of their own for the suites: what they need never meets what loramux needs.

Below build/conformance/, which git ignores; made once and kept until their requirements change. Needs the package index.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "conformance"


class ConformanceError(Exception):
    """A suite could not be run at all."""


class Environment:
    """One suite's folder: `env/` is the virtual environment, the rest is the suite's.

    `resume`: what an interrupted run left in it counts, for a suite that can go on with that.
    """

    def __init__(self, name: str, requirements: Sequence[str], *, resume: bool = False) -> None:
        self.folder = BUILD / name
        self.resume = resume
        self._requirements = list(requirements)

    @property
    def bin(self) -> Path:
        return self.folder / "env" / "bin"

    def ensure(self) -> None:
        """Make it if it is missing or other things are required by now."""
        stamp = self.folder / "requirements.json"
        wanted = json.dumps(self._requirements)
        if stamp.is_file() and stamp.read_text() == wanted:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._requirements:
            return
        call([sys.executable, "-m", "venv", str(self.folder / "env")], self.folder)
        call([str(self.bin / "python"), "-m", "pip", "install", "--quiet", *self._requirements], self.folder)
        stamp.write_text(wanted)

    def run(
        self, *arguments: str | Path, cwd: Path | None = None, check: bool = True, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """A program of the environment, by its name in bin/."""
        program, *rest = map(str, arguments)
        return call([str(self.bin / program), *rest], cwd or self.folder, variables, check=check)

    def versions(self) -> dict[str, str]:
        """Of everything that was asked for by name."""
        if not self._requirements:
            return {}
        names = [_name(requirement) for requirement in self._requirements]
        script = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
        versions: dict[str, str] = json.loads(self.run("python", "-c", script, *names).stdout)
        return versions


def call(
    command: Sequence[str], cwd: Path, variables: Mapping[str, str] | None = None, *, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Raises ConformanceError with the end of what it said, if `check` and it failed."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **(variables or {})},
        text=True,
        capture_output=True,
        check=False,
    )
    (cwd / "last.log").write_text(done.stdout + done.stderr)
    if check and done.returncode:
        raise ConformanceError(f"{' '.join(command[:6])} ...: {(done.stdout + done.stderr)[-3000:]}")
    return done


def _name(requirement: str) -> str:
    return requirement.split("[")[0].split("=")[0].split(">")[0].split("<")[0]
