"""The machine without its GPU: Python, cores, memory, and whether the installed libraries are those that are asked for."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

import psutil
from packaging.requirements import Requirement

from loramux_adapters.host_memory import available_bytes
from loramux_adapters.native.build import CannotBuild, compiler
from loramux_server.doctor.finding import Finding, fault, note, ok

GIB = 2**30
_LEAST_MEMORY = 2 * GIB
_SHOWN = ("torch", "transformers", "peft", "bitsandbytes", "safetensors")
_OLDEST_PYTHON = (3, 11)


def environment() -> list[Finding]:
    return [_python(), _system(), _memory(), _compiler()]


def _python() -> Finding:
    found = f"Python {platform.python_version()}, {sys.executable}"
    if sys.version_info < _OLDEST_PYTHON:
        return fault(
            "python", found, "install Python 3.11 or newer and make a new virtual environment with it"
        )
    return ok("python", found)


def _system() -> Finding:
    return ok("system", f"{platform.platform()}, {os.cpu_count()} cores")


def _memory() -> Finding:
    available = available_bytes()
    found = f"{available / GIB:.1f} of {psutil.virtual_memory().total / GIB:.1f} GiB available"
    if available < _LEAST_MEMORY:
        return note("memory", found, "close other programs: loading a model takes a few GiB of host memory")
    return ok("memory", found)


def _compiler() -> Finding:
    try:
        return ok("compiler", compiler()[0])
    except CannotBuild as error:
        return note(
            "compiler", str(error), "install gcc: kernels for CPUs are compiled here, Triton's for CUDA too"
        )


def libraries(distribution: str = "loramux") -> Iterator[Finding]:
    """One finding for each library that is missing or has a version that is not supported, one for all the others."""
    try:
        wanted = [Requirement(text) for text in requires(distribution) or ()]
    except PackageNotFoundError:
        yield fault("libraries", f"{distribution} is not installed here", "pip install loramux")
        return
    fitting = 0
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        problem = _problem(requirement)
        if problem is None:
            fitting += 1
        else:
            yield fault(f"library {requirement.name}", problem, f"pip install '{_plain(requirement)}'")
    versions = ", ".join(f"{name} {version(name)}" for name in _SHOWN if _installed(name))
    yield ok("libraries", f"{fitting} as asked for; {versions}")


def _problem(requirement: Requirement) -> str | None:
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return "is not installed"
    if not requirement.specifier.contains(found, prereleases=True):
        return f"{found} is installed, loramux needs {requirement.specifier}"
    return None


def _plain(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
