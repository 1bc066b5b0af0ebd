"""What the benchmarks of training share: a child process a measurement, its progress and memory, a file of results.

A measurement runs in a process of its own, so that none inherits another's memory, caches or threads. The child is the
benchmark's own module, started with `--measure` and one JSON object; it prints lines about how far it is, and what it found
as one that is a JSON object. Lines are shown on standard error as they come, with the seconds since the parent began.
Asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from loadtests import BenchError
from loadtests.report import FORMAT, RESULTS, cpu_model, usable_cores

_PLAIN_WIDTH = 120
_LIBRARIES = ("loramux", "torch", "transformers", "peft", "bitsandbytes")
_BEGAN = time.monotonic()


def options_parser(description: str | None) -> argparse.ArgumentParser:
    """With the options that all of them have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="'demo' or a model directory")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of each measurement")
    parser.add_argument("--save", action="store_true", help="keep the figures in loadtests/results")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)  # what a child is started with
    return parser


def in_child(module: str, what: str, argument: Mapping[str, Any], threads: int) -> Any:
    """What `module` measures of `argument`. Raises BenchError with the end of what the child said."""
    progress(what)
    command = [sys.executable, "-m", module, "--measure", json.dumps(argument)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    found, last = "", ""
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=environment) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            last = line.strip()
            if last.startswith("{"):
                found = last
            else:
                progress(f"{what}: {last}")
        if process.wait() or not found:
            said.seek(0)
            raise BenchError(f"{what} failed:\n{last}\n{said.read()[-2000:]}")
    return json.loads(found)


def answer(found: Any) -> None:
    """What a child measured, a dataclass, to its parent."""
    print(json.dumps(asdict(found)))


def progress(text: str) -> None:
    print(f"{time.monotonic() - _BEGAN:6.0f} s  {text}", file=sys.stderr, flush=True)


def console() -> Console:
    """Wide enough for a table, in a file too."""
    made = Console()
    if not made.is_terminal:
        made.width = _PLAIN_WIDTH
    return made


def goal_line(goal: Mapping[str, Any]) -> str:
    return f"  {'met    ' if goal['met'] else 'NOT MET'}  {goal['text']}: {goal['value']:.3g}"


def save(scenario: str, summary: str, settings: Mapping[str, Any], found: Mapping[str, Any]) -> Path:
    """`<date>-<scenario>.json` beside the other scenarios' results."""
    written = {
        "format": FORMAT,
        "scenario": scenario,
        "summary": summary,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_model(), "cores": usable_cores(), "system": platform.system()},
        "versions": {name: version(name) for name in _LIBRARIES},
        "settings": dict(settings),
        **found,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-{scenario}.json"
    path.write_text(json.dumps(written, indent=2) + "\n")
    return path


def reset_resident_peak() -> None:
    """Forget the highest so far, which loading set. Raises BenchError where there is no Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise BenchError(f"resident memory cannot be measured here: {error}") from error


def resident_now() -> int:
    return _status("VmRSS")


def resident_peak_since() -> int:
    """Since `reset_resident_peak`."""
    return _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise BenchError(f"/proc/self/status has no {field}")


def run_as_script(main: Callable[[], None], name: str) -> None:
    """`main`, whose BenchError is one sentence on standard error."""
    try:
        main()
    except BenchError as error:
        sys.exit(f"{name}: {error}")
