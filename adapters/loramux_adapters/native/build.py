"""C sources to a loaded library: compiled once for this processor, kept in a directory.

Promises: a library is found only for these very sources, compiler, flags and processor, and appears whole or not at all.
Raises CannotBuild with one sentence if there is no compiler, or it does not like the sources, or nothing can be kept.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

_SOURCES = Path(__file__).parent
_FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-Wno-psabi", "-shared", "-fPIC")
_SECONDS = 120  # a compiler takes two


class CannotBuild(Exception):
    """Why there is no library, as one sentence."""


def load(directory: Path) -> ctypes.CDLL:
    """The library of this package's sources, from `directory` or built into it."""
    sources = sorted(_SOURCES.glob("*.c"))
    command = [*compiler(), *_FLAGS, _native()]
    path = directory / f"{_key(command, sources)}.so"
    try:
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError:  # damaged
                path.unlink()
        directory.mkdir(parents=True, exist_ok=True)
        _build(command, sources, path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise CannotBuild(f"the compiled library cannot be kept or opened: {error}") from error


def _native() -> str:
    return "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"


def compiler() -> list[str]:
    """The command that compiles. Raises CannotBuild if there is none."""
    if chosen := os.environ.get("CC"):
        return shlex.split(chosen)
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    raise CannotBuild("there is no C compiler (cc, gcc, clang, or what CC names)")


def _key(command: list[str], sources: list[Path]) -> str:
    digest = hashlib.sha256(repr(command).encode())
    digest.update(_run([command[0], "--version"]).encode())
    digest.update(_processor().encode())
    for source in (*sources, *sorted(_SOURCES.glob("*.h"))):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:32]


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("flags", "model name", "Features", "CPU part"))})
    )


def _build(command: list[str], sources: list[Path], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as scratch:
        made = Path(scratch) / path.name
        # The compiler's own files go here too: there may be no other place that can be written.
        _run([*command, *map(str, sources), "-o", str(made), "-lm"], {**os.environ, "TMPDIR": scratch})
        made.replace(path)


def _run(command: list[str], environment: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=False, env=environment
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise CannotBuild(f"{command[0]} does not run: {error}") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        errors = [line for line in said if "error" in line] or said
        raise CannotBuild(f"{command[0]} fails: {errors[0] if errors else done.returncode}")
    return done.stdout
